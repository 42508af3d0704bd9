"""A conversation on a terminal, over a model of a few lines: each token is the last one's successor in the alphabet."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from local_engine.chat import Terminal, Wish, converse
from local_engine.config import Settings
from local_engine.engine import Model
from local_engine.errors import LoadError
from tests.local_engine.program import model


class Typed:
    """A terminal whose user has typed these lines."""

    def __init__(self, *lines: str, on_write: Callable[[str], None] = lambda text: None) -> None:
        self._lines = list(lines)
        self._on_write = on_write
        self.shown = ""
        self.said: list[str] = []
        self.terminal = Terminal(self._read, self._write, self.said.append)

    def _read(self) -> str | None:
        return self._lines.pop(0) if self._lines else None

    def _write(self, text: str) -> None:
        self.shown += text
        self._on_write(text)

    def talk(
        self, load: Callable[[], Model] = model, *, tokens: int = 3, question: str | None = None, system: str = ""
    ) -> int:
        settings = Settings(model="letters", default_max_tokens=tokens)
        return asyncio.run(converse(settings, load, Wish(system or None), self.terminal, question))


def test_each_answer_knows_the_turns_before_it() -> None:
    typed = Typed("a", "x", "/quit", "never read")
    assert typed.talk(system="s") == 0
    assert typed.shown == "bcd\nyza\n"
    stats = [said for said in typed.said if "tokens/s" in said]
    assert [said.split(" tokens")[0] for said in stats] == ["2 + 3", "6 + 3"]


def test_a_new_conversation_forgets() -> None:
    typed = Typed("a", "/new", "", "a")
    assert typed.talk() == 0
    assert [said.split(" tokens")[0] for said in typed.said if "tokens/s" in said] == ["1 + 3", "1 + 3"]


def test_one_question_is_answered_and_that_is_all() -> None:
    typed = Typed("never read")
    assert typed.talk(question="k") == 0
    assert typed.shown == "lmn\n"


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on() -> None:
    stopped: list[int] = []

    def interrupt(text: str) -> None:
        if text not in ("", "\n") and len(stopped) < 2:
            stopped.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    typed = Typed("a", "b", "/quit", on_write=interrupt)
    assert typed.talk(tokens=50_000) == 0
    assert len([said for said in typed.said if "tokens, first after" in said]) == 2
    assert len(typed.shown) < 10_000


def test_bytes_that_are_no_text_are_asked_as_what_they_are_shown_as() -> None:
    """As Python reads them from a terminal or an argument: halves of characters, which no JSON holds."""
    typed = Typed("a\udcff", "a")
    assert typed.talk(system="\udc80", question=None) == 0
    assert typed.shown.endswith("bcd\n")


def test_a_failed_question_is_left_out_of_the_next_one() -> None:
    typed = Typed("a" * 100_001, "a")
    assert typed.talk() == 0
    assert typed.shown == "bcd\n"
    assert any(said.startswith("error: the prompt has 100001 tokens") for said in typed.said)


def test_a_model_that_does_not_load_is_one_line() -> None:
    def fails() -> Model:
        raise LoadError("no such model: name another")

    typed = Typed("a")
    assert typed.talk(fails) == 1
    assert typed.said[-1] == "error: no such model: name another"
