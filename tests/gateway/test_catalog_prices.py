"""What is known of models before anyone measures them."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.catalog.prices import DEMO, UNKNOWN, ModelInfo, local_model_info, model_info
from gateway.loading import litellm_price_map
from gateway.types import Price, Usage

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
    "mistral/large": {
        "input_cost_per_token": 2e-6,
        "output_cost_per_token": 0,
        "cache_read_input_token_cost": 2e-7,
        "max_input_tokens": 131_072,
    },
    "mistral/odd": {"input_cost_per_token": 2e-6, "output_cost_per_token": 1, "cache_read_input_token_cost": 3e-6},
    "gemini-pro": {
        "litellm_provider": "vertex_ai-language-models",
        "max_input_tokens": "8192",
        "supports_vision": "yes",
    },
    "dall-e": {"input_cost_per_token": 1e-06, "litellm_provider": "openai"},
}
MAP = "litellm's price map"
GPT = ModelInfo(Price(150.0, 600.0), 128_000, frozenset({"tools", "images"}), MAP)


@pytest.mark.parametrize(
    ("model", "info"),
    [
        ("gpt-4o-mini", GPT),
        ("openai/gpt-4o-mini", GPT),
        ("azure/gpt-4o-mini", UNKNOWN),
        ("openai/", UNKNOWN),
        ("openai/gpt-9", UNKNOWN),
        ("small", UNKNOWN),
        ("mistral/small", UNKNOWN),
        ("mistral/large", ModelInfo(Price(2000.0, 0.0, 200.0), 131_072, source=MAP)),
        ("mistral/odd", ModelInfo(Price(2000.0, 1e9), source=MAP)),
        ("vertex_ai/gemini-pro", UNKNOWN),
        ("openai/dall-e", UNKNOWN),
    ],
)
def test_a_row_counts_for_its_own_provider_only(model: str, info: ModelInfo) -> None:
    """A number that the map does not state as a number is not known, half a price is none, a price of 0 is none, and
    a cached prompt that costs more than a fresh one is a slip of the map."""
    assert model_info(model, PRICES) == info


def test_the_bundled_model_is_known_and_other_local_ones_tell_of_themselves() -> None:
    assert local_model_info("demo") == DEMO
    assert local_model_info("Qwen/Qwen3-4B-Instruct-2507") == ModelInfo(capabilities=frozenset({"schema", "tools"}))


def test_a_long_prompt_has_a_price_of_its_own() -> None:
    """All tokens of the request cost it; up to the limit none do."""
    price = Price(1.0, 10.0, 0.5, beyond=(100, Price(2.0, 20.0, 1.0)))
    assert price.cost(Usage(100, 1, cached_tokens=50)) == price.of(100, 1) - 25 == 85
    assert price.cost(Usage(101, 1)) == price.of(101, 1) == 222
    assert price.cost(Usage(101, 1, cached_tokens=50)) == 172


@pytest.mark.parametrize(
    ("model", "price", "window"),
    [
        ("openai/gpt-4", Price(30_000, 60_000), 8192),
        ("openai/gpt-3.5-turbo", Price(500, 1500), 16385),
        ("openai/gpt-4o-mini", Price(150, 600, 75), 128_000),
        ("openai/gpt-5.4", Price(2500, 15_000, 250, (272_000, Price(5000, 22_500, 500))), 1_050_000),
        ("anthropic/claude-3-sonnet-20240229", Price(3000, 15_000), 200_000),
        ("cohere/command", Price(1000, 2000), 4096),
    ],
)
def test_the_models_that_policies_start_with_are_priced(model: str, price: Price, window: int) -> None:
    """From the installed map, or from rows of our own, which state their source."""
    info = model_info(model, litellm_price_map())
    assert (info.price, info.window) == (price, window)
    assert info.source
