"""How logits become tokens."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from local_engine.sampling import _adjusted, choose, likelihoods
from local_engine.sequence import Pick, SamplingParams


def pick(draw: float = 0.0, **changes: float) -> Pick:
    return Pick(SamplingParams(max_tokens=1, **changes), draw)  # type: ignore[arg-type]


def logits(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def test_temperature_zero_takes_the_largest() -> None:
    assert choose(logits(0.2, 0.5, 0.3), [pick(0.99, temperature=0)]) == [1]


@pytest.mark.parametrize(("draw", "token"), [(0.0, 0), (0.19, 0), (0.21, 1), (0.69, 1), (0.71, 2), (1 - 1e-12, 2)])
def test_the_draw_is_looked_up_in_the_cumulated_probabilities(draw: float, token: int) -> None:
    assert choose(logits(0.2, 0.5, 0.3), [pick(draw)]) == [token]


@pytest.mark.parametrize(
    ("changes", "possible"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {1}),
        ({"top_p": 0.51}, {1, 2}),
        ({"top_p": 1e-9}, {1}),
        ({"top_k": 3, "top_p": 0.6}, {1, 2}),  # 0.5 of 0.95 is below 0.6, so the next one stays
        ({"top_k": 2, "top_p": 0.6}, {1}),  # 0.5 of 0.8 is not
        ({"min_p": 0.5}, {1, 2}),
        ({"min_p": 1.0}, {1}),
        ({"min_p": 0.5, "top_k": 1}, {1}),
        ({"temperature": 0.01}, {1}),
        ({"temperature": 1e-30}, {1}),
        ({"temperature": 5e-324}, {1}),  # is 0 in float32
        ({"temperature": 2.0}, {0, 1, 2, 3}),
    ],
)
def test_only_tokens_that_the_parameters_leave_are_chosen(changes: dict[str, float], possible: set[int]) -> None:
    draws = [index / 500 for index in range(500)] + [1 - 1e-12]
    rows = logits(0.15, 0.5, 0.3, 0.05).expand(len(draws), -1)
    assert set(choose(rows, [pick(draw, **changes) for draw in draws])) == possible


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0.15, 0.5, 0.3, 0.05)),
        ({"top_k": 2}, (0, 0.625, 0.375, 0)),
        ({"temperature": 0.5}, (0.062, 0.685, 0.247, 0.007)),
    ],
)
def test_tokens_come_as_often_as_their_probability_says(changes: dict[str, float], expected: tuple[float, ...]) -> None:
    """Evenly spread draws, so the frequencies are exact and no chance is involved."""
    count = 4000
    rows = logits(0.15, 0.5, 0.3, 0.05).expand(count, -1)
    found = Counter(choose(rows, [pick((index + 0.5) / count, **changes) for index in range(count)]))
    assert [found[token] / count for token in range(4)] == pytest.approx(expected, abs=0.002)


def test_a_row_is_chosen_alike_whatever_stands_beside_it() -> None:
    generator, chance = torch.Generator().manual_seed(3), random.Random(3)
    rows = torch.randn(40, 50, generator=generator)
    kinds: list[dict[str, float]] = [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.3}]
    picks = [pick(chance.random(), **kinds[row % 4]) for row in range(40)]
    together = choose(rows, picks)
    assert together == [choose(rows[row : row + 1], [picks[row]])[0] for row in range(40)]
    assert len(set(together)) > 10


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("changes", [{"temperature": 0}, {"temperature": 1}, {"top_k": 1}])
def test_a_row_that_is_not_finite_gives_none_and_harms_no_other(bad: float, changes: dict[str, float]) -> None:
    rows = torch.tensor([[0.0, 5.0, 1.0], [0.0, bad, 1.0], [9.0, 0.0, 0.0]])
    chosen = choose(rows, [pick(0.5, **changes)] * 3)
    assert chosen == [1, None, 0]


@pytest.mark.parametrize(
    ("changes", "more", "expected"),
    [
        ({"repetition_penalty": 2.0}, {"tokens": [1, 3], "prompt_length": 1}, [1.0, 1.0, -1.0, -4.0]),
        ({"presence_penalty": 0.5}, {"tokens": [0, 1, 1], "prompt_length": 1}, [1.0, 1.5, -1.0, -2.0]),
        ({"frequency_penalty": 0.5}, {"tokens": [0, 1, 1], "prompt_length": 1}, [1.0, 1.0, -1.0, -2.0]),
        ({"frequency_penalty": -0.5}, {"tokens": [3], "prompt_length": 0}, [1.0, 2.0, -1.0, -1.5]),
        ({"logit_bias": ((2, 5.0), (0, -1.0))}, {}, [0.0, 2.0, 4.0, -2.0]),
        ({}, {"banned": frozenset({1})}, [1.0, float("-inf"), -1.0, -2.0]),
        ({}, {"allowed": b"\x05"}, [1.0, float("-inf"), -1.0, float("-inf")]),
    ],
)
def test_penalties_biases_bans_and_grammars_change_one_row_alone(
    changes: dict[str, object], more: dict[str, object], expected: list[float]
) -> None:
    row = [1.0, 2.0, -1.0, -2.0]
    given = torch.tensor([row, row])
    one = Pick(SamplingParams(max_tokens=1, **changes), 0.0, **more)  # type: ignore[arg-type]
    assert _adjusted(given, [pick(), one]).tolist() == [row, expected]
    assert given.tolist() == [row, row]


def test_a_grammar_that_leaves_nothing_gives_no_token() -> None:
    blocked = Pick(SamplingParams(max_tokens=1), 0.5, allowed=b"\x00")
    assert choose(logits(0.2, 0.5, 0.3), [blocked]) == [None]


def test_likelihoods_are_the_logarithms_of_the_models_own_probabilities() -> None:
    (found,) = likelihoods(logits(0.2, 0.5, 0.3), [2], [2])
    assert found.token == 2
    assert math.exp(found.logprob) == pytest.approx(0.3)
    assert [(token, round(math.exp(log), 6)) for token, log in found.top] == [(1, 0.5), (2, 0.3)]
