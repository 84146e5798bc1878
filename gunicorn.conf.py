"""gunicorn's settings for the DQM receiver: in a checkout, plain `gunicorn` serves on 127.0.0.1:8080."""

import contextlib
import ctypes
import errno
import gc
import json
import logging
import os
import resource
import select
import signal
import socket
import struct
import time
from typing import Any

from gunicorn.arbiter import Arbiter
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, ParseException, UnsupportedTransferCoding
from gunicorn.util import write_nonblock
from gunicorn.workers.gthread import ThreadWorker

import receiver
from durable import StorageError

AT_ONCE = 0.02  # seconds within which a sender's next request comes, where it has one
STALLED = 120  # seconds without a byte, in either direction, after which a connection is given up
OPEN_FILES = 65536  # connections and files that a process may have open at once, where the host allows it
TOO_MANY = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

wsgi_app = "receiver:create_app()"
bind = "127.0.0.1:8080"

# A process for each core, because validation holds the interpreter lock most of the time; threads, so that a slow sender
# keeps nobody waiting and no upload is ended by a time-out.
workers = min(len(os.sched_getaffinity(0)), 4)
threads = 128

# An upload under way is finished before a worker stops (SIGTERM) or gives way to a new one (SIGHUP).
graceful_timeout = 600

# A login shell's usual limit, 1024, is less than 1000 connections and the files of those that upload.
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, OPEN_FILES)), hard))

# The application is loaded before the workers fork: a mistake in the settings is one line and no loop of dying workers, and
# each worker starts at once.
preload_app = True

# gunicorn's remote control: not needed, and its socket would lie in a home folder that a service may not have.
control_socket_disable = True

# Left alone, glibc gives large pieces of memory back to the kernel and gets the next ones anew, page by page: an eighth of the
# processor time of a 7 MB upload. Pieces up to the largest block of a ROOT file (16 MiB) come from one heap for all threads,
# whose free end is given back from 40 MiB on.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
with contextlib.suppress(AttributeError):  # another C library
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_ARENA_MAX, 1)
    mallopt(M_MMAP_THRESHOLD, 20 << 20)
    mallopt(M_TRIM_THRESHOLD, 40 << 20)


def has_more(conn: Any) -> bool:
    """Whether the next request has come, or comes at once."""
    poll = select.poll()
    poll.register(conn.sock, select.POLLIN)
    return bool(conn.parser.unreader.buf.getvalue() or poll.poll(AT_ONCE * 1000))


class worker_class(ThreadWorker):
    """gunicorn's threads, but its own refusals (of requests that are no HTTP) are JSON, too, and nobody waits for a client
    that does not close its connection."""

    def accept(self, listener: Any) -> None:
        """Accept a connection, unless a worker that has fewer of them is quicker or there are too many."""
        if self.cfg.workers > 1:
            time.sleep(0.0002 * min(self.nr_conns, 10))
        try:
            super().accept(listener)
        except OSError as error:
            if error.errno not in TOO_MANY:
                raise
            time.sleep(0.1)  # until one of the others ends

    def handle(self, conn: Any) -> Any:
        """Serve a request and those that follow at once; where it was the last, wait for the client to close.

        All of it here and not in the thread that accepts: the way there and back takes up to a third of a small upload.
        """
        keep = super().handle(conn)
        # With more connections than threads, each request waits for its turn.
        while keep is True and self.alive and self.nr_conns <= self.cfg.threads and has_more(conn):
            keep = super().handle(conn)
        if keep is False:
            conn.close(graceful=True)
            # gunicorn closes it once more, in the thread that accepts.
            conn.close = lambda graceful=False: None
        return keep

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        # gunicorn's own words quote the line that it does not understand, and that may hold the token.
        status, message = 400, "The request is not HTTP as it should be"
        if isinstance(exc, LimitRequestLine):
            status, message = 414, "The request line is too long"
        elif isinstance(exc, LimitRequestHeaders):
            status, message = 431, "The headers are too many or too long"
        elif isinstance(exc, UnsupportedTransferCoding):
            status, message = 501, "The transfer coding is not known"
        elif not isinstance(exc, ParseException):
            status, message = 500, "The receiver failed; its log has the details"
            self.log.exception("failed to answer")
        body = json.dumps({"status": status, "message": message, "received": None}) + "\n"
        head = (
            f"HTTP/1.1 {status} \r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        try:
            write_nonblock(client, f"{head}\r\n\r\n{body}".encode())
        except OSError:
            self.log.debug("nobody is there to be told %s", status)


def mask(how: int) -> None:
    signal.pthread_sigmask(how, (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT))


def when_ready(server: Arbiter) -> None:
    """Before the first worker forks."""
    log = logging.getLogger("dqm_receiver")
    log.handlers = server.log.error_log.handlers
    log.setLevel(logging.INFO)
    for listener in server.LISTENERS:  # accepted connections inherit these
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", STALLED, 0))
        if hasattr(socket, "TCP_USER_TIMEOUT") and listener.sock.family != socket.AF_UNIX:
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED * 1000)
    # A signal to a worker that has just forked would meet the master's handlers and be lost: it waits for the worker's own.
    os.register_at_fork(before=lambda: mask(signal.SIG_BLOCK), after_in_parent=lambda: mask(signal.SIG_UNBLOCK))
    gc.freeze()  # the garbage collector need not look through the imported modules again in each worker


def on_reload(server: Arbiter) -> None:
    """On SIGHUP: read the token file again, or go on with the old tokens where there is a mistake."""
    try:
        server.app.callable.storage.check_folder()  # else the new application would make a folder whose disk is not mounted
        server.app.callable = receiver.create_app()
    except (receiver.ConfigurationError, StorageError, OSError) as error:
        server.log.error("the tokens stay as they were: %s", error)


def post_worker_init(worker: ThreadWorker) -> None:
    """In a worker, before its first request; it may have taken the place of one that died amid uploads."""
    mask(signal.SIG_UNBLOCK)
    worker.wsgi.storage.recover()
