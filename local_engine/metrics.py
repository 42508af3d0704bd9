"""Owns what /metrics says of the engine: every name, type and meaning, and the text; refuses to count anything itself.

The counts are kept by the engine's thread where they arise (a few additions a step); a scrape reads one consistent
report of them. While the model loads there is only `hybridgate_engine_ready`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from local_engine.engine import Engine
from local_engine.pace import STEP_BUCKETS
from local_engine.report import Report, State

CONTENT_TYPE = CONTENT_TYPE_LATEST


@dataclass(frozen=True, slots=True)
class Described:
    """One metric without labels, by the name that Prometheus stores."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str


READY = Described("hybridgate_engine_ready", "gauge", "1 while the engine takes requests.")
RUNNING = Described("hybridgate_engine_running_sequences", "gauge", "Sequences that generate or are being prefilled.")
MAX_RUNNING = Described("hybridgate_engine_max_running_sequences", "gauge", "Sequences that may run at once.")
WAITING = Described("hybridgate_engine_waiting_sequences", "gauge", "Sequences that have not begun.")
QUEUED = Described("hybridgate_engine_queued_prefill_tokens", "gauge", "Prompt tokens that are still to be computed.")
KV_BLOCKS = Described("hybridgate_engine_kv_blocks", "gauge", "Blocks of the KV cache.")
KV_FREE = Described(
    "hybridgate_engine_kv_free_blocks", "gauge", "Blocks that no sequence holds, those kept for their prefix included."
)
STEP = Described("hybridgate_engine_step_seconds", "histogram", "Time of a step: guessing, forward and sampling.")
BATCH = Described(
    "hybridgate_engine_batch_sequences_total",
    "counter",
    "Sequences in all steps; over the number of steps, the mean batch size.",
)
PREFILLED = Described("hybridgate_engine_prefill_tokens_total", "counter", "Prompt tokens computed.")
DECODED = Described("hybridgate_engine_decode_tokens_total", "counter", "Tokens that decoding sequences got.")
PREFIX_ASKED = Described("hybridgate_engine_prefix_asked_tokens_total", "counter", "Prompt tokens that started.")
PREFIX_FOUND = Described(
    "hybridgate_engine_prefix_found_tokens_total", "counter", "Of these, found in the prefix cache and not computed."
)
GUESSED = Described("hybridgate_engine_guessed_tokens_total", "counter", "Tokens that speculation computed ahead.")
ACCEPTED = Described(
    "hybridgate_engine_accepted_tokens_total", "counter", "Of these, that turned out to be the answer's tokens."
)
FINISHED = Described("hybridgate_engine_finished_total", "counter", "Sequences that ended by themselves.")
ABORTED = Described("hybridgate_engine_aborted_total", "counter", "Sequences whose client left, or that were cut.")
PREEMPTED = Described("hybridgate_engine_preempted_total", "counter", "Times that a sequence gave its blocks up.")
SHRUNK = Described("hybridgate_engine_out_of_memory_total", "counter", "Steps that ran out of memory.")

METRICS = (
    READY,
    RUNNING,
    MAX_RUNNING,
    WAITING,
    QUEUED,
    KV_BLOCKS,
    KV_FREE,
    STEP,
    BATCH,
    PREFILLED,
    DECODED,
    PREFIX_ASKED,
    PREFIX_FOUND,
    GUESSED,
    ACCEPTED,
    FINISHED,
    ABORTED,
    PREEMPTED,
    SHRUNK,
)


def table() -> str:
    """The metrics as a Markdown table."""
    rows = [f"| `{m.name}` | {m.kind} | {m.help} |" for m in METRICS]
    return "\n".join(["| metric | type | meaning |", "|---|---|---|", *rows])


class EngineMetrics:
    """A scrape of one engine, its process included."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._registry.register(_Report(engine))

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self._registry)


class _Report(Collector):
    """The engine's report as metrics."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        state = self._engine.state
        yield GaugeMetricFamily(READY.name, READY.help, value=float(state is State.READY))
        if state in (State.READY, State.STOPPING) and self._engine.loaded:
            report = self._engine.report()
            for described, value in _values(report, self._engine.model.limits.max_running):
                kind = GaugeMetricFamily if described.kind == "gauge" else CounterMetricFamily
                yield kind(described.name.removesuffix("_total"), described.help, value=float(value))
            yield _steps(report)


def _values(report: Report, max_running: int) -> list[tuple[Described, int]]:
    load, totals = report.load, report.totals
    return [
        (RUNNING, load.running),
        (MAX_RUNNING, max_running),
        (WAITING, load.waiting),
        (QUEUED, load.queued_prefill_tokens),
        (KV_BLOCKS, load.total_blocks),
        (KV_FREE, load.free_blocks),
        (BATCH, totals.batch_sequences),
        (PREFILLED, totals.prefill_tokens),
        (DECODED, totals.decode_tokens),
        (PREFIX_ASKED, report.prefix_asked),
        (PREFIX_FOUND, report.prefix_found),
        (GUESSED, report.guessed),
        (ACCEPTED, report.accepted),
        (FINISHED, totals.finished),
        (ABORTED, totals.aborted),
        (PREEMPTED, report.preempted),
        (SHRUNK, report.shrunk),
    ]


def _steps(report: Report) -> Metric:
    times = report.step_times
    sums = [float(count) for count in accumulate(times.counts)]
    bounds = [*map(str, STEP_BUCKETS), "+Inf"]
    return HistogramMetricFamily(
        STEP.name, STEP.help, buckets=list(zip(bounds, sums, strict=True)), sum_value=times.total
    )
