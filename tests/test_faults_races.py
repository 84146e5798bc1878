"""Many processes at one name: what was acknowledged is never lost, and nothing but whole, valid files is ever visible."""

from __future__ import annotations

import collections
import errno
import hashlib
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    FILES,
    GRAPHS,
    HEADERS,
    HISTOGRAMS,
    NAME,
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
from werkzeug.test import Client

import receiver
import storage

INVALID = HISTOGRAMS[:3000] + bytes(2000) + HISTOGRAMS[5000:]


# --- processes at the data folder --------------------------------------------------------------------------------------

# Every process waits for the word and then does what it is there for; a line of JSON tells the outcome of each upload.
RACER = """
import hashlib, json, pathlib, sys, time, traceback
import storage

folder, role, number, rounds, agent = pathlib.Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5]), sys.argv[5]
data = storage.Storage(folder, max_file_size=1 << 20, min_free_space=0, max_rejected=1 << 20)
over = folder.parent / "over"
print("ready", flush=True)
sys.stdin.readline()

def send(content, time_stamp):
    name = storage.file_name(agent, 123, time_stamp)
    upload = data.new_upload()
    try:
        for at in range(0, len(content), 700):
            upload.write(content[at : at + 700])
        receipt = {"run": 123, "filename": name, "sha256": upload.sha256}
        data.accept(upload, receipt, time.monotonic())
        outcome = receipt["outcome"]
    except Exception:
        traceback.print_exc()
        outcome = "failed"
    finally:
        upload.discard()
    print(json.dumps([outcome, name, hashlib.sha256(content).hexdigest()]), flush=True)

if role == "same":
    for turn in range(rounds):
        send(f"content {turn} ".encode() * 100, turn // 4)  # four contents take turns at each name
elif role == "identical":
    for turn in range(rounds):
        send(f"content of {turn} ".encode() * 100, turn)
elif role == "different":
    for turn in range(rounds):
        send(f"content {number} {turn} ".encode() * 100, turn % 2)
elif role == "consumer":
    taken = folder.parent / "taken"
    count = 0
    while not over.exists():
        for path in folder.glob("*.root"):
            count += 1
            try:
                path.rename(taken / f"{path.name}.{number}.{count}")
            except FileNotFoundError:
                pass
elif role == "sweeper":
    while not over.exists():
        data.sweep()
elif role == "stuck":
    upload = data.new_upload()
    upload.write(b"on its way")
    print("stuck", flush=True)
    time.sleep(60)
"""


class Race:
    """Processes that begin at once on one data folder."""

    def __init__(self, folder: Path, roles: list[str], rounds: int, agent: str = "testagent") -> None:
        self.folder = folder
        self.taken = folder.parent / "taken"
        self.taken.mkdir()
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", RACER, str(folder), role, str(number), str(rounds), agent],
                cwd=PROJECT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number, role in enumerate(roles)
        ]
        senders = [
            process
            for process, role in zip(self.processes, roles, strict=True)
            if role not in ("consumer", "sweeper", "stuck")
        ]
        self.outcomes: list[tuple[str, str, str]] = []
        self.errors = ""
        try:
            for process in self.processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            for process in self.processes:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            with ThreadPoolExecutor(len(senders)) as pool:
                for out, errors in pool.map(lambda process: process.communicate(timeout=300), senders):
                    self.outcomes += [tuple(json.loads(line)) for line in out.splitlines()]
                    self.errors += errors
            (folder.parent / "over").touch()
        finally:
            for process, role in zip(self.processes, roles, strict=True):
                if process not in senders:
                    if role == "stuck":
                        process.kill()
                    _, errors = process.communicate(timeout=300)
                    self.errors += errors

    @property
    def counts(self) -> collections.Counter[str]:
        return collections.Counter(outcome for outcome, _, _ in self.outcomes)

    def kept(self) -> set[str]:
        """Return the hashes of what is in the folder, in `.replaced/` or with the consumer."""
        places = (self.folder, self.folder / ".replaced", self.taken)
        return {hash_of(path) for place in places for path in place.iterdir() if path.is_file()}


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_acknowledged(race: Race) -> None:
    assert race.errors == ""
    assert race.counts["failed"] == 0
    assert race.outcomes
    print(f"{len(race.processes)} processes: {dict(race.counts)}")
    lost = {sha256 for _, _, sha256 in race.outcomes} - race.kept()
    assert not lost, f"{len(lost)} of {len(race.outcomes)} acknowledged contents are gone: {race.counts}"
    assert list((race.folder / ".incoming").iterdir()) == []
    noted = collections.Counter(line["outcome"] for line in receipts(race.folder))
    assert noted == race.counts


def test_of_identical_files_sent_at_once_one_is_stored_and_the_others_are_duplicates(folder: Path) -> None:
    race = Race(folder, ["identical"] * 6, rounds=40)
    check_acknowledged(race)
    assert race.counts == {"stored": 40, "duplicate": 5 * 40}
    assert list((folder / ".replaced").iterdir()) == []
    assert len(visible(folder)) == 40


@pytest.mark.parametrize("agent", ["testagent", "A" * 64], ids=["a short name", "the longest name"])
def test_of_different_files_sent_at_once_every_one_is_kept(folder: Path, agent: str) -> None:
    race = Race(folder, ["different"] * 6, rounds=30 * ROUNDS, agent=agent)
    check_acknowledged(race)
    assert race.counts["stored"] >= 2  # more where two of them have set the same third aside
    assert len(visible(folder)) == 2
    assert len(race.kept()) == 6 * 30 * ROUNDS


def test_files_that_take_turns_at_a_name_are_all_kept(folder: Path) -> None:
    race = Race(folder, ["same"] * 6, rounds=40)
    check_acknowledged(race)
    assert len(visible(folder)) == 10
    assert len(race.kept()) == 40


@pytest.mark.parametrize("role", ["different", "identical"])
def test_a_consumer_that_takes_files_away_meanwhile_gets_or_leaves_every_one(folder: Path, role: str) -> None:
    race = Race(folder, [role] * 4 + ["consumer"] * 2, rounds=60)
    check_acknowledged(race)
    assert list(race.taken.iterdir())


def test_sweeping_leaves_what_is_on_its_way(folder: Path) -> None:
    race = Race(folder, ["different"] * 3 + ["sweeper"] * 3, rounds=60)
    check_acknowledged(race)
    assert len(race.kept()) == 3 * 60


def test_sweeping_removes_the_upload_of_a_dead_process_and_no_other(folder: Path) -> None:
    command = [sys.executable, "-c", RACER, str(folder), "stuck", "0", "0", "testagent"]
    data = storage.Storage(folder, max_file_size=1000, min_free_space=0, max_rejected=0)
    with subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() + process.stdout.readline() == "ready\nstuck\n"
        mine = data.new_upload()
        data.sweep()
        assert len(list((folder / ".incoming").iterdir())) == 2
        process.kill()
        process.wait()
        data.sweep()
        assert list((folder / ".incoming").iterdir()) == [mine.path]
        mine.discard()


# --- two receivers on one folder ---------------------------------------------------------------------------------------


def test_two_receivers_on_one_folder_keep_what_each_of_them_acknowledged(
    make_server: Callable[..., Server], folder: Path
) -> None:
    servers = [make_server("--workers", "2") for _ in range(2)]
    chance = random.Random(SEED)
    over = threading.Event()
    sent = [HISTOGRAMS + chance.randbytes(chance.randrange(10, 5000)) for _ in range(20 * ROUNDS)]
    expected = set(sent) | {PROFILES, GRAPHS}
    seen: set[bytes] = set()

    def watch() -> None:
        """Look at the folder all the time, as Overwatch does."""
        while not over.is_set():
            for path in folder.glob("*.root*"):
                try:
                    seen.add(path.read_bytes())
                except FileNotFoundError:
                    continue

    # Each file comes once, one of two files comes often, and so does an invalid one; all claim one name.
    bodies = sent + [PROFILES, GRAPHS, INVALID] * (6 * ROUNDS)
    chance.shuffle(bodies)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            ports = [servers[number % 2].port for number in range(len(bodies))]
            replies = list(pool.map(post, ports, bodies))
        # In the crowd chance decides what becomes of a file. One after the other: GRAPHS replaces, and each knows it afterwards.
        for body, server in [(PROFILES, servers[0]), (GRAPHS, servers[1]), (GRAPHS, servers[0]), (GRAPHS, servers[1])]:
            bodies.append(body)
            replies.append(post(server.port, body))
    finally:
        over.set()
        watcher.join()
    for body, reply in zip(bodies, replies, strict=True):
        assert reply.status == (400 if body == INVALID else 200), reply
    assert seen <= expected, "something was visible that is no valid file"
    there = visible(folder)
    assert there.keys() == {NAME}
    assert {*there.values(), *(path.read_bytes() for path in (folder / ".replaced").iterdir())} == expected
    outcomes = collections.Counter(receipt["outcome"] for receipt in receipts(folder))
    answered = collections.Counter(
        "rejected"
        if reply.status == 400
        else next((outcome for outcome in ("duplicate", "replaced") if outcome in reply.json), "stored")
        for reply in replies
    )
    assert outcomes == answered
    assert replies[-3].json["replaced"] is replies[-2].json["duplicate"] is replies[-1].json["duplicate"] is True


# --- one upload fails while another succeeds ---------------------------------------------------------------------------


def begin(port: int, body: bytes, **headers: str) -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", port), timeout=30)
    fields = {**HEADERS, **headers, "Content-Length": str(len(body)), "Host": "localhost", "Connection": "close"}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    peer.sendall(f"POST {FILES} HTTP/1.1\r\n{head}\r\n".encode() + body[:3000])
    return peer


def incoming(folder: Path) -> int:
    return len(list((folder / ".incoming").iterdir()))


def rejected(folder: Path) -> int:
    return sum(receipt["outcome"] == "rejected" for receipt in receipts(folder))


def test_an_upload_that_fails_late_leaves_a_later_one_of_the_same_name_alone(
    make_server: Callable[..., Server], folder: Path
) -> None:
    server = make_server()
    cases: list[tuple[str, bytes, dict[str, str]]] = [
        ("cut", HISTOGRAMS, {}),
        ("invalid", INVALID, {}),
        ("altered", HISTOGRAMS, {"sha256": "0" * 64}),
    ]
    for number, (what, body, headers) in enumerate(cases):
        for path in folder.glob("*.root"):
            path.unlink()
        peer = begin(server.port, body, **headers)
        wait_until(lambda: incoming(folder) == 1, 20)
        assert post(server.port, PROFILES).status == 200
        assert "replaced" not in post(server.port, PROFILES).json
        if what != "cut":
            peer.sendall(body[3000:])
            assert peer.recv(65536).startswith(b"HTTP/1.1 400 ")
        peer.close()
        wait_until(lambda: incoming(folder) == 0, 20)
        wait_until(lambda: rejected(folder) > number, 20)  # noqa: B023
        assert rejected(folder) == number + 1
        assert visible(folder) == {NAME: PROFILES}, what
        assert list((folder / ".replaced").iterdir()) == []


def raising(number: int) -> Callable[..., None]:
    """Return what takes the place of a function of `os` and fails with this error."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def while_another_fails_at_its_receipt(
    app: receiver.Receiver, monkeypatch: pytest.MonkeyPatch, first: bytes, then: Callable[[Client], Any]
) -> None:
    """Send a file whose receipt fails, with something done between its taking the name and its failure."""
    append = storage.Storage.append_receipt
    client = Client(app)

    def failing(*_: object, **__: object) -> None:
        monkeypatch.setattr(storage.Storage, "append_receipt", append)
        then(client)
        raise storage.NoRoom("There is no room for the receipt")

    monkeypatch.setattr(storage.Storage, "append_receipt", failing)
    assert client.post(FILES, headers=HEADERS, data=first).status_code == 507


@pytest.mark.parametrize("before", [None, GRAPHS], ids=["a free name", "a taken name"])
def test_an_upload_that_fails_at_its_receipt_leaves_a_later_and_different_one_alone(
    make_app: Callable[..., receiver.Receiver], folder: Path, monkeypatch: pytest.MonkeyPatch, before: bytes | None
) -> None:
    app = make_app()
    if before:
        assert Client(app).post(FILES, headers=HEADERS, data=before).status_code == 200

    def send(client: Client) -> None:
        assert client.post(FILES, headers=HEADERS, data=PROFILES).status_code == 200

    while_another_fails_at_its_receipt(app, monkeypatch, HISTOGRAMS, send)
    assert visible(folder) == {NAME: PROFILES}
    assert before is None or before in [path.read_bytes() for path in (folder / ".replaced").iterdir()]


def test_an_upload_that_fails_at_its_receipt_leaves_an_acknowledged_duplicate_in_the_folder(
    make_app: Callable[..., receiver.Receiver], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_again(client: Client) -> None:
        assert client.post(FILES, headers=HEADERS, data=HISTOGRAMS).status_code == 200

    while_another_fails_at_its_receipt(make_app(), monkeypatch, HISTOGRAMS, send_again)
    assert visible(folder) == {NAME: HISTOGRAMS}


def test_an_acknowledged_duplicate_that_began_before_the_upload_that_fails_stays_in_the_folder(
    make_app: Callable[..., receiver.Receiver], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_again(client: Client) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "now", lambda: "2000-01-01T00:00:00.000000Z")
            assert client.post(FILES, headers=HEADERS, data=HISTOGRAMS).status_code == 200

    while_another_fails_at_its_receipt(make_app(), monkeypatch, HISTOGRAMS, send_again)
    assert visible(folder) == {NAME: HISTOGRAMS}


def test_an_acknowledged_duplicate_stays_where_the_upload_that_fails_can_open_nothing_any_more(
    make_app: Callable[..., receiver.Receiver], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def send_again(client: Client) -> None:
            assert client.post(FILES, headers=HEADERS, data=HISTOGRAMS).status_code == 200
            patch.setattr(os, "open", raising(errno.EMFILE))

        while_another_fails_at_its_receipt(make_app(), patch, HISTOGRAMS, send_again)
    assert visible(folder) == {NAME: HISTOGRAMS}


def test_an_upload_that_fails_at_its_receipt_vanishes_where_somebody_cleared_the_hidden_folder_away(
    make_app: Callable[..., receiver.Receiver], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    while_another_fails_at_its_receipt(
        make_app(), monkeypatch, HISTOGRAMS, lambda client: (folder / ".replaced").rmdir()
    )
    assert visible(folder) == {}


def test_an_upload_that_fails_at_its_receipt_vanishes_where_the_hidden_folder_has_no_room_for_a_name(
    make_app: Callable[..., receiver.Receiver], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app()
    assert Client(app).post(FILES, headers=HEADERS, data=PROFILES).status_code == 200

    def fill(client: Client) -> None:
        monkeypatch.setattr(os, "rename", raising(errno.ENOSPC))

    while_another_fails_at_its_receipt(app, monkeypatch, HISTOGRAMS, fill)
    assert visible(folder) == {NAME: PROFILES}
    assert list((folder / ".replaced").iterdir()) == []


def test_an_upload_that_fails_at_its_receipt_brings_back_nothing_that_was_taken_away(
    make_app: Callable[..., receiver.Receiver], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_away(client: Client) -> None:
        (folder / NAME).unlink()

    while_another_fails_at_its_receipt(make_app(), monkeypatch, HISTOGRAMS, take_away)
    assert visible(folder) == {}
    assert incoming(folder) == 0


@pytest.mark.parametrize("before", [None, PROFILES], ids=["a free name", "a taken name"])
@pytest.mark.parametrize("first", [0, 1])
def test_of_two_that_both_fail_at_their_receipts_neither_is_visible_and_what_was_there_is(
    make_app: Callable[..., receiver.Receiver],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: bytes | None,
    first: int,
) -> None:
    client = Client(make_app())
    if before:
        assert client.post(FILES, headers=HEADERS, data=before).status_code == 200
    named = threading.Semaphore(0)
    may_fail = [threading.Event(), threading.Event()]
    numbers = itertools.count()

    def failing(*_: object, **__: object) -> None:
        number = next(numbers)
        named.release()
        assert may_fail[number].wait(20)
        raise storage.NoRoom("There is no room for the receipt")

    monkeypatch.setattr(storage.Storage, "append_receipt", failing)
    with ThreadPoolExecutor(2) as pool:
        answers = []
        for body in (HISTOGRAMS, GRAPHS):
            answers.append(pool.submit(client.post, FILES, headers=HEADERS, data=body))
            assert named.acquire(timeout=20)
        for number in (first, 1 - first):
            may_fail[number].set()
            assert answers[number].result().status_code == 507
    assert visible(folder) == ({NAME: before} if before else {})
    assert list((folder / ".replaced").iterdir()) == []


def test_an_upload_that_fails_at_its_receipt_knows_itself_from_one_that_was_given_its_inode(
    make_app: Callable[..., receiver.Receiver], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_away_and_send(client: Client) -> None:
        (folder / NAME).unlink()  # its inode is free now, and ext4 gives the next file the lowest that is
        assert client.post(FILES, headers=HEADERS, data=PROFILES).status_code == 200

    while_another_fails_at_its_receipt(make_app(), monkeypatch, HISTOGRAMS, take_away_and_send)
    assert visible(folder) == {NAME: PROFILES}


def test_a_duplicate_knows_the_file_it_was_compared_with_from_one_that_was_given_its_inode(
    make_app: Callable[..., receiver.Receiver], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(make_app())
    assert client.post(FILES, headers=HEADERS, data=HISTOGRAMS).status_code == 200
    append = storage.Storage.append_receipt

    def after_a_rival(*arguments: Any, **more: Any) -> bool:
        monkeypatch.setattr(storage.Storage, "append_receipt", append)
        (folder / NAME).unlink()  # as where its own receipt fails
        assert client.post(FILES, headers=HEADERS, data=PROFILES).status_code == 200
        return append(*arguments, **more)

    monkeypatch.setattr(storage.Storage, "append_receipt", after_a_rival)
    assert (client.post(FILES, headers=HEADERS, data=HISTOGRAMS).json or {}).get("replaced") is True
    assert visible(folder) == {NAME: HISTOGRAMS}
