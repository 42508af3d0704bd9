"""The sampler, whose operations are on many rows at once, against one that takes row after row."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from local_engine.sampling import choose, likelihoods, unpacked
from local_engine.sequence import Pick, SamplingParams
from tests.local_engine import plain_sampling

VOCABULARY = 37

tokens = st.integers(0, VOCABULARY - 1)
penalties = st.sampled_from([0.0, 0.0, -1.7, 0.3, 2.0])


@st.composite
def picks(draw: st.DrawFn) -> Pick:
    """Any combination of what a request may ask for."""
    params = SamplingParams(
        max_tokens=1,
        temperature=draw(st.sampled_from([0.0, 0.0, 1e-40, 0.3, 1.0, 1.0, 7.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 5, 99])),
        top_p=draw(st.sampled_from([1.0, 1.0, 1e-9, 0.3, 0.95])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.6, 1.3])),
        presence_penalty=draw(penalties),
        frequency_penalty=draw(penalties),
        logit_bias=tuple(draw(st.dictionaries(tokens, st.sampled_from([-100.0, -0.7, 3.0]), max_size=4)).items()),
        logprobs=draw(st.sampled_from([None, 0, 3])),
    )
    before = draw(st.lists(tokens, min_size=1, max_size=12))
    allowed = None if draw(st.booleans()) else draw(st.binary(min_size=4, max_size=7))
    return Pick(
        params,
        draw(st.sampled_from([0.0, 0.1, 0.5, 0.77, 1 - 1e-12])),
        tokens=before,
        prompt_length=draw(st.integers(0, len(before))),
        banned=draw(st.frozensets(tokens, max_size=3)),
        allowed=allowed,
    )


@given(
    rows=st.lists(picks(), min_size=1, max_size=6),
    seed=st.integers(0, 9),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
@settings(deadline=None, max_examples=60)
def test_many_rows_at_once_give_the_tokens_of_one_after_the_other(rows: list[Pick], seed: int, dtype: str) -> None:
    made = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(len(rows), VOCABULARY, generator=made)).to(getattr(torch, dtype))
    if seed == 0:
        logits[0, 5] = float("nan")
    together = choose(logits, rows)
    assert together == plain_sampling.choose(logits, rows)
    assert together == [choose(logits[row : row + 1], [rows[row]])[0] for row in range(len(rows))]


@given(seed=st.integers(0, 99), tops=st.lists(st.integers(0, 6), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_likelihoods_in_one_transfer_are_those_of_many(seed: int, tops: list[int]) -> None:
    made = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(tops), VOCABULARY, generator=made)
    chosen = [random.Random(seed).randrange(VOCABULARY) for _ in tops]
    assert likelihoods(logits, chosen, tops) == plain_sampling.likelihoods(logits, chosen, tops)


@pytest.mark.parametrize(
    "pick",
    [
        Pick(SamplingParams(max_tokens=1, logit_bias=((VOCABULARY, 1.0),)), 0.5),
        Pick(SamplingParams(max_tokens=1), 0.5, banned=frozenset({-1})),
        Pick(SamplingParams(max_tokens=1, repetition_penalty=2.0), 0.5, tokens=[3, VOCABULARY]),
    ],
    ids=["bias", "ban", "penalty"],
)
def test_a_token_beyond_the_vocabulary_is_refused_before_it_reaches_the_device(pick: Pick) -> None:
    """There it would end the process, or change another row."""
    with pytest.raises(IndexError):
        choose(torch.zeros(2, VOCABULARY), [Pick(SamplingParams(max_tokens=1), 0.5), pick])


@given(st.binary(min_size=1, max_size=9))
@settings(deadline=None, max_examples=30)
def test_bits_are_unpacked_on_a_device_as_on_the_host(mask: bytes) -> None:
    expected = [bool(byte >> bit & 1) for byte in mask for bit in range(8)]
    assert unpacked(torch.tensor([list(mask)], dtype=torch.uint8)).tolist() == [expected]
