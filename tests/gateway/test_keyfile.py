"""The file of keys: what it says, every mistake at its place, and edits that leave the rest as it was."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.keyfile import HEADER, CannotEdit, KeyErrors, Known, Section, compile_keys, moment_of, revoked, with_key
from gateway.keys import Key, digest_of
from gateway.limits import Allowance, CallerLimits, Limits
from gateway.types import Caller

A, B, C = (digest_of(secret).hex() for secret in "abc")
KNOWN = Known(frozenset({"personal", "secret"}), frozenset({"home", "cloud"}), frozenset({"fast", "slow"}))

FULL = f"""\
version: 1
keys:
  - id: crm-2026
    sha256: "{A}"
    tenant: acme
    tags: [hr, eu]
    labels: [personal]
    deployments: home
    slo: [fast, slow]
    expires: 2027-01-31
  - {{id: plain, sha256: "{B}", revoked: true}}
admin:
  - {{id: ops, sha256: "{C}", expires: 2027-01-31T12:00+02:00}}
"""


def test_a_file_says_who_may_ask_and_for_what() -> None:
    keys = compile_keys("keys.yaml", FULL, KNOWN)
    crm, plain = keys.callers
    words = frozenset[str]
    assert crm == Key(
        digest_of("a"),
        Caller("acme", "crm-2026", words({"hr", "eu"}), words({"personal"}), words({"home"}), words({"fast", "slow"})),
        datetime(2027, 1, 31, tzinfo=UTC).timestamp(),
    )
    assert plain == Key(digest_of("b"), Caller(key_id="plain"), revoked=True)
    (ops,) = keys.operators
    assert ops.expires == datetime(2027, 1, 31, 10, tzinfo=UTC).timestamp()
    assert keys.callers.find("c") is None and keys.operators.find("a") is None, "neither opens the other's door"


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("", ["k: the file is empty"]),
        ("keys: []", ['k:1:1: "version" is missing']),
        ("version: 2\nkyes: []", ["k:1:10: ", 'k:2:1: unknown field "kyes" (did you mean "keys"?)']),
        (
            "version: 1\nkeys:\n  - {id: a}\n  - {sha256: abc}\n  - x",
            [
                'k:3:5: key "a": "sha256" is missing',
                'k:4:5: key 2: "id" is missing',
                'k:4:14: key 2: "sha256" must be a SHA-256 digest, 64 lower-case hexadecimal digits, and never the',
                "k:5:5: key 3: must be a mapping",
            ],
        ),
        (
            f'version: 1\nkeys: [{{id: a, sha256: "{A}"}}]\nadmin: [{{id: a, sha256: "{A}", tenant: x}}]',
            [
                'k:3:14: admin key "a": this "id" is that of the key in line 2 as well',
                'k:3:25: admin key "a": this "sha256" is that of the key in line 2 as well',
                'k:3:93: admin key "a": unknown field "tenant"',
            ],
        ),
        (
            f'version: 1\nkeys:\n- id: a\n  sha256: "{A}"\n  limits: {{rpm: 1, deployments: {{clod: {{}}}}}}\n'
            "  expires: tomorrow\n  slo: fsat\n  deployments: [home, clod]\n  labels: [Personal]\n  revoked: maybe",
            [
                'k:5:12: key "a": limits: unknown field "rpm" (known are',
                'k:5:34: key "a": limits: the policy has no deployment called "clod" (did you mean "cloud"?)',
                'k:5:40: key "a": limits: deployments: clod: no limit is stated',
                'k:6:12: key "a": "expires" must be a day such as 2027-01-31',
                'k:7:8: key "a": the policy has no latency class called "fsat" (did you mean "fast"?)',
                'k:8:23: key "a": the policy has no deployment called "clod" (did you mean "cloud"?)',
                'k:9:12: key "a": an item of "labels" must be a word of lower-case',
                'k:10:12: key "a": "revoked" must be true or false',
            ],
        ),
    ],
)
def test_every_mistake_is_told_at_its_place(text: str, errors: list[str]) -> None:
    with pytest.raises(KeyErrors) as caught:
        compile_keys("k", text, KNOWN)
    told = [str(problem) for problem in caught.value.problems]
    assert len(told) == len(errors), told
    for problem, beginning in zip(told, errors, strict=True):
        assert problem.startswith(beginning)


def test_a_secret_in_the_place_of_its_digest_is_not_repeated() -> None:
    with pytest.raises(KeyErrors) as caught:
        compile_keys("k", "version: 1\nkeys: [{id: a, sha256: hg-hunter2}]", KNOWN)
    assert "hunter2" not in str(caught.value)


LIMITED = f"""\
version: 1
tenants:
  acme: {{limits: {{usd_per_month: 0.1, budget: strict}}}}
keys:
  - id: crm
    sha256: "{A}"
    tenant: acme
    limits:
      requests_per_minute: 100
      tokens_per_day: 10k
      time_zone: Europe/Berlin
      on_redis_down: {{requests_per_minute: open}}
      deployments: {{cloud: {{concurrent_requests: 2, on_redis_down: closed}}}}
  - {{id: other, sha256: "{B}"}}
"""


def test_a_key_has_limits_of_its_own_and_those_of_its_tenant() -> None:
    crm, other = compile_keys("keys.yaml", LIMITED, KNOWN).callers
    requests, tokens = Allowance("requests_per_minute", 100, "open"), Allowance("tokens_per_day", 10_000)
    assert crm.caller.limits == CallerLimits(
        key=Limits((requests, tokens), time_zone=ZoneInfo("Europe/Berlin")),
        tenant=Limits((Allowance("usd_per_month", 100_000_000, "closed"),), strict=True),
        deployments={"cloud": Limits((Allowance("concurrent_requests", 2, "closed"),))},
    )
    assert other.caller.limits is None


def test_the_readmes_example_of_limits_loads() -> None:
    readme = (Path(__file__).parents[2] / "gateway" / "README.md").read_text()
    (example,) = [block for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "tenants:" in block]
    known = Known(frozenset(), frozenset({"gpt-4o-mini"}), frozenset())
    (crm,) = compile_keys("keys.yaml", f"version: 1\n{example}", known).callers
    assert crm.caller.limits is not None and crm.caller.limits.tenant is not None and crm.caller.limits.deployments


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ("{usd_per_day: 0}", '3:12: tenant "t": limits: "usd_per_day" must be a number of US dollars above 0'),
        ("{}", '3:12: tenant "t": limits: no limit is stated (known are requests_per_minute,'),
        ("3", '3:12: tenant "t": limits: must be a mapping'),
    ],
)
def test_a_tenants_limits_are_checked(limits: str, error: str) -> None:
    with pytest.raises(KeyErrors) as caught:
        compile_keys("k", f"version: 1\ntenants:\n  t: {{limits: {limits}}}", KNOWN)
    assert error.partition(": ")[2] in str(caught.value)


@pytest.mark.parametrize("text", ["2027-13-01", "2027-01-01T10:00", "9999-12-31T23:59-23:00x", "20270101", ""])
def test_a_time_without_its_offset_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="must be a day"):
        moment_of(text)


COMMENTED = f"""\
# who may ask
version: 1

keys:   # of applications
    # the first one
    - id: one   # since May
      sha256: "{A}"

# operators
admin:
- {{id: ops, sha256: "{B}"}}   # us
"""


def test_a_new_key_comes_last_and_all_else_stays() -> None:
    text = with_key("k", COMMENTED, "keys", {"id": "two", "sha256": C, "tenant": "no", "tags": ["a", "1"]})
    lines = [
        "    - id: two",
        f'      sha256: "{C}"' if C[0].isdigit() else f"      sha256: {C}",
        '      tenant: "no"',
        '      tags: [a, "1"]',
    ]
    added = "\n".join(lines) + "\n"
    assert added in text and text.replace(added, "") == COMMENTED
    assert text.index("two") < text.index("# operators")


@pytest.mark.parametrize(
    "text",
    [
        HEADER,
        HEADER + "keys: []\n",
        HEADER + "keys: []  # none yet",
        COMMENTED,
        COMMENTED.rstrip(),
        FULL,
        FULL.replace("\n", "\r\n"),
        f"version: 1\nkeys:\n- id: one\n  sha256: '{A}'\n\n\n",
    ],
)
@pytest.mark.parametrize("section", ["keys", "admin"])
def test_a_key_can_be_added_and_revoked_wherever_it_stands(text: str, section: str) -> None:
    where: Section = "keys" if section == "keys" else "admin"
    digest = digest_of("new").hex()
    added = with_key("k", text, where, {"id": "new", "sha256": digest})
    before, after = compile_keys("k", text, None), compile_keys("k", added, None)
    ring = after.callers if where == "keys" else after.operators
    assert [*before.callers, *before.operators, *ring][-1] == Key(bytes.fromhex(digest), Caller(key_id="new"))
    for key in [*after.callers, *after.operators]:
        gone = compile_keys("k", revoked("k", added, key.caller.key_id), None)
        standing = {k.caller.key_id: k.revoked for k in [*gone.callers, *gone.operators]}
        assert standing == {k.caller.key_id: k.revoked or k is key for k in [*after.callers, *after.operators]}, (
            "one key alone is revoked"
        )
    comments = re.compile(r"#.*")
    assert comments.findall(text) == comments.findall(revoked("k", added, "new"))


def test_what_says_that_a_key_is_not_revoked_is_changed_in_place() -> None:
    text = f'version: 1\nkeys: [{{id: a, revoked: False, sha256: "{A}"}}]  # False\n'
    assert revoked("k", text, "a") == text.replace("False", "true", 1)
    assert revoked("k", revoked("k", text, "a"), "a") == revoked("k", text, "a")
    with pytest.raises(LookupError):
        revoked("k", text, "b")


def test_a_file_that_a_program_cannot_edit_is_left_with_what_to_write() -> None:
    text = f'version: 1\nkeys: [{{id: a, sha256: "{A}"}}]\n'
    with pytest.raises(CannotEdit, match=r"by hand:\n  - id: b\n    sha256: "):
        with_key("k", text, "keys", {"id": "b", "sha256": B})
    with pytest.raises(KeyErrors, match="is that of the key"):
        with_key("k", FULL, "keys", {"id": "plain", "sha256": digest_of("z").hex()})


@given(st.text(alphabet="-_ .:/@#[]{},'\"\\|>&*!%`yno1é\n", max_size=12), st.sampled_from(["tenant", "id"]))
def test_whatever_a_key_is_called_is_read_back_or_refused(word: str, field: str) -> None:
    entry: dict[str, str | list[str]] = {"id": "new", "sha256": B}
    entry[field] = word
    try:
        text = with_key("k", COMMENTED.replace(B, C), "keys", entry)
    except (CannotEdit, KeyErrors):
        return
    last = list(compile_keys("k", text, None).callers)[-1].caller
    assert word == (last.tenant if field == "tenant" else last.key_id)
