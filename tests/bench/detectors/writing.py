"""How a number gets onto the page: what stands between its groups, in which digits, with what around each group.

Owns two families of ways: `OPEN` for tuning, `BLIND` to be looked at only in the end. Refuses to know what a number is.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

Groups = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """Ways of writing. `wide` joints stand between the groups of cards and accounts, `narrow` ones between those of any
    number. `scripts` are the zeros of other scripts. `around` is put before and after each group."""

    narrow: tuple[str, ...]
    wide: tuple[str, ...]
    scripts: tuple[str, ...]
    around: tuple[tuple[str, str, str], ...]  # before, after, between


OPEN = Family(
    narrow=(" ", " ", "-", "-", " - ", ".", "/", "\u00a0", "\u2013", "\u2011", "\n"),
    wide=("_", ", ", "  ", "\t", " \n", "\u2009", "\u3000", "\u2014", " / ", "|"),
    scripts=("\uff10", "\u0660", "\u06f0", "\u0966", "\U0001d7ce"),
    around=(('"', '"', " "), ('"', '"', ", "), ("**", "**", " "), ("`", "`", " "), ("[", "]", " ")),
)
BLIND = Family(
    narrow=(" ", "-", "\u2212", " \u2013 ", "\u202f", "\u2007", "\u2012", "\r\n", ". ", " -", "- "),
    wide=("\u00b7", " | ", ",", "--", "; ", ":", " . ", "\n\n", "\u2002", " _ ", "\\n", "&nbsp;", "+"),
    scripts=("\u09e6", "\u0e50", "\u1040", "\U0001d7d8", "\u0ae6"),
    around=(
        ("'", "'", ", "),
        ("*", "*", " "),
        ("(", ")", " "),
        ("<b>", "</b>", " "),
        ('"', '"', ",\n"),
        ("_", "_", " "),
    ),
)


def in_script(text: str, zero: str) -> str:
    """The same with the digits of another script, and wide letters where those are wide."""
    wide = zero == "\uff10"
    return "".join(
        chr(ord(zero) + int(sign))
        if sign.isascii() and sign.isdigit()
        else chr(ord(sign) + 0xFEE0)
        if wide and sign.isascii() and sign.isalpha()
        else sign
        for sign in text
    )


def joined(chance: Random, family: Family, groups: Groups, *, wide: bool, bare: bool) -> str:
    """The number as somebody wrote it. `wide`: with anything between the groups; `bare`: possibly with nothing."""
    draw = chance.random()
    if bare and draw < 0.25:
        text = "".join(groups)
    elif wide and draw < 0.45:
        if draw < 0.33:
            before, after, between = chance.choice(family.around)
            text = between.join(f"{before}{group}{after}" for group in groups)
        else:
            text = chance.choice(family.wide).join(groups)
    else:
        text = chance.choice(family.narrow).join(groups)
    return disguised(chance, family, text)


def disguised(chance: Random, family: Family, text: str) -> str:
    """Sometimes in other digits, with something invisible inside, or with a line break in the middle of a group."""
    draw = chance.random()
    if draw < 0.1:
        return in_script(text, chance.choice(family.scripts))
    if draw < 0.13:
        place = chance.randint(1, len(text) - 1)
        return text[:place] + chance.choice("\u200b\u2060\ufeff\u00ad"[:3]) + text[place:]
    return text
