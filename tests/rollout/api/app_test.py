"""The server, asked by the `openai` client, against the generator itself; and asked by those who mean no good."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch

from llmtrain.rollout.served import ServedModel
from llmtrain.types import Prompt, Sampling
from tests.rollout.api.conftest import NAME, TOKEN, Server

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1? <eos>é"}]
IDS = {"return_token_ids": True}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": "é"}}</tool_call>'


def chat(server: Server, **more: Any) -> Any:
    return server.client.chat.completions.create(**{"model": NAME, "messages": CHAT, "max_tokens": 12, **more})


def complete(server: Server, **more: Any) -> Any:
    return server.client.completions.create(**{"model": NAME, "prompt": "1 + 1 is", "max_tokens": 12, **more})


def post(server: Server, body: bytes, path: str = "/v1/completions", token: str | None = TOKEN) -> tuple[int, Any]:
    """Returns the status and the JSON of what is answered to a raw body."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    connection.request("POST", path, body, {} if token is None else {"Authorization": f"Bearer {token}"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    assert "Traceback" not in text
    return response.status, json.loads(text)


def test_models_and_health(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [m.id for m in server.client.models.list()] == [NAME]

    def health() -> int:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
        connection.request("GET", "/health")
        return connection.getresponse().status

    assert health() == 200
    monkeypatch.setattr(type(server.continuous), "alive", False)
    assert health() == 503


def test_a_chat_is_what_generate_gives(server: Server) -> None:
    answer = chat(server, n=2, seed=7, temperature=1.3, top_p=0.9, extra_body=IDS)
    ids = server.tokenizer.encode_chat(CHAT)
    assert answer.prompt_token_ids == ids and ids.count(server.tokenizer.eos_id) == 0
    sampling = Sampling(12, 2, 1.3, 0.9, stop_ids=server.model.ends)
    (group,) = server.reference.generate([Prompt(ids, 7)], sampling)
    assert [c.token_ids for c in answer.choices] == [s.ids for s in group]
    assert [c.message.content for c in answer.choices] == [server.tokenizer.decode(s.ids) for s in group]
    assert [c.finish_reason for c in answer.choices] == ["stop" if s.finished else "length" for s in group]
    tokens = sum(len(s.ids) for s in group)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), tokens)
    assert chat(server, seed=7, temperature=1.3).choices[0].message.content != chat(server, seed=8).choices[0].message


def test_completions_of_texts_and_ids(server: Server) -> None:
    texts = ["one", "two é"]
    ids = [server.tokenizer.encode(text) for text in texts]
    by_text = complete(server, prompt=texts, n=2, seed=3, extra_body=IDS)
    by_ids = complete(server, prompt=ids, n=2, seed=3, extra_body=IDS)
    groups = server.reference.generate([Prompt(row, 3) for row in ids], Sampling(12, 2, stop_ids=server.model.ends))
    expected = [s.ids for group in groups for s in group]
    assert [c.token_ids for c in by_text.choices] == [c.token_ids for c in by_ids.choices] == expected
    assert [c.prompt_token_ids for c in by_ids.choices] == [ids[0], ids[0], ids[1], ids[1]]
    assert [c.index for c in by_ids.choices] == [0, 1, 2, 3]
    by_text, by_ids = (complete(server, prompt=p, temperature=0).choices[0].text for p in ("one", ids[0]))
    assert by_text == by_ids


def test_a_stop_string_ends_an_answer_and_is_not_shown(server: Server) -> None:
    script = [*server.tokenizer.encode("one two END three"), 1]
    for stream in (False, True):
        server.continuous.script = list(script)
        answer = complete(server, stop=["END", "nix"], stream=stream)
        pieces = [p.choices[0] for p in answer] if stream else answer.choices
        assert "".join(p.text for p in pieces) == "one two " and pieces[-1].finish_reason == "stop"
    free = complete(server, seed=5, max_tokens=40, extra_body=IDS).choices[0]
    stop = next(c for c in free.text[3:] if c != "\ufffd")
    cut = complete(server, seed=5, max_tokens=40, stop=stop, extra_body=IDS).choices[0]
    assert cut.text == free.text[: free.text.index(stop)] and cut.finish_reason == "stop"
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < 40


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_streamed_answer_equals_the_whole(server: Server, logprobs: bool) -> None:
    asked = {"seed": 11, "n": 2, "temperature": 1.5, "max_tokens": 30, "stop": ["a", "zq"]}
    more = {"logprobs": True, "top_logprobs": 2, "extra_body": IDS} if logprobs else {}
    whole = chat(server, **asked, **more)
    pieces = list(chat(server, **asked, **more, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1].usage == whole.usage and not pieces[-1].choices
    for choice in whole.choices:
        own = [p.choices[0] for p in pieces[:-1] if p.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant" and len(own) > 3
        assert "".join(p.delta.content or "" for p in own) == choice.message.content
        assert [p.finish_reason for p in own if p.finish_reason] == [choice.finish_reason]
        if logprobs:
            assert [x for p in own if p.logprobs for x in p.logprobs.content] == choice.logprobs.content
            assert [id_ for p in own if p.logprobs for id_ in p.token_ids] == choice.token_ids
    texts = complete(server, **asked)
    pieces = [p.choices[0] for p in complete(server, **asked, stream=True)]
    for choice in texts.choices:
        assert "".join(p.text for p in pieces if p.index == choice.index) == choice.text


@torch.no_grad()
def test_logprobs_are_those_of_the_model(server: Server) -> None:
    answer = complete(server, echo=True, logprobs=3, temperature=0.5, top_p=0.9, seed=1, extra_body=IDS).choices[0]
    ids = torch.tensor([answer.prompt_token_ids + answer.token_ids])
    logits = server.reference.model(ids[:, :-1], torch.arange(ids.size(1) - 1)[None])[0]
    expected = logits.log_softmax(-1)
    chosen = expected.gather(-1, ids[0, 1:, None])[:, 0]
    told = answer.logprobs
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert told.token_logprobs[1:] == pytest.approx(chosen.tolist(), abs=1e-4)  # fp32, other sums
    for row, top in zip(expected, told.top_logprobs[1:], strict=True):
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)
    assert answer.text.startswith("1 + 1 is") and told.text_offset[:9] == list(range(9))
    said = chat(server, logprobs=True, top_logprobs=1, temperature=0, extra_body=IDS)
    for token, id_ in zip(said.choices[0].logprobs.content, said.choices[0].token_ids, strict=True):
        best = token.top_logprobs[0]
        assert token.logprob == pytest.approx(best.logprob) and token.token == best.token
        assert token.token == server.tokenizer.decode([id_], skip_special=False)
    assert chat(server).choices[0].logprobs is None


def test_our_own_client_of_served_models_is_answered(server: Server) -> None:
    """What `distill` asks of a teacher."""
    teacher, ids = ServedModel(f"{server.url}/v1", NAME, TOKEN), server.tokenizer.encode("a teacher é")
    (logprobs,) = teacher.logprobs([ids])
    told = complete(server, prompt=ids, echo=True, logprobs=0, max_tokens=1).choices[0].logprobs
    assert logprobs == told.token_logprobs[1:-1] and teacher.token_ids(["a é"]) == [server.tokenizer.encode("a é")]


def test_twenty_at_once_are_as_one_after_the_other(server: Server) -> None:
    def ask(i: int) -> list[list[int]]:
        settings = [{}, {"temperature": 0.3, "top_p": 0.8}, {"temperature": 0}, {"n": 2}][i % 4]
        prompt = server.tokenizer.encode("What is it? " * (1 + i % 3))
        answer = complete(server, prompt=prompt, seed=i, max_tokens=8 + 5 * (i % 5), **settings, extra_body=IDS)
        return [c.token_ids for c in answer.choices]

    alone = [ask(i) for i in range(20)]
    server.continuous.most_active = 0
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask, range(20))) == alone
    assert server.continuous.most_active > 4


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_are_told_from_text(server: Server, stream: bool) -> None:
    encode = server.tokenizer.encode
    server.continuous.script = [*encode(f"I add.\n{CALL}\n{CALL}\n"), *server.tokenizer.turn_end_ids]
    answer = chat(server, tools=[TOOL], stream=stream, extra_body=IDS)
    if stream:
        pieces = [p.choices[0] for p in answer]
        text, end = "".join(p.delta.content or "" for p in pieces), pieces[-1].finish_reason
        calls = [c for p in pieces for c in p.delta.tool_calls or []]
        assert [c.index for c in calls] == [0, 1]
    else:
        text, end = answer.choices[0].message.content, answer.choices[0].finish_reason
        calls = answer.choices[0].message.tool_calls
        assert answer.prompt_token_ids == server.tokenizer.encode_chat(CHAT, tools=[TOOL])
    assert (text, end) == ("I add.", "tool_calls") and len({c.id for c in calls}) == 2
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [("add", {"a": 1, "b": "é"})] * 2
    server.continuous.script = [*encode(CALL), 1]
    unasked = chat(server, tools=[TOOL], tool_choice="none").choices[0]
    assert unasked.message.content == CALL and not unasked.message.tool_calls and unasked.finish_reason == "stop"


def test_a_conversation_with_calls_is_rendered(server: Server) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [*CHAT, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "2"}]})
    text = server.tokenizer.decode(chat(server, messages=turns, extra_body=IDS).prompt_token_ids, skip_special=False)
    assert '"arguments": {"a": 1}' in text and "<|im_start|>tool\n2<|im_end|>" in text


def waits_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_who_leaves_frees_the_place(server: Server) -> None:
    """The whole answer would have 4,000 tokens."""
    stream = complete(server, max_tokens=4000, n=3, stream=True, extra_body={"stop_token_ids": [], "temperature": 9})
    next(iter(stream))
    assert server.continuous.sequences > 0
    stream.close()
    assert waits_until(lambda: server.continuous.sequences == 0, 3)
    body = json.dumps({"model": NAME, "prompt": "x", "max_tokens": 4000, "n": 3, "temperature": 9}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n"
    )
    with socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port)) as raw:
        raw.sendall(head.encode() + b"\r\n" + body)
        assert waits_until(lambda: server.continuous.sequences > 0, 3)
    assert waits_until(lambda: server.continuous.sequences == 0, 3)


@pytest.mark.parametrize("events_sent", [0, 1])
def test_who_leaves_is_told_of(events_sent: int) -> None:
    """Also before the first event, when nothing of the generator has run, and while an event is sent."""
    from llmtrain.rollout.api.app import Events

    told, sent = [], []

    async def events() -> AsyncGenerator[str]:
        try:
            while True:
                yield "data: x"
        finally:
            told.append("closed")

    async def receive() -> dict[str, str]:
        while sum(message["type"] == "http.response.body" for message in sent) < events_sent:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        await asyncio.sleep(60 if len(sent) > events_sent else 0)

    async def run() -> list[str]:
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await Events(events(), lambda: told.append("left"))(scope, receive, send)
        return list(told)  # by now, and not when the loop ends

    assert asyncio.run(run()) == ["left", "closed"][: 1 + events_sent]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_thought_calls_nothing(server: Server, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, end = server.tokenizer.encode, server.tokenizer.turn_end_ids
    for prompt, thought in (("a", f"<think>{CALL}</think>"), ("<think>\n", f"{CALL}</think>")):
        monkeypatch.setattr(server.tokenizer, "encode_chat", lambda *args, text=prompt, **more: encode(text))
        server.continuous.script = [*encode(f"{thought}\n{CALL}"), *end]
        answer = chat(server, tools=[TOOL], stream=stream)
        if stream:
            deltas = [piece.choices[0].delta for piece in answer]
            text, calls = "".join(d.content or "" for d in deltas), [c for d in deltas for c in d.tool_calls or []]
        else:
            text, calls = answer.choices[0].message.content, answer.choices[0].message.tool_calls
        assert text == thought and len(calls) == 1


def asked(**more: Any) -> bytes:
    return json.dumps({"model": NAME, "prompt": "a", **more}).encode()


HOSTILE = [
    (b"{", 400, "the body is no valid JSON"),
    (b"\xff\xfe", 400, "the body is no valid JSON"),
    (b"[" * 100_000, 400, "the body is no valid JSON"),
    (b"[]", 422, "body=[]: input should be an object"),
    (b'{"model": "tiny"}', 422, "prompt: is missing; add it"),
    (asked(max_tokens=10**9), 400, "prompt of 1 tokens and max_tokens=1000000000: together they must be at most 4096"),
    (asked(max_tokens=10**30), 422, "max_tokens=1"),
    (asked(max_tokens=0), 422, "max_tokens=0: input should be greater than or equal to 1"),
    (asked(max_tokens="9"), 422, "max_tokens='9': input should be a valid integer"),
    (asked(n=-1), 422, "n=-1: input should be greater than or equal to 1"),
    (asked(n=1000), 422, "n=1000: input should be less than or equal to 128"),
    (asked(n=128, prompt=["a"] * 9), 429, "more than 1024 sequences would wait"),
    (asked(temperature=-1), 422, "temperature=-1: input should be greater than or equal to 0"),
    (asked(temperature=1e-300), 422, "temperature=1e-300: must be 0 (greedy) or at least 1e-06"),
    (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 422, "temperature=nan: input should be a finite number"),
    (asked(prompt=[1, "a"]), 422, "prompt=[1, 'a']: must be a text, a list of token ids"),
    (asked(prompt=[-1]), 422, "prompt=[-1]: must be a text, a list of token ids"),
    (asked(prompt=[260]), 400, "prompt: token 260 must be below 260"),
    (asked(prompt=""), 400, "prompt: has no tokens"),
    (asked(prompt="a" * 2**20), 400, "prompt of 1048576 tokens and max_tokens=16: together"),
    (asked(prompt="a" * 5 * 2**20), 413, "the body has more than 4194304 bytes"),
    (asked(model="gpt-9"), 404, "model='gpt-9': is not served here; ask for 'tiny'"),
    (asked(frequency_penalty=0.5), 422, "frequency_penalty=0.5: is not supported here; leave it out or at 0"),
    (asked(guided_regex="a"), 422, "guided_regex: is not supported here; leave it out"),
    (asked(stop=[""]), 422, "stop[0]='': string should have at least 1 character"),
    (asked(echo=True, stream=True), 422, "echo=true: is not supported with stream=true"),
    (asked(stream_options={"include_usage": True}), 422, "stream_options: is read with stream=true only"),
]


@pytest.mark.parametrize(("body", "status", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_what_cannot_be_answered_is_told_why(server: Server, body: bytes, status: int, message: str) -> None:
    got, answer = post(server, body)
    assert got == status and answer["error"]["message"].startswith(message), answer
    assert answer["error"].keys() == {"message", "type", "param", "code"}


def test_chats_that_cannot_be_answered(server: Server) -> None:
    image = {"type": "image_url", "image_url": {"url": "x"}}
    for more, message in (
        ({"messages": []}, "messages=[]: list should have at least 1 item"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "messages[0].role='judge': input should be 'system'"),
        ({"messages": [{"role": "user", "content": [image]}]}, "part of type 'image_url' is not supported here"),
        ({"tool_choice": "required"}, "tool_choice='required': is not supported here; leave it out or at 'auto' or"),
        ({"response_format": {"type": "json_object"}}, "response_format={'type': 'json_object'}: is not supported"),
        ({"top_logprobs": 2}, "top_logprobs: is read with logprobs=true only"),
        ({"max_completion_tokens": 3}, "max_tokens=12: max_completion_tokens=3 means the same; give one of them"),
    ):
        with pytest.raises(openai.UnprocessableEntityError) as raised:
            chat(server, **more)
        assert message in raised.value.body["message"]
    with pytest.raises(openai.NotFoundError):
        chat(server, model="other")


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], "é", TOKEN.upper()])
def test_a_wrong_token_gets_nothing(server: Server, token: str | None) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, answer = post(server, b"{", path, token)
        assert status == 401 and answer["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0).models.list()


def test_other_paths_and_methods(server: Server) -> None:
    assert post(server, b"", "/v1/embeddings")[0] == 404
    status, answer = post(server, b"", "/v1/models")
    assert status == 405 and "GET /v1/models" in answer["error"]["message"]


def test_a_failure_is_told_without_its_traceback(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise FloatingPointError("secret place")

    with monkeypatch.context() as patched:
        patched.setattr("llmtrain.rollout.native.sample", fail)
        status, answer = post(server, asked())
        assert status == 500 and answer["error"]["message"] == "the server failed; its own output says why"
        with pytest.raises(openai.APIError, match="its own output says why"):
            list(complete(server, stream=True))
    assert server.continuous.sequences == 0
    assert complete(server, temperature=0).choices[0].finish_reason in ("length", "stop")
