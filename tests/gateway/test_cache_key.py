"""The key: equal for what asks for the same, different for all else. And what `Cache-Control` asks for."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.cache import is_deterministic, key_of, uncacheable, wanted_in
from gateway.cache.key import canonical
from gateway.cache.wanted import Wanted
from gateway.types import ChatRequest
from gateway.wire.chat import parse

USER = {"role": "user", "content": "hi"}


def chat(text: str | None = None, /, **body: Any) -> ChatRequest:
    return parse(text.encode() if text is not None else orjson.dumps({"messages": [USER], **body}))


def key(text: str | None = None, /, **body: Any) -> bytes:
    return key_of(chat(text, **body), "acme", ())


SAME: list[dict[str, Any]] = [
    {},
    {"model": "auto"},
    {"model": None},
    {"stream": True},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"user": "u-1"},
    {"safety_identifier": "u-1"},
    {"metadata": {"run": "7"}},
    {"service_tier": "flex"},
    {"prompt_cache_key": "k"},
    {"store": False},
    {"n": 1},
    {"n": None},
    {"logprobs": False},
    {"temperature": None},
    {"tools": []},
    {"tool_choice": "none"},
    {"stop": []},
    {"response_format": {"type": "text"}},
    {"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}},
]


@pytest.mark.parametrize("body", SAME, ids=str)
def test_what_does_not_change_the_answer_does_not_change_the_key(body: dict[str, Any]) -> None:
    assert key(**body) == key()


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"minimum": 1}}}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"messages":[{"role":"user","content":"hi"}]}', '{"messages":[{"content":"hi","role":"user"}]}'),
        ('{"temperature":0,"messages":[{"role":"user","content":"hi"}]}',) * 2,
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"temperature": 0}, {"temperature": -0.0}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "auto"}),
        ({"x": 10**16}, {"x": 1e16}),
        ({"x": [10**17, 10**19, -(10**18)]}, {"x": [1e17, 1e19, -1e18]}),
        ({"x": {"y": [2, "2.0"]}}, {"x": {"y": [2.0, "2.0"]}}),
    ],
)
def test_two_spellings_of_one_request_have_one_key(one: Any, other: Any) -> None:
    keys = [key(said) if isinstance(said, str) else key(**said) for said in (one, other)]
    assert keys[0] == keys[1]


DIFFERENT: list[dict[str, Any]] = [
    {},
    {"model": "gpt-4o"},
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 0.7},
    {"top_p": 1},
    {"seed": 1},
    {"seed": 2},
    {"n": 2},
    {"max_tokens": 5},
    {"max_completion_tokens": 5},
    {"stop": ["x"]},
    {"stop": ["x", "y"]},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 2},
    {"logit_bias": {"5": 1}},
    {"presence_penalty": 1},
    {"frequency_penalty": 1},
    {"tools": [TOOL]},
    {"tools": [TOOL], "tool_choice": "none"},
    {"tools": [TOOL], "tool_choice": "required"},
    {"tools": [TOOL], "parallel_tool_calls": False},
    {"response_format": {"type": "json_object"}},
    {"reasoning_effort": "low"},
    {"unknown": None},
    {"unknown": True},
    {"unknown": 1},
    {"unknown": "1"},
    {"unknown": [1]},
    {"unknown": {"1": 1}},
    {"unknown": -1e19},
    {"unknown": 1e300},
    {"Stream": True},
    {"messages": [USER, {"role": "assistant", "content": "hi"}, USER]},
    {"messages": [{**USER, "name": "jo"}]},
    {"messages": [{**USER, "content": "hi "}]},
    {"messages": [{**USER, "content": [{"type": "text", "text": "hi"}]}]},
    {"messages": [{"role": "system", "content": "hi"}]},
]


def test_whatever_may_change_the_answer_changes_the_key() -> None:
    keys = {key(**body): body for body in DIFFERENT}
    assert len(keys) == len(DIFFERENT)


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.0, 1.0, 0.5, 1e17, "", "1", "1.0", "a.0"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=5,
)
_bodies = st.fixed_dictionaries(
    {"messages": st.lists(st.sampled_from(["hi", "ho", 'h"i', "h\ni"]), min_size=1, max_size=2)},
    optional={"temperature": st.sampled_from([0, 0.5, 1]), "seed": st.integers(0, 1), "x": _values, "y": _values},
)
_askers = st.tuples(
    st.sampled_from([None, "", "a", "b", "a,b", '["a"]']), st.frozensets(st.sampled_from(["a", "b", "a,b"]), max_size=2)
)


def _said(body: dict[str, Any]) -> ChatRequest:
    return chat(**{**body, "messages": [{"role": "user", "content": text} for text in body["messages"]]})


def _equal(one: Any, other: Any) -> bool:
    """JSON's equality: a number is no boolean, and 1.0 is 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return (type(one) in (int, float) and type(other) in (int, float) and one == other) or (
        type(one) is type(other) and one == other
    )


@settings(deadline=None, max_examples=300)
@given(_bodies, _bodies, _askers, _askers)
def test_two_keys_are_equal_exactly_where_request_tenant_and_labels_are(
    one: dict[str, Any], other: dict[str, Any], asker: Any, another: Any
) -> None:
    keys = key_of(_said(one), *asker), key_of(_said(other), *another)
    assert (keys[0] == keys[1]) == (_equal(one, other) and asker == another)


_SCHEMAS = ("response_format", "tools", "functions")


def _respelled(value: Any, chance: random.Random, *, ordered: bool = False) -> Any:
    if isinstance(value, dict):
        items = list(value.items())
        if not ordered:
            chance.shuffle(items)
        return {name: _respelled(inner, chance, ordered=ordered or name in _SCHEMAS) for name, inner in items}
    if isinstance(value, list):
        return [_respelled(inner, chance, ordered=ordered) for inner in value]
    if type(value) is int and chance.random() < 0.5:
        return float(value)
    return int(value) if type(value) is float and value.is_integer() and chance.random() < 0.5 else value


_NEUTRAL = [body for body in SAME if "model" not in body]


@settings(deadline=None, max_examples=150)
@given(_bodies, st.randoms(use_true_random=False))
def test_a_request_in_other_words_has_the_same_key(body: dict[str, Any], chance: random.Random) -> None:
    """Keys in another order, numbers spelled otherwise, white space, defaults and what is left out."""
    body = {**body, "messages": [{"role": "user", "content": text} for text in body["messages"]]}
    fixed = {name: body[name] for name in ("seed",) if name in body}  # the API wants integers there
    other = {**_respelled(copy.deepcopy(body), chance), **fixed}
    for neutral in chance.sample(_NEUTRAL, 3):
        other = {**neutral, **other}
    if "stream_options" in other:
        other["stream"] = True
    spaced = json.dumps(other, indent=chance.choice([None, 1]), ensure_ascii=chance.random() < 0.5)
    assert key_of(parse(spaced.encode()), "t", ("b", "a")) == key_of(parse(orjson.dumps(body)), "t", ("a", "b"))


def test_the_order_of_a_schemas_properties_counts() -> None:
    def asked(*names: str) -> dict[str, Any]:
        properties = {name: {"type": "string"} for name in names}
        schema = {"name": "s", "schema": {"type": "object", "properties": properties}}
        return {
            "messages": [{"role": "user", "content": "hi"}],
            "response_format": {"type": "json_schema", "json_schema": schema},
        }

    one, other = (key_of(parse(orjson.dumps(asked(*names))), "t", ()) for names in (("why", "what"), ("what", "why")))
    assert one != other


def test_with_a_secret_the_key_is_another_one_and_tells_nothing_without_it() -> None:
    keys = {key_of(chat(), "acme", (), secret) for secret in (b"", b"one", b"two")}
    assert len(keys) == 3 and all(len(one) == 32 for one in keys)


def test_a_body_that_is_nested_as_deeply_as_may_be_has_a_key() -> None:
    deep = "[" * 250 + "1.0" + "]" * 250
    assert key('{"messages":[{"role":"user","content":"hi"}],"x":' + deep + "}")


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a/b.png"}}]}]},
        {"store": True},
        {"web_search_options": {"search_context_size": "low"}},
        {"tools": [{"type": "web_search"}]},
        {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
        {"previous_response_id": "r"},
    ],
)
def test_a_request_whose_answer_may_change_has_none_stored(body: dict[str, Any]) -> None:
    assert uncacheable(chat(**body)) is not None


@pytest.mark.parametrize("body", [{}, {"tools": [TOOL]}, {"n": 3}, {"store": None}, {"modalities": ["text"]}])
def test_other_requests_may(body: dict[str, Any]) -> None:
    assert uncacheable(chat(**body)) is None


@pytest.mark.parametrize(
    ("body", "so"),
    [
        ({}, False),
        ({"temperature": 0}, True),
        ({"temperature": 0.0}, True),
        ({"seed": 0}, True),
        ({"temperature": 1, "seed": 7}, True),
        ({"temperature": 0.1}, False),
        ({"temperature": None, "seed": None}, False),
        ({"top_p": 0}, False),
    ],
)
def test_temperature_0_or_a_seed_asks_for_the_same_answer_each_time(body: dict[str, Any], so: bool) -> None:
    assert is_deterministic(chat(**body)) is so


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, Wanted()),
        ("", Wanted()),
        ("no-store", Wanted(reads=False, stores=False)),
        ("No-Store, max-age=5", Wanted(reads=False, stores=False, max_age=5)),
        ("no-cache", Wanted(reads=False)),
        ("max-age=60", Wanted(max_age=60)),
        ('max-age="60"', Wanted(max_age=60)),
        ("max-age=60,max-age=30", Wanted(max_age=30)),
        ("max-age=0", Wanted(reads=False, max_age=0)),
        ("max-age", Wanted(reads=False, max_age=0)),
        ("max-age=soon", Wanted(reads=False, max_age=0)),
        ("max-age=-1", Wanted(reads=False, max_age=0)),
        ("only-if-cached, min-fresh=3", Wanted()),
    ],
)
def test_cache_control_says_what_the_caller_wants(value: str | None, wanted: Wanted) -> None:
    assert wanted_in({} if value is None else {"cache-control": value}) == wanted


def test_the_canonical_form_says_nothing_twice() -> None:
    assert canonical(chat(temperature=0.0, n=1)) == b'{"messages":[{"content":"hi","role":"user"}],"temperature":0}'
