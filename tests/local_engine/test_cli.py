"""The command line."""

from __future__ import annotations

from dataclasses import fields

import pytest
from typer.testing import CliRunner

from local_engine.cli import app
from local_engine.config import Settings
from local_engine.serve import Address


def test_help_explains_every_setting_and_shows_a_first_request() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert shown.exit_code == 0
    for field in (*fields(Settings), *fields(Address)):
        assert f"--{field.name.replace('_', '-')} " in shown.output
    assert "curl http://127.0.0.1:8081/v1/chat/completions" in shown.output


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["calibrate", "--out", "/nowhere/engine.json"], "cannot write /nowhere/engine.json"),
        (["bench", "--json", "/nowhere/bench.json"], "cannot write /nowhere/bench.json"),
        (["bench", "--streams", "8,0"], "--streams"),
        (["chat", "hello", "--seed", str(2**64)], "--seed"),
    ],
)
def test_what_cannot_end_well_is_not_begun(flags: list[str], said: str) -> None:
    """Nothing is loaded or installed for it."""
    refused = CliRunner().invoke(app, flags, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert refused.exit_code == 2
    assert said in refused.output
    assert "measured" not in refused.output
    assert "installing" not in refused.output


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--threads", "0", "--drain-seconds", "-1"], ["--threads must be", "--drain-seconds must"]),
        (["--quantization", "int3"], ["--quantization must be one of none, fp16, bf16, int8, int4"]),
    ],
)
def test_settings_that_cannot_work_are_all_named_at_once(flags: list[str], said: list[str]) -> None:
    refused = CliRunner().invoke(app, ["serve", *flags])
    assert refused.exit_code == 2
    assert all(each in refused.output for each in said)
