"""Keeps the policy and the keys in use equal to their files: load, and hand over what loads.

Refuses to watch (follow.py does), to build anything from a policy, and to say what came of it: whoever serves does
that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

from gateway.follow import Follower
from gateway.keyfile import Known
from gateway.keys import Keys
from gateway.loading import FileState, read_keys, read_policy, state_of
from gateway.policy import Policy
from gateway.policyfile import Problem


class Serves(Protocol):
    """Who serves by a policy. Each call counts as one reload."""

    async def adopt(self, policy: Policy) -> None:
        """Serve by this one from now on. Raises OSError where a file that it names cannot be read."""

    def refuse(self, problems: tuple[Problem, ...]) -> None:
        """Go on as before; the files cannot be used for these reasons."""

    def keep(self) -> None:
        """Go on as before; the files say what is in use."""


class Reloader(Follower):
    """One policy's files and who serves by them."""

    def __init__(self, policy: Policy, states: Mapping[str, FileState], environ: Mapping[str, str], serves: Serves):
        """`policy` is the one in use, just read with the same `environ`; `states` are its files as they were then."""
        super().__init__(states)
        self._path = policy.path
        self._environ = environ
        self._serves = serves
        self._hash = policy.hash

    async def _load(self, states: Mapping[str, FileState]) -> Mapping[str, FileState]:
        """What does not load is told, and changes nothing else."""
        loaded = await asyncio.to_thread(read_policy, self._path, self._environ)
        # Where the policy file is wrong, nobody has asked for the deployments file: what it may become counts, too.
        kept = {} if loaded.policy is not None else {file: state_of(file) for file in states}
        if loaded.policy is None:
            self._serves.refuse(loaded.problems)
        elif loaded.policy.hash == self._hash:
            self._serves.keep()
        else:
            await self._adopt(loaded.policy)
        return {**kept, **loaded.states}

    async def _adopt(self, policy: Policy) -> None:
        try:
            await self._serves.adopt(policy)
        except OSError as error:
            why = f"{error.filename or 'a file that it names'} cannot be read: {error.strerror or 'it failed'}"
            self._serves.refuse((Problem(self._path, 0, 0, why),))
        else:
            self._hash = policy.hash


class Admits(Protocol):
    """Who admits callers by keys. Each call of the last two counts as one reload."""

    path: str

    def known(self) -> Known:
        """What keys may name: the policy in use says so."""

    def adopt(self, keys: Keys) -> None:
        """Admit by these from now on."""

    def refuse(self, problems: tuple[Problem, ...], unresolved: Keys | None) -> None:
        """Go on as before; the file cannot be used for these reasons. `unresolved`: its keys where nothing but what
        they name is wrong; what is revoked there is revoked."""


class KeysReloader(Follower):
    """One file of keys and who admits callers by it. Where the policy in use changes, the file is read again: what it
    names may have come or gone."""

    def __init__(self, states: Mapping[str, FileState], admits: Admits) -> None:
        """`states`: the file as it was when the keys in use were read."""
        super().__init__(states)
        self._admits = admits
        self._known = admits.known()

    def _stale(self) -> bool:
        return self._admits.known() != self._known

    async def _load(self, _: Mapping[str, FileState]) -> Mapping[str, FileState]:
        """What does not load is told, and changes nothing else."""
        self._known = self._admits.known()
        loaded = await asyncio.to_thread(read_keys, self._admits.path, self._known)
        if loaded.keys is None:
            self._admits.refuse(loaded.problems, loaded.unresolved)
        else:
            self._admits.adopt(loaded.keys)
        return loaded.states
