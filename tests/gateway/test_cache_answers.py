"""A plain answer and its stream say the same, whichever was stored; what is not whole is not kept."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.cache import Unfit, as_stream, for_another, is_complete, kept_of, whole_of
from gateway.types import Usage

USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}

_text = st.text(max_size=8)
_logprobs = st.none() | st.fixed_dictionaries(
    {
        "content": st.lists(
            st.fixed_dictionaries(
                {
                    "token": _text,
                    "logprob": st.floats(-9, 0),
                    "bytes": st.lists(st.integers(0, 255), max_size=3),
                    "top_logprobs": st.lists(
                        st.fixed_dictionaries({"token": _text, "logprob": st.floats(-9, 0), "bytes": st.none()}),
                        max_size=2,
                    ),
                }
            ),
            max_size=3,
        ),
        "refusal": st.none(),
    }
)
_calls = st.lists(
    st.builds(
        lambda id, name, arguments: {
            "id": id,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        },
        st.sampled_from(["call_1", "call_2", "call_3"]),
        st.sampled_from(["f", "g"]),
        _text,
    ),
    min_size=1,
    max_size=3,
)
_messages = st.one_of(
    st.fixed_dictionaries({"role": st.just("assistant"), "content": _text, "refusal": st.none()}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": st.none(), "refusal": _text}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.none() | _text, "tool_calls": _calls, "reasoning_content": _text}
    ),
    st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": st.none(),
            "function_call": st.fixed_dictionaries({"name": st.just("f"), "arguments": _text}),
        }
    ),
)


@st.composite
def _answers(draw: st.DrawFn) -> dict[str, Any]:
    messages = draw(st.lists(_messages, min_size=1, max_size=3))
    choices = [
        {
            "index": index,
            "message": message,
            "logprobs": draw(_logprobs),
            "finish_reason": draw(st.sampled_from(["stop", "tool_calls", "function_call"])),
        }
        for index, message in enumerate(messages)
    ]
    frame = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "system_fingerprint": "fp"}
    return {**frame, "choices": choices, "usage": USAGE}


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_null(inner) for name, inner in value.items() if inner is not None}
    return [_without_null(inner) for inner in value] if isinstance(value, list) else value


def _pieces(answer: dict[str, Any], size: int) -> bytes:
    """The stream as a provider sends it: every string of a delta in pieces, choices by turns."""
    frame = {k: v for k, v in answer.items() if k not in ("choices", "usage")} | {"object": "chat.completion.chunk"}
    queues = []
    for choice in answer["choices"]:
        deltas: list[dict[str, Any]] = [{"role": "assistant"}]
        for name, value in choice["message"].items():
            if isinstance(value, str) and name != "role":
                deltas += [{name: value[at : at + size]} for at in range(0, max(len(value), 1), size)]
            elif name == "function_call":
                deltas.append({name: {**value, "arguments": ""}})
                deltas += [{name: {"arguments": letter}} for letter in value["arguments"]]
            elif name == "tool_calls":
                for at, call in enumerate(value):
                    function = call["function"]
                    deltas.append({name: [{"index": at, **call, "function": {**function, "arguments": ""}}]})
                    deltas += [
                        {name: [{"index": at, "function": {"arguments": letter}}]} for letter in function["arguments"]
                    ]
        queue = [{"index": choice["index"], "delta": d, "finish_reason": None, "logprobs": None} for d in deltas]
        for number, item in enumerate((choice["logprobs"] or {}).get("content", ())):
            queue[min(number, len(queue) - 1)].setdefault("more", []).append(item)
        for said in queue:
            if more := said.pop("more", None):
                said["logprobs"] = {"content": more, "refusal": None}
        if choice["logprobs"] is not None:
            queue[0]["logprobs"] = queue[0]["logprobs"] or {"content": [], "refusal": None}
        queue.append({"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]})
        queues.append(queue)
    events = []
    while any(queues):
        events += [{**frame, "choices": [queue.pop(0)], "usage": None} for queue in queues if queue]
    events.append({**frame, "choices": [], "usage": answer["usage"]})
    return b": keep-alive\n\n" + b"".join(b"data: " + orjson.dumps(e) + b"\n\n" for e in events) + b"data: [DONE]\n\n"


@settings(deadline=None)
@given(_answers(), st.integers(1, 4))
def test_whatever_stored_it_the_answer_is_the_same(answer: dict[str, Any], size: int) -> None:
    """A provider's stream becomes the plain answer; the plain answer becomes a stream that says the same again."""
    n = len(answer["choices"])
    gathered = whole_of(_pieces(answer, size), Usage(0, 0))
    assert _without_null(gathered) == _without_null(answer)
    assert is_complete(gathered, n)
    stored = kept_of(gathered)
    assert _without_null(whole_of(as_stream(stored, usage=True), Usage(0, 0))) == _without_null(
        {**answer, "usage": {**USAGE, "cost_usd": 0.0}}
    )
    assert _without_null(orjson.loads(kept_of(answer))) == _without_null(answer)


@settings(deadline=None)
@given(_answers(), st.booleans())
def test_a_replayed_stream_is_well_formed(answer: dict[str, Any], usage: bool) -> None:
    """Each event is one that OpenAI's client reads; roles come first, each choice ends once, usage comes last."""
    stream = as_stream(kept_of(answer), usage=usage)
    *events, done, rest = stream.split(b"\n\n")
    assert done == b"data: [DONE]" and rest == b""
    chunks = [ChatCompletionChunk.model_validate_json(event.removeprefix(b"data: ")) for event in events]
    assert all(chunk.id == "chatcmpl-1" and chunk.model == "m" for chunk in chunks)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    for index in range(len(answer["choices"])):
        own = [choice for choice in choices if choice.index == index]
        assert own[0].delta.role == "assistant" and own[0].finish_reason is None
        assert [choice.finish_reason is not None for choice in own] == [False] * (len(own) - 1) + [True]
    assert [chunk.usage is not None for chunk in chunks[:-1]] == [False] * (len(chunks) - 1)
    assert (chunks[-1].usage is not None) is usage and (not usage or chunks[-1].choices == [])
    ChatCompletion.model_validate(whole_of(stream, Usage(3, 4)))


def answer(finish: str | None = "stop", **changed: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "hello"}
    choices = [{"index": 0, "message": message, "finish_reason": finish}]
    return {"id": "c", "object": "chat.completion", "model": "m", "choices": choices, "usage": USAGE, **changed}


@pytest.mark.parametrize("finish", ["length", "content_filter", None, "error", "eos"])
def test_an_answer_that_was_cut_or_filtered_is_not_kept(finish: str | None) -> None:
    """At a limit, by a filter, or in a way that nobody knows."""
    assert not is_complete(answer(finish), 1)


@pytest.mark.parametrize("choices", [None, [], [{}], [{"message": None, "finish_reason": "stop"}], [1]])
def test_what_is_no_answer_is_not_kept(choices: Any) -> None:
    with pytest.raises(Unfit):
        kept_of(answer(choices=choices))


def test_an_answer_with_fewer_choices_than_asked_for_is_not_kept() -> None:
    assert is_complete(answer(), 1) and not is_complete(answer(), 2)


def test_what_belongs_to_the_one_call_is_not_kept() -> None:
    usage = {**USAGE, "cost_usd": 0.5}
    kept = orjson.loads(kept_of(answer(metadata={"a": "b"}, service_tier="flex", user="u", usage=usage)))
    assert kept.keys() == {"id", "object", "model", "choices", "usage"} and kept["usage"]["cost_usd"] == 0.0


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n',
        b"data: a\n\ndata: [DONE]\n\n",
        b'data: {"error":{"message":"x"}}\n\n',
        b'data: {"choices":[1]}\n\ndata: [DONE]\n\n',
        b'data: {"choices":[{"index":"x","delta":{}}]}\n\ndata: [DONE]\n\n',
    ],
)
def test_a_stream_that_is_not_whole_is_no_answer(stream: bytes) -> None:
    with pytest.raises(Unfit):
        whole_of(stream, Usage(0, 0))


def test_where_a_stream_states_no_usage_what_was_counted_stands_for_it() -> None:
    stream = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    assert whole_of(stream, Usage(2, 1, 1))["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 1,
        "total_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


@settings(deadline=None)
@given(_answers())
def test_a_client_that_did_not_ask_for_usage_gets_the_rest_of_a_shared_stream(answer: dict[str, Any]) -> None:
    stream = as_stream(kept_of(answer), usage=True)
    assert for_another(stream, usage=False, free=True) == as_stream(kept_of(answer), usage=False)
    assert for_another(stream, usage=True, free=False) == stream


def test_whoever_shares_a_stream_pays_nothing() -> None:
    block = b'data: {"choices":[],"usage":{"prompt_tokens":1,"cost_usd":0.5}}\n\ndata: [DONE]\n\n'
    assert b'"cost_usd":0.0' in for_another(block, usage=True, free=True)
    beside = b'data: {"choices":[{"delta":{"content":"\\"usage\\""}}],"usage":{"a":1}}\n\n'
    assert for_another(beside, usage=False, free=True) == beside.replace(b',"usage":{"a":1}', b"")
