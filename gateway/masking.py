"""Placeholders for what detectors found in a request, and the way back.

Owns what a masked request is, and how a placeholder looks; what is masked, `values.py` knows. Pure: the same request is
always masked in the same way, so that a growing conversation keeps its prefix (and the provider its prompt cache).
Refuses to mask in part: where something that was found cannot be replaced for certain, the request cannot be masked.

A placeholder is `[EMAIL_1]`: capitals, digits and underscores in brackets, which JSON, HTML and Markdown leave as they
are, and no detector takes for private. Where the request holds text of that form itself, a letter that it does not hold
keeps them apart: `[EMAIL_A_1]`.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, product
from string import ascii_uppercase
from typing import Any, Protocol

import orjson

from gateway.errors import BadRequest
from gateway.labels import Span
from gateway.types import ChatRequest
from gateway.values import CannotMask, Values, values_in
from gateway.wire.chat import DECODINGS, SCHEMA_KEYS, SCHEMA_WORDS, number_text, parse

_LONGEST_NAME = 40
_NOT_IN_A_NAME = re.compile(r"[^A-Z0-9]+")
_PLACEHOLDER = re.compile(r"\[[A-Z0-9_]+\]")
_JSON_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?')


class Spotter(Protocol):
    """What finds private data: labels.py's `Scanner`."""

    def scan(self, texts: Sequence[str]) -> frozenset[str]: ...
    def spans(self, text: str) -> Sequence[Span] | None: ...


@dataclass(frozen=True, slots=True)
class Mask:
    """The placeholders of one request and what they stand for. Invariant: none of them occurs in the request as the
    caller sent it."""

    originals: Mapping[str, str] = field(repr=False)
    _sorted: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_sorted", tuple(sorted(self.originals)))

    def __len__(self) -> int:
        return len(self.originals)

    def restored(self, text: str, *, within_json: bool = False) -> str:
        """The text with every placeholder replaced by what it stands for. `within_json`: the text is JSON, and what is
        put into its strings is escaped. A placeholder that the model changed (other case, other brackets) stays."""
        if "[" not in text:
            return text

        def original(found: re.Match[str]) -> str:
            value = self.originals.get(found[0])
            if value is None:
                return found[0]
            return orjson.dumps(value).decode()[1:-1] if within_json else value

        return _PLACEHOLDER.sub(original, text)

    def unfinished(self, text: str) -> int:
        """How many characters at the end of the text may be the beginning of a placeholder."""
        start = text.rfind("[")
        if start < 0:
            return 0
        tail = text[start:]
        at = bisect_left(self._sorted, tail)
        begins = at < len(self._sorted) and self._sorted[at] != tail and self._sorted[at].startswith(tail)
        return len(tail) if begins else 0


@dataclass(frozen=True, slots=True)
class Masked:
    """A request together with its masked form. Invariant: nothing that was found in `original` is in `chat`."""

    original: ChatRequest = field(repr=False)
    chat: ChatRequest = field(repr=False)
    mask: Mask
    _spotter: Spotter = field(repr=False)
    _values: Values = field(repr=False)

    def found(self) -> frozenset[str]:
        """The kinds that are found in the masked form: none, or it must not leave."""
        return self._spotter.scan(self.chat.texts)

    def hides(self, text: str) -> bool:
        """Whether the text holds something that is masked."""
        try:
            return bool(self._values.intervals(text))
        except CannotMask:
            return True


class Masker:
    """Masks requests for one policy. Immutable once built, so that threads may share it."""

    def __init__(self, spotter: Spotter) -> None:
        self._spotter = spotter

    def masked(self, chat: ChatRequest) -> Masked | None:
        """The request masked, or None where it cannot be: it holds what is no text, or something that was found cannot
        be located, spans two strings, or is still there in another form. Takes time linear in the request's length."""
        if chat.parts:
            return None
        try:
            values = values_in(chat.texts, self._spotter.spans("\n".join(chat.texts)))
            hiding = _Hiding(values, "\n".join(chat.texts))
            body = orjson.loads(orjson.dumps(chat.body))
            _rewrite(body, hiding)
            again = parse(orjson.dumps(body))
            if again.parts or any(values.intervals(text) for text in again.texts):
                return None
        except (CannotMask, BadRequest):
            return None
        if self._spotter.scan(again.texts):
            return None
        return Masked(chat, again, Mask(hiding.originals), self._spotter, values)


class _Hiding:
    """Replaces values, and remembers by what. The same text always gets the same placeholder."""

    def __init__(self, values: Values, texts: str) -> None:
        """`texts`: all of the request, in which no placeholder may occur before."""
        self._values = values
        self._names = {kind: _name(kind) for kind in values.kinds.values()}
        self._tag = _free_tag(frozenset(self._names.values()), texts)
        self._placeholders: dict[str, str] = {}
        self._used: dict[str, int] = {}

    @property
    def originals(self) -> dict[str, str]:
        return {placeholder: value for value, placeholder in self._placeholders.items()}

    def __call__(self, text: str) -> str:
        """The text with placeholders."""
        intervals = self._values.intervals(text)
        if not intervals:
            return text
        at, pieces = 0, []
        for start, end, kind in intervals:
            pieces += [text[at:start], self._placeholder(text[start:end], kind)]
            at = end
        return "".join([*pieces, text[at:]])

    def _placeholder(self, value: str, kind: str) -> str:
        known = self._placeholders.get(value)
        if known is not None:
            return known
        name = self._names[kind]
        number = self._used[name] = self._used.get(name, 0) + 1
        placeholder = self._placeholders[value] = f"[{name}_{self._tag}{number}]"
        return placeholder


def _name(kind: str) -> str:
    """How a placeholder calls a kind."""
    return _NOT_IN_A_NAME.sub("_", kind.upper()).strip("_")[:_LONGEST_NAME] or "VALUE"


def _free_tag(names: frozenset[str], texts: str) -> str:
    """What makes placeholders differ from all that the request says, as `A_`; nothing where they do anyway."""
    lowered = texts.lower()
    taken: set[str] = set()
    for name in names:
        taken.update(re.findall(rf"\[{name.lower()}_([a-z]*)", lowered))
    if not taken:
        return ""
    letters = ("".join(tag) for length in count(1) for tag in product(ascii_uppercase, repeat=length))
    return next(tag for tag in letters if tag.lower() not in taken) + "_"


def _rewrite(document: Any, hide: Callable[[str], str]) -> None:
    """Replace in a body of JSON, in place, what `wire.chat` reads as text: values, keys that are the caller's, JSON
    within strings. Raises `CannotMask` for a number. Uses a stack, because a body may nest deeply."""
    stack = [document]
    while stack:
        container = stack.pop()
        inner: list[Any] = []
        if isinstance(container, dict):
            items = list(container.items())
            container.clear()
            for key, value in items:
                ours = key in SCHEMA_KEYS
                kept = ours and value.__class__ is str and value in SCHEMA_WORDS
                container[key if ours else hide(key)] = value if kept else _value(value, hide, inner)
            if len(container) != len(items):
                raise CannotMask
        else:
            container[:] = [_value(value, hide, inner) for value in container]
        stack += reversed(inner)


def _value(value: Any, hide: Callable[[str], str], containers: list[Any]) -> Any:
    if isinstance(value, str):
        return _string(value, hide, DECODINGS)
    if isinstance(value, dict | list):
        containers.append(value)
    elif (digits := number_text(value)) is not None and hide(digits) != digits:
        raise CannotMask  # the field takes a number, and a placeholder is none
    return value


def _string(text: str, hide: Callable[[str], str], decodings: int) -> str:
    """The string masked. One that is JSON itself, such as a tool call's arguments, is still JSON afterwards, and what
    is not masked in it stays as it is written."""
    if not decodings and "\\" in text:
        raise CannotMask  # what may be escaped in it is not looked at
    if not decodings or text.lstrip()[:1] not in ("{", "[", '"') or not _is_json(text):
        return hide(text)

    def token(found: re.Match[str]) -> str:
        written = found[0]
        if written[0] != '"':
            hidden = hide(written)
            return written if hidden == written else orjson.dumps(hidden).decode()
        value = orjson.loads(written)
        hidden = _string(value, hide, decodings - 1)
        return written if hidden == value else orjson.dumps(hidden).decode()

    return _JSON_TOKEN.sub(token, text)


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True
