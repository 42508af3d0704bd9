"""Decision records: JSON lines, and no request that fails because one cannot be written."""

from __future__ import annotations

import io
from pathlib import Path

import orjson

from gateway.telemetry import JsonLog


def test_a_record_is_one_line_of_json() -> None:
    stream = io.BytesIO()
    JsonLog(stream, lambda _: None).info("request", status=200)
    line = orjson.loads(stream.getvalue())
    assert stream.getvalue().endswith(b"}\n") and line["event"] == "request" and line["level"] == "info"


def test_a_full_disk_is_told_once_and_harms_no_request() -> None:
    told: list[str] = []
    with Path("/dev/full").open("wb", buffering=0) as full:
        log = JsonLog(full, told.append)
        for _ in range(3):
            log.info("request", status=200)
    assert told == ["log records are lost: they cannot be written (No space left on device)"]


def test_it_is_told_when_records_are_written_again() -> None:
    class Disk(io.BytesIO):
        full = True

        def write(self, line: object) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(line)  # type: ignore[arg-type]

    disk, told = Disk(), list[str]()
    log = JsonLog(disk, told.append)
    log.info("request")
    disk.full = False
    log.info("request")
    log.info("request")
    assert told[1:] == ["log records are written again"] and disk.getvalue().count(b"\n") == 2
