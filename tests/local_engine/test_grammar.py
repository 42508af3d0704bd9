"""Structures that an answer must follow: what cannot be followed is said before anything is generated, and nothing
that a caller writes can end the process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest

from local_engine.errors import InvalidRequest, Overloaded, RequestError
from local_engine.grammar import Grammar, GrammarKind, Grammars, Matcher, Patience, Wanted, compact
from local_engine.text import Text
from tests.tiny_models import END, VOCABULARY

SMALL_STACK = 1 << 20


@pytest.fixture(scope="module")
def grammars(text: Text) -> Grammars:
    return Grammars(text.tokenizer_json(), VOCABULARY, frozenset({END}))


def schema(value: Any) -> Wanted:
    return Wanted("json_schema", orjson.dumps(value).decode(), "response_format")


def chained(link: Any, count: int) -> Wanted:
    """Definitions, each of which refers to the next."""
    links = {f"d{index}": link({"$ref": f"#/$defs/d{index + 1}"}) for index in range(count)}
    return schema({"$ref": "#/$defs/d0", "$defs": links | {f"d{count}": {"type": "null"}}})


DEEP: dict[str, Wanted] = {
    "objects in objects": chained(
        lambda inner: {"type": "object", "properties": {"a": inner}, "required": ["a"]}, 2_900
    ),
    "alternatives in alternatives": chained(lambda inner: {"anyOf": [{"type": "string"}, inner]}, 4_000),
    "rules of rules": Wanted(
        "lark", "start: r0\n" + "".join(f"r{n}: r{n + 1}\n" for n in range(18_000)) + 'r18000: "a"', "guided"
    ),
    "terminals of terminals": Wanted(
        "lark", "start: A0\n" + "".join(f'A{n}: "a" A{n + 1}\n' for n in range(13_000)) + 'A13000: "a"', "guided"
    ),
}
"""Each overflowed the stack of an ordinary thread, and so ended the process."""


@pytest.mark.parametrize("name", DEEP)
def test_a_deep_structure_does_not_overflow_a_stack(grammars: Grammars, name: str) -> None:
    """Neither where it is compiled nor where it is followed, whose thread has no more than a usual stack."""
    followed: list[bytes] = []

    def follow() -> None:
        followed.append(grammars.compiled(DEEP[name]).matcher().allowed())

    before = threading.stack_size(SMALL_STACK)
    try:
        thread = threading.Thread(target=follow)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert any(followed[0])


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("json_schema", '{"$ref": "#"}'),
        ("regex", r"[^\s\S]"),
        ("lark", "start: start"),
        ("lark", "start: a\na: b\nb: a"),
        ("lark", "start: A\nA: /a/ & /b/"),
        ("json_schema", '{"items":' * 200 + "{}" + "}" * 200),
        ("json_schema", '{"items":' * 900 + "{}" + "}" * 900),
        ("json_schema", "{"),
    ],
)
def test_a_structure_that_no_answer_can_follow_is_refused(grammars: Grammars, kind: GrammarKind, form: str) -> None:
    with pytest.raises(InvalidRequest, match="guided cannot be followed: "):
        grammars.compiled(Wanted(kind, form, "guided"))


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("start: other", 'at 1(8): unknown name: "…"'),
        ('start: %json {"type": "foo"}', "at 1(8): failed to compile JSON schema: Invalid type: …"),
    ],
)
def test_a_reason_is_one_sentence(grammars: Grammars, form: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        grammars.compiled(Wanted("lark", form, "guided_grammar"))
    assert str(refused.value) == f"guided_grammar cannot be followed: {reason}"


def test_a_reason_quotes_nothing(grammars: Grammars, capfd: pytest.CaptureFixture[str]) -> None:
    """Nor does the compiler print anything of its own."""
    many = {f"secret{n}": {"type": "string"} for n in range(3_000)}
    with pytest.raises(InvalidRequest) as refused:
        grammars.compiled(schema({"$ref": "#/$defs/secret"}))
    assert "secret" not in str(refused.value)
    matcher = grammars.compiled(schema({"type": "object", "properties": many})).matcher()
    with pytest.raises(ValueError, match="grammar"):
        matcher.add(_token(matcher.allowed()))
    assert capfd.readouterr() == ("", "")


def _token(allowed: bytes) -> int:
    return next(token for token in range(VOCABULARY) if allowed[token // 8] >> token % 8 & 1)


AMBIGUOUS = "\n".join(
    ["start: s", "s: " + " | ".join(f"s r{n}" for n in range(200)) + ' | "a"', *(f"r{n}: /[a-z ]/" for n in range(200))]
)
"""Two hundred ways to read each letter, so that a token takes a while."""


def impatient(text: Text, **patience: float) -> Grammars:
    return Grammars(text.tokenizer_json(), VOCABULARY, frozenset({END}), Patience(**patience))


def test_a_structure_that_compiles_for_ever_is_given_up(text: Text) -> None:
    with pytest.raises(InvalidRequest, match=r"takes longer than 0\.01 s"):
        impatient(text, compile_seconds=0.01).compiled(DEEP["objects in objects"])


def test_no_more_than_a_few_structures_are_compiled_at_once(text: Text) -> None:
    """Their threads cannot be ended."""
    busy = impatient(text, compile_seconds=0.01, place_seconds=0.0)
    refused: list[type[RequestError]] = []
    for _ in range(3):
        with pytest.raises(RequestError) as caught:
            busy.compiled(DEEP["objects in objects"])
        refused.append(caught.type)
    assert refused == [InvalidRequest, InvalidRequest, Overloaded]


def test_a_structure_that_takes_long_for_a_token_is_given_up(text: Text) -> None:
    """Everybody's next token waits for it."""
    with pytest.raises(InvalidRequest, match="takes longer than"):
        impatient(text, token_seconds=1e-6).compiled(Wanted("lark", AMBIGUOUS, "guided_grammar"))
    matcher = impatient(text, token_seconds=60.0).compiled(Wanted("lark", AMBIGUOUS, "guided_grammar")).matcher()
    matcher.add(_token(matcher.allowed()))
    hasty = Matcher(matcher._matcher, token_seconds=1e-6)
    with pytest.raises(ValueError, match="too long"):
        hasty.allowed()


@pytest.mark.parametrize("choice", ["", "\n", '"', "\\", "/", "\x00", "\x7f", "é😀", "{}[]()*+?.|^$#-&~ "])
def test_any_text_may_be_a_choice(grammars: Grammars, text: Text, choice: str) -> None:
    grammar = grammars.compiled(Wanted("choice", orjson.dumps([choice, "other"]).decode(), "guided_choice"))
    matcher = grammar.matcher()
    for token in text.encode(choice):
        matcher.add(token)
    matcher.add(END) if not matcher.complete else None
    assert matcher.complete


def test_matchers_of_one_grammar_go_their_own_ways(grammars: Grammars, text: Text) -> None:
    """Also on different threads at the same time."""
    grammar = grammars.compiled(Wanted("regex", "(a|b|c){300}", "guided_regex"))

    def follow(grammar: Grammar, letter: str) -> bool:
        matcher = grammar.matcher()
        (token,) = text.encode(letter)
        for _ in range(300):
            assert matcher.allowed()[token // 8] >> token % 8 & 1
            matcher.add(token)
        return matcher.complete

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(follow, [grammar] * 6, "abcabc"))


def test_a_schema_is_asked_for_without_white_space_unless_it_says_how() -> None:
    assert orjson.loads(compact('{"type": "null"}'))["x-guidance"]["whitespace_flexible"] is False
    assert orjson.loads(compact('{"x-guidance": {}}')) == {"x-guidance": {}}
