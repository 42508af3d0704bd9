"""Payment cards among groups of digits: an issuer's prefix, its length, the check digit, and groups as cards have them.

Sources: ranges of ISO/IEC 7812 as listed in Wikipedia's "Payment card number".
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.detectors.digits import BLANKS, BREAK, GAP, Fits, Groups, Run, Shape, Window, fitting, shaped
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
# From ASCII digits to how much more the sum of the digits of twice their value is, modulo 10; and their sum as bytes.
_MORE_IF_DOUBLED = bytes.maketrans(b"0123456789", bytes((0, 1, 2, 3, 4, 6, 7, 8, 9, 0)))
_ZERO = ord("0")


def luhn(digits: bytes) -> bool:
    """Whether the last digit is the Luhn check digit of the others (ISO/IEC 7812-1, annex B)."""
    return (sum(digits) - _ZERO * len(digits) + sum(digits[-2::-2].translate(_MORE_IF_DOUBLED))) % 10 == 0


def is_card(digits: bytes) -> bool:
    """Whether an issuer has cards of that length that begin so, and the check digit is right."""
    return bool(_ISSUED[int(digits[:4])] >> len(digits) & 1) and luhn(digits) and digits.count(digits[:1]) < len(digits)


# How cards are printed, by the size of the first group; and what joins groups that need no such shape.
_SHAPES = {
    4: ((4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3)),
    8: ((8, 8),),
    6: ((6, 13), (6, 10)),
}
_USUAL = BLANKS | {b"-", b".", b""}
_FRACTION = b"."

# An RE2 pattern that fires wherever groups have the sizes of a card.
HINT = "|".join(
    (
        rf"\d{{{SHORTEST},}}",
        shaped(shape for shapes in _SHAPES.values() for shape in shapes),
        rf"(?:^|[^0-9])(?:\d{{4}}{GAP}){{2,4}}\d{{1,3}}(?:[^0-9]|$)",
        *(rf"(?:\d{{{size}}}{GAP}){{{count}}}\d{{1,3}}" for size, count in ((1, 11), (2, 6), (3, 5))),
    )
)


def windows(shape: Shape) -> tuple[Window, ...]:
    """What may be a card by its groups, in the order in which it is tried."""
    sizes = shape.sizes
    found: list[Window] = []
    for first, size in enumerate(sizes):
        if SHORTEST <= size <= LONGEST and shape.before(first) != _FRACTION:
            found.append((first, first, _words_needed(size)))
        for known in _SHAPES.get(size, ()):
            last = first + len(known) - 1
            if sizes[first : last + 1] == known and _joined_as_one(shape, first, last):
                found.append((first, last, None))
        if size == 4 and (last := _end_of_uneven(sizes, first)) and _USUAL.issuperset(shape.joints[first:last]):
            found.append((first, last, _words_needed(sum(sizes[first : last + 1]))))
    if len(sizes) > 5 and max(sizes) <= 3 and len(set(sizes[:-1])) == 1:
        even = _WITHOUT_WORDS <= sum(sizes) <= LONGEST and len(set(shape.joints)) == 1 and shape.joints[0] != BREAK
        if even:
            found.append((0, len(sizes) - 1, None))
    return tuple(found)


def _words_needed(digits: int) -> Fits | None:
    return None if digits >= _WITHOUT_WORDS else _named


def _named(run: Run, first: int, last: int) -> bool:
    """Whether a word before the groups says that they are a card."""
    return CARD.before(run.text, run.start(first))


def _end_of_uneven(sizes: tuple[int, ...], first: int) -> int:
    """The last of groups of four and a shorter last one; 0 where there are none."""
    last, total = first, 4
    while last + 1 < len(sizes) and sizes[last] == 4 and total <= LONGEST:
        last += 1
        total += sizes[last]
    return last if sizes[last] < 4 and SHORTEST <= total <= LONGEST else 0


def _joined_as_one(shape: Shape, first: int, last: int) -> bool:
    """Whether the groups are joined as those of one number are: by spaces, dashes, dots, line breaks; or by anything
    else, but all by the same, and the groups around them by something else."""
    if _USUAL.issuperset(shape.joints[first:last]):
        return True
    joints = shape.loose[first:last]
    joint = joints[0]
    return joints.count(joint) == len(joints) and shape.before(first) != joint and shape.after(last) != joint


def windows_across_lines(shape: Shape) -> tuple[Window, ...]:
    """What may be a card of which a line break splits a group, in the shape as it is mended."""
    if shape.joints.count(BREAK) > 2:  # a column of numbers
        return ()
    whole = len(shape.sizes) == 2  # else a long number at the end of one line, and the beginning of the next
    return tuple(window for window in windows(shape.mended()) if whole or window[0] < window[1])


def find(run: Run, known: Sequence[Window], across: Sequence[Window]) -> tuple[Run, Sequence[Groups]]:
    """The first and last groups of each card, also of one of which a line break splits a group: the run that they are
    groups of. `known` and `across`: the windows of the run's shape, and those across lines."""
    found = fitting(run, known, is_card)
    if found or not across:
        return run, found
    mended = run.mended()
    return mended, fitting(mended, across, is_card)
