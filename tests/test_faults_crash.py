"""The plug is pulled, a worker dies, the service is stopped or reloaded, with uploads under way."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    FILES,
    HEADERS,
    HISTOGRAMS,
    PROFILES,
    PROJECT,
    ROUNDS,
    SEED,
    Server,
    post,
    receipts,
    visible,
    wait_until,
)

import storage

AGENT = "testagent"
CONTENDED = 3  # time stamps from 0, each claimed again and again by different files
LARGE = 3 << 20


def name_of(time_stamp: int) -> str:
    return storage.file_name(AGENT, 123, time_stamp)


class Traffic:
    """Senders in threads: files small and large, most under names of their own, some under contended ones."""

    def __init__(self, port: int, chance: random.Random, first: int, senders: int = 6) -> None:
        self.port = port
        self.sent: dict[str, set[bytes]] = collections.defaultdict(set)
        self.acknowledged: dict[str, set[bytes]] = collections.defaultdict(set)
        self.statuses: collections.Counter[int] = collections.Counter()
        self.broken: list[str] = []
        self._numbers = iter(range(first, first + 1_000_000))
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
                number = next(self._numbers)
            if sender == 0:
                number = chance.randrange(CONTENDED)
            # ROOT reads nothing behind the end of its data, so that a valid file can have any size and content.
            body = HISTOGRAMS + chance.randbytes(LARGE if sender % 3 == 2 else chance.randrange(16, 4000))
            name = name_of(number)
            self.sent[name].add(body)
            try:
                status, _ = post(self.port, body, {**HEADERS, "timeStamp": str(number)})
            except (OSError, http.client.HTTPException) as error:
                with self._lock:
                    self.broken.append(repr(error))
                time.sleep(0.02)
                continue
            with self._lock:
                self.statuses[status] += 1
                if status == 200:
                    self.acknowledged[name].add(body)

    def wait_for(self, answers: int, seconds: float = 30.0) -> None:
        wait_until(lambda: sum(self.statuses.values()) >= answers, seconds)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a sender has no answer after a minute"


def check_kept(folder: Path, traffic: Traffic) -> None:
    """Nothing acknowledged is lost, nothing visible is partial or unknown, every acknowledgement has its receipt."""
    there = visible(folder)
    for name, content in there.items():
        assert content in traffic.sent[name], f"{name} holds {len(content)} bytes that nobody sent"
    replaced = {path.read_bytes() for path in (folder / ".replaced").iterdir()}
    for name, contents in traffic.acknowledged.items():
        lost = [len(content) for content in contents if content != there.get(name) and content not in replaced]
        assert not lost, f"{name}: acknowledged, but gone: files of {lost} bytes"
    noted = collections.Counter(name for name, outcome in outcomes(folder) if outcome != "rejected")
    assert not {name: len(contents) for name, contents in traffic.acknowledged.items() if noted[name] < len(contents)}


def outcomes(folder: Path) -> Iterator[tuple[str, str]]:
    """Return what the receipts say; the line that a crash tore is the last one written before it and acknowledges nothing."""
    for path in (folder / ".receipts").iterdir():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                receipt = json.loads(line)
                yield receipt["filename"], receipt["outcome"]


# --- the plug is pulled ------------------------------------------------------------------------------------------------


def pull_the_plug(make_server: Callable[..., Server], folder: Path, rounds: int) -> None:
    chance = random.Random(SEED)
    acknowledged, cut, slowest = 0, 0, 0.0
    for number in range(rounds):
        shutil.rmtree(folder, ignore_errors=True)
        server = make_server()
        traffic = Traffic(server.port, chance, first=1000)
        traffic.wait_for(5)
        time.sleep(chance.uniform(0.0, 0.5))
        server.kill()
        traffic.stop()
        assert not traffic.statuses.keys() - {200}
        check_kept(folder, traffic)
        begin = time.monotonic()
        server = make_server()
        serving = time.monotonic() - begin
        assert serving < 15, f"round {number}: it took {serving:.1f} s to serve again"
        assert list((folder / ".incoming").iterdir()) == []
        check_kept(folder, traffic)  # what the start finished of the dead process's work is whole as well
        there = visible(folder)
        # A name that was acknowledged is there again, also where the process died between two files of that name.
        assert not [name for name in traffic.acknowledged if name not in there]
        assert post(server.port, PROFILES, {**HEADERS, "timeStamp": "999999"}).status == 200
        server.stop()
        acknowledged += traffic.statuses[200]
        cut += sum(len(contents) for contents in traffic.sent.values()) - traffic.statuses[200]
        slowest = max(slowest, serving)
    print(f"{rounds} kills: {acknowledged} uploads acknowledged, {cut} cut; serving again within {slowest:.1f} s")


def test_nothing_acknowledged_is_lost_when_all_processes_are_killed_in_mid_traffic(
    make_server: Callable[..., Server], folder: Path
) -> None:
    pull_the_plug(make_server, folder, ROUNDS)


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_in_many_rounds_of_killing(
    make_server: Callable[..., Server], folder: Path
) -> None:
    pull_the_plug(make_server, folder, max(ROUNDS, 100))


def test_what_other_workers_receive_goes_on_when_one_worker_is_killed(
    make_server: Callable[..., Server], folder: Path
) -> None:
    server = make_server("--workers", "3")
    wait_until(lambda: len(server.workers()) == 3, 20)
    traffic = Traffic(server.port, random.Random(SEED), first=1000)
    killed = []
    for _ in range(ROUNDS):
        before = sum(traffic.statuses.values())
        traffic.wait_for(before + 5)
        killed.append(server.workers()[0])
        os.kill(killed[-1], signal.SIGKILL)
        wait_until(lambda: len(now := server.workers()) >= 3 and killed[-1] not in now, 20)
    traffic.wait_for(sum(traffic.statuses.values()) + 5)
    traffic.stop()
    assert not traffic.statuses.keys() - {200}
    assert len(traffic.broken) <= 6 * ROUNDS, "more uploads were cut than the killed workers can have had"
    check_kept(folder, traffic)
    workers = server.workers()
    assert len(workers) == 3 and not set(killed) & set(workers)


# --- a death at every single step --------------------------------------------------------------------------------------

STEPS = ("link", "rename", "unlink", "fsync", "write", "close", "open", "ftruncate")

DIE_AT_EVERY_STEP = """
import json, os, pathlib, shutil, signal, sys, time, traceback
import storage

folder, old, new = pathlib.Path(sys.argv[1]), sys.argv[2].encode(), b"new" * 1000
NAME = "testagenthistos_123_DQM_1970_01_01_01_03_54.root"
calls, deadline = 0, None

def dying(call):
    def wrapped(*arguments, **more):
        global calls
        calls += 1
        if deadline == (calls, "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*arguments, **more)
        if deadline == (calls, "after"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

def make():
    return storage.Storage(folder, max_file_size=1 << 20, min_free_space=0, max_rejected=1 << 20)

def send(content):
    upload = make().new_upload()
    upload.write(content)
    make().accept(upload, {"run": 123, "filename": NAME, "sha256": upload.sha256}, time.monotonic())

def state():
    there = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return {
        "visible": {path.name: path.read_bytes().decode() for path in there},
        "replaced": [path.read_bytes().decode() for path in (folder / ".replaced").iterdir()],
        "incoming": [path.name for path in (folder / ".incoming").iterdir()],
    }

for when in ("before", "after"):
    at = 0
    while True:
        at += 1
        shutil.rmtree(folder, ignore_errors=True)
        make()
        if old:
            send(old)
        pid = os.fork()
        if pid == 0:
            for step in sys.argv[3:]:
                setattr(os, step, dying(getattr(os, step)))
            deadline = (at, when)
            try:
                send(new)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            sys.exit("the upload failed without being killed")
        died = os.WIFSIGNALED(status)
        crashed = state()
        make()
        print(json.dumps({"at": at, "when": when, "died": died, "crashed": crashed, "restarted": state()}))
        if not died:
            break
"""


@pytest.mark.parametrize("old", ["", "old", "new" * 1000], ids=["a free name", "a taken name", "a duplicate"])
def test_a_death_at_any_step_leaves_no_visible_file_or_the_whole_one(tmp_path: Path, old: str) -> None:
    folder, new = tmp_path / "data", "new" * 1000
    run = subprocess.run(
        [sys.executable, "-c", DIE_AT_EVERY_STEP, str(folder), old, *STEPS],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    deaths = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(deaths) > 16 and deaths[-1]["restarted"]["visible"] == {name_of(234): new}
    for death in deaths:
        for state in (death["crashed"], death["restarted"]):
            assert set(state["visible"].values()) <= {old, new} - {""}, death
            assert not set(state["visible"]) - {name_of(234)}, death
        restarted = death["restarted"]
        assert restarted["incoming"] == [], death
        if old:  # it had been acknowledged, so it stays, under its name or set aside, and the name is never lost
            assert old in (*restarted["visible"].values(), *restarted["replaced"]), death
            assert restarted["visible"], death


# --- stopping and reloading --------------------------------------------------------------------------------------------


def begin_upload(port: int, body: bytes, time_stamp: int) -> socket.socket:
    """Send the headers and half of a body."""
    peer = socket.create_connection(("127.0.0.1", port), timeout=30)
    headers = {**HEADERS, "timeStamp": str(time_stamp), "Content-Length": str(len(body)), "Host": "localhost"}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    peer.sendall(f"POST {FILES} HTTP/1.1\r\n{head}\r\n".encode() + body[: len(body) // 2])
    return peer


def end_upload(peer: socket.socket, body: bytes) -> tuple[int, Any]:
    with peer:
        peer.sendall(body[len(body) // 2 :])
        response = http.client.HTTPResponse(peer)
        response.begin()
        return response.status, json.loads(response.read())


def test_uploads_under_way_are_finished_before_the_service_stops(
    make_server: Callable[..., Server], folder: Path
) -> None:
    server = make_server()
    bodies = [HISTOGRAMS + random.Random(SEED + number).randbytes(200_000) for number in range(10)]
    peers = [begin_upload(server.port, body, number) for number, body in enumerate(bodies)]
    wait_until(lambda: len(list((folder / ".incoming").iterdir())) == len(bodies), 20)
    server.process.terminate()
    time.sleep(1.5)
    assert server.process.poll() is None, "the service stopped with uploads under way"
    answers = [end_upload(peer, body) for peer, body in zip(peers, bodies, strict=True)]
    assert [status for status, _ in answers] == [200] * len(bodies)
    assert server.process.wait(30) == 0
    assert visible(folder) == {name_of(number): body for number, body in enumerate(bodies)}
    assert list((folder / ".incoming").iterdir()) == []


def test_a_reload_cuts_no_upload_and_refuses_none(make_server: Callable[..., Server], folder: Path) -> None:
    server = make_server("--workers", "2")
    wait_until(lambda: len(server.workers()) == 2, 20)
    bodies = [HISTOGRAMS + random.Random(SEED + number).randbytes(200_000) for number in range(10)]
    peers = [begin_upload(server.port, body, 10 + number) for number, body in enumerate(bodies)]
    wait_until(lambda: len(list((folder / ".incoming").iterdir())) == len(bodies), 20)
    old = set(server.workers())
    traffic = Traffic(server.port, random.Random(SEED), first=1000, senders=3)
    traffic.wait_for(3)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(set(server.workers()) - old) == len(old), 20)
    time.sleep(0.5)
    answers = [end_upload(peer, body) for peer, body in zip(peers, bodies, strict=True)]
    traffic.wait_for(sum(traffic.statuses.values()) + 5)
    traffic.stop()
    assert [status for status, _ in answers] == [200] * len(bodies)
    assert traffic.broken == []
    assert set(traffic.statuses) == {200}
    wait_until(lambda: not old & set(server.workers()), 20)
    there = visible(folder)
    assert [there[name_of(10 + number)] for number in range(len(bodies))] == bodies
    for number, body in enumerate(bodies):
        traffic.sent[name_of(10 + number)].add(body)
    check_kept(folder, traffic)


# --- the order of things -----------------------------------------------------------------------------------------------


def test_the_disk_has_file_name_and_receipt_before_the_socket_has_the_200(
    make_server: Callable[..., Server], folder: Path, tmp_path: Path
) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    server = make_server("--workers", "1")
    trace = tmp_path / "trace"
    calls = "fsync,fdatasync,link,linkat,unlink,unlinkat,write,sendto,sendmsg,writev"
    command = ["strace", "-f", "-y", "-s", "40", "-e", f"trace={calls}", "-o", str(trace), "-p"]
    tracer = subprocess.Popen([*command, str(server.workers()[0])], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    if "attached" not in said:
        tracer.wait()
        tracer.stderr.close()
        pytest.skip(f"a process cannot be traced here: {said.strip()}")
    assert post(server.port, HISTOGRAMS).status == 200
    tracer.terminate()
    tracer.wait()
    tracer.stderr.close()
    assert receipts(folder)[0]["outcome"] == "stored"

    text = trace.read_text()
    here = re.escape(str(folder))
    steps = {
        "write the file": rf"write\(\d+<{here}/\.incoming/",
        "fsync the file": rf"f(data)?sync\(\d+<{here}/\.incoming/",
        "give the name": rf'link(at)?\(.*{re.escape(name_of(234))}"',
        "fsync the folder": rf"f(data)?sync\(\d+<{here}>\)",
        "fsync the folder of receipts": rf"f(data)?sync\(\d+<{here}/\.receipts>\)",
        "write the receipt": rf"write\(\d+<{here}/\.receipts/123\.jsonl>",
        "fsync the receipt": rf"f(data)?sync\(\d+<{here}/\.receipts/123\.jsonl>",
        "answer": r'(sendto|sendmsg|write|writev)\(.*"HTTP/1\.1 200 ',
    }
    found = {step: [match.start() for match in re.finditer(pattern, text)] for step, pattern in steps.items()}
    assert all(found.values()), f"{ {step: len(places) for step, places in found.items()} }\n{text}"
    # The first of each but of the writes to the file, of which the last one counts.
    order = [places[-1] if step == "write the file" else places[0] for step, places in found.items()]
    assert order == sorted(order), text
    assert len(found["answer"]) == 1
    # One thread did it all, so that each call had returned before the next began.
    assert len({text[text.rfind("\n", 0, place) + 1 :].split()[0] for place in order}) == 1, text
