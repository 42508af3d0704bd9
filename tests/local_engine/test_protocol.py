"""Bodies and headers: what is taken, what is refused, and that nothing is repeated."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest

from local_engine.conversation import Call, Conversation, Message, Tool, Tools
from local_engine.errors import InvalidRequest
from local_engine.protocol import (
    GenerationRequest,
    Wishes,
    parse_chat,
    parse_completion,
    parse_request_id,
    parse_tokenize,
    parse_wishes,
)

HELLO = [{"role": "user", "content": "hello"}]
SECRET = "4111 1111 1111 1111"
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "fox"}'}}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "other"}}
CONTINUED = [*HELLO, {"role": "assistant", "content": "I"}]


def called(arguments: str) -> dict[str, object]:
    return {"function": {"name": "f", "arguments": arguments}}


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


def chat(**fields: Any) -> GenerationRequest:
    return parse_chat(json.dumps({"messages": HELLO} | fields).encode())


def problem(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    return caught.value


def test_a_bare_chat_has_openais_defaults() -> None:
    assert chat() == GenerationRequest(
        model=None,
        prompt=Conversation((Message("user", "hello"),)),
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
    assert chat(messages=messages).prompt == Conversation((Message(*parsed),))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "tool", "content": SECRET}]}, "messages[0]"),
        ({"messages": [*HELLO, {"role": "user", "content": 41111}]}, "messages[1].content"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": SECRET}]}]},
            "messages[0].content",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 4111}]}]}, "messages[0].content"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": SECRET}]}]},
            "messages[0].tool_calls[0].function",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL | {"type": SECRET}]}]},
            "messages[0].tool_calls[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL | called("[]")]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "", "tool_call_id": "1"}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "content": "", "function_call": {"name": SECRET}}]}, "messages[0]"),
        ({"tools": [{"type": "custom", "custom": {"name": SECRET}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "no such name"}}]}, "tools[0].function.name"),
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
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),  # a division by what is 0 in float32
        ({"tool_choice": SECRET}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": SECRET}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": 4111}}}, "tool_choice"),
        ({"guided_json": nested(300)}, "guided_json"),
        ({"structured_outputs": {"json": nested(300)}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": nested(300)}}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(300)}}]}, "tools[0]"),
        ({"tools": [TOOL | {"x": nested(300)}]}, "tools[0]"),  # which a template may show
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL | called('{"a":' * 300 + "{}" + "}" * 300)]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_a_wrong_field_is_named_and_its_value_is_not_repeated(fields: dict[str, Any], param: str) -> None:
    error = problem(**fields)
    assert error.param == param
    assert error.message.startswith(f"{param}: ")
    assert "4111" not in error.message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": [TOOL, TOOL]}, "same name"),
        ({"tools": [TOOL], "tool_choice": OTHER}, "names none"),
        ({"tool_choice": "required"}, "there are no `tools`"),
        ({"continue_final_message": True}, "only an assistant's message"),
        ({"messages": CONTINUED, "continue_final_message": True, "add_generation_prompt": True}, "cannot begin"),
    ],
)
def test_fields_that_do_not_go_together_say_so(fields: dict[str, Any], said: str) -> None:
    assert said in problem(**fields).message


def test_calls_and_their_results_are_read() -> None:
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [CALL, CALL | called("")],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "a fox"}]},
    ]
    conversation = chat(messages=messages).prompt
    assert isinstance(conversation, Conversation)
    calls = (Call("1", "look", {"at": "fox"}), Call("1", "f", {}))
    assert conversation.messages[1:] == (Message("assistant", None, calls), Message("tool", "a fox", call_id="1"))
    assert conversation.uses_tools
    assert conversation.messages[1].shown() == {
        "role": "assistant",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "fox"}}},
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}},
        ],
    }


LOOK = Tool("look", '{"type":"object"}', TOOL)
UNBOUND = Tool("other", '{"type":"object","properties":{},"additionalProperties":false}', OTHER)


@pytest.mark.parametrize(
    ("fields", "tools"),
    [
        ({}, Tools((LOOK, UNBOUND), (LOOK, UNBOUND))),
        (
            {"tool_choice": "auto", "parallel_tool_calls": False},
            Tools((LOOK, UNBOUND), (LOOK, UNBOUND), parallel=False),
        ),
        ({"tool_choice": "required"}, Tools((LOOK, UNBOUND), (LOOK, UNBOUND), must=True)),
        ({"tool_choice": OTHER}, Tools((LOOK, UNBOUND), (UNBOUND,), must=True, parallel=False)),
        ({"tool_choice": "none"}, None),
    ],
)
def test_which_tools_may_be_called(fields: dict[str, Any], tools: Tools | None) -> None:
    """With none the model does not even see them."""
    parsed = chat(tools=[TOOL, OTHER], **fields)
    assert parsed.tools == tools
    assert isinstance(parsed.prompt, Conversation)
    assert parsed.prompt.tools == (() if tools is None else (LOOK, UNBOUND))


@pytest.mark.parametrize(
    ("fields", "opens", "continues"),
    [
        ({}, True, False),
        ({"add_generation_prompt": False}, False, False),
        ({"continue_final_message": True}, False, True),
    ],
)
def test_a_prompt_opens_an_answer_or_goes_on_with_one(fields: dict[str, Any], opens: bool, continues: bool) -> None:
    for parsed in (
        chat(messages=CONTINUED, **fields).prompt,
        parse_tokenize(orjson.dumps({"messages": CONTINUED} | fields)).prompt,
    ):
        assert isinstance(parsed, Conversation)
        assert (parsed.opens, parsed.continues) == (opens, continues)


@pytest.mark.parametrize(("field", "asking"), [("tools", [TOOL]), ("tool_choice", "required")])
def test_completions_have_no_tools(field: str, asking: object) -> None:
    with pytest.raises(InvalidRequest, match=f"{field}: is not supported"):
        parse_completion(orjson.dumps({"prompt": "once", field: asking}))


@pytest.mark.parametrize(
    ("field", "neutral", "asking"),
    [
        ("echo", False, True),
    ],
)
def test_what_is_not_built_is_refused_by_name_unless_it_asks_for_nothing(
    field: str, neutral: object, asking: object
) -> None:
    assert chat(**{field: neutral}) == chat()
    assert problem(**{field: asking}).message == f"{field}: is not supported by this engine"


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({}, ()),
        ({"user": "u", "store": True, "dry_multiplier": 0.8}, ("dry_multiplier", "store", "user")),
        ({"top_k": 3, "best_of": 1, "seed": None}, ()),
        ({"my password is hunter2": 1, "x" * 41: 1, "ok": 1}, ("ok",)),
    ],
    ids=["none", "of others", "known", "no names"],
)
def test_fields_that_nobody_defines_are_ignored_and_named(fields: dict[str, Any], ignored: tuple[str, ...]) -> None:
    assert chat(**fields).ignored == ignored
    assert parse_completion(orjson.dumps({"prompt": "p"} | fields)).ignored == ignored


def test_all_problems_are_reported_at_once() -> None:
    message = problem(suffix="x", temperature=9, max_tokens=0, messages=[{"role": "x", "content": 1}]).message
    assert message.count("; ") == 4


@pytest.mark.parametrize(
    "fields", [{"messages": ["x"]}, {"tools": [5]}, {"response_format": 5}, {"stream_options": []}]
)
def test_a_problem_is_told_without_names_of_our_own(fields: dict[str, Any]) -> None:
    assert problem(**fields).message.endswith(": must be an object")


def test_a_thousand_problems_make_a_short_answer() -> None:
    error = problem(messages=[{}] * 1000)
    assert "and 980 more" in error.message
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
