"""Owns what attention in place over the paged cache is: its inputs, its outputs, and a plain version of it that faster
ones are held against; refuses to write keys and values.

Every token is a row of its own with its own view of the cache, those of a chunk that verifies guesses too: keys and
values are written before anyone reads, so that a token finds there what the guesses before it left. That is all a
decoding step needs, it has one shape for all batches of as many tokens, and so it can be recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from local_engine.uploads import uploaded


@dataclass(frozen=True, slots=True)
class How:
    """Attention's constants in a layer. `window`: how many tokens, itself among them, one sees; `softcap` bounds the
    scores (Gemma 2)."""

    scaling: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Tables:
    """What each token sees: the first `lengths[token]` of its sequence, itself the last of them; block number i of
    these is `blocks[starts[token] + i]`.

    blocks [any], starts and lengths [tokens], all int64 on the device. A token that sees 0 reads nothing and attends to
    zeros. No length is above `longest`, which the host knows.
    """

    blocks: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int
    block_size: int


class Attend(Protocol):
    """Attention of tokens to what lies in the cache."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, tables: Tables, how: How) -> Tensor:
        """query [tokens, heads, head size], keys and values [slots, KV heads, head size], → the query's shape."""


def gathered(query: Tensor, keys: Tensor, values: Tensor, tables: Tables, how: How) -> Tensor:
    """The plain version: copies out what is seen, and computes in float32."""
    tokens, heads, size = query.shape
    positions = torch.arange(tables.longest, device=query.device)
    ends = tables.lengths[:, None]
    seen = positions < ends
    if how.window is not None:
        seen = seen & (positions >= ends - how.window)
    at = (tables.starts[:, None] + positions // tables.block_size).masked_fill(~seen, 0)
    slots = tables.blocks[at] * tables.block_size + positions % tables.block_size
    shape = (tokens, keys.shape[1], -1, size)
    kept = seen[:, :, None, None]
    # Zero what is not seen: a mask does not hide a NaN that a block's holder before left there.
    key = keys[slots].masked_fill(~kept, 0).transpose(1, 2).float()
    value = values[slots].masked_fill(~kept, 0).transpose(1, 2).float()
    scores = query.reshape(shape).float() @ key.transpose(-1, -2) * how.scaling
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(dim=-1)
    attended = (weights @ value).reshape(tokens, heads, size)
    return attended.masked_fill(tables.lengths[:, None, None] == 0, 0).to(query.dtype)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one layer's attention."""

    heads: int
    kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype


CHECKED_LENGTHS = (1, 0, 17, 16, 700, 255, 64, 33)
"""Of the check's tokens: within a block, at its border, over many, and none at all."""

CHECKED_BLOCKS = 64
TOLERANCES = {torch.float32: 1e-4}
OTHER_TOLERANCE = 2e-2
"""Of the largest difference over the largest output: orders of summation and sixteen bits explain no more."""


@torch.inference_mode()
def difference(attend: Attend, shape: Shape, how: How, device: torch.device, lengths: Sequence[int]) -> float:
    """How far `attend` is from the plain version on random numbers: the largest difference over the largest output.

    Every slot that no token sees is not a number. Raises what `attend` raises.
    """
    made = torch.Generator().manual_seed(len(lengths))

    def noise(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=made).to(shape.dtype)

    slots = CHECKED_BLOCKS * shape.block_size
    pool = [noise(slots, shape.kv_heads, shape.head_size) for _ in range(2)]
    order = torch.randperm(CHECKED_BLOCKS, generator=made).tolist()
    starts = [(7 * row) % 5 for row in range(len(lengths))]  # tokens share blocks, as those of one prefix do
    seen = torch.zeros(slots, dtype=torch.bool)
    for start, length in zip(starts, lengths, strict=True):
        for position in range(max(0, length - (how.window or length)), length):
            seen[order[start + position // shape.block_size] * shape.block_size + position % shape.block_size] = True
    keys, values = (each.masked_fill(~seen[:, None, None], float("nan")).to(device) for each in pool)
    tables = Tables(
        blocks=uploaded(order, torch.long, device),
        starts=uploaded(starts, torch.long, device),
        lengths=uploaded(lengths, torch.long, device),
        longest=max(lengths),
        block_size=shape.block_size,
    )
    query = noise(len(lengths), shape.heads, shape.head_size).to(device)
    plain = gathered(query, keys, values, tables, how).float()
    ours = attend(query, keys, values, tables, how)
    if ours.shape != query.shape or ours.dtype is not query.dtype:
        return float("inf")
    return float((ours.float() - plain).abs().max() / plain.abs().max())


def agrees(attend: Attend, shape: Shape, hows: Sequence[How], device: torch.device) -> bool:
    """Whether it computes what the plain version computes, in every one of these ways, for few and for many tokens."""
    bound = TOLERANCES.get(shape.dtype, OTHER_TOLERANCE)
    batches = (CHECKED_LENGTHS[4:5], CHECKED_LENGTHS, CHECKED_LENGTHS * 9)
    return all(difference(attend, shape, how, device, lengths) <= bound for how in hows for lengths in batches)
