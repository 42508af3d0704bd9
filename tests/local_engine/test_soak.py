"""The soak in small: some seconds of it hold, and it says so where something does not."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import psutil
import pytest

from tests.bench.soak import MOST_GROWTH, MOST_TOLL, Defect, Sample, Soak, plain, run, streamed, verdict

MIB = 2**20


def soaked(*, growth: float = 1.0, toll: float = 1.0) -> Soak:
    """Four times twenty seconds, of which the last quarter has so many times the memory, and costs as much more."""
    soak = Soak(Path("none"), psutil.Process(os.getpid()), random.Random(0))
    for quarter in range(4):
        times = growth if quarter == 3 else 1
        seconds = range(quarter * 20, quarter * 20 + 20)
        soak.quarters.append([Sample(at, int(100 * MIB * times), at * 100.0, at * 0.5) for at in seconds])
        soak.tolls.append(4.0 * (toll if quarter == 3 else 1))
    return soak


@pytest.mark.parametrize(
    ("changes", "holds", "says"),
    [
        ({}, True, "all holds"),
        ({"growth": MOST_GROWTH + 0.01}, False, "memory grew from 100.0"),
        ({"growth": MOST_GROWTH - 0.01}, True, "all holds"),
        ({"toll": MOST_TOLL + 0.02}, False, "the fixed requests cost 1.13"),
        ({"toll": MOST_TOLL - 0.02}, True, "all holds"),
        ({"toll": 0.5}, True, "throughput of the fixed requests: 2.00 of the first quarter's"),
    ],
)
def test_what_grows_or_costs_more_is_a_defect(changes: dict[str, float], holds: bool, says: str) -> None:
    table, held = verdict(soaked(**changes))
    assert held is holds
    assert says in table


@pytest.mark.parametrize(
    ("client", "answer"),
    [
        (streamed, b"HTTP/1.1 200 OK\r\n\r\ndata: {}\n\n"),
        (streamed, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\ne\r\ndata: [DONE]\n\n\r\n"),
        (streamed, b""),
        (plain, b"HTTP/1.1 500 No\r\n\r\n{}"),
        (plain, b'HTTP/1.1 200 OK\r\n\r\n{"choices": [{"finish_reason": null}]}'),
    ],
)
def test_an_answer_without_its_end_is_a_defect(tmp_path: Path, client: object, answer: bytes) -> None:
    async def conversation() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        async with await asyncio.start_unix_server(serve, str(tmp_path / "s")):
            soak = Soak(tmp_path / "s", psutil.Process(os.getpid()), random.Random(0))
            with pytest.raises(Defect, match=r"without|status"):
                await client(soak)  # type: ignore[operator]

    asyncio.run(conversation())


@pytest.mark.slow
def test_some_seconds_of_it_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert asyncio.run(run(0.15, 12, 1)) == 0
    assert "all holds" in capsys.readouterr().out
