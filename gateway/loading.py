"""Policies from disk, with what they need from outside: litellm's price map and the names of the detectors.

Owns the reading of those files. Refuses to import litellm, which takes seconds: its map is a JSON file beside its code.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson

from gateway.labels import KINDS
from gateway.policy import Policy
from gateway.policyfile import MAX_BYTES, compile_policy

PRICE_MAP = "model_prices_and_context_window_backup.json"


def load_policy(path: str | os.PathLike[str], environ: Mapping[str, str]) -> Policy:
    """The policy at `path`. Raises PolicyErrors, also where a file cannot be read."""
    return compile_policy(os.fspath(path), read=read_text, env=environ, price_map=litellm_price_map(), detectors=KINDS)


def read_text(path: str) -> str:
    """A policy file's text. Raises OSError (EFBIG above MAX_BYTES, so that no more than that is ever read) and
    UnicodeDecodeError."""
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {MAX_BYTES:,} bytes")
    return data.decode("utf-8-sig")


def litellm_price_map() -> Mapping[str, Any]:
    """Rows by model name, read from the installed package without importing it. About 10 ms."""
    spec = find_spec("litellm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("litellm is not installed", name="litellm")
    rows: dict[str, Any] = orjson.loads(Path(spec.origin).with_name(PRICE_MAP).read_bytes())
    return rows
