"""Programs of users that do not work, for tests of `rollout.agent`."""

from __future__ import annotations

import time


def fails(example: dict, base_url: str, api_key: str) -> float | str:
    """Does what the example says."""
    match example["do"]:
        case "raise":
            raise KeyError("no such thing")
        case "sleep":
            time.sleep(60)
        case "text":
            return "good"
    return 1.0


def none() -> None:
    """Takes nothing."""
