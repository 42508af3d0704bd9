"""Keys: who is let in, what a bad key is told, and that none of it is repeated."""

from __future__ import annotations

import pytest

from gateway.errors import Unauthenticated
from gateway.keys import Key, Keyring, digest_of
from gateway.types import Caller

GOOD, OLD, TAKEN = "hg-good", "hg-old", "hg-taken"
NOW = 1_000.0
RING = Keyring(
    [
        Key(digest_of(GOOD), Caller("acme", "crm"), expires=NOW + 1),
        Key(digest_of(OLD), Caller("acme", "old"), expires=NOW),
        Key(digest_of(TAKEN), Caller("acme", "taken"), expires=NOW + 1, revoked=True),
    ]
)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {GOOD}"},
        {"authorization": f"bearer  {GOOD} "},
        {"x-api-key": GOOD},
        {"authorization": f"Bearer {GOOD}", "x-api-key": GOOD},
    ],
)
def test_a_key_that_holds_says_who_asks(headers: dict[str, str]) -> None:
    assert RING.caller_of(headers, NOW) == Caller("acme", "crm")


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({}, "a key is needed"),
        ({"authorization": f"Bearer {OLD}"}, "has expired"),
        ({"x-api-key": TAKEN}, "was revoked"),
        ({"x-api-key": GOOD[:-1]}, "is not known here"),
        ({"x-api-key": GOOD + "x"}, "is not known here"),
        ({"x-api-key": digest_of(GOOD).hex()}, "is not known here"),
        ({"authorization": f"Bearer {GOOD},Bearer {GOOD}"}, "is not known here"),
        ({"authorization": GOOD}, "this is no key"),
        ({"authorization": f"Basic {GOOD}"}, "this is no key"),
        ({"authorization": "Bearer "}, "this is no key"),
        ({"x-api-key": ""}, "this is no key"),
        ({"x-api-key": "x" * 10_000}, "this is no key"),
        ({"authorization": f"Bearer {GOOD}", "x-api-key": OLD}, "different keys"),
        ({"authorization": "Basic x", "x-api-key": GOOD}, "different keys"),
        ({"x-api-key": "\udcff"}, "is not known here"),
    ],
)
def test_a_caller_without_a_good_key_is_told_what_to_do_and_not_what_it_sent(
    headers: dict[str, str], told: str
) -> None:
    with pytest.raises(Unauthenticated, match=told) as caught:
        RING.caller_of(headers, NOW)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert "hg-" not in str(caught.value) and "xxx" not in str(caught.value)


def test_a_key_that_is_shown_shows_no_digest() -> None:
    assert "digest" not in repr(next(iter(RING)))


def test_what_another_file_says_only_tightens() -> None:
    others = Keyring(
        [
            Key(digest_of(GOOD), Caller("other", "crm"), expires=NOW + 9),
            Key(digest_of(TAKEN), Caller("acme", "taken")),
            Key(digest_of("hg-more"), Caller()),
        ]
    )
    tightened = {key.caller.key_id: key for key in RING.tightened_by(others)}
    assert tightened.keys() == {"crm", "taken"}, "what is not there is gone, what is new does not come"
    assert tightened["crm"] == RING.find(GOOD) and tightened["taken"].revoked
    sooner = Keyring([Key(digest_of(GOOD), Caller(), expires=NOW - 1)])
    with pytest.raises(Unauthenticated, match="has expired"):
        RING.tightened_by(sooner).caller_of({"x-api-key": GOOD}, NOW)
