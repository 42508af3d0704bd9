"""Identity numbers with letters in them, and passports: check digits where there are some, words nearby where not.

Sources: ICAO 9303, parts 3 to 6, for what machines read; for the numbers as in `checkdigits.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import mul

from gateway.detectors.base import Place, Row, glued, runs_on
from gateway.detectors.words import PASSPORT

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _compact(check: Callable[[str], bool]) -> Callable[[bytes, int, int], Place | None]:
    """A check of letters and digits alone, in upper case, where the number is a word by itself."""

    def checked(text: bytes, start: int, end: int) -> Place | None:
        sign = "".join(filter(str.isalnum, text[start:end].decode(errors="ignore").upper()))
        return (start, end) if not glued(text, start, end) and check(sign) else None

    return checked


def spanish(number: str) -> bool:
    """DNI and NIE: a letter that is the remainder by 23."""
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number[:-1].translate(str.maketrans("XYZ", "012"))) % 23] == number[-1]


_ODD = dict(zip("0123456789" + _LETTERS, (
    1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10,
    22, 25, 24, 23), strict=True))  # fmt: skip


def italian(number: str) -> bool:
    """Codice fiscale: a letter from the sum of the others, those at odd places by a table."""
    total = sum(
        _ODD[sign] if place % 2 == 0 else int(sign) if sign.isdigit() else ord(sign) - 65
        for place, sign in enumerate(number[:15])
    )
    return _LETTERS[total % 26] == number[15]


def finnish(number: str) -> bool:
    """Henkilötunnus, without the sign of the century: the remainder by 31."""
    digits = re.sub(r"\D", "", number[:6]) + number[-4:-1]
    return (
        1 <= int(number[:2]) <= 31
        and 1 <= int(number[2:4]) <= 12
        and "0123456789ABCDEFHJKLMNPRSTUVWXY"[int(digits) % 31] == number[-1]
    )


def mexican(number: str) -> bool:
    """CURP: a weighted sum by 10."""
    alphabet = "0123456789ABCDEFGHIJKLMNÑOPQRSTUVWXYZ"
    total = sum(alphabet.index(sign) * (18 - place) for place, sign in enumerate(number[:17]))
    return 1 <= int(number[6:8]) <= 12 and 1 <= int(number[8:10]) <= 31 and str(-total % 10) == number[17]


def singaporean(number: str) -> bool:
    """NRIC and FIN: a letter from a weighted sum by 11, other letters for each first one."""
    total = sum(int(digit) * weight for digit, weight in zip(number[1:8], (2, 7, 6, 5, 4, 3, 2), strict=True))
    total += {"T": 4, "G": 4, "M": 3}.get(number[0], 0)
    return {"S": "JZIHGFEDCBA", "T": "JZIHGFEDCBA", "F": "XWUTRQPNMLK", "G": "XWUTRQPNMLK", "M": "KLJNPQRTUWX"}[
        number[0]
    ][10 - total % 11 if number[0] == "M" else total % 11] == number[8]


def hong_kong(number: str) -> bool:
    """One letter or two, six digits and a check digit by 11, in brackets."""
    body = number[:-1].rjust(8)
    total = sum((36 if sign == " " else int(sign, 36)) * (9 - place) for place, sign in enumerate(body))
    return (total + (10 if number[-1] == "A" else int(number[-1]))) % 11 == 0


def chilean(number: str) -> bool:
    """RUT: weights 2 to 7 from the right, by 11, K for ten."""
    total = sum(int(digit) * (2 + place % 6) for place, digit in enumerate(reversed(number[:-1])))
    return "0K987654321"[total % 11] == number[-1]


def irish(number: str) -> bool:
    """PPS number: seven digits, weights 8 to 2 and 9 for a second letter, by 23."""
    total = sum(int(digit) * weight for digit, weight in zip(number[:7], range(8, 1, -1), strict=True))
    total += 9 * (ord(number[8]) - 64) if len(number) == 9 and number[8] != "W" else 0
    return "WABCDEFGHIJKLMNOPQRSTUV"[total % 23] == number[7]


def chinese_with_x(number: str) -> bool:
    """The resident's number where its check digit is ten."""
    total = sum(int(digit) * (2 ** (17 - place) % 11) for place, digit in enumerate(number[:17]))
    return number[6:8] in ("18", "19", "20") and (total + 10) % 11 == 1


# ---- passports ----

_WEIGHTS = (7, 3, 1, 7, 3, 1)


def _right(day: str, check: str) -> bool:
    """Whether a day's check digit is right: weights 7, 3, 1."""
    total: int = sum(map(mul, map(int, day), _WEIGHTS))
    return total % 10 == int(check)


_BIRTH_TO_EXPIRY = re.compile(r"(\d{6})(\d)[MFX<](\d{6})(\d)")


def machine_readable(text: bytes, start: int, end: int) -> Place | None:
    """A line that holds the days of birth and of expiry, each with its check digit. The lines above and below it, which
    hold names, belong to it."""
    line = text[start:end].decode("ascii").upper()
    found = _BIRTH_TO_EXPIRY.search(line)
    if found is None or not (_right(found[1], found[2]) and _right(found[3], found[4])):
        return None
    above = _ABOVE.search(text, max(0, start - 100), start)
    below = _BELOW.match(text, end, end + 50)
    return above.start() if above else start, below.end() if below else end


_ABOVE = re.compile(rb"(?i)[PIACV][A-Z0-9<]{24,43}\s{1,3}\Z")
_BELOW = re.compile(rb"\s{1,3}[A-Za-z]+<[A-Za-z<]{10,42}")
_NUMBER = re.compile(r"[A-Z0-9]{6,10}(?![A-Z0-9])", re.IGNORECASE)
_REACH = 32
_ELSEWHERE = re.compile(r"\d|[.!]\s+[A-Z]\w+ ")  # another number, or the next sentence
_DAY = re.compile(r"(?:19|20)\d{6}")


def passport(text: bytes, start: int, end: int) -> Place | None:
    """Six to ten letters and digits, at least four of them digits, soon after a word for passports."""
    if runs_on(text, end):
        return None
    after = text[end : end + 100].decode(errors="ignore")
    for found in _NUMBER.finditer(after):
        if found.start() > _REACH or _ELSEWHERE.search(after[: found.start()]):
            return None
        whole = not after[max(0, found.start() - 1) : found.start()].isalnum()
        shouted = len(found[0]) >= 8 and found[0].isupper()
        if whole and sum(map(str.isdigit, found[0])) >= (1 if shouted else 3) and not _DAY.fullmatch(found[0]):
            first = end + len(after[: found.start()].encode())
            return first, first + len(found[0].encode())
    return None


def _irish_after_words(text: bytes, start: int, end: int) -> Place | None:
    """What the words and signs before it are followed by: seven digits, and one letter or two."""
    first = end - 8 if text[end - 8 : end - 1].isdigit() else end - 9
    return (first, end) if irish(text[first:end].decode(errors="ignore").upper()) else None


ROWS = (
    Row("national_id", r"(?i)\b(?:\d{8}|[XYZ][ \-]?\d{7})[ \-]?[A-HJ-NP-TV-Z]\b", _compact(spanish), r"\d{7}[ \-]?[A-Za-z]\b", counts=True),
    Row("national_id", r"(?i)\b[A-Z]{6} ?[0-9L-V]{2}[A-EHLMPR-T][0-9L-V]{2} ?[A-Z][0-9L-V]{3}[A-Z]\b", _compact(italian), r"(?i)\b[A-Z]{6} ?[0-9L-V]{2}[A-EHLMPR-T][0-9L-V]{2} ?[A-Z][0-9L-V]{3}[A-Z]", counts=True),
    Row("national_id", r"(?i)\b\d{6}[A-FU-Y+\-]\d{3}[0-9A-FHJ-NPR-Y]\b", _compact(finnish), r"(?i)\d{6}[A-FU-Y+\-]\d{3}", counts=True),
    Row("national_id", r"(?i)\b[A-Z][AEIOUX][A-Z]{2}\d{6}[HMX][A-Z]{2}[A-Z\x{d1}]{3}[0-9A-Z]\d\b", _compact(mexican), r"(?i)\d{6}[HMX][A-Z]{2}", counts=True),
    Row("national_id", r"(?i)\b[STFGM]\d{7}[A-Z]\b", _compact(singaporean), r"(?i)\b[STFGM]\d{7}", counts=True),
    Row("national_id", r"\b[A-Z]{1,2}\d{6} ?\([0-9A]\)", _compact(hong_kong), r"\d{6} ?\(", counts=True),
    Row("national_id", r"(?i)\b\d{1,2}\.\d{3}\.\d{3} ?- ?[0-9K]\b|\b\d{7,8}-K\b", _compact(chilean), r"(?i)\d\.\d{3}\.\d{3} ?-|\d{7}-K", counts=True),
    Row("national_id", r"(?i)\b(?:pps|ppsn|pps n[or.]+|personal public service[a-z ]*)[^A-Za-z0-9]{1,12}\d{7}[A-W][A-IW]?\b", _irish_after_words, r"(?i)\bpps|personal public"),
    Row("national_id", r"(?i)\b\d{17}X\b", _compact(chinese_with_x), r"(?i)\d{17}X", counts=True),
    Row("national_id", r"\b[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z](?: ?\d{2}){3} ?[A-D]\b", _compact(bool), r"[A-Z](?: ?\d{2}){3} ?[A-D]\b", counts=True),
    Row(
        "passport",
        r"(?i)[A-Z0-9<]{13,29}?\d{7}[MFX<]\d{7}[A-Z0-9<]{2,17}|(?i)\d{7}[MFX<]\d{7}[A-Z<]{3}[A-Z0-9<]{11}\d",
        machine_readable,
        r"(?i)\d{7}[MFX<]\d{7}[A-Z0-9<]{2}",
        counts=True,
    ),
    Row("passport", rf"(?i)(?:^|[^a-z])(?:{PASSPORT})", passport),
)  # fmt: skip
