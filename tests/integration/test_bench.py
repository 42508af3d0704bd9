"""The benchmark's harness: its table is complete, and a wrong answer is an error, never throughput."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.bench import load, report, wire
from tests.bench.__main__ import bench
from tests.bench.measure import Measurement, Plan, Scenario, Visit, answers_rightly, quantile
from tests.bench.program import BenchError, Launch, cores, free_port, running
from tests.bench.targets import Missing, upstream_launch, write_policy

SHORT = Plan(
    seconds=0.15,
    slow_seconds=0.15,
    warm_seconds=0.02,
    rounds=1,
    scenarios=(
        Scenario("requests_64", "plain", 8, for_rate=True),
        Scenario("requests_1", "plain", 1),
        Scenario("streams_32", "stream", 4, for_rate=True),
        Scenario("paced_100", "stream", 4, "[pace 1 ms]"),
    ),
)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[load.Address]:
    address = load.Address(free_port())
    log = tmp_path_factory.mktemp("bench") / "upstream.log"
    with running("upstream", upstream_launch(address.port), cores()[1], log, partial(answers_rightly, address)):
        yield address


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return bench(["direct", "pass-through"], SHORT, tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("target", ["direct", "pass-through"])
@pytest.mark.parametrize("scenario", [scenario.name for scenario in SHORT.scenarios])
def test_every_target_answers_rightly_in_every_scenario(measured: dict[str, Any], target: str, scenario: str) -> None:
    """Every figure is there, and no answer was wrong."""
    summary = measured["targets"][target]
    assert summary["failures"] == ()
    assert summary["errors"][scenario] == {}
    figures = summary["scenarios"][scenario]
    wanted = ("per_second", "cpu_ms", "p50_ms", "p99_ms", "first_p50_ms", "added_p50_ms", "added_first_p99_ms")
    assert all(figures[name] is not None for name in wanted)
    assert figures["first_p50_ms"] <= figures["p50_ms"] <= figures["p99_ms"]


def test_paced_streams_take_the_time_that_they_were_asked_to_take(measured: dict[str, Any]) -> None:
    """49 pauses of a millisecond lie between the request and the last word."""
    assert measured["targets"]["direct"]["scenarios"]["paced_100"]["p50_ms"] >= 45


def test_the_table_names_each_target_and_each_goal(measured: dict[str, Any]) -> None:
    """A goal that could not be measured is shown as such."""
    table = report.markdown(measured)
    assert "| fake upstream, directly |" in table
    assert "| bare Starlette + aiohttp |" in table
    assert table.count("not measured") == len(report.GOALS)


@pytest.mark.parametrize(
    ("kind", "marker", "error"),
    [
        ("plain", "[fail]", "status 500"),
        ("stream", "[fail]", "status 500"),
        ("plain", "[garble]", "wrong body"),
        ("stream", "[cut]", "connection lost"),
    ],
)
def test_a_wrong_answer_is_an_error_and_no_throughput(
    upstream: load.Address, kind: wire.Kind, marker: str, error: str
) -> None:
    """Errors are counted by kind; nothing of them reaches the rate or the latencies."""
    tally = load.run(upstream, load.Load(kind, wire.request_body(kind, marker), 2, 0.1))
    assert tally.errors[error] > 0
    assert list(tally.errors) == [error]
    assert (tally.in_time, tally.latencies, tally.first_tokens) == (0, [], [])


def test_a_server_that_is_not_there_is_an_error() -> None:
    """A refused connection is counted."""
    tally = load.run(load.Address(free_port()), load.Load("plain", wire.request_body("plain"), 1, 0.2))
    assert tally.errors["cannot connect"] > 0
    assert tally.latencies == []


def test_a_server_that_ends_while_starting_is_reported_with_its_last_words(tmp_path: Path) -> None:
    """The reason stands in the error, not only in a log file."""
    launch = Launch(("/bin/sh", "-c", "echo out of cheese; exit 3"), {})
    address = load.Address(free_port())
    with (
        pytest.raises(BenchError, match="out of cheese"),
        running("it", launch, cores()[0], tmp_path / "it.log", partial(answers_rightly, address)),
    ):
        pass


def test_the_bytes_have_the_sizes_that_the_documentation_names() -> None:
    """330 bytes to ask, 633 to answer, with or without a marker."""
    assert {
        len(wire.request_body(kind, marker)) for kind in ("plain", "stream") for marker in ("", "[pace 20 ms]")
    } == {330}
    assert len(wire.answer_body()) == 633
    assert wire.said("plain", wire.answer_body()) == wire.Said(wire.TEXT, 50, True)


@pytest.mark.parametrize(("include_usage", "tokens"), [(False, None), (True, 50)])
def test_a_stream_is_in_openai_format(include_usage: bool, tokens: int | None) -> None:
    """50 words in order, usage only where it was asked for, `[DONE]` last."""
    body = b"".join(wire.stream_events(include_usage))
    assert wire.said("stream", body) == wire.Said(wire.TEXT, tokens, True)


_STREAM = b"".join(wire.stream_events(False))


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (wire.http_chunk(_STREAM) + wire.CHUNKED_END, None),
        # a word split by a chunk's boundary is still a word
        (wire.http_chunk(_STREAM[:200]) + wire.http_chunk(_STREAM[200:]) + wire.CHUNKED_END, None),
        (b"".join(wire.http_chunk(_STREAM[at : at + 3]) for at in range(0, len(_STREAM), 3)) + wire.CHUNKED_END, None),
        (wire.http_chunk(_STREAM.replace(b" tok07", b"")) + wire.CHUNKED_END, "wrong number of chunks"),
        (wire.http_chunk(_STREAM.replace(b"data: [DONE]\n\n", b"")) + wire.CHUNKED_END, "no [DONE]"),
        (b"zz\r\n" + _STREAM[:300], "broken chunked coding"),
    ],
)
def test_a_stream_is_judged_by_its_words_and_its_end(raw: bytes, fault: str | None) -> None:
    """However the bytes were cut into chunks on the way."""
    assert wire.fault("stream", 200, raw, chunked=True) == fault


@pytest.mark.parametrize(
    ("values", "part", "expected"),
    [
        ([], 0.5, None),
        ([7.0], 0.99, 7.0),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([4.0, 1.0, 2.0, 3.0], 0.5, 2.0),
        ([float(number) for number in range(1, 101)], 0.99, 99.0),
        ([1.0, 2.0], 1.0, 2.0),
    ],
)
def test_quantiles_are_by_nearest_rank(values: list[float], part: float, expected: float | None) -> None:
    """A quantile is one of the values."""
    assert quantile(values, part) == expected


def _visit(target: str, number: int, per_second: float, cpu_ms: float, errors: dict[str, int] | None = None) -> Visit:
    one = Measurement("requests_64", 10, errors or {}, per_second, cpu_ms, 1.0 + cpu_ms, 2.0, 1.0, 2.0, 0.9, 0.0)
    return Visit(target, number, 1.0, 50.0, measurements=[one])


def test_figures_are_medians_over_rounds_and_ratios_are_medians_of_the_rounds_ratios() -> None:
    """One disturbed round out of three moves no figure, and one that is slow for both moves no ratio."""
    rates = {"hybridgate": [100.0, 900.0, 110.0], "pass-through": [200.0, 20.0, 220.0]}
    cpu_ms = {"hybridgate": 0.3, "pass-through": 0.15}
    visits = [_visit(name, number, rates[name][number], cpu_ms[name]) for number in range(3) for name in rates]
    document = report.document(visits, [], Plan(), {})
    assert document["targets"]["hybridgate"]["scenarios"]["requests_64"]["per_second"] == 110.0
    assert document["ratios"]["pass-through"]["requests_64.per_second"] == 0.5
    assert document["goals"][0] == {
        "goal": "CPU of a request, times the pass-through's",
        "wanted": "at most 2",
        "measured": 2.0,
        "met": True,
    }


@pytest.mark.parametrize(
    ("cpu_ms", "errors", "met"),
    [(0.3, {}, True), (0.31, {}, False), (0.1, {"status 500": 1}, False)],
)
def test_a_goal_is_met_only_within_its_bound_and_without_errors(
    cpu_ms: float, errors: dict[str, int], met: bool
) -> None:
    """Fast and wrong is not fast."""
    visits = [_visit("hybridgate", 1, 100.0, cpu_ms, errors), _visit("pass-through", 1, 100.0, 0.15)]
    assert report.judged(report.GOALS[0], visits, report.summarise(visits))["met"] is met


def test_latency_is_added_to_the_direct_one_of_the_same_round() -> None:
    """A round without a direct measurement adds to nothing, so it does not count."""
    visits = [_visit("direct", 1, 1.0, 0.5), _visit("hybridgate", 1, 1.0, 0.75), _visit("hybridgate", 2, 1.0, 99.0)]
    summary = report.summarise(visits)["hybridgate"]
    assert summary.scenarios["requests_64"]["added_p50_ms"] == 0.25


def test_what_could_not_be_measured_is_listed_with_its_reason() -> None:
    """Neither a peer that cannot be installed nor a target that failed in a round is left out silently."""
    failed = Visit("hybridgate", 1, failure="it did not start")
    missing = [Missing("litellm", "LiteLLM proxy", "pip install: no network")]
    machine = {"line": "a machine", "load_before": "0", "load_after": "0"}
    table = report.markdown(report.document([failed], missing, Plan(), machine))
    assert "LiteLLM proxy: not measured: pip install: no network" in table
    assert "Hybridgate: round 1: it did not start" in table


def test_the_policy_under_load_is_the_shipped_one_with_the_upstream_as_its_local_deployment(tmp_path: Path) -> None:
    """Only the deployment `local` is replaced."""
    policy = write_policy(tmp_path, "http://127.0.0.1:1")
    shipped = Path(__file__).parents[2] / "policies"
    assert policy.read_bytes() == (shipped / "default.yaml").read_bytes()
    ours, theirs = (
        yaml.safe_load((folder / "deployments.yaml").read_text())["deployments"] for folder in (tmp_path, shipped)
    )
    assert (ours["local"]["backend"], ours["local"]["url"]) == ("openai", "http://127.0.0.1:1/v1")
    assert {**ours, "local": None} == {**theirs, "local": None}
