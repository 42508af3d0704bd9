"""The exported JSON Schemas: as the code has them, true of every right file, and false of wrong ones as far as a schema
can tell."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from gateway.cases import cases_schema
from gateway.cli import main
from gateway.policyfile.schema import deployments_schema, policy_schema
from tests.gateway.test_policy_readme import AROUND, EXAMPLES, OF_POLICIES

ROOT = Path(__file__).parents[2]
SCHEMAS = {"policy": policy_schema(), "deployments": deployments_schema(), "cases": cases_schema()}
VALIDATORS = {kind: Draft202012Validator(schema) for kind, schema in SCHEMAS.items()}
SHIPPED = sorted((*ROOT.glob("policies/*.yaml"), *ROOT.glob("gateway/demo/policy/*.yaml")))
BAD = sorted(ROOT.glob("tests/policies/*/*.bad.yaml"))
# What is said of a value by itself, or of a key.
OF_SHAPE = re.compile(
    r"must be|must not be empty|unknown field|is missing$|implemented yet|states no (condition|limit)"
)
# What sounds alike, and is no matter of a schema.
BEYOND = {
    "hardware-unknown",  # names of the catalog
    "cost-empty",  # what depends on another key
    "cost-rate-missing",
    "time-same",
    "capabilities-of-own-engine",
    "several-urls",
    "url-wrong",  # addresses
    "url-from-environment",
    "slo-zero",  # no duration at all
    "deployments-file-name",  # control characters, and line breaks at the end, which Python's `$` lets pass
    "rule-name",
}


def kind_of(file: Path) -> str:
    name = file.name
    return "cases" if name.endswith("_test.yaml") else "deployments" if "deployments" in name else "policy"


@pytest.mark.parametrize("kind", sorted(SCHEMAS))
def test_the_committed_schema_is_the_codes(kind: str) -> None:
    """Written by `hybridgate policy schema KIND > policies/schema/KIND.json`."""
    printed = CliRunner().invoke(main, ["policy", "schema", kind])
    assert printed.exit_code == 0
    assert (ROOT / "policies" / "schema" / f"{kind}.json").read_text() == printed.stdout
    Draft202012Validator.check_schema(orjson.loads(printed.stdout))


def test_the_policys_schema_is_the_one_that_is_printed_without_a_choice() -> None:
    assert json.loads(CliRunner().invoke(main, ["policy", "schema"]).stdout) == SCHEMAS["policy"]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_ships_is_right_and_names_its_schema(file: Path) -> None:
    assert [error.message for error in VALIDATORS[kind_of(file)].iter_errors(parsed(file.read_text()))] == []
    if file.parent.name == "policies":
        assert file.read_text().startswith(f"# yaml-language-server: $schema=schema/{kind_of(file)}.json\n")


@pytest.mark.parametrize("example", OF_POLICIES, ids=lambda example: next(iter(example)))
def test_what_the_documentation_shows_is_right(example: dict[str, Any]) -> None:
    assert VALIDATORS["policy"].is_valid(AROUND | example)


def test_the_documented_cases_are_right() -> None:
    (cases,) = [example for example in EXAMPLES if "cases" in example]
    assert VALIDATORS["cases"].is_valid(cases)


def parsed(text: str) -> Any:
    try:
        return yaml.load(text, Loader=yaml.CSafeLoader)  # as policies are read
    except (yaml.YAMLError, RecursionError, ValueError):
        return None


@pytest.mark.parametrize("file", BAD, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_wrong_value_is_wrong_by_the_schema(file: Path) -> None:
    """So an editor underlines it before anything is loaded."""
    errors = file.with_suffix("").with_suffix(".errors").read_text()
    name = file.name.removesuffix(".bad.yaml")
    document = parsed(file.read_text())
    if document is not None and OF_SHAPE.search(errors):
        assert VALIDATORS[file.parent.name].is_valid(document) is (name in BEYOND)
