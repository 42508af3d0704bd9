"""The check digits of countries' identity numbers, each a function of a number's digits alone, as many as it has.

Owns the rules. Refuses to look at how a number is written, or what it is called: `national.py` does.

Sources: each country's rule as collected in Wikipedia's "National identification number" and in python-stdnum's
documentation; the tests hold a published example of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul

from gateway.detectors.cards import luhn

_ZERO = ord("0")
_VALUE = bytes.maketrans(b"0123456789", bytes(range(10)))


def _sum(digits: bytes, weights: Sequence[int]) -> int:
    return sum(map(mul, digits.translate(_VALUE), weights))


def _day(digits: bytes) -> bool:
    """Whether two digits of a month and two of a day are possible; some countries add 20, 40 or 60 to the month."""
    return 1 <= int(digits[:2]) % 20 <= 12 and 1 <= int(digits[2:4]) <= 31


def _day_first(digits: bytes) -> bool:
    """The same, with the day first; some countries add 40 to it."""
    return 1 <= int(digits[:2]) % 40 <= 31 and 1 <= int(digits[2:4]) <= 12


def _modulus_11_10(digits: bytes) -> bool:
    """ISO 7064, hybrid system modulus 11, 10."""
    product = 10
    for digit in digits[:-1]:
        product = ((digit - _ZERO + product) % 10 or 10) * 2 % 11
    return (product + digits[-1] - _ZERO) % 10 == 1


def german_tax(digits: bytes) -> bool:
    """Of the first ten digits one occurs two or three times, all others once; modulus 11, 10."""
    body = digits[:10]
    kinds = set(body)
    if len(kinds) not in (8, 9) or digits[0] == _ZERO:
        return False
    return (len(kinds) == 9 or 3 in map(body.count, kinds)) and _modulus_11_10(digits)


def french(digits: bytes) -> bool:
    """Sex, year, month; the rest by 97 of the first thirteen."""
    return (
        digits[0] in b"12"
        and (1 <= int(digits[3:5]) <= 12 or 20 <= int(digits[3:5]) <= 42)
        and int(digits[:13]) % 97 + int(digits[13:]) == 97
    )


def dutch(digits: bytes) -> bool:
    return _sum(digits, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0 and int(digits) > 0


def polish(digits: bytes) -> bool:
    return _day(digits[2:]) and _sum(digits, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1)) % 10 == 0


def swedish(digits: bytes) -> bool:
    """Luhn over ten digits; some have 60 added to the day."""
    last = digits[-10:]
    return 1 <= int(last[2:4]) <= 12 and 1 <= int(last[4:6]) % 60 <= 31 and luhn(last)


def belgian(digits: bytes) -> bool:
    body, check = digits[:9], int(digits[9:])
    return (
        int(digits[2:4]) <= 12 and int(digits[4:6]) <= 31 and check in (97 - int(body) % 97, 97 - int(b"2" + body) % 97)
    )


def portuguese(digits: bytes) -> bool:
    return digits[:1] in b"1235689" and (-_sum(digits, (9, 8, 7, 6, 5, 4, 3, 2)) % 11) % 10 == digits[8] - _ZERO


def brazilian(digits: bytes) -> bool:
    first = _sum(digits, range(10, 1, -1)) * 10 % 11 % 10
    second = _sum(digits, range(11, 1, -1)) * 10 % 11 % 10
    return digits[9:] == b"%d%d" % (first, second) and len(set(digits)) > 1


# Verhoeff's scheme: the multiplication of the dihedral group of order ten, and the permutation by place from the right.
_TIMES = (
    "0123456789",
    "1234067895",
    "2340178956",
    "3401289567",
    "4012395678",
    "5987604321",
    "6598710432",
    "7659821043",
    "8765932104",
    "9876543210",
)
_PLACED = (
    "0123456789",
    "1576283094",
    "5803796142",
    "8916043527",
    "9453126870",
    "4286573901",
    "2793806415",
    "7046913258",
)


def indian(digits: bytes) -> bool:
    """Verhoeff's check digit."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        total = int(_TIMES[total][int(_PLACED[place % 8][digit - _ZERO])])
    return digits[0] > 49 and total == 0


def chinese(digits: bytes) -> bool:
    """Region, day of birth; ISO 7064, modulus 11, 2, with X for ten."""
    value = 10 if digits[17:] in (b"X", b"x") else int(digits[17:])
    body = _sum(digits[:17], [2 ** (17 - place) % 11 for place in range(17)])
    return (
        digits[:1] in b"123456789"
        and digits[6:8] in (b"18", b"19", b"20")
        and 1 <= int(digits[10:12]) <= 12
        and 1 <= int(digits[12:14]) <= 31
        and (body + value) % 11 == 1
    )


def british_health(digits: bytes) -> bool:
    return _sum(digits, (10, 9, 8, 7, 6, 5, 4, 3, 2, 1)) % 11 == 0 and len(set(digits)) > 1


def canadian(digits: bytes) -> bool:
    return luhn(digits) and int(digits) > 0


def swiss(digits: bytes) -> bool:
    """The country's number, then the check digit of EAN-13."""
    return digits[:3] == b"756" and _sum(digits, (1, 3) * 6 + (1,)) % 10 == 0


def turkish(digits: bytes) -> bool:
    odd, even = _sum(digits[:9:2], (1,) * 5), _sum(digits[1:8:2], (1,) * 4)
    return (
        digits[0] != _ZERO
        and (odd * 7 - even) % 10 == digits[9] - _ZERO
        and (_sum(digits, (1,) * 10)) % 10 == digits[10] - _ZERO
    )


def norwegian(digits: bytes) -> bool:
    return (
        _day_first(digits)
        and _sum(digits, (3, 7, 6, 1, 8, 9, 4, 5, 2, 1)) % 11 == 0
        and _sum(digits, (5, 4, 3, 2, 7, 6, 5, 4, 3, 2, 1)) % 11 == 0
    )


def danish(digits: bytes) -> bool:
    """A day of birth alone: since 2007 there is no check digit."""
    return 1 <= int(digits[:2]) <= 31 and 1 <= int(digits[2:4]) <= 12


def romanian(digits: bytes) -> bool:
    check = _sum(digits, (2, 7, 9, 1, 4, 6, 3, 5, 8, 2, 7, 9)) % 11 % 10 or (
        _sum(digits, (2, 7, 9, 1, 4, 6, 3, 5, 8, 2, 7, 9)) % 11 == 10
    )
    return (
        digits[0] != _ZERO
        and 1 <= int(digits[3:5]) <= 12
        and 1 <= int(digits[5:7]) <= 31
        and 1 <= int(digits[7:9]) <= 52
        and int(check) == digits[12] - _ZERO
    )


def greek(digits: bytes) -> bool:
    return _day_first(digits) and luhn(digits)


def baltic(digits: bytes) -> bool:
    """Estonia and Lithuania."""
    check = _sum(digits, (1, 2, 3, 4, 5, 6, 7, 8, 9, 1)) % 11
    if check == 10:
        check = _sum(digits, (3, 4, 5, 6, 7, 8, 9, 1, 2, 3)) % 11 % 10
    return (
        digits[:1] in b"12345678"
        and 1 <= int(digits[3:5]) <= 12
        and 1 <= int(digits[5:7]) <= 31
        and check == digits[10] - _ZERO
    )


def croatian(digits: bytes) -> bool:
    return _modulus_11_10(digits)


def czech(digits: bytes) -> bool:
    """Also Slovakia: women have 50 added to the month; the whole is a multiple of eleven."""
    return 1 <= int(digits[2:4]) % 50 % 20 <= 12 and 1 <= int(digits[4:6]) <= 31 and int(digits) % 11 == 0


def bulgarian(digits: bytes) -> bool:
    return _day(digits[2:]) and _sum(digits, (2, 4, 8, 5, 10, 9, 7, 3, 6)) % 11 % 10 == digits[9] - _ZERO


def korean(digits: bytes) -> bool:
    """The check digit of numbers given before October 2020."""
    check = (11 - _sum(digits, (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)) % 11) % 10
    return (
        1 <= int(digits[2:4]) <= 12
        and 1 <= int(digits[4:6]) <= 31
        and digits[6] != _ZERO
        and check == digits[12] - _ZERO
    )


def japanese(digits: bytes) -> bool:
    rest = _sum(digits, (6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2)) % 11
    return (0 if rest <= 1 else 11 - rest) == digits[11] - _ZERO


def south_african(digits: bytes) -> bool:
    return 1 <= int(digits[2:4]) <= 12 and 1 <= int(digits[4:6]) <= 31 and digits[10:11] in b"012" and luhn(digits)


def thai(digits: bytes) -> bool:
    return digits[0] != _ZERO and (11 - _sum(digits, range(13, 1, -1)) % 11) % 10 == digits[12] - _ZERO


def australian_tax(digits: bytes) -> bool:
    return _sum(digits, (1, 4, 3, 7, 5, 8, 6, 9, 10)) % 11 == 0 and int(digits) > 0


def argentine(digits: bytes) -> bool:
    kind = int(digits[:2])
    return (
        kind in (20, 23, 24, 25, 26, 27) and (-_sum(digits, (5, 4, 3, 2, 7, 6, 5, 4, 3, 2)) % 11) == digits[10] - _ZERO
    )


def russian_insurance(digits: bytes) -> bool:
    """SNILS: weights from nine down, by 101."""
    return int(digits[:9]) > 1_001_998 and _sum(digits, range(9, 0, -1)) % 101 % 100 == int(digits[9:])


def russian_tax(digits: bytes) -> bool:
    first = _sum(digits, (7, 2, 4, 10, 3, 5, 9, 4, 6, 8)) % 11 % 10
    second = _sum(digits, (3, 7, 2, 4, 10, 3, 5, 9, 4, 6, 8)) % 11 % 10
    return (first, second) == (digits[10] - _ZERO, digits[11] - _ZERO)


def austrian(digits: bytes) -> bool:
    check = _sum(digits[:3], (3, 7, 9)) + _sum(digits[4:], (5, 8, 4, 2, 1, 6))
    return digits[0] != _ZERO and check % 11 == digits[3] - _ZERO


def israeli(digits: bytes) -> bool:
    return luhn(digits) and int(digits) > 0


def hungarian(digits: bytes) -> bool:
    return _sum(digits, (3, 7) * 4) % 10 == digits[8] - _ZERO
