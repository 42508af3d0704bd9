"""The choice of a replica: the less busy of two, a conversation's own where that is not much busier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.balance import (
    HEADROOM,
    SEQUENCE_TOKENS,
    Affinity,
    Reading,
    choose,
    conversation_of,
    key_of,
    leads_on,
    two_of,
)
from gateway.errors import (
    ConnectFailed,
    ConnectionLost,
    GatewayError,
    UpstreamFailed,
    UpstreamOverloaded,
    UpstreamTimeout,
    UpstreamUnauthorized,
)

KEYS = [key_of(f"http://10.0.0.{number}:8000/v1") for number in range(8)]
IDLE = Reading(0, 0.0, 0.0, 1000.0)
BITS = st.integers(0, 2**64 - 1)
DRAWS = st.floats(0, 1, exclude_max=True)
KEY_LISTS = st.lists(BITS, min_size=2, max_size=9, unique=True)
READINGS = st.builds(
    Reading,
    st.integers(0, 50),
    st.none() | st.floats(0, 1e5),
    st.floats(0, 100),
    st.none() | st.floats(1, 1e5),
)
AFFINITIES = st.builds(Affinity, DRAWS, st.none() | BITS, st.integers(0, 10_000))


def chosen(readings: Sequence[Reading], affinity: Affinity, keys: Sequence[int] = KEYS) -> int:
    return choose(keys[: len(readings)], readings.__getitem__, affinity)


@given(st.data(), KEY_LISTS, AFFINITIES)
def test_the_choice_is_one_of_the_two_and_the_same_for_the_same_readings(
    data: st.DataObject, keys: list[int], affinity: Affinity
) -> None:
    readings = data.draw(st.lists(READINGS, min_size=len(keys), max_size=len(keys)))
    first, second = two_of(keys, affinity)
    assert first != second and min(first, second) >= 0 and max(first, second) < len(keys)
    assert chosen(readings, affinity, keys) in (first, second)
    assert chosen(readings, affinity, keys) == chosen(readings, affinity, keys)


@given(st.data(), KEY_LISTS, DRAWS)
def test_without_a_conversation_the_other_of_the_two_is_never_less_busy(
    data: st.DataObject, keys: list[int], draw: float
) -> None:
    tokens = data.draw(st.lists(st.floats(0, 1e6), min_size=len(keys), max_size=len(keys)))
    readings = [Reading(0, waiting, 0.0, 1000.0) for waiting in tokens]
    index = chosen(readings, Affinity(draw), keys)
    assert tokens[index] == min(tokens[one] for one in two_of(keys, Affinity(draw)))


@given(KEY_LISTS, BITS, st.tuples(DRAWS, DRAWS))
def test_where_all_are_alike_a_conversation_is_always_at_its_own(
    keys: list[int], conversation: int, draws: tuple[float, float]
) -> None:
    readings = [IDLE] * len(keys)
    assert len({chosen(readings, Affinity(draw, conversation), keys) for draw in draws}) == 1


@given(KEY_LISTS, BITS, st.data())
def test_a_replica_that_goes_moves_its_own_conversations_alone(
    keys: list[int], conversation: int, data: st.DataObject
) -> None:
    own = two_of(keys, Affinity(0.0, conversation))[0]
    gone = data.draw(st.sampled_from([key for key in keys if key != keys[own]]))
    left = [key for key in keys if key != gone]
    index = 0 if len(left) == 1 else two_of(left, Affinity(0.0, conversation))[0]
    assert left[index] == keys[own]


def test_conversations_are_shared_out_evenly() -> None:
    counts = Counter(two_of(KEYS, Affinity(0.0, key_of(str(number))))[0] for number in range(8000))
    assert len(counts) == 8 and all(850 < count < 1150 for count in counts.values()), counts


def test_draws_reach_every_pair() -> None:
    pairs = Counter(two_of(KEYS[:4], Affinity((number + 0.5) / 1200)) for number in range(1200))
    assert len(pairs) == 12 and set(pairs.values()) == {100}


@pytest.mark.parametrize(
    ("own", "other", "stays"),
    [
        (IDLE, IDLE, True),
        (Reading(0, 300 + HEADROOM * SEQUENCE_TOKENS, 0.0, 1000.0), IDLE, True),
        (Reading(0, 301 + HEADROOM * SEQUENCE_TOKENS, 0.0, 1000.0), IDLE, False),
        (Reading(0, 0.0, HEADROOM + 300 / SEQUENCE_TOKENS, 1000.0), IDLE, True),
        (Reading(0, 0.0, HEADROOM + 1 + 300 / SEQUENCE_TOKENS, 1000.0), IDLE, False),
        (Reading(HEADROOM), Reading(0), True),
        (Reading(HEADROOM + 1), Reading(0), False),
        (Reading(HEADROOM + 1), IDLE, False),
        (Reading(1, 800.0, 0.0, 1000.0), Reading(1, 100.0, 0.0, 100.0), True),  # which is ten times slower
    ],
)
def test_a_conversation_stays_until_its_replica_is_busier_by_more_than_its_prompt(
    own: Reading, other: Reading, stays: bool
) -> None:
    affinity = Affinity(0.3, key_of("a conversation"), tokens=300)
    first, second = two_of(KEYS, affinity)
    readings = [Reading(999)] * len(KEYS)
    readings[first], readings[second] = own, other
    assert chosen(readings, affinity) == (first if stays else second)


@given(KEY_LISTS, st.lists(st.tuples(BITS, DRAWS), max_size=50))
def test_however_conversations_fall_no_replica_is_far_above_the_others(
    keys: list[int], requests: list[tuple[int, float]]
) -> None:
    """Nothing ends. Even where all belong to one conversation, its own replica is at most `HEADROOM` above what it was
    compared with."""
    flights = [0] * len(keys)
    for conversation, draw in requests:
        affinity = Affinity(draw, conversation & 1)
        first, second = two_of(keys, affinity)
        index = chosen([Reading(count) for count in flights], affinity, keys)
        flights[index] += 1
        assert flights[index] <= flights[second if index == first else first] + HEADROOM + 1


USER = {"role": "user", "content": "What is the capital of France?"}


@pytest.mark.parametrize(
    ("later", "same"),
    [
        ([USER], True),
        ([USER, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Spain?"}], True),
        ([{"role": "user", "content": [{"type": "text", "text": USER["content"]}]}], True),
        ([{"role": "system", "content": "Be brief."}, USER], False),
        ([{"role": "user", "content": "What is the capital of Spain?"}], False),
    ],
)
def test_the_turns_of_a_conversation_begin_alike(later: list[dict[str, Any]], same: bool) -> None:
    first = conversation_of({"messages": [USER]})
    assert first is not None and (conversation_of({"messages": later, "temperature": 1}) == first) is same


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": "x"},
        {"messages": []},
        {"messages": [3]},
        {"messages": [{"role": "system", "content": "x"}]},
    ],
)
def test_what_no_user_said_is_no_conversation(body: dict[str, Any]) -> None:
    assert conversation_of(body) is None


def test_any_text_can_begin_a_conversation() -> None:
    assert conversation_of({"messages": [{"role": "user", "content": "\ud800"}], "tools": [{"x": 1}]}) is not None
    assert conversation_of({"messages": [{"role": "user", "content": None}]}) is not None


REFUSED, FULL, LOST = ConnectFailed("x"), UpstreamOverloaded("x"), ConnectionLost("x")
BROKE = UpstreamFailed("x")


@pytest.mark.parametrize(
    ("errors", "on"),
    [
        ([REFUSED], True),
        ([REFUSED, REFUSED, FULL, REFUSED], True),
        ([LOST], True),
        ([BROKE], True),
        ([LOST, LOST], False),
        ([BROKE, REFUSED, LOST], False),
        ([LOST, REFUSED], True),
        ([UpstreamTimeout("x")], False),
        ([UpstreamUnauthorized("x")], False),
    ],
)
def test_what_did_not_take_a_request_leads_on_and_what_may_have_died_of_it_once(
    errors: list[GatewayError], on: bool
) -> None:
    assert leads_on(errors) is on
