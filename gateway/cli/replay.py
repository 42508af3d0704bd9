"""`hybridgate policy replay`: a log of decisions through another policy, as tables or JSON, with an exit status for
CI."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, replace
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console

from gateway.cli.terminal import fail, loaded, policy_path, standard_output, table
from gateway.policy import Policy
from gateway.replay import Flow, Replayed, Side, Sums, Went
from gateway.replaylog import Skipped
from gateway.replaylog import replay as replay_logs
from gateway.types import usd

_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?%")
_WINDOW = re.compile(r"([^=]+)=([1-9][0-9]{0,8})")


def replay(
    logs: Annotated[
        list[str], typer.Argument(help="Decision logs, plain or gzip, rotated ones as well; `-` reads standard input.")
    ],
    policy: Annotated[str, typer.Option(help="The policy to decide by, a path or the name of one that ships.")],
    windows: Annotated[
        list[str] | None,
        typer.Option("--window", metavar="NAME=TOKENS", help="A deployment's window, where only its engine says it."),
    ] = None,
    fail_on_change: Annotated[
        bool, typer.Option("--fail-on-change", help="Exit status 1 if a request would have gone elsewhere.")
    ] = False,
    max_cost_increase: Annotated[
        str | None, typer.Option(metavar="PERCENT", help="Exit status 1 if costs would have grown by more: 5%.")
    ] = None,
    examples: Annotated[int, typer.Option(help="How many changed requests to list.", min=0)] = 10,
    as_document: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Decide the requests of a log again by another policy, each with what was known then: what would have changed in
    destination, cost, predicted latency and local share."""
    limit = _percent(max_cost_increase) if max_cost_increase is not None else None
    by = _with_windows(loaded(policy_path(policy, os.environ), os.environ), windows or [])
    try:
        sums, skipped = replay_logs(logs, by, examples)
    except OSError as error:
        fail(f"cannot read {error.filename} ({error.strerror})")
    if not sums.requests:
        found = f"{skipped.others + skipped.unreadable} other lines"
        fail(f"no record of a decision in {', '.join(logs)} ({found}{'; ' + skipped.first if skipped.first else ''})")
    failures = _failures(sums, fail_on_change, limit)
    if as_document:
        document = _document(by, sums, skipped, failures)
        sys.stdout.write(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        _print(standard_output(), by, sums, skipped, failures)
    if failures:
        raise typer.Exit(1)


def _percent(text: str) -> float:
    found = _PERCENT.fullmatch(text.strip())
    if found is None:
        fail("--max-cost-increase must be a percentage, such as 5%")
    return float(found[1]) / 100


def _with_windows(policy: Policy, windows: list[str]) -> Policy:
    for text in windows:
        found = _WINDOW.fullmatch(text)
        if found is None or found[1] not in policy.deployments:
            fail(f"--window must be NAME=TOKENS with one of {', '.join(policy.deployments)}, such as local=8192")
        policy = policy.with_deployment(replace(policy.deployments[found[1]], window=int(found[2])))
    return policy


def _failures(sums: Sums, fail_on_change: bool, limit: float | None) -> list[str]:
    failures = []
    if fail_on_change and sums.changed:
        failures.append(f"{sums.changed} of {sums.requests} requests would have gone elsewhere")
    if limit is not None:
        increase = sums.cost_increase
        whole = sums.whole
        if increase is None and whole.cost_after:
            failures.append(f"costs would have grown from nothing to {usd(whole.cost_after)} USD")
        elif increase is not None and increase > limit:
            failures.append(f"costs would have grown by {increase:.1%}, above {limit:.1%}")
    return failures


@dataclass(frozen=True, slots=True)
class _Figure:
    """One row of the summary."""

    name: str
    before: str
    after: str


def _print(console: Console, policy: Policy, sums: Sums, skipped: Skipped, failures: list[str]) -> None:
    decided = ", ".join(f"{count:,} by {policy_hash}" for policy_hash, count in sums.policies.items())
    console.print(
        f"{sums.requests:,} requests ({decided}), again by {policy.path} ({policy.hash})", markup=False, soft_wrap=True
    )
    if skipped.others or skipped.unreadable:
        told = f"not replayed: {skipped.others:,} lines that record no decision, {skipped.unreadable:,} unreadable"
        console.print(told + (f", first {skipped.first}" if skipped.first else ""), markup=False, soft_wrap=True)
    for label, count in sums.unknown_labels.items():
        console.print(
            f'{count:,} requests carry the label "{label}", which this policy does not define',
            markup=False,
            style="yellow",
        )
    figures = table("", "before", "after")
    for figure in _figures(sums):
        figures.add_row(figure.name, figure.before, figure.after)
    console.print(figures)
    changed = sorted(
        ((key, flow) for key, flow in sums.flows.items() if key[0] != key[1]), key=lambda item: -item[1].requests
    )
    if changed:
        flows = table("from", "to", "requests", "cost, USD", "first token p95, ms")
        for (origin, destination), flow in changed:
            flows.add_row(origin, destination, f"{flow.requests:,}", _cost(flow), _first_token(flow))
        console.print(flows)
    if sums.examples:
        listed = table("decision", "labels", "from", "by rule", "to", "by rule")
        for one in sums.examples:
            before, after = one.before, one.after
            labels = ", ".join(sorted(one.labels))
            listed.add_row(one.decision_id, labels, before.destination, before.rule, after.destination, after.rule)
        console.print(listed)
    console.print(f"{sums.changed:,} of {sums.requests:,} would have gone elsewhere", markup=False)
    for failure in failures:
        console.print(f"failed: {failure}", markup=False, style="bold red")


def _figures(sums: Sums) -> list[_Figure]:
    before, after, whole = sums.before, sums.after, sums.whole
    figures = [
        _Figure("answered", f"{before.answered:,}", f"{after.answered:,}"),
        _Figure("refused", f"{before.refused:,}", f"{after.refused:,}"),
        _Figure("on premises", _share(before), _share(after)),
        _Figure("labelled, sent elsewhere", f"{before.labelled_away:,}", f"{after.labelled_away:,}"),
        _Figure("labelled, sent elsewhere masked", f"{before.labelled_masked:,}", f"{after.labelled_masked:,}"),
    ]
    if whole.costed:
        increase = sums.cost_increase
        grown = "" if increase is None else f" ({increase:+.1%})"
        name = f"cost of {whole.costed:,}, USD"
        figures.append(_Figure(name, usd(whole.cost_before), usd(whole.cost_after) + grown))
    if whole.timed:
        means = (f"{total / whole.timed:.0f}" for total in (whole.first_token_before, whole.first_token_after))
        figures.append(_Figure(f"first token p95 of {whole.timed:,}, predicted, mean ms", *means))
    return figures


def _share(side: Side) -> str:
    return "-" if side.local_share is None else f"{side.local_share:.1%}"


def _cost(flow: Flow) -> str:
    return f"{usd(flow.cost_before)} → {usd(flow.cost_after)}" if flow.costed else "unknown"


def _first_token(flow: Flow) -> str:
    if not flow.timed:
        return "unknown"
    return f"{flow.first_token_before / flow.timed:.0f} → {flow.first_token_after / flow.timed:.0f}"


def _document(policy: Policy, sums: Sums, skipped: Skipped, failures: list[str]) -> dict[str, Any]:
    whole = sums.whole
    return {
        "ok": not failures,
        "failures": failures,
        "policy": {"path": policy.path, "hash": policy.hash},
        "decided_by": sums.policies,
        "requests": sums.requests,
        "changed": sums.changed,
        "skipped": {"others": skipped.others, "unreadable": skipped.unreadable, "first": skipped.first},
        "undefined_labels": sums.unknown_labels,
        "before": _side(sums.before),
        "after": _side(sums.after),
        "cost": {
            "requests": whole.costed,
            "before_usd": float(usd(whole.cost_before)),
            "after_usd": float(usd(whole.cost_after)),
            "increase": sums.cost_increase,
        },
        "first_token_p95_ms": {
            "requests": whole.timed,
            "before_mean": whole.first_token_before / whole.timed if whole.timed else None,
            "after_mean": whole.first_token_after / whole.timed if whole.timed else None,
        },
        "flows": [
            {
                "from": before,
                "to": after,
                "requests": flow.requests,
                "cost_before_usd": float(usd(flow.cost_before)) if flow.costed else None,
                "cost_after_usd": float(usd(flow.cost_after)) if flow.costed else None,
            }
            for (before, after), flow in sums.flows.items()
        ],
        "examples": [_example(one) for one in sums.examples],
    }


def _side(side: Side) -> dict[str, Any]:
    return {
        "answered": side.answered,
        "refused": side.refused,
        "local_share": side.local_share,
        "labelled_sent_elsewhere": side.labelled_away,
        "labelled_sent_elsewhere_masked": side.labelled_masked,
    }


def _example(one: Replayed) -> dict[str, Any]:
    return {
        "decision": one.decision_id,
        "labels": sorted(one.labels),
        "before": _went(one.before),
        "after": _went(one.after),
    }


def _went(went: Went) -> dict[str, Any]:
    return {
        "deployment": went.deployment,
        "zone": went.zone,
        "refused": went.refused or None,
        "rule": went.rule,
        "cost_usd": None if went.cost_nusd is None else float(usd(went.cost_nusd)),
        "first_token_p95_ms": went.first_token_ms,
        "masked": went.masked,
    }
