"""Rows of every shape as one form, and what is said of rows that have none."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.config.schema import DataConfig
from llmtrain.data.packing import Demonstrations
from llmtrain.data.prompts import PromptSet
from llmtrain.data.rows import Example, parse_row
from llmtrain.data.tokenizer import Tokenizer
from tests.data.families import family

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def parsed(record: dict, answered: bool = True, **keys: Any) -> Example:
    return parse_row(record, DataConfig(**keys), answered)


def form(record: dict, **keys: Any) -> tuple:
    example = parsed(record, **keys)
    return example.prompt, example.turns or example.answer


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q", "answer": "a"}, ("q", "a")),
        ({"prompt": "q", "completion": "a", "answer": "5"}, ("q", "a")),
        ({"prompt": "q", "completion": None, "answer": "a"}, ("q", "a")),
        ({"prompt": [USER], "completion": [BOT]}, ([USER], [BOT])),
        ({"prompt": [USER], "answer": "a"}, ([USER], "a")),
        ({"messages": [SYSTEM, USER, BOT]}, ([SYSTEM, USER], [BOT])),
        ({"messages": [USER, BOT], "answer": "5"}, ([USER], [BOT])),
        ({"messages": [USER], "completion": "a"}, ([USER], "a")),
        ({"messages": [USER, BOT, USER, BOT]}, ([USER, BOT, USER], [BOT])),
        ({"messages": [USER | {"name": None}, BOT | {"tool_calls": None}]}, ([USER], [BOT])),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, BOT]}, ([USER], [BOT])),
        ({"messages": [USER], "prompt": "x", "answer": "a"}, ([USER], "a")),
        ({"messages": None, "prompt": "q", "answer": "a"}, ("q", "a")),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ([USER], [BOT])),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            ([SYSTEM, USER], [BOT]),
        ),
        ({"instruction": "q", "input": "", "output": "a"}, ([USER], "a")),
        ({"instruction": "q", "output": "a", "system": "s"}, ([SYSTEM, USER], "a")),
        ({"instruction": "q", "input": "i", "output": "a"}, ([{"role": "user", "content": "q\n\ni"}], "a")),
        ({"question": "q", "answer": "a"}, ("q", "a")),
        ({"question": "q", "answer": "1 + 1 = 2\n#### 2"}, ("q", "1 + 1 = 2\n#### 2")),
        ({"text": "t"}, (None, "t")),
        ({"question": "q", "text": "t", "answer": "a"}, ("q", "a")),
    ],
)
def test_shapes_are_known_by_their_fields(record: dict, expected: tuple) -> None:
    assert form(record) == expected


def test_fields_are_named_by_the_document() -> None:
    record = {"q": "q", "gold": "a", "messages": [BOT], "more": 1}
    assert form(record, fields={"prompt": "q", "answer": "gold"}) == ("q", "a")
    kept = parsed(record, fields={"prompt": "q", "answer": "gold"}).record
    assert kept == {"prompt": "q", "answer": "a", "messages": [BOT], "more": 1}
    assert form({"chat": [USER, BOT]}, fields={"messages": "chat"}) == ([USER], [BOT])
    assert form({"prompt": "q", "chosen": "a", "rejected": "b"}, fields={"completion": "chosen"}) == ("q", "a")
    with pytest.raises(ValueError, match=r"missing field 'gold', which data.fields names; found 'q'"):
        parsed({"q": "q"}, fields={"prompt": "q", "answer": "gold"})


def test_a_reward_reads_what_stands_behind_the_mark_of_gsm8k() -> None:
    example = parsed({"question": "q", "answer": "1 + 1 = 2\n#### 1,234"}, answered=False)
    assert example.record["answer"] == "1,234" and example.answer == "1 + 1 = 2\n#### 1,234"


@pytest.mark.parametrize(
    ("record", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", "a", "b"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, [USER], "a", "b"),
        ({"chosen": [USER, BOT], "rejected": [USER, BOT | {"content": "b"}]}, [USER], [BOT], [BOT | {"content": "b"}]),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [BOT, USER, BOT]}, [USER], [BOT], [BOT, USER, BOT]),
        ({"prompt": "q", "chosen": [USER, BOT], "rejected": [USER, USER, BOT]}, [USER], [BOT], [USER, BOT]),
    ],
)
def test_preferences_are_read_for_recipes_that_compare(record: dict, prompt: Any, chosen: Any, rejected: Any) -> None:
    example = parsed(record, answered=False)
    assert (example.prompt, example.turns or example.answer, example.rejected) == (prompt, chosen, rejected)
    with pytest.raises(ValueError, match=r"a preference row .* is no demonstration; name its answer"):
        parsed(record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "missing field 'prompt' or 'messages'; found none; name yours with data.fields"),
        ({"promt": "q", "answer": None}, "missing field 'prompt' or 'messages'; found 'promt', 'answer' (null); name"),
        ({"prompt": "q"}, "missing field 'completion' or 'answer'; found 'prompt'"),
        ({"prompt": "q", "answer": 3}, "field 'answer' must be a string, found int; put it in quotes"),
        ({"prompt": "q", "completion": True}, "field 'completion' must be a string, found true or false; put"),
        ({"prompt": "q", "answer": [BOT]}, "field 'answer' must be a string, found list"),
        ({"prompt": 3, "answer": "a"}, "field 'prompt' must be a string, found int"),
        ({"prompt": "", "answer": "a"}, "the prompt is empty; write one"),
        ({"prompt": "q", "answer": "a", "prefill": 1}, "field 'prefill' must be a string, found int"),
        ({"prompt": "q", "answer": "a", "rendered": "yes"}, "field 'rendered' must be true or false, found text; mend"),
        ({"prompt": "q", "answer": "a", "tools": {}}, "field 'tools' must be list, found object"),
        ({"messages": "hi", "answer": "a"}, "field 'messages' must be a list of {role, content}, found text; write"),
        ({"messages": {"role": "user"}}, "field 'messages' must be a list of {role, content}, found object"),
        ({"messages": []}, "field 'messages' is an empty list; write at least one turn"),
        ({"messages": ["hi"]}, "messages[0] must be an object with role and content, found text"),
        ({"messages": [USER, {"content": "a"}]}, "messages[1] has no role; write one of system"),
        ({"messages": [{"role": "boss", "content": "a"}]}, "messages[0] has the role 'boss', which is none of"),
        ({"messages": [{"role": 3, "content": "a"}]}, "messages[0] has the role 3, which is none of"),
        ({"messages": [{"role": "user"}]}, "messages[0]: content must be a string, found null; write"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]: content must be a string, found null"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0]: content must be a string, found int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0] has a part that is no text"),
        ({"messages": [USER, BOT], "completion": "a"}, "messages end with the assistant's answer, and there is a"),
        ({"messages": [USER, BOT], "prefill": "a"}, "messages end with the assistant's answer, so `prefill` has no"),
        ({"messages": [BOT]}, "messages hold nothing before the assistant's answer; add the turn"),
        ({"prompt": [USER], "completion": [USER]}, "field 'completion' must end with a turn of the assistant"),
        ({"conversations": [{"from": "me", "value": "q"}]}, "conversations[0] has the role 'me', which is none of"),
        ({"instruction": "q"}, "missing field 'completion' or 'answer'; found 'instruction'"),
        ({"instruction": "q", "output": 1}, "must be a string, found int"),
        ({"instruction": ["q"], "output": "a"}, "field 'instruction' must be a string, found list"),
        ({"text": ""}, "the text is empty; write one"),
        ({"chosen": "a", "rejected": "b"}, "missing field 'prompt'; found 'chosen', 'rejected'"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "fields 'chosen' and 'rejected' are the same; remove"),
        ({"prompt": "q", "chosen": "a", "rejected": [BOT]}, "must both be texts or both be lists of turns"),
        ({"chosen": [BOT], "rejected": [BOT]}, "the preference has no prompt; begin `chosen` and `rejected` with"),
        ({"chosen": [USER], "rejected": [USER, BOT]}, "field 'chosen' must end with a turn of the assistant"),
    ],
)
def test_what_is_wrong_is_told_with_its_remedy(record: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parsed(record)


def test_a_prompt_needs_no_answer_and_a_text_is_none() -> None:
    assert parsed({"prompt": "q", "answer": 5.0}, answered=False).record["answer"] == 5.0
    assert parsed({"prompt": "q", "answer": ["1", "one"]}, answered=False).prompt == "q"
    assert parsed({"messages": [USER], "answer": ["1"]}, answered=False).prompt == [USER]
    with pytest.raises(ValueError, match=r"the row is a text without a prompt; give the fields"):
        parsed({"text": "t"}, answered=False)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return family("gemma", tmp_path_factory.mktemp("gemma"))


def write(folder: Path, lines: list[str]) -> str:
    (folder / "x.jsonl").write_text("\n".join(lines))
    return str(folder / "x.jsonl")


def test_alpaca_is_a_chat_where_there_is_a_template_and_a_text_elsewhere(
    chat: Tokenizer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path, [json.dumps({"instruction": "q", "input": "i", "output": "a"})])
    ids = PromptSet(path, chat, 500).prompt_ids(0)
    assert ids == chat.encode_chat([{"role": "user", "content": "q\n\ni"}])
    text = tokenizer.decode(PromptSet(path, tokenizer, 500).prompt_ids(0))
    assert text.startswith("Below is an instruction that describes a task, paired with an input that provides further")
    assert text.endswith("### Instruction:\nq\n\n### Input:\ni\n\n### Response:\n")


@pytest.mark.parametrize(("overlong", "kept"), [("drop", ["12"]), ("truncate", ["12", "3456789"])])
def test_long_demonstrations_are_left_out_or_cut_at_their_end(
    tokenizer: Tokenizer, tmp_path: Path, overlong: str, kept: list[str], capsys: pytest.CaptureFixture
) -> None:
    rows = [
        ("1", "2"),
        ("3", "456789012"),
        ("1234567890", "1"),
    ]  # seven tokens fit; of the last nothing is trained then
    path = write(tmp_path, [json.dumps({"prompt": p, "answer": a}) for p, a in rows])
    data = Demonstrations(path, tokenizer, 6, 0, pack=False, settings=DataConfig(overlong=overlong))
    found = [tokenizer.decode([*e["input_ids"], e["labels"][-1]]) for e in data.examples]
    assert found == kept
    dropped, cut = 3 - len(kept), len(kept) - 1
    assert f"of 3 rows {dropped} were left out and {cut} cut, longer than train.seq_len=6" in capsys.readouterr().err


def test_long_prompts_keep_their_end(chat: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path, ['{"prompt": "1"}', '{"prompt": "1234567890"}'])
    cut = PromptSet(path, chat, 5, DataConfig(overlong="truncate"))
    assert [chat.decode(ids) for ids in cut.ids] == ["1", "7890"]
    assert all(ids[: len(chat.prefix_ids)] == chat.prefix_ids for ids in cut.ids) and len(cut.ids[1]) == 5
    dropped = PromptSet(path, chat, 5, DataConfig(overlong="drop"))
    assert [chat.decode(ids) for ids in dropped.ids] == ["1"] and dropped.places == [f"{path}:1"]
    assert dropped.examples == [{"prompt": "1"}] and "1 were left out and 0 cut" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"every row is longer than the 1 there is room for"):
        PromptSet(path, chat, 1, DataConfig(overlong="drop"))


def test_what_does_not_fit_is_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path, ['{"prompt": "1234"}'])
    with pytest.raises(ValueError, match=r"x.jsonl:1: the prompt has 4 tokens, more than the 3 .* \(room of X\); make"):
        PromptSet(path, tokenizer, 3, room="room of X")
    with pytest.raises(ValueError, match=r"x.jsonl:1: no token of this row follows another"):
        Demonstrations(write(tmp_path, ['{"text": "<eos>"}']), tokenizer, 8, 0, settings=DataConfig(rendered=True))


TEXTS = st.one_of(st.text(max_size=8), st.sampled_from(["hi", "<eos>", "<end_of_turn>", "\ud800", "#### 5", ""]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(allow_nan=False), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
TURNS = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "tool", "boss"]), "content": TEXTS},
            optional={"weight": st.integers(0, 1), "tool_calls": VALUES, "name": VALUES},
        ),
        st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "x"]), "value": TEXTS}),
        st.fixed_dictionaries({}, optional={"role": VALUES, "content": VALUES}),
    ),
    max_size=4,
)
NAMES = ["prompt", "completion", "answer", "messages", "conversations", "instruction", "input", "output", "question"]
NAMES += ["text", "chosen", "rejected", "prefill", "rendered", "tools", "chat_template_kwargs", "system"]
ROWS = st.dictionaries(st.sampled_from(NAMES), st.one_of(TEXTS, TURNS, VALUES), max_size=5)
LINES = st.lists(st.one_of(ROWS.map(json.dumps), ROWS.map(json.dumps), st.text(max_size=20)), min_size=1, max_size=6)
KEYS = st.fixed_dictionaries(
    {},
    optional={
        "rendered": st.booleans(),
        "trained_turns": st.sampled_from(["last", "all"]),
        "overlong": st.sampled_from(["error", "drop", "truncate"]),
        "fields": st.dictionaries(st.sampled_from(NAMES), st.sampled_from(NAMES), max_size=2),
    },
)


def check_file(tokenizer: Tokenizer, path: Path, lines: list[str], keys: dict) -> None:
    """Reads a file both ways: rows, or a ValueError whose every line names the file, and most a line of it."""
    path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    data = DataConfig(**keys)
    demonstrations = partial(Demonstrations, str(path), tokenizer, 48, 0, settings=data)
    for read in (demonstrations, partial(PromptSet, str(path), tokenizer, 24, data)):
        try:
            assert len(read()) > 0
        except ValueError as error:
            *told, last = str(error).splitlines()
            assert all(re.match(re.escape(str(path)) + r":\d+: .+", line) for line in told), error
            assert last.startswith(str(path)) and len(told) <= 20, error


@given(lines=LINES, keys=KEYS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_drawn_rows_are_read_or_told_with_file_and_line(
    chat: Tokenizer, tokenizer: Tokenizer, tmp_path: Path, lines: list[str], keys: dict
) -> None:
    check_file(chat, tmp_path / "x.jsonl", lines, keys)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(lines=LINES, keys=KEYS)
@settings(max_examples=20_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_many_drawn_rows_are_read_or_told_with_file_and_line(
    chat: Tokenizer, tmp_path: Path, lines: list[str], keys: dict
) -> None:
    check_file(chat, tmp_path / "x.jsonl", lines, keys)
