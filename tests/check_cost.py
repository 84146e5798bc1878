"""Check ROOT files in processes of their own and measure the processor time and the memory that each check takes.

As a program it answers each line of standard input, a JSON list of paths, with a JSON list of `Answer`s. For each line it
forks: a process that has only imported `rootcheck` costs a second to start, but hardly anything to fork.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from rootcheck import InvalidRootFile, check_root_file

HONEST = Path(__file__).parent / "data" / "h1_all.root"
MOST_SECONDS = 120  # of processor time, after which the system ends the process
# Of processor time, as other processes share the machine, where the loop in `_unit` takes no more than UNIT.
SECONDS = 3.0
UNIT = 0.1


class Answer(NamedTuple):
    """The end of a check and its costs."""

    reason: str | None  # None for a valid file
    objects: int
    seconds: float  # divided by how much slower the machine is than the one whose seconds are meant
    kibibytes: int


class Checker:
    """A process that checks files."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def check(self, paths: Sequence[Path]) -> list[Answer]:
        assert self._process.stdin and self._process.stdout
        print(json.dumps([str(path) for path in paths]), file=self._process.stdin, flush=True)
        return [Answer(*answer) for answer in json.loads(self._process.stdout.readline())]

    def close(self) -> None:
        self._process.communicate()


def _peak() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def _unit() -> float:
    """Return how long the same work takes each time, by which a slower machine is given more time."""
    start = time.process_time()
    for _ in range(3):
        sum(number * number for number in range(500_000))
    return time.process_time() - start


def _answer(path: str, before: int) -> Answer:
    start = time.process_time()
    try:
        reason, objects = None, len(check_root_file(path))
    except InvalidRootFile as error:
        reason, objects = str(error), 0
    seconds, kibibytes = time.process_time() - start, _peak() - before
    if seconds > SECONDS:
        seconds /= max(1.0, _unit() / UNIT)
    return Answer(reason, objects, seconds, kibibytes)


def main() -> None:
    check_root_file(HONEST)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
            check_root_file(HONEST)  # maps the code and data that every check needs
            before = _peak()
            print(json.dumps([_answer(path, before) for path in json.loads(line)]), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print("[]", flush=True)


if __name__ == "__main__":
    main()
