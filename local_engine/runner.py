"""Owns the model's weights, the KV cache and the forward; refuses scheduling and text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from local_engine.attention import DecodeRows, KvCache, PagedForward, PrefillSpan
from local_engine.batch import Batch, Chunk
from local_engine.errors import DeviceLost, OutOfMemory
from local_engine.graphs import RecordedSteps
from local_engine.paged import Attend, Tables
from local_engine.rows import Rows, rows_of, short
from local_engine.sampling import choose, likelihoods
from local_engine.sequence import Likelihood, Pick
from local_engine.uploads import uploaded

NO_MEMORY = "CUBLAS_STATUS_ALLOC_FAILED"
"""How cuBLAS says it, as an error like any other."""


def answers(device: torch.device) -> bool:
    """Whether the device still computes. After some errors a CUDA device does not, until its process starts afresh."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


class ModelRunner:
    """A loaded causal language model over a paged cache.

    Invariant: called from one thread only; a forward reads and writes no block but those of its batch's chunks.
    """

    def __init__(
        self,
        model: Any,
        cache: KvCache,
        attend: Attend | None = None,
        recorded: RecordedSteps | None = None,
        *,
        answers: Callable[[torch.device], bool] = answers,
    ) -> None:
        """With `attend`, decoding and short prompts read keys and values where they lie instead of copying them out;
        with `recorded` steps, batches of these alone use them where one fits."""
        self._model = model
        self.cache = cache
        self._attend = attend
        self._recorded = recorded
        self._answers = answers
        self._device: torch.device = model.device

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Compute a batch; logits [rows of all chunks, vocabulary] in the batch's order, to be used before the next.

        Raises OutOfMemory or DeviceLost; after the first the batch's chunks may be computed again.
        """
        with self._errors():
            if self._attend is None:
                return self._forward(batch, None, batch.prefill)
            brief = short(batch, recorded=self._recorded is not None)
            rows = rows_of(batch if brief else (*batch.decode, *batch.verify), self.cache.block_size)
            if self._recorded is not None and brief:
                logits = self._recorded.forward(rows)
                if logits is not None:
                    return logits
            return self._forward(batch, rows, () if brief else batch.prefill)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """A device's errors as ours. It computes while the host goes on, so that they may show wherever the host waits
        for it."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            raise OutOfMemory("the device has not enough free memory for this batch") from error
        except torch.AcceleratorError as error:
            raise DeviceLost("the device has failed") from error
        except RuntimeError as error:
            if not self._answers(self._device):
                raise DeviceLost("the device has failed") from error
            if NO_MEMORY in str(error):
                raise OutOfMemory("the device has not enough free memory for this batch") from error
            raise

    def _forward(self, batch: Batch, rows: Rows | None, prompts: Sequence[Chunk]) -> Tensor:
        """With `rows`, those are read in place; `prompts` are chunks that are none."""
        chunks = list(batch)
        if rows is None:
            self._clear_tails(chunks)
        sizes = [len(chunk.tokens) for chunk in chunks]
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        keep = [row for chunk, end in zip(chunks, ends, strict=True) for row in range(end - chunk.rows, end)]
        spans = zip(prompts, ends[len(chunks) - len(prompts) :], strict=True)
        output = self._model(
            input_ids=self._longs([token for chunk in chunks for token in chunk.tokens])[None],
            position_ids=self._longs(
                [p for chunk in chunks for p in range(chunk.start, chunk.start + len(chunk.tokens))]
            )[None],
            use_cache=False,
            logits_to_keep=self._longs(keep),
            paged=PagedForward(
                cache=self.cache,
                slots=self._longs([slot for chunk in chunks for slot in self._slots(chunk)]),
                decode=tuple(self._decode_rows(batch)) if rows is None else (),
                prefill=tuple(self._prefill_span(chunk, end) for chunk, end in spans),
                tables=self._tables(rows) if rows else None,
                attend=self._attend,
            ),
        )
        logits: Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[int], picks: Sequence[Pick]) -> list[int | None]:
        """One token for each of the given rows of `forward`'s logits; None where they are not finite. Raises as
        `forward`."""
        with self._errors():
            if len(rows) != len(logits):
                logits = logits[self._longs(list(rows))]
            return choose(logits, picks)

    @torch.inference_mode()
    def likelihoods(
        self, logits: Tensor, rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
    ) -> list[Likelihood]:
        """How likely the chosen tokens of these rows were, and the so many likeliest ones of each."""
        with self._errors():
            return likelihoods(logits[self._longs(list(rows))], tokens, tops)

    def _clear_tails(self, chunks: Sequence[Chunk]) -> None:
        """Zero each block that is a sequence's newest and last.

        Decoding reads its tail under a mask, which does not hide a NaN that the block's holder before left there. The
        blocks before it are written whole before they are read. Guesses may begin a block and not fill it.
        """
        size = self.cache.block_size
        fresh = [chunk.blocks[-1] for chunk in chunks if chunk.fresh]
        fresh += [
            c.blocks[position // size]
            for c in chunks
            if not c.fresh and len(c.tokens) == 1 + c.guessed
            for position in range(c.start + -c.start % size, c.start + len(c.tokens), size)
        ]
        if fresh:
            self.cache.clear(self._longs(fresh))

    def _longs(self, values: list[int]) -> Tensor:
        return uploaded(values, torch.long, self._device)

    def _tables(self, rows: Rows) -> Tables:
        numbers = self._longs([*rows.starts, *rows.lengths, *rows.blocks])
        starts, lengths, blocks = torch.split(numbers, [len(rows), len(rows), len(rows.blocks)])
        return Tables(blocks, starts, lengths, max(rows.lengths), self.cache.block_size)

    def _slots(self, chunk: Chunk) -> list[int]:
        size = self.cache.block_size
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
        most = -(-longest // self.cache.block_size)
        padding = self.cache.padding_block
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
        width = -(-length // self.cache.block_size)
        return PrefillSpan(end - size, end, length, blocks=self._longs(list(chunk.blocks[:width])))
