"""Verdicts on made-up rounds, and that LitGPT's model is the same function as ours."""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers_litgpt
from benchmarks.profile import table
from benchmarks.standings import check_same_work, mfu, ratio, targets
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import Decoder, init_tensor, parameter_shapes


def rounds(*wall_s: float, peak_bytes: int = 1) -> list[dict]:
    return [{"wall_s": s, "cpu_s": 2 * s, "peak_bytes": peak_bytes, "values": [2.0]} for s in wall_s]


def test_a_round_in_which_everything_is_slow_does_not_change_a_ratio() -> None:
    assert ratio(rounds(1, 10, 1), rounds(1.5, 15, 1.5)) == 1.5


def test_targets_are_met_and_missed() -> None:
    timed = {
        "llmtrain": rounds(1.03),
        "llmtrain without engine": rounds(1.0),
        "llmtrain, compiled": rounds(1.0, peak_bytes=5),
        "LitGPT, compiled": rounds(1.3, peak_bytes=4),
        "Trainer": rounds(1.7, peak_bytes=9),
    }
    found = {verdict["target"]: verdict["met"] for verdict in targets(timed)}
    assert found == {
        "llmtrain, compiled at least 1.6 times as fast as Trainer": True,
        "llmtrain, compiled at least 1.2 times as fast as LitGPT, compiled": True,
        "llmtrain at least 0.98 times as fast as llmtrain without engine": False,
        "llmtrain, compiled peaks below LitGPT, compiled": False,
        "llmtrain peaks below Trainer": True,
    }


@pytest.mark.parametrize("loss", [2.1, float("nan")])
def test_other_work_is_refused(loss: float) -> None:
    other = [{**rounds(1)[0], "values": [loss]}]
    with pytest.raises(RuntimeError, match=r"other: loss .* at step 1"):
        check_same_work({"ours": rounds(1), "other": other}, "ours")


def test_the_profile_shows_the_largest_differences_first() -> None:
    lines = table({"a": {"mm": 10.0, "copy": 5.0}, "b": {"mm": 9.0, "only b": 8.0}}, by_difference=True).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["only b", "copy", "mm", "all"]
    assert lines[-1].split()[1:] == ["15.0", "17.0", "-2.0"]


@pytest.mark.skipif(not peers_litgpt.installed(), reason="pip install --no-deps -r benchmarks/litgpt.txt")
def test_litgpt_is_the_same_function() -> None:
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_size": 96, "num_heads": 4, "num_kv_heads": 2}
    config = resolve_model(ModelConfig(**sizes, vocab_size=128, max_positions=16))
    shapes, ours = parameter_shapes(config), Decoder(config)
    weights = {name: 5 * init_tensor(name, shape, config, seed=0) for name, shape in shapes.items()}
    theirs = peers_litgpt.build_model(config, weights.__getitem__)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(weights[name])
        ids = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(0))
        found, expected = theirs(ids), ours(ids, torch.arange(16).repeat(2, 1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_model_flops_utilization() -> None:
    assert mfu(60_000, 6e9, "NVIDIA H100 80GB HBM3") == pytest.approx(0.364, abs=1e-3)
    assert mfu(60_000, 6e9, "another") is None
