"""Defines what may be asked of the server: the parameters of the OpenAI protocol that it obeys, and some that vLLM
adds. All others are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from llmtrain.config.section import LEAST_TEMPERATURE, Section
from llmtrain.rollout.api.refused import Refused

SHOWN_CHARACTERS = 60  # of a wrong value
FAULTS = 5  # told of a request
UNKNOWN = "is not supported here; leave it out"


def neutral(*values: Any) -> Any:
    """Returns the type of a parameter that must be left alone: null, or one of the values that change nothing."""

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            rule = f"{UNKNOWN} or at {' or '.join(map(repr, values))}"
            raise PydanticCustomError("neutral", "{rule}", {"rule": rule})
        return value

    return Annotated[Any, AfterValidator(check)]


def _temperature(value: float) -> float:
    """Returns a temperature that fp32 can divide by, or 0."""
    if 0 < value < LEAST_TEMPERATURE:
        rule = f"must be 0 (greedy) or at least {LEAST_TEMPERATURE:g}; set 0 for the likeliest token"
        raise PydanticCustomError("temperature", "{rule}", {"rule": rule})
    return value


def _texts(value: Any) -> Any:
    """Returns a list of texts; one text is a list of one."""
    return [value] if isinstance(value, str) else [] if value is None else value


def _prompts(value: Any) -> Any:
    """Returns a list of prompts, each a text or token ids."""
    prompts = [value] if isinstance(value, str) or (isinstance(value, list) and _ids(value)) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or _ids(p) for p in prompts):
        rule = "must be a text, a list of token ids, or a list of texts or of such lists, none of them empty"
        raise PydanticCustomError("prompt", "{rule}", {"rule": rule})
    return prompts


def _ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < 2**31 for i in value)


Token = Annotated[int, Field(ge=0, lt=2**31)]
Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]
Tokens = Annotated[int, Field(ge=1, lt=2**31)]


class StreamOptions(Section):
    """Configures what a stream tells beside the answer."""

    include_usage: bool = False


class Asked(Section):
    """Holds the parameters that both endpoints have."""

    model_config = ConfigDict(strict=True)

    model: str
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(_temperature)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # vLLM; -1 and 0: all
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[Stops, BeforeValidator(_texts)] = Field([])
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None  # vLLM
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool = True  # vLLM
    return_token_ids: bool | None = None  # vLLM
    return_tokens_as_token_ids: bool | None = None  # vLLM
    user: str | None = None  # who asks, for the one who serves; changes no answer
    frequency_penalty: neutral(0) = None
    presence_penalty: neutral(0) = None
    logit_bias: neutral({}) = None

    @property
    def wanted(self) -> int | None:
        """Returns the most tokens of an answer that are asked for, if that is said."""
        return self.max_tokens


class CompletionRequest(Asked):
    """Holds a request for completions of texts or token ids."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts), Field(max_length=1024)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    add_special_tokens: bool = True  # vLLM: what the tokenizer puts before a text
    best_of: neutral(1) = None
    suffix: neutral("") = None

    @property
    def limit(self) -> int:
        """Returns the most tokens of an answer."""
        return self.max_tokens or 16  # as in the protocol

    @property
    def top(self) -> int | None:
        """Returns how many of the likeliest tokens are wanted; None: no log-probs at all."""
        return self.logprobs


class Function(Section):
    """Holds what a tool call names; templates read more of it."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str


class Tool(Section):
    """Holds a function that the model may call."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"]
    function: Function


class SaidCall(Section):
    """Holds a call that the assistant has made; `arguments` is JSON."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Turn(Section):
    """Holds a message; what else it has, the chat template may read."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[SaidCall] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        """Returns the text of parts."""
        if not isinstance(content, list):
            return content
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                rule = f"part of type {shown(kind)} is not supported here; send parts of type 'text' alone"
                raise PydanticCustomError("part", "{rule}", {"rule": rule})
        return "".join(part["text"] for part in content)


class ChatRequest(Asked):
    """Holds a request for the next turn of a conversation."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    tools: list[Tool] | None = None
    tool_choice: neutral("auto", "none") = None
    parallel_tool_calls: neutral(True) = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: neutral({"type": "text"}) = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM

    @property
    def wanted(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit(self) -> int | None:
        """Returns the most tokens of an answer; None = as many as there is room for."""
        return self.wanted

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """Returns the tools that the template shows; None where none may be called."""
        return [t.model_dump() for t in self.tools] if self.tools and self.tool_choice != "none" else None


Kind = TypeVar("Kind", CompletionRequest, ChatRequest)


def parsed(kind: type[Kind], body: bytes) -> Kind:
    """Returns the request in a body. Raises Refused: 400 where it is no JSON, 422 for parameters that it cannot have,
    with all of them (at most `FAULTS`)."""
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False)
        if found[0]["type"] == "json_invalid":
            raise Refused(400, f"the body is no valid JSON: {found[0]['msg']}; mend it") from None
        faults = list(dict.fromkeys(map(_fault, found)))
        more = f"; and {len(faults) - FAULTS} more" if len(faults) > FAULTS else ""
        raise Refused(422, "; ".join(faults[:FAULTS]) + more, _place(found[0])) from None
    _refuse_together(asked)
    return asked


def _refuse_together(asked: CompletionRequest | ChatRequest) -> None:
    """Raises Refused for parameters that do not go together."""
    if asked.stream_options is not None and not asked.stream:
        raise Refused(422, "stream_options: is read with stream=true only; leave it out", "stream_options")
    if isinstance(asked, CompletionRequest) and asked.echo and asked.stream:
        raise Refused(422, "echo=true: is not supported with stream=true; leave one of them out", "echo")
    if not isinstance(asked, ChatRequest):
        return
    if asked.top_logprobs is not None and not asked.logprobs:
        raise Refused(422, "top_logprobs: is read with logprobs=true only; set it", "top_logprobs")
    both = asked.max_tokens, asked.max_completion_tokens
    if None not in both and both[0] != both[1]:
        message = f"max_tokens={both[0]}: max_completion_tokens={both[1]} means the same; give one of them"
        raise Refused(422, message, "max_tokens")


def _fault(error: Any) -> str:
    place, message = _place(error), str(error["msg"])
    if error["type"] == "extra_forbidden":
        return f"{place}: {UNKNOWN}"
    if error["type"] == "missing":
        return f"{place}: is missing; add it"
    return f"{place}={shown(error['input'])}: {message[0].lower()}{message[1:]}"


def _place(error: Any) -> str:
    """Returns the name of a parameter. Example: messages[0].role"""
    words = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]]
    return "".join(words).removeprefix(".") or "body"


def shown(value: Any) -> str:
    """Returns the beginning of a value, for people."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
