"""Log-probs of given tokens from a server that speaks the completions protocol; what no server may get away with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from llmtrain.data.post import ServerFault
from llmtrain.rollout.served import ServedModel, read_logprobs
from tests.servers import Answer, reply, serving

IDS = [5, 7, 9]
FAULTS: dict[str, tuple[Callable[[dict], object], str]] = {
    "too few": (lambda c: c["logprobs"].update(token_logprobs=[None, -1]), "answers with 2 log-probs to 3 tokens"),
    "too many": (lambda c: c["logprobs"]["token_logprobs"].append(-1), "with 5 log-probs to 3 tokens"),
    "none": (lambda c: c.update(logprobs=None), "answers with no log-probs to 3 tokens; it must give one of each"),
    "a first one": (lambda c: set_value(c, -2.5, 0), "the log-prob of the first token is -2.5, and must be null, as"),
    "shifted": (lambda c: c["logprobs"]["token_logprobs"].pop(0), "of the first token is -0.7, and must be null"),
    "no list": (lambda c: c["logprobs"].update(token_logprobs={}), "answers with no log-probs"),
    "NaN": (lambda c: set_value(c, float("nan")), "the log-prob of token 7 at 1 is nan, and must be a number above"),
    "infinite": (lambda c: set_value(c, -float("inf")), "is -inf, and must"),
    "clamped": (lambda c: set_value(c, -9999.0), "is -9999.0, and must be a number above -9999 and at most 0"),
    "positive": (lambda c: set_value(c, 0.01), "token 7 at 1 is 0.01"),
    "a logit": (lambda c: set_value(c, 10**400), "is 1000"),
    "null": (lambda c: set_value(c, None), "token 7 at 1 is None"),
    "true": (lambda c: set_value(c, True), "is True"),
    "text": (lambda c: set_value(c, "-1"), "token 7 at 1 is -1, and"),
    "other ids": (lambda c: c.update(prompt_token_ids=[5, 7, 8]), "answers for other token ids than were sent"),
    "one id more": (lambda c: c.update(prompt_token_ids=[2, 5, 7, 9]), "answers for other token ids"),
    "no ids": (lambda c: c.pop("prompt_token_ids"), "without the ids of the prompt's tokens (prompt_token_ids)"),
    "ids as text": (lambda c: c.update(prompt_token_ids=["5", "7", "9"]), "without the ids"),
    "others by name": (lambda c: c["logprobs"].update(tokens=["token_id:5", "token_id:8", "token_id:9"]), "of other"),
    "fewer names": (lambda c: c["logprobs"].update(tokens=["token_id:5"]), "gives the log-probs of other tokens"),
}


def choice_of(ids: list[int]) -> dict[str, Any]:
    """What vLLM answers: each token has the log-prob -id / 10, and so has the token 3, which it samples."""
    logprobs = {
        "token_logprobs": [None, *(-i / 10 for i in [*ids[1:], 3])],
        "tokens": [f"token_id:{i}" for i in [*ids, 3]],
        "top_logprobs": [None] * (len(ids) + 1),
        "text_offset": [0] * (len(ids) + 1),
    }
    return {"index": 0, "text": "", "logprobs": logprobs, "prompt_token_ids": ids, "token_ids": [3]}


def set_value(choice: dict[str, Any], value: object, place: int = 1) -> None:
    choice["logprobs"]["token_logprobs"][place] = value


def completing(change: Callable[[dict], object] = lambda choice: None) -> Answer:
    """Answers as a server does that `change`s each choice."""

    def answer(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        choice = choice_of(body["prompt"][0] if isinstance(body["prompt"], list) else [1, *map(ord, body["prompt"])])
        change(choice)
        reply(handler, 200, {"object": "text_completion", "choices": [choice]})

    return answer


def test_what_is_asked_and_what_comes_back() -> None:
    with serving(completing()) as server:
        model = ServedModel(f"{server.url}/", "teacher", "secret", threads=1)
        assert model.logprobs([[5, 7, 9], [4, 1]]) == [[-0.7, -0.9], [-0.1]]
        assert model.logprobs([]) == [] and model.token_ids(["ab"]) == [[1, 97, 98]]
    assert [path for path, _, _ in server.asked] == ["/v1/completions"] * 3
    assert server.asked[0][1]["Authorization"] == "Bearer secret" and "secret" not in repr(model)
    assert server.asked[0][2] == {
        **{"model": "teacher", "prompt": [[5, 7, 9]], "echo": True, "max_tokens": 1, "logprobs": 1},
        **{"temperature": 1.0, "return_token_ids": True, "return_tokens_as_token_ids": True},
        "add_special_tokens": False,
    }
    assert server.asked[2][2]["prompt"] == "ab"


def test_the_sampled_token_may_be_missing_and_rounding_is_no_fault() -> None:
    """And SGLang gives the texts of tokens."""
    choice = choice_of(IDS)
    choice["logprobs"] |= {"token_logprobs": [None, 1e-4, -3], "tokens": ["a", "b", "token_id:"]}
    assert read_logprobs("url", choice, IDS) == [0.0, -3.0]


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_does_not_fit_is_an_error(fault: str) -> None:
    change, words = FAULTS[fault]
    with serving(completing(change)) as server, pytest.raises(ServerFault) as found:
        ServedModel(server.url, "teacher").logprobs([IDS])
    assert words in str(found.value) and str(found.value).startswith(server.url)


@pytest.mark.parametrize("answer", [[], {}, {"choices": []}, {"choices": [1]}, {"choices": [{}, {}]}, None, "text"])
def test_an_answer_that_is_no_completion(answer: object) -> None:
    with serving(lambda h, _: reply(h, 200, answer)) as server, pytest.raises(ServerFault, match="without a complet"):
        ServedModel(server.url, "teacher").logprobs([IDS])


def test_answers_are_bounded_by_what_was_asked() -> None:
    """1 KiB for each of three tokens and 64 KiB beside them."""
    for size, fits in ((66_000, True), (70_000, False)):
        with serving(completing(lambda c, size=size: c.update(text="x" * size))) as server:
            model = ServedModel(server.url, "teacher")
            if fits:
                assert model.logprobs([IDS]) == [[-0.7, -0.9]]
                continue
            with pytest.raises(ServerFault, match="more than 68608 bytes"):
                model.logprobs([IDS])


def test_so_many_requests_at_once_and_one_deadline_for_all() -> None:
    under_way, most, lock = [0], [0], threading.Lock()

    def slowly(choice: dict[str, Any]) -> None:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.1)
        with lock:
            under_way[0] -= 1

    sequences = [[i, i + 1] for i in range(1, 10)]
    with serving(completing(slowly)) as server:
        found = ServedModel(server.url, "teacher", threads=3, deadline_s=20).logprobs(sequences)
        assert found == [[-(i + 1) / 10] for i in range(1, 10)] and most == [3]
        start = time.monotonic()
        with pytest.raises(ServerFault, match="until the deadline"):
            ServedModel(server.url, "teacher", threads=1, deadline_s=0.25).logprobs(sequences * 3)
        assert time.monotonic() - start < 2 and len(server.asked) < 9 + 9
