"""The log of uploads, what the receipts of a run add up to, and the answers made of them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, Self

import pytest
from client import AUTH, GRAPHS, HEADERS, HISTOGRAMS, NAME, PROFILES, get, receipts, send
from faults import failing
from werkzeug.test import Client

import receipt_pages
import receipts as receipt_module
import receiver
import summaries
from receipt_pages import Query, newest
from receipts import OUTCOMES, Receipt, ReceiptLog, RunNotFound
from summaries import Summaries

MakeApp = Callable[..., receiver.Receiver]
RUNS = "/rest/api/runs"
RUN = f"{RUNS}/123"
ALL = "/rest/api/receipts"
INVALID = PROFILES[:-20]


def receipt(**changes: Any) -> Receipt:
    known = {
        "outcome": "stored", "filename": "EMC.root", "run": 123, "time_stamp": 234, "agent": "EMC", "data_status": 0,
        "sender": "default", "seconds": 0.5, "size": 10, "sha256": "0" * 64,
    }  # fmt: skip
    return Receipt(**{**known, **changes})


def line(time: str, **changes: Any) -> str:
    """Return the line of a receipt as another writer has written it, at a time of the day."""
    received_at = f"2015-11-24T{time}.000000Z"
    stamped = receipt(**changes).content | {"received_at": received_at, "id": f"{received_at}-000001-0badcafe"}
    return json.dumps(stamped) + "\n"


def note(folder: Path, *lines: str, run: int = 123, writer: str = "another") -> Path:
    """Append lines to the log of another writer."""
    path = folder / ".receipts" / str(run) / f"{writer}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for made in (path.parent, path.parent.parent):
        made.chmod(0o700)
    with path.open("a") as file:
        file.writelines(lines)
    return path


@pytest.fixture
def log(folder: Path) -> ReceiptLog:
    folder.mkdir()
    return ReceiptLog(folder)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every receipt that is parsed from now on."""
    seen: list[bytes] = []
    loads = json.loads

    def watch(text: Any) -> Any:
        if isinstance(text, bytes) and text.startswith(b'{"outcome"'):  # else it is an answer that a test reads
            seen.append(text)
        return loads(text)

    monkeypatch.setattr(json, "loads", watch)
    return seen


# --- the log -----------------------------------------------------------------------------------------------------------


def test_upload_is_one_line_with_these_fields(client: Client, folder: Path) -> None:
    for body, status in ((PROFILES, 200), (PROFILES, 200), (GRAPHS, 200), (INVALID, 400)):
        assert send(client, body).status_code == status
    lines = receipts(folder)
    assert [one["outcome"] for one in lines] == list(OUTCOMES)
    for one, body in zip(lines, (PROFILES, PROFILES, GRAPHS, INVALID), strict=True):
        rejected = one["outcome"] == "rejected"
        assert (one["filename"], one["run"], one["time_stamp"], one["agent"]) == (NAME, 123, 234, "testagent")
        assert (one["data_status"], one["sender"], one["size"]) == (1, "default", len(body))
        assert one["sha256"] == hashlib.sha256(body).hexdigest()
        assert 0 < one["validation_seconds"] <= one["seconds"] < 60
        assert (one["objects"] is None) == rejected
        assert (one["reason_class"], bool(one["reason"])) == (
            ("invalid_root_file", True) if rejected else (None, False)
        )
        assert one["received_at"].startswith("20") and one["received_at"].endswith("Z")
        assert set(one) == set(Receipt.__slots__)
    assert len({one["id"] for one in lines}) == 4
    modes = [made.stat().st_mode & 0o777 for made in (folder / ".receipts", folder / ".receipts/123")]
    assert modes == [0o700, 0o700]


@pytest.mark.parametrize("outcomes", [["stored"], ["duplicate"], ["replaced"], ["stored", "rejected"], ["rejected"]])
def test_only_receipts_that_promise_are_synced(
    log: ReceiptLog, folder: Path, synced: list[int], outcomes: list[str]
) -> None:
    for number in range(2):
        synced.clear()
        log.append([receipt(outcome=outcome) for outcome in outcomes])
        (path,) = folder.glob(".receipts/123/*.jsonl")
        expected = {path.stat().st_ino} if outcomes != ["rejected"] else set[int]()
        if number == 0:  # the log is new: so is its name, and those of its folders
            expected |= {made.stat().st_ino for made in (folder, folder / ".receipts", path.parent)}
        assert set(synced) == expected


def test_uploads_of_many_threads_share_their_syncs(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(client)
    (log,) = folder.glob(".receipts/123/*.jsonl")
    synced = [0, 0]
    inodes = [folder.stat().st_ino, log.stat().st_ino]
    fsync = os.fsync

    def slow(fd: int) -> None:
        if (inode := os.fstat(fd).st_ino) in inodes:
            synced[inodes.index(inode)] += 1
        time.sleep(0.05)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    with ThreadPoolExecutor(30) as pool:
        sent = list(pool.map(lambda number: send(client, timeStamp=str(number)), range(30)))
    assert [answer.status_code for answer in sent] == [200] * 30
    assert sorted(one["time_stamp"] for one in receipts(folder)) == [*range(30), 234]
    assert max(synced) <= 10  # of the 30 that uploads without groups take


def test_lines_of_a_log_are_in_order(log: ReceiptLog, folder: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(log.append, [[receipt()]] * 120))
    (path,) = (folder / ".receipts" / "123").iterdir()
    ids = [json.loads(text)["id"] for text in path.read_text().splitlines()]
    assert ids == sorted(set(ids))
    assert len(ids) == 120


def test_clock_that_steps_back_begins_a_new_log(log: ReceiptLog, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = iter((12, 13, 11, 12))

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls(2026, 11, 22, next(hours), tzinfo=tz)

    monkeypatch.setattr(receipt_module, "datetime", Clock)
    for size in range(4):
        log.append([receipt(size=size)])
    assert len(list(folder.glob(".receipts/123/*.jsonl"))) == 2
    assert [one.received_at[11:13] for one in newest(log, 123, Query())[0]] == ["13", "12", "12", "11"]


def test_run_is_touched_once_a_minute(log: ReceiptLog, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder / ".receipts/123"
    log.append([receipt()])
    os.utime(run, (0, 0))
    log.append([receipt()])
    assert run.stat().st_mtime == 0
    monkeypatch.setattr(receipt_module, "_TOUCH_INTERVAL", 0.0)
    log.append([receipt()])
    assert run.stat().st_mtime > 0


def test_rejection_without_a_receipt_is_answered_all_the_same(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    send(client)
    monkeypatch.setattr(receipt_module, "write_all", failing(errno.EIO))
    assert send(client, INVALID).status_code == 400
    assert "could not be recorded" in caplog.text
    assert [one["outcome"] for one in receipts(folder)] == ["stored"]


@pytest.mark.parametrize("gone", [".receipts", ".receipts/123"])
def test_archived_folder_is_made_anew(
    client: Client, folder: Path, pass_time: Callable[[float], None], gone: str
) -> None:
    send(client)
    tag = client.get(RUN, headers=AUTH).headers["ETag"]
    shutil.move(folder / gone, folder.parent / "archive")
    (folder.parent / "archive").touch()
    pass_time(1.1)  # a hidden folder is compared with its path once a second
    assert client.get(RUN, headers={**AUTH, "If-None-Match": tag}).status_code in (404, 503)
    if gone == ".receipts":  # moved away, and not removed: nothing is acknowledged into a folder that has no path
        shutil.rmtree(folder.parent / "archive")
    send(client, GRAPHS)
    assert [one["outcome"] for one in receipts(folder)] == ["replaced"]
    assert get(client, RUN)["agents"]["testagent"]["files"] == 1


def test_least_recently_used_log_is_closed(log: ReceiptLog, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipt_module, "_MAX_OPEN_LOGS", 2)
    opened = list[int]()
    for run in (1, 2, 1, 3, 1, 2, *range(4, 30)):
        log.append([receipt(run=run)])
        opened.append(len(os.listdir("/proc/self/fd")))
    assert [len(list(folder.glob(f".receipts/{run}/*"))) for run in (1, 2, 3)] == [1, 2, 1]
    assert max(opened) == opened[1]
    assert log.runs() == list(range(1, 30))


# --- reading receipts --------------------------------------------------------------------------------------------------


def test_newest_receipts_come_first_across_logs(client: Client, folder: Path) -> None:
    note(folder, line("10:00:00", time_stamp=1), line("10:00:02", time_stamp=3), writer="a")
    note(folder, line("10:00:01", time_stamp=2), line("10:00:03", time_stamp=4), writer="b")
    note(folder, line("10:00:04", time_stamp=5, run=124), run=124)
    answer = get(client, f"{RUN}/receipts")
    assert [one["time_stamp"] for one in answer["receipts"]] == [4, 3, 2, 1]
    assert answer["before"] is None
    assert [one["time_stamp"] for one in get(client, ALL)["receipts"]] == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("path", [ALL, f"{RUN}/receipts"])
def test_receipts_come_in_pages(client: Client, folder: Path, path: str) -> None:
    for minute in range(3):
        for second in range(0, 60, 3):
            for writer in ("a", "b"):
                note(folder, line(f"10:0{minute}:{second + (writer == 'b'):02}", time_stamp=second), writer=writer)
    whole = get(client, f"{path}?limit=1000")["receipts"]
    pages, before = list[Any](), ""
    while before is not None:
        page = get(client, f"{path}?limit=17" + (f"&before={before}" if before else ""))
        pages.append(page["receipts"])
        before = page["before"]
    assert [one for page in pages for one in page] == whole
    assert [len(page) for page in pages] == [17] * 7 + [1]
    assert len(get(client, path)["receipts"]) == 100


def test_paging_goes_beyond_what_one_request_scans(
    log: ReceiptLog, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receipt_pages, "_MAX_SCANNED", 100)
    lines = [
        line(f"10:{n // 60:02}:{n % 60:02}", time_stamp=n, agent="few" if n % 300 == 0 else "EMC") for n in range(2000)
    ]
    note(folder, *lines)
    for query, expected in ((Query(50), [*range(1999, -1, -1)]), (Query(2, agent="few"), [*range(1800, -1, -300)])):
        found, before, requests = list[int](), query.before, 0
        while requests == 0 or before is not None:
            page, before = newest(log, 123, Query(query.limit, before, query.agent))
            found += [one.time_stamp for one in page]
            requests += 1
        assert (found, requests >= 20) == (expected, True)


def test_old_page_of_a_long_log_is_quick(log: ReceiptLog, folder: Path, parsed: list[bytes]) -> None:
    note(folder, *[line(f"{n // 3600:02}:{n // 60 % 60:02}:{n % 60:02}", time_stamp=n) for n in range(20_000)])
    before = json.loads(line("00:01:40"))["id"]
    parsed.clear()
    page, _ = newest(log, 123, Query(10, before))
    assert [one.time_stamp for one in page] == list(range(99, 89, -1))
    assert len(parsed) < 1500


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", [5, 4, 3, 2, 1]),
        ("?amoreAgent=A_B", [4, 1]),
        ("?outcome=rejected", [5, 4]),
        ("?outcome=rejected&amoreAgent=A_B", [4]),
        ("?outcome=replaced", []),
        ("?limit=2", [5, 4]),
        ("?limit=1&amoreAgent=EMC", [5]),
    ],
)
@pytest.mark.parametrize("path", [ALL, f"{RUN}/receipts"])
def test_receipts_can_be_narrowed(client: Client, folder: Path, path: str, query: str, expected: list[int]) -> None:
    kinds = [("A_B", "stored"), ("EMC", "stored"), ("A-B", "duplicate"), ("A_B", "rejected"), ("EMC", "rejected")]
    for number, (agent, outcome) in enumerate(kinds, 1):
        note(folder, line(f"10:00:0{number}", time_stamp=number, agent=agent, outcome=outcome))
    assert [one["time_stamp"] for one in get(client, path + query)["receipts"]] == expected


def test_receipts_of_all_runs_come_from_recent_ones(client: Client, folder: Path) -> None:
    for run in range(60):
        path = note(folder, line("10:00:00", run=run), run=run)
        os.utime(path.parent, (1000 - run, 1000 - run))
    assert {one["run"] for one in get(client, ALL)["receipts"]} == set(range(50))


TORN = ['{"received_at": "2015-11-24T1', "{", line("10:00:00")[:-2], "\0" * 300]
FOREIGN = [
    '{"agent": "X"}\n',
    '{"agent": "X", "outcome": "stored"}\n',
    line("10:00:00", agent="X", outcome="fine"),
    line("10:00:00", agent="X", size=None),
    line("10:00:00", agent=["X"]),
    "5\n[]\nnull\n\n",
    "[" * 100_000 + "\n",
    "x" * 200_000 + "\n",
]


@pytest.mark.parametrize("known", [True, False], ids=["read before", "read anew"])
@pytest.mark.parametrize("bad", [*TORN, *FOREIGN], ids=lambda text: repr(text)[:30])
def test_lines_that_are_no_receipts_are_skipped(client: Client, folder: Path, bad: str, known: bool) -> None:
    first = [line("10:00:01", filename="a"), bad] if bad.endswith("\n") else [line("10:00:01", filename="a")]
    note(folder, *first)
    if known:
        assert get(client, RUN)["agents"]["EMC"]["files"] == 1
    note(folder, line("10:00:02", filename="b") if bad.endswith("\n") else bad)
    note(folder, line("10:00:03", filename="c"), writer="later")
    agents = get(client, RUN)["agents"]
    expected = 3 if bad.endswith("\n") else 2
    assert {agent: one["files"] for agent, one in agents.items()} == {"EMC": expected}
    for path in (ALL, f"{RUN}/receipts"):
        names = [one["filename"] for one in get(client, path)["receipts"]]
        assert names == (["c", "b", "a"] if expected == 3 else ["c", "a"])


def test_line_in_pieces_counts_once_it_is_whole(client: Client, folder: Path) -> None:
    one, two, three = (line(f"10:00:0{number}", filename=str(number)) for number in range(3))
    counts = []
    for piece in (one, two[:50], two[50:], three[:-1], "\n"):
        note(folder, piece)
        counts.append(get(client, RUN)["agents"]["EMC"]["files"])
    assert counts == [1, 1, 2, 2, 3]


# --- runs --------------------------------------------------------------------------------------------------------------


def test_runs_are_sorted_whatever_came_of_their_uploads(client: Client) -> None:
    assert get(client, RUNS) == {"runs": []}
    for run, body in (("10", PROFILES), ("9", INVALID), ("2147483647", PROFILES), ("0", PROFILES), ("10", GRAPHS)):
        send(client, body, runNumber=run)
    assert get(client, RUNS) == {"runs": [0, 9, 10, 2147483647]}


def test_runs_come_in_pages_by_activity(client: Client, folder: Path) -> None:
    for run, when in ((1, 500), (2, 400), (3, 600), (4, 100)):
        path = note(folder, line("10:00:00", run=run), run=run)
        os.utime(path.parent, (when, when))
    assert get(client, f"{RUNS}?limit=3") == {"runs": [3, 1, 2], "before": 2}
    assert get(client, f"{RUNS}?limit=3&before=2") == {"runs": [4], "before": None}
    assert get(client, f"{RUNS}?limit=4") == {"runs": [3, 1, 2, 4], "before": None}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("007", "folder"), ("8.jsonl", "file"), ("9~", "folder"), (".9", "folder"), ("10", "link"), ("x", "folder")],
)
def test_strange_things_among_the_runs_do_no_harm(
    client: Client, folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    send(client)
    path = folder / ".receipts" / name
    if kind == "folder":
        path.mkdir()
        (path / "x.jsonl").write_text(line("10:00:00", run=7))
    elif kind == "link":
        (tmp_path / "secret").mkdir()
        (tmp_path / "secret/x.jsonl").write_text(line("10:00:00", agent="secret"))
        path.symlink_to(tmp_path / "secret")
    else:
        path.write_text(line("10:00:00"))
    assert 123 in get(client, RUNS)["runs"]
    assert [one["run"] for one in get(client, ALL)["receipts"]] == [123]
    for number in (7, 8, 9, 10):
        assert client.get(f"{RUNS}/{number}", headers=AUTH).status_code == 404


@pytest.mark.parametrize("kind", ["device", "pipe", "outside"])
def test_planted_log_is_neither_read_nor_written(client: Client, folder: Path, tmp_path: Path, kind: str) -> None:
    send(client)
    planted, outside = folder / ".receipts/123/planted.jsonl", tmp_path / "outside"
    outside.write_text(line("10:00:00", agent="secret"))
    if kind == "pipe":
        os.mkfifo(planted)
    else:
        planted.symlink_to("/dev/zero" if kind == "device" else outside)
    for path in (RUN, ALL, f"{RUN}/receipts"):
        response = client.get(path, headers=AUTH)
        assert response.status_code in (200, 503)
        assert "secret" not in response.text
    assert send(client).status_code == 200
    assert outside.read_text() == line("10:00:00", agent="secret")


def test_run_says_everything_of_each_agent(client: Client, folder: Path) -> None:
    def upload(agent: str, time_stamp: int, body: bytes, data_status: int = 0) -> None:
        changes = {"runNumber": "7", "amoreAgent": agent, "timeStamp": str(time_stamp), "dataStatus": str(data_status)}
        send(client, body, **changes)

    upload("EMC", 300, PROFILES)
    upload("EMC", 100, PROFILES, 1)
    upload("EMC", 100, PROFILES, 1)
    upload("EMC", 300, GRAPHS)
    upload("EMC", 50, INVALID)
    upload("EMC", 400, HISTOGRAMS, 2)
    upload("E_C", 500, PROFILES, 1)
    upload("E-C", 600, GRAPHS)
    upload("HLT", 1, INVALID, 1)
    upload("HLT", 2, b"", 2)
    last = {one["agent"]: one["received_at"] for one in receipts(folder, 7) if one["outcome"] != "rejected"}
    send(client, runNumber="8", amoreAgent="EMC")

    def agent(name: str, *values: object) -> dict[str, object]:
        fields = (
            "files", "bytes", "duplicates", "rejected", "reused", "first_time_stamp", "last_time_stamp", "started", "ended",
        )  # fmt: skip
        return {**dict(zip(fields, values, strict=True)), "last_arrival": last.get(name)}

    assert get(client, f"{RUNS}/7") == {
        "run": 7,
        "agents": {
            "E-C": agent("E-C", 1, len(GRAPHS), 0, 0, 0, 600, 600, False, False),
            "EMC": agent("EMC", 3, 2 * len(PROFILES) + len(GRAPHS) + len(HISTOGRAMS), 1, 1, 1, 100, 400, True, True),
            "E_C": agent("E_C", 1, len(PROFILES), 0, 0, 0, 500, 500, True, False),
            "HLT": agent("HLT", 0, 0, 0, 2, 0, None, None, False, False),
        },
        "missing": [],
    }


Step = tuple[str, str, str]  # outcome, name, content


@pytest.mark.parametrize(
    ("steps", "files", "duplicates", "reused"),
    [
        ([("stored", "a", "1")], 1, 0, 0),
        ([("stored", "a", "1"), ("stored", "b", "1")], 2, 0, 0),
        ([("stored", "a", "1"), ("duplicate", "a", "1")], 1, 1, 0),
        ([("duplicate", "a", "1")], 1, 0, 0),  # the process died before it recorded the first upload
        ([("duplicate", "a", "1"), ("duplicate", "a", "1")], 1, 1, 0),
        ([("stored", "a", "1"), ("replaced", "a", "2")], 1, 0, 1),
        ([("replaced", "a", "2")], 1, 0, 0),
        ([("stored", "a", "1"), ("stored", "a", "2")], 1, 0, 1),  # Overwatch had taken the first
        ([("stored", "a", "1"), ("stored", "a", "1")], 1, 0, 0),
        ([("stored", "a", "1"), ("replaced", "a", "2"), ("replaced", "a", "1")], 1, 0, 1),
        ([("stored", "a", "1"), ("rejected", "a", "2")], 1, 0, 0),
        ([("rejected", "a", "1")], 0, 0, 0),
    ],
)
def test_summary_counts_names_and_not_lines(
    client: Client, folder: Path, steps: list[Step], files: int, duplicates: int, reused: int
) -> None:
    for number, (outcome, name, content) in enumerate(steps):
        note(folder, line(f"10:00:0{number}", outcome=outcome, filename=name, sha256=content * 64))
    summary = get(client, RUN)["agents"]["EMC"]
    assert [summary[name] for name in ("files", "duplicates", "reused")] == [files, duplicates, reused]


Mark = tuple[int, int] | tuple[int, int, str]  # time stamp, data status, outcome


@pytest.mark.parametrize(
    ("marks", "state"),
    [
        ([(5, 0)], ""),
        ([(5, 1)], "started"),
        ([(0, 1)], "started"),
        ([(5, 1), (6, 2)], "started ended"),
        ([(0, 1), (0, 2, "replaced")], "started ended"),
        ([(6, 2), (5, 1)], "started ended"),
        ([(6, 2)], "ended"),
        ([(5, 1), (6, 2), (7, 0)], "started ended"),
        ([(5, 1), (6, 2), (7, 1)], "started"),
        ([(5, 1), (6, 2), (7, 1), (8, 2)], "started ended"),
        ([(7, 1), (5, 1), (6, 2)], "started"),
        ([(5, 1), (6, 2), (7, 1, "rejected")], "started ended"),
        ([(5, 1, "rejected")], ""),
        ([(5, 1), (6, 2, "rejected")], "started"),
    ],
)
def test_set_of_data_is_started_and_ended(client: Client, folder: Path, marks: list[Mark], state: str) -> None:
    for number, (time_stamp, data_status, *outcome) in enumerate(marks):
        more = {"outcome": outcome[0] if outcome else "stored"}
        note(
            folder,
            line(f"10:00:{number:02}", time_stamp=time_stamp, data_status=data_status, filename=str(number), **more),
        )
    summary = get(client, RUN)["agents"]["EMC"]
    assert " ".join(name for name in ("started", "ended") if summary[name]) == state


def test_last_arrival_is_the_latest_in_any_order(client: Client, folder: Path) -> None:
    note(folder, line("18:09:00"))
    for outcome in ("duplicate", "rejected"):
        note(folder, line("18:00:00", outcome=outcome), line("18:30:00", outcome="rejected"), writer=outcome)
        assert get(client, RUN)["agents"]["EMC"]["last_arrival"] == "2015-11-24T18:09:00.000000Z"


def test_missing_agents_are_those_that_sent_nothing(make_app: MakeApp) -> None:
    client = Client(make_app(agents="EMC HLT TPC"))
    send(client, amoreAgent="EMC")
    send(client, INVALID, amoreAgent="HLT")
    assert get(client, RUN)["missing"] == ["TPC"]


def test_agents_beyond_200_are_summed(client: Client, folder: Path) -> None:
    note(folder, *[line("10:00:00", agent=f"A{number}", filename=f"A{number}") for number in range(250)])
    note(folder, line("10:00:01", agent="A249", outcome="rejected"), line("10:00:01", agent="A0", outcome="rejected"))
    agents = get(client, RUN)["agents"]
    assert len(agents) == 201
    assert (agents["(other)"]["files"], agents["(other)"]["rejected"], agents["A0"]["rejected"]) == (50, 1, 1)


@pytest.mark.parametrize(
    ("path", "more", "own"),
    [
        (RUNS, "124", None),
        (f"{RUNS}?limit=5", "124", None),
        (RUN, "123", "124"),
        (ALL, "123", None),
        (f"{RUN}/receipts", "123", "124"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_has_not_changed_is_304(
    make_app: MakeApp,
    monkeypatch: pytest.MonkeyPatch,
    parsed: list[bytes],
    path: str,
    more: str,
    own: str | None,
    method: str,
) -> None:
    monkeypatch.setattr(receipt_module, "_LISTING_AGE", 0.0)
    client = Client(make_app())
    send(client)
    first = client.open(path, method=method, headers=AUTH)
    known = {**AUTH, "If-None-Match": first.headers["ETag"]}
    parsed.clear()
    for one in (client, Client(make_app())):  # another worker, or this one started again
        for condition in (known["If-None-Match"], f'"other", {known["If-None-Match"]}', "*"):
            again = one.open(path, method=method, headers={**AUTH, "If-None-Match": condition})
            assert (again.status_code, again.data, again.headers["ETag"]) == (304, b"", first.headers["ETag"])
    assert parsed == []
    if own:  # what arrives for another run changes nothing
        send(client, runNumber=own)
        assert client.open(path, method=method, headers=known).status_code == 304
    send(client, runNumber=more)
    changed = client.open(path, method=method, headers=known)
    assert (changed.status_code, changed.headers["ETag"] != first.headers["ETag"]) == (200, True)
    assert client.open(path, method=method, headers={**AUTH, "If-None-Match": '"other"'}).status_code == 200
    assert client.open(path, method=method, headers={**AUTH, "If-Match": '"other"'}).status_code == 412
    assert client.open(path, method=method, headers={**AUTH, "If-Match": "*"}).status_code == 200


def test_only_new_receipts_are_read(client: Client, folder: Path, parsed: list[bytes]) -> None:
    lines = [line(f"10:{n // 60 % 60:02}:{n % 60:02}", agent=f"A{n % 10}", filename=str(n)) for n in range(5_000)]
    note(folder, *lines)
    assert sum(one["files"] for one in get(client, RUN)["agents"].values()) == len(parsed) == 5_000
    parsed.clear()
    get(client, RUN)
    assert parsed == []
    new = [line("12:00:00", agent="A3", filename="new", size=1000), line("12:00:01", agent="new", outcome="rejected")]
    note(folder, *new)
    agents = get(client, RUN)["agents"]
    assert [f"{one.decode()}\n" for one in parsed] == new
    assert (agents["A3"]["files"], agents["A4"]["files"], agents["new"]["rejected"]) == (501, 500, 1)


def test_summary_opens_one_log_at_a_time(log: ReceiptLog, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        log.append([receipt(outcome="duplicate" if number else "stored")])
        log._logs.clear()
    opened = len(os.listdir("/proc/self/fd"))
    most = 0
    from_line = Receipt.from_line

    def count(line: bytes) -> Any:
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")) - opened)
        return from_line(line)

    monkeypatch.setattr(Receipt, "from_line", count)
    assert Summaries(log).agents(123)["EMC"]["duplicates"] == 4
    assert most <= 2  # the run's folder and a log


def test_damaged_digest_spoils_no_summary(log: ReceiptLog, folder: Path) -> None:
    log.append([receipt(sha256="\ud800 not hexadecimal")])
    assert Summaries(log).agents(123)["EMC"]["files"] == 1


@pytest.mark.parametrize("how", ["cut", "replaced", "removed"])
def test_logs_that_an_admin_changes_are_read_anew(client: Client, folder: Path, how: str) -> None:
    old = [line(f"10:00:0{number}", agent="old", filename=str(number)) for number in range(4)]
    path = note(folder, *old)
    note(folder, line("10:00:09", agent="other", filename="x"), writer="other")
    tag = client.get(RUN, headers=AUTH).headers["ETag"]
    get(client, RUN)
    if how == "cut":
        os.truncate(path, len(old[0]))
    else:
        path.unlink()
        if how == "replaced":
            note(folder, line("10:00:05", agent="new"), writer="another")
    answer = client.get(RUN, headers={**AUTH, "If-None-Match": tag})
    expected = {"cut": {"old": 1}, "replaced": {"new": 1}, "removed": {}}[how] | {"other": 1}
    assert answer.status_code == 200
    assert {agent: one["files"] for agent, one in (answer.json or {})["agents"].items()} == expected


def test_remembered_names_and_runs_are_bounded(log: ReceiptLog, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_MAX_NAMES", 20), ("_MAX_ALL_NAMES", 50), ("_MAX_RUNS", 10)):
        monkeypatch.setattr(summaries, name, value)
    known = Summaries(log)
    for run in range(10):
        note(folder, *[line("10:00:00", filename=f"{number}", run=run) for number in range(30)], run=run)
        assert known.agents(run)["EMC"]["files"] == 30
        assert sum(len(summary.names) for summary in known._runs.values()) <= 50
    for run in range(100, 130):
        note(folder, line("10:00:00", run=run, outcome="rejected"), run=run)
        known.agents(run)
    assert len(known._runs) <= 10
    assert known.has_accepted(0, "5")
    assert not known.has_accepted(0, "29")  # beyond the names that are remembered
    with pytest.raises(RunNotFound):
        known.has_accepted(99, "5")


def test_many_runs_cost_a_request_for_one_nothing(client: Client, folder: Path, parsed: list[bytes]) -> None:
    for run in range(300):
        note(folder, line("10:00:00", run=run), run=run)
    parsed.clear()
    assert get(client, f"{RUNS}/5")["run"] == 5
    assert len(parsed) == 1
    parsed.clear()
    assert (client.get("/metrics").status_code, client.get(RUNS, headers=AUTH).status_code) == (200, 200)
    send(client, runNumber="5")
    assert parsed == []


def test_reader_of_receipts_needs_a_token(client: Client) -> None:
    send(client)
    for path in (RUNS, RUN, ALL, f"{RUN}/receipts"):
        for its in ({}, {"token": "wrong"}, {**HEADERS, "token": "wrong"}):
            answer = client.get(path, headers=its)
            assert (answer.status_code, "123" in answer.text) == (400, False)
