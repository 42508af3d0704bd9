"""Owns layers that launch few operations where transformers' launch many; refuses what does not give what the plain
layer gives.

A GPU computes a decoding step's small operations faster than they can begin one after the other: normalizing takes
transformers eight of them, rotating query and key ten, and each costs about two microseconds even in a recorded step,
of which a step of 32 layers has over a thousand. Each layer is compared with the one that it replaces, on the model's
own numbers and on much larger ones, and the plain one stays where they differ. The model's own attention, which the
self-check compares with, goes through the plain layers' code as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from local_engine.attention import PAGED_ATTENTION, PagedForward, attended
from local_engine.linear import join
from local_engine.paged import How

PROBE_ATTENTION = "hybridgate_probe"
PROBED_TOKENS = 5
PROBED_SLOTS = 16

LOUDNESS = (1, 32)
"""Times what a layer takes in a model's forward: so much more shows that it clips (OLMo its queries, keys and values at
8), which a few tokens as they are may not."""

TOLERANCES = {torch.float32: 1e-5}
OTHER_TOLERANCE = 2e-2
"""Of the largest difference from the plain layer, over its largest output: where it is rounded explains no more."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What attention is given of some tokens, and where it goes: query [tokens, heads, size], key and value [tokens, KV
    heads, size]; cos and sin [tokens, as many of the size's first numbers as are rotated]; `slots` [tokens] of the
    cache's keys and values [slots, KV heads, size]."""

    query: Tensor
    key: Tensor
    value: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    keys: Tensor
    values: Tensor


class Fusions(Protocol):
    """What a device computes in one operation each."""

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) × up, both [rows, size] of any stride between rows → [rows, size]."""

    def place(self, heads: Heads) -> None:
        """Rotate query and key in place; store key and value at their slots."""


class PlainFusions:
    """`Fusions` as torch computes them, which others are held against."""

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate.float()).mul_(up.float()).to(gate.dtype)

    def place(self, heads: Heads) -> None:
        cos, sin = heads.cos.float()[:, None], heads.sin.float()[:, None]
        for one in (heads.query, heads.key):
            part = one[..., : cos.shape[-1]]
            first, second = part.float().chunk(2, dim=-1)
            part.copy_(part.float() * cos + torch.cat((-second, first), dim=-1) * sin)
        heads.keys.index_copy_(0, heads.slots, heads.key)
        heads.values.index_copy_(0, heads.slots, heads.value)


class Fused(nn.Module):
    """Stands where `plain` stood, and takes and gives the same."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain


class FusedNorm(Fused):
    """Root mean square normalization (Zhang and Sennrich, 2019), rounded once."""

    def __init__(self, plain: Any, epsilon: float) -> None:
        super().__init__(plain)
        self._weight: Tensor = plain.weight
        self._epsilon = epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functional.rms_norm(hidden_states, self._weight.shape, self._weight, self._epsilon)


class FusedMlp(Fused):
    """down(silu(gate(x)) × up(x)) (Shazeer, "GLU variants improve transformer", 2020)."""

    def __init__(self, plain: Any, fusions: Fusions) -> None:
        super().__init__(plain)
        self._fusions = fusions

    def forward(self, hidden_states: Tensor) -> Tensor:
        plain: Any = self.plain
        gate, up = (projection(hidden_states).flatten(0, -2) for projection in (plain.gate_proj, plain.up_proj))
        gated = self._fusions.gated(gate, up).view(*hidden_states.shape[:-1], gate.shape[-1])
        out: Tensor = plain.down_proj(gated)
        return out


class FusedAttention(Fused):
    """Attention whose query and key are rotated, and key and value stored, in one operation. Where decoding does not
    read in place, the plain layer computes."""

    def __init__(self, plain: Any, how: How, fusions: Fusions) -> None:
        super().__init__(plain)
        self._how = how
        self._fusions = fusions

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        plain: Any = self.plain
        paged: PagedForward | None = others.get("paged")
        if paged is None or paged.attend is None or position_embeddings is None:
            found: tuple[Tensor, Tensor | None] = plain(
                hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **others
            )
            return found
        query, key, value = projected(plain, hidden_states)
        cos, sin = position_embeddings
        layer: int = plain.layer_idx
        self._fusions.place(Heads(query, key, value, cos[0], sin[0], paged.slots, *paged.cache.slots(layer)))
        query, key, value = (one.transpose(0, 1)[None] for one in (query, key, value))
        packed = attended(query, key, value, paged, layer, self._how)
        return plain.o_proj(packed.reshape(*hidden_states.shape[:-1], -1)), None


def projected(plain: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of x [1, tokens, width] before they are rotated: [tokens, heads or KV heads, head size]."""
    query, key, value = (
        projection(x)[0].unflatten(-1, (-1, plain.head_dim))
        for projection in (plain.q_proj, plain.k_proj, plain.v_proj)
    )
    if getattr(plain, "q_norm", None) is not None:
        query, key = plain.q_norm(query), plain.k_norm(key)
    return query, key, value


@dataclass(frozen=True, slots=True)
class _Given:
    """What an attention layer gave its attention function: query, key and value [1, heads, tokens, size]."""

    query: Tensor
    key: Tensor
    value: Tensor
    how: How


@dataclass(slots=True)
class _Probe:
    """What the layers of a model took in one forward, and what attention layers gave when they were called last."""

    taken: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)
    given: dict[nn.Module, _Given] = field(default_factory=dict)

    def called(self, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A hook before a layer's forward. The first argument is what the layer transforms, whatever its name; layers
        that take others by their place are left alone."""
        if len(args) == 1 or (not args and "hidden_states" in named):
            self.taken[layer] = {"hidden_states": args[0]} | named if args else named


def _probe_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    probe: _Probe,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    how = How(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    probe.given[module] = _Given(query.clone(), key.clone(), value.clone(), how)
    return _alone(value[0].transpose(0, 1), query.shape[1])[None], None


def _alone(value: Tensor, heads: int) -> Tensor:
    """Attention as if each token saw itself alone: [tokens, KV heads, size] → [tokens, heads, size]."""
    return value.repeat_interleave(heads // value.shape[1], dim=1)


AttentionInterface.register(PROBE_ATTENTION, _probe_attention)


@torch.inference_mode()
def fuse(model: Any, fusions: Fusions) -> int:
    """Replace what can be replaced in a model with the paged attention; how many layers it was.

    Linear layers over the same input become one, whose weights move. What differs stays; raises what trying raises.
    """
    join(model)
    model.set_attn_implementation(PROBE_ATTENTION)
    try:
        return _replaced(model, _probed(model), fusions)
    finally:
        model.set_attn_implementation(PAGED_ATTENTION)


def _replaced(model: Any, probe: _Probe, fusions: Fusions) -> int:
    count = 0
    for parent, name, child in list(_children(model)):
        made = _norm(child) or _mlp(child, fusions)
        if made is not None and child in probe.taken and _same(made, child, probe.taken[child]):
            setattr(parent, name, made)
            count += 1
    for parent, name, child in list(_children(model)):
        if child in probe.given and child in probe.taken and _places(child, probe, fusions):
            setattr(parent, name, FusedAttention(child, probe.given[child].how, fusions))
            count += 1
    return count


def unfuse(model: Any) -> None:
    """Put the plain layers back, over the joined weights."""
    for parent, name, child in list(_children(model)):
        if isinstance(child, Fused):
            setattr(parent, name, child.plain)


def _probed(model: Any) -> _Probe:
    """One forward over a few tokens, from the window's first position to its last: some models scale their queries by
    it (Ministral 3)."""
    probe = _Probe()
    size, last = model.get_input_embeddings().num_embeddings, model.config.max_position_embeddings - 1
    tokens = [(7919 * index + 13) % size for index in range(PROBED_TOKENS)]
    positions = [index * last // (PROBED_TOKENS - 1) for index in range(PROBED_TOKENS)]
    hooks = [child.register_forward_pre_hook(probe.called, with_kwargs=True) for _, _, child in _children(model)]
    ids, position_ids = torch.tensor([[tokens], [positions]], device=model.device)
    try:
        model(input_ids=ids, position_ids=position_ids, use_cache=False, probe=probe)
    finally:
        for hook in hooks:
            hook.remove()
    return probe


def _children(model: Any) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every module but the model itself, with its parent and its name there."""
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _norm(child: Any) -> Fused | None:
    if "RMSNorm" not in type(child).__name__ or not isinstance(getattr(child, "weight", None), nn.Parameter):
        return None
    epsilon = getattr(child, "variance_epsilon", getattr(child, "eps", None))
    return FusedNorm(child, epsilon) if isinstance(epsilon, float) else None


def _mlp(child: Any, fusions: Fusions) -> Fused | None:
    names = {name for name, _ in child.named_children()}
    return FusedMlp(child, fusions) if {"gate_proj", "up_proj", "down_proj", "act_fn"} <= names else None


def _same(made: Fused, child: nn.Module, taken: dict[str, Any]) -> bool:
    """Whether it makes the same as the plain layer of what that one took."""
    if len(taken) != 1:
        return False
    inputs = [loudness * taken["hidden_states"] for loudness in LOUDNESS]
    return all(_near((made(x),), (child(x),), loudness) for x, loudness in zip(inputs, LOUDNESS, strict=True))


def _places(child: Any, probe: _Probe, fusions: Fusions) -> bool:
    """Whether query, key and value are what the plain layer gives its attention function, and are stored as such; and
    whether nothing but the output's projection comes after it."""
    taken = dict(probe.taken[child])
    x, embeddings = taken.pop("hidden_states"), taken.get("position_embeddings")
    if not _is_standard(child) or not isinstance(embeddings, tuple):
        return False
    cos, sin = embeddings
    slots = torch.arange(PROBED_SLOTS - PROBED_TOKENS, PROBED_SLOTS, device=x.device)
    for loudness in LOUDNESS:
        output = child(loudness * x, **taken)[0]
        given = probe.given[child]
        query, key, value = projected(child, loudness * x)
        keys, values = (query.new_zeros(PROBED_SLOTS, *key.shape[1:]) for _ in range(2))
        fusions.place(Heads(query, key, value, cos[0], sin[0], slots, keys, values))
        ours = [one.transpose(0, 1)[None] for one in (query, key, keys[slots], values[slots], value)]
        plain = [given.query, given.key, given.key, given.value, given.value]
        if not _near(ours, plain, loudness):
            return False
        projection = child.o_proj(_alone(value, query.shape[1]).reshape(*x.shape[:-1], -1))
        if not _near((projection,), (output,), loudness):
            return False
    return True


def _is_standard(child: Any) -> bool:
    """Whether it has the parts of Llama's attention, or of Qwen3's, which normalizes each head of query and key."""
    parts = dict(child.named_children())
    norms = [parts[name] for name in ("q_norm", "k_norm") if name in parts]
    return (
        all(name in parts for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
        and hasattr(child, "head_dim")
        and len(norms) != 1
        and all(sum(one.numel() for one in norm.parameters()) == child.head_dim for norm in norms)
    )


def _near(ours: Sequence[Tensor], plain: Sequence[Tensor], loudness: int) -> bool:
    """Whether each is near its plain version. What is too loud for the plain layer's numbers shows nothing."""
    if loudness > 1 and not all(bool(one.isfinite().all()) for one in plain):
        return True
    return all(_is_near(one, other) for one, other in zip(ours, plain, strict=True))


def _is_near(ours: Tensor, plain: Tensor) -> bool:
    if ours.shape != plain.shape or ours.dtype is not plain.dtype:
        return False
    bound = TOLERANCES.get(plain.dtype, OTHER_TOLERANCE) * float(plain.float().abs().max())
    return bound > 0 and float((ours.float() - plain.float()).abs().max()) <= bound  # zeros would show nothing
