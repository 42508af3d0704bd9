"""Test cases of a policy: what is wrong with a file is told with its place, and each expectation can fail."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from textwrap import indent
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from gateway.cases import CaseShape, CasesShape, ExpectShape, run
from gateway.cli import main
from gateway.policyfile.shapes import Shape
from gateway.testing import Suite, as_json, files_of, junit, load, result_of
from gateway.written import KeyShape, QueueShape, RequestShape, StateShape, StatusShape

DEPLOYMENTS = """
version: 1
deployments:
  home:
    backend: openai
    url: ${HOME_URL}
    model: m
    zone: on_premises
    context_window: 1000
    capabilities: [tools]
    cost: {usd_per_million_tokens: {input: 0.1, output: 0.2}}
  cloud:
    backend: openai
    url: http://127.0.0.1:1/v1
    model: m
    zone: us_cloud
    context_window: 50000
    cost: {usd_per_million_tokens: {input: 1, output: 2}}
"""
POLICY = """
version: 1
deployments: deployments.yaml
labels:
  personal: {any: [{detects: email}, {key_tag: hr}]}
invariants:
  - {name: stay, when: {any_label: [personal, unscannable]}, stay_in: [on_premises]}
slo: {fast: {first_token_p95: 50ms}}
rules:
  - name: hurried
    when: {slo: fast}
    candidates: [home, cloud]
    require: {slo: met}
default: {candidates: [home, cloud], order_by: marginal_cost}
"""
MAIL = "write to a@example.com"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deployments.yaml").write_text(DEPLOYMENTS)
    (tmp_path / "p.yaml").write_text(POLICY)
    return tmp_path


def write(folder: Path, cases: str, head: str = "version: 1\npolicy: p.yaml\n") -> str:
    path = folder / "p_test.yaml"
    path.write_text(head + cases)
    return str(path)


def differences(folder: Path, case: str) -> list[str]:
    """What differs in the only case of a file."""
    suite = load(write(folder, f"cases:\n  - name: it\n{indent(case, '    ')}"))
    assert isinstance(suite, Suite), suite
    verdict = run(suite.file.cases[0], suite.policy, suite.scanner)
    return [f"{d.what}: expected {d.expected}, got {d.got}" for d in verdict.differences]


@pytest.mark.parametrize(
    "case",
    [
        "expect: {deployments: [home, cloud], rule: default, labels: [], status: 200, zones: [on_premises, us_cloud]}",
        f"request: {{text: {MAIL}}}\n"
        "expect: {deployments: home, labels: personal, rejected: {cloud: zone}, not: cloud}",
        "request: {key: {tags: [hr]}}\nexpect: {deployments: [home]}",
        "request: {key: {deployments: [cloud]}}\nexpect: {deployments: [cloud], rejected: {home: caller}}",
        "request: {data_class: personal}\nexpect: {zones: [on_premises]}",
        "request: {headers: {X-Data-Class: personal}}\nexpect: {zones: [on_premises]}",
        f"request: {{text: {MAIL}}}\nstate: {{down: [home]}}\nexpect: {{status: 503, code: no_deployment_available}}",
        "state: {unconfigured: [home]}\nexpect: {deployments: [cloud], rejected: {home: unconfigured}}",
        "request: {prompt_tokens: 2000}\nexpect: {deployments: [cloud], rejected: {home: window}}",
        "request: {prompt_tokens: 500, max_tokens: 600}\nexpect: {deployments: [cloud]}",
        "request: {max_cost: 0.00001 USD, max_tokens: 10}\nexpect: {deployments: [], status: 402}",
        "state: {deployments: {home: {context_window: 50}}}\nexpect: {deployments: [cloud]}",
        "request: {tools: true, prompt_tokens: 50}\nexpect: {deployments: [home, cloud]}",
        "request: {schema: true}\nexpect: {rejected: {home: capability}}",
        "request: {images: true}\nexpect: {labels: [unscannable]}",
        "request: {model: cloud}\nexpect: {deployments: [cloud], rule: cloud}",
        "request: {model: nobody}\nexpect: {status: 404, code: model_not_found}",
        "request: {slo: none}\nexpect: {status: 400}",
        "request: {slo: fast}\nexpect: {rule: hurried, meets: false}",
        "request: {slo: fast}\nstate: {deployments: {cloud: {first_token_p95: 40ms}}}\n"
        "expect: {deployments: [cloud, home], meets: true, first_token_at_most: 40ms}",
        "request: {messages: [{role: system, content: brief}, {role: user, content: hi}]}\nexpect: {rule: default}",
        f"request: {{body: {{messages: [{{role: user, content: {MAIL}}}]}}}}\nexpect: {{labels: [personal]}}",
        "request: {max_tokens: 10, prompt_tokens: 10}\nexpect: {cost_at_most: 0.000003 USD}",
        "expect: {masked: false}",
        "request: {slo: fast, prompt_tokens: 100}\n"
        "state: {deployments: {home: {queue: {tokens: 200, prefill_tokens_per_s: 10000, decode_tokens_per_s: 100}}}}\n"
        "expect: {deployment: home, meets: true, first_token_at_most: 40ms}",
        "request: {slo: fast, prompt_tokens: 100}\n"
        "state: {deployments: {home: {queue: {tokens: 900}}, cloud: {first_token_p95: 45ms}}}\n"
        "expect: {deployment: cloud, meets: true}",
    ],
)
def test_a_case_that_says_what_happens_passes(folder: Path, case: str) -> None:
    assert differences(folder, case) == []


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("expect: {rule: hurried}", "rule: expected hurried, got default"),
        ("expect: {deployment: cloud}", "deployment: expected cloud, got home, cloud"),
        ("expect: {deployments: [cloud, home]}", "deployments: expected cloud, home, got home, cloud"),
        (
            f"request: {{text: {MAIL}}}\nexpect: {{deployment: cloud}}",
            'deployment: expected cloud, got home (cloud: zone: zone us_cloud is outside of what "stay" permits)',
        ),
        ("expect: {labels: personal}", "labels: expected personal, got none"),
        ("expect: {status: 403}", "status: expected 403, got 200, home, cloud"),
        ("expect: {code: protected_refused}", "code: expected protected_refused, got home, cloud"),
        ("expect: {rejected: {cloud: zone}}", "rejected cloud: expected zone, got a candidate"),
        ("expect: {not: [cloud]}", "not: expected cloud, got home, cloud"),
        ("expect: {zones: [on_premises]}", "zones: expected on_premises, got cloud in us_cloud"),
        ("request: {slo: fast}\nexpect: {meets: true}", "meets: expected true, got first token"),
        ("expect: {masked: true}", "masked: expected true, got home, cloud"),
        (
            "request: {max_tokens: 10, prompt_tokens: 10}\nexpect: {cost_at_most: 0.000002 USD}",
            "cost_at_most: expected",
        ),
        ("expect: {first_token_at_most: 50ms}", "first_token_at_most: expected 50 ms, got unknown"),
        ("request: {model: nobody}\nexpect: {deployment: home}", "expected home, got refused: 404 model_not_found"),
    ],
)
def test_each_expectation_can_fail_and_says_how(folder: Path, case: str, told: str) -> None:
    assert any(told in line for line in differences(folder, case)), differences(folder, case)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("cases: []\n", ['3:8: "cases" holds none']),
        ("cases:\n  - {name: a}\n", ['4:5: case "a": "expect" is missing']),
        ("cases:\n  - {name: a, expect: {}}\n", ['4:23: case "a": "expect" states nothing']),
        (
            "cases:\n  - {name: a, expect: {rulse: x}}\n  - {name: a, expect: {rule: default}}\n",
            [
                '4:24: case "a": unknown field "expect.rulse" (did you mean "rule"?)',
                '5:12: case "a": another case has this name',
            ],
        ),
        (
            "cases:\n  - {name: a, request: {text: x, body: {}}, expect: {rule: default}}\n",
            ['4:40: case "a": "request" has text and body; write one of them'],
        ),
        (
            "cases:\n  - {name: a, state: {time: now, draw: 1}, expect: {rejected: {home: zon}}}\n",
            [
                '4:29: case "a": "state.time" must be a time with its offset from UTC, such as '
                '"2026-03-02T09:30+01:00"',
                '4:40: case "a": "state.draw" must be a number from 0 to below 1',
                '4:70: case "a": "expect.rejected.home" must be',
            ],
        ),
        (
            "cases:\n  - name: a\n    state: {down: [hom], deployments: {clod: {busy: 0.5}}}\n"
            "    expect: {rule: hurred, deployment: hoem, labels: [persona], zones: [moon]}\n",
            [
                '5:19: case "a": the policy has no deployment "hom" (did you mean "home"?)',
                '5:39: case "a": the policy has no deployment "clod" (did you mean "cloud"?)',
                '6:20: case "a": the policy has no rule "hurred" (did you mean "hurried"?)',
                '6:40: case "a": the policy has no deployment "hoem" (did you mean "home"?)',
                '6:54: case "a": the policy has no label "persona" (did you mean "personal"?)',
                '6:72: case "a": the policy has no zone "moon"',
            ],
        ),
    ],
)
def test_all_that_is_wrong_with_a_file_is_told_with_its_place(folder: Path, text: str, problems: list[str]) -> None:
    path = write(folder, text)
    found = load(path)
    assert isinstance(found, tuple)
    told = [str(problem).removeprefix(f"{path}:") for problem in found]
    assert len(told) == len(problems)
    assert all(line.startswith(problem) for line, problem in zip(told, problems, strict=True)), told


def test_a_policy_that_does_not_load_is_the_problem_of_its_cases(folder: Path) -> None:
    (folder / "p.yaml").write_text(POLICY.replace("slo: fast}", "slo: slow}"))
    result = result_of(write(folder, "cases: [{name: a, expect: {rule: default}}]\n"))
    assert not result.passed and "p.yaml:11:17" in str(result.problems[0])


def test_variables_come_from_the_file_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that the environment has wrong changes nothing; one that the file has wrong does."""
    monkeypatch.setenv("HOME_URL", "no address")
    assert result_of(write(folder, "cases: [{name: a, expect: {deployment: home}}]\n")).passed
    head = "version: 1\npolicy: p.yaml\nenvironment: {HOME_URL: no address}\n"
    assert not result_of(write(folder, "cases: [{name: a, expect: {deployment: home}}]\n", head)).passed


def test_a_case_changes_of_the_files_state_what_it_states(folder: Path) -> None:
    state = "{down: [home], deployments: {cloud: {busy: 0.2, first_token_p95: 250ms}}}"
    case = "{name: a, state: {deployments: {cloud: {busy: 1}}}, expect: {status: 200}}"
    suite = load(write(folder, f"cases: [{case}]", f"version: 1\npolicy: p.yaml\nstate: {state}\n"))
    assert isinstance(suite, Suite)
    both = suite.file.cases[0].state
    assert both.down == ["home"] and both.deployments is not None
    assert (both.deployments["cloud"].busy, both.deployments["cloud"].first_token_p95) == (1.0, 0.25)


CASES = f"""cases:
  - {{name: right, expect: {{deployment: home}}}}
  - {{name: wrong, request: {{text: {MAIL}}}, expect: {{deployment: cloud, labels: []}}}}
"""


def test_the_command_shows_what_differs_and_writes_junit(folder: Path) -> None:
    path = write(folder, CASES)
    done = CliRunner().invoke(main, ["policy", "test", str(folder / "p.yaml"), "--junit", str(folder / "out.xml")])
    assert done.exit_code == 1 and "1 passed, 1 failed" in done.stdout
    assert f"{path}:5: wrong" in done.stdout and "expected  cloud" in done.stdout
    assert "no case is decided by: hurried" in done.stdout
    suite = ElementTree.parse(folder / "out.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "0")
    failure = suite[1].find("failure")
    assert failure is not None and failure.text is not None and len(failure.text.splitlines()) == 2
    assert MAIL not in done.stdout + (folder / "out.xml").read_text()


def test_files_that_do_not_load_are_errors_in_every_form(folder: Path) -> None:
    result = result_of(write(folder, "cases: []\n"))
    assert as_json([result])["ok"] is False and as_json([result])["files"][0]["errors"]
    assert ElementTree.fromstring(junit([result]))[0].get("errors") == "1"


@pytest.mark.parametrize("path", ["nothing.yaml", "nothing_test.yaml", "."])
def test_a_path_without_tests_is_a_mistake(tmp_path: Path, path: str) -> None:
    done = CliRunner().invoke(main, ["policy", "test", str(tmp_path / path)])
    assert done.exit_code == 2 and "NAME_test.yaml" in done.stderr


def test_files_are_found_once_in_folders_beside_policies_and_by_name(folder: Path) -> None:
    path = write(folder, CASES)
    assert files_of([str(folder), str(folder / "p.yaml"), path]) == [path]


def test_pytest_collects_the_cases(folder: Path) -> None:
    path = write(folder, CASES)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "gateway.pytest_plugin",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
    ]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout
    assert f"{path}:5: wrong\n  deployment: expected cloud, got home (cloud: zone: " in done.stdout


@pytest.mark.parametrize(
    "shape", [CasesShape, CaseShape, RequestShape, KeyShape, StateShape, StatusShape, QueueShape, ExpectShape]
)
def test_every_key_is_documented(shape: type[Shape]) -> None:
    documented = set(re.findall(r"\w+", (Path(__file__).parents[2] / "policies" / "README.md").read_text()))
    assert {field.alias or name for name, field in shape.model_fields.items()} <= documented
