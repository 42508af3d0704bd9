"""Phone numbers among groups of digits: with a country's code, in the notation of a country, or after a word for them.

Source of the country codes: ITU-T E.164, list of assigned codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from gateway.detectors.base import Place
from gateway.detectors.digits import (
    BLANKS,
    BREAK,
    LEAST,
    LOOSENED,
    MOST_SIGNS,
    SPACE,
    STOP,
    Groups,
    Run,
    Shape,
    more,
    shaped,
)
from gateway.detectors.words import NUMBERED, PHONE

_CALLING_CODE = re.compile(
    rb"1|7|2[07]|3[0-469]|4[0-13-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|2[1-69]\d|35\d|37\d|38\d|42\d|50\d|59\d|6[7-9]\d|8[058]\d|9[679]\d"
)
_SIGNS = b"-./()"
_EXTENSION = re.compile(rb"[xX]\d|ext")
_PLUS = re.compile(rb"(?:^|[^0-9A-Za-z+])\+\(?\Z")
_PART = re.compile(rb"[A-Za-z]\Z|[0-9A-Za-z][\-./+]\Z|[0-9A-Fa-f]{2}:\Z")
_ZERO, _PLUS_SIGN, _BRACKET, _CLOSING = b"0+()"
MOST = 15  # digits, by E.164

_NO_PHONES = frozenset(((2, 2, 4), (2, 1, 4), (3, 2, 4), (5, 4)))  # dates, no social security numbers, ZIP codes

_OLDER = [[b"/", b"-"], [b"/", b"."]]  # 415/555-2671

_WHATEVER = ((3, 3, 4), (3, 3, 2, 2), (3, 4, 4))
# RE2 patterns that fire wherever such a number may be.
_SIGN = "[^0-9A-Za-z]"
_OTHER = r"[^0-9A-Za-z\s\-./():]"  # what joins no two groups of a number
HINT = "|".join(
    (
        shaped(_WHATEVER),
        rf"(?:^|[^0-9A-Za-z+])\+\(?\d{more(7)}",
        rf"\(\d{{2,5}}\s*\){more(4)}",
        rf"\(0{more(7)}",
        rf"(?:^|[A-Za-z]|{_OTHER}|:\s*[^0-9A-Za-z\s]|[^0-9A-Za-z\s]\s*:|[\n\t]|[\-./()]\s|\s[\-./()]|{_SIGN}{{{MOST_SIGNS + 1}}}){_SIGN}*0{more(8)}",
    )
)


class Layout:
    """What of a shape matters to phone numbers: of each group, whether it is joined closely to the next one, and the last
    one that could belong to a number that it begins; and which groups may begin one, by the digits up to there. Not
    changed once made."""

    __slots__ = ("close", "firsts", "reach")

    def __init__(self, shape: Shape) -> None:
        self.close = [*_close(shape), False]
        self.reach = [_reach(shape, self.close, first) for first in range(len(shape.sizes))]
        digits = shape.offsets
        self.firsts = [first for first, last in enumerate(self.reach) if digits[last + 1] - digits[first] >= LEAST]


def _close(shape: Shape) -> list[bool]:
    """Of each joint, whether it joins closely: no stop at the end of a sentence, and of dashes and slashes with a space
    none that has one without a space beside it."""
    tight = [joint in LOOSENED for joint in shape.loose]
    return [
        _hard(joint) and (joint == loose or (loose != STOP and not any(tight[max(0, place - 1) : place + 2])))
        for place, (joint, loose) in enumerate(zip(shape.joints, shape.loose, strict=True))
    ]


def _reach(shape: Shape, close: Sequence[bool], first: int) -> int:
    """The last group that could belong to a number that begins with `first`."""
    joints, sizes = shape.joints, shape.sizes
    last, total = first, sizes[first]
    while (
        last < len(joints)
        and (close[last] or joints[last] in BLANKS or shape.loose[last] == STOP)
        and total + sizes[last + 1] <= MOST + 2
    ):
        last += 1
        total += sizes[last]
    return last


def groups(run: Run, layout: Layout, worded: bool) -> Iterator[Groups]:
    """The first and last groups of each. `worded`: a word for phones stands in the text."""
    free = 0
    for first in layout.firsts:
        if first < free:
            continue
        last = _last_of_phone(run, layout, first, worded, first == free > 0)
        if last is not None:
            yield first, last
            free = last + 1


def place(run: Run, first: int, last: int) -> Place:
    """Where a number stands, with what shows that it is one."""
    start, end = run.place(first, last)
    while run.text[start - 1 : start] in (b"+", b"("):
        start -= 1
    return start, end


@lru_cache(maxsize=4096)
def _is_plus(sign: bytes) -> bool:
    return _PLUS.search(sign) is not None


@lru_cache(maxsize=4096)
def _is_part(sign: bytes) -> bool:
    return _PART.search(sign) is not None


def _hard(joint: bytes) -> bool:
    """Whether groups are joined closely: by dashes, dots, slashes or brackets."""
    return joint not in BLANKS and joint != b"" and not joint.strip(_SIGNS)


def _within(run: Run, layout: Layout, first: int, sign: bytes) -> bool:
    """Whether a group is part of something that began before it."""
    if sign.endswith(b"("):
        return False
    if first and not sign.endswith(b"+"):
        if run.joints[first - 1] == b")" and sign[-1:].isspace() and not run.sign(first - 1).endswith(b"("):
            return False  # it numbers a list
        return layout.close[first - 1] or run.joints[first - 1] == b":"
    return _is_part(sign)


def _last_of_phone(run: Run, layout: Layout, first: int, worded: bool, after_another: bool) -> int | None:
    sign, digits = run.sign(first), run.together(first, first)
    zero = digits[0] == _ZERO
    # Those of `_by_shape` and of North America begin with one digit or three.
    candidate = worded or zero or len(digits) in (1, 3) or _PLUS_SIGN in sign or _BRACKET in sign
    if not candidate or _within(run, layout, first, sign):
        return None
    reach = layout.reach[first]
    if _PLUS_SIGN in sign and _is_plus(sign):
        return _international(run, layout, first, reach)
    last = None
    if zero and (first == 0 or run.joints[first - 1] != SPACE or after_another):  # not one of several in a row
        if digits.startswith(b"00") and digits[2:3] != b"0":
            last = _international(run, layout, first, reach, 2, worded)
        elif digits[1:2] != b"0":
            last = _with_trunk_prefix(run, layout, first, reach, sign)
    if last is None and reach > first:
        last = _north_american(run, layout, first, reach)
        if last is None:
            last = _by_shape(run, layout, first, reach, sign)
    if last is not None and NUMBERED.name(run.text, run.start(first)):
        last = None
    if last is None and worded:
        last = _named(run, layout, first, reach)
    return last


def _end(run: Run, layout: Layout, first: int, reach: int, least: int, most: int) -> int | None:
    """Where a number of so many digits ends, the longest one: not within what is joined closely."""
    sizes, close = run.sizes, layout.close
    total, end = 0, None
    for last in range(first, reach + 1):
        total += sizes[last]
        if total > most:
            break
        if total >= least and not (close[last] or _glued(run, last)):
            end = last
    return end


def _glued(run: Run, last: int) -> bool:
    """Whether a letter follows, but for that of an extension."""
    text, end = run.text, run.end
    return last + 1 == len(run.sizes) and text[end : end + 1].isalpha() and _EXTENSION.match(text, end) is None


def _international(
    run: Run, layout: Layout, first: int, reach: int, prefix: int = 0, worded: bool = True
) -> int | None:
    code = run.together(first, first)[prefix:] or (run.together(first + 1, first + 1) if first < reach else b"")
    if not _CALLING_CODE.match(code):
        return None
    last = _end(run, layout, first, reach, 8 + prefix, MOST + prefix)
    if last == first and prefix:
        return last if worded and _follows_a_word(run, first) else None
    if last == first + 1 and run.joints[first] == b"." and run.sizes[first] < 4:
        return None  # a decimal fraction
    return last


def _with_trunk_prefix(run: Run, layout: Layout, first: int, reach: int, sign: bytes) -> int | None:
    following = run.shape.after(first).rstrip()
    if run.sizes[first] < 2 and following != b"(":
        return None
    if run.sizes[first : first + 3] in _NO_PHONES and layout.close[first]:
        return None
    last = _end(run, layout, first, reach, 9 if not sign.endswith(b"(") else 8, 13 if following == b"/" else 12)
    if last is None or last == first or run.sizes[first : last + 1] in _NO_PHONES:
        return None
    fraction = last == first + 1 and run.joints[first] == b"." and not run.together(last, last).strip(b"0")
    return None if fraction else last


def _north_american(run: Run, layout: Layout, first: int, reach: int) -> int | None:
    start = first + 1 if run.together(first, first) == b"1" else first
    last = start + 2
    if last > reach or run.sizes[start : last + 1] != (3, 3, 4) or _glued(run, last):
        return None
    if run.together(start, start)[0] < 50 or run.together(start + 1, start + 1)[0] < 50:  # neither begins with 0 or 1
        return None
    inner, outer = run.joints[start:last], {run.shape.before(first), run.shape.after(last)}
    if inner[0] != inner[1] and inner not in _OLDER and inner[0] != SPACE and _CLOSING not in inner[0]:
        return None
    if SPACE in inner and b")" not in inner and SPACE in outer and BREAK not in inner:
        return None  # one of several numbers in a row
    return None if layout.close[last] or inner[1] in outer - BLANKS else last


def _by_shape(run: Run, layout: Layout, first: int, reach: int, sign: bytes) -> int | None:
    """Notations that are nothing else's: an area code in brackets, Russian and Chinese numbers."""
    digits, sizes = run.together(first, first), run.sizes
    if (
        sign.endswith(b"(")
        and run.joints[first][:1] == b")"
        and 2 <= sizes[first] <= 5
        and digits[:2] not in (b"19", b"20")
    ):
        return _end(run, layout, first, reach, 9, 11)
    if digits == b"8" and sizes[first + 1 : first + 5] == (3, 3, 2, 2):
        return first + 4 if first + 4 <= reach else None
    if digits == b"8" and sizes[first + 1 : first + 4] == (3, 3, 4):
        return first + 3 if first + 3 <= reach else None
    if sizes[first : first + 4] == (3, 3, 2, 2) and first + 3 <= reach and not layout.close[first + 3]:
        return first + 3
    if (
        sizes[first : first + 3] == (3, 4, 4)
        and digits[:1] == b"1"
        and digits[1] > 50
        and first + 2 <= reach
        and run.shape.after(first + 2) in (b"", BREAK, STOP)
    ):
        return first + 2
    return None


def _named(run: Run, layout: Layout, first: int, reach: int) -> int | None:
    last = _end(run, layout, first, reach, LEAST, MOST)
    if last is None or not (_follows_a_word(run, first) or PHONE.after(run.text, run.place(first, last)[1])):
        return None
    return last


def _follows_a_word(run: Run, first: int) -> bool:
    """Whether a word for phones stands before, and none for other numbers between."""
    start = run.start(first)
    return PHONE.before(run.text, start) and not NUMBERED.name(run.text, start)
