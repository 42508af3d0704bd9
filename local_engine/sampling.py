"""Owns how logits become tokens; refuses to draw random numbers (each comes in, drawn by its request).

All of it is operations on the device of the logits, many rows at once. What goes there is uploaded without waiting, and
the host waits once, for the chosen tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from local_engine.sequence import Likelihood, Pick
from local_engine.uploads import uploaded, uploaded_array

SMALLEST_TEMPERATURE = 1e-30
"""What is below is 0 in float32, or nearly: as good as greedy, but 0 / 0 is no number."""

BITS = 8

Places = np.ndarray[Any, np.dtype[np.int64]]
Values = np.ndarray[Any, np.dtype[np.float32]]


def choose(logits: Tensor, picks: Sequence[Pick]) -> list[int | None]:
    """One token a row of `logits` [rows, vocabulary]; None for a row whose logits are not finite.

    A row's token depends on that row alone: temperature 0 takes the largest logit, else the draw is looked up in the
    cumulated probabilities (inverse transform sampling), after penalties and biases, temperature, top-k, top-p and
    min-p, in this order, as transformers' generate applies them. Raises IndexError for a token beyond the vocabulary.
    """
    logits = _adjusted(logits, picks)
    largest, tokens = logits.max(dim=-1)
    sampled = [row for row, pick in enumerate(picks) if pick.params.temperature > 0]
    cut = [row for row in sampled if _cuts(picks[row])]
    # A row is cut or not by its own parameters only: the draw means something else in sorted order.
    for rows, look_up in (([row for row in sampled if row not in cut], _from_all), (cut, _from_cut)):
        if rows:
            index = uploaded(rows, torch.long, logits.device)
            knobs = _Knobs.of([picks[row] for row in rows], logits.device)
            tokens[index] = look_up(logits[index], largest[index], knobs)
    # max propagates NaN, so one number a row tells whether it is usable; and one transfer brings both.
    told = torch.where(largest.isfinite(), tokens, -1)
    return [None if token < 0 else token for token in told.tolist()]


def likelihoods(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[Likelihood]:
    """For each row of `logits` [rows, vocabulary]: how likely its token was, and the so many likeliest ones."""
    logs = logits.float().log_softmax(dim=-1)
    index = uploaded(tokens, torch.long, logits.device)[:, None]
    most = min(max(tops), logs.shape[-1])
    values, ids = logs.topk(most, dim=-1)
    # In float64 a token's number and a float32 are exact, so that one transfer brings them all.
    told = torch.cat((logs.gather(-1, index).double(), values.double(), ids.double()), dim=-1).tolist()
    return [
        Likelihood(token, row[0], tuple(zip(map(int, row[1 + most :][:top]), row[1:][:top], strict=True)))
        for token, row, top in zip(tokens, told, tops, strict=True)
    ]


def _cuts(pick: Pick) -> bool:
    params = pick.params
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


@dataclass(frozen=True, slots=True)
class _Entries:
    """Places of a batch's logits, row × vocabulary + token, and a number for each."""

    places: list[Places] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)

    def add(self, row: int, vocabulary: int, tokens: Collection[int], values: float | Collection[float]) -> None:
        """One number for all tokens, or one for each. Raises IndexError for a token that is not in the vocabulary: a
        CUDA device would not survive it."""
        places = np.fromiter(tokens, np.int64, len(tokens))
        if len(places) and not 0 <= places.min() <= places.max() < vocabulary:
            raise IndexError("a token is beyond the vocabulary")
        self.places.append(places + row * vocabulary)
        every = values if isinstance(values, float) else np.fromiter(values, np.float64, len(tokens))
        self.values.append(np.full(len(places), every, np.float32))

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return uploaded_array(np.concatenate(self.places), device), uploaded_array(np.concatenate(self.values), device)


@dataclass(frozen=True, slots=True)
class _Changes:
    """What penalties, biases, bans and grammars do to a batch's logits, in this order, each place once in each."""

    repeated: _Entries = field(default_factory=_Entries)
    lowered: _Entries = field(default_factory=_Entries)
    biased: _Entries = field(default_factory=_Entries)
    banned: _Entries = field(default_factory=_Entries)
    masked: list[int] = field(default_factory=list)
    masks: list[bytes] = field(default_factory=list)

    def add(self, row: int, pick: Pick, vocabulary: int) -> None:
        """One row's."""
        params = pick.params
        if params.repetition_penalty != 1:
            self.repeated.add(row, vocabulary, set(pick.tokens), float(params.repetition_penalty))
        answer = pick.tokens[pick.prompt_length :]
        if answer and (params.presence_penalty or params.frequency_penalty):
            counts = Counter(answer)
            lowered = [params.frequency_penalty * count + params.presence_penalty for count in counts.values()]
            self.lowered.add(row, vocabulary, counts, lowered)
        if params.logit_bias:
            biases = dict(params.logit_bias)
            self.biased.add(row, vocabulary, biases, biases.values())
        if pick.banned:
            self.banned.add(row, vocabulary, pick.banned, float("-inf"))
        if pick.allowed is not None:
            self.masked.append(row)
            self.masks.append(pick.allowed)

    def apply(self, scores: Tensor) -> None:
        """Change scores [rows, vocabulary] in place."""
        flat, device = scores.view(-1), scores.device
        if self.repeated.places:  # Keskar et al., "CTRL", 2019, as transformers and vLLM apply it
            places, penalties = self.repeated.on(device)
            found = flat[places]
            flat[places] = torch.where(found > 0, found / penalties, found * penalties)
        if self.lowered.places:
            places, amounts = self.lowered.on(device)
            flat[places] -= amounts
        if self.biased.places:
            places, amounts = self.biased.on(device)
            flat[places] += amounts
        if self.banned.places:
            places, never = self.banned.on(device)
            flat[places] = never
        if self.masked:
            self._mask(scores)

    def _mask(self, scores: Tensor) -> None:
        forbidden = _forbidden(self.masks, scores.shape[-1], scores.device)
        if scores.device.type == "cpu":  # where starting an operation costs nothing, and copying rows does
            for row, bits in zip(self.masked, forbidden, strict=True):
                scores[row].masked_fill_(bits, float("-inf"))
            return
        rows = uploaded(self.masked, torch.long, scores.device)
        scores[rows] = scores[rows].masked_fill(forbidden, float("-inf"))


def _forbidden(masks: Sequence[bytes], vocabulary: int, device: torch.device) -> Tensor:
    """[masks, vocabulary] bool, from masks with a bit for each token that is allowed; they travel as bits."""
    packed = np.full((len(masks), -(-vocabulary // BITS)), 255, np.uint8)
    for row, mask in enumerate(masks):
        packed[row, : len(mask)] = ~np.frombuffer(mask, np.uint8)[: packed.shape[1]]
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed, axis=1, bitorder="little")[:, :vocabulary].view(np.bool_))
    return unpacked(uploaded_array(packed, device))[:, :vocabulary]


def unpacked(packed: Tensor) -> Tensor:
    """[rows, bytes] uint8 as [rows, bytes × 8] bool, the lowest bit of a byte first."""
    bits = (packed[:, :, None] >> torch.arange(BITS, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten(1).bool()


def _adjusted(logits: Tensor, picks: Sequence[Pick]) -> Tensor:
    """The logits with penalties, biases, bans and grammars applied to the rows that have any."""
    rows = [row for row, pick in enumerate(picks) if pick.params.adjusts or pick.banned or pick.allowed is not None]
    if not rows:
        return logits
    adjusted = logits.float()
    if adjusted is logits:
        adjusted = logits.clone()
    changes = _Changes()
    for row in rows:
        changes.add(row, picks[row], logits.shape[-1])
    changes.apply(adjusted)
    return adjusted


@dataclass(frozen=True, slots=True)
class _Knobs:
    """What rows are drawn by: [rows, 1] each, float32."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    draw: Tensor

    @classmethod
    def of(cls, picks: Sequence[Pick], device: torch.device) -> _Knobs:
        """In one transfer. A top_k is exact in float32 up to 2^24, more than any vocabulary; 0 becomes infinite."""
        rows = [
            (
                max(pick.params.temperature, SMALLEST_TEMPERATURE),
                pick.params.top_k or float("inf"),
                pick.params.top_p,
                pick.params.min_p,
                pick.draw,
            )
            for pick in picks
        ]
        return cls(*torch.split(uploaded(rows, torch.float32, device), 1, dim=1))


def _scaled(logits: Tensor, largest: Tensor, knobs: _Knobs) -> Tensor:
    """Logits over temperature, in float32; the largest is made 0 first, so that a tiny temperature cannot overflow."""
    return (logits.float() - largest.float()[:, None]) / knobs.temperature


def _from_all(logits: Tensor, largest: Tensor, knobs: _Knobs) -> Tensor:
    return _inverse(_scaled(logits, largest, knobs).softmax(dim=-1), knobs)


def _from_cut(logits: Tensor, largest: Tensor, knobs: _Knobs) -> Tensor:
    ordered, tokens = _scaled(logits, largest, knobs).sort(dim=-1, descending=True, stable=True)
    size = ordered.shape[-1]
    ordered = ordered.masked_fill(torch.arange(size, device=logits.device) >= knobs.top_k, float("-inf"))
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The token that crosses top_p stays, so at least one does.
    probabilities = probabilities.masked_fill((before >= knobs.top_p) & (before > 0), 0.0)
    probabilities = probabilities.masked_fill(probabilities < knobs.min_p * probabilities[:, :1], 0.0)
    return tokens.gather(-1, _inverse(probabilities, knobs)[:, None])[:, 0]


def _inverse(probabilities: Tensor, knobs: _Knobs) -> Tensor:
    """Index of the first cumulated weight above draw × total; a token of weight 0 is never it."""
    cumulated = probabilities.cumsum(dim=-1)
    total = cumulated[:, -1:].contiguous()
    # draw × total may round up to total, which no weight is above.
    wanted = torch.minimum(knobs.draw * total, torch.nextafter(total, torch.zeros_like(total)))
    # A row that is not finite finds no index; its token is thrown away, but must not break the gather.
    return torch.searchsorted(cumulated, wanted, right=True)[:, 0].clamp(max=cumulated.shape[-1] - 1)
