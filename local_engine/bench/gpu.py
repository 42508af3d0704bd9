"""Owns `hybridgate-engine bench --gpu`: all figures of one device in one process, and whether they meet their goals;
refuses HTTP.

For each shape: decoding as a share of what the device's memory could give and first tokens, in every quantization; then
tokens a second of many requests at once, beside transformers' own continuous batching over the same files.
"""

from __future__ import annotations

import asyncio
import gc
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from local_engine.bench.roofline import BATCHES, CONTEXT, REPEATS, Roofline, copy_bandwidth, measure, table
from local_engine.bench.shapes import SHAPES, Shape, write
from local_engine.config import BLOCK_SIZE, Settings
from local_engine.engine import Engine, Job, Model
from local_engine.loading import load
from local_engine.memory import inspect
from local_engine.output import Output
from local_engine.sequence import SamplingParams

QUANTIZATIONS = ("bf16", "int8", "int4")
MEASURED_SHAPES = (SHAPES["llama-2-7b"], SHAPES["mistral-7b"])
CACHE_TOKENS = BATCHES[-1] * (CONTEXT + 2 * BLOCK_SIZE)
"""Room for the largest batch, and no more: a second model has to fit beside what is kept."""

BATCH_TOKENS = 1024
"""Of a step: a prompt of 1,000 tokens, and one of 512 beside 8 that decode, are computed at once."""

RATIO_GOAL = 3.0
REALTIME_GOAL = 0.050
"""Seconds to the first token of 512 prompt tokens beside 8 sequences that decode."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """Requests at once, each of so many prompt and new tokens; how often a step is timed."""

    requests: int = 64
    prompt_tokens: int = 128
    new_tokens: int = 128
    repeats: int = REPEATS


Peer = Callable[[Path, Sequence[Sequence[int]], Plan, torch.device], float]
"""Tokens a second of another program over a model's files."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second of all requests together; `problem` says why there is no peer's."""

    ours: float
    peer: float | None
    problem: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
        return None if self.peer is None else self.ours / self.peer


@dataclass(slots=True)
class ShapeFound:
    """What was measured of one shape. `loaded`: what each quantization's engine said of itself."""

    shape: str
    rooflines: list[Roofline] = field(default_factory=list)
    loaded: dict[str, str] = field(default_factory=dict)
    rates: Rates | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """All of a run. `bandwidth`: bytes a second of a copy, read and written."""

    device: str
    bandwidth: float
    plan: Plan
    shapes: list[ShapeFound]


def run(device: torch.device, work: Path, say: Say, shapes: Sequence[Shape], plan: Plan, peer: Peer) -> Found:
    """Measure everything, on a device that nobody else uses. Raises LoadError."""
    bandwidth = copy_bandwidth(device, repeats=plan.repeats)
    say(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    found = Found(_name(device), bandwidth, plan, [])
    for shape in shapes:
        source = source_of(shape, work, say, device)
        measured = rooflines(shape, source, device, bandwidth, say, plan.repeats)
        say(f"{shape.name}: {plan.requests} requests at once")
        settings = _settings(source, "bf16")
        prompts = _prompts(shape, plan)
        ours = our_rate(partial(load, settings), prompts, plan)
        _release(device)
        say(f"{shape.name}: the same by transformers' continuous batching")
        measured.rates = beside(ours, partial(peer, source, prompts, plan, device))
        _release(device)
        found.shapes.append(measured)
    return found


def _settings(source: Path, quantization: str) -> Settings:
    return Settings(
        model=str(source), quantization=quantization, kv_cache_tokens=CACHE_TOKENS, max_batch_tokens=BATCH_TOKENS
    )


def source_of(shape: Shape, work: Path, say: Say, device: torch.device) -> Path:
    """The shape's files in bfloat16, made on the device."""
    return write(shape, work / "models" / f"{shape.name}-bf16", say, torch.bfloat16, device)


def rooflines(
    shape: Shape, source: Path, device: torch.device, bandwidth: float, say: Say, repeats: int = REPEATS
) -> ShapeFound:
    """Decoding and first tokens in every quantization. Raises LoadError."""
    found = ShapeFound(shape.name)
    embedding = shape.vocabulary * shape.hidden * torch.bfloat16.itemsize
    for quantization in QUANTIZATIONS:
        say(f"{shape.name}: measuring {quantization}")
        settings = _settings(source, quantization)
        model = load(settings)
        found.loaded[quantization] = model.description
        found.rooflines.append(measure(model, inspect(settings), quantization, embedding, device, bandwidth, repeats))
        del model
        _release(device)
    return found


def our_rate(load: Callable[[], Model], prompts: Sequence[Sequence[int]], plan: Plan) -> float:
    """Tokens a second, all requests added at once, without HTTP. Raises what loading raises."""
    params = SamplingParams(max_tokens=plan.new_tokens, temperature=0.0, ignore_eos=True)

    async def together() -> float:
        changed = asyncio.Event()
        engine = Engine(load, on_change=changed.set)
        engine.start()
        await changed.wait()
        try:
            # The first round is for what is made once. Other prompts then: the first ones' prefixes are cached.
            for number, texts in enumerate(([text[::-1] for text in prompts], prompts)):
                began = time.perf_counter()
                outputs = [engine.add(Job(f"{number}-{i}", tuple(text), params)) for i, text in enumerate(texts)]
                await asyncio.gather(*(_drained(output) for output in outputs))
            return len(prompts) * plan.new_tokens / (time.perf_counter() - began)
        finally:
            engine.stop()

    return asyncio.run(together())


async def _drained(output: Output) -> None:
    async for _ in output:
        pass


def peer_rate(source: Path, prompts: Sequence[Sequence[int]], plan: Plan, device: torch.device) -> float:
    """Tokens a second of transformers' continuous batching, as it chooses to run here."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).to(device).eval()
    config = GenerationConfig(max_new_tokens=plan.new_tokens, do_sample=False, eos_token_id=0, pad_token_id=0)
    made, seconds = 0, 0.0
    for texts in ([list(text[::-1]) for text in prompts], [list(text) for text in prompts]):
        began = time.perf_counter()
        answers = model.generate_batch(inputs=texts, generation_config=config, persistent_manager=True)
        seconds = time.perf_counter() - began
        made += sum(len(answer.generated_tokens) for answer in answers.values())
    # What it keeps for a next time would be missing to the next shape.
    model.destroy_cached_continuous_batching_manager()
    if made != 2 * len(prompts) * plan.new_tokens:
        raise RuntimeError(f"{made} tokens in two rounds instead of {2 * len(prompts) * plan.new_tokens}")
    return made / 2 / seconds


def beside(ours: float, peer: Callable[[], float]) -> Rates:
    """Both rates; a peer that does not run is named with the reason."""
    try:
        return Rates(ours, peer())
    except Exception as error:  # noqa: BLE001 - another program's failure is a line of the table
        first = (str(error).strip().splitlines() or [""])[0]
        return Rates(ours, None, f"{type(error).__name__}: {first}")


def _prompts(shape: Shape, plan: Plan) -> list[list[int]]:
    chance = random.Random(5)  # noqa: S311 - the same prompts each time
    return [chance.choices(range(4, shape.vocabulary), k=plan.prompt_tokens) for _ in range(plan.requests)]


def _release(device: torch.device) -> None:
    """Give a model's memory back before the next one asks how much is free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _name(device: torch.device) -> str:
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{kind}, torch {torch.__version__}, transformers {transformers.__version__}"


def markdown(found: Found) -> str:
    """The tables, their goals and their conditions."""
    parts = []
    for one in found.shapes:
        parts.append(table(one.shape, found.bandwidth, one.rooflines))
        parts.append("\n".join(_judged(one, found.plan)))
        parts.append("\n".join(f"- {name}: {said}" for name, said in one.loaded.items()))
    plan = found.plan
    parts.append(
        f"{found.device}. Random weights, greedy; {CONTEXT} tokens of context a sequence; steps of up to "
        f"{BATCH_TOKENS} tokens; {plan.requests} requests of "
        f"{plan.prompt_tokens} prompt and {plan.new_tokens} new tokens."
    )
    return "\n\n".join(parts)


def _judged(one: ShapeFound, plan: Plan) -> list[str]:
    lines = []
    for roofline in one.rooflines:
        if roofline.quantization == "bf16":
            met = "met" if roofline.realtime <= REALTIME_GOAL else "missed"
            lines.append(
                f"First token of 512 beside 8, bf16: {roofline.realtime * 1000:.0f} ms "
                f"(goal: at most {REALTIME_GOAL * 1000:.0f} ms, {met})."
            )
    if one.rates is not None:
        beside = f"transformers' continuous batching did not run: {one.rates.problem}"
        if one.rates.ratio is not None:
            met = "met" if one.rates.ratio >= RATIO_GOAL else "missed"
            beside = (
                f"transformers' continuous batching {one.rates.peer:.0f} tok/s: {one.rates.ratio:.2f} × "
                f"(goal: {RATIO_GOAL:.0f} ×, {met})"
            )
        lines.append(f"{plan.requests} requests at once, bf16: {one.rates.ours:.0f} tok/s; {beside}.")
    return lines


def document(found: Found) -> bytes:
    """All that was measured, as JSON."""
    return orjson.dumps(asdict(found), option=orjson.OPT_INDENT_2)
