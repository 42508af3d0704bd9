"""Owns `hybridgate-engine chat`: a conversation with a model on the terminal, without a server; refuses HTTP.

Ctrl-C ends an answer; between answers it ends the conversation, as the end of the input does.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import orjson

from local_engine.config import Settings
from local_engine.engine import Engine, Model
from local_engine.errors import EngineError, RequestError
from local_engine.jobs import encode, job
from local_engine.protocol import parse_chat

HELP = "/new begins afresh, Ctrl-C stops an answer, /quit or Ctrl-D ends"


@dataclass(frozen=True, slots=True)
class Wish:
    """How answers are drawn."""

    system: str | None = None
    temperature: float = 0.7
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Terminal:
    """Where a conversation happens: `read` gives a line, or None at the end; `write` shows text as it comes; `say`
    is beside the conversation."""

    read: Callable[[], str | None]
    write: Callable[[str], None]
    say: Callable[[str], None]


async def converse(
    settings: Settings, load: Callable[[], Model], wish: Wish, terminal: Terminal, question: str | None = None
) -> int:
    """Talk until the input ends, or answer one `question`; the exit status."""
    # asyncio's own handler would cancel this task where Ctrl-C is meant for one answer, or for the prompt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    loaded = asyncio.Event()
    engine = Engine(load, on_change=loaded.set)
    engine.start()
    try:
        if question is None:
            terminal.say(f"loading {settings.model} …")
        await loaded.wait()
        if engine.failure is not None:
            terminal.say(f"error: {engine.failure}")
            return 1
        return await _Conversation(engine, settings, wish, terminal).run(question)
    finally:
        engine.stop()


class _Conversation:
    """Turns so far. Invariant: they alternate; a question whose answer failed is not among them."""

    def __init__(self, engine: Engine, settings: Settings, wish: Wish, terminal: Terminal) -> None:
        self._engine = engine
        self._settings = settings
        self._wish = wish
        self._terminal = terminal
        self._answers = 0
        self._turns: list[dict[str, str]] = []
        self._begin()

    def _begin(self) -> None:
        self._turns = [{"role": "system", "content": self._wish.system}] if self._wish.system else []

    async def run(self, question: str | None) -> int:
        if question is not None:
            return 0 if await self._ask(question) else 1
        self._terminal.say(f"{self._engine.model.description}; {HELP}")
        while (line := self._terminal.read()) is not None:  # blocks the loop, on which nothing else happens now
            match line.strip():
                case "":
                    continue
                case "/quit" | "/exit":
                    break
                case "/new":
                    self._begin()
                    self._terminal.say("a new conversation")
                case asked:
                    await self._ask(asked)
        return 0

    async def _ask(self, question: str) -> bool:
        """Whether it was answered."""
        turn = {"role": "user", "content": question}
        try:
            answer = await self._answer([*self._turns, turn])
        except EngineError as error:
            self._terminal.say(f"error: {error}")
            return False
        self._turns += [turn, {"role": "assistant", "content": answer}]
        return True

    async def _answer(self, turns: list[dict[str, str]]) -> str:
        model, wish = self._engine.model, self._wish
        # Bytes that are no text come as halves of characters, which no JSON holds.
        said = [{name: text.encode(errors="replace").decode() for name, text in turn.items()} for turn in turns]
        wanted = parse_chat(orjson.dumps({"messages": said, "temperature": wish.temperature, "seed": wish.seed}))
        prompt = encode(model.text, wanted)
        self._answers += 1
        started, first = time.perf_counter(), None
        output = self._engine.add(
            job(f"chat-{self._answers}", model, wanted, prompt, self._settings.default_max_tokens)
        )
        text, tokens = "", 0
        error: RequestError | None = None
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, output.close)
        try:
            async for deltas in output:
                for delta in deltas:
                    first = first or time.perf_counter()
                    text, tokens = text + delta.text, delta.completion_tokens
                    self._terminal.write(delta.text)
                    error = delta.error
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        self._terminal.write("\n")
        if error is not None:
            raise error
        now = time.perf_counter()
        wait_ms, seconds = ((first or now) - started) * 1000, now - (first or now)
        pace = f", {(tokens - 1) / seconds:.0f} tokens/s" if tokens > 1 and seconds > 0 else ""
        self._terminal.say(f"{len(prompt)} + {tokens} tokens, first after {wait_ms:.0f} ms{pace}")
        return text
