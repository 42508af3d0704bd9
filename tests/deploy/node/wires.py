"""A node's network: a namespace with a bridge and a router, one namespace for each pod, and one that is the world.

Addresses: pods 10.244.0.0/16, of which the node is .0.1; the world 198.51.100.0/24. Nothing is set in the machine's
own namespace.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tests.deploy.node.programs import run

NODE = "10.244.0.1"
WORLD = "198.51.100.7"
_WORLDS_DOOR = "198.51.100.1"


class Wires:
    """Namespaces are named after this process: `hybridgate-PID-…`. Invariant: `close` removes all of them."""

    def __init__(self) -> None:
        self._prefix = f"hybridgate-{os.getpid()}-"
        self._made: list[str] = []
        self._count = 1
        self.node = self._namespace("node")
        for command in ("link add bridge type bridge", f"address add {NODE}/16 dev bridge", "link set bridge up"):
            self._ip(self.node, command)
        router = "echo 1 >/proc/sys/net/ipv4/ip_forward"
        run("ip", "netns", "exec", self.node, "sh", "-c", router)
        self.world = self._namespace("world")
        self._ip(self.world, f"link add eth0 type veth peer name world netns {self.node}")
        self._ip(self.world, f"address add {WORLD}/24 dev eth0")
        self._ip(self.world, "link set eth0 up")
        self._ip(self.node, f"address add {_WORLDS_DOOR}/24 dev world")
        self._ip(self.node, "link set world up")
        self._ip(self.world, f"route add default via {_WORLDS_DOOR}")

    def attach(self, pod: str) -> tuple[str, str]:
        """A new namespace, on the bridge: its name and its address, which nobody had before."""
        namespace = self._namespace(pod)
        self._count += 1
        address = f"10.244.{self._count // 250}.{self._count % 250}"
        port = f"pod{self._count}"
        self._ip(namespace, f"link add eth0 type veth peer name {port} netns {self.node}")
        self._ip(self.node, f"link set {port} master bridge up")
        self._ip(namespace, f"address add {address}/16 dev eth0")
        self._ip(namespace, "link set eth0 up")
        self._ip(namespace, f"route add default via {NODE}")
        return namespace, address

    def detach(self, namespace: str) -> None:
        """Remove it, and the wire to it."""
        run("ip", "netns", "delete", namespace)
        self._made.remove(namespace)

    def close(self) -> None:
        for namespace in self._made[::-1]:
            with suppress(RuntimeError):
                self.detach(namespace)

    def _namespace(self, name: str) -> str:
        full = self._prefix + name
        run("ip", "netns", "add", full)
        self._made.append(full)
        self._ip(full, "link set lo up")
        return full

    @staticmethod
    def _ip(namespace: str, command: str) -> None:
        run("ip", "-n", namespace, *command.split())


def abandoned() -> list[str]:
    """Namespaces of processes that are no more."""
    names = [path.name for path in Path("/run/netns").glob("hybridgate-*-*")]
    return [name for name in names if not Path("/proc", name.split("-")[1]).exists()]
