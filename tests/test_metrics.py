"""Metrics for Prometheus, and health as an answer."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client import (
    AUTH,
    FILES,
    GRAPHS,
    HEADERS,
    PROFILES,
    TOKEN,
    receipts,
    send,
    send_chunked,
    send_form,
    settings,
    tree,
    wait_until,
)
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.test import Client

import durable
import receiver
import receiver_metrics
from receiver_metrics import REASON_CLASSES

MakeApp = Callable[..., receiver.Receiver]
HEALTH = "/rest/api/health"
INVALID = PROFILES[:-20]


def metrics(client: Client, folder: Path) -> dict[tuple[str, ...], float]:
    """Return the samples of a receiver by name and labels but the folder."""
    response = client.get("/metrics")
    assert response.status_code == 200, response.text
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if labels.pop("folder", None) == str(folder):
                found[sample.name.removeprefix("dqm_receiver_"), *labels.values()] = sample.value
    return found


def of(client: Client, folder: Path, name: str) -> dict[Any, float]:
    """Return the samples of one metric, by their only label or their labels."""
    found = {key[1:]: value for key, value in metrics(client, folder).items() if key[0] == name}
    return {key[0] if len(key) == 1 else key: value for key, value in found.items()}


# --- metrics -----------------------------------------------------------------------------------------------------------

FAMILIES = {
    "uploads": ("counter", ["folder", "agent", "outcome"]),
    "accepted_bytes": ("counter", ["folder", "agent"]),
    "rejections": ("counter", ["folder", "reason"]),
    "checks": ("counter", ["folder", "result"]),
    "upload_seconds": ("histogram", ["folder", "le"]),
    "validation_seconds": ("histogram", ["folder", "le"]),
    "last_accepted_timestamp_seconds": ("gauge", ["folder", "agent"]),
    "uploads_in_progress": ("gauge", ["folder"]),
    "free_bytes": ("gauge", ["folder"]),
}


@pytest.fixture
def busy(client: Client) -> Client:
    """A receiver to which seven files have come."""
    for body in (PROFILES, PROFILES, GRAPHS, INVALID):
        send(client, body, amoreAgent="A_B")
    send(client, amoreAgent="HLT")
    send(client, b"", amoreAgent="TPC")
    send(client, path="/rest/api/check")
    return client


def test_metrics_have_these_families_and_labels(busy: Client, folder: Path) -> None:
    answer = busy.get("/metrics")
    assert answer.content_type.startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    ours = {name: families[f"dqm_receiver_{name}"] for name in FAMILIES}
    assert {name for name in families if not name.endswith("_created")} == {f"dqm_receiver_{name}" for name in FAMILIES}
    for name, (kind, labels) in FAMILIES.items():
        samples = [one for one in ours[name].samples if kind != "histogram" or one.name.endswith("_bucket")]
        samples = [one for one in samples if not one.name.endswith("_created")]
        assert samples
        assert {tuple(sorted(one.labels)) for one in samples} == {tuple(sorted(labels))}
        assert (ours[name].type, bool(ours[name].documentation)) == (kind, True)


def test_metrics_count_what_happened(busy: Client, folder: Path) -> None:
    expected = {("A_B", outcome): 1.0 for outcome in ("stored", "duplicate", "replaced", "rejected")}
    assert of(busy, folder, "uploads_total") == expected | {("HLT", "stored"): 1, ("TPC", "rejected"): 1}
    accepted = {"A_B": len(PROFILES) + len(GRAPHS), "HLT": len(PROFILES)}
    assert of(busy, folder, "accepted_bytes_total") == accepted
    rejections = {**dict.fromkeys(REASON_CLASSES, 0), "invalid_root_file": 1, "empty": 1}
    assert of(busy, folder, "rejections_total") == rejections
    last = of(busy, folder, "last_accepted_timestamp_seconds")
    assert set(last) == {"A_B", "HLT"}
    assert all(0 <= time.time() - value < 60 for value in last.values())
    values = metrics(busy, folder)
    assert values["checks_total", "valid"] == 1
    disk = os.statvfs(folder)
    assert values[("free_bytes",)] == pytest.approx(disk.f_bavail * disk.f_frsize, rel=0.2)
    assert values[("uploads_in_progress",)] == 0


@pytest.mark.parametrize(("family", "number"), [("upload_seconds", 4), ("validation_seconds", 6)])
def test_histograms_are_cumulative_and_add_up(busy: Client, folder: Path, family: str, number: int) -> None:
    values = metrics(busy, folder)
    buckets = [(float(key[1]), value) for key, value in values.items() if key[0] == f"{family}_bucket"]
    assert buckets == sorted(buckets)
    assert buckets[-1] == (float("inf"), number)
    assert values[(f"{family}_count",)] == number
    assert 0 < values[(f"{family}_sum",)] < 60


REFUSALS: dict[str, Callable[[Client], Any]] = {
    "token": lambda client: send(client, token="wrong"),
    "headers": lambda client: send(client, runNumber="x"),
    "agent": lambda client: send(client, amoreAgent="emc"),
    "query": lambda client: client.get(f"{FILES}?x=1", headers=AUTH),
    "not_found": lambda client: client.get(f"{FILES}/x", headers=AUTH),
    "method": lambda client: client.put(FILES, headers=AUTH),
    "encoding": lambda client: client.post(FILES, headers={**HEADERS, "Content-Encoding": "gzip"}),
    "length_required": lambda client: client.post(FILES, headers={**HEADERS, "Transfer-Encoding": "chunked"}),
    "empty": lambda client: send(client, b""),
    "malformed_form": lambda client: send_form(client, b"\r\nx"),
    "truncated": lambda client: client.post(FILES, input_stream=io.BytesIO(b"x"), headers=HEADERS, environ_overrides={"CONTENT_LENGTH": "9"}),
    "too_large": lambda client: send(client, bytes(200_000)),
    "sha256": lambda client: send(client, sha256="0" * 64),
    "invalid_root_file": lambda client: send_chunked(client, INVALID),
    "request": lambda client: client.get("/", headers=AUTH),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSALS)
def test_every_refusal_is_counted_by_its_reason(make_app: MakeApp, folder: Path, reason: str) -> None:
    client = Client(make_app(max_file_size="100000", agents="testagent"))
    REFUSALS[reason](client)
    rejections = of(client, folder, "rejections_total")
    assert {key: value for key, value in rejections.items() if value} == {reason: 1}


@pytest.mark.parametrize(
    ("where", "error", "reason"),
    [
        ("storage.Storage.new_upload", durable.InsufficientStorage, "no_room"),
        ("storage.Storage.commit", durable.StorageUnavailable, "unavailable"),
        ("rootcheck.check_root_file", RuntimeError, "fault"),
    ],
)
def test_faults_of_ours_are_counted_too(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: type[Exception], reason: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("no")

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        assert send(client).status_code in (500, 503, 507)
    assert metrics(client, folder)["rejections_total", reason] == 1


def test_refused_checks_are_no_rejections(client: Client, folder: Path) -> None:
    send(client, INVALID, path="/rest/api/check")
    assert of(client, folder, "checks_total") == {"refused": 1}
    assert sum(of(client, folder, "rejections_total").values()) == 0


def test_upload_is_in_progress_while_its_body_comes(client: Client, folder: Path) -> None:
    seen = []

    class Body(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            seen.append(metrics(client, folder)[("uploads_in_progress",)])
            return super().read(size)

    assert send_chunked(client, Body(PROFILES)).status_code == 200
    assert set(seen) == {1.0}
    assert metrics(client, folder)[("uploads_in_progress",)] == 0


def test_receivers_of_one_process_are_told_apart(tmp_path: Path) -> None:
    clients = {name: Client(receiver.create_app(settings(tmp_path / name))) for name in ("one", "two")}
    send(clients["one"])
    for client in clients.values():
        assert metrics(client, tmp_path / "one")["uploads_total", "testagent", "stored"] == 1
        assert ("uploads_total", "testagent", "stored") not in metrics(client, tmp_path / "two")


def test_agents_beyond_the_limit_are_other(client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert receiver_metrics._MAX_AGENTS == 200
    monkeypatch.setattr(receiver_metrics, "_MAX_AGENTS", 2)
    for agent in ("A", "B", "C", "D", "A"):
        send(client, amoreAgent=agent)
    expected = {("A", "stored"): 1, ("A", "duplicate"): 1, ("B", "stored"): 1, ("other", "stored"): 2}
    assert of(client, folder, "uploads_total") == expected


def test_metrics_need_no_token_and_hold_none(busy: Client) -> None:
    assert TOKEN not in busy.get("/metrics").text.replace("pytest", "")
    assert busy.head("/metrics").status_code == 200


def test_metrics_switched_off_are_404(make_app: MakeApp) -> None:
    client = Client(make_app(metrics="off"))
    assert send(client).status_code == 200
    for its in ({}, AUTH):
        answer = client.get("/metrics", headers=its)
        assert (answer.status_code, answer.content_type) == (404, "application/json")


def test_metrics_never_read_receipts(busy: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = metrics(busy, folder)
    shutil.rmtree(folder / ".receipts")
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("a receipt was read"))
    after = metrics(busy, folder)
    assert {**after, ("free_bytes",): 0} == {**before, ("free_bytes",): 0}


def test_prometheus_finds_no_fault_with_the_metrics(busy: Client) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    command = ["promtool", "check", "metrics"]
    assert subprocess.run(
        command, input=b"# TYPE x_total gauge\nx_total 1\n", capture_output=True, check=False
    ).returncode
    run = subprocess.run(command, input=busy.get("/metrics").data, capture_output=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


# --- health ------------------------------------------------------------------------------------------------------------


def test_health_needs_no_token_and_leaves_nothing(client: Client, folder: Path) -> None:
    send(client)
    client.get(HEALTH)
    before = tree(folder)
    for _ in range(20):
        answer = client.get(HEALTH)
        assert (answer.status_code, answer.content_type) == (200, "application/json")
        assert (answer.json or {})["status"] == 200
    assert client.head(HEALTH).status_code == 200
    assert client.get(f"{HEALTH}?probe=kubernetes").status_code == 200
    assert tree(folder) == before
    assert len(receipts(folder)) == 1


@pytest.mark.parametrize(("room", "status"), [("0", 200), (str(10**17), 503)])
def test_health_says_what_is_wrong(make_app: MakeApp, folder: Path, room: str, status: int) -> None:
    answer = Client(make_app(min_free_space=room)).get(HEALTH)
    content = answer.json or {}
    assert (answer.status_code, content["status"]) == (status, status)
    assert ("no room" in content["message"]) == (status == 503)
    assert str(folder) not in answer.text


def test_health_knows_a_folder_that_is_gone(client: Client, folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    wait_until(lambda: client.get(HEALTH).status_code == 503, 10)  # within a second
    assert (client.get(HEALTH).json or {})["received"] is None
    assert not folder.exists()
    folder.with_name("elsewhere").rename(folder)
    wait_until(lambda: client.get(HEALTH).status_code == 200, 10)
