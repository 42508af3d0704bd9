"""Trains the demo model's draft, which guesses the demo model's next tokens for speculative decoding.

`python -m local_engine.demo_model.distil` runs on one thread. Owns the draft's architecture and its loss: the
distance to the demo model's own distribution over whole answers, on the corpus that the demo model was trained on.
Refuses a tokenizer of its own: a draft speaks the tokens of its model.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from local_engine.demo_model import corpus as corpora
from local_engine.demo_model.evaluate import FOLDER, SEED
from local_engine.demo_model.train import IGNORED, batches, examples, rate

DRAFT_FOLDER = FOLDER / "draft"
PEAK_RATE = 6e-3


def config(model: LlamaConfig) -> LlamaConfig:
    """One narrow layer, a tenth of the model's parameters, most of them the embedding of the shared vocabulary."""
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=model.max_position_embeddings,
        tie_word_embeddings=True,
        pad_token_id=model.pad_token_id,
        bos_token_id=None,
        eos_token_id=model.eos_token_id,
        initializer_range=0.06,
    )


def distil(
    draft: LlamaForCausalLM,
    model: LlamaForCausalLM,
    source: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
) -> None:
    """Make `draft` say what `model` says on the answers' tokens."""
    optimizer = torch.optim.AdamW(draft.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    started, mean, agreed = time.monotonic(), 0.0, 0.0
    for step in range(1, steps + 1):
        tokens, targets = next(source)
        answered = targets != IGNORED
        with torch.inference_mode():
            wanted = model.lm_head(model.model(input_ids=tokens, use_cache=False).last_hidden_state[answered])
        wanted = wanted.clone()  # an inference tensor cannot be saved for the backward pass
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate(step / steps)
        made = draft.lm_head(draft.model(input_ids=tokens, use_cache=False).last_hidden_state[answered])
        loss = functional.kl_div(made.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        same = (made.argmax(-1) == wanted.argmax(-1)).float().mean().item()
        mean = loss.item() if step == 1 else 0.98 * mean + 0.02 * loss.item()
        agreed = same if step == 1 else 0.98 * agreed + 0.02 * same
        if step % 100 == 0:
            print(f"step {step:5d}  loss {mean:.4f}  same token {agreed:.3f}  {time.monotonic() - started:5.0f} s")


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="length of the schedule")
    parser.add_argument("--out", type=Path, default=DRAFT_FOLDER, help="where the draft's files go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    corpus, rng = corpora.load(FOLDER), random.Random(SEED)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    draft = LlamaForCausalLM(config(model.config))
    print(f"{draft.num_parameters():,} parameters for a model of {model.num_parameters():,}", flush=True)
    busy = time.process_time()
    source = batches(examples(corpus, tokenizer, rng, whole_answers=1.0), tokenizer.pad_token_id, rng)
    distil(draft, model, source, options.steps)
    print(f"trained in {time.process_time() - busy:.0f} s of CPU time")
    draft.half().save_pretrained(options.out)
    (options.out / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
