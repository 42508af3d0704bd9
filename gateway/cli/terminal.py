"""What every command shares: a mistake is one line, a policy that does not load is all of its errors, tables look
alike."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.keys import Keys
from gateway.loading import FileState, known_names, read_keys, read_policy
from gateway.policy import Policy
from gateway.policyfile import Problem
from gateway.settings import PREFIX

PolicyPath = Annotated[
    str,
    typer.Argument(
        help="A policy file, or the name of one that ships; without one, HYBRIDGATE_POLICY, then `default`."
    ),
]


_PACKAGE = Path(__file__).parents[1]
_SHORT = re.compile(r"[A-Za-z0-9_-]+")


WIDTH_OF_A_FILE = 160  # columns, where the output is no terminal: rich would take 80 and break numbers


def standard_output() -> Console:
    """Standard output, as wide as its terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)


def fail(message: str) -> NoReturn:
    """One line on the terminal, exit status 2."""
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(message)}", markup=True, soft_wrap=True)
    raise typer.Exit(2)


def policy_path(named: str, environ: Mapping[str, str]) -> str:
    """The policy to load: the one named, else HYBRIDGATE_POLICY, else `default`. A name without a slash and a suffix is
    looked for in ./policies, then among those that ship; where there is none, one line and exit status 2."""
    name = named or environ.get(f"{PREFIX}POLICY") or "default"
    if not _SHORT.fullmatch(name) or Path(name).exists():
        return name
    places = [Path("policies"), _PACKAGE / "shipped_policies", _PACKAGE.parent / "policies"]
    found = next((place / f"{name}.yaml" for place in places if (place / f"{name}.yaml").exists()), None)
    if found is None:
        names = {file.stem for place in places for file in place.glob("*.yaml")}
        known = sorted(name for name in names if not name.endswith(("deployments", "_test")))
        fail(f'no policy is called "{name}"; there are {", ".join(known)}; or give a path, such as policies/mine.yaml')
    return str(found)


def loaded(path: str, environ: Mapping[str, str]) -> Policy:
    """The policy, or every error in it on the terminal and exit status 1."""
    return loaded_files(path, environ)[0]


def loaded_files(path: str, environ: Mapping[str, str]) -> tuple[Policy, Mapping[str, FileState]]:
    """The same, with the files that it was read from."""
    result = read_policy(path, environ)
    if result.policy is None:
        _not_loaded(result.problems, "the policy was not loaded")
    return result.policy, result.states


def loaded_keys(path: str, policy: Policy | None) -> tuple[Keys, Mapping[str, FileState]]:
    """The keys of a file and its state, or every error on the terminal and exit status 1. Without a policy, what they
    name is not looked at."""
    result = read_keys(path, None if policy is None else known_names(policy))
    if result.keys is None:
        _not_loaded(result.problems, "the keys were not loaded")
    return result.keys, result.states


def _not_loaded(problems: tuple[Problem, ...], what: str) -> NoReturn:
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    sys.stderr.write(f"{len(problems)} error{'s' if len(problems) != 1 else ''}; {what}\n")
    raise typer.Exit(1)


def table(*columns: str) -> Table:
    """An empty table as all commands print them."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made
