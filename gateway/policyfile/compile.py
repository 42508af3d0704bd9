"""Both files together: text in, a policy or all problems out.

Owns the order of the steps and the policy's hash. Refuses to read files itself: what reads them is an argument.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import PurePath
from types import MappingProxyType
from typing import Any

import orjson

from gateway.policy import AUTO, DEFAULT_RULE, Policy
from gateway.policyfile import checks
from gateway.policyfile.caching import caching_of, wrong_cache_of_policy
from gateway.policyfile.deployments import Declared, check_models, declared
from gateway.policyfile.entries import Checked, check
from gateway.policyfile.language import PolicyShape
from gateway.policyfile.names import Names
from gateway.policyfile.rules import default_of, invariants_of, labels_of, patterns_of, rules_of, slo_of
from gateway.policyfile.tree import Node, Place, Problem, parse
from gateway.types import UNSCANNABLE

Read = Callable[[str], str]

MOST_PROBLEMS = 1_000  # a file that has more of them is another kind of file, and each takes a while to word


class PolicyErrors(Exception):
    """A policy that does not load. `problems` are all that were found, but for `MOST_PROBLEMS`, in the files' order,
    the policy's before the deployments'."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def compile_policy(
    path: str, *, read: Read, env: Mapping[str, str], price_map: Mapping[str, Any], detectors: frozenset[str]
) -> Policy:
    """The policy at `path` together with the deployments file that it names, which is looked for next to it.

    `read` returns a file's text and may raise OSError and UnicodeDecodeError; `env` gives the values of `${NAME}`;
    `price_map` is litellm's; `detectors` are the names that `detects` may use. Raises PolicyErrors.
    """
    with _collection_paused():
        return _Compilation(path, read, env, price_map, detectors).policy()


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Without the search for cyclic garbage, in the whole process: a large policy is some hundred thousand objects that
    stay until it is there, and the search would go through them time and again. Who finds it paused, by another load
    say, leaves it alone, so that it is on again after the last."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _TooMany(Exception):
    """Enough is wrong."""


class _Compilation:
    """One run over both files. Every problem found goes to `problems`; the policy exists only if there is none."""

    def __init__(
        self, path: str, read: Read, env: Mapping[str, str], price_map: Mapping[str, Any], detectors: frozenset[str]
    ) -> None:
        self.path = path
        self.read = read
        self.env = env
        self.price_map = price_map
        self.detectors = detectors
        self.problems: list[Problem] = []
        self.files: list[str] = []

    def policy(self) -> Policy:
        with suppress(_TooMany):
            policy = self._policy()
            if policy is not None:
                return policy
        raise self._errors()

    def report(self, problem: Problem) -> None:
        if len(self.problems) > MOST_PROBLEMS:
            raise _TooMany
        self.problems.append(problem)

    def _policy(self) -> Policy | None:
        root = self._tree(self.path, Place(self.path))
        if root is None:
            return None
        content = [root.plain]
        file = check(PolicyShape, root, "", self.report)
        self.problems += file.missing()
        tree = self._deployments_tree(file)
        content.append(tree.plain if tree else None)
        existing = declared(tree, self.env, self.price_map, self.report) if tree else None
        compiled = self._compiled(root, file, existing)
        return None if self.problems or compiled is None else compiled(_hash(content))

    def _compiled(
        self, root: Node, file: Checked[PolicyShape], existing: Declared | None
    ) -> Callable[[str], Policy] | None:
        """All entries of the policy file, checked by themselves, then together. What is returned wants the hash."""
        report = self.report
        patterns = patterns_of(root, file, self.detectors, report)
        labels = labels_of(root, self.detectors.union(root.keys_under("patterns")), report)
        slo = slo_of(root, report)
        names = Names(
            deployments=(existing.deployments or None) if existing else None,
            labels=frozenset({UNSCANNABLE, *root.keys_under("labels")}),
            detected=frozenset(label.name for label in labels if label.detects),
            slo=frozenset(root.keys_under("slo")),
            models=_asked(existing, root) if existing else None,
        )
        invariants = invariants_of(root, names, report)
        cache = file.shape.cache
        self.problems += wrong_cache_of_policy(file)
        rules = rules_of(root, names, report, cache)
        default = default_of(root, names, report, cache)
        everything = [*rules, *([default] if default else [])]
        self.problems += checks.unreachable(rules, default)
        if existing is None:
            return None
        right = {name: deployment for name, deployment in existing.deployments.items() if deployment is not None}
        self.problems += checks.incapable(everything, right)
        self.problems += checks.unplaced(everything, frozenset(label.name for label in labels), invariants, right)
        check_models(existing, [written.rule.name for written in rules], report)
        if default is None:
            return None
        return lambda hash: Policy(
            path=self.path,
            hash=hash,
            deployments=MappingProxyType(right),
            models=MappingProxyType(dict(existing.models)),
            labels=labels,
            invariants=invariants,
            slo=MappingProxyType(slo),
            rules=tuple(written.rule for written in rules),
            default=default.rule,
            patterns=patterns,
            cache=caching_of(None, cache),
            limits=MappingProxyType(dict(existing.limits)),
        )

    def _deployments_tree(self, file: Checked[PolicyShape]) -> Node | None:
        name = file.shape.deployments
        if name is None:
            return None
        return self._tree(str(PurePath(self.path).parent / name), file.node.place_of(("deployments",)))

    def _tree(self, path: str, named_at: Place) -> Node | None:
        """The file's tree; a file that cannot be read is a problem where it is named."""
        self.files.append(path)
        try:
            text = self.read(path)
        except OSError as error:
            what = path if named_at.line else "the file"
            self.problems.append(named_at.problem(f"{what} cannot be read: {error.strerror or 'it failed'}"))
            return None
        except UnicodeDecodeError as error:
            self.problems.append(Place(path).problem(f"the file is not UTF-8 text: byte {error.start} is wrong"))
            return None
        root, problems = parse(path, text)
        self.problems += problems
        return root

    def _errors(self) -> PolicyErrors:
        order = {file: index for index, file in reversed(list(enumerate(self.files)))}
        found = sorted(set(self.problems), key=lambda p: (order[p.file], p.line, p.column, p.message))
        if len(self.problems) > MOST_PROBLEMS:
            some = f"more than {MOST_PROBLEMS:,} things are wrong, of which these are some"
            found[MOST_PROBLEMS:] = [Place(self.path).problem(some)]
        return PolicyErrors(tuple(found))


def _asked(existing: Declared, root: Node) -> frozenset[str]:
    """The names that clients may ask for and that rules decide about: `auto`, the rules' own, and what stands for one
    of them."""
    stated = [node.plain for node in root.items("rules")]
    rules = {AUTO, DEFAULT_RULE, *[str(rule["name"]) for rule in stated if isinstance(rule, dict) and "name" in rule]}
    return frozenset(rules | {name for name, target in existing.models.items() if target in rules})


def _hash(content: list[Any]) -> str:
    """12 hexadecimal digits over what both files say, in any order of keys and without comments. Variables count by
    name, not by value."""
    return sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:12]
