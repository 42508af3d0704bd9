"""`hybridgate plan`: would a model fit, how fast would it be, and when is it cheaper than a cloud.

Owns flags, files and tables. Every number is worked out in plan.py, roofline.py and costs.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from gateway import charts
from gateway.catalog.hardware import HARDWARE, Hardware, UnknownHardware, hardware
from gateway.catalog.models import Architecture, UnknownArchitecture, architecture, architecture_of, stated
from gateway.catalog.prices import COMPARED, model_info
from gateway.cli.plan_tables import memory, print_plan, print_survey
from gateway.cli.terminal import fail, standard_output
from gateway.costs import (
    ELECTRICITY_USD_PER_KWH,
    MAINTENANCE,
    PUE,
    UTILIZATION,
    YEARS,
    Capacity,
    Owned,
    Rented,
    owned,
    rented,
)
from gateway.loading import litellm_price_map
from gateway.plan import MAX_BATCH, Load, Plan, chart, document, made
from gateway.policyfile.nearness import suggestion
from gateway.roofline import QUANTIZATIONS, DoesNotRun, Quantization, Roofline, what_would_fit
from gateway.types import Price

_WIDEST: tuple[Quantization, ...] = ("bf16", "fp16", "fp32")
_NARROWER: tuple[Quantization, ...] = ("int8", "int4")
_BY_NAME: Mapping[str, Quantization] = {"nf4": "int4", **{name: name for name in QUANTIZATIONS}}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kmbt]?)")
_SCALES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}

SHAPE = "Shape of a model that the catalog does not know"
PRICE = "What the hardware costs"
SPEED = "Speed as measured, in place of the roofline's"


@dataclass(frozen=True, slots=True)
class _Holding:
    """How the hardware is paid for, as far as the flags say."""

    usd_per_hour: float | None
    spot: bool
    capacity: Capacity
    buy: bool
    purchase_usd: float | None
    years: float
    maintenance: float
    electricity: float
    pue: float
    host_usd_per_hour: float

    def contradiction(self) -> str | None:
        """What the flags say against each other, in a sentence."""
        if self._bought and (self.usd_per_hour is not None or self.spot):
            return "--buy and --purchase-usd are for hardware that is bought, --usd-per-hour and --spot for rented"
        if self.spot and self.usd_per_hour is not None:
            return "--spot chooses the catalog's rate, and has no use beside --usd-per-hour"
        return None

    @property
    def _bought(self) -> bool:
        return self.buy or self.purchase_usd is not None

    def of(self, device: Hardware, count: int) -> Rented | Owned | None:
        """None where neither the flags nor the catalog say a price."""
        if self._bought:
            return owned(
                device,
                count,
                self.purchase_usd,
                years=self.years,
                maintenance=self.maintenance,
                host_usd_per_hour=self.host_usd_per_hour,
                usd_per_kwh=self.electricity,
                pue=self.pue,
            )
        return rented(
            device,
            count,
            self.usd_per_hour,
            spot=self.spot,
            host_usd_per_hour=self.host_usd_per_hour,
            capacity=self.capacity,
        )

    def missing(self, device: Hardware) -> str:
        if self._bought:
            return f"{device.name} is only rented: leave out --buy, or state --purchase-usd"
        return f"the catalog has no {'spot' if self.spot else 'hourly'} rate for {device.name}: state --usd-per-hour"


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked of every device."""

    shape: Architecture
    count: int
    load: Load
    context: int
    max_batch: int
    utilization: float
    holding: _Holding
    prices: Mapping[str, Price]

    def plan(self, roofline: Roofline, held: Rented | Owned) -> Plan:
        return made(roofline, held, self.load, self.utilization, self.prices, self.context, self.max_batch)


def plan(
    model: Annotated[
        str, typer.Argument(help="A name of the catalog, a Hugging Face id, or a config.json (or its directory).")
    ],
    on: Annotated[
        str | None, typer.Option("--hardware", help=f"{', '.join(HARDWARE)}. Without it, all are compared.")
    ] = None,
    count: Annotated[int, typer.Option(help="Devices that hold the model together.", min=1, max=1024)] = 1,
    quantization: Annotated[
        str | None, typer.Option(help=f"{', '.join(QUANTIZATIONS)}. [default: 16 bits, as the device computes them]")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens that a sequence may hold. [default: prompt and answer]", min=1)
    ] = None,
    requests_per_s: Annotated[float, typer.Option(help="Requests a second.", min=1e-6, max=1e9)] = 1.0,
    prompt_tokens: Annotated[int, typer.Option(help="Of an average request.", min=1)] = 1024,
    output_tokens: Annotated[int, typer.Option(help="Of an average answer.", min=1)] = 256,
    max_batch: Annotated[int, typer.Option(help="Most sequences that decode together.", min=1)] = MAX_BATCH,
    utilization: Annotated[
        float, typer.Option(help="Share of hours that are busy, for the cost.", min=1e-4, max=1.0)
    ] = UTILIZATION,
    against: Annotated[
        list[str] | None, typer.Option(help="A cloud model to compare with; may be repeated. [default: several]")
    ] = None,
    usd_per_hour: Annotated[
        float | None, typer.Option(help="Of one device.", min=1e-9, max=1e12, rich_help_panel=PRICE)
    ] = None,
    spot: Annotated[bool, typer.Option("--spot", help="The catalog's spot rate.", rich_help_panel=PRICE)] = False,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="Rented hours are paid either way.", rich_help_panel=PRICE)
    ] = False,
    buy: Annotated[bool, typer.Option("--buy", help="Bought, at the catalog's price.", rich_help_panel=PRICE)] = False,
    purchase_usd: Annotated[
        float | None,
        typer.Option(help="Of one device with its share of the machine.", min=1e-9, max=1e12, rich_help_panel=PRICE),
    ] = None,
    years: Annotated[float, typer.Option(help="Written off over.", min=0.1, max=100, rich_help_panel=PRICE)] = YEARS,
    maintenance: Annotated[
        float, typer.Option(help="Share of the purchase a year.", min=0, max=1, rich_help_panel=PRICE)
    ] = MAINTENANCE,
    electricity: Annotated[
        float, typer.Option(help="USD a kWh.", min=1e-9, max=1e12, rich_help_panel=PRICE)
    ] = ELECTRICITY_USD_PER_KWH,
    pue: Annotated[
        float, typer.Option(help="Site's power over the machines'.", min=1, max=5, rich_help_panel=PRICE)
    ] = PUE,
    host_usd_per_hour: Annotated[
        float, typer.Option(help="What comes on top.", min=0, max=1e12, rich_help_panel=PRICE)
    ] = 0.0,
    prefill_tokens_per_s: Annotated[
        float | None,
        typer.Option(help="Of an idle engine, 1024-token prompts.", min=1e-3, max=1e9, rich_help_panel=SPEED),
    ] = None,
    decode_tokens_per_s: Annotated[
        float | None, typer.Option(help="Of one sequence alone.", min=1e-3, max=1e9, rich_help_panel=SPEED)
    ] = None,
    parameters: Annotated[str | None, typer.Option(help="Such as 8b or 350m.", rich_help_panel=SHAPE)] = None,
    layers: Annotated[int, typer.Option(min=1, rich_help_panel=SHAPE)] = 32,
    hidden: Annotated[int, typer.Option(min=1, rich_help_panel=SHAPE)] = 4096,
    heads: Annotated[int, typer.Option(min=1, rich_help_panel=SHAPE)] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, rich_help_panel=SHAPE)] = 8,
    head_dim: Annotated[int, typer.Option(min=1, rich_help_panel=SHAPE)] = 128,
    vocab: Annotated[int, typer.Option(min=1, rich_help_panel=SHAPE)] = 128_256,
    window: Annotated[int, typer.Option(min=1, rich_help_panel=SHAPE)] = 131_072,
    picture: Annotated[
        list[Path] | None, typer.Option(help="Draw cost over load to this .svg or .png; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Would a model fit, how fast would it be, what would it cost, and when is that less than a cloud asks.

    Exit status 1 where it does not fit, with what would.
    """
    try:
        if parameters is None:
            shape = _architecture(model)
        else:
            size = _size(parameters)
            shape = stated(model, size, layers, hidden, heads, kv_heads, head_dim, vocab, window)
    except UnknownArchitecture as error:
        fail(str(error))
    load = Load(requests_per_s, prompt_tokens, output_tokens)
    needed = _context(context, load, shape)
    capacity: Capacity = "fixed" if fixed else "elastic"
    energy = (electricity, pue, host_usd_per_hour)
    holding = _Holding(usd_per_hour, spot, capacity, buy, purchase_usd, years, maintenance, *energy)
    if (wrong := holding.contradiction()) is not None:
        fail(wrong)
    question = _Question(shape, count, load, needed, max_batch, utilization, holding, _prices(against))
    if on is None:
        _survey(question, quantization, as_json)
        return
    roofline = _as_measured(_roofline(shape, on, count, quantization), prefill_tokens_per_s, decode_tokens_per_s)
    if roofline.most_sequences(needed) == 0:
        _refuse(roofline, needed, as_json)
    held = holding.of(roofline.hardware, count)
    if held is None:
        fail(holding.missing(roofline.hardware))
    result = question.plan(roofline, held)
    for path in picture or ():
        try:
            charts.draw([chart(result)], path)
        except charts.NoPicture as error:
            fail(f"--picture: {error}")
    if as_json:
        _write(document(result))
    else:
        print_plan(result)


def _context(asked: int | None, load: Load, shape: Architecture) -> int:
    """Tokens that a sequence may hold."""
    needed = asked or load.context
    if needed > shape.window:
        fail(f"a context of {needed:,} tokens is above the {shape.window:,} of {shape.name}: ask for less")
    if needed < load.context:
        fail(f"--context {needed:,} is less than prompt and answer, {load.context:,} tokens: raise it")
    return needed


def _architecture(model: str) -> Architecture:
    """By the catalog, or from a config.json. Raises UnknownArchitecture."""
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix != ".json":
        return architecture(model)
    try:
        config = orjson.loads(path.read_bytes())
    except OSError as error:
        fail(f"cannot read {path} ({error.strerror}): give a name of the catalog, or a config.json")
    except orjson.JSONDecodeError:
        fail(f"{path} is not JSON")
    if not isinstance(config, dict):
        fail(f"{path} is not a model's config.json")
    return architecture_of(config, path.parent.name or str(path), str(path))


def _size(text: str) -> int:
    found = _SIZE.fullmatch(text.strip().lower())
    if found is None or float(found[1]) == 0:
        fail(f"--parameters {text}: give a number such as 8b, 350m or 8030261248")
    return round(float(found[1]) * _SCALES[found[2]])


def _prices(against: list[str] | None) -> dict[str, Price]:
    """The prices of the cloud models to compare with, by the name that was asked for."""
    rows = litellm_price_map()
    found: dict[str, Price] = {}
    for name in against or COMPARED:
        price = model_info(COMPARED.get(name, name), rows).price
        if price is not None:
            found[name] = price
        elif against:
            fail(f"--against: litellm's price map has no price for {name}{suggestion(name, (*COMPARED, *rows))}")
    return found


def _roofline(shape: Architecture, on: str, count: int, quantization: str | None) -> Roofline:
    try:
        device = hardware(on)
    except UnknownHardware as error:
        fail(f"--hardware: {error}")
    try:
        return Roofline.of(shape, device, _quantization(quantization, device), count)
    except DoesNotRun as error:
        fail(f"--quantization: {error}")


def _quantization(asked: str | None, device: Hardware) -> Quantization:
    """As asked for, or 16 bits in the format that the device computes."""
    if asked is None or asked == "none":
        return next(width for width in _WIDEST if width in device.compute)
    wanted = _BY_NAME.get(asked)
    if wanted is None:
        fail(f"--quantization {asked}: known are {', '.join(QUANTIZATIONS)}{suggestion(asked, QUANTIZATIONS)}")
    return wanted


def _as_measured(roofline: Roofline, prefill: float | None, decode: float | None) -> Roofline:
    if prefill is None and decode is None:
        return roofline
    if prefill is None or decode is None:
        fail("--prefill-tokens-per-s and --decode-tokens-per-s go together: the roofline has both")
    return roofline.measured(prefill, decode)


def _refuse(roofline: Roofline, needed: int, as_json: bool) -> None:
    """Why it does not fit, and what would; exit status 1."""
    advice = what_would_fit(roofline, needed)
    if as_json:
        sizes = {"weights": round(roofline.memory.weights), "usable": round(roofline.memory.usable)}
        _write({"fits": False, "context_tokens": needed, "memory_bytes": sizes, "advice": advice})
    else:
        console = standard_output()
        console.print(memory(roofline, needed))
        console.print(
            f"does not fit: {roofline.model.name} as {roofline.quantization} with one context of {needed:,} tokens on "
            f"{roofline.count} x {roofline.hardware.name}. {advice}",
            markup=False,
        )
    raise typer.Exit(1)


def _survey(question: _Question, quantization: str | None, as_json: bool) -> None:
    """Every device, with the widest weights that fit it."""
    plans: list[Plan] = []
    refused: dict[str, str] = {}
    for device in HARDWARE.values():
        try:
            widths = [_quantization(quantization, device), *(() if quantization else _NARROWER)]
            tried = [Roofline.of(question.shape, device, width, question.count) for width in widths]
        except DoesNotRun as error:
            refused[device.name] = str(error)
            continue
        fitting = next((one for one in tried if one.most_sequences(question.context)), None)
        held = question.holding.of(device, question.count)
        if fitting is None:
            refused[device.name] = f"does not fit; {what_would_fit(tried[0], question.context)}"
        elif held is None:
            refused[device.name] = "the catalog has no such price; choose it with --hardware and state one"
        else:
            plans.append(question.plan(fitting, held))
    if as_json:
        _write({"plans": [document(one) for one in plans], "left_out": refused})
    else:
        print_survey(plans, refused, question.load, question.utilization)


def _write(told: Any) -> None:
    sys.stdout.write(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode() + "\n")
