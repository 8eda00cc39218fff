"""A run that goes on with other ranks and loader threads trains the rows of one that was never disturbed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmtrain.config.schema import DataConfig, SourceConfig, TokenizerConfig
from llmtrain.data.prepare import prepare
from tests.forked import run_alone, run_forked
from tests.small_run import DOCUMENT

WORKER = Path(__file__).with_name("rows_worker.py")
MIX = (
    "data.sources=[{name: topics, type: topics, max_bytes: 60000, weight: 3}, "
    "{name: sums, type: arithmetic, count: 200, max_epochs: 0.5}]"
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The small run on two sources, one of which has a cap, in whole documents; a checkpoint every second step."""
    sources = [
        SourceConfig(name="topics", type="topics", max_bytes=60_000),
        SourceConfig(name="sums", type="arithmetic", count=200),
    ]
    vocabulary = TokenizerConfig(vocab_size=512)
    prepare(DataConfig(sources=sources), vocabulary, str(tmp_path / "shards"), str(tmp_path / "tokenizer"), seed=1)
    path = tmp_path / "small.yaml"
    document = DOCUMENT.format(data=tmp_path).replace("every_steps: 3", "every_steps: 2")
    path.write_text(document.replace("data: {", "data: {packing: best_fit, "))
    return path


def trained(
    config: Path, name: str, ranks: int, workers: int, go_on: Path | None = None
) -> tuple[list[int], list[float]]:
    """Checksums of all rows that a run trains, in their order, and its losses; `go_on` is a checkpoint."""
    run_dir, rows = config.parent / name, config.parent / f"{name}-rows"
    rows.mkdir()
    if go_on is not None:
        shutil.copytree(go_on, run_dir / "checkpoints" / go_on.name)
    arguments = (WORKER, "pretrain", config, f"run_dir={run_dir}", f"data.loader_workers={workers}", MIX)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROWS", str(rows))
        done = run_alone(*arguments) if ranks == 1 else run_forked(ranks, *arguments, timeout_s=240)
    assert done.returncode == 0, done.stdout[-3000:]
    assert (go_on is None) == ("resumed" not in done.stdout)
    by_rank = [[json.loads(line) for line in (rows / str(rank)).read_text().splitlines()] for rank in range(ranks)]
    steps = zip(*by_rank, strict=True)  # microbatch m of rank r is number m x ranks + r of its step
    order = [row for step in steps for batches in zip(*step, strict=True) for batch in batches for row in batch]
    return order, [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_other_ranks_and_loader_threads_in_mid_run_train_the_same_rows(config: Path) -> None:
    """One rank without threads for two steps, two ranks with three threads for two, one rank for the last two."""
    rows, losses = trained(config, "straight", 1, 0)
    assert len(rows) == 6 * 8 and len(set(rows)) == 6 * 8
    two = trained(config, "two", 2, 3, config.parent / "straight/checkpoints/step-00000002")
    one = trained(config, "one", 1, 1, config.parent / "two/checkpoints/step-00000004")
    assert (two[0], one[0]) == (rows[16:], rows[32:])
    # fp32: two ranks add up the gradient of a step in another order
    assert two[1] == pytest.approx(losses[2:], rel=1e-5) and one[1] == pytest.approx(losses[4:], rel=1e-5)
