"""Conversations as tokens: those of the chat template, with what the policy wrote as it wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.data.chat import Message
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.envs.dialogue import Dialogue, Renderer, Rewritten, check_template
from llmtrain.types import Sample
from tests.data.families import PHI3, family

ASKED = [{"role": "user", "content": "What is 3 + 4?"}]
SAID = [("The answer is 7.", " so?\n\n x"), ("So 42.", "system")]
SPACED = ("llama2", "mistral")  # their templates put a space before a turn, which the policy writes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def said(dialogue: Dialogue, ids: list[int]) -> Sample:
    return Sample(dialogue.context, ids, [True] * len(ids), [-1.0] * len(ids), [2] * len(ids), True)


def talked(tokenizer: Tokenizer, space: str = "") -> Dialogue:
    """Returns the conversation ASKED, SAID."""
    renderer = Renderer(tokenizer)
    dialogue = Dialogue(renderer, ASKED, [])
    for text, heard in SAID:
        ids = renderer.ids(space + text, goes_on=True) + list(tokenizer.turn_end_ids)
        dialogue.say(said(dialogue, ids))
        assert dialogue.hear([{"role": "user", "content": heard}], 1000)
    return dialogue


def messages() -> list[Message]:
    turns = [[{"role": "assistant", "content": a}, {"role": "user", "content": b}] for a, b in SAID]
    return [*ASKED, *turns[0], *turns[1]]


@pytest.mark.parametrize("name", ["qwen", "qwen3", "llama3", "llama2", "mistral", "gemma", "phi3", "unigram"])
def test_the_tokens_are_those_of_the_whole_conversation(folder: Path, name: str) -> None:
    """Against transformers, which renders and encodes all of it at once."""
    tokenizer = family(name, folder)
    dialogue = talked(tokenizer, " " if name in SPACED else "")
    rendered = tokenizer.hugging_face.apply_chat_template(messages(), add_generation_prompt=True)
    assert dialogue.context == rendered["input_ids"]


def test_what_a_user_wrote_is_no_special_token(folder: Path) -> None:
    tokenizer = family("qwen", folder)
    dialogue = Dialogue(Renderer(tokenizer), ASKED, [])
    dialogue.say(said(dialogue, [5, *tokenizer.turn_end_ids]))
    assert dialogue.hear([{"role": "user", "content": "<|im_end|>"}], 1000)
    assert dialogue.ids.count(tokenizer.turn_end_ids[0]) == 2  # the policy's, and that of the template
    assert tokenizer.decode(dialogue.ids, skip_special=False).count("<|im_end|>") == 3


def test_what_the_policy_wrote_is_never_encoded_again(folder: Path) -> None:
    """`7` and `.` are two tokens that the tokenizer would not choose for `is 7.`; an end of text in place of an end of
    the turn stays, and the end of the turn follows it."""
    tokenizer = family("qwen", folder)
    letters = [tokenizer.encode(c, parse_special=False)[0] for c in "answer"]
    assert tokenizer.encode("answer", parse_special=False) != letters
    dialogue = Dialogue(Renderer(tokenizer), ASKED, [])
    first = len(dialogue.prompt_ids)
    eos = tokenizer.backend.token_to_id("<|endoftext|>")
    dialogue.say(said(dialogue, [*letters, eos]))
    assert dialogue.hear([{"role": "user", "content": "x"}], 1000)
    assert dialogue.context[first : first + 7] == [*letters, eos]
    behind = "<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(dialogue.context[first + 7 :], skip_special=False) == behind
    assert dialogue.trained == [True] * 7 + [False] * (len(dialogue.ids) - 7)
    assert dialogue.logprobs == [-1.0] * 7 + [0.0] * (len(dialogue.ids) - 7) and set(dialogue.versions) == {2}


def test_a_sample_ends_with_the_policy(folder: Path) -> None:
    dialogue = talked(family("qwen", folder))
    sample = dialogue.sample(True, len(dialogue.prompt_ids), version=2)
    assert sample.trained[-1] and len(sample.ids) < len(dialogue.ids)
    assert sample.prompt_ids == dialogue.prompt_ids and [own for own, _ in sample.turns()] == [True, False, True]
    moved = dialogue.sample(True, 2, version=2)  # a prompt that other conversations share
    assert moved.prompt_ids + moved.ids == sample.prompt_ids + sample.ids
    assert moved.trained.index(True) == len(dialogue.prompt_ids) - 2 and moved.logprobs[0] == 0.0


def test_what_does_not_fit_is_not_added(folder: Path) -> None:
    dialogue = Dialogue(Renderer(family("qwen", folder)), ASKED, [])
    dialogue.say(said(dialogue, [5, 6]))
    before = list(dialogue.context)
    new = [{"role": "user", "content": "x"}]
    room = next(n for n in range(len(before), 200) if dialogue.hear(new, n))
    assert room == len(dialogue.context) and dialogue.context[: len(before)] == before
    assert not dialogue.trained[-1]


@pytest.mark.parametrize(
    ("name", "role", "reason"),
    [
        ("r1", "user", "renders earlier turns in another way once more turns follow"),
        ("qwen3", "user", "drops what the policy thought once more turns follow"),
        ("gemma", "tool", "must alternate.*; or, with tools, set rollout.environment.results=user"),
        ("llama2", "tool", "Only user and assistant roles are supported"),
    ],
)
def test_a_template_that_cannot_render_episodes_is_refused(folder: Path, name: str, role: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_template(Renderer(family(name, folder)), ASKED, role, [], keep_thinking=False)


def test_a_template_that_shows_no_tools_is_refused(folder: Path) -> None:
    """A system message may tell of them in its place."""
    tool = {"type": "function", "function": {"name": "adder", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(ValueError, match=r"shows no tools.*set tokenizer.chat_template.*environment.system.*calls=pl"):
        check_template(Renderer(family("phi3", folder)), ASKED, "user", [tool], keep_thinking=False)
    system = {"role": "system", "content": "Call adder."}
    check_template(Renderer(family("phi3", folder)), [system, *ASKED], "user", [tool], keep_thinking=False)
    check_template(Renderer(family("phi3", folder)), ASKED, "user", [], keep_thinking=False)
    tokenizer = family("phi3", folder)
    (folder / "shows.jinja").write_text("{% if tools %}{{ tools | tojson }}{% endif %}" + PHI3)
    tokenizer.template = str(folder / "shows.jinja")
    check_template(Renderer(tokenizer), ASKED, "user", [tool], keep_thinking=False)


def test_templates_that_can(folder: Path) -> None:
    for name, role in [("qwen", "tool"), ("llama3", "tool"), ("gemma", "user"), ("phi3", "user")]:
        check_template(Renderer(family(name, folder)), ASKED, role, [], keep_thinking=False)
    check_template(Renderer(family("qwen3", folder)), ASKED, "user", [], keep_thinking=True)


def test_a_rewritten_history_is_noticed_within_an_episode(folder: Path) -> None:
    dialogue = Dialogue(Renderer(family("r1", folder)), ASKED, [])
    dialogue.say(said(dialogue, [5, 6]))
    with pytest.raises(Rewritten, match=r"set tokenizer.chat_template to another"):
        dialogue.hear([{"role": "user", "content": "x"}], 1000)


def test_tools_are_rendered(folder: Path) -> None:
    tokenizer = family("qwen", folder)
    template = "{% if tools %}{{ tools[0].function.name }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tools.jinja").write_text(template)
    tokenizer.template = str(folder / "tools.jinja")
    dialogue = Dialogue(Renderer(tokenizer), ASKED, [{"type": "function", "function": {"name": "adder"}}])
    assert dialogue.rendered == "adderWhat is 3 + 4?"
