"""Who is guessed for and how far, whether guessing goes on, and that no answer changes by it."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, pairwise, repeat
from typing import Any

import pytest
import torch
from torch import Tensor

from local_engine.batch import Batch
from local_engine.config import Limits
from local_engine.engine import Engine, Job, Model
from local_engine.grammar import Grammars, Wanted
from local_engine.lookup import PromptLookup
from local_engine.output import Delta, Output
from local_engine.report import Report
from local_engine.sampling import choose, likelihoods
from local_engine.sequence import FinishReason, Likelihood, Pick, SamplingParams
from local_engine.sequence import Sequence as TokenSequence
from local_engine.speculation import (
    FIRST_SIZE,
    LONGEST_INTERVAL,
    MISSES,
    SHORTEST_PAUSE,
    Ask,
    Drafter,
    Speculation,
)
from local_engine.text import Text
from tests.tiny_models import VOCABULARY

END = 0


def decoding(name: str, *tokens: int, left: int = 100) -> TokenSequence:
    """A sequence of one prompt token that has said these."""
    return TokenSequence(name, 1, [1, *tokens], len(tokens) + left)


class Repeating:
    """Guesses that the last token is said again."""

    def guess(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        return [(ask.tokens[-1],) * ask.size for ask in asks]


class TestLookup:
    """What followed the last time that the sequence ended as it does now."""

    @pytest.mark.parametrize(
        ("tokens", "size", "guesses"),
        [
            ((4, 5, 6, 7, 8, 9, 4, 5, 6), 3, (7, 8, 9)),
            ((4, 5, 6, 1, 4, 5, 6, 2, 4, 5, 6), 2, (2, 4)),  # the last time counts
            ((3, 4, 5, 6, 1, 9, 4, 5, 6, 2, 3, 4, 5, 6), 1, (1,)),  # but first the longest likeness
            ((1, 2, 3, 4, 5), 4, ()),
            ((6, 7, 1, 6, 7), 4, ()),  # two tokens are no likeness
            ((4, 9, 9, 9, 9), 5, (9, 9, 9, 9, 9)),  # goes on as it did
            ((1, 2, 3, 1, 2, 3), 5, (1, 2, 3, 1, 2)),
            ((1, 2, 3 << 8, 4, 9, 1 << 24, 2 << 24, 3, 9, 1, 2, 3), 2, ()),  # bytes that are alike are not tokens
            ((5,), 4, ()),
        ],
    )
    def test_it_guesses(self, tokens: tuple[int, ...], size: int, guesses: tuple[int, ...]) -> None:
        assert PromptLookup().guess([Ask("a", tokens, size)]) == [guesses]

    def test_what_it_remembers_grows_with_the_sequence_and_is_forgotten_with_it(self) -> None:
        lookup, chance = PromptLookup(), random.Random(3)
        tokens = [chance.randrange(3) for _ in range(5)]
        for _ in range(60):
            tokens += [chance.randrange(3) for _ in range(chance.randrange(1, 4))]
            assert lookup.guess([Ask("a", tokens, 4)]) == PromptLookup().guess([Ask("b", tokens, 4)])
        lookup.guess([])
        assert lookup.guess([Ask("a", (1, 2, 1), 4)]) == [()]


class TestSize:
    """How many guesses a sequence gets."""

    def sizes(self, *accepted: int) -> list[int]:
        """The sizes asked for, where so many of each time's guesses are right."""
        speculation, found = Speculation(Repeating(), most=8, max_sequences=4), []
        for right in (*accepted, 0):
            guesses = speculation.guesses([decoding("a", 5)]).get("a", ())
            found.append(len(guesses))
            if guesses:
                speculation.learn("a", len(guesses), right)
        return found

    def test_it_doubles_while_all_are_right_and_halves_where_most_are_wrong(self) -> None:
        assert self.sizes(4, 8, 8, 3, 4, 5, 1, 2) == [FIRST_SIZE, 8, 8, 8, 4, 8, 8, 4, 4]

    def test_after_some_steps_without_a_right_one_there_is_a_pause_and_a_longer_one_if_it_fails_again(self) -> None:
        sizes = self.sizes(*[0] * 60)
        pauses = [len(run) for run in "".join("x" if size else " " for size in sizes).split("x") if run]
        assert pauses == [SHORTEST_PAUSE, 2 * SHORTEST_PAUSE, 60 - 3 * MISSES - 3 * SHORTEST_PAUSE + 1][: len(pauses)]
        assert sizes[:3] == [4, 2, 1]

    @pytest.mark.parametrize(("left", "size"), [(1, 0), (2, 1), (3, 2), (9, FIRST_SIZE)])
    def test_none_goes_beyond_the_last_token_that_may_come(self, left: int, size: int) -> None:
        guesses = Speculation(Repeating(), most=8, max_sequences=4).guesses([decoding("a", 5, left=left)])
        assert len(guesses.get("a", ())) == size


class TestLoad:
    """Whether there are guesses at all: measured, for few and for many sequences apart."""

    def played(self, sequences: int, seconds: Callable[[bool], float], right: int, steps: int) -> list[bool]:
        """Which steps had guesses, of which so many were right."""
        speculation, had = Speculation(Repeating(), most=4, max_sequences=16), []
        running = [decoding(str(n), 5) for n in range(sequences)]
        for _ in range(steps):
            guesses = speculation.guesses(running)
            for id, made in guesses.items():
                speculation.learn(id, len(made), right)
            had.append(bool(guesses))
            tokens = sequences + right * len(guesses)
            speculation.record(sequences, seconds(bool(guesses)), tokens)
        return had

    @pytest.mark.parametrize("sequences", [1, 8, 16])
    @pytest.mark.parametrize(
        ("cost", "right", "pays"), [(2.0, 4, True), (2.0, 1, False), (6.0, 4, False), (1.2, 1, True)]
    )
    def test_it_goes_on_where_it_pays_and_is_tried_rarely_where_it_does_not(
        self, sequences: int, cost: float, right: int, pays: bool
    ) -> None:
        had = self.played(sequences, lambda guessed: cost if guessed else 1.0, right, 12_000)[2_000:]
        assert sum(had) / len(had) > 0.99 if pays else sum(had) / len(had) < 0.005
        assert 0 < sum(had) < len(had)  # the other is tried now and then, since load changes

    def test_one_delay_of_a_step_does_not_decide(self) -> None:
        chance = random.Random(4)
        had = self.played(2, lambda guessed: (1.5 if guessed else 1.0) + 50 * (chance.random() < 0.05), 4, 4_000)
        assert sum(had[1_000:]) > 2_700

    def test_when_it_begins_to_pay_it_is_taken_up_again(self) -> None:
        costs = chain(repeat(9.0, 2_000), repeat(2.0))
        had = self.played(4, lambda guessed: (1.0, next(costs))[guessed], 4, 10_000)
        assert sum(had[1_000:2_000]) < 20
        assert all(had[2_000 + 2 * LONGEST_INTERVAL + 20 : 2_000 + 2 * LONGEST_INTERVAL + 40])

    def test_above_the_limit_there_are_none(self) -> None:
        assert not any(self.played(17, lambda _: 1.0, 4, 100))


class Chain:
    """A model whose next token depends on the last one alone, by a table of logits."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.widest = 0

    def forward(self, batch: Batch) -> Tensor:
        self.widest = max(self.widest, *(chunk.rows for chunk in batch))
        return self.table[[token for chunk in batch for token in chunk.tokens[len(chunk.tokens) - chunk.rows :]]]

    def sample(self, logits: Tensor, rows: Sequence[int], picks: Sequence[Pick]) -> list[int | None]:
        return choose(logits[list(rows)], picks)

    def likelihoods(
        self, logits: Tensor, rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
    ) -> list[Likelihood]:
        return likelihoods(logits[list(rows)], tokens, tops)


class Guessing:
    """Guesses the likeliest way on, and sometimes anything."""

    def __init__(self, table: Tensor, seed: int = 5) -> None:
        self._next = table.argmax(dim=-1).tolist()
        self._chance = random.Random(seed)

    def guess(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        return [self._guess(ask) for ask in asks]

    def _guess(self, ask: Ask) -> tuple[int, ...]:
        made = [ask.tokens[-1]]
        for _ in range(self._chance.randrange(ask.size + 1)):
            made.append(self._next[made[-1]] if self._chance.random() < 0.8 else self._chance.randrange(VOCABULARY))
        return tuple(made[1:])


class Always(Speculation):
    """Guesses whatever it costs and however it did."""

    def guesses(self, decoding: Sequence[TokenSequence]) -> dict[str, tuple[int, ...]]:
        asks = [Ask(each.id, each.tokens, 6) for each in decoding]
        return dict(zip((ask.id for ask in asks), self._drafter.guess(asks), strict=True))


def always(drafter: Drafter) -> Speculation:
    return Always(drafter, most=6, max_sequences=64)


def table(sharpness: float = 3.0) -> Tensor:
    made = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(2)) * sharpness
    made[:, END] = -3.0
    return made


async def answered(engine: Engine, jobs: Sequence[Job], together: int) -> list[list[Delta]]:
    """Every job's deltas; so many jobs are open at a time."""
    waiting = iter(enumerate(jobs))
    found: list[list[Delta]] = [[] for _ in jobs]

    async def stream() -> None:
        for place, each in waiting:
            output: Output = engine.add(each)
            found[place] = [delta async for deltas in output for delta in deltas]

    await asyncio.gather(*(stream() for _ in range(together)))
    return found


def run(
    text: Text, jobs: Sequence[Job], speculation: Speculation | None, together: int = 8, **limits: int
) -> tuple[list[list[Delta]], Report]:
    """What the chain answers."""
    sizes = {"num_blocks": 64, "window": 128} | limits
    logits = table()

    async def asked() -> tuple[list[list[Delta]], Report]:
        loaded = asyncio.Event()
        model = Model("chain", Chain(logits), text, Limits(**sizes), frozenset({END}), "", speculation=speculation)
        engine = Engine(lambda: model, on_change=loaded.set)
        engine.start()
        try:
            await loaded.wait()
            found = await answered(engine, jobs, together)
            engine.scheduler.check()
            assert engine.scheduler.load().free_blocks == sizes["num_blocks"]
            return found, engine.report()
        finally:
            assert await asyncio.to_thread(engine.stop)

    return asyncio.run(asked())


def said(deltas: Sequence[Delta]) -> tuple[str, FinishReason | None, int, list[int]]:
    """An answer as a client sees it: text, why it ended, how many tokens it counts, and which are told."""
    tokens = [likelihood.token for likelihood in told(deltas)]
    return "".join(d.text for d in deltas), deltas[-1].finish, deltas[-1].completion_tokens, tokens


def told(deltas: Sequence[Delta]) -> list[Likelihood]:
    return [likelihood for delta in deltas for likelihood in delta.likelihoods]


def jobs(count: int, **changes: Any) -> list[Job]:
    params = replace(SamplingParams(max_tokens=20, logprobs=0), **changes)
    return [Job(str(n), tuple(range(4 + n % 40, 8 + n % 40 + n % 7)), replace(params, seed=n)) for n in range(count)]


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 20, "min_p": 0.01},
        {"temperature": 1.0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "min_tokens": 12},
        {"temperature": 1.0, "ignore_eos": True},
        {"temperature": 1.0, "max_tokens": 3},
        {"temperature": 1.0, "logit_bias": ((9, 4.0), (11, -100.0)), "logprobs": 3},
        {"temperature": 0.0, "stop": ("e", "th", "x")},
    ],
    ids=lambda changes: ",".join(changes),
)
@pytest.mark.parametrize("limits", [{}, {"num_blocks": 9, "max_running": 5}], ids=["ample", "preempting"])
def test_every_answer_is_what_it_is_without_guesses(
    text: Text, changes: dict[str, Any], limits: dict[str, int]
) -> None:
    """The same tokens for the same seed, with their likelihoods, the same text and end, whoever runs beside it."""
    asked = jobs(24, **changes)
    plain, _ = run(text, asked, None)
    alone, _ = run(text, asked, None, together=1)
    guessed, report = run(text, asked, always(Guessing(table())), **limits)
    assert [said(deltas) for deltas in guessed] == [said(deltas) for deltas in plain] == list(map(said, alone))
    assert report.accepted > 0
    assert report.guessed > report.accepted
    for one, other in zip(plain, guessed, strict=True):
        for a, b in zip(told(one), told(other), strict=True):
            assert (a.token, [token for token, _ in a.top]) == (b.token, [token for token, _ in b.top])
            assert a.logprob == pytest.approx(b.logprob, abs=1e-5)


def test_a_structure_is_followed_as_without_guesses(text: Text) -> None:
    grammars = Grammars(text.tokenizer_json(), VOCABULARY, frozenset({END}))
    wanted = grammars.compiled(Wanted("regex", "(the|fox|dog|quick)( (the|fox|dog|jumps|over)){2,5}", "guided_regex"))
    asked = [replace(each, grammar=wanted) for each in jobs(16, temperature=1.0, max_tokens=60)]
    plain, _ = run(text, asked, None)

    class Words:
        """Guesses what any of the words would need, which is mostly wrong and sometimes not even allowed."""

        def guess(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
            chance = random.Random(len(asks[0].tokens) if asks else 0)
            words = [text.encode(word) for word in ("the", "fox", " the", " fox", " dog", "he", "ox", " over fox")]
            return [tuple(chance.choice(words)[: ask.size]) for ask in asks]

    guessed, report = run(text, asked, always(Words()))
    assert [said(deltas) for deltas in guessed] == [said(deltas) for deltas in plain]
    assert all(deltas[-1].finish is FinishReason.STOP for deltas in plain)
    assert 0 < report.accepted < report.guessed


def test_what_is_sampled_with_guesses_is_distributed_as_the_model_says(text: Text) -> None:
    """Over 6,000 answers: a chi-squared test of each token after the first, given the one before."""
    allowed = [10, 11, 12, 13]
    logits = torch.full((VOCABULARY, VOCABULARY), float("-inf"))
    weights = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], [0.25] * 4, [0.85, 0.05, 0.05, 0.05]])
    for row, token in enumerate(allowed):
        logits[token, allowed] = weights[row].log()
    runner, speculation = Chain(logits), always(Guessing(logits))
    asked = [Job(str(n), (10,), SamplingParams(max_tokens=5, seed=n, logprobs=0)) for n in range(6_000)]

    async def made() -> list[list[Delta]]:
        loaded = asyncio.Event()
        model = Model(
            "chain", runner, text, Limits(num_blocks=64, window=64), frozenset({END}), "", speculation=speculation
        )
        engine = Engine(lambda: model, on_change=loaded.set)
        engine.start()
        try:
            await loaded.wait()
            return await answered(engine, asked, 32)
        finally:
            assert await asyncio.to_thread(engine.stop)

    pairs: Counter[tuple[int, int]] = Counter()
    for deltas in asyncio.run(made()):
        tokens = [10, *said(deltas)[3]]
        pairs.update(pairwise(tokens))
    assert runner.widest > 3
    for row, before in enumerate(allowed):
        total = sum(pairs[before, after] for after in allowed)
        expected = [total * float(weights[row, column]) for column in range(4)]
        squares = [(pairs[before, after] - e) ** 2 / e for after, e in zip(allowed, expected, strict=True)]
        assert total > 1_000
        assert sum(squares) < 16.27  # the 0.999 quantile with three degrees of freedom


def test_a_drafter_that_fails_is_not_asked_again_and_ends_nobody(text: Text) -> None:
    class Failing:
        asked = 0

        def guess(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
            self.asked += 1
            raise RuntimeError("no")

    drafter, asked = Failing(), jobs(4, temperature=0.0)
    plain, _ = run(text, asked, None)
    guessed, report = run(text, asked, Speculation(drafter, most=4, max_sequences=16))
    assert list(map(said, guessed)) == list(map(said, plain))
    assert (drafter.asked, report.guessed, report.acceptance) == (1, 0, None)


def test_a_guess_that_the_model_has_no_number_for_costs_a_recomputation_and_no_answer(text: Text) -> None:
    """The guess itself breaks the forward's numbers, not the answer: without guesses it would never have been seen."""

    class Broken(Chain):
        def forward(self, batch: Batch) -> Tensor:
            logits = super().forward(batch)
            row = 0
            for chunk in batch:
                if VOCABULARY - 1 in chunk.guesses:
                    logits[row : row + chunk.rows] = float("nan")
                row += chunk.rows
            return logits

    class Poisoned:
        def guess(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
            return [(VOCABULARY - 1,)] * len(asks)

    logits = table()
    logits[:, VOCABULARY - 1] = -100.0
    asked = jobs(3, temperature=0.0)

    async def made(speculation: Speculation | None) -> tuple[list[list[Delta]], Report]:
        loaded = asyncio.Event()
        limits = Limits(num_blocks=64, window=64)
        model = Model("chain", Broken(logits), text, limits, frozenset({END}), "", speculation=speculation)
        engine = Engine(lambda: model, on_change=loaded.set)
        engine.start()
        try:
            await loaded.wait()
            found = await answered(engine, asked, 3)
            engine.scheduler.check()
            return found, engine.report()
        finally:
            assert await asyncio.to_thread(engine.stop)

    plain, _ = asyncio.run(made(None))
    guessed, report = asyncio.run(made(always(Poisoned())))
    assert list(map(said, guessed)) == list(map(said, plain))
    assert report.preempted == 3
