"""The admin port of a gateway with several workers: it asks each of them, over a Unix socket that is its alone, and
answers for all.

Metrics keep every worker's samples, with a label `worker`: sums would fall when a worker is started again, which
Prometheus takes for a counter's reset of them all. Refuses to know what the samples mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from gateway.admin import Endpoints, operators_app
from gateway.errors import NoCandidate, body_of
from gateway.follow import Follower
from gateway.metrics import WORKER_RESTARTS, WORKER_UP, Described
from gateway.pages import json_response, shown_to
from gateway.running import Gateway
from gateway.workers import LONG_TIMEOUT, Workers


class Front:
    """What operators ask for, of all workers."""

    def __init__(self, workers: Workers, gateway: Gateway, followers: Sequence[Follower], *, to_all: bool) -> None:
        """`followers` are of this process, which knows the files for the engines' sake."""
        self._workers = workers
        self._followers = followers
        self._gateway = gateway
        self._to_all = to_all
        self._were_ready = False

    async def metrics(self, _: Request) -> Response:
        """For Prometheus."""
        answers = await self._workers.asked("/metrics")
        texts = {i: a.text for i, a in enumerate(answers) if a is not None and a.status_code == httpx.codes.OK}
        up = {worker.index: float(worker.index in texts) for worker in self._workers.all}
        restarts = {worker.index: float(worker.restarts) for worker in self._workers.all}
        own = told_of(WORKER_UP, up) + told_of(WORKER_RESTARTS, restarts)
        return Response(joined(texts) + own, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def ready(self, request: Request) -> Response:
        """Ready once all workers have been, and from then on as long as one is: a worker that is started again takes
        the others nothing away."""
        answers = await self._workers.asked("/readyz")
        up = [answer is not None and answer.status_code == httpx.codes.OK for answer in answers]
        self._were_ready = self._were_ready or all(up)
        ready = self._were_ready and any(up) and not self._gateway.stopping
        status = (
            "stopping" if self._gateway.stopping else "not ready" if not ready else "ready" if all(up) else "degraded"
        )
        told: dict[str, Any] = {"status": status}
        if self._to_all or shown_to(request, self._gateway.access):
            told["workers"] = {str(i): {"status": "silent"} if a is None else a.json() for i, a in enumerate(answers)}
        return json_response(200 if ready else 503, told)

    async def live(self, _: Request) -> Response:
        """The process answers."""
        return json_response(200, {"status": "live"})

    async def of_one(self, request: Request) -> Response:
        """What one worker sees of the fleet: that of the query's `worker`, else the first that answers."""
        answers = await self._workers.asked(request.url.path)
        named = request.query_params.get("worker", "")
        chosen = [answers[int(named)]] if named.isdecimal() and int(named) < len(answers) else answers
        return next((_passed(a) for a in chosen if a is not None), _silent())

    async def reload(self, _: Request) -> Response:
        """Read the files now, each worker for itself, and this process for the engines: 422 where they do not load."""
        for follower in self._followers:
            await follower.reload()
        answers = await self._workers.reload()
        wrong = next((a for a in answers if a is not None and a.status_code != httpx.codes.OK), None)
        told = wrong or next((a for a in answers if a is not None), None)
        return _silent() if told is None else _passed(told)

    async def cache(self, _: Request) -> Response:
        """How many answers are stored, in the memory of all workers and in what they share."""
        answers = await self._workers.asked("/cache", timeout=LONG_TIMEOUT)
        return _of_all(answers, stored_of)

    async def purge(self, request: Request) -> Response:
        """Forget stored answers, everywhere."""
        query = request.url.query
        answers = await self._workers.asked(f"/cache/purge?{query}", "POST", LONG_TIMEOUT)
        return _of_all(answers, lambda told: {"forgotten": sum(one["forgotten"] for one in told)})


def _of_all(answers: Sequence[httpx.Response | None], join: Any) -> Response:
    found = [answer for answer in answers if answer is not None]
    wrong = next((answer for answer in found if answer.status_code != httpx.codes.OK), None)
    if wrong is not None:
        return _passed(wrong)
    return json_response(200, join([answer.json() for answer in found])) if found else _silent()


def _passed(answer: httpx.Response) -> Response:
    return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))


def _silent() -> Response:
    return json_response(503, body_of(NoCandidate("no worker answers now: try again")))


def stored_of(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What each worker says of stored answers, as one: counts and memories added up, what they share once."""
    counts = {name: sum(one["counts"][name] for one in told) for name in told[0]["counts"]}
    stored: dict[str, Any] = {name: dict(of_it) for name, of_it in told[0]["stored"].items()}
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in told:
        for row in one["stored"]["memory"]["by"]:
            known = rows.setdefault((row["tenant"], row["model"], row["deployment"]), {**row, "entries": 0, "bytes": 0})
            known["entries"] += row["entries"]
            known["bytes"] += row["bytes"]
    memories = [one["stored"]["memory"] for one in told]
    stored["memory"] = {name: sum(memory[name] for memory in memories) for name in ("entries", "bytes")}
    stored["memory"]["by"] = [rows[key] for key in sorted(rows)]
    return {"counts": counts, "stored": stored}


def told_of(metric: Described, values: Mapping[int, float]) -> str:
    """A metric of the workers, as Prometheus reads it."""
    head = f"# HELP {metric.name} {metric.help}\n# TYPE {metric.name} {metric.kind}\n"
    return head + "".join(f'{metric.name}{{worker="{index}"}} {value}\n' for index, value in values.items())


def joined(texts: Mapping[int, str]) -> str:
    """Expositions of several workers as one: each metric described once, every sample with its worker."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for index, text in texts.items():
        name, own = "", f'worker="{index}"'
        for line in text.splitlines():
            if line.startswith("# "):
                word, name = line.split(" ", 3)[1:3]
                head = heads.setdefault(name, [])
                samples.setdefault(name, [])
                if not any(known.split(" ", 2)[1] == word for known in head):
                    head.append(line)
            elif line:
                samples[name].append(with_label(line, own))
    return "".join("\n".join([*heads[name], *samples[name]]) + "\n" for name in heads)


def with_label(sample: str, label: str) -> str:
    """A line `name{labels} value` or `name value` with one more label, the first."""
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f"{name}{{{label},{rest}" if not rest.startswith("}") else f"{name}{{{label}{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"


def front_app(workers: Workers, gateway: Gateway, followers: Sequence[Follower], *, guarded: bool) -> ASGIApp:
    """The application for the admin port; `guarded` where it is only for whoever has an operator's key."""
    front = Front(workers, gateway, followers, to_all=not guarded)
    endpoints: Endpoints = {
        "/metrics": front.metrics,
        "/state": front.of_one,
        "/replicas": front.of_one,
        "/reload": front.reload,
        "/cache": front.cache,
        "/cache/purge": front.purge,
        "/livez": front.live,
        "/readyz": front.ready,
    }
    return operators_app(endpoints, gateway.access, guarded=guarded)
