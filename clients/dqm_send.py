#!/usr/bin/env python3
"""Send files to the DQM receiver until it has acknowledged them; one file, standard library only, Python 3.8 or later.

    dqm_send.py --url https://host/ --token-file token --run 123456 --agent EMC FILE…
    dqm_send.py --url https://host/ --token-file token --run 123456 --agent EMC --spool DIR
    dqm_send.py --url https://host/ --token-file token --check FILE…

Exit status: 0 every file was acknowledged (with --check: is valid), 1 one was not, 2 wrong usage.
As a module: `Sender(url, token_file).send(Upload(path, run, agent, time_stamp))`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import heapq
import http.client
import json
import os
import random
import re
import select
import socket
import ssl
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

MAX_RUN = 2**31 - 1
LAST_TIME_STAMP = 253402297199  # end of the year 9999 in the receiver's time zone
AGENT = "[A-Za-z0-9][A-Za-z0-9_-]{0,63}"

FILES = "/rest/api/files"
CHECK = "/rest/api/check"
BLOCK = 1 << 18  # bytes read and sent at once
SLOWEST_CHECK = 1 << 20  # bytes per second that the receiver validates at the least
MAX_ANSWER = 64 << 20  # bytes
EARLY_ANSWER_TIMEOUT = 5.0  # seconds to wait for the answer of a server that closed the connection early
MAX_REMEMBERED = 10_000  # acknowledged files whose time stamps a spool remembers

STATUS_OF = {None: 0, "start": 1, "end": 2}
SPOOL_KEY = re.compile(rf"(?P<agent>{AGENT})\.(?P<run>[0-9]{{1,10}})\.(?P<time>[0-9]{{1,12}})")
SPOOL_NAME = re.compile(rf"{SPOOL_KEY.pattern}(?:\.(?P<status>start|end))?\.root")
TEMPORARY = (".tmp", ".part", ".partial", ".swp", "~")

# A 400 is not always about the file. These messages say that the token or the URL is wrong (some are of gunicorn and nginx) …
MISCONFIGURED_MESSAGES = (
    "Must pass a token!",
    "Received token, but it is invalid!",
    "The request is not HTTP",
    "Bad request: not understood by the proxy",
    "This port speaks TLS",
)
# … and these that the bytes were damaged on their way.
DAMAGED_MESSAGES = ("The header sha256 differs", "The body ended")
# Moved permanently, forbidden, not found and the like: these are about the request, so every file would get the same answer.
MISCONFIGURED_STATUSES = (301, 308, 403, 404, 405, 411, 414, 415, 431, 501, 505)


class Upload(NamedTuple):
    """A file and its headers."""

    path: Path
    run: int | None  # None only for a check
    agent: str | None  # None only for a check
    time_stamp: int  # Unix seconds
    data_status: int = 0  # 1 starts a set of data, 2 ends it


class Result(NamedTuple):
    """The outcome of a file, or of one attempt to send it."""

    outcome: str  # stored, duplicate, replaced, valid (of a check), refused, misconfigured, unreadable or failed
    message: str
    status: int | None = None  # of HTTP
    filename: str | None = None  # the receiver's
    reason: str | None = None  # why the file is not a valid ROOT file
    size: int | None = None
    sha256: str | None = None
    attempts: int = 1

    @property
    def acknowledged(self) -> bool:
        """Whether the receiver has stored these bytes."""
        return self.outcome in ("stored", "duplicate", "replaced")


class Patience(NamedTuple):
    """How long a sender waits, and how often it tries."""

    timeout: float = 60.0  # seconds to connect and to send a block; the answer may take another second for each MiB
    tries: int = 10
    max_delay: float = 60.0  # seconds between two attempts, at most


def log(message: str) -> None:
    """Print a line on standard error, over the progress shown there."""
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)
    sys.stderr.write(("\r\x1b[K" if sys.stderr.isatty() else "") + f"dqm_send: {line}\n")
    sys.stderr.flush()


def read_token(path: Path) -> bytes:
    """Return the token in a file; raises OSError, or ValueError that does not show the content."""
    token = path.read_bytes().strip()
    if not re.fullmatch(rb"[^\x00-\x1f\x7f]{1,4096}", token):
        raise ValueError(f"The token file {path} must hold one line, the token")
    return token


# --- one file ----------------------------------------------------------------------------------------------------------


class Sender:
    """Sends files to one receiver, each until the receiver has accepted or refused it."""

    def __init__(
        self, url: str, token_file: Path, ca_file: str | None = None, patience: Patience | None = None
    ) -> None:
        """Raises ValueError for a bad URL or token, OSError for a file that cannot be read."""
        parts = urlsplit(url)
        odd = "@" in parts.netloc or parts.query or parts.fragment or not re.fullmatch("[!-~]+", url)
        if parts.scheme not in ("http", "https") or not parts.hostname or odd:
            raise ValueError("The URL must be http[s]://HOST[:PORT][/PREFIX]")
        self._host, self._port, path = parts.hostname, parts.port, parts.path.rstrip("/")
        self._prefix = re.sub(f"{FILES}$", "", path)
        self._tls = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else None
        self._token_file = token_file
        self._digests: dict[tuple[int, ...], str] = {}
        self.patience = Patience() if patience is None else patience
        read_token(token_file)

    def send(self, upload: Upload, tries: int | None = None) -> Result:
        """Send a file again and again until it is accepted or refused, or the tries are used up."""
        return self._repeat(FILES, upload, self.patience.tries if tries is None else tries)

    def check(self, upload: Upload) -> Result:
        """Ask how the receiver would answer the upload; nothing is stored."""
        result = self._repeat(CHECK, upload, self.patience.tries)
        return result._replace(outcome="valid") if result.acknowledged else result

    def _repeat(self, address: str, upload: Upload, tries: int) -> Result:
        attempts = 1
        while (result := self._attempt(address, upload)).outcome == "failed" and attempts < tries:
            delay = min(self.patience.max_delay, 2.0 ** min(attempts - 1, 30)) * random.uniform(0.5, 1.0)
            log(f"{upload.path}: {result.message}; attempt {attempts} of {tries}, the next in {delay:.1f} s")
            time.sleep(delay)
            attempts += 1
        return result._replace(attempts=attempts)

    def _attempt(self, address: str, upload: Upload) -> Result:
        try:
            if not upload.path.is_file():  # opening a named pipe would block
                return Result("unreadable", "Not a file")
            file = upload.path.open("rb")
        except OSError as error:
            return Result("unreadable", str(error))
        with file:
            before = identity_of(file)
            size, sha256 = before[2], None
            try:
                sha256 = self._sha256(file, before)
                result = self._post(address, make_headers(upload, size, sha256), file)
                if identity_of(file) != before:  # the file no longer has the bytes that the answer is about
                    result = Result("failed", "The file changed while it was sent")
            except (OSError, http.client.HTTPException) as error:
                result = Result("failed", f"{type(error).__name__}: {error}")
            except ValueError as error:  # the token file was overwritten meanwhile
                result = Result("misconfigured", str(error))
            if result.outcome != "failed" or identity_of(file) != before:
                self._digests.pop(before, None)
        return result._replace(size=size, sha256=sha256)

    def _sha256(self, file: BinaryIO, key: tuple[int, ...]) -> str:
        """Return the SHA-256 of a file, computed once for all attempts."""
        if key not in self._digests:
            digest = hashlib.sha256()
            while piece := file.read(BLOCK):
                digest.update(piece)
            self._digests[key] = digest.hexdigest()
        return self._digests[key]

    def _post(self, address: str, headers: dict[str, str], file: BinaryIO) -> Result:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self.patience.timeout)
        if self._tls:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=self.patience.timeout, context=self._tls
            )
        size = int(headers["Content-Length"])
        with contextlib.closing(connection):
            connection.putrequest("POST", self._prefix + address, skip_accept_encoding=True)
            connection.putheader("token", read_token(self._token_file))
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            with http.client.HTTPResponse(connection.sock, method="POST") as response:
                body_sent, broken = False, None
                try:
                    body_sent = self._send_body(connection.sock, response, file, size)
                    connection.sock.settimeout(self.patience.timeout + size / SLOWEST_CHECK)
                except OSError as error:  # the server closed the connection; it may have answered before
                    broken = error
                    connection.sock.settimeout(EARLY_ANSWER_TIMEOUT)
                try:
                    response.begin()
                    body = response.read(MAX_ANSWER)
                except (OSError, http.client.HTTPException) as error:
                    raise broken or error from None
                if response.status in (301, 308):
                    text = f"HTTP {response.status}: the receiver has moved to {response.getheader('Location')}"
                    return Result("misconfigured", text, response.status)
                result = classify_answer(response.status, body, size, headers["sha256"])
        if result.acknowledged and not body_sent:
            return Result("failed", "HTTP 200 before all of the file was sent", result.status)
        if result.acknowledged and address == FILES and result.filename is None:
            return Result("failed", "HTTP 200 without a file name", result.status)
        return result

    def _send_body(self, sock: socket.socket, response: http.client.HTTPResponse, file: BinaryIO, size: int) -> bool:
        """Send the file and return True, or return False as soon as the server answers before the end."""
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        progress = Progress(os.path.basename(file.name), size)
        file.seek(0)
        sent = 0
        while sent < size:
            if poll.poll(0):
                sock.settimeout(0)
                try:
                    response.fp.peek(1)
                    return False
                except ssl.SSLWantReadError:  # a record of TLS itself, such as a session ticket
                    pass
                finally:
                    sock.settimeout(self.patience.timeout)
            piece = file.read(min(BLOCK, size - sent))
            if not piece:
                raise http.client.HTTPException("The file became shorter while it was sent")
            sock.sendall(piece)
            sent += len(piece)
            progress.show(sent)
        return True


class Progress:
    """The percentage sent so far, shown on a terminal only."""

    def __init__(self, name: str, size: int) -> None:
        self._name, self._size, self._shown = ascii(name)[1:41], size, 0.0

    def show(self, sent: int) -> None:
        """Show the progress five times a second, and clear the line at the end."""
        if sys.stderr.isatty() and (sent == self._size or time.monotonic() > self._shown + 0.2):
            self._shown = time.monotonic()
            done = f"{100 * sent // self._size:3} % of {self._size / 1e6:.1f} MB  {self._name}"
            sys.stderr.write("\r\x1b[K" + (done if sent < self._size else ""))
            sys.stderr.flush()


def make_headers(upload: Upload, size: int, sha256: str) -> dict[str, str]:
    """Return the headers of an upload, but for the token."""
    headers = {
        "runNumber": upload.run,
        "timeStamp": upload.time_stamp,
        "amoreAgent": upload.agent,
        "dataStatus": upload.data_status,
        "sha256": sha256,
        "Content-Type": "application/octet-stream",
        "Content-Length": size,
        "Connection": "close",
    }
    return {name: str(value) for name, value in headers.items() if value is not None}


def identity_of(file: BinaryIO) -> tuple[int, int, int, int]:
    """Return device, inode, size and modification time: they change when the file does."""
    status = os.fstat(file.fileno())
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def classify_answer(status: int, body: bytes, size: int, sha256: str) -> Result:
    """Translate an answer into a result; the file has this size and SHA-256."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    ours = isinstance(answer, dict) and answer.get("status") == status and isinstance(answer.get("message"), str)
    if not ours:
        known = status in (400, *MISCONFIGURED_STATUSES)
        outcome = "refused" if status == 413 else "misconfigured" if known else "failed"
        return Result(outcome, f"HTTP {status}, not from a DQM receiver", status)
    message, reason = answer["message"], answer.get("reason")
    if status == 200:
        return classify_success(answer, size, sha256)
    if status in MISCONFIGURED_STATUSES or (status == 400 and message.startswith(MISCONFIGURED_MESSAGES)):
        return Result("misconfigured", message, status)
    if status == 413 or (status == 400 and not message.startswith(DAMAGED_MESSAGES)):
        return Result("refused", message, status, reason=reason if isinstance(reason, str) else None)
    return Result("failed", message, status)


def classify_success(answer: dict[str, Any], size: int, sha256: str) -> Result:
    """Return the result of a 200, which must name the size and SHA-256 of the bytes that were sent."""
    if answer.get("sha256") != sha256 or answer.get("size") != size:
        return Result("failed", "HTTP 200, but for other bytes than were sent", 200)
    outcome = next((name for name in ("duplicate", "replaced") if answer.get(name) is True), "stored")
    filename = answer.get("filename")
    return Result(outcome, answer["message"], 200, filename if isinstance(filename, str) else None)


# --- a folder ----------------------------------------------------------------------------------------------------------


class Spool:
    """A folder whose files are sent.

    A file is first moved to `sending/AGENT.RUN.TIME/`. So its key, AGENT.RUN.TIME, survives restarts, and a later file of the
    same name is not mistaken for it. At the end it is moved to `sent/` or `refused/`. `sent/` shows which keys are taken.
    """

    def __init__(self, folder: Path, run: int | None, agent: str | None) -> None:
        """Raises BlockingIOError if another process works on the folder."""
        self._folder, self._run, self._agent = folder, run, agent
        self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise
        except OSError:  # a file system without locks: at worst, two processes send some files twice
            pass
        self._sending, self._sent, self._refused = (folder / name for name in ("sending", "sent", "refused"))
        for path in (self._sending, self._sent, self._refused):
            path.mkdir(exist_ok=True)
        newest = sorted(heapq.nlargest(MAX_REMEMBERED, regular_files(self._sent)))
        self._taken = {self._key_of(path, written): (path.name, written) for written, path in newest}
        self._warned: set[str] = set()

    def close(self) -> None:
        """Release the lock of the folder."""
        os.close(self._lock)

    def process(self, sender: Sender, report: Callable[[Upload, Result], None]) -> bool:
        """Send all files, oldest first; return whether none must be tried again."""
        complete, tries = self._adopt_new_files(), sender.patience.tries
        for upload in self._pending():
            result = sender.send(upload, tries)
            # After one failure the next files are tried once each, so that one bad file cannot delay the others.
            tries = 1 if result.outcome == "failed" else sender.patience.tries
            if result.acknowledged:
                self._move(upload, self._sent)
            elif result.outcome == "refused":
                self._move(upload, self._refused, f"{result.message}\n{result.reason or ''}".strip() + "\n")
            else:
                complete = False
            report(upload, result)
            if result.outcome == "misconfigured":  # the next files would fail alike
                break
        return complete

    def _adopt_new_files(self) -> bool:
        """Move the complete files to `sending/`, oldest first; return whether all were moved."""
        for folder in self._sending.iterdir():
            with contextlib.suppress(OSError):
                folder.rmdir()  # left empty by a process that was killed
        complete = True
        for written, path in sorted(regular_files(self._folder)):
            complete &= self._adopt(path, written)
        return complete

    def _key_of(self, path: Path, written: int) -> str:
        """Return AGENT.RUN.TIME from the file's name, or from the command line and its modification time in ns."""
        named = SPOOL_NAME.fullmatch(path.name)
        if named:
            return f"{named['agent']}.{int(named['run'])}.{int(named['time'])}"
        return "" if self._agent is None or self._run is None else f"{self._agent}.{self._run}.{written // 10**9}"

    def _adopt(self, path: Path, written: int) -> bool:
        """Move a file to `sending/`; return False if it had to stay."""
        if path.name.startswith(".") or path.name.endswith(TEMPORARY):
            return True
        named, written = SPOOL_NAME.fullmatch(path.name), max(written, 0)
        key = self._key_of(path, written)
        if not key and path.name not in self._warned:
            log(f"{path}: its run and agent are unknown: name it AGENT.RUN.TIME.root, or give --run and --agent")
            self._warned.add(path.name)
        while key:
            try:
                if named or self._taken.get(key, (path.name, written)) == (path.name, written):
                    (self._sending / key).mkdir()
                    path.rename(self._sending / key / path.name)
                    return True
            except FileNotFoundError:  # another process took the file away
                return True
            except FileExistsError:
                if named:  # the file with this key is sent first
                    return False
            # Another file has this second, and the receiver would replace one by the other. So this one takes the next second.
            written = (written // 10**9 + 1) * 10**9
            with contextlib.suppress(OSError):  # the file may belong to another user
                os.utime(path, ns=(written, written))
            key = self._key_of(path, written)
        return False

    def _pending(self) -> list[Upload]:
        """Return the files in `sending/`, oldest first."""
        found = []
        for folder in self._sending.iterdir():
            key = SPOOL_KEY.fullmatch(folder.name)
            if key is None:
                continue
            for written, path in regular_files(folder):
                named = SPOOL_NAME.fullmatch(path.name)
                status = STATUS_OF[named["status"] if named else None]
                found.append((written, Upload(path, int(key["run"]), key["agent"], int(key["time"]), status)))
        return [upload for _, upload in sorted(found)]

    def _move(self, upload: Upload, folder: Path, reason: str = "") -> None:
        """Move a file out of `sending/`; a number is added to a name that is taken."""
        path, number = upload.path, 0
        target = folder / path.name
        while target.exists():
            number += 1
            target = folder / f"{path.stem}.{number}{path.suffix}"
        self._taken[path.parent.name] = (path.name, path.stat().st_mtime_ns)
        if reason:
            (folder / f"{target.name}.reason").write_text(reason, "utf-8", "backslashreplace")
        path.rename(target)
        with contextlib.suppress(OSError):
            path.parent.rmdir()
        if len(self._taken) > MAX_REMEMBERED:
            del self._taken[next(iter(self._taken))]


def regular_files(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the modification time in nanoseconds and the path of each regular file in a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    yield entry.stat(follow_symlinks=False).st_mtime_ns, Path(entry.path)


# --- the program -------------------------------------------------------------------------------------------------------


def number(largest: int) -> Callable[[str], int]:
    """Return a converter of numbers from 0 to the largest, for argparse."""

    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,20}", text) or int(text) > largest:
            raise argparse.ArgumentTypeError(f"must be a number from 0 to {largest}")
        return int(text)

    return read


def agent_name(text: str) -> str:
    """Return an agent's name, for argparse."""
    if not re.fullmatch(AGENT, text):
        raise argparse.ArgumentTypeError("must be 1 to 64 of A-Z a-z 0-9 - _, beginning with a letter or digit")
    return text


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Send files to the DQM receiver until it has acknowledged them.",
        epilog="Exit status: 0 every file was acknowledged (with --check: is valid), 1 one was not, 2 wrong usage.",
    )
    add = parser.add_argument
    add("files", metavar="FILE", nargs="*", type=Path)
    add("--url", required=True, help="the receiver: http[s]://HOST[:PORT][/PREFIX]")
    add("--token-file", required=True, type=Path, help="the file that holds the token")
    add("--run", type=number(MAX_RUN), help="run number")
    add("--agent", type=agent_name, help="agent: letters, digits, - and _")
    add("--time-stamp", type=number(LAST_TIME_STAMP), help="Unix seconds (default: the file's modification time)")
    add("--status", choices=("start", "end"), help="the file starts or ends a set of data")
    add("--check", action="store_true", help="ask for the receiver's answer; nothing is stored")
    add("--spool", metavar="DIR", type=Path, help="send the files of a folder, until the program is ended")
    add("--once", action="store_true", help="with --spool: go through the folder once")
    add("--interval", metavar="S", type=float, default=5.0, help="with --spool: seconds between two passes (5)")
    add("--ca-file", help="PEM file of certificates to trust instead of the system's")
    add("--timeout", metavar="S", type=float, default=60.0, help="seconds; for an answer one more for each MiB (60)")
    add("--tries", metavar="N", type=number(10**6), default=10, help="attempts at a file (10)")
    add("--max-delay", metavar="S", type=float, default=60.0, help="longest wait between two attempts, seconds (60)")
    add("--json", action="store_true", help="print one JSON line for each file")
    return parser


def read_options(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the parser and the options; a mistake ends the program with exit status 2."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if (options.spool is None) == (not options.files):
        parser.error("give either FILEs or --spool DIR")
    if options.spool and options.check:
        parser.error("--check needs FILEs: a spool is not checked")
    if options.files and not options.check and (options.run is None or options.agent is None):
        parser.error("--run and --agent are required")
    if options.spool and (options.status or options.time_stamp is not None):
        parser.error("with --spool, name the file AGENT.RUN.TIME[.start|.end].root to set time stamp and status")
    if min(options.interval, options.timeout, options.max_delay) <= 0:
        parser.error("--interval, --timeout and --max-delay must be above 0")
    return parser, options


def list_uploads(options: argparse.Namespace) -> list[Upload]:
    """Return the uploads of the command line; raises ValueError for two files that would get one name."""
    found: dict[int, Upload] = {}
    for path in options.files:
        second = int(path.stat().st_mtime) if options.time_stamp is None else options.time_stamp
        if second in found and not options.check:
            raise ValueError(f"{path} and {found[second].path} have one time stamp: one would replace the other")
        found[len(found) if options.check else second] = Upload(
            path, options.run, options.agent, second, STATUS_OF[options.status]
        )
    return list(found.values())


class Reporter:
    """Prints the result of each file, and remembers whether all were good."""

    def __init__(self, as_json: bool) -> None:
        self._as_json, self.all_good = as_json, True

    def __call__(self, upload: Upload, result: Result) -> None:
        """Print one line."""
        self.all_good &= result.acknowledged or result.outcome == "valid"
        if self._as_json:
            facts = {**upload._asdict(), **result._asdict(), "acknowledged": result.acknowledged}
            print(json.dumps({"file": str(facts.pop("path")), **facts}), flush=True)
        else:
            parts = (str(upload.path), result.outcome, result.filename, result.message, result.reason)
            print(*(ascii(part)[1:-1] for part in parts if part), sep=": ", flush=True)


def watch(spool: Spool, sender: Sender, report: Reporter, options: argparse.Namespace) -> int:
    """Send the files of a spool, again and again unless `--once` is given; return the exit status."""
    while True:
        complete = False
        try:
            complete = spool.process(sender, report)
        except OSError as error:  # of the folder: `Sender` has handled those of the network
            log(f"the spool cannot be used: {error}")
        if options.once:
            return 0 if complete and report.all_good else 1
        time.sleep(options.interval if complete else max(options.interval, options.max_delay))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    parser, options = read_options(arguments)
    report = Reporter(options.json)
    try:
        patience = Patience(options.timeout, options.tries, options.max_delay)
        sender = Sender(options.url, options.token_file, options.ca_file, patience)
        if options.token_file.stat().st_mode & stat.S_IROTH:
            log(f"warning: all users of this host can read {options.token_file}")
        uploads = list_uploads(options)
        spool = Spool(options.spool, options.run, options.agent) if options.spool else None
    except BlockingIOError:
        log(f"another dqm_send works on {options.spool}")
        return 1
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        for upload in uploads:
            report(upload, sender.check(upload) if options.check else sender.send(upload))
        if spool:
            return watch(spool, sender, report, options)
        return 0 if report.all_good else 1
    except KeyboardInterrupt:
        return 130
    finally:
        if spool:
            spool.close()


if __name__ == "__main__":
    sys.exit(main())
