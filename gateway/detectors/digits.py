"""Groups of digits that stand close together, as one number may: `4111-1111 1111/1111`, `"4111", "1111"`, `(030) 1234`.

Owns what may stand between two groups. Refuses to know what numbers there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate

from gateway.detectors.base import Place

# Between two groups: up to eight signs; where there is markup, a tag, an entity or an escaped line break is one of them.
_PLAIN = re.compile(rb"\d(?:[^0-9A-Za-z]{0,8}+\d){6,}+")
_SIGN = r"(?:[^0-9A-Za-z<&\\]|<(?:/?[a-z]+>)?|&(?:nbsp;)?|\\[nrt]?)"
_MARKED = re.compile(rb"\d(?:" + _SIGN.encode() + rb"{0,8}+\d){6,}+")
_GROUP = re.compile(rb"(\d+)")
# An RE2 pattern that fires wherever there is a run.
HINT = rf"\d(?:{_SIGN}{{0,8}}\d){{6}}"
LEAST = 7  # digits in a run

SPACE, BREAK = b" ", b"\n"
_JOINTS = {
    one + two: (one + two).strip() or (BREAK if b"\n" in one + two else SPACE)
    for one in (b" ", b"-", b".", b"/", b"(", b")", b"\n", b",")
    for two in (b"", b" ", b"-", b"(", b")")
}


class Run:
    """Groups in a row: their digits and sizes, and what joins each to the next one: the signs between them without white
    space, or a space, or a line break where there is one and nothing else. Not changed once made."""

    __slots__ = ("_begin", "_bounds", "_pieces", "digits", "joints", "sizes", "text")

    def __init__(
        self, text: bytes, begin: int, pieces: list[bytes], digits: list[bytes], sizes: tuple[int, ...]
    ) -> None:
        """`pieces` are what stands from `begin` on: nothing or signs, and groups of digits, in turn."""
        self.text = text
        self._begin = begin
        self._bounds: list[int] | None = None
        self._pieces = pieces
        self.digits = digits
        self.sizes = sizes
        self.joints = [_JOINTS.get(piece) or _joint(piece) for piece in pieces[2:-1:2]]

    @property
    def length(self) -> int:
        """Bytes from the first group to the last."""
        return sum(map(len, self._pieces))

    def place(self, first: int, last: int) -> Place:
        """Where the groups `first` to `last`, the latter included, stand in the text."""
        bounds = self._bounds
        if bounds is None:
            bounds = self._bounds = list(accumulate(map(len, self._pieces), initial=self._begin))
        return bounds[2 * first + 1], bounds[2 * last + 2]

    def together(self, first: int, last: int) -> bytes:
        """The digits of those groups."""
        return b"".join(self.digits[first : last + 1])

    def sign(self, group: int) -> bytes:
        """The last three bytes before a group."""
        if group:
            return (self.digits[group - 1] + self._pieces[2 * group])[-3:]
        return self.text[max(0, self._begin - 3) : self._begin]

    def before(self, first: int) -> bytes:
        """What joins a group to the one before it; nothing where it is the first."""
        return self.joints[first - 1] if first else b""

    def after(self, last: int) -> bytes:
        """What joins a group to the one after it; nothing where it is the last."""
        return self.joints[last] if last < len(self.joints) else b""

    def glued(self, first: int, last: int) -> bool:
        """Whether a letter touches the groups."""
        text, begin = self.text, self._begin
        if first == 0 and begin and text[begin - 1 : begin].isalpha():
            return True
        if last < len(self.joints):
            return False
        end = begin + self.length
        return text[end : end + 1].isalpha()

    def mended(self) -> Run:
        """The same with groups that a line break parts as one: it may have split one in two. Line breaks count as
        digits in `place`."""
        pieces = self._pieces[:2]
        for joint, between, group in zip(self.joints, self._pieces[2:-1:2], self.digits[1:], strict=True):
            if joint == BREAK:
                pieces[-1] += between + group
            else:
                pieces += (between, group)
        digits = [bytes(filter(_IS_DIGIT, group)) for group in pieces[1::2]]
        return Run(self.text, self._begin, [*pieces, b""], digits, tuple(map(len, digits)))


def runs(text: bytes) -> Iterator[tuple[Place, list[bytes]]]:
    """All runs of at least `LEAST` digits: where they stand, and their pieces as `Run` wants them."""
    marked = b"<" in text or b"&" in text or b"\\" in text
    for found in (_MARKED if marked else _PLAIN).finditer(text):
        yield found.span(), _GROUP.split(found[0])


def _joint(between: bytes) -> bytes:
    return b"".join(between.split()) or (BREAK if BREAK in between else SPACE)


_IS_DIGIT = frozenset(b"0123456789").__contains__
