"""Owns the question whether a model computes on the paged cache what it computes by itself; refuses to judge its text.

Any decoder-only model of transformers may be served whose attention goes through the registered function. Whether it
does, with all its scalings, windows and caps, is not looked up in a list: it is measured at start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from local_engine.attention import PAGED_ATTENTION
from local_engine.batch import Batch, Chunk
from local_engine.config import Limits
from local_engine.runner import ModelRunner
from local_engine.sequence import Sequence as TokenSequence

CHECKED_TOKENS = 41
"""Two blocks, and some: a prompt in two chunks, then single tokens."""

DECODED = 3

TOLERANCES = {torch.float32: 1e-3}
OTHER_TOLERANCE = 0.1
"""Of the relative difference of logits. Sixteen bits leave two to three digits, and another order of summation may
send a token of a mixture of experts to another expert; attention that misses anything differs by about 1."""

EIGHT_BITS = 0.5
"""The same where activations are rounded to eight bits in each layer: a last bit of sixteen decides between two of 256
values, and over 32 layers of random weights that was a quarter."""


def tolerance(model: Any) -> float:
    """The largest relative difference of its logits that rounding explains."""
    return EIGHT_BITS if getattr(model, "is_loaded_in_8bit", False) else TOLERANCES.get(model.dtype, OTHER_TOLERANCE)


@torch.inference_mode()
def compare(model: Any, runner: ModelRunner, limits: Limits) -> float:
    """How far the paged forward's logits are from the model's own: the norm of the difference over the norm.

    Uses blocks 0, 1, … which nobody may hold yet. A model that does not compute at all raises what it raises.
    """
    tokens = _tokens(model, limits)
    paged = _paged(runner, tokens, limits.block_size)
    model.set_attn_implementation("eager")
    try:
        ids = torch.tensor([tokens], device=model.device)
        own: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(PAGED_ATTENTION)
    return apart(_stacked(paged), own[torch.tensor(sorted(paged), device=own.device)])


@torch.inference_mode()
def paged_logits(model: Any, runner: ModelRunner, limits: Limits) -> Tensor:
    """The logits that `compare` holds against the model's own, to be held against others."""
    return _stacked(_paged(runner, _tokens(model, limits), limits.block_size))


def apart(ours: Tensor, others: Tensor) -> float:
    """The norm of the difference over the norm."""
    return float((ours.float() - others.float()).norm() / others.float().norm())


def _tokens(model: Any, limits: Limits) -> list[int]:
    size = model.get_input_embeddings().num_embeddings
    return [(7919 * position + 13) % size for position in range(min(CHECKED_TOKENS, limits.capacity))]


def _stacked(logits: dict[int, Tensor]) -> Tensor:
    return torch.stack([logits[position] for position in sorted(logits)])


def _paged(runner: ModelRunner, tokens: Sequence[int], block_size: int) -> dict[int, Tensor]:
    """Logits after some of the tokens, by position: two chunks of a prompt, then one token at a time."""
    sequence = TokenSequence(id="self-check", prompt_length=len(tokens), tokens=list(tokens), max_tokens=1)
    blocks = tuple(range(-(-len(tokens) // block_size)))
    first = max(1, (len(tokens) - DECODED) // 2)
    ends = sorted(
        {first, max(first, len(tokens) - DECODED), *range(max(first, len(tokens) - DECODED), len(tokens) + 1)}
    )
    found, start = {}, 0
    for end in ends:
        chunk = Chunk(sequence, start, tuple(tokens[start:end]), blocks, samples=True, fresh=start == 0)
        alone = len(chunk.tokens) == 1
        logits = runner.forward(Batch(decode=(chunk,)) if alone else Batch(prefill=(chunk,)))
        found[end - 1] = logits[0].clone()
        start = end
    return found
