"""A small WSGI application that shows what gunicorn_worker.py does; test_gunicorn_worker.py starts it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """/take reads the body, /refuse does not, /allow lets it be read on, /large and /file answer so many bytes."""
    path, size = environ["PATH_INFO"], int(environ["QUERY_STRING"] or "0")
    status, answer = "200 OK", b""
    if path == "/take":
        try:
            answer = str(read_slowly(environ["wsgi.input"], size)).encode()
        except TimeoutError as error:
            status, answer = "400 Bad Request", str(error).encode()
    elif path in ("/refuse", "/allow"):
        status, answer = "400 Bad Request", b"refused"
        if path == "/allow":
            environ["dqm_receiver.discard"](size)
    elif path == "/fail":
        raise ValueError("a fault")
    elif path == "/large":
        answer = content(size)
    if path == "/file":
        file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  the server closes it
        file.write(b"before" + content(size))
        file.seek(len(b"before"))
        start_response(status, [("Content-Length", str(size))])
        return cast(Iterable[bytes], environ["wsgi.file_wrapper"](file, 1 << 16))
    start_response(status, [("Content-Length", str(len(answer)))])
    return [answer]


def read_slowly(body: BinaryIO, milliseconds: int) -> int:
    """Read a body to its end, with a pause before each piece, and return its size."""
    size = 0
    while True:
        time.sleep(milliseconds / 1000)
        piece = body.read(1 << 16)
        if not piece:
            return size
        size += len(piece)


def content(size: int) -> bytes:
    return (b"0123456789abcdef" * (size // 16 + 1))[:size]
