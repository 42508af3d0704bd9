"""The key of a request: equal for requests that ask for the same in other words, different for all others.

Owns which fields of a body cannot change the answer, what the defaults are, and the digest. Pure. Refuses to guess: a
field that is not known counts, and so does one whose default depends on the deployment (`temperature`, `top_p`,
`max_tokens`: an engine may take its model's own).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import orjson

from gateway.types import ChatRequest

KEY_BYTES = 32

# What does not change the answer, and why. Whatever is not here counts.
LEFT_OUT: Mapping[str, str] = {
    "model": "the name asked for is in the key by itself, with what stands for a missing one",
    "stream": "how the answer is sent",
    "stream_options": "how the answer is sent",
    "user": "who asked, for the provider's statistics",
    "safety_identifier": "who asked, for the provider's statistics",
    "metadata": "the caller's own notes, which no model sees",
    "prompt_cache_key": "where the provider looks for a prefix",
    "prompt_cache_retention": "how long the provider keeps a prefix",
    "service_tier": "how fast and how dear, not what",
    "store": "false, or the request is not cached at all",
}

# Fields of the API where null says the same as leaving them out.
_NULLABLE = frozenset(
    {"max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "presence_penalty"}
    | {"frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"}
    | {"functions", "function_call", "response_format", "modalities", "audio", "prediction", "reasoning_effort"}
)

# Defaults that the API itself fixes, whoever answers. (platform.openai.com/docs/api-reference/chat/create)
_DEFAULTS: Mapping[str, object] = {
    "n": 1,
    "stop": [],
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "tools": [],
    "functions": [],
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
}

# Schemas: a structured answer has its properties in the order in which they stand here, and models reason in it.
_ORDERED = frozenset({"response_format", "tools", "functions", "structured_outputs", "guided_json"})

_VERSION = 2  # of the key; another one makes what is stored unreachable
_PERSON = b"hybridgate-cache"
_EXPONENT = orjson.dumps(1e16).strip(b"06")[1:]  # how whole floats from 1e16 to 1e19 are written: e1, or e+1
# Whole numbers beyond these have one spelling here: orjson reads them as floats, whatever they look like.
_LEAST, _MOST = -(2**63), 2**64
_SEARCHES = frozenset({"web_search_options"})


def uncacheable(chat: ChatRequest) -> str | None:
    """Why no stored answer can stand for a new one, in words without content; None where one can."""
    body = chat.body
    if chat.parts:
        return "it holds what is not text: what an address or an id stands for may change"
    if body.get("store"):
        return "the provider is asked to keep the answer"
    if any(body.get(name) for name in _SEARCHES):
        return "the answer depends on a search"
    if body.get("audio") or "audio" in (body.get("modalities") or ()):
        return "the answer is no text"
    if any(tool["type"] not in ("function", "custom") for tool in body.get("tools") or ()):
        return "the provider runs a tool of its own"
    return None


def is_deterministic(chat: ChatRequest) -> bool:
    """Whether the request asks for the same answer each time: no temperature, or a seed."""
    return chat.body.get("temperature") == 0 or chat.body.get("seed") is not None


def canonical(chat: ChatRequest) -> bytes:
    """The fields that can change the answer, as JSON: defaults left out, keys sorted where their order says nothing,
    one spelling for a number."""
    body = chat.body
    kept: dict[str, Any] = {}
    for name, value in body.items():
        if name in LEFT_OUT or (value is None and name in _NULLABLE):
            continue
        if name in _DEFAULTS and value == _DEFAULTS[name]:
            continue
        kept[name] = value
    if isinstance(stop := kept.get("stop"), str):
        kept["stop"] = [stop]
    for choice, offered in (("tool_choice", "tools"), ("function_call", "functions")):
        if kept.get(choice) == ("auto" if offered in kept else "none"):
            del kept[choice]
    for name in _ORDERED & kept.keys():
        kept[name] = orjson.dumps(_whole_numbers(kept[name])).decode()
    text = orjson.dumps(kept, option=orjson.OPT_SORT_KEYS)
    if b".0" in text or _EXPONENT in text:  # only then some whole number may be written as another one
        text = orjson.dumps(_whole_numbers(kept), option=orjson.OPT_SORT_KEYS)
    return text


def _whole_numbers(value: Any) -> Any:
    """The value with integers for floats that are whole, and nothing else changed."""
    if isinstance(value, float) and value.is_integer() and _LEAST <= value < _MOST:
        return int(value)
    if isinstance(value, dict):
        return {name: _whole_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(inner) for inner in value]
    return value


def key_of(chat: ChatRequest, tenant: str | None, labels: Iterable[str], secret: bytes = b"") -> bytes:
    """KEY_BYTES bytes. `tenant` is None for an answer that all tenants may share. With a `secret` (at most 64 bytes)
    nobody without it can find out whether some text was asked."""
    digest = blake2b(digest_size=KEY_BYTES, key=secret, person=_PERSON)
    # No line break is in either line, so that no two requests are written alike.
    digest.update(orjson.dumps([_VERSION, tenant, sorted(labels), chat.model], option=orjson.OPT_APPEND_NEWLINE))
    digest.update(canonical(chat))
    return digest.digest()
