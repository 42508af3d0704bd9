"""What a deployment's tokens cost: from the file's `cost`, else from what is known of the model.

Owns the reading of `cost`: which of its keys go together, what the catalog fills in, and the two prices that follow.
Refuses to guess: a price that cannot be worked out is a problem that says what to state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gateway.catalog.hardware import HARDWARE, Hardware
from gateway.catalog.models import MODELS, REPOSITORIES, Architecture, UnknownArchitecture, architecture
from gateway.catalog.prices import per_token_nusd
from gateway.costs import (
    ELECTRICITY_USD_PER_KWH,
    MAINTENANCE,
    PUE,
    UTILIZATION,
    YEARS,
    Owned,
    Rented,
    Running,
    Surcharge,
    Throughput,
    owned,
    rented,
)
from gateway.policyfile.nearness import suggestion
from gateway.policyfile.shapes import CostShape, TokenPriceShape
from gateway.roofline import QUANTIZATIONS, DoesNotRun, Quantization, Roofline, what_would_fit
from gateway.types import Price, Speed

_RENTED = ("usd_per_hour", "spot", "capacity")
_OWNED = ("purchase_usd", "amortised_over", "maintenance", "electricity_usd_per_kwh", "pue")
_HARDWARE = (
    "hardware",
    "count",
    *_RENTED,
    *_OWNED,
    "host_usd_per_hour",
    "storage_usd_per_month",
    "utilization",
    "tokens_per_s",
)
_MONTHLY = ("load_balancer_usd_per_month", "monitoring_usd_per_month")
_EITHER = '"cost" must state usd_per_million_tokens: {input: ..., output: ...}, or hardware'
_BY_NAME: Mapping[str, Quantization] = {name: name for name in QUANTIZATIONS}
_NO_QUANTIZATION: tuple[Quantization, ...] = ("bf16", "fp16", "fp32")


class Wrong(Protocol):
    """Reports a problem at a place within the deployment."""

    def __call__(self, message: str, *loc: str | int, key: bool = False) -> None: ...


@dataclass(frozen=True, slots=True)
class Costing:
    """The prices of a deployment; None where nobody knows them. See `Deployment`."""

    price: Price | None = None
    full_price: Price | None = None
    basis: str = ""
    speed: Speed | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """What is known of a deployment's model when its cost is read. `known` is the price that litellm's map or the
    catalog states. `certain` is false where the model was put in by the environment, or is not known for want of a
    variable: what cannot be worked out then is not known, and no problem of the file."""

    model: str
    quantization: str
    provider: bool
    known: Price | None
    certain: bool = True
    replaced: bool = False


def costing(cost: CostShape | None, stated: Iterable[str], served: Served, wrong: Wrong) -> Costing:
    """The prices that follow; `stated` are the keys under `cost`. Reports what does not go together, and then returns
    what is not known."""
    keys = set(stated)
    if cost is None or not keys:
        wrong(_EITHER, "cost")
        return Costing()
    hardware = [key for key in _HARDWARE if key in keys]
    if hardware and served.provider:
        wrong(
            f'"cost.{hardware[0]}" is for hardware of your own, and this is a provider', "cost", hardware[0], key=True
        )
        return Costing()
    if hardware and cost.usd_per_million_tokens is not None:
        wrong(
            f'"cost.{hardware[0]}" has no use beside "cost.usd_per_million_tokens": state one of them',
            "cost",
            hardware[0],
            key=True,
        )
        return Costing()
    return _OnHardware(cost, keys, served, wrong).costing() if hardware else _by_token(cost, keys, served, wrong)


def _by_token(cost: CostShape, keys: set[str], served: Served, wrong: Wrong) -> Costing:
    base, basis = served.known, "litellm's price map"
    if cost.usd_per_million_tokens is not None:
        base, basis = _stated(cost.usd_per_million_tokens, wrong), "as stated"
    elif base is None:
        wrong(_EITHER, "cost")
    if base is None:
        return Costing()
    monthly = _monthly(cost)
    if monthly and cost.tokens_per_month is None:
        key = next(key for key in _MONTHLY if key in keys)
        wrong(
            f'"cost.tokens_per_month" is missing: "cost.{key}" is shared out over the tokens expected in a month',
            "cost",
            key,
            key=True,
        )
        return Costing()
    if cost.tokens_per_month is not None and not monthly:
        wrong(
            f'"cost.tokens_per_month" has no use without {" or ".join(_MONTHLY)}', "cost", "tokens_per_month", key=True
        )
        return Costing()
    extra = Surcharge(cost.data_transfer_usd_per_gb or 0.0, monthly, cost.tokens_per_month or 0.0)
    if cost.data_transfer_usd_per_gb:
        basis += f"; and {cost.data_transfer_usd_per_gb:g} USD a GB for prompts sent out"
    if monthly:
        basis += f"; bill: also {monthly:g} USD a month over {cost.tokens_per_month:,.0f} tokens"
    full = extra.full_price(base)
    return Costing(extra.price(base), full if monthly else None, basis)


def _monthly(cost: CostShape) -> float:
    return (cost.load_balancer_usd_per_month or 0.0) + (cost.monitoring_usd_per_month or 0.0)


def _stated(price: TokenPriceShape, wrong: Wrong) -> Price | None:
    if price.input is None or price.output is None:
        wrong('"cost.usd_per_million_tokens" must state input and output', "cost", "usd_per_million_tokens")
        return None
    cached = None if price.cached_input is None else per_token_nusd(price.cached_input / 1e6)
    return Price(per_token_nusd(price.input / 1e6), per_token_nusd(price.output / 1e6), cached)


class _OnHardware:
    """A deployment on hardware of one's own, on its way to two prices."""

    def __init__(self, cost: CostShape, keys: set[str], served: Served, wrong: Wrong) -> None:
        self.cost = cost
        self.keys = keys
        self.served = served
        self.wrong = wrong
        self.count = cost.count or 1

    def costing(self) -> Costing:
        """Called once; each problem is reported where it is found, and the first ends the reading."""
        cost = self.cost
        if cost.tokens_per_month is not None:
            return self._unknown(
                '"cost.tokens_per_month" has no use here: "cost.utilization" says it', "tokens_per_month"
            )
        if cost.data_transfer_usd_per_gb is not None:
            return self._unknown(
                '"cost.data_transfer_usd_per_gb" is for prompts sent to a provider', "data_transfer_usd_per_gb"
            )
        device = HARDWARE.get((cost.hardware or "").lower())
        if cost.hardware is not None and device is None:
            near = suggestion(cost.hardware.lower(), HARDWARE)
            known = near or f" (known are {', '.join(HARDWARE)})"
            return self._unknown(f'"cost.hardware": the catalog has no "{cost.hardware}"{known}', "hardware", key=False)
        held = self._held(device)
        roofline = self._roofline(device)
        throughput = self._throughput(roofline)
        if held is None or throughput is None:
            return Costing()
        running = Running(
            held,
            throughput,
            cost.utilization or UTILIZATION,
            (cost.storage_usd_per_month or 0.0) + _monthly(cost),
        )
        prior = Speed(throughput.input, roofline.speed().ms_per_output_token) if roofline is not None else None
        return Costing(running.price(), running.full_price(), running.basis(), prior)

    def _unknown(self, message: str, *loc: str, key: bool = True) -> Costing:
        self.wrong(message, "cost", *loc, key=key)
        return Costing()

    def _held(self, device: Hardware | None) -> Rented | Owned | None:
        """How the hardware is held and what that costs; reports what contradicts itself."""
        by_hour = [key for key in _RENTED if key in self.keys]
        bought = [key for key in _OWNED if key in self.keys]
        if by_hour and bought:
            self._unknown(
                f'"cost.{bought[0]}" is for hardware that was bought, "cost.{by_hour[0]}" for rented', bought[0]
            )
            return None
        return self._owned(device) if bought else self._rented(device)

    def _rented(self, device: Hardware | None) -> Rented | None:
        cost = self.cost
        if cost.usd_per_hour is not None and cost.spot is not None:
            self._unknown('"cost.spot" chooses the catalog\'s rate, and has no use beside "cost.usd_per_hour"', "spot")
            return None
        held = rented(
            device,
            self.count,
            cost.usd_per_hour,
            spot=bool(cost.spot),
            host_usd_per_hour=cost.host_usd_per_hour or 0.0,
            capacity=cost.capacity or "elastic",
        )
        if held is None:
            of = f": the catalog has no {'spot' if cost.spot else 'hourly'} rate for {device.name}" if device else ""
            self._unknown(f'"cost.usd_per_hour" is missing{of}', key=False)
        return held

    def _owned(self, device: Hardware | None) -> Owned | None:
        cost = self.cost
        if device is None:
            self._unknown('"cost.hardware" is missing: the power of what was bought follows from it', key=False)
            return None
        held = owned(
            device,
            self.count,
            cost.purchase_usd,
            years=cost.amortised_over or YEARS,
            maintenance=MAINTENANCE if cost.maintenance is None else cost.maintenance,
            host_usd_per_hour=cost.host_usd_per_hour or 0.0,
            usd_per_kwh=cost.electricity_usd_per_kwh or ELECTRICITY_USD_PER_KWH,
            pue=cost.pue or PUE,
        )
        if held is None:
            self._unknown(f'"cost.purchase_usd" is missing: {device.name} is only rented', key=False)
        return held

    def _roofline(self, device: Hardware | None) -> Roofline | None:
        """What the catalog expects of the model there; None where it does not know the model."""
        if device is None:
            return None
        try:
            return _of(architecture(self.served.model), device, self.served.quantization, self.count)
        except (UnknownArchitecture, DoesNotRun):
            return None

    def _throughput(self, roofline: Roofline | None) -> Throughput | None:
        """As measured, where the file says so for this model; else by the roofline, where the model fits."""
        rates = self.cost.tokens_per_s
        if rates is not None and (rates.input is None or rates.output is None):
            self._unknown('"cost.tokens_per_s" must state input and output', "tokens_per_s", key=False)
            return None
        if rates is not None and not self.served.replaced:
            assert rates.input is not None and rates.output is not None
            return Throughput(rates.input, rates.output)
        if roofline is not None and roofline.fits:
            return Throughput.of(roofline)
        if self.served.certain:
            self._unknown(self._why_no_throughput(roofline), key=False)
        return None

    def _why_no_throughput(self, roofline: Roofline | None) -> str:
        state = "state cost.tokens_per_s: {input: ..., output: ...} as measured"
        if self.cost.hardware is None:
            return f'"cost.hardware" is missing; name one of {", ".join(HARDWARE)}, or {state}'
        if roofline is not None:
            memory = roofline.memory
            return (
                f"the model does not fit on {self.count} x {roofline.hardware.name}: {memory.weights / 1e9:.1f} GB of "
                f"weights, {memory.usable / 1e9:.1f} GB usable; {what_would_fit(roofline)}; or {state}"
            )
        try:
            _of(architecture(self.served.model), HARDWARE[self.cost.hardware.lower()], self.served.quantization, 1)
        except UnknownArchitecture:
            near = suggestion(self.served.model, (*MODELS, *REPOSITORIES))
            return f'the catalog does not know the model "{self.served.model}"{near}; {state}'
        except DoesNotRun as why:
            return f"{why}; or {state}"
        raise AssertionError("asked only where there is no roofline, or none that fits")


def _of(model: Architecture, device: Hardware, quantization: str, count: int) -> Roofline:
    """With no quantization the weights are 16 bits wide, in the format that the device computes."""
    if quantization == "none":
        width = next(q for q in _NO_QUANTIZATION if q in device.compute)
        return Roofline.of(model, device, width, count)
    return Roofline.of(model, device, _BY_NAME[quantization], count)
