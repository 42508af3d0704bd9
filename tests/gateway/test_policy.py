"""What a compiled policy answers: labels, permits, headers."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy import Invariant, LabelSource, Match, Policy, Rule, Slo, permit
from gateway.ranges import Range
from gateway.snapshot import DeploymentStatus, Snapshot
from gateway.types import UNSCANNABLE, Deployment, Permit, RequestFacts, Timeouts

DEPLOYMENTS = {
    "small": Deployment("small", "openai", "m", "on_premises", window=100, default_max_tokens=10),
    "large": Deployment("large", "openai", "m", "on_premises", window=1000, default_max_tokens=10),
    "unknown": Deployment("unknown", "openai", "m", "cloud"),
}
UP = Snapshot(0.0, 0.0, {name: DeploymentStatus() for name in DEPLOYMENTS})


def policy(
    *labels: LabelSource, invariants: tuple[Invariant, ...] = (), rules: tuple[Rule, ...] = (), hash: str = "0" * 12
) -> Policy:
    return Policy(
        path="policy.yaml",
        hash=hash,
        deployments=MappingProxyType(DEPLOYMENTS),
        models=MappingProxyType({}),
        labels=labels,
        invariants=invariants,
        slo=MappingProxyType({"fast": Slo("fast", 50.0)}),
        rules=rules,
        default=Rule("default", None, ("small",)),
    )


PERSONAL = LabelSource(
    "personal", frozenset({"email", "iban"}), {"x-data-class": frozenset({"phi"})}, frozenset({"hr"})
)
SECRET = LabelSource("secret", frozenset({"jwt"}), {"x-vault": frozenset({"yes", "top secret"})})


@pytest.mark.parametrize(
    ("kinds", "headers", "key_tags", "unscannable", "labels"),
    [
        ([], {}, [], False, set()),
        (["email"], {}, [], False, {"personal"}),
        (["jwt", "iban"], {}, [], False, {"personal", "secret"}),
        (["phone"], {}, [], False, set()),
        ([], {"x-data-class": "phi"}, [], False, {"personal"}),
        ([], {"x-data-class": " PHI , ,secret"}, [], False, {"personal", "secret"}),
        ([], {"x-data-class": "personal"}, [], False, {"personal"}),
        ([], {"x-data-class": "unscannable"}, [], False, {UNSCANNABLE}),
        ([], {"x-vault": "Top Secret"}, [], False, {"secret"}),
        ([], {"x-vault": "no"}, [], False, set()),
        ([], {"x-vault": "personal"}, [], False, set()),
        ([], {}, ["hr", "other"], False, {"personal"}),
        ([], {}, [], True, {UNSCANNABLE}),
        (["email"], {}, [], True, {"personal", UNSCANNABLE}),
    ],
)
def test_any_one_fact_raises_a_label(
    kinds: list[str], headers: dict[str, str], key_tags: list[str], unscannable: bool, labels: set[str]
) -> None:
    subject = policy(PERSONAL, SECRET)
    assert subject.labels_of(frozenset(kinds), headers, frozenset(key_tags), unscannable) == labels


@pytest.mark.parametrize("value", ["phi", "PHI", "personal", "secret, phi", "unscannable", "phi,"])
def test_a_known_data_class_passes(value: str) -> None:
    assert policy(PERSONAL, SECRET).unknown_data_class({"x-data-class": value}) is None


@pytest.mark.parametrize("value", ["hunter2", "phi, hunter2", "phi hunter2", "", " , "])
def test_an_unknown_data_class_is_answered_with_the_known_ones(value: str) -> None:
    """The sentence does not repeat what was sent."""
    sentence = policy(PERSONAL, SECRET).unknown_data_class({"x-data-class": value})
    assert sentence is not None
    assert sentence.endswith("known are: personal, phi, secret, unscannable")
    assert "hunter2" not in sentence


def test_no_data_class_is_fine() -> None:
    assert policy(PERSONAL).unknown_data_class({"x-other": "z"}) is None


def test_only_the_detectors_that_labels_use_are_asked_for() -> None:
    assert policy(PERSONAL, SECRET).kinds == {"email", "iban", "jwt"}
    assert policy().kinds == frozenset()


HOME = Invariant("stay home", frozenset({"personal"}), frozenset({"on_premises", "edge"}))
EUROPE = Invariant("stay in Europe", frozenset({"personal", "european"}), frozenset({"edge", "eu_cloud"}))


@pytest.mark.parametrize(
    ("labels", "zones", "because"),
    [
        (set(), None, ""),
        ({"other"}, None, ""),
        ({"european"}, {"edge", "eu_cloud"}, '"stay in Europe"'),
        ({"personal"}, {"edge"}, '"stay home" and "stay in Europe"'),
    ],
)
def test_all_invariants_that_match_apply(labels: set[str], zones: set[str] | None, because: str) -> None:
    allowed = policy(invariants=(HOME, EUROPE)).permit(RequestFacts("auto", labels=frozenset(labels)))
    assert allowed == Permit(frozenset(labels), None if zones is None else frozenset(zones), because)


MASKED = Invariant("mask", frozenset({"personal", "secret"}), frozenset({"home"}), mask=frozenset({"personal"}))
UNMASKED = Invariant("stay", frozenset({"european"}), frozenset({"home", "eu"}))


@pytest.mark.parametrize(
    ("labels", "masked_labels", "home", "eu", "us"),
    [
        ("personal", None, "as_is", None, None),  # it cannot be masked
        ("personal", "", "as_is", "masked", "masked"),
        ("personal", "personal", "as_is", None, None),  # something else than what was found raised the label
        ("personal secret", "", "as_is", None, None),  # the invariant masks one of the labels only
        ("personal", "secret", "as_is", None, None),
        ("personal european", "", "as_is", "masked", None),  # another invariant holds as before
        ("personal european", "european", "as_is", "masked", None),
        ("european", "", "as_is", "as_is", None),
        ("other", "other", "as_is", "as_is", "as_is"),
    ],
)
def test_a_masked_request_may_leave_where_every_invariant_masks_all_that_bind_it(
    labels: str, masked_labels: str | None, home: str, eu: str | None, us: str | None
) -> None:
    left = None if masked_labels is None else frozenset(masked_labels.split())
    facts = RequestFacts("auto", labels=frozenset(labels.split()), masked_labels=left)
    allowed = policy(invariants=(MASKED, UNMASKED)).permit(facts)
    assert [allowed.passage(zone) for zone in ("home", "eu", "us")] == [home, eu, us]


ACME = Invariant("acme stays home", frozenset(), frozenset({"edge"}), tenant=frozenset({"acme", "subsidiary"}))
STAFF = Invariant("staff data", frozenset({"personal"}), frozenset({"on_premises"}), key_tag=frozenset({"hr", "legal"}))


@pytest.mark.parametrize(
    ("facts", "because"),
    [
        (RequestFacts("auto"), ""),
        (RequestFacts("auto", tenant="acme"), '"acme stays home"'),
        (RequestFacts("auto", key_tags=frozenset({"hr"})), ""),
        (RequestFacts("auto", labels=frozenset({"personal"})), ""),
        (RequestFacts("auto", labels=frozenset({"personal"}), key_tags=frozenset({"hr", "x"})), '"staff data"'),
        (
            RequestFacts("auto", tenant="subsidiary", labels=frozenset({"personal"}), key_tags=frozenset({"legal"})),
            '"acme stays home" and "staff data"',
        ),
    ],
)
def test_an_invariant_concerns_whom_all_its_conditions_fit(facts: RequestFacts, because: str) -> None:
    assert policy(invariants=(ACME, STAFF)).permit(facts).because == because


def test_what_a_tenant_must_keep_home_is_not_freed_by_masking() -> None:
    """There is no label that masking could take away."""
    facts = RequestFacts("auto", tenant="acme", labels=frozenset({"personal"}), masked_labels=frozenset())
    assert policy(invariants=(ACME,)).permit(facts).passage("us") is None


LABELS = st.frozensets(st.sampled_from("abcd"))
NAMED = st.frozensets(st.sampled_from("ab"))
INVARIANTS = st.lists(
    st.builds(
        Invariant,
        st.just("i"),
        LABELS,
        st.frozensets(st.sampled_from("xyz")),
        mask=LABELS,
        tenant=NAMED,
        key_tag=NAMED,
    )
)
REQUESTS = st.builds(
    RequestFacts,
    st.just("auto"),
    tenant=st.sampled_from("abc"),
    labels=LABELS,
    key_tags=NAMED,
    masked_labels=st.none() | LABELS,
)


def never_allows_more(few: Permit, many: Permit) -> None:
    for zone in chain("xyz", ["elsewhere"]):
        assert few.allows(zone) or not many.allows(zone)
        assert few.passage(zone) or not many.passage(zone)
        assert few.allows(zone) or few.passage(zone) != "as_is"


@given(INVARIANTS, REQUESTS, LABELS, NAMED, LABELS)
def test_more_labels_never_allow_more(
    invariants: list[Invariant],
    facts: RequestFacts,
    labels: frozenset[str],
    tags: frozenset[str],
    left: frozenset[str],
) -> None:
    """A permit is monotone: what a request may do with labels and tags of its key added, before or after it is masked,
    it may do without them."""
    more = replace(
        facts,
        labels=facts.labels | labels,
        key_tags=facts.key_tags | tags,
        masked_labels=None if facts.masked_labels is None else facts.masked_labels | left,
    )
    never_allows_more(permit(invariants, facts), permit(invariants, more))


@given(INVARIANTS, INVARIANTS, REQUESTS)
def test_an_invariant_more_never_allows_more(some: list[Invariant], more: list[Invariant], facts: RequestFacts) -> None:
    never_allows_more(permit(some, facts), permit([*some, *more], facts))


ASKS = (
    Rule("teams", Match(header={"x-team": frozenset({"a", "b"})}), ("small",)),
    Rule(
        "both", Match(not_=Match(any_of=(Match(header={"x-team": frozenset("c"), "x-env": frozenset({"prod"})}),))), ()
    ),
)


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({}, set()),
        ({"x-team": "a"}, {("x-team", "a")}),
        ({"x-team": " A , c,", "x-env": "test"}, {("x-team", "a"), ("x-team", "c")}),
        ({"x-team": "prod", "x-other": "a", "authorization": "a"}, set()),
        ({"x-team": "a b"}, set()),
    ],
)
def test_of_a_requests_headers_only_what_some_rule_asks_about_is_a_fact(
    headers: dict[str, str], found: set[tuple[str, str]]
) -> None:
    assert policy(rules=ASKS).headers_of(headers) == found
    assert policy().headers_of(headers) == frozenset()


def test_the_prompt_sizes_that_rules_compare_with_are_known() -> None:
    """They are where an exact count is worth its time."""
    long = Match(prompt_tokens=Range(8000, 32000), counted_by="small")
    rules = (
        Rule("long", Match(any_of=(long,)), ("small",)),
        Rule("vague", Match(prompt_tokens=Range(5)), ("small",)),
        Rule("short", Match(prompt_tokens=Range(below=100), counted_by="large"), ("large",)),
    )
    assert policy(rules=rules).thresholds == {("small", 8000), ("small", 32000), ("large", 100)}


def test_a_rule_changes_the_timeouts_that_it_states() -> None:
    deployment = replace(DEPLOYMENTS["small"], timeouts=Timeouts(connect=1.0, total=30.0))
    assert deployment.timeouts.replaced(Rule("x", None, ("small",)).timeouts) is deployment.timeouts
    changed = deployment.timeouts.replaced(Rule("x", None, ("small",), timeouts={"first_token": 2.0}).timeouts)
    assert changed == Timeouts(connect=1.0, first_token=2.0, total=30.0)


def test_rules_are_found_by_name_and_the_default_is_one() -> None:
    chat = Rule("chat", Match(stream=True), ("small",))
    subject = policy(rules=(chat,))
    assert subject.rule_named("chat") is chat
    assert subject.rule_named("default") is subject.default
    assert subject.rule_named("other") is None


def test_a_deployment_can_be_replaced_by_what_it_reports_of_itself() -> None:
    before = policy()
    after = before.with_deployment(Deployment("small", "openai", "m", "on_premises", window=50))
    assert (after.deployments["small"].window, before.deployments["small"].window) == (50, 100)
    assert after.hash == before.hash
    with pytest.raises(KeyError):
        before.with_deployment(Deployment("other", "openai", "m", "z"))
