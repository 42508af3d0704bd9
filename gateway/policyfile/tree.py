"""YAML text as a tree in which every value and key knows its place.

Owns the strictness that PyYAML lacks: duplicate keys, aliases that grow without bound, depth, and the words and
numbers that YAML 1.1 reads as something else. Refuses to know the policy language: any tree of mappings, lists and
plain values passes.

PyYAML's `compose` descends recursively in C and ends the process on a file of some thousand brackets, so the tree is
built from the parser's events, which come one by one, down to `MAX_DEPTH`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 200_000

Scalar = str | int | float | bool
Loc = Sequence[str | int]

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
# What is outside of YAML 1.1's c-printable, as libyaml reads it, and what ends a line there.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LINE_END = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_DECIMAL = re.compile(r"[-+]?[0-9]+\.[0-9]*")


_NEW = tuple.__new__  # of named tuples, past the function that takes their fields one by one


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


_NO_KEYS: Mapping[str, Place] = MappingProxyType({})


@dataclass(slots=True)
class Node:
    """A value and its place.

    `plain` is the value without places: mappings, lists, text, numbers and booleans. `keys` are the places of all keys
    that a mapping states, also of those whose value was found wrong and is therefore no longer in `value`: so a wrong
    field is not reported as missing as well. `sound` is false where anything in the value was wrong as YAML. `size`
    counts the values in it.
    """

    place: Place
    value: Scalar | list[Node] | dict[str, Node]
    plain: Any
    keys: Mapping[str, Place]
    sound: bool = True
    size: int = 1

    def child(self, part: str | int) -> Node | None:
        """The value under a key or at an index; None where there is none."""
        if isinstance(self.value, dict) and isinstance(part, str):
            return self.value.get(part)
        if isinstance(self.value, list) and isinstance(part, int) and 0 <= part < len(self.value):
            return self.value[part]
        return None

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
                return node.keys[part]
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
        place = builder.place(mark) if mark is not None else whole
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

    def place(self, mark: Any) -> Place:
        return _NEW(Place, (self.file, mark.line + 1, mark.column + 1))

    def document(self, text: str) -> Node | None:
        self._loader = yaml.CSafeLoader(text)
        self._events: Iterator[Any] = iter(self._loader.get_event, None)
        next(self._events)  # the stream's start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            self._stop(Place(self.file), "the file is empty")
        root = self._node(next(self._events), 0)
        next(self._events)  # the document's end
        more = next(self._events)
        if isinstance(more, yaml.DocumentStartEvent):
            self._stop(self.place(more.start_mark), "a second document begins here; a policy file holds one")
        if root is not None and not isinstance(root.value, dict):
            self._stop(root.place, 'the file must be a mapping, such as "version: 1"')
        return root

    def _stop(self, place: Place, message: str) -> NoReturn:
        self._note(place, message)
        raise _Fatal

    def _note(self, place: Place, message: str) -> None:
        self.problems.append(place.problem(message))

    def _node(self, event: Any, depth: int) -> Node | None:
        place = self.place(event.start_mark)
        if depth > MAX_DEPTH:
            self._stop(place, f"values are nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.ScalarEvent) and event.anchor is None:
            return self._scalar(place, event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(place, str(event.anchor))
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(place, event)
        elif event.tag is not None:
            self._stop(place, "tags are not part of the language; leave the tag out")
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(place, depth)
        else:
            node = self._mapping(place, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _alias(self, place: Place, anchor: str) -> Node | None:
        if anchor not in self._anchors:
            self._stop(place, "this alias has no anchor before it")
        node = self._anchors[anchor]
        if node is None:
            self._stop(place, "this alias stands for a value that is not complete or is wrong itself")
        self._copied += node.size
        if self._copied > MAX_NODES:
            self._stop(place, f"with its aliases written out, this file holds more than {MAX_NODES:,} values")
        return _copy(node)

    def _sequence(self, place: Place, depth: int) -> Node:
        items: list[Node] = []
        sound, size = True, 1
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            item = self._node(event, depth + 1)
            sound = sound and item is not None and item.sound
            if item is not None:
                items.append(item)
                size += item.size
        return Node(place, items, [item.plain for item in items], _NO_KEYS, sound, size)

    def _mapping(self, place: Place, depth: int) -> Node:
        entries: dict[str, Node] = {}
        keys: dict[str, Place] = {}
        sound, size = True, 1
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            at = self.place(event.start_mark)
            key = self._key(at, event)
            value = self._node(next(self._events), depth + 1)
            sound = sound and key is not None and key not in keys and value is not None and value.sound
            if key is None:
                continue
            if key in keys:
                self._note(at, f'the key "{key}" stands here twice; it was first written in line {keys[key].line}')
                continue
            keys[key] = at
            if value is not None:
                entries[key] = value
                size += value.size
        return Node(place, entries, {key: entry.plain for key, entry in entries.items()}, keys, sound, size)

    def _key(self, place: Place, event: Any) -> str | None:
        if not isinstance(event, yaml.ScalarEvent):
            self._stop(place, "a key must be plain text")
        if event.tag is not None:
            self._stop(place, "tags are not part of the language; leave the tag out")
        value: str = event.value
        kind = self._kind(event)
        if kind == "merge":
            self._note(place, "merge keys (<<) are not part of the language; write the values out")
            return None
        if kind == "bool" or kind == "null" or (kind == "int" and ":" in value):
            what = {"bool": "a boolean", "null": "no value", "int": "a number in base 60"}[kind]
            self._note(place, f'YAML reads this key as {what}; put it in quotes: "{value}"')
            return None
        return value

    def _kind(self, event: yaml.ScalarEvent) -> str:
        """What YAML 1.1 takes the text for: str, int, bool, null, merge, timestamp, ..."""
        if not event.implicit[0]:  # quoted, or a block
            return "str"
        kind = self._kinds.get(event.value)
        if kind is None:
            tag: str = self._loader.resolve(yaml.ScalarNode, event.value, event.implicit)  # type: ignore[no-untyped-call]
            kind = self._kinds[event.value] = tag.removeprefix(_TAG)
        return kind

    def _scalar(self, place: Place, event: Any) -> Node | None:
        """The value as Python has it. The text is not repeated in a message: it may be a secret in the wrong place."""
        value: str = event.value
        if event.tag is not None:
            self._stop(place, "tags are not part of the language; leave the tag out")
        kind = self._kind(event)
        if kind == "null":
            return self._wrong(place, "there is no value here; write one, or leave the key out")
        if kind == "bool":
            if value.lower() in ("true", "false"):
                truth = value.lower() == "true"
                return Node(place, truth, truth, _NO_KEYS)
            return self._wrong(place, f'YAML reads {value} as a boolean; write "{value}" in quotes, or true or false')
        if kind in ("int", "float") and ":" in value:
            return self._wrong(place, "YAML reads digits with colons as a number in base 60; put the text in quotes")
        if kind == "int":
            if _INTEGER.fullmatch(value) and len(value) <= 18:
                return Node(place, int(value), int(value), _NO_KEYS)
            return self._wrong(place, "write a whole number in plain decimal digits, or put the text in quotes")
        if kind == "float":
            if _DECIMAL.fullmatch(value):
                return Node(place, float(value), float(value), _NO_KEYS)
            return self._wrong(place, "write a number in plain decimal digits, such as 0.25, or put the text in quotes")
        return Node(place, value, value, _NO_KEYS)

    def _wrong(self, place: Place, message: str) -> Node | None:
        self._note(place, message)
        return None


def _copy(node: Node) -> Node:
    """What an alias stands for is copied, so that a wrong value is taken out at one of its places only."""
    if isinstance(node.value, dict):
        entries = {key: _copy(child) for key, child in node.value.items()}
        plain = {key: child.plain for key, child in entries.items()}
        return Node(node.place, entries, plain, node.keys, node.sound, node.size)
    if isinstance(node.value, list):
        items = [_copy(child) for child in node.value]
        return Node(node.place, items, [item.plain for item in items], _NO_KEYS, node.sound, node.size)
    return Node(node.place, node.value, node.plain, _NO_KEYS)
