"""The post-training benchmark: its rows, how both sides come to sample the same, its verdicts, and small runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from benchmarks import common, peers_trl
from benchmarks.posttrain import contestants, in_turns, main, picked, prepare, scripted
from benchmarks.posttrain_standings import against_best, check_same_work, products, summary
from benchmarks.posttrain_task import CASES, Lengths, Task, texts_of
from llmtrain.config.load import load
from llmtrain.data.prompts import PromptSet
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rules.check import check
from llmtrain.types import Prompt, Sampling
from tests.model.llama import SMALL, loaded, random_llama

MODEL = SMALL.model_copy(update={"vocab_size": 512, "max_positions": 2048})
SHORT = {"prompt": Lengths(2, 4, 8), "answer": Lengths(1, 4, 12)}


@pytest.fixture(scope="module")
def directory(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_llama(MODEL, seed=1).save_pretrained(path)
    load_tokenizer(str(small_data / "tokenizer")).hugging_face.save_pretrained(path)
    return path


@pytest.fixture
def task(directory: Path, tmp_path: Path) -> Callable[..., Task]:
    """task(name, **changes) -> a case with short texts."""
    return lambda name, **changes: Task(
        replace(CASES[name], **SHORT, **changes), str(directory), str(tmp_path), "fp32", steps=4
    )


@pytest.mark.parametrize("name", CASES)
def test_rows_are_drawn_within_their_bounds(name: str, task: Callable[..., Task]) -> None:
    drawn = task(name)
    assert drawn.rows == task(name).rows and len(drawn.rows) == CASES[name].rows
    texts = [text for row in drawn.rows for text in texts_of(row)]
    lengths = {len(text.split()) - drawn.case.sampled for text in texts}  # a sample begins with its reward
    assert min(lengths) >= 1 and max(lengths) <= 12 and len(lengths) > 2
    assert {len(texts_of(row)) for row in drawn.rows} == {{"sft": 1, "dpo": 2, "reward": 2}.get(name, 8)}
    assert all(2 <= len(row["prompt"].split()) <= 8 for row in drawn.rows)


def test_as_many_prompts_as_asked_have_samples_that_differ_in_reward(task: Callable[..., Task]) -> None:
    rows = task("grpo-no-spread").rows
    rewards = [peers_trl.first_integer(row["samples"], ["1"] * 8) for row in rows]
    assert rewards == [[1.0, 0.0] * 4] * 2 + [[1.0] * 8] * 2
    assert CASES["grpo-no-spread"].with_rows(1).spread == 1


@pytest.mark.parametrize("name", CASES)
def test_the_document_of_our_recipe_is_valid(name: str, task: Callable[..., Task], tmp_path: Path) -> None:
    drawn, path = task(name), tmp_path / "document.yaml"
    path.write_text(json.dumps(drawn.document(str(tmp_path / "files"))))
    config = load(str(path), [])
    assert config.data.train is not None and config.optim.weight_decay == 0
    assert len(Path(config.data.train).read_text().splitlines()) == drawn.case.rows
    check(config if name != "reward" else headed(config), 1, drawn.case.algorithm)


def headed(config: object) -> object:
    """Returns the configuration with the scalar head that the model of `reward` has."""
    return config.model_copy(update={"model": config.model.model_copy(update={"head": "scalar"})})


def test_our_generator_writes_the_script(task: Callable[..., Task], directory: Path) -> None:
    """Twice, as in two steps; the log-probs are those of the tokens of the script."""
    drawn = task("grpo", rows=3)
    expected = {prompt: list(islice(each, 8)) for prompt, each in drawn.script().items()}
    assert any(
        ids[-1] != drawn.tokenizer().eos_token_id for each in expected.values() for ids in each
    )  # cut at the end
    generator = NativeGenerator(loaded(directory, MODEL), max_batch_seqs=5, device="cpu")
    prompts = [Prompt(list(ids), seed) for seed, ids in enumerate(expected)]
    sampling = Sampling(drawn.longest_answer, 8, stop_ids=(drawn.tokenizer().eos_token_id,))
    with scripted(drawn):
        groups = generator.generate(prompts, sampling)
        again = generator.generate(prompts, sampling)
    for group in (*groups, *again):
        assert sorted(s.ids for s in group) == sorted(expected[tuple(group[0].prompt_ids)])
    sample = groups[0][0]
    ids = torch.tensor([sample.prompt_ids + sample.ids])
    with torch.no_grad():
        logits = loaded(directory, MODEL)(ids, torch.arange(ids.size(1))[None])[0].log_softmax(-1)
    start = len(sample.prompt_ids) - 1
    right = logits[range(start, start + len(sample.ids)), sample.ids]
    torch.testing.assert_close(torch.tensor(sample.logprobs), right, rtol=1e-4, atol=1e-4)
    own = generator.generate(prompts, sampling)
    assert [s.ids for group in own for s in group] != [s.ids for group in groups for s in group]


def test_prompts_are_the_same_tokens_on_both_sides(task: Callable[..., Task], directory: Path, tmp_path: Path) -> None:
    drawn = task("grpo")
    path = drawn.document(str(tmp_path / "files"))["data"]["train"]
    prompts = PromptSet(path, load_tokenizer(str(directory)), 512)
    assert set(map(tuple, prompts.ids)) == set(drawn.script())


def test_their_draws_follow_the_script() -> None:
    draw = peers_trl.drawing([[5, 6], [7]], end=9)
    assert [draw(torch.ones(2, 3), num_samples=1).tolist() for _ in range(3)] == [[[5], [7]], [[6], [9]], [[9], [9]]]


def test_a_forward_of_theirs_has_as_many_tokens_as_ours(
    task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs are two rows; samples are padded with the longest prompt, rows with the longest row."""
    monkeypatch.setattr(Task, "lengths", lambda self: [[10, 5, 6], [4, 20, 3]])
    for name, tokens, rows in (
        ("sft", 99, 4),
        ("sft", 23, 1),
        ("dpo", 4 * 48, 4),
        ("dpo", 4 * 48 - 1, 2),
        ("grpo", 8 * 30, 8),
        ("grpo", 239, 4),
    ):
        assert peers_trl.rows_at_a_time(task(name, rows=4, micro_tokens=tokens)) == rows, (name, tokens)


def rounds(cpu_s: float, peak_bytes: int, loss: float = 2.0, norm: float = 1.0) -> list[dict]:
    measured = {"cpu_s": cpu_s, "wall_s": 2 * cpu_s, "peak_bytes": peak_bytes, "children_bytes": 1}
    return [{**measured, "values": [{"loss": loss, "grad_norm": norm}]}]


def test_ours_is_held_against_the_best_of_theirs() -> None:
    ours, theirs = rounds(2, 4), {"a": rounds(8, 9), "b": rounds(6, 19)}
    results = {"llmtrain": summary(ours, ours), **{name: summary(each, ours) for name, each in theirs.items()}}
    assert results["a"]["ratio"] == 4 and results["b"]["share"] == 0.25 and results["a"]["peak_bytes"] == 10
    assert against_best(results) == {"name": "b", "ratio": 3, "share": 0.25}
    assert against_best({"llmtrain": results["llmtrain"]}) == {}


@pytest.mark.parametrize(("loss", "norm"), [(2.01, 1.0), (2.0, 1.1), (float("nan"), 1.0), (2.0, float("nan"))])
def test_other_work_is_refused(loss: float, norm: float) -> None:
    runs = {"llmtrain": rounds(1, 1), "other": rounds(1, 1, loss, norm)}
    with pytest.raises(RuntimeError, match=r"other: .* at step 1, llmtrain has"):
        check_same_work(runs, "fp32")
    assert check_same_work({**runs, "other": rounds(1, 1, 2.001, 1.005)}, "fp32")["other"][0]["loss"] == 2.001


def test_the_share_of_products() -> None:
    assert products({"aten::mm": 3.0, "aten::bmm": 1.0, "aten::softmax": 4.0}) == 0.5


@pytest.mark.skipif(not peers_trl.installed(), reason="TRL is not installed")
def test_contestants(task: Callable[..., Task]) -> None:
    assert list(contestants(task("ppo"))) == ["llmtrain"] and list(picked(task("grpo"), None)) == ["llmtrain", "TRL"]
    assert list(picked(task("grpo"), "llm|whole")) == ["llmtrain", "TRL, whole batch"]
    assert list(picked(task("sft"), "llm|padding")) == ["llmtrain", "TRL, padding-free"]
    assert list(picked(task("dpo"), None)) == ["llmtrain", "TRL", "TRL, row by row"]


def test_a_loop_waits_for_its_turn() -> None:
    class Two:
        left, found = 2, []

        def wait(self) -> bool:
            return self.left > 0

        def done(self, value: dict) -> None:
            self.left -= 1
            self.found.append(value)

    def train(job: None, step: Callable[[int], tuple[dict, int]]) -> None:
        for number in range(9):
            assert step(number)[1] == number

    turns = Two()
    with pytest.raises(Exception, match=r"^$"):
        in_turns(train, turns, None, lambda number: ({"loss": number, "grad_norm": 1.0, "lr": 0.0}, number))
    assert turns.found == [{"loss": 0, "grad_norm": 1.0}, {"loss": 1, "grad_norm": 1.0}]


def test_time_and_memory_of_children_count() -> None:
    before = common.cpu_s()
    work = "import time\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    assert common.cpu_s() - before > 0.25 and common.children_bytes() > 1e6
    child.communicate("\n")
    assert common.cpu_s() - before > 0.25


@pytest.mark.slow
@pytest.mark.skipif(not peers_trl.installed(), reason="TRL is not installed")
@pytest.mark.parametrize("cases", ["sft,dpo", "reward,grpo-no-spread,ppo"])
def test_a_small_run(cases: str, directory: Path, tmp_path: Path) -> None:
    """Raises where loss or gradient norm of a step differ from TRL's."""
    out = tmp_path / "posttrain.json"
    main([f"--model={directory}", f"--cases={cases}", "--rows=2", "--rounds=1", f"--out={out}"])
    records = json.loads(out.read_text())["cases"]
    assert [record["case"] for record in records] == cases.split(",")
    for record in records:
        expected = {"sft": 4, "ppo": 1, "grpo-no-spread": 2}.get(record["case"], 3)
        assert len(record["results"]) == expected and record["tokens"] > 0
        assert all(len(values) == 2 for values in record["values"].values())


def test_padding_is_not_the_end(directory: Path, tmp_path: Path) -> None:
    found = prepare(str(directory), 1, str(tmp_path))
    for each in (found["lm"], found["scalar"]):
        config = AutoConfig.from_pretrained(each, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(each, trust_remote_code=False)
        assert config.num_hidden_layers == 1 and config.pad_token_id == tokenizer.pad_token_id
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
