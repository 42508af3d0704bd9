"""Owns layers that launch few operations where transformers' launch many; refuses what does not give what the plain
layer gives.

A GPU computes a decoding step's small operations faster than they can begin one after the other: normalizing takes
transformers six of them, rotating query and key ten, and each costs about two microseconds even in a recorded step, of
which a step of 32 layers has over a thousand. Each layer is compared with the one that it replaces, on the model's own
numbers or on random ones, and the plain one stays where they differ. The model's own attention, which the self-check
compares with, goes through the plain layers' code as before.
"""

from __future__ import annotations

from collections.abc import Iterator
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

TOLERANCES = {torch.float32: 1e-5}
OTHER_TOLERANCE = 2e-2
"""Of the largest difference from the plain layer, over its largest output: where it is rounded explains no more."""


class Fusions(Protocol):
    """What a device computes in one operation each."""

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) × up, both [rows, size] of any stride between rows → [rows, size]."""

    def place(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """Rotate query [tokens, heads, size] and key [tokens, KV heads, size] in place, by cos and sin [tokens, as many
        of the size's first numbers as are rotated]; store key and value at `slots` [tokens] of keys and values [slots,
        KV heads, size]."""


class PlainFusions:
    """`Fusions` as torch computes them, which others are held against."""

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate.float()).mul_(up.float()).to(gate.dtype)

    def place(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        for one in (query, key):
            part = one[..., : cos.shape[-1]]
            first, second = part.float().chunk(2, dim=-1)
            turned = torch.cat((-second, first), dim=-1)
            part.copy_(part.float() * cos.float()[:, None] + turned * sin.float()[:, None])
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)


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

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self._weight.shape, self._weight, self._epsilon)


class FusedMlp(Fused):
    """down(silu(gate(x)) × up(x)) (Shazeer, "GLU variants improve transformer", 2020)."""

    def __init__(self, plain: Any, fusions: Fusions) -> None:
        super().__init__(plain)
        self._fusions = fusions

    def forward(self, x: Tensor) -> Tensor:
        plain: Any = self.plain
        gate, up = (projection(x).flatten(0, -2) for projection in (plain.gate_proj, plain.up_proj))
        out: Tensor = plain.down_proj(self._fusions.gated(gate, up).view(*x.shape[:-1], -1))
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
        self._fusions.place(query, key, value, cos[0], sin[0], paged.slots, *paged.cache.slots(layer))
        query, key, value = (one.transpose(0, 1)[None] for one in (query, key, value))
        packed = attended(query, key, value, paged, layer, self._how)
        return plain.o_proj(packed.reshape(*hidden_states.shape[:-1], -1)), None


def projected(plain: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of x [1, tokens, width] before they are rotated: [tokens, heads or KV heads, head size]."""
    query, key, value = (
        projection(x)[0].unflatten(-1, (-1, plain.head_dim))
        for projection in (plain.q_proj, plain.k_proj, plain.v_proj)
    )
    if hasattr(plain, "q_norm"):
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
    """What the layers of a model took and gave in one forward."""

    calls: dict[nn.Module, tuple[dict[str, Any], Tensor]] = field(default_factory=dict)
    given: dict[nn.Module, _Given] = field(default_factory=dict)

    def called(self, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """A forward hook. The first argument is what the layer transforms, whatever its name."""
        if args or "hidden_states" in named:
            taken = {"hidden_states": args[0]} | named if args else named
            self.calls[layer] = (taken, output[0] if isinstance(output, tuple) else output)


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
    own = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)  # as if each token saw itself alone
    return own.transpose(1, 2), None


AttentionInterface.register(PROBE_ATTENTION, _probe_attention)


@torch.inference_mode()
def fuse(model: Any, fusions: Fusions) -> int:
    """Replace what can be replaced in a model with the paged attention; how many layers it was.

    Linear layers over the same input become one, whose weights move. What differs stays; raises what trying raises.
    """
    join(model)
    probe = _probed(model)
    count = 0
    for parent, name, child in list(_children(model)):
        made = _norm(child) or _mlp(child, fusions)
        if made is not None and child in probe.calls and _same(made, *probe.calls[child]):
            setattr(parent, name, made)
            count += 1
    for parent, name, child in list(_children(model)):
        if child in probe.given and _places(child, probe.calls[child][0], probe.given[child], fusions):
            setattr(parent, name, FusedAttention(child, probe.given[child].how, fusions))
            count += 1
    return count


def unfuse(model: Any) -> None:
    """Put the plain layers back, over the joined weights."""
    for parent, name, child in list(_children(model)):
        if isinstance(child, Fused):
            setattr(parent, name, child.plain)


def _probed(model: Any) -> _Probe:
    """One forward over a few tokens."""
    probe = _Probe()
    size = model.get_input_embeddings().num_embeddings
    tokens = [(7919 * position + 13) % size for position in range(PROBED_TOKENS)]
    hooks = [child.register_forward_hook(probe.called, with_kwargs=True) for _, _, child in _children(model)]
    model.set_attn_implementation(PROBE_ATTENTION)
    try:
        model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False, probe=probe)
    finally:
        model.set_attn_implementation(PAGED_ATTENTION)
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


def _same(made: Fused, taken: dict[str, Any], gave: Tensor) -> bool:
    """Whether it makes of what the plain layer took what that one gave."""
    return len(taken) == 1 and _near(made(taken["hidden_states"]), gave)


def _places(child: Any, taken: dict[str, Any], given: _Given, fusions: Fusions) -> bool:
    """Whether query, key and value are what the plain layer gives its attention function, and are stored as such."""
    if not all(hasattr(child, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim")):
        return False
    if taken.get("position_embeddings") is None or _normalizes_all_heads_together(child):
        return False
    query, key, value = projected(child, taken["hidden_states"])
    cos, sin = taken["position_embeddings"]
    keys, values = (query.new_zeros(PROBED_SLOTS, *key.shape[1:]) for _ in range(2))
    slots = torch.arange(PROBED_SLOTS - PROBED_TOKENS, PROBED_SLOTS, device=query.device)
    fusions.place(query, key, value, cos[0], sin[0], slots, keys, values)
    ours = (query, key, keys[slots], values[slots], value)
    plain = (given.query, given.key, given.key, given.value, given.value)
    return all(_near(one, other[0].transpose(0, 1)) for one, other in zip(ours, plain, strict=True))


def _normalizes_all_heads_together(child: Any) -> bool:
    return hasattr(child, "q_norm") and next(child.q_norm.parameters()).numel() != child.head_dim


def _near(ours: Tensor, plain: Tensor) -> bool:
    if ours.shape != plain.shape or ours.dtype is not plain.dtype:
        return False
    bound = TOLERANCES.get(plain.dtype, OTHER_TOLERANCE) * float(plain.float().abs().max())
    return bound > 0 and float((ours.float() - plain.float()).abs().max()) <= bound  # zeros would show nothing
