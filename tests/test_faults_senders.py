"""Slow and rude senders: they get their answer or harm nobody but themselves."""

from __future__ import annotations

import http.client
import json
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

import pytest
from conftest import (
    FILES,
    HEADERS,
    HISTOGRAMS,
    LONG_DRIP,
    NAME,
    PROFILES,
    Server,
    curl,
    post,
    settings,
    visible,
    wait_until,
)

import storage

DRIPS = 100
QUICK = 30  # seconds, on the slowest machine; who waits for a peer that does nothing waits for 120


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server with the shipped gunicorn.conf.py that all tests here are rude to, and its data folder."""
    base = tmp_path_factory.mktemp("senders")
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    server = Server(settings(base / "data", max_file_size=str(32 << 20)), base / "gunicorn.log", ())
    yield server, base / "data"
    server.stop()


@pytest.fixture
def rude(shared: tuple[Server, Path]) -> Iterator[tuple[Server, Path]]:
    """The shared server; whatever a test does, it has its workers, its folder and its manners afterwards."""
    server, folder = shared
    # A test before this one may have left whole uploads behind whose senders did not wait for the answer.
    wait_until(lambda: not any((folder / ".incoming").iterdir()), 60)
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


def name_of(time_stamp: int) -> str:
    return storage.file_name("testagent", 123, time_stamp)


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


def test_ordinary_uploads_are_not_kept_waiting_by_a_hundred_senders_of_a_byte_a_second(
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
    wait_until(lambda: len(list((folder / ".incoming").iterdir())) == DRIPS, 60)
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


def test_an_upload_of_45_seconds_ends_in_its_200(long_drip: tuple[subprocess.Popen[str], Path]) -> None:
    sender, folder = long_drip
    out, _ = sender.communicate(timeout=LONG_DRIP + 30)
    seconds, _, answer = out.partition(" ")
    assert answer == "HTTP/1.1 200 OK\n"
    assert float(seconds) >= LONG_DRIP
    assert visible(folder) == {NAME: HISTOGRAMS}


@pytest.mark.slow
def test_a_hundred_uploads_of_45_seconds_end_in_their_200(rude: tuple[Server, Path]) -> None:
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


def test_senders_that_do_not_close_their_connection_keep_nobody_waiting(rude: tuple[Server, Path]) -> None:
    server, _ = rude
    begin = time.monotonic()
    peers = [connect(server.port) for _ in range(40)]
    for peer in peers:
        peer.sendall(head(None, "Connection: close", method="GET"))
    for peer in peers:
        assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")
    check_that_ten_others_are_served(server, peers, begin)


def test_connections_that_say_nothing_keep_nobody_waiting(rude: tuple[Server, Path]) -> None:
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
def test_a_connection_cut_at_any_stage_leaves_nothing_behind(rude: tuple[Server, Path], kind: str, how: str) -> None:
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
    wait_until(lambda: list((folder / ".incoming").iterdir()) == [], 60)
    there = visible(folder)
    # The end of a form behind its file, and the last line of a chunked body, may be taken for granted.
    assert there in ({}, {NAME: HISTOGRAMS})
    if kind == "bare":
        assert there == {}


def test_a_sender_that_leaves_before_its_answer_has_its_whole_file_stored_or_nothing(
    rude: tuple[Server, Path],
) -> None:
    server, folder = rude
    for stamp in range(1100, 1130):
        peer = connect(server.port)
        peer.sendall(head(len(HISTOGRAMS), stamp=stamp) + HISTOGRAMS)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
    wait_until(lambda: list((folder / ".incoming").iterdir()) == [], 60)
    assert set(visible(folder).values()) <= {HISTOGRAMS}


# --- bodies of another length than announced ---------------------------------------------------------------------------


def test_a_body_shorter_than_its_content_length_is_refused(rude: tuple[Server, Path]) -> None:
    server, folder = rude
    with connect(server.port) as peer:
        peer.sendall(head(len(HISTOGRAMS) + 1) + HISTOGRAMS)
        peer.shutdown(socket.SHUT_WR)
        status, answer = read_answer(peer)
    assert (status, answer["received"]) == (400, None)
    assert NAME not in visible(folder)


def test_bytes_behind_a_body_are_no_part_of_it(rude: tuple[Server, Path]) -> None:
    server, folder = rude
    with connect(server.port) as peer:
        peer.sendall(head(len(HISTOGRAMS)) + HISTOGRAMS + b"\x00\xff and more\r\n\r\n")
        status, answer = read_answer(peer)
    assert (status, answer["size"]) == (200, len(HISTOGRAMS))
    assert visible(folder) == {NAME: HISTOGRAMS}


def test_a_body_shortened_by_its_content_length_is_refused(rude: tuple[Server, Path]) -> None:
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
def test_a_content_length_that_is_no_number_of_bytes_is_refused(rude: tuple[Server, Path], length: str) -> None:
    server, folder = rude
    with connect(server.port) as peer:
        peer.sendall(head(None, f"Content-Length: {length}") + HISTOGRAMS)
        peer.shutdown(socket.SHUT_WR)
        status, answer = read_answer(peer)
    assert status in (400, 413)
    assert (answer["status"], answer["received"]) == (status, None)
    assert NAME not in visible(folder)


@pytest.mark.parametrize("size", [1, 7, 1000, 100_000])
def test_a_chunked_body_of_any_chunks_is_stored(rude: tuple[Server, Path], size: int) -> None:
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
def test_a_malformed_chunked_body_is_refused(rude: tuple[Server, Path], body: bytes) -> None:
    server, folder = rude
    with connect(server.port) as peer:
        peer.sendall(head(None, "Transfer-Encoding: chunked") + body)
        peer.shutdown(socket.SHUT_WR)
        status, answer = read_answer(peer)
    assert (status, answer["status"], answer["received"]) == (400, 400, None)
    assert NAME not in visible(folder)


def test_a_chunked_body_is_refused_as_soon_as_it_is_larger_than_the_limit(rude: tuple[Server, Path]) -> None:
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


def test_a_sender_that_waits_for_100_continue_is_told_to_go_on(rude: tuple[Server, Path]) -> None:
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


def test_a_sender_that_never_goes_on_after_100_continue_harms_nobody(rude: tuple[Server, Path]) -> None:
    server, folder = rude
    with connect(server.port) as peer:
        peer.sendall(head(len(HISTOGRAMS), "Expect: 100-continue"))
        assert peer.recv(65536).startswith(b"HTTP/1.1 100 ")
        assert post(server.port, PROFILES).status == 200
    wait_until(lambda: list((folder / ".incoming").iterdir()) == [], 60)
    assert visible(folder) == {NAME: PROFILES}


@pytest.mark.parametrize("wrong", ["token: wrong", "runNumber: x"])
def test_a_large_upload_that_is_refused_gets_its_answer_and_no_broken_connection(
    rude: tuple[Server, Path], wrong: str
) -> None:
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
    # A sender that looks for its answer only when it has sent everything.
    for more in ({}, {"Connection": "close"}):
        assert post(server.port, bytes(20 << 20), {**HEADERS, **more, name: value}).status == 400
    assert NAME not in visible(folder)


# --- senders that do not listen ----------------------------------------------------------------------------------------


def test_clients_that_never_read_their_answer_keep_nobody_waiting(rude: tuple[Server, Path]) -> None:
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


def test_many_requests_sent_at_once_on_a_connection_that_nobody_reads_are_bounded(rude: tuple[Server, Path]) -> None:
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
