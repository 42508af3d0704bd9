"""What a step of an engine costs, and what an engine holds: the numbers that `hybridgate-engine calibrate` measures.

Owns the model `seconds of a step = fixed + per prompt token + per decoding sequence + per cached token looked back at`
and where its numbers come from: a calibration, or the catalog's roofline. Refuses time: what happens in which step is
the engine's (engine.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import orjson

from gateway.roofline import Roofline
from gateway.simulate.trace import TraceError

CALIBRATION_VERSION = 1


@dataclass(frozen=True, slots=True)
class EngineModel:
    """A step with `q` prompt tokens, `n` decoding sequences and `k` cached tokens that they look back at takes
    `fixed_s + q * per_prompt_token_s + n * per_sequence_s + k * per_cached_token_s` seconds. The rest is the engine's
    limits, as local_engine/config.py has them."""

    fixed_s: float
    per_prompt_token_s: float
    per_sequence_s: float
    per_cached_token_s: float
    num_blocks: int
    block_size: int = 16
    max_batch_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 256
    max_waiting_tokens: int = 65_536
    window: int = 8192
    source: str = ""

    def step_s(self, prompt_tokens: int, sequences: int, cached_tokens: float) -> float:
        """Seconds of one step."""
        return (
            self.fixed_s
            + prompt_tokens * self.per_prompt_token_s
            + sequences * self.per_sequence_s
            + cached_tokens * self.per_cached_token_s
        )

    @property
    def capacity(self) -> int:
        """Tokens that one sequence may reach."""
        return min(self.window, self.num_blocks * self.block_size)

    def least_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """Engine-seconds that a request takes at least: what its tokens add to the steps that they are in, and a share
        of the steps' fixed part as if each were full."""
        decoded = max(0.0, output_tokens - 1)
        looked_back = decoded * (prompt_tokens + output_tokens / 2)
        return (
            prompt_tokens * self.per_prompt_token_s
            + decoded * self.per_sequence_s
            + looked_back * self.per_cached_token_s
            + self.fixed_s * (prompt_tokens + decoded) / self.max_batch_tokens
        )

    def slowed(self, factor: float) -> EngineModel:
        """An engine on which every step takes `factor` times as long."""
        return replace(
            self,
            fixed_s=self.fixed_s * factor,
            per_prompt_token_s=self.per_prompt_token_s * factor,
            per_sequence_s=self.per_sequence_s * factor,
            per_cached_token_s=self.per_cached_token_s * factor,
            source=f"{self.source}, every step {factor:.3g} times as long",
        )


def of_roofline(plan: Roofline, *, max_batch_tokens: int = 2048, max_running: int = 256) -> EngineModel:
    """What the catalog expects of a model on a device. The roofline's step is the larger of compute and memory traffic;
    this one is a sum, made to agree with it for a lone sequence without cache and for a full prompt chunk alone.

    Raises TraceError where the model does not fit.
    """
    if not plan.fits:
        raise TraceError(
            f"{plan.model.name} does not fit on {plan.count} x {plan.hardware.name} as {plan.quantization}"
        )
    fixed = plan.step_s(1, 0)
    chunk = plan.step_s(0, 0, max_batch_tokens, max_batch_tokens / 2)
    full = plan.step_s(max_running, 0)
    cached = 1024 * max_running
    return EngineModel(
        fixed_s=fixed,
        per_prompt_token_s=max(0.0, chunk - fixed) / max_batch_tokens,
        per_sequence_s=max(0.0, full - fixed) / max_running,
        per_cached_token_s=(plan.step_s(max_running, cached) - full) / cached,
        num_blocks=plan.kv_capacity_tokens // 16,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        max_waiting_tokens=max(65_536, plan.model.window),
        window=plan.model.window,
        source=f"the catalog's {plan.model.name}, {plan.quantization}, on {plan.count} x {plan.hardware.name}",
    )


_LIMITS = (
    "num_blocks",
    "block_size",
    "max_batch_tokens",
    "max_running",
    "max_waiting",
    "max_waiting_tokens",
    "window",
)
_TIMES = ("fixed_s", "per_prompt_token_s", "per_sequence_s", "per_cached_token_s")


def of_calibration(name: str, text: str) -> EngineModel:
    """What `hybridgate-engine calibrate` wrote. Raises TraceError, naming what is missing."""
    try:
        told = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise TraceError(f"{name}: is not JSON; write it with `hybridgate-engine calibrate --out {name}`") from None
    if not isinstance(told, dict) or told.get("version") != CALIBRATION_VERSION:
        raise TraceError(f'{name}: is no calibration ("version": 1); write it with `hybridgate-engine calibrate`')
    step, limits = told.get("step"), told.get("limits")
    if not isinstance(step, dict) or not isinstance(limits, dict):
        raise TraceError(f'{name}: "step" and "limits" must be objects')
    times = {key: _number(name, f"step.{key}", step.get(key), 0.0) for key in _TIMES}
    counts = {key: int(_number(name, f"limits.{key}", limits.get(key), 1.0)) for key in _LIMITS}
    if not times["fixed_s"] > 0:
        raise TraceError(f'{name}: "step.fixed_s" is 0, and no step takes no time: calibrate again')
    model = told.get("model")
    return EngineModel(**times, **counts, source=f"{name} ({model})" if isinstance(model, str) else name)  # type: ignore[arg-type]


def _number(name: str, key: str, value: Any, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (isfinite(value) and value >= least):
        raise TraceError(f'{name}: "{key}" must be a number of at least {least:g}')
    return float(value)
