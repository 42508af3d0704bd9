"""The fleet at one moment, as a decision sees it: what engines say of themselves, what waits there, what is known of
each deployment.

Owns these nouns. Refuses to keep or change any of it (`fleet.py`), and everything that needs a policy, a clock or a
socket. Units as in `types.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from gateway.decision import Rejection


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine says of itself (`GET /load`): sequences waiting and running, prompt tokens that wait to be
    computed, KV-cache blocks, and rates measured of late in tokens and seconds; None until they have been. At most
    `max_running` sequences run, and a step computes at most `max_batch_tokens`; None where it does not say."""

    waiting: int
    running: int
    queued_prefill_tokens: int
    free_blocks: int
    total_blocks: int
    block_size: int
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    step_s: float | None = None
    max_running: int | None = None
    max_batch_tokens: int | None = None


# Upper ends, in prompt tokens, of the sizes by which times to the first token are kept apart; one more size has no end.
PROMPT_SIZES = (256, 1024, 4096, 16384)

# Upper ends, in milliseconds, of the sizes by which an engine's forecasts are compared with what came; one more has no
# end.
FORECAST_SIZES_MS = (50.0, 250.0, 1000.0, 4000.0)


@dataclass(frozen=True, slots=True)
class Backlog:
    """What an engine has to do before it starts a new prompt: its last reading, corrected by what was sent there since.

    At the time `at`, prompts of `tokens` tokens wait, `sequences` of them, and drain at `prefill_tokens_per_s`; `ahead`
    are the shares of them that go before a request of a priority, sorted by it. A step computes at most `step_tokens`
    and takes `step_s` besides. `running` sequences hold their blocks and places for `hold_s` seconds in the mean; a
    token of one of them takes `token_s` of the engine, None where nobody knows, and `cached_token_s` for each token
    before it. `margins` (one a size, see `FORECAST_SIZES_MS`) are the factors that 95 of 100 first tokens did not
    exceed their forecast by, `margins_by_priority` those of a priority: who goes last is overtaken by who comes later.
    After `good_until` nobody knows.
    """

    at: float
    good_until: float
    tokens: float
    prefill_tokens_per_s: float
    step_s: float
    sequences: float = 0.0
    running: int = 0
    hold_s: float = 1.0
    free_blocks: float = inf
    used_blocks: float = 0.0
    block_size: int = 16
    free_places: float = inf
    ahead: tuple[tuple[int, float], ...] = ()
    margins: tuple[float, ...] = ()
    margins_by_priority: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    token_s: float | None = None
    cached_token_s: float = 0.0
    step_tokens: int = 2048

    def share_ahead(self, priority: int) -> float:
        """The share of what waits that goes before a request of this priority; all of it where nobody knows."""
        share = 0.0 if self.ahead else 1.0
        for known, at_most in self.ahead:
            if known > priority:
                break
            share = at_most
        return share


CircuitState = Literal["closed", "open", "half_open"]


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """What is known of one deployment now. `down` is a reason not to call it (starting, circuit open, ...) or None;
    `retry_after` in seconds says when to ask again.

    Latencies are 95th percentiles as measured of late, None until they are: of all prompts, by the prompt's size
    (`PROMPT_SIZES`; empty where nothing is known by size), and of each token after the first. `backlog` is there while
    the engine says what waits, and is believed before them. `engine_second_nusd` is what a second of the engine is
    worth to others: what their work would save there if it found room; `dearest_nusd` is what those save in it that
    save most (19 of 20 save less). `rooms` are the priorities that ask for it, the lowest first, each with the seconds
    that it has until its first token, and whether any of it has no other place.
    """

    down: str | None = None
    retry_after: float = 0.0
    circuit: CircuitState = "closed"
    in_flight: int = 0
    first_token_p95_ms: float | None = None
    busy: float | None = None  # the share of its capacity in use, 0 to 1; None where the deployment does not say
    first_token_p95_ms_by_size: tuple[float, ...] = ()
    per_token_p95_ms: float | None = None
    backlog: Backlog | None = None
    engine_second_nusd: float = 0.0
    rooms: tuple[tuple[int, float, bool], ...] = ()
    dearest_nusd: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The fleet at one moment; time (`now`: seconds of a monotonic clock; `wall`: seconds since 1970 in UTC) and chance
    (0 <= draw < 1) are inputs of a decision like any other. `full` are the deployments that limits keep this request
    from."""

    now: float
    draw: float
    deployments: Mapping[str, DeploymentStatus]
    wall: float = 0.0
    full: Mapping[str, Rejection] = field(default_factory=dict)
