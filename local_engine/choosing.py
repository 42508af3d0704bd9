"""Owns the way from a batch's logits to each sequence's next tokens; refuses scheduling, text and threads.

A row's fault ends that row's request, not the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from local_engine.batch import Batch, Chunk
from local_engine.errors import DeviceLost, OutOfMemory
from local_engine.generation import Choice, Generation, log_error
from local_engine.sequence import Likelihood, Pick


class Runner(Protocol):
    """What the engine needs of a model; `forward` gives logits that only `sample` looks into."""

    def forward(self, batch: Batch) -> Any:
        """Compute the batch's tokens; as many rows of logits as each chunk says, in order."""

    def sample(self, logits: Any, rows: Sequence[int], picks: Sequence[Pick]) -> list[int | None]:
        """Tokens for the given rows; None where the logits are not finite."""

    def likelihoods(
        self, logits: Any, rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
    ) -> list[Likelihood]:
        """How likely the chosen tokens of these rows were, and the so many likeliest ones of each."""


Chosen = dict[str, list[Choice]]
"""By sequence: one choice, and one more for each guess that was right. None at all: a number among its logits is none
although its first row's may be, so that it should be computed again without guesses."""


@dataclass(frozen=True, slots=True)
class _Asked:
    chunk: Chunk
    first_row: int
    picks: list[Pick]


def choose(runner: Runner, logits: Any, batch: Batch, open_one: Callable[[str], Generation | None]) -> Chosen:
    """The next tokens of every sequence of the batch that is still open."""
    asked, chosen = _asked(batch, open_one)
    if not asked:
        return chosen
    rows = [each.first_row + index for each in asked for index in range(len(each.picks))]
    tokens = _sampled(runner, logits, rows, [pick for each in asked for pick in each.picks])
    told: list[tuple[int, Pick, int]] = []
    start = 0
    for each in asked:
        own = tokens[start : start + len(each.picks)]
        start += len(each.picks)
        if each.chunk.guessed and None in own:
            chosen[each.chunk.sequence.id] = []
            continue
        right = _right(own, each.chunk.guesses)
        chosen[each.chunk.sequence.id] = [Choice(token) for token in own[: right + 1]]
        told += [
            (each.first_row + index, pick, token)
            for index, (token, pick) in enumerate(zip(own[: right + 1], each.picks, strict=False))
            if token is not None and pick.params.logprobs is not None
        ]
    return _with_likelihoods(runner, logits, asked, chosen, told) if told else chosen


def _asked(batch: Batch, open_one: Callable[[str], Generation | None]) -> tuple[list[_Asked], Chosen]:
    asked: list[_Asked] = []
    chosen: Chosen = {}
    row = 0
    for chunk in batch:
        first, row = row, row + chunk.rows
        # An abort may take it out at any moment, from the event loop's thread.
        if chunk.samples and (generation := open_one(chunk.sequence.id)):
            try:
                asked.append(_Asked(chunk, first, generation.picks(chunk.guesses)))
            except BaseException as error:  # noqa: BLE001 - ends this request only, a panic of a library in Rust too
                if not isinstance(error, ValueError):  # which says that it can be followed no further
                    log_error("a grammar", error)
                chosen[chunk.sequence.id] = [Choice(None, problem="the grammar of this answer failed")]
    return asked, chosen


def _sampled(runner: Runner, logits: Any, rows: Sequence[int], picks: Sequence[Pick]) -> list[int | None]:
    try:
        return runner.sample(logits, rows, picks)
    except (DeviceLost, OutOfMemory):
        raise  # no row's fault; the engine ends, or computes the step again in smaller batches
    except Exception as error:  # noqa: BLE001 - one row's fault must not end the others
        log_error("sampling, repeated one by one", error)
        return [_sample_one(runner, logits, row, pick) for row, pick in zip(rows, picks, strict=True)]


def _sample_one(runner: Runner, logits: Any, row: int, pick: Pick) -> int | None:
    try:
        return runner.sample(logits, [row], [pick])[0]
    except (DeviceLost, OutOfMemory):
        raise
    except Exception as error:  # noqa: BLE001 - ends this request only
        log_error("sampling", error)
        return None


def _right(tokens: Sequence[int | None], guesses: Sequence[int]) -> int:
    """How many of the guesses are what was chosen at their places, up to the first that is not.

    A guess is certain of itself, so accepting it with the model's probability (Leviathan et al., "Fast Inference from
    Transformers via Speculative Decoding", 2023) is to accept it where the model's own draw gives it; and what that
    draw gives where it does not is distributed as the rest should be.
    """
    right = 0
    while right < len(guesses) and tokens[right] == guesses[right]:
        right += 1
    return right


def _with_likelihoods(
    runner: Runner, logits: Any, asked: Sequence[_Asked], chosen: Chosen, told: Sequence[tuple[int, Pick, int]]
) -> Chosen:
    rows, picks, tokens = zip(*told, strict=True)
    tops = [pick.params.logprobs or 0 for pick in picks]
    found = dict(zip(rows, _likelihoods(runner, logits, rows, tokens, tops), strict=True))
    for each in asked:
        id = each.chunk.sequence.id
        chosen[id] = [
            _with_likelihood(choice, found, each.first_row + index) for index, choice in enumerate(chosen[id])
        ]
    return chosen


def _with_likelihood(choice: Choice, found: dict[int, Likelihood | None], row: int) -> Choice:
    if row not in found:
        return choice
    likelihood = found[row]
    if likelihood is None:
        return Choice(None, problem="the likelihoods of this answer's tokens failed")
    return Choice(choice.token, likelihood)


def _likelihoods(
    runner: Runner, logits: Any, rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
) -> list[Likelihood | None]:
    """Of each row; None where they fail."""
    try:
        return list(runner.likelihoods(logits, rows, tokens, tops))
    except (DeviceLost, OutOfMemory):
        raise
    except Exception as error:  # noqa: BLE001 - one row's fault must not end the others
        log_error("likelihoods" + (", repeated one by one" if len(rows) > 1 else ""), error)
        if len(rows) == 1:
            return [None]
        each = zip(rows, tokens, tops, strict=True)
        return [one for row, token, top in each for one in _likelihoods(runner, logits, [row], [token], [top])]
