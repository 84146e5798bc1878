"""Many hostile connections do not delay an upload. On loopback, bounded in time."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from client import FILES, HEADERS, HISTOGRAMS, Answer, curl, post, settings
from hostile_streams import BLOCK, HOSTILE
from rootfiles import File
from server import Nginx, Server

CONNECTIONS = 300
DIRECTLY, THROUGH_NGINX = 5.0, 1.0  # seconds in which an upload beside them is answered
LARGE = 200 << 20  # bytes
WRONG = {**HEADERS, "token": "wrong"}


def head(method: str = "POST", path: str = FILES, **fields: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: dqm.example.org", *(f"{name}: {fields[name]}" for name in fields)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


# What each connection sends at first, and whether it then sends a byte a second.
ATTACKS = {
    "heads": (b"POST /rest/api/files HTTP/1.1\r\nHost: dqm.example.org\r\nX: ", True),
    "bodies": (head(**{**WRONG, "Content-Length": "3000000000"}), True),
    "bodies without an end": (head(**{**WRONG, "Transfer-Encoding": "chunked"}), True),
    "expecting bodies": (head(**{**WRONG, "Content-Length": "3000000000", "Expect": "100-continue"}), True),
    "unread answers": (head("GET", "/rest/api/openapi.json") * 20, False),
    "unread files": (head("GET", FILES + "?filename={name}", token=HEADERS["token"]) * 2, False),
}


class Attack:
    """Connections that are held for a while, each opened again when it has been closed."""

    def __init__(self, connect: Callable[[], socket.socket], first: bytes, dripping: bool) -> None:
        self.connect, self.first, self.dripping = connect, first, dripping
        self.peers = [self.begin() for _ in range(CONNECTIONS)]
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.drip)
        self.thread.start()

    def begin(self) -> socket.socket:
        peer = self.connect()
        with contextlib.suppress(OSError):
            peer.sendall(self.first)
        return peer

    def drip(self) -> None:
        while not self.over.wait(1):
            for number, peer in enumerate(self.peers):
                try:
                    if self.dripping:
                        peer.send(b"x")
                except OSError:
                    peer.close()
                    with contextlib.suppress(OSError):
                        self.peers[number] = self.begin()

    def stop(self) -> None:
        self.over.set()
        self.thread.join()
        for peer in self.peers:
            peer.close()


class Target:
    """A receiver with the shipped settings, alone or with the shipped nginx before it."""

    def __init__(self, base: Path) -> None:
        self.server = Server(settings(base / "data"), base / "gunicorn.log", ())
        self.nginx = Nginx(base / "nginx", {"server 127.0.0.1:8080": f"server 127.0.0.1:{self.server.port}"})
        large = HISTOGRAMS + bytes(4 << 20)  # bytes after the end of a ROOT file are accepted
        self.name = curl(self.server.files, "--data-binary", "@-", send=large).json["filename"]

    def connect(self) -> socket.socket:
        return connected(self.server.port)

    def connect_to_nginx(self) -> socket.socket:
        context = ssl.create_default_context(cafile=str(self.nginx.certificate))
        return context.wrap_socket(connected(self.nginx.port), server_hostname="dqm.example.org")

    def upload(self, number: int) -> Answer:
        headers = {**HEADERS, "timeStamp": str(number)}
        return curl(self.server.files, "--data-binary", "@-", send=HISTOGRAMS, headers=headers)

    def upload_through_nginx(self, number: int) -> Answer:
        headers = {**HEADERS, "timeStamp": str(number)}
        url = "https://dqm.example.org" + FILES
        # From another address: each has its own 32 places.
        more = ("--interface", "127.0.0.9")
        return self.nginx.curl(url, "--data-binary", "@-", *more, send=HISTOGRAMS, headers=headers)


def connected(port: int) -> socket.socket:
    peer = socket.socket()
    peer.settimeout(10)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    try:
        peer.connect(("127.0.0.1", port))
    except OSError:
        peer.close()
        raise
    return peer


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    target = Target(tmp_path_factory.mktemp("target"))
    yield target
    target.nginx.stop()
    target.server.stop()


@pytest.fixture
def begin_attack(target: Target) -> Iterator[Callable[[str, Callable[[], socket.socket]], None]]:
    attacks: list[Attack] = []

    def begin(kind: str, connect: Callable[[], socket.socket]) -> None:
        first, dripping = ATTACKS[kind]
        attacks.append(Attack(connect, first.replace(b"{name}", target.name.encode()), dripping))

    yield begin
    for attack in attacks:
        attack.stop()


def seconds_of(upload: Callable[[int], Answer], number: int) -> float:
    began = time.monotonic()
    answer = upload(number)
    assert answer.status == 200, answer
    return time.monotonic() - began


@pytest.mark.parametrize("kind", ATTACKS)
def test_uploads_are_answered_beside_slow_connections(
    target: Target, begin_attack: Callable[..., None], kind: str
) -> None:
    begin_attack(kind, target.connect)
    time.sleep(1)  # its requests are a burst of work; what they leave behind is the attack
    assert max(seconds_of(target.upload, number) for number in range(3)) < DIRECTLY
    assert curl(target.server.url + "/rest/api/health", headers={}).status == 200


@pytest.mark.parametrize("kind", ["heads", "bodies", "unread answers"])
def test_uploads_through_nginx_are_answered_beside_slow_connections(
    target: Target, begin_attack: Callable[..., None], kind: str
) -> None:
    begin_attack(kind, target.connect_to_nginx)
    time.sleep(1)
    # The machine may be busy with something else: most of them count.
    assert sorted(seconds_of(target.upload_through_nginx, number) for number in range(5))[1] < THROUGH_NGINX


def test_an_address_has_32_places_in_nginx(target: Target) -> None:
    sent = head(**{**HEADERS, "Content-Length": "1000000"})
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            stack.enter_context(target.connect_to_nginx()).sendall(sent)
        refused = stack.enter_context(target.connect_to_nginx())
        refused.sendall(sent)
        answer = b""
        while b"}" not in answer:
            piece = refused.recv(1 << 16)
            assert piece, answer
            answer += piece
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"application/json" in answer
    assert b"more than 32 requests" in answer


def test_a_stop_beside_slow_connections_is_quick(tmp_path: Path) -> None:
    server = Server(settings(tmp_path / "data"), tmp_path / "gunicorn.log", ())
    attacks = [Attack(lambda: connected(server.port), *ATTACKS[kind]) for kind in ("heads", "bodies", "unread answers")]
    try:
        began = time.monotonic()
        server.process.terminate()
        assert server.process.wait(15) == 0
        assert time.monotonic() - began < 15
    finally:
        for attack in attacks:
            attack.stop()
        server.stop()


# --- senders see why they are refused -------------------------------------------------------------------------------------

URLLIB = """
import sys, urllib.request, urllib.error
url, path, *headers = sys.argv[1:]
request = urllib.request.Request(url, open(path, "rb"), dict(header.split(": ", 1) for header in headers))
try:
    print(urllib.request.urlopen(request).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""

REQUESTS = """
import sys, requests
url, path, *headers = sys.argv[1:]
print(requests.post(url, data=open(path, "rb"), headers=dict(header.split(": ", 1) for header in headers)).status_code)
"""


@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zeros") / "zeros"
    with path.open("wb") as file:
        file.truncate(LARGE)
    return path


def run_python(program: str, url: str, path: Path, **headers: str) -> str:
    fields = [f"{name}: {value}" for name, value in {**headers, "Content-Length": str(LARGE)}.items()]
    command = [sys.executable, "-c", program, url, str(path), *fields]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return (run.stdout or run.stderr.strip().splitlines()[-1]).strip()


@pytest.mark.parametrize("expect", ["Expect:", "Expect: 100-continue"])
@pytest.mark.parametrize("changes", [{"token": "wrong"}, {"runNumber": "x"}], ids=["token", "header"])
def test_curl_sees_why_a_large_body_is_refused(
    target: Target, zeros: Path, expect: str, changes: dict[str, str]
) -> None:
    answer = curl(target.server.files, "-T", str(zeros), "-X", "POST", "-H", expect, headers={**HEADERS, **changes})
    assert (answer.status, answer.curl, answer.json["status"]) == (400, 0, 400)


@pytest.mark.parametrize("program", [URLLIB, REQUESTS], ids=["urllib", "requests"])
def test_python_sees_why_a_large_body_is_refused(target: Target, zeros: Path, program: str) -> None:
    if program == REQUESTS:
        pytest.importorskip("requests")
    assert run_python(program, target.server.files, zeros, **{**HEADERS, "runNumber": "x"}) == "400"


def test_requests_sees_that_its_token_is_wrong(target: Target, zeros: Path) -> None:
    pytest.importorskip("requests")
    assert run_python(REQUESTS, target.server.files, zeros, **WRONG) == "400"


def test_urllib_with_a_wrong_token_breaks_off(target: Target, zeros: Path) -> None:
    """It sends everything before it looks for an answer; docs/deployment.md says so."""
    said = run_python(URLLIB, target.server.files, zeros, **WRONG)
    assert "Broken pipe" in said or "Connection reset" in said


def test_a_huge_body_is_refused_before_it_is_sent(target: Target) -> None:
    with connected(target.server.port) as peer:
        peer.sendall(head(**{**WRONG, "Content-Length": "3000000000", "Expect": "100-continue"}))
        assert peer.recv(1 << 16).startswith(b"HTTP/1.1 400 ")


# --- files that cost seconds -------------------------------------------------------------------------------------------


def hostile_file() -> bytes:
    """Return a small file whose check costs seconds: Zstandard blocks with endless sequences of three bytes."""
    one, size = HOSTILE["ZS"](BLOCK - 1000)
    count = (1 << 30) // size  # an object of 1 GiB, the most that is allowed
    file = File()
    for name in (b"h1", b"h2"):
        file.add(b"TH1F", name, one * count, object_size=size * count)
    return file.close()


@pytest.mark.slow
def test_costly_files_delay_only_their_own_sender(tmp_path: Path) -> None:
    tokens = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("attacker", "agent")}
    (tmp_path / "tokens.ini").write_text("[tokens]\n" + "".join(f"{name} = {tokens[name]}\n" for name in tokens))
    environ = settings(tmp_path / "data", tokens_file=str(tmp_path / "tokens.ini"))
    server = Server(environ, tmp_path / "log", ())
    costly, over = hostile_file(), threading.Event()

    def attack(number: int) -> None:
        while not over.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                post(server.port, costly, {**HEADERS, "token": "attacker", "timeStamp": str(number)})

    threads = [threading.Thread(target=attack, args=(number,)) for number in range(24)]
    try:
        for thread in threads:
            thread.start()
        time.sleep(2)
        for number in range(3):
            began = time.monotonic()
            headers = {**HEADERS, "token": "agent", "timeStamp": str(1000 + number)}
            assert post(server.port, HISTOGRAMS, headers).status == 200
            assert time.monotonic() - began < 10
    finally:
        over.set()
        server.kill()  # so that no thread waits for its check
        for thread in threads:
            thread.join()
