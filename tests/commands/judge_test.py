"""`llmtrain judge`: each judge on scripted answers by hand, and the command with a small random model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtrain.commands import judge, run, stage_files
from llmtrain.config.load import ConfigError, load
from llmtrain.config.schema import Config, RewardConfig
from llmtrain.data.prompts import PromptSet
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.hf_write import save_hf
from llmtrain.observe.contents import Checksums
from llmtrain.rules.check import check
from llmtrain.trainer.speaker import NEXT_TURN, Question, Said, open_speaker
from llmtrain.types import Group, Sample
from tests.forked import run_alone
from tests.rewards.model_test import llama
from tests.small_run import DOCUMENT

STOP = 'rollout.stop=["e"]'
SETTINGS = ("train.seq_len=48", "rollout.max_new_tokens=8", "rollout.group_size=4", "judge.prompts=4")


@pytest.fixture(scope="module")
def start(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a document, problems answered by a digit, and an untrained model."""
    base = tmp_path_factory.mktemp("judge")
    problems = [{"prompt": f"say {i % 3} {'x' * (i % 5)}:", "answer": str(i % 3)} for i in range(8)]
    (base / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    (base / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    model = load(str(base / "small.yaml"), []).model
    weights = ((name, init_tensor(name, shape, model, 0) * 4) for name, shape in parameter_shapes(model).items())
    save_hf(str(base / "hf"), model, weights, torch.float32, str(small_data / "tokenizer"), 1)
    lines = (base / "small.yaml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("model:", "  {num_layers"))]
    more = [f"model: {{init_from: {base}/hf}}", "rewards: {name: first_integer}"]
    (base / "judge.yaml").write_text("\n".join([*kept, *more]) + "\n")
    return base


def document(start: Path, directory: Path, *overrides: str) -> Config:
    over = (f"run_dir={directory}", f"data.train={start}/problems.jsonl", *SETTINGS, *overrides)
    config = load(str(start / "judge.yaml"), list(over))
    check(config, 1, "judge")
    return config


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


WRITTEN = {  # prompt -> (completion, finished, log-prob) of four samples
    "a": [("1", True, -1.0), ("2", True, -2.0), ("2", True, -2.0), ("x", True, -9.0)],
    "b": [("3", True, -1.5), ("4", False, -0.5), ("3", True, -1.5), ("5", True, -4.0)],
}
GREEDY = {"a": "2", "b": "y"}
REPLIES = {"1": ["Score: 1", "Score: 2"], "2": ["Score: 4", "no"], "x": ["no", "no"], "3": ["5", "5"], "4": ["3", "3"]}


class Scripted:
    """Speaks what is written above; tokens are characters."""

    def __init__(self, config: Config) -> None:
        self.config, self.sampling = config, SimpleNamespace(temperature=1.0)
        self.asked: list[Question] = []
        self.completions = 0
        self.tokenizer = SimpleNamespace(has_chat=False)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def sample(self, prompts: PromptSet, numbers: Sequence[int], purpose: str, greedy: bool = False) -> list[Group]:
        assert purpose == "judge"
        chosen = [prompts.examples[prompts.around(number, self.config.seed)] for number in numbers]
        self.completions += len(chosen) * (1 if greedy else 4)
        return [
            self.group(row, [(GREEDY[row["prompt"]], True, -1.0)] if greedy else WRITTEN[row["prompt"]])
            for row in chosen
        ]

    def group(self, row: dict, written: Sequence[tuple[str, bool, float]]) -> Group:
        def sample(text: str, finished: bool, logprob: float) -> Sample:
            ids, n = list(map(ord, text)), len(text)
            return Sample(
                [ord(row["prompt"])], ids, [True] * n, [logprob] + [0.0] * (n - 1), [0] * n, finished, example=row
            )

        return [sample(*each) for each in written]

    def answer(self, questions: Sequence[Question], tokens: int, samples: int) -> list[list[Said] | None]:
        assert (tokens, samples) == (7, 2)
        self.asked += questions
        self.completions += samples * len(questions)
        texts = [question.messages[0]["content"].rpartition("|")[2] for question in questions]
        return [[Said(each, True) for each in REPLIES[text]] if text in REPLIES else None for text in texts]


@pytest.fixture
def scripted(start: Path, tmp_path: Path) -> Callable[..., tuple[dict, list[dict], list[dict], Scripted]]:
    """scripted(by, *overrides) -> judge.json, pairs, best rows, and who spoke."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "2"}\n{"prompt": "b", "answer": "3"}\n')
    (tmp_path / "rubric.txt").write_text("{prompt}{prompt}|{completion}")

    def run(by: str, *overrides: str) -> tuple[dict, list[dict], list[dict], Scripted]:
        over = (f"data.train={tmp_path}/rows.jsonl", "judge.prompts=2", f"judge.by={by}", *overrides)
        speaker = Scripted(document(start, tmp_path / "run", *over))
        speaker.tokenizer = load_tokenizer(speaker.config.tokenizer.path)
        result = judge.judged(speaker.config, speaker, tmp_path)
        by_prompt = [
            sorted(rows(tmp_path / name), key=lambda row: row["prompt"]) for name in ("pairs.jsonl", "best.jsonl")
        ]
        return result, *by_prompt, speaker

    return run


def pair(prompt: str, answer: str, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "answer": answer, "chosen": chosen, "rejected": rejected}


def best(prompt: str, answer: str, completion: str) -> dict:
    return {"prompt": prompt, "answer": answer, "completion": completion}


def test_the_verifier_judges(scripted: Callable) -> None:
    result, pairs, chosen, _ = scripted("reward")
    assert pairs == [pair("a", "2", "2", "x"), pair("b", "3", "3", "5")]
    assert chosen == [best("a", "2", "2"), best("b", "3", "3")]
    known = {
        "by": "reward",
        "first": 0,
        "round": 0,
        "prompts": 2,
        "completions": 8,
        "samples": 8,
        "unfinished": 1,
        "unscored": 0,
        "best": 2,
    }
    assert result == {
        **{**known, "pairs": 2, "ties": 0, "verifier": "first_integer", "agreement": 1.0, "agreement_pairs": 8},
        **{
            "pairs_right": 2,
            "pairs_wrong": 0,
            "pairs_right_low": pytest.approx(0.342, abs=1e-3),
            "pairs_right_high": 1.0,
        },
        **{"reward_samples": 0.5, "reward_best": 1.0, "reward_errors": 0},
    }


def test_a_majority_judges(scripted: Callable) -> None:
    """a: 1/4, 1/2, 1/2, 0; b: 1/2, 1/4, 1/2, 1/4, of which one was cut off and may only be rejected."""
    result, pairs, _, _ = scripted("majority", "judge.pairs_per_prompt=2", "judge.soft=0.5")
    labels = [row.pop("label") for row in pairs]
    assert pairs[:2] == [pair("a", "2", "2", "x"), pair("a", "2", "2", "1")]
    assert pairs[2:] == [pair("b", "3", "3", "5"), pair("b", "3", "3", "4")]
    assert labels == pytest.approx([0.7310586, *[0.6224593] * 3])  # sigmoid(0.5 / 0.5), sigmoid(0.25 / 0.5)
    assert (result["agreement"], result["pairs_right"], result["ties"]) == (1.0, 4, 0)


def test_the_greedy_answer_judges(scripted: Callable) -> None:
    """Greedily `y` is no answer of first_integer: nothing of b has a score."""
    result, pairs, chosen, _ = scripted("greedy", "judge.best_least=1", "judge.best_per_prompt=3")
    assert pairs == [pair("a", "2", "2", "x")] and chosen == [best("a", "2", "2")]
    assert (result["unscored"], result["ties"], result["pairs"]) == (4, 1, 1)
    assert (result["samples"], result["completions"]) == (8, 10)


def test_own_log_probs_judge(scripted: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    result, pairs, chosen, _ = scripted("logprob", "judge.tie=2.5")
    assert pairs == [pair("a", "2", "1", "x")]  # b: -1.5 and -4 are a tie
    assert chosen == [best("a", "2", "1"), best("b", "3", "3")]
    # of a 2 against 1 (twice wrong), 2 against x (twice right); of b 3 against 4 (wrong), 3 against 5 (right)
    assert (result["agreement"], result["agreement_pairs"], result["pairs_right"], result["pairs_wrong"]) == (
        0.5,
        8,
        0,
        0,
    )


def test_a_rubric_judges(scripted: Callable, tmp_path: Path) -> None:
    """1: 1.5; 2: 4, one of two judgements has a score; x: none; b: 5, 3 (cut off), 5, none."""
    over = (f"judge.rubric={tmp_path}/rubric.txt", "judge.votes=2", "judge.rubric_tokens=7")
    result, pairs, chosen, speaker = scripted("rubric", *over)
    assert pairs == [pair("a", "2", "2", "1"), pair("b", "3", "3", "4")]
    assert chosen == [best("a", "2", "2"), best("b", "3", "3")] and result["unscored"] == 2
    asked = {question.messages[0]["content"] for question in speaker.asked}
    assert asked == {"aa|1", "aa|2", "aa|x", "bb|3", "bb|4", "bb|5"}
    assert len({question.seed for question in speaker.asked}) == len(speaker.asked) == 8
    assert (result["samples"], result["completions"]) == (8, 24)


def test_a_model_judges_and_the_verifier_is_compared(scripted: Callable, tmp_path: Path) -> None:
    own = f"[{{model: {llama(tmp_path / 'rm')}, dtype: fp32}}, {{name: first_integer}}]"
    result, pairs, _, _ = scripted("model", f"rewards={own}")
    assert result["verifier"] == "first_integer" and result["reward_samples"] == 0.5
    scores = {(row["prompt"], row["completion"]): row["score"] for row in rows(tmp_path / "samples.jsonl")}
    for row in pairs:
        own = {text: score for (prompt, text), score in scores.items() if prompt == row["prompt"] and text != "4"}
        assert row["chosen"] == max(own, key=own.get)
    assert len(set(scores.values())) == 6


def test_a_sample_on_which_a_reward_failed_has_no_score(tmp_path: Path) -> None:
    place = llama(tmp_path / "rm", max_position_embeddings=8)
    rewards = [RewardConfig(model=str(place), dtype="fp32", max_error_share=0.5)]
    written = [("1", True, -1.0), ("1" * 20, True, -1.0)]
    speaker = Scripted.__new__(Scripted)
    ((score, failed),) = judge.rewarded(rewards, speaker, [speaker.group({"prompt": "a"}, written)])
    assert score is not None and failed is None


def test_without_gold_answers_there_is_no_verifier(
    scripted: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    result, pairs, _, _ = scripted("majority")
    assert result["verifier"] is None and len(pairs) == 2 and "agreement" not in result
    assert "no verifier" in "".join(capsys.readouterr())
    with pytest.raises(ValueError, match="2 of 2 rows cannot be rewarded"):
        scripted("reward")


def test_rounds_take_other_prompts(start: Path, tmp_path: Path) -> None:
    """As a user runs it, twice: the same; the next round: other prompts."""
    for directory, more in {"one": [], "again": [], "two": ["judge.round=1"]}.items():
        judge.main(document(start, tmp_path / directory, "judge.by=logprob", STOP, *more))
    one, again, two = (rows(tmp_path / name / "samples.jsonl") for name in ("one", "again", "two"))
    assert one == again and len(one) == 16
    assert {row["problem"] for row in one} | {row["problem"] for row in two} == set(range(8))
    told = json.loads((tmp_path / "two" / "judge.json").read_text())
    assert (told["first"], told["round"], told["prompts"], told["samples"]) == (4, 1, 4, 16)
    assert len(rows(tmp_path / "two" / "pairs.jsonl")) == told["prompts"] - told["ties"] > 0
    tokenizer = load_tokenizer(str(start / "hf"))
    PromptSet(str(tmp_path / "one" / "pairs.jsonl"), tokenizer, 48)  # rows that can be read
    judge.main(document(start, tmp_path / "one", "judge.by=logprob", STOP))  # what it made itself is replaced
    (tmp_path / "one" / "pairs.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"holds pairs\.jsonl, which llmtrain did not write"):
        judge.main(document(start, tmp_path / "one", "judge.by=logprob", STOP))
    assert (tmp_path / "one" / "pairs.jsonl").read_text() == "mine"


def test_a_prompt_is_judged_once(start: Path, tmp_path: Path, scripted: Callable) -> None:
    """More prompts than rows are refused before anything is sampled; rounds go around, whatever divides what."""
    message = r"^judge\.prompts=3: must be at most 2, the rows of data\.train that can be used, as none"
    with pytest.raises(ValueError, match=message):
        scripted("reward", "judge.prompts=3")
    for first, number in ((1, 0), (0, 7)):
        _, pairs, chosen, _ = scripted("reward", f"judge.first={first}", f"judge.round={number}")
        assert [row["prompt"] for row in pairs] == [row["prompt"] for row in chosen] == ["a", "b"]
    prompts = PromptSet(f"{start}/problems.jsonl", load_tokenizer(str(start / "hf")), 40)
    for first in range(17):
        assert {prompts.around(i, 5) for i in range(first, first + 8)} == set(range(8))
    assert [prompts.around(i, 5) for i in range(8)] == [prompts.at(i, 5) for i in range(8)]


def test_all_that_is_written_is_counted(start: Path, tmp_path: Path) -> None:
    speaker = open_speaker(document(start, tmp_path))
    prompts = PromptSet(f"{start}/problems.jsonl", speaker.tokenizer, 40)
    counts = [speaker.completions]
    long, short = (Question([{"role": "user", "content": text}]) for text in ("x" * 99, "hi"))
    for write in (
        lambda: speaker.sample(prompts, range(3), "judge"),
        lambda: speaker.sample(prompts, range(3), "judge", samples=2),
        lambda: speaker.sample(prompts, range(3), "judge", greedy=True),
        lambda: speaker.answer([short, long, short], 4, samples=2),  # nothing is written where there is no room
        lambda: speaker.choose([short], ["A", "B"]),
    ):
        write()
        counts.append(speaker.completions)
    assert counts == [0, 12, 18, 21, 25, 25]


@pytest.mark.parametrize(("by", "completions"), [("greedy", 20), ("majority", 16), ("rubric", 48)])
def test_the_command_with_a_model(start: Path, tmp_path: Path, by: str, completions: int) -> None:
    more = ("judge.rubric_tokens=8", "judge.votes=2", "train.seq_len=256")
    judge.main(document(start, tmp_path / "run", f"judge.by={by}", *more))
    told = json.loads((tmp_path / "run" / "judge.json").read_text())
    assert told["by"] == by and told["samples"] == 16 and told["verifier"] == "first_integer"
    assert told["completions"] == completions
    assert {path.name for path in (tmp_path / "run").iterdir() if path.name[0] != "."} == set(judge.FILES)


def test_log_probs_at_another_temperature(start: Path, tmp_path: Path) -> None:
    """They are those of temperature 1, from a forward; at temperature 1 the sampler's own are the same."""
    plain = open_speaker(document(start, tmp_path, "rollout.temperature=1.0"))
    hot = open_speaker(document(start, tmp_path, "rollout.temperature=2.0"))
    prompts = PromptSet(f"{start}/problems.jsonl", plain.tokenizer, 40)
    groups = plain.sample(prompts, range(3), "judge")
    expected, found = judge.own_logprobs(plain, groups), judge.own_logprobs(hot, groups)
    for one, other in zip(expected, found, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_a_speaker_without_a_template(start: Path, tmp_path: Path) -> None:
    speaker = open_speaker(document(start, tmp_path))
    question = Question([{"role": "user", "content": "hi"}], "so (")
    assert speaker.tokenizer.decode(speaker.encode(question)) == "hi\n\nAssistant: so ("
    a, b = speaker.choose([question], ["A", "B"])[0]
    ids = speaker.encode(question)
    model = speaker.generator.model.requires_grad_(False)
    logp = model(torch.tensor([ids]), torch.arange(len(ids))[None]).log_softmax(-1)[0, -1]
    tokens = [speaker.tokenizer.encode(letter)[0] for letter in "AB"]
    assert [a, b] == pytest.approx([float(logp[i]) for i in tokens], abs=1e-4) and a != b
    assert speaker.choose([Question([{"role": "user", "content": "x" * 99}])], ["A", "B"]) == [None]
    assert speaker.answer([Question([{"role": "user", "content": "x" * 99}]), question], 4)[0] is None
    ids = speaker.tokenizer.encode(f" yes{NEXT_TURN} no")
    count = len(ids)
    assert speaker.said(Sample([1], ids, [True] * count, [0.0] * count, [0] * count, True)) == ("yes", True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.group_size=1"], "rollout.group_size=1: must be at least 2, samples are compared in pairs; raise it"),
        (["judge.by=model"], "judge.by=model: needs a reward that is a model; add {model: DIRECTORY} to rewards"),
        (["judge.by=rubric", "judge.rubric_tokens=48"], "judge.rubric_tokens=48: must be less than train.seq_len=48"),
        (["judge.by=rubric", "judge.rubric=no.txt"], "judge.rubric=no.txt: does not exist; give a text file with"),
        (["judge.lowest=5"], "judge.lowest=5: must be less than judge.highest=5; lower it"),
        (["rewards=[{model: m}]"], "judge.by=greedy: needs a reward that reads answers; add one that is no model"),
        (["data.train=no.jsonl"], "data.train=no.jsonl: does not exist"),
        (["model.init_from=null"], "model.init_from: must be set, judge starts from a trained model"),
    ],
)
def test_rules(start: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        document(start, tmp_path, *overrides)
    assert message in str(told.value)


def test_a_rubric_needs_its_fields(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("{completion} of {something}")
    with pytest.raises(ValueError, match=r"judge\.rubric=.*r\.txt: has no \{prompt\}; write it where it belongs"):
        judge.read_rubric("judge.rubric", str(tmp_path / "r.txt"))
    assert judge.filled("{completion} {prompt} {x}", "{completion}", "{prompt}") == "{prompt} {completion} {x}"


def test_the_directory_of_a_run_is_refused(start: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run that trains; give `llmtrain judge` another name"):
        judge.main(document(start, tmp_path))


def test_stages_of_a_run_read_what_they_name(start: Path, tmp_path: Path) -> None:
    """A stage starts anew when its rubric or a reward model has other contents; what a stage makes does not count."""
    (tmp_path / "rubric.txt").write_text("{prompt} {completion}")
    place = llama(tmp_path / "rm")
    rubric = ("judge.by=rubric", f"judge.rubric={tmp_path}/rubric.txt", "judge.rubric_tokens=8")
    over = (*rubric, f"rewards=[{{model: {place}}}, {{name: math}}]")
    config = document(start, tmp_path / "run", *over)

    def read() -> dict[str, str]:
        return stage_files.contents("judge", config, [], Checksums())

    first = read()
    assert {"data.train", "judge.rubric", "rewards.rm", "model.init_from", "tokenizer.path"} <= first.keys()
    (tmp_path / "rubric.txt").write_text("{completion} {prompt}")
    llama(place, initializer_range=0.2)
    second = read()
    assert {key for key in first if first[key] != second[key]} == {"judge.rubric", "rewards.rm"}
    made = stage_files.contents("judge", config, [str(place)], Checksums())
    assert "rewards.rm" not in made and "judge.rubric" in made


def test_as_stages_of_a_run(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged once, trained on, and skipped when it is run again."""
    lines = (start / "judge.yaml").read_text()
    common = f"data: {{train: {start}/problems.jsonl}}\ntrain: {{seq_len: 48, steps: 1}}\n"
    common += "rollout: {group_size: 4, max_new_tokens: 8}\n"
    kept = [
        line for line in lines.splitlines() if line.split(":")[0] in ("model", "tokenizer", "engine", "rewards", "log")
    ]
    stages = [
        "stages:",
        "  - {name: judge, command: judge, set: {judge: {by: logprob, prompts: 4}, rollout: {stop: [e]}}}",
        '  - {name: sft, command: sft, set: {data: {train: "{run}/judge/best.jsonl"}, train: {global_batch_seqs: 2}}}',
    ]
    (tmp_path / "r.yaml").write_text("\n".join([f"run_dir: {tmp_path}/run", *kept, common, *stages]) + "\n")
    config = load(str(tmp_path / "r.yaml"), [])
    check(config, 1, "run")
    started: list[str] = []

    def child(command: list[str], environment: dict, held: int) -> int:
        started.append(command[3])
        return run_alone("llmtrain", *command[3:]).returncode

    monkeypatch.setattr(run, "run_child", child)
    assert run.main(config) == 0 and started == ["judge", "sft"]
    assert (tmp_path / "run" / "judge" / "judge.json").is_file()
    assert run.main(config) == 0 and started == ["judge", "sft"]
