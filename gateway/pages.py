"""The small answers: what may be asked for, whether it could be answered, and the decision without the answer.

Owns GET endpoints and `/v1/route`. Refuses to change anything.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gateway.backends.base import Chunk
from gateway.chat import Reply
from gateway.edge import headers_of
from gateway.errors import GatewayError, MethodNotAllowed, NotFound, body_of, status_of
from gateway.explain import explanation
from gateway.facts import knows, request_id_of
from gateway.policy import AUTO
from gateway.running import Gateway, PolicyState, new_id

MOST_ERRORS_SHOWN = 20


class Pages:
    """The endpoints that only look at a running gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def models(self, _: Request) -> Response:
        """What this caller may ask for: `auto`, the aliases, the rules, and the deployments that can be called."""
        policy = self._gateway.path.serving.policy
        names = {
            AUTO: "policy",
            **dict.fromkeys(policy.models, "alias"),
            **{rule.name: "rule" for rule in policy.rules},
        }
        names |= {d.name: d.zone for d in policy.deployments.values() if d.unavailable is None}
        data = [{"id": name, "object": "model", "created": 0, "owned_by": owner} for name, owner in names.items()]
        return json_response(200, {"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """One model of the list."""
        name = request.path_params["name"]
        if not knows(self._gateway.path.serving.policy, name):
            return error_response(NotFound("no such model: GET /v1/models lists those that are known"), request)
        return json_response(200, {"id": name, "object": "model", "created": 0, "owned_by": "hybridgate"})

    async def live(self, _: Request) -> Response:
        """The process answers."""
        return json_response(200, {"status": "live"})

    async def ready(self, _: Request) -> Response:
        """Whether a request could be answered now, and by what; each deployment that is not usable with its reason. A
        policy file that does not load is told and changes nothing of that: the policy before it is in use."""
        policy = self._gateway.path.serving.policy
        snapshot = self._gateway.fleet.snapshot(time.monotonic(), 0.0)
        reasons = {d.name: d.unavailable or snapshot.deployments[d.name].down for d in policy.deployments.values()}
        usable = [name for name, reason in reasons.items() if reason is None]
        configured = [name for name, d in policy.deployments.items() if d.unavailable is None]
        status = "not ready" if not usable else "ready" if len(usable) == len(configured) else "degraded"
        deployments = {
            name: {"zone": policy.deployments[name].zone, "usable": reason is None, "reason": reason or ""}
            for name, reason in reasons.items()
        }
        told = {"status": status, "policy": told_of(self._gateway.policy_state), "deployments": deployments}
        return json_response(200 if usable else 503, told)

    async def route(self, headers: Mapping[str, str], body: bytes) -> Reply:
        """The decision for a chat request, with its reasons; nothing is called."""
        known_id = (b"x-request-id", request_id_of(headers, new_id).encode())
        try:
            serving, facts, snapshot, decision = await self._gateway.path.route(headers, body)
            status, document = 200, explanation(serving.policy, facts, snapshot, decision)
        except GatewayError as error:
            status, document = status_of(error), body_of(error)
        chunk = Chunk(orjson.dumps(document), last=True)
        return Reply.whole(status, [known_id], chunk)


def told_of(state: PolicyState) -> dict[str, Any]:
    """The policy in use, and what is wrong with its files as they stand now."""
    return {
        "path": state.path,
        "hash": state.hash,
        "loaded_at": state.loaded_at.isoformat(timespec="milliseconds"),
        "error_count": len(state.problems),
        "errors": [str(problem) for problem in state.problems[:MOST_ERRORS_SHOWN]],
    }


async def no_route(request: Request, _: Exception) -> Response:
    """404 in the shape of every other error."""
    return error_response(NotFound("no such path: the API lives under /v1, such as POST /v1/chat/completions"), request)


async def no_method(request: Request, exc: Exception) -> Response:
    """405 in the shape of every other error."""
    allowed = (exc.headers or {}).get("Allow", "") if isinstance(exc, HTTPException) else ""
    response = error_response(MethodNotAllowed(f"this path does not take that method; it takes {allowed}"), request)
    response.headers["allow"] = allowed
    return response


def error_response(error: GatewayError, request: Request) -> Response:
    """An error with the request's id."""
    response = json_response(status_of(error), body_of(error))
    response.headers["x-request-id"] = request_id_of(headers_of(request.scope), new_id)
    return response


def json_response(status: int, document: object) -> Response:
    """A JSON document."""
    return Response(orjson.dumps(document), status, media_type="application/json")
