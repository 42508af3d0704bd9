"""Passwords: after a word for them, within an address, as an argument of a program.

Owns what a password looks like, and what stands after a word for one and is none. Refuses placeholders, variables and
words of a sentence.
"""

from __future__ import annotations

import re

from gateway.detectors.base import Place, Row, runs_on
from gateway.detectors.words import PASSWORD, is_placeholder

_REACH = 48  # characters from a word to the password
# Signs after a word for passwords, up to the value. `close`: an assignment or a verb.
_CLOSE = re.compile(
    r"(?i)[\"'`\])*]{0,3}\s{0,4}(?:\([^()\n]{1,16}\)\s?|\svalue)?(?:=>|:=|->|→|\s-\s|[:=#>]|は|是|为|為|(?:is|was|are|ist|war|lautet|est|es|era|é|è|eh|to|jest|är|er|on|je|là|είναι|olarak)\b)"
    r"(?:\s{0,4}|\s?(?:le|la|el|il)\s)[\"'`(<\[*]{0,3}"
)
_MARKED = re.compile(r"""(?:</?[a-z]|\$[{(]|\$(?:[A-Z_]+|[a-z_]+)$|%[sd]\b|%\w+%|\{|&[a-z]+;)""")
_TOKEN = re.compile(r"""[^\s"'`<>;,|()\\（）。、，；“”„«»「」『』،؛]+""")
_LONGER = re.compile(
    r"""(?![A-Za-z_.]{3,}\()[^\s"'`<>;,|\\“”„«»「」『』،؛]*[^\s"'`<>;,|\\).“”„«»「」『』،؛]"""
)  # brackets are part of it as well
_NO_PASSWORD = re.compile(
    r"(?i)(?:sha|md|aes|rsa|utf|rfc|iso|base|oauth|http|tls|ssl|v|ipv|win|mp)[ _-]?\d[\w.-]*|\d+[-.]?(?:px|ms|s|kb|mb|gb|tb|th|st|nd|rd|x|k|m|h|min|days?|chars?|characters?|bits?|bytes?|zeichen)?"
    r"|\d{1,4}[-./:]\d{1,2}(?:[-./:]\d{1,4})?.*|\[[A-Z_]+_\d+\].*"
)
_CODE = re.compile(r"[=({\[].*[)}\]]")
_WEAK = re.compile(r"[0-9]|[^\W_]\W[^\W_]|[a-z][A-Z]")  # what a word of a sentence has not
_ASSIGNED = re.compile(r"^[\w.-]+[=:]|\w@[\w-]+\.\w")  # a field with its value, an address
_SHORTEST_ALONE = 6  # characters
_WORDS_FOR_NONE = frozenset((
    "required", "optional", "string", "text", "str", "none", "null", "nil", "true", "false", "undefined",
    "password", "passwd", "passphrase", "secret", "hidden", "redacted", "default", "empty", "blank", "missing",
    "wrong", "incorrect", "invalid", "expired", "protected", "changed", "reset", "forgotten", "forgot", "strength",
    "policy", "field", "input", "label", "type", "here", "please", "enter", "must", "your", "the", "a", "an", "is",
    "are", "it", "not", "and", "or", "in", "on", "at", "for", "of", "to", "from", "with", "has", "was", "will",
    "can", "may", "value", "token", "hash", "hashed", "encrypted", "bytes", "any", "object", "varchar", "char",
    "int", "file", "path", "confirm", "confirmation", "new", "old", "current", "login", "user", "username",
    "email", "example", "changeme", "todo", "tbd", "n/a", "na", "yes", "no", "set", "unset", "stored",
    "erforderlich", "falsch", "vergessen", "ungültig", "pflichtfeld", "requis", "obligatoire", "oublié",
    "requerido", "obligatorio",
))  # fmt: skip


def password(text: bytes, start: int, end: int) -> Place | None:
    """What follows a word for passwords: closely, or within a few words and nothing but a password by its looks."""
    if runs_on(text, end):
        return None
    after = text[end : end + 160].decode(errors="ignore")
    link = _CLOSE.match(after)
    place = link.end() if link is not None else 0
    for number, found in enumerate(_TOKEN.finditer(after, place)):
        if link is not None and number == 0 and found.start() <= place + 1:
            found = _LONGER.match(after, place) or found
        value = found[0]
        close = link is not None and number == 0 and found.start() == place
        if found.start() > _REACH or number > 7:
            return None
        if not close and (len(value) < _SHORTEST_ALONE or _WEAK.search(value) is None):
            continue
        value = value if close else value.rstrip(".?!:")
        if _is_password(value, after[found.end() : found.end() + 1], after[place - 1 : place], close):
            first = end + len(after[: found.start()].encode())
            return first, first + len(value.encode())
        if close and (not value[:1].isalnum() or after[:place].strip()[:1] in (":", "=", "#")):
            return None
    return None


def _is_password(value: str, following: str, quote: str, close: bool) -> bool:
    if (
        len(value) < (3 if close else _SHORTEST_ALONE)
        or following == "("
        or value[0] in "/~"
        or value.count("/") > 1
        or (value[0] in "<$%{&" and _MARKED.match(value))
        or value.lower().strip("*.!?_:") in _WORDS_FOR_NONE
        or not (value[0].isalnum() or any(map(str.isalnum, value)))
        or _NO_PASSWORD.fullmatch(value)
        or _CODE.search(value)
        or is_placeholder(value.encode())
    ):
        return False
    letters = any(map(str.isalpha, value))
    if not close:
        if not value.isascii() or not letters or _ASSIGNED.search(value):
            return False
        return any(map(str.isdigit, value)) or _is_special(value) or len(re.findall(r"[a-z][A-Z]", value)) >= 3
    if any(map(str.isdigit, value)) or _is_special(value):
        return True
    if not value.isascii():
        return False
    if quote in ('"', "'", "`") and len(value) >= 5:
        return True
    return letters and "." not in value and not (value.islower() or value.istitle() or value.isupper())


_SPECIAL = re.compile(r"[^\w\-./]|_")


def _is_special(value: str) -> bool:
    """Whether there is a sign within that words do not have."""
    return _SPECIAL.search(value, 1, len(value) - 1) is not None


def in_address(text: bytes, start: int, end: int) -> Place | None:
    """A password within an address."""
    first, last = text.rindex(b":", start, end) + 1, text.rindex(b"@", start, end)
    value = text[first:last]
    if (
        is_placeholder(value)
        or value.lower() in (b"password", b"pass", b"pwd", b"secret")
        or value[:1] in (b"$", b"<", b"{")
    ):
        return None
    return first, last


_LONG = "|".join(
    word for word in PASSWORD.split("|") if word not in ("pass", "pw", "clave", "parola", "senha", "mdp", "pwd", "psw")
)
ROWS = (
    Row("password", r"[a-z0-9]://[^\s/:@\"'<>]*:[^\s/\"'<>]{3}[^\s/\"'<>]*@[A-Za-z0-9\[]", in_address, "://"),
    Row("password", rf"(?i)(?:^|[^a-z])(?:{PASSWORD})|(?:{_LONG})", password),
    Row(
        "password",
        r"(?i)(?:mysql|psql|mariadb|mongo|sshpass|smbclient|curl|redis-cli)[^\n|;]{0,80} (?:-p|-a|-u [^\s:]{1,40}:) ?['\"]?[^\s'\"$<{-]{4,64}",
        lambda text, start, end: (text.rindex(b" ", start, end) + 1, end),
        "(?i)mysql|psql|mariadb|mongo|sshpass|smbclient|curl|redis-cli",
    ),
)
