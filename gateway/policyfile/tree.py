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


Mark = Any  # of PyYAML, which has no types: where an event begins
_NO_KEYS: Mapping[str, Mark] = MappingProxyType({})


def _place(file: str, mark: Mark) -> Place:
    return Place(file, mark.line + 1, mark.column + 1)


_NEW = tuple.__new__  # of named tuples, past the function that takes their fields one by one


class Node(NamedTuple):
    """A value and its place, as the parser's mark: it becomes a `Place` only where somebody asks, since a file without
    an error has thousands.

    `plain` is the value without places: mappings, lists, text, numbers and booleans. `keys` are the marks of all keys
    that a mapping states, also of those whose value was found wrong and is therefore no longer in `value`: so a wrong
    field is not reported as missing as well. `sound` is false where anything in the value was wrong as YAML. `size`
    counts the values in it.
    """

    file: str
    mark: Mark
    value: Scalar | list[Node] | dict[str, Node]
    plain: Any
    keys: Mapping[str, Mark]
    sound: bool
    size: int

    @property
    def place(self) -> Place:
        return _place(self.file, self.mark)

    def child(self, part: str | int) -> Node | None:
        """The value under a key or at an index; None where there is none."""
        found: Node | None = None
        if isinstance(self.value, dict) and isinstance(part, str):
            found = self.value.get(part)
        elif isinstance(self.value, list) and isinstance(part, int) and 0 <= part < len(self.value):
            found = self.value[part]
        return found

    def children(self, key: str) -> dict[str, Node]:
        """The entries of the mapping under `key`; empty where there is none."""
        child = self.child(key)
        return child.value if child is not None and isinstance(child.value, dict) else {}

    def keys_under(self, key: str) -> Collection[str]:
        """The keys of the mapping under `key` as stated, right or wrong."""
        child = self.child(key)
        return child.keys if child is not None else ()

    def items(self, key: str) -> list[Node]:
        """The items of the list under `key`; a lone value is a list of one, as the language reads it."""
        child = self.child(key)
        if child is None or isinstance(child.value, dict):
            return []
        return child.value if isinstance(child.value, list) else [child]

    def place_of(self, loc: Loc, *, key: bool = False) -> Place:
        """The place of the value at `loc`, or of its key; of the nearest value around it where `loc` leads nowhere."""
        node = self
        for index, part in enumerate(loc):
            last = index == len(loc) - 1
            if isinstance(part, str) and part in node.keys and (node.child(part) is None or (last and key)):
                return _place(self.file, node.keys[part])
            following = node.child(part)
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
            if isinstance(parent.value, dict) and isinstance(part, str):
                parent.value.pop(part, None)
                parent.plain.pop(part, None)
            elif isinstance(parent.value, list) and isinstance(part, int):
                del parent.value[part]
                del parent.plain[part]
            if parent.value:
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


class _Builder:
    """Turns one file's events into nodes. Problems that leave the structure readable are collected, and the value at
    fault is left out."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self._anchors: dict[str, Node | None] = {}
        self._copied = 0
        self._kinds: dict[str, str] = {}

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
        if root is not None and not isinstance(root.value, dict):
            self._stop(root.mark, 'the file must be a mapping, such as "version: 1"')
        return root

    def _stop(self, at: Mark | Place, message: str) -> NoReturn:
        self._note(at, message)
        raise _Fatal

    def _note(self, at: Mark | Place, message: str) -> None:
        place = at if isinstance(at, Place) else _place(self.file, at)
        self.problems.append(place.problem(message))

    def _node(self, event: Any, depth: int) -> Node | None:
        mark = event.start_mark
        if depth > MAX_DEPTH:
            self._stop(mark, f"values are nested more than {MAX_DEPTH} deep")
        kind, anchor = event.__class__, event.anchor
        if kind is yaml.AliasEvent:
            return self._alias(mark, str(anchor))
        if event.tag is not None:
            self._stop(mark, "tags are not part of the language; leave the tag out")
        if anchor is not None:
            self._anchors[anchor] = None
        if kind is yaml.ScalarEvent:
            node = self._scalar(mark, event)
        elif kind is yaml.SequenceStartEvent:
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

    def _sequence(self, mark: Mark, depth: int) -> Node:
        items: list[Node] = []
        sound, size = True, 1
        following, shallow = self._next, depth < MAX_DEPTH
        while (event := following()).__class__ is not yaml.SequenceEndEvent:
            item = self._text(event) if shallow else None
            if item is None:
                item = self._node(event, depth + 1)
            if item is None:
                sound = False
                continue
            items.append(item)
            sound = sound and item.sound
            size += item.size
        return _NEW(Node, (self.file, mark, items, [item.plain for item in items], _NO_KEYS, sound, size))

    def _mapping(self, mark: Mark, depth: int) -> Node:
        entries: dict[str, Node] = {}
        keys: dict[str, Mark] = {}
        sound, size, following, shallow = True, 1, self._next, depth < MAX_DEPTH
        while (event := following()).__class__ is not yaml.MappingEndEvent:
            key = self._key(event)
            event_of_value = following()
            value = self._text(event_of_value) if shallow else None
            if value is None:
                value = self._node(event_of_value, depth + 1)
            sound = sound and key is not None and key not in keys and value is not None and value.sound
            if key is None:
                continue
            at = event.start_mark
            if key in keys:
                self._note(at, f'the key "{key}" stands here twice; it was first written in line {keys[key].line + 1}')
                continue
            keys[key] = at
            if value is not None:
                entries[key] = value
                size += value.size
        plain = {key: entry.plain for key, entry in entries.items()}
        return _NEW(Node, (self.file, mark, entries, plain, keys, sound, size))

    def _text(self, event: Any) -> Node | None:
        """The node of what can only be text, as most values are; None where it takes a closer look."""
        if event.__class__ is not yaml.ScalarEvent or event.anchor is not None or event.tag is not None:
            return None
        value: str = event.value
        if value[:1] in _RESOLVERS and event.implicit[0] and self._kinds.get(value) != "str":
            return None
        return _NEW(Node, (self.file, event.start_mark, value, value, _NO_KEYS, True, 1))

    def _key(self, event: Any) -> str | None:
        if event.__class__ is not yaml.ScalarEvent:
            self._stop(event.start_mark, "a key must be plain text")
        if event.tag is not None:
            self._stop(event.start_mark, "tags are not part of the language; leave the tag out")
        value: str = event.value
        kind = "str" if value[:1] not in _RESOLVERS else self._kind(event)
        if kind == "merge":
            self._note(event.start_mark, "merge keys (<<) are not part of the language; write the values out")
            return None
        if kind == "bool" or kind == "null" or (kind == "int" and ":" in value):
            what = {"bool": "a boolean", "null": "no value", "int": "a number in base 60"}[kind]
            self._note(event.start_mark, f'YAML reads this key as {what}; put it in quotes: "{value}"')
            return None
        return value

    def _kind(self, event: yaml.ScalarEvent) -> str:
        """What YAML 1.1 takes the text for: str, int, bool, null, merge, timestamp, ..."""
        value: str = event.value
        if not event.implicit[0]:  # quoted, or a block
            return "str"
        kind = self._kinds.get(value)
        if kind is None:
            tags = (tag for tag, pattern in _RESOLVERS.get(value[:1], ()) if pattern.match(value))
            kind = self._kinds[value] = next(tags, "str").removeprefix(_TAG)
        return kind

    def _scalar(self, mark: Mark, event: Any) -> Node | None:
        """The value as Python has it. The text is not repeated in a message: it may be a secret in the wrong place."""
        value: str = event.value
        kind = "str" if value[:1] not in _RESOLVERS else self._kind(event)
        if kind == "str":
            return _NEW(Node, (self.file, mark, value, value, _NO_KEYS, True, 1))
        if kind == "null":
            return self._wrong(mark, "there is no value here; write one, or leave the key out")
        if kind == "bool":
            if value.lower() in ("true", "false"):
                truth = value.lower() == "true"
                return _NEW(Node, (self.file, mark, truth, truth, _NO_KEYS, True, 1))
            return self._wrong(mark, f'YAML reads {value} as a boolean; write "{value}" in quotes, or true or false')
        if kind in ("int", "float") and ":" in value:
            return self._wrong(mark, "YAML reads digits with colons as a number in base 60; put the text in quotes")
        if kind == "int":
            if _INTEGER.fullmatch(value) and len(value) <= 18:
                return _NEW(Node, (self.file, mark, int(value), int(value), _NO_KEYS, True, 1))
            return self._wrong(mark, "write a whole number in plain decimal digits, or put the text in quotes")
        if kind == "float":
            if _DECIMAL.fullmatch(value):
                return _NEW(Node, (self.file, mark, float(value), float(value), _NO_KEYS, True, 1))
            return self._wrong(mark, "write a number in plain decimal digits, such as 0.25, or put the text in quotes")
        return _NEW(Node, (self.file, mark, value, value, _NO_KEYS, True, 1))

    def _wrong(self, mark: Mark, message: str) -> Node | None:
        self._note(mark, message)
        return None


def _copy(node: Node) -> Node:
    """What an alias stands for is copied, so that a wrong value is taken out at one of its places only."""
    if isinstance(node.value, dict):
        entries = {key: _copy(child) for key, child in node.value.items()}
        return node._replace(value=entries, plain={key: child.plain for key, child in entries.items()})
    if isinstance(node.value, list):
        items = [_copy(child) for child in node.value]
        return node._replace(value=items, plain=[item.plain for item in items])
    return node
