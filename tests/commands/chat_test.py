"""Talking to a run and to a Hugging Face directory, with and without a chat template."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from llmtrain import cli
from llmtrain.commands.chat import Talk, converse, load_generator
from llmtrain.config.chat import ChatOptions
from llmtrain.data.search.store import Hit, Passage
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.types import Prompt, Sampling
from tests.forked import run_alone
from tests.model.llama import SMALL, random_llama
from tests.small_run import DOCUMENT

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
GREEDY = ("--temperature", "0", "--max-new-tokens", "12")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def directory(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in the form of Hugging Face, without a chat template."""
    path = tmp_path_factory.mktemp("chat") / "hf"
    shutil.copytree(small_data / "tokenizer", path)
    random_llama(SMALL.model_copy(update={"vocab_size": 512}), seed=1).save_pretrained(path)
    return path


def greedy(directory: Path, tokenizer: Tokenizer, text: str) -> str:
    sampling = Sampling(12, temperature=0, stop_ids=(tokenizer.eos_id,))
    ids = tokenizer.encode(text, parse_special=False)
    return tokenizer.decode(load_generator(str(directory)).generate([Prompt(ids)], sampling)[0][0].ids)


def test_a_prompt_prints_the_answer_alone(directory: Path, capsys: Capture) -> None:
    expected = greedy(directory, load_tokenizer(str(directory)), "The sum <eos>")
    assert cli.main(["chat", str(directory), "--prompt", "The sum <eos>", *GREEDY]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert cli.main(["chat", str(directory), "--prompt", "The sum", "--system", "x"]) == 2
    assert capsys.readouterr() == ("", f"--system: {directory} has no chat template, which would show it; drop it\n")
    assert cli.main(["chat", str(directory), "--prompt", "The sum " * 500]) == 2
    assert capsys.readouterr().err.startswith("prompt 0 has ")


def test_a_run_answers_with_its_newest_checkpoint(small_data: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    run = tmp_path / "all/run"
    options = (f"run_dir={run}", "train.steps=2", "train.eval_seqs=1")
    done = run_alone("llmtrain", "pretrain", tmp_path / "small.yaml", *options)
    assert done.returncode == 0, done.stdout[-2000:]
    expected = greedy(run, load_tokenizer(str(small_data / "tokenizer")), "1 + 1")
    assert cli.main(["chat", str(run), "--prompt", "1 + 1", *GREEDY]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert cli.main(["chat", str(run.parent)]) == 2
    assert capsys.readouterr().err.endswith(" (a run); give a stage of it: run\n")
    assert cli.main(["chat", str(small_data)]) == 2
    assert capsys.readouterr().err.endswith(" (a run); give a run or a Hugging Face directory\n")


@dataclass
class Echo:
    """Answers with the tokens of ` yes` and the end of the text, whatever it is asked; or is interrupted by Ctrl-C."""

    tokenizer: Tokenizer
    max_seq_tokens: int = 200
    interrupted: bool = False
    asked: list[str] = field(default_factory=list)
    seeds: set[int] = field(default_factory=set)

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[int]:
        if len(prompt.ids) >= self.max_seq_tokens:
            raise ValueError("prompt 0 is too long")
        self.asked.append(self.tokenizer.backend.decode(prompt.ids, skip_special_tokens=False))
        self.seeds.add(prompt.seed)
        yield from self.tokenizer.encode(" yes")
        if self.interrupted:
            raise KeyboardInterrupt
        yield self.tokenizer.eos_id


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """What a user types: a line, or what a key raises."""
    coming = iter(lines)

    def read(_: str) -> str:
        line = next(coming)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def talk_to(directory: Path, options: ChatOptions) -> Talk:
    tokenizer = load_tokenizer(str(directory))
    return Talk(replace(options, path=str(directory)), Echo(tokenizer), tokenizer)


def test_without_a_template_the_text_goes_on(directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    talk = talk_to(directory, ChatOptions(""))
    type_in(monkeypatch, "Is it", "  ", "<eos>and so?", EOFError)
    assert converse(talk) == 0
    assert capsys.readouterr().out == " yes\n yes\n"
    assert talk.generator.asked == ["Is it", "Is it yes\n<eos>and so?"] and len(talk.generator.seeds) == 2
    assert talk.tokenizer.eos_id not in talk.tokenizer.encode("<eos>and so?", parse_special=False)


def test_a_template_shows_the_whole_conversation(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    talk = talk_to(tmp_path, ChatOptions("", system="Be brief."))
    type_in(monkeypatch, "A?", "B?", EOFError)
    assert converse(talk) == 0
    first = "system: Be brief.\nuser: A?\nassistant: "
    assert talk.generator.asked == [first, f"{first} yes\nuser: B?\nassistant: "]


def test_ctrl_c_ends_an_answer_and_twice_the_program(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    talk = talk_to(directory, ChatOptions(""))
    talk.generator.interrupted = True
    type_in(monkeypatch, KeyboardInterrupt, "A", "B", KeyboardInterrupt)
    assert converse(talk) == 130
    assert talk.generator.asked == ["A", "A yes\nB"]
    assert capsys.readouterr().out == "\n yes\n yes\n\n"


def test_the_oldest_turns_make_room_and_a_line_too_long_is_forgotten(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    talk = talk_to(directory, ChatOptions("", max_new_tokens=8))
    talk.generator.max_seq_tokens = 16 + len(talk.tokenizer.encode("one two\nthree"))
    type_in(monkeypatch, "one two", "three", "four five six", "zz" * 99, "end", EOFError)
    assert converse(talk) == 0
    assert talk.generator.asked[:3] == ["one two", "one two yes\nthree", "three yes\nfour five six"]
    err = capsys.readouterr().err
    assert "its oldest turns are forgotten" in err and "prompt 0 is too long" in err
    assert talk.generator.asked[3] == "four five six yes\nend"


def test_code_of_a_directory_does_not_run_whatever_is_typed(directory: Path, tmp_path: Path) -> None:
    evil = Path(shutil.copytree(directory, tmp_path / "evil"))
    config = json.loads((evil / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
    (evil / "tokenizer_config.json").write_text(json.dumps(config | own))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain", "chat", evil], input="y\n", capture_output=True, text=True, timeout=120
    )
    assert not (tmp_path / "ran").exists()
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{evil}: transformers cannot load this tokenizer (it asks for code of its own (auto_map)")
    assert "trust_remote_code" not in done.stderr


@dataclass
class Library:
    """Finds the same two passages for every question, and keeps what it was asked."""

    asked: list[tuple[str, int]] = field(default_factory=list)

    def search(self, question: str, k: int) -> list[Hit]:
        self.asked.append((question, k))
        texts = ["The sky\nis blue {1}.", "Gras\x1b[2J is green."] if question != "nothing" else []
        return [Hit(Passage(i, f"d{i}", f"d{i}", None, 0, 9, text), 1.0) for i, text in enumerate(texts)]


def test_a_store_gives_passages_to_the_last_question(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    talk = talk_to(tmp_path, ChatOptions("", passages=2))
    talk.store = Library()
    type_in(monkeypatch, "A?", "nothing", EOFError)
    assert converse(talk) == 0
    found = "The sky\nis blue {1}.\n\nGras\x1b[2J is green."
    first = f"user: Answer with the help of these passages.\n\n{found}\n\nQuestion: A?\nassistant: "
    assert talk.generator.asked == [first, "user: A?\nassistant:  yes\nuser: nothing\nassistant: "]
    assert talk.store.asked == [("A?", 2), ("nothing", 2)]
    assert capsys.readouterr().err.splitlines() == [
        "[1] d0, characters 0 to 9: The sky is blue {1}.",
        "[2] d1, characters 0 to 9: Gras [2J is green.",  # without what would steer the terminal
        "no passage of the store is shown",
    ]


def test_passages_that_do_not_fit_are_left_out(directory: Path, capsys: Capture) -> None:
    talk = talk_to(directory, ChatOptions("", max_new_tokens=8))
    talk.store = Library()
    whole = "Answer with the help of these passages.\n\nThe sky\nis blue {1}.\n\nQuestion: A?"
    talk.generator.max_seq_tokens = 8 + len(talk.tokenizer.encode(whole))
    talk.answer("A?")
    assert talk.generator.asked == [whole] and capsys.readouterr().err.startswith("[1] d0,")


def test_a_store_that_is_none(directory: Path, capsys: Capture) -> None:
    assert cli.main(["chat", str(directory), "--store", str(directory), "--prompt", "A?"]) == 2
    assert capsys.readouterr().err.startswith(f"{directory}: is no store; make one with `llmtrain index`")
