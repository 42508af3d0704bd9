"""Cloud models: price, window and capabilities.

Owns the reading of litellm's price map, rows of our own for what it lacks, and the row of the bundled model. Refuses
guesses: what no source states is None or empty, and a price of 0 is no price, since a map says that of what it does
not know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gateway.types import NUSD_PER_USD, Capability, Price

DEMO_MODEL = "demo"
DEMO_WINDOW = 1024  # tokens; local_engine/demo_model is trained with this many positions

_BEYOND = re.compile(r"input_cost_per_token_above_([0-9]+)k_tokens")
_SUPPORTS: Mapping[str, Capability] = {
    "supports_function_calling": "tools",
    "supports_vision": "images",
    "supports_response_schema": "schema",
}


OWN_ROWS: Mapping[str, Mapping[str, Any]] = {
    "anthropic/claude-3-sonnet-20240229": {
        "input_cost_per_token": 3e-06,
        "output_cost_per_token": 1.5e-05,
        "max_input_tokens": 200_000,
        "supports_function_calling": True,
        "supports_vision": True,
        "source": "https://www.anthropic.com/news/claude-3-family, 2024-03; retired by Anthropic on 2025-07-21",
    },
    "cohere/command": {
        "input_cost_per_token": 1e-06,
        "output_cost_per_token": 2e-06,
        "max_input_tokens": 4096,
        "source": "https://docs.cohere.com/docs/command-beta (4k window; deprecated 2025-09-15); price as litellm has "
        "it for command-nightly, 2026-11",
    },
}
"""In litellm's own form, for models that its map does not have under their provider."""


COMPARED: Mapping[str, str] = {
    "gpt-4": "openai/gpt-4",
    "gpt-3.5-turbo": "openai/gpt-3.5-turbo",
    "claude-3-sonnet": "anthropic/claude-3-sonnet-20240229",
    "command": "cohere/command",
    "gpt-5.4": "openai/gpt-5.4",
    "gpt-5.4-mini": "openai/gpt-5.4-mini",
    "gpt-4o-mini": "openai/gpt-4o-mini",
    "claude-sonnet-4-6": "anthropic/claude-sonnet-4-6",
    "claude-haiku-4-5": "anthropic/claude-haiku-4-5",
    "command-a": "cohere_chat/command-a-03-2025",
    "mistral-small": "mistral/mistral-small-latest",
}
"""Cloud models that a plan is compared with unless told otherwise: those that policies started with, and successors."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model; `window` in tokens. None and the empty set mean that no source says; `source` is where
    the price is from."""

    price: Price | None = None
    window: int | None = None
    capabilities: frozenset[Capability] = frozenset()
    source: str = ""


UNKNOWN = ModelInfo()
DEMO = ModelInfo(window=DEMO_WINDOW, capabilities=frozenset({"schema"}))
LOCAL = ModelInfo(capabilities=frozenset({"schema", "tools"}))


def local_model_info(model: str) -> ModelInfo:
    """What is known of a model that our own engine serves. Only the bundled one is known before the engine has read
    its files; of any other, its capabilities are the most that it may have."""
    return DEMO if model == DEMO_MODEL else LOCAL


def model_info(model: str, price_map: Mapping[str, Any]) -> ModelInfo:
    """What litellm's price map (https://models.litellm.ai) says of `PROVIDER/MODEL`.

    The map names some models with their provider and some without: a row without it counts only where its
    `litellm_provider` is the one asked for, since the same model costs something else elsewhere. Models under their
    bare name are found as they are.
    """
    row = price_map.get(model)
    provider, _, bare = model.partition("/")
    if row is None and bare and (candidate := price_map.get(bare)) is not None:
        owner = candidate.get("litellm_provider", "")
        row = candidate if owner == provider or owner.startswith(f"{provider}-") else None
    if row is None:
        own = OWN_ROWS.get(model)
        return UNKNOWN if own is None else _of_row(own, own["source"])
    return _of_row(row, "litellm's price map")


def _of_row(row: Mapping[str, Any], source: str) -> ModelInfo:
    price = _price(row)
    thresholds = sorted(int(found[1]) for key in row if (found := _BEYOND.fullmatch(key)))
    if price is not None and thresholds:
        beyond = _price(row, f"_above_{thresholds[0]}k_tokens")
        price = price if beyond is None else replace(price, beyond=(thresholds[0] * 1000, beyond))
    window = row.get("max_input_tokens")
    return ModelInfo(
        price=price,
        window=window if isinstance(window, int) and window > 0 else None,
        capabilities=frozenset(capability for key, capability in _SUPPORTS.items() if row.get(key) is True),
        source=source if price is not None else "",
    )


def _price(row: Mapping[str, Any], tier: str = "") -> Price | None:
    """The price of a tier; None where input or output lacks a number, or both are 0."""
    paid, made, cached = (
        cost if isinstance(cost := row.get(f"{name}{tier}"), int | float) and cost >= 0 else None
        for name in ("input_cost_per_token", "output_cost_per_token", "cache_read_input_token_cost")
    )
    if paid is None or made is None or not (paid or made):
        return None
    read = per_token_nusd(cached) if cached is not None and cached < paid else None
    return Price(per_token_nusd(paid), per_token_nusd(made), read)


def per_token_nusd(usd_per_token: float) -> float:
    """Nano-dollars a token. Rounded to 10^-15 USD: 1.5e-07 USD are 150 nusd, and not 150.00000000000003."""
    return round(usd_per_token * NUSD_PER_USD, 6)
