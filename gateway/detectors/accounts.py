"""International bank account numbers: country, two check digits, and what that country's accounts look like.

Source: SWIFT's IBAN registry; ISO 13616, ISO 7064 (modulus 97, 10).
"""

from __future__ import annotations

import re

from gateway.detectors.base import Place, Row
from gateway.detectors.digits import MOST_SIGNS, SIGN, marked

# Country: what follows the check digits; n a digit, a a letter, c either.
_ACCOUNTS = {
    "AD": "8n12c", "AE": "19n", "AL": "8n16c", "AT": "16n", "AZ": "4a20c", "BA": "16n", "BE": "12n", "BG": "4a6n8c",
    "BH": "4a14c", "BI": "23n", "BR": "23n1a1c", "BY": "4c4n16c", "CH": "5n12c", "CR": "18n", "CY": "8n16c",
    "CZ": "20n", "DE": "18n", "DJ": "23n", "DK": "14n", "DO": "4c20n", "EE": "16n", "EG": "25n", "ES": "20n",
    "FI": "14n", "FK": "2a12n", "FO": "14n", "FR": "10n11c2n", "GB": "4a14n", "GE": "2a16n", "GI": "4a15c",
    "GL": "14n", "GR": "7n16c", "GT": "24c", "HN": "4a20n", "HR": "17n", "HU": "24n", "IE": "4a14n", "IL": "19n",
    "IQ": "4a15n", "IS": "22n", "IT": "1a10n12c", "JO": "4a4n18c", "KW": "4a22c", "KZ": "3n13c", "LB": "4n20c",
    "LC": "4a24c", "LI": "5n12c", "LT": "16n", "LU": "3n13c", "LV": "4a13c", "LY": "21n", "MC": "10n11c2n",
    "MD": "20c", "ME": "18n", "MK": "3n10c2n", "MN": "16n", "MR": "23n", "MT": "4a5n18c", "MU": "4a19n3a",
    "NI": "4a20n", "NL": "4a10n", "NO": "11n", "OM": "3n16c", "PK": "4a16c", "PL": "24n", "PS": "4a21c", "PT": "21n",
    "QA": "4a21c", "RO": "4a16c", "RS": "18n", "RU": "14n15c", "SA": "2n18c", "SC": "4a20n3a", "SD": "14n",
    "SE": "20n", "SI": "15n", "SK": "20n", "SM": "1a10n12c", "SO": "19n", "ST": "21n", "SV": "4a20n", "TL": "19n",
    "TN": "20n", "TR": "6n16c", "UA": "6n19c", "VA": "18n", "VG": "4a16n", "XK": "16n", "YE": "4a4n18c",
}  # fmt: skip
_SIGNS = {"n": "[0-9]", "a": "[A-Z]", "c": "[0-9A-Z]"}
_SHAPES = {
    country: re.compile(re.sub(r"(\d+)([nac])", lambda part: f"{_SIGNS[part[2]]}{{{part[1]}}}", shape))
    for country, shape in _ACCOUNTS.items()
}
_LENGTHS = {country: 4 + sum(int(count) for count in re.findall(r"\d+", shape)) for country, shape in _ACCOUNTS.items()}
_GAP = f"{SIGN}{{0,{MOST_SIGNS}}}"
_MORE = rf"(?:{_GAP}[0-9A-Z])"
_COUNTRY_FIRST = rf"(?i)(?:^|[^0-9A-Za-z])(?:IBAN)?(?:{'|'.join(_ACCOUNTS)})"
# Wherever a line ends. "at 10 in the morning" begins like one with a space: then what follows counts as well.
_CLOSE = rf"\d{_GAP}\d"
_SPACED_OUT = rf" \d{_GAP}\d{_GAP}(?:\d{_GAP}\d|[A-Z]{{1,4}}{_GAP}\d)"
_MARKUP = re.compile(rb"(?i)</?[a-z]+>|&nbsp;|\\[nrt]")
_SPACED = bytes(code if bytes((code,)).isalnum() else 32 for code in range(256))
_WRITTEN = {
    length: re.compile(rb"(?i)(?:(?:</?[a-z]+>|&nbsp;|\\[nrt]|[^0-9A-Za-z])*[0-9A-Za-z]){%d}(?![0-9A-Za-z])" % length)
    for length in set(_LENGTHS.values())
}
_NUMBERS = {ord(letter): str(number) for number, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 10)}
_COUNTRY = {country: country.translate(_NUMBERS) for country in _ACCOUNTS}


def is_iban(compact: str) -> bool:
    """Whether upper-case letters and digits have their country's shape and are 1 modulo 97."""
    country = compact[:2]
    shape = _SHAPES.get(country)
    if shape is None or not compact[2:4].isdigit() or shape.fullmatch(compact, 4) is None:
        return False
    account = compact[4:]
    number = account if account.isdigit() else account.translate(_NUMBERS)
    return int(number + _COUNTRY[country] + compact[2:4]) % 97 == 1


def iban(text: bytes, start: int, end: int) -> Place | None:
    """The candidate begins with what stands before the number, if anything does, and may run on into the next words:
    the country says how many letters and digits belong to it."""
    while not text[start : start + 1].isalnum():
        start += 1
    if text[start : start + 4].upper() == b"IBAN":
        start += 4
    candidate = text[start:end]
    tagged = marked(candidate)
    words = (_MARKUP.sub(b" ", candidate) if tagged else candidate).translate(_SPACED).split()
    compact = b"".join(words).upper().decode("ascii")
    wanted = _LENGTHS[compact[:2]]
    if not is_iban(compact[:wanted]):
        return None
    if tagged:
        written = _WRITTEN[wanted].match(text, start)
        return None if written is None else written.span()
    place = start
    for word in words:
        place = text.find(word, place) + len(word)
        wanted -= len(word)
        if wanted <= 0:
            break
    return None if wanted or text[place : place + 1].isalnum() else (start, place)


ROWS = (
    Row(
        "iban",
        f"{_COUNTRY_FIRST}(?:{_CLOSE}{_MORE}{{11,30}}|{_SPACED_OUT}{_MORE}{{6,29}})",
        iban,
        f"{_COUNTRY_FIRST}(?:{_CLOSE}|{_SPACED_OUT})",
        overlaps=True,
        claims=True,
    ),
)
