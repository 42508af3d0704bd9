"""Whatever the policy, the fleet, the failures and their order: through the whole request path, no private request
reaches a zone that the invariants do not allow."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission import Limiter
from gateway.answers import Books
from gateway.backends import Backends
from gateway.chat import ChatPath
from gateway.errors import ConnectFailed, UpstreamCut, UpstreamFailed, UpstreamOverloaded, UpstreamRejected
from gateway.fleet import Fleet
from gateway.labels import Scanner
from gateway.ledger import MemoryLedger
from gateway.policy import Policy
from gateway.serving import Serving
from gateway.snapshot import EngineLoad
from tests.fakes import CARD, STREAM, Clock, FakeBackend, Ids, Log
from tests.gateway.test_routing import NAMES, policies

_scripts = st.sampled_from(
    [
        STREAM,
        [],
        [STREAM[0], UpstreamCut("broke off")],
        ConnectFailed("cannot be reached"),
        UpstreamOverloaded("full", retry_after=1.0),
        UpstreamOverloaded("cannot start in time"),
        UpstreamRejected("refused", upstream_status=400),
        [UpstreamFailed("answered with status 500")],
    ]
)
_loads = st.builds(
    EngineLoad,
    waiting=st.integers(0, 9),
    running=st.integers(0, 9),
    queued_prefill_tokens=st.integers(0, 9999),
    free_blocks=st.integers(0, 50),
    total_blocks=st.just(50),
    block_size=st.just(16),
    prefill_tokens_per_s=st.sampled_from([None, 100.0, 9000.0]),
    step_s=st.sampled_from([None, 0.02]),
)
_events = st.one_of(
    st.tuples(st.just("ask"), st.booleans(), st.booleans(), st.sampled_from(["auto", "default", *NAMES])),
    st.tuples(st.just("loaded"), st.sampled_from(NAMES), _loads),
    st.tuples(st.just("missed"), st.sampled_from(NAMES)),
    st.tuples(st.just("down"), st.sampled_from(NAMES)),
    st.tuples(st.just("up"), st.sampled_from(NAMES)),
    st.tuples(st.just("later"), st.floats(0, 90)),
)


@settings(deadline=None, max_examples=60)
@given(policies(), st.lists(_scripts, max_size=12), st.lists(_events, max_size=12))
def test_no_private_request_leaves(p: Policy, scripts: list[Any], events: list[Any]) -> None:
    p = replace(p, invariants=tuple(replace(invariant, mask=frozenset()) for invariant in p.invariants))
    backends = {name: FakeBackend(scripts[number::4]) for number, name in enumerate(NAMES)}
    fleet, clock, log = Fleet(p.deployments), Clock(), Log()
    serving = Serving(p, Scanner(p.kinds), {}, Backends(backends))
    limiter = Limiter(MemoryLedger(), fleet, clock, clock)
    path = ChatPath(serving, fleet, Books(fleet, log, lambda _: None, clock), limiter, clock, clock, Ids())

    async def ask(private: bool, stream: bool, model: str) -> None:
        text = f"card {CARD}" if private else "hi"
        body = {"messages": [{"role": "user", "content": text}], "stream": stream, "model": model}
        reply = await path.complete({}, orjson.dumps(body))
        async for _ in reply.chunks:
            pass
        await reply.close()

    asked = 0
    for event, *values in events:
        if event == "ask":
            asked += 1
            before = {name: len(backend.calls) for name, backend in backends.items()}
            asyncio.run(ask(*values))
            reached = {p.deployments[name].zone for name in NAMES if len(backends[name].calls) > before[name]}
            for invariant in p.invariants:
                bound = "personal" in invariant.any_label and not invariant.tenant and not invariant.key_tag
                if values[0] and bound:  # nobody here is of a tenant or has a tag
                    assert reached <= invariant.stay_in
        elif event == "later":
            clock.now += values[0]
        elif event == "loaded":
            fleet.loaded(values[0], values[1], clock.now, clock.now)
        elif event == "missed":
            fleet.missed(values[0])
        elif event == "down":
            fleet.set_down(values[0], "stopped", clock.now)
        else:
            fleet.set_up(values[0], clock.now)
    assert len(log.lines) == asked
    assert all(line["outcome"] != "egress_denied" for line in log.lines), "the door never had to refuse"
    assert all(status.in_flight == 0 for status in fleet.snapshot(clock.now, 0.0).deployments.values())
