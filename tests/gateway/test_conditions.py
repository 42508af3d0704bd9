"""What a rule may look at: which requests match, what is said about it, and which match covers which."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, event, example, given
from hypothesis import strategies as st

from gateway.conditions import Match
from gateway.policy import Rule
from gateway.policyfile.checks import Earlier
from gateway.ranges import Globs, Hours, Load, Range
from gateway.shortlist import Shortlist
from gateway.snapshot import DeploymentStatus, Snapshot
from gateway.types import Deployment, RequestFacts, TokenCount

DEPLOYMENTS = {
    "small": Deployment("small", "openai", "m", "on_premises", window=100, default_max_tokens=10, tokenizer="s"),
    "large": Deployment("large", "openai", "m", "on_premises", window=1000, default_max_tokens=10, tokenizer="l"),
    "unknown": Deployment("unknown", "openai", "m", "cloud"),
}
BERLIN = ZoneInfo("Europe/Berlin")
WEEKDAYS = frozenset(range(5))


def at(text: str, zone: str = "UTC", **busy: float | None) -> Snapshot:
    """All up at that moment by the clocks of the zone, as busy as said."""
    wall = datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()
    statuses = {name: DeploymentStatus(busy=busy.get(name)) for name in DEPLOYMENTS}
    return Snapshot(0.0, 0.0, statuses, wall=wall)


UP = at("2026-11-02 12:00")
LONG = RequestFacts("auto", prompt=TokenCount(bound=95, estimate=20))
COUNTED = RequestFacts("auto", prompt=TokenCount(bound=95, estimate=20, exact={"s": 60}))


def words(*items: str) -> frozenset[str]:
    return frozenset(items)


@pytest.mark.parametrize(
    ("match", "facts", "unmet"),
    [
        (Match(), RequestFacts("auto"), None),
        (Match(any_label=words("a", "b")), RequestFacts("auto", labels=words("b", "c")), None),
        (Match(any_label=words("a", "b")), RequestFacts("auto"), "the request has no label a or b"),
        (Match(slo=words("fast")), RequestFacts("auto", slo="fast"), None),
        (Match(slo=words("fast")), RequestFacts("auto"), "the request's SLO class is not fast"),
        (Match(tenant=words("acme")), RequestFacts("auto", tenant="acme"), None),
        (Match(tenant=words("acme")), RequestFacts("auto", tenant="other"), "the tenant is not acme"),
        (Match(key_tag=words("hr")), RequestFacts("auto", key_tags=words("hr")), None),
        (Match(key_tag=words("hr")), RequestFacts("auto", tags=words("hr")), "the key has no tag hr"),
        (Match(tag=words("x")), RequestFacts("auto", tags=words("x")), None),
        (Match(tag=words("x")), RequestFacts("auto", key_tags=words("x")), "the request has no tag x"),
        (Match(stream=True), RequestFacts("auto"), "the request is not a stream"),
        (Match(stream=False), RequestFacts("auto", stream=True), "the request is a stream"),
        (Match(tools=True), RequestFacts("auto"), "the request offers no tools"),
        (Match(images=True), RequestFacts("auto"), "the request holds no images"),
        (Match(schema=True), RequestFacts("auto"), "the request asks for no schema"),
        (Match(stream=False, tools=True), RequestFacts("auto", tools=True), None),
        (Match(does_not_fit=words("small")), LONG, None),
        (Match(does_not_fit=words("large")), LONG, "the request fits large"),
        (Match(does_not_fit=words("large", "small")), LONG, None),
        (Match(does_not_fit=words("unknown")), LONG, "the request fits unknown"),
        (Match(fits=words("small")), LONG, "the request does not fit small"),
        (Match(fits=words("large", "small")), LONG, None),
        (Match(fits=words("small")), COUNTED, None),
        (Match(model=words("gpt-4*")), RequestFacts("gpt-4o"), None),
        (Match(model=words("gpt-4")), RequestFacts("gpt-4o"), "the model asked for is not gpt-4"),
        (Match(model=words("gpt-?", "claude-[ab]")), RequestFacts("claude-b"), None),
        (Match(model=words("gpt-?", "auto")), RequestFacts("GPT-4"), "the model asked for is not auto or gpt-?"),
        (Match(header={"x-team": words("a", "b")}), RequestFacts("auto", headers=frozenset({("x-team", "b")})), None),
        (
            Match(header={"x-team": words("a"), "x-env": words("prod")}),
            RequestFacts("auto", headers=frozenset({("x-team", "a"), ("x-team", "prod")})),
            "the header x-env is not prod",
        ),
        (Match(prompt_tokens=Range(20, 21)), LONG, None),
        (Match(prompt_tokens=Range(21)), LONG, "the prompt's tokens are not at least 21"),
        (Match(prompt_tokens=Range(below=20)), LONG, "the prompt's tokens are not below 20"),
        (Match(prompt_tokens=Range(20, 21), counted_by="small"), LONG, None),
        (Match(prompt_tokens=Range(60, 61), counted_by="small"), COUNTED, None),
        (Match(prompt_tokens=Range(60), counted_by="large"), COUNTED, "the prompt's tokens are not at least 60"),
        (Match(max_tokens=Range(below=100)), RequestFacts("auto", max_tokens=99), None),
        (Match(max_tokens=Range(below=100)), RequestFacts("auto", max_tokens=100), "max_tokens is not below 100"),
        (Match(max_tokens=Range(below=100)), RequestFacts("auto"), "max_tokens is not below 100"),
        (
            Match(stream=True, tenant=words("acme")),
            RequestFacts("auto"),
            "the request is not a stream; the tenant is not acme",
        ),
        (Match(stream=True, tools=True), RequestFacts("auto", stream=True), "the request offers no tools"),
        (Match(any_of=(Match(stream=True), Match(tools=True))), RequestFacts("auto", tools=True), None),
        (
            Match(any_of=(Match(stream=True, tag=words("x")), Match(tools=True))),
            RequestFacts("auto"),
            "no alternative holds (the request is not a stream; the request has no tag x / "
            "the request offers no tools)",
        ),
        (
            Match(tenant=words("acme"), all_of=(Match(stream=True), Match(tools=True))),
            RequestFacts("auto", stream=True),
            "the request offers no tools; the tenant is not acme",
        ),
        (Match(not_=Match(stream=True)), RequestFacts("auto"), None),
        (
            Match(not_=Match(stream=True, tag=words("x"))),
            RequestFacts("auto", stream=True, tags=words("x")),
            "excepted is that the request is a stream and the request has the tag x",
        ),
        (
            Match(not_=Match(any_of=(Match(tools=True), Match(not_=Match(tag=words("x")))))),
            RequestFacts("auto"),
            "excepted is that the request has no tag x",
        ),
    ],
)  # fmt: skip
def test_a_match_holds_when_all_its_conditions_do(match: Match, facts: RequestFacts, unmet: str | None) -> None:
    """Keys of `when` all hold; of a set, any one item is enough."""
    assert match.why_not(facts, DEPLOYMENTS, UP) == unmet
    assert match.matches(facts, DEPLOYMENTS, UP) is (unmet is None)


@pytest.mark.parametrize(
    ("load", "busy", "unmet"),
    [
        (Load(Range(0.8)), 0.8, None),
        (Load(Range(0.8)), 0.79, "the load of small is not at least 0.8, or not known"),
        (Load(Range(0.8)), None, "the load of small is not at least 0.8, or not known"),
        (Load(Range(0.8), unknown=True), None, None),
        (Load(Range(0.8), unknown=True), 0.5, "the load of small is not at least 0.8"),
        (Load(Range(0.2, 0.8)), 0.8, "the load of small is not at least 0.2 and below 0.8, or not known"),
    ],
)
def test_a_load_that_is_not_known_counts_as_the_policy_says(load: Load, busy: float | None, unmet: str | None) -> None:
    snapshot = at("2026-11-02 12:00", small=busy)
    match = Match(local_load={"small": load})
    assert match.why_not(RequestFacts("auto"), DEPLOYMENTS, snapshot) == unmet
    assert match.matches(RequestFacts("auto"), DEPLOYMENTS, snapshot) is (unmet is None)


OFFICE = Hours(BERLIN, WEEKDAYS, 8 * 60, 18 * 60)
NIGHT = Hours(BERLIN, frozenset({4}), 22 * 60, 6 * 60)  # 2026-11-06 is a Friday


@pytest.mark.parametrize(
    ("hours", "moment", "zone", "within"),
    [
        (OFFICE, "2026-11-02 08:00", "Europe/Berlin", True),
        (OFFICE, "2026-11-02 07:59:59", "Europe/Berlin", False),
        (OFFICE, "2026-11-02 17:59:59", "Europe/Berlin", True),
        (OFFICE, "2026-11-02 18:00", "Europe/Berlin", False),
        (OFFICE, "2026-11-07 12:00", "Europe/Berlin", False),
        (OFFICE, "2026-11-02 07:30", "UTC", True),  # 08:30 in winter
        (OFFICE, "2026-07-06 06:30", "UTC", True),  # 08:30 in summer
        (OFFICE, "2026-07-06 16:30", "UTC", False),  # 18:30 in summer
        (OFFICE, "2026-03-27 07:30", "UTC", True),  # the Friday before clocks are set forward
        (OFFICE, "2026-03-30 06:30", "UTC", True),  # the Monday after
        (NIGHT, "2026-11-06 21:59", "Europe/Berlin", False),
        (NIGHT, "2026-11-06 22:00", "Europe/Berlin", True),
        (NIGHT, "2026-11-07 05:59", "Europe/Berlin", True),  # Saturday, of the night that began on Friday
        (NIGHT, "2026-11-07 06:00", "Europe/Berlin", False),
        (NIGHT, "2026-11-07 22:00", "Europe/Berlin", False),
        (NIGHT, "2026-11-06 05:59", "Europe/Berlin", False),  # Friday, of the night that began on Thursday
        (Hours(BERLIN, frozenset({6}), 22 * 60, 60), "2026-11-09 00:30", "Europe/Berlin", True),  # Sunday into Monday
        (Hours(BERLIN, frozenset({5, 6})), "2026-11-08 23:59", "Europe/Berlin", True),
        (Hours(BERLIN, frozenset({5, 6})), "2026-11-09 00:00", "Europe/Berlin", False),
        (Hours(BERLIN, begin=2 * 60, end=3 * 60), "2026-10-25 00:30", "UTC", True),  # 02:30 the first time
        (Hours(BERLIN, begin=2 * 60, end=3 * 60), "2026-10-25 01:30", "UTC", True),  # and again
        (Hours(BERLIN, begin=2 * 60, end=3 * 60), "2026-03-29 01:30", "UTC", False),  # 03:30: 02:30 was skipped
    ],
)
def test_hours_are_those_of_the_places_clocks(hours: Hours, moment: str, zone: str, within: bool) -> None:
    snapshot = at(moment, zone)
    assert Match(time=hours).matches(RequestFacts("auto"), DEPLOYMENTS, snapshot) is within


@pytest.mark.parametrize(
    ("hours", "told"),
    [
        (OFFICE, "it is not mon, tue, wed, thu, fri 08:00 to 18:00 in Europe/Berlin"),
        (Hours(BERLIN, begin=60), "it is not 01:00 to 24:00 in Europe/Berlin"),
        (Hours(BERLIN, frozenset({6})), "it is not sun in Europe/Berlin"),
    ],
)
def test_hours_are_told_as_they_are_written(hours: Hours, told: str) -> None:
    snapshot = at("2026-11-07 00:00", "Europe/Berlin")
    assert Match(time=hours).why_not(RequestFacts("auto"), DEPLOYMENTS, snapshot) == told


NOTHING: frozenset[str] = frozenset()
SOME = st.frozensets(st.sampled_from(["a", "b"]), min_size=1)
WORDS = st.just(NOTHING) | SOME
FLAGS = st.sampled_from([None, None, None, True, False])
NUMBERS = st.none() | st.sampled_from([10, 20, 30])
RANGES = st.builds(Range, NUMBERS, NUMBERS)
HOURS = st.builds(
    Hours,
    st.sampled_from([BERLIN, ZoneInfo("UTC")]),
    st.frozensets(st.integers(0, 6)),
    st.integers(0, 7).map(lambda part: part * 180),
    st.integers(1, 8).map(lambda part: part * 180),
)
LOADS = st.builds(Load, st.builds(Range, st.sampled_from([None, 0.2, 0.8])), st.booleans())
NAMES = st.sampled_from(sorted(DEPLOYMENTS))
LEAVES = st.builds(
    Match,
    any_label=WORDS,
    does_not_fit=st.just(NOTHING) | st.frozensets(NAMES),
    fits=st.just(NOTHING) | st.frozensets(NAMES),
    slo=WORDS,
    tenant=WORDS,
    key_tag=WORDS,
    tag=WORDS,
    stream=FLAGS,
    tools=FLAGS,
    images=FLAGS,
    schema=FLAGS,
    model=st.just(NOTHING) | st.frozensets(st.sampled_from(["a", "b", "a*", "?", "*", "[ab]"])),
    header=st.just({}) | st.dictionaries(st.sampled_from(["x", "y"]), SOME, max_size=2),
    prompt_tokens=st.none() | RANGES,
    counted_by=st.sampled_from([None, "small"]),
    max_tokens=st.none() | RANGES,
    local_load=st.just({}) | st.dictionaries(NAMES, LOADS, max_size=1),
    time=st.none() | HOURS,
).filter(lambda match: match.conditions != ())  # no file holds one that states nothing
# With one condition or two, so that the others' absence does not decide everything.
SPARSE = st.one_of(
    st.builds(Match, stream=st.booleans()),
    st.builds(Match, stream=st.booleans(), tools=st.booleans()),
    st.builds(Match, tenant=SOME),
    st.builds(Match, tenant=SOME, tag=WORDS),
    st.builds(Match, prompt_tokens=RANGES, counted_by=st.sampled_from([None, "small"])),
    st.builds(Match, max_tokens=RANGES),
    st.builds(Match, header=st.dictionaries(st.sampled_from(["x", "y"]), SOME, min_size=1)),
    st.builds(Match, model=st.frozensets(st.sampled_from(["a", "b", "a*", "?"]), min_size=1)),
    st.builds(Match, local_load=st.dictionaries(NAMES, LOADS, min_size=1, max_size=1)),
    st.builds(Match, fits=st.frozensets(NAMES, min_size=1)),
    st.builds(Match, does_not_fit=st.frozensets(NAMES, min_size=1)),
    st.builds(Match, time=HOURS),
)


def trees(leaves: st.SearchStrategy[Match]) -> st.SearchStrategy[Match]:
    """Matches that hold further ones."""

    def nested(inner: st.SearchStrategy[Match]) -> st.SearchStrategy[Match]:
        several = st.lists(inner, min_size=1, max_size=2).map(tuple)
        return st.one_of(
            st.builds(Match, any_of=several),
            st.builds(Match, all_of=several),
            st.builds(Match, not_=inner),
            st.builds(Match, stream=FLAGS, tenant=WORDS, any_of=several, not_=st.none() | inner),
        )

    return st.recursive(leaves, nested, max_leaves=4)


FACTS = st.builds(
    RequestFacts,
    model=st.sampled_from(["auto", "a", "b", "ab"]),
    tenant=st.sampled_from(["a", "b", "c"]),
    key_tags=WORDS,
    tags=WORDS,
    labels=WORDS,
    prompt=st.builds(
        TokenCount,
        bound=st.integers(0, 1200),
        estimate=st.integers(0, 40),
        exact=st.just({}) | st.fixed_dictionaries({"s": st.integers(0, 40)}),
    ),
    max_tokens=st.none() | st.integers(1, 50),
    stream=st.booleans(),
    tools=st.booleans(),
    images=st.booleans(),
    schema=st.booleans(),
    slo=st.sampled_from([None, "a", "b", "c"]),
    headers=st.frozensets(st.tuples(st.sampled_from(["x", "y"]), st.sampled_from(["a", "b"]))),
)
BUSY = st.none() | st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])
SNAPSHOTS = st.builds(
    Snapshot,
    now=st.just(0.0),
    draw=st.just(0.0),
    deployments=st.fixed_dictionaries({name: st.builds(DeploymentStatus, busy=BUSY) for name in DEPLOYMENTS}),
    wall=st.integers(1_790_000_000, 1_790_000_000 + 7 * 86_400).map(float),
)


@given(trees(LEAVES), FACTS, SNAPSHOTS)
def test_the_explanation_agrees_with_the_decision(match: Match, facts: RequestFacts, snapshot: Snapshot) -> None:
    """There is a reason not to match if and only if the request does not match, and no condition is without words."""
    why_not = match.why_not(facts, DEPLOYMENTS, snapshot)
    assert (why_not is None) is match.matches(facts, DEPLOYMENTS, snapshot)
    told = match.why(facts, DEPLOYMENTS, snapshot) if why_not is None else why_not
    assert told


@given(trees(SPARSE), trees(SPARSE), FACTS, SNAPSHOTS)
def test_a_match_that_covers_another_matches_all_its_requests(
    one: Match, other: Match, facts: RequestFacts, snapshot: Snapshot
) -> None:
    for wide in (one, Match(any_of=(one, other)), Match(not_=Match(not_=other, all_of=(one,)))):
        if wide.covers(other):
            event("covers")
            assert wide.matches(facts, DEPLOYMENTS, snapshot) or not other.matches(facts, DEPLOYMENTS, snapshot)


@given(trees(SPARSE), trees(SPARSE))
def test_a_match_covers_itself_and_whatever_is_stricter(one: Match, other: Match) -> None:
    assume(one.conditions)
    assert one.covers(one)
    assert one.covers(Match(all_of=(one, other)))
    assert Match(any_of=(one, other)).covers(one)
    assert Match(not_=Match(all_of=(one, other))).covers(Match(not_=one))


@given(st.lists(trees(SPARSE), max_size=8), trees(SPARSE))
@example([Match(model=words("a*"))], Match(model=words("a", "ab")))
@example([Match(model=words("a", "b"))], Match(model=words("b"), stream=True))
@example([Match(any_of=(Match(stream=True), Match(tag=words("a"))))], Match(tag=words("a")))
def test_a_rule_that_covers_is_found_among_hundreds_without_comparing_all(earlier: list[Match], match: Match) -> None:
    """The index over earlier rules finds one if and only if there is one."""
    index = Earlier()
    for number, one in enumerate(earlier):
        index.add(Rule(f"r{number}", one, ()))
    covering = [one for one in earlier if one.covers(match)]
    event("covered" if covering else "reachable")
    found = index.covering(match)
    assert (found is not None) is bool(covering)
    assert found is None or found.match in covering


@given(st.lists(trees(SPARSE), max_size=8), FACTS, SNAPSHOTS, st.integers(0, 8))
def test_no_rule_that_matches_is_missing_from_the_shortlist(
    matches: list[Match], facts: RequestFacts, snapshot: Snapshot, start: int
) -> None:
    listed = list(Shortlist([*matches, None]).positions(facts, min(start, len(matches))))
    matching = {n for n, match in enumerate(matches) if n >= start and match.matches(facts, DEPLOYMENTS, snapshot)}
    event("shorter" if len(listed) < len(matches) else "all")
    assert matching | {len(matches)} <= set(listed)
    assert listed == sorted(listed) and listed[0] >= min(start, len(matches))


def test_the_shortlist_leaves_out_what_looks_at_other_words() -> None:
    matches = [
        Match(tenant=words("acme", "b")),
        Match(slo=words("fast"), stream=True),
        Match(all_of=(Match(tag=words("x")), Match(tag=words("y")))),
        Match(any_label=words("personal")),
        Match(any_of=(Match(tenant=words("b")), Match(key_tag=words("hr")))),
        None,
    ]
    index = Shortlist(matches)
    assert list(index.positions(RequestFacts("auto", tenant="c"))) == [4, 5]
    assert list(index.positions(RequestFacts("auto", tenant="b", slo="fast", tags=words("x")))) == [0, 1, 2, 4, 5]
    assert list(index.positions(RequestFacts("auto", tenant="acme", labels=words("secret", "personal")), 1)) == [
        3,
        4,
        5,
    ]


@pytest.mark.parametrize(
    ("one", "other", "covers"),
    [
        (Match(), Match(stream=True), True),
        (Match(stream=True), Match(), False),
        (Match(stream=True), Match(stream=True, tools=False), True),
        (Match(stream=True), Match(stream=False), False),
        (Match(slo=words("a", "b")), Match(slo=words("a")), True),
        (Match(slo=words("a")), Match(slo=words("a", "b")), False),
        (Match(prompt_tokens=Range(10)), Match(prompt_tokens=Range(20, 30)), True),
        (Match(prompt_tokens=Range(10, 30)), Match(prompt_tokens=Range(20)), False),
        (Match(prompt_tokens=Range(10)), Match(prompt_tokens=Range(20), counted_by="small"), False),
        (Match(model=words("gpt-*")), Match(model=words("gpt-4", "gpt-*")), True),
        (Match(model=words("gpt-*")), Match(model=words("gpt-4*")), False),  # it does, and is not found out
        (Match(header={"x": words("a", "b")}), Match(header={"x": words("a"), "y": words("c")}), True),
        (Match(header={"x": words("a")}), Match(header={"y": words("a")}), False),
        (Match(local_load={"a": Load(Range(0.5))}), Match(local_load={"a": Load(Range(0.8))}), True),
        (Match(local_load={"a": Load(Range(0.5))}), Match(local_load={"a": Load(Range(0.8), unknown=True)}), False),
        (Match(time=OFFICE), Match(time=Hours(BERLIN, frozenset({1}), 8 * 60, 18 * 60)), True),
        (Match(time=OFFICE), Match(time=Hours(BERLIN, WEEKDAYS, 9 * 60, 18 * 60)), False),
        (Match(stream=True), Match(all_of=(Match(stream=True), Match(tools=True))), True),
        (Match(any_of=(Match(stream=True), Match(tools=True))), Match(tools=True, schema=True), True),
        (
            Match(any_of=(Match(stream=True), Match(tools=True))),
            Match(any_of=(Match(tools=True, tag=words("x")), Match(stream=True))),
            True,
        ),
        (Match(any_of=(Match(stream=True),)), Match(any_of=(Match(stream=True), Match(tools=True))), False),
        (Match(not_=Match(stream=True, tools=True)), Match(not_=Match(stream=True)), True),
        (Match(not_=Match(stream=True)), Match(not_=Match(stream=True, tools=True)), False),
    ],
)
def test_a_looser_match_covers_a_stricter_one(one: Match, other: Match, covers: bool) -> None:
    assert one.covers(other) is covers


@pytest.mark.parametrize(
    ("match", "needs"),
    [
        (Match(tools=True, images=False, schema=True), {"tools", "schema"}),
        (Match(all_of=(Match(tools=True), Match(images=True))), {"tools", "images"}),
        (Match(any_of=(Match(tools=True, images=True), Match(tools=True))), {"tools"}),
        (Match(not_=Match(tools=False)), set()),
    ],
)
def test_a_match_needs_the_capabilities_that_all_its_requests_ask_for(match: Match, needs: set[str]) -> None:
    assert match.needs == needs


def test_globs_are_a_shells() -> None:
    globs = Globs({"gpt-*", "a.b", "[!x]1"})
    assert [name for name in ("gpt-", "gpt-4\no", "GPT-4", "a.b", "a-b", "a1", "x1", "") if name in globs] == [
        "gpt-",
        "gpt-4\no",
        "a.b",
        "a1",
    ]
