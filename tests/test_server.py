"""The main paths and refusals through a real gunicorn with real curl, and what only a real server can show."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import uproot
from conftest import (
    FILES,
    GRAPHS,
    HEADERS,
    HISTOGRAMS,
    NAME,
    PROFILES,
    PROJECT,
    TOKEN,
    Answer,
    Server,
    curl,
    free_port,
    receipts,
    settings,
    visible,
    wait_until,
)

MB = 1 << 20
AUTH = {"token": TOKEN}
WRONG = {**HEADERS, "token": "wrong"}
MAX_GROWTH = 48 * MB  # of a worker's memory, whatever the size of a file


class Shared:
    """A server that many tests use, each with a run of its own."""

    def __init__(self, base: Path) -> None:
        self.folder = base / "data"
        self.server = Server(settings(self.folder, max_file_size=str(2 << 30)), base / "gunicorn.log", ())

    def __call__(self, run: int, *arguments: str, **changes: Any) -> Answer:
        return curl(self.server.files, *arguments, headers={**HEADERS, "runNumber": str(run)}, **changes)

    def files(self, run: int) -> list[bytes]:
        return [content for name, content in visible(self.folder).items() if f"_{run}_" in name]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    its = Shared(tmp_path_factory.mktemp("server"))
    yield its
    its.server.stop()


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    """A ROOT file of a sender."""
    path = tmp_path / "aTestFile.root"
    path.write_bytes(HISTOGRAMS)
    return path


@pytest.fixture(scope="module")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function that makes a file of so many zero bytes, which takes no room."""
    folder = tmp_path_factory.mktemp("zeros")

    def make(size: int) -> Path:
        path = folder / str(size)
        with path.open("wb") as file:
            file.truncate(size)
        return path

    return make


def check_refused(answer: Answer, status: int, message: str) -> None:
    assert (answer.curl, answer.error) == (0, "")
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert answer.json["status"] == status
    assert answer.json["received"] is None
    assert message in answer.json["message"]


# --- the main path -----------------------------------------------------------------------------------------------------


def test_the_documented_curl_line_stores_the_file(make_server: Callable[..., Server], folder: Path, sent: Path) -> None:
    server = make_server()
    line = (
        'curl -F file=@aTestFile.root -H "token: abcd" -H "runNumber: 123" -H "timeStamp: 234" -H "amoreAgent: testagent" '
        '-H "dataStatus: 1" http://127.0.0.1:8080/rest/api/files'
    ).replace("8080", str(server.port))
    run = subprocess.run(shlex.split(line), cwd=sent.parent, capture_output=True, check=True)
    answer = json.loads(run.stdout)
    assert list(answer) == ["status", "filename", "message", "received", "size", "sha256"]
    assert (answer["status"], answer["filename"]) == (200, "testagenthistos_123_DQM_1970_01_01_01_03_54.root")
    assert answer["message"] == "Successfully received file and extracted information"
    assert answer["received"]["hTH1C"] == "Obj name: hTH1C, Obj IsA() Name: TH1C"
    assert (answer["size"], answer["sha256"]) == (len(HISTOGRAMS), hashlib.sha256(HISTOGRAMS).hexdigest())
    assert visible(folder) == {"testagenthistos_123_DQM_1970_01_01_01_03_54.root": HISTOGRAMS}
    assert curl(server.files, headers=AUTH).json == {"files": [NAME]}
    assert [receipt["outcome"] for receipt in receipts(folder)] == ["stored"]
    assert list((folder / ".incoming").iterdir()) == []
    wait_until(lambda: len(server.workers()) == min(len(os.sched_getaffinity(0)), 4), 10)


@pytest.mark.parametrize(
    ("run", "arguments"),
    [
        (1, ["--data-binary", "@{}"]),
        (2, ["--data-binary", "@{}", "-HContent-Type: application/octet-stream"]),
        (3, ["--data-binary", "@{}", "-HTransfer-Encoding: chunked"]),
        (4, ["-F", "file=@{}", "-HTransfer-Encoding: chunked"]),
        (5, ["-F", "file=@{};filename=../../x.root;type=application/x-root"]),
        (6, ["-F", "comment=histograms", "-F", "file=@{}"]),
        (7, ["-T", "{}", "-X", "POST"]),
        (8, ["--data-binary", "@{}", "-HExpect: 100-continue"]),
        (9, ["-F", "file=@{}", "-HExpect: 100-continue"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_curl_may_send_in_many_ways(shared: Shared, sent: Path, run: int, arguments: list[str]) -> None:
    answer = shared(run, *(argument.format(sent) for argument in arguments))
    assert (answer.status, answer.json["size"]) == (200, len(HISTOGRAMS))
    assert shared.files(run) == [HISTOGRAMS]


def test_a_file_sent_again_or_changed_says_so(shared: Shared) -> None:
    answers = [shared(20, "--data-binary", "@-", send=content).json for content in (PROFILES, PROFILES, GRAPHS)]
    assert ["duplicate" in answer for answer in answers] == [False, True, False]
    assert ["replaced" in answer for answer in answers] == [False, False, True]
    assert shared.files(20) == [GRAPHS]
    assert [receipt["outcome"] for receipt in receipts(shared.folder, 20)] == ["stored", "duplicate", "replaced"]


def test_a_download_is_byte_for_byte_whole_and_in_ranges(shared: Shared) -> None:
    content = PROFILES + os.urandom(3 * MB)  # bytes after the end of a ROOT file are accepted
    name = shared(30, "--data-binary", "@-", send=content).json["filename"]
    size = len(content)
    for url in (f"{shared.server.files}/{name}", f"{shared.server.files}?filename={name}"):
        whole = curl(url, headers=AUTH)
        assert (whole.status, whole.body) == (200, content)
        assert whole.headers["content-length"] == str(size)
        head = curl(url, "--head", headers=AUTH)
        assert (head.status, head.body, head.curl) == (200, b"", 0)
        for field in ("content-length", "content-type", "etag", "last-modified", "accept-ranges"):
            assert head.headers[field] == whole.headers[field]
        for first, last in ((0, 0), (0, MB), (MB + 1, 2 * MB), (size - 5, size - 1), (1, size - 1)):
            part = curl(url, "--range", f"{first}-{last}", headers=AUTH)
            assert (part.status, part.body) == (206, content[first : last + 1])
            assert part.headers["content-range"] == f"bytes {first}-{last}/{size}"
        assert curl(url, "--range", "-100", headers=AUTH).body == content[-100:]
        check_refused(curl(url, "--range", f"{size}-", headers=AUTH), 416, "range")
        unchanged = curl(url, f"-HIf-None-Match: {whole.headers['etag']}", headers=AUTH)
        assert (unchanged.status, unchanged.body, unchanged.curl) == (304, b"", 0)
        check_refused(curl(url, '-HIf-Match: "other"', headers=AUTH), 412, "")
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        wanted = curl(url, "-HWant-Repr-Digest: sha-256=1", "--range", "0-9", headers=AUTH)
        assert wanted.headers["repr-digest"] == f"sha-256=:{digest}:"


def test_a_download_can_be_resumed(shared: Shared, tmp_path: Path) -> None:
    content = PROFILES + os.urandom(MB)
    name = shared(31, "--data-binary", "@-", send=content).json["filename"]
    half = tmp_path / "half.root"
    half.write_bytes(content[:300_000])
    url = f"{shared.server.files}/{name}"
    run = subprocess.run(["curl", "-sS", "-C", "-", "-o", half, "-H", f"token: {TOKEN}", url], check=False)
    assert run.returncode == 0
    assert half.read_bytes() == content


def test_a_connection_serves_one_request_after_the_other_whatever_was_refused(shared: Shared) -> None:
    content = PROFILES + os.urandom(MB)
    name = shared(32, "--data-binary", "@-", send=content).json["filename"]
    mine = {**HEADERS, "runNumber": "33"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", shared.server.port, timeout=30)) as connection:
        connection.connect()
        first = connection.sock
        for method, url, body, headers, status in [
            ("POST", FILES, bytes(MB), WRONG, 400),
            ("POST", FILES, bytes(MB), {**mine, "runNumber": "x"}, 400),
            ("POST", FILES, b"invalid" * 100, mine, 400),
            ("POST", "/unknown", bytes(MB), mine, 404),
            ("PUT", FILES, bytes(MB), mine, 405),
            ("POST", FILES, PROFILES, mine, 200),
            ("GET", f"{FILES}/{name}", None, {**AUTH, "Range": "bytes=1000-500000"}, 206),
            ("GET", f"{FILES}/{name}", None, {**AUTH, "If-None-Match": "*"}, 304),
            ("GET", f"{FILES}/{name}", None, {**AUTH, "If-Match": '"other"'}, 412),
            ("HEAD", f"{FILES}/{name}", None, AUTH, 200),
            ("GET", f"{FILES}/absent", None, AUTH, 404),
            ("GET", f"{FILES}/{name}", None, AUTH, 200),
            ("POST", FILES, iter([PROFILES[:100], PROFILES[100:]]), mine, 200),
        ]:
            connection.request(method, url, body, headers)
            response = connection.getresponse()
            answer = response.read()
            assert (method, url, response.status) == (method, url, status)
            if status == 206:
                assert answer == content[1000:500001]
            elif method == "GET" and status == 200:
                assert answer == content
            elif status in (400, 404, 405, 412):
                assert json.loads(answer)["status"] == status
            assert connection.sock is first


def test_a_connection_that_never_rests_leaves_others_their_turn(make_server: Callable[..., Server]) -> None:
    port = make_server("--workers", "1", "--threads", "1").port
    requests, answers = 3000, 0
    restless = socket.create_connection(("127.0.0.1", port), timeout=30)
    other = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    begun = threading.Event()

    def read_answers() -> None:
        nonlocal answers
        with restless.makefile("rb") as stream:
            while answers < requests:
                answers += stream.readline().startswith(b"HTTP/1.1 400 ")
                begun.set()

    with contextlib.closing(restless), contextlib.closing(other), ThreadPoolExecutor() as pool:
        sending = pool.submit(
            restless.sendall, f"GET / HTTP/1.1\r\nHost: x\r\ntoken: {TOKEN}\r\n\r\n".encode() * requests
        )
        reading = pool.submit(read_answers)
        assert begun.wait(30)
        for _ in range(3):
            other.request("GET", FILES, headers=AUTH)
            assert other.getresponse().read() == b'{"files": []}\n'
        assert answers < requests
        sending.result(60)
        reading.result(60)


def test_more_connections_than_files_may_be_open_end_no_worker(
    make_server: Callable[..., Server], folder: Path
) -> None:
    server = make_server("--workers", "1")
    (worker,) = server.workers()
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
        peer.sendall(upload_head(123, f"Content-Length: {len(PROFILES)}", "Connection: close") + PROFILES[:1000])
        wait_until(lambda: any((folder / ".incoming").iterdir()), 10)
        most = len(os.listdir(f"/proc/{worker}/fd")) + 10
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (most, most))
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30)) for _ in range(50)]
        wait_until(lambda: len(os.listdir(f"/proc/{worker}/fd")) == most, 10)
        for connection in idle:
            connection.close()
        peer.sendall(PROFILES[1000:])
        with peer.makefile("rb") as answer:
            assert answer.readline().startswith(b"HTTP/1.1 200 ")
        assert curl(server.files, headers=AUTH).json == {"files": [NAME]}
    assert server.workers() == [worker]


def test_a_worker_may_open_as_many_files_as_the_host_allows(make_server: Callable[..., Server]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        server = make_server("--workers", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    (worker,) = server.workers()
    assert resource.prlimit(worker, resource.RLIMIT_NOFILE)[0] == max(256, min(hard, 65536))


# --- the start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("TOKEN", None), ("MAX_FILE_SIZE", "2 GiB"), ("DATA_FOLDER", "{}/file")],
)
def test_a_wrong_setting_stops_the_start_with_one_clear_line(tmp_path: Path, name: str, value: str | None) -> None:
    (tmp_path / "file").write_text("not a folder")
    environ = {key: text for key, text in os.environ.items() if not key.startswith("DQM_RECEIVER_")}
    environ.update(settings(tmp_path / "data"))
    del environ["DQM_RECEIVER_MIN_FREE_SPACE"]
    environ.pop(f"DQM_RECEIVER_{name}", None)
    if value is not None:
        environ[f"DQM_RECEIVER_{name}"] = value.format(tmp_path)
    run = subprocess.run(
        [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{free_port()}"],
        cwd=PROJECT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    said = run.stdout + run.stderr
    assert run.returncode != 0
    assert "Traceback" not in said
    assert sum(f"DQM_RECEIVER_{name}" in line for line in said.splitlines()) == 1
    assert len(said.splitlines()) <= 3


# --- refusals ----------------------------------------------------------------------------------------------------------

SENDING = {
    "form": ["-F", "file=@{}"],
    "form without Expect": ["-F", "file=@{}", "-HExpect:"],
    "form, chunked": ["-F", "file=@{}", "-HTransfer-Encoding: chunked"],
    "bare": ["--data-binary", "@{}"],
    "bare without Expect": ["-T", "{}", "-X", "POST", "-HExpect:"],
    "bare with Expect": ["-T", "{}", "-X", "POST", "-HExpect: 100-continue"],
    "bare, chunked": ["-T", "{}", "-X", "POST", "-HTransfer-Encoding: chunked", "-HExpect:"],
}


@pytest.mark.parametrize("sending", ["form", "form without Expect", "bare", "bare without Expect"])
def test_a_sender_of_100_mb_sees_that_its_token_is_wrong(
    shared: Shared, zeros: Callable[[int], Path], sending: str
) -> None:
    path = zeros(100 * MB)
    before = visible(shared.folder).keys()
    for _ in range(2):
        answer = curl(shared.server.files, *(text.format(path) for text in SENDING[sending]), headers=WRONG)
        check_refused(answer, 400, "Received token, but it is invalid!")
    assert visible(shared.folder).keys() == before


@pytest.mark.parametrize("sending", SENDING)
def test_a_sender_of_a_large_file_sees_what_else_is_wrong(
    shared: Shared, zeros: Callable[[int], Path], sending: str
) -> None:
    arguments = [text.format(zeros(20 * MB)) for text in SENDING[sending]]
    for url, method, headers, status, message in [
        (FILES, "POST", {**HEADERS, "runNumber": "x"}, 400, "runNumber"),
        (FILES, "POST", {**HEADERS, "runNumber": "40"}, 400, "not valid"),
        ("/unknown", "POST", HEADERS, 404, ""),
        (FILES, "PUT", HEADERS, 405, ""),
    ]:
        answer = curl(shared.server.url + url, *arguments, "-X", method, headers=headers)
        check_refused(answer, status, message)
        if status == 405:
            assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes files up to a million bytes."""
    base = tmp_path_factory.mktemp("small")
    server = Server(settings(base / "data", max_file_size="1000000"), base / "gunicorn.log", ())
    yield server
    server.stop()


@pytest.mark.parametrize("size", [1_000_001, 60 * MB])
@pytest.mark.parametrize("sending", SENDING)
def test_a_sender_of_a_file_too_large_sees_the_limit(
    small: Server, zeros: Callable[[int], Path], sending: str, size: int
) -> None:
    answer = curl(small.files, *(text.format(zeros(size)) for text in SENDING[sending]))
    check_refused(answer, 413, "1000000 bytes")
    folder = small.log.parent / "data"
    assert visible(folder) == {}
    assert list((folder / ".incoming").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-Htoken: abcd"], "Received token, but it is invalid!"),
        (["-HrunNumber: 123"], "runNumber"),
        (["-HrunNumber: 124"], "runNumber"),
        (["-HtimeStamp: 234"], "timeStamp"),
        (["-HamoreAgent: testagent"], "amoreAgent"),
        (["-HdataStatus: 1"], "dataStatus"),
        (["-Hsha256: " + "0" * 64], "sha256"),
        (["-Hsha256;"], "sha256"),
        (["-F", "file=@{}"], "more than one part named file"),
        (["-F", "file=text"], "file"),
    ],
    ids=str,
)
def test_what_is_doubled_or_wrong_is_refused_by_its_name(
    shared: Shared, sent: Path, arguments: list[str], message: str
) -> None:
    arguments = [argument.format(sent) for argument in arguments]
    answer = curl(shared.server.files, "-F", f"file=@{sent}", *arguments)
    check_refused(answer, 400, message)
    assert shared.files(123) == []


@pytest.mark.parametrize(
    "arguments",
    [[], ["-F", "file=@/dev/null"], ["-F", "other=@{}"], ["--data-binary", "@/dev/null"]],
    ids=" ".join,
)
def test_a_request_without_a_file_is_refused(shared: Shared, sent: Path, arguments: list[str]) -> None:
    answer = curl(shared.server.files, "-X", "POST", *(argument.format(sent) for argument in arguments))
    check_refused(answer, 400, "No file uploaded and the payload was empty")


def test_a_truncated_file_is_refused_with_the_reason(shared: Shared) -> None:
    answer = shared(50, "--data-binary", "@-", send=HISTOGRAMS[:-1])
    check_refused(answer, 400, "Successfully received the file, but the file is not valid! Perhaps it was corrupted?")
    assert answer.json["reason"] == receipts(shared.folder, 50)[0]["reason"]
    assert len(answer.json["reason"]) > 10
    assert shared.files(50) == []


def test_without_room_a_sender_is_told(make_server: Callable[..., Server], sent: Path, folder: Path) -> None:
    server = make_server(min_free_space=str(10**17))
    check_refused(curl(server.files, "-F", f"file=@{sent}"), 507, str(10**17))
    assert visible(folder) == {}


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nx: " + b"y" * 20000 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 20000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"POST " + FILES.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST " + FILES.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400),
    ],
    ids=lambda value: repr(value[:60]) if isinstance(value, bytes) else str(value),
)
def test_what_is_no_http_is_refused_in_json_too(shared: Shared, request_: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", shared.server.port), 30) as peer:
        peer.sendall(request_)
        answer = b""
        while piece := peer.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert b"\r\nContent-Type: application/json" in head
    content = json.loads(body)
    assert (content["status"], content["received"]) == (status, None)


def test_the_token_stands_in_no_log(make_server: Callable[..., Server], folder: Path, sent: Path) -> None:
    token, wrong = uuid.uuid4().hex, uuid.uuid4().hex
    server = make_server("--access-logfile", "-", "--log-level", "debug", token=token)
    for its, status in ((token, 200), (wrong, 400)):
        assert curl(server.files, "-F", f"file=@{sent}", headers={**HEADERS, "token": its}).status == status
        assert curl(server.url + "/unknown", headers={"token": its}).status in (400, 404)
    server.stop()
    log = server.log.read_text()
    assert FILES in log
    assert (token in log, wrong in log) == (False, False)
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(token.encode() in content for content in written)


# --- abandoned uploads -------------------------------------------------------------------------------------------------


def upload_head(run: int, *more: str) -> bytes:
    fields = {**HEADERS, "runNumber": str(run)}
    lines = [f"POST {FILES} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in fields.items()), *more]
    return "\r\n".join([*lines, "", ""]).encode()


# Each is a valid ROOT file as far as it comes.
ABANDONED = {
    "bare": (["Content-Length: 10000000"], PROFILES + bytes(5 * MB)),
    "form": (
        ["Content-Length: 10000000", "Content-Type: multipart/form-data; boundary=limit"],
        b'--limit\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + PROFILES + bytes(5 * MB),
    ),
    "chunked": (
        ["Transfer-Encoding: chunked"],
        b"%x\r\n" % len(PROFILES) + PROFILES + b"\r\n500000\r\n" + bytes(5 * MB),
    ),
    "chunked, between two chunks": (["Transfer-Encoding: chunked"], b"%x\r\n" % len(PROFILES) + PROFILES + b"\r\n"),
}


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("kind", ABANDONED)
def test_an_abandoned_upload_leaves_nothing(shared: Shared, kind: str, reset: bool) -> None:
    run = 60 + 2 * list(ABANDONED).index(kind) + reset
    more, body = ABANDONED[kind]
    incoming = shared.folder / ".incoming"
    before = sorted((shared.folder / ".rejected").iterdir())
    with socket.create_connection(("127.0.0.1", shared.server.port), 30) as peer:
        peer.sendall(upload_head(run, *more) + body)
        wait_until(lambda: any(incoming.iterdir()), 10)
        if reset:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: not any(incoming.iterdir()), 10)
    assert shared.files(run) == []
    assert sorted((shared.folder / ".rejected").iterdir()) == before
    assert {receipt["outcome"] for receipt in receipts(shared.folder, run)} <= {"rejected"}
    assert shared(run, "--data-binary", "@-", send=PROFILES).status == 200


# --- memory ------------------------------------------------------------------------------------------------------------


def write_large(path: Path, size: int) -> None:
    """Write a valid ROOT file of at least this size: a tree, not compressed."""
    values = numpy.arange(4 << 20, dtype=numpy.float64)  # 32 MiB a piece
    with uproot.recreate(path, compression=None) as file:
        tree = file.mktree("tree", {"x": numpy.float64})
        for _ in range(-(-size // values.nbytes)):
            tree.extend({"x": values})


def peak(pid: int) -> int:
    """Return the most memory a process has had since `forget_peak`, in bytes."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@pytest.mark.parametrize("size", [200 * MB, pytest.param(1000 * MB, marks=pytest.mark.slow)], ids=["200 MB", "1 GB"])
def test_a_workers_memory_does_not_grow_with_the_file(
    make_server: Callable[..., Server], folder: Path, tmp_path: Path, size: int
) -> None:
    large, back = tmp_path / "large.root", tmp_path / "back.root"
    write_large(large, size)
    server = make_server("--workers", "2")
    wait_until(lambda: len(server.workers()) == 2, 10)
    # Every worker has done everything once before, with a small file.
    for number in range(8):
        name = curl(server.files, "--data-binary", "@-", send=PROFILES, headers=HEADERS).json["filename"]
        assert curl(server.files, "-F", "file=@-", send=PROFILES).status == 200
        assert curl(f"{server.files}/{name}", f"-r{number}-", headers=AUTH).status == 206
    workers = server.workers()
    before = {}
    for pid in workers:
        forget_peak(pid)
        before[pid] = peak(pid)
    url = f"{server.files}/{NAME}"
    token = ["-H", f"token: {TOKEN}"]
    assert curl(server.files, "-F", f"file=@{large}").json["size"] == large.stat().st_size
    assert curl(server.files, "-T", str(large), "-X", "POST").json["duplicate"]
    subprocess.run(["curl", "-sS", "-o", back, *token, url], check=True)
    assert subprocess.run(["cmp", large, back], check=False).returncode == 0
    subprocess.run(["curl", "-sS", "-o", back, "-r", "1000-", *token, url], check=True)
    assert back.stat().st_size == large.stat().st_size - 1000
    assert curl(url, "-HWant-Repr-Digest: sha-256=1", "--head", headers=AUTH).headers["repr-digest"]
    assert server.workers() == workers
    grown = {pid: peak(pid) - before[pid] for pid in workers}
    assert max(grown.values()) < MAX_GROWTH, grown


# --- several workers ---------------------------------------------------------------------------------------------------


def test_each_of_two_workers_serves_what_the_other_has_stored(make_server: Callable[..., Server], folder: Path) -> None:
    server = make_server("--workers", "2")
    wait_until(lambda: len(server.workers()) == 2, 10)
    workers = server.workers()
    names: list[str] = []
    for number, stopped in enumerate(workers):
        os.kill(stopped, signal.SIGSTOP)
        try:
            mine = {**HEADERS, "timeStamp": str(number)}
            answer = curl(server.files, "--data-binary", "@-", "--max-time", "20", headers=mine, send=PROFILES)
            assert answer.status == 200
            names.append(answer.json["filename"])
            assert curl(server.files, headers=AUTH).json == {"files": sorted(names)}
            for name in names:
                assert curl(f"{server.files}/{name}", headers=AUTH).body == PROFILES
        finally:
            os.kill(stopped, signal.SIGCONT)
    assert server.workers() == workers


def test_an_upload_under_way_is_finished_before_the_server_stops(
    make_server: Callable[..., Server], folder: Path
) -> None:
    server = make_server()
    with socket.create_connection(("127.0.0.1", server.port), 30) as peer:
        peer.sendall(upload_head(123, f"Content-Length: {len(PROFILES)}", "Connection: close") + PROFILES[:1000])
        wait_until(lambda: any((folder / ".incoming").iterdir()), 10)
        server.process.terminate()
        time.sleep(0.5)
        assert server.process.poll() is None
        peer.sendall(PROFILES[1000:])
        answer = b""
        while piece := peer.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert server.process.wait(20) == 0
    assert visible(folder) == {NAME: PROFILES}


def test_a_stop_that_comes_while_a_worker_begins_is_not_lost(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    configuration = tmp_path / "slow_start.conf.py"
    configuration.write_text(
        (PROJECT / "gunicorn.conf.py").read_text()
        + "\n\nimport time\n\ndef post_fork(server, worker):\n    time.sleep(2 * (worker.age == 2))\n"
    )
    server = make_server("--config", str(configuration), "--workers", "2")
    wait_until(lambda: len(server.workers()) == 2, 10)
    server.process.terminate()
    try:
        assert server.process.wait(10) == 0
    finally:
        if server.process.poll() is None:
            server.kill()
