"""`hybridgate key`: the file of callers' keys, made and changed without losing what else stands in it.

Owns making secrets, showing each once, and replacing the file whole. Refuses to take a secret as an argument, where
other users of the machine and the shell's history would see it.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import secrets
import stat
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console

from gateway.cli.terminal import fail, loaded_keys, standard_output, table
from gateway.keyfile import HEADER, CannotEdit, KeyErrors, moment_of, revoked, with_key
from gateway.keys import Key, Keys, digest_of
from gateway.loading import read_text
from gateway.settings import PREFIX

commands = typer.Typer(help="Make, list, revoke and check callers' keys.", no_args_is_help=True)

SECRET_PREFIX = "hg-"  # noqa: S105 - what every secret begins with
_ALPHABET = string.ascii_letters + string.digits
_LENGTH = 43  # 62^43 is more than 2^256
_SPAN = re.compile(r"([1-9][0-9]{0,4})d")
_A_DAY = 86_400

KeyFile = Annotated[
    str, typer.Option("--file", help="The file of keys; without it, HYBRIDGATE_KEYS.", show_default=False)
]


@commands.command()
def new(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="What records call the key.")],
    file: KeyFile = "",
    tenant: Annotated[str | None, typer.Option(help="Whom it belongs to.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A word that policies may look at; may be repeated.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="A label of every request with the key; may be repeated.")
    ] = None,
    deployment: Annotated[
        list[str] | None, typer.Option(help="One that the key may use, instead of all; may be repeated.")
    ] = None,
    slo: Annotated[
        list[str] | None, typer.Option(help="A latency class that it may ask for, instead of all; may be repeated.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="`90d`, a day, or a time with its offset from UTC.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="A key for the admin endpoints instead.")] = False,
) -> None:
    """Make a key and print its secret, which is shown this once and kept nowhere."""
    path = _path(file)
    lists = {"tags": tag, "labels": label, "deployments": deployment, "slo": slo}
    if admin and (tenant is not None or any(lists.values())):
        fail("--admin: such a key is for metrics and administration only; of the options it takes --expires")
    secret = SECRET_PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))
    entry: dict[str, str | list[str]] = {"id": key_id, "sha256": digest_of(secret).hex()}
    entry |= {"tenant": tenant} if tenant is not None else {}
    entry |= {name: words for name, words in lists.items() if words}
    entry |= {"expires": _expiry(expires)} if expires is not None else {}
    _change(path, lambda text: with_key(path, text or HEADER, "admin" if admin else "keys", entry), may_be_new=True)
    Console(stderr=True, highlight=False).print(
        f"the key {key_id} is in {path}; its secret, which is not shown again:", markup=False, soft_wrap=True
    )
    sys.stdout.write(f"{secret}\n")


@commands.command(name="list")
def list_keys(
    file: KeyFile = "", as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False
) -> None:
    """List the keys and whether they hold; never a secret, nor its digest."""
    keys, _ = loaded_keys(_path(file), None)
    rows = [_told(key, admin) for key, admin in _all(keys)]
    if as_json:
        sys.stdout.write(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode() + "\n")
        return
    shown = table("id", "standing", "tenant", "tags", "labels", "deployments", "slo", "expires")
    for row in rows:
        name = f"{row['id']} (admin)" if row["admin"] else row["id"]
        lists = ("all" if row[column] is None else ", ".join(row[column]) for column in _LISTS)
        shown.add_row(name, row["standing"], row["tenant"] or "", *lists, row["expires"] or "never")
    Console(highlight=False, markup=False).print(shown)


@commands.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID", help="The key.")], file: KeyFile = "") -> None:
    """Mark a key as revoked. Gateways that follow the file turn it away within a second; with HYBRIDGATE_REDIS_URL
    those that share it do at once, wherever their file is."""
    path = _path(file)

    def edit(text: str | None) -> str:
        assert text is not None
        try:
            return revoked(path, text, key_id)
        except LookupError:
            fail(f"{path} has no key called {key_id}: hybridgate key list shows those that it has")

    _change(path, edit)
    console = Console(stderr=True, highlight=False)
    console.print(f"the key {key_id} is revoked in {path}", markup=False, soft_wrap=True)
    url = os.environ.get(f"{PREFIX}REDIS_URL", "")
    if url:
        digest = next(key.digest for key, _ in _all(loaded_keys(path, None)[0]) if key.caller.key_id == key_id)
        console.print(_announced(url, digest), markup=False, soft_wrap=True)


def _announced(url: str, digest: bytes) -> str:
    """Revokes it through Redis, and says how that went. Exit status 1 where it did not."""
    from gateway.revocations import Revocations  # noqa: PLC0415 - redis, which the other commands need not
    from gateway.store import Store, StoreUnavailable  # noqa: PLC0415

    async def announce() -> None:
        async with Store(url, timeout=2.0) as store:
            await Revocations(store).announce(digest, time.time())

    try:
        asyncio.run(announce())
    except ValueError as error:
        fail(f"{PREFIX}REDIS_URL {error}")
    except StoreUnavailable as error:
        fail(
            f"the file is changed, but Redis was not told ({error}): gateways turn the key away when the file is there"
        )
    return "gateways that share this Redis turn it away now"


@commands.command()
def check(file: KeyFile = "") -> None:
    """Tell which key a secret belongs to and whether it holds. The secret is asked for, or read from standard input;
    exit status 1 where the key would be turned away."""
    keys, _ = loaded_keys(_path(file), None)
    secret = typer.prompt("secret", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
    console = standard_output()
    for key, admin in _all(keys):
        if key.digest == digest_of(secret.strip()):
            told = _told(key, admin)
            whose = "an admin key" if admin else f"of tenant {told['tenant']}"
            until = f", expires {told['expires']}" if told["expires"] is not None else ""
            console.print(f"{told['id']}: {told['standing']}, {whose}{until}", markup=False, soft_wrap=True)
            raise typer.Exit(0 if told["standing"] == "valid" else 1)
    console.print("no key of this file has that secret")
    raise typer.Exit(1)


_LISTS = ("tags", "labels", "deployments", "slo")


def _all(keys: Keys) -> Iterator[tuple[Key, bool]]:
    """Every key, and whether it is an operator's."""
    yield from ((key, False) for key in keys.callers)
    yield from ((key, True) for key in keys.operators)


def _told(key: Key, admin: bool) -> dict[str, Any]:
    caller = key.caller
    until = None if key.expires is None else datetime.fromtimestamp(key.expires, UTC).isoformat(timespec="minutes")
    return {
        "id": caller.key_id,
        "admin": admin,
        "standing": key.standing(time.time()),
        "tenant": None if admin else caller.tenant,
        "tags": sorted(caller.tags),
        "labels": sorted(caller.labels),
        "deployments": None if caller.deployments is None else sorted(caller.deployments),
        "slo": None if caller.slo is None else sorted(caller.slo),
        "expires": until,
    }


def _path(named: str) -> str:
    path = named or os.environ.get(f"{PREFIX}KEYS", "")
    if not path:
        fail(f"which file of keys? Name it with --file, or set {PREFIX}KEYS")
    return path


def _expiry(text: str) -> str:
    """What the file says of an expiry: a span from now on becomes a time."""
    span = _SPAN.fullmatch(text)
    if span is not None:
        moment = datetime.fromtimestamp(time.time() + int(span[1]) * _A_DAY, UTC)
        return moment.isoformat(timespec="minutes")
    try:
        moment_of(text)
    except ValueError as error:
        fail(f"--expires {error}; or a number of days, such as 90d")
    return text


def _change(path: str, edit: Callable[[str | None], str], *, may_be_new: bool = False) -> None:
    """Replace the file with its edited text: whole or not at all, one change at a time. A link stays one."""
    target = os.path.realpath(path)
    try:
        with _alone(os.path.dirname(target)):
            exists = os.path.exists(target)
            text = read_text(target) if exists or not may_be_new else None
            _replace(target, edit(text), stat.S_IMODE(os.stat(target).st_mode) if exists else 0o600)
    except KeyErrors as error:
        fail(f"{path} would not load, so it is not changed:\n{error}")
    except CannotEdit as error:
        fail(str(error))
    except UnicodeDecodeError:
        fail(f"{path} is not UTF-8 text")
    except OSError as error:
        fail(f"cannot change {path} ({error.strerror or error}): the file and its directory must be writable")


@contextmanager
def _alone(folder: str) -> Iterator[None]:
    """No other change of a file in the folder meanwhile."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _replace(path: str, text: str, mode: int) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=".", dir=os.path.dirname(path))
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
