"""The gateway counts what the engine counts: its rendering of chat templates equals that of transformers."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from gateway.tokens import LocalTokenizer
from gateway.wire.chat import parse
from local_engine.calls import HERMES, family_of
from local_engine.conversation import Conversation, Message
from local_engine.protocol import parse_chat
from local_engine.text import Shown, Text

transformers = pytest.importorskip("transformers")

PLAIN = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The features that templates in the wild use: tools as JSON, namespaces, loop controls, white space control, the date,
# and marks for training.
QWEN_LIKE = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nToday is ' + strftime_now('%Y') + '.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.last = loop.index0 %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content or '' }}
        {%- endgeneration %}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' }}{{- call.function | tojson(indent=4) }}{{- '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role in ['user', 'tool'] %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {{- raise_exception('no such role') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich <&>"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "description": 'It\'s > "fine"', "parameters": {"a": [1]}}}
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hello  there "}]},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße\n{{ x }} 你好"}]},
    {
        "messages": [
            {"role": "user", "content": "How is the weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        ],
        "tools": [TOOL],
    },
]


def tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"])
    return made


@pytest.mark.parametrize("template", [PLAIN, QWEN_LIKE], ids=["plain", "qwen-like"])
@pytest.mark.parametrize("body", CHATS, ids=["user", "system", "tools"])
def test_prompts_equal_those_of_transformers(template: str, body: dict[str, Any]) -> None:
    """Text and number of tokens are those of apply_chat_template."""
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    ours = LocalTokenizer(tokenizer().to_str(), template, "<s>", "</s>", datetime.now())
    chat = parse(orjson.dumps(body))
    arguments = {"tools": body.get("tools"), "add_generation_prompt": True}
    messages = [with_parsed_arguments(message) for message in body["messages"]]
    assert ours.render(chat) == theirs.apply_chat_template(messages, tokenize=False, **arguments)
    assert ours.count(chat) == len(theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **arguments))


def with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """As transformers wants a call: its arguments are an object."""
    calls = [
        call | {"function": call["function"] | {"arguments": orjson.loads(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return message | ({"tool_calls": calls} if calls else {})


MISTRAL_LIKE = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for message in messages %}{% if message.tool_calls %}[TOOL_CALLS]["
    "{% for call in message.tool_calls %}{{ call.function | tojson }}{{ call.id }}{% endfor %}]"
    "{% elif message.role == 'tool' %}{{ message.tool_call_id }}{{ message.content }}"
    "{% else %}{{ message.content }}{% endif %}{{ eos_token }}{% endfor %}"
)


@pytest.mark.parametrize("template", [PLAIN, QWEN_LIKE, MISTRAL_LIKE], ids=["plain", "qwen-like", "mistral-like"])
@pytest.mark.parametrize("fields", [{}, {"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "none"}])
def test_the_gateway_and_the_engine_see_the_same_prompt(template: str, fields: dict[str, Any]) -> None:
    """Tools, calls with ids of another model, and results, parsed by the one and by the other."""
    messages = CHATS[2]["messages"] if template != PLAIN else CHATS[0]["messages"]
    body = orjson.dumps({"messages": messages} | (fields if template != PLAIN else {}))
    ours = LocalTokenizer(tokenizer().to_str(), template, "<s>", "</s>", datetime.now())
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), bos_token="<s>", eos_token="</s>", chat_template=template
    )

    def render(shown: Shown) -> str:
        return str(
            theirs.apply_chat_template(
                list(shown.messages),
                tools=list(shown.tools) or None,
                tokenize=False,
                add_generation_prompt=shown.opens,
            )
        )

    family = family_of(template) or HERMES
    engine = Text(
        tokenizer(), render, chat_template=template, bos_token="<s>", eos_token="</s>", eos_token_id=None, family=family
    )
    asked = parse_chat(body)
    assert isinstance(asked.prompt, Conversation)
    assert ours.count(parse(body)) == len(engine.encode_chat(asked.prompt))


def test_an_answer_that_is_continued_is_counted_whole() -> None:
    """The engine may cut a little behind it, so that its prompt is no longer than what is counted."""
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "It is"}]
    ours = LocalTokenizer(tokenizer().to_str(), QWEN_LIKE, "<s>", "</s>", datetime.now())
    plain = ours.render(parse(orjson.dumps({"messages": messages})))
    for fields in ({"continue_final_message": True}, {"add_generation_prompt": False}):
        rendered = ours.render(parse(orjson.dumps({"messages": messages} | fields)))
        assert plain == rendered + "<|im_start|>assistant\n"


def test_text_parts_are_joined_and_developer_is_system() -> None:
    """Messages are rendered as the engine reads them."""
    ours = LocalTokenizer(tokenizer().to_str(), PLAIN, "<s>", "</s>", datetime.now())
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "developer", "content": parts}, {"role": "user", "content": "c"}]}
    assert ours.render(parse(orjson.dumps(body))) == "<s><|system|>ab</s><|user|>c</s><|assistant|>"


_words = st.text(alphabet="ab <>|s/", max_size=12)
_forged = st.lists(st.sampled_from(["<s>", "</s>", "<|system|>", "hello"]) | _words, max_size=6).map("".join)


@given(st.lists(_forged.filter(bool), min_size=1, max_size=3))
def test_the_gateway_never_counts_less_than_our_engine_encodes(contents: list[str]) -> None:
    """Special tokens within a message are text to the engine, so that nobody forges a turn."""
    messages = [{"role": "user", "content": content} for content in contents]
    made = tokenizer()
    ours = LocalTokenizer(made.to_str(), PLAIN, "<s>", "</s>", datetime.now())
    chat = parse(orjson.dumps({"messages": messages}))

    def render(shown: Shown) -> str:
        return ours.render(parse(orjson.dumps({"messages": list(shown.messages)})))

    engine = Text(made, render, chat_template=PLAIN, bos_token="<s>", eos_token="</s>", eos_token_id=None)
    encoded = len(engine.encode_chat(Conversation(tuple(Message("user", content) for content in contents))))
    assert ours.count(chat) >= encoded
    if not any(token in content for content in contents for token in ("<s>", "</s>", "<|system|>")):
        assert ours.count(chat) == encoded
