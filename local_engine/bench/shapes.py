"""Owns the models that are measured: random weights of known shapes, with a tokenizer whose texts are as long as asked
for; refuses to load or run them.

Every token of an answer is letters, and none of them ends it, so that each server has to make as many tokens as the
others.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = (END, USER, ASSISTANT, "<|system|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FRAME = 3
"""Tokens that the template puts around a prompt."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-like model's sizes, in the words of its configuration. `window` is sliding where there is one."""

    name: str
    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    positions: int
    sliding_window: int | None = None


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 1000, 64, 128, 2, 4, 2, 2048),
        Shape("51m", 32_000, 512, 1536, 6, 8, 4, 2048),
        Shape("llama-2-7b", 32_000, 4096, 11_008, 32, 32, 32, 4096),  # meta-llama/Llama-2-7b-hf, config.json
        Shape("mistral-7b", 32_000, 4096, 14_336, 32, 32, 8, 32_768, 4096),  # mistralai/Mistral-7B-v0.1, config.json
    )
}
"""`51m` is the shape that the engine's own figures are for; the large ones are those of the published models."""


def configuration(shape: Shape) -> Any:
    """transformers' configuration of a shape."""
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.positions,
        "bos_token_id": None,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    if shape.sliding_window is None:
        return LlamaConfig(**sizes)
    return MistralConfig(**sizes, sliding_window=shape.sliding_window)


def pieces(vocabulary: int) -> tuple[list[str], list[tuple[str, str]]]:
    """A byte-level BPE: its tokens in order, and its merges. Special tokens, bytes, pairs of letters, pairs of pairs.
    Raises ValueError where there is no room for the bytes and the pairs."""
    pairs = [(one, other) for one in LETTERS for other in LETTERS]
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(one + other for one, other in pairs)]
    room = vocabulary - len(tokens)
    if not 0 < room <= len(pairs) ** 2:
        raise ValueError(f"a vocabulary of {vocabulary} tokens does not hold the bytes and the pairs of letters")
    chance = random.Random(0)  # noqa: S311 - the same words each time
    words = [
        ("".join(pairs[index // len(pairs)]), "".join(pairs[index % len(pairs)]))
        for index in chance.sample(range(len(pairs) ** 2), room)
    ]
    return tokens + [one + other for one, other in words], pairs + words


def tokenizer(vocabulary: int) -> Any:
    """The tokenizer as transformers reads and writes it, with its chat template."""
    tokens, merges = pieces(vocabulary)
    made = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)
    fast.chat_template = TEMPLATE
    return fast


def prompts(seed: int, vocabulary: int, tokens: int, count: int) -> list[str]:
    """So many different messages, each of so many tokens with what the template puts around it (one more where that is
    odd); the same ones for the same seed."""
    chance = random.Random(seed)  # noqa: S311 - the same words each time
    words = [token for token in pieces(vocabulary)[0] if len(token) == 4 and token.isalpha() and _encodes(token)]
    size = max(1, (tokens - FRAME + 2) // 2)
    return [" ".join(chance.choices(words, k=size)) for _ in range(count)]


def _encodes(word: str) -> bool:
    """Whether four letters become one token: the pair in the middle, if it is merged first, leaves no two pairs."""
    return word[1:3] >= min(word[:2], word[2:])


def write(shape: Shape, directory: Path, say: Callable[[str], None], dtype: torch.dtype = torch.float32) -> Path:
    """The model as files, once; the directory."""
    if (directory / "written").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    say(f"writing random weights of the shape {shape.name} to {directory}")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a CPU draws billions of numbers for minutes
        made: Any = AutoModelForCausalLM.from_config(configuration(shape), dtype=dtype)
    tokens, _ = pieces(shape.vocabulary)
    silent = [index for index, token in enumerate(tokens) if not (len(token) > 1 and token.isalpha())]
    with torch.no_grad():
        made.get_output_embeddings().weight[silent] = 0  # a logit of 0 is never the largest of thousands
    made.save_pretrained(directory)
    tokenizer(shape.vocabulary).save_pretrained(directory)
    (directory / "written").touch()
    return directory
