"""Owns attention over the paged KV cache; refuses scheduling, and keeps no state between forwards.

Registered with transformers as an attention function, it is called once a layer. All it needs beyond the projections
comes in the forward's `paged` keyword.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from local_engine.paged import Attend, How, Tables

PAGED_ATTENTION = "hybridgate_paged"


class KvCache:
    """Keys and values: [layers, blocks, block size × KV heads × head size].

    Invariant: the block `padding_block` is never written, so that padding gathers zeros and a masked NaN cannot leak;
    the block of `scratch_slot` is written by rows that pad a recorded step, and never read.
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
        self.scratch_slot = (num_blocks + 1) * block_size
        self._slot_shape = (-1, kv_heads, head_size)
        shape = (layers, (num_blocks + 2), block_size * kv_heads * head_size)
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

    def slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values where they lie: [slots, KV heads, head size]."""
        return self._keys[layer].view(self._slot_shape), self._values[layer].view(self._slot_shape)

    def clear(self, blocks: Tensor) -> None:
        """Zero these blocks in all layers."""
        self._all_keys.index_fill_(1, blocks, 0)
        self._all_values.index_fill_(1, blocks, 0)


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Some tokens of the packed forward, from `begin` on: the newest `width` of each of `rows` sequences.

    blocks: [rows × blocks a row], padded; length: of the longest with its newest token; lengths: [rows, 1], None if all
    are as long. A width above 1 is one token and guesses of those behind it.
    """

    rows: int
    blocks: Tensor
    length: int
    lengths: Tensor | None
    begin: int = 0
    width: int = 1
    _masks: dict[tuple[int | None, int], Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype, group: int) -> Tensor | None:
        """What each token may not see, added to its scores: [rows, 1, 1 or group × width, length], None where it may
        see all. Made once for all layers with this window and so many heads to a KV head."""
        if window is not None and window >= self.length:
            window = None
        if (window, group) not in self._masks:
            made = self._made(window, dtype)
            self._masks[window, group] = made if made is None or self.width == 1 else made.repeat(1, 1, group, 1)
        return self._masks[window, group]

    def _made(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        if self.lengths is None and window is None and self.width == 1:
            return None
        positions = torch.arange(self.length, device=self.blocks.device)
        ends = positions[-1:, None] + 1 if self.lengths is None else self.lengths
        if self.width > 1:  # each token sees one more than the one before it
            ends = ends[:, :, None] + torch.arange(1 - self.width, 1, device=self.blocks.device)[:, None]
        hidden = positions >= ends
        if window is not None:
            hidden = hidden | (positions < ends - window)
        mask = torch.zeros((self.rows, self.width, self.length), dtype=dtype, device=self.blocks.device)
        return mask.masked_fill_(hidden.view(-1, self.width, self.length), float("-inf"))[:, None]


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Tokens `begin` … `end` of the packed forward: a chunk of one prompt.

    length: of the prompt up to and with the chunk; blocks: of all of it, None where nothing comes before the chunk.
    """

    begin: int
    end: int
    length: int
    blocks: Tensor | None
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """What each token may see: [end - begin, length], None where that is causal attention over the chunk alone.
        Made once for all layers with this window."""
        if window is not None and window >= self.length:
            window = None
        if window not in self._masks:
            self._masks[window] = self._made(window, device)
        return self._masks[window]

    def _made(self, window: int | None, device: torch.device) -> Tensor | None:
        if self.blocks is None and window is None:
            return None
        size = self.end - self.begin
        seen = torch.ones(size, self.length, dtype=torch.bool, device=device).tril_(self.length - size)
        return seen if window is None else seen.triu_(self.length - size - window + 1)


@dataclass(frozen=True, slots=True)
class PagedForward:
    """What one forward's attention needs: where to write [tokens], and how to read.

    Tokens that decode come first, as `decode` rows that are copied out of the cache, or as `tables` that `attend`
    follows in place.
    """

    cache: KvCache
    slots: Tensor
    decode: tuple[DecodeRows, ...] = ()
    prefill: tuple[PrefillSpan, ...] = ()
    tables: Tables | None = None
    attend: Attend | None = None


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: PagedForward,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of one layer: query [1, heads, tokens, head size] → [1, tokens, heads, head size].

    `sliding_window`: how many tokens, itself among them, one sees; `softcap` bounds the scores (Gemma 2).
    """
    if s_aux is not None:
        raise ValueError("attention sinks are not computed here")
    layer: int = module.layer_idx
    how = How(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    paged.cache.write(layer, paged.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    return attended(query, key, value, paged, layer, how)[None], None


def attended(query: Tensor, key: Tensor, value: Tensor, paged: PagedForward, layer: int, how: How) -> Tensor:
    """Attention of one layer whose keys and values are written: query [1, heads, tokens, head size] → [tokens, heads,
    head size]."""
    parts = []
    if paged.tables is not None:
        assert paged.attend is not None
        first = query[0, :, : len(paged.tables.lengths)].transpose(0, 1)
        parts.append(paged.attend(first, *paged.cache.slots(layer), paged.tables, how))
    for rows in paged.decode:
        part = slice(rows.begin, rows.begin + rows.rows * rows.width)
        parts.append(_decode(query[0, :, part], rows, paged.cache, layer, how))
    for span in paged.prefill:
        part = slice(span.begin, span.end)
        parts.append(_prefill(query[:, :, part], key[:, :, part], value[:, :, part], span, paged.cache, layer, how))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(query: Tensor, rows: DecodeRows, cache: KvCache, layer: int, how: How) -> Tensor:
    """[heads, rows × width, head size] → [rows × width, heads, head size]; the heads of a KV group, and the tokens of
    a row, are packed as queries."""
    keys, values = cache.read(layer, rows.blocks, rows.rows, rows.length)
    heads, size, width = query.shape[0], query.shape[2], rows.width
    kv_heads = keys.shape[1]
    if width == 1:
        grouped = query.transpose(0, 1).reshape(rows.rows, kv_heads, -1, size)
    else:
        grouped = query.view(heads, rows.rows, width, size).transpose(0, 1).reshape(rows.rows, kv_heads, -1, size)
    mask = rows.mask(how.window, query.dtype, heads // kv_heads)
    if how.softcap is not None:
        attended = _capped(grouped, keys, values, mask, how)
    else:
        attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=how.scaling)
    if width == 1:
        return attended.reshape(rows.rows, heads, size)
    return attended.reshape(rows.rows, heads, width, size).transpose(1, 2).reshape(-1, heads, size)


def _prefill(
    query: Tensor, key: Tensor, value: Tensor, span: PrefillSpan, cache: KvCache, layer: int, how: How
) -> Tensor:
    """[1, heads, tokens, head size] → [tokens, heads, head size]."""
    if span.blocks is not None:
        key, value = cache.read(layer, span.blocks, 1, span.length)
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    mask = span.mask(how.window, query.device)
    if how.softcap is not None:
        if mask is None:
            mask = torch.ones(span.length, span.length, dtype=torch.bool, device=query.device).tril_()
        hidden = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf"))
        return _capped(query, key, value, hidden, how)[0].transpose(0, 1)
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=how.scaling
    )
    return attended[0].transpose(0, 1)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: How) -> Tensor:
    """Attention whose scores are bounded by `softcap` before the mask, which no fused kernel of torch computes."""
    assert how.softcap is not None
    scores = torch.tanh(query @ key.transpose(-1, -2) * (how.scaling / how.softcap)) * how.softcap
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value


# transformers looks attention functions up by name; this one is a pure function, so registering it is not state.
AttentionInterface.register(PAGED_ATTENTION, paged_attention)
