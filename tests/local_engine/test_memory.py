"""What a model takes, said before it is loaded, against what it takes once it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from local_engine import perplexity
from local_engine.cli import app
from local_engine.config import DEFAULT_WINDOWS, QUANTIZATIONS, Settings
from local_engine.errors import LoadError
from local_engine.loading import bare_model
from local_engine.memory import Fit, Need, Place, activation_bytes, inspect, recorded_bytes


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_weights_take_what_was_said(llama: Path, quantization: str) -> None:
    """Buffers beside the weights are a few bytes a layer, of which this model has little else."""
    needs = {need.quantization: need for need in inspect(Settings(model=str(llama))).needs}
    taken = bare_model(Settings(model=str(llama), quantization=quantization)).get_memory_footprint()
    if quantization == "none":
        assert needs[quantization].weights == pytest.approx(taken, rel=0.001)
    else:
        assert needs[quantization].weights == pytest.approx(taken, rel=0.03)


def test_a_token_takes_its_keys_and_values_in_every_layer(llama: Path) -> None:
    """Two layers of two heads of sixteen numbers, in float32 and in two bytes."""
    needs = inspect(Settings(model=str(llama))).needs
    assert [need.kv_per_token for need in needs] == [2 * 2 * 2 * 16 * size for size in (4, 2, 2, 2, 2)]


@pytest.mark.parametrize(
    ("free", "fits", "tokens"),
    [(100, False, 0), (300 + 199, False, 99), (300 + 200, True, 100), (10**9, True, DEFAULT_WINDOWS * 100)],
)
def test_what_fits_is_a_window_of_cache_in_the_share_of_what_weights_and_activations_leave(
    free: int, fits: bool, tokens: int
) -> None:
    fit = Fit(Place("cpu", free, 0.5), Need("none", "float32", 200, 1, 100), window=100)
    assert (fit.fits, fit.cache_tokens) == (fits, tokens)


LLAMA = LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=2)
LLAMA.max_position_embeddings = 4096


@pytest.mark.parametrize(
    ("device", "eager", "heads_copied"), [("cpu", False, 3 * 2), ("cuda", True, 3 * 2), ("cuda", False, 8)]
)
def test_keys_and_values_are_copied_for_all_that_decode_or_in_place_for_one_prompt(
    device: str, eager: bool, heads_copied: int
) -> None:
    settings = Settings(model="demo", max_running=3, max_batch_tokens=8, eager=eager)
    logits = 3 * 1000 * (2 + 4 * 4)
    assert activation_bytes(LLAMA, settings, 2, device) == 2 * 4096 * heads_copied * 8 * 2 + logits


@pytest.mark.parametrize(
    ("most", "rows", "largest"),
    [(4, 1 + 2 + 4, 4), (24, 1 + 2 + 4 + 8 + 16 + 24, 24), (None, 7 + 224 + 352 + 960, 256)],
)
def test_recorded_steps_hold_their_logits_and_the_largest_ones_activations(
    most: int | None, rows: int, largest: int
) -> None:
    settings = Settings(model="demo", max_running=4, max_batch_tokens=most)
    assert recorded_bytes(LLAMA, settings, 2) == 2 * (rows * 1000 + largest * (4 * 64 + 3 * 96))
    assert recorded_bytes(LLAMA, replace(settings, eager=True), 2) == 0


def test_inspect_shows_a_table_or_json(llama: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(llama)])
    assert shown.exit_code == 0
    assert all(f"\n{quantization} " in shown.stdout for quantization in QUANTIZATIONS)
    told = orjson.loads(CliRunner().invoke(app, ["inspect", str(llama), "--json"]).stdout)
    assert [need["quantization"] for need in told["needs"]] == list(QUANTIZATIONS)
    assert {fit["place"] for fit in told["fits"]} == {place["name"] for place in told["places"]}


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "none")])
    assert shown.exit_code == 1
    assert "is not a directory" in shown.stderr


def test_a_model_that_cannot_be_served_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match="no decoder-only language model"):
        inspect(Settings(model=str(tmp_path)))


def test_a_configuration_that_cannot_be_read_is_told_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match=r"cannot read the configuration of .*model_type"):
        inspect(Settings(model=str(tmp_path)))


def test_a_model_without_attention_is_not_measured(tmp_path: Path) -> None:
    """Whose configuration lacks what every other one has."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "rwkv", "architectures": ["RwkvForCausalLM"], "vocab_size": 64, "hidden_size": 32, '
        '"num_hidden_layers": 1, "max_position_embeddings": 64, "attention_hidden_size": 32, "intermediate_size": 64}'
    )
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match="backend: openai"):
        inspect(Settings(model=str(tmp_path)))


def test_perplexity_is_measured_for_every_quantization() -> None:
    found = perplexity.measure(2)
    assert [one.quantization for one in found] == list(QUANTIZATIONS)
    assert found[0].same == 1.0
    assert all(1 <= one.perplexity < 1.2 for one in found)
    assert perplexity.table(found).count("\n") == 1 + len(QUANTIZATIONS)
