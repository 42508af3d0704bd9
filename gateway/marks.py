"""Combining marks in a row, of which a text may hold any number and a language only a few.

Owns the one reason why a text may not be normalized as it is. CPython brings a run of marks in order by insertion
(`nfd_nfkd` in Modules/unicodedata.c) and holds its lock meanwhile: 400 KB of them stop the process for minutes.
"""

from __future__ import annotations

import re
import unicodedata

# Unicode's Stream-Safe Text Format (UAX #15, section 13): no language needs more.
MOST_MARKS = 30

_ENDS_OF_MARKS = 0x20000  # planes 0 and 1; above, there is none


def _is_mark(character: str) -> bool:
    """Whether what a character is made from begins with one that attaches to those before it."""
    decomposed = unicodedata.decomposition(character)
    if not decomposed:
        return unicodedata.combining(character) != 0
    return unicodedata.combining(unicodedata.normalize("NFKD", character)[0]) != 0


_MARKS = "".join(filter(_is_mark, map(chr, range(0x80, _ENDS_OF_MARKS))))
# Two patterns for speed: characters above U+FFFF are compared with a class one by one, so they count as marks at first.
_PERHAPS = re.compile(
    f"[{''.join(mark for mark in _MARKS if mark <= chr(0xFFFF))}\U00010000-\U0010ffff]{{{MOST_MARKS + 1}}}"
)
_TOO_MANY = re.compile(f"([{_MARKS}]{{{MOST_MARKS}}})[{_MARKS}]+")


def without_excess_marks(text: str) -> str:
    """The text with at most `MOST_MARKS` combining marks in a row: the same one for any text that is read by people."""
    return text if _PERHAPS.search(text) is None else _TOO_MANY.sub(r"\1", text)
