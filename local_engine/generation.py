"""Owns one request between its sampled tokens and its text: what may come next, what there is to show, when it ends;
refuses threads and tensors."""

from __future__ import annotations

import logging
import random
import traceback
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from local_engine.errors import GenerationFailed
from local_engine.grammar import Matcher
from local_engine.output import Delta, Output
from local_engine.sequence import FinishReason, Likelihood, Pick, SamplingParams
from local_engine.sequence import Sequence as TokenSequence
from local_engine.text import AnswerText

log = logging.getLogger(__name__)


class Chance:
    """A request's draws from [0, 1), by place in the answer.

    The same seed gives the same draw at the same place, in whatever step and however often that is looked at, so that
    neither neighbours nor guesses change what is drawn.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - not for secrets
        self._draws: list[float] = []

    def at(self, place: int) -> float:
        """The draw of the answer's token number `place`, counted from 0."""
        while len(self._draws) <= place:
            self._draws.append(self._random.random())
        return self._draws[place]


@dataclass(frozen=True, slots=True)
class Generation:
    sequence: TokenSequence
    params: SamplingParams
    text: AnswerText
    chance: Chance
    output: Output
    end_tokens: frozenset[int]
    matcher: Matcher | None
    untold: list[Likelihood] = field(default_factory=list)

    def picks(self, guesses: SequenceOf[int] = ()) -> list[Pick]:
        """The next token's choice, and for each guess that of the token behind it, taken that all guesses before are
        right. Raises ValueError where the grammar fails."""
        if self.matcher is None:
            return [self._pick(guesses[:count], None) for count in range(len(guesses) + 1)]
        masks = self.matcher.allowed_along(guesses)
        return [self._pick(guesses[:count], mask) for count, mask in enumerate(masks)]

    def _pick(self, before: SequenceOf[int], allowed: bytes | None) -> Pick:
        params, sequence = self.params, self.sequence
        place = sequence.generated + len(before)
        draw = self.chance.at(place) if params.temperature > 0 else 0.0
        early = place < params.min_tokens
        if allowed is None and not early and not params.adjusts:
            return Pick(params, draw)
        return Pick(
            params,
            draw,
            tokens=[*sequence.tokens, *before] if before and params.adjusts else sequence.tokens,
            prompt_length=sequence.prompt_length,
            banned=self.end_tokens if early else frozenset(),
            allowed=allowed,
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """What came of a pick: the token, or why there is none."""

    token: int | None
    likelihood: Likelihood | None = None
    problem: str = "the model's output for this request is not a number"


def advance(generation: Generation, choice: Choice) -> Delta:
    """Take in a choice: the text to show, and whether it is the last."""
    token, sequence = choice.token, generation.sequence
    if token is None:
        return failed(generation, choice.problem)
    try:
        reason = sequence.append(token)
        text = "" if reason is FinishReason.STOP else generation.text.add(token)
        if generation.matcher is not None and reason is not FinishReason.STOP:
            generation.matcher.add(token)
            reason = FinishReason.STOP if generation.matcher.complete else reason
            text += generation.text.flush() if reason is FinishReason.STOP else ""
        if generation.text.stopped:
            reason = FinishReason.STOP
        elif reason is not None:
            text += generation.text.flush()
            # The rest that was held back may complete a stop string.
            reason = FinishReason.STOP if generation.text.stopped else reason
    except BaseException as error:  # noqa: BLE001 - ends this request only, a panic of a library in Rust too
        log_error("decoding", error)
        return failed(generation, "the answer's tokens could not be decoded")
    if choice.likelihood is not None and token not in sequence.end_tokens:
        generation.untold.append(choice.likelihood)
    told: tuple[Likelihood, ...] = ()
    if generation.untold and (text or reason is not None):
        told = tuple(generation.untold)
        generation.untold.clear()
    return Delta(text, sequence.generated, reason, likelihoods=told, cached_tokens=sequence.cached)


def failed(generation: Generation, message: str) -> Delta:
    """The last delta of a request that ends in an error."""
    return Delta("", generation.sequence.generated, FinishReason.ERROR, GenerationFailed(message))


def log_error(where: str, error: BaseException) -> None:
    """Kind and place only: a message may quote what a caller sent."""
    frames = "; ".join(
        f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)
    )
    log.error("%s failed: %s at %s", where, type(error).__name__, frames)
