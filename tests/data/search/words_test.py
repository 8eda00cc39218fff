"""Words of BM25: one form for what people take for the same word."""

from __future__ import annotations

import pytest

from llmtrain.data.search.words import words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The CAT's ﬁle, os.path_join(x1)!", ["the", "cat", "s", "file", "os", "path", "join", "x1"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("cafe\u0301 café", ["café", "café"]),
        ("東京 2024年", ["東", "京", "2024", "年"]),
        ("カタカナabc", ["カ", "タ", "カ", "ナ", "abc"]),
        ("हिन्दी", ["हिन्दी"]),
        ("... --- \n", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert words_of(text) == words
