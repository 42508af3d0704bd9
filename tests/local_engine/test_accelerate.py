"""What is tried on a device at start, and what is left of it where it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from local_engine.accelerate import Accelerated, accelerated, ways_of
from local_engine.attention import PAGED_ATTENTION, KvCache
from local_engine.config import Limits
from local_engine.errors import DeviceLost
from local_engine.fused import PROBED_TOKENS, Fused, Fusions, PlainFusions
from local_engine.graphs import Recorder, Replay
from local_engine.paged import Attend, How, Shape, Tables, gathered
from tests.local_engine.test_graphs import Rerun

LIMITS = Limits(num_blocks=16, window=128)
NOT_RECORDED = "recording steps is left out on this device:"
IN_PLACE, RECORDED = "attention in place", "steps of up to 8 rows recorded"


@pytest.fixture(scope="module")
def model(write_model: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        write_model("mistral-window"), dtype=torch.float32, attn_implementation=PAGED_ATTENTION
    ).eval()


def tried(
    model: Any,
    attend: Attend | None,
    recorder: Callable[[], Recorder] | None = Rerun,
    fusions: Fusions | None = None,
) -> Accelerated:
    config = model.config
    sizes = (config.num_key_value_heads, config.head_dim)
    cache = KvCache(
        layers=config.num_hidden_layers,
        num_blocks=LIMITS.num_blocks,
        block_size=16,
        kv_heads=sizes[0],
        head_size=sizes[1],
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    shape = Shape(config.num_attention_heads, *sizes, 16, torch.float32)
    return accelerated(
        model,
        cache,
        shape,
        LIMITS,
        attend=attend,
        fusions=fusions,
        recorder=recorder,
        most_rows=5,
        say=lambda line: None,
    )


def broken(query: Tensor, keys: Tensor, values: Tensor, tables: Tables, how: How) -> Tensor:
    raise TypeError("no such instruction\nand more lines")


def wrong(query: Tensor, keys: Tensor, values: Tensor, tables: Tables, how: How) -> Tensor:
    return gathered(query, keys, values, tables, how) * 1.01


def lost(query: Tensor, keys: Tensor, values: Tensor, tables: Tables, how: How) -> Tensor:
    raise torch.AcceleratorError("an illegal memory access was encountered")


class RightAtFirst:
    """Right in the check over random numbers; over the model's own it is not."""

    def __init__(self) -> None:
        self.slots = 0

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, tables: Tables, how: How) -> Tensor:
        self.slots = max(self.slots, len(keys))
        return gathered(query, keys, values, tables, how) * (1 if len(keys) == self.slots else 2)


def unrecordable(step: Callable[[], Tensor]) -> Replay:
    raise RuntimeError("operation not permitted when stream is capturing")


def stale(step: Callable[[], Tensor]) -> Replay:
    """Never looks at its inputs again."""
    logits = step()
    return lambda: logits


@pytest.mark.parametrize(
    ("attend", "recorder", "ways", "said"),
    [
        (gathered, Rerun, (IN_PLACE, RECORDED), ""),
        (gathered, None, (IN_PLACE,), ""),
        (None, Rerun, (), ""),
        (broken, Rerun, (), "attention in place is left out on this device: TypeError: no such instruction"),
        (wrong, Rerun, (), "attention in place is left out on this device: it computes something else"),
        (RightAtFirst(), Rerun, (), "attention in place is left out on this device: it computes something else"),
        (
            gathered,
            lambda: unrecordable,
            (IN_PLACE,),
            f"{NOT_RECORDED} RuntimeError: operation not permitted when stream is capturing",
        ),
        (
            gathered,
            lambda: stale,
            (IN_PLACE,),
            f"{NOT_RECORDED} it computes something else",
        ),
    ],
)
def test_what_fails_or_differs_is_left_out_with_one_line(
    model: Any,
    attend: Attend | None,
    recorder: Callable[[], Recorder] | None,
    ways: tuple[str, ...],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert tried(model, attend, recorder).ways == ways
    assert [record.getMessage() for record in caplog.records] == ([said] if said else [])


def test_fused_layers_are_kept_where_the_model_computes_the_same_with_them(write_model: Any) -> None:
    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            write_model("mistral-window"), dtype=torch.float32, attn_implementation=PAGED_ATTENTION
        ).eval()

    kept = fresh()
    assert tried(kept, gathered, fusions=PlainFusions()).ways == (IN_PLACE, "9 fused layers", RECORDED)

    class RightAtFirst(PlainFusions):
        """Right over the few tokens of the layers' own check."""

        def gated(self, gate: Tensor, up: Tensor) -> Tensor:
            return super().gated(gate, up) * (1 if len(gate) == PROBED_TOKENS else 2)

    class Broken(PlainFusions):
        def gated(self, gate: Tensor, up: Tensor) -> Tensor:
            raise TypeError("no such instruction")

    for fusions in (RightAtFirst(), Broken()):
        left = fresh()
        assert tried(left, gathered, fusions=fusions).ways == (IN_PLACE, RECORDED)
        assert not any(isinstance(layer, Fused) for layer in left.modules())


def test_a_device_that_is_lost_while_trying_is_no_fallback(model: Any) -> None:
    class Later:
        """Fails once it is over the model's own cache."""

        def __call__(self, query: Tensor, keys: Tensor, values: Tensor, tables: Tables, how: How) -> Tensor:
            return (lost if len(keys) < 1000 else gathered)(query, keys, values, tables, how)

    with pytest.raises(DeviceLost):
        tried(model, Later())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [How(0.25)]),
        ({"sliding_window": 4096}, [How(0.25), How(0.25, 40)]),
        ({"sliding_window": None, "attn_logit_softcapping": 50.0}, [How(0.25, None, 50.0)]),
    ],
)
def test_the_check_attends_in_the_ways_of_the_models_layers(config: dict[str, Any], expected: list[How]) -> None:
    class Config:
        def __init__(self) -> None:
            vars(self).update(config)

    assert ways_of(Config(), 16) == expected
