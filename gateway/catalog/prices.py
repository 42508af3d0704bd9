"""Cloud models: price, window and capabilities.

Owns the reading of litellm's price map and the row of the bundled model. Refuses guesses: what no source states is
None or empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.types import NUSD_PER_USD, Capability, Price

DEMO_MODEL = "demo"
DEMO_WINDOW = 1024  # tokens; local_engine/demo_model is trained with this many positions

_SUPPORTS: Mapping[str, Capability] = {
    "supports_function_calling": "tools",
    "supports_vision": "images",
    "supports_response_schema": "schema",
}


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model; `window` in tokens. None and the empty set mean that no source says."""

    price: Price | None = None
    window: int | None = None
    capabilities: frozenset[Capability] = frozenset()


UNKNOWN = ModelInfo()
DEMO = ModelInfo(window=DEMO_WINDOW)


def local_model_info(model: str) -> ModelInfo:
    """What is known of a model that our own engine serves. Only the bundled one is known before the engine has read
    its files."""
    return DEMO if model == DEMO_MODEL else UNKNOWN


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
    return UNKNOWN if row is None else _of_row(row)


def _of_row(row: Mapping[str, Any]) -> ModelInfo:
    costs: list[Any] = [row.get("input_cost_per_token"), row.get("output_cost_per_token")]
    priced = all(isinstance(cost, int | float) and cost >= 0 for cost in costs)
    window = row.get("max_input_tokens")
    return ModelInfo(
        price=Price(*map(per_token_nusd, costs)) if priced else None,
        window=window if isinstance(window, int) and window > 0 else None,
        capabilities=frozenset(capability for key, capability in _SUPPORTS.items() if row.get(key) is True),
    )


def per_token_nusd(usd_per_token: float) -> float:
    """Nano-dollars a token. Rounded to 10^-15 USD: 1.5e-07 USD are 150 nusd, and not 150.00000000000003."""
    return round(usd_per_token * NUSD_PER_USD, 6)
