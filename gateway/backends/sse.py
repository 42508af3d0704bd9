"""Server-sent events as the OpenAI wire uses them: split a byte stream into whole events, tell the few that matter, and
write our own.

Pure. Owns what proves a stream complete and what its usage was. Refuses to hold back or change an event that carries
only text.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import orjson

from gateway.errors import GatewayError, UpstreamFailed, body_of
from gateway.types import Price, Usage, usd

DONE = b"data: [DONE]\n\n"

# Most events carry one piece of text. They are recognised by their frame and passed on unparsed; whatever this does not
# match is parsed.
_NOTABLE = re.compile(rb'"usage"\s*:\s*\{|"finish_reason"\s*:\s*"|"error"\s*:\s*[{"]|\[DONE\]|\r')
_ORDINARY = re.compile(rb"(?:data: ?\{[^\n]*\}\n\n)+")
_EVENT_END = re.compile(rb"\r?\n\r?\n")

_LONGEST_EVENT_END = 4
_ABSURD = 2**31  # tokens that no answer has: a usage that states them states nothing
_MAX_EVENT_BYTES = 8 * 1024 * 1024


def event(payload: object) -> bytes:
    """One `data:` event that holds the payload as JSON."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def error_event(error: GatewayError) -> bytes:
    """What ends a stream that cannot be completed. No `[DONE]` follows it."""
    return event(body_of(error))


def usage_of(payload: dict[str, Any]) -> Usage | None:
    """The usage that an answer or a chunk states, or None. No more of the prompt counts as cached
    than there is."""
    usage = payload.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is int and type(completion) is int and 0 <= prompt < _ABSURD and 0 <= completion < _ABSURD:
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else 0
        return Usage(prompt, completion, min(cached, prompt) if type(cached) is int and cached > 0 else 0)
    return None


_MAY_BE_NULL: dict[str, object] = {"delta": {}, "message": None}


def choices_of(payload: dict[str, Any], holds: Literal["delta", "message"]) -> list[dict[str, Any]]:
    """The choices of a chunk (`delta`) or of an answer (`message`). Raises `UpstreamFailed` where they are not such."""
    choices = payload.get("choices") or []
    if not isinstance(choices, list):
        raise UpstreamFailed("the deployment's answer is not on the OpenAI wire")
    for choice in choices:
        if (
            not isinstance(choice, dict)
            or not isinstance(choice.get(holds) or _MAY_BE_NULL[holds], dict)
            or not isinstance(choice.get("index") or 0, int)
        ):
            raise UpstreamFailed("the deployment's answer is not on the OpenAI wire")
    return choices


def written(payload: dict[str, Any]) -> bytes:
    """The payload as JSON. Raises `UpstreamFailed` where it nests deeper than can be written."""
    try:
        return orjson.dumps(payload)
    except orjson.JSONEncodeError:
        raise UpstreamFailed("the deployment's answer is nested too deeply") from None


def with_cost(payload: dict[str, Any], usage: Usage, price: Price | None) -> dict[str, Any]:
    """The payload with `usage.cost_usd`, the actual cost, where the price is known."""
    if price is None:
        return payload
    return {**payload, "usage": {**payload["usage"], "cost_usd": float(usd(price.cost(usage)))}}


def has_token(payload: dict[str, Any]) -> bool:
    """Whether a chunk carries something of the answer, and not only the role that opens it."""
    for choice in payload.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("finish_reason") or choice.get("text") or any(delta[key] for key in delta if key != "role"):
            return True
    return False


class StreamReader:
    """Reads one upstream stream. Invariant: every byte it returns belongs to a whole event, and none follows an error
    or `[DONE]`.

    `choices`: how many answers were asked for; each must have finished, or `[DONE]` must have come, before the stream
    counts as complete. `pass_usage`: whether the client asked for the usage event, which is always read for ourselves.
    """

    def __init__(self, *, choices: int, pass_usage: bool, price: Price | None) -> None:
        self._choices = choices
        self._pass_usage = pass_usage
        self._price = price
        self._rest = bytearray()
        self._searched = 0  # bytes of the rest that are known to end no event
        self._held = b""
        self._finished: set[int] = set()
        self._answered = False
        self.events = 0
        self.started = False
        self.done = False
        self.usage: Usage | None = None

    @property
    def complete(self) -> bool:
        """Whether the upstream said that nothing is missing."""
        return self.done or len(self._finished) >= self._choices

    def feed(self, block: bytes) -> bytes:
        """Whole events to pass on, possibly none. Raises `UpstreamFailed` for an error event or one that cannot be
        read."""
        data = block
        if self._rest:
            self._rest += block
            if _EVENT_END.search(self._rest, self._searched) is None:
                return self._keep()
            data = bytes(self._rest)
            self._rest.clear()
        return self._parse(data)

    def _keep(self) -> bytes:
        """Nothing to pass on: what has come so far of an event waits for its end, and is not searched again."""
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise UpstreamFailed("the deployment sent an event that never ends")
        self._searched = max(0, len(self._rest) - _LONGEST_EVENT_END + 1)
        return b""

    def _parse(self, data: bytes) -> bytes:
        out = []
        start = 0
        quick = True
        while not self.done:
            if quick and self.started:
                ordinary = self._ordinary(data, start)
                quick = ordinary is not None  # what is framed unusually is not looked at twice
                if ordinary:
                    out.append(ordinary)
                    start += len(ordinary)
            end = _EVENT_END.search(data, start)
            if end is None:
                break
            out.append(self._event(data[start : end.start()]))
            start = end.end()
        if not self.done:
            self._rest += data[start:]
            self._keep()
        passed = b"".join(out)
        if self.started:
            passed, self._held = self._held + passed, b""
            return passed
        self._held += passed
        return b""

    def _ordinary(self, data: bytes, start: int) -> bytes | None:
        """The ordinary events from `start` on, which are passed on as they are; none where the next must be parsed, and
        None where what comes before it is no plain event."""
        notable = _NOTABLE.search(data, start)
        end = data.rfind(b"\n\n", start, notable.start() if notable else len(data)) + 2
        if end < start + 2:
            return b""
        if not _ORDINARY.fullmatch(data, start, end):
            return None
        self.events += data.count(b"\n\n", start, end)
        return data[start:end]

    def _event(self, raw: bytes) -> bytes:
        lines = [line[5:].strip() for line in raw.splitlines() if line.startswith(b"data:")]
        if not lines:
            return b""  # a comment (keep-alive) or an empty event
        text = b"\n".join(lines)
        if text == b"[DONE]":
            if not self._answered:
                raise UpstreamFailed("the deployment's stream ended without an answer")
            self.done = self.started = True
            return DONE
        try:
            payload = orjson.loads(text)
        except orjson.JSONDecodeError:
            raise UpstreamFailed("the deployment sent a chunk that is not JSON") from None
        if not isinstance(payload, dict) or payload.get("error"):
            raise UpstreamFailed("the deployment reported an error in its stream")
        choices = choices_of(payload, "delta")
        self.events += 1
        self._answered = self._answered or bool(choices)
        if not self.started and has_token(payload):
            self.started = True
        for choice in choices:
            if choice.get("finish_reason"):
                self._finished.add(choice.get("index") or 0)
        return self._with_usage(payload, text if len(lines) == 1 else written(payload))

    def _with_usage(self, payload: dict[str, Any], text: bytes) -> bytes:
        usage = usage_of(payload)
        if usage is None:
            return b"data: " + text + b"\n\n"
        self.usage = usage
        if self._pass_usage:
            return b"data: " + written(with_cost(payload, usage, self._price)) + b"\n\n"
        if payload.get("choices"):  # usage beside text: the text is the client's, the usage was not asked for
            return b"data: " + written({key: value for key, value in payload.items() if key != "usage"}) + b"\n\n"
        return b""
