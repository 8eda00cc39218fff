"""The tools fetch and web_search against a server of this machine: every answer becomes words for the policy."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from llmtrain.config.retrieval import WebConfig
from llmtrain.envs.toolbox import ToolBox
from llmtrain.envs.web import fetch_tool, web_search_tool
from tests.servers import Answer, Server, reply, serving

PAGE = "<html><head><title>T</title></head><body><article><p>{}</p></article></body></html>"
PROSE = "Ein Satz über die Straße, der lang genug ist, um gelesen zu werden. " * 3


def answers(data: bytes, status: int = 200, **headers: str) -> Answer:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: reply(handler, status, data, **headers)


def fetched(server: Server, path: str = "/page", **settings: Any) -> str:
    hosts = [f"127.0.0.1:{server.server_port}"]
    box = ToolBox([fetch_tool(WebConfig(hosts=hosts, **settings))], 10_000)
    try:
        return box.call("fetch", {"url": f"http://127.0.0.1:{server.server_port}{path}"})
    finally:
        box.close()


def test_plain_text_and_json_come_as_they_are() -> None:
    for type_ in ("text/plain", "text/markdown; charset=utf-8", "application/json"):
        with serving(answers("é {}\n".encode(), Content_Type=type_)) as server:
            assert fetched(server) == f"http://127.0.0.1:{server.server_port}/page\né {{}}"


@pytest.mark.parametrize("type_", ["application/pdf", "image/png", ""])
def test_other_types_are_told(type_: str) -> None:
    with serving(answers(b"%PDF", Content_Type=type_)) as server:
        told = fetched(server)
    assert told.startswith("error: http") and "is of the type" in told and told.endswith("which is no text")


def test_what_says_it_is_text_and_is_not() -> None:
    with serving(answers(bytes(range(256)) * 9, Content_Type="text/plain")) as server:
        assert fetched(server).endswith("/page: is no text (binary)")


def test_places_that_are_not_allowed_and_pages_that_are_too_large() -> None:
    with serving(answers(b"x" * 100, Content_Type="text/plain")) as server:
        assert "answers with more than 99 bytes" in fetched(server, max_bytes=99)
    box = ToolBox([fetch_tool(WebConfig(hosts=["a.org"]))])
    assert box.call("fetch", {"url": "http://b.org/"}) == "error: the host b.org is not allowed; allowed: a.org"
    assert box.call("fetch", {"url": "no url"}) == "error: 'no url' is no URL of http or https"
    assert box.call("fetch", {"url": 3}) == "error: fetch: the argument 'url' must be of type string"


@pytest.mark.parametrize(
    ("sent", "said"), [("utf-8", "utf-8"), ("latin-1", "latin-1"), ("latin-1", "utf-8"), ("utf-8", "x")]
)
def test_html_is_read_for_its_text_whatever_charset_it_says(sent: str, said: str) -> None:
    """It is decoded as the server says; where that cannot be, as what it is."""
    pytest.importorskip("datatrove")
    html = PAGE.format(PROSE).encode(sent)
    with serving(answers(html, Content_Type=f"text/html; charset={said}")) as server:
        assert fetched(server) == f"http://127.0.0.1:{server.server_port}/page\n{PROSE.strip()}"


def test_html_without_text() -> None:
    pytest.importorskip("datatrove")
    with serving(answers(b"<html><script>x()</script></html>", Content_Type="text/html")) as server:
        assert fetched(server) == "error: the page has no text that can be read (empty)"


def found(server: Server, query: str, **settings: Any) -> str:
    place = f"127.0.0.1:{server.server_port}"
    section = WebConfig(hosts=[place], endpoint=f"http://{place}/search?q={{query}}&n={{k}}", **settings)
    return ToolBox([web_search_tool(section)]).call("web_search", {"query": query})


def test_results_of_a_search_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [{"title": f"T{i}\n", "url": f"https://a.org/{i}", "content": "x" * 600, "z": 1} for i in range(9)]
    monkeypatch.setenv("KEY_OF_SEARCH", "secret")
    with serving(answers(json.dumps({"results": results}).encode())) as server:
        told = found(server, "a b&c=ü/#", k=2, token_env="KEY_OF_SEARCH")
    assert told == f"[1] T0 https://a.org/0\n{'x' * 500}\n\n[2] T1 https://a.org/1\n{'x' * 500}"
    (path, headers, _), *more = server.asked
    assert path == "/search?q=a%20b%26c%3D%C3%BC%2F%23&n=2" and headers["Authorization"] == "Bearer secret" and not more
    with pytest.raises(ValueError, match=r"web.token_env=KEY_OF_NOTHING: is not set in the environment; export it"):
        found(server, "x", token_env="KEY_OF_NOTHING")
    monkeypatch.setenv("KEY_OF_SEARCH", "secret\n")  # an error of the HTTP library would show it
    with pytest.raises(ValueError, match=r"token_env=KEY_OF_SEARCH: must hold printable ASCII in one line; corr"):
        found(server, "x", token_env="KEY_OF_SEARCH")


def test_results_under_other_names() -> None:
    answer = {"web": {"hits": [{"name": "T", "link": "u", "snippet": None}, {"name": 3}]}}
    fields = {"title": "name", "url": "link", "text": "snippet"}
    with serving(answers(json.dumps(answer).encode())) as server:
        assert found(server, "x", results="web.hits", fields=fields) == "[1] T u\n\n\n[2] 3 \n"


@pytest.mark.parametrize(
    "data",
    [b"<html>", b"[]", b"{}", b'{"results": {}}', b'{"results": "abc"}', b'{"results": [1]}', b"[" * 99_999, b"\xff"],
)
def test_an_engine_that_answers_something_else(data: bytes) -> None:
    with serving(answers(data)) as server:
        assert found(server, "x") == "error: the search engine answers with something else than results"


def test_a_key_in_the_endpoint_is_not_shown() -> None:
    def busy(handler: BaseHTTPRequestHandler, _: Any) -> None:
        reply(handler, 429, b"")

    with serving(busy) as server:
        place = f"127.0.0.1:{server.server_port}"
        section = WebConfig(hosts=[place], endpoint=f"http://{place}/search?q={{query}}&key=s3cret")
        told = ToolBox([web_search_tool(section)]).call("web_search", {"query": "a: b"})
    assert told == "error: the search engine does not answer: status 429"


def test_an_engine_that_finds_nothing_or_leads_away() -> None:
    with serving(answers(b'{"results": []}')) as server:
        assert found(server, "x") == "nothing was found; try other words"

    def away(handler: BaseHTTPRequestHandler, _: Any) -> None:
        reply(handler, 302, b"", Location="/search2")

    with serving(away) as server:
        assert "more than 0 redirects" in found(server, "x") and len(server.asked) == 1
