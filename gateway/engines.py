"""An engine of ours, for as long as a policy that is in use names it.

Owns what is known of it (down and why, or its window and tokenizer), and that two engines of one deployment never hold
a device's memory at once. Refuses to know policies: whoever holds the engine is told that something changed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import orjson

from gateway.supervisor import EngineSpec, Onlooker, Reports, Supervised, Supervisor
from gateway.tokens import LocalTokenizer, TokenCounter
from gateway.types import Capability


@dataclass(frozen=True, slots=True)
class Known:
    """What an engine that has been ready said of its model. `capabilities` is None where it did not say."""

    window: int
    counter: TokenCounter
    capabilities: frozenset[Capability] | None = None


async def known_from(described: Any) -> Known:
    """What an engine's `/tokenizer` says. Raises ValueError where its window or tokenizer is missing. Capabilities that
    the gateway does not know are no reason to refuse: the engine may be the newer one."""
    if not isinstance(described, dict) or not {"tokenizer", "chat_template", "context_window"} <= described.keys():
        raise ValueError("tokenizer, chat_template or context_window is missing")
    window = described["context_window"]
    if type(window) is not int or window <= 0 or not isinstance(described["chat_template"], str):
        raise ValueError("chat_template or context_window is not what it should be")
    counter = await asyncio.to_thread(
        LocalTokenizer,
        orjson.dumps(described["tokenizer"]).decode(),
        described["chat_template"],
        described.get("bos_token"),
        described.get("eos_token"),
        datetime.now(),
    )
    able = described.get("capabilities")
    if not isinstance(able, list):
        return Known(window, counter)
    known: frozenset[Capability] = frozenset(name for name in get_args(Capability) if name in able)
    return Known(window, counter, known)


@dataclass(frozen=True, slots=True)
class EngineRoom:
    """Where the sockets of engines are that several processes of one gateway use. One of them `keeps` the engines
    running, and answers no requests; the others look at them."""

    folder: Path
    keeps: bool

    def placed(self, spec: EngineSpec) -> EngineSpec:
        """With the socket's path, which all of them find by what the engine is."""
        what = (spec.name, spec.model, spec.quantization, spec.speculation, spec.draft_model)
        return replace(spec, uds=str(self.folder / f"engine-{sha256(repr(what).encode()).hexdigest()[:16]}.sock"))

    def supervised(self, spec: EngineSpec, reports: Reports) -> Supervised:
        """Whoever sees to it."""
        return Supervisor(spec, reports) if self.keeps else Onlooker(spec, reports)


@dataclass(frozen=True, slots=True)
class Down:
    """Why an engine cannot be called, in words fit for callers, and in how many seconds to ask again."""

    reason: str
    retry_after: float


class Engine:
    """One engine process and what it says of itself. Implements the supervisor's `Reports`. Invariant: its process
    lives between `start` and `stop`, and never before `predecessor` has been stopped."""

    def __init__(
        self,
        spec: EngineSpec,
        predecessor: Engine | None,
        changed: Callable[[Engine], None],
        said: Callable[[str, str], None],
        supervised: Callable[[EngineSpec, Reports], Supervised] = Supervisor,
    ) -> None:
        """`changed` is called once `down` or `known` is another; `said` takes the name and a line of the engine's own
        output, for the terminal alone."""
        self.supervisor = supervised(spec, self)
        self.down: Down | None = Down("its engine is starting", 2.0)
        self.known: Known | None = None
        self._predecessor = predecessor
        self._changed = changed
        self._said = said
        self._starting: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()

    @property
    def name(self) -> str:
        """The deployment's."""
        return self.supervisor.spec.name

    def serves(self, spec: EngineSpec) -> bool:
        """Whether it is what `spec` asks for, wherever that listens."""
        return replace(spec, uds=self.supervisor.spec.uds) == self.supervisor.spec

    def start(self) -> None:
        """Begin, in the background, once the predecessor is gone; nothing where it has begun. Needs a running event
        loop."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())

    async def _start(self) -> None:
        predecessor, self._predecessor = self._predecessor, None
        if predecessor is not None and not predecessor._stopped.is_set():
            self.engine_down(self.name, "its engine waits until the requests to its former model have ended", 5.0)
            await predecessor._stopped.wait()
        self.supervisor.start()

    async def stop(self) -> None:
        """End the process, if there is one; then a successor may begin."""
        if self._starting is not None:
            self._starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._starting
        await self.supervisor.stop()
        self._stopped.set()

    # What the supervisor reports.

    def engine_down(self, name: str, reason: str, retry_after: float) -> None:
        self.down = Down(reason, retry_after)
        self._changed(self)

    async def engine_up(self, name: str, described: Mapping[str, Any]) -> None:
        """Raises ValueError where it does not say what its window and tokenizer are."""
        self.known, self.down = await known_from(described), None
        self._changed(self)

    def engine_said(self, name: str, line: str) -> None:
        self._said(name, line)
