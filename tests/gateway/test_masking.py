"""Masking: nothing that was found is in what leaves, and everything is back in what returns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.fold import folded
from gateway.labels import KINDS, Scanner, Span
from gateway.masking import Mask, Masked, Masker
from gateway.values import MOST_SPANS
from gateway.wire.chat import DECODINGS, parse


class Spotter:
    """Finds e-mail addresses, numbers of seven digits after the word "phone", and names between asterisks; `blind` is
    what it finds and cannot locate."""

    PATTERNS = (
        ("email", re.compile(r"[\w.]+@[\w.]+\w")),
        ("phone", re.compile(r"(?i)phone[\":,\s]+(?:is )?[0-9][0-9 \n\-]{5,}[0-9]")),
        ("staff.id", re.compile(r"\*[^*]+\*")),
        ("private_key", re.compile(r"-----BEGIN KEY-----")),
        ("badge", re.compile(r"4711")),
    )

    def __init__(self, blind: str = "") -> None:
        self._blind = blind

    def scan(self, texts: Sequence[str]) -> frozenset[str]:
        text = "\n".join(texts)
        found = {kind for kind, pattern in self.PATTERNS if pattern.search(text)}
        return frozenset(found | {"blind"} if self._blind and self._blind in text else found)

    def spans(self, text: str) -> tuple[Span, ...] | None:
        if self._blind and self._blind in text:
            return None
        found = (Span(kind, *match.span()) for kind, pattern in self.PATTERNS for match in pattern.finditer(text))
        return tuple(sorted(found, key=lambda span: span.start))


MAIL = "jane.doe@example.org"
FOUR_DEEP = orjson.dumps([orjson.dumps([orjson.dumps([r'["jane.doe\u0040example.org"]']).decode()]).decode()]).decode()
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": f"Write to {MAIL}."}]}


def masked(body: dict[str, Any], spotter: Spotter | None = None) -> Masked | None:
    return Masker(spotter or Spotter()).masked(parse(orjson.dumps(body)))


def sent(body: dict[str, Any]) -> dict[str, Any]:
    """The body as it would leave."""
    made = masked(body)
    assert made is not None
    assert made.original.body == body, "the original is not touched"
    return dict(made.chat.body)


def said(content: Any) -> Any:
    return sent({"messages": [{"role": "user", "content": content}]})["messages"][0]["content"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"to {MAIL}", "to [EMAIL_1]"),
        (f"{MAIL}, a@b.de and {MAIL}", "[EMAIL_1], [EMAIL_2] and [EMAIL_1]"),
        ("my phone is 555 123-4567", "my phone is [PHONE_1]"),
        ("my phone is 5551234567; is 555-123-4567 right?", "my phone is [PHONE_1]; is [PHONE_2] right?"),
        ("phone 15551234567, so 555 123-4567, not 555 123-4568", "phone [PHONE_1], so [PHONE_2], not 555 123-4568"),
        ("phone 1234567, order A91234567B", "phone [PHONE_1], order [PHONE_2]"),
        (f"ask *Ann*, {MAIL}", "ask [STAFF_ID_1], [EMAIL_1]"),
        ("*Bob*, *Ann*Bob*", "[STAFF_ID_1], [STAFF_ID_2]"),
        ("Zoë4711ß 47110", "[BADGE_1] [BADGE_2]"),
        ("*Ann* or ANN, *ANN*", "[STAFF_ID_1] or ANN, [STAFF_ID_2]"),
        (f'{{"to": "{MAIL}", "n": 12345678901234567890123}}', '{"to": "[EMAIL_1]", "n": 12345678901234567890123}'),
        ('{"phone": 5551234567}', '{"phone": "[PHONE_1]"}'),
        ('{"a": {"phone": "555 1234567"}}', '{"a": {"phone": "[PHONE_1]"}}'),
        (r'{"a": "jane.doe\u0040example.org", "b": 1.50}', '{"a": "[EMAIL_1]", "b": 1.50}'),
        ('{"a": "a@b.de", "a": "c@d.de"}', '{"a": "[EMAIL_1]", "a": "[EMAIL_2]"}'),
        (f'"{MAIL}"', '"[EMAIL_1]"'),
        (f"{{not json: {MAIL}", "{not json: [EMAIL_1]"),
        # What the caller wrote in the form of a placeholder stays that.
        (f"[EMAIL_1] is {MAIL}", "[EMAIL_1] is [EMAIL_A_1]"),
        (f"[email_a_7], [Email_B_1]: {MAIL}", "[email_a_7], [Email_B_1]: [EMAIL_C_1]"),
        (f"[PHONE_1] and {MAIL}", "[PHONE_1] and [EMAIL_1]"),
    ],
)
def test_what_was_found_becomes_a_placeholder_and_the_rest_stays(text: str, expected: str) -> None:
    assert said(text) == expected


def test_every_string_of_the_body_is_masked() -> None:
    """System prompt, every turn, text parts, tool calls and results, tools, names, stop strings, keys, unknown
    fields."""
    body = {
        "messages": [
            {"role": "system", "content": f"You work for {MAIL}.", "name": "a@b.de"},
            {"role": "user", "content": [{"type": "text", "text": f"I am {MAIL}"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": f'{{"{MAIL}": 1}}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": f'{{"a": "\\"{MAIL}\\"", "b": "{MAIL}"}}'},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": MAIL, "parameters": {MAIL: {}}}}],
        "stop": [MAIL],
        "user": MAIL,
        "metadata": {MAIL: MAIL},
        "a field of tomorrow": [{MAIL: [MAIL]}],
    }
    wire = orjson.dumps(sent(body)).decode()
    assert MAIL not in wire and "a@b.de" not in wire
    assert wire.count("[EMAIL_") == 14


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ([{"content": "my phone 555"}, {"content": "123 4567"}], "found in the two as one"),
        ([{"content": f"{MAIL}, phone 555"}, {"content": "123 4567"}], "one of two is split"),
        ([{"content": "my phone", "data": {"phone": 5551234567}}], "a field that takes a number"),
        ([{"content": "my phone 555 1234567", "data": [5551234567.0]}], "the same number in such a field"),
        ([{"content": f"{MAIL} -----BEGIN KEY-----\nabc"}], "only its head is found"),
        ([{"content": f"{MAIL} and jane.doe\\u0040example.org"}], "an escape in prose"),
        ([{"content": "phone 655123456 or 6\\u003551234 56"}], "the same, found only with the word before it"),
        ([{"content": FOUR_DEEP, "x": MAIL}], "nested deeper than is looked into"),
        ([{"content": f"{MAIL}", "image_url": {"url": "x"}}], None),
        ([{"content": [{"type": "image_url", "image_url": {"url": MAIL}}]}], "not only text"),
        ([{"content": f"{MAIL} " * (MOST_SPANS + 1)}], "too many"),
        ([{"content": "*Ann*" + "x" * 300}], "glued to what has no end"),
        ([{"content": "hi"}], "nothing is found"),
    ],
)
def test_what_cannot_be_masked_for_certain_is_not_masked(body: list[dict[str, Any]], why: str | None) -> None:
    made = masked({"messages": [{"role": "user"} | message for message in body]})
    assert (made is None) is (why is not None)


def test_a_detector_that_cannot_say_where_makes_the_request_unmaskable() -> None:
    assert masked(BODY, Spotter(blind="Write")) is None
    assert masked(BODY, Spotter(blind="elsewhere")) is not None


def test_the_words_around_a_phone_number_may_stand_in_another_string() -> None:
    assert sent({**BODY, "metadata": {"phone": "555 1234567"}})["metadata"] == {"phone": "[PHONE_1]"}


def test_masking_is_stable_while_a_conversation_grows() -> None:
    """So that the provider's prompt cache, and the model's earlier answers, still fit."""
    turns = [{"role": "user", "content": f"a@b.de {MAIL}"}, {"role": "user", "content": f"c@d.de {MAIL}"}]
    assert sent({"messages": turns})["messages"][0] == sent({"messages": turns[:1]})["messages"][0]


def test_two_requests_share_no_placeholders() -> None:
    first, second = masked(BODY), masked({"messages": [{"role": "user", "content": "a@b.de"}]})
    assert first and second and first.mask.restored("[EMAIL_1]") == MAIL
    assert second.mask.restored("[EMAIL_1]") == "a@b.de"
    echoed = masked({"messages": [{"role": "user", "content": "[EMAIL_1]: c@d.de"}]})
    assert echoed and echoed.mask.restored("[EMAIL_1]") == "[EMAIL_1]"


def test_no_value_is_in_what_a_traceback_or_a_log_would_show() -> None:
    made = masked(BODY)
    assert made and MAIL not in repr(made) and MAIL not in repr(made.mask)


# ---- properties ----

VALUES = [MAIL, "a@b.de", "phone 555-123-4567", "phone: 0123456789", '*O\'Hara \\ "x"*', "*Zoë\n[x*", "*[EMAIL_1]*"]
NOISE = ["", " ", "[", "]", "[EMAIL_", "1]", "[EMAIL_1]", "{", "}", '"', "\\", "\\u0040", "\u200b", "é", "𝟓", "5", "-"]
_texts = st.lists(st.sampled_from(VALUES + NOISE) | st.text(max_size=4), max_size=6).map("".join)


def _quoted(values: st.SearchStrategy[Any]) -> st.SearchStrategy[str]:
    """JSON within a string, as orjson or another program writes it."""
    escaped = st.text(st.sampled_from("ae@5"), min_size=1, max_size=1).map(lambda c: (c, f"\\u{ord(c):04x}"))
    written = values.map(lambda value: _dumped(value))
    return written | st.tuples(written, escaped).map(lambda w: w[0].replace(*w[1])) | written.map(lambda w: f" {w}\n")


def _dumped(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        return "{}"


_json = st.recursive(
    _texts | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3) | _quoted(inner),
    max_leaves=5,
)


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": draw(_texts | _quoted(_json)), "extra": draw(_json)}
        for _ in range(draw(st.integers(1, 3)))
    ]
    call = {"id": draw(_texts), "type": "function", "function": {"name": "f", "arguments": draw(_quoted(_json))}}
    turns.append({"role": "assistant", "content": None, "tool_calls": [call]})
    return {"messages": turns, draw(_texts): draw(_json), "user": draw(_texts)}


def parsed(text: str) -> Any:
    """What the text says as JSON, or the text itself."""
    try:
        return orjson.loads(text) if text.lstrip()[:1] in ("{", "[", '"') else text
    except orjson.JSONDecodeError:
        return text


def decoded(value: Any, depth: int = DECODINGS) -> Any:
    """What a value says to whoever decodes JSON within strings as often as the scanner does; numbers as text, for one
    of a JSON text that was masked comes back so."""
    if isinstance(value, str):
        inner = parsed(value) if depth else value
        return decoded(inner, depth - 1) if inner != value else value
    if isinstance(value, list):
        return [decoded(inner, depth) for inner in value]
    if isinstance(value, dict):
        return {decoded(key, 0): decoded(inner, depth) for key, inner in value.items()}
    return str(value) if type(value) in (int, float) else value


def put_back(masked: Any, as_was: Any, mask: Mask, depth: int = DECODINGS) -> Any:
    """The same of what was masked, with placeholders put back, where the value before was JSON: a text that was none
    may be one while it is masked."""
    if isinstance(as_was, str):
        inner = parsed(as_was) if depth else as_was
        return put_back(parsed(masked), inner, mask, depth - 1) if inner != as_was else mask.restored(masked)
    if isinstance(as_was, list):
        return [put_back(one, was, mask, depth) for one, was in zip(masked, as_was, strict=True)]
    if isinstance(as_was, dict):
        pairs = zip(masked.items(), as_was.items(), strict=True)
        return {mask.restored(key): put_back(one, was, mask, depth) for (key, one), (_, was) in pairs}
    return mask.restored(masked) if isinstance(masked, str) else decoded(masked)


def strings(value: Any) -> list[str]:
    """All strings within, as they are and decoded."""
    if isinstance(value, str):
        inner = parsed(value)
        return [value] if inner == value else [value, *strings(inner)]
    if isinstance(value, dict):
        return [text for item in value.items() for inner in item for text in strings(inner)]
    return [text for inner in value for text in strings(inner)] if isinstance(value, list) else []


@given(bodies())
@settings(max_examples=300, deadline=None)
@example({"messages": [{"role": "user", "content": f"[EMAIL_{MAIL}1]"}], "user": "[EMAIL_1]"})
@example({"messages": [{"role": "user", "content": ""}], "": '"*O\'Hara \\ "x"*"'})
def test_nothing_that_was_found_leaves_and_all_of_it_comes_back(body: dict[str, Any]) -> None:
    chat = parse(orjson.dumps(body))
    spotter = Spotter()
    made = Masker(spotter).masked(chat)
    if made is None:
        return
    spans = spotter.spans("\n".join(chat.texts))
    assert spans and not made.found()
    wire = orjson.dumps(made.chat.body).decode()
    for span in spans:
        value = "\n".join(chat.texts)[span.start : span.end]
        secret = re.sub(r"(?i)^phone\W*(is )?", "", value)
        for form in (secret, orjson.dumps(secret).decode()[1:-1]):
            assert form not in wire
            assert not any(form in text for text in strings(made.chat.body))
        if span.kind == "phone":
            number = re.sub(r"\D", "", secret)
            assert not any(number in re.sub(r"[ \-\n]", "", text) for text in strings(made.chat.body))
    assert put_back(made.chat.body, chat.body, made.mask) == decoded(chat.body)


# ---- with the detectors there are ----

# What is found, and what of it must not be seen anywhere.
FOUND = [
    (MAIL, MAIL),
    ("jane.doe at example dot com", "jane.doe"),
    ('"jane doe"@example.org', "jane doe"),
    ("jane\u200b.doe@exam\u200bple.org", MAIL),
    ("ｊａｎｅ.doe＠example.org", MAIL),
    ("bob@exämple.de", "bob@exämple.de"),
    ("4111 1111 1111 1111", "4111111111111111"),
    ("４１１１ １１１１ １１１１ １１１１", "4111111111111111"),
    ("DE89 3704 0044 0532 0130 00", "DE89370400440532013000"),
    ("+1 555 234 5678", "5552345678"),
    ("call me at 5552345678", "5552345678"),
    ("phone: 030 1234567", "0301234567"),
    ("ssn 123456789", "123456789"),
    ("AKIAIOSFODNN7ABCDEFG", "AKIAIOSFODNN7ABCDEFG"),
    ("api_key=Zx81kQpL92mNvB47sD", "Zx81kQpL92mNvB47sD"),
    ("password: Xk29fJq8LmZ0pWt4!x", "Xk29fJq8LmZ0pWt4!x"),
    ("https://bob:s3cretPw@db.example.com/x", "s3cretPw"),
]
SCANNER = Scanner(KINDS)
BETWEEN = [" ", ", ", ".\n", "\t", " and ", " my number is ", '"', "\\n", "\\", "é", "{", "[", "[EMAIL_1]", "(", "😀"]
_apart = st.lists(st.sampled_from(FOUND) | st.sampled_from(BETWEEN), min_size=1, max_size=6)


def read(text: str) -> str:
    """Letters and digits as a reader takes them in."""
    return re.sub(r"[\W_]", "", folded(text)).casefold()


@st.composite
def private(draw: st.DrawFn) -> tuple[dict[str, Any], set[str]]:
    """A body, and what of it is private."""
    secrets: set[str] = set()

    def text() -> str:
        pieces = draw(_apart)
        secrets.update(piece[1] for piece in pieces if isinstance(piece, tuple))
        made = "".join(f" {piece[0]} " if isinstance(piece, tuple) else piece for piece in pieces)
        # Between quotes a placeholder is JSON where the value was none, which only `decoded` would take for a change.
        return f"{made}." if made.rstrip().endswith('"') else made

    arguments = _dumped({"phone": text(), text(): [text()]})
    if draw(st.booleans()):
        arguments = arguments.replace("e", "\\u0065")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": text()}], text(): text()},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": _dumped([text(), {"mail": text()}])},
    ]
    return {"messages": messages, "user": text()}, secrets


@given(private())
@settings(max_examples=60, deadline=None)
def test_nothing_private_is_read_in_what_leaves(made: tuple[dict[str, Any], set[str]]) -> None:
    body, secrets = made
    got = Masker(SCANNER).masked(parse(orjson.dumps(body)))
    if got is None:
        return
    seen = [read(text) for text in strings(got.chat.body)] + [read(orjson.dumps(got.chat.body).decode())]
    for secret in secrets:
        assert not any(read(secret) in text for text in seen), secret
    assert put_back(got.chat.body, body, got.mask) == decoded(body)


@pytest.mark.parametrize(("text", "secret"), FOUND)
def test_whatever_is_found_can_be_masked(text: str, secret: str) -> None:
    """Alone, in a sentence, as an argument of a tool, and again without the words that gave it away."""
    for around in ("{}", "Please note {} for later.", "{}\nThanks"):
        for content in (around.format(text), _dumped({"a": around.format(text)}), _dumped([_dumped([text])])):
            got = Masker(SCANNER).masked(parse(orjson.dumps({"messages": [{"role": "user", "content": content}]})))
            assert got is not None, content
            assert read(secret) not in read(got.chat.body["messages"][0]["content"])
            assert put_back(got.chat.body, got.original.body, got.mask) == decoded(got.original.body)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_placeholder_is_never_found(kind: str) -> None:
    for number in (1, 12, "A_1", 123456):
        mark = f"[{kind.upper()}_{number}]"
        for text in (mark, f"{kind}: {mark}", f'{{"{kind}": "{mark}"}}', f"my {kind} is {mark}{mark}, not {mark}"):
            assert not SCANNER.scan([text])


def test_a_private_key_is_never_masked() -> None:
    key = "-----BEGIN PRIVATE KEY-----\n" + "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7" * 3
    assert SCANNER.scan([key]) and Masker(SCANNER).masked(parse(orjson.dumps(BODY | {"user": key}))) is None
