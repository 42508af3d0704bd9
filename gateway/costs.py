"""What a token costs on hardware of one's own, and what a cloud token costs with everything around it. Pure.

Owns two prices of a deployment. The *marginal* one is what one more request costs, which is what routing compares. The
*full* one is what a token costs with every hour shared out over the tokens that the hours really carry, which is what
bills show. Refuses zeros by omission: a marginal price is 0 only where the operator says that rented hours are paid
either way.

An engine that is busy takes in `input` prompt tokens a second or makes `output` answer tokens a second, so a request is
worth n_in / input + n_out / output busy seconds. With a utilization u, the share of hours that are busy,

    fixed an hour   rented:  rate + host + monthly / 730
                    owned:   (purchase / years + maintenance x purchase) / 8760 + idle energy + host + monthly / 730
    busy an hour    rented:  0 (the rate includes the power)
                    owned:   energy above idle
    energy an hour  watts / 1000 x PUE x USD a kWh

    full a busy second      (fixed / u + busy) / 3600
    marginal a busy second  busy / 3600                  owned, or rented and paid either way (`fixed` capacity)
                            (rate + host) / 3600         rented by the hour and given back (`elastic` capacity)

The split into years, power, cooling and idle hours follows Barroso, Hölzle and Ranganathan, "The Datacenter as a
Computer" (3rd edition, 2018), chapter 6; the split into prefill and decode seconds, Pope et al. (2022), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gateway.catalog.hardware import Hardware
from gateway.roofline import PRIOR_PROMPT, Roofline
from gateway.types import NUSD_PER_USD, Price

HOURS_PER_YEAR = 8760
HOURS_PER_MONTH = 730

ELECTRICITY_USD_PER_KWH = 0.13
"""US commercial average: EIA, Electric Power Monthly, table 5.3, 2024 (12.8 cents)."""
PUE = 1.56
"""Power of the site over that of its machines, cooling mostly: Uptime Institute, Global Data Center Survey 2024."""
YEARS = 4.0
"""Over which hardware is written off: between the 3 years common for accelerators and the 5 to 6 of cloud servers."""
MAINTENANCE = 0.05
"""Share of the purchase price a year for support and repair: an assumption within the 3 to 10% that vendors ask."""
UTILIZATION = 0.4
"""Share of hours that are busy: an assumption. State your own; the bill is inversely proportional to it."""
BATCH = 32
"""Sequences that decode together where nothing else is stated, or as many as fit."""
BYTES_PER_TOKEN = 4.0
"""Of English text on the wire."""

Capacity = Literal["fixed", "elastic"]


@dataclass(frozen=True, slots=True)
class Rented:
    """Hardware by the hour, power and cooling included. `elastic` hours are given back when they are not needed;
    `fixed` ones are paid either way."""

    usd_per_hour: float
    host_usd_per_hour: float = 0.0
    capacity: Capacity = "elastic"
    source: str = "stated"

    @property
    def fixed_per_hour(self) -> float:
        return self.usd_per_hour + self.host_usd_per_hour

    @property
    def busy_per_hour(self) -> float:
        return 0.0

    @property
    def marginal_per_hour(self) -> float:
        return self.fixed_per_hour if self.capacity == "elastic" else 0.0


@dataclass(frozen=True, slots=True)
class Owned:
    """Hardware that was bought, written off over `years`. `maintenance` is a share of the purchase a year; watts are of
    the whole deployment: `idle_w` always, `busy_w` on top while it works."""

    purchase_usd: float
    idle_w: float
    busy_w: float
    years: float = YEARS
    maintenance: float = MAINTENANCE
    host_usd_per_hour: float = 0.0
    usd_per_kwh: float = ELECTRICITY_USD_PER_KWH
    pue: float = PUE
    source: str = "stated"

    @property
    def fixed_per_hour(self) -> float:
        bought = self.purchase_usd * (1 / self.years + self.maintenance) / HOURS_PER_YEAR
        return bought + self._energy(self.idle_w) + self.host_usd_per_hour

    @property
    def busy_per_hour(self) -> float:
        return self._energy(self.busy_w)

    @property
    def marginal_per_hour(self) -> float:
        return self.busy_per_hour

    def _energy(self, watts: float) -> float:
        return watts / 1000 * self.pue * self.usd_per_kwh


def rented(
    device: Hardware | None,
    count: int,
    usd_per_hour: float | None = None,
    *,
    spot: bool = False,
    host_usd_per_hour: float = 0.0,
    capacity: Capacity = "elastic",
) -> Rented | None:
    """`count` devices by the hour, each at the stated rate or the catalog's; None where neither says one."""
    rate, source = usd_per_hour, "stated"
    if rate is None and device is not None:
        rate = device.spot_usd_per_hour if spot else device.usd_per_hour
        source = f"catalog's {'spot' if spot else 'on-demand'} rate, {device.name}"
    return None if rate is None else Rented(count * rate, host_usd_per_hour, capacity, source + _of_them(count))


def owned(
    device: Hardware,
    count: int,
    purchase_usd: float | None = None,
    *,
    years: float = YEARS,
    maintenance: float = MAINTENANCE,
    host_usd_per_hour: float = 0.0,
    usd_per_kwh: float = ELECTRICITY_USD_PER_KWH,
    pue: float = PUE,
) -> Owned | None:
    """`count` devices that were bought, each at the stated price or the catalog's with its share of the machine; None
    where neither says one."""
    bought, source = purchase_usd, "stated"
    if bought is None and device.purchase_usd is not None:
        bought, source = device.purchase_usd + device.host_usd, f"catalog's purchase price, {device.name}"
    if bought is None:
        return None
    return Owned(
        purchase_usd=count * bought,
        idle_w=count * (device.idle_w + device.host_w),
        busy_w=count * (device.power_w - device.idle_w),
        years=years,
        maintenance=maintenance,
        host_usd_per_hour=host_usd_per_hour,
        usd_per_kwh=usd_per_kwh,
        pue=pue,
        source=source + _of_them(count),
    )


def _of_them(count: int) -> str:
    return f", {count} of them" if count > 1 else ""


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens a second of a busy engine: prompt tokens while it takes in prompts, answer tokens while it decodes a
    batch."""

    input: float
    output: float
    source: str = "stated"

    @classmethod
    def of(cls, roofline: Roofline) -> Throughput:
        """What the catalog expects: prompts of PRIOR_PROMPT tokens, BATCH sequences of that length in decode."""
        batch = max(1, min(BATCH, roofline.most_sequences(PRIOR_PROMPT)))
        return cls(
            roofline.prefill_tokens_per_s(),
            roofline.decode_tokens_per_s(batch, PRIOR_PROMPT),
            f"roofline, {batch} sequences of {PRIOR_PROMPT} tokens",
        )


@dataclass(frozen=True, slots=True)
class Running:
    """A deployment on hardware of one's own: how it is held, what it costs a month besides (storage, load balancer,
    monitoring), the share of its hours that are busy, and what it does in one."""

    held: Rented | Owned
    throughput: Throughput
    utilization: float = UTILIZATION
    usd_per_month: float = 0.0

    @property
    def fixed_per_hour(self) -> float:
        """USD of an hour in which nothing is asked."""
        return self.held.fixed_per_hour + self.usd_per_month / HOURS_PER_MONTH

    def price(self) -> Price:
        """What one more token costs."""
        return self._price(self.held.marginal_per_hour / 3600)

    def full_price(self) -> Price:
        """What a token costs with the idle hours shared out."""
        return self._price((self.fixed_per_hour / self.utilization + self.held.busy_per_hour) / 3600)

    def busy_seconds(self, input_tokens: float, output_tokens: float) -> float:
        return input_tokens / self.throughput.input + output_tokens / self.throughput.output

    def usd_for(self, input_tokens: float, output_tokens: float, hours: float = HOURS_PER_MONTH) -> float:
        """What `hours` cost that carry these tokens in all, whatever utilization that makes."""
        busy = self.busy_seconds(input_tokens, output_tokens) / 3600
        return self.fixed_per_hour * hours + self.held.busy_per_hour * busy

    def _price(self, usd_per_busy_second: float) -> Price:
        return Price(
            _nusd(usd_per_busy_second / self.throughput.input), _nusd(usd_per_busy_second / self.throughput.output)
        )

    def basis(self) -> str:
        """What both prices consist of, in a sentence."""
        match self.held:
            case Rented(capacity="fixed"):
                marginal = "0, since the rented hours are paid either way"
            case Rented():
                marginal = "its busy seconds of the rented hour"
            case Owned():
                marginal = "energy above idle"
        return (
            f"{self.fixed_per_hour:.4g} USD an hour ({self.held.source}); one more token: {marginal}; "
            f"bill: all hours at {self.utilization:.0%} utilization; {self.throughput.input:,.0f} prompt and "
            f"{self.throughput.output:,.0f} answer tokens/s ({self.throughput.source})"
        )


@dataclass(frozen=True, slots=True)
class Surcharge:
    """What comes on top of a provider's prices: the transfer of what is sent out, and what is paid by the month, shared
    out over the tokens expected in one."""

    data_transfer_usd_per_gb: float = 0.0
    usd_per_month: float = 0.0
    tokens_per_month: float = 0.0

    def price(self, base: Price) -> Price:
        """With what one more token adds: the transfer of prompts. Answers come in, which no cloud charges for."""
        transfer = _nusd(self.data_transfer_usd_per_gb * BYTES_PER_TOKEN / 1e9)
        return _raised(base, transfer, 0.0)

    def full_price(self, base: Price) -> Price:
        shared = _nusd(self.usd_per_month / self.tokens_per_month) if self.usd_per_month else 0.0
        return _raised(self.price(base), shared, shared)


def _raised(base: Price, by_input: float, by_output: float) -> Price:
    cached = None if base.cached_input is None else base.cached_input + by_input
    beyond = None
    if base.beyond is not None:
        beyond = (base.beyond[0], _raised(base.beyond[1], by_input, by_output))
    return Price(base.input + by_input, base.output + by_output, cached, beyond)


def _nusd(usd: float) -> float:
    """Nano-dollars to six digits: enough, readable, and never rounded to nothing."""
    return float(f"{usd * NUSD_PER_USD:.6g}")
