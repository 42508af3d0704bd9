"""Calibration: the numbers of an engine whose numbers are known, and a run on a real one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.simulate.step import of_calibration
from local_engine.batch import Batch
from local_engine.calibrate import Load, Measured, Step, batch_of, document, fit, grid, measured
from local_engine.cli import app
from local_engine.config import Limits
from local_engine.sequence import Pick

LIMITS = Limits(num_blocks=256, window=1024, max_batch_tokens=256, max_running=32)
KNOWN = Step(0.004, 0.0001, 0.0003, 0.000001)


class KnownRunner:
    """Takes exactly as long as its numbers say, on a clock of its own."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def forward(self, batch: Batch) -> int:
        looked_back = sum(chunk.start + 1 for chunk in batch.decode) + sum(chunk.start for chunk in batch.prefill)
        self.now += self.step.fixed_s + batch.prefill_tokens * self.step.per_prompt_token_s
        self.now += len(batch.decode) * self.step.per_sequence_s + looked_back * self.step.per_cached_token_s
        return sum(1 for _ in batch)

    def sample(self, logits: int, rows: Sequence[int], picks: Sequence[Pick]) -> list[int | None]:
        assert logits == len(rows) == len(picks)
        return [1] * len(rows)


def test_known_numbers_are_found() -> None:
    runner = KnownRunner(KNOWN)
    found = fit(measured(runner, LIMITS, 500, runner.clock, repeats=2))  # type: ignore[arg-type]
    assert found.fixed_s == pytest.approx(KNOWN.fixed_s, rel=1e-6)
    assert found.per_prompt_token_s == pytest.approx(KNOWN.per_prompt_token_s, rel=1e-6)
    assert found.per_sequence_s == pytest.approx(KNOWN.per_sequence_s, rel=1e-6)
    assert found.per_cached_token_s == pytest.approx(KNOWN.per_cached_token_s, rel=1e-6)


def test_no_number_is_below_nothing() -> None:
    """A step that gets faster with what it looks back at would be noise."""
    steps = [Measured(load, 0.01 + load.prompt * 0.001 - load.looked_back * 1e-6) for load in grid(LIMITS)]
    assert fit(steps).per_cached_token_s == 0.0
    assert fit(steps).fixed_s > 0.0


@pytest.mark.parametrize(
    "limits", [LIMITS, Limits(num_blocks=2, window=16, max_batch_tokens=8, max_running=4), Limits(4096, 8192)]
)
def test_the_grid_stays_within_the_limits_and_tells_all_numbers_apart(limits: Limits) -> None:
    loads = grid(limits)
    assert {load.prompt > 0 for load in loads} == {load.sequences > 0 for load in loads} == {True, False}
    for load in loads:
        batch = batch_of(load, limits, 100)
        blocks = [block for chunk in batch for block in chunk.blocks]
        assert len(set(blocks)) == len(blocks) and max(blocks) < limits.num_blocks
        assert all(token < 100 for chunk in batch for token in chunk.tokens)
        assert batch.prefill_tokens == load.prompt and len(batch.decode) == load.sequences


def test_a_step_by_hand() -> None:
    assert KNOWN.seconds(Load(sequences=2, context=100, prompt=50, start=10)) == pytest.approx(
        0.004 + 0.005 + 0.0006 + 210e-6
    )


def test_what_is_written_is_what_the_simulator_reads() -> None:
    steps = [Measured(load, KNOWN.seconds(load)) for load in grid(LIMITS)]
    engine = of_calibration("engine.json", json.dumps(document("demo", LIMITS, steps)))
    assert (engine.num_blocks, engine.max_running, engine.window) == (256, 32, 1024)
    assert engine.step_s(50, 2, 210) == pytest.approx(KNOWN.seconds(Load(2, 100, 50, 10)), rel=1e-6)


@pytest.mark.slow
def test_the_bundled_model_is_calibrated(tmp_path: Path) -> None:
    out = tmp_path / "engine.json"
    flags = ["calibrate", "--out", str(out), "--repeats", "1", "--max-running", "4", "--max-batch-tokens", "64"]
    ran = CliRunner().invoke(app, flags)
    assert ran.exit_code == 0, ran.output
    engine = of_calibration("engine.json", out.read_text())
    assert 1e-5 < engine.fixed_s < 1.0
    assert engine.step_s(64, 0, 0) > engine.fixed_s


def test_a_model_that_is_not_there_is_said() -> None:
    ran = CliRunner().invoke(app, ["calibrate", "--model", "./nowhere"])
    assert ran.exit_code == 1 and "nowhere is not a directory" in ran.output
