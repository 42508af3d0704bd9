"""However many combining marks a text holds, making it normal takes time linear in its length."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.labels import Scanner
from gateway.marks import MOST_MARKS, without_excess_marks
from gateway.tokens import count
from gateway.wire.chat import parse

# Two kinds of marks in the wrong order: each of the second kind must be moved before all of the first.
PILED = "a" + "\u0315" * 500_000 + "\u0300" * 500_000


@given(st.text())
def test_a_text_that_people_read_is_left_as_it_is(text: str) -> None:
    assert without_excess_marks(text) == text


@given(st.text(st.sampled_from("a\u0300\u0315\u0344\u0f73\uff9e\U0001d165\U0001f600"), max_size=200))
def test_at_most_thirty_marks_are_left_in_a_row(text: str) -> None:
    run = longest = 0
    for character in unicodedata.normalize("NFKD", without_excess_marks(text)):
        run = run + 1 if unicodedata.combining(character) else 0
        longest = max(longest, run)
    assert longest <= 2 * MOST_MARKS  # some marks are made from two
    assert without_excess_marks(text).replace("a", "").count("\U0001f600") == text.count("\U0001f600")


@pytest.mark.parametrize("text", [PILED, PILED.replace("\u0315", "\U0001d165")], ids=["plane 0", "planes 0 and 1"])
def test_a_million_marks_do_not_stop_the_process(text: str) -> None:
    """Unbounded, this takes hours; the limit is far from what a slow machine needs."""
    began = time.process_time()
    assert Scanner(["email"]).scan([text, "alice@example.com"]) == {"email"}
    chat = parse(b'{"messages": [{"role": "user", "content": "' + text.encode() + b'"}]}')
    assert count(chat).bound >= len(unicodedata.normalize("NFC", text[:1000]).encode())
    assert time.process_time() - began < 30
