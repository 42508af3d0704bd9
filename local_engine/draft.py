"""Owns a small model that guesses what a large one will say; refuses to decide what is right.

A guess costs a forward of the small model, so what counts is what such a forward costs beside its arithmetic. Hence no
paged cache, no modules and no choices here: the weights of a Llama-like model, one row of keys and values for each
sequence, and the few operations between them. What a row holds follows the sequence's tokens by itself, so nobody tells
a drafter of preemptions, aborts or ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from local_engine.checkpoint import check_loaded
from local_engine.errors import LoadError
from local_engine.speculation import Ask

KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Models whose layers are the ones below; others are refused by name."""

FIRST_CAPACITY = 256
"""Tokens that a row holds at first; twice as many when a sequence outgrows it."""

AT_ONCE = 8
"""New tokens up to which the rows of several sequences go through one forward."""

TOLERANCES = {torch.float32: 1e-3}
OTHER_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights; projections that read the same are one matrix."""

    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [projection.bias for projection in projections]
        if attention.o_proj.bias is not None or mlp.down_proj.bias is not None:
            raise LoadError("a draft model with biases in its output projections is not supported: name another")
        normed = hasattr(attention, "q_norm")
        return cls(
            norm=layer.input_layernorm.weight,
            qkv=torch.cat([projection.weight for projection in projections]),
            qkv_bias=None if biases[0] is None else torch.cat(biases),
            query_norm=attention.q_norm.weight if normed else None,
            key_norm=attention.k_norm.weight if normed else None,
            out=attention.o_proj.weight,
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            down=mlp.down_proj.weight,
        )


class Decoder:
    """A Llama-like model over rows of keys and values: [rows, KV heads, capacity, head size] for each layer."""

    def __init__(self, model: Any, rows: int) -> None:
        config = model.config
        self.window: int = config.max_position_embeddings
        self.device: torch.device = model.device
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._epsilon: float = config.rms_norm_eps
        self._embedding: Tensor = model.get_input_embeddings().weight
        self._norm: Tensor = model.model.norm.weight
        self._output: Tensor = model.get_output_embeddings().weight
        self._layers = [_Layer.of(layer) for layer in model.model.layers]
        positions = torch.arange(self.window, device=self.device)[None]
        cos, sin = model.model.rotary_emb(self._embedding[:1], positions)
        self._cos, self._sin = cos[0], sin[0].clone()
        self._sin[:, : self._head_size // 2].neg_()  # then one rotation is two products and a sum
        self._rows = rows
        self._capacity = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._grow(min(FIRST_CAPACITY, self.window))

    def hold(self, tokens: int) -> None:
        """Make room for so many tokens in a row."""
        if tokens > self._capacity:
            self._grow(min(self.window, max(tokens, 2 * self._capacity)))

    def _grow(self, capacity: int) -> None:
        shape = (self._rows, self._kv_heads, capacity, self._head_size)
        for held in (self._keys, self._values):
            old = list(held)
            held[:] = [self._embedding.new_zeros(shape) for _ in self._layers]
            for before, after in zip(old, held, strict=False):
                after[:, :, : self._capacity] = before
        self._capacity = capacity

    def next_tokens(self, tokens: Tensor, rows: Sequence[int], starts: Sequence[int]) -> Tensor:
        """Compute tokens [sequences, width] of these rows from their starts on; the likeliest next one of each."""
        return self.logits(tokens, rows, starts).argmax(dim=-1)

    def logits(self, tokens: Tensor, rows: Sequence[int], starts: Sequence[int]) -> Tensor:
        """Logits [sequences, vocabulary] behind the last of the tokens."""
        width = tokens.shape[1]
        length = max(starts) + width
        if len(rows) == 1:
            where: tuple[Any, ...] = (slice(rows[0], rows[0] + 1), slice(None), slice(starts[0], length))
            read: Any = slice(rows[0], rows[0] + 1)
            cos, sin = self._cos[starts[0] : length], self._sin[starts[0] : length]
        else:
            positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(width, device=self.device)
            read = torch.tensor(rows, device=self.device)
            where = (read[:, None], slice(None), positions)
            cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        mask = self._mask(starts, width, length)
        hidden = embedding(tokens, self._embedding)
        for index, layer in enumerate(self._layers):
            hidden = self._through(hidden, layer, index, (where, read, length), (cos, sin), mask)
        return linear(self._normed(hidden[:, -1], self._norm), self._output)

    def _mask(self, starts: Sequence[int], width: int, length: int) -> Tensor | None:
        """What each token may see: [sequences, 1, heads of a group × width, length]."""
        if width == 1 and len(starts) == 1:
            return None
        ends = torch.tensor(starts, device=self.device)[:, None] + torch.arange(1, width + 1, device=self.device)
        seen = torch.arange(length, device=self.device) < ends[:, :, None]
        return seen.repeat(1, self._heads // self._kv_heads, 1)[:, None]

    def _through(
        self,
        hidden: Tensor,
        layer: _Layer,
        index: int,
        place: tuple[Any, Any, int],
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        where, read, length = place
        count, width = hidden.shape[:2]
        heads, kv_heads, size = self._heads, self._kv_heads, self._head_size
        packed = linear(self._normed(hidden, layer.norm), layer.qkv, layer.qkv_bias)
        states = packed.view(count, width, heads + 2 * kv_heads, size)
        turned = states[:, :, : heads + kv_heads]
        if layer.query_norm is not None and layer.key_norm is not None:
            turned = torch.cat(
                [
                    self._normed(turned[:, :, :heads], layer.query_norm),
                    self._normed(turned[:, :, heads:], layer.key_norm),
                ],
                dim=2,
            )
        turned = turned.transpose(1, 2)
        cos, sin = rotation
        turned = turned * cos + turned.roll(size // 2, dims=-1) * sin
        keys, values = self._keys[index], self._values[index]
        new_keys, new_values = turned[:, heads:], states[:, :, heads + kv_heads :].transpose(1, 2)
        if count > 1:  # indices that are apart come first in what they select
            new_keys, new_values = new_keys.transpose(1, 2), new_values.transpose(1, 2)
        keys[where], values[where] = new_keys, new_values
        queries = turned[:, :heads].reshape(count, kv_heads, -1, size)
        attended = scaled_dot_product_attention(queries, keys[read][:, :, :length], values[read][:, :, :length], mask)
        attended = attended.view(count, heads, width, size).transpose(1, 2).reshape(count, width, heads * size)
        hidden = hidden + linear(attended, layer.out)
        gate, up = linear(self._normed(hidden, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
        return hidden + linear(silu(gate) * up, layer.down)

    def _normed(self, values: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(values, weight.shape, weight, self._epsilon)


@dataclass(slots=True)
class _Row:
    """Which tokens a row of keys and values holds: the first `sure` ones of a sequence, and guesses behind them."""

    index: int
    sure: int = 0
    guesses: Sequence[int] = ()

    def known(self, tokens: Sequence[int]) -> int:
        """How many of the sequence's tokens need not be computed: those that it holds, but for the last."""
        known = self.sure
        for guess in self.guesses:
            if known == len(tokens) or guess != tokens[known]:
                break
            known += 1
        return min(known, len(tokens) - 1)


class DraftModel:
    """Guesses with a small model, greedily: a sampled answer follows the likeliest tokens often enough."""

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self._decoder = decoder
        self._rows: dict[str, _Row] = {}  # the longest unused first
        self._unused = list(range(rows))

    @torch.inference_mode()
    def guess(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        """As Drafter says. There are not more asks than rows."""
        fitting = [ask for ask in asks if len(ask.tokens) + ask.size <= self._decoder.window]
        if not fitting:
            return [()] * len(asks)
        self._decoder.hold(max(len(ask.tokens) + ask.size for ask in fitting))
        rows = [self._row(ask.id) for ask in fitting]
        first = self._caught_up(fitting, rows)
        made = self._going_on(first, fitting, rows)
        for ask, row, guesses in zip(fitting, rows, made, strict=True):
            row.sure, row.guesses = len(ask.tokens), guesses[:-1]
        found = {ask.id: tuple(guesses[: ask.size]) for ask, guesses in zip(fitting, made, strict=True)}
        return [found.get(ask.id, ()) for ask in asks]

    def _row(self, id: str) -> _Row:
        row = self._rows.pop(id, None)
        if row is None:
            index = self._unused.pop() if self._unused else self._rows.pop(next(iter(self._rows))).index
            row = _Row(index)
        self._rows[id] = row
        return row

    def _caught_up(self, asks: Sequence[Ask], rows: Sequence[_Row]) -> Tensor:
        """The first guess for each, after computing what came since the last time."""
        starts = [row.known(ask.tokens) for ask, row in zip(asks, rows, strict=True)]
        new = [len(ask.tokens) - start for ask, start in zip(asks, starts, strict=True)]
        # Those with few new tokens together: where one has fewer than another, some are computed once more.
        width = max((size for size in new if size <= AT_ONCE), default=0)
        together = [i for i, size in enumerate(new) if size <= width <= len(asks[i].tokens)]
        first = torch.empty(len(asks), dtype=torch.long, device=self._decoder.device)
        groups = [[i] for i in range(len(asks)) if i not in together] + ([together] if together else [])
        for group in groups:
            size = width if group is together else new[group[0]]
            begins = [len(asks[i].tokens) - size for i in group]
            tokens = [asks[i].tokens[begin:] for i, begin in zip(group, begins, strict=True)]
            made = self._decoder.next_tokens(self._longs(tokens), [rows[i].index for i in group], begins)
            first[group] = made
        return first

    def _going_on(self, first: Tensor, asks: Sequence[Ask], rows: Sequence[_Row]) -> list[list[int]]:
        """The guesses from the first on, as many for each as the longest ask wants."""
        indices, starts = [row.index for row in rows], [len(ask.tokens) for ask in asks]
        made = [first]
        for _ in range(max(ask.size for ask in asks) - 1):
            made.append(self._decoder.next_tokens(made[-1][:, None], indices, starts))
            starts = [start + 1 for start in starts]
        return torch.stack(made, dim=1).tolist()

    def _longs(self, values: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._decoder.device)


def load_draft(
    name: str, source: str, *, device: torch.device, dtype: torch.dtype, vocabulary: Mapping[str, int], rows: int
) -> DraftModel:
    """The draft model for a model whose tokenizer has this vocabulary. Raises LoadError, and what transformers raises.

    A directory without a tokenizer of its own, such as the bundled draft's, is taken to share the model's.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"} or (
        config.model_type == "mistral" and config.sliding_window
    )
    if config.model_type not in KINDS or windows:
        raise LoadError(f"{name} cannot guess: a draft is one of {', '.join(KINDS)}, without sliding windows")
    if not Path(source).is_dir() or (Path(source) / "tokenizer.json").is_file():
        own = AutoTokenizer.from_pretrained(source, trust_remote_code=False).get_vocab()
    else:
        own = vocabulary
    if own != vocabulary or config.vocab_size <= max(vocabulary.values()):
        raise LoadError(f"{name} has other tokens than the model that it should guess for: name one of its family")
    model, told = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation="eager",
        output_loading_info=True,
    )
    check_loaded(told, name)
    model = model.to(device).eval()
    decoder = Decoder(model, rows)
    difference = compare(model, decoder)
    if not difference <= TOLERANCES.get(dtype, OTHER_TOLERANCE):
        raise LoadError(f"{name} computes something else here than by itself (logits differ by {difference:.1%})")
    return DraftModel(decoder, rows)


@torch.inference_mode()
def compare(model: Any, decoder: Decoder) -> float:
    """How far the decoder's logits are from the model's own after 20 tokens, computed in three parts: the norm of the
    difference over the norm."""
    size = decoder._embedding.shape[0]
    tokens = torch.tensor([[(7919 * place + 13) % size for place in range(20)]], device=decoder.device)
    own = model(input_ids=tokens, use_cache=False).logits[0, -1].float()
    for begin, end in ((0, 11), (11, 19), (19, 20)):
        ours = decoder.logits(tokens[:, begin:end], [0], [begin])[0].float()
    return float((ours - own).norm() / own.norm())
