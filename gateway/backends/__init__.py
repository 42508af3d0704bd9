"""The one door to every model: `Backends.open` checks the request's labels against the deployment's zone once more,
then calls.

Nothing else in the gateway holds a backend. A refusal here means that the decision was wrong; nothing has been sent
then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gateway.backends.base import Answer, Backend, Call
from gateway.errors import EgressDenied
from gateway.types import Deployment, Permit


class Backends:
    """All backends by deployment name. Invariant: no call leaves for a zone that the request's permit does not
    allow."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = dict(backends)

    async def open(self, deployment: Deployment, permit: Permit, call: Call) -> Answer:
        """Call the deployment. Raises `EgressDenied` before anything is sent, else what the backend raises."""
        if not permit.allows(deployment.zone):
            raise EgressDenied(f"{deployment.name} is in zone {deployment.zone}, outside of {permit.because}")
        return await self._backends[deployment.name].open(call)

    async def close(self) -> None:
        """Close every backend's connections."""
        await asyncio.gather(*(backend.close() for backend in self._backends.values()))
