"""What replicas share, for tests and benchmarks on a machine that may be busy: nobody's patience ends first."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.ledger import Hold, Refused, Reservation
from gateway.ledger.redis_ledger import RedisLedger
from gateway.ledger.shared import SharedLedger
from gateway.store import Store

PATIENT = 30.0


class PatientLedger(SharedLedger):
    """Whoever reserves waits for the store, however long that takes."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, RedisLedger(store))

    async def reserve(
        self, id: str, holds: Sequence[Hold], lease_s: float, now: float, within: float | None = None
    ) -> Reservation | Refused:
        return await super().reserve(id, holds, lease_s, now, PATIENT)
