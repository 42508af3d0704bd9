"""Bodies and headers: what is taken, what is refused, and that nothing is repeated."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from local_engine.errors import InvalidRequest
from local_engine.protocol import (
    GenerationRequest,
    Message,
    Wishes,
    parse_chat,
    parse_completion,
    parse_request_id,
    parse_tokenize,
    parse_wishes,
)

HELLO = [{"role": "user", "content": "hello"}]
SECRET = "4111 1111 1111 1111"


def chat(**fields: Any) -> GenerationRequest:
    return parse_chat(orjson.dumps({"messages": HELLO} | fields))


def problem(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    return caught.value


def test_a_bare_chat_has_openais_defaults() -> None:
    assert chat() == GenerationRequest(
        model=None,
        prompt=(Message("user", "hello"),),
        chat=True,
        max_tokens=None,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        seed=None,
        stop=(),
        stream=False,
        include_usage=False,
    )


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"temperature": 0}, "temperature", 0),
        ({"temperature": None}, "temperature", 1.0),
        ({"max_tokens": 7}, "max_tokens", 7),
        ({"max_tokens": 7, "max_completion_tokens": 9}, "max_tokens", 9),
        ({"stop": "END"}, "stop", ("END",)),
        ({"stop": ["a", "b"]}, "stop", ("a", "b")),
        ({"stop": None}, "stop", ()),
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 2**63}, "top_k", 2**31),  # more than any vocabulary
        ({"seed": -5}, "seed", -5),
        ({"stream": True, "stream_options": {"include_usage": True}}, "include_usage", True),
        ({"user": "someone", "never_heard_of": {"a": 1}}, "stream", False),
    ],
)
def test_a_field_is_taken_over(fields: dict[str, Any], name: str, value: object) -> None:
    assert {name: value}.items() <= {
        each: getattr(chat(**fields), each) for each in GenerationRequest.__slots__
    }.items()


@pytest.mark.parametrize(
    ("messages", "parsed"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], ("user", "ab")),
        ([{"role": "developer", "content": "be brief"}], ("system", "be brief")),
        ([{"role": "assistant", "content": "yes", "tool_calls": None}], ("assistant", "yes")),
    ],
)
def test_a_message_is_one_role_and_one_text(messages: list[object], parsed: tuple[str, str]) -> None:
    assert chat(messages=messages).prompt == (Message(*parsed),)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "tool", "content": SECRET}]}, "messages[0].role"),
        ({"messages": [*HELLO, {"role": "user", "content": 41111}]}, "messages[1].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": SECRET}]}]},
            "messages[0].content",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 4111}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": SECRET}]}]}, "messages[0]"),
        ({"messages": [SECRET]}, "messages[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": SECRET}, "max_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": 2**64 - 1, "top_k": -2}, "top_k"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "4111" * 200}, "stop"),
        ({"stop": {"a": SECRET}}, "stop"),
        ({"stream": SECRET}, "stream"),
        ({"stream_options": {"include_usage": SECRET}}, "stream_options.include_usage"),
        ({"model": 5}, "model"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": SECRET}, "frequency_penalty"),
        ({"logit_bias": {SECRET: 1}}, "logit_bias"),
        ({"logit_bias": {"7": 101}}, "logit_bias"),
        ({"logit_bias": {"7": True}}, "logit_bias"),
        ({"logprobs": SECRET}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": SECRET}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SECRET}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"guided_choice": []}, "guided_choice"),
    ],
)
def test_a_wrong_field_is_named_and_its_value_is_not_repeated(fields: dict[str, Any], param: str) -> None:
    error = problem(**fields)
    assert error.param == param
    assert error.message.startswith(f"{param}: ")
    assert "4111" not in error.message


@pytest.mark.parametrize(
    ("field", "neutral", "asking"),
    [
        ("tools", [], [{"type": "function"}]),
        ("tool_choice", "auto", "required"),
        ("echo", False, True),
    ],
)
def test_what_is_not_built_is_refused_by_name_unless_it_asks_for_nothing(
    field: str, neutral: object, asking: object
) -> None:
    assert chat(**{field: neutral}) == chat()
    assert problem(**{field: asking}).message == f"{field}: is not supported by this engine"


def test_all_problems_are_reported_at_once() -> None:
    message = problem(tools=[{}], temperature=9, max_tokens=0, messages=[{"role": "x", "content": 1}]).message
    assert message.count("; ") == 4


def test_a_thousand_problems_make_a_short_answer() -> None:
    error = problem(messages=[{}] * 1000)
    assert "and 1980 more" in error.message
    assert len(error.message) < 2000


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"messages": "\xff"}', "not JSON"),
        (b'{"temperature": NaN}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b'"secret"', "not a JSON object"),
    ],
)
def test_a_body_that_is_no_json_object_says_so(body: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        parse_chat(body)
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(("prompt", "parsed"), [("once", "once"), (["once"], "once"), ([5, 6], (5, 6)), ("", "")])
def test_a_completions_prompt_is_text_or_token_ids(prompt: object, parsed: object) -> None:
    assert parse_completion(orjson.dumps({"prompt": prompt})).prompt == parsed


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], [], [1, "a"], [-1], [True], 5, None])
def test_any_other_prompt_is_refused(prompt: object) -> None:
    with pytest.raises(InvalidRequest, match="prompt: "):
        parse_completion(orjson.dumps({"prompt": prompt}))


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": HELLO}])
def test_tokenize_takes_a_prompt_or_messages_and_not_both(body: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match="either"):
        parse_tokenize(orjson.dumps(body))


@pytest.mark.parametrize(
    ("headers", "wishes"),
    [
        ({}, Wishes(0, None)),
        ({"x-hybridgate-priority": "-3", "x-hybridgate-first-token-by": "250"}, Wishes(-3, 0.25)),
    ],
)
def test_wishes_come_from_headers(headers: dict[str, str], wishes: Wishes) -> None:
    assert parse_wishes(headers) == wishes


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-hybridgate-priority", "soon"),
        ("x-hybridgate-priority", "1.5"),
        ("x-hybridgate-priority", "9" * 400),
        ("x-hybridgate-priority", "9" * 5000),
        ("x-hybridgate-first-token-by", "nan"),
        ("x-hybridgate-first-token-by", "inf"),
        ("x-hybridgate-first-token-by", "0"),
        ("x-hybridgate-first-token-by", "-5"),
        ("x-hybridgate-first-token-by", ""),
    ],
)
def test_a_wrong_wish_is_refused_by_its_header(header: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match=header):
        parse_wishes({header: value})


@pytest.mark.parametrize(
    ("sent", "taken"), [("abc-1", "abc-1"), ("", None), ("x" * 129, None), ("a\nb", None), ("ä", None)]
)
def test_a_request_id_is_taken_over_if_it_may_stand_in_a_header(sent: str, taken: str | None) -> None:
    assert parse_request_id({"x-request-id": sent}) == taken


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}},
            "json_schema",
            '{"type":"array"}',
        ),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a","b"]'),
        ({"guided_json": '{"type": "array"}'}, "json_schema", '{"type": "array"}'),
        ({"guided_grammar": "start: /a/"}, "lark", "start: /a/"),
    ],
)
def test_a_structure_may_be_asked_for_in_openais_and_vllms_words(fields: dict[str, Any], kind: str, text: str) -> None:
    structure = chat(**fields).structure
    assert structure is not None
    assert (structure.kind, structure.text) == (kind, text)


def test_a_structure_is_asked_for_once() -> None:
    twice = problem(response_format={"type": "json_object"}, guided_regex="a")
    assert "asked for more than once" in twice.message
