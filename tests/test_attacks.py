"""Many hostile connections do not delay an upload. On loopback, bounded in time."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from client import FILES, HEADERS, HISTOGRAMS, Answer, connect, curl, digest, head, post, write_tokens, zeros
from hostile_streams import BLOCK, HOSTILE
from rootfiles import File
from server import Nginx, Server

CONNECTIONS = 300
DIRECTLY, THROUGH_NGINX = 5.0, 1.0  # seconds in which an upload beside them is answered
LARGE = 20 << 20  # bytes, more than the buffers of two kernels
WRONG = {**HEADERS, "token": "wrong"}
HUGE = "Content-Length: 3000000000"

# What each connection sends at first, and whether it then sends a byte a second.
ATTACKS = {
    "silence": (b"", False),
    "heads": (b"POST /rest/api/files HTTP/1.1\r\nHost: dqm.example.org\r\nX: ", True),
    "bodies": (head(FILES, HUGE, **WRONG), True),
    "bodies without an end": (head(FILES, "Transfer-Encoding: chunked", **WRONG), True),
    "expecting bodies": (head(FILES, HUGE, "Expect: 100-continue", **WRONG), True),
    "answers that are not closed": (head(FILES, "Connection: close", method="GET", **HEADERS), False),
    "unread answers": (head("/rest/api/openapi.json", method="GET") * 20, False),
    "unread files": (head(FILES + "?filename={name}", method="GET", **HEADERS) * 2, False),
}


class Attack:
    """Connections that are held for a while, each opened again when it has been closed."""

    def __init__(
        self, connect: Callable[[], socket.socket], first: bytes, dripping: bool, number: int = CONNECTIONS
    ) -> None:
        self.connect, self.first, self.dripping = connect, first, dripping
        self.peers = [self.begin() for _ in range(number)]
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

    def __init__(self, server: Server, base: Path) -> None:
        self.server = server
        self.nginx = Nginx(base / "nginx", {"server 127.0.0.1:8080": f"server 127.0.0.1:{self.server.port}"})
        large = HISTOGRAMS + bytes(4 << 20)  # bytes after the end of a ROOT file are accepted
        self.name = curl(self.server.files, "--data-binary", "@-", send=large).json["filename"]

    def connect(self) -> socket.socket:
        return connect(self.server.port, receive_buffer=2048)

    def connect_to_nginx(self) -> socket.socket:
        context = ssl.create_default_context(cafile=str(self.nginx.certificate))
        return context.wrap_socket(connect(self.nginx.port, receive_buffer=2048), server_hostname="dqm.example.org")

    def upload(self, number: int) -> Answer:
        headers = {**HEADERS, "timeStamp": str(number)}
        return curl(self.server.files, "--data-binary", "@-", send=HISTOGRAMS, headers=headers)

    def upload_through_nginx(self, number: int) -> Answer:
        headers = {**HEADERS, "timeStamp": str(number)}
        # From another address: each has its own 32 places.
        more = ("--data-binary", "@-", "--interface", "127.0.0.9")
        return self.nginx.curl("https://dqm.example.org" + FILES, *more, send=HISTOGRAMS, headers=headers)


@pytest.fixture(scope="module")
def target(shared: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    target = Target(shared, tmp_path_factory.mktemp("target"))
    yield target
    target.nginx.stop()


@contextlib.contextmanager
def attack(
    kind: str, connect: Callable[[], socket.socket], name: str = "", number: int = CONNECTIONS
) -> Iterator[None]:
    """Hold connections of this kind; `name` is the file that they download."""
    first, dripping = ATTACKS[kind]
    begun = Attack(connect, first.replace(b"{name}", name.encode()), dripping, number)
    try:
        yield
    finally:
        begun.stop()


def seconds_of(upload: Callable[[int], Answer], number: int) -> float:
    began = time.monotonic()
    answer = upload(number)
    assert answer.status == 200, answer
    return time.monotonic() - began


@pytest.mark.parametrize("kind", ATTACKS)
def test_uploads_are_answered_beside_slow_connections(target: Target, kind: str) -> None:
    with attack(kind, target.connect, target.name):
        time.sleep(1)  # its requests are a burst of work; what they leave behind is the attack
        assert max(seconds_of(target.upload, number) for number in range(3)) < DIRECTLY
        assert curl(target.server.url + "/rest/api/health", headers={}).status == 200


@pytest.mark.parametrize("kind", ["heads", "bodies", "unread answers"])
def test_uploads_through_nginx_are_answered_too(target: Target, kind: str) -> None:
    with attack(kind, target.connect_to_nginx, number=CONNECTIONS // 3):  # thrice the places of an address
        time.sleep(1)
        # The machine may be busy with something else: most of them count.
        assert sorted(seconds_of(target.upload_through_nginx, number) for number in range(5))[1] < THROUGH_NGINX


def test_an_address_has_32_places_in_nginx(target: Target) -> None:
    sent = head(FILES, "Content-Length: 1000000", **HEADERS)
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


def test_a_stop_beside_slow_connections_is_quick(make_server: Callable[..., Server]) -> None:
    server = make_server()
    with contextlib.ExitStack() as stack:
        for kind in ("heads", "bodies", "unread answers"):
            stack.enter_context(attack(kind, lambda: connect(server.port, receive_buffer=2048)))
        began = time.monotonic()
        server.process.terminate()
        assert server.process.wait(15) == 0
        assert time.monotonic() - began < 15


# --- senders see why they are refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "wrong", "said"),
    [
        ("requests", {"token": "wrong"}, "400"),
        ("requests", {"runNumber": "x"}, "400"),
        ("urllib", {"runNumber": "x"}, "400"),
        # It sends everything before it looks for an answer; docs/deployment.md says so.
        ("urllib", {"token": "wrong"}, "Broken pipe|Connection reset"),
    ],
    ids=str,
)
def test_python_sees_why_a_large_body_is_refused(
    shared: Server, tmp_path: Path, library: str, wrong: dict[str, str], said: str
) -> None:
    if library == "requests":
        pytest.importorskip("requests")
    path = zeros(tmp_path / "zeros", LARGE)
    program = str(Path(__file__).with_name("python_sender.py"))
    fields = [f"{name}: {value}" for name, value in {**HEADERS, **wrong, "Content-Length": str(LARGE)}.items()]
    command = [sys.executable, program, library, shared.files, str(path), *fields]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert re.search(said, (run.stdout or run.stderr).strip().splitlines()[-1])


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
def test_costly_files_delay_only_their_own_sender(make_server: Callable[..., Server], tmp_path: Path) -> None:
    lines = "".join(f"{name} = {digest(name)}\n" for name in ("attacker", "agent"))
    server = make_server(tokens_file=write_tokens(tmp_path / "tokens.ini", f"[tokens]\n{lines}"))
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
