"""The tables of `hybridgate plan`. Owns their words and units; works nothing out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from gateway.cli.terminal import standard_output, table
from gateway.plan import SECONDS_PER_MONTH, BreakEven, Load, Plan
from gateway.roofline import USABLE, Roofline
from gateway.types import Price


def memory(roofline: Roofline, context: int) -> Table:
    """What lies where, in GB."""
    sizes = roofline.memory
    rows = table("memory", "GB")
    rows.add_row(f"{roofline.count} x {roofline.hardware.name}, {USABLE:.0%} of it", f"{sizes.usable / 1e9:.1f}")
    weights = f"weights, {roofline.quantization}, {roofline.model.parameters:,} parameters"
    rows.add_row(weights, f"{sizes.weights / 1e9:.1f}")
    rows.add_row("activations", f"{sizes.activations / 1e9:.1f}")
    rows.add_row(f"left for KV cache: {roofline.kv_capacity_tokens:,} tokens", f"{sizes.free / 1e9:.1f}")
    rows.add_row(f"KV cache of one context: {context:,} tokens", f"{context * sizes.kv_per_token / 1e9:.2f}")
    return rows


def print_plan(plan: Plan) -> None:
    """Everything about one device."""
    console = standard_output()
    for rows in (memory(plan.roofline, plan.context), _speed(plan), _costs(plan), _months(plan)):
        console.print(rows)
    console.print(f"Speed is {plan.roofline.efficiency.source}.", markup=False, soft_wrap=True)
    console.print(f"Cost: {plan.running.basis()}.", markup=False, soft_wrap=True)


def print_survey(plans: Sequence[Plan], left_out: Mapping[str, str], load: Load, utilization: float) -> None:
    """A row for each device."""
    rows = table("hardware", "weights", "sequences", "first token", "tokens/s", "engines", "USD/M in, out", "USD/month")
    for plan in plans:
        rows.add_row(
            _device(plan.roofline),
            plan.roofline.quantization,
            f"{plan.most_sequences:,}",
            _seconds(plan.first_token_s),
            f"{plan.running.throughput.output:,.0f}",
            str(plan.engines),
            _pair(plan.running.full_price()),
            f"{plan.usd_per_month:,.0f}",
        )
    console = standard_output()
    console.print(rows)
    for name, why in left_out.items():
        console.print(f"{name}: {why}", markup=False)
    console.print(
        f"For {load.rate:g} requests/s of {load.prompt:,} and {load.output:,} tokens; USD/M at {utilization:.0%} "
        "utilization. Choose one with --hardware to see what it consists of.",
        markup=False,
    )


def _speed(plan: Plan) -> Table:
    rows = table("speed", "")
    first = f"{_seconds(plan.first_token_idle_s)}, {_seconds(plan.first_token_s)}"
    rows.add_row(f"sequences of {plan.context:,} tokens that fit", f"{plan.most_sequences:,}, {plan.batch} at once")
    rows.add_row("prompt tokens a second", f"{plan.running.throughput.input:,.0f}")
    rows.add_row(f"answer tokens a second, {plan.batch} sequences", f"{plan.running.throughput.output:,.0f}")
    rows.add_row("requests a second that one engine carries", f"{plan.most_requests_per_s:.3g}")
    rows.add_row(f"engines for {plan.load.rate:g} requests a second", f"{plan.engines}, {plan.utilization:.0%} busy")
    rows.add_row("sequences at once on each", f"{plan.concurrency:.2g}")
    rows.add_row("first token: idle, and mean under the load", first)
    rows.add_row("between tokens, under the load", _seconds(plan.token_s))
    return rows


def _costs(plan: Plan) -> Table:
    rows = table("USD per million tokens", "input", "output")
    prices = {
        "one more": plan.running.price(),
        f"all, at {plan.running.utilization:.0%} utilization": plan.running.full_price(),
        f"all, at this load ({plan.utilization:.0%})": plan.at_load.full_price(),
    }
    for name, price in prices.items():
        rows.add_row(name, f"{price.input / 1000:.4g}", f"{price.output / 1000:.4g}")
    return rows


def _months(plan: Plan) -> Table:
    rows = table("", "USD/M in, out", "USD/month", "break-even, tokens/month", "one engine's use there")
    rows.add_row(_device(plan.roofline), _pair(plan.at_load.full_price()), f"{plan.usd_per_month:,.0f}", "", "")
    requests = plan.load.rate * SECONDS_PER_MONTH
    for other in plan.break_even:
        rows.add_row(other.name, _pair(other.price), f"{other.usd_per_request * requests:,.0f}", *_met(other))
    return rows


def _met(other: BreakEven) -> tuple[str, str]:
    if other.tokens_per_month is None or other.utilization is None:
        return "never on one engine", ""
    return f"{other.tokens_per_month / 1e6:,.0f} million", f"{other.utilization:.1%}"


def _device(roofline: Roofline) -> str:
    return f"{roofline.count} x {roofline.hardware.name}" if roofline.count > 1 else roofline.hardware.name


def _pair(price: Price) -> str:
    return f"{price.input / 1000:.3g}, {price.output / 1000:.3g}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
