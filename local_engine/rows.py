"""Owns a step as flat numbers: a row for each token of chunks that decode, verify guesses, or are of short prompts, and
how many rows a recorded step has; refuses tensors. Pure.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from local_engine.batch import Batch, Chunk

SHORT_PROMPT = 2048
"""Tokens that those of a prompt's chunk see together, up to which they are rows: reading so many again and again takes
a GPU less time than launching attention of its own for the chunk, five operations a layer."""

SHORT_PROMPTS = 32_768
"""The same of all chunks of a step that can be recorded then, which saves launching all of its operations."""

MOST_ROWS = 256
"""Of a recorded step: above, launching operations one by one takes no longer than computing them."""


@dataclass(frozen=True, slots=True)
class Rows:
    """One number a row each: token, position, slot to write to, how many tokens it sees, and where its blocks begin in
    `blocks`. `keep`: rows whose logits are wanted."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    keep: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def all_kept(self) -> bool:
        """Whether every row's logits are wanted."""
        return len(self.keep) == len(self.ids)


def short(batch: Batch, *, recorded: bool) -> bool:
    """Whether the chunks of a batch's prompts are computed faster as rows than each by itself."""
    sizes = [len(chunk.tokens) for chunk in batch.prefill]
    seen = sum(size * (2 * chunk.start + size + 1) // 2 for size, chunk in zip(sizes, batch.prefill, strict=True))
    others = len(batch.decode) + sum(len(chunk.tokens) for chunk in batch.verify)
    fits = recorded and others + sum(sizes) <= MOST_ROWS
    return seen <= (SHORT_PROMPTS if fits else SHORT_PROMPT * len(sizes))


def rows_of(chunks: Iterable[Chunk], block_size: int) -> Rows:
    """A row for each token, in order."""
    rows = Rows()
    for chunk in chunks:
        first, start, size = len(rows.blocks), chunk.start, len(chunk.tokens)
        rows.ids.extend(chunk.tokens)
        rows.positions.extend(range(start, start + size))
        rows.slots.extend(
            [chunk.blocks[at // block_size] * block_size + at % block_size for at in range(start, start + size)]
        )
        rows.lengths.extend(range(start + 1, start + size + 1))
        rows.starts.extend([first] * size)
        rows.blocks.extend(chunk.blocks[: -(-(start + size) // block_size)])
        rows.keep.extend(range(len(rows.ids) - chunk.rows, len(rows.ids)))
    return rows


def bucket_sizes(most: int) -> tuple[int, ...]:
    """Numbers of rows to record, the last at least `most` or `MOST_ROWS`: 1, 2, 4, then every eighth up to 64, then
    wider, so that few rows are computed for nothing and start-up stays short."""
    sizes = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, MOST_ROWS + 1, 32))
    return sizes[: bisect_left(sizes, min(most, MOST_ROWS)) + 1]


def bucket_for(rows: int, sizes: Sequence[int]) -> int | None:
    """The smallest of the sizes that holds so many rows; None where none does."""
    index = bisect_left(sizes, rows)
    return sizes[index] if rows and index < len(sizes) else None
