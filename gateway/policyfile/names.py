"""What an entry of the policy file may refer to, and the sentence for what is not defined."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from gateway.policyfile.entries import Checked
from gateway.policyfile.nearness import MOST_SUGGESTIONS, suggestion
from gateway.policyfile.shapes import Shape
from gateway.policyfile.tree import Loc, Problem
from gateway.types import Deployment


@dataclass(frozen=True, slots=True)
class Names:
    """What is defined. `deployments` and `models` are None where their file could not be read: then nothing is said
    about them. `models` are the names that clients may ask for and that rules decide about."""

    deployments: Mapping[str, Deployment | None] | None
    labels: frozenset[str] = field(default_factory=frozenset)
    detected: frozenset[str] = field(default_factory=frozenset)  # of the labels, those that a detector may raise
    slo: frozenset[str] = field(default_factory=frozenset)
    models: frozenset[str] | None = None


def undefined(
    entry: Checked[Shape], noun: str, words: Collection[str] | None, known: Collection[str], *loc: str | int
) -> Iterable[Problem]:
    """A problem for each word of a list that is not among the known ones."""
    missing = [(index, word) for index, word in enumerate(words or ()) if word not in known]
    return _told(entry, noun, missing, known, loc) if missing else ()


def _told(
    entry: Checked[Shape], noun: str, missing: list[tuple[int, str]], known: Collection[str], loc: Loc
) -> Iterator[Problem]:
    for position, (index, word) in enumerate(missing):
        near = suggestion(word, known) if position < MOST_SUGGESTIONS else ""
        yield entry.problem(f'{noun} "{word}" is not defined{near}', *loc, index)
