"""Text as detectors read it: digits of any script as 0 to 9, compatibility forms as what they stand for (NFKC), all
dashes as "-", characters that nobody sees left out, placeholders of what was masked as empty brackets.

Owns the replacements, and where in the original each character of the result came from. Every cluster of the original
(a character, or one with the marks that attach to it) is replaced by itself, so that both directions are exact. No
cluster is longer than `MOST_MARKS`: CPython brings marks in order by insertion (`nfd_nfkd` in Modules/unicodedata.c),
holding its lock, and 400 KB of them in a row would stop the process for minutes. Refuses to judge what it reads.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Unicode's Stream-Safe Text Format (UAX #15, section 13): no language needs more marks in a row.
MOST_MARKS = 30

_LAST_OF_BMP = "\uffff"
_DASHES = "\u00ad\u058a\u05be\u1806\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2e3a\u2e3b\ufe58\ufe63\uff0d\u30fc"
# Default_Ignorable_Code_Point (DerivedCoreProperties.txt) but the soft hyphen, and the annotation characters; and marks
# that lie over or around any character, where they make no letter with it: they underline, strike through, frame.
_INVISIBLE = (
    *((0x0300, 0x036F), (0x1AB0, 0x1ABE), (0x1DC0, 0x1DFF), (0x20D0, 0x20F0), (0xFE20, 0xFE2F)),
    *((0x061C, 0x061C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200F)),
    *((0x202A, 0x202E), (0x2060, 0x206F), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFF9, 0xFFFB), (0xE0000, 0xE0FFF)),
)
# Where anything is to be replaced or attaches: not in ideographs, Hangul syllables, the scripts of cuneiform and
# hieroglyphs, surrogates and private use. Looking there as well would take a quarter of a second at import.
_LOOKED_AT = (
    *range(0x80, 0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x10000), *range(0x10000, 0x12000),
    *range(0x16A00, 0x17000), *range(0x1BC00, 0x20000), *range(0x2F800, 0x2FA1E),
)  # fmt: skip
_JAMO = (*range(0x1160, 0x1200), *range(0xD7B0, 0xD800))  # vowels and final consonants attach to a first consonant


# What is made from others: nothing else is changed by normalization.
_DECOMPOSED = {
    character: decomposition
    for character in map(chr, _LOOKED_AT)
    if (decomposition := unicodedata.decomposition(character))
}


def _one_by_one() -> dict[str, str]:
    """What takes the place of a character."""
    table = dict.fromkeys(_DASHES, "-") | dict.fromkeys("\u0085\u2028\u2029", "\n") | {"\u1680": " ", "\u2800": " "}
    table |= {chr(code): "" for first, last in _INVISIBLE for code in range(first, last + 1)}
    for character in (*_DECOMPOSED, *filter(str.isdecimal, map(chr, _LOOKED_AT))):
        if character not in table:
            made = unicodedata.normalize("NFKC", character)
            made = "".join(table.get(part, part) for part in made) if made != character else made
            made = str(unicodedata.decimal(made)) if len(made) == 1 and made.isdecimal() else made
            if made != character:
                table[character] = made
    return table


_REPLACED = _one_by_one()


def _is_mark(character: str) -> bool:
    """Whether what a character is made from begins with one that attaches to those before it."""
    if character in _DECOMPOSED:
        character = unicodedata.normalize("NFKD", character)[0]
    return unicodedata.combining(character) != 0


def _composing() -> set[str]:
    """Characters that may become one with what stands before them: the last ones of canonical compositions."""
    pairs = map(str.split, _DECOMPOSED.values())
    found = {chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and pair[0][0] != "<"} | set(map(chr, _JAMO))
    return {character for character in found if character <= _LAST_OF_BMP}  # above, only signs of dead scripts


def _ranges(characters: Iterable[str]) -> list[tuple[str, str]]:
    """First and last of each run of neighbours."""
    ranges: list[tuple[str, str]] = []
    for character in sorted(characters):
        if ranges and ord(character) == ord(ranges[-1][1]) + 1:
            ranges[-1] = (ranges[-1][0], character)
        else:
            ranges.append((character, character))
    return ranges


def _class(characters: Iterable[str]) -> str:
    """The inside of a character class: `re` compares those above U+FFFF one by one, so ranges count there."""
    return "".join(f"{re.escape(first)}-{re.escape(last)}" for first, last in _ranges(characters))


_COMPOSING = _composing()
# An RE2 pattern that fires wherever folding changes anything.
_PLACEHOLDER = r"\[[A-Z][A-Z_]*_[0-9]{1,6}\]"
CHANGES = "[" + "".join(f"{first}-{last}" for first, last in _ranges({*_REPLACED, *_COMPOSING})) + f"]|{_PLACEHOLDER}"

_MARKS = _class(_COMPOSING | set(filter(_is_mark, map(chr, _LOOKED_AT))))
_COMPOSES = re.compile(f"[{_class(_COMPOSING)}]")
# All above U+FFFF as one range, which is one comparison.
_SINGLE = f"[{_class(character for character in _REPLACED if character <= _LAST_OF_BMP)}\U00010000-\U0010ffff]"
_SINGLES, _RUNS = re.compile(_SINGLE), re.compile(f"{_SINGLE}+")
_TRANSLATION = str.maketrans(_REPLACED)
_CLUSTERS = re.compile(f"([^{_MARKS}][{_MARKS}]{{1,{MOST_MARKS}}})[{_MARKS}]*|{_SINGLE}")


_PLACEHOLDERS = re.compile(_PLACEHOLDER)
_ALL = re.compile(f"{_CLUSTERS.pattern}|{_PLACEHOLDER}")


def folded(text: str) -> str:
    """The text as detectors read it."""
    return legible(_PLACEHOLDERS.sub("[]", text) if "[" in text else text)


def legible(text: str) -> str:
    """The same with placeholders as they are."""
    if text.isascii():
        return text
    return _CLUSTERS.sub(_replacement, text) if _COMPOSES.search(text) else _RUNS.sub(_replaced, text)


def _replaced(found: re.Match[str]) -> str:
    run = found[0]
    return _REPLACED.get(run) or run.translate(_TRANSLATION)  # most are of one character


def _replacement(found: re.Match[str]) -> str:
    cluster = found[0]
    if len(cluster) == 1:
        return _REPLACED.get(cluster, cluster)
    if found[1] is None:
        return "[]"
    return unicodedata.normalize("NFKC", found[1]).translate(_TRANSLATION)


@dataclass(frozen=True, slots=True)
class Aligned:
    """A folded text, as UTF-8, with the place in the original of every byte: the first character of the cluster that
    it was made from, and the one after its last."""

    text: bytes
    starts: Sequence[int]
    ends: Sequence[int]

    @classmethod
    def of(cls, text: str) -> Aligned:
        """The same text as `folded` gives."""
        masked = "[" in text and _PLACEHOLDERS.search(text) is not None
        if text.isascii() and not masked:
            return cls(text.encode(), range(len(text)), range(1, len(text) + 1))
        parts: list[bytes] = []
        starts, ends = array("q"), array("q")

        def add(piece: str, first: int, last: int) -> None:
            encoded = encode(piece)
            parts.append(encoded)
            starts.extend([first] * len(encoded))
            ends.extend([last] * len(encoded))

        position = 0
        pattern = _ALL if masked else _CLUSTERS if _COMPOSES.search(text) else _SINGLES
        for found in pattern.finditer(text):
            for place in range(position, found.start()):
                add(text[place], place, place + 1)
            position = found.end()
            add(_replacement(found), found.start(), position)
        for place in range(position, len(text)):
            add(text[place], place, place + 1)
        return cls(b"".join(parts), starts, ends)


def encode(text: str) -> bytes:
    """UTF-8; a lone surrogate, which has none, becomes "?"."""
    return text.encode(errors="replace")
