"""Fakes that tests pass in as arguments: backends that answer or fail as told, a log that remembers, a clock that is
moved by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.backends.base import Call, Chunk
from gateway.errors import UpstreamError
from gateway.policy import Invariant, LabelSource, Policy, Require, Rule, Slo
from gateway.snapshot import DeploymentStatus, Snapshot
from gateway.types import Deployment, Price, Usage

CARD = "4111 1111 1111 1111"  # the test number that every card issuer publishes


def deployment(name: str, **changed: Any) -> Deployment:
    """A cloud deployment unless said otherwise."""
    values: dict[str, Any] = {
        "backend": "openai",
        "model": f"{name}-model",
        "zone": "us_cloud",
        "price": Price(150.0, 600.0),
        "window": 1000,
        "default_max_tokens": 100,
        "capabilities": frozenset({"tools", "images", "schema"}),
    }
    return Deployment(name=name, **(values | changed))


HOME = deployment("home", zone="on_premises", price=Price(20.0, 80.0))
CLOUD = deployment("cloud")
OTHER = deployment("other", zone="eu_cloud", price=Price(100.0, 300.0))
PRIVATE = Invariant("private stays home", frozenset({"personal", "unscannable"}), frozenset({"on_premises"}))


def policy(
    deployments: Sequence[Deployment] = (HOME, CLOUD, OTHER),
    rules: Sequence[Rule] = (),
    default: Sequence[str] | None = None,
    models: Mapping[str, str] | None = None,
    invariants: Sequence[Invariant] = (PRIVATE,),
    **of_default: Any,
) -> Policy:
    """A policy whose label `personal` comes from cards and e-mail addresses, and whose default takes all deployments in
    order."""
    return Policy(
        path="test.yaml",
        hash="0123456789ab",
        deployments={d.name: d for d in deployments},
        models=dict(models or {}),
        labels=(
            LabelSource(
                "personal",
                detects=frozenset({"credit_card", "email"}),
                headers={"x-data-class": frozenset({"restricted"})},
                key_tags=frozenset({"hr"}),
            ),
        ),
        invariants=tuple(invariants),
        slo={"fast": Slo("fast", 100.0), "slow": Slo("slow", 1000.0)},
        rules=tuple(rules),
        default=Rule("default", None, tuple(default or [d.name for d in deployments]), **of_default),
    )


def require(slo: bool = False, cost_nusd: int | None = None) -> Require:
    return Require(slo_met=slo, cost_at_most_nusd=cost_nusd)


def snapshot(names: Sequence[str] = ("home", "cloud", "other"), /, **statuses: DeploymentStatus) -> Snapshot:
    """All up, but for those that are given."""
    return Snapshot(0.0, 0.0, {name: statuses.get(name, DeploymentStatus()) for name in {*names, *statuses}})


class Clock:
    """A monotonic clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Log:
    """Remembers what was logged."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def info(self, event: str, **fields: object) -> None:
        self.lines.append({"event": event, **fields})

    def error(self, event: str, **fields: object) -> None:
        self.lines.append({"event": event, "level": "error", **fields})


@dataclass
class Ids:
    """Ids that count up, so that a test knows them."""

    number: int = 0

    def __call__(self) -> str:
        self.number += 1
        return f"{self.number:016x}"


def completion(text: str = "hello", prompt: int = 5, output: int = 7) -> bytes:
    """A plain answer on the OpenAI wire."""
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return orjson.dumps({"id": "c", "object": "chat.completion", "model": "m", "choices": choices, "usage": usage})


STREAM = [
    Chunk(b"data: a\n\n"),
    Chunk(b"data: b\n\n"),
    Chunk(b"data: [DONE]\n\n", tokens=0, usage=Usage(5, 2), last=True),
]


@dataclass
class FakeAnswer:
    """Yields chunks, raises where an exception stands among them, waits where a number (seconds) does."""

    script: Sequence[Chunk | UpstreamError | float]
    dropped: tuple[str, ...] = ()
    closed: int = 0

    def __post_init__(self) -> None:
        self._chunks = self._play()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def _play(self) -> AsyncIterator[Chunk]:
        for step in self.script:
            if isinstance(step, Chunk):
                yield step
            elif isinstance(step, UpstreamError):
                raise step
            else:
                await asyncio.sleep(step)

    async def close(self) -> None:
        self.closed += 1


@dataclass
class FakeBackend:
    """Answers with the next script; an exception as a script is raised by `open` itself. Remembers every call."""

    scripts: list[Sequence[Chunk | UpstreamError | float] | UpstreamError] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    answers: list[FakeAnswer] = field(default_factory=list)

    async def open(self, call: Call) -> FakeAnswer:
        self.calls.append(call)
        whole = [Chunk(completion(), usage=Usage(5, 7), last=True)]
        script = self.scripts.pop(0) if self.scripts else STREAM if call.chat.stream else whole
        if isinstance(script, UpstreamError):
            raise script
        answer = FakeAnswer(script)
        self.answers.append(answer)
        return answer

    async def close(self) -> None: ...
