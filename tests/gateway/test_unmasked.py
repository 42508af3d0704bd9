"""The answer to a masked request: placeholders are put back, however the stream is cut; and the door that masks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.backends import Backends
from gateway.backends.base import Call, Chunk
from gateway.backends.sse import DONE, event
from gateway.backends.unmasked import Unmask, UnmaskedAnswer
from gateway.errors import EgressDenied, UpstreamCut, UpstreamError
from gateway.masking import Mask, Masker
from gateway.types import Permit, Usage
from gateway.wire.chat import parse
from tests.fakes import CLOUD, FakeAnswer, FakeBackend, completion
from tests.gateway.test_masking import BODY, MAIL, Spotter

ODD = 'O\'Hara\n"x\\" [EMAIL'
MASK = Mask({"[EMAIL_1]": MAIL, "[EMAIL_2]": "a@b.de", "[STAFF_ID_1]": ODD, "[EMAIL_12]": "twelve@b.de"})


def choice(index: int = 0, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish}


def chunk(*choices: dict[str, Any], **more: Any) -> bytes:
    return event({"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": list(choices), **more})


def arguments(text: str, index: int = 0) -> list[dict[str, Any]]:
    return [{"index": index, "function": {"arguments": text}}]


def through(blocks: Sequence[bytes], *, json_content: bool = False) -> list[Chunk]:
    """What a client gets of a stream that arrives in these blocks, the last of which is the last."""
    script = [Chunk(block, last=number == len(blocks)) for number, block in enumerate(blocks, 1)]

    async def read() -> list[Chunk]:
        answer = UnmaskedAnswer(FakeAnswer(script), MASK, stream=True, json_content=json_content)
        return [one async for one in answer]

    return asyncio.run(read())


def payloads(data: bytes) -> Iterator[dict[str, Any]]:
    for one in data.split(b"\n\n"):
        if one and one != b"data: [DONE]":
            yield orjson.loads(one.removeprefix(b"data: "))


def heard(data: bytes) -> dict[tuple[int, str], str]:
    """What a client puts together, by choice and string."""
    whole: dict[tuple[int, str], str] = {}

    def add(index: int, name: str, text: str | None) -> None:
        if text is not None:
            whole[index, name] = whole.get((index, name), "") + text

    for payload in payloads(data):
        for one in payload["choices"]:
            delta = one.get("delta") or {}
            for key in ("content", "refusal", "reasoning_content"):
                add(one["index"], key, delta.get(key))
            for call in delta.get("tool_calls") or ():
                add(one["index"], f"call {call['index']}", (call.get("function") or {}).get("arguments"))
                add(one["index"], f"input {call['index']}", (call.get("custom") or {}).get("input"))
            add(one["index"], "function", (delta.get("function_call") or {}).get("arguments"))
    return whole


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["to [EMAIL_1]."], [f"to {MAIL}."]),
        (["to [EMA", "IL_", "1", "]."], ["to ", f"{MAIL}."]),
        (["[", "E", "[EMAIL_1", "]", "x"], ["[E", MAIL, "x"]),
        (["[EMAIL_1", "2]"], ["twelve@b.de"]),
        (["[x", "]"], ["[x", "]"]),
        (["[[EMAIL_2]", "]"], ["[a@b.de", "]"]),
        (["[EMAIL_3", "]"], ["[EMAIL_3", "]"]),
        (["[email_1]"], ["[email_1]"]),  # changed by the model, so it stays
        (["a[", "b"], ["a", "[b"]),
        (["end ["], ["end ", "["]),
        (["[STAFF_ID_1]", "_1]"], [ODD, "_1]"]),  # what was put in begins nothing
        (["[STAFF_ID_1]_1]"], [f"{ODD}_1]"]),
    ],
)
def test_a_placeholder_is_put_back_wherever_it_is_split(pieces: list[str], expected: list[str]) -> None:
    chunks = through([*(chunk(choice(content=piece)) for piece in pieces), chunk(choice(finish="stop")), DONE])
    said = [p["choices"][0]["delta"].get("content") for one in chunks for p in payloads(one.data)]
    assert [text for text in said if text] == expected
    assert chunks[-1].data.endswith(DONE) and chunks[-1].last
    assert sum(one.tokens for one in chunks) == len(pieces) + 2


def test_what_waits_comes_with_the_end_of_its_choice_or_of_the_stream() -> None:
    ended = through([chunk(choice(content="a [EM"), choice(1, content="b [")), chunk(choice(1, finish="stop")), DONE])
    assert [list(payloads(one.data)) for one in ended[1:]] == [
        list(payloads(chunk(choice(1, finish="stop", content="[")))),
        list(payloads(chunk(choice(content="[EM")))),
    ]
    without_done = through([chunk(choice(content="a [EM")), chunk(usage={"prompt_tokens": 1, "completion_tokens": 1})])
    assert heard(without_done[-1].data) == {(0, "content"): "[EM"}


def test_an_event_that_says_nothing_but_what_must_wait_is_left_out() -> None:
    silent = chunk(choice(content="[EMAIL"))
    spoken = chunk(choice(role="assistant", content="[EMAIL"), choice(1, content="x"))
    chunks = through([silent, chunk(choice(content="_1]")), spoken, chunk(choice(finish="stop")) + DONE])
    assert [list(payloads(one.data)) for one in chunks[:2]] == [
        list(payloads(chunk(choice(content=MAIL)))),
        list(payloads(chunk(choice(role="assistant"), choice(1, content="x")))),
    ]


def test_what_is_put_into_json_is_escaped() -> None:
    """A tool call's arguments are JSON, and the content is where the request asked for that."""
    quoted = '{"a": "[STAFF_ID_1]"}'
    events = [chunk(choice(tool_calls=arguments(quoted), content=quoted)), chunk(choice(finish="stop")) + DONE]
    for asked in (False, True):
        whole = heard(b"".join(one.data for one in through(events, json_content=asked)))
        assert orjson.loads(whole[0, "call 0"]) == {"a": ODD}
        content = whole[0, "content"]
        assert orjson.loads(content) == {"a": ODD} if asked else content == f'{{"a": "{ODD}"}}'


def test_a_plain_answer_has_all_its_strings_back() -> None:
    message = {
        "role": "assistant",
        "content": "[EMAIL_1] [EMAIL_9]",
        "refusal": "[EMAIL_2]",
        "reasoning_content": "[EMAIL_12]",
        "tool_calls": [
            {"id": "1", "function": {"name": "mail [EMAIL_1]", "arguments": '{"a": "[STAFF_ID_1]"}'}},
            {"id": "2", "custom": {"name": "f", "input": "[STAFF_ID_1]"}},
        ],
        "parts": [{"type": "text", "text": "[EMAIL_1]"}],
    }
    logprobs = {"content": [{"token": "[EMAIL_1]", "logprob": 0.0}]}
    answer = {"id": "[EMAIL_1]", "choices": [{"index": 0, "message": message, "logprobs": logprobs}]}
    got = orjson.loads(Unmask(MASK, json_content=False).plain(orjson.dumps(answer)))
    said = got["choices"][0]["message"]
    assert (said["content"], said["refusal"], said["reasoning_content"]) == (
        f"{MAIL} [EMAIL_9]", "a@b.de", "twelve@b.de",
    )  # fmt: skip
    assert said["tool_calls"][0]["function"]["name"] == f"mail {MAIL}"
    assert orjson.loads(said["tool_calls"][0]["function"]["arguments"]) == {"a": ODD}
    assert said["tool_calls"][1]["custom"]["input"] == ODD and said["parts"][0]["text"] == MAIL
    assert got["choices"][0]["logprobs"] == logprobs and got["id"] == "[EMAIL_1]"


@pytest.mark.parametrize(
    "odd",
    [
        b": keep-alive\n\n",
        b"data: {\n\n",
        b"data: 5\n\n",
        b'data: {"choices":5}\n\n',
        b'data: {"choices":[5,{"delta":5},{"delta":null,"index":"x"}]}\n\n',
        b'data: {"choices":[{"delta":{"tool_calls":[5,{"function":5}],"function_call":[],"content":["[x"]}}]}\n\n',
        b'data: {"error":{"message":"x"}}\n\n',
    ],
)
def test_what_is_on_no_wire_that_is_known_is_passed_on(odd: bytes) -> None:
    chunks = through([odd, chunk(choice(content="x", finish="stop")), DONE])
    assert chunks[0].data == odd


PIECES = [*MASK.originals, "[", "]", "[EMAIL_", "1]", "[EMAIL_3]", "x", "é", " ", '"', "\n", "[[", "_"]
_said = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@st.composite
def streams(draw: st.DrawFn) -> tuple[dict[tuple[int, str], str], list[bytes]]:
    """What a model says in several choices and tool calls at once, and the blocks in which it arrives."""
    names = ["content", "refusal", "reasoning_content", "call 0", "call 1", "input 2", "function"]
    places = draw(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(names)), min_size=1, max_size=4, unique=True))
    whole = {place: draw(_said) for place in places}
    events: list[bytes] = []
    blocks: list[bytes] = []
    todo = {place: text for place, text in whole.items() if text}
    while todo:
        place = draw(st.sampled_from(sorted(todo)))
        length = draw(st.integers(1, len(todo[place])))
        piece, rest = todo[place][:length], todo.pop(place)[length:]
        if rest:
            todo[place] = rest
        index, name = place
        number = int(name[-1]) if name[-1].isdigit() else 0
        delta: dict[str, Any] = {name: piece}
        if name.startswith("call"):
            delta = {"tool_calls": arguments(piece, number)}
        elif name.startswith("input"):
            delta = {"tool_calls": [{"index": number, "custom": {"input": piece}}]}
        elif name == "function":
            delta = {"function_call": {"arguments": piece}}
        events.append(chunk(choice(index, **delta)))
    if draw(st.booleans()):
        events += [chunk(choice(index, finish="stop")) for index in sorted({index for index, _ in places})]
    for one in [*events, DONE]:
        together = bool(blocks) and draw(st.booleans())
        blocks[-1:] = [blocks[-1] + one] if together else [*blocks[-1:], one]
    return whole, blocks


@given(streams(), st.booleans())
@settings(deadline=None, max_examples=200)
def test_however_a_stream_is_cut_the_client_hears_the_whole_with_everything_put_back(
    stream: tuple[dict[tuple[int, str], str], list[bytes]], json_content: bool
) -> None:
    whole, blocks = stream
    chunks = through(blocks, json_content=json_content)
    got = heard(b"".join(one.data for one in chunks))
    for (index, name), text in whole.items():
        within_json = name.startswith(("call", "function")) or (json_content and name == "content")
        assert got.get((index, name), "") == MASK.restored(text, within_json=within_json)
    assert chunks[-1].last and chunks[-1].data.endswith(DONE) and not any(one.last for one in chunks[:-1])
    assert sum(one.tokens for one in chunks) == len(blocks)


@given(streams())
@settings(deadline=None)
def test_no_more_waits_than_may_begin_a_placeholder(
    stream: tuple[dict[tuple[int, str], str], list[bytes]],
) -> None:
    unmask = Unmask(MASK, json_content=False)
    longest = max(map(len, MASK.originals))
    for block in stream[1][:-1]:
        unmask.events(block, last=False)
        assert all(len(text) < longest for text in unmask._waiting.values())


# ---- the door ----

ELSEWHERE = Permit(frozenset({"personal"}), frozenset({"on_premises"}), '"stay home"', None)
NOWHERE_ELSE = replace(ELSEWHERE, masked_zones=frozenset())


def a_call(body: dict[str, Any] = BODY, *, spotter: Spotter | None = None, request_id: str = "r1") -> Call:
    chat = parse(orjson.dumps(body))
    return Call(chat, request_id, masked=Masker(spotter or Spotter()).masked(chat))


def opened(permit: Permit, call: Call, *scripts: Sequence[Chunk | UpstreamError]) -> tuple[FakeBackend, list[Chunk]]:
    """What the cloud was sent, and what came back through the door."""
    backend = FakeBackend([*scripts])

    async def run() -> list[Chunk]:
        answer = await Backends({"cloud": backend}).open(CLOUD, permit, call)
        try:
            return [one async for one in answer]
        finally:
            await answer.close()

    return backend, asyncio.run(run())


def test_the_door_sends_the_masked_form_and_gives_back_the_original() -> None:
    script = [Chunk(completion("I wrote to [EMAIL_1]"), usage=Usage(5, 7), last=True)]
    backend, (answer,) = opened(ELSEWHERE, a_call(), script)
    (sent,) = backend.calls
    assert MAIL not in repr(sent) and sent.chat.body["messages"][0]["content"] == "Write to [EMAIL_1]."
    assert answer.data == completion(f"I wrote to {MAIL}") and answer.usage == Usage(5, 7) and answer.last
    assert backend.answers[0].closed == 1


def test_where_the_request_may_go_as_it_is_it_is_not_masked() -> None:
    for permit in (Permit(frozenset(), None), replace(ELSEWHERE, zones=frozenset({"us_cloud"}))):
        backend, (answer,) = opened(permit, a_call(), [Chunk(completion("[EMAIL_1]"), last=True)])
        assert backend.calls[0].chat.body == BODY and answer.data == completion("[EMAIL_1]")


class Changeable(Spotter):
    """Finds something only the second time."""

    looks = 0

    def scan(self, texts: Sequence[str]) -> frozenset[str]:
        self.looks += 1
        return super().scan(texts) if self.looks == 1 else frozenset({"email"})


@pytest.mark.parametrize(
    ("permit", "call"),
    [
        (NOWHERE_ELSE, a_call()),
        (replace(ELSEWHERE, masked_zones=frozenset({"eu_cloud"})), a_call()),
        (ELSEWHERE, replace(a_call(), masked=None)),
        (ELSEWHERE, replace(a_call(), masked=a_call().masked)),
        (ELSEWHERE, a_call(spotter=Changeable())),
    ],
    ids=["not permitted", "another zone", "not masked", "another request's", "found in the masked form"],
)
def test_the_door_stays_shut(permit: Permit, call: Call) -> None:
    backend = FakeBackend()
    with pytest.raises(EgressDenied) as denied:
        asyncio.run(Backends({"cloud": backend}).open(CLOUD, permit, call))
    assert not backend.calls and MAIL not in denied.value.message


def test_a_request_id_that_says_what_is_masked_is_replaced() -> None:
    body = {"messages": [{"role": "user", "content": "phone 555-123-4567"}]}
    for given_id, sent in [("a-5551234567", "masked"), ("abc", "abc")]:
        backend, _ = opened(ELSEWHERE, a_call(body, request_id=given_id))
        assert backend.calls[0].request_id == sent


def test_an_answer_that_breaks_off_ends_as_it_would_unmasked() -> None:
    call = a_call({**BODY, "stream": True})
    with pytest.raises(UpstreamCut):
        opened(ELSEWHERE, call, [Chunk(chunk(choice(content="x [EM"))), UpstreamCut("broke off")])
