"""Lets models take turns on one device."""

from __future__ import annotations

from collections.abc import Sequence

from llmtrain.engine.base import Scorer


class Turns:
    """Moves models between device and host, so that one is on the device at a time; if none `waits`, all stay there."""

    def __init__(self, models: Sequence[Scorer], waits: bool) -> None:
        self.models = models if waits else ()

    def of(self, working: Scorer | None) -> None:
        """Moves the other models to the host, and then the one that is to work (None: none) to the device.

        Models that share their parts, as a reference that is the policy without its adapters, move together.
        """
        for model in self.models:
            if working is None or model.parts is not working.parts:
                model.to_host()
        for model in self.models:
            if working is not None and model.parts is working.parts:
                model.to_device()
