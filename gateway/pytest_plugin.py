"""pytest collects `*_test.yaml`: each case of a policy is a test.

Use it with `pytest -p gateway.pytest_plugin policies`, or with `pytest_plugins = ["gateway.pytest_plugin"]` in the
conftest.py of the root. It is not loaded by itself, because other programs have files of that name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.cases import SUFFIX, Case, run
from gateway.testing import Suite, load, sentences


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> PolicyTests | None:
    """pytest's hook."""
    if file_path.name.endswith(SUFFIX):
        tests: PolicyTests = PolicyTests.from_parent(parent, path=file_path)
        return tests
    return None


class PolicyTests(pytest.File):
    """One file of cases."""

    def collect(self) -> Iterator[PolicyCase]:
        suite = load(str(self.path))
        if isinstance(suite, tuple):
            raise self.CollectError("\n".join(str(problem) for problem in suite))
        for case in suite.file.cases:
            yield PolicyCase.from_parent(self, name=case.name, case=case, suite=suite)


class PolicyCase(pytest.Item):
    """One case."""

    def __init__(self, *, case: Case, suite: Suite, **more: object) -> None:
        super().__init__(**more)  # type: ignore[arg-type]
        self._case = case
        self._suite = suite

    def runtest(self) -> None:
        verdict = run(self._case, self._suite.policy, self._suite.scanner)
        if not verdict.passed:
            raise _DiffersError(sentences(verdict))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: str | None = None) -> str:
        if isinstance(excinfo.value, _DiffersError):
            place = self._case.place
            return "\n".join(
                [f"{place.file}:{place.line}: {self.name}", *(f"  {line}" for line in excinfo.value.lines)]
            )
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self._case.place.line - 1, self.name


class _DiffersError(Exception):
    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines
