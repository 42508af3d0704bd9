"""What a rule may look at, from a request's body and headers. Pure.

Owns the meaning of every request header. Refuses what means nothing here, naming the header and what it may be, and
repeats no value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from gateway.errors import BadRequest, Forbidden, UnknownModel
from gateway.policy import AUTO, DATA_CLASS_HEADER, Policy
from gateway.types import NUSD_PER_USD, UNSCANNABLE, Caller, ChatRequest, RequestFacts, TokenCount

CHALLENGE = (b"www-authenticate", b"Bearer")  # goes with every 401 (RFC 9110, 11.6.1)

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
_MAX_TAGS = 16


@dataclass(frozen=True, slots=True)
class Stated:
    """What the headers ask for, checked before anything is scanned or counted."""

    slo: str | None
    max_cost_nusd: int | None
    tags: frozenset[str]

    @classmethod
    def of(cls, policy: Policy, chat: ChatRequest, headers: Mapping[str, str]) -> Stated:
        """Raises `UnknownModel`, and `BadRequest` for a header that means nothing here. Header names are lower-case."""
        if not knows(policy, chat.model):
            raise UnknownModel(
                "the model is not known here: GET /v1/models lists those that are, `auto` among them", param="model"
            )
        if unknown := policy.unknown_data_class(headers):
            raise BadRequest(unknown, param=DATA_CLASS_HEADER)
        return cls(slo_in(headers, policy), cost_cap_in(headers), tags_in(headers))


def facts_from(
    policy: Policy,
    chat: ChatRequest,
    caller: Caller,
    headers: Mapping[str, str],
    stated: Stated,
    kinds: frozenset[str],
    prompt: TokenCount,
    *,
    maskable: bool = False,
    likely_output: int | None = None,
) -> RequestFacts:
    """All facts of a request, from what its texts were found to hold (`kinds`, `unscannable` among them), whether that
    can be masked, how long its prompt is, and how long this caller's answers were of late. Raises `Forbidden` where the
    key may not ask for the class."""
    if stated.slo is not None and caller.slo is not None and stated.slo not in caller.slo:
        raise Forbidden("this key may not ask for that latency class", param="x-hybridgate-slo")
    nothing: frozenset[str] = frozenset()
    masked = policy.labels_of(nothing, headers, caller.tags, unscannable=False) if maskable else None
    labels = policy.labels_of(kinds, headers, caller.tags, unscannable=bool(chat.parts) or UNSCANNABLE in kinds)
    if caller.labels:  # which no masking takes away
        labels |= caller.labels
        masked = None if masked is None else masked | caller.labels
    return RequestFacts(
        model=chat.model,
        tenant=caller.tenant,
        key_tags=caller.tags,
        tags=stated.tags,
        labels=labels,
        masked_labels=masked,
        prompt=prompt,
        max_tokens=chat.max_tokens,
        stream=chat.stream,
        tools=chat.tools,
        images=chat.images,
        schema=chat.schema,
        n=chat.n,
        slo=stated.slo,
        max_cost_nusd=stated.max_cost_nusd,
        deployments=caller.deployments,
        headers=policy.headers_of(headers),
        key_id=caller.key_id,
        likely_output=likely_output,
    )


def knows(policy: Policy, model: str) -> bool:
    """Whether a request may ask for this model: `auto`, an alias, a deployment, or a rule."""
    target = policy.models.get(model, model)
    return (
        target in (AUTO, policy.default.name) or target in policy.deployments or policy.rule_named(target) is not None
    )


def request_id_of(headers: Mapping[str, str], new_id: Callable[[], str]) -> str:
    """The caller's id where it is a plain token, else a new one: it goes into logs and headers."""
    given = headers.get("x-request-id")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else new_id()


def slo_in(headers: Mapping[str, str], policy: Policy) -> str | None:
    """The latency class asked for. Raises `BadRequest` where the policy has none of that name."""
    name = headers.get("x-hybridgate-slo")
    if name is not None and name not in policy.slo:
        known = ", ".join(policy.slo) or "none"
        raise BadRequest(
            f"header x-hybridgate-slo names no class of this policy (known: {known})", param="x-hybridgate-slo"
        )
    return name


def cost_cap_in(headers: Mapping[str, str]) -> int | None:
    """The caller's own cap in nano-dollars. Raises `BadRequest` unless it is a positive number."""
    text = headers.get("x-hybridgate-max-cost-usd")
    if text is None:
        return None
    try:
        dollars = Decimal(text)
    except InvalidOperation:
        dollars = Decimal(-1)
    if not dollars.is_finite() or not 0 < dollars < 1_000_000:
        param = "x-hybridgate-max-cost-usd"
        raise BadRequest(f"header {param} must be a positive number of dollars, such as 0.002", param=param)
    return int(dollars * NUSD_PER_USD)


def tags_in(headers: Mapping[str, str]) -> frozenset[str]:
    """The request's tags. Raises `BadRequest` for more than 16 or one that is not a plain word."""
    text = headers.get("x-hybridgate-tags")
    if text is None:
        return frozenset()
    tags = frozenset(tag.strip() for tag in text.split(",") if tag.strip())
    if len(tags) > _MAX_TAGS or not all(_TAG.fullmatch(tag) for tag in tags):
        param = "x-hybridgate-tags"
        raise BadRequest(f"header {param} must be at most 16 words separated by commas", param=param)
    return tags
