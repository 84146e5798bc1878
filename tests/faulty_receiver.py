"""A receiver in which, at a named step, a call fails, the process dies, or another process comes between.

A step is a call on a path in the data folder. Its name has the phase, the call, and the path without its random parts:
`upload: rename .incoming/<id> -> NAME`. The second of equal steps ends in `#2`.

    faulty_receiver.py SOCKET   fork a process for each descriptor that arrives on a socket (see faults.ForkServer)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
import os
import re
import select
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from client import FILES, GRAPHS, HEADERS, HISTOGRAMS, NAME, PROFILES, hidden, settings, tree, visible
from faults import INVALID, BrokenPromise, Sent, assert_promise, headers_of, name_of, sha256, taken_files
from werkzeug.test import Client

import receiver
import storage
import uploads

BODIES = {"histograms": HISTOGRAMS, "profiles": PROFILES, "graphs": GRAPHS, "invalid": INVALID}
BASE = 234  # the time stamp of the upload under test

# Calls that change the folder, by the name that steps have; `create` is an `open` that may create or truncate.
TWO_PATHS = {"link": "link", "rename": "rename", "replace": "rename"}
CHANGES = {
    **{name: name for name in ("mkdir", "rmdir", "unlink", "truncate", "utime", "chmod", "fchmod", "ftruncate")},
    **dict.fromkeys(("write", "pwrite", "writev", "pwritev", "posix_fallocate"), "write"),
    **dict.fromkeys(("fsync", "fdatasync"), "fsync"),
    "remove": "unlink",
}
LOOKS = {
    **{name: name for name in ("stat", "lstat", "fstat", "scandir", "listdir", "close", "access", "fstatvfs")},
    **dict.fromkeys(("read", "pread", "readv", "preadv"), "read"),
}
CHANGING = {"create", "flock", *TWO_PATHS.values(), *CHANGES.values()}

# Which calls can fail with which error.
ERRORS = {
    "EIO": {*CHANGING, "open", "read", "scandir", "listdir"},
    "ENOSPC": {"create", "write", "link", "rename", "mkdir", "fsync", "ftruncate"},
    "EMFILE": {"create", "open", "scandir", "listdir"},
    "EACCES": {"create", "open", "link", "rename", "unlink", "mkdir", "rmdir", "utime", "scandir", "listdir", "access"},
    "ESTALE": {*CHANGING, "open", *LOOKS.values()},
}


class Steps:
    """Names the calls of this process on a data folder, and takes an action at one of them.

    Actions:

    - "kill before", "kill after" the call, "stop" before it (SIGSTOP)
    - "EIO" or another error, "EIO after": the call is made and fails all the same, "EIO for good": all later ones fail, too
    - "torn": half of the bytes are written, then ENOSPC; "short": half of the bytes are written
    - "read-only": the disk is read-only from here on; "nothing"
    - a function, which is called before the call and returns one of those
    """

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.phase = ""
        self.trace: list[str] = []
        self.fired: list[str] = []
        self.pattern, self.times = "", 0
        self.action: str | Callable[[], str] = "nothing"
        self._counts: Counter[str] = Counter()
        self.lasting: set[str] = set()  # the calls that fail for good
        self._lock = threading.Lock()
        self._readlink, self._write = os.readlink, os.write
        self._busy = threading.local()

    def install(self) -> None:
        """Wrap the functions of `os`, and `fcntl.flock`."""
        for function, call in {**TWO_PATHS, **CHANGES, **LOOKS, "open": "open"}.items():
            setattr(os, function, self._wrapped(getattr(os, function), function, call))
        fcntl.flock = self._wrapped(fcntl.flock, "flock", "flock")

    def at(self, pattern: str, action: str | Callable[[], str], times: int = 1) -> None:
        """Take the action at the next `times` steps that match: by full name, or by a pattern of call and path."""
        self.pattern, self.action, self.times = pattern, action, times

    def stop(self) -> None:
        """Take no further action."""
        self.times, self.lasting = 0, set()

    def _wrapped(self, real: Callable[..., Any], function: str, call: str) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **more: Any) -> Any:
            if getattr(self._busy, "now", False):
                return real(*arguments, **more)
            self._busy.now = True
            try:
                path = self._path(function, arguments, more)
            finally:
                self._busy.now = False
            if path is None:
                return real(*arguments, **more)
            name = call
            if function == "open" and self._flags(arguments, more) & (os.O_CREAT | os.O_TRUNC):
                name = "create"
            return self._step(name, path, real, arguments, more)

        return wrapper

    @staticmethod
    def _flags(arguments: tuple[Any, ...], more: dict[str, Any]) -> int:
        flags: int = arguments[1] if len(arguments) > 1 else more["flags"]
        return flags

    # --- names of steps ------------------------------------------------------------------------------------------------

    def _path(self, function: str, arguments: tuple[Any, ...], more: dict[str, Any]) -> str | None:
        """Return the path, or the two paths, in the name of a step; None if they are not in the folder."""
        if function in TWO_PATHS:
            source = self._relative(arguments[0], more.get("src_dir_fd"))
            target = self._relative(arguments[1], more.get("dst_dir_fd"))
            return None if source is None and target is None else f"{source} -> {target}"
        return self._relative(arguments[0] if arguments else more.get("path", "."), more.get("dir_fd"))

    def _relative(self, path: Any, dir_fd: int | None) -> str | None:
        if hasattr(path, "fileno"):
            path = path.fileno()
        try:
            if isinstance(path, int):
                full = self._readlink(f"/proc/self/fd/{path}")
            else:
                base = os.getcwd() if dir_fd is None else self._readlink(f"/proc/self/fd/{dir_fd}")
                full = os.path.normpath(os.path.join(base, os.fsdecode(path)))
        except OSError:
            return None
        full = full.removesuffix(" (deleted)")
        if full != self.folder and not full.startswith(self.folder + "/"):
            return None
        return normalized(full[len(self.folder) + 1 :])

    # --- actions -------------------------------------------------------------------------------------------------------

    def _step(
        self, call: str, path: str, real: Callable[..., Any], arguments: tuple[Any, ...], more: dict[str, Any]
    ) -> Any:
        with self._lock:
            short = f"{call} {path}"
            name = f"{self.phase}: {short}" if self.phase else short
            self._counts[name] += 1
            if self._counts[name] > 1:
                name += f" #{self._counts[name]}"
            self.trace.append(name)
            hit = self.times > 0 and (name == self.pattern or fnmatchcase(short, self.pattern))
            if hit:
                self.times -= 1
                self.fired.append(name)
            action = self.action if hit or call in self.lasting else "nothing"
        if callable(action):
            self._busy.now = True
            try:
                action = action()
            finally:
                self._busy.now = False
        if action != "nothing":
            return self._fail(action, call, real, arguments, more)
        return real(*arguments, **more)

    def _fail(
        self, action: str, call: str, real: Callable[..., Any], arguments: tuple[Any, ...], more: dict[str, Any]
    ) -> Any:
        if action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            return real(*arguments, **more)
        if action in ("torn", "short"):
            written = self._write(arguments[0], bytes(arguments[1])[: max(1, len(arguments[1]) // 2)])
            if action == "torn":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return written
        if action == "read-only":
            self.lasting = CHANGING - {"flock", "fsync"}
            if call in self.lasting:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return real(*arguments, **more)
        if action == "kill before":
            os.kill(os.getpid(), signal.SIGKILL)
        kind, _, when = action.partition(" ")
        if call == "close" or when == "after":  # a descriptor is closed whatever `close` returns
            try:
                result = real(*arguments, **more)
            finally:
                if action == "kill after":
                    os.kill(os.getpid(), signal.SIGKILL)
            if hasattr(result, "close"):
                result.close()
            elif call in ("create", "open"):
                os.close(result)
        if when == "for good":
            self.lasting = {call}
        number = getattr(errno, kind)
        raise OSError(number, os.strerror(number))


def normalized(path: str) -> str:
    """Return a path relative to the data folder, with its random parts replaced."""
    if not path:
        return "."
    parts = path.split("/")
    if parts[0] in (".incoming", ".replaced", ".rejected"):
        parts[1:] = [part if part == "lock" else "<id>" for part in parts[1:]]
    if parts[0] == ".receipts":
        parts[2:] = ["<id>.jsonl" if part.endswith(".jsonl") else "<id>" for part in parts[2:]]
    return re.sub(r"[0-9a-f-]{8,}", "<id>", "/".join(parts).replace(NAME, "NAME").replace(name_of(1), "OTHER"))


# --- every step --------------------------------------------------------------------------------------------------------

# The file that is in the folder before, and the file that is sent: names of BODIES.
SITUATIONS = {
    "a new folder": (None, "histograms"),
    "a taken name": ("profiles", "histograms"),
    "a duplicate": ("histograms", "histograms"),
    "an invalid file": ("profiles", "invalid"),
    "a dead writer": ("profiles", "histograms"),
}
RIVALS = {"rival": GRAPHS, "equal rival": HISTOGRAMS}
# The steps without which no byte or name is durable.
DURABLE = re.compile(r"upload: (fsync (\.|NAME|\.incoming/(<id>/)?<id>|\.replaced(/<id>)?)|write \.incoming/\S+)( #|$)")
SHORT_LOCK_TIMEOUT = 2.0  # seconds; shorter than the real ones


def send(app: Any, body: bytes, time_stamp: int = BASE, **more: str) -> tuple[int, Any]:
    response = Client(app).post(FILES, headers={**headers_of(time_stamp), **more}, data=body)
    return response.status_code, response.json


class Child:
    """A forked process that runs a function. Its reports are lines of JSON; all arrive, also those just before a SIGKILL."""

    def __init__(self, function: Callable[[Callable[..., None], int], None]) -> None:
        self._out, out = os.pipe()
        go, self._go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._out)
            os.close(self._go)
            write = os.write  # before it is wrapped

            def report(**content: object) -> None:
                write(out, json.dumps(content).encode() + b"\n")

            try:
                function(report, go)
            except BaseException:  # noqa: BLE001  the child must not go on as its parent
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(out)
        os.close(go)
        self.status: int | None = None
        self._data = b""

    def reports(self, seconds: float) -> Iterator[dict[str, Any]]:
        """Yield the reports until the process has ended; raise BrokenPromise after so many seconds without one."""
        while self.running:
            line, newline, rest = self._data.partition(b"\n")
            if newline:
                self._data = rest
                yield json.loads(line)
            elif not select.select([self._out], [], [], seconds)[0]:
                raise BrokenPromise(f"a process has not ended after {seconds} s")
            elif piece := os.read(self._out, 65536):
                self._data += piece
            else:
                self.status = os.waitpid(self.pid, 0)[1]

    @property
    def running(self) -> bool:
        return self.status is None

    def go(self) -> None:
        os.write(self._go, b"g")

    def end(self, seconds: float = 60.0) -> dict[str, Any]:
        """Wait for the end and return the remaining reports as one."""
        with contextlib.closing(self):
            return {name: value for report in self.reports(seconds) for name, value in report.items()}

    def close(self) -> None:
        """End the process if it is still running."""
        if self.running:
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitpid(self.pid, 0)[1]
        os.close(self._out)
        os.close(self._go)


class EveryStep:
    """Takes one action at each step of an upload in turn, each time in a new process and a new folder."""

    def __init__(self, base: Path) -> None:
        self.folder, self.template, self.taken = base / "data", base / "template", base / "taken"

    def attempts(self, situation: str, action: str) -> list[dict[str, Any]]:
        """Take an action at each step; return the result of each attempt."""
        self.situation, self.action = situation, action
        self.kind = action.partition(", then ")[0]
        before, new = SITUATIONS[situation]
        self.before, self.new = BODIES[before] if before else None, BODIES[new]
        self.valid = new != "invalid"
        self.prepare()
        return [self.attempt(step) for step in self.steps()]

    def prepare(self) -> None:
        """Make the folder that each attempt begins with."""
        if self.before is None:
            return
        self.alone(self.before)
        if self.situation == "a dead writer":
            child = Child(lambda report, go: self.upload(report, go, "* -> NAME", "kill before"))
            child.end()
            if child.status is None or not os.WIFSIGNALED(child.status):
                raise RuntimeError("no process died before it gave a file its name")
        shutil.copytree(self.folder, self.template, symlinks=True)

    def alone(self, body: bytes, time_stamp: int = BASE) -> dict[str, Any]:
        """Send a file in a new process without a fault."""

        def run(report: Callable[..., None], go: int) -> None:
            app = self.make_app()
            report(left=sorted(tree(self.folder / ".incoming")))
            status, answer = send(app, body, time_stamp)
            report(status=status, answer=answer)

        return Child(run).end()

    def make_app(self) -> Any:
        return receiver.create_app(settings(self.folder))

    def upload(self, report: Callable[..., None], go: int, step: str, action: str | Callable[[], str]) -> None:
        """Start a receiver and send it two files, with an action at a step."""
        steps = Steps(self.folder)
        steps.install()
        steps.at(step, action)
        steps.phase = "start"
        try:
            app = self.make_app()
        except (OSError, receiver.ConfigurationError) as error:
            report(start=repr(error))
        else:
            steps.phase = "upload"
            status, answer = send(app, self.new)
            report(status=status, answer=answer)
            steps.phase = "next"
            if not step.startswith("next"):
                steps.stop()
            status, answer = send(app, PROFILES, 1)
            report(next=status, next_answer=answer)
        report(trace=steps.trace, fired=steps.fired)

    # --- actions that take a function ----------------------------------------------------------------------------------

    def function(self, report: Callable[..., None], go: int) -> str | Callable[[], str]:
        """Return the action of a child; of another program, a function."""
        read, rename, unlink = os.read, os.rename, os.unlink

        def take() -> str:
            with contextlib.suppress(FileNotFoundError):
                rename(self.folder / NAME, self.taken / f"0-{NAME}")
            return "nothing"

        def let_rival_go() -> str:
            report(rival=True)
            read(go, 1)
            return self.action.partition(", then ")[2] or "nothing"

        def clear() -> str:
            shutil.rmtree(self.folder / ".incoming", ignore_errors=True)
            return "nothing"

        def unlock() -> str:
            with contextlib.suppress(FileNotFoundError):
                unlink(self.folder / ".lock")
            return "nothing"

        functions = {"take": take, "clear": clear, "unlock": unlock, **dict.fromkeys(RIVALS, let_rival_go)}
        return functions.get(self.kind, self.action)

    # --- attempts ------------------------------------------------------------------------------------------------------

    def steps(self) -> list[str]:
        """Return the steps at which the action can be taken, in order."""
        self.restore()
        trace = Child(lambda report, go: self.upload(report, go, "", "nothing")).end()["trace"]
        calls = CHANGING
        if self.action in ("torn", "short"):
            calls = {"write"}
        elif self.action.startswith("E"):
            calls = ERRORS[self.action.partition(" ")[0]]
            if self.action.endswith("after"):
                calls = calls & CHANGING
        elif not self.action.startswith("kill"):
            calls = CHANGING | {"open", "stat", "lstat"}
        possible = [step for step in trace if step.split()[1] in calls]
        chosen = [step for step in possible if not step.startswith("next")]
        if self.action == "kill before":  # also after the last call
            return possible[: len(chosen) + 1]
        if self.action.startswith(("kill", "E")):
            return chosen
        return [step for step in chosen if step.startswith("upload")]

    def restore(self) -> None:
        for path in (self.folder, self.taken):
            shutil.rmtree(path, ignore_errors=True)
        self.taken.mkdir()
        if self.template.exists():
            shutil.copytree(self.template, self.folder, symlinks=True)

    def attempt(self, step: str) -> dict[str, Any]:
        """Take the action at one step; return both answers, and the problem if the promise is broken."""
        self.restore()
        unchanged = visible(self.folder) if self.folder.exists() else {}
        said: dict[str, Any] = {}
        problem = None

        def run(report: Callable[..., None], go: int) -> None:
            self.upload(report, go, step, self.function(report, go))

        try:
            with contextlib.ExitStack() as stack:
                child = stack.enter_context(contextlib.closing(Child(run)))
                rival: Child | None = None
                for report in child.reports(60):
                    said.update(report)
                    if "rival" in report:
                        rival = stack.enter_context(contextlib.closing(Child(self.rival)))
                        for content in rival.reports(60):
                            said.update(content)
                            if "rival_waits" in content:  # for the lock of the child, which must go on first
                                break
                        child.go()
                for content in rival.reports(60) if rival else ():
                    said.update(content)
            self.check(step, said, child.status, unchanged)
        except BrokenPromise as error:
            problem = str(error)
        return {"step": step, "status": said.get("status"), "next": said.get("next"), "problem": problem}

    def rival(self, report: Callable[..., None], go: int) -> None:
        """Send a file of the same name; report when `.lock` is held by the other process."""
        flock = fcntl.flock

        def report_wait(fd: Any, operation: int) -> None:
            try:
                flock(fd, operation)
            except BlockingIOError:
                if os.readlink(f"/proc/self/fd/{fd}").endswith("/.lock"):
                    report(rival_waits=True)
                raise

        fcntl.flock = report_wait
        status, answer = send(self.make_app(), RIVALS[self.kind])
        report(rival_status=status, rival_answer=answer)

    def check(self, step: str, said: dict[str, Any], status: int | None, unchanged: dict[str, bytes]) -> None:
        """Raise BrokenPromise if the answers and the folder disagree."""
        killed = self.action.startswith("kill")
        if killed != os.WIFSIGNALED(status or 0) or not killed and status:
            raise BrokenPromise(f"the process ended with wait status {status}")
        if not killed and step not in said["fired"]:
            raise BrokenPromise("the step did not come")
        self.check_answer(step, said, unchanged)
        acknowledged: list[Sent] = []
        unsure: list[Sent] = [(NAME, sha256(self.new))] if self.valid else []
        if self.before is not None:
            acknowledged.append((NAME, sha256(self.before)))
        if said.get("status") == 200:
            acknowledged += unsure
        if "rival" in said:
            if said.get("rival_status") not in (200, 500, 503):
                raise BrokenPromise(f"the rival was answered {said.get('rival_status')}: {said.get('rival_answer')}")
            upload = (NAME, sha256(RIVALS[self.kind]))
            (acknowledged if said["rival_status"] == 200 else unsure).append(upload)
        other = (name_of(1), sha256(PROFILES))
        if "next" in said:
            (acknowledged if said["next"] == 200 else unsure).append(other)
        taken = taken_files(self.taken)
        if self.folder.exists():
            assert_promise(self.folder, acknowledged, unsure=unsure, taken=taken)
        # A new process, without the fault.
        again = self.alone(self.new)
        if again.get("left") != []:
            raise BrokenPromise(f"left behind after a new start: {again.get('left')}")
        if again.get("status") != (200 if self.valid else 400):
            raise BrokenPromise(f"sent again to a new process, the file was answered {again}")
        if self.valid:
            acknowledged.append((NAME, sha256(self.new)))
            if visible(self.folder)[NAME] != self.new:
                raise BrokenPromise("the file that was sent again has not its name")
        assert_promise(self.folder, acknowledged, unsure=unsure, taken=taken)
        was_replaced = self.before is not None and self.before != self.new and self.valid and not taken
        if was_replaced and self.before not in hidden(self.folder, ".replaced"):
            raise BrokenPromise("the bytes that were replaced are not preserved")

    def check_answer(self, step: str, said: dict[str, Any], unchanged: dict[str, bytes]) -> None:
        """Raise BrokenPromise if an answer is not allowed after this action."""
        status = said.get("status")
        expected = {None, 200, 500, 503, 507} if self.valid else {None, 400, 500, 503, 507}
        if status not in expected:
            raise BrokenPromise(f"the upload was answered {status}: {said.get('answer')}")
        if status in (400, 507) and self.kind not in (*RIVALS, "take"):
            there = visible(self.folder)
            there.pop(name_of(1), None)
            if there != unchanged:
                raise BrokenPromise(f"{status}, but the visible files have changed")
        lost_bytes = self.action.startswith("E") and not self.action.endswith("after") and DURABLE.match(step)
        if status == 200 and lost_bytes:
            raise BrokenPromise("200, but the bytes may not be durable")
        if "next" in said and not self.action.endswith("for good"):
            # After an fsync of a folder that failed, the kernel may report the next one as good.
            unknown = "fsync" in step or self.action == "clear"
            if said["next"] != 200 and not (unknown and said["next"] in (500, 503)):
                raise BrokenPromise(f"the next upload was answered {said['next']}: {said.get('next_answer')}")


# --- processes that carry out commands ---------------------------------------------------------------------------------


class Served:
    """A receiver without HTTP. Its methods are the commands of faults.Process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps = Steps(folder)
        self.steps.install()
        self.app: Any = None

    def start(self, **more: str) -> None:
        self.app = receiver.create_app(settings(self.folder, **more))

    def fault(self, pattern: str, action: str, times: int) -> None:
        utime = os.utime

        def touch() -> str:
            utime(self.folder / NAME)
            return "nothing"

        self.steps.stop()
        self.steps.at(pattern, touch if action == "touch NAME" else action, times)

    def trace(self) -> list[str]:
        return self.steps.trace

    def post(self, body: str, headers: dict[str, str]) -> tuple[int, Any]:
        response = Client(self.app).post(FILES, headers=headers, data=bytes.fromhex(body))
        return response.status_code, response.json

    def get(self, path: str) -> tuple[int, Any]:
        response = Client(self.app).get(path, headers=HEADERS)
        return response.status_code, response.json

    def batch(self, uploads: list[dict[str, Any]]) -> list[tuple[int, Any]]:
        """Send files at once, each from a thread of its own."""
        begin = threading.Barrier(len(uploads))

        def send_one(upload: dict[str, Any]) -> tuple[int, Any]:
            begin.wait(30)
            return self.post(**upload)

        with ThreadPoolExecutor(len(uploads)) as pool:
            return list(pool.map(send_one, uploads))

    def race(self, role: str, number: int, rounds: int, threads: int, agent: str) -> list[list[Any]]:
        """Send files one after the other from each of several threads; return status, time stamp and SHA-256 of each."""

        def send_some(thread: int) -> list[list[Any]]:
            results = []
            for turn in range(rounds):
                if role == "starting":
                    app = receiver.create_app(settings(self.folder))
                text, time_stamp = CONTENTS[role](number * threads + thread, turn)
                body = HISTOGRAMS + text.encode()
                status, _ = send(app if role == "starting" else self.app, body, time_stamp, amoreAgent=agent)
                results.append([status, time_stamp, sha256(body)])
            return results

        with ThreadPoolExecutor(threads) as pool:
            return [result for results in pool.map(send_some, range(threads)) for result in results]

    def fork(self, commands: list[tuple[str, dict[str, Any]]]) -> tuple[int, list[object]]:
        """Carry out commands in a forked child, which lives on; return its process id and the results."""
        out, end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(0)
            results = [getattr(self, name)(**arguments) for name, arguments in commands]
            os.write(end, json.dumps(results).encode())
            os.close(end)
            os.close(1)
            while True:
                signal.pause()
        os.close(end)
        with os.fdopen(out, "rb") as pipe:
            return pid, json.load(pipe)


# The content and time stamp of a file in a race, by role: of a sender and a turn.
CONTENTS: dict[str, Callable[[int, int], tuple[str, int]]] = {
    "equal": lambda sender, turn: (f"content {turn}", turn),
    "different": lambda sender, turn: (f"content {sender} {turn}", turn % 2),
    "in turns": lambda sender, turn: (f"content {turn}", turn // 4),
    "starting": lambda sender, turn: (f"content {sender} {turn}", turn % 2),
}


def serve() -> None:
    """Carry out the lines of standard input: first [kind, folder], then [command, arguments]; answer each with a line."""
    kind, folder = json.loads(sys.stdin.readline())
    served: object = {"Served": Served, "EveryStep": EveryStep}[kind](Path(folder).resolve())
    print(os.getpid(), flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"result": getattr(served, name)(**arguments)}
        except Exception as error:  # noqa: BLE001  the other side raises it
            traceback.print_exc()
            answer = {"error": repr(error)}
        print(json.dumps(answer), flush=True)


def main() -> None:
    for module in (storage, uploads):
        vars(module).update({name: SHORT_LOCK_TIMEOUT for name in vars(module) if name.endswith("LOCK_TIMEOUT")})
    gc.freeze()  # pages that the children do not write to stay shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    server = socket.socket(fileno=int(sys.argv[1]))
    while (received := socket.recv_fds(server, 1, 1))[0]:
        (connection,) = received[1]
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            for standard in (0, 1):
                os.dup2(connection, standard)
            os.close(connection)
            serve()
            os._exit(0)
        os.close(connection)


if __name__ == "__main__":
    main()
