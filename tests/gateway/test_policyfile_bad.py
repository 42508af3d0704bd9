"""Each file under tests/policies is wrong in one way; the sentences about it stand beside it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway import labels, policyfile
from gateway.policyfile import PolicyErrors, compile_policy

FILES = Path(__file__).parents[1] / "policies"
DETECTORS = frozenset({"email", "phone", "credit_card", "iban", "us_ssn", "api_key", "private_key", "jwt"})
PRICES = {
    "gpt-4o-mini": {
        "input_cost_per_token": 1.5e-07,
        "output_cost_per_token": 6e-07,
        "litellm_provider": "openai",
        "max_input_tokens": 128_000,
    },
}
SECRETS = {"BAD_URL": "redis://hunter2", "BAD_KEY": "hunter2\nhunter3", "KEY": "hunter4"}
POLICY_FOR_DEPLOYMENTS = "version: 1\ndeployments: {name}\ndefault: {{candidates: [local], protected: refuse}}\n"


def problems_of(path: str, read: Callable[[str], str]) -> str:
    """What loading complains about, one line each."""
    with pytest.raises(PolicyErrors) as caught:
        compile_policy(path, read=read, env=SECRETS, price_map=PRICES, detectors=DETECTORS)
    return str(caught.value) + "\n"


def complaints(case: Path) -> str:
    """The complaints about a file: a policy as it is, a deployments file through a policy that names it."""

    def read(path: str) -> str:
        if path == "policy.yaml":
            return POLICY_FOR_DEPLOYMENTS.format(name=case.name)
        return (case.parent / path).read_text()

    return problems_of(case.name if case.parent.name == "policy" else "policy.yaml", read)


CASES = sorted(FILES.glob("*/*.bad.yaml"))


@pytest.mark.parametrize("case", CASES, ids=[f"{case.parent.name}/{case.name}" for case in CASES])
def test_a_wrong_file_is_answered_with_the_sentences_beside_it(case: Path) -> None:
    """All problems are reported, each at its file, line and column."""
    assert complaints(case) == case.with_suffix("").with_suffix(".errors").read_text()


def test_every_file_of_errors_belongs_to_a_wrong_file() -> None:
    """No case is lost by a slip in its name, and both kinds of files have cases."""
    recorded = {errors.with_suffix("").name for errors in FILES.glob("*/*.errors")}
    assert recorded == {case.with_suffix("").with_suffix("").name for case in CASES}
    assert {case.parent.name for case in CASES} == {"policy", "deployments"}


SOURCES = (*sorted(Path(policyfile.__file__).parent.glob("*.py")), Path(labels.__file__))
# What this folder's reader and files of a few lines cannot bring about: see test_policyfile.py and test_labels.py.
ELSEWHERE = {
    "the file is larger than .* bytes",
    "the file is not UTF-8 text: byte .* is wrong",
    "it failed",
    "more than .* things are wrong, of which these are some",
    "and .* more things that are wrong",
    '.* is set, but there is .* called ".*"',
    "several local engines and none of them is",
    "no deployment with `backend: local` and no url,",
    "the patterns together need more memory than a scan has: make them shorter, or fewer",
}
# What is said of right files, and to whoever calls a function wrongly.
NO_COMPLAINTS = {
    "as stated",
    "; and .* USD a GB for prompts sent out",
    "; bill: also .* USD a month over .* tokens",
    ".* .* not set",
    "asked only where there is no roofline, or none that fits",
    "a pattern may not be called .*, as a detector is",
    "no detector for .*; there are .*",
    "A Hybridgate policy",
    "Deployments of Hybridgate",
}


def sentences(source: Path) -> Iterator[str]:
    """Patterns of what a module says in several words: its texts that are no docstrings and not for editors, with
    anything where a value is filled in."""
    tree = ast.parse(source.read_text())
    said_by_editors = {
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "meanings"
        for part in ast.walk(node)
    }
    inside = {
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr | ast.Expr)
        for part in ast.walk(node)
        if part is not node and (isinstance(node, ast.JoinedStr) or isinstance(node.value, ast.Constant))
    }
    for node in ast.walk(tree):
        if node in inside | said_by_editors:
            continue
        if isinstance(node, ast.JoinedStr):
            values = node.values
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            values = [node]
        else:
            continue
        parts = [
            re.escape(v.value) if isinstance(v, ast.Constant) and isinstance(v.value, str) else ".*" for v in values
        ]
        if re.search(r"[a-z]{2,}(\\ )+[a-z]{2,}", "".join(parts)):
            yield "".join(parts)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_every_sentence_of_the_loader_has_a_file_that_brings_it_about(source: Path) -> None:
    recorded = "\n".join(errors.read_text() for errors in sorted(FILES.glob("*/*.errors")))
    missing = {sentence for sentence in sentences(source) if not re.search(sentence, recorded)}
    assert {re.sub(r"\\(.)", r"\1", sentence) for sentence in missing} <= ELSEWHERE | NO_COMPLAINTS
