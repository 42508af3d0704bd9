"""Trains the demo model on its corpus and writes the files that engines load.

`python -m local_engine.demo_model.train` runs on one thread. Owns the architecture and the schedule.
Refuses to report what it did not write: the table at the end measures the saved files. The same seed and steps on the
same machine give the same weights; `--minutes` sets the schedule by the clock instead.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from local_engine.demo_model import corpus as corpora
from local_engine.demo_model.corpus import Corpus
from local_engine.demo_model.drawing import draw_case
from local_engine.demo_model.evaluate import FOLDER, SEED, Answerer, measure, suites, table
from local_engine.demo_model.tokenizer import WINDOW, train_tokenizer

IGNORED = -100  # cross_entropy's mark for positions without a loss
POOL = 2048  # examples drawn, sorted by length and cut into batches at a time
BATCH_TOKENS = 1024  # padded tokens in one batch
PEAK_RATE = 2.5e-3
RESUMED_RATE = 1e-3
WHOLE_ANSWERS = 0.2  # share of examples with a loss on the whole answer
BEYOND = 2  # the others keep an answer's tokens up to the one that tells it from all others, and so many more

Example = tuple[list[int], int]  # tokens, and where the answer begins


def config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Two million parameters; widths are multiples of 64, which block-wise quantization wants."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.04,
    )


def tokenizer_texts(corpus: Corpus, rng: random.Random) -> Iterator[str]:
    """What the vocabulary is learned from: answers often, questions as training draws them."""
    for topic in corpus.topics:
        yield from [topic.answer] * 40
    for _ in range(20_000):
        yield draw_case(corpus, rng).messages[-1]["content"]


def openings(answers: Iterable[Sequence[int]]) -> dict[tuple[int, ...], int]:
    """For each tokenized answer how many of its tokens training needs to see to learn which answer it is."""
    known = {tuple(answer) for answer in answers}
    shared = Counter(answer[:length] for answer in known for length in range(1, len(answer) + 1))
    return {
        answer: BEYOND + next((n for n in range(1, len(answer)) if shared[answer[:n]] == 1), len(answer))
        for answer in known
    }


def examples(
    corpus: Corpus, tokenizer: Any, rng: random.Random, whole_answers: float = WHOLE_ANSWERS
) -> Iterator[Example]:
    """Training examples without end, that share of them with the whole answer."""
    answers = [topic.answer for topic in corpus.topics] + [corpus.private_answer, corpus.off_topic.answer]
    opening = openings(tokenizer(answers, add_special_tokens=False)["input_ids"])
    while True:
        cases = [draw_case(corpus, rng) for _ in range(512)]
        prompts = [
            tokenizer.apply_chat_template(list(case.messages), add_generation_prompt=True, tokenize=False)
            for case in cases
        ]
        asked = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        answered = tokenizer([case.answer for case in cases], add_special_tokens=False)["input_ids"]
        for prompt, answer in zip(asked, answered, strict=True):
            whole = [*answer, tokenizer.eos_token_id]
            kept = whole if rng.random() < whole_answers else whole[: opening[tuple(answer)]]
            yield prompt + kept, len(prompt)


def batches(source: Iterator[Example], pad: int, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Padded (tokens, targets), both [rows, length], of neighbours in length."""
    while True:
        pool = sorted((next(source) for _ in range(POOL)), key=lambda example: len(example[0]))
        cut: list[list[Example]] = [[]]
        for example in pool:
            if (len(cut[-1]) + 1) * len(example[0]) > BATCH_TOKENS and cut[-1]:
                cut.append([])
            cut[-1].append(example)
        rng.shuffle(cut)
        for rows in cut:
            length = len(rows[-1][0])
            tokens = torch.full((len(rows), length), pad)
            targets = torch.full((len(rows), length), IGNORED)
            for row, (ids, begin) in enumerate(rows):
                tokens[row, : len(ids)] = torch.tensor(ids)
                targets[row, begin - 1 : len(ids) - 1] = torch.tensor(ids[begin:])
            yield tokens, targets


def rate(progress: float) -> float:
    """Warm up over 2 %, hold, then fall linearly to 2 % over the last half; `progress` runs from 0 to 1."""
    if progress < 0.02:
        return max(progress / 0.02, 0.01)
    return 1.0 if progress < 0.5 else max(0.02, (1.0 - progress) / 0.5)


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over answer tokens. Padding stands to the right, so causal attention alone hides it."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    answered = targets != IGNORED
    return functional.cross_entropy(model.lm_head(hidden[answered]), targets[answered])


def train(
    model: LlamaForCausalLM,
    source: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    minutes: float,
    peak: float,
) -> None:
    """Run the schedule up to `peak` and to its end, by steps or, where `minutes` is above 0, by the clock."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.03, fused=True)
    started, seen, step, progress, mean = time.monotonic(), 0, 0, 0.0, 0.0
    while progress < 1.0:
        tokens, targets = next(source)
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(progress)
        loss = loss_of(model, tokens, targets)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + tokens.numel()
        elapsed = time.monotonic() - started
        progress = elapsed / (60 * minutes) if minutes else step / steps
        mean = loss.item() if step == 1 else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {mean:.4f}  {elapsed:5.0f} s  {seen / elapsed:,.0f} tokens/s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights in fp16, configuration, tokenizer and chat template in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # the writer makes it private; whoever serves it may be another user
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Train, save, load what was saved, measure it and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2900, help="length of the schedule")
    parser.add_argument("--minutes", type=float, default=0.0, help="length of the schedule by the clock instead")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the model's files go")
    parser.add_argument("--resume", type=Path, help="go on from these files, at a lower rate")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    corpus, rng = corpora.load(FOLDER), random.Random(SEED)
    if options.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.resume)
        model, peak = LlamaForCausalLM.from_pretrained(options.resume, dtype=torch.float32), RESUMED_RATE
        rng.seed(SEED + 1)  # other questions than the first run drew
    else:
        tokenizer = train_tokenizer(tokenizer_texts(corpus, rng))
        model, peak = LlamaForCausalLM(config(tokenizer)), PEAK_RATE
    print(f"{len(corpus.topics)} topics, {len(tokenizer)} tokens, {model.num_parameters():,} parameters", flush=True)
    longest = max(len(tokenizer(topic.answer)["input_ids"]) for topic in corpus.topics)
    print(f"longest answer: {longest} tokens", flush=True)
    wall, busy = time.monotonic(), time.process_time()
    train(
        model,
        batches(examples(corpus, tokenizer, rng), tokenizer.pad_token_id, rng),
        options.steps,
        options.minutes,
        peak,
    )
    print(f"trained in {time.monotonic() - wall:.0f} s, of CPU time {time.process_time() - busy:.0f} s", flush=True)
    save(model, tokenizer, options.out)
    metrics = measure(Answerer(options.out), suites(corpus))
    print(table(metrics))
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
