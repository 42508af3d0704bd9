"""Owns what the engine says of itself: what it can do now, how busy and fast it is; refuses to find out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from local_engine.pace import StepTimes
from local_engine.scheduler import Load


class State(Enum):
    """What the engine can do now."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPING = "stopping"


@dataclass(slots=True)
class Totals:
    """Counts since the start."""

    steps: int = 0
    finished: int = 0
    aborted: int = 0
    batch_sequences: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """One consistent look at the scheduler: counts, tokens a second, seconds (None where nothing was measured).

    `guessed` tokens were computed ahead, of which `accepted` were right; `acceptance`: the share of the last ones.
    """

    load: Load
    prefill_rate: float | None
    decode_rate: float | None
    step_seconds: float | None
    preempted: int
    prefix_asked: int
    prefix_found: int
    shrunk: int
    guessed: int
    accepted: int
    acceptance: float | None
    totals: Totals
    step_times: StepTimes
