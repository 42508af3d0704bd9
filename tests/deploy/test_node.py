"""The parts of the node that need no root: rules, names, volumes, probes, and what a pod template comes to."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from tests.deploy.cluster import named, of_kind, rendered
from tests.deploy.node.names import answer
from tests.deploy.node.pod import plan_of
from tests.deploy.node.probes import Probe, Watch
from tests.deploy.node.rules import Forward, Place, ruleset
from tests.deploy.node.volumes import contents, write

DEMO = rendered("demo")
HELD = {(o["kind"], o["metadata"]["name"]): o for o in of_kind(DEMO, "ConfigMap", "Secret")}
OURS = {"kubernetes.io/metadata.name": "hybridgate"}
SYSTEM = {"kubernetes.io/metadata.name": "kube-system"}


def place(name: str, address: str, **ports: int) -> Place:
    return Place(f"{name}-1", "hybridgate", address, {"app.kubernetes.io/name": name}, OURS, ports)


EVERYONE = [
    place("gateway", "10.244.0.2", http=8080, admin=9090),
    place("engine", "10.244.0.3", http=8000),
    place("redis", "10.244.0.4", redis=6379),
    Place("dns", "kube-system", "10.244.0.5", {"k8s-app": "kube-dns"}, SYSTEM),
    Place("client", "apps", "10.244.0.6", {}, {"hybridgate/clients": "allowed"}),
    Place("stranger", "default", "10.244.0.7", {}, {}),
]


def chain(name: str, of: Place) -> list[str]:
    lines = ruleset(DEMO, of, EVERYONE, "10.244.0.1", ()).splitlines()
    body = lines[lines.index(f"chain {name} {{") + 1 :]
    return body[: body.index("}")]


@pytest.mark.parametrize(
    ("of", "hook", "allowed"),
    [
        (1, "output", ["ip daddr 10.244.0.5 udp dport 53 accept", "ip daddr 10.244.0.5 tcp dport 53 accept"]),
        (1, "input", ["ip saddr 10.244.0.1 accept", "ip saddr 10.244.0.2 tcp dport 8000 accept"]),
        (2, "output", []),
        (2, "input", ["ip saddr 10.244.0.1 accept", "ip saddr 10.244.0.2 tcp dport 6379 accept"]),
        (0, "input", ["ip saddr 10.244.0.1 accept", "ip saddr 10.244.0.6 tcp dport 8080 accept"]),
    ],
)
def test_a_pods_rules_are_the_policies_that_select_it_and_drop_the_rest(of: int, hook: str, allowed: list[str]) -> None:
    lines = chain(hook, EVERYONE[of])
    assert lines[0] == f"type filter hook {hook} priority 0; policy drop;"
    assert lines[3:] == allowed


def test_a_pod_that_no_policy_selects_is_open() -> None:
    assert chain("output", EVERYONE[5])[0].endswith("policy accept;")


def test_a_block_of_addresses_has_its_exceptions() -> None:
    clouds = [policy for policy in rendered("gpu") if policy["metadata"]["name"] == "gateway-to-clouds"]
    rules = ruleset(clouds, EVERYONE[0], EVERYONE, "10.244.0.1", ())
    assert "ip daddr 0.0.0.0/0 ip daddr != { 10.0.0.0/8, 100.64.0.0/10, " in rules
    assert "ip6 daddr ::/0 ip6 daddr != { fc00::/7, fe80::/10 } tcp dport 443 accept" in rules


def test_a_services_address_leads_to_those_who_are_ready_and_to_none_where_nobody_is() -> None:
    to = [Forward("10.96.1.1", "TCP", 80, (("10.244.0.2", 8080),)), Forward("10.96.1.2", "TCP", 80, ())]
    rules = ruleset(DEMO, EVERYONE[4], EVERYONE, "10.244.0.1", to)
    assert "ip daddr 10.96.1.1 tcp dport 80 dnat ip to numgen random mod 1 map { 0 : 10.244.0.2 . 8080 }" in rules
    assert "10.96.1.2" not in rules


def query(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!HHHHHH", 7, 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)


@pytest.mark.parametrize(
    ("name", "kind", "code", "addresses"),
    [
        ("engine.test", 1, 0, ["10.244.0.3", "10.244.0.8"]),
        ("ENGINE.test", 1, 0, ["10.244.0.3", "10.244.0.8"]),
        ("engine.test", 28, 0, []),
        ("empty.test", 1, 0, []),
        ("nobody.test", 1, 3, []),
    ],
)
def test_a_name_has_the_addresses_that_are_known(name: str, kind: int, code: int, addresses: list[str]) -> None:
    known = {"engine.test": ["10.244.0.3", "10.244.0.8"], "empty.test": []}
    said = answer(query(name, kind), known.get)
    identity, flags, questions, answers = struct.unpack_from("!HHHH", said)
    assert (identity, flags & 15, questions, answers) == (7, code, 1, len(addresses))
    records = said[len(query(name)) :]
    assert [socket.inet_ntoa(records[at + 12 : at + 16]) for at in range(0, len(records), 16)] == addresses


@pytest.mark.parametrize("what", [b"", b"\0" * 11, query("a.b")[:-5], b"\0\7\x81\x80" + query("a.b")[4:]])
def test_what_is_no_query_gets_no_answer(what: bytes) -> None:
    with pytest.raises(ValueError, match="no DNS query"):
        answer(what, lambda name: None)


def test_a_config_map_is_swapped_as_one(tmp_path: Path) -> None:
    write(tmp_path, {"a.yaml": b"1", "b.yaml": b"2"})
    first = os.readlink(tmp_path / "..data")
    assert os.readlink(tmp_path / "a.yaml") == "..data/a.yaml"
    write(tmp_path, {"a.yaml": b"3", "c.yaml": b"4"})
    assert os.readlink(tmp_path / "..data") != first
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if not path.name.startswith("..")}
    assert files == {"a.yaml": b"3", "c.yaml": b"4"}
    assert not (tmp_path / first).exists()


def test_a_secrets_files_are_decoded() -> None:
    assert contents(named(DEMO, "Secret", "redis-auth")) == {"password": b"demo"}


def test_a_probe_holds_after_its_successes_and_fails_after_its_failures() -> None:
    watch = Watch(Probe(period=3, failures=2), since=0)
    tries = iter([False, True, False, False, True])
    seen = []
    for now in (0, 1, 3, 6, 9, 12):
        watch.look(now, lambda probe: next(tries))
        seen.append(watch.holds)
    assert seen == [None, None, True, True, False, True]


def test_a_template_is_planned_as_it_is_written() -> None:
    plan = plan_of(named(DEMO, "Deployment", "gateway")["spec"]["template"], HELD, patience=1)
    assert plan.container.command == ("hybridgate", "serve")
    assert plan.container.environment["HYBRIDGATE_REDIS_URL"] == "redis://:demo@redis:6379/0"
    assert (plan.pre_stop, plan.grace, plan.ports) == (5, 140, {"http": 8080, "admin": 9090})
    assert plan.readiness == Probe(8080, "/readyz", period=3, timeout=2, failures=2)
    redis = plan_of(named(DEMO, "StatefulSet", "redis")["spec"]["template"], HELD, patience=2)
    assert redis.container.command == ("redis-server", "/etc/redis/redis.conf", "--requirepass", "demo")
    assert redis.readiness is not None and redis.readiness.command[0] == "sh" and redis.readiness.timeout == 6
    assert redis.startup is not None and redis.startup.failures == 120


def test_what_is_not_understood_is_refused() -> None:
    template = named(rendered("demo"), "Deployment", "gateway")["spec"]["template"]
    template["spec"]["containers"][0]["readinessProbe"] = {"grpc": {"port": 1}}
    with pytest.raises(ValueError, match="grpc"):
        plan_of(template, HELD, patience=1)
