"""The operator's side: metrics, health and reload, on a port of its own.

Owns those endpoints. Refuses requests for models. Nothing here says what a caller sent; whoever reaches the port learns
the names of deployments and rules, and may have the policy read again.
"""

from __future__ import annotations

import time

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.livestate import state_document
from gateway.pages import Pages, json_response, no_method, no_route, told_of
from gateway.reload import Reloader
from gateway.running import Gateway


class Admin:
    """The endpoints that only operators use."""

    def __init__(self, gateway: Gateway, reloader: Reloader) -> None:
        self._gateway = gateway
        self._reloader = reloader

    async def metrics(self, _: Request) -> Response:
        """For Prometheus."""
        return Response(self._gateway.metrics.exposition(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def state(self, _: Request) -> Response:
        """What is known of the fleet: what `hybridgate policy explain --state URL` decides from."""
        snapshot = self._gateway.fleet.snapshot(time.monotonic(), 0.0, time.time())
        return json_response(200, state_document(self._gateway.path.serving.policy, snapshot))

    async def reload(self, _: Request) -> Response:
        """Read the policy's files now: 200 where what they say is in use, 422 with the errors where they do not
        load."""
        await self._reloader.reload()
        state = self._gateway.policy_state
        return json_response(422 if state.problems else 200, {"policy": told_of(state)})


def admin_app(gateway: Gateway, reloader: Reloader) -> Starlette:
    """The application for the admin port."""
    admin, pages = Admin(gateway, reloader), Pages(gateway)
    routes = [
        Route("/metrics", admin.metrics),
        Route("/state", admin.state),
        Route("/reload", admin.reload, methods=["POST"]),
        Route("/livez", pages.live),
        Route("/readyz", pages.ready),
    ]
    app = Starlette(routes=routes, exception_handlers={404: no_route, 405: no_method})
    app.router.redirect_slashes = False
    return app
