"""Tokens as text while they come."""

from __future__ import annotations

from llmtrain.data.stream import text_of


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def test_characters_of_several_tokens_come_whole() -> None:
    text = "aé漢🙂!"
    assert list(text_of(text.encode(), decode)) == ["a", "é", "漢", "🙂", "!"]


def test_nothing_is_lost_of_bytes_that_never_make_a_character() -> None:
    for ids in (b"a\xff", b"\xe6\xbc", b"a\xffb", b""):
        assert "".join(text_of(ids, decode)) == decode(list(ids))
