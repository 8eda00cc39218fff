"""What a model behind a server says of samples: each trainer asks for its share, and all have the answers to all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llmtrain.data.post import ServerFault
from llmtrain.trainer.served import PROBE, ask_samples, check_served
from llmtrain.types import Group, Sample
from tests.checkpoint.conftest import ThreadGroup, run_ranks


class Server:
    """Gives each token the log-prob -id / 10; fails on sequences that hold the token 66."""

    url = "http://host/v1"

    def __init__(self, more: int = 0, constant: float | None = None) -> None:
        self.asked, self.texts, self.more, self.constant = [], [], more, constant

    def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        self.asked.append(sequences)
        if any(66 in ids for ids in sequences):
            raise ServerFault("no answer")
        return [[-i / 10 if self.constant is None else self.constant for i in ids[1:]] for ids in sequences]

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        self.texts += texts
        return [[*range(2000, 2000 + self.more), *map(ord, text)] for text in texts]


def samples() -> list[Group]:
    """Three groups of two; a tool wrote the second token of each first sample. The last sample of a group has a share
    in the third group alone."""

    def sample(prompt: list[int], ids: list[int], trained: list[bool], share: float) -> Sample:
        return Sample(prompt, ids, trained, [0.0] * len(ids), [0] * len(ids), True, columns={"s": [share] * len(ids)})

    return [
        [sample([g], [g + 1, g + 2, g + 3], [True, False, True], 0.5), sample([g], [g + 5], [True], float(g == 30))]
        for g in (10, 20, 30)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_trainer_has_the_answers_to_the_samples_that_have_a_share(size: int) -> None:
    def action(group: ThreadGroup) -> tuple[list, list]:
        found, server = samples(), Server()
        ask_samples(group, server, found, "t", lambda each: each.columns["s"][0] > 0)
        return [[each.columns["t"] for each in pair] for pair in found], server.asked

    results = run_ranks(size, action)
    first = [[-1.1, 0.0, -1.3], [0.0]], [[-2.1, 0.0, -2.3], [0.0]], [[-3.1, 0.0, -3.3], [-3.5]]
    assert all(said == list(first) for said, _ in results)
    wanted = [[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33], [30, 35]]
    assert [asked for _, (asked,) in results] == [wanted[rank::size] for rank in range(size)]


def test_all_trainers_learn_that_one_got_no_answer() -> None:
    def action(group: ThreadGroup) -> str:
        found = samples()
        found[1][0].ids[0] = 66
        with pytest.raises(OSError, match="rank 2: no answer"):
            ask_samples(group, Server(), found, "t", lambda each: True)
        return "told"

    assert run_ranks(3, action) == ["told"] * 3  # the third sample is rank 2's


def job_on(group: ThreadGroup) -> SimpleNamespace:
    """A job whose tokens are the code points of a text."""
    tokenizer = SimpleNamespace(
        encode=lambda text, parse_special: [*map(ord, text)] * (not parse_special),
        decode=lambda ids: "".join(map(chr, ids)),
        eos_id=7,
    )
    config = SimpleNamespace(rollout=SimpleNamespace(max_new_tokens=2))
    return SimpleNamespace(mesh=group, tokenizer=tokenizer, config=config)


@pytest.mark.parametrize("more", [0, 1, 2])
def test_one_rank_compares_the_ids_of_texts_and_asks_for_the_longest_sequence(more: int) -> None:
    """A token that begins every text is the server's own affair; two are none."""

    def action(group: ThreadGroup) -> tuple[list, list]:
        prompts, server = SimpleNamespace(ids=[[97, 98], [97, 98, 99], [100], *[[101]] * 9]), Server(more)
        if more == 2:
            with pytest.raises(
                ValueError, match=r"rank 0: key=http://host/v1: its .* and \d+ more; both must be equal"
            ):
                check_served(job_on(group), "key", server, prompts)
        else:
            check_served(job_on(group), "key", server, prompts)
        return server.texts, server.asked

    (texts, asked), other = run_ranks(2, action)
    assert other == ([], [])
    assert asked == ([] if more == 2 else [[[*map(ord, PROBE)], [97, 98, 99, 7, 7]]])
    assert texts[1:] == ["ab", "abc", "d", *["e"] * 5]


@pytest.mark.parametrize("constant", [0.0, -2.5])
def test_a_server_whose_log_probs_are_all_the_same_is_no_model(constant: float) -> None:
    def action(group: ThreadGroup) -> str:
        words = rf"rank 0: key=http://host/v1: gives every token of '12345 .* the log-prob {constant:g}, as no .*; mend"
        with pytest.raises(OSError, match=words):
            check_served(job_on(group), "key", Server(constant=constant), SimpleNamespace(ids=[[97, 98]]))
        return "told"

    assert run_ranks(2, action) == ["told"] * 2
