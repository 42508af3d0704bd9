"""The command line: every mistake is one line that says what to do, and no traceback."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.cli import bound, bound_admin, main
from gateway.metrics import table
from gateway.settings import Settings


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--max-body-bytes", "-5"], "HYBRIDGATE_MAX_BODY_BYTES must be at least 1"),
        (["serve", "--drain-seconds", "nan"], "HYBRIDGATE_DRAIN_SECONDS must be"),
        (["serve", "--engine-start-seconds", "inf"], "HYBRIDGATE_ENGINE_START_SECONDS must be"),
        (["serve", "--host", "0.0.0.0"], "use --host 127.0.0.1"),
        (["serve", "--port", "0", "--admin-port", "-1", "--log", "/nonexistent/log"], "choose another with --log"),
        (["serve", "--port", "0", "--admin-host", "0.0.0.0"], "use --admin-host 127.0.0.1"),
        (["serve", "--port", "0", "--open-to-network", "--admin-host", "nowhere.invalid"], "check --admin-host"),
        (["key", "list"], "set HYBRIDGATE_KEYS"),
        (["key", "new", "a", "--file", "/nonexistent/keys"], "its directory must be writable"),
        (["key", "new", "a", "--file", "/nonexistent/keys", "--expires", "soon"], "or a number of days, such as 90d"),
        (["key", "new", "a", "--file", "/nonexistent/keys", "--admin", "--tag", "x"], "it takes --expires"),
        (["key", "revoke", "a", "--file", "/nonexistent/keys"], "its directory must be writable"),
        (["policy", "check", "hybird"], "there are cloud-only, cost-first, default, hybrid, latency-first, local-only"),
        (["policy", "explain", "--request", "/tmp/[/nope]"], "cannot read /tmp/[/nope]"),
        (["policy", "explain", "--slo", "[/x]"], "names no class of this policy"),
        (["policy", "explain", "--down", "[bold]x"], "no such deployment: [bold]x"),
        (["policy", "explain", "--text", "\udcff"], "UTF-8"),
        (["policy", "explain", "--max-tokens", "9" * 30], "--max-tokens"),
        (["policy", "explain", "--max-cost-usd", "inf"], "must be a positive number of dollars"),
        (["policy", "explain", "--data-class", "x"], "known are"),
        (["policy", "explain", "--model", "4111111111111111"], "GET /v1/models"),
    ],
)
def test_a_mistake_is_one_line_with_its_fix(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and said in result.stderr.replace("\n", " ")
    assert "4111" not in result.stderr and result.exception.__class__ is SystemExit


def test_a_policy_that_is_not_there_is_a_problem_with_its_place(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["policy", "check", str(tmp_path / "none.yaml")])
    assert result.exit_code == 1 and "none.yaml: the file cannot be read" in result.stderr


def test_a_metrics_port_in_use_is_told_with_the_ways_out(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(Exception, match="2"):
        bound_admin(Settings(admin_port=taken.getsockname()[1]))
    assert "choose another with --admin-port, or none with --admin-port -1" in capsys.readouterr().err


def test_a_policy_that_ships_is_found_by_its_name_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["policy", "check", "hybrid", "--json"])
    assert done.exit_code == 0 and '"ok":true' in done.stdout and "hybrid.yaml" in done.stdout
    monkeypatch.setenv("HYBRIDGATE_POLICY", "local-only")
    assert "local-only.yaml" in CliRunner().invoke(main, ["policy", "check"]).stdout
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "hybrid.yaml").write_text("version: 2\n")
    assert CliRunner().invoke(main, ["policy", "check", "hybrid"]).exit_code == 1, "one's own comes first"


def test_the_metrics_are_listed_as_they_are_documented() -> None:
    assert CliRunner().invoke(main, ["metrics"]).stdout == table() + "\n"


def test_of_two_gateways_on_one_port_the_second_is_told_before_anything_slow_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with bound(Settings(port=0)) as first:
        with pytest.raises(Exception, match="2"):
            bound(Settings(port=first.getsockname()[1]))
        with socket.create_connection(first.getsockname()[:2], timeout=5):
            pass  # it waits for the server to begin
    assert "choose another with --port" in capsys.readouterr().err


def test_a_checked_policy_says_what_its_deployments_cost() -> None:
    """What one more request costs, what the bill says, and what both consist of; in the table and as JSON."""
    said = CliRunner().invoke(main, ["policy", "check", "policies/default.yaml"]).stdout
    assert "local costs 0.06 USD an hour (stated); one more token: its busy seconds" in said.replace("\n", " ")
    told = json.loads(CliRunner().invoke(main, ["policy", "check", "policies/default.yaml", "--json"]).stdout)
    local, cloud = told["deployments"]["local"], told["deployments"]["gpt-4o-mini"]
    assert 0 < local["usd_per_million_tokens"]["output"] < local["bill_usd_per_million_tokens"]["output"]
    assert cloud["usd_per_million_tokens"] == cloud["bill_usd_per_million_tokens"] == {"input": 0.15, "output": 0.6}
    assert told["deployments"]["on-prem-large"]["unavailable"] == "ON_PREM_URL and ON_PREM_MODEL are not set"
