"""Requests as no good sender makes them: malformed, cut, slow. Each gets the documented answer and harms no other."""

from __future__ import annotations

import http.client
import io
import json
import random
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
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
    connect,
    exchange,
    head,
    incoming,
    post,
    read_answer,
    rest_of,
    settings,
    visible,
    wait_until,
)
from conftest import LONG_DRIP
from faults import assert_nothing_left, name_of
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from server import Server
from werkzeug.test import EnvironBuilder, run_wsgi_app

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
        ["", " 1", "1 ", "+1", "1e3", "0x1", "1_000", "²", "Ù¡", "NaN", "1\n"]
    ),  # Ù¡: an Arabic digit in UTF-8
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
OTHER_FIELDS = (
    "If-Range", "If-Match", "If-None-Match", "If-Unmodified-Since", "Accept", "Cookie", "Host", "Authorization", "X-Forwarded-For"
)  # fmt: skip
conditions = st.fixed_dictionaries(
    {},
    optional={
        "Range": st.one_of(latin, st.text("bytes=0123456789-, ", max_size=30).map(lambda text: "bytes=" + text)),
        "If-Modified-Since": st.one_of(latin, st.just("Thu, 01 Jan 99999 00:00:00 GMT")),
        "Want-Repr-Digest": st.one_of(latin, st.just("sha-256=1, x=")),
        **dict.fromkeys(OTHER_FIELDS, latin),
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


# --- mutants of a request, to a real server ----------------------------------------------------------------------------

DRIPS = 100
QUICK = 30  # seconds, on the slowest machine; a thread that waits for a silent peer waits for 120


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    """The shared server; whatever a test does to it, it has its workers, its folder and its manners afterwards."""
    # A test before this one may have left whole uploads behind whose senders did not wait for the answer.
    wait_until(lambda: incoming(shared.folder) == [], 60)
    for path in shared.folder.glob("*.root"):
        path.unlink()
    workers = shared.workers()
    yield shared
    assert set(workers) <= set(shared.workers()), f"a worker was lost:\n{shared.log.read_text()[-3000:]}"
    assert set(visible(shared.folder)) <= {NAME} | {name_of(stamp) for stamp in range(1000, 1300)}
    begin = time.monotonic()
    assert post(shared.port, PROFILES, {**HEADERS, "timeStamp": "1000"}).status == 200
    assert time.monotonic() - begin < QUICK
    log = shared.log.read_text()
    assert "Traceback" not in log and "WORKER TIMEOUT" not in log, log[-5000:]


def upload_head(*fields: str, stamp: int = 234) -> bytes:
    return head(FILES, *fields, **{**HEADERS, "timeStamp": str(stamp)})


GOOD = upload_head("Content-Length: 200") + HISTOGRAMS[:200]

SPECIAL = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"%", b"/", b"..", b"\xff\xfe", b"\t", b"HTTP/9.9", b"x" * 9000, b" folded\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Content-Length: 7\r\n", b"Expect: 100-continue\r\n", b"Expect: x\r\n",
    b"Upgrade: h2c\r\n", b"token: x\r\n", b"X-Forwarded-Proto: https\r\n",
]  # fmt: skip


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


@pytest.mark.parametrize("count", [200 * ROUNDS, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutants_get_a_documented_answer(server: Server, count: int) -> None:
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
    assert visible(server.folder) == {}
    assert_nothing_left(server.folder)


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
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
def test_other_protocols_are_refused_in_json(server: Server, request_: bytes) -> None:
    answers = list(answers_in(exchange(server.port, request_)))
    assert answers, "no answer"
    for status, content_type, body in answers:
        assert 400 <= status < 600 and status != 500
        check_answer(status, content_type, body)


# --- slow --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_the_end", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_slow_senders_keep_no_upload_waiting(server: Server, to_the_end: bool) -> None:
    seconds = 60  # that the drips would last
    drips = [connect(server.port) for _ in range(DRIPS)]
    over = threading.Event()

    def drip() -> None:
        for stamp, peer in enumerate(drips, 1100):
            length = f"Content-Length: {len(HISTOGRAMS)}"
            peer.sendall(upload_head(length, "Connection: close", stamp=stamp) + HISTOGRAMS[:-seconds])
        for at in range(len(HISTOGRAMS) - seconds, len(HISTOGRAMS)):
            over.wait(1)
            for peer in drips:
                peer.sendall(HISTOGRAMS[at : at + 1])

    dripping = threading.Thread(target=drip)
    dripping.start()
    wait_until(lambda: len(incoming(server.folder)) == DRIPS, 60)
    begin = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        headers = [{**HEADERS, "timeStamp": str(stamp)} for stamp in range(1010, 1030)]
        replies = list(pool.map(lambda fields: post(server.port, PROFILES, fields), headers))
    took = time.monotonic() - begin
    still_dripping = dripping.is_alive()
    if not to_the_end:
        over.set()
    dripping.join(120)
    answers = [read_answer(peer) for peer in drips]
    for peer in drips:
        peer.close()
    print(f"20 uploads beside {DRIPS} slow ones took {took:.2f} s")
    assert [reply.status for reply in replies] == [200] * 20
    assert still_dripping, "the uploads did not run beside the slow ones"
    assert [status for status, _ in answers] == [200] * DRIPS
    assert len(visible(server.folder)) == DRIPS + 20


def test_upload_of_45_seconds_ends_in_200(long_drip: tuple[subprocess.Popen[str], Path]) -> None:
    sender, folder = long_drip
    out, _ = sender.communicate(timeout=LONG_DRIP + 30)
    seconds, _, answer = out.partition(" ")
    assert answer == "HTTP/1.1 200 OK\n"
    assert float(seconds) >= LONG_DRIP
    assert visible(folder) == {NAME: HISTOGRAMS}


# --- cut ---------------------------------------------------------------------------------------------------------------

LENGTH = f"Content-Length: {len(HISTOGRAMS)}"
CHUNKED = "Transfer-Encoding: chunked"
FORM = b'--x\r\nContent-Disposition: form-data; name="file"; filename="x.root"\r\n\r\n' + HISTOGRAMS + b"\r\n--x--\r\n"


def chunks(size: int) -> bytes:
    """Return the file in chunks, without the last one."""
    pieces = [HISTOGRAMS[at : at + size] for at in range(0, len(HISTOGRAMS), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


CHUNK, END = chunks(len(HISTOGRAMS)), b"0\r\n\r\n"
REQUESTS = {
    "bare": upload_head(LENGTH) + HISTOGRAMS,
    "form": upload_head(f"Content-Length: {len(FORM)}", "Content-Type: multipart/form-data; boundary=x") + FORM,
    "chunked": upload_head(CHUNKED) + CHUNK + END,
}


@pytest.mark.parametrize("how", ["closed", "reset", "half-closed"])
@pytest.mark.parametrize("kind", REQUESTS)
def test_connection_cut_at_any_stage_leaves_nothing(server: Server, kind: str, how: str) -> None:
    request = REQUESTS[kind]
    end_of_head = request.index(b"\r\n\r\n") + 4
    # In the request line, in the headers, about their end, and all through the body up to its last byte.
    stages = [1, 20, end_of_head // 2, end_of_head - 2, end_of_head, end_of_head + 1, end_of_head + 80]
    stages += [end_of_head + 3000, len(request) - 60, len(request) - 5, len(request) - 2, len(request) - 1]
    for stage in stages:
        with connect(server.port) as peer:
            peer.sendall(request[:stage])
            if how == "half-closed":
                peer.shutdown(socket.SHUT_WR)
                answer = rest_of(peer)
                assert not answer or answer.startswith(b"HTTP/1.1 400 "), (stage, answer)
            elif how == "reset":
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: incoming(server.folder) == [], 60)
    # The end of a form behind its file, and the last line of a chunked body, may be taken for granted.
    assert visible(server.folder) in ([{}] if kind == "bare" else [{}, {NAME: HISTOGRAMS}])


def test_sender_that_leaves_stores_all_or_nothing(server: Server) -> None:
    for stamp in range(1100, 1130):
        with connect(server.port) as peer:
            peer.sendall(upload_head(LENGTH, stamp=stamp) + HISTOGRAMS)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: incoming(server.folder) == [], 60)
    assert set(visible(server.folder).values()) <= {HISTOGRAMS}


# --- bodies and their announced lengths --------------------------------------------------------------------------------

NOT_LENGTHS = (
    "-1",
    f"+{len(HISTOGRAMS)}",
    f"{len(HISTOGRAMS)}, {len(HISTOGRAMS)}",
    "5_462",
    "0x1556",
    " ",
    "5462 1",
    "9" * 20,
)
LENGTHS: dict[str, tuple[str, bytes, int]] = {
    "longer than the body": (f"Content-Length: {len(HISTOGRAMS) + 1}", HISTOGRAMS, 400),
    "shorter than the body": (f"Content-Length: {len(HISTOGRAMS) - 100}", HISTOGRAMS, 400),
    "as the body, more behind it": (LENGTH, HISTOGRAMS + b"\x00\xff and more\r\n\r\n", 200),
    **{length: (f"Content-Length: {length}", HISTOGRAMS, 400) for length in NOT_LENGTHS},
    **{f"chunks of {size}": (CHUNKED, chunks(size) + END, 200) for size in (1, 7, 1000, 100_000)},
    "no number before a chunk": (CHUNKED, b"zz\r\n" + CHUNK + END, 400),
    "no number behind a chunk": (CHUNKED, CHUNK + b"zz\r\n\r\n", 400),
    "a negative chunk": (CHUNKED, CHUNK + b"-1\r\n\r\n", 400),
    "no line end before a chunk": (CHUNKED, CHUNK.replace(b"\r\nroot", b"root", 1) + END, 400),
    "no line end behind a chunk": (CHUNKED, CHUNK[:-2] + b"XX" + END, 400),
    "a huge chunk": (CHUNKED, b"ffffffffffffffff\r\n" + HISTOGRAMS, 400),
    "no chunk": (CHUNKED, END, 400),
}  # fmt: skip


@pytest.mark.parametrize("case", LENGTHS)
def test_announced_length_decides_on_the_body(server: Server, case: str) -> None:
    announced, sent, expected = LENGTHS[case]
    with connect(server.port) as peer:
        peer.sendall(upload_head(announced) + sent)
        if expected != 200:
            peer.shutdown(socket.SHUT_WR)
        status, body = read_answer(peer)
    answer = json.loads(body)
    assert (answer["status"], status) == (status, 413 if case == "9" * 20 else expected)
    assert (answer["received"] is None) == (status != 200)
    assert visible(server.folder) == ({NAME: HISTOGRAMS} if status == 200 else {})


# --- Expect: 100-continue ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stays", [True, False])
def test_100_continue_answers_a_sender_that_waits(server: Server, stays: bool) -> None:
    with connect(server.port) as peer:
        peer.sendall(upload_head(LENGTH, "Expect: 100-continue"))
        assert peer.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        if stays:
            peer.sendall(HISTOGRAMS)
            assert read_answer(peer)[0] == 200
        else:
            assert post(server.port, PROFILES).status == 200
    wait_until(lambda: incoming(server.folder) == [], 60)
    assert visible(server.folder) == {NAME: HISTOGRAMS if stays else PROFILES}


@pytest.mark.parametrize("wrong", [{"token": "wrong"}, {"runNumber": "x"}, {"sha256": "x"}], ids=str)
def test_wrong_head_is_refused_without_100_continue(server: Server, wrong: dict[str, str]) -> None:
    with connect(server.port) as peer:
        peer.sendall(head(FILES, "Content-Length: 3000000", "Expect: 100-continue", **{**HEADERS, **wrong}))
        assert read_answer(peer)[0] == 400
