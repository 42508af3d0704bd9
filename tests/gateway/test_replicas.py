"""Where deployments answer: names that lead to several addresses, which come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.networks import PRIVATE
from gateway.replicas import MOST_REPLICAS, Replicas, Watched, distinct
from gateway.types import Deployment, Replica
from tests.fakes import deployment

URL = "http://engines.example:8000/v1"
OTHER = "http://10.1.0.1:8000/v1"


def engines(*urls: str, **changed: Any) -> Deployment:
    return deployment("home", **({"zone": "on_premises", "urls": urls or (URL,), "networks": PRIVATE} | changed))


def watched(*urls: str, **changed: Any) -> Watched:
    one = Watched.of(engines(*urls, **changed))
    assert one is not None
    return one


class Names:
    """A name service: what each look at any name is answered with, the last one again and again."""

    def __init__(self, *answers: Sequence[str] | OSError) -> None:
        self.answers = list(answers)
        self.looks = 0

    async def __call__(self, host: str) -> Sequence[str]:
        assert host == "engines.example"
        self.looks += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, OSError):
            raise answer
        return answer


def found(one: Watched, *answers: Sequence[str] | OSError) -> list[list[str | None]]:
    """The addresses of each set of replicas that was told while the name service answered so."""
    told = list[list[str | None]]()

    async def run() -> None:
        names = Names(*answers)
        replicas = Replicas(lambda _, places: told.append([place.address for place in places]), names, 0.0)
        replicas.follow([one])
        while names.looks <= len(answers) and one.names:  # noqa: ASYNC110 - without an event
            await asyncio.sleep(0)
        await replicas.stop()

    asyncio.run(run())
    return told


A, B, C = "10.0.0.1", "10.0.0.2", "10.0.0.3"


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([[A]], []),
        ([[A, B]], [[A, B]]),
        ([[B, A], [A, B]], [[A, B]]),
        ([[A], [A, B], [A, B, C], [C]], [[A, B], [A, B, C], [C]]),
        ([[A, B], OSError("no such name"), [], [A]], [[A, B], [A]]),
        ([[A, "203.0.113.9"]], []),
        ([[A, B], ["203.0.113.9", "203.0.113.10"]], [[A, B]]),
        ([[A, B, "203.0.113.9"]], [[A, B]]),
        ([["fd00::1", "fd00::2", A, B]], [["fd00::1", "fd00::2"]]),
        ([[A, B, "fd00::2"]], [[A, B, "fd00::2"]]),
        ([["::1", "127.0.0.1"]], []),
    ],
)
def test_a_name_leads_to_replicas(answers: list[Sequence[str] | OSError], told: list[list[str | None]]) -> None:
    assert found(watched(), *answers) == told


def test_addresses_that_are_listed_are_replicas_at_once() -> None:
    assert found(watched(URL, OTHER), [A]) == [[None, None]]
    assert found(watched(URL, OTHER), [A, B]) == [[None, None], [A, B, None]]
    assert found(watched("http://10.1.0.2/v1", OTHER), [A]) == [[None, None]]


def test_there_is_a_bound_to_what_a_name_can_bring() -> None:
    many = [f"10.0.{number // 250}.{number % 250}" for number in range(1000)]
    (told,) = found(watched(), many)
    assert len(told) == MOST_REPLICAS


@pytest.mark.parametrize(
    ("declared", "names"),
    [
        ({}, 1),
        ({"urls": ("http://10.0.0.1/v1",)}, None),
        ({"urls": ()}, None),
        ({"unavailable": "X is not set"}, None),
        ({"backend": "litellm"}, None),
        ({"zone": "us"}, None),
        ({"zone": "us", "load": "vllm"}, 1),
        ({"zone": "us", "backend": "local"}, 1),
        ({"zone": "us", "urls": (URL, OTHER)}, 0),
        ({"urls": (URL, OTHER)}, 1),
    ],
)
def test_whose_names_are_looked_up(declared: dict[str, Any], names: int | None) -> None:
    one = Watched.of(engines(**declared))
    assert (None if one is None else len(one.names)) == names


def test_a_name_behind_a_proxy_is_the_proxys_to_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert Watched.of(engines(zone="us", load="vllm")) is None
    assert Watched.of(engines()) is not None


def test_only_what_is_followed_is_looked_up() -> None:
    async def run() -> None:
        names = Names([A, B])
        replicas = Replicas(lambda *_: None, names)
        replicas.follow([watched()])
        while not replicas.known:  # noqa: ASYNC110 - without an event
            await asyncio.sleep(0)
        assert [replica.address for replica in replicas.known["home"]] == [A, B]
        replicas.follow([watched()])
        assert replicas.known["home"] == (Replica(URL, A), Replica(URL, B)), "it was looked up before"
        replicas.follow([])
        assert not replicas.known
        await replicas.stop()

    asyncio.run(run())


@given(st.lists(st.ip_addresses().map(str), max_size=12))
def test_each_machine_has_one_address_whatever_the_order(addresses: list[str]) -> None:
    places = distinct(addresses)
    assert set(places) <= set(addresses) and list(places) == sorted(set(places))
    assert bool(places) is bool(addresses)
