"""Valid numbers, drawn by chance: cards, bank accounts, phones, social security and national identity numbers.

Owns check digits of its own, written from the definitions and not from the detectors. A number comes as the groups in
which its country writes it. Refuses to say how groups are joined (`writing.py`).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Groups = tuple[str, ...]


def digits(chance: Random, count: int, first: str = "0123456789") -> str:
    """Digits, the first one of some."""
    return chance.choice(first) + "".join(chance.choices("0123456789", k=count - 1)) if count else ""


def cut(text: str, *sizes: int) -> Groups:
    """The text in groups of these sizes, the rest as the last one."""
    groups: list[str] = []
    for size in sizes:
        groups.append(text[:size])
        text = text[size:]
    return tuple(group for group in (*groups, text) if group)


def luhn_digit(body: str) -> str:
    """What makes the sum of all digits a multiple of ten, every other one doubled from the right."""
    total = 0
    for place, digit in enumerate(reversed(body)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return str(-total % 10)


# ---- cards ----

# Brand: share, beginnings, length, groups.
_BRANDS: tuple[tuple[float, tuple[str, ...], int, tuple[int, ...]], ...] = (
    (34, ("4",), 16, (4, 4, 4)),  # Visa
    (26, ("51", "52", "53", "54", "55", "2221", "2300", "2500", "2699", "2720"), 16, (4, 4, 4)),  # Mastercard
    (14, ("34", "37"), 15, (4, 6)),  # American Express
    (6, ("6011", "644", "648", "65"), 16, (4, 4, 4)),  # Discover
    (4, ("3528", "3550", "3589"), 16, (4, 4, 4)),  # JCB
    (4, ("300", "305", "36", "38"), 14, (4, 6)),  # Diners Club
    (4, ("62",), 16, (4, 4, 4)),  # UnionPay
    (2, ("62",), 19, (6,)),
    (3, ("5018", "5893", "6304", "6759", "6763"), 16, (4, 4, 4)),  # Maestro
    (2, ("2200", "2204"), 16, (4, 4, 4)),  # Mir
    (1, ("4",), 19, (4, 4, 4, 4)),
)


def card(chance: Random) -> Groups:
    """The number of a payment card."""
    [(_, beginnings, length, sizes)] = chance.choices(_BRANDS, [brand[0] for brand in _BRANDS])
    body = chance.choice(beginnings)
    if body == "38":  # Diners Club's 14 digits begin with 36 or 300 to 305
        body = "36"
    body += digits(chance, length - 1 - len(body))
    return cut(body + luhn_digit(body), *sizes)


# ---- bank accounts ----

# Country: what follows the check digits; n a digit, a a letter, c either (SWIFT's IBAN registry).
_ACCOUNTS = {
    "DE": "18n", "FR": "10n11c2n", "GB": "4a14n", "ES": "20n", "IT": "1a10n12c", "NL": "4a10n", "BE": "12n",
    "AT": "16n", "CH": "5n12c", "PL": "24n", "PT": "21n", "SE": "20n", "NO": "11n", "DK": "14n", "FI": "14n",
    "IE": "4a14n", "CZ": "20n", "SK": "20n", "HU": "24n", "RO": "4a16c", "GR": "7n16c", "BG": "4a6n8c", "HR": "17n",
    "LU": "3n13c", "MT": "4a5n18c", "TR": "6n16c", "SA": "2n18c", "AE": "19n", "IL": "19n", "UA": "6n19c",
    "BR": "23n1a1c", "EE": "16n", "LT": "16n", "LV": "4a13c", "IS": "22n", "LI": "5n12c", "PK": "4a16c",
}  # fmt: skip


def iban(chance: Random) -> str:
    """An international bank account number, without gaps."""
    country = chance.choices(
        list(_ACCOUNTS), [6 if name in ("DE", "FR", "GB", "ES", "IT", "NL") else 1 for name in _ACCOUNTS]
    )[0]
    shape, body, count = _ACCOUNTS[country], "", ""
    for sign in shape:
        if sign.isdigit():
            count += sign
            continue
        alphabet = {"n": "0123456789", "a": LETTERS, "c": "0123456789" * 3 + LETTERS}[sign]
        body += "".join(chance.choices(alphabet, k=int(count)))
        count = ""
    number = "".join(str(LETTERS.index(sign) + 10) if sign in LETTERS else sign for sign in body + country + "00")
    return f"{country}{98 - int(number) % 97:02d}{body}"


# ---- social security ----


def ssn(chance: Random) -> Groups:
    """A US social security number."""
    area = chance.choice([area for area in range(1, 900) if area != 666])
    return f"{area:03d}", f"{chance.randint(1, 99):02d}", f"{chance.randint(1, 9999):04d}"


# ---- phones ----


@dataclass(frozen=True, slots=True)
class Phones:
    """How a country writes its numbers. `#` is any digit, `N` one from 2 to 9, `M` from 1 to 9; a `|` parts groups, and
    what stands in brackets stays there. `national` is with the trunk prefix, `international` without country code."""

    country: str
    code: str
    national: tuple[str, ...]
    international: tuple[str, ...]


PHONES = (
    Phones("us", "1", ("(N##)|N##|####", "N##|N##|####"), ("N##|N##|####", "(N##)|N##|####", "N#########")),
    Phones("gb", "44", ("020|7###|####", "07###|######", "0161|###|####", "(01##2)|######"), ("20|7###|####", "7###|######", "(0)20|7###|####")),
    Phones("de", "49", ("030|######", "0171|#######", "(089)|######", "0221|###|###|##"), ("30|######", "(0)171|#######", "89|####|####", "151########")),
    Phones("fr", "33", ("01|##|##|##|##", "06|##|##|##|##"), ("1|##|##|##|##", "(0)6|##|##|##|##", "6########")),
    Phones("es", "34", ("9##|###|###", "6##|##|##|##"), ("9##|###|###", "6########")),
    Phones("it", "39", ("06|####|####", "3##|###|####"), ("06|####|####", "3##|#######")),
    Phones("nl", "31", ("020|###|####", "06|########"), ("20|###|####", "6|########")),
    Phones("ch", "41", ("044|###|##|##", "079|###|##|##"), ("44|###|##|##", "79#######")),
    Phones("at", "43", ("01|#######", "0664|#######"), ("1|#######", "664|#######")),
    Phones("pl", "48", ("22|###|##|##", "5##|###|###"), ("22|###|##|##", "5########")),
    Phones("br", "55", ("(11)|9####|####", "(21)|N###|####"), ("11|9####|####", "(11)|9####|####")),
    Phones("in", "91", ("098###|#####", "022|N###|####"), ("98###|#####", "9#########")),
    Phones("cn", "86", ("010|N###|####", "138|####|####"), ("138|####|####", "10|N###|####")),
    Phones("jp", "81", ("03|N###|####", "090|N###|####"), ("3|N###|####", "90|N###|####")),
    Phones("au", "61", ("(02)|9###|####", "04##|###|###"), ("2|9###|####", "4##|###|###")),
    Phones("ru", "7", ("8|(495)|###|##|##", "8|9##|###|##|##"), ("495|###|##|##", "(9##)|###|##|##")),
    Phones("tr", "90", ("0212|###|##|##", "0532|###|##|##"), ("212|###|##|##", "532|###|####")),
    Phones("mx", "52", ("55|####|####", "(55)|####|####"), ("55|####|####", "1|55|####|####")),
)  # fmt: skip


def phone(chance: Random, shape: str) -> Groups:
    """A number of a shape of `Phones`, in groups."""
    signs = {"#": "0123456789", "N": "23456789", "M": "123456789"}
    return tuple(
        "".join(chance.choice(signs[sign]) if sign in signs else sign for sign in group) for group in shape.split("|")
    )


# ---- national identity numbers ----


def _birth(chance: Random) -> datetime.date:
    return datetime.date(1935, 1, 1) + datetime.timedelta(days=chance.randrange(70 * 365))


def _weighted(body: str, weights: tuple[int, ...]) -> int:
    return sum(int(digit) * weight for digit, weight in zip(body, weights, strict=True))


def _german_tax(chance: Random) -> Groups:
    """Ten digits of which one occurs twice, and a check digit by ISO 7064, modulus 11, 10."""
    pool = chance.sample("0123456789", 9)
    body = [*pool, chance.choice(pool)]
    chance.shuffle(body)
    while body[0] == "0":
        chance.shuffle(body)
    product = 10
    for digit in body:
        total = (int(digit) + product) % 10 or 10
        product = total * 2 % 11
    return cut("".join(body) + str((11 - product) % 10), 2, 3, 3)


def _spanish(chance: Random) -> Groups:
    """Eight digits, or a letter and seven, and a letter that is their remainder by 23."""
    foreign = chance.random() < 0.3
    first = chance.choice("XYZ") if foreign else ""
    body = digits(chance, 7 if foreign else 8)
    value = int(("XYZ".index(first) if foreign else 0) * 10**7) + int(body)
    return tuple(group for group in (first, body, "TRWAGMYFPDXBNJZSQVHLCKE"[value % 23]) if group)


_ITALIAN_ODD = dict(zip("0123456789" + LETTERS, (
    1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10,
    22, 25, 24, 23), strict=True))  # fmt: skip


def _italian(chance: Random) -> Groups:
    born = _birth(chance)
    consonants = "BCDFGLMNPRSTVZ"
    body = "".join(chance.choices(consonants, k=6)) + f"{born.year % 100:02d}" + "ABCDEHLMPRST"[born.month - 1]
    body += f"{born.day + chance.choice((0, 40)):02d}" + chance.choice("ABCDEFGHILMZ") + digits(chance, 3)
    total = sum(
        _ITALIAN_ODD[sign] if place % 2 == 0 else int(sign) if sign.isdigit() else LETTERS.index(sign)
        for place, sign in enumerate(body)
    )
    return (body + LETTERS[total % 26],)


def _french(chance: Random) -> Groups:
    born = _birth(chance)
    body = f"{chance.choice('12')}{born.year % 100:02d}{born.month:02d}{chance.randint(1, 95):02d}{digits(chance, 3)}{digits(chance, 3)}"
    return cut(f"{body}{97 - int(body) % 97:02d}", 1, 2, 2, 2, 3, 3)


def _dutch(chance: Random) -> Groups:
    while True:
        body = digits(chance, 8, "123456789")
        check = _weighted(body, (9, 8, 7, 6, 5, 4, 3, 2)) % 11
        if check < 10:
            return (body + str(check),)


def _polish(chance: Random) -> Groups:
    born = _birth(chance)
    body = f"{born.year % 100:02d}{born.month + (20 if born.year >= 2000 else 0):02d}{born.day:02d}{digits(chance, 4)}"
    return (body + str(-_weighted(body, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3)) % 10),)


def _swedish(chance: Random) -> Groups:
    born = _birth(chance)
    body = f"{born:%y%m%d}{digits(chance, 3)}"
    return (f"{born:%y%m%d}-{body[6:]}{luhn_digit(body)}",)


def _finnish(chance: Random) -> Groups:
    born = _birth(chance)
    serial = f"{chance.randint(2, 899):03d}"
    check = "0123456789ABCDEFHJKLMNPRSTUVWXY"[int(f"{born:%d%m%y}{serial}") % 31]
    return (f"{born:%d%m%y}{'A' if born.year >= 2000 else '-'}{serial}{check}",)


def _belgian(chance: Random) -> Groups:
    born = _birth(chance)
    body = f"{born:%y%m%d}{chance.randint(1, 997):03d}"
    check = 97 - int(("2" if born.year >= 2000 else "") + body) % 97
    return (f"{born:%y.%m.%d}-{body[6:]}.{check:02d}",)


def _portuguese(chance: Random) -> Groups:
    body = digits(chance, 8, "123")
    check = 11 - _weighted(body, (9, 8, 7, 6, 5, 4, 3, 2)) % 11
    return cut(body + str(check if check < 10 else 0), 3, 3)


def _brazilian(chance: Random) -> Groups:
    body = digits(chance, 9)
    for _ in range(2):
        rest = (
            sum(int(digit) * weight for digit, weight in zip(body, range(len(body) + 1, 1, -1), strict=True)) * 10 % 11
        )
        body += str(rest % 10)
    return (f"{body[:3]}.{body[3:6]}.{body[6:9]}-{body[9:]}",)


# Verhoeff's scheme: multiplication in the dihedral group of order ten, written out, and the permutation by place.
def _dihedral(left: int, right: int) -> int:
    if left < 5:
        return (left + right) % 5 if right < 5 else 5 + (left + right - 5) % 5
    return 5 + (left - 5 - right) % 5 if right < 5 else (left - right) % 5


def _verhoeff_digit(body: str) -> str:
    first = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)
    total = 0
    for place, digit in enumerate(reversed(body), 1):
        value = int(digit)
        for _ in range(place % 8):
            value = first[value]
        total = _dihedral(total, value)
    return next(str(check) for check in range(10) if _dihedral(total, check) == 0)


def _indian(chance: Random) -> Groups:
    body = digits(chance, 11, "23456789")
    return cut(body + _verhoeff_digit(body), 4, 4)


def _chinese(chance: Random) -> Groups:
    region = chance.choice(("110101", "310115", "440305", "510107", "320102", "330106", "420111"))
    body = f"{region}{_birth(chance):%Y%m%d}{digits(chance, 3)}"
    rest = sum(int(digit) * (2 ** (17 - place) % 11) for place, digit in enumerate(body)) % 11
    return (body + "10X98765432"[rest],)


def _british_health(chance: Random) -> Groups:
    while True:
        body = digits(chance, 9, "4679")
        check = 11 - _weighted(body, (10, 9, 8, 7, 6, 5, 4, 3, 2)) % 11
        if check != 10:
            return cut(body + str(check % 11), 3, 3)


def _canadian(chance: Random) -> Groups:
    body = digits(chance, 8, "12345679")
    return cut(body + luhn_digit(body), 3, 3)


def _swiss(chance: Random) -> Groups:
    body = "756" + digits(chance, 9)
    check = -sum(int(digit) * (3 if place % 2 else 1) for place, digit in enumerate(body)) % 10
    return (f"{body[:3]}.{body[3:7]}.{body[7:11]}.{body[11:]}{check}",)


def _turkish(chance: Random) -> Groups:
    body = digits(chance, 9, "123456789")
    odd, even = sum(map(int, body[::2])), sum(map(int, body[1::2]))
    body += str((odd * 7 - even) % 10)
    return (body + str(sum(map(int, body)) % 10),)


def _norwegian(chance: Random) -> Groups:
    while True:
        body = f"{_birth(chance):%d%m%y}{digits(chance, 3)}"
        first = -_weighted(body, (3, 7, 6, 1, 8, 9, 4, 5, 2)) % 11
        if first < 10:
            second = -_weighted(body + str(first), (5, 4, 3, 2, 7, 6, 5, 4, 3, 2)) % 11
            if second < 10:
                return cut(f"{body}{first}{second}", 6)


def _mexican(chance: Random) -> Groups:
    alphabet = "0123456789ABCDEFGHIJKLMNÑOPQRSTUVWXYZ"
    consonants = "BCDFGLMNPRSTVZ"
    body = chance.choice(consonants) + chance.choice("AEIOU") + "".join(chance.choices(consonants, k=2))
    body += f"{_birth(chance):%y%m%d}" + chance.choice("HM") + chance.choice(("DF", "JC", "NL", "VZ", "MC"))
    body += "".join(chance.choices(consonants, k=3)) + digits(chance, 1)
    check = -sum(alphabet.index(sign) * (18 - place) for place, sign in enumerate(body)) % 10
    return (body + str(check),)


@dataclass(frozen=True, slots=True)
class Identity:
    """A country's identity number: its maker, and the words that name it there."""

    country: str
    make: Callable[[Random], Groups]
    words: tuple[str, ...]


IDENTITIES = (
    Identity("de", _german_tax, ("Steuer-ID", "Steueridentifikationsnummer", "IdNr.")),
    Identity("es", _spanish, ("DNI", "NIF", "NIE")),
    Identity("it", _italian, ("codice fiscale", "C.F.")),
    Identity("fr", _french, ("numéro de sécurité sociale", "NIR", "n° sécu")),
    Identity("nl", _dutch, ("BSN", "burgerservicenummer")),
    Identity("pl", _polish, ("PESEL",)),
    Identity("se", _swedish, ("personnummer",)),
    Identity("fi", _finnish, ("henkilötunnus", "HETU")),
    Identity("be", _belgian, ("rijksregisternummer", "numéro national")),
    Identity("pt", _portuguese, ("NIF", "contribuinte")),
    Identity("br", _brazilian, ("CPF",)),
    Identity("in", _indian, ("Aadhaar", "Aadhaar number", "UIDAI")),
    Identity("cn", _chinese, ("身份证号", "身份证")),
    Identity("gb", _british_health, ("NHS number", "NHS no")),
    Identity("ca", _canadian, ("SIN", "social insurance number")),
    Identity("ch", _swiss, ("AHV-Nummer", "AVS")),
    Identity("tr", _turkish, ("TC Kimlik No", "T.C. kimlik")),
    Identity("no", _norwegian, ("fødselsnummer",)),
    Identity("mx", _mexican, ("CURP",)),
)
