"""US social security numbers among groups of digits.

Source: ssa.gov, "SSN randomization": no area 000, 666 or from 900 on, no group 00, no serial 0000.
"""

from __future__ import annotations

import re

from gateway.detectors.digits import BLANKS, SPACE, STOP, Run, Shape, Window, shaped
from gateway.detectors.words import NUMBERED, SSN

_SHAPE = (3, 2, 4)
# An RE2 pattern that fires wherever groups have these sizes.
HINT = shaped((_SHAPE,))
_PART = re.compile(rb"[0-9A-Za-z][\-./]\Z")
_HARD = frozenset((b"-", b".", b"/"))
_JOINTS = _HARD | BLANKS


def issued(digits: bytes) -> bool:
    """Whether the Social Security Administration could have issued it."""
    area = digits[:3]
    return area not in (b"000", b"666") and area[0] != ord("9") and digits[3:5] != b"00" and digits[5:] != b"0000"


def windows(shape: Shape) -> tuple[Window, ...]:
    """What has the shape of one."""
    return tuple((first, first + 2, _apart) for first in _shaped(shape) if _together(shape, first))


def windows_after_a_word(shape: Shape) -> tuple[Window, ...]:
    """The same, and others with as many digits, where a word for them stands somewhere in the text."""
    sizes = shape.sizes
    found: list[Window] = []
    for first in range(len(sizes)):
        if sizes[first : first + 3] == _SHAPE:
            found.append((first, first + 2, _apart_or_named if _together(shape, first) else _named))
            continue
        last, total = first, sizes[first]
        while total < 9 and last + 1 < len(sizes):
            last += 1
            total += sizes[last]
        if total == 9:
            found.append((first, last, _named))
    return tuple(found)


def _shaped(shape: Shape) -> list[int]:
    sizes = shape.sizes
    return [first for first in range(len(sizes) - 2) if sizes[first : first + 3] == _SHAPE]


def _together(shape: Shape, first: int) -> bool:
    """Whether the groups belong together more than with those around them."""
    joint = shape.joints[first]
    if joint not in _JOINTS or shape.joints[first + 1] != joint:
        return False
    around = {shape.before(first), shape.after(first + 2)}
    return around.isdisjoint(shape.loose[first : first + 2]) and not (
        joint == SPACE and any(sign.rstrip() in _HARD for sign in around - {STOP})
    )


def _named(run: Run, first: int, last: int) -> bool:
    return SSN.before(run.text, run.start(first))


def _apart_or_named(run: Run, first: int, last: int) -> bool:
    return _apart(run, first, last) or _named(run, first, last)


def _apart(run: Run, first: int, last: int) -> bool:
    """Whether they are no part of something that begins before them, and have no other name."""
    if _PART.search(run.sign(first)):
        return False
    return run.joints[first] == b"-" or not NUMBERED.name(run.text, run.start(first))
