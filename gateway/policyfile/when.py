"""The conditions of a rule: `when`, to any depth.

Owns the step from its text to a `Match`, and the check that what it refers to exists and could ever hold. Refuses to
compare rules with each other: that is `checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from gateway.conditions import Match
from gateway.policyfile.entries import Checked
from gateway.policyfile.names import Names, undefined
from gateway.policyfile.nearness import suggestion
from gateway.policyfile.shapes import Shape
from gateway.policyfile.tree import Loc, Node, Problem
from gateway.policyfile.whenshapes import LoadShape, TimeShape, TokenRangeShape, WhenShape
from gateway.ranges import MINUTES_A_DAY, Globs, Hours, Load, Range


def match_of(when: WhenShape, counted_by: str | None) -> Match:
    """The conditions, compiled. `counted_by` is the deployment whose tokenizer `prompt_tokens` is about."""
    values = vars(when)
    stated: Any = {}
    for name in when.model_fields_set:  # of some twenty, one or two
        key, read = _READ[name]
        stated[key] = read(values[name], counted_by)
    if "prompt_tokens" in stated:
        stated["counted_by"] = counted_by
    return Match(**stated)


def _as_stated(value: bool, _: str | None) -> bool:
    return value


def _words(words: list[str], _: str | None) -> frozenset[str]:
    return frozenset(words)


def _header(stated: Mapping[str, list[str]], _: str | None) -> Mapping[str, frozenset[str]]:
    return {name.lower(): frozenset([value.lower() for value in values]) for name, values in stated.items()}


def _range(stated: TokenRangeShape, _: str | None) -> Range:
    return Range(stated.at_least, stated.below)


def _loads(stated: Mapping[str, LoadShape], _: str | None) -> Mapping[str, Load]:
    return {
        name: Load(Range(load.at_least, load.below), unknown=load.unknown == "holds") for name, load in stated.items()
    }


def _hours(stated: TimeShape, _: str | None) -> Hours | None:
    if stated.zone is None:  # a problem already
        return None
    days = frozenset(chain.from_iterable(stated.days or [range(7)]))
    begin = 0 if stated.from_ is None else stated.from_
    return Hours(stated.zone, days, begin, MINUTES_A_DAY if stated.to is None else stated.to)


def _several(stated: list[WhenShape], counted_by: str | None) -> tuple[Match, ...]:
    return tuple([match_of(part, counted_by) for part in stated])


# By the name of a field of `WhenShape`, the key of `Stated` and how its value is read.
_READ: Mapping[str, tuple[str, Callable[[Any, str | None], object]]] = {
    **{name: (name, _words) for name in ("any_label", "slo", "tenant", "key_tag", "tag", "fits", "does_not_fit")},
    **{name: (name, _as_stated) for name in ("stream", "tools", "images")},
    "schema_": ("schema", _as_stated),
    "model": ("model", _words),
    "header": ("header", _header),
    "prompt_tokens": ("prompt_tokens", _range),
    "max_tokens": ("max_tokens", _range),
    "local_load": ("local_load", _loads),
    "time": ("time", _hours),
    "any_": ("any_of", _several),
    "all_": ("all_of", _several),
    "not_": ("not_", match_of),
}


# What these state needs nothing that could be missing, and may always hold.
_NEVER_WRONG = frozenset({"tenant", "key_tag", "tag", "stream", "tools", "images", "schema_"})


def wrong_conditions(entry: Checked[Shape], when: WhenShape, names: Names) -> Iterable[Problem]:
    """What `when` refers to and is not there, and what could never hold."""
    stated = when.model_fields_set
    return () if stated and stated <= _NEVER_WRONG else _wrong_conditions(entry, when, names)


def _wrong_conditions(entry: Checked[Shape], when: WhenShape, names: Names) -> Iterator[Problem]:
    if entry.intact and not when.model_fields_set:
        yield entry.problem('"when" states no condition; leave it out for a rule that is for all requests', "when")
    yield from _Conditions(entry, names).wrong(when, ("when",), excepted=False)


@dataclass(frozen=True, slots=True)
class _Conditions:
    """The conditions of one rule. `loc` leads to the mapping at hand; `excepted` is true below a `not`."""

    entry: Checked[Shape]
    names: Names

    def wrong(self, when: WhenShape, loc: Loc, excepted: bool) -> Iterator[Problem]:
        if when.any_label:
            yield from undefined(self.entry, "label", when.any_label, self.names.labels, *loc, "any_label")
        if when.slo:
            yield from undefined(self.entry, "slo", when.slo, self.names.slo, *loc, "slo")
        if when.does_not_fit or when.fits:
            yield from self._windows(when, loc)
        if when.model:
            yield from self._models(when, loc)
        if when.header:
            yield from self._headers(when, loc)
        for key, stated in (("prompt_tokens", when.prompt_tokens), ("max_tokens", when.max_tokens)):
            if stated is not None:
                yield from self._range(stated, (*loc, key))
        for name, load in when.local_load.items() if when.local_load else ():
            yield from self._load(name, load, (*loc, "local_load", name), excepted)
        if when.time is not None:
            yield from self._time(when.time, (*loc, "time"))
        if when.any_ or when.all_ or when.not_ is not None:
            yield from self._inner(when, loc, excepted)

    def _inner(self, when: WhenShape, loc: Loc, excepted: bool) -> Iterator[Problem]:
        parts = [((*loc, "any", n), part, excepted) for n, part in enumerate(when.any_ or ())]
        parts += [((*loc, "all", n), part, excepted) for n, part in enumerate(when.all_ or ())]
        parts += [((*loc, "not"), when.not_, True)] if when.not_ is not None else []
        for inner, part, is_excepted in parts:
            if self.entry.intact and not part.model_fields_set:
                yield self.entry.problem(f'"{_field(inner)}" has a mapping that states no condition', *inner)
            yield from self.wrong(part, inner, is_excepted)

    def _windows(self, when: WhenShape, loc: Loc) -> Iterator[Problem]:
        deployments = self.names.deployments
        if deployments is None:
            return
        for key, stated, verdict in (("does_not_fit", when.does_not_fit, "never"), ("fits", when.fits, "always")):
            yield from undefined(self.entry, "deployment", stated, deployments, *loc, key)
            for index, name in enumerate(stated or ()):
                deployment = deployments.get(name)
                # A local engine tells its window when it has loaded its model; nobody tells that of another server.
                if deployment is not None and deployment.window is None and deployment.backend != "local":
                    message = (
                        f'"{_field(loc)}.{key}" {verdict} holds: '
                        f'deployment "{name}" has no known context_window; state it'
                    )
                    yield self.entry.problem(message, *loc, key, index)

    def _models(self, when: WhenShape, loc: Loc) -> Iterator[Problem]:
        asked = self.names.models
        for index, pattern in enumerate(when.model or ()):
            if not pattern.strip("*"):
                message = f'"{_field(loc)}.model" holds for every name; leave it out'
                yield self.entry.problem(message, *loc, "model", index)
            elif asked is not None and pattern not in asked and not any(map(Globs((pattern,)).__contains__, asked)):
                near = suggestion(pattern, asked)
                message = (
                    f'"{_field(loc)}.model" never holds for "{pattern}": no name that a client may ask for is like it'
                    f"{near}; add it to `models` in the deployments file"
                )
                yield self.entry.problem(message, *loc, "model", index)

    def _headers(self, when: WhenShape, loc: Loc) -> Iterator[Problem]:
        seen: set[str] = set()
        for name in when.header or ():
            if name.lower() in seen:
                message = f'"{_field(loc)}.header" has the header {name.lower()} twice; write its values in one list'
                yield self.entry.problem(message, *loc, "header", name, key=True)
            seen.add(name.lower())

    def _range(self, stated: TokenRangeShape | LoadShape, loc: Loc) -> Iterator[Problem]:
        if not {"at_least", "below"} & self._keys(loc):
            yield self.entry.problem(f'"{_field(loc)}" states no range; write at_least, below or both', *loc)
        elif stated.at_least is not None and stated.below is not None and stated.at_least >= stated.below:
            message = f'"{_field(loc)}" never holds: nothing is {Range(stated.at_least, stated.below)}'
            yield self.entry.problem(message, *loc)

    def _load(self, name: str, stated: LoadShape, loc: Loc, excepted: bool) -> Iterator[Problem]:
        yield from self._range(stated, loc)
        if excepted and "unknown" not in self._keys(loc):
            message = (
                f'"{_field(loc)}" must state unknown: below `not` it is not plain what a load that is not known '
                "means; write holds or fails"
            )
            yield self.entry.problem(message, *loc)
        if self.names.deployments is None:
            return
        if name not in self.names.deployments:
            near = suggestion(name, self.names.deployments)
            yield self.entry.problem(f'deployment "{name}" is not defined{near}', *loc, key=True)
        deployment = self.names.deployments.get(name)
        if deployment is not None and deployment.load is None and deployment.backend != "local":
            cloud = deployment.backend == "litellm"
            why = "a cloud provider does not tell its load" if cloud else 'the deployment has no "load"; state it'
            yield self.entry.problem(f'"{_field(loc)}" is never known: {why}', *loc, key=True)

    def _time(self, stated: TimeShape, loc: Loc) -> Iterator[Problem]:
        keys, field = self._keys(loc), _field(loc)
        if "zone" not in keys:
            yield self.entry.problem(f'"{field}.zone" is missing; write a time zone such as Europe/Berlin or UTC', *loc)
        if not {"days", "from", "to"} & keys:
            yield self.entry.problem(f'"{field}" states no time; write days, from and to, or some of them', *loc)
        if stated.from_ == MINUTES_A_DAY:
            yield self.entry.problem(f'"{field}.from" must be before "24:00"', *loc, "from")
        elif stated.to is not None and stated.to == (stated.from_ or 0):  # without `from` it begins at midnight
            message = f'"{field}" begins and ends at the same time; leave from and to out for the whole day'
            yield self.entry.problem(message, *loc, "to")

    def _keys(self, loc: Loc) -> set[str]:
        node: Node | None = self.entry.node
        for part in loc:
            node = node.child(part) if node is not None else None
        return set(node.keys) if node is not None else set()


def _field(loc: Loc) -> str:
    return ".".join(part for part in loc if isinstance(part, str))
