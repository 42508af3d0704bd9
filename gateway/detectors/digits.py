"""Groups of digits that stand close together, as one number may: `4111-1111 1111/1111`, `"4111", "1111"`, `(030) 1234`.

Owns what may stand between two groups. Refuses to know what numbers there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from gateway.detectors.base import Place

# Between two groups: up to eight signs; where there is markup, a tag, an entity or an escaped line break is one of them.
SIGN = r"(?:[^0-9A-Za-z<&\\]|<(?:/?[a-z]+>)?|&(?:nbsp;)?|\\[nrt]?)"
MOST_SIGNS = 8
LEAST = 7  # digits in a run that may be anything
# The groups repeat without `++`: Python before 3.11.5 loses such matches (its issue 106052).
_RUNS = re.compile(rb"\d++(?:%s{1,%d}+\d++)+|\d{%d,}+" % (SIGN.encode(), MOST_SIGNS, LEAST))
# Where there is no markup, most runs are all from one letter to the next, and found in a third of the time.
_UNLETTERED = re.compile(rb"\d[^A-Za-z]{%d,}(?<=\d)" % (LEAST - 1))
_SEPARATED = re.compile(rb"[^0-9]{%d}" % (MOST_SIGNS + 1))
_GROUP = re.compile(rb"(\d+)")
# RE2 patterns: what may stand between two groups, or more; and one that fires wherever there is a run.
GAP = f"{SIGN}+"
HINT = rf"\d(?:{SIGN}{{0,{MOST_SIGNS}}}\d){{{LEAST - 1}}}"


def more(digits: int) -> str:
    """RE2: so many digits more of a run."""
    return rf"(?:{SIGN}*\d){{{digits}}}"


def shaped(shapes: Iterable[tuple[int, ...]]) -> str:
    """RE2: groups of these sizes."""
    written = sorted({GAP.join(rf"\d{{{size}}}" for size in shape) for shape in shapes})
    return rf"(?:^|[^0-9])(?:{'|'.join(written)})(?:[^0-9]|$)"


_LESS, _AND, _BACKSLASH = b"<&\\"
_DIGITS = b"0123456789"
NO_DIGITS = bytes(code for code in range(256) if code not in _DIGITS)
_SPACED = bytes(code if code in _DIGITS else 32 for code in range(256))
_LETTER = [bytes((code,)).isalpha() for code in range(256)]
ALIKE = bytes(48 if code in _DIGITS else code for code in range(256))

Groups = tuple[int, int]  # the first and the last of some
SPACE, BREAK, COLUMN = b" ", b"\n", b"\t"
BLANKS = frozenset((SPACE, BREAK, COLUMN))
STOP = b". "  # as in `Shape.loose`
LOOSENED = frozenset((b"-", b".", b"/"))
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


def stretches(text: bytes, tagged: bool) -> Iterator[re.Match[bytes]]:
    """What holds all runs of groups of digits, one each: but for those that `parts` takes apart. `tagged`: whether the
    text is `marked`."""
    return (_RUNS if tagged else _UNLETTERED).finditer(text)


def apart(stretch: bytes) -> bool:
    """Whether there may be several runs in it: more than eight signs stand between two groups."""
    return _SEPARATED.search(stretch) is not None


def parts(text: bytes, begin: int, end: int) -> Iterator[re.Match[bytes]]:
    """The runs of a stretch where these are several."""
    return _RUNS.finditer(text, begin, end)


class Shape:
    """How a run of groups is written, whatever its digits are: the sizes of the groups, and what joins each to the next
    one: the signs between them without white space, or a line break, a tab or a space where there is nothing else.
    Not changed once made; what takes time is found out when it is asked for."""

    __slots__ = ("_joints", "_loose", "_mended", "_pieces", "_places", "offsets", "sizes", "written")

    def __init__(self, written: bytes) -> None:
        """`written`: the run, translated by `ALIKE`."""
        self.written = written
        self.sizes = tuple(map(len, written.translate(_SPACED).split()))
        self.offsets = (0, *accumulate(self.sizes))  # in the digits of all groups, one after the other
        self._joints: list[bytes] | None = None
        self._loose: list[bytes] | None = None
        self._pieces: list[bytes] | None = None
        self._places: list[int] | None = None
        self._mended: Shape | None = None

    @property
    def pieces(self) -> list[bytes]:
        """Nothing, then the groups with what stands between them, then nothing."""
        if self._pieces is None:
            self._pieces = _GROUP.split(self.written)
        return self._pieces

    @property
    def joints(self) -> list[bytes]:
        """What joins each group but the last to the next one."""
        if self._joints is None:
            signs = self.written.translate(None, _DIGITS)
            if len(signs) + 1 == len(self.sizes):
                self._joints = [_JOINT_OF_SIGN[sign] for sign in signs]
            else:
                self._joints = [_JOINTS.get(piece) or _joint(piece) for piece in self.pieces[2:-1:2]]
        return self._joints

    @property
    def loose(self) -> list[bytes]:
        """The same, with a space after a dash, dot or slash that white space parts from a group: what ends a sentence or
        numbers a list (`1. 4111-1111`) joins less than what stands within a number."""
        if self._loose is None:
            between = self.pieces[2:-1:2]
            self._loose = [
                joint + SPACE if joint in LOOSENED and len(piece) > len(joint) else joint
                for joint, piece in zip(self.joints, between, strict=True)
            ]
        return self._loose

    @property
    def places(self) -> list[int]:
        """Where each of the pieces begins."""
        if self._places is None:
            self._places = list(accumulate(map(len, self.pieces), initial=0))
        return self._places

    def before(self, first: int) -> bytes:
        """What joins a group to the one before it, as in `loose`; nothing where it is the first."""
        return self.loose[first - 1] if first else b""

    def after(self, last: int) -> bytes:
        """What joins a group to the one after it, as in `loose`; nothing where it is the last."""
        return self.loose[last] if last + 1 < len(self.sizes) else b""

    def sign(self, group: int) -> bytes:
        """The last three bytes of a group but the first, and of what follows it, before the given one."""
        return (self.pieces[2 * group - 1] + self.pieces[2 * group])[-3:]

    def mended(self) -> Shape:
        """The same with groups that a line break parts as one: it may have split one in two. Line breaks count as
        digits in `places`."""
        if self._mended is None:
            pieces = self.pieces[:2]
            sizes = [self.sizes[0]]
            for joint, between, group in zip(self.joints, self.pieces[2:-1:2], self.pieces[3::2], strict=True):
                if joint == BREAK:
                    pieces[-1] += between + group
                    sizes[-1] += len(group)
                else:
                    pieces += (between, group)
                    sizes.append(len(group))
            mended = Shape(self.written)
            mended.sizes = tuple(sizes)
            mended.offsets = (0, *accumulate(sizes))
            mended._pieces = [*pieces, b""]
            mended._joints = [joint for joint in self.joints if joint != BREAK]
            mended._loose = [joint for joint in self.loose if joint != BREAK]
            self._mended = mended
        return self._mended


class Run:
    """Groups in a row where they stand in a text: their `shape` and all of their `digits`. Not changed once made."""

    __slots__ = ("begin", "digits", "end", "shape", "sizes", "text")

    def __init__(self, text: bytes, begin: int, end: int, shape: Shape, digits: bytes) -> None:
        self.text = text
        self.begin = begin
        self.end = end
        self.shape = shape
        self.sizes = shape.sizes
        self.digits = digits

    @property
    def joints(self) -> list[bytes]:
        """What joins each group but the last to the next one."""
        return self.shape.joints

    def place(self, first: int, last: int) -> Place:
        """Where the groups `first` to `last`, the latter included, stand in the text."""
        places = self.shape.places
        return self.begin + places[2 * first + 1], self.begin + places[2 * last + 2]

    def start(self, first: int) -> int:
        """Where a group begins."""
        return self.begin + self.shape.places[2 * first + 1] if first else self.begin

    def together(self, first: int, last: int) -> bytes:
        """The digits of those groups."""
        offsets = self.shape.offsets
        return self.digits[offsets[first] : offsets[last + 1]]

    def sign(self, group: int) -> bytes:
        """The last three bytes before a group, not of more than the group before it."""
        if group:
            places = self.shape.places
            start = places[2 * group + 1]
            first = max(start - 3, places[2 * group - 1])
            return self.text[self.begin + first : self.begin + start]
        return self.text[max(0, self.begin - 3) : self.begin]

    def glued(self, first: int, last: int) -> bool:
        """Whether a letter touches the groups."""
        if first == 0 and self.begin and _LETTER[self.text[self.begin - 1]]:
            return True
        end = self.end
        return last + 1 == len(self.sizes) and end < len(self.text) and _LETTER[self.text[end]]

    def mended(self) -> Run:
        """The same with groups that a line break parts as one: it may have split one in two."""
        return Run(self.text, self.begin, self.end, self.shape.mended(), self.digits)


def _joint(between: bytes) -> bytes:
    signs = b"".join(between.split())
    return signs or (BREAK if BREAK in between else COLUMN if COLUMN in between else SPACE)


_JOINT_OF_SIGN = [_joint(bytes((code,))) for code in range(256)]


# The first and the last groups of what may be a number by its shape, and whether what stands around them makes it one.
Fits = Callable[[Run, int, int], bool]
Window = tuple[int, int, Fits | None]


def fitting(run: Run, windows: Iterable[Window], valid: Callable[[bytes], bool]) -> list[Groups]:
    """The first of the windows that fit, no two of which have a group in common: their digits are `valid`, and no
    letter touches them."""
    found: list[Groups] = []
    free = 0
    for first, last, fits in windows:
        if (
            first >= free
            and valid(run.together(first, last))
            and not run.glued(first, last)
            and (fits is None or fits(run, first, last))
        ):
            found.append((first, last))
            free = last + 1
    return found
