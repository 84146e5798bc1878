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
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
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
    connect,
    curl,
    digest,
    exchange,
    head,
    incoming,
    post,
    read_answer,
    receipts,
    settings,
    tree,
    visible,
    wait_until,
    write_tokens,
    zeros,
)
from server import Server, free_port

MB = 1 << 20
LIMIT = 32 * MB  # of the shared server
MAX_GROWTH = 48 * MB  # of a worker's memory, whatever the size of a file


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    """A ROOT file of a sender."""
    path = tmp_path / "aTestFile.root"
    path.write_bytes(HISTOGRAMS)
    return path


def files_of(server: Server, run: int) -> list[bytes]:
    return [content for name, content in visible(server.folder).items() if f"_{run}_" in name]


def check_refused(answer: Answer, status: int, message: str) -> None:
    assert (answer.curl, answer.error) == (0, "")
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert answer.json["status"] == status
    assert answer.json["received"] is None
    assert message in answer.json["message"]


# --- the main path -----------------------------------------------------------------------------------------------------


def test_documented_curl_line_stores_the_file(shared: Server, sent: Path) -> None:
    line = (
        'curl -F file=@aTestFile.root -H "token: abcd" -H "runNumber: 123" -H "timeStamp: 234" -H "amoreAgent: testagent" '
        '-H "dataStatus: 1" http://127.0.0.1:8080/rest/api/files'
    ).replace("8080", str(shared.port))
    run = subprocess.run(shlex.split(line), cwd=sent.parent, capture_output=True, check=True)
    answer = json.loads(run.stdout)
    assert list(answer) == ["status", "filename", "message", "received", "size", "sha256"]
    assert (answer["status"], answer["filename"]) == (200, "testagenthistos_123_DQM_1970_01_01_01_03_54.root")
    assert answer["message"] == "Successfully received file and extracted information"
    assert answer["received"]["hTH1C"] == "Obj name: hTH1C, Obj IsA() Name: TH1C"
    assert (answer["size"], answer["sha256"]) == (len(HISTOGRAMS), hashlib.sha256(HISTOGRAMS).hexdigest())
    assert visible(shared.folder)["testagenthistos_123_DQM_1970_01_01_01_03_54.root"] == HISTOGRAMS
    assert curl(f"{shared.files}?runNumber=123", headers=AUTH).json == {"files": [NAME]}
    assert [receipt["outcome"] for receipt in receipts(shared.folder)] == ["stored"]
    assert incoming(shared.folder) == []
    wait_until(lambda: len(shared.workers()) == min(len(os.sched_getaffinity(0)), 4), 10)


SENDING = {
    "form": ["-F", "file=@{}"],
    "form without Expect": ["-F", "file=@{}", "-HExpect:"],
    "form, chunked": ["-F", "file=@{}", "-HTransfer-Encoding: chunked"],
    "bare": ["--data-binary", "@{}"],
    "bare without Expect": ["-T", "{}", "-X", "POST", "-HExpect:"],
    "bare with Expect": ["-T", "{}", "-X", "POST", "-HExpect: 100-continue"],
    "bare, chunked": ["-T", "{}", "-X", "POST", "-HTransfer-Encoding: chunked", "-HExpect:"],
    "bare, last of its connection": ["-T", "{}", "-X", "POST", "-HConnection: close", "-HExpect:"],
}
MORE = {
    "bare, with a type": ["--data-binary", "@{}", "-HContent-Type: application/octet-stream"],
    "form with another name": ["-F", "file=@{};filename=../../x.root;type=application/x-root"],
    "form with a field": ["-F", "comment=histograms", "-F", "file=@{}"],
    "form with Expect": ["-F", "file=@{}", "-HExpect: 100-continue"],
}


@pytest.mark.parametrize(("run", "arguments"), [*enumerate([*SENDING.values(), *MORE.values()])], ids=[*SENDING, *MORE])
def test_curl_may_send_in_many_ways(shared: Server, sent: Path, run: int, arguments: list[str]) -> None:
    filled = (argument.format(sent) for argument in arguments)
    answer = curl(shared.files, *filled, headers={**HEADERS, "runNumber": str(run)})
    assert (answer.status, answer.json["size"]) == (200, len(HISTOGRAMS))
    assert files_of(shared, run) == [HISTOGRAMS]


def test_one_connection_serves_a_whole_session(shared: Server) -> None:
    content = PROFILES + os.urandom(3 * MB)  # bytes after the end of a ROOT file are accepted
    size, mine = len(content), {**HEADERS, "runNumber": "30"}
    by_name = post(shared.port, content, mine).json["filename"]
    by_path, by_query = f"{FILES}/{by_name}", f"{FILES}?filename={by_name}"
    session: list[tuple[str, str, dict[str, str], Any, int, bytes | None]] = [
        ("POST", FILES, {**mine, "token": "wrong"}, b"", 400, None),
        ("POST", FILES, {**mine, "runNumber": "x"}, b"", 400, None),
        ("POST", FILES, mine, b"invalid" * 100, 400, None),
        ("POST", "/unknown", mine, b"", 404, None),
        ("PUT", FILES, mine, b"", 405, None),
        ("GET", f"{FILES}/absent", AUTH, None, 404, None),
        ("GET", by_query, AUTH, None, 200, content),
        ("GET", by_query, {**AUTH, "Range": "bytes=0-0"}, None, 206, content[:1]),
        ("GET", by_path, AUTH, None, 200, content),
        ("HEAD", by_path, AUTH, None, 200, b""),
        ("GET", by_path, {**AUTH, "Range": "bytes=0-0"}, None, 206, content[:1]),
        ("GET", by_path, {**AUTH, "Range": f"bytes=0-{MB}"}, None, 206, content[: MB + 1]),
        ("GET", by_path, {**AUTH, "Range": f"bytes={MB + 1}-{2 * MB}"}, None, 206, content[MB + 1 : 2 * MB + 1]),
        ("GET", by_path, {**AUTH, "Range": "bytes=300000-"}, None, 206, content[300_000:]),  # as curl -C - resumes
        ("GET", by_path, {**AUTH, "Range": f"bytes={size - 5}-{size - 1}"}, None, 206, content[-5:]),
        ("GET", by_path, {**AUTH, "Range": "bytes=-100"}, None, 206, content[-100:]),
        ("GET", by_path, {**AUTH, "Range": f"bytes={size}-"}, None, 416, None),
        ("GET", by_path, {**AUTH, "If-None-Match": "*"}, None, 304, b""),
        ("GET", by_path, {**AUTH, "If-Match": '"other"'}, None, 412, None),
        ("GET", by_path, {**AUTH, "Range": "bytes=0-9", "Want-Repr-Digest": "sha-256=1"}, None, 206, content[:10]),
        ("POST", FILES, mine, iter([PROFILES[:100], PROFILES[100:]]), 200, None),
    ]
    heads = {}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", shared.port, timeout=30)) as connection:
        connection.connect()
        first = connection.sock
        for method, path, headers, body, status, expected in session:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            answer = response.read()
            assert (method, path, headers, response.status) == (method, path, headers, status)
            if expected is None:
                assert json.loads(answer)["status"] == status
            else:
                assert answer == expected
            heads[method, path, status] = response.headers
            assert connection.sock is first
    whole, part = heads["GET", by_path, 200], heads["GET", by_path, 206]
    assert whole["Content-Length"] == str(size)
    for name in ("Content-Length", "Content-Type", "ETag", "Last-Modified", "Accept-Ranges"):
        assert heads["HEAD", by_path, 200][name] == whole[name]
    assert part["Content-Range"] == f"bytes 0-9/{size}"
    assert part["Repr-Digest"] == f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


def test_restless_connection_leaves_others_their_turn(make_server: Callable[..., Server]) -> None:
    port = make_server("--workers", "1", "--threads", "1").port
    requests = 1500
    with connect(port) as restless, connect(port) as other, ThreadPoolExecutor() as pool:
        sending = pool.submit(restless.sendall, head("/", method="GET", **AUTH) * requests)
        assert read_answer(restless)[0] == 400
        for _ in range(3):
            other.sendall(head(FILES, method="GET", **AUTH))
            assert read_answer(other) == (200, b'{"files": []}\n')
        so_far = restless.recv(16 * MB, socket.MSG_PEEK)
        assert so_far.count(b"HTTP/1.1 400 ") < requests - 1
        assert {read_answer(restless)[0] for _ in range(requests - 1)} == {400}
        sending.result(60)


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


def test_wrong_setting_stops_the_start_clearly(tmp_path: Path) -> None:
    environ = {name: text for name, text in os.environ.items() if not name.startswith("DQM_RECEIVER_")}
    environ.update(settings(tmp_path / "data", max_file_size="2 GiB"))
    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{free_port()}"]
    run = subprocess.run(command, cwd=PROJECT, env=environ, capture_output=True, text=True, timeout=30, check=False)
    said = run.stdout + run.stderr
    assert run.returncode != 0
    assert "Traceback" not in said
    assert sum("DQM_RECEIVER_MAX_FILE_SIZE" in line for line in said.splitlines()) == 1
    assert len(said.splitlines()) <= 3


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sending", SENDING)
def test_sender_of_a_large_file_sees_the_refusal(shared: Server, tmp_path: Path, sending: str) -> None:
    for method, path, changes, size, status, message in [
        ("POST", FILES, {"token": "wrong"}, 20 * MB, 400, "token"),
        ("POST", FILES, {"runNumber": "x"}, 20 * MB, 400, "runNumber"),
        ("POST", FILES, {}, 20 * MB, 400, "not valid"),
        ("POST", FILES, {}, LIMIT + 1, 413, f"{LIMIT} bytes"),
        ("POST", FILES, {}, 60 * MB, 413, f"{LIMIT} bytes"),
        ("POST", "/unknown", {}, 20 * MB, 404, ""),
        ("PUT", FILES, {}, 20 * MB, 405, ""),
    ]:
        file = zeros(tmp_path / str(size), size)
        arguments = [text.format(file) for text in SENDING[sending]]
        headers = {**HEADERS, "runNumber": "40", **changes}
        check_refused(curl(shared.url + path, *arguments, "-X", method, headers=headers), status, message)
    assert files_of(shared, 40) == []
    assert incoming(shared.folder) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-Htoken: abcd"], "Received token, but it is invalid!"),
        (["-HrunNumber: 41"], "runNumber"),
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
def test_doubled_header_or_file_is_named(shared: Server, sent: Path, arguments: list[str], message: str) -> None:
    arguments = ["-F", f"file=@{sent}", *(argument.format(sent) for argument in arguments)]
    check_refused(curl(shared.files, *arguments, headers={**HEADERS, "runNumber": "41"}), 400, message)
    assert files_of(shared, 41) == []


@pytest.mark.parametrize("arguments", [[], ["-F", "file=@/dev/null"], ["--data-binary", "@/dev/null"]], ids=" ".join)
def test_request_without_a_file_is_refused(shared: Server, arguments: list[str]) -> None:
    check_refused(curl(shared.files, "-X", "POST", *arguments), 400, "No file uploaded and the payload was empty")


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
            answer = exchange(server.port, request.replace(b"%b", token.encode()))
            assert answer.startswith(b"HTTP/1.1 "), request
            said.append(answer.decode())
    server.stop()
    log = server.log.read_text(errors="replace")
    assert "Listening" in log and FILES in log
    said += [log, repr(tree(folder))]
    for token in secrets:
        for secret in (token.lower(), digest(token)):
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
def test_encoded_paths_lead_nowhere(shared: Server, path: str) -> None:
    (shared.folder.parent / "outside.root").write_text("secret")
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", shared.port, timeout=20)) as connection:
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


@pytest.mark.parametrize("size", [100 * MB, pytest.param(1000 * MB, marks=pytest.mark.slow)], ids=["100 MB", "1 GB"])
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

BOTH = ("--workers", "2")
FAULTY = str(Path(__file__).with_name("gunicorn_faults.py"))


def test_each_worker_serves_what_the_other_stored(make_server: Callable[..., Server], folder: Path) -> None:
    server = make_server(*BOTH)
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


def test_stop_while_a_worker_begins_is_kept(
    make_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW_WORKER", "2")
    server = make_server(*BOTH, "--config", FAULTY)
    wait_until(lambda: len(server.workers()) == 2, 10)
    server.process.terminate()
    try:
        assert server.process.wait(10) == 0
    finally:
        if server.process.poll() is None:
            server.kill()


# --- reload and several workers ----------------------------------------------------------------------------------------


def ask(server: Server, path: str, headers: Mapping[str, str]) -> tuple[int, str]:
    """Ask on a connection of its own, so that whichever worker is free answers."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
        connection.request("GET", path, headers=dict(headers))
        response = connection.getresponse()
        return response.status, response.read().decode()


def status(server: Server, token: str) -> int:
    return ask(server, FILES, {"token": token})[0]


def hup(server: Server) -> None:
    """Have the token file read again and wait until only workers that have read it are there."""
    before = set(server.workers())
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: len(now := set(server.workers())) == 2 and not now & before, 30)


def uploads_in(log: str) -> list[str]:
    return re.findall(r"\bupload outcome=.*$", log, re.MULTILINE)


def lines(*tokens: str) -> str:
    return "\n".join(["[tokens]", *tokens, ""])


def test_token_is_changed_without_a_gap(make_server: Callable[..., Server], folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokens.ini"
    write_tokens(path, lines(f"EMC = {digest('secret-old')}", f"HLT = {digest('secret-hlt')}"), mode=0o644)
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
        write_tokens(
            path, lines(f"EMC = {digest('secret-old')} {digest('secret-new')}", f"HLT = {digest('secret-hlt')}")
        )
        hup(server)
        assert [status(server, token) for token in ("secret-old", "secret-new") * 5] == [200] * 10
        valid = "secret-new"
        assert post(server.port, PROFILES, {**HEADERS, "token": "secret-old", "timeStamp": "1"}).status == 200
        assert post(server.port, PROFILES, {**HEADERS, "token": "secret-new", "timeStamp": "2"}).status == 200
        assert post(server.port, PROFILES, {**HEADERS, "token": "secret-hlt", "timeStamp": "3"}).status == 200
        write_tokens(path, lines(f"EMC = {digest('secret-new')}", f"HLT = {digest('secret-hlt')}"))
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
    assert not [token for token in ("secret-old", "secret-new", "secret-hlt") if digest(token) in log]


def test_failing_folder_at_reload_ends_nothing(
    make_server: Callable[..., Server], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    monkeypatch.setenv("BROKEN_DISK", str(broken))
    server = make_server(*BOTH, "--config", FAULTY)
    away = folder.rename(folder.with_name("away"))
    hup(server)
    assert post(server.port, PROFILES).status == 503
    assert not folder.exists()
    away.rename(folder)
    assert post(server.port, PROFILES).status == 200
    broken.touch()  # as a FUSE file system is whose process has died
    hup(server)
    broken.unlink()
    assert post(server.port, PROFILES).status == 200


def test_broken_token_file_leaves_the_old_tokens(
    make_server: Callable[..., Server], folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tokens.ini"
    write_tokens(path, lines(f"EMC = {digest('secret-old')}"))
    server = make_server(*BOTH, tokens_file=str(path), token="")
    write_tokens(path, lines(f"EMC = {digest('secret-new')}", "HLT = secret-in-plain-text"))
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
    write_tokens(path, lines(f"EMC = {digest('secret-new')}"))
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
