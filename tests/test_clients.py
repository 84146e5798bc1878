"""The clients: against a real receiver, also one that is killed in mid-traffic, and against one that answers as told."""

from __future__ import annotations

import ast
import contextlib
import functools
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
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from client import DATA, FILES, GRAPHS, HISTOGRAMS, PROFILES, PROJECT, exchange, receipts, settings, visible, zeros
from server import Server, adapted, free_port

CLIENT = PROJECT / "clients" / "dqm_send.py"
AGENT = PROJECT / "clients" / "dqm_agent.cpp"
SENDING = (PROJECT / "docs" / "sending.md").read_text()
TOKEN = "top-secret-ö"
TIME = 1448384650
NAME = "EMChistos_300005_DQM_2015_11_24_18_04_10.root"
SENT_AS = ("--run", "300005", "--agent", "EMC")


def numbered(number: int, size: int = 0) -> bytes:
    """Return a valid file that differs from those of other numbers: bytes after the end of a ROOT file are free."""
    return HISTOGRAMS + f"{number:010}".encode().ljust(size, b"-")


class Run(NamedTuple):
    """The exit status and output of the program."""

    status: int
    output: str
    error: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.splitlines()]

    def facts(self, *names: str) -> list[tuple[Any, ...]]:
        return [tuple(line[name] for name in names) for line in self.lines]


Send = Callable[..., Run]
Command = Callable[..., list[str]]


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


@pytest.fixture
def root_file(tmp_path: Path) -> Path:
    path = tmp_path / "some file.root"
    path.write_bytes(HISTOGRAMS)
    os.utime(path, (TIME, TIME))
    return path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file of 50 MB, larger than the buffers of sockets."""
    return zeros(tmp_path / "large.root", 50_000_000)


@pytest.fixture
def command(token_file: Path) -> Command:
    """Return a function that makes a command line for a URL; retries are quick."""

    def make(url: str, *arguments: object, program: tuple[str, ...] = ()) -> list[str]:
        options = ["--url", url, "--token-file", str(token_file), "--json", "--max-delay", "0.05"]
        return [sys.executable, *program, str(CLIENT), *options, *map(str, arguments)]

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
def send(command: Command, module: ModuleType, capsys: pytest.CaptureFixture[str]) -> Send:
    """Return a function that runs the program in this process; no output may show the token."""

    def run(url: str, *arguments: object) -> Run:
        capsys.readouterr()
        try:
            status = module.main(command(url, *arguments)[2:])
        except SystemExit as error:
            status = error.code
        done = Run(status, *capsys.readouterr())
        assert "top-secret" not in done.output + done.error
        return done

    return run


# --- a receiver that answers as told -----------------------------------------------------------------------------------


class Received(NamedTuple):
    """A request as far as it was read."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def key(self) -> tuple[str, str, str]:
        """Return the headers that make a file's name."""
        return (self.headers["amoreagent"], self.headers["runnumber"], self.headers["timestamp"])


def http_answer(status: int, content: bytes | dict[str, Any]) -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return f"HTTP/1.1 {status} Whatever\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def error(status: int, message: str = "some message") -> bytes:
    return http_answer(status, {"status": status, "message": message, "received": None})


def moved(status: int) -> bytes:
    return f"HTTP/1.1 {status} Moved\r\nLocation: https://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n".encode()


def acknowledgement(request: Received, **changes: Any) -> bytes:
    """Return the receiver's answer to a file it has stored, with changes."""
    answer = {"status": 200, "filename": NAME, "message": "Successfully received", "received": {}}
    answer |= {"size": int(request.headers["content-length"]), "sha256": request.headers["sha256"]}
    return http_answer(200, answer | changes)


Reply = bytes | Callable[[Received], bytes]


class Fake:
    """Serves one connection at a time with the next of its replies; the last one is repeated.

    It reads `read` bytes of each body (None: all) before it replies. An empty reply closes, RESET breaks the connection.
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
        line, *fields = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
        wanted = int(headers["content-length"]) if self.read is None else self.read
        received = bytearray(body)
        while len(received) < wanted and (piece := connection.recv(65536)):
            received += piece
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        request = Received(line, headers, bytes(received))
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


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a PEM file with a key and a certificate for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    base = tmp_path_factory.mktemp("certificate")
    path = base / "server.pem"
    line = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*line.split(), "-keyout", path, "-out", base / "cert"], check=True, capture_output=True)
    path.write_text(path.read_text() + (base / "cert").read_text())
    return path


# --- dqm_send.py and the real receiver ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("clients")
    server = Server(settings(base / "data", token=TOKEN), base / "gunicorn.log", ())
    yield server
    server.stop()


@pytest.fixture
def real(running: Server) -> Server:
    """The shared receiver, without the files of other tests."""
    for path in (*running.folder.glob("*.root"), *running.folder.glob(".replaced/*")):
        path.unlink()
    return running


def test_stored_then_duplicate_then_replaced(real: Server, send: Send, root_file: Path) -> None:
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
    assert visible(real.folder) == {NAME: HISTOGRAMS}
    assert receipts(real.folder, 300005)[-1]["data_status"] == 2

    again = send(real.url + "/", *SENT_AS, root_file)
    assert (again.status, again.lines[0]["outcome"]) == (0, "duplicate")
    root_file.write_bytes(GRAPHS)
    changed = send(real.url + FILES, *SENT_AS, "--time-stamp", TIME, root_file)
    assert (changed.status, changed.lines[0]["outcome"]) == (0, "replaced")
    assert visible(real.folder) == {NAME: GRAPHS}


def test_check_answers_and_stores_nothing(real: Server, send: Send, root_file: Path) -> None:
    before = receipts(real.folder, 300005)
    bad = root_file.with_name("bad.root")
    bad.write_bytes(HISTOGRAMS[:-100])
    done = send(real.url, "--check", root_file, bad)
    assert (done.status, done.facts("outcome", "status")) == (1, [("valid", 200), ("refused", 400)])
    assert done.lines[1]["reason"]
    named = send(real.url, *SENT_AS, "--check", root_file)
    assert (named.status, named.facts("outcome", "filename", "acknowledged")) == (0, [("valid", NAME, False)])
    assert visible(real.folder) == {}
    assert receipts(real.folder, 300005) == before


def test_refusals_are_not_tried_again(
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
    expected = [("refused", 400, 1), ("refused", 413, 1), ("refused", 400, 1), ("stored", 200, 1)]
    assert (done.status, done.facts("outcome", "status", "attempts")) == (1, expected)
    assert done.lines[0]["reason"]
    assert "1000000" in done.lines[1]["message"]

    astray = send(f"{real.url}/nowhere", *SENT_AS, good)
    token_file.write_text("another")
    unknown = send(real.url, *SENT_AS, good)
    for run in (astray, unknown):
        assert (run.status, run.facts("outcome", "attempts")) == (1, [("misconfigured", 1)])
    assert len(visible(folder)) == 1


def test_memory_stays_flat(real: Server, command: Command, tmp_path: Path) -> None:
    large = tmp_path / "large.root"
    large.write_bytes(HISTOGRAMS)
    os.truncate(large, 300_000_000)
    line = command(real.url, *SENT_AS, large, program=(str(PROJECT / "tests/run_sender.py"), "peak"))
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["outcome"] == "stored"
    peak = next(int(text.split()[1]) for text in done.stderr.splitlines() if text.startswith("VmHWM"))
    assert peak < 60_000, f"{peak} kB"
    assert [path.stat().st_size for path in real.folder.glob("EMC*")] == [300_000_000]


def test_files_arrive_once_while_receiver_is_killed(
    make_server: Callable[..., Server], command: Command, tmp_path: Path, folder: Path
) -> None:
    files = {}
    for number in range(30):
        path = tmp_path / f"{number}.root"
        path.write_bytes(numbered(number, 2_000_000))
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
    assert [json.loads(text)["filename"] for text in output.splitlines()] == list(files)
    assert visible(folder) == {name: path.read_bytes() for name, path in files.items()}
    assert [path.name for path in folder.glob(".replaced/*")] == []


def cut_on_the_way(receiver: Server, request: Received, chunked: bool) -> bytes:
    """Return the receiver's answer to the first half of an upload."""
    half = request.body[: len(request.body) // 2]
    headers = {**request.headers, "connection": "close"}
    if chunked:
        del headers["content-length"]
        headers["transfer-encoding"] = "chunked"
        half = f"{len(request.body):x}\r\n".encode() + half
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return exchange(receiver.port, f"POST {FILES} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + half)


@pytest.mark.parametrize("chunked", [False, True])
def test_file_cut_on_its_way_is_sent_again(
    real: Server, fake: Callable[..., Fake], send: Send, root_file: Path, chunked: bool
) -> None:
    answers: list[bytes] = []

    def relay(request: Received) -> bytes:
        answers.append(cut_on_the_way(real, request, chunked))
        return answers[-1]

    done = send(fake(relay, acknowledgement).url, *SENT_AS, root_file)
    assert b" 400 " in answers[0].splitlines()[0] and b"The body ended" in answers[0]
    assert (done.status, done.lines[0]["attempts"]) == (0, 2), done.error


def test_garbled_request_is_misconfigured(real: Server, fake: Callable[..., Fake], send: Send, root_file: Path) -> None:
    answer = exchange(real.port, b"\x16\x03\x01 TLS\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    done = send(fake(answer).url, *SENT_AS, root_file)
    assert (done.status, done.lines[0]["outcome"]) == (1, "misconfigured")


# --- dqm_send.py and bad answers ---------------------------------------------------------------------------------------


def test_check_asks_the_check_address(fake: Callable[..., Fake], send: Send, root_file: Path) -> None:
    server = fake(error(503), lambda request: acknowledgement(request, filename=None))
    done = send(f"{server.url}/dqm", "--check", root_file)
    assert (done.status, done.facts("outcome", "attempts")) == (0, [("valid", 2)])
    assert server.requests[-1].line == "POST /dqm/rest/api/check HTTP/1.1"
    assert "runnumber" not in server.requests[-1].headers


TRY_AGAIN: dict[str, Reply] = {
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
    "302": moved(302),
}


@pytest.mark.parametrize("reply", TRY_AGAIN.values(), ids=TRY_AGAIN.keys())
def test_uncertain_answers_are_tried_again(
    fake: Callable[..., Fake], send: Send, root_file: Path, reply: Reply
) -> None:
    server = fake(reply, reply, acknowledgement)
    done = send(server.url, *SENT_AS, root_file)
    assert (done.status, done.facts("outcome", "attempts")) == (0, [("stored", 3)]), done.error
    assert [request.body for request in server.requests] == [HISTOGRAMS] * 3
    assert len({request.key for request in server.requests}) == 1

    server = fake(reply)
    done = send(server.url, *SENT_AS, "--tries", 2, root_file)
    assert (done.status, done.facts("outcome", "acknowledged")) == (1, [("failed", False)])
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (error(400), "refused"),
        (error(413), "refused"),
        (http_answer(413, b"<html>"), "refused"),
        (http_answer(400, b"<html>"), "misconfigured"),
        (error(400, "Must pass a token!"), "misconfigured"),
        (error(403), "misconfigured"),
        (error(404), "misconfigured"),
        (http_answer(405, b"<html>"), "misconfigured"),
        (error(431), "misconfigured"),
        (error(501), "misconfigured"),
        (moved(301), "misconfigured"),
        (moved(308), "misconfigured"),
    ],
)
def test_final_answers_are_not_tried_again(
    fake: Callable[..., Fake], send: Send, root_file: Path, reply: bytes, outcome: str
) -> None:
    server = fake(reply)
    done = send(server.url, *SENT_AS, root_file)
    assert (done.status, done.lines[0]["outcome"], len(server.requests)) == (1, outcome, 1)


def test_words_of_the_proxy_are_misconfigured(fake: Callable[..., Fake], send: Send, root_file: Path) -> None:
    site = (PROJECT / "deploy" / "nginx.conf").read_text()
    messages = re.findall(r'(?:return 400 .*|"status": 400, )"message": "([^"$]+)"', site)
    messages += re.findall(r'map \$status \S+ {\s*default "(.*?)"', site)
    assert messages
    for message in messages:
        done = send(fake(error(400, message)).url, *SENT_AS, root_file)
        assert done.facts("outcome", "attempts") == [("misconfigured", 1)], message


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("linger", [0.0, 1.5])
def test_early_refusal_is_read(
    fake: Callable[..., Fake], send: Send, large: Path, certificate: Path, tls: bool, linger: float
) -> None:
    server = fake(error(400, "too early"), read=100_000, linger=linger, tls=certificate if tls else None)
    done = send(server.url, *SENT_AS, "--timeout", 0.7, "--ca-file", certificate, large)
    assert done.facts("outcome", "message") == [("refused", "too early")], done
    # OpenSSL reads no more from a connection that broke under a write: there the answer may take another attempt.
    assert len(server.requests) == 1 or (tls and not linger)


def test_early_acknowledgement_is_not_believed(fake: Callable[..., Fake], send: Send, large: Path) -> None:
    server = fake(acknowledgement, read=100_000)
    done = send(server.url, *SENT_AS, "--tries", 2, large)
    assert (done.status, done.lines[0]["outcome"], len(server.requests)) == (1, "failed", 2)


def test_file_changed_meanwhile_is_sent_again(fake: Callable[..., Fake], send: Send, root_file: Path) -> None:
    def change(request: Received) -> bytes:
        root_file.write_bytes(GRAPHS)
        return acknowledgement(request)

    server = fake(change, acknowledgement)
    done = send(server.url, *SENT_AS, root_file)
    assert (done.status, done.facts("attempts", "sha256")) == (0, [(2, hashlib.sha256(GRAPHS).hexdigest())])
    assert [request.body for request in server.requests] == [HISTOGRAMS, GRAPHS]


def test_silent_receiver_is_left_after_timeout(fake: Callable[..., Fake], send: Send, root_file: Path) -> None:
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


# --- dqm_send.py's command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("FILE",),
        ("--run", "1", "FILE"),
        ("--run", "2147483648", "--agent", "EMC", "FILE"),
        ("--run", "1", "--agent", "E.M", "FILE"),
        ("--run", "1", "--agent=-EMC", "FILE"),
        (*SENT_AS, "FILE", "FILE"),
        (*SENT_AS, "--time-stamp", "7", "FILE", "OTHER"),
        (*SENT_AS, "missing.root"),
        (*SENT_AS, "--spool", "missing"),
        (*SENT_AS, "--spool", ".", "FILE"),
        (*SENT_AS, "--spool", ".", "--status", "end"),
        ("--spool", ".", "--check"),
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
def test_malformed_token_is_refused_unseen(send: Send, root_file: Path, token_file: Path, content: bytes) -> None:
    token_file.write_bytes(content)
    assert send("http://127.0.0.1:1", *SENT_AS, root_file).status == 2


def test_readable_token_file_is_warned_of(
    fake: Callable[..., Fake], send: Send, root_file: Path, token_file: Path
) -> None:
    server = fake(acknowledgement)
    assert send(server.url, *SENT_AS, root_file).error == ""
    token_file.chmod(0o644)
    done = send(server.url, *SENT_AS, root_file)
    assert (done.status, "warning" in done.error) == (0, True)


def test_folders_and_pipes_are_not_sent(send: Send, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        done = send("http://127.0.0.1:1", *SENT_AS, tmp_path / name)
        assert (done.status, done.lines[0]["outcome"]) == (1, "unreadable")


def test_progress_is_shown_on_terminals_only(
    fake: Callable[..., Fake], command: Command, send: Send, large: Path
) -> None:
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
    assert b"% of 50.0 MB  large.root" in shown
    assert shown.endswith(b"\r\x1b[K")


def test_without_json_prints_plain_line(fake: Callable[..., Fake], command: Command, root_file: Path) -> None:
    line = [part for part in command(fake(acknowledgement).url, *SENT_AS, root_file) if part != "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout == f"{root_file}: stored: {NAME}: Successfully received\n"


def test_documented_import_works(fake: Callable[..., Fake], token_file: Path, root_file: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", SENDING, re.DOTALL)
    server = fake(acknowledgement)
    program = token_file.with_name("program.py")
    program.write_text(adapted(example, {"https://dqm.example.org/": server.url, "hists.root": root_file.name}))
    environ = {**os.environ, "PYTHONPATH": str(CLIENT.parent)}
    line = [sys.executable, str(program)]
    run = subprocess.run(line, cwd=program.parent, env=environ, capture_output=True, text=True, check=True)
    assert (run.stdout, len(server.requests)) == ("", 1)


def test_waits_grow_are_bounded_and_differ(
    module: ModuleType, token_file: Path, root_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    sender = module.Sender(f"http://127.0.0.1:{free_port()}", token_file, patience=module.Patience(tries=2000))
    assert sender.send(module.Upload(root_file, 1, "EMC", 1)).attempts == 2000
    assert all(min(60, 2**number) / 2 <= wait <= min(60, 2**number) for number, wait in enumerate(waits))
    assert len(set(waits)) > 1900


def test_runs_under_python_38(
    fake: Callable[..., Fake], command: Command, root_file: Path, spool: Path, certificate: Path
) -> None:
    ast.parse(CLIENT.read_text(), feature_version=(3, 8))
    found = (shutil.which("python3.8"), *Path.home().glob(".pyenv/versions/3.8.*/bin/python"))
    python = next(
        (str(path) for path in found if path and subprocess.run([path, "-V"], check=False).returncode == 0), ""
    )
    if not python:
        pytest.skip("Python 3.8 is not installed")
    shutil.copy(root_file, spool)
    server = fake(b"", error(503), acknowledgement, error(400), acknowledgement, tls=certificate)
    for status, arguments in ((0, [root_file]), (1, [root_file]), (0, ["--spool", spool, "--once"])):
        line = command(server.url, *SENT_AS, "--ca-file", certificate, *arguments)
        run = subprocess.run([python, *line[1:]], capture_output=True, text=True, check=False)
        assert run.returncode == status, run


# --- dqm_send.py's spool -----------------------------------------------------------------------------------------------


def put(spool: Path, name: str, content: bytes, written: float) -> Path:
    """Spool a file as its writer should: write it elsewhere and rename it."""
    outside = spool.parent / f"writing {name}"
    outside.write_bytes(content)
    os.utime(outside, (written, written))
    return outside.rename(spool / name)


def tree(spool: Path) -> dict[str, bytes]:
    return {str(path.relative_to(spool)): path.read_bytes() for path in spool.rglob("*") if path.is_file()}


def test_spool_is_sent_oldest_first_and_sorted(real: Server, send: Send, spool: Path) -> None:
    put(spool, "b.root", numbered(1), 1001)
    put(spool, "a.root", numbered(2), 1002)
    put(spool, "TPC_x.77.5000.end.root", numbered(3), 1000)
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
        "sent/b.root": numbered(1),
        "sent/a.root": numbered(2),
        "sent/TPC_x.77.5000.end.root": numbered(3),
        "refused/bad.root": b"rubbish",
    }
    assert visible(real.folder) == {
        "TPC-xhistos_77_DQM_1970_01_01_02_23_20.root": numbered(3),
        "EMChistos_300005_DQM_1970_01_01_01_16_41.root": numbered(1),
        "EMChistos_300005_DQM_1970_01_01_01_16_42.root": numbered(2),
    }
    assert receipts(real.folder, 77)[-1]["data_status"] == 2
    assert send(real.url, *SENT_AS, "--spool", spool, "--once").status == 0  # nothing left


@pytest.mark.parametrize("name", ["{}.root", "same.root"])
def test_files_of_one_second_all_arrive(fake: Callable[..., Fake], send: Send, spool: Path, name: str) -> None:
    server = fake(acknowledgement)
    for number in range(5):
        put(spool, name.format(number), numbered(number), 1000 + number / 10)
        if number != 2 or name == "same.root":  # else two are found at once
            assert send(server.url, *SENT_AS, "--spool", spool, "--once").status == 0
    assert sorted(request.headers["timestamp"] for request in server.requests) == [str(1000 + n) for n in range(5)]


def test_refused_file_moved_back_keeps_its_key(
    fake: Callable[..., Fake], module: ModuleType, token_file: Path, spool: Path
) -> None:
    server = fake(error(400), acknowledgement)
    put(spool, "same.root", numbered(1), 1000.5)
    sender, watched = module.Sender(server.url, token_file), module.Spool(spool, 300005, "EMC")
    with contextlib.closing(watched):
        watched.process(sender, lambda *_: None)
        (spool / "refused" / "same.root").rename(spool / "same.root")
        watched.process(sender, lambda *_: None)
    assert [request.headers["timestamp"] for request in server.requests] == ["1000", "1000"]


def test_new_file_of_same_name_is_sent(fake: Callable[..., Fake], send: Send, spool: Path) -> None:
    put(spool, "same.root", numbered(1), 1000)

    def spool_another(request: Received) -> bytes:
        put(spool, "same.root", numbered(2), 1001)
        return acknowledgement(request)

    server = fake(spool_another, acknowledgement)
    for _ in range(2):
        assert send(server.url, *SENT_AS, "--spool", spool, "--once").status == 0
    assert [request.body for request in server.requests] == [numbered(1), numbered(2)]
    assert tree(spool) == {".lock": b"", "sent/same.root": numbered(1), "sent/same.1.root": numbered(2)}


@pytest.mark.parametrize("reply", [error(503), b"", error(400, "Must pass a token!"), error(404)])
def test_undecided_files_stay_and_keep_their_keys(
    fake: Callable[..., Fake], send: Send, spool: Path, reply: bytes
) -> None:
    put(spool, "1.root", numbered(1), 1000)
    put(spool, "2.root", numbered(2), 1001)
    server = fake(reply)
    assert send(server.url, *SENT_AS, "--spool", spool, "--once", "--tries", 3).status == 1
    assert len(server.requests) == (4 if reply in (error(503), b"") else 1)  # the second file is tried once
    server.replies = [acknowledgement]
    assert send(server.url, "--run", "7", "--agent", "TPC", "--spool", spool, "--once").status == 0
    assert {request.key for request in server.requests[-2:]} == {("EMC", "300005", "1000"), ("EMC", "300005", "1001")}
    assert tree(spool) == {".lock": b"", "sent/1.root": numbered(1), "sent/2.root": numbered(2)}


def test_undecided_file_does_not_delay_others(fake: Callable[..., Fake], send: Send, spool: Path) -> None:
    for number in range(3):
        put(spool, f"{number}.root", numbered(number), 1000 + number)

    def fail_for_the_first(request: Received) -> bytes:
        return Fake.RESET if request.body == numbered(0) else acknowledgement(request)

    done = send(fake(fail_for_the_first).url, *SENT_AS, "--spool", spool, "--once", "--tries", 2)
    assert (done.status, done.facts("outcome")) == (1, [("failed",), ("stored",), ("stored",)])
    assert "sending/EMC.300005.1000/0.root" in tree(spool)


def test_file_of_unknown_run_stays(fake: Callable[..., Fake], send: Send, spool: Path) -> None:
    put(spool, "a.root", numbered(1), 1000)
    put(spool, "EMC.7.1234.root", numbered(2), 1000)
    done = send(fake(acknowledgement).url, "--spool", spool, "--once")
    assert (done.status, done.facts("run")) == (1, [(7,)])
    assert tree(spool) == {".lock": b"", "a.root": numbered(1), "sent/EMC.7.1234.root": numbered(2)}


def test_one_process_watches_until_interrupted(
    fake: Callable[..., Fake], command: Command, send: Send, spool: Path
) -> None:
    server = fake(acknowledgement)
    line = command(server.url, *SENT_AS, "--spool", spool, "--interval", 0.05)
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored by processes in the background
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as client:  # noqa: PLW1509
        try:
            assert client.stdout is not None
            for number in range(3):
                put(spool, f"{number}.root", numbered(number), 1000 + number)
                assert json.loads(client.stdout.readline())["file"].endswith(f"{number}.root")
            second = send(server.url, *SENT_AS, "--spool", spool, "--once")
            assert (second.status, second.output) == (1, "")
            client.send_signal(signal.SIGINT)
            _, errors = client.communicate(timeout=10)
        finally:
            client.kill()
    assert (client.returncode, errors) == (130, "")


def test_spool_survives_kill_at_each_step(
    fake: Callable[..., Fake], command: Command, send: Send, tmp_path: Path
) -> None:
    steps, killed = 0, True
    while killed:
        steps += 1
        spool = tmp_path / str(steps) / "spool"
        spool.mkdir(parents=True)
        contents = {"1.root": numbered(1), "2.root": numbered(2), "bad.root": b"rubbish"}
        for name, content in contents.items():
            put(spool, name, content, 1000)
        server = fake(lambda request: error(400) if request.body == b"rubbish" else acknowledgement(request))
        options = (*SENT_AS, "--spool", spool, "--once")
        line = command(server.url, *options, program=(str(PROJECT / "tests/run_sender.py"), f"kill={steps}"))
        killed = subprocess.run(line, capture_output=True, check=False).returncode == -signal.SIGKILL
        assert send(server.url, *options).status in (0, 1)  # 1 where this run reports the refusal
        files = tree(spool)
        assert files.pop("refused/bad.root.reason") == b"some message\n"
        folders = {"1.root": "sent", "2.root": "sent", "bad.root": "refused"}
        assert files == {".lock": b"", **{f"{folders[name]}/{name}": content for name, content in contents.items()}}
        assert not list((spool / "sending").iterdir())
        keys = {request.body: request.key for request in server.requests}
        assert len(set(keys.values())) == 3
        assert all(request.key == keys[request.body] for request in server.requests)
        server.close()
    assert steps > 20


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_spool_survives_kills_at_any_time(
    real: Server, command: Command, send: Send, spool: Path, seconds: float
) -> None:
    """The receiver loses workers as well."""
    options = (*SENT_AS, "--spool", spool, "--once")
    end = time.monotonic() + seconds
    number = kills = 0
    while time.monotonic() < end + (0 if kills > 3 else 60):  # a slow machine needs longer for its kills
        for _ in range(random.randint(0, 6)):
            put(spool, f"{number % 5}-{number}.root", numbered(number, 500_000), 1000 + number // 2)
            number += 1
        line = command(real.url, *options)
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as client:
            with contextlib.suppress(subprocess.TimeoutExpired):
                client.wait(random.uniform(0.05, 0.4))
            if random.random() < 0.2:
                with contextlib.suppress(ProcessLookupError, IndexError):
                    os.kill(random.choice(real.workers()), signal.SIGKILL)
            client.kill()
            kills += client.wait() == -signal.SIGKILL
    assert send(real.url, *options, "--tries", 100).status == 0
    assert kills > 3
    contents = [numbered(each, 500_000) for each in range(number)]
    assert Counter(visible(real.folder).values()) == Counter(contents)
    assert [path.name for path in real.folder.glob(".replaced/*")] == []
    assert Counter(path.read_bytes() for path in (spool / "sent").iterdir()) == Counter(contents)


# --- curl as documented ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replies", "status"),
    [([acknowledgement], 0), ([error(400)], 22), ([error(503), acknowledgement], 0)],
    ids=["good", "bad", "full, then good"],
)
def test_documented_curl_retries_no_refusal(
    fake: Callable[..., Fake], root_file: Path, token_file: Path, replies: list[Reply], status: int
) -> None:
    server = fake(*replies)
    script = next(text for text in re.findall(r"```sh\n(.*?)```", SENDING, re.DOTALL) if text.startswith("(umask"))
    script = adapted(script, {"https://dqm.example.org": server.url, "hists.root": f"'{root_file}'", "TOKEN": TOKEN})
    run = subprocess.run(["sh", "-ec", script], cwd=token_file.parent, capture_output=True, check=False)
    assert (run.returncode, len(server.requests)) == (status, len(replies)), run
    assert server.requests[0].key == ("EMC", "123456", str(TIME))
    assert server.requests[0].headers["sha256"] == hashlib.sha256(HISTOGRAMS).hexdigest()
    assert (token_file.parent / "header").stat().st_mode & 0o777 == 0o600


# --- agents in C++ -----------------------------------------------------------------------------------------------------


def compile_cpp(source: Path, program: Path, *options: str) -> Path:
    if shutil.which("g++") is None or not list(Path("/usr/include").glob("**/curl/curl.h")):
        pytest.skip("g++ or libcurl's headers are not installed (Debian: g++ libcurl4-openssl-dev)")
    line = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-O1", str(source), "-o", str(program), *options]
    done = subprocess.run([*line, "-lcurl"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def root_options() -> list[str]:
    """Return the options that compile against CERN ROOT."""
    spec = importlib.util.find_spec("ROOT")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if found := shutil.which("root-config"):
        folder = Path(found).resolve().parent.parent
    if folder is None or not (folder / "include" / "TMemFile.h").exists():
        pytest.skip("CERN ROOT is not installed: pip install root")
    # Not root-config's own answer: it names a folder that the wheel does not have.
    libraries = [f"-L{folder}/lib", f"-Wl,-rpath,{folder}/lib", "-lCore", "-lRIO", "-lHist", "-lMathCore"]
    return ["-isystem", f"{folder}/include", *libraries]


def run_agent(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [str(program), *map(str, arguments)]
    return subprocess.run(line, cwd=program.parent, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent without ROOT."""
    return compile_cpp(AGENT, tmp_path_factory.mktemp("agent") / "dqm_agent")


@pytest.fixture(scope="module")
def root_agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent with ROOT."""
    return compile_cpp(AGENT, tmp_path_factory.mktemp("agent") / "dqm_agent", "-DWITH_ROOT", *root_options())


def test_agent_sends_a_file(agent: Path, real: Server, token_file: Path) -> None:
    sent_as = (real.files, token_file, 300005, "EMC", TIME)
    done = run_agent(agent, *sent_as, DATA / "h1_all.root")
    assert (done.returncode, visible(real.folder)) == (0, {NAME: HISTOGRAMS}), done
    assert "duplicate" in run_agent(agent, *sent_as, DATA / "h1_all.root").stderr
    refused = run_agent(agent, *sent_as, AGENT)
    assert (refused.returncode, refused.stderr.count("dqm_agent: 400")) == (1, 1)
    assert run_agent(agent, *sent_as).returncode == 2


def test_agent_sees_refusal_of_large_body(agent: Path, real: Server, token_file: Path, large: Path) -> None:
    token_file.write_text("wrong")
    done = run_agent(agent, real.files, token_file, 300005, "EMC", TIME, large)
    assert (done.returncode, done.stderr.count("\ndqm_agent")) == (1, 0)
    assert "Received token, but it is invalid!" in done.stderr


@pytest.mark.parametrize("reply", [error(503), b"", http_answer(200, b"Welcome"), error(400, "The body ended early")])
def test_agent_tries_again(
    agent: Path, fake: Callable[..., Fake], token_file: Path, root_file: Path, reply: Reply
) -> None:
    def pretty(request: Received) -> bytes:
        size = len(request.body)
        return http_answer(200, {"status": 200, "size": size, "sha256": ""})

    server = fake(reply, pretty)
    done = run_agent(agent, f"{server.url}{FILES}", token_file, 300005, "EMC", TIME, root_file)
    assert (done.returncode, [request.body for request in server.requests]) == (0, [HISTOGRAMS] * 2), done


def test_agent_sends_histogram_from_memory(root_agent: Path, real: Server, token_file: Path) -> None:
    done = run_agent(root_agent, real.files, token_file, 300005, "EMC", TIME)
    assert done.returncode == 0, done
    assert "Obj name: hPt, Obj IsA() Name: TH1F" in done.stderr
    assert len(visible(real.folder)[NAME]) < 20_000


def test_documented_cpp_fills_a_spool(real: Server, send: Send, spool: Path, tmp_path: Path) -> None:
    options = root_options()
    (example,) = re.findall(r"```cpp\n(.*?)```", SENDING, re.DOTALL)
    source = tmp_path / "spool.cpp"
    source.write_text(adapted(example, {"/var/spool/dqm/": f"{spool}/"}))
    done = run_agent(compile_cpp(source, tmp_path / "spool_agent", *options))
    assert (done.returncode, [path.name for path in spool.iterdir()]) == (0, [f"EMC.300005.{TIME}.root"]), done
    assert send(real.url, "--spool", spool, "--once").status == 0
    assert visible(real.folder).keys() == {NAME}
