"""What a CUDA device computes, against what it replaces: kernels, recorded steps, sampling, and how often a step waits.

.venv/bin/pytest -m gpu tests/local_engine
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
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
from local_engine.batch import Batch, Chunk
from local_engine.config import Limits, Settings
from local_engine.engine import Engine, Job
from local_engine.fused import Heads, PlainFusions
from local_engine.loading import load
from local_engine.paged import How, Shape, agrees
from local_engine.runner import ModelRunner
from local_engine.sampling import choose
from local_engine.sequence import FinishReason, Pick, SamplingParams, Sequence
from tests.local_engine import plain_sampling
from tests.local_engine.test_runner import GREEDY, Case, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LIMITS = Limits(num_blocks=64, window=256, max_batch_tokens=40, max_running=16)
IN_PLACE, RECORDED = "attention in place", "steps of up to {} rows recorded"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (12, 2), (16, 1)], ids=str)
def test_the_kernel_computes_what_the_plain_version_does(dtype: torch.dtype, size: int, heads: tuple[int, int]) -> None:
    device = torch.device("cuda")
    attend = cuda.attention(device)
    assert attend is not None, "triton is not installed"
    hows = [How(size**-0.5, window, softcap) for window in (None, 40) for softcap in (None, 5.0)]
    assert agrees(attend, Shape(*heads, size, 16, dtype), hows, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "size", "rotated"), [(32, 8, 128, 128), (5, 5, 80, 40), (12, 2, 64, 64)])
def test_fused_operations_compute_what_the_plain_ones_do(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, rotated: int
) -> None:
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    both = torch.randn(7, heads + 2 * kv_heads, size, device="cuda").to(dtype).flatten(1)
    cos, sin = torch.randn(2, 7, rotated, device="cuda").to(dtype)
    slots = torch.randperm(20, device="cuda")[:7]
    found = []
    for fusions in (cuda.fusions(both.device), PlainFusions()):
        assert fusions is not None
        parts = both.clone().split_with_sizes([heads * size, kv_heads * size, kv_heads * size], -1)
        query, key, value = (one.view(7, -1, size) for one in parts)
        keys, values = torch.zeros(2, 20, kv_heads, size, device="cuda", dtype=dtype)
        fusions.place(Heads(query, key, value, cos, sin, slots, keys, values))
        found.append((query, key, value, keys, values, fusions.gated(*both.chunk(2, -1))))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=bound, atol=bound)


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
            fusions=cuda.fusions(self.paged.device),
            recorder=cuda.GraphRecorder,
            most_rows=LIMITS.max_running,
            say=lambda line: None,
        )
        assert found.ways[0] == IN_PLACE and found.ways[-1] == RECORDED.format(16)
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


LOST = """
import torch
from local_engine.config import Settings
from local_engine.errors import DeviceLost
from local_engine.loading import load
from local_engine.batch import Batch, Chunk
from local_engine.sequence import Sequence

runner = load(Settings(model="demo")).runner
batch = Batch(decode=(Chunk(Sequence(id="a", prompt_length=1, tokens=[5], max_tokens=1), 0, (5,), (0,), samples=True),))
runner.forward(batch)
torch.zeros(1, device="cuda")[torch.tensor([7], device="cuda")]  # an assertion on the device
try:
    runner.sample(runner.forward(batch), [0], [])
except DeviceLost as error:
    print("lost:", error)
"""


def test_a_device_that_fails_is_told_as_lost() -> None:
    """In a process of its own, which cannot use the device any more."""
    done = subprocess.run(
        [sys.executable, "-c", LOST],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.stdout.strip() == "lost: the device has failed", done.stderr[-2000:]


def test_with_too_little_memory_batches_get_smaller_and_everyone_is_answered() -> None:
    made = load(Settings(model="demo", kv_cache_tokens=8192, eager=True))
    total = torch.cuda.mem_get_info()[1]
    prompt = tuple(range(4, 204))

    async def run() -> tuple[set[FinishReason | None], int]:
        """How requests ended, and how often a batch was made smaller."""
        changed = asyncio.Event()
        engine = Engine(lambda: made, on_change=changed.set)
        engine.start()
        await changed.wait()
        try:
            params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
            outputs = [engine.add(Job(str(number), (4 + number, *prompt), params)) for number in range(32)]
            ends = {[delta async for deltas in output for delta in deltas][-1].finish for output in outputs}
            engine.scheduler.check()
            return ends, engine.report().shrunk
        finally:
            engine.stop()

    found = []
    for room in (2, 4, 8, 16, 32, 64):  # MiB; which is too little for all at once, and enough for a few, depends
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room * 2**20) / total)
        try:
            found.append(asyncio.run(run()))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert any(ends == {FinishReason.LENGTH} and shrunk for ends, shrunk in found), found
    assert asyncio.run(run()) == ({FinishReason.LENGTH}, 0)


def test_the_bundled_model_is_served_with_all_of_it() -> None:
    description = load(Settings(model="demo", max_running=16)).description
    assert f"{IN_PLACE}, 17 fused layers, {RECORDED.format(256)}" in description
    assert IN_PLACE not in load(Settings(model="demo", max_running=16, eager=True)).description
