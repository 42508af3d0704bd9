"""`hybridgate policy`: what a policy says, and where a request would go by it."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, Literal

import orjson
import typer

from gateway.advice import advice
from gateway.cases import cases_schema
from gateway.cli import explain, replay, simulate, testing
from gateway.cli.terminal import PolicyPath, loaded, policy_path, standard_output, table
from gateway.loading import load_policy
from gateway.policyfile import PolicyErrors
from gateway.policyfile.schema import deployments_schema, policy_schema
from gateway.types import Deployment, Price

commands = typer.Typer(help="Check a policy, and see why a request goes where it goes.", no_args_is_help=True)
commands.command()(testing.test)
commands.command()(explain.explain)
commands.command()(replay.replay)
commands.command()(simulate.simulate)
commands.command()(simulate.diff)


@commands.command()
def check(
    path: PolicyPath = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Load a policy as the server would, and print every error at its file:line:column. Exit status 1 if there is
    one."""
    path = policy_path(path, os.environ)
    if as_json:
        try:
            policy = load_policy(path, os.environ)
        except PolicyErrors as error:
            problems = [{f: getattr(p, f) for f in ("file", "line", "column", "message")} for p in error.problems]
            sys.stdout.write(orjson.dumps({"ok": False, "errors": problems}).decode() + "\n")
            raise typer.Exit(1) from None
        summary = {"ok": True, "path": policy.path, "hash": policy.hash, "rules": [r.name for r in policy.rules]}
        summary["warnings"] = advice(policy)
        summary["deployments"] = {name: _told(d) for name, d in policy.deployments.items()}
        sys.stdout.write(orjson.dumps(summary).decode() + "\n")
        return
    policy = loaded(path, os.environ)
    console = standard_output()
    console.print(f"{policy.path}: ok (hash {policy.hash})", markup=False)
    deployments = table("deployment", "zone", "window", "USD/M in, out", "on the bill", "model")
    for d in policy.deployments.values():
        window = f"{d.window:,}" if d.window else "once it runs" if d.served_locally else "unknown"
        deployments.add_row(d.name, d.zone, window, _per_million(d.price), _per_million(d.bill), d.model)
    console.print(deployments)
    for d in policy.deployments.values():
        if d.full_price is not None:
            console.print(f"{d.name} costs {d.cost_basis}", markup=False)
    for d in policy.deployments.values():
        if d.unavailable is not None:
            console.print(f"{d.name} is unavailable: {d.unavailable}", markup=False)
    rules = table("rule", "candidates, ordered by")
    for rule in (*policy.rules, policy.default):
        rules.add_row(rule.name, f"{', '.join(rule.candidates)}, by {rule.order_by}")
    console.print(rules)
    for sentence in advice(policy):
        console.print(f"warning: {sentence}", markup=False, style="yellow", soft_wrap=True)


def _told(deployment: Deployment) -> dict[str, Any]:
    """A deployment as JSON: USD per million tokens of one more request and on the bill; null where nobody knows."""

    def usd_per_million(price: Price | None) -> dict[str, float] | None:
        return None if price is None else {"input": price.input / 1000, "output": price.output / 1000}

    return {
        "zone": deployment.zone,
        "model": deployment.model,
        "unavailable": deployment.unavailable,
        "usd_per_million_tokens": usd_per_million(deployment.price),
        "bill_usd_per_million_tokens": usd_per_million(deployment.bill),
        "cost": deployment.cost_basis or None,
    }


def _per_million(price: Price | None) -> str:
    return f"{price.input / 1000:.3g}, {price.output / 1000:.3g}" if price is not None else "unknown"


@commands.command()
def schema(
    of: Annotated[Literal["policy", "deployments", "cases"], typer.Argument(help="Of which files.")] = "policy",
) -> None:
    """Print the JSON Schema of the policy files, for editors."""
    made = {"policy": policy_schema, "deployments": deployments_schema, "cases": cases_schema}[of]()
    sys.stdout.write(orjson.dumps(made, option=orjson.OPT_INDENT_2).decode() + "\n")
