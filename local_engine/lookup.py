"""Owns guesses from a sequence's own tokens: what followed the last time that it ended as it does now; refuses models.

Prompt lookup decoding (Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding): answers that quote their
prompt, or themselves, are guessed for nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import cycle, islice

from local_engine.speculation import Ask

LONGEST, SHORTEST = 5, 3
"""Tokens that must have come before in the same order. Fewer are right too rarely."""

_TYPE = "i"
_BYTES = array(_TYPE).itemsize


class PromptLookup:
    """Looks for the last place before the end that is like the end. Bytes are searched, which costs microseconds."""

    def __init__(self) -> None:
        self._bytes: dict[str, bytearray] = {}  # of the sequences that were asked about last

    def guess(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        """As Drafter says."""
        self._bytes = {ask.id: self._grown(ask) for ask in asks}
        return [self._guess(ask, self._bytes[ask.id]) for ask in asks]

    def _grown(self, ask: Ask) -> bytearray:
        known = self._bytes.get(ask.id, bytearray())
        known += array(_TYPE, ask.tokens[len(known) // _BYTES :]).tobytes()
        return known

    def _guess(self, ask: Ask, text: bytearray) -> tuple[int, ...]:
        for size in range(min(LONGEST, len(ask.tokens) - 1), SHORTEST - 1, -1):
            end = text[-size * _BYTES :]
            for place in _places(text, end):
                # What follows may run into the end itself: then it goes on as it did from there.
                return tuple(islice(cycle(ask.tokens[place + size :]), ask.size))
        return ()


def _places(text: bytearray, end: bytearray) -> Iterator[int]:
    """Tokens before each earlier place of `end` in `text`, the last one first."""
    found = len(text) - len(end)
    while (found := text.rfind(end, 0, found + len(end) - 1)) >= 0:
        if found % _BYTES == 0:
            yield found // _BYTES
