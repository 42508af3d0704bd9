"""The floor: the leanest gateway on uvicorn, Starlette and aiohttp that relays plain answers and streams, and does
nothing else.

Owns one shared client session. Refuses every decision: one upstream, no keys, no checks, no record. What Hybridgate
costs is measured against it.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

_JSON = {"content-type": "application/json"}


class PassThrough:
    """Relays to one URL. Invariant: the session is open exactly while the application runs."""

    def __init__(self, upstream: str) -> None:
        self._url = upstream + "/v1/chat/completions"
        self._session: aiohttp.ClientSession

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Open the session, close it at the end."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as self._session:
            yield

    async def chat(self, request: Request) -> Response:
        """Relay one request."""
        body = await request.body()
        stream = orjson.loads(body).get("stream")
        upstream = await self._session.post(self._url, data=body, headers=_JSON)
        if stream:
            return StreamingResponse(relayed(upstream), upstream.status, media_type="text/event-stream")
        return Response(await upstream.read(), upstream.status, media_type="application/json")


async def relayed(upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """What has arrived is written on together; leaving early closes the upstream connection."""
    async with upstream:
        async for data in upstream.content.iter_any():
            yield data


def main() -> None:
    """`python -m tests.bench.passthrough --port PORT --upstream URL`"""
    options = argparse.ArgumentParser(description="A bare Starlette and aiohttp pass-through.")
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--upstream", required=True, help="such as http://127.0.0.1:9999")
    arguments = options.parse_args()
    relay = PassThrough(arguments.upstream)
    app = Starlette(routes=[Route("/v1/chat/completions", relay.chat, methods=["POST"])], lifespan=relay.lifespan)
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=arguments.port,
        loop="uvloop",
        http="httptools",
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
