"""A real gunicorn with the shipped settings, asked by real curl: main paths, refusals, memory, reload, several workers."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import uproot
from client import (
    AUTH,
    FILES,
    GRAPHS,
    HEADERS,
    HISTOGRAMS,
    NAME,
    PROFILES,
    PROJECT,
    TOKEN,
    Answer,
    curl,
    incoming,
    post,
    receipts,
    settings,
    tree,
    visible,
    wait_until,
)
from server import Server, free_port

MB = 1 << 20
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


def upload_head(run: int, *more: str) -> bytes:
    fields = {**HEADERS, "runNumber": str(run)}
    lines = [f"POST {FILES} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in fields.items()), *more]
    return "\r\n".join([*lines, "", ""]).encode()


# --- the main path -----------------------------------------------------------------------------------------------------


def test_documented_curl_line_stores_the_file(make_server: Callable[..., Server], folder: Path, sent: Path) -> None:
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
    assert incoming(folder) == []
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


def test_file_sent_again_or_changed_says_so(shared: Shared) -> None:
    answers = [shared(20, "--data-binary", "@-", send=content).json for content in (PROFILES, PROFILES, GRAPHS)]
    assert ["duplicate" in answer for answer in answers] == [False, True, False]
    assert ["replaced" in answer for answer in answers] == [False, False, True]
    assert shared.files(20) == [GRAPHS]
    assert [receipt["outcome"] for receipt in receipts(shared.folder, 20)] == ["stored", "duplicate", "replaced"]


def test_download_is_byte_exact_whole_and_in_ranges(shared: Shared) -> None:
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


def test_download_can_be_resumed(shared: Shared, tmp_path: Path) -> None:
    content = PROFILES + os.urandom(MB)
    name = shared(31, "--data-binary", "@-", send=content).json["filename"]
    half = tmp_path / "half.root"
    half.write_bytes(content[:300_000])
    url = f"{shared.server.files}/{name}"
    run = subprocess.run(["curl", "-sS", "-C", "-", "-o", half, "-H", f"token: {TOKEN}", url], check=False)
    assert run.returncode == 0
    assert half.read_bytes() == content


def test_connection_outlives_refused_requests(shared: Shared) -> None:
    content = PROFILES + os.urandom(MB)
    name = shared(32, "--data-binary", "@-", send=content).json["filename"]
    mine = {**HEADERS, "runNumber": "33"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", shared.server.port, timeout=30)) as connection:
        connection.connect()
        first = connection.sock
        for method, url, body, headers, status in [
            ("POST", FILES, b"", WRONG, 400),
            ("POST", FILES, b"", {**mine, "runNumber": "x"}, 400),
            ("POST", FILES, b"invalid" * 100, mine, 400),
            ("POST", "/unknown", b"", mine, 404),
            ("PUT", FILES, b"", mine, 405),
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


def test_restless_connection_leaves_others_their_turn(make_server: Callable[..., Server]) -> None:
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


def test_too_many_connections_end_no_worker(make_server: Callable[..., Server], folder: Path) -> None:
    server = make_server("--workers", "1")
    (worker,) = server.workers()
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
        peer.sendall(upload_head(123, f"Content-Length: {len(PROFILES)}", "Connection: close") + PROFILES[:1000])
        wait_until(lambda: bool(incoming(folder)), 10)
        most = len(os.listdir(f"/proc/{worker}/fd")) + 10
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (most, most))
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30)) for _ in range(50)]
        wait_until(lambda: len(os.listdir(f"/proc/{worker}/fd")) == most, 10)
        for connection in idle:
            connection.close()
        wait_until(lambda: len(os.listdir(f"/proc/{worker}/fd")) < most - 9, 30)
        peer.sendall(PROFILES[1000:])
        with peer.makefile("rb") as answer:
            assert answer.readline().startswith(b"HTTP/1.1 200 ")
        assert curl(server.files, headers=AUTH).json == {"files": [NAME]}
    assert server.workers() == [worker]


def test_worker_may_open_what_the_host_allows(make_server: Callable[..., Server]) -> None:
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
def test_wrong_setting_stops_the_start_clearly(tmp_path: Path, name: str, value: str | None) -> None:
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


@pytest.mark.parametrize("sending", SENDING)
def test_sender_of_a_large_file_sees_the_refusal(shared: Shared, zeros: Callable[[int], Path], sending: str) -> None:
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
def test_sender_of_a_huge_file_sees_the_limit(
    small: Server, zeros: Callable[[int], Path], sending: str, size: int
) -> None:
    answer = curl(small.files, *(text.format(zeros(size)) for text in SENDING[sending]))
    check_refused(answer, 413, "1000000 bytes")
    folder = small.log.parent / "data"
    assert visible(folder) == {}
    assert incoming(folder) == []


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
        (["-F", "file=@{}"], "more than one part named `file`"),
        (["-F", "file=text"], "file"),
    ],
    ids=str,
)
def test_doubled_header_or_file_is_named(shared: Shared, sent: Path, arguments: list[str], message: str) -> None:
    arguments = [argument.format(sent) for argument in arguments]
    answer = curl(shared.server.files, "-F", f"file=@{sent}", *arguments)
    check_refused(answer, 400, message)
    assert shared.files(123) == []


@pytest.mark.parametrize(
    "arguments",
    [[], ["-F", "file=@/dev/null"], ["-F", "other=@{}"], ["--data-binary", "@/dev/null"]],
    ids=" ".join,
)
def test_request_without_a_file_is_refused(shared: Shared, sent: Path, arguments: list[str]) -> None:
    answer = curl(shared.server.files, "-X", "POST", *(argument.format(sent) for argument in arguments))
    check_refused(answer, 400, "No file uploaded and the payload was empty")


MALFORMED = [
    b"\r\ntoken: %b\r\n\r\n",
    b"token: %b\r\nGET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\ntoken %b\r\n\r\n",
    b"GET / HTTP/1.1\r\ntoken : %b\r\n\r\n",
    b"GET / HTTP/1.1\r\ntoken: a\r\n %b\r\n\r\n",
    b"GET / HTTP/1.1\r\ntoken: %b\0\r\n\r\n",
    b"GET / HTTP/1.1\r\n%b: x y z\0\r\n\r\n",
    b"GET / HTTP/9.9\r\ntoken: %b\r\n\r\n",
    b"GET / token: %b\r\n\r\n",
    b"POST / HTTP/1.1\r\ntoken: %b\r\nTransfer-Encoding: chunked\r\n\r\n%b\r\n\r\n",
    b"POST / HTTP/1.1\r\ntoken: %b\r\nTransfer-Encoding: %b\r\n\r\n",
    b"POST / HTTP/1.1\r\ntoken: %b\r\nContent-Length: %b\r\n\r\n",
    b"POST / HTTP/1.1\r\ntoken: %b\r\nExpect: %b\r\n\r\n",
]


def test_tokens_stand_in_no_log_answer_or_file(make_server: Callable[..., Server], folder: Path, sent: Path) -> None:
    secrets = {"vErY-sEcReT-tOkEn-0123456789": 200, "nOt-ThE-tOkEn-but-a-secret-elsewhere": 400}
    server = make_server("--access-logfile", "-", "--log-level", "debug", token=next(iter(secrets)))
    said = []
    for token, status in secrets.items():
        mine = {**HEADERS, "token": token}
        assert curl(server.files, "-F", f"file=@{sent}", headers=mine).status == status
        for arguments in (["--data-binary", "invalid"], ["-Fother=x"], ["-XDELETE"], ["-HrunNumber: x", "-d", "x"]):
            said.append(repr(curl(server.files, *arguments, headers=mine)))
        for path in (f"{FILES}/{NAME}", "/", "/nothing", "/rest/api/runs/123", "/rest/api/health", "/metrics"):
            said.append(repr(curl(server.url + path, headers=mine)))
        for request in MALFORMED:
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as peer:
                peer.sendall(request.replace(b"%b", token.encode()))
                peer.shutdown(socket.SHUT_WR)
                answer = peer.makefile("rb").read()
            assert answer.startswith(b"HTTP/1.1 "), request
            said.append(answer.decode())
    server.stop()
    log = server.log.read_text(errors="replace")
    assert "Listening" in log and FILES in log
    said += [log, repr(tree(folder))]
    for token in secrets:
        for secret in (token.lower(), hashlib.sha256(token.encode()).hexdigest()):
            assert not [text for text in said if secret in text.lower()]


@pytest.mark.parametrize(
    "path",
    [
        "/../outside.root", "/%2e%2e/outside.root", "/%2e%2e%2foutside.root", "/..%252foutside.root", "/..;/outside.root",
        "/%c0%ae%c0%ae/outside.root", f"/{NAME}%00", f"/{NAME}%00.txt", f"/%2f{NAME}", f"//{NAME}", f"/x%2f..%2f{NAME}",
        "/.receipts/123", "/%2ereceipts", "/%ff%fe", "?filename=../outside.root", f"?filename={NAME}%00", "?filename=%ff",
        f"?filename={NAME}&filename=../outside.root", "?filename=",
    ],
)  # fmt: skip
def test_encoded_paths_lead_nowhere(shared: Shared, path: str) -> None:
    (shared.folder.parent / "outside.root").write_text("secret")
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", shared.server.port, timeout=20)) as connection:
        connection.request("GET", FILES + path, headers=AUTH)
        response = connection.getresponse()
        assert (response.status in (400, 404), response.headers["Content-Type"]) == (True, "application/json")
        assert b"secret" not in response.read()


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
def test_memory_does_not_grow_with_the_file(
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


def test_each_worker_serves_what_the_other_stored(make_server: Callable[..., Server], folder: Path) -> None:
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


def test_upload_under_way_is_finished_before_a_stop(make_server: Callable[..., Server], folder: Path) -> None:
    server = make_server()
    with socket.create_connection(("127.0.0.1", server.port), 30) as peer:
        peer.sendall(upload_head(123, f"Content-Length: {len(PROFILES)}", "Connection: close") + PROFILES[:1000])
        wait_until(lambda: bool(incoming(folder)), 10)
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


def test_stop_while_a_worker_begins_is_kept(make_server: Callable[..., Server], tmp_path: Path) -> None:
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


# --- reload and several workers ----------------------------------------------------------------------------------------

BOTH = ("--workers", "2")


def ask(server: Server, path: str, headers: Mapping[str, str]) -> tuple[int, str]:
    """Ask on a connection of its own, so that whichever worker is free answers."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
        connection.request("GET", path, headers=dict(headers))
        response = connection.getresponse()
        return response.status, response.read().decode()


def status(server: Server, token: str) -> int:
    return ask(server, FILES, {"token": token})[0]


def write_tokens(path: Path, *lines: str, mode: int = 0o600) -> None:
    new = path.with_name("new")
    new.write_text("\n".join(["[tokens]", *lines, ""]))
    new.chmod(mode)
    new.replace(path)


def hup(server: Server) -> None:
    """Have the token file read again and wait until only workers that have read it are there."""
    before = set(server.workers())
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: len(now := set(server.workers())) == 2 and not now & before, 30)


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def uploads_in(log: str) -> list[str]:
    return re.findall(r"\bupload outcome=.*$", log, re.MULTILINE)


def test_token_is_changed_without_a_gap(make_server: Callable[..., Server], folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokens.ini"
    write_tokens(path, f"EMC = {sha256('secret-old')}", f"HLT = {sha256('secret-hlt')}", mode=0o644)
    server = make_server(*BOTH, tokens_file=str(path), token="")
    master = server.process.pid
    assert [status(server, token) for token in ("secret-old", "secret-new", TOKEN)] == [200, 400, 400]
    valid, seen = "secret-old", list[int]()
    done = threading.Event()

    def sender() -> None:
        while not done.is_set():
            seen.append(status(server, valid))

    thread = threading.Thread(target=sender)
    thread.start()
    try:
        write_tokens(path, f"EMC = {sha256('secret-old')} {sha256('secret-new')}", f"HLT = {sha256('secret-hlt')}")
        hup(server)
        assert [status(server, token) for token in ("secret-old", "secret-new") * 5] == [200] * 10
        valid = "secret-new"
        assert post(server.port, PROFILES, {**HEADERS, "token": "secret-old", "timeStamp": "1"}).status == 200
        assert post(server.port, PROFILES, {**HEADERS, "token": "secret-new", "timeStamp": "2"}).status == 200
        assert post(server.port, PROFILES, {**HEADERS, "token": "secret-hlt", "timeStamp": "3"}).status == 200
        write_tokens(path, f"EMC = {sha256('secret-new')}", f"HLT = {sha256('secret-hlt')}")
        hup(server)
    finally:
        done.set()
        thread.join()
    assert set(seen) == {200}
    assert [status(server, token) for token in ("secret-old", "secret-new", "secret-hlt") * 5] == [400, 200, 200] * 5
    assert (server.process.pid, server.process.poll()) == (master, None)
    assert [one["sender"] for one in receipts(folder)] == ["EMC", "EMC", "HLT"]
    log = server.log.read_text()
    assert [re.findall(r' sender="(\w+)" ', one) for one in uploads_in(log)] == [["EMC"], ["EMC"], ["HLT"]]
    warnings = [one for one in log.splitlines() if "every account" in one]
    assert len(warnings) == 1  # at the start, when everybody could read the file, and not from each worker
    assert str(path) in warnings[0]
    assert "secret-" not in log
    assert not [token for token in ("secret-old", "secret-new", "secret-hlt") if sha256(token) in log]


def test_missing_folder_is_not_made_at_reload(make_server: Callable[..., Server], folder: Path) -> None:
    server = make_server(*BOTH)
    away = folder.rename(folder.with_name("away"))
    hup(server)
    assert post(server.port, PROFILES).status == 503
    assert not folder.exists()
    away.rename(folder)
    assert post(server.port, PROFILES).status == 200


def test_silent_disk_at_reload_ends_nothing(make_server: Callable[..., Server], tmp_path: Path) -> None:
    """As that of a FUSE file system whose process has died."""
    broken, configuration = tmp_path / "broken", tmp_path / "gunicorn.conf.py"
    configuration.write_text(
        (PROJECT / "gunicorn.conf.py").read_text()
        + f"""
genuine = os.statvfs

def statvfs(path):
    if os.path.exists({str(broken)!r}):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return genuine(path)

os.statvfs = statvfs
"""
    )
    server = make_server(*BOTH, "--config", str(configuration))
    broken.touch()
    hup(server)
    broken.unlink()
    assert post(server.port, PROFILES).status == 200


def test_broken_token_file_leaves_the_old_tokens(
    make_server: Callable[..., Server], folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tokens.ini"
    write_tokens(path, f"EMC = {sha256('secret-old')}")
    server = make_server(*BOTH, tokens_file=str(path), token="")
    write_tokens(path, f"EMC = {sha256('secret-new')}", "HLT = secret-in-plain-text")
    for number in (1, 2):
        hup(server)
        said = [one for one in server.log.read_text().splitlines() if "[ERROR]" in one]
        assert len(said) == number
        assert f"DQM_RECEIVER_TOKENS_FILE {path}" in said[-1]
        path.unlink(missing_ok=True)  # the second time it is not there at all
    assert "No such file" in said[-1]
    old = [200, 400] * 4
    assert [status(server, token) for token in ("secret-old", "secret-new") * 4] == old
    for worker in server.workers():
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda dead=worker: len(now := server.workers()) == 2 and dead not in now, 30)  # type: ignore[misc]
    server.wait()
    assert [status(server, token) for token in ("secret-old", "secret-new") * 4] == old
    assert post(server.port, PROFILES, {**HEADERS, "token": "secret-old"}).status == 200
    assert len(uploads_in(server.log.read_text())) == 1
    write_tokens(path, f"EMC = {sha256('secret-new')}")
    hup(server)
    assert [status(server, token) for token in ("secret-old", "secret-new") * 4] == [400, 200] * 4
    assert "secret-" not in server.log.read_text()


def test_metrics_and_receipts_add_up_across_workers(make_server: Callable[..., Server], folder: Path) -> None:
    server = make_server(*BOTH)
    for number in range(12):
        body = (PROFILES, PROFILES, GRAPHS, PROFILES[:-1])[number % 4]
        status = post(server.port, body, {**HEADERS, "timeStamp": str(number // 4)}).status
        assert status == (400 if number % 4 == 3 else 200)

    def check() -> None:
        for _ in range(6):
            text = ask(server, "/metrics", {})[1]
            for outcome in ("stored", "duplicate", "replaced", "rejected"):
                assert re.search(rf'^dqm_receiver_uploads_total{{.*outcome="{outcome}"}} 3.0$', text, re.MULTILINE)
            assert re.search(r'^dqm_receiver_rejections_total{.*reason="invalid_root_file"} 3.0$', text, re.MULTILINE)
            assert ask(server, "/rest/api/runs", AUTH) == (200, '{"runs": [123]}\n')
            assert '"rejected": 3,' in ask(server, "/rest/api/runs/123", AUTH)[1]
            assert ask(server, "/rest/api/health", {})[0] == 200

    check()
    first = server.workers()[0]
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: len(now := server.workers()) == 2 and first not in now, 30)
    check()
    hup(server)
    check()
    assert len(uploads_in(server.log.read_text())) == len(receipts(folder)) == 12
