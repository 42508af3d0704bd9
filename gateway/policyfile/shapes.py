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
    keys that are designed and not there yet, `hints` what is said of others that are not there. `meanings` are what an
    editor says of the keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    required: ClassVar[tuple[str, ...]] = ()
    never_empty: ClassVar[bool] = False
    not_built: ClassVar[frozenset[str]] = frozenset()
    hints: ClassVar[Mapping[str, str]] = {}
    meanings: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        described = handler.resolve_ref_schema(handler(schema))
        if cls.required:
            described["required"] = list(cls.required)
        if cls.never_empty:
            described["minProperties"] = 1
        for key, field in described.get("properties", {}).items():
            field["description"] = cls.meanings[key]
        return described


class DeploymentsShape(Shape):
    hints: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("default", "invariants", "labels", "rules", "slo"), "it belongs in the policy file"
    )

    required = ("version", "deployments")

    meanings: ClassVar[Mapping[str, str]] = {
        "version": "The version of the language: 1.",
        "deployments": "What exists, by name.",
        "models": (
            "Names that clients already use: each stands for `auto` (the policy decides), a deployment or a rule."
        ),
    }

    version: Version | None = None
    deployments: dict[Word, Any] | None = None
    models: dict[Title, Text] | None = None


class TokenPriceShape(Shape):
    required = ("input", "output")

    meanings: ClassVar[Mapping[str, str]] = {
        "input": "Of the prompt.",
        "output": "Of the answer.",
        "cached_input": "Of the part of a prompt that was cached; without it, as the rest.",
    }

    input: Dollars | None = None
    output: Dollars | None = None
    cached_input: Dollars | None = None


class TokenRateShape(Shape):
    required = ("input", "output")

    meanings: ClassVar[Mapping[str, str]] = {
        "input": "Of the prompt.",
        "output": "Of the answer.",
    }

    input: Rate | None = None
    output: Rate | None = None


class CostShape(Shape):
    """Either a price by the token, or hardware; and what comes on top of both. See policyfile/costing.py."""

    meanings: ClassVar[Mapping[str, str]] = {
        "usd_per_million_tokens": "A price by the token.",
        "hardware": "Of the catalog: v100-32gb, a100-40gb, a100-80gb, h100-80gb, h200, tpu-v4 or cpu-host.",
        "count": "Devices; 1 without it.",
        "usd_per_hour": "Rent of one device, power included; the on-demand rate of the catalog without it.",
        "spot": "Take the spot rate of the catalog.",
        "capacity": (
            "elastic: hours are given back when they are not needed. fixed: they are paid either way, so that "
            "one more request costs nothing more."
        ),
        "purchase_usd": "Price of one device with its share of the machine.",
        "amortised_over": "Years that it is written off over, such as 4y.",
        "maintenance": "Share of the purchase price a year, such as 0.05.",
        "electricity_usd_per_kwh": "Price of energy.",
        "pue": "Power of the site over power of its machines: cooling and losses.",
        "host_usd_per_hour": "What the host costs on top.",
        "storage_usd_per_month": "What storage costs on top.",
        "utilization": "Share of hours that are busy; the bill is inversely proportional to it.",
        "tokens_per_s": "What a busy engine does, as measured; the roofline says without it.",
        "load_balancer_usd_per_month": "What the load balancer costs on top.",
        "monitoring_usd_per_month": "What monitoring costs on top.",
        "data_transfer_usd_per_gb": "What it costs to send prompts out.",
        "tokens_per_month": "What monthly costs are shared out over.",
    }

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

    meanings: ClassVar[Mapping[str, str]] = {
        "connect": "To open the connection.",
        "first_token": "From sending the request to the first token.",
        "idle": "Between two chunks of a stream.",
        "total": "The whole answer.",
    }

    connect: Seconds | None = None
    first_token: Seconds | None = None
    idle: Seconds | None = None
    total: Seconds | None = None


class DeploymentShape(Shape):
    not_built = frozenset({"mask", "weight"})
    hints: ClassVar[Mapping[str, str]] = {"api_base": "the address is called `url` for every backend"}
    required = ("backend", "model", "zone")

    meanings: ClassVar[Mapping[str, str]] = {
        "backend": (
            "local: the engine of this project. openai: any server on the OpenAI wire. litellm: a cloud provider."
        ),
        "model": "What the backend calls it; for litellm with the provider, as in openai/gpt-4o-mini.",
        "zone": (
            "Where the data goes: any word, which invariants name. The engine that the gateway starts is on_premises."
        ),
        "url": "The address, up to and with its /v1; several, or a name that leads to several, are replicas.",
        "api_key": "The name of an environment variable, as in ${OPENAI_API_KEY}; never the key itself.",
        "context_window": "Tokens of prompt and answer, such as 128k or 8Ki.",
        "default_max_tokens": "Tokens kept free for an answer whose length the caller does not limit.",
        "capabilities": "What it can do besides text.",
        "quantization": "How the engine holds its weights.",
        "speculation": "How an engine that the gateway starts guesses tokens ahead; answers stay the same.",
        "draft": "For `speculation: draft`: a small model with the same tokenizer; the bundled model brings one.",
        "tokenizer": "What counts its tokens; bytes is safe and overestimates.",
        "load": "How the engine behind `backend: openai` says how busy it is.",
        "cost": "What its tokens cost: by the token, or hardware.",
        "timeouts": "How long to wait.",
        "ca_file": "A PEM file with the authorities to trust for an https address.",
        "networks": (
            "Where its addresses must lie, such as 203.0.113.0/24. On premises without it: in a private network."
        ),
        "limits": "How much it takes, from all callers together and from each key; see policyfile/limiting.py.",
    }

    backend: BackendKind | None = None
    model: Text | None = None
    zone: Word | None = None
    url: Words | None = None
    api_key: str | None = None
    context_window: Tokens | None = None
    default_max_tokens: Tokens | None = None
    capabilities: list[Capability] | None = None
    quantization: Literal["none", "fp16", "bf16", "int8", "int4"] | None = None
    speculation: Literal["off", "prompt_lookup", "draft"] | None = None
    draft: Text | None = None
    tokenizer: Literal["o200k_base", "cl100k_base", "bytes"] | None = None
    load: LoadKind | None = None
    cost: CostShape | None = None
    timeouts: TimeoutsShape | None = None
    ca_file: Text | None = None
    networks: Words | None = None
    limits: Any = None  # read by itself
