"""Owns the way from a model's name to a ready runner: files, dtype, device; refuses what would run wrongly.

Only safetensors are read, and no code that comes with a model is run. Every failure is a LoadError: one line with the
fix.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from local_engine.attention import PAGED_ATTENTION, KvCache
from local_engine.config import BLOCK_SIZE, Limits, Settings, kv_cache_tokens, limits
from local_engine.engine import Model
from local_engine.errors import LoadError
from local_engine.runner import ModelRunner
from local_engine.scheduler import Batch, Chunk
from local_engine.sequence import Sequence as TokenSequence
from local_engine.source import model_source
from local_engine.text import Text

ARCHITECTURES = (
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "SmolLM3ForCausalLM",
)
"""Those whose paged forward was found equal to transformers' generate, token for token."""

POSITION_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary scalings that look at the longest position of a forward, so that neighbours in a batch would change it."""

SMALL_MODEL_PARAMETERS = 100_000_000
"""Up to here float32 on a CPU costs little and is exact; above, memory bandwidth decides and bfloat16 halves it."""

TEMPLATE_ERRORS = (jinja2.TemplateError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What a chat template may raise over messages that it does not fit."""

CPU_CACHE_SHARE = 0.25
CUDA_CACHE_SHARE = 0.85
"""Share of the free memory that the default KV cache may take; the rest is for activations and the neighbours."""


def load(settings: Settings) -> Model:
    """Load what `settings` name and run one forward, so that the first request meets a warm model.

    Call it on the thread that will run the model. Raises LoadError.
    """
    torch.set_num_threads(settings.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = model_source(settings.model)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        _check_architecture(config, settings.model)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = _dtype(settings, config, device)
        text = _text(source, settings)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=PAGED_ATTENTION,
        )
        model = model.to(device).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise LoadError(
            f"cannot load {settings.model}: {_first_line(error)}; name a model that transformers can load "
            "from safetensors: `demo`, a directory, or a Hugging Face id"
        ) from error
    bounds, cache = _cache(settings, model)
    if text.vocab_size > model.get_input_embeddings().num_embeddings:
        raise LoadError(f"{settings.model} has a tokenizer with more tokens than the model knows: name a sound model")
    runner = ModelRunner(model, cache)
    _warm_up(runner)
    return Model(
        name=settings.name,
        runner=runner,
        text=text,
        limits=bounds,
        end_tokens=_end_tokens(model, text),
        description=(
            f"{model.num_parameters() / 1e6:.1f} M parameters, {str(dtype).removeprefix('torch.')} on {device.type}, "
            f"window {bounds.window}, KV cache {bounds.num_blocks * BLOCK_SIZE} tokens"
        ),
    )


def _check_architecture(config: Any, model: str) -> None:
    names = config.architectures or ["(none)"]
    if names[0] not in ARCHITECTURES:
        raise LoadError(f"{model} is a {names[0]}, which is not supported: name a model of {', '.join(ARCHITECTURES)}")
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    if windowed or layers != {"full_attention"}:
        raise LoadError(
            f"{model} has sliding-window attention, which is not supported: name a model with full attention"
        )
    scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if scaling in POSITION_DEPENDENT_ROPE:
        raise LoadError(f"{model} has {scaling} rotary scaling, which is not supported: name a model without it")


def _dtype(settings: Settings, config: Any, device: torch.device) -> torch.dtype:
    if settings.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    if device.type != "cpu":
        return torch.bfloat16
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    return torch.float32 if parameters <= SMALL_MODEL_PARAMETERS else torch.bfloat16


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

    def apply(messages: Sequence[Mapping[str, str]]) -> str:
        conversation = [dict(message) for message in messages]
        return str(
            tokenizer.apply_chat_template(
                conversation, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        )

    try:
        apply([{"role": "user", "content": "hello"}])
    except jinja2.TemplateSyntaxError as error:
        raise LoadError(
            f"{settings.model} has a chat template with an error in line {error.lineno}: {_first_line(error)}; "
            "give another with --chat-template FILE"
        ) from error
    except TEMPLATE_ERRORS:
        pass  # it may refuse this conversation and take others

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        try:
            return apply(messages)
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
    )


def _end_tokens(model: Any, text: Text) -> frozenset[int]:
    """All end tokens that the generation config names, else the model's, else the tokenizer's."""
    for found in (model.generation_config.eos_token_id, model.config.eos_token_id, text.eos_token_id):
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def _cache(settings: Settings, model: Any) -> tuple[Limits, KvCache]:
    config = model.config
    heads: int = config.num_key_value_heads
    head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * heads * head_size * model.dtype.itemsize
    window: int = config.max_position_embeddings
    tokens = kv_cache_tokens(
        settings, window=window, bytes_per_token=bytes_per_token, free_bytes=_free_bytes(model.device)
    )
    bounds = limits(settings, window=window, kv_cache_tokens=tokens)
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


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * CUDA_CACHE_SHARE)
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * CPU_CACHE_SHARE)


def _warm_up(runner: ModelRunner) -> None:
    """One prefill and one decode over block 0, which nobody holds yet: torch sets up its kernels here."""
    sequence = TokenSequence(id="warm-up", prompt_length=2, tokens=[0, 0], max_tokens=1)
    prefill = Chunk(sequence, start=0, tokens=(0, 0), blocks=(0,), samples=True, fresh=True)
    decode = Chunk(sequence, start=2, tokens=(0,), blocks=(0,), samples=True)
    runner.forward(Batch(prefill=(prefill,)))
    runner.forward(Batch(decode=(decode,)))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
