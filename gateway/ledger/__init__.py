"""Reservations of requests, tokens, money and slots at once, under limits that are never exceeded: one contract, in
one process (`MemoryLedger`), in a store (`redis_ledger.RedisLedger`), or shared by replicas as long as that answers
(`shared.SharedLedger`). The last two import a client of Redis, so they are not here."""

from gateway.ledger.base import (
    SLACK,
    Counting,
    Hold,
    Ledger,
    LedgerDamaged,
    LedgerUnavailable,
    Limit,
    Refused,
    Reservation,
    Spent,
    days,
    months,
)
from gateway.ledger.memory import MemoryLedger

__all__ = [
    "SLACK",
    "Counting",
    "Hold",
    "Ledger",
    "LedgerDamaged",
    "LedgerUnavailable",
    "Limit",
    "MemoryLedger",
    "Refused",
    "Reservation",
    "Spent",
    "days",
    "months",
]
