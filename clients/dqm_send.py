#!/usr/bin/env python3
"""Send files to the DQM receiver until it has acknowledged them; one file, standard library only, Python 3.8 or later.

    dqm_send.py --url https://host/ --token-file token --run 123456 --agent EMC FILE…
    dqm_send.py --url https://host/ --token-file token --run 123456 --agent EMC --spool DIR

Exit status: 0 every file was acknowledged, 1 one was not, 2 wrong usage. As a module: `Sender(…).send(Upload(…))`.
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
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit

MAX_RUN = 2**31 - 1
LAST_TIME_STAMP = 253402297199  # end of the year 9999 in the receiver's time zone
AGENT = "[A-Za-z0-9_-]{1,64}"

_API = "/rest/api/files"
_BLOCK = 1 << 18  # bytes read and sent at once
_SLOWEST = 1 << 20  # bytes per second of a file that the answer to it may take, beside the timeout
_LARGEST_ANSWER = 64 << 20  # bytes
_LAST_WORDS = 5.0  # seconds that a server which stopped reading is given to say why
_REMEMBERED = 10_000  # sent files whose times a spool keeps in mind

_CLAIM = re.compile(rf"(?P<agent>{AGENT})\.(?P<run>[0-9]{{1,10}})\.(?P<time>[0-9]{{1,12}})")
_SPOOLED = re.compile(rf"{_CLAIM.pattern}(?:\.(?P<status>start|end))?\.root")
_STATUS = {None: 0, "start": 1, "end": 2}
_TEMPORARY = (".tmp", ".part", ".partial", ".swp", "~")

# 400s that are no verdict on the file: the token or the URL is wrong (gunicorn's and nginx's words); other bytes arrived
# than were sent.
_MISCONFIGURED = (
    "Must pass a token!",
    "Received token, but it is invalid!",
    "The request is not HTTP",
    "Bad request: not understood by the proxy",
)
_DAMAGED_ON_THE_WAY = ("The header sha256 differs", "The body ended")


class Upload(NamedTuple):
    """A file and what the receiver is told about it."""

    path: Path
    run: int
    agent: str
    time_stamp: int  # Unix seconds
    data_status: int = 0  # 1 starts a set of data, 2 ends it


class Result(NamedTuple):
    """What became of a file, or came of one attempt at it."""

    outcome: str  # stored, duplicate or replaced; refused; misconfigured, unreadable or failed: nothing is known
    message: str
    status: int | None = None  # of HTTP
    filename: str | None = None  # the receiver's
    reason: str | None = None  # why it is no valid ROOT file
    size: int | None = None
    sha256: str | None = None
    attempts: int = 1

    @property
    def acknowledged(self) -> bool:
        """Whether the receiver has this very file."""
        return self.outcome in ("stored", "duplicate", "replaced")


def say(message: str) -> None:
    """Print a line on standard error, over what progress is shown there."""
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)
    sys.stderr.write(("\r\x1b[K" if sys.stderr.isatty() else "") + f"dqm_send: {line}\n")
    sys.stderr.flush()


def read_token(path: Path) -> bytes:
    """Return the token in a file; raises OSError, or ValueError without showing what is there."""
    token = path.read_bytes().strip()
    if not re.fullmatch(rb"[^\x00-\x1f\x7f]{1,4096}", token):
        raise ValueError(f"The token file {path} must hold one line, the token")
    return token


# --- one file ----------------------------------------------------------------------------------------------------------


class Sender:
    """Sends files to one receiver, each up to `tries` times until it is certain what became of it.

    The timeout, in seconds, is for connecting, for every block and, with a second more per MiB, for the answer.
    """

    def __init__(
        self,
        url: str,
        token_file: Path,
        ca_file: str | None = None,
        timeout: float = 60.0,
        tries: int = 10,
        max_delay: float = 60.0,
    ) -> None:
        """Raises ValueError for a URL or token, OSError for a file that cannot be used."""
        parts = urlsplit(url)
        odd = "@" in parts.netloc or parts.query or parts.fragment or not re.fullmatch("[!-~]+", url)
        if parts.scheme not in ("http", "https") or not parts.hostname or odd:
            raise ValueError("The URL must be http[s]://HOST[:PORT][/PREFIX]")
        self._host, self._port, path = parts.hostname, parts.port, parts.path.rstrip("/")
        self._path = path if path.endswith(_API) else path + _API
        self._tls = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else None
        self._token_file, self._timeout, self._max_delay = token_file, timeout, max_delay
        self._digests: dict[tuple[int, ...], str] = {}
        self._shown = 0.0
        self.tries = tries
        read_token(token_file)

    def send(self, upload: Upload, tries: int | None = None) -> Result:
        """Send a file, again and again until there is a verdict or the tries are used up."""
        tries = self.tries if tries is None else tries
        attempts = 1
        while (result := self._attempt(upload)).outcome == "failed" and attempts < tries:
            delay = min(self._max_delay, 2.0 ** min(attempts - 1, 30)) * random.uniform(0.5, 1.0)
            say(f"{upload.path}: {result.message}; attempt {attempts} of {tries}, the next in {delay:.1f} s")
            time.sleep(delay)
            attempts += 1
        return result._replace(attempts=attempts)

    def _attempt(self, upload: Upload) -> Result:
        try:
            if not upload.path.is_file():  # opening a pipe would wait for its other end
                return Result("unreadable", "Not a file")
            file = upload.path.open("rb")
        except OSError as error:
            return Result("unreadable", str(error))
        with file:
            before = identity(file)
            size, sha256 = before[2], None
            try:
                sha256 = self._sha256(file, before)
                result = self._post(upload, file, size, sha256)
                if identity(file) != before:  # whatever the verdict is, it is about bytes that the file no longer has
                    result = Result("failed", "The file changed while it was sent")
            except (OSError, http.client.HTTPException) as error:
                result = Result("failed", f"{type(error).__name__}: {error}")
            except ValueError as error:  # the token file has changed for the worse
                result = Result("misconfigured", str(error))
            if result.outcome != "failed" or identity(file) != before:
                self._digests.pop(before, None)
        return result._replace(size=size, sha256=sha256)

    def _sha256(self, file: BinaryIO, key: tuple[int, ...]) -> str:
        """Return the SHA-256 of a file, computed once for all attempts."""
        if key not in self._digests:
            digest = hashlib.sha256()
            while piece := file.read(_BLOCK):
                digest.update(piece)
            self._digests[key] = digest.hexdigest()
        return self._digests[key]

    def _post(self, upload: Upload, file: BinaryIO, size: int, sha256: str) -> Result:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        if self._tls:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout, context=self._tls)
        with contextlib.closing(connection):
            connection.putrequest("POST", self._path, skip_accept_encoding=True)
            connection.putheader("token", read_token(self._token_file))
            connection.putheader("runNumber", str(upload.run))
            connection.putheader("timeStamp", str(upload.time_stamp))
            connection.putheader("amoreAgent", upload.agent)
            connection.putheader("dataStatus", str(upload.data_status))
            connection.putheader("sha256", sha256)
            connection.putheader("Content-Type", "application/octet-stream")
            connection.putheader("Content-Length", str(size))
            connection.putheader("Connection", "close")
            connection.endheaders()
            with http.client.HTTPResponse(connection.sock, method="POST") as response:
                whole, broken = False, None
                try:
                    whole = self._send_body(connection.sock, response, upload.path, file, size)
                    connection.sock.settimeout(self._timeout + size / _SLOWEST)
                except OSError as error:  # a server that has seen enough may close, and still have answered
                    broken = error
                    connection.sock.settimeout(_LAST_WORDS)
                try:
                    response.begin()
                    body = response.read(_LARGEST_ANSWER)
                except (OSError, http.client.HTTPException) as error:
                    raise broken or error from None
                return judge(response.status, body, size, sha256, whole)

    def _send_body(
        self, sock: socket.socket, response: http.client.HTTPResponse, path: Path, file: BinaryIO, size: int
    ) -> bool:
        """Send the file and return True, or False as soon as the server has answered before the end."""
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        file.seek(0)
        sent = 0
        while sent < size:
            if poll.poll(0):
                sock.settimeout(0)
                try:
                    response.fp.peek(1)
                    return False
                except ssl.SSLWantReadError:  # TLS has had something for itself
                    pass
                finally:
                    sock.settimeout(self._timeout)
            piece = file.read(min(_BLOCK, size - sent))
            if not piece:
                raise http.client.HTTPException("The file became shorter while it was sent")
            sock.sendall(piece)
            sent += len(piece)
            if sys.stderr.isatty() and (sent == size or time.monotonic() > self._shown + 0.2):
                self._shown = time.monotonic()
                done = f"{100 * sent // size:3} % of {size / 1e6:.1f} MB  {ascii(path.name)[1:41]}"
                sys.stderr.write(f"\r\x1b[K{done}" if sent < size else "\r\x1b[K")
                sys.stderr.flush()
        return True


def identity(file: BinaryIO) -> tuple[int, int, int, int]:
    """Return what changes when a file does; its size is the third."""
    status = os.fstat(file.fileno())
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def judge(status: int, body: bytes, size: int, sha256: str, whole: bool) -> Result:
    """Say what an answer means; `whole` is whether all of the file had been sent."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    ours = isinstance(answer, dict) and answer.get("status") == status and isinstance(answer.get("message"), str)
    text = answer["message"] if ours else f"HTTP {status}, not from a DQM receiver"
    if status == 200 and ours and isinstance(answer.get("filename"), str):
        if whole and answer.get("sha256") == sha256 and answer.get("size") == size:
            outcome = next((name for name in ("duplicate", "replaced") if answer.get(name) is True), "stored")
            return Result(outcome, text, status, answer["filename"])
        text = "HTTP 200, but for other bytes than were sent"
    elif status == 413 or (status == 400 and ours and not text.startswith(_MISCONFIGURED + _DAMAGED_ON_THE_WAY)):
        reason = answer.get("reason") if ours else None
        return Result("refused", text, status, reason=reason if isinstance(reason, str) else None)
    elif status in (404, 405) or (status == 400 and not text.startswith(_DAMAGED_ON_THE_WAY)):
        return Result("misconfigured", text, status)
    return Result("failed", text, status)


# --- a folder ----------------------------------------------------------------------------------------------------------


class Spool:
    """A folder whose files are sent.

    A file is first moved to `sending/AGENT.RUN.TIME/`: what it is sent as then stays the same over restarts, and a new
    file of its name is not taken for it. From there it goes to `sent/`, which also tells what times are taken, or `refused/`.
    """

    def __init__(self, folder: Path, run: int | None, agent: str | None) -> None:
        """Raises BlockingIOError where another process works on the folder."""
        self._folder, self._run, self._agent = folder, run, agent
        self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise
        except OSError:  # a file system without locks: two processes would only send some files twice
            pass
        self._sending, self._sent, self._refused = (folder / name for name in ("sending", "sent", "refused"))
        for path in (self._sending, self._sent, self._refused):
            path.mkdir(exist_ok=True)
        newest = sorted(heapq.nlargest(_REMEMBERED, regular_files(self._sent)))
        self._done = {self._claim_of(path, written): (path.name, written) for written, path in newest}
        self._warned: set[str] = set()

    def close(self) -> None:
        """Let another process work on the folder."""
        os.close(self._lock)

    def process(self, sender: Sender, report: Callable[[Upload, Result], None]) -> bool:
        """Send all there is, oldest first; return whether every file could be, whatever the verdict."""
        complete, tries = self._claim(), sender.tries
        for upload in self._claimed():
            result = sender.send(upload, tries)
            # A file without a verdict must not keep the others; but they need not be tried as often until there is one.
            tries = 1 if result.outcome == "failed" else sender.tries
            if result.acknowledged:
                self._move(upload, self._sent)
            elif result.outcome == "refused":
                self._move(upload, self._refused, f"{result.message}\n{result.reason or ''}".strip() + "\n")
            else:
                complete = False
            report(upload, result)
            if result.outcome == "misconfigured":  # then so it is for the others
                break
        return complete

    def _claim(self) -> bool:
        """Move the complete files to `sending/`, oldest first; return whether none had to stay."""
        for claim in self._sending.iterdir():
            with contextlib.suppress(OSError):
                claim.rmdir()  # empty: a process was killed at the wrong time
        files = sorted(regular_files(self._folder))
        return [path for written, path in files if not self._take(path, written)] == []

    def _claim_of(self, path: Path, written: int) -> str:
        """Return AGENT.RUN.TIME, from a file's name or else from the command line and its time in nanoseconds."""
        named = _SPOOLED.fullmatch(path.name)
        if named:
            return f"{named['agent']}.{int(named['run'])}.{int(named['time'])}"
        return "" if self._agent is None or self._run is None else f"{self._agent}.{self._run}.{written // 10**9}"

    def _take(self, path: Path, written: int) -> bool:
        """Move a file to `sending/`; return whether it need not stay."""
        if path.name.startswith(".") or path.name.endswith(_TEMPORARY):
            return True
        named, written = _SPOOLED.fullmatch(path.name), max(written, 0)
        claim = self._claim_of(path, written)
        if not claim and path.name not in self._warned:
            say(f"{path}: neither the name nor --run and --agent say whose it is; it stays")
            self._warned.add(path.name)
        while claim:
            try:
                if named or self._done.get(claim, (path.name, written)) == (path.name, written):
                    (self._sending / claim).mkdir()
                    path.rename(self._sending / claim / path.name)
                    return True
            except FileNotFoundError:  # somebody has taken it away
                return True
            except FileExistsError:
                if named:  # its predecessor goes first
                    return False
            # Another file has this second, and the receiver would put one in the place of the other: the next is taken.
            written = (written // 10**9 + 1) * 10**9
            with contextlib.suppress(OSError):  # somebody else's file
                os.utime(path, ns=(written, written))
            claim = self._claim_of(path, written)
        return False

    def _claimed(self) -> list[Upload]:
        found = []
        for claim in self._sending.iterdir():
            match = _CLAIM.fullmatch(claim.name)
            if match is None:
                continue
            for written, path in regular_files(claim):
                named = _SPOOLED.fullmatch(path.name)
                status = _STATUS[named["status"] if named else None]
                found.append((written, Upload(path, int(match["run"]), match["agent"], int(match["time"]), status)))
        return [upload for _, upload in sorted(found)]

    def _move(self, upload: Upload, folder: Path, reason: str = "") -> None:
        """Move a file out of `sending/`, with a number where its name has been used before."""
        path, number = upload.path, 0
        target = folder / path.name
        while target.exists():
            number += 1
            target = folder / f"{path.stem}.{number}{path.suffix}"
        self._done[path.parent.name] = (path.name, path.stat().st_mtime_ns)
        if reason:
            (folder / f"{target.name}.reason").write_text(reason, "utf-8", "backslashreplace")
        path.rename(target)
        with contextlib.suppress(OSError):
            path.parent.rmdir()
        if len(self._done) > _REMEMBERED:
            del self._done[next(iter(self._done))]


def regular_files(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the files of a folder, each after its modification time in nanoseconds."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    yield entry.stat(follow_symlinks=False).st_mtime_ns, Path(entry.path)


# --- the program -------------------------------------------------------------------------------------------------------


def number(largest: int) -> Callable[[str], int]:
    """Return a reader of numbers from 0 to the largest, for argparse."""

    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,20}", text) or int(text) > largest:
            raise argparse.ArgumentTypeError(f"must be a number from 0 to {largest}")
        return int(text)

    return read


def agent_name(text: str) -> str:
    if not re.fullmatch(AGENT, text):
        raise argparse.ArgumentTypeError("must be 1 to 64 of the characters A-Z, a-z, 0-9, - and _")
    return text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Send files to the DQM receiver until it has acknowledged them.",
        epilog="Exit status: 0 every file was acknowledged, 1 one was not, 2 wrong usage.",
    )
    add = parser.add_argument
    add("files", metavar="FILE", nargs="*", type=Path)
    add("--url", required=True, help="the receiver: http[s]://HOST[:PORT][/PREFIX]")
    add("--token-file", required=True, type=Path, help="the file that holds the token")
    add("--run", type=number(MAX_RUN), help="run number")
    add("--agent", type=agent_name, help="agent: letters, digits, - and _")
    add("--time-stamp", type=number(LAST_TIME_STAMP), help="Unix seconds (when the file was last written)")
    add("--status", choices=("start", "end"), help="the file starts or ends a set of data")
    add("--spool", metavar="DIR", type=Path, help="send what is in a folder, for ever")
    add("--once", action="store_true", help="with --spool: go through the folder once")
    add("--interval", metavar="S", type=float, default=5.0, help="with --spool: seconds between two looks (5)")
    add("--ca-file", help="PEM file of certificates to trust in place of the system's")
    add("--timeout", metavar="S", type=float, default=60.0, help="seconds; for an answer 1 more per MiB (60)")
    add("--tries", metavar="N", type=number(10**6), default=10, help="attempts at a file (10)")
    add("--max-delay", metavar="S", type=float, default=60.0, help="longest wait between attempts, seconds (60)")
    add("--json", action="store_true", help="print one JSON line per file")
    return parser


def uploads(options: argparse.Namespace) -> list[Upload]:
    """Return what the command line names; raises ValueError for two files that the receiver would give one name."""
    found: dict[int, Upload] = {}
    for path in options.files:
        second = int(path.stat().st_mtime) if options.time_stamp is None else options.time_stamp
        if second in found:
            raise ValueError(f"{path} and {found[second].path} have one time stamp: one would replace the other")
        found[second] = Upload(path, options.run, options.agent, second, _STATUS[options.status])
    return list(found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if (options.spool is None) == (not options.files):
        parser.error("give either FILEs or --spool DIR")
    if options.files and (options.run is None or options.agent is None):
        parser.error("--run and --agent are required")
    if options.spool and (options.status or options.time_stamp is not None):
        parser.error("with --spool, status and time stamp stand in a file's name: AGENT.RUN.TIME[.start|.end].root")
    if min(options.interval, options.timeout, options.max_delay) <= 0:
        parser.error("--interval, --timeout and --max-delay must be above 0")
    acknowledged = True

    def report(upload: Upload, result: Result) -> None:
        nonlocal acknowledged
        acknowledged &= result.acknowledged
        if options.json:
            facts = {**upload._asdict(), **result._asdict(), "acknowledged": result.acknowledged}
            print(json.dumps({"file": str(facts.pop("path")), **facts}), flush=True)
        else:
            parts = (str(upload.path), result.outcome, result.filename, result.message, result.reason)
            print(*(ascii(part)[1:-1] for part in parts if part), sep=": ", flush=True)

    try:
        sender = Sender(
            options.url, options.token_file, options.ca_file, options.timeout, options.tries, options.max_delay
        )
        if options.token_file.stat().st_mode & stat.S_IROTH:
            say(f"warning: everybody on this host can read {options.token_file}")
        found = uploads(options)
        spool = Spool(options.spool, options.run, options.agent) if options.spool else None
    except BlockingIOError:
        say(f"another dqm_send works on {options.spool}")
        return 1
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        for upload in found:
            report(upload, sender.send(upload))
        while spool:
            complete = False
            try:
                complete = spool.process(sender, report)
            except OSError as error:  # of the folder itself: the network's do not come this far
                say(f"the folder cannot be worked on: {error}")
            if options.once:
                return 0 if complete and acknowledged else 1
            time.sleep(options.interval if complete else max(options.interval, options.max_delay))
        return 0 if acknowledged else 1
    except KeyboardInterrupt:
        return 130
    finally:
        if spool:
            spool.close()


if __name__ == "__main__":
    sys.exit(main())
