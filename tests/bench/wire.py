"""What goes over the wire in the benchmark: the request, the right answers to it, and how an answer is judged.

Owns the bytes that the fake upstream sends and that the load expects, so that both agree by construction. Refuses
sockets and clocks.

The request's body has 330 bytes and the plain answer's 633; a stream has 50 chunks with a word each, then the
finishing chunk and `[DONE]`. A marker in the prompt, which every gateway passes on unchanged, tells the upstream how
to answer: `[pace 20 ms]`, `[fail]`, `[cut]`, `[garble]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import orjson

Kind = Literal["plain", "stream"]

REQUEST_BYTES = 330
ANSWER_BYTES = 633
CHUNKS = 50
PACE_MS = 20
MODEL = "bench-model"
WORD = b" tok"
DONE = b"data: [DONE]"
CHUNKED_END = b"0\r\n\r\n"
USAGE = {"prompt_tokens": 60, "completion_tokens": CHUNKS, "total_tokens": 60 + CHUNKS}
TEXT = "".join(f" tok{number:02d}" for number in range(CHUNKS))
_FILLER = "Please tell me in a few plain words how a gateway picks one of several language models, and why that helps. "
_PACE = re.compile(rb"\[pace (\d+) ms\]")


def padded(document: dict[str, Any], holder: dict[str, str], size: int) -> bytes:
    """The document as JSON of exactly `size` bytes; `holder["content"]` is lengthened with plain English to get
    there."""
    missing = size - len(orjson.dumps(document))
    if missing < 0:
        raise ValueError(f"the document is {-missing} bytes longer than {size}")
    holder["content"] += (_FILLER * (missing // len(_FILLER) + 1))[:missing]
    return orjson.dumps(document)


def request_body(kind: Kind, marker: str = "", size: int = REQUEST_BYTES) -> bytes:
    """A chat request of `size` bytes for the model `auto`; the marker is the last thing in the prompt."""
    user = {"role": "user", "content": f"{marker} "}
    document: dict[str, Any] = {
        "model": "auto",
        "messages": [{"role": "system", "content": "You are brief."}, user],
        "max_tokens": 100,
        "temperature": 0.5,
    }
    if kind == "stream":
        document["stream"] = True
    return padded(document, user, size)


def answer_body() -> bytes:
    """The plain answer: 633 bytes in OpenAI's shape, usage included."""
    message = {"role": "assistant", "content": TEXT}
    document = {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }
    missing = ANSWER_BYTES - len(orjson.dumps(document | {"system_fingerprint": "fp_"}))
    return orjson.dumps(document | {"system_fingerprint": "fp_" + "0" * missing})


def _event(document: dict[str, Any]) -> bytes:
    base = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": MODEL}
    return b"data: " + orjson.dumps(base | document) + b"\n\n"


def _choice(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def stream_events(include_usage: bool) -> list[bytes]:
    """The stream as SSE events: 50 words, the finishing chunk, the usage chunk where it was asked for, `[DONE]`."""
    words = [_event(_choice({"content": f" tok{number:02d}"})) for number in range(1, CHUNKS)]
    first = _event(_choice({"role": "assistant", "content": " tok00"}))
    usage = [_event({"choices": [], "usage": USAGE})] if include_usage else []
    return [first, *words, _event(_choice({}, "stop")), *usage, DONE + b"\n\n"]


def pace_ms(body: bytes) -> int:
    """Milliseconds between the chunks that the request's marker asks for; 0 without one."""
    found = _PACE.search(body)
    return int(found[1]) if found else 0


def http_chunk(data: bytes) -> bytes:
    """One chunk of HTTP/1.1's chunked coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def unchunked(raw: bytes) -> bytes | None:
    """The body behind HTTP/1.1's chunked coding, or None where the coding is broken or incomplete."""
    body: list[bytes] = []
    at = 0
    while (line_end := raw.find(b"\r\n", at)) >= 0:
        try:
            size = int(raw[at:line_end].split(b";")[0], 16)
        except ValueError:
            return None
        start, end = line_end + 2, line_end + 2 + size
        if raw[end : end + 2] != b"\r\n":
            return None
        if size == 0:
            return b"".join(body)
        body.append(raw[start:end])
        at = end + 2
    return None


def fault(kind: Kind, status: int, raw: bytes, chunked: bool) -> str | None:
    """What is wrong with an answer, in a few words that can be counted, or None. Cheap enough to run on every answer:
    all 50 words and the end of the stream, found in the raw bytes where possible."""
    if status != 200:
        return f"status {status}"
    if kind == "stream" and raw.count(WORD) == CHUNKS and DONE in raw:
        return None
    body = unchunked(raw) if chunked else raw
    if body is None:
        return "broken chunked coding"
    if kind == "plain":
        return None if TEXT.encode() in body and body.rstrip().endswith(b"}") else "wrong body"
    if DONE not in body:
        return "no [DONE]"
    return None if body.count(WORD) == CHUNKS else "wrong number of chunks"


@dataclass(frozen=True, slots=True)
class Said:
    """What an answer said, fully parsed."""

    text: str
    completion_tokens: int | None
    done: bool


def _json_events(body: bytes) -> Iterator[dict[str, Any]]:
    for line in body.splitlines():
        if line.startswith(b"data: ") and not line.startswith(DONE):
            yield orjson.loads(line[6:])


def said(kind: Kind, body: bytes) -> Said:
    """Parse an answer as a client would. Raises `ValueError` where it is not JSON, `KeyError` where it is not
    OpenAI's shape."""
    if kind == "plain":
        document = orjson.loads(body)
        return Said(document["choices"][0]["message"]["content"], document["usage"]["completion_tokens"], True)
    text, tokens = [], None
    for event in _json_events(body):
        text += [choice["delta"].get("content") or "" for choice in event["choices"]]
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    return Said("".join(text), tokens, body.rstrip().endswith(DONE))
