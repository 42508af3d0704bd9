"""Usage records: what is kept, that nothing kept is lost or doubled, and what it sums to."""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from zoneinfo import ZoneInfo

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from gateway.cli import main
from gateway.store import Store
from gateway.telemetry import Record
from gateway.types import Attempt, Outcome, Usage
from gateway.usage import Entry, Key, Tried, entry_from_json, entry_of, total_by
from gateway.usage.files import UsageFile, files_of, read
from gateway.usage.journal import MOST_WAITING, Journal
from gateway.usage.stream import UsageStream
from tests.redis_server import redis_server

NOON = 1_790_000_000.0  # 2026-09-21 14:13:20 UTC
COUNTS = st.integers(0, 2**53 - 1)
TRIED = st.builds(Tried, st.text(), st.sampled_from(["ok", "cut", "failed"]), COUNTS, COUNTS, st.booleans())
ENTRIES = st.builds(
    Entry,
    id=st.text(),
    at=st.integers(0, 4 * 10**12).map(lambda ms: ms / 1000),
    tenant=st.text(),
    key=st.text(),
    outcome=st.text(),
    status=st.integers(0, 599),
    deployment=st.text(min_size=1),
    model=st.text(),
    zone=st.text(),
    rule=st.text(),
    prompt_tokens=COUNTS,
    completion_tokens=COUNTS,
    cached_tokens=COUNTS,
    cache=st.sampled_from(["off", "hit", "miss"]),
    attempts=st.lists(TRIED, max_size=3).map(tuple),
)


def entry(number: int = 0, tenant: str = "crm", *, at: float = NOON, cost: int = 1_000, **changes: object) -> Entry:
    values: dict[str, object] = {
        "outcome": "ok",
        "status": 200,
        "deployment": "local",
        "model": "demo",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "attempts": (Tried("local", "ok", 15, cost),),
    }
    return Entry(id=f"{number:016x}", at=at, tenant=tenant, key=f"{tenant}-1", **(values | changes))  # type: ignore[arg-type]


@given(ENTRIES)
def test_an_entry_is_read_back_as_it_was_written(written: Entry) -> None:
    line = written.to_json()
    assert b"\n" not in line
    assert entry_from_json(line) == written


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[]", b"null", b"{", b'{"id": "a"}', entry().to_json().replace(b":15,", b":-15,")]
)
def test_what_is_no_entry_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="no usage record"):
        entry_from_json(line)


def test_an_entry_holds_what_the_request_took_and_each_attempt() -> None:
    record = Record("r", "d", status=200, tenant="crm", key="crm-1", deployment="b", zone="eu", usage=Usage(7, 3, 2))
    record.cost_nusd = 99
    record.failed.append(Outcome(Attempt("a", 1), "refused", timed_out=False))
    record.model = "model-b"
    kept = entry_of(record, NOON)
    assert kept is not None
    assert (kept.model, kept.prompt_tokens, kept.completion_tokens, kept.cached_tokens) == ("model-b", 7, 3, 2)
    assert [(t.deployment, t.outcome, t.tokens, t.cost_nusd) for t in kept.attempts] == [
        ("a", "failed", 0, 0),
        ("b", "ok", 10, 99),
    ]
    assert (kept.tokens, kept.cost_nusd) == (10, 99)


def test_a_stored_answer_costs_nothing() -> None:
    record = Record("r", "d", status=200, deployment="b", usage=Usage(7, 3), cache="hit")
    record.cost_nusd = 0
    kept = entry_of(record, NOON)
    assert kept is not None
    assert (kept.cache, kept.tokens, kept.prompt_tokens, kept.attempts) == ("hit", 0, 7, ())


@pytest.mark.parametrize(("status", "kept"), [(401, False), (400, True), (429, True), (499, True), (503, True)])
def test_who_was_not_let_in_leaves_no_entry(status: int, kept: bool) -> None:
    assert (entry_of(Record("r", "d", status=status), NOON) is not None) is kept


BERLIN = ZoneInfo("Europe/Berlin")
LATE = 1_790_028_600.0  # 2026-09-21 22:10 UTC, already the 22nd in Berlin


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (("tenant",), {("crm",): (2, 3_000), ("ops",): (1, 4_000)}),
        (("day",), {("2026-09-21",): (2, 5_000), ("2026-09-22",): (1, 2_000)}),
        (
            ("tenant", "day"),
            {("crm", "2026-09-21"): (1, 1_000), ("crm", "2026-09-22"): (1, 2_000), ("ops", "2026-09-21"): (1, 4_000)},
        ),
        (("month",), {("2026-09",): (3, 7_000)}),
    ],
)
def test_entries_are_summed_by_what_is_asked_for(
    by: tuple[Key, ...], expected: dict[tuple[str, ...], tuple[int, int]]
) -> None:
    entries = [entry(1), entry(2, at=LATE, cost=2_000), entry(3, "ops", cost=4_000)]
    totals = total_by(entries, by, BERLIN)
    assert {group: (total.requests, total.cost_nusd) for group, total in totals.items()} == expected


@given(st.lists(ENTRIES, max_size=20), st.randoms(use_true_random=False))
def test_an_entry_that_was_written_again_counts_once(entries: list[Entry], draw: object) -> None:
    once = {e.id: e for e in reversed(entries)}  # the first of an id
    again = entries + entries[: len(entries) // 2]
    totals = total_by(again, ("tenant",))
    assert sum(total.requests for total in totals.values()) == len(once)
    assert sum(total.cost_nusd for total in totals.values()) == sum(e.cost_nusd for e in once.values())


# Files.


def test_a_file_that_is_large_is_set_aside_and_all_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    file = UsageFile(path, 1_000, lambda: NOON)
    for number in range(50):
        file.write(entry(number).to_json() + b"\n")
    file.close()
    paths = files_of(path)
    assert len(paths) > 5
    assert paths[-1] == path
    assert all(p.stat().st_size >= 1_000 for p in paths[:-1])
    packed = paths[0].with_name(paths[0].name + ".gz")
    packed.write_bytes(gzip.compress(paths[0].read_bytes()))
    paths[0].unlink()
    assert [e.id for e in read(files_of(path), pytest.fail)] == [entry(n).id for n in range(50)]


WRITER = """
import sys
from gateway.usage.files import UsageFile
file = UsageFile(sys.argv[1], 20_000, lambda: 1_790_000_000.0)
for number in range(400):
    file.write(b'{"writer": "%s", "number": %d, "fill": "%s"}\\n' % (sys.argv[2].encode(), number, b"x" * 300))
"""


def test_processes_that_share_a_file_lose_and_mix_no_line(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), f"w{n}"]) for n in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    lines = [orjson.loads(line) for p in files_of(path) for line in p.read_bytes().splitlines()]
    assert sorted((line["writer"], line["number"]) for line in lines) == sorted(
        (f"w{n}", number) for n in range(3) for number in range(400)
    )
    assert len(files_of(path)) > 5


def test_a_file_whose_folder_is_gone_for_a_while_takes_nobody_elses_descriptor(tmp_path: Path) -> None:
    folder, away = tmp_path / "usage", tmp_path / "away"
    folder.mkdir()
    file = UsageFile(folder / "u.jsonl", 10**9, lambda: NOON)
    folder.rename(away)
    others = []
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            file.write(entry(1).to_json() + b"\n")
        others.append(os.open(os.devnull, os.O_RDONLY))
    for other in others:
        os.close(other)  # raises where it is closed already
    away.rename(folder)
    file.write(entry(2).to_json() + b"\n")
    file.close()
    assert [e.id for e in read(files_of(folder / "u.jsonl"), pytest.fail)] == [entry(2).id]


FILLING = """
import resource, signal, sys
from gateway.usage.files import UsageFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = UsageFile(sys.argv[1], 10**9, lambda: 1_790_000_000.0)
file.write(b"first\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
for line in b"second\\n", b"third\\n":
    try:
        file.write(line)
    except OSError:
        print("lost")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.write(b"fourth\\n")
"""


def test_a_line_of_which_a_part_was_written_takes_the_next_one_not_along(tmp_path: Path) -> None:
    path = tmp_path / "u.jsonl"
    told = subprocess.run([sys.executable, "-c", FILLING, str(path)], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["lost", "lost"]
    assert path.read_bytes().splitlines() == [b"first", b"seco", b"fourth"]


def test_a_file_that_cannot_be_set_aside_grows_on_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / f"{'u' * 245}.jsonl"  # a longer name cannot be
    file = UsageFile(path, 10, lambda: NOON)
    for number in range(3):
        file.write(entry(number).to_json() + b"\n")
    file.close()
    assert [e.id for e in read([path], pytest.fail)] == [entry(number).id for number in range(3)]


def test_a_name_with_glob_characters_finds_its_own_files_only(tmp_path: Path) -> None:
    for name in ("u[1].jsonl", "u1.jsonl"):
        file = UsageFile(tmp_path / name, 10, lambda: NOON)
        file.write(entry().to_json() + b"\n")
        file.close()
    assert {p.name for p in files_of(tmp_path / "u[1].jsonl")} == {"u[1]-20260921T141320Z-000.jsonl", "u[1].jsonl"}


def test_a_line_that_is_none_is_told_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "u.jsonl"
    path.write_bytes(entry(1).to_json() + b"\n\nnonsense\n" + entry(2).to_json())
    told: list[str] = []
    assert len(list(read([path], told.append))) == 2
    assert told == [f"{path}:3: no usage record: JSONDecodeError"]


# The journal.


def journal(told: list[str], **sinks: object) -> Journal:
    return Journal(wall=lambda: NOON, tell=told.append, **sinks)  # type: ignore[arg-type]


def test_what_is_added_in_a_turn_is_one_write_and_there_after_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        kept = journal([], file=UsageFile(tmp_path / "u.jsonl", 10**9, lambda: NOON))
        for number in range(3):
            kept.add(entry(number))
        assert (tmp_path / "u.jsonl").read_bytes() == b""
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (tmp_path / "u.jsonl").read_bytes().count(b"\n") == 3
        await kept.close()

    asyncio.run(scenario())


def test_a_file_that_cannot_be_written_is_told_once_and_counted() -> None:
    class Full(UsageFile):
        def __init__(self) -> None:
            self.full = True

        def write(self, lines: bytes) -> None:
            if self.full:
                raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    told: list[str] = []

    async def scenario() -> Journal:
        full = Full()
        kept = journal(told, file=full)
        for number in range(3):
            kept.add(entry(number))
            await asyncio.sleep(0.001)
        full.full = False
        kept.add(entry(4))
        await kept.close()
        return kept

    assert asyncio.run(scenario()).lost == 3
    assert told == [
        "usage records are lost: the file cannot be written (No space left on device)",
        "usage records are kept again",
    ]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in another task
            await asyncio.sleep(0.01)


def test_entries_reach_the_stream_although_the_server_stops_answering_for_a_while(tmp_path: Path) -> None:
    async def scenario(url: str, pid: int) -> tuple[list[str], int]:
        async with Store(url) as store:
            store.start()
            kept = journal([], stream=UsageStream(store, 0))
            kept.start()
            for number in range(200):
                kept.add(entry(number))
            await until(lambda: not kept.waiting)
            os.kill(pid, signal.SIGSTOP)
            for number in range(200, 400):
                kept.add(entry(number))
            await until(lambda: not store.state.up)
            assert kept.waiting >= 200
            os.kill(pid, signal.SIGCONT)
            await until(lambda: not kept.waiting)
            await kept.close()
            return [e.id for e in await UsageStream(store, 0).entries()], kept.lost

    with redis_server(tmp_path) as url:
        pid = int(subprocess.check_output(["pgrep", "-f", url.rpartition(":")[2]]).split()[0])
        ids, lost = asyncio.run(scenario(url, pid))
    assert lost == 0
    assert set(ids) == {entry(number).id for number in range(400)}


def test_at_the_end_what_the_stream_does_not_take_is_counted_as_lost() -> None:
    told: list[str] = []

    async def scenario() -> Journal:
        async with Store("redis://127.0.0.1:1") as store:
            kept = journal(told, stream=UsageStream(store, 0))
            kept.start()
            kept.add(entry())
            await kept.close(within=0.1)
            return kept

    assert asyncio.run(scenario()).lost == 1
    assert told == ["usage records are lost: the store did not answer before the end"]


def test_what_waits_for_the_stream_is_bounded() -> None:
    async def scenario() -> Journal:
        async with Store("redis://127.0.0.1:1") as store:
            kept = journal([], stream=UsageStream(store, 0))
            for _ in range(MOST_WAITING + 5):
                kept.add(SMALL)
            return kept

    kept = asyncio.run(scenario())
    assert (kept.waiting, kept.lost) == (MOST_WAITING, 5)


SMALL = entry()


# The command.

REFUSED = Entry("4", NOON, "crm", "crm-1", "rate_limited", 429)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    path = tmp_path / "usage.jsonl"
    failed = (Tried("gpt", "failed", 20, 500), Tried("local", "ok", 15, 0))
    entries = [
        entry(1),
        entry(2, "=ops", at=LATE, cost=2_000_000_000),
        entry(3, attempts=failed),
        REFUSED,
        entry(1),
    ]
    path.write_bytes(b"".join(e.to_json() + b"\n" for e in entries))
    return path


def said(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, ["usage", *arguments])
    assert result.exit_code == status, result.output
    return result.output


def test_the_table_sums_by_tenant_and_model(recorded: Path) -> None:
    text = said(str(recorded))
    assert [line.split() for line in text.splitlines() if line.strip().startswith(("=ops", "crm", "all"))] == [
        ["=ops", "demo", "1", "1", "0", "10", "5", "15", "2", "0"],
        ["crm", "-", "1", "0", "0", "0", "0", "0", "0", "0"],
        ["crm", "demo", "2", "2", "0", "20", "10", "50", "0.0000015", "0.0000005"],
        ["all", "4", "3", "0", "30", "15", "65", "2.0000015", "0.0000005"],
    ]


def test_csv_has_a_row_a_group_and_no_formula(recorded: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(said(str(recorded), "--by", "tenant,day", "--csv"))))
    assert [(row["tenant"], row["day"], row["cost_usd"]) for row in rows] == [
        ("'=ops", "2026-09-21", "2"),
        ("crm", "2026-09-21", "0.0000015"),
    ]


def test_json_is_for_programs(recorded: Path) -> None:
    told = orjson.loads(said(str(recorded), "--by", "deployment", "--json"))
    assert told["by"] == ["deployment"]
    assert told["all"]["cost_usd"] == "2.0000015"
    assert [row["deployment"] for row in told["rows"]] == ["", "local"]


@pytest.mark.parametrize(
    ("flags", "requests"),
    [
        (("--since", "2026-09-22", "--time-zone", "Europe/Berlin"), 1),
        (("--until", "2026-09-22", "--time-zone", "Europe/Berlin"), 3),
        (("--since", "2026-09-22"), 0),
        (("--since", "2026-09-21T20:00"), 1),
        (("--since", "2026-09-21T20:00+02:00"), 1),
        (("--tenant", "crm"), 3),
    ],
)
def test_a_part_may_be_summed(recorded: Path, flags: tuple[str, ...], requests: int) -> None:
    assert orjson.loads(said(str(recorded), "--json", *flags))["all"]["requests"] == requests


@pytest.mark.parametrize("by", ["tenant", "day,deployment"])
def test_a_picture_is_drawn(recorded: Path, tmp_path: Path, by: str) -> None:
    said(str(recorded), "--by", by, "--picture", str(tmp_path / "cost.svg"))
    assert "Cost" in (tmp_path / "cost.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--by", "tennant"), "--by takes one or more of tenant, key"),
        (("--by", "tenant,tenant"), "each once"),
        (("--since", "yesterday"), "--since must be a day or a moment"),
        (("--time-zone", "Mars/Base"), "there is no time zone"),
        (("/no/such/file",), "cannot read /no/such/file (No such file or directory)"),
        ((), "name their files"),
        (("--redis",), "--redis needs HYBRIDGATE_REDIS_URL"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], says: str, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYBRIDGATE_USAGE_FILE", raising=False)
    monkeypatch.delenv("HYBRIDGATE_REDIS_URL", raising=False)
    files = [] if not arguments or arguments[0].startswith("/") or "--redis" in arguments else [str(recorded)]
    assert says in said(*files, *arguments, status=2).replace("\n", " ")


def test_the_stream_can_be_summed(tmp_path: Path) -> None:
    async def fill(url: str) -> None:
        async with Store(url) as store:
            await UsageStream(store, 0).add([entry(n).to_json() for n in range(1_200)])

    with redis_server(tmp_path) as url:
        asyncio.run(fill(url))
        result = CliRunner().invoke(main, ["usage", "--redis", "--json"], env={"HYBRIDGATE_REDIS_URL": url})
    assert orjson.loads(result.output)["all"]["requests"] == 1_200
