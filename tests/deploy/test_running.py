"""The demo overlay, run: its manifests' commands, variables, mounts, probes and network rules, in network namespaces.

Needs root; takes a minute or two. The programs are this checkout's, so that images are what is not tested here.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Self

import pytest

from tests.deploy.cluster import Peer, named, of_kind, rendered
from tests.deploy.network import may_connect
from tests.deploy.node.asks import Asked
from tests.deploy.node.cluster import Bystander, Cluster, remove_abandoned, wait_until
from tests.deploy.node.pod import Pod
from tests.deploy.node.programs import missing, program, within
from tests.deploy.node.wires import WORLD
from tests.deploy.prometheus import program as unpacked

WHY_NOT = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

PATIENCE = 10.0  # of probes, for machines with more to do than processors; with 1 the manifests' own figures hold
SETTLED = 3.0  # seconds in which a connection that is allowed is made


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("node")
    for above in (folder, *folder.parents[:3]):
        above.chmod(above.stat().st_mode | 0o011)  # pods run as users of their own
    remove_abandoned()
    threads = {"OMP_NUM_THREADS": "1"}  # two engines share what each would have for itself
    with Cluster(rendered("demo"), folder, PATIENCE, extra=threads, say=print) as running:
        for workload in ("redis", "engine", "gateway"):
            running.ready(workload)
        yield running


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Bystander:
    place = cluster.bystander("client", "apps", {}, hybridgate__clients="allowed")
    cluster.settle()  # the gateways' rules learn of it
    return place


@dataclass(frozen=True)
class Asking:
    """The official client at work in the cluster, and what it has told."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def at(cls, cluster: Cluster, client: Bystander, log: Path, url: str, *more: str) -> Self:
        command = ("python", "-m", "tests.deploy.node.asks", url, *more)
        with log.open("wb") as output:
            return cls(cluster.execute(client, command, output), log)

    def told(self) -> list[Asked]:
        lines = [line for line in self.log.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        return [Asked(**json.loads(line)) for line in lines]

    def begun(self) -> list[Asked]:
        return [asked for asked in self.told() if not asked.ended]

    def answers(self) -> list[Asked]:
        return [asked for asked in self.told() if asked.ended]

    def end(self) -> None:
        """Wait until it has ended."""
        assert self.process.wait(180) == 0, self.log.read_text()


@contextmanager
def asking(cluster: Cluster, client: Bystander, folder: Path) -> Iterator[Callable[[], list[Asked]]]:
    """The official client asks in the block, through the Service's name; call what is given for its answers so far."""
    at_work = Asking.at(cluster, client, folder / "asked", "http://gateway.hybridgate/v1")
    try:
        wait_until(lambda: len(at_work.answers()) >= 2, 180, "nothing was answered")
        yield at_work.answers
    finally:
        at_work.process.send_signal(signal.SIGTERM)
        at_work.end()


def reaches(source: str, address: str, port: int) -> bool:
    """Whether anything comes back from there: a connection, or that nobody listens."""
    with within(source):
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with connection:
        connection.settimeout(SETTLED)
        try:
            connection.connect((address, port))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return True


def reached(connections: Sequence[tuple[str, str, int]]) -> list[bool]:
    """`reaches` of each, at the same time: what is denied takes as long as patience lasts."""
    with ThreadPoolExecutor(24) as pool:
        return list(pool.map(lambda connection: reaches(*connection), connections))


def policy_of(pod: Pod, client: Bystander) -> str:
    """The policy by which a gateway decides, as an answer to a client says."""
    connection = HTTPConnection(pod.place.address, 8080, timeout=30)
    with within(client.namespace):
        connection.connect()
    try:
        body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1})
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        return answer.headers["x-hybridgate-policy"]
    finally:
        connection.close()


def test_the_official_client_gets_routed_answers_through_the_service(
    cluster: Cluster, client: Bystander, tmp_path: Path
) -> None:
    with asking(cluster, client, tmp_path) as answers:
        wait_until(lambda: len(answers()) >= 4, 120, "too few answers")
    for asked in answers():
        assert (asked.error, asked.deployment) == ("", "local")
        assert asked.text and asked.policy


def test_the_programs_are_restricted_as_the_manifests_say(cluster: Cluster) -> None:
    for workload, user in (("gateway", 10001), ("engine", 10001), ("redis", 999)):
        for pod in cluster.pods_of(workload):
            process = Path("/proc", str(pod.process_id))
            status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
            assert status["Uid"].split() == [str(user)] * 4
            assert (int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, 0, "1")
            mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
            assert [fields[5].split(",")[0] for fields in mounts if fields[4] == "/"] == ["ro"]


def test_who_reaches_whom_is_what_the_policies_say(cluster: Cluster, client: Bystander) -> None:
    """As the other evaluator of the policies sees it, for every pair; the node's own rules are nftables'."""
    stranger = cluster.bystander("stranger", "default", {})
    cluster.settle()
    pods = [cluster.pods_of(name)[0] for name in ("gateway", "engine", "redis")]
    ends: list[Pod | Bystander] = [*pods, client, stranger]
    outside = Peer(address=WORLD)

    def peer(end: Pod | Bystander) -> Peer:
        place = end.place
        return Peer(tuple(place.labels.items()), place.namespace, tuple(place.namespace_labels.items()))

    cases = [
        (source, target.place.address, peer(target), port)
        for source in ends
        for target in ends
        for port in (8080, 9090, 8000, 6379, 443)
        if source is not target
    ] + [(source, WORLD, outside, port) for source in ends for port in (443, 80)]
    found = reached([(source.namespace, address, port) for source, address, _, port in cases])
    expected = [may_connect(cluster.objects, peer(source), target, port) for source, _, target, port in cases]
    wrong = [
        f"{source.place.name} -> {address}:{port} should be {should}"
        for (source, address, _, port), is_, should in zip(cases, found, expected, strict=True)
        if is_ is not should
    ]
    assert wrong == []
    assert True in expected and False in expected


def test_the_engine_reaches_nothing_outside_and_the_gateway_what_a_policy_names(cluster: Cluster) -> None:
    with within(cluster.wires.world):
        listener = socket.create_server((WORLD, 443))
    gateway, engine, redis = (cluster.pods_of(name)[0].namespace for name in ("gateway", "engine", "redis"))
    clouds = [
        policy
        for policy in of_kind(rendered("gpu"), "NetworkPolicy")
        if any("ipBlock" in peer for rule in policy["spec"].get("egress", ()) for peer in rule["to"])
        and policy["spec"]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "gateway"}
    ]
    assert len(clouds) == 1, "components/clouds has one policy"
    with listener:
        sources = (cluster.wires.node, gateway, engine, redis)
        assert reached([(source, WORLD, 443) for source in sources]) == [True, False, False, False]
        cluster.apply(*clouds)
        try:
            wait_until(lambda: reaches(gateway, WORLD, 443), 30, "the policy of components/clouds opens nothing")
            others = [(gateway, WORLD, 80), (engine, WORLD, 443), (redis, WORLD, 443)]
            assert reached(others) == [False, False, False]
        finally:
            cluster.remove(*clouds)
        wait_until(lambda: not reaches(gateway, WORLD, 443), 30, "the policy is gone, and what it opened is open")


def test_prometheus_scrapes_every_gateway_and_engine_once_its_policies_are_there(
    cluster: Cluster, client: Bystander, tmp_path: Path
) -> None:
    """The rules and ports of components/monitoring, and a real Prometheus where it would be."""
    policies = [p for p in of_kind(rendered("production"), "NetworkPolicy") if "prometheus" in p["metadata"]["name"]]
    assert len(policies) == 2, "one for gateways, one for engines"
    watcher = cluster.bystander("prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"})
    cluster.settle()
    targets = [
        (pod.place.address, port)
        for name, port in (("gateway", 9090), ("engine", 8000))
        for pod in cluster.pods_of(name)
    ]
    assert reached([(watcher.namespace, *target) for target in targets]) == [False] * 4
    inside = (str(program("nsenter")), f"--net=/run/netns/{watcher.namespace}")
    configuration = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "all", "static_configs": [{"targets": [f"{a}:{p}" for a, p in targets]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(configuration))
    flags = (f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}")

    def value(expression: str) -> float:
        ask = (*inside, promtool, "query", "instant", "-o", "json", "http://127.0.0.1:9090", expression)
        said = subprocess.run(ask, capture_output=True, text=True, check=False)
        found = json.loads(said.stdout) if said.returncode == 0 else []
        return float(found[0]["value"][1]) if found else 0.0

    prometheus, promtool = unpacked("prometheus"), unpacked("promtool")
    cluster.apply(*policies)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*inside, prometheus, *flags], stdout=log, stderr=log)
    try:
        with asking(cluster, client, tmp_path):
            wait_until(lambda: value("sum(up)") == 4, 120, "not all are scraped")
            wait_until(lambda: value("sum(hybridgate_requests_total)") >= 2, 60, "no requests are counted")
            wait_until(lambda: value("sum(hybridgate_engine_finished_total)") >= 2, 60, "no answers are counted")
        assert (value("count(hybridgate_policy_info)"), value("sum(hybridgate_engine_ready)")) == (2, 2)
    finally:
        process.terminate()
        process.wait(30)
        cluster.remove(*policies)


def test_a_policy_edit_is_live_on_both_replicas_within_two_seconds(cluster: Cluster, client: Bystander) -> None:
    gateways = cluster.pods_of("gateway")
    assert len(gateways) == 2
    (before,) = {policy_of(pod, client) for pod in gateways}
    written = named(cluster.objects, "ConfigMap", "hybridgate-policy")
    took = []
    for attempt in range(3):  # the quickest counts: what else the machine does is not ours
        edited = deepcopy(written)
        text = edited["data"]["policy.yaml"]
        edited["data"]["policy.yaml"] = text.replace("first_token_p95: 1s", f"first_token_p95: {attempt + 2}s")
        began = time.monotonic()
        cluster.apply(edited)
        wait_until(lambda known=before: known not in {policy_of(p, client) for p in gateways}, 60, "no reload")  # type: ignore[misc]
        took.append(time.monotonic() - began)
        (before,) = {policy_of(pod, client) for pod in gateways}
        if took[-1] < 2:
            break
    assert min(took) < 2, took
    assert [pod.restarts for pod in gateways] == [0, 0]


def test_a_killed_engine_leaves_the_name_and_no_request_fails_that_had_not_begun(
    cluster: Cluster, client: Bystander, tmp_path: Path
) -> None:
    victim = cluster.pods_of("engine")[0]
    address = victim.place.address
    name = "engine.hybridgate.svc.cluster.local"
    assert len(cluster.lookup(name) or ()) == 2
    with asking(cluster, client, tmp_path) as answers:
        victim.kill()
        wait_until(lambda: address not in (cluster.lookup(name) or ()), 30, "the name still leads to it")
        so_far, since = len(answers()), time.time()
        wait_until(lambda: sum(a.began > since for a in answers()[so_far:]) >= 4, 120, "the other does not answer")
        cluster.ready("engine")
        assert len(cluster.lookup(name) or ()) == 2
        so_far = len(answers())
        wait_until(lambda: len(answers()) >= so_far + 4, 120, "too few answers")
    failed = [asked for asked in answers() if asked.error]
    assert [asked for asked in failed if asked.chunks == 0] == []
    assert [asked for asked in failed if asked.began > since] == []
    assert victim.restarts == 1


def test_a_rolling_restart_of_both_gateways_drops_no_stream(
    cluster: Cluster, client: Bystander, tmp_path: Path
) -> None:
    """Those that go through the Service all the time, and long ones that an old gateway has begun when it is told to
    end; on a fast machine they may be over before it stops."""
    old = cluster.pods_of("gateway")
    long: dict[Pod, Asking] = {}

    def open_streams(pod: Pod) -> None:
        url = f"http://{pod.place.address}:8080/v1"
        long[pod] = Asking.at(cluster, client, tmp_path / pod.place.name, url, "--once", "--slow", "0.025")
        wait_until(lambda: len(long[pod].begun()) == 2, 180, "no stream begins")

    with asking(cluster, client, tmp_path) as answers:
        began = time.time()
        cluster.restart("gateway", before=open_streams)
        ended = time.time()
        wait_until(lambda: any(asked.began > ended for asked in answers()), 120, "the new ones do not answer")
    for at_work in long.values():
        at_work.end()
    assert [asked.error for asked in answers() if asked.error] == []
    assert sum(began < asked.began < ended for asked in answers()) >= 5
    for pod in old:
        streams = long[pod].answers()
        assert [(asked.error, asked.chunks > 400) for asked in streams] == [("", True)] * 2
        assert pod.exit_code != -signal.SIGKILL, "it ended within its grace"
    assert {pod.place.name for pod in cluster.pods_of("gateway")}.isdisjoint(pod.place.name for pod in old)
    assert len(cluster.pods_of("gateway")) == 2
