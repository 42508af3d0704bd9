"""Cohere's v2 stream, line by line, in the form that litellm reads.

Owns one difference: Cohere documents server-sent events (docs.cohere.com/v2/docs/streaming), litellm 1.106 reads bare
JSON lines, takes the end of the answer from fields that Cohere does not send, and a tool call from other places.
Refuses everything else: a line that it does not know is passed on. Where litellm comes to read the documented form, the
fields added here are ignored.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

import orjson


class Lines(Protocol):
    """A response's lines, which can be closed before their end."""

    def __aiter__(self) -> AsyncIterator[str]: ...

    async def aclose(self) -> None: ...


class CohereLines:
    """The lines of one stream, rewritten. Invariant: one line out for every `data:` line in but `[DONE]`, none for the
    rest."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    async def __aiter__(self) -> AsyncIterator[str]:
        async for line in self._lines:
            if (readable := rewritten(line)) is not None:
                yield readable

    async def aclose(self) -> None:
        await self._lines.aclose()


def rewritten(line: str) -> str | None:
    """The line as litellm reads it, or None where it says nothing."""
    text = line.removeprefix("data:").strip()
    if not text or text == "[DONE]" or line.startswith(("event:", ":", "id:", "retry:")):
        return None
    try:
        event = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text  # litellm fails on it, as it should
    kind, delta = event.get("type"), event.get("delta")
    if kind == "message-end":
        event = {**event, "event": kind, "data": {"delta": delta}}
    elif kind in ("tool-call-start", "tool-call-delta"):
        event = {"type": "tool-call-delta", "index": event.get("index", 0), "delta": {"tool_calls": _calls(delta)}}
    return orjson.dumps(event).decode()


def _calls(delta: dict[str, Any]) -> list[dict[str, str]]:
    call = delta["message"]["tool_calls"]
    function = call.get("function", {})
    return [{"id": call.get("id", ""), "name": function.get("name", ""), "arguments": function.get("arguments", "")}]
