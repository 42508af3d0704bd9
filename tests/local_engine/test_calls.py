"""Tool calls: which form a template teaches, and calls told from text, however it is cut."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from local_engine.calls import (
    HERMES,
    LLAMA,
    MISTRAL,
    Arguments,
    CallBegins,
    CallReader,
    Content,
    Family,
    Said,
    family_of,
    fitting_id,
    grammar,
    new_id,
)
from local_engine.conversation import Tool
from local_engine.grammar import Grammars, Wanted
from tests.tiny_models import END, VOCABULARY

FAMILIES = [HERMES, LLAMA, MISTRAL]
WEATHER = Tool("weather", '{"type":"object","properties":{"city":{"$ref":"#/$defs/c"}},"required":["city"],'
               '"additionalProperties":false,"$defs":{"c":{"enum":["Bern","Rome"]}}}', {})  # fmt: skip
NOTHING = Tool("nothing", '{"type":"object","properties":{},"additionalProperties":false}', {})


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ('{% for t in tools %}{{ t|tojson }}{% endfor %}<tool_call>\n{"name": …, "arguments": …}', HERMES),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", MISTRAL),
        ('<|start_header_id|>{{ tools }} {"name": …, "parameters": …}', LLAMA),
        ('<tool_call> without a word of what may be called, "arguments"', None),
        ('{{ tools }}<tool_call><function=name>"arguments"', None),
        ('{{ tools }}<tool_call>name<arg_key> "arguments"', None),
        ("{{ tools }}[TOOL_CALLS]name[ARGS]", None),
        ("{{ tools }} in some other form", None),
        ("{{ messages }}", None),
    ],
)
def test_a_template_tells_in_which_form_its_model_calls(template: str, family: Family | None) -> None:
    assert family_of(template) is family


def read(family: Family, pieces: Iterable[str], *, parallel: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """Text and calls; a call's arguments never come before its beginning."""
    reader = CallReader(family, frozenset({"weather", "nothing"}), parallel=parallel)
    said: list[Said] = [one for piece in pieces for one in reader.add(piece)] + reader.end()
    calls: list[tuple[str, str]] = []
    for one in said:
        match one:
            case CallBegins(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case Arguments(index, text):
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + text)
            case Content():
                pass
    assert reader.calls == len(calls)
    return "".join(one.text for one in said if isinstance(one, Content)), calls


BERN = '{"city": "Bern \\" } ] </tool_call>", "days": [1, {"a": {}}]}'
DEEP = '{"a":' * 300 + "{}" + "}" * 300
"""Deeper than orjson writes, though it reads it."""
CASES: list[tuple[Family, str, str, list[tuple[str, str]]]] = [
    (HERMES, "just text", "just text", []),
    (HERMES, "if a < b or <tool", "if a < b or <tool", []),
    (HERMES, f'<tool_call>\n{{"name": "weather", "arguments": {BERN}}}\n</tool_call>', "", [("weather", BERN)]),
    (HERMES, 'I look.\n<tool_call>{"name":"nothing","arguments":{}}</tool_call>', "I look.", [("nothing", "{}")]),
    (
        HERMES,
        '<tool_call>\n{"name": "nothing", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "weather", '
        '"arguments": {"city": "Rome"}}\n</tool_call>\n',
        "",
        [("nothing", "{}"), ("weather", '{"city": "Rome"}')],
    ),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "nothing"}</tool_call>', "", [("nothing", '{"a":1}')]),
    (HERMES, '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "other", "arguments": {}}</tool_call>', []),
    (HERMES, f'<tool_call>{{"arguments": {DEEP}, "name": "nothing"}}</tool_call>',
     f'<tool_call>{{"arguments": {DEEP}, "name": "nothing"}}</tool_call>', []),
    (HERMES, "<tool_call>no object</tool_call> rest", "<tool_call>no object</tool_call> rest", []),
    (HERMES, '<tool_call>{"name": "weather", "arg', '<tool_call>{"name": "weather", "arg', []),
    (HERMES, '<tool_call>{"name": "weather", "arguments": {"ci', "", [("weather", '{"ci')]),
    (HERMES, '<tool_call>{"name": "nothing", "arguments": {}}</tool_call> and more', " and more", [("nothing", "{}")]),
    (LLAMA, '{"name": "weather", "parameters": {"city": "Bern"}}', "", [("weather", '{"city": "Bern"}')]),
    (LLAMA, '<|python_tag|>{"name": "nothing", "parameters": {}}; {"name": "nothing", "parameters": {}}', "",
     [("nothing", "{}"), ("nothing", "{}")]),
    (LLAMA, '{"type": "function", "name": "nothing", "parameters": {}}', "", [("nothing", "{}")]),
    (LLAMA, ' {"name": "Ann", "parameters": {}} is JSON', ' {"name": "Ann", "parameters": {}} is JSON', []),
    (LLAMA, 'Text, then {"name": "nothing", "parameters": {}}', 'Text, then {"name": "nothing", "parameters": {}}', []),
    (LLAMA, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (LLAMA, '{"a": [1, 2', '{"a": [1, 2', []),
    (LLAMA, "  ", "  ", []),
    (MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bern"}, "id": "abcdefghi"}, '
     '{"name": "nothing", "arguments": {}}]', "", [("weather", '{"city": "Bern"}'), ("nothing", "{}")]),
    (MISTRAL, '[TOOL_CALLS] [{"name": "nothing", "arguments": {}}] done', " done", [("nothing", "{}")]),
    (MISTRAL, "[TOOL_CALLS]what", "[TOOL_CALLS]what", []),
    (HERMES, '<tool_call><tool_call>{"name": "nothing", "arguments": {}}</tool_call>', "<tool_call>",
     [("nothing", "{}")]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text", "shown", "calls"), CASES, ids=[case[1][:40] for case in CASES])
def test_calls_are_told_from_text(family: Family, text: str, shown: str, calls: list[tuple[str, str]]) -> None:
    """At once, and letter by letter."""
    assert read(family, [text]) == (shown, calls)
    assert read(family, text) == (shown, calls)


@given(st.sampled_from(CASES), st.lists(st.integers(0, 160), max_size=6).map(sorted))
def test_it_does_not_matter_where_the_text_is_cut(
    case: tuple[Family, str, str, list[tuple[str, str]]], cuts: list[int]
) -> None:
    family, text, shown, calls = case
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(family, pieces) == (shown, calls)


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[", "]", "{", "}", '"name": "nothing"', ", ", '"', "\\"),
    *('"arguments": {}', '"parameters": {', ";", "\n", "é", '{"name": "nothing", "arguments": {'),
]


@given(st.sampled_from(FAMILIES), st.lists(st.sampled_from(FRAGMENTS), max_size=12))
def test_whatever_a_model_writes_the_pieces_say_what_the_whole_says(family: Family, fragments: list[str]) -> None:
    whole = read(family, ["".join(fragments)])
    assert read(family, fragments) == read(family, "".join(fragments)) == whole
    if not whole[1]:
        assert whole[0] == "".join(fragments)


def test_only_the_first_of_parallel_calls_where_one_is_wanted() -> None:
    text = '{"name": "nothing", "parameters": {}}; {"name": "weather", "parameters": {}}'
    assert read(LLAMA, text, parallel=False) == ("", [("nothing", "{}")])


def test_ids_have_the_length_that_the_family_wants() -> None:
    assert fitting_id("call_1", HERMES) == fitting_id("call_1", None) == "call_1"
    assert len({new_id("a", choice, index, MISTRAL) for choice in range(3) for index in range(3)}) == 9
    assert len(new_id("a", 0, 0, MISTRAL)) == 9
    assert new_id("a", 0, 0, HERMES).startswith("call_")


WRITTEN = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": ARGUMENTS}\n</tool_call>',
    "llama": '{"name": "weather", "parameters": ARGUMENTS}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": ARGUMENTS}]',
}


def follows(tokenizer: Tokenizer, lark: str, text: str, *, first: int | None = None) -> bool:
    """Whether the grammar takes this text as a whole answer."""
    matcher = (
        Grammars(tokenizer.to_str(), VOCABULARY, frozenset({END})).compiled(Wanted("lark", lark, "tools")).matcher()
    )
    try:
        for token in [*([] if first is None else [first]), *tokenizer.encode(text).ids]:
            matcher.add(token)
    except ValueError:
        return False
    return bool(matcher.complete or matcher.allowed()[END // 8] >> END % 8 & 1)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_required_call_is_one_of_the_tools_with_arguments_of_its_schema(tokenizer: Tokenizer, family: Family) -> None:
    lark = grammar(family, [WEATHER, NOTHING], lambda _: None, parallel=True)
    written = WRITTEN[family.name]
    good = written.replace("ARGUMENTS", '{"city": "Bern"}')
    assert follows(tokenizer, lark, good)
    assert read(family, good) == ("", [("weather", '{"city": "Bern"}')])
    for bad in ("{}", '{"city": "Oslo"}', '{"city": "Bern", "more": 1}'):
        assert not follows(tokenizer, lark, written.replace("ARGUMENTS", bad))
    assert not follows(tokenizer, lark, good.replace("weather", "other"))
    assert not follows(tokenizer, lark, "text")
    again = good + {"hermes": "\n", "llama": "; "}.get(family.name, "") + good
    if family is MISTRAL:
        again = good[:-1] + ", " + good.removeprefix("[TOOL_CALLS][")
    assert follows(tokenizer, lark, again)
    assert not follows(tokenizer, grammar(family, [WEATHER], lambda _: None, parallel=False), again)


def test_a_mark_that_is_a_special_token_is_that_token(tokenizer: Tokenizer) -> None:
    lark = grammar(MISTRAL, [NOTHING], lambda text: 3 if text == "[TOOL_CALLS]" else None, parallel=True)
    calls = '[{"name": "nothing", "arguments": {}}]'
    assert follows(tokenizer, lark, calls, first=3)
    assert not follows(tokenizer, lark, "[TOOL_CALLS]" + calls)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_call_or_an_answer_of_a_schema(tokenizer: Tokenizer, family: Family) -> None:
    lark = grammar(family, [NOTHING], lambda _: None, parallel=True, or_answer='{"type":"integer"}')
    call = WRITTEN[family.name].replace("ARGUMENTS", "{}").replace("weather", "nothing")
    assert [follows(tokenizer, lark, text) for text in (call, "42", "fox")] == [True, True, False]
