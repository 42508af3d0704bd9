"""Tiny random models with a tokenizer of their own, written as a user would have them: a directory of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
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

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "qwen3moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1},
    ),
    "mistral": (MistralConfig, {}),
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
"""Each family that is served: its configuration, and what makes it differ from a Llama."""


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
    configuration, differing = KINDS[kind]
    return AutoModelForCausalLM.from_config(configuration(**(sizes | differing | changes)))


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
