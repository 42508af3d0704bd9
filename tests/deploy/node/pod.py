"""A pod on the node: its one container, restarted when it ends, probed as its manifest says, and taken down in order.

Owns the process and what the kubelet would do to it. Refuses manifests with fields whose effect it would have to guess.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.deploy.cluster import Object
from tests.deploy.node.container import Container, Mount, environment_of_image, execute, start
from tests.deploy.node.probes import Probe, Watch, answers
from tests.deploy.node.rules import Place
from tests.deploy.node.volumes import contents

_TICK = 0.1  # seconds between two looks at a process
Held = Mapping[tuple[str, str], Object]  # ConfigMaps and Secrets, by kind and name


@dataclass(frozen=True)
class Plan:
    """What a pod template says. `volumes`: each volume that is mounted, by name, as written."""

    container: Container
    volumes: Mapping[str, Mapping[str, Any]]
    mounts: tuple[tuple[str, str, bool], ...]  # volume, place, read-only
    ports: Mapping[str, int]
    startup: Probe | None
    readiness: Probe | None
    liveness: Probe | None
    pre_stop: float
    grace: float


def plan_of(template: Mapping[str, Any], held: Held, patience: float) -> Plan:
    """`patience` multiplies the timeouts of all probes and the failures that startup probes allow: 1 is as written."""
    spec = template["spec"]
    (container,) = spec["containers"]
    if spec.get("initContainers"):
        raise ValueError("init containers are not understood here")
    environment = environment_of_image(container["image"])
    for entry in container.get("env", ()):
        environment[entry["name"]] = _value(entry, held, environment)
    ports = {port["name"]: int(port["containerPort"]) for port in container.get("ports", ())}
    probes = {
        name: Probe.of(container[name], ports) if name in container else None
        for name in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    patient = {n: replace(p, timeout=p.timeout * patience) if p else None for n, p in probes.items()}
    startup = patient["startupProbe"]
    hook = container.get("lifecycle", {})
    if hook not in ({}, {"preStop": {"sleep": hook.get("preStop", {}).get("sleep")}}):
        raise ValueError("of hooks only preStop: sleep is understood here")
    security = spec.get("securityContext", {}) | container.get("securityContext", {})
    words = [*container["command"], *container.get("args", ())]
    return Plan(
        container=Container(
            command=tuple(_expanded(word, environment) for word in words),
            environment=environment,
            user=security["runAsUser"],
            group=security["runAsGroup"],
            read_only=security["readOnlyRootFilesystem"],
        ),
        volumes={volume["name"]: volume for volume in spec.get("volumes", ())},
        mounts=tuple((m["name"], m["mountPath"], m.get("readOnly", False)) for m in container.get("volumeMounts", ())),
        ports=ports,
        startup=replace(startup, failures=round(startup.failures * patience)) if startup else None,
        readiness=patient["readinessProbe"],
        liveness=patient["livenessProbe"],
        pre_stop=float(hook.get("preStop", {}).get("sleep", {}).get("seconds", 0)),
        grace=float(spec.get("terminationGracePeriodSeconds", 30)),
    )


def _value(entry: Mapping[str, Any], held: Held, environment: Mapping[str, str]) -> str:
    if "valueFrom" not in entry:
        return _expanded(entry["value"], environment)
    kind, key = next(iter(entry["valueFrom"].items()))
    of = {"secretKeyRef": "Secret", "configMapKeyRef": "ConfigMap"}[kind]
    return contents(held[of, key["name"]])[key["key"]].decode()


def _expanded(text: str, environment: Mapping[str, str]) -> str:
    """`$(NAME)` is the variable where there is one, as Kubernetes expands it."""
    return re.sub(r"\$\((\w+)\)", lambda found: environment.get(found[1], found[0]), text)


class Pod:
    """Runs in a thread of its own from `__init__` on. `changed` is called when `serving` may be another than before."""

    def __init__(
        self, place: Place, plan: Plan, namespace: str, node: str, folder: Path, changed: Callable[[], None]
    ) -> None:
        """`namespace` and `node`: network namespaces. `folder`: of this pod's, with its volumes mounted by `plan`."""
        self.place = place
        self.namespace = namespace
        self.folder = folder
        self.restarts = 0
        self.ready = False
        self.failed = ""  # why a container was last ended by its probes
        self._plan = plan
        self._node = node
        self._changed = changed
        self._ending = threading.Event()
        self._at_once = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    @property
    def serving(self) -> bool:
        """Whether Services lead to it."""
        return self.ready and not self._ending.is_set()

    @property
    def terminating(self) -> bool:
        return self._ending.is_set()

    @property
    def gone(self) -> bool:
        return not self._thread.is_alive()

    @property
    def process_id(self) -> int:
        """Of what runs in the container now. Raises LookupError where nothing does."""
        if self._process is None or self._process.poll() is not None:
            raise LookupError(f"{self.place.name} runs nothing")
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Of what ran in it last; minus the signal's number; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def kill(self) -> None:
        """`kill -9` of what runs in the container."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def delete(self, at_once: bool = False) -> None:
        """Take it down: no longer served, preStop, SIGTERM, SIGKILL when the grace period is over; returns before."""
        if at_once:
            self._at_once.set()
        self._ending.set()
        self._changed()

    def join(self) -> None:
        self._thread.join()

    def _live(self) -> None:
        while not self._ending.is_set():
            (self.folder / "log").touch()
            with (self.folder / "log").open("ab") as log:
                self._process = start(self._plan.container, self.namespace, self.folder, log.fileno())
            self._watch(self._process)
            if self._ending.is_set():
                self._end(self._process)
            self.kill()
            self._process.wait()
            if self.ready:
                self.ready = False
                self._changed()
            if not self._ending.wait(min(1.0 * self.restarts, 10.0)):
                self.restarts += 1
        self._changed()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Probe it until it ends, has to, or the pod does."""
        plan, now = self._plan, time.monotonic()
        startup = Watch(plan.startup, now) if plan.startup else None
        ready = live = None
        while process.poll() is None and not self._ending.wait(_TICK):
            now = time.monotonic()
            if startup is not None:
                startup.look(now, self._tried)
                if startup.holds is False:
                    self.failed = "startup"
                    return
                if startup.holds is None:
                    continue
                startup = None
            if plan.liveness:
                live = live or Watch(plan.liveness, now)
                live.look(now, self._tried)
                if live.holds is False:
                    self.failed = "liveness"
                    return
            if plan.readiness:
                ready = ready or Watch(plan.readiness, now)
                ready.look(now, self._tried)
                serves = ready.holds is True
            else:
                serves = True
            if serves != self.ready and process.poll() is None:
                self.ready = serves
                self._changed()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._plan.grace
        if self._at_once.is_set():
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(self._plan.pre_stop, self._plan.grace))
        process.terminate()
        while process.poll() is None and time.monotonic() < deadline and not self._at_once.wait(_TICK):
            pass

    def _tried(self, probe: Probe) -> bool:
        if probe.command and self._process is not None:
            return execute(self._plan.container, self._process.pid, probe.command, probe.timeout)
        return answers(probe, self.place.address, self._node)


def mounted(plan: Plan, folder: Path, files: Mapping[str, str]) -> Plan:
    """With its volumes as folders below `folder`, one for each name, and the pod's own files of /etc."""
    mounts = tuple(Mount(folder / name, place, read_only) for name, place, read_only in plan.mounts)
    return replace(plan, container=replace(plan.container, mounts=mounts, files=dict(files)))
