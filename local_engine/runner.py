"""Owns the model's weights, the KV cache and the forward; refuses scheduling and text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from local_engine.attention import DecodeRows, KvCache, PagedForward, PrefillSpan
from local_engine.errors import DeviceLost, OutOfMemory
from local_engine.sampling import choose, likelihoods
from local_engine.scheduler import Batch, Chunk
from local_engine.sequence import Likelihood, Pick


class ModelRunner:
    """A loaded causal language model over a paged cache.

    Invariant: called from one thread only; a forward reads and writes no block but those of its batch's chunks.
    """

    def __init__(self, model: Any, cache: KvCache) -> None:
        self._model = model
        self._cache = cache
        self._device: torch.device = model.device

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Compute a batch; logits [rows of all chunks, vocabulary] in the batch's order.

        Raises OutOfMemory or DeviceLost; after the first the batch's chunks may be computed again.
        """
        try:
            return self._forward(batch)
        except torch.OutOfMemoryError as error:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            raise OutOfMemory("the device has not enough free memory for this batch") from error
        except torch.AcceleratorError as error:
            raise DeviceLost("the device has failed") from error

    def _forward(self, batch: Batch) -> Tensor:
        chunks = list(batch)
        self._clear_tails(chunks)
        sizes = [len(chunk.tokens) for chunk in chunks]
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        keep = [row for chunk, end in zip(chunks, ends, strict=True) for row in range(end - chunk.rows, end)]
        spans = zip(batch.prefill, ends[len(chunks) - len(batch.prefill) :], strict=True)
        output = self._model(
            input_ids=self._longs([token for chunk in chunks for token in chunk.tokens])[None],
            position_ids=self._longs(
                [p for chunk in chunks for p in range(chunk.start, chunk.start + len(chunk.tokens))]
            )[None],
            use_cache=False,
            logits_to_keep=self._longs(keep),
            paged=PagedForward(
                cache=self._cache,
                slots=self._longs([slot for chunk in chunks for slot in self._slots(chunk)]),
                decode=tuple(self._decode_rows(batch)),
                prefill=tuple(self._prefill_span(chunk, end) for chunk, end in spans),
            ),
        )
        logits: Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[int], picks: Sequence[Pick]) -> list[int | None]:
        """One token for each of the given rows of `forward`'s logits; None where they are not finite."""
        if len(rows) != len(logits):
            logits = logits[self._longs(list(rows))]
        return choose(logits, picks)

    @torch.inference_mode()
    def likelihoods(
        self, logits: Tensor, rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
    ) -> list[Likelihood]:
        """How likely the chosen tokens of these rows were, and the so many likeliest ones of each."""
        return likelihoods(logits[self._longs(list(rows))], tokens, tops)

    def _clear_tails(self, chunks: Sequence[Chunk]) -> None:
        """Zero each block that is a sequence's newest and last.

        Decoding reads its tail under a mask, which does not hide a NaN that the block's holder before left there. The
        blocks before it are written whole before they are read. Guesses may begin a block and not fill it.
        """
        size = self._cache.block_size
        fresh = [chunk.blocks[-1] for chunk in chunks if chunk.fresh]
        fresh += [
            c.blocks[position // size]
            for c in chunks
            if not c.fresh and len(c.tokens) == 1 + c.guessed
            for position in range(c.start + -c.start % size, c.start + len(c.tokens), size)
        ]
        if fresh:
            self._cache.clear(self._longs(fresh))

    def _longs(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)

    def _slots(self, chunk: Chunk) -> list[int]:
        size = self._cache.block_size
        return [
            chunk.blocks[position // size] * size + position % size
            for position in range(chunk.start, chunk.start + len(chunk.tokens))
        ]

    def _decode_rows(self, batch: Batch) -> Iterator[DecodeRows]:
        """Those of chunks that are equally long together, as they come in the batch."""
        begin = 0
        for width, group in groupby((*batch.decode, *batch.verify), key=lambda chunk: len(chunk.tokens)):
            chunks = list(group)
            yield self._rows(chunks, begin, width)
            begin += len(chunks) * width

    def _rows(self, chunks: Sequence[Chunk], begin: int, width: int) -> DecodeRows:
        lengths = [chunk.start + width for chunk in chunks]
        longest = max(lengths)
        most = -(-longest // self._cache.block_size)
        padding = self._cache.padding_block
        blocks = [
            block for chunk in chunks for block in (*chunk.blocks[:most], *(padding,) * (most - len(chunk.blocks)))
        ]
        uneven = self._longs(lengths)[:, None] if min(lengths) < longest else None
        return DecodeRows(len(chunks), self._longs(blocks), longest, uneven, begin, width)

    def _prefill_span(self, chunk: Chunk, end: int) -> PrefillSpan:
        size = len(chunk.tokens)
        length = chunk.start + size
        if chunk.start == 0:
            return PrefillSpan(end - size, end, length, blocks=None)
        width = -(-length // self._cache.block_size)
        return PrefillSpan(end - size, end, length, blocks=self._longs(list(chunk.blocks[:width])))
