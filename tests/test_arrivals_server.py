"""What says what arrived, through a real gunicorn: named tokens and HUP, metrics across workers, health, the log."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from conftest import FILES, HEADERS, PROJECT, TOKEN, Server, post, receipts, wait_until
from prometheus_client.parser import text_string_to_metric_families
from rootfiles import one_object, tnamed

ONE = one_object(tnamed(b"h", b"one"))
OTHER = one_object(tnamed(b"h", b"other"))
INVALID = ONE[:-20]
BOTH = ("--workers", "2")

MakeServer = Callable[..., Server]


def get(server: Server, path: str, headers: Mapping[str, str]) -> tuple[int, str]:
    """Ask on a connection of its own, so that whichever worker is free answers."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
        connection.request("GET", path, headers=dict(headers))
        response = connection.getresponse()
        return response.status, response.read().decode()


def status(server: Server, token: str) -> int:
    return get(server, FILES, {"token": token})[0]


def write_tokens(path: Path, *lines: str, mode: int = 0o600) -> None:
    new = path.with_name("new")
    new.write_text("\n".join(["[tokens]", *lines, ""]))
    new.chmod(mode)
    new.replace(path)


def hup(server: Server) -> None:
    """Have the token file read again and wait until only workers that have read it are there."""
    before = set(server.workers())
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: len(now := set(server.workers())) == 2 and not now & before, 30)


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def uploads_in(log: str) -> list[str]:
    return re.findall(r"^\[[^\]]+\] \[\d+\] \[INFO\] (upload .*)$", log, re.MULTILINE)


def test_a_token_is_changed_without_a_gap(make_server: MakeServer, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokens.ini"
    write_tokens(path, f"EMC = {sha256('secret-old')}", f"HLT = {sha256('secret-hlt')}", mode=0o644)
    server = make_server(*BOTH, tokens_file=str(path), token="")
    master = server.process.pid
    assert [status(server, token) for token in ("secret-old", "secret-new", TOKEN)] == [200, 400, 400]
    valid, seen = "secret-old", list[int]()
    done = threading.Event()

    def sender() -> None:
        while not done.is_set():
            seen.append(status(server, valid))

    thread = threading.Thread(target=sender)
    thread.start()
    try:
        write_tokens(path, f"EMC = {sha256('secret-old')} {sha256('secret-new')}", f"HLT = {sha256('secret-hlt')}")
        hup(server)
        assert [status(server, token) for token in ("secret-old", "secret-new") * 5] == [200] * 10
        valid = "secret-new"
        assert post(server.port, ONE, {**HEADERS, "token": "secret-old", "timeStamp": "1"}).status == 200
        assert post(server.port, ONE, {**HEADERS, "token": "secret-new", "timeStamp": "2"}).status == 200
        assert post(server.port, ONE, {**HEADERS, "token": "secret-hlt", "timeStamp": "3"}).status == 200
        write_tokens(path, f"EMC = {sha256('secret-new')}", f"HLT = {sha256('secret-hlt')}")
        hup(server)
    finally:
        done.set()
        thread.join()
    assert set(seen) == {200}
    assert [status(server, token) for token in ("secret-old", "secret-new", "secret-hlt") * 5] == [400, 200, 200] * 5
    assert (server.process.pid, server.process.poll()) == (master, None)
    assert [one["sender"] for one in receipts(folder)] == ["EMC", "EMC", "HLT"]
    log = server.log.read_text()
    assert [re.findall(r' sender="(\w+)" ', one) for one in uploads_in(log)] == [["EMC"], ["EMC"], ["HLT"]]
    warnings = [one for one in log.splitlines() if "everybody" in one]
    assert len(warnings) == 1  # at the start, when everybody could read the file, and not from each worker
    assert str(path) in warnings[0]
    assert "secret-" not in log
    assert not [token for token in ("secret-old", "secret-new", "secret-hlt") if sha256(token) in log]


def test_a_folder_that_is_gone_is_not_made_anew_at_hup(make_server: MakeServer, folder: Path) -> None:
    server = make_server(*BOTH)
    away = folder.rename(folder.with_name("away"))
    hup(server)
    assert post(server.port, ONE).status == 503
    assert not folder.exists()
    away.rename(folder)
    assert post(server.port, ONE).status == 200


def test_a_disk_that_does_not_answer_at_hup_ends_nothing(make_server: MakeServer, tmp_path: Path) -> None:
    """As that of a FUSE file system whose process has died."""
    broken, configuration = tmp_path / "broken", tmp_path / "gunicorn.conf.py"
    configuration.write_text(
        (PROJECT / "gunicorn.conf.py").read_text()
        + f"""
genuine = os.statvfs

def statvfs(path):
    if os.path.exists({str(broken)!r}):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return genuine(path)

os.statvfs = statvfs
"""
    )
    server = make_server(*BOTH, "--config", str(configuration))
    broken.touch()
    hup(server)
    broken.unlink()
    assert post(server.port, ONE).status == 200


def test_a_broken_token_file_at_hup_leaves_the_old_tokens_in_force(
    make_server: MakeServer, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tokens.ini"
    write_tokens(path, f"EMC = {sha256('secret-old')}")
    server = make_server(*BOTH, tokens_file=str(path), token="")
    write_tokens(path, f"EMC = {sha256('secret-new')}", "HLT = secret-in-plain-text")
    for number in (1, 2):
        hup(server)
        said = [one for one in server.log.read_text().splitlines() if "[ERROR]" in one]
        assert len(said) == number
        assert f"DQM_RECEIVER_TOKENS_FILE {path}" in said[-1]
        path.unlink(missing_ok=True)  # the second time it is not there at all
    assert "No such file" in said[-1]
    old = [200, 400] * 4
    assert [status(server, token) for token in ("secret-old", "secret-new") * 4] == old
    for worker in server.workers():
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda dead=worker: len(now := server.workers()) == 2 and dead not in now, 30)  # type: ignore[misc]
    server.wait()
    assert [status(server, token) for token in ("secret-old", "secret-new") * 4] == old
    assert post(server.port, ONE, {**HEADERS, "token": "secret-old"}).status == 200
    assert len(uploads_in(server.log.read_text())) == 1
    write_tokens(path, f"EMC = {sha256('secret-new')}")
    hup(server)
    assert [status(server, token) for token in ("secret-old", "secret-new") * 4] == [400, 200] * 4
    assert "secret-" not in server.log.read_text()


def metrics(server: Server) -> dict[tuple[str, ...], float]:
    code, text = get(server, "/metrics", {})
    assert code == 200
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name != "dqm_receiver_free_bytes"
    }


def test_metrics_runs_log_and_health_are_right_across_workers_and_their_ends(
    make_server: MakeServer, folder: Path
) -> None:
    server = make_server(*BOTH)
    answers = []
    for number in range(12):
        body = (ONE, ONE, OTHER, INVALID)[number % 4]
        answers.append(post(server.port, body, {**HEADERS, "timeStamp": str(number // 4), "dataStatus": "0"}).status)
    assert answers == [200, 200, 200, 400] * 3
    expected = dict.fromkeys(("stored", "duplicate", "replaced", "rejected"), 3.0)

    def check() -> None:
        for _ in range(6):
            values = metrics(server)
            uploads = {key[2]: value for key, value in values.items() if key[0] == "dqm_receiver_uploads_total"}
            assert uploads == expected
            assert values[("dqm_receiver_upload_seconds_count",)] == sum(expected.values())
            assert values["dqm_receiver_rejections_total", "not valid"] == expected["rejected"]
            assert values[("dqm_receiver_uploads_in_progress",)] == 0
            assert [get(server, "/rest/api/runs", HEADERS), get(server, "/rest/api/runs/124", HEADERS)[0]] == [
                (200, '{"runs": [123]}\n'),
                404,
            ]
            assert f'"rejected": {expected["rejected"]:.0f},' in get(server, "/rest/api/runs/123", HEADERS)[1]

    check()
    first = server.workers()[0]
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: len(now := server.workers()) == 2 and first not in now, 30)
    assert post(server.port, INVALID).status == 400
    expected["rejected"] += 1
    check()
    server.stop()
    server.start()
    check()
    began = time.monotonic()
    assert [get(server, "/rest/api/health", {})[0] for _ in range(20)] == [200] * 20
    assert time.monotonic() - began < 30
    assert list((folder / ".incoming").iterdir()) == []
    logged = uploads_in(server.log.read_text())
    outcomes = [
        re.findall(r'^upload outcome="(\w+)" sender="default" run=123 agent="testagent" ', one) for one in logged
    ]
    assert outcomes == [[one["outcome"]] for one in receipts(folder)]
    assert len(outcomes) == 13
    assert all(re.search(r" size=\d+ seconds=[\d.e-]+( reason=\"[^\"]+\")?$", one) for one in logged)
