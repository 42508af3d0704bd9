"""The bound holds for every encoding, exact counts are exact, and nothing is counted that need not be."""

from __future__ import annotations

import os
import unicodedata
from datetime import datetime
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from gateway.encodings import ENCODINGS, load_encoding
from gateway.tokens import (
    ALLOWANCE,
    TOKENS_PER_MEDIA_PART,
    LocalTokenizer,
    TiktokenCounter,
    count,
    near,
    undecided,
)
from gateway.types import ChatRequest, Deployment, TokenCount
from gateway.wire.chat import parse

NOW = datetime(2026, 11, 23)
COUNTERS = {name: TiktokenCounter(load_encoding(name)) for name in ENCODINGS}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_of(*contents: Any, **fields: Any) -> ChatRequest:
    return parse(orjson.dumps({"messages": [{"role": "user", "content": content} for content in contents], **fields}))


def byte_tokenizer() -> Tokenizer:
    """The worst byte-level BPE: no merges, one token a byte, after a normalizer that may grow the text."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


LOCAL = LocalTokenizer(byte_tokenizer().to_str(), CHATML, None, "<|im_end|>", NOW)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@settings(deadline=None)
@given(st.lists(ANY_TEXT, min_size=1, max_size=5), st.one_of(st.none(), ANY_TEXT))
def test_the_bound_is_never_exceeded(contents: list[str], name: str | None) -> None:
    """No encoding makes more tokens of a request than its bound, whatever characters it holds."""
    tool = {
        "type": "function",
        "function": {"name": "f", "description": name or "", "parameters": {"a": [{}, {"b": 1}]}},
    }
    chat = chat_of(*contents, **({} if name is None else {"tools": [tool]}))
    bound = count(chat).bound
    assert LOCAL.count(chat) <= bound
    assert all(counter.count(chat) <= bound for counter in COUNTERS.values())


@pytest.mark.parametrize("text", ["\U0001d160" * 100, "क़" * 100, "ﬁ" * 100, "한국어" * 50, "\x00" * 100])
def test_the_bound_holds_where_normalization_grows_text(text: str) -> None:
    """Some characters are longer in NFC, which some tokenizers read."""
    chat = chat_of(text)
    assert LOCAL.count(chat) >= len(unicodedata.normalize("NFC", text).encode())
    assert LOCAL.count(chat) <= count(chat).bound


def test_the_estimate_is_near_for_prose() -> None:
    """A quarter of the bytes is within 40 % of what OpenAI's encodings make of English prose."""
    chat = chat_of(
        "A gateway stands in front of local and cloud language models. An application points its base address at it, "
        "operators write down what must never happen and what they prefer, and each request goes to the deployment "
        "that is permitted and fits best. " * 10
    )
    for name in ("o200k_base", "cl100k_base"):
        assert 0.6 <= count(chat).estimate / COUNTERS[name].count(chat) <= 1.4


def test_openai_chats_are_counted_as_documented() -> None:
    """OpenAI's cookbook gives 129 tokens (gpt-4) and 124 (gpt-4o) for this conversation."""
    messages = [
        {
            "role": "system",
            "content": "You are a helpful, pattern-following assistant that translates corporate jargon "
            "into plain English.",
        },
        {"role": "system", "name": "example_user", "content": "New synergies will help drive top-line growth."},
        {
            "role": "system",
            "name": "example_assistant",
            "content": "Things working well together will increase revenue.",
        },
        {
            "role": "system",
            "name": "example_user",
            "content": "Let's circle back when we have more bandwidth to touch base on opportunities "
            "for increased leverage.",
        },
        {
            "role": "system",
            "name": "example_assistant",
            "content": "Let's talk later when we're less busy about how to do better.",
        },
        {
            "role": "user",
            "content": "This late pivot means we don't have time to boil the ocean for the client deliverable.",
        },
    ]
    chat = parse(orjson.dumps({"messages": messages}))
    assert COUNTERS["cl100k_base"].count(chat) == 129
    assert COUNTERS["o200k_base"].count(chat) == 124


def test_a_run_of_a_million_spaces_is_counted() -> None:
    """What overflows the stack of tiktoken's patterns when read at once is read in pieces."""
    tokens = COUNTERS["o200k_base"].count(chat_of(" " * 1_000_000 + "x"))
    assert 1_000_000 / 128 <= tokens <= 10_000


def test_a_picture_counts_as_an_allowance() -> None:
    """The base64 of a picture is no prompt text."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBORw0KGgo" * 10_000}}
    chat = chat_of([{"type": "text", "text": "What is this?"}, picture])
    plain = count(chat_of([{"type": "text", "text": "What is this?"}]))
    assert plain.bound < count(chat).bound <= plain.bound + TOKENS_PER_MEDIA_PART + 1
    assert COUNTERS["o200k_base"].count(chat) > TOKENS_PER_MEDIA_PART


def deployment(name: str, window: int | None, tokenizer: str) -> Deployment:
    return Deployment(name=name, backend="openai", model=name, zone="z", window=window, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("bound", "max_tokens", "window", "tokenizer", "expected"),
    [
        (1_000, 100, 1_100, "t", False),  # the bound shows that it fits
        (1_001, 100, 1_100, "t", True),  # it may fit
        (1_001, 100, None, "t", False),  # no window to keep
        (1_001, 100, 1_100, "bytes", False),  # nothing to count with
        (1_001, 1_100, 1_100, "t", False),  # the answer alone fills the window
        (35_200, 100, 1_100, "t", True),
        (35_201, 100, 1_100, "t", False),  # no text is that dense
        (1_001, 100, 1_100, "known", False),  # counted already
    ],
)
def test_counts_exactly_only_where_the_bound_cannot_tell(
    bound: int, max_tokens: int, window: int | None, tokenizer: str, expected: bool
) -> None:
    """A tokenizer is asked where its deployment's window is neither surely kept nor surely exceeded."""
    prompt = TokenCount(bound, bound // 4, {"known": 1_050})
    names = undecided(prompt, max_tokens, [deployment("d", window, tokenizer)])
    assert names == (frozenset({tokenizer}) if expected else frozenset())


@pytest.mark.parametrize(
    ("threshold", "tokenizer", "expected"),
    [(499, "t", False), (500, "t", True), (2_000, "t", True), (2_001, "t", False), (1_000, "bytes", False)],
)
def test_counts_exactly_where_a_rules_number_is_near(threshold: int, tokenizer: str, expected: bool) -> None:
    """Within 2 to 8 bytes a token either side of it may be right."""
    names = near(TokenCount(4_200, 1_000), [(tokenizer, threshold), ("far", 10)])
    assert names == (frozenset({tokenizer}) if expected else frozenset())


def test_a_bound_below_a_rules_number_needs_no_count() -> None:
    assert near(TokenCount(1_500, 1_000), [("t", 1_500)]) == {"t"}
    assert near(TokenCount(1_500, 1_000), [("t", 1_501)]) == frozenset()


def test_a_template_that_refuses_leaves_the_bound() -> None:
    """The engine will say why; the window is judged by the bound."""
    refusing = LocalTokenizer(byte_tokenizer().to_str(), "{{ raise_exception('no') }}", None, None, NOW)
    chat = chat_of("hello")
    assert refusing.count(chat) == count(chat).bound


@pytest.mark.parametrize(
    ("tokenizer_json", "template"), [("{}", CHATML), ("nonsense", CHATML), (byte_tokenizer().to_str(), "{% if %}")]
)
def test_refuses_what_cannot_be_read(tokenizer_json: str, template: str) -> None:
    """A broken tokenizer file or template is one ValueError."""
    with pytest.raises(ValueError, match="cannot be read"):
        LocalTokenizer(tokenizer_json, template, None, None, NOW)


def test_a_template_cannot_reach_python() -> None:
    """A model's template is foreign code: it renders text and nothing else."""
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    chat = chat_of("hello")
    assert LocalTokenizer(byte_tokenizer().to_str(), escape, None, None, NOW).count(chat) == count(chat).bound


@pytest.mark.parametrize("name", ENCODINGS)
def test_loading_an_encoding_leaves_the_environment_alone(name: str) -> None:
    """The variable that steers tiktoken is as it was, and the encoding is the one that was asked for."""
    before = dict(os.environ)
    assert load_encoding(name).name == name
    assert dict(os.environ) == before


def test_an_unknown_encoding_is_refused() -> None:
    """What is not carried is not downloaded."""
    with pytest.raises(ValueError, match="no encoding 'r50k_base' is carried"):
        load_encoding("r50k_base")


def test_allowance_covers_the_template_of_an_empty_message() -> None:
    """What ChatML writes around a message is less than the message's own JSON and the allowance."""
    chat = chat_of("")
    assert LOCAL.count(chat) <= count(chat, allowance=0).bound + ALLOWANCE
