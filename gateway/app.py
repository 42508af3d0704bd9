"""The application: the list of routes over a running gateway. Nothing here decides or keeps anything."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.chat import Log
from gateway.edge import Endpoint
from gateway.keys import Keys
from gateway.pages import Pages, no_method, no_route
from gateway.policy import Policy
from gateway.running import Gateway, Tell, new_id
from gateway.settings import Settings


class Front:
    """The application: a POST to an endpoint goes straight to it, all else through Starlette, whose middleware would
    wrap every event of every stream. Invariant: what is reached here is reached by Starlette's routes as well."""

    def __init__(self, endpoints: Mapping[str, Endpoint], behind: Starlette) -> None:
        self._endpoints = endpoints
        self._behind = behind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._endpoints.get(scope["path"])
            if endpoint is not None:
                await endpoint(scope, receive, send)
                return
        await self._behind(scope, receive, send)


def build(settings: Settings, policy: Policy, log: Log, tell: Tell, keys: Keys | None = None) -> tuple[Front, Gateway]:
    """The application and the gateway behind it; without `keys` whoever reaches it may ask. Raises OSError, as
    `Gateway` does."""
    gateway = Gateway(settings, policy, log, tell, keys)
    pages = Pages(gateway)
    answering = {"/v1/chat/completions": gateway.path.complete, "/v1/route": pages.route}
    endpoints = {
        path: Endpoint(gateway.path.admit, answer, max_body_bytes=settings.max_body_bytes, log=log, new_id=new_id)
        for path, answer in answering.items()
    }
    routes = [
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()),
        Route("/v1/models", pages.models),
        Route("/v1/models/{name:path}", pages.model),
        Route("/livez", pages.live),
        Route("/readyz", pages.ready),
    ]
    app = Starlette(routes=routes, lifespan=gateway.lifespan, exception_handlers={404: no_route, 405: no_method})
    app.router.redirect_slashes = False
    return Front(endpoints, app), gateway
