"""Each file under tests/policies is wrong in one way; the sentences about it stand beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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
