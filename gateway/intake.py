"""What a request says: its body, and the facts that rules look at.

Owns what is read beside the event loop, because it is large. Refuses to decide anything by it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from gateway.facts import Stated, facts_from
from gateway.fleet import Fleet
from gateway.masking import Masked
from gateway.serving import Serving
from gateway.tokens import count as count_tokens
from gateway.tokens import near, undecided
from gateway.types import Caller, ChatRequest, RequestFacts
from gateway.wire.chat import parse

# Bytes above which work on a body would hold up other requests: parsing is the cheapest, a scan costs more, and text
# that is not ASCII must be folded before it is scanned, which costs most by far.
PARSE_IN_THREAD_ABOVE = 256 * 1024
SCAN_IN_THREAD_ABOVE = 64 * 1024
SCAN_IN_THREAD_ABOVE_UNICODE = 4 * 1024
MASK_IN_THREAD_ABOVE = 4 * 1024


async def parsed(body: bytes) -> ChatRequest:
    """The request; a large one is read beside the event loop. Raises `BadRequest`."""
    return await asyncio.to_thread(parse, body) if len(body) > PARSE_IN_THREAD_ABOVE else parse(body)


async def facts_of(
    serving: Serving, fleet: Fleet, chat: ChatRequest, size: int, caller: Caller, headers: Mapping[str, str]
) -> tuple[RequestFacts, Masked | None]:
    """What rules may look at, and the request's masked form where the policy allows one; `size` is the body's, in
    bytes. Raises `BadRequest` for a header that means nothing here, `UnknownModel`."""
    policy = serving.policy
    stated = Stated.of(policy, chat, headers)
    large = size > SCAN_IN_THREAD_ABOVE or (
        size > SCAN_IN_THREAD_ABOVE_UNICODE and not all(map(str.isascii, chat.texts))
    )
    prompt = await asyncio.to_thread(count_tokens, chat) if size > PARSE_IN_THREAD_ABOVE else count_tokens(chat)
    scan = serving.scanner.scan
    kinds = await asyncio.to_thread(scan, chat.texts) if large else scan(chat.texts)
    masker = serving.masker if kinds else None
    masked = None
    if masker is not None:
        beside = size > MASK_IN_THREAD_ABOVE
        masked = await asyncio.to_thread(masker.masked, chat) if beside else masker.masked(chat)
    open_counts = undecided(prompt, chat.max_tokens, policy.deployments.values())
    if policy.thresholds:
        open_counts |= near(prompt, ((policy.deployments[name].tokenizer, n) for name, n in policy.thresholds))
    open_counts &= serving.counters.keys()
    if open_counts:
        counters = [(name, serving.counters[name].count) for name in sorted(open_counts)]
        exact = {n: await asyncio.to_thread(count, chat) if large else count(chat) for n, count in counters}
        prompt = replace(prompt, exact=exact)
    maskable = masked is not None
    likely = fleet.likely_output(caller.tenant, caller.key_id, chat.model)
    facts = facts_from(policy, chat, caller, headers, stated, kinds, prompt, maskable=maskable, likely_output=likely)
    return facts, masked
