"""What Pod Security "restricted" asks for, and what we ask for besides."""

from __future__ import annotations

from typing import Any

from tests.deploy.cluster import Object, pod_of

ALLOWED_VOLUMES = {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}
RESTRICTED_HOST = ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace")


def weaknesses(workload: Object) -> list[str]:
    """What a workload lacks; nothing where it is as it should be."""
    pod = pod_of(workload)
    security = pod.get("securityContext", {})
    found = [
        what
        for what, right in (
            ("a ServiceAccount's token is mounted", pod.get("automountServiceAccountToken") is False),
            ("the default ServiceAccount", pod.get("serviceAccountName", "default") != "default"),
            ("service links", pod.get("enableServiceLinks") is False),
            ("may run as root", security.get("runAsNonRoot") is True and security.get("runAsUser", 0) > 0),
            ("root's group", security.get("runAsGroup", 0) > 0),
            ("no seccomp profile", security.get("seccompProfile", {}).get("type") == "RuntimeDefault"),
            ("the host's namespaces", not any(pod.get(name) for name in RESTRICTED_HOST)),
            ("the host's files or an odd volume", all(_kinds(v) <= ALLOWED_VOLUMES for v in pod.get("volumes", ()))),
            ("no grace period", pod.get("terminationGracePeriodSeconds", 0) >= 30),
        )
        if not right
    ]
    for container in [*pod["containers"], *pod.get("initContainers", ())]:
        found += [f"{container['name']}: {what}" for what in _of_container(container)]
    return found


def _kinds(volume: dict[str, Any]) -> set[str]:
    return set(volume) - {"name"}


def _of_container(container: Object) -> list[str]:
    security = container.get("securityContext", {})
    resources = container.get("resources", {})
    image = container["image"]
    tag = image.rpartition("/")[2].partition(":")[2]
    checks: list[tuple[str, bool]] = [
        ("may gain privileges", security.get("allowPrivilegeEscalation") is False),
        ("is privileged", not security.get("privileged")),
        ("may write to its root", security.get("readOnlyRootFilesystem") is True),
        ("keeps capabilities", security.get("capabilities") == {"drop": ["ALL"]}),
        ("an image without a fixed tag", tag not in ("", "latest") or "@sha256:" in image),
        ("a host port", not any("hostPort" in port for port in container.get("ports", ()))),
        ("its command is left to the image", bool(container.get("command"))),
    ]
    for bound in ("requests", "limits"):
        for resource in ("cpu", "memory", "ephemeral-storage"):
            checks.append((f"no {bound} of {resource}", resource in resources.get(bound, {})))
    checks += [(f"no {probe}", probe in container) for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    return [what for what, right in checks if not right]
