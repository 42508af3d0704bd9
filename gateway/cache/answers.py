"""A plain answer as a stream, a stream as a plain answer, and which answers may be kept.

Owns both directions: what is put together from a stream's events says what they said, and a stream made of it is put
together again to the same. Pure. Refuses what is no answer: `Unfit`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from gateway.cache.key import LEFT_OUT
from gateway.types import Usage

_DONE = b"data: [DONE]\n\n"
_ENDED = frozenset({"stop", "tool_calls", "function_call"})  # the model had said all it wanted to
_ONCE = frozenset({"role", "id", "type", "name"})  # strings that are repeated whole, never continued
_OF_THE_CALL = LEFT_OUT.keys() - {"model"}  # what an answer echoes of fields that have no part in the key
_OF_A_CHOICE = frozenset({"index", "delta", "finish_reason", "logprobs"})


class Unfit(Exception):
    """The answer must not be given to anybody again, for this reason. It quotes nothing."""


def kept_of(answer: dict[str, Any]) -> bytes:
    """What may be given again of a plain answer: all but what belongs to the one call, such as what it cost. Raises
    `Unfit` where it is no plain answer."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices:
        raise Unfit("it is not on the OpenAI wire")
    for choice in choices:
        if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
            raise Unfit("it is not on the OpenAI wire")
    kept = {name: value for name, value in answer.items() if name not in _OF_THE_CALL}
    usage = kept.get("usage")
    if isinstance(usage, dict) and "cost_usd" in usage:
        kept["usage"] = {**usage, "cost_usd": 0.0}
    try:
        return orjson.dumps(kept)
    except orjson.JSONEncodeError:
        raise Unfit("it is nested too deeply") from None


def is_complete(answer: dict[str, Any], n: int) -> bool:
    """Whether the plain answer may be stored: it has `n` choices, and in each the model said all that it wanted to.
    One that ended at a limit or a filter did not."""
    choices = answer["choices"]
    return len(choices) == n and all(
        choice.get("finish_reason") in _ENDED and not choice["message"].get("audio") for choice in choices
    )


def whole_of(stream: bytes, usage: Usage) -> dict[str, Any]:
    """The plain answer that the events of a stream make up. `usage` stands in where they state none. Raises `Unfit`
    where they are not whole, or say what no plain answer could."""
    answer: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    stated: object = None
    ended = False
    for text in _events(stream):
        if text == b"[DONE]":
            ended = True
            break
        try:
            event = orjson.loads(text)
        except orjson.JSONDecodeError:
            raise Unfit("an event cannot be read") from None
        if not isinstance(event, dict) or "error" in event:
            raise Unfit("an event is an error")
        stated = event.pop("usage", None) or stated
        for choice in event.pop("choices", None) or ():
            _add(choices, choice)
        answer.update({name: value for name, value in event.items() if name != "obfuscation"})
    if not ended:
        raise Unfit("the stream is cut")
    answer["object"] = "chat.completion"
    answer["choices"] = [_finished(choices[index]) for index in sorted(choices)]
    answer["usage"] = stated if isinstance(stated, dict) else _written(usage)
    return answer


def _events(stream: bytes) -> Iterator[bytes]:
    for raw in stream.split(b"\n\n"):
        lines = [line[5:].strip() for line in raw.splitlines() if line.startswith(b"data:")]
        if lines:
            yield b"\n".join(lines)


def _add(choices: dict[int, dict[str, Any]], said: object) -> None:
    if not isinstance(said, dict) or not isinstance(delta := said.get("delta") or {}, dict):
        raise Unfit("it is not on the OpenAI wire")
    index = said.get("index") or 0
    if not isinstance(index, int):
        raise Unfit("it is not on the OpenAI wire")
    choice = choices.setdefault(index, {"index": index, "message": {}, "logprobs": None, "finish_reason": None})
    choice["message"] = _merged(choice["message"], delta)
    choice["finish_reason"] = said.get("finish_reason") or choice["finish_reason"]
    choice["logprobs"] = _merged(choice["logprobs"], said.get("logprobs"))
    choice.update({name: value for name, value in said.items() if name not in _OF_A_CHOICE and value is not None})


def _merged(so_far: Any, more: Any, name: str = "") -> Any:
    """What a string, list or mapping of a delta adds to what came before."""
    if more is None:
        return so_far
    if so_far is None:
        return _merged(type(more)(), more) if isinstance(more, list | dict) else more
    if isinstance(so_far, str) and isinstance(more, str):
        return (more or so_far) if name in _ONCE else so_far + more
    if isinstance(so_far, dict) and isinstance(more, dict):
        merged = dict(so_far)
        for key, value in more.items():
            merged[key] = _merged(merged.get(key), value, key)
        return merged
    if isinstance(so_far, list) and isinstance(more, list):
        return _merged_lists(so_far, more)
    return more


def _merged_lists(so_far: list[Any], more: list[Any]) -> list[Any]:
    """Items that have an `index`, as tool calls do, go on with the one of that index; others are new."""
    merged = list(so_far)
    for item in more:
        index = item.get("index") if isinstance(item, dict) else None
        known = None
        if isinstance(index, int):
            known = next(
                (at for at, one in enumerate(merged) if isinstance(one, dict) and one.get("index") == index), None
            )
        if known is None:
            merged.append(_merged({}, item) if isinstance(item, dict) else item)
        else:
            merged[known] = _merged(merged[known], item)
    return merged


def _finished(choice: dict[str, Any]) -> dict[str, Any]:
    """The choice as plain answers have it: content there, if only null, and tool calls in order, without an index."""
    message = {"role": "assistant", "content": None, **choice["message"]}
    if isinstance(calls := message.get("tool_calls"), list):
        calls = sorted(calls, key=lambda call: call.get("index", 0) if isinstance(call, dict) else 0)
        message["tool_calls"] = [
            {name: value for name, value in call.items() if name != "index"} if isinstance(call, dict) else call
            for call in calls
        ]
    return {**choice, "message": message}


def as_stream(answer: bytes, *, usage: bool) -> bytes:
    """A whole stream that says what the plain answer says; with an event for its usage where that is asked for."""
    told = orjson.loads(answer)
    choices, stated = told.pop("choices"), told.pop("usage", None)
    frame = {**told, "object": "chat.completion.chunk"}
    events: list[dict[str, Any]] = []
    for choice in choices:
        index = choice.get("index", 0)
        message = {name: value for name, value in choice["message"].items() if value is not None or name == "content"}
        if isinstance(calls := message.get("tool_calls"), list):
            message["tool_calls"] = [
                {"index": at, **call} if isinstance(call, dict) else call for at, call in enumerate(calls)
            ]
        rest = {
            name: value
            for name, value in choice.items()
            if name not in ("index", "message", "logprobs", "finish_reason")
        }
        logprobs = choice.get("logprobs")
        said = {"index": index, "delta": message, "logprobs": logprobs, "finish_reason": None}
        events.append({**frame, "choices": [said]})
        last = {"index": index, "delta": {}, "logprobs": None, "finish_reason": choice.get("finish_reason"), **rest}
        events.append({**frame, "choices": [last]})
    if usage and isinstance(stated, dict):
        events.append({**frame, "choices": [], "usage": {**stated, "cost_usd": 0.0}})
    return b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events) + _DONE


def for_another(block: bytes, *, usage: bool, free: bool) -> bytes:
    """Whole events of a stream that states usage, for another client than the one it was made for: without what states
    usage where that one did not ask for it, and at no cost where it is `free`."""
    if b'"usage"' not in block or (usage and not free):
        return block
    kept = []
    for raw in block.split(b"\n\n"):
        if b'"usage"' in raw and raw.startswith(b"data:"):
            raw = _usage_changed(raw, usage=usage)
        if raw:
            kept.append(raw + b"\n\n")
    return b"".join(kept)


def _usage_changed(raw: bytes, *, usage: bool) -> bytes:
    try:
        event = orjson.loads(raw[5:])
    except orjson.JSONDecodeError:
        return raw
    if not isinstance(event, dict) or not isinstance(stated := event.get("usage"), dict):
        return raw
    if usage:
        return b"data: " + orjson.dumps({**event, "usage": {**stated, "cost_usd": 0.0}})
    del event["usage"]
    return b"data: " + orjson.dumps(event) if event.get("choices") else b""


def _written(usage: Usage) -> dict[str, Any]:
    total = usage.prompt_tokens + usage.completion_tokens
    told: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": total,
    }
    if usage.cached_tokens:
        told["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    return told
