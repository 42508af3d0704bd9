"""Settings and limits."""

from __future__ import annotations

from typing import Any

import pytest

from local_engine.config import BLOCK_SIZE, Settings, kv_cache_tokens, limits
from local_engine.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": ""}, "--model"),
        ({"dtype": "float16"}, "--dtype"),
        ({"quantization": "int3"}, "--quantization"),
        ({"threads": 0}, "--threads"),
        ({"drain_seconds": float("nan")}, "--drain-seconds"),
        ({"drain_seconds": float("inf")}, "--drain-seconds"),
        ({"kv_cache_tokens": 1}, "--kv-cache-tokens"),
        ({"max_batch_tokens": 0, "max_running": 0}, "--max-running"),
        ({"max_batch_tokens": 32, "max_running": 64}, "--max-batch-tokens must be at least --max-running"),
        ({"max_waiting_tokens": 0}, "--max-waiting-tokens"),
        ({"drain_seconds": -1.0}, "--drain-seconds"),
        ({"speculation": "fast"}, "--speculation must be one of off, prompt_lookup, draft"),
        ({"model": "a/b", "speculation": "draft"}, "--speculation draft needs --draft-model"),
        ({"speculation": "prompt_lookup", "draft_model": "a/b"}, "--draft-model is for --speculation draft"),
        ({"speculation_tokens": 0}, "--speculation-tokens"),
        ({"speculation_max_running": 0}, "--speculation-max-running"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_flag(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(**({"model": "demo"} | changes))
    assert said in str(caught.value)


def test_all_wrong_settings_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(model="demo", dtype="x", threads=0, default_max_tokens=0)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(("served", "name"), [(None, "demo"), ("local", "local")])
def test_the_served_name_is_the_models_unless_given(served: str | None, name: str) -> None:
    assert Settings(model="demo", served_name=served).name == name


@pytest.mark.parametrize(
    ("asked", "window", "free_bytes", "expected"),
    [
        (None, 1024, 10**9, 16 * 1024),  # a small model: sixteen windows
        (None, 131_072, 10**9, 10**9 // 1000),  # a large one: what memory holds
        (None, 1024, 0, 2 * BLOCK_SIZE),  # never nothing
        (4096, 1024, 0, 4096),  # what the operator says
    ],
)
def test_the_kv_cache_follows_the_operator_then_windows_then_memory(
    asked: int | None, window: int, free_bytes: int, expected: int
) -> None:
    settings = Settings(model="demo", kv_cache_tokens=asked)
    assert kv_cache_tokens(settings, window=window, bytes_per_token=1000, free_bytes=free_bytes) == expected


def test_a_whole_window_may_always_wait() -> None:
    assert (
        limits(Settings(model="demo", max_waiting_tokens=10), window=512, kv_cache_tokens=1024).max_waiting_tokens
        == 512
    )


@pytest.mark.parametrize(("cached", "capacity"), [(100, 96), (4096, 512)])
def test_one_sequence_may_reach_the_window_or_the_cache_if_that_is_smaller(cached: int, capacity: int) -> None:
    assert limits(Settings(model="demo"), window=512, kv_cache_tokens=cached).capacity == capacity
