"""The promise of the receiver as one assertion, and what the fault tests share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from client import HEADERS, HISTOGRAMS, PROJECT, Reply, visible

INVALID = HISTOGRAMS[:3000] + bytes(2000) + HISTOGRAMS[5000:]
ACCEPTED = ("stored", "duplicate", "replaced")

Sent = tuple[str, str]  # the name and the SHA-256 of an upload


class BrokenPromise(AssertionError):
    """The data folder does not hold what was promised."""


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def name_of(time_stamp: int, run: int = 123, agent: str = "testagent") -> str:
    """Return the name of a file, worked out without the receiver's code."""
    local = datetime.fromtimestamp(time_stamp, ZoneInfo("Europe/Zurich"))
    return f"{agent}histos_{run}_DQM_{local:%Y_%m_%d_%H_%M_%S}.root"


def headers_of(time_stamp: int, run: int = 123, agent: str = "testagent") -> dict[str, str]:
    return {**HEADERS, "timeStamp": str(time_stamp), "runNumber": str(run), "amoreAgent": agent}


def variant(chance: random.Random, size: int = 0) -> bytes:
    """Return a valid file that no other equals: ROOT reads nothing behind the end of its data."""
    return HISTOGRAMS + chance.randbytes(size or chance.randrange(16, 4000))


def replaced(folder: Path, name: str = "") -> list[bytes]:
    """Return the contents that were preserved when a different file took a name."""
    return [path.read_bytes() for path in (folder / ".replaced").glob(f"{name}*") if path.is_file()]


def uploads_in_progress(folder: Path) -> list[str]:
    """Return the files in `.incoming/` but for the locks of writers."""
    paths = sorted((folder / ".incoming").rglob("*"))
    return [str(path.relative_to(folder)) for path in paths if path.is_file() and path.name != "lock"]


def all_receipts(folder: Path) -> list[dict[str, Any]]:
    """Return the receipts of all runs; a line that a crash has torn is none."""
    found = []
    for path in sorted((folder / ".receipts").rglob("*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                receipt = json.loads(line)
            except ValueError:
                continue
            if isinstance(receipt, dict) and "outcome" in receipt:
                found.append(receipt)
    return found


def outcomes(folder: Path) -> Counter[str]:
    return Counter(receipt["outcome"] for receipt in all_receipts(folder))


def assert_promise(
    folder: Path,
    acknowledged: Iterable[Sent],
    *,
    unsure: Iterable[Sent] = (),
    taken: Path | None = None,
) -> None:
    """Raise BrokenPromise unless the folder holds all that was acknowledged, and shows nothing that was not sent whole.

    `unsure` uploads may have happened: they were answered 500, 503 or not at all. `taken` is the folder to which a consumer
    moves visible files as `<name>.<anything>`.
    """
    acknowledged = Counter(acknowledged)
    sent = acknowledged.keys() | set(unsure)
    shown = {(name, sha256(content)) for name, content in visible(folder).items()}
    kept = {(path.name.partition(".root")[0] + ".root", sha256(path.read_bytes())) for path in _files(folder, taken)}
    problems = [f"{name} shows bytes that were not sent ({digest[:8]})" for name, digest in sorted(shown - sent)]
    problems += [f"the upload of {name} ({digest[:8]}) is lost" for name, digest in acknowledged.keys() - shown - kept]
    if taken is None:
        names = {name for name, _ in acknowledged} - {name for name, _ in shown}
        problems += [f"the name {name} has vanished" for name in sorted(names)]
    lines = Counter(
        (receipt["filename"], receipt["sha256"]) for receipt in all_receipts(folder) if receipt["outcome"] in ACCEPTED
    )
    problems += [
        f"{number} uploads of {upload[0]} ({upload[1][:8]}) were acknowledged, {lines[upload]} have a receipt"
        for upload, number in acknowledged.items()
        if lines[upload] < number
    ]
    problems += [
        f"a receipt tells of {name} ({digest[:8]}), which is nowhere" for name, digest in lines.keys() - kept - shown
    ]
    if problems:
        raise BrokenPromise("\n".join(problems))


def _files(folder: Path, taken: Path | None) -> Iterable[Path]:
    for place in (folder / ".replaced", taken):
        if place is not None and place.is_dir():
            yield from (path for path in place.iterdir() if path.is_file())


def assert_nothing_left(folder: Path) -> None:
    """Raise BrokenPromise if `.incoming/` holds an upload; to be asked when none is in progress."""
    left = uploads_in_progress(folder)
    if left:
        raise BrokenPromise(f"left behind: {', '.join(left)}")


PROGRAM = Path(__file__).with_name("faulty_receiver.py")


def faulty_receiver(*arguments: str) -> list[str]:
    """Return the command that runs that program, from PROJECT."""
    return [sys.executable, str(PROGRAM), *arguments]


class Process:
    """A receiver in a process of its own, without HTTP, that does as it is told: see faulty_receiver.Served."""

    def __init__(self, folder: Path, *, start: bool = True, prefix: tuple[str, ...] = (), **settings: str) -> None:
        self.folder = folder
        self.forks: list[int] = []
        self._process = subprocess.Popen(
            [*prefix, *faulty_receiver("serve", str(folder))],
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        if start:
            self.do("start", **settings)

    def begin(self, command: str, **arguments: object) -> None:
        """Have a command carried out; `result` waits for its end."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, arguments]) + "\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """Return the result of the command begun first; raises ConnectionError if the process has died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise ConnectionError(f"the process has ended with status {self._process.returncode}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def do(self, command: str, **arguments: object) -> Any:
        self.begin(command, **arguments)
        return self.result()

    def begin_post(self, body: bytes, time_stamp: int = 234, **more: str) -> None:
        self.begin("post", **upload(body, time_stamp, **more))

    def post(self, body: bytes, time_stamp: int = 234, **more: str) -> Reply:
        self.begin_post(body, time_stamp, **more)
        return Reply(*self.result())

    def get(self, path: str) -> Reply:
        return Reply(*self.do("get", path=path))

    def batch(self, bodies: Iterable[bytes]) -> list[Reply]:
        """Send files of one name at once."""
        return [Reply(*result) for result in self.do("batch", uploads=[upload(body) for body in bodies])]

    def fault(self, pattern: str, action: str, times: int = 1) -> None:
        """Take an action at the next steps, so many, that match: see faulty_receiver.Steps."""
        self.do("fault", pattern=pattern, action=action, times=times)

    def fork(self, *uploads: dict[str, Any]) -> list[Reply]:
        """Send files from a forked child, which then lives until this process is closed."""
        pid, results = self.do("fork", commands=[("post", upload) for upload in uploads])
        self.forks.append(pid)
        return [Reply(*result) for result in results]

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        for pid in self.forks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def upload(body: bytes, time_stamp: int = 234, **more: str) -> dict[str, Any]:
    """Return a file as Process hands it on."""
    return {"body": body.hex(), "headers": {**headers_of(time_stamp), **more}}
