"""What an entry of the policy file may refer to, and the sentence for what is not defined."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from gateway.policyfile.entries import Checked, suggestion
from gateway.policyfile.shapes import Shape
from gateway.policyfile.tree import Problem
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
    return (entry.problem(f'{noun} "{word}" is not defined{suggestion(word, known)}', *loc, n) for n, word in missing)
