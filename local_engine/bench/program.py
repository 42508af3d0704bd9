"""Owns a server that is measured, as a process: started, waited for, metered, stopped; refuses to let one outlive the
block that started it."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 300.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.2
KEPT = ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "HOME", "CUDA_VISIBLE_DEVICES")
"""What of this process's environment a server sees; no key, token or proxy is among it."""


class BenchError(Exception):
    """The benchmark cannot go on, or not with this server; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How a server is started, and what it is asked for: `path` is ready when it answers 200, `model` goes into each
    request's body."""

    name: str
    command: tuple[str, ...]
    port: int
    ready: str
    model: str
    environment: Mapping[str, str] = field(default_factory=dict)


def free_port() -> int:
    """A port of 127.0.0.1 that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Program:
    """A running server of one process."""

    def __init__(self, launch: Launch, process: subprocess.Popen[bytes], log: Path) -> None:
        self.launch = launch
        self._process = process
        self._log = log

    def cpu_seconds(self) -> float:
        """User and system time of the process so far, all its threads; nan where the system does not tell (not
        Linux)."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return float("nan")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mb(self) -> float:
        """Resident memory, MiB; nan where the system does not tell."""
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except OSError:
            return float("nan")
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def last_words(self) -> str:
        """The end of its log, for an error message."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-3:]) or "it wrote nothing"

    def wait(self) -> None:
        """Until it is ready. Raises BenchError."""
        began = time.monotonic()
        while time.monotonic() - began < START_SECONDS:
            if self._process.poll() is not None:
                raise BenchError(f"{self.launch.name} ended while starting: {self.last_words()} (log: {self._log})")
            if _answers(self.launch):
                return
            time.sleep(POLL_SECONDS)
        raise BenchError(f"{self.launch.name} was not ready after {START_SECONDS:.0f} s (log: {self._log})")

    def stop(self) -> None:
        """End it and its children, politely at first."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, sign)
                self._process.wait(STOP_SECONDS)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


def _answers(launch: Launch) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", launch.port, timeout=5)
    try:
        connection.request("GET", launch.ready)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextmanager
def running(launch: Launch, threads: int, core: int | None, log: Path) -> Iterator[Program]:
    """The server, ready, on so many threads and, where `core` is given and the system can, on that core alone. Raises
    BenchError."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {name: os.environ[name] for name in KEPT if name in os.environ} | dict(launch.environment)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = str(threads)
    command = launch.command
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(  # noqa: S603 - what `peers` says
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise BenchError(f"{launch.name} cannot be started: {error}") from error
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, {core})
    program = Program(launch, process, log)
    try:
        program.wait()
        yield program
    finally:
        program.stop()
