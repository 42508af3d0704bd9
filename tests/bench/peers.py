"""LiteLLM's proxy and Portkey's gateway, each in an environment of its own under the benchmark's work directory.

Owns their versions, their installation and how they are started. Refuses to install anything into the environment
that runs the benchmark.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.bench.load import Address
from tests.bench.program import BenchError, Launch
from tests.bench.wire import MODEL

LITELLM = "1.106.2"
PORTKEY = "1.15.2"
HONO_NODE_SERVER = "1.12.2"  # 1.13 to 1.19 answer 500 to every stream of this Portkey
INSTALL_SECONDS = 900
KEY = "sk-bench-no-secret"

# Portkey listens on every interface and has no setting for it; the benchmark's servers are for this machine alone.
_LOOPBACK = """\
const { Server } = require("node:net");
const listen = Server.prototype.listen;
Server.prototype.listen = function (port, ...rest) {
  const done = rest.find((argument) => typeof argument === "function");
  return listen.call(this, { port: typeof port === "object" ? port.port : port, host: "127.0.0.1" }, done);
};
"""


def _run(what: str, command: list[str], directory: Path) -> None:
    """Run one step of an installation. Raises `BenchError` with what it said."""
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=INSTALL_SECONDS, env=os.environ, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{what}: not finished after {INSTALL_SECONDS} s") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).splitlines()
        said = [line.strip() for line in lines if "error" in line.lower()] or lines[-1:] or ["no output"]
        raise BenchError(f"{what}: exit code {done.returncode}: {' | '.join(said[:3])}")


def _begin(directory: Path) -> bool:
    """Whether there is something to install; if so the directory is emptied first, as a half installation is worth
    nothing."""
    if (directory / "installed").exists():
        return False
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return True


def install_litellm(work: Path) -> Path:
    """Install the proxy once, with the event loop and parser that its uvicorn would take if they were there. Returns
    its folder."""
    home = work / f"litellm-{LITELLM}"
    if _begin(home):
        _run("python -m venv", [sys.executable, "-m", "venv", str(home / "venv")], home)
        wanted = [f"litellm[proxy]=={LITELLM}", "uvloop", "httptools"]
        _run("pip install litellm[proxy]", [str(home / "venv/bin/pip"), "install", "-q", *wanted], home)
        (home / "installed").touch()
    return home


def litellm(work: Path, upstream: str, port: int) -> tuple[Launch, Address]:
    """The proxy with one deployment, one worker and its logging down to errors, as its production guide advises."""
    home = install_litellm(work)
    deployment = {"model": f"openai/{MODEL}", "api_base": f"{upstream}/v1", "api_key": KEY}
    settings = {
        "model_list": [{"model_name": "auto", "litellm_params": deployment}],
        "general_settings": {"master_key": KEY},
    }
    config = home / "config.json"  # YAML reads JSON; the extension does not matter to it
    config.write_text(json.dumps(settings, indent=1))
    programs = home / "venv/bin"
    environment = {
        "HOME": str(home),
        "PATH": f"{programs}:{os.environ.get('PATH', '')}",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it fetches its price map over the network
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
    }
    options = ("--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1")
    launch = Launch((str(programs / "litellm"), *options), environment, home)
    return launch, Address(port, (("authorization", f"Bearer {KEY}"),))


def install_portkey(work: Path) -> Path:
    """Install the gateway once, with a web server that can stream. Returns its folder."""
    home = work / f"portkey-{PORTKEY}"
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise BenchError("node and npm are not installed")
    if _begin(home):
        package = {
            "name": "bench-portkey",
            "private": True,
            "dependencies": {"@portkey-ai/gateway": PORTKEY},
            "overrides": {"@hono/node-server": HONO_NODE_SERVER},
        }
        (home / "package.json").write_text(json.dumps(package, indent=1))
        (home / "loopback.cjs").write_text(_LOOPBACK)
        _run("npm install @portkey-ai/gateway", ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"], home)
        (home / "installed").touch()
    return home


def portkey(work: Path, upstream: str, port: int) -> tuple[Launch, Address]:
    """The gateway without its console; provider and upstream are told in headers, as its callers do."""
    home = install_portkey(work)
    server = "node_modules/@portkey-ai/gateway/build/start-server.js"
    command = ("node", "--require", "./loopback.cjs", server, "--headless", f"--port={port}")
    launch = Launch(command, {"HOME": str(home), "NODE_ENV": "production"}, home)
    headers = (
        ("authorization", f"Bearer {KEY}"),
        ("x-portkey-provider", "openai"),
        ("x-portkey-custom-host", f"{upstream}/v1"),
    )
    return launch, Address(port, headers)
