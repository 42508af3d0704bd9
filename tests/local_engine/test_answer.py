"""Deltas as bytes."""

from __future__ import annotations

import orjson
import pytest

from local_engine.answer import DONE, Events, Identity, Whole
from local_engine.errors import GenerationFailed
from local_engine.output import Delta
from local_engine.sequence import FinishReason

DELTAS = [Delta("Hel", 1), Delta('lo "\n', 2), Delta("", 3, FinishReason.STOP)]
USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


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
    form = Events(identity(chat), include_usage=False)
    made = events(b"".join(map(form.add, DELTAS)))
    assert [{key: chunk[key] for key in ("id", "object", "created", "model")} for chunk in made] == [
        {"id": "id-1", "object": kind, "created": 7, "model": "demo"}
    ] * 3
    choices = [chunk["choices"][0] for chunk in made]  # type: ignore[index]
    assert choices[0] == {"index": 0, "logprobs": None, "finish_reason": None} | first
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]
    texts = [choice["delta"].get("content", "") if chat else choice["text"] for choice in choices]
    assert "".join(texts) == 'Hello "\n'


def test_the_stream_ends_with_done() -> None:
    form = Events(identity(True), include_usage=False)
    assert b"".join(map(form.add, DELTAS)).endswith(b"\n\n" + DONE)


def test_usage_comes_once_in_a_chunk_without_choices_if_asked_for() -> None:
    form = Events(identity(True), include_usage=True)
    made = events(b"".join(map(form.add, DELTAS)))
    assert [chunk["usage"] for chunk in made] == [None, None, None, USAGE]
    assert made[-1]["choices"] == []


def test_a_broken_stream_ends_with_an_error_event_and_without_done() -> None:
    form = Events(identity(True), include_usage=True)
    body = form.add(DELTAS[0]) + form.add(Delta("", 1, FinishReason.ERROR, GenerationFailed("it broke")))
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
    form = Whole(identity(chat))
    *before, body = map(form.add, DELTAS)
    assert before == [b"", b""]
    assert orjson.loads(body) == {
        "id": "id-1",
        "object": kind,
        "created": 7,
        "model": "demo",
        "choices": [{"index": 0, "logprobs": None, "finish_reason": "stop"} | text],
        "usage": USAGE,
    }
