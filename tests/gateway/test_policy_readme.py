"""Every example of policies/README.md loads: what is shown is what works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.gates import GATES
from gateway.labels import KINDS
from gateway.loading import litellm_price_map
from gateway.policy import Policy
from gateway.policyfile import compile_policy
from gateway.policyfile.language import DefaultShape, PolicyShape, RequireShape, RuleShape, SloShape
from gateway.policyfile.whenshapes import WhenShape

FOLDER = Path(__file__).parents[2] / "policies"
README = (FOLDER / "README.md").read_text()
EXAMPLES = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)]
OF_POLICIES = [example for example in EXAMPLES if example.keys() <= PolicyShape.model_fields.keys()]
OF_LIMITS = [example["limits"] for example in EXAMPLES if example.keys() == {"limits"}]
OF_COSTS = [example["cost"] for example in EXAMPLES if example.keys() == {"cost"}]
AROUND: dict[str, Any] = {
    "version": 1,
    "deployments": "deployments.yaml",
    "default": {"candidates": ["local"]},
}
LABELS = {"personal": {"any": [{"detects": ["email"]}]}, "secret": {"any": [{"detects": ["api_key"]}]}}
SECRETS = {"OPENAI_API_KEY": "k", "ON_PREM_URL": "http://127.0.0.1:1/v1", "ON_PREM_MODEL": "m"}


def load(policy: dict[str, Any], deployments: str) -> Policy:
    files = {"policy.yaml": yaml.safe_dump(AROUND | policy), "deployments.yaml": deployments}
    return compile_policy(
        "policy.yaml", read=files.__getitem__, env=SECRETS, price_map=litellm_price_map(), detectors=KINDS
    )


@pytest.mark.parametrize("example", OF_POLICIES, ids=lambda example: next(iter(example)))
def test_an_example_of_a_policy_loads(example: dict[str, Any]) -> None:
    """Each is a part of a policy over the deployments that ship; labels that it only refers to are given to it."""
    labels = {} if "labels" in example else {"labels": LABELS}
    assert load(labels | example, (FOLDER / "deployments.yaml").read_text()).rules or "rules" not in example


@pytest.mark.parametrize("cost", OF_COSTS, ids=lambda cost: " ".join(cost))
def test_an_example_of_a_cost_loads(cost: dict[str, Any]) -> None:
    model = "meta-llama/Llama-2-7b-chat-hf"
    deployment = {"backend": "openai", "url": "http://h/v1", "model": model, "zone": "on_premises", "cost": cost}
    file = {"version": 1, "deployments": {"local": deployment}}
    assert load({}, yaml.safe_dump(file)).deployments["local"].price is not None


@pytest.mark.parametrize("limits", OF_LIMITS, ids=lambda limits: " ".join(limits))
def test_an_example_of_limits_loads(limits: dict[str, Any]) -> None:
    cost = {"usd_per_million_tokens": {"input": 1, "output": 2}}
    deployment = {"backend": "openai", "url": "http://h/v1", "model": "m", "zone": "z", "cost": cost, "limits": limits}
    file = {"version": 1, "deployments": {"local": deployment}}
    assert load({}, yaml.safe_dump(file)).limits["local"].all is not None


def test_examples_are_found() -> None:
    assert len(OF_LIMITS) >= 1
    assert len(OF_POLICIES) >= 7
    assert len(OF_COSTS) >= 3


@pytest.mark.parametrize("shape", [PolicyShape, DefaultShape, RuleShape, RequireShape, SloShape, WhenShape])
def test_every_key_of_the_language_is_described(shape: Any) -> None:
    text = README[README.index("## The policy") : README.index("## By example")]
    described = set(re.findall(r"`([a-z_0-9]+)(?:: [a-z]+)?`", text))
    assert {field.alias or name for name, field in shape.model_fields.items()} <= described


def test_every_gate_that_a_case_may_expect_is_named() -> None:
    line = next(line for line in README.splitlines() if line.startswith("| `rejected` |"))
    assert set(re.findall(r"`([a-z_]+)`", line)) == {"rejected", *GATES}


def test_every_condition_and_every_key_of_a_rule_has_an_example() -> None:
    def keys(value: Any) -> set[str]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return (set(value) if isinstance(value, dict) else set()).union(*map(keys, inner))

    shown = set[str]().union(*map(keys, OF_POLICIES))
    wanted = {field.alias or name for shape in (WhenShape, RuleShape) for name, field in shape.model_fields.items()}
    plain = {"stream", "tools", "images", "all", "fits", "key_tag"}  # as others that are shown
    assert wanted - plain <= shown
