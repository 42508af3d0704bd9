"""Owns the forms in which models write tool calls: which one a chat template teaches, a grammar of it, and its reading
from text that comes in pieces; refuses tokens and HTTP.

hermes    <tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>      Hermes, Qwen 2.5 and 3
llama     {"name": …, "parameters": {…}}; …                          Llama 3.1 and later
mistral   [TOOL_CALLS][{"name": …, "arguments": {…}}, …]             Mistral up to the tokenizer v7
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from hashlib import blake2b
from typing import Any

import orjson

from local_engine.conversation import Tool
from local_engine.grammar import compact


@dataclass(frozen=True, slots=True)
class Family:
    """One form. `opener` begins a call, or a list of them; without one a call begins where the answer does, perhaps
    behind `tag`. `between` are the characters that may stand before a call."""

    name: str
    opener: str
    closer: str
    arguments: str
    between: str = ""
    tag: str = ""
    id_length: int | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that are special tokens in some vocabularies and have to be seen all the same."""
        return tuple(mark for mark in (self.opener, self.closer, self.tag) if len(mark) > 1)


HERMES = Family("hermes", "<tool_call>", "</tool_call>", "arguments")
LLAMA = Family("llama", "", "", "parameters", between=";", tag="<|python_tag|>")
MISTRAL = Family("mistral", "[TOOL_CALLS]", "]", "arguments", between="[,", id_length=9)

_OTHER_FORMS = ("<function=", "<arg_key>", "[ARGS]", "[CALL_ID]")
"""In templates that use the same opener for something else (Qwen3-Coder, GLM 4.5, Mistral from v11 on)."""


def family_of(template: str) -> Family | None:
    """The form that a chat template teaches; None where it knows no tools, or teaches another form."""
    if not re.search(r"\btools\b", template) or any(other in template for other in _OTHER_FORMS):
        return None
    if MISTRAL.opener in template:
        return MISTRAL
    if HERMES.opener in template and HERMES.arguments in template:
        return HERMES
    if "<|start_header_id|>" in template and LLAMA.arguments in template:
        return LLAMA
    return None


def fitting_id(call_id: str, family: Family | None) -> str:
    """The id as it stands, or one of the length that the family's templates insist on, the same for the same id."""
    length = family.id_length if family is not None else None
    if length is None or (len(call_id) == length and call_id.isascii() and call_id.isalnum()):
        return call_id
    return blake2b(call_id.encode()).hexdigest()[:length]


def new_id(answer_id: str, choice: int, index: int, family: Family) -> str:
    """A call's id: unlike that of any other call of any answer."""
    digest = blake2b(f"{answer_id}-{choice}-{index}".encode()).hexdigest()
    return digest[: family.id_length] if family.id_length else f"call_{digest[:24]}"


def grammar(
    family: Family,
    tools: Sequence[Tool],
    token_of: Callable[[str], int | None],
    *,
    parallel: bool,
    or_answer: str | None = None,
) -> str:
    """A Lark grammar, as llguidance reads it, of calls of these tools; `or_answer` is a JSON Schema of what may come
    instead. `token_of` gives the id of a text that is a special token."""

    def mark(text: str) -> str:
        token = token_of(text)
        return orjson.dumps(text).decode() if token is None else f"<[{token}]>"

    more = {"hermes": '"\\n" call', "llama": '"; " call', "mistral": '", " call'}[family.name]
    calls = f"call ({more})*" if parallel else "call"
    body = " | ".join(f"call_{index}" for index in range(len(tools)))
    rules = [f"start: {'calls' if or_answer is None else 'calls | answer'}"]
    match family.name:
        case "hermes":
            rules += [f"calls: {calls}", f'call: {mark(family.opener)} "\\n" body "\\n" {mark(family.closer)}']
        case "mistral":
            rules += [f'calls: {mark(family.opener)} "[" {calls} "]"', "call: body"]
        case _:
            rules += [f"calls: {calls}", "call: body"]
    rules.append(f"body: {body}")
    for index, tool in enumerate(tools):
        head = orjson.dumps(f'{{"name": "{tool.name}", "{family.arguments}": ').decode()
        rules.append(f'call_{index}: {head} %json {compact(tool.parameters)} "}}"')
    if or_answer is not None:
        rules.append(f"answer: %json {compact(or_answer)}")
    return "\n".join(rules) + "\n"


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """The `index`-th call of the answer."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the JSON text of that call's arguments, as the model wrote it."""

    index: int
    text: str


Said = Content | CallBegins | Arguments


class _At(Enum):
    START = auto()  # nothing but white space has come
    TEXT = auto()  # an opener may come
    PLAIN = auto()  # no call can come any more
    OPEN = auto()  # where a call's object may begin, or the calls end
    HEAD = auto()  # in a call, before its arguments
    ARGUMENTS = auto()
    TAIL = auto()  # in a call, behind its arguments
    DONE = auto()  # all that may be called has been; the rest is dropped


class CallReader:
    """Tells calls from text as an answer grows.

    Invariants: an object counts as a call only if it names one of `names`, else it is text, to the letter; once a call
    has begun it is not taken back, even where its arguments break off.
    """

    def __init__(self, family: Family, names: frozenset[str], *, parallel: bool = True) -> None:
        self._family = family
        self._names = names
        self._parallel = parallel
        self._at = _At.TEXT if family.opener else _At.START
        self._held = ""
        self._before = ""  # of `held`, what is text where no call comes of it
        self._depth = _Depth()
        self._in_section = False
        self._said: list[Said] = []
        self._head = re.compile(
            r'\{\s*"name"\s*:\s*"([a-zA-Z0-9_-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
        )
        self.calls = 0

    def add(self, text: str) -> list[Said]:
        """What is certain after this piece."""
        self._held += text
        steps: dict[_At, Callable[[], bool]] = {
            _At.START: self._start,
            _At.TEXT: self._text,
            _At.PLAIN: self._plain,
            _At.OPEN: self._open,
            _At.HEAD: self._read_head,
            _At.ARGUMENTS: self._arguments,
            _At.TAIL: self._tail,
            _At.DONE: self._drop,
        }
        while steps[self._at]():
            pass
        return self._taken()

    def end(self) -> list[Said]:
        """What was held back, once nothing more comes."""
        unfinished = self._at in (_At.START, _At.TEXT, _At.HEAD) or (self._at is _At.OPEN and not self._in_section)
        left = self._before + self._held
        if unfinished and not (self.calls and left.isspace()):
            self._show(left)
        self._before = self._held = ""
        return self._taken()

    def _taken(self) -> list[Said]:
        said, self._said = self._said, []
        return said

    def _show(self, text: str) -> None:
        if text:
            self._said.append(Content(text))

    def _start(self) -> bool:
        rest, tag = self._held.lstrip(), self._family.tag
        if not rest or (tag.startswith(rest) and rest != tag):
            return False
        if rest.startswith(tag):
            rest = rest[len(tag) :].lstrip()
            if not rest:
                return False
        if rest.startswith("{"):
            self._enter(self._held[: len(self._held) - len(rest)], rest)
        else:
            self._at = _At.PLAIN
        return True

    def _enter(self, before: str, rest: str) -> None:
        self._before, self._held = before, rest
        self._at, self._in_section = _At.OPEN, False

    def _text(self) -> bool:
        opener = self._family.opener
        text, found, rest = self._held.partition(opener)
        if found:
            shown = text.rstrip()
            self._show(shown)
            self._enter(text[len(shown) :] + opener, rest)
            return True
        certain = len(text) - next((n for n in range(len(opener) - 1, 0, -1) if text.endswith(opener[:n])), 0)
        certain = len(text[:certain].rstrip())  # white space before a call belongs to it
        self._show(text[:certain])
        self._held = text[certain:]
        return False

    def _plain(self) -> bool:
        self._show(self._held)
        self._held = ""
        return False

    def _open(self) -> bool:
        rest, closer = self._held.lstrip(self._family.between + " \t\r\n"), self._family.closer
        if not rest:
            return False
        if rest.startswith("{"):
            self._before += self._held[: len(self._held) - len(rest)]
            self._held, self._at, self._depth = rest, _At.HEAD, _Depth()
            return True
        if self._in_section and closer and closer.startswith(rest[: len(closer)]):
            if len(rest) < len(closer):
                return False
            rest = rest[len(closer) :]
        if self._in_section:
            self._held = rest
            self._before = ""
            self._at = _At.TEXT if self._family.opener else _At.PLAIN
        else:
            self._give_up(0)  # of the mark alone: what follows may hold another
        return True

    def _give_up(self, size: int) -> None:
        """What is held is no call: it is text, as far as `size`."""
        self._show(self._before + self._held[:size])
        self._before, self._held = "", self._held[size:]
        self._at = _At.TEXT if self._family.opener else _At.PLAIN

    def _read_head(self) -> bool:
        found = self._head.match(self._held)
        if found and found[1] in self._names:
            self._begin(found[1])
            self._held, self._at, self._depth = self._held[found.end() :], _At.ARGUMENTS, _Depth()
            return True
        end = self._depth.end(self._held)
        if end is None:
            return False
        name, arguments = _as_call(self._held[:end])
        if name not in self._names or arguments is None:
            self._give_up(end)
            return True
        self._begin(name)
        self._said.append(Arguments(self.calls - 1, arguments))
        self._held = self._held[end:]
        self._leave()
        return True

    def _begin(self, name: str) -> None:
        self._said.append(CallBegins(self.calls, name))
        self.calls += 1
        self._before, self._in_section = "", True

    def _leave(self) -> None:
        self._at = _At.OPEN if self._parallel else _At.DONE

    def _arguments(self) -> bool:
        end = self._depth.end(self._held)
        text = self._held if end is None else self._held[:end]
        if text:
            self._said.append(Arguments(self.calls - 1, text))
        self._held = self._held[len(text) :]
        self._depth.forget(len(text))
        if end is None:
            return False
        self._at, self._depth = _At.TAIL, _Depth(1)
        return True

    def _tail(self) -> bool:
        end = self._depth.end(self._held)
        if end is None:
            return False
        self._held = self._held[end:]
        self._leave()
        return True

    def _drop(self) -> bool:
        self._held = ""
        return False


class _Depth:
    """How deep a JSON text is nested, over pieces. Looks at each character once."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._seen = 0
        self._in_string = False
        self._escaped = False

    def end(self, text: str) -> int | None:
        """Where the outermost object ends in `text`, which begins as the one before did and may be longer."""
        for position in range(self._seen, len(text)):
            character = text[position]
            self._seen = position + 1
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return position + 1
        return None

    def forget(self, size: int) -> None:
        """The first so many characters will not be shown again."""
        self._seen -= size


def _as_call(text: str) -> tuple[str, str | None]:
    """Name and arguments of an object that is written in another order than usual; no arguments where it is no call."""
    try:
        found: Any = orjson.loads(text)
    except orjson.JSONDecodeError:
        return "", None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return "", None
    arguments = found.get("arguments", found.get("parameters"))
    try:
        return found["name"], orjson.dumps(arguments).decode() if isinstance(arguments, dict) else None
    except orjson.JSONEncodeError:  # nested deeper than orjson writes, though it reads it
        return found["name"], None
