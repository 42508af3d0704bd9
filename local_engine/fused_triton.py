"""Owns a layer's small operations on a GPU, each as one kernel in Triton; refuses to decide whether they are right
(`fused.fuse` does).

Importing it needs the triton package, which torch for CUDA brings.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty

from local_engine.fused import Heads

GATED_TILE = 1024
HEADS_TILE = 8


class TritonFusions:
    """`fused.Fusions` on a GPU."""

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) × up, [rows, size] each → [rows, size]."""
        rows, size = gate.shape
        out = empty((rows, size), dtype=gate.dtype, device=gate.device)
        _gated[(rows, triton.cdiv(size, GATED_TILE))](
            gate, up, out, gate.stride(0), up.stride(0), SIZE=size, TILE=GATED_TILE
        )
        return out

    def place(self, given: Heads) -> None:
        """As `fused.Fusions` says. Numbers of a head, and heads of a token, lie side by side; cos and sin are whole."""
        query, key, value, keys, values = given.query, given.key, given.value, given.keys, given.values
        cos, sin = given.cos, given.sin
        tokens, heads, size = query.shape
        kv_heads, half = key.shape[1], cos.shape[-1] // 2
        for one in (query, key, value, keys, values):
            if one.stride(-1) != 1 or one.stride(1) != size:
                raise ValueError("heads do not lie side by side")
        parts = triton.cdiv(heads, HEADS_TILE) + 2 * triton.cdiv(kv_heads, HEADS_TILE)
        _place[(tokens, parts)](
            query,
            key,
            value,
            cos,
            sin,
            given.slots,
            keys,
            values,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            cos.stride(0),
            sin.stride(0),
            keys.stride(0),
            HEADS=heads,
            KV_HEADS=kv_heads,
            SIZE=size,
            HALF=half,
            HALF_PADDED=triton.next_power_of_2(half),
            REST_PADDED=triton.next_power_of_2(max(1, size - 2 * half)),
            SIZE_PADDED=triton.next_power_of_2(size),
            TILE=HEADS_TILE,
        )


@triton.jit
def _gated(gate, up, out, gate_stride, up_stride, SIZE: tl.constexpr, TILE: tl.constexpr):
    """A part of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = at < SIZE
    asked = tl.load(gate + row * gate_stride + at, mask=real, other=0.0).to(tl.float32)
    other = tl.load(up + row * up_stride + at, mask=real, other=0.0).to(tl.float32)
    found = asked / (1 + tl.exp(-asked)) * other
    tl.store(out + row * SIZE + at, found.to(out.dtype.element_ty), mask=real)


@triton.jit
def _rotated(at, cosines, sines, real, there, HALF: tl.constexpr):
    """The first and the second half of heads that lie at `at`, by one token's cosines and sines."""
    first = tl.load(at, mask=real, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=real, other=0.0).to(tl.float32)
    cos_first = tl.load(cosines, mask=there, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cosines + HALF, mask=there, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sines, mask=there, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sines + HALF, mask=there, other=0.0).to(tl.float32)[None, :]
    return first * cos_first - second * sin_first, second * cos_second + first * sin_second


@triton.jit
def _copy(source, target, heads, begin, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Numbers of heads from `begin` on."""
    dims = begin + tl.arange(0, PADDED)
    real = (heads < KV_HEADS)[:, None] & (dims < SIZE)[None, :]
    places = heads[:, None] * SIZE + dims[None, :]
    tl.store(target + places, tl.load(source + places, mask=real, other=0.0), mask=real)


@triton.jit
def _place(
    query,
    key,
    value,
    cos,
    sin,
    slots,
    keys,
    values,
    query_stride,
    key_stride,
    value_stride,
    cos_stride,
    sin_stride,
    slot_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Some heads of one token: query heads, or key heads, or value heads."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    query_parts: tl.constexpr = (HEADS + TILE - 1) // TILE
    kv_parts: tl.constexpr = (KV_HEADS + TILE - 1) // TILE
    pairs = tl.arange(0, HALF_PADDED)
    there = pairs < HALF
    cosines, sines = cos + token * cos_stride + pairs, sin + token * sin_stride + pairs
    slot = tl.load(slots + token) * slot_stride
    if part < query_parts:
        heads = part * TILE + tl.arange(0, TILE)
        real = (heads < HEADS)[:, None] & there[None, :]
        at = query + token * query_stride + heads[:, None] * SIZE + pairs[None, :]
        first, second = _rotated(at, cosines, sines, real, there, HALF)
        tl.store(at, first.to(query.dtype.element_ty), mask=real)
        tl.store(at + HALF, second.to(query.dtype.element_ty), mask=real)
    elif part < query_parts + kv_parts:
        kv_heads = (part - query_parts) * TILE + tl.arange(0, TILE)
        asked = (kv_heads < KV_HEADS)[:, None] & there[None, :]
        places = kv_heads[:, None] * SIZE + pairs[None, :]
        own = key + token * key_stride
        one, other = _rotated(own + places, cosines, sines, asked, there, HALF)
        tl.store(own + places, one.to(key.dtype.element_ty), mask=asked)
        tl.store(own + places + HALF, other.to(key.dtype.element_ty), mask=asked)
        tl.store(keys + slot + places, one.to(key.dtype.element_ty), mask=asked)
        tl.store(keys + slot + places + HALF, other.to(key.dtype.element_ty), mask=asked)
        if SIZE > 2 * HALF:
            _copy(own, keys + slot, kv_heads, 2 * HALF, KV_HEADS, SIZE, REST_PADDED)
    else:
        value_heads = (part - query_parts - kv_parts) * TILE + tl.arange(0, TILE)
        _copy(value + token * value_stride, values + slot, value_heads, 0, KV_HEADS, SIZE, SIZE_PADDED)
