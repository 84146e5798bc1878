"""Requests as no good sender makes them: malformed, cut, slow. Each gets the documented answer and harms no other."""

from __future__ import annotations

import http.client
import io
import json
import os
import random
import re
import selectors
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from wsgiref.types import WSGIApplication

import pytest
from client import (
    FILES,
    HEADERS,
    HISTOGRAMS,
    NAME,
    PROFILES,
    ROUNDS,
    SEED,
    TOKEN,
    curl,
    post,
    settings,
    visible,
    wait_until,
)
from conftest import LONG_DRIP
from faults import assert_nothing_left, name_of, uploads_in_progress
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from server import Server
from werkzeug.test import Client, EnvironBuilder, run_wsgi_app

import receiver

EXAMPLES = 60 * ROUNDS
EXPECTED = {200, 206, 304, 400, 403, 404, 405, 408, 411, 412, 413, 414, 415, 416, 417, 431, 501}

few = hypothesis_settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def app(folder: Path, caplog: pytest.LogCaptureFixture) -> WSGIApplication:
    caplog.set_level("WARNING")
    application: WSGIApplication = receiver.create_app(settings(folder, max_file_size="20000"))
    return application


def check_answer(status: int, content_type: str, body: bytes, method: str = "GET") -> None:
    """The answer is of the documented form."""
    assert status in EXPECTED, (status, body)
    if method == "HEAD" or status == 304:
        assert body == b""
    elif status >= 400:
        assert content_type == "application/json", content_type
        answer = json.loads(body)
        assert answer["status"] == status and answer["received"] is None
        assert isinstance(answer["message"], str) and answer["message"]
        assert set(answer) <= {"status", "message", "received", "reason"}
        assert TOKEN not in answer["message"]
    elif content_type == "application/json":
        json.loads(body)


def call(app: WSGIApplication, environ: dict[str, Any]) -> int:
    """Call the application as a server would and check its answer."""
    chunks, line, headers = run_wsgi_app(app, environ)
    body = b"".join(chunks)
    close = getattr(chunks, "close", None)
    if close:
        close()
    status = int(line.split()[0])
    check_answer(status, headers.get("Content-Type", ""), body, environ["REQUEST_METHOD"])
    return status


def environ_of(method: str, path: str, query: str, headers: dict[str, str], body: bytes) -> dict[str, Any]:
    """Build the environ; path and headers as a server hands them on, their bytes as latin-1."""
    builder = EnvironBuilder(method="GET", input_stream=io.BytesIO(body))
    environ = builder.get_environ()
    builder.close()
    environ.update(REQUEST_METHOD=method, PATH_INFO=path, QUERY_STRING=query, CONTENT_LENGTH=str(len(body)))
    for name, value in headers.items():
        key = name.upper().replace("-", "_")
        environ[key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"] = value
    return environ


latin = st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=40)
numbers = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(
        ["", " 1", "1 ", "+1", "1e3", "0x1", "1_000", "²", "\u0661".encode().decode("latin-1"), "NaN", "1\n"]
    ),
)
names = st.one_of(
    latin, st.text("A-Za.z_/\\% \0", max_size=100), st.sampled_from(["..", ".receipts", "a" * 300, "a.b"])
)
paths = st.one_of(
    latin.map(lambda text: "/" + text),
    latin.map(lambda text: f"{FILES}/{text}"),
    latin.map(lambda text: f"/rest/api/runs/{text}"),
    numbers.map(lambda text: f"/rest/api/runs/{text}"),
    st.sampled_from(
        [FILES, FILES + "/", "//", "", "*", FILES * 2, "/rest/api/../api/files", "/rest/api/runs", "/rest/api/health"]
    ),
)
queries = st.one_of(
    latin,
    st.lists(st.tuples(st.sampled_from(["filename", "runNumber", "amoreAgent", "x"]), latin), max_size=4).map(
        lambda pairs: "&".join(f"{name}={value}" for name, value in pairs)
    ),
    latin.map(lambda text: "filename=" + "".join(f"%{ord(character):02x}" for character in text)),
)
conditions = st.fixed_dictionaries(
    {},
    optional={
        "Range": st.one_of(latin, st.text("bytes=0123456789-, ", max_size=30).map(lambda text: "bytes=" + text)),
        "If-Range": latin,
        "If-Match": latin,
        "If-None-Match": latin,
        "If-Modified-Since": st.one_of(latin, st.just("Thu, 01 Jan 99999 00:00:00 GMT")),
        "If-Unmodified-Since": latin,
        "Want-Repr-Digest": st.one_of(latin, st.just("sha-256=1, x=")),
        "Accept": latin,
        "Cookie": latin,
        "Host": latin,
        "Authorization": latin,
        "X-Forwarded-For": latin,
    },
)
methods = st.sampled_from(
    ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get", "", "Ä"]
)


@seed(SEED)
@few
@given(method=methods, path=paths, query=queries, headers=conditions, token=st.one_of(st.just(TOKEN), latin))
def test_any_path_and_query_gets_a_documented_answer(
    app: WSGIApplication, folder: Path, method: str, path: str, query: str, headers: dict[str, str], token: str
) -> None:
    call(app, environ_of(method, path, query, {**headers, "token": token}, b""))
    assert visible(folder) == {}


@seed(SEED)
@few
@given(method=st.sampled_from(["GET", "HEAD"]), query=st.booleans(), headers=conditions)
def test_any_range_and_condition_is_answered(
    app: WSGIApplication, folder: Path, method: str, query: bool, headers: dict[str, str]
) -> None:
    name = "EMChistos_1_DQM_2015_11_24_18_04_10.root"
    (folder / name).write_bytes(HISTOGRAMS)
    path, asked = (FILES, f"filename={name}") if query else (f"{FILES}/{name}", "")
    assert call(app, environ_of(method, path, asked, {**headers, "token": TOKEN}, b"")) in (200, 206, 304, 412, 416)


@seed(SEED)
@few
@given(
    headers=st.fixed_dictionaries(
        {"token": st.one_of(st.just(TOKEN), st.just(TOKEN), latin)},
        optional={
            "runNumber": st.one_of(st.just("123"), numbers, latin),
            "timeStamp": st.one_of(st.just("234"), numbers, latin),
            "amoreAgent": st.one_of(st.just("EMC"), names),
            "dataStatus": st.one_of(st.just("1"), numbers, latin),
            "sha256": st.one_of(latin, st.text("0123456789abcdefABCDEF", min_size=64, max_size=64)),
            "Content-Type": st.one_of(
                latin, st.sampled_from(["multipart/form-data", "multipart/form-data; boundary="])
            ),
            "Content-Length": st.one_of(numbers, latin),
        },
    ),
    body=st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda end: HISTOGRAMS[:3000] + end)),
)
def test_any_upload_headers_get_a_documented_answer(
    app: WSGIApplication, folder: Path, headers: dict[str, str], body: bytes
) -> None:
    assert call(app, environ_of("POST", FILES, "", headers, body)) in (400, 411, 413, 415)
    assert visible(folder) == {}
    assert_nothing_left(folder)


part_headers = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from(
            [
                b'Content-Disposition: form-data; name="file"; filename="x.root"',
                b'Content-Disposition: form-data; name="file"',
                b'Content-Disposition: form-data; name="other"; filename="../../etc/passwd"',
                b"Content-Disposition: form-data; name=file; filename=\x00",
                b"Content-Disposition: form-data; name*=utf-8''file; filename*=utf-9''%ff",
                b"Content-Disposition: attachment",
                b"Content-Disposition:",
                b"Content-Type: text/plain; charset=utf-16",
                b"Content-Type: text/plain; charset=nothing",
                b"Content-Transfer-Encoding: base64",
                b"Content-Length: 99999999",
            ]
        ),
    ),
    max_size=4,
).map(b"\r\n".join)
parts = st.lists(st.tuples(part_headers, st.binary(max_size=100)), max_size=20)
ends = st.sampled_from(
    [b"--b--\r\n", b"--b--", b"", b"--b", b"--b-", b"--b\r\n", b"--b--\r\nepilogue", b"\r\n--b--\r\n" * 3]
)


@seed(SEED)
@few
@given(
    parts=parts,
    end=ends,
    preamble=st.binary(max_size=30),
    boundary=st.sampled_from(["b", '"b"', "bb", "", "b; x=y", "ä"]),
)
def test_any_form_gets_a_documented_answer(
    app: WSGIApplication, folder: Path, parts: list[tuple[bytes, bytes]], end: bytes, preamble: bytes, boundary: str
) -> None:
    body = preamble + b"".join(b"--b\r\n%b\r\n\r\n%b\r\n" % part for part in parts) + end
    headers = {**HEADERS, "Content-Type": f"multipart/form-data; boundary={boundary}"}
    assert call(app, environ_of("POST", FILES, "", headers, body)) in (400, 411, 413, 415)
    assert visible(folder) == {}
    assert_nothing_left(folder)


def test_unexpected_error_is_a_500_that_tells_nothing(
    app: WSGIApplication, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_ = os.open

    def fail(path: Any, *arguments: Any, **more: Any) -> int:
        if str(path).endswith("forged"):
            raise RuntimeError("secret of the house")
        return open_(path, *arguments, **more)

    monkeypatch.setattr(os, "open", fail)
    response = Client(app).get(f"{FILES}/x%0aforged", headers=HEADERS)
    assert response.status_code == 500
    assert response.json is not None and response.json["received"] is None
    assert "secret" not in response.text and "RuntimeError" not in response.text
    assert "secret of the house" in caplog.text
    assert not re.search(r"^forged", caplog.text, re.MULTILINE), "a request can forge a line of the log"


# --- mutants of a request, to a real server -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    base = tmp_path_factory.mktemp("requests")
    server = Server(settings(base / "data", max_file_size="20000"), base / "gunicorn.log", ())
    yield server, base / "data"
    server.stop()


GOOD = (
    f"POST {FILES} HTTP/1.1\r\nHost: localhost\r\n"
    + "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    + "Content-Length: 200\r\n\r\n"
).encode() + HISTOGRAMS[:200]

SPECIAL = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b":",
    b"%",
    b"/",
    b"..",
    b"\xff\xfe",
    b"\t",
    b"HTTP/9.9",
    b"Transfer-Encoding: chunked\r\n",
    b"Content-Length: 7\r\n",
    b"Expect: 100-continue\r\n",
    b"Expect: x\r\n",
    b"Upgrade: h2c\r\n",
    b" folded\r\n",
    b"token: x\r\n",
    b"X-Forwarded-Proto: https\r\n",
    b"x" * 9000,
]


def mutant(chance: random.Random) -> bytes:
    """Return a good request of an invalid file with some things wrong about it."""
    request = bytearray(GOOD)
    end_of_head = request.index(b"\r\n\r\n") + 4
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(min(end_of_head, len(request)))
        kind = chance.randrange(6)
        if kind == 0:
            request[at] = chance.randrange(256)
        elif kind == 1:
            del request[at : at + chance.randint(1, 30)]
        elif kind == 2:
            request[at:at] = chance.choice(SPECIAL)
        elif kind == 3:
            start = chance.randrange(end_of_head)
            request[at:at] = request[start : start + chance.randint(1, 60)]
        elif kind == 4:
            request[at:at] = chance.randbytes(chance.randint(1, 40))
        else:
            lines = bytes(request).split(b"\r\n")
            lines.insert(chance.randrange(len(lines)), chance.choice(SPECIAL).strip())
            request = bytearray(b"\r\n".join(lines))
    return bytes(request)


def exchange(port: int, request: bytes) -> bytes:
    """Send bytes and the end of them, and return all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as peer:
        answer = b""
        try:
            peer.sendall(request)
            peer.shutdown(socket.SHUT_WR)
            while piece := peer.recv(65536):
                answer += piece
        except (ConnectionResetError, BrokenPipeError):
            pass  # what it did not want to read
        return answer


def answers_in(data: bytes) -> Iterator[tuple[int, str, bytes]]:
    """Parse the answers of a connection; those of 1xx are not answers."""
    while data:
        head, separator, rest = data.partition(b"\r\n\r\n")
        assert separator, data
        fields = http.client.parse_headers(io.BytesIO(head.partition(b"\r\n")[2] + b"\r\n\r\n"))
        match = re.match(rb"HTTP/1\.[01] (\d{3})", head)
        assert match, data
        status, length = int(match[1]), int(fields.get("Content-Length") or 0)
        if status >= 200:
            assert len(rest) >= length
            yield status, fields.get("Content-Type", ""), rest[:length]
            rest = rest[length:]
        data = rest


def attack(server: Server, folder: Path, count: int) -> None:
    workers = server.workers()
    chance = random.Random(SEED)
    answered = 0
    for number in range(count):
        request = mutant(chance)
        begin = time.monotonic()
        data = exchange(server.port, request)
        took = time.monotonic() - begin
        assert took < 10, f"mutant {number} took {took:.1f} s: {request!r}"
        try:
            for status, content_type, body in answers_in(data):
                answered += 1
                # A HEAD or an HTTP/0.9 request cannot come of a mutant but by a miracle.
                check_answer(status, content_type, body)
        except AssertionError as error:
            raise AssertionError(f"mutant {number}: {request!r} was answered {data!r}") from error
    print(f"{count} mutants of a request: {answered} answers, as documented")
    assert answered > count * 0.8
    assert visible(folder) == {}
    assert set(workers) <= set(server.workers())
    log = server.log.read_text()
    assert "Traceback" not in log and "WORKER TIMEOUT" not in log, log[-5000:]
    assert_nothing_left(folder)
    assert post(server.port, HISTOGRAMS).status == 200
    for path in folder.glob("*.root"):
        path.unlink()


def test_mutants_get_a_documented_answer(shared: tuple[Server, Path]) -> None:
    attack(*shared, count=200 * ROUNDS)


@pytest.mark.slow
def test_many_mutants_get_a_documented_answer(shared: tuple[Server, Path]) -> None:
    attack(*shared, count=20_000)


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 200 + b"\r\n",
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"y" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\ntoken: a\r\n b\r\n\r\n",
        b"GET / HTTP/7.7\r\n\r\n",
        b"GET\r\n\r\n",
        b"G\x00T / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nExpect: the unexpected\r\nContent-Length: 0\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\n\r\n",
        b"GET * HTTP/1.1\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\n\r\n",
        b"\r\n" * 100 + b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=lambda request: repr(request[:40]),
)
def test_other_protocols_are_refused_in_json(shared: tuple[Server, Path], request_: bytes) -> None:
    server, _ = shared
    workers = server.workers()
    answers = list(answers_in(exchange(server.port, request_)))
    assert answers, "no answer"
    for status, content_type, body in answers:
        assert 400 <= status < 600 and status != 500
        check_answer(status, content_type, body)
    assert set(workers) <= set(server.workers())


DRIPS = 100
QUICK = 30  # seconds, on the slowest machine; who waits for a peer that does nothing waits for 120


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server with the shipped gunicorn.conf.py that all tests here are rude to, and its data folder."""
    base = tmp_path_factory.mktemp("senders")
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    server = Server(settings(base / "data", max_file_size=str(32 << 20)), base / "gunicorn.log", ())
    yield server, base / "data"
    server.stop()


@pytest.fixture
def rude(patient: tuple[Server, Path]) -> Iterator[tuple[Server, Path]]:
    """The shared server; whatever a test does, it has its workers, its folder and its manners afterwards."""
    server, folder = patient
    # A test before this one may have left whole uploads behind whose senders did not wait for the answer.
    wait_until(lambda: uploads_in_progress(folder) == [], 60)
    for path in folder.glob("*.root"):
        path.unlink()
    workers = server.workers()
    yield server, folder
    assert set(workers) <= set(server.workers()), f"a worker was lost:\n{server.log.read_text()[-3000:]}"
    assert set(visible(folder)) <= {NAME} | {name_of(stamp) for stamp in range(1000, 1300)}
    begin = time.monotonic()
    assert post(server.port, PROFILES, {**HEADERS, "timeStamp": "1000"}).status == 200
    assert time.monotonic() - begin < QUICK
    assert "Traceback" not in server.log.read_text()


def head(length: int | None = None, *more: str, method: str = "POST", path: str = FILES, stamp: int = 234) -> bytes:
    """Return the head of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name}: {value}" for name, value in {**HEADERS, "timeStamp": str(stamp)}.items()]
    lines += [f"Content-Length: {length}"] if length is not None else []
    return "\r\n".join([*lines, *more, "", ""]).encode()


def connect(port: int, receive_buffer: int | None = None) -> socket.socket:
    peer = socket.socket()
    if receive_buffer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    peer.settimeout(30)
    peer.connect(("127.0.0.1", port))
    return peer


def read_answer(peer: socket.socket) -> tuple[int, Any]:
    response = http.client.HTTPResponse(peer)
    response.begin()
    return response.status, json.loads(response.read())


def check_that_ten_others_are_served(server: Server, peers: Sequence[socket.socket], begin: float) -> None:
    """Have ten uploads done, soon after `begin`, beside connections that are closed then."""
    replies = [post(server.port, PROFILES, {**HEADERS, "timeStamp": str(stamp)}) for stamp in range(1010, 1020)]
    took = time.monotonic() - begin
    for peer in peers:
        peer.close()
    assert [reply.status for reply in replies] == [200] * 10
    assert took < QUICK, f"what is to be quick beside {len(peers)} others took {took:.1f} s"


# --- slow --------------------------------------------------------------------------------------------------------------


def test_slow_senders_keep_no_upload_waiting(
    rude: tuple[Server, Path],
) -> None:
    server, folder = rude
    seconds = 60  # that the drips would last
    drips = [connect(server.port) for _ in range(DRIPS)]
    over = threading.Event()

    def drip() -> None:
        for stamp, peer in enumerate(drips, 1100):
            peer.sendall(head(len(HISTOGRAMS), "Connection: close", stamp=stamp) + HISTOGRAMS[:-seconds])
        for at in range(len(HISTOGRAMS) - seconds, len(HISTOGRAMS)):
            over.wait(1)
            for peer in drips:
                peer.sendall(HISTOGRAMS[at : at + 1])

    dripping = threading.Thread(target=drip)
    dripping.start()
    wait_until(lambda: len(uploads_in_progress(folder)) == DRIPS, 60)
    begin = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        headers = [{**HEADERS, "timeStamp": str(stamp)} for stamp in range(1010, 1030)]
        replies = list(pool.map(lambda fields: post(server.port, PROFILES, fields), headers))
    took = time.monotonic() - begin
    still_dripping = dripping.is_alive()
    over.set()
    dripping.join(60)
    answers = [read_answer(peer) for peer in drips]
    for peer in drips:
        peer.close()
    print(f"20 uploads beside {DRIPS} slow ones took {took:.2f} s")
    assert [reply.status for reply in replies] == [200] * 20
    assert still_dripping, "the uploads did not run beside the slow ones"
    assert [status for status, _ in answers] == [200] * DRIPS
    assert len(visible(folder)) == DRIPS + 20


def test_upload_of_45_seconds_ends_in_200(long_drip: tuple[subprocess.Popen[str], Path]) -> None:
    sender, folder = long_drip
    out, _ = sender.communicate(timeout=LONG_DRIP + 30)
    seconds, _, answer = out.partition(" ")
    assert answer == "HTTP/1.1 200 OK\n"
    assert float(seconds) >= LONG_DRIP
    assert visible(folder) == {NAME: HISTOGRAMS}


@pytest.mark.slow
def test_hundred_uploads_of_45_seconds_end_in_200(rude: tuple[Server, Path]) -> None:
    server, folder = rude
    drips = [connect(server.port) for _ in range(DRIPS)]
    for stamp, peer in enumerate(drips, 1100):
        peer.settimeout(60)
        peer.sendall(head(len(HISTOGRAMS), "Connection: close", stamp=stamp) + HISTOGRAMS[:-LONG_DRIP])
    for at in range(len(HISTOGRAMS) - LONG_DRIP, len(HISTOGRAMS)):
        time.sleep(1)
        for peer in drips:
            peer.sendall(HISTOGRAMS[at : at + 1])
    assert [read_answer(peer)[0] for peer in drips] == [200] * DRIPS
    for peer in drips:
        peer.close()
    assert len(visible(folder)) == DRIPS


def test_unclosed_connections_keep_no_upload_waiting(rude: tuple[Server, Path]) -> None:
    server, _ = rude
    begin = time.monotonic()
    peers = [connect(server.port) for _ in range(40)]
    for peer in peers:
        peer.sendall(head(None, "Connection: close", method="GET"))
    for peer in peers:
        assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")
    check_that_ten_others_are_served(server, peers, begin)


def test_silent_connections_keep_no_upload_waiting(rude: tuple[Server, Path]) -> None:
    server, _ = rude
    peers = [connect(server.port) for _ in range(100)]
    for peer in peers[::2]:
        peer.sendall(b"POST /rest/api/fi")
    check_that_ten_others_are_served(server, peers, time.monotonic())


# --- cut ---------------------------------------------------------------------------------------------------------------

FORM = b'--x\r\nContent-Disposition: form-data; name="file"; filename="x.root"\r\n\r\n' + HISTOGRAMS + b"\r\n--x--\r\n"
REQUESTS = {
    "bare": head(len(HISTOGRAMS)) + HISTOGRAMS,
    "form": head(len(FORM), "Content-Type: multipart/form-data; boundary=x") + FORM,
    "chunked": head(None, "Transfer-Encoding: chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(HISTOGRAMS), HISTOGRAMS),
}


@pytest.mark.parametrize("how", ["closed", "reset", "half-closed"])
@pytest.mark.parametrize("kind", REQUESTS)
def test_connection_cut_at_any_stage_leaves_nothing(rude: tuple[Server, Path], kind: str, how: str) -> None:
    server, folder = rude
    request = REQUESTS[kind]
    end_of_head = request.index(b"\r\n\r\n") + 4
    # In the request line, in the headers, about their end, and all through the body up to its last byte.
    stages = [1, 20, end_of_head // 2, end_of_head - 2, end_of_head, end_of_head + 1, end_of_head + 80]
    stages += [end_of_head + 3000, len(request) - 60, len(request) - 5, len(request) - 2, len(request) - 1]
    for stage in stages:
        peer = connect(server.port)
        peer.sendall(request[:stage])
        if how == "half-closed":
            peer.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := peer.recv(65536):
                answer += piece
            assert not answer or answer.startswith(b"HTTP/1.1 400 "), (stage, answer)
        elif how == "reset":
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
    wait_until(lambda: uploads_in_progress(folder) == [], 60)
    there = visible(folder)
    # The end of a form behind its file, and the last line of a chunked body, may be taken for granted.
    assert there in ({}, {NAME: HISTOGRAMS})
    if kind == "bare":
        assert there == {}


def test_sender_that_leaves_stores_all_or_nothing(
    rude: tuple[Server, Path],
) -> None:
    server, folder = rude
    for stamp in range(1100, 1130):
        peer = connect(server.port)
        peer.sendall(head(len(HISTOGRAMS), stamp=stamp) + HISTOGRAMS)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
    wait_until(lambda: uploads_in_progress(folder) == [], 60)
    assert set(visible(folder).values()) <= {HISTOGRAMS}


# --- bodies of another length than announced ---------------------------------------------------------------------------


def test_body_shorter_than_announced_is_refused(rude: tuple[Server, Path]) -> None:
    server, folder = rude
    with connect(server.port) as peer:
        peer.sendall(head(len(HISTOGRAMS) + 1) + HISTOGRAMS)
        peer.shutdown(socket.SHUT_WR)
        status, answer = read_answer(peer)
    assert (status, answer["received"]) == (400, None)
    assert NAME not in visible(folder)


def test_bytes_behind_a_body_are_ignored(rude: tuple[Server, Path]) -> None:
    server, folder = rude
    with connect(server.port) as peer:
        peer.sendall(head(len(HISTOGRAMS)) + HISTOGRAMS + b"\x00\xff and more\r\n\r\n")
        status, answer = read_answer(peer)
    assert (status, answer["size"]) == (200, len(HISTOGRAMS))
    assert visible(folder) == {NAME: HISTOGRAMS}


def test_body_longer_than_announced_is_refused(rude: tuple[Server, Path]) -> None:
    server, folder = rude
    with connect(server.port) as peer:
        peer.sendall(head(len(HISTOGRAMS) - 100) + HISTOGRAMS)
        status, answer = read_answer(peer)
    assert (status, answer["received"]) == (400, None)
    assert "reason" in answer
    assert NAME not in visible(folder)


@pytest.mark.parametrize(
    "length", ["-1", "+5462", "5462, 5462", "5_462", "0x1556", " ", "5462 1", "99999999999999999999"]
)
def test_malformed_content_length_is_refused(rude: tuple[Server, Path], length: str) -> None:
    server, folder = rude
    with connect(server.port) as peer:
        peer.sendall(head(None, f"Content-Length: {length}") + HISTOGRAMS)
        peer.shutdown(socket.SHUT_WR)
        status, answer = read_answer(peer)
    assert status in (400, 413)
    assert (answer["status"], answer["received"]) == (status, None)
    assert NAME not in visible(folder)


@pytest.mark.parametrize("size", [1, 7, 1000, 100_000])
def test_chunks_of_any_size_are_stored(rude: tuple[Server, Path], size: int) -> None:
    server, folder = rude
    pieces = [HISTOGRAMS[at : at + size] for at in range(0, len(HISTOGRAMS), size)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    with connect(server.port) as peer:
        peer.sendall(head(None, "Transfer-Encoding: chunked") + body + b"0\r\n\r\n")
        status, answer = read_answer(peer)
    assert (status, answer["size"]) == (200, len(HISTOGRAMS))
    assert visible(folder) == {NAME: HISTOGRAMS}


CHUNK = b"%x\r\n%b\r\n" % (len(HISTOGRAMS), HISTOGRAMS)


@pytest.mark.parametrize(
    "body",
    [
        b"zz\r\n" + CHUNK + b"0\r\n\r\n",
        CHUNK + b"zz\r\n\r\n",
        CHUNK + b"-1\r\n\r\n",
        CHUNK.replace(b"\r\nroot", b"root", 1) + b"0\r\n\r\n",
        CHUNK[:-2] + b"XX0\r\n\r\n",
        b"ffffffffffffffff\r\n" + HISTOGRAMS,
        b"0\r\n\r\n",
    ],
)
def test_malformed_chunks_are_refused(rude: tuple[Server, Path], body: bytes) -> None:
    server, folder = rude
    with connect(server.port) as peer:
        peer.sendall(head(None, "Transfer-Encoding: chunked") + body)
        peer.shutdown(socket.SHUT_WR)
        status, answer = read_answer(peer)
    assert (status, answer["status"], answer["received"]) == (400, 400, None)
    assert NAME not in visible(folder)


def test_chunked_body_above_the_limit_is_refused(rude: tuple[Server, Path]) -> None:
    server, folder = rude
    chunk = bytes(1 << 20)
    with connect(server.port) as peer:
        peer.sendall(head(None, "Transfer-Encoding: chunked"))
        for _ in range(33):
            peer.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        peer.sendall(b"0\r\n\r\n")
        status, answer = read_answer(peer)
    assert (status, answer["received"]) == (413, None)
    assert str(32 << 20) in answer["message"]
    assert NAME not in visible(folder)


# --- Expect: 100-continue ----------------------------------------------------------------------------------------------


def test_100_continue_answers_a_sender_that_waits(rude: tuple[Server, Path]) -> None:
    server, folder = rude
    with connect(server.port) as peer:
        peer.sendall(head(len(HISTOGRAMS), "Expect: 100-continue"))
        interim = b""
        while not interim.endswith(b"\r\n\r\n"):
            interim += peer.recv(1)
        assert interim.startswith(b"HTTP/1.1 100 ")
        peer.sendall(HISTOGRAMS)
        assert read_answer(peer)[0] == 200
    assert visible(folder) == {NAME: HISTOGRAMS}


def test_sender_that_stops_after_100_continue(rude: tuple[Server, Path]) -> None:
    server, folder = rude
    with connect(server.port) as peer:
        peer.sendall(head(len(HISTOGRAMS), "Expect: 100-continue"))
        assert peer.recv(65536).startswith(b"HTTP/1.1 100 ")
        assert post(server.port, PROFILES).status == 200
    wait_until(lambda: uploads_in_progress(folder) == [], 60)
    assert visible(folder) == {NAME: PROFILES}


@pytest.mark.parametrize("wrong", ["token: wrong", "runNumber: x"])
def test_refused_large_upload_gets_its_answer(rude: tuple[Server, Path], wrong: str) -> None:
    server, folder = rude
    name, _, value = wrong.partition(": ")
    for arguments in (
        [],
        ["-H", "Expect:"],
        ["-H", "Transfer-Encoding: chunked"],
        ["-H", "Connection: close", "-H", "Expect:"],
        ["-H", "Connection: close", "-H", "Expect:", "-H", "Transfer-Encoding: chunked"],
    ):
        answer = curl(
            server.files, "--data-binary", "@-", *arguments, headers={**HEADERS, name: value}, send=bytes(20 << 20)
        )
        assert (answer.status, answer.curl, answer.json["received"]) == (400, 0, None)
    # A sender that looks for its answer only when it has sent everything; without a valid token little is read of it.
    size = 1 << 20 if name == "token" else 20 << 20
    for more in ({}, {"Connection": "close"}):
        assert post(server.port, bytes(size), {**HEADERS, **more, name: value}).status == 400
    assert NAME not in visible(folder)


# --- senders that do not listen ----------------------------------------------------------------------------------------


def test_unread_answers_keep_no_upload_waiting(rude: tuple[Server, Path]) -> None:
    server, folder = rude
    large = HISTOGRAMS + bytes(16 << 20)
    assert post(server.port, large).status == 200
    peers = [connect(server.port, receive_buffer=4096) for _ in range(30)]
    for number, peer in enumerate(peers):
        if number % 2:
            peer.sendall(head(None, method="GET", path=f"{FILES}/{NAME}"))
        else:
            peer.sendall(head(len(HISTOGRAMS), stamp=1100 + number) + HISTOGRAMS)
    wait_until(lambda: len(visible(folder)) == 16, 60)
    check_that_ten_others_are_served(server, peers, time.monotonic())


def test_pipelined_requests_without_a_reader_are_bounded(rude: tuple[Server, Path]) -> None:
    server, _ = rude
    with connect(server.port, receive_buffer=4096) as peer:
        peer.settimeout(1)
        request = head(None, method="GET", path="/rest/api/nothing")
        with selectors.DefaultSelector() as selector:
            selector.register(peer, selectors.EVENT_WRITE)
            sent = 0
            while sent < 4 << 20 and selector.select(0.5):
                try:
                    sent += peer.send(request * 100)
                except TimeoutError:
                    break
        assert post(server.port, PROFILES).status == 200
