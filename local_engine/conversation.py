"""Owns what a conversation may hold: messages, tool calls, tools and which may be called; refuses tokens and I/O.

Parsed once into frozen types, and given to chat templates in the shape that they expect of transformers: a call's
arguments as an object, fields that are null left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_TOOLS = 128
NAME = r"^[a-zA-Z0-9_-]{1,64}$"
"""Of a function, as OpenAI has it."""
_CHOICES = ("none", "auto", "required")

_V = TypeVar("_V")


class Body(BaseModel):
    """What bodies and their parts have in common."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool in an earlier answer. `arguments` is a JSON object."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is system, user, assistant or tool.

    Only an assistant's has `calls`, and then perhaps no content; only a tool's has a `call_id`.
    """

    role: str
    content: str | None
    calls: tuple[Call, ...] = ()
    call_id: str | None = None

    def shown(self) -> dict[str, Any]:
        """As a chat template reads it."""
        shown: dict[str, Any] = {"role": self.role}
        if self.content is not None:
            shown["content"] = self.content
        if self.calls:
            shown["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}}
                for c in self.calls
            ]
        if self.call_id is not None:
            shown["tool_call_id"] = self.call_id
        return shown


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON Schema as text, `shown` the tool as the caller
    wrote it, which is what a template reads."""

    name: str
    parameters: str
    shown: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of a request that may be called: those in `callable`, and if `must`, at least one of them."""

    tools: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    must: bool = False
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template renders. `opens` the next answer, or `continues` the last message, or does neither."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    opens: bool = True
    continues: bool = False

    @property
    def uses_tools(self) -> bool:
        """Whether tools, calls or their results are in it."""
        return bool(self.tools) or any(message.calls or message.role == "tool" for message in self.messages)


def _text(value: object) -> object:
    """Message content: a string, or a list of text parts, which are joined."""
    if value is None or isinstance(value, str):
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


def _object(value: object) -> object:
    """A call's arguments: an object as JSON text; the empty text, which some clients send, is the empty object."""
    try:
        parsed = orjson.loads(value or "{}") if isinstance(value, str) else None
    except orjson.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        raise PydanticCustomError("arguments", "must be a JSON object, written as a string")
    return _shallow(parsed)


def _shallow(value: _V) -> _V:
    """The value, unless it is nested deeper than orjson writes (254), and templates and grammars follow."""
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        raise PydanticCustomError("nesting", "is nested too deeply") from None
    return value


class _CalledShape(Body):
    name: Annotated[str, Field(pattern=NAME)]
    arguments: Annotated[dict[str, Any], BeforeValidator(_object)]


class _CallShape(Body):
    id: str
    type: Literal["function"] = "function"
    function: _CalledShape


class MessageShape(Body):
    """A message on the wire."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_text)] = None
    tool_calls: list[_CallShape] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_old_calls(cls, value: object) -> object:
        if isinstance(value, dict) and value.get("function_call"):
            raise PydanticCustomError("tools", "`function_call` is not supported by this engine, `tool_calls` is")
        return value

    @model_validator(mode="after")
    def _sound(self) -> MessageShape:
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tools", "`tool_calls` are for assistant messages alone")
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("content", "`content` is missing")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise PydanticCustomError("tools", "`tool_call_id` goes with the role tool, and that with it")
        return self

    def parsed(self) -> Message:
        # `developer` is OpenAI's newer word for what templates call system.
        role = "system" if self.role == "developer" else self.role
        calls = tuple(Call(c.id, c.function.name, c.function.arguments) for c in self.tool_calls or ())
        return Message(role, self.content, calls, self.tool_call_id)


class _FunctionShape(Body):
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolShape(Body):
    """A tool on the wire."""

    type: Literal["function"]
    function: _FunctionShape
    _as_written: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, check: ModelWrapValidatorHandler[ToolShape]) -> ToolShape:
        made = check(value)
        made._as_written = _shallow(value)
        return made

    def parsed(self) -> Tool:
        # Without parameters a function takes none, as OpenAI has it.
        parameters = self.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
        return Tool(self.function.name, orjson.dumps(parameters).decode(), self._as_written)


def _choice(value: object) -> object:
    """A `tool_choice`, before it is told which: a message for each kind would say less."""
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    named = isinstance(function, dict) and isinstance(function.get("name"), str)
    if value not in (None, *_CHOICES) and not named:
        raise PydanticCustomError("choice", "must be none, auto, required, or an object that names a function")
    return value


class _ChosenFunction(Body):
    name: str


class _Chosen(Body):
    type: Literal["function"]
    function: _ChosenFunction


class ChatShape(Body):
    """What a body says that a chat template renders."""

    messages: Annotated[list[MessageShape], Field(min_length=1)]
    tools: Annotated[list[ToolShape], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[Literal["none", "auto", "required"] | _Chosen | None, BeforeValidator(_choice)] = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _sound_tools(self) -> ChatShape:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise PydanticCustomError("tools", "two `tools` have the same name")
        if isinstance(self.tool_choice, _Chosen) and self.tool_choice.function.name not in names:
            raise PydanticCustomError("tools", "`tool_choice` names none of the `tools`")
        if self.tool_choice == "required" and not names:
            raise PydanticCustomError("tools", "`tool_choice` is required, and there are no `tools`")
        return self

    @model_validator(mode="after")
    def _sound_end(self) -> ChatShape:
        last = self.messages[-1]
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise PydanticCustomError("continue", "a new answer cannot begin where the last message is continued")
            if last.role != "assistant" or not last.content or last.tool_calls:
                raise PydanticCustomError(
                    "continue", "only an assistant's message can be continued, one with content and without calls"
                )
        return self

    def conversation(self) -> Conversation:
        """What the template renders. With `tool_choice` none the model does not see the tools."""
        tools = self.callable_tools()
        opens = not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt
        return Conversation(
            tuple(message.parsed() for message in self.messages),
            () if tools is None else tools.tools,
            opens,
            bool(self.continue_final_message),
        )

    def callable_tools(self) -> Tools | None:
        """The tools that may be called; None where none may."""
        if not self.tools or self.tool_choice == "none":
            return None
        tools = tuple(tool.parsed() for tool in self.tools)
        chosen = self.tool_choice
        parallel = self.parallel_tool_calls is not False
        if isinstance(chosen, _Chosen):
            named = tuple(tool for tool in tools if tool.name == chosen.function.name)
            return Tools(tools, named, must=True, parallel=False)
        return Tools(tools, tools, must=chosen == "required", parallel=parallel)
