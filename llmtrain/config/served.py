"""Checks how a server of the OpenAI protocol is named in a document: its URL, its model, and where its token is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from urllib.parse import urlsplit

SCHEMES = ("http://", "https://")


def reachable(key: str, url: str, model: str, token_env: str | None) -> Iterator[str]:
    """Yields what is missing to ask a server, or is too much."""
    if not url.startswith(SCHEMES) or not is_plain(url):
        yield (
            f"{key}={address(url)}: must be http://host:port/v1 or https, without user, query and fragment; "
            "correct it, a token belongs into the environment variable that token_env names"
        )
    if not model:
        yield f"{key}.model: must be set, a server has a name for each of its models; GET /v1/models lists them"
    yield from token_faults(key, token_env)


def token_faults(key: str, token_env: str | None) -> Iterator[str]:
    """Yields what is wrong with the environment variable that holds a token; None where it wants none."""
    token = os.environ.get(token_env) if token_env else "none"
    if not token:
        yield f"{key}.token_env={token_env}: is not set in the environment; export it, or remove the key"
    elif not (token.isascii() and token.isprintable()):  # an error of the HTTP library would show it
        yield f"{key}.token_env={token_env}: must hold printable ASCII in one line; correct what is exported"


def token_of(token_env: str | None) -> str | None:
    """Returns the token that the environment holds for a server; None where it wants none."""
    return os.environ[token_env] if token_env else None


def is_plain(url: str) -> bool:
    """Tells whether a URL is a host, perhaps a port and a path, and nothing else."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0 and not (parts.username or parts.query or parts.fragment)
    except ValueError:  # a port that is no number
        return False


def address(url: str) -> str:
    """Returns the URL of a server as it may be shown: what stands before an @ may be a secret."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
