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
from starlette.types import Receive, Scope, Send

from gateway.access import Access
from gateway.backends.base import Chunk
from gateway.edge import headers_of
from gateway.errors import GatewayError, MethodNotAllowed, NotFound, Unauthenticated, body_of, status_of
from gateway.explain import explanation
from gateway.facts import CHALLENGE, knows, request_id_of
from gateway.ledger.shared import SharedLedger
from gateway.policy import AUTO, Policy
from gateway.reply import Reply
from gateway.running import Gateway, PolicyState, new_id
from gateway.store import StoreState
from gateway.types import Caller, Deployment

MOST_ERRORS_SHOWN = 20


def shown_to(request: Request, access: Access | None) -> bool:
    """Whether the request may see details: it has an operator's key, or there are no keys."""
    if access is None:
        return True
    try:
        access.authenticate_operator(headers_of(request.scope))
    except Unauthenticated:
        return False
    return True


class Pages:
    """The endpoints that only look at a running gateway."""

    def __init__(self, gateway: Gateway, *, to_all: bool = False) -> None:
        """`to_all`: whoever asks is told the state of deployments and files. Otherwise, where there are keys, an
        operator's key is needed for more than the status."""
        self._gateway = gateway
        self._to_all = to_all

    async def models(self, request: Request) -> Response:
        """What this caller may ask for: `auto`, the aliases, the rules, and the deployments that can be called."""
        try:
            caller = self._gateway.path.authenticate(headers_of(request.scope))
        except Unauthenticated as error:
            return error_response(error, request)
        names = models_for(self._gateway.path.serving.policy, caller)
        data = [{"id": name, "object": "model", "created": 0, "owned_by": owner} for name, owner in names.items()]
        return json_response(200, {"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """One model of the list, or that the policy knows."""
        name = request.path_params["name"]
        policy = self._gateway.path.serving.policy
        try:
            caller = self._gateway.path.authenticate(headers_of(request.scope))
        except Unauthenticated as error:
            return error_response(error, request)
        if not knows(policy, name) or not may_ask(policy, caller, name):
            return error_response(NotFound("no such model: GET /v1/models lists those that are known"), request)
        return json_response(200, {"id": name, "object": "model", "created": 0, "owned_by": "hybridgate"})

    async def live(self, _: Request) -> Response:
        """The process answers."""
        return json_response(200, {"status": "live"})

    async def ready(self, request: Request) -> Response:
        """Whether a request could be answered now, and by what; each deployment that is not usable with its reason. A
        policy file that does not load is told and changes nothing of that: the policy before it is in use. A gateway
        that is about to stop says so first."""
        policy = self._gateway.path.serving.policy
        now = time.monotonic()
        snapshot = self._gateway.fleet.snapshot(now, 0.0)
        reasons = {
            d.name: d.unavailable or snapshot.deployments[d.name].down or self._silence(d)
            for d in policy.deployments.values()
        }
        usable = [name for name, reason in reasons.items() if reason is None]
        configured = [name for name, d in policy.deployments.items() if d.unavailable is None]
        status = "not ready" if not usable else "ready" if len(usable) == len(configured) else "degraded"
        if self._gateway.stopping:
            status = "stopping"
        deployments: dict[str, dict[str, Any]] = {
            name: {"zone": policy.deployments[name].zone, "usable": reason is None, "reason": reason or ""}
            for name, reason in reasons.items()
        }
        for name, told_of_it in deployments.items():
            if members := self._gateway.fleet.members(name, now):
                told_of_it["replicas"] = {"up": sum(member.up for member in members), "known": len(members)}
        told: dict[str, Any] = {"status": status}
        if self._to_all or shown_to(request, self._gateway.access):
            told |= {"policy": told_of(self._gateway.policy_state), "deployments": deployments}
            if self._gateway.access is not None:
                told["keys"] = told_of_keys(self._gateway.access)
            if self._gateway.store is not None:
                told["redis"] = told_of_redis(self._gateway.store.state, self._gateway.shared)
        return json_response(200 if usable and not self._gateway.stopping else 503, told)

    def _silence(self, deployment: Deployment) -> str | None:
        """Why an engine of ours elsewhere is not counted on: it has yet to say that it is there, or has stopped to."""
        if not deployment.is_ours or deployment.served_locally or self._gateway.fleet.answers(deployment.name):
            return None
        return "its engine does not answer"

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


def told_of_keys(access: Access) -> dict[str, Any]:
    """The keys in use, and what is wrong with their file as it stands now."""
    state = access.state
    return {
        "path": access.path,
        "loaded_at": state.loaded_at.isoformat(timespec="milliseconds"),
        "keys": dict(access.standings()),
        "error_count": len(state.problems),
        "errors": [str(problem) for problem in state.problems[:MOST_ERRORS_SHOWN]],
    }


def told_of_redis(state: StoreState, ledger: SharedLedger | None) -> dict[str, Any]:
    """Whether what replicas share can be asked, how many they were when it last said, and where it holds counters that
    no gateway wrote."""
    told: dict[str, Any] = {"up": state.up, "reason": state.reason, "replicas": state.replicas}
    if ledger is not None and ledger.damaged:
        told["damaged"] = [{"key": one.key, "kind": one.kind} for one in ledger.damaged.values()]
    return told


def models_for(policy: Policy, caller: Caller) -> dict[str, str]:
    """The names that a caller may ask for, each with what it stands for: `policy`, `alias`, `rule`, or a deployment's
    zone."""
    names = {AUTO: "policy", **dict.fromkeys(policy.models, "alias"), **{rule.name: "rule" for rule in policy.rules}}
    names |= {d.name: d.zone for d in policy.deployments.values() if d.unavailable is None}
    return {name: owner for name, owner in names.items() if may_ask(policy, caller, name)}


def may_ask(policy: Policy, caller: Caller, model: str) -> bool:
    """Whether the key may use what a known name stands for, or some of it."""
    target = policy.models.get(model, model)
    if target in policy.deployments:
        return caller.may_use(target)
    rule = policy.rule_named(target)
    return rule is None or any(caller.may_use(name) for name in rule.candidates)


async def no_route(request: Request, _: Exception) -> Response:
    """404 in the shape of every other error."""
    return error_response(NotFound("no such path: the API lives under /v1, such as POST /v1/chat/completions"), request)


class PostOnly:
    """The other methods of a path that takes POST."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise HTTPException(405, headers={"Allow": "POST"})


async def no_answer(request: Request, _: Exception) -> Response:
    """500 in the shape of every other error; the edge logs the defect."""
    return error_response(GatewayError("internal error"), request)


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
    if isinstance(error, Unauthenticated):
        response.raw_headers.append(CHALLENGE)
    return response


def json_response(status: int, document: object) -> Response:
    """A JSON document."""
    return Response(orjson.dumps(document), status, media_type="application/json")
