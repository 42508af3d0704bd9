"""Makes an image's file system without a container engine, and starts it: for machines that have debootstrap and root.

Executes a Dockerfile's own RUN and COPY steps, each RUN in a chroot of its stage; a stage that comes FROM an image
begins with Debian's minimal system (`debootstrap --variant=minbase`), which is what debian:*-slim is made from. The
result is started as the image's user, without capabilities, on a root that cannot be written to.

Owns the few instructions that our Dockerfiles use, and refuses others. Makes no image to push: for that, use a builder.

    python deploy/without_docker.py build deploy/gateway.Dockerfile /var/tmp/gateway
    python deploy/without_docker.py sizes /var/tmp/gateway
    python deploy/without_docker.py start /var/tmp/gateway --env HYBRIDGATE_PORT=9000
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

CONTEXT = Path(__file__).parents[1]
SUITE = "bookworm"
PASSED_ON = re.compile(r"PIP_\w+|SSL_CERT_FILE|https?_proxy|no_proxy", re.IGNORECASE)


class Unsupported(ValueError):
    """An instruction that this program does not know."""


@dataclass(frozen=True)
class Step:
    """One instruction: RUN, COPY, ENV and so on; `text` is what follows, continuation lines joined."""

    word: str
    text: str


@dataclass
class Stage:
    """One FROM and what comes after it."""

    name: str
    base: str
    steps: list[Step] = field(default_factory=list)


@dataclass
class Config:
    """What an image says besides its files."""

    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    cmd: list[str] = field(default_factory=list)

    def copy(self) -> Config:
        return Config(dict(self.env), self.workdir, self.user, list(self.cmd))


def parse(text: str, arguments: Mapping[str, str]) -> list[Stage]:
    """A Dockerfile's stages. `arguments` replace the defaults of ARGs before the first FROM."""
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    stages: list[Stage] = []
    known: dict[str, str] = {}
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "ARG" and not stages:
            name, _, default = rest.partition("=")
            known[name] = arguments.get(name, default)
        elif word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(name.strip() or str(len(stages)), expanded(base.strip(), known)))
        elif word in ("RUN", "COPY", "ENV", "ARG", "WORKDIR", "USER", "CMD", "EXPOSE"):
            stages[-1].steps.append(Step(word, rest.strip()))
        else:
            raise Unsupported(f"{word}: not an instruction that this program knows")
    return stages


def expanded(text: str, values: Mapping[str, str]) -> str:
    """`${NAME}` by its value; a name without one stands for nothing."""
    return re.sub(r"\$\{(\w+)\}", lambda match: values.get(match[1], ""), text)


class Context:
    """The files that COPY may take: what .dockerignore leaves of the repository. The last match counts."""

    def __init__(self, root: Path) -> None:
        self.root = root
        lines = (root / ".dockerignore").read_text().splitlines()
        self._patterns = [line for line in map(str.strip, lines) if line and not line.startswith("#")]

    def has(self, path: Path) -> bool:
        """Whether a file is part of it."""
        relative = path.relative_to(self.root)
        names = [str(relative), *map(str, relative.parents)][:-1]
        kept = True
        for pattern in self._patterns:
            bare = pattern.removeprefix("!")
            anywhere = bare.startswith("**/")
            candidates = relative.parts if anywhere else names
            if any(fnmatch.fnmatchcase(name, bare.removeprefix("**/")) for name in candidates):
                kept = pattern.startswith("!")
        return kept

    def files(self, source: str) -> Iterable[Path]:
        """The files below a source of COPY, in order. Raises FileNotFoundError where there is none."""
        start = self.root / source
        found = sorted(start.rglob("*")) if start.is_dir() else [start]
        kept = [path for path in found if path.is_file() and self.has(path)]
        if not kept:
            raise FileNotFoundError(f"COPY {source}: nothing of that name is part of the context")
        return kept


class Builder:
    """One build. Invariant: a stage's folder has what its steps made, and no mounts outlive a step."""

    def __init__(self, work: Path, arguments: Mapping[str, str], binds: Iterable[str]) -> None:
        self._work = work
        self._arguments = arguments
        self._binds = list(binds)
        self._context = Context(CONTEXT)
        self._done: dict[str, tuple[Path, Config]] = {}

    def build(self, stages: list[Stage], target: str) -> tuple[Path, Config]:
        """The target's folder and configuration; only the stages that it needs are made."""
        wanted = next(stage for stage in stages if stage.name == target)
        needed = {wanted.base, *re.findall(r"--from=(\S+)", " ".join(step.text for step in wanted.steps))}
        for stage in stages:
            if stage.name in needed and stage.name not in self._done:
                self.build(stages, stage.name)
        root = self._work / f"stage-{target}"
        if root.exists():
            shutil.rmtree(root)
        if wanted.base in self._done:
            before, config = self._done[wanted.base]
            config = config.copy()
        else:
            before, config = self._debian(), Config()
        subprocess.run(["cp", "--archive", "--reflink=auto", str(before), str(root)], check=True)
        values: dict[str, str] = {}
        for step in wanted.steps:
            say(f"{target}: {step.word} {step.text[:110]}")
            self._execute(step, root, config, values)
        self._done[target] = root, config
        return root, config

    def _debian(self) -> Path:
        base = self._work / "debian"
        if not (base / "etc/debian_version").exists():
            say(f"debootstrap {SUITE}")
            subprocess.run(
                ["debootstrap", "--variant=minbase", SUITE, str(base)], check=True, stdout=subprocess.DEVNULL
            )
        return base

    def _execute(self, step: Step, root: Path, config: Config, values: dict[str, str]) -> None:
        text = expanded(step.text, {**config.env, **values}) if step.word != "RUN" else step.text
        if step.word == "RUN":
            self._run(root, config, values, step.text)
        elif step.word == "COPY":
            self._copy(root, config, text)
        elif step.word == "ARG":
            name, _, default = text.partition("=")
            values[name] = self._arguments.get(name, default)
        elif step.word == "ENV":
            config.env |= dict(pair.split("=", 1) for pair in shlex.split(text))
        elif step.word == "WORKDIR":
            config.workdir = text
            inside(root, text).mkdir(parents=True, exist_ok=True)
        elif step.word == "USER":
            config.user = text
        elif step.word == "CMD":
            config.cmd = json.loads(text)

    def _copy(self, root: Path, config: Config, text: str) -> None:
        words = text.split()
        source_stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
        *sources, target = words
        to = inside(root, target if target.startswith("/") else f"{config.workdir}/{target}")
        for source in sources:
            if source_stage is not None:
                to.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(
                    ["cp", "--archive", str(inside(self._done[source_stage][0], source)), str(to)], check=True
                )
                continue
            is_file = (CONTEXT / source).is_file()
            for path in self._context.files(source):
                into = to / path.name if is_file else to / path.relative_to(CONTEXT / source)
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, into)
                into.chmod(0o755 if os.access(path, os.X_OK) else 0o644)

    def _run(self, root: Path, config: Config, values: Mapping[str, str], command: str) -> None:
        passed = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
        path = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        environment = {**passed, **path, "HOME": "/root", **values, **config.env}
        mounts = [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
        made = []
        for bind in ["/etc/resolv.conf", *self._binds]:
            source, _, target = bind.partition(":")
            place = inside(root, target or source)
            if not place.exists():
                made.append(place)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.mkdir() if Path(source).is_dir() else place.touch()
            mounts.append(f"mount --bind {source} {place}")
        script = " && ".join([*mounts, f'exec chroot {root} /bin/sh -c \'cd "$STEP_IN" && eval "$STEP"\''])
        environment |= {"STEP": command, "STEP_IN": config.workdir}
        subprocess.run(["unshare", "--mount", "sh", "-c", script], check=True, env=environment)
        for place in made:
            place.rmdir() if place.is_dir() else place.unlink()


def inside(root: Path, path: str) -> Path:
    """An absolute path of the image, on this machine."""
    return root / path.lstrip("/")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def build(options: argparse.Namespace) -> None:
    """Make the file system of an image in a folder, beside a `config.json` of what the image says."""
    arguments = dict(argument.split("=", 1) for argument in options.arg)
    stages = parse(Path(options.dockerfile).read_text(), arguments)
    out = Path(options.out)
    work = Path(options.work or out.parent / f"{out.name}.stages")
    work.mkdir(parents=True, exist_ok=True)
    builder = Builder(work, arguments, options.bind)
    root, config = builder.build(stages, options.target or stages[-1].name)
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    root.rename(out / "root")
    (out / "config.json").write_text(json.dumps(vars(config), indent=2))
    say(f"{out}/root: {megabytes(out / 'root'):.0f} MB, digest {digest(out / 'root')[:16]}")


def start(options: argparse.Namespace) -> None:
    """Become the image's process: its user, no capabilities, a root that cannot be written to, a /tmp of its own."""
    root, config = Path(options.out) / "root", json.loads((Path(options.out) / "config.json").read_text())
    environment = {**config["env"], **dict(pair.split("=", 1) for pair in options.env)}
    user, _, group = config["user"].partition(":")
    steps = [f"mount --bind {root} {root}"]
    for mount in options.mount:
        source, _, target = mount.partition(":")
        place = inside(root, target)
        place.mkdir(parents=True, exist_ok=True)
        steps += [f"mount --bind {source} {place}"]
    steps += [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
    steps += [f"mount -t tmpfs -o mode=1777,size=256m tmpfs {root}/tmp", f"mount -o remount,ro,bind {root}"]
    drop = f"setpriv --reuid={user} --regid={group} --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all"
    clean = shlex.join(["env", "-i", *(f"{name}={value}" for name, value in environment.items())])
    command = shlex.join(options.command or config["cmd"])
    script = " && ".join([*steps, f"exec chroot {root} {clean} {drop} {command}"])
    os.execvp("unshare", ["unshare", "--mount", "sh", "-c", script])  # noqa: S606 - it is to be us


def sizes(options: argparse.Namespace) -> None:
    """What weighs how much."""
    root = Path(options.out) / "root"
    site = next(root.glob("opt/hybridgate/lib/python3*/site-packages"))
    packages = sorted(((megabytes(path), path.name) for path in site.iterdir()), reverse=True)
    environment = megabytes(inside(root, "/opt/hybridgate"))
    whole = megabytes(root)
    say(f"{whole:7.1f} MB in all")
    say(f"{whole - environment:7.1f} MB Debian and its Python")
    for size, name in packages:
        if size >= options.least:
            say(f"{size:7.1f} MB {name}")
    say(f"{sum(size for size, _ in packages if size < options.least):7.1f} MB other packages")


def megabytes(path: Path) -> float:
    """What the files hold, in 10**6 bytes."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_size for file in files if file.is_file() or file.is_symlink()) / 1e6


def digest(root: Path) -> str:
    """Of all names, modes, owners and contents, and of no times: two builds that agree are the same."""
    whole = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        whole.update(f"{path.relative_to(root)} {status.st_mode:o} {status.st_uid} {status.st_gid}\n".encode())
        if path.is_symlink():
            whole.update(os.readlink(path).encode())
        elif path.is_file():
            whole.update(path.read_bytes())
    return whole.hexdigest()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    building = commands.add_parser("build", help="make an image's file system")
    building.add_argument("dockerfile")
    building.add_argument("out")
    building.add_argument("--target", help="the stage to make; without: the last")
    building.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="a build argument")
    building.add_argument("--bind", action="append", default=[], metavar="FROM[:TO]", help="seen by RUN, not kept")
    building.add_argument("--work", help="where stages and Debian's system are kept")
    building.set_defaults(do=build)
    starting = commands.add_parser("start", help="start it, or what follows `--`, as its own user on a read-only root")
    starting.add_argument("out")
    starting.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    starting.add_argument("--mount", action="append", default=[], metavar="FROM:TO", help="a folder that it sees")
    starting.set_defaults(do=start)
    weighing = commands.add_parser("sizes", help="say what weighs how much")
    weighing.add_argument("out")
    weighing.add_argument("--least", type=float, default=5.0, help="MB from which on a package has its own line")
    weighing.set_defaults(do=sizes)
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:end])
    options.command = given[end + 1 :]
    options.do(options)


if __name__ == "__main__":
    main()
