"""What every command shares: a mistake is one line, a policy that does not load is all of its errors, tables look
alike."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.loading import FileState, read_policy
from gateway.policy import Policy
from gateway.settings import PREFIX

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
    package = Path(__file__).parents[1]
    places = [Path("policies"), package / "shipped_policies", package.parent / "policies"]
    return next((str(p / "default.yaml") for p in places if (p / "default.yaml").exists()), "policies/default.yaml")


def loaded(path: str, environ: Mapping[str, str]) -> Policy:
    """The policy, or every error in it on the terminal and exit status 1."""
    return loaded_files(path, environ)[0]


def loaded_files(path: str, environ: Mapping[str, str]) -> tuple[Policy, Mapping[str, FileState]]:
    """The same, with the files that it was read from."""
    result = read_policy(path, environ)
    if result.policy is not None:
        return result.policy, result.states
    for problem in result.problems:
        sys.stderr.write(f"{problem}\n")
    count = len(result.problems)
    sys.stderr.write(f"{count} error{'s' if count != 1 else ''}; the policy was not loaded\n")
    raise typer.Exit(1)


def table(*columns: str) -> Table:
    """An empty table as all commands print them."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made
