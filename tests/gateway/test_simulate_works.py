"""What the bound says of engines, held against the simulated engine: whatever it is given, and in whatever order, no
interval of a real run holds less than what the bound counts there, or more than its length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.simulate.engine import Engine
from gateway.simulate.engine import Sequence as InEngine
from gateway.simulate.intervals import Overfull, Works, chosen
from gateway.simulate.step import EngineModel
from gateway.simulate.works import AT_ONCE, SHARES, Least, Share, Work, least_prompt_s, longest_step_s
from tests.worlds import ENGINE

ENGINES = st.builds(
    EngineModel,
    fixed_s=st.sampled_from([0.0005, 0.01, 0.05]),
    per_prompt_token_s=st.sampled_from([0.0001, 0.001, 0.003]),
    per_sequence_s=st.sampled_from([0.0, 0.002]),
    per_cached_token_s=st.sampled_from([0.0, 1e-5, 1e-3]),
    num_blocks=st.sampled_from([10, 14, 64]),
    max_batch_tokens=st.sampled_from([3, 32, 200]),
    max_running=st.sampled_from([2, 16]),
    window=st.just(1000),
)


@dataclass(frozen=True)
class Given:
    """One request for an engine: how long after the one before, how long, and in which order."""

    after_s: float
    prompt: int
    output: int
    priority: int


@dataclass
class Served:
    """What became of it."""

    given: Given
    arrival: float
    first: float = 0.0
    ended: float = 0.0
    again: bool = False


ALL = st.lists(
    st.builds(Given, st.sampled_from([0.0, 0.01, 0.3]), st.integers(1, 110), st.integers(1, 45), st.integers(0, 2)),
    min_size=1,
    max_size=25,
)


def served(model: EngineModel, every: Sequence[Given]) -> list[Served]:
    """A run of the engine. `again` is set for those that lost their blocks after their first token."""
    engine = Engine(replace(model, max_waiting=1 << 30, max_waiting_tokens=1 << 30))
    arrivals = np.cumsum([one.after_s for one in every])
    runs = [Served(one, float(at)) for one, at in zip(every, arrivals, strict=True)]
    known: dict[int, InEngine] = {}
    now, came, left = 0.0, 0, len(runs)
    while left:
        while came < len(runs) and runs[came].arrival <= now:
            one = runs[came].given
            taken = engine.add(came, one.prompt, one.output, one.priority, None)
            assert isinstance(taken, InEngine)
            known[came] = taken
            came += 1
        seconds = engine.begin()
        if seconds is None:
            now = runs[came].arrival
            continue
        assert seconds <= longest_step_s(model) + 1e-12
        now += seconds
        for key, sequence in known.items():
            runs[key].again |= sequence.state == "waiting" and sequence.generated > 0
        stepped = engine.end()
        for key in stepped.first:
            runs[key].first = now
        for key in stepped.ended:
            runs[key].ended = now
            left -= 1
    return runs


def least_works(model: EngineModel, share: Share, runs: Sequence[Served]) -> tuple[list[int], list[Work]]:
    """What the bound counts of a run, with the moments at which things happened as what was due."""
    least = Least(model, share)
    pairs = []
    for column, run in enumerate(runs):
        one = run.given
        way = least.preempted if run.again else least.in_time
        own = list(way(one.prompt, one.output, run.arrival, run.first, run.ended))
        loose = list(least.at_any_time(one.prompt, one.output, run.arrival, run.first, run.ended))
        assert sum(work.seconds for work in loose) <= sum(work.seconds for work in own) + 1e-9
        pairs += [(column, work) for work in own]
    return [column for column, _ in pairs], [work for _, work in pairs]


@settings(max_examples=60, deadline=None)
@given(model=ENGINES, every=ALL, share=st.sampled_from(SHARES))
def test_no_interval_of_a_run_holds_more_than_its_length(
    model: EngineModel, every: Sequence[Given], share: Share
) -> None:
    every = [one for one in every if one.prompt + one.output <= model.capacity] or [Given(0.0, 1, 1, 0)]
    runs = served(model, every)
    until = max(run.ended for run in runs)
    works = Works(*least_works(model, share, runs), until)
    begins = sorted({run.arrival for run in runs} | {run.first for run in runs})
    ends = sorted({run.first for run in runs} | {run.ended for run in runs})
    for a in begins:
        for b in ends:
            if a < b:
                _, seconds = works.within(a, b)
                assert seconds.sum() <= (b - a) * (1 + 1e-9) + 1e-9
    assert [one for one in works.overfull(np.ones(len(runs)), 0) if one.excess > 2e-6] == []


WORKS = st.lists(
    st.builds(
        lambda begins, length, part, before, after, runs: Work(
            begins, begins + length, part * min(before, after, 2.0) * length, before, after, runs and before >= after
        ),
        st.sampled_from([0.0, 0.25, 1.0, 3.5]) | st.floats(0, 4),
        st.floats(0.01, 3),
        st.floats(0.01, 1),
        st.sampled_from([1.0, 0.25, AT_ONCE]),
        st.sampled_from([1.0, 0.5, AT_ONCE]),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@example(works=[Work(0.0, 1.0, 2.0, AT_ONCE, AT_ONCE, runs=True)], shares=[1.0])
@given(works=WORKS, shares=st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=12, max_size=12))
def test_the_search_finds_what_there_is(works: Sequence[Work], shares: Sequence[float]) -> None:
    """Each excess is what summing up gives, and the largest over beginnings and ends of works is among them."""
    until, schedule = 5.0, np.array(shares)
    table = Works(range(len(works)), works, until)

    def excess(a: float, b: float) -> float:
        columns, seconds = table.within(a, b)
        return float(schedule[columns] @ seconds) - (b - a)

    found = table.overfull(schedule, 0)
    for one in found:
        assert one.excess == pytest.approx(excess(one.begins, one.ends), abs=1e-6)
    on = [work for work, share in zip(works, shares, strict=False) if share]
    ends = {min(work.ends, until) for work in on} | {until}
    most = max((excess(work.begins, b) for work in on for b in ends if b > work.begins), default=0.0)
    assert max((one.excess for one in found), default=0.0) == pytest.approx(max(0.0, most), abs=2e-6)


def test_works_by_hand() -> None:
    """Of 2 s of work between 0 and 10 s, an interval from 1 to 9 s holds none, all from 0 to 10, and half from 1 to 10
    or from 0 to 9; work that is done at once is counted whole or not at all."""
    table = Works([0, 1], [Work(0.0, 10.0, 2.0, 1.0, 1.0), Work(0.0, 10.0, 2.0, AT_ONCE, AT_ONCE)], 20.0)

    def held(a: float, b: float) -> dict[int, float]:
        columns, seconds = table.within(a, b)
        return {int(column): round(float(one), 9) for column, one in zip(columns, seconds, strict=True)}

    assert held(1.0, 9.0) == {}
    assert held(0.0, 10.0) == {0: 2.0, 1: 2.0}
    assert held(1.0, 10.0) == held(0.0, 9.0) == {0: 1.0}
    assert held(-5.0, 20.0) == {0: 2.0, 1: 2.0}


def test_a_lone_prompt_takes_as_long_as_it_takes() -> None:
    """Prompts of up to 250 tokens in chunks of 100, each of which looks back at those before."""
    model = replace(ENGINE, per_cached_token_s=0.0001)
    for prompt in (2, 99, 100, 150, 250):
        (run,) = served(model, [Given(0.0, prompt, 1, 0)])
        assert least_prompt_s(model, prompt) == pytest.approx(run.first, rel=0.05)
        assert least_prompt_s(model, prompt) <= run.first + 1e-12


def test_a_sequence_that_runs_takes_its_part_of_each_step() -> None:
    """A prompt of one step of 50 ms, then 400 tokens of at least 10 ms each. Steps take at most 122 ms (8 sequences and
    32 prompt tokens), so of the second after the prompt, which may come 200 ms late, it takes 6.6 tokens."""
    model = replace(ENGINE, max_batch_tokens=40, per_sequence_s=0.01, max_running=8)
    assert longest_step_s(model) == pytest.approx(0.122)
    works = list(Least(model, "places").in_time(40, 401, 0.0, 0.2, 60.0))
    table = Works([0, 1, 2], works, 60.0)

    def decoded(a: float, b: float) -> float:
        columns, seconds = table.within(a, b)
        return sum(float(one) for column, one in zip(columns, seconds, strict=True) if column) / (0.01 + 0.01 / 8)

    assert decoded(0.0, 1.0) == pytest.approx(0.8 / 0.122)
    assert decoded(0.0, 60.0) == pytest.approx(400)
    assert decoded(0.15, 1.0) == pytest.approx(0.8 / 0.122)
    assert decoded(0.5, 1.0) == pytest.approx(0.5 / 0.122)
    assert decoded(8.0, 9.0) == pytest.approx(400 - (8.0 - 0.05) / 0.02)  # if it decoded alone before
    assert decoded(8.1, 9.0) == 0.0


def test_almost_the_same_interval_is_chosen_once() -> None:
    many = [Overfull(0.0, 10.0, 2.0), Overfull(0.1, 10.1, 1.9), Overfull(5.0, 10.0, 1.0), Overfull(0.0, 0.5, 0.5)]
    assert chosen(many, 10) == [many[0], many[2], many[3]]
    assert chosen(many, 1) == [many[0]]
