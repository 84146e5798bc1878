"""gunicorn's worker class for the DQM receiver: threads serve requests, and connections wait in the event loop.

gunicorn's own threads wait for clients: 300 connections that send a byte a second hold every thread of two workers. Here a
connection has a thread only from a complete request head to its answer. Before and after that it waits in the event loop
of `ThreadWorker`, which costs a file descriptor:

- until its head is complete (10 s);
- until the client has read its answer (30 s without progress);
- after a refusal, while the rest of the body comes (1 MiB and 5 s, or what the application allows), half-closed, so that
  the client gets its answer and no reset (RFC 9112, section 9.6).

The threads take turns (turns.py) from a request's head to its answer.

The application notices three differences. `100 Continue` is sent when the body is first read, so a request that its head
condemns is refused before its body is sent. Reading a body raises `BodyTooSlow`. `environ["dqm_receiver.discard"](n)` allows n
bytes of a refused body to be read on; an application that finds it leaves the rest of the body alone.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import heapq
import json
import logging
import os
import resource
import select
import shutil
import signal
import socket
import struct
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import cache, partial
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE
from typing import Any, cast

from gunicorn.http.body import ChunkedReader
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, ParseException, UnsupportedTransferCoding
from gunicorn.http.message import Request
from gunicorn.http.parser import RequestParser
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers.gthread import TConn, ThreadWorker

import turns

HEAD_TIMEOUT = 10.0  # seconds until a head is complete
MAX_HEAD = 64 << 10  # bytes
MIN_RATE = 1 << 10  # bytes a second: of a body over RATE_WINDOW, of an answer over ANSWER_TIMEOUT
RATE_WINDOW = 60.0  # seconds
ANSWER_TIMEOUT = 30.0  # seconds
DISCARD_BYTES = 1 << 20  # read of a refused body, unless the application allows more
DISCARD_TIMEOUT = 5.0  # seconds
LINGER = 2.0  # seconds for the client to read its answer once no more of the body is read
STOP_TIMEOUT = 10.0  # seconds for the client to read its answer when the worker stops
SEND_BUFFER = 256 << 10  # bytes in the kernel, which would otherwise take 2.5 MB of unread answers
MAX_UNSENT = 4 << 20  # bytes of an answer in memory
NEXT_REQUEST = 0.02  # seconds for which a thread waits for the next request of its connection
SWEEP_INTERVAL = 0.5  # seconds between two looks at the deadlines
SPARE = 16  # connections that are closed together if there are too many
RECV_SIZE = 8 << 10  # bytes
METRICS_PREFIX = "dqm-receiver-"
RESOURCE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

logger = logging.getLogger("dqm_receiver")


class BodyTooSlow(TimeoutError):
    """The body came slower than MIN_RATE."""

    def __init__(self) -> None:
        super().__init__(f"The body came slower than {MIN_RATE} bytes a second, over {RATE_WINDOW:.0f} seconds")


class AnswerSocket(socket.socket):
    """A connection that buffers an answer until the client reads it, so that no thread waits for that.

    Head and body of an answer leave together, too: that is one system call and one packet less for each request.
    """

    def __init__(self, accepted: socket.socket) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(RATE_WINDOW), 0))
        self.unsent: deque[bytearray | list[int]] = deque()  # bytes, and files as [descriptor, offset, count]
        self.moved = 0  # bytes sent, or received and discarded
        self.discard_limit = DISCARD_BYTES

    def recv(self, size: int, flags: int = 0) -> bytes:
        try:
            return super().recv(size, flags | socket.MSG_DONTWAIT)
        except BlockingIOError:
            if flags & socket.MSG_DONTWAIT:
                raise
            with turns.waiting():
                return super().recv(size, flags)

    def sendall(self, data: Any, flags: int = 0) -> None:
        if not self.unsent or isinstance(self.unsent[-1], list):
            self.unsent.append(bytearray())
        buffer = cast(bytearray, self.unsent[-1])
        buffer += data
        while len(buffer) > MAX_UNSENT and not self.flush():
            with turns.waiting():
                is_writable = select.select((), (self,), (), ANSWER_TIMEOUT)[1]
            if not is_writable:
                raise BrokenPipeError(errno.EPIPE, "the client does not read its answer")

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        if count is None:
            count = os.fstat(file.fileno()).st_size - offset
        self.unsent.append([os.dup(file.fileno()), offset, count])  # the application closes its own
        return count

    def flush(self) -> bool:
        """Send as much as the client takes without waiting, and return whether everything is sent."""
        while self.unsent:
            part = self.unsent[0]
            try:
                if isinstance(part, bytearray):
                    sent = self.send(part, socket.MSG_DONTWAIT)
                    del part[:sent]
                else:
                    self.setblocking(False)  # sendfile knows no flags
                    with turns.waiting():
                        sent = os.sendfile(self.fileno(), *part)
                    if not sent and part[2]:
                        raise BrokenPipeError(errno.EPIPE, "the file became shorter")
                    part[1:] = part[1] + sent, part[2] - sent
            except BlockingIOError:
                return False
            self.moved += sent
            if isinstance(part, list) and not part[2]:
                os.close(part[0])
                part.clear()
            if not part:
                self.unsent.popleft()
        return True

    def allow_discard(self, limit: int) -> None:
        """Allow so many bytes of a refused body to be read on, above the minimum rate."""
        self.discard_limit = max(limit, DISCARD_BYTES)

    def abort(self) -> None:
        """Make the kernel drop unsent bytes and reset the client."""
        with contextlib.suppress(OSError):
            self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self) -> None:
        for part in self.unsent:
            if isinstance(part, list):
                os.close(part[0])
        self.unsent.clear()
        super().close()


class BodyReader(SocketUnreader):  # type: ignore[misc]  # gunicorn has no types
    """Reads a body from the connection: asks for it (`100 Continue`) and demands MIN_RATE."""

    max_body_chunk = 128 << 10  # bytes received at once: gunicorn's 1 MiB costs 2 MB of memory for each connection

    def __init__(self, connection: AnswerSocket) -> None:
        super().__init__(connection)
        self.expects_continue = False
        self.waited, self.received = 0.0, 0  # seconds and bytes since the rate was last looked at

    def chunk(self, size_hint: int | None = None) -> bytes:
        if self.expects_continue:
            self.expects_continue = False
            self.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        began = time.monotonic()
        try:
            data = cast(bytes, super().chunk(size_hint))
        except BlockingIOError as error:  # SO_RCVTIMEO
            raise BodyTooSlow from error
        # Only the time spent in waiting counts: a slow disk is not the sender's fault.
        self.waited += time.monotonic() - began
        self.received += len(data)
        if self.waited > RATE_WINDOW:
            if self.received < RATE_WINDOW * MIN_RATE:
                raise BodyTooSlow
            self.waited, self.received = 0.0, 0
        return data


class UploadRequest(Request):  # type: ignore[misc]
    """A request whose connection is closed after the answer if part of its body may still come."""

    def has_rest(self) -> bool:
        if self.body.failed:
            return True
        if isinstance(self.body.reader, ChunkedReader):
            return self.body.reader.parser is not None
        return bool(self.body.reader.length > len(self.unreader.buf.getvalue()))

    def should_close(self) -> bool:
        return self.has_rest() or bool(super().should_close())


class ConnectionParser(RequestParser):  # type: ignore[misc]
    """Parses the requests of a connection; gunicorn itself would send `100 Continue` before it calls the application."""

    mesg_class = UploadRequest

    def __init__(self, cfg: Any, connection: AnswerSocket, client: Any) -> None:
        super().__init__(cfg, connection, client)
        self.unreader = BodyReader(connection)

    def __next__(self) -> UploadRequest:
        self.unreader.expects_continue = False
        request = cast(UploadRequest, super().__next__())
        self.unreader.expects_continue, request._expected_100_continue = request._expected_100_continue, False
        return request


class Connection(TConn):  # type: ignore[misc]
    """A connection, and the event for which it waits in the event loop."""

    def __init__(self, cfg: Any, accepted: socket.socket, client: Any, server: Any) -> None:
        super().__init__(cfg, AnswerSocket(accepted), client, server)
        self.parser = ConnectionParser(cfg, self.sock, client)
        self.initialized = self.data_ready = True  # gunicorn need not wait for data
        self.head = bytearray()  # of the next request
        self.keep: bool | None = None  # whether another request may follow; None: the client is gone
        self.deadline = 0.0
        self.window = 0.0  # seconds by which the deadline moves where the client has kept the rate; 0: it does not move
        self.moved_before = 0  # bytes, when the window began
        self.discard = 0  # bytes still to be read

    def has_head(self) -> bool:
        """Read the bytes that have arrived, without waiting, and return whether a head is complete.

        Searching only what is new keeps this linear: gunicorn's parser searches and copies all of it for each piece.
        """
        searched = max(len(self.head) - 3, 0)
        self.head += self.parser.unreader.take_buffered()
        while self.head.find(b"\r\n\r\n", searched) < 0:
            if len(self.head) > MAX_HEAD:
                raise LimitRequestHeaders("head")
            try:
                piece = self.sock.recv(RECV_SIZE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            if not piece:
                raise EOFError
            searched = max(len(self.head) - 3, 0)
            self.head += piece
        self.parser.unreader.unread(bytes(self.head))
        self.head.clear()
        return True

    def has_next_head(self) -> bool:
        """Wait for an instant for the next request; the event loop meets any error again."""
        try:
            if self.has_head():
                return True
            poll = select.poll()
            poll.register(self.sock, select.POLLIN)
            with turns.waiting():
                has_data = bool(poll.poll(NEXT_REQUEST * 1000))
            return has_data and self.has_head()
        except (OSError, EOFError, LimitRequestHeaders):
            return False


class UploadWorker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's worker with threads. Only an upload that waits for its body keeps a thread waiting for its client."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waiting: set[Connection] = set()  # in the event loop
        self.running = 0  # connections that have a thread or wait for one
        self.next_sweep = 0.0
        self.bin = bytearray(256 << 10)  # for refused bodies

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        if cfg.is_ssl:
            raise RuntimeError("this worker class speaks no TLS: put nginx before it")

    def init_signals(self) -> None:
        super().init_signals()
        set_signal_mask(signal.SIG_UNBLOCK)

    def load_wsgi(self) -> None:
        super().load_wsgi()
        application: Callable[..., Iterable[bytes]] = self.app.wsgi()

        def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            connection = environ["gunicorn.socket"]
            connection.discard_limit = DISCARD_BYTES
            environ["dqm_receiver.discard"] = connection.allow_discard
            forwarded = environ.get("HTTP_X_FORWARDED_FOR")
            if forwarded and environ["REMOTE_ADDR"] in self.cfg.forwarded_allow_ips:  # a proxy of ours: see nginx.conf
                environ["REMOTE_ADDR"] = forwarded.rpartition(",")[2].strip()
            return application(environ, start_response)

        self.wsgi = wsgi

    def run(self) -> None:
        # Files for the uploads: a name and a temporary file each, and their folders.
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 4 * self.cfg.threads
        self.worker_connections = max(min(self.cfg.worker_connections, files), SPARE)
        super().run()

    # --- in the event loop -------------------------------------------------------------------------------------------

    def accept(self, listener: Any) -> None:
        """Accept a connection, unless another worker that has less to do is quicker, or too many files are open."""
        if self.cfg.workers > 1:
            time.sleep(0.0002 * min(self.running, 10))
        try:
            accepted, client = listener.accept()
        except OSError as error:
            if error.errno in RESOURCE_ERRORS:  # gunicorn's worker would end, and its uploads with it
                self.worker_connections = max(self.nr_conns - SPARE, SPARE)  # the uploads need files, too
                self.drop_oldest()
                time.sleep(0.1)
            elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                raise
            return
        self.nr_conns += 1
        if self.nr_conns >= self.worker_connections:
            self.drop_oldest()
        self.await_head(Connection(self.cfg, accepted, client, listener.getsockname()), HEAD_TIMEOUT)

    def drop_oldest(self) -> None:
        """Make room for new connections: end those that would be given up first."""
        for conn in heapq.nsmallest(SPARE, self.waiting, key=lambda conn: conn.deadline):
            self.end(conn)

    def wait(self, conn: Connection, events: int, callback: Callable[[Connection], None], seconds: float) -> None:
        conn.deadline = time.monotonic() + seconds
        conn.window, conn.moved_before = 0.0, conn.sock.moved
        self.waiting.add(conn)
        self.poller.register(conn.sock, events, partial(self.on_event, conn, callback))

    def on_event(self, conn: Connection, callback: Callable[[Connection], None], _sock: object) -> None:
        if conn in self.waiting:  # another event may have ended it meanwhile
            callback(conn)

    def stop_waiting(self, conn: Connection) -> None:
        self.waiting.discard(conn)
        with contextlib.suppress(KeyError):
            self.poller.unregister(conn.sock)

    def end(self, conn: Connection) -> None:
        self.stop_waiting(conn)
        self.nr_conns -= 1
        conn.close()

    def await_head(self, conn: Connection, seconds: float = HEAD_TIMEOUT) -> None:
        """Give a connection to a thread once its head is complete."""
        idle = not conn.head
        try:
            if conn.has_head():
                self.stop_waiting(conn)
                self.enqueue_req(conn)
            elif conn not in self.waiting:
                self.wait(conn, EVENT_READ, self.await_head, HEAD_TIMEOUT if conn.head else seconds)
            elif idle and conn.head and conn.parser.req_count:
                conn.deadline = time.monotonic() + HEAD_TIMEOUT
        except LimitRequestHeaders as error:
            self.refuse(conn, error)
        except (OSError, EOFError):
            self.end(conn)

    def enqueue_req(self, conn: Connection) -> None:
        self.running += 1
        super().enqueue_req(conn)

    def finish_request(self, conn: Connection, fs: Future[None]) -> None:
        """Take a connection back from a thread, and wait for its next event."""
        self.running -= 1
        if fs.cancelled() or fs.exception() or conn.keep is None:
            self.end(conn)
        elif conn.sock.unsent:
            since = (conn.deadline, conn.moved_before) if conn.window else None
            self.wait(conn, EVENT_WRITE, self.on_writable, ANSWER_TIMEOUT if self.alive else STOP_TIMEOUT)
            conn.window = ANSWER_TIMEOUT
            if since:  # the time runs on while the client reads slowly
                conn.deadline, conn.moved_before = since
        elif conn.keep:
            self.await_head(conn, self.cfg.keepalive if self.alive else LINGER)
        else:
            self.discard_rest(conn)

    def on_writable(self, conn: Connection) -> None:
        self.stop_waiting(conn)
        self.enqueue_req(conn)  # in a thread, because a file may have to come from the disk

    def discard_rest(self, conn: Connection) -> None:
        """Half-close, and read on for a while, so that the client gets its answer before it is reset."""
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.end(conn)
            return
        conn.discard = conn.sock.discard_limit
        allowed = conn.discard > DISCARD_BYTES
        self.wait(conn, EVENT_READ, self.on_rest, RATE_WINDOW if allowed else DISCARD_TIMEOUT)
        conn.window = RATE_WINDOW if allowed else 0.0
        if not self.alive:
            self.end(conn)

    def on_rest(self, conn: Connection) -> None:
        try:
            size = conn.sock.recv_into(self.bin, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        conn.sock.moved += size
        conn.discard -= size
        if not size:
            self.end(conn)
        elif conn.discard <= 0:
            self.poller.unregister(conn.sock)
            conn.deadline, conn.window = time.monotonic() + LINGER, 0.0

    def murder_keepalived(self, force: bool = False) -> None:
        """Give up connections whose deadline is over; `ThreadWorker.run` calls this at each turn."""
        now = time.monotonic()
        if now < self.next_sweep and not force:
            return
        self.next_sweep = now + SWEEP_INTERVAL
        for conn in [conn for conn in self.waiting if force or conn.deadline <= now]:
            if self.alive and conn.window and conn.sock.moved - conn.moved_before >= conn.window * MIN_RATE:
                conn.deadline, conn.moved_before = now + conn.window, conn.sock.moved
            elif conn.head and not force:
                self.refuse(conn, TimeoutError())
            else:
                if conn.sock.unsent:
                    conn.sock.abort()
                self.end(conn)

    def _cap_keepalive(self, deadline: float) -> None:
        """The worker stops: end refused bodies at once, and wait a moment for heads and answers."""
        for conn in list(self.waiting):
            if conn.sock.unsent:
                conn.deadline = min(conn.deadline, time.monotonic() + STOP_TIMEOUT)
            elif conn.discard:
                self.end(conn)
            else:
                conn.deadline = min(conn.deadline, deadline)

    def refuse(self, conn: Connection, error: Exception) -> None:
        """Answer a head that is too large or too slow."""
        self.stop_waiting(conn)
        conn.head.clear()
        self.handle_error(None, conn.sock, conn.client, error)
        conn.sock.discard_limit = DISCARD_BYTES
        try:
            conn.sock.flush()
        except OSError:
            self.end(conn)
        else:
            self.discard_rest(conn)

    # --- in a thread -------------------------------------------------------------------------------------------------

    def handle(self, conn: Connection) -> None:
        """Serve a request and those that follow at once: a turn of the event loop costs more than a small answer."""
        try:
            if conn.sock.unsent:
                if conn.sock.flush():
                    conn.window = 0.0
                return
            follows = True
            while follows:
                turns.begin()
                conn.keep = super().handle(conn)
                sent = conn.sock.flush()
                # With more connections than threads, each request waits for its turn.
                alone = self.alive and self.running <= self.cfg.threads
                follows = bool(conn.keep and sent and alone and conn.has_next_head())
        except OSError:  # the client is gone
            conn.keep = None
        finally:
            turns.end()

    def _keepalive_after(self, conn: Connection, keepalive: bool) -> bool:
        # What is left of the body has come already, see UploadRequest: gunicorn would set a time-out on the connection.
        return bool(keepalive and conn.parser.finish_body())

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer in JSON; gunicorn's own words quote the line that it does not understand, which may hold the token."""
        status, message = 400, "The request is not HTTP as it should be"
        if isinstance(exc, LimitRequestLine):
            status, message = 414, "The request line is too long"
        elif isinstance(exc, LimitRequestHeaders):
            status, message = 431, "The headers are too many or too long"
        elif isinstance(exc, UnsupportedTransferCoding):
            status, message = 501, "The transfer coding is not known: send the body as it is, or chunked"
        elif isinstance(exc, TimeoutError):
            status, message = 408, f"The headers were not complete within {HEAD_TIMEOUT:.0f} seconds"
        elif not isinstance(exc, ParseException):
            status, message = 500, "The receiver failed; its log has the details"
            self.log.exception("failed to answer")
        address = json.dumps(addr[0] if isinstance(addr, tuple) else "")
        logger.info('refused status=%s address=%s reason_class="http" reason=%s', status, address, json.dumps(message))
        body = json.dumps({"status": status, "message": message, "received": None}) + "\n"
        fields = f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        client.sendall(f"HTTP/1.1 {status} \r\n{fields}\r\n\r\n{body}".encode())


@cache
def metrics_folder() -> str:
    """Make the folder in which prometheus_client keeps the workers' numbers, or empty the one that is set up.

    It is made once for a master: `gunicorn.conf.py` is read again at each HUP. A folder of our own lies in memory, because
    its files are mapped: where their disk is full, writing to them ends a process with SIGBUS. The master removes it.
    """
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR", "")
    if folder and not os.path.basename(folder).startswith(METRICS_PREFIX):  # else it is that of the master before USR2
        os.makedirs(folder, mode=0o700, exist_ok=True)
        for file in Path(folder).glob("*.db"):
            file.unlink(missing_ok=True)
        return folder
    base = Path("/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else tempfile.gettempdir())
    master = os.getpid()
    folder = tempfile.mkdtemp(prefix=METRICS_PREFIX, dir=base)

    def remove() -> None:
        if os.getpid() == master:  # the workers end, too
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def set_signal_mask(how: int) -> None:
    signal.pthread_sigmask(how, (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT))


def keep_signals_for_workers() -> None:
    """Let a signal to a worker that has just forked wait for its handlers: it would meet the master's and be lost."""
    block, unblock = partial(set_signal_mask, signal.SIG_BLOCK), partial(set_signal_mask, signal.SIG_UNBLOCK)
    os.register_at_fork(before=block, after_in_parent=unblock)
