"""Owns one run of `hybridgate-engine bench`: prepare, measure, write down; refuses flags and exit statuses."""

from __future__ import annotations

import gc
import os
import platform
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
import torch
import transformers

from local_engine.bench import gguf, peers, report, rounds, steps
from local_engine.bench.program import BenchError, Launch, Program, free_port, running
from local_engine.bench.roofline import Roofline, copy_bandwidth, measure, table
from local_engine.bench.rounds import Plan, Prefix, Run
from local_engine.bench.shapes import SHAPES, Shape, write
from local_engine.config import Settings
from local_engine.errors import LoadError
from local_engine.loading import load
from local_engine.memory import inspect

Say = Callable[[str], None]
PEERS = ("transformers", "llama.cpp")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
QUANTIZATIONS = ("bf16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure. `work` holds the peers' environments, models and logs; with `shared`, `transformers` is the one
    of the environment that runs this, for machines that reach no package index."""

    shape: Shape
    precisions: tuple[str, ...]
    peers: tuple[str, ...]
    plan: Plan
    work: Path
    device: str = "cpu"
    shared: bool = False


@dataclass(slots=True)
class Found:
    """What was measured. `missing` says for each peer that was left out why."""

    runs: list[Run] = field(default_factory=list)
    prefixes: list[Prefix] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    rss: dict[str, float] = field(default_factory=dict)
    overhead: float | None = None
    conditions: str = ""
    gpu: bool = False


def prepared(wanted: Wanted, say: Say) -> tuple[dict[str, Path], dict[str, str]]:
    """The peers' programs, installed where they are not; and for each that cannot be had, why."""
    programs: dict[str, Path] = {}
    missing: dict[str, str] = {}
    installs = {"transformers": peers.install_transformers, "llama.cpp": peers.install_llama}
    for name in wanted.peers:
        if wanted.shared and name == "transformers":
            programs[name] = Path(sys.executable).parent / "transformers"
            continue
        try:
            programs[name] = installs[name](wanted.work, say)
        except (BenchError, OSError) as error:
            missing[name] = str(error)
            say(f"{name} is left out: {error}")
    return programs, missing


def compared(wanted: Wanted, say: Say) -> Found:
    """This engine beside the peers, over HTTP, then its own part of a step. Raises BenchError where this engine does
    not run."""
    programs, missing = prepared(wanted, say)
    gpu = wanted.device != "cpu"
    source = _written(wanted, torch.bfloat16 if gpu else torch.float32, say)
    found = Found(missing=missing, gpu=gpu)
    # On a GPU a server's threads wait for it beside each other: one core would measure how they take turns.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") and not gpu else []
    before = peers.neighbours()
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[-1]})
    try:
        for precision in wanted.precisions:
            _precision(wanted, precision, source, programs, cores, found, say)
    finally:
        if len(cores) > 1:
            os.sched_setaffinity(0, set(cores))
    found.conditions = _conditions(wanted, cores, before)
    if gpu:  # forwards there take the time of launching them, of which this would be a share
        return found
    say("measuring the engine's own part of a step")
    most = max(wanted.plan.streams)
    dtype = "float32" if wanted.precisions[0] == "fp32" else "bfloat16"
    settings = Settings(model=str(source), dtype=dtype, max_running=most, kv_cache_tokens=peers.CACHE_TOKENS)
    found.overhead = steps.overhead(
        lambda: load(settings), most, prompt_tokens=wanted.plan.prompt_tokens, new_tokens=wanted.plan.new_tokens
    )
    return found


def _written(wanted: Wanted, dtype: torch.dtype, say: Say) -> Path:
    """The model's files."""
    half = "" if dtype is torch.float32 else "-bf16"
    return write(wanted.shape, wanted.work / "models" / f"{wanted.shape.name}{half}", say, dtype)


def _precision(
    wanted: Wanted,
    precision: str,
    source: Path,
    programs: dict[str, Path],
    cores: list[int],
    found: Found,
    say: Say,
) -> None:
    launches = [peers.ours(source, precision, free_port())]
    if "transformers" in programs:
        launches.append(peers.transformers(programs["transformers"], source, precision, free_port(), wanted.device))
    if "llama.cpp" in programs:
        target = wanted.work / "models" / f"{wanted.shape.name}-{precision}.gguf"
        file = gguf.write(wanted.shape, source, target, PRECISIONS[precision])
        launches.append(peers.llama(programs["llama.cpp"], file, free_port()))
    core = cores[0] if len(cores) > 1 else None
    with ExitStack() as stack:
        up: list[Program] = []
        for launch in launches:
            say(f"starting {launch.name}, {precision}")
            try:
                up.append(stack.enter_context(running(launch, 1, core, _log(wanted, launch, precision))))
            except BenchError as error:
                if launch is launches[0]:
                    raise
                found.missing[f"{launch.name}, {precision}"] = str(error)
                say(f"{launch.name} is left out: {error}")
        measured = rounds.measure(up, wanted.plan, precision, wanted.shape.vocabulary, say)
        found.rss |= {f"{program.launch.name}, {precision}": program.rss_mb() for program in up}
    found.runs += measured.runs
    found.prefixes += measured.prefixes
    found.missing |= {f"{name}, {precision}": reason for name, reason in measured.failed.items()}


def _log(wanted: Wanted, launch: Launch, precision: str) -> Path:
    return wanted.work / "log" / f"{launch.name}-{precision}.log"


def _conditions(wanted: Wanted, cores: list[int], before: str) -> str:
    info = Path("/proc/cpuinfo")
    named = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    cpu = named[0].partition(":")[2].strip() if named else platform.machine()
    wide = "with" if _multiplies_16_bits() else "without"
    plan = wanted.plan
    if wanted.device == "cpu":
        place = (
            f"Each server on one core and one thread, the load on another. {len(cores)} × {cpu}, {wide} 16-bit "
            "multiplication"
        )
    else:
        place = f"{torch.cuda.get_device_name(wanted.device)}; {os.cpu_count()} × {cpu}, of which a server uses any"
    return (
        f"Shape {wanted.shape.name}, random weights; {plan.prompt_tokens} prompt tokens, {plan.new_tokens} new ones, "
        f"greedy; {plan.rounds} rounds, all servers in each. {place}; Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; load average before {before}, after "
        f"{peers.neighbours()}."
    )


def _multiplies_16_bits() -> bool:
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set[str]()
    return bool(words & {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})


def document(found: Found) -> bytes:
    """All that was measured, as JSON."""
    plain: dict[str, Any] = asdict(found)
    return orjson.dumps(plain, option=orjson.OPT_INDENT_2)


def markdown(found: Found) -> str:
    """The tables and their conditions."""
    parts = [report.speeds(found.runs, gpu=found.gpu)]
    if found.prefixes:
        parts.append(report.prefixes(found.prefixes, gpu=found.gpu))
    if found.overhead is not None and found.runs:
        parts.append(report.overhead(found.overhead, max(run.streams for run in found.runs)))
    if told := report.sameness(found.runs):
        parts.append(told)
    if found.rss:
        memory = ", ".join(f"{name} {value:.0f}" for name, value in found.rss.items())
        parts.append(f"Resident memory, MiB: {memory}.")
    parts += [f"Left out: {name}: {reason}" for name, reason in found.missing.items()]
    parts.append(found.conditions)
    return "\n\n".join(part for part in parts if part)


def rooflines(wanted: Wanted, say: Say) -> str:
    """Decoding of this shape on the device as a share of what its memory could give, in every quantization, as a table
    in Markdown. Raises LoadError."""
    device = torch.device(wanted.device)
    dtype = torch.bfloat16
    source = _written(wanted, dtype, say)
    bandwidth = copy_bandwidth(device)
    say(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    embedding = wanted.shape.vocabulary * wanted.shape.hidden * dtype.itemsize
    found: list[Roofline] = []
    for quantization in QUANTIZATIONS:
        say(f"measuring {quantization}")
        settings = Settings(model=str(source), quantization=quantization)
        try:
            found.append(measure(load(settings), inspect(settings), quantization, embedding, device, bandwidth))
        except LoadError as error:
            if quantization == QUANTIZATIONS[0]:
                raise
            say(f"{quantization} is left out: {error}")
        gc.collect()  # what was loaded: the next one's cache takes what is free
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return table(wanted.shape.name, bandwidth, found)


def wanted_of(
    shape: str, precisions: str, names: str, plan: Plan, work: Path, device: str, *, shared: bool = False
) -> Wanted:
    """From the flags' words. Raises BenchError naming what is not known."""
    chosen = tuple(name for name in names.split(",") if name and name != "none")
    kinds = tuple(precisions.split(","))
    for given, known, flag in (((shape,), SHAPES, "--shape"), (kinds, PRECISIONS, "--precisions")):
        if unknown := [one for one in given if one not in known]:
            raise BenchError(f"{flag}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    if unknown := [name for name in chosen if name not in PEERS]:
        raise BenchError(f"--peers: unknown {', '.join(unknown)}; known: {', '.join(PEERS)}, none")
    return Wanted(SHAPES[shape], kinds, chosen, plan, work, device, shared)
