"""The promise of the receiver as one assertion, and what the fault tests share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from client import HEADERS, HISTOGRAMS, PROJECT, Reply, connect, head, incoming, read_answer
from history import History, judge, look, receipts_in, sha256_of

INVALID = HISTOGRAMS[:3000] + bytes(2000) + HISTOGRAMS[5000:]

Sent = tuple[str, str]  # the name and the SHA-256 of an upload


def failing(error: int, call: Callable[..., Any] | None = None, when: Callable[..., bool] = bool) -> Callable[..., Any]:
    """Return a function that raises an OSError: always, or in place of the first call for which `when` is true."""
    done: list[bool] = []

    def fail(*arguments: Any, **more: Any) -> Any:
        if call and (done or not when(*arguments, **more)):
            return call(*arguments, **more)
        done.append(True)
        raise OSError(error, os.strerror(error))

    return fail


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


def sent(*bodies: bytes, time_stamp: int = 234) -> list[Sent]:
    return [(name_of(time_stamp), sha256(body)) for body in bodies]


def variant(chance: random.Random, size: int = 0) -> bytes:
    """Return a valid file that no other equals: ROOT reads nothing behind the end of its data."""
    return HISTOGRAMS + chance.randbytes(size or chance.randrange(16, 4000))


def outcomes(folder: Path) -> Counter[str]:
    return Counter(receipt["outcome"] for receipt in receipts_in(folder))


def empty(folder: Path) -> None:
    """Take all accepted files and all receipts away, as Overwatch and an operator may at any time."""
    for path in (*folder.glob("*.root"), *folder.glob(".replaced/*"), *folder.glob(".receipts/*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def taken_files(folder: Path) -> list[Sent]:
    """Return the files that a consumer has moved to a folder, as `<number>-<name>`."""
    return [(path.name.partition("-")[2], sha256_of(path)) for path in folder.iterdir()]


def assert_promise(
    folder: Path, acknowledged: Iterable[Sent], *, unsure: Iterable[Sent] = (), taken: Iterable[Sent] = ()
) -> None:
    """Raise BrokenPromise unless the folder holds all that was acknowledged, and shows nothing that was not sent whole.

    The order of the uploads is unknown. `unsure` ones may have happened: they were answered 500, 503 or not at all.
    """
    history = History()
    history.acknowledged = [history.send(*upload) for upload in acknowledged]
    for upload in unsure:
        history.send(*upload)
    if wrong := judge(look(folder), history, taken=taken):
        raise BrokenPromise(json.dumps(wrong, indent=1))


def assert_nothing_left(folder: Path) -> None:
    """Raise BrokenPromise if `.incoming/` holds an upload; to be asked when none is in progress."""
    if left := incoming(folder):
        raise BrokenPromise(f"left behind: {', '.join(map(str, left))}")


# --- uploads in two halves ---------------------------------------------------------------------------------------------


def begin_upload(port: int, body: bytes, time_stamp: int, **more: str) -> socket.socket:
    """Send the head and half of a body."""
    peer = connect(port)
    fields = {**headers_of(time_stamp), **more, "Content-Length": str(len(body))}
    peer.sendall(head(**fields) + body[: len(body) // 2])
    return peer


def end_upload(peer: socket.socket, body: bytes) -> int:
    """Send the other half and return the status."""
    with peer:
        peer.sendall(body[len(body) // 2 :])
        return read_answer(peer)[0]


# --- receivers in processes of their own -------------------------------------------------------------------------------


class ForkServer:
    """Forks processes of faulty_receiver.py, as its imports take a second."""

    def __init__(self, *prefix: str) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            program = str(Path(__file__).with_name("faulty_receiver.py"))
            self._process = subprocess.Popen(
                [*prefix, sys.executable, program, str(theirs.fileno())],
                cwd=PROJECT,
                env={**os.environ, "PYTHONPATH": str(PROJECT)},
                pass_fds=[theirs.fileno()],
            )

    def fork(self) -> socket.socket:
        """Fork a process and return the connection to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._socket, [b"f"], [theirs.fileno()])
        return ours

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


class Process:
    """A process that carries out commands: the methods of faulty_receiver.Served or EveryStep."""

    def __init__(
        self, server: ForkServer, folder: Path, *, kind: str = "Served", start: bool = True, **settings: str
    ) -> None:
        self.forks: list[int] = []
        with server.fork() as connection:
            self._lines = connection.makefile("rw")
        self._write([kind, str(folder)])
        self.pid = int(self._lines.readline())
        self._handle = os.pidfd_open(self.pid)  # readable when the process has ended
        if start:
            self.do("start", **settings)

    def _write(self, line: object) -> None:
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()

    def begin(self, command: str, **arguments: object) -> None:
        """Begin a command; `result` waits for its end."""
        self._write([command, arguments])

    def result(self) -> Any:
        """Return the result of the command begun first; raises ConnectionError if the process has died."""
        line = self._lines.readline()
        if not line:
            self._wait()
            raise ConnectionError("the process has ended")
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

    def fault(self, pattern: str, action: str, times: int = 1) -> None:
        """Take an action at the next `times` steps that match: see faulty_receiver.Steps."""
        self.do("fault", pattern=pattern, action=action, times=times)

    def fork(self, *uploads: dict[str, Any]) -> list[Reply]:
        """Send files from a forked child, which then lives until this process is closed."""
        pid, results = self.do("fork", commands=[("post", upload) for upload in uploads])
        self.forks.append(pid)
        return [Reply(*result) for result in results]

    def wait_for_death(self) -> None:
        """Wait until the process has died in the command begun first."""
        with contextlib.suppress(ConnectionError):
            raise BrokenPromise(f"the process lives: {self.result()}")

    def signal(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._handle, number)

    def _wait(self) -> None:
        select.select([self._handle], [], [])

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self._wait()

    def close(self) -> None:
        self.kill()
        os.close(self._handle)
        for pid in self.forks:
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._lines.close()


def upload(body: bytes, time_stamp: int = 234, **more: str) -> dict[str, Any]:
    """Return a file as an argument of a command."""
    return {"body": body.hex(), "headers": {**headers_of(time_stamp), **more}}
