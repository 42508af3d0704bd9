"""The engine's process: start, signals, draining, and the ways it refuses to start."""

from __future__ import annotations

import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.slow  # most start a process that imports torch


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "local_engine", "serve", *flags]


@contextmanager
def running(*flags: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command(*flags), stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def client(uds: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(uds)), base_url="http://engine", timeout=60)


def wait_for(http: httpx.Client, uds: Path, status: str) -> httpx.Response:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if listens(uds):
            health = http.get("/health")
            if health.json()["status"] == status:
                return health
        time.sleep(0.05)
    raise AssertionError(f"not {status} within two minutes")


def listens(uds: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(uds)) == 0


def test_sigterm_lets_a_stream_finish_and_removes_the_socket(llama: Path, tmp_path: Path) -> None:
    uds = tmp_path / "s"
    with running("--model", str(llama), "--served-name", "tiny", "--uds", str(uds), "--drain-seconds", "60") as process:
        with client(uds) as http:
            wait_for(http, uds, "ready")
            assert stat.S_IMODE(uds.stat().st_mode) == 0o600
            body = {
                "messages": [{"role": "user", "content": "fox"}],
                "max_tokens": 200,
                "stream": True,
                "temperature": 0,
            }
            with http.stream("POST", "/v1/chat/completions", json=body) as stream:
                lines = stream.iter_lines()
                first = next(lines)
                process.send_signal(signal.SIGTERM)
                rest = list(lines)
        assert first.startswith("data: {")
        assert rest[-2:] == ["data: [DONE]", ""]
        assert process.wait(60) == 0
        assert not uds.exists()


def test_a_drain_that_takes_too_long_ends_the_stream_with_an_error(llama: Path, tmp_path: Path) -> None:
    uds = tmp_path / "s"
    with running("--model", str(llama), "--uds", str(uds), "--drain-seconds", "0") as process:
        with client(uds) as http:
            wait_for(http, uds, "ready")
            body = {
                "messages": [{"role": "user", "content": "fox"}],
                "max_tokens": 240,
                "stream": True,
                "temperature": 0,
            }
            with http.stream("POST", "/v1/chat/completions", json=body) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = "\n".join(lines)
        # A fast machine may have finished before the signal came; a cut stream must not look complete.
        assert ("[DONE]" in rest) != ("shutting down" in rest)
        assert process.wait(60) == 0


def test_it_exits_when_its_parent_lets_go_of_standard_input(llama: Path, tmp_path: Path) -> None:
    """It also replaces the socket file that a dead process has left."""
    uds = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(uds))
    with running("--model", str(llama), "--uds", str(uds), "--exit-with-parent") as process, client(uds) as http:
        wait_for(http, uds, "ready")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def test_a_supervised_process_that_cannot_load_stays_and_says_why(tmp_path: Path) -> None:
    uds = tmp_path / "s"
    with running("--model", "./nowhere", "--uds", str(uds), "--exit-with-parent") as process, client(uds) as http:
        assert "./nowhere is not a directory" in wait_for(http, uds, "failed").json()["error"]
        assert process.poll() is None


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--model", "./nowhere"], 1, "./nowhere is not a directory"),
        (["--model", "demo", "--dtype", "int3", "--quantization", "int4"], 2, "--quantization must be one of none"),
        (["--port", "99999"], 2, "--port"),
        (["--uds", "/nowhere/at/all"], 2, "cannot listen on unix:/nowhere/at/all"),
    ],
)
def test_what_cannot_start_says_why_in_a_line(flags: list[str], status: int, said: str, tmp_path: Path) -> None:
    listen = [] if {"--port", "--uds"} & set(flags) else ["--uds", str(tmp_path / "s")]
    done = subprocess.run(
        command(*flags, *listen), capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_said_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(command("--port", port), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"cannot listen on http://127.0.0.1:{port}" in done.stderr
    assert "another --port" in done.stderr
