"""Finds email and IP addresses.

Not datatrove's PIIFormatter: its pattern for addresses takes time quadratic in texts such as `a!a!a!`, and its pattern
for IPs finds versions and parts of longer numbers, as in 1.23.45.67.89; see docs/cleaning.md.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from functools import cache

LOCAL_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._%+'-")
LOCAL_MOST = 64  # characters before the @ (RFC 5321, 4.5.3.1.1)
LABEL = r"[^\W_](?:[\w-]{0,61}[^\W_])?"
DOMAIN = re.compile(rf"@((?:{LABEL}\.){{1,8}})([^\W\d_]{{2,24}}|xn--[a-z0-9-]{{2,59}})(?![\w-])")
IP4 = re.compile(r"(?<![\w.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?!\.?\w|-[A-Za-z])")
NO_IP_BEFORE = re.compile(
    r"(?:\b(?:versions?|ver|v|release|rel|sections?|sec|chapter|figure|fig|table|oid)|§|[=~<>!]=|[A-Za-z]-)[\s.:='\"]{0,3}$",
    re.IGNORECASE,
)  # what four numbers behind it are not
BEFORE = 24  # characters that NO_IP_BEFORE looks at
IP6 = re.compile(r"(?<![\w:.])[23Ff][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{1,34}(?!\w)")


def find_emails(text: str) -> Iterator[tuple[int, int]]:
    """Yields the spans of email addresses whose last label is a top-level domain. `git@host:path` is none."""
    at = text.find("@")
    while at >= 0:
        end = at + 1
        domain = DOMAIN.match(text, at)
        if domain and domain[2].lower() in top_levels():
            start, end = local_start(text, at), domain.end()
            if start < at and text[start:at] != "git":
                yield start, end
        at = text.find("@", end)


def local_start(text: str, at: int) -> int:
    """Returns where the part before the @ begins; letters of Latin scripts may stand in it."""
    start, least = at, max(0, at - LOCAL_MOST)
    while start > least and (text[start - 1] in LOCAL_CHARS or ("\xc0" <= text[start - 1] < "\u0250")):
        start -= 1
    while start < at and text[start] in ".'-%+":
        start += 1  # a quote or the end of a sentence
    return start


@cache
def top_levels() -> frozenset[str]:
    """Returns all top-level domains, from the list that tldextract brings along; nothing is downloaded."""
    import tldextract

    suffixes = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None).tlds
    return frozenset(suffix.rpartition(".")[2] for suffix in suffixes)


def find_ips(text: str, private: bool = False) -> Iterator[tuple[int, int]]:
    """Yields the spans of IP addresses that are global, or also of others. Four numbers of one digit each, and those
    behind a word such as `version`, are no address."""
    for match in IP4.finditer(text):
        if len(match[0]) > 7 and is_address(match[0], private):
            before = text[max(0, match.start() - BEFORE) : match.start()]
            if not NO_IP_BEFORE.search(before):
                yield match.span()
    for match in IP6.finditer(text):
        address = match[0].removesuffix(":")
        if is_address(address, private):
            yield match.start(), match.start() + len(address)


def is_address(text: str, private: bool) -> bool:
    """Returns whether a text is an IP address, and one of the public internet where `private` is false."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return (address.is_global and not address.is_multicast) or private
