"""Phone numbers among groups of digits: with a country's code, in the notation of a country, or after a word for them.

Source of the country codes: ITU-T E.164, list of assigned codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from gateway.detectors.base import Place
from gateway.detectors.digits import BREAK, SPACE, Run
from gateway.detectors.words import NUMBERED, PHONE

_CALLING_CODE = re.compile(
    rb"1|7|2[07]|3[0-469]|4[0-13-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|2[1-69]\d|35\d|37\d|38\d|42\d|50\d|59\d|6[7-9]\d|8[058]\d|9[679]\d"
)
_SOFT = frozenset((SPACE, BREAK))
_SIGNS = b"-./()"
_EXTENSION = re.compile(rb"[xX]\d|ext")
_PLUS = re.compile(rb"(?:^|[^0-9A-Za-z+])\+\(?\Z")
_PART = re.compile(rb"[A-Za-z]\Z|[0-9A-Za-z][\-./+]\Z|[0-9A-Fa-f]{2}:\Z")
_ZERO = ord("0")
MOST = 15  # digits, by E.164

_NO_PHONES = frozenset(((2, 2, 4), (2, 1, 4), (3, 2, 4), (5, 4)))  # dates, no social security numbers, ZIP codes

_Groups = tuple[int, int]


def possible(sizes: tuple[int, ...]) -> bool:
    """Whether groups of these sizes may be a number, whatever they begin with."""
    return sizes in ((3, 3, 4), (3, 3, 2, 2), (3, 4, 4), (1, 3, 3, 4))


def begun(text: bytes, digits: Sequence[bytes]) -> bool:
    """Whether a text has a plus or a bracket, or one of some groups in it begins with a zero."""
    return b"(" in text or b"+" in text or _ZERO in [group[0] for group in digits]


def _groups(run: Run, worded: bool, taken: set[int]) -> list[_Groups]:
    """The first and last groups of each; none of those in `taken`. `worded`: a word for phones stands in the text."""
    found: list[_Groups] = []
    count = len(run.sizes)
    first = 0
    while first < count:
        last = None
        if first not in taken and not _within(run, first):
            alone = run.before(first) != SPACE or first - 1 in taken or (found and found[-1][1] == first - 1)
            last = _last_of_phone(run, first, _reach(run, first, taken), worded, bool(alone))
        if last is not None:
            found.append((first, last))
            first = last
        first += 1
    return found


def _reach(run: Run, first: int, taken: set[int]) -> int:
    """The last group that could belong to a number that begins with `first`."""
    last, total = first, run.sizes[first]
    while (
        last < len(run.joints)
        and (run.joints[last] in _SOFT or _hard(run.joints[last]))
        and last + 1 not in taken
        and total + run.sizes[last + 1] <= MOST + 2
    ):
        last += 1
        total += run.sizes[last]
    return last


def places(run: Run, worded: bool, taken: set[int]) -> list[Place]:
    """Where the numbers stand, with what shows that they are some; their groups are taken then."""
    found = []
    for first, last in _groups(run, worded, taken):
        taken.update(range(first, last + 1))
        start, end = run.place(first, last)
        while run.text[start - 1 : start] in (b"+", b"("):
            start -= 1
        found.append((start, end))
    return found


def _hard(joint: bytes) -> bool:
    """Whether groups are joined closely: by dashes, dots, slashes or brackets."""
    return joint not in _SOFT and joint != b"" and not joint.strip(_SIGNS)


def _within(run: Run, first: int) -> bool:
    """Whether a group is part of something that began before it."""
    sign = run.sign(first)
    if sign.endswith(b"("):
        return False
    if first and not sign.endswith(b"+"):
        return _hard(run.joints[first - 1]) or run.joints[first - 1] == b":"
    return _PART.search(sign) is not None


def _last_of_phone(run: Run, first: int, reach: int, worded: bool, alone: bool) -> int | None:
    sign = run.sign(first)
    if _PLUS.search(sign):
        return _international(run, first, reach)
    digits = run.digits[first]
    last = None
    if digits.startswith(b"00") and digits[2:3] != b"0" and alone:
        last = _international(run, first, reach, 2, worded)
    elif digits[:1] == b"0" != digits[1:2] and alone:
        last = _with_trunk_prefix(run, first, reach, sign)
    if last is None:
        last = _north_american(run, first, reach, sign)
    if last is None:
        last = _by_shape(run, first, reach, sign)
    if last is not None and NUMBERED.name(run.text, run.place(first, first)[0]):
        last = None
    if last is None and worded:
        last = _named(run, first, reach)
    return last


def _ends(run: Run, first: int, reach: int, least: int, most: int) -> Iterator[int]:
    """Where a number of so many digits may end, the longest first: not within what is joined closely."""
    totals = 0
    ends = []
    for last in range(first, reach + 1):
        totals += run.sizes[last]
        if totals > most:
            break
        if totals >= least and not _hard(run.after(last)) and not _glued(run, last):
            ends.append(last)
    return reversed(ends)


def _glued(run: Run, last: int) -> bool:
    """Whether a letter follows, but for that of an extension."""
    if last < len(run.joints):
        return False
    end = run.place(last, last)[1]
    return run.text[end : end + 1].isalpha() and _EXTENSION.match(run.text, end) is None


def _international(run: Run, first: int, reach: int, prefix: int = 0, worded: bool = True) -> int | None:
    code = run.digits[first][prefix:] or (run.digits[first + 1] if first < reach else b"")
    if not _CALLING_CODE.match(code):
        return None
    for last in _ends(run, first, reach, 8 + prefix, MOST + prefix):
        if prefix and last == first:
            return last if worded and _follows_a_word(run, first) else None
        if last == first + 1 and run.joints[first] == b"." and run.sizes[first] < 4:
            return None  # a decimal fraction
        return last
    return None


def _with_trunk_prefix(run: Run, first: int, reach: int, sign: bytes) -> int | None:
    if run.sizes[first] < 2 and run.after(first) != b"(":
        return None
    if run.sizes[first : first + 3] in _NO_PHONES and _hard(run.joints[first]):
        return None
    most = 13 if run.after(first) == b"/" else 12
    for last in _ends(run, first, reach, 9 if not sign.endswith(b"(") else 8, most):
        fraction = last == first + 1 and run.joints[first] == b"." and not run.digits[last].strip(b"0")
        return None if last == first or fraction or run.sizes[first : last + 1] in _NO_PHONES else last
    return None


def _north_american(run: Run, first: int, reach: int, sign: bytes) -> int | None:
    start = first + 1 if run.digits[first] == b"1" else first
    last = start + 2
    if last > reach or run.sizes[start : last + 1] != (3, 3, 4) or _glued(run, last):
        return None
    if run.digits[start][0] < 50 or run.digits[start + 1][0] < 50:  # neither begins with 0 or 1
        return None
    inner, outer = run.joints[start:last], {run.before(first), run.after(last)}
    if inner[0] != inner[1] and inner[0] != SPACE and b")" not in inner[0]:
        return None
    if SPACE in inner and b")" not in inner and SPACE in outer and BREAK not in inner:
        return None  # one of several numbers in a row
    return None if _hard(run.after(last)) or inner[1] in outer - _SOFT else last


def _by_shape(run: Run, first: int, reach: int, sign: bytes) -> int | None:
    """Notations that are nothing else's: an area code in brackets, Russian and Chinese numbers."""
    digits, sizes = run.digits[first], run.sizes
    if (
        sign.endswith(b"(")
        and run.after(first)[:1] == b")"
        and 2 <= sizes[first] <= 5
        and digits[:2] not in (b"19", b"20")
    ):
        return next(_ends(run, first, reach, 9, 11), None)
    if digits == b"8" and sizes[first + 1 : first + 5] == (3, 3, 2, 2):
        return first + 4 if first + 4 <= reach else None
    if digits == b"8" and sizes[first + 1 : first + 4] == (3, 3, 4):
        return first + 3 if first + 3 <= reach else None
    if sizes[first : first + 4] == (3, 3, 2, 2) and first + 3 <= reach and not _hard(run.after(first + 3)):
        return first + 3
    if (
        sizes[first : first + 3] == (3, 4, 4)
        and digits[:1] == b"1"
        and digits[1] > 50
        and first + 2 <= reach
        and run.after(first + 2) in (b"", BREAK)
    ):
        return first + 2
    return None


def _named(run: Run, first: int, reach: int) -> int | None:
    if not _follows_a_word(run, first):
        return None
    return next(_ends(run, first, reach, 7, MOST), None)


def _follows_a_word(run: Run, first: int) -> bool:
    """Whether a word for phones stands before, and none for other numbers between."""
    start = run.place(first, first)[0]
    return PHONE.before(run.text, start) and not NUMBERED.name(run.text, start)
