"""Stored answers and limits together: what is reserved while an answer is looked for goes on as a call, as a hit or not
at all, and never stays behind, whatever comes in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission import PATIENCE
from gateway.answers import Books
from gateway.backends.base import Chunk
from gateway.cache import CacheUnavailable, Chosen, Claim, Entry, Figures, MemoryCache
from gateway.caching import Answers
from gateway.decision import Caching
from gateway.errors import ConnectFailed, UpstreamError, UpstreamErrored, UpstreamTimeout
from gateway.ledger import Hold, Refused, Reservation, Spent
from gateway.limits import CallerLimits, DeploymentLimits
from gateway.store import TIMEOUT
from gateway.telemetry import Record
from gateway.types import Usage
from tests.fakes import STREAM, FakeBackend, Ids, completion
from tests.gateway import test_admission
from tests.gateway.test_admission import CENT, Told, error_of, key, limits
from tests.gateway.test_cache_path import stream

ALWAYS = Caching(60.0, "always")
Said = Entry | Claim | None


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


@dataclass
class Shared:
    """A cache that replicas share. Says what it is told to, each time after so many turns of the event loop (None: it
    cannot be asked), and then what it has; `elsewhere`: another replica makes all that is not there."""

    says: list[tuple[int, Said]] = field(default_factory=list)
    claims: dict[bytes, str] = field(default_factory=dict)
    kept: dict[bytes, Entry] = field(default_factory=dict)
    asked: int = 0
    elsewhere: bool = False

    async def get(self, key: bytes, now: float) -> Entry | None:
        return self.kept.get(key)

    async def claim(self, key: bytes, token: str, now: float) -> Entry | Claim:
        self.asked += 1
        after, said = self.says.pop(0) if self.says else (1, self._known(key, token))
        try:
            await turns(after)
        except asyncio.CancelledError:  # its lease ends: nobody knows of the claim
            if self.claims.get(key) == token:
                del self.claims[key]
            raise
        if said is None:
            raise CacheUnavailable
        return said

    def _known(self, key: bytes, token: str) -> Entry | Claim:
        if key in self.kept:
            return self.kept[key]
        return "taken" if self.elsewhere or self.claims.setdefault(key, token) != token else "won"

    async def renew(self, key: bytes, token: str) -> None: ...

    async def release(self, key: bytes, token: str) -> None:
        await turns(1)
        if self.claims.get(key) == token:
            del self.claims[key]

    async def put(self, key: bytes, entry: Entry, ttl: float, now: float, token: str = "") -> bool:
        await self.release(key, token)
        self.kept[key] = entry
        return True

    async def purge(self, chosen: Chosen) -> int:
        return 0

    async def figures(self, now: float) -> Figures:
        return Figures(0, 0, {})


class Slow(Told):
    """A ledger that takes so many turns of the event loop before and after it reserves, or does not know (None), and
    whose process stands still for so many seconds before the reply. What is reserved for somebody who has gone is
    undone, as the shared one does it."""

    def __init__(self, passes: Callable[[float], None]) -> None:
        super().__init__()
        self.passes = passes
        self.takes: list[tuple[int, int] | None] = []
        self.stands: list[float] = []
        self.asked: list[float | None] = []

    async def reserve(
        self, id: str, holds: Sequence[Hold], lease_s: float, now: float, within: float | None = None
    ) -> Reservation | Refused:
        self.asked.append(within)
        takes = self.takes.pop(0) if self.takes else (0, 1)
        if takes is None:
            await turns(2)
            return Refused(holds[0], 1000, (None,) * len(holds), unchecked=True)
        await turns(takes[0])
        made = await super().reserve(id, holds, lease_s, now, within)
        self.passes(self.stands.pop(0) if self.stands else 0.0)
        try:
            await turns(takes[1])
        except asyncio.CancelledError:
            if isinstance(made, Reservation):
                self.end(made, None, now)
            raise
        return made

    async def settle(self, reservation: Reservation, spent: Spent, now: float) -> bool:
        await turns(1)
        return await super().settle(reservation, spent, now)

    async def release(self, reservation: Reservation, now: float) -> bool:
        await turns(1)
        return await super().release(reservation, now)


class World(test_admission.World):
    """A request path over fakes for one key, with a cache that replicas share."""

    def __init__(
        self,
        caller: CallerLimits | None = None,
        of: Mapping[str, DeploymentLimits] | None = None,
        /,
        **backends: FakeBackend,
    ) -> None:
        super().__init__(caller, of, **backends)
        self.slow = self.ledger = self.limiter.ledger = Slow(self.passes)
        self.records: list[Record] = []
        self.cache = Shared()
        self.answers = Answers(MemoryCache(10, 10**6, 10**5), self.wall, Ids(1 << 40), self.cache)
        serving = self.path.serving
        p = replace(serving.policy, default=replace(serving.policy.default, cache=ALWAYS))
        self.path.serving = replace(serving, policy=p)
        self.path.answers = self.answers
        self.path.books = Books(self.fleet, self.log, self.records.append, self.clock)

    async def get(self, text: str = "hi", **body: Any) -> tuple[dict[bytes, bytes], bytes]:
        reply, data = await self.answer(messages=[{"role": "user", "content": text}], **body)
        await self.settled()
        return dict(reply.headers), data

    async def settled(self) -> None:
        await self.answers.flights.settled()
        await turns(5)

    def taken(self, account: str) -> int:
        """What is taken of an account; 0 where nothing ever was."""
        known = any(hold.limit.account == account for made in self.ledger.made.values() for hold in made.holds)
        return self.ledger.used(account) if known else 0


def run(check: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(20):
            await check()

    asyncio.run(whole())


ALL = key(rpm=100, tpm=10_000, open=50, day=CENT)
THERE = {"near": DeploymentLimits(all=limits(rpm=100, open=50))}
ENTRY = Entry(
    "acme", "auto", "near", "on_premises", "openai near-model none", 1_790_000_000.0, Usage(5, 7), completion("stored")
)


def stored(world: World) -> Entry:
    return replace(ENTRY, stored_at=world.wall())


def test_a_miss_goes_on_with_what_was_reserved_while_it_looked() -> None:
    world = World(ALL, THERE)

    async def check() -> None:
        headers, _ = await world.get()
        assert headers[b"x-hybridgate-cache"] == b"miss" and len(world.ledger.made) == 1
        assert world.booked() == [Spent(12, 19_000)] and headers[b"x-ratelimit-remaining-tokens"] == b"9888"
        assert not world.limiter.open and not world.cache.claims

    run(check)


def test_a_hit_counts_as_a_request_of_its_caller_and_takes_nothing_else() -> None:
    world = World(ALL, THERE)

    async def check() -> None:
        world.cache.says = [(3, stored(world)) for _ in range(4)]
        for number in range(1, 5):
            headers, data = await world.get(stream=number % 2 == 0)
            assert headers[b"x-hybridgate-cache"] == b"hit" and b"stored" in data
            assert headers[b"x-ratelimit-remaining-requests"] == b"%d" % (100 - number)
            assert b"x-ratelimit-limit-tokens" not in headers, "none of which it takes"
        assert len(world.ledger.made) == 4, "one each"
        assert world.taken("key:crm requests/min") == 4 and not world.called()
        for account in ("key:crm tokens/min", "key:crm usd/day", "key:crm concurrent", "deployment:near requests/min"):
            assert world.taken(account) == 0, account
        assert world.taken("deployment:near concurrent") == 0 and not world.limiter.open

    run(check)


@pytest.mark.parametrize(("hit", "reservations"), [(True, 1), (False, 2)])
def test_a_stored_answer_waits_for_no_other_reservation_where_the_process_stood_still(
    hit: bool, reservations: int
) -> None:
    world = World(ALL, THERE)
    world.slow.stands = [5.0, 0.0] if not hit else [5.0, 5.0]

    async def check() -> None:
        world.cache.says = [(1, stored(world) if hit else "won")]
        headers, _ = await world.get()
        assert headers[b"x-hybridgate-cache"] == (b"hit" if hit else b"miss")
        assert len(world.ledger.made) == reservations and len(world.called()) == (not hit)
        assert world.taken("key:crm requests/min") == 1 and not world.limiter.open

    run(check)


@pytest.mark.parametrize(
    ("caller", "of"),
    [
        (key(rpm=10, tpm=20), {}),
        (key(rpm=10, day=1000), {}),
        (key(rpm=10, tpm=20, open=1), {}),
        (key(rpm=10), {name: DeploymentLimits(all=limits(tpm=20)) for name in ("near", "far")}),
        (key(tpm=20), {}),
    ],
)
def test_who_could_make_no_call_gets_a_stored_answer_all_the_same(
    caller: CallerLimits, of: Mapping[str, DeploymentLimits]
) -> None:
    world = World(caller, of)

    async def check() -> None:
        world.cache.says = [(1, stored(world)), (1, stored(world)), (1, "won")]
        for _ in range(2):
            assert (await world.get())[0][b"x-hybridgate-cache"] == b"hit"
        assert b"error" in (await world.get())[1] and not world.called()
        assert world.taken("key:crm requests/min") == (2 if caller.key and len(caller.key.allowances) > 1 else 0) or of
        assert not world.limiter.open

    run(check)


@pytest.mark.parametrize("said", ["stored", "won", "taken"])
def test_whoever_may_not_ask_now_is_refused_whatever_is_stored(said: str) -> None:
    world = World(key(rpm=1, tpm=10_000))

    async def check() -> None:
        await world.get("first")
        world.cache.says = [(2, stored(world) if said == "stored" else said)]  # type: ignore[list-item]
        for _ in range(2):
            headers, data = await world.get()
            assert error_of(data)["code"] == "rate_limit_exceeded" and b"retry-after" in headers
        assert len(world.called()) == 1 and not world.limiter.open and not world.cache.claims
        assert len(world.slow.asked) == 3, "once for each"
        assert not len(world.answers.flights)

    run(check)


def test_who_waits_for_another_replica_has_a_request_open_and_nothing_of_a_deployment() -> None:
    world = World(ALL, THERE)

    async def check() -> None:
        world.cache.elsewhere = True
        asking = asyncio.create_task(world.get())
        while world.cache.asked < 3:  # noqa: ASYNC110 - without an event
            await asyncio.sleep(0.01)
        assert world.taken("key:crm concurrent") == 1 and world.taken("key:crm requests/min") == 1
        for account in ("key:crm tokens/min", "key:crm usd/day", "deployment:near concurrent"):
            assert world.taken(account) == 0, account
        world.cache.says = [(1, stored(world))]
        headers, _ = await asking
        assert headers[b"x-hybridgate-cache"] == b"hit" and world.taken("key:crm requests/min") == 1
        assert world.taken("key:crm concurrent") == 0 and not world.limiter.open

    run(check)


def test_who_waited_for_another_replica_in_vain_is_counted_once() -> None:
    world = World(key(rpm=1, open=1, tpm=10_000), THERE)

    async def check() -> None:
        world.cache.says = [(1, "taken"), (1, "taken"), (1, "won")]
        headers, _ = await world.get()
        assert headers[b"x-hybridgate-cache"] == b"miss" and world.called() == ["near"]
        assert world.taken("key:crm requests/min") == 1 and not world.limiter.open

    run(check)


def test_who_waits_for_a_call_of_this_process_has_a_request_open_and_nothing_of_a_deployment() -> None:
    world = World(ALL, THERE, near=FakeBackend([[0.5, Chunk(completion(), usage=Usage(5, 7), last=True)]]))

    async def check() -> None:
        asking = [asyncio.create_task(world.get()) for _ in range(5)]
        await turns(30)
        assert world.taken("key:crm concurrent") == 5 and world.taken("deployment:near concurrent") == 1
        told = [headers[b"x-hybridgate-cache"] for headers, _ in await asyncio.gather(*asking)]
        assert sorted(told) == [b"hit"] * 4 + [b"miss"] and world.taken("key:crm requests/min") == 5
        assert world.taken("deployment:near requests/min") == 1 and not world.limiter.open

    run(check)


def test_where_every_deployment_is_down_a_stored_answer_takes_what_one_takes() -> None:
    world = World(ALL, THERE)

    async def check() -> None:
        for name in ("near", "far"):
            world.fleet.set_down(name, "stopped", world.clock())
        world.cache.says = [(1, stored(world))]
        assert (await world.get())[0][b"x-hybridgate-cache"] == b"hit"
        assert world.taken("key:crm requests/min") == 1 and not world.limiter.open

    run(check)


def test_who_must_ask_for_an_answer_again_leaves_time_for_it_and_the_record_says_how_long_limits_took() -> None:
    world = World(ALL)

    async def check() -> None:
        await world.get("a miss")
        world.cache.says = [(1, "taken"), (1, "won")]
        await world.get("one that another replica makes, and then does not")
        whole, less = pytest.approx(PATIENCE), pytest.approx(PATIENCE - TIMEOUT)
        assert world.slow.asked == [whole, whole, less, less]
        assert [record.limits_ms for record in world.records] == [0.0, 0.0], "nothing of what the cache may take"

    run(check)


# Whatever comes in which order.

_said = st.sampled_from(["won", "taken", "stored", None])
_script = st.sampled_from(["plain", "stream", "late", "refused", "unreachable", "timeout"])
_requests = st.lists(
    st.tuples(
        st.integers(0, 6),  # turns before it comes
        st.sampled_from(["one", "one", "other"]),
        st.booleans(),
        st.one_of(st.none(), st.integers(0, 25)),  # turns until its client leaves
    ),
    min_size=1,
    max_size=6,
)


def _of(name: str) -> Any:
    whole = Chunk(completion(), usage=Usage(5, 7), last=True)
    return {
        "plain": [whole],
        "stream": STREAM,
        "late": [0.0, 0.0, 0.0, whole],
        "refused": UpstreamErrored("x"),
        "unreachable": ConnectFailed("x"),
        "timeout": UpstreamTimeout("x"),
    }[name]


class Counting(FakeBackend):
    """Counts the calls that got through."""

    reached = 0

    async def open(self, call: Any) -> Any:
        self.reached += 1
        try:
            script = self.scripts[0] if self.scripts else None
            if not isinstance(script, UpstreamError) and call.chat.stream:
                self.scripts[:1] = [stream("hel", "lo")]
            return await super().open(call)
        except ConnectFailed:
            self.reached -= 1
            raise


@settings(deadline=None, max_examples=200)
@given(
    _requests,
    st.lists(st.tuples(st.integers(0, 4), _said), max_size=8),
    st.lists(st.one_of(st.none(), st.tuples(st.integers(0, 4), st.integers(0, 4))), max_size=8),
    st.lists(st.sampled_from([0.0, 0.6]), max_size=8),
    st.lists(_script, max_size=6),
    st.sampled_from([(100, 100_000, 50, 50), (3, 100_000, 50, 1), (100, 250, 2, 50), (100, 100_000, 1, 1)]),
)
def test_whatever_comes_in_which_order_nothing_stays_behind_and_the_books_agree(
    requests: list[tuple[int, str, bool, int | None]],
    says: list[tuple[int, str | None]],
    takes: list[tuple[int, int] | None],
    stands: list[float],
    scripts: list[str],
    most: tuple[int, int, int, int],
) -> None:
    rpm, tpm, together, there = most
    near = Counting([_of(name) for name in scripts])
    far = Counting()
    of = {name: DeploymentLimits(all=limits(rpm=100, open=there)) for name in ("near", "far")}
    world = World(key(rpm=rpm, tpm=tpm, open=together, day=CENT), of, near=near, far=far)

    async def ask(before: int, text: str, streams: bool, stays: int | None) -> None:
        await turns(before)
        task = asyncio.create_task(world.answer(messages=[{"role": "user", "content": text}], stream=streams))
        if stays is not None:
            await turns(stays)
            task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def check() -> None:
        world.cache.says = [(after, stored(world) if said == "stored" else said) for after, said in says]  # type: ignore[misc]
        world.slow.takes, world.slow.stands = list(takes), list(stands)
        await asyncio.gather(*(ask(*request) for request in requests))
        await world.settled()

    run(check)
    assert not world.limiter.open and not len(world.answers.flights)
    booked = world.booked()  # each reservation ended once
    assert world.taken("key:crm concurrent") == 0, "no slot is held"
    for name, backend in (("near", near), ("far", far)):
        assert world.taken(f"deployment:{name} concurrent") == 0
        assert world.taken(f"deployment:{name} requests/min") == backend.reached, (
            "an attempt for each call, and none more"
        )
    records = world.records
    assert len(records) == len({record.decision_id for record in records}), "each is booked once"
    told = sum((r.booked.tokens if r.booked else 0) + (r.given_up.tokens if r.given_up else 0) for r in records)
    told += sum(failed.tokens for record in records for failed in record.failed)
    assert world.taken("key:crm tokens/min") == sum(spent.tokens for spent in booked if spent) == told
    counted: dict[str, int] = {}
    for id, (spent,) in world.ledger.ended.items():
        request = id.split(".")[0]
        counted[request] = counted.get(request, 0) + bool(spent and spent.request)
    assert all(times <= 1 for times in counted.values()), "a request counts once"
    answered = [record for record in records if record.status == 200]
    assert all(counted[record.decision_id] == 1 for record in answered), "and each that was answered does"
    assert world.taken("key:crm requests/min") == sum(counted.values()) <= rpm
