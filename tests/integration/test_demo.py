"""`hybridgate demo` as its user runs it: a program that shows a table, then serves until it is interrupted."""

from __future__ import annotations

import asyncio
import io
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from gateway.demo.tour import POLICY, SCRIPT, addresses, tour
from gateway.loading import load_policy


def test_the_policy_of_the_demo_loads_and_everything_in_it_is_configured() -> None:
    policy = load_policy(POLICY, addresses("http://127.0.0.1:1"))
    assert [d.name for d in policy.deployments.values() if d.unavailable] == []
    assert {step.ends_at for step in SCRIPT} - policy.deployments.keys() == {"400", "503"}


def test_a_port_in_use_is_one_line_with_its_fix() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = io.StringIO()
        port = taken.getsockname()[1]
        assert asyncio.run(tour(stay=True, port=port, console=Console(file=said, width=200))) == 2
    assert said.getvalue().count("\n") == 1
    assert "--port" in said.getvalue()


@pytest.mark.slow
def test_every_request_ends_where_the_script_says_and_the_gateway_stays_until_interrupted(tmp_path: Path) -> None:
    """Cost, privacy, context and failover decide as shown; no card number reached the fake cloud; Ctrl-C ends it."""
    shown = tmp_path / "shown.txt"
    command = [sys.executable, "-m", "gateway.cli", "demo", "--port", "0"]
    with shown.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as program:
        try:
            while "Now yours" not in (text := shown.read_text()):
                assert program.poll() is None, text
                time.sleep(0.1)
            url = re.search(r"http://127\.0\.0\.1:\d+", text)
            assert url is not None
            answer = httpx.get(f"{url.group()}/v1/models", trust_env=False)
            assert answer.status_code == 200
        finally:
            program.send_signal(signal.SIGINT)
        assert program.wait(60) == 0
    text = shown.read_text()
    assert "expected" not in text
    assert "0 of them held the card number" in text
