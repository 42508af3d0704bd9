"""Owns one request's tokens and how far their keys and values are computed; refuses text, tensors and time."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class FinishReason(Enum):
    """Why a sequence ended; STOP and LENGTH are OpenAI's words on the wire."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen. Invariant: values are in range (checked at the border).

    temperature 0 is greedy; top_k 0 keeps all tokens; max_tokens bounds the generated tokens, the end token included.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pick:
    """One token's choice to make: the parameters and a number drawn from [0, 1) (unused where greedy)."""

    params: SamplingParams
    draw: float


@dataclass(slots=True, eq=False)
class Sequence:
    """One request. Invariant: `computed` ≤ len(`tokens`), and `blocks` hold every computed token.

    `tokens` is the prompt and what was generated; `blocks` are the KV blocks in order; `order` sorts by priority
    (lower first), then by arrival.
    """

    id: str
    prompt_length: int
    tokens: list[int]
    max_tokens: int
    end_tokens: frozenset[int] = frozenset()
    priority: int = 0
    arrival: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    preemptions: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first."""
        return self.priority, self.arrival

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    def append(self, token: int) -> FinishReason | None:
        """Add a sampled token; says whether the sequence ends with it."""
        self.tokens.append(token)
        if token in self.end_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.generated >= self.max_tokens else None
