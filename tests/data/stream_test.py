"""Tokens as text while they come."""

from __future__ import annotations

from llmtrain.data.stream import text_of, unsure


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def test_characters_of_several_tokens_come_whole() -> None:
    text = "aé漢🙂!"
    assert list(text_of(text.encode(), decode)) == ["a", "é", "漢", "🙂", "!"]


def test_nothing_is_lost_of_bytes_that_never_make_a_character() -> None:
    for ids in (b"a\xff", b"\xe6\xbc", b"a\xffb", b""):
        assert "".join(text_of(ids, decode)) == decode(list(ids))


def test_only_the_newest_tokens_are_decoded_again() -> None:
    lengths = []

    def counted(ids: list[int]) -> str:
        lengths.append(len(ids))
        return decode(ids)

    assert "".join(text_of(("é!" * 200).encode(), counted)) == "é!" * 200
    assert max(lengths) <= 4


def test_a_decoder_that_drops_the_first_space_is_asked_with_what_stands_before() -> None:
    words = ["▁a", "▁b", "c", "▁d"]
    pieces = text_of(range(4), lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" "))
    assert list(pieces) == ["a", " b", "c", " d"]


def test_the_end_of_a_text_may_begin_a_mark() -> None:
    assert unsure("a <to", ["<tool_call>"]) == 3
    assert unsure("ENEN", ["END", "NE"]) == 2
    assert unsure("END", ["END"]) == unsure("", ["END"]) == unsure("a", []) == 0
