"""What an engine says of itself, in its own format, as an `EngineLoad`: our engine's `/load`, vLLM's `/metrics`.

Owns both formats. Pure: the text is handed in, and what must be known of the reading before is a part of the reader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from gateway.snapshot import EngineLoad

VERSION = 1

_LABEL = re.compile(r'(\w+)="([^"]*)"')


class Reader(Protocol):
    """Reads one engine's answers, in the order in which they come."""

    path: str  # where to ask, from the root of the engine's address

    def read(self, body: bytes) -> EngineLoad:
        """Raises ValueError where it is not what this reader knows."""


class LoadReader:
    """Our engine's `/load` (local_engine/server.py)."""

    path = "/load"

    def read(self, body: bytes) -> EngineLoad:
        told = orjson.loads(body)
        if not isinstance(told, dict) or told.get("version") != VERSION:
            raise ValueError(f"the engine's /load has another version than {VERSION}")
        names = ("waiting", "running", "queued_prefill_tokens", "free_blocks", "total_blocks", "block_size")
        counts: dict[str, Any] = {name: told.get(name) for name in names}
        if not all(type(count) is int and count >= 0 for count in counts.values()) or not counts["block_size"]:
            raise ValueError("the engine's /load lacks a count")
        step_ms = _positive(told.get("step_ms"))
        places, size = told.get("max_running"), told.get("max_batch_tokens")
        return EngineLoad(
            **counts,
            prefill_tokens_per_s=_positive(told.get("prefill_tokens_per_second")),
            decode_tokens_per_s=_positive(told.get("decode_tokens_per_second")),
            step_s=None if step_ms is None else step_ms / 1000,
            max_running=places if type(places) is int and places > 0 else None,
            max_batch_tokens=size if type(size) is int and size > 0 else None,
        )


def _positive(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


class VllmReader:
    """vLLM's `/metrics`, of its V1 engine (names as in vllm/v1/metrics/loggers.py; older ones where they differ).

    Several engines behind one address are taken together. It counts what waits and runs and the share of the KV cache
    in use. Rates come from what its totals grew by between two readings, so that there are none before the second one,
    and the last ones stay while nothing grows: prompt tokens a second of prefill time, and the time between two tokens,
    of which each running sequence gets one a step. It does not say how many tokens wait: each waiting request is taken
    to be as long as prompts are in the mean.
    """

    path = "/metrics"

    def __init__(self) -> None:
        self._before: Mapping[str, float] = {}
        self._at: float | None = None
        self._prefill: float | None = None
        self._decode: float | None = None
        self._step: float | None = None

    def read(self, body: bytes) -> EngineLoad:
        metrics = _Metrics.of(body.decode("utf-8", "replace"))
        values, cache = metrics.values, metrics.cache
        running, waiting = values.get("vllm:num_requests_running"), values.get("vllm:num_requests_waiting")
        used = values.get("vllm:kv_cache_usage_perc", values.get("vllm:gpu_cache_usage_perc"))
        if running is None or waiting is None or used is None:
            raise ValueError("the address answers with no metrics of vLLM")
        self._rates(values)
        block_size = int(cache.get("block_size", "")) if cache.get("block_size", "").isdigit() else 16
        blocks = int(cache.get("num_gpu_blocks", "")) if cache.get("num_gpu_blocks", "").isdigit() else 0
        blocks, used = blocks * metrics.engines, used / metrics.engines
        mean_prompt = _ratio(values, "vllm:request_prompt_tokens_sum", "vllm:request_prompt_tokens_count") or 0.0
        return EngineLoad(
            waiting=int(waiting),
            running=int(running),
            queued_prefill_tokens=round(waiting * mean_prompt),
            free_blocks=round(blocks * (1 - used)),
            total_blocks=blocks,
            block_size=block_size,
            prefill_tokens_per_s=self._prefill,
            decode_tokens_per_s=self._decode,
            step_s=self._step,
        )

    def _rates(self, values: Mapping[str, float]) -> None:
        grown = {name: value - self._before.get(name, value) for name, value in values.items()}
        self._before = values
        prefill = _ratio(grown, "vllm:request_prompt_tokens_sum", "vllm:request_prefill_time_seconds_sum")
        self._prefill = prefill or self._prefill
        step = _ratio(grown, "vllm:inter_token_latency_seconds_sum", "vllm:inter_token_latency_seconds_count")
        if step is None:
            step = _ratio(grown, "vllm:time_per_output_token_seconds_sum", "vllm:time_per_output_token_seconds_count")
        self._step = step or self._step
        running = values["vllm:num_requests_running"]
        if self._step is not None and running >= 1:  # every running sequence gets a token a step
            self._decode = running / self._step


def _ratio(values: Mapping[str, float], over: str, under: str) -> float | None:
    top, bottom = values.get(over, 0.0), values.get(under, 0.0)
    return top / bottom if top > 0 and bottom > 0 else None


@dataclass(slots=True)
class _Metrics:
    """Samples of Prometheus' text format by name, those of one name (an engine each) added up; and the labels of the
    cache's configuration."""

    values: dict[str, float] = field(default_factory=dict)
    cache: dict[str, str] = field(default_factory=dict)
    engines: int = 0

    @classmethod
    def of(cls, text: str) -> _Metrics:
        """A line that is no sample of vLLM is passed over."""
        metrics = cls()
        for line in text.splitlines():
            if line.startswith("vllm:"):
                metrics._add(line)
        return metrics

    def _add(self, line: str) -> None:
        name, brace, rest = line.partition("{")
        labels, _, number = rest.rpartition("}") if brace else ("", "", "")
        if not brace:
            name, _, number = line.partition(" ")
        if name.endswith("_bucket"):
            return
        try:
            value = float(number.split()[0])
        except (ValueError, IndexError):
            return
        self.values[name] = self.values.get(name, 0.0) + value
        self.engines += name == "vllm:num_requests_running"
        if name == "vllm:cache_config_info":
            self.cache = dict(_LABEL.findall(labels))
