"""The shapes of the policy file: labels, patterns, invariants, SLO classes and rules, each value by itself.

Owns the keys, but for those of `when` (`whenshapes.py`), and the syntax of weights. Refuses references, as `shapes`
does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from gateway.decision import CacheScope
from gateway.policy import Otherwise, Protected, Sticky, Unknown
from gateway.policyfile.entries import MAPPING
from gateway.policyfile.shapes import Shape, TimeoutsShape
from gateway.policyfile.values import (
    HeaderName,
    HeaderValues,
    Label,
    Nusd,
    Seconds,
    Sentence,
    Text,
    Title,
    Version,
    Word,
    Words,
    between,
    is_number,
)
from gateway.policyfile.whenshapes import WhenShape

_MOST_WEIGHT = 1_000_000


def _weight(value: Any) -> float:
    if not is_number(value) or not 0 <= value <= _MOST_WEIGHT:
        raise ValueError(f"must be a number from 0 to {_MOST_WEIGHT}")
    return float(value)


Weight = Annotated[float, BeforeValidator(_weight), between(0, _MOST_WEIGHT)]


class CacheShape(Shape):
    never_empty = True
    hints: ClassVar[Mapping[str, str]] = {
        "exact": "there is no other cache: write ttl, when or scope",
        "semantic": "only equal requests get stored answers",
    }

    meanings: ClassVar[Mapping[str, str]] = {
        "ttl": "How long an answer is kept, at most 24h.",
        "when": (
            "deterministic: requests with temperature 0 or a seed, and those that ask with Cache-Control: max-age. "
            "always: all. never: none."
        ),
        "scope": "tenant: no other tenant gets the answer. shared: every tenant does, where the request has no label.",
    }

    ttl: Seconds | None = None
    when: Literal["never", "deterministic", "always"] | None = None
    scope: CacheScope | None = None


class PolicyShape(Shape):
    not_built = frozenset({"budgets", "limits", "shadow"})
    hints: ClassVar[Mapping[str, str]] = {
        "models": "it belongs in the deployments file",
        "mask": "it belongs in an invariant",
        "weights": "they belong in a rule",
    }

    required = ("version", "deployments", "default")

    meanings: ClassVar[Mapping[str, str]] = {
        "version": "The version of the language: 1.",
        "deployments": "The deployments file, relative to this one.",
        "labels": "Facts about the data of a request, by name. Any one item of a label raises it.",
        "patterns": "Detectors of your own, by name: RE2 patterns that labels may detect.",
        "invariants": "What must never happen. All that match apply, and nothing relaxes them.",
        "slo": "Latency classes that callers name with x-hybridgate-slo.",
        "rules": "What is preferred. Read top down; the first that matches decides.",
        "default": "The rule for every request that no other matches.",
        "cache": "That answers are stored and given again; a rule may say otherwise for its requests.",
    }

    version: Version | None = None
    deployments: Text | None = None
    labels: dict[Label, Any] | None = None
    patterns: dict[Label, Sentence] | None = None
    invariants: list[Any] | None = None
    slo: dict[Word, Any] | None = None
    rules: list[Any] | None = None
    default: dict[str, Any] | None = None
    cache: CacheShape | None = None


class LabelItemShape(Shape):
    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})
    hints: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("all", "any", "not"), "one fact is enough for a label, and nothing takes it away"
    )
    not_built = frozenset({"classifier"})

    meanings: ClassVar[Mapping[str, str]] = {
        "detects": "Detectors and patterns: one that fires on some string of the body is enough.",
        "header": "Headers with values: one that a request sends is enough.",
        "key_tag": "Tags of the key of a caller.",
    }

    detects: Words | None = None
    header: dict[HeaderName, HeaderValues] | None = None
    key_tag: Words | None = None


class LabelShape(Shape):
    required = ("any",)
    hints: ClassVar[Mapping[str, str]] = LabelItemShape.hints

    meanings: ClassVar[Mapping[str, str]] = {
        "any": "Items of which one is enough.",
    }

    any: Annotated[list[LabelItemShape], Field(min_length=1)] | None = None


class InvariantWhenShape(Shape):
    never_empty = True
    hints: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("all", "any", "does_not_fit", "fits", "header", "model", "not", "tag", "time"),
        "an invariant looks at any_label, tenant and key_tag, which nobody can take off a request",
    )

    meanings: ClassVar[Mapping[str, str]] = {
        "any_label": "The request has one of these labels.",
        "tenant": "The key is of one of these tenants.",
        "key_tag": "The key has one of these tags.",
    }

    any_label: Words | None = None
    tenant: Words | None = None
    key_tag: Words | None = None


class InvariantShape(Shape):
    required = ("name", "when", "stay_in")
    not_built = frozenset({"resume"})

    meanings: ClassVar[Mapping[str, str]] = {
        "name": "What messages call it.",
        "when": "Whom it concerns: all keys must hold, in a list any one item.",
        "stay_in": "The zones that such a request never leaves.",
        "mask": "Labels: what detectors found for them may leave these zones as placeholders instead.",
    }

    name: Title | None = None
    when: InvariantWhenShape | None = None
    stay_in: Words | None = None
    mask: Words | None = None


class SloShape(Shape):
    never_empty = True

    meanings: ClassVar[Mapping[str, str]] = {
        "first_token_p95": "Of 100 answers 95 begin within this time.",
        "total_p95": "Of 100 answers 95 are whole within this time.",
        "per_token_p95": "Of 100 answers 95 take at most this time for each token after the first.",
    }

    first_token_p95: Seconds | None = None
    total_p95: Seconds | None = None
    per_token_p95: Seconds | None = None


class RequireShape(Shape):
    never_empty = True

    meanings: ClassVar[Mapping[str, str]] = {
        "slo": "The latency class of the request is met.",
        "cost_at_most": "What the request costs, such as 0.01 USD.",
        "first_token_at_most": "When the answer begins.",
        "total_at_most": "When the answer is whole.",
        "per_token_at_most": "The time for each token after the first.",
    }

    slo: Literal["met"] | None = None
    cost_at_most: Nusd | None = None
    first_token_at_most: Seconds | None = None
    total_at_most: Seconds | None = None
    per_token_at_most: Seconds | None = None


class OrderWeightsShape(Shape):
    never_empty = True

    meanings: ClassVar[Mapping[str, str]] = {
        "marginal_cost": "Weight of a dollar.",
        "first_token": "Weight of a second to the first token.",
        "total_latency": "Weight of a second of the whole answer.",
    }

    marginal_cost: Weight | None = None
    first_token: Weight | None = None
    total_latency: Weight | None = None


_Order = Literal["listed", "marginal_cost", "first_token", "total_latency"]
OrderBy = Annotated[
    Annotated[_Order, Tag("[word]")] | Annotated[OrderWeightsShape, Tag(MAPPING)],
    Discriminator(lambda value: MAPPING if isinstance(value, dict | OrderWeightsShape) else "[word]"),
]


class DefaultShape(Shape):
    required: ClassVar[tuple[str, ...]] = ("candidates",)
    not_built = frozenset({"budgets", "hedge", "limits", "priority", "resume", "shadow"})
    hints: ClassVar[Mapping[str, str]] = {
        "name": "the default is called `default`",
        "when": "the default is for every request that no rule matches",
        "mask": "it belongs in an invariant",
    }

    meanings: ClassVar[Mapping[str, str]] = {
        "candidates": "Deployments that may answer, each once.",
        "weights": "Chance puts one of these candidates first, each with its share of the sum.",
        "sticky": "What all has the same draw of the weights; a request without it.",
        "require": "Ranks first what is predicted to meet all of it; removes none.",
        "unknown": "Whether what has not been measured counts as meeting the requirement; ineligible without it.",
        "otherwise": "The order of those that do not meet the requirement; fastest without it.",
        "order_by": "The order of those that do; as listed without it.",
        "protected": "What happens where an invariant leaves no candidate: 403, or the next rule.",
        "slo": "The latency class of requests that name none.",
        "timeouts": "Instead of those of the deployments.",
        "cache": "That answers are stored and given again: what it leaves out is as the policy's `cache` says.",
        "because": "A sentence for the decision record.",
    }

    candidates: Words | None = None
    weights: dict[Text, Weight] | None = None
    sticky: Sticky | None = None
    require: RequireShape | None = None
    unknown: Unknown | None = None
    otherwise: Otherwise | None = None
    order_by: OrderBy | None = None
    protected: Protected | None = None
    slo: Text | None = None
    timeouts: TimeoutsShape | None = None
    cache: CacheShape | None = None
    because: Sentence | None = None


class RuleShape(DefaultShape):
    required = ("name", "candidates")
    hints: ClassVar[Mapping[str, str]] = {"mask": "it belongs in an invariant"}

    meanings: ClassVar[Mapping[str, str]] = {
        **DefaultShape.meanings,
        "name": "A client may ask for it as a model, and so enters there.",
        "when": "All keys must hold, in a list any one item; without it, all requests match.",
    }

    name: Title | None = None
    when: WhenShape | None = None
