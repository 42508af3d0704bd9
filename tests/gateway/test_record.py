"""Decision records: what was decided from comes back as it was, so that a log can be decided again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.record import Recorded, facts_from_record, facts_to_record, fleet_from, recorded, status_to_record
from gateway.snapshot import Backlog, DeploymentStatus
from gateway.types import RequestFacts, TokenCount

_words = st.sets(st.sampled_from(["a", "b", "c"])).map(frozenset)
_facts = st.builds(
    RequestFacts,
    model=st.sampled_from(["auto", "x"]),
    tenant=st.sampled_from(["default", "acme"]),
    key_tags=_words,
    tags=_words,
    labels=_words,
    masked_labels=st.none() | _words,
    prompt=st.builds(
        TokenCount,
        st.integers(0, 10**6),
        st.integers(0, 10**6),
        st.dictionaries(st.sampled_from(["deployment:a", "tiktoken:b"]), st.integers(0, 10**6)),
    ),
    max_tokens=st.none() | st.integers(1, 10**6),
    stream=st.booleans(),
    tools=st.booleans(),
    images=st.booleans(),
    schema=st.booleans(),
    n=st.integers(1, 9),
    slo=st.sampled_from([None, "fast"]),
    max_cost_nusd=st.none() | st.integers(1, 10**12),
    deployments=st.none() | _words,
    key_id=st.sampled_from(["anonymous", "k1"]),
    headers=st.sets(st.tuples(st.sampled_from(["x-a", "x-b"]), st.sampled_from(["1", "2"]))).map(frozenset),
    likely_output=st.none() | st.integers(1, 9999),
)


@given(_facts)
def test_facts_come_back_as_they_were(facts: RequestFacts) -> None:
    assert facts_from_record(orjson.loads(orjson.dumps(facts_to_record(facts)))) == facts


BACKLOG = Backlog(
    at=100.0,
    good_until=101.0,
    tokens=512.0,
    prefill_tokens_per_s=8000.0,
    step_s=0.02,
    sequences=2.0,
    running=7,
    hold_s=3.5,
    free_blocks=90.0,
    used_blocks=10.0,
    block_size=32,
    free_places=4.0,
    ahead=((0, 0.25), (3, 1.0)),
    margins=(1.5, 1.25, 1.0, 2.0, 1.0),
    margins_by_priority={0: (1.5, 1.25, 1.0, 1.0, 1.0), 3: (4.0, 3.0, 2.5, 2.0, 1.5)},
    token_s=0.003,
    cached_token_s=1e-07,
    step_tokens=512,
)


@pytest.mark.parametrize(
    "status",
    [
        DeploymentStatus(down="circuit open", circuit="open"),
        DeploymentStatus(
            first_token_p95_ms=80.0, first_token_p95_ms_by_size=(50.0, 60.0), per_token_p95_ms=9.5, busy=0.25
        ),
        DeploymentStatus(
            backlog=BACKLOG, engine_second_nusd=1500.0, dearest_nusd=9000.0, rooms=((0, 1.0, True), (3, 10.0, False))
        ),
        DeploymentStatus(backlog=replace(BACKLOG, free_blocks=float("inf"), free_places=float("inf"))),
    ],
)
def test_what_was_known_of_a_deployment_comes_back_at_the_time_0(status: DeploymentStatus) -> None:
    written = orjson.loads(orjson.dumps({"d": status_to_record(status, 100.5)}))
    backlog = status.backlog
    expected = replace(status, backlog=None if backlog is None else replace(backlog, at=-0.5, good_until=float("inf")))
    assert fleet_from(written) == {"d": expected}


def test_a_record_of_before_does_not_say_who_has_no_other_place() -> None:
    assert fleet_from({"d": {"rooms": [[0, 1.0], [3, 10.0]]}})["d"].rooms == ((0, 1.0, False), (3, 10.0, False))


def test_nothing_is_written_where_nothing_is_known_or_it_is_too_old() -> None:
    assert status_to_record(DeploymentStatus(in_flight=3), 0.0) == {}
    assert status_to_record(DeploymentStatus(backlog=BACKLOG), 102.0) == {}


LINE: dict[str, Any] = {
    "event": "request",
    "decision": "0f",
    "status": 200,
    "outcome": "ok",
    "total_ms": 12.5,
    "policy": "abc",
    "rule": "default",
    "candidates": ["a", "b"],
    "facts": {"model": "auto", "prompt": [40, 10]},
    "draw": 0.25,
    "wall": 1700000000.0,
    "fleet": {"b": {"busy": 0.5}},
    "deployment": "a",
    "zone": "us_cloud",
    "prompt_tokens": 9,
    "completion_tokens": 3,
    "cost_usd": "0.0000015",
}


def test_a_line_is_read_with_what_came_of_it() -> None:
    record = recorded(LINE)
    assert isinstance(record, Recorded)
    assert (record.facts.prompt.bound, record.snapshot.draw, record.cost_nusd) == (40, 0.25, 1500)
    assert record.candidates == ("a", "b") and record.snapshot.deployments["b"].busy == 0.5
    more = {"failed": {"c": "reset"}, "rejected": {"d": "zone"}, "predicted": {"first_token_ms": 80.5}, "masked": 2}
    record = recorded(LINE | more)
    assert record is not None and (record.failed, record.rejected) == (frozenset({"c"}), {"d": "zone"})
    assert (record.predicted_first_token_ms, record.masked, record.status) == (80.5, True, 200)


@pytest.mark.parametrize("line", [{"event": "engine", "state": "up"}, {"event": "request", "status": 404}, {}])
def test_other_lines_of_a_log_are_no_records(line: dict[str, Any]) -> None:
    assert recorded(line) is None


@pytest.mark.parametrize(
    "broken",
    [
        {"facts": {"prompt": [1, 1]}},
        {"facts": {"model": "auto", "prompt": 3}},
        {"facts": []},
        {"fleet": {"b": {"circuit": "ajar"}}},
        {"fleet": {"b": {"backlog": {}}}},
        {"cost_usd": "much"},
    ],
)
def test_a_record_that_cannot_be_read_says_so(broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        recorded(LINE | broken)
