"""Answers HTTP requests in the OpenAI protocol: models, completions, chat completions, health."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llmtrain.observe.log import log
from llmtrain.rollout.api.answers import Answer
from llmtrain.rollout.api.callers import Caller
from llmtrain.rollout.api.choices import Delta
from llmtrain.rollout.api.model import ServedModel
from llmtrain.rollout.api.refused import Refused
from llmtrain.rollout.api.requests import ChatRequest, CompletionRequest, parsed

MOST_BODY_BYTES = 4 * 2**20
DRAINED_BYTES = 64 * 2**20  # of a body that is too long, so that its sender reads the answer
BODY_S = 30.0  # to send a body
GONE = 499  # nobody reads it
INTERNAL = "the server failed; its own output says why"
DONE = "data: [DONE]\n\n"
Result = TypeVar("Result")


CallerOf = Callable[[str], Caller | None]
"""Returns whose token it is; None: nobody's."""


def only(token: str, caller: Caller) -> CallerOf:
    """Returns what knows one token."""
    return lambda given: caller if hmac.compare_digest(given.encode(), token.encode()) else None


def build_app(model: ServedModel, caller_of: CallerOf) -> Starlette:
    """Returns the application. A client must send `Authorization: Bearer` with a token that `caller_of` knows."""
    routes = [
        Route("/health", partial(_told, partial(_health, model)), methods=["GET"]),
        Route("/v1/models", partial(_told, partial(_models, model, caller_of)), methods=["GET"]),
    ]
    for path, kind in (("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)):
        routes.append(Route(path, partial(_told, partial(_generate, model, caller_of, kind)), methods=["POST"]))
    return Starlette(routes=routes, exception_handlers={HTTPException: _http})


async def _told(handler: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
    """Returns what the handler answers, or what it says no with; a failure is told in full here alone."""
    try:
        return await handler(request)
    except Refused as no:
        return JSONResponse(no.body, no.status)
    except ClientDisconnect:
        return Response(status_code=GONE)
    except Exception as error:
        return JSONResponse(_failure(error).body, 500)


def _failure(error: Exception) -> Refused:
    if isinstance(error, Refused):
        return error
    log("".join(traceback.format_exception(error)).rstrip())
    return Refused(500, INTERNAL)


async def _http(request: Request, error: Exception) -> Response:
    """Answers what no route takes."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    rule = {404: "is not there", 405: "does not take this method"}.get(status, "cannot be answered")
    message = f"{request.method} {request.url.path}: {rule}; the server has GET /health, GET /v1/models, POST "
    return JSONResponse(Refused(status, f"{message}/v1/completions, POST /v1/chat/completions").body, status)


async def _health(model: ServedModel, request: Request) -> Response:
    return Response(status_code=200 if model.continuous.alive else 503)


async def _models(model: ServedModel, caller_of: CallerOf, request: Request) -> Response:
    _caller(caller_of, request)
    card = {"id": model.name, "object": "model", "created": model.created, "owned_by": "llmtrain"}
    card["max_model_len"] = model.continuous.max_seq_tokens  # as vLLM tells it
    return JSONResponse({"object": "list", "data": [card]})


async def _generate(
    model: ServedModel, caller_of: CallerOf, kind: type[ChatRequest | CompletionRequest], request: Request
) -> Response:
    """Answers a request for completions or a chat."""
    caller = _caller(caller_of, request)
    asked = parsed(kind, await _body(request))
    try:
        model.check_sampling(caller.sampling(asked, 0), asked.top)
        answer = Answer(model, asked, await run_in_threadpool(caller.prompts, asked))
        if not asked.stream:
            return JSONResponse(await _unless_gone(request, _whole(answer, caller)))
    except BaseException:
        caller.left(asked)
        raise
    return Events(_events(answer, caller), partial(caller.left, asked))


def _caller(caller_of: CallerOf, request: Request) -> Caller:
    """Returns who asks. Raises Refused when the token is not known."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    caller = caller_of(token.strip()) if kind.lower() == "bearer" else None
    if caller is None:
        message = "Authorization: must be `Bearer TOKEN` with the token that the server was started with; send that"
        raise Refused(401, message, code="invalid_api_key")
    return caller


async def _body(request: Request) -> bytes:
    """Returns the body. Raises Refused when it is too long, or does not come in time."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= MOST_BODY_BYTES:
                    body += chunk
                elif size > DRAINED_BYTES:
                    break
    except TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_S:g} s; send it at once") from None
    if size > MOST_BODY_BYTES:
        raise Refused(413, f"the body has more than {MOST_BODY_BYTES} bytes, the most that is read; send less")
    return bytes(body)


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Returns what comes of the work, which ends when the client leaves. Raises ClientDisconnect then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task  # it frees its places


class Events(StreamingResponse):
    """Streams events, and tells when nobody gets any more of them, also where the client has left before the first."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str], ended: Callable[[], None]) -> None:
        super().__init__(events)
        self.events, self.ended = events, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ended()
            await self.events.aclose()  # which frees its places


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _deltas(answer: Answer, caller: Caller) -> AsyncIterator[tuple[int, Delta]]:
    """Yields what each token adds to which choice, and tells the caller of choices that are complete."""
    wholes = [Delta() for _ in answer.choices]
    try:
        async with contextlib.aclosing(answer.model.tokens(answer.asked, answer.prompts, caller)) as tokens:
            async for number, token in tokens:
                delta, whole = answer.choices[number].push(token), wholes[number]
                whole.add(delta)
                if delta.end:
                    caller.heard(answer.asked, answer.prompt_of(number), whole)
                yield number, delta
    finally:
        caller.left(answer.asked)


async def _whole(answer: Answer, caller: Caller) -> dict[str, Any]:
    """Returns the answer when all choices are complete."""
    asked, wholes = answer.asked, [Delta() for _ in answer.choices]
    if isinstance(asked, CompletionRequest) and asked.echo and asked.top is not None:
        answer.prompt_tokens = [await answer.model.echoed(ids, asked.top) for ids in answer.prompts]
    async for number, delta in _deltas(answer, caller):
        wholes[number].add(delta)
    return answer.whole(wholes)


async def _events(answer: Answer, caller: Caller) -> AsyncGenerator[str]:
    """Yields the answer piece by piece, as server-sent events."""
    count = 0
    try:
        async with contextlib.aclosing(_deltas(answer, caller)) as deltas:
            async for number, delta in deltas:
                count += 1
                for piece in answer.pieces(number, delta):
                    yield _event(piece)
        if answer.asked.stream_options and answer.asked.stream_options.include_usage:
            yield _event({**answer.head(chunk=True), "choices": [], "usage": answer.usage(count)})
    except Exception as error:  # the status is sent already
        yield _event(_failure(error).body)
    yield DONE


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
