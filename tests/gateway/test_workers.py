"""The parent of workers, against small programs that play a worker: they fail to start, die, and do not end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from gateway.workers import FIRST_BACKOFF, Start, Workers, shared

BROKEN = "import sys; sys.exit(3)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
LISTENING = (
    "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.listen()\n"
    "while True: c, _ = s.accept(); c.sendall(sys.argv[2].encode()); c.close()"
)


Check = Callable[[Workers, list[str], tuple[str, int]], Awaitable[None]]


def command_of(program: str, index: int, listener: int) -> list[str]:
    return [sys.executable, "-c", program, str(listener), str(index)]


def kept(program: str, many: int, check: Check) -> None:
    """Run so many of a program until the check is done."""

    async def run() -> None:
        told: list[str] = []
        with shared(("127.0.0.1", 0), socket.AF_INET) as port:
            start = Start(partial(command_of, program), dict(os.environ), port, Path())
            workers = Workers(many, start, told.append)
            running = asyncio.create_task(workers.run())
            try:
                async with asyncio.timeout(60):
                    await check(workers, told, port.getsockname())
            finally:
                workers.stop()
                workers.send(signal.SIGKILL)
                await running
        assert all(worker.pid is None for worker in workers.all), "none outlives it"

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is awaited happens in another process
        await asyncio.sleep(0.01)


def test_one_that_fails_to_start_is_started_again_after_longer_and_longer_pauses() -> None:
    async def check(workers: Workers, told: list[str], at: tuple[str, int]) -> None:
        await until(lambda: len(told) == 3)
        pauses = [FIRST_BACKOFF, 2 * FIRST_BACKOFF, 4 * FIRST_BACKOFF]
        assert told == [f"worker 0 exited with status 3; started again in {pause:g} s" for pause in pauses]
        assert workers.all[0].restarts == 3

    kept(BROKEN, 1, check)


def test_one_that_does_not_end_can_be_killed() -> None:
    async def check(workers: Workers, told: list[str], at: tuple[str, int]) -> None:
        await until(lambda: all(worker.pid is not None for worker in workers.all))
        await asyncio.sleep(0.1)

    kept(STUBBORN, 2, check)


TELLING = """
import sys
from pathlib import Path
from gateway.workers import in_turn
with open(1, "wb", buffering=0, closefd=False) as stream:
    together = in_turn(stream, Path(sys.argv[1]))
    print("ready", file=sys.stderr, flush=True)
    sys.stdin.read()
    for _ in range(40):
        together.write(sys.argv[2].encode() * 20_000 + b"\\n")
"""


def test_long_lines_of_all_stay_whole_on_a_pipe_that_is_full(tmp_path: Path) -> None:
    read, write = os.pipe()
    telling = [sys.executable, "-c", TELLING, str(tmp_path)]
    ends: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": write, "stderr": subprocess.PIPE}
    writers: list[subprocess.Popen[bytes]] = [subprocess.Popen([*telling, name], **ends) for name in "abc"]
    os.close(write)
    for writer in writers:
        assert writer.stderr is not None
        with writer.stderr:
            assert writer.stderr.readline() == b"ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.close()
    with open(read, "rb", buffering=0) as pipe:
        first = pipe.read(1)
        time.sleep(0.3)  # it is full by now, and all wait
        lines = (first + b"".join(iter(lambda: pipe.read(1000), b""))).splitlines()
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert sorted(lines) == [name * 20_000 for name in (b"a", b"b", b"c") for _ in range(40)]


WAITING = "import time; time.sleep(60)"


def test_one_that_is_being_started_when_all_are_to_end_is_told_as_well() -> None:
    async def stopped() -> float:
        with shared(("127.0.0.1", 0), socket.AF_INET) as port:
            workers = Workers(3, Start(partial(command_of, WAITING), dict(os.environ), port, Path()), lambda _: None)
            running = asyncio.create_task(workers.run())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert all(worker.pid is None for worker in workers.all), "none is there yet"
            workers.stop()
            _, late = await asyncio.wait([running], timeout=10)
            workers.send(signal.SIGKILL)
            await running
            return len(late)

    assert asyncio.run(stopped()) == 0
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(stopped()) == 0


def test_each_listens_on_the_port_and_one_that_dies_leaves_it_to_the_others() -> None:
    async def check(workers: Workers, told: list[str], at: tuple[str, int]) -> None:
        async def asked() -> str:
            try:
                reader, writer = await asyncio.open_connection(*at)
            except OSError:
                return ""
            said = await reader.read()
            writer.close()
            return said.decode()

        seen: set[str] = set()
        while seen < {"0", "1"}:
            seen |= {await asked()} - {""}
        workers.all[0].send(signal.SIGKILL)
        await until(lambda: workers.all[0].restarts == 1)
        answered = {await asked() for _ in range(20)}
        assert "1" in answered and "" not in answered, "nobody is sent to the one that is gone"

    kept(LISTENING, 2, check)
