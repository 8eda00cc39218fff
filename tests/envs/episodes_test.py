"""Episodes over a generator: which tokens they have, which are trained, where they end, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmtrain.config.environment import EnvironmentConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.envs.base import Reply
from llmtrain.envs.dialogue import Renderer
from llmtrain.envs.episodes import Episodes
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.rollout.native import NativeGenerator
from llmtrain.types import Group, Prompt, Sampling
from tests.data.families import family
from tests.envs.talk import Counting, Script
from tests.envs.whole_row import whole_row_logprobs

ASKED = Sampling(max_new_tokens=50, num_samples=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return family("qwen", tmp_path_factory.mktemp("families"))


def prompt(tokenizer: Tokenizer, text: str, seed: int = 7) -> Prompt:
    return Prompt(tokenizer.encode_chat([{"role": "user", "content": text}]), seed, {"prompt": text})


def run(
    tokenizer: Tokenizer,
    generator: Any,
    *texts: str,
    make: Callable[[], Any] = Counting,
    seq_len: int = 1000,
    sampling: Sampling = ASKED,
    **settings: Any,
) -> list[Group]:
    config = EnvironmentConfig(**{"game": "nim", **settings})
    episodes = Episodes(generator, Renderer(tokenizer), make, config, seq_len, tokenizer.decode)
    return episodes.generate([prompt(tokenizer, text) for text in texts], sampling)


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special=False)


def test_episodes_of_different_lengths_run_together(tokenizer: Tokenizer) -> None:
    """Prompt `two` takes two turns, `four` four; sample 1 says one letter more than sample 0."""

    def says(context: str, number: int) -> str:
        turns = context.count("assistant") - 1
        return "end" if turns == (1 if "two" in context else 3) else "ab" + "c" * number

    script = Script(tokenizer, says)
    two, four = run(tokenizer, script, "two", "four")
    assert [len(prompts) for prompts, _ in script.asked] == [2, 4, 2, 2]  # the first asks for two samples each
    assert [sampling.num_samples for _, sampling in script.asked] == [2, 1, 1, 1]
    turn, heard = "<|im_end|>\n<|im_start|>user\n{} characters<|im_end|>\n<|im_start|>assistant\n", ""
    assert text_of(tokenizer, two[1].ids) == "abc" + turn.format(3) + "end<|im_end|>"
    assert text_of(tokenizer, four[0].ids) == 3 * ("ab" + turn.format(2)) + "end<|im_end|>" + heard
    assert two[0].parts == {"characters": 5.0, "end": 10.0} and two[1].parts == {"characters": 6.0, "end": 10.0}
    assert four[0].parts == {"characters": 9.0, "end": 10.0}
    assert all(s.finished and not s.errors for group in (two, four) for s in group)
    for sample in (*two, *four):
        assert sample.prompt_ids == prompt(tokenizer, "two" if sample in two else "four").ids
        assert [text_of(tokenizer, ids) for own, ids in sample.turns() if own][-1] == "end<|im_end|>"
        own = [lp for lp, trained in zip(sample.logprobs, sample.trained, strict=True) if trained]
        assert own[:2] == [0.0, -1.0] and {
            lp for lp, t in zip(sample.logprobs, sample.trained, strict=True) if not t
        } == {0.0}
        assert set(sample.versions) == {3}


def test_a_probe_starts_no_environment(tokenizer: Tokenizer) -> None:
    made = []
    script = Script(tokenizer, lambda context, number: "go on")
    config = EnvironmentConfig(game="nim")
    episodes = Episodes(script, Renderer(tokenizer), lambda: made.append(1), config, 1000, tokenizer.decode)
    groups = episodes.generate([Prompt([5, 6]), Prompt([5, 7])], ASKED)
    assert [[s.prompt_ids for s in group] for group in groups] == [[[5, 6]] * 2, [[5, 7]] * 2]
    assert made == [] and len(script.asked) == 1 and not any(s.errors for group in groups for s in group)


def test_each_turn_has_a_random_stream_of_its_own(tokenizer: Tokenizer) -> None:
    def seeds(threads: int) -> list[int]:
        script = Script(tokenizer, lambda context, number: "end" if context.count("assistant") == 3 else "a")
        run(tokenizer, script, "x", "y", threads=threads)
        return [asked.seed for prompts, _ in script.asked for asked in prompts]

    found = seeds(1)
    assert len(found) == 2 + 4 + 4
    assert len(set(found)) == 1 + 2 + 2  # the prompts share a seed here, and so do their samples of one number
    assert seeds(8) == found


@pytest.mark.parametrize(
    ("says", "settings", "turns", "parts"),
    [
        ("abc...", {}, 1, {"characters": 3.0}),  # cut at max_new_tokens: answered, but no more is asked
        (
            "end...",
            {},
            1,
            {"characters": 3.0, "end": 10.0},
        ),  # it is done, and the turn was cut
        ("abc", {"max_turns": 3}, 3, {"characters": 9.0}),
        ("abc", {"seq_len": 100}, None, None),
    ],
)
def test_an_episode_that_is_cut_is_not_finished(
    tokenizer: Tokenizer, says: str, settings: dict[str, int], turns: int | None, parts: dict[str, float] | None
) -> None:
    (group,) = run(tokenizer, Script(tokenizer, lambda context, number: says), "x", **settings)
    for sample in group:
        made = sum(own for own, _ in sample.turns())
        assert not sample.finished and not sample.errors and sample.trained[-1]
        assert made == (turns or made) and sample.parts == (parts or {"characters": 3.0 * made})
        assert len(sample.prompt_ids) + len(sample.ids) <= settings.get("seq_len", 1000)
        if turns is None:  # one more exchange would not have fitted
            each = (len(sample.ids) - len(sample.last_turn)) // (made - 1)
            assert made > 1 and len(sample.prompt_ids) + len(sample.ids) + each > 100


def test_an_environment_that_fails_ends_its_episode_alone(tokenizer: Tokenizer) -> None:
    def says(context: str, number: int) -> str:
        return "crash" if "bad" in context and number else "end"

    closed = Counting.closed
    good, bad, broken = run(tokenizer, Script(tokenizer, says), "good", "bad", "broken")
    assert [s.errors for s in (*good, bad[0])] == [{}, {}, {}]
    assert bad[1].errors == {"environment": "OSError: the disk is full"} and not bad[1].finished
    assert [s.errors for s in broken] == [{"environment": "KeyError: 'no such thing'"}] * 2
    assert [len(s.turns()) for s in broken] == [1, 1] and not any(s.parts for s in broken)
    assert Counting.closed == closed + 6


def test_an_environment_that_exits_fails_and_does_not_end_the_run(tokenizer: Tokenizer) -> None:
    class Exits(Counting):
        def step(self, text: str) -> Any:
            raise SystemExit(0)

    ((sample, _),) = run(tokenizer, Script(tokenizer, lambda context, number: "a"), "x", make=Exits)
    assert sample.errors == {"environment": "SystemExit: 0"} and not sample.finished


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(parts={"x": float("nan")}), "ValueError: the part x is nan, no finite number"),
        (Reply(parts={"x": "many"}), "TypeError: must be real number, not str"),
        (None, "AttributeError: 'NoneType' object has no attribute 'errors'"),
        (Reply([{"role": "user"}]), "ValueError: a message is {'role': 'user'}, and no object with text as `content`"),
        (Reply([{"role": "user", "content": 5}]), "ValueError: a message is {'role': 'user', 'content': 5}, and no"),
        (Reply("again"), "ValueError: a message is 'a', and no object with text as `content`"),
        (Reply([{"role": "assistant", "content": "b"}]), "ValueError: a message has the role 'assistant'; answer as"),
        (Reply([{"role": "user", "content": "b"}], player=1), "ValueError: the player 1 speaks next, and there are 1"),
    ],
)
def test_an_answer_that_is_none(tokenizer: Tokenizer, reply: Any, error: str) -> None:
    class Wrong(Counting):
        def step(self, text: str) -> Any:
            return reply

    ((sample, _),) = run(tokenizer, Script(tokenizer, lambda context, number: "a"), "x", make=Wrong)
    assert sample.errors["environment"].startswith(error)


def test_a_generator_that_fails_closes_the_environments(tokenizer: Tokenizer) -> None:
    closed, script = Counting.closed, Script(tokenizer, lambda context, number: "a")
    script.generate = None
    with pytest.raises(TypeError):
        run(tokenizer, script, "x")
    assert Counting.closed == closed + 2


def test_no_prompts_are_no_groups(tokenizer: Tokenizer) -> None:
    assert run(tokenizer, None) == []


def test_log_probs_are_those_of_the_whole_row(tokenizer: Tokenizer) -> None:
    """A model of random weights, whose turns end at any even token: what was sampled turn by turn has the log-probs
    that one forward over the episode gives."""
    config = ModelConfig(
        num_layers=2, hidden_size=32, ffn_size=48, num_heads=4, num_kv_heads=2, vocab_size=tokenizer.vocab_size + 1
    )
    model = Decoder(config)
    initialize(model, config, seed=0)
    stops = tuple(range(0, tokenizer.vocab_size, 2))
    sampling = Sampling(max_new_tokens=6, num_samples=3, temperature=1.5, stop_ids=stops)
    groups = run(tokenizer, NativeGenerator(model, 4, "cpu"), "one", "two of them", sampling=sampling, max_turns=3)
    samples = [sample for group in groups for sample in group]
    assert max(len(s.turns()) for s in samples) == 5
    for s in samples:
        expected = torch.where(torch.tensor(s.trained), whole_row_logprobs(model, s, 1.5), 0.0)
        torch.testing.assert_close(torch.tensor(s.logprobs), expected, atol=1e-4, rtol=0)  # fp32, another order of sums
