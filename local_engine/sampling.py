"""Owns how logits become tokens; refuses to draw random numbers (each comes in, drawn by its request)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from local_engine.sequence import Pick

SMALLEST_TEMPERATURE = 1e-30
"""What is below is 0 in float32, or nearly: as good as greedy, but 0 / 0 is no number."""


def choose(logits: Tensor, picks: Sequence[Pick]) -> list[int | None]:
    """One token a row of `logits` [rows, vocabulary]; None for a row whose logits are not finite.

    A row's token depends on that row alone: temperature 0 takes the largest logit, else the draw is looked up in the
    cumulated probabilities (inverse transform sampling), after temperature, then top-k, then top-p, in this order, as
    transformers' generate applies them.
    """
    largest, tokens = logits.max(dim=-1)
    sampled = [row for row, pick in enumerate(picks) if pick.params.temperature > 0]
    cut = [row for row in sampled if picks[row].params.top_k > 0 or picks[row].params.top_p < 1]
    # A row is cut or not by its own parameters only: the draw means something else in sorted order.
    for rows, look_up in (([row for row in sampled if row not in cut], _from_all), (cut, _from_cut)):
        if rows:
            index = torch.tensor(rows, device=logits.device)
            tokens[index] = look_up(logits[index], largest[index], [picks[row] for row in rows])
    # max propagates NaN, so one number a row tells whether it is usable.
    return [token if ok else None for token, ok in zip(tokens.tolist(), largest.isfinite().tolist(), strict=True)]


def _scaled(logits: Tensor, largest: Tensor, picks: Sequence[Pick]) -> Tensor:
    """Logits over temperature, in float32; the largest is made 0 first, so that a tiny temperature cannot overflow."""
    temperatures = [[max(pick.params.temperature, SMALLEST_TEMPERATURE)] for pick in picks]
    temperature = torch.tensor(temperatures, device=logits.device)
    return (logits.float() - largest.float()[:, None]) / temperature


def _from_all(logits: Tensor, largest: Tensor, picks: Sequence[Pick]) -> Tensor:
    return _inverse(_scaled(logits, largest, picks).softmax(dim=-1), picks)


def _from_cut(logits: Tensor, largest: Tensor, picks: Sequence[Pick]) -> Tensor:
    ordered, tokens = _scaled(logits, largest, picks).sort(dim=-1, descending=True, stable=True)
    size = ordered.shape[-1]
    keep = torch.tensor([[pick.params.top_k or size] for pick in picks], device=logits.device)
    ordered = ordered.masked_fill(torch.arange(size, device=logits.device) >= keep, float("-inf"))
    probabilities = ordered.softmax(dim=-1)
    mass = torch.tensor([[pick.params.top_p] for pick in picks], device=logits.device)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The token that crosses top_p stays, so at least one does.
    probabilities = probabilities.masked_fill((before >= mass) & (before > 0), 0.0)
    return tokens.gather(-1, _inverse(probabilities, picks)[:, None])[:, 0]


def _inverse(probabilities: Tensor, picks: Sequence[Pick]) -> Tensor:
    """Index of the first cumulated weight above draw × total; a token of weight 0 is never it."""
    cumulated = probabilities.cumsum(dim=-1)
    total = cumulated[:, -1:].contiguous()
    draws = torch.tensor([[pick.draw] for pick in picks], dtype=total.dtype, device=total.device)
    # draw × total may round up to total, which no weight is above.
    wanted = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    # A row that is not finite finds no index; its token is thrown away, but must not break the gather.
    return torch.searchsorted(cumulated, wanted, right=True)[:, 0].clamp(max=cumulated.shape[-1] - 1)
