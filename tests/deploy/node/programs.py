"""Programs of the system that a node needs, run by name; and a thread's stay in a network namespace."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNPACKED = Path(sys.prefix) / "network"  # where requirements/network.sh puts what the system lacks
NEEDED = ("ip", "nft", "nsenter", "unshare", "setpriv", "chroot", "mount")

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def program(name: str) -> str | None:
    """Its path; the system's, else the unpacked one."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") or shutil.which(name, path=UNPACKED)


def missing() -> str | None:
    """Why no node can run here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    absent = [name for name in NEEDED if program(name) is None]
    if absent:
        return f"{', '.join(absent)} is missing: `make install` unpacks it, or install nftables, iproute2, util-linux"
    tried = subprocess.run(
        ["unshare", "--net", str(program("nft")), "list", "ruleset"], capture_output=True, check=False
    )
    return None if tried.returncode == 0 else "this kernel allows no network namespaces, or has no nftables"


def run(name: str, *arguments: str, text: str | None = None) -> str:
    """Its output. Raises RuntimeError with what it says where it fails."""
    command = [program(name) or name, *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join((name, *arguments))}: {done.stderr.strip()}\n{text or ''}")
    return done.stdout


@contextmanager
def within(namespace: str) -> Iterator[None]:
    """Sockets that this thread makes in the block are of the network namespace, for as long as they live."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        _enter(there)
        yield
    finally:
        _enter(home)
        os.close(there)
        os.close(home)


def _enter(namespace: int) -> None:
    if _LIBC.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
