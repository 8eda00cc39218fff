"""Hosts that tools may reach: what an entry of the list may be."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from pydantic import ValidationError

from llmtrain.config.retrieval import Allowed, WebConfig, parsed_host


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("En.Wikipedia.org", Allowed("en.wikipedia.org", None, None)),
        ("*.a.org", Allowed("*.a.org", None, None)),
        ("localhost:8080", Allowed("localhost", 8080, None)),
        ("127.0.0.1:80", Allowed("127.0.0.1", 80, ip_network("127.0.0.1"))),
        ("10.0.0.0/8", Allowed("10.0.0.0/8", None, ip_network("10.0.0.0/8"))),
        ("::1", Allowed("::1", None, ip_network("::1"))),
        ("[fe80::1]:81", Allowed("fe80::1", 81, ip_network("fe80::1"))),
    ],
)
def test_an_entry(text: str, allowed: Allowed) -> None:
    assert parsed_host(text) == allowed


@pytest.mark.parametrize(
    "text", ["", "*", "http://a.org", "a.org/x", "a.org:0", "a.org:99999", "a b", "*.*.org", "a..b"]
)
def test_what_is_no_host(text: str) -> None:
    with pytest.raises(ValidationError):
        WebConfig(hosts=[text])


@pytest.mark.parametrize(
    "keys", [{"endpoint": "http://a.org/"}, {"endpoint": "file:///{query}"}, {"fields": {"x": "y"}}]
)
def test_an_endpoint_that_cannot_work(keys: dict) -> None:
    with pytest.raises(ValidationError):
        WebConfig(hosts=["a.org"], **keys)
