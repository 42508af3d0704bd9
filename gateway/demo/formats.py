"""How OpenAI, Anthropic, Mistral and Cohere write a chat answer, a stream, a tool call, usage and an error. Pure.

Owns the four wire formats as the providers document them, as seen from the provider. Refuses sockets, pacing and
faults: that is providers.py. Sources: platform.openai.com/docs/api-reference/chat, docs.anthropic.com/en/api/messages,
docs.mistral.ai/api, docs.cohere.com/v2/reference/chat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import orjson

Json = dict[str, Any]
Finish = Literal["stop", "length", "tool"]

CREATED = 1_700_000_000  # seconds; a constant, so that answers are deterministic
CONTEXT_CODE = "context_length_exceeded"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of one of the tools that the request offers. `arguments` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What the fake model says. Invariant: `pieces` joined are the text of the plain answer; one piece is one chunk and
    one token."""

    model: str
    pieces: tuple[str, ...]
    finish: Finish
    prompt_tokens: int
    call: ToolCall | None = None
    include_usage: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def completion_tokens(self) -> int:
        return len(self.pieces) + (1 if self.call else 0)


class Format(Protocol):
    """One provider's wire format."""

    name: str
    path: str

    def refusal(self, body: Json) -> tuple[int, Json] | None:
        """Status and error body for a request that this provider would not take, or None."""

    def plain(self, reply: Reply) -> Json:
        """The JSON body of a plain answer."""

    def events(self, reply: Reply) -> list[bytes]:
        """The SSE events of a stream, complete with its end."""

    def error(self, status: int, message: str, code: str | None = None) -> Json:
        """An error body."""


def tool_call(body: Json) -> ToolCall | None:
    """The tool call that a fake model makes: the first tool, when the last message is a user's and holds the word
    "tool" or the tool's name."""
    tools, messages = body.get("tools"), body.get("messages")
    if (
        not isinstance(tools, list)
        or not tools
        or not isinstance(tools[0], dict)
        or not isinstance(messages, list)
        or not messages
    ):
        return None
    function = tools[0].get("function", tools[0])
    name, last = str(function.get("name", "")), messages[-1]
    if not isinstance(last, dict) or last.get("role") != "user" or "tool_result" in str(last.get("content")):
        return None
    said = text_of(last.get("content")).lower()
    if "tool" not in said and name.lower() not in said:
        return None
    schema = function.get("parameters") or function.get("input_schema") or {}
    samples: Json = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}
    properties = schema.get("properties", {})
    arguments = {
        key: samples.get(str(value.get("type")), "Paris")
        for key, value in properties.items()
        if isinstance(value, dict)
    }
    return ToolCall(name, orjson.dumps(arguments).decode())


def text_of(content: Any) -> str:
    """The text of a message's content, be it a string or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return " ".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(data) + b"\n\n"


class OpenAI:
    """POST /v1/chat/completions."""

    name = "openai"
    path = "/v1/chat/completions"
    finishes: Mapping[Finish, str] = {"stop": "stop", "length": "length", "tool": "tool_calls"}
    call_id = "call_fake0001"
    done: Sequence[bytes] = (b"data: [DONE]\n\n",)

    def refusal(self, body: Json) -> tuple[int, Json] | None:
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            return 400, self.error(400, "Invalid 'messages': empty array.", "empty_array")
        return None

    def plain(self, reply: Reply) -> Json:
        message: Json = {"role": "assistant", "content": reply.text if reply.pieces else None}
        if reply.call:
            message["tool_calls"] = [self._call(reply.call)]
        return {
            "id": "chatcmpl-fake",
            "object": "chat.completion",
            "created": CREATED,
            "model": reply.model,
            "choices": [{"index": 0, "message": message, "finish_reason": self.finishes[reply.finish]}],
            "usage": self._usage(reply),
        }

    def events(self, reply: Reply) -> list[bytes]:
        events = [self._chunk(reply, {"role": "assistant", "content": ""})]
        events += [self._chunk(reply, {"content": piece}) for piece in reply.pieces]
        if reply.call:
            call = self._call(reply.call)
            function = {**call["function"], "arguments": ""}
            events.append(self._chunk(reply, {"tool_calls": [{"index": 0, **call, "function": function}]}))
            rest = {"index": 0, "function": {"arguments": reply.call.arguments}}
            events.append(self._chunk(reply, {"tool_calls": [rest]}))
        return [*events, *self._end(reply), *self.done]

    def error(self, status: int, message: str, code: str | None = None) -> Json:
        if code == CONTEXT_CODE:
            message = "This model's maximum context length is 128000 tokens. However, you sent 200001 tokens."
        kinds = {401: "invalid_request_error", 429: "rate_limit_exceeded", 400: "invalid_request_error"}
        codes = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": None, "code": code or codes.get(status)}}

    def _end(self, reply: Reply) -> list[bytes]:
        end = [self._chunk(reply, {}, finish=self.finishes[reply.finish])]
        if reply.include_usage:
            end.append(_event({**self._frame(reply), "choices": [], "usage": self._usage(reply)}))
        return end

    def _call(self, call: ToolCall) -> Json:
        return {"id": self.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

    def _frame(self, reply: Reply) -> Json:
        return {"id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": CREATED, "model": reply.model}

    def _chunk(self, reply: Reply, delta: Json, finish: str | None = None, **more: Any) -> bytes:
        return _event(
            {**self._frame(reply), "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}
        )

    def _usage(self, reply: Reply) -> Json:
        total = reply.prompt_tokens + reply.completion_tokens
        return {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "total_tokens": total,
        }


class Mistral(OpenAI):
    """POST /v1/chat/completions, with its own ways: unknown fields are refused with 422, usage comes unasked in the
    chunk that finishes, tool call ids have nine characters, a whole tool call comes in one chunk."""

    name = "mistral"
    path = "/mistral/v1/chat/completions"
    call_id = "aB3dE5fG7"
    known = frozenset(
        {"model", "messages", "temperature", "top_p", "max_tokens", "stream", "stop", "random_seed", "response_format"}
        | {"tools", "tool_choice", "presence_penalty", "frequency_penalty", "n", "prediction", "parallel_tool_calls"}
        | {"prompt_mode", "reasoning_effort", "safe_prompt", "metadata"}
    )

    def refusal(self, body: Json) -> tuple[int, Json] | None:
        unknown = sorted(body.keys() - self.known)
        if not unknown:
            return super().refusal(body)
        detail = [
            {"type": "extra_forbidden", "loc": ["body", key], "msg": "Extra inputs are not permitted"}
            for key in unknown
        ]
        return 422, {"object": "error", "message": {"detail": detail}, "type": "invalid_request_error", "code": None}

    def events(self, reply: Reply) -> list[bytes]:
        events = [self._chunk(reply, {"role": "assistant", "content": ""})]
        events += [self._chunk(reply, {"content": piece}) for piece in reply.pieces]
        delta: Json = {"content": ""}
        if reply.call:
            delta["tool_calls"] = [{"index": 0, **self._call(reply.call)}]
        events.append(self._chunk(reply, delta, finish=self.finishes[reply.finish], usage=self._usage(reply)))
        return [*events, *self.done]

    def error(self, status: int, message: str, code: str | None = None) -> Json:
        if status == 401:
            return {"detail": message}
        if code == CONTEXT_CODE:
            message = "Prompt contains 200001 tokens, too large for model with 131072 maximum context length"
        kinds = {429: "rate_limited", 400: "invalid_request_error"}
        kind = kinds.get(status, "internal_server_error" if status >= 500 else "invalid_request_error")
        return {"object": "error", "message": message, "type": kind, "param": None, "code": str(status)}


class Anthropic:
    """POST /v1/messages. `max_tokens` is required."""

    name = "anthropic"
    path = "/v1/messages"
    finishes: Mapping[Finish, str] = {"stop": "end_turn", "length": "max_tokens", "tool": "tool_use"}

    def refusal(self, body: Json) -> tuple[int, Json] | None:
        if not isinstance(body.get("max_tokens"), int):
            return 400, self.error(400, "max_tokens: Field required")
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            return 400, self.error(400, "messages: at least one message is required")
        return None

    def plain(self, reply: Reply) -> Json:
        content: list[Json] = [{"type": "text", "text": reply.text}] if reply.pieces else []
        if reply.call:
            content.append({**self._tool_use(reply.call), "input": orjson.loads(reply.call.arguments)})
        return {**self._message(reply), "content": content, "stop_reason": self.finishes[reply.finish]}

    def events(self, reply: Reply) -> list[bytes]:
        start = {**self._message(reply), "content": []}
        start["usage"] = {"input_tokens": reply.prompt_tokens, "output_tokens": 1}
        events = [self._named({"type": "message_start", "message": start})]
        if reply.pieces:
            deltas = [{"type": "text_delta", "text": piece} for piece in reply.pieces]
            events += self._block(0, {"type": "text", "text": ""}, deltas)
        if reply.call:
            half = len(reply.call.arguments) // 2
            halves = (reply.call.arguments[:half], reply.call.arguments[half:])
            deltas = [{"type": "input_json_delta", "partial_json": part} for part in halves]
            events += self._block(1 if reply.pieces else 0, {**self._tool_use(reply.call), "input": {}}, deltas)
        stop = {"stop_reason": self.finishes[reply.finish], "stop_sequence": None}
        usage = {"output_tokens": reply.completion_tokens}
        events.append(self._named({"type": "message_delta", "delta": stop, "usage": usage}))
        return [*events, self._named({"type": "message_stop"})]

    def error(self, status: int, message: str, code: str | None = None) -> Json:
        if code == CONTEXT_CODE:
            message = "prompt is too long: 200001 tokens > 200000 maximum"
        kinds = {
            400: "invalid_request_error",
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            413: "request_too_large",
            429: "rate_limit_error",
            529: "overloaded_error",
        }
        kind = kinds.get(status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_fake"}

    def _block(self, index: int, start: Json, deltas: list[Json]) -> list[bytes]:
        events = [self._named({"type": "content_block_start", "index": index, "content_block": start})]
        if index == 0:
            events.append(self._named({"type": "ping"}))
        events += [self._named({"type": "content_block_delta", "index": index, "delta": delta}) for delta in deltas]
        return [*events, self._named({"type": "content_block_stop", "index": index})]

    def _named(self, data: Json) -> bytes:
        return _event(data, data["type"])

    def _tool_use(self, call: ToolCall) -> Json:
        return {"type": "tool_use", "id": "toolu_fake0001", "name": call.name}

    def _message(self, reply: Reply) -> Json:
        return {
            "id": "msg_fake",
            "type": "message",
            "role": "assistant",
            "model": reply.model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": reply.prompt_tokens, "output_tokens": reply.completion_tokens},
        }


class Cohere:
    """POST /v2/chat. Its answers do not name the model; a tool call comes with a plan."""

    name = "cohere"
    path = "/v2/chat"
    finishes: Mapping[Finish, str] = {"stop": "COMPLETE", "length": "MAX_TOKENS", "tool": "TOOL_CALL"}

    def refusal(self, body: Json) -> tuple[int, Json] | None:
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            return 400, self.error(400, "invalid request: messages must not be empty")
        return None

    def plain(self, reply: Reply) -> Json:
        message: Json = {"role": "assistant"}
        if reply.pieces:
            message["content"] = [{"type": "text", "text": reply.text}]
        if reply.call:
            message["tool_plan"] = "I will use the tool."
            message["tool_calls"] = [self._call(reply.call, reply.call.arguments)]
        return {
            "id": "fake-cohere",
            "finish_reason": self.finishes[reply.finish],
            "message": message,
            "usage": self._usage(reply),
        }

    def events(self, reply: Reply) -> list[bytes]:
        message = {"role": "assistant", "content": [], "tool_plan": "", "tool_calls": [], "citations": []}
        events = [self._named("message-start", {"message": message}, id="fake-cohere")]
        if reply.pieces:
            events.append(self._content("content-start", {"type": "text", "text": ""}))
            events += [self._content("content-delta", {"text": piece}) for piece in reply.pieces]
            events.append(self._named("content-end", None, index=0))
        if reply.call:
            plan = {"message": {"tool_plan": "I will use the tool."}}
            events.append(self._named("tool-plan-delta", plan))
            calls = {"message": {"tool_calls": self._call(reply.call, "")}}
            events.append(self._named("tool-call-start", calls, index=0))
            calls = {"message": {"tool_calls": {"function": {"arguments": reply.call.arguments}}}}
            events.append(self._named("tool-call-delta", calls, index=0))
            events.append(self._named("tool-call-end", None, index=0))
        end = {"finish_reason": self.finishes[reply.finish], "usage": self._usage(reply)}
        return [*events, self._named("message-end", end), b"data: [DONE]\n\n"]

    def error(self, status: int, message: str, code: str | None = None) -> Json:
        if code == CONTEXT_CODE:
            message = "too many tokens: total number of tokens in the prompt cannot exceed 128000 - received 200001."
        return {"id": "fake-error", "message": message}

    def _named(self, name: str, delta: Json | None, **more: Any) -> bytes:
        return _event({"type": name, **more, **({} if delta is None else {"delta": delta})}, name)

    def _content(self, name: str, content: Json) -> bytes:
        return self._named(name, {"message": {"content": content}}, index=0)

    def _call(self, call: ToolCall, arguments: str) -> Json:
        return {"id": f"{call.name}_fake", "type": "function", "function": {"name": call.name, "arguments": arguments}}

    def _usage(self, reply: Reply) -> Json:
        tokens = {"input_tokens": reply.prompt_tokens, "output_tokens": reply.completion_tokens}
        return {"billed_units": tokens, "tokens": tokens}


FORMATS: tuple[Format, ...] = (OpenAI(), Anthropic(), Mistral(), Cohere())
