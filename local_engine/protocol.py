"""Owns what callers may send: bodies and headers, parsed once into frozen types; refuses I/O and to repeat any value.

All problems of a body are reported at once, each with its place. What OpenAI defines but this engine does not do is
refused by name; fields that nobody defines are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from local_engine.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 500
"""Of one stop string. Every token is compared with all beginnings of all stop strings, on the engine's thread."""
LARGEST_TOP_K = 2**31
"""Larger than any vocabulary, and still an index."""
MAX_PROBLEMS_SHOWN = 20
MAX_REQUEST_ID_LENGTH = 128

REFUSED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "min_p": (0, 0.0),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
}
"""Fields that are not built, each with the values that ask for nothing; null always does."""


def _text(value: object) -> str:
    """Message content: a string, or a list of text parts, which are joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise PydanticCustomError(
                "content", "part {index} is not of type text, the only one served", {"index": index}
            )
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("content", "part {index} has no string `text`", {"index": index})
        texts.append(part["text"])
    return "".join(texts)


def _stop(value: object) -> object:
    """Stop strings as a tuple, whether one came or several."""
    stop = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(stop, list | tuple) or not all(isinstance(item, str) and item for item in stop):
        raise PydanticCustomError("stop", "must be a string or a list of strings, none of them empty")
    if len(stop) > MAX_STOP_STRINGS:
        raise PydanticCustomError("stop", "has more than {most} strings", {"most": MAX_STOP_STRINGS})
    if any(len(item) > MAX_STOP_CHARACTERS for item in stop):
        raise PydanticCustomError("stop", "has a string longer than {most} characters", {"most": MAX_STOP_CHARACTERS})
    return tuple(stop)


def _prompt(value: object) -> object:
    """A completion's prompt: text, a list of one text, or a list of token ids."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    if isinstance(value, list) and value and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    if isinstance(value, str):
        return value
    raise PydanticCustomError("prompt", "must be one string or one list of token ids (several prompts are not served)")


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


_B = TypeVar("_B", bound=_Body)


class _Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]

    @model_validator(mode="before")
    @classmethod
    def _no_tools(cls, value: object) -> object:
        if isinstance(value, dict) and (value.get("tool_calls") or value.get("function_call")):
            raise PydanticCustomError("tools", "tool calls are not supported by this engine")
        return value


class _StreamOptions(_Body):
    include_usage: bool = False


class _Generation(_Body):
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop)] = ()
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class _Chat(_Generation):
    messages: Annotated[list[_Message], Field(min_length=1)]


class _Completion(_Generation):
    prompt: Annotated[str | tuple[int, ...], BeforeValidator(_prompt)]


class _Tokenize(_Body):
    messages: Annotated[list[_Message], Field(min_length=1)] | None = None
    prompt: str | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one(self) -> _Tokenize:
        if (self.messages is None) == (self.prompt is None):
            raise PydanticCustomError("tokenize", "give either `messages` or `prompt`")
        return self


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A parsed body. Invariant: every value is in range.

    `prompt` is a conversation (chat), text or token ids (completions); `max_tokens` None leaves it to the engine.
    """

    model: str | None
    prompt: tuple[Message, ...] | str | tuple[int, ...]
    chat: bool
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """A text or a conversation whose tokens are asked for."""

    prompt: tuple[Message, ...] | str
    special_tokens: bool


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the headers ask for: lower priority goes first; `first_token_by` is in seconds."""

    priority: int = 0
    first_token_by: float | None = None


def parse_chat(body: bytes) -> GenerationRequest:
    """A body of /v1/chat/completions. Raises InvalidRequest."""
    raw = _object(body)
    chat = _validated(_Chat, raw)
    return _generation(chat, _messages(chat.messages), chat=True)


def parse_completion(body: bytes) -> GenerationRequest:
    """A body of /v1/completions. Raises InvalidRequest."""
    raw = _object(body)
    completion = _validated(_Completion, raw)
    return _generation(completion, completion.prompt, chat=False)


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """A body of /tokenize. Raises InvalidRequest."""
    asked = _validated(_Tokenize, _object(body))
    prompt = asked.prompt if asked.prompt is not None else _messages(asked.messages or [])
    return TokenizeRequest(prompt, asked.add_special_tokens)


def parse_wishes(headers: Mapping[str, str]) -> Wishes:
    """Priority and deadline from the headers (lower-case names). Raises InvalidRequest."""
    priority, by = headers.get("x-hybridgate-priority"), headers.get("x-hybridgate-first-token-by")
    wishes = Wishes(
        priority=0 if priority is None else int(_number(priority, int, "x-hybridgate-priority", "an integer")),
        first_token_by=None if by is None else _number(by, float, "x-hybridgate-first-token-by", "a number") / 1000,
    )
    if wishes.first_token_by is not None and wishes.first_token_by <= 0:
        raise InvalidRequest(
            "x-hybridgate-first-token-by must be above 0 (milliseconds)", param="x-hybridgate-first-token-by"
        )
    return wishes


def parse_request_id(headers: Mapping[str, str]) -> str | None:
    """The caller's request id, if it is one that may go into a header and a log."""
    request_id = headers.get("x-request-id", "")
    fit = 0 < len(request_id) <= MAX_REQUEST_ID_LENGTH and request_id.isascii() and request_id.isprintable()
    return request_id if fit else None


def _object(body: bytes) -> dict[str, Any]:
    try:
        raw = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # The decoder's text names a place, and no content.
        raise InvalidRequest(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    if not isinstance(raw, dict):
        raise InvalidRequest("the body is not a JSON object")
    return raw


def _validated(form: type[_B], raw: dict[str, Any]) -> _B:
    problems = [
        (name, "is not supported by this engine")
        for name, neutral in REFUSED.items()
        if issubclass(form, _Generation) and not _asks_nothing(raw.get(name), neutral)
    ]
    parsed = None
    try:
        parsed = form.model_validate(raw)
    except ValidationError as error:
        problems += [
            (_place(found["loc"]), found["msg"])
            for found in error.errors(include_url=False, include_input=False, include_context=False)
        ]
    if parsed is None or problems:
        shown = "; ".join(f"{place}: {said}" if place else said for place, said in problems[:MAX_PROBLEMS_SHOWN])
        more = len(problems) - MAX_PROBLEMS_SHOWN
        raise InvalidRequest(shown + (f"; and {more} more" if more > 0 else ""), param=problems[0][0] or None)
    return parsed


def _asks_nothing(value: object, neutral: tuple[object, ...]) -> bool:
    # True == 1 in Python, not in JSON.
    return value is None or any(type(value) is type(known) and value == known for known in neutral)


def _place(location: tuple[int | str, ...]) -> str:
    place = ""
    for step in location:
        place += f"[{step}]" if isinstance(step, int) else f".{step}" if place else step
    return place


def _number(text: str, kind: type[int] | type[float], header: str, wanted: str) -> float:
    try:
        number = kind(text)
        if abs(number) <= 2**31:  # which nan and inf are not
            return number
    except ValueError:
        pass
    raise InvalidRequest(f"{header} must be {wanted}", param=header)


def _messages(messages: list[_Message]) -> tuple[Message, ...]:
    # `developer` is OpenAI's newer word for what templates call system.
    return tuple(Message("system" if m.role == "developer" else m.role, m.content) for m in messages)


def _generation(
    body: _Generation, prompt: tuple[Message, ...] | str | tuple[int, ...], *, chat: bool
) -> GenerationRequest:
    return GenerationRequest(
        model=body.model,
        prompt=prompt,
        chat=chat,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=min(max(0, body.top_k or 0), LARGEST_TOP_K),
        seed=body.seed,
        stop=body.stop,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )
