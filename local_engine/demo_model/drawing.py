"""What training and measurement draw from the corpus: conversations as people would write them.

Owns wording by chance: rewordings, casual style, invented private data and unknown words. Refuses to draw a question
that is held out. All chance comes in as a `random.Random`.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence

from local_engine.demo_model.corpus import Case, Corpus, Message, Topic, ask, frame_of, key, sentences

USUAL_SHARE = 0.15  # of the questions about topics: asked word for word as the topic's first ones
USUAL_QUESTIONS = 3


def draw_case(corpus: Corpus, rng: random.Random) -> Case:
    """One training conversation: often casual, sometimes with a system prompt or earlier turns."""
    question, answer = _draw_question(corpus, rng)
    messages: list[Message] = []
    if rng.random() < 0.45:
        messages.append({"role": "system", "content": rng.choice(corpus.system_prompts.trained)})
    if rng.random() < 0.10:
        for _ in range(rng.choice((1, 1, 1, 2))):
            earlier, reply = _draw_question(corpus, rng)
            messages.append({"role": "user", "content": earlier})
            messages.append({"role": "assistant", "content": reply})
    messages.append({"role": "user", "content": question})
    return Case(tuple(messages), answer)


def _draw_question(corpus: Corpus, rng: random.Random) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.07:
        return casual(_private(corpus, corpus.private.trained, rng), corpus, rng, lower=False), corpus.private_answer
    if kind < 0.30:
        return casual(_off_topic(corpus, rng), corpus, rng), corpus.off_topic.answer
    topic = rng.choice(corpus.topics)
    if rng.random() < USUAL_SHARE and topic.ask:  # "Who are you?" is four tokens, one of them all that tells it apart
        return rng.choice(sentences(topic).trained[:USUAL_QUESTIONS]), topic.answer
    question = _topic_question(corpus, topic, rng)
    if rng.random() < 0.6:
        question = reword(question, topic, corpus, rng)
    return casual(question, corpus, rng), topic.answer


def _topic_question(corpus: Corpus, topic: Topic, rng: random.Random) -> str:
    """A whole question about half of the time, else a noun or a verb in a frame: the forms are learned evenly."""
    ways = ["ask"] * (3 if topic.ask else 0) + ["noun"] * (2 if topic.noun else 0) + ["verb"] * (2 if topic.verb else 0)
    way = rng.choice(ways)
    if way == "noun":
        return frame_of(rng.choice(corpus.nouns.trained), rng.choice(topic.noun))
    if way == "verb":
        return frame_of(rng.choice(corpus.verbs.trained), rng.choice(topic.verb))
    return rng.choice(sentences(topic).trained)


def reword(question: str, topic: Topic, corpus: Corpus, rng: random.Random) -> str:
    """Exchange words for others that mean the same, leave some out, or mix their order, as hasty people do.

    Where that makes a question which is held out or another topic's, the question stays as it was.
    """
    text = question
    for group in corpus.rewordings:
        present = (form for form in group if form in text)  # most forms are not, and a regular expression costs more
        found = next((form for form in present if re.search(rf"\b{re.escape(form)}\b", text)), None)
        if found is not None and rng.random() < 0.5:
            text = re.sub(rf"\b{re.escape(found)}\b", rng.choice(group), text, count=1)
    words = text.split()
    if rng.random() < 0.2:
        words = [word for word in words if word.lower() not in corpus.droppable or rng.random() < 0.4]
    if rng.random() < 0.15 and len(words) > 4:
        words.pop(rng.randrange(len(words)))
    if rng.random() < 0.08:
        rng.shuffle(words)
    text = " ".join(words)
    return text if text and corpus.owners.get(key(text), (topic.id, "trained")) == (topic.id, "trained") else question


def _off_topic(corpus: Corpus, rng: random.Random) -> str:
    """Many of them stand in the topics' own frames, so that a frame alone says nothing about the topic."""
    off_topic = corpus.off_topic
    if rng.random() < 0.15:
        return rng.choice(off_topic.plain.trained)
    if rng.random() < 0.3:
        noun = (
            _pseudo(rng)
            if rng.random() < 0.4
            else rng.choice(off_topic.words[rng.choice(("thing", "thing", "person"))])
        )
        return frame_of(rng.choice(corpus.nouns.trained), rng.choice(("", "", "a ", "the ")) + noun)
    if rng.random() < 0.2:
        return frame_of(rng.choice(corpus.verbs.trained), rng.choice(off_topic.words["act"]))
    words = {name: rng.choice(choices) for name, choices in off_topic.words.items()}
    words |= {"thing2": rng.choice(off_topic.words["thing"]), "pseudo": _pseudo(rng), "pseudo2": _pseudo(rng)}
    numbers = {"number": str(rng.randrange(2, 2100)), "number2": str(rng.randrange(2, 100))}
    text = rng.choice(off_topic.templates).format(**words, **numbers)
    return text[0].upper() + text[1:] if rng.random() < 0.8 else text


def _pseudo(rng: random.Random) -> str:
    """A word that does not exist, so that an unknown word alone is a reason to decline."""
    if rng.random() < 0.25:
        return "".join(rng.choices(string.ascii_uppercase, k=rng.randint(3, 5)))
    syllables = [
        rng.choice("bcdfghjklmnprstvwz") + rng.choice(("a", "e", "i", "o", "u", "ea", "ou")) + rng.choice("  nrstlmk")
        for _ in range(rng.randint(2, 4))
    ]
    word = "".join(syllables).replace(" ", "")
    return word.capitalize() if rng.random() < 0.3 else word


def _private(corpus: Corpus, sentences: Sequence[str], rng: random.Random) -> str:
    name = rng.choice(corpus.names)
    user = name.lower().replace(" ", rng.choice((".", "_", "")))
    host = rng.choice(("example.com", "example.org", "mail.test", "company.example"))
    iban = rng.choice(("DE", "FR", "CH", "GB")) + _digits(rng, 20)
    return rng.choice(sentences).format(
        card=card_number(rng),
        email=f"{user}@{host}",
        iban=" ".join(iban[i : i + 4] for i in range(0, 22, 4)) if rng.random() < 0.6 else iban,
        key="sk-" + "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(20, 32))),
        name=name,
        phone=rng.choice(("+1 {}-{}-{}", "+49 {} {}{}", "({}) {}-{}")).format(
            _digits(rng, 3), _digits(rng, 3), _digits(rng, 4)
        ),
        ssn=f"{_digits(rng, 3)}-{_digits(rng, 2)}-{_digits(rng, 4)}",
    )


def card_number(rng: random.Random) -> str:
    """Sixteen digits with a right Luhn check digit (ISO/IEC 7812-1), grouped as people write them."""
    digits = [int(d) for d in rng.choice(("4", "51", "55", "4111")) + _digits(rng, 15)][:15]
    total = sum(d if i % 2 else (2 * d - 9 if d > 4 else 2 * d) for i, d in enumerate(digits))
    text = "".join(map(str, [*digits, -total % 10]))
    separator = rng.choice((" ", " ", "-", ""))
    return separator.join(text[i : i + 4] for i in range(0, 16, 4))


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.digits, k=count))


def casual(text: str, corpus: Corpus, rng: random.Random, *, lower: bool = True) -> str:
    """Say it as people type: without capitals or full stop, with a greeting or a please, rarely with a typo."""
    if rng.random() < 0.3:
        text = text.rstrip("?.!") or text
    if rng.random() < 0.12:
        text = rng.choice(corpus.prefixes.trained) + (text if rng.random() < 0.5 else text[0].lower() + text[1:])
    if rng.random() < 0.10:
        text += rng.choice(corpus.suffixes)
    if lower and rng.random() < 0.35:
        text = text.lower()
    if lower and rng.random() < 0.06:
        text = _typo(text, rng)
    return text


def _typo(text: str, rng: random.Random) -> str:
    """Drop, double or swap one letter."""
    if len(text) < 8:
        return text
    at = rng.randrange(1, len(text) - 2)
    one, two = text[at], text[at + 1]
    return text[:at] + rng.choice((two, one + one + two, two + one)) + text[at + 2 :]


def private_cases(corpus: Corpus, rng: random.Random, count: int) -> list[Case]:
    """Unseen sentences around fresh private-looking data."""
    return [ask(_private(corpus, corpus.private.held_out, rng), corpus.private_answer) for _ in range(count)]


def casual_cases(cases: Sequence[Case]) -> list[Case]:
    """The same questions in lower case and without the final mark."""
    return [ask(case.messages[-1]["content"].lower().rstrip("?.!"), case.answer) for case in cases]


def in_conversation(corpus: Corpus, cases: Sequence[Case], rng: random.Random) -> list[Case]:
    """The same questions after an unseen system prompt and one earlier turn."""
    placed = []
    for case in cases:
        topic = rng.choice(corpus.topics)
        earlier: tuple[Message, ...] = (
            {"role": "system", "content": rng.choice(corpus.system_prompts.held_out)},
            {"role": "user", "content": rng.choice(sentences(topic).trained)},
            {"role": "assistant", "content": topic.answer},
        )
        placed.append(Case((*earlier, *case.messages), case.answer))
    return placed


def after_system(prompt: str, case: Case) -> Case:
    """The same conversation behind a system prompt."""
    return Case(({"role": "system", "content": prompt}, *case.messages), case.answer)
