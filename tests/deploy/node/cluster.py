"""A cluster of one node that runs an overlay: what the control plane, the DNS and the network plugin do of it.

Owns the pods of Deployments and StatefulSets, the addresses of Services, and when each learns of a change. What is
applied is what kubectl rendered. Refuses to guess: workloads of other kinds are not run.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.deploy.cluster import WORKLOADS, Object, named, of_kind
from tests.deploy.node import volumes
from tests.deploy.node.container import Container, environment_of_image, start
from tests.deploy.node.names import ZONE, Server
from tests.deploy.node.pod import Held, Pod, mounted, plan_of
from tests.deploy.node.programs import run
from tests.deploy.node.rules import Forward, Place, ruleset, selects
from tests.deploy.node.wires import NODE, Wires, abandoned

OURS = "hybridgate"
DNS = "10.96.0.10"
_POLL = 0.1  # seconds


@dataclass(frozen=True)
class Bystander:
    """A place on the network where the cluster runs nothing: programs of a test's."""

    place: Place
    namespace: str


class Cluster:
    """Invariant: after the block no process, namespace or wire of it is left. Rules, names and Services' addresses
    follow `propagation` seconds after a pod is ready, or no longer, as they do in a cluster."""

    def __init__(
        self,
        objects: Sequence[Object],
        folder: Path,
        patience: float = 1.0,
        propagation: float = 0.5,
        extra: Mapping[str, str] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`folder`: an empty one that everybody may enter. `patience`: see `plan_of`. `extra`: more variables for every
        container. `say` is told of what happens."""
        self.objects = list(objects)
        self.pods: list[Pod] = []
        self.wires = Wires()
        self._folder = folder
        self._patience = patience
        self._propagation = propagation
        self._extra = dict(extra or {})
        self._say = say
        self._bystanders: list[Bystander] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._written: dict[str, str] = {}
        self._count = 0
        self._published: dict[tuple[str, str], tuple[str, ...]] = {}
        self._lock = threading.RLock()
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._cluster_ip = {
            (s["metadata"]["namespace"], s["metadata"]["name"]): f"10.96.1.{1 + i}"
            for i, s in enumerate(of_kind(self.objects, "Service"))
            if s["spec"].get("clusterIP") != "None"
        }
        self._dns = self.bystander("dns", "kube-system", {"k8s-app": "kube-dns"})
        self._server = Server(self._dns.namespace, self._dns.place.address, self.lookup)
        self._control = threading.Thread(target=self._controlled, daemon=True)

    def __enter__(self) -> Self:
        self._control.start()
        for workload in of_kind(self.objects, *WORKLOADS):
            for _ in range(workload["spec"]["replicas"]):
                self.start(workload)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._changed.set()
        for pod in self.pods:
            pod.delete(at_once=True)
        for process in self._processes:
            process.kill()
            process.wait()
        for pod in self.pods:
            pod.join()
        self._control.join()
        self._server.close()
        self.wires.close()

    # Pods

    def start(self, workload: Object) -> Pod:
        """One more pod of a workload."""
        kind, name = workload["kind"], workload["metadata"]["name"]
        with self._lock:
            if kind == "StatefulSet":
                taken = {pod.place.name for pod in self.pods if not pod.gone}
                name = next(n for i in range(100) if (n := f"{name}-{i}") not in taken)
            else:
                self._count += 1
                name = f"{name}-{self._count}"
            folder = self._folder / name
            folder.mkdir(mode=0o755, exist_ok=True)
            template = workload["spec"]["template"]
            plan = plan_of(template, self._held(), self._patience)
            for volume in plan.volumes.values():
                self._fill(volume, folder / volume["name"])
            for claim in workload["spec"].get("volumeClaimTemplates", ()):
                volumes.empty(folder / claim["metadata"]["name"])
            namespace, address = self.wires.attach(name)
            labels = template["metadata"]["labels"]
            place = Place(name, OURS, address, labels, self._labels_of(OURS), dict(plan.ports))
            files = self._files(name, address)
            plan = mounted(plan, folder, files)
            container = replace(plan.container, environment={**plan.container.environment, **self._extra})
            self._rules(namespace, place, [*self._places(), place])  # before it says anything
            self._say(f"{name}: starts at {address}")
            pod = Pod(place, replace(plan, container=container), namespace, self.wires.node, folder, self._changed.set)
            self.pods.append(pod)
        self._changed.set()
        return pod

    def pods_of(self, workload: str) -> list[Pod]:
        """Those that are not gone, the oldest first."""
        selector = self._workload(workload)["spec"]["selector"]
        return [pod for pod in self.pods if not pod.gone and selects(selector, pod.place.labels)]

    def restart(self, workload: str, before: Callable[[Pod], None] = lambda pod: None, patience: float = 600.0) -> None:
        """`kubectl rollout restart` of a Deployment: one more, when it is ready one fewer, until all are new and the
        old ones are gone. `before` is called for each of these, before it is taken down."""
        written = self._workload(workload)
        if written["spec"]["strategy"]["rollingUpdate"] != {"maxSurge": 1, "maxUnavailable": 0}:
            raise ValueError("another strategy than one more and never one fewer is not understood here")
        old = self.pods_of(workload)
        for pod in old:
            new = self.start(written)
            wait_until(lambda new=new: new.ready, patience, f"{new.place.name} is not ready")  # type: ignore[misc]
            before(pod)
            self._say(f"{pod.place.name}: ends")
            pod.delete()
        wait_until(lambda: all(pod.gone for pod in old), patience, "old pods do not end")

    def ready(self, workload: str, patience: float = 600.0) -> None:
        """Wait until it has all its replicas, and all have learnt of them. Raises TimeoutError with their logs."""
        wanted = int(self._workload(workload)["spec"]["replicas"])

        def enough() -> bool:
            return sum(pod.serving for pod in self.pods_of(workload)) >= wanted

        try:
            wait_until(enough, patience, f"{workload} is not ready")
        except TimeoutError as error:
            logs = "\n".join(f"{pod.place.name}:\n{pod.log[-2000:]}" for pod in self.pods_of(workload))
            raise TimeoutError(f"{error}\n{logs}") from None
        self.settle()

    def settle(self, patience: float = 60.0) -> None:
        """Wait until names and rules follow what is now."""
        wait_until(lambda: not self._changed.is_set(), patience, "the network's rules do not follow")
        with self._lock:
            pass  # the last change is written

    # Changes

    def apply(self, *objects: Object) -> None:
        """Objects that are new, or others than before; files of ConfigMaps change in the pods that mount them."""
        with self._lock:
            for new in objects:
                same = (new["kind"], new["metadata"]["name"])
                self.objects = [o for o in self.objects if (o["kind"], o["metadata"]["name"]) != same] + [new]
            for pod in self.pods:
                template = self._workload_of(pod)["spec"]["template"]["spec"]
                for volume in template.get("volumes", ()):
                    if any(_holds(volume, new) for new in objects):
                        self._fill(volume, pod.folder / volume["name"])
        self._changed.set()

    def remove(self, *objects: Object) -> None:
        """Objects are no more."""
        with self._lock:
            self.objects = [o for o in self.objects if o not in objects]
        self._changed.set()

    # Others

    def bystander(self, name: str, namespace: str, labels: dict[str, str], **of_namespace: str) -> Bystander:
        """A place of its own; `of_namespace`: labels of its namespace, `__` for `/`."""
        with self._lock:
            network, address = self.wires.attach(name)
            their = {key.replace("__", "/"): value for key, value in of_namespace.items()}
            place = Place(name, namespace, address, labels, {"kubernetes.io/metadata.name": namespace, **their})
            self._bystanders.append(Bystander(place, network))
        self._changed.set()
        return self._bystanders[-1]

    def execute(self, at: Bystander, command: Sequence[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
        """A program of this checkout at a bystander's place, with the cluster's DNS."""
        folder = self._folder / f"{at.place.name}-{len(self._processes)}"
        environment = environment_of_image("hybridgate-gateway") | self._extra
        files = self._files(at.place.name, at.place.address, at.place.namespace)
        process = start(Container(tuple(command), environment, files=files), at.namespace, folder, output.fileno())
        self._processes.append(process)
        return process

    def lookup(self, name: str) -> Sequence[str] | None:
        """The addresses of a name, as the DNS knows them now; None where there is no such name."""
        service, _, rest = name.partition(".")
        namespace, _, zone = rest.partition(".")
        if zone != f"svc.{ZONE}":
            return None
        if (namespace, service) in self._cluster_ip:
            return [self._cluster_ip[namespace, service]]
        return self._published.get((namespace, service))

    # Control

    def _controlled(self) -> None:
        while not self._closing.is_set():
            self._changed.wait()
            if self._closing.wait(self._propagation):
                return
            with self._lock:
                self._changed.clear()
                self._publish()

    def _publish(self) -> None:
        for service in of_kind(self.objects, "Service"):
            key = (service["metadata"]["namespace"], service["metadata"]["name"])
            addresses = tuple(pod.place.address for pod in self._endpoints(service))
            if addresses != self._published.get(key):
                self._say(f"service {key[1]}: {', '.join(addresses) or 'nobody'}")
                self._published[key] = addresses
        for pod in [pod for pod in self.pods if pod.gone and pod.namespace in self._written]:
            self.wires.detach(pod.namespace)
            del self._written[pod.namespace]
        places = self._places()
        for pod in self.pods:
            if not pod.gone:
                self._rules(pod.namespace, pod.place, places)
        for other in self._bystanders:
            self._rules(other.namespace, other.place, places)

    def _rules(self, namespace: str, place: Place, places: list[Place]) -> None:
        rules = ruleset(self.objects, place, places, NODE, self._forwards())
        if self._written.get(namespace) != rules:
            run("ip", "netns", "exec", namespace, "nft", "-f", "-", text=rules)
            self._written[namespace] = rules

    def _forwards(self) -> list[Forward]:
        found = [Forward(DNS, "UDP", 53, ((self._dns.place.address, 53),))]
        for service in of_kind(self.objects, "Service"):
            key = (service["metadata"]["namespace"], service["metadata"]["name"])
            if key not in self._cluster_ip:
                continue
            pods = [pod for pod in self.pods if pod.place.address in self._published.get(key, ())]
            for port in service["spec"]["ports"]:
                target = port.get("targetPort", port["port"])
                to = tuple(
                    (p.place.address, p.place.ports[target] if isinstance(target, str) else target) for p in pods
                )
                found.append(Forward(self._cluster_ip[key], port.get("protocol", "TCP"), port["port"], to))
        return found

    def _endpoints(self, service: Object) -> list[Pod]:
        everyone = service["spec"].get("publishNotReadyAddresses", False)
        selector = {"matchLabels": service["spec"]["selector"]}
        return [
            pod
            for pod in self.pods
            if not pod.gone and selects(selector, pod.place.labels) and (pod.serving or everyone)
        ]

    def _places(self) -> list[Place]:
        return [pod.place for pod in self.pods if not pod.gone] + [other.place for other in self._bystanders]

    def _workload(self, name: str) -> Object:
        return next(w for w in of_kind(self.objects, *WORKLOADS) if w["metadata"]["name"] == name)

    def _workload_of(self, pod: Pod) -> Object:
        return next(w for w in of_kind(self.objects, *WORKLOADS) if selects(w["spec"]["selector"], pod.place.labels))

    def _held(self) -> Held:
        return {(o["kind"], o["metadata"]["name"]): o for o in of_kind(self.objects, "ConfigMap", "Secret")}

    def _labels_of(self, namespace: str) -> dict[str, str]:
        written = named(self.objects, "Namespace", namespace)["metadata"].get("labels", {})
        return {"kubernetes.io/metadata.name": namespace, **written}

    def _fill(self, volume: Mapping[str, Any], folder: Path) -> None:
        if "emptyDir" in volume:
            return volumes.empty(folder)
        kind, name = _source(volume)
        return volumes.write(folder, volumes.contents(self._held()[kind, name]))

    @staticmethod
    def _files(name: str, address: str, namespace: str = OURS) -> dict[str, str]:
        search = f"search {namespace}.svc.{ZONE} svc.{ZONE} {ZONE}"
        return {
            "resolv.conf": f"{search}\nnameserver {DNS}\noptions ndots:5\n",
            "hosts": f"127.0.0.1 localhost\n{address} {name}\n",
        }


def _source(volume: Mapping[str, Any]) -> tuple[str, str]:
    for kind, field, key in (("ConfigMap", "configMap", "name"), ("Secret", "secret", "secretName")):
        if field in volume:
            if set(volume[field]) > {key, "defaultMode"}:
                raise ValueError(f"volume {volume['name']}: more of a {kind} than its name is not understood here")
            return kind, volume[field][key]
    raise ValueError(f"volume {volume['name']}: its kind is not understood here")


def _holds(volume: Mapping[str, Any], held: Object) -> bool:
    return "emptyDir" not in volume and _source(volume) == (held["kind"], held["metadata"]["name"])


def wait_until(holds: Callable[[], bool], patience: float, otherwise: str) -> None:
    """Raises TimeoutError after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(_POLL)


def remove_abandoned() -> None:
    """Namespaces that an earlier process left, killed before it could remove them."""
    for namespace in abandoned():
        run("ip", "netns", "delete", namespace)
