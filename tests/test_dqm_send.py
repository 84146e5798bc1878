"""The sender: against a real receiver that is killed in mid-traffic, and against one that answers badly by plan."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pty
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from conftest import FILES, GRAPHS, HISTOGRAMS, PROFILES, PROJECT, Server, free_port, receipts, visible

CLIENT = PROJECT / "clients" / "dqm_send.py"
TOKEN = "top-secret-ö"
TIME = 1448384650
NAME = "EMChistos_300005_DQM_2015_11_24_18_04_10.root"
SENT_AS = ("--run", "300005", "--agent", "EMC")


def file_of(number: int, size: int = 0) -> bytes:
    """Return a valid file unlike those of other numbers; what follows the end of a ROOT file is free."""
    return HISTOGRAMS + f"{number:010}".encode().ljust(size, b"-")


class Run(NamedTuple):
    """What the program did."""

    status: int
    output: str
    error: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.splitlines()]


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    path = tmp_path / "spool"
    path.mkdir()
    return path


Send = Callable[..., Run]


@pytest.fixture
def command(token_file: Path) -> Callable[..., list[str]]:
    """Return a function that makes a command line for a URL; retries are quick."""

    def make(url: str, *arguments: object, python: str = sys.executable, program: tuple[str, ...] = ()) -> list[str]:
        options = ["--url", url, "--token-file", str(token_file), "--json", "--max-delay", "0.05"]
        return [python, *(program or (str(CLIENT),)), *options, *map(str, arguments)]

    return make


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("dqm_send", CLIENT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dqm_send", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def send(command: Callable[..., list[str]], module: ModuleType, capsys: pytest.CaptureFixture[str]) -> Send:
    """Return a function that runs the program, in this process unless told; the token is in no output of it."""

    def run(url: str, *arguments: object, **more: Any) -> Run:
        line = command(url, *arguments, **more)
        if more:
            process = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
            done = Run(process.returncode, process.stdout, process.stderr)
        else:
            capsys.readouterr()
            try:
                status = module.main(line[2:])
            except SystemExit as error:
                status = error.code
            done = Run(status, *capsys.readouterr())
        assert "top-secret" not in done.output + done.error
        assert "Traceback" not in done.error, done.error
        return done

    return run


@pytest.fixture
def root_file(tmp_path: Path) -> Path:
    path = tmp_path / "some file.root"
    path.write_bytes(HISTOGRAMS)
    os.utime(path, (TIME, TIME))
    return path


# --- a receiver that answers as told -----------------------------------------------------------------------------------


class Received(NamedTuple):
    """A request as far as it was read."""

    headers: dict[str, str]
    body: bytes

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what a receiver makes a name of."""
        return (self.headers["amoreagent"], self.headers["runnumber"], self.headers["timestamp"])


def http_answer(status: int, content: bytes | dict[str, Any]) -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return f"HTTP/1.1 {status} Whatever\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def error(status: int, message: str = "some message") -> bytes:
    return http_answer(status, {"status": status, "message": message, "received": None})


def acknowledgement(request: Received, **changes: Any) -> bytes:
    """Return the receiver's answer to a file it has stored, with changes."""
    answer = {"status": 200, "filename": NAME, "message": "Successfully received", "received": {}}
    answer |= {"size": int(request.headers["content-length"]), "sha256": request.headers["sha256"]}
    return http_answer(200, answer | changes)


Reply = bytes | Callable[[Received], bytes]


class Fake:
    """Takes one connection at a time and gives it the next of the replies, the last of them again and again.

    It reads `read` bytes of each body (None: all) before its reply; an empty one closes, RESET breaks the connection.
    """

    RESET = b"reset"

    def __init__(self, *replies: Reply, read: int | None = None, linger: float = 0.0, tls: Path | None = None) -> None:
        self.replies, self.read, self.linger = list(replies), read, linger
        self.requests: list[Received] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.context: ssl.SSLContext | None = None
        if tls is not None:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(tls)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                if self.context:
                    with self.context.wrap_socket(connection, server_side=True) as wrapped:
                        self.answer(wrapped)
                else:
                    self.answer(connection)

    def answer(self, connection: socket.socket) -> None:
        connection.settimeout(30)
        head = b""
        while b"\r\n\r\n" not in head:
            if not (piece := connection.recv(65536)):
                return
            head += piece
        head, _, body = head.partition(b"\r\n\r\n")
        pairs = (line.split(": ", 1) for line in head.decode("latin-1").split("\r\n")[1:])
        headers = {name.lower(): value for name, value in pairs}
        wanted = int(headers["content-length"]) if self.read is None else self.read
        while len(body) < wanted and (piece := connection.recv(65536)):
            body += piece
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        request = Received(headers, body)
        self.requests.append(request)
        data = reply if isinstance(reply, bytes) else reply(request)
        if data == self.RESET:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif data:
            connection.sendall(data)
            time.sleep(self.linger)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed before
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(35)


@pytest.fixture
def fake() -> Iterator[Callable[..., Fake]]:
    """Return a function that starts a receiver with these replies."""
    fakes: list[Fake] = []

    def start(*replies: Reply, **more: Any) -> Fake:
        fakes.append(Fake(*replies, **more))
        return fakes[-1]

    yield start
    for server in fakes:
        server.close()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Return a PEM file with a key and a certificate for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    path = tmp_path / "server.pem"
    line = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*line.split(), "-keyout", path, "-out", tmp_path / "cert"], check=True, capture_output=True)
    path.write_text(path.read_text() + (tmp_path / "cert").read_text())
    return path


# --- one file, the real receiver ---------------------------------------------------------------------------------------


@pytest.fixture
def real(make_server: Callable[..., Server]) -> Server:
    return make_server(token=TOKEN)


def test_a_file_is_sent_and_acknowledged_once_more_as_duplicate_and_changed_as_replaced(
    real: Server, send: Send, root_file: Path, folder: Path
) -> None:
    done = send(real.url, *SENT_AS, "--status", "end", root_file)
    assert done.status == 0
    assert done.lines == [
        {
            "file": str(root_file),
            "run": 300005,
            "agent": "EMC",
            "time_stamp": TIME,
            "data_status": 2,
            "outcome": "stored",
            "message": "Successfully received file and extracted information",
            "status": 200,
            "filename": NAME,
            "reason": None,
            "size": len(HISTOGRAMS),
            "sha256": hashlib.sha256(HISTOGRAMS).hexdigest(),
            "attempts": 1,
            "acknowledged": True,
        }
    ]
    assert visible(folder) == {NAME: HISTOGRAMS}
    assert receipts(folder, 300005)[0]["data_status"] == 2

    again = send(real.url + "/", *SENT_AS, root_file)
    assert (again.status, again.lines[0]["outcome"]) == (0, "duplicate")
    root_file.write_bytes(GRAPHS)
    changed = send(real.url + FILES, *SENT_AS, "--time-stamp", TIME, root_file)
    assert (changed.status, changed.lines[0]["outcome"]) == (0, "replaced")
    assert visible(folder) == {NAME: GRAPHS}


def test_refusals_of_the_real_receiver_are_not_tried_again(
    make_server: Callable[..., Server], send: Send, tmp_path: Path, token_file: Path, folder: Path
) -> None:
    real = make_server(token=TOKEN, max_file_size="1000000")
    damaged, large, empty, good = (tmp_path / f"{name}.root" for name in ("damaged", "large", "empty", "good"))
    damaged.write_bytes(HISTOGRAMS[:-100])
    large.write_bytes(bytes(20_000_000))
    empty.write_bytes(b"")
    good.write_bytes(PROFILES)
    for number, path in enumerate((damaged, large, empty, good)):
        os.utime(path, (number, number))
    done = send(real.url, *SENT_AS, damaged, large, empty, good)
    assert done.status == 1
    facts = [(line["outcome"], line["status"], line["attempts"]) for line in done.lines]
    assert facts == [("refused", 400, 1), ("refused", 413, 1), ("refused", 400, 1), ("stored", 200, 1)]
    assert done.lines[0]["reason"]
    assert "1000000" in done.lines[1]["message"]

    astray = send(f"{real.url}/nowhere", *SENT_AS, good)
    assert (astray.status, astray.lines[0]["outcome"], astray.lines[0]["attempts"]) == (1, "misconfigured", 1)
    token_file.write_text("another")
    unknown = send(real.url, *SENT_AS, good)
    assert (unknown.status, unknown.lines[0]["outcome"], unknown.lines[0]["attempts"]) == (1, "misconfigured", 1)
    assert len(visible(folder)) == 1


def test_memory_stays_flat(real: Server, send: Send, tmp_path: Path, folder: Path) -> None:
    large = tmp_path / "large.root"
    large.write_bytes(HISTOGRAMS)
    os.truncate(large, 300_000_000)
    program = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    sys.stderr.write(open("/proc/self/status").read())
"""
    done = send(real.url, *SENT_AS, large, program=("-c", program, str(CLIENT)))
    assert (done.status, done.lines[0]["outcome"]) == (0, "stored"), done
    peak = next(int(line.split()[1]) for line in done.error.splitlines() if line.startswith("VmHWM"))
    assert peak < 60_000, f"{peak} kB"
    assert [path.stat().st_size for path in folder.iterdir() if path.name.startswith("EMC")] == [300_000_000]


def test_every_file_arrives_once_while_the_receiver_is_killed_and_restarted(
    make_server: Callable[..., Server], command: Callable[..., list[str]], tmp_path: Path, folder: Path
) -> None:
    files = {}
    for number in range(30):
        path = tmp_path / f"{number}.root"
        path.write_bytes(file_of(number, 2_000_000))
        os.utime(path, (number, number))
        files[f"EMChistos_300005_DQM_1970_01_01_01_00_{number:02}.root"] = path
    port = free_port()
    bind = ("--bind", f"127.0.0.1:{port}", "--workers", "1")
    server = make_server(*bind, token=TOKEN)
    line = command(f"http://127.0.0.1:{port}", *SENT_AS, "--tries", 10_000, *files.values())
    kills = 0
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        while client.poll() is None and kills < 3:
            time.sleep(random.uniform(0.02, 0.3))
            server.kill()
            kills += 1
            server = make_server(*bind, token=TOKEN)
        output, errors = client.communicate(timeout=60)
    assert client.returncode == 0, errors
    lines = [json.loads(line) for line in output.splitlines()]
    assert [line["filename"] for line in lines] == list(files)
    assert any(line["attempts"] > 1 for line in lines)
    assert visible(folder) == {name: path.read_bytes() for name, path in files.items()}
    assert not list((folder / ".replaced").iterdir())


def cut_on_the_way(receiver: Server, request: Received, chunked: bool) -> bytes:
    """Return what the receiver answers when half of the file reaches it."""
    half = request.body[: len(request.body) // 2]
    headers = {**request.headers, "connection": "close"}
    if chunked:
        del headers["content-length"]
        headers["transfer-encoding"] = "chunked"
        half = f"{len(request.body):x}\r\n".encode() + half
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection(("127.0.0.1", receiver.port), timeout=30) as connection:
        connection.sendall(f"POST {FILES} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + half)
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as answer:
            return answer.read()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_file_that_is_cut_on_the_way_is_sent_again(
    real: Server, fake: Callable[..., Fake], send: Send, root_file: Path, folder: Path, chunked: bool
) -> None:
    answers: list[bytes] = []

    def relay(request: Received) -> bytes:
        answers.append(cut_on_the_way(real, request, chunked))
        return answers[-1]

    server = fake(relay, acknowledgement)
    done = send(server.url, *SENT_AS, root_file)
    assert b" 400 " in answers[0].splitlines()[0] and b"The body ended" in answers[0]
    assert (done.status, done.lines[0]["attempts"]) == (0, 2), done.error
    assert visible(folder) == {}


# --- one file, bad answers ---------------------------------------------------------------------------------------------


# nginx's, to plain HTTP on the port of HTTPS, for instance
NOT_FOR_THE_PROXY = re.findall(r'return 400 .*"message": "(.*?)"', (PROJECT / "deploy" / "nginx.conf").read_text())[0]

NO_VERDICT: dict[str, Reply] = {
    **{str(status): error(status) for status in (408, 429, 500, 502, 503, 504, 507)},
    "a proxy's 502": http_answer(502, b"<html>Bad gateway</html>"),
    "closed": b"",
    "reset": Fake.RESET,
    "not HTTP": b"hello\r\n\r\n",
    "cut answer": lambda request: acknowledgement(request)[:-20],
    "damaged on its way": error(400, "The header sha256 differs from that of the 7 bytes received, 12"),
    "200, a page": http_answer(200, b"<html>Welcome</html>"),
    "200, empty": http_answer(200, b""),
    "200, a list": http_answer(200, b"[200]"),
    "200, deep": http_answer(200, b"[" * 100_000),
    "200, other JSON": http_answer(200, {"status": "ok"}),
    "200, other sha256": lambda request: acknowledgement(request, sha256="0" * 64),
    "200, no sha256": lambda request: acknowledgement(request, sha256=None),
    "200, other size": lambda request: acknowledgement(request, size=1),
    "200, no name": lambda request: acknowledgement(request, filename=None),
    "200, says 400": lambda request: acknowledgement(request, status=400),
    "204": http_answer(204, b""),
    "302": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("reply", NO_VERDICT.values(), ids=NO_VERDICT.keys())
def test_what_is_no_verdict_is_tried_again(
    fake: Callable[..., Fake], send: Send, root_file: Path, reply: Reply
) -> None:
    server = fake(reply, reply, acknowledgement)
    done = send(server.url, *SENT_AS, root_file)
    assert (done.status, done.lines[0]["outcome"], done.lines[0]["attempts"]) == (0, "stored", 3), done.error
    assert [request.body for request in server.requests] == [HISTOGRAMS] * 3
    assert len({request.key for request in server.requests}) == 1


@pytest.mark.parametrize("reply", [error(503), b"", lambda request: acknowledgement(request, sha256="0" * 64)])
def test_without_a_verdict_in_the_end_the_exit_status_is_1(
    fake: Callable[..., Fake], send: Send, root_file: Path, reply: Reply
) -> None:
    server = fake(reply)
    done = send(server.url, *SENT_AS, "--tries", 2, root_file)
    assert (done.status, done.lines[0]["outcome"], done.lines[0]["acknowledged"]) == (1, "failed", False)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (error(400), "refused"),
        (error(413), "refused"),
        (http_answer(413, b"<html>"), "refused"),
        (http_answer(400, b"<html>"), "misconfigured"),
        (error(400, "Must pass a token!"), "misconfigured"),
        (error(400, NOT_FOR_THE_PROXY), "misconfigured"),
        (error(404), "misconfigured"),
        (http_answer(405, b"<html>"), "misconfigured"),
    ],
)
def test_a_verdict_is_not_tried_again(
    fake: Callable[..., Fake], send: Send, root_file: Path, reply: bytes, outcome: str
) -> None:
    server = fake(reply)
    done = send(server.url, *SENT_AS, root_file)
    assert (done.status, done.lines[0]["outcome"], len(server.requests)) == (1, outcome, 1)


def test_what_reaches_the_receiver_as_no_http_is_no_verdict_on_the_file(
    real: Server, fake: Callable[..., Fake], send: Send, root_file: Path
) -> None:
    with socket.create_connection(("127.0.0.1", real.port), timeout=30) as connection:
        connection.sendall(b"\x16\x03\x01 TLS\r\n\r\n")
        with connection.makefile("rb") as stream:
            answer = stream.read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    done = send(fake(answer).url, *SENT_AS, root_file)
    assert (done.status, done.lines[0]["outcome"]) == (1, "misconfigured")


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("linger", [0.0, 1.5])
def test_an_answer_before_the_end_of_the_file_is_read(
    fake: Callable[..., Fake], send: Send, tmp_path: Path, certificate: Path, tls: bool, linger: float
) -> None:
    large = tmp_path / "large.root"
    large.write_bytes(b"")
    os.truncate(large, 50_000_000)
    server = fake(error(400, "too early"), read=100_000, linger=linger, tls=certificate if tls else None)
    done = send(server.url, *SENT_AS, "--timeout", 0.7, "--ca-file", certificate, large)
    assert (done.lines[0]["outcome"], done.lines[0]["message"]) == ("refused", "too early"), done
    # OpenSSL reads no more from a connection that broke under a write: there the answer may take another attempt.
    assert len(server.requests) == 1 or (tls and not linger)


def test_an_acknowledgement_before_the_end_of_the_file_is_not_believed(
    fake: Callable[..., Fake], send: Send, tmp_path: Path
) -> None:
    large = tmp_path / "large.root"
    large.write_bytes(bytes(50_000_000))
    server = fake(acknowledgement, read=100_000)
    done = send(server.url, *SENT_AS, "--tries", 2, large)
    assert (done.status, done.lines[0]["outcome"], len(server.requests)) == (1, "failed", 2)


def test_a_file_that_changed_meanwhile_is_sent_again(fake: Callable[..., Fake], send: Send, root_file: Path) -> None:
    def change(request: Received) -> bytes:
        root_file.write_bytes(GRAPHS)
        return acknowledgement(request)

    server = fake(change, acknowledgement)
    done = send(server.url, *SENT_AS, root_file)
    assert (done.status, done.lines[0]["attempts"]) == (0, 2)
    assert done.lines[0]["sha256"] == hashlib.sha256(GRAPHS).hexdigest()
    assert [request.body for request in server.requests] == [HISTOGRAMS, GRAPHS]


def test_a_receiver_that_falls_silent_is_left_after_the_timeout(
    fake: Callable[..., Fake], send: Send, root_file: Path
) -> None:
    def silent(request: Received) -> bytes:
        time.sleep(1)
        return b""

    done = send(fake(silent, acknowledgement).url, *SENT_AS, "--timeout", 0.3, root_file)
    assert (done.status, done.lines[0]["attempts"] > 1) == (0, True)
    assert "timed out" in done.error


def test_certificates_are_checked(fake: Callable[..., Fake], send: Send, root_file: Path, certificate: Path) -> None:
    server = fake(acknowledgement, tls=certificate)
    assert send(server.url, *SENT_AS, "--ca-file", certificate, root_file).status == 0
    done = send(server.url, *SENT_AS, "--tries", 2, root_file)
    assert (done.status, done.lines[0]["outcome"]) == (1, "failed")
    assert "CERTIFICATE_VERIFY_FAILED" in done.lines[0]["message"]
    assert len(server.requests) == 1


# --- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("FILE",),
        ("--run", "1", "FILE"),
        ("--run", "2147483648", "--agent", "EMC", "FILE"),
        ("--run", "1", "--agent", "E.M", "FILE"),
        (*SENT_AS, "FILE", "FILE"),
        (*SENT_AS, "--time-stamp", "7", "FILE", "OTHER"),
        (*SENT_AS, "missing.root"),
        (*SENT_AS, "--spool", "missing"),
        (*SENT_AS, "--spool", ".", "FILE"),
        (*SENT_AS, "--spool", ".", "--status", "end"),
        (*SENT_AS, "--url", "ftp://127.0.0.1", "FILE"),
        (*SENT_AS, "--url", "http://user:word@127.0.0.1", "FILE"),
        (*SENT_AS, "--url", "http://127.0.0.1:x", "FILE"),
        (*SENT_AS, "--url", "https://127.0.0.1", "--ca-file", "missing", "FILE"),
        (*SENT_AS, "--token-file", "missing", "FILE"),
        (*SENT_AS, "--timeout", "0", "FILE"),
    ],
)
def test_wrong_usage_exits_2_and_sends_nothing(
    fake: Callable[..., Fake], send: Send, root_file: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    other = tmp_path / "other.root"
    other.write_bytes(GRAPHS)
    server = fake(acknowledgement)
    names = {"FILE": root_file, "OTHER": other}
    done = send(server.url, *(names.get(argument, argument) for argument in arguments))
    assert (done.status, done.output, server.requests) == (2, "", [])
    assert ": error: " in done.error.splitlines()[-1]


@pytest.mark.parametrize("content", [b"", b"\n", b"top-secret\nsecond line", b"top-secret\x00"])
def test_a_malformed_token_is_refused_without_showing_it(
    send: Send, root_file: Path, token_file: Path, content: bytes
) -> None:
    token_file.write_bytes(content)
    assert send("http://127.0.0.1:1", *SENT_AS, root_file).status == 2


def test_a_token_that_everybody_can_read_is_warned_of(
    fake: Callable[..., Fake], send: Send, root_file: Path, token_file: Path
) -> None:
    server = fake(acknowledgement)
    assert send(server.url, *SENT_AS, root_file).error == ""
    token_file.chmod(0o644)
    done = send(server.url, *SENT_AS, root_file)
    assert (done.status, "warning" in done.error) == (0, True)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_not_sent(send: Send, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd.root"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    done = send("http://127.0.0.1:1", *SENT_AS, path)
    assert (done.status, done.lines[0]["outcome"]) == (1, "unreadable")


def test_progress_is_shown_on_a_terminal_only(
    fake: Callable[..., Fake], command: Callable[..., list[str]], send: Send, tmp_path: Path
) -> None:
    large = tmp_path / "large.root"
    large.write_bytes(bytes(5_000_000))
    server = fake(acknowledgement)
    assert send(server.url, *SENT_AS, large).error == ""
    master, slave = pty.openpty()
    with subprocess.Popen(command(server.url, *SENT_AS, large), stdout=subprocess.PIPE, stderr=slave) as client:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the terminal's other end is closed
            while piece := os.read(master, 65536):
                shown += piece
        assert client.stdout is not None
        assert json.loads(client.stdout.read())["acknowledged"]
    os.close(master)
    assert b"% of 5.0 MB  large.root" in shown
    assert shown.endswith(b"\r\x1b[K")


def test_without_json_it_prints_a_line_for_people(
    fake: Callable[..., Fake], command: Callable[..., list[str]], root_file: Path
) -> None:
    line = [part for part in command(fake(acknowledgement).url, *SENT_AS, root_file) if part != "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout == f"{root_file}: stored: {NAME}: Successfully received\n"


def test_it_can_be_imported(module: ModuleType, fake: Callable[..., Fake], token_file: Path, root_file: Path) -> None:
    sender = module.Sender(fake(error(507), acknowledgement).url, token_file, max_delay=0.01)
    result = sender.send(module.Upload(root_file, 300005, "EMC", TIME))
    assert (result.acknowledged, result.filename, result.attempts) == (True, NAME, 2)
    with pytest.raises(ValueError, match="URL"):
        module.Sender("gopher://127.0.0.1", token_file)


def test_waits_grow_are_bounded_and_differ(
    module: ModuleType, token_file: Path, root_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    sender = module.Sender(f"http://127.0.0.1:{free_port()}", token_file, tries=2000)
    assert sender.send(module.Upload(root_file, 1, "EMC", 1)).attempts == 2000
    assert all(min(60, 2**number) / 2 <= wait <= min(60, 2**number) for number, wait in enumerate(waits))
    assert len(set(waits)) > 1900


def find_python38() -> str | None:
    for path in (shutil.which("python3.8"), *Path.home().glob(".pyenv/versions/3.8.*/bin/python")):
        if path and subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return str(path)
    return None


def test_it_runs_under_python_38(
    fake: Callable[..., Fake], send: Send, root_file: Path, spool: Path, certificate: Path
) -> None:
    python = find_python38()
    if python is None:
        pytest.skip("Python 3.8 is not installed")
    server = fake(b"", error(503), acknowledgement, error(400), acknowledgement, tls=certificate)
    options = (*SENT_AS, "--ca-file", certificate)
    done = send(server.url, *options, root_file, python=python)
    assert (done.status, done.lines[0]["attempts"]) == (0, 3), done
    assert send(server.url, *options, root_file, python=python).status == 1
    shutil.copy(root_file, spool)
    assert send(server.url, *options, "--spool", spool, "--once", python=python).status == 0


# --- a folder ----------------------------------------------------------------------------------------------------------


def put(spool: Path, name: str, content: bytes, written: float) -> Path:
    """Spool a file as its writer should: written elsewhere and renamed."""
    outside = spool.parent / f"writing {name}"
    outside.write_bytes(content)
    os.utime(outside, (written, written))
    return outside.rename(spool / name)


def tree(spool: Path) -> dict[str, bytes]:
    return {str(path.relative_to(spool)): path.read_bytes() for path in spool.rglob("*") if path.is_file()}


def test_a_spool_is_sent_oldest_first_and_sorted_by_verdict(
    real: Server, send: Send, spool: Path, folder: Path
) -> None:
    put(spool, "b.root", file_of(1), 1001)
    put(spool, "a.root", file_of(2), 1002)
    put(spool, "TPC_x.77.5000.end.root", file_of(3), 1000)
    put(spool, "bad.root", b"rubbish", 1003)
    untouched = {".hidden.root": b"1", "c.root.tmp": b"2", "d.part": b"3", "e.root~": b"4", ".lock": b""}
    for name, content in untouched.items():
        put(spool, name, content, 900)
    (spool / "folder").mkdir()
    (spool / "link.root").symlink_to(spool / ".hidden.root")
    done = send(real.url, *SENT_AS, "--spool", spool, "--once")
    assert done.status == 1
    assert [(Path(line["file"]).name, line["outcome"]) for line in done.lines] == [
        ("TPC_x.77.5000.end.root", "stored"),
        ("b.root", "stored"),
        ("a.root", "stored"),
        ("bad.root", "refused"),
    ]
    files = tree(spool)
    assert files.pop("link.root") == b"1"
    assert b"not valid" in files.pop("refused/bad.root.reason")
    assert files == {
        **untouched,
        "sent/b.root": file_of(1),
        "sent/a.root": file_of(2),
        "sent/TPC_x.77.5000.end.root": file_of(3),
        "refused/bad.root": b"rubbish",
    }
    assert visible(folder) == {
        "TPC-xhistos_77_DQM_1970_01_01_02_23_20.root": file_of(3),
        "EMChistos_300005_DQM_1970_01_01_01_16_41.root": file_of(1),
        "EMChistos_300005_DQM_1970_01_01_01_16_42.root": file_of(2),
    }
    assert receipts(folder, 77)[0]["data_status"] == 2
    assert send(real.url, *SENT_AS, "--spool", spool, "--once").status == 0  # nothing left


def test_files_of_one_second_do_not_take_each_others_name(fake: Callable[..., Fake], send: Send, spool: Path) -> None:
    server = fake(acknowledgement)
    for number in range(5):
        put(spool, f"{number}.root", file_of(number), 1000)
        if number != 2:
            assert send(server.url, *SENT_AS, "--spool", spool, "--once").status == 0
    assert sorted(request.headers["timestamp"] for request in server.requests) == [str(1000 + n) for n in range(5)]


def test_files_of_one_second_and_name_do_not_take_each_others_place(
    fake: Callable[..., Fake], send: Send, spool: Path
) -> None:
    server = fake(acknowledgement)
    for number in range(3):
        put(spool, "same.root", file_of(number), 1000 + number / 10)
        assert send(server.url, *SENT_AS, "--spool", spool, "--once").status == 0
    assert [request.headers["timestamp"] for request in server.requests] == ["1000", "1001", "1002"]


def test_a_refused_file_that_is_moved_back_is_sent_as_what_it_was(
    fake: Callable[..., Fake], module: ModuleType, token_file: Path, spool: Path
) -> None:
    server = fake(error(400), acknowledgement)
    put(spool, "same.root", file_of(1), 1000.5)
    sender, process = module.Sender(server.url, token_file), module.Spool(spool, 300005, "EMC")
    with contextlib.closing(process):
        process.process(sender, lambda *_: None)
        (spool / "refused" / "same.root").rename(spool / "same.root")
        process.process(sender, lambda *_: None)
    assert [request.headers["timestamp"] for request in server.requests] == ["1000", "1000"]


def test_a_new_file_of_the_same_name_is_sent_as_well(fake: Callable[..., Fake], send: Send, spool: Path) -> None:
    put(spool, "same.root", file_of(1), 1000)

    def spool_another(request: Received) -> bytes:
        put(spool, "same.root", file_of(2), 1001)
        return acknowledgement(request)

    server = fake(spool_another, acknowledgement)
    for _ in range(2):
        assert send(server.url, *SENT_AS, "--spool", spool, "--once").status == 0
    assert [request.body for request in server.requests] == [file_of(1), file_of(2)]
    assert tree(spool) == {".lock": b"", "sent/same.root": file_of(1), "sent/same.1.root": file_of(2)}


@pytest.mark.parametrize("reply", [error(503), b"", error(400, "Must pass a token!"), error(404)])
def test_files_without_a_verdict_stay_and_are_sent_as_the_same_later(
    fake: Callable[..., Fake], send: Send, spool: Path, reply: bytes
) -> None:
    put(spool, "1.root", file_of(1), 1000)
    put(spool, "2.root", file_of(2), 1001)
    server = fake(reply)
    assert send(server.url, *SENT_AS, "--spool", spool, "--once", "--tries", 3).status == 1
    assert len(server.requests) == (4 if reply in (error(503), b"") else 1)  # the second file is tried once
    server.replies = [acknowledgement]
    assert send(server.url, "--run", "7", "--agent", "TPC", "--spool", spool, "--once").status == 0
    assert {request.key for request in server.requests[-2:]} == {("EMC", "300005", "1000"), ("EMC", "300005", "1001")}
    assert tree(spool) == {".lock": b"", "sent/1.root": file_of(1), "sent/2.root": file_of(2)}


def test_one_file_without_a_verdict_does_not_keep_the_others(
    fake: Callable[..., Fake], send: Send, spool: Path
) -> None:
    for number in range(3):
        put(spool, f"{number}.root", file_of(number), 1000 + number)

    def fail_for_the_first(request: Received) -> bytes:
        return Fake.RESET if request.body == file_of(0) else acknowledgement(request)

    done = send(fake(fail_for_the_first).url, *SENT_AS, "--spool", spool, "--once", "--tries", 2)
    assert done.status == 1
    assert [line["outcome"] for line in done.lines] == ["failed", "stored", "stored"]
    assert "sending/EMC.300005.1000/0.root" in tree(spool)


def test_a_file_of_unknown_run_stays(fake: Callable[..., Fake], send: Send, spool: Path) -> None:
    put(spool, "a.root", file_of(1), 1000)
    put(spool, "EMC.7.1234.root", file_of(2), 1000)
    done = send(fake(acknowledgement).url, "--spool", spool, "--once")
    assert (done.status, [line["run"] for line in done.lines]) == (1, [7])
    assert tree(spool) == {".lock": b"", "a.root": file_of(1), "sent/EMC.7.1234.root": file_of(2)}


def test_a_spool_is_watched_by_one_process_until_it_is_ended(
    fake: Callable[..., Fake], command: Callable[..., list[str]], send: Send, spool: Path
) -> None:
    server = fake(acknowledgement)
    line = command(server.url, *SENT_AS, "--spool", spool, "--interval", 0.05)
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as client:  # noqa: PLW1509
        try:
            assert client.stdout is not None
            for number in range(3):
                put(spool, f"{number}.root", file_of(number), 1000 + number)
                assert json.loads(client.stdout.readline())["file"].endswith(f"{number}.root")
            second = send(server.url, *SENT_AS, "--spool", spool, "--once")
            assert (second.status, second.output) == (1, "")
            client.send_signal(signal.SIGINT)
            _, errors = client.communicate(timeout=10)
        finally:
            client.kill()
    assert (client.returncode, errors) == (130, "")


KILLED_AT = """
import os, runpy, signal, sys
left = int(sys.argv[1])
sys.argv = sys.argv[2:]

def count(event, arguments):
    global left
    written = event == "open" and str(arguments[0]).endswith((".lock", ".reason"))
    if written or event in ("os.rename", "os.mkdir", "os.rmdir", "os.utime", "socket.connect"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_spool_survives_a_kill_before_each_of_its_steps(
    fake: Callable[..., Fake], command: Callable[..., list[str]], send: Send, tmp_path: Path
) -> None:
    steps = 0
    killed = True
    while killed:
        steps += 1
        spool = tmp_path / str(steps) / "spool"
        spool.mkdir(parents=True)
        bad = b"rubbish"
        put(spool, "1.root", file_of(1), 1000)
        put(spool, "2.root", file_of(2), 1000)
        put(spool, "bad.root", bad, 1000)
        server = fake(lambda request: error(400) if request.body == b"rubbish" else acknowledgement(request))
        options = (*SENT_AS, "--spool", spool, "--once")
        line = command(server.url, *options, program=("-c", KILLED_AT, str(steps), str(CLIENT)))
        killed = subprocess.run(line, capture_output=True, check=False).returncode == -signal.SIGKILL
        assert send(server.url, *options).status in (0, 1)  # 1 if this run is told of the bad one
        files = tree(spool)
        assert files.pop("refused/bad.root.reason") == b"some message\n"
        assert files == {
            ".lock": b"",
            "sent/1.root": file_of(1),
            "sent/2.root": file_of(2),
            "refused/bad.root": bad,
        }
        assert not list((spool / "sending").iterdir())
        keys = {request.body: request.key for request in server.requests}
        assert len(set(keys.values())) == 3
        assert all(request.key == keys[request.body] for request in server.requests)
        server.close()
    assert steps > 20


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_a_spool_survives_kills_at_any_time(
    real: Server, command: Callable[..., list[str]], send: Send, spool: Path, folder: Path, seconds: float
) -> None:
    """The receiver loses workers as well."""
    options = (*SENT_AS, "--spool", spool, "--once")
    end = time.monotonic() + seconds
    number = kills = 0
    while time.monotonic() < end + (0 if kills > 3 else 60):  # a slow machine needs longer for its kills
        for _ in range(random.randint(0, 6)):
            put(spool, f"{number % 5}-{number}.root", file_of(number, 500_000), 1000 + number // 2)
            number += 1
        with subprocess.Popen(
            command(real.url, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as client:
            with contextlib.suppress(subprocess.TimeoutExpired):
                client.wait(random.uniform(0.05, 0.4))
            if random.random() < 0.2:
                with contextlib.suppress(ProcessLookupError, IndexError):
                    os.kill(random.choice(real.workers()), signal.SIGKILL)
            client.kill()
            kills += client.wait() == -signal.SIGKILL
    assert send(real.url, *options, "--tries", 100).status == 0
    assert kills > 3
    contents = [file_of(each, 500_000) for each in range(number)]
    assert Counter(visible(folder).values()) == Counter(contents)
    assert not list((folder / ".replaced").iterdir())
    assert Counter(path.read_bytes() for path in (spool / "sent").iterdir()) == Counter(contents)
