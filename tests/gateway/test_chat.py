"""The request path with fake backends: failover before the first token, errors after it, one record a request,
nothing leaked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission import Limiter
from gateway.answers import Books
from gateway.backends import Backends
from gateway.backends.base import Call, Chunk
from gateway.chat import ChatPath, draw_for
from gateway.encodings import load_encoding
from gateway.errors import (
    BadRequest,
    ConnectFailed,
    ConnectionLost,
    EgressDenied,
    UpstreamCut,
    UpstreamError,
    UpstreamFailed,
    UpstreamOverloaded,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnauthorized,
)
from gateway.facts import cost_cap_in, request_id_of
from gateway.fleet import Fleet
from gateway.keys import Key, Keyring, digest_of
from gateway.labels import Scanner
from gateway.ledger import MemoryLedger
from gateway.policy import Invariant, Match, Policy, Rule, Slo
from gateway.ranges import Range
from gateway.record import recorded
from gateway.reply import Reply
from gateway.routing import decide
from gateway.serving import Serving
from gateway.snapshot import EngineLoad
from gateway.tokens import TiktokenCounter
from gateway.types import Caller, Permit, Price, Replica, Timeouts, usd
from tests.fakes import (
    CARD,
    CLOUD,
    HOME,
    OTHER,
    STREAM,
    Clock,
    FakeAnswer,
    FakeBackend,
    Ids,
    Log,
    completion,
    deployment,
    policy,
)


class World:
    """A request path over fakes, and what they saw."""

    def __init__(self, p: Policy | None = None, /, **backends: FakeBackend) -> None:
        p = p or policy(order_by="listed")
        self.backends = {name: backends.get(name, FakeBackend()) for name in p.deployments}
        self.fleet, self.log = Fleet(p.deployments), Log()
        self.door = Backends(self.backends)
        serving = Serving(p, Scanner(p.kinds), {}, self.door)
        books = Books(self.fleet, self.log, lambda _: None, Clock())
        self.limiter = Limiter(MemoryLedger(), self.fleet, Clock(), Clock())
        self.path = ChatPath(serving, self.fleet, books, self.limiter, Clock(), Clock(), Ids())

    async def reply(self, text: str = "hi", headers: dict[str, str] | None = None, **body: Any) -> Reply:
        document = {"messages": [{"role": "user", "content": text}], **body}
        return await self.path.complete(headers or {}, orjson.dumps(document))

    def ask(self, text: str = "hi", headers: dict[str, str] | None = None, **body: Any) -> tuple[Reply, bytes]:
        """The reply and its whole body, as a client that stays to the end sees it."""

        async def run() -> tuple[Reply, bytes]:
            reply = await self.reply(text, headers, **body)
            data = b"".join([chunk.data async for chunk in reply.chunks])
            await reply.close()
            return reply, data

        return asyncio.run(run())

    def called(self) -> list[str]:
        return [name for name, backend in self.backends.items() for _ in backend.calls]

    def in_flight(self) -> int:
        return sum(s.in_flight for s in self.fleet.snapshot(0.0, 0.0).deployments.values())


def error_of(data: bytes) -> dict[str, Any]:
    error: dict[str, Any] = orjson.loads(data)["error"]
    return error


def test_a_plain_answer_passes_through_with_its_decision_in_the_headers() -> None:
    world = World()
    reply, data = world.ask()
    headers = dict(reply.headers)
    assert data == completion() and reply.status == 200
    assert headers[b"x-hybridgate-deployment"] == b"home" and headers[b"x-hybridgate-zone"] == b"on_premises"
    assert headers[b"x-hybridgate-rule"] == b"default" and headers[b"x-hybridgate-policy"] == b"0123456789ab"
    assert headers[b"x-hybridgate-attempts"] == b"1" and headers[b"x-hybridgate-cost-usd"] == b"0.00000066"


def test_a_stream_takes_the_same_path_and_is_booked_with_its_usage() -> None:
    world = World(home=FakeBackend([STREAM]))
    reply, data = world.ask(stream=True)
    assert data == b"data: a\n\ndata: b\n\ndata: [DONE]\n\n" and reply.content_type.startswith(b"text/event-stream")
    (line,) = world.log.lines
    assert (line["outcome"], line["prompt_tokens"], line["completion_tokens"]) == ("ok", 5, 2)
    assert world.in_flight() == 0


def test_a_record_holds_enough_to_decide_again() -> None:
    world = World(policy(order_by="first_token"), home=FakeBackend([UpstreamFailed("x")]))
    for number in range(3):
        world.ask(CARD if number else "hi", headers={"x-hybridgate-slo": "fast"}, stream=number != 1, max_tokens=9)
    policy_ = world.path.serving.policy
    lines = [orjson.loads(orjson.dumps(line)) for line in world.log.lines]
    for line in lines:
        record = recorded(line)
        assert record is not None
        again = decide(policy_, record.facts, record.snapshot_of(policy_.deployments))
        assert tuple(c.deployment for c in again.candidates) == record.candidates
        assert (again.rule, again.slo, again.labels) == (record.rule, "fast", record.facts.labels)
        (answered,) = [c for c in again.candidates if c.deployment == record.deployment]
        assert line["predicted"]["cost_usd"] == usd(answered.cost_nusd or 0)


@pytest.mark.parametrize(
    "error",
    [
        ConnectFailed("x"),
        UpstreamTimeout("x"),
        UpstreamOverloaded("x", retry_after=1.0),
        UpstreamUnauthorized("x"),
        UpstreamFailed("x"),
    ],
)
@pytest.mark.parametrize("where", ["open", "first chunk"])
def test_before_the_first_token_another_deployment_answers(error: UpstreamError, where: str) -> None:
    world = World(home=FakeBackend([error if where == "open" else [error]]))
    reply, data = world.ask()
    assert data == completion() and dict(reply.headers)[b"x-hybridgate-attempts"] == b"2"
    assert world.called() == ["home", "cloud"] and world.in_flight() == 0
    assert world.log.lines[0]["failed"] == {"home": "x"}
    assert all(answer.closed for answer in world.backends["home"].answers)


FREE = EngineLoad(
    waiting=0,
    running=0,
    queued_prefill_tokens=0,
    free_blocks=100,
    total_blocks=100,
    block_size=16,
    prefill_tokens_per_s=1e5,
    decode_tokens_per_s=100.0,
    step_s=0.001,
)


def queueing(first_token_s: float, by_ms: float) -> World:
    """The engine at home makes its first token after so long; a class wants it within `by_ms`, and the cloud has always
    had it after 100 ms. (The fleet's clock stands still, so home forecasts as if it had just been sent.)"""
    of = replace(policy([HOME, CLOUD], order_by="listed"), slo={"slow": Slo("slow", by_ms)})
    world = World(of, home=FakeBackend([[first_token_s, *STREAM]]))
    world.fleet.loaded("home", FREE, 1000.0, 1000.0)
    for _ in range(20):
        flight = world.fleet.started("cloud", 999.9)
        world.fleet.first_token(flight, 1000.0)
        world.fleet.ended(flight, None, 1000.0)
    return world


def test_an_engines_queue_is_left_while_another_deployment_can_still_be_in_time() -> None:
    world = queueing(first_token_s=30.0, by_ms=152.0)  # all but 150 ms of which the cloud may need
    for number in range(40):  # others who wait there too
        world.fleet.started("home", 1000.0, 1000, priority=number % 2)
    reply, _ = world.ask(headers={"x-hybridgate-slo": "slow"}, stream=True)
    assert world.called() == ["home", "cloud"] and dict(reply.headers)[b"x-hybridgate-deployment"] == b"cloud"
    assert "its queue was left" in world.log.lines[0]["failed"]["home"]
    assert world.backends["home"].answers[0].closed
    assert world.fleet.snapshot(1000.0, 0.0).deployments["home"].circuit == "closed"


def test_it_is_not_left_where_the_first_token_is_about_to_come() -> None:
    world = queueing(first_token_s=0.05, by_ms=152.0)
    reply, _ = world.ask(headers={"x-hybridgate-slo": "slow"}, stream=True)
    assert world.called() == ["home"] and dict(reply.headers)[b"x-hybridgate-attempts"] == b"1"


@pytest.mark.parametrize("text", ["hi", CARD])
def test_a_request_without_a_limit_or_without_another_place_waits(text: str) -> None:
    world = queueing(first_token_s=0.05, by_ms=152.0)
    for number in range(40):
        world.fleet.started("home", 1000.0, 1000, priority=number % 2)
    world.ask(text, headers={} if text == "hi" else {"x-hybridgate-slo": "slow"}, stream=True)
    assert world.called() == ["home"]


def test_who_goes_away_while_a_queue_is_left_is_gone() -> None:
    """The cancellation is not taken for the end of the patience."""
    world = queueing(first_token_s=30.0, by_ms=152.0)

    async def run() -> None:
        asking = asyncio.create_task(world.reply(headers={"x-hybridgate-slo": "slow"}, stream=True))
        await asyncio.sleep(0.001)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(run())
    assert world.called() == ["home"] and world.in_flight() == 0


def test_after_the_first_token_a_failure_ends_in_an_error_event_and_is_not_hidden() -> None:
    world = World(home=FakeBackend([[STREAM[0], UpstreamCut("broke off")]]))
    _, data = world.ask(stream=True)
    events = data.split(b"\n\n")
    assert events[0] == b"data: a" and error_of(events[1][6:])["code"] == "upstream_cut" and b"[DONE]" not in data
    assert world.called() == ["home"] and world.log.lines[0]["outcome"] == "cut" and world.in_flight() == 0


@pytest.mark.parametrize("script", [[STREAM[0]], []], ids=["cut", "empty"])
def test_an_answer_that_just_stops_is_never_complete(script: Sequence[Chunk]) -> None:
    world = World(policy([HOME]), home=FakeBackend([script]))
    reply, data = world.ask(stream=True)
    assert b"[DONE]" not in data and b"error" in data
    assert reply.status == (200 if script else 503)


def test_a_request_that_the_deployment_refuses_is_not_tried_elsewhere() -> None:
    rejected = UpstreamRejected("home refused the request: no", upstream_status=422, param="messages")
    world = World(home=FakeBackend([rejected]))
    reply, data = world.ask()
    assert reply.status == 422 and error_of(data)["param"] == "messages" and world.called() == ["home"]


def test_when_everything_fails_the_caller_is_told_why_and_when_to_come_back() -> None:
    world = World(**{name: FakeBackend([ConnectFailed("cannot be reached")]) for name in ("home", "cloud", "other")})
    reply, data = world.ask()
    assert reply.status == 503 and (b"retry-after", b"1") in reply.headers
    assert error_of(data)["message"].count("cannot be reached") == 3


def test_a_first_token_that_does_not_come_in_time_is_given_up() -> None:
    impatient = deployment("slow", timeouts=Timeouts(first_token=0.01))
    world = World(
        policy([impatient, CLOUD], order_by="listed"), slow=FakeBackend([[60.0]]), cloud=FakeBackend([STREAM])
    )
    _, data = world.ask(stream=True)
    assert data.endswith(b"[DONE]\n\n") and world.called() == ["slow", "cloud"]
    assert world.backends["slow"].answers[0].closed == 1


@pytest.mark.parametrize("after", [0, 1], ids=["before the first token", "in the middle"])
def test_a_client_that_leaves_ends_the_attempt_once(after: int) -> None:
    world = World(home=FakeBackend([[*STREAM[:after], 60.0]]))

    async def run() -> None:
        task = asyncio.create_task(world.reply(stream=True))
        await asyncio.sleep(0.02)
        if not after:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return
        reply = await task
        await anext(reply.chunks)
        await reply.close()
        await reply.close()

    asyncio.run(run())
    (line,) = world.log.lines
    assert (line["outcome"], line["status"]) == ("client_gone", 499)
    assert world.in_flight() == 0 and world.backends["home"].answers[0].closed >= 1
    assert line.get("completion_tokens", 0) == after, "what was sent is booked"


def test_a_card_number_and_no_local_deployment_is_an_explained_refusal() -> None:
    world = World()
    world.fleet.set_down("home", "its engine is starting", 0.0)
    reply, data = world.ask(f"my card is {CARD}")
    assert reply.status == 503 and world.called() == []
    message = error_of(data)["message"]
    assert "its engine is starting" in message and "private stays home" in message and "4111" not in message


@pytest.mark.parametrize(
    "sent",
    [
        {"text": f"card {CARD}"},
        {"text": "hi", "headers": {"x-data-class": "restricted"}},
        {"text": "hi", "headers": {"x-data-class": "personal"}},
        {"text": "hi", "metadata": {"note": CARD}},
        {"text": "hi", "tools": [{"type": "function", "function": {"name": "f", "description": f"{CARD}"}}]},
        {"text": [{"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}]},
    ],
)
def test_what_is_protected_goes_home_wherever_it_stands(sent: dict[str, Any]) -> None:
    roomy = replace(HOME, window=None)  # a picture counts as many tokens
    world = World(policy([CLOUD, roomy, OTHER], order_by="listed"))
    reply, _ = world.ask(**sent)
    assert dict(reply.headers)[b"x-hybridgate-deployment"] == b"home" and world.called() == ["home"]


def test_a_protected_request_fails_rather_than_fail_over_to_a_cloud() -> None:
    world = World(home=FakeBackend([ConnectFailed("cannot be reached")]))
    reply, _ = world.ask(CARD)
    assert reply.status == 503 and world.called() == ["home"]


@pytest.mark.parametrize(
    ("headers", "body", "status", "param"),
    [
        ({"x-data-class": "unheard-of"}, {}, 400, "x-data-class"),
        ({"x-hybridgate-slo": "warp"}, {}, 400, "x-hybridgate-slo"),
        ({"x-hybridgate-max-cost-usd": "free"}, {}, 400, "x-hybridgate-max-cost-usd"),
        ({"x-hybridgate-tags": "a b"}, {}, 400, "x-hybridgate-tags"),
        ({}, {"model": "no-such"}, 404, "model"),
        ({}, {"max_tokens": 0}, 400, "max_tokens"),
        ({}, {"temperature": 9}, 400, "temperature"),
    ],
)
def test_a_bad_field_is_named_and_its_value_is_not_repeated(
    headers: dict[str, str], body: dict[str, Any], status: int, param: str
) -> None:
    world = World()
    reply, data = world.ask(headers=headers, **body)
    assert reply.status == status and error_of(data)["param"] == param and world.called() == []
    for value in ("unheard-of", "warp", "free", "a b", "no-such"):
        assert value not in error_of(data)["message"] and value not in repr(world.log.lines)


@pytest.mark.parametrize(("tags", "kept"), [("batch,eu-1", True), ("batch,4111-1111-1111-1111", False)])
def test_tags_that_look_private_are_not_logged(tags: str, kept: bool) -> None:
    world = World()
    reply, _ = world.ask(headers={"x-hybridgate-tags": tags})
    assert reply.status == 200 and world.log.lines[0]["facts"].get("tags") == (
        sorted(tags.split(",")) if kept else None
    )


def test_a_cost_cap_bounds_an_answer_that_the_caller_left_unbounded() -> None:
    world = World()
    world.ask(headers={"x-hybridgate-max-cost-usd": "0.01"})
    assert world.backends["home"].calls[0].imposed_max_tokens == HOME.output_tokens(None)
    world.ask(headers={"x-hybridgate-max-cost-usd": "0.01"}, max_tokens=3)
    assert world.backends["home"].calls[1].imposed_max_tokens is None


def test_priority_is_the_class_first_and_then_what_must_stay_home() -> None:
    world = World(policy([HOME]))
    for text, slo in ((CARD, "fast"), ("hi", "fast"), (CARD, "slow"), ("hi", None)):
        world.ask(text, headers={"x-hybridgate-slo": slo} if slo else {})
    priorities = [call.priority for call in world.backends["home"].calls]
    assert priorities == sorted(priorities) and len(set(priorities)) == 4


def test_a_deadline_is_sent_only_while_another_deployment_could_keep_it() -> None:
    world = World(cloud=FakeBackend([UpstreamFailed("x")]), home=FakeBackend([UpstreamFailed("x")]))
    world.ask(headers={"x-hybridgate-slo": "fast"})
    sent = [world.backends[name].calls[0].first_token_by_ms for name in ("home", "cloud", "other")]
    assert sent == [100.0, 100.0, None]


@pytest.mark.parametrize(("given", "kept"), [("abc-1", True), ("a b", False), ("x" * 200, False), ("é", False)])
def test_a_request_id_is_taken_over_where_it_is_a_plain_token(given: str, kept: bool) -> None:
    assert (request_id_of({"x-request-id": given}, lambda: "new") == given) is kept


@pytest.mark.parametrize(
    ("given", "kept"), [("550e8400-e29b-41d4-a716-446655440000", True), ("4111-1111-1111-1111", False)]
)
def test_a_request_id_that_looks_private_is_replaced(given: str, kept: bool) -> None:
    world = World()
    reply, _ = world.ask(headers={"x-request-id": given})
    assert (dict(reply.headers)[b"x-request-id"].decode() == given) is kept
    assert (world.backends["home"].calls[0].request_id == given) is kept
    assert (world.log.lines[0]["request_id"] == given) is kept


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "0", "1e99", "", "0x1"])
def test_a_cost_cap_must_be_a_positive_number_of_dollars(text: str) -> None:
    with pytest.raises(BadRequest):
        cost_cap_in({"x-hybridgate-max-cost-usd": text})


@given(st.integers(0, 2**64 - 1))
def test_the_draw_of_a_decision_is_a_share(number: int) -> None:
    assert 0 <= draw_for(f"{number:016x}") < 1


def test_the_door_refuses_what_a_wrong_decision_would_let_out() -> None:
    backend = FakeBackend()
    permit = Permit(frozenset({"personal"}), frozenset({"on_premises"}), "private stays home")
    call: Any = object()
    with pytest.raises(EgressDenied):
        asyncio.run(Backends({"cloud": backend}).open(CLOUD, permit, call))
    assert backend.calls == []


# Invariants over random orders of failures.

_failures = st.sampled_from(
    [
        STREAM,
        [],
        [STREAM[0]],
        [STREAM[0], UpstreamCut("broke off")],
        ConnectFailed("cannot be reached"),
        UpstreamOverloaded("full", retry_after=1.0),
        UpstreamRejected("refused", upstream_status=400),
        [UpstreamFailed("answered with status 500")],
    ]
)
_SECRET = "zebra-crossing-7741"


@given(
    st.lists(_failures, max_size=6),
    st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from(["auto", "home", "cloud", "other"])), max_size=6),
    st.permutations([HOME, CLOUD, OTHER]),
    st.sampled_from(["listed", "marginal_cost"]),
)
def test_whatever_fails_nothing_private_leaves_and_everything_ends_once(
    failures: list[Any], requests: list[tuple[bool, bool, str]], deployments: list[Any], order: str
) -> None:
    scripts: list[Any] = failures
    world = World(
        policy(deployments, order_by=order),
        **{name: FakeBackend(scripts[i::3]) for i, name in enumerate(("home", "cloud", "other"))},
    )
    for number, (private, stream, model) in enumerate(requests, 1):
        before = {name: len(b.calls) for name, b in world.backends.items()}
        text = f"{_SECRET} {CARD}" if private else _SECRET
        reply, data = world.ask(text, stream=stream, model=model)
        called = {name for name, b in world.backends.items() if len(b.calls) > before[name]}
        assert not (private and called - {"home"})
        assert world.in_flight() == 0 and len(world.log.lines) == number
        lines = orjson.dumps(world.log.lines).decode()  # not their repr, which has addresses of objects
        assert _SECRET not in lines and "4111" not in lines
        assert _SECRET.encode() not in data and all(_SECRET.encode() not in value for _, value in reply.headers)
        assert stream <= ((b"[DONE]" in data) != (b'"error"' in data)), "a stream is complete or says that it is not"
    for backend in world.backends.values():
        assert all(answer.closed for answer in backend.answers)
        assert all(isinstance(call, Call) for call in backend.calls)


def test_a_cost_cap_counts_every_answer_that_is_asked_for() -> None:
    one = World()
    assert one.ask(headers={"x-hybridgate-max-cost-usd": "0.0001"}, max_tokens=500)[0].status == 200
    many = World()
    assert many.ask(headers={"x-hybridgate-max-cost-usd": "0.0001"}, max_tokens=500, n=100)[0].status == 402


@pytest.mark.parametrize(("stream", "cost"), [(False, "0.012"), (True, "0.007")])
def test_a_bill_is_fully_loaded_whatever_routing_compared(stream: bool, cost: str) -> None:
    """The header, the record and the caller's cap know what the hours cost, idle ones included; the decision does
    not."""
    dear = replace(HOME, price=Price(1.0, 1.0), full_price=Price(1e6, 1e6))
    world = World(policy([CLOUD, dear], order_by="marginal_cost"), home=FakeBackend([STREAM] if stream else []))
    reply, _ = world.ask(stream=stream, max_tokens=2)
    assert dict(reply.headers)[b"x-hybridgate-deployment"] == b"home"
    (line,) = world.log.lines
    assert line["cost_usd"] == cost
    assert float(dict(reply.headers)[b"x-hybridgate-cost-usd"]) >= 0.001
    capped, _ = World(policy([dear])).ask(headers={"x-hybridgate-max-cost-usd": "0.0001"}, max_tokens=2)
    assert capped.status == 402


def test_impatient_clients_do_not_hide_that_a_deployment_is_silent() -> None:
    """A request that is cancelled before its first token is no success: it neither closes a circuit nor resets its
    count of failures."""
    world = World(policy([HOME]), home=FakeBackend([UpstreamFailed("x"), [60.0], UpstreamFailed("x"), [60.0]]))

    async def leave() -> None:
        task = asyncio.create_task(world.reply())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def run() -> None:
        for _ in range(2):
            await world.reply()
            await leave()
        world.backends["home"].scripts.append(UpstreamFailed("x"))
        await world.reply()

    asyncio.run(run())
    assert world.fleet.snapshot(0.0, 0.0).deployments["home"].circuit == "open" and world.in_flight() == 0


@pytest.mark.parametrize(
    ("text", "rule"), [("four bytes word. " * 5, "short"), ("a, b, c; " * 10, "long"), ("a " * 900, "long")]
)
def test_a_rules_number_of_tokens_is_compared_with_an_exact_count_where_it_is_near(text: str, rule: str) -> None:
    """By its bytes the second prompt has 34 tokens; it has 68."""
    long = Rule("long", Match(prompt_tokens=Range(50), counted_by="home"), ("home",))
    short = Rule("short", Match(prompt_tokens=Range(below=50), counted_by="home"), ("home",))
    home = deployment("home", zone="on_premises", tokenizer="tiktoken:o200k_base", window=100_000)
    world = World(policy((home,), rules=(long, short)))
    counter = TiktokenCounter(load_encoding("o200k_base"))
    world.path.serving = replace(world.path.serving, counters={"tiktoken:o200k_base": counter})
    world.ask(text)
    assert world.log.lines[0]["rule"] == rule


def test_a_policy_that_is_replaced_is_unused_once_its_last_request_is_closed() -> None:
    """However a request ends: answered, refused, or left by its client."""

    async def check() -> None:
        world = World(home=FakeBackend([STREAM]))
        reply = await world.reply(stream=True)
        await world.reply(model="nobody")
        unused = asyncio.create_task(world.door.unused())
        await asyncio.sleep(0)
        assert not unused.done()
        await anext(reply.chunks)
        await reply.close()
        await reply.close()
        await asyncio.wait_for(unused, 1)
        await asyncio.wait_for(world.door.unused(), 1)

    asyncio.run(check())


def test_what_a_key_labels_is_not_masked_away() -> None:
    home_or_masked = Invariant(
        "masked", frozenset({"personal"}), frozenset({"on_premises"}), mask=frozenset({"personal"})
    )
    world = World(policy([CLOUD, HOME], order_by="listed", invariants=[home_or_masked]))
    labelled = Caller("acme", "private", labels=frozenset({"personal"}))
    world.path.keyring = Keyring(
        [Key(digest_of("hg-plain"), Caller("acme", "plain")), Key(digest_of("hg-private"), labelled)]
    )
    masked, _ = world.ask(f"my card is {CARD}", {"x-api-key": "hg-plain"})
    assert dict(masked.headers)[b"x-hybridgate-deployment"] == b"cloud"
    assert dict(masked.headers)[b"x-hybridgate-masked"] == b"1"
    for text in (f"my card is {CARD}", "hi"):
        kept, _ = world.ask(text, {"x-api-key": "hg-private"})
        assert dict(kept.headers)[b"x-hybridgate-deployment"] == b"home"


class ManyBackends(FakeBackend):
    """A deployment of several replicas, each a fake of its own."""

    def __init__(self, replicas: dict[Replica, FakeBackend]) -> None:
        super().__init__()
        self.replicas = replicas

    async def open(self, call: Call) -> FakeAnswer:
        assert call.replica is not None
        self.calls.append(call)
        return await self.replicas[call.replica].open(call)


REPLICAS = [Replica(f"http://10.0.0.{number}:8000/v1") for number in range(3)]


def replicated(*scripts: Any) -> tuple[World, ManyBackends]:
    """A world whose home has replicas that answer with these scripts each."""
    home = ManyBackends({replica: FakeBackend([script]) for replica, script in zip(REPLICAS, scripts, strict=False)})
    world = World(home=home)
    world.fleet.follow("home", list(home.replicas))
    return world, home


@pytest.mark.parametrize(
    "error",
    [ConnectFailed("cannot be reached"), ConnectionLost("closed"), UpstreamOverloaded("full"), UpstreamFailed("500")],
)
def test_the_failure_of_a_replica_is_a_next_try_within_the_attempt(error: UpstreamError) -> None:
    world, _ = replicated(error, STREAM, STREAM)
    answers = [world.ask("x" * number, stream=True) for number in range(6)]
    assert all(reply.status == 200 for reply, _ in answers) and "cloud" not in world.called()
    (moved,) = [line for line in world.log.lines if "moved" in line]
    assert moved["moved"] == [{"deployment": "home", "replica": 0, "reason": error.message}]
    assert moved["attempts"] == 2 and "failed" not in moved and moved["replica"] in (1, 2)
    assert all(line["attempts"] == 1 for line in world.log.lines if line is not moved)
    assert [dict(reply.headers)[b"x-hybridgate-attempts"] for reply, _ in answers].count(b"2") == 1
    assert world.in_flight() == 0


def test_when_no_replica_takes_it_the_next_deployment_does() -> None:
    world, _ = replicated(*[ConnectFailed("cannot be reached")] * 3)
    reply, _ = world.ask(stream=True)
    (line,) = world.log.lines
    assert reply.status == 200 and line["deployment"] == "cloud" and "replica" not in line
    assert line["failed"] == {"home": "cannot be reached"} and line["attempts"] == 4
    assert sorted(moved["replica"] for moved in line["moved"]) != [0, 1, 2] and len(line["moved"]) == 2


def test_a_request_that_may_kill_an_engine_does_not_go_to_all_of_them() -> None:
    world, home = replicated(*[ConnectionLost("closed")] * 3)
    world.ask()
    assert len(home.calls) == 2 and world.log.lines[0]["deployment"] == "cloud"


def test_a_stream_that_breaks_off_is_not_moved() -> None:
    world, home = replicated(*[[Chunk(b"data: a\n\n"), UpstreamCut("broke off")]] * 3)
    _, data = world.ask(stream=True)
    assert b"upstream_cut" in data and len(home.calls) == 1 and world.log.lines[0]["outcome"] == "cut"


def test_a_conversation_stays_at_its_replica() -> None:
    world, home = replicated(*[STREAM] * 3)
    for _ in range(5):
        world.ask("What is the capital of France?", stream=True)
    assert len({call.replica for call in home.calls}) == 1
    for number in range(20):
        world.ask(f"Conversation {number}", stream=True)
    assert {call.replica for call in home.calls} == set(REPLICAS)


def test_all_replicas_together_have_the_time_of_one_attempt() -> None:
    world, home = replicated(*[[30.0]] * 3)
    world.path.serving = replace(
        world.path.serving, policy=policy([deployment("home", timeouts=Timeouts(first_token=0.05)), CLOUD])
    )
    reply, _ = world.ask(stream=True)
    assert len(home.calls) == 1 and world.log.lines[0]["failed"] == {"home": "no first token in time"}
    assert reply.status == 200
