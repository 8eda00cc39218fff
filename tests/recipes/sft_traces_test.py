"""Which rows SFT keeps by length, thinking and reward: absolute counts, what is written down, what is refused, and that
a run that goes on takes the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmtrain.commands import stage_files
from llmtrain.config.recipes import RECIPES, recipe_of
from llmtrain.data.packing import Demonstrations
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.observe.contents import Checksums
from llmtrain.recipes import sft
from llmtrain.rewards import RewardsFail, scorer_of
from llmtrain.rules.check import violations
from llmtrain.trainer.identity import contents_of, differences, record_of
from llmtrain.trainer.job import Job, data_dir, resolved, tokenizer_dir
from tests.data.families import PLAIN
from tests.recipes.conftest import run_steps
from tests.recipes.stubs import shifted

WORKER = Path(__file__).parents[1] / "several_runs.py"
REWARDS = '''
import random
from collections import Counter

def ends(completion, example):
    """1 for the right last word, half for a digit, an error where the row asks for it."""
    assert completion.strip() == example.get("completion", example.get("said")).strip()
    if "wanted" not in example:
        raise ValueError("no gold")
    last = completion.split()[-1]
    return 1.0 if last == example["wanted"] else 0.5

def raises(completion, example):
    raise RuntimeError("broken")

def drawn(completion, example):
    return random.random()
'''
LONG = "<think> " + "again " * 12 + "</think> 5"
ROWS = [  # with what becomes of it under ALL
    ("<think> 2 and 3 </think> 5", "5", None),
    ("<think> 2 and 3 </think> 6", "5", "wrong"),
    ("5", "5", "too short"),
    (LONG, "5", "too long"),
    ("2 and 3 is 5 and that is all", "5", "without whole thinking"),
    ("<think> 2 and 3 and 5", "5", "without whole thinking"),
    ("<think> 2 and 3 </think>", "</think>", "without whole thinking"),
    ("<think> 2 and 3 </think> 5", None, "not scored"),
    ("2 and 3 </think> 5", "5", None),
    ("<think> 1 and 4 </think> 5", "5", None),
]
ALL = ("sft={min_trace_tokens: 4, max_trace_tokens: 40, require_think: true, min_reward: 1.0}",)


def write(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def records() -> list[dict]:
    rows = [{"prompt": f"{i}: 2+3=", "completion": text} for i, (text, _, _) in enumerate(ROWS)]
    return [row if gold is None else {**row, "wanted": gold} for row, (_, gold, _) in zip(rows, ROWS, strict=True)]


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def run(
    stub_job: Callable[..., Job], rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Job, list]]:
    """run(*overrides, rows=..., state={}, template=...) -> (job, [updates in all, what each step returned]); judged by
    `ends`."""

    def go(
        *overrides: str, rows: Sequence[dict] | None = None, state: dict | None = None, template: str | None = None
    ) -> tuple[Job, list]:
        path = write(tmp_path / "rows.jsonl", records() if rows is None else rows)
        judge = f"rewards=[{{function: {rewards}:ends, unsandboxed: true}}]"
        sizes = ("data.pack=false", "train.epochs=2", "train.global_batch_seqs=2", "train.seq_len=128")
        job, steps = stub_job("sft", judge, f"data.train={path}", *sizes, *overrides), []
        job.state = {} if state is None else state
        job.tokenizer = load_tokenizer(job.tokenizer.directory, template)
        job.engine.scores = shifted(-2.0)
        stubs = {"join": lambda config, recipe: job, "train": run_steps(steps), "shutdown": lambda: None}
        stubs["build_engine"] = lambda job, total_updates: steps.append(total_updates)
        for name, stub in stubs.items():
            monkeypatch.setattr(sft, name, stub)
        sft.main(job.config)
        return job, steps

    return go


def taken(job: Job) -> set[str]:
    """The trained texts of all updates, without what ends them."""
    batches = [batch for microbatches, *_ in job.engine.updates for batch in microbatches]
    rows = [labels[mask].tolist() for b in batches for labels, mask in zip(b.labels, b.loss_mask, strict=True)]
    return {job.tokenizer.decode(row) for row in rows}


def held(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "run" / "rows-train.json").read_text())


def test_rows_are_kept_by_length_thinking_and_reward(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    job, (total_updates, *steps) = run(*ALL)
    kept = [i for i, (_, _, reason) in enumerate(ROWS) if reason is None]
    assert kept == [0, 8, 9] and taken(job) == {ROWS[i][0] for i in kept}
    assert total_updates == len(steps) == 3  # two epochs of three rows, two a step
    file = tmp_path / "rows.jsonl"
    expected: dict[str, list[str]] = {reason: [] for reason in sft.REASONS}
    for i, (_, _, reason) in enumerate(ROWS):
        expected.get(reason, []).append(f"{file}:{i + 1}")
    found = held(tmp_path)
    assert (found["rows"], found["kept"], found["left_out"]) == (10, 3, expected)
    assert sorted(i for each in found["numbers"].values() for i in each) == [1, 2, 3, 4, 5, 6, 7]
    assert not scorer_of(job.config.rewards[0]).pool.workers  # nothing is judged while it trains
    told = " ".join(capsys.readouterr().err.split())
    counts = "1 too short, 1 too long, 3 without whole thinking, 1 wrong, 1 not scored"
    assert f"rows.jsonl: kept 3 of 10 rows: {counts}; see {tmp_path}/run/rows-train.json" in told
    path = write(tmp_path / "kept.jsonl", [records()[i] for i in kept])
    alone = Demonstrations(str(path), job.tokenizer, 128, 1, pack=False)
    first = [row for batch in job.engine.updates[0][0] for row in batch.labels[:, :30].tolist()]
    assert first == alone.batch(range(2)).labels[:, :30].tolist()  # as from a file with these rows alone


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ("{}", range(10)),
        ("{require_think: true}", [0, 1, 3, 7, 8, 9]),
        ("{min_reward: 1.0}", [0, 2, 3, 5, 6, 8, 9]),
        ("{min_reward: 0.5}", [0, 1, 2, 3, 4, 5, 6, 8, 9]),  # a half is enough, and what was not scored is not
        ("{min_reward: -1.0}", [0, 1, 2, 3, 4, 5, 6, 8, 9]),
    ],
)
def test_each_setting_alone(run: Callable, tmp_path: Path, settings: str, kept: Sequence[int]) -> None:
    # wanted of row 5 is the last word, 5, though it thinks without an end
    job, (total_updates, *_) = run(f"sft={settings}")
    assert total_updates == len(kept) and taken(job) == {ROWS[i][0] for i in kept}
    assert (tmp_path / "run" / "rows-train.json").exists() == (settings != "{}")
    assert (sft.STATE in job.state) == (settings != "{}")


def test_bounds_count_the_answer_and_its_end(run: Callable, tmp_path: Path) -> None:
    job, _ = run()
    sizes = [len(job.tokenizer.encode(text)) + 1 for text, _, _ in ROWS]
    shortest, longest = min(sizes), max(sizes)
    assert run(f"sft={{min_trace_tokens: {shortest}, max_trace_tokens: {longest}}}")[1][0] == 10
    assert run(f"sft.min_trace_tokens={shortest + 1}")[1][0] == 10 - sizes.count(shortest)
    assert run(f"sft.max_trace_tokens={longest - 1}")[1][0] == 10 - sizes.count(longest)
    assert held(tmp_path)["left_out"]["too long"] == [f"{tmp_path}/rows.jsonl:4"]


def test_weights_of_rewards_are_summed(run: Callable, rewards: Path) -> None:
    two = [f"{{function: {rewards}:ends, name: {name}, weight: 0.5, unsandboxed: true}}" for name in "ab"]
    kept = [0, 2, 3, 5, 6, 8, 9]
    assert taken(run(f"rewards=[{', '.join(two)}]", "sft.min_reward=1.0")[0]) == {ROWS[i][0] for i in kept}
    with pytest.raises(ValueError, match=r"none of 10 rows is left \(9 wrong, 1 not scored; "):
        run(f"rewards=[{two[0]}]", "sft.min_reward=1.0")


def test_packed_rows_hold_what_is_kept(run: Callable) -> None:
    job, (total_updates, *_) = run(*ALL, "data.pack=true")
    (batches, denominator, _), kept = job.engine.updates[0], [text for text, _, reason in ROWS if reason is None]
    assert total_updates == 1  # three answers in one row; an epoch is a row
    assert {int(batch.segment_ids.max()) for batch in batches} == {2}
    assert denominator == 2 * sum(len(job.tokenizer.encode(text)) + 1 for text in kept)


def test_a_row_that_is_left_out_need_not_fit(run: Callable, tmp_path: Path) -> None:
    """Bounds come before `data.overlong`: what is too long for them is no fault, and what they keep may be one."""
    rows = [*records(), {"prompt": "x", "completion": "far " * 500, "wanted": "far"}]
    with pytest.raises(ValueError, match=r"rows.jsonl:11: the example has \d+ tokens, more than train.seq_len=128"):
        run("sft.min_reward=1.0", rows=rows)
    assert taken(run("sft.max_trace_tokens=100", rows=rows)[0]) == {text for text, _, _ in ROWS}
    run("sft={min_reward: 1.0}", "data.overlong=truncate", rows=rows)  # judged whole: cut, its end would be wrong
    assert held(tmp_path)["kept"] == 8


FAR, WRONG = "far " * 50 + "5", "<think> 2 </think> 6"


def array(path: Path, texts: Sequence[str], a_line: int) -> Path:
    """Writes a JSON array with several objects on each line."""
    objects = [json.dumps({"prompt": f"{i}:", "completion": text, "wanted": "5"}) for i, text in enumerate(texts)]
    path.write_text("[" + ",\n".join(", ".join(objects[i : i + a_line]) for i in range(0, len(texts), a_line)) + "]")
    return path


@pytest.mark.parametrize("a_line", [1, 3, 13])
def test_rows_that_share_a_line_are_told_apart(run: Callable, tmp_path: Path, a_line: int) -> None:
    texts = [FAR if i in (0, 4, 8, 12) else f"<think> {i} </think> {6 if i == 5 else 5}" for i in range(13)]
    file = array(tmp_path / "x.json", texts, a_line)
    kept = [text for i, text in enumerate(texts) if i not in (0, 4, 5, 8, 12)]
    settings = ("sft={max_trace_tokens: 40, min_reward: 1.0}",)
    job, (total_updates, *_) = run(f"data.train={file}", *settings)
    assert taken(job) == set(kept) and total_updates == 8
    found = held(tmp_path)
    assert found["kept"] == 8 and found["numbers"]["too long"] == [0, 4, 8, 12] and found["numbers"]["wrong"] == [5]
    assert found["left_out"]["too long"] == [f"{file}:{i // a_line + 1}" for i in (0, 4, 8, 12)]
    again, _ = run(f"data.train={file}", *settings, state=dict(job.state))
    assert taken(again) == set(kept)


def test_rows_of_several_files_are_told_apart(run: Callable, tmp_path: Path) -> None:
    """A directory of a file of lines, and of arrays; and what `overlong: drop` leaves out of what was chosen."""
    folder = tmp_path / "rows"
    folder.mkdir()
    array(folder / "a.json", ["1 5", FAR, "2 5", WRONG], 4)
    write(folder / "b.jsonl", [{"prompt": "a:", "completion": text, "wanted": "5"} for text in ("3 5", "4 6")])
    array(folder / "c.json", ["5 5", "far " * 200 + "5", "6 5", "7 6"], 2)
    drop = ("data.overlong=drop", "sft.min_reward=1.0")
    job, _ = run(f"data.train={folder}", *drop)
    assert taken(job) == {"1 5", FAR, "2 5", "3 5", "5 5", "6 5"}
    assert held(tmp_path)["numbers"]["wrong"] == [3, 5, 9] and held(tmp_path)["kept"] == 7
    job, _ = run(f"data.train={folder}/[ab].json*", *drop)
    assert taken(job) == {"1 5", FAR, "2 5", "3 5"} and held(tmp_path)["numbers"]["wrong"] == [3, 5]


def test_held_out_rows_are_all_measured(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft, "note_evaluation", lambda job, scores: None)
    path = write(tmp_path / "held.jsonl", [{"prompt": "a", "completion": "5"}] * 3)
    job, _ = run(*ALL, f"data.held_out={path}", "train.eval_every_steps=5", "train.micro_batch_seqs=1")
    assert len(job.engine.scored[0]) == 3


def test_rows_are_judged_once(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, before = run(*ALL)
    judged: list[int] = []
    monkeypatch.setattr(sft, "rewarded", lambda job, rows: judged.append(len(rows)) or [])
    again, steps = run(*ALL, state=dict(job.state))
    assert steps == before and taken(again) == taken(job) and judged == []
    with pytest.raises(ValueError, match="zip"):
        run(ALL[0].replace("1.0", "0.5"))  # asks something else
    with pytest.raises(ValueError, match="zip"):
        run(*ALL, rows=[{**row, "more": 1} for row in records()])  # a reward may read it
    with pytest.raises(ValueError, match="zip"):
        run(*ALL, "rewards=[{name: first_integer}]")
    assert judged == [5, 5, 5]
    (tmp_path / "run" / "rows-train.json").write_text('{"made_from": ')
    with pytest.raises(ValueError, match="zip"):
        run(*ALL)


def test_nothing_is_judged_of_a_file_with_faults(run: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows.jsonl:11: missing field"):
        run(*ALL, rows=[*records(), {"more": 1}])
    assert not (tmp_path / "run" / "rows-train.json").exists()


def test_a_run_that_would_go_on_with_other_rows_is_refused(run: Callable, tmp_path: Path) -> None:
    job, _ = run(*ALL)
    (tmp_path / "run" / "rows-train.json").unlink()
    run(*ALL, state=dict(job.state))  # judged again, and the same
    held_now = held(tmp_path)
    held_now["numbers"]["wrong"] = []
    (tmp_path / "run" / "rows-train.json").write_text(json.dumps(held_now))
    with pytest.raises(ValueError, match=r"rows-train.json: other rows are kept than those that the run was trained"):
        run(*ALL, state=dict(job.state))


def test_what_cannot_be_judged_is_told_at_once(run: Callable, rewards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 of 3 rows cannot be rewarded") as error:
        rows = [{"prompt": "a", "completion": "5", **more} for more in ({}, {"answer": "5"}, {"answer": "x"})]
        run("sft.min_reward=1.0", "rewards=[{name: first_integer}]", rows=rows)
    first, second, _ = str(error.value).splitlines()
    assert first.startswith(f"{tmp_path}/rows.jsonl:1: reward first_integer: field 'answer' is missing")
    assert second.startswith(f"{tmp_path}/rows.jsonl:3: reward first_integer: field 'answer' is 'x'")
    fails = f"function: {rewards}:raises, unsandboxed: true"
    with pytest.raises(RewardsFail, match="reward raises: failed on 10 of 10 completions"):
        run("sft.min_reward=0.0", f"rewards=[{{{fails}}}]")
    with pytest.raises(ValueError, match=r"none of 10 rows is left \(10 not scored; .*ask less in the section sft"):
        run("sft.min_reward=0.0", f"rewards=[{{{fails}, max_error_share: 1.0}}]")
    with pytest.raises(ValueError, match=r"none of 10 rows is left \(10 too long; "):
        run("sft={max_trace_tokens: 1, min_reward: 1.0}")
    with pytest.raises(ValueError, match=r"rows\.jsonl: "):
        run(*ALL, rows=[])


def test_conversations_are_judged_by_their_last_turn(run: Callable, tmp_path: Path) -> None:
    """With every turn trained, the answer is still the last."""
    (tmp_path / "plain.jinja").write_text(PLAIN)
    said = ["<think> 1 </think> 2", "<think> 3 </think> 4"]
    turns = [("user", "a"), ("assistant", said[0]), ("user", "b"), ("assistant", said[1])]
    row = {"messages": [{"role": role, "content": text} for role, text in turns], "said": said[1], "wanted": "4"}
    bad = {**row, "messages": [*row["messages"][:3], {"role": "assistant", "content": "4"}], "said": "4"}
    settings = ("data.trained_turns=all", "sft={require_think: true, min_reward: 1.0}")
    run(*settings, rows=[row, bad, {**row, "wanted": "2"}], template=str(tmp_path / "plain.jinja"))
    found = held(tmp_path)
    assert found["kept"] == 1 and found["left_out"]["wrong"] == [f"{tmp_path}/rows.jsonl:3"]
    assert found["left_out"]["without whole thinking"] == [f"{tmp_path}/rows.jsonl:2"]


def rules(small: Path, *overrides: str) -> list[str]:
    from llmtrain.config.load import load

    return [line for line in violations(load(str(small), list(overrides)), 1, "sft") if "sft" in line or "rew" in line]


def test_what_cannot_be_asked(small: Path) -> None:
    assert rules(small, "sft={min_trace_tokens: 8, max_trace_tokens: 8}") == []
    assert rules(small, "sft={min_trace_tokens: 9, max_trace_tokens: 8}") == [
        "sft.min_trace_tokens=9: must be at most sft.max_trace_tokens=8; lower it"
    ]
    assert rules(small, "sft.min_reward=1") == [
        "sft.min_reward=1: needs `rewards`, by which the answers are judged; add them, such as rewards: {name: math}"
    ]
    assert rules(small, "sft.min_reward=0", "rewards={name: math}") == []
    assert rules(small, "sft.min_reward=1", "rewards=[]") == [
        "rewards=[]: must name at least one reward; add one, such as {name: math}"
    ]
    assert rules(small, "rewards=[]") == []  # nobody asks them
    (broken,) = rules(small, "sft.min_reward=1", "rewards=[{function: gone.py:score}]")
    assert broken.startswith("rewards.score.function=gone.py:score: gone.py is no file here")


def test_rewards_that_judge_rows_belong_to_the_run(small: Path, rewards: Path) -> None:
    from llmtrain.config.load import load

    by_length = load(str(small), ["sft.max_trace_tokens=9", f"rewards=[{{function: {rewards}:ends}}]"])
    judged = load(str(small), ["sft.min_reward=1", f"rewards=[{{function: {rewards}:ends}}]"])
    for config, reads in ((by_length, False), (judged, True)):
        recipe = recipe_of("sft", config)
        assert recipe.reads_rewards == reads
        assert ("rewards.ends" in stage_files.contents("sft", config, [], Checksums())) == reads
        contents = contents_of(config, recipe, data_dir(config), tokenizer_dir(config), Checksums())
        assert ("rewards.ends" in contents) == reads
        other = config.model_copy(update={"rewards": [config.rewards[0].model_copy(update={"weight": 2.0})]})
        was, now = (record_of(resolved(each), recipe, {}) for each in (config, other))
        assert [key for key, *_ in differences(was, now, recipe)] == ["rewards"] * reads
    was, now = (record_of(resolved(each), RECIPES["sft"], {}) for each in (by_length, judged))
    assert [key for key, *_ in differences(was, now, RECIPES["sft"])] == ["sft.max_trace_tokens", "sft.min_reward"]


def lines(run_dir: Path) -> list[tuple[float, ...]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in found]


def test_ranks_agree_on_what_a_whim_keeps_and_a_run_goes_on_with_it(
    small: Path, rewards: Path, tmp_path: Path, forked: Callable
) -> None:
    """Two ranks whose reward draws lots: both train the same rows, and so does the run when it goes on, bit for bit. It
    may not once the file with the choice is gone."""
    write(tmp_path / "rows.jsonl", [{"prompt": f"{i}:", "completion": f" {i} and {i * i}"} for i in range(40)])
    judge = f"rewards=[{{function: {rewards}:drawn, unsandboxed: true}}]"
    sizes = ("train.steps=4", "train.global_batch_seqs=4", "checkpoint.every_steps=2", "sft.min_reward=0.5")
    arguments = ["sft", str(small), f"data.train={tmp_path}/rows.jsonl", judge, *sizes, "data.pack=false"]
    whole, again, lost = (tmp_path / name for name in ("whole", "again", "lost"))
    done = forked(2, WORKER, json.dumps([[*arguments, f"run_dir={whole}"]]), timeout_s=120)
    assert "exit codes [0]" in done.stdout, done.stdout[-3000:]
    choice = json.loads((whole / "rows-train.json").read_text())
    assert "rewards.drawn" in json.loads((whole / "run.json").read_text())["contents"]
    assert 0 < choice["kept"] == 40 - len(choice["left_out"]["wrong"]) < 40
    for place in (again, lost):
        shutil.copytree(whole / "checkpoints/step-00000002", place / "checkpoints/step-00000002")
    shutil.copy(whole / "rows-train.json", again)
    runs = [[*arguments, f"run_dir={place}"] for place in (again, lost)]
    done = forked(2, WORKER, json.dumps(runs), timeout_s=120)
    assert "exit codes [0, 2]" in done.stdout and "other rows are kept than those" in done.stdout, done.stdout[-3000:]
    assert lines(again) == lines(whole)[2:]
    for file in (whole / "checkpoints/step-00000004").glob("*.safetensors"):
        after = load_file(again / "checkpoints/step-00000004" / file.name)
        assert all(after[name].equal(tensor) for name, tensor in load_file(file).items())
