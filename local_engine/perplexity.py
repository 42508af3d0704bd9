"""Owns how much a quantization costs in quality: perplexity over the bundled model's held-out questions; refuses other
models, for which no text is at hand.

Perplexity: exp of the mean negative log likelihood of the answers' tokens, the end token included, each after the
question and the answer so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from local_engine.config import QUANTIZATIONS, Settings
from local_engine.demo_model import corpus as corpora
from local_engine.demo_model.corpus import Case
from local_engine.loading import bare_model

FOLDER = Path(__file__).parent / "demo_model"


@dataclass(frozen=True, slots=True)
class Measured:
    """One quantization. `same` is the share of tokens where the likeliest is that of float32."""

    quantization: str
    perplexity: float
    same: float
    tokens: int


def measure(cases: int | None = None) -> list[Measured]:
    """All quantizations over so many held-out questions, or all; float32 (`none`) first."""
    corpus = corpora.load(FOLDER)
    examples = _examples((corpora.held_out_frames(corpus) + corpora.held_out_sentences(corpus))[:cases])
    reference: list[torch.Tensor] = []
    found = []
    for quantization in QUANTIZATIONS:
        dtype = "float32" if quantization == "none" else "auto"
        model = bare_model(Settings(model="demo", quantization=quantization, dtype=dtype))
        losses, likeliest = _run(model, examples)
        reference = reference or likeliest
        tokens = sum(len(loss) for loss in losses)
        same = sum(int((a == b).sum()) for a, b in zip(likeliest, reference, strict=True)) / tokens
        mean = sum(float(loss.sum()) for loss in losses) / tokens
        found.append(Measured(quantization, math.exp(mean), same, tokens))
    return found


def _examples(cases: Sequence[Case]) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each case, as tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER)
    examples = []
    for case in cases:
        prompt = tokenizer.apply_chat_template(list(case.messages), add_generation_prompt=True, tokenize=False)
        answer = tokenizer(case.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        examples.append((tokenizer(prompt, add_special_tokens=False)["input_ids"], answer))
    return examples


@torch.inference_mode()
def _run(model: Any, examples: Sequence[tuple[list[int], list[int]]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For each example, the loss at each token of its answer, and the token that the model holds for likeliest."""
    losses, likeliest = [], []
    for prompt, answer in examples:
        ids = torch.tensor([prompt + answer], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="none").double())
        likeliest.append(logits.argmax(dim=-1))
    return losses, likeliest


def table(found: Sequence[Measured]) -> str:
    """In Markdown."""
    rows = ["| quantization | perplexity | against fp32 | same likeliest token |", "|---|---|---|---|"]
    base = found[0].perplexity
    rows += [
        f"| `{one.quantization}` | {one.perplexity:.4f} | {one.perplexity / base - 1:+.2%} | {one.same:.2%} |"
        for one in found
    ]
    return "\n".join(rows)
