"""The application: the list of routes over a running gateway. Nothing here decides or keeps anything."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.routing import Route

from gateway.answers import Log
from gateway.edge import Application, AsgiEndpoint, Edge, Endpoint
from gateway.engines import EngineRoom
from gateway.keys import Keys
from gateway.pages import Pages, PostOnly, no_answer, no_method, no_route
from gateway.policy import Policy
from gateway.replicas import Resolve
from gateway.running import Gateway, Tell, new_id
from gateway.settings import Settings


def build(
    settings: Settings,
    policy: Policy,
    log: Log,
    tell: Tell,
    keys: Keys | None = None,
    resolve: Resolve | None = None,
    room: EngineRoom | None = None,
) -> tuple[Application, Gateway]:
    """The application and the gateway behind it; without `keys` whoever reaches it may ask. `resolve` looks names of
    deployments up, the system without it. `room`: see `Gateway`. Raises OSError, as `Gateway` does."""
    gateway = Gateway(settings, policy, log, tell, keys, resolve, room)
    pages = Pages(gateway)
    edge = Edge(log, new_id)
    answering = {"/v1/chat/completions": gateway.path.complete, "/v1/route": pages.route}
    endpoints = {
        path: Endpoint(gateway.path.admit, answer, max_body_bytes=settings.max_body_bytes, edge=edge)
        for path, answer in answering.items()
    }
    routes = [
        *(Route(path, PostOnly()) for path in endpoints),
        Route("/v1/models", pages.models),
        Route("/v1/models/{name:path}", pages.model),
        Route("/livez", pages.live),
        Route("/readyz", pages.ready),
    ]
    handlers = {404: no_route, 405: no_method, Exception: no_answer}
    app = Starlette(routes=routes, lifespan=gateway.lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Application(endpoints, AsgiEndpoint(app, edge), app), gateway
