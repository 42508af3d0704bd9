"""The small model that guesses: the same tokens as transformers' generate, whatever it held before."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from local_engine.config import Settings
from local_engine.draft import AT_ONCE, FIRST_CAPACITY, Decoder, DraftModel, compare, load_draft
from local_engine.errors import LoadError
from local_engine.loading import load
from local_engine.source import DEMO, DEMO_DRAFT, model_source
from local_engine.speculation import Ask
from tests.tiny_models import VOCABULARY

KINDS = ("llama", "mistral", "qwen2", "qwen3")


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def generated(model: Any, tokens: list[int], size: int) -> tuple[int, ...]:
    ids = torch.tensor([tokens])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=size, do_sample=False, eos_token_id=None
    )
    return tuple(made[0, len(tokens) :].tolist())


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, write_model: Any) -> Any:
    return loaded(write_model(request.param, window=2 * FIRST_CAPACITY))


def test_it_guesses_what_generate_would_say_while_sequences_come_go_and_turn_out_otherwise(model: Any) -> None:
    """More sequences than rows in turns, guesses right and wrong, pauses, prompts longer than a row was at first."""
    draft, chance = DraftModel(Decoder(model, 3), 3), random.Random(8)
    lengths = (1, 5, FIRST_CAPACITY + 9, 40)
    sequences = {str(n): [chance.randrange(4, VOCABULARY) for _ in range(length)] for n, length in enumerate(lengths)}
    for _ in range(12):
        asked = chance.sample(sorted(sequences), chance.randint(1, 3))
        asks = [Ask(id, sequences[id], chance.randint(1, 5)) for id in asked]
        for ask, guesses in zip(asks, draft.guess(asks), strict=True):
            assert guesses == generated(model, sequences[ask.id], ask.size)
            own = [chance.randrange(4, VOCABULARY) for _ in range(chance.choice((1, 1, 2, AT_ONCE + 2)))]
            sequences[ask.id] += [*guesses[: chance.randint(0, ask.size)], *own]


def test_beyond_its_window_it_guesses_nothing(model: Any) -> None:
    draft = DraftModel(Decoder(model, 2), 2)
    long, short = [5] * (2 * FIRST_CAPACITY - 3), [6] * 4
    assert [len(guesses) for guesses in draft.guess([Ask("a", long, 4), Ask("b", short, 4)])] == [0, 4]
    assert [len(guesses) for guesses in draft.guess([Ask("a", long, 3)])] == [3]
    assert draft.guess([Ask("a", long, 4)]) == [()]


def test_a_difference_from_the_models_own_logits_is_seen(write_model: Any) -> None:
    model = loaded(write_model("llama"))
    decoder = Decoder(model, 1)
    assert compare(model, decoder) < 1e-5
    with torch.no_grad():
        model.model.norm.weight[:9] *= 1.5
        model.model.layers[0].self_attn.o_proj.weight *= 1.01
    assert compare(model, Decoder(model, 1)) < 1e-5
    model.model.layers[0].mlp.gate_proj.weight.data *= 1.1  # which the decoder has copied
    assert compare(model, decoder) > 1e-3


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("phi3", {}, "one of llama"),
        ("mistral", {"sliding_window": 24}, "sliding"),
        ("llama", {"vocab_size": 99}, "tokens"),
    ],
)
def test_what_cannot_guess_is_refused_with_the_reason(
    write_model: Any, kind: str, changes: dict[str, Any], why: str
) -> None:
    directory = write_model(kind, **changes)
    vocabulary = AutoTokenizer.from_pretrained(directory).get_vocab()
    with pytest.raises(LoadError, match=why):
        load_draft("it", str(directory), device=torch.device("cpu"), dtype=torch.float32, vocabulary=vocabulary, rows=2)


def test_one_with_another_tokenizer_is_refused(llama: Path) -> None:
    with pytest.raises(LoadError, match="other tokens"):
        load(Settings(model=DEMO, speculation="draft", draft_model=str(llama)))


def test_the_bundled_draft_loads_with_the_bundled_model_and_is_small() -> None:
    assert load(Settings(model=DEMO, speculation="draft")).speculation is not None
    assert (Path(model_source(DEMO_DRAFT)) / "model.safetensors").stat().st_size < 600_000
