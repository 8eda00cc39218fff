"""Decodes the bytes of pages and texts, by what they declare, then as UTF-8, by detection, and as Windows-1252."""

from __future__ import annotations

import codecs
import re

from llmtrain.data.clean.read.items import UnusableError

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins with that of UTF-16, so it comes before
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What browsers read under another name (WHATWG, encoding standard, section 4.2).
WIDER = {"ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "gb2312": "gb18030", "gbk": "gb18030"} | {
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
# Python knows more, of which some are no charset (zlib), or take quadratic time (punycode).
CHARSETS = (
    {"utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030", "big5", "big5hkscs", "cp932", "cp949", "cp866"}
    | {"euc_jp", "iso2022_jp", "koi8-r", "koi8-u", "mac-cyrillic", "mac-roman", "cp874", "tis-620"}
    | {f"cp125{i}" for i in range(9)}
    | {f"iso8859-{i}" for i in range(2, 17)}
)
NAME = re.compile(r"[\w.:-]{1,40}", re.ASCII)
META = re.compile(
    rb"""<(?:meta\b[^>]{0,512}?charset|\?xml\b[^>]{0,512}?encoding)\s*=\s*["']?\s*([\w.:-]{1,40})""", re.I
)
META_BYTES = 4096  # where a page says its charset (browsers look at 1024)
DETECTED_BYTES = 2**20  # what detection looks at
CONTROLS = bytes({*range(32), 127} - set(b"\t\n\v\f\r\x1b"))
MAX_CONTROLS, MAX_REPLACED = 0.01, 0.1  # shares of bytes, of characters, above which bytes are no text
MIN_LETTERS = 0.5  # share of what is not white space, and share of the letters that are ASCII, in Western text
GUESSED = "charset_guessed"
FEW_CONTROLS = 8  # as many make no row binary, however short it is
SURROGATE = re.compile("[\ud800-\udfff]")


def charset(name: str | None) -> str | None:
    """Returns the codec of a charset's name, None where there is none that is safe."""
    if not name or not NAME.fullmatch(name):
        return None
    try:
        known = codecs.lookup(name).name
    except LookupError:
        return None
    known = WIDER.get(known, known)
    return known if known in CHARSETS else None


def declared(page: bytes) -> str | None:
    """Returns the charset that an HTML page names in its first bytes."""
    found = META.search(page[:META_BYTES])
    return found[1].decode("ascii") if found else None


def decode(data: bytes, named: str | None = None) -> tuple[str, tuple[str, ...]]:
    """Returns (text, notes). `named`: the charset that the place says. Raises UnusableError("binary") when the bytes
    are no text.

    A note says `charset_detected`, `charset_guessed` where that failed and Windows-1252 explains the bytes, or
    `bytes_replaced` where U+FFFD stands for bytes that no charset explains.
    """
    for mark, codec in MARKS:
        if data.startswith(mark):
            return replaced(data[len(mark) :], codec)
    if len(data) - len(data.translate(None, CONTROLS)) > max(FEW_CONTROLS, MAX_CONTROLS * len(data)):
        raise UnusableError("binary")
    for codec in filter(None, (charset(named), "utf-8")):
        try:
            return data.decode(codec), ()
        except UnicodeDecodeError:
            continue
    return detected(data)


def detected(data: bytes) -> tuple[str, tuple[str, ...]]:
    """Returns (text, notes) of bytes that are not wholly in UTF-8, nor in what was declared."""
    import cchardet

    if is_mostly_utf8(data):
        return replaced(data, "utf-8")
    codec = charset(cchardet.detect(data[:DETECTED_BYTES])["encoding"])
    try:
        if codec:
            return data.decode(codec), ("charset_detected",)
    except UnicodeDecodeError:
        pass
    western = guessed(data)
    return replaced(data, "utf-8") if western is None else (western, (GUESSED,))


def is_mostly_utf8(data: bytes) -> bool:
    """Returns whether of what is not ASCII more characters are valid UTF-8 than are not: detection and guesses would
    make nonsense of these."""
    text = data.decode("utf-8", "replace")
    return len(text) - len(text.encode("ascii", "ignore")) > 2 * text.count("\ufffd")


def guessed(data: bytes) -> str | None:
    """Returns what bytes say in Windows-1252, which holds Latin-1's characters; None unless that is text: no control
    character, mostly letters, and most of these ASCII, as in every Western language (another alphabet has none)."""
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    start = "".join(text[:DETECTED_BYTES].split())
    letters = "".join(filter(str.isalpha, start))
    is_text = len(data) == len(data.translate(None, CONTROLS)) and len(letters) >= MIN_LETTERS * len(start)
    is_western = len(letters.encode("ascii", "ignore")) >= MIN_LETTERS * len(letters) > 0
    return text if is_text and is_western else None


def replaced(data: bytes, codec: str) -> tuple[str, tuple[str, ...]]:
    """Returns (text, notes), U+FFFD in place of bytes that do not fit."""
    text = data.decode(codec, "replace")
    count = text.count("\ufffd")
    if count > MAX_REPLACED * len(text):
        raise UnusableError("binary")
    return text, ("bytes_replaced",) if count else ()


def mended(text: str) -> tuple[str, tuple[str, ...]]:
    """Returns (text, notes) without NULs and with U+FFFD for halves of surrogate pairs, which no step can take."""
    notes = []
    if "\0" in text:
        text, notes = text.replace("\0", ""), ["nul_removed"]
    if not text.isascii() and SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        notes.append("surrogates_replaced")
    return text, tuple(notes)


def shown(path: str) -> str:
    """Returns a path as valid text; bytes of a file name that are not UTF-8 as `\\xff`."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
