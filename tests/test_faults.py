"""What is acknowledged is kept, whatever call fails, whichever process dies, and whatever other processes do meanwhile.

The promise is faults.assert_promise; how the receiver keeps it is not looked at.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import (
    FILES,
    GRAPHS,
    HEADERS,
    HIDDEN,
    HISTOGRAMS,
    NAME,
    PROFILES,
    ROUNDS,
    SEED,
    curl,
    hidden,
    incoming,
    post,
    send,
    send_chunked,
    settings,
    tree,
    visible,
    wait_until,
)
from faults import (
    INVALID,
    ForkServer,
    Process,
    Sent,
    assert_nothing_left,
    assert_promise,
    begin_upload,
    empty,
    end_upload,
    headers_of,
    name_of,
    outcomes,
    sent,
    sha256,
    upload,
    variant,
)
from history import History, Upload, judge, look
from server import Server
from traffic import Consumer, Traffic
from werkzeug.test import Client, TestResponse

import receiver

PassTime = Callable[[float], None]

# --- a fault at every step ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    with contextlib.closing(ForkServer()) as server:
        yield server


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: these tests sync thousands of files and pull no plug."""
    shared = "/dev/shm"
    with tempfile.TemporaryDirectory(prefix="dqm-", dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


SITUATIONS = ("a new folder", "a taken name", "a duplicate", "an invalid file", "a dead writer")


def table(quick: str, *actions: str) -> list[Any]:
    """Return situations and actions for parametrize; only the situations in `quick` (their last words) are not slow."""
    return [
        pytest.param(situation, action, marks=[] if situation.split()[-1] in quick.split() else [pytest.mark.slow])
        for action in actions
        for situation in SITUATIONS
    ]


@pytest.mark.parametrize(
    ("situation", "action"),
    [
        # The process dies: after a call is before the next one, so the normal form tries one of them.
        *table("folder name duplicate file writer", "kill before"),
        *table("", "kill after"),
        # A call fails: before it, after it, half done, or for good.
        *table("folder name duplicate", "EIO"),
        *table("name", "ENOSPC", "EMFILE", "EACCES"),
        *table("name duplicate", "EIO after", "torn", "short"),
        *table("", "ESTALE", "EIO for good"),
        # Overwatch takes the file; `.incoming/` or `.lock` is removed.
        *table("name duplicate", "take"),
        *table("name", "clear", "unlock"),
        # Another process sends a file of the same name; then the first may fail.
        *table("name duplicate", "rival"),
        *table("folder", "equal rival"),
        *table("", "rival, then EIO"),
        *table("name", "equal rival, then EIO"),
    ],
)
def test_promise_holds_at_every_step(fork_server: ForkServer, memory: Path, situation: str, action: str) -> None:
    with contextlib.closing(Process(fork_server, memory, kind="EveryStep", start=False)) as process:
        attempts = process.do("attempts", situation=situation, action=action)
    assert attempts, "no step was found"
    broken = [f"{attempt['step']}: {attempt['problem']}" for attempt in attempts if attempt["problem"]]
    assert not broken, "\n".join(broken)


def test_harness_sees_every_call_that_changes_the_folder(memory: Path) -> None:
    """What the process does past the functions of `os` has no step, and no fault is ever tried there."""
    tracer = shutil.which("strace")
    if tracer is None:
        pytest.skip("strace is not installed")
    folder, trace = memory / "data", memory / "trace"
    calls = "openat,write,pwrite64,writev,sendfile,copy_file_range,fsync,fdatasync,ftruncate,mkdir,mkdirat"
    calls += ",rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat"
    tracing = ForkServer(tracer, "-f", "-y", "-s", "300", "-e", f"trace={calls}", "-o", str(trace))
    with contextlib.closing(tracing), contextlib.closing(Process(tracing, folder)) as process:
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


MakeProcess = Callable[..., Process]


@pytest.fixture
def make_process(fork_server: ForkServer, folder: Path) -> Iterator[MakeProcess]:
    """Return a function that starts a receiver in a process of its own."""
    with contextlib.ExitStack() as stack:
        yield lambda **more: stack.enter_context(contextlib.closing(Process(fork_server, folder, **more)))


def race(processes: list[Process], rounds: int, *roles: str, threads: int = 1, agent: str = "testagent") -> list[Sent]:
    """Have all processes send at once, in these roles by turns; return all uploads, which must be acknowledged."""
    for number, (process, role) in enumerate(zip(processes, itertools.cycle(roles), strict=False)):
        process.begin("race", role=role, number=number, rounds=rounds, threads=threads, agent=agent)
    results = [result for process in processes for result in process.result()]
    assert {status for status, *_ in results} == {200}
    return [(name_of(time_stamp, agent=agent), digest) for _, time_stamp, digest in results]


@pytest.mark.parametrize(("processes", "threads"), [(4, 1), (2, 4)])
def test_equal_files_at_once_are_stored_once(
    make_process: MakeProcess, folder: Path, processes: int, threads: int
) -> None:
    uploads = race([make_process() for _ in range(processes)], 10, "equal", threads=threads)
    assert_promise(folder, uploads)
    assert_nothing_left(folder)
    assert outcomes(folder) == {"stored": 10, "duplicate": len(uploads) - 10}
    assert hidden(folder, ".replaced") == []


@pytest.mark.parametrize(
    ("agent", "processes", "threads"),
    [("testagent", 4, 1), ("testagent", 2, 4), ("A" * 64, 2, 2)],
    ids=["processes", "threads", "the longest name"],
)
def test_different_files_at_once_are_all_kept(
    make_process: MakeProcess, folder: Path, agent: str, processes: int, threads: int
) -> None:
    starting = [make_process() for _ in range(processes)]
    assert_promise(folder, race(starting, 8 * ROUNDS // threads, "different", threads=threads, agent=agent))
    assert_nothing_left(folder)
    assert len(visible(folder)) == 2


def test_files_that_take_turns_are_kept(make_process: MakeProcess, folder: Path) -> None:
    assert_promise(folder, race([make_process() for _ in range(4)], 12, "in turns"))
    assert len(visible(folder)) == 3


@pytest.mark.parametrize("role", ["equal", "different"])
def test_consumer_gets_or_leaves_every_file(make_process: MakeProcess, folder: Path, role: str) -> None:
    processes = [make_process() for _ in range(3)]
    with Consumer(folder, folder.parent / "taken") as consumer:
        uploads = race(processes, 15, role)
    assert consumer.taken
    assert_promise(folder, uploads, taken=consumer.taken)
    assert_nothing_left(folder)


def test_starting_receivers_leave_uploads_in_progress_alone(make_process: MakeProcess, folder: Path) -> None:
    """Each start clears `.incoming/` of what dead processes left, and of nothing else."""
    processes = [make_process() for _ in range(4)]
    assert_promise(folder, race(processes, 10, "different", "starting", threads=2))


def test_processes_that_start_at_once_share_a_folder(make_process: MakeProcess, folder: Path) -> None:
    processes = [make_process(start=False) for _ in range(4)]
    for process in processes:
        process.begin("start")
    for process in processes:
        process.result()
    assert_promise(folder, race(processes, 2, "different"))


@contextlib.contextmanager
def lock_held(folder: Path) -> Iterator[None]:
    """Hold `.lock` as another process would."""
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


free_or_taken = pytest.mark.parametrize("before", [(), (PROFILES,)], ids=["a free name", "a taken name"])


@free_or_taken
def test_one_name_many_times_in_a_batch(make_process: MakeProcess, folder: Path, before: tuple[bytes, ...]) -> None:
    """Uploads that wait for `.lock` are committed together."""
    process = make_process()
    assert [process.post(body).status for body in before] == [200] * len(before)
    chance = random.Random(SEED)
    bodies = [GRAPHS, HISTOGRAMS, variant(chance), variant(chance)] * 2
    with lock_held(folder):
        process.begin("batch", uploads=[upload(body) for body in bodies])
        time.sleep(0.5)
    assert [status for status, _ in process.result()] == [200] * len(bodies)
    assert_promise(folder, sent(*before, *bodies))
    assert_nothing_left(folder)


# --- a server that is killed, stopped or reloaded ----------------------------------------------------------------------


def test_upload_that_fails_late_harms_no_later_one(server: Server, folder: Path) -> None:
    cut = begin_upload(server.port, HISTOGRAMS, 234)
    invalid = begin_upload(server.port, INVALID, 234)
    altered = begin_upload(server.port, HISTOGRAMS, 234, sha256="0" * 64)
    wait_until(lambda: len(incoming(folder)) == 3, 20)
    assert post(server.port, PROFILES).status == 200
    cut.close()
    assert (end_upload(invalid, INVALID), end_upload(altered, HISTOGRAMS)) == (400, 400)
    wait_until(lambda: incoming(folder) == [], 20)
    assert (visible(folder), hidden(folder, ".replaced")) == ({NAME: PROFILES}, [])
    assert_promise(folder, sent(PROFILES))


@pytest.mark.parametrize("rounds", [min(ROUNDS, 2), pytest.param(max(ROUNDS, 100), marks=pytest.mark.slow)])
def test_server_killed_in_mid_traffic_loses_nothing(
    make_server: Callable[..., Server], folder: Path, rounds: int
) -> None:
    chance, server = random.Random(SEED), make_server()
    for number in range(rounds):
        history = History()
        with Traffic([server.port], history, (SEED, number), senders=6, large=0.3) as traffic:
            traffic.wait(server.port, 5, 60)
            time.sleep(chance.uniform(0.0, 0.5))
            server.kill()
        assert set(traffic.statuses) <= {0, 200}
        assert judge(look(folder), history) == {}
        server.start()
        found = look(folder)
        assert (found.leftovers, judge(found, history)) == ([], {})
        assert post(server.port, PROFILES, headers_of(999_999)).status == 200
        empty(folder)


def test_killed_worker_does_not_stop_the_others(make_server: Callable[..., Server], folder: Path) -> None:
    server, history, killed = make_server("--workers", "3"), History(), set[int]()
    wait_until(lambda: len(server.workers()) == 3, 20)
    with Traffic([server.port], history, SEED, senders=6, large=0.3) as traffic:
        for _ in range(ROUNDS):
            traffic.wait(server.port, 5, 60)
            killed.add(victim := server.workers()[0])
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: len(workers := server.workers()) == 3 and not killed & set(workers), 20)
        traffic.wait(server.port, 5, 60)
    assert set(traffic.statuses) <= {0, 200}
    assert traffic.statuses[0] <= 6 * ROUNDS, "more uploads were cut than the killed workers can have had"
    assert judge(look(folder), history) == {}


def begin_uploads(server: Server, folder: Path, history: History) -> list[tuple[socket.socket, bytes, Upload]]:
    """Begin ten uploads."""
    bodies = [variant(random.Random(SEED + at), 200_000) for at in range(10)]
    begun = [
        (begin_upload(server.port, body, at), body, history.send(name_of(at), sha256(body)))
        for at, body in enumerate(bodies)
    ]
    wait_until(lambda: len(incoming(folder)) == len(bodies), 20)
    return begun


def end_uploads(begun: list[tuple[socket.socket, bytes, Upload]], history: History) -> None:
    for peer, body, begun_upload in begun:
        assert end_upload(peer, body) == 200
        history.end(begun_upload, "stored")


def test_stop_waits_for_uploads_under_way(server: Server, folder: Path) -> None:
    history = History()
    begun = begin_uploads(server, folder, history)
    server.process.terminate()
    time.sleep(1.5)
    assert server.process.poll() is None, "the service stopped with uploads under way"
    end_uploads(begun, history)
    assert server.process.wait(30) == 0
    found = look(folder)
    assert (found.leftovers, judge(found, history)) == ([], {})


def test_reload_cuts_no_upload(make_server: Callable[..., Server], folder: Path) -> None:
    server, history = make_server("--workers", "2"), History()
    wait_until(lambda: len(server.workers()) == 2, 20)
    begun, old = begin_uploads(server, folder, history), set(server.workers())
    with Traffic([server.port], history, SEED) as traffic:
        traffic.wait(server.port, 3, 60)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(set(server.workers()) - old) == len(old), 20)
        time.sleep(0.5)
        end_uploads(begun, history)
        traffic.wait(server.port, 5, 60)
    assert set(traffic.statuses) == {200}
    assert judge(look(folder), history) == {}
    wait_until(lambda: not old & set(server.workers()), 20)


# --- durable before the answer -----------------------------------------------------------------------------------------

SYNCED = r"f(data)?sync\(\d+<"
ORDERS = {
    "stored": ["sync upload", "name", "sync folder", "write receipt", "sync receipt", "answer"],
    "replaced": ["sync upload", "sync replaced", "name", "sync folder", "write receipt", "sync receipt", "answer"],
    "duplicate": ["sync name", "sync folder", "write receipt", "sync receipt", "answer"],
}


def test_all_is_durable_before_the_answer(make_server: Callable[..., Server], folder: Path, tmp_path: Path) -> None:
    tracer = shutil.which("strace")
    if tracer is None:
        pytest.skip("strace is not installed")
    server, trace = make_server("--workers", "1"), tmp_path / "trace"
    assert post(server.port, GRAPHS, headers_of(1)).status == 200  # so that folders and logs are there
    calls = "fsync,fdatasync,link,linkat,rename,renameat,renameat2,write,sendto,sendmsg,writev"
    options = ["-f", "-y", "-s", "200", "-e", f"trace={calls}", "-o", str(trace)]
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
    for outcome, body in (("stored", PROFILES), ("replaced", HISTOGRAMS), ("duplicate", HISTOGRAMS)):
        with subprocess.Popen(
            [tracer, *options, "-p", str(server.workers()[0])], stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            said = process.stderr.readline()
            if "attached" not in said:
                pytest.skip(f"a process cannot be traced here: {said.strip()}")
            assert post(server.port, body).status == 200
            process.terminate()
        text = trace.read_text()
        # The last of each: an earlier one is of no use to an order that was not kept.
        found = {step: [match.start() for match in re.finditer(patterns[step], text)] for step in ORDERS[outcome]}
        assert all(found.values()), f"{ {step: len(places) for step, places in found.items()} }\n{text}"
        assert len(found["answer"]) == 1
        order = [places[-1] for places in found.values()]
        assert order == sorted(order), text
    assert outcomes(folder) == {"stored": 2, "replaced": 1, "duplicate": 1}


# --- a disk that is full, read-only or gone ----------------------------------------------------------------------------

PAGE = 4096  # bytes that a small file on a tmpfs takes at least
MakeTmpfs = Callable[[str], Path]


@pytest.fixture
def on_disk(make_tmpfs: MakeTmpfs) -> Callable[..., tuple[Path, Client]]:
    """Return a function that starts a receiver on a small file system."""

    def start(options: str, **more: str) -> tuple[Path, Client]:
        folder = make_tmpfs(options)
        return folder, Client(receiver.create_app(settings(folder, **more)))

    return start


OnDisk = Callable[..., tuple[Path, Client]]


def assert_refused(response: TestResponse, statuses: set[int], folder: Path) -> None:
    assert response.status_code in statuses, response.text
    answer = response.json
    assert answer is not None and answer["status"] == response.status_code and answer["received"] is None
    assert answer["message"]
    assert str(folder) not in response.text, "the answer tells where the data folder is"
    if (folder / ".incoming").is_dir():
        assert_nothing_left(folder)


def fill_pages(folder: Path, leave: int = 0) -> list[Path]:
    """Fill the disk but for some pages; return the file that takes the room."""
    filler = folder / ".filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(PAGE))
    os.truncate(filler, (filler.stat().st_size // PAGE - leave) * PAGE)
    return [filler]


def fill_inodes(folder: Path, leave: int) -> list[Path]:
    """Make files until some inodes are left; return them."""
    fillers = []
    with pytest.raises(OSError, match="No space"):
        for number in itertools.count():
            filler = folder / f".filler{number}"
            filler.touch()
            fillers.append(filler)
    for _ in range(leave):
        fillers.pop().unlink()
    return fillers


@free_or_taken
@pytest.mark.parametrize(
    ("options", "fill", "leave"),
    [
        *(("size=1m", fill_pages, pages) for pages in range(5)),
        *(("size=1m,nr_inodes=60", fill_inodes, inodes) for inodes in range(7)),
    ],
)
def test_full_disk_keeps_the_promise(
    on_disk: OnDisk, options: str, fill: Callable[[Path, int], list[Path]], leave: int, before: tuple[bytes, ...]
) -> None:
    """There is no room for the file, or for its receipt, or for both."""
    folder, client = on_disk(options)
    assert [send(client, body).status_code for body in before] == [200] * len(before)
    unchanged, fillers = visible(folder), fill(folder, leave)
    response = send(client, HISTOGRAMS)
    if response.status_code != 200:
        assert_refused(response, {503, 507}, folder)
    if response.status_code == 507:
        assert visible(folder) == unchanged
    acknowledged = [*before, *([HISTOGRAMS] if response.status_code == 200 else [])]
    assert_promise(folder, sent(*acknowledged), unsure=sent(HISTOGRAMS))
    for filler in fillers:
        filler.unlink()
    assert [send(client, body).status_code for body in (HISTOGRAMS, GRAPHS)] == [200, 200]
    assert_promise(folder, sent(*acknowledged, HISTOGRAMS, GRAPHS))


def test_invalid_file_is_400_without_room(on_disk: OnDisk) -> None:
    folder, client = on_disk("size=1m")
    assert send(client, PROFILES, timeStamp="1").status_code == 200
    fill_pages(folder, leave=2)
    assert_refused(send(client, HISTOGRAMS[:-100] + bytes(100)), {400}, folder)
    assert NAME not in visible(folder)


def test_reserve_is_never_used(on_disk: OnDisk, pass_time: PassTime) -> None:
    folder, client = on_disk("size=4m", min_free_space=str(3 << 20))
    assert send(client, PROFILES, timeStamp="1").status_code == 200
    assert_refused(send(client, HISTOGRAMS + bytes(2 << 20)), {507}, folder)
    (folder / ".filler").write_bytes(bytes(2 << 20))
    pass_time(1.1)  # free space is looked at once a second
    assert_refused(send(client, HISTOGRAMS), {507}, folder)
    assert_refused(send_chunked(client, HISTOGRAMS), {507}, folder)
    assert client.get(FILES, headers=HEADERS).status_code == 200
    (folder / ".filler").unlink()
    pass_time(1.1)
    assert send(client, HISTOGRAMS).status_code == 200


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
    (filler,) = fill_pages(folder)
    time.sleep(1.1)
    assert {post(server.port, HISTOGRAMS).status for _ in range(4)} == {507}
    filler.unlink()
    time.sleep(1.1)
    assert post(server.port, HISTOGRAMS).status == 200
    assert_promise(folder, sent(HISTOGRAMS))


def test_read_only_disk_is_503_and_readable(make_process: MakeProcess, folder: Path) -> None:
    process = make_process()
    assert process.post(HISTOGRAMS).status == 200
    process.fault("*", "read-only")
    assert [process.post(body).status for body in (PROFILES, HISTOGRAMS, b"invalid")] == [503, 503, 503]
    assert process.get(f"{FILES}/{NAME}").status == 200
    process.fault("", "nothing")
    assert visible(folder) == {NAME: HISTOGRAMS}
    assert process.post(PROFILES).status == 200
    assert_promise(folder, sent(HISTOGRAMS, PROFILES))


def test_receiver_starts_on_a_read_only_disk(make_process: MakeProcess) -> None:
    assert make_process().post(HISTOGRAMS).status == 200
    process = make_process(start=False)
    process.fault("*", "read-only")
    process.do("start")
    assert process.get(f"{FILES}/{NAME}").status == 200
    assert process.post(PROFILES).status == 503


@pytest.mark.parametrize("instead", ["nothing", "a file"])
def test_missing_folder_is_503_and_stays_missing(
    client: Client, folder: Path, pass_time: PassTime, instead: str
) -> None:
    """A folder that is gone may be a disk that is not mounted."""
    assert send(client, HISTOGRAMS).status_code == 200
    shutil.rmtree(folder)
    if instead == "a file":
        folder.touch()
    pass_time(1.1)
    assert_refused(send(client, HISTOGRAMS), {503}, folder)
    for path in (FILES, f"{FILES}/{NAME}", "/rest/api/runs", "/rest/api/runs/123", "/rest/api/health"):
        assert_refused(client.get(path, headers=HEADERS), {503}, folder)
    assert not folder.is_dir()
    folder.unlink(missing_ok=True)
    folder.mkdir()
    pass_time(1.1)
    assert send(client, HISTOGRAMS).status_code == 200
    assert_promise(folder, sent(HISTOGRAMS))


def test_unmounted_disk_is_503_and_nothing_goes_below(on_disk: OnDisk, tmp_path: Path, pass_time: PassTime) -> None:
    (folder, client), elsewhere = on_disk("size=1m"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(["mount", "--bind", folder, elsewhere], check=True)
    try:
        subprocess.run(["umount", "--lazy", folder], check=True)
        pass_time(1.1)
        assert_refused(send(client, GRAPHS), {503}, folder)
        for path in (FILES, "/rest/api/health"):
            assert_refused(client.get(path, headers=HEADERS), {503}, folder)
        assert list(folder.iterdir()) == []
        subprocess.run(["mount", "--bind", elsewhere, folder], check=True)
        pass_time(1.1)
        assert send(client, GRAPHS).status_code == 200
        assert visible(folder) == visible(elsewhere) == {NAME: GRAPHS}
    finally:
        subprocess.run(["umount", "--lazy", elsewhere], check=True)


def test_folder_lost_in_mid_upload_is_503(client: Client, folder: Path, pass_time: PassTime) -> None:
    class Body(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            shutil.rmtree(folder, ignore_errors=True)
            return super().read(size)

    assert_refused(send_chunked(client, Body(HISTOGRAMS)), {503}, folder)
    folder.mkdir(exist_ok=True)
    pass_time(1.1)
    assert send(client, HISTOGRAMS).status_code == 200


@pytest.mark.parametrize("name", HIDDEN)
def test_removed_hidden_folder_comes_back(client: Client, folder: Path, pass_time: PassTime, name: str) -> None:
    for body in (HISTOGRAMS, PROFILES, PROFILES, GRAPHS):
        assert send(client, body).status_code in (200, 503)
        assert send(client, b"invalid").status_code in (400, 503)
        shutil.rmtree(folder / name, ignore_errors=True)
        if body == GRAPHS:  # another process has made it again
            (folder / name).mkdir(0o700)
        pass_time(1.1)
        assert send(client, body).status_code == 200
    assert visible(folder) == {NAME: GRAPHS}
    assert client.get(FILES, headers=HEADERS).status_code == 200


@pytest.mark.parametrize(
    ("name", "instead"),
    [*itertools.product(["", *HIDDEN], ["a folder", "a link"]), *((name, "a link to it") for name in HIDDEN)],
)
def test_swapped_folder_holds_nothing_acknowledged(
    client: Client, folder: Path, tmp_path: Path, pass_time: PassTime, name: str, instead: str
) -> None:
    """An account that may write to the data folder moves a folder away and puts another in its place."""
    assert [send(client, body).status_code for body in (PROFILES, GRAPHS, b"invalid")] == [200, 200, 400]
    swapped, away, elsewhere = folder / name, tmp_path / "away", tmp_path / "elsewhere"
    elsewhere.mkdir()
    swapped.rename(away)
    if instead == "a folder":
        swapped.mkdir(0o700)
    else:
        swapped.symlink_to(away if instead == "a link to it" else elsewhere)
    before = tree(swapped), tree(away)
    pass_time(1.1)  # paths and descriptors are compared once a second
    response = send(client, INVALID) if name == ".rejected" else send(client, HISTOGRAMS)
    assert response.status_code == (400 if name == ".rejected" else 503)
    assert client.get("/rest/api/health").status_code == 503
    assert (tree(swapped), tree(away)) == before
    swapped.rmdir() if instead == "a folder" else swapped.unlink()
    away.rename(swapped)
    pass_time(1.1)
    assert send(client, HISTOGRAMS).status_code == 200
    assert_promise(folder, sent(PROFILES, GRAPHS, HISTOGRAMS))


# --- failures, recovery and the lock -----------------------------------------------------------------------------------


def writers(folder: Path) -> set[str]:
    return {path.name for path in (folder / ".incoming").iterdir()}


def logs(folder: Path) -> list[Path]:
    return sorted((folder / ".receipts" / "123").glob("*.jsonl"))


@pytest.mark.parametrize("path", [".", ".replaced"])
def test_process_stops_after_a_failed_folder_fsync(make_process: MakeProcess, folder: Path, path: str) -> None:
    """The kernel may report the next fsync as good though the names are not durable."""
    process = make_process()
    assert [process.post(body).status for body in (PROFILES, GRAPHS)] == [200, 200]
    process.fault(f"fsync {path}", "EIO")
    assert process.post(HISTOGRAMS).status == 503
    assert [process.post(PROFILES, time_stamp).status for time_stamp in (234, 1, 2)] == [503] * 3
    health = process.get("/rest/api/health")
    assert health.status == 503 and "restarted" in health.json["message"]
    assert_promise(folder, sent(PROFILES, GRAPHS), unsure=sent(HISTOGRAMS))
    restarted = make_process()
    assert [restarted.post(HISTOGRAMS).status, restarted.post(PROFILES, 1).status] == [200, 200]
    assert_promise(folder, sent(PROFILES, GRAPHS, HISTOGRAMS) + sent(PROFILES, time_stamp=1))


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
    assert_promise(folder, sent(PROFILES, HISTOGRAMS) + sent(GRAPHS, time_stamp=1))
    assert len(logs(folder)) == 2
    for log in logs(folder):
        *lines, last = log.read_bytes().split(b"\n")
        assert all(json.loads(line)["outcome"] for line in lines)
        assert last == b"" or action == "torn"


@free_or_taken
@pytest.mark.parametrize("error", ["EIO", "ESTALE", "ETIMEDOUT"])
def test_failed_rename_that_happened_is_a_duplicate_later(
    make_process: MakeProcess, folder: Path, error: str, before: tuple[bytes, ...]
) -> None:
    """A network file system may report a rename as failed that it has made."""
    process = make_process()
    assert [process.post(body).status for body in before] == [200] * len(before)
    process.fault("rename * -> NAME", f"{error} after")
    assert process.post(HISTOGRAMS).status == 503
    assert visible(folder) == {NAME: HISTOGRAMS}
    assert process.post(HISTOGRAMS).json["duplicate"] is True
    assert_promise(folder, sent(*before, HISTOGRAMS))
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
    assert_promise(folder, sent(PROFILES, HISTOGRAMS))


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
    assert_promise(folder, sent(PROFILES, HISTOGRAMS, GRAPHS) + sent(GRAPHS, time_stamp=1))


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
    process.wait_for_death()
    assert other.post(HISTOGRAMS).status == 200
    assert_promise(folder, sent(PROFILES, HISTOGRAMS), unsure=sent(GRAPHS, time_stamp=1))


def test_removed_lock_is_noticed(make_process: MakeProcess, folder: Path) -> None:
    process, other = make_process(), make_process()
    assert [one.post(PROFILES).status for one in (process, other)] == [200, 200]
    (folder / ".lock").unlink()
    with lock_held(folder):
        assert process.post(HISTOGRAMS).status == 503
    (folder / ".lock").unlink()
    assert_promise(folder, [*race([process, other], 5, "different"), *sent(PROFILES)])


def test_removed_writer_becomes_a_new_one(make_process: MakeProcess, folder: Path) -> None:
    process = make_process()
    assert process.post(PROFILES).status == 200
    before = writers(folder)
    shutil.rmtree(folder / ".incoming" / before.pop())
    assert process.post(HISTOGRAMS).status == 200
    (now,) = writers(folder)
    make_process()
    assert writers(folder) == {now}, "a start has taken a living writer for dead"
    assert process.post(GRAPHS).status == 200
    assert_promise(folder, sent(PROFILES, HISTOGRAMS, GRAPHS))


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
        one.begin_post(GRAPHS)
        one.begin("get", path="/rest/api/health")
    assert [one.result()[0] for one in (other, started) for _ in range(2)] == [503] * 4
    assert len(incoming(folder)) == 1
    process.signal(signal.SIGCONT)
    assert process.result()[0] == 200
    assert [one.post(GRAPHS).status for one in (other, started)] == [200, 200]
    assert_promise(folder, sent(PROFILES, HISTOGRAMS, GRAPHS))
    assert_nothing_left(folder)


def test_recovery_deletes_dead_writers_only(make_process: MakeProcess, folder: Path) -> None:
    living, dead = make_process(), make_process()
    living.fault("write .incoming/*", "stop")
    living.begin_post(HISTOGRAMS)
    wait_until_stopped(living)
    alive = writers(folder)
    dead.fault("rename * -> *", "kill before")
    dead.begin_post(PROFILES, 1)
    dead.wait_for_death()
    assert len(alive) == 1 and len(writers(folder)) == 2
    (folder / ".incoming" / "without-a-lock").mkdir()
    make_process()
    assert writers(folder) == alive
    living.signal(signal.SIGCONT)
    assert living.result()[0] == 200
    assert_promise(folder, sent(HISTOGRAMS))
