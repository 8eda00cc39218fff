"""Preference rows as pairs of samples: what is shared, what is trained, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.config.schema import DataConfig
from llmtrain.data.groups import group_length
from llmtrain.data.packing import Demonstrations
from llmtrain.data.pairs import Pairs, at_last_token, fill
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.types import IGNORE, Group, Sample
from tests.data.families import FAMILIES, family
from tests.group_rows import group_batch

ASK, MORE = {"role": "user", "content": "The answer?"}, {"role": "user", "content": "and 7?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("The answer is 42.", "The 7."))


def write(tmp_path: Path, *records: dict) -> str:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(tmp_path / "pairs.jsonl")


def read(
    tmp_path: Path, tokenizer: Tokenizer, *records: dict, seq_len: int = 500, at_end: bool = False, **keys: object
):
    return Pairs(write(tmp_path, *records), tokenizer, seq_len, 0, at_end, DataConfig(**keys))


def demonstration(tmp_path: Path, tokenizer: Tokenizer, record: dict, **keys: object) -> tuple[list[int], list[int]]:
    """The inputs with the last label behind them, and the labels, as SFT trains the record."""
    (tmp_path / "one.jsonl").write_text(json.dumps(record))
    example = Demonstrations(str(tmp_path / "one.jsonl"), tokenizer, 500, 0, False, DataConfig(**keys)).examples[0]
    return [*example["input_ids"], example["labels"][-1]], example["labels"]


def labels_of(sample: Sample) -> list[int]:
    """What a sample trains, as the labels of prompt and sample in one row."""
    own = [token if trained else IGNORE for token, trained in zip(sample.ids, sample.trained, strict=True)]
    return [IGNORE] * (len(sample.prompt_ids) - 1) + own


@pytest.mark.parametrize("name", FAMILIES)
def test_each_answer_is_trained_as_a_demonstration_of_it(name: str, tmp_path: Path) -> None:
    """As texts, behind a prompt of messages, as conversations: tokens and labels are those of SFT."""
    tokenizer = family(name, tmp_path)
    rows = [
        ({"prompt": "The answer"}, {"completion": " is 42."}, {"completion": " is 7."}),
        ({"prompt": [ASK]}, {"completion": "The answer is 42."}, {"completion": "The 7."}),
        ({}, {"messages": [ASK, GOOD]}, {"messages": [ASK, BAD]}),
        ({}, {"messages": [ASK, BAD, MORE, GOOD]}, {"messages": [ASK, BAD, MORE, BAD]}),
    ]
    records = [{**p, "chosen": next(iter(a.values())), "rejected": next(iter(b.values()))} for p, a, b in rows]
    pairs = read(tmp_path, tokenizer, *records)
    for pair, (prompt, *answers) in zip(pairs.pairs, rows, strict=True):
        assert pair[0].prompt_ids == pair[1].prompt_ids
        for sample, answer in zip(pair, answers, strict=True):
            ids, labels = demonstration(tmp_path, tokenizer, {**prompt, **answer})
            assert [*sample.prompt_ids, *sample.ids] == ids and labels_of(sample) == labels
            assert set(sample.logprobs) == {0.0} and sample.finished


def test_the_prompt_ends_before_what_is_trained(tmp_path: Path) -> None:
    """A first token that both answers share is trained in both."""
    pair = read(
        tmp_path, family("qwen", tmp_path), {"prompt": "The", "chosen": " answer 3", "rejected": " answer 4"}
    ).pairs[0]
    assert pair[0].ids[0] == pair[1].ids[0] and pair[0].trained[0] and pair[1].trained[0]
    assert pair[0].ids != pair[1].ids


def test_tokens_that_a_template_joins_to_the_answer_belong_to_the_samples(tokenizer: Tokenizer) -> None:
    from llmtrain.data.pairs import pair_of

    chosen, rejected = pair_of(([5, 6, 7, 8], [False] * 3 + [True]), ([5, 6, 9, 7, 8], [False] * 4 + [True]))
    assert chosen.prompt_ids == rejected.prompt_ids == [5, 6]
    assert (chosen.ids, chosen.trained) == ([7, 8], [False, True])
    assert (rejected.ids, rejected.trained) == ([9, 7, 8], [False, False, True])


def test_turns_of_the_prompt_are_not_trained(tmp_path: Path) -> None:
    """With trained_turns=all, every turn of the assistant behind what the two conversations share is."""
    tokenizer = family("qwen", tmp_path)
    row = {"chosen": [ASK, GOOD, MORE, GOOD, MORE, GOOD], "rejected": [ASK, GOOD, MORE, BAD]}
    for turns, count in (("last", 1), ("all", 2)):
        chosen, rejected = read(tmp_path, tokenizer, row, trained_turns=turns).pairs[0]
        text = [tokenizer.decode([t for t, on in zip(s.ids, s.trained, strict=True) if on]) for s in (chosen, rejected)]
        assert [text[0].count("42"), text[1].count("7.")] == [count, 1]
        assert tokenizer.decode(chosen.prompt_ids).count("42") == 1


def test_an_empty_answer_is_the_token_that_ends_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chosen, rejected = read(tmp_path, tokenizer, {"prompt": "1 + 1 =", "chosen": "2", "rejected": ""}).pairs[0]
    assert rejected.ids == [tokenizer.eos_id] and rejected.trained == [True] and len(chosen.ids) == 2


def test_all_faults_of_a_file_at_once(tmp_path: Path) -> None:
    tokenizer = family("llama3", tmp_path)  # whose template strips what the assistant says
    stripped = {"role": "assistant", "content": " The 7. "}
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    faults = [
        ({"prompt": "q", "answer": "a"}, "the row is no preference; found 'prompt', 'answer'; give `prompt`, `chosen`"),
        ({**row, "rejected": "b"}, "fields 'chosen' and 'rejected' are the same; remove the row"),
        (
            {"prompt": [ASK], "chosen": [BAD], "rejected": [stripped]},
            "`chosen` and `rejected` are the same tokens; remove",
        ),
        (
            {**row, "label": 1.5},
            "field 'label' must be a number from 0 to 1, the probability that `chosen` is the better",
        ),
        ({**row, "label": True}, "field 'label' must be .*, found true or false; mend or remove it"),
        (
            {**row, "margin": "2"},
            "field 'margin' must be a finite number, by how much .*, found text; mend or remove it",
        ),
        (
            {**row, "prompt": "The answer " * 40},
            r"the pair \(its prompt once, and both answers\) has \d+ tokens, more than",
        ),
        ({"prompt": [ASK], "chosen": [GOOD | {"weight": 0}], "rejected": [BAD]}, "no turn of the assistant is trained"),
        ({**row, "prompt": ""}, "the prompt is empty; write one"),
    ]
    with pytest.raises(ValueError) as error:
        read(tmp_path, tokenizer, *(record for record, _ in faults), seq_len=60)
    lines = str(error.value)
    for number, (_, words) in enumerate(faults, 1):
        with pytest.raises(ValueError, match=rf"pairs.jsonl:{number}: {words}"):
            raise ValueError(lines)
    assert lines.endswith(f"pairs.jsonl: {len(faults)} faults")


def test_too_long_pairs_lose_the_beginning_of_their_prompt_or_are_left_out(tmp_path: Path) -> None:
    tokenizer = family("llama3", tmp_path)  # which begins a text with BOS
    row = {"prompt": "The answer is 42, so 3 + 4 = 7.", "chosen": " 7", "rejected": " 8 9"}
    (whole,) = read(tmp_path, tokenizer, row).pairs
    tokens, prompt = group_length(whole), whole[0].prompt_ids
    assert tokens == len(prompt) - 1 + len(whole[0].ids) + len(whole[1].ids)
    assert len(read(tmp_path, tokenizer, row, seq_len=tokens)) == 1
    (cut,) = read(tmp_path, tokenizer, row, seq_len=tokens - 3, overlong="truncate").pairs
    assert cut[0].prompt_ids == cut[1].prompt_ids == [prompt[0], *prompt[4:]]
    assert [s.ids for s in cut] == [s.ids for s in whole] and group_length(cut) == tokens - 3
    short = {"prompt": "3", "chosen": "4", "rejected": "7"}
    kept = read(tmp_path, tokenizer, row, short, seq_len=tokens - 3, overlong="drop")
    assert len(kept) == 1 and kept.pairs[0][0].prompt_ids[-1] == tokenizer.encode("3")[-1]
    least = tokens - len(prompt) + 2  # BOS and one token of the prompt
    assert len(read(tmp_path, tokenizer, row, seq_len=least, overlong="truncate").pairs[0][0].prompt_ids) == 2
    with pytest.raises(ValueError, match="every row is longer"):
        read(tmp_path, tokenizer, row, seq_len=least - 1, overlong="truncate")


def test_every_pair_comes_once_an_epoch_in_a_new_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pairs = read(tmp_path, tokenizer, *({"prompt": "1 +", "chosen": f"{i}", "rejected": "x"} for i in range(30)))
    first, second = ([pairs.index(30 * epoch + i) for i in range(30)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(30)) and first != second
    assert pairs.groups([0, 31]) == [pairs.pairs[first[0]], pairs.pairs[second[1]]]
    assert pairs.tokens([0, 31]) == group_length(pairs.pairs[first[0]]) + group_length(pairs.pairs[second[1]])


def test_labels_and_margins_are_columns_where_a_row_has_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"prompt": "1 +", "chosen": "22", "rejected": "3"}
    assert read(tmp_path, tokenizer, row).columns == ()
    assert read(tmp_path, tokenizer, row, {**row, "margin": 1}).columns == ("margin",)
    pairs = read(tmp_path, tokenizer, row, {**row, "label": 0.25}, {**row, "label": None, "margin": -2})
    assert pairs.columns == ("label", "margin")
    found = [[s.columns[name] for name in pairs.columns for s in pair] for pair in pairs.pairs]
    assert found == [
        [[0, 0, 1.0], [0, 0], [0, 0, 0], [0, 0]],
        [[0, 0, 0.25], [0, 0], [0, 0, 0], [0, 0]],
        [[0, 0, 1.0], [0, 0], [0, 0, -2.0], [0, 0]],
    ]


def test_a_value_is_filled_in_at_the_last_trained_token() -> None:
    pair: Group = [Sample([1], [2, 3, 4], [True, True, False], [0.0] * 3, [0] * 3, True) for _ in range(2)]
    fill(pair, "x", (5, 6))
    assert [s.columns["x"] for s in pair] == [[0, 5, 0], [0, 6, 0]]


def test_a_scalar_head_sees_the_last_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Each answer stands there as inputs, whole; the mask is at its last token alone, which ends it."""
    row = {"prompt": "1 + 1 =", "chosen": "22", "rejected": "3", "label": 0.75}
    plain, ended = (read(tmp_path, tokenizer, row, at_end=at_end) for at_end in (False, True))
    assert [at_last_token(s).ids[:-1] for s in plain.pairs[0]] == [s.ids for s in plain.pairs[0]]
    (pair,) = ended.pairs
    batch = group_batch([pair], group_length(pair), 1, 0, ended.columns, whole=True)
    prompt, (chosen, rejected) = pair[0].prompt_ids, [s.ids for s in plain.pairs[0]]
    assert batch.input_ids[0].tolist() == [*prompt[:-1], prompt[-1], *chosen, prompt[-1], *rejected]
    at = batch.loss_mask[0].nonzero().flatten().tolist()
    assert at == [len(prompt) + len(chosen) - 1, len(prompt) + len(chosen) + len(rejected)]
    assert batch.input_ids[0, at].tolist() == [tokenizer.eos_id] * 2
    assert batch.extra["label"][0, at].tolist() == [0.75, 0.0] and batch.extra["label"].sum() == 0.75
    tight = group_length(plain.pairs[0])
    with pytest.raises(ValueError, match=f"has {tight + 2} tokens, more than"):
        read(tmp_path, tokenizer, row, at_end=True, seq_len=tight)
