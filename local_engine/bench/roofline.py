"""Owns how near decoding comes to what a device's memory could give: bytes that a step has to read, over the measured
copy bandwidth, over the measured time; refuses HTTP.

Every decoding step reads all weights but the embedding once, whatever the batch, and each sequence's keys and values.
What takes longer than reading them is lost to launches, arithmetic and the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from local_engine.calibrate import Load, batch_of
from local_engine.choosing import Runner
from local_engine.config import Limits
from local_engine.engine import Model
from local_engine.memory import Inspection, Need
from local_engine.sequence import Pick, SamplingParams

CONTEXT = 512
"""Tokens that each sequence looks back at."""

BATCHES = (1, 64)
PROMPT = 1000
RUNNING, REALTIME_PROMPT = 8, 512
"""A prompt that comes while others decode: the realtime class."""

REPEATS = 20
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
GOALS = {1: 0.5, 64: 0.4}
"""Shares of the limit, in bf16."""

_GREEDY = Pick(SamplingParams(max_tokens=1, temperature=0.0), 0.0)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoding step: how many bytes it has to read, how long it took (seconds), and what share of the bandwidth
    (bytes a second) that is."""

    batch: int
    bytes: int
    seconds: float
    bandwidth: float

    @property
    def share(self) -> float:
        """Of the limit that memory sets; 1 is all of it."""
        return self.bytes / self.bandwidth / self.seconds

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.batch / self.seconds


@dataclass(frozen=True, slots=True)
class Roofline:
    """One quantization on one device. Times in seconds; `realtime` is a prompt's first token beside others."""

    quantization: str
    decoded: tuple[Decoded, ...]
    first: float
    realtime: float


def step_bytes(need: Need, embedding_bytes: int, batch: int, context: int) -> int:
    """What a decoding step has to read."""
    return need.weights - embedding_bytes + batch * context * need.kv_per_token


def copy_bandwidth(device: torch.device, size: int | None = None, repeats: int = REPEATS) -> float:
    """Bytes a second of a large copy on the device: what it reads and what it writes."""
    source = torch.randint(256, (size or COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        _synchronized(device)

    return 2 * source.numel() / _timed(copy, repeats)


def measure(
    model: Model, found: Inspection, quantization: str, embedding_bytes: int, device: torch.device, bandwidth: float
) -> Roofline:
    """Decoding at each batch that the limits allow, and first tokens. Nobody else may use the runner meanwhile."""
    need = next(one for one in found.needs if one.quantization == quantization)
    vocabulary = model.text.vocab_size
    limits = model.limits
    context = min(CONTEXT, limits.capacity - 1)
    decoded = []
    for batch in BATCHES:
        load = Load(sequences=batch, context=context)
        if batch <= limits.max_running and batch * -(-context // limits.block_size) <= limits.num_blocks:
            seconds = _step_seconds(model.runner, load, limits, vocabulary, device)
            decoded.append(Decoded(batch, step_bytes(need, embedding_bytes, batch, context), seconds, bandwidth))
    most = min(limits.max_batch_tokens, limits.capacity // 2)
    first = sum(_chunks(model.runner, min(PROMPT, limits.capacity), most, 0, limits, vocabulary, device))
    realtime = sum(
        _chunks(model.runner, min(REALTIME_PROMPT, most), most - RUNNING, RUNNING, limits, vocabulary, device)
    )
    return Roofline(quantization, tuple(decoded), first, realtime)


def _chunks(
    runner: Runner, prompt: int, most: int, running: int, limits: Limits, vocabulary: int, device: torch.device
) -> list[float]:
    """Seconds of each step until a prompt's first token, while so many others decode."""
    return [
        _step_seconds(
            runner,
            Load(sequences=running, context=64, prompt=min(most, prompt - start), start=start),
            limits,
            vocabulary,
            device,
        )
        for start in range(0, prompt, most)
    ]


def _step_seconds(runner: Runner, load: Load, limits: Limits, vocabulary: int, device: torch.device) -> float:
    batch = batch_of(load, limits, vocabulary)
    rows = list(range(load.sequences + bool(load.prompt)))

    def step() -> None:
        runner.sample(runner.forward(batch), rows, [_GREEDY] * len(rows))
        _synchronized(device)

    return _timed(step, REPEATS)


def _timed(what: Callable[[], None], repeats: int) -> float:
    """The median of so many runs, in seconds, after three that do not count."""
    times = []
    for _ in range(3 + repeats):
        began = time.perf_counter()
        what()
        times.append(time.perf_counter() - began)
    return median(times[3:])


def _synchronized(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(shape: str, bandwidth: float, found: Sequence[Roofline]) -> str:
    """In Markdown, with the goals where there are any."""
    lines = [
        f"{shape}; copy bandwidth {bandwidth / 1e9:.0f} GB/s",
        "",
        "| | batch | ms a step | tok/s | share of the limit | goal | first token, 1000 | first token, 512 beside 8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        for step in one.decoded:
            goal = GOALS.get(step.batch) if one.quantization == "bf16" else None
            wanted = "" if goal is None else f"{goal:.0%}: {'met' if step.share >= goal else 'missed'}"
            lines.append(
                f"| {one.quantization} | {step.batch} | {step.seconds * 1000:.2f} | {step.rate:.0f} | {step.share:.0%} "
                f"| {wanted} | {one.first * 1000:.0f} ms | {one.realtime * 1000:.0f} ms |"
            )
    return "\n".join(lines)
