"""US social security numbers among groups of digits.

Source: ssa.gov, "SSN randomization": no area 000, 666 or from 900 on, no group 00, no serial 0000.
"""

from __future__ import annotations

import re

from gateway.detectors.digits import BREAK, SPACE, Run
from gateway.detectors.words import NUMBERED, SSN

_SHAPE = (3, 2, 4)
_PART = re.compile(rb"[0-9A-Za-z][\-./]\Z")
_JOINTS = frozenset((SPACE, BREAK, b"-", b".", b"/"))


def issued(digits: bytes) -> bool:
    """Whether the Social Security Administration could have issued it."""
    area = digits[:3]
    return area not in (b"000", b"666") and area[0] != ord("9") and digits[3:5] != b"00" and digits[5:] != b"0000"


def possible(sizes: tuple[int, ...]) -> bool:
    """Whether groups of these sizes may be one."""
    return sizes == _SHAPE


def possible_after_a_word(sizes: tuple[int, ...]) -> bool:
    """Whether they may be one where a word says so."""
    return sum(sizes) == 9


def groups(run: Run, worded: bool) -> list[tuple[int, int]]:
    """The first and last groups of each. `worded`: a word for them stands somewhere in the text."""
    sizes = run.sizes
    found: list[tuple[int, int]] = []
    first = 0
    while first < len(sizes):
        last = first + 2
        if sizes[first : last + 1] == _SHAPE:
            if (
                issued(run.together(first, last))
                and not run.glued(first, last)
                and (_apart(run, first, last) or (worded and _named(run, first)))
            ):
                found.append((first, last))
                first = last
        elif worded:
            last = first
            while last < len(sizes) - 1 and sum(sizes[first : last + 1]) < 9:
                last += 1
            if (
                sum(sizes[first : last + 1]) == 9
                and issued(run.together(first, last))
                and not run.glued(first, last)
                and _named(run, first)
            ):
                found.append((first, last))
                first = last
        first += 1
    return found


def _named(run: Run, first: int) -> bool:
    return SSN.before(run.text, run.place(first, first)[0])


def _apart(run: Run, first: int, last: int) -> bool:
    """Whether the groups belong together more than with those around them."""
    joint = run.joints[first]
    if joint not in _JOINTS or run.joints[first + 1] != joint:
        return False
    around = {run.before(first), run.after(last)}
    if joint in around or (joint == SPACE and not around.isdisjoint((b"-", b".", b"/"))):
        return False
    if _PART.search(run.sign(first)):
        return False
    return joint == b"-" or not NUMBERED.name(run.text, run.place(first, first)[0])
