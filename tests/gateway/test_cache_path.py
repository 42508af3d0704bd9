"""The request path with stored answers: who gets which, in which form, what is never stored, and one call for many
requests at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest

from gateway.admission import Limiter
from gateway.answers import Books
from gateway.backends import Backends
from gateway.backends.base import Call, Chunk
from gateway.cache import MemoryCache
from gateway.caching import Answers
from gateway.chat import ChatPath
from gateway.decision import Caching
from gateway.errors import UpstreamCut, UpstreamError, UpstreamFailed, UpstreamRejected
from gateway.fleet import Fleet
from gateway.keys import Key, Keyring, digest_of
from gateway.labels import Scanner
from gateway.ledger import MemoryLedger
from gateway.limits import Allowance, CallerLimits, Counted, Limits
from gateway.policy import Policy, Rule
from gateway.reply import Reply
from gateway.serving import Serving
from gateway.types import Caller, Usage
from tests.fakes import CARD, CLOUD, HOME, OTHER, Clock, FakeAnswer, FakeBackend, Ids, Log, completion, policy

ALWAYS = Caching(60.0, "always")


def answer(text: str = "hello", finish: str = "stop") -> list[Chunk]:
    """A backend's plain answer."""
    data = completion(text).replace(b'"finish_reason":"stop"', b'"finish_reason":"%s"' % finish.encode())
    return [Chunk(data, usage=Usage(5, 7), last=True)]


def _event(**said: Any) -> bytes:
    return b"data: " + orjson.dumps({"id": "c", "object": "chat.completion.chunk", "model": "m", **said}) + b"\n\n"


USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


def stream(*texts: str, finish: str = "stop", wait: float = 0.0) -> list[Chunk | float]:
    """A backend's stream, with usage, as it is asked for."""
    said = [_event(choices=[{"index": 0, "delta": {"role": "assistant", "content": text}}]) for text in texts]
    end = _event(choices=[{"index": 0, "delta": {}, "finish_reason": finish}])
    end += _event(choices=[], usage={**USAGE, "cost_usd": 0.5}) + b"data: [DONE]\n\n"
    script: list[Chunk | float] = []
    for event in said:
        script += [Chunk(event), wait] if wait else [Chunk(event)]
    return [*script, Chunk(end, tokens=0, usage=Usage(5, 7), last=True)]


class World:
    """A request path over fakes with a cache in memory, and what they saw. Keys are called as their tenants."""

    def __init__(
        self,
        caching: Caching | None = ALWAYS,
        /,
        *,
        p: Policy | None = None,
        keys: Sequence[Caller] = (),
        memory: MemoryCache | None = None,
        **backends: FakeBackend,
    ) -> None:
        p = p or policy(order_by="listed", cache=caching)
        self.backends = {name: backends.get(name, FakeBackend()) for name in p.deployments}
        self.fleet, self.log, self.clock = Fleet(p.deployments), Log(), Clock()
        ids = Ids()
        self.answers = Answers(memory or MemoryCache(100, 10**6, 10**5), self.clock, ids)
        self.door = Backends(self.backends)
        serving = Serving(p, Scanner(p.kinds), {}, self.door)
        books = Books(self.fleet, self.log, lambda _: None, self.clock)
        self.limiter = limiter = Limiter(MemoryLedger(), self.fleet, self.clock, self.clock)
        self.path = ChatPath(serving, self.fleet, books, limiter, self.clock, self.clock, ids, answers=self.answers)
        if keys:
            self.path.keyring = Keyring([Key(digest_of(f"hg-{c.key_id}"), c) for c in keys])

    async def ask(
        self, text: str = "hi", headers: dict[str, str] | None = None, key: str | None = None, **body: Any
    ) -> tuple[dict[bytes, bytes], bytes]:
        """Headers and body of the answer, as a client that stays to the end sees them."""
        reply = await self.reply(text, headers, key, **body)
        try:
            return dict(reply.headers), b"".join([chunk.data async for chunk in reply.chunks])
        finally:
            await reply.close()

    async def reply(
        self, text: str = "hi", headers: dict[str, str] | None = None, key: str | None = None, **body: Any
    ) -> Reply:
        headers = (headers or {}) | ({"authorization": f"Bearer hg-{key}"} if key else {})
        return await self.path.complete(
            headers, orjson.dumps({"messages": [{"role": "user", "content": text}], **body})
        )

    def calls(self) -> int:
        return sum(len(backend.calls) for backend in self.backends.values())

    async def nothing_is_open(self) -> bool:
        async with asyncio.timeout(1):
            await self.answers.flights.settled()
            await self.door.unused()
        in_flight = sum(s.in_flight for s in self.fleet.snapshot(0.0, 0.0).deployments.values())
        closed = all(answer.closed for backend in self.backends.values() for answer in backend.answers)
        return not in_flight and closed and not len(self.answers.flights)


def run(check: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(20):
            await check()

    asyncio.run(whole())


def text_of(data: bytes) -> str:
    """What a client reads, plain or streamed."""
    if not data.startswith(b"data:"):
        return str(orjson.loads(data)["choices"][0]["message"]["content"])
    events = [orjson.loads(raw[6:]) for raw in data.split(b"\n\n") if raw not in (b"", b"data: [DONE]")]
    assert data.endswith(b"data: [DONE]\n\n")
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


def test_the_second_of_two_equal_requests_gets_the_first_ones_answer() -> None:
    world = World(home=FakeBackend([answer("once")]))

    async def check() -> None:
        first, one = await world.ask(temperature=0)
        world.clock.now += 7
        second, other = await world.ask(temperature=0.0, user="another")
        assert one == other and world.calls() == 1 and await world.nothing_is_open()
        assert (first[b"x-hybridgate-cache"], second[b"x-hybridgate-cache"]) == (b"miss", b"hit")
        assert second[b"x-hybridgate-deployment"] == b"home" and second[b"x-hybridgate-zone"] == b"on_premises"
        assert second[b"x-hybridgate-cost-usd"] == b"0" and second[b"age"] == b"7"
        assert second[b"x-hybridgate-attempts"] == b"0" and second[b"x-hybridgate-rule"] == b"default"

    run(check)
    miss, hit = world.log.lines
    assert (miss["cache"], hit["cache"]) == ("miss", "hit") and hit["cost_usd"] == "0"
    assert (hit["prompt_tokens"], hit["completion_tokens"], hit["deployment"]) == (5, 7, "home")
    assert (hit["outcome"], hit["status"]) == ("ok", 200)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("usage", [False, True])
def test_whatever_stored_it_an_answer_comes_in_the_form_that_is_asked_for(
    stored: bool, asked: bool, usage: bool
) -> None:
    world = World(home=FakeBackend([stream("hel", "lo") if stored else answer()]))
    form: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": usage}} if asked else {}

    async def check() -> None:
        _, first = await world.ask(stream=stored)
        reply = await world.reply(**form)
        data = b"".join([chunk.data async for chunk in reply.chunks])
        await reply.close()
        assert world.calls() == 1 and text_of(first) == text_of(data) == "hello"
        assert reply.content_type.startswith(b"text/event-stream") is asked is data.startswith(b"data:")
        assert (b'"completion_tokens":7' in data) is (usage or not asked)
        assert b'"usage"' not in first or not stored, "who did not ask for usage does not get what the entry needs"

    run(check)


@pytest.mark.parametrize(
    ("caching", "body", "control", "hits"),
    [
        (None, {"temperature": 0}, None, False),
        (Caching(60.0), {}, None, False),
        (Caching(60.0), {"temperature": 0}, None, True),
        (Caching(60.0), {"seed": 4, "temperature": 1}, None, True),
        (Caching(60.0), {}, "max-age=30", True),
        (None, {}, "max-age=30", False),
        (ALWAYS, {}, None, True),
        (ALWAYS, {}, "no-store", False),
        (ALWAYS, {}, "no-cache", False),
        (ALWAYS, {}, "max-age=0", False),
        (ALWAYS, {"store": True}, None, False),
        (ALWAYS, {"stream": True}, None, True),
    ],
)
def test_policy_and_request_say_whether_answers_are_stored(
    caching: Caching | None, body: dict[str, Any], control: str | None, hits: bool
) -> None:
    script = stream if body.get("stream") else answer
    world = World(caching, home=FakeBackend([script("one"), script("two")]))
    headers = {} if control is None else {"cache-control": control}

    async def check() -> None:
        _, first = await world.ask("hi", headers, **body)
        told, second = await world.ask("hi", headers, **body)
        assert (text_of(first) == text_of(second)) is hits and world.calls() == 2 - hits
        off = caching is None or (body == {} and control is None and caching.when == "deterministic")
        off = off or control == "no-store" or "store" in body
        assert told[b"x-hybridgate-cache"] == (b"hit" if hits else b"off" if off else b"miss")

    run(check)


def test_an_answer_is_as_old_as_the_policy_and_the_caller_let_it_get() -> None:
    world = World(Caching(60.0, "always"), home=FakeBackend([answer(str(n)) for n in range(4)]))

    async def check() -> None:
        texts = []
        for later, control in ((0, None), (30, "max-age=29"), (40, "max-age=50"), (21, None)):
            world.clock.now += later
            _, data = await world.ask("hi", {"cache-control": control} if control else {})
            texts.append(text_of(data))
        assert texts == ["0", "1", "1", "2"], "a fresher answer replaces the older one"
        tighter = replace(world.path.serving.policy.default, cache=Caching(5.0, "always"))
        world.path.serving = replace(world.path.serving, policy=policy(order_by="listed", cache=Caching(5.0, "always")))
        assert tighter.cache is not None
        world.clock.now += 6
        assert text_of((await world.ask())[1]) == "3", "today's policy counts, not the one that stored it"

    run(check)


@pytest.mark.parametrize(
    "script",
    [
        answer(finish="length"),
        answer(finish="content_filter"),
        [Chunk(b'{"choices":[]}', usage=Usage(1, 1), last=True)],
        UpstreamRejected("refused", upstream_status=400),
    ],
)
def test_what_was_cut_filtered_or_failed_is_not_stored(script: list[Chunk] | UpstreamError) -> None:
    world = World(home=FakeBackend([script, answer("whole")]))

    async def check() -> None:
        await world.ask()
        headers, data = await world.ask()
        assert headers[b"x-hybridgate-cache"] == b"miss" and text_of(data) == "whole"
        assert await world.nothing_is_open()

    run(check)


def test_a_stream_that_breaks_off_is_not_stored() -> None:
    world = World(home=FakeBackend([[*stream("hel", "lo")[:2], UpstreamCut("broke off")], stream("whole")]))

    async def check() -> None:
        _, cut = await world.ask(stream=True)
        assert b"error" in cut and b"[DONE]" not in cut
        assert text_of((await world.ask(stream=True))[1]) == "whole"

    run(check)
    assert [line["outcome"] for line in world.log.lines] == ["cut", "ok"]


def test_the_answer_of_a_fallback_is_not_stored() -> None:
    world = World(
        home=FakeBackend([UpstreamFailed("x"), answer("home")]), cloud=FakeBackend([answer("cloud"), answer("cloud")])
    )

    async def check() -> None:
        texts = [text_of((await world.ask())[1]) for _ in range(3)]
        assert texts == ["cloud", "home", "home"]

    run(check)


A, B = Caller("acme", "a"), Caller("globex", "b")


def test_tenants_share_nothing_unless_a_rule_says_so_and_the_request_has_no_label() -> None:
    for scope, text, calls in (("tenant", "hi", 2), ("shared", "hi", 1), ("shared", CARD, 2)):
        world = World(Caching(60.0, "always", scope), keys=[A, B])  # type: ignore[arg-type]

        async def check(world: World = world, text: str = text, calls: int = calls) -> None:
            await world.ask(text, key="a")
            await world.ask(text, key="b")
            assert world.calls() == calls, (text, calls)
            await world.ask(text, key="b")
            assert world.calls() == calls

        run(check)


def test_a_label_more_makes_another_request() -> None:
    world = World(p=policy((HOME,), order_by="listed", cache=ALWAYS))

    async def check() -> None:
        await world.ask()
        headers, _ = await world.ask(headers={"x-data-class": "restricted"})
        assert headers[b"x-hybridgate-cache"] == b"miss" and world.calls() == 2

    run(check)


def test_an_answer_is_used_only_where_the_policy_permits_its_deployment_today() -> None:
    narrow = Caller("acme", "narrow", deployments=frozenset({"other"}))
    wide = Caller("acme", "wide")
    world = World(p=policy((CLOUD, OTHER), order_by="listed", cache=ALWAYS), keys=[wide, narrow])

    async def check() -> None:
        await world.ask(key="wide")
        headers, _ = await world.ask(key="narrow")
        assert headers[b"x-hybridgate-deployment"] == b"other" and headers[b"x-hybridgate-cache"] == b"miss"
        for changed in (
            policy((replace(CLOUD, zone="eu_cloud"), replace(OTHER, model="new")), order_by="listed", cache=ALWAYS),
            policy((CLOUD, OTHER), default=["cloud"], order_by="listed", cache=ALWAYS),
        ):
            world.path.serving = replace(world.path.serving, policy=changed)
            headers, _ = await world.ask(key="wide")
            assert headers[b"x-hybridgate-cache"] == b"miss", "moved, another model, or no candidate any more"

    run(check)


def test_an_answer_is_there_while_its_deployment_is_down() -> None:
    world = World(p=policy((HOME,), order_by="listed", cache=ALWAYS))

    async def check() -> None:
        await world.ask()
        world.fleet.set_down("home", "stopped", world.clock())
        headers, data = await world.ask()
        assert headers[b"x-hybridgate-cache"] == b"hit" and text_of(data) == "hello"
        assert b"no_deployment_available" in (await world.ask("other"))[1]

    run(check)


def test_a_rule_says_otherwise_for_its_requests() -> None:
    rules = [Rule("none", None, ("home",)), Rule("some", None, ("home",), cache=ALWAYS)]
    world = World(p=policy(rules=rules, cache=ALWAYS))

    async def check() -> None:
        for name, calls in (("none", 2), ("some", 1), ("home", 2)):
            before = world.calls()
            await world.ask(model=name)
            await world.ask(model=name)
            assert world.calls() - before == calls, name

    run(check)


# Many at once.


@pytest.mark.parametrize("streams", [False, True])
def test_a_hundred_equal_requests_at_once_make_one_call(streams: bool) -> None:
    script: Any = stream("hel", "lo", wait=0.02) if streams else [0.02, *answer()]
    world = World(home=FakeBackend([script]))

    async def check() -> None:
        answers = await asyncio.gather(*(world.ask(stream=streams) for _ in range(100)))
        assert world.calls() == 1 and {text_of(data) for _, data in answers} == {"hello"}
        assert sorted(headers[b"x-hybridgate-cache"] for headers, _ in answers) == [b"hit"] * 99 + [b"miss"]
        assert await world.nothing_is_open()

    run(check)
    assert len(world.log.lines) == 100 and all(line["outcome"] == "ok" for line in world.log.lines)
    assert sum(line["cost_usd"] != "0" for line in world.log.lines) == 1, "the call is paid once"


@pytest.mark.parametrize("leader", [False, True])
def test_those_who_ask_for_the_other_form_share_the_call_too(leader: bool) -> None:
    script: Any = stream("hel", "lo", wait=0.02) if leader else [0.02, *answer()]
    world = World(home=FakeBackend([script]))

    async def check() -> None:
        answers = await asyncio.gather(*(world.ask(stream=form) for form in (leader, not leader, leader)))
        assert world.calls() == 1 and {text_of(data) for _, data in answers} == {"hello"}

    run(check)


def test_a_stream_that_is_shared_comes_as_it_is_made() -> None:
    world = World(home=FakeBackend([stream("a", "b", "c", wait=0.05)]))

    async def check() -> None:
        first, second = await asyncio.gather(world.reply(stream=True), world.reply(stream=True))
        assert not world.answers.counts.stores
        await anext(second.chunks)
        assert len(world.log.lines) == 0, "the answer is not whole yet"
        await asyncio.gather(first.close(), second.close())

    run(check)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_when_whoever_came_first_leaves_the_others_get_the_same_answer(streams: bool, begun: bool) -> None:
    script: Any = [0.05, *(stream("hel", "lo", wait=0.1) if streams else [0.1, *answer()])]
    world = World(home=FakeBackend([script]))

    async def check() -> None:
        first = asyncio.create_task(world.ask(stream=streams))
        await asyncio.sleep(0)
        others = [asyncio.create_task(world.ask(stream=streams)) for _ in range(3)]
        await asyncio.sleep(0.1 if begun else 0.01)
        first.cancel()
        answers = await asyncio.gather(*others)
        assert {text_of(data) for _, data in answers} == {"hello"} and world.calls() == 1
        assert await world.nothing_is_open()

    run(check)
    assert len(world.log.lines) == 4


def test_a_call_is_cancelled_with_the_last_who_waits_for_it_and_not_before() -> None:
    world = World(home=FakeBackend([[*stream("hel")[:1], 60.0]]))

    async def check() -> None:
        asking = [asyncio.create_task(world.ask(stream=True)) for _ in range(3)]
        await asyncio.sleep(0.02)
        for task in asking[:2]:
            task.cancel()
        await asyncio.sleep(0.02)
        (upstream,) = world.backends["home"].answers
        assert upstream.closed == 0
        asking[2].cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await asyncio.sleep(0.02)
        assert upstream.closed > 0
        assert await world.nothing_is_open()

    run(check)


def test_when_the_call_fails_those_who_wait_make_their_own() -> None:
    world = World(
        p=policy((HOME,), order_by="listed", cache=ALWAYS),
        home=FakeBackend([[0.02, UpstreamRejected("no", upstream_status=400)]]),
    )

    async def check() -> None:
        answers = await asyncio.gather(*(world.ask() for _ in range(5)))
        assert sorted(headers.get(b"x-hybridgate-cache", b"-") for headers, _ in answers) == [
            b"-",
            b"hit",
            b"hit",
            b"hit",
            b"miss",
        ]
        assert world.calls() == 2 and await world.nothing_is_open()

    run(check)
    assert len(world.log.lines) == 5


def test_when_calls_go_on_failing_everybody_is_told_in_the_end() -> None:
    failing: list[Any] = [[0.01, UpstreamRejected("no", upstream_status=400)] for _ in range(9)]
    world = World(p=policy((HOME,), order_by="listed", cache=ALWAYS), home=FakeBackend(failing))

    async def check() -> None:
        answers = await asyncio.gather(*(world.ask() for _ in range(5)))
        assert all(b"upstream_rejected" in data for _, data in answers) and await world.nothing_is_open()
        assert world.calls() == 5, "two that others waited for, and one each for those who waited twice"

    run(check)


def test_a_defect_in_the_call_reaches_whoever_made_it() -> None:
    class Broken(FakeBackend):
        async def open(self, call: Any) -> Any:
            raise ZeroDivisionError

    world = World(home=Broken())

    async def check() -> None:
        with pytest.raises(ZeroDivisionError):
            await world.ask()
        assert not len(world.answers.flights)

    run(check)


def test_who_may_not_use_the_deployment_does_not_share_its_answer_under_way() -> None:
    narrow = Caller("acme", "narrow", deployments=frozenset({"other"}))
    slow: list[Any] = [stream("hel", "lo", wait=0.02)]
    world = World(
        p=policy((CLOUD, OTHER), order_by="listed", cache=ALWAYS),
        keys=[Caller("acme", "wide"), narrow],
        cloud=FakeBackend(slow),
        other=FakeBackend([stream("other")]),
    )

    async def check() -> None:
        wide, barred = await asyncio.gather(world.ask(key="wide", stream=True), world.ask(key="narrow", stream=True))
        assert (text_of(wide[1]), text_of(barred[1])) == ("hello", "other")
        assert barred[0][b"x-hybridgate-deployment"] == b"other"

    run(check)


def test_a_request_that_may_leave_masked_has_no_stored_answer() -> None:
    masking = replace(policy().invariants[0], mask=frozenset({"personal"}))
    world = World(p=policy((CLOUD, HOME), order_by="listed", cache=ALWAYS, invariants=[masking]))

    async def check() -> None:
        for _ in range(2):
            headers, _ = await world.ask("write to jo@example.org")
            assert headers[b"x-hybridgate-cache"] == b"off"
        assert world.calls() == 2

    run(check)


def test_an_entry_that_does_not_fit_is_not_stored() -> None:
    world = World(memory=MemoryCache(10, 10**6, 100))

    async def check() -> None:
        await world.ask()
        assert world.answers.counts.too_large == 1 and world.answers.memory.entries == 0

    run(check)


def test_what_the_deployment_did_not_get_is_told_with_each_answer() -> None:
    class Dropping(FakeBackend):
        async def open(self, call: Call) -> FakeAnswer:
            answered = await super().open(call)
            answered.dropped = ("top_k",)
            return answered

    world = World(home=Dropping())

    async def check() -> None:
        for _ in range(2):
            headers, _ = await world.ask(top_k=3)
            assert headers[b"x-hybridgate-dropped"] == b"top_k"

    run(check)


# Limits.


def limited(counted: Counted, most: int) -> Caller:
    """A caller whose key is held to that."""
    return Caller("acme", "a", limits=CallerLimits(key=Limits((Allowance(counted, most),))))


def test_a_stored_answer_counts_as_a_request_and_takes_no_tokens() -> None:
    for counted, most, answered in (("requests_per_minute", 3, 3), ("tokens_per_minute", 150, 6)):
        world = World(keys=[limited(counted, most)])  # type: ignore[arg-type]

        async def check(world: World = world, answered: int = answered) -> None:
            told = [(await world.ask(key="a")) for _ in range(6)]
            hits = [headers.get(b"x-hybridgate-cache") for headers, _ in told]
            assert hits == [b"miss", *[b"hit"] * (answered - 1), *[None] * (6 - answered)]
            assert all(b"rate_limit" in data for _, data in told[answered:])
            assert world.calls() == 1 and await world.nothing_is_open()
            limits = [any(name.startswith(b"x-ratelimit") for name in headers) for headers, _ in told[:answered]]
            assert limits == [True, *[answered == 3] * (answered - 1)], "a hit tells of the limits that it counts for"

        run(check)


def test_nothing_stays_open_where_a_stored_answer_is_odd() -> None:
    odd = orjson.loads(completion("x"))
    odd["choices"][0] |= {"finish_reason": "tool_calls", "message": {"role": "assistant", "tool_calls": ["x", None]}}
    script = [Chunk(orjson.dumps(odd), usage=Usage(5, 7), last=True)]
    world = World(keys=[limited("concurrent_requests", 1)], home=FakeBackend([script]))

    async def check() -> None:
        await world.ask(key="a")
        for _ in range(2):
            headers, _ = await world.ask(key="a", stream=True)
            assert headers[b"x-hybridgate-cache"] == b"hit"
        assert not world.limiter.open

    run(check)


def test_nothing_stays_open_where_a_stored_answer_cannot_be_read() -> None:
    world = World(keys=[limited("concurrent_requests", 1)])

    async def check() -> None:
        await world.ask(key="a")
        ((key, (entry, until)),) = world.answers.memory._kept.items()
        world.answers.memory._kept[key] = replace(entry, body=b"{"), until
        with pytest.raises(ValueError):
            await world.ask(key="a", stream=True)
        assert not world.limiter.open

    run(check)


@pytest.mark.parametrize("streams", [False, True])
def test_who_waits_for_an_answer_has_a_request_open(streams: bool) -> None:
    script: Any = stream("hel", "lo", wait=0.05) if streams else [0.1, *answer()]
    world = World(keys=[limited("concurrent_requests", 3)], home=FakeBackend([script]))

    async def check() -> None:
        told = await asyncio.gather(*(world.ask(key="a", stream=streams) for _ in range(6)))
        answered = [data for headers, data in told if b"x-hybridgate-cache" in headers]
        assert len(answered) == 3 and {text_of(data) for data in answered} == {"hello"} and world.calls() == 1
        assert not len(world.limiter.open), "what was set aside is free again"
        assert text_of((await world.ask(key="a", stream=streams))[1]) == "hello"

    run(check)


def test_who_waited_in_vain_is_counted_once() -> None:
    failing: list[Any] = [[0.02, UpstreamRejected("no", upstream_status=400)]]
    caller = limited("requests_per_minute", 3)
    world = World(p=policy((HOME,), order_by="listed", cache=ALWAYS), keys=[caller], home=FakeBackend(failing))

    async def check() -> None:
        told = await asyncio.gather(world.ask(key="a"), world.ask(key="a"))
        assert sorted(headers.get(b"x-hybridgate-cache", b"-") for headers, _ in told) == [b"-", b"miss"]
        headers, _ = await world.ask(key="a")
        assert headers[b"x-hybridgate-cache"] == b"hit", "the third request of three"
        assert b"rate_limit" in (await world.ask(key="a"))[1]

    run(check)
