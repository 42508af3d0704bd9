"""The stream reader passes text on untouched, counts usage, and never calls a cut stream complete."""

from __future__ import annotations

import time
from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.backends.sse import DONE, StreamReader, error_event, event, has_token, usage_of
from gateway.errors import UpstreamCut, UpstreamFailed
from gateway.types import Price, Usage


def chunk(text: str | None = None, finish: str | None = None, index: int = 0, **more: object) -> bytes:
    delta = {"content": text} if text is not None else {}
    return event({"id": "c", "choices": [{"index": index, "delta": delta, "finish_reason": finish}], **more})


ROLE = event({"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
USAGE = event({"id": "c", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
STREAM = ROLE + chunk("Hel") + chunk("lo") + chunk(finish="stop") + USAGE + DONE


def reader(choices: int = 1, pass_usage: bool = False, price: Price | None = None) -> StreamReader:
    return StreamReader(choices=choices, pass_usage=pass_usage, price=price)


def texts(data: bytes) -> str:
    events = [orjson.loads(e[6:]) for e in data.split(b"\n\n") if e.startswith(b"data: {")]
    return "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])


@given(st.lists(st.integers(min_value=0, max_value=len(STREAM)), max_size=12))
def test_how_the_network_cuts_a_stream_changes_nothing(cuts: list[int]) -> None:
    at = sorted({0, *cuts, len(STREAM)})
    read = reader()
    out = b"".join(read.feed(STREAM[a:b]) for a, b in pairwise(at))
    assert out == STREAM.replace(USAGE, b"")
    assert read.done and read.complete and read.usage == Usage(3, 2)


def test_nothing_is_passed_on_before_the_first_token() -> None:
    read = reader()
    assert read.feed(ROLE) == b"" and not read.started
    assert read.feed(chunk("a")) == ROLE + chunk("a") and read.started


def test_an_asked_for_usage_event_is_passed_on_with_its_cost() -> None:
    read = reader(pass_usage=True, price=Price(1000.0, 2000.0))
    out = read.feed(STREAM)
    usage = orjson.loads(out.split(b"\n\n")[-3][6:])["usage"]
    assert usage == {"prompt_tokens": 3, "completion_tokens": 2, "cost_usd": 7e-06}


def test_usage_beside_text_is_counted_and_its_text_kept() -> None:
    read = reader()
    out = read.feed(chunk("a", usage={"prompt_tokens": 1, "completion_tokens": 1}))
    assert texts(out) == "a" and b"usage" not in out and read.usage == Usage(1, 1)


@pytest.mark.parametrize(
    ("sent", "complete"),
    [
        (chunk("a"), False),
        (chunk("a") + chunk(finish="stop"), True),
        (chunk("a") + DONE, True),
        (chunk("a") + b"data: [DO", False),
        (chunk("a") + chunk(finish="stop")[:-1], False),
    ],
)
def test_a_stream_is_complete_only_when_the_upstream_said_so(sent: bytes, complete: bool) -> None:
    read = reader()
    read.feed(sent)
    assert read.complete is complete


def test_each_of_several_choices_must_finish() -> None:
    read = reader(choices=2)
    read.feed(chunk("a") + chunk(finish="stop", index=1))
    assert not read.complete
    read.feed(chunk(finish="length", index=0))
    assert read.complete


@pytest.mark.parametrize(
    "broken",
    [b"data: {nonsense\n\n", b"data: []\n\n", event({"error": {"message": "overloaded"}}), event({"error": "no"})],
)
@pytest.mark.parametrize("before", [b"", chunk("a")], ids=["first", "later"])
def test_an_event_that_cannot_be_read_is_a_failure_that_quotes_nothing(before: bytes, broken: bytes) -> None:
    read = reader()
    with pytest.raises(UpstreamFailed) as caught:
        read.feed(before)
        read.feed(broken)
    assert "nonsense" not in caught.value.message and "overloaded" not in caught.value.message


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_comments_and_both_line_ends_are_understood(newline: bytes) -> None:
    read = reader()
    out = read.feed(b": keep-alive\n\n".replace(b"\n", newline) + (chunk("a") + DONE).replace(b"\n", newline))
    assert out == chunk("a") + DONE


def test_nothing_follows_done() -> None:
    read = reader()
    assert read.feed(chunk("a") + DONE + chunk("b")) == chunk("a") + DONE


def test_text_that_looks_like_a_field_is_text() -> None:
    read = reader()
    read.feed(chunk("a"))
    tricky = chunk('"usage":{"prompt_tokens":9} [DONE] "finish_reason":"stop"')
    assert read.feed(tricky) == tricky and not read.complete and read.usage is None


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"delta": {"role": "assistant", "content": ""}}, False),
        ({"delta": {"role": "assistant", "content": None}}, False),
        ({"delta": {}}, False),
        ({"delta": {"content": "a"}}, True),
        ({"delta": {"tool_calls": [{}]}}, True),
        ({"delta": {"reasoning_content": "hm"}}, True),
        ({"delta": {}, "finish_reason": "length"}, True),
        ({"text": "a"}, True),
    ],
)
def test_a_token_is_whatever_the_caller_could_see(choice: dict[str, object], expected: bool) -> None:
    assert has_token({"choices": [choice]}) is expected


def test_an_error_event_has_the_shape_of_an_error_answer() -> None:
    assert orjson.loads(error_event(UpstreamCut("broke off"))[6:])["error"]["code"] == "upstream_cut"


@pytest.mark.parametrize(
    "payload",
    [
        {"choices": "abc"},
        {"choices": {"a": 1}},
        {"choices": 5},
        {"choices": ["a"]},
        {"choices": [None]},
        {"choices": [{"delta": "abc"}]},
        {"choices": [{"delta": ["abc"]}]},
        {"choices": [{"index": [1], "delta": {}, "finish_reason": "stop"}]},
    ],
)
@pytest.mark.parametrize("before", [b"", chunk("a")], ids=["first", "later"])
def test_a_chunk_of_another_shape_is_a_failure_of_the_deployment(before: bytes, payload: dict[str, object]) -> None:
    read = reader()
    with pytest.raises(UpstreamFailed):
        read.feed(before)
        read.feed(event({**payload, "usage": {}}))


@pytest.mark.parametrize("payload", [{"choices": None}, {"choices": [{"delta": None}]}, {"id": "x"}])
def test_a_chunk_that_says_nothing_is_borne(payload: dict[str, object]) -> None:
    read = reader()
    read.feed(event(payload) + chunk("a") + DONE)
    assert read.done


@pytest.mark.parametrize(("prompt", "completion"), [(-1, 2), (True, 2), (1.5, 2), ("1", 2), (1, 2**63), ([], {})])
def test_a_usage_that_cannot_be_is_none(prompt: object, completion: object) -> None:
    assert usage_of({"usage": {"prompt_tokens": prompt, "completion_tokens": completion}}) is None


@pytest.mark.parametrize(
    ("details", "cached"),
    [
        ({"cached_tokens": 4}, 4),
        ({"cached_tokens": 400}, 9),
        ({"cached_tokens": -1}, 0),
        ({"cached_tokens": "4"}, 0),
        ({"cached_tokens": True}, 0),
        ({}, 0),
        (None, 0),
        ([], 0),
    ],
)
def test_cached_prompt_tokens_are_read_and_are_never_more_than_the_prompt(details: object, cached: int) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": details}
    assert usage_of({"usage": usage}) == Usage(9, 1, cached)


@pytest.mark.parametrize("sent", [DONE, USAGE + DONE], ids=["nothing", "usage alone"])
def test_a_stream_that_ends_without_an_answer_has_failed(sent: bytes) -> None:
    with pytest.raises(UpstreamFailed):
        reader().feed(sent)


def test_what_nests_too_deeply_to_be_written_is_a_failure() -> None:
    deep = orjson.Fragment(b"[" * 400 + b"]" * 400)
    with pytest.raises(UpstreamFailed):
        reader(pass_usage=True).feed(chunk("a", usage={"prompt_tokens": 1, "completion_tokens": 1, "x": deep}))


def test_an_event_of_several_lines_is_passed_on_as_one() -> None:
    sent = b'data: {"choices":\ndata: [{"delta":{"content":"q"}}]}\n\n'
    assert reader().feed(sent) == b'data: {"choices":[{"delta":{"content":"q"}}]}\n\n'


def test_a_long_event_in_small_pieces_is_read_in_linear_time() -> None:
    """Were each piece to search all that came before it, this would take a quarter of an hour."""
    read, began = reader(), time.process_time()
    whole = chunk("z" * 4_000_000)
    out = b"".join(read.feed(whole[at : at + 500]) for at in range(0, len(whole), 500))
    assert out == whole and time.process_time() - began < 30


def test_an_event_that_never_ends_is_given_up() -> None:
    read = reader()
    with pytest.raises(UpstreamFailed):
        for _ in range(200):
            read.feed(b"z" * 65_536)
