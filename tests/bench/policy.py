"""`python -m tests.bench.policy`: what loading, deciding and labelling cost, in CPU time of one process.

Each figure is the median over several rounds, with the fastest beside it: on a machine that others use, the fastest is
nearer to what the code costs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

from gateway.cli import GC_THRESHOLDS
from gateway.keys import Key, Keyring, digest_of
from gateway.labels import KINDS, Scanner
from gateway.ledger import Hold, Limit, MemoryLedger, Reservation, Spent, days
from gateway.loading import load_policy
from gateway.policy import Policy
from gateway.policyfile import compile_policy
from gateway.routing import decide
from gateway.snapshot import DeploymentStatus, Snapshot
from gateway.types import Caller, RequestFacts, TokenCount

SHIPPED = Path(__file__).parents[2] / "policies" / "default.yaml"
KEYS = {
    "OPENAI_API_KEY": "k",
    "ANTHROPIC_API_KEY": "k",
    "MISTRAL_API_KEY": "k",
    "COHERE_API_KEY": "k",
    "ON_PREM_URL": "http://127.0.0.1:1/v1",
    "ON_PREM_MODEL": "m",
}
T = TypeVar("T")

NOW = 1_790_000_000.0
ROUNDS = 15
ROUND_SECONDS = 0.05
MOST_AT_ONCE = 10_000
PROSE = (
    "The quarterly report shows that revenue in the northern region grew by 4.2 % while costs stayed flat, "
    "so the team proposes to hire two engineers before March and to review version 3.11 of the plan. "
)
FACTS = RequestFacts(
    "auto", tenant="acme", tags=frozenset({"web"}), prompt=TokenCount(600, 120), max_tokens=200, slo="interactive"
)


@dataclass(frozen=True)
class Figure:
    """What one call costs, in microseconds of CPU. `goal` is what it may cost, None where nothing is asked."""

    name: str
    median_us: float
    fastest_us: float
    goal_us: float | None

    def line(self) -> str:
        goal = "" if self.goal_us is None else f"   goal {_told(self.goal_us)}"
        return f"{self.name:<44} {_told(self.median_us):>10}   fastest {_told(self.fastest_us):>10}{goal}"


def _told(us: float) -> str:
    return f"{us / 1000:.1f} ms" if us >= 1000 else f"{us:.1f} µs"


def measured(name: str, call: Callable[[], object], goal_us: float | None = None) -> Figure:
    """One call's CPU time: in each round the call is repeated for at least ROUND_SECONDS."""
    call()
    began = time.process_time()
    call()
    once = max(time.process_time() - began, 1e-7)
    repeats = max(1, min(MOST_AT_ONCE, int(ROUND_SECONDS / once)))
    rounds = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(repeats):
            call()
        rounds.append((time.process_time() - began) / repeats * 1e6)
    return Figure(name, median(rounds), min(rounds), goal_us)


def policy_text(rules: int, candidates: int) -> str:
    """A policy of so many rules, none of which matches FACTS: each looks at something else, as an organisation's do."""
    names = [f"d{n}" for n in range(candidates)]
    conditions = [
        "{{tenant: t{n}, stream: true}}",
        "{{slo: [realtime], tag: tag-{n}}}",
        "{{any_label: [personal, secret], tenant: [a{n}, b{n}]}}",
        "{{key_tag: team-{n}, tools: false}}",
        "{{does_not_fit: d1, tenant: t{n}}}",
        "{{prompt_tokens: {{at_least: {n}k, below: {n}.5k}}, model: [auto, rule*]}}",
        "{{header: {{x-team: team-{n}}}, max_tokens: {{below: 1k}}}}",
        "{{any: [{{tag: a{n}, stream: true}}, {{tenant: [b{n}, c{n}]}}], not: {{any_label: secret}}}}",
        "{{time: {{zone: Europe/Berlin, days: [sat-sun], from: '08:00', to: '18:00'}}, tag: night-{n}}}",
        "{{local_load: {{d0: {{at_least: 0.9}}}}, slo: interactive, key_tag: batch-{n}}}",
    ]
    lines = [
        "version: 1",
        "deployments: deployments.yaml",
        "labels:",
        "  personal: {any: [{detects: [email, phone, credit_card]}]}",
        "  secret: {any: [{detects: [api_key, private_key]}]}",
        "invariants:",
        "  - {name: home, when: {any_label: [personal, secret, unscannable]}, stay_in: on_premises}",
        "slo: {realtime: {first_token_p95: 50ms}, interactive: {first_token_p95: 100ms}}",
        "rules:",
    ]
    for n in range(rules):
        chosen = [names[0], *names[1 + n % 3 : 4 + n % 3]]
        lines += [
            f"  - name: rule {n}",
            f"    when: {conditions[n % len(conditions)].format(n=n)}",
            f"    candidates: [{', '.join(chosen)}]",
            "    require: {slo: met, cost_at_most: 0.01 USD}",
            "    order_by: marginal_cost",
        ]
    everything = f"[{', '.join(names)}]"
    lines.append(f"default: {{candidates: {everything}, require: {{slo: met}}, order_by: marginal_cost}}")
    return "\n".join(lines) + "\n"


def deployments_text(count: int) -> str:
    """So many deployments with a price and a window; the first is on premises."""
    lines = ["version: 1", "deployments:"]
    for n in range(count):
        zone = "on_premises" if n == 0 else "us_cloud"
        cost = f"{{usd_per_million_tokens: {{input: 0.{n + 10}, output: 0.{n + 20}}}}}"
        where = f"url: 'http://h{n}/v1', zone: {zone}, context_window: 8192"
        lines.append(f"  d{n}: {{backend: openai, model: m, {where}, load: vllm, cost: {cost}}}")
    return "\n".join(lines) + "\n"


def loading(rules: int, candidates: int) -> Callable[[], Policy]:
    """What loads such a policy; its text is there already."""
    files = {"policy.yaml": policy_text(rules, candidates), "deployments.yaml": deployments_text(candidates)}
    return partial(compile_policy, "policy.yaml", read=files.__getitem__, env={}, price_map={}, detectors=KINDS)


def fleet_of(policy: Policy) -> Snapshot:
    """All deployments up and measured."""
    statuses = {
        name: DeploymentStatus(first_token_p95_ms=20.0 + 7 * n, busy=0.1) for n, name in enumerate(policy.deployments)
    }
    return Snapshot(0.0, 0.5, statuses, wall=1_790_000_000.0)


def _shipped(environ: Mapping[str, str]) -> Policy:
    return load_policy(SHIPPED, environ)


def _keyring() -> Keyring:
    return Keyring(Key(digest_of(f"hg-{n}"), Caller("acme", f"key-{n}")) for n in range(1_000))


def _limits() -> list[Limit]:
    """Requests, tokens, slots and money of a key, tokens and money of its tenant; all far from full."""
    starts, plenty = days(UTC, NOW), 10**15
    return [
        Limit("key requests/min", "rolling", "requests", plenty),
        Limit("key tokens/min", "rolling", "tokens", plenty),
        Limit("key concurrent", "slots", "slots", 64),
        Limit("key usd/day", "period", "nusd", plenty, starts=starts),
        Limit("tenant tokens/min", "rolling", "tokens", plenty),
        Limit("tenant usd/day", "period", "nusd", plenty, starts=starts),
    ]


def _admitted(ledger: MemoryLedger, ring: Keyring, limits: list[Limit]) -> None:
    """What a request with a key costs before and after it is answered."""
    ring.caller_of({"authorization": "Bearer hg-500"}, NOW)
    holds = [Hold(limit, 1) for limit in limits]
    reservation = _done(ledger.reserve("r", holds, 30.0, NOW))
    assert isinstance(reservation, Reservation)
    assert _done(ledger.settle(reservation, Spent(120, 900), NOW))


def _done(work: Coroutine[object, None, T]) -> T:
    """The result of what never waits."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("it waits")


def figures() -> list[Figure]:
    """All figures, in the order of the table."""
    large, shipped = loading(50, 20)(), _shipped(KEYS)
    large_fleet, shipped_fleet = fleet_of(large), fleet_of(shipped)
    assert len(decide(large, FACTS, large_fleet).candidates) == 20, "no rule may match, so that all are tried"
    scanner = Scanner(shipped.kinds, shipped.patterns)
    short, long = [(PROSE * 20)[:2_000]], [(PROSE * 2000)[:200_000]]
    ledger, ring, limits = MemoryLedger(), _keyring(), _limits()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)  # as the server does, which loads a policy again when it changes
    return [
        measured("load 500 rules", loading(500, 20), 100_000),
        measured("load the default policy", lambda: _shipped(KEYS)),
        measured("decide, 50 rules and 20 candidates", lambda: decide(large, FACTS, large_fleet), 100),
        measured("decide, default policy", lambda: decide(shipped, FACTS, shipped_fleet), 20),
        measured("labels, 2 KB of prose", lambda: scanner.scan(short), 20),
        measured("labels, 200 KB of prose", lambda: scanner.scan(long), 1_000),
        measured("key, reserve 6 limits and settle, in memory", lambda: _admitted(ledger, ring, limits), 30),
    ]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.policy", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, in microseconds")
    options = parser.parse_args(arguments)
    found = figures()
    if options.json:
        print(json.dumps([vars(figure) for figure in found], indent=2))
        return
    for figure in found:
        print(figure.line())


if __name__ == "__main__":
    main(sys.argv[1:])
