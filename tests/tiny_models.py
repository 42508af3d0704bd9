"""Tiny random models with a tokenizer of their own, written as a user would have them: a directory of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)

VOCABULARY = 320
END = 0
SPECIAL_TOKENS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content == 'forbidden' %}{{ raise_exception('no such word') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

ABSENT = object()
"""Of a size that a configuration does not take."""

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "qwen3moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1},
    ),
    "mistral": (MistralConfig, {}),
    "mistral-window": (MistralConfig, {"sliding_window": 24}),
    "qwen2-window": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "gemma2": (
        Gemma2Config,
        {
            "sliding_window": 24,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 30.0,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "bitnet": (BitNetConfig, {"pad_token_id": 0, "tie_word_embeddings": False}),
    "olmo": (OlmoConfig, {"clip_qkv": 8.0, "pad_token_id": 0}),
    "ministral3": (
        Ministral3Config,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,  # from which on queries are scaled
                "llama_4_scaling_beta": 0.5,
            }
        },
    ),
    "olmo2": (Olmo2Config, {"pad_token_id": 0}),
    "phi": (PhiConfig, {}),
    "starcoder2": (Starcoder2Config, {"sliding_window": 24, "tie_word_embeddings": False}),
    "phi3": (Phi3Config, {"pad_token_id": 0}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0], "pad_token_id": 0, "tie_word_embeddings": False}),
    "granite": (
        GraniteConfig,
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 1.5,
            "residual_multiplier": 0.8,
            "logits_scaling": 2.0,
        },
    ),
}
"""Families that are served: each one's configuration, and what makes it differ from a Llama."""

REFUSED_KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptoss": (
        GptOssConfig,
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "sliding_window": 24,
        },
    ),
    "falcon": (FalconConfig, {"head_dim": ABSENT}),
}
"""Families whose attention the paged cache does not compute: one with sinks, one with a table of its own."""


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE, so that any text encodes and any token decodes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog, then the dog jumps over the fox"], trainer)
    return made


def tiny_model(kind: str, *, window: int = 256, **changes: Any) -> Any:
    """A random float32 model of a kind; large weights make its greedy text varied."""
    torch.manual_seed(7)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": window,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": None,
        "sliding_window": None,
    }
    configuration, differing = (KINDS | REFUSED_KINDS)[kind]
    stated = {key: value for key, value in (sizes | differing | changes).items() if value is not ABSENT}
    return AutoModelForCausalLM.from_config(configuration(**stated))


def write(model: Any, directory: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """The model and its tokenizer as files."""
    model.save_pretrained(directory)
    fast = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), eos_token="<|end|>")
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(directory)
    return directory


def write_endless(directory: Path, *, window: int = 8192) -> Path:
    """A Llama whose answers are never over before max_tokens, and show a character with each token.

    Its end token is one that it does not have, so nothing it generates can be that. Tokens that are no printable ASCII
    have a logit of 0, which is never the largest of so many random ones.
    """
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())]
    hidden = [token for token in range(VOCABULARY) if token >= len(texts) or not _is_plain(texts[token])]
    model = tiny_model("llama", window=window)
    with torch.no_grad():
        model.get_output_embeddings().weight[hidden] = 0
    model.config.eos_token_id = model.generation_config.eos_token_id = VOCABULARY
    return write(model, directory)


def _is_plain(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable()
