"""An engine's life: it begins once, after the one before it has ended, and ends with its process."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from gateway.engines import Engine
from gateway.supervisor import EngineSpec

SILENT = (sys.executable, "-c", "import sys; sys.stdin.read()")  # a process that says nothing until we are gone


def engine(folder: Path, model: str, predecessor: Engine | None = None) -> Engine:
    spec = EngineSpec("local", model, str(folder / f"{model}.sock"), program=SILENT)
    return Engine(spec, predecessor, lambda _: None, lambda _, __: None)


async def running(one: Engine) -> None:
    async with asyncio.timeout(20):
        while one.supervisor.pid is None:  # noqa: ASYNC110 - a process begins without an event
            await asyncio.sleep(0.01)


def test_an_engine_begins_when_the_one_before_it_has_ended(tmp_path: Path) -> None:
    async def check() -> None:
        first = engine(tmp_path, "a")
        second = engine(tmp_path, "b", first)
        first.start()
        await running(first)
        second.start()
        second.start()
        await asyncio.sleep(0.05)
        assert second.supervisor.pid is None and second.down is not None
        assert second.down.reason == "its engine waits until the requests to its former model have ended"
        await first.stop()
        assert first.supervisor.pid is None
        await running(second)
        await second.stop()
        assert second.supervisor.pid is None

    asyncio.run(check())


def test_one_that_is_stopped_while_it_waits_never_begins(tmp_path: Path) -> None:
    async def check() -> None:
        first = engine(tmp_path, "a")
        second, third = engine(tmp_path, "b", first), engine(tmp_path, "c", first)
        second.start()
        await second.stop()
        await first.stop()
        third.start()
        await running(third)
        assert second.supervisor.pid is None
        await third.stop()

    asyncio.run(check())


def test_it_serves_what_asks_for_the_same_wherever_that_listens(tmp_path: Path) -> None:
    one = engine(tmp_path, "a")
    spec = one.supervisor.spec
    assert one.serves(EngineSpec("local", "a", "/elsewhere.sock", program=SILENT))
    assert not one.serves(EngineSpec("local", "a", spec.uds, quantization="int8", program=SILENT))
    assert not one.serves(EngineSpec("local", "a", spec.uds, speculation="prompt_lookup", program=SILENT))
    assert not one.serves(EngineSpec("local", "b", spec.uds, program=SILENT))
