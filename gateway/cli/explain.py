"""`hybridgate policy explain`: one request, from flags or a file, against a fleet that is given or live."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx
import orjson
import typer
from rich.console import Console

from gateway.cli.terminal import PolicyPath, fail, loaded, policy_path, standard_output, table
from gateway.errors import GatewayError
from gateway.explain import explanation
from gateway.labels import Scanner
from gateway.livestate import LiveState, state_from
from gateway.loading import read_text
from gateway.policy import Policy
from gateway.policyfile.shapes import Shape
from gateway.routing import decide
from gateway.snapshot import Snapshot
from gateway.types import Caller, usd
from gateway.written import Asked, RequestShape, StateShape, asked, configured, facts_of, in_state, read, snapshot_of

S = TypeVar("S", bound=Shape)
_LIVE_TIMEOUT = 5.0


def explain(
    path: PolicyPath = "",
    text: Annotated[str, typer.Option(help="The prompt of a chat request with one message.")] = "",
    request: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="A chat request: the JSON body (`-` reads it), or YAML with the keys of a test case's `request`.",
        ),
    ] = "",
    model: Annotated[str | None, typer.Option(help="The model asked for. [default: auto]")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The most tokens the answer may have.", min=1)] = None,
    slo: Annotated[str | None, typer.Option(help="The latency class asked for.")] = None,
    max_cost_usd: Annotated[str | None, typer.Option(help="The caller's own cost cap, such as 0.002.")] = None,
    tags: Annotated[str | None, typer.Option(help="The request's tags, separated by commas.")] = None,
    data_class: Annotated[str | None, typer.Option(help="The x-data-class header.")] = None,
    header: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any other header; may be repeated.")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="The tenant of the caller's key.")] = None,
    key_tag: Annotated[list[str] | None, typer.Option(help="A tag of the caller's key; may be repeated.")] = None,
    state: Annotated[
        str,
        typer.Option(
            metavar="FILE|URL",
            help="The fleet: YAML with the keys of a test case's `state`, or the address of a gateway's admin port.",
        ),
    ] = "",
    down: Annotated[list[str] | None, typer.Option(help="A deployment to take as down; may be repeated.")] = None,
    all_configured: Annotated[
        bool, typer.Option("--all-configured", help="Take every key and address as set.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision as JSON.")] = False,
) -> None:
    """Show which deployment a request would go to, and why not to the others: every rule that was tried, every
    candidate with its predicted cost and latency, every other with the reason. It is the same decision that the server
    makes; without --state, for a fleet that is up and has not been measured."""
    policy = loaded(policy_path(path, os.environ), os.environ)
    policy = configured(policy) if all_configured else policy
    flags = {
        "x-hybridgate-slo": slo,
        "x-hybridgate-max-cost-usd": max_cost_usd,
        "x-hybridgate-tags": tags,
        "x-data-class": data_class,
        **_headers(header or []),
    }
    try:
        asking = _with_flags(_asked(text, request, model, max_tokens), flags, tenant, key_tag or [])
        policy, snapshot, notes = _fleet(policy, state, down or [])
        facts = facts_of(policy, Scanner(policy.kinds, policy.patterns), asking)
        decision = decide(policy, facts, snapshot)
    except GatewayError as error:
        fail(error.message)
    told = explanation(policy, facts, snapshot, decision)
    if as_json:
        sys.stdout.write(orjson.dumps(told | {"notes": notes}, option=orjson.OPT_INDENT_2).decode() + "\n")
        return
    _print(standard_output(), told, notes)


def _headers(pairs: list[str]) -> dict[str, str]:
    split = [pair.partition("=") for pair in pairs]
    if any(not (name and equals) for name, equals, _ in split):
        fail("--header must be NAME=VALUE, such as x-team=search")
    return {name.lower(): value for name, _, value in split}


def _asked(text: str, request: str, model: str | None, max_tokens: int | None) -> Asked:
    """The request from its file, or from the flags. Raises `BadRequest`."""
    if request.endswith((".yaml", ".yml")):
        return asked(_shape(request, "--request", RequestShape))
    if request:
        try:
            body = sys.stdin.buffer.read() if request == "-" else Path(request).read_bytes()
        except OSError as error:
            fail(f"--request: cannot read {request} ({error.strerror})")
        return Asked(body, {}, Caller())
    plain = {"messages": [{"role": "user", "content": text or "What is TTFT?"}], "model": model or "auto"}
    try:
        return Asked(orjson.dumps(plain if max_tokens is None else {**plain, "max_tokens": max_tokens}), {}, Caller())
    except orjson.JSONEncodeError:
        fail("--text and --model must be UTF-8, and --max-tokens a number of at most 19 digits")


def _with_flags(request: Asked, headers: Mapping[str, str | None], tenant: str | None, key_tags: list[str]) -> Asked:
    """The request with what the flags say of its sender."""
    caller = request.caller
    return replace(
        request,
        headers={**request.headers, **{name: value for name, value in headers.items() if value is not None}},
        caller=replace(caller, tenant=tenant or caller.tenant, tags=caller.tags | frozenset(key_tags)),
    )


def _shape(path: str, flag: str, shape: type[S]) -> S:
    """A YAML file of that shape; every mistake in it on the terminal and exit status 1."""
    try:
        found, problems = read(path, read_text(path), shape)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{flag}: cannot read {path} ({error.strerror if isinstance(error, OSError) else 'it is not UTF-8'})")
    if found is None:
        for problem in problems:
            sys.stderr.write(f"{problem}\n")
        raise typer.Exit(1)
    return found


def _fleet(policy: Policy, state: str, down: list[str]) -> tuple[Policy, Snapshot, list[str]]:
    """The policy in the state that is given, the fleet, and what to say about both."""
    _known(policy, "--down", down)
    if state.startswith(("http://", "https://")):
        live = _live(state)
        notes = []
        if live.policy_hash != policy.hash:
            notes.append(f"the gateway runs another policy ({live.policy_hash})")
        if unknown := sorted(policy.deployments.keys() - live.windows.keys()):
            notes.append(f"the gateway does not have {', '.join(unknown)}")
        policy, snapshot = live.in_policy(policy)
    else:
        shape = _shape(state, "--state", StateShape) if state else StateShape()
        _known(policy, "--state", [*(shape.down or ()), *(shape.unconfigured or ()), *(shape.deployments or ())])
        policy, notes = in_state(policy, shape), []
        snapshot = snapshot_of(policy, shape)
    statuses = {
        name: replace(status, down="taken as down") if name in down else status
        for name, status in snapshot.deployments.items()
    }
    return policy, replace(snapshot, deployments=statuses), notes


def _known(policy: Policy, flag: str, names: list[str]) -> None:
    unknown = sorted(set(names) - policy.deployments.keys())
    if unknown:
        fail(f"{flag}: no such deployment: {', '.join(unknown)}; known: {', '.join(policy.deployments)}")


def _live(url: str) -> LiveState:
    hint = "give the address of its admin port, such as http://127.0.0.1:9090"
    try:
        answer = httpx.get(url.rstrip("/").removesuffix("/state") + "/state", timeout=_LIVE_TIMEOUT, trust_env=False)
        answer.raise_for_status()
        return state_from(answer.json())
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fail(f"--state: the gateway does not say ({type(error).__name__}): {hint}")
    except ValueError as error:
        fail(f"--state: {error}: {hint}")


def _print(console: Console, told: dict[str, Any], notes: list[str]) -> None:
    prompt = told["prompt_tokens"]
    console.print(
        f"policy {told['policy']['path']} ({told['policy']['hash']}), labels: {', '.join(told['labels']) or 'none'}, "
        f"prompt about {prompt['estimate']} and at most {prompt['at_most']} tokens",
        markup=False,
    )
    for note in notes:
        console.print(note, markup=False, style="yellow")
    rules = table("rule", "outcome")
    for row in told["rules"]:
        rules.add_row(row["rule"], row["outcome"])
    console.print(rules)
    latencies = ("first_token_p95_ms", "total_p95_ms")
    chain = table("", "candidate", "zone", "cost, USD", "bill, USD", "first token p95", "whole answer p95", "note")
    for rank, row in enumerate(told["candidates"], 1):
        cost, bill = (_dollars(row[key]) for key in ("cost_usd", "bill_usd"))
        if row["congestion_usd"]:
            cost += f" + {_dollars(row['congestion_usd'])}"
        first, total = ("not measured" if row[key] is None else f"{row[key]:.0f} ms" for key in latencies)
        chain.add_row(str(rank), row["deployment"], row["zone"], cost, bill, first, total, row["note"])
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


def _dollars(amount: float | None) -> str:
    return "unknown" if amount is None else usd(round(amount * 1e9))
