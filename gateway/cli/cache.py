"""`hybridgate cache`: what is stored of answers, and forgetting it, through the admin port of a running gateway.

Owns the tables. Refuses to read stored answers: a gateway says whose they are and how many, never what.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import httpx
import typer

from gateway.cli.terminal import fail, standard_output, table
from gateway.settings import PREFIX

commands = typer.Typer(help="Count and forget stored answers.", no_args_is_help=True)

_TIMEOUT = 30.0

Admin = Annotated[str, typer.Option(help="The gateway's admin port.", envvar=f"{PREFIX}ADMIN_URL", show_envvar=False)]
KeyVariable = Annotated[
    str, typer.Option(help="The environment variable that holds an admin key, where the port asks for one.")
]
Tenant = Annotated[str | None, typer.Option(help="Those of this tenant; '' for those that all tenants share.")]
Model = Annotated[str | None, typer.Option(help="Those to requests for this model.")]
Deployment = Annotated[str | None, typer.Option(help="Those that this deployment made.")]
_ADMIN = "http://127.0.0.1:9090"
_KEY = "HYBRIDGATE_ADMIN_KEY"


@commands.command()
def stats(admin: Admin = _ADMIN, key_variable: KeyVariable = _KEY) -> None:
    """How many answers are stored where, of which tenant, to which model, by which deployment."""
    told = _asked("GET", admin, key_variable, {})
    shown = table("where", "tenant", "model", "deployment", "answers", "bytes")
    for where, figures in told["stored"].items():
        for row in figures["by"]:
            names = where, row["tenant"] or "(shared)", row["model"], row["deployment"]
            shown.add_row(*names, f"{row['entries']:,}", f"{row['bytes']:,}")
        shown.add_row(where, "", "", "all", f"{figures['entries']:,}", f"{figures['bytes']:,}")
    out = standard_output()
    out.print(shown)
    counts = told["counts"]
    asked = counts["hits"] + counts["misses"]
    share = f", {100 * counts['hits'] / asked:.1f} % of them hits" if asked else ""
    out.print(f"{asked:,} requests since this gateway's start{share}; {counts['stores']:,} answers stored")


@commands.command()
def purge(
    admin: Admin = _ADMIN,
    key_variable: KeyVariable = _KEY,
    tenant: Tenant = None,
    model: Model = None,
    deployment: Deployment = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
) -> None:
    """Forget stored answers: in that gateway's memory, and in what its replicas share."""
    named = {"tenant": tenant, "model": model, "deployment": deployment}
    chosen = {name: value for name, value in named.items() if value is not None}
    if bool(chosen) is everything:
        fail("say which: --tenant, --model, --deployment (all that are given count), or --all and none of them")
    told = _asked("POST", admin, key_variable, chosen)
    count = told["forgotten"]
    standard_output().print(f"{count:,} answer{'s' * (count != 1)} forgotten")


def _asked(method: str, admin: str, key_variable: str, query: dict[str, str]) -> Any:
    key = os.environ.get(key_variable)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    url = f"{admin.rstrip('/')}/cache{'/purge' if method == 'POST' else ''}"
    try:
        answer = httpx.request(method, url, params=query, headers=headers, timeout=_TIMEOUT, trust_env=False)
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            fail(f"the gateway asks for an admin key: put one into {key_variable}, or name another variable")
        if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            fail(answer.json()["error"]["message"])
        answer.raise_for_status()
        return answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        fail(f"the gateway does not say ({type(error).__name__}): name its admin port with --admin, as in {_ADMIN}")
