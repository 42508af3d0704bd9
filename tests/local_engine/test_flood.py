"""Many more requests at once than can wait: each gets a status, the accepted ones their whole answer, and memory stays
bounded."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import orjson
import pytest

PROGRAM = Path(__file__).parent / "program.py"
TOKENS = 20
BODY = orjson.dumps({"messages": [{"role": "user", "content": "abc" * 20}], "max_tokens": TOKENS, "temperature": 0})
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: engine\r\nconnection: close\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(BODY)
) + BODY
KIB_PER_REQUEST = 64
"""Sockets, tasks and a queue; some 20 were measured."""


@contextmanager
def engine(socket: Path, files: int) -> Iterator[int]:
    """The engine's process id; it is started with so many files allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(socket), "5", "0"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard)),
    )
    try:
        ends = time.monotonic() + 60
        while not socket.exists() and time.monotonic() < ends:
            time.sleep(0.05)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def rss_kib(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


async def asked(socket: Path, begin: asyncio.Event) -> str:
    """The status of one request that is sent when all have a connection."""
    reader, writer = await connected(socket)
    await begin.wait()
    try:
        writer.write(REQUEST)
        answer = await reader.read()
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1].decode()
    if status == "200":
        assert orjson.loads(body)["usage"]["completion_tokens"] == TOKENS
    else:
        assert b"retry-after" in head
    return status


async def connected(socket: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    while True:  # until the listener's queue has room
        with suppress(BlockingIOError, ConnectionRefusedError):
            return await asyncio.open_unix_connection(str(socket))
        await asyncio.sleep(0.02)


async def flood(socket: Path, requests: int, process: int) -> tuple[Counter[str], int]:
    """How often each status came, and the engine's largest memory (KiB)."""
    begin = asyncio.Event()
    tasks = [asyncio.create_task(asked(socket, begin)) for _ in range(requests)]
    await asyncio.sleep(0.5)
    begin.set()
    largest = 0
    while not all(task.done() for task in tasks):
        largest = max(largest, rss_kib(process))
        await asyncio.sleep(0.1)
    return Counter([await task for task in tasks]), largest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("requests", "files"),
    [(900, 256), pytest.param(10_000, 1024, marks=pytest.mark.slow)],
    ids=["more than files", "ten thousand"],
)
def test_every_request_gets_a_status_and_memory_stays_bounded(tmp_path: Path, requests: int, files: int) -> None:
    """Those that the queue has no room for are told so at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < requests + 200:
        pytest.skip(f"this system permits {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, requests + 200), hard))
    try:
        with engine(tmp_path / "s", files) as process:
            before = rss_kib(process)
            statuses, largest = asyncio.run(flood(tmp_path / "s", requests, process))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sum(statuses.values()) == requests
    assert set(statuses) <= {"200", "503"}
    assert statuses["200"] >= min(requests, 256)
    assert largest - before < requests * KIB_PER_REQUEST + 32 * 1024
