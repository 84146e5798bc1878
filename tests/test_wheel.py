"""The wheel: it holds what it should and nothing else, and serves where there is no checkout."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import DATA, HISTOGRAMS, PROJECT, curl, post, settings
from server import Server

# Beside the modules of the application; what is left out are settings of tools.
MODULES = {path.name for path in PROJECT.glob("*.py")} - {"noxfile.py", "gunicorn.conf.py"}
SHARED = {
    "openapi.json",
    "gunicorn.conf.py",
    *(f"page/{path.name}" for path in (PROJECT / "page").iterdir()),
    *(path.name for folder in ("deploy", "clients") for path in (PROJECT / folder).iterdir() if path.is_file()),
}


def run(*command: str | Path, cwd: Path) -> str:
    # Not this run's own modules, nor what it has to say to Python.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout; building leaves folders behind."""
    if not (PROJECT / ".git").exists():
        pytest.skip("not a checkout")
    base = tmp_path_factory.mktemp("wheel")
    without = {*(path.name for path in PROJECT.glob(".*")), "tests", "data", "build", "__pycache__"}
    shutil.copytree(PROJECT, base / "project", ignore=lambda folder, names: without & {*names})
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", base, base / "project", cwd=base)
    (path,) = base.glob("*.whl")
    return path


def test_wheel_holds_what_an_admin_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        for name in names:
            sources = [PROJECT / folder / Path(name).name for folder in ("", "page", "deploy", "clients")]
            assert archive.read(name) in [path.read_bytes() for path in sources if path.exists()]
    prefix = f"{wheel.name.rsplit('-py3', 1)[0]}.data/data/share/dqm-receiver/"
    assert names == MODULES | {prefix + name for name in SHARED}
    assert licenses


class Installed(Server):
    """The gunicorn of an environment, run as an admin would outside of a checkout."""

    def __init__(self, environment: Path, base: Path) -> None:
        base.mkdir()
        config = environment / "share/dqm-receiver/gunicorn.conf.py"
        arguments = ("--config", str(config), "--workers", "1")
        super().__init__(settings(base / "data"), base / "log", arguments, cwd=base, python=f"{environment}/bin/python")


def check_serves(environment: Path, base: Path) -> None:
    """Start the receiver of an environment and use it."""
    server = Installed(environment, base)
    try:
        reply = post(server.port, HISTOGRAMS)
        assert reply.status == 200
        assert curl(f"{server.files}/{reply.json['filename']}").body == HISTOGRAMS
        assert curl(f"{server.url}/rest/api/openapi.json", headers={}).json["openapi"].startswith("3.1")
        assert curl(f"{server.url}/metrics", headers={}).status == 200
        objects = run(environment / "bin/python", "-m", "rootcheck", DATA / "h1_all.root", cwd=base)
        assert "TH1F" in objects
        where = run(environment / "bin/python", "-c", "import receiver; print(receiver.__file__)", cwd=base)
        assert Path(where.strip()).is_relative_to(environment)
    finally:
        server.stop()


@pytest.fixture
def environment(tmp_path: Path, wheel: Path) -> Iterator[Path]:
    """An environment with the wheel that borrows this one's dependencies."""
    path = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", path, cwd=tmp_path)
    (packages,) = path.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text("".join(f"{borrowed}\n" for borrowed in site.getsitepackages()))
    install = ("install", "--quiet", "--no-deps", "--ignore-installed", wheel)
    run(sys.executable, "-m", "pip", "--python", path / "bin/python", *install, cwd=tmp_path)
    yield path


def test_wheel_serves_outside_of_a_checkout(environment: Path, tmp_path: Path) -> None:
    check_serves(environment, tmp_path / "elsewhere")


@pytest.mark.slow
def test_wheel_serves_with_nothing_else_installed(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    run(environment / "bin/pip", "install", "--quiet", wheel, cwd=tmp_path)
    check_serves(environment, tmp_path / "elsewhere")
