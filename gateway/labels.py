"""What kinds of private data and secrets a text holds.

Owns normalisation (writing a number in other digits hides nothing) and the two passes: one linear-time automaton over
all patterns of all wanted kinds, then the checks of those that fired. The detectors are rows of `detectors.py`. Refuses
to say where something was found or what it is: a label is all that leaves this module.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

import re2

from gateway.detectors import DETECTORS, Detector
from gateway.marks import without_excess_marks

KINDS: frozenset[str] = frozenset(detector.kind for detector in DETECTORS)

_MEMORY = (
    64 << 20
)  # bytes for the automaton's states: it forgets and rebuilds them when full, which is slow, never wrong

# Candidates of one detector that are checked, at 10 to 40 µs each. A text with more of them counts as one that has the
# kind: what was not looked at may not pass.
MOST_CANDIDATES = 20_000

_DASHES = "\u00ad\u058a\u05be\u1806\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2e3a\u2e3b\ufe58\ufe63\uff0d\u30fc"
# Default_Ignorable_Code_Point (DerivedCoreProperties.txt) but the soft hyphen, and the annotation characters.
_INVISIBLE = "".join(
    chr(code)
    for first, last in (
        *((0x034F, 0x034F), (0x061C, 0x061C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200F)),
        *((0x202A, 0x202E), (0x2060, 0x206F), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFF9, 0xFFFB)),
    )
    for code in range(first, last + 1)
)
_INVISIBLE_ABOVE = "\U000e0000-\U000e0fff"  # as a range, which is one comparison

_LAST_OF_BMP = "\uffff"


def _replacements() -> dict[str, str]:
    """Dashes become "-", decimal digits the ASCII ones, invisible characters nothing, line separators a line break."""
    table = {chr(code): str(unicodedata.decimal(chr(code))) for code in range(0x80, 0x110000) if chr(code).isdecimal()}
    table |= dict.fromkeys(_DASHES, "-") | dict.fromkeys(_INVISIBLE, "") | dict.fromkeys("\u0085\u2028\u2029", "\n")
    return table | {"\u1680": " ", "\u2800": " "}


_REPLACEMENTS = _replacements()
# Two patterns for speed: `re` looks a character up in one step where all of a class are below U+10000, else one by one.
_REPLACED = re.compile(f"[{''.join(character for character in _REPLACEMENTS if character <= _LAST_OF_BMP)}]")
_REPLACED_ABOVE = re.compile(
    f"[{_INVISIBLE_ABOVE}{''.join(character for character in _REPLACEMENTS if character > _LAST_OF_BMP)}]"
)


class Scanner:
    """Finds the kinds that a policy asks for.

    Invariant: immutable once built, so that threads may share it; `scan` is a pure function of its texts, takes time
    linear in their length, and raises for no string.
    """

    def __init__(self, kinds: Iterable[str]) -> None:
        """Raises ValueError where a kind is not one of `KINDS`."""
        wanted = frozenset(kinds)
        if unknown := wanted - KINDS:
            raise ValueError(f"no detector for {', '.join(sorted(unknown))}; there are {', '.join(sorted(KINDS))}")
        self.kinds = wanted
        self._detectors: list[Detector] = []
        self._patterns = []
        options = re2.Options()
        options.max_mem = _MEMORY
        options.log_errors = False  # it would write the pattern's failure to stderr
        options.encoding = re2.Options.Encoding.LATIN1  # bytes are matched as they are: no text is invalid
        options.never_capture = True
        self._any = re2.Set.SearchSet(options)
        for detector in DETECTORS:
            if detector.kind in wanted:
                self._detectors.append(detector)
                self._patterns.append(re2.compile(detector.pattern, options))
                self._any.Add(detector.hint or detector.pattern)
        self._any.Compile()

    def scan(self, texts: Sequence[str]) -> frozenset[str]:
        """The kinds that occur in the texts, which are read as one, a line each: what is split over two is found."""
        if not self._detectors:
            return frozenset()
        text = _normalized("\n".join(texts))
        found: set[str] = set()
        for index in self._any.Match(text) or ():  # None where nothing fires
            detector = self._detectors[index]
            if detector.kind not in found and self._occurs(index, text):
                found.add(detector.kind)
        return frozenset(found)

    def _occurs(self, index: int, text: bytes) -> bool:
        detector, pattern = self._detectors[index], self._patterns[index]
        position = 0
        for _ in range(MOST_CANDIDATES):
            match = pattern.search(text, position)
            if match is None:
                return False
            start, end = match.span()
            if detector.check(text, start, end):
                return True
            # A rejected match of limited length may hide one that begins within it.
            position = start + 1 if detector.overlaps else end
        return True


def _normalized(text: str) -> bytes:
    """UTF-8 with compatibility forms folded; ASCII, which needs none of it, passes unchanged."""
    if not text.isascii():
        text = _REPLACED.sub(_replacement, unicodedata.normalize("NFKC", without_excess_marks(text)))
        if max(text) > _LAST_OF_BMP:
            text = _REPLACED_ABOVE.sub(_replacement, text)
    return text.encode(errors="replace")


def _replacement(found: re.Match[str]) -> str:
    return _REPLACEMENTS.get(found[0], "")
