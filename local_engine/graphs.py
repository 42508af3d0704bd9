"""Owns steps, of tokens that decode and of short prompts, that are recorded once and run again: their static inputs,
and which step fits which batch; refuses to know what records them.

Launching a step's thousand operations one by one takes a host longer than a GPU needs to compute them for few rows. A
recorded step is launched as a whole. It reads its inputs at addresses that stay, and always has as many rows as when it
was recorded; rows that are left over see nothing, and write to a block that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from local_engine.attention import KvCache, PagedForward
from local_engine.paged import Attend, Tables
from local_engine.rows import Rows, bucket_for
from local_engine.uploads import StaticInts, uploaded

Replay = Callable[[], Tensor]
"""Runs a recorded step over what its inputs hold now; its logits, which last until the next one."""

INPUTS = 5
"""Numbers a row: token, position, slot, length, and where its blocks begin."""


class Recorder(Protocol):
    """Records what a step launches."""

    def __call__(self, step: Callable[[], Tensor]) -> Replay:
        """Runs `step`, perhaps more than once. Raises what cannot be recorded."""


class RecordedSteps:
    """A model's decoding step for each of some numbers of rows.

    Invariants: a run reads and writes no block but those of its rows, and the scratch block; inputs for all sizes are
    the same memory, because one step runs at a time.
    """

    def __init__(
        self, model: Any, cache: KvCache, attend: Attend, *, sizes: Sequence[int], longest: int, block_size: int
    ) -> None:
        """`longest`: tokens that a sequence may reach."""
        self.sizes = tuple(sizes)
        self._model = model
        self._cache = cache
        self._attend = attend
        self._longest = longest
        self._block_size = block_size
        self._most = self.sizes[-1]
        self._most_blocks = self._most * -(-longest // block_size)
        self._inputs = StaticInts(INPUTS * self._most + self._most_blocks, model.device)
        self._recorded: dict[int, Replay] = {}

    @torch.inference_mode()
    def record(self, recorder: Recorder, say: Callable[[str], None]) -> None:
        """Record every size, the largest first, whose memory the smaller ones can then share. Raises what the recorder
        raises."""
        for number, size in enumerate(reversed(self.sizes)):
            self._fill(Rows(), size)
            self._recorded[size] = recorder(partial(self._step, size))
            say(f"recorded decoding steps: {number + 1} of {len(self.sizes)}")

    def forward(self, rows: Rows) -> Tensor | None:
        """Logits of the rows that are kept; None where no recorded step fits. They last until the next call."""
        size = bucket_for(len(rows), self.sizes)
        if size is None or size not in self._recorded or len(rows.blocks) > self._most_blocks:
            return None
        self._fill(rows, size)
        logits = self._recorded[size]()
        if rows.all_kept:
            return logits[: len(rows)]
        return logits[uploaded(rows.keep, torch.long, logits.device)]

    def _fill(self, rows: Rows, size: int) -> None:
        """The inputs of a step of `size` rows; those beyond `rows` see nothing."""
        left, most = size - len(rows), self._most
        scratch = self._cache.scratch_slot
        self._inputs.write(
            (
                (0, rows.ids + [0] * left),
                (most, rows.positions + [0] * left),
                (2 * most, rows.slots + [scratch + index % self._block_size for index in range(left)]),
                (3 * most, rows.lengths + [0] * left),
                (4 * most, rows.starts + [0] * left),
                (INPUTS * most, rows.blocks),
            )
        )

    def _step(self, size: int) -> Tensor:
        numbers, most = self._inputs.tensor, self._most
        ids, positions, slots, lengths, starts = (
            numbers[index * most : index * most + size] for index in range(INPUTS)
        )
        tables = Tables(numbers[INPUTS * most :], starts, lengths, self._longest, self._block_size)
        output = self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0,  # all
            paged=PagedForward(cache=self._cache, slots=slots, tables=tables, attend=self._attend),
        )
        logits: Tensor = output.logits[0]
        return logits
