"""Rules of attention backends: broken once, each says value, rule and remedy; kept, they are silent."""

from __future__ import annotations

import pytest

from llmtrain.arch.attention import head_widths
from llmtrain.arch.families import presets
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.recipes import config_class
from llmtrain.config.schema import ModelConfig
from llmtrain.rules import attention
from llmtrain.rules.check import violations

WIDE = {"hidden_size": 128, "num_heads": 2, "num_kv_heads": 2, "ffn_size": 64, "vocab_size": 512}
LATENT = {"kv_rank": 16, "nope_head_dim": 16, "rope_head_dim": 8, "v_head_dim": 16}


def found(
    monkeypatch: pytest.MonkeyPatch,
    command: str = "pretrain",
    model: dict | None = None,
    parallel: dict | None = None,
    installed: bool = True,
    **engine: object,
) -> list[str]:
    """Lines on attention backends; on a machine with or without the package."""
    monkeypatch.setattr(attention, "has_flash", lambda: installed)
    ranks = (parallel or {}).get("cp", 1)
    config = config_class()(model=ModelConfig(**{**WIDE, **(model or {})}), parallel=parallel or {}, engine=engine)
    return [line for line in violations(config, ranks, command) if line.startswith("engine.attention")]


BROKEN = [
    ({"attention": "flash", "installed": False}, "needs the package flash-attn, it is not installed; install it"),
    ({"attention": "flash", "precision": "fp32"}, "computes in bf16 or fp16, not engine.precision=fp32; change it"),
    ({"attention": "flash", "model": {"head_dim": 264}}, "has no kernel for heads of 264, only up to 256; set flex"),
    ({"attention": "flash", "model": {"attention": "mla", "mla": LATENT}}, "mla has 16 and 24; set flex"),
    ({"attention": "flash", "command": "grpo"}, "its masks cannot say that samples share their prompt; set flex"),
    ({"attention": "flash", "parallel": {"cp": 2}}, "not with parallel.context=ring, which computes tiles by itself"),
    ({"attention": "flex", "parallel": {"cp": 2}}, "not with parallel.context=ring, which computes tiles by itself"),
    ({"attention": "flex", "model": {"head_dim": 8}}, "needs heads of at least 16, the model has 8; set sdpa or auto"),
]


@pytest.mark.parametrize(("case", "expected"), BROKEN)
def test_one_broken_rule_is_one_line(case: dict, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = found(monkeypatch, **case)
    assert len(lines) == 1 and expected in lines[0] and lines[0].startswith(f"engine.attention={case['attention']}: ")


def test_kept_they_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    good = [{"attention": backend} for backend in ("auto", "sdpa", "flex", "flash")]
    good += [{"attention": backend, "parallel": {"cp": 2}, "precision": "fp32"} for backend in ("auto", "sdpa")]
    good += [
        {"attention": "flex", "command": "grpo"},
        {"attention": "flex", "model": {"attention": "mla", "mla": LATENT}},
    ]
    cut = {"cp": 2, "context": "alltoall"}
    good += [{"attention": backend, "parallel": cut} for backend in ("flex", "flash")]
    good += [{"attention": "flash", "command": "plan", "installed": False}]  # a plan is for another machine
    assert [found(monkeypatch, **case) for case in good] == [[]] * len(good)


def test_heads_of_every_preset_are_wide_enough_for_flex() -> None:
    widths = {name: head_widths(resolve_model(ModelConfig(preset=name))) for name in presets()}
    assert min(map(min, widths.values())) >= 16
    assert {name for name, (keys, values) in widths.items() if keys != values} == {
        name for name in widths if name.startswith("deepseek")
    }
