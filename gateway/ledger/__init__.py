"""Reservations of requests, tokens, money and slots at once, under limits that are never exceeded: one contract, in
one process (`MemoryLedger`) or shared by replicas (`RedisLedger`)."""

from gateway.ledger.base import (
    Hold,
    Ledger,
    LedgerUnavailable,
    Limit,
    OnDown,
    Refused,
    Reservation,
    Spent,
    days,
    months,
)
from gateway.ledger.memory import MemoryLedger
from gateway.ledger.redis_ledger import RedisLedger

__all__ = [
    "Hold",
    "Ledger",
    "LedgerUnavailable",
    "Limit",
    "MemoryLedger",
    "OnDown",
    "RedisLedger",
    "Refused",
    "Reservation",
    "Spent",
    "days",
    "months",
]
