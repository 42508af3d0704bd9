"""`hybridgate policy explain` against a state that is given or live, and what `policy check` warns of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from gateway.advice import advice
from gateway.cli import main
from gateway.conditions import Match
from gateway.livestate import state_document, state_from
from gateway.policy import Invariant, Policy, Rule
from gateway.snapshot import DeploymentStatus, Snapshot
from tests.fakes import CLOUD, HOME, OTHER, policy, require

DEPLOYMENTS = """
version: 1
deployments:
  home: {backend: openai, url: "http://127.0.0.1:1/v1", model: m, zone: on_premises, context_window: 1000,
         cost: {usd_per_million_tokens: {input: 0.1, output: 0.2}}}
  cloud: {backend: openai, url: "${CLOUD_URL}", model: m, zone: us_cloud, context_window: 1000,
          cost: {usd_per_million_tokens: {input: 1, output: 2}}}
"""
POLICY = """
version: 1
deployments: deployments.yaml
labels: {personal: {any: [{key_tag: hr}]}}
invariants: [{name: stay, when: {any_label: personal}, stay_in: on_premises}]
rules:
  - {name: team, when: {header: {x-team: search}, tenant: acme}, candidates: [cloud, home]}
default: {candidates: [home, cloud], order_by: first_token}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "deployments.yaml").write_text(DEPLOYMENTS)
    (tmp_path / "p.yaml").write_text(POLICY)
    return tmp_path / "p.yaml"


def explained(path: Path, *flags: str) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["policy", "explain", str(path), "--json", *flags])
    assert done.exit_code == 0, done.output
    told: dict[str, Any] = orjson.loads(done.stdout)
    return told


def candidates(told: dict[str, Any]) -> list[str]:
    return [candidate["deployment"] for candidate in told["candidates"]]


def test_a_key_or_address_that_is_not_set_counts_unless_all_is_taken_as_configured(path: Path) -> None:
    assert candidates(explained(path)) == ["home"]
    assert candidates(explained(path, "--all-configured")) == ["home", "cloud"]


def test_the_state_of_a_file_counts(path: Path) -> None:
    state = path.with_name("state.yaml")
    state.write_text("deployments: {home: {first_token_p95: 800ms}, cloud: {first_token_p95: 100ms}}\n")
    told = explained(path, "--all-configured", "--state", str(state))
    assert candidates(told) == ["cloud", "home"] and told["candidates"][0]["first_token_p95_ms"] == 100.0
    assert candidates(explained(path, "--all-configured", "--state", str(state), "--down", "cloud")) == ["home"]
    state.write_text("unconfigured: [home]\n")
    assert candidates(explained(path, "--all-configured", "--state", str(state))) == ["cloud"]


def test_a_request_of_a_file_counts_and_flags_are_laid_over_it(path: Path) -> None:
    request = path.with_name("request.yaml")
    request.write_text("{text: hi, headers: {x-team: search}, key: {tenant: acme}}\n")
    assert explained(path, "--request", str(request))["rule"] == "team"
    told = explained(path, "--all-configured", "--request", str(request), "--key-tag", "hr")
    assert (told["rule"], told["labels"], candidates(told)) == ("team", ["personal"], ["home"])
    assert explained(path, "--header", "X-Team=search", "--tenant", "acme")["rule"] == "team"
    body = path.with_name("request.json")
    body.write_text('{"messages": [{"role": "user", "content": "hi"}], "model": "home"}')
    assert explained(path, "--request", str(body))["rule"] == "home"


@pytest.mark.parametrize(
    ("name", "text", "flag", "said"),
    [
        ("s.yaml", "down: [hom]\n", "--state", "--state: no such deployment: hom"),
        ("r.yaml", "txt: hi\n", "--request", 'r.yaml:1:1: unknown field "txt" (did you mean "text"?)'),
        ("s.yaml", "tme: now\ndraw: 2\n", "--state", '(did you mean "time"?) {folder}/s.yaml:2:7: "draw"'),
        ("s.yaml", "time: now\n", "--state", 's.yaml:1:7: "time" must be a time with its offset from UTC'),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_place(path: Path, name: str, text: str, flag: str, said: str) -> None:
    path.with_name(name).write_text(text)
    done = CliRunner().invoke(main, ["policy", "explain", str(path), flag, str(path.with_name(name))])
    assert done.exit_code in (1, 2) and said.format(folder=path.parent) in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--state", "nothing.yaml"], "--state: cannot read nothing.yaml"),
        (["--state", "http://127.0.0.1:9"], "give the address of its admin port"),
        (["--header", "x-team"], "--header must be NAME=VALUE"),
    ],
)
def test_a_mistake_in_a_flag_is_one_line(path: Path, flags: list[str], said: str) -> None:
    done = CliRunner().invoke(main, ["policy", "explain", str(path), *flags])
    assert done.exit_code == 2 and said in done.stderr.replace("\n", " ")


def test_a_live_state_comes_back_from_its_document() -> None:
    here = policy([replace(HOME, window=None), replace(CLOUD, unavailable="KEY is not set")])
    there = policy([replace(HOME, window=512), CLOUD])
    statuses = {"home": DeploymentStatus(busy=0.75, per_token_p95_ms=9.5), "cloud": DeploymentStatus(down="gone")}
    document = orjson.loads(orjson.dumps(state_document(there, Snapshot(5.0, 0.5, statuses, 1e9))))
    live = state_from(document)
    known, snapshot = live.in_policy(here)
    assert known.deployments["home"].window == 512 and known.deployments["cloud"].unavailable is None
    assert snapshot == Snapshot(0.0, 0.0, statuses, 1e9) and live.policy_hash == there.hash
    assert live.in_policy(policy([OTHER]))[1].deployments == {"other": DeploymentStatus()}


@pytest.mark.parametrize("document", [None, [], {}, {"policy": "x", "wall": 1, "deployments": {"a": {}}}])
def test_what_is_no_state_is_refused(document: Any) -> None:
    with pytest.raises(ValueError, match="no state of a gateway"):
        state_from(document)


UNPRICED = replace(OTHER, price=None)


@pytest.mark.parametrize(
    ("checked", "said"),
    [
        (policy(invariants=()), 'label "personal" protects nothing'),
        (policy(invariants=()), "there is no invariant"),
        (policy(invariants=[Invariant("x", frozenset({"personal"}), frozenset({"on_premises"}))]), '"unscannable"'),
        (policy([CLOUD, OTHER]), 'invariant "private stays home": no deployment is in on_premises'),
        (
            policy([HOME, UNPRICED], order_by="marginal_cost"),
            "default compares costs, and nobody knows what other costs",
        ),
        (policy([HOME, UNPRICED], require=require(cost_nusd=1)), "nobody knows what other costs"),
        (policy(rules=[Rule("r", Match(stream=True), ("cloud",))], default=["home"]), "deployment other is no rule's"),
        (policy([replace(HOME, unavailable="X is not set")]), "default: none of its candidates is configured here"),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(checked: Policy, said: str) -> None:
    assert any(said in sentence for sentence in advice(checked)), advice(checked)


def test_a_policy_without_a_flaw_has_no_warning() -> None:
    assert advice(policy(order_by="marginal_cost")) == []


def test_check_prints_warnings_and_passes(path: Path) -> None:
    done = CliRunner().invoke(main, ["policy", "check", str(path)])
    assert done.exit_code == 0 and 'warning: no invariant names "unscannable"' in done.stdout.replace("\n", " ")
    told = orjson.loads(CliRunner().invoke(main, ["policy", "check", str(path), "--json"]).stdout)
    assert len(told["warnings"]) == 1
