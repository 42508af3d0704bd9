"""A server of the benchmark as a process: started on a core of its own, timed until its first right answer, metered,
stopped.

Owns the process group and its log file. Refuses to let one outlive the block that started it.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 90.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.01
ROOT = Path(__file__).parents[2]


class BenchError(Exception):
    """The benchmark cannot go on, or not with this target; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A command line, and what its environment has beyond `clean_environment`."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    directory: Path = ROOT


def clean_environment(own: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server under test: no key, proxy or setting of whoever runs the benchmark reaches it."""
    kept = ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
    return {name: os.environ[name] for name in kept if name in os.environ} | dict(own)


def free_port() -> int:
    """A port of 127.0.0.1 that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cores() -> tuple[int, int]:
    """The core of the server under test, and the core of the load and the fake upstream; the same one where there is
    only one."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    return usable[0], usable[-1]


def pin(core: int) -> None:
    """Bind the calling process and its future children to one core, where the system can (Linux)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


class Program:
    """A running server. Invariant: its CPU time counts its children that live, and never decreases while none of them
    ends."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._root = psutil.Process(process.pid)
        self.log = log
        self.start_seconds = 0.0

    def _family(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """User and system time of the process and its children so far."""
        times = [process.cpu_times() for process in self._family()]
        return float(sum(time.user + time.system for time in times))

    def rss_mb(self) -> float:
        """Resident memory of the process and its children, MiB; pages that they share count twice."""
        return float(sum(process.memory_info().rss for process in self._family())) / 2**20

    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._process.poll() is not None

    def last_words(self, lines: int = 3) -> str:
        """The end of its log, for an error message."""
        text = self.log.read_text(errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in text[-lines:]) or "it wrote nothing"

    def stop(self) -> None:
        """End the whole process group, politely at first."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, sign)
                self._process.wait(STOP_SECONDS)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue


def await_answer(program: Program, name: str, is_up: Callable[[], bool], began: float) -> None:
    """Poll until the server gives a right answer; note how long it took. Raises `BenchError` where it ends or never
    does."""
    while time.perf_counter() - began < START_SECONDS:
        try:
            if is_up():
                program.start_seconds = time.perf_counter() - began
                return
        except (OSError, http.client.HTTPException):
            pass
        if program.ended():
            raise BenchError(f"{name} ended while starting: {program.last_words()} (log: {program.log})")
        time.sleep(POLL_SECONDS)
    raise BenchError(
        f"{name} gave no right answer within {START_SECONDS:.0f} s: {program.last_words()} (log: {program.log})"
    )


@contextmanager
def running(name: str, launch: Launch, core: int, log: Path, is_up: Callable[[], bool]) -> Iterator[Program]:
    """Start a server pinned to `core`, its output in `log`, and stop it at the end. Raises `BenchError` where it does
    not start."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                launch.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=launch.directory,
                env=clean_environment(launch.environment),
                start_new_session=True,
                preexec_fn=lambda: pin(core),
            )
        except OSError as error:
            raise BenchError(f"{name} cannot be started: {error}") from error
    program = Program(process, log)
    try:
        await_answer(program, name, is_up, began)
        yield program
    finally:
        program.stop()
