"""`hybridgate policy simulate` and `hybridgate policy diff`: policies over a trace, in virtual time.

Owns flags and tables. What is simulated and how it is counted is in gateway/simulate.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from pydantic import TypeAdapter

from gateway import charts
from gateway.cli.terminal import fail, loaded, standard_output, table
from gateway.policy import Policy, Slo
from gateway.policyfile.values import Seconds
from gateway.simulate import difference, report
from gateway.simulate.bound import NoBound
from gateway.simulate.cloud import weather
from gateway.simulate.compare import Comparison, compared
from gateway.simulate.files import read_text, read_trace
from gateway.simulate.fleetfile import FleetModel, described_engine, fleet_model, simulated
from gateway.simulate.mix import Mix, private_label, requests
from gateway.simulate.routers import PolicyRouter, Router, baselines
from gateway.simulate.synthetic import synthetic, synthetic_of
from gateway.simulate.trace import Trace, TraceError
from gateway.simulate.world import World
from gateway.simulate.world import simulate as run_in

TRACE = "What arrives"
FLEET = "Which engines and clouds there are"
OUTPUT = "What comes out"

TraceFile = Annotated[
    str | None,
    typer.Option(
        "--trace", help="CSV or JSONL, plain or gzipped: our own columns, Azure's or Mooncake's.", rich_help_panel=TRACE
    ),
]
SyntheticText = Annotated[
    str | None,
    typer.Option(
        "--synthetic",
        metavar="TEXT",
        help="Draw the trace, such as `poisson,rate=5,seconds=600,prompt=1200,output=200` or `bursty,rate=5,burst=8`.",
        rich_help_panel=TRACE,
    ),
]
Private = Annotated[
    float, typer.Option(help="Share of requests that are private.", min=0, max=1, rich_help_panel=TRACE)
]
PrivateLabel = Annotated[
    str | None,
    typer.Option(
        "--private-label",
        help="The label that private requests carry. [default: the first invariant's]",
        rich_help_panel=TRACE,
    ),
]
Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--class",
        metavar="NAME=SHARE",
        help="Share of the requests that are of a latency class; repeat. [default: the same share of each]",
        rich_help_panel=TRACE,
    ),
]
Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--slo",
        metavar="NAME=TIME",
        help="Another limit for a class's first token than the policy's, such as interactive=1s; repeat.",
        rich_help_panel=TRACE,
    ),
]
TimeScale = Annotated[
    float, typer.Option(help="Everything arrives so many times as fast.", min=0.001, max=1000, rich_help_panel=TRACE)
]
Limit = Annotated[int | None, typer.Option(help="Only the first requests of the trace.", min=1, rich_help_panel=TRACE)]
Seed = Annotated[int, typer.Option(help="Of all that is drawn.", min=0, rich_help_panel=TRACE)]
FleetFile = Annotated[
    str | None, typer.Option("--fleet", help="A fleet file: see gateway/simulate/README.md.", rich_help_panel=FLEET)
]
EngineText = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="TEXT",
        help="Engines that the fleet file does not describe: MODEL@HARDWARE or MODEL@HARDWARE/QUANTIZATION of the "
        "catalog, or the file that `hybridgate-engine calibrate` writes.",
        rich_help_panel=FLEET,
    ),
]
LocalShare = Annotated[
    float | None,
    typer.Option(
        help="Make the engines so fast that together they carry this share of all work.",
        min=0.001,
        max=1000,
        rich_help_panel=FLEET,
    ),
]
ByLoad = Annotated[
    bool,
    typer.Option(
        "--by-load",
        help="Reach --local-share by letting everything arrive faster or slower, and leave the engines as they are.",
        rich_help_panel=FLEET,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=OUTPUT)]


def simulate(
    paths: Annotated[list[str], typer.Argument(metavar="POLICY...", help="Policy files; each meets the same world.")],
    trace: TraceFile = None,
    drawn: SyntheticText = None,
    private: Private = 0.0,
    label: PrivateLabel = None,
    classes: Classes = None,
    limits: Limits = None,
    time_scale: TimeScale = 1.0,
    limit: Limit = None,
    seed: Seed = 0,
    fleet: FleetFile = None,
    engine: EngineText = None,
    local_share: LocalShare = None,
    by_load: ByLoad = False,
    with_baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Also always local, always cloud, round robin, and thresholds of requests in flight.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    bound: Annotated[
        bool, typer.Option("--bound", help="Also the least that any router could pay.", rich_help_panel=OUTPUT)
    ] = False,
    picture: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Write a picture, .svg or .png; repeat.", rich_help_panel=OUTPUT),
    ] = None,
    markdown: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the tables as Markdown.", rich_help_panel=OUTPUT)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let policies route a trace in virtual time, by the same decisions that the server makes, and count cost,
    latency, use of the engines and private requests that left."""
    policies = [loaded(path, os.environ) for path in paths]
    try:
        came = _trace(trace, drawn)
        mix = _mix(policies[0], private, label, classes, time_scale, limit, seed)
        worlds = [
            _world(_with_limits(policy, limits or []), came, mix, fleet, engine, local_share, by_load)
            for policy in policies
        ]
        entrants = [(world, PolicyRouter(world.policy.path, world.policy)) for world in worlds]
        found = compared(entrants, _baselines(worlds[0]) if with_baselines else [], bound)
    except (TraceError, NoBound) as error:
        fail(str(error))
    about = _about(came, worlds[0], mix, local_share)
    try:
        for file in picture or []:
            charts.draw(report.pictures(found), file, f"{came.name}: {len(worlds[0].requests):,} requests")
        if markdown is not None:
            Path(markdown).write_text(report.markdown(found, about))
    except charts.NoPicture as error:
        fail(str(error))
    except OSError as error:
        fail(f"--markdown: cannot write {markdown} ({error.strerror})")
    if as_json:
        sys.stdout.write(orjson.dumps(report.document(found, about), option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        _print(found, about)


def diff(
    before: Annotated[str, typer.Argument(help="The policy as it is.")],
    after: Annotated[str, typer.Argument(help="The policy as it might be.")],
    trace: TraceFile = None,
    drawn: SyntheticText = None,
    private: Private = 0.0,
    label: PrivateLabel = None,
    classes: Classes = None,
    limits: Limits = None,
    time_scale: TimeScale = 1.0,
    limit: Limit = None,
    seed: Seed = 0,
    fleet: FleetFile = None,
    engine: EngineText = None,
    local_share: LocalShare = None,
    by_load: ByLoad = False,
    exit_code: Annotated[
        bool,
        typer.Option("--exit-code", help="Exit status 1 where a request goes elsewhere.", rich_help_panel=OUTPUT),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what changes from one policy to another over a trace: which requests go elsewhere, cost, latency, and what
    stays local."""
    policies = [loaded(path, os.environ) for path in (before, after)]
    try:
        came = _trace(trace, drawn)
        mix = _mix(policies[0], private, label, classes, time_scale, limit, seed)
        worlds = [
            _world(_with_limits(policy, limits or []), came, mix, fleet, engine, local_share, by_load)
            for policy in policies
        ]
        runs = [run_in(world, PolicyRouter(world.policy.path, world.policy)) for world in worlds]
        found = difference.difference(worlds[0], *runs)
    except TraceError as error:
        fail(str(error))
    if as_json:
        sys.stdout.write(orjson.dumps(difference.document(found), option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        _print_difference(found)
    if exit_code and found.moved:
        raise typer.Exit(1)


def _trace(file: str | None, drawn: str | None) -> Trace:
    if (file is None) == (drawn is None):
        fail("give a trace with --trace FILE, or have one drawn with --synthetic; not both")
    return read_trace(file) if file is not None else synthetic(synthetic_of(drawn or ""))


def _mix(
    policy: Policy,
    private: float,
    label: str | None,
    classes: Sequence[str] | None,
    time_scale: float,
    limit: int | None,
    seed: int,
) -> Mix:
    shares = {name: float(share) for name, share in (_pair("--class", text) for text in classes or [])}
    if classes is None and policy.slo:
        shares = dict.fromkeys(policy.slo, 1 / len(policy.slo))
    label = private_label(policy) if label is None else label
    return Mix(private, label, shares, time_scale, limit, seed)


def _pair(flag: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if flag == "--class":
        try:
            right = 0 <= float(value) <= 1
        except ValueError:
            right = False
        if not right:
            fail(f"{flag}: write NAME=SHARE with a share from 0 to 1, such as interactive=0.4")
    elif not equals:
        fail(f"{flag}: write NAME=TIME, such as interactive=1s")
    return name, value


def _with_limits(policy: Policy, limits: Sequence[str]) -> Policy:
    slo: dict[str, Slo] = dict(policy.slo)
    for name, text in (_pair("--slo", text) for text in limits):
        if name not in slo:
            fail(f"--slo: {policy.path} has no latency class {name}; it has {', '.join(slo) or 'none'}")
        try:
            limit = TypeAdapter(Seconds).validate_python(text)
        except ValueError:
            fail(f"--slo: {name} must have a duration with its unit, such as 50ms, 1s or 10m")
        slo[name] = replace(slo[name], first_token_p95_ms=limit * 1000)
    return replace(policy, slo=slo)


def _world(
    policy: Policy, trace: Trace, mix: Mix, fleet: str | None, engine: str | None, share: float | None, by_load: bool
) -> World:
    model = None if engine is None else described_engine(engine, read_text)
    known: FleetModel = fleet_model(policy, model, fleet, read_text)
    policy = simulated(policy, known)
    asked = requests(trace, mix, policy)
    if share is not None and by_load:
        faster = mix.time_scale * known.carried(asked) / share
        asked = requests(trace, replace(mix, time_scale=faster), policy)
    elif share is not None:
        known = known.sized(asked, share)
    return World(policy, known, asked, weather(known.clouds, asked, mix.seed), trace.began)


def _baselines(world: World) -> list[Router]:
    if not world.fleet.engines or not world.fleet.clouds:
        fail("--baselines needs an engine and a cloud")
    return baselines(world.policy, list(world.fleet.engines), list(world.fleet.clouds))


def _about(trace: Trace, world: World, mix: Mix, share: float | None) -> dict[str, Any]:
    """What was simulated, for those who read the result."""
    told: dict[str, Any] = {
        "trace": trace.name,
        "requests": len(world.requests),
        "seconds": round(world.requests[-1].arrival_s, 1),
        "private": mix.private,
        "seed": mix.seed,
    }
    for name, part in mix.classes.items():
        limit = world.policy.slo[name].first_token_p95_ms
        told[f"class {name}"] = f"{part:.3g} within {limit:g} ms" if limit is not None else f"{part:.3g}"
    if share is not None:
        told["local share"] = share
    return told


def _print(found: Comparison, about: Mapping[str, Any]) -> None:
    console = standard_output()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), markup=False, soft_wrap=True)
    for name, engine in found.world.fleet.engines.items():
        console.print(f"{name}: {engine.source}", markup=False, soft_wrap=True)
    for columns, rows in report.tables(found):
        shown = table(*columns)
        for cells in rows:
            shown.add_row(*cells)
        console.print(shown)
    for note in report.notes(found):
        console.print(note, markup=False, soft_wrap=True)


def _print_difference(found: difference.Difference) -> None:
    console = standard_output()
    sides = table("policy", "cost, USD", "billed", "SLO met", "local", "refused", "forecast p50", "private out")
    for own, predicted in zip((found.before, found.after), found.predicted_ms, strict=True):
        sides.add_row(
            own.router,
            report.dollars(own.cost_nusd),
            report.dollars(own.billed_nusd),
            report.percent(own.met),
            report.percent(own.local),
            f"{own.refused:,}",
            "none" if predicted is None else report.seconds(predicted),
            str(own.violations),
        )
    console.print(sides)
    if found.moves:
        moves = table("from", "to", "requests", "cost, USD")
        for move in found.moves:
            cost = f"{'+' if move.cost_nusd >= 0 else '-'}{report.dollars(abs(move.cost_nusd))}"
            moves.add_row(move.before, move.after, f"{move.requests:,}", cost)
        console.print(moves)
    console.print(f"{found.moved:,} of {found.before.requests:,} requests go elsewhere", markup=False)
