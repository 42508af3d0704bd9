"""Owns the paged KV cache's bookkeeping: which block is free, who references it, what it holds; refuses tensors.

A full block is known by the digest of its tokens and of all before them (a chain), so that a prompt finds what an
earlier one computed. A freed block keeps its content until it is handed out again, the longest unused first: that is
the prefix cache, and it takes no memory from anyone.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

from local_engine.errors import AccountingError

Digest = bytes

DIGEST_BYTES = 16
"""Of BLAKE2b: two prompts that share one by accident or by design would read each other's keys and values, so a hash
that can be made to collide (Python's own, say) will not do."""


def chain(tokens: Sequence[int], block_size: int, known: Sequence[Digest] = (), salt: bytes = b"") -> Iterator[Digest]:
    """Digests of the full blocks of `tokens` that come after the `known` ones; `salt` keeps a prompt's blocks apart
    from equal ones with another salt."""
    before = known[-1] if known else blake2b(salt, digest_size=DIGEST_BYTES, person=b"salt").digest()
    for start in range(len(known) * block_size, len(tokens) - block_size + 1, block_size):
        content = array("q", tokens[start : start + block_size]).tobytes()
        before = blake2b(before + content, digest_size=DIGEST_BYTES).digest()
        yield before


class BlockManager:
    """Hands out blocks 0 … `num_blocks` - 1 of `block_size` tokens.

    Invariant: a block is either free once or has as many references as tables that hold it, and a digest leads to at
    most one block, which knows it (`check` proves both).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blank = list(range(num_blocks - 1, -1, -1))  # free, and worth nothing
        self._kept: dict[int, None] = {}  # free, but known by a digest; the longest unused comes first
        self._references = [0] * num_blocks
        self._digest_of: dict[int, Digest] = {}
        self._block_of: dict[Digest, int] = {}

    @property
    def free(self) -> int:
        """How many blocks can be handed out."""
        return len(self._blank) + len(self._kept)

    @property
    def known(self) -> int:
        """How many blocks are known by a digest, free or not."""
        return len(self._digest_of)

    def missing(self, table: Sequence[int], tokens: int) -> int:
        """Blocks that `table` lacks to hold so many tokens."""
        return max(0, -(-tokens // self.block_size) - len(table))

    def spare(self, table: Sequence[int], tokens: int) -> int:
        """Blocks of `table` beyond those that so many tokens need."""
        return max(0, len(table) - -(-tokens // self.block_size))

    def extend(self, table: list[int], tokens: int) -> bool:
        """Grow `table` until it holds so many tokens, or change nothing and say False."""
        missing = self.missing(table, tokens)
        if missing > self.free:
            return False
        for _ in range(missing):
            block = self._blank.pop() if self._blank else self._reused()
            self._references[block] = 1
            table.append(block)
        return True

    def cached(self, digests: Sequence[Digest]) -> list[int]:
        """The blocks that hold the first of these digests, as far as they are all there."""
        found: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def digest(self, block: int) -> Digest | None:
        """What the block is known by."""
        return self._digest_of.get(block)

    def unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of the blocks would be taken from the free ones if a table shared them."""
        return sum(not self._references[block] for block in blocks)

    def share(self, table: list[int], blocks: Iterable[int]) -> None:
        """Add blocks that `cached` has found to a table."""
        for block in blocks:
            if not self._references[block]:
                del self._kept[block]
            self._references[block] += 1
            table.append(block)

    def learn(self, block: int, digest: Digest) -> None:
        """The block is full and holds what the digest says. Where another one does already, that one stays known."""
        if digest not in self._block_of and block not in self._digest_of:
            self._digest_of[block] = digest
            self._block_of[digest] = block

    def forget(self, blocks: Iterable[int]) -> None:
        """Nobody else may find these blocks: what they hold is not to be trusted."""
        for block in blocks:
            if (digest := self._digest_of.pop(block, None)) is not None:
                del self._block_of[digest]
                if block in self._kept:
                    del self._kept[block]
                    self._blank.append(block)

    def release(self, table: list[int]) -> None:
        """Give up every block of `table` and empty it. The end of a prefix is reused before its beginning."""
        self.trim(table, 0)

    def trim(self, table: list[int], tokens: int) -> None:
        """Give up the blocks of `table` beyond those that so many tokens need."""
        for _ in range(self.spare(table, tokens)):
            block = table.pop()
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._digest_of:
                    self._kept[block] = None
                else:
                    self._blank.append(block)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AccountingError unless free blocks, references, digests and the given tables (all there are) agree."""
        held = Counter(block for table in tables for block in table)
        free = [*self._blank, *self._kept]
        # Ways of counting that stay fast with the hundred thousand blocks of a GPU.
        exact = (
            len(set(free)) == len(free) == self.num_blocks - len(held)
            and sum(self._references) == held.total()
            and all(self._references[block] == count for block, count in held.items())
            and not any(map(self._references.__getitem__, free))
            and self._kept.keys() <= self._digest_of.keys()
            and self._digest_of.keys().isdisjoint(self._blank)
            and len(self._digest_of) == len(self._block_of)
            and all(self._block_of.get(digest) == block for block, digest in self._digest_of.items())
        )
        if not exact:
            raise AccountingError(
                f"{self.num_blocks} blocks, {len(free)} free, {len(held)} held {held.total()} times, "
                f"{sum(self._references)} references, {len(self._digest_of)} digests: these do not agree"
            )

    def _reused(self) -> int:
        block = next(iter(self._kept))
        self.forget([block])
        return self._blank.pop()
