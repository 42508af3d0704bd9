"""The file of callers' keys: YAML text in, `Keys` or every error with its place out; and the edits to it that
`hybridgate key` makes. Pure.

Owns the file's shape, and that an edit leaves everything else in it as it was, comments included: the edited text is
read again and must differ in nothing but what was meant. Refuses to read or write files, and secrets: it holds digests.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from gateway.keys import Key, Keyring, Keys
from gateway.limits import CallerLimits, Limits
from gateway.policyfile.entries import Checked, Report, check
from gateway.policyfile.limiting import key_limits, plain_limits
from gateway.policyfile.nearness import suggestion
from gateway.policyfile.shapes import Shape
from gateway.policyfile.tree import Node, Place, Problem, parse
from gateway.policyfile.values import Label, Version, Word, Words
from gateway.types import Caller

Section = Literal["keys", "admin"]
SECTIONS: tuple[Section, ...] = ("keys", "admin")

_DIGEST = re.compile(r"[0-9a-f]{64}")
_EMPTY_LIST = re.compile(r"\[\s*\]")
_FALSE = re.compile(r"false", re.IGNORECASE)
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9._/@-]*")  # words that YAML takes as they are, but for the few below
_WORDS_OF_YAML = frozenset({"y", "yes", "n", "no", "true", "false", "on", "off", "null"})

HEADER = """\
# Callers' keys for hybridgate: `hybridgate key new | list | revoke | check`. Secrets are not here, only their SHA-256.
version: 1
"""


def _digest(value: str) -> str:
    if not _DIGEST.fullmatch(value):
        raise ValueError("must be a SHA-256 digest, 64 lower-case hexadecimal digits, and never the key itself")
    return value


def moment_of(text: str) -> float:
    """Seconds since 1970 in UTC of a day (`2027-01-31`, which begins in UTC) or of a time with its offset
    (`2027-01-31T18:00+01:00`). Raises ValueError."""
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
            return datetime.combine(date.fromisoformat(text), time(), UTC).timestamp()
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            return moment.timestamp()
    except (ValueError, OverflowError):
        pass
    raise ValueError("must be a day such as 2027-01-31, or a time with its offset such as 2027-01-31T18:00+01:00")


def _moment(value: str) -> str:
    moment_of(value)
    return value


Digest = Annotated[str, AfterValidator(_digest)]
Moment = Annotated[str, AfterValidator(_moment)]


class KeyFileShape(Shape):
    required = ("version",)

    version: Version | None = None
    tenants: dict[Word, Any] | None = None
    keys: list[Any] | None = None
    admin: list[Any] | None = None


class AdminKeyShape(Shape):
    required = ("id", "sha256")

    id: Word | None = None
    sha256: Digest | None = None
    expires: Moment | None = None
    revoked: bool | None = None


class TenantShape(Shape):
    required = ("limits",)

    limits: Any = None  # read by itself


class KeyShape(AdminKeyShape):
    hints: ClassVar[Mapping[str, str]] = {"budgets": "they are among the `limits`"}

    tenant: Word | None = None
    tags: Words | None = None
    labels: Annotated[list[Label], Field(min_length=1)] | None = None
    deployments: Words | None = None
    slo: Words | None = None
    limits: Any = None  # read by itself


@dataclass(frozen=True, slots=True)
class Known:
    """The names of the policy in use that keys may refer to."""

    labels: Collection[str]
    deployments: Collection[str]
    slo: Collection[str]


class KeyErrors(Exception):
    """A key file that does not load. `problems` are all that were found, in the file's order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(set(problems), key=lambda p: (p.line, p.column, p.message)))
        super().__init__("\n".join(map(str, self.problems)))


def compile_keys(path: str, text: str, known: Known | None) -> Keys:
    """The keys of a file's text. `known` are the names that they may refer to; None where no policy is at hand, and
    then names are not looked at. Raises `KeyErrors`."""
    root, problems = parse(path, text)
    if root is None:
        raise KeyErrors(problems)
    report = problems.append
    file = check(KeyFileShape, root, "", report)
    problems += file.missing()
    tenants = _tenants(root, report)
    ids: dict[str, Place] = {}
    digests: dict[str, Place] = {}
    found: dict[Section, list[Key]] = {section: [] for section in SECTIONS}
    for section in SECTIONS:
        noun, shape = ("key", KeyShape) if section == "keys" else ("admin key", AdminKeyShape)
        for position, node in enumerate(_entries(root, section), 1):
            entry = check(shape, node, _subject(noun, node, position), report)
            problems += entry.missing()
            for name, seen in (("id", ids), ("sha256", digests)):
                _once(entry, name, seen, report)
            held_to = _limits(entry, known, tenants, report)
            if known is not None and isinstance(entry.shape, KeyShape):
                _defined(entry, entry.shape, known, report)
            if not problems:
                found[section].append(_key(entry.shape, held_to))
    if problems:
        raise KeyErrors(problems)
    return Keys(callers=Keyring(found["keys"]), operators=Keyring(found["admin"]))


def _tenants(root: Node, report: Report) -> Mapping[str, Limits]:
    """What each tenant is held to."""
    found: dict[str, Limits] = {}
    for name, node in root.children("tenants").items():
        at = root.place_of(("tenants", name), key=True)
        entry = check(TenantShape, node, f'tenant "{name}"', report, at)
        for problem in entry.missing():
            report(problem)
        part = node.child("limits")
        limits = None if part is None else plain_limits(part, f"{entry.subject}: limits", report)
        if limits is not None:
            found[name] = limits
    return found


def _limits(
    entry: Checked[AdminKeyShape], known: Known | None, tenants: Mapping[str, Limits], report: Report
) -> CallerLimits | None:
    """What a key is held to, by itself and as one of its tenant."""
    if not isinstance(entry.shape, KeyShape):
        return None
    stated, limits, single = key_limits(entry.node.child("limits"), entry.subject, report)
    if stated is not None and known is not None:
        for name in stated.node.children("deployments"):
            if name not in known.deployments:
                hint = suggestion(name, known.deployments)
                message = f'the policy has no deployment called "{name}"{hint}'
                report(stated.problem(message, "deployments", name, key=True))
    tenant = tenants.get(entry.shape.tenant or Caller().tenant)
    return CallerLimits(limits, tenant, single) if limits or tenant or single else None


def _entries(root: Node, section: Section) -> list[Node]:
    child = root.child(section)
    return root.items(section) if child is not None and isinstance(child.plain, list) else []


def _subject(noun: str, node: Node, position: int) -> str:
    """How messages call an entry: by its id where that is one, else by its position, which counts from 1."""
    named = node.child("id")
    if named is not None and isinstance(named.plain, str) and re.fullmatch(r"[\w./:@-]{1,128}", named.plain, re.ASCII):
        return f'{noun} "{named.plain}"'
    return f"{noun} {position}"


def _once(entry: Checked[AdminKeyShape], name: str, seen: dict[str, Place], report: Report) -> None:
    node = entry.node.child(name)
    if node is None or not isinstance(node.plain, str):
        return
    if node.plain in seen:
        report(entry.problem(f'this "{name}" is that of the key in line {seen[node.plain].line} as well', name))
    seen.setdefault(node.plain, node.place)


def _defined(entry: Checked[AdminKeyShape], shape: KeyShape, known: Known, report: Report) -> None:
    stated: Mapping[str, tuple[str, list[str] | None, Collection[str]]] = {
        "labels": ("label", shape.labels, known.labels),
        "deployments": ("deployment", shape.deployments, known.deployments),
        "slo": ("latency class", shape.slo, known.slo),
    }
    for field, (what, names, defined) in stated.items():
        for index, name in enumerate(names or ()):
            if name not in defined:
                hint = suggestion(name, defined)
                report(entry.problem(f'the policy has no {what} called "{name}"{hint}', field, index))


def _key(shape: AdminKeyShape, limits: CallerLimits | None) -> Key:
    assert shape.id is not None and shape.sha256 is not None
    caller = Caller(key_id=shape.id)
    if isinstance(shape, KeyShape):
        caller = Caller(
            tenant=shape.tenant or caller.tenant,
            key_id=shape.id,
            tags=frozenset(shape.tags or ()),
            labels=frozenset(shape.labels or ()),
            deployments=_or_all(shape.deployments),
            slo=_or_all(shape.slo),
            limits=limits,
        )
    expires = None if shape.expires is None else moment_of(shape.expires)
    return Key(bytes.fromhex(shape.sha256), caller, expires, shape.revoked or False)


def _or_all(names: list[str] | None) -> frozenset[str] | None:
    return None if names is None else frozenset(names)


# Edits.


class CannotEdit(ValueError):
    """The file is written in a way that is not edited by a program; it can be by hand. The message says what to do."""


def with_key(path: str, text: str, section: Section, entry: Mapping[str, str | list[str]]) -> str:
    """The text with one more key at the end of its section. Raises `KeyErrors` where the text does not load or would
    not with that key, and `CannotEdit`."""
    before = _plain(path, text)
    lines = [f"{name}: {_written(value)}" for name, value in entry.items()]
    by_hand = f"add this under `{section}:` by hand:\n  - " + "\n    ".join(lines)
    root, _ = parse(path, text)
    assert root is not None
    after = {**before, section: [*before.get(section, []), dict(entry)]}
    for edited in _additions(text, root, section, lines):
        if _reads(path, edited) == after:
            compile_keys(path, edited, None)
            return edited
    raise CannotEdit(f"{path} is written in a way that is not edited automatically: {by_hand}")


def _additions(text: str, root: Node, section: Section, lines: list[str]) -> Iterable[str]:
    """Ways to write one more entry, the likeliest first."""
    listed = root.child(section)
    if listed is None:
        yield f"{text.rstrip()}\n\n{section}:\n{_item(lines, 2)}"
        return
    if not listed.plain:
        start = _offset(text, listed.place)
        bare = _EMPTY_LIST.match(text, start)
        if bare is not None:
            yield f"{text[:start].rstrip(' ')}\n{_item(lines, 2).rstrip()}{text[bare.end() :]}"
        return
    places = [root.place_of((name,), key=True) for name in root.keys]
    following = [place for place in places if place.line > listed.place.line]
    end = min((_offset(text, Place("", place.line, 1)) for place in following), default=len(text))
    block, rest = text[:end], text[end:]
    if following:  # comments right before the next section are about that
        kept = re.search(r"^(?:[ \t]*(?:#[^\n]*)?\r?\n)*\Z", block, re.MULTILINE)
        if kept is not None:
            block, rest = block[: kept.start()], block[kept.start() :] + rest
    block = block if block.endswith("\n") else block + "\n"
    yield f"{block}{_item(lines, listed.place.column - 1)}{rest}"


def _item(lines: list[str], indent: int) -> str:
    space = " " * indent
    return f"{space}- " + f"\n{space}  ".join(lines) + "\n"


def revoked(path: str, text: str, key_id: str) -> str:
    """The text with that key revoked; as it is where it was already. Raises `KeyErrors` where the text does not load,
    LookupError where it has no such key, and `CannotEdit`."""
    before = _plain(path, text)
    root, _ = parse(path, text)
    assert root is not None
    section, index, node = _named(root, key_id)
    if before[section][index].get("revoked"):
        return text
    entries = list(before[section])
    entries[index] = {**entries[index], "revoked": True}
    after = {**before, section: entries}
    stated = node.child("revoked")
    if stated is not None:
        start = _offset(text, stated.place)
        edits = [text[:start] + _FALSE.sub("true", text[start:], count=1)]
    else:
        place = node.place_of(("id",), key=True)
        start = _offset(text, place)
        space = " " * (place.column - 1)
        edits = [f"{text[:start]}revoked: true{between}{text[start:]}" for between in (f"\n{space}", ", ")]
    for edited in edits:
        if _reads(path, edited) == after:
            return edited
    raise CannotEdit(f'{path} is written in a way that is not edited automatically: add "revoked: true" to the key')


def _named(root: Node, key_id: str) -> tuple[Section, int, Node]:
    for section in SECTIONS:
        for index, node in enumerate(_entries(root, section)):
            named = node.child("id")
            if named is not None and named.plain == key_id:
                return section, index, node
    raise LookupError(key_id)


def _plain(path: str, text: str) -> dict[str, Any]:
    compile_keys(path, text, None)
    plain = _reads(path, text)
    assert plain is not None
    return plain


def _reads(path: str, text: str) -> dict[str, Any] | None:
    """What a text says, right or wrong; None where it is no YAML."""
    root, problems = parse(path, text)
    return root.plain if root is not None and not problems else None


def _offset(text: str, place: Place) -> int:
    """Where a place is in the text."""
    start = 0
    for _ in range(place.line - 1):
        start = text.index("\n", start) + 1
    return start + place.column - 1


def _written(value: str | list[str]) -> str:
    """A value as YAML reads it back."""
    if isinstance(value, list):
        return f"[{', '.join(_written(item) for item in value)}]"
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS_OF_YAML:
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
