"""Recognises the shape of a row by its fields, and gives every shape one form: a prompt and what answers it.

docs/data.md lists the shapes. The readers of files are in `llmtrain.data.files`, tokens in `llmtrain.data.encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmtrain.config.schema import DataConfig
from llmtrain.data.chat import Message
from llmtrain.data.faults import Faults
from llmtrain.data.files import read_rows
from llmtrain.data.jsonl import kind

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{given}\n\n### Response:\n"
)  # the prompt of Stanford Alpaca, for tokenizers without a chat template

Record = dict[str, Any]
Text = str | list[Message]


@dataclass(frozen=True)
class Example:
    """Holds one row, whatever its shape.

    Example: {"prompt": "2+2=", "answer": "4"} -> Example(record=..., prompt="2+2=", answer="4")
    {"messages": [user, assistant]} -> Example(record=..., prompt=[user], turns=[assistant])
    """

    record: Record  # the row, its fields named as here: what a reward reads
    prompt: Text | None = None  # None: the row is a text without a prompt
    answer: Any = None  # what answers the prompt: a text in a demonstration; None = nothing, or `turns`
    turns: list[Message] = field(default_factory=list)  # what answers a prompt of messages, the assistant's turn last
    rejected: Text | None = None  # of a preference row, whose `answer` or `turns` were chosen
    prefill: str = ""  # begins the answer, and belongs to the prompt
    rendered: bool = False  # the texts are rendered: what spells a special token is one
    tools: list[Record] | None = None  # for the chat template
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # for the chat template, beside the tokenizer's
    plain: str | None = None  # the prompt where the tokenizer has no chat template (Alpaca)


def read_examples(path: str, settings: DataConfig, faults: Faults, answered: bool) -> list[tuple[str, Example]]:
    """Returns (`file:line`, example) of every row; rows that cannot be used go to `faults`.

    `answered`: the rows are demonstrations, which need an answer in words; else a prompt is enough.
    """
    examples = []
    for where, record in read_rows(path, faults):
        try:
            examples.append((where, parse_row(record, settings, answered)))
        except ValueError as error:
            faults.add(where, str(error))
    return examples


def parse_row(record: Record, settings: DataConfig, answered: bool) -> Example:
    """Returns the example in a row. Raises ValueError, without a place, when the row has no known shape or a field of
    the wrong kind."""
    record = mapped(record, settings.fields)
    parse = shape_of(record, settings.fields)
    extras = {
        "prefill": text_field(record, "prefill") if "prefill" in record else "",
        "rendered": typed(record, "rendered", bool, settings.rendered),
        "tools": typed(record, "tools", list, None),
        "template_kwargs": typed(record, "chat_template_kwargs", dict, {}),
    }
    example = replace(parse(record), **extras)
    if example.prompt == "" and not example.prefill:
        raise ValueError("the prompt is empty; write one or remove the row")
    if example.rendered and isinstance(example.prompt, list):
        raise ValueError("`rendered` is for a prompt that is a text, and this row has messages; remove one of them")
    if not answered and example.prompt is None:
        raise ValueError("the row is a text without a prompt; give the fields `prompt` or `messages`")
    return with_answer(example) if answered else example


def with_answer(example: Example) -> Example:
    """Returns a demonstration. Raises ValueError when it has no answer in words, or two of which one is rejected."""
    if example.rejected is not None:
        raise ValueError(
            "a preference row (chosen, rejected) is no demonstration; name its answer, as data.fields={completion: "
            "chosen}"
        )
    if example.turns:
        return example
    if example.answer is None:
        raise ValueError(f"missing field 'completion' or 'answer'; found {found_fields(example.record)}")
    if not isinstance(example.answer, str):
        field_name = "completion" if "completion" in example.record else "answer"
        raise ValueError(f"field {field_name!r} must be a string, found {kind(example.answer)}; put it in quotes")
    return example


def mapped(record: Record, fields: Mapping[str, str]) -> Record:
    """Returns the record with its fields named as here, by `data.fields`. Raises ValueError when one is missing."""
    missing = [theirs for theirs in fields.values() if theirs not in record]
    if missing:
        raise ValueError(f"missing field {missing[0]!r}, which data.fields names; found {found_fields(record)}")
    kept = {name: value for name, value in record.items() if name not in fields.values()}
    return kept | {ours: record[theirs] for ours, theirs in fields.items()}


def shape_of(record: Record, fields: Mapping[str, str]) -> Callable[[Record], Example]:
    """Returns the reader of the row's shape; fields that data.fields names count first, else all do."""
    for row in ({ours: record[ours] for ours in fields}, record) if fields else (record,):
        for needed, parse in SHAPES:
            if all(row.get(name) is not None for name in needed):
                return parse
    raise ValueError(f"missing field 'prompt' or 'messages'; found {found_fields(record)}; name yours with data.fields")


def found_fields(record: Record) -> str:
    """Returns the names of a row's fields, for a message."""
    names = [repr(name) + (" (null)" if value is None else "") for name, value in list(record.items())[:12]]
    return ", ".join(names) + (" and more" if len(record) > 12 else "") if names else "none"


def text_field(record: Record, name: str) -> str:
    """Returns a field that must be there and be a text."""
    if name not in record:
        raise ValueError(f"missing field {name!r}; found {found_fields(record)}")
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} must be a string, found {kind(value)}; write it in quotes")
    return value


def typed(record: Record, name: str, wanted: type, default: Any) -> Any:
    """Returns a field of one type, or the default where it is missing or null."""
    value = record.get(name)
    if value is None:
        return default
    if not isinstance(value, wanted):
        raise ValueError(f"field {name!r} must be {kind(wanted())}, found {kind(value)}; mend or remove it")
    return value


def conversation(value: Any, name: str) -> list[Message]:
    """Returns the turns of a conversation, with `role` and `content`. Raises ValueError when one is none."""
    if not isinstance(value, list):
        raise ValueError(f"field {name!r} must be a list of {{role, content}}, found {kind(value)}; write a list")
    if not value:
        raise ValueError(f"field {name!r} is an empty list; write at least one turn")
    return [turn(each, f"{name}[{i}]") for i, each in enumerate(value)]


def turn(value: Any, where: str) -> Message:
    """Returns one turn, without members that are null. ShareGPT's `from` and `value` are read as role and content."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object with role and content, found {kind(value)}; write {{...}}")
    role = value.get("role", value.get("from"))
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role is None:
        raise ValueError(f"{where} has no role; write one of {', '.join(ROLES)}")
    if role not in ROLES:
        raise ValueError(f"{where} has the role {role!r}, which is none of {', '.join(ROLES)}; rename it")
    content = content_of(value.get("content", value.get("value")), role, value, where)
    more = {k: v for k, v in value.items() if k not in ("role", "from", "content", "value") and v is not None}
    return {"role": role, "content": content, **more}


def content_of(content: Any, role: str, message: Record, where: str) -> str:
    """Returns the text of a turn, its parts joined. A turn of the assistant that calls tools may have none."""
    if content is None and role == "assistant" and message.get("tool_calls"):
        return ""
    if isinstance(content, list) and content:
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise ValueError(f"{where} has a part that is no text; only parts of type text can be read, remove it")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{where}: content must be a string, found {kind(content)}; write a text or remove the turn")
    return content


def answered_by(record: Record, prompt: Text) -> Example:
    """Returns the example of a prompt and the field that answers it: `completion`, else `answer`."""
    completion = record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return Example(record, prompt, turns=ending_in_answer(conversation(completion, "completion"), "completion"))
    return Example(record, prompt, record.get("answer") if completion is None else completion)


def ending_in_answer(turns: list[Message], name: str) -> list[Message]:
    """Returns the turns. Raises ValueError when the last is not the assistant's."""
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"field {name!r} must end with a turn of the assistant; add it")
    return turns


def from_messages(record: Record, name: str = "messages") -> Example:
    """Returns the example of a conversation, whose last turn is the answer where the assistant has it."""
    turns = conversation(record[name], name)
    if isinstance(record.get("system"), str) and record["system"] and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": record["system"]})
    if turns[-1]["role"] != "assistant":
        return answered_by(record, turns)
    if record.get("completion") is not None:
        raise ValueError(f"{name} end with the assistant's answer, and there is a `completion` too; remove one")
    if "prefill" in record:
        raise ValueError(f"{name} end with the assistant's answer, so `prefill` has no place; remove it")
    if len(turns) == 1:
        raise ValueError(f"{name} hold nothing before the assistant's answer; add the turn that it answers")
    return Example(record, turns[:-1], turns=turns[-1:])


def from_sharegpt(record: Record) -> Example:
    """Returns the example of `conversations`, whose turns have `from` and `value`."""
    return from_messages(record, "conversations")


def from_prompt(record: Record) -> Example:
    """Returns the example of `prompt`, a text or a conversation."""
    if isinstance(record.get("prompt"), list):
        return answered_by(record, conversation(record["prompt"], "prompt"))
    return answered_by(record, text_field(record, "prompt"))


def from_alpaca(record: Record) -> Example:
    """Returns the example of `instruction`, `input` and `output`."""
    instruction, given = text_field(record, "instruction"), typed(record, "input", str, "")
    asked = f"{instruction}\n\n{given}" if given else instruction
    more = ", paired with an input that provides further context" if given else ""
    plain = ALPACA.format(more=more, instruction=instruction, given=f"\n\n### Input:\n{given}" if given else "")
    answer = record["output"] if record.get("output") is not None else record.get("answer")
    turns = [{"role": "user", "content": asked}]
    if isinstance(record.get("system"), str) and record["system"]:
        turns.insert(0, {"role": "system", "content": record["system"]})
    return Example(record, turns, answer, plain=plain)


def from_question(record: Record) -> Example:
    """Returns the example of `question` and `answer`. GSM8K's answers end in `#### 72`: the whole is trained, and what
    stands behind the mark is the answer that a reward compares with."""
    answer = record.get("answer")
    if isinstance(answer, str) and "####" in answer:
        record = {**record, "answer": answer.rpartition("####")[2].strip()}
    return Example(record, text_field(record, "question"), answer)


def from_text(record: Record) -> Example:
    """Returns the example of `text`, which is trained as a whole."""
    if not text_field(record, "text"):
        raise ValueError("the text is empty; write one or remove the row")
    return Example(record, None, record["text"])


def from_preference(record: Record) -> Example:
    """Returns the example of `chosen` and `rejected`: texts behind a `prompt`, or conversations."""
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = preferred_turns(record.get("prompt"), chosen, rejected)
        example = Example(record, prompt, turns=chosen, rejected=rejected)
    elif isinstance(chosen, list) or isinstance(rejected, list):
        raise ValueError("fields 'chosen' and 'rejected' must both be texts or both be lists of turns; mend one")
    else:
        chosen, rejected = text_field(record, "chosen"), text_field(record, "rejected")
        example = replace(from_prompt({**record, "completion": chosen}), record=record, rejected=rejected)
    if chosen == rejected:
        raise ValueError("fields 'chosen' and 'rejected' are the same; remove the row")
    return example


def preferred_turns(prompt: Any, chosen: list, rejected: list) -> tuple[list[Message], list[Message], list[Message]]:
    """Returns (prompt, chosen, rejected) of a preference in turns: what both begin with belongs to the prompt."""
    one = ending_in_answer(conversation(chosen, "chosen"), "chosen")
    other = ending_in_answer(conversation(rejected, "rejected"), "rejected")
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    before = conversation(before, "prompt") if before else []
    if one[: len(before)] == before == other[: len(before)]:
        before = []  # both repeat the prompt
    shared = 0
    while shared < min(len(one), len(other)) - 1 and one[shared] == other[shared]:
        shared += 1
    if not before + one[:shared]:
        raise ValueError("the preference has no prompt; begin `chosen` and `rejected` with the same turns, or add one")
    return before + one[:shared], one[shared:], other[shared:]


SHAPES: tuple[tuple[tuple[str, ...], Callable[[Record], Example]], ...] = (
    (("chosen", "rejected"), from_preference),
    (("messages",), from_messages),
    (("conversations",), from_sharegpt),
    (("prompt",), from_prompt),
    (("instruction",), from_alpaca),
    (("question",), from_question),
    (("text",), from_text),
)
"""Each shape by the fields that it is known by; the first that fits is it."""
