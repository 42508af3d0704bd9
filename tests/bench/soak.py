"""`python -m tests.bench.soak`: an engine under clients that behave and misbehave, for as long as asked.

Starts `hybridgate-engine serve` with the bundled model and lets clients connect, stream, read slowly, leave, send
garbage and half a request, all drawn from one seed. Judged at the end:

- every answer that was read to its end ends as it must: a whole body, or a stream with `[DONE]`;
- the engine is empty: nothing runs or waits, every block is free, and as many requests ended as began;
- its memory is flat: the mean of the last quarter is at most 5 % above that of the second quarter (the first one warms
  up: allocator, prefix cache, connections);
- its throughput is flat: tokens per second of its own processor time in the last quarter are at least 0.9 of the second
  quarter's (processor time, because other programs on the machine take wall-clock time).

The exit status is 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import orjson
import psutil

QUESTIONS = ("What is TTFT?", "What does the egress invariant do?", "Hello!", "What is a policy?", "Why is KV paged?")
MOST_GROWTH = 1.05
LEAST_PACE = 0.9
PATIENCE = 120.0


class Defect(Exception):
    """Something that must not happen."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The engine at one moment: seconds since the start, bytes, tokens computed and generated, processor seconds."""

    at: float
    rss: int
    tokens: float
    cpu: float


@dataclass
class Soak:
    """Where the engine is and what has been seen of it."""

    path: Path
    process: psutil.Process
    draw: random.Random
    ended: Counter[str] = field(default_factory=Counter)
    defects: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

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
        soak.samples.append(await sample(soak, http, started))
        await asyncio.sleep(1)


async def sample(soak: Soak, http: httpx.AsyncClient, started: float) -> Sample:
    """The engine now."""
    told = (await http.get("/metrics")).text
    tokens = sum(
        float(line.rpartition(" ")[2])
        for line in told.splitlines()
        if line.startswith(("hybridgate_engine_prefill_tokens_total", "hybridgate_engine_decode_tokens_total"))
    )
    cpu = soak.process.cpu_times()
    return Sample(time.monotonic() - started, soak.process.memory_info().rss, tokens, cpu.user + cpu.system)


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


def quarter(samples: Sequence[Sample], number: int) -> Sequence[Sample]:
    """The samples of one quarter of the time, 0 to 3."""
    length = samples[-1].at / 4
    return [s for s in samples if length * number <= s.at <= length * (number + 1)]


def pace(samples: Sequence[Sample]) -> float:
    """Tokens per second of processor time."""
    return (samples[-1].tokens - samples[0].tokens) / max(1e-9, samples[-1].cpu - samples[0].cpu)


def verdict(soak: Soak) -> tuple[str, bool]:
    """The table, and whether all holds. Flatness is judged only where a quarter has at least ten samples."""
    lines = [
        f"{soak.samples[-1].at / 60:.1f} minutes: {sum(soak.ended.values())} ended ("
        + ", ".join(f"{name} {count}" for name, count in sorted(soak.ended.items()))
        + ")",
        "",
        "| quarter | RSS, MiB | tokens a CPU second | CPU share of a core |",
        "|---|---|---|---|",
    ]
    quarters = [quarter(soak.samples, number) for number in range(4)]
    rss = [sum(s.rss for s in some) / len(some) / 2**20 for some in quarters if some]
    paces = [pace(some) for some in quarters if some]
    for number, some in enumerate(quarters):
        if some:
            share = (some[-1].cpu - some[0].cpu) / max(1e-9, some[-1].at - some[0].at)
            lines.append(f"| {number + 1} | {rss[number]:.1f} | {paces[number]:.0f} | {share:.0%} |")
    if min(map(len, quarters)) >= 10:
        if rss[3] > rss[1] * MOST_GROWTH:
            soak.defects.append(f"memory grew from {rss[1]:.1f} to {rss[3]:.1f} MiB")
        if paces[3] < paces[1] * LEAST_PACE:
            soak.defects.append(f"throughput fell from {paces[1]:.0f} to {paces[3]:.0f} tokens a CPU second")
    lines += ["", *(f"DEFECT: {defect}" for defect in soak.defects[:20])]
    lines.append("all holds" if not soak.defects else f"{len(soak.defects)} defects")
    return "\n".join(lines), not soak.defects


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
                watching = asyncio.create_task(watch(soak, http, started))
                await asyncio.gather(*(client(soak, started + minutes * 60) for _ in range(clients)))
                watching.cancel()
                with suppress(asyncio.CancelledError):
                    await watching
                await emptied(soak, http)
                soak.samples.append(await sample(soak, http, started))
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
    parser.add_argument("--clients", type=int, default=24, help="at the same time (default: 24)")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    return asyncio.run(run(asked.minutes, asked.clients, asked.seed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
