"""Owns the thread that owns the model: add, abort, step; refuses HTTP and tensors.

Requests come from the event loop and their text goes back to it. One lock guards the scheduler; it is held while steps
are planned and booked, never during a forward. A step's text crosses to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any, Protocol

from local_engine.config import Limits
from local_engine.errors import AccountingError, DeviceLost, LoadError, NotReady, OutOfMemory, RequestError
from local_engine.generation import Choice, Generation, advance, failed, log_error
from local_engine.grammar import Grammar, Grammars
from local_engine.output import Delta, Output
from local_engine.pace import StepTimes
from local_engine.scheduler import Batch, Load, Scheduler
from local_engine.sequence import FinishReason, Likelihood, Pick, SamplingParams
from local_engine.sequence import Sequence as TokenSequence
from local_engine.text import Text
from local_engine.vectors import Embedder

log = logging.getLogger(__name__)


class Runner(Protocol):
    """What the engine needs of a model; `forward` gives logits that only `sample` looks into."""

    def forward(self, batch: Batch) -> Any:
        """Compute the batch's tokens; a row of logits for each chunk that samples, in order."""

    def sample(self, logits: Any, rows: Sequence[int], picks: Sequence[Pick]) -> list[int | None]:
        """Tokens for the given rows; None where the logits are not finite."""

    def likelihoods(
        self, logits: Any, rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
    ) -> list[Likelihood]:
        """How likely the chosen tokens of these rows were, and the so many likeliest ones of each."""


@dataclass(frozen=True, slots=True)
class Model:
    """All that loading gives."""

    name: str
    runner: Runner
    text: Text
    limits: Limits
    end_tokens: frozenset[int]
    description: str
    grammars: Grammars | None = None
    embedder: Embedder | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One request: its prompt's tokens and how to continue them; `first_token_by` is in seconds from now.

    `like` is the id of an open request with the same prompt, which is then computed once; `salt` keeps what is computed
    apart from requests with another one. The answer's text has those special tokens that are `shown`.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    first_token_by: float | None = None
    grammar: Grammar | None = None
    like: str | None = None
    salt: bytes = b""
    shown: frozenset[str] = frozenset()


class State(Enum):
    """What the engine can do now."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPING = "stopping"


@dataclass(slots=True)
class Totals:
    """Counts since the start."""

    steps: int = 0
    finished: int = 0
    aborted: int = 0
    batch_sequences: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """One consistent look at the scheduler: counts, tokens a second, seconds (None where nothing was measured)."""

    load: Load
    prefill_rate: float | None
    decode_rate: float | None
    step_seconds: float | None
    preempted: int
    prefix_asked: int
    prefix_found: int
    shrunk: int
    totals: Totals
    step_times: StepTimes


class Engine:
    """One model on one thread.

    Invariants: a request that was added gets exactly one final delta; the model is touched by the engine's thread
    only; an error in one request's sampling or text ends that request, an error in a forward ends the requests of that
    batch, and the loop goes on; a lack of memory makes batches smaller and ends nobody, as long as that helps; a device
    that is lost ends all.
    """

    def __init__(self, load: Callable[[], Model], *, on_change: Callable[[], None] = lambda: None) -> None:
        """`load` runs on the engine's thread; `on_change` on the event loop, after it and if the engine fails."""
        self._load = load
        self._on_change = on_change
        self._state = State.LOADING
        self._failure: LoadError | None = None
        self._model: Model | None = None
        self._scheduler: Scheduler | None = None
        self._generations: dict[str, Generation] = {}
        self._work = threading.Condition()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.totals = Totals()
        self._step_times = StepTimes()

    @property
    def state(self) -> State:
        """What the engine can do now."""
        return self._state

    @property
    def failure(self) -> LoadError | None:
        """Why the model could not be loaded, or the engine stopped."""
        return self._failure

    @property
    def model(self) -> Model:
        """The loaded model. Raises NotReady."""
        if self._model is None:
            self._require_ready()
        assert self._model is not None
        return self._model

    @property
    def loaded(self) -> bool:
        """Whether there is a model."""
        return self._model is not None and self._scheduler is not None

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler, which the engine's thread changes: look from elsewhere through `report`. Raises NotReady."""
        if self._scheduler is None:
            self._require_ready()
        assert self._scheduler is not None
        return self._scheduler

    def start(self) -> None:
        """Load the model and begin to step, on a new thread; call on the event loop that will add requests."""
        self._loop = asyncio.get_running_loop()
        # A daemon, so that a load that takes minutes cannot keep a stopping process alive.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> Output:
        """Queue a request. Raises NotReady, ContextLengthExceeded, Overloaded or FirstTokenTooLate."""
        self._require_ready()
        end_tokens = self.model.end_tokens
        sequence = TokenSequence(
            id=job.id,
            prompt_length=len(job.prompt),
            tokens=list(job.prompt),
            max_tokens=job.params.max_tokens,
            end_tokens=frozenset() if job.params.ignore_eos else end_tokens,
            priority=job.priority,
            salt=job.salt,
        )
        generation = Generation(
            sequence=sequence,
            params=job.params,
            text=self.model.text.decoder(job.prompt, job.params.stop, job.shown),
            # Chance per request, so that its answer does not depend on its neighbours; not for secrets.
            chance=random.Random(secrets.randbits(64) if job.params.seed is None else job.params.seed),  # noqa: S311
            output=Output(close=lambda: self.abort(job.id)),
            end_tokens=end_tokens,
            matcher=None if job.grammar is None else job.grammar.matcher(),
        )
        with self._work:
            if job.id in self._generations:
                raise ValueError("a request of this id is open")
            if job.like is not None and (twin := self._generations.get(job.like)):
                sequence.parent = twin.sequence
            self.scheduler.add(sequence, first_token_by=job.first_token_by)
            self._generations[job.id] = generation
            self._work.notify()
        return generation.output

    def abort(self, job_id: str, error: RequestError | None = None) -> None:
        """End a request; its blocks are free at once, and the next step is planned without it."""
        with self._work:
            generation = self._generations.pop(job_id, None)
            if generation is None:
                return
            if self._state is not State.FAILED:  # else the scheduler is what has failed, and has nothing to plan
                self.scheduler.finish(generation.sequence, FinishReason.ABORT)
            self.totals.aborted += 1
        reason = FinishReason.ABORT if error is None else FinishReason.ERROR
        generation.output.push(Delta("", generation.sequence.generated, reason, error))

    def report(self) -> Report:
        """How busy and how fast the engine is. Raises NotReady."""
        scheduler = self.scheduler
        with self._work:
            return Report(
                load=scheduler.load(),
                prefill_rate=scheduler.pace.prefill_rate,
                decode_rate=scheduler.pace.decode_rate,
                step_seconds=scheduler.pace.step_seconds,
                preempted=scheduler.preempted_total,
                prefix_asked=scheduler.prefix_asked_total,
                prefix_found=scheduler.prefix_found_total,
                shrunk=scheduler.shrunk_total,
                totals=replace(self.totals),
                step_times=self._step_times.copy(),
            )

    def drain(self) -> None:
        """Refuse new requests; those that are open go on."""
        self._state = State.STOPPING

    @property
    def idle(self) -> bool:
        """Whether no request is open."""
        return not self._generations

    def abort_all(self) -> None:
        """End every open request with an error that says why."""
        why = "the engine has failed" if self._state is State.FAILED else "the engine is shutting down"
        for job_id in list(self._generations):
            self.abort(job_id, NotReady(why))

    def stop(self, timeout: float = 5.0) -> bool:
        """End everything and the thread; False if the thread is still busy after `timeout` seconds."""
        self.drain()
        self.abort_all()
        with self._work:
            self._work.notify()
        if self._thread is not None:
            # A load cannot be told to stop, so waiting for it would only delay the end.
            self._thread.join(0 if self._model is None and self._failure is None else timeout)
        return self._thread is None or not self._thread.is_alive()

    def _require_ready(self) -> None:
        match self._state:
            case State.LOADING:
                raise NotReady("the model is loading", retry_after=2.0)
            case State.FAILED:
                raise NotReady("the engine has failed; /health and its terminal say why", retry_after=30.0)
            case State.STOPPING:
                raise NotReady("the engine is shutting down", retry_after=5.0)
            case State.READY:
                return

    def _run(self) -> None:
        try:
            self._model = self._load()
        except LoadError as error:
            self._failure = error
        except Exception as error:  # noqa: BLE001 - a defect in loading must show on /health too
            log_error("load", error)
            self._failure = LoadError(f"loading the model failed with {type(error).__name__}; see the log")
        if self._model is not None:
            self._scheduler = Scheduler(self._model.limits)
        if self._state is State.LOADING:
            self._state = State.FAILED if self._model is None else State.READY
        self._on_loop(self._on_change)
        if self._model is None or self._scheduler is None:
            return
        try:
            self._step_until_stopped(self._model, self._scheduler)
        except Exception as error:  # noqa: BLE001 - a defect outside any batch: say so instead of hanging everyone
            log_error("the engine's loop", error)
            self._failure = LoadError(f"the engine stopped on {type(error).__name__}; restart it and see the log")
            self._state = State.FAILED
            self._on_loop(self.abort_all)
            self._on_loop(self._on_change)

    def _step_until_stopped(self, model: Model, scheduler: Scheduler) -> None:
        while batch := self._next_batch(scheduler):
            started = time.perf_counter()
            deltas: list[tuple[Output, Delta]] = []
            try:
                logits = model.runner.forward(batch)
                # Sampling waits for the device, so the time of a step ends behind it.
                tokens = self._sample(model.runner, logits, batch)
                seconds = time.perf_counter() - started
            except DeviceLost:
                raise  # ends the engine: nobody's next step would succeed either
            except OutOfMemory as error:
                if not self._shrunk(scheduler, batch):
                    log_error("step", error)
                    deltas += self._fail(scheduler, batch)
            except Exception as error:  # noqa: BLE001 - the loop goes on, for everyone not in this batch
                log_error("step", error)
                deltas += self._fail(scheduler, batch)
            else:
                self._book(scheduler, batch, tokens, seconds, deltas)
            finally:
                # Also where booking breaks: who has ended by then must hear of it.
                if deltas:
                    self._on_loop(partial(_push_all, deltas))

    def _next_batch(self, scheduler: Scheduler) -> Batch:
        """The next step's work, as soon as there is any; an empty batch when stopping."""
        with self._work:
            while not scheduler.has_work:
                try:
                    scheduler.check()
                except AccountingError as error:
                    # Nothing runs, so nothing is lost by counting afresh; but it is a defect, and must be seen.
                    log.critical("block accounting reset: %s", error)
                    scheduler.reset()
                if self._state is State.STOPPING:
                    return Batch()
                self._work.wait()
            return scheduler.schedule()

    def _sample(self, runner: Runner, logits: Any, batch: Batch) -> dict[str, Choice]:
        """The next token of every sequence of the batch that is still open."""
        sampling = [chunk for chunk in batch if chunk.samples]
        rows: list[int] = []
        picks: list[Pick] = []
        ids: list[str] = []
        choices: dict[str, Choice] = {}
        for row, chunk in enumerate(sampling):
            # An abort may take it out at any moment, from the event loop's thread.
            if generation := self._generations.get(chunk.sequence.id):
                try:
                    picks.append(generation.pick())
                except ValueError:
                    choices[chunk.sequence.id] = Choice(None, problem="the grammar of this answer failed")
                    continue
                ids.append(chunk.sequence.id)
                rows.append(row)
        if not rows:
            return choices
        try:
            tokens = runner.sample(logits, rows, picks)
        except Exception as error:  # noqa: BLE001 - one row's fault must not end the others
            log_error("sampling, repeated one by one", error)
            tokens = [_sample_one(runner, logits, row, pick) for row, pick in zip(rows, picks, strict=True)]
        told = _likelihoods(runner, logits, rows, tokens, picks)
        return choices | {
            job_id: Choice(token, told.get(row)) for job_id, row, token in zip(ids, rows, tokens, strict=True)
        }

    def _book(
        self,
        scheduler: Scheduler,
        batch: Batch,
        choices: dict[str, Choice],
        seconds: float,
        deltas: list[tuple[Output, Delta]],
    ) -> None:
        """Take in a step's tokens; what there is to show, and to whom, is added to `deltas`."""
        with self._work:
            scheduler.pace.record(seconds=seconds, prefill_tokens=batch.prefill_tokens, decode_tokens=len(batch.decode))
            scheduler.stepped()
            self._count(batch, seconds)
            for chunk in batch:
                generation = self._generations.get(chunk.sequence.id)
                if generation is None or not scheduler.complete(chunk) or not chunk.samples:
                    continue
                delta = advance(generation, choices.get(chunk.sequence.id) or Choice(None))
                if delta.finish is not None:
                    self._close(scheduler, generation, delta.finish)
                if delta.text or delta.finish is not None:
                    deltas.append((generation.output, delta))

    def _count(self, batch: Batch, seconds: float) -> None:
        totals, decoded = self.totals, len(batch.decode)
        totals.steps += 1
        totals.batch_sequences += decoded + len(batch.prefill)
        totals.prefill_tokens += batch.prefill_tokens
        totals.decode_tokens += decoded
        self._step_times.record(seconds)

    def _shrunk(self, scheduler: Scheduler, batch: Batch) -> bool:
        """Whether the sequences of this batch can be tried again, in smaller ones."""
        with self._work:
            smaller = scheduler.shrink(batch)
        if smaller:
            log.warning("out of memory in a batch of %d sequences: smaller ones from now on", len(list(batch)))
        return smaller

    def _fail(self, scheduler: Scheduler, batch: Batch) -> list[tuple[Output, Delta]]:
        deltas = []
        with self._work:
            for chunk in batch:
                if generation := self._generations.get(chunk.sequence.id):
                    self._close(scheduler, generation, FinishReason.ERROR)
                    deltas.append((generation.output, failed(generation, "the model's forward failed")))
        return deltas

    def _close(self, scheduler: Scheduler, generation: Generation, reason: FinishReason) -> None:
        scheduler.finish(generation.sequence, reason)
        del self._generations[generation.sequence.id]
        self.totals.finished += 1

    def _on_loop(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        # A loop that has closed meanwhile has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)


def _likelihoods(
    runner: Runner, logits: Any, rows: Sequence[int], tokens: Sequence[int | None], picks: Sequence[Pick]
) -> dict[int, Likelihood]:
    """By row, for those that ask."""
    asked = [
        (row, token, pick.params.logprobs)
        for row, token, pick in zip(rows, tokens, picks, strict=True)
        if token is not None and pick.params.logprobs is not None
    ]
    if not asked:
        return {}
    return {
        row: found
        for (row, _, _), found in zip(asked, runner.likelihoods(logits, *zip(*asked, strict=True)), strict=True)
    }


def _sample_one(runner: Runner, logits: Any, row: int, pick: Pick) -> int | None:
    try:
        return runner.sample(logits, [row], [pick])[0]
    except Exception as error:  # noqa: BLE001 - ends this request only
        log_error("sampling", error)
        return None


def _push_all(deltas: Sequence[tuple[Output, Delta]]) -> None:
    for output, delta in deltas:
        output.push(delta)
