"""The `hybridgate` command. Owns arguments, tables, and one-line errors with their fix; decides nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
from rich.console import Console

from gateway.cli import cache as cache_commands
from gateway.cli import keys as key_commands
from gateway.cli import policy as policy_commands
from gateway.cli.plan import plan
from gateway.cli.terminal import fail, loaded_files, loaded_keys, policy_path
from gateway.cli.usage import usage
from gateway.keys import Keys
from gateway.loading import FileState
from gateway.policy import Policy
from gateway.settings import PREFIX, Settings, SettingsError, settings_from

main = typer.Typer(
    name="hybridgate",
    help="One gateway in front of local and cloud language models, routed by policy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
main.add_typer(policy_commands.commands, name="policy")
main.add_typer(key_commands.commands, name="key")
main.add_typer(cache_commands.commands, name="cache")
main.command()(plan)
main.command()(usage)

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_BACKLOG = 2048  # connections that wait to be accepted

# Python's defaults (700, 10, 10) look for cycles about once a request; a request leaves none behind.
GC_THRESHOLDS = (20_000, 20, 50)


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
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that answer on the port, counting limits through Redis. [default: 1]", min=1),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="A policy file, or the name of one that ships. [default: default]")
    ] = None,
    keys: Annotated[
        str | None, typer.Option(help="File of callers' keys; without one, only this machine may ask.")
    ] = None,
    local_model: Annotated[
        str | None,
        typer.Option(help="What the local deployment serves: `demo`, a Hugging Face id, or a path. [default: demo]"),
    ] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Largest request body. [default: 33554432]")] = None,
    drain_delay_seconds: Annotated[
        float | None,
        typer.Option(help="How long requests are taken after a signal to stop, while /readyz says not to send any."),
    ] = None,
    drain_seconds: Annotated[float | None, typer.Option(help="How long open streams may finish at stop.")] = None,
    engine_start_seconds: Annotated[float | None, typer.Option(help="How long an engine may take to load.")] = None,
    open_to_network: Annotated[
        bool | None,
        typer.Option("--open-to-network", help="Allow a host other than loopback although callers have no keys."),
    ] = None,
    admin_host: Annotated[
        str | None, typer.Option(help="Address for metrics and administration. [default: 127.0.0.1]")
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(help="Port for metrics and administration; -1 for none. [default: 9090]", min=-1, max=65535),
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(help="Redis, for what several gateways share; gateway/README.md has the forms."),
    ] = None,
    redis_zone: Annotated[
        str | None,
        typer.Option(help="Where it is: on_premises lets labelled answers lie there."),
    ] = None,
    cache_secret: Annotated[
        str | None, typer.Option(help="File of 32 secret bytes that stored answers in Redis are sealed with.")
    ] = None,
    log: Annotated[str | None, typer.Option(help="File for decision records; `-` is standard output.")] = None,
    cache_entries: Annotated[int | None, typer.Option(help="Most answers stored in memory. [default: 100000]")] = None,
    cache_bytes: Annotated[int | None, typer.Option(help="Most bytes of them. [default: 67108864]")] = None,
    usage_file: Annotated[
        str | None, typer.Option(help="File for usage records, which `hybridgate usage` sums for an invoice.")
    ] = None,
    usage_file_megabytes: Annotated[
        int | None, typer.Option(help="Size at which that file is set aside and a new one begun. [default: 100]", min=1)
    ] = None,
    usage_stream: Annotated[
        bool | None,
        typer.Option("--usage-stream/--no-usage-stream", help="Keep usage records in a stream of Redis, too."),
    ] = None,
    usage_stream_entries: Annotated[
        int | None, typer.Option(help="About how many it keeps; 0 for all. [default: 1000000]", min=0)
    ] = None,
) -> None:
    """Start the gateway, and an engine for each local deployment.

    Every option can also be set as HYBRIDGATE_<OPTION>, such as HYBRIDGATE_LOCAL_MODEL.
    """
    given = locals()
    settings = settings_of(**{field.name: given[field.name] for field in fields(Settings)})
    policy_read, keys_read = read_files(settings)
    operators = keys_read is not None and bool(keys_read.keys.operators)
    with ExitStack() as listening:
        main_listener = listening.enter_context(bound(settings))
        admin_listener = None
        if settings.admin_port >= 0:
            admin_listener = listening.enter_context(bound_admin(settings, operators=operators))
        stream = listening.enter_context(open_log_file(settings.log))
        serving = run if settings.workers == 1 else run_workers
        serving(settings, policy_read, keys_read, Listeners(main_listener, admin_listener), stream)


@main.command(hidden=True)
def worker(
    index: Annotated[int, typer.Argument(help="Which of the workers.")],
    listener: Annotated[int, typer.Option(help="The descriptor of its socket on the port.")],
    folder: Annotated[Path, typer.Option(help="Where the sockets of engines and of workers' own pages are.")],
) -> None:
    """One of the processes that `serve --workers` starts. Ends when its standard input does."""
    from gateway.workers import in_turn, socket_of  # noqa: PLC0415

    settings = settings_of()
    policy_read, keys_read = read_files(settings)
    with ExitStack() as listening:
        main_listener = listening.enter_context(socket.socket(fileno=listener))
        pages = listening.enter_context(socket.socket(socket.AF_UNIX))
        own = socket_of(folder, index)
        own.unlink(missing_ok=True)
        pages.bind(str(own))  # it listens once its pages are served: until then, who asks is told so at once
        stream = in_turn(listening.enter_context(open_log_file(settings.log)), folder)
        run(settings, policy_read, keys_read, Listeners(main_listener, pages), stream, WorkerOf(index, folder))


def read_files(settings: Settings) -> tuple[PolicyRead, KeysRead | None]:
    """The policy and the keys that the settings name; ends the program where one does not load."""
    environ = dict(os.environ)
    if settings.local_model:
        environ[f"{PREFIX}LOCAL_MODEL"] = settings.local_model
    loaded_policy, states = loaded_files(policy_path(settings.policy, os.environ), environ)
    keys_read = KeysRead(*loaded_keys(settings.keys, loaded_policy)) if settings.keys else None
    return PolicyRead(loaded_policy, states, environ), keys_read


def open_log_file(path: str) -> BinaryIO:
    """Where decision records go. A file is appended to."""
    if path == "-":
        return open(sys.stdout.fileno(), "wb", buffering=0, closefd=False)
    try:
        return open(path, "ab", buffering=0)  # a line is one write, and none is left to fail at the end
    except OSError as error:
        fail(f"cannot write the log to {path} ({error.strerror}): choose another with --log")


def bound(settings: Settings) -> socket.socket:
    """The socket for callers, bound before anything slow starts, so that a port in use is one line."""
    host = settings.host
    if host not in _LOOPBACK and not settings.keys and not settings.open_to_network:
        fail(
            f"callers have no keys, so the gateway listens on loopback only, not on {host}: give them keys "
            "(hybridgate key new, then --keys FILE), use --host 127.0.0.1, or --open-to-network if something else "
            "guards it"
        )
    return _listening(host, settings.port, "--host", "choose another with --port")


def bound_admin(settings: Settings, *, operators: bool = False) -> socket.socket:
    """The socket for metrics and administration. `operators`: there are keys for it."""
    if settings.admin_host not in _LOOPBACK and not operators and not settings.open_to_network:
        fail(
            "there are no admin keys, so metrics and administration are on loopback only, not on "
            f"{settings.admin_host}: make one (hybridgate key new ID --admin, then --keys FILE), "
            "use --admin-host 127.0.0.1, or --open-to-network if something else guards it"
        )
    hint = "choose another with --admin-port, or none with --admin-port -1"
    return _listening(settings.admin_host, settings.admin_port, "--admin-host", hint)


def _listening(host: str, port: int, host_flag: str, in_use: str) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        fail(f"cannot listen on {host}:{port} ({error.strerror}): check {host_flag}")
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)  # of two instances that start at once, both can bind and one can listen
    except OSError as error:
        listener.close()
        fail(f"cannot listen on {host}:{port} ({error.strerror}): {in_use}")
    listener.set_inheritable(True)
    return listener


@dataclass(frozen=True, slots=True)
class Listeners:
    """The sockets of one gateway; `admin` is None where nobody asks for it."""

    main: socket.socket
    admin: socket.socket | None


@dataclass(frozen=True, slots=True)
class WorkerOf:
    """Which worker a process is, and the folder of its parent."""

    index: int
    folder: Path


@dataclass(frozen=True, slots=True)
class PolicyRead:
    """A policy with the files and variables that it was read from."""

    policy: Policy
    states: Mapping[str, FileState]
    environ: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class KeysRead:
    """Keys with the file that they were read from."""

    keys: Keys
    states: Mapping[str, FileState]


def run(
    settings: Settings,
    read: PolicyRead,
    keys: KeysRead | None,
    listeners: Listeners,
    log_stream: BinaryIO,
    worker_of: WorkerOf | None = None,
) -> None:
    """Serve until a signal, as one of several processes where `worker_of` says so. The server's modules are imported
    here, so that `policy check` starts at once."""
    from gateway.admin import admin_app  # noqa: PLC0415
    from gateway.app import build  # noqa: PLC0415
    from gateway.edge import Application, Edge  # noqa: PLC0415
    from gateway.engines import EngineRoom  # noqa: PLC0415
    from gateway.reload import KeysReloader, Reloader  # noqa: PLC0415
    from gateway.running import new_id  # noqa: PLC0415
    from gateway.server import Ending, Served, serve_until_stopped  # noqa: PLC0415
    from gateway.telemetry import JsonLog  # noqa: PLC0415

    tell = _teller("" if worker_of is None else f"worker {worker_of.index}: ")
    gc.set_threshold(*GC_THRESHOLDS)
    policy, log = read.policy, JsonLog(log_stream, tell)
    room = None if worker_of is None else EngineRoom(worker_of.folder, keeps=False)
    with _starting():
        app, gateway = build(settings, policy, log, tell, keys.keys if keys else None, room=room)
    if worker_of is None:
        _say_what_is_served(tell, policy, listeners)
    reloader = Reloader(policy, read.states, read.environ, gateway)
    keys_reloader = KeysReloader(keys.states, gateway.access) if keys is not None and gateway.access else None
    admin = None
    if listeners.admin is not None:
        guarded = worker_of is None and is_guarded(settings, keys)
        pages = admin_app(gateway, reloader, keys_reloader, guarded=guarded)
        admin = Served(Application.small(pages, Edge(log, new_id)), listeners.admin)
    followers = [reloader] if keys_reloader is None else [reloader, keys_reloader]
    ending = Ending(gateway.stop_soon, settings.drain_delay_seconds, settings.drain_seconds)
    serve_until_stopped(
        Served(app, listeners.main), admin, followers, ending, None if worker_of is None else sys.stdin.fileno()
    )


def run_workers(
    settings: Settings, read: PolicyRead, keys: KeysRead | None, listeners: Listeners, log_stream: BinaryIO
) -> None:
    """Serve with several processes until a signal."""
    from gateway.edge import Application, Edge  # noqa: PLC0415
    from gateway.engines import EngineRoom  # noqa: PLC0415
    from gateway.follow import Follower  # noqa: PLC0415
    from gateway.front import front_app  # noqa: PLC0415
    from gateway.reload import KeysReloader, Reloader  # noqa: PLC0415
    from gateway.running import Gateway, new_id  # noqa: PLC0415
    from gateway.server import Served  # noqa: PLC0415
    from gateway.telemetry import JsonLog  # noqa: PLC0415
    from gateway.workers import (  # noqa: PLC0415
        Keeping,
        Start,
        Workers,
        environment_of,
        in_turn,
        serve_workers_until_stopped,
        shared,
    )

    tell = _teller("")
    with _starting():
        folder = Path(tempfile.mkdtemp(prefix="hybridgate-"))
    try:
        log = JsonLog(in_turn(log_stream, folder), tell)
        with _starting():  # nobody else had the port, and now it is for the workers
            address = listeners.main.getsockname()
            listeners.main.close()
            kept = shared(address, listeners.main.family)
        # This process counts nothing and stores nothing: it keeps the engines running.
        alone = replace(
            settings, workers=1, redis_url="", redis_zone="", cache_secret="", usage_file="", usage_stream=False
        )
        room = EngineRoom(folder, keeps=True)
        with _starting():
            gateway = Gateway(alone, read.policy, log, tell, keys.keys if keys else None, room=room)
        _say_what_is_served(tell, read.policy, Listeners(kept, listeners.admin))
        tell(f"{settings.workers} workers")

        def command(index: int, listener: int) -> list[str]:
            own = ["worker", str(index), "--listener", str(listener), "--folder", str(folder)]
            return [sys.executable, "-m", "gateway.cli", *own]

        start = Start(command, environment_of(settings, os.environ), kept, folder)
        followers: list[Follower] = [Reloader(read.policy, read.states, read.environ, gateway)]
        if keys is not None and gateway.access:
            followers.append(KeysReloader(keys.states, gateway.access))

        workers, admin = Workers(settings.workers, start, tell), None
        if listeners.admin is not None:
            pages = front_app(workers, gateway, followers, guarded=is_guarded(settings, keys))
            admin = Served(Application.small(pages, Edge(log, new_id)), listeners.admin)
        drain = settings.drain_delay_seconds + settings.drain_seconds
        serve_workers_until_stopped(workers, Keeping(gateway, followers, admin, drain))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_guarded(settings: Settings, keys: KeysRead | None) -> bool:
    """Whether the admin port asks for an operator's key."""
    return settings.admin_host not in _LOOPBACK and keys is not None and len(keys.keys.operators) > 0


def _teller(before: str) -> Callable[[str], None]:
    terminal = Console(stderr=True, highlight=False)

    def tell(line: str) -> None:
        terminal.print(before + line, markup=False, soft_wrap=True)

    return tell


@contextmanager
def _starting() -> Iterator[None]:
    """Ends the program with one line where it cannot start."""
    try:
        yield
    except SettingsError as error:
        fail(str(error))
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        fail(f"cannot start ({what}{error.strerror or error}): a writable TMPDIR and readable ca_files are needed")


def _say_what_is_served(tell: Callable[[str], None], policy: Policy, listeners: Listeners) -> None:
    tell(f"hybridgate: {_url(listeners.main)}/v1, policy {policy.path} ({policy.hash})")
    if listeners.admin is not None:
        tell(f"metrics: {_url(listeners.admin)}/metrics")
    for deployment in policy.deployments.values():
        tell(f"  {deployment.name}: {deployment.model} in {deployment.zone}{_state(deployment.unavailable)}")


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _state(unavailable: str | None) -> str:
    return f" - unavailable: {unavailable}" if unavailable else ""


@main.command()
def metrics() -> None:
    """List what `/metrics` tells, as a Markdown table."""
    from gateway.metrics import table  # noqa: PLC0415

    sys.stdout.write(table() + "\n")


@main.command()
def demo(
    stay: Annotated[bool, typer.Option(help="Keep gateway and fake providers running after the tour.")] = True,
    port: Annotated[int, typer.Option(help="The gateway's port.", min=0, max=65535)] = 8080,
) -> None:
    """Watch requests being routed between the bundled model and fake cloud providers, without a key."""
    from gateway.demo.tour import tour  # noqa: PLC0415

    raise typer.Exit(asyncio.run(tour(stay=stay, port=port)))
