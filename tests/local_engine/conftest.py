"""Tiny random models with a tokenizer of their own, written as a user would have them: a directory of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from local_engine.text import Text

CONFIGS: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}
VOCABULARY = 320
SPECIAL_TOKENS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content == 'forbidden' %}{{ raise_exception('no such word') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

WriteModel = Callable[..., Path]


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
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


@pytest.fixture
def text(tokenizer: Tokenizer) -> Text:
    """The tokenizer with a template that needs no transformers."""
    return Text(
        tokenizer,
        lambda messages: "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages) + "<|assistant|>",
        chat_template=CHAT_TEMPLATE,
        bos_token=None,
        eos_token="<|end|>",
        eos_token_id=0,
    )


@pytest.fixture(scope="session")
def write_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> WriteModel:
    """Writes a random float32 model of a kind; large weights make its greedy text varied."""

    def write(
        kind: str = "llama", *, window: int = 256, chat_template: str | None = CHAT_TEMPLATE, **changes: Any
    ) -> Path:
        directory = tmp_path_factory.mktemp(kind)
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
            "eos_token_id": 0,
            "pad_token_id": None,
            "sliding_window": None,
        }
        config = CONFIGS[kind](**(sizes | changes))
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
        if chat_template is not None:
            fast.chat_template = chat_template
        fast.save_pretrained(directory)
        return directory

    return write


@pytest.fixture(scope="session")
def llama(write_model: WriteModel) -> Path:
    """The directory of a random Llama with a window of 256."""
    return write_model("llama")
