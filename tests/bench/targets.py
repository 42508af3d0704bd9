"""What is compared: the fake upstream itself, the bare pass-through, Hybridgate, and the peers.

Owns how each is started and reached. Refuses to leave one out silently: what cannot be prepared is `Missing`, with
the reason.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.bench import peers
from tests.bench.load import Address
from tests.bench.program import ROOT, BenchError, Launch, free_port

BASELINE = "direct"


@dataclass(frozen=True, slots=True)
class Target:
    """Something to measure. `launch` is None for the fake upstream, which runs all the time. `slow`: under about 200
    requests/s, so that its throughput needs longer runs."""

    name: str
    title: str
    address: Address
    launch: Launch | None
    slow: bool = False


@dataclass(frozen=True, slots=True)
class Missing:
    """A target that cannot be measured here, and why."""

    name: str
    title: str
    reason: str


def _python(module: str, *options: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *options)


def upstream_launch(port: int) -> Launch:
    """The fake upstream on a port of 127.0.0.1."""
    return Launch(_python("tests.bench.upstream", "--port", str(port)), {})


def _pass_through(work: Path, upstream: str, port: int) -> tuple[Launch, Address]:
    return Launch(_python("tests.bench.passthrough", "--port", str(port), "--upstream", upstream), {}), Address(port)


def write_policy(directory: Path, upstream: str) -> Path:
    """The shipped default policy, unchanged, over the shipped deployments, except that `local` is the fake upstream
    behind `backend: openai` instead of an engine to start. Returns the policy's path."""
    directory.mkdir(parents=True, exist_ok=True)
    shipped = ROOT / "policies"
    deployments: dict[str, Any] = yaml.safe_load((shipped / "deployments.yaml").read_text())
    deployments["deployments"]["local"] = {
        "backend": "openai",
        "url": f"{upstream}/v1",
        "model": "bench-model",
        "zone": "on_premises",
        "context_window": 131072,
        "cost": {"usd_per_million_tokens": {"input": 0.02, "output": 0.08}},
    }
    (directory / "deployments.yaml").write_text(yaml.safe_dump(deployments, sort_keys=False))
    return Path(shutil.copy(shipped / "default.yaml", directory / "default.yaml"))


def _hybridgate(work: Path, upstream: str, port: int) -> tuple[Launch, Address]:
    policy = write_policy(work / "hybridgate", upstream)
    environment = {"HYBRIDGATE_HOST": "127.0.0.1", "HYBRIDGATE_PORT": str(port), "HYBRIDGATE_POLICY": str(policy)}
    environment["HOME"] = str(policy.parent)
    environment["HYBRIDGATE_ADMIN_PORT"] = "-1"
    return Launch(_python("gateway.cli", "serve"), environment), Address(port)  # this checkout's, installed or not


_Prepare = Callable[[Path, str, int], tuple[Launch, Address]]

TITLES: Mapping[str, str] = {
    BASELINE: "fake upstream, directly",
    "pass-through": "bare Starlette + aiohttp",
    "hybridgate": "Hybridgate",
    "litellm": f"LiteLLM proxy {peers.LITELLM}",
    "portkey": f"Portkey gateway {peers.PORTKEY}",
}
_PREPARE: Mapping[str, _Prepare] = {
    "pass-through": _pass_through,
    "hybridgate": _hybridgate,
    "litellm": peers.litellm,
    "portkey": peers.portkey,
}
_SLOW = frozenset({"litellm"})


def prepare(name: str, work: Path, upstream_port: int) -> Target | Missing:
    """Make a target ready to start; peers are installed into `work` the first time."""
    if name == BASELINE:
        return Target(name, TITLES[name], Address(upstream_port), None)
    try:
        launch, address = _PREPARE[name](work, f"http://127.0.0.1:{upstream_port}", free_port())
    except BenchError as error:
        return Missing(name, TITLES[name], str(error))
    return Target(name, TITLES[name], address, launch, name in _SLOW)
