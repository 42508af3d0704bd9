"""One machine without Kubernetes: compose.yaml, the systemd unit, and the examples."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from gateway.settings import settings_from
from tests.deploy.cluster import DEPLOY, environment_of, named, pod_of, rendered
from tests.deploy.schemas import problems_of

UNIT = DEPLOY / "systemd" / "hybridgate.service"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
ANALYZE = shutil.which("systemd-analyze")


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_a_service_of_compose_is_restricted(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].partition(":")[0]) > 0
    assert not service["image"].endswith(":latest") and ":" in service["image"]
    assert {"mem_limit", "cpus", "healthcheck", "command"} <= service.keys()
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    for volume in service.get("volumes", ()):
        source = volume.partition(":")[0]
        assert source in COMPOSE["volumes"] or (DEPLOY / source).exists()


def test_only_the_gateway_has_a_way_out() -> None:
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    outside = {name for name, service in COMPOSE["services"].items() if service["networks"] != ["inside"]}
    assert outside == {"gateway"}


def test_compose_runs_what_the_demo_overlay_runs() -> None:
    objects = rendered("demo")
    for name in ("gateway", "engine"):
        container = pod_of(named(objects, "Deployment", name))["containers"][0]
        service = COMPOSE["services"][name]
        assert service["image"] == container["image"]
        assert service["command"][:2] == container["command"]
    redis = pod_of(named(objects, "StatefulSet", "redis"))["containers"][0]
    assert COMPOSE["services"]["redis"]["image"] == redis["image"]
    ours = set(COMPOSE["services"]["gateway"]["environment"])
    assert {n for n in ours if n.startswith("HYBRIDGATE_")} <= set(environment_of_gateway())
    known = {k: v for k, v in COMPOSE["services"]["gateway"]["environment"].items() if k != "HYBRIDGATE_REDIS_URL"}
    settings = settings_from(known)
    drain = settings.drain_delay_seconds + settings.drain_seconds
    assert float(COMPOSE["services"]["gateway"]["stop_grace_period"].removesuffix("s")) > drain


def environment_of_gateway() -> dict[str, str | None]:
    return environment_of(pod_of(named(rendered("demo"), "Deployment", "gateway"))["containers"][0])


def test_the_units_variables_are_settings_and_it_stops_after_the_drain() -> None:
    text = UNIT.read_text()
    variables = dict(re.findall(r"\b(HYBRIDGATE_\w+)=(\S+)", text))
    settings = settings_from(variables)
    (patience,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert float(patience) > settings.drain_delay_seconds + settings.drain_seconds
    assert "KillMode=mixed" in text, "the engine gets no signal while the gateway drains"


@pytest.mark.skipif(ANALYZE is None, reason="no systemd-analyze here: Debian's package systemd has it")
def test_systemd_understands_the_unit_and_finds_it_closed(tmp_path: Path) -> None:
    assert ANALYZE is not None
    unit = tmp_path / UNIT.name
    unit.write_text(re.sub(r"^ExecStart=.*$", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE))
    verified = subprocess.run([ANALYZE, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert verified.returncode == 0 and verified.stderr == ""
    command = [ANALYZE, "security", "--offline=true", "--threshold=25", "--no-pager", str(unit)]
    judged = subprocess.run(command, capture_output=True, text=True, check=False)
    assert judged.returncode == 0, judged.stdout.splitlines()[-1:]
    unit.write_text(unit.read_text().replace("Restart=always", "Restart=sometimes"))
    wrong = subprocess.run([ANALYZE, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "sometimes" in wrong.stderr


@pytest.mark.parametrize("path", sorted((DEPLOY / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_is_valid(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        assert problems_of(document) == []


def test_what_the_readme_names_exists() -> None:
    text = (DEPLOY / "README.md").read_text()
    named_files = set(
        re.findall(r"(?<!/etc/)\b(?:overlays|components|examples|base|prometheus|systemd)/[\w./-]*\w", text)
    )
    assert len(named_files) > 10
    assert [name for name in sorted(named_files) if not (DEPLOY / name).exists()] == []
    for kustomization in ("overlays", "components"):
        for folder in (DEPLOY / kustomization).iterdir():
            assert f"{kustomization}/{folder.name}" in text or folder.name in ("keys", "engine-token"), folder.name
