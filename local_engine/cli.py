"""Owns `hybridgate-engine`: flags into Settings, errors into one line with the fix; refuses everything else."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated

import orjson
import typer

from local_engine.chat import Terminal, Wish, converse
from local_engine.config import Settings
from local_engine.engine import Model
from local_engine.errors import ConfigError, LoadError
from local_engine.serve import Address
from local_engine.serve import serve as serve_forever
from local_engine.source import model_source

TOKEN = "HYBRIDGATE_ENGINE_TOKEN"  # noqa: S105 - a variable's name

LOG_LEVELS = ("debug", "info", "warning", "error")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def engine() -> None:
    """Serve one local language model over the OpenAI wire."""


@app.command()
def serve(
    model: Annotated[
        str, typer.Option(help="`demo` (the bundled tiny model), a directory, or a Hugging Face id.", show_default=True)
    ] = "demo",
    served_name: Annotated[
        str | None, typer.Option(help="The model's name in requests and answers. Default: what --model says.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. There are no keys here: keep it private.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port.", min=1, max=65535)] = 8081,
    uds: Annotated[str | None, typer.Option(help="Listen on this Unix socket (mode 600) and on no port.")] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32 or bfloat16. auto: float32 for up to 100 M parameters on a CPU, else bfloat16."
        ),
    ] = "auto",
    quantization: Annotated[
        str, typer.Option(help="none, fp16, bf16, int8, or int4 (NF4, double quantization).")
    ] = "none",
    chat_template: Annotated[
        str | None, typer.Option(help="File with a Jinja chat template, for a model that brings none.")
    ] = None,
    threads: Annotated[
        int, typer.Option(help="CPU threads of a forward. More than there are free cores is slower.")
    ] = 1,
    kv_cache_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens that the KV cache holds. Default: 16 windows, or what a share of memory holds."),
    ] = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens a step. Longer prompts are computed in chunks, between which others decode. Default: 512, "
            "on a GPU 1024."
        ),
    ] = None,
    max_running: Annotated[int, typer.Option(help="Requests that generate at the same time.")] = 64,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more are answered 503.")] = 256,
    max_waiting_tokens: Annotated[
        int | None,
        typer.Option(help="Prompt tokens that may wait; more are answered 503. Default: 65536, or one window."),
    ] = None,
    default_max_tokens: Annotated[int, typer.Option(help="max_tokens of requests that give none.")] = 256,
    drain_seconds: Annotated[
        float, typer.Option(help="After SIGTERM, time for open requests to end by themselves.")
    ] = 10.0,
    embedding_model: Annotated[
        str | None, typer.Option(help="An encoder for /v1/embeddings: a directory, or a Hugging Face id.")
    ] = None,
    embedding_served_name: Annotated[
        str | None, typer.Option(help="Its name in requests and answers. Default: what --embedding-model says.")
    ] = None,
    eager: Annotated[
        bool,
        typer.Option("--eager", help="On a GPU: no kernels of ours and no recorded steps. Slow; for finding faults."),
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error; never holds what callers send.")] = (
        "info"
    ),
    speculation: Annotated[
        str,
        typer.Option(
            help="Guess tokens ahead, which makes few requests faster and changes no answer: off, prompt_lookup (from "
            "what the request has said before), or draft (by a small model)."
        ),
    ] = "off",
    draft_model: Annotated[
        str | None,
        typer.Option(
            help="For --speculation draft: a directory or Hugging Face id with the model's own tokenizer. "
            "Default: the one that comes with `demo`."
        ),
    ] = None,
    speculation_tokens: Annotated[int, typer.Option(help="Guesses for a request in a step, at most.")] = 8,
    speculation_max_running: Annotated[
        int, typer.Option(help="Guess while at most so many requests generate; below, as it is measured to pay.")
    ] = 16,
    exit_with_parent: Annotated[
        bool,
        typer.Option("--exit-with-parent", help="Exit when standard input ends: for a parent that holds the pipe."),
    ] = False,
) -> None:
    """Load a model and serve it until SIGTERM.

    \b
    Try it:
      hybridgate-engine serve
      curl http://127.0.0.1:8081/health
      curl http://127.0.0.1:8081/v1/chat/completions -H 'content-type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is TTFT?"}]}'

    \b
    A real model (a decoder-only language model of transformers, in safetensors):
      hybridgate-engine serve --model Qwen/Qwen3-4B-Instruct-2507 --quantization int4

    \b
    HYBRIDGATE_ENGINE_TOKEN in the environment: only who sends `authorization: Bearer` with it is served (/health and
    /metrics are open). The gateway sends it where the deployment says `api_key: ${HYBRIDGATE_ENGINE_TOKEN}`.
    """
    try:
        _log(log_level)
        settings = Settings(
            model=model,
            served_name=served_name,
            dtype=dtype,
            quantization=quantization,
            chat_template=chat_template,
            threads=threads,
            kv_cache_tokens=kv_cache_tokens,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
            max_waiting_tokens=max_waiting_tokens,
            default_max_tokens=default_max_tokens,
            drain_seconds=drain_seconds,
            embedding_model=embedding_model,
            embedding_served_name=embedding_served_name,
            speculation=speculation,
            draft_model=draft_model,
            speculation_tokens=speculation_tokens,
            speculation_max_running=speculation_max_running,
            eager=eager,
        )
        status = serve_forever(
            settings,
            Address(host, port, uds),
            lambda: _load(settings),
            exit_with_parent=exit_with_parent,
            say=_say,
            token=None if exit_with_parent else _token(),
        )
    except ConfigError as error:
        for problem in error.problems:
            _say(f"error: {problem}")
        raise typer.Exit(2) from None
    raise typer.Exit(status)


@app.command()
def chat(
    question: Annotated[str | None, typer.Argument(help="Answer this and end. Without it, a conversation.")] = None,
    model: Annotated[str, typer.Option(help="`demo`, a directory, or a Hugging Face id.")] = "demo",
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0, max=2)] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 512,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same answers.", min=-(2**63), max=2**64 - 1)
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quantization: Annotated[str, typer.Option(help="none, fp16, bf16, int8, or int4.")] = "none",
    threads: Annotated[int, typer.Option(help="CPU threads of a forward.")] = 1,
) -> None:
    """Talk to a model on the terminal, without a server.

    \b
    Try it:
      hybridgate-engine chat
      hybridgate-engine chat "What is TTFT?" --temperature 0
    """
    try:
        settings = Settings(
            model=model, dtype=dtype, quantization=quantization, threads=threads, default_max_tokens=max_tokens
        )
    except ConfigError as error:
        for problem in error.problems:
            _say(f"error: {problem}")
        raise typer.Exit(2) from None
    wish = Wish(system, temperature, seed)
    terminal = Terminal(_line, lambda text: typer.echo(text, nl=False), _say)
    raise typer.Exit(asyncio.run(converse(settings, lambda: _load(settings), wish, terminal, question)))


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="`demo`, a directory, or a Hugging Face id.")] = "demo",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quantization: Annotated[str, typer.Option(help="none, fp16, bf16, int8, or int4.")] = "none",
    threads: Annotated[int, typer.Option(help="CPU threads of a forward.")] = 1,
    kv_cache_tokens: Annotated[int | None, typer.Option(help="Tokens that the KV cache holds.")] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens a step, as for serve.")] = None,
    max_running: Annotated[int, typer.Option(help="Requests that generate at the same time.")] = 64,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait.")] = 256,
    repeats: Annotated[int, typer.Option(help="Runs of each step, of which the median counts.", min=1)] = 5,
    out: Annotated[str | None, typer.Option(help="File to write; without one, standard output.")] = None,
) -> None:
    """Measure how long the steps of this engine take, as JSON for `hybridgate policy simulate --engine FILE`.

    Give it the flags that the engine is served with, and let nothing else run beside it: it measures what it gets.
    """
    _writable(out)
    try:
        settings = Settings(
            model=model,
            dtype=dtype,
            quantization=quantization,
            threads=threads,
            kv_cache_tokens=kv_cache_tokens,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
        )
        loaded = _load(settings)
    except ConfigError as error:
        for problem in error.problems:
            _say(f"error: {problem}")
        raise typer.Exit(2) from None
    except LoadError as error:
        _say(f"error: {error}")
        raise typer.Exit(1) from None
    from local_engine.calibrate import document, measured  # noqa: PLC0415 - numpy, which serving needs no sooner

    steps = measured(loaded.runner, loaded.limits, loaded.text.vocab_size, perf_counter, repeats, _say)
    text = json.dumps(document(loaded.name, loaded.limits, steps), indent=2) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    Path(out).write_text(text)


@app.command()
def bench(
    shape: Annotated[str, typer.Option(help="51m, tiny, llama-2-7b or mistral-7b; weights are random.")] = "51m",
    device: Annotated[
        str, typer.Option(help="cpu: beside other servers. cuda: also as a share of the memory's bandwidth.")
    ] = "cpu",
    precisions: Annotated[str, typer.Option(help="fp32, bf16, or both with a comma.")] = "fp32,bf16",
    peers: Annotated[str, typer.Option(help="transformers, llama.cpp, both with a comma, or none.")] = (
        "transformers,llama.cpp"
    ),
    streams: Annotated[str, typer.Option(help="Numbers of requests at the same time.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(help="Over all servers.", min=1, max=100)] = 3,
    tokens: Annotated[int, typer.Option(help="New tokens of a request.", min=2, max=512)] = 64,
    work: Annotated[Path, typer.Option(help="Where peers are installed, models and logs lie.")] = Path(".bench"),
    shared: Annotated[
        bool, typer.Option("--shared", help="Take `transformers` from this environment: no package index is needed.")
    ] = False,
    prepare: Annotated[bool, typer.Option("--prepare", help="Only install the peers.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="File for all that was measured.")] = None,
) -> None:
    """Measure this engine beside `transformers serve` and llama.cpp's server, in one run, as tables in Markdown.

    The first run installs the two into environments of their own and builds llama.cpp, which can take an hour.

    \b
      hybridgate-engine bench --prepare
      hybridgate-engine bench
      hybridgate-engine bench --device cuda --shape llama-2-7b --precisions bf16 --peers transformers --shared
    """
    from local_engine.bench import command  # noqa: PLC0415 - torch and transformers take seconds to import
    from local_engine.bench.program import BenchError  # noqa: PLC0415 - as above
    from local_engine.bench.rounds import Plan  # noqa: PLC0415 - as above

    _writable(out)
    try:
        plan = Plan(streams=tuple(map(int, streams.split(","))), rounds=rounds, new_tokens=tokens)
        if min(plan.streams) < 1:
            raise ValueError
        wanted = command.wanted_of(shape, precisions, peers, plan, work.resolve(), device, shared=shared)
        if prepare:
            raise typer.Exit(1 if command.prepared(wanted, _say)[1] else 0)
        if device != "cpu":
            typer.echo(command.rooflines(wanted, _say) + "\n")
        found = command.compared(wanted, _say)
        typer.echo(command.markdown(found))
        if out is not None:
            out.write_bytes(command.document(found))
    except ValueError:
        _say("error: --streams must be whole numbers from 1 on, with commas between them")
        raise typer.Exit(2) from None
    except (BenchError, LoadError, OSError) as error:
        _say(f"error: {error}")
        raise typer.Exit(1) from None


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="`demo`, a directory, or a Hugging Face id.")] = "demo",
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens a step, as for serve.")] = None,
    max_running: Annotated[int, typer.Option(help="Requests that generate at the same time, as for serve.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes as JSON, for programs.")] = False,
) -> None:
    """Say what memory a model takes in every quantization, and what fits here, without loading its weights.

    \b
    Try it:
      hybridgate-engine inspect demo
      hybridgate-engine inspect Qwen/Qwen3-4B-Instruct-2507 --json
    """
    from local_engine import memory  # noqa: PLC0415 - torch and transformers take seconds to import

    try:
        settings = Settings(model=model, max_batch_tokens=max_batch_tokens, max_running=max_running)
        found = memory.inspect(settings)
    except ConfigError as error:
        for problem in error.problems:
            _say(f"error: {problem}")
        raise typer.Exit(2) from None
    except LoadError as error:
        _say(f"error: {error}")
        raise typer.Exit(1) from None
    if not as_json:
        typer.echo(memory.table(found))
        return
    fits = [
        {"place": fit.place.name, "quantization": fit.need.quantization, "fits": fit.fits, "tokens": fit.cache_tokens}
        for fit in found.fits()
    ]
    typer.echo(orjson.dumps({**asdict(found), "fits": fits}, option=orjson.OPT_INDENT_2).decode())


@app.command()
def perplexity(
    cases: Annotated[int | None, typer.Option(help="Held-out questions to measure with. Default: all.", min=1)] = None,
) -> None:
    """Measure what each quantization costs the bundled model, as a table in Markdown."""
    from local_engine import perplexity as measuring  # noqa: PLC0415 - torch and transformers take seconds to import

    found = measuring.measure(cases)
    typer.echo(f"{found[0].tokens} tokens of answers to held-out questions\n\n{measuring.table(found)}")


def _writable(out: str | Path | None) -> None:
    """Exit unless the file can be written: before what takes long, whose result would be lost."""
    try:
        if out is not None:
            Path(out).open("a").close()
    except OSError as error:
        _say(f"error: cannot write {out} ({error.strerror})")
        raise typer.Exit(2) from None


def _token() -> str | None:
    """What callers must send. A parent that holds our standard input also made our socket, so it needs none. Raises
    ConfigError."""
    token = os.environ.get(TOKEN) or None
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError([f"{TOKEN} must be printable ASCII without spaces: `openssl rand -hex 32` makes a good one"])
    return token


def _line() -> str | None:
    """A line of the terminal, or None at its end or on Ctrl-C."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        typer.echo()
        return None


def _load(settings: Settings) -> Model:
    model_source(settings.model)
    if settings.embedding_model is not None:
        model_source(settings.embedding_model)
    # torch and transformers take seconds to import: here, on the engine's thread, with the socket open already.
    from local_engine.loading import load  # noqa: PLC0415

    return load(settings)


def _log(level: str) -> None:
    """This engine's own lines from this level on; of others' only warnings. Raises ConfigError."""
    if level not in LOG_LEVELS:
        raise ConfigError([f"--log-level must be one of {', '.join(LOG_LEVELS)}"])
    logging.basicConfig(format="hybridgate-engine: %(message)s")
    logging.getLogger("local_engine").setLevel(level.upper())


def _say(line: str) -> None:
    typer.echo(f"hybridgate-engine: {line}", err=True)


def main() -> None:
    """The console script."""
    app()
