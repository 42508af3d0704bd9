"""Writes hybridgate.json, the dashboard for Grafana. A test tells when it is outdated.

Owns the panels: what is asked and in which unit. Refuses colours and sizes of each panel's own, so that they look
alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("hybridgate.json")
WIDTH, HEIGHT = 8, 8  # of a panel; Grafana's grid has 24 columns
RATE = "[$__rate_interval]"
FORECASTS = "hybridgate_first_token_forecasts_total"


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: PromQL by legend, and the unit as Grafana calls it."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    help: str = ""


def quantile(q: float, metric: str, by: str) -> str:
    """Of a histogram, over the range."""
    return f"histogram_quantile({q}, sum by (le, {by}) (rate({metric}_bucket{RATE})))"


def share(part: str, whole: str) -> str:
    """One rate over another; nothing where there is none of the whole."""
    return f"({part}) / ({whole} > 0)"


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Requests",
        (
            Panel(
                "Requests a second, by deployment",
                "reqps",
                ((f"sum by (deployment) (rate(hybridgate_requests_total{RATE}))", "{{deployment}}"),),
            ),
            Panel(
                "By outcome",
                "reqps",
                ((f"sum by (outcome) (rate(hybridgate_requests_total{RATE}))", "{{outcome}}"),),
            ),
            Panel(
                "By rule",
                "reqps",
                ((f"sum by (rule) (rate(hybridgate_requests_total{RATE}))", "{{rule}}"),),
            ),
            Panel(
                "Labelled requests",
                "reqps",
                (
                    (f"sum by (label) (rate(hybridgate_labelled_requests_total{RATE}))", "{{label}}"),
                    (f"sum(rate(hybridgate_egress_denied_total{RATE}))", "egress denied"),
                ),
                "What the detectors and headers found; the last line must stay at zero.",
            ),
            Panel(
                "Failovers, by deployment that failed",
                "reqps",
                ((f"sum by (deployment) (rate(hybridgate_failovers_total{RATE}))", "{{deployment}}"),),
            ),
            Panel(
                "Under way",
                "short",
                (("sum by (deployment) (hybridgate_deployment_in_flight)", "{{deployment}}"),),
            ),
        ),
    ),
    (
        "Latency",
        (
            Panel(
                "First token",
                "s",
                (
                    (quantile(0.5, "hybridgate_first_token_seconds", "deployment"), "{{deployment}} p50"),
                    (quantile(0.95, "hybridgate_first_token_seconds", "deployment"), "{{deployment}} p95"),
                ),
            ),
            Panel(
                "Whole answer",
                "s",
                (
                    (quantile(0.5, "hybridgate_request_duration_seconds", "deployment"), "{{deployment}} p50"),
                    (quantile(0.95, "hybridgate_request_duration_seconds", "deployment"), "{{deployment}} p95"),
                ),
            ),
            Panel(
                "Classes met",
                "percentunit",
                (
                    (
                        share(
                            f'sum by (slo) (rate(hybridgate_slo_requests_total{{result="met"}}{RATE}))',
                            f"sum by (slo) (rate(hybridgate_slo_requests_total{RATE}))",
                        ),
                        "{{slo}}",
                    ),
                ),
            ),
            Panel(
                "First tokens within what was predicted",
                "percentunit",
                (
                    (
                        share(
                            f"sum by (deployment) (rate({FORECASTS}{{result='within'}}{RATE}))",
                            f"sum by (deployment) (rate({FORECASTS}{RATE}))",
                        ),
                        "{{deployment}}",
                    ),
                ),
                "A forecast is a 95 % quantile: about 95 % should be within.",
            ),
            Panel(
                "Between two tokens",
                "s",
                (
                    (quantile(0.5, "hybridgate_per_token_seconds", "deployment"), "{{deployment}} p50"),
                    (quantile(0.95, "hybridgate_per_token_seconds", "deployment"), "{{deployment}} p95"),
                ),
            ),
            Panel(
                "The gateway's own time before a deployment is asked",
                "s",
                (
                    (f"histogram_quantile(0.5, sum by (le) (rate(hybridgate_decision_seconds_bucket{RATE})))", "p50"),
                    (f"histogram_quantile(0.99, sum by (le) (rate(hybridgate_decision_seconds_bucket{RATE})))", "p99"),
                ),
            ),
            Panel(
                "Deployments and replicas up",
                "short",
                (
                    ("max by (deployment) (hybridgate_deployment_up)", "{{deployment}}"),
                    ("sum by (deployment) (hybridgate_replica_up)", "{{deployment}} replicas"),
                ),
            ),
            Panel(
                "Circuits open",
                "short",
                (("max by (deployment) (hybridgate_deployment_circuit_open)", "{{deployment}}"),),
            ),
        ),
    ),
    (
        "Money and tokens",
        (
            Panel(
                "Cost an hour, as billed",
                "currencyUSD",
                (("sum by (deployment) (increase(hybridgate_cost_usd_total[1h]))", "{{deployment}}"),),
            ),
            Panel(
                "Cost an hour, by tenant",
                "currencyUSD",
                (("sum by (tenant) (increase(hybridgate_tenant_cost_usd_total[1h]))", "{{tenant}}"),),
            ),
            Panel(
                "Predicted over actual cost, at the margin",
                "percentunit",
                (
                    (
                        share(
                            "sum by (deployment) (increase(hybridgate_predicted_cost_usd_total[1h]))",
                            "sum by (deployment) (increase(hybridgate_marginal_cost_usd_total[1h]))",
                        ),
                        "{{deployment}}",
                    ),
                ),
            ),
            Panel(
                "Tokens a second",
                "short",
                ((f"sum by (deployment, kind) (rate(hybridgate_tokens_total{RATE}))", "{{deployment}} {{kind}}"),),
            ),
            Panel(
                "Stored answers",
                "reqps",
                ((f"sum by (result) (rate(hybridgate_cache_requests_total{RATE}))", "{{result}}"),),
            ),
            Panel("Stored answers' bytes", "bytes", (("sum(hybridgate_cache_bytes)", "in memory"),)),
        ),
    ),
    (
        "Policy and keys",
        (
            Panel(
                "Policies in use", "short", (("count by (hash, path) (hybridgate_policy_info)", "{{path}} {{hash}}"),)
            ),
            Panel(
                "Loads",
                "short",
                (
                    ("sum by (result) (increase(hybridgate_policy_loads_total[1h]))", "policy {{result}}"),
                    ("sum by (result) (increase(hybridgate_keys_loads_total[1h]))", "keys {{result}}"),
                ),
            ),
            Panel("Errors in the policy's files", "short", (("max(hybridgate_policy_errors)", "errors"),)),
        ),
    ),
    (
        "Engines",
        (
            Panel(
                "Sequences",
                "short",
                (
                    ("sum by (instance) (hybridgate_engine_running_sequences)", "{{instance}} running"),
                    ("sum by (instance) (hybridgate_engine_waiting_sequences)", "{{instance}} waiting"),
                ),
            ),
            Panel(
                "Queued prompt tokens",
                "short",
                (("sum by (instance) (hybridgate_engine_queued_prefill_tokens)", "{{instance}}"),),
            ),
            Panel(
                "KV cache in use",
                "percentunit",
                (("1 - hybridgate_engine_kv_free_blocks / hybridgate_engine_kv_blocks", "{{instance}}"),),
            ),
            Panel(
                "A step",
                "s",
                (
                    (quantile(0.5, "hybridgate_engine_step_seconds", "instance"), "{{instance}} p50"),
                    (quantile(0.99, "hybridgate_engine_step_seconds", "instance"), "{{instance}} p99"),
                ),
            ),
            Panel(
                "Sequences a step",
                "short",
                (
                    (
                        share(
                            f"rate(hybridgate_engine_batch_sequences_total{RATE})",
                            f"rate(hybridgate_engine_step_seconds_count{RATE})",
                        ),
                        "{{instance}}",
                    ),
                ),
            ),
            Panel(
                "Prompt tokens found in the prefix cache",
                "percentunit",
                (
                    (
                        share(
                            f"rate(hybridgate_engine_prefix_found_tokens_total{RATE})",
                            f"rate(hybridgate_engine_prefix_asked_tokens_total{RATE})",
                        ),
                        "{{instance}}",
                    ),
                ),
            ),
            Panel(
                "Tokens a second",
                "short",
                (
                    (f"rate(hybridgate_engine_prefill_tokens_total{RATE})", "{{instance}} prefill"),
                    (f"rate(hybridgate_engine_decode_tokens_total{RATE})", "{{instance}} decode"),
                ),
            ),
            Panel(
                "What should not happen",
                "short",
                (
                    ("increase(hybridgate_engine_preempted_total[10m])", "{{instance}} preempted"),
                    ("increase(hybridgate_engine_out_of_memory_total[10m])", "{{instance}} out of memory"),
                    ("increase(hybridgate_engine_aborted_total[10m])", "{{instance}} aborted"),
                ),
            ),
        ),
    ),
)


def _panel(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + n), "expr": expr, "legendFormat": legend, "datasource": {"uid": "${source}"}}
        for n, (expr, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}}
        )
        y += 1
        for place, panel in enumerate(row):
            x = place % (24 // WIDTH) * WIDTH
            panels.append(_panel(len(panels) + 1, panel, x, y + place // (24 // WIDTH) * HEIGHT))
        y += -(-len(row) // (24 // WIDTH)) * HEIGHT
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "uid": "hybridgate",
        "title": "Hybridgate",
        "schemaVersion": 39,
        "version": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source]},
        "panels": panels,
    }


def text() -> str:
    """The file's text."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
