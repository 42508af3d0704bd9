"""What holds of any policy file, right or wrong."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from datetime import datetime
from fnmatch import fnmatchcase
from itertools import chain, combinations, product
from typing import Any
from zoneinfo import ZoneInfo

import yaml
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from gateway.policy import Invariant, Policy, permit
from gateway.policyfile import PolicyErrors, compile_policy
from gateway.policyfile.schema import deployments_schema, policy_schema
from gateway.snapshot import DeploymentStatus, Snapshot
from gateway.types import RequestFacts, TokenCount

DEPLOYMENTS = "version: 1\ndeployments:\n  local: {backend: local, model: demo, zone: on_premises}\n"


def compiled_policy(policy: str, deployments: str = DEPLOYMENTS) -> Policy:
    files = {"etc/policy.yaml": policy, "etc/deployments.yaml": deployments}

    def read(path: str) -> str:
        if path not in files:
            raise FileNotFoundError(2, "No such file or directory")
        return files[path]

    return compile_policy("etc/policy.yaml", read=read, env={}, price_map={}, detectors=frozenset({"email"}))


def problems(policy: str, deployments: str = DEPLOYMENTS) -> list[str]:
    """What loading complains about; any other exception is a failure."""
    try:
        compiled_policy(policy, deployments)
    except PolicyErrors as error:
        return [str(problem) for problem in error.problems]
    return []


VALID_POLICY = """
version: 1
deployments: deployments.yaml
labels:
  personal: {any: [{detects: [email, ticket]}, {header: {x-data-class: [phi]}}, {key_tag: hr}]}
invariants:
  - {name: stay home, when: {any_label: [personal, unscannable]}, stay_in: [on_premises]}
patterns: {ticket: "T-[0-9]+"}
slo: {fast: {first_token_p95: 50ms, total_p95: 2s}}
rules:
  - name: chat
    when: {any_label: personal, does_not_fit: [local], slo: fast, tenant: a, key_tag: [b], tag: c, stream: true}
    candidates: [relay, local]
    weights: {relay: 9, local: 1}
    sticky: key
    require: {slo: met, cost_at_most: 0.01 USD, total_at_most: 1s}
    unknown: eligible
    otherwise: cheapest
    order_by: {first_token: 1, marginal_cost: 0.5}
    protected: skip
    slo: fast
    timeouts: {total: 1m}
    because: reasons
  - name: nested
    when:
      any:
        - {model: [gpt-4, au*], header: {x-team: a}, prompt_tokens: {at_least: 8k, below: 16Ki}}
        - {not: {time: {zone: Europe/Berlin, days: [mon-fri], from: "22:00", to: "06:00"}}}
      all: [{max_tokens: {below: 10}}, {local_load: {local: {at_least: 0.8, unknown: holds}}}]
    candidates: [local]
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

POLICY_SCHEMA = Draft202012Validator(policy_schema())
DEPLOYMENTS_SCHEMA = Draft202012Validator(deployments_schema())

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        [
            "local",
            "relay",
            "chat",
            "personal",
            "${X}",
            "${",
            "1s",
            "1 USD",
            "no",
            "12:30",
            "http://[",
            "1e3",
            "8k",
            "(",
            "UTC",
        ]
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
    """No mistake is an exception of any other kind, and every problem has a place in one of the files. What loads is
    right by the exported schemas as well."""
    found = problems(policy, deployments)
    assert all(line.startswith(("etc/policy.yaml:", "etc/deployments.yaml:")) for line in found)
    if not found:
        assert POLICY_SCHEMA.is_valid(yaml.safe_load(policy))
        assert DEPLOYMENTS_SCHEMA.is_valid(yaml.safe_load(deployments))


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


SIZES = st.sampled_from([1, 8, "8k", 9])
RANGES = st.fixed_dictionaries({"at_least": SIZES}) | st.fixed_dictionaries({"below": SIZES})
SOME_WORDS = st.sampled_from(["a", "b"]) | st.lists(st.sampled_from(["a", "b"]), min_size=1)
TIMES = st.fixed_dictionaries(
    {"zone": st.sampled_from(["UTC", "America/New_York"])},
    optional={
        "days": st.sampled_from(["mon", "sat-sun", "fri-tue", ["mon", "wed"]]),
        "from": st.sampled_from(["00:00", "09:00"]),
        "to": st.sampled_from(["06:30", "17:00", "24:00"]),
    },
).filter(lambda time: len(time) > 1)
CONDITIONS: dict[str, st.SearchStrategy[Any]] = {
    "any_label": SOME_WORDS,
    "slo": SOME_WORDS,
    "tenant": SOME_WORDS,
    "key_tag": SOME_WORDS,
    "tag": SOME_WORDS,
    "stream": st.booleans(),
    "schema": st.booleans(),
    "model": st.sampled_from(["auto", "gpt-*", ["auto", "gpt-4?"]]),
    "header": st.dictionaries(st.sampled_from(["x-team", "X-Env"]), SOME_WORDS, min_size=1),
    "prompt_tokens": RANGES,
    "max_tokens": RANGES,
    "does_not_fit": st.sampled_from(["d0", "d1", ["d0", "d1"]]),
    "fits": st.sampled_from(["d0", "d1", ["d0", "d1"]]),
    "local_load": st.fixed_dictionaries(
        {"d0": st.fixed_dictionaries({"at_least": st.just(0.5), "unknown": st.sampled_from(["holds", "fails"])})}
    ),
    "time": TIMES,
}


@st.composite
def conditions(draw: st.DrawFn) -> dict[str, Any]:
    """A condition or two: of many, hardly ever all hold."""
    keys = draw(st.lists(st.sampled_from(sorted(CONDITIONS)), min_size=1, max_size=2))
    return {key: draw(CONDITIONS[key]) for key in keys}


@st.composite
def compounds(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    forms = {"any": several, "all": several, "not": inner, "stream": st.booleans()}
    keys = draw(st.lists(st.sampled_from(sorted(forms)), min_size=1, max_size=2))
    return {key: draw(forms[key]) for key in keys}


WHENS = st.recursive(conditions(), compounds, max_leaves=6)


def requests(count: int) -> Iterator[tuple[RequestFacts, Snapshot]]:
    """Requests and moments, the same in every run, of which each condition takes some and leaves some."""
    chance = random.Random(7)

    def some() -> frozenset[str]:
        return frozenset(chance.sample("abc", chance.randint(0, 3)))

    for _ in range(count):
        facts = RequestFacts(
            model=chance.choice(["auto", "gpt-4o", "gpt-5"]),
            tenant=chance.choice("abc"),
            key_tags=some(),
            tags=some(),
            labels=some(),
            prompt=TokenCount(bound=chance.randint(0, 200), estimate=chance.choice([0, 7, 8, 9, 7999, 8000])),
            max_tokens=chance.choice([None, 1, 7, 8, 9, 8000]),
            stream=chance.random() < 0.5,
            schema=chance.random() < 0.5,
            slo=chance.choice([None, "a", "b", "c"]),
            headers=frozenset((name, value) for name in ("x-team", "x-env") for value in some() - {"c"}),
        )
        statuses = {"d0": DeploymentStatus(busy=chance.choice([None, 0.2, 0.5, 0.9])), "d1": DeploymentStatus()}
        yield facts, Snapshot(0.0, 0.0, statuses, wall=float(chance.randint(1_790_000_000, 1_791_200_000)))


REQUESTS = list(requests(200))
WEEK = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def holds(when: dict[str, Any], facts: RequestFacts, policy: Policy, snapshot: Snapshot) -> bool:
    """Whether a request meets the conditions, read from the document: slow, and written without regard to the code."""

    def meets(key: str, stated: Any) -> bool:
        words = stated if isinstance(stated, list) else [stated]
        numbers = {"prompt_tokens": facts.prompt.estimate, "max_tokens": facts.max_tokens}
        match key:
            case "any":
                return any(holds(inner, facts, policy, snapshot) for inner in stated)
            case "all":
                return all(holds(inner, facts, policy, snapshot) for inner in stated)
            case "not":
                return not holds(stated, facts, policy, snapshot)
            case "any_label" | "key_tag" | "tag":
                of = {"any_label": facts.labels, "key_tag": facts.key_tags, "tag": facts.tags}[key]
                return any(word in of for word in words)
            case "slo" | "tenant" | "stream" | "schema":
                return {"slo": facts.slo, "tenant": facts.tenant, "stream": facts.stream, "schema": facts.schema}[
                    key
                ] in words
            case "model":
                return any(fnmatchcase(facts.model, word) for word in words)
            case "header":
                return all(
                    any(
                        (name.lower(), value) in facts.headers
                        for value in (values if isinstance(values, list) else [values])
                    )
                    for name, values in stated.items()
                )
            case "prompt_tokens" | "max_tokens":
                number = numbers[key]
                side, bound = next(iter(stated.items()))
                bound = 8000 if bound == "8k" else bound
                return number is not None and (number >= bound if side == "at_least" else number < bound)
            case "fits" | "does_not_fit":
                fit = [policy.deployments[name].fits(facts.prompt, facts.max_tokens) for name in words]
                return any(fit) if key == "fits" else not all(fit)
            case "local_load":
                busy = snapshot.deployments["d0"].busy
                return stated["d0"]["unknown"] == "holds" if busy is None else busy >= 0.5
            case "time":
                return in_time(stated, snapshot.wall)
        raise AssertionError(key)

    return all(meets(key, stated) for key, stated in when.items())


def in_time(stated: dict[str, Any], wall: float) -> bool:
    """By walking through the last two days, minute by minute, for the beginning of a span that is not over."""
    now = datetime.fromtimestamp(wall, ZoneInfo(stated["zone"]))
    begin, end = (60 * int(t[:2]) + int(t[3:]) for t in (stated.get("from", "00:00"), stated.get("to", "24:00")))
    length = (end - begin - 1) % 1440 + 1
    days = stated.get("days", "mon-sun")
    begins_on = set()
    for span in days if isinstance(days, list) else [days]:
        first, _, last = span.partition("-")
        at = WEEK.index(first)
        begins_on.add(at)
        while WEEK[at] != (last or first):
            at = (at + 1) % 7
            begins_on.add(at)
    minute = now.weekday() * 1440 + now.hour * 60 + now.minute
    return any((minute - day * 1440 - begin) % (7 * 1440) < length for day in begins_on)


@given(WHENS)
@settings(deadline=None)
def test_conditions_mean_what_they_say(when: dict[str, Any]) -> None:
    """Compiled, a `when` of any depth holds exactly where reading it out does; one that is refused, because it
    contradicts itself, nowhere."""
    deployments = {
        "version": 1,
        "deployments": {
            "d0": {"backend": "local", "model": "demo", "zone": "a", "context_window": 150},
            "d1": {"backend": "openai", "model": "m", "url": "http://h/v1", "zone": "a", "context_window": 100},
        },
        "models": {"gpt-4o": "auto", "gpt-5": "auto"},
    }
    policy = {
        "version": 1,
        "deployments": "deployments.yaml",
        "labels": {label: {"any": [{"key_tag": "none"}]} for label in "ab"},
        "slo": {slo: {"first_token_p95": "1s"} for slo in "ab"},
        "rules": [{"name": "r", "when": when, "candidates": ["d1"]}],
        "default": {"candidates": ["d1"]},
    }
    files = yaml.safe_dump(policy), yaml.safe_dump(deployments)
    told = problems(*files)
    if told:
        event("contradicts itself")
        assert ["its conditions contradict each other" in each for each in told] == [True]
        policy["rules"] = []
        compiled = compiled_policy(yaml.safe_dump(policy), files[1])
        assert not any(holds(when, facts, compiled, snapshot) for facts, snapshot in REQUESTS)
        return
    compiled = compiled_policy(*files)
    match = compiled.rules[0].match
    assert match is not None
    for facts, snapshot in REQUESTS:
        assert match.matches(facts, compiled.deployments, snapshot) is holds(when, facts, compiled, snapshot)
