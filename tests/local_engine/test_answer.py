"""Deltas as bytes."""

from __future__ import annotations

import orjson
import pytest

from local_engine.answer import DONE, Events, Form, Identity, Whole
from local_engine.errors import GenerationFailed
from local_engine.output import Delta
from local_engine.sequence import FinishReason, Likelihood

DELTAS = [Delta("Hel", 1), Delta('lo "\n', 2), Delta("", 3, FinishReason.STOP, cached_tokens=16)]
USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 3,
    "total_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 5},  # a preempted request may find its own answer, too
}


def written(token: int) -> bytes:
    return str(token).encode()


def added(form: Form) -> list[bytes]:
    """The bytes that each of the deltas becomes."""
    return [form.add(0, delta, last=delta is DELTAS[-1]) for delta in DELTAS]


def identity(chat: bool) -> Identity:
    return Identity("id-1", 7, "demo", chat, 5)


def events(body: bytes) -> list[dict[str, object]]:
    return [orjson.loads(event[6:]) for event in body.split(b"\n\n") if event.startswith(b"data: {")]


@pytest.mark.parametrize(
    ("chat", "kind", "first"),
    [
        (True, "chat.completion.chunk", {"delta": {"role": "assistant", "content": "Hel"}}),
        (False, "text_completion", {"text": "Hel"}),
    ],
)
def test_each_delta_is_one_event_and_the_first_has_role_and_text(
    chat: bool, kind: str, first: dict[str, object]
) -> None:
    form = Events(identity(chat), written, include_usage=False)
    made = events(b"".join(added(form)))
    assert [{key: chunk[key] for key in ("id", "object", "created", "model")} for chunk in made] == [
        {"id": "id-1", "object": kind, "created": 7, "model": "demo"}
    ] * 3
    choices = [chunk["choices"][0] for chunk in made]  # type: ignore[index]
    assert choices[0] == {"index": 0, "logprobs": None, "finish_reason": None} | first
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]
    texts = [choice["delta"].get("content", "") if chat else choice["text"] for choice in choices]
    assert "".join(texts) == 'Hello "\n'


def test_the_stream_ends_with_done() -> None:
    form = Events(identity(True), written, include_usage=False)
    assert b"".join(added(form)).endswith(b"\n\n" + DONE)


def test_usage_comes_once_in_a_chunk_without_choices_if_asked_for() -> None:
    form = Events(identity(True), written, include_usage=True)
    made = events(b"".join(added(form)))
    assert [chunk["usage"] for chunk in made] == [None, None, None, USAGE]
    assert made[-1]["choices"] == []


def test_a_broken_stream_ends_with_an_error_event_and_without_done() -> None:
    form = Events(identity(True), written, include_usage=True)
    broken = Delta("", 1, FinishReason.ERROR, GenerationFailed("it broke"))
    body = form.add(0, DELTAS[0], last=False) + form.add(0, broken, last=True)
    assert events(body)[-1] == {
        "error": {"message": "it broke", "type": "server_error", "param": None, "code": "generation_failed"}
    }
    assert b"[DONE]" not in body


@pytest.mark.parametrize(
    ("chat", "kind", "text"),
    [
        (True, "chat.completion", {"message": {"role": "assistant", "content": 'Hello "\n'}}),
        (False, "text_completion", {"text": 'Hello "\n'}),
    ],
)
def test_a_plain_answer_is_one_body_with_usage(chat: bool, kind: str, text: dict[str, object]) -> None:
    form = Whole(identity(chat), written)
    *before, body = added(form)
    assert before == [b"", b""]
    assert orjson.loads(body) == {
        "id": "id-1",
        "object": kind,
        "created": 7,
        "model": "demo",
        "choices": [{"index": 0, "logprobs": None, "finish_reason": "stop"} | text],
        "usage": USAGE,
    }


LIKELY = Likelihood(7, -0.5, ((7, -0.5), (8, -1.5)))


@pytest.mark.parametrize(
    ("chat", "told"),
    [
        (
            True,
            {
                "content": [
                    {
                        "token": "7",
                        "logprob": -0.5,
                        "bytes": [55],
                        "top_logprobs": [
                            {"token": "7", "logprob": -0.5, "bytes": [55]},
                            {"token": "8", "logprob": -1.5, "bytes": [56]},
                        ],
                    }
                ]
            },
        ),
        (False, {"tokens": ["7"], "token_logprobs": [-0.5], "top_logprobs": [{"7": -0.5, "8": -1.5}]}),
    ],
)
def test_likelihoods_are_told_in_openais_shapes(chat: bool, told: dict[str, object]) -> None:
    delta = Delta("7", 1, FinishReason.LENGTH, likelihoods=(LIKELY,))
    whole = orjson.loads(Whole(identity(chat), written).add(0, delta, last=True))
    (event,) = events(Events(identity(chat), written, include_usage=False).add(0, delta, last=True))
    assert whole["choices"][0]["logprobs"] == told
    assert event["choices"][0]["logprobs"] == told  # type: ignore[index]


def test_several_choices_share_one_body_and_their_tokens_are_added_up() -> None:
    form = Whole(Identity("id-1", 7, "demo", True, 5, choices=2), written)
    form.add(1, Delta("b", 2, FinishReason.STOP), last=False)
    body = orjson.loads(form.add(0, Delta("a", 3, FinishReason.LENGTH), last=True))
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in body["choices"]] == [
        (0, "a", "length"),
        (1, "b", "stop"),
    ]
    assert body["usage"]["completion_tokens"] == 5
