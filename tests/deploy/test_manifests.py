"""What the overlays say: the security posture, what may reach what, and that everything that is named exists."""

from __future__ import annotations

import inspect
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gateway.app import build
from gateway.cli import main
from gateway.loading import read_policy
from gateway.metrics import table
from gateway.settings import settings_from
from local_engine import metrics as engine_metrics
from local_engine.cli import serve as engine_serve
from tests.deploy.cluster import (
    DEPLOY,
    OVERLAYS,
    WORKLOADS,
    Object,
    Peer,
    environment_of,
    labels_of,
    named,
    of_kind,
    pod_of,
    rendered,
)
from tests.deploy.network import may_connect, selects
from tests.deploy.posture import weaknesses

# Made by whoever deploys, as deploy/README.md says, and never part of a manifest.
SECRETS = {
    "hybridgate-keys": {"keys.yaml"},
    "hybridgate-providers": {"OPENAI_API_KEY", "ANTHROPIC_API_KEY", "MISTRAL_API_KEY", "COHERE_API_KEY"},
    "redis-auth": {"password"},
    "hybridgate-redis": {"url"},
    "hybridgate-metrics": {"token"},
    "engine-token": {"token"},
}


def every(kinds: tuple[str, ...]) -> list[Any]:
    found = [(overlay, o) for overlay in OVERLAYS for o in of_kind(rendered(overlay), *kinds)]
    return [pytest.param(overlay, o, id=f"{overlay}-{o['kind']}-{o['metadata']['name']}") for overlay, o in found]


# The security posture.


@pytest.mark.parametrize(("overlay", "workload"), every(WORKLOADS))
def test_a_workload_is_restricted(overlay: str, workload: Object) -> None:
    assert weaknesses(workload) == []


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        (("securityContext", "runAsNonRoot"), False, "may run as root"),
        (("securityContext", "runAsUser"), 0, "may run as root"),
        (("securityContext", "seccompProfile"), {"type": "Unconfined"}, "no seccomp profile"),
        (("automountServiceAccountToken",), True, "token is mounted"),
        (("hostNetwork",), True, "the host's namespaces"),
        (("volumes", 0), {"name": "x", "hostPath": {"path": "/"}}, "the host's files"),
        (("containers", 0, "image"), "hybridgate-gateway:latest", "without a fixed tag"),
        (("containers", 0, "image"), "registry:5000/gateway", "without a fixed tag"),
        (("containers", 0, "securityContext", "privileged"), True, "is privileged"),
        (("containers", 0, "securityContext", "allowPrivilegeEscalation"), True, "may gain privileges"),
        (("containers", 0, "securityContext", "readOnlyRootFilesystem"), False, "may write to its root"),
        (("containers", 0, "securityContext", "capabilities"), {"drop": ["ALL"], "add": ["NET_RAW"]}, "capabilities"),
        (("containers", 0, "resources", "limits"), {"cpu": "1"}, "no limits of memory"),
        (("containers", 0, "livenessProbe"), None, "no livenessProbe"),
    ],
)
def test_a_weakness_is_found(path: tuple[Any, ...], value: Any, found: str) -> None:
    workload = deepcopy(named(rendered("demo"), "Deployment", "gateway"))
    place: Any = pod_of(workload)
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    assert any(found in weakness for weakness in weaknesses(workload))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_namespace_enforces_it(overlay: str) -> None:
    labels = named(rendered(overlay), "Namespace", "hybridgate")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("overlay", ["gpu", "vllm", "production"])
def test_no_secret_is_in_the_manifests(overlay: str) -> None:
    assert of_kind(rendered(overlay), "Secret") == []


# What may reach what.


def pod(name: str, **more: Any) -> Peer:
    return Peer((("app.kubernetes.io/name", name),), **more)


GATEWAY, ENGINE, REDIS, STRANGER = pod("gateway"), pod("engine"), pod("redis"), pod("stranger")
DNS = Peer((("k8s-app", "kube-dns"),), namespace="kube-system")
CLIENT = pod("app", namespace="apps", namespace_labels=(("hybridgate/clients", "allowed"),))
ELSEWHERE = pod("app", namespace="other")
PROMETHEUS = pod("prometheus", namespace="monitoring")
API_SERVER, METADATA = Peer(address="10.96.0.1"), Peer(address="169.254.169.254")
WORLD, WORLD6 = Peer(address="93.184.216.34"), Peer(address="2606:2800:220:1::1")
MIRROR, OWN_REDIS = Peer(address="192.0.2.1"), Peer(address="192.0.2.2")
ALL, CLOUDS, PRODUCTION = set(OVERLAYS), {"gpu", "vllm", "production"}, {"production"}

REACHED: list[tuple[Peer, Peer, int, str, set[str]]] = [
    (CLIENT, GATEWAY, 8080, "TCP", ALL),
    (STRANGER, GATEWAY, 8080, "TCP", set()),
    (ELSEWHERE, GATEWAY, 8080, "TCP", set()),
    (CLIENT, GATEWAY, 9090, "TCP", set()),
    (PROMETHEUS, GATEWAY, 9090, "TCP", PRODUCTION),
    (PROMETHEUS, GATEWAY, 8080, "TCP", set()),
    (GATEWAY, ENGINE, 8000, "TCP", ALL),
    (GATEWAY, ENGINE, 22, "TCP", set()),
    (GATEWAY, REDIS, 6379, "TCP", ALL - PRODUCTION),
    (GATEWAY, OWN_REDIS, 6379, "TCP", PRODUCTION),
    (GATEWAY, DNS, 53, "UDP", ALL),
    (GATEWAY, DNS, 53, "TCP", ALL),
    (GATEWAY, WORLD, 443, "TCP", CLOUDS),
    (GATEWAY, WORLD6, 443, "TCP", CLOUDS),
    (GATEWAY, WORLD, 80, "TCP", set()),
    (GATEWAY, API_SERVER, 443, "TCP", set()),
    (GATEWAY, METADATA, 443, "TCP", set()),
    (ENGINE, DNS, 53, "UDP", ALL),
    (ENGINE, WORLD, 443, "TCP", set()),
    (ENGINE, WORLD6, 443, "TCP", set()),
    (ENGINE, METADATA, 80, "TCP", set()),
    (ENGINE, API_SERVER, 443, "TCP", set()),
    (ENGINE, MIRROR, 443, "TCP", CLOUDS),
    (ENGINE, MIRROR, 80, "TCP", set()),
    (ENGINE, GATEWAY, 8080, "TCP", set()),
    (ENGINE, REDIS, 6379, "TCP", set()),
    (ENGINE, ENGINE, 8000, "TCP", set()),
    (CLIENT, ENGINE, 8000, "TCP", set()),
    (STRANGER, ENGINE, 8000, "TCP", set()),
    (PROMETHEUS, ENGINE, 8000, "TCP", PRODUCTION),  # for /metrics; the rest of that port wants the token
    (CLIENT, REDIS, 6379, "TCP", set()),
    (STRANGER, REDIS, 6379, "TCP", set()),
    (REDIS, WORLD, 443, "TCP", set()),
    (REDIS, DNS, 53, "UDP", set()),
]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_network_lets_through_what_is_meant_and_no_more(overlay: str) -> None:
    objects = rendered(overlay)
    for source, target, port, protocol, overlays in REACHED:
        reached = may_connect(objects, source, target, port, protocol)
        assert reached == (overlay in overlays), f"{source} to {target}, {protocol} {port}"


def test_without_the_rules_an_engine_would_reach_the_world() -> None:
    """That the evaluation above can fail."""
    objects = [o for o in rendered("demo") if o["metadata"]["name"] not in ("engine", "default-deny")]
    assert may_connect(objects, ENGINE, WORLD, 443)
    with_deny = [o for o in rendered("demo") if o["metadata"]["name"] != "engine" or o["kind"] != "NetworkPolicy"]
    assert not may_connect(with_deny, ENGINE, DNS, 53, "UDP")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_who_else_reaches_an_engines_port_meets_its_token(overlay: str) -> None:
    objects = rendered(overlay)
    others = [peer for peer in (PROMETHEUS, CLIENT, STRANGER) if may_connect(objects, peer, ENGINE, 8000)]
    engine = pod_of(named(objects, "Deployment", "engine"))["containers"][0]
    assert not others or "HYBRIDGATE_ENGINE_TOKEN" in environment_of(engine)


# What is named exists.


def volumes_of(workload: Object) -> dict[str, Any]:
    made: dict[str, Any] = {v["metadata"]["name"]: {} for v in workload["spec"].get("volumeClaimTemplates", ())}
    return {v["name"]: v for v in pod_of(workload).get("volumes", ())} | made


@pytest.mark.parametrize(("overlay", "workload"), every(WORKLOADS))
def test_a_workload_refers_to_what_exists(overlay: str, workload: Object) -> None:
    objects, spec = rendered(overlay), pod_of(workload)
    named(objects, "ServiceAccount", spec["serviceAccountName"])
    assert selects(workload["spec"]["selector"], labels_of(workload))
    secrets = {name: set(keys) for name, keys in SECRETS.items()}
    volumes = volumes_of(workload)
    for volume in volumes.values():
        if "configMap" in volume:
            named(objects, "ConfigMap", volume["configMap"]["name"])
        if "persistentVolumeClaim" in volume:
            named(objects, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
        if "secret" in volume:
            assert volume["secret"]["secretName"] in secrets
    for container in spec["containers"]:
        assert {m["name"] for m in container["volumeMounts"]} == set(volumes), "mounted, and nothing else declared"
        assert not any("subPath" in m for m in container["volumeMounts"]), "such a mount never changes"
        ports = {p["name"] for p in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            check = container[probe].get("httpGet") or container[probe].get("tcpSocket")
            assert check is None or check["port"] in ports
        for variable in container.get("env", ()):
            if "valueFrom" in variable:
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["key"] in secrets[reference["name"]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_budgets_scalers_and_monitors_select_what_exists(overlay: str) -> None:
    objects = rendered(overlay)
    workloads = of_kind(objects, *WORKLOADS)
    for service in of_kind(objects, "Service"):
        (target,) = [w for w in workloads if selects({"matchLabels": service["spec"]["selector"]}, labels_of(w))]
        numbers = {p["name"]: p["containerPort"] for c in pod_of(target)["containers"] for p in c["ports"]}
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in numbers
            if service["spec"].get("clusterIP") == "None":
                assert port["port"] == numbers[port["targetPort"]], "a headless name leads to the pod's own port"
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert [w for w in workloads if selects(budget["spec"]["selector"], labels_of(w))]
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        named(objects, scaler["spec"]["scaleTargetRef"]["kind"], scaler["spec"]["scaleTargetRef"]["name"])
    for monitor in of_kind(objects, "ServiceMonitor"):
        services = of_kind(objects, "Service")
        (found,) = [s for s in services if selects(monitor["spec"]["selector"], s["metadata"]["labels"])]
        assert {e["port"] for e in monitor["spec"]["endpoints"]} <= {p["name"] for p in found["spec"]["ports"]}
    for policy in of_kind(objects, "NetworkPolicy"):
        selected = [w for w in workloads if selects(policy["spec"]["podSelector"], labels_of(w))]
        ports = {p["name"] for w in selected for c in pod_of(w)["containers"] for p in c["ports"]}
        for rule in policy["spec"].get("ingress", ()):
            assert {p["port"] for p in rule["ports"]} <= ports


def gateway_of(overlay: str) -> Object:
    container: Object = pod_of(named(rendered(overlay), "Deployment", "gateway"))["containers"][0]
    return container


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_gateways_variables_are_settings_and_its_probes_are_routes(overlay: str, tmp_path: Path) -> None:
    container = gateway_of(overlay)
    environment = {name: value or "redis://r:6379/0" for name, value in environment_of(container).items()}
    settings = settings_from(environment)
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert ports == {"http": settings.port, "admin": settings.admin_port}
    assert settings.host == settings.admin_host == "0.0.0.0"
    mounts = {m["mountPath"] for m in container["volumeMounts"]}
    assert str(Path(settings.policy).parent) in mounts
    assert bool(settings.keys) != settings.open_to_network, "keys, or an overlay that says that it has none"
    assert not settings.keys or str(Path(settings.keys).parent) in mounts
    loaded = read_policy(str(written_policy(rendered(overlay), tmp_path)), {})
    assert loaded.policy is not None
    app, _ = build(settings, loaded.policy, _Silent(), lambda _: None)
    routes = {route.path for route in app.asgi.routes}  # type: ignore[attr-defined]
    probes = {container[p]["httpGet"]["path"] for p in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes <= routes


class _Silent:
    def info(self, event: str, **fields: object) -> None: ...

    def error(self, event: str, **fields: object) -> None: ...


@pytest.mark.parametrize("overlay", ["demo", "gpu", "production"])
def test_the_engines_flags_are_flags_and_its_probes_are_paths(overlay: str) -> None:
    container = pod_of(named(rendered(overlay), "Deployment", "engine"))["containers"][0]
    arguments = container["args"]
    flags = dict(zip(arguments[::2], arguments[1::2], strict=True))
    known = {"--" + name.replace("_", "-") for name in inspect.signature(engine_serve).parameters}
    assert set(flags) <= known
    assert int(flags["--port"]) == container["ports"][0]["containerPort"]
    source = (DEPLOY.parent / "local_engine" / "server.py").read_text()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert f'Route("{container[probe]["httpGet"]["path"]}"' in source


@pytest.mark.parametrize(("overlay", "workload"), every(("Deployment",)))
def test_the_grace_period_holds_the_whole_drain(overlay: str, workload: Object) -> None:
    spec = pod_of(workload)
    container = spec["containers"][0]
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    arguments = container.get("args", [])
    if "--drain-seconds" in arguments:
        drain = float(arguments[arguments.index("--drain-seconds") + 1])
    elif workload["metadata"]["name"] == "gateway":
        settings = settings_from({k: v for k, v in environment_of(container).items() if v and "DRAIN" in k})
        drain = settings.drain_delay_seconds + settings.drain_seconds
    else:
        drain = 120.0  # vLLM ends by itself once its requests have
    assert before + drain + 5 <= spec["terminationGracePeriodSeconds"]


# The policy.


def written_policy(objects: list[Object], folder: Path) -> Path:
    """The ConfigMap's files, as a pod sees them."""
    for name, text in named(objects, "ConfigMap", "hybridgate-policy")["data"].items():
        (folder / name).write_text(text)
    return folder / "policy.yaml"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_policy_loads_and_leads_to_the_engines(overlay: str, tmp_path: Path) -> None:
    objects = rendered(overlay)
    path = written_policy(objects, tmp_path)
    gateway = environment_of(gateway_of(overlay))
    environment = {name: value or "k" for name, value in gateway.items()}
    checked = CliRunner().invoke(main, ["policy", "check", str(path)], env=environment)
    assert checked.exit_code == 0, checked.output
    assert "warning" not in checked.output and "unavailable" not in checked.output
    policy = read_policy(str(path), environment).policy
    assert policy is not None
    local = policy.deployments["local"]
    service = named(objects, "Service", "engine")
    assert local.urls == (f"http://engine:{service['spec']['ports'][0]['port']}/v1",)
    assert local.zone == "on_premises" and policy.invariants
    engine = pod_of(named(objects, "Deployment", "engine"))["containers"][0]
    words = [*engine["command"], *engine["args"]]
    named_by = next(flag for flag in ("--served-model-name", "--served-name", "--model") if flag in words)
    assert words[words.index(named_by) + 1] == local.model
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            if metric["type"] == "External":
                assert metric["external"]["metric"]["selector"]["matchLabels"]["deployment"] in policy.deployments


# Metrics and alerts.


def test_what_scalers_and_alerts_look_at_is_exported() -> None:
    exported = set(re.findall(r"`(hybridgate_\w+)`", table())) | {metric.name for metric in engine_metrics.METRICS}
    alerts = (DEPLOY / "prometheus" / "alerts.yaml").read_text()
    asked = {word for rule in _rules(alerts) for word in re.findall(r"hybridgate_\w+", str(rule["expr"]))}
    for scaler in of_kind(rendered("production"), "HorizontalPodAutoscaler"):
        asked |= set(re.findall(r"hybridgate_\w+", str(scaler)))
    asked = {re.sub(r"_(bucket|count|sum)$", "", name) if name not in exported else name for name in asked}
    assert asked and asked <= exported


def test_the_operators_resource_is_made_from_the_alerts() -> None:
    alerts = (DEPLOY / "prometheus" / "alerts.yaml").read_text()
    resource = named(rendered("production"), "PrometheusRule", "hybridgate")
    wanted = yaml.safe_load(alerts)
    assert resource["spec"] == wanted, "run `python deploy/prometheus/as_resource.py`"


def _rules(alerts: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(alerts)["groups"] for rule in group["rules"]]
