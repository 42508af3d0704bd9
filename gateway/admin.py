"""The operator's side: metrics, health and reload, on a port of its own.

Owns those endpoints. Refuses requests for models. Nothing here says what a caller sent; whoever reaches the port learns
the names of deployments and rules and the addresses of replicas, and may have the files read again; where others than
this machine reach it, `OperatorsOnly` asks for an operator's key.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.access import Access
from gateway.cache import CacheUnavailable, Chosen, Figures
from gateway.edge import headers_of, send_error
from gateway.errors import NoCandidate, Unauthenticated, body_of
from gateway.facts import request_id_of
from gateway.livestate import state_document
from gateway.pages import Pages, json_response, no_method, no_route, told_of, told_of_keys
from gateway.reload import KeysReloader, Reloader
from gateway.running import Gateway, new_id

Endpoints = Mapping[str, Callable[[Request], Awaitable[Response]]]
CHANGING = frozenset({"/reload", "/cache/purge"})  # paths that take a POST; all others are read


class Admin:
    """The endpoints that only operators use."""

    def __init__(self, gateway: Gateway, reloader: Reloader, keys: KeysReloader | None) -> None:
        self._gateway = gateway
        self._reloader = reloader
        self._keys = keys

    async def metrics(self, _: Request) -> Response:
        """For Prometheus."""
        return Response(self._gateway.metrics.exposition(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def state(self, _: Request) -> Response:
        """What is known of the fleet: what `hybridgate policy explain --state URL` decides from."""
        snapshot = self._gateway.fleet.snapshot(time.monotonic(), 0.0, time.time())
        return json_response(200, state_document(self._gateway.path.serving.policy, snapshot))

    async def cache(self, _: Request) -> Response:
        """How many answers are stored, and whose; never what they say."""
        answers = self._gateway.answers
        try:
            stored = {where: _told_of_stored(figures) for where, figures in (await answers.figures()).items()}
        except CacheUnavailable as error:
            return _unavailable(error)
        return json_response(200, {"counts": asdict(answers.counts), "stored": stored})

    async def purge(self, request: Request) -> Response:
        """Forget stored answers: all that the query's tenant, model and deployment choose."""
        chosen = Chosen(**{name: request.query_params.get(name) for name in ("tenant", "model", "deployment")})
        try:
            return json_response(200, {"forgotten": await self._gateway.answers.purge(chosen)})
        except CacheUnavailable as error:
            return _unavailable(error)

    async def replicas(self, _: Request) -> Response:
        """The replicas of each deployment that has several, with their addresses."""
        now, fleet = time.monotonic(), self._gateway.fleet
        members = {name: fleet.members(name, now) for name in self._gateway.path.serving.policy.deployments}
        told = {
            name: [
                {
                    "replica": member.ordinal,
                    "url": member.replica.url,
                    "address": member.replica.address,
                    "up": member.up,
                    "in_flight": member.in_flight,
                    "busy": member.busy,
                }
                for member in of_it
            ]
            for name, of_it in members.items()
            if of_it
        }
        return json_response(200, told)

    async def reload(self, _: Request) -> Response:
        """Read the policy's files and the keys now: 200 where what they say is in use, 422 with the errors where they
        do not load."""
        await self._reloader.reload()
        state, access = self._gateway.policy_state, self._gateway.access
        told, problems = {"policy": told_of(state)}, state.problems
        if self._keys is not None and access is not None:
            await self._keys.reload()
            told["keys"], problems = told_of_keys(access), problems + access.state.problems
        return json_response(422 if problems else 200, told)


def _told_of_stored(figures: Figures) -> dict[str, Any]:
    rows = [
        {"tenant": tenant, "model": model, "deployment": deployment, "entries": entries, "bytes": size}
        for (tenant, model, deployment), (entries, size) in sorted(figures.by.items())
    ]
    return {"entries": figures.entries, "bytes": figures.bytes, "by": rows}


def _unavailable(error: CacheUnavailable) -> Response:
    """What this process stores is done; what replicas share is not."""
    return json_response(503, body_of(NoCandidate(f"what replicas share cannot be asked now ({error}): try again")))


class OperatorsOnly:
    """An application whose paths need an operator's key, but for those that say whether the process is well."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in ("/livez", "/readyz"):
            headers = headers_of(scope)
            try:
                self._access.authenticate_operator(headers)
            except Unauthenticated as error:
                await send_error(send, error, request_id_of(headers, new_id))
                return
        await self._app(scope, receive, send)


def operators_app(endpoints: Endpoints, access: Access | None, *, guarded: bool) -> ASGIApp:
    """An application for the admin port; `guarded` where it is only for whoever has an operator's key."""
    routes = [
        Route(path, endpoint, methods=["POST"] if path in CHANGING else ["GET"]) for path, endpoint in endpoints.items()
    ]
    app = Starlette(routes=routes, exception_handlers={404: no_route, 405: no_method})
    app.router.redirect_slashes = False
    if not guarded:
        return app
    assert access is not None, "there are no keys to guard it with"
    return OperatorsOnly(app, access)


def admin_app(
    gateway: Gateway, reloader: Reloader, keys: KeysReloader | None = None, *, guarded: bool = False
) -> ASGIApp:
    """The application for the admin port; `guarded` where it is only for whoever has an operator's key."""
    admin, pages = Admin(gateway, reloader, keys), Pages(gateway, to_all=not guarded)
    endpoints: Endpoints = {
        "/metrics": admin.metrics,
        "/state": admin.state,
        "/replicas": admin.replicas,
        "/reload": admin.reload,
        "/cache": admin.cache,
        "/cache/purge": admin.purge,
        "/livez": pages.live,
        "/readyz": pages.ready,
    }
    return operators_app(endpoints, gateway.access, guarded=guarded)
