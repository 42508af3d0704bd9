"""YAML text as a tree in which every value and key knows its place.

Owns the strictness that PyYAML lacks: duplicate keys, aliases that grow without bound, depth, and the words and
numbers that YAML 1.1 reads as something else. Refuses to know the policy language: any tree of mappings, lists and
plain values passes.

PyYAML's `compose` descends recursively in C and ends the process on a file of some thousand brackets, so the tree is
built from the parser's events, which come one by one, down to `MAX_DEPTH`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 200_000
MOST_LOGGED = 100  # problems of one file that is not loaded

Scalar = str | int | float | bool
Loc = Sequence[str | int]

_TAG = "tag:yaml.org,2002:"
_TEXT = "str"
_SCALAR, _ALIAS, _LIST = yaml.ScalarEvent, yaml.AliasEvent, yaml.SequenceStartEvent
_LIST_END, _MAPPING_END = yaml.SequenceEndEvent, yaml.MappingEndEvent
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
# What is outside of YAML 1.1's c-printable, as libyaml reads it, and what ends a line there.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LINE_END = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_DECIMAL = re.compile(r"[-+]?[0-9]+\.[0-9]*")
# What a word may be besides text, by its first character.
_RESOLVERS: Mapping[str, Sequence[tuple[str, re.Pattern[str]]]] = yaml.CSafeLoader.yaml_implicit_resolvers


class Place(NamedTuple):
    """A spot in a file; line and column count from 1, and line 0 is the file as a whole."""

    file: str
    line: int = 0
    column: int = 0

    def problem(self, message: str) -> Problem:
        return Problem(self.file, self.line, self.column, message)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a policy, where, and what to do."""

    file: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{where}: {self.message}"


def first_of(problems: Sequence[Problem]) -> Sequence[Problem]:
    """The first `MOST_LOGGED` problems, and where there are more, one that says how many."""
    more = len(problems) - MOST_LOGGED
    if more <= 0:
        return problems
    return (*problems[:MOST_LOGGED], Problem(problems[0].file, 0, 0, f"and {more:,} more things that are wrong"))


Event = Any  # of PyYAML, which has no types
Mark = Any  # where an event begins
_NO_KEYS: Mapping[str, Mark] = MappingProxyType({})


def _place(file: str, mark: Mark) -> Place:
    return Place(file, mark.line + 1, mark.column + 1)


_NEW = tuple.__new__  # of named tuples, past the function that takes their fields one by one


class Node(NamedTuple):
    """A value and its place, as the parser's mark: it becomes a `Place` only where somebody asks, since a file without
    an error has thousands.

    `plain` is the value without places: mappings, lists, text, numbers and booleans. `inner` are the values in a
    mapping or list; of most text there is the mark alone, and a node only where somebody asks for it. `keys` are the
    marks of all keys that a mapping states, also of those whose value was found wrong and is therefore no longer in
    `plain`: so a wrong field is not reported as missing as well. `sound` is false where anything in the value was wrong
    as YAML. `size` counts the values in it.
    """

    file: str
    mark: Mark
    plain: Any
    inner: list[Node | Mark] | dict[str, Node | Mark] | None = None
    keys: Mapping[str, Mark] = _NO_KEYS
    sound: bool = True
    size: int = 1

    @property
    def place(self) -> Place:
        return _place(self.file, self.mark)

    def child(self, part: str | int) -> Node | None:
        """The value under a key or at an index; None where there is none."""
        found: Node | Mark = None
        if isinstance(self.inner, dict) and isinstance(part, str):
            found = self.inner.get(part)
        elif isinstance(self.inner, list) and isinstance(part, int) and 0 <= part < len(self.inner):
            found = self.inner[part]
        return found if found is None or isinstance(found, Node) else Node(self.file, found, self.plain[part])

    def children(self, key: str) -> dict[str, Node]:
        """The entries of the mapping under `key`; empty where there is none."""
        child = self.child(key)
        if child is None or not isinstance(child.inner, dict):
            return {}
        return {name: node for name in child.inner if (node := child.child(name)) is not None}

    def keys_under(self, key: str) -> Collection[str]:
        """The keys of the mapping under `key` as stated, right or wrong."""
        child = self.child(key)
        return child.keys if child is not None else ()

    def items(self, key: str) -> list[Node]:
        """The items of the list under `key`; a lone value is a list of one, as the language reads it."""
        child = self.child(key)
        if child is None or isinstance(child.inner, dict):
            return []
        if child.inner is None:
            return [child]
        pairs = zip(child.inner, child.plain, strict=True)
        return [found if isinstance(found, Node) else Node(self.file, found, said) for found, said in pairs]

    def place_of(self, loc: Loc, *, key: bool = False) -> Place:
        """The place of the value at `loc`, or of its key; of the nearest value around it where `loc` leads nowhere."""
        node = self
        for index, part in enumerate(loc):
            last = index == len(loc) - 1
            following = node.child(part)
            if isinstance(part, str) and part in node.keys and (following is None or (last and key)):
                return _place(self.file, node.keys[part])
            if following is None:
                break
            node = following
        return node.place

    def prune(self, loc: Loc) -> None:
        """Take out the value at `loc`, or the nearest around it, and what is left empty by that. The root itself
        stays."""
        path = [(self, part) for part in loc[:1]]
        for part in loc[1:]:
            following = path[-1][0].child(path[-1][1])
            if following is None or following.child(part) is None:
                break
            path.append((following, part))
        for parent, part in reversed(path):
            if isinstance(parent.inner, dict) and isinstance(part, str):
                parent.inner.pop(part, None)
                parent.plain.pop(part, None)
            elif isinstance(parent.inner, list) and isinstance(part, int):
                del parent.inner[part]
                del parent.plain[part]
            if parent.inner:
                return


class _Fatal(Exception):
    """A problem after which the rest of the file cannot be read."""


def parse(file: str, text: str) -> tuple[Node | None, list[Problem]]:
    """The tree of a file and what is wrong with it as YAML. The tree is None where reading could not go on or the
    file is no mapping."""
    whole = Place(file)
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        return None, [whole.problem(f"the file is larger than {MAX_BYTES:,} bytes")]
    builder = _Builder(file)
    try:
        root = builder.document(text)
    except _Fatal:
        return None, builder.problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = _place(file, mark) if mark is not None else whole
        # libyaml's sentences quote single characters at most.
        return None, [*builder.problems, place.problem(f"this is not YAML: {error.problem or error.context}")]
    except (yaml.reader.ReaderError, UnicodeEncodeError):
        return None, [*builder.problems, _forbidden_in(file, text)]
    return root, builder.problems


def _forbidden_in(file: str, text: str) -> Problem:
    """What to say of the first character that YAML does not allow; it is not shown, since a terminal may obey it."""
    found = _FORBIDDEN.search(text)
    at = found.start() if found is not None else 0
    before = _LINE_END.split(text[:at])
    place = Place(file, len(before), len(before[-1]) + 1)
    return place.problem(f"YAML does not allow the character U+{ord(text[at]):04X} here: take it out")


class _Kinds(dict[str, str]):
    """What YAML 1.1 takes text without quotes for: str, int, bool, null, merge, timestamp, ... Looked at once each."""

    def __missing__(self, value: str) -> str:
        kind = _TEXT
        for tag, pattern in _RESOLVERS.get(value[:1], ()):
            if pattern.match(value):
                kind = tag.removeprefix(_TAG)
                break
        self[value] = kind
        return kind


class _Builder:
    """Turns one file's events into nodes. Problems that leave the structure readable are collected, and the value at
    fault is left out."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self._anchors: dict[str, Node | None] = {}
        self._copied = 0
        self._kinds = _Kinds()

    def document(self, text: str) -> Node | None:
        self._next: Callable[[], Any] = yaml.CSafeLoader(text).get_event
        self._next()  # the stream's start
        if isinstance(self._next(), yaml.StreamEndEvent):
            self._stop(Place(self.file), "the file is empty")
        root = self._node(self._next(), 0)
        self._next()  # the document's end
        more = self._next()
        if isinstance(more, yaml.DocumentStartEvent):
            self._stop(more.start_mark, "a second document begins here; a policy file holds one")
        if root is not None and not isinstance(root.plain, dict):
            self._stop(root.mark, 'the file must be a mapping, such as "version: 1"')
        return root

    def _stop(self, at: Mark | Place, message: str) -> NoReturn:
        self._note(at, message)
        raise _Fatal

    def _note(self, at: Mark | Place, message: str) -> None:
        place = at if isinstance(at, Place) else _place(self.file, at)
        self.problems.append(place.problem(message))

    def _node(self, event: Event, depth: int) -> Node | None:
        mark = event.start_mark
        if depth > MAX_DEPTH:
            self._stop(mark, f"values are nested more than {MAX_DEPTH} deep")
        kind, anchor = event.__class__, event.anchor
        if kind is _ALIAS:
            return self._alias(mark, str(anchor))
        if event.tag is not None:
            self._stop(mark, "tags are not part of the language; leave the tag out")
        if anchor is not None:
            self._anchors[anchor] = None
        if kind is _SCALAR:
            node = self._scalar(mark, event)
        elif kind is _LIST:
            node = self._sequence(mark, depth)
        else:
            node = self._mapping(mark, depth)
        if anchor is not None:
            self._anchors[anchor] = node
        return node

    def _alias(self, mark: Mark, anchor: str) -> Node | None:
        if anchor not in self._anchors:
            self._stop(mark, "this alias has no anchor before it")
        node = self._anchors[anchor]
        if node is None:
            self._stop(mark, "this alias stands for a value that is not complete or is wrong itself")
        self._copied += node.size
        if self._copied > MAX_NODES:
            self._stop(mark, f"with its aliases written out, this file holds more than {MAX_NODES:,} values")
        return _copy(node)

    # Most keys and values can only be text. Of such a value only the mark is kept: events are large.

    def _is_text(self, event: Event) -> bool:
        return (
            event.__class__ is _SCALAR
            and event.tag is None
            and event.anchor is None
            and self._kinds[event.value] == _TEXT
        )

    def _sequence(self, mark: Mark, depth: int) -> Node:
        inner: list[Node | Mark] = []
        plain: list[Any] = []
        sound, size = True, 1
        following, is_text, shallow = self._next, self._is_text, depth < MAX_DEPTH
        while (event := following()).__class__ is not _LIST_END:
            if shallow and is_text(event):
                inner.append(event.start_mark)
                plain.append(event.value)
                size += 1
                continue
            item = self._node(event, depth + 1)
            if item is None:
                sound = False
                continue
            inner.append(item)
            plain.append(item.plain)
            sound = sound and item.sound
            size += item.size
        return _NEW(Node, (self.file, mark, plain, inner, _NO_KEYS, sound, size))

    def _mapping(self, mark: Mark, depth: int) -> Node:
        inner: dict[str, Node | Mark] = {}
        plain: dict[str, Any] = {}
        keys: dict[str, Mark] = {}
        found: Node | Mark
        sound, size = True, 1
        following, is_text, shallow = self._next, self._is_text, depth < MAX_DEPTH
        while (event := following()).__class__ is not _MAPPING_END:
            key = event.value if is_text(event) else self._key(event)
            value, found = following(), None
            if shallow and is_text(value):
                found, said = value.start_mark, value.value
                size += 1
            elif (node := self._node(value, depth + 1)) is not None:
                found, said = node, node.plain
                sound = sound and node.sound
                size += node.size
            if key is None or key in keys or found is None:
                sound = False
            if key is None:
                continue
            if key in keys:
                first = keys[key].line + 1
                self._note(event.start_mark, f'the key "{key}" stands here twice; it was first written in line {first}')
                continue
            keys[key] = event.start_mark
            if found is not None:
                inner[key], plain[key] = found, said
        return _NEW(Node, (self.file, mark, plain, inner, keys, sound, size))

    def _key(self, event: Event) -> str | None:
        if event.__class__ is not _SCALAR:
            self._stop(event.start_mark, "a key must be plain text")
        if event.tag is not None:
            self._stop(event.start_mark, "tags are not part of the language; leave the tag out")
        value: str = event.value
        kind = self._kind(event)
        if kind == "merge":
            self._note(event.start_mark, "merge keys (<<) are not part of the language; write the values out")
            return None
        if kind == "bool" or kind == "null" or (kind == "int" and ":" in value):
            what = {"bool": "a boolean", "null": "no value", "int": "a number in base 60"}[kind]
            self._note(event.start_mark, f'YAML reads this key as {what}; put it in quotes: "{value}"')
            return None
        return value

    def _kind(self, event: Event) -> str:
        quoted = not event.implicit[0]  # or a block
        return _TEXT if quoted else self._kinds[event.value]

    def _scalar(self, mark: Mark, event: Event) -> Node | None:
        """The value as Python has it. The text is not repeated in a message: it may be a secret in the wrong place."""
        value: str = event.value
        kind = self._kind(event)
        if kind == "null":
            return self._wrong(mark, "there is no value here; write one, or leave the key out")
        if kind == "bool":
            if value.lower() in ("true", "false"):
                return Node(self.file, mark, value.lower() == "true")
            return self._wrong(mark, f'YAML reads {value} as a boolean; write "{value}" in quotes, or true or false')
        if kind in ("int", "float") and ":" in value:
            return self._wrong(mark, "YAML reads digits with colons as a number in base 60; put the text in quotes")
        if kind == "int":
            if _INTEGER.fullmatch(value) and len(value) <= 18:
                return Node(self.file, mark, int(value))
            return self._wrong(mark, "write a whole number in plain decimal digits, or put the text in quotes")
        if kind == "float":
            if _DECIMAL.fullmatch(value):
                return Node(self.file, mark, float(value))
            return self._wrong(mark, "write a number in plain decimal digits, such as 0.25, or put the text in quotes")
        return Node(self.file, mark, value)

    def _wrong(self, mark: Mark, message: str) -> Node | None:
        self._note(mark, message)
        return None


def _copy(node: Node) -> Node:
    """What an alias stands for is copied, so that a wrong value is taken out at one of its places only."""
    if isinstance(node.inner, dict):
        entries = {key: _copied(found) for key, found in node.inner.items()}
        return node._replace(inner=entries, plain={key: _said(entries[key], text) for key, text in node.plain.items()})
    if isinstance(node.inner, list):
        items = [_copied(found) for found in node.inner]
        return node._replace(inner=items, plain=list(map(_said, items, node.plain)))
    return node


def _copied(found: Node | Mark) -> Node | Mark:
    return _copy(found) if isinstance(found, Node) else found


def _said(found: Node | Mark, text: str) -> Any:
    return found.plain if isinstance(found, Node) else text
