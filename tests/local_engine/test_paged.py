"""Attention in place over the paged cache: the plain version by hand, and Triton's against the plain one.

Triton's kernels run here in its interpreter, on a CPU, where the package is installed and TRITON_INTERPRET is 1
(`make test-kernels`), and as they are on a GPU.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from local_engine.cuda import TritonAttend
from local_engine.paged import How, Shape, Tables, agrees, difference, gathered

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    TritonAttend is None or not INTERPRETED, reason="needs triton and TRITON_INTERPRET=1: make test-kernels"
)
HOWS = st.builds(How, st.floats(0.05, 2), st.sampled_from([None, 1, 16, 23, 500]), st.sampled_from([None, 5.0]))
LENGTHS = st.lists(st.integers(0, 130), min_size=1, max_size=5).filter(any)


def by_hand(query: Tensor, keys: Tensor, values: Tensor, tables: Tables, how: How) -> list[list[list[float]]]:
    """[tokens][heads][head size], a score at a time."""
    group = query.shape[1] // keys.shape[1]
    out = []
    for token in range(len(query)):
        length, start = int(tables.lengths[token]), int(tables.starts[token])
        first = 0 if how.window is None else max(0, length - how.window)
        slots = [
            int(tables.blocks[start + at // tables.block_size]) * tables.block_size + at % tables.block_size
            for at in range(first, length)
        ]
        heads = []
        for head in range(query.shape[1]):
            scores = [float(query[token, head] @ keys[slot, head // group]) * how.scaling for slot in slots]
            if how.softcap is not None:
                scores = [math.tanh(score / how.softcap) * how.softcap for score in scores]
            weights = [math.exp(score - max(scores)) for score in scores]
            summed = sum(
                (weight * values[slot, head // group] for weight, slot in zip(weights, slots, strict=True)),
                torch.zeros(query.shape[2]),
            )
            heads.append((summed / (sum(weights) or 1.0)).tolist())
        out.append(heads)
    return out


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=3), how=HOWS, kv_heads=st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=30)
def test_the_plain_version_is_attention(lengths: list[int], how: How, kv_heads: int) -> None:
    made = torch.Generator().manual_seed(sum(lengths))
    query = torch.randn(len(lengths), 4, 8, generator=made)
    keys, values = (torch.randn(40, kv_heads, 8, generator=made) for _ in range(2))
    blocks = torch.randperm(10, generator=made)
    starts = torch.tensor([row % 3 for row in range(len(lengths))])
    tables = Tables(blocks, starts, torch.tensor(lengths), max(1, *lengths, 1), block_size=4)
    expected = torch.tensor(by_hand(query, keys, values, tables, how))
    torch.testing.assert_close(gathered(query, keys, values, tables, how), expected, rtol=1e-4, atol=1e-5)


def without_window(query: Tensor, keys: Tensor, values: Tensor, tables: Tables, how: How) -> Tensor:
    return gathered(query, keys, values, tables, How(how.scaling, None, how.softcap))


def uncapped(query: Tensor, keys: Tensor, values: Tensor, tables: Tables, how: How) -> Tensor:
    return gathered(query, keys, values, tables, How(how.scaling, how.window))


def one_short(query: Tensor, keys: Tensor, values: Tensor, tables: Tables, how: How) -> Tensor:
    lengths = (tables.lengths - 1).clamp(min=0)
    return gathered(query, keys, values, Tables(tables.blocks, tables.starts, lengths, tables.longest, 16), how)


def one_far(query: Tensor, keys: Tensor, values: Tensor, tables: Tables, how: How) -> Tensor:
    """Reads one more than is seen, which is not a number."""
    wider = Tables(tables.blocks, tables.starts, tables.lengths + 1, tables.longest + 1, 16)
    return gathered(query, keys, values, wider, how)


def other_type(query: Tensor, keys: Tensor, values: Tensor, tables: Tables, how: How) -> Tensor:
    return gathered(query, keys, values, tables, how).double()


@pytest.mark.parametrize("wrong", [without_window, uncapped, one_short, one_far, other_type])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_at_start_finds_what_is_wrong(wrong: Any, dtype: torch.dtype) -> None:
    shape, hows = Shape(4, 2, 16, 16, dtype), [How(0.5, None, 2.0), How(0.5, 40, 2.0)]
    assert agrees(gathered, shape, hows, CPU)
    assert not agrees(wrong, shape, hows, CPU)


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities that a GPU passes over as well
@given(
    lengths=LENGTHS,
    how=HOWS,
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (8, 1)]),
    size=st.sampled_from([16, 64, 80, 96, 128, 256]),
    processors=st.sampled_from([0, 1, 8]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
def test_the_kernel_computes_what_the_plain_version_does(
    lengths: list[int], how: How, heads: tuple[int, int], size: int, processors: int, dtype: torch.dtype
) -> None:
    """bfloat16 is multiplied on a GPU only: the interpreter takes its bits for whole numbers."""
    assert TritonAttend is not None
    shape = Shape(*heads, size, 16, dtype)
    bound = {torch.float32: 1e-5, torch.float16: 5e-3}[dtype]
    assert difference(TritonAttend(processors), shape, how, CPU, lengths) <= bound


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("processors", [0, 4], ids=["whole", "split"])
def test_a_broken_number_that_is_seen_makes_its_row_broken_and_no_other(processors: int) -> None:
    assert TritonAttend is not None
    query = torch.randn(2, 2, 16)
    keys, values = torch.randn(512, 1, 16), torch.randn(512, 1, 16)
    keys[5] = float("nan")
    tables = Tables(torch.arange(32), torch.tensor([0, 16]), torch.tensor([200, 200]), 200, 16)
    out = TritonAttend(processors)(query, keys, values, tables, How(0.25))
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1], gathered(query, keys, values, tables, How(0.25))[1], rtol=1e-4, atol=1e-5)


@interpreted
def test_what_a_token_sees_is_split_where_programs_are_few_and_only_there() -> None:
    from local_engine.paged_triton import splits_for  # noqa: PLC0415 - needs triton

    assert splits_for(tokens=64, kv_heads=32, processors=132) == 1
    assert splits_for(tokens=1, kv_heads=8, processors=132) == 32
    assert splits_for(tokens=8, kv_heads=8, processors=132) == 8
    assert splits_for(tokens=1, kv_heads=32, processors=132) == 16
    assert splits_for(tokens=1, kv_heads=8, processors=1) == 1
