"""A real Prometheus: its programs, and a server with a configuration of a test's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.bench.program import free_port


def program(name: str) -> str:
    """`prometheus` or `promtool`: what `make install` unpacked, else the machine's. Skips the test where there is
    none, which is said at the installation."""
    beside = Path(sys.executable).parents[1] / "prometheus" / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not here: `make install` unpacks Debian's")
    return found


class Prometheus:
    """A server that is asked."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str) -> Any:
        """What the API says."""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[Any]:
        """The series of an expression, now."""
        found: list[Any] = self.ask(f"query?query={quote(expression)}")["result"]
        return found


@contextmanager
def prometheus(folder: Path, configuration: str) -> Iterator[Prometheus]:
    """Started with this configuration, until the block ends."""
    file = folder / "prometheus.yml"
    file.write_text(configuration)
    address = f"127.0.0.1:{free_port()}"
    flags = (f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}")
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([program("prometheus"), *flags], stdout=log, stderr=log)
        try:
            _ready(f"http://{address}/-/ready", process, folder / "prometheus.log")
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()
            process.wait()


def _ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(400):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"Prometheus did not start: {log.read_text()}")
