"""What a chat body may be, what it is told when it is not, and what is read out of it."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import BadRequest
from gateway.types import ChatRequest
from gateway.wire.chat import MOST_LEVELS, parse

USER = {"role": "user", "content": "hello"}
SECRET = "Xq7-never-to-be-repeated"


def chat(*messages: Any, **fields: Any) -> ChatRequest:
    return parse(orjson.dumps({"messages": list(messages) or [USER], **fields}))


def refusal(body: bytes) -> BadRequest:
    with pytest.raises(BadRequest) as refused:
        parse(body)
    return refused.value


_TOO_DEEP = "The body is nested too deeply: at most 254 levels are read."


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The body is empty: send a JSON object with `messages`."),
        (b" \n", "The body is empty: send a JSON object with `messages`."),
        (b"hello", "The body is not valid JSON: line 1, column 1."),
        (b'{"messages": [\n{"role": }]}', "The body is not valid JSON: line 2, column 10."),
        (b'{"messages": NaN}', "The body is not valid JSON: line 1, column 14."),
        (b'{"messages": "\xff"}', "The body is not UTF-8: the byte at offset 14 begins no character."),
        (b'{"messages": "\\ud800"}', "The body is not valid JSON: line 1, column 15."),
        (b"[]", "The body must be a JSON object with `messages`."),
        (b"null", "The body must be a JSON object with `messages`."),
        (b"[" * 100_000, _TOO_DEEP),
        (b'{"a":' * 100_000, _TOO_DEEP),
        (b'{"messages": [], "a": ' + b"[" * 254 + b"]" * 254 + b"}", _TOO_DEEP),
    ],
    ids=[
        "empty",
        "blank",
        "text",
        "cut",
        "nan",
        "utf-8",
        "surrogate",
        "list",
        "null",
        "deep lists",
        "deep objects",
        "deep enough to read, not to write",
    ],
)
def test_says_what_is_wrong_with_a_body_that_is_no_json_object(body: bytes, message: str) -> None:
    """Each way of not being a JSON object has its sentence."""
    assert refusal(body).message == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": None}, "messages: must be a list"),
        ({"messages": []}, "messages: must not be empty"),
        ({"messages": ["x"]}, "messages.0: must be an object"),
        ({"messages": [{"content": "x"}]}, "messages.0.role: is required"),
        (
            {"messages": [{"role": SECRET, "content": "x"}]},
            "messages.0.role: must be one of system, developer, user, assistant, tool, function",
        ),
        ({"messages": [USER, {"role": "user"}]}, "messages.1.content: is required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: must be a string or a list of parts"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content: must be a string or a list of parts"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content: must not be empty"),
        ({"messages": [{"role": "user", "content": [SECRET]}]}, "messages.0.content.0: must be an object"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages.0.content.0.type: is required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages.0.content.0.text: must be a string",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.image_url.url: is required",
        ),
        (
            {"messages": [{"role": "assistant"}]},
            "messages.0.content: is required where an assistant message has no tool_calls",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]},
            "messages.0.tool_calls.0.function.arguments: must be a string",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id: is required"),
        ({"model": ""}, "model: must not be empty"),
        ({"model": 5}, "model: must be a string"),
        ({"stream": "yes"}, "stream: must be true or false"),
        ({"stream_options": {}}, "stream_options: is only allowed together with stream: true"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage: must be true or false",
        ),
        ({"max_tokens": 0}, "max_tokens: must be at least 1"),
        ({"max_tokens": -1}, "max_tokens: must be at least 1"),
        ({"max_tokens": 1.5}, "max_tokens: must be an integer"),
        ({"max_tokens": True}, "max_tokens: must be an integer"),
        ({"max_completion_tokens": "9"}, "max_completion_tokens: must be an integer"),
        ({"temperature": 9}, "temperature: must be at most 2"),
        ({"temperature": "0.5"}, "temperature: must be a number"),
        ({"top_p": -0.1}, "top_p: must be at least 0"),
        ({"top_k": -2}, "top_k: must be at least -1"),
        ({"n": 129}, "n: must be at most 128"),
        ({"n": 0}, "n: must be at least 1"),
        ({"stop": ["a"] * 5}, "stop: must have at most 4 items"),
        ({"stop": 5}, "stop: must be a string or a list"),
        ({"stop": ["a", 5]}, "stop.1: must be a string"),
        ({"seed": 2**63}, "seed: must be at most 9223372036854775807"),
        ({"presence_penalty": 3}, "presence_penalty: must be at most 2"),
        ({"frequency_penalty": -3}, "frequency_penalty: must be at least -2"),
        ({"logit_bias": {SECRET: 101}}, "logit_bias: must map token ids to numbers from -100 to 100"),
        ({"tools": [{"type": "function"}]}, "tools.0.function: is required"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name: must not be empty"),
        ({"tools": {}}, "tools: must be a list"),
        ({"tool_choice": SECRET}, "tool_choice: must be 'none', 'auto' or 'required' or an object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: is required"),
        ({"response_format": "json"}, "response_format: must be an object"),
        ({"top_logprobs": 21}, "top_logprobs: must be at most 20"),
        ({"user": 5}, "user: must be a string"),
    ],
)
def test_names_the_field_that_is_wrong(fields: dict[str, Any], message: str) -> None:
    """A wrong field is named with what it must be, and nothing that was sent is repeated."""
    error = refusal(orjson.dumps({"messages": [USER], **fields}))
    assert error.message == message
    assert error.param == message.partition(":")[0]


def test_reports_all_mistakes_at_once_up_to_ten() -> None:
    """The list is in the order of the fields, and `param` names the first."""
    error = refusal(orjson.dumps({"messages": [{"role": "user", "content": 5}], "temperature": 9, "n": 0, "stream": 1}))
    assert error.message == (
        "messages.0.content: must be a string or a list of parts; stream: must be true or false; "
        "temperature: must be at most 2; n: must be at least 1"
    )
    assert error.param == "messages.0.content"
    many = refusal(orjson.dumps({"messages": [{"role": "user", "content": 5}] * 50}))
    assert many.message.count("must be") == 10


def test_a_hundred_thousand_wrong_messages_are_one_error() -> None:
    """The cost of a refusal does not grow with the number of mistakes."""
    error = refusal(orjson.dumps({"messages": [{}] * 100_000}))
    assert error.message == "messages: must have at most 16384 items"


def test_never_repeats_what_was_sent() -> None:
    """Neither the message nor the exception's chain holds a value or a key of the caller's."""
    messages = [
        {"role": SECRET, SECRET: SECRET},
        {"role": "user", "content": [{"type": SECRET, "text": {SECRET: 1}}, SECRET]},
    ]
    for body in (
        orjson.dumps(
            {"messages": messages, "temperature": SECRET, "logit_bias": {SECRET: SECRET}, "tool_choice": SECRET}
        ),
        f'{{"{SECRET}": {SECRET}'.encode(),
    ):
        error = refusal(body)
        assert SECRET not in error.message + str(error.param)
        assert error.__suppress_context__ or error.__context__ is None


def test_takes_what_openai_defines() -> None:
    """The defaults, and each field that the gateway itself looks at."""
    plain = chat()
    assert (plain.model, plain.stream, plain.include_usage, plain.max_tokens, plain.n) == (
        "auto",
        False,
        False,
        None,
        1,
    )
    assert (plain.tools, plain.images, plain.schema, plain.parts) == (False, False, False, frozenset())
    full = chat(model="m", stream=True, stream_options={"include_usage": True}, max_tokens=5, n=2)
    assert (full.model, full.stream, full.include_usage, full.max_tokens, full.n) == ("m", True, True, 5, 2)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 5),
        ({"max_tokens": 9, "max_completion_tokens": 7}, 7),
        ({"max_tokens": None, "max_completion_tokens": 7}, 7),
    ],
)
def test_the_smaller_bound_of_the_answer_holds(fields: dict[str, Any], expected: int) -> None:
    """Where both names are given, neither is exceeded."""
    assert chat(**fields).max_tokens == expected


def test_null_means_not_given() -> None:
    """Clients send null for what they leave open."""
    names = ("model", "stream", "stream_options", "max_tokens", "temperature", "n", "stop", "tools", "response_format")
    request = chat(**dict.fromkeys(names))
    assert (request.model, request.n, request.tools, request.schema) == ("auto", 1, False, False)


def test_unknown_fields_are_kept_at_every_level() -> None:
    """The body is what was sent, the gateway's ignorance notwithstanding."""
    body = {
        "messages": [
            {**USER, "x": 1, "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}
        ],
        "min_p": 0.1,
        "guided_json": {"a": [None]},
        "stream": True,
        "stream_options": {"include_usage": True, "y": 2},
    }
    assert parse(orjson.dumps(body)).body == body


def test_of_two_equal_keys_the_last_one_counts() -> None:
    """What is scanned and forwarded is what was parsed."""
    request = parse(b'{"messages":[{"role":"user","content":"a","content":"b"}],"model":"x","model":"y"}')
    assert (request.model, request.texts) == ("y", ("b", "y"))
    assert request.body["messages"] == [{"role": "user", "content": "b"}]


@pytest.mark.parametrize(
    ("messages", "fields", "expected"),
    [
        ([USER], {"tools": []}, False),
        ([USER], {"tools": [{"type": "function", "function": {"name": "f"}}]}, True),
        ([USER], {"functions": [{"name": "f"}]}, True),
        ([USER, {"role": "tool", "content": "x", "tool_call_id": "1"}], {}, True),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}], {}, True),
    ],
)
def test_sees_tools(messages: list[dict[str, Any]], fields: dict[str, Any], expected: bool) -> None:
    """Tools are offered, called or answered."""
    assert chat(*messages, **fields).tools is expected


@pytest.mark.parametrize(
    ("response_format", "expected"),
    [
        (None, False),
        ({"type": "text"}, False),
        ({"type": "json_object"}, True),
        ({"type": "json_schema", "json_schema": {"name": "s", "schema": {}}}, True),
        ({"type": "grammar"}, True),
    ],
)
def test_sees_structured_output(response_format: Any, expected: bool) -> None:
    """Any format but text needs a deployment that can follow it."""
    assert chat(response_format=response_format).schema is expected


@pytest.mark.parametrize(
    ("content", "fields", "expected"),
    [
        ([{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}], {}, set()),
        ([{"type": "image_url", "image_url": {"url": "https://x/y.png"}}], {}, {"image_url"}),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}], {}, {"image_url", "base64"}),
        ([{"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}], {}, {"input_audio"}),
        ([{"type": "file", "file": {"file_id": "f-1"}}], {}, {"file", "held"}),
        ([{"type": SECRET, "x": 1}], {}, {"unknown"}),
        ("look: data:text/plain;base64,SGVsbG8=", {}, {"base64"}),
        ("QUJD" * 128, {}, {"base64"}),
        ("\n".join(["QUJD" * 19] * 9), {}, {"base64"}),
        ("a word " * 200, {}, set()),
        ("f" * 128, {}, set()),
        ("hello", {"previous_response_id": "r"}, {"held"}),
        ("hello", {"conversation": {"id": "c"}}, {"held"}),
        ("hello", {"tools": [{"type": "file_search", "vector_store_ids": ["v"]}]}, {"held"}),
        ("hello", {"tools": [{"type": "mcp", "server_url": "https://x"}]}, {"held"}),
        ("hello", {"tools": [{"type": "web_search"}]}, set()),
        (
            "hello",
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"file_id": {}}}}}]},
            set(),
        ),
        ("hello", {"previous_response_id": None}, set()),
        ("hello", {"container": {"id": "c"}}, {"held"}),
        ("hello", {"cachedContent": "cachedContents/1"}, {"held"}),
        ([{"type": "text", "text": "x", "fileUri": "files/1"}], {}, {"held"}),
    ],
)
def test_sees_what_cannot_be_read(content: Any, fields: dict[str, Any], expected: set[str]) -> None:
    """Media, encoded files, ids of what a provider holds, and every unknown kind of part."""
    assert chat({"role": "user", "content": content}, **fields).parts == expected


def test_an_answer_that_a_provider_holds_as_audio_is_held() -> None:
    """An assistant's audio is known to its provider by id alone."""
    request = chat(USER, {"role": "assistant", "audio": {"id": "audio_1"}})
    assert request.parts == {"held"}
    assert chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}).images


@pytest.mark.parametrize(
    ("messages", "fields", "expected"),
    [
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], {}, ["a", "b"]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            {},
            ["a", "b", "ab"],
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b ", "c")]}],
            {},
            ["a", "b ", "c", "ab c"],
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a\n"}, {"type": "text", "text": "b"}]}],
            {},
            ["a\n", "b"],
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "x", "y": "z"}]}],
            {},
            ["a", "x", "y", "z"],
        ),
        ([{"role": "user", "content": "a", "name": "n"}], {"user": "u", "stop": ["s"]}, ["a", "n", "u", "s"]),
        ([{"role": "user", "content": "a"}], {"metadata": {"card": "4111"}}, ["a", "card", "4111"]),
        ([{"role": "user", "content": "a"}], {"x": {"role": "r", "type": "t"}}, ["a", "x", "r", "t"]),
        (
            [{"role": "user", "content": "a"}],
            {"x": [4111111111111111, 12, 1e15, 1234567.5, True, None]},
            ["a", "x", "4111111111111111", "1000000000000000", "1234567.5"],
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"c":"\\u0034\\u0031"}'}}]}],
            {},
            ["f", '{"c":"\\u0034\\u0031"}', '{"c":"41"}', "c", "41"],
        ),
        (
            [{"role": "user", "content": '{"c":"\\u0034\\u0031","c":0}'}],
            {},
            ['{"c":"\\u0034\\u0031","c":0}', '{"c":"41","c":0}', "c"],
        ),
        ([{"role": "user", "content": "so \\\\\\\\u0034\\\\u0031"}], {}, ["so \\\\\\\\u0034\\\\u0031", "so 41"]),
        ([{"role": "user", "content": "a&#64;b&#x2E;de"}], {}, ["a&#64;b&#x2E;de", "a@b.de"]),
        ([{"role": "user", "content": "&#9999999; &#99999999"}], {}, ["&#9999999; &#99999999"]),
        (
            [{"role": "user", "content": "+1&nbsp;2&ndash;3 a&commat;b&period;de"}],
            {},
            ["+1&nbsp;2&ndash;3 a&commat;b&period;de", "+1\u00a02\u20133 a@b.de"],
        ),
        ([{"role": "user", "content": "a && b &amp; c&eacute; ?x=1&num=2"}], {}, ["a && b &amp; c&eacute; ?x=1&num=2"]),
        (
            [{"role": "user", "content": "GET /?tel=%2B49%20171&m=a%40b.de%C3%BC"}],
            {},
            ["GET /?tel=%2B49%20171&m=a%40b.de%C3%BC", "GET /?tel=+49 171&m=a@b.deü"],
        ),
        ([{"role": "user", "content": "50% of 100%, %d and %s, C:\\x"}], {}, ["50% of 100%, %d and %s, C:\\x"]),
        (
            [{"role": "user", "content": "WARN ssn:\\n078\\\\t05 3\\/4"}],
            {},
            ["WARN ssn:\\n078\\\\t05 3\\/4", "WARN ssn:\n078\t05 3/4"],
        ),
        ([{"role": "user", "content": '{"a":"x\\ny"}'}], {}, ['{"a":"x\\ny"}', "a", "x\ny"]),
        ([{"role": "user", "content": "so \\u0034\\u0031 it"}], {}, ["so \\u0034\\u0031 it", "so 41 it"]),
        ([{"role": "user", "content": "\\ud83d\\ude00"}], {}, ["\\ud83d\\ude00", "😀"]),
    ],
)
def test_collects_every_text_in_order(messages: list[Any], fields: dict[str, Any], expected: list[str]) -> None:
    """Strings at any depth, keys that are the caller's, long numbers, and escaped text within strings."""
    assert list(chat(*messages, **fields).texts) == expected


def test_reads_as_deep_as_the_parser() -> None:
    """Many levels neither overflow the stack nor hide a string."""
    body = b'{"messages":[{"role":"user","content":"a"}],"x":' + b"[" * 250 + b'"deep"' + b"]" * 250 + b"}"
    assert parse(body).texts == ("a", "x", "deep")


def test_decodes_strings_within_strings_a_few_times_only() -> None:
    """Text that is JSON within JSON is read, and nothing decodes for ever."""
    text = '"\\u0034111"'
    for _ in range(2):
        text = orjson.dumps([text]).decode()
    assert chat({"role": "user", "content": text}).texts[-1] == "4111"
    for _ in range(12):
        text = orjson.dumps([text]).decode()
    assert len(chat({"role": "user", "content": text}).texts) <= 8


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "tool_calls", "function", "name", "arguments", "image_url"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
FIELDS = [
    "messages",
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "temperature",
    "stop",
    "tools",
    "tool_choice",
    "response_format",
    "logit_bias",
    "functions",
    "function_call",
    "audio",
    "metadata",
    "n",
]


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_bad_request(body: bytes) -> None:
    """Random bytes raise `BadRequest` and nothing else."""
    refusal(body)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.lists(JSON, max_size=3))
def test_any_json_is_parsed_or_refused(fields: dict[str, Any], messages: list[Any]) -> None:
    """Random JSON in the API's own fields is either a request or a `BadRequest` whose every sentence is ours."""
    for body in ({**fields}, {**fields, "messages": [USER, *messages]}):
        try:
            parsed = parse(orjson.dumps(body))
        except BadRequest as error:
            assert error.message
            assert "Input should" not in error.message
        else:
            assert parsed.body == orjson.loads(orjson.dumps(body))


@given(st.integers(1, 400))
def test_what_is_read_can_be_written_again_however_deep_it_is(levels: int) -> None:
    body = b'{"messages": [{"role": "user", "content": "hi"}], "a": ' + b"[" * levels + b"]" * levels + b"}"
    try:
        read = parse(body)
    except BadRequest as error:
        assert error.message == _TOO_DEEP and levels >= MOST_LEVELS
    else:
        assert orjson.loads(orjson.dumps(read.body)) == orjson.loads(body) and levels < MOST_LEVELS


@pytest.mark.parametrize("field", ["image_url", "input_audio", "file"])
def test_a_part_that_calls_itself_text_and_holds_something_else_is_unscannable(field: str) -> None:
    part = {"type": "text", "text": "look", field: {"url": "https://example.com/scan.png"}}
    assert field in parse(orjson.dumps({"messages": [{"role": "user", "content": [part]}]})).parts
