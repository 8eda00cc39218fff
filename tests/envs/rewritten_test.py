"""Episodes whose history is rewritten, by the chat template or by the environment: rows, asserted token by token, what
of them is trained, and what an episode of several rows counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtrain.config.environment import EnvironmentConfig
from llmtrain.config.recipes.grpo import GrpoConfig
from llmtrain.config.recipes.raft import RaftConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.data.chat import Message
from llmtrain.data.groups import piece_batch
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.data.tree import Tree
from llmtrain.envs.base import Reply
from llmtrain.envs.dialogue import Dialogue, Renderer, Rewritten, check_template, text_behind
from llmtrain.envs.episodes import Episodes
from llmtrain.losses.policy import grpo_loss
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.recipes.grpo import credit, divided_by
from llmtrain.recipes.raft import keep
from llmtrain.rollout.wire import pack, unpack
from llmtrain.types import Group, Prompt, Sample, Sampling, attempts
from tests.data.families import family
from tests.data.tree_test import gradients
from tests.envs.talk import Script
from tests.envs.whole_row import whole_row_logprobs

# As Qwen3's: a thought is kept behind the last message of a user, in a chain of tool calls, and dropped before it.
CHAIN = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% set parts = m.content.split('</think>') %}"
    "{% if m.role != 'assistant' or parts | length == 1 %}{{ m.content }}{% else %}"
    "{% if loop.index0 > last.user %}"
    "{{ '<think>\\n' + parts[0].split('<think>')[-1].strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\\n') }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURNS = ["<think>\na\n</think>\n\ncall", "<think>b</think>answer", "<think>\nc\n</think>\n\nmore", "end"]
HEARD = ["tool", "user", "tool"]  # of whom the answers are


class Lesson:
    """Answers as HEARD says; sample 1 ends with its second turn."""

    tools, role, players = (), "tool", 1

    def start(self, example: Mapping[str, Any]) -> list[Message]:
        self.turn = 0
        return [{"role": "user", "content": example["prompt"]}]

    def step(self, text: str) -> Reply:
        self.turn += 1
        if text == "end":
            return Reply(done=True, parts={"right": 1.0})
        return Reply([{"role": HEARD[self.turn - 1], "content": f"heard {self.turn}"}], {"spoke": 0.25})

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    return templated(family("qwen", folder), folder, CHAIN)


def templated(tokenizer: Tokenizer, folder: Path, template: str) -> Tokenizer:
    (folder / "own.jinja").write_text(template)
    tokenizer.template = str(folder / "own.jinja")
    return tokenizer


def says(context: str, number: int, turns: list[str] = TURNS) -> str:
    """Returns the turn behind as many answers as there are; sample 1 has enough of the second."""
    return turns[context.count("heard")] if not number else ["go", "end"][context.count("heard")]


def run(
    tokenizer: Tokenizer,
    says: Callable[[str, int], str],
    make: Callable[[], Any] = Lesson,
    seq_len: int = 1000,
    samples: int = 2,
    generator: Any = None,
    **settings: Any,
) -> Group:
    config = EnvironmentConfig(**{"game": "nim", "rewritten": "new_row", **settings})
    script = generator or Script(tokenizer, says)
    prompt = Prompt(tokenizer.encode_chat([{"role": "user", "content": "Go"}]), 7, {"prompt": "Go"})
    episodes = Episodes(script, Renderer(tokenizer), make, config, seq_len, tokenizer.decode)
    (group,) = episodes.generate([prompt], Sampling(max_new_tokens=60, num_samples=samples))
    return group


def first_only(says: Callable[[str, int], str]) -> Callable[[str, int], str]:
    """Script numbers the samples of its first call alone: later turns are told apart by the prompt."""
    return lambda context, number: says(context, 0)


def text_of(tokenizer: Tokenizer, sample: Sample) -> str:
    return tokenizer.decode(sample.prompt_ids + sample.ids, skip_special=False)


def written(tokenizer: Tokenizer, sample: Sample) -> list[str]:
    return [tokenizer.decode(ids, skip_special=False) for own, ids in sample.turns() if own]


def test_a_row_goes_on_until_the_template_rewrites_it(tokenizer: Tokenizer) -> None:
    """The thoughts of a chain of calls stay; the question that ends it drops them, and a row begins with it. The turn
    `b` is written without the white space that the template puts around thoughts: no reason for a new row."""
    group = run(tokenizer, first_only(says), samples=1)
    end, start = "<|im_end|>\n<|im_start|>", "<|im_start|>user\nGo"
    chain = f"{start}{end}assistant\n{TURNS[0]}{end}tool\nheard 1{end}assistant\n{TURNS[1]}<|im_end|>"
    told = f"{start}{end}assistant\ncall{end}tool\nheard 1{end}assistant\nanswer{end}user\nheard 2{end}assistant\n"
    rest = f"{TURNS[2]}{end}tool\nheard 3{end}assistant\nend<|im_end|>"
    assert [text_of(tokenizer, sample) for sample in group] == [chain, told + rest]
    assert [sample.attempt for sample in group] == [0, 0] and all(sample.finished for sample in group)
    assert all(sample.parts == {"spoke": 0.75, "right": 1.0} and not sample.errors for sample in group)
    messages = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": TURNS[0]}]
    messages += [{"role": "tool", "content": "heard 1"}, {"role": "assistant", "content": TURNS[1]}]
    messages += [{"role": "user", "content": "heard 2"}]
    row = group[1].prompt_ids + group[1].ids
    prompt = tokenizer.hugging_face.apply_chat_template(messages, chat_template=CHAIN, add_generation_prompt=True)
    n = len(prompt["input_ids"])
    assert row[:n] == prompt["input_ids"]
    flags = [False] * len(group[1].prompt_ids) + group[1].trained
    assert not any(flags[:n]) and flags[n]
    assert group[0].prompt_ids == group[1].prompt_ids == tokenizer.encode_chat(messages[:1])


def test_each_token_that_the_model_wrote_is_trained_once(tokenizer: Tokenizer) -> None:
    group = run(tokenizer, first_only(says), samples=1)
    ends = tokenizer.turn_end_ids
    wrote = [tokenizer.encode(text, parse_special=False) + list(ends) for text in TURNS]
    rows = [
        [(i, t, lp) for own, i, t, lp in zip(s.trained, s.ids, s.versions, s.logprobs, strict=True) if own]
        for s in group
    ]
    assert [each for row in rows for each in row] == [(i, 3, -float(n)) for turn in wrote for n, i in enumerate(turn)]
    assert [sum(own for own, _ in s.turns()) for s in group] == [2, 2]
    heard = [lp for s in group for lp, own in zip(s.logprobs, s.trained, strict=True) if not own]
    assert set(heard) == {0.0}


def test_tokens_stay_as_they_were_written_in_the_row_in_which_they_were(tokenizer: Tokenizer) -> None:
    """Letters one by one, which the tokenizer would never choose: the row keeps them, the next one reads their text."""
    renderer = Renderer(tokenizer)
    letters = [tokenizer.encode(c, parse_special=False)[0] for c in "<think>x</think>answer"]
    assert tokenizer.encode("answer", parse_special=False) != letters[-6:]
    ids = [*letters, *tokenizer.turn_end_ids]
    row = Dialogue(renderer, [{"role": "user", "content": "Go"}], [])
    row.say(Sample([], ids, [True] * len(ids), [-1.0] * len(ids), [2] * len(ids), True))
    before = list(row.context)
    with pytest.raises(Rewritten):
        row.hear([{"role": "user", "content": "so?"}], 1000, as_text=True)
    assert row.context == before
    assert row.history() == [row.messages[0], {"role": "assistant", "content": "<think>x</think>answer"}]
    assert row.hear([{"role": "tool", "content": "so?"}], 1000, as_text=True) and row.ids[: len(ids)] == ids
    behind = "\n<|im_start|>tool\nso?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row.ids[len(ids) :], skip_special=False) == behind


@pytest.mark.parametrize(
    ("whole", "begun", "rest"),
    [
        ("say: 7<end> so?", "say:\n7 ", "<end> so?"),
        ("a b  <end>", "ab", "  <end>"),
        ("a b  <end>", "ab ", " <end>"),  # one of them was written already
        ("<end>", " ", "<end>"),
        ("", "", ""),
        ("say: 8", "say: 7", None),
        ("sa", "say", None),
    ],
)
def test_what_follows_a_text(whole: str, begun: str, rest: str | None) -> None:
    if rest is not None:
        assert text_behind(whole, begun) == rest
        return
    with pytest.raises(Rewritten):
        text_behind(whole, begun)


def test_a_template_that_rewrites_every_turn(folder: Path) -> None:
    """R1's opens a thought in the prompt and leaves it out later: a row for each turn, of which there may be three."""
    r1 = family("r1", folder)
    heard = partial(says, turns=["x</think>1", "y</think>2", "z</think>3", "end"])
    group = run(r1, first_only(heard), samples=1, max_turns=3, make=Users)
    told = [text_of(r1, sample) for sample in group]
    asked = "<|begin|><|User|>Go"
    one, two = "<|Assistant|>1<|end|><|User|>heard 1", "<|Assistant|>2<|end|><|User|>heard 2"
    assert told == [
        f"{asked}<|Assistant|><think>\nx</think>1<|end|>",
        f"{asked}{one}<|Assistant|><think>\ny</think>2<|end|>",
        f"{asked}{one}{two}<|Assistant|><think>\nz</think>3<|end|>",
    ]
    assert [s.attempt for s in group] == [0, 0, 0] and not any(s.finished or s.errors for s in group)
    assert all(s.parts == {"spoke": 0.75} for s in group)


class Users(Lesson):
    """Answers as a user throughout."""

    role = "user"

    def step(self, text: str) -> Reply:
        reply = super().step(text)
        for message in reply.messages:
            message["role"] = "user"
        return reply


def test_a_new_row_that_is_too_long_cuts_the_episode(folder: Path) -> None:
    r1 = family("r1", folder)
    heard = partial(says, turns=["x</think>1", "y</think>2", "z</think>3", "end"])
    whole = run(r1, first_only(heard), samples=1, make=Users)
    n = len(whole[2].prompt_ids + whole[2].ids) - whole[2].written_tokens  # what the third row begins with
    for seq_len, rows in ((n, 2), (n + 1, 3)):
        group = run(r1, first_only(heard), samples=1, make=Users, seq_len=seq_len)
        assert len(group) == rows and not any(s.finished or s.errors for s in group)
    assert all(len(s.prompt_ids + s.ids) <= n for s in run(r1, first_only(heard), samples=1, make=Users, seq_len=n))


def test_without_the_key_it_is_refused(tokenizer: Tokenizer, folder: Path) -> None:
    start = [{"role": "user", "content": "Go"}]
    for made, reason in ((tokenizer, "drops what the policy thought"), (family("r1", folder), "in another way")):
        with pytest.raises(
            Rewritten, match=rf"{reason}.*rollout.environment.rewritten=new_row: an episode then goes on"
        ):
            check_template(Renderer(made), start, "user", [], keep_thinking=False)
        check_template(Renderer(made), start, "user", [], keep_thinking=False, new_rows=True)
    with pytest.raises(ValueError, match="must alternate"):
        check_template(Renderer(family("gemma", folder)), start, "tool", [], keep_thinking=False, new_rows=True)
    (sample,) = run(family("r1", folder), first_only(says), samples=1, rewritten="refuse", make=Users)
    assert sample.errors["environment"].startswith("Rewritten: the chat template renders earlier turns")


def test_thoughts_are_kept_where_that_is_asked_for(tokenizer: Tokenizer) -> None:
    (sample,) = run(tokenizer, first_only(says), samples=1, rewritten="refuse", keep_thinking=True)
    assert written(tokenizer, sample) == [f"{turn}<|im_end|>" for turn in TURNS]


class Short:
    """Keeps of its conversation a summary, from the second turn on; what is `wrong` may be given in its place."""

    tools, role, players = (), "user", 1

    def __init__(self, wrong: Any = None) -> None:
        self.wrong, self.turn = wrong, 0

    def start(self, example: Mapping[str, Any]) -> list[Message]:
        return [{"role": "user", "content": example["prompt"]}]

    def step(self, text: str) -> Reply:
        self.turn += 1
        if text == "end":
            return Reply(done=True, parts={"right": 1.0})
        if self.turn < 2:
            return Reply([{"role": "user", "content": f"heard {self.turn}"}])
        if self.wrong is not None:
            return self.wrong
        kept = [{"role": "assistant", "content": text}, {"role": "user", "content": f"heard {self.turn}: go on"}]
        return Reply(history=[{"role": "user", "content": f"Go. You said {self.turn} things."}, *kept])

    def close(self) -> None: ...


def test_an_environment_sums_up(tokenizer: Tokenizer) -> None:
    """No key is needed for that. The second row begins with what the environment gives, and the third again."""
    turns = {"Go": "one", "heard 1": "two", "2 things": "three", "3 things": "end"}
    last = lambda context, number: next(turn for told, turn in reversed(turns.items()) if told in context)  # noqa: E731
    group = run(tokenizer, last, samples=1, make=Short, rewritten="refuse")
    end = "<|im_end|>\n<|im_start|>"
    assert [text_of(tokenizer, s).removeprefix("<|im_start|>user\nGo") for s in group] == [
        f"{end}assistant\none{end}user\nheard 1{end}assistant\ntwo<|im_end|>",
        f". You said 2 things.{end}assistant\ntwo{end}user\nheard 2: go on{end}assistant\nthree<|im_end|>",
        f". You said 3 things.{end}assistant\nthree{end}user\nheard 3: go on{end}assistant\nend<|im_end|>",
    ]
    assert [written(tokenizer, s) for s in group] == [
        ["one<|im_end|>", "two<|im_end|>"],
        ["three<|im_end|>"],
        ["end<|im_end|>"],
    ]
    assert [s.attempt for s in group] == [0] * 3 and all(s.parts == {"right": 1.0} and s.finished for s in group)
    assert text_of(tokenizer, Sample(group[0].prompt_ids, [], [], [], [], True)) == "<|im_start|>user\nGo"


ASKED = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(history=[]), "ValueError: the history is [], and no list of messages"),
        (Reply(history=5), "ValueError: the history is 5, and no list of messages"),
        (Reply(history=ASKED), "ValueError: the history is {'role': 'user', 'content': 'x'}, and no list of messages"),
        (Reply(history="all of it"), "ValueError: a message is 'a', and no object with text as `content`"),
        (Reply(history=[{"role": "user"}]), "ValueError: a message is {'role': 'user'}, and no object with text"),
        (Reply(history=[{"role": "user", "content": None}]), "ValueError: a message is {'role': 'user', 'content': No"),
        (Reply(history=[{"role": "boss", "content": "x"}]), "ValueError: a message has the role 'boss'; a history has"),
        (
            Reply(history=[ASKED, {"role": "assistant", "content": "b"}]),
            "ValueError: the history ends with a message of",
        ),
        (Reply([ASKED], history=[ASKED]), "ValueError: there are messages beside a history, which is all that the"),
        (Reply(history=[ASKED], player=1), "ValueError: the player 1 speaks next, and there are 1 from 0 on"),
        (Reply(history=[{"role": "system", "content": "refused"}]), "ValueError: the chat template refuses these"),
        (
            Reply(history=[{"role": "tool", "content": "x"}]),
            "ValueError: a rewritten history begins with another token",
        ),
    ],
)
def test_a_history_that_is_none(folder: Path, reply: Reply, error: str) -> None:
    """The row that was there stays, and the error is that of its episode alone."""
    picky = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role + ': ' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = templated(family("qwen", folder), folder, picky)
    (sample,) = run(tokenizer, lambda context, number: "a", samples=1, make=lambda: Short(reply))
    assert sample.errors["environment"].startswith(error) and not sample.finished
    assert written(tokenizer, sample) == ["a<|im_end|>"] * 2


class Duel:
    """Lets two sides speak in turn, three times in all; before its second turn side 0 forgets what it said."""

    tools, role, players = (), "user", 2

    def start(self, example: Mapping[str, Any]) -> list[Message]:
        self.turn = 0
        return [{"role": "user", "content": "Go"}]

    def step(self, text: str) -> Reply:
        self.turn += 1
        match self.turn:
            case 1:
                return Reply([{"role": "user", "content": "Go too"}], player=1)
            case 2:
                return Reply(history=[{"role": "user", "content": "Go again"}], parts={"won": 0.5}, player=0)
        return Reply(done=True, parts={"won": 1.0}, parts_of={1: {"won": -1.0}})

    def close(self) -> None: ...


def test_sides_have_an_attempt_each(tokenizer: Tokenizer) -> None:
    group = run(tokenizer, lambda context, number: "a", make=Duel)
    assert [s.attempt for s in group] == [0, 0, 1, 2, 2, 3]
    assert [s.parts["won"] for s in group] == [1.0, 1.0, -0.5] * 2
    assert [written(tokenizer, s) for s in group] == [["a<|im_end|>"]] * 6
    texts = [text_of(tokenizer, s).partition("<|im_end|>")[0] for s in group[:3]]
    assert texts == [f"<|im_start|>user\nGo{more}" for more in ("", " again", " too")]
    assert [len(rows) for rows in attempts(group)] == [2, 1, 2, 1]


def test_advantages_by_hand() -> None:
    """Episodes of one and of three rows, worth 0 and 1: the mean is .5, whatever the rows."""

    def row(attempt: int, reward: float, tokens: int) -> Sample:
        n = tokens
        return Sample(
            [1], [5] * (n + 1), [False] + [True] * n, [0.0] * (n + 1), [0] * (n + 1), True, reward, attempt=attempt
        )

    group = [row(0, 0.0, 2), row(1, 1.0, 1), row(1, 1.0, 2), row(1, 1.0, 5)]
    credit([group], GrpoConfig(normalize_std=False, aggregate="sequences"))
    assert [s.columns["advantages"][-1] for s in group] == [-0.5, 0.5, 0.5, 0.5]
    assert [s.columns["weights"][-1] for s in group] == [1 / 2, 1 / 8, 1 / 8, 1 / 8]  # each token of an answer
    credit([group], GrpoConfig(std_eps=0.0))
    assert [s.columns["advantages"][-1] for s in group] == pytest.approx([-(0.5**0.5), *[0.5**0.5] * 3])
    for aggregate, by in (("sequences", 2), ("constant", 200), ("tokens", 10)):
        config = SimpleNamespace(grpo=GrpoConfig(aggregate=aggregate), rollout=SimpleNamespace(max_new_tokens=100))
        assert divided_by([group], config) == by


def test_rows_that_share_tokens_give_the_gradients_of_rows_alone(tokenizer: Tokenizer) -> None:
    """The tree of two episodes, one of which was rewritten in between."""

    def told(context: str, number: int) -> str:
        return "go" if number else says(context, 0) if "go<" not in context else "end"

    group = run(tokenizer, told)
    assert [s.attempt for s in group] == [0, 0, 1]
    assert {len(s.prompt_ids) for s in group} == {len(tokenizer.encode_chat([{"role": "user", "content": "Go"}]))}
    for sample, reward in zip(group, (1.0, 1.0, 0.0), strict=True):
        sample.reward = reward
    credit([group], GrpoConfig(normalize_std=False))
    model_config = ModelConfig(
        num_layers=2, hidden_size=32, ffn_size=48, num_kv_heads=2, vocab_size=tokenizer.vocab_size + 1
    )
    model = Decoder(model_config)
    initialize(model, model_config, seed=0)
    tree, alone = Tree(group), [Tree([sample]) for sample in group]
    assert tree.tokens < sum(each.tokens for each in alone)
    loss_of = partial(grpo_loss, clip_low=0.2, clip_high=0.28, kl_coef=0.0)
    loss, grads = gradients(model, [piece_batch([tree], [[0]], tree.tokens, 0, ("advantages",))], loss_of)
    apart = [piece_batch(alone, [[i]], each.tokens, 0, ("advantages",)) for i, each in enumerate(alone)]
    want, each = gradients(model, apart, loss_of)
    assert loss == pytest.approx(want, rel=1e-5) and any(grad.norm() > 0 for grad in grads.values())
    for name, grad in grads.items():  # fp32, another order of sums
        assert (grad - each[name]).norm() <= 1e-5 * each[name].norm(), name


def test_what_is_sent_comes_back(tokenizer: Tokenizer) -> None:
    group = run(tokenizer, first_only(says), samples=1)
    asked = tokenizer.encode_chat([{"role": "user", "content": "Go"}])
    assert unpack(pack({4: group}, {4: asked}), {4: asked}) == {4: group}
    short = run(tokenizer, lambda context, number: "a", make=Short, max_turns=4)
    assert unpack(pack({4: short}, {4: asked}), {4: asked}) == {4: short} and short[0].prompt_ids != asked


def test_log_probs_are_those_of_each_row(tokenizer: Tokenizer, folder: Path) -> None:
    """A model of random weights, and a template that opens each thought and drops it: samples have the log-probs that
    one forward over each row gives."""
    from llmtrain.rollout.native import NativeGenerator

    opened = CHAIN.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
    assert opened != CHAIN
    tokenizer = templated(family("qwen", folder), folder, opened)
    config = ModelConfig(
        num_layers=2, hidden_size=32, ffn_size=48, num_heads=4, num_kv_heads=2, vocab_size=tokenizer.vocab_size + 1
    )
    model = Decoder(config)
    initialize(model, config, seed=0)
    stops = tuple(range(0, tokenizer.vocab_size, 2))
    prompt = Prompt(tokenizer.encode_chat([{"role": "user", "content": "Go"}]), 7, {"prompt": "Go"})
    settings = EnvironmentConfig(game="nim", rewritten="new_row", max_turns=3)
    generator = NativeGenerator(model, 4, "cpu")
    episodes = Episodes(generator, Renderer(tokenizer), Lesson, settings, 1000, tokenizer.decode)
    (group,) = episodes.generate([prompt], Sampling(max_new_tokens=6, num_samples=3, temperature=1.5, stop_ids=stops))
    assert any(len(rows) == 3 for rows in attempts(group)) and not any(s.errors for s in group)
    for s in group:
        expected = torch.where(torch.tensor(s.trained), whole_row_logprobs(model, s, 1.5), 0.0)
        torch.testing.assert_close(torch.tensor(s.logprobs), expected, atol=1e-4, rtol=0)  # fp32, another order of sums


def test_best_of_a_group_is_an_attempt_with_all_its_rows() -> None:
    rows = [Sample([1], [2], [True], [-1.0], [0], True, reward, attempt=i) for reward, i in ((1, 0), (2, 1), (2, 1))]
    settings = RaftConfig(keep="best", min_reward=None)
    kept = keep(rows, settings)
    assert [id(row) for row in kept] == [id(row) for row in rows[1:]]
    alone = [Sample([1], [2], [True], [-1.0], [0], True, reward) for reward in (1.0, 3.0, 3.0)]
    assert [id(row) for row in keep(alone, settings)] == [id(alone[1])]


@pytest.mark.parametrize(
    ("reply", "finished"),
    [
        (Reply(history=[{"role": "user", "content": "Go"}], done=None), False),
        (Reply(done="yes", parts={7: 1.0}, errors={"own": OSError("no disk")}), True),
        (Reply(history=[{"role": "user", "content": "Go"}], parts={"much": 1e308}), False),
    ],
)
def test_odd_replies_can_be_sent(tokenizer: Tokenizer, reply: Reply, finished: bool) -> None:
    """Values that are neither bool nor text, and parts whose sum overflows, would end the run where it sends them."""

    class Odd(Lesson):
        def step(self, text: str) -> Reply:
            return reply

    group = run(tokenizer, first_only(lambda context, number: "go"), Odd, samples=1, max_turns=2)
    sent = unpack(pack({0: group}), {0: group[0].prompt_ids})[0]
    assert [row.finished for row in sent] == [finished] * len(sent)
    for row in sent:
        assert all(isinstance(name, str) for name in row.parts) and all(map(math.isfinite, row.parts.values()))
        assert all(isinstance(each, str) for pair in row.errors.items() for each in pair)
    assert ("environment" in sent[0].errors) == ("much" in reply.parts)
