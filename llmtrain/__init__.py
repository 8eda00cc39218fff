"""Trains language models: from raw pages to a reasoning model, on one laptop or a cluster."""

__version__ = "0.1.0"
