"""What tests send and look at: constants, settings, requests in this process, real curl, and a fast HTTP client."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from werkzeug.test import Client, TestResponse

PROJECT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
TOKEN = "abcd"
HEADERS = {"token": TOKEN, "runNumber": "123", "timeStamp": "234", "amoreAgent": "testagent", "dataStatus": "1"}
NAME = "testagenthistos_123_DQM_1970_01_01_01_03_54.root"  # what these headers call a file
AUTH = {"token": TOKEN}
FILES = "/rest/api/files"
URL = f"{FILES}/{NAME}"
HIDDEN = (".incoming", ".replaced", ".rejected", ".receipts")

# How often an experiment with chance in it is repeated, and where its chance begins.
ROUNDS = int(os.environ.get("DQM_FAULT_ROUNDS", "3"))
SEED = int(os.environ.get("DQM_FAULT_SEED", "1"))

# Three valid files of different content.
HISTOGRAMS = (DATA / "h1_all.root").read_bytes()
PROFILES = (DATA / "profiles.root").read_bytes()
GRAPHS = (DATA / "named_graphs.root").read_bytes()


def settings(folder: Path, **more: str) -> dict[str, str]:
    """Return the environment of a receiver with this data folder; `more` settings as `max_file_size="1000"`."""
    environ = {"DATA_FOLDER": str(folder), "TOKEN": TOKEN, "MIN_FREE_SPACE": "0"}
    environ.update({name.upper(): value for name, value in more.items()})
    return {f"DQM_RECEIVER_{name}": value for name, value in environ.items()}


def visible(folder: Path) -> dict[str, bytes]:
    """Return what Overwatch sees in a data folder: names and contents."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def receipts(folder: Path, run: int = 123) -> list[dict[str, Any]]:
    """Return the receipts of a run, oldest first; a line that a crash cut short is skipped."""
    found = []
    for path in (folder / ".receipts" / str(run)).glob("*.jsonl"):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return sorted(found, key=lambda receipt: str(receipt["id"]))


def incoming(folder: Path) -> list[Path]:
    """Return the uploads in progress of all writers."""
    return [path for path in folder.glob(".incoming/*/*") if path.name != "lock"]


def hidden(folder: Path, name: str) -> list[bytes]:
    """Return the contents of the files in a hidden folder, by name; none where there is no such folder."""
    return [path.read_bytes() for path in sorted((folder / name).glob("*"))]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return all that is in a folder: the content of each file."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def digest(token: str) -> str:
    """Return the digest that stands for a token in a token file."""
    return hashlib.sha256(token.encode()).hexdigest()


def write_tokens(path: Path, text: str, mode: int = 0o600) -> str:
    """Write a token file, or put it in the place of another at once, and return its path."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.chmod(mode)
    new.replace(path)
    return str(path)


def zeros(path: Path, size: int) -> Path:
    """Make a file of so many zero bytes, which takes no room."""
    path.touch()
    os.truncate(path, size)
    return path


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until something is so; fail if it is not within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"what was waited for has not come within {seconds} s"
        time.sleep(0.02)


# --- requests in this process ------------------------------------------------------------------------------------------

FORM = "multipart/form-data; boundary=limit"


def headers(**changes: str | None) -> dict[str, str]:
    """Return the usual headers with changes; None leaves one out."""
    changed: dict[str, str | None] = {**HEADERS, **changes}
    return {name: value for name, value in changed.items() if value is not None}


def part(content: bytes, name: str = "file", filename: str | None = "histograms.root", more: str = "") -> bytes:
    """Return a part of a multipart form."""
    given = f'; filename="{filename}"' if filename is not None else ""
    return f'Content-Disposition: form-data; name="{name}"{given}\r\n{more}\r\n'.encode() + content


def multipart(*parts: bytes, end: bytes = b"--\r\n") -> bytes:
    return b"".join(b"--limit\r\n" + one + b"\r\n" for one in parts) + b"--limit" + end


def send(
    client: Client, body: bytes = PROFILES, content_type: str = "", path: str = FILES, **changes: str | None
) -> TestResponse:
    """Upload a body as it is, with changes of the usual headers."""
    # Werkzeug's client would make a form of its own of an empty body with the type of a form.
    stream = io.BytesIO(body)
    return client.post(path, input_stream=stream, content_type=content_type, headers=headers(**changes))


def send_form(client: Client, *parts: bytes, **changes: Any) -> TestResponse:
    return send(client, multipart(*parts), FORM, **changes)


def send_chunked(
    client: Client, body: Any, content_type: str = "", path: str = FILES, **changes: str | None
) -> TestResponse:
    """Send a body of unknown length, bytes or a stream, as a server hands on a chunked one."""
    return client.post(
        path,
        input_stream=io.BytesIO(body) if isinstance(body, bytes) else body,
        content_type=content_type,
        headers={**headers(**changes), "Transfer-Encoding": "chunked"},
        environ_overrides={"wsgi.input_terminated": True},
    )


def check_refused(response: TestResponse, folder: Path, status: int, message: str) -> dict[str, Any]:
    """Check what every refusal has in common and return its JSON."""
    answer: dict[str, Any] = json.loads(response.data)
    assert response.status_code == status, answer
    assert response.content_type == "application/json"
    assert response.content_length == len(response.data)
    assert list(answer) == ["status", "message", "received", *(["reason"] if "reason" in answer else [])]
    assert (answer["status"], answer["received"]) == (status, None)
    assert message in answer["message"]
    assert (visible(folder), incoming(folder)) == ({}, [])
    return answer


def get(client: Client, path: str, **more: str) -> Any:
    """Return the JSON of an answer that must be 200."""
    response = client.get(path, headers={**AUTH, **more})
    assert response.status_code == 200, response.text
    return response.json


_PAIR = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|-?[0-9.e-]+|\[.*?\])(?: |$)')


def log_line(message: str) -> dict[str, Any]:
    """Return the facts of a line in the receiver's log, its first word as `event`; it must be key=value throughout."""
    event, _, rest = message.partition(" ")
    pairs = _PAIR.findall(rest)
    assert " ".join(f"{key}={value}" for key, value in pairs) == rest, message
    return {"event": event} | {key: json.loads(value) for key, value in pairs}


# --- requests to a server ----------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What curl printed: the status is 0 where there was no answer."""

    status: int
    headers: dict[str, str]
    body: bytes
    curl: int  # curl's own exit status
    error: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def curl(url: str, *arguments: str, headers: Mapping[str, str] = HEADERS, send: bytes | None = None) -> Answer:
    """Run curl and return the last answer it got; `send` is what it reads from standard input."""
    options = [f"-H{name}: {value}" for name, value in headers.items()]
    run = subprocess.run(
        ["curl", "-sS", "-i", "--http1.1", "--max-time", "120", *options, *arguments, url],
        input=send,
        capture_output=True,
        check=False,
    )
    head, body = b"", run.stdout
    while body.startswith(b"HTTP/"):  # "100 Continue" comes before the answer
        head, _, body = body.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    status = int(lines[0].split()[1]) if head else 0
    return Answer(
        status, {name.lower(): value for name, value in fields.items()}, body, run.returncode, run.stderr.decode()
    )


class Reply(NamedTuple):
    """What an upload in this process was answered."""

    status: int
    json: Any


def post(port: int, body: bytes, headers: Mapping[str, str] = HEADERS, seconds: float = 60.0) -> Reply:
    """Upload a file to 127.0.0.1 without the cost of a curl process; raises OSError or HTTPException without an answer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)) as connection:
        connection.request("POST", FILES, body, dict(headers))
        response = connection.getresponse()
        return Reply(response.status, json.loads(response.read()))


# --- requests byte by byte ---------------------------------------------------------------------------------------------


def head(path: str = FILES, *fields: str, method: str = "POST", **more: str) -> bytes:
    """Return the head of a request, its fields as `"Name: value"` or, the name without hyphen, as `name="value"`."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *fields, *(f"{name}: {more[name]}" for name in more)]
    return "\r\n".join([*lines, "", ""]).encode()


def connect(port: int, receive_buffer: int | None = None) -> socket.socket:
    """Return a connection to 127.0.0.1; a small receive buffer is soon full."""
    peer = socket.socket()
    peer.settimeout(30)
    if receive_buffer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        peer.connect(("127.0.0.1", port))
    except OSError:
        peer.close()
        raise
    return peer


def read_answer(peer: socket.socket) -> tuple[int, bytes]:
    """Read one answer, and no byte of the next; return its status and body."""
    received = b""
    while not received.endswith(b"\r\n\r\n"):
        piece = peer.recv(1)
        assert piece, received
        received += piece
    (length,) = re.findall(rb"\r\nContent-Length: (\d+)\r\n", received)
    body = bytearray()
    while len(body) < int(length):
        piece = peer.recv(int(length) - len(body))
        assert piece, "the answer ended early"
        body += piece
    return int(received.split()[1]), bytes(body)


def rest_of(peer: socket.socket) -> bytes:
    """Read to the end of the connection; a reset is an end, too."""
    received = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while piece := peer.recv(1 << 16):
            received += piece
    return bytes(received)


def exchange(port: int, request: bytes) -> bytes:
    """Send bytes and the end of them, and return all that comes back until the server closes."""
    with connect(port) as peer:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # it does not want to read all
            peer.sendall(request)
            peer.shutdown(socket.SHUT_WR)
        return rest_of(peer)
