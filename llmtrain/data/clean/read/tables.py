"""Reads rows of Parquet and Arrow files. It runs in the process of `llmtrain.data.clean.read.apart`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from llmtrain.data.clean.read.items import BrokenError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

BATCH_ROWS = 32
Row = tuple[int, dict[str, Any]]


def parquet(path: str, columns: list[str] | None) -> Iterator[Row]:
    """Yields (number from 1, row without nulls) of a local file. `columns`: those that are read, the first of which the
    file must have; None = all."""
    from pyarrow.parquet import ParquetFile

    with open(path, "rb") as source, ParquetFile(source, pre_buffer=False) as file:
        wanted = chosen(file.schema_arrow.names, columns)
        yield from rows(file.iter_batches(BATCH_ROWS, columns=wanted, use_threads=False))


def arrow(path: str, columns: list[str] | None) -> Iterator[Row]:
    """Yields (number from 1, row without nulls) of a file that `save_to_disk` of datasets wrote."""
    import pyarrow

    with pyarrow.memory_map(path) as source, pyarrow.ipc.open_stream(source) as batches:
        wanted = chosen(batches.schema.names, columns)
        yield from rows(piece for batch in batches for piece in pieces(batch.select(wanted)))


def chosen(there: list[str], columns: list[str] | None) -> list[str]:
    """Returns which columns are read. Raises BrokenError when the file has not that of the text."""
    if columns is None:
        return there
    if columns[0] not in there:
        raise BrokenError("no_field")
    return [name for name in columns if name in there]


def pieces(batch: RecordBatch) -> Iterator[RecordBatch]:
    """Yields a batch in parts of a few rows."""
    for start in range(0, batch.num_rows, BATCH_ROWS):
        yield batch.slice(start, BATCH_ROWS)


def rows(batches: Iterable[RecordBatch]) -> Iterator[Row]:
    """Yields (number from 1, row without nulls), one row at a time as Python objects."""
    number = 0
    for batch in batches:
        for index in range(batch.num_rows):
            number += 1
            values = ((name, batch.column(i)[index].as_py()) for i, name in enumerate(batch.schema.names))
            yield number, {name: value for name, value in values if value is not None}
