"""Says no as the OpenAI protocol does: a status, and an object `error`."""

from __future__ import annotations

from typing import Any

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}


class Refused(Exception):
    """Holds what a client is told: the value, the rule and the remedy."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """Returns the answer as the protocol has it."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
