"""What a wrong word may stand for, and how much is done to find out."""

from __future__ import annotations

from difflib import get_close_matches

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.keyfile import KeyErrors, compile_keys
from gateway.policyfile import PolicyErrors, compile_policy
from gateway.policyfile.nearness import MOST_SUGGESTIONS, nearest, plausible, suggestion

DEPLOYMENTS = "version: 1\ndeployments:\n  local: {backend: local, model: demo, zone: on_premises}\n"
POLICY = "version: 1\ndeployments: deployments.yaml\ndefault: {candidates: [local]}\n"
WORDS = st.text(st.sampled_from("abcde-é\u0161"), max_size=12)


@given(WORDS, st.lists(WORDS, max_size=8))
@example("a" * 20, ["a" * 12, "a" * 40, "b"])
@example("", ["", "a"])
def test_the_nearest_word_is_difflibs(word: str, known: list[str]) -> None:
    """What is left out beforehand would not have been taken."""
    assert nearest(word, known) == next(iter(get_close_matches(word, known, n=1)), None)


def test_a_suggestion_is_a_question() -> None:
    assert suggestion("wieght", ["weight", "height", "name"]) == ' (did you mean "weight"?)'
    assert suggestion("wieght", ["name"]) == ""


def test_few_of_many_words_are_compared() -> None:
    """Hundreds of names have little in common with a word that is none of them."""
    names = [f"{place}-{number}" for place in ("paris", "tokyo", "lagos") for number in range(200)]
    assert plausible("elsewhere", names) == []
    assert len(plausible("pariss", names)) == 200


def told(policy: str) -> list[str]:
    files = {"policy.yaml": policy, "deployments.yaml": DEPLOYMENTS}
    with pytest.raises(PolicyErrors) as caught:
        compile_policy("policy.yaml", read=files.__getitem__, env={}, price_map={}, detectors=frozenset())
    return [problem.message for problem in caught.value.problems]


WRONG_KEYS = "".join(f"rules{n}: 1\n" for n in range(300))
WRONG_ITEMS = ", ".join(f"loca{n}" for n in range(300))
WRONG_VALUES = "".join(f"      - time: {{zone: Europe/Berlin{n}, days: mon}}\n" for n in range(300))


@pytest.mark.parametrize(
    "policy",
    [
        POLICY + WRONG_KEYS,
        f"{POLICY}rules: [{{name: r, when: {{tag: a}}, candidates: [{WRONG_ITEMS}]}}]\n",
        f"{POLICY}rules:\n  - name: r\n    candidates: local\n    when:\n     any:\n{WRONG_VALUES}",
    ],
    ids=["keys", "items", "values"],
)
def test_of_what_is_as_wrong_the_first_hundred_get_suggestions(policy: str) -> None:
    """All are told."""
    messages = told(policy)
    assert len(messages) == 300
    assert sum("did you mean" in message for message in messages) == MOST_SUGGESTIONS


def test_twelve_thousand_wrong_keys_are_told_with_a_hundred_suggestions() -> None:
    text = "version: 1\nkeys: []\n" + "".join(f"tenants{n}: 1\n" for n in range(12_000))
    with pytest.raises(KeyErrors) as caught:
        compile_keys("keys.yaml", text, None)
    messages = [problem.message for problem in caught.value.problems]
    assert len(messages) == 12_000
    assert sum("did you mean" in message for message in messages) == MOST_SUGGESTIONS
