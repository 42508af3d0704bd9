"""Files of the simulator: traces, plain or gzipped. Owns the opening of them; refuses to know what is inside."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from gateway.simulate.trace import Trace, TraceError, parse

_GZIP = b"\x1f\x8b"


def read_trace(path: str) -> Trace:
    """The trace in a CSV or JSONL file, gzipped or not. Raises TraceError, also where the file cannot be read."""
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == _GZIP
        with (
            gzip.open(path, "rt", encoding="utf-8", newline="")
            if zipped
            else open(  # a cell may hold a line break
                path, encoding="utf-8", newline=""
            ) as lines
        ):
            return parse(path, lines)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (UnicodeDecodeError, EOFError, zlib.error):
        raise TraceError(f"{path}: is no text in UTF-8, plain or gzipped") from None


def read_text(path: str) -> str:
    """A small file's text. Raises TraceError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise TraceError(f"{path}: is no text in UTF-8") from None
