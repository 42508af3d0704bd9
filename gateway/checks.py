"""What tells private data and secrets from their look-alikes: checksums, number ranges, entropy, words nearby.

Owns one check for each shape of `detectors.py`: it gets the text as UTF-8 bytes with compatibility forms folded, and
the place of a candidate, and says whether that is one. Refuses to look further than a few words around it.

Sources: card ranges from ISO/IEC 7812 as listed in Wikipedia's "Payment card number"; IBAN lengths from the SWIFT IBAN
registry; social security numbers from ssa.gov, "SSN randomization"; country calling codes from ITU-T E.164.
"""

from __future__ import annotations

import binascii
import math
import re
from base64 import urlsafe_b64decode
from collections import Counter
from collections.abc import Iterator

import orjson


def always(text: bytes, start: int, end: int) -> bool:
    """The pattern alone is proof enough."""
    return True


_DIGIT = frozenset(b"0123456789")


def _near(text: bytes, start: int, words: re.Pattern[bytes], reach: int = 40) -> bool:
    """Whether one of the words stands shortly before a candidate."""
    return words.search(text[max(0, start - reach) : start].lower()) is not None


def _alone(text: bytes, start: int, end: int) -> bool:
    """Whether a candidate is neither glued to a word nor one of several numbers in a row."""
    before, after = text[max(0, start - 2) : start], text[end : end + 2]
    return not (before[-1:].isalnum() or before[-1:] == b"_" or re.fullmatch(rb"\d[ .,:/\-]", before)) and not (
        after[:1].isalnum() or after[:1] == b"_" or re.fullmatch(rb"[ .,:/\-]\d", after)
    )


# ---- credit cards ----

# Issuers' prefixes, from and to, with the lengths they issue.
_ISSUERS: tuple[tuple[str, str, frozenset[int]], ...] = (
    ("4", "4", frozenset({13, 16, 19})),  # Visa
    ("51", "55", frozenset({16})),  # Mastercard
    ("2221", "2720", frozenset({16})),
    ("34", "34", frozenset({15})),  # American Express
    ("37", "37", frozenset({15})),
    ("300", "305", frozenset(range(14, 20))),  # Diners Club
    ("3095", "3095", frozenset(range(14, 20))),
    ("36", "36", frozenset(range(14, 20))),
    ("38", "39", frozenset(range(16, 20))),
    ("6011", "6011", frozenset(range(16, 20))),  # Discover
    ("644", "659", frozenset(range(16, 20))),
    ("3528", "3589", frozenset(range(16, 20))),  # JCB
    ("62", "62", frozenset(range(16, 20))),  # UnionPay
    ("81", "82", frozenset({16})),  # RuPay
    ("508", "508", frozenset({16})),
    ("60", "60", frozenset({16})),
    ("2200", "2204", frozenset(range(16, 20))),  # Mir
    ("9792", "9792", frozenset({16})),  # Troy
    ("50", "50", frozenset(range(12, 20))),  # Maestro
    ("56", "58", frozenset(range(12, 20))),
    ("63", "63", frozenset(range(12, 20))),
    ("67", "67", frozenset(range(12, 20))),
)
_ISSUED = {digit: [issuer for issuer in _ISSUERS if issuer[0][0] == digit] for digit in "2345689"}
_CARD_WORDS = re.compile(
    rb"card|visa|master|amex|maestro|diners|discover|credit|debit|\bpan\b|\bcc\b|karte|carte|tarjeta|cart[ae]o"
)
# From ASCII digits to their values, and to the sum of the digits of twice their value.
_VALUE = bytes.maketrans(b"0123456789", bytes(range(10)))
_DOUBLED = bytes.maketrans(b"0123456789", bytes((0, 2, 4, 6, 8, 1, 3, 5, 7, 9)))


def luhn(digits: str) -> bool:
    """Whether the last digit is the Luhn check digit of the others (ISO/IEC 7812-1, annex B)."""
    backwards = digits[::-1].encode()
    return (sum(backwards[::2].translate(_VALUE)) + sum(backwards[1::2].translate(_DOUBLED))) % 10 == 0


def is_card(digits: str) -> bool:
    """Whether an issuer has cards of that length that begin so, and the check digit is right."""
    return (
        any(
            len(digits) in lengths and first <= digits[: len(first)] <= last
            for first, last, lengths in _ISSUED.get(digits[0], ())
        )
        and len(set(digits)) > 1
        and luhn(digits)
    )


def card(text: bytes, start: int, end: int) -> bool:
    run = text[start:end].decode("ascii")
    glued_before = text[max(0, start - 1) : start].isalnum() or text[max(0, start - 1) : start] == b"_"
    glued_after = text[end : end + 1].isalnum() or text[end : end + 1] == b"_"
    # A line break separates two groups, or splits one group in two.
    for written in (run, run.replace("\r", "").replace("\n", "")) if "\n" in run else (run,):
        groups = list(re.finditer(r"\d+", written))
        first, last = int(glued_before), len(groups) - int(glued_after)
        for digits in _card_windows(written, groups[first:last]):
            if is_card(digits) and (len(digits) >= 14 or _near(text, start, _CARD_WORDS)):
                return True
    return False


def _card_windows(written: str, groups: list[re.Match[str]]) -> Iterator[str]:
    """The digits of neighbouring groups that are written as a card number is: in one, 4-4-4-4, 4-6-5, 8-8, ..."""
    texts = [group[0] for group in groups]
    sizes = list(map(len, texts))
    for first, size in enumerate(sizes):
        if texts[first][0] not in _ISSUED:
            continue
        if 12 <= size <= 19:
            # The digits after a decimal point are a fraction.
            if not re.search(r"\d\.$", written[max(0, groups[first].start() - 2) : groups[first].start()]):
                yield texts[first]
        elif sizes[first : first + 2] == [8, 8]:
            yield texts[first] + texts[first + 1]
        elif size == 4:
            if sizes[first + 1 : first + 3] in ([6, 5], [6, 4]):
                yield "".join(texts[first : first + 3])
            last = first + 1
            while last < min(first + 5, len(sizes)) and sizes[last] <= 4:
                last += 1
                if last - first >= 3:
                    yield "".join(texts[first:last])
                if sizes[last - 1] < 4:
                    break
    if len(sizes) > 5 and max(sizes) <= 3 and 12 <= sum(sizes) <= 19 and len(set(sizes[:-1])) == 1:
        yield "".join(texts)


# ---- IBAN ----

_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BI": 27, "BR": 29,
    "BY": 28, "CH": 21, "CR": 22, "CY": 24, "CZ": 24, "DE": 22, "DJ": 27, "DK": 18, "DO": 28, "EE": 20, "EG": 29,
    "ES": 24, "FI": 18, "FK": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28,
    "HN": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20,
    "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19,
    "MN": 20, "MR": 27, "MT": 31, "MU": 30, "NI": 28, "NL": 18, "NO": 15, "OM": 23, "PK": 24, "PL": 28, "PS": 29,
    "PT": 25, "QA": 29, "RO": 24, "RS": 22, "RU": 33, "SA": 24, "SC": 31, "SD": 18, "SE": 24, "SI": 19, "SK": 24,
    "SM": 27, "SO": 23, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
    "YE": 30,
}  # fmt: skip
COUNTRIES = "|".join(_IBAN_LENGTHS)


def is_iban(compact: str) -> bool:
    """Whether upper-case letters and digits have their country's length and are 1 modulo 97 (ISO 13616, ISO 7064)."""
    if len(compact) != _IBAN_LENGTHS.get(compact[:2]):
        return False
    return int("".join(str(int(letter, 36)) for letter in compact[4:] + compact[:4])) % 97 == 1


def iban(text: bytes, start: int, end: int) -> bool:
    # The candidate may run on into the next words: the country says how many letters and digits belong to it.
    wanted = _IBAN_LENGTHS[text[start : start + 2].decode("ascii").upper()]
    taken: list[str] = []
    for offset in range(start, end):
        letter = chr(text[offset])
        if letter.isalnum():
            taken.append(letter)
            if len(taken) == wanted:
                return not text[offset + 1 : offset + 2].isalnum() and is_iban("".join(taken).upper())
    return False


# ---- US social security numbers ----

_SSN_WORDS = re.compile(rb"\bssns?\b|social.?security|\bsoc\.? ?sec|tax.?id|taxpayer|\bitin\b|\btin\b")


def ssn(text: bytes, start: int, end: int) -> bool:
    written = text[start:end].decode("ascii")
    digits = re.sub(r"\D", "", written)
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    if area in ("000", "666") or area[0] == "9" or group == "00" or serial == "0000" or _glued(text, start, end):
        return False
    if _near(text, start, _SSN_WORDS):
        return True
    gaps = [gap.strip() or " " for gap in re.findall(r"\D+", written)]
    return len(gaps) == 2 and gaps[0] == gaps[1] and _alone(text, start, end)


# ---- phone numbers ----

# Country calling codes in use, by their first digits (ITU-T E.164, list of assigned codes).
_CALLING_CODE = re.compile(
    r"1|7|2[07]|3[0-469]|4[0-13-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|2[1-69]\d|35\d|37\d|38\d|42\d|50\d|59\d|6[7-9]\d|8[058]\d|9[679]\d"
)
# Dates, decimal fractions, ZIP codes, and the groups of a social security number.
_OTHER_NUMBERS = re.compile(
    r"\d+\.\d+$|\d{5}-\d{4}$|\d{3}\D+\d{2}\D+\d{4}$|\d{1,2}[./\-]\d{1,2}[./\-](?:\d{4}|\d{2}(?![./\- ]\d{2}(?!\d)))"
    r"|\d{4}[./\-]\d{1,2}[./\-]\d{1,2}"
)
_NUMBERED = re.compile(
    rb"(?:order|invoice|ref(?:erence)?|ticket|sku|serial|part|version|build|isbn|issn|doi|tracking|case|item|model|account|customer|id)"
    rb"(?:[ _](?:no|nr|number|num|id|code|is))?[ .:#=]*$"
)
PHONE_WORDS = (
    r"(?:\b(?:tele)?phones?|\bmobile|\bcell(?:ular|phone)?|\btel|\bfax|\bwhats ?app|\bsms|\bcontact number"
    r"|\b(?:call|text|reach|ring|dial|phone) (?:me|us|him|her|them)"
    r"|\btele?fono?|\bhandy|\bhandynummer|\brufnummer|\btelefonnummer"
    r"|\btél(?:éphone)?|\bteléfono|\bportable|\bmóvil|\bcelular|\bmobil|\bmobilnummer)"
)

_NAMED_PHONE = re.compile(PHONE_WORDS.encode())


def international(text: bytes, start: int, end: int) -> bool:
    written = text[start:end].decode("ascii")
    digits = re.sub(r"\D", "", written)
    before = text[max(0, start - 1) : start]
    if before.isalnum() or before in (b"_", b"+") or text[end : end + 1].isdigit():
        return False
    if not written.startswith("+"):
        digits = digits.removeprefix("00")
        if not _alone(text, start, end) or (written.isdigit() and not _near(text, start, _NAMED_PHONE, 24)):
            return False
    return 8 <= len(digits) <= 15 and _CALLING_CODE.match(digits) is not None


def national(text: bytes, start: int, end: int) -> bool:
    """A number in a country's own notation, with nothing that calls it a phone number."""
    written = text[start:end].decode("ascii")
    return (
        9 <= sum(map(str.isdigit, written)) <= 12
        and _alone(text, start, end)
        and not _OTHER_NUMBERS.match(written.lstrip("("))
        and not _near(text, start, _NUMBERED)
    )


def named_number(text: bytes, start: int, end: int) -> bool:
    written = re.split(rb"[^\d \t\r\n.\-()/]", text[start:end])[-1]
    return 7 <= sum(map(_DIGIT.__contains__, written)) <= 15 and not text[end : end + 1].isalnum()


# ---- e-mail addresses ----

_NO_TOP_LEVEL = frozenset(
    b"png jpg jpeg gif svg webp ico css scss js mjs ts tsx jsx json html htm xml yaml yml toml md txt pdf zip gz whl "
    b"jar exe dll so".split()
)


def email(text: bytes, start: int, end: int) -> bool:
    local, _, domain = text[start:end].replace(b"%40", b"@").rpartition(b"@")
    after = text[end : end + 1]
    if after in (b"(", b"["):  # a method of a matrix product
        return False
    if local == b"git" and after == b":":  # where a repository is
        return False
    return domain.rsplit(b".", 1)[-1].lower() not in _NO_TOP_LEVEL


# ---- secrets ----


def _entropy(text: bytes) -> float:
    """Shannon's entropy in bits a character."""
    return -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())


_PLACEHOLDER = re.compile(
    rb"(?i)your|example|sample|changeme|placeholder|dummy|redacted|xxxx|\*\*\*\*|\.\.\.|insert|<[a-z_ -]+>|process\.env"
    rb"|getenv|environ|1234567890abcdef"
)
_ASSIGNMENT = re.compile(rb"(?s).*?[:=>\s\"']([A-Za-z0-9_./+=\-~]+)$")
_HEX = re.compile(rb"[0-9a-fA-F]+")


def _random(value: bytes) -> bool:
    """Whether a value looks drawn by chance: letters and digits, evenly used; not a word, a path or a placeholder."""
    if _PLACEHOLDER.search(value) or not re.search(rb"\d", value) or not re.search(rb"[A-Za-z]", value):
        return False
    return _entropy(value) >= (3.0 if _HEX.fullmatch(value) else 3.5)


def token(text: bytes, start: int, end: int) -> bool:
    """A provider's prefix and enough of what follows it."""
    value = text[start:end]
    return (
        not (_PLACEHOLDER.search(value) or text[max(0, start - 1) : start].isalnum()) and _entropy(value[-20:]) >= 2.5
    )


def assigned(text: bytes, start: int, end: int) -> bool:
    value = _ASSIGNMENT.match(text[start:end])
    return value is not None and text[end : end + 1] != b"(" and _random(value[1])


def credentials(text: bytes, start: int, end: int) -> bool:
    """A password within an address."""
    password = text[start:end].rsplit(b"@", 1)[0].rsplit(b":", 1)[1]
    return not (
        _PLACEHOLDER.search(password)
        or password.lower() in (b"password", b"pass", b"pwd", b"secret")
        or password[:1] in (b"$", b"<", b"{")
    )


def aws_secret(text: bytes, start: int, end: int) -> bool:
    value = text[end - 40 : end]
    return not text[end : end + 1].isalnum() and _random(value)


def key_block(text: bytes, start: int, end: int) -> bool:
    """A header that a key follows, not an ellipsis: 32 characters of base64, but for line breaks, also escaped ones."""
    body = re.sub(
        rb"\\+[rn]|[\s\"'+,]",
        b"",
        re.sub(rb"(?:Proc-Type|DEK-Info|Version|Comment|Hash)[^\r\n\\]*", b"", text[end : end + 600]),
    )
    return re.match(rb"[A-Za-z0-9+/=]{32}", body) is not None


def jwt(text: bytes, start: int, end: int) -> bool:
    header = text[start:end].split(b".", 1)[0]
    try:
        decoded = orjson.loads(urlsafe_b64decode(header + b"=" * (-len(header) % 4)))
    except (orjson.JSONDecodeError, binascii.Error):
        return False
    return isinstance(decoded, dict) and "alg" in decoded


def _glued(text: bytes, start: int, end: int) -> bool:
    before, after = text[max(0, start - 1) : start], text[end : end + 1]
    return before.isalnum() or before == b"_" or after.isalnum() or after == b"_"
