"""The overlays as a cluster takes them: the real kubectl, and a stub API server that checks every object strictly."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from tests.deploy.api_server import Cluster, api_server
from tests.deploy.cluster import DEPLOY, OVERLAYS, kubectl, named, rendered
from tests.deploy.schemas import problems_of


@pytest.fixture
def server() -> Iterator[tuple[str, Cluster]]:
    with api_server() as running:
        yield running


def apply(url: str, what: Path, *flags: str) -> dict[str, str]:
    """Object to what kubectl says became of it."""
    said = kubectl("--server", url, "apply", "-k", str(what), *flags)
    lines = [line.split(" ", 1) for line in said.stdout.splitlines()]
    return {line[0]: line[1] for line in lines}


def workdir(tmp_path: Path, overlay: str) -> Path:
    """A copy of deploy/, to edit as an operator would; the overlay's folder in it."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    return tmp_path / "deploy" / "overlays" / overlay


# kubectl writes a budget's selector anew each time, since its patch strategy is "replace", and says so though nothing
# changes.
ALWAYS_CONFIGURED = "poddisruptionbudget.policy/"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_created_and_the_second_time_nothing_changes(overlay: str, server: tuple[str, Cluster]) -> None:
    url, cluster = server
    path = DEPLOY / "overlays" / overlay
    created = apply(url, path)
    assert set(created.values()) == {"created"} and len(created) == len(rendered(overlay)) == len(cluster.objects)
    before = deepcopy(cluster.objects)
    again = apply(url, path)
    assert again.keys() == created.keys()
    assert {was for name, was in again.items() if not name.startswith(ALWAYS_CONFIGURED)} == {"unchanged"}
    assert cluster.objects == before, "not even a resourceVersion"


@pytest.mark.parametrize("overlay", ["demo", "production"])
def test_an_overlay_can_be_applied_by_the_server(overlay: str, server: tuple[str, Cluster]) -> None:
    url, cluster = server
    path = DEPLOY / "overlays" / overlay
    assert set(apply(url, path, "--server-side").values()) == {"serverside-applied"}
    before = deepcopy(cluster.objects)
    apply(url, path, "--server-side")
    assert cluster.objects == before


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid_in_three_releases_of_kubernetes(overlay: str) -> None:
    assert {f"{o['kind']}/{o['metadata']['name']}": problems_of(o) for o in rendered(overlay) if problems_of(o)} == {}


@pytest.mark.parametrize(
    ("file", "before", "after", "told"),
    [
        ("base/gateway.yaml", "preStop:", "prestop:", "prestop"),
        ("base/gateway.yaml", "maxSkew: 1", 'maxSkew: "1"', "integer"),
        ("base/network.yaml", "policyTypes", "policyTipes", "policyTipes"),
        ("components/redis/redis.yaml", "serviceName", "servicename", "servicename"),
        ("components/monitoring/gateway.yaml", "interval: 15s", "intervall: 15s", "intervall"),
        ("components/monitoring/gateway.yaml", "interval: 15s", "interval: often", "interval"),
        ("prometheus/prometheusrule.yaml", "expr:", "expression:", "expression"),
    ],
)
def test_a_mistake_is_found(file: str, before: str, after: str, told: str, tmp_path: Path) -> None:
    overlay = workdir(tmp_path, "demo" if "redis" in file else "production")
    path = tmp_path / "deploy" / file
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))
    problems = [p for o in yaml.safe_load_all(kubectl("kustomize", str(overlay)).stdout) for p in problems_of(o)]
    assert any(told in problem for problem in problems)


def test_the_server_refuses_a_mistake_and_kubectl_says_so(server: tuple[str, Cluster], tmp_path: Path) -> None:
    overlay = workdir(tmp_path, "demo")
    path = tmp_path / "deploy" / "base" / "gateway.yaml"
    path.write_text(path.read_text().replace("preStop:", "prestop:"))
    refused = kubectl("--server", server[0], "apply", "-k", str(overlay), check=False)
    assert refused.returncode == 1 and "prestop" in refused.stderr and "is invalid" in refused.stderr
    assert "gateway" not in server[1].of_kind("Deployment")


def test_an_upgrade_changes_one_deployment_and_a_rollback_brings_back_what_was(
    server: tuple[str, Cluster], tmp_path: Path
) -> None:
    url, cluster = server
    overlay = workdir(tmp_path, "demo")
    apply(url, overlay)
    before = deepcopy(cluster.of_kind("Deployment")["gateway"]["spec"])
    kustomization = overlay / "kustomization.yaml"
    text = kustomization.read_text()
    kustomization.write_text(text + "images:\n  - {name: hybridgate-gateway, newTag: 0.2.0}\n")
    upgraded = apply(url, overlay)
    changed = {name for name, was in upgraded.items() if was != "unchanged" and not name.startswith(ALWAYS_CONFIGURED)}
    assert changed == {"deployment.apps/gateway"}
    after = cluster.of_kind("Deployment")["gateway"]["spec"]
    assert after["template"]["spec"]["containers"][0]["image"] == "hybridgate-gateway:0.2.0"
    after = deepcopy(after)
    after["template"]["spec"]["containers"][0]["image"] = "hybridgate-gateway:0.1.0"
    assert after == before, "the image and nothing else"
    kustomization.write_text(text)
    apply(url, overlay)
    assert cluster.of_kind("Deployment")["gateway"]["spec"] == before


def test_a_change_of_the_policy_changes_a_file_that_is_mounted_and_restarts_nothing(
    server: tuple[str, Cluster], tmp_path: Path
) -> None:
    url, cluster = server
    overlay = workdir(tmp_path, "gpu")
    apply(url, overlay)
    policy = overlay / "policy" / "policy.yaml"
    policy.write_text(policy.read_text().replace("first_token_p95: 250ms", "first_token_p95: 300ms"))
    told = apply(url, overlay)
    changed = {name for name, was in told.items() if was != "unchanged" and not name.startswith(ALWAYS_CONFIGURED)}
    assert changed == {"configmap/hybridgate-policy"}
    assert "300ms" in cluster.of_kind("ConfigMap")["hybridgate-policy"]["data"]["policy.yaml"]


def test_a_second_engine_is_one_number(server: tuple[str, Cluster], tmp_path: Path) -> None:
    url, cluster = server
    overlay = workdir(tmp_path, "gpu")
    apply(url, overlay)
    assert cluster.of_kind("Deployment")["engine"]["spec"]["replicas"] == 1
    kustomization = overlay / "kustomization.yaml"
    kustomization.write_text(kustomization.read_text().replace("count: 1", "count: 2"))
    apply(url, overlay)
    assert cluster.of_kind("Deployment")["engine"]["spec"]["replicas"] == 2


def test_what_is_applied_again_leaves_the_autoscalers_numbers_alone(server: tuple[str, Cluster]) -> None:
    url, cluster = server
    path = DEPLOY / "overlays" / "production"
    apply(url, path)
    for name in ("gateway", "engine"):
        spec = cluster.of_kind("Deployment")[name]["spec"]
        assert "replicas" not in spec
        spec["replicas"] = 7  # as the autoscaler does
    apply(url, path)
    assert [cluster.of_kind("Deployment")[name]["spec"]["replicas"] for name in ("gateway", "engine")] == [7, 7]


def test_a_component_stands_on_its_own_in_an_overlay_of_ones_own(tmp_path: Path) -> None:
    """As README's first step: a folder beside the repository, with what it needs and no more."""
    base = os.path.relpath(DEPLOY, tmp_path)
    wanted = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "llm",
        "resources": [f"{base}/overlays/demo"],
        "components": [f"{base}/components/keys"],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
    objects = list(yaml.safe_load_all(kubectl("kustomize", str(tmp_path)).stdout))
    assert {o["metadata"].get("namespace", "llm") for o in objects} == {"llm"}
    mounts = named(objects, "Deployment", "gateway")["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert {"keys", "policy", "tmp"} == {mount["name"] for mount in mounts}
