"""The answer to a masked request, with its placeholders put back.

Owns which strings of an answer are the model's words (all within `choices` but `logprobs`, which keep the tokens as the
deployment counted them), and the few characters of a stream that wait, because they may begin a placeholder. Refuses to
guess: a placeholder that the model changed is passed on as it is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import orjson

from gateway.backends import sse
from gateway.backends.base import Answer, Chunk
from gateway.masking import Mask

_ARGUMENTS = "arguments"  # of a tool call: JSON within a string
_CONTENT = ("delta", "content")

# Where a string of a stream's choice stands: keys, and the index of a tool call.
_Path = tuple[str | int, ...]


class UnmaskedAnswer:
    """Implements `Answer` around the one to a masked request. Invariant: of each string at most the longest placeholder
    less one character waits, and nothing does once its choice has ended."""

    def __init__(self, answer: Answer, mask: Mask, *, stream: bool, json_content: bool) -> None:
        """`json_content`: the request asked for an answer in JSON, so that what is put into it must be escaped."""
        self._answer = answer
        self._unmask = Unmask(mask, json_content=json_content)
        self._stream = stream

    @property
    def dropped(self) -> tuple[str, ...]:
        return self._answer.dropped

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        tokens = 0
        while True:
            chunk = await anext(self._answer)
            tokens += chunk.tokens
            data = self._unmask.events(chunk.data, last=chunk.last) if self._stream else self._unmask.plain(chunk.data)
            if data or chunk.last or chunk.usage is not None:
                return Chunk(data, tokens, chunk.usage, chunk.last)

    async def close(self) -> None:
        await self._answer.close()


class Unmask:
    """Puts the placeholders of one answer back; keeps what of a stream must wait."""

    def __init__(self, mask: Mask, *, json_content: bool) -> None:
        self._mask = mask
        self._json_content = json_content
        self._waiting: dict[tuple[int, _Path], str] = {}
        self._envelope: dict[str, Any] = {}  # of the last event: what one of ours must look like

    def plain(self, body: bytes) -> bytes:
        """A whole answer. Raises `UpstreamFailed` where it nests deeper than can be written."""
        payload = orjson.loads(body)
        self._restore(payload["choices"], set())
        return sse.written(payload)

    def events(self, data: bytes, *, last: bool) -> bytes:
        """Whole events of a stream. One is left out where all that it says must wait; with the last ones comes
        whatever still waits."""
        out = [self._event(raw) for raw in data.split(b"\n\n") if raw]
        if last:
            out.append(self._rest())
        return b"".join(out)

    def _event(self, raw: bytes) -> bytes:
        text = b"\n".join(line[5:].strip() for line in raw.splitlines() if line.startswith(b"data:"))
        if text == b"[DONE]":
            return self._rest() + sse.DONE
        try:
            payload = orjson.loads(text)
            return sse.event(payload) if self._says_something(payload) else b""
        except (orjson.JSONDecodeError, orjson.JSONEncodeError):
            return raw + b"\n\n"  # nothing that a client could read as a part of the answer

    def _says_something(self, payload: Any) -> bool:
        """Put back what is complete in one event; false where the rest of it must wait."""
        choices = payload.get("choices") if isinstance(payload, dict) else None
        if not isinstance(choices, list) or not choices:
            return True
        self._envelope = {key: payload[key] for key in payload if key not in ("choices", "usage")}
        payload["choices"] = [one for one in choices if not isinstance(one, dict) or self._choice(one)]
        return bool(payload["choices"]) or payload.get("usage") is not None

    def _choice(self, choice: dict[str, Any]) -> bool:
        """Put back what is complete in one choice; false where nothing of it is left to say now."""
        index = choice.get("index")
        index = index if isinstance(index, int) else 0
        delayed = False
        running = list(_running(choice))
        for holder, key, path in running:
            text = holder[key]
            holder[key] = self._fed((index, path), text)
            if text and not holder[key]:
                delayed = True
                if path[-1] != _ARGUMENTS:
                    del holder[key]
        self._restore(choice, {(id(holder), key) for holder, key, _ in running})
        if choice.get("finish_reason"):
            for of, path in [place for place in self._waiting if place[0] == index]:
                _append(choice, path, self._waiting.pop((of, path)))
        said = choice.keys() - {"index", "delta", "finish_reason"} or choice.get("delta") or choice.get("finish_reason")
        return bool(said) or not delayed

    def _fed(self, place: tuple[int, _Path], text: str) -> str:
        """The text so far less what waits, which is kept."""
        text = self._waiting.pop(place, "") + text
        if waiting := self._mask.unfinished(text):
            self._waiting[place] = text[-waiting:]
            text = text[:-waiting]
        path = place[1]
        within_json = path[-1] == _ARGUMENTS or (self._json_content and path == _CONTENT)
        return self._mask.restored(text, within_json=within_json)

    def _rest(self) -> bytes:
        """An event with what waits in choices that did not say that they ended."""
        choices: dict[int, dict[str, Any]] = {}
        for (index, path), text in self._waiting.items():
            choice = choices.setdefault(index, {"index": index, "delta": {}, "finish_reason": None})
            _append(choice, path, text)
        self._waiting.clear()
        return sse.event({**self._envelope, "choices": list(choices.values())}) if choices else b""

    def _restore(self, value: Any, done: set[tuple[int, str]]) -> None:
        """Put back the placeholders in all strings within, in place, but for those that are done: identities of who
        holds them, with the key. Uses a stack: an answer may nest deeply."""
        stack = [value]
        while stack:
            container = stack.pop()
            places = list(container.items() if isinstance(container, dict) else enumerate(container))
            for key, inner in places:
                if isinstance(inner, str) and (id(container), key) not in done:
                    within_json = key == _ARGUMENTS or (self._json_content and key == "content")
                    container[key] = self._mask.restored(inner, within_json=within_json)
                elif isinstance(inner, dict | list) and key != "logprobs":
                    stack.append(inner)


def _running(choice: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, _Path]]:
    """The strings of a stream's choice that go on in the next event: who holds each, under which key, and its path."""
    if isinstance(choice.get("text"), str):
        yield choice, "text", ("text",)
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return
    for key, value in delta.items():
        if isinstance(value, str) and key != "role":
            yield delta, key, ("delta", key)
    function = delta.get("function_call")
    if isinstance(function, dict) and isinstance(function.get(_ARGUMENTS), str):
        yield function, _ARGUMENTS, ("delta", "function_call", _ARGUMENTS)
    calls = delta.get("tool_calls")
    for position, call in enumerate(calls if isinstance(calls, list) else ()):
        for kind, key in (("function", _ARGUMENTS), ("custom", "input")):
            inner = call.get(kind) if isinstance(call, dict) else None
            if isinstance(inner, dict) and isinstance(inner.get(key), str):
                yield inner, key, ("delta", "tool_calls", _index_of(call, position), kind, key)


def _index_of(call: dict[str, Any], position: int) -> int:
    index = call.get("index")
    return index if isinstance(index, int) else position


def _append(choice: dict[str, Any], path: _Path, text: str) -> None:
    """Add to the string at the path; what is not there on the way is made."""
    holder: Any = choice
    for step in path[:-1]:
        if isinstance(step, int):
            holder = _call(holder, step)
        else:
            holder[step] = holder.get(step) or ([] if step == "tool_calls" else {})
            holder = holder[step]
    holder[path[-1]] = (holder.get(path[-1]) or "") + text


def _call(calls: list[dict[str, Any]], index: int) -> dict[str, Any]:
    for position, call in enumerate(calls):
        if _index_of(call, position) == index:
            return call
    calls.append({"index": index})
    return calls[-1]
