"""The catalog's counts against the models themselves, as transformers builds them, and against the bundled weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from gateway.catalog.models import architecture, architecture_of
from gateway.roofline import Quantization, kv_bytes_per_token, weight_bytes

DEMO = Path(__file__).parents[2] / "local_engine" / "demo_model"
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 200,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CASES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    ("mistral", {"sliding_window": 64}),
    ("qwen2", {"head_dim": 16}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("phi3", {"head_dim": 16}),
    ("smollm3", {"head_dim": 16}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
]


@pytest.mark.parametrize(("family", "more"), CASES, ids=[f"{family}-{n}" for n, (family, _) in enumerate(CASES)])
def test_a_config_counts_as_many_parameters_as_the_model_has(family: str, more: dict[str, Any]) -> None:
    config = transformers.AutoConfig.for_model(family, **(SMALL | more))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = architecture_of(config.to_dict(), family, "")
    assert counted.parameters == model.num_parameters()
    matrices = [weight for name, weight in model.named_parameters() if weight.dim() > 1 and "embed" not in name]
    assert counted.linear == sum(weight.numel() for weight in matrices) - (0 if counted.tied else counted.head)


@pytest.mark.parametrize("name", ["llama-2-7b", "qwen3-4b", "qwen3-30b-a3b"])
def test_a_row_of_the_catalog_is_the_size_of_the_model_that_transformers_builds(name: str) -> None:
    row = architecture(name)
    family = {"llama-2-7b": "llama", "qwen3-4b": "qwen3", "qwen3-30b-a3b": "qwen3_moe"}[name]
    config = transformers.AutoConfig.for_model(
        family,
        num_hidden_layers=row.layers,
        hidden_size=row.hidden,
        intermediate_size=row.intermediate,
        moe_intermediate_size=row.intermediate,
        num_experts=row.experts,
        num_experts_per_tok=row.experts_per_token,
        num_attention_heads=row.heads,
        num_key_value_heads=row.kv_heads,
        head_dim=row.head_dim,
        vocab_size=row.vocab,
        tie_word_embeddings=row.tied,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert row.parameters == model.num_parameters()


def test_the_bundled_model_is_the_row_called_demo() -> None:
    """Its config, its number of parameters, and its bytes on disk."""
    row = architecture("demo")
    read = architecture_of(json.loads((DEMO / "config.json").read_text()), "demo", row.source)
    assert read == row
    with safe_open(DEMO / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (it is no mapping)
    assert row.parameters == sum(tensor.numel() for tensor in tensors)
    assert weight_bytes(row, "fp16") == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_a_token_leaves_as_much_cache_as_transformers_keeps() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float16)
    with torch.inference_mode():
        cache = model(torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kept == 7 * kv_bytes_per_token(architecture("demo"))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights_take_as_much_as_bitsandbytes_makes_of_them(quantization: Quantization) -> None:
    """To the byte under int8; under NF4 within the padding of the last block of scales."""
    nf4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    asked: dict[str, Any] = nf4 if quantization == "int4" else {"load_in_8bit": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        DEMO, dtype=torch.bfloat16, quantization_config=transformers.BitsAndBytesConfig(**asked)
    )
    taken = sum(_bytes_with_scales(parameter) for parameter in model.parameters())
    assert taken == pytest.approx(weight_bytes(architecture("demo"), quantization), rel=1e-4)


def _bytes_with_scales(parameter: Any) -> int:
    """A weight's bytes with the scales that bitsandbytes keeps beside it."""
    state, rows = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
    scales = [rows] if rows is not None else [] if state is None else [state.absmax, state.state2.absmax]
    return int(parameter.nbytes) + sum(int(scale.nbytes) for scale in scales)
