"""Fused layers: what they replace, what they leave, and that nothing else is computed. Triton's kernels as in
`test_paged.py`."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from local_engine.attention import PAGED_ATTENTION, KvCache
from local_engine.batch import Batch, Chunk
from local_engine.config import Limits
from local_engine.cuda import TritonFusions
from local_engine.fused import Fused, FusedAttention, FusedMlp, FusedNorm, Heads, PlainFusions, fuse, unfuse
from local_engine.runner import ModelRunner
from local_engine.sequence import Sequence
from tests.local_engine.test_graphs import InPlace, Recorded
from tests.local_engine.test_paged import interpreted
from tests.local_engine.test_runner import prompts
from tests.tiny_models import tiny_model

LIMITS = Limits(num_blocks=64, window=256, max_batch_tokens=40, max_running=8)
FUSED = {  # of two layers: norms (with the last one), feed-forward parts, attention
    "llama": (5, 2, 2),
    "mistral-window": (5, 2, 2),
    "qwen2": (5, 2, 2),
    "qwen3": (9, 2, 2),
    "smollm3": (5, 2, 1),  # one layer does not rotate
    "ministral3": (5, 2, 0),  # scales queries far into a text
    "bitnet": (9, 0, 0),  # norms before the output's projections
    "olmo": (0, 2, 0),  # clips query, key and value
    "olmo2": (9, 2, 0),  # normalizes query and key across heads
    "gemma2": (0, 0, 2),  # norms add 1 to their weights; another activation
    "phi3": (5, 0, 0),  # projections are one layer already
    "phi": (0, 0, 0),
    "starcoder2": (0, 0, 2),
}


def paged(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=PAGED_ATTENTION
    ).eval()


def counted(model: Any) -> tuple[int, ...]:
    return tuple(
        sum(isinstance(one, kind) for one in model.modules()) for kind in (FusedNorm, FusedMlp, FusedAttention)
    )


@pytest.mark.parametrize("kind", FUSED)
def test_what_is_the_same_is_replaced_and_nothing_else(kind: str, write_model: Any) -> None:
    model = paged(write_model(kind))
    assert fuse(model, PlainFusions()) == sum(FUSED[kind])
    assert counted(model) == FUSED[kind]
    unfuse(model)
    assert not any(isinstance(one, Fused) for one in model.modules())


class FusedCase(Recorded):
    """Decoding in place, recorded, with fused layers."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.paged = paged(directory)
        assert fuse(self.paged, PlainFusions())


class FusedInPlace(InPlace):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.paged = paged(directory)
        assert fuse(self.paged, PlainFusions())


@pytest.mark.parametrize("kind", ["gemma2", "llama", "ministral3", "mistral-window", "qwen3", "smollm3"])
@pytest.mark.parametrize("case", [FusedCase, FusedInPlace])
def test_in_mixed_batches_it_equals_generate_token_for_token(kind: str, case: Any, write_model: Any) -> None:
    made = case(write_model(kind))
    asked = prompts(5, 40, 1, 90, 17, 16, 33, 2)
    expected = [made.generated(prompt) for prompt in asked]
    assert made.paged_all(asked, LIMITS)[0] == expected
    assert made.paged_all(asked, LIMITS, random.Random(3))[0] == expected


def test_without_attention_in_place_the_plain_layer_computes(write_model: Any) -> None:
    case = FusedInPlace(write_model("llama"))
    plain = ModelRunner(case.paged, case.runner(64).cache)
    case.runner = lambda num_blocks: plain  # type: ignore[method-assign]
    asked = prompts(5, 40, 17)
    assert case.paged_all(asked, LIMITS)[0] == [case.generated(prompt) for prompt in asked]


def test_a_layer_without_tokens_gives_none(write_model: Any) -> None:
    """An expert that no token chose."""
    model = paged(write_model("llama"))
    fuse(model, PlainFusions())
    layer = next(one for one in model.modules() if isinstance(one, FusedMlp))
    assert layer(torch.zeros(0, 64)).shape == (0, 64)


class Wrong(PlainFusions):
    """One of its operations is a little off."""

    def __init__(self, which: str) -> None:
        self.which = which

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().gated(gate, up) * (1.001 if self.which == "gated" else 1)

    def place(self, heads: Heads) -> None:
        super().place(heads)
        named = {"query": heads.query, "key": heads.key, "stored key": heads.keys, "stored value": heads.values}
        for name, one in named.items():
            if name == self.which:
                one[-1, -1] += 0.01


@pytest.mark.parametrize(
    ("which", "left"),
    [
        ("gated", (5, 0, 2)),
        ("query", (5, 2, 0)),
        ("key", (5, 2, 0)),
        ("stored key", (5, 2, 0)),
        ("stored value", (5, 2, 0)),
    ],
)
def test_what_differs_stays_plain(which: str, left: tuple[int, ...], write_model: Any) -> None:
    model = paged(write_model("llama"))
    fuse(model, Wrong(which))
    assert counted(model) == left


VIEWS = {"expand", "flatten", "select", "slice", "split_with_sizes", "transpose", "unflatten", "unsqueeze", "view"}


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that compute; what a fusion does is one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.fusing = False

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operation.overloadpacket.__name__ not in VIEWS and not self.fusing
        return operation(*args, **(kwargs or {}))

    def one(self, name: str, *args: Any) -> Any:
        self.count += 1
        self.fusing = True
        try:
            return getattr(PlainFusions(), name)(*args)
        finally:
            self.fusing = False


class Counting(PlainFusions):
    def __init__(self, launches: Launches) -> None:
        self.gated = partial(launches.one, "gated")  # type: ignore[method-assign]
        self.place = partial(launches.one, "place")  # type: ignore[method-assign]


def launched(layers: int, *, fused: bool) -> int:
    """How many operations a step of a Llama of so many layers launches."""
    model = tiny_model("llama", num_hidden_layers=layers).to(torch.bfloat16).eval()
    model.set_attn_implementation(PAGED_ATTENTION)
    launches = Launches()
    if fused:
        fuse(model, Counting(launches))
    launches.count = 0
    cache = KvCache(
        layers=layers,
        num_blocks=1,
        block_size=16,
        kv_heads=2,
        head_size=16,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    batch = Batch(
        decode=(Chunk(Sequence(id="a", prompt_length=1, tokens=[5], max_tokens=1), 0, (5,), (0,), samples=True),)
    )
    with launches:
        ModelRunner(model, cache, lambda query, *_: query.relu()).forward(batch)
    return launches.count


def test_a_layer_of_llama_launches_a_third_of_the_operations() -> None:
    plain, fused = (launched(3, fused=fused) - launched(2, fused=fused) for fused in (False, True))
    assert 3 * fused <= plain, (plain, fused)


DTYPES = st.sampled_from([torch.float32, torch.float16])


def near(ours: Tensor, plain: Tensor) -> None:
    bound = 1e-5 if plain.dtype is torch.float32 else 2e-3
    torch.testing.assert_close(ours, plain, rtol=bound, atol=bound)


@interpreted
@given(rows=st.integers(1, 4), size=st.sampled_from([1, 100, 1024, 1500]), apart=st.integers(0, 9), dtype=DTYPES)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
def test_the_gate_kernel_computes_what_the_plain_version_does(
    rows: int, size: int, apart: int, dtype: torch.dtype
) -> None:
    assert TritonFusions is not None
    both = (4 * torch.randn(rows, 2 * size + apart, generator=torch.Generator().manual_seed(size))).to(dtype)
    gate, up = both[:, :size], both[:, size + apart :]
    near(TritonFusions().gated(gate, up), PlainFusions().gated(gate, up))


@interpreted
@given(
    tokens=st.integers(1, 4),
    heads=st.sampled_from([(1, 1), (4, 4), (12, 2), (9, 3)]),
    size=st.sampled_from([16, 80, 128]),
    share=st.sampled_from([1.0, 0.5]),
    dtype=DTYPES,
)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
def test_the_kernel_that_rotates_and_stores_does_what_the_plain_version_does(
    tokens: int, heads: tuple[int, int], size: int, share: float, dtype: torch.dtype
) -> None:
    assert TritonFusions is not None
    made = torch.Generator().manual_seed(size + tokens)
    both = torch.randn(tokens, sum(heads) + heads[1], size, generator=made).to(dtype).flatten(1)
    widths = [count * size for count in (*heads, heads[1])]
    cos, sin = (torch.randn(tokens, int(size * share), generator=made).to(dtype) for _ in range(2))
    slots = torch.randperm(tokens + 3, generator=made)[:tokens]
    found = []
    for fusions in (TritonFusions(), PlainFusions()):
        query, key, value = (one.view(tokens, -1, size) for one in both.clone().split_with_sizes(widths, -1))
        keys, values = torch.zeros(2, tokens + 3, heads[1], size, dtype=dtype)
        fusions.place(Heads(query, key, value, cos, sin, slots, keys, values))
        found.append((query, key, value, keys, values))
    for ours, plain in zip(*found, strict=True):
        near(ours, plain)
