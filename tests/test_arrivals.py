"""What says what arrived, against the WSGI callable: receipts, runs, list filters, named tokens, health, metrics, log."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import FILES, HEADERS, HISTOGRAMS, NAME, PROJECT, TOKEN, receipts, settings, visible
from prometheus_client.parser import text_string_to_metric_families
from rootfiles import File, one_object, tnamed
from werkzeug.test import Client, TestResponse

import receiver
import storage

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

MakeApp = Callable[..., receiver.Receiver]
RUNS = "/rest/api/runs"
RUN = f"{RUNS}/123"
HEALTH = "/rest/api/health"
AUTH = {"token": TOKEN}
ONE = one_object(tnamed(b"h", b"one"))
OTHER = one_object(tnamed(b"h", b"other"))
INVALID = ONE[:-20]
README = (PROJECT / "README.md").read_text()


def send(client: Client, body: bytes = ONE, **changes: str) -> TestResponse:
    return client.post(FILES, headers={**HEADERS, **changes}, data=body)


def get(client: Client, path: str, **headers: str) -> Any:
    response = client.get(path, headers={**AUTH, **headers})
    assert response.status_code == 200, response.text
    return response.json


def line(**changes: object) -> str:
    """Return a receipt as the README documents it."""
    receipt = {
        "received_at": "2015-11-24T18:04:12.104223Z",
        "outcome": "stored",
        "filename": NAME,
        "run": 123,
        "time_stamp": 234,
        "agent": "EMC",
        "data_status": 0,
        "sender": "default",
        "size": 10,
        "sha256": "0" * 64,
        "objects": 1,
        "reason": None,
        "reason_class": None,
        "seconds": 0.2,
        "validation_seconds": 0.1,
    }
    return json.dumps({**receipt, **changes}) + "\n"


def note(folder: Path, *lines: str, run: int = 123) -> Path:
    """Append lines to the receipts of a run, as another process does."""
    path = folder / ".receipts" / f"{run}.jsonl"
    with path.open("a") as file:
        file.writelines(lines)
    return path


def documented(heading: str) -> list[str]:
    """Return the names in the first column of the README's table with this heading."""
    table = re.search(rf"^\| {heading} \| *\|\n\|---\|---\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert table is not None
    return [name for row in table[1].splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every receipt that is parsed from now on, by whatever part of the receiver."""
    seen: list[bytes] = []
    loads = json.loads

    def counting(text: Any) -> Any:
        if "received_at" in str(text):
            seen.append(text)
        return loads(text)

    monkeypatch.setattr("storage.json.loads", counting)
    return seen


# --- receipts ----------------------------------------------------------------------------------------------------------


def test_an_upload_is_a_line_with_exactly_the_documented_fields(client: Client, folder: Path) -> None:
    before = storage.now()
    for body, status in ((ONE, 200), (ONE, 200), (OTHER, 200), (INVALID, 400)):
        assert send(client, body).status_code == status
    lines = receipts(folder)
    assert [one["outcome"] for one in lines] == ["stored", "duplicate", "replaced", "rejected"]
    same = {
        "filename": NAME,
        "run": 123,
        "time_stamp": 234,
        "agent": "testagent",
        "data_status": 1,
        "sender": "default",
    }
    for one, body in zip(lines, (ONE, ONE, OTHER, INVALID), strict=True):
        assert sorted(one) == sorted(documented("field"))
        assert {key: one[key] for key in same} == same
        assert (one["size"], one["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
        assert before <= one["received_at"] <= storage.now()
        assert 0 < one["validation_seconds"] <= one["seconds"] < 60
        refused = one["outcome"] == "rejected"
        assert one["objects"] == (None if refused else 1)
        assert (one["reason_class"], bool(one["reason"])) == (("not valid", True) if refused else (None, False))


REJECTED: dict[str, dict[str, Any]] = {
    "not valid": {"data": INVALID},
    "sha256": {"data": ONE, "headers": {**HEADERS, "sha256": "0" * 64}},
    "no file": {"data": b""},
    "too large": {"data": bytes(200_000)},
    "form": {"data": {"file": "a field"}, "content_type": "multipart/form-data"},
    "broken": {"environ_overrides": {"CONTENT_LENGTH": str(len(ONE))}, "data": ONE[:100]},
}


def test_the_cases_below_are_all_the_documented_reasons() -> None:
    (row,) = re.findall(r"^\| `reason`, `reason_class` \|(.*)\|$", README, re.MULTILINE)
    assert set(REJECTED) == set(re.findall(r"`([^`]+)`", row))


@pytest.mark.parametrize("reason", REJECTED)
def test_a_refused_upload_is_a_line_with_its_reason(make_app: MakeApp, folder: Path, reason: str) -> None:
    client = Client(make_app(max_file_size="100000"))
    kinds = {"headers": HEADERS, "method": "POST", **REJECTED[reason]}
    answer = client.open(FILES, **kinds)
    (one,) = receipts(folder)
    assert answer.status_code == (413 if reason == "too large" else 400)
    assert sorted(one) == sorted(documented("field"))
    assert (one["outcome"], one["reason_class"], one["objects"]) == ("rejected", reason, None)
    assert answer.json is not None
    assert one["reason"] == answer.json.get("reason", answer.json["message"])
    assert visible(folder) == {}


@pytest.mark.parametrize(("body", "status"), [(ONE, "200"), (INVALID, "400")])
def test_a_receipt_is_on_the_disk_before_the_answer(
    make_app: MakeApp, folder: Path, monkeypatch: pytest.MonkeyPatch, body: bytes, status: str
) -> None:
    events: list[str] = []
    app, fsync = make_app(), os.fsync

    def recording(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        whole = path.name == "123.jsonl" and path.read_bytes().endswith(b"}\n")
        fsync(fd)
        events.append("receipt" if whole else path.name)

    def recorded(environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        def start(status: str, *more: Any) -> Any:
            events.append(status[:3])
            return start_response(status, *more)

        return app(environ, start)

    monkeypatch.setattr(os, "fsync", recording)
    send(Client(recorded), body)
    assert events[-3:] == [".receipts", "receipt", status]


def test_receipts_of_several_processes_are_whole_lines_and_each_is_counted(make_app: MakeApp, folder: Path) -> None:
    client = Client(make_app())
    program = """
import json, pathlib, sys, storage, time
folder = storage.Storage(pathlib.Path(sys.argv[1]), max_file_size=1, min_free_space=0, max_rejected=1)
for number in range(40):
    receipt = json.loads(sys.argv[2])
    receipt["agent"], receipt["time_stamp"] = sys.argv[3], number
    folder.append_receipt(receipt, time.monotonic())
"""
    command = [sys.executable, "-c", program, str(folder), line(reason="x" * 5000)]
    writers = [subprocess.Popen([*command, agent], cwd=PROJECT) for agent in ("EMC", "HLT", "TPC")]
    seen = [0]
    while any(writer.poll() is None for writer in writers):
        answer = client.get(RUN, headers=AUTH)
        if answer.json is not None and answer.status_code == 200:
            seen.append(sum(one["files"] for one in answer.json["agents"].values()))
        time.sleep(0.01)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert seen == sorted(seen)
    noted = Counter((one["agent"], one["time_stamp"]) for one in receipts(folder))
    assert noted == Counter((agent, number) for agent in ("EMC", "HLT", "TPC") for number in range(40))
    agents = get(client, RUN)["agents"]
    assert {agent: one["files"] for agent, one in agents.items()} == {"EMC": 40, "HLT": 40, "TPC": 40}


@pytest.mark.parametrize("known", [True, False], ids=["read before", "read anew"])
@pytest.mark.parametrize("torn", ['{"received_at": "2015-11-24T1', "{", line()[:-2], "\0" * 300], ids=len)
def test_readers_skip_a_line_that_a_crash_has_torn(make_app: MakeApp, folder: Path, torn: str, known: bool) -> None:
    client = Client(make_app())
    send(client)
    if known:
        assert get(client, RUN)["agents"]["testagent"]["files"] == 1
    note(folder, torn)
    assert get(client, RUN)["agents"]["testagent"]["files"] == 1
    for number in (1, 2):
        send(client, timeStamp=str(number))
    for reader in (client, Client(make_app())):
        agents = get(reader, RUN)["agents"]
        assert {agent: one["files"] for agent, one in agents.items()} == {"testagent": 3}


def test_a_line_that_comes_in_pieces_is_counted_once_it_is_whole(client: Client, folder: Path) -> None:
    counts = []
    for piece in (line(), line()[:50], line()[50:], line()[:-1], "\n"):
        note(folder, piece)
        counts.append(get(client, RUN)["agents"]["EMC"]["files"])
    assert counts == [1, 1, 2, 2, 3]


# --- runs --------------------------------------------------------------------------------------------------------------


def test_runs_are_listed_in_the_order_of_their_numbers_whatever_came_of_their_uploads(client: Client) -> None:
    assert get(client, RUNS) == {"runs": []}
    for run, body in (("10", ONE), ("9", INVALID), ("2147483647", ONE), ("0", ONE), ("10", OTHER)):
        send(client, body, runNumber=run)
    assert get(client, RUNS) == {"runs": [0, 9, 10, 2147483647]}


def test_a_run_tells_everything_of_each_agent(client: Client, folder: Path) -> None:
    def upload(agent: str, time_stamp: int, body: bytes, data_status: int = 0) -> None:
        send(client, body, runNumber="7", amoreAgent=agent, timeStamp=str(time_stamp), dataStatus=str(data_status))

    upload("EMC", 300, ONE)
    upload("EMC", 100, ONE, 1)
    upload("EMC", 100, ONE, 1)
    upload("EMC", 300, OTHER)
    upload("EMC", 50, INVALID)
    upload("EMC", 400, HISTOGRAMS, 2)
    upload("E_C", 500, ONE, 1)
    upload("E-C", 600, OTHER)
    upload("HLT", 1, INVALID, 1)
    upload("HLT", 2, b"", 2)
    noted = receipts(folder, 7)
    last = {one["agent"]: one["received_at"] for one in noted}
    other_runs = {"runNumber": "8", "amoreAgent": "EMC"}
    send(client, ONE, **other_runs)

    def agent(name: str, *values: object) -> dict[str, object]:
        fields = ("files", "bytes", "duplicates", "rejected", "first_time_stamp", "last_time_stamp", "started", "ended")
        return {**dict(zip(fields, values, strict=True)), "last_arrival": last[name]}

    assert get(client, f"{RUNS}/7") == {
        "run": 7,
        "complete": False,
        "agents": {
            "E-C": agent("E-C", 1, len(OTHER), 0, 0, 600, 600, False, False),
            "EMC": agent("EMC", 4, 2 * len(ONE) + len(OTHER) + len(HISTOGRAMS), 1, 1, 100, 400, True, True),
            "E_C": agent("E_C", 1, len(ONE), 0, 0, 500, 500, True, False),
            "HLT": agent("HLT", 0, 0, 0, 2, None, None, False, False),
        },
    }


Mark = tuple[str, int, int] | tuple[str, int, int, str]  # agent, time stamp, data status, outcome


@pytest.mark.parametrize(
    ("marks", "complete", "states"),
    [
        ([("A", 5, 0)], False, {"A": ""}),
        ([("A", 5, 1)], False, {"A": "started"}),
        ([("A", 0, 1)], False, {"A": "started"}),
        ([("A", 5, 1), ("A", 6, 2)], True, {"A": "started ended"}),
        ([("A", 0, 1), ("A", 0, 2, "replaced")], True, {"A": "started ended"}),
        ([("A", 6, 2), ("A", 5, 1)], True, {"A": "started ended"}),
        ([("A", 6, 2)], False, {"A": "ended"}),
        ([("A", 5, 1), ("A", 6, 2), ("A", 7, 0)], True, {"A": "started ended"}),
        ([("A", 5, 1), ("A", 6, 2), ("A", 7, 1)], False, {"A": "started"}),
        ([("A", 5, 1), ("A", 6, 2), ("A", 7, 1), ("A", 8, 2)], True, {"A": "started ended"}),
        ([("A", 7, 1), ("A", 5, 1), ("A", 6, 2)], False, {"A": "started"}),
        ([("A", 5, 1), ("A", 6, 2), ("A", 7, 1, "rejected")], True, {"A": "started ended"}),
        ([("A", 5, 1, "rejected")], False, {"A": ""}),
        ([("A", 5, 1), ("A", 6, 2, "rejected")], False, {"A": "started"}),
        ([("A", 5, 1), ("A", 6, 2, "replaced")], True, {"A": "started ended"}),
        ([("A", 5, 1), ("B", 5, 1), ("A", 6, 2)], False, {"A": "started ended", "B": "started"}),
        ([("A", 5, 1), ("B", 5, 1), ("A", 6, 2), ("B", 6, 2)], True, {"A": "started ended", "B": "started ended"}),
        ([("A", 5, 1), ("A", 6, 2), ("B", 5, 0)], True, {"A": "started ended", "B": ""}),
        ([("A", 5, 1), ("A", 6, 2), ("B", 5, 2)], True, {"A": "started ended", "B": "ended"}),
        ([("A", 5, 1), ("A", 6, 2), ("B", 5, 1, "rejected")], True, {"A": "started ended", "B": ""}),
        ([("A_1", 5, 1), ("A-1", 6, 2)], False, {"A_1": "started", "A-1": "ended"}),
    ],
)
def test_a_run_is_complete_once_every_agent_that_has_started_has_ended(
    client: Client, folder: Path, marks: list[Mark], complete: bool, states: dict[str, str]
) -> None:
    for agent, time_stamp, data_status, *outcome in marks:
        note(
            folder,
            line(
                agent=agent, time_stamp=time_stamp, data_status=data_status, outcome=outcome[0] if outcome else "stored"
            ),
        )
    answer = get(client, RUN)
    told = {
        agent: " ".join(state for state in ("started", "ended") if one[state])
        for agent, one in answer["agents"].items()
    }
    assert (answer["complete"], told) == (complete, states)


def test_the_last_arrival_is_the_latest_though_a_slow_upload_is_noted_after_it(client: Client, folder: Path) -> None:
    latest = "2015-11-24T18:09:00.000000Z"
    for outcome in ("stored", "rejected"):
        note(folder, line(received_at=latest), line(received_at="2015-11-24T18:00:00.000000Z", outcome=outcome))
        assert get(client, RUN)["agents"]["EMC"]["last_arrival"] == latest
        assert metrics(client)["dqm_receiver_last_accepted_timestamp_seconds", "EMC"] == storage.seconds_of(latest)


@pytest.mark.parametrize(
    ("run", "status", "message"),
    [
        ("124", 404, "There is no run 124"),
        ("0", 404, "There is no run 0"),
        ("2147483647", 404, "There is no run 2147483647"),
        ("2147483648", 400, "2147483647"),
        ("99999999999999999999999", 400, "2147483647"),
        ("-1", 400, "number"),
        ("+123", 400, "number"),
        ("x", 400, "number"),
        ("123.jsonl", 400, "number"),
        ("12%203", 400, "number"),
        ("123%0a", 400, "number"),
        ("1e2", 400, "number"),
        ("%D9%A1", 400, "number"),
        ("..", 400, "number"),
        ("123/4", 404, "URL"),
    ],
)
def test_a_run_that_is_unknown_or_no_number_is_refused(client: Client, run: str, status: int, message: str) -> None:
    send(client)
    answer = client.get(f"{RUNS}/{run}", headers=AUTH)
    assert (answer.status_code, answer.content_type) == (status, "application/json")
    assert answer.json is not None
    assert (answer.json["status"], answer.json["received"]) == (status, None)
    assert message in answer.json["message"]


@pytest.mark.parametrize("path", [RUNS, RUN])
def test_runs_are_told_only_to_those_with_a_token_and_only_read(client: Client, path: str) -> None:
    send(client)
    for headers in ({}, {"token": "wrong"}):
        answer = client.get(path, headers=headers)
        assert (answer.status_code, "token" in answer.text, "123" in answer.text) == (400, True, False)
    for method in ("POST", "PUT", "DELETE"):
        answer = client.open(path, method=method, headers=AUTH)
        assert (answer.status_code, set(answer.headers["Allow"].split(", "))) == (405, {"GET", "HEAD"})


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", [RUNS, RUN])
def test_what_has_not_changed_is_a_304_for_pollers(
    client: Client, make_app: MakeApp, parsed: list[bytes], path: str, method: str
) -> None:
    send(client)
    first = client.open(path, method=method, headers=AUTH)
    known = {**AUTH, "If-None-Match": first.headers["ETag"]}
    assert first.status_code == 200
    parsed.clear()
    for app in (client, Client(make_app())):  # another worker, or this one started again
        for condition in (known["If-None-Match"], f'"other", {known["If-None-Match"]}', "*"):
            again = app.open(path, method=method, headers={**AUTH, "If-None-Match": condition})
            assert (again.status_code, again.data) == (304, b"")
            assert again.headers["ETag"] == first.headers["ETag"]
    assert parsed == []
    send(client, runNumber="124")
    if path == RUN:
        assert client.open(path, method=method, headers=known).status_code == 304
        send(client)
    changed = client.open(path, method=method, headers=known)
    assert changed.status_code == 200
    assert changed.headers["ETag"] != first.headers["ETag"]
    assert client.open(path, method=method, headers={**AUTH, "If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("path", [RUNS, RUN])
def test_if_match_is_honoured(client: Client, path: str) -> None:
    send(client)
    whole = client.get(path, headers=AUTH)
    for condition in ("*", whole.headers["ETag"]):
        assert client.get(path, headers={**AUTH, "If-Match": condition}).json == whole.json
    refused = client.get(path, headers={**AUTH, "If-Match": '"other"'})
    assert (refused.status_code, refused.content_type) == (412, "application/json")
    assert refused.json is not None and refused.json["received"] is None


def test_a_run_of_20000_receipts_is_answered_quickly_and_only_new_receipts_are_read(
    client: Client, folder: Path, parsed: list[bytes]
) -> None:
    lines = [line(agent=f"A{number % 10}", time_stamp=number, data_status=1) for number in range(20_000)]
    note(folder, *lines)
    assert sum(one["files"] for one in get(client, RUN)["agents"].values()) == 20_000
    assert len(parsed) == 20_000
    parsed.clear()
    began = time.monotonic()
    answer = client.get(RUN, headers=AUTH)
    assert time.monotonic() - began < 1
    client.get("/metrics")
    assert parsed == []
    new = [line(agent="A3", size=1000), line(agent="new", outcome="rejected", reason_class="form")]
    note(folder, *new)
    agents = get(client, RUN)["agents"]
    assert [one.decode() for one in parsed] == new
    assert answer.json is not None
    assert agents["A3"]["bytes"] == answer.json["agents"]["A3"]["bytes"] + 1000
    assert (agents["A3"]["files"], agents["A4"]["files"], agents["new"]["rejected"]) == (2001, 2000, 1)


OLD = [line(agent="old", time_stamp=number) for number in range(4)]
NEW = [line(agent="new", time_stamp=number) for number in range(6)]


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_receipts_that_an_admin_has_cut_are_read_anew(client: Client, folder: Path, kept: int) -> None:
    path = note(folder, *OLD)
    tag = client.get(RUN, headers=AUTH).headers["ETag"]
    os.truncate(path, len("".join(OLD[:kept])))
    answer = client.get(RUN, headers={**AUTH, "If-None-Match": tag})
    assert (answer.status_code, answer.json is not None) == (200, True)
    assert [one["files"] for one in get(client, RUN)["agents"].values()] == [kept][: bool(kept)]
    note(folder, NEW[0])
    assert get(client, RUN)["agents"]["new"]["files"] == 1


@pytest.mark.parametrize("how", ["in place", "removed before", "renamed"])
@pytest.mark.parametrize("number", [3, 4, 6], ids=["shorter", "as long", "longer"])
def test_receipts_that_an_admin_has_replaced_are_read_anew(
    client: Client, folder: Path, tmp_path: Path, how: str, number: int
) -> None:
    path = note(folder, *OLD)
    tag = client.get(RUN, headers=AUTH).headers["ETag"]
    target = path if how != "renamed" else tmp_path / "new"
    if how == "removed before":
        path.unlink()  # after which ext4 likes to give a new file the same number
    target.write_text("".join(NEW[:number]))
    os.replace(target, path)
    os.utime(path, ns=(0, time.time_ns() + 10**9))  # clocks of file systems may be coarse
    answer = client.get(RUN, headers={**AUTH, "If-None-Match": tag})
    assert answer.status_code == 200
    assert answer.json is not None
    assert {agent: one["files"] for agent, one in answer.json["agents"].items()} == {"new": number}


def test_receipts_that_an_admin_has_removed_are_gone_and_come_back_with_the_next_upload(
    client: Client, folder: Path
) -> None:
    path = note(folder, *OLD)
    tag = client.get(RUN, headers=AUTH).headers["ETag"]
    path.unlink()
    assert client.get(RUN, headers={**AUTH, "If-None-Match": tag}).status_code == 404
    assert get(client, RUNS) == {"runs": []}
    send(client)
    assert list(get(client, RUN)["agents"]) == ["testagent"]


@pytest.mark.parametrize("name", [".receipts", ".incoming"])
def test_without_a_hidden_folder_nothing_has_arrived(client: Client, folder: Path, name: str) -> None:
    send(client)
    shutil.rmtree(folder / name)
    assert get(client, RUNS) == {"runs": [] if name == ".receipts" else [123]}
    assert client.get("/metrics").status_code == 200
    assert client.get(RUN, headers=AUTH).status_code == (404 if name == ".receipts" else 200)


@pytest.mark.parametrize(
    "foreign",
    [
        '{"agent": "X"}\n',
        '{"agent": "X", "outcome": "stored"}\n',
        line(agent="X", received_at="yesterday"),
        line(agent="X", size=None),
        line(agent=["X"]),
        "5\n[]\nnull\n\n",
        "[" * 100_000 + "\n",
    ],
)
def test_a_line_that_is_no_receipt_is_skipped_as_a_whole(client: Client, folder: Path, foreign: str) -> None:
    note(folder, line(), foreign, line())
    assert {agent: one["files"] for agent, one in get(client, RUN)["agents"].items()} == {"EMC": 2}
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert 'agent="X"' not in answer.text


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("007.jsonl", "file"),
        ("8.jsonl", "folder"),
        ("9.jsonl~", "file"),
        (".9.jsonl.swp", "file"),
        ("10.jsonl", "link"),
    ],
)
def test_foreign_things_among_the_receipts_do_no_harm(client: Client, folder: Path, name: str, kind: str) -> None:
    send(client)
    path = folder / ".receipts" / name
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        path.write_text(line(run=7))
    assert get(client, RUNS) == {"runs": [123]}
    assert client.get(f"{RUNS}/{int(re.sub('[^0-9]', '', name))}", headers=AUTH).status_code == 404
    assert metrics(client)["dqm_receiver_uploads_total", "testagent", "stored"] == 1


# --- the list of files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("runNumber=0", ["A-Bhistos_0_"]),
        ("runNumber=0&amoreAgent=A_B", ["A-Bhistos_0_"]),
        ("amoreAgent=A-B&runNumber=000", ["A-Bhistos_0_"]),
        ("amoreAgent=A_B", ["A-Bhistos_0_", "A-Bhistos_10_"]),
        ("amoreAgent=histos", []),
        ("amoreAgent=xhistos_0", []),
    ],
)
def test_run_0_and_agents_with_an_underscore_can_be_asked_for(client: Client, query: str, expected: list[str]) -> None:
    for agent, run in (("A_B", "0"), ("A-B", "10"), ("AB", "100")):
        send(client, amoreAgent=agent, runNumber=run)
    names = get(client, f"{FILES}?{query}")["files"]
    assert [re.sub("DQM.*", "", name) for name in names] == expected


def fill(folder: Path, number: int) -> list[str]:
    names = [f"EMChistos_{run}_DQM_2015_11_24_18_04_10.root" for run in range(number)]
    for name in names:
        os.close(os.open(folder / name, os.O_WRONLY | os.O_CREAT))
    return names


def test_10000_files_are_listed_without_a_look_at_each(client: Client, folder: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    names = fill(folder, 10_000)
    program = """
import pathlib, storage
folder = storage.Storage(pathlib.Path("."), max_file_size=1, min_free_space=0, max_rejected=1)
print(len(folder.names()), len(folder.names(lambda agent, run: run == 7)))
"""
    log = folder.parent / "strace"
    calls = "trace=stat,lstat,fstat,newfstatat,statx,access,faccessat,openat,open,readlink"
    command = ["strace", "-f", "-qq", "-e", calls, "-o", str(log), sys.executable, "-c", program]
    environ = {**os.environ, "PYTHONPATH": str(PROJECT)}
    run = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    if "ptrace" in run.stderr:
        pytest.skip(f"strace cannot work here: {run.stderr.strip()}")
    assert (run.stdout, run.returncode) == ("10000 1\n", 0), run.stderr
    traced = log.read_text()
    assert "storage.py" in traced  # what happened was seen
    assert traced.count("EMChistos_") == 0
    began = time.monotonic()
    assert get(client, FILES) == {"files": sorted(names)}
    assert time.monotonic() - began < 2  # a tenth of that here


# --- named tokens ------------------------------------------------------------------------------------------------------


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@pytest.fixture
def tokens_file(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes a token file of lines and returns its path."""

    def write(*lines: str, mode: int = 0o600) -> str:
        path = tmp_path / "tokens.ini"
        path.write_text("\n".join(["[tokens]", *lines, ""]))
        path.chmod(mode)
        return str(path)

    return write


def test_receipts_and_log_have_the_name_of_the_token_and_never_the_token(
    make_app: MakeApp, folder: Path, tokens_file: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tokens_file(
        f"EMC = {sha256('secret-emc-1')} {sha256('secret-emc-2').upper()}",
        f"hlt.A-1_x={sha256('secret-hlt')}",
        f"default = {sha256('secret-other-default')}",
    )
    client = Client(make_app(tokens_file=path, token="secret-shared"))
    known = {
        "secret-emc-1": "EMC",
        "secret-emc-2": "EMC",
        "secret-hlt": "hlt.A-1_x",
        "secret-shared": "default",
        "secret-other-default": "default",
    }
    for number, token in enumerate(known):
        assert send(client, INVALID if number == 2 else ONE, token=token).status_code == (400 if number == 2 else 200)
        assert get(client, RUN, token=token)["run"] == 123
    for token in ("secret", "secret-emc-3", sha256("secret-hlt"), "EMC", f"{sha256('secret-emc-1')}"):
        assert send(client, token=token).status_code == 400
    assert [one["sender"] for one in receipts(folder)] == list(known.values())
    lines = [one.getMessage() for one in caplog.records if one.getMessage().startswith("upload ")]
    assert [re.findall(r' sender="([^"]*)"', one) for one in lines] == [[name] for name in known.values()]
    said = caplog.text + (folder / ".receipts/123.jsonl").read_text() + client.get("/metrics").text
    assert "secret" not in said
    assert not [token for token in known if sha256(token) in said]


def test_the_token_file_alone_is_enough_and_names_keep_their_case(
    folder: Path, tokens_file: Callable[..., str]
) -> None:
    path = tokens_file("# who sends", f"EMC = {sha256('one')}", f"emc = {sha256('two')}\n  {sha256('three')}")
    app = receiver.create_app({"DQM_RECEIVER_DATA_FOLDER": str(folder), "DQM_RECEIVER_TOKENS_FILE": path})
    assert {name: len(digests) for name, digests in app.settings.tokens.items()} == {"EMC": 1, "emc": 2}
    for token, status in (("one", 200), ("two", 200), ("three", 200), (TOKEN, 400)):
        assert Client(app).get(FILES, headers={"token": token}).status_code == status


def test_the_readmes_token_file_is_one(make_app: MakeApp, tmp_path: Path) -> None:
    example = re.search(r"^```ini\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert example is not None
    path = tmp_path / "tokens"
    path.write_text(example[1])
    path.chmod(0o600)
    assert list(make_app(tokens_file=str(path)).settings.tokens) == ["default", "EMC", "HLT"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[tokens]",
        "EMC = " + "0" * 64,
        "[token]\nEMC = " + "0" * 64,
        "[tokens]\nEMC",
        "[tokens]\nEMC =",
        "[tokens]\nEMC = " + "0" * 63,
        "[tokens]\nEMC = " + "0" * 65,
        "[tokens]\nEMC = " + "g" * 64,
        "[tokens]\nEMC = " + "0" * 64 + "," + "0" * 64,
        "[tokens]\nE C = " + "0" * 64,
        "[tokens]\n" + "E" * 65 + " = " + "0" * 64,
        "[tokens]\nEMC = " + "0" * 64 + "\nEMC = " + "1" * 64,
        "[tokens]\nEMC = " + "0" * 64 + "\n[tokens]\nHLT = " + "1" * 64,
        "[tokens]\nEMC = " + "0" * 64 + "\n\xff\xfe",
    ],
)
def test_a_token_file_that_is_wrong_stops_the_start_with_one_line(
    make_app: MakeApp, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "tokens.ini"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(receiver.ConfigurationError) as caught:
        make_app(tokens_file=str(path))
    assert str(caught.value).startswith(f"DQM_RECEIVER_TOKENS_FILE {path}: ")
    assert "\n" not in str(caught.value)


def test_a_made_token_works_once_its_line_is_in_the_file(make_app: MakeApp, tokens_file: Callable[..., str]) -> None:
    command = [sys.executable, "-W", "error", "-m", "receiver", "token", "EMC"]
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    shown = [one.strip() for one in run.stdout.splitlines() if one.startswith("    ")]
    token, new = shown
    assert re.fullmatch(r"EMC = [0-9a-f]{64}", new)
    assert len(token) >= 40
    assert run.stdout.count(token) == 1
    client = Client(make_app(tokens_file=tokens_file(new)))
    assert get(client, FILES, token=token) == {"files": []}


@pytest.mark.parametrize("name", ["EMC", "a", "hlt.A-1_x", "x" * 64, "0"])
def test_a_made_token_is_different_each_time_and_fits_a_header(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = set()
    for _ in range(20):
        receiver.main(["token", name])
        token, new = (one.strip() for one in capsys.readouterr().out.splitlines() if one.startswith("    "))
        assert new == f"{name} = {sha256(token)}"
        assert re.fullmatch(r"[A-Za-z0-9_-]{40,}", token)
        made.add(token)
    assert len(made) == 20


@pytest.mark.parametrize(
    "name", ["", " ", "E C", "E=C", "E:C", "Ä", "x" * 65, "EMC\n", "[tokens]", "#EMC", "-x", "a/b"]
)
def test_no_token_is_made_for_a_name_that_the_file_cannot_have(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        receiver.main(["token", name])
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "NAME" in said.err


@pytest.mark.parametrize("arguments", [[], ["token"], ["token", "A", "B"], ["tokens", "A"]])
def test_the_token_maker_refuses_what_it_does_not_know(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        receiver.main(arguments)
    assert (caught.value.code, capsys.readouterr().out) == (2, "")


@pytest.mark.parametrize(("mode", "warnings"), [(0o644, 1), (0o604, 1), (0o640, 0), (0o600, 0)], ids=oct)
def test_a_token_file_that_everybody_can_read_is_warned_about_once(
    make_app: MakeApp,
    tokens_file: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
    mode: int,
    warnings: int,
) -> None:
    path = tokens_file(f"EMC = {sha256('one')}", mode=mode)
    client = Client(make_app(tokens_file=path))
    for _ in range(3):
        send(client, token="one")
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == warnings
    assert all(path in one and sha256("one") not in one for one in said)


# --- health ------------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}


def test_health_needs_no_token_leaves_nothing_and_is_cheap(client: Client, folder: Path) -> None:
    send(client)
    before = tree(folder)
    began = time.process_time()
    for _ in range(20):
        answer = client.get(HEALTH)
        assert (answer.status_code, answer.content_type) == (200, "application/json")
        assert answer.json is not None
        assert answer.json["status"] == 200
    assert time.process_time() - began < 2
    assert client.head(HEALTH).status_code == 200
    assert client.post(HEALTH, headers=AUTH).status_code == 405
    assert tree(folder) == before
    assert receipts(folder)[1:] == []


def check_unhealthy(client: Client, reason: str) -> None:
    answer = client.get(HEALTH)
    assert (answer.status_code, answer.content_type) == (503, "application/json")
    assert answer.json is not None
    assert (answer.json["status"], answer.json["received"]) == (503, None)
    assert reason in answer.json["message"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("open", errno.EROFS),
        ("open", errno.ENOSPC),
        ("open", errno.EACCES),
        ("open", errno.EIO),
        ("write", errno.ENOSPC),
        ("write", errno.EDQUOT),
        ("write", errno.EIO),
        ("pread", errno.EIO),
        ("statvfs", errno.ESTALE),
    ],
)
def test_health_tells_what_is_wrong_and_gets_well_again(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    before = tree(folder)

    def failing(*arguments: Any, **more: Any) -> Any:
        path = arguments[0] if call in ("open", "statvfs") else None
        raise OSError(error, os.strerror(error), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        answer = client.get(HEALTH)
    assert (answer.status_code, answer.content_type) == (503, "application/json")
    assert os.strerror(error) in answer.text
    assert str(folder) not in answer.text  # who asks has no token
    assert tree(folder) == before
    assert client.get(HEALTH).status_code == 200


def test_health_reads_what_it_has_written(client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda fd, size, position: b"")
        check_unhealthy(client, "written")
    assert list((folder / ".incoming").iterdir()) == []


def test_health_knows_a_folder_that_is_gone_or_no_folder(client: Client, folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    check_unhealthy(client, "No such file or directory")
    folder.write_bytes(b"")
    check_unhealthy(client, "Not a directory")
    folder.unlink()
    folder.with_name("elsewhere").rename(folder)
    assert client.get(HEALTH).status_code == 200


# Root may write everywhere: it is told so without its capabilities only.
WITHOUT_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
ASK = """
import receiver
from werkzeug.test import Client
print(Client(receiver.create_app()).get("/rest/api/health").text)
"""


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
@pytest.mark.parametrize("name", ["", ".incoming", ".receipts", ".replaced", ".rejected"])
def test_health_knows_a_folder_that_may_not_be_written(client: Client, folder: Path, name: str) -> None:
    ask = [*(WITHOUT_CAPABILITIES if os.geteuid() == 0 else ()), sys.executable, "-c", ASK]
    (folder / name).chmod(0o555)
    try:
        run = subprocess.run(ask, cwd=PROJECT, env={**os.environ, **settings(folder)}, capture_output=True, check=True)
    finally:
        (folder / name).chmod(0o755)
    answer = json.loads(run.stdout)
    assert (answer["status"], answer["message"]) == (503, "The data folder cannot be used: Permission denied")


def test_health_knows_that_no_room_is_left(make_app: MakeApp) -> None:
    check_unhealthy(Client(make_app(min_free_space=str(10**17))), "no room")


def test_health_knows_a_disk_that_is_read_only_or_full(
    make_tmpfs: Callable[[str], Path], make_app: MakeApp, tmp_path: Path
) -> None:
    point = make_tmpfs("size=1m")
    client = Client(receiver.create_app(settings(point / "data")))
    assert client.get(HEALTH).status_code == 200
    subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)
    check_unhealthy(client, "Read-only file system")
    subprocess.run(["mount", "-o", "remount,rw", str(point)], check=True)
    assert client.get(HEALTH).status_code == 200
    with (point / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(4096))
    check_unhealthy(client, "room")
    (point / "filler").unlink()
    assert client.get(HEALTH).status_code == 200


# --- metrics -----------------------------------------------------------------------------------------------------------


def metrics(client: Client) -> dict[tuple[str, ...], float]:
    """Return the samples by name and the values of their labels."""
    response = client.get("/metrics")
    assert response.status_code == 200, response.text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


FAMILIES = {
    "dqm_receiver_uploads": ("counter", ["agent", "outcome"]),
    "dqm_receiver_accepted_bytes": ("counter", ["agent"]),
    "dqm_receiver_rejections": ("counter", ["reason"]),
    "dqm_receiver_last_accepted_timestamp_seconds": ("gauge", ["agent"]),
    "dqm_receiver_upload_seconds": ("histogram", ["le"]),
    "dqm_receiver_upload_validation_seconds": ("histogram", ["le"]),
    "dqm_receiver_uploads_in_progress": ("gauge", []),
    "dqm_receiver_free_bytes": ("gauge", []),
}


@pytest.fixture
def busy(client: Client) -> Client:
    """A receiver to which six files have come."""
    for agent, body in (("A_B", ONE), ("A_B", ONE), ("A_B", OTHER), ("A_B", INVALID), ("HLT", ONE), ("TPC", b"")):
        send(client, body, amoreAgent=agent)
    return client


def test_metrics_have_these_families_and_labels(busy: Client) -> None:
    answer = busy.get("/metrics")
    assert answer.content_type.startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert {name: family.type for name, family in families.items()} == {
        name: kind for name, (kind, _) in FAMILIES.items()
    }
    for name, (kind, labels) in FAMILIES.items():
        samples = [one for one in families[name].samples if kind != "histogram" or one.name.endswith("_bucket")]
        assert samples
        assert all(list(one.labels) == labels for one in samples)
        assert families[name].documentation


def test_metrics_are_right(busy: Client, folder: Path) -> None:
    values = metrics(busy)
    uploads = {key[1:]: value for key, value in values.items() if key[0] == "dqm_receiver_uploads_total"}
    expected = {(agent, outcome): 0.0 for agent in ("A_B", "HLT", "TPC") for outcome in storage.OUTCOMES}
    expected.update({("A_B", outcome): 1.0 for outcome in storage.OUTCOMES})
    expected.update({("HLT", "stored"): 1.0, ("TPC", "rejected"): 1.0})
    assert uploads == expected
    bytes_ = [values["dqm_receiver_accepted_bytes_total", agent] for agent in ("A_B", "HLT", "TPC")]
    assert bytes_ == [len(ONE) + len(OTHER), len(ONE), 0]
    reasons = {key[1]: value for key, value in values.items() if key[0] == "dqm_receiver_rejections_total"}
    assert reasons == {**dict.fromkeys(receiver.REASON_CLASSES, 0), "not valid": 1, "no file": 1}
    last = {key[1]: value for key, value in values.items() if "last_accepted" in key[0]}
    times = [datetime.fromisoformat(one["received_at"].replace("Z", "+00:00")).timestamp() for one in receipts(folder)]
    assert last == pytest.approx({"A_B": times[2], "HLT": times[4]}, abs=0.001)
    assert abs(datetime.now(timezone.utc).timestamp() - last["HLT"]) < 60
    disk = os.statvfs(folder)
    assert values[("dqm_receiver_free_bytes",)] == pytest.approx(disk.f_bavail * disk.f_frsize, rel=0.2)
    assert values[("dqm_receiver_uploads_in_progress",)] == 0


@pytest.mark.parametrize(("family", "number"), [("seconds", 6), ("validation_seconds", 5)])
def test_histograms_are_cumulative_and_add_up(busy: Client, folder: Path, family: str, number: int) -> None:
    values = metrics(busy)
    name = f"dqm_receiver_upload_{family}"
    buckets = [(float(key[1]), value) for key, value in values.items() if key[0] == f"{name}_bucket"]
    taken = [one[family] for one in receipts(folder) if one[family] is not None]
    assert len(taken) == number == values[(f"{name}_count",)] == buckets[-1][1]
    assert values[(f"{name}_sum",)] == pytest.approx(sum(taken))
    assert buckets[-1][0] == float("inf")
    assert buckets == sorted(buckets)
    assert buckets == [(bound, sum(one <= bound for one in taken)) for bound, _ in buckets]
    assert len(buckets) >= 8


def test_a_duration_on_a_bound_is_within_it_and_a_longer_one_is_not(client: Client, folder: Path) -> None:
    note(folder, line(seconds=1.0), line(seconds=1.000001), line(seconds=0.0), line(seconds=1e6))
    values = metrics(client)
    bucket = {float(key[1]): value for key, value in values.items() if key[0] == "dqm_receiver_upload_seconds_bucket"}
    assert (bucket[0.001], bucket[0.3], bucket[1.0], bucket[3.0]) == (1, 1, 2, 3)
    assert (bucket[300.0], bucket[float("inf")]) == (3, 4)


def test_an_upload_is_in_progress_while_its_body_comes(client: Client) -> None:
    seen = []

    class Body(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            seen.append(metrics(client)[("dqm_receiver_uploads_in_progress",)])
            return super().read(size)

    environ = {"wsgi.input_terminated": True, "wsgi.input": Body(ONE)}
    assert client.post(FILES, headers=HEADERS, environ_overrides=environ).status_code == 200
    assert set(seen) == {1.0}
    assert metrics(client)[("dqm_receiver_uploads_in_progress",)] == 0


def test_metrics_do_not_depend_on_who_is_asked_or_restarts(busy: Client, make_app: MakeApp) -> None:
    def steady(client: Client) -> dict[tuple[str, ...], float]:
        values = metrics(client)
        del values[("dqm_receiver_free_bytes",)]
        return values

    other = Client(make_app())
    assert steady(other) == steady(busy) == steady(busy)
    send(other, amoreAgent="EMC")
    assert steady(busy) == steady(other)
    assert steady(busy)["dqm_receiver_uploads_total", "EMC", "stored"] == 1


def test_metrics_need_no_token_and_hold_none(busy: Client) -> None:
    text = busy.get("/metrics").text
    assert TOKEN not in text
    assert sha256(TOKEN) not in text
    assert busy.head("/metrics").status_code == 200
    assert busy.post("/metrics", headers=AUTH).status_code == 405


def test_metrics_that_are_switched_off_are_a_404(make_app: MakeApp) -> None:
    client = Client(make_app(metrics="off"))
    send(client)
    for headers in ({}, AUTH):
        answer = client.get("/metrics", headers=headers)
        assert (answer.status_code, answer.content_type) == (404, "application/json")
        assert answer.json is not None
        assert (answer.json["status"], answer.json["received"]) == (404, None)
    assert get(client, RUN)["run"] == 123


@pytest.mark.parametrize("number", [100, 101, 250])
def test_at_most_100_agents_have_series_of_their_own(client: Client, folder: Path, number: int) -> None:
    own = min(number, 100)

    def arrival(agent: int) -> str:
        return f"2015-11-24T18:{agent // 60:02}:{agent % 60:02}.000000Z"

    agents = [*range(50, number), *range(50)]  # in other order than they came
    for run in (5, 6):
        note(folder, *(line(run=run, agent=f"A{one}", received_at=arrival(one)) for one in agents), run=run)
    values = metrics(client)
    stored = {key[1]: value for key, value in values.items() if key[::2] == ("dqm_receiver_uploads_total", "stored")}
    expected = {f"A{one}": 2.0 for one in range(own)}
    if number > own:
        expected["(other)"] = 2.0 * (number - own)
        assert values["dqm_receiver_accepted_bytes_total", "(other)"] == 20 * (number - own)
        last = values["dqm_receiver_last_accepted_timestamp_seconds", "(other)"]
        assert last == storage.seconds_of(arrival(number - 1))
    assert stored == expected
    labels = {key[1] for key in values if key[0] == "dqm_receiver_last_accepted_timestamp_seconds"}
    assert labels == set(expected)
    assert len(get(client, f"{RUNS}/5")["agents"]) == number


def test_metrics_bear_receipts_that_are_archived_meanwhile(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(client, amoreAgent="EMC", runNumber="5")
    send(client, amoreAgent="HLT", runNumber="6")
    runs = storage.Storage.runs

    def archiving(self: storage.Storage) -> list[int]:
        listed = runs(self)
        (folder / ".receipts" / "5.jsonl").unlink(missing_ok=True)
        return listed

    monkeypatch.setattr(storage.Storage, "runs", archiving)
    values = metrics(client)
    assert values["dqm_receiver_uploads_total", "HLT", "stored"] == 1
    assert ("dqm_receiver_uploads_total", "EMC", "stored") not in values


def test_metrics_and_runs_bear_receipts_that_come_while_they_are_read(
    make_app: MakeApp, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client(make_app())
    path = note(folder, line())
    statuses: Counter[int] = Counter()
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            statuses[client.get("/metrics").status_code] += 1
            statuses[client.get(RUN, headers=AUTH).status_code] += 1

    interval = sys.getswitchinterval()
    threads = [threading.Thread(target=ask) for _ in range(3)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        end = time.monotonic() + 1.5
        number = 0
        with path.open("a") as file:
            while time.monotonic() < end:
                number += 1  # classes of their own, that the sums grow while they are made
                new = line(agent=f"A{number % 150}", outcome="rejected", reason_class=f"r{number}")
                file.write(new)
                file.flush()
                time.sleep(0.0005)
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert set(statuses) == {200}, caplog.text[-2000:]
    assert metrics(client)["dqm_receiver_upload_seconds_count",] == number + 1


def promtool(*arguments: str, send: str | None = None) -> str:
    """Run promtool; return what it complains about."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    run = subprocess.run(["promtool", *arguments], input=send, capture_output=True, text=True, check=False)
    return "" if run.returncode == 0 else f"{run.returncode}: {run.stdout}{run.stderr}"


def test_prometheus_finds_no_fault_with_the_metrics(client: Client, folder: Path) -> None:
    assert promtool("check", "metrics", send="# TYPE x_total gauge\nx_total 1\n") != ""
    empty = client.get("/metrics").text
    assert promtool("check", "metrics", send=empty) == ""
    for number in range(110):
        note(folder, line(agent=f"A_{number}", outcome=storage.OUTCOMES[number % 4], reason_class="not valid"))
    assert promtool("check", "metrics", send=client.get("/metrics").text) == ""


def test_prometheus_finds_no_fault_with_the_readmes_scrape_and_rules(busy: Client, tmp_path: Path) -> None:
    scrape, rules = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for name, text, command in (("scrape.yml", scrape, "config"), ("rules.yml", rules, "rules")):
        (tmp_path / name).write_text(text)
        assert promtool("check", command, str(tmp_path / name)) == ""
    asked = set(re.findall(r"dqm_receiver_\w+", rules))
    assert asked
    assert asked <= {key[0] for key in metrics(busy)}


# --- the log -----------------------------------------------------------------------------------------------------------

PAIR = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|-?[0-9.e-]+)(?: |$)')


def uploads_in(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return what the lines about uploads say; each must be key=value throughout."""
    found = []
    for record in caplog.records:
        message = record.getMessage()
        if record.name == "dqm_receiver" and message.startswith("upload "):
            pairs = PAIR.findall(message.removeprefix("upload "))
            assert "upload " + " ".join(f"{key}={value}" for key, value in pairs) == message
            assert record.levelno == logging.INFO
            found.append({key: json.loads(value) for key, value in pairs})
    return found


def test_an_upload_is_one_line_in_the_log_of_a_host_that_wants_it(
    busy: Client, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert uploads_in(caplog) == []  # the host has not asked for them
    caplog.set_level(logging.INFO)  # the root logger, as a host configures it
    for agent, body in (("A_B", ONE), ("A_B", OTHER), ("A_B", INVALID), ("HLT", HISTOGRAMS), ("TPC", b"")):
        send(busy, body, amoreAgent=agent, runNumber="5")
    noted = receipts(folder, 5)
    keys = ("outcome", "sender", "run", "agent", "filename", "size", "seconds", "reason")
    expected = [{key: one[key] for key in keys if one[key] is not None} for one in noted]
    assert uploads_in(caplog) == expected
    assert [one["outcome"] for one in expected] == ["stored", "replaced", "rejected", "stored", "rejected"]
    assert [("reason" in one) for one in expected] == [False, False, True, False, True]


def test_a_hosts_own_format_shows_the_line(client: Client) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s|%(name)s|%(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        send(client)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    pattern = (
        r'INFO\|dqm_receiver\|upload outcome="stored" sender="default" run=123 agent="testagent" .*seconds=[0-9.]+\n'
    )
    assert re.fullmatch(pattern, stream.getvalue())


@pytest.mark.parametrize(
    "evil",
    [
        b'h"\nupload outcome="stored" sender="EMC" run=1',
        b'"\r\n[2015-11-24] upload outcome="stored"',
        b"\x1b[2Jh\x00\x0b\x0c\x85",
        "h\u2028upload outcome=\u2029".encode(),
        b'\\" outcome=stored \\',
    ],
)
def test_nothing_in_a_file_can_forge_a_line_or_a_key(
    client: Client, folder: Path, caplog: pytest.LogCaptureFixture, evil: bytes
) -> None:
    file = File()
    file.add(b"TNamed", evil, tnamed(b"h"), object_size=100_000)  # less is stored than the key says
    caplog.set_level(logging.INFO)
    answer = send(client, file.close())
    assert answer.status_code == 400
    assert answer.json is not None
    (one,) = uploads_in(caplog)
    assert one["reason"] == answer.json["reason"]
    assert (one["outcome"], one["agent"]) == ("rejected", "testagent")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.isascii()
    assert message.isprintable()
    assert len((folder / ".receipts" / "123.jsonl").read_bytes().splitlines()) == 1
    assert receipts(folder)[0]["reason"] == one["reason"]


def test_the_name_of_an_object_does_stand_in_the_reason(client: Client) -> None:
    file = File()  # without this the test before would test nothing
    file.add(b"TNamed", b"its-name", tnamed(b"h"), object_size=100_000)
    answer = send(client, file.close())
    assert answer.json is not None
    assert "its-name" in answer.json["reason"]


@pytest.mark.parametrize(
    ("call", "error", "status"),
    [
        ("statvfs", errno.ENOSPC, 507),
        ("statvfs", errno.ESTALE, 503),
        ("link", errno.EDQUOT, 507),
        ("link", errno.EROFS, 503),
    ],
)
def test_an_upload_that_the_disk_refuses_is_a_line_in_the_log_and_no_verdict_in_the_receipts(
    client: Client,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    error: int,
    status: int,
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        answer = send(client)
    assert answer.status_code == status
    assert answer.json is not None
    (one,) = uploads_in(caplog)
    assert (one["outcome"], one["run"], one["agent"]) == ("refused", 123, "testagent")
    assert one["reason"] == answer.json["message"]
    assert (receipts(folder), visible(folder)) == ([], {})
    assert send(client).status_code == 200
    assert [one["outcome"] for one in receipts(folder)] == ["stored"]


def test_an_upload_to_a_folder_that_is_gone_is_a_line_in_the_log(
    client: Client, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder.rename(folder.with_name("elsewhere"))
    answer = send(client)
    assert answer.status_code == 503
    (one,) = uploads_in(caplog)
    assert (one["outcome"], one["run"], one["agent"]) == ("refused", 123, "testagent")
    assert "No such file or directory" in one["reason"]
    assert not folder.exists()
