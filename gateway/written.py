"""Requests and states of the fleet as people write them, in a test case or a file for `policy explain`: YAML in, what
`decide` takes out.

Owns their shapes and what each key means. Refuses to decide, and to read files or clocks: a time that is not written is
`TIME`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from math import inf
from typing import Annotated, Any, ClassVar, TypeVar

import orjson
from pydantic import AfterValidator, BeforeValidator, Field

from gateway.errors import BadRequest
from gateway.facts import Stated, facts_from
from gateway.labels import Scanner
from gateway.masking import Masker
from gateway.policy import DATA_CLASS_HEADER, Policy
from gateway.policyfile.entries import check
from gateway.policyfile.shapes import Shape
from gateway.policyfile.tree import Problem
from gateway.policyfile.tree import parse as parse_yaml
from gateway.policyfile.values import (
    HeaderName,
    HeaderValue,
    Nusd,
    Seconds,
    Sentence,
    Text,
    Tokens,
    Word,
    Words,
    between,
)
from gateway.snapshot import FORECAST_SIZES_MS, Backlog, DeploymentStatus, Snapshot
from gateway.tokens import count as count_tokens
from gateway.types import Caller, RequestFacts, TokenCount, usd
from gateway.wire.chat import parse

S = TypeVar("S", bound=Shape)

# Of an engine whose queue is given and whose speed is not: about a 7B model on a large GPU.
PREFILL_TOKENS_PER_S = 10_000
DECODE_TOKENS_PER_S = 100

TIME = "2026-01-07T12:00:00+00:00"  # a Wednesday

_TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}
_PIXEL = "data:image/png;base64,iVBORw0KGgo="


def _moment(value: str) -> str:
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ValueError('must be a time with its offset from UTC, such as "2026-03-02T09:30+01:00"')
    return value


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError("must be a share, a number from 0 to 1")
    return float(value)


def _draw(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError("must be a number from 0 to below 1")
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1_000_000:
        raise ValueError("must be a whole number")
    return value


def _positive(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 100_000_000:
        raise ValueError("must be a whole number above 0")
    return value


Positive = Annotated[int, BeforeValidator(_positive), Field(ge=1)]
Moment = Annotated[str, AfterValidator(_moment)]
Share = Annotated[float, BeforeValidator(_share), between(0, 1)]
Draw = Annotated[float, BeforeValidator(_draw), between(0, 1)]
Whole = Annotated[int, BeforeValidator(_whole), Field(ge=0)]


class KeyShape(Shape):
    """The caller's key."""

    meanings: ClassVar[Mapping[str, str]] = {
        "id": "The id of the key.",
        "tenant": "Whose it is.",
        "tags": "Its tags.",
        "deployments": "The deployments that it may use; all without it.",
    }

    id: Word | None = None
    tenant: Word | None = None
    tags: Words | None = None
    deployments: Words | None = None


class RequestShape(Shape):
    """A chat request: `text` alone, or `messages`, or a whole `body`; the rest is laid over it."""

    meanings: ClassVar[Mapping[str, str]] = {
        "text": "The prompt of one user message.",
        "messages": "The messages.",
        "body": "A whole body.",
        "model": "The model asked for; auto without it.",
        "max_tokens": "The most tokens that the answer may have.",
        "prompt_tokens": "How long the prompt counts, whatever its text.",
        "stream": "Whether the answer is streamed.",
        "tools": "Adds a tool.",
        "images": "Adds a picture.",
        "schema": "Asks for structured output.",
        "slo": "The latency class asked for.",
        "tags": "The tags of the request.",
        "data_class": "The header x-data-class.",
        "max_cost": "The cost cap of the caller, such as 0.01 USD.",
        "headers": "Any other headers.",
        "key": "The key of the caller.",
    }

    text: Sentence | None = None
    messages: Annotated[list[Any], Field(min_length=1)] | None = None
    body: dict[str, Any] | None = None
    model: Text | None = None
    max_tokens: Tokens | None = None
    prompt_tokens: Tokens | None = None
    stream: bool | None = None
    tools: bool | None = None
    images: bool | None = None
    schema_: Annotated[bool | None, Field(alias="schema")] = None
    slo: Word | None = None
    tags: Words | None = None
    data_class: Words | None = None
    max_cost: Nusd | None = None
    headers: dict[HeaderName, HeaderValue] | None = None
    key: KeyShape | None = None


class QueueShape(Shape):
    """What an engine says of its work: prompt tokens that wait, and how fast it takes them in."""

    meanings: ClassVar[Mapping[str, str]] = {
        "tokens": "Prompt tokens that wait.",
        "prefill_tokens_per_s": "Prompt tokens that it takes in a second.",
        "decode_tokens_per_s": "Tokens that it makes in a second.",
    }

    tokens: Whole | None = None
    prefill_tokens_per_s: Positive | None = None
    decode_tokens_per_s: Positive | None = None


class StatusShape(Shape):
    """What is known of one deployment."""

    meanings: ClassVar[Mapping[str, str]] = {
        "down": "Why it does not answer.",
        "in_flight": "Requests that it answers now.",
        "busy": "The share of its capacity in use, 0 to 1.",
        "first_token_p95": "Its first tokens, as measured.",
        "per_token_p95": "Its time for each further token, as measured.",
        "queue": "What its engine says of its work.",
        "context_window": "The window of its engine.",
    }

    down: Sentence | None = None
    in_flight: Whole | None = None
    busy: Share | None = None
    first_token_p95: Seconds | None = None
    per_token_p95: Seconds | None = None
    queue: QueueShape | None = None
    context_window: Tokens | None = None


class StateShape(Shape):
    """The fleet at one moment. What is not stated is up, configured and not measured."""

    meanings: ClassVar[Mapping[str, str]] = {
        "time": "The moment, such as 2026-03-02T09:30+01:00; a Wednesday at noon without it.",
        "draw": "Chance, from 0 to below 1; 0 without it.",
        "down": "Deployments that do not answer.",
        "unconfigured": "Deployments whose key or address is not set.",
        "deployments": "What is known of each deployment.",
    }

    time: Moment | None = None
    draw: Draw | None = None
    down: Words | None = None
    unconfigured: Words | None = None
    deployments: dict[Word, StatusShape] | None = None


def read(path: str, text: str, shape: type[S]) -> tuple[S | None, list[Problem]]:
    """A file that holds one shape, or all that is wrong with it."""
    root, problems = parse_yaml(path, text)
    if root is None:
        return None, problems
    found = check(shape, root, "", problems.append)
    return (None, in_order(problems)) if problems else (found.shape, [])


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """As they stand in the file, each once."""
    return sorted(set(problems), key=lambda p: (p.line, p.column, p.message))


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it would arrive, and who sends it. `prompt_tokens` replaces what counting would find; None where
    nothing does."""

    body: bytes
    headers: Mapping[str, str]
    caller: Caller
    prompt_tokens: int | None = None


def asked(shape: RequestShape) -> Asked:
    """The request that a shape describes. Raises `BadRequest` where its text cannot be sent."""
    body: dict[str, Any] = dict(shape.body or {})
    if shape.messages is not None:
        body["messages"] = shape.messages
    elif "messages" not in body or shape.text is not None:
        body["messages"] = [{"role": "user", "content": shape.text or "hi"}]
    if shape.images:
        picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": _PIXEL}}]}
        body["messages"] = [*body["messages"], picture]
    if shape.tools:
        body["tools"] = [_TOOL]
    if shape.schema_:
        body["response_format"] = _SCHEMA
    plain = {"model": shape.model, "max_tokens": shape.max_tokens, "stream": shape.stream}
    body |= {name: value for name, value in plain.items() if value is not None}
    headers = {
        "x-hybridgate-slo": shape.slo,
        "x-hybridgate-tags": ",".join(shape.tags) if shape.tags else None,
        "x-hybridgate-max-cost-usd": usd(shape.max_cost) if shape.max_cost is not None else None,
        DATA_CLASS_HEADER: ",".join(shape.data_class) if shape.data_class else None,
    }
    sent = {name: value for name, value in headers.items() if value is not None}
    sent |= {name.lower(): value for name, value in (shape.headers or {}).items()}
    try:
        encoded = orjson.dumps(body)
    except orjson.JSONEncodeError:
        raise BadRequest("the request is not text that JSON can carry") from None
    return Asked(encoded, sent, _caller(shape.key or KeyShape()), shape.prompt_tokens)


def _caller(key: KeyShape) -> Caller:
    unknown = Caller()
    return Caller(
        tenant=key.tenant or unknown.tenant,
        key_id=key.id or unknown.key_id,
        tags=frozenset(key.tags or ()),
        deployments=frozenset(key.deployments) if key.deployments else None,
    )


def facts_of(policy: Policy, scanner: Scanner, request: Asked) -> RequestFacts:
    """What rules may look at, as the server would find it without a served model's own tokenizer. `scanner` has the
    policy's kinds. Raises `BadRequest` and `UnknownModel`."""
    chat = parse(request.body)
    stated = Stated.of(policy, chat, request.headers)
    kinds = scanner.scan(chat.texts)
    maskable = policy.masks and bool(kinds) and Masker(scanner).masked(chat) is not None
    tokens = request.prompt_tokens
    prompt = TokenCount(tokens, tokens) if tokens is not None else count_tokens(chat)
    return facts_from(policy, chat, request.caller, request.headers, stated, kinds, prompt, maskable=maskable)


def laid_over(state: StateShape, above: StateShape) -> StateShape:
    """One state where what `above` states counts; of each deployment as well."""
    statuses = dict(state.deployments or {})
    for name, status in (above.deployments or {}).items():
        statuses[name] = _over(statuses[name], status) if name in statuses else status
    return _over(state, above).model_copy(update={"deployments": statuses or None})


def _over(below: S, above: S) -> S:
    return below.model_copy(update={name: getattr(above, name) for name in above.model_fields_set})


def configured(policy: Policy) -> Policy:
    """The policy as it is where every key and address is set."""
    for deployment in policy.deployments.values():
        if deployment.unavailable is not None:
            policy = policy.with_deployment(replace(deployment, unavailable=None))
    return policy


def in_state(policy: Policy, state: StateShape) -> Policy:
    """The policy with what the state says of its deployments."""
    unconfigured = frozenset(state.unconfigured or ())
    for deployment in policy.deployments.values():
        status = (state.deployments or {}).get(deployment.name, StatusShape())
        changed = deployment
        if deployment.name in unconfigured:
            changed = replace(changed, unavailable="it is not configured")
        if status.context_window is not None:
            changed = replace(changed, window=status.context_window)
        if changed != deployment:
            policy = policy.with_deployment(changed)
    return policy


def snapshot_of(policy: Policy, state: StateShape) -> Snapshot:
    """The fleet that a state describes."""
    down = dict.fromkeys(state.down or (), "it is down")
    statuses = {}
    for name in policy.deployments:
        status = (state.deployments or {}).get(name, StatusShape())
        first_token, per_token = status.first_token_p95, status.per_token_p95
        statuses[name] = DeploymentStatus(
            down=status.down or down.get(name),
            in_flight=status.in_flight or 0,
            first_token_p95_ms=None if first_token is None else first_token * 1000,
            busy=status.busy,
            per_token_p95_ms=None if per_token is None else per_token * 1000,
            backlog=None if status.queue is None else _backlog(status.queue),
        )
    wall = datetime.fromisoformat(state.time or TIME).timestamp()
    return Snapshot(now=0.0, draw=state.draw or 0.0, deployments=statuses, wall=wall)


def _backlog(queue: QueueShape) -> Backlog:
    decode = queue.decode_tokens_per_s or DECODE_TOKENS_PER_S
    return Backlog(
        at=0.0,
        good_until=inf,
        tokens=queue.tokens or 0,
        prefill_tokens_per_s=queue.prefill_tokens_per_s or PREFILL_TOKENS_PER_S,
        step_s=1 / decode,
        margins=(1.0,) * (len(FORECAST_SIZES_MS) + 1),  # as if its forecasts had come true
        token_s=1 / decode,
    )
