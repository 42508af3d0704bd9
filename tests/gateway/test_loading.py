"""Policies from disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.loading import litellm_price_map, load_policy, read_text
from gateway.policyfile import MAX_BYTES, PolicyErrors
from gateway.testing import result_of
from gateway.types import RequestFacts

SHIPPED = Path(__file__).parents[2] / "policies" / "default.yaml"


def test_the_shipped_policy_loads_without_any_key() -> None:
    """What has no key is unavailable for that reason, and the bundled model is there."""
    policy = load_policy(SHIPPED, {})
    unavailable = {name: deployment.unavailable for name, deployment in policy.deployments.items()}
    assert unavailable == {
        "local": None,
        "on-prem-large": "ON_PREM_URL and ON_PREM_MODEL are not set",
        "gpt-4o-mini": "OPENAI_API_KEY is not set",
        "claude-sonnet": "ANTHROPIC_API_KEY is not set",
        "mistral-small": "MISTRAL_API_KEY is not set",
        "command-r": "COHERE_API_KEY is not set",
    }
    assert policy.deployments["local"].served_locally


def test_the_shipped_cloud_deployments_are_in_litellms_map() -> None:
    """Each has a price and a window from it."""
    policy = load_policy(SHIPPED, {})
    cloud = [deployment for deployment in policy.deployments.values() if deployment.backend == "litellm"]
    assert len(cloud) == 4
    assert all(deployment.price is not None and deployment.window is not None for deployment in cloud)


def test_the_shipped_policy_keeps_what_is_protected_on_premises() -> None:
    policy = load_policy(SHIPPED, {})
    for label in ("personal", "secret", "unscannable"):
        assert policy.permit(RequestFacts("auto", labels=frozenset({label}))).zones == frozenset({"on_premises"})


def test_loading_does_not_import_litellm() -> None:
    """That import takes seconds; its price map is only a file."""
    load = f"from gateway.loading import load_policy; load_policy({str(SHIPPED)!r}, {{}})"
    program = f"import sys; {load}; print('litellm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_price_map_has_rows_by_model() -> None:
    assert litellm_price_map()["gpt-4o-mini"]["litellm_provider"] == "openai"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xffversion", "the file is not UTF-8 text: byte 0 is wrong"),
        (b"x" * (MAX_BYTES + 1), "cannot be read: it is larger than 1,000,000 bytes"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "policy.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PolicyErrors) as caught:
        load_policy(path, {})
    assert len(caught.value.problems) == 1
    assert str(caught.value).endswith(message)


def test_a_directory_is_no_policy(tmp_path: Path) -> None:
    with pytest.raises(PolicyErrors, match="cannot be read: Is a directory"):
        load_policy(tmp_path, {})


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "policy.yaml")
    with pytest.raises(PolicyErrors, match="it is no regular file"):
        load_policy(tmp_path / "policy.yaml", {})


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes(b"\xef\xbb\xbfversion: 1\n")
    assert read_text(str(path)) == "version: 1\n"


SHIPPED_POLICIES = ("default", "privacy-first", "cost-first", "latency-first", "local-only", "cloud-only", "hybrid")


@pytest.mark.parametrize("name", SHIPPED_POLICIES)
def test_a_shipped_policy_loads_and_its_cases_pass_and_leave_no_rule_out(name: str) -> None:
    result = result_of(str(SHIPPED.with_name(f"{name}_test.yaml")))
    assert result.policy is not None, result.problems
    assert Path(result.policy.path) == SHIPPED.with_name(f"{name}.yaml")
    assert result.passed and not result.untested


def test_the_names_of_shipped_policies_are_those_of_the_files() -> None:
    files = {file.stem for file in SHIPPED.parent.glob("*.yaml")}
    assert {name for name in files if not name.endswith(("_test", "deployments"))} == set(SHIPPED_POLICIES)
    assert {f"{name}_test" for name in SHIPPED_POLICIES} <= files


def test_the_box_by_itself_names_no_cloud_and_the_cloud_starts_no_engine() -> None:
    box, cloud = (load_policy(SHIPPED.with_name(f"{name}-only.yaml"), {}) for name in ("local", "cloud"))
    assert {(d.backend, d.zone) for d in box.deployments.values()} == {("local", "on_premises")}
    assert {d.backend for d in cloud.deployments.values()} == {"litellm"}
    assert not any(d.served_locally for d in cloud.deployments.values())
