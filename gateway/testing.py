"""`*_test.yaml` files from disk: found, read, run, and reported to machines.

Owns which files are tests and the JUnit and JSON forms of a result. Refuses to print.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from xml.etree import ElementTree

from gateway.cases import SUFFIX, CaseFile, Verdict, read_cases, run, undefined, without_case
from gateway.labels import Scanner
from gateway.loading import load_policy, read_text
from gateway.policy import Policy
from gateway.policyfile import PolicyErrors, Problem


@dataclass(frozen=True, slots=True)
class FileResult:
    """What became of one file: its verdicts, or all that keeps it from being run. `untested` are rules by which no case
    was decided."""

    path: str
    policy: Policy | None
    problems: tuple[Problem, ...]
    verdicts: tuple[Verdict, ...] = ()
    untested: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems and all(verdict.passed for verdict in self.verdicts)


def files_of(paths: Iterable[str]) -> list[str]:
    """The test files that the paths mean: a folder means all in it and below, a policy the one beside it. Raises
    FileNotFoundError for a path that means none."""
    found: list[str] = []
    for path in paths:
        here = Path(path)
        if here.is_dir():
            files = sorted(str(file) for file in here.rglob(f"*{SUFFIX}"))
        elif path.endswith(SUFFIX):
            files = [path] if here.exists() else []
        else:
            beside = here.with_name(here.stem + SUFFIX)
            files = [str(beside)] if beside.exists() else []
        if not files:
            raise FileNotFoundError(path)
        found += files
    return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Suite:
    """The cases of a file and what runs them."""

    file: CaseFile
    policy: Policy
    scanner: Scanner


def load(path: str) -> Suite | tuple[Problem, ...]:
    """The cases of a file with their policy, or everything that is wrong with either."""
    try:
        text = read_text(path)
    except OSError as error:
        return (Problem(path, 0, 0, f"the file cannot be read: {error.strerror or 'it failed'}"),)
    except UnicodeDecodeError as error:
        return (Problem(path, 0, 0, f"the file is not UTF-8 text: byte {error.start} is wrong"),)
    file, problems = read_cases(path, text)
    if file is None:
        return tuple(problems)
    try:
        policy = load_policy(os.path.normpath(PurePath(path).parent / file.policy), file.environment)
    except PolicyErrors as error:
        return error.problems
    if problems := undefined(file, policy):
        return tuple(problems)
    return Suite(file, policy, Scanner(policy.kinds, policy.patterns))


def result_of(path: str) -> FileResult:
    """Run all cases of a file."""
    suite = load(path)
    if isinstance(suite, tuple):
        return FileResult(path, None, suite)
    verdicts = tuple(run(case, suite.policy, suite.scanner) for case in suite.file.cases)
    return FileResult(path, suite.policy, (), verdicts, tuple(without_case(suite.policy, verdicts)))


def sentences(verdict: Verdict) -> list[str]:
    """What differs, a line each."""
    return [f"{d.what}: expected {d.expected}, got {d.got}" for d in verdict.differences]


def as_json(results: Sequence[FileResult]) -> dict[str, Any]:
    """The results as one document."""
    return {"ok": all(result.passed for result in results), "files": [_file(result) for result in results]}


def _file(result: FileResult) -> Mapping[str, Any]:
    return {
        "file": result.path,
        "policy": None if result.policy is None else {"path": result.policy.path, "hash": result.policy.hash},
        "errors": [str(problem) for problem in result.problems],
        "untested_rules": list(result.untested),
        "cases": [
            {
                "name": verdict.case.name,
                "line": verdict.case.place.line,
                "ok": verdict.passed,
                "rule": verdict.rule,
                "goes_to": verdict.goes_to,
                "differences": [{"what": d.what, "expected": d.expected, "got": d.got} for d in verdict.differences],
                "decision": verdict.told,
            }
            for verdict in result.verdicts
        ],
    }


def junit(results: Sequence[FileResult]) -> bytes:
    """The results as JUnit XML, a suite each file: what CI systems read. A file that cannot be run is an error."""
    root = ElementTree.Element("testsuites", name="hybridgate policy test")
    for result in results:
        failed = sum(not verdict.passed for verdict in result.verdicts)
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=result.path,
            tests=str(len(result.verdicts) or 1),
            failures=str(failed),
            errors=str(int(bool(result.problems))),
        )
        for verdict in result.verdicts:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                name=verdict.case.name,
                classname=result.path,
                file=result.path,
                line=str(verdict.case.place.line),
            )
            if not verdict.passed:
                lines = sentences(verdict)
                ElementTree.SubElement(case, "failure", message=lines[0]).text = "\n".join(lines)
        if result.problems:
            case = ElementTree.SubElement(suite, "testcase", name="loads", classname=result.path, file=result.path)
            text = "\n".join(str(problem) for problem in result.problems)
            ElementTree.SubElement(case, "error", message=str(result.problems[0])).text = text
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"
