"""`hybridgate policy test`: the cases beside a policy, as a table of what passed and what differs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.text import Text

from gateway.cli.terminal import fail, policy_path, standard_output, table
from gateway.testing import FileResult, as_json, files_of, junit, result_of


def test(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files `*_test.yaml`, folders of them, or policies that have one beside them, by path or name; "
            "without one, all beside the default policy."
        ),
    ] = None,
    junit_file: Annotated[
        str | None, typer.Option("--junit", metavar="FILE", help="Write the result as JUnit XML, for a CI system.")
    ] = None,
    as_document: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run the test cases of policies: for each a request, the state of the fleet, and what is expected of the decision,
    which is the same that the server makes. Exit status 1 if one fails or a file does not load."""
    try:
        files = files_of([policy_path(path, os.environ) for path in paths] if paths else [_beside_default()])
    except FileNotFoundError as error:
        fail(f"no test file for {error}: write one called NAME_test.yaml beside the policy NAME.yaml")
    results = [result_of(file) for file in files]
    if junit_file is not None:
        try:
            Path(junit_file).write_bytes(junit(results))
        except OSError as error:
            fail(f"--junit: cannot write {junit_file} ({error.strerror})")
    if as_document:
        sys.stdout.write(orjson.dumps(as_json(results), option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        console = standard_output()
        for result in results:
            _print(console, result)
        _print_sum(console, results)
    if not all(result.passed for result in results):
        raise typer.Exit(1)


def _beside_default() -> str:
    return str(Path(policy_path("", os.environ)).parent)


def _print(console: Console, result: FileResult) -> None:
    about = "" if result.policy is None else f": {result.policy.path} ({result.policy.hash})"
    console.print(f"{result.path}{about}", markup=False, soft_wrap=True)
    for problem in result.problems:
        console.print(f"  {problem}", markup=False, style="red", soft_wrap=True)
    if result.problems:
        return
    cases = table("", "case", "rule", "goes to")
    for verdict in result.verdicts:
        mark = Text("ok", "green") if verdict.passed else Text("FAIL", "bold red")
        first, *others = verdict.goes_to.split(", ")
        chain = f"{first}, then {len(others)} more" if others else first
        cases.add_row(mark, Text(verdict.case.name), Text(verdict.rule), Text(chain))
    console.print(cases)
    for verdict in result.verdicts:
        if verdict.passed:
            continue
        place = verdict.case.place
        console.print(f"{place.file}:{place.line}: {verdict.case.name}", markup=False, style="bold", soft_wrap=True)
        width = max(len(difference.what) for difference in verdict.differences)
        for difference in verdict.differences:
            what = f"  {difference.what:<{width}}"
            console.print(f"{what}  expected  {difference.expected}", markup=False, soft_wrap=True)
            console.print(f"{'':{width + 2}}  got       {difference.got}", markup=False, style="red", soft_wrap=True)
    if result.untested:
        console.print(f"no case is decided by: {', '.join(result.untested)}", markup=False, style="yellow")


def _print_sum(console: Console, results: list[FileResult]) -> None:
    verdicts = [verdict for result in results for verdict in result.verdicts]
    failed = sum(not verdict.passed for verdict in verdicts)
    unread = sum(bool(result.problems) for result in results)
    told = f"{len(verdicts)} cases in {len(results)} files: {len(verdicts) - failed} passed, {failed} failed"
    if unread:
        told += f"; {unread} files were not run"
    console.print(told, markup=False, style="green" if not failed and not unread else "bold red")
