"""`hybridgate plan`: tables, JSON, pictures, and mistakes with their fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gateway.catalog.hardware import HARDWARE
from gateway.cli import main

DEMO = Path(__file__).parents[2] / "local_engine" / "demo_model"
H100 = ("--hardware", "h100-80gb")


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments], env={"COLUMNS": "140"})


def document(*arguments: str) -> dict[str, Any]:
    result = plan(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def test_a_plan_says_what_fits_how_fast_it_is_and_what_it_costs() -> None:
    said = plan("llama-3.1-8b", *H100, "--usd-per-hour", "2.5").stdout
    for part in ("weights, bf16, 8,030,261,248 parameters", "left for KV cache: 461,088 tokens", "first token: idle"):
        assert part in said
    for part in (
        "all, at 40% utilization",
        "gpt-4 ",
        "claude-3-sonnet",
        "million",
        "Speed is what others measured",
        "Cost: 2.5 USD an",
    ):
        assert part in said


def test_the_same_as_json() -> None:
    told = document("Qwen/Qwen3-4B-Instruct-2507", *H100, "--usd-per-hour", "2.5", "--against", "openai/gpt-4o-mini")
    assert told["model"] == "qwen3-4b" and told["engines"] == 1
    (other,) = told["break_even"]
    assert other["model"] == "openai/gpt-4o-mini" and other["usd_per_million_tokens"] == {"input": 0.15, "output": 0.6}


def test_without_hardware_all_are_compared() -> None:
    """Each with the widest weights that fit; what is left out says why."""
    told = document("llama-3.3-70b")
    weights = {one["hardware"]: one["quantization"] for one in told["plans"]}
    assert weights["h200"] == "int8" and weights["h100-80gb"] == "int8" and weights["a100-80gb"] == "int8"
    assert set(weights) | set(told["left_out"]) == set(HARDWARE)
    assert (
        "4 x v100-32gb hold fp16" in told["left_out"]["v100-32gb"] or "v100-32gb hold" in told["left_out"]["v100-32gb"]
    )
    said = plan("llama-3.3-70b").stdout
    assert "does not fit" in said and "Choose one with --hardware" in said
    bought = document("llama-3.1-8b", "--buy")
    assert "no such price" in bought["left_out"]["tpu-v4"]


def test_what_does_not_fit_says_what_would() -> None:
    result = plan("llama-3.3-70b", *H100)
    assert result.exit_code == 1
    assert "does not fit: llama-3.3-70b as bf16" in result.stdout
    assert "int8 fits (72.7 GB of weights); 2 x h100-80gb hold bf16" in " ".join(result.stdout.split())
    told = json.loads(plan("llama-3.3-70b", *H100, "--json").stdout)
    assert told["fits"] is False and told["advice"].startswith("int8 fits")
    assert plan("llama-3.3-70b", *H100, "--quantization", "nf4").exit_code == 0


def test_a_config_or_a_shape_stands_for_a_model(tmp_path: Path) -> None:
    small = (*H100, "--prompt-tokens", "512")
    by_directory, by_file = document(str(DEMO), *small), document(str(DEMO / "config.json"), *small)
    assert by_directory["parameters"] == by_file["parameters"] == 1_918_656
    shape = ("mine", "--parameters", "7b", "--layers", "32", "--vocab", "32000", "--kv-heads", "32")
    mine = document(*shape, *H100)
    assert (mine["model"], mine["parameters"]) == ("mine", 7_000_000_000)
    assert mine["memory_bytes"]["kv_per_token"] == 512 * 1024


def test_bought_hardware_and_measured_speed() -> None:
    told = document(
        "llama-3.1-8b", *H100, "--buy", "--prefill-tokens-per-s", "12000", "--decode-tokens-per-s", "80", "--years", "3"
    )
    assert told["efficiency"].startswith("measured: ")
    assert told["tokens_per_s"]["input"] == pytest.approx(12000)
    marginal, full = told["usd_per_million_tokens"]["marginal"], told["usd_per_million_tokens"]["at_utilization"]
    assert 0 < marginal["output"] < full["output"]


@pytest.mark.parametrize("name", ["plan.svg", "plan.png"])
def test_a_picture_is_drawn(tmp_path: Path, name: str) -> None:
    assert plan("llama-3.1-8b", *H100, "--picture", str(tmp_path / name)).exit_code == 0
    assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("llama-3-8b", *H100), "did you mean llama-3.1-8b or"),
        (("llama-3.1-8b", "--hardware", "h100"), "did you mean h100-80gb?"),
        (("llama-3.1-8b", *H100, "--quantization", "int5"), "--quantization int5: known are"),
        (("llama-3.1-8b", "--hardware", "v100-32gb", "--quantization", "bf16"), "v100-32gb has no bf16: use fp16"),
        (("llama-2-7b", *H100, "--context", "9000"), "above the 4,096 of llama-2-7b"),
        (("llama-2-7b", *H100, "--context", "100"), "less than prompt and answer, 1,280 tokens"),
        (("llama-2-7b", *H100, "--buy", "--spot"), "--buy and --purchase-usd are for hardware that is bought"),
        (("llama-2-7b", *H100, "--usd-per-hour", "1", "--spot"), "--spot chooses the catalog's rate"),
        (("llama-2-7b", "--hardware", "tpu-v4", "--buy"), "tpu-v4 is only rented: leave out --buy"),
        (("llama-2-7b", "--hardware", "a100-40gb", "--spot"), "no spot rate for a100-40gb: state --usd-per-hour"),
        (("llama-2-7b", *H100, "--against", "openai/gpt-4o-minni"), 'gpt-4o-mini"?'),
        (("llama-2-7b", *H100, "--decode-tokens-per-s", "1"), "go together"),
        (("llama-2-7b", *H100, "--picture", "a.gif"), "its name must end with .svg or .png"),
        (("nowhere.json", *H100), "cannot read nowhere.json (No such file or directory)"),
        (("m", *H100, "--parameters", "many"), "give a number such as 8b"),
        (("m", *H100, "--parameters", "1m"), "parameters are too few for 32 layers"),
        (("llama-2-7b", *H100, "--requests-per-s", "inf"), "'--requests-per-s'"),
        (("llama-2-7b", *H100, "--usd-per-hour", "inf"), "'--usd-per-hour'"),
        (("llama-2-7b", *H100, "--prefill-tokens-per-s", "inf", "--decode-tokens-per-s", "1"), "'--prefill-tokens-"),
    ],
)
def test_a_mistake_is_one_line_with_its_fix(arguments: tuple[str, ...], said: str) -> None:
    result = plan(*arguments)
    assert result.exit_code == 2 and said in result.stderr.replace("\n", " ")


def test_a_file_that_is_no_config_is_refused(tmp_path: Path) -> None:
    for text, said in (("{", "is not JSON"), ("[]", "is not a model's config.json"), ("{}", 'of type "None"')):
        (tmp_path / "config.json").write_text(text)
        result = plan(str(tmp_path), *H100)
        assert result.exit_code == 2 and said in result.stderr.replace("\n", " ")
