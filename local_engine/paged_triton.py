"""Owns attention in place over the paged cache on a GPU, in Triton; refuses to decide whether it is right
(`paged.agrees` does).

The keys and values of a KV head are read once for all query heads that share it, a tile of tokens at a time, with the
running maximum and sum of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018). Where tokens and
KV heads are too few to keep a GPU busy, what a token sees is split among several programs, whose parts are joined by
their maxima and sums (Dao et al., "Flash-Decoding for long-context inference", 2023).

Importing it needs the triton package, which torch for CUDA brings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from local_engine.paged import How, Tables

SMALLEST_TILE = 16
"""Of a matrix multiplication's sides."""

TILE_BYTES = 16_384
LARGEST_TILE = 64
STAGES = 2
"""Tokens that a program reads at once: two stages of a tile of keys and one of values, which fit the shared memory of
every GPU that Triton serves."""

PROGRAMS_A_PROCESSOR = 4
MOST_SPLITS = 32


def splits_for(tokens: int, kv_heads: int, processors: int) -> int:
    """Among how many programs what a token sees is split: a power of two.

    A kernel is compiled for each, which takes seconds; so it is the same for all lengths, and recording steps for few
    and for many tokens has compiled all that serving needs.
    """
    wanted = PROGRAMS_A_PROCESSOR * processors // max(1, tokens * kv_heads)
    return 1 << (max(1, min(MOST_SPLITS, wanted)).bit_length() - 1)


@dataclass(frozen=True, slots=True)
class TritonAttend:
    """`paged.Attend` on a device with so many multiprocessors."""

    processors: int

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, tables: Tables, how: How) -> Tensor:
        """query [tokens, heads, head size], keys and values [slots, KV heads, head size], → the query's shape."""
        tokens, heads, size = query.shape
        kv_heads = keys.shape[1]
        if query.stride(2) != 1:
            query = query.contiguous()
        out = torch.empty((tokens, heads, size), dtype=query.dtype, device=query.device)
        head_padded = max(SMALLEST_TILE, triton.next_power_of_2(size))
        tile = max(SMALLEST_TILE, min(LARGEST_TILE, TILE_BYTES // (head_padded * keys.element_size())))
        splits = splits_for(tokens, kv_heads, self.processors)
        parts = (tokens, heads, splits)
        wide = torch.float32
        peaks, totals = (torch.empty(parts if splits > 1 else 1, dtype=wide, device=query.device) for _ in range(2))
        partial = torch.empty((*parts, size) if splits > 1 else 1, dtype=wide, device=query.device)
        _attend[(tokens, kv_heads, splits)](
            query,
            keys,
            values,
            tables.blocks,
            tables.starts,
            tables.lengths,
            out,
            peaks,
            totals,
            partial,
            query.stride(0),
            query.stride(1),
            keys.stride(0),
            keys.stride(1),
            how.scaling,
            how.softcap or 0.0,
            how.window or 0,
            HEADS=heads,
            GROUP=heads // kv_heads,
            GROUP_PADDED=max(SMALLEST_TILE, triton.next_power_of_2(heads // kv_heads)),
            SIZE=size,
            SIZE_PADDED=head_padded,
            BLOCK=tables.block_size,
            TILE=tile,
            SPLITS=splits,
            WINDOWED=how.window is not None,
            CAPPED=how.softcap is not None,
            PRECISION="ieee" if query.dtype is wide else "tf32",  # matters to float32 alone
            num_stages=STAGES,
        )
        if splits > 1:
            _join[(tokens, heads)](
                out, peaks, totals, partial, HEADS=heads, SIZE=size, SIZE_PADDED=head_padded, SPLITS=splits
            )
        return out


@triton.jit(do_not_specialize=["window"])  # else it is compiled again for windows that are multiples of 16
def _attend(
    query,
    keys,
    values,
    blocks,
    starts,
    lengths,
    out,
    peaks,
    totals,
    partial,
    query_stride,
    query_head_stride,
    slot_stride,
    kv_head_stride,
    scaling,
    softcap,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One token, one KV head with its query heads, one of the splits of what the token sees."""
    token = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + token).to(tl.int32)
    first = 0
    if WINDOWED:
        first = tl.maximum(length - window, 0)
    first_tile = first // TILE
    share = tl.cdiv(tl.cdiv(length, TILE) - first_tile, SPLITS) * TILE
    begin = first_tile * TILE + split * share
    end = tl.minimum(begin + share, length)

    group = tl.arange(0, GROUP_PADDED)
    heads = kv_head * GROUP + group
    dims = tl.arange(0, SIZE_PADDED)
    real = (group < GROUP)[:, None] & (dims < SIZE)[None, :]
    own = query + token.to(tl.int64) * query_stride + heads[:, None] * query_head_stride + dims[None, :]
    asked = tl.load(own, mask=real, other=0.0)
    peak = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    summed = tl.zeros([GROUP_PADDED, SIZE_PADDED], tl.float32)
    table = blocks + tl.load(starts + token)
    # No tile is without a token that is seen: the first holds `first`, and each begins before `end`.
    for at in range(begin, end, TILE):
        positions = at + tl.arange(0, TILE)
        seen = (positions >= first) & (positions < end)
        # In 64 bits: a large cache has more than 2^31 numbers.
        block = tl.load(table + positions // BLOCK, mask=seen, other=0).to(tl.int64)
        places = (block * BLOCK + positions % BLOCK) * slot_stride + kv_head * kv_head_stride
        there = seen[:, None] & (dims < SIZE)[None, :]
        key = tl.load(keys + places[:, None] + dims[None, :], mask=there, other=0.0)
        value = tl.load(values + places[:, None] + dims[None, :], mask=there, other=0.0)
        scores = tl.dot(asked, tl.trans(key), input_precision=PRECISION) * scaling
        if CAPPED:  # tanh, which neither overflows nor needs a library
            scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        faded = tl.exp(peak - higher)
        weights = tl.exp(scores - higher[:, None])
        total = total * faded + tl.sum(weights, 1)
        summed = summed * faded[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        peak = higher

    if SPLITS == 1:
        found = summed / tl.where(total == 0, 1.0, total)[:, None]
        target = out + (token.to(tl.int64) * HEADS + heads[:, None]) * SIZE + dims[None, :]
        tl.store(target, found.to(out.dtype.element_ty), mask=real)
    else:
        part = (token.to(tl.int64) * HEADS + heads) * SPLITS + split
        tl.store(peaks + part, peak, mask=group < GROUP)
        tl.store(totals + part, total, mask=group < GROUP)
        if end > begin:
            tl.store(partial + part[:, None] * SIZE + dims[None, :], summed, mask=real)


@triton.jit
def _join(
    out,
    peaks,
    totals,
    partial,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One query head of one token: its splits' parts as one."""
    row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, SIZE_PADDED)
    total = tl.load(totals + row * SPLITS + splits)
    peak = tl.load(peaks + row * SPLITS + splits)
    # A split that saw nothing has left no sums. One that met a NaN has a total that is none, and must be heard.
    used = total != 0
    weight = tl.where(used, tl.exp(peak - tl.max(peak, 0)), 0.0)
    there = used[:, None] & (dims < SIZE)[None, :]
    parts = tl.load(partial + (row * SPLITS + splits)[:, None] * SIZE + dims[None, :], mask=there, other=0.0)
    whole = tl.sum(weight * total, 0)
    found = tl.sum(weight[:, None] * parts, 0) / tl.where(whole == 0, 1.0, whole)
    tl.store(out + row * SIZE + dims, found.to(out.dtype.element_ty), mask=dims < SIZE)
