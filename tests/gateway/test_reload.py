"""Following a policy's files: every way in which they change is seen within a second, and what does not load changes
nothing."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gateway.loading import read_policy
from gateway.policy import Policy
from gateway.policyfile import Problem
from gateway.reload import Reloader

DEPLOYMENTS = """
version: 1
deployments:
  home: {backend: openai, url: "http://127.0.0.1:1/v1", model: m, zone: on_premises}
"""
POLICY = """
version: 1
deployments: deployments.yaml
default: {candidates: home, because: BECAUSE}
"""


def text(because: str) -> str:
    return POLICY.replace("BECAUSE", because)


def soon(path: Path) -> float:
    """Seconds that a change may take to be live: half a second to be noticed, and some times what reading the files
    takes on this machine at this moment. Where that is 40 ms or less, a second at most."""
    began = time.monotonic()
    read_policy(str(path), {})
    return 0.6 + 10 * (time.monotonic() - began)


@dataclass
class Serves:
    """Remembers what it was told, and wakes who waits for it."""

    told: list[str] = field(default_factory=list)
    fails: bool = False

    async def adopt(self, policy: Policy) -> None:
        if self.fails:
            raise FileNotFoundError(2, "No such file or directory", "ca.pem")
        self.told.append(policy.default.because)

    def refuse(self, problems: tuple[Problem, ...]) -> None:
        self.told.append(str(problems[0]).rpartition("/")[2])

    def keep(self) -> None:
        self.told.append("kept")

    async def heard(self, *expected: str) -> float:
        """Wait until exactly this was told; the seconds that took."""
        began = time.monotonic()
        async with asyncio.timeout(5):
            while self.told != list(expected):  # noqa: ASYNC110 - what is awaited is told by a thread's watch
                await asyncio.sleep(0.01)
        return time.monotonic() - began


def follow(path: Path, check: Callable[[Serves, Reloader], Awaitable[None]], serves: Serves | None = None) -> None:
    """Run the check while the policy at `path` is followed."""

    async def run() -> None:
        told = serves or Serves()
        loaded = read_policy(str(path), {})
        assert loaded.policy is not None, loaded.problems
        reloader = Reloader(loaded.policy, loaded.states, {}, told)
        watching = asyncio.create_task(reloader.watch())
        await asyncio.sleep(0.1)  # the watch is laid
        try:
            await check(told, reloader)
        finally:
            reloader.stop()
            await watching

    asyncio.run(run())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A policy in a folder of its own."""
    (tmp_path / "deployments.yaml").write_text(DEPLOYMENTS)
    (tmp_path / "policy.yaml").write_text(text("one"))
    return tmp_path / "policy.yaml"


def test_a_file_that_is_written_over_is_live_within_a_second(path: Path) -> None:
    async def check(serves: Serves, _: Reloader) -> None:
        path.write_text(text("two"))
        assert await serves.heard("two") < soon(path)
        path.write_text(text("three"))
        assert await serves.heard("two", "three") < soon(path)

    follow(path, check)


def test_a_file_that_is_replaced_as_editors_do_is_seen_each_time(path: Path) -> None:
    async def check(serves: Serves, _: Reloader) -> None:
        expected = []
        for because in ("two", "three", "four"):
            (path.parent / ".policy.yaml.swp").write_text(text(because))
            os.replace(path.parent / ".policy.yaml.swp", path)
            expected.append(because)
            await serves.heard(*expected)

    follow(path, check)


def test_each_swap_of_a_configmap_is_seen(tmp_path: Path) -> None:
    """The kubelet's way: files are links through `..data`, which is a link to a folder and is replaced by a rename."""

    def publish(number: int, because: str) -> None:
        folder = tmp_path / f"..2026_{number}"
        folder.mkdir()
        (folder / "deployments.yaml").write_text(DEPLOYMENTS)
        (folder / "policy.yaml").write_text(text(because))
        old = (tmp_path / "..data").resolve() if number else None
        (tmp_path / "..data_tmp").symlink_to(folder.name)
        os.replace(tmp_path / "..data_tmp", tmp_path / "..data")
        if old is not None:
            for file in old.iterdir():
                file.unlink()
            old.rmdir()

    publish(0, "one")
    for name in ("policy.yaml", "deployments.yaml"):
        (tmp_path / name).symlink_to(f"..data/{name}")

    async def check(serves: Serves, _: Reloader) -> None:
        expected = []
        for number, because in enumerate(("two", "three", "four"), 1):
            publish(number, because)
            expected.append(because)
            assert await serves.heard(*expected) < 0.5 + soon(tmp_path / "policy.yaml")

    follow(tmp_path / "policy.yaml", check)


def test_a_link_further_up_the_path_that_is_swapped_is_seen(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "deployments.yaml").write_text(DEPLOYMENTS)
        (tmp_path / name / "policy.yaml").write_text(text(name))
    (tmp_path / "current").symlink_to("a")

    async def check(serves: Serves, _: Reloader) -> None:
        (tmp_path / "next").symlink_to("b")
        os.replace(tmp_path / "next", tmp_path / "current")
        await serves.heard("b")
        (tmp_path / "b" / "policy.yaml").write_text(text("c"))
        assert await serves.heard("b", "c") < 0.5 + soon(tmp_path / "current" / "policy.yaml")

    follow(tmp_path / "current" / "policy.yaml", check)


def test_the_deployments_file_counts_as_well(path: Path) -> None:
    async def check(serves: Serves, _: Reloader) -> None:
        (path.parent / "deployments.yaml").write_text(DEPLOYMENTS.replace("model: m", "model: other"))
        await serves.heard("one")

    follow(path, check)


def test_what_does_not_load_is_told_with_its_place_and_what_mends_it_is_taken(path: Path) -> None:
    async def check(serves: Serves, _: Reloader) -> None:
        path.write_text(text("two") + "rulse: []\n")
        broken = 'policy.yaml:5:1: unknown field "rulse" (did you mean "rules"?)'
        await serves.heard(broken)
        path.write_text(text("two"))
        await serves.heard(broken, "two")

    follow(path, check)


def test_a_file_that_is_gone_is_a_policy_that_does_not_load(path: Path) -> None:
    async def check(serves: Serves, _: Reloader) -> None:
        path.unlink()
        gone = "policy.yaml: the file cannot be read: No such file or directory"
        await serves.heard(gone)
        path.write_text(text("back"))
        await serves.heard(gone, "back")

    follow(path, check)


def test_a_folder_that_is_gone_is_looked_for_until_it_is_back(path: Path) -> None:
    async def check(serves: Serves, _: Reloader) -> None:
        elsewhere = path.parent.with_name("elsewhere")
        path.parent.rename(elsewhere)
        gone = "policy.yaml: the file cannot be read: No such file or directory"
        await serves.heard(gone)
        await asyncio.sleep(1.2)
        assert serves.told == [gone], "it is told once"
        (elsewhere / "policy.yaml").write_text(text("back"))
        elsewhere.rename(path.parent)
        await serves.heard(gone, "back")
        path.write_text(text("again"))
        assert await serves.heard(gone, "back", "again") < 0.5 + soon(path)

    follow(path, check)


def test_while_the_policy_file_is_wrong_a_change_of_the_other_is_not_taken_up_for_ever(path: Path) -> None:
    async def check(serves: Serves, _: Reloader) -> None:
        path.write_text("version: 2\n")
        (path.parent / "deployments.yaml").write_text(DEPLOYMENTS + "\n")
        await asyncio.sleep(2.3)
        assert len(serves.told) <= 2
        path.write_text(text("two"))
        await serves.heard(*serves.told, "two")

    follow(path, check)


def test_other_files_of_the_folder_mean_nothing(path: Path) -> None:
    async def check(serves: Serves, _: Reloader) -> None:
        for number in range(30):
            (path.parent / "gateway.log").write_text("x" * number)
            await asyncio.sleep(0.02)
        path.write_text(text("two"))
        await serves.heard("two")

    follow(path, check)


def test_asked_to_reload_it_says_that_nothing_changed(path: Path) -> None:
    async def check(serves: Serves, reloader: Reloader) -> None:
        reloader.ask()
        await serves.heard("kept")

    follow(path, check)


def test_a_comment_is_no_other_policy(path: Path) -> None:
    async def check(serves: Serves, _: Reloader) -> None:
        path.write_text(text("one") + "# reviewed\n")
        await serves.heard("kept")

    follow(path, check)


def test_a_policy_that_cannot_be_adopted_is_tried_again_when_asked(path: Path) -> None:
    async def check(serves: Serves, reloader: Reloader) -> None:
        path.write_text(text("two"))
        refused = "policy.yaml: ca.pem cannot be read: No such file or directory"
        await serves.heard(refused)
        serves.fails = False
        await reloader.reload()
        await serves.heard(refused, "two")

    follow(path, check, Serves(fails=True))
