"""The policy file's entries: labels, invariants, SLO classes and rules.

Owns the step from their text to the types of `gateway.policy`, and the check that every name in them is defined.
Refuses to look at how rules bear on each other: that is `checks`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from gateway.policy import DEFAULT_RULE, Invariant, LabelSource, Match, Require, Rule, Slo
from gateway.policyfile.deployments import RESERVED
from gateway.policyfile.shapes import (
    Checked,
    DefaultShape,
    InvariantShape,
    LabelItemShape,
    LabelShape,
    Report,
    RuleShape,
    Shape,
    SloShape,
    WhenShape,
    check,
    subject_of,
    suggestion,
)
from gateway.policyfile.tree import Node, Problem
from gateway.types import ON_PREMISES, UNSCANNABLE, Deployment


@dataclass(frozen=True, slots=True)
class Written:
    """A rule together with the entry it was compiled from. Where the entry is not intact the rule says less than the
    file does."""

    rule: Rule
    entry: Checked[DefaultShape]


@dataclass(frozen=True, slots=True)
class Names:
    """What an entry may refer to. `deployments` is None where their file could not be read: then nothing is said
    about them."""

    deployments: Mapping[str, Deployment | None] | None
    labels: frozenset[str] = field(default_factory=frozenset)
    detected: frozenset[str] = field(default_factory=frozenset)  # of the labels, those that a detector may raise
    slo: frozenset[str] = field(default_factory=frozenset)


def labels_of(root: Node, detectors: frozenset[str], report: Report) -> tuple[LabelSource, ...]:
    """The labels, each as far as it is right."""
    compiled = []
    for name, node in root.children("labels").items():
        entry = check(LabelShape, node, f'label "{name}"', report, root.place_of(("labels", name), key=True))
        _report_all(entry.missing("any"), report)
        if name == UNSCANNABLE:
            report(entry.problem(f'the name "{UNSCANNABLE}" is built in: what cannot be read raises it'))
        _report_all(_wrong_items(entry, detectors), report)
        compiled.append(_label(name, entry.shape.any or []))
    return tuple(compiled)


def _wrong_items(entry: Checked[LabelShape], detectors: frozenset[str]) -> Iterator[Problem]:
    for index, (node, item) in enumerate(zip(entry.node.items("any"), entry.shape.any or [], strict=True)):
        if len(node.keys) != 1:
            yield entry.problem("an item states one of detects, header and key_tag; any item is enough", "any", index)
        yield from _undefined(entry, "detector", item.detects, detectors, "any", index, "detects")


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


def slo_of(root: Node, report: Report) -> dict[str, Slo]:
    """The SLO classes by name."""
    compiled = {}
    for name, node in root.children("slo").items():
        entry = check(SloShape, node, f'slo "{name}"', report, root.place_of(("slo", name), key=True))
        _report_all(entry.missing("first_token_p95"), report)
        if entry.shape.first_token_p95 is not None:
            compiled[name] = Slo(name, round(entry.shape.first_token_p95 * 1000, 6))
    return compiled


def invariants_of(root: Node, names: Names, report: Report) -> tuple[Invariant, ...]:
    """The invariants that are right; one that is not would say something else than what was meant."""
    compiled = []
    seen: set[str] = set()
    for position, node in enumerate(root.items("invariants"), 1):
        entry = check(InvariantShape, node, subject_of("invariant", node, position), report)
        wrong = [
            *entry.missing("name", "when", "stay_in"),
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
    yield from _undefined(entry, "label", when.any_label if when else None, names.labels, "when", "any_label")
    if names.deployments is not None and all(names.deployments.values()):
        zones = {ON_PREMISES, *(deployment.zone for deployment in names.deployments.values() if deployment)}
        yield from _undefined(entry, "zone", entry.shape.stay_in, zones, "stay_in")


def _wrong_mask(entry: Checked[InvariantShape], names: Names) -> Iterator[Problem]:
    when = entry.shape.when
    yield from _undefined(entry, "label", entry.shape.mask, names.labels, "mask")
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


def rules_of(root: Node, names: Names, report: Report) -> list[Written]:
    """The rules in the file's order, without the default."""
    written = []
    seen: set[str] = set()
    for position, node in enumerate(root.items("rules"), 1):
        entry = check(RuleShape, node, subject_of("rule", node, position), report)
        _report_all(entry.missing("name", "candidates"), report)
        _report_all(_used_twice(entry, entry.shape.name, seen), report)
        _report_all(_wrong_name(entry, names), report)
        _report_all(_wrong_conditions(entry, names), report)
        _report_all(_wrong_preferences(entry, names), report)
        match = _match(entry.shape.when) if entry.shape.when is not None else None
        written.append(Written(_rule(entry.shape.name or "", match, entry.shape), entry))
    return written


def default_of(root: Node, names: Names, report: Report) -> Written | None:
    """The default, or None where there is none."""
    node = root.child(DEFAULT_RULE)
    if node is None:
        return None
    entry = check(DefaultShape, node, DEFAULT_RULE, report, root.place_of((DEFAULT_RULE,), key=True))
    _report_all(entry.missing("candidates"), report)
    _report_all(_wrong_preferences(entry, names), report)
    if entry.shape.protected == "skip":
        report(entry.problem('"protected: skip" has no rule to go on to; write refuse', "protected"))
    return Written(_rule(DEFAULT_RULE, None, entry.shape), entry)


def _wrong_name(entry: Checked[RuleShape], names: Names) -> Iterator[Problem]:
    name = entry.shape.name
    if name in RESERVED:
        yield entry.problem(f'the name "{name}" is reserved', "name")
    if names.deployments and name in names.deployments:
        yield entry.problem("a deployment has this name already, and a client that asks for it could mean both", "name")


def _wrong_conditions(entry: Checked[RuleShape], names: Names) -> Iterator[Problem]:
    when = entry.shape.when
    if when is None:
        return
    if entry.intact and not when.model_fields_set:
        yield entry.problem('"when" states no condition; leave it out for a rule that is for all requests', "when")
    yield from _undefined(entry, "label", when.any_label, names.labels, "when", "any_label")
    yield from _undefined(entry, "slo", when.slo, names.slo, "when", "slo")
    if names.deployments is None:
        return
    yield from _undefined(entry, "deployment", when.does_not_fit, names.deployments, "when", "does_not_fit")
    for index, name in enumerate(when.does_not_fit or []):
        deployment = names.deployments.get(name)
        # A local engine tells its window when it has loaded its model; nobody tells that of another server.
        if deployment is not None and deployment.window is None and deployment.backend != "local":
            message = f'"when.does_not_fit" never holds: deployment "{name}" has no known context_window; state it'
            yield entry.problem(message, "when", "does_not_fit", index)


def _wrong_preferences(entry: Checked[DefaultShape], names: Names) -> Iterator[Problem]:
    shape, stated = entry.shape, entry.node.keys
    candidates = shape.candidates or []
    for index, name in enumerate(candidates):
        if name in candidates[:index]:
            yield entry.problem(f'candidate "{name}" is listed twice', "candidates", index)
    if names.deployments is not None:
        yield from _undefined(entry, "deployment", candidates, names.deployments, "candidates")
    if shape.require is not None and not shape.require.model_fields_set and entry.intact:
        yield entry.problem('"require" states nothing; write slo, cost_at_most or both', "require")
    for key in ("unknown", "otherwise"):
        if key in stated and "require" not in stated:
            yield entry.problem(f'"{key}" has no effect without "require"', key, key=True)


def _undefined(
    entry: Checked[Shape], noun: str, words: list[str] | None, known: Collection[str], *loc: str | int
) -> Iterator[Problem]:
    for index, word in enumerate(words or []):
        if word not in known:
            yield entry.problem(f'{noun} "{word}" is not defined{suggestion(word, known)}', *loc, index)


def _used_twice(entry: Checked[Shape], name: str | None, seen: set[str]) -> Iterator[Problem]:
    if name is None:
        return
    if name in seen:
        yield entry.problem("the name is used twice", "name")
    seen.add(name)


def _match(when: WhenShape) -> Match:
    def words(stated: list[str] | None) -> frozenset[str]:
        return frozenset(stated or ())

    return Match(
        any_label=words(when.any_label),
        does_not_fit=words(when.does_not_fit),
        slo=words(when.slo),
        tenant=words(when.tenant),
        key_tag=words(when.key_tag),
        tag=words(when.tag),
        stream=when.stream,
        tools=when.tools,
        images=when.images,
        schema=when.schema_,
    )


def _rule(name: str, match: Match | None, shape: DefaultShape) -> Rule:
    require = shape.require
    return Rule(
        name=name,
        match=match,
        candidates=tuple(shape.candidates or ()),
        require=None if require is None else Require(require.slo == "met", require.cost_at_most),
        unknown=shape.unknown or "ineligible",
        otherwise=shape.otherwise or "fastest",
        order_by=shape.order_by or "listed",
        protected=shape.protected,
        because=" ".join((shape.because or "").split()),
    )


def _report_all(problems: Iterable[Problem], report: Report) -> None:
    for problem in problems:
        report(problem)
