"""What holds of any policy file, right or wrong."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, combinations, product
from typing import Any

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.policy import Invariant, permit
from gateway.policyfile import PolicyErrors, compile_policy
from gateway.types import RequestFacts

DEPLOYMENTS = "version: 1\ndeployments:\n  local: {backend: local, model: demo, zone: on_premises}\n"


def problems(policy: str, deployments: str = DEPLOYMENTS) -> list[str]:
    """What loading complains about; any other exception is a failure."""
    files = {"etc/policy.yaml": policy, "etc/deployments.yaml": deployments}

    def read(path: str) -> str:
        if path not in files:
            raise FileNotFoundError(2, "No such file or directory")
        return files[path]

    try:
        compile_policy("etc/policy.yaml", read=read, env={}, price_map={}, detectors=frozenset({"email"}))
    except PolicyErrors as error:
        return [str(problem) for problem in error.problems]
    return []


VALID_POLICY = """
version: 1
deployments: deployments.yaml
labels:
  personal: {any: [{detects: [email]}, {header: {x-data-class: [phi]}}, {key_tag: hr}]}
invariants:
  - {name: stay home, when: {any_label: [personal, unscannable]}, stay_in: [on_premises]}
slo: {fast: {first_token_p95: 50ms}}
rules:
  - name: chat
    when: {any_label: personal, does_not_fit: [local], slo: fast, tenant: a, key_tag: [b], tag: c, stream: true}
    candidates: [relay, local]
    require: {slo: met, cost_at_most: 0.01 USD}
    unknown: eligible
    otherwise: cheapest
    order_by: first_token
    protected: skip
    because: reasons
  - {name: tools, when: {tools: true, images: false, schema: false}, candidates: [relay]}
default: {candidates: [local]}
"""
VALID_DEPLOYMENTS = """
version: 1
deployments:
  local: {backend: local, model: demo, zone: on_premises, quantization: none}
  relay:
    backend: openai
    model: m
    zone: on_premises
    url: [http://a/v1]
    api_key: ${KEY}
    context_window: 9
    default_max_tokens: 3
    capabilities: [tools]
    tokenizer: bytes
    cost: {usd_per_million_tokens: {input: 0.2, output: 3}}
    timeouts: {connect: 250ms, total: 2m}
models: {gpt-4o: auto, gpt-4: chat}
"""

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        ["local", "relay", "chat", "personal", "${X}", "${", "1s", "1 USD", "no", "12:30", "http://[", "1e3"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("any"), inner, max_size=3)
    ),
    max_leaves=5,
)


def damage(draw: st.DrawFn, value: Any) -> Any:
    """The value with one spot replaced, removed, renamed or doubled."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(VALUES)
    if isinstance(value, list):
        at = draw(st.integers(0, len(value) - 1))
        how = draw(st.sampled_from(["go on", "remove", "double"]))
        middle = {"go on": [], "remove": [], "double": [value[at], value[at]]}[how]
        return [*value[:at], *(middle if how != "go on" else [damage(draw, value[at])]), *value[at + 1 :]]
    key = draw(st.sampled_from(sorted(value)))
    rest = {other: inner for other, inner in value.items() if other != key}
    how = draw(st.sampled_from(["go on", "go on", "remove", "rename"]))
    if how == "remove":
        return rest
    if how == "rename":
        return rest | {draw(st.sampled_from([key[1:], key + "s", "any", "name"])): value[key]}
    return rest | {key: damage(draw, value[key])}


@st.composite
def damaged(draw: st.DrawFn, text: str) -> str:
    """A file in which up to three things are not as they should be."""
    value = yaml.safe_load(text)
    for _ in range(draw(st.integers(0, 3))):
        value = damage(draw, value)
    written: str = yaml.safe_dump(value, sort_keys=False)
    return written


def test_the_files_to_be_damaged_are_right() -> None:
    assert problems(VALID_POLICY, VALID_DEPLOYMENTS) == []


@given(damaged(VALID_POLICY), damaged(VALID_DEPLOYMENTS))
@settings(max_examples=80, deadline=None)
def test_whatever_the_files_hold_loading_ends_with_a_policy_or_problems(policy: str, deployments: str) -> None:
    """No mistake is an exception of any other kind, and every problem has a place in one of the files."""
    found = problems(policy, deployments)
    assert all(line.startswith(("etc/policy.yaml:", "etc/deployments.yaml:")) for line in found)


@given(st.text(max_size=60))
@example("\ud800")
@example("a: \x00")
@example("%YAML 1.1\n---\na: *")
@settings(deadline=None)
def test_whatever_the_text_is_loading_ends_with_problems(text: str) -> None:
    assert problems(text)


ZONES = ("on_premises", "us", "eu")
LABELS = ("a", "b", "c")
TENANTS = ("t0", "t1", "t2")
TAGS = ("hr", "legal")
NAMES = [f"d{index}" for index in range(len(ZONES))]


@st.composite
def policies(draw: st.DrawFn) -> tuple[str, str]:
    """Both files of a policy that is right but for what it says of protected requests."""
    deployments = {
        name: {"backend": "openai", "model": "m", "url": "http://h/v1", "zone": zone}
        for name, zone in zip(NAMES, ZONES, strict=True)
    }
    some = st.lists(st.sampled_from(NAMES), min_size=1, unique=True)
    labels = st.lists(st.sampled_from([*LABELS, "unscannable"]), min_size=1, unique=True)
    zones = st.lists(st.sampled_from(ZONES), min_size=1, unique=True)
    conditions = st.fixed_dictionaries(
        {}, optional={"any_label": labels, "tenant": st.sampled_from(TENANTS), "key_tag": st.sampled_from(TAGS)}
    ).filter(bool)
    invariants = [
        {"name": f"i{n}", "when": draw(conditions), "stay_in": draw(zones)} for n in range(draw(st.integers(0, 3)))
    ]
    rules: list[dict[str, Any]] = []
    for n in range(draw(st.integers(0, 3))):
        when: dict[str, Any] = {"tenant": f"t{n}"}
        if draw(st.booleans()):
            when["any_label"] = draw(labels)
        rules.append({"name": f"r{n}", "when": when, "candidates": draw(some)})
        if draw(st.booleans()):
            rules[-1]["protected"] = draw(st.sampled_from(["refuse", "skip"]))
    default: dict[str, Any] = {"candidates": draw(some)}
    if draw(st.booleans()):
        default["protected"] = "refuse"
    policy = {
        "version": 1,
        "deployments": "deployments.yaml",
        "labels": {label: {"any": [{"key_tag": label}]} for label in LABELS},
        "invariants": invariants,
        "rules": rules,
        "default": default,
    }
    return yaml.safe_dump(policy), yaml.safe_dump({"version": 1, "deployments": deployments})


def subsets(items: Iterable[str]) -> list[frozenset[str]]:
    every = tuple(items)
    return [frozenset(s) for s in chain.from_iterable(combinations(every, n) for n in range(len(every) + 1))]


def unplaced(text: str) -> set[str]:
    """Names of the rules that leave some request without a candidate, by trying all sets of labels and tags of each
    tenant. A client that names a rule enters there whatever it looks at."""
    policy = yaml.safe_load(text)
    zone_of = dict(zip(NAMES, ZONES, strict=True))
    invariants = [
        Invariant(
            i["name"],
            frozenset(i["when"].get("any_label", ())),
            frozenset(i["stay_in"]),
            tenant=frozenset([i["when"]["tenant"]] if "tenant" in i["when"] else ()),
            key_tag=frozenset([i["when"]["key_tag"]] if "key_tag" in i["when"] else ()),
        )
        for i in policy["invariants"]
    ]
    requests = product((*TENANTS, "other"), subsets((*LABELS, "unscannable")), subsets(TAGS))
    zones = {
        permit(invariants, RequestFacts("auto", tenant=tenant, labels=labels, key_tags=tags)).zones
        for tenant, labels, tags in requests
    }
    return {
        rule.get("name", "default")
        for rule in [*policy["rules"], policy["default"]]
        if any(allowed is not None and not any(zone_of[n] in allowed for n in rule["candidates"]) for allowed in zones)
    }


@given(policies())
@settings(max_examples=60, deadline=None)
def test_a_policy_loads_only_if_every_protected_request_has_a_place_or_a_verdict(files: tuple[str, str]) -> None:
    """For each rule and each request a permitted candidate exists, or `protected` is stated."""
    written = yaml.safe_load(files[0])
    stated = {rule.get("name", "default") for rule in (*written["rules"], written["default"]) if "protected" in rule}
    silent = unplaced(files[0]) - stated
    found = problems(*files)
    assert len(found) == len(silent)
    for name in silent:
        assert any(f'rule "{name}"' in line or f" {name}: " in line for line in found)
