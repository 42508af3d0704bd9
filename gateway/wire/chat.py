"""OpenAI's chat completion request: from bytes to a `ChatRequest`, or one `BadRequest` that says what is wrong where.

Owns what a chat body may look like, which of its strings are text, and which of its parts nobody here can read. What
OpenAI defines is checked; what it does not define is kept and forwarded, at every level. Refuses to decide anything,
and to repeat a value that the caller sent: messages name fields of the API only.

Of two equal keys the last one counts (orjson's rule). What was checked and scanned is therefore the parsed object, and
the bytes as they came must never be forwarded in its place.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from html.entities import html5
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

import orjson
import re2

from gateway.errors import BadRequest
from gateway.types import ChatRequest
from gateway.wire.chat_schema import problems

_READABLE_PARTS = frozenset({"text", "refusal", "input_text", "output_text"})
_UNREADABLE_PARTS = frozenset(
    {"image_url", "input_image", "image", "input_audio", "audio_url", "video_url", "file", "input_file", "document"}
)
_IMAGE_PARTS = frozenset({"image_url", "input_image", "image"})
_OPEN_TOOLS = frozenset({"function", "custom", "web_search", "web_search_preview"})

# Fields whose value names something that only a provider has: what they point to cannot be scanned.
_HELD = frozenset(
    {
        "file_id",
        "file_ids",
        "previous_response_id",
        "vector_store_ids",
        "vector_store_id",
        "container",
        "container_id",
        "cached_content",
        "file_uri",
        "fileId",
        "fileIds",
        "previousResponseId",
        "vectorStoreIds",
        "containerId",
        "cachedContent",
        "fileUri",
    }
)
_HELD_AT_TOP = ("conversation", "prompt", "container")

# The API's own field names and words: no text of a caller. Any other key and any other value is.
# fmt: off
SCHEMA_KEYS = frozenset(
    (
        "messages", "role", "content", "type", "text", "name", "tool_calls", "tool_call_id", "function",
        "arguments", "id", "tools", "tool_choice", "model", "stream", "stream_options", "include_usage",
        "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed",
        "presence_penalty", "frequency_penalty", "response_format", "json_schema", "schema", "strict", "logit_bias",
        "logprobs", "top_logprobs", "user", "metadata", "parameters", "properties", "required", "description",
        "items", "enum", "additionalProperties", "image_url", "url", "detail", "refusal", "parallel_tool_calls",
    )
)
SCHEMA_WORDS = frozenset(
    (
        "system", "developer", "user", "assistant", "tool", "function", "text", "image_url", "string", "object",
        "array", "integer", "number", "boolean", "auto", "none", "required",
    )
)
# fmt: on

MOST_LEVELS = 254  # orjson's bound for writing
_TOO_DEEP = f"The body is nested too deeply: at most {MOST_LEVELS} levels are read."

_SMALLEST_NUMBER_AS_TEXT = 1_000_000  # seven digits: the shortest number that a detector may look for
DECODINGS = 3  # how often a string within a string is decoded

# 512 base64 characters in a row, or eight full lines of them: longer than a hash or a key (SHA-512 in hex has 128), so
# some encoded file.
_BASE64_WINDOW = 244  # half of the shortest match: 8 * 61 characters
_BASE64_RUN = re2.compile(rb"[A-Za-z0-9+/_-]{512}|(?:[A-Za-z0-9+/]{60,76}\r?\n){8}")
# A backslash is doubled for each string that holds the string: any number of them is one.
_UNICODE_ESCAPES = re.compile(r"(?:\\+u[0-9A-Fa-f]{4})+")
_BACKSLASHES_U = re.compile(r"\\+u")
_ESCAPED_SIGNS = {"n": "\n", "r": "\r", "t": "\t", "/": "/"}
_SIGNS = re.compile(r"\\+([nrt/])")
# HTML's names for what separates the parts of a value or is one of its characters; those of letters are not needed.
# fmt: off
_NAMES = (
    "nbsp", "ensp", "emsp", "thinsp", "numsp", "puncsp", "Tab", "NewLine", "shy", "zwj", "zwnj", "hyphen", "dash",
    "ndash", "mdash", "minus", "commat", "period", "plus", "num", "lowbar", "lpar", "rpar", "sol", "colon",
)
# fmt: on
_NAMED = {name: html5[f"{name};"] for name in _NAMES}
_ENTITIES = re.compile(rf"&(?:#(?:([0-9]{{1,7}})|[xX]([0-9A-Fa-f]{{1,6}}));?|({'|'.join(_NAMES)});)")


def parse(body: bytes) -> ChatRequest:
    """The request in `body`.

    Raises `BadRequest` and nothing else, whatever the bytes are: up to ten problems, `param` the first one's field.
    """
    document = _document(body)
    if found := problems(document):
        raise BadRequest(
            "; ".join(f"{path}: {text}" if path else text for path, text in found), param=found[0][0] or None
        )
    reader = _Reader()
    reader.read(document)
    for message in document["messages"]:
        reader.read_across(message.get("content"))
    parts = _unreadable(document, reader.texts) | ({"held"} if reader.held else frozenset())
    tools = bool(document.get("tools") or document.get("functions")) or any(
        message["role"] in ("tool", "function") or message.get("tool_calls") for message in document["messages"]
    )
    response_format = document.get("response_format")
    stream = bool(document.get("stream"))
    return ChatRequest(
        body=document,
        model=document.get("model") or "auto",
        stream=stream,
        include_usage=stream and bool((document.get("stream_options") or {}).get("include_usage")),
        max_tokens=_smaller(document.get("max_tokens"), document.get("max_completion_tokens")),
        n=document.get("n") or 1,
        tools=tools,
        images=bool(parts & _IMAGE_PARTS),
        schema=response_format is not None and response_format["type"] != "text",
        texts=tuple(reader.texts),
        parts=parts,
    )


def _document(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise BadRequest("The body is empty: send a JSON object with `messages`.")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(_not_json(body, error)) from None
    if not isinstance(document, dict):
        raise BadRequest("The body must be a JSON object with `messages`.")
    if body.count(b"[") + body.count(b"{") > MOST_LEVELS:
        try:  # orjson reads more levels than it writes, and what is read here will be written
            orjson.dumps(document)
        except orjson.JSONEncodeError:
            raise BadRequest(_TOO_DEEP) from None
    return document


def _not_json(body: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        body.decode()
    except UnicodeDecodeError as undecodable:
        return f"The body is not UTF-8: the byte at offset {undecodable.start} begins no character."
    if "recursion" in error.msg.lower() or "depth" in error.msg.lower():
        return _TOO_DEEP
    return f"The body is not valid JSON: line {error.lineno}, column {error.colno}."


def _smaller(first: int | None, second: int | None) -> int | None:
    """Where both names of the answer's bound are given the smaller one holds, so that neither is exceeded."""
    if first is None or second is None:
        return second if first is None else first
    return min(first, second)


def number_text(value: object) -> str | None:
    """A number as a detector reads it, or None where it is too short for any, or no number."""
    if not isinstance(value, int | float) or abs(value) < _SMALLEST_NUMBER_AS_TEXT:
        return None
    return str(int(value)) if value == int(value) else repr(value)


class _Reader:
    """Collects text in reading order.

    Invariant: every string and long number of what was read is in `texts`, except words of the schema. Uses a stack:
    a body may nest as deeply as the JSON parser allows, which is deeper than Python recurses.
    """

    __slots__ = ("held", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.held = False

    def read(self, document: object, decodings: int = DECODINGS) -> None:
        stack = [document]
        while stack:
            value = stack.pop()
            if isinstance(value, str):
                self.texts.append(value)
                if decodings and ("\\" in value or "&" in value or "%" in value):
                    self._decode(value, decodings - 1)
            elif isinstance(value, dict):
                self._open(value, stack)
            elif isinstance(value, list):
                stack.extend(reversed(value))
            elif (text := number_text(value)) is not None:
                self.texts.append(text)

    def read_across(self, content: object) -> None:
        """The text parts of one message as one text where a word may be split over two of them: providers join them
        with nothing in between."""
        if not isinstance(content, list) or len(content) < 2:
            return
        texts = [text for part in content if isinstance(text := part.get("text"), str) and text]
        if any(not (one[-1].isspace() or other[0].isspace()) for one, other in pairwise(texts)):
            self.read("".join(texts))

    def _open(self, value: dict[str, Any], stack: list[object]) -> None:
        for key, inner in reversed(value.items()):
            if key in SCHEMA_KEYS:
                if inner.__class__ is not str or inner not in SCHEMA_WORDS:
                    stack.append(inner)
                continue
            if key in _HELD and inner and isinstance(inner, str | list):
                self.held = True
            stack.append(inner)
            stack.append(key)

    def _decode(self, text: str, decodings: int) -> None:
        """Text within a string that is itself escaped: the JSON of a tool call's arguments, stray \\uXXXX and \\n of a
        log's line, an address's %2B, HTML's &#64; and &nbsp;. The JSON is read as text besides: of equal keys only the
        last is told, and others may read the first."""
        document = _json(text) if "\\" in text and text.lstrip()[:1] in ("{", "[", '"') else None
        plain = _UNICODE_ESCAPES.sub(_unescaped, text) if "\\u" in text else text
        plain = _ENTITIES.sub(_character, plain) if "&" in plain else plain
        plain = unquote(plain) if "%" in plain else plain
        if document is None and "\\" in plain:
            plain = _SIGNS.sub(_sign, plain)
        if plain != text:
            self.texts.append(plain)
        if document is not None:
            inner = _Reader()  # a key in there is the caller's own, not a field of this API
            inner.read(document, decodings)
            self.texts.extend(inner.texts)


def _json(text: str) -> Any:
    """What JSON says; None where the text is none."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


def _sign(escape: re.Match[str]) -> str:
    return _ESCAPED_SIGNS[escape[1]]


def _unescaped(escapes: re.Match[str]) -> str:
    return bytes.fromhex(_BACKSLASHES_U.sub("", escapes[0])).decode("utf-16-be", "replace")


def _character(entity: re.Match[str]) -> str:
    if entity[3]:
        return _NAMED[entity[3]]
    code = int(entity[1]) if entity[1] else int(entity[2], 16)
    return chr(code) if code <= sys.maxunicode else entity[0]


def _unreadable(document: Mapping[str, Any], texts: Iterable[str]) -> frozenset[str]:
    """The kinds of content that are not text. One that is not known is `unknown`: its name is the caller's."""
    found: set[str] = set()
    for message in document["messages"]:
        content = message.get("content")
        if isinstance(content, list):
            found.update(
                part["type"] if part["type"] in _UNREADABLE_PARTS else "unknown"
                for part in content
                if part["type"] not in _READABLE_PARTS
            )
            # Servers differ in whether a part's type or its fields count.
            found.update(*(_UNREADABLE_PARTS & part.keys() for part in content))
        if message.get("audio"):
            found.add("held")
    if any(tool["type"] not in _OPEN_TOOLS for tool in document.get("tools") or ()):
        found.add("held")
    if any(document.get(name) for name in _HELD_AT_TOP):
        found.add("held")
    if any(map(_encoded, texts)):
        found.add("base64")
    return frozenset(found)


def _encoded(text: str) -> bool:
    """Whether a part of the text is some file in base64."""
    if ";base64," in text:
        return True
    # A run that long covers one of these windows whole, and base64 has no spaces: prose is done without the pattern.
    windows = range(0, len(text) - _BASE64_WINDOW + 1, _BASE64_WINDOW)
    if all(" " in text[start : start + _BASE64_WINDOW] for start in windows):
        return False
    return _BASE64_RUN.search(text.encode(errors="replace")) is not None
