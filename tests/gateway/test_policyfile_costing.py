"""`cost` of the deployments file: what the two prices and the prior come to."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.catalog.hardware import HARDWARE
from gateway.catalog.models import architecture
from gateway.costs import Owned, Rented, Running, Throughput
from gateway.policyfile import PolicyErrors, compile_policy
from gateway.roofline import Quantization, Roofline
from gateway.types import Deployment, Price

MAP = {"gpt-4o-mini": {"input_cost_per_token": 1.5e-07, "output_cost_per_token": 6e-07, "litellm_provider": "openai"}}
OWN = "{backend: openai, url: 'http://127.0.0.1:1/v1', zone: z, model: llama-3.1-8b, cost: %s}"
CLOUD = "{backend: litellm, model: openai/gpt-4o-mini, zone: z, cost: %s}"
H100 = HARDWARE["h100-80gb"]
EXPECTED = Throughput.of(Roofline.of(architecture("llama-3.1-8b"), H100, "bf16"))
MEASURED = Throughput(1000, 100)
RATES = "tokens_per_s: {input: 1000, output: 100}"


def deployment(text: str, env: dict[str, str] | None = None) -> Deployment:
    files = {
        "p.yaml": "version: 1\ndeployments: d.yaml\ndefault: {candidates: [x]}\n",
        "d.yaml": f"version: 1\ndeployments:\n  x: {text}\n",
    }
    policy = compile_policy("p.yaml", read=files.__getitem__, env=env or {}, price_map=MAP, detectors=frozenset())
    return policy.deployments["x"]


@pytest.mark.parametrize(
    ("cost", "running"),
    [
        ("{hardware: h100-80gb, usd_per_hour: 2.50}", Running(Rented(2.50), EXPECTED)),
        ("{hardware: H100-80GB}", Running(Rented(6.88, source="catalog's on-demand rate, h100-80gb"), EXPECTED)),
        (
            "{hardware: h100-80gb, spot: true, utilization: 0.9}",
            Running(Rented(2.25, source="catalog's spot rate, h100-80gb"), EXPECTED, 0.9),
        ),
        (
            f"{{usd_per_hour: 2.50, host_usd_per_hour: 0.5, capacity: fixed, storage_usd_per_month: 10, {RATES}}}",
            Running(Rented(2.50, 0.5, "fixed"), MEASURED, usd_per_month=10),
        ),
        (
            f"{{hardware: h100-80gb, count: 2, purchase_usd: 40000, amortised_over: 3y, maintenance: 0, pue: 1.2,"
            f" electricity_usd_per_kwh: 0.3, load_balancer_usd_per_month: 5, monitoring_usd_per_month: 6, {RATES}}}",
            Running(
                Owned(80_000, 2 * 645, 2 * 630, 3, 0, 0, 0.3, 1.2, "stated, 2 of them"), MEASURED, usd_per_month=11
            ),
        ),
        (
            f"{{hardware: h100-80gb, amortised_over: 4y, {RATES}}}",
            Running(Owned(42_000, 645, 630, source="catalog's purchase price, h100-80gb"), MEASURED),
        ),
    ],
)
def test_hardware_makes_two_prices(cost: str, running: Running) -> None:
    """What is not stated is the catalog's, and the sentence about it says so."""
    made = deployment(OWN % cost)
    assert (made.price, made.full_price, made.cost_basis) == (running.price(), running.full_price(), running.basis())
    assert made.bill == running.full_price()


def test_two_devices_serve_what_one_cannot_hold() -> None:
    made = deployment(
        (OWN % "{hardware: h100-80gb, count: 4}").replace("llama-3.1-8b", "meta-llama/Llama-3.3-70B-Instruct")
    )
    expected = Throughput.of(Roofline.of(architecture("llama-3.3-70b"), H100, "bf16", 4))
    assert made.bill == Running(Rented(4 * 6.88), expected).full_price()


def test_a_device_without_bf16_serves_fp16() -> None:
    made = deployment(OWN % "{hardware: v100-32gb}")
    expected = Throughput.of(Roofline.of(architecture("llama-3.1-8b"), HARDWARE["v100-32gb"], "fp16"))
    assert made.bill == Running(Rented(3.90), expected).full_price()


def test_the_catalog_says_how_fast_it_will_be() -> None:
    """Measured prompt tokens a second replace the roofline's."""
    roofline = Roofline.of(architecture("llama-3.1-8b"), H100, "bf16")
    assert deployment(OWN % "{hardware: h100-80gb}").speed == roofline.speed()
    measured = deployment(OWN % f"{{hardware: h100-80gb, {RATES}}}").speed
    assert measured is not None
    assert (measured.prefill_tokens_per_s, measured.ms_per_output_token) == (1000, roofline.speed().ms_per_output_token)
    assert deployment(OWN % f"{{usd_per_hour: 1, {RATES}}}").speed is None


def test_around_a_provider_its_price_stays_the_maps() -> None:
    made = deployment(
        CLOUD % "{data_transfer_usd_per_gb: 0.25, load_balancer_usd_per_month: 15, monitoring_usd_per_month: 5,"
        " tokens_per_month: 20000000}"
    )
    assert (made.price, made.full_price) == (Price(151.0, 600.0), Price(1151.0, 1600.0))
    assert made.cost_basis == (
        "litellm's price map; and 0.25 USD a GB for prompts sent out; bill: also 20 USD a month over 20,000,000 tokens"
    )
    only_sent = deployment(CLOUD % "{data_transfer_usd_per_gb: 0.25}")
    assert (only_sent.full_price, only_sent.bill) == (None, Price(151.0, 600.0))


def test_a_stated_price_may_have_one_for_cached_prompts() -> None:
    made = deployment(CLOUD % "{usd_per_million_tokens: {input: 0.1, output: 0.4, cached_input: 0.025}}")
    assert (made.price, made.full_price, made.cost_basis) == (Price(100.0, 400.0, 25.0), None, "as stated")


@pytest.mark.parametrize("quantization", ["none", "fp16", "bf16", "int8", "int4"])
def test_the_cost_follows_the_quantization(quantization: str) -> None:
    """Of each that a deployment may state."""
    made = deployment(
        f"{{backend: local, zone: z, model: llama-3.1-8b, quantization: {quantization}, cost: {{hardware: a100-80gb}}}}"
    )
    widths: dict[str, Quantization] = {"none": "bf16", "fp16": "fp16", "bf16": "bf16", "int8": "int8", "int4": "int4"}
    made_of = Roofline.of(architecture("llama-3.1-8b"), HARDWARE["a100-80gb"], widths[quantization])
    expected = Throughput.of(made_of)
    assert made.bill == Running(Rented(3.43), expected).full_price()


LOCAL = "{backend: local, zone: z, model: demo, cost: {hardware: cpu-host, usd_per_hour: 0.06, %s}}"


def test_rates_of_one_model_say_nothing_of_the_one_that_replaces_it() -> None:
    """The roofline does, where the catalog knows the model; else the cost is not known, and never 0."""
    text = LOCAL % RATES
    assert deployment(text).bill == Running(Rented(0.06), MEASURED).full_price()
    known = deployment(text, {"HYBRIDGATE_LOCAL_MODEL": "Qwen/Qwen3-4B-Instruct-2507"})
    expected = Throughput.of(Roofline.of(architecture("qwen3-4b"), HARDWARE["cpu-host"], "bf16"))
    assert known.bill == Running(Rented(0.06), expected).full_price()
    assert deployment(text, {"HYBRIDGATE_LOCAL_MODEL": "/models/mine"}).bill is None


def test_a_model_that_the_environment_does_not_name_yet_has_no_cost() -> None:
    text = (OWN % "{hardware: h100-80gb}").replace("llama-3.1-8b", "'${MODEL}'")
    assert deployment(text).price is None
    assert deployment(text, {"MODEL": "qwen3-8b"}).price is not None


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    """Of a size that YAML writes without an exponent."""
    return st.floats(low, high).map(lambda number: round(number, 3))


COST = st.fixed_dictionaries(
    {},
    optional={
        "usd_per_million_tokens": st.just({"input": 1, "output": 2}),
        "hardware": st.sampled_from(sorted(HARDWARE)),
        "count": st.integers(1, 8),
        "usd_per_hour": numbers(0.01, 100),
        "spot": st.booleans(),
        "capacity": st.just("elastic"),
        "purchase_usd": numbers(1, 1e6),
        "amortised_over": st.just("3y"),
        "maintenance": numbers(0, 1),
        "electricity_usd_per_kwh": numbers(0.01, 1),
        "pue": numbers(1, 3),
        "host_usd_per_hour": numbers(0, 1),
        "storage_usd_per_month": numbers(0, 100),
        "utilization": numbers(0.01, 1),
        "tokens_per_s": st.just({"input": 1000, "output": 100}),
        "load_balancer_usd_per_month": numbers(0, 100),
        "monitoring_usd_per_month": numbers(0, 100),
        "data_transfer_usd_per_gb": numbers(0, 1),
        "tokens_per_month": st.integers(1, 10**12),
    },
)


@given(
    COST,
    st.sampled_from(["llama-3.1-8b", "llama-3.3-70b", "demo", "nobody/knows"]),
    st.sampled_from(["none", "fp16", "bf16", "int8", "int4"]),
    st.sampled_from(["local", "litellm"]),
)
def test_any_cost_is_a_price_above_nothing_or_a_problem(
    cost: dict[str, object], model: str, quantization: str, backend: str
) -> None:
    """Whatever is stated together: never a failure, never $0, and the bill is never less than one more token."""
    own = f"model: {model}, quantization: {quantization}" if backend == "local" else "model: openai/gpt-4o-mini"
    try:
        made = deployment(f"{{backend: {backend}, zone: z, {own}, cost: {json.dumps(cost)}}}")
    except PolicyErrors as error:
        assert all("cost" in problem.message or "catalog" in problem.message for problem in error.problems)
        return
    assert made.price is not None and made.bill is not None and made.cost_basis
    assert 0 < made.price.input <= made.bill.input * 1.00001
    assert 0 < made.price.output <= made.bill.output * 1.00001
