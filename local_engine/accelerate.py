"""Owns what a device is given at start to decode faster: attention in place, then fused layers, then recorded steps.
Refuses what is not right here and now.

Each is compared with the way it replaces, on this device and with this model, and left out where it fails or differs:
then the engine runs as it does without, and one line in the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from local_engine.attention import KvCache
from local_engine.batch import Batch, Chunk
from local_engine.config import Limits
from local_engine.errors import DeviceLost
from local_engine.fused import Fusions, fuse, unfuse
from local_engine.graphs import RecordedSteps, Recorder
from local_engine.paged import Attend, How, Shape, agrees
from local_engine.rows import bucket_sizes
from local_engine.runner import ModelRunner
from local_engine.selfcheck import CHECKED_TOKENS, apart, compare, paged_logits, tolerance
from local_engine.sequence import Sequence as TokenSequence

log = logging.getLogger(__name__)

SMALL_WINDOW = 40
"""Of the attention's check where the model has sliding windows: not a whole number of blocks, and between the checked
lengths, which a real window of thousands is not."""


@dataclass(frozen=True, slots=True)
class Accelerated:
    """The runner to serve with, and in a few words what of this it has."""

    runner: ModelRunner
    ways: tuple[str, ...]


def accelerated(
    model: Any,
    cache: KvCache,
    shape: Shape,
    limits: Limits,
    *,
    attend: Attend | None,
    fusions: Fusions | None,
    recorder: Callable[[], Recorder] | None,
    most_rows: int,
    say: Callable[[str], None],
) -> Accelerated:
    """The fastest runner that computes what the plain one does. Nobody may hold blocks yet.

    Raises DeviceLost where trying has broken the device, which cannot be undone.
    """
    plain = ModelRunner(model, cache)
    if attend is None or not _right(model, shape, attend):
        return Accelerated(plain, ())
    in_place = ModelRunner(model, cache, attend)
    if not _tried("attention in place", model.device, lambda: compare(model, in_place, limits) <= tolerance(model)):
        return Accelerated(plain, ())
    ways: tuple[str, ...] = ("attention in place",)
    if fusions is not None:
        ways += _fused(model, in_place, fusions, limits, tolerance(model))
    if recorder is None:
        return Accelerated(in_place, ways)
    steps = RecordedSteps(
        model,
        cache,
        attend,
        sizes=bucket_sizes(most_rows),
        longest=limits.capacity,
        block_size=limits.block_size,
    )
    fast = ModelRunner(model, cache, attend, steps)
    make = recorder

    def record() -> bool:
        steps.record(make(), say)
        return all(_same(fast, in_place, size, limits, model) for size in steps.sizes)

    if not _tried("recording steps", model.device, record):
        return Accelerated(in_place, ways)
    return Accelerated(fast, (*ways, f"steps of up to {steps.sizes[-1]} rows recorded"))


def _fused(model: Any, runner: ModelRunner, fusions: Fusions, limits: Limits, bound: float) -> tuple[str, ...]:
    """Fused layers, in a few words; the plain ones are back where they do not give what they gave."""
    count = 0

    def trial() -> bool:
        nonlocal count
        before = paged_logits(model, runner, limits)
        count = fuse(model, fusions)
        return apart(paged_logits(model, runner, limits), before) <= bound

    if _tried("fusing layers", model.device, trial):
        return (f"{count} fused layers",) if count else ()
    unfuse(model)
    return ()


def _tried(what: str, device: torch.device, trial: Callable[[], bool]) -> bool:
    """Whether it works; one line in the log where not."""
    try:
        if trial():
            return True
        reason = "it computes something else"
    except DeviceLost:
        raise
    except Exception as error:  # noqa: BLE001 - a kernel's compiler may raise anything, and there is another way
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        _check_alive(device, what)
    log.warning("%s is left out on this device: %s", what, reason)
    return False


def _check_alive(device: torch.device, what: str) -> None:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLost(f"the device has failed while {what} was tried") from error


def _right(model: Any, shape: Shape, attend: Attend) -> bool:
    hows = ways_of(model.config, shape.head_size)
    return _tried("attention in place", model.device, lambda: agrees(attend, shape, hows, model.device))


def ways_of(config: Any, head_size: int) -> Sequence[How]:
    """In which ways layers of a model with this configuration attend, for the check."""
    softcap = getattr(config, "attn_logit_softcapping", None)
    windows = [None] if getattr(config, "sliding_window", None) is None else [None, SMALL_WINDOW]
    return [How(head_size**-0.5, window, softcap) for window in windows]


def _same(fast: ModelRunner, other: ModelRunner, rows: int, limits: Limits, model: Any) -> bool:
    """Whether both compute the same logits for so many rows, and one fewer: each the next token of the same text."""
    size = model.get_input_embeddings().num_embeddings
    count = min(CHECKED_TOKENS, limits.capacity)
    blocks = tuple(range(-(-count // limits.block_size)))  # where the comparison with the model itself left that text
    bound = tolerance(model)
    for number in {rows, max(1, rows - 1)}:
        chunks = []
        for row in range(number):
            tokens = [(7919 * position + 13) % size for position in range(count - row % 3)]
            sequence = TokenSequence(id=str(row), prompt_length=len(tokens), tokens=tokens, max_tokens=1)
            chunks.append(Chunk(sequence, len(tokens) - 1, (tokens[-1],), blocks, samples=True))
        batch = Batch(decode=tuple(chunks))
        theirs = other.forward(batch).clone()
        if not apart(fast.forward(batch), theirs) <= bound:
            return False
    return True
