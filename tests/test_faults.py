"""What is acknowledged is kept, whatever call fails, whichever process dies, and whatever other processes do meanwhile.

The promise is faults.assert_promise; how the receiver keeps it is not looked at.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client import PROJECT
from faults import faulty_receiver

# --- a fault at every step ---------------------------------------------------------------------------------------------


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: these tests sync thousands of files and pull no plug."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="dqm-faults-", dir=shared))
    yield folder
    shutil.rmtree(folder)


def assert_promise_at_every_step(base: Path, situation: str, action: str) -> None:
    run = subprocess.run(
        faulty_receiver("every-step", str(base), situation, action),
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    attempts = [json.loads(line) for line in run.stdout.splitlines()]
    assert attempts, "no step was found"
    broken = [f"{attempt['step']}: {attempt['problem']}" for attempt in attempts if attempt["problem"]]
    assert not broken, f"{situation}, {action}:\n" + "\n".join(broken)


SITUATIONS = ("a new folder", "a taken name", "a duplicate", "an invalid file", "a dead writer")


def table(quick: str, *actions: str) -> list[Any]:
    """Return situations and actions for parametrize; only the situations in `quick` (their last words) are not slow."""
    return [
        pytest.param(situation, action, marks=[] if situation.split()[-1] in quick.split() else [pytest.mark.slow])
        for action in actions
        for situation in SITUATIONS
    ]


@pytest.mark.parametrize(("situation", "action"), table("folder name duplicate file writer", "kill before", "kill after"))
def test_death_at_any_step_keeps_the_promise(memory: Path, situation: str, action: str) -> None:
    assert_promise_at_every_step(memory, situation, action)


@pytest.mark.parametrize(
    ("situation", "error"),
    [*table("folder name duplicate", "EIO"), *table("name", "ENOSPC", "EMFILE", "EACCES"), *table("", "ESTALE")],
)
def test_failure_of_any_call_keeps_the_promise(memory: Path, situation: str, error: str) -> None:
    assert_promise_at_every_step(memory, situation, error)


@pytest.mark.parametrize(
    ("situation", "action"), [*table("name duplicate", "EIO after", "torn", "short"), *table("", "EIO for good")]
)
def test_half_done_and_lasting_failures_keep_the_promise(memory: Path, situation: str, action: str) -> None:
    assert_promise_at_every_step(memory, situation, action)


@pytest.mark.parametrize(("situation", "action"), [*table("name duplicate", "take"), *table("name", "clear", "unlock")])
def test_other_programs_between_two_steps_break_nothing(memory: Path, situation: str, action: str) -> None:
    """Overwatch takes the file; `.incoming/` or `.lock` is removed."""
    assert_promise_at_every_step(memory, situation, action)


@pytest.mark.parametrize(
    ("situation", "action"),
    [
        *table("folder name duplicate", "rival"),
        *table("folder", "equal rival"),
        *table("", "rival, then EIO"),
        *table("name", "equal rival, then EIO"),
    ],
)
def test_whole_upload_between_two_steps_breaks_nothing(memory: Path, situation: str, action: str) -> None:
    """Another process sends a file of the same name meanwhile; then the first may fail."""
    assert_promise_at_every_step(memory, situation, action)
