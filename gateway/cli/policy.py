"""`hybridgate policy`: what a policy says, and where a request would go by it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
import typer
from rich.console import Console

from gateway.cases import cases_schema
from gateway.cli import replay, testing
from gateway.cli.terminal import PolicyPath, fail, loaded, policy_path, table
from gateway.errors import GatewayError
from gateway.explain import explanation
from gateway.facts import Stated, facts_from
from gateway.labels import Scanner
from gateway.loading import load_policy
from gateway.masking import Masker
from gateway.policy import Policy
from gateway.policyfile import PolicyErrors
from gateway.policyfile.schema import deployments_schema, policy_schema
from gateway.routing import decide
from gateway.tokens import count as count_tokens
from gateway.types import Caller, Deployment, DeploymentStatus, Price, RequestFacts, Snapshot, usd
from gateway.wire.chat import parse

commands = typer.Typer(help="Check a policy, and see why a request goes where it goes.", no_args_is_help=True)
commands.command()(testing.test)
commands.command()(replay.replay)


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
        summary["deployments"] = {name: _told(d) for name, d in policy.deployments.items()}
        sys.stdout.write(orjson.dumps(summary).decode() + "\n")
        return
    policy = loaded(path, os.environ)
    console = Console(highlight=False)
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
def explain(
    path: PolicyPath = "",
    text: Annotated[str, typer.Option(help="The prompt of a chat request with one message.")] = "",
    request: Annotated[str, typer.Option(help="A file with the JSON body of a chat request; `-` reads it.")] = "",
    model: Annotated[str, typer.Option(help="The model asked for.")] = "auto",
    max_tokens: Annotated[int | None, typer.Option(help="The most tokens the answer may have.", min=1)] = None,
    slo: Annotated[str | None, typer.Option(help="The latency class asked for.")] = None,
    max_cost_usd: Annotated[str | None, typer.Option(help="The caller's own cost cap, such as 0.002.")] = None,
    tags: Annotated[str | None, typer.Option(help="The request's tags, separated by commas.")] = None,
    data_class: Annotated[str | None, typer.Option(help="The x-data-class header.")] = None,
    down: Annotated[list[str] | None, typer.Option(help="A deployment to take as down; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision as JSON.")] = False,
) -> None:
    """Show which deployment a request would go to, and why not to the others: the same decision that the server makes,
    for a fleet that is up and has not been measured."""
    policy = loaded(policy_path(path, os.environ), os.environ)
    unknown = set(down or ()) - policy.deployments.keys()
    if unknown:
        fail(f"--down: no such deployment: {', '.join(sorted(unknown))}; known: {', '.join(policy.deployments)}")
    flags = {
        "x-hybridgate-slo": slo,
        "x-hybridgate-max-cost-usd": max_cost_usd,
        "x-hybridgate-tags": tags,
        "x-data-class": data_class,
    }
    headers = {name: value for name, value in flags.items() if value is not None}
    try:
        facts = _facts(policy, _body(text, request, model, max_tokens), headers)
        snapshot = _fleet(policy, down or [])
        decision = decide(policy, facts, snapshot)
    except GatewayError as error:
        fail(error.message)
    told = explanation(policy, facts, snapshot, decision)
    if as_json:
        sys.stdout.write(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode() + "\n")
        return
    _print_explanation(told)


@commands.command()
def schema(
    of: Annotated[Literal["policy", "deployments", "cases"], typer.Argument(help="Of which files.")] = "policy",
) -> None:
    """Print the JSON Schema of the policy files, for editors."""
    made = {"policy": policy_schema, "deployments": deployments_schema, "cases": cases_schema}[of]()
    sys.stdout.write(orjson.dumps(made, option=orjson.OPT_INDENT_2).decode() + "\n")


def _body(text: str, request: str, model: str, max_tokens: int | None) -> bytes:
    if request:
        try:
            return sys.stdin.buffer.read() if request == "-" else Path(request).read_bytes()
        except OSError as error:
            fail(f"--request: cannot read {request} ({error.strerror})")
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text or "What is TTFT?"}]}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:
        fail("--text and --model must be UTF-8, and --max-tokens a number of at most 19 digits")


def _facts(policy: Policy, body: bytes, headers: Mapping[str, str]) -> RequestFacts:
    chat = parse(body)
    stated = Stated.of(policy, chat, headers)
    scanner = Scanner(policy.kinds, policy.patterns)
    kinds = scanner.scan(chat.texts)
    maskable = policy.masks and bool(kinds) and Masker(scanner).masked(chat) is not None
    return facts_from(policy, chat, Caller(), headers, stated, kinds, count_tokens(chat), maskable=maskable)


def _fleet(policy: Policy, down: list[str]) -> Snapshot:
    up, off = DeploymentStatus(), DeploymentStatus(down="taken as down")
    return Snapshot(0.0, 0.0, {name: off if name in down else up for name in policy.deployments})


def _print_explanation(told: dict[str, Any]) -> None:
    console = Console(highlight=False)
    prompt = told["prompt_tokens"]
    console.print(
        f"policy {told['policy']['path']} ({told['policy']['hash']}), labels: {', '.join(told['labels']) or 'none'}, "
        f"prompt about {prompt['estimate']} and at most {prompt['at_most']} tokens",
        markup=False,
    )
    rules = table("rule", "outcome")
    for row in told["rules"]:
        rules.add_row(row["rule"], row["outcome"])
    console.print(rules)
    chain = table("", "candidate", "zone", "cost, USD", "bill, USD", "first token p95", "note")
    for rank, row in enumerate(told["candidates"], 1):
        cost, bill = ("unknown" if row[key] is None else usd(round(row[key] * 1e9)) for key in ("cost_usd", "bill_usd"))
        latency = "not measured" if row["first_token_p95_ms"] is None else f"{row['first_token_p95_ms']:.0f} ms"
        chain.add_row(str(rank), row["deployment"], row["zone"], cost, bill, latency, row["note"])
    if told["candidates"]:
        console.print(chain)
    rejected = table("rejected", "gate", "reason")
    for row in told["rejections"]:
        rejected.add_row(row["deployment"], row["gate"], row["reason"])
    if told["rejections"]:
        console.print(rejected)
    if told["deployment"] is not None:
        console.print(f"goes to {told['deployment']}", markup=False)
    else:
        console.print(f"refused with {told['refusal']['status']}: {told['refusal']['message']}", markup=False)
