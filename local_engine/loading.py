"""Owns the way from a model's name to a ready runner: files, dtype, device; refuses what would run wrongly.

Only safetensors are read, and no code that comes with a model is run. Every failure is a LoadError: one line with the
fix.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from local_engine import cuda
from local_engine.accelerate import accelerated
from local_engine.attention import PAGED_ATTENTION, KvCache
from local_engine.calls import Family, family_of
from local_engine.checkpoint import FETCH, check_loaded, check_shards, check_types, configuration
from local_engine.config import BLOCK_SIZE, Limits, Settings, kv_cache_tokens, limits
from local_engine.draft import load_draft
from local_engine.encoder import load_encoder
from local_engine.engine import Model
from local_engine.errors import DeviceLost, LoadError
from local_engine.grammar import Grammars
from local_engine.linear import prepare
from local_engine.lookup import PromptLookup
from local_engine.paged import Shape
from local_engine.runner import ModelRunner
from local_engine.selfcheck import compare, tolerance
from local_engine.source import DEMO_DRAFT, model_source
from local_engine.speculation import Drafter, Speculation
from local_engine.text import Shown, Text

log = logging.getLogger(__name__)

LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers whose keys and values the paged cache holds."""

WAY_OUT = "serve it with vLLM or SGLang, and name that as a deployment with `backend: openai`"

DTYPE_OF = {"fp16": torch.float16, "bf16": torch.bfloat16}

POSITION_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary scalings that look at the longest position of a forward, so that neighbours in a batch would change it."""

SMALL_MODEL_PARAMETERS = 100_000_000
"""Up to here float32 on a CPU costs little and is exact; above, memory bandwidth decides and bfloat16 halves it."""

TEMPLATE_ERRORS = (jinja2.TemplateError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What a chat template may raise over messages that it does not fit."""

_PROBE = "hybridgate_probe"

CPU_CACHE_SHARE = 0.25
CUDA_CACHE_SHARE = 0.85
"""Share of the free memory that the default KV cache may take; the rest is for activations and the neighbours."""


def load(settings: Settings) -> Model:
    """Load what `settings` name and compare it with itself, which also warms it for the first request.

    Call it on the thread that will run the model. Raises LoadError.
    """
    _prepare(settings)
    source = model_source(settings.model)
    try:
        config = configuration(source, settings.model)
        check_architecture(config, settings.model)
        check_shards(source, settings.model)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype_of(settings, settings.quantization, config, device)
        text = _text(source, settings)
        model = _weights(source, config, settings, dtype, device)
    except KeyError as error:
        if error.args == (PAGED_ATTENTION,):  # transformers looked it up in a table of this model's own
            raise LoadError(f"{settings.model} has an attention of its own kind: {WAY_OUT}") from error
        raise LoadError(f"cannot load {settings.model}: its files lack {_first_line(error)}") from error
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise LoadError(
            f"cannot load {settings.model}: {_first_line(error)}; name a model that transformers can load "
            "from safetensors: `demo`, a directory, or a Hugging Face id"
        ) from error
    bounds, cache = _cache(settings, model)
    if text.vocab_size > model.get_input_embeddings().num_embeddings:
        raise LoadError(f"{settings.model} has a tokenizer with more tokens than the model knows: name a sound model")
    name = settings.embedding_name
    embedder = None if name is None else load_encoder(model_source(settings.embedding_model or name), name)
    # Before the self-check, which runs over the layers that will serve.
    how = f", {prepare(model).way} weights" if device.type == "cpu" else ""
    runner = ModelRunner(model, cache)
    try:
        difference = compare(model, runner, bounds)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise LoadError(
            f"{settings.model} does not run on a paged cache ({type(error).__name__}): {WAY_OUT}"
        ) from error
    if math.isnan(difference):
        raise LoadError(f"{settings.model} computes no numbers (NaN): its weights are broken, {FETCH}")
    if not difference <= tolerance(model):
        raise LoadError(
            f"{settings.model} computes something else on a paged cache than by itself (logits differ by "
            f"{difference:.1%}), so it is not served: {WAY_OUT}"
        )
    if device.type == "cuda" and not settings.eager:
        runner, how = _accelerated(settings, model, cache, bounds)
    return Model(
        name=settings.name,
        runner=runner,
        text=text,
        limits=bounds,
        end_tokens=_end_tokens(model, text),
        grammars=_grammars(model, text),
        embedder=embedder,
        speculation=_speculation(settings, model, text),
        description=(
            f"{parameters_of(config) / 1e6:.1f} M parameters, {_precision(settings, model)} on {device.type}{how}, "
            f"window {bounds.window}, KV cache {bounds.num_blocks * BLOCK_SIZE} tokens"
        ),
    )


def _accelerated(settings: Settings, model: Any, cache: KvCache, bounds: Limits) -> tuple[ModelRunner, str]:
    """The runner for a GPU, and what to say of it."""
    heads, size = kv_heads(model.config)
    try:
        found = accelerated(
            model,
            cache,
            Shape(model.config.num_attention_heads, heads, size, bounds.block_size, model.dtype),
            bounds,
            attend=cuda.attention(model.device),
            fusions=cuda.fusions(model.device),
            recorder=cuda.GraphRecorder,
            most_rows=bounds.max_batch_tokens,
            say=log.info,
        )
    except DeviceLost as error:
        raise LoadError(f"{_first_line(error)}: start with --eager, and say so to those who maintain this") from error
    return found.runner, "".join(f", {way}" for way in found.ways)


def _speculation(settings: Settings, model: Any, text: Text) -> Speculation | None:
    if settings.speculation == "off":
        return None
    drafter: Drafter = PromptLookup()
    if settings.speculation == "draft":
        name = settings.draft_model or DEMO_DRAFT
        try:
            drafter = load_draft(
                name,
                model_source(name),
                device=model.device,
                dtype=model.dtype,
                vocabulary=text.vocabulary(),
                rows=settings.speculation_max_running,
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, LookupError) as error:
            raise LoadError(f"cannot load the draft model {name}: {_first_line(error)}") from error
    return Speculation(drafter, most=settings.speculation_tokens, max_sequences=settings.speculation_max_running)


def _prepare(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    # cuDNN plans attention anew for each length of a prompt, for tens of milliseconds.
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # LLM.int8 computes in float16, which bitsandbytes says of every layer in every step.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def check_architecture(config: Any, model: str) -> None:
    """Refuse what can be known before the weights are read; `compare` has the last word."""
    name = (config.architectures or ["(none)"])[0]
    if not name.endswith(("ForCausalLM", "LMHeadModel")) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise LoadError(f"{model} is a {name}, no decoder-only language model that transformers knows: {WAY_OUT}")
    other = set(getattr(config, "layer_types", None) or ["full_attention"]) - LAYERS
    if other:
        raise LoadError(f"{model} has layers of the kind {', '.join(sorted(other))}, which is not supported: {WAY_OUT}")
    scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if scaling in POSITION_DEPENDENT_ROPE:
        raise LoadError(f"{model} has {scaling} rotary scaling, which is not supported: {WAY_OUT}")


def dtype_of(settings: Settings, quantization: str, config: Any, device: torch.device) -> torch.dtype:
    """In what a quantization keeps what it does not quantize, and computes."""
    if quantization in DTYPE_OF:
        return DTYPE_OF[quantization]
    if settings.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    quantized = quantization != "none" or getattr(config, "quantization_config", None) is not None
    if device.type != "cpu" or quantized:
        return torch.bfloat16
    return torch.float32 if parameters_of(config) <= SMALL_MODEL_PARAMETERS else torch.bfloat16


def parameters_of(config: Any) -> int:
    """Parameters of a model with this configuration, without its weights."""
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config).num_parameters())


def bare_model(settings: Settings) -> Any:
    """The model with its own attention, for measuring what it computes. Raises what loading it raises."""
    _prepare(settings)
    source = model_source(settings.model)
    config = configuration(source, settings.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _weights(source, config, settings, dtype_of(settings, settings.quantization, config, device), device)
    model.set_attn_implementation("eager")
    return model


def _weights(source: str, config: Any, settings: Settings, dtype: torch.dtype, device: torch.device) -> Any:
    chosen = quantization_config(settings.quantization, dtype)
    if chosen is not None and getattr(config, "quantization_config", None) is not None:
        raise LoadError(f"{settings.model} is quantized already: leave --quantization out")
    # Quantized layers are made on the device, since they cannot be moved.
    quantized = {} if chosen is None else {"quantization_config": chosen, "device_map": {"": device}}
    model, told = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation=PAGED_ATTENTION,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that `check_loaded` can say which
        **quantized,
    )
    check_loaded(told, settings.model)
    if getattr(config, "quantization_config", None) is None:
        check_types(source, settings.model)
    return (model if getattr(model, "is_quantized", False) else model.to(device)).eval()


def quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How bitsandbytes stores the linear layers; None where it does not.

    LLM.int8's outliers (Dettmers et al., 2022) are found over a whole batch, so that with its default threshold an
    answer depends on its neighbours: 0 switches them off. NF4 with double quantization is QLoRA's (2023).
    """
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    if quantization == "int4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def _precision(settings: Settings, model: Any) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    stored = getattr(model.config, "quantization_config", None)
    if stored is None:
        return dtype
    method = settings.quantization if settings.quantization in ("int8", "int4") else "the checkpoint's quantization"
    return f"{method} with {dtype}"


def _text(source: str, settings: Settings) -> Text:
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise LoadError(f"{settings.model} has no tokenizer.json: convert its tokenizer, or name another model")
    if settings.chat_template:
        try:
            tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LoadError(f"cannot read --chat-template {settings.chat_template}: {_first_line(error)}") from error
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise LoadError(f"{settings.model} has no chat template: name an instruct model, or give --chat-template FILE")

    def apply(shown: Shown) -> str:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in shown.messages],
                tools=[dict(tool) for tool in shown.tools] or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=shown.opens,
                continue_final_message=shown.continues,
            )
        )

    try:
        apply(Shown([{"role": "user", "content": "hello"}]))
    except jinja2.TemplateSyntaxError as error:
        raise LoadError(
            f"{settings.model} has a chat template with an error in line {error.lineno}: {_first_line(error)}; "
            "give another with --chat-template FILE"
        ) from error
    except TEMPLATE_ERRORS:
        pass  # it may refuse this conversation and take others

    def render(shown: Shown) -> str:
        try:
            return apply(shown)
        except TEMPLATE_ERRORS as error:
            # A template's own raise_exception is a sentence of its author; anything else could quote the messages.
            said = error.message if type(error) is jinja2.TemplateError else None
            raise ValueError(said or "they do not fit it") from None

    return Text(
        tokenizer.backend_tokenizer,
        render,
        chat_template=template,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        eos_token_id=tokenizer.eos_token_id,
        family=_family(template, render),
    )


def _family(template: str, render: Callable[[Shown], str]) -> Family | None:
    """The form of tool calls that a template teaches, if it does show the model what tools there are."""
    tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {"type": "object"}}}
    try:
        shows = _PROBE in render(Shown([{"role": "user", "content": "hello"}], [tool]))
    except ValueError:
        return None
    return family_of(template) if shows else None


def _end_tokens(model: Any, text: Text) -> frozenset[int]:
    """All end tokens that the generation config names, else the model's, else the tokenizer's."""
    for found in (model.generation_config.eos_token_id, model.config.eos_token_id, text.eos_token_id):
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def _grammars(model: Any, text: Text) -> Grammars | None:
    try:
        vocabulary = model.get_output_embeddings().out_features
        return Grammars(text.tokenizer_json(), vocabulary, _end_tokens(model, text))
    except ValueError:  # a kind of tokenizer that llguidance does not know: everything else works all the same
        return None


def window_of(config: Any, model: str) -> int:
    """The longest sequence, in tokens. Raises LoadError where the model does not say."""
    window: int | None = getattr(config, "max_position_embeddings", None)
    if window is None:
        raise LoadError(f"{model} states no max_position_embeddings, so its window is not known: {WAY_OUT}")
    return window


def kv_heads(config: Any) -> tuple[int, int]:
    """How many heads have keys and values of their own, and the size of each."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, size


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token, in all layers."""
    heads, size = kv_heads(config)
    return int(2 * config.num_hidden_layers * heads * size * dtype.itemsize)


def _cache(settings: Settings, model: Any) -> tuple[Limits, KvCache]:
    config = model.config
    window = window_of(config, settings.model)
    heads, head_size = kv_heads(config)
    bytes_per_token = kv_bytes_per_token(config, model.dtype)
    share = CUDA_CACHE_SHARE if model.device.type == "cuda" else CPU_CACHE_SHARE
    tokens = kv_cache_tokens(
        settings, window=window, bytes_per_token=bytes_per_token, free_bytes=int(free_bytes(model.device) * share)
    )
    bounds = limits(settings, window=window, kv_cache_tokens=tokens, device_type=model.device.type)
    try:
        cache = KvCache(
            layers=config.num_hidden_layers,
            num_blocks=bounds.num_blocks,
            block_size=bounds.block_size,
            kv_heads=heads,
            head_size=head_size,
            dtype=model.dtype,
            device=model.device,
        )
    except RuntimeError as error:
        raise LoadError(
            f"a KV cache of {tokens} tokens needs {tokens * bytes_per_token / 2**30:.1f} GiB, which is not free: "
            "give a smaller --kv-cache-tokens"
        ) from error
    return bounds, cache


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
