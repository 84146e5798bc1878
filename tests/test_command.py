"""The command `dqm-receiver`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from client import DATA, FILES, digest, get, settings, write_tokens
from rootfiles import File, tnamed
from werkzeug.test import Client

import receiver
import receiver_command

MakeApp = Callable[..., receiver.Receiver]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command and returns exit status, output and errors."""

    def run_command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            receiver_command.main(arguments)
        said, code = capsys.readouterr(), caught.value.code
        return (code, said.out, said.err) if isinstance(code, int) else (1, said.out, f"{said.err}{code or ''}")

    return run_command


@pytest.fixture
def set_environment(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[..., None]:
    def set_variables(**more: str) -> None:
        for name, value in settings(folder, **more).items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_version_is_told(run: Run) -> None:
    assert run("--version") == (0, f"dqm-receiver {receiver.__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["token"], ["token", "A", "B"], ["tokens", "A"], ["check"]])
def test_unknown_arguments_are_refused(run: Run, arguments: list[str]) -> None:
    status, out, error = run(*arguments)
    assert (status, out, "usage: dqm-receiver" in error) == (2, "", True)


# --- check-config ------------------------------------------------------------------------------------------------------


def test_check_config_says_what_is_set_up(
    run: Run, set_environment: Callable[..., None], folder: Path, tmp_path: Path
) -> None:
    tokens = write_tokens(
        tmp_path / "tokens",
        f"[tokens]\nEMC = {digest('one')}\nHLT = {digest('two')}\n"
        f"[readers]\npage = {digest('three')}\n[agents]\nEMC = EMC EMC2\n",
    )
    set_environment(tokens_file=tokens, agents="EMC HLT", max_file_size="1000", metrics="off")
    status, out, error = run("check-config")
    assert (status, error) == (0, "")
    assert re.search(rf"^folder: {re.escape(str(folder))} \([a-z0-9.]+\), [0-9]+ bytes free$", out, re.MULTILINE)
    for line in (
        "token:  default may read, and send as any agent",
        "token:  EMC may read, and send as EMC EMC2",
        "token:  HLT may read, and send as any agent",
        "token:  page may read",
        "agents: EMC HLT",
        "metrics: off; drawings on the page: off",
        "The data folder can be written, has locks and has room.",
    ):
        assert line in out.splitlines()
    assert "files up to 1000 bytes" in out
    assert not [token for token in ("one", "two", "three") if digest(token) in out]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_file_size": "x"}, "DQM_RECEIVER_MAX_FILE_SIZE"),
        ({"tokne": "x"}, "DQM_RECEIVER_TOKNE is not a setting"),
        ({"data_folder": "/proc/nowhere"}, "DQM_RECEIVER_DATA_FOLDER /proc/nowhere cannot be used"),
        ({"min_free_space": str(10**17)}, "There is no room"),
    ],
)
def test_check_config_fails_where_something_is_wrong(
    run: Run, set_environment: Callable[..., None], more: dict[str, str], message: str
) -> None:
    set_environment(**more)
    status, _, error = run("check-config")
    assert (status, len(error.splitlines())) == (1, 1)
    assert message in error


# --- token -------------------------------------------------------------------------------------------------------------


def made_by(out: str) -> tuple[str, str]:
    """Return the token and its line for the file."""
    token, line = (one.strip() for one in out.splitlines() if one.startswith("    "))
    return token, line


@pytest.mark.parametrize("name", ["EMC", "a", "hlt.A-1_x", "x" * 64, "0"])
def test_tokens_differ_and_fit_a_header(run: Run, name: str) -> None:
    made = {made_by(run("token", name)[1]) for _ in range(20)}
    assert len(made) == 20
    for token, line in made:
        assert re.fullmatch(r"[A-Za-z0-9_-]{40,}", token)
        assert line == f"{name} = {digest(token)}"


def test_made_token_works_with_its_line(run: Run, make_app: MakeApp, tmp_path: Path) -> None:
    status, out, error = run("token", "EMC")
    token, line = made_by(out)
    assert (status, error, out.count(token)) == (0, "", 1)
    tokens = write_tokens(tmp_path / "tokens", f"[tokens]\n{line}\n")
    assert get(Client(make_app(tokens_file=tokens)), FILES, token=token) == {"files": []}


@pytest.mark.parametrize("name", ["", " ", "E C", "E=C", "E:C", "Ä", "x" * 65, "EMC\n", "[tokens]", "#EMC", "a/b"])
def test_no_token_is_made_for_a_wrong_name(run: Run, name: str) -> None:
    status, out, error = run("token", name)
    assert (status, out) == (1, "")
    assert "NAME" in error


# --- check -------------------------------------------------------------------------------------------------------------


def test_check_says_what_the_receiver_would(run: Run, tmp_path: Path) -> None:
    good, bad = str(DATA / "profiles.root"), tmp_path / "cut.root"
    shutil.copy(good, bad)
    bad.write_bytes(bad.read_bytes()[:-1])
    status, out, _ = run("check", good)
    assert (status, good in out) == (0, True)
    status, out, error = run("check", good, str(bad), str(tmp_path / "absent.root"))
    assert status == 1
    assert str(bad) in out + error
    assert "absent.root" in out + error


def test_check_escapes_what_a_terminal_would_obey(run: Run, tmp_path: Path) -> None:
    file = File()
    file.add(b"TNamed", b"\x1b[2J" + "\u202eevil".encode(), tnamed(b"\x07name"))
    path = tmp_path / "evil.root"
    path.write_bytes(file.close())
    _, out, error = run("check", str(path))
    assert "evil" in out
    assert all(character.isprintable() or character in "\n\t" for character in out + error)
