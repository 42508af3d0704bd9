"""Models and hardware of the catalog: counts that are known elsewhere, and names that are nearly right."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.catalog.hardware import HARDWARE, UnknownHardware, hardware
from gateway.catalog.models import MODELS, Architecture, UnknownArchitecture, architecture, architecture_of

# Parameters as the repositories' safetensors metadata states them (Hugging Face, "Safetensors: Model size").
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-small-24b": 23_572_403_200,  # the text model
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "phi-4": 14_659_507_200,
    "smollm3-3b": 3_075_098_624,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_counted_exactly(name: str) -> None:
    assert MODELS[name].parameters == PUBLISHED[name]


def test_a_mixture_passes_each_token_through_few_of_its_parameters() -> None:
    """Mixtral's paper says 12.9 billion, Qwen3's card 3.3 billion; of a dense model it is all."""
    assert round(MODELS["mixtral-8x7b"].active_parameters / 1e9, 1) == 12.9
    assert round(MODELS["qwen3-30b-a3b"].active_parameters / 1e9, 1) == 3.4
    assert MODELS["qwen3-8b"].active_parameters == MODELS["qwen3-8b"].parameters


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-4b"),
        ("demo", "demo"),
    ],
)
def test_a_model_is_found_by_its_name_or_repository(asked: str, name: str) -> None:
    assert architecture(asked).name == name


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("llama-3-8b", "did you mean llama-3.1-8b or"),
        ("Qwen/Qwen3-8B-Instruct", "did you mean qwen3-8b or"),
        ("zzz", "known are demo, llama-2-7b,"),
    ],
)
def test_an_unknown_model_is_answered_with_the_nearest(asked: str, hint: str) -> None:
    with pytest.raises(UnknownArchitecture) as caught:
        architecture(asked)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("h100", "did you mean h100-80gb?"),
        ("a100", "did you mean a100-40gb or a100-80gb?"),
        ("abacus", "known are v100"),
    ],
)
def test_unknown_hardware_is_answered_with_the_nearest(asked: str, hint: str) -> None:
    assert hardware("H100 80GB") is HARDWARE["h100-80gb"]
    with pytest.raises(UnknownHardware) as caught:
        hardware(asked)
    assert hint in str(caught.value)


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 16,
}


def test_a_config_is_counted_with_its_defaults() -> None:
    """One layer of 4 x 4 x 4 in attention and 3 x 4 x 8 in the MLP; norms of 3 x 4; an embedding in and one out."""
    counted = architecture_of(LLAMA, "tiny", "")
    assert (counted.linear, counted.parameters) == (64 + 96, 160 + 12 + 80)
    assert (counted.kv_heads, counted.head_dim, counted.kv_values_per_token()) == (2, 2, 8)
    assert architecture_of(LLAMA | {"tie_word_embeddings": True}, "tiny", "").parameters == 160 + 12 + 40
    assert architecture_of({"text_config": LLAMA}, "tiny", "") == counted


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (LLAMA | {"model_type": "mamba"}, 'models of type "mamba" are not counted; known are llama,'),
        ({"model_type": "llama"}, "the config lacks num_hidden_layers"),
        (LLAMA | {"hidden_size": "big"}, "something else where a number belongs"),
        (LLAMA | {"num_attention_heads": 0}, "something else where a number belongs"),
    ],
)
def test_a_config_that_cannot_be_counted_is_refused(config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnknownArchitecture) as caught:
        architecture_of(config, "it", "")
    assert complaint in str(caught.value)


def test_every_row_says_where_it_is_from() -> None:
    assert all(isinstance(model, Architecture) and "20" in model.source for model in MODELS.values())
    for device in HARDWARE.values():
        assert "20" in device.source
        assert "20" in device.price_source or "github" in device.price_source


def test_a_v100_has_no_bf16() -> None:
    assert "bf16" not in HARDWARE["v100-32gb"].compute
    assert all("bf16" in device.compute for name, device in HARDWARE.items() if name != "v100-32gb")
