"""Limits on the whole request path, with fake backends: who is refused and told what, where a request goes instead,
and what is booked however an attempt ends. No limit is ever exceeded."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission import RENEW_EVERY, RENEW_TOGETHER, Limiter
from gateway.answers import Books
from gateway.backends import Backends
from gateway.backends.base import Chunk
from gateway.chat import ChatPath
from gateway.errors import (
    ConnectFailed,
    UpstreamCut,
    UpstreamError,
    UpstreamErrored,
    UpstreamFailed,
    UpstreamOverloaded,
    UpstreamRejected,
    UpstreamTimeout,
)
from gateway.fleet import Fleet
from gateway.held import LEASE, Held
from gateway.keys import Key, Keyring, digest_of
from gateway.labels import Scanner
from gateway.ledger import Hold, LedgerUnavailable, MemoryLedger, Refused, Reservation, Spent
from gateway.limits import Allowance, CallerLimits, Counted, DeploymentLimits, Limits, OnDown
from gateway.ratelimit import duration
from gateway.record import recorded
from gateway.reply import Reply
from gateway.routing import decide
from gateway.serving import Serving
from gateway.types import Caller, Deployment, Price, RequestFacts, TokenCount, Usage
from tests.fakes import STREAM, FakeBackend, Ids, Log, deployment, policy

BEGAN = datetime(2026, 11, 26, 22, 30, tzinfo=UTC).timestamp()
PRICE = Price(1000.0, 2000.0)  # nano-dollars a token
NEAR = deployment("near", zone="on_premises", price=PRICE)
FAR = deployment("far", price=PRICE)


def limits(strict: bool = False, on_down: OnDown = "local_share", /, **most: int) -> Limits:
    names: Mapping[str, Counted] = {
        "rpm": "requests_per_minute",
        "tpm": "tokens_per_minute",
        "open": "concurrent_requests",
        "tpd": "tokens_per_day",
        "day": "usd_per_day",
        "month": "usd_per_month",
    }
    return Limits(tuple(Allowance(names[name], value, on_down) for name, value in most.items()), strict)


class Seconds:
    """A clock that stands still until it is moved."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Told(MemoryLedger):
    """A ledger that remembers what became of each reservation: None while it is open, else what was booked."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, Reservation] = {}
        self.ended: dict[str, list[Spent | None]] = {}
        self.slow: asyncio.Event | None = None  # what settling waits for

    async def settle(self, reservation: Reservation, spent: Spent, now: float) -> bool:
        if self.slow is not None:
            await self.slow.wait()
        return await super().settle(reservation, spent, now)

    async def reserve(
        self, id: str, holds: Sequence[Hold], lease_s: float, now: float, within: float | None = None
    ) -> Reservation | Refused:
        made = await super().reserve(id, holds, lease_s, now, within)
        if isinstance(made, Reservation):
            self.made[id] = made
        return made

    def end(self, reservation: Reservation, spent: Spent | None, now: float) -> bool:
        self.ended.setdefault(reservation.id, []).append(spent)
        return super().end(reservation, spent, now)

    def used(self, account: str) -> int:
        """What is taken of an account as it stands."""
        (limit,) = {h.limit for made in self.made.values() for h in made.holds if h.limit.account == account}
        return self._accounts[account].at(limit, int(BEGAN * 1000))[0]


class World:
    """A request path over fakes for one key, and what they saw."""

    def __init__(
        self,
        caller: CallerLimits | None = None,
        of: Mapping[str, DeploymentLimits] | None = None,
        deployments: Sequence[Deployment] = (NEAR, FAR),
        /,
        **backends: FakeBackend,
    ) -> None:
        p = replace(policy(deployments, order_by="listed"), limits=of or {})
        self.backends = {name: backends.get(name, FakeBackend()) for name in p.deployments}
        self.wall, self.clock, self.log, self.ledger = Seconds(BEGAN), Seconds(1000.0), Log(), Told()
        self.fleet = Fleet(p.deployments)
        self.limiter = Limiter(self.ledger, self.fleet, self.clock, self.wall)
        books = Books(self.fleet, self.log, lambda _: None, self.clock)
        serving = Serving(p, Scanner(p.kinds), {}, Backends(self.backends))
        ring = Keyring([Key(digest_of("hg-crm"), Caller("acme", "crm", limits=caller))])
        self.path = ChatPath(serving, self.fleet, books, self.limiter, self.clock, self.wall, Ids(), ring)

    def passes(self, seconds: float) -> None:
        """Time does."""
        self.clock.now += seconds
        self.wall.now += seconds

    async def reply(self, **body: Any) -> Reply:
        document = {"messages": [{"role": "user", "content": "hi"}], **body}
        return await self.path.complete({"x-api-key": "hg-crm"}, orjson.dumps(document))

    async def answer(self, **body: Any) -> tuple[Reply, bytes]:
        reply = await self.reply(**body)
        data = b"".join([chunk.data async for chunk in reply.chunks])
        await reply.close()
        return reply, data

    def ask(self, **body: Any) -> tuple[int, dict[bytes, bytes], bytes]:
        """Status, headers and body, as a client that stays to the end sees them."""
        reply, data = asyncio.run(self.answer(**body))
        return reply.status, dict(reply.headers), data

    def called(self) -> list[str]:
        return [name for name, backend in self.backends.items() for _ in backend.calls]

    def booked(self) -> list[Spent | None]:
        """Of every attempt, in order."""
        ended = self.ledger.ended
        assert ended.keys() == self.ledger.made.keys() and all(len(ends) == 1 for ends in ended.values())
        return [ends[0] for ends in ended.values()]


def key(strict: bool = False, /, **most: int) -> CallerLimits:
    return CallerLimits(key=limits(strict, **most))


def error_of(data: bytes) -> dict[str, Any]:
    error: dict[str, Any] = orjson.loads(data)["error"]
    return error


CENT = 10_000_000


@pytest.mark.parametrize(
    ("caller", "status", "code", "says"),
    [
        (key(rpm=1), 429, "rate_limit_exceeded", "key crm may use 1 request a minute: try again in 62 s"),
        (key(tpm=130), 429, "rate_limit_exceeded", "key crm may use 130 tokens a minute; 12 of them are taken"),
        (key(tpd=130), 429, "rate_limit_exceeded", "begins anew at 2026-11-27 00:00 UTC"),
        (CallerLimits(tenant=limits(rpm=1)), 429, "rate_limit_exceeded", "tenant acme may use 1 request a minute"),
        (CallerLimits(deployments={"near": limits(rpm=1)}), 200, None, ""),
        (key(day=240_000), 402, "budget_spent", "key crm may spend 0.00024 USD a day; 0.000019 USD of it are spent"),
        (key(month=240_000), 402, "budget_spent", "begins anew at 2026-12-01 00:00 UTC"),
    ],
)
def test_a_caller_whose_limit_is_used_up_is_told_which_and_until_when(
    caller: CallerLimits, status: int, code: str | None, says: str
) -> None:
    world = World(caller)
    assert world.ask()[0] == 200
    got, headers, data = world.ask(max_tokens=110)
    assert got == status, data
    if code is not None:
        assert error_of(data)["code"] == code and says in error_of(data)["message"], data
        assert int(headers[b"retry-after"]) >= 1 and world.called() == ["near"]
        assert world.log.lines[-1]["outcome"] == code
    else:
        assert headers[b"x-hybridgate-deployment"] == b"far", "a limit of the key on one deployment: another answers"


@pytest.mark.parametrize(
    ("caller", "says"),
    [
        (key(tpm=50), "key crm may use 50 tokens a minute, and this request alone may take 112"),
        (key(day=1000), "key crm may spend 0.000001 USD a day, and this request alone may take 0.0002"),
        (key(True, day=1000), "ask for less, such as by max_tokens"),
    ],
)
def test_what_can_never_fit_is_refused_for_good(caller: CallerLimits, says: str) -> None:
    status, headers, data = World(caller).ask()
    assert (status, error_of(data)["code"]) == (400, "exceeds_limit") and says in error_of(data)["message"]
    assert b"retry-after" not in headers


@pytest.mark.parametrize("caller", [key(True, day=CENT), key(tpm=130), key(day=CENT), key(True, tpm=130)])
@pytest.mark.parametrize("asked", [2**53, 2**63 - 1])
def test_a_number_beyond_all_counting_never_fits(caller: CallerLimits, asked: int) -> None:
    world = World(caller, None, (deployment("near", price=PRICE, window=None),))
    status, _, data = world.ask(max_tokens=asked, n=4)
    assert (status, error_of(data)["code"]) == (400, "exceeds_limit") and not world.called()


def test_headers_say_what_is_left_of_the_tightest_limits() -> None:
    world = World(CallerLimits(key=limits(rpm=3, tpm=1000), tenant=limits(rpm=2, tpm=2000)))
    world.wall.now += 0.25
    _, headers, _ = world.ask()
    assert {name: value for name, value in headers.items() if name.startswith(b"x-ratelimit")} == {
        b"x-ratelimit-limit-requests": b"2",
        b"x-ratelimit-remaining-requests": b"1",
        b"x-ratelimit-reset-requests": b"1m2s",
        b"x-ratelimit-limit-tokens": b"1000",
        b"x-ratelimit-remaining-tokens": b"%d" % (1000 - 100 - PROMPT),
        b"x-ratelimit-reset-tokens": b"1m2s",
    }
    world.ask()
    status, headers, _ = world.ask()
    assert status == 429 and headers[b"x-ratelimit-remaining-requests"] == b"0"
    assert headers[b"x-ratelimit-reset-requests"] == b"1m2s" and headers[b"retry-after"] == b"62"


class Knows(Told):
    """A ledger that refuses by the last limit, and knows so much of what is taken."""

    def __init__(self, used: tuple[int | None, ...], unchecked: bool) -> None:
        super().__init__()
        self._told = used, unchecked

    async def reserve(
        self, id: str, holds: Sequence[Hold], lease_s: float, now: float, within: float | None = None
    ) -> Reservation | Refused:
        used, unchecked = self._told
        return Refused(holds[-1], 30_000, used, unchecked)


@pytest.mark.parametrize(
    ("used", "unchecked", "status", "left"),
    [
        ((3, 0), False, 429, {b"requests": b"2", b"tokens": b"100"}),
        ((None, 20), False, 429, {b"tokens": b"80"}),
        ((None, None), True, 503, {}),
    ],
)
def test_headers_say_nothing_of_limits_of_which_nobody_knows_what_is_left(
    used: tuple[int | None, ...], unchecked: bool, status: int, left: Mapping[bytes, bytes]
) -> None:
    world = World(CallerLimits(limits(rpm=5), limits(tpm=100)))
    world.limiter.ledger = Knows(used, unchecked)
    got, headers, _ = world.ask()
    prefix = b"x-ratelimit-remaining-"
    assert got == status
    assert {name.removeprefix(prefix): value for name, value in headers.items() if name.startswith(prefix)} == left


class Standing(Told):
    """A ledger's process that stands still, so many seconds each time, between what it reserves and the reply."""

    def __init__(self, world: World, seconds: Sequence[float]) -> None:
        super().__init__()
        self._world = world
        self._seconds = [*seconds]

    async def reserve(
        self, id: str, holds: Sequence[Hold], lease_s: float, now: float, within: float | None = None
    ) -> Reservation | Refused:
        assert within is not None and within > 0, "standing still is no wait for the ledger"
        made = await super().reserve(id, holds, lease_s, now, within)
        self._world.passes(self._seconds.pop(0))
        return made


@pytest.mark.parametrize(
    ("seconds", "status", "booked"),
    [
        ([0.5], 200, [Spent(12, 19_000)]),
        ([0.51, 0.0], 200, [None, Spent(12, 19_000)]),
        ([5.0, 0.4], 200, [None, Spent(12, 19_000)]),
        ([5.0, 0.6], 503, [None, None]),
    ],
)
def test_what_was_set_aside_before_the_process_stood_still_is_set_aside_anew_before_the_call(
    seconds: Sequence[float], status: int, booked: Sequence[Spent | None]
) -> None:
    world = World(key(rpm=1))
    world.ledger = ledger = Standing(world, seconds)
    world.limiter.ledger = ledger
    got, headers, data = world.ask()
    assert got == status and [ends for (ends,) in ledger.ended.values()] == booked
    last = [*ledger.made.values()][-1]
    assert last.until_ms == int((BEGAN + sum(seconds[:-1]) + LEASE) * 1000), "the call is counted when it is sent"
    if status == 503:
        assert error_of(data)["code"] == "limits_unavailable" and headers[b"retry-after"] == b"1"
    assert len(world.called()) == (status == 200) and not world.limiter.open


@pytest.mark.parametrize(
    "caller",
    [
        key(open=1),
        key(day=CENT, month=CENT),
        key(tpd=1000),
        CallerLimits(key=limits(False, "open", rpm=1, tpm=1000)),
    ],
)
def test_whoever_has_no_limits_a_minute_or_open_ones_is_not_refused_because_the_process_stood_still(
    caller: CallerLimits,
) -> None:
    world = World(caller)
    world.ledger = ledger = Standing(world, [5.0, 5.0])
    world.limiter.ledger = ledger
    got, _, _ = world.ask()
    assert got == 200 and world.booked()[-1] == Spent(12, 19_000) and not any(world.booked()[:-1])


@pytest.mark.parametrize(("passes", "times"), [(0.5, 1), (0.51, 2)])
def test_what_was_set_aside_while_an_answer_was_looked_for_is_set_aside_anew_where_that_took_long(
    passes: float, times: int
) -> None:
    async def check() -> None:
        world = World(key(rpm=1))
        facts = RequestFacts("auto", "acme", key_id="crm", prompt=TokenCount(2, 2))
        asking = world.limiter.asking(Caller("acme", "crm", limits=key(rpm=1)), {}, facts, "d")
        assert asking is not None
        asking.begin(NEAR)
        await asyncio.sleep(0)
        world.passes(passes)
        held = await asking.hold(NEAR)
        assert isinstance(held, Held) and not held.late and held.reservation.id == f"d.{times}"
        assert len(world.ledger.made) == times and len(world.limiter.open) == 1

    asyncio.run(check())


PROMPT = 12  # as estimated
STREAMED = 15  # where the body has a field more


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0, "0ms"), (120, "120ms"), (1500, "1.5s"), (59_999, "59.999s"), (360_000, "6m0s"), (3_723_001, "1h2m4s")],
)
def test_durations_are_written_as_openai_does(ms: int, text: str) -> None:
    assert duration(ms) == text


def test_a_deployment_whose_limit_is_used_up_is_passed_over_and_the_record_says_so() -> None:
    world = World(None, {"near": DeploymentLimits(all=limits(rpm=1))})
    assert [world.ask()[1][b"x-hybridgate-deployment"] for _ in range(3)] == [b"near", b"far", b"far"]
    line = orjson.loads(orjson.dumps(world.log.lines[1]))
    assert (
        line["rejected"] == {"near": "limit"}
        and "deployment near may use 1 request a minute" in line["full"]["near"][0]
    )
    record = recorded(line)
    assert record is not None
    again = decide(world.path.serving.policy, record.facts, record.snapshot_of(world.path.serving.policy.deployments))
    assert tuple(c.deployment for c in again.candidates) == record.candidates == ("far",)


def test_where_every_deployment_is_full_the_caller_is_told_when_to_ask_again() -> None:
    world = World(None, {name: DeploymentLimits(all=limits(rpm=1)) for name in ("near", "far")})
    assert [world.ask()[0] for _ in range(2)] == [200, 200]
    status, headers, data = world.ask()
    assert status == 503 and error_of(data)["code"] == "no_deployment_available" and headers[b"retry-after"]


def test_each_key_has_its_own_share_of_a_deployment() -> None:
    world = World(None, {"near": DeploymentLimits(each_key=limits(open=1))})

    async def check() -> None:
        first = await world.reply()
        second = await world.reply()
        assert [dict(r.headers)[b"x-hybridgate-deployment"] for r in (first, second)] == [b"near", b"far"]
        await first.close()
        await second.close()
        assert dict((await world.reply()).headers)[b"x-hybridgate-deployment"] == b"near"

    asyncio.run(check())


def test_a_spent_budget_leaves_what_costs_nothing() -> None:
    free = deployment("free", price=Price(0.0, 0.0))
    world = World(key(day=250_000), None, (NEAR, free))
    assert [world.ask()[1][b"x-hybridgate-deployment"] for _ in range(2)] == [b"near", b"near"]
    world.ledger.end(next(iter(world.ledger.made.values())), None, BEGAN)
    spent = World(key(day=110_000), None, (NEAR, free))
    assert spent.ask(max_tokens=60)[1][b"x-hybridgate-deployment"] == b"free", "near may cost more than there is"


def test_a_strict_budget_reserves_the_worst_case_and_bounds_what_is_not_bounded() -> None:
    world = World(key(True, day=CENT))
    world.ask()
    (made,) = world.ledger.made.values()
    call = world.backends["near"].calls[0]
    assert call.imposed_max_tokens == 100 and made.holds[0].amount >= 100 * 2000
    world.ask(max_tokens=9)
    assert world.backends["near"].calls[1].imposed_max_tokens is None
    unpriced = World(key(True, day=CENT), None, (deployment("near", price=None), FAR))
    assert unpriced.ask()[1][b"x-hybridgate-deployment"] == b"far", "what has no price cannot keep a strict budget"


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a/b.png"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]},
        {"previous_response_id": "r"},
    ],
)
def test_a_strict_budget_reserves_the_whole_window_for_what_nobody_can_count(body: dict[str, Any]) -> None:
    seeing = replace(NEAR, window=64_000, capabilities=NEAR.capabilities | {"images"})
    world = World(key(True, tpd=10**6, day=100 * CENT), None, (seeing,))
    world.ask(max_tokens=10, **body)
    (made,) = world.ledger.made.values()
    assert [hold.amount for hold in made.holds] == [64_000 + 10, 64_000 * 1000 + 10 * 2000]
    boundless = World(key(True, day=100 * CENT), None, (replace(seeing, window=None), replace(seeing, name="far")))
    assert boundless.ask(max_tokens=10, **body)[1][b"x-hybridgate-deployment"] == b"far"


def test_what_is_set_aside_is_learned_from_the_callers_answers() -> None:
    world = World(key(tpm=10_000))
    for _ in range(30):
        world.ask()
        world.wall.now += 62
    last = list(world.ledger.made.values())[-1]
    assert PROMPT + 7 <= last.holds[0].amount <= PROMPT + 8, "7 tokens each, not the 100 that a stranger may take"


@pytest.mark.parametrize(
    ("script", "stays", "booked"),
    [
        ("plain", True, [Spent(12, 19_000)]),
        (STREAM, True, [Spent(7, 9_000)]),
        ([STREAM[0], UpstreamCut("x")], True, [Spent(STREAMED + 100, 215_000)]),
        (STREAM, False, [Spent(STREAMED + 100, 215_000)]),
        (ConnectFailed("x"), True, [None, Spent(12, 19_000)]),
        (UpstreamOverloaded("x"), True, [Spent(0, 0, request=False), Spent(12, 19_000)]),
        (UpstreamErrored("x"), True, [Spent(0, 0, request=False), Spent(12, 19_000)]),
        (UpstreamTimeout("x"), True, [Spent(STREAMED + 100, 215_000, request=False), Spent(12, 19_000)]),
        (UpstreamFailed("x"), True, [Spent(STREAMED + 100, 215_000, request=False), Spent(12, 19_000)]),
        (UpstreamRejected("x", upstream_status=400), True, [Spent(0, 0)]),
    ],
)
def test_each_end_of_an_attempt_is_booked_once_as_what_it_was(
    script: Any, stays: bool, booked: list[Spent | None]
) -> None:
    scripts = [] if script == "plain" else [script]
    there = {"near": DeploymentLimits(all=limits(open=9, rpm=9))}
    world = World(key(rpm=9, tpm=999, day=CENT), there, near=FakeBackend(scripts))

    async def run() -> None:
        reply = await world.reply(stream=isinstance(script, list))
        if stays:
            async for _ in reply.chunks:
                pass
        else:
            await anext(reply.chunks)
        await reply.close()
        await reply.close()

    asyncio.run(run())
    assert world.booked() == booked
    assert world.ledger.used("key:crm requests/min") == 1, "however many attempts, it is one request"
    assert world.ledger.used("deployment:near concurrent") == 0
    assert world.ledger.used("deployment:near requests/min") == (0 if booked[0] is None else 1)


def test_a_client_that_leaves_before_the_first_token_is_booked_as_reserved() -> None:
    world = World(key(tpm=999, open=1), None, near=FakeBackend([[5.0]]))

    async def run() -> None:
        asking = asyncio.create_task(world.reply())
        await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(run())
    assert world.booked() == [Spent(PROMPT + 100, PROMPT * 1000)] and world.ledger.used("key:crm concurrent") == 0


def test_a_client_that_leaves_while_a_failed_attempt_is_told_leaves_it_booked_and_recorded() -> None:
    world = World(key(tpm=999, open=1), None, near=FakeBackend([UpstreamTimeout("late")]))

    async def run() -> None:
        world.ledger.slow = asyncio.Event()
        asking = asyncio.create_task(world.reply())
        await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(run())
    (booked,) = world.booked()
    assert booked is not None and booked.tokens == PROMPT + 100
    assert world.ledger.used("key:crm concurrent") == 0
    assert world.log.lines[-1]["failed"] == {"near": "late"}, "the invoice has what the ledger has"


def test_accounts_hold_nothing_of_a_request_and_no_secret() -> None:
    world = World(
        CallerLimits(limits(rpm=9), limits(day=CENT), {"near": limits(tpm=999)}),
        {"near": DeploymentLimits(limits(open=3), limits(rpm=3))},
    )
    world.ask(user="someone")
    assert sorted(hold.limit.account for hold in next(iter(world.ledger.made.values())).holds) == [
        "deployment:near concurrent",
        "each key:crm deployment:near requests/min",
        "key:crm deployment:near tokens/min",
        "key:crm requests/min",
        "tenant:acme usd/day",
    ]


def test_where_nothing_is_limited_the_ledger_is_not_asked() -> None:
    elsewhere = {"far": DeploymentLimits(all=limits(rpm=1))}
    for world in (World(), World(None, elsewhere), World(CallerLimits(deployments={"far": limits(rpm=1)}))):
        assert world.ask()[0] == 200 and not world.ledger.made


def test_a_long_stream_keeps_its_slot() -> None:
    world = World(key(open=1), None, near=FakeBackend([STREAM]))

    async def run() -> None:
        reply = await world.reply(stream=True)
        for _ in range(4):
            world.wall.now += LEASE / 3
            await world.limiter.renew_now()
        assert (await world.reply()).status == 429
        await reply.close()
        assert (await world.reply()).status == 200

    asyncio.run(run())


def test_thousands_of_long_streams_are_renewed_a_few_at_a_time() -> None:
    class Crowded(Told):
        """Answers later, and no more than a few who ask at once."""

        asking = 0

        async def renew(self, reservation: Reservation, lease_s: float, now: float) -> bool:
            self.asking += 1
            try:
                if self.asking > 2 * RENEW_TOGETHER:
                    raise LedgerUnavailable("too much is waiting for it")
                await asyncio.sleep(0)
                return await super().renew(reservation, lease_s, now)
            finally:
                self.asking -= 1

    many = 10 * RENEW_TOGETHER
    world = World(key(open=many), None, near=FakeBackend([STREAM] * many))
    world.ledger = world.limiter.ledger = Crowded()

    async def run() -> None:
        for _ in range(many):
            assert (await world.reply(stream=True)).status == 200
        for _ in range(4):
            world.wall.now += LEASE / 3
            await world.limiter.renew_now()
        assert (await world.reply()).status == 429, "none has lost its slot"

    asyncio.run(run())


# Whatever happens.

_scripts = st.one_of(
    st.sampled_from(["connect", "full", "errored", "timeout", "failed", "rejected"]),
    st.tuples(st.integers(0, 3), st.integers(0, 50), st.sampled_from(["ends", "cut", "no usage"])),
)
_events = st.one_of(
    st.tuples(st.just("ask"), st.booleans(), st.integers(1, 50) | st.none()),
    st.tuples(st.just("read"), st.integers(0, 9)),
    st.tuples(st.just("leave"), st.integers(0, 9)),
    st.tuples(st.just("wait"), st.integers(1, 4)),
)
_FAILURES: Mapping[str, UpstreamError] = {
    "connect": ConnectFailed("x"),
    "full": UpstreamOverloaded("x"),
    "errored": UpstreamErrored("x"),
    "timeout": UpstreamTimeout("x"),
    "failed": UpstreamFailed("x"),
    "rejected": UpstreamRejected("x", upstream_status=400),
}
SENT = 12  # tokens that a prompt really has


class Provider(FakeBackend):
    """Counts what it writes and bills, at every moment. `calls_at`: when each call came that got through."""

    def __init__(self, plan: list[Any], wall: Seconds) -> None:
        super().__init__()
        self.plan, self.wall = plan, wall
        self.billed_nusd = 0
        self.calls_at: list[float] = []

    async def open(self, call: Any) -> Any:
        planned = self.plan.pop(0) if self.plan else (2, 9, "ends")
        if planned != "connect":
            self.calls_at.append(self.wall.now)
        most = call.chat.max_tokens or call.imposed_max_tokens or 100
        if isinstance(planned, str):
            if planned in ("timeout", "failed"):
                self.billed_nusd += PRICE.of(SENT, most)  # it wrote all of it, and nobody read it
            self.scripts.append(_FAILURES[planned])
        else:
            chunks, output, end = planned
            output = min(output, most)
            self.billed_nusd += PRICE.of(SENT, output)
            last = Chunk(b"z", usage=None if end == "no usage" else Usage(SENT, output), last=True)
            body = [Chunk(b"x") for _ in range(min(chunks, output))]
            self.scripts.append([Chunk(b"a"), *body, UpstreamCut("x") if end == "cut" else last])
        return await super().open(call)


@settings(deadline=None, max_examples=150)
@given(st.lists(_scripts, max_size=20), st.lists(_events, max_size=30))
def test_no_limit_is_ever_exceeded_and_everything_ends_once(plan: list[Any], events: list[Any]) -> None:
    budget, rpm, most_open, there_rpm = 2_000_000, 6, 3, 4
    caller = CallerLimits(limits(True, day=budget), limits(rpm=rpm, open=most_open))
    world = World(caller, {"near": DeploymentLimits(all=limits(rpm=there_rpm, open=2))})
    providers = {name: Provider(plan if name == "near" else plan[1::2], world.wall) for name in ("near", "far")}
    world.backends |= providers
    world.path.serving = replace(world.path.serving, backends=Backends(dict(providers)))

    async def run() -> None:
        open_: list[Reply] = []
        answered: list[float] = []
        for event, *values in events:
            if event == "ask":
                stream, most = values
                reply = await world.reply(stream=stream, **({} if most is None else {"max_tokens": most}))
                if reply.status in (200, 400):
                    answered.append(world.wall.now)
                open_.append(reply)
            elif event == "wait":
                for _ in range(values[0]):
                    world.wall.now += RENEW_EVERY
                    world.clock.now += RENEW_EVERY
                    await world.limiter.renew_now()
            elif open_:
                reply = open_[values[0] % len(open_)]
                ended = event == "leave"
                if not ended:
                    try:
                        await anext(reply.chunks)
                    except StopAsyncIteration:
                        ended = True
                if ended:
                    open_.remove(reply)
                    await reply.close()
            held = world.limiter.open
            assert len(held) <= most_open and sum(h.deployment.name == "near" for h in held) <= 2
            assert sum(p.billed_nusd for p in providers.values()) <= budget
            for times, limit in ((answered, rpm), (providers["near"].calls_at, there_rpm)):
                assert all(sum(begin <= t < begin + 60 for t in times) <= limit for begin in times)
        for reply in open_:
            await reply.close()

    asyncio.run(run())
    booked = world.booked()
    assert not world.limiter.open
    assert sum(p.billed_nusd for p in providers.values()) <= sum(spent.nusd for spent in booked if spent) <= budget
