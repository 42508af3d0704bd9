"""One step's work, as the scheduler names it and the runner computes it: chunks of sequences' tokens.

Owns the form of it. Refuses to choose what is in (`scheduler.py`), tensors, text, time and I/O.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from local_engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence to compute in this step, from position `start` on.

    Everything the forward needs is copied here, so that an abort during the forward cannot change it. `samples` says
    that the last token's logits choose the sequence's next token. `fresh`: the first since the sequence got its
    blocks, so that its newest block still holds what its holder before left there. The last `guessed` tokens are
    guesses: the logits of the token before them, and of each of them, choose a token.
    """

    sequence: Sequence
    start: int
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    samples: bool
    fresh: bool = False
    guessed: int = 0

    @property
    def guesses(self) -> tuple[int, ...]:
        """The tokens that are guesses."""
        return self.tokens[len(self.tokens) - self.guessed :]

    @property
    def rows(self) -> int:
        """How many of its tokens' logits are needed: those of the last ones."""
        return 1 + self.guessed if self.samples else 0


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: `decode` chunks have one token each, `prefill` chunks more, and `verify` chunks one and guesses
    behind it. Invariants: a sequence is in once; verify chunks are sorted by their length."""

    decode: tuple[Chunk, ...] = ()
    prefill: tuple[Chunk, ...] = ()
    verify: tuple[Chunk, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill or self.verify)

    def __iter__(self) -> Iterator[Chunk]:
        yield from self.decode
        yield from self.verify
        yield from self.prefill

    @property
    def prefill_tokens(self) -> int:
        """Tokens in prefill chunks."""
        return sum(len(chunk.tokens) for chunk in self.prefill)
