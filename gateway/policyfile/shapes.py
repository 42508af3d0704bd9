"""The shapes of the deployments file: which keys there are. The policy's are in `language`, values in `values`.

Owns what a shape is. A key is never required by pydantic, so that what is left of an entry after its wrong values have
been taken out can still be looked at; `missing` in `entries` asks for it afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from gateway.policyfile.values import (
    Count,
    Dollars,
    PositiveDollars,
    Pue,
    Rate,
    Seconds,
    Share,
    ShareAYear,
    Text,
    Title,
    Tokens,
    Version,
    Volume,
    Word,
    Words,
    Years,
)
from gateway.types import BackendKind, Capability, LoadKind


class Shape(BaseModel):
    """A mapping of the language. `required` keys must be stated, `never_empty` says that some must be; `not_built` are
    keys that are designed and not there yet, `hints` what is said of others that are not there."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    required: ClassVar[tuple[str, ...]] = ()
    never_empty: ClassVar[bool] = False
    not_built: ClassVar[frozenset[str]] = frozenset()
    hints: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        described = handler.resolve_ref_schema(handler(schema))
        if cls.required:
            described["required"] = list(cls.required)
        if cls.never_empty:
            described["minProperties"] = 1
        return described


class DeploymentsShape(Shape):
    hints: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("default", "invariants", "labels", "rules", "slo"), "it belongs in the policy file"
    )

    required = ("version", "deployments")

    version: Version | None = None
    deployments: dict[Word, Any] | None = None
    models: dict[Title, Text] | None = None


class TokenPriceShape(Shape):
    required = ("input", "output")

    input: Dollars | None = None
    output: Dollars | None = None
    cached_input: Dollars | None = None


class TokenRateShape(Shape):
    required = ("input", "output")

    input: Rate | None = None
    output: Rate | None = None


class CostShape(Shape):
    """Either a price by the token, or hardware; and what comes on top of both. See policyfile/costing.py."""

    usd_per_million_tokens: TokenPriceShape | None = None

    hardware: Word | None = None
    count: Count | None = None
    usd_per_hour: PositiveDollars | None = None
    spot: bool | None = None
    capacity: Literal["fixed", "elastic"] | None = None
    purchase_usd: PositiveDollars | None = None
    amortised_over: Years | None = None
    maintenance: ShareAYear | None = None
    electricity_usd_per_kwh: PositiveDollars | None = None
    pue: Pue | None = None
    host_usd_per_hour: Dollars | None = None
    storage_usd_per_month: Dollars | None = None
    utilization: Share | None = None
    tokens_per_s: TokenRateShape | None = None

    load_balancer_usd_per_month: Dollars | None = None
    monitoring_usd_per_month: Dollars | None = None
    data_transfer_usd_per_gb: Dollars | None = None
    tokens_per_month: Volume | None = None


class TimeoutsShape(Shape):
    never_empty = True

    connect: Seconds | None = None
    first_token: Seconds | None = None
    idle: Seconds | None = None
    total: Seconds | None = None


class DeploymentShape(Shape):
    not_built = frozenset({"draft", "limits", "mask", "weight"})
    hints: ClassVar[Mapping[str, str]] = {"api_base": "the address is called `url` for every backend"}
    required = ("backend", "model", "zone")

    backend: BackendKind | None = None
    model: Text | None = None
    zone: Word | None = None
    url: Words | None = None
    api_key: str | None = None
    context_window: Tokens | None = None
    default_max_tokens: Tokens | None = None
    capabilities: list[Capability] | None = None
    quantization: Literal["none", "fp16", "bf16", "int8", "int4"] | None = None
    tokenizer: Literal["o200k_base", "cl100k_base", "bytes"] | None = None
    load: LoadKind | None = None
    cost: CostShape | None = None
    timeouts: TimeoutsShape | None = None
    ca_file: Text | None = None
