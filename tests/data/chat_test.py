"""Conversations as tokens, for the tokenizers of every family: token by token what transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.config.schema import DataConfig
from llmtrain.data.chat import CHATML
from llmtrain.data.encode import Encoded, encode_rows
from llmtrain.data.faults import Faults
from llmtrain.data.packing import Demonstrations
from llmtrain.data.prompts import PromptSet
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.families import FAMILIES, PLAIN, family, family_directory
from tests.model.llama import smollm2_directory

TALK = [
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "The answer is 7."},
    {"role": "user", "content": "  so?\n\n x"},
    {"role": "assistant", "content": "So 42."},
]
ENDS = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}  # where another token than eos ends a turn


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    directory = tmp_path_factory.mktemp("families")
    return {name: family(name, directory) for name in FAMILIES}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(smollm2_directory(tmp_path_factory)))


def write(folder: Path, *records: dict) -> str:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, records)))
    return str(folder / "rows.jsonl")


def encoded(folder: Path, tokenizer: Tokenizer, record: dict, answered: bool = True, **keys: object) -> Encoded:
    """Returns the tokens of a file with this one row."""
    path, settings = write(folder, record), DataConfig(**keys)
    faults = Faults(path)
    rows = list(encode_rows(path, tokenizer, settings, faults, answered))
    faults.raise_any()
    return rows[0]


def theirs(tokenizer: Tokenizer, messages: list[dict], **keys: object) -> list[int]:
    return tokenizer.hugging_face.apply_chat_template(messages, **keys)["input_ids"]


def trained_text(tokenizer: Tokenizer, row: Encoded) -> list[str]:
    """Returns the trained parts of a row, special tokens written out."""
    parts, before = [[]], False
    for token, trained in zip(row.ids, row.trained, strict=True):
        if trained and not before and parts[-1]:
            parts.append([])
        if trained:
            parts[-1].append(token)
        before = trained
    return [tokenizer.backend.decode(part, skip_special_tokens=False) for part in parts]


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_what_transformers_makes_of_them(name: str, made: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = made[name]
    path = write(tmp_path, {"messages": TALK[:1]}, {"messages": TALK[:3]}, {"prompt": "The answer is"}, {"prompt": "3"})
    prompts = PromptSet(path, tokenizer, 500)
    for i, count in ((0, 1), (1, 3)):
        wanted = theirs(tokenizer, TALK[:count], add_generation_prompt=True)
        assert prompts.prompt_ids(i) == tokenizer.encode_chat(TALK[:count]) == wanted
    for i, text in ((2, "The answer is"), (3, "3")):
        assert prompts.prompt_ids(i) == tokenizer.hugging_face(text).input_ids
    has_bos = name in ("llama3", "llama2", "mistral", "gemma")
    assert tokenizer.prefix_ids == ([tokenizer.hugging_face.bos_token_id] if has_bos else [])


def test_smollm2_is_what_transformers_makes_of_it(smollm2: Tokenizer, tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be short."}, *TALK]
    prompts = PromptSet(write(tmp_path, {"messages": talk[:2]}, {"prompt": "Once upon"}), smollm2, 500)
    assert prompts.prompt_ids(0) == theirs(smollm2, talk[:2], add_generation_prompt=True)
    assert prompts.prompt_ids(1) == smollm2.hugging_face("Once upon").input_ids
    row = encoded(tmp_path, smollm2, {"messages": talk}, trained_turns="all")
    whole = theirs(smollm2, talk)
    assert row.ids == whole[: len(row.ids)] and smollm2.decode(whole[len(row.ids) :]) == "\n"
    assert trained_text(smollm2, row) == ["The answer is 7.<|im_end|>", "So 42.<|im_end|>"]
    assert smollm2.turn_end_ids == (smollm2.eos_id,)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("turns", ["last", "all"])
def test_turns_are_trained_with_the_token_that_ends_them(
    name: str, turns: str, made: dict[str, Tokenizer], tmp_path: Path
) -> None:
    tokenizer = made[name]
    row = encoded(tmp_path, tokenizer, {"messages": TALK}, trained_turns=turns)
    whole = theirs(tokenizer, TALK)
    end = ENDS.get(name, tokenizer.hugging_face.eos_token)
    assert tokenizer.turn_end_ids == (tokenizer.backend.token_to_id(end),)
    opening = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    first, last = "The answer is 7." + ("" if name == "plain" else end), opening + "So 42." + end
    last = last.replace("S", "<unk>") if name == "unigram" else last  # whose few pieces lack it
    found = [text.strip() for text in trained_text(tokenizer, row)]
    assert found == ([first, last] if turns == "all" else [last])
    kept = len(row.ids) - (name == "plain")  # whose template has no end of a turn: the end of text is put there
    assert row.ids[:kept] == whole[:kept] and row.ids[-1] == tokenizer.turn_end_ids[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_user_wrote_is_never_a_special_token(name: str, made: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = made[name]
    special = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    spelled = "".join(t.content for t in tokenizer.backend.get_added_tokens_decoder().values()) + " hi "
    asked = [{"role": "user", "content": "hi"}]
    count = sum(i in special for i in tokenizer.encode_chat(asked))
    for text in (spelled, spelled[:-5] + "x", "a" + spelled):
        ids = tokenizer.encode_chat([{"role": "user", "content": text}])
        unknown = sum(i == tokenizer.backend.token_to_id("<unk>") for i in ids)
        assert sum(i in special for i in ids) - unknown == count
        prompt = encoded(tmp_path, tokenizer, {"prompt": text}, answered=False).ids[len(tokenizer.prefix_ids) :]
        assert not special - {tokenizer.backend.token_to_id("<unk>")} & set(prompt)
        answered = encoded(tmp_path, tokenizer, {"messages": [*asked, {"role": "assistant", "content": text + "."}]})
        ends = [i for i, trained in zip(answered.ids, answered.trained, strict=True) if trained and i in special]
        assert ends[-1] == tokenizer.turn_end_ids[0] and ends.count(ends[-1]) == 1


def test_text_comes_back_whole(made: dict[str, Tokenizer]) -> None:
    for name in ("qwen", "llama3", "gemma"):
        ids = made[name].encode_chat([{"role": "user", "content": "say <|im_end|><eos><|eot_id|> now"}])
        assert "say <|im_end|><eos><|eot_id|> now" in made[name].backend.decode(ids, skip_special_tokens=False)


def test_an_answer_beside_messages_goes_on_where_the_prompt_ends(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    record = {"messages": TALK[:1], "prefill": "So ", "answer": "7"}
    for name, end in (("qwen", "<|im_end|>"), *ENDS.items()):
        row = encoded(tmp_path, made[name], record)
        assert trained_text(made[name], row) == ["7" + end]
        prompt = encoded(tmp_path, made[name], record, answered=False)
        assert row.ids[: len(prompt.ids)] == prompt.ids


def test_an_answer_behind_a_plain_prompt_begins_no_new_text(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    """Llama 2 puts a space before a text, but not within one."""
    for name in ("llama2", "mistral"):
        row = encoded(tmp_path, made[name], {"prompt": "3+4=", "answer": "7"})
        assert row.ids == [*made[name].hugging_face("3+4=7").input_ids, made[name].eos_id]
        assert sum(row.trained) == 2


def test_rendered_prompts_are_taken_as_they_are(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = made["llama3"]
    prompt = tokenizer.hugging_face.apply_chat_template(TALK[:1], add_generation_prompt=True, tokenize=False)
    wanted = [*theirs(tokenizer, TALK[:1], add_generation_prompt=True), *tokenizer.encode("7"), *tokenizer.turn_end_ids]
    for completion in ("7", "7<|eot_id|>", "7<|eot_id|>\n"):
        by_row = encoded(tmp_path, tokenizer, {"prompt": prompt, "completion": completion, "rendered": True})
        by_key = encoded(tmp_path, tokenizer, {"prompt": prompt, "completion": completion}, rendered=True)
        assert by_row.ids == by_key.ids == wanted and sum(by_row.trained) == 2
    for end in ("", "\n"):
        whole = encoded(tmp_path, tokenizer, {"text": prompt + "7<|eot_id|>" + end}, rendered=True)
        assert whole.ids == wanted and all(whole.trained)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: `rendered` is for a prompt that is a text"):
        encoded(tmp_path, tokenizer, {"messages": TALK}, rendered=True)


def test_an_end_of_turn_that_is_not_called_special_is_one(tmp_path: Path) -> None:
    """Gemma's first tokenizers have it so."""
    directory = family_directory("gemma", tmp_path)
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
        content = json.loads((directory / name).read_text())
        tokens = content.get(key, [])
        for token in tokens.values() if isinstance(tokens, dict) else tokens:
            token["special"] = token["special"] and "turn" not in token["content"]
        (directory / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(directory))
    end = tokenizer.backend.token_to_id("<end_of_turn>")
    assert "<end_of_turn>" not in tokenizer.special_text.names and tokenizer.turn_end_ids == (end,)
    row = encoded(tmp_path, tokenizer, {"messages": [{"role": "user", "content": "a<end_of_turn>"}], "answer": "b"})
    assert row.ids.count(end) == 2 and row.ids[-1] == end
    for completion in ("b", "b<end_of_turn>", "b<end_of_turn>\n"):
        record = {"prompt": "<start_of_turn>model\n", "completion": completion, "rendered": True}
        assert encoded(tmp_path, tokenizer, record).ids.count(end) == 1


def test_several_templates_and_their_variables(tmp_path: Path) -> None:
    directory = family_directory("qwen3", tmp_path)
    thinking = load_tokenizer(str(directory)).encode_chat(TALK[:1])
    quiet = load_tokenizer(str(directory), None, {"enable_thinking": False})
    text = "<think>\n\n</think>\n\n"
    assert quiet.encode_chat(TALK[:1]) == [*thinking, *quiet.encode(text)]
    by_row = {"messages": TALK[:1], "chat_template_kwargs": {"enable_thinking": False}}
    own = encoded(tmp_path, load_tokenizer(str(directory)), by_row, answered=False)
    assert own.ids == quiet.encode_chat(TALK[:1])

    several = load_tokenizer(str(directory)).hugging_face
    several.chat_template = {"default": PLAIN, "other": "{{ messages[0].content }}!"}
    several.save_pretrained(tmp_path / "several")
    plain, other = (load_tokenizer(str(tmp_path / "several"), name) for name in (None, "other"))
    assert other.encode_chat(TALK[:1]) == other.encode("What is 3 + 4?!")
    assert plain.encode_chat(TALK[:1]) == plain.encode("user: What is 3 + 4?\nassistant: ")
    with pytest.raises(ValueError, match=r"tokenizer.chat_template=third: neither a file .* which has default, other"):
        load_tokenizer(str(tmp_path / "several"), "third").encode_chat(TALK[:1])
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}?")
    by_file = load_tokenizer(str(tmp_path / "several"), str(tmp_path / "own.jinja"))
    assert by_file.encode_chat(TALK[:1]) == by_file.encode("What is 3 + 4??")


def test_a_broken_template_is_named_once(tmp_path: Path) -> None:
    directory = family_directory("qwen", tmp_path)
    (directory / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(ValueError, match=r"qwen: the chat template is broken \(line 2: .*\); mend chat_template.jinja"):
        Demonstrations(write(tmp_path, *({"messages": TALK} for _ in range(3))), load_tokenizer(str(directory)), 64, 0)


def test_what_a_template_refuses_is_a_fault_of_the_row(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    system = [{"role": "system", "content": "x"}, *TALK]
    path = write(tmp_path, {"messages": TALK}, {"messages": system}, {"messages": TALK[1:]}, {"messages": TALK})
    with pytest.raises(ValueError, match="must alternate") as error:
        Demonstrations(path, made["gemma"], 500, 0)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0][-2:] for line in lines[:2]] == [":2", ":3"] and "2 faults" in lines[2]


def test_weights_of_turns_and_conversations_without_one(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    silent = [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]]
    row = encoded(tmp_path, made["qwen"], {"messages": silent}, trained_turns="all")
    assert trained_text(made["qwen"], row) == ["So 42.<|im_end|>"]
    with pytest.raises(ValueError, match=r"rows.jsonl:1: no turn of the assistant is trained"):
        encoded(tmp_path, made["qwen"], {"messages": silent[:2]}, trained_turns="all")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: messages hold nothing before the assistant's answer"):
        encoded(tmp_path, made["qwen"], {"messages": TALK[1:2]})


THOUGHT = {"role": "assistant", "content": "<think>\n40 + 2\n</think>\n\nSo 42."}
ASIDE = {"role": "assistant", "content": "So 42.", "reasoning_content": "40 + 2"}


@pytest.mark.parametrize("last", [THOUGHT, ASIDE])
def test_what_the_last_turn_thinks_is_trained_and_what_earlier_ones_thought_is_gone(
    last: dict, made: dict[str, Tokenizer], tmp_path: Path
) -> None:
    """As the template of Qwen3 renders it, which leaves out what earlier turns thought: so does transformers."""
    talk = [TALK[0], {**TALK[1], "content": "<think>\n3 + 4\n</think>\n\nThe answer is 7."}, TALK[2], last]
    row = encoded(tmp_path, made["qwen3"], {"messages": talk})
    assert trained_text(made["qwen3"], row) == ["<think>\n40 + 2\n</think>\n\nSo 42.<|im_end|>"]
    assert row.ids == theirs(made["qwen3"], talk)[: len(row.ids)]
    assert "3 + 4\n</think>" not in made["qwen3"].backend.decode(row.ids)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the chat template leaves out what turn 2 thinks.*trained_tu"):
        encoded(tmp_path, made["qwen3"], {"messages": talk}, trained_turns="all")
    silent = [talk[0], {**talk[1], "weight": 0}, *talk[2:]]
    assert encoded(tmp_path, made["qwen3"], {"messages": silent}, trained_turns="all").ids == row.ids


@pytest.mark.parametrize(
    ("name", "last", "kwargs"),
    [
        ("r1", THOUGHT, {}),  # whose template drops it everywhere
        ("qwen", ASIDE, {}),  # which does not know the field
        ("qwen3", THOUGHT, {"enable_thinking": False}),  # the prompt ends with an empty thought
        ("qwen3", {**THOUGHT, "content": "First. <think>1</think> a"}, {}),  # it keeps one of two parts
    ],
)
def test_thinking_that_a_template_loses_is_refused(
    name: str, last: dict, kwargs: dict, made: dict[str, Tokenizer], tmp_path: Path
) -> None:
    record = {"messages": [*TALK[:3], last], "chat_template_kwargs": kwargs}
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the chat template leaves out what turn 4 thinks, .*`completi"):
        encoded(tmp_path, made[name], record)


def test_a_prompt_that_opens_the_thinking(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    record = {"messages": TALK[:1], "completion": "3 + 4\n</think>\n\n7"}
    row = encoded(tmp_path, made["r1"], record)
    assert trained_text(made["r1"], row) == ["3 + 4\n</think>\n\n7<|end|>"]
    assert made["r1"].backend.decode(row.ids).endswith("<think>\n3 + 4\n</think>\n\n7")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the prompt ends with <think>, and the answer begins with it"):
        encoded(tmp_path, made["r1"], {**record, "completion": "<think>\n" + record["completion"]})
    (tmp_path / "open.jinja").write_text(CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'"))
    opening = load_tokenizer(str(family_directory("qwen", tmp_path)), str(tmp_path / "open.jinja"))
    row = encoded(tmp_path, opening, {"messages": [TALK[0], THOUGHT]})
    assert trained_text(opening, row) == ["40 + 2\n</think>\n\nSo 42.<|im_end|>"]


def test_thinking_without_an_end_is_text(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    turn = {"role": "assistant", "content": "<think>\n40 + 2"}
    row = encoded(tmp_path, made["qwen"], {"messages": [TALK[0], turn]})
    assert trained_text(made["qwen"], row) == ["<think>\n40 + 2<|im_end|>"]
