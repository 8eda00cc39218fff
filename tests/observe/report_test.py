from __future__ import annotations

import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llmtrain.observe.experts import expert_records
from llmtrain.observe.metrics import MetricsFile, Samples
from llmtrain.observe.plots import _means, _running_mean
from llmtrain.observe.report import read_stages, write_report

NASTY = "<script>alert('1')</script> & <|user|>"

FORMULA = r"grpo $\x$"  # no formula that Matplotlib knows


class Page(HTMLParser):
    """Tags, text and image sources of a page."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.text: list[str] = []
        self.feed(Path(path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _stage(directory: Path, steps: int, **values: float | None) -> None:
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(f"name: {directory.name}\nnote: {NASTY}\n")
    metrics = MetricsFile(str(directory / "metrics.jsonl"), -1)
    for step in range(1, steps + 1):
        metrics.write(
            {
                "step": step,
                "loss": None if step == 7 else 10.0 / step,
                "lr": 1e-3,
                "tokens_per_s": 2e3,
                "step_s": 40.0,
                **values,
            }
        )
    held_out = MetricsFile(str(directory / "evaluations.jsonl"), -1)
    for step, loss in ((0, 6.5), (steps, 2.25)):
        held_out.write({"step": step, "loss": loss})


def _evaluation(directory: Path, label: str, **scores: Any) -> None:
    directory.mkdir(parents=True)
    (directory / "eval.json").write_text(json.dumps({"label": label, "weight_step": 3, "problems": 8, **scores}))
    samples = Samples(str(directory / "samples.jsonl"), -1)
    for i in range(20):
        samples.write({"step": 3, "prompt": NASTY, "completion": f"answer {i}", "reward": i % 2, "label": label})


def _run(directory: Path) -> Path:
    _stage(directory / "pretrain", 200, grad_norm=1.0)
    _stage(directory / "grpo", 3, reward_mean=0.5, kl=0.01, entropy=0.4, response_tokens_mean=29.0, grad_norm=None)
    _evaluation(directory / "eval-sft", "sft", **{"pass@1": 0.25, "pass@8": 0.5, "maj@8": 0.375, "greedy": 0.3})
    _evaluation(
        directory / "eval-grpo", FORMULA, **{"pass@1": 0.75, "pass@8": 0.875, "perplexity": 12.5, "bits_per_byte": 2.1}
    )
    (directory / "export").mkdir()
    (directory / "stages.json").write_text('["data", "pretrain", "eval-sft", "grpo", "eval-grpo", "export"]')
    return directory


def test_a_run_of_stages(tmp_path: Path) -> None:
    path = write_report(str(_run(tmp_path / "quick")))
    assert path == str(tmp_path / "quick" / "report" / "index.html")
    page = Page(path)
    expected = ["evaluation.png", "evaluation-passes.png", "pretrain.png", "grpo-rl.png", "grpo.png"]
    assert page.images == expected
    for image in expected:
        head = (tmp_path / "quick" / "report" / image).read_bytes()[:24]
        width, height = struct.unpack(">II", head[16:])
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and width > 600 and height > 300
    text = " ".join(page.text)
    assert "script" not in page.tags and NASTY in text  # shown, not run
    for shown in ("0.750", "0.875", "12.50", "bits per byte", FORMULA, "2 h 13 min", "answer 0", "answer 19"):
        assert shown in text
    assert "answer 10" not in text


def test_what_models_cost(tmp_path: Path) -> None:
    """Two stages sample, the second from the first; an evaluation shows the samples and the CPU time of both."""
    run = tmp_path / "quick"
    _stage(run / "raft", 3, reward_mean=0.5, samples=600)
    _stage(run / "ppo", 3, reward_mean=0.5, samples=64)
    made = {"raft": ["export"], "ppo": ["raft"], "export": [], "eval": ["ppo"]}  # an export records nothing else
    (run / "export").mkdir()
    _evaluation(run / "eval", "ppo", **{"pass@1": 0.75})
    for name, cpu_s in {"raft": 13.0, "ppo": 20.0, "export": 100.0, "eval": 1000.0}.items():
        (run / name / "done.json").write_text(json.dumps({"cpu_s": cpu_s, "made_from": made[name]}))
    page = Page(write_report(str(run)))
    assert "samples.png" in page.images and "samples" in page.text and "cpu s" in page.text
    assert page.text.count("664") == page.text.count("133") == 1
    (run / "ppo" / "judge.json").write_text('{"samples": 16, "completions": 20}')
    assert Page(write_report(str(run))).text.count("684") == 1  # what judged was written too
    (run / "ppo" / "judge.json").write_text('{"samples": 16}')  # of an earlier version
    assert Page(write_report(str(run))).text.count("680") == 1
    (run / "ppo" / "judge.json").unlink()
    assert any("stages of this run that a model was made from" in text for text in page.text)
    (run / "raft" / "done.json").unlink()
    assert "cpu s" not in Page(write_report(str(run))).text  # a part of it would be too little
    (run / "raft" / "metrics.jsonl").unlink()
    assert "samples.png" not in Page(write_report(str(run))).images  # one curve is compared with nothing


def test_pages_on_cleaning_are_linked(tmp_path: Path) -> None:
    _stage(tmp_path / "pretrain", 2)
    page = tmp_path / "data/clean/report/index.html"
    page.parent.mkdir(parents=True)
    page.write_text("x")
    links = re.findall('href="([^"]+)">Data', Path(write_report(str(tmp_path))).read_text())
    assert links == ["../data/clean/report/index.html"]
    assert (tmp_path / "report" / links[0]).resolve() == page.resolve()


def test_order_of_stages(tmp_path: Path) -> None:
    run = _run(tmp_path / "quick")
    assert [s.name for s in read_stages(str(run))] == ["pretrain", "eval-sft", "grpo", "eval-grpo"]
    (run / "stages.json").unlink()
    assert [s.name for s in read_stages(str(run))] == ["eval-grpo", "eval-sft", "grpo", "pretrain"]


def test_one_stage_and_again(tmp_path: Path) -> None:
    _stage(tmp_path / "tiny", 3)
    for _ in range(2):  # the report directory that the first one leaves is no stage
        page = Page(write_report(str(tmp_path / "tiny")))
        assert page.images == ["tiny.png"] and "tiny" in page.text
    assert (
        "5.0" not in page.text and "10 → 3.33" in page.text and "6.5 → 2.25" in page.text
    )  # means of the first and the last tenth


def test_load_of_experts(tmp_path: Path) -> None:
    layers = {"load_max.1": 1.5, "load_max.2": 2.5, "load_entropy.1": 0.9, "load_entropy.2": 0.7}
    record = {"step": 4, **layers, "load_dropped.1": 0.0, "aux_loss": 1.1, "z_loss": None, "loss": 3.0}
    (shown,) = expert_records([{"step": 3, "loss": 3.0}, record])
    assert shown == {
        **{"step": 4, "load_max_mean": 2.0, "load_max_worst": 2.5, "load_entropy_worst": 0.7},
        **{"load_entropy_mean": pytest.approx(0.8), "load_dropped_mean": 0.0, "load_dropped_worst": 0.0},
        **{"aux_loss": 1.1, "z_loss": None},
    }
    _stage(tmp_path / "moe", 3, **layers)
    page = Page(write_report(str(tmp_path / "moe")))
    assert page.images == ["moe.png", "moe-experts.png"]
    assert (tmp_path / "moe" / "report" / "moe-experts.png").read_bytes()[:4] == b"\x89PNG"


def test_two_evaluations_of_one_label_are_both_shown(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _evaluation(tmp_path / "run" / name, "model", perplexity=3.0)
    page = Page(write_report(str(tmp_path / "run")))
    assert page.tags.count("tr") == 3 and "model" in page.text  # a head and two rows


def test_accuracy_against_tokens_is_one_plot_of_a_model(tmp_path: Path) -> None:
    points = [{"tokens": 20 * n, "accuracy": 0.4, "interval": [0.3, 0.5], "n": n} for n in (1, 2, 4)]
    _evaluation(tmp_path / "run" / "a", FORMULA, test_time={"majority": points, "best of n by $\\x$": points[:1]})
    _evaluation(tmp_path / "run" / "b", "other", perplexity=3.0)
    page = Page(write_report(str(tmp_path / "run")))
    assert [image for image in page.images if image.startswith("test_time")] == ["test_time-0.png"]
    assert (tmp_path / "run" / "report" / "test_time-0.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("name", "reason"), [("missing", "no such run directory"), ("empty", "nothing to report")])
def test_nothing_to_report(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "empty" / "export").mkdir(parents=True)
    with pytest.raises(ValueError, match=reason):
        write_report(str(tmp_path / name))


def test_a_long_line_among_others_is_thinned() -> None:
    points = [(float(i), float(i % 2)) for i in range(7)]
    assert _means(points, 7) == points
    assert _means(points, 4) == [(0.5, 0.5), (2.5, 0.5), (4.5, 0.5), (6.0, 0.0)]
    assert _means(points[:1], 4) == points[:1]


def test_running_mean() -> None:
    assert _running_mean([0.0, 3.0, 6.0, 3.0, 9.0], 1) == [1.5, 3.0, 4.0, 6.0, 6.0]
