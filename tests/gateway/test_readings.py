"""What engines say of themselves: our `/load`, vLLM's `/metrics`."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from gateway.readings import LoadReader, VllmReader
from gateway.snapshot import EngineLoad

LOAD = {
    "version": 1,
    "waiting": 2,
    "running": 3,
    "max_running": 64,
    "queued_prefill_tokens": 700,
    "free_blocks": 90,
    "total_blocks": 100,
    "block_size": 32,
    "prefill_tokens_per_second": 8000.0,
    "decode_tokens_per_second": None,
    "step_ms": 12.5,
    "acceptance": None,
}


def test_our_engines_load() -> None:
    assert LoadReader().read(orjson.dumps(LOAD)) == EngineLoad(2, 3, 700, 90, 100, 32, 8000.0, None, 0.0125, 64)


@pytest.mark.parametrize(
    "changed",
    [{"version": 2}, {"waiting": None}, {"free_blocks": -1}, {"block_size": 0}, {"running": "3"}],
)
def test_what_is_no_load_of_ours_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="/load"):
        LoadReader().read(orjson.dumps(LOAD | changed))


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b"null"])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        LoadReader().read(body)


def metrics(prompt_tokens: float, prefill_s: float, itl_s: float, itl_n: float, cache: str = "kv_cache") -> bytes:
    """What vLLM 0.11 answers, as far as it is looked at, and some of what is not."""
    labels = '{engine="0",model_name="meta-llama/Llama-3.1-8B"}'
    return "\n".join(
        [
            "# HELP vllm:num_requests_running Number of requests in model execution batches.",
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{labels} 4.0",
            f"vllm:num_requests_waiting{labels} 3.0",
            f"vllm:{cache}_usage_perc{labels} 0.25",
            'vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="2000"} 1.0',
            f"vllm:request_prompt_tokens_sum{labels} {prompt_tokens}",
            f"vllm:request_prompt_tokens_count{labels} 10.0",
            'vllm:request_prompt_tokens_bucket{le="1.0",model_name="x"} 7.0',
            f"vllm:request_prefill_time_seconds_sum{labels} {prefill_s}",
            f"vllm:inter_token_latency_seconds_sum{labels} {itl_s}",
            f"vllm:inter_token_latency_seconds_count{labels} {itl_n}",
            "python_gc_objects_collected_total 17.0",
            "vllm:broken",
        ]
    ).encode()


@pytest.mark.parametrize("cache", ["kv_cache", "gpu_cache"])
def test_vllms_counts_and_the_rates_between_two_readings(cache: str) -> None:
    reader = VllmReader()
    first = reader.read(metrics(5000, 1.0, 2.0, 100, cache))
    assert first == EngineLoad(
        waiting=3, running=4, queued_prefill_tokens=1500, free_blocks=1500, total_blocks=2000, block_size=16
    )
    second = reader.read(metrics(9000, 1.5, 2.6, 130, cache))
    assert second.prefill_tokens_per_s == pytest.approx(8000) and second.step_s == pytest.approx(0.02)
    assert second.decode_tokens_per_s == pytest.approx(200)
    third = reader.read(metrics(9000, 1.5, 2.6, 130, cache))
    assert third.prefill_tokens_per_s == pytest.approx(8000) and third.step_s == pytest.approx(0.02), "the last known"


def test_a_restart_of_vllm_does_not_make_rates_of_its_own() -> None:
    reader = VllmReader()
    reader.read(metrics(5000, 1.0, 2.0, 100))
    assert reader.read(metrics(10, 0.1, 0.1, 5)).prefill_tokens_per_s is None


@pytest.mark.parametrize("body", [b"", b"{}", b"go_goroutines 5\n", b"vllm:num_requests_running 1\n", b"\xff\xfe"])
def test_an_address_without_vllms_metrics_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="no metrics of vLLM"):
        VllmReader().read(body)
