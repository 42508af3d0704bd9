"""`hybridgate policy simulate` and `diff`: tables, JSON, pictures, exit codes, and mistakes with their fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gateway.cli import main

DEPLOYMENTS = """version: 1
deployments:
  local:
    backend: local
    model: demo
    zone: on_premises
    context_window: 1024
    cost: {usd_per_million_tokens: {input: 0.02, output: 0.08}}
  cloud:
    backend: litellm
    model: openai/gpt-4o-mini
    api_key: ${NOT_SET_ANYWHERE}
    zone: us_cloud
"""
POLICY = """version: 1
deployments: deployments.yaml
labels:
  personal: {any: [{detects: [email]}]}
invariants:
  - {name: stays home, when: {any_label: [personal]}, stay_in: [on_premises]}
slo:
  quick: {first_token_p95: 600ms}
  patient: {first_token_p95: 5s}
default:
  candidates: [local, cloud]
  order_by: marginal_cost
"""
DRAWN = "poisson,rate=4,seconds=30,prompt=150,output=20,seed=1"


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    (tmp_path / "deployments.yaml").write_text(DEPLOYMENTS)
    (tmp_path / "a.yaml").write_text(POLICY)
    (tmp_path / "b.yaml").write_text(
        POLICY.replace("[local, cloud]", "[cloud, local]").replace("marginal_cost", "listed")
    )
    return tmp_path


def run(command: str, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["policy", command, *map(str, arguments)], env={"COLUMNS": "140"})


def document(command: str, *arguments: object) -> dict[str, Any]:
    result = run(command, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def test_a_policy_is_simulated_beside_baselines_and_the_bound(policies: Path) -> None:
    shown = run("simulate", policies / "a.yaml", "--synthetic", DRAWN, "--private", 0.3, "--baselines", "--bound")
    assert shown.exit_code == 0, shown.stderr
    for part in (
        "a.yaml",
        "always local",
        "always cloud",
        "round robin",
        "threshold",
        "lower bound",
        "quick",
        "patient",
    ):
        assert part in shown.stdout
    assert "0 private requests were sent where no invariant lets them" in shown.stdout


def test_the_same_as_json(policies: Path) -> None:
    told = document(
        "simulate",
        policies / "a.yaml",
        "--synthetic",
        DRAWN,
        "--private",
        0.3,
        "--local-share",
        0.5,
        "--baselines",
        "--bound",
    )
    own, *others = told["routers"]
    assert own["kind"] == "policy" and own["privacy_violations"] == 0
    assert own["requests"] == sum(own["by_deployment"].values()) + own["refused"]
    assert own["cost_usd"] >= told["bound"]["cost_usd"] * (1 - 1e-6) or own["attainment"] < told["bound"]["attainment"]
    assert own["cost_over_bound_at_own_attainment"] >= 1 - 1e-6
    assert len([o for o in others if o["router"].startswith("threshold")]) == 9
    assert "carries" not in told["simulated"] and told["simulated"]["local share"] == 0.5


def test_the_same_words_give_the_same_numbers(policies: Path) -> None:
    arguments = (policies / "a.yaml", "--synthetic", "bursty,rate=4,seconds=20", "--private", 0.2, "--seed", 4)
    assert document("simulate", *arguments) == document("simulate", *arguments)


def test_several_policies_meet_the_same_world(policies: Path) -> None:
    told = document("simulate", policies / "a.yaml", policies / "b.yaml", "--synthetic", DRAWN)
    a, b = told["routers"]
    assert a["local_share"] > b["local_share"] == 0.0
    assert a["cost_usd"] < b["cost_usd"]


def test_a_trace_file_and_its_columns(policies: Path) -> None:
    trace = policies / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens,slo,labels\n0,100,5,quick,personal\n1,100,5,patient,\n")
    told = document("simulate", policies / "b.yaml", "--trace", trace)
    assert told["routers"][0]["by_deployment"] == {"cloud": 1, "local": 1}


def test_a_picture_and_markdown(policies: Path) -> None:
    files = [policies / "out.svg", policies / "out.png", policies / "out.md"]
    made = run(
        "simulate", policies / "a.yaml", "--synthetic", DRAWN, "--baselines", "--bound",
        "--picture", files[0], "--picture", files[1], "--markdown", files[2],
    )  # fmt: skip
    assert made.exit_code == 0, made.stderr
    assert "lower bound" in files[0].read_text() and files[1].read_bytes().startswith(b"\x89PNG")
    assert "| lower bound |" in files[2].read_text()


def test_limits_of_classes_can_be_tried(policies: Path) -> None:
    arguments = (policies / "b.yaml", "--synthetic", DRAWN, "--class", "quick=1")
    strict = document("simulate", *arguments, "--slo", "quick=200ms")["routers"][0]
    lax = document("simulate", *arguments, "--slo", "quick=10s")["routers"][0]
    assert strict["attainment"] < 0.5 < lax["attainment"] == 1.0


def test_a_local_share_is_reached_by_slower_engines_or_by_faster_arrivals(policies: Path) -> None:
    arguments = (policies / "a.yaml", "--synthetic", DRAWN, "--local-share", 0.5)
    by_engine, by_load = document("simulate", *arguments), document("simulate", *arguments, "--by-load")
    assert "times as long" in by_engine["simulated"]["engines"]["local"]
    assert "times as long" not in by_load["simulated"]["engines"]["local"]
    assert by_load["simulated"]["seconds"] < by_engine["simulated"]["seconds"]


def test_a_diff_says_what_goes_elsewhere(policies: Path) -> None:
    arguments = (policies / "a.yaml", policies / "b.yaml", "--synthetic", DRAWN, "--private", 0.2)
    told = document("diff", *arguments)
    assert told["moved"] == sum(move["requests"] for move in told["moves"]) > 0
    assert {(move["from"], move["to"]) for move in told["moves"]} == {("local", "cloud")}
    assert told["before"]["cost_usd"] < told["after"]["cost_usd"]
    shown = run("diff", *arguments, "--exit-code")
    assert shown.exit_code == 1 and "requests go elsewhere" in shown.stdout
    same = run("diff", policies / "a.yaml", policies / "a.yaml", "--synthetic", DRAWN, "--exit-code")
    assert same.exit_code == 0 and "0 of" in same.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a trace with --trace FILE, or have one drawn with --synthetic"),
        (["--trace", "x", "--synthetic", DRAWN], "not both"),
        (["--trace", "nowhere.csv"], "nowhere.csv: cannot be read (No such file or directory)"),
        (["--synthetic", "regular"], "synthetic: begins with poisson or bursty"),
        (["--synthetic", DRAWN, "--class", "quick"], "--class: write NAME=SHARE"),
        (["--synthetic", DRAWN, "--class", "slow=0.5"], 'the policy has no latency class "slow"'),
        (["--synthetic", DRAWN, "--slo", "slow=1s"], "has no latency class slow; it has quick, patient"),
        (["--synthetic", DRAWN, "--slo", "quick=1"], "--slo: quick must have a duration with its unit"),
        (["--synthetic", DRAWN, "--engine", "demo@nothing"], "the catalog has no hardware"),
        (["--synthetic", DRAWN, "--engine", "engine.json"], "engine.json: cannot be read"),
        (["--synthetic", DRAWN, "--fleet", "fleet.yaml"], "fleet.yaml: cannot be read"),
        (["--synthetic", DRAWN, "--picture", "out.jpg"], "out.jpg is no picture"),
        (["--synthetic", DRAWN, "--private", "0.5", "--private-label", "secret"], 'no label "secret"'),
    ],
)
def test_a_mistake_is_one_line_with_its_fix(arguments: list[str], message: str, policies: Path) -> None:
    result = run("simulate", policies / "a.yaml", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")


def test_a_missing_column_names_the_file_the_line_and_the_columns(policies: Path) -> None:
    trace = policies / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,5\n")
    result = run("simulate", policies / "a.yaml", "--trace", trace)
    assert result.exit_code == 2
    assert f'{trace}:1: column "GeneratedTokens" is missing; found: TIMESTAMP, ContextTokens' in result.stderr
