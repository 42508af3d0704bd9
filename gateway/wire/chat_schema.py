"""What OpenAI defines of a chat completion request, as types, and `problems`: everything in a body that contradicts it.

Owns field types, ranges and enumerations (platform.openai.com/docs/api-reference/chat/create), and the sentences that
say what is wrong. Fields that are not listed are allowed at every level. Refuses to convert: a body is valid as it is,
or not at all ("1" is no number).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    TypeAdapter,
    ValidationError,
    with_config,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import TypedDict

MOST_PROBLEMS = 10
MOST_MESSAGES = 16_384  # more than any window holds; a bound on what validating and listing errors may cost

# hide_input_in_errors: what a caller sent must not reach a log through an exception's text either.
_OPEN = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)

_Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
_AtLeastOne = Annotated[int, Field(ge=1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_NonEmpty = Annotated[str, StringConstraints(min_length=1)]


@with_config(_OPEN)
class _TextPart(TypedDict):
    type: str
    text: str


@with_config(_OPEN)
class _RefusalPart(TypedDict):
    type: str
    refusal: str


@with_config(_OPEN)
class _ImageUrl(TypedDict):
    url: str
    detail: NotRequired[str | None]


@with_config(_OPEN)
class _ImagePart(TypedDict):
    type: str
    image_url: _ImageUrl


@with_config(_OPEN)
class _InputAudio(TypedDict):
    data: str
    format: str


@with_config(_OPEN)
class _AudioPart(TypedDict):
    type: str
    input_audio: _InputAudio


@with_config(_OPEN)
class _FilePart(TypedDict):
    type: str
    file: dict[str, Any]


@with_config(_OPEN)
class _OtherPart(TypedDict):
    type: _NonEmpty


_PART_TYPES = frozenset({"text", "refusal", "image_url", "input_audio", "file"})


def _part_tag(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    return f"#{kind}" if isinstance(kind, str) and kind in _PART_TYPES else "#other"


_Part = Annotated[
    Annotated[_TextPart, Tag("#text")]
    | Annotated[_RefusalPart, Tag("#refusal")]
    | Annotated[_ImagePart, Tag("#image_url")]
    | Annotated[_AudioPart, Tag("#input_audio")]
    | Annotated[_FilePart, Tag("#file")]
    | Annotated[_OtherPart, Tag("#other")],
    Discriminator(_part_tag),
]
_Parts = Annotated[list[_Part], Field(fail_fast=True, min_length=1)]


@with_config(_OPEN)
class _FunctionCall(TypedDict):
    name: str
    arguments: str


@with_config(_OPEN)
class _ToolCall(TypedDict):
    id: NotRequired[str | None]
    type: NotRequired[str | None]
    function: NotRequired[_FunctionCall | None]


@with_config(_OPEN)
class _Message(TypedDict):
    """System, developer and user messages say something."""

    role: Literal["system", "developer", "user"]
    content: str | _Parts
    name: NotRequired[str | None]


@with_config(_OPEN)
class _AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: NotRequired[str | _Parts | None]
    name: NotRequired[str | None]
    refusal: NotRequired[str | None]
    audio: NotRequired[dict[str, Any] | None]
    tool_calls: NotRequired[Annotated[list[_ToolCall], Field(fail_fast=True)] | None]
    function_call: NotRequired[_FunctionCall | None]


@with_config(_OPEN)
class _ToolMessage(TypedDict):
    role: Literal["tool"]
    content: str | _Parts
    tool_call_id: str


@with_config(_OPEN)
class _FunctionMessage(TypedDict):
    role: Literal["function"]
    content: str | None
    name: str


_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "audio", "refusal")
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def _says_something(message: _AssistantMessage) -> _AssistantMessage:
    if message.get("content") is None and not any(message.get(name) for name in _INSTEAD_OF_CONTENT):
        raise PydanticCustomError("content_missing", "is required where an assistant message has no tool_calls")
    return message


_AnyMessage = Annotated[
    _Message | Annotated[_AssistantMessage, AfterValidator(_says_something)] | _ToolMessage | _FunctionMessage,
    Discriminator("role"),
]


@with_config(_OPEN)
class _Function(TypedDict):
    name: _NonEmpty
    description: NotRequired[str | None]
    parameters: NotRequired[dict[str, Any] | None]
    strict: NotRequired[bool | None]


@with_config(_OPEN)
class _FunctionTool(TypedDict):
    type: str
    function: _Function


@with_config(_OPEN)
class _OtherTool(TypedDict):
    type: _NonEmpty


def _tool_tag(tool: object) -> str:
    return "#function" if isinstance(tool, dict) and tool.get("type") == "function" else "#other"


_Tool = Annotated[
    Annotated[_FunctionTool, Tag("#function")] | Annotated[_OtherTool, Tag("#other")], Discriminator(_tool_tag)
]


@with_config(_OPEN)
class _JsonSchema(TypedDict):
    name: str
    schema: NotRequired[dict[str, Any] | None]
    strict: NotRequired[bool | None]


@with_config(_OPEN)
class _SchemaFormat(TypedDict):
    type: str
    json_schema: _JsonSchema


@with_config(_OPEN)
class _OtherFormat(TypedDict):
    type: _NonEmpty


def _format_tag(value: object) -> str:
    return "#json_schema" if isinstance(value, dict) and value.get("type") == "json_schema" else "#other"


_ResponseFormat = Annotated[
    Annotated[_SchemaFormat, Tag("#json_schema")] | Annotated[_OtherFormat, Tag("#other")], Discriminator(_format_tag)
]


@with_config(_OPEN)
class _StreamOptions(TypedDict):
    include_usage: NotRequired[bool | None]


@with_config(_OPEN)
class _Named(TypedDict):
    name: str


def _biases(biases: dict[str, Any]) -> dict[str, Any]:
    # One sentence for all of them: their keys are the caller's, so an error's place may not name one.
    if all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in biases.values()):
        return biases
    raise PydanticCustomError("biases", "must map token ids to numbers from -100 to 100")


@with_config(_OPEN)
class _Chat(TypedDict):
    messages: Annotated[list[_AnyMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    model: NotRequired[_NonEmpty | None]
    stream: NotRequired[bool | None]
    stream_options: NotRequired[_StreamOptions | None]
    max_tokens: NotRequired[_AtLeastOne | None]
    max_completion_tokens: NotRequired[_AtLeastOne | None]
    temperature: NotRequired[Annotated[float, Field(ge=0, le=2)] | None]
    top_p: NotRequired[Annotated[float, Field(ge=0, le=1)] | None]
    top_k: NotRequired[Annotated[int, Field(ge=-1)] | None]
    n: NotRequired[Annotated[int, Field(ge=1, le=128)] | None]
    stop: NotRequired[str | Annotated[list[str], Field(max_length=4)] | None]
    seed: NotRequired[_Int64 | None]
    presence_penalty: NotRequired[_Penalty | None]
    frequency_penalty: NotRequired[_Penalty | None]
    logit_bias: NotRequired[Annotated[dict[str, Any], AfterValidator(_biases)] | None]
    logprobs: NotRequired[bool | None]
    top_logprobs: NotRequired[Annotated[int, Field(ge=0, le=20)] | None]
    tools: NotRequired[Annotated[list[_Tool], Field(fail_fast=True)] | None]
    tool_choice: NotRequired[Literal["none", "auto", "required"] | dict[str, Any] | None]
    parallel_tool_calls: NotRequired[bool | None]
    functions: NotRequired[Annotated[list[_Function], Field(fail_fast=True)] | None]
    function_call: NotRequired[Literal["none", "auto"] | _Named | None]
    response_format: NotRequired[_ResponseFormat | None]
    metadata: NotRequired[dict[str, Any] | None]
    modalities: NotRequired[Annotated[list[str], Field(fail_fast=True)] | None]
    audio: NotRequired[dict[str, Any] | None]
    prediction: NotRequired[dict[str, Any] | None]
    reasoning_effort: NotRequired[str | None]
    service_tier: NotRequired[str | None]
    store: NotRequired[bool | None]
    user: NotRequired[str | None]


def _consistent(chat: _Chat) -> _Chat:
    if chat.get("stream_options") is not None and not chat.get("stream"):
        raise PydanticCustomError("stream_options_alone", "is only allowed together with stream: true")
    return chat


_CHAT: TypeAdapter[_Chat] = TypeAdapter(Annotated[_Chat, AfterValidator(_consistent)])

_SENTENCES = {
    "missing": "is required",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_attributes_type": "must be an object",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "too_long": "must have at most {max_length} items",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "union_tag_not_found": "is required",
    "union_tag_invalid": f"must be one of {', '.join(_ROLES)}",
}
# What a value of the wrong type is told by each branch of `str | list[...]`. Other errors: its type chose the branch.
_MISMATCHES = frozenset({"string_type", "list_type", "dict_type", "literal_error"})
# Errors of a whole message, or of the whole body, are shown at the field that mends them.
_FIELD_AT_FAULT = {
    "union_tag_not_found": "role",
    "union_tag_invalid": "role",
    "content_missing": "content",
    "stream_options_alone": "stream_options",
}

_Path = tuple[str | int, ...]


def problems(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(field's path, what is wrong with it), at most ten, in the order of the fields; empty for a valid document."""
    try:
        _CHAT.validate_python(document)
    except ValidationError as error:
        return _problems(error.errors(include_url=False, include_input=False))
    return []


def _problems(errors: Iterable[ErrorDetails]) -> list[tuple[str, str]]:
    placed = [(*_place(error["loc"]), error) for error in errors]
    chosen = {union for path, union, error in placed if path != union or error["type"] not in _MISMATCHES}
    found: dict[str, str] = {}
    for path, union, error in placed:
        if path == union and union in chosen and error["type"] in _MISMATCHES:
            continue
        if fault := _FIELD_AT_FAULT.get(error["type"]):
            path = (*path, fault)
        name, text = ".".join(map(str, path)), _sentence(error, path)
        found[name] = f"{found[name]} or {text.removeprefix('must be ')}" if name in found else text
    return list(found.items())[:MOST_PROBLEMS]


def _place(loc: _Path) -> tuple[_Path, _Path | None]:
    """The path of fields in pydantic's `loc`, which also names branches of unions, and the innermost untagged union."""
    path: list[str | int] = []
    union: _Path | None = None
    for depth, step in enumerate(loc):
        if depth == 2 and loc[0] == "messages":
            continue  # the role, which chose the message's type
        if isinstance(step, int) or not (step in ("str", _Named.__name__) or step[0] == "#" or "[" in step):
            path.append(step)
        elif step[0] != "#":
            union = tuple(path)
    return tuple(path), union


def _sentence(error: ErrorDetails, path: _Path) -> str:
    kind = error["type"]
    if kind == "list_type" and path[-1] == "content":
        return "must be a list of parts"
    if kind not in _SENTENCES:
        return error["msg"]  # ours: the errors that the validators above raise
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in error.get("ctx", {}).items()}
    return _SENTENCES[kind].format(**limits)
