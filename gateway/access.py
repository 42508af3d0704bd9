"""Who is let in: the keys in use, and the state of their file.

Owns the swap from one set of keys to the next, and what is told of it. Refuses to read the file (reload.py does).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from gateway.answers import Log
from gateway.chat import ChatPath
from gateway.keyfile import Known
from gateway.keys import Keys, Standing
from gateway.loading import known_names
from gateway.policyfile import Problem, first_of


@dataclass(frozen=True, slots=True)
class KeysState:
    """Since when the keys are in use (`loaded_at`), and what is wrong with their file as it stands now. `loads` and
    `refusals` count since start."""

    loaded_at: datetime
    problems: tuple[Problem, ...] = ()
    loads: int = 1
    refusals: int = 0


class Access:
    """The keys in use, in front of one request path. Invariant: what a file that does not load said before stays in
    force."""

    def __init__(self, path: str, keys: Keys, asked: ChatPath, log: Log, tell: Callable[[str], None]) -> None:
        self.path = path
        self._keys = keys
        self._revoked: frozenset[bytes] = frozenset()
        self._asked = asked
        self._log = log
        self._tell = tell
        self.state = KeysState(datetime.now(UTC))
        self._admit(keys)

    def known(self) -> Known:
        """What keys may name: the policy in use says so."""
        return known_names(self._asked.serving.policy)

    def authenticate_operator(self, headers: Mapping[str, str]) -> None:
        """Raises `Unauthenticated` unless an operator's key is presented."""
        self._admitted.operators.caller_of(headers, self._asked.wall())

    def standings(self) -> Mapping[Standing, int]:
        """How many callers' keys are valid, expired and revoked now."""
        now = self._asked.wall()
        counted = Counter(key.standing(now) for key in self._admitted.callers)
        return {"valid": counted["valid"], "expired": counted["expired"], "revoked": counted["revoked"]}

    def adopt(self, keys: Keys) -> None:
        """Let in by these from now on; what was let in before goes on to its end."""
        self._admit(keys)
        state = self.state
        self.state = KeysState(datetime.now(UTC), loads=state.loads + 1, refusals=state.refusals)
        self._log.info("keys", state="loaded", path=self.path, keys=len(keys.callers), admin_keys=len(keys.operators))
        self._tell(f"{self.path} is loaded: {len(keys.callers)} keys")

    def revoke(self, digests: frozenset[bytes]) -> None:
        """Turn away the keys with these digests, whatever the file says, which may reach this machine later."""
        if digests != self._revoked:
            self._revoked = digests
            self._admit(self._keys)
            self._log.info("keys", state="revoked elsewhere", keys=len(digests))

    def _admit(self, keys: Keys) -> None:
        """`_keys` is what the file says, so that what is no longer revoked elsewhere holds again."""
        self._keys = keys
        self._admitted = keys.without(self._revoked)
        self._asked.keyring = self._admitted.callers

    def refuse(self, problems: tuple[Problem, ...], unresolved: Keys | None) -> None:
        """Go on as before: the file as it stands now cannot be used, for these reasons. Where nothing but a name is
        wrong (the policy has changed), what the file takes out, revokes or lets expire still counts."""
        if unresolved is not None:
            self._admit(self._keys.tightened_by(unresolved))
        self.state = replace(self.state, problems=problems, refusals=self.state.refusals + 1)
        for p in first_of(problems):
            place = {"file": p.file, "line": p.line, "column": p.column}
            self._log.error("keys", state="invalid", message=p.message, **place)
            self._tell(str(p))
        self._tell(f"{self.path} is not loaded; the keys before it stay in use")
