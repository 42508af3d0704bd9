"""Faster linear layers give what the plain ones give, or are not used."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from local_engine import linear
from local_engine.linear import WAYS, FrozenLinear, Halves, Multiply, Way, Widened, copied_bytes, prepare
from tests.tiny_models import tiny_model

IN, OUT = 96, 160


class Block(nn.Module):
    """A layer that reads one input three times and another twice, as a Llama's does, and one alone."""

    def __init__(self, dtype: torch.dtype, *, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        for name, out in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32), ("gate_proj", 80), ("up_proj", 80)):
            setattr(self, name, nn.Linear(IN, out, bias=bias, dtype=dtype))
        self.head = nn.Linear(IN, OUT, bias=bias, dtype=dtype)

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        names = ("q_proj", "k_proj", "v_proj")
        found = [self.get_submodule(name)(x) for name in names]
        return [*found, self.get_submodule("gate_proj")(y), self.get_submodule("up_proj")(y), self.head(x + y)]


def plainly(weight: Tensor, bias: Tensor | None) -> Multiply:
    """A way that every machine has."""
    return lambda x: functional.linear(x, weight, bias)


def inputs(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows)
    return torch.randn(1, rows, IN).to(dtype), torch.randn(1, rows, IN).to(dtype)


@pytest.mark.parametrize(
    "ways", [WAYS, (Halves.of, Widened.of), (Widened.of,), (plainly,)], ids=["all", "halves", "widened", "plain"]
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_every_layer_gives_what_it_gave(dtype: torch.dtype, bias: bool, ways: Sequence[Way]) -> None:
    plain, ours = Block(dtype, bias=bias), Block(dtype, bias=bias)
    prepare(ours, ways=ways)
    for rows in (0, 1, 2, 3, 4, 5, 33, 64, 65, 200):
        for expected, found in zip(plain(*inputs(rows, dtype)), ours(*inputs(rows, dtype)), strict=True):
            assert found.dtype is dtype
            tolerance = 1e-5 if dtype is torch.float32 else 2e-2
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_all_layers_of_a_block_are_replaced_and_the_log_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    block = Block(torch.float32, bias=False)
    with caplog.at_level(logging.INFO):
        found = prepare(block, ways=(plainly,))
    assert (found.layers, found.plain) == (6, 0)
    assert all(type(child) is FrozenLinear for child in block.children())
    assert not caplog.records


@torch.inference_mode()
def test_layers_that_read_one_input_are_one_multiplication() -> None:
    calls: list[int] = []

    def counted(weight: Tensor, bias: Tensor | None) -> Multiply:
        def multiply(x: Tensor) -> Tensor:
            calls.append(len(weight))
            return functional.linear(x, weight, bias)

        return multiply

    block = Block(torch.float32, bias=False)
    prepare(block, ways=(counted,))
    calls.clear()
    block(*inputs(2, torch.float32))
    assert calls == [128, 160, OUT]


@torch.inference_mode()
def test_a_neighbour_that_is_called_on_something_else_computes_its_own() -> None:
    """A layer of a group alone, in another order, twice, and after another input."""
    plain, ours = Block(torch.float32, bias=False), Block(torch.float32, bias=False)
    prepare(ours, ways=(plainly,))
    x, y = inputs(3, torch.float32)
    for name, given in (("v_proj", x), ("q_proj", y), ("q_proj", y), ("k_proj", x), ("v_proj", x), ("v_proj", y)):
        torch.testing.assert_close(ours.get_submodule(name)(given), plain.get_submodule(name)(given))


def test_neighbours_of_different_widths_are_not_joined() -> None:
    block = Block(torch.float32, bias=False)
    block.k_proj = nn.Linear(IN // 2, 32, bias=False)
    assert prepare(block, ways=(plainly,)).layers == 6


def gone(weight: Tensor, bias: Tensor | None) -> Multiply:
    raise AttributeError("no such operator")


def wrong(weight: Tensor, bias: Tensor | None) -> Multiply:
    return lambda x: functional.linear(x, weight, bias) * 1.1


def changed(weight: Tensor, bias: Tensor | None) -> Multiply:
    def multiply(x: Tensor) -> Tensor:
        raise TypeError("another signature")

    return multiply


def other(weight: Tensor, bias: Tensor | None) -> Multiply:
    return lambda x: functional.linear(x, weight, bias).double()


@pytest.mark.parametrize("way", [gone, wrong, changed, other])
def test_an_operator_that_is_gone_wrong_or_changed_leaves_plain_layers_and_one_line(
    way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    block = Block(torch.float32, bias=False)
    with caplog.at_level(logging.INFO, logger=linear.__name__):
        assert prepare(block, ways=(way,)) == linear.Prepared("plain", 6, 6)
    assert all(type(child) is nn.Linear for child in block.children())
    assert [record.getMessage() for record in caplog.records] == [
        "6 of 6 linear layers stay as they are: this CPU or this torch has no faster way"
    ]


def test_where_a_cpu_cannot_multiply_16_bits_weights_are_widened() -> None:
    assert prepare(Block(torch.bfloat16, bias=True), ways=(gone, gone, Widened.of)) == linear.Prepared("widened", 6, 0)


@torch.inference_mode()
def test_weights_that_float16_holds_times_a_power_of_two_are_multiplied_exactly_whatever_their_size() -> None:
    """One weight a row, so that nothing is summed; float16 alone would lose the small ones and clamp the large ones."""
    for size in (2.0**-60, 1.0, 2.0**60):
        values = torch.tensor([1.0, -1.9921875, 2.0**-30, 1.5 * 2.0**-20, 0.0]).mul(size).bfloat16()
        x = torch.eye(len(values), dtype=torch.bfloat16)
        try:
            found = Halves.of(torch.diag(values), None)
        except linear.FAILURES:
            pytest.skip("this CPU has no FBGEMM")
        assert found(x).equal(torch.diag(values))


@torch.inference_mode()
def test_broken_weights_are_not_hidden_by_being_stored_otherwise() -> None:
    for broken in (float("inf"), float("nan")):
        with pytest.raises(linear.FAILURES):
            Halves.of(torch.full((16, 16), broken, dtype=torch.bfloat16), None)


@torch.inference_mode()
def test_onednn_meets_few_numbers_of_rows() -> None:
    """It compiles a kernel for each, and keeps them."""
    met: set[int] = set()

    class Counted:
        def __init__(self, weight: Tensor) -> None:
            self.weight = weight

        def __call__(self, rows: Tensor) -> Tensor:
            met.add(len(rows))
            return functional.linear(rows, self.weight)

    multiply = Counted(torch.randn(OUT, IN))
    for rows in range(1, 300):
        x = torch.randn(rows, IN)
        torch.testing.assert_close(linear.in_sizes(multiply, x), functional.linear(x, multiply.weight))
    assert met == {*linear.SIZES}


@torch.inference_mode()
def test_widening_takes_weights_of_any_size_in_pieces() -> None:
    torch.manual_seed(1)
    weight, bias = torch.randn(1500, 700).bfloat16(), torch.randn(1500).bfloat16()
    x = torch.randn(2, 5, 700).bfloat16()
    widened = Widened.of(weight, bias)
    assert len(weight) > len(widened.scratch)
    exact = functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(widened(x).double(), exact, rtol=2**-8, atol=2**-8)


class Quantized(nn.Linear):
    """A kind of linear layer that stores its weights in its own way."""


def test_layers_of_another_kind_stay() -> None:
    block = Block(torch.float32, bias=False)
    block.head = Quantized(IN, OUT)
    assert prepare(block, ways=(plainly,)).layers == 5
    assert type(block.head) is Quantized


@pytest.mark.parametrize("tied", [False, True])
def test_packing_takes_memory_only_for_an_output_layer_that_is_the_embedding_too(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    head = model.get_output_embeddings().weight
    said = copied_bytes(model, torch.float32)
    if prepare(model).way == "plain":
        assert said == 0
    else:
        assert said == (head.numel() * 4 if tied else 0)
