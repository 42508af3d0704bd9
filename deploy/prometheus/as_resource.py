"""Writes prometheusrule.yaml: alerts.yaml as a resource of the Prometheus operator. A test tells when it is outdated.

Owns the words around the rules; refuses to change a rule.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent

HEAD = """\
# Made from alerts.yaml by `python deploy/prometheus/as_resource.py`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: hybridgate
spec:
"""


def resource(alerts: str) -> str:
    """The resource's text, of that of alerts.yaml."""
    rules = alerts[alerts.index("groups:") :]
    return HEAD + "".join(f"  {line}" if line.strip() else line for line in rules.splitlines(keepends=True))


if __name__ == "__main__":
    (HERE / "prometheusrule.yaml").write_text(resource((HERE / "alerts.yaml").read_text()))
