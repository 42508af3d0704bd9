"""National identity numbers of digits alone: how they are written, what they are called.

Owns the table `IDENTITIES`. A number that chance fulfils in less than one of two hundred cases (`strong`) is one where it
is written in its country's way; the others need a word that names them shortly before. Refuses numbers of companies; the
rules of check digits are those of `checkdigits.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from gateway.automaton import Automaton
from gateway.detectors import checkdigits
from gateway.detectors.digits import BLANKS, Groups, Run, Shape, shaped
from gateway.detectors.words import Words


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """A country's number: its check, the sizes of its groups where it is `strong` and what joins them, and its names."""

    country: str
    length: int
    check: Callable[[bytes], bool]
    words: Words
    strong: tuple[tuple[int, ...], ...] = ()
    joints: frozenset[bytes] = BLANKS | {b"-", b"."}


# Names that go for any country.
GENERAL = Words.of(
    "national id*", "national identification*", "national identity*", "identity number", "identity card", "id number", "id no", "id card", "identification number", "citizen id*", "personal number",
    "personal id*", "tax id*", "tax number", "government id", "ausweisnummer", "steuernummer", "carte d.identité", "documento de identidad", "documento",
)  # fmt: skip
_TAX = (
    "steuer ?id*",
    "steuer id*",
    "steueridentifikationsnummer",
    "steuerliche identifikationsnummer",
    "idnr",
    "steuer idnr",
    "tin",
)

IDENTITIES: tuple[Identity, ...] = (
    Identity("DE", 11, checkdigits.german_tax, Words.of(*_TAX), ((11,), (2, 3, 3, 3))),
    Identity("FR", 15, checkdigits.french, Words.of("sécurité sociale", "securite sociale", "sécu", "nir", "insee"), ((15,), (1, 2, 2, 2, 3, 3, 2), (13, 2))),
    Identity("NL", 9, checkdigits.dutch, Words.of("bsn*", "burgerservicenummer", "sofinummer")),
    Identity("PL", 11, checkdigits.polish, Words.of("pesel*")),
    Identity("SE", 10, checkdigits.swedish, Words.of("personnummer", "personnr", "pnr"), ((6, 4),), frozenset((b"-", b"+"))),
    Identity("SE", 12, checkdigits.swedish, Words.of("personnummer", "personnr", "pnr"), ((8, 4),), frozenset((b"-", b"+"))),
    Identity("DK", 10, checkdigits.danish, Words.of("cpr*", "personnummer")),
    Identity("BE", 11, checkdigits.belgian, Words.of("rijksregister*", "numéro national", "nationaal nummer", "registre national"), ((11,), (2, 2, 2, 3, 2))),
    Identity("PT", 9, checkdigits.portuguese, Words.of("nif*", "contribuinte", "número fiscal")),
    Identity("BR", 11, checkdigits.brazilian, Words.of("cpf*"), ((3, 3, 3, 2),)),
    Identity("IN", 12, checkdigits.indian, Words.of("aadhaar*", "aadhar*", "uidai", "uid", "आधार*")),
    Identity("CN", 18, checkdigits.chinese, Words.of("身份证*", "身份證*", "公民身份*"), ((18,), (6, 8, 4))),
    Identity("GB", 10, checkdigits.british_health, Words.of("nhs*")),
    Identity("CA", 9, checkdigits.canadian, Words.of("sin*", "social insurance*", "nas", "numéro d.assurance sociale")),
    Identity("CH", 13, checkdigits.swiss, Words.of("ahv*", "avs*"), ((13,), (3, 4, 4, 2))),
    Identity("TR", 11, checkdigits.turkish, Words.of("kimlik*", "tckn*", "tc no", "t\\.?c\\.?*")),
    Identity("NO", 11, checkdigits.norwegian, Words.of("fødselsnummer", "fodselsnummer", "personnummer", "fnr"), ((11,), (6, 5))),
    Identity("RO", 13, checkdigits.romanian, Words.of("cnp*", "cod numeric personal"), ((13,),)),
    Identity("GR", 11, checkdigits.greek, Words.of("amka*", "αμκα*")),
    Identity("EE", 11, checkdigits.baltic, Words.of("isikukood*", "asmens kodas", "personal code")),
    Identity("HR", 11, checkdigits.croatian, Words.of("oib*")),
    Identity("CZ", 10, checkdigits.czech, Words.of("rodné číslo", "rodne cislo", "rč"), ((6, 4),), frozenset((b"/",))),
    Identity("BG", 10, checkdigits.bulgarian, Words.of("егн*", "egn*")),
    Identity("KR", 13, checkdigits.korean, Words.of("주민등록번호*", "rrn*", "resident registration*"), ((6, 7),), frozenset((b"-",))),
    Identity("JP", 12, checkdigits.japanese, Words.of("マイナンバー*", "個人番号*", "my number")),
    Identity("ZA", 13, checkdigits.south_african, Words.of("sa id*", "rsa id*", "south african id*", "id number*")),
    Identity("TH", 13, checkdigits.thai, Words.of("เลขบัตรประชาชน*", "เลขประจำตัวประชาชน*", "thai id*"), ((1, 4, 5, 2, 1),)),
    Identity("AU", 9, checkdigits.australian_tax, Words.of("tfn*", "tax file*")),
    Identity("AR", 11, checkdigits.argentine, Words.of("cuil*", "cuit*"), ((2, 8, 1),), frozenset((b"-",))),
    Identity("RU", 11, checkdigits.russian_insurance, Words.of("снилс*", "snils*"), ((3, 3, 3, 2),)),
    Identity("RU", 12, checkdigits.russian_tax, Words.of("инн*", "inn*")),
    Identity("AT", 10, checkdigits.austrian, Words.of("svnr*", "sozialversicherungsnummer", "sv nummer", "versicherungsnummer")),
    Identity("IL", 9, checkdigits.israeli, Words.of("teudat zehut", "תעודת זהות", "ת\\.?ז*", "israeli id*")),
    Identity("HU", 9, checkdigits.hungarian, Words.of("taj*", "társadalombiztosítási*")),
)  # fmt: skip
ANY = Words.of(*GENERAL.words, *(word for identity in IDENTITIES for word in identity.words.words))
_BY_LENGTH = {
    length: tuple(each for each in IDENTITIES if each.length == length)
    for length in {each.length for each in IDENTITIES}
}
_LONGEST = max(_BY_LENGTH)
_JOINTS = BLANKS | {b"-", b".", b"/", b"+"}

# An RE2 pattern that fires wherever groups have the shape of one.
HINT = shaped(shape for each in IDENTITIES for shape in each.strong)

# The first and last groups; and those identities whose shape these have, or that a word must name.
Window = tuple[int, int, tuple[Identity, ...], tuple[Identity, ...]]
_BY_SHAPE = {
    shape: tuple(each for each in IDENTITIES if shape in each.strong) for each in IDENTITIES for shape in each.strong
}
_SHAPES = {
    size: sorted((shape for shape in _BY_SHAPE if shape[0] == size), key=len)
    for size in {shape[0] for shape in _BY_SHAPE}
}


def windows(shape: Shape) -> tuple[Window, ...]:
    """What has the shape of one, by the first group and then by the last."""
    sizes = shape.sizes
    return tuple(
        (first, last, strong, ())
        for first, size in enumerate(sizes)
        for known in _SHAPES.get(size, ())
        if sizes[first : (last := first + len(known) - 1) + 1] == known and (strong := _strong(shape, first, last))
    )


def windows_after_a_word(shape: Shape) -> tuple[Window, ...]:
    """What may be one by its length, in the same order."""
    sizes = shape.sizes
    found: list[Window] = []
    for first in range(len(sizes)):
        total = 0
        for last in range(first, len(sizes)):
            total += sizes[last]
            if total > _LONGEST:
                break
            if known := _BY_LENGTH.get(total):
                named = known if _JOINTS.issuperset(shape.joints[first:last]) else ()
                if (strong := _strong(shape, first, last)) or named:
                    found.append((first, last, strong, named))
    return tuple(found)


def _strong(shape: Shape, first: int, last: int) -> tuple[Identity, ...]:
    """Those whose shape groups have, which are joined as those of this one are, and to nothing around them."""
    known = _BY_SHAPE.get(shape.sizes[first : last + 1], ())
    if not known:
        return ()
    inner = shape.joints[first:last]
    loose = shape.loose[first:last]
    if not _JOINTS.issuperset(inner) or shape.before(first) in loose or shape.after(last) in loose:
        return ()
    return tuple(each for each in known if each.joints.issuperset(inner))


def groups(run: Run, known: Sequence[Window], worded: bool) -> list[Groups]:
    """The first and last groups of each, the longest that begin with a group. `known`: the windows of its shape.
    `worded`: a name of one of them stands somewhere in the text."""
    places: list[Groups] = []
    named: Sequence[Identity] = ()
    named_at = -1
    for first, last, strong, identities in known:
        if places and places[-1][0] < first <= places[-1][1]:
            continue
        if worded and named_at != first:
            named, named_at = _named(run.text, run.start(first)), first
        if (_valid(strong, run, first, last) and _apart(run, first)) or (
            named and _valid([each for each in identities if each in named], run, first, last)
        ):
            if run.glued(first, last):
                continue
            if places and places[-1][0] == first:
                places.pop()
            places.append((first, last))
    return places


def _valid(identities: Sequence[Identity], run: Run, first: int, last: int) -> bool:
    for each in identities:  # noqa: SIM110 - a generator costs more than most checks
        if each.check(run.together(first, last)):
            return True
    return False


def _apart(run: Run, first: int) -> bool:
    """Whether the sign before the groups does not join them to something."""
    return run.sign(first)[-1:] not in (b".", b"-", b"+")


_NAMES: Automaton[tuple[Identity, ...]] = Automaton(
    [(f"(?i){GENERAL.pattern}", IDENTITIES), *((f"(?i){each.words.pattern}", (each,)) for each in IDENTITIES)]
)


def _named(text: bytes, start: int) -> Sequence[Identity]:
    """Those that a word shortly before a place names."""
    return list(chain.from_iterable(_NAMES.fired(text[max(0, start - 48) : start])))
