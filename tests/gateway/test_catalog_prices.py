"""What is known of models before anyone measures them."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.catalog.prices import DEMO, UNKNOWN, ModelInfo, local_model_info, model_info
from gateway.types import Price

PRICES: dict[str, Any] = {
    "gpt-4o-mini": {
        "input_cost_per_token": 1.5e-07,
        "output_cost_per_token": 6e-07,
        "litellm_provider": "openai",
        "max_input_tokens": 128_000,
        "supports_function_calling": True,
        "supports_vision": True,
    },
    "mistral/small": {"input_cost_per_token": 0, "output_cost_per_token": 0.0, "litellm_provider": "mistral"},
    "gemini-pro": {
        "litellm_provider": "vertex_ai-language-models",
        "max_input_tokens": "8192",
        "supports_vision": "yes",
    },
    "dall-e": {"input_cost_per_token": 1e-06, "litellm_provider": "openai"},
}
GPT = ModelInfo(Price(150.0, 600.0), 128_000, frozenset({"tools", "images"}))


@pytest.mark.parametrize(
    ("model", "info"),
    [
        ("gpt-4o-mini", GPT),
        ("openai/gpt-4o-mini", GPT),
        ("azure/gpt-4o-mini", UNKNOWN),
        ("openai/", UNKNOWN),
        ("openai/gpt-9", UNKNOWN),
        ("small", UNKNOWN),
        ("mistral/small", ModelInfo(Price(0.0, 0.0))),
        ("vertex_ai/gemini-pro", UNKNOWN),
        ("openai/dall-e", UNKNOWN),
    ],
)
def test_a_row_counts_for_its_own_provider_only(model: str, info: ModelInfo) -> None:
    """A number that the map does not state as a number is not known, and half a price is none."""
    assert model_info(model, PRICES) == info


def test_the_bundled_model_is_known_and_other_local_ones_tell_of_themselves() -> None:
    assert local_model_info("demo") == DEMO
    assert local_model_info("Qwen/Qwen3-4B-Instruct-2507") == UNKNOWN
