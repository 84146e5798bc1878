"""What several tests use: ROOT files, the application, and a real gunicorn with real curl."""

from __future__ import annotations

import contextlib
import http.client
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

    def __init__(
        self,
        environ: Mapping[str, str],
        log: Path,
        arguments: tuple[str, ...],
        prefix: tuple[str, ...] = (),
        cwd: Path = PROJECT,
        python: str = sys.executable,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.files = self.url + FILES
        self.log = log
        self.environ, self.cwd = {**os.environ, **environ}, cwd
        self.command = [*prefix, python, "-m", "gunicorn", "--bind", f"127.0.0.1:{self.port}", *arguments]
        self.start()

    def start(self) -> None:
        """Start it, or start it again."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, cwd=self.cwd, env=self.environ, stdout=output, stderr=output, start_new_session=True
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
    """Return a port that nobody else is given: it stays bound, beside which a server may bind with SO_REUSEADDR and listen."""
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", 0))
    port: int = probe.getsockname()[1]
    probe.detach()  # open to the end of this process
    return port


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until something is so; fail if it is not within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"what was waited for has not come within {seconds} s"
        time.sleep(0.02)


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


@pytest.fixture
def make_tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return a function that mounts a small file system, options as `size=1m,nr_inodes=100`."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        point = tmp_path / f"tmpfs{len(mounted)}"
        point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("mount is not installed")
        if run.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {run.stderr.strip()}")
        mounted.append(point)
        return point

    yield make
    for point in mounted:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


# --- what is shipped for service ---------------------------------------------------------------------------------------


def adapted(text: str, changes: Mapping[str, str]) -> str:
    """Return a shipped file with other paths and ports; each must be in it."""
    for old, new in changes.items():
        if old not in text:
            raise ValueError(f"{old!r} is not in the file")
        text = text.replace(old, new)
    return text


class Nginx:
    """A real nginx that includes the shipped deploy/nginx.conf, adapted; both of its servers listen on `port`."""

    def __init__(self, base: Path, changes: Mapping[str, str]) -> None:
        for program in ("nginx", "openssl", "curl"):
            if shutil.which(program) is None:
                pytest.skip(f"{program} is not installed")
        base.mkdir()
        self.port = free_port()
        self.log, self.errors, self.certificate = base / "access.log", base / "error.log", base / "cert.pem"
        names = "subjectAltName=DNS:dqm.example.org,DNS:overwatch.example.org"
        line = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext {names}"
        subprocess.run(
            [*line.split(), "-keyout", base / "key.pem", "-out", self.certificate], check=True, capture_output=True
        )
        paths = {
            "listen 443": f"listen 127.0.0.1:{self.port}",
            "/etc/ssl/certs/dqm.pem": str(self.certificate),
            "/etc/ssl/certs/overwatch.pem": str(self.certificate),
            "/etc/ssl/private/dqm.key": str(base / "key.pem"),
            "/etc/ssl/private/overwatch.key": str(base / "key.pem"),
            "/var/log/nginx/dqm.log": str(self.log),
            "/var/log/nginx/overwatch.log": str(self.log),
        }
        site = adapted((PROJECT / "deploy/nginx.conf").read_text(), {**paths, **changes})
        (base / "site.conf").write_text(site)
        temporary = [
            f"{kind}_temp_path {base}/{kind};" for kind in ("client_body", "proxy", "uwsgi", "fastcgi", "scgi")
        ]
        (base / "nginx.conf").write_text(
            f"{'user root;' if os.geteuid() == 0 else ''} worker_processes 1; daemon off; pid {base}/pid;\n"
            f"error_log {self.errors} warn;\nevents {{}}\nhttp {{ {' '.join(temporary)} include {base}/site.conf; }}\n"
        )
        self.process = subprocess.Popen(["nginx", "-e", self.errors, "-p", base, "-c", base / "nginx.conf"])
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise RuntimeError(f"nginx does not answer:\n{self.errors.read_text()}")

    def curl(self, url: str, *arguments: str, **more: Any) -> Answer:
        """Run curl through this nginx; the URL as https://dqm.example.org/…"""
        to = ("--connect-to", f"::127.0.0.1:{self.port}", "--cacert", str(self.certificate))
        return curl(url, *to, *arguments, **more)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


# --- long experiments --------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "long_drip" in getattr(item, "fixturenames", ()))  # last, as it is waited for
    if not config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="a long form of an experiment: run with -m slow"))


@pytest.fixture(scope="session", autouse=True)
def begin_early(request: pytest.FixtureRequest) -> None:
    """Begin what takes long but costs nothing before the first test, so that the other tests run beside it."""
    if any("long_drip" in getattr(item, "fixturenames", ()) for item in request.session.items):
        # Whatever goes wrong is raised again for the test that asks for it.
        with contextlib.suppress(Exception, pytest.skip.Exception):
            request.getfixturevalue("long_drip")


LONG_DRIP = 45  # seconds, more than the 30 s after which gunicorn by default takes a worker for stuck

_DRIP = """
import socket, sys, time
port, path, seconds, headers = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
body = open(path, "rb").read()
begin = time.monotonic()
with socket.create_connection(("127.0.0.1", port)) as peer:
    peer.sendall(f"POST {headers}Content-Length: {len(body)}\\r\\nConnection: close\\r\\n\\r\\n".encode())
    peer.sendall(body[:-seconds])
    for at in range(len(body) - seconds, len(body)):
        time.sleep(1)
        peer.sendall(body[at : at + 1])
    answer = b""
    while piece := peer.recv(65536):
        answer += piece
print(time.monotonic() - begin, answer.decode().splitlines()[0])
"""


@pytest.fixture(scope="session")
def long_drip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A sender whose file takes 45 s, to a server of its own with the shipped gunicorn.conf.py; and the data folder."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    base = tmp_path_factory.mktemp("long_drip")
    server = Server(settings(base / "data"), base / "gunicorn.log", ())
    head = f"{FILES} HTTP/1.1\r\nHost: localhost\r\n" + "".join(f"{name}: {HEADERS[name]}\r\n" for name in HEADERS)
    sender = subprocess.Popen(
        [sys.executable, "-c", _DRIP, str(server.port), str(DATA / "h1_all.root"), str(LONG_DRIP), head],
        stdout=subprocess.PIPE,
        text=True,
    )
    yield sender, base / "data"
    sender.kill()
    sender.communicate()
    server.stop()
