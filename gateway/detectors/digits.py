"""Groups of digits that stand close together, as one number may: `4111-1111 1111/1111`, `"4111", "1111"`, `(030) 1234`.

Owns what may stand between two groups. Refuses to know what numbers there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from gateway.detectors.base import Place

# Between two groups: up to eight signs; where there is markup, a tag, an entity or an escaped line break is one of them.
_SIGN = r"(?:[^0-9A-Za-z<&\\]|<(?:/?[a-z]+>)?|&(?:nbsp;)?|\\[nrt]?)"
MOST_SIGNS = 8
LEAST = 7  # digits in a run that may be anything
_RUNS = re.compile(rb"\d++(?:%s{1,%d}+\d++)++|\d{%d,}+" % (_SIGN.encode(), MOST_SIGNS, LEAST))
# Where there is no markup, most runs are all from one letter to the next, and found in a third of the time.
_UNLETTERED = re.compile(rb"\d[^A-Za-z]{%d,}(?<=\d)" % (LEAST - 1))
_SEPARATED = re.compile(rb"[^0-9]{%d}" % (MOST_SIGNS + 1))
_GROUP = re.compile(rb"(\d+)")
# RE2 patterns: what may stand between two groups, or more; and one that fires wherever there is a run.
GAP = f"{_SIGN}+"
HINT = rf"\d(?:{_SIGN}{{0,{MOST_SIGNS}}}\d){{{LEAST - 1}}}"


def more(digits: int) -> str:
    """RE2: so many digits more of a run."""
    return rf"(?:{_SIGN}*\d){{{digits}}}"


def shaped(shapes: Iterable[tuple[int, ...]]) -> str:
    """RE2: groups of these sizes."""
    written = sorted({GAP.join(rf"\d{{{size}}}" for size in shape) for shape in shapes})
    return rf"(?:^|[^0-9])(?:{'|'.join(written)})(?:[^0-9]|$)"


_LESS, _AND, _BACKSLASH, LINE_END = b"<&\\\n"
_DIGITS = b"0123456789"
_SPACED = bytes(code if code in _DIGITS else 32 for code in range(256))

Groups = tuple[int, int]  # the first and the last of some
SPACE, BREAK = b" ", b"\n"
_JOINTS = {
    before + one + after: one.strip() + after.strip() or (BREAK if one == b"\n" else SPACE)
    for before in (b"", b" ")
    for one in (b" ", b"-", b".", b"/", b"(", b")", b"\n", b",")
    for after in (b"", b" ", b"-", b"(", b")")
}


def marked(text: bytes) -> bool:
    """Whether there may be tags, entities and escapes in a text."""
    # The codes of signs: looking for `b"<"`, Python first makes an error of its not being a number.
    return _LESS in text or _AND in text or _BACKSLASH in text


def stretches(text: bytes) -> Iterator[re.Match[bytes]]:
    """What holds all runs of groups of digits, one each: but for those that `parts` takes apart."""
    return (_RUNS if marked(text) else _UNLETTERED).finditer(text)


def groups(stretch: bytes) -> list[bytes]:
    """The groups of digits in it."""
    return stretch.translate(_SPACED).split()


def parts(text: bytes, begin: int, end: int) -> Iterator[re.Match[bytes]] | None:
    """The runs of a stretch where these are several: more than eight signs stand between two of them."""
    if _SEPARATED.search(text, begin, end) is None or marked(text):
        return None
    return _RUNS.finditer(text, begin, end)


class Run:
    """Groups in a row: their digits and sizes, and what joins each to the next one: the signs between them without white
    space, or a space, or a line break where there is one and nothing else. Not changed once made; what takes time is
    found out when it is asked for: most runs are nothing by their digits alone."""

    __slots__ = ("_bounds", "_joints", "_pieces", "begin", "digits", "end", "sizes", "text")

    def __init__(self, text: bytes, begin: int, end: int, digits: list[bytes], sizes: tuple[int, ...]) -> None:
        self.text = text
        self.begin = begin
        self.end = end
        self.digits = digits
        self.sizes = sizes
        self._joints: list[bytes] | None = None
        self._pieces: list[bytes] | None = None
        self._bounds: list[int] | None = None

    @property
    def pieces(self) -> list[bytes]:
        """Nothing, then the groups with what stands between them, then nothing."""
        if self._pieces is None:
            self._pieces = _GROUP.split(self.text[self.begin : self.end])
        return self._pieces

    @property
    def joints(self) -> list[bytes]:
        """What joins each group but the last to the next one."""
        if self._joints is None:
            signs = self.text[self.begin : self.end].translate(None, _DIGITS)
            if len(signs) + 1 == len(self.sizes):
                self._joints = [_JOINT_OF_SIGN[sign] for sign in signs]
            else:
                self._joints = [_JOINTS.get(piece) or _joint(piece) for piece in self.pieces[2:-1:2]]
        return self._joints

    def place(self, first: int, last: int) -> Place:
        """Where the groups `first` to `last`, the latter included, stand in the text."""
        bounds = self._bounds
        if bounds is None:
            bounds = self._bounds = list(accumulate(map(len, self.pieces), initial=self.begin))
        return bounds[2 * first + 1], bounds[2 * last + 2]

    def start(self, first: int) -> int:
        """Where a group begins."""
        return self.place(first, first)[0] if first else self.begin

    def together(self, first: int, last: int) -> bytes:
        """The digits of those groups."""
        return self.digits[first] if first == last else b"".join(self.digits[first : last + 1])

    def sign(self, group: int) -> bytes:
        """The last three bytes before a group."""
        if group:
            return (self.digits[group - 1] + self.pieces[2 * group])[-3:]
        return self.text[max(0, self.begin - 3) : self.begin]

    def before(self, first: int) -> bytes:
        """What joins a group to the one before it; nothing where it is the first."""
        return self.joints[first - 1] if first else b""

    def after(self, last: int) -> bytes:
        """What joins a group to the one after it; nothing where it is the last."""
        return self.joints[last] if last + 1 < len(self.sizes) else b""

    def glued(self, first: int, last: int) -> bool:
        """Whether a letter touches the groups."""
        text, begin, end = self.text, self.begin, self.end
        if first == 0 and begin and text[begin - 1 : begin].isalpha():
            return True
        return last + 1 == len(self.sizes) and text[end : end + 1].isalpha()

    def mended(self) -> Run:
        """The same with groups that a line break parts as one: it may have split one in two. Line breaks count as
        digits in `place`."""
        pieces = self.pieces[:2]
        for joint, between, group in zip(self.joints, self.pieces[2:-1:2], self.digits[1:], strict=True):
            if joint == BREAK:
                pieces[-1] += between + group
            else:
                pieces += (between, group)
        digits = [b"".join(groups(group)) for group in pieces[1::2]]
        mended = Run(self.text, self.begin, self.end, digits, tuple(map(len, digits)))
        mended._pieces = [*pieces, b""]
        mended._joints = [joint for joint in self.joints if joint != BREAK]
        return mended


def _joint(between: bytes) -> bytes:
    return b"".join(between.split()) or (BREAK if BREAK in between else SPACE)


_JOINT_OF_SIGN = [_joint(bytes((code,))) for code in range(256)]


# The first and the last groups of what may be a number by its sizes, and whether what stands around them makes it one.
Fits = Callable[[Run, int, int], bool]
Window = tuple[int, int, Fits]


def fitting(run: Run, windows: Iterable[Window], valid: Callable[[bytes], bool]) -> list[Groups]:
    """The first of the windows that fit, no two of which have a group in common: their digits are `valid`, and no
    letter touches them."""
    found: list[Groups] = []
    free = 0
    for first, last, fits in windows:
        if first >= free and valid(run.together(first, last)) and not run.glued(first, last) and fits(run, first, last):
            found.append((first, last))
            free = last + 1
    return found
