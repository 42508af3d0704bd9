"""Keeps the policy in use equal to its files: watch, load, and hand over what loads.

Owns when to look. Refuses to build anything from a policy and to say what came of it: whoever serves does that.

Directories are watched, not files: an editor replaces a file by renaming another over it, and a ConfigMap swaps a
symbolic link beside it (`..data`). Where the file itself is a link, the directory that it leads to is watched as well;
and twice a second the files are looked at, for what no event tells: a network file system, a link further up the path.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Mapping
from contextlib import aclosing, suppress
from typing import Protocol

from watchfiles import Change, awatch

from gateway.loading import FileState, read_policy, state_of
from gateway.policy import Policy
from gateway.policyfile import Problem

STEP_MS = 50  # a change is taken up once nothing else has changed for so long: an editor writes more than once
LONGEST_WAIT_MS = 500  # or after this long, where something changes all the time
LOOK_EVERY_MS = 500  # without an event


class Serves(Protocol):
    """Who serves by a policy. Each call counts as one reload."""

    async def adopt(self, policy: Policy) -> None:
        """Serve by this one from now on. Raises OSError where a file that it names cannot be read."""

    def refuse(self, problems: tuple[Problem, ...]) -> None:
        """Go on as before; the files cannot be used for these reasons."""

    def keep(self) -> None:
        """Go on as before; the files say what is in use."""


class Reloader:
    """One policy's files and who serves by them. Invariant: one reload at a time, and the last change of the files is
    always followed by one."""

    def __init__(self, policy: Policy, states: Mapping[str, FileState], environ: Mapping[str, str], serves: Serves):
        """`policy` is the one in use, just read with the same `environ`; `states` are its files as they were then."""
        self._path = policy.path
        self._environ = environ
        self._serves = serves
        self._hash = policy.hash
        self._states = states
        self._reloading = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._asked: set[asyncio.Task[None]] = set()

    async def watch(self) -> None:
        """Follow the files until `stop`."""
        while not self._stopping.is_set():
            try:
                await self._follow(await asyncio.to_thread(self._places))
            except (OSError, RuntimeError):  # no directory, or no more watches to be had: look without events
                await self._look(())
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY_MS / 1000):
                        await self._stopping.wait()

    def stop(self) -> None:
        """End `watch`."""
        self._stopping.set()

    def ask(self) -> None:
        """Reload soon, whether something seems to have changed or not: what SIGHUP means."""
        task = asyncio.create_task(self.reload())
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)

    async def reload(self) -> None:
        """Load the files now. What does not load is told, and changes nothing else."""
        async with self._reloading:
            loaded = await asyncio.to_thread(read_policy, self._path, self._environ)
            # Where the policy file is wrong, nobody has asked for the deployments file: what it may become counts, too.
            kept = {} if loaded.policy is not None else {file: state_of(file) for file in self._states}
            self._states = {**kept, **loaded.states}
            if loaded.policy is None:
                self._serves.refuse(loaded.problems)
            elif loaded.policy.hash == self._hash:
                self._serves.keep()
            else:
                await self._adopt(loaded.policy)

    async def _adopt(self, policy: Policy) -> None:
        try:
            await self._serves.adopt(policy)
        except OSError as error:
            why = f"{error.filename or 'a file that it names'} cannot be read: {error.strerror or 'it failed'}"
            self._serves.refuse((Problem(self._path, 0, 0, why),))
        else:
            self._hash = policy.hash

    async def _follow(self, places: Mapping[str, FileState]) -> None:
        """Reload at each change until the directories are others. Raises what `awatch` does where it cannot watch."""
        changes = awatch(
            *places,
            watch_filter=self._concerns,
            debounce=LONGEST_WAIT_MS,
            step=STEP_MS,
            rust_timeout=LOOK_EVERY_MS,
            yield_on_timeout=True,
            recursive=False,
            stop_event=self._stopping,
        )
        async with aclosing(changes):
            async for changed in changes:
                await self._look(changed)
                if await asyncio.to_thread(self._places) != places:
                    return

    async def _look(self, changed: Collection[object]) -> None:
        differ: bool = bool(changed) or await asyncio.to_thread(self._differ)
        if differ:
            await self.reload()

    def _differ(self) -> bool:
        return any(state_of(file) != state for file, state in self._states.items())

    def _concerns(self, _: Change, path: str) -> bool:
        """Whether an event may be about the files: one of their names, or a ConfigMap's link."""
        name = os.path.basename(path)
        return name.startswith("..") or any(name == os.path.basename(file) for file in self._files())

    def _places(self) -> Mapping[str, FileState]:
        """The directories to watch, each with what it is now, since a path may come to lead elsewhere. Raises OSError
        where there is none."""
        folders = {os.path.dirname(os.path.abspath(file)) for file in self._files()}
        found = {folder: state[:2] for folder in folders if (state := state_of(folder)) is not None}
        if not found:
            raise FileNotFoundError(self._path)
        return found

    def _files(self) -> set[str]:
        """The files, and where they lead."""
        return {*self._states, *(os.path.realpath(file) for file in self._states)}
