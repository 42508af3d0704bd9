"""A container without an image: this checkout's programs under a root of their own, as a pod's manifest restricts them.

Owns what the process sees (files, variables, user) and how it is started. Not made: limits of CPU and memory, seccomp,
a process namespace. The image's own variables are those of its Dockerfile.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from tests.deploy.cluster import DEPLOY, ROOT
from tests.deploy.node.programs import program
from tests.redis_server import executable

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64")
_OF_ETC = ("passwd", "group", "nsswitch.conf", "host.conf", "ld.so.cache", "ld.so.conf", "ssl", "alternatives")
_DEVICES = ("null", "zero", "full", "random", "urandom")


@dataclass(frozen=True)
class Mount:
    """A folder of the machine at a place of the container's."""

    source: Path
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class Container:
    """What is to be started. `files`: of the pod's, by path below /etc."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    user: int = 10001
    group: int = 10001
    read_only: bool = True
    mounts: tuple[Mount, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


def programs() -> tuple[Path, ...]:
    """The folders that hold the programs of all images: this checkout, its environment, its Python, Redis."""
    folders = {ROOT, Path(sys.prefix), Path(sys.base_prefix), Path(executable()).resolve().parent}
    within = {folder for folder in folders if any(other in folder.parents for other in folders)}
    return tuple(sorted(f for f in folders - within if not f.is_relative_to("/usr")))


def environment_of_image(image: str) -> dict[str, str]:
    """The variables that an image sets, with the programs of this checkout in the place of its own."""
    name = image.rpartition("/")[2].partition(":")[0]
    path = f"{Path(sys.prefix) / 'bin'}:{Path(executable()).resolve().parent}:/usr/local/bin:/usr/bin:/bin"
    dockerfile = DEPLOY / f"{name.removeprefix('hybridgate-')}.Dockerfile"
    if not dockerfile.exists():
        return {"PATH": path}
    (line,) = re.findall(r"^ENV (PATH=.*)$", dockerfile.read_text(), re.MULTILINE)
    set_by_it = dict(entry.split("=", 1) for entry in shlex.split(line))
    return set_by_it | {"PATH": path, "PYTHONPATH": str(ROOT)}


def start(container: Container, namespace: str, folder: Path, output: int) -> subprocess.Popen[bytes]:
    """Start it in a network namespace. `folder`: of its own, for its root and its files; `output`: a file descriptor
    for what it says. The process that is returned becomes the container's."""
    (folder / "root").mkdir(parents=True, exist_ok=True)
    for name, text in container.files.items():
        (folder / name).write_text(text)
    script = folder / "start.sh"
    script.write_text(_script(container, folder))
    namespaced = [str(program("nsenter")), f"--net=/run/netns/{namespace}", "unshare", "--mount", "sh", str(script)]
    return subprocess.Popen(
        namespaced,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=dict(container.environment) | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        start_new_session=True,
    )


def execute(container: Container, process: int, command: Sequence[str], timeout: float) -> bool:
    """Run a command inside; whether it succeeded in time."""
    inside = ["nsenter", f"--target={process}", "--mount", "--net", "--root", "--wd", *_as_user(container), *command]
    try:
        done = subprocess.run(
            inside, env=dict(container.environment), capture_output=True, timeout=timeout, check=False
        )
    except (subprocess.TimeoutExpired, OSError):
        return False
    return done.returncode == 0


def _as_user(container: Container, *more: str) -> list[str]:
    drop = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    return ["setpriv", f"--reuid={container.user}", f"--regid={container.group}", "--clear-groups", *drop, *more, "--"]


def _script(container: Container, folder: Path) -> str:
    """Makes the root in the mount namespace that it finds itself in, and becomes the command."""
    root = folder / "root"
    lines = [
        "set -e",
        f"mount -t tmpfs -o mode=755,size=16m root {root}",
        f"mkdir -p {root}/etc {root}/dev {root}/proc",
    ]
    for place in _SYSTEM:
        if Path(place).is_symlink():
            lines.append(f"ln -s {Path(place).readlink()} {root}{place}")
        elif Path(place).exists():
            lines += _bound(Mount(Path(place), place, read_only=True), root)
    for name in _OF_ETC:
        if Path("/etc", name).exists():
            lines.append(f"cp -r --preserve=mode,links /etc/{name} {root}/etc/")
    lines += [f"cp {folder / name} {root}/etc/{name}" for name in container.files]
    lines += [f"touch {root}/dev/{name} && mount --bind /dev/{name} {root}/dev/{name}" for name in _DEVICES]
    lines.append(f"mount --rbind /proc {root}/proc")
    all_mounts = (*(Mount(place, str(place), read_only=True) for place in programs()), *container.mounts)
    # What is mounted at a parent would hide it: a checkout below /tmp is there although a pod has a /tmp of its own.
    for mount in sorted(all_mounts, key=lambda mount: len(PurePath(mount.target).parts)):
        lines += _bound(mount, root)
    if container.read_only:
        lines.append(f"mount -o remount,ro {root}")
    path = f"PATH={container.environment['PATH']}"  # the programs of this script are the system's
    with_us = "--pdeathsig=KILL"  # should the node be killed, it ends as well
    command = shlex.join([*_as_user(container, with_us), "env", path, *container.command])
    lines.append(f"exec chroot {root} {command}")
    return "\n".join([*lines, ""])


def _bound(mount: Mount, root: Path) -> list[str]:
    place = shlex.quote(f"{root}{mount.target}")
    lines = [f"mkdir -p {place}", f"mount --bind {shlex.quote(str(mount.source))} {place}"]
    return [*lines, f"mount -o remount,bind,ro {place}"] if mount.read_only else lines
