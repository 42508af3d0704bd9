"""What belongs to people and is no number: e-mail addresses, streets, dates of birth; and the addresses of machines.

Owns their patterns and checks. Refuses addresses that name no one: loopback, unspecified, masks and versions.
"""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv6Address

from gateway.automaton import occurs
from gateway.detectors.base import Place, Row, whole
from gateway.detectors.words import BIRTH

# ---- e-mail addresses ----

_NO_TOP_LEVEL = frozenset(
    b"png jpg jpeg gif svg webp ico css scss js mjs ts tsx jsx json html htm xml yaml yml toml md txt pdf zip gz whl "
    b"jar exe dll so".split()
)


def email(text: bytes, start: int, end: int) -> Place | None:
    """Not a method of a matrix product, a repository, a file or a package."""
    local, _, domain = text[start:end].replace(b"%40", b"@").rpartition(b"@")
    after = text[end : end + 1]
    if after in (b"(", b"[") or (local == b"git" and after == b":"):
        return None
    return None if domain.rsplit(b".", 1)[-1].lower() in _NO_TOP_LEVEL else (start, end)


# ---- addresses of machines ----

_is_version = occurs(
    r"(?i)(?:(?:version|ver|release|build|driver|firmware|oid|section|chapter|kernel|rev|rv)[\s:.=#v]*|(?:^|[^a-z])v|[a-z]/)$"
)
_PART_OF_MORE = re.compile(rb"[0-9A-Za-z_][.\-]?\Z|\.\Z")
_GOES_ON = re.compile(rb"\.\d|[A-Za-z_]|-[A-Za-z0-9]")
_NAMED_IP = re.compile(rb"(?i)\bip(?:v4)?\b|addr|host|\bdns\b|server|\bsrc|\bdst|client|remote|ping ")
_NO_HOSTS = (b"0", b"127", b"255")
_ZERO, _COLON = b"0:"


def ipv4(text: bytes, start: int, end: int) -> Place | None:
    """Four numbers that are no version, mask, loopback or unspecified address."""
    octets = text[start:end].split(b".")
    if octets[0] in _NO_HOSTS:
        return None
    for octet in octets:
        if octet > b"0" and (octet[0] == _ZERO or (len(octet) == 3 and octet > b"255")):
            return None
    before = text[max(0, start - 24) : start]
    if _PART_OF_MORE.search(before, max(0, len(before) - 2)) or _GOES_ON.match(text, end):
        return None
    if _is_version(before) and not before.endswith(b"//"):
        return None
    if end - start == 7 and not _NAMED_IP.search(before):  # four single digits
        return None
    return start, end


def ipv6(text: bytes, start: int, end: int) -> Place | None:
    """What the standard library reads as an address, with enough of it to be no operator of a language."""
    while text[end - 1] == _COLON and text[end - 2] != _COLON:
        end -= 1
    before, after = text[max(0, start - 1) : start], text[end : end + 1]
    if before.isalnum() or after.isalnum() or before in (b"_", b":", b"."):
        return None
    written = text[start:end]
    digits = written.replace(b":", b"")
    if len(digits) < 5 or digits.isalpha() or (b"::" not in written and written.count(b":") != 7):
        return None  # before the library, which takes longer: times and MAC addresses are common
    try:
        address = IPv6Address(written.decode("ascii"))
    except AddressValueError:
        return None
    return None if address.is_loopback or address.is_unspecified else (start, end)


# ---- dates of birth ----

_MONTHS = (
    "jan|feb|fév|fev|mar|mär|maerz|apr|avr|abr|may|mai|mag|maj|jun|juin|giu|jul|juil|lug|aug|août|aout|ago|sep|set|oct|okt|ott|out|nov|dec|dez|déc|dic|ene|gen|ianuarie|янв|фев|мар|апр|ма[йя]|июн|июл|авг|сен|окт|ноя|дек"
    "|sty|lut|kwi|cze|lip|sie|wrz|paź|lis|gru|led|úno|bře|dub|kvě|čer|srp|zář|říj|pro|ocak|şub|nis|haz|tem|ağu|eyl|eki|kas|ara|tháng"
)
_DATE = re.compile(
    r"\d{1,2}[./\- ]{1,3}\d{1,2}[./\- ]{1,3}(?:19|20)?\d\d(?!\d)|(?:19|20)\d\d[./\- ]{1,3}\d{1,2}[./\- ]{1,3}\d{1,2}(?!\d)|(?:19|20)\d\d[01]\d[0-3]\d(?!\d)"
    rf"|\d{{1,2}}(?:st|nd|rd|th|er|\.|º)?[ \-]{{0,2}}(?:de |of |d')?(?:{_MONTHS})\w*\.?,?[ \-]{{0,2}}(?:de |of )?(?:19|20)?\d\d(?!\d)"
    rf"|(?:{_MONTHS})\w*\.? \d{{1,2}}(?:st|nd|rd|th)?,? ?(?:19|20)\d\d(?!\d)|(?:19|20)\d\d ?[年년] ?\d{{1,2}} ?[月월] ?\d{{1,2}}|(?:19|20)\d\d[ -](?:{_MONTHS})\w*[ -]\d{{1,2}}(?!\d)",
    re.IGNORECASE,
)
_DIGIT = re.compile(r"\d")
_BETWEEN = 28  # characters from the word to the date


def birth(text: bytes, start: int, end: int) -> Place | None:
    """A date soon after a word for the day of birth."""
    after = text[end : end + 120].decode(errors="ignore")
    if after[:1].isascii() and after[:1].isalpha():
        return None
    digit = _DIGIT.search(after, 0, _BETWEEN + 24)
    if digit is None:
        return None
    # The date begins with its first digit, or with the word before that.
    found = _DATE.match(after, digit.start()) or _DATE.match(after, after.rfind(" ", 0, max(0, digit.start() - 1)) + 1)
    if found is None or found.start() > _BETWEEN:
        return None
    first = end + len(after[: found.start()].encode())
    return first, first + len(found[0].encode())


# ---- streets ----

_PROPER = r"[A-Z\x{c0}-\x{24f}\x{410}-\x{42f}][\w\x{c0}-\x{24f}\x{400}-\x{4ff}'.\-]*"
_NAME = rf"(?:{_PROPER}|[0-9][\w\x{{c0}}-\x{{24f}}'.\-]*)"
_SMALL = (
    r"(?:de|da|do|du|des|der|den|del|della|la|le|les|los|las|l'|d'|di|van|von|dos|das|y|e|al|am|an|im|zum|zur|the|of)"
)
_KINDS = "street|st|avenue|ave|road|rd|boulevard|blvd|lane|ln|drive|dr|court|ct|place|pl|square|sq|terrace|parkway|pkwy|highway|hwy|close|crescent|gardens|way|row|grove|hill"
_ENDINGS = r"straße|strasse|str\.|weg|platz|allee|gasse|ring|damm|ufer|straat|laan|plein|gracht|kade|singel|dijk|gatan|vägen|vej|gade|veien|gata|katu"
# Shortened ones: such as stand before a name with and without a space, and such as are too much else without one.
_FIRST = (
    "(?i:(?:calle|avenida|avda|plaza|paseo|camino|carrer|via|viale|piazza|piazzale|corso|largo|vicolo|rua|travessa|praça|estrada"
    r"|ulica|ulice|bulevardul|улица|проспект|пр-т|al\.|os\.|c/) |(?:avda\.|av\.|ul\.|ул\.) ?)"
)
_CROSSING = r"\b(?:calle|carrera|cra\.?|kra\.?|avenida|diagonal|transversal)"  # streets with numbers for names
_NUMBERED = r",? ?(?i:n[º°.]? ?|nr\.? ?|no\.? ?|д\. ?)?\d{1,5}\b"
_FRENCH = "rue|avenue|av\\.|boulevard|bd|bld|place|chemin|impasse|allée|allee|quai|route|cours|passage|square"
# Pattern and hint.
_STREETS = (
    # number, name, kind
    (
        rf"\b\d{{1,5}}[A-Za-z]?,? (?:[NSEW]{{1,2}}\.? |North |South |East |West )?(?:{_NAME} ){{1,3}}(?i:{_KINDS})\b\.?",
        rf"(?i)[\w\x{{c0}}-\x{{24f}}\x{{400}}-\x{{4ff}}'.\-] (?:{_KINDS})\b",
    ),
    (
        r"(?i)\b\d{1,5} (?:[a-z]+ ){1,2}(?:street|avenue|road|boulevard|blvd|lane|drive),? [a-z. ]{2,30},? (?:[a-z]{2} )?\d{5}\b",
        r"(?i)[a-z] (?:street|avenue|road|boulevard|blvd|lane|drive),? [a-z. ]",
    ),
    # kind, name, number
    (rf"\b{_NAME}(?:{_ENDINGS})(?: |, )\d{{1,4}}[ ]?[a-zA-Z]?\b", rf"(?:{_ENDINGS}),? \d"),
    (
        rf"\b(?:Am|An der|Auf der|Im|In der|Zum|Zur|Alte|Neue|Große|Kleine) {_NAME}(?:[ -]{_NAME})? \d{{1,4}}[a-z]?, \d{{4,5}}\b",
        r"\d[a-z]?, \d{4}",
    ),
    (
        rf"(?:^|[^A-Za-z]){_FIRST}(?:\d{{1,2}} )?(?:{_SMALL} ?){{0,3}}{_PROPER} ?(?:{_NAME} ?|{_SMALL} ){{0,4}}{_NUMBERED}",
        rf"(?:^|[^A-Za-z]){_FIRST}",
    ),
    (
        rf"(?i){_CROSSING} \d{{1,3}} ?[a-z]?,? ?(?:#|n[o°º]\.?) ?\d{{1,3}}",
        rf"(?i){_CROSSING} \d",
    ),
    (
        rf"(?:^|[^0-9A-Za-z/\\._\-])(?:c/{_PROPER}(?: (?:{_SMALL} )?{_PROPER}){{0,3}}|C/{_PROPER}(?: (?:{_SMALL} )?{_PROPER}){{0,3}},){_NUMBERED}",
        r"(?:^|[^0-9A-Za-z/\\._\-])[cC]/[A-Z\x{c0}-\x{24f}]",
    ),
    # number, kind, name
    (
        rf"\b\d{{1,4}}(?i: ?(?:bis|ter|quater))?,? (?i:{_FRENCH}) (?:{_SMALL} ?){{0,3}}{_NAME}(?:[ \-](?:{_SMALL} ?)?{_NAME}){{0,4}}",
        rf"\d(?i: ?(?:bis|ter|quater))?,? (?i:{_FRENCH}) ",
    ),
    (
        r"〒 ?\d{3}-?\d{4}|\p{Han}{2,3}[都道府県省市]\p{Han}{1,8}[市区區町村縣路街]\p{Han}{0,8}\d{1,4}",
        r"〒|\p{Han}[市区區町村縣路街]",
    ),
)


ROWS = (
    Row(
        "email",
        r"(?i)[a-z0-9\x{80}-\x{10ffff}._%+'&\-]+\"?(?:@|%40)(?:[a-z0-9\x{80}-\x{10ffff}](?:[a-z0-9\x{80}-\x{10ffff}\-]*[a-z0-9\x{80}-\x{10ffff}])?\.)+"
        r"(?:[a-z\x{80}-\x{10ffff}]{2,24}|xn--[a-z0-9\-]{2,})",
        email,
        "@|%40",
    ),
    Row(
        "email",
        r"(?i)[a-z0-9._%+'\-]+ ?(?:\[at\]|\(at\)|\{at\}|<at>|\[@\]|\(@\)) ?[a-z0-9\-]+"
        r"(?: ?(?:\[dot\]|\(dot\)|\{dot\}|<dot>| dot |\.) ?[a-z0-9\-]+){0,3}"
        r" ?(?:\[dot\]|\(dot\)|\{dot\}|<dot>| dot |\.) ?[a-z]{2,24}",
        whole,
        r"(?i)[\[({<](?:at|@)[\])}>]",
    ),
    Row("email", r"(?i)[a-z0-9._%+'\-]+ at [a-z0-9\-]+(?: dot [a-z0-9\-]+){0,2} dot (?:[a-z]{2,3}|info|health|online|museum|photography)\b", whole, "(?i) dot "),
    Row("email", r"[A-Za-z0-9._%+'\-]+ @ [A-Za-z0-9\-]+(?: ?\. ?[A-Za-z0-9\-]+){0,3} ?\. ?[a-z]{2,24}\b", email, " @ "),
    Row("ip_address", r"\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b", ipv4, r"\d\.\d{1,3}\.\d{1,3}\.\d", counts=True, claims=True),
    Row("ip_address", r"(?:[0-9A-Fa-f]{1,4}:){1,7}(?::?[0-9A-Fa-f]{1,4}){0,7}(?:::)?", ipv6, hint=r"(?:[0-9A-Fa-f]{1,4}:){6}|[0-9A-Fa-f]::", counts=True),
    Row("date_of_birth", rf"(?i)(?:^|[^a-z])(?:{BIRTH})", birth),
    *(Row("street_address", pattern, whole, hint, counts=hint.startswith(r"\d[a-z]?")) for pattern, hint in _STREETS),
)  # fmt: skip
