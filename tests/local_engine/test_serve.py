"""The engine's process: start, signals, draining, and the ways it refuses to start."""

from __future__ import annotations

import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.slow  # each starts a process


LETTERS = (sys.executable, str(Path(__file__).with_name("program.py")))
"""The same process without torch; takes the socket's path, the drain's and the load's seconds."""


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "local_engine", "serve", *flags]


@contextmanager
def running(*whole: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        whole, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
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


def asked(max_tokens: int) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": "fox"}],
        "max_tokens": max_tokens,
        "stream": True,
        "temperature": 0,
    }


def test_sigterm_lets_a_stream_finish_and_removes_the_socket(llama: Path, tmp_path: Path) -> None:
    uds = tmp_path / "s"
    flags = ("--model", str(llama), "--served-name", "tiny", "--uds", str(uds), "--drain-seconds", "60")
    with running(*command(*flags)) as process:
        with client(uds) as http:
            wait_for(http, uds, "ready")
            assert stat.S_IMODE(uds.stat().st_mode) == 0o600
            with http.stream("POST", "/v1/chat/completions", json=asked(200)) as stream:
                lines = stream.iter_lines()
                first = next(lines)
                process.send_signal(signal.SIGTERM)
                rest = list(lines)
        assert first.startswith("data: {")
        assert rest[-2:] == ["data: [DONE]", ""]
        assert process.wait(60) == 0
        assert not uds.exists()


@pytest.mark.parametrize("ending", ["SIGTERM", "SIGINT", "end of standard input"])
def test_what_does_not_finish_within_the_drain_ends_with_an_error_event(ending: str, tmp_path: Path) -> None:
    """Also where the socket's file was left over from a dead process."""
    uds = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(uds))
    with running(*LETTERS, str(uds), "0", "0", "--exit-with-parent") as process:
        with client(uds) as http:
            wait_for(http, uds, "ready")
            # Minutes of steps, so it cannot have been finished before.
            with http.stream("POST", "/v1/chat/completions", json=asked(90_000)) as stream:
                lines = stream.iter_lines()
                next(lines)
                if ending == "end of standard input":
                    assert process.stdin is not None
                    process.stdin.close()
                else:
                    process.send_signal(signal.Signals[ending])
                rest = "\n".join(lines)
        assert "shutting down" in rest
        assert "[DONE]" not in rest
        assert process.wait(60) == 0
        assert not uds.exists()


def test_a_request_that_never_comes_whole_ends_with_the_drain_and_without_a_traceback(tmp_path: Path) -> None:
    uds = tmp_path / "s"
    with running(*LETTERS, str(uds), "0", "0") as process, client(uds) as http, socket.socket(socket.AF_UNIX) as half:
        wait_for(http, uds, "ready")
        half.connect(str(uds))
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: engine\r\ncontent-length: 500\r\n\r\n{")
        assert http.get("/load").status_code == 200  # by now the half is being read
        process.send_signal(signal.SIGTERM)
        half.settimeout(30)
        answer = half.recv(10_000).decode()
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert answer.startswith("HTTP/1.1 503 ")
    assert '"not_ready"' in answer


@pytest.mark.parametrize("endless", [b"x-%d: ", b"x-0: "], ids=["many headers", "one header"])
def test_headers_without_an_end_are_refused(endless: bytes, tmp_path: Path) -> None:
    """They are in memory until they end, and nothing else bounds them."""
    uds = tmp_path / "s"
    with running(*LETTERS, str(uds), "1", "0"), client(uds) as http:
        wait_for(http, uds, "ready")
        with socket.socket(socket.AF_UNIX) as flood:
            flood.connect(str(uds))
            flood.sendall(b"GET /health HTTP/1.1\r\nhost: engine\r\n" + endless.replace(b"%d", b"1"))
            sent = 0
            with suppress(ConnectionError):
                while sent < 50 * 2**20:
                    header = b"" if endless == b"x-0: " else b"\r\nx-1: "
                    sent += flood.send(header + b"a" * 60_000)
            flood.settimeout(30)
            answer = b""
            with suppress(ConnectionError):
                answer = flood.recv(1000)
        assert sent < 5 * 2**20
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
        assert http.get("/health").status_code == 200


def test_a_load_that_takes_minutes_does_not_keep_a_process_that_shall_end(tmp_path: Path) -> None:
    uds = tmp_path / "s"
    with running(*LETTERS, str(uds), "0", "1000") as process, client(uds) as http:
        wait_for(http, uds, "loading")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not uds.exists()


def test_who_drains_leaves_the_socket_of_its_successor_alone(tmp_path: Path) -> None:
    """The draining process has closed its own, so the next one takes the path; both hold it for a while."""
    uds = tmp_path / "s"
    with running(*LETTERS, str(uds), "60", "0") as old, client(uds) as http:
        wait_for(http, uds, "ready")
        with http.stream("POST", "/v1/chat/completions", json=asked(90_000)) as stream:
            next(stream.iter_lines())
            old.send_signal(signal.SIGTERM)
            while listens(uds):
                time.sleep(0.01)
            with running(*LETTERS, str(uds), "0", "0") as new, client(uds) as other:
                wait_for(other, uds, "ready")
                stream.close()
                assert old.wait(60) == 0
                assert other.get("/health").json()["status"] == "ready"
                assert listens(uds)
                new.send_signal(signal.SIGTERM)
                assert new.wait(60) == 0


def test_a_supervised_process_that_cannot_load_stays_and_says_why(tmp_path: Path) -> None:
    uds = tmp_path / "s"
    with (
        running(*command("--model", "./nowhere", "--uds", str(uds), "--exit-with-parent")) as process,
        client(uds) as http,
    ):
        assert "./nowhere is not a directory" in wait_for(http, uds, "failed").json()["error"]
        assert process.poll() is None


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--model", "./nowhere"], 1, "./nowhere is not a directory"),
        (["--model", "demo", "--dtype", "int3", "--quantization", "int3"], 2, "--quantization must be one of none"),
        (["--port", "99999"], 2, "--port"),
        (["--uds", "/nowhere/at/all"], 2, "cannot listen on unix:/nowhere/at/all"),
        (["--uds", "/tmp/" + "x" * 200], 2, "AF_UNIX path too long"),
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


@pytest.mark.parametrize("redirected", ["< /dev/null", f"< {__file__}", "<&-"])
def test_without_a_pipe_no_parent_can_be_watched(redirected: str, tmp_path: Path) -> None:
    program = " ".join((*LETTERS, str(tmp_path / "s"), "0", "0", "--exit-with-parent"))
    done = subprocess.run(f"exec {program} {redirected}", shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ConfigError: --exit-with-parent watches standard input, which is neither" in done.stderr


def test_a_port_in_use_is_said_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(command("--port", port), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"cannot listen on http://127.0.0.1:{port}" in done.stderr
    assert "another --port" in done.stderr
