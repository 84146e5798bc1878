"""What is acknowledged is kept, whatever call fails, whichever process dies, and whatever other processes do meanwhile.

The promise is faults.assert_promise; how the receiver keeps it is not looked at.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import http.client
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import (
    FILES,
    GRAPHS,
    HEADERS,
    HISTOGRAMS,
    NAME,
    PROFILES,
    PROJECT,
    ROUNDS,
    SEED,
    curl,
    post,
    settings,
    visible,
    wait_until,
)
from faults import (
    INVALID,
    Process,
    Sent,
    assert_nothing_left,
    assert_promise,
    faulty_receiver,
    headers_of,
    name_of,
    outcomes,
    replaced,
    sha256,
    upload,
    uploads_in_progress,
    variant,
)
from server import Server
from werkzeug.test import Client, TestResponse

import receiver

# --- a fault at every step ---------------------------------------------------------------------------------------------


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: these tests sync thousands of files and pull no plug."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="dqm-faults-", dir=shared))
    yield folder
    shutil.rmtree(folder)


def assert_promise_at_every_step(base: Path, situation: str, action: str) -> None:
    run = subprocess.run(
        faulty_receiver("every-step", str(base), situation, action),
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    attempts = [json.loads(line) for line in run.stdout.splitlines()]
    assert attempts, "no step was found"
    broken = [f"{attempt['step']}: {attempt['problem']}" for attempt in attempts if attempt["problem"]]
    assert not broken, f"{situation}, {action}:\n" + "\n".join(broken)


SITUATIONS = ("a new folder", "a taken name", "a duplicate", "an invalid file", "a dead writer")


def table(quick: str, *actions: str) -> list[Any]:
    """Return situations and actions for parametrize; only the situations in `quick` (their last words) are not slow."""
    return [
        pytest.param(situation, action, marks=[] if situation.split()[-1] in quick.split() else [pytest.mark.slow])
        for action in actions
        for situation in SITUATIONS
    ]


@pytest.mark.parametrize(
    ("situation", "action"), table("folder name duplicate file writer", "kill before", "kill after")
)
def test_death_at_any_step_keeps_the_promise(memory: Path, situation: str, action: str) -> None:
    assert_promise_at_every_step(memory, situation, action)


@pytest.mark.parametrize(
    ("situation", "error"),
    [*table("folder name duplicate", "EIO"), *table("name", "ENOSPC", "EMFILE", "EACCES"), *table("", "ESTALE")],
)
def test_failure_of_any_call_keeps_the_promise(memory: Path, situation: str, error: str) -> None:
    assert_promise_at_every_step(memory, situation, error)


@pytest.mark.parametrize(
    ("situation", "action"), [*table("name duplicate", "EIO after", "torn", "short"), *table("", "EIO for good")]
)
def test_half_done_and_lasting_failures_keep_the_promise(memory: Path, situation: str, action: str) -> None:
    assert_promise_at_every_step(memory, situation, action)


@pytest.mark.parametrize(("situation", "action"), [*table("name duplicate", "take"), *table("name", "clear", "unlock")])
def test_other_programs_between_two_steps_break_nothing(memory: Path, situation: str, action: str) -> None:
    """Overwatch takes the file; `.incoming/` or `.lock` is removed."""
    assert_promise_at_every_step(memory, situation, action)


@pytest.mark.parametrize(
    ("situation", "action"),
    [
        *table("name duplicate", "rival"),
        *table("folder", "equal rival"),
        *table("", "rival, then EIO"),
        *table("name", "equal rival, then EIO"),
    ],
)
def test_whole_upload_between_two_steps_breaks_nothing(memory: Path, situation: str, action: str) -> None:
    """Another process sends a file of the same name meanwhile; then the first may fail."""
    assert_promise_at_every_step(memory, situation, action)


def test_harness_sees_every_call_that_changes_the_folder(memory: Path) -> None:
    """What the process does past the functions of `os` has no step, and no fault is ever tried there."""
    tracer = shutil.which("strace")
    if tracer is None:
        pytest.skip("strace is not installed")
    folder, trace = memory / "data", memory / "trace"
    calls = "write,pwrite64,writev,rename,renameat,renameat2,link,linkat,unlink,unlinkat,fsync,fdatasync,ftruncate,mkdir,mkdirat"
    prefix = (tracer, "-f", "-y", "-s", "300", "-e", f"trace={calls},openat", "-o", str(trace))
    with contextlib.closing(Process(folder, prefix=prefix)) as process:
        assert [process.post(body).status for body in (PROFILES, HISTOGRAMS, HISTOGRAMS)] == [200] * 3
        seen = process.do("trace")
    made: collections.Counter[str] = collections.Counter()
    for line in trace.read_text().splitlines():
        call = line.split(None, 1)[1].partition("(")[0]
        changes = call != "openat" or re.search(r"O_CREAT|O_TRUNC", line)
        if re.search(rf"^\d+ \w+\([^\n]*[<\"]{re.escape(str(folder))}[/>\"]", line) and changes and "(2<" not in line:
            made[re.sub(r"(at2?|64)$", "", call) if call != "openat" else "create"] += 1
    named = collections.Counter(step.split()[0] for step in seen)
    assert {call: named[call] for call in made} == made


# --- many processes and threads ----------------------------------------------------------------------------------------


@pytest.fixture
def make_process(folder: Path) -> Iterator[Callable[..., Process]]:
    """Return a function that starts a receiver in a process of its own."""
    with contextlib.ExitStack() as stack:
        yield lambda **more: stack.enter_context(contextlib.closing(Process(folder, **more)))


MakeProcess = Callable[..., Process]


class Consumer:
    """Overwatch: takes every visible file away, all the time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.taken = folder, folder.parent / "taken"
        self.taken.mkdir()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._take)
        self._thread.start()

    def _take(self) -> None:
        while not self._over.wait(0.001):
            for path in self.folder.glob("*.root"):
                with contextlib.suppress(FileNotFoundError):
                    path.rename(self.taken / f"{path.name}.{time.monotonic_ns()}")

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def race(processes: list[Process], role: str, rounds: int, threads: int = 1, agent: str = "testagent") -> list[Sent]:
    """Have all processes send at once, and return what was sent; every upload is to be acknowledged."""
    for number, process in enumerate(processes):
        process.begin("race", role=role, number=number, rounds=rounds, threads=threads, agent=agent)
    results = [result for process in processes for result in process.result()]
    assert {status for status, *_ in results} == {200}
    return [(name_of(time_stamp, agent=agent), digest) for _, time_stamp, digest, _ in results]


@pytest.mark.parametrize(("processes", "threads"), [(4, 1), (2, 4)])
def test_equal_files_at_once_are_stored_once(
    make_process: MakeProcess, folder: Path, processes: int, threads: int
) -> None:
    sent = race([make_process() for _ in range(processes)], "equal", 10, threads)
    assert_promise(folder, sent)
    assert_nothing_left(folder)
    assert outcomes(folder) == {"stored": 10, "duplicate": len(sent) - 10}
    assert replaced(folder) == []


@pytest.mark.parametrize(
    ("agent", "processes", "threads"),
    [("testagent", 4, 1), ("testagent", 2, 4), ("A" * 64, 2, 2)],
    ids=["processes", "threads", "the longest name"],
)
def test_different_files_at_once_are_all_kept(
    make_process: MakeProcess, folder: Path, agent: str, processes: int, threads: int
) -> None:
    sent = race([make_process() for _ in range(processes)], "different", 8 * ROUNDS // threads, threads, agent)
    assert_promise(folder, sent)
    assert_nothing_left(folder)
    assert len(visible(folder)) == 2


def test_files_that_take_turns_are_kept(make_process: MakeProcess, folder: Path) -> None:
    sent = race([make_process() for _ in range(4)], "in turns", 12)
    assert_promise(folder, sent)
    assert len(visible(folder)) == 3


@pytest.mark.parametrize("role", ["equal", "different"])
def test_consumer_gets_or_leaves_every_file(make_process: MakeProcess, folder: Path, role: str) -> None:
    processes = [make_process() for _ in range(3)]
    consumer = Consumer(folder)
    try:
        sent = race(processes, role, 15)
    finally:
        consumer.stop()
    assert_promise(folder, sent, taken=consumer.taken)
    assert_nothing_left(folder)
    assert list(consumer.taken.iterdir())


def test_starting_receivers_leave_uploads_in_progress_alone(make_process: MakeProcess, folder: Path) -> None:
    """Each start clears `.incoming/` of what dead processes left, and of nothing else."""
    processes = [make_process() for _ in range(4)]
    for number, process in enumerate(processes):
        role = ("different", "starting")[number % 2]
        process.begin("race", role=role, number=number, rounds=10, threads=2, agent="testagent")
    results = [result for process in processes for result in process.result()]
    assert {status for status, *_ in results} == {200}
    assert_promise(folder, [(name_of(time_stamp), digest) for _, time_stamp, digest, _ in results])


def test_processes_that_start_at_once_share_a_folder(make_process: MakeProcess, folder: Path) -> None:
    processes = [make_process(start=False) for _ in range(4)]
    for process in processes:
        process.begin("start")
    for process in processes:
        process.result()
    assert_promise(folder, race(processes, "different", 2))


@contextlib.contextmanager
def lock_held(folder: Path) -> Iterator[None]:
    """Hold `.lock` as another process would, where the receiver has one."""
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@pytest.mark.parametrize("before", [None, GRAPHS], ids=["a free name", "a taken name"])
def test_one_name_many_times_in_a_batch(make_process: MakeProcess, folder: Path, before: bytes | None) -> None:
    """Uploads that wait for `.lock` are committed together."""
    process = make_process()
    acknowledged = []
    if before is not None:
        assert process.post(before).status == 200
        acknowledged.append((NAME, sha256(before)))
    chance = random.Random(SEED)
    bodies = [PROFILES, HISTOGRAMS, variant(chance), variant(chance)] * 2
    uploads = [upload(body) for body in bodies]
    with lock_held(folder):
        process.begin("batch", uploads=uploads)
        time.sleep(0.5)
    assert [status for status, _ in process.result()] == [200] * len(bodies)
    assert_promise(folder, acknowledged + [(NAME, sha256(body)) for body in bodies])
    assert_nothing_left(folder)


def test_two_servers_on_one_folder_keep_every_file(make_server: Callable[..., Server], folder: Path) -> None:
    servers = [make_server("--workers", "2") for _ in range(2)]
    chance = random.Random(SEED)
    valid = [variant(chance) for _ in range(10 * ROUNDS)] + [PROFILES, GRAPHS] * (4 * ROUNDS)
    bodies = valid + [INVALID] * (4 * ROUNDS)
    chance.shuffle(bodies)
    seen: set[bytes] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            for path in folder.glob("*.root*"):
                with contextlib.suppress(FileNotFoundError):
                    seen.add(path.read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            ports = [servers[number % 2].port for number in range(len(bodies))]
            replies = list(pool.map(post, ports, bodies))
    finally:
        over.set()
        watcher.join()
    assert [reply.status for reply in replies] == [400 if body == INVALID else 200 for body in bodies]
    assert seen <= set(valid), "a file was visible that is not valid"
    assert_promise(folder, [(NAME, sha256(body)) for body in valid])
    answered = collections.Counter(
        "rejected"
        if reply.status == 400
        else next((outcome for outcome in ("duplicate", "replaced") if outcome in reply.json), "stored")
        for reply in replies
    )
    assert outcomes(folder) == answered
    assert "duplicate" not in post(servers[0].port, HISTOGRAMS).json
    assert post(servers[1].port, HISTOGRAMS).json["duplicate"] is True
    assert post(servers[1].port, PROFILES).json["replaced"] is True


@pytest.mark.parametrize("how", ["cut", "invalid", "altered"])
def test_upload_that_fails_late_harms_no_later_one(make_server: Callable[..., Server], folder: Path, how: str) -> None:
    server = make_server("--workers", "1")
    body = INVALID if how == "invalid" else HISTOGRAMS
    peer = begin_upload(server.port, body, 234, **({"sha256": "0" * 64} if how == "altered" else {}))
    wait_until(lambda: len(uploads_in_progress(folder)) == 1, 20)
    assert post(server.port, PROFILES).status == 200
    if how == "cut":
        peer.close()
    else:
        assert end_upload(peer, body)[0] == 400
    wait_until(lambda: uploads_in_progress(folder) == [], 20)
    assert visible(folder) == {NAME: PROFILES}
    assert replaced(folder) == []
    assert_promise(folder, [(NAME, sha256(PROFILES))])


# --- a server that is killed, stopped or reloaded ----------------------------------------------------------------------


def begin_upload(port: int, body: bytes, time_stamp: int, **more: str) -> socket.socket:
    """Send the head and half of a body."""
    peer = socket.create_connection(("127.0.0.1", port), timeout=30)
    fields = {**headers_of(time_stamp), **more, "Content-Length": str(len(body)), "Host": "localhost"}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    peer.sendall(f"POST {FILES} HTTP/1.1\r\n{head}\r\n".encode() + body[: len(body) // 2])
    return peer


def end_upload(peer: socket.socket, body: bytes) -> tuple[int, Any]:
    with peer:
        peer.sendall(body[len(body) // 2 :])
        response = http.client.HTTPResponse(peer)
        response.begin()
        return response.status, json.loads(response.read())


CONTENDED = 3  # time stamps from 0 that are sent again and again, with different files
LARGE = 3 << 20


class Traffic:
    """Senders in threads: small files and large ones, most under names of their own, some under contended names."""

    def __init__(self, port: int, chance: random.Random, senders: int = 6) -> None:
        self.port = port
        self.sent: list[Sent] = []
        self.acknowledged: list[Sent] = []
        self.statuses: collections.Counter[int] = collections.Counter()
        self.broken: list[str] = []
        self._numbers = iter(range(1000, 1_000_000))
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._send, args=(random.Random(chance.random()), sender))
            for sender in range(senders)
        ]
        for thread in self._threads:
            thread.start()

    def _send(self, chance: random.Random, sender: int) -> None:
        while not self._over.is_set():
            with self._lock:
                number = chance.randrange(CONTENDED) if sender == 0 else next(self._numbers)
            body = variant(chance, LARGE if sender % 3 == 2 else 0)
            one = (name_of(number), sha256(body))
            with self._lock:
                self.sent.append(one)
            try:
                status, _ = post(self.port, body, headers_of(number))
            except (OSError, http.client.HTTPException) as error:
                with self._lock:
                    self.broken.append(repr(error))
                time.sleep(0.02)
                continue
            with self._lock:
                self.statuses[status] += 1
                if status == 200:
                    self.acknowledged.append(one)

    def wait_for(self, answers: int, seconds: float = 60.0) -> None:
        """Wait for so many more answers."""
        end = sum(self.statuses.values()) + answers
        wait_until(lambda: sum(self.statuses.values()) >= end, seconds)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a sender has no answer after a minute"


def kill_in_mid_traffic(make_server: Callable[..., Server], folder: Path, rounds: int) -> None:
    chance = random.Random(SEED)
    for _ in range(rounds):
        shutil.rmtree(folder, ignore_errors=True)
        server = make_server()
        traffic = Traffic(server.port, chance)
        traffic.wait_for(5)
        time.sleep(chance.uniform(0.0, 0.5))
        server.kill()
        traffic.stop()
        assert set(traffic.statuses) == {200}
        assert_promise(folder, traffic.acknowledged, unsure=traffic.sent)
        server = make_server()
        assert_nothing_left(folder)
        assert_promise(folder, traffic.acknowledged, unsure=traffic.sent)
        assert post(server.port, PROFILES, headers_of(999_999)).status == 200
        server.stop()


def test_server_killed_in_mid_traffic_loses_nothing(make_server: Callable[..., Server], folder: Path) -> None:
    kill_in_mid_traffic(make_server, folder, min(ROUNDS, 2))


@pytest.mark.slow
def test_server_killed_many_times_loses_nothing(make_server: Callable[..., Server], folder: Path) -> None:
    kill_in_mid_traffic(make_server, folder, max(ROUNDS, 100))


def test_killed_worker_does_not_stop_the_others(make_server: Callable[..., Server], folder: Path) -> None:
    server = make_server("--workers", "3")
    wait_until(lambda: len(server.workers()) == 3, 20)
    traffic = Traffic(server.port, random.Random(SEED))
    killed = []
    for _ in range(ROUNDS):
        traffic.wait_for(5)
        killed.append(server.workers()[0])
        os.kill(killed[-1], signal.SIGKILL)
        wait_until(lambda: len(now := server.workers()) >= 3 and killed[-1] not in now, 20)
    traffic.wait_for(5)
    traffic.stop()
    assert set(traffic.statuses) == {200}
    assert len(traffic.broken) <= 6 * ROUNDS, "more uploads were cut than the killed workers can have had"
    assert_promise(folder, traffic.acknowledged, unsure=traffic.sent)
    workers = server.workers()
    assert len(workers) == 3 and not set(killed) & set(workers)


def uploads_under_way(server: Server, folder: Path, number: int = 10) -> list[tuple[socket.socket, bytes]]:
    """Begin uploads, the time stamps of which begin at 10."""
    bodies = [variant(random.Random(SEED + at), 200_000) for at in range(number)]
    peers = [begin_upload(server.port, body, 10 + at) for at, body in enumerate(bodies)]
    wait_until(lambda: len(uploads_in_progress(folder)) == number, 20)
    return list(zip(peers, bodies, strict=True))


def test_stop_waits_for_uploads_under_way(make_server: Callable[..., Server], folder: Path) -> None:
    server = make_server()
    begun = uploads_under_way(server, folder)
    server.process.terminate()
    time.sleep(1.5)
    assert server.process.poll() is None, "the service stopped with uploads under way"
    assert [end_upload(peer, body)[0] for peer, body in begun] == [200] * len(begun)
    assert server.process.wait(30) == 0
    assert_promise(folder, [(name_of(10 + at), sha256(body)) for at, (_, body) in enumerate(begun)])
    assert_nothing_left(folder)


def test_reload_cuts_no_upload(make_server: Callable[..., Server], folder: Path) -> None:
    server = make_server("--workers", "2")
    wait_until(lambda: len(server.workers()) == 2, 20)
    begun = uploads_under_way(server, folder)
    old = set(server.workers())
    traffic = Traffic(server.port, random.Random(SEED), senders=3)
    traffic.wait_for(3)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(set(server.workers()) - old) == len(old), 20)
    time.sleep(0.5)
    answers = [end_upload(peer, body)[0] for peer, body in begun]
    traffic.wait_for(5)
    traffic.stop()
    assert answers == [200] * len(begun)
    assert traffic.broken == []
    assert set(traffic.statuses) == {200}
    wait_until(lambda: not old & set(server.workers()), 20)
    acknowledged = [(name_of(10 + at), sha256(body)) for at, (_, body) in enumerate(begun)]
    assert_promise(folder, traffic.acknowledged + acknowledged, unsure=traffic.sent)


# --- durable before the answer -----------------------------------------------------------------------------------------

SYNCED = r"f(data)?sync\(\d+<"
ORDERS = {
    "stored": ["sync upload", "name", "sync folder", "write receipt", "sync receipt", "answer"],
    "replaced": ["sync upload", "sync replaced", "name", "sync folder", "write receipt", "sync receipt", "answer"],
    "duplicate": ["sync name", "sync folder", "write receipt", "sync receipt", "answer"],
}


@pytest.mark.parametrize("outcome", ORDERS)
def test_all_is_durable_before_the_answer(
    make_server: Callable[..., Server], folder: Path, tmp_path: Path, outcome: str
) -> None:
    tracer = shutil.which("strace")
    if tracer is None:
        pytest.skip("strace is not installed")
    server = make_server("--workers", "1")
    assert post(server.port, PROFILES, headers_of(1)).status == 200  # so that folders and logs are there
    if outcome != "stored":
        assert post(server.port, HISTOGRAMS if outcome == "duplicate" else GRAPHS).status == 200
    trace = tmp_path / "trace"
    calls = "fsync,fdatasync,link,linkat,rename,renameat,renameat2,write,sendto,sendmsg,writev"
    command = [
        tracer,
        "-f",
        "-y",
        "-s",
        "200",
        "-e",
        f"trace={calls}",
        "-o",
        str(trace),
        "-p",
        str(server.workers()[0]),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        if "attached" not in said:
            pytest.skip(f"a process cannot be traced here: {said.strip()}")
        assert post(server.port, HISTOGRAMS).status == 200
        process.terminate()
    assert outcomes(folder)[outcome]

    text = trace.read_text()
    here = re.escape(str(folder))
    patterns = {
        "sync upload": rf"{SYNCED}{here}/\.incoming/\S+",
        "sync name": rf"{SYNCED}{here}/{re.escape(NAME)}>",
        "sync replaced": rf"{SYNCED}{here}/\.replaced>",
        "name": rf'(link|rename)(at2?)?\([^\n]*\.incoming[^\n]*{re.escape(NAME)}"[^\n]* = 0',
        "sync folder": rf"{SYNCED}{here}>",
        "write receipt": rf"write\(\d+<{here}/\.receipts/\S+\.jsonl>",
        "sync receipt": rf"{SYNCED}{here}/\.receipts/\S+\.jsonl>",
        "answer": r'(sendto|sendmsg|write|writev)\([^\n]*"HTTP/1\.1 200 ',
    }
    # The last of each: what was done before is of no use to an order that was not kept.
    found = {step: [match.start() for match in re.finditer(patterns[step], text)] for step in ORDERS[outcome]}
    assert all(found.values()), f"{ {step: len(places) for step, places in found.items()} }\n{text}"
    assert len(found["answer"]) == 1
    order = [places[-1] for places in found.values()]
    assert order == sorted(order), text


# --- a disk that is full, read-only or gone ----------------------------------------------------------------------------

PAGE = 4096  # bytes that a small file on a tmpfs takes at least
MakeTmpfs = Callable[[str], Path]


def send(client: Client, body: bytes, time_stamp: int = 234, **more: str) -> TestResponse:
    return client.post(FILES, headers={**headers_of(time_stamp), **more}, data=body)


def send_chunked(client: Client, body: bytes) -> TestResponse:
    environ = {"wsgi.input_terminated": True, "wsgi.input": io.BytesIO(body)}
    return client.post(FILES, headers=HEADERS, environ_overrides=environ)


def send_form(client: Client, body: bytes) -> TestResponse:
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="x.root"\r\n\r\n' + body + b"\r\n--x--\r\n"
    return client.post(FILES, headers=HEADERS, data=form, content_type="multipart/form-data; boundary=x")


def assert_refused(response: TestResponse, statuses: set[int], folder: Path) -> None:
    assert response.status_code in statuses, response.text
    answer = response.json
    assert answer is not None and answer["status"] == response.status_code and answer["received"] is None
    assert answer["message"]
    assert str(folder) not in response.text, "the answer tells where the data folder is"
    if (folder / ".incoming").is_dir():
        assert_nothing_left(folder)


def fill(folder: Path, leave: int = 0) -> Path:
    """Fill the disk but for some bytes; return the file that takes the room."""
    filler = folder / ".filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(PAGE))
    os.truncate(filler, filler.stat().st_size // PAGE * PAGE - leave)
    return filler


@pytest.mark.parametrize("send_it", [send, send_chunked, send_form])
def test_disk_full_in_mid_upload_is_507(
    make_tmpfs: MakeTmpfs, send_it: Callable[[Client, bytes], TestResponse]
) -> None:
    folder = make_tmpfs("size=1m")
    client = Client(receiver.create_app(settings(folder)))
    assert_refused(send_it(client, HISTOGRAMS + bytes(3 << 20)), {507}, folder)
    assert visible(folder) == {}
    assert send_it(client, HISTOGRAMS).status_code == 200
    assert_promise(folder, [(NAME, sha256(HISTOGRAMS))])


@pytest.mark.parametrize("before", [None, PROFILES], ids=["a free name", "a taken name"])
@pytest.mark.parametrize("pages", range(5))
def test_disk_full_at_any_page_keeps_the_promise(make_tmpfs: MakeTmpfs, pages: int, before: bytes | None) -> None:
    """There is no room for the file, or for its receipt, or for both."""
    folder = make_tmpfs("size=1m")
    client = Client(receiver.create_app(settings(folder)))
    acknowledged = []
    if before is not None:
        assert send(client, before).status_code == 200
        acknowledged.append((NAME, sha256(before)))
    unchanged = visible(folder)
    filler = fill(folder, leave=pages * PAGE)
    response = send(client, HISTOGRAMS)
    upload = (NAME, sha256(HISTOGRAMS))
    if response.status_code == 200:
        acknowledged.append(upload)
    else:
        assert_refused(response, {503, 507}, folder)
    if response.status_code == 507:
        assert visible(folder) == unchanged
    assert_promise(folder, acknowledged, unsure=[upload])
    filler.unlink()
    assert send(client, HISTOGRAMS).status_code == 200
    assert_promise(folder, [*acknowledged, upload])


def test_invalid_file_is_400_without_room(make_tmpfs: MakeTmpfs) -> None:
    folder = make_tmpfs("size=1m")
    client = Client(receiver.create_app(settings(folder)))
    assert send(client, PROFILES, 1).status_code == 200
    fill(folder, leave=2 * PAGE)
    assert_refused(send(client, HISTOGRAMS[:-100] + bytes(100)), {400}, folder)
    assert NAME not in visible(folder)


def test_reserve_is_never_used(make_tmpfs: MakeTmpfs) -> None:
    folder = make_tmpfs("size=4m")
    client = Client(receiver.create_app(settings(folder, min_free_space=str(3 << 20))))
    assert send(client, PROFILES, 1).status_code == 200
    assert_refused(send(client, HISTOGRAMS + bytes(2 << 20)), {507}, folder)
    (folder / ".filler").write_bytes(bytes(2 << 20))
    time.sleep(1.1)  # free space is looked at once a second
    assert_refused(send(client, HISTOGRAMS), {507}, folder)
    assert_refused(send_chunked(client, HISTOGRAMS), {507}, folder)
    assert client.get(FILES, headers=HEADERS).status_code == 200
    (folder / ".filler").unlink()
    time.sleep(1.1)
    assert send(client, HISTOGRAMS).status_code == 200


@pytest.mark.parametrize("before", [None, PROFILES], ids=["a free name", "a taken name"])
@pytest.mark.parametrize("free", range(7))
def test_disk_without_inodes_keeps_the_promise(make_tmpfs: MakeTmpfs, free: int, before: bytes | None) -> None:
    folder = make_tmpfs("size=1m,nr_inodes=60")
    client = Client(receiver.create_app(settings(folder)))
    acknowledged = []
    if before is not None:
        assert send(client, before).status_code == 200
        acknowledged.append((NAME, sha256(before)))
    unchanged = visible(folder)
    fillers = [folder / f".filler{number}" for number in range(60)]
    with pytest.raises(OSError, match="No space"):
        for filler in fillers:
            filler.touch()
    fillers = [filler for filler in fillers if filler.exists()]
    for _ in range(free):
        fillers.pop().unlink()
    response = send(client, HISTOGRAMS)
    upload = (NAME, sha256(HISTOGRAMS))
    if response.status_code == 200:
        acknowledged.append(upload)
    else:
        assert_refused(response, {503, 507}, folder)
    if response.status_code == 507:
        assert visible(folder) == unchanged
    assert_promise(folder, acknowledged, unsure=[upload])
    for filler in fillers:
        filler.unlink()
    assert send(client, GRAPHS).status_code == 200
    assert_promise(folder, [*acknowledged, (NAME, sha256(GRAPHS))], unsure=[upload])


def test_server_on_a_full_disk_resumes(
    make_server: Callable[..., Server], make_tmpfs: MakeTmpfs, tmp_path: Path
) -> None:
    folder = make_tmpfs("size=8m")
    server = make_server(data_folder=str(folder))
    large = tmp_path / "large.root"
    large.write_bytes(HISTOGRAMS + bytes(20 << 20))
    for arguments in (["-T", str(large)], ["-T", str(large), "-HTransfer-Encoding: chunked"], [f"-Ffile=@{large}"]):
        answer = curl(server.files, "-XPOST", *arguments)
        assert (answer.status, answer.json["status"], answer.json["received"], answer.curl) == (507, 507, None, 0)
    assert visible(folder) == {}
    assert_nothing_left(folder)
    filler = fill(folder)
    time.sleep(1.1)
    assert {post(server.port, HISTOGRAMS).status for _ in range(4)} == {507}
    filler.unlink()
    time.sleep(1.1)
    assert post(server.port, HISTOGRAMS).status == 200
    assert_promise(folder, [(NAME, sha256(HISTOGRAMS))])


def test_read_only_disk_is_503_and_readable(make_process: MakeProcess, folder: Path) -> None:
    process = make_process()
    assert process.post(HISTOGRAMS).status == 200
    process.fault("*", "read-only")
    assert [process.post(body).status for body in (PROFILES, HISTOGRAMS, b"invalid")] == [503, 503, 503]
    assert process.get(f"{FILES}/{NAME}").status == 200
    process.fault("", "nothing")
    assert visible(folder) == {NAME: HISTOGRAMS}
    assert process.post(PROFILES).status == 200
    assert_promise(folder, [(NAME, sha256(HISTOGRAMS)), (NAME, sha256(PROFILES))])


def test_receiver_starts_on_a_read_only_disk(make_process: MakeProcess) -> None:
    assert make_process().post(HISTOGRAMS).status == 200
    process = make_process(start=False)
    process.fault("*", "read-only")
    process.do("start")
    assert process.get(f"{FILES}/{NAME}").status == 200
    assert process.post(PROFILES).status == 503


def sends_in_time(client: Client, body: bytes, time_stamp: int = 234) -> bool:
    """Send a file until it is acknowledged, which may take a second or two after the folder has come back."""
    for _ in range(30):
        response = send(client, body, time_stamp)
        if response.status_code == 200:
            return True
        assert response.status_code == 503, response.text
        time.sleep(0.1)
    return False


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def put_file_in_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


@pytest.mark.parametrize("lose", [remove, put_file_in_place])
def test_missing_folder_is_503_and_stays_missing(client: Client, folder: Path, lose: Callable[[Path], None]) -> None:
    """A folder that is gone may be a disk that is not mounted."""
    assert send(client, HISTOGRAMS).status_code == 200
    lose(folder)
    time.sleep(1.1)
    assert_refused(send(client, HISTOGRAMS), {503}, folder)
    for path in (FILES, f"{FILES}/{NAME}", "/rest/api/runs", "/rest/api/runs/123", "/rest/api/health"):
        assert_refused(client.get(path, headers=HEADERS), {503}, folder)
    assert not folder.is_dir()
    if folder.exists():
        folder.unlink()
    folder.mkdir()
    assert sends_in_time(client, HISTOGRAMS)
    assert_promise(folder, [(NAME, sha256(HISTOGRAMS))])


def test_unmounted_disk_is_503_and_nothing_goes_below(make_tmpfs: MakeTmpfs, tmp_path: Path) -> None:
    folder, elsewhere = make_tmpfs("size=1m"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    client = Client(receiver.create_app(settings(folder)))
    subprocess.run(["mount", "--bind", folder, elsewhere], check=True)
    try:
        subprocess.run(["umount", "--lazy", folder], check=True)
        time.sleep(1.1)
        assert_refused(send(client, GRAPHS), {503}, folder)
        for path in (FILES, "/rest/api/health"):
            assert_refused(client.get(path, headers=HEADERS), {503}, folder)
        assert visible(folder) == {}
        subprocess.run(["mount", "--bind", elsewhere, folder], check=True)
        assert sends_in_time(client, GRAPHS)
        assert visible(folder) == visible(elsewhere) == {NAME: GRAPHS}
    finally:
        subprocess.run(["umount", "--lazy", elsewhere], check=True)


def test_folder_lost_in_mid_upload_is_503(client: Client, folder: Path) -> None:
    class Body(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            shutil.rmtree(folder, ignore_errors=True)
            return super().read(size)

    environ = {"wsgi.input_terminated": True, "wsgi.input": Body(HISTOGRAMS)}
    response = client.post(FILES, headers=HEADERS, environ_overrides=environ)
    assert_refused(response, {503}, folder)
    folder.mkdir(exist_ok=True)
    assert sends_in_time(client, HISTOGRAMS)


@pytest.mark.parametrize("name", [".incoming", ".replaced", ".rejected", ".receipts"])
def test_removed_hidden_folder_comes_back(client: Client, folder: Path, name: str) -> None:
    assert send(client, HISTOGRAMS).status_code == 200
    shutil.rmtree(folder / name, ignore_errors=True)
    assert send(client, b"invalid").status_code in (400, 503)
    for body in (PROFILES, PROFILES, GRAPHS):
        shutil.rmtree(folder / name, ignore_errors=True)
        assert sends_in_time(client, body)
    assert visible(folder) == {NAME: GRAPHS}
    assert client.get(FILES, headers=HEADERS).status_code == 200


# --- failures, recovery and the lock -----------------------------------------------------------------------------------


def writers(folder: Path) -> set[str]:
    return {path.name for path in (folder / ".incoming").iterdir()}


def logs(folder: Path) -> list[Path]:
    return sorted((folder / ".receipts" / "123").glob("*.jsonl"))


def test_process_stops_after_a_failed_folder_fsync(make_process: MakeProcess, folder: Path) -> None:
    """The kernel may report the next fsync as good though the names are not durable."""
    process = make_process()
    assert [process.post(body).status for body in (PROFILES, GRAPHS)] == [200, 200]
    process.fault("fsync .", "EIO")
    assert process.post(HISTOGRAMS).status == 503
    assert [process.post(PROFILES, time_stamp).status for time_stamp in (234, 1, 2)] == [503] * 3
    assert process.get("/rest/api/health").status == 503
    sent = [(NAME, sha256(body)) for body in (PROFILES, GRAPHS)]
    assert_promise(folder, sent, unsure=[(NAME, sha256(HISTOGRAMS))])
    restarted = make_process()
    assert restarted.post(HISTOGRAMS).json["duplicate"] is True
    assert restarted.post(PROFILES, 1).status == 200
    assert_promise(folder, [*sent, (NAME, sha256(HISTOGRAMS)), (name_of(1), sha256(PROFILES))])


@pytest.mark.parametrize(
    ("step", "action"),
    [("write", "torn"), ("write", "ENOSPC"), ("write", "EIO"), ("fsync", "EIO"), ("fsync", "ENOSPC")],
)
def test_failed_receipt_begins_a_new_log(make_process: MakeProcess, folder: Path, step: str, action: str) -> None:
    """The file stays, as it is after its commit point; no later receipt is glued to a torn one."""
    process = make_process()
    assert process.post(PROFILES).status == 200
    process.fault(f"{step} .receipts/*.jsonl", action)
    assert process.post(HISTOGRAMS).status == 503
    assert visible(folder) == {NAME: HISTOGRAMS}
    assert process.post(HISTOGRAMS).json["duplicate"] is True
    assert process.post(GRAPHS, 1).status == 200
    sent = [(NAME, sha256(PROFILES)), (NAME, sha256(HISTOGRAMS)), (name_of(1), sha256(GRAPHS))]
    assert_promise(folder, sent)
    assert len(logs(folder)) == 2
    for log in logs(folder):
        *lines, last = log.read_bytes().split(b"\n")
        assert all(json.loads(line)["outcome"] for line in lines)
        assert last == b"" or action == "torn"


@pytest.mark.parametrize("error", ["EIO", "ESTALE", "ETIMEDOUT"])
@pytest.mark.parametrize("before", [None, PROFILES], ids=["a free name", "a taken name"])
def test_failed_rename_that_happened_is_a_duplicate_later(
    make_process: MakeProcess, folder: Path, error: str, before: bytes | None
) -> None:
    """A network file system may report a rename as failed that it has made."""
    process = make_process()
    acknowledged = []
    if before is not None:
        assert process.post(before).status == 200
        acknowledged.append((NAME, sha256(before)))
    process.fault("rename * -> NAME", f"{error} after")
    assert process.post(HISTOGRAMS).status == 503
    assert visible(folder) == {NAME: HISTOGRAMS}
    assert process.post(HISTOGRAMS).json["duplicate"] is True
    assert_promise(folder, [*acknowledged, (NAME, sha256(HISTOGRAMS))])
    assert_nothing_left(folder)


def test_name_that_keeps_changing_is_503(make_process: MakeProcess, folder: Path) -> None:
    process = make_process()
    assert process.post(PROFILES).status == 200
    process.fault("flock .lock", "touch NAME", times=1000)
    assert process.post(HISTOGRAMS).status == 503
    assert visible(folder) == {NAME: PROFILES}
    assert_nothing_left(folder)
    process.fault("", "nothing")
    assert process.post(HISTOGRAMS).status == 200
    assert_promise(folder, [(NAME, sha256(PROFILES)), (NAME, sha256(HISTOGRAMS))])


def test_forked_child_is_a_writer_of_its_own(make_process: MakeProcess, folder: Path) -> None:
    process = make_process()
    assert process.post(PROFILES).status == 200
    parent = writers(folder)
    replies = process.fork(upload(HISTOGRAMS), upload(GRAPHS, 1))
    assert [reply.status for reply in replies] == [200, 200]
    assert process.post(GRAPHS).status == 200
    assert len(parent) == 1 and len(writers(folder)) == 2
    assert len(logs(folder)) == 2
    process.kill()
    make_process()
    assert len(writers(folder)) == 1 and not parent & writers(folder), "the child keeps its parent's lock"
    sent = [(NAME, sha256(body)) for body in (PROFILES, HISTOGRAMS, GRAPHS)]
    assert_promise(folder, [*sent, (name_of(1), sha256(GRAPHS))])


@pytest.mark.parametrize("uploads", [[], [upload(GRAPHS, 1)]], ids=["an idle child", "a child that sends"])
def test_forked_child_does_not_hold_the_lock(
    make_process: MakeProcess, folder: Path, uploads: list[dict[str, Any]]
) -> None:
    """An flock belongs to the open file, so a descriptor that a child has inherited would keep it."""
    process, other = make_process(), make_process()
    assert [one.post(PROFILES).status for one in (process, other)] == [200, 200]
    process.fork(*uploads)
    process.fault("rename * -> NAME", "kill before")
    process.begin_post(HISTOGRAMS)
    with pytest.raises(ConnectionError):
        process.result()
    assert other.post(HISTOGRAMS).status == 200
    assert_promise(
        folder, [(NAME, sha256(PROFILES)), (NAME, sha256(HISTOGRAMS))], unsure=[(name_of(1), sha256(GRAPHS))]
    )


def test_removed_lock_is_noticed(make_process: MakeProcess, folder: Path) -> None:
    process, other = make_process(), make_process()
    assert [one.post(PROFILES).status for one in (process, other)] == [200, 200]
    (folder / ".lock").unlink()
    with lock_held(folder):
        assert process.post(HISTOGRAMS).status == 503
    (folder / ".lock").unlink()
    assert_promise(folder, [*race([process, other], "different", 5), (NAME, sha256(PROFILES))])


def test_removed_writer_becomes_a_new_one(make_process: MakeProcess, folder: Path) -> None:
    process = make_process()
    assert process.post(PROFILES).status == 200
    before = writers(folder)
    shutil.rmtree(folder / ".incoming" / before.pop())
    wait_until(lambda: process.post(HISTOGRAMS).status == 200, 5)
    (now,) = writers(folder)
    make_process()
    assert writers(folder) == {now}, "a start has taken a living writer for dead"
    assert process.post(GRAPHS).status == 200
    assert_promise(folder, [(NAME, sha256(body)) for body in (PROFILES, HISTOGRAMS, GRAPHS)])


def wait_until_stopped(process: Process) -> None:
    stat = Path(f"/proc/{process.pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", 20)


def test_stopped_process_with_the_lock_makes_others_503(make_process: MakeProcess, folder: Path) -> None:
    process, other = make_process(), make_process()
    assert other.post(PROFILES).status == 200
    process.fault("rename * -> NAME", "stop")
    process.begin_post(HISTOGRAMS)
    wait_until_stopped(process)
    started = make_process()
    for one in (other, started):
        assert one.post(GRAPHS).status == 503
        assert one.get("/rest/api/health").status == 503
    assert len(uploads_in_progress(folder)) == 1
    process.signal(signal.SIGCONT)
    assert process.result()[0] == 200
    assert [one.post(GRAPHS).status for one in (other, started)] == [200, 200]
    assert_promise(folder, [(NAME, sha256(body)) for body in (PROFILES, HISTOGRAMS, GRAPHS)])
    assert_nothing_left(folder)


def test_recovery_deletes_dead_writers_only(make_process: MakeProcess, folder: Path) -> None:
    living, dead = make_process(), make_process()
    living.fault("write .incoming/*", "stop")
    living.begin_post(HISTOGRAMS)
    wait_until_stopped(living)
    alive = writers(folder)
    dead.fault("rename * -> *", "kill before")
    dead.begin_post(PROFILES, 1)
    with pytest.raises(ConnectionError):
        dead.result()
    assert len(alive) == 1 and len(writers(folder)) == 2
    (folder / ".incoming" / "without-a-lock").mkdir()
    make_process()
    assert writers(folder) == alive
    living.signal(signal.SIGCONT)
    assert living.result()[0] == 200
    assert_promise(folder, [(NAME, sha256(HISTOGRAMS))])


@pytest.mark.parametrize("name", [".incoming", ".replaced", ".receipts"])
def test_swapped_hidden_folder_holds_nothing_acknowledged(
    make_process: MakeProcess, folder: Path, tmp_path: Path, name: str
) -> None:
    """An account that may write to the data folder moves a hidden folder away and puts a link to another in its place."""
    process = make_process()
    assert [process.post(body).status for body in (PROFILES, GRAPHS)] == [200, 200]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / name).rename(tmp_path / "away")
    (folder / name).symlink_to(elsewhere)
    time.sleep(1.1)  # paths and descriptors are compared once a second
    assert process.post(HISTOGRAMS).status == 503
    assert list(elsewhere.iterdir()) == []
    (folder / name).unlink()
    (tmp_path / "away").rename(folder / name)
    wait_until(lambda: process.post(HISTOGRAMS).status == 200, 5)
    assert_promise(folder, [(NAME, sha256(body)) for body in (PROFILES, GRAPHS, HISTOGRAMS)])
