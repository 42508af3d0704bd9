"""Owns the thread that owns the model: add, abort, step; refuses HTTP and tensors.

Requests come from the event loop and their text goes back to it. One lock guards the scheduler; it is held while steps
are planned and booked, never during a forward. A step's text crosses to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from local_engine.batch import Batch
from local_engine.choosing import Chosen, Runner, choose
from local_engine.config import Limits
from local_engine.errors import AccountingError, DeviceLost, LoadError, NotReady, OutOfMemory, RequestError
from local_engine.generation import Chance, Choice, Generation, advance, failed, log_error
from local_engine.grammar import Grammar, Grammars
from local_engine.output import Delta, Output
from local_engine.pace import StepTimes
from local_engine.report import Report, State, Totals
from local_engine.scheduler import NO_GUESSES, Scheduler
from local_engine.sequence import FinishReason, SamplingParams
from local_engine.sequence import Sequence as TokenSequence
from local_engine.speculation import Speculation
from local_engine.text import Text
from local_engine.vectors import Embedder

log = logging.getLogger(__name__)


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
    speculation: Speculation | None = None


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
        self._speculation: Speculation | None = None
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
            chance=Chance(secrets.randbits(64) if job.params.seed is None else job.params.seed),
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
                guessed=scheduler.guessed_total,
                accepted=scheduler.accepted_total,
                acceptance=None if self._speculation is None else self._speculation.acceptance,
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
            self._speculation = self._model.speculation
            self._scheduler = Scheduler(self._model.limits)
        if self._state is State.LOADING:
            self._state = State.FAILED if self._model is None else State.READY
        self._on_loop(self._on_change)
        if self._model is None or self._scheduler is None:
            return
        try:
            self._step_until_stopped(self._model, self._scheduler)
        except BaseException as error:  # noqa: BLE001 - a defect outside any batch: say so instead of hanging everyone
            log_error("the engine's loop", error)
            self._failure = LoadError(f"the engine stopped on {type(error).__name__}; restart it and see the log")
            self._state = State.FAILED
            self._on_loop(self.abort_all)
            self._on_loop(self._on_change)

    def _step_until_stopped(self, model: Model, scheduler: Scheduler) -> None:
        while self._has_work(scheduler):
            started = time.perf_counter()
            guesses = self._guesses(scheduler)
            with self._work:
                batch = scheduler.schedule(guesses)
            if not batch:  # the last one was aborted a moment ago
                continue
            deltas: list[tuple[Output, Delta]] = []
            try:
                logits = model.runner.forward(batch)
                # Sampling waits for the device, so the time of a step ends behind it.
                chosen = choose(model.runner, logits, batch, self._generations.get)
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
                self._book(scheduler, batch, chosen, seconds, deltas)
            finally:
                # Also where booking breaks: who has ended by then must hear of it.
                if deltas:
                    self._on_loop(partial(_push_all, deltas))

    def _has_work(self, scheduler: Scheduler) -> bool:
        """Wait until there is any; False when stopping."""
        with self._work:
            while not scheduler.has_work:
                try:
                    scheduler.check()
                except AccountingError as error:
                    # Nothing runs, so nothing is lost by counting afresh; but it is a defect, and must be seen.
                    log.critical("block accounting reset: %s", error)
                    scheduler.reset()
                if self._state is State.STOPPING:
                    return False
                self._work.wait()
            return True

    def _guesses(self, scheduler: Scheduler) -> Mapping[str, Sequence[int]]:
        """What may come next in the sequences that decode. Guessing changes no answer, so its failure ends none."""
        if self._speculation is None:
            return NO_GUESSES
        with self._work:
            decoding = scheduler.decoding()
        try:
            return self._speculation.guesses(decoding)
        except Exception as error:  # noqa: BLE001 - without guesses everything goes on
            log_error("guessing, which is switched off", error)
            self._speculation.fail()
            return NO_GUESSES

    def _book(
        self,
        scheduler: Scheduler,
        batch: Batch,
        chosen: Chosen,
        seconds: float,
        deltas: list[tuple[Output, Delta]],
    ) -> None:
        """Take in a step's tokens; what there is to show, and to whom, is added to `deltas`."""
        with self._work:
            decoded = len(batch.decode) + sum(len(chosen.get(chunk.sequence.id, ())) for chunk in batch.verify)
            scheduler.pace.record(seconds=seconds, prefill_tokens=batch.prefill_tokens, decode_tokens=decoded)
            if self._speculation is not None and not batch.prefill:
                self._speculation.record(len(batch.decode) + len(batch.verify), seconds, decoded)
            scheduler.stepped()
            self._count(batch, decoded, seconds)
            for chunk in batch:
                generation = self._generations.get(chunk.sequence.id)
                if generation is None or not scheduler.complete(chunk) or not chunk.samples:
                    continue
                choices = chosen.get(chunk.sequence.id, [Choice(None)])
                if not choices:
                    scheduler.recompute(chunk.sequence)
                    continue
                self._advance(scheduler, generation, choices, deltas)
                if chunk.guessed:
                    scheduler.accept(chunk, len(choices) - 1)
                    if self._speculation is not None:
                        self._speculation.learn(chunk.sequence.id, chunk.guessed, len(choices) - 1)

    def _advance(
        self,
        scheduler: Scheduler,
        generation: Generation,
        choices: list[Choice],
        deltas: list[tuple[Output, Delta]],
    ) -> None:
        for choice in choices:
            delta = advance(generation, choice)
            if delta.finish is not None:
                self._close(scheduler, generation, delta.finish)
            if delta.text or delta.finish is not None:
                deltas.append((generation.output, delta))
            if delta.finish is not None:
                return

    def _count(self, batch: Batch, decoded: int, seconds: float) -> None:
        totals = self.totals
        totals.steps += 1
        totals.batch_sequences += len(list(batch))
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


def _push_all(deltas: Sequence[tuple[Output, Delta]]) -> None:
    for output, delta in deltas:
        output.push(delta)
