"""What a CUDA device computes, against what it replaces: kernels, recorded steps, sampling, and how often a step waits.

.venv/bin/pytest -m gpu tests/local_engine
"""

from __future__ import annotations

import random
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from local_engine import cuda
from local_engine.accelerate import accelerated
from local_engine.attention import PAGED_ATTENTION, KvCache
from local_engine.config import Limits, Settings
from local_engine.loading import load
from local_engine.paged import How, Shape, agrees
from local_engine.runner import ModelRunner
from local_engine.sampling import choose
from local_engine.scheduler import Batch, Chunk
from local_engine.sequence import Pick, SamplingParams, Sequence
from tests.local_engine import plain_sampling
from tests.local_engine.test_runner import GREEDY, Case, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LIMITS = Limits(num_blocks=64, window=256, max_batch_tokens=40, max_running=16)
BOTH = ("attention in place", "steps of up to 16 rows recorded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (12, 2), (16, 1)], ids=str)
def test_the_kernel_computes_what_the_plain_version_does(dtype: torch.dtype, size: int, heads: tuple[int, int]) -> None:
    device = torch.device("cuda")
    attend = cuda.attention(device)
    assert attend is not None, "triton is not installed"
    hows = [How(size**-0.5, window, softcap) for window in (None, 40) for softcap in (None, 5.0)]
    assert agrees(attend, Shape(*heads, size, 16, dtype), hows, device)


class OnDevice(Case):
    """`Case` on the device, with all that it is given at start."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.paged: Any = (
            AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=PAGED_ATTENTION)
            .to("cuda")
            .eval()
        )

    def runner(self, num_blocks: int) -> ModelRunner:
        config = self.paged.config
        sizes = (config.num_key_value_heads, config.head_dim)
        cache = KvCache(
            layers=config.num_hidden_layers,
            num_blocks=num_blocks,
            block_size=16,
            kv_heads=sizes[0],
            head_size=sizes[1],
            dtype=torch.float32,
            device=self.paged.device,
        )
        found = accelerated(
            self.paged,
            cache,
            Shape(config.num_attention_heads, *sizes, 16, torch.float32),
            LIMITS,
            attend=cuda.attention(self.paged.device),
            recorder=cuda.GraphRecorder,
            most_rows=LIMITS.max_running,
            say=lambda line: None,
        )
        assert found.ways == BOTH
        return found.runner


@pytest.fixture(scope="module", params=["gemma2", "llama", "mistral-window", "qwen3", "phi3", "granite"])
def case(request: pytest.FixtureRequest, write_model: Any) -> OnDevice:
    return OnDevice(write_model(request.param))


@pytest.mark.parametrize("guessing", [False, True])
def test_in_mixed_batches_it_equals_generate_token_for_token(case: OnDevice, guessing: bool) -> None:
    asked = prompts(5, 40, 1, 90, 17, 16, 33, 2)
    paged, _ = case.paged_all(asked, LIMITS, random.Random(3) if guessing else None)
    assert paged == [case.generated(prompt) for prompt in asked]


def waits(work: Any) -> int:
    """How often the host waited for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # which warns, once, that it is a prototype
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(each.message) for each in told)


def test_a_step_waits_for_the_device_once(case: OnDevice) -> None:
    runner = case.runner(LIMITS.num_blocks)
    sequence = Sequence(id="a", prompt_length=9, tokens=list(range(9)), max_tokens=1)
    decode = tuple(Chunk(sequence, 8, (8,), (row,), samples=True) for row in range(3))
    prompt = Chunk(sequence, 0, tuple(range(8)), (9,), samples=True)
    wild = Pick(
        SamplingParams(
            max_tokens=1, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3, logit_bias=((3, 1.0),), min_p=0.1
        ),
        0.4,
        tokens=[1, 2, 3],
        prompt_length=1,
        banned=frozenset({0}),
        allowed=bytes([255] * 40),
    )
    for batch in (Batch(decode=decode), Batch(decode=decode, prefill=(prompt,))):
        for picks in ([GREEDY] * 3, [GREEDY, wild, Pick(SamplingParams(max_tokens=1), 0.5)]):
            rows = list(range(3))
            runner.sample(runner.forward(batch), rows, picks)  # once, to have made all that is made once
            assert waits(partial(runner.forward, batch)) == 0
            logits = runner.forward(batch)[:3]
            assert waits(partial(runner.sample, logits, rows, picks)) == 1


def test_sampling_chooses_what_the_plain_sampler_chooses_on_a_cpu() -> None:
    made, chance = torch.Generator().manual_seed(5), random.Random(5)
    logits = 3 * torch.randn(64, 4000, generator=made)
    picks = [
        Pick(
            SamplingParams(
                max_tokens=1,
                temperature=chance.choice([0.0, 0.5, 1.0]),
                top_k=chance.choice([0, 40]),
                top_p=chance.choice([1.0, 0.9]),
                min_p=chance.choice([0.0, 0.05]),
                repetition_penalty=chance.choice([1.0, 1.3]),
                frequency_penalty=chance.choice([0.0, 0.4]),
                logit_bias=chance.choice([(), ((7, 5.0),)]),
            ),
            chance.random(),
            tokens=[chance.randrange(4000) for _ in range(50)],
            prompt_length=20,
            allowed=chance.choice([None, chance.randbytes(500)]),
        )
        for _ in range(64)
    ]
    theirs = plain_sampling.choose(logits, picks)
    ours = choose(logits.cuda(), picks)
    # Another order of summation moves a border between two tokens; a draw seldom falls there.
    assert sum(one == other for one, other in zip(ours, theirs, strict=True)) >= 62
    assert ours == choose(logits.cuda(), picks)


def test_the_bundled_model_is_served_with_both() -> None:
    description = load(Settings(model="demo", max_running=16)).description
    assert all(way in description for way in BOTH)
    assert BOTH[0] not in load(Settings(model="demo", max_running=16, eager=True)).description
