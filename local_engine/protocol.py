"""Owns what callers may send: bodies and headers, parsed once into frozen types; refuses I/O and to repeat any value.

All problems of a body are reported at once, each with its place. What OpenAI defines but this engine does not do is
refused by name; fields that nobody defines are ignored, and named for the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from local_engine.conversation import Body, ChatShape, Conversation, Tools
from local_engine.errors import InvalidRequest
from local_engine.grammar import GrammarKind, Wanted

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 500
"""Of one stop string. Every token is compared with all beginnings of all stop strings, on the engine's thread."""
LARGEST_TOP_K = 2**31
"""Larger than any vocabulary, and still an index."""
MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_PROBLEMS_SHOWN = 20
MAX_REQUEST_ID_LENGTH = 128
MAX_FIELD_NAME_LENGTH = 40

REFUSED: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
}
"""Fields that are not built, each with the values that ask for nothing; null always does."""

REFUSED_IN_COMPLETIONS: dict[str, tuple[object, ...]] = {"tools": ([],), "tool_choice": ("none", "auto")}


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


_B = TypeVar("_B", bound=Body)


class _StreamOptions(Body):
    include_usage: bool = False


def _biases(value: object) -> object:
    """Token ids, which are text in JSON, and how much is added to their logits."""
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise PydanticCustomError("bias", "must be an object of at most {most} token ids", {"most": MAX_BIASES})
    biases = []
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal()) or isinstance(bias, bool) or not isinstance(bias, int | float):
            raise PydanticCustomError("bias", "must hold token ids and numbers")
        if not -100 <= bias <= 100:
            raise PydanticCustomError("bias", "must hold numbers from -100 to 100")
        biases.append((int(token), float(bias)))
    return tuple(biases)


class _Schema(Body):
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class _ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None

    @model_validator(mode="after")
    def _complete(self) -> _ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("format", "`json_schema` goes with the type json_schema, and that with it")
        return self


class _Structured(Body):
    """vLLM's `structured_outputs`."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _one(self) -> _Structured:
        if sum(given is not None for given in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise PydanticCustomError("structured", "give one of json, regex, choice and grammar")
        return self


class _Generation(Body):
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop)] = ()
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[tuple[tuple[int, float], ...], BeforeValidator(_biases)] = ()
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    response_format: _ResponseFormat | None = None
    structured_outputs: _Structured | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    guided_grammar: str | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @model_validator(mode="after")
    def _one_structure(self) -> _Generation:
        formatted = self.response_format is not None and self.response_format.type != "text"
        guided = (self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        if formatted + (self.structured_outputs is not None) + sum(given is not None for given in guided) > 1:
            raise PydanticCustomError("structure", "the answer's structure is asked for more than once")
        return self


class _Chat(ChatShape, _Generation):
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _logprobs_first(self) -> _Chat:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("logprobs", "`top_logprobs` needs `logprobs`: true")
        return self

    @property
    def told(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class _Completion(_Generation):
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    prompt: Annotated[str | tuple[int, ...], BeforeValidator(_prompt)]


CHAT_FIELDS = frozenset(_Chat.model_fields) | frozenset(REFUSED)
COMPLETION_FIELDS = frozenset(_Completion.model_fields) | frozenset(REFUSED) | frozenset(REFUSED_IN_COMPLETIONS)
"""What a body may hold with a meaning, be it to be refused."""


class _Tokenize(Body):
    prompt: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A parsed body. Invariant: every value is in range.

    `prompt` is a conversation (chat), text or token ids (completions); `max_tokens` None leaves it to the engine.
    `ignored` are the names of fields that nobody defines here, as far as they are names (letters, digits, _).
    """

    model: str | None
    prompt: Conversation | str | tuple[int, ...]
    chat: bool
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    n: int = 1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    structure: Wanted | None = None
    cache_salt: str = ""
    tools: Tools | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """A text or a conversation whose tokens are asked for."""

    prompt: Conversation | str
    special_tokens: bool


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the headers ask for: lower priority goes first; `first_token_by` is in seconds."""

    priority: int = 0
    first_token_by: float | None = None


def parse_chat(body: bytes) -> GenerationRequest:
    """A body of /v1/chat/completions. Raises InvalidRequest."""
    raw = parse_object(body)
    chat = validated(_Chat, raw)
    tools = chat.callable_tools()
    return _generation(chat, chat.conversation(), chat.told, _ignored(raw, CHAT_FIELDS), chat=True, tools=tools)


def parse_completion(body: bytes) -> GenerationRequest:
    """A body of /v1/completions. Raises InvalidRequest."""
    raw = parse_object(body)
    completion = validated(_Completion, raw)
    ignored = _ignored(raw, COMPLETION_FIELDS)
    return _generation(completion, completion.prompt, completion.logprobs, ignored, chat=False)


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """A body of /tokenize. Raises InvalidRequest."""
    raw = parse_object(body)
    if (raw.get("messages") is None) == (raw.get("prompt") is None):
        raise InvalidRequest("give either `messages` or `prompt`")
    if raw.get("prompt") is None:
        return TokenizeRequest(validated(ChatShape, raw).conversation(), special_tokens=False)
    asked = validated(_Tokenize, raw)
    return TokenizeRequest(asked.prompt, asked.add_special_tokens)


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


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is. Raises InvalidRequest."""
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


def validated(form: type[_B], raw: dict[str, Any]) -> _B:
    """The body as that form. Raises InvalidRequest with all that is wrong, each with its place."""
    refused = REFUSED if issubclass(form, _Generation) else {}
    if form is _Completion:
        refused = refused | REFUSED_IN_COMPLETIONS
    problems = [
        (name, "is not supported by this engine")
        for name, neutral in refused.items()
        if not _asks_nothing(raw.get(name), neutral)
    ]
    parsed = None
    try:
        parsed = form.model_validate(raw)
    except ValidationError as error:
        problems += [
            (_place(found["loc"]), "must be an object" if found["type"] == "model_type" else found["msg"])
            for found in error.errors(include_url=False, include_input=False, include_context=False)
        ]
    if parsed is None or problems:
        shown = "; ".join(f"{place}: {said}" if place else said for place, said in problems[:MAX_PROBLEMS_SHOWN])
        more = len(problems) - MAX_PROBLEMS_SHOWN
        raise InvalidRequest(shown + (f"; and {more} more" if more > 0 else ""), param=problems[0][0] or None)
    return parsed


def _ignored(raw: Mapping[str, Any], known: frozenset[str]) -> tuple[str, ...]:
    """Fields that change nothing. A name that is none could be content, so it is not among them."""
    return tuple(
        sorted(name for name in raw.keys() - known if name.isidentifier() and len(name) <= MAX_FIELD_NAME_LENGTH)
    )


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


def _structure(body: _Generation) -> Wanted | None:
    """What the answer must look like, whoever's words ask for it."""
    if (asked := body.response_format) is not None:
        if asked.json_schema is not None:
            return Wanted("json_schema", _written(asked.json_schema.schema_, "response_format"), "response_format")
        return Wanted.json_object() if asked.type == "json_object" else None
    if (given := body.structured_outputs) is not None:
        forms = (given.json_, given.regex, given.choice, given.grammar)
        names = ["structured_outputs"] * 4
    else:
        forms = (body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)
        names = ["guided_json", "guided_regex", "guided_choice", "guided_grammar"]
    kinds: tuple[GrammarKind, ...] = ("json_schema", "regex", "choice", "lark")
    for kind, form, name in zip(kinds, forms, names, strict=True):
        if form is not None:
            return Wanted(kind, form if isinstance(form, str) else _written(form, name), name)
    return None


def _written(structure: object, name: str) -> str:
    """As JSON. Raises InvalidRequest."""
    try:
        return orjson.dumps(structure).decode()
    except orjson.JSONEncodeError:  # what orjson reads may be nested four times as deep
        raise InvalidRequest(f"{name}: is nested too deeply", param=name) from None


def _generation(
    body: _Generation,
    prompt: Conversation | str | tuple[int, ...],
    logprobs: int | None,
    ignored: tuple[str, ...],
    *,
    chat: bool,
    tools: Tools | None = None,
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
        n=body.n or 1,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias,
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        structure=_structure(body),
        cache_salt=body.cache_salt or "",
        tools=tools,
        ignored=ignored,
    )
