"""The `cache` of a policy and of its rules: what a rule leaves out is as the policy says.

Owns what both together mean, and which of it has no effect.
"""

from __future__ import annotations

from collections.abc import Iterator

from gateway.decision import Caching
from gateway.policyfile.entries import Checked
from gateway.policyfile.language import CacheShape, DefaultShape, PolicyShape, RuleShape
from gateway.policyfile.tree import Problem


def caching_of(stated: CacheShape | None, above: CacheShape | None) -> Caching | None:
    """What is stored by a rule that states this, below a policy that states the other; None where nothing is."""
    if stated is None and above is None:
        return None
    stated, above = stated or CacheShape(), above or CacheShape()
    ttl, when = stated.ttl or above.ttl, stated.when or above.when or "deterministic"
    if ttl is None or when == "never":
        return None
    return Caching(ttl, when, stated.scope or above.scope or "tenant")


def wrong_cache_of_policy(file: Checked[PolicyShape]) -> Iterator[Problem]:
    """Of the whole policy."""
    shape = file.shape.cache
    if shape is not None:
        yield from _without_effect(file, shape)
        if shape.ttl is None and shape.when != "never" and shape.model_fields_set:
            yield file.problem('"cache" states no "ttl": how long an answer is kept, such as 1h', "cache")


def wrong_cache(entry: Checked[DefaultShape], above: CacheShape | None) -> Iterator[Problem]:
    """Of a rule or the default, below what the policy states."""
    shape = entry.shape.cache
    if shape is None:
        return
    yield from _without_effect(entry, shape)
    when = shape.when or (above.when if above is not None else None)
    if shape.model_fields_set and when != "never" and shape.ttl is None and (above is None or above.ttl is None):
        yield entry.problem('"cache" states no "ttl", and the policy has none: write one, such as 1h', "cache")
    if shape.when is None and when == "never":
        yield entry.problem('"cache" has no effect: the policy says `when: never`, and the rule no other', "cache")
    match = entry.shape.when if isinstance(entry.shape, RuleShape) else None
    if shape.scope == "shared" and match is not None and match.any_label:
        message = '"cache.scope" has no effect: only requests with a label come here, and their answers are not shared'
        yield entry.problem(message, "cache", "scope")


def _without_effect(entry: Checked[PolicyShape] | Checked[DefaultShape], shape: CacheShape) -> Iterator[Problem]:
    if entry.intact and not shape.model_fields_set:
        yield entry.problem('"cache" states nothing; write ttl, when or scope', "cache")
    if shape.when == "never":
        for key in ("ttl", "scope"):
            if key in shape.model_fields_set:
                yield entry.problem(f'"cache.{key}" has no effect with `when: never`', "cache", key, key=True)
