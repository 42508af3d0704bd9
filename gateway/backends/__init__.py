"""The one door to every model: `Backends.open` checks the request's labels against the deployment's zone once more,
then calls. Where the zone may only get the request masked, it gets that form, looked through once more, and the answer
comes back with its placeholders replaced.

Nothing else in the gateway holds a backend. A refusal here means that the decision was wrong; nothing has been sent
then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from gateway.backends.base import Answer, Backend, Call
from gateway.backends.unmasked import UnmaskedAnswer
from gateway.errors import EgressDenied
from gateway.masking import Masked
from gateway.types import Deployment, Permit

# Characters above which a second look would hold up other requests.
_SCAN_IN_THREAD_ABOVE = 4 * 1024


class Backends:
    """The backends of one policy by deployment name. Invariant: no call leaves for a zone that the request's permit
    does not allow, and none as it is for a zone that it allows only masked.

    Each request `enter`s before it may call and `leave`s once after, so that what a policy that was replaced has open
    is closed when it is `unused`, not before.
    """

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = dict(backends)
        self._requests = 0
        self._unused = asyncio.Event()

    async def open(self, deployment: Deployment, permit: Permit, call: Call) -> Answer:
        """Call the deployment. Raises `EgressDenied` before anything is sent, else what the backend raises."""
        passage = permit.passage(deployment.zone)
        if passage is None:
            raise EgressDenied(f"{deployment.name} is in zone {deployment.zone}, outside of {permit.because}")
        backend = self._backends[deployment.name]
        if passage == "as_is":
            return await backend.open(call)
        masked = await _looked_through(deployment, permit, call)
        request_id = "masked" if masked.hides(call.request_id) else call.request_id
        answer = await backend.open(replace(call, chat=masked.chat, masked=None, request_id=request_id))
        return UnmaskedAnswer(answer, masked.mask, stream=call.chat.stream, json_content=call.chat.schema)

    def enter(self) -> None:
        """One more request may call."""
        self._requests += 1

    def leave(self) -> None:
        """One request less."""
        self._requests -= 1
        if not self._requests:
            self._unused.set()

    async def unused(self) -> None:
        """Wait until no request is left. Once no new ones `enter`, it stays so."""
        while self._requests:
            self._unused.clear()
            await self._unused.wait()


async def _looked_through(deployment: Deployment, permit: Permit, call: Call) -> Masked:
    """The call's masked form. Raises `EgressDenied` where there is none, where it is another request's, and where
    anything is found in it."""
    masked = call.masked
    place = f"{deployment.name} is in zone {deployment.zone}, outside of {permit.because}"
    if masked is None or masked.original is not call.chat:
        raise EgressDenied(f"{place}, and the request is not masked")
    large = sum(map(len, masked.chat.texts)) > _SCAN_IN_THREAD_ABOVE
    if await asyncio.to_thread(masked.found) if large else masked.found():
        raise EgressDenied(f"{place}, and something is found in the masked request")
    return masked
