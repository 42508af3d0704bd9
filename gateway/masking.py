"""Placeholders for what detectors found in a request, and the way back.

Owns what a masked request is, which requests cannot be masked, and how a placeholder looks. Pure: the same request is
always masked in the same way, so that a growing conversation keeps its prefix (and the provider its prompt cache).
Refuses to mask in part: where something that was found cannot be replaced for certain, the request cannot be masked.

A placeholder is `[EMAIL_1]`: capitals, digits and underscores in brackets, which JSON, HTML and Markdown leave as they
are, and no detector takes for private. Where the request holds text of that form itself, a letter that it does not hold
keeps them apart: `[EMAIL_A_1]`.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, product
from string import ascii_uppercase
from typing import Any, Protocol

import orjson
import re2

from gateway.errors import BadRequest
from gateway.fold import Aligned, encode, folded
from gateway.labels import Span
from gateway.types import ChatRequest
from gateway.wire.chat import DECODINGS, SCHEMA_KEYS, SCHEMA_WORDS, number_text, parse

# Bounds on the work for one request; above them it stays home.
MOST_SPANS = 2_000
MOST_OCCURRENCES = 50_000
MOST_OF_ONE = 2_048  # characters of one value
MOST_OF_ALL = 256 * 1024
_LONGEST_CALLING_CODE = 3
_WITH_CALLING_CODE = 10  # digits
_MOST_GLUED = 256  # characters that belong to what was found and are not in its span

_NEVER = frozenset({"private_key"})  # a detector finds the head, and where the rest ends nobody knows
_SECRETS = frozenset({"api_key", "jwt", "password"})

_MEMORY = 256 << 20  # bytes that the automaton of one request's values may take
_LONGEST_NAME = 40
_NOT_IN_A_NAME = re.compile(r"[^A-Z0-9]+")
_PLACEHOLDER = re.compile(r"\[[A-Z0-9_]+\]")
_JSON_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?')
# A number that people write in several ways: seven digits and more, with or without what separates them.
_DIGITS = (re.compile(r"[0-9](?:[ \t\r\n.\-()/]{0,3}[0-9]){6,}"), re.compile(r"[0-9](?:[ .\-/]?[0-9]){6,}"))
_GAP = rb"[ \t\r\n.\-()/]{0,3}"
# What of a span is the secret itself, apart from the words that gave it away: it may stand elsewhere without them.
_TOKEN = re.compile(r"[^\s\"'`<>,;:=()\[\]{}]*[0-9][^\s\"'`<>,;:=()\[\]{}]*")
_SHORTEST_TOKEN = 8
_ENDS_OF_WORDS = re.compile(r"[\s\"'`=:]+")
_SHORTEST_SECRET = 6
_IN_A_SECRET = re.compile(r"[^\s\"'`<>,;)\]}]")
_BEFORE_A_PHONE = re.compile(r"[^0-9+(@]*(?=[0-9+(])")


class Spotter(Protocol):
    """What finds private data: labels.py's `Scanner`."""

    def scan(self, texts: Sequence[str]) -> frozenset[str]: ...
    def spans(self, text: str) -> Sequence[Span] | None: ...


class _CannotMask(Exception):
    """Something that was found cannot be replaced for certain."""


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
    _values: _Values = field(repr=False)

    def found(self) -> frozenset[str]:
        """The kinds that are found in the masked form: none, or it must not leave."""
        return self._spotter.scan(self.chat.texts)

    def hides(self, text: str) -> bool:
        """Whether the text holds something that is masked."""
        try:
            return bool(self._values.intervals(text))
        except _CannotMask:
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
            values = self._values(chat.texts)
            hiding = _Hiding(values, "\n".join(chat.texts))
            body = orjson.loads(orjson.dumps(chat.body))
            _rewrite(body, hiding)
            again = parse(orjson.dumps(body))
            if again.parts or any(values.intervals(text) for text in again.texts):
                return None
        except (_CannotMask, BadRequest):
            return None
        if self._spotter.scan(again.texts):
            return None
        return Masked(chat, again, Mask(hiding.originals), self._spotter, values)

    def _values(self, texts: Sequence[str]) -> _Values:
        """What was found, from the texts as one: so a value that is split over two of them is noticed."""
        joined = "\n".join(texts)
        spans = self._spotter.spans(joined)
        if not spans or len(spans) > MOST_SPANS:
            raise _CannotMask
        starts = list(accumulate((len(text) + 1 for text in texts), initial=0))
        values: dict[str, str] = {}
        length = 0
        for start, end, kind in (_place(joined, starts, span) for span in spans):
            value = joined[start:end]
            length += len(value)
            if len(value) > MOST_OF_ONE or length > MOST_OF_ALL:
                raise _CannotMask
            values.setdefault(value, kind)
            for token in _tokens(value, kind):
                values.setdefault(token, kind)
        return _Values(values)


def _tokens(value: str, kind: str) -> Iterator[str]:
    """What of a value gives it away without the words around it."""
    for token in _TOKEN.findall(value):
        if len(token) >= _SHORTEST_TOKEN:
            yield token
    if kind in _SECRETS:
        last = _ENDS_OF_WORDS.split(value)[-1]
        if len(last) >= _SHORTEST_SECRET:
            yield last


def _place(texts: str, starts: Sequence[int], span: Span) -> tuple[int, int, str]:
    """Where all of what was found stands. A detector may have seen the end of a name only, so what is glued to its span
    belongs to it. Raises `_CannotMask` where it spans two texts; `starts` are where each begins, and the end."""
    start, end, kind = span.start, span.end, span.kind
    if kind in _NEVER or start >= end:
        raise _CannotMask
    if kind == "phone" and (words := _BEFORE_A_PHONE.match(texts, start, end)):
        start = words.end()  # "call me at" tells a number from others, and is no part of it
    text = bisect_right(starts, start)
    first, last = max(starts[text - 1], start - _MOST_GLUED), min(starts[text] - 1, end + _MOST_GLUED)
    if end >= starts[text]:
        raise _CannotMask
    if kind == "email" and '"' in texts[start:end]:  # "jane doe"@example.org
        opening = texts.rfind('"', first, start)
        start = start if opening < 0 else opening
    if _glued(texts[start], kind):
        while start > first and _glued(texts[start - 1], kind):
            start -= 1
    while end < last and (_glued(texts[end]) or (kind in _SECRETS and _IN_A_SECRET.match(texts[end]))):
        end += 1
    if end - span.end >= _MOST_GLUED or span.start - start >= _MOST_GLUED:
        raise _CannotMask
    return start, end, kind


def _glued(character: str, kind: str = "") -> bool:
    """Whether a character next to another one of the kind belongs to the same word."""
    return (
        character.isalnum()
        or character == "_"
        or (kind == "email" and character in ".%+'&-")
        or (not character.isascii() and unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf"))
    )


class _Values:
    """What must not be seen, and where it occurs in a text: in upper or lower case, in any form that detectors read
    as the same, numbers with any separators."""

    def __init__(self, kinds: Mapping[str, str]) -> None:
        """`kinds`: by value. Raises `_CannotMask` where there are too many or one is empty."""
        self.kinds = dict(kinds)
        patterns: set[bytes] = set()
        for value, kind in kinds.items():
            read = folded(value)
            patterns.add(re2.escape(encode(read)))
            for digits in _numbers(read, kind):
                patterns.add(_GAP.join(digit.encode() for digit in digits))
                self.kinds.setdefault(digits, kind)
        options = re2.Options()
        options.max_mem = _MEMORY
        options.log_errors = False  # it would write the values to stderr
        options.longest_match = True
        options.never_capture = True
        options.case_sensitive = False
        if b"" in patterns:
            raise _CannotMask
        try:
            self._pattern = re2.compile(b"|".join(sorted(patterns)), options)
        except re2.error:
            raise _CannotMask from None
        self._by_spelling = {_spelling(value): kind for value, kind in self.kinds.items()}

    def intervals(self, text: str) -> list[tuple[int, int, str]]:
        """Where the values occur, as (start, end, kind) in characters; those that overlap as one. Raises `_CannotMask`
        where there are too many."""
        if self._pattern.search(encode(folded(text))) is None:  # where things stand takes longer to find out
            return []
        aligned = Aligned.of(text)
        found: list[tuple[int, int, str]] = []
        match = self._pattern.search(aligned.text)
        while match is not None:
            start, end = match.span()
            kind = self._kind(aligned.text[start:end].decode())
            found.append((aligned.starts[start], aligned.ends[end - 1], kind))
            if len(found) > MOST_OCCURRENCES:
                raise _CannotMask
            match = self._pattern.search(aligned.text, start + 1)  # another may begin within this one and go further
        return list(_whole(text, _merged(found)))

    def _kind(self, text: str) -> str:
        return self._by_spelling.get(_spelling(text)) or next(iter(self.kinds.values()))


def _numbers(text: str, kind: str) -> Iterator[str]:
    """The digits of the numbers in what was found; two that stand together also by themselves, and a phone number also
    without its country's code."""
    for pattern in _DIGITS:
        for number in pattern.findall(text):
            digits = re.sub(r"[^0-9]", "", number)
            yield digits
            if kind == "phone" and len(digits) >= _WITH_CALLING_CODE:
                yield digits[_LONGEST_CALLING_CODE:]


def _whole(text: str, intervals: Iterable[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
    """The intervals with the ASCII letters and digits that go on at either end: half a number tells too much. Those
    that come to touch become one. `intervals` are in order and apart; no character is looked at twice."""
    pending: tuple[int, int, str] | None = None
    for start, end, kind in intervals:
        if pending is not None and end <= pending[1]:
            continue
        first = pending[1] if pending is not None else 0
        while start > first and _goes_on(text, start):
            start -= 1
        while end < len(text) and _goes_on(text, end):
            end += 1
        if pending is not None and start <= first and _goes_on(text, first):
            pending = (pending[0], end, pending[2])
            continue
        if pending is not None:
            yield pending
        pending = (start, end, kind)
    if pending is not None:
        yield pending


def _goes_on(text: str, at: int) -> bool:
    """Whether an ASCII word has no end between this character and the one before."""
    pair = text[at - 1 : at + 1]
    return pair.isascii() and pair.isalnum()


def _spelling(text: str) -> str:
    """What two ways to write the same value have in common."""
    return re.sub(r"[ \t\r\n.\-()/]", "", folded(text)).casefold()


def _merged(found: Iterable[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
    """Intervals in order, those that overlap as one, of the kind of the first."""
    pending: tuple[int, int, str] | None = None
    for start, end, kind in sorted(found, key=lambda interval: (interval[0], -interval[1])):
        if pending is not None and start < pending[1]:
            pending = (pending[0], max(pending[1], end), pending[2])
            continue
        if pending is not None:
            yield pending
        pending = (start, end, kind)
    if pending is not None:
        yield pending


class _Hiding:
    """Replaces values, and remembers by what. The same text always gets the same placeholder."""

    def __init__(self, values: _Values, texts: str) -> None:
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
    within strings. Raises `_CannotMask` for a number. Uses a stack, because a body may nest deeply."""
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
                raise _CannotMask
        else:
            container[:] = [_value(value, hide, inner) for value in container]
        stack += reversed(inner)


def _value(value: Any, hide: Callable[[str], str], containers: list[Any]) -> Any:
    if isinstance(value, str):
        return _string(value, hide, DECODINGS)
    if isinstance(value, dict | list):
        containers.append(value)
    elif (digits := number_text(value)) is not None and hide(digits) != digits:
        raise _CannotMask  # the field takes a number, and a placeholder is none
    return value


def _string(text: str, hide: Callable[[str], str], decodings: int) -> str:
    """The string masked. One that is JSON itself, such as a tool call's arguments, is still JSON afterwards, and what
    is not masked in it stays as it is written."""
    if not decodings and "\\" in text:
        raise _CannotMask  # what may be escaped in it is not looked at
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
