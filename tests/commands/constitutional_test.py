"""`llmtrain constitutional`: what is asked and what becomes of the answers, scripted; with a small random model; whole
on SmolLM2 (slow)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from llmtrain.commands import constitutional
from llmtrain.config.load import ConfigError, load
from llmtrain.config.schema import Config
from llmtrain.data.principles import Principle, drawn
from llmtrain.data.prompts import PromptSet
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.eval.comparing import both_orders, clamped, preferred_a
from llmtrain.observe.report import write_report
from llmtrain.rules.check import check
from llmtrain.trainer.constitution import COMPARE
from llmtrain.trainer.speaker import Question, Said
from llmtrain.types import Group, Sample
from tests.commands.judge_test import rows, start  # noqa: F401  fixture
from tests.model.llama import smollm2_directory

ROOT = Path(__file__).parents[2]
TWO = [Principle(n, f"criticise {n}", f"revise {n}", f"which is {n}?") for n in ("kind", "clear")]
SETTINGS = ("train.seq_len=200", "rollout.max_new_tokens=8", "rollout.group_size=2", "constitutional.prompts=2")


def document(start: Path, directory: Path, *overrides: str) -> Config:  # noqa: F811
    over = (f"run_dir={directory}", f"data.train={start}/problems.jsonl", *SETTINGS)
    principles = f"constitutional.principles={ROOT}/configs/constitutional/principles.yaml"
    config = load(str(start / "judge.yaml"), [*over, principles, *overrides])
    check(config, 1, "constitutional")
    return config


def test_probabilities_by_hand() -> None:
    assert preferred_a(math.log(0.2), math.log(0.1)) == pytest.approx(2 / 3)
    assert preferred_a(-5000.0, 0.0) == pytest.approx(0.0) and preferred_a(0.0, -5000.0) == pytest.approx(1.0)
    assert both_orders(0.9, 0.7) == pytest.approx(0.6)  # a model that prefers (A) by 0.3 is cancelled
    assert both_orders(0.8, 0.8) == pytest.approx(0.5)
    assert [clamped(x, 0.4, 0.6) for x in (0.1, 0.5, 0.99)] == [0.4, 0.5, 0.6]


class Scripted:
    """Answers `r0`, criticises by `no: ...`, revises to `... better`; prefers the shorter of two answers with
    probability 0.8, and (A) by 0.1 more."""

    def __init__(self, config: Config, broken: dict[str, list[Said] | None]) -> None:
        self.config, self.broken, self.tokenizer = config, broken, load_tokenizer(config.tokenizer.path)
        self.sampling = type("S", (), {"max_new_tokens": 8})
        self.asked: list[tuple[Question, int]] = []
        self.chosen: list[Question] = []
        self.completions = 0

    def sample(
        self, prompts: PromptSet, numbers: Sequence[int], purpose: str, samples: int | None = None
    ) -> list[Group]:
        texts = {"constitutional": ["r0"], "constitutional/pairs": ["long answer", "short"]}[purpose]
        assert samples == (1 if purpose == "constitutional" else None)

        def one(text: str) -> Sample:
            ids = list(map(ord, text))
            return Sample([1], ids, [True] * len(ids), [0.0] * len(ids), [0] * len(ids), text != self.broken.get("cut"))

        self.completions += len(texts) * len(numbers)
        return [[one(text) for text in texts] for _ in numbers]

    def said(self, sample: Sample) -> Said:
        return Said("".join(map(chr, sample.ids)), sample.finished)

    def answer(self, questions: Sequence[Question], tokens: int, samples: int = 1) -> list[list[Said] | None]:
        self.asked += [(question, tokens) for question in questions]
        self.completions += len(questions)
        return [self.reply(question.messages) for question in questions]

    def reply(self, messages: list[dict]) -> list[Said] | None:
        last = messages[-1]["content"]
        for key, reply in self.broken.items():
            if last.startswith(key) and "one" in messages[0]["content"]:
                return reply
        if last.startswith("Here is"):
            return [Said("I think so", True)]
        return [
            Said(
                f"no: {messages[1]['content']}" if last.startswith("criticise") else f"{messages[1]['content']} better",
                True,
            )
        ]

    def choose(self, questions: Sequence[Question], choices: Sequence[str]) -> list[list[float] | None]:
        assert choices == ("A", "B")
        self.chosen += questions
        return [self.logs(question.messages[0]["content"]) for question in questions]

    def logs(self, text: str) -> list[float] | None:
        if "huge" in self.broken and "one" in text:
            return None
        p = (0.8 if text.index("(A) short") < text.index("(B)") else 0.2) if "(A) short" in text else 0.2
        return [math.log(p + 0.1), math.log(1 - p - 0.1)]


@pytest.fixture
def scripted(start: Path, tmp_path: Path) -> Callable[..., tuple[dict, Scripted]]:  # noqa: F811
    """scripted(*overrides, **broken) -> constitutional.json and who spoke; files lie in tmp_path."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one", "answer": "1"}\n{"prompt": "two"}\n')

    def run(*overrides: str, **broken: list[Said] | None) -> tuple[dict, Scripted]:
        config = document(start, tmp_path / "run", f"data.train={tmp_path}/rows.jsonl", *overrides)
        speaker = Scripted(config, broken)
        return constitutional.applied(speaker, TWO, tmp_path), speaker

    return run


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_critiques_and_revisions(scripted: Callable, tmp_path: Path) -> None:
    """Every round starts from the newest answer; principles follow from the seed; limits are those of the document."""
    result, speaker = scripted("constitutional.pairs_per_prompt=0", "constitutional.critique_tokens=5")
    found = sorted(rows(tmp_path / "sft.jsonl"), key=lambda row: row["prompt"])
    assert found == [
        {"prompt": "one", "answer": "1", "completion": "r0 better better"},
        {"prompt": "two", "completion": "r0 better better"},
    ]
    assert (result["prompts"], result["revised"], result["lost_cut_off"], "pairs" in result) == (2, 2, 0, False)
    assert result["completions"] == 2 + 2 * (2 + 2)  # answers, then critiques and revisions of two rounds
    prompts = PromptSet(f"{tmp_path}/rows.jsonl", speaker.tokenizer, 99)
    names = [prompts.examples[prompts.at(i, speaker.config.seed)]["prompt"] for i in range(2)]
    expected = []
    for turn, before in enumerate(("r0", "r0 better")):
        drawn_now = [drawn(TWO, speaker.config.seed, f"principle/{i}/{turn}").name for i in range(2)]
        first = [[user(p), assistant(before), user(f"criticise {n}")] for p, n in zip(names, drawn_now, strict=True)]
        then = [
            [*talk, assistant(f"no: {before}"), user(f"revise {n}")] for talk, n in zip(first, drawn_now, strict=True)
        ]
        expected += [(talk, 5) for talk in first] + [(talk, 8) for talk in then]
    assert [(question.messages, tokens) for question, tokens in speaker.asked] == expected
    assert len({question.seed for question, _ in speaker.asked}) == 8
    assert not (tmp_path / "pairs.jsonl").exists()
    told = rows(tmp_path / "transcripts.jsonl")
    kinds = ["answer", "critique", "revision", "critique", "revision"]
    assert [[turn["kind"] for turn in line["turns"]] for line in told] == [kinds] * 2
    assert told[0]["turns"][1]["principle"] == drawn(TWO, speaker.config.seed, "principle/0/0").name


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"criticise": None}, "no room"),
        ({"revise": None}, "no room"),
        ({"revise": [Said("half", False)]}, "cut off"),
        ({"revise": [Said("", True)]}, "empty"),
    ],
)
def test_answers_that_are_given_up(scripted: Callable, tmp_path: Path, broken: dict, why: str) -> None:
    result, speaker = scripted("constitutional.pairs_per_prompt=0", **broken)
    assert [row["prompt"] for row in rows(tmp_path / "sft.jsonl")] == ["two"]
    assert {key: value for key, value in result.items() if key.startswith("lost") and value} == {
        f"lost_{why.replace(' ', '_')}": 1
    }
    (lost,) = (line for line in rows(tmp_path / "transcripts.jsonl") if "lost" in line)
    assert (lost["prompt"], lost["lost"]) == ("one", why)
    again = [q for q, _ in speaker.asked[4:] if q.messages[0]["content"] == "one"]
    assert again == []  # nothing is asked in the second round


def test_pairs_with_labels(scripted: Callable, tmp_path: Path) -> None:
    """P(A) is 0.9 with the shorter as (A) and 0.3 with it as (B): the mean over both orders is 0.8."""
    result, speaker = scripted("constitutional.revisions=0")
    found = sorted(rows(tmp_path / "pairs.jsonl"), key=lambda row: row["prompt"])
    assert [row.pop("label") for row in found] == pytest.approx([0.8, 0.8])
    assert {row.pop("principle") for row in found} <= {"kind", "clear"}
    pair = {"chosen": "short", "rejected": "long answer"}
    assert found == [{"prompt": "one", "answer": "1", **pair}, {"prompt": "two", **pair}]
    assert (result["pairs"], result["ties"], result["pairs_no_room"], result["pairs_cut_off"]) == (2, 0, 0, 0)
    assert result["letter_a"] == pytest.approx(0.6) and result["label_mean"] == pytest.approx(0.8)
    assert result["completions"] == 4
    name = drawn(TWO, speaker.config.seed, "principle/pair/0/0").name
    about = {"conversation": speaker.chosen[0].messages[0]["content"].split("\n")[2], "question": f"which is {name}?"}
    asked = [question.messages[0]["content"] for question in speaker.chosen[:2]]
    assert asked[0].startswith(COMPARE.format(**about, a="long answer", b="short"))
    assert asked[1].startswith(COMPARE.format(**about, a="short", b="long answer"))
    assert {question.prefill for question in speaker.chosen} == {"The better answer is ("}
    assert not (tmp_path / "sft.jsonl").exists() and speaker.asked == []


def test_a_prompt_is_asked_once(scripted: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^constitutional\.prompts=3: must be at most 2, the rows of data"):
        scripted("constitutional.prompts=3")
    scripted("constitutional.first=1", "constitutional.round=1")
    for name in ("sft.jsonl", "pairs.jsonl"):
        assert sorted(row["prompt"] for row in rows(tmp_path / name)) == ["one", "two"]


def test_labels_behind_a_thought_are_clamped(scripted: Callable, tmp_path: Path) -> None:
    """0.9 and 0.3 become 0.6 and 0.4: 0.6."""
    more = ("constitutional.revisions=0", "constitutional.label=thought", "constitutional.thought_tokens=9")
    _, speaker = scripted(*more)
    assert [row["label"] for row in rows(tmp_path / "pairs.jsonl")] == pytest.approx([0.6, 0.6])
    assert {tokens for _, tokens in speaker.asked} == {9} and len(speaker.asked) == 4
    assert {question.prefill for question in speaker.chosen} == {"I think so\n\nSo the better answer is ("}
    told = rows(tmp_path / "transcripts.jsonl")[0]["turns"]
    assert [turn["kind"] for turn in told] == ["first answer", "second answer", "thought", "thought", "comparison"]
    assert scripted(*more, Here=None)[0]["pairs_no_room"] == 1


def test_pairs_that_are_left_out(scripted: Callable, tmp_path: Path) -> None:
    assert scripted("constitutional.revisions=0", cut="short")[0]["pairs_cut_off"] == 2
    assert scripted("constitutional.revisions=0", cut="long answer")[0]["pairs"] == 2  # may be rejected
    result, _ = scripted("constitutional.revisions=0", huge=None)
    assert (result["pairs"], result["pairs_no_room"]) == (1, 1)


def test_agreement_with_given_preferences(scripted: Callable, tmp_path: Path) -> None:
    """Of 9 pairs the shorter is chosen in 6."""
    lines = [{"prompt": f"p{i}", "chosen": "short", "rejected": "long answer"} for i in range(6)]
    lines += [{"prompt": f"q{i}", "chosen": "long answer", "rejected": "short"} for i in range(3)]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    over = ("constitutional.revisions=0", "constitutional.pairs_per_prompt=0")
    result, speaker = scripted(*over, f"constitutional.agreement={tmp_path}/given.jsonl")
    assert (result["agreement"], result["agreement_pairs"]) == (pytest.approx(6 / 9), 9)
    assert (result["agreement_low"], result["agreement_high"]) == pytest.approx((0.354, 0.879), abs=1e-3)
    assert result["agreement_letter_a"] == pytest.approx(0.6) and len(speaker.chosen) == 18
    few = scripted(*over, f"constitutional.agreement={tmp_path}/given.jsonl", "constitutional.agreement_pairs=4")[0]
    assert few["agreement_pairs"] == 4 and few["completions"] == 0
    thought = ("constitutional.label=thought", "constitutional.thought_tokens=9")
    thinking = scripted(*over, f"constitutional.agreement={tmp_path}/given.jsonl", *thought)[0]
    assert thinking["completions"] == 18  # in both orders of nine pairs


def test_the_command_and_its_report(start: Path, tmp_path: Path) -> None:  # noqa: F811
    """With a small random model; the page shows the transcripts, escaped."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say <b>1</b>:"}\n{"prompt": "say 2:"}\n')
    (tmp_path / "given.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    files = (f"data.train={tmp_path}/rows.jsonl", f"constitutional.agreement={tmp_path}/given.jsonl")
    stop, more = 'rollout.stop=["e"]', ("train.seq_len=256", "constitutional.critique_tokens=6")
    for directory in ("run", "again"):
        constitutional.main(document(start, tmp_path / directory, *files, stop, *more))
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir() if path.name[0] != "."} == set(constitutional.FILES)
    for name in ("sft.jsonl", "pairs.jsonl", "transcripts.jsonl", "constitutional.json"):
        assert (run / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    told = json.loads((run / "constitutional.json").read_text())
    assert (told["principles"], told["agreement_pairs"], told["agreement_no_room"]) == (14, 1, 0)
    page = Path(write_report(str(run))).read_text()
    assert "Transcripts" in page and "say &lt;b&gt;1&lt;/b&gt;:" in page and "<b>1" not in page
    assert "agreement pairs" in page
    (run / "sft.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"holds sft\.jsonl, which llmtrain did not write"):
        constitutional.main(document(start, run, *files))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["constitutional.principles=null"], "constitutional.principles: must be set; give a file such as configs/"),
        (["constitutional.principles=no.yaml"], "constitutional.principles=no.yaml: does not exist; give a YAML file"),
        (["constitutional.agreement=no.jsonl"], "constitutional.agreement=no.jsonl: does not exist; give rows with"),
        (
            ["constitutional.revisions=0", "constitutional.pairs_per_prompt=0"],
            "constitutional.revisions=0: nothing to do",
        ),
        (["constitutional.clamp=[0.6, 0.4]"], "constitutional.clamp=[0.6, 0.4]: must be two probabilities around 0.5"),
        (["constitutional.pairs_per_prompt=2"], "rollout.group_size=2: must be at least 4, samples are compared in"),
        (
            ["constitutional.critique_tokens=200"],
            "constitutional.critique_tokens=200: must be less than train.seq_len=200",
        ),
    ],
)
def test_rules(start: Path, tmp_path: Path, overrides: list[str], message: str) -> None:  # noqa: F811
    with pytest.raises(ConfigError) as told:
        document(start, tmp_path, *overrides)
    assert message in str(told.value)


ASKED = ["How do I get rid of a wasp nest?", "My neighbour is loud. How do I get back at him?"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("label", ["logprobs", "thought"])
def test_whole_on_smollm2(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, label: str) -> None:
    """Transcripts, demonstrations and preferences of a real model; whatever it prefers is reported."""
    place = smollm2_directory(tmp_path_factory)
    chats = [{"messages": [{"role": "user", "content": text}]} for text in ASKED]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    given = [{"prompt": text, "chosen": "Ask somebody who knows.", "rejected": "Burn it."} for text in ASKED]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    (tmp_path / "x.yaml").write_text(
        f"""
run_dir: {tmp_path}/run
model: {{init_from: {place}}}
tokenizer: {{path: {place}}}
data: {{train: {tmp_path}/rows.jsonl}}
engine: {{precision: fp32}}
train: {{seq_len: 640}}
rollout: {{group_size: 2, max_new_tokens: 96}}
constitutional:
  {{principles: {ROOT}/configs/constitutional/principles.yaml, prompts: 2, revisions: 1, critique_tokens: 64,
    label: {label}, thought_tokens: 32, agreement: {tmp_path}/given.jsonl}}
"""
    )
    config = load(str(tmp_path / "x.yaml"), [])
    check(config, 1, "constitutional")
    constitutional.main(config)
    told = json.loads((tmp_path / "run" / "constitutional.json").read_text())
    assert told["agreement_pairs"] == 2 and 0 <= told["agreement_low"] <= told["agreement_high"] <= 1
    lost = sum(value for key, value in told.items() if key.startswith("lost"))
    assert told["revised"] + lost == 2 and len(rows(tmp_path / "run" / "sft.jsonl")) == told["revised"]
    low, high = (0.5, 0.6) if label == "thought" else (0.5, 1.0)
    assert all(low < row["label"] <= high for row in rows(tmp_path / "run" / "pairs.jsonl"))
    assert len(rows(tmp_path / "run" / "transcripts.jsonl")) == 4
    PromptSet(str(tmp_path / "rows.jsonl"), load_tokenizer(str(place)), 640)
    assert os.path.getsize(tmp_path / "run" / "transcripts.jsonl") > 500
