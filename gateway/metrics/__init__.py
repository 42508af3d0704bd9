"""What is counted, and how Prometheus is told.

`described` has the names, `sums` what requests add up to, `figures` what is asked at each scrape.
"""

from gateway.metrics.described import METRICS, WORKER_RESTARTS, WORKER_UP, Described, table
from gateway.metrics.figures import BUCKETS, DeploymentFigures, KeyFigures, PolicyFigures, StoreFigures, UsageFigures
from gateway.metrics.sums import MOST_ROWS, MOST_TENANTS, OTHER, Metrics

__all__ = [
    "BUCKETS",
    "METRICS",
    "MOST_ROWS",
    "MOST_TENANTS",
    "OTHER",
    "WORKER_RESTARTS",
    "WORKER_UP",
    "DeploymentFigures",
    "Described",
    "KeyFigures",
    "Metrics",
    "PolicyFigures",
    "StoreFigures",
    "UsageFigures",
    "table",
]
