"""Which engines and clouds there are: from a fleet file, by default, and of which size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from gateway.simulate.cloud import CloudModel, Quantiles
from gateway.simulate.fleetfile import FleetModel, described_engine, fleet_model, simulated
from gateway.simulate.trace import TraceError
from tests.fakes import CLOUD, HOME, OTHER, policy
from tests.worlds import ENGINE, asked

ENGINE_HOME = replace(HOME, backend="local", model="demo")
POLICY = policy([ENGINE_HOME, CLOUD, OTHER])
CALIBRATION = """{"version": 1, "model": "demo",
 "step": {"fixed_s": 0.01, "per_prompt_token_s": 0.001, "per_sequence_s": 0.002, "per_cached_token_s": 1e-05},
 "limits": {"num_blocks": 64, "block_size": 16, "max_batch_tokens": 100, "max_running": 8, "max_waiting": 256,
            "max_waiting_tokens": 65536, "window": 1000}}"""
FLEET = """version: 1
engines:
  home: {calibration: engine.json, max_running: 4, slowed: 2}
clouds:
  cloud:
    first_token: {p50: 400ms, p95: 1s}
    per_token: {p50: 10ms, p95: 20ms}
    per_1000_prompt_tokens: 5ms
    requests_per_minute: 500
    tokens_per_minute: 200k
    outages: [{from: 1m, for: 30s}]
    failures: 0.01
"""


def reads(**files: str) -> Callable[[str], str]:
    known = {name.replace("_", "."): text for name, text in files.items()}
    return lambda path: known[path]


def test_a_fleet_file_describes_engines_and_clouds() -> None:
    fleet = fleet_model(POLICY, None, "fleet.yaml", reads(fleet_yaml=FLEET, engine_json=CALIBRATION))
    home, cloud = fleet.engines["home"], fleet.clouds["cloud"]
    assert (home.fixed_s, home.max_running, home.num_blocks) == (0.02, 4, 64)
    assert (cloud.first_token, cloud.per_token) == (Quantiles(0.4, 1.0), Quantiles(0.01, 0.02))
    assert (cloud.requests_per_minute, cloud.tokens_per_minute, cloud.failure_share) == (500, 200_000, 0.01)
    assert cloud.prompt_s_per_token == pytest.approx(5e-6)
    assert cloud.outages == ((60.0, 90.0),)
    assert fleet.clouds["other"] == CloudModel()  # not in the file, and elsewhere: as clouds are by default


def test_an_engine_comes_from_the_catalog() -> None:
    text = "version: 1\nengines: {home: {model: llama-3.1-8b, hardware: h100-80gb, quantization: int8, count: 2}}\n"
    home = fleet_model(POLICY, None, "fleet.yaml", reads(fleet_yaml=text)).engines["home"]
    assert home.window == 131072 and home.max_waiting_tokens == 131072
    assert "int8, on 2 x h100-80gb" in home.source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engines: {}\n", 'fleet.yaml:1:1: "version" is missing'),
        ("version: 1\nengine: {}\n", 'fleet.yaml:2:1: unknown field "engine" (did you mean "engines"?)'),
        ("version: 1\nclouds: {clod: {}}\n", 'fleet.yaml:2:10: cloud "clod": the policy has no such deployment'),
        ("version: 1\nengines: {home: {}}\n", 'engine "home": must state calibration, or model and hardware'),
        ("version: 1\nclouds: {cloud: {first_token: {p50: 2s, p95: 1s}}}\n", '"first_token" must state p50, and p95'),
        ("version: 1\nclouds: {cloud: {outages: [{from: 1s}]}}\n", 'an item of "outages" must state from and for'),
        ("version: 1\nclouds: {cloud: {failures: 3}}\n", '"failures"'),
        ("version: 1\nengines: {home: {model: llama, hardware: h100-80gb}}\n", "llama"),
        ("version: 1\nengines: {home: {model: llama-3.1-70b, hardware: h100-80gb}}\n", "does not fit on 1 x h100-80gb"),
        ("version: 1\nengines: {home: {model: demo, hardware: cpu}}\n", "the catalog has no hardware"),
        ("version: 1\nengines: {home: {model: demo, hardware: cpu-host, quantization: q4}}\n", "is no quantization"),
    ],
)
def test_what_is_wrong_in_it_is_said_with_its_place(text: str, message: str) -> None:
    with pytest.raises(TraceError) as error:
        fleet_model(POLICY, None, "fleet.yaml", reads(fleet_yaml=text))
    assert message in str(error.value) and str(error.value).startswith("fleet.yaml:")


def test_every_mistake_is_told_at_once() -> None:
    text = "version: 1\nengines: {home: {}}\nclouds: {clod: {}}\n"
    with pytest.raises(TraceError) as error:
        fleet_model(POLICY, None, "fleet.yaml", reads(fleet_yaml=text))
    assert len(str(error.value).splitlines()) == 2


def test_the_bundled_model_needs_no_description_and_any_other_does() -> None:
    assert "demo, fp32" in fleet_model(POLICY, None, None, reads()).engines["home"].source
    big = policy([replace(ENGINE_HOME, model="meta-llama/Llama-3.1-8B-Instruct"), CLOUD])
    with pytest.raises(TraceError, match=r"nothing says how fast the engine of .home. is: give --engine"):
        fleet_model(big, None, None, reads())
    engine = described_engine("llama-3.1-8b@h100-80gb", reads())
    assert fleet_model(big, engine, None, reads()).engines["home"] is engine


def test_a_deployment_that_nobody_models_is_not_there_and_one_without_a_key_is() -> None:
    keyless = replace(CLOUD, unavailable="CLOUD_KEY is not set")
    on_premises = replace(OTHER, name="large", zone="on_premises", backend="openai")
    known = policy([ENGINE_HOME, keyless, on_premises])
    there = simulated(known, fleet_model(known, ENGINE, None, reads())).deployments
    assert there["cloud"].unavailable is None and there["home"].unavailable is None
    assert there["large"].unavailable == "it is not in the fleet model"


def test_an_engine_that_costs_nobody_knows_what_cannot_be_simulated() -> None:
    free = policy([replace(ENGINE_HOME, price=None), CLOUD])
    with pytest.raises(TraceError, match=r"what .home. costs is not known"):
        simulated(free, FleetModel({"home": ENGINE}, {"cloud": CloudModel()}))


@pytest.mark.parametrize("engines", [1, 3])
def test_engines_are_sized_to_carry_a_share_of_the_work(engines: int) -> None:
    requests = tuple(asked(i / 10, 100 + i, 1 + i % 7, index=i) for i in range(100))
    fleet = FleetModel({str(i): ENGINE.slowed(1 + i) for i in range(engines)}).sized(requests, 0.5)
    carried = sum(
        (requests[-1].arrival_s - requests[0].arrival_s)
        / sum(engine.least_s(r.prompt_tokens, r.output_tokens) for r in requests)
        for engine in fleet.engines.values()
    )
    assert carried == pytest.approx(0.5)


def test_nothing_can_be_sized_without_time() -> None:
    with pytest.raises(TraceError, match="--local-share needs"):
        FleetModel({"home": ENGINE}).sized((asked(0.0), asked(0.0)), 0.5)
