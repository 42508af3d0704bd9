"""Alerts and dashboard: what they ask for is exported, every alert fires and ends, every panel shows something."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway import errors
from gateway.metrics import METRICS as GATEWAY
from local_engine.metrics import METRICS as ENGINE
from tests.bench.program import free_port
from tests.deploy.cluster import DEPLOY
from tests.deploy.prometheus import program, prometheus

ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
EXPORTED = {metric.name for metric in (*GATEWAY, *ENGINE)}
HISTOGRAMS = {metric.name for metric in (*GATEWAY, *ENGINE) if metric.kind == "histogram"}
SERIES = EXPORTED - HISTOGRAMS | {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "count", "sum")}
FILE = DEPLOY / "grafana" / "hybridgate.json"
DASHBOARD = json.loads(FILE.read_text())
QUERIES = [
    (panel["title"], target["expr"])
    for panel in DASHBOARD["panels"]
    if panel["type"] != "row"
    for target in panel["targets"]
]


def asked(expression: str) -> set[str]:
    return set(re.findall(r"hybridgate_\w+", expression))


def test_what_alerts_and_panels_ask_for_is_exported() -> None:
    wanted = {name for rule in RULES for name in asked(rule["expr"])} | {n for _, expr in QUERIES for n in asked(expr)}
    assert wanted
    assert wanted - SERIES == set()


def test_the_dashboard_is_what_its_source_makes() -> None:
    made = runpy.run_path(str(FILE.with_name("as_dashboard.py")))["text"]()
    assert FILE.read_text() == made, "run `python deploy/grafana/as_dashboard.py`"


def test_panels_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & mine, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= mine


def test_every_alert_has_its_page_in_the_runbook() -> None:
    titles = re.findall(r"^## (\w+)$", (DEPLOY / "RUNBOOK.md").read_text(), re.MULTILINE)
    assert titles == [rule["alert"] for rule in RULES]
    assert [rule["annotations"]["runbook"] for rule in RULES] == [f"deploy/RUNBOOK.md#{t.lower()}" for t in titles]


def faults(kind: type[errors.GatewayError]) -> Iterator[str]:
    """Codes of errors that are not the caller's."""
    if not issubclass(kind, errors.RequestError | errors.UpstreamRejected):
        yield kind.code
        for more in kind.__subclasses__():
            yield from faults(more)


def test_the_alert_on_errors_counts_every_fault_that_is_not_the_callers() -> None:
    (rule,) = (rule for rule in RULES if rule["alert"] == "HybridgateErrors")
    counted = set(re.findall(r'outcome=~"([^"]*)"', rule["expr"])[0].split("|"))
    assert counted == set(faults(errors.GatewayError)) | {"cut"}


# Every alert fires and ends.


@dataclass(frozen=True)
class Firing:
    """Series at one sample a minute that make an alert fire at `fires` (a time) and not at `rests`."""

    alert: str
    series: dict[str, str]
    fires: str
    rests: str
    labels: dict[str, str] = field(default_factory=dict)


R = 'hybridgate_requests_total{deployment="a",rule="r",outcome="%s"}'
FIRING = [
    Firing("HybridgateAbsent", {'hybridgate_policy_info{path="p",hash="h"}': "1x10 _x30 1x30"}, "25m", "60m"),
    Firing(
        "HybridgateErrors",
        {R % "ok": "0+90x120", R % "upstream_timeout": "0x20 0+10x30 300x70", R % "rate_limited": "0+90x120"},
        "45m",
        "90m",
    ),
    Firing("HybridgateEgressDenied", {"hybridgate_egress_denied_total": "0x10 1x60"}, "12m", "40m"),
    Firing(
        "HybridgateClassMissed",
        {
            'hybridgate_slo_requests_total{slo="fast",result="met"}': "0+90x200",
            'hybridgate_slo_requests_total{slo="fast",result="missed"}': "0x20 0+10x60 600x120",
        },
        "75m",
        "190m",
        {"slo": "fast"},
    ),
    Firing(
        "HybridgateDeploymentDown",
        {
            'hybridgate_deployment_up{deployment="a",zone="z",instance="1"}': "1x10 0x20 1x60",
            'hybridgate_deployment_up{deployment="a",zone="z",instance="2"}': "1x10 0x20 0x60",
        },
        "20m",
        "40m",
        {"deployment": "a"},
    ),
    Firing(
        "HybridgateReplicaDown",
        {'hybridgate_replica_up{deployment="a",replica="1"}': "1x10 0x20 1x60"},
        "25m",
        "40m",
        {"deployment": "a", "replica": "1"},
    ),
    Firing(
        "HybridgateCircuitOpen",
        {'hybridgate_deployment_circuit_open{deployment="a"}': "0x10 1x20 0x60"},
        "25m",
        "40m",
        {"deployment": "a"},
    ),
    Firing(
        "HybridgateFailovers",
        {R % "ok": "0+60x120", 'hybridgate_failovers_total{deployment="b"}': "0x10 0+20x30 600x60"},
        "35m",
        "90m",
        {"deployment": "b"},
    ),
    Firing(
        "HybridgateCostSurge",
        {'hybridgate_cost_usd_total{deployment="a"}': "0+0.01x1500 15+0.5x120 75+0.01x300"},
        "1600m",
        "1800m",
    ),
    Firing("HybridgatePolicyDoesNotLoad", {"hybridgate_policy_last_load_successful": "1x10 0x20 1x60"}, "20m", "40m"),
    Firing(
        "HybridgatePoliciesDiffer",
        {
            'hybridgate_policy_info{path="p",hash="old",instance="1"}': "1x40 _x60",
            'hybridgate_policy_info{path="p",hash="new",instance="2"}': "_x10 1x90",
        },
        "30m",
        "60m",
    ),
    Firing("HybridgateKeysDoNotLoad", {"hybridgate_keys_last_load_successful": "1x10 0x20 1x60"}, "20m", "40m"),
    Firing(
        "HybridgateRedisDown",
        {'hybridgate_redis_up{instance="1"}': "1x10 0x20 1x60", 'hybridgate_redis_up{instance="2"}': "1x90"},
        "20m",
        "40m",
        {"instance": "1"},
    ),
    Firing("HybridgateLimitDamaged", {"hybridgate_redis_damaged_counters": "0x10 1x20 0x60"}, "20m", "40m"),
    Firing(
        "HybridgateEngineNotReady",
        {'hybridgate_engine_ready{instance="e"}': "1x10 0x30 1x60"},
        "30m",
        "50m",
        {"instance": "e"},
    ),
    Firing(
        "HybridgateEngineFull",
        {
            'hybridgate_engine_waiting_sequences{instance="e"}': "0x10 5x30 0x60",
            'hybridgate_engine_kv_free_blocks{instance="e"}': "1x100",
            'hybridgate_engine_kv_blocks{instance="e"}': "100x100",
        },
        "30m",
        "50m",
        {"instance": "e"},
    ),
    Firing(
        "HybridgateEnginePreempts",
        {'hybridgate_engine_preempted_total{instance="e"}': "0x10 0+10x40 400x60"},
        "45m",
        "90m",
        {"instance": "e"},
    ),
    Firing(
        "HybridgateEngineOutOfMemory",
        {'hybridgate_engine_out_of_memory_total{instance="e"}': "0x10 1x60"},
        "12m",
        "50m",
        {"instance": "e"},
    ),
]


def test_every_alert_is_tried() -> None:
    assert [firing.alert for firing in FIRING] == [rule["alert"] for rule in RULES]


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, check=False)


def rule_test(firing: Firing, *, fires: str, rests: str) -> dict[str, Any]:
    """promtool's form. Annotations are left to `check rules`: promtool compares them only where they are written."""
    severity = next(rule["labels"]["severity"] for rule in RULES if rule["alert"] == firing.alert)
    labels = {"severity": severity, **firing.labels}
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in firing.series.items()],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{firing.alert}",alertstate="firing",'
                + ",".join(f'{name}="{value}"' for name, value in labels.items())
                + "}) or vector(0)",
                "eval_time": at,
                "exp_samples": [{"labels": "{}", "value": count}],
            }
            for at, count in ((fires, 1), (rests, 0))
        ],
    }


def outcome(tmp_path: Path, tests: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests}))
    return promtool("test", "rules", str(file))


def test_prometheus_takes_the_rules() -> None:
    checked = promtool("check", "rules", str(ALERTS))
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("firing", FIRING, ids=lambda firing: firing.alert)
def test_an_alert_fires_and_ends(firing: Firing, tmp_path: Path) -> None:
    done = outcome(tmp_path, [rule_test(firing, fires=firing.fires, rests=firing.rests)])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_rule_that_does_not_fire_fails_its_test(tmp_path: Path) -> None:
    one = FIRING[0]
    assert outcome(tmp_path, [rule_test(one, fires=one.rests, rests=one.rests)]).returncode != 0


# Every panel shows something, of a real gateway and a real engine that a real Prometheus scrapes.

POLICY = """
version: 1
deployments: deployments.yaml
cache: {ttl: 1h}
labels: {personal: {any: [{detects: [email]}]}}
invariants: [{name: stays home, when: {any_label: personal}, stay_in: on_premises}]
slo: {relaxed: {first_token_p95: 30s}}
default: {candidates: [dead, local]}
"""
DEPLOYMENTS = """
version: 1
deployments:
  dead:
    backend: openai
    url: http://127.0.0.1:1/v1
    model: m
    zone: us_cloud
    context_window: 100000
    cost: {usd_per_million_tokens: {input: 0, output: 0}}
  local:
    backend: local
    url: [ONE, TWO]
    api_key: ${HYBRIDGATE_ENGINE_TOKEN}
    model: demo
    zone: on_premises
    cost: {hardware: cpu-host, usd_per_hour: 1}
"""
TOKEN = "a-token-of-the-test"
QUESTIONS = ("What is TTFT?", "Hello!", "Mail to ann@example.com, what is a policy?")


@contextmanager
def started(*command: str, **environment: str) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", *command], env=os.environ | environment, stdout=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def until_answers(url: str, patience: float = 120.0) -> None:
    end = time.monotonic() + patience
    while True:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end, f"{url} does not answer"
        time.sleep(0.2)


@pytest.mark.slow
def test_every_panel_shows_something_under_load(tmp_path: Path) -> None:
    main, admin, *engines = (free_port() for _ in range(4))
    urls = [f"http://127.0.0.1:{port}" for port in engines]
    (tmp_path / "policy.yaml").write_text(POLICY)
    deployments = DEPLOYMENTS.replace("ONE", f"{urls[0]}/v1").replace("TWO", f"{urls[1]}/v1")
    (tmp_path / "deployments.yaml").write_text(deployments)
    keys = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "key", "new", "crm", "--file", str(tmp_path / "keys.yaml")],
        capture_output=True,
        text=True,
        check=True,
    )
    scraped = [f"127.0.0.1:{port}" for port in (admin, *engines)]
    configuration = yaml.safe_dump(
        {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [{"job_name": "hybridgate", "static_configs": [{"targets": scraped}]}],
        }
    )
    flags = ("--policy", str(tmp_path / "policy.yaml"), "--keys", str(tmp_path / "keys.yaml"), "--port", str(main))
    with (
        started("local_engine", "serve", "--port", str(engines[0]), HYBRIDGATE_ENGINE_TOKEN=TOKEN),
        started("local_engine", "serve", "--port", str(engines[1]), HYBRIDGATE_ENGINE_TOKEN=TOKEN),
        started("gateway.cli", "serve", *flags, "--admin-port", str(admin), HYBRIDGATE_ENGINE_TOKEN=TOKEN),
        prometheus(tmp_path, configuration) as watching,
    ):
        for url in urls:
            until_answers(f"{url}/health")
        until_answers(f"http://127.0.0.1:{main}/readyz")
        load(f"http://127.0.0.1:{main}", keys.stdout.strip(), seconds=20.0)
        firing = {alert["labels"]["alertname"] for alert in watching.ask("alerts")["alerts"]}
        empty = [
            (title, expr)
            for title, expr in QUERIES
            if not any(
                sample["value"][1] != "NaN"
                for sample in watching.query(expr.replace("$__rate_interval", "10s").replace("[1h]", "[15s]"))
            )
        ]
    assert empty == []
    assert firing <= {"HybridgateFailovers", "HybridgateCircuitOpen", "HybridgateDeploymentDown"}


def load(url: str, secret: str, seconds: float) -> None:
    """Streams and plain requests, some labelled, some of a class, some the same again, for so long."""
    end, number = time.monotonic() + seconds, 0
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {secret}"}, timeout=60, trust_env=False) as http:
        while time.monotonic() < end:
            number += 1
            body = {
                "model": "auto",
                "messages": [{"role": "user", "content": QUESTIONS[number % 3]}],
                "stream": number % 2 == 0,
                "max_tokens": 24,
            }
            if number % 5 == 0:
                body["temperature"] = 0
            headers = {"x-hybridgate-slo": "relaxed"} if number % 4 == 0 else {}
            assert http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
