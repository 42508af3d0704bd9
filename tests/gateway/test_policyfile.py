"""From YAML text to a compiled policy. What is refused is in test_policyfile_bad.py, what holds of any file in
test_policyfile_properties.py."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import suppress
from zoneinfo import ZoneInfo

import pytest
import yaml

from gateway.policy import Invariant, LabelSource, Match, Policy, Require, Rule, Slo
from gateway.policyfile import MAX_BYTES, MOST_PROBLEMS, PolicyErrors, compile_policy
from gateway.ranges import Hours, Load, Range
from gateway.routing import decide
from gateway.types import Deployment, Price, Timeouts
from tests.bench.policy import FACTS, fleet_of, loading

DETECTORS = frozenset({"email", "phone", "jwt"})
PRICES = {
    "gpt-4o-mini": {
        "input_cost_per_token": 1.5e-07,
        "output_cost_per_token": 6e-07,
        "litellm_provider": "openai",
        "max_input_tokens": 128_000,
        "supports_function_calling": True,
    },
}
DEPLOYMENTS = """
version: 1
deployments:
  local: {backend: local, model: demo, zone: on_premises}
  cloud: {backend: litellm, model: openai/gpt-4o-mini, zone: us_cloud, api_key: "${OPENAI_API_KEY}"}
"""
POLICY = """
version: 1
deployments: deployments.yaml
default: {candidates: [local]}
"""
SECRET = "hunter2"  # in no message, ever


def load(policy: str = POLICY, deployments: str = DEPLOYMENTS, env: Mapping[str, str] | None = None) -> Policy:
    files = {"etc/policy.yaml": policy, "etc/deployments.yaml": deployments}
    return compile_policy(
        "etc/policy.yaml", read=files.__getitem__, env=env or {}, price_map=PRICES, detectors=DETECTORS
    )


def deployment(text: str, env: Mapping[str, str] | None = None) -> Deployment:
    """The one deployment `x` with these keys, beside a local one."""
    return load(deployments=f"{DEPLOYMENTS}  x: {text}\n", env=env).deployments["x"]


def problems(policy: str = POLICY, deployments: str = DEPLOYMENTS, env: Mapping[str, str] | None = None) -> list[str]:
    try:
        load(policy, deployments, env)
    except PolicyErrors as error:
        return [str(problem) for problem in error.problems]
    return []


def test_the_whole_language_compiles() -> None:
    """Each key ends where it should, with its unit converted."""
    policy = load(
        """
version: 1
deployments: deployments.yaml
patterns: {ticket: "TICKET-[0-9]{4}"}
labels:
  personal:
    any:
      - {detects: [email, phone, ticket]}
      - {header: {X-Data-Class: [PHI, restricted], x-team: hr}}
      - {header: {x-data-class: secret}}
      - {key_tag: hr}
invariants:
  - {name: stay home, when: {any_label: [personal, unscannable]}, stay_in: [on_premises, eu], mask: personal}
  - {name: tenants, when: {tenant: [a, b], key_tag: c}, stay_in: [on_premises, eu]}
slo:
  fast: {first_token_p95: 50ms, per_token_p95: 20ms}
  slow: {total_p95: 1.5 s}
rules:
  - name: everything
    when: {any_label: personal, does_not_fit: [local], fits: cloud, slo: fast, tenant: a, key_tag: [b], tag: c,
           stream: true, tools: false, images: false, schema: false, model: [auto, "d*"],
           header: {X-Team: [HR, b], x-env: prod}, prompt_tokens: {at_least: 8k, below: 32Ki}, max_tokens: {below: 1M},
           local_load: {local: {at_least: 0.8, unknown: holds}},
           time: {zone: Europe/Berlin, days: [fri-mon, wed], from: "08:00", to: "18:30"}}
    candidates: [cloud, local]
    weights: {cloud: 90, local: 0.5}
    sticky: tenant
    require: {slo: met, cost_at_most: 0.01 USD, first_token_at_most: 300ms, total_at_most: 1m, per_token_at_most: 20ms}
    unknown: eligible
    otherwise: cheapest
    order_by: {marginal_cost: 1, first_token: 0.5, total_latency: 0}
    protected: skip
    slo: slow
    timeouts: {connect: 1s, total: 2h}
    because: "of all
      its keys"
  - {name: sparse, when: {stream: false}, candidates: local}
  - name: nested
    when:
      any: [{tenant: a, tag: x}, {all: [{prompt_tokens: {at_least: 1}}, {not: {time: {zone: UTC, to: "06:00"}}}]}]
      not: {local_load: {local: {below: 0.5, unknown: fails}}}
    candidates: [local]
    order_by: total_latency
default: {candidates: [cloud], protected: refuse, require: {slo: met}, otherwise: reject}
""",
        DEPLOYMENTS.replace("us_cloud", "eu"),
    )
    assert policy.patterns == {"ticket": "TICKET-[0-9]{4}"}
    assert policy.labels == (
        LabelSource(
            "personal",
            frozenset({"email", "phone", "ticket"}),
            {"x-data-class": frozenset({"phi", "restricted", "secret"}), "x-team": frozenset({"hr"})},
            frozenset({"hr"}),
        ),
    )
    home = frozenset({"on_premises", "eu"})
    assert policy.invariants == (
        Invariant("stay home", frozenset({"personal", "unscannable"}), home, mask=frozenset({"personal"})),
        Invariant("tenants", frozenset(), home, tenant=frozenset({"a", "b"}), key_tag=frozenset({"c"})),
    )
    assert policy.slo == {"fast": Slo("fast", 50.0, None, 20.0), "slow": Slo("slow", None, 1500.0)}
    everything = Match(
        any_label=frozenset({"personal"}),
        does_not_fit=frozenset({"local"}),
        fits=frozenset({"cloud"}),
        slo=frozenset({"fast"}),
        tenant=frozenset({"a"}),
        key_tag=frozenset({"b"}),
        tag=frozenset({"c"}),
        stream=True,
        tools=False,
        images=False,
        schema=False,
        model=frozenset({"auto", "d*"}),
        header={"x-team": frozenset({"hr", "b"}), "x-env": frozenset({"prod"})},
        prompt_tokens=Range(8000, 32768),
        counted_by="cloud",
        max_tokens=Range(below=1_000_000),
        local_load={"local": Load(Range(0.8), unknown=True)},
        time=Hours(ZoneInfo("Europe/Berlin"), frozenset({4, 5, 6, 0, 2}), 8 * 60, 18 * 60 + 30),
    )
    everything_rule, sparse, nested = policy.rules
    assert everything_rule == Rule(
        name="everything",
        match=everything,
        candidates=("cloud", "local"),
        require=Require(True, 10_000_000, first_token_at_most_ms=300, total_at_most_ms=60_000, per_token_at_most_ms=20),
        unknown="eligible",
        otherwise="cheapest",
        order_by="weighted",
        protected="skip",
        because="of all its keys",
        weights={"cloud": 90, "local": 0.5},
        sticky="tenant",
        order_weights={"marginal_cost": 1, "first_token": 0.5},
        slo="slow",
        timeouts={"connect": 1.0, "total": 7200.0},
    )
    assert sparse == Rule(name="sparse", match=Match(stream=False), candidates=("local",))
    night = Match(time=Hours(ZoneInfo("UTC"), end=6 * 60))
    long = Match(prompt_tokens=Range(1), counted_by="local")
    assert nested.order_by == "total_latency"
    assert nested.match == Match(
        any_of=(
            Match(tenant=frozenset({"a"}), tag=frozenset({"x"})),
            Match(all_of=(long, Match(not_=night))),
        ),
        not_=Match(local_load={"local": Load(Range(below=0.5))}),
    )
    assert policy.default == Rule(
        "default", None, ("cloud",), Require(slo_met=True), otherwise="reject", protected="refuse"
    )


@pytest.mark.parametrize(
    ("text", "tokens"), [("8192", 8192), ("8k", 8000), ("8.5 k", 8500), ("8Ki", 8192), ("1M", 10**6), ("0.5Mi", 2**19)]
)
def test_tokens_are_thousands_or_powers_of_two_as_written(text: str, tokens: int) -> None:
    x = f"{{backend: openai, model: m, zone: z, url: http://h/v1, context_window: {text}, default_max_tokens: {text}}}"
    assert (deployment(x).window, deployment(x).default_max_tokens) == (tokens, tokens)


@pytest.mark.parametrize(
    ("text", "env", "expected"),
    [
        (
            "{backend: local, model: demo, zone: z}",
            {},
            Deployment(
                "x", "local", "demo", "z", window=1024, tokenizer="deployment:x", capabilities=frozenset({"schema"})
            ),
        ),
        (
            "{backend: local, model: a/b, zone: z, url: [http://a:1/], ca_file: /etc/ca.pem, quantization: none}",
            {},
            Deployment(
                "x",
                "local",
                "a/b",
                "z",
                urls=("http://a:1",),
                capabilities=frozenset({"schema", "tools"}),
                tokenizer="deployment:x",
                ca_file="/etc/ca.pem",
            ),
        ),
        (
            "{backend: local, model: a/b, zone: z, speculation: draft, draft: a/c}",
            {},
            Deployment(
                "x",
                "local",
                "a/b",
                "z",
                capabilities=frozenset({"schema", "tools"}),
                tokenizer="deployment:x",
                speculation="draft",
                draft_model="a/c",
            ),
        ),
        (
            "{backend: local, model: a/b, zone: z, capabilities: [schema]}",
            {},
            Deployment("x", "local", "a/b", "z", capabilities=frozenset({"schema"}), tokenizer="deployment:x"),
        ),
        (
            "{backend: local, model: a/b, zone: z, url: '${ENGINE}'}",
            {},
            Deployment(
                "x",
                "local",
                "a/b",
                "z",
                ("${ENGINE}",),
                capabilities=frozenset({"schema", "tools"}),
                tokenizer="deployment:x",
                unavailable="ENGINE is not set",
            ),
        ),
        (
            "{backend: openai, model: '${M}', zone: z, url: 'http://${HOST}:1/v1', api_key: '${K}'}",
            {"M": "m", "HOST": "h", "K": " k\n"},
            Deployment(
                "x",
                "openai",
                "m",
                "z",
                urls=("http://h:1/v1",),
                api_key="k",
                capabilities=frozenset({"tools", "images", "schema"}),
                tokenizer="tiktoken:o200k_base",
            ),
        ),
        (
            "{backend: openai, model: '${M}', zone: z, url: '${U}', api_key: '${K}', capabilities: [],"
            " tokenizer: bytes}",
            {"M": " "},
            Deployment(
                "x", "openai", "${M}", "z", urls=("${U}",), tokenizer="bytes", unavailable="U and K and M are not set"
            ),
        ),
        (
            "{backend: litellm, model: openai/gpt-4o-mini, zone: z, tokenizer: cl100k_base}",
            {},
            Deployment(
                "x",
                "litellm",
                "openai/gpt-4o-mini",
                "z",
                price=Price(150.0, 600.0),
                cost_basis="litellm's price map",
                window=128_000,
                capabilities=frozenset({"tools"}),
                tokenizer="tiktoken:cl100k_base",
            ),
        ),
        (
            "{backend: litellm, model: other/new, zone: z, url: https://h/v1, context_window: 9, default_max_tokens: 3,"
            " capabilities: [images], cost: {usd_per_million_tokens: {input: 0.2, output: 3}},"
            " timeouts: {connect: 250ms, total: 2m}}",
            {},
            Deployment(
                "x",
                "litellm",
                "other/new",
                "z",
                api_base="https://h/v1",
                price=Price(200.0, 3000.0),
                cost_basis="as stated",
                window=9,
                default_max_tokens=3,
                capabilities=frozenset({"images"}),
                tokenizer="tiktoken:o200k_base",
                timeouts=Timeouts(connect=0.25, total=120.0),
            ),
        ),
        (
            "{backend: litellm, model: '${M}', zone: z}",
            {},
            Deployment("x", "litellm", "${M}", "z", tokenizer="tiktoken:o200k_base", unavailable="M is not set"),
        ),
    ],
)
def test_a_deployment_is_what_the_file_the_environment_and_the_catalog_say(
    text: str, env: dict[str, str], expected: Deployment
) -> None:
    """What is not set stays as written, and makes the deployment unavailable."""
    assert deployment(text, env) == expected


def test_names_for_clients_stand_for_auto_a_deployment_or_a_rule() -> None:
    models = {"gpt-4o": "auto", "gpt 5": "cloud", "fast": "streams", "d": "default"}
    policy = POLICY + "rules: [{name: streams, when: {stream: true}, candidates: [cloud]}]\n"
    assert load(policy, DEPLOYMENTS + yaml.safe_dump({"models": models})).models == models


def test_the_order_of_deployments_is_the_files() -> None:
    assert list(load().deployments) == ["local", "cloud"]


@pytest.mark.parametrize(
    ("deployments", "replaced"),
    [
        (
            "local: {backend: local, model: demo, zone: a, context_window: 9}, b: {backend: local, model: c, zone: a}",
            "local",
        ),
        ("other: {backend: local, model: demo, zone: a, context_window: 9}", "other"),
        (
            "r: {backend: local, model: c, zone: a, url: http://h/}, other: {backend: local, model: demo, zone: a}",
            "other",
        ),
    ],
)
def test_the_environment_names_the_local_model(deployments: str, replaced: str) -> None:
    """It stands for the model of the engine called `local`, or of the only one; the window of the other model goes
    with it."""
    policy = load(
        POLICY.replace("[local]", f"[{replaced}]"),
        f"version: 1\ndeployments: {{{deployments}}}\n",
        {"HYBRIDGATE_LOCAL_MODEL": "Qwen/Qwen3-4B"},
    )
    assert (policy.deployments[replaced].model, policy.deployments[replaced].window) == ("Qwen/Qwen3-4B", None)
    assert [d.name for d in policy.deployments.values() if d.model == "Qwen/Qwen3-4B"] == [replaced]


@pytest.mark.parametrize(
    "deployments",
    [
        "a: {backend: local, model: demo, zone: a}, b: {backend: local, model: c, zone: a}",
        "a: {backend: local, model: demo, zone: a, url: http://h/}",
    ],
)
def test_a_local_model_that_no_engine_would_serve_is_a_problem(deployments: str) -> None:
    found = problems(
        POLICY.replace("[local]", "[a]"),
        f"version: 1\ndeployments: {{{deployments}}}\n",
        {"HYBRIDGATE_LOCAL_MODEL": "Qwen/Qwen3-4B"},
    )
    assert len(found) == 1
    assert found[0].startswith("etc/deployments.yaml:2:14: HYBRIDGATE_LOCAL_MODEL is set, but there ")


def test_the_hash_changes_with_what_the_files_say_and_with_nothing_else() -> None:
    """Comments, the order of keys and the values of variables have no part in it; the order of rules and names of
    variables have."""
    plain = load().hash
    assert len(plain) == 12
    assert int(plain, 16) >= 0
    same = [
        load(POLICY + "# a comment\n"),
        load("default: {candidates: [local]}\nversion: 1\ndeployments: deployments.yaml\n"),
        load(env={"OPENAI_API_KEY": SECRET}),
    ]
    assert {policy.hash for policy in same} == {plain}
    changed = [
        load(POLICY.replace("[local]", "[local, cloud]")),
        load(POLICY.replace("[local]", "[cloud, local]")),
        load(deployments=DEPLOYMENTS.replace("us_cloud", "eu_cloud")),
        load(deployments=DEPLOYMENTS.replace("OPENAI_API_KEY", "OTHER_KEY")),
    ]
    assert len({plain, *(policy.hash for policy in changed)}) == 5


def test_aliases_stand_for_what_they_name() -> None:
    policy = load(
        POLICY.replace("[local]", "&names [local, cloud]")
        + "rules: [{name: streams, when: {stream: true}, candidates: *names}]\n"
    )
    assert policy.rules[0].candidates == policy.default.candidates == ("local", "cloud")


@pytest.mark.parametrize(
    "x",
    [
        f"{{backend: openai, model: m, zone: z, url: http://h/v1, api_key: {SECRET}}}",
        f"{{backend: openai, model: m, zone: z, url: http://u:{SECRET}@h/v1}}",
        f"{{backend: openai, model: m, zone: z, url: http://h/v1?key={SECRET}}}",
        "{backend: openai, model: m, zone: z, url: '${S}'}",
        "{backend: openai, model: m, zone: z, url: 'http://${S}@h/v1'}",
        "{backend: openai, model: m, zone: z, url: http://h/v1, api_key: '${S}'}",
        "{backend: litellm, model: '${S}', zone: z}",
        f"{{backend: litellm, model: m, zone: z, api_key: [{SECRET}]}}",
        f"{{backend: litellm, model: m, zone: z, api_key: {{a: {SECRET}}}}}",
        f"{{backend: litellm, model: m, zone: z, api_key: !x {SECRET}}}",
        f"{{backend: litellm, model: m, zone: z, api_key: *{SECRET}}}",
        f"{{backend: litellm, model: m, zone: z, apikey: {SECRET}}}",
    ],
)
def test_no_message_repeats_a_secret(x: str) -> None:
    """Neither one that stands in the file, where it should not, nor one from the environment."""
    found = problems(deployments=f"{DEPLOYMENTS}  x: {x}\n", env={"S": f"{SECRET} \t {SECRET}"})
    assert found
    assert SECRET not in "\n".join(found)


def test_a_loaded_policy_does_not_show_its_keys() -> None:
    policy = load(env={"OPENAI_API_KEY": SECRET})
    assert policy.deployments["cloud"].api_key == SECRET
    assert SECRET not in repr(policy)


def test_problems_of_both_files_come_at_once_in_the_files_order() -> None:
    found = problems(
        "version: 2\ndeployments: deployments.yaml\ndefault: {candidates: [lokal]}\n",
        DEPLOYMENTS.replace("version: 1", "version: 3").replace("zone: us_cloud, ", ""),
    )
    assert [line.split(" ")[0] for line in found] == [
        "etc/policy.yaml:1:10:",
        "etc/policy.yaml:3:24:",
        "etc/deployments.yaml:2:10:",
        "etc/deployments.yaml:5:3:",
    ]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            FileNotFoundError(2, "No such file or directory"),
            "etc/p.yaml: the file cannot be read: No such file or directory",
        ),
        (PermissionError(13, "Permission denied"), "etc/p.yaml: the file cannot be read: Permission denied"),
        (UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "x"), "etc/p.yaml: the file is not UTF-8 text: byte 1 is wrong"),
    ],
)
def test_a_policy_that_cannot_be_read_is_one_clear_line(error: Exception, message: str) -> None:
    def read(path: str) -> str:
        raise error

    with pytest.raises(PolicyErrors) as caught:
        compile_policy("etc/p.yaml", read=read, env={}, price_map=PRICES, detectors=DETECTORS)
    assert str(caught.value) == message


def test_a_file_that_is_too_large_is_not_looked_at() -> None:
    comment = "#" + "x" * 99 + "\n"
    fits = POLICY + comment * ((MAX_BYTES - len(POLICY)) // len(comment))
    assert problems(fits) == []
    too_large = ["etc/policy.yaml: the file is larger than 1,000,000 bytes"]
    assert problems(fits + comment) == too_large
    assert problems(fits + comment * 100_000) == too_large  # 10 MB


@pytest.mark.parametrize("mistakes", [MOST_PROBLEMS, MOST_PROBLEMS + 1, pytest.param(15_000, marks=pytest.mark.slow)])
def test_of_a_file_where_all_is_wrong_so_much_is_told(mistakes: int) -> None:
    """Each sentence takes its time, and nobody reads them all. Fifteen thousand of one rule's keys are as many."""
    rules = "".join(f"  - {{name: r{n}, when: {{tag: t{n}}}, candidates: [elsewhere]}}\n" for n in range(mistakes))
    keys = "".join(f"  elsewhere-{n}: 1\n" for n in range(mistakes))
    for text in (f"{POLICY}rules:\n{rules}", f"{POLICY}slo:\n{keys}"):
        told = problems(text)
        assert len(told) == min(mistakes, MOST_PROBLEMS + 1)
        cut = told[-1] == "etc/policy.yaml: more than 1,000 things are wrong, of which these are some"
        assert cut is (mistakes > MOST_PROBLEMS)


@pytest.mark.slow
def test_patterns_that_are_too_much_together_are_a_problem() -> None:
    """Each is right by itself."""
    patterns = {f"p{number}": rf"{number}\pL{{40}}" for number in range(200)}
    labels = {"own": {"any": [{"detects": list(patterns)}]}}
    written = yaml.safe_dump({"patterns": patterns, "labels": labels})
    (problem,) = problems(POLICY + written)
    assert problem.endswith(
        '"patterns": the patterns together need more memory than a scan has: make them shorter, or fewer'
    )


@pytest.mark.parametrize("text", ["[" * 500_000, "{a: " * 200_000, "- " * 400_000, "? " * 400_000])
def test_a_file_of_brackets_does_not_end_the_process(text: str) -> None:
    """PyYAML's own composer overflows the stack on some of these."""
    assert len(problems(text)) == 1


def test_a_rule_before_takes_no_protected_request_away() -> None:
    """A rule that a client enters by name is reached past the rules before it, so those do not count."""
    policy = """
version: 1
deployments: deployments.yaml
labels: {personal: {any: [{detects: email}]}}
invariants: [{name: stay home, when: {any_label: personal}, stay_in: on_premises}]
rules: [{name: private, when: {any_label: personal}, candidates: [local]}]
default: {candidates: [cloud]}
"""
    assert len(problems(policy)) == 1
    assert problems(policy.replace("[cloud]", "[cloud], protected: refuse")) == []


def test_the_benchmarks_policy_loads_and_none_of_its_rules_takes_its_request() -> None:
    """`python -m tests.bench.policy` says how long that takes."""
    policy = loading(500, 20)()
    assert len(policy.rules) == 500
    assert decide(policy, FACTS, fleet_of(policy)).rule == "default"


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("policy", [POLICY, POLICY.replace("local", "lokal"), "["])
def test_loading_leaves_the_search_for_garbage_as_it_found_it(policy: str, collects: bool) -> None:
    """It is paused meanwhile; on or off, and whatever becomes of the files."""
    seen = []

    def read(path: str) -> str:
        seen.append(gc.isenabled())
        return DEPLOYMENTS if path.endswith("deployments.yaml") else policy

    before = gc.isenabled()
    try:
        gc.enable() if collects else gc.disable()
        with suppress(PolicyErrors):
            compile_policy("policy.yaml", read=read, env={}, price_map=PRICES, detectors=DETECTORS)
        assert gc.isenabled() is collects
        assert not any(seen)
    finally:
        gc.enable() if before else gc.disable()
