"""`python -m tests.bench.soak`: an engine under clients that behave and misbehave, for as long as asked.

Starts `hybridgate-engine serve` with the bundled model and lets clients connect, stream, read slowly, leave, send
garbage and half a request, all drawn from one seed. After each quarter of the time nobody is there, and the same
requests are asked, alone. Judged:

- every answer that was read to its end ends as it must: a whole body, or a stream with `[DONE]`;
- the engine is empty after each quarter: nothing runs or waits, every block is free;
- its memory is flat: the mean of the last eighth of the time is at most 2 % above that of the eighth that follows the
  first two minutes, in which it warms up (or the first quarter, where that is shorter);
- its throughput is flat: after the last quarter the same requests take at most 10 % more of its processor time than
  after the first. Programs beside it slow it down without taking its processor time, by caches, memory and shared
  cores; so that time is told in units of what fixed work takes this program meanwhile.

The exit status is 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import httpx
import numpy as np
import orjson
import psutil

QUESTIONS = ("What is TTFT?", "What does the egress invariant do?", "Hello!", "What is a policy?", "Why is KV paged?")
WARM_SECONDS = 120.0
MOST_GROWTH = 1.02
MOST_TOLL = 1 / 0.9
PATIENCE = 120.0
QUARTERS = 4
ROUNDS = 10
FIXED_REQUESTS = 8
FIXED_TOKENS = 64
QUICK_MINUTES = 3.0


class Defect(Exception):
    """Something that must not happen."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The engine at one moment: seconds since the start, bytes, tokens computed and generated, processor seconds."""

    at: float
    rss: int
    tokens: float
    cpu: float


class Yardstick:
    """Fixed work, some of it the interpreter's, some the memory's, as the engine's is."""

    def __init__(self) -> None:
        self._numbers = np.zeros(2**17)

    def seconds(self, done: threading.Event) -> float:
        """Processor seconds that a hundred pieces of it take: the mean of all that are done until `done`."""
        pieces = [self._piece()]
        while not done.is_set():
            pieces.append(self._piece())
        return fmean(pieces) * 100

    def _piece(self) -> float:
        began = time.thread_time()
        total = 0
        for number in range(20_000):
            total += number & 7
        for _ in range(4):
            np.add(self._numbers, 1.0, out=self._numbers)
        return time.thread_time() - began


@dataclass
class Soak:
    """Where the engine is and what has been seen of it."""

    path: Path
    process: psutil.Process
    draw: random.Random
    ended: Counter[str] = field(default_factory=Counter)
    defects: list[str] = field(default_factory=list)
    quarters: list[list[Sample]] = field(default_factory=list)
    tolls: list[float] = field(default_factory=list)

    def cpu(self) -> float:
        """Processor seconds of the engine so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(str(self.path), limit=2**20)

    def question(self, *, stream: bool) -> bytes:
        """A whole request. One in three has a long prompt, one in five several answers or a structure."""
        draw = self.draw
        words = " ".join(draw.choices(QUESTIONS, k=draw.choice((1, 1, 8))))
        body: dict[str, object] = {
            "messages": [{"role": "user", "content": words}],
            "max_tokens": draw.randint(1, 60),
            "temperature": draw.choice((0, 1)),
            "stream": stream,
        }
        body |= draw.choice(({}, {}, {}, {"n": 3}, {"response_format": {"type": "json_object"}}))
        data = orjson.dumps(body)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: e\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        return head % len(data) + data


async def plain(soak: Soak) -> None:
    """Asks and reads the answer."""
    reader, writer = await soak.connect()
    writer.write(soak.question(stream=False))
    answer = await reader.read(-1)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head[9:12]
    if status not in (b"200", b"503"):
        raise Defect(f"a plain answer with status {status!r}")
    parsed = orjson.loads(body)
    if status == b"200" and not all(choice["finish_reason"] for choice in parsed["choices"]):
        raise Defect("a plain answer without a reason for its end")
    if status == b"503":
        soak.ended["refused"] += 1


async def streamed(soak: Soak, pause: float = 0.0, piece: int = 65_536) -> None:
    """Asks for a stream and reads it all, `piece` bytes after each `pause`."""
    reader, writer = await soak.connect()
    writer.write(soak.question(stream=True))
    answer = b""
    while part := await reader.read(piece):
        answer += part
        if pause:
            await asyncio.sleep(pause)
    writer.close()
    if answer[9:12] == b"503":
        soak.ended["refused"] += 1
    elif b"data: [DONE]\n\n" not in answer or (b"chunked" in answer[:500] and not answer.endswith(b"0\r\n\r\n")):
        raise Defect(f"a stream without its end, status {answer[9:12]!r}: …{answer[-200:]!r}")


async def slow(soak: Soak) -> None:
    """Reads 200 bytes at a time."""
    await streamed(soak, pause=soak.draw.uniform(0.005, 0.05), piece=200)


async def leaves(soak: Soak) -> None:
    """Asks, perhaps reads a little, and goes, politely or with a reset."""
    reader, writer = await soak.connect()
    writer.write(soak.question(stream=soak.draw.random() < 0.7))
    with suppress(TimeoutError):
        async with asyncio.timeout(soak.draw.uniform(0, 0.3)):
            await reader.read(soak.draw.choice((1, 500, 5_000)))
    if soak.draw.random() < 0.5:
        writer.close()
    else:
        writer.transport.abort()


async def half(soak: Soak) -> None:
    """Sends the beginning of a request and goes."""
    _, writer = await soak.connect()
    whole = soak.question(stream=True)
    writer.write(whole[: soak.draw.randrange(1, len(whole))])
    await asyncio.sleep(soak.draw.uniform(0, 0.2))
    writer.transport.abort()


async def garbage(soak: Soak) -> None:
    """Sends bytes that are no request, or a body that is none, and wants a refusal or the end."""
    reader, writer = await soak.connect()
    junk = soak.draw.randbytes(soak.draw.randint(1, 3_000))
    form = soak.draw.choice(("bytes", "body", "json"))
    if form == "json":
        junk = b'{"messages": [{"role": "user", "content": 7}], "temperature": "hot"}'
    if form != "bytes":
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: e\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        junk = head % len(junk) + junk
    writer.write(junk)
    writer.write_eof()
    answer = await reader.read(-1)
    writer.close()
    if answer and answer[9:12] != b"400":
        raise Defect(f"garbage ({form}) was answered {answer[:40]!r}")


async def idle(soak: Soak) -> None:
    """Connects, says nothing, goes."""
    _, writer = await soak.connect()
    await asyncio.sleep(soak.draw.uniform(0, 0.5))
    writer.close()


CLIENTS: tuple[tuple[int, Callable[[Soak], Awaitable[None]]], ...] = (
    (8, plain),
    (8, streamed),
    (4, slow),
    (6, leaves),
    (2, half),
    (2, garbage),
    (1, idle),
)
"""How often each is drawn."""


async def client(soak: Soak, until: float) -> None:
    """One client after the other, until the time is over."""
    weights, kinds = zip(*CLIENTS, strict=True)
    while time.monotonic() < until:
        kind = soak.draw.choices(kinds, weights)[0]
        name = kind.__name__
        try:
            async with asyncio.timeout(PATIENCE):
                await kind(soak)
            soak.ended[name] += 1
        except (ConnectionResetError, BrokenPipeError):
            if kind not in (garbage, half, leaves, idle):
                soak.defects.append(f"{name}: the connection was reset")
        except TimeoutError:
            soak.defects.append(f"{name}: nothing for {PATIENCE:.0f} s")
        except Defect as defect:
            soak.defects.append(f"{name}: {defect}")


async def watch(soak: Soak, http: httpx.AsyncClient, started: float) -> None:
    """A sample a second, until cancelled."""
    while True:
        soak.quarters[-1].append(await sample(soak, http, started))
        await asyncio.sleep(1)


async def sample(soak: Soak, http: httpx.AsyncClient, started: float) -> Sample:
    """The engine now."""
    told = (await http.get("/metrics")).text
    tokens = sum(
        float(line.rpartition(" ")[2])
        for line in told.splitlines()
        if line.startswith(("hybridgate_engine_prefill_tokens_total", "hybridgate_engine_decode_tokens_total"))
    )
    return Sample(time.monotonic() - started, soak.process.memory_info().rss, tokens, soak.cpu())


async def toll(soak: Soak, http: httpx.AsyncClient) -> float:
    """What the fixed requests cost the engine, in units of what fixed work costs here meanwhile: the median of the
    rounds."""
    yardstick, found = Yardstick(), []
    for number in range(ROUNDS):
        done, cpu = threading.Event(), soak.cpu()
        unit = asyncio.create_task(asyncio.to_thread(yardstick.seconds, done))
        try:
            await asyncio.gather(*(fixed(http, f"{len(soak.tolls)}.{number}.{one}") for one in range(FIXED_REQUESTS)))
            used = soak.cpu() - cpu
        finally:
            done.set()
        found.append(used / await unit)
    return median(found)


async def fixed(http: httpx.AsyncClient, salt: str) -> None:
    """One request that is always the same, but for the salt, which keeps it from finding its prompt computed."""
    body = {
        "messages": [{"role": "user", "content": " ".join(QUESTIONS)}],
        "max_tokens": FIXED_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "cache_salt": salt,
    }
    answer = await http.post("/v1/chat/completions", json=body)
    if answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] != FIXED_TOKENS:
        raise Defect(f"a fixed request was answered {answer.status_code}")


async def emptied(soak: Soak, http: httpx.AsyncClient) -> None:
    """Wait until nothing is open, and look whether all has come back."""
    load: dict[str, float] = {}
    for _ in range(100):
        load = (await http.get("/load")).json()
        if load["running"] == load["waiting"] == 0:
            break
        await asyncio.sleep(0.1)
    else:
        soak.defects.append(f"{load['running']} sequences still run and {load['waiting']} wait, with no client left")
    if load["free_blocks"] != load["total_blocks"]:
        soak.defects.append(f"{load['total_blocks'] - load['free_blocks']} blocks are held by nobody")


def resident(samples: Sequence[Sample], begin: float, end: float) -> float:
    """Mean resident memory between two moments, MiB."""
    some = [one.rss for one in samples if begin <= one.at <= end]
    return sum(some) / len(some) / 2**20


def pace(samples: Sequence[Sample]) -> float:
    """Tokens per second of processor time."""
    return (samples[-1].tokens - samples[0].tokens) / max(1e-9, samples[-1].cpu - samples[0].cpu)


def verdict(soak: Soak) -> tuple[str, bool]:
    """The table, and whether all holds. Flatness is judged only where a quarter has at least ten samples."""
    samples = [one for some in soak.quarters for one in some]
    length = samples[-1].at
    lines = [
        f"{length / 60:.1f} minutes: {sum(soak.ended.values())} ended ("
        + ", ".join(f"{name} {count}" for name, count in sorted(soak.ended.items()))
        + ")",
        "",
        "| quarter | RSS, MiB | tokens a CPU second | CPU share of a core | fixed requests over fixed work |",
        "|---|---|---|---|---|",
    ]
    for number, (some, cost) in enumerate(zip(soak.quarters, soak.tolls, strict=True)):
        share = (some[-1].cpu - some[0].cpu) / max(1e-9, some[-1].at - some[0].at)
        rss = resident(some, some[0].at, some[-1].at)
        lines.append(f"| {number + 1} | {rss:.1f} | {pace(some):.0f} | {share:.0%} | {cost:.3f} |")
    if min(map(len, soak.quarters)) >= 10:
        warm = min(WARM_SECONDS, length / QUARTERS)
        first, last = resident(samples, warm, warm + length / 8), resident(samples, length * 7 / 8, length)
        lines += ["", f"memory: {first:.1f} MiB from {warm:.0f} s on, {last:.1f} at the end ({last / first - 1:+.1%})"]
        lines.append(f"throughput of the fixed requests: {soak.tolls[0] / soak.tolls[-1]:.2f} of the first quarter's")
        if last > first * MOST_GROWTH:
            soak.defects.append(f"memory grew from {first:.1f} to {last:.1f} MiB")
        if soak.tolls[-1] > soak.tolls[0] * MOST_TOLL:
            soak.defects.append(f"the fixed requests cost {soak.tolls[-1] / soak.tolls[0]:.2f} of what they did")
    lines += ["", *(f"DEFECT: {defect}" for defect in soak.defects[:20])]
    lines.append("all holds" if not soak.defects else f"{len(soak.defects)} defects")
    return "\n".join(lines), not soak.defects


async def stretch(soak: Soak, http: httpx.AsyncClient, started: float, seconds: float, clients: int) -> None:
    """One quarter of the time, and what is judged after it."""
    soak.quarters.append([])
    watching = asyncio.create_task(watch(soak, http, started))
    until = time.monotonic() + seconds
    await asyncio.gather(*(client(soak, until) for _ in range(clients)))
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    await emptied(soak, http)
    soak.quarters[-1].append(await sample(soak, http, started))
    soak.tolls.append(await toll(soak, http))


async def run(minutes: float, clients: int, seed: int) -> int:
    """The exit status."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine"
        flags = ("--uds", str(path), "--max-running", "16", "--max-waiting", "64", "--kv-cache-tokens", "4096")
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "local_engine", "serve", *flags)
        try:
            transport = httpx.AsyncHTTPTransport(uds=str(path))
            async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as http:
                await _ready(http)
                soak = Soak(path, psutil.Process(process.pid), random.Random(seed))
                started = time.monotonic()
                for _ in range(QUARTERS):
                    await stretch(soak, http, started, minutes * 60 / QUARTERS, clients)
            process.terminate()
            if (status := await process.wait()) != 0:
                soak.defects.append(f"the engine ended with status {status}")
        finally:
            if process.returncode is None:
                process.kill()
    table, holds = verdict(soak)
    print(table)
    return 0 if holds else 1


async def _ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(120):
        while True:
            with suppress(httpx.TransportError):
                if (await http.get("/health")).status_code == 200:
                    return
            await asyncio.sleep(0.1)


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak", description="An engine under all sorts.")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--quick", action="store_true", help=f"a look: {QUICK_MINUTES:.0f} minutes")
    parser.add_argument("--clients", type=int, default=24, help="at the same time (default: 24)")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    return asyncio.run(run(QUICK_MINUTES if asked.quick else asked.minutes, asked.clients, asked.seed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
