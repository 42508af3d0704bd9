"""From a name to a model, or one line that says the fix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface

from local_engine.attention import PAGED_ATTENTION
from local_engine.config import Settings
from local_engine.conversation import Conversation, Message
from local_engine.errors import InvalidRequest, LoadError
from local_engine.loading import load
from tests.tiny_models import tiny_model


def edited(directory: Path, **changes: object) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def sharded(write_model: Any) -> Path:
    """In files of some 100 KB."""
    directory: Path = write_model("llama")
    (directory / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(directory, max_shard_size="100KB")
    return directory


def rewritten(write_model: Any, change: Callable[[dict[str, Tensor]], object]) -> str:
    """A checkpoint with other weights."""
    directory: Path = write_model("llama")
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def as_type(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.update({name: value.to(dtype) for name, value in weights.items()})


def damaged(write_model: Any, how: str) -> str:
    """A checkpoint that transformers loads, or fails at in words of its own."""
    match how:
        case "shard":
            directory = sharded(write_model)
            next(directory.glob("model-00002-*.safetensors")).unlink()
            return str(directory)
        case "index":
            directory = sharded(write_model)
            (directory / "model.safetensors.index.json").write_text("[]")
            return str(directory)
        case "weight":
            return rewritten(write_model, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
        case "size":
            half = {"model.norm.weight": torch.ones(32)}
            return rewritten(write_model, lambda weights: weights.update(half))
        case "int8":
            return rewritten(write_model, as_type(torch.int8))
        case "float8":
            return rewritten(write_model, as_type(torch.float8_e4m3fn))
        case "nan":
            return rewritten(write_model, lambda weights: weights["model.norm.weight"].fill_(float("nan")))
        case "text":
            return str(edited(write_model("llama"), hidden_size="64"))
        case "dtype":
            return str(edited(write_model("llama"), dtype="float99"))
    raise AssertionError(how)


def broken(write_model: Any, how: str, tmp_path: Path) -> str:
    match how:
        case "missing":
            return str(tmp_path / "nowhere")
        case "file":
            (tmp_path / "file").touch()
            return str(tmp_path / "file")
        case "empty":
            return str(tmp_path)
        case "bin":
            directory: Path = write_model("llama")
            (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
            return str(directory)
        case "template":
            return str(write_model("llama", chat_template=None))
        case "syntax":
            return str(write_model("llama", chat_template="{% for message in messages %}\n{{ message.content "))
        case "sinks":
            return str(write_model("gptoss"))
        case "architecture":
            return str(edited(write_model("llama"), architectures=["Gemma3ForConditionalGeneration"]))
        case "layers":
            return str(edited(write_model("llama"), layer_types=["linear_attention", "full_attention"]))
        case "attention of its own":
            return str(write_model("falcon"))
        case "own code":
            own = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
            return str(edited(write_model("llama"), model_type="own", auto_map=own))
        case "rope":
            return str(edited(write_model("llama"), rope_scaling={"rope_type": "dynamic", "factor": 2.0}))
        case "weights":
            directory = write_model("llama")
            (directory / "model.safetensors").write_bytes(b"garbage")
            return str(directory)
    raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "is not a directory"),
        ("file", "is not a directory"),
        ("empty", "no config.json"),
        ("bin", "no *.safetensors"),
        ("template", "--chat-template"),
        ("syntax", "chat template with an error in line 2"),
        ("sinks", "backend: openai"),
        ("architecture", "Gemma3ForConditionalGeneration, no decoder-only"),
        ("layers", "layers of the kind linear_attention"),
        ("attention of its own", "backend: openai"),
        ("rope", "dynamic rotary scaling"),
        ("own code", "brings code of its own, which is never run: serve it with vLLM"),
        ("weights", "cannot load"),
    ],
)
def test_a_model_that_cannot_be_served_is_one_line_with_the_fix(
    write_model: Any, tmp_path: Path, how: str, said: str
) -> None:
    model = broken(write_model, how, tmp_path)
    with pytest.raises(LoadError) as caught:
        load(Settings(model=model))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("shard", r"lacks 1 of \d+ shards: model-00002-of-\d+.safetensors; fetch"),
        ("index", "index.json of .* cannot be read: fetch"),
        ("weight", "lack 1 of its weights: model.layers.1.mlp.up_proj.weight; fetch"),
        ("size", r"such as model.norm.weight with \[32\] instead of \[64\]: fetch"),
        ("int8", "as I8, and its config.json has no quantization_config"),
        ("float8", "as F8_E4M3, and its config.json has no quantization_config"),
        ("nan", "computes no numbers"),
        ("text", "config.json of .* has a value that cannot be right: .*'hidden_size'"),
        ("dtype", "config.json of .* has a value that cannot be right: .*float99"),
    ],
)
def test_a_damaged_checkpoint_is_not_filled_with_random_numbers(write_model: Any, how: str, said: str) -> None:
    model = damaged(write_model, how)
    with pytest.raises(LoadError, match=said) as caught:
        load(Settings(model=model))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_width_are_the_same_numbers(write_model: Any, dtype: torch.dtype) -> None:
    assert "float32 on" in load(Settings(model=rewritten(write_model, as_type(dtype)))).description


def test_a_checkpoint_in_shards_is_loaded(write_model: Any) -> None:
    assert load(Settings(model=str(sharded(write_model)))).limits.window == 256


def test_a_kv_cache_that_memory_does_not_hold_says_which_flag_to_change(llama: Path) -> None:
    with pytest.raises(LoadError, match="--kv-cache-tokens"):
        load(Settings(model=str(llama), kv_cache_tokens=10**13))


def test_a_loaded_model_knows_its_window_end_tokens_and_template(llama: Path) -> None:
    model = load(Settings(model=str(llama), served_name="tiny"))
    assert (model.name, model.limits.window, model.limits.num_blocks) == ("tiny", 256, 256)
    assert model.end_tokens == {0}
    assert "float32 on" in model.description
    assert model.text.encode_chat(Conversation((Message("user", "fox"),))) == [2, *model.text.encode("fox"), 0, 3]


def test_a_template_given_as_a_file_replaces_the_models(write_model: Any, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    settings = Settings(model=str(write_model("llama", chat_template=None)), chat_template=str(tmp_path / "chat.jinja"))
    text = load(settings).text
    assert text.encode_chat(Conversation((Message("user", "fox"),))) == text.encode("fox")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.at_all }}", "they do not fit it"),
        ("{{ messages[0].content + 1 }}", "they do not fit it"),
    ],
)
def test_a_template_that_refuses_messages_never_repeats_them(
    write_model: Any, tmp_path: Path, template: str, said: str
) -> None:
    (tmp_path / "chat.jinja").write_text(template)
    text = load(Settings(model=str(write_model("llama")), chat_template=str(tmp_path / "chat.jinja"))).text
    with pytest.raises(InvalidRequest) as caught:
        text.encode_chat(Conversation((Message("user", "my secret"),)))
    assert said in str(caught.value)
    assert "my secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "said"),
    [("fp16", "float16 on"), ("bf16", "bfloat16 on"), ("int8", "int8 with bfloat16"), ("int4", "int4 with bfloat16")],
)
def test_weights_are_stored_as_asked_and_the_model_still_equals_itself(
    llama: Path, quantization: str, said: str
) -> None:
    assert said in load(Settings(model=str(llama), quantization=quantization)).description


def test_a_checkpoint_that_is_quantized_is_not_quantized_again(write_model: Any) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    model = str(edited(write_model("llama"), quantization_config=stored))
    with pytest.raises(LoadError, match="leave --quantization out"):
        load(Settings(model=model, quantization="int4"))


def test_a_model_that_differs_from_itself_on_the_paged_cache_is_refused(llama: Path) -> None:
    """Attention that forgets its scale, as an architecture may have one that nobody passes on."""
    exact = AttentionInterface()[PAGED_ATTENTION]
    AttentionInterface.register(PAGED_ATTENTION, lambda *given, **named: exact(*given, **(named | {"scaling": 1.0})))
    try:
        with pytest.raises(LoadError, match="something else on a paged cache than by itself"):
            load(Settings(model=str(llama)))
    finally:
        AttentionInterface.register(PAGED_ATTENTION, exact)


@pytest.mark.parametrize(("dtype", "said"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_a_small_model_is_float32_on_the_cpu_unless_told_otherwise(llama: Path, dtype: str, said: str) -> None:
    assert said in load(Settings(model=str(llama), dtype=dtype)).description
