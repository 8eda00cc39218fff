"""The runs of a ladder: tokens, steps and rates of each size at each budget, worked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.load import load, stage_config
from llmtrain.config.schema import Config
from llmtrain.scaling.ladder import data_document, document, members, seconds_of

SHAPE = {"num_layers": 2, "hidden_size": 32, "ffn_size": 96, "num_heads": 2, "num_kv_heads": 2}  # N = 29,984
WIDE = {"name": "wide", "num_layers": 2, "hidden_size": 64, "ffn_size": 192, "num_heads": 4, "num_kv_heads": 4}


def config(folder: Path, **ladder: Any) -> Config:
    """A document with one size and one budget, unless told otherwise."""
    section = {"sizes": [SHAPE, WIDE], "budgets": [{"flops": 1e10}], "min_steps": 20, **ladder}
    text = {
        "name": "l",
        "run_dir": str(folder / "l"),
        "model": {"vocab_size": 100, "max_positions": 64, "mup": {"base_hidden": 32}},
        "train": {"seq_len": 64, "micro_batch_seqs": 4, "global_batch_seqs": 8},
        "optim": {"lr": 4e-3, "min_lr": 4e-4},
        "ladder": section,
    }
    (folder / "l.yaml").write_text(json.dumps(text))
    return load(str(folder / "l.yaml"), [])


def test_tokens_and_steps(tmp_path: Path) -> None:
    narrow, wide = members(config(tmp_path))
    assert (narrow.id, wide.id) == ("1e10-2x32", "1e10-wide")
    assert narrow.size.params == 29_984
    assert narrow.steps == 109, "1e10 / (6 x 29,984 x 8 x 64) = 108.56"
    assert narrow.tokens == 109 * 512 == 55_808
    assert narrow.flops == 6 * 29_984 * 55_808 == 10_040_082_432
    assert narrow.warmup_steps == 5, "0.05 of 109"
    assert wide.size.params == 2 * (4 * 64 * 64 + 3 * 64 * 192 + 128) + 64 + 6400
    assert wide.size.params == 113_216 and wide.steps == 29, "28.75"


def test_parameters_may_leave_embeddings_out(tmp_path: Path) -> None:
    narrow = members(config(tmp_path, params="non_embedding"))[0]
    assert (narrow.size.params, narrow.size.params_all) == (26_784, 29_984)
    assert narrow.steps == 122, "1e10 / (6 x 26,784 x 512) = 121.5"
    assert narrow.flops == 6 * 26_784 * 122 * 512


def test_budgets_choose_sizes_and_come_in_order(tmp_path: Path) -> None:
    budgets = [{"flops": 4e11, "sizes": ["wide"]}, {"flops": 1e11}]
    assert [each.id for each in members(config(tmp_path, budgets=budgets))] == ["1e11-2x32", "1e11-wide", "4e11-wide"]


def test_rates(tmp_path: Path) -> None:
    assert {each.size.lr for each in members(config(tmp_path))} == {4e-3}, "muP scales within the model"
    power = config(tmp_path, lr={"by": "power", "coefficient": 1.0, "exponent": -0.5})
    narrow, wide = members(power)
    assert narrow.size.lr == pytest.approx(29_984**-0.5) and wide.size.lr < narrow.size.lr
    own = config(tmp_path, sizes=[{**SHAPE, "lr": 1e-3}], lr={"by": "sizes"})
    [member] = members(own)
    assert member.size.lr == 1e-3
    assert document(own, member).optim.min_lr == pytest.approx(1e-4), "a tenth, as in the document"


def test_batches_may_grow(tmp_path: Path) -> None:
    batch = {"coefficient": 2.0, "exponent": 0.25}
    [member] = members(config(tmp_path, sizes=[SHAPE], batch=batch, budgets=[{"flops": 1e12}], min_steps=1))
    assert member.global_batch_seqs == 32, "2 x 1e12^0.25 = 2,000 tokens: 31.25 rows of 64, in microbatches of 4"


def test_the_document_of_a_run(tmp_path: Path) -> None:
    whole = config(tmp_path)
    made = document(whole, members(whole)[1])
    assert made.directory == str(tmp_path / "l/runs/1e10-wide")
    train, evaluation = (stage_config(made, name) for name in ("train", "eval"))
    assert (train.model.hidden_size, train.model.mup.base_hidden, train.optim.lr) == (64, 32, 4e-3)
    assert train.train.steps == members(whole)[1].steps and train.optim.schedule == "cosine"
    assert train.data.path == evaluation.data.path == data_document(whole).data.path == str(tmp_path / "l/data")
    assert evaluation.model.init_from == str(tmp_path / "l/runs/1e10-wide/train")
    assert evaluation.eval.text and evaluation.eval.problems == 0


def test_estimated_times(tmp_path: Path) -> None:
    narrow, wide = members(config(tmp_path))
    assert seconds_of(narrow, [], None) is None
    assert seconds_of(narrow, [], 1e9) == pytest.approx(10.040082432)
    assert seconds_of(wide, [(30_000, 1e9), (100_000, 2e9)], None) == pytest.approx(wide.flops / 2e9), "the nearer size"


HOSTILE = [
    ({"budgets": [{"flops": 1e8}]}, r"1e08-2x32 is 1 steps of 512 tokens: must be at least ladder\.min_steps=5"),
    ({"sizes": [{"params": 1e5, "num_layers": 2}]}, r"ladder\.sizes\.0: params=100000: gives the whole shape"),
    ({"sizes": [{"name": "a"}]}, r"ladder\.sizes\.a: has no shape; give params"),
    ({"sizes": [{"name": "a", "params": 10.0}]}, r"ladder\.sizes\.a: params=10: the nearest shape"),
    ({"sizes": [SHAPE, SHAPE]}, "2x32 is there twice; give one another `name`"),
    ({"sizes": [{**SHAPE, "lr": 1.0}]}, r"lr=1: only with ladder\.lr\.by=sizes"),
    ({"lr": {"by": "sizes"}}, r"ladder\.sizes\.0: lr: must be set with ladder\.lr\.by=sizes"),
    ({"budgets": [{"flops": 1e11, "sizes": ["huge"]}]}, r"budgets\.0\.sizes: huge: is no size; choose of 2x32, wide"),
    ({"budgets": [{"flops": 1e11, "sizes": []}]}, "must name each size once, and at least one"),
    ({"budgets": [{"flops": 1e11, "sizes": ["wide", "wide"]}]}, "must name each size once, and at least one"),
]


@pytest.mark.parametrize(("ladder", "told"), HOSTILE)
def test_impossible_runs_are_refused(tmp_path: Path, ladder: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        members(config(tmp_path, min_steps=5, **ladder))


def test_all_faults_at_once(tmp_path: Path) -> None:
    sizes = [{"name": "a"}, {"name": "b", "params": 10.0}]
    with pytest.raises(ValueError) as told:
        members(config(tmp_path, sizes=sizes))
    assert len(str(told.value).splitlines()) == 2


def test_the_ladder_that_docs_show() -> None:
    found = members(load(str(Path(__file__).parents[2] / "configs/scaling/cpu.yaml"), []))
    assert [sum(each.budget_flops == flops for each in found) for flops in (1.5e11, 2.6e11, 4.5e11, 9e11)] == [
        5,
        6,
        5,
        5,
    ]
    assert {each.size.name: each.size.params for each in found}["3x32"] == 54_240
