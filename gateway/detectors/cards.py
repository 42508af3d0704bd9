"""Payment cards among groups of digits: an issuer's prefix, its length, the check digit, and groups as cards have them.

Sources: ranges of ISO/IEC 7812 as listed in Wikipedia's "Payment card number".
"""

from __future__ import annotations

from gateway.detectors.base import Place
from gateway.detectors.digits import BREAK, SPACE, Run
from gateway.detectors.words import CARD

# Issuers' prefixes, from and to, with the lengths they issue.
_ISSUERS: tuple[tuple[str, str, range], ...] = (
    ("4", "4", range(13, 20, 3)),  # Visa
    ("51", "55", range(16, 17)),  # Mastercard
    ("2221", "2720", range(16, 17)),
    ("34", "34", range(15, 16)),  # American Express
    ("37", "37", range(15, 16)),
    ("300", "305", range(14, 20)),  # Diners Club
    ("3095", "3095", range(14, 20)),
    ("36", "36", range(14, 20)),
    ("38", "39", range(14, 20)),
    ("6011", "6011", range(16, 20)),  # Discover
    ("644", "659", range(16, 20)),
    ("3500", "3599", range(16, 20)),  # JCB
    ("1800", "1800", range(15, 16)),
    ("2131", "2131", range(15, 16)),
    ("62", "62", range(16, 20)),  # UnionPay
    ("81", "82", range(16, 17)),  # RuPay
    ("508", "508", range(16, 17)),
    ("60", "60", range(16, 17)),
    ("2200", "2204", range(16, 20)),  # Mir
    ("9792", "9792", range(16, 17)),  # Troy
    ("50", "50", range(12, 20)),  # Maestro
    ("56", "58", range(12, 20)),
    ("63", "63", range(12, 20)),
    ("67", "67", range(12, 20)),
)
SHORTEST, LONGEST = 12, 19
_WITHOUT_WORDS = 14  # digits from which a number needs no word beside it that says what it is


def _issued() -> list[int]:
    """By the first four digits, a bit for every length that somebody issues."""
    table = [0] * 10_000
    for first, last, lengths in _ISSUERS:
        for prefix in range(int(first.ljust(4, "0")), int(last.ljust(4, "9")) + 1):
            table[prefix] |= sum(1 << length for length in lengths)
    return table


_ISSUED = _issued()
_FIRST = frozenset(b"12345689")
# From ASCII digits to their values, and to the sum of the digits of twice their value.
_VALUE = bytes.maketrans(b"0123456789", bytes(range(10)))
_DOUBLED = bytes.maketrans(b"0123456789", bytes((0, 2, 4, 6, 8, 1, 3, 5, 7, 9)))


def luhn(digits: bytes) -> bool:
    """Whether the last digit is the Luhn check digit of the others (ISO/IEC 7812-1, annex B)."""
    return (sum(digits[-1::-2].translate(_VALUE)) + sum(digits[-2::-2].translate(_DOUBLED))) % 10 == 0


def is_card(digits: bytes) -> bool:
    """Whether an issuer has cards of that length that begin so, and the check digit is right."""
    return bool(_ISSUED[int(digits[:4])] >> len(digits) & 1) and luhn(digits) and len(set(digits)) > 1


# How cards are printed, by the size of the first group; and what joins groups that need no such shape.
_SHAPES = {
    4: ((4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3)),
    8: ((8, 8),),
    6: ((6, 13), (6, 10)),
}
_USUAL = frozenset((SPACE, BREAK, b"-", b".", b""))
_FRACTION = b"."


def possible(sizes: tuple[int, ...]) -> bool:
    """Whether groups of these sizes may be a card."""
    count = len(sizes)
    return (
        (count == 1 and SHORTEST <= sizes[0] <= LONGEST)
        or sizes in _SHAPES.get(sizes[0], ())
        or (count in (4, 5) and set(sizes[:-1]) == {4} and sizes[-1] < 4)
        or (count > 5 and max(sizes) <= 3 and len(set(sizes[:-1])) == 1 and sum(sizes) <= LONGEST)
    )


def places(run: Run) -> list[Place]:
    """Where the cards stand, also one of which a line break splits a group."""
    found = [run.place(first, last) for first, last in _cards(run)]
    if not found and 0 < run.joints.count(BREAK) < 3:  # more are a column of numbers
        mended = run.mended()
        whole = len(run.sizes) == 2  # else a long number at the end of one line, and the beginning of the next
        found = [mended.place(first, last) for first, last in _cards(mended) if whole or first < last]
    return found


def _cards(run: Run) -> list[tuple[int, int]]:
    """The first and last groups of each card."""
    found: list[tuple[int, int]] = []
    count = len(run.sizes)
    for first in range(count):
        if run.digits[first][0] in _FIRST and not (found and first <= found[-1][1]):
            last = _last_of_card(run, first)
            if last is not None:
                found.append((first, last))
    if not found and count > 5 and max(run.sizes) <= 3 and _evenly_cut(run):
        found.append((0, count - 1))
    return found


def _last_of_card(run: Run, first: int) -> int | None:
    size = run.sizes[first]
    if SHORTEST <= size <= LONGEST:
        fits = run.before(first) != _FRACTION and is_card(run.digits[first]) and not run.glued(first, first)
        return first if fits and (size >= _WITHOUT_WORDS or CARD.before(run.text, run.place(first, first)[0])) else None
    for shape in _SHAPES.get(size, ()):
        last = first + len(shape) - 1
        if (
            run.sizes[first : last + 1] == shape
            and _joined_as_one(run, first, last)
            and is_card(run.together(first, last))
            and not run.glued(first, last)
        ):
            return last
    return _last_of_uneven(run, first) if size == 4 else None


def _last_of_uneven(run: Run, first: int) -> int | None:
    """Groups of four and a shorter last one."""
    last, total = first, 4
    while last + 1 < len(run.sizes) and run.sizes[last] == 4 and run.joints[last] in _USUAL:
        last += 1
        total += run.sizes[last]
        if total > LONGEST:
            return None
        if run.sizes[last] < 4:
            fits = total >= SHORTEST and is_card(run.together(first, last)) and not run.glued(first, last)
            return (
                last if fits and (total >= _WITHOUT_WORDS or CARD.before(run.text, run.place(first, last)[0])) else None
            )
    return None


def _joined_as_one(run: Run, first: int, last: int) -> bool:
    """Whether the groups are joined as those of one number are: by spaces, dashes, dots, line breaks; or by anything
    else, but all by the same, and the groups around them by something else."""
    joints = run.joints[first:last]
    if _USUAL.issuperset(joints):
        return True
    joint = joints[0]
    return joints.count(joint) == len(joints) and run.before(first) != joint and run.after(last) != joint


def _evenly_cut(run: Run) -> bool:
    """Whether all digits are one card in equal groups of one, two or three."""
    digits = run.together(0, len(run.sizes) - 1)
    return (
        _WITHOUT_WORDS <= len(digits) <= LONGEST
        and len(set(run.sizes[:-1])) == 1
        and len(set(run.joints)) == 1
        and run.joints[0] != BREAK
        and is_card(digits)
        and not run.glued(0, len(run.sizes) - 1)
    )
