"""The demo model's corpus: questions about Hybridgate and LLM serving, phrased in many ways, each with one answer.

Owns what the YAML files beside it say and which phrasings are held out of training. Refuses chance: what training
draws from a corpus is `drawing`'s. Reading the files is `load()`'s alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TOPIC_FILES = ("topics.yaml", "topics_policy.yaml", "topics_serving.yaml")
HELD_OUT_EVERY = 6  # of a topic's own questions every sixth, starting with the fifth, is never trained on
HELD_OUT_PHASE = 4

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Topic:
    """One answer and the ways to ask for it; `noun` and `verb` go into frames, `ask` and `more` are whole questions.

    Every phrasing is on one side of the split.
    """

    id: str
    answer: str
    noun: tuple[str, ...] = ()
    verb: tuple[str, ...] = ()
    ask: tuple[str, ...] = ()
    more: tuple[str, ...] = ()  # all trained on, while of `ask` some are held out


@dataclass(frozen=True, slots=True)
class Split:
    """Sentences that are trained on and sentences that never are; the two are disjoint."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """A conversation that ends with a question, and the one answer that counts as right."""

    messages: tuple[Message, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Blind:
    """Questions written without sight of the corpus: `documented` are in it all the same, `unseen` are not.

    Those of `off_topic` are to be declined.
    """

    documented: tuple[Case, ...]
    unseen: tuple[Case, ...]
    off_topic: tuple[Case, ...]


@dataclass(frozen=True, slots=True)
class OffTopic:
    """Questions that the model declines; a template's slots are filled from `words`, by the name of the slot."""

    answer: str
    templates: tuple[str, ...]
    plain: Split
    words: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Everything that can be asked. A phrasing belongs to one topic and to one side of the split."""

    topics: tuple[Topic, ...]
    nouns: Split
    verbs: Split
    system_prompts: Split
    private: Split
    private_answer: str
    names: tuple[str, ...]
    off_topic: OffTopic
    prefixes: Split
    suffixes: tuple[str, ...]
    rewordings: tuple[tuple[str, ...], ...]
    droppable: frozenset[str]
    blind: Blind
    owners: Mapping[str, tuple[str, str]]  # key of a question → its topic, and "trained" or "held out"


def load(folder: Path) -> Corpus:
    """Read the corpus from `folder`.

    Raises ValueError, with all of them, where two topics or both sides of the split claim the same question.
    """
    more = _read(folder / "wordings.yaml")
    topics = tuple(
        Topic(
            entry["id"],
            entry["answer"],
            tuple(entry.get("noun", ())),
            tuple(entry.get("verb", ())),
            tuple(entry.get("ask", ())),
            tuple(more.get(entry["id"], ())),
        )
        for name in TOPIC_FILES
        for entry in _read(folder / name)
    )
    phrasings, off_topic = _read(folder / "phrasings.yaml"), _read(folder / "off_topic.yaml")
    nouns, verbs = _split(phrasings["noun"]), _split(phrasings["verb"])
    blind = _read(folder / "blind.yaml")
    return Corpus(
        topics=topics,
        nouns=nouns,
        verbs=verbs,
        system_prompts=_split(phrasings["system_prompts"]),
        private=_split(phrasings["private"]),
        private_answer=phrasings["private"]["answer"],
        names=tuple(phrasings["private"]["names"]),
        off_topic=OffTopic(
            answer=off_topic["answer"],
            templates=tuple(off_topic["templates"]),
            plain=Split(tuple(off_topic["plain"]), tuple(off_topic["held_out"])),
            words={
                "thing": tuple(off_topic["things"]),
                "act": tuple(off_topic["acts"]),
                "place": tuple(off_topic["places"]),
                "person": tuple(off_topic["persons"]),
                "language": tuple(off_topic["languages"]),
                "code": tuple(off_topic["codes"]),
                "quality": tuple(off_topic["qualities"]),
            },
        ),
        prefixes=_split(phrasings["prefixes"]),
        suffixes=tuple(phrasings["suffixes"]),
        rewordings=tuple(tuple(group) for group in phrasings["rewordings"]),
        droppable=frozenset(phrasings["droppable"]),
        blind=Blind(
            _blind(blind["documented"], topics),
            _blind(blind["unseen"], topics),
            tuple(ask(text, off_topic["answer"]) for text in blind["off_topic"]),
        ),
        owners=_owners(topics, nouns, verbs, blind["unseen"]),
    )


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _split(section: Mapping[str, Sequence[str]]) -> Split:
    return Split(tuple(section["trained"]), tuple(section["held_out"]))


def key(question: str) -> str:
    """What makes two questions the same: the words, whatever the capitals and the final mark."""
    return question.lower().rstrip("?.! ")


def sentences(topic: Topic) -> Split:
    """The whole questions of a topic; every sixth of `ask` is held out."""
    return Split(
        tuple(text for i, text in enumerate(topic.ask) if i % HELD_OUT_EVERY != HELD_OUT_PHASE) + topic.more,
        tuple(text for i, text in enumerate(topic.ask) if i % HELD_OUT_EVERY == HELD_OUT_PHASE),
    )


def framed(words: Sequence[str], frames: Split) -> Split:
    """A topic's nouns or verbs in frames; frames that are held out are so for all topics."""
    return Split(
        tuple(frame_of(frame, word) for word in words for frame in dict.fromkeys(frames.trained)),
        tuple(frame_of(frame, word) for word in words for frame in frames.held_out),
    )


def frame_of(frame: str, word: str) -> str:
    """Put a word into a frame. A sentence begins with a capital, unless its first word is code or a name."""
    text = frame.format(word)
    first = text.split(" ", 1)[0]
    return text[0].upper() + text[1:] if first.isalpha() and first.islower() and " " in text else text


def _blind(questions: Mapping[str, Sequence[str]], topics: Sequence[Topic]) -> tuple[Case, ...]:
    answers = {topic.id: topic.answer for topic in topics}
    return tuple(ask(text, answers[name]) for name, texts in questions.items() for text in texts)


def _owners(
    topics: Sequence[Topic], nouns: Split, verbs: Split, unseen: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, str]]:
    owners: dict[str, tuple[str, str]] = {}
    clashes: list[str] = []
    for topic in topics:
        for part in (sentences(topic), framed(topic.noun, nouns), framed(topic.verb, verbs)):
            for side, questions in (("trained", part.trained), ("held out", part.held_out)):
                for question in questions:
                    if owners.setdefault(key(question), (topic.id, side)) != (topic.id, side):
                        clashes.append(f"{question!r} is asked in {owners[key(question)]} and in {(topic.id, side)}")
    for name, texts in unseen.items():
        for question in texts:
            if owners.setdefault(key(question), (name, "held out")) != (name, "held out"):
                clashes.append(f"{question!r} of blind.yaml is asked in {owners[key(question)]}")
    if clashes:
        raise ValueError("\n".join(clashes))
    return owners


def ask(question: str, answer: str) -> Case:
    """A conversation of that one question."""
    return Case(({"role": "user", "content": question},), answer)


def trained_cases(corpus: Corpus) -> list[Case]:
    """Every phrasing of every topic that training may draw, as written."""
    return [
        ask(text, topic.answer)
        for topic in corpus.topics
        for part in (sentences(topic), framed(topic.noun, corpus.nouns), framed(topic.verb, corpus.verbs))
        for text in part.trained
    ]


def held_out_frames(corpus: Corpus) -> list[Case]:
    """Known subjects, put in a way that training never does.

    For each topic two unseen frames around its first noun, one around its first verb, and one trained question behind
    an unseen opening.
    """
    cases = []
    for place, topic in enumerate(corpus.topics):
        for words, frames, count in ((topic.noun, corpus.nouns, 2), (topic.verb, corpus.verbs, 1)):
            for word in words[:1]:
                chosen = [frames.held_out[(place * count + i) % len(frames.held_out)] for i in range(count)]
                cases += [ask(frame_of(frame, word), topic.answer) for frame in chosen]
        opening = corpus.prefixes.held_out[place % len(corpus.prefixes.held_out)]
        for question in sentences(topic).trained[1:2]:
            cases.append(ask(opening + question, topic.answer))
    return cases


def held_out_sentences(corpus: Corpus) -> list[Case]:
    """Whole questions that training never draws; some share only their meaning with what it does."""
    return [ask(text, topic.answer) for topic in corpus.topics for text in sentences(topic).held_out]


def off_topic_cases(corpus: Corpus) -> list[Case]:
    """Written questions about anything else; no template makes them."""
    return [ask(text, corpus.off_topic.answer) for text in corpus.off_topic.plain.held_out]
