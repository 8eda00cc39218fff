"""Takes a document out of a row: its text, and what the row says of its id, date, licence, language and address."""

from __future__ import annotations

from typing import Any

from llmtrain.config.clean import CollectConfig
from llmtrain.config.clean.collect import kind_of
from llmtrain.data.clean.read.dialogue import rendered
from llmtrain.data.clean.read.items import Found, Item, Skipped

# By the key that a document has: what rows call it, the first that is there.
NAMES = {
    "date": ("date", "timestamp", "published", "published_at", "created", "created_at", "time"),
    "licence": ("licence", "license", "licenses"),
    "language": ("language", "lang"),
    "url": ("url", "uri", "link"),
}
NESTED = ("metadata", "meta")  # objects in a row that hold them too
COLUMNS = (*NESTED, *(name for names in NAMES.values() for name in names))
MAX_CHARS = 2000  # of such a value; longer ones are something else


def found(record: dict[str, Any], number: int, config: CollectConfig, notes: tuple[str, ...] = ()) -> Item:
    """Returns the document of a row, or why it has none."""
    try:
        text = rendered(record) if kind_of(config) == "dialogue" else record.get(config.field)
    except (ValueError, RecursionError):
        return Skipped(number, "no_dialogue")
    if text is None:
        return Skipped(number, "no_field")
    if not isinstance(text, str):
        return Skipped(number, "not_text")
    if len(text) > config.max_bytes:
        return Skipped(number, "too_large")
    return Found(number, text, known(record) | {"id": value_of(record.get(config.id_field or ""))}, notes)


def known(record: dict[str, Any]) -> dict[str, str]:
    """Returns what a row says of its document, under the documents' own names."""
    places = [record, *(record[name] for name in NESTED if isinstance(record.get(name), dict))]
    values = {
        key: next((v for place in places for name in names if (v := value_of(place.get(name))) is not None), None)
        for key, names in NAMES.items()
    }
    return {key: value for key, value in values.items() if value is not None}


def value_of(value: Any) -> str | None:
    """Returns a value of metadata as text, None where it is nothing, or nothing of the kind."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, list) and 0 < len(value) <= 20 and all(isinstance(each, str) for each in value):
        value = " ".join(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        return None
    text = str(value) if not isinstance(value, int) or value.bit_length() < 256 else ""
    return text if 0 < len(text) <= MAX_CHARS else None
