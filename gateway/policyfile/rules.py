"""The policy file's entries: labels, patterns, invariants, SLO classes and rules; their conditions are in `when`.

Owns the step from their text to the types of `gateway.policy`, and the check that every name in them is defined.
Refuses to look at how rules bear on each other: that is `checks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from gateway.conditions import Match
from gateway.labels import Scanner, pattern_problem
from gateway.policy import DEFAULT_RULE, Invariant, LabelSource, OrderBy, OrderTerm, Require, Rule, Slo
from gateway.policyfile.caching import caching_of, wrong_cache
from gateway.policyfile.deployments import RESERVED
from gateway.policyfile.entries import Checked, Report, check, subject_of
from gateway.policyfile.language import (
    CacheShape,
    DefaultShape,
    InvariantShape,
    LabelItemShape,
    LabelShape,
    OrderWeightsShape,
    PolicyShape,
    RequireShape,
    RuleShape,
    SloShape,
)
from gateway.policyfile.names import Names, undefined
from gateway.policyfile.nearness import suggestion
from gateway.policyfile.shapes import Shape
from gateway.policyfile.tree import Node, Problem
from gateway.policyfile.when import match_of, wrong_conditions
from gateway.types import ON_PREMISES, UNSCANNABLE


@dataclass(frozen=True, slots=True)
class Written:
    """A rule together with the entry it was compiled from. Where the entry is not intact the rule says less than the
    file does."""

    rule: Rule
    entry: Checked[DefaultShape]


def labels_of(root: Node, detectors: frozenset[str], report: Report) -> tuple[LabelSource, ...]:
    """The labels, each as far as it is right."""
    compiled = []
    for name, node in root.children("labels").items():
        entry = check(LabelShape, node, f'label "{name}"', report, root.place_of(("labels", name), key=True))
        _report_all(entry.missing(), report)
        if name == UNSCANNABLE:
            report(entry.problem(f'the name "{UNSCANNABLE}" is built in: what cannot be read raises it'))
        _report_all(_wrong_items(entry, detectors), report)
        compiled.append(_label(name, entry.shape.any or []))
    return tuple(compiled)


def _wrong_items(entry: Checked[LabelShape], detectors: frozenset[str]) -> Iterator[Problem]:
    for index, (node, item) in enumerate(zip(entry.node.items("any"), entry.shape.any or [], strict=True)):
        if len(node.keys) != 1:
            yield entry.problem("an item states one of detects, header and key_tag; any item is enough", "any", index)
        yield from undefined(entry, "detector", item.detects, detectors, "any", index, "detects")


def _label(name: str, items: list[LabelItemShape]) -> LabelSource:
    headers: dict[str, frozenset[str]] = {}
    for item in items:
        for header, values in (item.header or {}).items():
            lowered = frozenset(value.lower() for value in values)
            headers[header.lower()] = headers.get(header.lower(), frozenset()) | lowered
    return LabelSource(
        name=name,
        detects=frozenset(kind for item in items for kind in item.detects or []),
        headers=headers,
        key_tags=frozenset(tag for item in items for tag in item.key_tag or []),
    )


def patterns_of(root: Node, file: Checked[PolicyShape], detectors: frozenset[str], report: Report) -> Mapping[str, str]:
    """The operator's own patterns by name, those that are right. Called before the labels' wrong values are taken out
    of the tree: one that names a pattern uses it all the same."""
    stated = file.shape.patterns or {}
    labels = root.child("labels")
    used = frozenset(_texts(labels.plain)) if labels is not None else frozenset()
    compiled = {}
    for name, pattern in stated.items():
        if name in detectors or name == UNSCANNABLE:
            report(file.problem(f'pattern "{name}" has the name of something built in', "patterns", name, key=True))
        elif problem := pattern_problem(pattern):
            report(file.problem(f'pattern "{name}" {problem}', "patterns", name))
        elif name not in used:
            report(file.problem(f'pattern "{name}" is not used: no label detects it', "patterns", name, key=True))
        else:
            compiled[name] = pattern
    if compiled and len(compiled) == len(stated):
        try:
            Scanner((used & detectors) | compiled.keys(), compiled)
        except ValueError as error:  # each is right, and together they are too large
            report(file.problem(f'"patterns": {error}', "patterns", key=True))
    return MappingProxyType(compiled)


def _texts(plain: Any) -> Iterator[str]:
    """All text in a value."""
    if isinstance(plain, str):
        yield plain
    elif isinstance(plain, dict | list):
        for inner in plain.values() if isinstance(plain, dict) else plain:
            yield from _texts(inner)


def slo_of(root: Node, report: Report) -> dict[str, Slo]:
    """The SLO classes by name."""
    compiled = {}
    for name, node in root.children("slo").items():
        entry = check(SloShape, node, f'slo "{name}"', report, root.place_of(("slo", name), key=True))
        shape = entry.shape
        if entry.intact and not shape.model_fields_set:
            report(entry.problem("states no limit; write first_token_p95, total_p95 or per_token_p95"))
        limits = map(_ms, (shape.first_token_p95, shape.total_p95, shape.per_token_p95))
        compiled[name] = Slo(name, *limits)
    return compiled


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 6)


def invariants_of(root: Node, names: Names, report: Report) -> tuple[Invariant, ...]:
    """The invariants that are right; one that is not would say something else than what was meant."""
    compiled = []
    seen: set[str] = set()
    for position, node in enumerate(root.items("invariants"), 1):
        entry = check(InvariantShape, node, subject_of("invariant", node, position), report)
        wrong = [
            *entry.missing(),
            *_used_twice(entry, entry.shape.name, seen),
            *_wrong_references(entry, names),
            *_wrong_mask(entry, names),
        ]
        _report_all(wrong, report)
        shape = entry.shape
        if entry.intact and not wrong and shape.name and shape.when and shape.stay_in:
            compiled.append(
                Invariant(
                    name=shape.name,
                    any_label=frozenset(shape.when.any_label or ()),
                    stay_in=frozenset(shape.stay_in),
                    mask=frozenset(shape.mask or ()),
                    tenant=frozenset(shape.when.tenant or ()),
                    key_tag=frozenset(shape.when.key_tag or ()),
                )
            )
    return tuple(compiled)


def _wrong_references(entry: Checked[InvariantShape], names: Names) -> Iterator[Problem]:
    when = entry.shape.when
    if entry.intact and when is not None and not when.model_fields_set:
        yield entry.problem('"when" states no condition; write any_label, tenant or key_tag', "when")
    yield from undefined(entry, "label", when.any_label if when else None, names.labels, "when", "any_label")
    if names.deployments is not None and all(names.deployments.values()):
        zones = {ON_PREMISES, *(deployment.zone for deployment in names.deployments.values() if deployment)}
        yield from undefined(entry, "zone", entry.shape.stay_in, zones, "stay_in")


def _wrong_mask(entry: Checked[InvariantShape], names: Names) -> Iterator[Problem]:
    when = entry.shape.when
    yield from undefined(entry, "label", entry.shape.mask, names.labels, "mask")
    for index, label in enumerate(entry.shape.mask or []):
        if label not in names.labels or when is None or (when.any_label is None and not entry.intact):
            continue
        if label not in (when.any_label or ()):
            message = f'label "{label}" is not in "when.any_label", so there is nothing to mask for it'
            yield entry.problem(message, "mask", index)
        elif label == UNSCANNABLE:
            yield entry.problem(f'"{UNSCANNABLE}" is what cannot be read, and that cannot be masked', "mask", index)
        elif label not in names.detected:
            message = f'label "{label}" has no "detects", and only what a detector finds can be masked'
            yield entry.problem(message, "mask", index)


def rules_of(root: Node, names: Names, report: Report, cache: CacheShape | None = None) -> list[Written]:
    """The rules in the file's order, without the default. `cache` is the policy's."""
    written = []
    seen: set[str] = set()
    for position, node in enumerate(root.items("rules"), 1):
        entry = check(RuleShape, node, subject_of("rule", node, position), report)
        shape = entry.shape
        _report_all(_wrong_rule(entry, names, seen, cache), report)
        match = match_of(shape.when, _counted_by(shape, names)) if shape.when is not None else None
        written.append(Written(_rule(shape.name or "", match, shape, cache), entry))
    return written


def _wrong_rule(entry: Checked[RuleShape], names: Names, seen: set[str], cache: CacheShape | None) -> Iterator[Problem]:
    when = entry.shape.when
    yield from entry.missing()
    yield from _used_twice(entry, entry.shape.name, seen)
    yield from _wrong_name(entry, names)
    if when is not None:
        yield from wrong_conditions(entry, when, names)
    yield from _wrong_preferences(entry, names)
    if entry.shape.cache is not None:
        yield from wrong_cache(entry, cache)


def _counted_by(shape: RuleShape, names: Names) -> str | None:
    """The first candidate that there is: `prompt_tokens` is as it counts."""
    for name in shape.candidates or ():
        if names.deployments and name in names.deployments:
            return name
    return None


def default_of(root: Node, names: Names, report: Report, cache: CacheShape | None = None) -> Written | None:
    """The default, or None where there is none. `cache` is the policy's."""
    node = root.child(DEFAULT_RULE)
    if node is None:
        return None
    entry = check(DefaultShape, node, DEFAULT_RULE, report, root.place_of((DEFAULT_RULE,), key=True))
    _report_all(entry.missing(), report)
    _report_all(_wrong_preferences(entry, names), report)
    _report_all(wrong_cache(entry, cache), report)
    if entry.shape.protected == "skip":
        report(entry.problem('"protected: skip" has no rule to go on to; write refuse', "protected"))
    return Written(_rule(DEFAULT_RULE, None, entry.shape, cache), entry)


def _wrong_name(entry: Checked[RuleShape], names: Names) -> list[Problem]:
    name = entry.shape.name
    wrong = []
    if name in RESERVED:
        wrong.append(entry.problem(f'the name "{name}" is reserved', "name"))
    if names.deployments and name in names.deployments:
        both = "a deployment has this name already, and a client that asks for it could mean both"
        wrong.append(entry.problem(both, "name"))
    return wrong


def _wrong_preferences(entry: Checked[DefaultShape], names: Names) -> Iterator[Problem]:
    shape, stated = entry.shape, entry.node.keys
    candidates = shape.candidates or []
    if len(set(candidates)) < len(candidates):
        yield from _listed_twice(entry, candidates)
    if names.deployments is not None:
        yield from undefined(entry, "deployment", candidates, names.deployments, "candidates")
    if shape.require is not None:
        yield from _wrong_requirement(entry, shape.require, names)
    if shape.weights is not None:
        yield from _wrong_weights(entry, shape.weights)
    if isinstance(shape.order_by, OrderWeightsShape) and entry.intact and not any(shape.order_by.model_dump().values()):
        terms = ", ".join(OrderWeightsShape.model_fields)
        yield entry.problem(f'"order_by" weighs nothing; give one of {terms} a weight above 0', "order_by")
    if shape.slo is not None and shape.slo not in names.slo:
        yield entry.problem(f'slo "{shape.slo}" is not defined{suggestion(shape.slo, names.slo)}', "slo")
    if shape.timeouts is not None and entry.intact and not shape.timeouts.model_fields_set:
        yield entry.problem('"timeouts" states none', "timeouts")
    for key, other in (("unknown", "require"), ("otherwise", "require"), ("sticky", "weights")):
        if key in stated and other not in stated:
            yield entry.problem(f'"{key}" has no effect without "{other}"', key, key=True)


def _listed_twice(entry: Checked[DefaultShape], candidates: list[str]) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, name in enumerate(candidates):
        if name in seen:
            yield entry.problem(f'candidate "{name}" is listed twice', "candidates", index)
        seen.add(name)


def _wrong_requirement(entry: Checked[DefaultShape], require: RequireShape, names: Names) -> Iterator[Problem]:
    if entry.intact and not require.model_fields_set:
        yield entry.problem(
            f'"require" states nothing; write some of {", ".join(RequireShape.model_fields)}', "require"
        )
    if require.slo is not None and not names.slo:
        yield entry.problem('"require.slo" has no effect: the policy defines no class under `slo`', "require", "slo")


def _wrong_weights(entry: Checked[DefaultShape], weights: Mapping[str, float]) -> Iterator[Problem]:
    candidates = entry.shape.candidates
    if candidates is not None:
        for name in weights:
            if name not in candidates:
                message = f'"weights" names "{name}", which is no candidate{suggestion(name, candidates)}'
                yield entry.problem(message, "weights", name, key=True)
    if entry.intact and not any(weights.values()):
        yield entry.problem('"weights" has none above 0, so that no candidate could be drawn', "weights")


def _used_twice(entry: Checked[Shape], name: str | None, seen: set[str]) -> Iterable[Problem]:
    if name in seen:
        return (entry.problem("the name is used twice", "name"),)
    if name is not None:
        seen.add(name)
    return ()


def _rule(name: str, match: Match | None, shape: DefaultShape, cache: CacheShape | None) -> Rule:
    return Rule(
        name=name,
        match=match,
        candidates=tuple(shape.candidates or ()),
        require=None if shape.require is None else _require(shape.require),
        unknown=shape.unknown or "ineligible",
        otherwise=shape.otherwise or "fastest",
        order_by=_order(shape),
        protected=shape.protected,
        because=" ".join(shape.because.split()) if shape.because else "",
        weights=shape.weights or {},
        sticky=shape.sticky or "request",
        order_weights=_order_weights(shape),
        slo=shape.slo,
        timeouts={} if shape.timeouts is None else shape.timeouts.model_dump(exclude_none=True),
        cache=None if cache is None and shape.cache is None else caching_of(shape.cache, cache),
    )


def _require(shape: RequireShape) -> Require:
    return Require(
        slo_met=shape.slo == "met",
        cost_at_most_nusd=shape.cost_at_most,
        first_token_at_most_ms=_ms(shape.first_token_at_most),
        total_at_most_ms=_ms(shape.total_at_most),
        per_token_at_most_ms=_ms(shape.per_token_at_most),
    )


def _order(shape: DefaultShape) -> OrderBy:
    if isinstance(shape.order_by, OrderWeightsShape):
        return "weighted"
    return shape.order_by or "listed"


def _order_weights(shape: DefaultShape) -> Mapping[OrderTerm, float]:
    """The terms that weigh anything."""
    stated = shape.order_by
    if not isinstance(stated, OrderWeightsShape):
        return {}
    terms: dict[OrderTerm, float | None] = {
        "marginal_cost": stated.marginal_cost,
        "first_token": stated.first_token,
        "total_latency": stated.total_latency,
    }
    return {term: weight for term, weight in terms.items() if weight}


def _report_all(problems: Iterable[Problem], report: Report) -> None:
    for problem in problems:
        report(problem)
