"""How logits become tokens, one row after the other where rows differ: slow, and easy to see through. The sampler is
held against it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from local_engine.sequence import Likelihood, Pick

SMALLEST_TEMPERATURE = 1e-30
"""What is below is 0 in float32, or nearly: as good as greedy, but 0 / 0 is no number."""


def choose(logits: Tensor, picks: Sequence[Pick]) -> list[int | None]:
    """One token a row of `logits` [rows, vocabulary]; None for a row whose logits are not finite.

    A row's token depends on that row alone: temperature 0 takes the largest logit, else the draw is looked up in the
    cumulated probabilities (inverse transform sampling), after penalties and biases, temperature, top-k, top-p and
    min-p, in this order, as transformers' generate applies them.
    """
    logits = _adjusted(logits, picks)
    largest, tokens = logits.max(dim=-1)
    sampled = [row for row, pick in enumerate(picks) if pick.params.temperature > 0]
    cut = [row for row in sampled if _cuts(picks[row])]
    # A row is cut or not by its own parameters only: the draw means something else in sorted order.
    for rows, look_up in (([row for row in sampled if row not in cut], _from_all), (cut, _from_cut)):
        if rows:
            index = torch.tensor(rows, device=logits.device)
            tokens[index] = look_up(logits[index], largest[index], [picks[row] for row in rows])
    # max propagates NaN, so one number a row tells whether it is usable.
    return [token if ok else None for token, ok in zip(tokens.tolist(), largest.isfinite().tolist(), strict=True)]


def likelihoods(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[Likelihood]:
    """For each row of `logits` [rows, vocabulary]: how likely its token was, and the so many likeliest ones."""
    logs = logits.float().log_softmax(dim=-1)
    index = torch.tensor(tokens, device=logits.device)[:, None]
    chosen = logs.gather(-1, index)[:, 0].tolist()
    if not (most := min(max(tops), logs.shape[-1])):
        return [Likelihood(token, log) for token, log in zip(tokens, chosen, strict=True)]
    values, ids = (found.tolist() for found in logs.topk(most, dim=-1))
    return [
        Likelihood(token, log, tuple(zip(ids[row][:top], values[row][:top], strict=True)))
        for row, (token, log, top) in enumerate(zip(tokens, chosen, tops, strict=True))
    ]


def _cuts(pick: Pick) -> bool:
    params = pick.params
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _adjusted(logits: Tensor, picks: Sequence[Pick]) -> Tensor:
    """The logits with penalties, biases, bans and grammars applied to the rows that have any."""
    rows = [row for row, pick in enumerate(picks) if pick.params.adjusts or pick.banned or pick.allowed is not None]
    if not rows:
        return logits
    adjusted = logits.float()
    if adjusted is logits:
        adjusted = logits.clone()
    for row in rows:
        _adjust(adjusted[row], picks[row])
    return adjusted


def _adjust(scores: Tensor, pick: Pick) -> None:
    """Change one row [vocabulary] in place."""
    params, device = pick.params, scores.device
    if params.repetition_penalty != 1:  # Keskar et al., "CTRL", 2019, as transformers and vLLM apply it
        seen = torch.tensor(sorted(set(pick.tokens)), device=device)
        found = scores[seen]
        scores[seen] = torch.where(found > 0, found / params.repetition_penalty, found * params.repetition_penalty)
    answer = pick.tokens[pick.prompt_length :]
    if answer and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(answer)
        lowered = [params.frequency_penalty * count + params.presence_penalty for count in counts.values()]
        scores[list(counts)] -= torch.tensor(lowered, device=device)
    if params.logit_bias:
        tokens, biases = zip(*params.logit_bias, strict=True)
        scores[list(tokens)] += torch.tensor(biases, device=device)
    if pick.banned:
        scores[sorted(pick.banned)] = float("-inf")
    if pick.allowed is not None:
        bits = np.unpackbits(np.frombuffer(pick.allowed, np.uint8), bitorder="little")
        allowed = torch.zeros(len(scores), dtype=torch.bool)
        size = min(len(bits), len(scores))
        allowed[:size] = torch.from_numpy(bits[:size].astype(bool))
        scores.masked_fill_(~allowed.to(device), float("-inf"))


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
    least = torch.tensor([[pick.params.min_p] for pick in picks], device=logits.device) * probabilities[:, :1]
    probabilities = probabilities.masked_fill(probabilities < least, 0.0)
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
