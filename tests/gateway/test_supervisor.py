"""The supervisor against small programs that play an engine: they start, die, hang, and refuse to start."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.supervisor import FIRST_BACKOFF, WATCH_EVERY, EngineSpec, Onlooker, Supervisor

ENGINE = """
import http.server, json, os, socket, socketserver, sys, threading
mode, uds = sys.argv[1], sys.argv[sys.argv.index("--uds") + 1]
print("hello from", mode, file=sys.stderr, flush=True)
if mode == "broken":
    sys.exit(3)
if mode == "chatty":
    sys.stderr.write("\\r50 %" * 100_000 + "\\n")
    print("and then", file=sys.stderr, flush=True)
    mode = "ok"
if os.path.exists(uds):
    os.unlink(uds)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status = {"ok": "ready", "failing": "failed", "unreadable": "ready", "breaking": "ready"}[mode]
        if mode == "breaking" and os.path.exists(uds + ".broken"):
            status = "failed"
        body = json.dumps({"status": status, "context_window": 64}).encode()
        if mode == "unreadable" and self.path == "/tokenizer":
            body = b"<html>"
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def address_string(self):
        return "unix"
    def log_message(self, *_):
        pass

class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
Server(uds, Handler).serve_forever()
"""


@dataclass
class Reports:
    """Remembers what the supervisor says."""

    events: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    described: Mapping[str, Any] = field(default_factory=dict)
    refuses: bool = False

    def engine_down(self, name: str, reason: str, retry_after: float) -> None:
        self.events.append(reason)

    async def engine_up(self, name: str, described: Mapping[str, Any]) -> None:
        if self.refuses:
            raise ValueError("tokenizer.json cannot be read")
        self.described = described
        self.events.append("up")

    def engine_said(self, name: str, line: str) -> None:
        self.lines.append(line)


def supervised(
    tmp_path: Path,
    mode: str,
    test: Callable[[Supervisor, Reports, list[float]], Awaitable[None]],
    python: str = sys.executable,
    **of_reports: Any,
) -> Reports:
    """Run one engine under a supervisor that does not really wait between restarts."""
    program = tmp_path / "engine.py"
    program.write_text(ENGINE)
    reports, waits = Reports(**of_reports), list[float]()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await asyncio.sleep(0)

    async def run() -> None:
        command = (python, str(program), mode)
        spec = EngineSpec("local", "demo", str(tmp_path / "e.sock"), 60.0, program=command)
        supervisor = Supervisor(spec, reports, sleep=sleep)
        supervisor.start()
        try:
            async with asyncio.timeout(60):
                await test(supervisor, reports, waits)
        finally:
            await supervisor.stop(grace=5)
        assert supervisor.pid is None

    asyncio.run(run())
    return reports


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is awaited happens in another process
        await asyncio.sleep(0.01)


def test_an_engine_is_started_described_and_stopped(tmp_path: Path) -> None:
    async def check(supervisor: Supervisor, reports: Reports, waits: list[float]) -> None:
        assert reports.events == ["its engine is starting"]
        await until(lambda: "up" in reports.events)
        assert supervisor.pid is not None

    reports = supervised(tmp_path, "ok", check)
    assert reports.described["context_window"] == 64 and "hello from ok" in reports.lines


def test_another_process_sees_the_same_engine_come_go_and_come_back(tmp_path: Path) -> None:
    async def check(supervisor: Supervisor, reports: Reports, waits: list[float]) -> None:
        seen = Reports()
        onlooker = Onlooker(supervisor.spec, seen)
        onlooker.start()
        await until(lambda: seen.events == ["its engine is starting", "up"])
        assert seen.described["context_window"] == 64 and onlooker.pid is None and supervisor.pid is not None
        await supervisor.stop()
        await until(lambda: seen.events[-1] == "its engine stopped and is being restarted")
        supervisor.start()
        await until(lambda: seen.events[-1] == "up")
        first = supervisor.pid
        await onlooker.stop()
        assert seen.events[-1] == "its engine is stopped" and supervisor.pid == first, "it ends nothing"

    supervised(tmp_path, "ok", check)


def test_an_engine_that_is_killed_is_back_without_waiting(tmp_path: Path) -> None:
    async def check(supervisor: Supervisor, reports: Reports, waits: list[float]) -> None:
        await until(lambda: "up" in reports.events)
        first = supervisor.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: reports.events.count("up") == 2)
        assert supervisor.pid not in (None, first) and waits == [0.0]
        assert reports.events[2] == "its engine stopped and is being restarted"

    supervised(tmp_path, "ok", check)


def test_an_engine_that_does_not_start_is_tried_ever_more_rarely(tmp_path: Path) -> None:
    async def check(supervisor: Supervisor, reports: Reports, waits: list[float]) -> None:
        await until(lambda: len(waits) >= 4)
        assert waits[:4] == [FIRST_BACKOFF * 2**n for n in range(4)]
        assert "its engine failed to start and is tried again" in reports.events

    reports = supervised(tmp_path, "broken", check)
    assert "exited with status 3; restarting in 0.5 s" in reports.lines and "up" not in reports.events


def test_an_engine_that_fails_while_it_is_up_is_replaced_at_once(tmp_path: Path) -> None:
    broken = tmp_path / "e.sock.broken"

    async def check(supervisor: Supervisor, reports: Reports, waits: list[float]) -> None:
        await until(lambda: "up" in reports.events)
        first = supervisor.pid
        broken.touch()
        async with asyncio.timeout(5 * WATCH_EVERY):
            await until(lambda: reports.events[-1] == "its engine stopped and is being restarted")
        broken.unlink()
        await until(lambda: reports.events.count("up") == 2)
        assert supervisor.pid not in (None, first)

    reports = supervised(tmp_path, "breaking", check)
    assert "says that it has failed; it is killed" in reports.lines


def test_an_engine_that_says_that_it_failed_is_replaced(tmp_path: Path) -> None:
    async def check(supervisor: Supervisor, reports: Reports, waits: list[float]) -> None:
        await until(lambda: len(waits) >= 2)

    assert "up" not in supervised(tmp_path, "failing", check).events


def test_an_engine_ends_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    """The child holds the reading end of a pipe; when the writing end goes with us, it reads the end of file."""

    async def check(supervisor: Supervisor, reports: Reports, waits: list[float]) -> None:
        await until(lambda: "up" in reports.events)
        process = supervisor._process
        assert process is not None and process.stdin is not None
        process.stdin.close()
        await until(lambda: len(waits) == 1)

    supervised(tmp_path, "ok", check)


async def _twice(supervisor: Supervisor, reports: Reports, waits: list[float]) -> None:
    await until(lambda: len(waits) >= 2)


def test_an_engine_whose_description_is_of_no_use_is_tried_again_and_the_reason_told(tmp_path: Path) -> None:
    reports = supervised(tmp_path, "ok", _twice, refuses=True)
    assert "what it says of itself cannot be used: tokenizer.json cannot be read" in reports.lines
    assert "its engine failed to start and is tried again" in reports.events


def test_an_engine_that_answers_nonsense_is_tried_again(tmp_path: Path) -> None:
    reports = supervised(tmp_path, "unreadable", _twice)
    assert any(line.startswith("what it says of itself cannot be used") for line in reports.lines)


def test_a_program_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    reports = supervised(tmp_path, "ok", _twice, python=str(tmp_path / "no-python"))
    assert "cannot be started (No such file or directory); restarting in 0.5 s" in reports.lines


def test_an_engine_may_say_more_than_a_line_holds(tmp_path: Path) -> None:
    """A progress bar is one line of any length; nobody reading it would stop the engine at its next word."""

    async def check(supervisor: Supervisor, reports: Reports, waits: list[float]) -> None:
        await until(lambda: "up" in reports.events and "and then" in " ".join(reports.lines))

    assert all(len(line) <= 400 for line in supervised(tmp_path, "chatty", check).lines)
