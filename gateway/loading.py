"""Policies and keys from disk, with what they need from outside: litellm's price map and the names of the detectors.

Owns the reading of those files. Refuses to import litellm, which takes seconds: its map is a JSON file beside its code.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from stat import S_ISREG
from typing import Any

import orjson

from gateway.keyfile import KeyErrors, Known, compile_keys
from gateway.keys import Keys
from gateway.labels import KINDS
from gateway.policy import Policy
from gateway.policyfile import MAX_BYTES, PolicyErrors, Problem, compile_policy
from gateway.types import UNSCANNABLE

FileState = tuple[int, ...] | None

PRICE_MAP = "model_prices_and_context_window_backup.json"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of reading a policy: the policy, or all that is wrong. `states` are the files that were read, each as
    it was just before."""

    policy: Policy | None
    problems: tuple[Problem, ...]
    states: Mapping[str, FileState]


def load_policy(path: str | os.PathLike[str], environ: Mapping[str, str]) -> Policy:
    """The policy at `path`. Raises PolicyErrors, also where a file cannot be read."""
    return compile_policy(os.fspath(path), read=read_text, env=environ, price_map=litellm_price_map(), detectors=KINDS)


def read_policy(path: str, environ: Mapping[str, str]) -> Loaded:
    """The policy at `path` or what is wrong with it, and the files that say so."""
    states: dict[str, FileState] = {}

    def read(file: str) -> str:
        states[file] = state_of(file)
        return read_text(file)

    try:
        policy = compile_policy(path, read=read, env=environ, price_map=litellm_price_map(), detectors=KINDS)
    except PolicyErrors as error:
        return Loaded(None, error.problems, states)
    return Loaded(policy, (), states)


@dataclass(frozen=True, slots=True)
class LoadedKeys:
    """What became of reading a file of keys: the keys, or all that is wrong. `states` is the file as it was just
    before. `unresolved`: the keys where nothing but what they name is wrong."""

    keys: Keys | None
    problems: tuple[Problem, ...]
    states: Mapping[str, FileState]
    unresolved: Keys | None = None


def read_keys(path: str, known: Known | None) -> LoadedKeys:
    """The keys at `path` or what is wrong with them. `known`: what they may name; None where that is not looked at."""
    states = {path: state_of(path)}
    try:
        text = read_text(path)
        try:
            return LoadedKeys(compile_keys(path, text, known), (), states)
        except KeyErrors as error:
            problems = error.problems
        with suppress(KeyErrors):
            return LoadedKeys(None, problems, states, compile_keys(path, text, None))
    except OSError as error:
        problems = (Problem(path, 0, 0, f"the file cannot be read: {error.strerror or 'it failed'}"),)
    except UnicodeDecodeError as error:
        problems = (Problem(path, 0, 0, f"the file is not UTF-8 text: byte {error.start} is wrong"),)
    return LoadedKeys(None, problems, states)


def known_names(policy: Policy) -> Known:
    """What keys may name under a policy."""
    labels = frozenset({UNSCANNABLE, *(label.name for label in policy.labels)})
    return Known(labels, frozenset(policy.deployments), frozenset(policy.slo))


def state_of(file: str) -> FileState:
    """What tells one content of a file from another without reading it, symbolic links followed; None where there is no
    file."""
    try:
        state = Path(file).stat()
    except OSError:
        return None
    return (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def read_text(path: str) -> str:
    """A policy file's text. Raises OSError (EFBIG above MAX_BYTES, so that no more than that is ever read; EINVAL for a
    pipe or a device, for which it does not wait) and UnicodeDecodeError."""
    with open(path, "rb", opener=_without_waiting) as file:
        if not S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {MAX_BYTES:,} bytes")
    return data.decode("utf-8-sig")


def _without_waiting(path: str, flags: int) -> int:
    """Opens what may be a pipe that nobody writes to."""
    return os.open(path, flags | os.O_NONBLOCK)


def litellm_price_map() -> Mapping[str, Any]:
    """Rows by model name, read from the installed package without importing it. About 10 ms."""
    spec = find_spec("litellm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("litellm is not installed", name="litellm")
    rows: dict[str, Any] = orjson.loads(Path(spec.origin).with_name(PRICE_MAP).read_bytes())
    return rows
