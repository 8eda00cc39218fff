"""Takes the words out of a text, as BM25 counts them. Pure."""

from __future__ import annotations

import unicodedata

import regex

# Scripts that put no space between words: each of their characters is a word of its own.
UNSPACED = "".join(rf"\p{{{s}}}" for s in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar"))
WORD = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{UNSPACED}]]+", regex.V1)


def words_of(text: str) -> list[str]:
    """Returns the words of a text in one form: no case, and one spelling for what looks alike (Unicode NFKC).

    There are no stop words and no stems: what stands everywhere weighs little in BM25 anyway, in any language.
    Example: "ﬁle os.path_join 東京" -> ["file", "os", "path", "join", "東", "京"]
    """
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())
