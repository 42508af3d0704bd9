"""The `hybridgate` command. Owns arguments, tables, and one-line errors with their fix; decides nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from math import ceil
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn

import orjson
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.errors import GatewayError
from gateway.explain import explanation
from gateway.facts import Stated, facts_from
from gateway.labels import Scanner
from gateway.loading import load_policy
from gateway.policy import Policy
from gateway.policyfile import PolicyErrors
from gateway.routing import decide
from gateway.settings import PREFIX, Settings, SettingsError, settings_from
from gateway.tokens import count as count_tokens
from gateway.types import Caller, DeploymentStatus, RequestFacts, Snapshot, usd
from gateway.wire.chat import parse

main = typer.Typer(
    name="hybridgate",
    help="One gateway in front of local and cloud language models, routed by policy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
policy_commands = typer.Typer(help="Check a policy, and see why a request goes where it goes.", no_args_is_help=True)
main.add_typer(policy_commands, name="policy")

_BACKLOG = 2048  # connections that wait to be accepted

# Python's defaults (700, 10, 10) look for cycles about once a request; a request leaves none behind.
GC_THRESHOLDS = (20_000, 20, 50)

PolicyPath = Annotated[
    str, typer.Argument(help="A policy file; without one, HYBRIDGATE_POLICY, then policies/default.yaml.")
]


def fail(message: str) -> NoReturn:
    """One line on the terminal, exit status 2."""
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(message)}", markup=True, soft_wrap=True)
    raise typer.Exit(2)


def default_policy(environ: Mapping[str, str]) -> str:
    """The policy to load where none is named: HYBRIDGATE_POLICY, then ./policies, then the one that ships."""
    named = environ.get(f"{PREFIX}POLICY")
    if named:
        return named
    package = Path(__file__).parent
    places = [Path("policies"), package / "shipped_policies", package.parent / "policies"]
    return next((str(p / "default.yaml") for p in places if (p / "default.yaml").exists()), "policies/default.yaml")


def loaded(path: str, environ: Mapping[str, str]) -> Policy:
    """The policy, or every error in it on the terminal and exit status 1."""
    try:
        return load_policy(path, environ)
    except PolicyErrors as error:
        for problem in error.problems:
            sys.stderr.write(f"{problem}\n")
        count = len(error.problems)
        sys.stderr.write(f"{count} error{'s' if count != 1 else ''}; the policy was not loaded\n")
        raise typer.Exit(1) from None


def settings_of(**flags: Any) -> Settings:
    """Settings from the environment, each overridden by its flag where that was given."""
    try:
        settings = settings_from(os.environ)
        return replace(settings, **{name: value for name, value in flags.items() if value is not None})
    except SettingsError as error:
        fail(str(error))


@main.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [default: 8080]", min=0, max=65535)] = None,
    policy: Annotated[str | None, typer.Option(help="The policy file. [default: policies/default.yaml]")] = None,
    local_model: Annotated[
        str | None,
        typer.Option(help="What the local deployment serves: `demo`, a Hugging Face id, or a path. [default: demo]"),
    ] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Largest request body. [default: 33554432]")] = None,
    drain_seconds: Annotated[float | None, typer.Option(help="How long open streams may finish at stop.")] = None,
    engine_start_seconds: Annotated[float | None, typer.Option(help="How long an engine may take to load.")] = None,
    open_to_network: Annotated[
        bool | None,
        typer.Option("--open-to-network", help="Allow a host other than loopback although callers have no keys."),
    ] = None,
    log: Annotated[str | None, typer.Option(help="File for decision records; `-` is standard output.")] = None,
) -> None:
    """Start the gateway, and an engine for each local deployment.

    Every option can also be set as HYBRIDGATE_<OPTION>, such as HYBRIDGATE_LOCAL_MODEL.
    """
    given = locals()
    settings = settings_of(**{field.name: given[field.name] for field in fields(Settings)})
    environ = dict(os.environ)
    if settings.local_model:
        environ[f"{PREFIX}LOCAL_MODEL"] = settings.local_model
    loaded_policy = loaded(settings.policy or default_policy(os.environ), environ)
    listener = bound(settings)
    try:
        with open_log_file(settings.log) as stream:
            run(settings, loaded_policy, listener, stream)
    finally:
        listener.close()


def open_log_file(path: str) -> BinaryIO:
    """Where decision records go. A file is appended to."""
    if path == "-":
        return open(sys.stdout.fileno(), "wb", buffering=0, closefd=False)
    try:
        return open(path, "ab", buffering=0)  # a line is one write, and none is left to fail at the end
    except OSError as error:
        fail(f"cannot write the log to {path} ({error.strerror}): choose another with --log")


def bound(settings: Settings) -> socket.socket:
    """A listening socket, bound before anything slow starts, so that a port in use is one line."""
    host, port = settings.host, settings.port
    if host not in ("127.0.0.1", "::1", "localhost") and not settings.open_to_network:
        fail(
            f"callers have no keys, so the gateway listens on loopback only, not on {host}: "
            "use --host 127.0.0.1, or --open-to-network if something else guards it"
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        fail(f"cannot listen on {host}:{port} ({error.strerror}): check --host")
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)  # of two instances that start at once, both can bind and one can listen
    except OSError as error:
        listener.close()
        fail(f"cannot listen on {host}:{port} ({error.strerror}): choose another with --port")
    listener.set_inheritable(True)
    return listener


def run(settings: Settings, policy: Policy, listener: socket.socket, log_stream: BinaryIO) -> None:
    """Serve until a signal. The server's modules are imported here, so that `policy check` starts at once."""
    import uvicorn  # noqa: PLC0415
    import uvloop  # noqa: PLC0415

    from gateway.app import build  # noqa: PLC0415
    from gateway.http1 import Http1  # noqa: PLC0415
    from gateway.telemetry import open_log  # noqa: PLC0415

    terminal = Console(stderr=True, highlight=False)

    def tell(line: str) -> None:
        terminal.print(line, markup=False, soft_wrap=True)

    gc.set_threshold(*GC_THRESHOLDS)
    try:
        app, _ = build(settings, policy, open_log(log_stream, tell), tell)
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        fail(f"cannot start ({what}{error.strerror or error}): a writable TMPDIR and readable ca_files are needed")
    host, port = listener.getsockname()[:2]
    tell(f"hybridgate: http://{host}:{port}/v1, policy {policy.path} ({policy.hash})")
    for deployment in policy.deployments.values():
        tell(f"  {deployment.name}: {deployment.model} in {deployment.zone}{_state(deployment.unavailable)}")
    config = uvicorn.Config(
        app,
        http=Http1,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=ceil(settings.drain_seconds),
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(uvicorn.Server(config).serve(sockets=[listener]))


def _state(unavailable: str | None) -> str:
    return f" - unavailable: {unavailable}" if unavailable else ""


@main.command()
def demo(
    stay: Annotated[bool, typer.Option(help="Keep gateway and fake providers running after the tour.")] = True,
    port: Annotated[int, typer.Option(help="The gateway's port.", min=0, max=65535)] = 8080,
) -> None:
    """Watch requests being routed between the bundled model and fake cloud providers, without a key."""
    from gateway.demo.tour import tour  # noqa: PLC0415

    raise typer.Exit(asyncio.run(tour(stay=stay, port=port)))


@policy_commands.command()
def check(
    path: PolicyPath = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Load a policy as the server would, and print every error at its file:line:column. Exit status 1 if there is
    one."""
    path = path or default_policy(os.environ)
    if as_json:
        try:
            policy = load_policy(path, os.environ)
        except PolicyErrors as error:
            problems = [{f: getattr(p, f) for f in ("file", "line", "column", "message")} for p in error.problems]
            sys.stdout.write(orjson.dumps({"ok": False, "errors": problems}).decode() + "\n")
            raise typer.Exit(1) from None
        summary = {"ok": True, "path": policy.path, "hash": policy.hash, "rules": [r.name for r in policy.rules]}
        sys.stdout.write(orjson.dumps(summary).decode() + "\n")
        return
    policy = loaded(path, os.environ)
    console = Console(highlight=False)
    console.print(f"{policy.path}: ok (hash {policy.hash})", markup=False)
    table = _table("deployment", "zone", "window", "USD/M in, out", "model")
    for d in policy.deployments.values():
        price = f"{d.price.input / 1000:g}, {d.price.output / 1000:g}" if d.price else "unknown"
        window = f"{d.window:,}" if d.window else "once it runs" if d.served_locally else "unknown"
        table.add_row(d.name, d.zone, window, price, d.model)
    console.print(table)
    for d in policy.deployments.values():
        if d.unavailable is not None:
            console.print(f"{d.name} is unavailable: {d.unavailable}", markup=False)
    rules = _table("rule", "candidates, ordered by")
    for rule in (*policy.rules, policy.default):
        rules.add_row(rule.name, f"{', '.join(rule.candidates)}, by {rule.order_by}")
    console.print(rules)


@policy_commands.command()
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
    policy = loaded(path or default_policy(os.environ), os.environ)
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
        decision = decide(policy, facts, _fleet(policy, down or []))
    except GatewayError as error:
        fail(error.message)
    told = explanation(policy, facts, decision)
    if as_json:
        sys.stdout.write(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode() + "\n")
        return
    _print_explanation(told)


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
    kinds = Scanner(policy.kinds).scan(chat.texts)
    return facts_from(policy, chat, Caller(), headers, stated, kinds, count_tokens(chat))


def _fleet(policy: Policy, down: list[str]) -> Snapshot:
    up, off = DeploymentStatus(), DeploymentStatus(down="taken as down")
    return Snapshot(0.0, 0.0, {name: off if name in down else up for name in policy.deployments})


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print_explanation(told: dict[str, Any]) -> None:
    console = Console(highlight=False)
    prompt = told["prompt_tokens"]
    console.print(
        f"policy {told['policy']['path']} ({told['policy']['hash']}), labels: {', '.join(told['labels']) or 'none'}, "
        f"prompt about {prompt['estimate']} and at most {prompt['at_most']} tokens",
        markup=False,
    )
    rules = _table("rule", "outcome")
    for row in told["rules"]:
        rules.add_row(row["rule"], row["outcome"])
    console.print(rules)
    table = _table("", "candidate", "zone", "cost, USD", "first token p95", "note")
    for rank, row in enumerate(told["candidates"], 1):
        cost = "unknown" if row["cost_usd"] is None else usd(round(row["cost_usd"] * 1e9))
        latency = "not measured" if row["first_token_p95_ms"] is None else f"{row['first_token_p95_ms']:.0f} ms"
        table.add_row(str(rank), row["deployment"], row["zone"], cost, latency, row["note"])
    if told["candidates"]:
        console.print(table)
    rejected = _table("rejected", "gate", "reason")
    for row in told["rejections"]:
        rejected.add_row(row["deployment"], row["gate"], row["reason"])
    if told["rejections"]:
        console.print(rejected)
    if told["deployment"] is not None:
        console.print(f"goes to {told['deployment']}", markup=False)
    else:
        console.print(f"refused with {told['refusal']['status']}: {told['refusal']['message']}", markup=False)


if __name__ == "__main__":
    main()
