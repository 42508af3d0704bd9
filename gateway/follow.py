"""Follows files: something is to be done when what they say may have changed.

Owns when to look. Refuses to know what the files are.

Directories are watched, not files: an editor replaces a file by renaming another over it, and a ConfigMap swaps a
symbolic link beside it (`..data`). Where the file itself is a link, the directory that it leads to is watched as well;
and twice a second the files are looked at, for what no event tells: a network file system, a link further up the path.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import aclosing, suppress

from watchfiles import Change, awatch

from gateway.loading import FileState, state_of

STEP_MS = 50  # a change is taken up once nothing else has changed for so long: an editor writes more than once
LONGEST_WAIT_MS = 500  # or after this long, where something changes all the time
LOOK_EVERY_MS = 500  # without an event


class Follower(ABC):
    """Files, and what is done when they change. Invariant: it is done by one at a time, and the last change of the
    files is always followed by it."""

    def __init__(self, states: Mapping[str, FileState]) -> None:
        """`states` are the files as they were when they were last read."""
        self._states = states
        self._reloading = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._asked: set[asyncio.Task[None]] = set()

    @abstractmethod
    async def _load(self, states: Mapping[str, FileState]) -> Mapping[str, FileState]:
        """Read the files and do what is to be done; the files as they were just before. `states` are those of the last
        time."""

    def _stale(self) -> bool:
        """Whether something else than the files has changed what they mean."""
        return False

    async def reload(self) -> None:
        """Load the files now, whether something seems to have changed or not."""
        async with self._reloading:
            self._states = await self._load(self._states)

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
        differ: bool = bool(changed) or self._stale() or await asyncio.to_thread(self._differ)
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
            raise FileNotFoundError(", ".join(sorted(folders)))
        return found

    def _files(self) -> set[str]:
        """The files, and where they lead."""
        return {*self._states, *(os.path.realpath(file) for file in self._states)}
