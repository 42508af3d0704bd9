"""Owns how a device, above all a CPU, multiplies by weights that never change; refuses to choose what is computed: each
layer gives what `nn.Linear` gives, but for rounding.

Four ways, each measured in README.md beside this file:

- packed: oneDNN keeps the weights in an order of its own, by two operators that torch's compiler uses and does not
  promise. Where they are missing, fail or differ from the plain layer, the plain layer stays.
- halves: on a CPU that cannot multiply 16-bit numbers, torch takes five times as long as in float32; FBGEMM keeps the
  weights as float16 in an order of its own and makes them float32 in registers, as they are multiplied.
- widened: where FBGEMM is missing, some rows of weights at a time are made float32 and multiplied as such.
- together: layers that read the same input (query, key and value; gate and up) are one multiplication, on a GPU too.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

log = logging.getLogger(__name__)

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbours that transformers' models call on the same input."""

HINT = 32
"""Rows that oneDNN orders the weights for: good for 2 to 256, and at 1 within a few percent of the plain layer; ordered
for 1, everything else is twice as slow."""

SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
"""Rows that oneDNN is given: others are filled up to the next of these, more than the last come in parts. It compiles a
kernel for each number of rows and size of weights, about half a megabyte of them, and keeps a thousand."""

FEW = 4
"""Below so many rows the 16-bit layer is faster as it is than widened."""

SCRATCH_BYTES = 2 * 2**20
"""Of weights in float32 at a time: what stays in a core's second-level cache until it is multiplied."""

SIXTEEN = (torch.bfloat16, torch.float16)

TOLERANCES = {torch.float32: 1e-5}
OTHER_TOLERANCE = 2e-2
"""Of the largest difference from the plain layer, over its largest output: orders of summation explain no more."""

CHECKED_ROWS = (1, 2 * FEW)

Multiply = Callable[[Tensor], Tensor]
"""[…, in] → […, out]."""

Way = Callable[[Tensor, Tensor | None], Multiply]
"""From weights [out, in] and perhaps a bias [out]."""

FAILURES = (RuntimeError, AttributeError, NotImplementedError, TypeError)
"""What a private operator may raise that is gone, changed, or not for this CPU."""


@dataclass(frozen=True, slots=True)
class Packed:
    """oneDNN's multiplication. `weight` is opaque: nothing else can read it."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Packed:
        """Raises one of FAILURES where this CPU or this torch cannot."""
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight, HINT), bias)

    def __call__(self, x: Tensor) -> Tensor:
        out = in_sizes(self._multiplied, x.flatten(0, -2))
        return out.view(*x.shape[:-1], out.shape[-1])

    def _multiplied(self, rows: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return out


def in_sizes(multiply: Multiply, rows: Tensor) -> Tensor:
    """What `multiply` gives for these rows, while it meets no other numbers of rows than SIZES."""
    if len(rows) > SIZES[-1]:
        return torch.cat([in_sizes(multiply, part) for part in torch.split(rows, SIZES[-1])])
    lacking = SIZES[bisect_left(SIZES, len(rows))] - len(rows)
    return multiply(functional.pad(rows, (0, 0, 0, lacking)))[: len(rows)] if lacking else multiply(rows)


@dataclass(frozen=True, slots=True)
class Halves:
    """FBGEMM's multiplication: float16 weights, float32 inputs and sums, and the result rounded once.

    bfloat16 has fewer digits than float16 but more exponents: weights are stored times a power of two, which leaves
    the largest below 2^15, and all those exact that are not 2^31 times smaller. `factor`: [1], its inverse.
    """

    packed: Any
    factor: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Halves:
        """Raises one of FAILURES where this CPU or this torch cannot, and for what is not 16 bits wide."""
        if weight.dtype not in SIXTEEN:
            raise TypeError(f"weights of {weight.dtype} do not fit into float16")
        largest = float(weight.abs().max())
        if not math.isfinite(largest):
            raise RuntimeError("float16 would hide that these weights are broken")
        exponent = 0 if weight.dtype is torch.float16 else min(126, 15 - math.frexp(largest)[1])
        wide = torch.ldexp(weight.float(), torch.tensor(exponent))
        packed = torch.ops.quantized.linear_prepack_fp16(wide, None if bias is None else bias.float())
        return cls(packed, torch.ldexp(torch.ones(1), torch.tensor(-exponent)))

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x * self.factor, self.packed)
        return out.to(x.dtype)


@dataclass(frozen=True, slots=True)
class Widened:
    """Multiplication in float32 by 16-bit weights; the result is rounded once, as in the plain layer."""

    weight: Tensor
    bias: Tensor | None
    scratch: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Widened:
        """Raises one of FAILURES for what is not 16 bits wide."""
        if weight.dtype not in SIXTEEN:
            raise TypeError(f"weights of {weight.dtype} are as wide as they get")
        rows = max(1, min(weight.shape[0], SCRATCH_BYTES // (4 * weight.shape[1])))
        return cls(weight, bias, torch.empty(rows, weight.shape[1]))

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) < FEW:
            return functional.linear(x, self.weight, self.bias)
        wide, step = rows.float(), len(self.scratch)
        out = x.new_empty(len(rows), len(self.weight))
        for begin in range(0, len(self.weight), step):
            part = self.weight[begin : begin + step]
            some = self.scratch[: len(part)].copy_(part)
            if self.bias is None:
                out[:, begin : begin + step] = torch.mm(wide, some.t())
            else:
                out[:, begin : begin + step] = torch.addmm(self.bias[begin : begin + step].float(), wide, some.t())
        return out.view(*x.shape[:-1], -1)


def _plain(weight: Tensor, bias: Tensor | None) -> Multiply:
    """torch's own multiplication, on any device."""
    return partial(functional.linear, weight=weight, bias=bias)


WAYS: tuple[Way, ...] = (Packed.of, Halves.of, Widened.of)
"""The fastest first."""


class FrozenLinear(nn.Module):
    """Stands where an `nn.Linear` stood, and takes and gives the same shapes."""

    def __init__(self, multiply: Multiply, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self._multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x)


@dataclass(slots=True)
class _Group:
    """Layers over the same input. Invariant: what is kept was computed from `of`, and is given out once."""

    multiply: Multiply
    sizes: tuple[int, ...]
    of: Tensor | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def take(self, index: int, x: Tensor) -> Tensor:
        """The output of one of them; the first that is asked computes all."""
        if self.of is not x or index not in self.outputs:
            self.of = x
            self.outputs = dict(enumerate(self.multiply(x).split_with_sizes(self.sizes, -1)))
        output = self.outputs.pop(index)
        if not self.outputs:
            self.of = None
        return output

    def members(self) -> list[FrozenLinear]:
        """One layer for each of the group."""
        return [FrozenLinear(partial(self.take, index), size) for index, size in enumerate(self.sizes)]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` made of a model's linear layers: how many of them, and how many stay plain."""

    way: str
    layers: int
    plain: int


@torch.inference_mode()
def prepare(model: Any, *, ways: Sequence[Way] = WAYS) -> Prepared:
    """Replace the linear layers of a model on a CPU by faster ones; quantized layers stay as they are.

    The weights move: nothing may train, save or tie them afterwards. A layer for which no faster way gives what the
    plain one gives stays as it is; one line in the log tells how many.
    """
    taken, layers, plain = set[str](), 0, 0
    for parent, names in list(_sites(model)):
        linears = [layer for name in names if isinstance(layer := parent.get_submodule(name), nn.Linear)]
        layers += len(linears)
        found = _faster(linears, ways)
        if found is None:
            plain += len(linears)
            continue
        taken.add(type(found).__name__.lower())
        _put(parent, names, found, linears)
    if plain:
        log.info("%d of %d linear layers stay as they are: this CPU or this torch has no faster way", plain, layers)
    return Prepared(" and ".join(sorted(taken)) or "plain", layers, plain)


@torch.inference_mode()
def join(model: Any) -> None:
    """Make one layer of those that read the same input, on any device; quantized ones stay as they are. The weights
    move, as in `prepare`."""
    for parent, names in list(_sites(model)):
        linears = [layer for name in names if isinstance(layer := parent.get_submodule(name), nn.Linear)]
        if len(names) > 1 and (found := _faster(linears, (_plain,))):
            _put(parent, names, found, linears)


@torch.inference_mode()
def copied_bytes(model: Any, dtype: torch.dtype) -> int:
    """What `prepare` adds to the memory of a model of this type: packed, an output layer that is also the embedding is
    stored twice. The model may be on the meta device."""
    output = model.get_output_embeddings()
    if type(output) is not nn.Linear or output.weight is not model.get_input_embeddings().weight:
        return 0
    sample = nn.Linear(HINT, HINT, bias=False, dtype=dtype)
    copies = type(_faster([sample], WAYS)) in (Packed, Halves)
    return int(output.weight.numel() * dtype.itemsize) if copies else 0


def _put(parent: nn.Module, names: Sequence[str], found: Multiply, linears: Sequence[nn.Linear]) -> None:
    """In the place of these layers."""
    sizes = tuple(linear.out_features for linear in linears)
    made = [FrozenLinear(found, sizes[0])] if len(sizes) == 1 else _Group(found, sizes).members()
    for name, module in zip(names, made, strict=True):
        setattr(parent, name, module)


def _sites(model: Any) -> Iterator[tuple[nn.Module, Sequence[str]]]:
    """Every linear layer once: its parent and its name there, or the names of a whole group."""
    for parent in model.modules():
        names = [name for name, child in parent.named_children() if type(child) is nn.Linear]
        for group in TOGETHER:
            if all(name in names for name in group) and _alike([parent.get_submodule(name) for name in group]):
                yield parent, group
                names = [name for name in names if name not in group]
        for name in names:
            yield parent, (name,)


def _alike(linears: Sequence[Any]) -> bool:
    return len({(one.in_features, one.weight.dtype, one.bias is None) for one in linears}) == 1


def _faster(linears: Sequence[nn.Linear], ways: Sequence[Way]) -> Multiply | None:
    """A multiplication that gives all their outputs, one after the other; None where none gives what they give."""
    first = linears[0]
    weight = first.weight if len(linears) == 1 else torch.cat([one.weight.detach() for one in linears])
    biases = [one.bias.detach() for one in linears if one.bias is not None]
    bias = torch.cat(biases) if biases else None
    for way in ways:
        try:
            found = way(weight.detach(), bias)
            if all(_agrees(found, linears, rows) for rows in CHECKED_ROWS):
                return found
        except FAILURES:
            continue
    return None


def _agrees(found: Multiply, linears: Sequence[nn.Linear], rows: int) -> bool:
    """Whether it gives what the plain layers give, on numbers that differ from row to row."""
    weight = linears[0].weight
    numbers = torch.sin(torch.arange(rows * weight.shape[1], dtype=torch.float32, device=weight.device))
    x = numbers.view(1, rows, -1).to(weight.dtype)
    plain = torch.cat([linear(x) for linear in linears], dim=-1).float()
    ours = found(x)
    if ours.dtype is not weight.dtype or ours.shape != plain.shape:
        return False
    bound = TOLERANCES.get(weight.dtype, OTHER_TOLERANCE) * float(plain.abs().max())
    return float((ours.float() - plain).abs().max()) <= bound
