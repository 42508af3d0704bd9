"""Test cases of a policy: YAML text in, verdicts out, by the same `decide` as the server.

Owns the file's shape, what a case may expect, and how far an outcome is from that. Refuses to read files: the policy
comes compiled, and the variables that it was compiled with come from the file, never from the environment, so that a
case means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, create_model

from gateway.decision import Decision, Gate
from gateway.errors import GatewayError
from gateway.explain import explanation
from gateway.labels import Scanner
from gateway.policy import Policy
from gateway.policyfile.entries import Checked, Report, check
from gateway.policyfile.entries import subject_of as subject_of
from gateway.policyfile.nearness import suggestion
from gateway.policyfile.schema import schema_of
from gateway.policyfile.shapes import Shape
from gateway.policyfile.tree import Place, Problem, parse
from gateway.policyfile.values import Nusd, OrAlone, Seconds, Text, Version, Word, Words
from gateway.refusal import refusal
from gateway.routing import decide
from gateway.types import UNSCANNABLE, RequestFacts, usd
from gateway.written import (
    RequestShape,
    StateShape,
    asked,
    configured,
    facts_of,
    in_order,
    in_state,
    laid_over,
    snapshot_of,
)

SUFFIX = "_test.yaml"


def _status(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 200 <= value <= 599:
        raise ValueError("must be an HTTP status, such as 403, or 200 where a deployment answers")
    return value


Names = Annotated[list[Text], OrAlone()]
Status = Annotated[int, BeforeValidator(_status)]


class ExpectShape(Shape):
    """What a case expects. What is not stated is not looked at."""

    meanings: ClassVar[Mapping[str, str]] = {
        "deployment": "The request goes there first.",
        "deployments": "These are the candidates, in this order.",
        "rule": "That rule decides.",
        "labels": "The request has these labels and no others.",
        "status": "The status of the answer; 200 where a deployment may answer.",
        "code": "The code of the error.",
        "rejected": "Each of these deployments was removed by that gate.",
        "not": "None of these is a candidate.",
        "zones": "Every candidate is in one of these zones.",
        "meets": "Whether the first candidate is predicted to meet what the rule requires.",
        "masked": "Whether the first candidate gets the request masked.",
        "cost_at_most": "The first candidate is predicted to cost no more.",
        "first_token_at_most": "The first candidate is predicted to begin within this time.",
    }

    deployment: Text | None = None
    deployments: Names | None = None
    rule: Text | None = None
    labels: Names | None = None
    status: Status | None = None
    code: Word | None = None
    rejected: dict[Text, Gate] | None = None
    not_: Annotated[Words | None, Field(alias="not")] = None
    zones: Words | None = None
    meets: bool | None = None
    masked: bool | None = None
    cost_at_most: Nusd | None = None
    first_token_at_most: Seconds | None = None


class CaseShape(Shape):
    required = ("name", "expect")

    meanings: ClassVar[Mapping[str, str]] = {
        "name": "What reports call it.",
        "request": "What is asked; a greeting without it.",
        "state": "The fleet that it meets, laid over that of the file.",
        "expect": "What must be so. What is not stated is not looked at.",
    }

    name: Text | None = None
    request: RequestShape | None = None
    state: StateShape | None = None
    expect: ExpectShape | None = None


class CasesShape(Shape):
    required = ("version", "policy", "cases")

    meanings: ClassVar[Mapping[str, str]] = {
        "version": "The version of the language: 1.",
        "policy": "The policy, relative to this file.",
        "environment": "Variables that its files are read with.",
        "state": "What the state of every case is laid over.",
        "cases": "Requests, and what is expected of the decision.",
    }

    version: Version | None = None
    policy: Text | None = None
    environment: dict[Text, str] | None = None
    state: StateShape | None = None
    cases: list[Any] | None = None


_CASES = create_model("CasesShape", __base__=CasesShape, cases=(list[CaseShape] | None, None))


def cases_schema() -> dict[str, Any]:
    """The JSON Schema of a file of cases."""
    return schema_of(_CASES, "Cases of a Hybridgate policy")


@dataclass(frozen=True, slots=True)
class Case:
    """One request, the fleet that it meets, and what is expected of the decision."""

    name: str
    entry: Checked[CaseShape]
    request: RequestShape
    state: StateShape
    expect: ExpectShape

    @property
    def place(self) -> Place:
        return self.entry.place


@dataclass(frozen=True, slots=True)
class CaseFile:
    """The cases of one file, and the policy that they are about: its path as written, relative to the file."""

    path: str
    policy: str
    environment: Mapping[str, str]
    file: Checked[CasesShape]
    cases: tuple[Case, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """One expectation that was not met, in words."""

    what: str
    expected: str
    got: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a case ended. `rule` and `goes_to` are in words; `differences` is empty where it passed; `told` is the
    explanation of the decision, None where the request was refused before one."""

    case: Case
    rule: str
    goes_to: str
    differences: tuple[Difference, ...]
    told: Mapping[str, Any] | None

    @property
    def passed(self) -> bool:
        return not self.differences


def read_cases(path: str, text: str) -> tuple[CaseFile | None, list[Problem]]:
    """The cases of a file, or all that is wrong with it by itself; names are looked up by `undefined`."""
    root, problems = parse(path, text)
    if root is None:
        return None, problems
    file = check(CasesShape, root, "", problems.append)
    problems += file.missing()
    cases = []
    seen: set[str] = set()
    for position, node in enumerate(root.items("cases"), 1):
        entry = check(CaseShape, node, subject_of("case", node, position), problems.append)
        problems += entry.missing()
        shape = entry.shape
        problems += _wrong(entry, seen)
        if entry.intact and shape.name and shape.expect:
            state = laid_over(file.shape.state or StateShape(), shape.state or StateShape())
            cases.append(Case(shape.name, entry, shape.request or RequestShape(), state, shape.expect))
    if file.intact and "cases" in root.keys and not root.items("cases"):
        problems.append(file.problem('"cases" holds none', "cases"))
    if problems or file.shape.policy is None:
        return None, in_order(problems)
    return CaseFile(path, file.shape.policy, file.shape.environment or {}, file, tuple(cases)), []


def _wrong(entry: Checked[CaseShape], seen: set[str]) -> Iterator[Problem]:
    name, request, expect = entry.shape.name, entry.shape.request, entry.shape.expect
    if name is not None and name in seen:
        yield entry.problem("another case has this name", "name")
    seen.add(name or "")
    if expect is not None and not expect.model_fields_set and entry.intact:
        yield entry.problem('"expect" states nothing', "expect")
    if request is not None:
        bodies = [key for key in ("text", "messages", "body") if key in request.model_fields_set]
        if len(bodies) > 1:
            yield entry.problem(f'"request" has {" and ".join(bodies)}; write one of them', "request", bodies[1])


def undefined(file: CaseFile, policy: Policy) -> list[Problem]:
    """Names in the cases that the policy does not define: such a case would test nothing."""
    problems: list[Problem] = []
    names = policy.deployments.keys()
    whole = file.file
    _check_state(whole, whole.shape.state, names, problems.append, "state")
    for case in file.cases:
        entry, expect = case.entry, case.expect
        _check_state(entry, entry.shape.state, names, problems.append, "state")
        rules = [*(rule.name for rule in policy.rules), policy.default.name, *names]
        labels = [UNSCANNABLE, *(label.name for label in policy.labels)]
        zones = [deployment.zone for deployment in policy.deployments.values()]
        stated: Mapping[str, tuple[str, Iterable[str], Iterable[str]]] = {
            "deployment": ("deployment", [expect.deployment] if expect.deployment else [], names),
            "deployments": ("deployment", expect.deployments or [], names),
            "rejected": ("deployment", expect.rejected or {}, names),
            "not": ("deployment", expect.not_ or [], names),
            "rule": ("rule", [expect.rule] if expect.rule else [], rules),
            "labels": ("label", expect.labels or [], labels),
            "zones": ("zone", expect.zones or [], zones),
        }
        for key, (noun, written, known) in stated.items():
            for name in written:
                if name not in known:
                    problems.append(entry.problem(_no_such(noun, name, known), "expect", key))
    return in_order(problems)


def _check_state(
    entry: Checked[Any], state: StateShape | None, names: Iterable[str], report: Report, *loc: str
) -> None:
    if state is None:
        return
    for key, written in (
        ("down", state.down),
        ("unconfigured", state.unconfigured),
        ("deployments", state.deployments),
    ):
        for name in written or ():
            if name not in names:
                report(entry.problem(_no_such("deployment", name, names), *loc, key))


def _no_such(noun: str, name: str, known: Iterable[str]) -> str:
    return f'the policy has no {noun} "{name}"{suggestion(name, known)}'


def run(case: Case, policy: Policy, scanner: Scanner) -> Verdict:
    """Decide the case's request. Every deployment counts as configured unless the case says otherwise: whether a key
    is set is no matter of the policy. `scanner` has the policy's kinds."""
    policy = in_state(configured(policy), case.state)
    snapshot = snapshot_of(policy, case.state)
    try:
        facts = facts_of(policy, scanner, asked(case.request))
        decision = decide(policy, facts, snapshot)
    except GatewayError as error:
        got = _Outcome(policy, None, frozenset(), error)
        return Verdict(case, "", got.goes_to, tuple(got.differences(case.expect)), None)
    got = _Outcome(policy, decision, facts.labels, None if decision.candidates else refusal(decision), facts)
    told = explanation(policy, facts, snapshot, decision)
    return Verdict(case, decision.rule, got.goes_to, tuple(got.differences(case.expect)), told)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a request, and how that differs from what was expected."""

    policy: Policy
    decision: Decision | None
    labels: frozenset[str]
    error: GatewayError | None
    facts: RequestFacts | None = None

    @property
    def chain(self) -> list[str]:
        return [candidate.deployment for candidate in self.decision.candidates] if self.decision else []

    @property
    def goes_to(self) -> str:
        """The chain, or the refusal."""
        if self.error is not None:
            return f"refused: {self.error.status} {self.error.code}"
        return ", ".join(self.chain)

    def differences(self, expect: ExpectShape) -> Iterator[Difference]:
        """Each expectation that is not met."""
        chain = self.chain
        if expect.rule is not None and (self.decision is None or self.decision.rule != expect.rule):
            yield Difference("rule", expect.rule, self.decision.rule if self.decision else self.goes_to)
        if expect.deployment is not None and chain[:1] != [expect.deployment]:
            yield Difference("deployment", expect.deployment, self._instead(expect.deployment))
        if expect.deployments is not None and chain != expect.deployments:
            missing = [name for name in expect.deployments if name not in chain]
            got = self._instead(*missing)
            yield Difference("deployments", ", ".join(expect.deployments) or "none", got)
        if expect.labels is not None and self.labels != set(expect.labels):
            yield Difference("labels", _names(expect.labels), _names(self.labels))
        yield from self._refusals(expect)
        yield from self._candidates(expect)

    def _refusals(self, expect: ExpectShape) -> Iterator[Difference]:
        status = self.error.status if self.error is not None else 200
        if expect.status is not None and status != expect.status:
            yield Difference("status", str(expect.status), self.goes_to if self.error else f"200, {self.goes_to}")
        if expect.code is not None and (self.error is None or self.error.code != expect.code):
            yield Difference("code", expect.code, self.goes_to)
        gates = {r.deployment: r.gate for r in self.decision.rejections} if self.decision else {}
        for name, gate in (expect.rejected or {}).items():
            if gates.get(name) != gate:
                yield Difference(f"rejected {name}", gate, self._fate(name))
        for name in expect.not_ or ():
            if name in self.chain:
                yield Difference("not", name, self.goes_to)

    def _candidates(self, expect: ExpectShape) -> Iterator[Difference]:
        for name in self.chain:
            zone = self.policy.deployments[name].zone
            if expect.zones is not None and zone not in expect.zones:
                yield Difference("zones", _names(expect.zones), f"{name} in {zone}")
        first = self.decision.candidates[0] if self.decision is not None and self.decision.candidates else None
        if expect.meets is not None and (first is None or first.meets is not expect.meets):
            what = self.goes_to if first is None else first.note or "it is met"
            yield Difference("meets", "true" if expect.meets else "false", what)
        if expect.masked is not None and self._masked is not expect.masked:
            yield Difference("masked", "true" if expect.masked else "false", self.goes_to)
        if expect.cost_at_most is not None:
            cost = first.cost_nusd if first is not None else None
            if cost is None or cost > expect.cost_at_most:
                got = "unknown" if cost is None else f"{usd(cost)} USD"
                yield Difference("cost_at_most", f"{usd(expect.cost_at_most)} USD", got)
        if expect.first_token_at_most is not None:
            latency = first.first_token_ms if first is not None else None
            if latency is None or latency > expect.first_token_at_most * 1000:
                got = "unknown" if latency is None else f"{latency:g} ms"
                yield Difference("first_token_at_most", f"{expect.first_token_at_most * 1000:g} ms", got)

    @property
    def _masked(self) -> bool:
        """Whether the first candidate gets the request masked."""
        if self.facts is None or not self.chain:
            return False
        zone = self.policy.deployments[self.chain[0]].zone
        return self.policy.permit(self.facts).passage(zone) == "masked"

    def _instead(self, *wanted: str) -> str:
        """What came, and why those that were wanted did not."""
        fates = [f"{name}: {self._fate(name)}" for name in wanted if name not in self.chain]
        return f"{self.goes_to} ({'; '.join(fates)})" if fates else self.goes_to

    def _fate(self, name: str) -> str:
        if self.decision is None:
            return self.goes_to
        for rejection in self.decision.rejections:
            if rejection.deployment == name:
                return f"{rejection.gate}: {rejection.reason}"
        return "a candidate" if name in self.chain else f'no candidate of rule "{self.decision.rule}"'


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def without_case(policy: Policy, verdicts: Iterable[Verdict]) -> list[str]:
    """The rules, the default among them, by which none of the cases was decided."""
    decided = {verdict.rule for verdict in verdicts}
    return [rule.name for rule in (*policy.rules, policy.default) if rule.name not in decided]
