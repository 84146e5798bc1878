"""What several tests use: ROOT files, the application, and a real gunicorn with real curl."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from werkzeug.test import Client

import receiver

PROJECT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
TOKEN = "abcd"
HEADERS = {"token": TOKEN, "runNumber": "123", "timeStamp": "234", "amoreAgent": "testagent", "dataStatus": "1"}
NAME = "testagenthistos_123_DQM_1970_01_01_01_03_54.root"  # what these headers call a file
FILES = "/rest/api/files"

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
    path = folder / ".receipts" / f"{run}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def make_app(folder: Path) -> Callable[..., receiver.Receiver]:
    """Return a function that makes a receiver on the data folder, with further settings."""
    return lambda **more: receiver.create_app(settings(folder, **more))


@pytest.fixture
def client(make_app: Callable[..., receiver.Receiver]) -> Client:
    return Client(make_app())


class Server:
    """A real gunicorn with the shipped gunicorn.conf.py."""

    def __init__(self, environ: Mapping[str, str], log: Path, arguments: tuple[str, ...]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.files = self.url + FILES
        self.log = log
        command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{self.port}", *arguments]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=PROJECT,
                env={**os.environ, **environ},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.wait()

    def wait(self, seconds: float = 30.0) -> None:
        """Wait until the server answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"gunicorn ended:\n{self.log.read_text()}")
            if curl(self.files, headers={}).status == 400:
                return
            time.sleep(0.05)
        raise RuntimeError(f"gunicorn does not answer:\n{self.log.read_text()}")

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def kill(self) -> None:
        """Kill master and workers at once, as a power cut would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self, seconds: float = 30.0) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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


@pytest.fixture
def make_server(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Return a function that starts a gunicorn on the data folder, with further arguments of its and settings."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    servers: list[Server] = []

    def start(*arguments: str, **more: str) -> Server:
        servers.append(Server(settings(folder, **more), tmp_path / "gunicorn.log", arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server()
