"""Implements `llmtrain report`: plots and one HTML page."""

from __future__ import annotations

from llmtrain.config.schema import Config
from llmtrain.observe.log import log
from llmtrain.observe.report import write_report


def main(config: Config) -> None:
    """Writes the report of `report.path`, or else of the run directory."""
    log(f"report: {write_report(config.report.path or config.directory)}")
