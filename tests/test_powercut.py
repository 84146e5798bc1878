"""The power is cut for real: a virtual machine is killed, and its disk loses what it had not flushed.

Needs root, and Debian's user-mode-linux, dmsetup, xfsprogs, btrfs-progs, e2fsprogs and iproute2. The seed is DQM_FAULT_SEED;
DQM_POWER_CUTS is the number of cuts that lose the disk's cache (24), and an eighth of it of those that do not.
"""

from __future__ import annotations

import os
import platform

import pytest
from client import SEED
from powercut.host import Experiment, Result, missing

pytestmark = pytest.mark.slow

CUTS = int(os.environ.get("DQM_POWER_CUTS", "24"))
FILE_SYSTEMS = ("ext4", "xfs", "btrfs")


@pytest.fixture(autouse=True)
def user_mode_linux() -> None:
    if platform.machine() != "x86_64":
        pytest.skip("User-Mode Linux is used here on x86-64 only")
    if programs := missing():
        pytest.skip(f"not installed: {', '.join(programs)}")


def report(title: str, result: Result) -> None:
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(result.outcomes.items()))
    wrong = ", ".join(
        f"{kind}: {count} in {result.cuts_with(kind)} cuts" for kind, count in sorted(result.kinds().items())
    )
    print(
        f"\n{title}: {result.cuts} cuts, {result.acknowledged} uploads acknowledged ({outcomes}), "
        f"{result.judged} pairs of an upload and a later cut; wrong: {wrong or 'nothing'}"
    )


@pytest.mark.parametrize("fs", FILE_SYSTEMS)
def test_killed_kernel_loses_nothing(fs: str) -> None:
    with Experiment(fs, SEED) as experiment:
        experiment.kill(cuts=max(2, CUTS // 8), uploads=60)
    report(f"{fs}, kernel killed", experiment.result)
    assert not experiment.result.wrong


@pytest.mark.parametrize("fs", FILE_SYSTEMS)
def test_lost_disk_cache_loses_nothing(fs: str) -> None:
    with Experiment(fs, SEED) as experiment:
        experiment.lose_cache(cuts=CUTS, uploads=max(60, CUTS))
    report(f"{fs}, disk's cache lost", experiment.result)
    assert not experiment.result.wrong


# Without fsync the same harness must see losses; otherwise it would prove nothing.
@pytest.mark.parametrize("fs", FILE_SYSTEMS)
@pytest.mark.parametrize(
    ("skipped", "seen", "unseen"),
    [
        ("file,folder,receipts", {"lost", "no receipt"}, set[str]()),
        ("file", {"torn"}, set[str]()),
        ("receipts", {"no receipt"}, {"lost", "torn", "nameless"}),
        ("folder,receipts", {"lost"}, {"torn"}),
    ],
)
def test_control_without_fsync_loses(fs: str, skipped: str, seen: set[str], unseen: set[str]) -> None:
    with Experiment(fs, SEED, skip=skipped) as experiment:
        experiment.lose_cache(cuts=24, uploads=60)
    report(f"{fs}, without fsync of {skipped}", experiment.result)
    kinds = set(experiment.result.kinds())
    assert seen <= kinds
    assert not unseen & kinds, experiment.result.wrong
