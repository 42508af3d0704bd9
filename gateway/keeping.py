"""What a process keeps beyond its requests, as its settings say: stored answers, records of usage, and the Redis that
both and the limits share with other replicas.

Owns how settings become them. Refuses to start, to use or to close what it makes: running.py does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from gateway.cache import MemoryCache, RedisCache, Seal, secret_in
from gateway.caching import Answers
from gateway.settings import PREFIX, Settings, SettingsError
from gateway.store import Store, StoreState
from gateway.usage.files import UsageFile
from gateway.usage.journal import Journal
from gateway.usage.stream import UsageStream

MOST_ENTRY_BYTES = 1024 * 1024  # of one stored answer, compressed


def store_of(settings: Settings, changed: Callable[[StoreState], None]) -> Store | None:
    """What replicas share, where there is something. Raises `SettingsError` where its address cannot be one."""
    if not settings.redis_url:
        return None
    try:
        return Store(settings.redis_url, changed=changed)
    except ValueError as error:
        raise SettingsError(f"{PREFIX}REDIS_URL {error}") from None


def journal_of(settings: Settings, store: Store | None, tell: Callable[[str], None]) -> Journal | None:
    """Where usage records go, if anywhere. Raises OSError where the file cannot be written, `SettingsError` where
    there is no Redis for them."""
    if settings.usage_stream and store is None:
        raise SettingsError(f"{PREFIX}USAGE_STREAM needs {PREFIX}REDIS_URL")
    if not (settings.usage_file or settings.usage_stream):
        return None
    path, megabytes = settings.usage_file, settings.usage_file_megabytes
    file = UsageFile(path, megabytes * 1_000_000, time.time) if path else None
    stream = UsageStream(store, settings.usage_stream_entries) if settings.usage_stream and store else None
    return Journal(wall=time.time, tell=tell, file=file, stream=stream)


def answers_of(settings: Settings, store: Store | None, new_id: Callable[[], str]) -> Answers:
    """The stored answers, in memory and in what replicas share. Raises `SettingsError` where the file of the secret
    holds none."""
    memory = MemoryCache(settings.cache_entries, settings.cache_bytes, MOST_ENTRY_BYTES)
    if store is None:
        return Answers(memory, time.time, new_id)
    seal = _seal_of(settings.cache_secret) if settings.cache_secret else None
    secret = b"" if seal is None else seal.digest_secret
    shared = RedisCache(store, MOST_ENTRY_BYTES, seal)
    return Answers(memory, time.time, new_id, shared, settings.redis_zone or None, secret)


def _seal_of(path: str) -> Seal:
    try:
        return Seal(secret_in(Path(path).read_text()))
    except OSError as error:
        raise SettingsError(f"{PREFIX}CACHE_SECRET: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # text that is none, among them
        what = "is no text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise SettingsError(f"{PREFIX}CACHE_SECRET: {path} {what}") from None
