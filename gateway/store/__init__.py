"""The store that replicas share: one connection to Redis for each process, and what its failing looks like.

`connection` says how to use it."""

from gateway.store.clients import Command, checked_url
from gateway.store.connection import (
    MOST_WAIT,
    TIMEOUT,
    Script,
    ScriptCall,
    Store,
    StoreBusy,
    StoreRefused,
    StoreState,
    StoreUnavailable,
    reply_of,
)

__all__ = [
    "MOST_WAIT",
    "TIMEOUT",
    "Command",
    "Script",
    "ScriptCall",
    "Store",
    "StoreBusy",
    "StoreRefused",
    "StoreState",
    "StoreUnavailable",
    "checked_url",
    "reply_of",
]
