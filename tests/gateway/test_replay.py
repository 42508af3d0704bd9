"""A log through another policy: what would have changed, in which direction, and what cannot be known."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from gateway.cli import main
from gateway.conditions import Match
from gateway.policy import Rule
from gateway.record import recorded
from gateway.replay import Replayed, Sums, replayed
from gateway.replaylog import Skipped, records
from gateway.types import Price
from tests.fakes import CLOUD, HOME, OTHER, policy

LINE: dict[str, Any] = {
    "event": "request",
    "decision": "0f",
    "status": 200,
    "outcome": "ok",
    "total_ms": 12.5,
    "policy": "abc",
    "rule": "default",
    "candidates": ["home", "cloud"],
    "rejected": {},
    "facts": {"model": "auto", "prompt": [40, 10]},
    "draw": 0.25,
    "wall": 1700000000.0,
    "fleet": {"cloud": {"first_token_p95_ms": 300.0}},
    "deployment": "home",
    "zone": "on_premises",
    "prompt_tokens": 10,
    "completion_tokens": 20,
    "cost_usd": "0.0000018",  # 10 * 20 + 20 * 80 nusd, as HOME has it
    "predicted": {"first_token_ms": 40.0},
}
PINNED = policy(default=["cloud", "other", "home"])


def again(by: Any = PINNED, /, **changed: Any) -> Replayed:
    record = recorded(LINE | changed)
    assert record is not None
    return replayed(record, by)


def test_a_request_goes_where_the_other_policy_says_and_costs_what_its_tokens_cost_there() -> None:
    one = again()
    assert one.changed and (one.before.deployment, one.after.deployment) == ("home", "cloud")
    assert (one.before.cost_nusd, one.after.cost_nusd) == (1_800, 10 * 150 + 20 * 600)
    assert (one.before.first_token_ms, one.after.first_token_ms) == (40.0, 300.0)
    assert one.after.rule == "default" and one.before.at_home and not one.after.at_home


def test_the_same_policy_changes_nothing() -> None:
    one = again(policy(order_by="listed"))
    assert not one.changed and one.after.cost_nusd == one.before.cost_nusd


def test_what_was_cached_counts_where_it_was_cached_alone() -> None:
    price = Price(20.0, 80.0, cached_input=2.0)
    by = policy([replace(HOME, price=price), replace(CLOUD, price=price), OTHER])
    line = {"cached_tokens": 10}
    assert again(by, **line).after.cost_nusd == 10 * 2 + 20 * 80
    by = policy([replace(HOME, price=price), replace(CLOUD, price=price), OTHER], default=["cloud"])
    assert again(by, **line).after.cost_nusd == 10 * 20 + 20 * 80


@pytest.mark.parametrize(
    ("changed", "destination"),
    [
        ({"failed": {"cloud": "reset"}}, "other"),
        ({"failed": {"cloud": "reset", "other": "reset", "home": "reset"}}, "refused: 503 no_deployment_available"),
        ({"fleet": {"cloud": {"down": "circuit open"}}}, "other"),
        ({"rejected": {"cloud": "unconfigured"}}, "other"),
        ({"facts": {"model": "auto", "prompt": [40, 10], "labels": ["personal"]}}, "home"),
        ({"facts": {"model": "auto", "prompt": [4000, 1000]}}, "refused: 400 context_length_exceeded"),
        ({"facts": {"model": "gone", "prompt": [40, 10]}}, "refused: 404 model_not_found"),
        ({"facts": {"model": "auto", "prompt": [40, 10], "slo": "gone"}}, "refused: 400 invalid_value"),
        ({"facts": {"model": "auto", "prompt": [40, 10], "max_cost_nusd": 1}}, "refused: 402 cost_cap_exceeded"),
        ({"facts": {"model": "home", "prompt": [40, 10]}}, "home"),
    ],
)
def test_what_was_known_of_the_request_and_the_fleet_counts(changed: dict[str, Any], destination: str) -> None:
    assert again(**changed).after.destination == destination


def test_chance_and_time_are_those_of_the_log() -> None:
    by = policy(default=["cloud", "home"], weights={"cloud": 1.0, "home": 1.0})
    assert (again(by, draw=0.1).after.deployment, again(by, draw=0.9).after.deployment) == ("cloud", "home")


def test_a_request_that_was_refused_may_be_answered_and_the_other_way_round() -> None:
    gone = {"deployment": None, "status": 503, "outcome": "no_deployment_available"}
    line = {key: value for key, value in (LINE | gone).items() if key not in ("deployment", "zone", "cost_usd")}
    record = recorded(line)
    assert record is not None
    one = replayed(record, PINNED)
    assert (one.before.destination, one.after.destination) == ("refused: 503 no_deployment_available", "cloud")
    assert one.before.cost_nusd is None


def test_sums_tell_shares_costs_and_labelled_requests_that_leave() -> None:
    sums = Sums(most_examples=1)
    by = policy(default=["cloud"], invariants=())
    lines = [LINE, LINE | {"facts": {"model": "auto", "prompt": [40, 10], "labels": ["personal", "odd"]}}]
    lines.append({key: value for key, value in LINE.items() if key != "cost_usd"})
    for line in lines:
        record = recorded(line)
        assert record is not None
        sums.add(record, replayed(record, by), frozenset({"personal"}))
    assert (sums.requests, sums.changed, len(sums.examples)) == (3, 3, 1)
    assert (sums.before.local_share, sums.after.local_share) == (1.0, 0.0)
    assert (sums.before.labelled_away, sums.after.labelled_away) == (0, 1)
    assert sums.unknown_labels == {"odd": 1} and sums.policies == {"abc": 3}
    assert sums.whole.costed == 2 and sums.cost_increase == pytest.approx(13_500 / 1_800 - 1)
    assert list(sums.flows) == [("home", "cloud")]


# From files.


def lines(*changed: dict[str, Any]) -> bytes:
    return b"".join(orjson.dumps(LINE | one) + b"\n" for one in changed)


def test_plain_and_compressed_logs_are_read_and_what_is_no_record_is_counted(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(
        lines({}, {"event": "engine"}) + b"\n[1]\nTraceback (most recent call last):\n" + lines({"facts": {"x": 1}}, {})
    )
    (tmp_path / "log.1.gz").write_bytes(gzip.compress(lines({}, {}, {})))
    (tmp_path / "log.2.gz").write_bytes(gzip.compress(lines(*[{}] * 500))[:-20])
    skipped = Skipped()
    found = list(records([str(tmp_path / name) for name in ("log", "log.1.gz", "log.2.gz")], skipped))
    assert len(found) >= 5 and (skipped.others, skipped.unreadable) == (2, 3)
    assert skipped.first == f"{tmp_path}/log:5: this is not JSON"


POLICY = """
version: 1
deployments: deployments.yaml
slo: {fast: {first_token_p95: 100ms}}
default: {candidates: [CANDIDATES]}
"""
DEPLOYMENTS = """
version: 1
deployments:
  home: {backend: local, model: demo, zone: on_premises, cost: {usd_per_million_tokens: {input: 0.02, output: 0.08}}}
  cloud: {backend: openai, url: "${CLOUD_URL}", model: m, zone: us_cloud, context_window: 1000,
          cost: {usd_per_million_tokens: {input: 0.15, output: 0.6}}}
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "deployments.yaml").write_text(DEPLOYMENTS)
    (tmp_path / "same.yaml").write_text(POLICY.replace("CANDIDATES", "home, cloud"))
    (tmp_path / "other.yaml").write_text(POLICY.replace("CANDIDATES", "cloud, home"))
    (tmp_path / "log").write_bytes(lines({}, {"event": "engine"}, {"decision": "1f"}))
    return tmp_path / "log"


def invoke(log: Path, by: str, *flags: str) -> Any:
    return CliRunner().invoke(main, ["policy", "replay", str(log), "--policy", str(log.with_name(by)), *flags])


@pytest.mark.parametrize(
    ("by", "flags", "status", "said"),
    [
        ("same.yaml", ["--fail-on-change", "--max-cost-increase", "0%"], 0, "0 of 2 would have gone elsewhere"),
        ("other.yaml", [], 0, "2 of 2 would have gone elsewhere"),
        ("other.yaml", ["--fail-on-change"], 1, "failed: 2 of 2 requests would have gone elsewhere"),
        ("other.yaml", ["--max-cost-increase", "5%"], 1, "failed: costs would have grown by 650.0%, above 5.0%"),
        ("other.yaml", ["--max-cost-increase", "700 %"], 0, "(+650.0%)"),
        ("other.yaml", ["--window", "cloud=30"], 0, "0 of 2 would have gone elsewhere"),
    ],
)
def test_the_command_tells_what_changes_and_says_so_to_ci(
    log: Path, by: str, flags: list[str], status: int, said: str
) -> None:
    done = invoke(log, by, *flags)
    assert done.exit_code == status and said in done.stdout, done.output
    assert "not replayed: 1 lines that record no decision, 0 unreadable" in done.stdout


def test_the_document_has_all_of_it(log: Path) -> None:
    done = invoke(log, "other.yaml", "--json", "--fail-on-change")
    told = orjson.loads(done.stdout)
    assert done.exit_code == 1 and told["ok"] is False and told["changed"] == 2
    assert (told["before"]["local_share"], told["after"]["local_share"]) == (1.0, 0.0)
    assert told["flows"][0] | {"requests": 2} == told["flows"][0] and told["examples"][1]["decision"] == "1f"
    assert told["cost"]["increase"] == pytest.approx(6.5) and told["first_token_p95_ms"]["after_mean"] == 300.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.log", "--policy", "default"], "cannot read nothing.log"),
        (["/dev/null", "--policy", "default"], "no record of a decision in /dev/null"),
        (["/dev/null", "--policy", "default", "--max-cost-increase", "some"], "must be a percentage, such as 5%"),
        (["/dev/null", "--policy", "default", "--window", "local"], "--window must be NAME=TOKENS"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(main, ["policy", "replay", *arguments])
    assert done.exit_code == 2 and said in done.stderr.replace("\n", " ")


def test_rules_of_the_other_policy_look_at_the_facts_of_the_log() -> None:
    rule = Rule("streams", Match(stream=True), ("other",))
    facts = {"model": "auto", "prompt": [40, 10], "is": ["stream"]}
    assert again(policy(rules=[rule]), facts=facts).after.rule == "streams"
