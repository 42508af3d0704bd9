"""Owns attention over the paged KV cache; refuses scheduling, and keeps no state between forwards.

Registered with transformers as an attention function, it is called once a layer. All it needs beyond the projections
comes in the forward's `paged` keyword.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PAGED_ATTENTION = "hybridgate_paged"


class KvCache:
    """Keys and values: [layers, blocks, block size × KV heads × head size].

    Invariant: the last block is never written, so that padding gathers zeros and a masked NaN cannot leak.
    """

    def __init__(
        self,
        *,
        layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.padding_block = num_blocks
        self._slot_shape = (-1, kv_heads, head_size)
        shape = (layers, (num_blocks + 1), block_size * kv_heads * head_size)
        self._all_keys = torch.zeros(shape, dtype=dtype, device=device)
        self._all_values = torch.zeros(shape, dtype=dtype, device=device)
        self._keys = list(self._all_keys)
        self._values = list(self._all_values)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [tokens, KV heads, head size] in their slots [tokens]."""
        self._keys[layer].view(self._slot_shape).index_copy_(0, slots, keys)
        self._values[layer].view(self._slot_shape).index_copy_(0, slots, values)

    def read(self, layer: int, blocks: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, KV heads, length, head size] of `blocks` [rows × blocks a row]."""
        shape = (rows, -1, *self._slot_shape[1:])
        keys = self._keys[layer].index_select(0, blocks).view(shape)[:, :length]
        values = self._values[layer].index_select(0, blocks).view(shape)[:, :length]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def clear(self, blocks: Tensor) -> None:
        """Zero these blocks in all layers."""
        self._all_keys.index_fill_(1, blocks, 0)
        self._all_values.index_fill_(1, blocks, 0)


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The first `rows` tokens of the packed forward: one of each sequence.

    blocks: [rows × blocks a row], padded; length: of the longest; mask: [rows, 1, 1, length], None if all are as long.
    """

    rows: int
    blocks: Tensor
    length: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Tokens `begin` … `end` of the packed forward: a chunk of one prompt.

    Where tokens come before the chunk: their blocks and the chunk's own, and the mask [end - begin, length].
    """

    begin: int
    end: int
    length: int
    blocks: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class PagedForward:
    """What one forward's attention needs: where to write [tokens], and how to read."""

    cache: KvCache
    slots: Tensor
    decode: DecodeRows | None
    prefill: tuple[PrefillSpan, ...]


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: PagedForward,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of one layer: query [1, heads, tokens, head size] → [1, tokens, heads, head size]."""
    layer: int = module.layer_idx
    paged.cache.write(layer, paged.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    parts = []
    if paged.decode is not None:
        parts.append(_decode(query[0, :, : paged.decode.rows], paged.decode, paged.cache, layer, scaling))
    for span in paged.prefill:
        part = slice(span.begin, span.end)
        parts.append(_prefill(query[:, :, part], key[:, :, part], value[:, :, part], span, paged.cache, layer, scaling))
    packed = parts[0] if len(parts) == 1 else torch.cat(parts)
    return packed[None], None


def _decode(query: Tensor, rows: DecodeRows, cache: KvCache, layer: int, scaling: float) -> Tensor:
    """[heads, rows, head size] → [rows, heads, head size]; the heads of a KV group are packed as queries."""
    keys, values = cache.read(layer, rows.blocks, rows.rows, rows.length)
    heads, size = query.shape[0], query.shape[2]
    grouped = query.transpose(0, 1).reshape(rows.rows, keys.shape[1], -1, size)
    attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=rows.mask, scale=scaling)
    return attended.reshape(rows.rows, heads, size)


def _prefill(
    query: Tensor, key: Tensor, value: Tensor, span: PrefillSpan, cache: KvCache, layer: int, scaling: float
) -> Tensor:
    """[1, heads, tokens, head size] → [tokens, heads, head size]."""
    if span.blocks is not None:
        key, value = cache.read(layer, span.blocks, 1, span.length)
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=span.mask, is_causal=span.mask is None, scale=scaling
    )
    return attended[0].transpose(0, 1)


# transformers looks attention functions up by name; this one is a pure function, so registering it is not state.
AttentionInterface.register(PAGED_ATTENTION, paged_attention)
