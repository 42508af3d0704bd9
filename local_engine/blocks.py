"""Owns the paged KV cache's bookkeeping: which block is free, which is referenced how often; refuses tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from local_engine.errors import AccountingError


class BlockManager:
    """Hands out blocks 0 … `num_blocks` - 1 of `block_size` tokens.

    Invariant: a block is either free once or has as many references as tables that hold it (`check` proves it).
    References are counted so that tables may share a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    @property
    def free(self) -> int:
        """How many blocks are free."""
        return len(self._free)

    def missing(self, table: Sequence[int], tokens: int) -> int:
        """Blocks that `table` lacks to hold so many tokens."""
        return max(0, -(-tokens // self.block_size) - len(table))

    def extend(self, table: list[int], tokens: int) -> bool:
        """Grow `table` until it holds so many tokens, or change nothing and say False."""
        missing = self.missing(table, tokens)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = self._free.pop()
            self._references[block] = 1
            table.append(block)
        return True

    def release(self, table: list[int]) -> None:
        """Give up every block of `table` and empty it."""
        for block in table:
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
        table.clear()

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AccountingError unless free list, references and the given tables (all there are) agree."""
        held = Counter(block for table in tables for block in table)
        # Ways of counting that stay fast with the hundred thousand blocks of a GPU.
        exact = (
            len(set(self._free)) == len(self._free) == self.num_blocks - len(held)
            and sum(self._references) == held.total()
            and all(self._references[block] == count for block, count in held.items())
            and not any(map(self._references.__getitem__, self._free))
        )
        if not exact:
            raise AccountingError(
                f"{self.num_blocks} blocks, {len(self._free)} free, {len(held)} held {held.total()} times, "
                f"{sum(self._references)} references: these do not agree"
            )
