"""The disk is full, read-only, gone, out of inodes, or fails: the answer says so, and the service goes on by itself."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FILES, GRAPHS, HEADERS, HISTOGRAMS, NAME, PROFILES, Server, curl, receipts, settings, visible
from werkzeug.test import Client, TestResponse

import receiver

PAGE = 4096  # bytes that a small file on a tmpfs takes at least
MakeTmpfs = Callable[[str], Path]


def send(client: Client, body: bytes, **headers: str) -> TestResponse:
    return client.post(FILES, headers={**HEADERS, **headers}, data=body)


def send_chunked(client: Client, body: bytes) -> TestResponse:
    """Send a body whose length nobody knows before its end."""
    environ = {"wsgi.input_terminated": True, "wsgi.input": io.BytesIO(body)}
    return client.post(FILES, headers=HEADERS, environ_overrides=environ)


def send_form(client: Client, body: bytes) -> TestResponse:
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="x.root"\r\n\r\n' + body + b"\r\n--x--\r\n"
    return client.post(FILES, headers=HEADERS, data=form, content_type="multipart/form-data; boundary=x")


def check_refused(response: TestResponse, status: int, folder: Path) -> None:
    assert response.status_code == status, response.text
    answer = response.json
    assert answer is not None and answer["status"] == status and answer["received"] is None
    assert answer["message"]
    assert str(folder) not in response.text, "the answer tells where the data folder is"
    if (folder / ".incoming").is_dir():
        assert list((folder / ".incoming").iterdir()) == []


def fill(folder: Path, leave: int = 0) -> Path:
    """Fill the disk but for some bytes; return the file that takes the room."""
    filler = folder / ".filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(PAGE))
    size = filler.stat().st_size // PAGE * PAGE
    os.truncate(filler, size - leave)
    return filler


# --- no room -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("send_it", [send, send_chunked, send_form])
def test_a_disk_that_is_full_in_mid_upload_is_answered_507(
    make_tmpfs: MakeTmpfs, send_it: Callable[[Client, bytes], TestResponse]
) -> None:
    folder = make_tmpfs("size=1m")
    client = Client(receiver.create_app(settings(folder)))
    check_refused(send_it(client, HISTOGRAMS + bytes(3 << 20)), 507, folder)
    assert visible(folder) == {}
    assert send_it(client, HISTOGRAMS).status_code == 200
    assert visible(folder) == {NAME: HISTOGRAMS}


@pytest.mark.parametrize("before", [None, PROFILES], ids=["a free name", "a taken name"])
def test_a_disk_that_is_full_at_the_receipt_is_answered_507_and_nothing_visible_changes(
    make_tmpfs: MakeTmpfs, before: bytes | None
) -> None:
    folder = make_tmpfs("size=1m")
    client = Client(receiver.create_app(settings(folder)))
    if before:
        assert send(client, before, runNumber="123").status_code == 200
        # So that the next receipt needs another page.
        path = folder / ".receipts" / "123.jsonl"
        path.write_bytes(path.read_bytes() + b" " * (PAGE - path.stat().st_size - 1) + b"\n")
    unchanged, noted = visible(folder), receipts_bytes(folder)
    filler = fill(folder, leave=2 * PAGE)
    assert PAGE < len(HISTOGRAMS) <= 2 * PAGE  # so the file itself has room
    check_refused(send(client, HISTOGRAMS), 507, folder)
    assert visible(folder) == unchanged
    assert receipts_bytes(folder) in (noted, {**noted, "123.jsonl": b""})
    filler.unlink()
    assert send(client, HISTOGRAMS).status_code == 200
    assert visible(folder) == {NAME: HISTOGRAMS}


def receipts_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / ".receipts").iterdir()}


def test_an_invalid_upload_is_refused_as_such_when_its_receipt_has_no_room(make_tmpfs: MakeTmpfs) -> None:
    folder = make_tmpfs("size=1m")
    client = Client(receiver.create_app(settings(folder)))
    fill(folder, leave=2 * PAGE)
    check_refused(send(client, HISTOGRAMS[:-100] + bytes(100)), 400, folder)
    assert visible(folder) == {}


def test_an_upload_that_would_use_up_the_reserve_is_refused_before_it_is_written(make_tmpfs: MakeTmpfs) -> None:
    folder = make_tmpfs("size=4m")
    client = Client(receiver.create_app(settings(folder, min_free_space=str(3 << 20))))
    assert send(client, PROFILES, timeStamp="1").status_code == 200
    check_refused(send(client, HISTOGRAMS + bytes(2 << 20)), 507, folder)
    filler = folder / ".filler"
    filler.write_bytes(bytes(2 << 20))
    check_refused(send(client, HISTOGRAMS), 507, folder)
    check_refused(send_chunked(client, HISTOGRAMS), 507, folder)
    assert [send(client, b"").status_code, client.get(FILES, headers=HEADERS).status_code] == [507, 200]
    filler.unlink()
    assert send(client, HISTOGRAMS).status_code == 200


@pytest.mark.parametrize("before", [None, PROFILES], ids=["a free name", "a taken name"])
@pytest.mark.parametrize("free", [0, 1, 2, 3])
def test_a_disk_without_inodes_is_answered_507_and_nothing_visible_changes(
    make_tmpfs: MakeTmpfs, free: int, before: bytes | None
) -> None:
    folder = make_tmpfs("size=1m,nr_inodes=40")
    client = Client(receiver.create_app(settings(folder)))
    if before:
        assert send(client, before).status_code == 200
    unchanged = visible(folder)
    fillers = [folder / f".filler{number}" for number in range(40)]
    with pytest.raises(OSError, match="No space"):
        for filler in fillers:
            filler.touch()
    fillers = [filler for filler in fillers if filler.exists()]
    for _ in range(free):
        fillers.pop().unlink()
    response = send(client, HISTOGRAMS)
    # The upload takes one and its name another, as each link counts here, and the run's first receipt a third.
    if free >= (2 if before else 3):
        assert response.status_code == 200 and visible(folder) == {NAME: HISTOGRAMS}
    else:
        check_refused(response, 507, folder)
        assert visible(folder) == unchanged
    for filler in fillers:
        filler.unlink()
    assert send(client, GRAPHS).status_code == 200
    assert visible(folder) == {NAME: GRAPHS}


def test_a_server_on_a_full_disk_answers_507_and_resumes_when_there_is_room(
    make_server: Callable[..., Server], make_tmpfs: MakeTmpfs, tmp_path: Path
) -> None:
    folder = make_tmpfs("size=8m")
    server = make_server(data_folder=str(folder))
    large = tmp_path / "large.root"
    large.write_bytes(HISTOGRAMS + bytes(20 << 20))
    for arguments in (["-T", str(large)], ["-T", str(large), "-HTransfer-Encoding: chunked"], [f"-Ffile=@{large}"]):
        answer = curl(server.files, "-XPOST", *arguments)
        assert (answer.status, answer.json["status"], answer.json["received"], answer.curl) == (507, 507, None, 0)
    assert visible(folder) == {}
    assert list((folder / ".incoming").iterdir()) == []
    filler = fill(folder)
    answers = [curl(server.files, "--data-binary", "@-", send=HISTOGRAMS) for _ in range(4)]
    assert {answer.status for answer in answers} == {507}
    filler.unlink()
    assert curl(server.files, "--data-binary", "@-", send=HISTOGRAMS).status == 200
    assert visible(folder) == {NAME: HISTOGRAMS}


# --- no folder ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_becomes_read_only_is_answered_503_and_resumes(make_tmpfs: MakeTmpfs) -> None:
    folder = make_tmpfs("size=1m")
    client = Client(receiver.create_app(settings(folder)))
    assert send(client, HISTOGRAMS).status_code == 200
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    try:
        for body in (PROFILES, HISTOGRAMS, b"invalid"):
            check_refused(send(client, body), 503, folder)
        with client.get(f"{FILES}/{NAME}", headers=HEADERS) as response:
            assert response.data == HISTOGRAMS
        Client(receiver.create_app(settings(folder)))  # a restart meanwhile is no reason not to serve what is there
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    assert visible(folder) == {NAME: HISTOGRAMS}
    assert send(client, PROFILES).status_code == 200


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def put_file_in_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


@pytest.mark.parametrize("lose", [remove, put_file_in_place])
def test_a_folder_that_is_gone_is_answered_503_and_resumes(
    client: Client, folder: Path, lose: Callable[[Path], None]
) -> None:
    assert send(client, HISTOGRAMS).status_code == 200
    lose(folder)
    check_refused(send(client, HISTOGRAMS), 503, folder)
    for path in (FILES, f"{FILES}/{NAME}", "/rest/api/runs", "/rest/api/runs/123"):
        check_refused(client.get(path, headers=HEADERS), 503, folder)
    assert not folder.is_dir(), "a folder that is gone may be a disk that is not mounted: it is not to be made anew"
    if folder.exists():
        folder.unlink()
    folder.mkdir()
    assert send(client, HISTOGRAMS).status_code == 200
    assert visible(folder) == {NAME: HISTOGRAMS}


def test_a_disk_that_is_no_longer_mounted_is_answered_503_and_nothing_goes_to_the_one_below(
    make_tmpfs: MakeTmpfs, tmp_path: Path
) -> None:
    folder, elsewhere = make_tmpfs("size=1m"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    client = Client(receiver.create_app(settings(folder, max_file_size="10000")))
    assert send(client, HISTOGRAMS).status_code == 200
    subprocess.run(["mount", "--bind", folder, elsewhere], check=True)
    try:
        subprocess.run(["umount", folder], check=True)
        check_refused(send(client, GRAPHS), 503, folder)
        check_refused(send(client, bytes(10_001)), 413, folder)  # without a receipt
        for path in (FILES, f"{FILES}/{NAME}", "/rest/api/runs", "/rest/api/runs/123", "/rest/api/health", "/metrics"):
            check_refused(client.get(path, headers=HEADERS), 503, folder)
        assert list(folder.iterdir()) == []
        subprocess.run(["mount", "--bind", elsewhere, folder], check=True)
        assert send(client, GRAPHS).status_code == 200
        assert visible(folder) == visible(elsewhere) == {NAME: GRAPHS}
    finally:
        subprocess.run(["umount", elsewhere], check=True)


def test_a_folder_that_goes_in_mid_upload_is_answered_503(client: Client, folder: Path) -> None:
    class Body(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            shutil.rmtree(folder, ignore_errors=True)
            return super().read(size)

    environ = {"wsgi.input_terminated": True, "wsgi.input": Body(HISTOGRAMS)}
    check_refused(client.post(FILES, headers=HEADERS, environ_overrides=environ), 503, folder)
    folder.mkdir()
    assert send(client, HISTOGRAMS).status_code == 200


@pytest.mark.parametrize("name", [".incoming", ".replaced", ".rejected", ".receipts"])
def test_a_subfolder_that_somebody_cleared_away_comes_back(client: Client, folder: Path, name: str) -> None:
    assert send(client, HISTOGRAMS).status_code == 200
    for body, status in ((b"invalid", 400), (PROFILES, 200), (PROFILES, 200), (GRAPHS, 200)):
        shutil.rmtree(folder / name, ignore_errors=True)
        response = send(client, body)
        assert response.status_code == status, response.text
    assert visible(folder) == {NAME: GRAPHS}
    shutil.rmtree(folder / name, ignore_errors=True)
    assert send(client, HISTOGRAMS, timeStamp="1", runNumber="7").status_code == 200
    assert client.get(FILES, headers=HEADERS).status_code == 200


# --- a disk that fails -------------------------------------------------------------------------------------------------


class Failing:
    """A function of `os` that fails at its n-th call from the data folder's code, or from the n-th on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self._call = getattr(os, name)
        self._is_close = name == "close"
        self.calls = 0
        self.at = 0
        self.for_good = False
        self.errno = errno.EIO
        monkeypatch.setattr(os, name, self)

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"] == "storage":
            self.calls += 1
            if self.calls == self.at or self.for_good and self.calls > self.at > 0:
                if self._is_close:  # whose file is closed whatever it returns
                    self._call(*arguments)
                raise OSError(self.errno, os.strerror(self.errno))
        return self._call(*arguments, **more)

    def arm(self, at: int) -> None:
        self.calls, self.at = 0, at


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Failing]:
    return lambda name: Failing(monkeypatch, name)


def uploads_with_one_failure(
    failing: Failing, client: Client, folder: Path, before: bytes | None
) -> Iterator[tuple[int, TestResponse, dict[str, bytes]]]:
    """Upload with the first call failing, then with the second, until one upload sees no failure."""
    at = 0
    while True:
        at += 1
        failing.arm(0)
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()
        for path in (folder / ".replaced").iterdir():
            path.unlink()
        (folder / ".receipts" / "123.jsonl").unlink(missing_ok=True)
        if before is not None:
            assert send(client, before).status_code == 200
        unchanged = visible(folder)
        failing.arm(at)
        response = send(client, HISTOGRAMS)
        missed = failing.calls < at
        failing.arm(0)
        if missed:
            assert response.status_code == 200
            return
        yield at, response, unchanged


@pytest.mark.parametrize("before", [None, PROFILES], ids=["a free name", "a taken name"])
@pytest.mark.parametrize(
    ("call", "number", "status"),
    [
        ("fsync", errno.EIO, 500),
        ("fsync", errno.ENOSPC, 507),
        ("fsync", errno.EDQUOT, 507),
        ("close", errno.EIO, 500),
        ("close", errno.EDQUOT, 507),
        ("write", errno.EIO, 500),
        ("write", errno.ENOSPC, 507),
    ],
)
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "from then on"])
def test_bytes_that_did_not_reach_the_disk_never_end_in_a_200(
    client: Client,
    folder: Path,
    failing: Callable[[str], Failing],
    call: str,
    number: int,
    status: int,
    before: bytes | None,
    for_good: bool,
) -> None:
    failure = failing(call)
    failure.errno, failure.for_good = number, for_good
    failed = stored = 0
    for at, response, unchanged in uploads_with_one_failure(failure, client, folder, before):
        # The last two, of the upload and of the run's receipts, come after one of each that did not fail.
        if call == "close" and response.status_code == 200:
            stored += 1
            assert visible(folder) == {NAME: HISTOGRAMS}
            continue
        assert stored == 0, at
        check_refused(response, status, folder)
        assert visible(folder) == unchanged
        failed += 1
    assert failed >= 2 and stored == (2 if call == "close" else 0)


@pytest.mark.parametrize("before", [None, PROFILES, HISTOGRAMS], ids=["a free name", "a taken name", "a duplicate"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("call", ["open", "link", "rename", "unlink", "pread", "fstat"])
def test_whatever_call_fails_the_answer_tells_what_is_visible(
    client: Client, folder: Path, failing: Callable[[str], Failing], call: str, number: int, before: bytes | None
) -> None:
    failure = failing(call)
    failure.errno = number
    for at, response, unchanged in uploads_with_one_failure(failure, client, folder, before):
        if response.status_code == 200:
            assert visible(folder) == {NAME: HISTOGRAMS}, at
            assert receipts(folder)[-1]["sha256"] == (response.json or {})["sha256"]
            assert before is None or before in [HISTOGRAMS, *(p.read_bytes() for p in (folder / ".replaced").iterdir())]
        else:
            assert response.status_code in (500, 503, 507) and (response.json or {})["received"] is None
            assert visible(folder) == unchanged, f"{response.text} at call {at}"


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Fails while the file named by DQM_TEST_FAIL_<call> exists, for uploads and receipts. */
static int fails(int fd, const char *variable) {
    char link[64], target[4096];
    const char *trigger = getenv(variable);
    int number = errno, result = 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (trigger && length > 0) {
        target[length] = 0;
        result = (strstr(target, "/.incoming/") || strstr(target, "/.receipts/")) && access(trigger, F_OK) == 0;
    }
    errno = number;
    return result;
}
int fsync(int fd) {
    if (fails(fd, "DQM_TEST_FAIL_FSYNC")) { errno = EIO; return -1; }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
int close(int fd) {
    int failing = fails(fd, "DQM_TEST_FAIL_CLOSE");
    int result = ((int (*)(int))dlsym(RTLD_NEXT, "close"))(fd);
    if (failing) { errno = EIO; return -1; }
    return result;
}
"""


def test_a_server_whose_disk_fails_at_fsync_or_close_answers_500_and_resumes(
    make_server: Callable[..., Server], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    source, library = tmp_path / "shim.c", tmp_path / "shim.so"
    source.write_text(SHIM)
    built = subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"],
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode:
        pytest.skip(f"no library can be built here: {built.stderr}")
    triggers = {call: tmp_path / f"fail-{call}" for call in ("FSYNC", "CLOSE")}
    with monkeypatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        for call, trigger in triggers.items():
            patch.setenv(f"DQM_TEST_FAIL_{call}", str(trigger))
        server = make_server()
    for trigger in triggers.values():
        trigger.touch()
        for body in (HISTOGRAMS, PROFILES):
            answer = curl(server.files, "--data-binary", "@-", send=body)
            assert (answer.status, answer.json["status"], answer.json["received"]) == (500, 500, None)
        trigger.unlink()
        assert visible(folder) == {}
        assert list((folder / ".incoming").iterdir()) == []
    assert curl(server.files, "--data-binary", "@-", send=HISTOGRAMS).status == 200
    assert visible(folder) == {NAME: HISTOGRAMS}
