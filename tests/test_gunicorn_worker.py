"""The worker class: who has a thread, what is waited for and how long; with few threads and short times."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from client import PROJECT, connect, head, read_answer, rest_of, wait_until
from server import free_port
from worker_app import content

import gunicorn_worker

THREADS = 4
MANY = 5 * THREADS  # connections, more than there are threads
MB = 1 << 20


class Worker:
    """A gunicorn with one worker of the class and worker_app.py; `times` replaces constants of gunicorn_worker."""

    def __init__(self, base: Path, settings: str = "", **times: float) -> None:
        self.port, self.log = free_port(), base / "gunicorn.log"
        self.configuration = base / "gunicorn.conf.py"
        lines = [
            "import gunicorn_worker",
            *(f"gunicorn_worker.{name} = {value}" for name, value in times.items()),
            "worker_class = 'gunicorn_worker.UploadWorker'",
            f"threads, graceful_timeout, control_socket_disable = {THREADS}, 60, True",
            settings,
        ]
        self.configuration.write_text("\n".join(lines))
        path = f"{PROJECT}:{PROJECT / 'tests'}"
        command = [sys.executable, "-m", "gunicorn", "-c", str(self.configuration), "-b", f"127.0.0.1:{self.port}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "worker_app:application"],
                cwd=base,
                env={**os.environ, "PYTHONPATH": path},
                stdout=log,
                stderr=log,
            )

        def serves() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):
                return self.get("/").startswith(b"HTTP/1.1 200")
            return False

        wait_until(serves, 30)

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        return connect(self.port, receive_buffer)

    def get(self, path: str) -> bytes:
        """Return the whole answer to a request of its own."""
        with self.connect() as peer:
            peer.sendall(head(path, "Connection: close", method="GET"))
            return rest_of(peer)

    def stop(self) -> float:
        """Stop it and return how many seconds that took."""
        began = time.monotonic()
        self.process.terminate()
        assert self.process.wait(50) == 0
        return time.monotonic() - began


def is_closed(peer: socket.socket) -> bool:
    """Whether the connection is at its end, after what was received is read."""
    peer.settimeout(0.01)
    try:
        while peer.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


@contextlib.contextmanager
def connections(worker: Worker, number: int = MANY, receive_buffer: int | None = None) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(worker.connect(receive_buffer)) for _ in range(number)]


def drip(peer: socket.socket) -> bytes:
    """Send a byte now and then, and return what comes back before the connection breaks or 20 s are over."""
    peer.settimeout(0.1)
    received, end = b"", time.monotonic() + 20
    while not received and time.monotonic() < end:
        peer.sendall(b"x")
        with contextlib.suppress(TimeoutError):
            received = peer.recv(1 << 16)
    return received


@contextlib.contextmanager
def workers(base: Path) -> Iterator[Callable[..., Worker]]:
    """Give a function that starts workers, and end them."""
    started: list[Worker] = []

    def start(settings: str = "", **times: float) -> Worker:
        started.append(Worker(base, settings, **times))
        return started[-1]

    yield start
    for worker in started:
        worker.process.kill()
        worker.process.wait()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker with the shipped times."""
    with workers(tmp_path_factory.mktemp("worker")) as start:
        yield start()


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker that gives up after a second."""
    with workers(tmp_path_factory.mktemp("hasty")) as start:
        yield start(HEAD_TIMEOUT=1, RATE_WINDOW=1, ANSWER_TIMEOUT=1, DISCARD_TIMEOUT=1, LINGER=0.5)


@pytest.fixture
def make_worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    with workers(tmp_path) as start:
        yield start


# --- heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7])
def test_a_head_in_pieces_is_understood(worker: Worker, size: int) -> None:
    sent = head("/take", "Content-Length: 5") + b"12345"
    with worker.connect() as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(sent), size):
            peer.sendall(sent[at : at + size])
            time.sleep(0.002)
        assert read_answer(peer) == (200, b"5")


def test_pipelined_requests_are_answered_in_order(worker: Worker) -> None:
    upload = head("/take", "Content-Length: 3")
    with worker.connect() as peer:
        peer.sendall(b"".join(head(f"/large?{size}", method="GET") for size in range(50)) + upload[:-10])
        for size in range(50):
            assert read_answer(peer) == (200, content(size))
        peer.sendall(upload[-10:] + b"abc")
        assert read_answer(peer) == (200, b"3")


def test_incomplete_heads_hold_no_thread(worker: Worker) -> None:
    with connections(worker) as peers:
        for peer in peers:
            peer.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert worker.get("/").startswith(b"HTTP/1.1 200")
        assert not any(is_closed(peer) for peer in peers)


def test_a_dripping_head_ends_in_time(hasty: Worker) -> None:
    with hasty.connect() as peer:
        peer.sendall(b"GET / HTTP/1.1\r\nX: ")
        received = drip(peer)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["status"] == 408


def test_a_next_head_has_its_own_time(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker("keepalive = 1", HEAD_TIMEOUT=20)
    with worker.connect() as peer:
        peer.sendall(head("/", method="GET"))
        assert read_answer(peer) == (200, b"")
        peer.sendall(b"GET /large?3 HTTP/1.1\r\n")
        time.sleep(3)
        peer.sendall(b"Host: x\r\n\r\n")
        assert read_answer(peer) == (200, b"012")
        wait_until(lambda: is_closed(peer), 20)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (head("/", "X: " + "y" * 9000), 431),
        (head("/", *["X: y"] * 200), 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20000, 431),
        (head("/" + "y" * 9000), 414),
        (head("/", "Transfer-Encoding: gzip, x"), 501),
        (head("/fail"), 500),
    ],
    ids=["no HTTP", "long field", "many fields", "endless", "long address", "coding", "fault"],
)
def test_protocol_errors_are_answered_in_json(worker: Worker, sent: bytes, status: int) -> None:
    with worker.connect() as peer:
        peer.sendall(sent)
        answer, _, body = rest_of(peer).partition(b"\r\n\r\n")
    assert int(answer.split()[1]) == status
    assert b"\r\nContent-Type: application/json" in answer
    assert (json.loads(body)["status"], json.loads(body)["received"]) == (status, None)


def test_a_head_of_nginxs_size_is_taken(worker: Worker) -> None:
    cookies = [f"Cookie-{number}: " + "c" * 8000 for number in range(3)]
    with worker.connect() as peer:
        peer.sendall(head("/large?2", *cookies, *[f"X-{number}: y" for number in range(40)], method="GET"))
        assert read_answer(peer) == (200, b"01")


def test_connections_beyond_the_limit_replace_waiting_ones(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker("worker_connections = 40")
    with connections(worker, 100):
        assert worker.get("/large?1").endswith(b"0")


def test_too_many_open_files_end_no_worker(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children")
    (pid,) = (int(text) for text in children.read_text().split())
    with worker.connect() as upload:
        upload.sendall(head("/take", "Content-Length: 2000") + bytes(1000))
        time.sleep(0.5)
        most = len(os.listdir(f"/proc/{pid}/fd")) + 10
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))
        with connections(worker, 50):
            assert worker.get("/large?1").endswith(b"0")
            upload.sendall(bytes(1000))
            assert read_answer(upload) == (200, b"2000")
    assert children.read_text().split() == [str(pid)]


# --- bodies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("came", [b"", b"abc"], ids=["body to come", "body has come"])
def test_continue_is_sent_for_a_body_to_come(worker: Worker, came: bytes) -> None:
    with worker.connect() as peer:
        peer.sendall(head("/take", "Content-Length: 3", "Expect: 100-continue") + came)
        if not came:
            assert peer.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            peer.sendall(b"abc")
        assert read_answer(peer) == (200, b"3")


@pytest.mark.parametrize("field", ["Content-Length: 3000000000", "Transfer-Encoding: chunked"])
def test_a_refusal_comes_without_continue(worker: Worker, field: str) -> None:
    with worker.connect() as peer:
        peer.sendall(head("/refuse", field, "Expect: 100-continue"))
        received = rest_of(peer)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nConnection: close\r\n" in received


@pytest.mark.parametrize(
    ("path", "field", "body", "answer"),
    [
        ("/refuse", "Content-Length: 0", b"", (400, b"refused")),
        ("/refuse", "Content-Length: 2000", bytes(2000), (400, b"refused")),
        ("/take", "Content-Length: 70000", bytes(70000), (200, b"70000")),
        ("/take", "Transfer-Encoding: chunked", b"11170\r\n" + bytes(70000) + b"\r\n0\r\n\r\n", (200, b"70000")),
    ],
    ids=["refused, none", "refused, small", "read", "read, chunked"],
)
def test_a_body_that_came_keeps_the_connection(
    worker: Worker, path: str, field: str, body: bytes, answer: tuple[int, bytes]
) -> None:
    with worker.connect() as peer:
        for _ in range(3):
            peer.sendall(head(path, field) + body)
            assert read_answer(peer) == answer


def test_refused_bodies_hold_no_thread(worker: Worker) -> None:
    with connections(worker) as peers:
        for peer in peers:
            peer.sendall(head("/refuse", "Content-Length: 3000000000"))
            assert read_answer(peer) == (400, b"refused")
        assert worker.get("/").startswith(b"HTTP/1.1 200")


def test_a_refused_body_is_read_within_bounds(worker: Worker) -> None:
    """1 MiB, and what the buffers of the two kernels hold."""
    with worker.connect() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        peer.sendall(head("/refuse", "Content-Length: 3000000000"))
        sent = 0
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while sent < 200 * MB:
                sent += peer.send(bytes(1 << 16))
        assert MB <= sent < 20 * MB
        assert rest_of(peer).endswith(b"refused")


def test_a_dripping_refused_body_ends_in_time(hasty: Worker) -> None:
    began = time.monotonic()
    with hasty.connect() as peer:
        peer.sendall(head("/refuse", "Content-Length: 3000000000"))
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while time.monotonic() < began + 20:
                peer.sendall(b"x")
                time.sleep(0.1)


def test_an_allowed_refused_body_is_read_whole(worker: Worker) -> None:
    with worker.connect() as peer:
        peer.sendall(head(f"/allow?{60 * MB}", f"Content-Length: {50 * MB}"))
        for _ in range(50):
            peer.sendall(bytes(MB))
        assert read_answer(peer) == (400, b"refused")
        assert peer.recv(1) == b""


def test_an_allowed_refused_body_keeps_a_rate(hasty: Worker) -> None:
    with hasty.connect() as slow, hasty.connect() as fast:
        open_ = {200: slow, 20000: fast}  # by bytes a second
        for peer in (slow, fast):
            peer.sendall(head(f"/allow?{60 * MB}", f"Content-Length: {50 * MB}"))
            assert read_answer(peer) == (400, b"refused")
        for _ in range(40):
            time.sleep(0.1)
            for rate, peer in [*open_.items()]:
                try:
                    peer.sendall(bytes(rate // 10))
                except (BrokenPipeError, ConnectionResetError):
                    del open_[rate]
        assert open_ == {20000: fast}


@pytest.mark.parametrize("dripping", [True, False])
def test_a_slow_body_is_told_so(hasty: Worker, dripping: bool) -> None:
    with hasty.connect() as peer:
        peer.sendall(head("/take", "Content-Length: 1000000"))
        received = drip(peer) if dripping else peer.recv(1 << 16)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"slower than 1024 bytes a second" in received


def test_a_slow_application_is_not_the_senders_fault(hasty: Worker) -> None:
    with hasty.connect() as peer:
        peer.sendall(head("/take?400", "Content-Length: 200000") + bytes(200000))
        assert read_answer(peer) == (200, b"200000")


# --- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/large", "/file"])
def test_unread_answers_hold_no_thread(worker: Worker, path: str) -> None:
    size = 3 * MB
    with connections(worker, receive_buffer=4096) as peers:
        for peer in peers:
            peer.sendall(head(f"{path}?{size}", method="GET"))
        assert worker.get("/").startswith(b"HTTP/1.1 200")
        for peer in peers[-3:]:
            assert read_answer(peer) == (200, content(size))
            peer.sendall(head("/large?5", method="GET"))
            assert read_answer(peer) == (200, b"01234")


def test_an_answer_beyond_memory_waits_for_its_reader(worker: Worker) -> None:
    with worker.connect(receive_buffer=1 << 16) as peer:
        peer.sendall(head(f"/large?{12 * MB}", method="GET"))
        time.sleep(0.2)
        assert read_answer(peer) == (200, content(12 * MB))


def test_an_unread_answer_is_given_up(hasty: Worker) -> None:
    """Also where a few bytes of it are read now and then."""
    with connections(hasty, 4, receive_buffer=2048) as peers:
        for peer, path in zip(peers, ["/large", "/file"] * 2, strict=True):
            peer.sendall(head(f"{path}?{3 * MB}", method="GET"))
        end = time.monotonic() + 4
        while time.monotonic() < end:
            time.sleep(0.1)
            for peer in peers[:2]:
                with contextlib.suppress(ConnectionResetError):
                    peer.recv(2)
        assert max(len(rest_of(peer)) for peer in peers) < 3 * MB


def test_a_slow_reader_gets_a_whole_file(hasty: Worker) -> None:
    """For much longer than an answer may wait without being read."""
    with hasty.connect(receive_buffer=1 << 16) as peer:
        peer.sendall(head(f"/file?{4 * MB}", "Connection: close", method="GET"))
        received = bytearray()
        while piece := peer.recv(1 << 16):
            received += piece
            time.sleep(0.05)
    assert received.partition(b"\r\n\r\n")[2] == content(4 * MB)


# --- the end -----------------------------------------------------------------------------------------------------------


def test_a_stop_waits_for_uploads_only(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker(STOP_TIMEOUT=2)
    with contextlib.ExitStack() as stack:
        heads, refused, unread = (
            [stack.enter_context(worker.connect(receive_buffer=4096)) for _ in range(3)] for _ in range(3)
        )
        upload = stack.enter_context(worker.connect())
        for peer in heads:
            peer.sendall(b"GET / HTTP/1.1\r\nX: ")
        for peer in refused:
            peer.sendall(head("/refuse", "Content-Length: 3000000000"))
            assert read_answer(peer) == (400, b"refused")
        for peer in unread:
            peer.sendall(head(f"/file?{3 * MB}", method="GET"))
            assert peer.recv(1) == b"H"
        upload.sendall(head("/take", "Content-Length: 2000000") + bytes(1000000))
        worker.process.terminate()
        wait_until(lambda: all(is_closed(peer) for peer in refused), 10)
        wait_until(lambda: all(is_closed(peer) for peer in heads), 10)
        time.sleep(3)
        assert worker.process.poll() is None
        upload.sendall(bytes(1000000))
        assert read_answer(upload) == (200, b"2000000")
        assert worker.stop() < 10


def test_tls_is_refused_in_one_line(make_worker: Callable[..., Worker], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="speaks no TLS"):
        make_worker(f"certfile = keyfile = {str(tmp_path / 'gunicorn.conf.py')!r}")


# --- the folder of the metrics -----------------------------------------------------------------------------------------


@pytest.fixture
def metrics_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Return metrics_folder as a new master would call it."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    gunicorn_worker.metrics_folder.cache_clear()
    yield gunicorn_worker.metrics_folder
    gunicorn_worker.metrics_folder.cache_clear()


def test_the_metrics_lie_in_memory(metrics_folder: Callable[[], str]) -> None:
    folder = metrics_folder()
    assert folder.startswith("/dev/shm/" if os.access("/dev/shm", os.W_OK) else "/")
    assert Path(folder).stat().st_mode & 0o777 == 0o700
    assert metrics_folder() == folder


def test_a_master_begins_with_empty_metrics(
    metrics_folder: Callable[[], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    (tmp_path / "counter_1.db").touch()
    (tmp_path / "other").touch()
    assert metrics_folder() == str(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    (tmp_path / "counter_2.db").touch()
    metrics_folder()  # at a reload
    assert (tmp_path / "counter_2.db").exists()


def test_a_new_master_leaves_the_old_ones_metrics(
    metrics_folder: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGUSR2: the new master inherits the variable while the old one still serves."""
    old = metrics_folder()
    Path(old, "counter_1.db").touch()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", old)
    gunicorn_worker.metrics_folder.cache_clear()
    assert metrics_folder() != old
    assert Path(old, "counter_1.db").exists()


def test_a_signal_to_the_process_group_ends_it(make_worker: Callable[..., Worker]) -> None:
    worker = make_worker()
    worker.process.send_signal(signal.SIGINT)
    assert worker.process.wait(20) == 0
