"""One entry of a file: what is right of it, and a sentence with its place for each value that is not.

Owns the step from a tree to a shape. Refuses to know which entries there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_args

from pydantic import ValidationError

from gateway.policyfile.nearness import MOST_SUGGESTIONS, NotAmong, Suggest, nearest, no_suggestion, suggestion
from gateway.policyfile.shapes import Shape
from gateway.policyfile.tree import Loc, Node, Place, Problem
from gateway.policyfile.values import TITLE

Report = Callable[[Problem], None]

MAPPING = "[mapping]"  # the tag of a value that is either a word or a mapping
_NO_PARTS = ("[key]", "[word]", MAPPING)  # what pydantic puts into a place besides keys and indices

S = TypeVar("S", bound=Shape)
S_co = TypeVar("S_co", bound=Shape, covariant=True)


@dataclass(frozen=True, slots=True)
class Checked(Generic[S_co]):
    """What is right of an entry. `intact` is false where something was wrong, and then `shape` states less than the
    file does."""

    subject: str
    node: Node
    at: Place | None  # of the entry, where that is not the place of its value
    shape: S_co
    intact: bool

    @property
    def place(self) -> Place:
        return self.at or self.node.place

    def problem(self, message: str, *loc: str | int, key: bool = False) -> Problem:
        """A problem of this entry, at the value under `loc` or its key; at the entry itself without one."""
        place = self.node.place_of(loc, key=key) if loc else self.place
        return place.problem(f"{self.subject}: {message}" if self.subject else message)

    def missing(self) -> list[Problem]:
        """A problem for each required key that the entry does not state; none where it is no mapping, which is
        reported."""
        if not isinstance(self.node.plain, dict):
            return []
        return [self.problem(f'"{key}" is missing') for key in self.shape.required if key not in self.node.keys]


def check(shape: type[S], node: Node, subject: str, report: Report, at: Place | None = None) -> Checked[S]:
    """What is right of the entry at `node`; the rest is reported and taken out of it."""
    intact = node.sound
    prefix = f"{subject}: " if subject else ""
    while True:
        try:
            return Checked(subject, node, at, shape.model_validate(node.plain), intact)
        except ValidationError as found:
            errors = sorted(found.errors(include_url=False), key=lambda error: _sortable(error["loc"]))
        intact = False
        for position, error in enumerate(errors):
            loc = _loc(error)
            is_key = error["type"] == "extra_forbidden" or error["loc"][-1:] == ("[key]",)
            sentence = _sentence(shape, loc, error, suggestion if position < MOST_SUGGESTIONS else no_suggestion)
            report(node.place_of(loc, key=is_key).problem(prefix + sentence))
        if not isinstance(node.plain, dict):
            return Checked(subject, node, at, shape(), False)
        wrong = dict.fromkeys(_loc(error) for error in errors)
        for loc in reversed(wrong):  # from the end, so that positions before it stay what they are
            node.prune(loc)


def _loc(error: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Where in the entry the error is: keys and indices."""
    return tuple(part for part in error["loc"] if part not in _NO_PARTS)


def _sortable(loc: Loc) -> list[str]:
    return [part if isinstance(part, str) else f"{part:09}" for part in loc]


def _sentence(shape: type[Shape], loc: Loc, error: Mapping[str, Any], suggest: Suggest) -> str:
    kind, value = error["type"], error["input"]
    field = ".".join(str(part) for part in loc if isinstance(part, str))
    if kind == "extra_forbidden":
        return _unknown_field(_shape_around(shape, loc), field, str(loc[-1]), suggest)
    what = _WANTED.get(kind)
    if kind == "literal_error":
        allowed = _literals(error["ctx"]["expected"])
        what = f"must be {', '.join(allowed[:-1])} or {allowed[-1]}" if len(allowed) > 1 else f"must be {allowed[0]}"
        what += suggest(value, allowed) if isinstance(value, str) else ""
    elif kind == "value_error":
        wrong = error["ctx"]["error"]
        what = str(wrong)
        what += suggest(value, wrong.known()) if isinstance(wrong, NotAmong) and isinstance(value, str) else ""
    elif kind == "string_type" and not isinstance(value, list | dict):
        what = f"must be text; put {'true or false' if isinstance(value, bool) else 'the number'} in quotes"
    assert what is not None, kind
    if error["loc"][-1:] == ("[key]",):
        return f'the name "{loc[-1]}" {what}'
    if loc and isinstance(loc[-1], int):
        return f'an item of "{field}" {what}'
    return f'"{field}" {what}' if field else what


_WANTED: Mapping[str, str] = {
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
}


def _literals(expected: str) -> list[str]:
    return re.findall(r"'([^']*)'", expected)


def _unknown_field(shape: type[Shape], field: str, key: str, suggest: Suggest) -> str:
    if key in shape.not_built:
        return f'"{field}" is not implemented yet'
    if key in shape.hints:
        return f'unknown field "{field}" ({shape.hints[key]})'
    known = sorted(info.alias or name for name, info in shape.model_fields.items())
    if likely := suggest(key, known):
        return f'unknown field "{field}"{likely}'
    if suggest(key, shape.not_built):
        meant = nearest(key, shape.not_built)
        return f'unknown field "{field}" ("{meant}", if that is meant, is not implemented yet)'
    return f'unknown field "{field}" (known are {", ".join(known)})'


def _shape_around(shape: type[Shape], loc: Loc) -> type[Shape]:
    """The shape of the mapping that holds the last key of `loc`."""
    for part in loc[:-1]:
        fields = {field.alias or name: field for name, field in shape.model_fields.items()}
        if part in fields:
            shape = next(_shapes_in(fields[str(part)].annotation), shape)
    return shape


def _shapes_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Shape):
        yield annotation
    for inner in get_args(annotation):
        yield from _shapes_in(inner)


def subject_of(noun: str, node: Node, position: int) -> str:
    """How messages call an entry of a list: by its name where it has one, else by its position, which counts from 1."""
    name = node.plain.get("name") if isinstance(node.plain, dict) else None
    if isinstance(name, str) and TITLE.fullmatch(name):
        return f'{noun} "{name}"'
    return f"{noun} {position}"
