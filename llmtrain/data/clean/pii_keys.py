"""Finds keys and tokens: those of a known form, private keys, and what is assigned to `api_key` and the like."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from math import log2

KNOWN = re.compile(
    r"(?<![\w-])(?:"
    r"(?:AKIA|ASIA|AGPA|AIDA|AROA|ANPA|ANVA|AIPA)[A-Z0-9]{16}"  # Amazon
    r"|gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9_]{36,244}"
    r"|glpat-[\w-]{20,64}"  # GitLab
    r"|xox[abeprs]-[A-Za-z0-9-]{10,250}"  # Slack
    r"|AIza[\w-]{35}|ya29\.[\w-]{20,250}"  # Google
    r"|[sr]k_(?:live|test)_[A-Za-z0-9]{16,128}"  # Stripe
    r"|hf_[A-Za-z]{34}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,250}"
    r"|SG\.[\w-]{22}\.[\w-]{43}"  # SendGrid
    r"|eyJ[\w-]{8,4000}\.eyJ[\w-]{8,4000}\.[\w-]{8,4000}"  # JSON web token (RFC 7519)
    r")(?![\w-])"
)
OPENAI_LIKE = re.compile(r"(?<![\w-])sk-[\w-]{20,250}(?![\w-])")
PRIVATE = re.compile(
    r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----(?:[A-Za-z0-9+/=\s\\,:;.\"'()]|-(?!-))*+"
    r"-----END (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
)
ASSIGNED = re.compile(
    r"(?:api[_-]?key|secret|token|passw(?:or)?d|passwd|pwd|credential|access[_-]?key|private[_-]?key|auth)[\w-]{0,30}"
    r"[\"']?[ \t]{0,4}(?::=|=>|[:=])[ \t]{0,4}(?:([\"'`])([\w+/~-]{16,256}={0,2})\1|([\w+/~-]{20,256}={0,2})(?=\s|$))",
    re.IGNORECASE | re.ASCII,
)


def find_keys(text: str, min_entropy: float) -> Iterator[tuple[int, int]]:
    """Yields the spans of keys and tokens. `min_entropy`: bits a character of those without a known form."""
    yield from (match.span() for match in PRIVATE.finditer(text))
    yield from (match.span() for match in KNOWN.finditer(text))
    yield from (match.span() for match in OPENAI_LIKE.finditer(text) if is_secret(match[0][3:], min_entropy))
    for match in ASSIGNED.finditer(text):
        group = 2 if match[2] else 3
        if is_secret(match[group], min_entropy):
            yield match.span(group)


def is_secret(value: str, min_entropy: float) -> bool:
    """Returns whether a value looks drawn: two digits and two letters at least, and so much entropy a character."""
    digits, letters = sum(map(str.isdigit, value)), sum(map(str.isalpha, value))
    return digits >= 2 and letters >= 2 and entropy(value) >= min_entropy


def entropy(value: str) -> float:
    """Returns the bits a character of a text, from how often each character stands in it: 1.0 for "abab"."""
    shares = [number / len(value) for number in Counter(value).values()]
    return -sum(share * log2(share) for share in shares)
