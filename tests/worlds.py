"""Small simulated worlds: an engine whose steps are round numbers, a cloud that always takes as long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gateway.policy import Policy
from gateway.simulate.cloud import CloudModel, Quantiles, weather
from gateway.simulate.fleetfile import FleetModel, simulated
from gateway.simulate.mix import Request
from gateway.simulate.step import EngineModel
from gateway.simulate.world import World
from gateway.types import RequestFacts, TokenCount
from tests.fakes import CLOUD, HOME, policy, require

ENGINE = EngineModel(
    fixed_s=0.010,
    per_prompt_token_s=0.001,
    per_sequence_s=0.002,
    per_cached_token_s=0.0,
    num_blocks=64,
    block_size=16,
    max_batch_tokens=100,
    max_running=8,
    window=1000,
)
STEADY = CloudModel(Quantiles(0.2, 0.2), Quantiles(0.01, 0.01), prompt_s_per_token=0.0)


def small_policy(**changed: Any) -> Policy:
    """Home, an engine, before the cloud by marginal cost, where the class is predicted to be met."""
    rule: dict[str, Any] = {"require": require(slo=True), "unknown": "eligible", "order_by": "marginal_cost"}
    return policy([HOME, CLOUD], **(rule | changed))


def asked(
    arrival_s: float,
    prompt: int = 100,
    output: int = 3,
    *,
    slo: str | None = None,
    private: bool = False,
    index: int = 0,
    **facts: Any,
) -> Request:
    """One request; `index` is set by `world`."""
    labels = frozenset({"personal"}) if private else frozenset[str]()
    known = RequestFacts("auto", labels=labels, prompt=TokenCount(prompt, prompt), slo=slo, stream=True, **facts)
    return Request(index, arrival_s, known, output, draw=0.5)


def world(
    requests: Sequence[Request],
    *,
    engine: EngineModel = ENGINE,
    cloud: CloudModel = STEADY,
    of: Policy | None = None,
    seed: int = 0,
) -> World:
    """An engine called home and a cloud, with these requests in the order of their arrival."""
    fleet = FleetModel({"home": engine}, {"cloud": cloud})
    ordered = tuple(
        replace(request, index=index) for index, request in enumerate(sorted(requests, key=lambda r: r.arrival_s))
    )
    known = simulated(of or small_policy(), fleet)
    return World(known, fleet, ordered, weather(fleet.clouds, ordered, seed))
