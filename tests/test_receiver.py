"""The HTTP contract, against the WSGI callable."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import flask
import pytest
from conftest import (
    DATA,
    FILES,
    GRAPHS,
    HEADERS,
    HISTOGRAMS,
    NAME,
    PROFILES,
    PROJECT,
    TOKEN,
    receipts,
    settings,
    visible,
)
from werkzeug.datastructures import Headers
from werkzeug.http import http_date
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client, TestResponse

import receiver
import rootcheck
import storage

MakeApp = Callable[..., receiver.Receiver]
URL = f"{FILES}/{NAME}"
AUTH = {"token": TOKEN}
NOT_VALID = "Successfully received the file, but the file is not valid! Perhaps it was corrupted?"
NO_FILE = "No file uploaded and the payload was empty"


def headers(**changes: str | None) -> dict[str, str]:
    """Return the usual headers with changes; None leaves one out."""
    changed: dict[str, str | None] = {**HEADERS, **changes}
    return {name: value for name, value in changed.items() if value is not None}


def part(content: bytes, name: str = "file", filename: str | None = "histograms.root", more: str = "") -> bytes:
    """Return a part of a multipart form."""
    given = f'; filename="{filename}"' if filename is not None else ""
    return f'Content-Disposition: form-data; name="{name}"{given}\r\n{more}\r\n'.encode() + content


def multipart(*parts: bytes, end: bytes = b"--\r\n") -> bytes:
    return b"".join(b"--limit\r\n" + one + b"\r\n" for one in parts) + b"--limit" + end


FORM = "multipart/form-data; boundary=limit"


def send(client: Client, *parts: bytes, **changes: str | None) -> TestResponse:
    return client.post(FILES, data=multipart(*parts), content_type=FORM, headers=headers(**changes))


def send_bare(client: Client, content: bytes, **changes: str | None) -> TestResponse:
    return client.post(FILES, data=content, headers=headers(**changes))


def send_chunked(client: Client, body: Any, content_type: str = "", **changes: str | None) -> TestResponse:
    """Send a body whose length nobody has told, as a server hands on a chunked one."""
    return client.post(
        FILES,
        input_stream=io.BytesIO(body) if isinstance(body, bytes) else body,
        content_type=content_type,
        headers={**headers(**changes), "Transfer-Encoding": "chunked"},
        environ_overrides={"wsgi.input_terminated": True},
    )


def incoming(folder: Path) -> list[Path]:
    return list((folder / ".incoming").iterdir())


def check_refused(response: TestResponse, folder: Path, status: int, message: str) -> dict[str, Any]:
    """Check what every refusal has in common and return its JSON."""
    answer: dict[str, Any] = json.loads(response.data)
    assert response.status_code == status
    assert response.content_type == "application/json"
    assert response.content_length == len(response.data)
    assert list(answer) == ["status", "message", "received", *(["reason"] if "reason" in answer else [])]
    assert (answer["status"], answer["received"]) == (status, None)
    assert message in answer["message"]
    assert visible(folder) == {}
    assert incoming(folder) == []
    return answer


# --- receiving a file --------------------------------------------------------------------------------------------------

SENDERS: dict[str, Callable[..., TestResponse]] = {
    "form": lambda client, content, **changes: send(client, part(content), **changes),
    "bare": send_bare,
    "bare, called a form by curl": lambda client, content, **changes: client.post(
        FILES, data=content, content_type="application/x-www-form-urlencoded", headers=headers(**changes)
    ),
    "bare, chunked": send_chunked,
    "form, chunked": lambda client, content, **changes: send_chunked(client, multipart(part(content)), FORM, **changes),
    "form with fields": lambda client, content, **changes: send(
        client, part(b"field", "comment", None), part(content), part(b"", "more", None), **changes
    ),
    "form with other files": lambda client, content, **changes: send(
        client, part(b"not read", "log"), part(content), part(b"", "more"), **changes
    ),
}


@pytest.mark.parametrize("sender", ["form", "form, chunked"])
@pytest.mark.parametrize("epilogue", range(250, 256))
def test_a_form_may_be_read_in_any_pieces(
    sender: str, epilogue: int, make_app: MakeApp, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in its last line, or behind it, a piece ends."""
    client = Client(make_app())
    body = multipart(part(PROFILES), end=b"--\r\n" + bytes(epilogue))
    for size in range(len(body) - epilogue - 16, len(body) - epilogue + 1):
        monkeypatch.setattr(receiver, "_FORM_CHUNK", size)
        if sender == "form":
            response = client.post(FILES, data=body, content_type=FORM, headers=headers())
        else:
            response = send_chunked(client, body, FORM)
        assert (response.status_code, visible(folder)) == (200, {NAME: PROFILES}), size


@pytest.mark.parametrize("sender", SENDERS)
def test_a_file_is_stored_and_answered_with_its_objects(client: Client, folder: Path, sender: str) -> None:
    response = SENDERS[sender](client, PROFILES)
    assert (response.status_code, response.content_type) == (200, "application/json")
    assert json.loads(response.data) == {
        "status": 200,
        "filename": NAME,
        "message": "Successfully received file and extracted information",
        "received": {
            name: found.description for name, found in rootcheck.check_root_file(DATA / "profiles.root").items()
        },
        "size": len(PROFILES),
        "sha256": hashlib.sha256(PROFILES).hexdigest(),
    }
    assert visible(folder) == {NAME: PROFILES}
    assert incoming(folder) == []


def test_the_answer_tells_names_and_classes_as_root_does(client: Client) -> None:
    received = json.loads(send_bare(client, HISTOGRAMS).data)["received"]
    assert received["hTH1C"] == "Obj name: hTH1C, Obj IsA() Name: TH1C"
    assert all(re.fullmatch(r"Obj name: .*, Obj IsA\(\) Name: TH1[CSILFD]", text) for text in received.values())


def test_a_file_that_comes_again_is_a_duplicate(client: Client, folder: Path) -> None:
    first, second = json.loads(send_bare(client, PROFILES).data), json.loads(send_bare(client, PROFILES).data)
    assert second == {**first, "duplicate": True}
    assert visible(folder) == {NAME: PROFILES}
    assert visible(folder / ".replaced") == {}


def test_a_file_that_takes_the_name_of_another_says_so_and_the_other_stays(client: Client, folder: Path) -> None:
    send_bare(client, PROFILES)
    answer = json.loads(send_bare(client, GRAPHS).data)
    assert (answer["replaced"], answer["sha256"]) == (True, hashlib.sha256(GRAPHS).hexdigest())
    assert "duplicate" not in answer
    assert visible(folder) == {NAME: GRAPHS}
    assert list(visible(folder / ".replaced").values()) == [PROFILES]


def test_an_invalid_upload_never_touches_a_valid_file(client: Client, folder: Path) -> None:
    send_bare(client, PROFILES)
    assert send_bare(client, PROFILES[:-100]).status_code == 400
    assert visible(folder) == {NAME: PROFILES}
    assert visible(folder / ".replaced") == {}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"runNumber": "0"}, "testagenthistos_0_DQM_1970_01_01_01_03_54.root"),
        ({"runNumber": "2147483647"}, "testagenthistos_2147483647_DQM_1970_01_01_01_03_54.root"),
        ({"runNumber": "000123"}, NAME),
        ({"timeStamp": "0"}, "testagenthistos_123_DQM_1970_01_01_01_00_00.root"),
        ({"timeStamp": "253402297199"}, "testagenthistos_123_DQM_9999_12_31_23_59_59.root"),
        ({"amoreAgent": "a"}, "ahistos_123_DQM_1970_01_01_01_03_54.root"),
        ({"amoreAgent": "E_M-C9"}, "E-M-C9histos_123_DQM_1970_01_01_01_03_54.root"),
        ({"amoreAgent": "x" * 64}, "x" * 64 + "histos_123_DQM_1970_01_01_01_03_54.root"),
        ({"dataStatus": None}, NAME),
        ({"dataStatus": "0"}, NAME),
        ({"dataStatus": "2"}, NAME),
        ({"sha256": hashlib.sha256(PROFILES).hexdigest()}, NAME),
        ({"sha256": hashlib.sha256(PROFILES).hexdigest().upper()}, NAME),
    ],
    ids=lambda value: str(value)[:50],
)
def test_headers_that_are_right(client: Client, folder: Path, changes: dict[str, str | None], name: str) -> None:
    response = send_bare(client, PROFILES, **changes)
    assert (response.status_code, json.loads(response.data)["filename"]) == (200, name)
    assert visible(folder) == {name: PROFILES}


def test_header_names_may_have_any_case(client: Client, folder: Path) -> None:
    response = client.post(FILES, data=PROFILES, headers={name.upper(): value for name, value in HEADERS.items()})
    assert response.status_code == 200
    assert visible(folder) == {NAME: PROFILES}


@pytest.mark.parametrize(
    "filename",
    [
        "../../outside.root",
        "/etc/passwd",
        "other.root",
        ".hidden.root",
        "x" * 5000,
        "",
        "Ä\u2028.root",
        "a\\b.root",
        "combined_x",
    ],
    ids=lambda text: text[:20],
)
def test_the_senders_file_name_is_never_used(client: Client, folder: Path, tmp_path: Path, filename: str) -> None:
    assert send(client, part(PROFILES, filename=filename)).status_code == 200
    assert visible(folder) == {NAME: PROFILES}
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


def test_the_receipt_tells_what_came(client: Client, folder: Path) -> None:
    send_bare(client, PROFILES)
    (receipt,) = receipts(folder)
    expected = {
        "outcome": "stored",
        "filename": NAME,
        "run": 123,
        "time_stamp": 234,
        "agent": "testagent",
        "data_status": 1,
        "sender": "default",
        "size": len(PROFILES),
        "sha256": hashlib.sha256(PROFILES).hexdigest(),
        "objects": len(rootcheck.check_root_file(DATA / "profiles.root")),
        "reason": None,
    }
    assert {name: receipt[name] for name in expected} == expected
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", receipt["received_at"])


def test_the_receipt_of_a_refused_upload_tells_why(client: Client, folder: Path) -> None:
    reason = json.loads(send_bare(client, PROFILES[:-100]).data)["reason"]
    send_bare(client, PROFILES, sha256="0" * 64)
    invalid, differing = receipts(folder)
    assert (invalid["outcome"], invalid["reason"], invalid["size"]) == ("rejected", reason, len(PROFILES) - 100)
    assert (differing["outcome"], "sha256" in differing["reason"]) == ("rejected", True)


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "Must pass a token!"),
        ("", "Must pass a token!"),
        ("abc", "Received token, but it is invalid!"),
        ("abcde", "Received token, but it is invalid!"),
        ("ABCD", "Received token, but it is invalid!"),
        ("abcd abcd", "Received token, but it is invalid!"),
        ("abcd,abcd", "Received token, but it is invalid!"),  # two headers, as a server hands them on
        ("x" * 5000, "Received token, but it is invalid!"),
        ("äbcd", "Received token, but it is invalid!"),
        ("abcd".encode("utf-16-le").decode("latin-1").replace("\0", "\x01"), "Received token, but it is invalid!"),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", FILES),
        ("GET", FILES),
        ("GET", URL),
        ("HEAD", URL),
        ("GET", "/"),
        ("GET", "/unknown"),
        ("DELETE", FILES),
    ],
)
def test_without_the_token_nothing_is_done(
    client: Client,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
    token: str | None,
    message: str,
) -> None:
    monkeypatch.setattr(storage.Storage, "new_upload", lambda self: pytest.fail("the body was used"))
    response = client.open(path, method=method, data=PROFILES, headers=headers(token=token))
    if method == "HEAD":
        assert (response.status_code, response.data) == (400, b"")
    else:
        assert check_refused(response, folder, 400, message)["message"] == message
    assert receipts(folder) == []


def test_two_token_headers_are_refused_though_both_are_right(client: Client, folder: Path) -> None:
    doubled = Headers([*HEADERS.items(), ("token", TOKEN)])
    response = client.post(FILES, data=PROFILES, headers=doubled)
    check_refused(response, folder, 400, "Received token, but it is invalid!")


@pytest.mark.parametrize("name", ["runNumber", "timeStamp", "amoreAgent", "dataStatus", "sha256"])
def test_a_header_that_comes_twice_is_refused_though_both_are_alike(client: Client, folder: Path, name: str) -> None:
    once = headers(sha256=hashlib.sha256(PROFILES).hexdigest())
    doubled = Headers([*once.items(), (name, once[name])])
    check_refused(client.post(FILES, data=PROFILES, headers=doubled), folder, 400, name)
    assert receipts(folder) == []


@pytest.mark.parametrize("name", ["runNumber", "timeStamp", "amoreAgent"])
def test_a_header_that_is_missing_is_named(client: Client, folder: Path, name: str) -> None:
    check_refused(send_bare(client, PROFILES, **{name: None}), folder, 400, f"header {name}")


NOT_NUMBERS = [
    "",
    " ",
    "x",
    "-1",
    "+1",
    "1.0",
    "1e2",
    "0x10",
    "1_0",
    "1 2",
    "1,1",
    "1;",
    " 1",
    "1 ",
    "\u0661\u0662",  # Arabic digits
    "\uff11",  # a full-width digit
    "\xb2",  # a superscript
    "nan",
    "inf",
    "None",
    "9" * 21,
    "9" * 5000,
    "0" * 25,
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("runNumber", value) for value in [*NOT_NUMBERS, "2147483648", "4294967296"]),
        *(("timeStamp", value) for value in [*NOT_NUMBERS, "253402297200", "253402300799", "1448384650000000"]),
        *(("dataStatus", value) for value in [*NOT_NUMBERS, "3", "9"]),
        *(
            ("amoreAgent", value)
            for value in ["", " ", "x" * 65, "a b", "a.b", "a/b", "../a", "a,a", "Ä", "a\x7f", "%41"]
        ),
        *(("sha256", value) for value in ["", "0" * 63, "0" * 65, "g" * 64, "0x" + "0" * 62, "0" * 32, " " + "0" * 64]),
        ("sha256", base64.b64encode(bytes(32)).decode()),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_header_that_is_wrong_is_named(client: Client, folder: Path, name: str, value: str) -> None:
    # A server hands a header's bytes on as latin-1.
    wrong = value.encode().decode("latin-1")
    response = client.post(FILES, data=PROFILES, headers=HEADERS, environ_overrides={f"HTTP_{name.upper()}": wrong})
    check_refused(response, folder, 400, f"header {name} ")
    assert receipts(folder) == []


@pytest.mark.parametrize("sender", SENDERS)
def test_a_wrong_sha256_is_refused_before_anything_is_visible(client: Client, folder: Path, sender: str) -> None:
    answer = check_refused(SENDERS[sender](client, PROFILES, sha256="ab" * 32), folder, 400, "sha256")
    assert hashlib.sha256(PROFILES).hexdigest() in answer["message"]  # of what arrived


FILE = part(PROFILES)

BODIES: dict[str, tuple[bytes, str, str]] = {
    "nothing": (b"", "", NO_FILE),
    "no part": (b"--limit--\r\n", FORM, NO_FILE),
    "an empty file": (multipart(part(b"")), FORM, NO_FILE),
    "another part only": (multipart(part(PROFILES, "File")), FORM, NO_FILE),
    "no bytes": (b"", FORM, NO_FILE),
    "a file name not of UTF-8": (multipart(FILE).replace(b'name="file"', b'name="file\xe9"'), FORM, "not UTF-8"),
    "a field only": (multipart(part(b"x", "comment", None)), FORM, NO_FILE),
    "file as a field": (multipart(part(PROFILES, "file", None)), FORM, "file"),
    "file as a field and as a file": (multipart(part(b"x", "file", None), FILE), FORM, "file"),
    "two files": (multipart(FILE, FILE), FORM, "more than one part named file"),
    "two files, one empty": (multipart(part(b""), FILE), FORM, "more than one part named file"),
    "17 parts": (multipart(*[part(b"x", "comment", None)] * 16, FILE), FORM, "more than 16 parts"),
    "a field of 2 MB": (multipart(part(bytes(2 << 20), "comment", None), FILE), FORM, "1048576 bytes"),
    "no boundary": (multipart(FILE), "multipart/form-data", "malformed"),
    "an empty boundary": (multipart(FILE), "multipart/form-data; boundary=", "malformed"),
    "a boundary that is encoded": (multipart(FILE), "multipart/form-data; boundary*=utf-8''%C3%A9", "malformed"),
    "another boundary": (multipart(FILE), "multipart/form-data; boundary=other", "malformed"),
    "a boundary not of ASCII": (multipart(FILE), "multipart/form-data; boundary=\xe9", "malformed"),
    "cut in the first line": (b"--lim", FORM, "malformed"),
    "cut in a part's head": (multipart(FILE)[:40], FORM, "malformed"),
    "cut in the file": (multipart(FILE)[:-500], FORM, "malformed"),
    "cut before the last line": (multipart(FILE, end=b""), FORM, "malformed"),
    "cut in the last line": (multipart(FILE, end=b"-"), FORM, "malformed"),
    "a part without a head": (multipart(b"\r\n" + PROFILES), FORM, "malformed"),
    "a part without a name": (multipart(b"Content-Disposition: form-data\r\n\r\nx"), FORM, NO_FILE),
    "lines that end with \\n": (multipart(FILE).replace(b"\r\n", b"\n")[:-20], FORM, "malformed"),
    "a bare file called a form": (PROFILES, FORM, "malformed"),
    "not a ROOT file": (b"hello", "", NOT_VALID),
    "one byte": (b"r", "", NOT_VALID),
    "not a ROOT file in a form": (multipart(part(b"hello")), FORM, NOT_VALID),
    "a truncated ROOT file": (PROFILES[:-1], "", NOT_VALID),
    "a truncated ROOT file in a form": (multipart(part(PROFILES[:-1])), FORM, NOT_VALID),
    "a form in a mixture": (multipart(FILE), "multipart/mixed; boundary=limit", NOT_VALID),
}


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_is_wrong_is_refused(client: Client, folder: Path, case: str, chunked: bool) -> None:
    body, content_type, message = BODIES[case]
    if chunked:
        response = send_chunked(client, body, content_type)
    else:
        response = client.post(FILES, data=body, content_type=content_type, headers=HEADERS)
    answer = check_refused(response, folder, 400, message)
    assert ("reason" in answer) == (message == NOT_VALID)
    assert [receipt["outcome"] for receipt in receipts(folder)] == ["rejected"]
    kept = list(visible(folder / ".rejected").values())
    assert len(kept) == (message == NOT_VALID)


def test_a_form_of_no_bytes_holds_no_file(client: Client, folder: Path) -> None:
    check_refused(client.post(FILES, content_type=FORM, headers=HEADERS), folder, 400, NO_FILE)


def test_the_reason_says_what_is_wrong_with_the_file(client: Client, folder: Path) -> None:
    with pytest.raises(rootcheck.InvalidRootFile) as error:
        rootcheck.check_root_file(DATA / "truncated.root")
    response = send_bare(client, (DATA / "truncated.root").read_bytes())
    answer = check_refused(response, folder, 400, NOT_VALID)
    assert (answer["message"], answer["reason"]) == (NOT_VALID, str(error.value))
    assert list(visible(folder / ".rejected").values()) == [(DATA / "truncated.root").read_bytes()]


def test_invalid_uploads_are_kept_within_their_bound(make_app: MakeApp, folder: Path) -> None:
    client = Client(make_app(max_rejected="1000"))
    for number in range(8):
        check_refused(send_bare(client, bytes([number]) * 300), folder, 400, NOT_VALID)
    check_refused(send_bare(client, bytes(1001)), folder, 400, NOT_VALID)
    assert sorted(visible(folder / ".rejected").values()) == [bytes([number]) * 300 for number in (5, 6, 7)]


class Broken(io.BytesIO):
    """A connection that fails after what it has."""

    def read(self, size: int | None = -1) -> bytes:
        piece = super().read(size)
        if not piece:
            raise OSError("connection reset by peer")
        return piece


@pytest.mark.parametrize("terminated", [True, False], ids=["server that terminates", "other server"])
@pytest.mark.parametrize("stream", [io.BytesIO, Broken])
@pytest.mark.parametrize("form", [True, False], ids=["form", "bare"])
def test_a_body_shorter_than_announced_is_refused(
    client: Client, folder: Path, form: bool, stream: Callable[[bytes], io.BytesIO], terminated: bool
) -> None:
    # Valid as far as it came, as bytes may follow the end of a ROOT file.
    body = multipart(FILE) if form else PROFILES
    overrides: dict[str, Any] = {"CONTENT_LENGTH": str(len(body) + 100)}
    if terminated:
        overrides["wsgi.input_terminated"] = True
    response = client.post(
        FILES,
        input_stream=stream(body),
        content_type=FORM if form else "",
        headers=HEADERS,
        environ_overrides=overrides,
    )
    check_refused(response, folder, 400, "The body ended")
    assert visible(folder / ".rejected") == {}


# --- limits ------------------------------------------------------------------------------------------------------------


class Body:
    """A body that tells a client nothing of its length."""

    def tell(self) -> int:
        return 0

    def seek(self, position: int, whence: int = 0) -> int:
        return 0

    def close(self) -> None:
        pass


class Endless(Body):
    """A body that never ends, and counts what is read of it."""

    def __init__(self, begin: bytes = b"") -> None:
        self.begin = begin
        self.count = 0

    def read(self, size: int | None = -1) -> bytes:
        size = 1 << 16 if size is None or size < 0 else size
        piece, self.begin = self.begin[:size], self.begin[size:]
        piece += bytes(size - len(piece))
        self.count += len(piece)
        return piece


def test_a_file_of_exactly_the_limit_is_taken(make_app: MakeApp, folder: Path) -> None:
    client = Client(make_app(max_file_size=str(len(PROFILES))))
    for name, sender in SENDERS.items():
        if name != "form with other files":
            assert sender(client, PROFILES).status_code == 200
    assert visible(folder) == {NAME: PROFILES}


@pytest.mark.parametrize("sender", SENDERS)
def test_a_file_one_byte_beyond_the_limit_is_refused(make_app: MakeApp, folder: Path, sender: str) -> None:
    client = Client(make_app(max_file_size=str(len(PROFILES) - 1)))
    check_refused(SENDERS[sender](client, PROFILES), folder, 413, f"limit of {len(PROFILES) - 1} bytes")
    assert visible(folder / ".rejected") == {}
    assert [receipt["outcome"] for receipt in receipts(folder)] == ["rejected"]


@pytest.mark.parametrize("content_type", ["", FORM], ids=["bare", "form"])
def test_a_file_too_large_by_its_content_length_is_refused_without_being_written(
    make_app: MakeApp, folder: Path, monkeypatch: pytest.MonkeyPatch, content_type: str
) -> None:
    client = Client(make_app(max_file_size="1000"))
    monkeypatch.setattr(storage.Storage, "new_upload", lambda self: pytest.fail("the body was used"))
    response = client.post(FILES, data=bytes(2 << 20), content_type=content_type, headers=HEADERS)
    check_refused(response, folder, 413, "limit of 1000 bytes")


@pytest.mark.parametrize(
    ("begin", "content_type"),
    [
        (b"", ""),
        (b"--limit\r\n" + part(b""), FORM),
        (b"--limit\r\n" + part(b"", "other"), FORM),
        (multipart(part(bytes(900), "other")) + b"\r\n" + part(b""), FORM),
    ],
    ids=["bare", "file in a form", "other part", "after the form"],
)
def test_a_body_without_end_is_refused_and_read_no_further_than_the_limit(
    make_app: MakeApp, folder: Path, begin: bytes, content_type: str
) -> None:
    client = Client(make_app(max_file_size="1000"))
    body = Endless(begin)
    response = send_chunked(client, body, content_type)
    assert response.status_code in (400, 413)
    check_refused(response, folder, response.status_code, "limit of 1000" if response.status_code == 413 else "form")
    assert body.count < 100 << 20


def test_a_form_with_an_endless_field_is_refused_with_its_memory_bounded(client: Client, folder: Path) -> None:
    body = Endless(b"--limit\r\n" + part(b"", "comment", None))
    check_refused(send_chunked(client, body, FORM), folder, 400, "1048576 bytes of fields")


def test_the_files_of_a_form_may_not_be_larger_than_one_file_may_be(make_app: MakeApp, folder: Path) -> None:
    limit = 4 << 20
    client = Client(make_app(max_file_size=str(limit)))
    most: list[int] = []
    write = storage.Upload.write

    def watch(upload: storage.Upload, data: bytes) -> int:
        written = write(upload, data)
        most.append(sum(path.stat().st_size for path in incoming(folder)))
        return written

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.Upload, "write", watch)
        body = multipart(*(part(bytes(limit - 1000), f"other{number}") for number in range(4)), FILE)
        response = send_chunked(client, body, FORM)
    check_refused(response, folder, 413, f"limit of {limit} bytes")
    assert max(most) <= 2 * limit


def test_a_refused_body_is_read_to_its_end_within_the_limit(make_app: MakeApp, folder: Path) -> None:
    client = Client(make_app(max_file_size=str(80 << 20)))
    body = Endless()
    response = send_chunked(client, body, token="wrong")
    check_refused(response, folder, 400, "Received token, but it is invalid!")
    assert 80 << 20 <= body.count <= 81 << 20


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/unknown"), ("PUT", FILES), ("POST", "/"), ("DELETE", URL), ("POST", URL)]
)
def test_the_body_of_every_refused_request_is_read(client: Client, method: str, path: str) -> None:
    body = io.BytesIO(bytes(1 << 20))
    response = client.open(path, method=method, input_stream=body, headers=AUTH)
    assert response.status_code in (400, 404, 405)
    assert body.tell() == 1 << 20


def test_without_room_a_file_is_refused_before_any_of_it_is_written(
    make_app: MakeApp, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(make_app(min_free_space=str(10**17)))
    monkeypatch.setattr(storage.Upload, "write", lambda *_: pytest.fail("written"))
    for sender in SENDERS.values():
        check_refused(sender(client, PROFILES), folder, 507, f"{10**17} bytes")


def test_a_file_that_would_take_the_last_room_is_refused_by_its_content_length(
    make_app: MakeApp, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(make_app(min_free_space="1000000"))
    monkeypatch.setattr(storage.Storage, "free_space", lambda self: 1_000_000 + len(PROFILES) - 1)
    check_refused(send_bare(client, PROFILES), folder, 507, "1000000 bytes")
    monkeypatch.setattr(storage.Storage, "free_space", lambda self: 1_000_000 + len(PROFILES))
    assert send_bare(client, PROFILES).status_code == 200


# --- unknown, not allowed, our own fault -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/unknown",
        "/rest",
        "/rest/api",
        "/rest/api/files/" + NAME,
        "/rest/api/files/.receipts",
        "/rest/api/files/..",
        "/rest/api/files/../secret",
        "/rest/api/files/%2e%2e%2fsecret",
        "/rest/api/files/.receipts%2f123.jsonl",
        "/rest/api/files/a%00b",
        "/rest/api/files/%ff%fe",
        "/rest/api/files/" + "x" * 5000,
        "//rest/api/files",
        "/REST/api/files",
        f"{FILES}?filename={NAME}",
        f"{FILES}?filename=",
        f"{FILES}?filename=../secret",
        f"{FILES}?filename=%00",
        f"{FILES}?filename=.receipts/123.jsonl",
        "/\u00e9",
    ],
    ids=lambda path: repr(path)[:50],
)
def test_what_is_not_there_is_a_404(client: Client, folder: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_text("secret")
    check_refused(client.get(path, headers=AUTH), folder, 404, "")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [(FILES, {"GET", "HEAD", "POST"}), (URL, {"GET", "HEAD"}), (FILES + "/absent", {"GET", "HEAD"})],
)
@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND", "get"])
def test_a_wrong_method_is_told_the_right_ones(
    client: Client, folder: Path, method: str, path: str, allowed: set[str]
) -> None:
    overrides = {"REQUEST_METHOD": method}
    response = client.open(path, method="PUT", headers=AUTH, environ_overrides=overrides)
    if method == "get":  # werkzeug takes a method in any case
        assert response.status_code in (200, 404, 405)
        return
    check_refused(response, folder, 405, "method")
    assert set(response.headers["Allow"].split(", ")) == allowed


@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
def test_the_root_lets_a_sender_try_its_token(client: Client, folder: Path, method: str) -> None:
    answer = check_refused(client.open("/", method=method, headers=AUTH), folder, 400, "Not implemented")
    assert answer == {"status": 400, "message": "Not implemented", "received": None}


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, OSError, RecursionError, KeyError, UnicodeDecodeError])
def test_our_own_fault_is_logged_and_not_leaked(
    client: Client,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[Exception],
) -> None:
    def fail(path: object) -> Any:
        if error is UnicodeDecodeError:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "the secret of the house")
        raise error("the secret of the house")

    monkeypatch.setattr(rootcheck, "check_root_file", fail)
    response = send_bare(client, PROFILES)
    answer = check_refused(response, folder, 500, "log")
    assert list(answer) == ["status", "message", "received"]
    assert b"secret" not in response.data
    assert b"Traceback" not in response.data
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert "the secret of the house" in caplog.text
    assert "Traceback" in caplog.text
    assert TOKEN not in caplog.text.replace(str(folder), "")


def test_after_a_fault_of_ours_the_next_file_is_taken(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(rootcheck, "check_root_file", lambda path: 1 // 0)
        for _ in range(3 * len(os.sched_getaffinity(0))):  # more than may be validated at once
            assert send_bare(client, PROFILES).status_code == 500
    assert send_bare(client, PROFILES).status_code == 200
    assert visible(folder) == {NAME: PROFILES}


def test_a_folder_that_is_gone_is_told(client: Client, folder: Path) -> None:
    folder.rename(folder.with_name("away"))
    for response in (send_bare(client, PROFILES), client.get(FILES, headers=AUTH)):
        answer = json.loads(response.data)
        assert (response.status_code, answer["status"], answer["received"]) == (503, 503, None)
    assert not folder.exists()


def test_the_token_stands_in_no_log_answer_or_file(
    folder: Path, make_app: MakeApp, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, nearly = uuid.uuid4().hex, uuid.uuid4().hex
    caplog.set_level(logging.DEBUG)
    client = Client(make_app(token=token))
    answers: list[TestResponse] = []
    for its in (token, nearly):
        for content in (PROFILES, GRAPHS, GRAPHS, b"invalid", b""):
            answers.append(send_bare(client, content, token=its))
            answers.append(send(client, part(content), token=its))
        answers.append(send_bare(client, PROFILES, token=its, runNumber="x"))
        for method, path in (("GET", FILES), ("GET", URL), ("GET", "/"), ("GET", "/unknown"), ("PUT", FILES)):
            answers.append(client.open(path, method=method, headers={"token": its}, buffered=True))
    monkeypatch.setattr(rootcheck, "check_root_file", lambda path: 1 // 0)
    answers.append(send_bare(client, PROFILES, token=token))
    assert {answer.status_code for answer in answers} == {200, 400, 404, 405, 500}
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    names = [str(path) for path in folder.rglob("*")]
    assert len(written) > 3
    digest = hashlib.sha256(token.encode()).hexdigest()
    for secret in (token, nearly, digest):
        for answer in answers:
            assert secret.encode() not in answer.data
            assert secret not in str(answer.headers)
        assert not any(secret.encode() in content for content in written)
        assert not any(secret in name for name in names)
        assert secret not in caplog.text


def test_every_known_token_is_compared_in_constant_time(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    compare = receiver.hmac.compare_digest  # type: ignore[attr-defined]

    def watch(one: Any, other: Any) -> bool:
        compared.append((len(one), len(other)))
        return bool(compare(one, other))

    monkeypatch.setattr(receiver.hmac, "compare_digest", watch)  # type: ignore[attr-defined]
    for token in ("", "a", TOKEN, "x" * 1000):
        client.get("/", headers={"token": token})
    assert compared == [(32, 32)] * 3  # digests, so that not even the length shows


# --- the list ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def full(client: Client) -> Client:
    """A receiver with files of three agents and two runs."""
    for agent in ("EMC", "E_C", "TPC"):
        for run in ("1", "12"):
            assert send_bare(client, PROFILES, amoreAgent=agent, runNumber=run).status_code == 200
    return client


def name_of(agent: str, run: int) -> str:
    return f"{agent}histos_{run}_DQM_1970_01_01_01_03_54.root"


def test_the_list_is_empty_at_first(client: Client) -> None:
    response = client.get(FILES, headers=AUTH)
    assert (response.status_code, response.content_type) == (200, "application/json")
    assert json.loads(response.data) == {"files": []}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", [("E-C", 1), ("E-C", 12), ("EMC", 1), ("EMC", 12), ("TPC", 1), ("TPC", 12)]),
        ("?runNumber=1", [("E-C", 1), ("EMC", 1), ("TPC", 1)]),
        ("?runNumber=012", [("E-C", 12), ("EMC", 12), ("TPC", 12)]),
        ("?runNumber=2", []),
        ("?amoreAgent=EMC", [("EMC", 1), ("EMC", 12)]),
        ("?amoreAgent=E_C", [("E-C", 1), ("E-C", 12)]),
        ("?amoreAgent=E-C", [("E-C", 1), ("E-C", 12)]),
        ("?amoreAgent=EM", []),
        ("?amoreAgent=emc", []),
        ("?amoreAgent=TPC&runNumber=12", [("TPC", 12)]),
        ("?runNumber=3&amoreAgent=TPC", []),
        ("?unknown=1", [("E-C", 1), ("E-C", 12), ("EMC", 1), ("EMC", 12), ("TPC", 1), ("TPC", 12)]),
    ],
)
def test_the_list_can_be_narrowed(full: Client, query: str, expected: list[tuple[str, int]]) -> None:
    response = full.get(FILES + query, headers=AUTH)
    assert json.loads(response.data) == {"files": sorted(name_of(agent, run) for agent, run in expected)}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("runNumber=x", "runNumber"),
        ("runNumber=", "runNumber"),
        ("runNumber=-1", "runNumber"),
        ("runNumber=%d9%a1", "runNumber"),
        ("runNumber=2147483648", "runNumber"),
        ("amoreAgent=", "amoreAgent"),
        ("amoreAgent=a.b", "amoreAgent"),
        ("amoreAgent=" + "x" * 65, "amoreAgent"),
        ("runNumber=1&runNumber=1", "runNumber"),
        ("amoreAgent=a&amoreAgent=b", "amoreAgent"),
        ("filename=a&filename=a", "filename"),
    ],
)
def test_a_query_that_is_wrong_is_refused(client: Client, folder: Path, query: str, message: str) -> None:
    check_refused(client.get(f"{FILES}?{query}", headers=AUTH), folder, 400, message)


def test_the_list_shows_only_files_that_this_receiver_made(client: Client, folder: Path) -> None:
    send_bare(client, PROFILES)
    send_bare(client, b"invalid", runNumber="4")
    send_bare(client, GRAPHS)
    for name in ("EMChistos_123_C_2015_11_24_18_04_10.root", "combined.root", "notes.txt"):
        (folder / name).write_bytes(PROFILES)
    assert json.loads(client.get(FILES, headers=AUTH).data) == {"files": [NAME]}


# --- giving files back -------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(client: Client) -> Client:
    """A receiver with PROFILES under NAME."""
    assert send_bare(client, PROFILES).status_code == 200
    return client


def fetch(client: Client, method: str = "GET", url: str = URL, **more: str) -> TestResponse:
    return client.open(
        url,
        method=method,
        headers={**AUTH, **{name.replace("_", "-"): value for name, value in more.items()}},
        buffered=True,
    )


@pytest.mark.parametrize("url", [URL, f"{FILES}?filename={NAME}", f"{FILES}?runNumber=9&filename={NAME}"])
def test_a_file_comes_back_byte_for_byte(stored: Client, folder: Path, url: str) -> None:
    response = fetch(stored, url=url)
    assert (response.status_code, response.data) == (200, PROFILES)
    assert response.headers["Content-Type"] == "application/octet-stream"
    assert response.headers["Content-Length"] == str(len(PROFILES))
    assert response.headers["Accept-Ranges"] == "bytes"
    assert re.fullmatch(r'"[^"]+"', response.headers["ETag"])
    modified = parsedate_to_datetime(response.headers["Last-Modified"]).timestamp()
    assert modified == int((folder / NAME).stat().st_mtime)
    assert "Repr-Digest" not in response.headers


@pytest.mark.parametrize("url", [URL, f"{FILES}?filename={NAME}"])
def test_head_tells_the_same_without_the_file(stored: Client, url: str) -> None:
    whole, head = fetch(stored, url=url), fetch(stored, "HEAD", url)
    assert (head.status_code, head.data) == (200, b"")
    for name in ("Content-Type", "Content-Length", "ETag", "Last-Modified", "Accept-Ranges"):
        assert head.headers[name] == whole.headers[name]


def test_any_regular_visible_file_comes_back_but_no_link(client: Client, folder: Path, tmp_path: Path) -> None:
    (folder / "from zmq.root").write_bytes(GRAPHS)
    (tmp_path / "secret").write_bytes(GRAPHS)
    (folder / "link.root").symlink_to(tmp_path / "secret")
    (folder / "folder.root").mkdir()
    os.mkfifo(folder / "pipe.root")
    assert fetch(client, url=f"{FILES}/from%20zmq.root").data == GRAPHS
    assert fetch(client, url=f"{FILES}?filename=from+zmq.root").data == GRAPHS
    for name in ("link.root", "folder.root", "pipe.root"):
        response = fetch(client, url=f"{FILES}/{name}")
        assert (response.status_code, json.loads(response.data)["status"]) == (404, 404)


SIZE = len(PROFILES)


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-99", 0, 99),
        ("bytes=0-0", 0, 0),
        ("bytes=1000-1999", 1000, 1999),
        ("bytes=1000-", 1000, SIZE - 1),
        ("bytes=0-", 0, SIZE - 1),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE - 1),
        ("bytes=-100", SIZE - 100, SIZE - 1),
        (f"bytes=-{SIZE}", 0, SIZE - 1),
        (f"bytes=100-{SIZE + 1000}", 100, SIZE - 1),
    ],
)
def test_a_range_comes_back_alone(stored: Client, asked: str, first: int, last: int) -> None:
    response = fetch(stored, Range=asked)
    assert response.status_code == 206
    assert response.data == PROFILES[first : last + 1]
    assert response.headers["Content-Range"] == f"bytes {first}-{last}/{SIZE}"
    assert response.headers["Content-Length"] == str(last + 1 - first)
    assert response.headers["Content-Type"] == "application/octet-stream"
    assert response.headers["ETag"] == fetch(stored).headers["ETag"]


@pytest.mark.parametrize("more", [1, 1000, 1 << 70])
def test_a_suffix_longer_than_the_file_is_the_whole_file(stored: Client, more: int) -> None:
    response = fetch(stored, Range=f"bytes=-{SIZE + more}")
    assert response.status_code in (200, 206)
    assert response.data == PROFILES


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", f"bytes={SIZE + 1000}-{SIZE + 2000}"])
def test_a_range_beyond_the_end_is_a_416_in_json(stored: Client, asked: str) -> None:
    response = fetch(stored, Range=asked)
    answer = json.loads(response.data)
    assert (response.status_code, response.content_type) == (416, "application/json")
    assert (answer["status"], answer["received"]) == (416, None)
    assert response.headers["Content-Range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize(
    "asked",
    ["bytes=0-9,20-29", "bytes=0-9,5-", "bytes=-1,-2", "lines=1-2", "bytes=9-5", "bytes=x-", "bytes", "bytes=", "0-9"],
)
def test_a_range_of_several_pieces_or_another_kind_is_answered_with_the_whole_file(stored: Client, asked: str) -> None:
    response = fetch(stored, Range=asked)
    assert (response.status_code, response.data) == (200, PROFILES)
    assert "Content-Range" not in response.headers
    assert response.headers["Content-Length"] == str(SIZE)


def test_head_knows_no_ranges(stored: Client) -> None:
    response = fetch(stored, "HEAD", Range="bytes=0-9")
    assert (response.status_code, response.data, response.headers["Content-Length"]) == (200, b"", str(SIZE))


LONG_AGO, LATER = http_date(0), http_date(4102444800)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("conditions", "status"),
    [
        ({"If_None_Match": "ETAG"}, 304),
        ({"If_None_Match": "*"}, 304),
        ({"If_None_Match": "W/ETAG"}, 304),
        ({"If_None_Match": '"a", ETAG, "b"'}, 304),
        ({"If_None_Match": '"a"'}, 200),
        ({"If_Modified_Since": "MODIFIED"}, 304),
        ({"If_Modified_Since": LATER}, 304),
        ({"If_Modified_Since": LONG_AGO}, 200),
        ({"If_Modified_Since": "yesterday"}, 200),
        ({"If_None_Match": '"a"', "If_Modified_Since": LATER}, 200),  # RFC 9110: the date is not looked at
        ({"If_None_Match": "ETAG", "If_Modified_Since": LONG_AGO}, 304),
        ({"If_Match": "ETAG"}, 200),
        ({"If_Match": "*"}, 200),
        ({"If_Match": '"a", ETAG'}, 200),
        ({"If_Match": '"a"'}, 412),
        ({"If_Unmodified_Since": LONG_AGO}, 412),
        ({"If_Unmodified_Since": LATER}, 200),
        ({"If_Unmodified_Since": "MODIFIED"}, 200),
        ({"If_Match": "ETAG", "If_Unmodified_Since": LONG_AGO}, 200),
        ({"If_None_Match": "ETAG", "Range": "bytes=0-9"}, 304),
        ({"If_Match": '"a"', "Range": "bytes=0-9"}, 412),
        ({"If_Match": '"a"', "Range": f"bytes={SIZE}-"}, 412),
        ({"If_None_Match": "ETAG", "Range": f"bytes={SIZE}-"}, 304),
    ],
    ids=str,
)
def test_conditions_are_honoured(stored: Client, conditions: dict[str, str], status: int, method: str) -> None:
    whole = fetch(stored)
    asked = {
        name: value.replace("ETAG", whole.headers["ETAG"]).replace("MODIFIED", whole.headers["Last-Modified"])
        for name, value in conditions.items()
    }
    response = fetch(stored, method, **asked)
    assert response.status_code == status
    if status == 412:
        assert response.content_type == "application/json"
        if method == "GET":
            assert json.loads(response.data)["status"] == 412
            assert response.headers["Content-Length"] == str(len(response.data))
    else:
        assert response.headers["ETag"] == whole.headers["ETag"]
        assert response.data == (PROFILES if (status, method) == (200, "GET") else b"")


@pytest.mark.parametrize(
    ("conditions", "status"),
    [
        ({"If_Range": "ETAG"}, 206),
        ({"If_Range": '"a"'}, 200),
        ({"If_Range": "W/ETAG"}, 200),
        ({"If_Range": LONG_AGO}, 200),
        ({"If_Range": "MODIFIED"}, 200),  # another file may have had the name in the same second
        ({"If_Range": "Fri, 31 Dec 9999 23:59:59 GMT"}, 200),
        ({"If_None_Match": '"a"'}, 206),
        ({"If_Match": "ETAG"}, 206),
        ({"If_Modified_Since": LONG_AGO}, 206),
    ],
    ids=str,
)
def test_a_range_comes_with_conditions(stored: Client, conditions: dict[str, str], status: int) -> None:
    whole = fetch(stored).headers
    asked = {
        name: value.replace("ETAG", whole["ETag"]).replace("MODIFIED", whole["Last-Modified"])
        for name, value in conditions.items()
    }
    response = fetch(stored, Range="bytes=100-199", **asked)
    assert response.status_code == status
    assert response.data == (PROFILES[100:200] if status == 206 else PROFILES)


def test_another_file_under_the_name_has_another_etag(stored: Client) -> None:
    before = fetch(stored).headers["ETag"]
    assert send_bare(stored, PROFILES).status_code == 200
    assert fetch(stored).headers["ETag"] == before
    assert send_bare(stored, GRAPHS).status_code == 200
    response = fetch(stored, If_None_Match=before)
    assert (response.status_code, response.data) == (200, GRAPHS)
    assert response.headers["ETag"] != before


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ("sha-256=10", True),
        ("sha-256=1", True),
        ("sha-512=10, sha-256=1", True),
        ("sha-256=1,sha-512=0", True),
        ("sha-256=0", False),
        ("sha-512=10", False),
        ("sha-512=10, sha-256=0", False),
        ("", False),
    ],
)
@pytest.mark.parametrize(
    ("method", "more"), [("GET", {}), ("HEAD", {}), ("GET", {"Range": "bytes=100-199"})], ids=["GET", "HEAD", "Range"]
)
def test_the_digest_of_the_whole_file_is_given_where_it_is_wanted(
    stored: Client, method: str, more: Mapping[str, str], wanted: str, given: bool
) -> None:
    response = fetch(stored, method, Want_Repr_Digest=wanted, **more)
    digest = base64.b64encode(hashlib.sha256(PROFILES).digest()).decode()
    assert response.headers.get("Repr-Digest") == (f"sha-256=:{digest}:" if given else None)
    assert response.status_code == (206 if more else 200)
    assert response.data == (b"" if method == "HEAD" else PROFILES[100:200] if more else PROFILES)


def test_a_large_file_comes_back_in_pieces(make_app: MakeApp, folder: Path) -> None:
    content = os.urandom(3 << 20)
    app = make_app()
    (folder / "large.root").write_bytes(content)
    client = Client(app)
    response = client.get(f"{FILES}/large.root", headers=AUTH, buffered=False)
    pieces = list(response.iter_encoded())
    response.close()
    assert b"".join(pieces) == content
    assert max(len(piece) for piece in pieces) <= 1 << 20
    response = client.get(f"{FILES}/large.root", headers={**AUTH, "Range": "bytes=1000-2000000"}, buffered=True)
    assert response.data == content[1000:2000001]


def test_answers_leave_no_open_file(stored: Client) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for more in (
        {},
        {"Range": "bytes=0-9"},
        {"Range": f"bytes={SIZE}-"},
        {"If_None_Match": "*"},
        {"If_Match": '"a"'},
        {"Want_Repr_Digest": "sha-256=1"},
    ):
        for method in ("GET", "HEAD"):
            fetch(stored, method, **more).close()
    stored.get(URL, headers=AUTH, buffered=False).close()  # never read
    assert len(os.listdir("/proc/self/fd")) == before


# --- mounted in another application ------------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path) -> Client:
    """A Flask application with two receivers in it."""
    application = flask.Flask("overwatch")

    @application.get("/")
    def index() -> str:
        return "Overwatch"

    mounts: dict[str, Any] = {
        f"/{name}": receiver.create_app(settings(tmp_path / name, token=f"token of {name}")) for name in ("dqm", "test")
    }
    application.wsgi_app = DispatcherMiddleware(application.wsgi_app, mounts)  # type: ignore[method-assign]
    return Client(application)


def test_receivers_in_another_application_have_their_own_folders_and_tokens(host: Client, tmp_path: Path) -> None:
    for name, content in (("dqm", PROFILES), ("test", GRAPHS)):
        mine = headers(token=f"token of {name}")
        response = host.post(f"/{name}{FILES}", data={"file": (io.BytesIO(content), "x.root")}, headers=mine)
        assert json.loads(response.data)["filename"] == NAME
        assert json.loads(host.get(f"/{name}{FILES}", headers=mine).data) == {"files": [NAME]}
        assert host.get(f"/{name}{URL}", headers=mine, buffered=True).data == content
        assert host.get(f"/{name}{FILES}?filename={NAME}", headers=mine, buffered=True).data == content
        assert visible(tmp_path / name) == {NAME: content}
    response = host.get(f"/test{FILES}", headers={"token": "token of dqm"})
    assert json.loads(response.data)["message"] == "Received token, but it is invalid!"


@pytest.mark.parametrize("path", ["/dqm", "/dqm/"])
def test_the_root_of_a_mounted_receiver_is_its_own(host: Client, path: str) -> None:
    response = host.get(path, headers={"token": "token of dqm"})
    assert (response.status_code, json.loads(response.data)["message"]) == (400, "Not implemented")


def test_the_host_keeps_what_is_its_own(host: Client) -> None:
    assert host.get("/").data == b"Overwatch"
    missing = host.get("/unknown")
    assert (missing.status_code, missing.mimetype) == (404, "text/html")
    assert host.get(FILES, headers={"token": "token of dqm"}).status_code == 404
    inside = host.get("/dqm/unknown", headers={"token": "token of dqm"})
    assert (inside.status_code, inside.content_type) == (404, "application/json")


# --- as a WSGI application ---------------------------------------------------------------------------------------------

VALIDATED: dict[str, tuple[str, str, dict[str, str], bytes, int]] = {
    "upload": ("POST", FILES, HEADERS, GRAPHS, 200),
    "duplicate": ("POST", FILES, HEADERS, PROFILES, 200),
    "list": ("GET", FILES, AUTH, b"", 200),
    "download": ("GET", URL, AUTH, b"", 200),
    "head": ("HEAD", URL, AUTH, b"", 200),
    "head of the list": ("HEAD", FILES, AUTH, b"", 200),
    "range": ("GET", URL, {**AUTH, "Range": "bytes=5-9"}, b"", 206),
    "range to the end": ("GET", URL, {**AUTH, "Range": "bytes=-9"}, b"", 206),
    "not modified": ("GET", URL, {**AUTH, "If-None-Match": "*"}, b"", 304),
    "precondition": ("GET", URL, {**AUTH, "If-Match": '"a"'}, b"", 412),
    "beyond": ("GET", URL, {**AUTH, "Range": "bytes=99999-"}, b"", 416),
    "no token": ("POST", FILES, {}, PROFILES, 400),
    "head without a token": ("HEAD", URL, {}, b"", 400),
    "invalid": ("POST", FILES, HEADERS, b"invalid", 400),
    "unknown": ("GET", "/unknown", AUTH, b"", 404),
    "method": ("PUT", FILES, AUTH, PROFILES, 405),
}


@pytest.mark.parametrize("case", VALIDATED)
def test_the_application_keeps_to_wsgi(make_app: MakeApp, case: str) -> None:
    method, path, its_headers, body, status = VALIDATED[case]
    app = make_app()
    assert send_bare(Client(app), PROFILES).status_code == 200
    client = Client(validator(app))
    response = client.open(path, method=method, headers=its_headers, data=body or None, buffered=True)
    assert response.status_code == status
    response.close()


def test_a_form_keeps_to_wsgi(make_app: MakeApp) -> None:
    client = Client(validator(make_app()))
    response = client.post(FILES, data=multipart(FILE), content_type=FORM, headers=HEADERS, buffered=True)
    assert response.status_code == 200


def test_logging_is_left_to_the_host(make_app: MakeApp) -> None:
    root, ours = logging.getLogger(), logging.getLogger("dqm_receiver")

    def state() -> list[object]:
        return [list(root.handlers), root.level, list(ours.handlers), ours.level, ours.propagate, ours.disabled]

    before = state()
    assert before[2:] == [[], logging.NOTSET, True, False]
    client = Client(make_app())
    send_bare(client, PROFILES)
    send_bare(client, b"invalid")
    assert state() == before


def test_importing_does_nothing(tmp_path: Path) -> None:
    program = """
import logging, os, sys, threading
before = os.getcwd(), dict(os.environ), sys.stdout, sys.stderr
import receiver, rootcheck, storage
assert (os.getcwd(), dict(os.environ), sys.stdout, sys.stderr) == before
print(os.listdir("."), threading.active_count(), logging.getLogger().handlers, logging.getLogger("dqm_receiver").handlers)
"""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DQM_RECEIVER_")}
    environ.update(PYTHONPATH=str(PROJECT), PYTHONDONTWRITEBYTECODE="1")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout, run.stderr, run.returncode) == ("[] 1 [] []\n", "", 0)


# --- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKEN", None),
        ("TOKEN", ""),
        *(
            (name, value)
            for name in ("MAX_FILE_SIZE", "MIN_FREE_SPACE", "MAX_REJECTED")
            for value in ("x", "-1", "1.5", "1 GiB", "1e9", "١", " 1", "0x10", "9" * 30)
        ),
        ("DATA_FOLDER", "{file}"),
        ("DATA_FOLDER", "{file}/below"),
        ("DATA_FOLDER", "/proc/nowhere"),
        ("DATA_FOLDER", "{base}/" + "x" * 300),
    ],
)
def test_a_wrong_setting_stops_the_start_with_a_line_that_names_it(
    tmp_path: Path, name: str, value: str | None
) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    environ = settings(tmp_path / "data")
    environ.pop(f"DQM_RECEIVER_{name}", None)
    if value is not None:
        environ[f"DQM_RECEIVER_{name}"] = value.format(file=file, base=tmp_path)
    with pytest.raises(receiver.ConfigurationError, match=f"DQM_RECEIVER_{name}") as error:
        receiver.create_app(environ)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_the_settings_have_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = receiver.create_app({"DQM_RECEIVER_TOKEN": TOKEN})
    assert app.storage.folder == tmp_path / "data"
    limits = (app.settings.max_file_size, app.settings.min_free_space, app.settings.max_rejected)
    assert limits == (2 << 30, 1 << 30, 256 << 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_the_settings_are_read_once_and_from_the_mapping_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DQM_RECEIVER_DATA_FOLDER", str(tmp_path / "wrong"))
    monkeypatch.setenv("DQM_RECEIVER_TOKEN", "wrong")
    environ = settings(folder)
    client = Client(receiver.create_app(environ))
    environ.clear()
    assert send_bare(client, PROFILES).status_code == 200
    assert visible(folder) == {NAME: PROFILES}
    assert not (tmp_path / "wrong").exists()


def test_a_token_may_have_any_characters(make_app: MakeApp) -> None:
    client = Client(make_app(token="Tökén ☃"))
    # A client sends UTF-8, which a server hands on as latin-1.
    sent = "Tökén ☃".encode().decode("latin-1")
    response = client.get(FILES, headers=AUTH, environ_overrides={"HTTP_TOKEN": sent})
    assert response.status_code == 200


# --- many at once ------------------------------------------------------------------------------------------------------

CORES = len(os.sched_getaffinity(0))


class Gate(Body):
    """A body of which the second half comes only when somebody opens the gate."""

    def __init__(self, content: bytes) -> None:
        self.pieces = [content[: len(content) // 2], content[len(content) // 2 :], b""]
        self.waiting = threading.Event()
        self.open = threading.Event()

    def read(self, size: int | None = -1) -> bytes:
        if len(self.pieces) == 2:
            self.waiting.set()
            assert self.open.wait(30)
        return self.pieces.pop(0) if len(self.pieces) > 1 else b""


def test_only_as_many_files_are_validated_at_once_as_there_are_cores(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app()
    lock = threading.Lock()
    now = most = 0
    check = rootcheck.check_root_file

    def watch(path: Any) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        try:
            return check(path)
        finally:
            with lock:
                now -= 1

    monkeypatch.setattr(rootcheck, "check_root_file", watch)
    statuses: list[int] = []
    count = 3 * CORES + 2

    def work(number: int) -> None:
        statuses.append(send_bare(Client(app), PROFILES, timeStamp=str(number)).status_code)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * count
    assert most == CORES


def test_slow_senders_keep_nobody_waiting(make_app: MakeApp, folder: Path) -> None:
    app = make_app()
    gates = [Gate(PROFILES) for _ in range(CORES + 3)]
    statuses: list[int] = []

    def work(number: int) -> None:
        statuses.append(send_chunked(Client(app), gates[number], timeStamp=str(1000 + number)).status_code)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(gates))]
    for thread in threads:
        thread.start()
    try:
        assert all(gate.waiting.wait(30) for gate in gates)
        assert len(incoming(folder)) == len(gates)
        assert send_bare(Client(app), PROFILES).status_code == 200
        assert statuses == []
        app.storage.sweep()
        assert json.loads(Client(app).get(FILES, headers=AUTH).data) == {"files": [NAME]}
    finally:
        for gate in gates:
            gate.open.set()
        for thread in threads:
            thread.join()
    assert statuses == [200] * len(gates)
    assert set(visible(folder).values()) == {PROFILES}
    assert len(visible(folder)) == len(gates) + 1
    assert incoming(folder) == []
