"""US social security numbers among groups of digits.

Source: ssa.gov, "SSN randomization": no area 000, 666 or from 900 on, no group 00, no serial 0000.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gateway.detectors.digits import BREAK, SPACE, Groups, Run, shaped
from gateway.detectors.words import NUMBERED, SSN

_SHAPE = (3, 2, 4)
# An RE2 pattern that fires wherever groups have these sizes.
HINT = shaped((_SHAPE,))
_PART = re.compile(rb"[0-9A-Za-z][\-./]\Z")
_HARD = frozenset((b"-", b".", b"/"))
_JOINTS = _HARD | {SPACE, BREAK}


def issued(digits: bytes) -> bool:
    """Whether the Social Security Administration could have issued it."""
    area = digits[:3]
    return area not in (b"000", b"666") and area[0] != ord("9") and digits[3:5] != b"00" and digits[5:] != b"0000"


Window = tuple[int, int, bool]


def windows(sizes: tuple[int, ...]) -> tuple[Window, ...]:
    """The first and last groups of what has the shape of one, and that it has."""
    return tuple((first, first + 2, True) for first in range(len(sizes) - 2) if sizes[first : first + 3] == _SHAPE)


def windows_after_a_word(sizes: tuple[int, ...]) -> tuple[Window, ...]:
    """The same, and others with as many digits."""
    found: list[Window] = []
    for first in range(len(sizes)):
        if sizes[first : first + 3] == _SHAPE:
            found.append((first, first + 2, True))
            continue
        last, total = first, sizes[first]
        while total < 9 and last + 1 < len(sizes):
            last += 1
            total += sizes[last]
        if total == 9:
            found.append((first, last, False))
    return tuple(found)


def groups(run: Run, known: Sequence[Window], worded: bool) -> list[Groups]:
    """The first and last groups of each. `known`: the windows of its sizes. `worded`: a word for them stands somewhere
    in the text."""
    found: list[Groups] = []
    free = 0
    for first, last, by_shape in known:
        if (
            first >= free
            and issued(run.together(first, last))
            and not run.glued(first, last)
            and ((by_shape and _apart(run, first, last)) or (worded and SSN.before(run.text, run.start(first))))
        ):
            found.append((first, last))
            free = last + 1
    return found


def _apart(run: Run, first: int, last: int) -> bool:
    """Whether the groups belong together more than with those around them."""
    joint = run.joints[first]
    if joint not in _JOINTS or run.joints[first + 1] != joint:
        return False
    around = run.before(first), run.after(last)
    if joint in around or (joint == SPACE and not _HARD.isdisjoint(around)):
        return False
    if _PART.search(run.sign(first)):
        return False
    return joint == b"-" or not NUMBERED.name(run.text, run.start(first))
