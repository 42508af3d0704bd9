"""How often the demo model gives exactly the right answer, on trained questions and on ones it never saw.

Owns loading the committed files, greedy answers in batches, and the table that
`python -m local_engine.demo_model.evaluate` prints. Refuses to change the model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from local_engine.demo_model import corpus as corpora
from local_engine.demo_model import drawing
from local_engine.demo_model.corpus import Case, Corpus

FOLDER = Path(__file__).parent
SEED = 20261101
BATCH = 64  # conversations answered at once
USUAL = "You are a helpful assistant."  # what most clients send
LONGEST_ANSWER = 72  # tokens; the longest trained answer is shorter


class Answerer:
    """The saved model in fp32 and its tokenizer. Answers are greedy, so they depend on the files alone."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answers(self, cases: Sequence[Case]) -> list[str]:
        """One answer a case, in order."""
        prompts = [
            self.tokenizer.apply_chat_template(list(case.messages), add_generation_prompt=True, tokenize=False)
            for case in cases
        ]
        by_length = sorted(range(len(cases)), key=lambda i: len(prompts[i]))
        found = [""] * len(cases)
        for start in range(0, len(cases), BATCH):
            places = by_length[start : start + BATCH]
            batch = self.tokenizer(
                [prompts[i] for i in places],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
                return_token_type_ids=False,
            )
            out = self.model.generate(**batch, do_sample=False, max_new_tokens=LONGEST_ANSWER)
            texts = self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for place, text in zip(places, texts, strict=True):
                found[place] = text
        return found

    def exact(self, cases: Sequence[Case]) -> float:
        """The share of cases answered word for word."""
        answers = self.answers(cases)
        return sum(answer == case.answer for answer, case in zip(answers, cases, strict=True)) / len(cases)


def suites(corpus: Corpus, trained: int | None = 600) -> dict[str, list[Case]]:
    """What is measured, by name: a fixed draw of `trained` trained questions (None: all) and everything held out."""
    rng = random.Random(SEED)
    seen = corpora.trained_cases(corpus)
    blind = corpus.blind.documented + corpus.blind.unseen
    frames, sentences = corpora.held_out_frames(corpus), corpora.held_out_sentences(corpus)
    return {
        "trained questions": seen if trained is None else rng.sample(seen, trained),
        "held-out paraphrases": frames + sentences,
        "of these, known words in an unseen frame": frames,
        "of these, questions worded like no trained one": sentences,
        "unseen frames in lower case, without a final mark": drawing.casual_cases(frames),
        "unseen frames after a system prompt and another turn": drawing.in_conversation(corpus, frames, rng),
        "blind questions": list(blind),
        "of these, worded like no trained question": list(corpus.blind.unseen),
        "blind questions after You are a helpful assistant.": [drawing.after_system(USUAL, case) for case in blind],
        "blind off-topic questions, politely declined": list(corpus.blind.off_topic),
        "off-topic questions, politely declined": corpora.off_topic_cases(corpus),
        "private-looking data in unseen sentences": drawing.private_cases(corpus, rng, 50),
    }


def measure(answerer: Answerer, measured: dict[str, list[Case]]) -> dict[str, dict[str, float | int]]:
    """Exact match of each suite, as a share, with the number of questions."""
    return {
        name: {"questions": len(cases), "exact_match": round(answerer.exact(cases), 4)}
        for name, cases in measured.items()
    }


def table(metrics: dict[str, dict[str, float | int]]) -> str:
    """The metrics as a Markdown table."""
    lines = ["| measured on | questions | exact match |", "|---|---|---|"]
    lines += [f"| {name} | {row['questions']} | {100 * row['exact_match']:.1f} % |" for name, row in metrics.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure the committed files and print the table."""
    torch.set_num_threads(1)
    answerer, corpus = Answerer(FOLDER), corpora.load(FOLDER)
    metrics = measure(answerer, suites(corpus))
    print(table(metrics))


if __name__ == "__main__":
    main()
