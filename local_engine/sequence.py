"""Owns one request's tokens and how far their keys and values are computed; refuses text, tensors and time."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum

OVERTAKING = 256
"""Requests that may go first by one step of priority although they came later."""


class FinishReason(Enum):
    """Why a sequence ended; STOP and LENGTH are OpenAI's words on the wire."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen. Invariant: values are in range (checked at the border).

    temperature 0 is greedy; top_k 0 keeps all tokens, and so does min_p 0; max_tokens bounds the generated tokens, the
    end token included; until there are min_tokens the end token is not chosen, and with ignore_eos it ends nothing.
    Penalties and biases as vLLM has them: the repetition penalty looks at prompt and answer, presence and frequency at
    the answer alone. `logprobs`: how many of the likeliest tokens are told with each one chosen; None tells nothing.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed by what came before, or by a bias."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True, slots=True)
class Pick:
    """One token's choice to make: the parameters and a number drawn from [0, 1) (unused where greedy).

    `tokens` and `prompt_length` are what came before, for penalties; `banned` tokens are not chosen, nor any whose bit
    in `allowed` is not set (a bit a token, the lowest of the first byte first; None: all are).
    """

    params: SamplingParams
    draw: float
    tokens: SequenceOf[int] = ()
    prompt_length: int = 0
    banned: frozenset[int] = frozenset()
    allowed: bytes | None = None


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The natural logarithms of the probabilities of the token chosen and of the likeliest ones, as the model gave
    them: before penalties, temperature and cuts."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, eq=False)
class Sequence:
    """One request. Invariant: `computed` ≤ len(`tokens`), and `blocks` hold every computed token.

    `tokens` is the prompt and what was generated; `blocks` are the KV blocks in order and `digests` name the content
    of the full ones; `cached` tokens of the prompt were, or by the last look would be, found computed. `parent`, if
    any, has the same prompt: computing it once is enough. `guessed` tokens beyond `tokens` are in the step that is
    being computed, and have their place in `blocks`. It has had its place since `started` steps were made.
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
    salt: bytes = b""
    digests: list[bytes] = field(default_factory=list)
    cached: int = 0
    parent: Sequence | None = None
    guessed: int = 0
    guessable: bool = True
    started: int = 0

    @property
    def order(self) -> int:
        """Who goes first: the smallest. A step of priority is worth `OVERTAKING` places in the queue, so whoever waits
        is overtaken by so many later ones at most, and nobody starves."""
        return self.priority * OVERTAKING + self.arrival

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def to_compute(self) -> int:
        """Tokens of the prompt that somebody must compute before this sequence can go on, as far as is known."""
        if self.blocks:
            return self.pending
        return self.queued if self.repeats else max(1, self.pending - self.cached)

    @property
    def repeats(self) -> bool:
        """Whether another one that is open computes the prompt, or has done so."""
        return self.parent is not None and self.parent.finish is None

    @property
    def queued(self) -> int:
        """Tokens that it brings into the queue."""
        return max(1, self.pending - self.prompt_length) if self.repeats else self.pending

    @property
    def held_back(self) -> bool:
        """Whether another one is still computing the prompt that they share."""
        parent = self.parent
        return parent is not None and parent.finish is None and parent.computed < parent.prompt_length

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
