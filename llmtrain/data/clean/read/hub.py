"""Reads data sets by `datasets`: of the hub, or of a local directory that it can load."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.config.clean import CollectConfig
from llmtrain.data.clean.read.apart import Apart
from llmtrain.data.clean.read.fields import found
from llmtrain.data.clean.read.items import BrokenError, Item
from llmtrain.data.clean.read.rows import table


def dataset_file(path: str, config: CollectConfig, apart: Apart) -> Iterator[Item]:
    """Yields the rows of a file that `save_to_disk` wrote, or of a whole data set that datasets loads by name."""
    return table("tables:arrow", path, config, apart) if path.endswith(".arrow") else loaded_rows(path, config)


def loaded_rows(path: str, config: CollectConfig) -> Iterator[Item]:
    """Yields the rows of a data set. Raises ValueError when it cannot be had at all; a row that datasets cannot read
    ends it."""
    import datasets

    try:
        rows = datasets.load_dataset(path, config.configuration, split=config.split, streaming=config.streamed)
    except Exception as error:  # whatever the hub client, the network and the loaders raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"data.collect.{config.name}.path={path}: it cannot be loaded by datasets ({reason}); give another name, "
            "`configuration` or `split`, or a directory"
        ) from None
    row, number = iter(rows), 0
    while True:
        try:
            record = next(row, None)
        except Exception:  # as above
            raise BrokenError("datasets_broken") from None
        if record is None:
            return
        number += 1
        yield found({name: value for name, value in record.items() if value is not None}, number, config)
