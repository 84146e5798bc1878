"""What several tests use: ROOT files, the application, and a real gunicorn with real curl."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from client import DATA, FILES, HEADERS, head, settings
from server import Server
from werkzeug.test import Client

import receiver


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


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that makes seconds pass at once, for whatever asks time.monotonic."""
    genuine, passed = time.monotonic, 0.0

    def pass_seconds(seconds: float) -> None:
        nonlocal passed
        passed += seconds

    monkeypatch.setattr(time, "monotonic", lambda: genuine() + passed)
    return pass_seconds


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The inodes that are fsynced from now on."""
    inodes: list[int] = []
    fsync = os.fsync

    def record(fd: int) -> None:
        inodes.append(os.fstat(fd).st_ino)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record)
    return inodes


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


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A gunicorn that the tests of a module share; it takes files up to 32 MiB."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    base = tmp_path_factory.mktemp("shared")
    server = Server(settings(base / "data", max_file_size=str(32 << 20)), base / "gunicorn.log", ())
    yield server
    server.stop()


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server()


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


# --- long experiments --------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "long_drip" in getattr(item, "fixturenames", ()))  # last, as it is waited for
    if not config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="a long form of an experiment: run with -m slow"))


@pytest.fixture(scope="module", autouse=True)
def begin_early(request: pytest.FixtureRequest) -> None:
    """Begin what takes long but costs little before a module's first test, so that the other tests run beside it."""
    used = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    for name in filter(used.__contains__, ("long_drip", *getattr(request.module, "EARLY", ()))):
        # Whatever goes wrong is raised again for the test that asks for it.
        with contextlib.suppress(Exception, pytest.skip.Exception):
            request.getfixturevalue(name)


LONG_DRIP = 45  # seconds, more than the 30 s after which gunicorn by default takes a worker for stuck


@pytest.fixture(scope="session")
def long_drip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A sender whose file takes 45 s, to a server of its own with the shipped gunicorn.conf.py; and the data folder."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    base = tmp_path_factory.mktemp("long_drip")
    server = Server(settings(base / "data"), base / "gunicorn.log", ())
    path = DATA / "h1_all.root"
    its_head = head(FILES, f"Content-Length: {path.stat().st_size}", "Connection: close", **HEADERS).decode()
    program = str(Path(__file__).with_name("drip.py"))
    command = [sys.executable, program, str(server.port), str(path), str(LONG_DRIP), its_head]
    sender = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield sender, base / "data"
    sender.kill()
    sender.communicate()
    server.stop()
