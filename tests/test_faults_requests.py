"""Malformed requests: never a 500, a hang, a lost worker or a visible file, and always the documented JSON."""

from __future__ import annotations

import http.client
import io
import json
import os
import random
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FILES, HEADERS, HISTOGRAMS, ROUNDS, SEED, TOKEN, Server, post, settings, visible
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from werkzeug.test import Client, EnvironBuilder, run_wsgi_app

import receiver

EXAMPLES = 60 * ROUNDS
EXPECTED = {200, 206, 304, 400, 404, 405, 412, 413, 414, 416, 417, 431, 501}

few = hypothesis_settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def app(make_app: Callable[..., receiver.Receiver], caplog: pytest.LogCaptureFixture) -> receiver.Receiver:
    caplog.set_level("WARNING")
    return make_app(max_file_size="20000")


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


def call(app: receiver.Receiver, environ: dict[str, Any]) -> int:
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
def test_any_path_query_and_condition_gets_a_documented_answer(
    app: receiver.Receiver, method: str, path: str, query: str, headers: dict[str, str], token: str
) -> None:
    call(app, environ_of(method, path, query, {**headers, "token": token}, b""))
    assert visible(app.storage.folder) == {}


@seed(SEED)
@few
@given(method=st.sampled_from(["GET", "HEAD"]), query=st.booleans(), headers=conditions)
def test_any_range_and_condition_on_a_file_gets_a_documented_answer(
    app: receiver.Receiver, method: str, query: bool, headers: dict[str, str]
) -> None:
    name = "EMChistos_1_DQM_2015_11_24_18_04_10.root"
    (app.storage.folder / name).write_bytes(HISTOGRAMS)
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
def test_any_headers_of_an_invalid_upload_get_a_documented_answer(
    app: receiver.Receiver, headers: dict[str, str], body: bytes
) -> None:
    assert call(app, environ_of("POST", FILES, "", headers, body)) in (400, 413)
    assert visible(app.storage.folder) == {}
    assert list((app.storage.folder / ".incoming").iterdir()) == []


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
def test_any_form_without_a_root_file_gets_a_documented_answer(
    app: receiver.Receiver, parts: list[tuple[bytes, bytes]], end: bytes, preamble: bytes, boundary: str
) -> None:
    body = preamble + b"".join(b"--b\r\n%b\r\n\r\n%b\r\n" % part for part in parts) + end
    headers = {**HEADERS, "Content-Type": f"multipart/form-data; boundary={boundary}"}
    assert call(app, environ_of("POST", FILES, "", headers, body)) in (400, 413)
    assert visible(app.storage.folder) == {}
    assert list((app.storage.folder / ".incoming").iterdir()) == []


def test_an_error_that_nobody_thought_of_is_a_500_in_json_that_tells_nothing(
    app: receiver.Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret of the house")

    monkeypatch.setattr(app.storage, "open", fail)
    response = Client(app).get(f"{FILES}/x%0aforged", headers=HEADERS)
    assert response.status_code == 500
    assert response.json is not None and response.json["received"] is None
    assert "secret" not in response.text and "RuntimeError" not in response.text
    assert "secret of the house" in caplog.text
    assert not re.search(r"^forged", caplog.text, re.MULTILINE), "a request can forge a line of the log"


# --- a real server -----------------------------------------------------------------------------------------------------


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
    assert os.listdir(folder / ".incoming") == []
    assert post(server.port, HISTOGRAMS).status == 200
    for path in folder.glob("*.root"):
        path.unlink()


def test_mutants_of_a_request_get_a_documented_answer_from_a_server(shared: tuple[Server, Path]) -> None:
    attack(*shared, count=200 * ROUNDS)


@pytest.mark.slow
def test_many_mutants_of_a_request_get_a_documented_answer_from_a_server(shared: tuple[Server, Path]) -> None:
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
def test_what_is_no_http_is_refused_in_json(shared: tuple[Server, Path], request_: bytes) -> None:
    server, _ = shared
    workers = server.workers()
    answers = list(answers_in(exchange(server.port, request_)))
    assert answers, "no answer"
    for status, content_type, body in answers:
        assert 400 <= status < 600 and status != 500
        check_answer(status, content_type, body)
    assert set(workers) <= set(server.workers())
