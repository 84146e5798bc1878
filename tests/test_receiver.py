"""The HTTP contract, against the WSGI callable."""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote
from wsgiref.validate import validator

import flask
import pytest
from client import (
    AUTH,
    DATA,
    FILES,
    FORM,
    GRAPHS,
    HEADERS,
    HISTOGRAMS,
    NAME,
    PROFILES,
    PROJECT,
    TOKEN,
    URL,
    check_refused,
    digest,
    get,
    headers,
    hidden,
    incoming,
    log_line,
    multipart,
    part,
    receipts,
    send,
    send_chunked,
    send_form,
    settings,
    tree,
    visible,
    write_tokens,
)
from rootfiles import File, tnamed
from werkzeug.datastructures import Headers
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client, TestResponse

import receiver
import rootcheck
import uploads
from receiver_requests import BODY_CHUNK, FORM_OVERHEAD
from storage import Storage

MakeApp = Callable[..., receiver.Receiver]
CHECK = "/rest/api/check"
NOT_VALID = "Successfully received the file, but the file is not valid! Perhaps it was corrupted?"
NO_FILE = "No file uploaded and the payload was empty"
NO_TOKEN = "Must pass a token!"
WRONG_TOKEN = "Received token, but it is invalid!"
SHA256 = hashlib.sha256(PROFILES).hexdigest()
FILE = part(PROFILES)


# --- receiving a file --------------------------------------------------------------------------------------------------

SENDERS: dict[str, Callable[..., TestResponse]] = {
    "bare": send,
    "bare, called a form by curl": lambda client, body, **more: send(
        client, body, "application/x-www-form-urlencoded", **more
    ),
    "bare, chunked": send_chunked,
    "form": lambda client, body, **more: send_form(client, part(body), **more),
    "form, chunked": lambda client, body, **more: send_chunked(client, multipart(part(body)), FORM, **more),
    "form with fields": lambda client, body, **more: send_form(
        client, part(b"field", "comment", None), part(body), part(b"", "more", None), **more
    ),
    "form with other files": lambda client, body, **more: send_form(
        client, part(b"not read", "log"), part(body), part(b"", "more"), **more
    ),
}


@pytest.mark.parametrize("sender", SENDERS)
def test_file_is_stored_and_its_objects_answered(client: Client, folder: Path, sender: str) -> None:
    response = SENDERS[sender](client, PROFILES)
    assert (response.status_code, response.content_type) == (200, "application/json")
    assert json.loads(response.data) == {
        "status": 200,
        "message": "Successfully received file and extracted information",
        "received": {
            name: found.description for name, found in rootcheck.check_root_file(DATA / "profiles.root").items()
        },
        "size": len(PROFILES),
        "sha256": SHA256,
        "filename": NAME,
    }
    assert visible(folder) == {NAME: PROFILES}
    assert incoming(folder) == []


def test_answer_names_objects_and_classes_as_root_does(client: Client) -> None:
    received = json.loads(send(client, HISTOGRAMS).data)["received"]
    assert received["hTH1C"] == "Obj name: hTH1C, Obj IsA() Name: TH1C"
    assert all(re.fullmatch(r"Obj name: .*, Obj IsA\(\) Name: TH1[CSILFD]", text) for text in received.values())


def many_objects(number: int, name: bytes) -> bytes:
    file = File()
    for one in range(number):
        file.add(b"TNamed", b"%b%d" % (name, one), tnamed(b"h"))
    return file.close()


@pytest.mark.parametrize("name", [b"h" * 90, b"\x01" * 90, "Ä".encode() * 45], ids=["plain", "control", "unicode"])
def test_answer_is_bounded_and_says_so(client: Client, name: bytes) -> None:
    answer = json.loads(send(client, many_objects(10, name)).data)
    assert (len(answer["received"]), "truncated" in answer) == (10, False)
    response = send(client, many_objects(12_000, name))
    answer = json.loads(response.data)
    assert answer["truncated"] is True
    assert 0.9 * (1 << 20) < len(json.dumps(answer["received"])) <= (1 << 20) + 12_000
    assert receipts_of(client)[0]["objects"] == 12_000


def receipts_of(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = get(client, "/rest/api/receipts")["receipts"]
    return found


# What a line of the log has in common with the receipt.
LOGGED = ("outcome", "sender", "agent", "filename", "size", "seconds", "reason_class", "reason")


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [
        log_line(one.getMessage())
        for one in caplog.records
        if one.name == "dqm_receiver" and one.levelno == logging.INFO
    ]


def test_one_name_through_a_whole_session(client: Client, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for body, outcome, shown, preserved in [
        (PROFILES, "stored", PROFILES, []),
        (PROFILES, "duplicate", PROFILES, []),
        (PROFILES[:-100], "rejected", PROFILES, []),
        (GRAPHS, "replaced", GRAPHS, [PROFILES]),
        (PROFILES[:-100], "rejected", GRAPHS, [PROFILES]),
        (GRAPHS, "duplicate", GRAPHS, [PROFILES]),
    ]:
        before = tree(folder)
        caplog.clear()
        checked = send(client, body, path=CHECK)
        changed = tree(folder).keys() ^ before.keys()
        assert {path for path in changed if not path.startswith((".incoming", ".lock"))} == set()
        response = client.post(FILES, data=body, headers=HEADERS, environ_overrides={"REMOTE_ADDR": "127.0.0.1"})
        answer = json.loads(response.data)
        assert (checked.status_code, json.loads(checked.data)) == (response.status_code, answer)
        assert response.status_code == (400 if outcome == "rejected" else 200)
        if outcome != "rejected":
            assert {name for name in ("duplicate", "replaced") if name in answer} == {outcome} - {"stored"}
            assert answer["sha256"] == hashlib.sha256(body).hexdigest()
        assert (visible(folder), hidden(folder, ".replaced")) == ({NAME: shown}, preserved)
        check, line = logged(caplog)
        *_, receipt = receipts(folder)
        assert check["event"] == ("refused" if outcome == "rejected" else "check")
        assert (line["event"], line["status"], line["run"]) == ("upload", response.status_code, "123")
        assert (line["address"], line["outcome"]) == ("127.0.0.1", outcome)
        assert {line.get(name) == receipt[name] for name in LOGGED} == {True}
    assert len(receipts(folder)) == 6


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
        ({"sha256": SHA256}, NAME),
        ({"sha256": SHA256.upper()}, NAME),
        ({"runNumber": "\t123", "timeStamp": "234\t", "amoreAgent": "\ttestagent", "token": f"\t{TOKEN}\t"}, NAME),
    ],
    ids=lambda value: str(value)[:50],
)
def test_correct_headers_are_taken(client: Client, folder: Path, changes: dict[str, Any], name: str) -> None:
    response = send(client, **changes)
    assert (response.status_code, json.loads(response.data)["filename"]) == (200, name)
    assert visible(folder) == {name: PROFILES}


def test_header_names_may_have_any_case(client: Client, folder: Path) -> None:
    response = client.post(FILES, data=PROFILES, headers={name.upper(): value for name, value in HEADERS.items()})
    assert response.status_code == 200
    assert visible(folder) == {NAME: PROFILES}


# Other names than that of an accepted file: in addresses, as names in forms, in headers.
OUTSIDE = "outside.root"  # beside the data folder
NAMES = [
    "..", ".", "", f"../{OUTSIDE}", f"..%2f{OUTSIDE}", f"....//{OUTSIDE}", f"./{NAME}", f"/{NAME}", f"//{NAME}", f"{NAME}/",
    f"{NAME}/.", f"{NAME}/../{NAME}", f"x/../{NAME}", f"..\\{OUTSIDE}", f"{NAME}\0", f"{NAME}\0.txt", f"\0{NAME}", f"{NAME}\n",
    f"{NAME} ", NAME.upper(), ".receipts", ".receipts/1.jsonl", f".replaced/{NAME}", f".hidden_{NAME}", "/etc/passwd",
    "../../../../../../../etc/passwd", "file:///etc/passwd", "*", "x" * 255, "x" * 256, "x" * 5000, "x/" * 5000, "\udcff",
    "é\u202e",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:40])
def test_names_from_a_sender_lead_nowhere(client: Client, folder: Path, name: str) -> None:
    raw = name.encode("utf-8", "surrogateescape")
    for header in ("amoreAgent", "runNumber", "timeStamp", "dataStatus"):
        response = client.post(
            FILES,
            headers=headers(**{header: ""}),
            data=PROFILES,
            environ_overrides={f"HTTP_{header.upper()}": raw.decode("latin-1")},
        )
        check_refused(response, folder, 400, header)
    form = b'--limit\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n%b\r\n--limit--\r\n'
    quoted = raw.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    response = send(client, form % (quoted, PROFILES), FORM)
    assert response.status_code in (200, 400)
    assert visible(folder) == ({NAME: PROFILES} if response.status_code == 200 else {})
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert incoming(folder) == []


class Pieces(io.BytesIO):
    """A body that arrives in two pieces."""

    def __init__(self, body: bytes, first: int) -> None:
        super().__init__(body)
        self.first = first

    def read(self, size: int | None = -1, /) -> bytes:
        size, self.first = self.first or size, 0
        return super().read(size)


@pytest.mark.parametrize(
    "content", [PROFILES, PROFILES + b"\r", PROFILES + b"\n\r\r\n", PROFILES + b"\r\n--limi\r\n--"]
)
@pytest.mark.parametrize("end", [b"--\r\n", b"--", b"  --\r\n", b"--\r\nepilogue"], ids=repr)
def test_form_is_byte_exact_in_any_pieces(client: Client, folder: Path, content: bytes, end: bytes) -> None:
    if end.startswith(b" "):  # padding behind a boundary, here of another part
        body = multipart(part(content))[: -len(b"--\r\n")] + b"  \r\n" + part(b"x", "more") + b"\r\n--limit--\r\n"
    else:
        body = multipart(part(content), end=end)
    ends = {body.index(content) + number for number in range(-3, 4)}
    ends |= {body.index(content) + len(content) + number for number in range(-12, 14 + len(end))}
    for first in sorted(ends):
        answer = json.loads(send_chunked(client, Pieces(body, first), FORM, path=CHECK).data)
        assert (answer["status"], answer.get("sha256")) == (200, hashlib.sha256(content).hexdigest()), first
    assert send(client, body, FORM).status_code == 200
    assert visible(folder) == {NAME: content}


LONG = "x" * FORM_OVERHEAD


@pytest.mark.parametrize(
    "body",
    [
        LONG.encode() + b"\r\n" + multipart(part(PROFILES)),
        multipart(part(PROFILES, more=f"X: {LONG}\r\n")),
        multipart(part(PROFILES), end=b"--\r\n" + LONG.encode()),
    ],
    ids=["preamble", "head", "epilogue"],
)
def test_form_has_room_beside_its_file(client: Client, folder: Path, body: bytes) -> None:
    assert send(client, body, FORM).status_code == 200
    assert visible(folder) == {NAME: PROFILES}


# --- checking a file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [{}, {"runNumber": "5"}, {"runNumber": "5", "timeStamp": "6", "amoreAgent": "EMC"}], ids=len
)
def test_check_needs_no_headers_but_the_token(client: Client, folder: Path, given: dict[str, str]) -> None:
    response = client.post(CHECK, data=multipart(FILE), content_type=FORM, headers={**AUTH, **given})
    answer = json.loads(response.data)
    assert (response.status_code, answer["sha256"]) == (200, SHA256)
    assert ("filename" in answer) == (len(given) == 3)
    assert visible(folder) == {}


# --- refusals ----------------------------------------------------------------------------------------------------------

EVERYWHERE = [
    ("POST", FILES),
    ("POST", CHECK),
    ("GET", FILES),
    ("GET", URL),
    ("GET", f"{FILES}?filename={NAME}"),
    ("HEAD", URL),
    ("GET", "/rest/api/runs"),
    ("GET", "/rest/api/runs/123"),
    ("GET", "/rest/api/runs/123/receipts"),
    ("GET", "/rest/api/receipts"),
    ("GET", "/"),
    ("GET", "/unknown"),
    ("DELETE", FILES),
]


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, NO_TOKEN),
        ("", NO_TOKEN),
        (" ", WRONG_TOKEN),
        ("abc", WRONG_TOKEN),
        ("abcde", WRONG_TOKEN),
        ("ABCD", WRONG_TOKEN),
        ("abcd abcd", WRONG_TOKEN),
        ("abcd,abcd", WRONG_TOKEN),  # two headers, as a server hands them on
        ("x" * 5000, WRONG_TOKEN),
        ("äbcd", WRONG_TOKEN),
        ("\xff", WRONG_TOKEN),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_without_the_token_nothing_is_done(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, message: str
) -> None:
    monkeypatch.setattr(Storage, "new_upload", lambda *_: pytest.fail("the body was used"))
    (folder / NAME).write_bytes(PROFILES)
    for method, path in EVERYWHERE:
        response = client.open(path, method=method, data=PROFILES, headers=headers(token=token))
        assert response.status_code == 400
        if method != "HEAD":
            answer = json.loads(response.data)
            assert (answer["status"], answer["message"]) == (400, message), (method, path)
            assert NAME not in response.text
    assert tree(folder) == {NAME: PROFILES}


@pytest.mark.parametrize(
    ("sent", "hint"),
    [
        ([("Authorization", f"Bearer {TOKEN}")], "`token`, not in Authorization"),
        ([], "in the header `token`"),
        ([("token", TOKEN), ("token", TOKEN)], "came twice"),
    ],
    ids=["bearer", "none", "doubled"],
)
def test_refused_token_hears_how_to_send_it(
    client: Client, folder: Path, sent: list[tuple[str, str]], hint: str
) -> None:
    response = client.post(FILES, data=PROFILES, headers=Headers([*headers(token=None).items(), *sent]))
    answer = check_refused(response, folder, 400, "token")
    assert answer["message"] in (NO_TOKEN, WRONG_TOKEN)
    assert hint in answer["reason"]


@pytest.mark.parametrize("name", ["runNumber", "timeStamp", "amoreAgent", "dataStatus", "sha256"])
def test_doubled_header_is_refused_and_hears_so(client: Client, folder: Path, name: str) -> None:
    once = headers(sha256=SHA256)
    response = client.post(FILES, data=PROFILES, headers=Headers([*once.items(), (name, once[name])]))
    assert "came twice" in check_refused(response, folder, 400, f"header {name}")["message"]
    assert receipts(folder) == []


NOT_NUMBERS = [
    "", " ", "x", "-1", "+1", "1.0", "1e2", "0x10", "1_0", "1 2", "1;", " 1", "1 ", "\u0661\u0662", "\uff11", "\xb2", "nan",
    "None", "9" * 21, "9" * 5000, "0" * 25,
]  # fmt: skip
WRONG_HEADERS = {
    "runNumber": [*NOT_NUMBERS, "2147483648", "4294967296"],
    "timeStamp": [*NOT_NUMBERS, "253402297200", "253402300799", "1448384650000000"],
    "dataStatus": [*NOT_NUMBERS, "3", "9"],
    "amoreAgent": ["", " ", "x" * 65, "a b", "a.b", "a/b", "../a", "Ä", "a\x7f", "%41", "-a", "_a"],
    "sha256": ["", "0" * 63, "0" * 65, "g" * 64, "0x" + "0" * 62, base64.b64encode(bytes(32)).decode()],
}


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_wrong_header_is_named(client: Client, folder: Path, name: str) -> None:
    for value in WRONG_HEADERS[name]:
        wrong = {f"HTTP_{name.upper()}": value.encode().decode("latin-1")}  # as a server hands it on
        response = client.post(FILES, data=PROFILES, headers=HEADERS, environ_overrides=wrong)
        check_refused(response, folder, 400, f"header {name} must be ")
    assert receipts(folder) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((name, None, f"Must pass the header {name}!") for name in ("runNumber", "timeStamp", "amoreAgent")),
        ("timeStamp", "2015-11-24T18:04:10Z", "a number from 0 to 253402297199, in ASCII digits, not a date"),
        (
            "timeStamp",
            "1448384650000",
            "Unix seconds, a number from 0 to 253402297199, in ASCII digits; divide milliseconds",
        ),
        ("timeStamp", "1448384650.25", "without a fraction"),
    ],
)
def test_header_in_another_form_hears_how(
    client: Client, folder: Path, name: str, value: str | None, message: str
) -> None:
    check_refused(send(client, **dict[str, Any]({name: value})), folder, 400, message)


@pytest.mark.parametrize("sender", SENDERS)
def test_wrong_sha256_is_refused_before_anything_shows(client: Client, folder: Path, sender: str) -> None:
    checked = check_refused(SENDERS[sender](client, PROFILES, path=CHECK, sha256="ab" * 32), folder, 400, "sha256")
    answer = check_refused(SENDERS[sender](client, PROFILES, sha256="ab" * 32), folder, 400, "sha256")
    assert answer == checked
    assert SHA256 in answer["message"]  # of what arrived
    assert [(one["reason_class"], one["sha256"]) for one in receipts(folder)] == [("sha256", SHA256)]


MALFORMED = "The form is malformed: "
# Body, its type, the message and (where the message is a known one) the reason.
BODIES: dict[str, tuple[bytes, str, str, str]] = {
    "nothing": (b"", "", NO_FILE, "the request has no body"),
    "an empty form": (b"", FORM, NO_FILE, "the form is empty"),
    "no part": (b"--limit--\r\n", FORM, NO_FILE, "no part named `file`"),
    "an empty file": (multipart(part(b"")), FORM, NO_FILE, "the part `file` is empty"),
    "another part only": (multipart(part(PROFILES, "File")), FORM, NO_FILE, "no part named `file`"),
    "a field only": (multipart(part(b"x", "comment", None)), FORM, NO_FILE, "no part named `file`"),
    "a part without a name": (multipart(b"Content-Disposition: form-data\r\n\r\nx"), FORM, NO_FILE, "no part named `file`"),
    "file as a field": (multipart(part(PROFILES, "file", None)), FORM, MALFORMED, "`-F file=@x`"),
    "file as a field, then a file": (multipart(part(b"x", "file", None), FILE), FORM, MALFORMED, "curl_mime_filename"),
    "two files": (multipart(FILE, FILE), FORM, MALFORMED, "more than one part named `file`"),
    "two files, one empty": (multipart(part(b""), FILE), FORM, MALFORMED, "more than one part named `file`"),
    "17 parts": (multipart(*[part(b"x", "comment", None)] * 16, FILE), FORM, MALFORMED, "more than 16 parts"),
    "a field of 2 MB": (multipart(part(bytes(2 << 20), "comment", None), FILE), FORM, MALFORMED, "1048576 bytes beside"),
    "another file of 2 MB": (multipart(part(bytes(2 << 20), "log"), FILE), FORM, MALFORMED, "1048576 bytes beside"),
    "a long head": (multipart(part(b"x", "x" * (3 << 20))), FORM, MALFORMED, "a very long head"),
    "a name that is not UTF-8": (multipart(FILE).replace(b'"file"', b'"file\xe9"'), FORM, MALFORMED, "not UTF-8"),
    "no boundary": (multipart(FILE), "multipart/form-data", MALFORMED, "no boundary"),
    "an empty boundary": (multipart(FILE), "multipart/form-data; boundary=", MALFORMED, "no boundary"),
    "a boundary not of ASCII": (multipart(FILE), "multipart/form-data; boundary=\xe9", MALFORMED, "not ASCII"),
    "another boundary": (multipart(FILE), "multipart/form-data; boundary=other", MALFORMED, "'other', is not in the body"),
    "a bare boundary with =": (multipart(FILE), "multipart/form-data; boundary==a/b=", MALFORMED, "must stand in quotes"),
    "a bare file called a form": (PROFILES, FORM, MALFORMED, "is not in the body"),
    "cut in the first line": (b"--lim", FORM, MALFORMED, "is not in the body"),
    "cut in a part's head": (multipart(FILE)[:40], FORM, MALFORMED, "the head of a part"),
    "a part without a head": (multipart(b"\r\n" + PROFILES), FORM, MALFORMED, "no Content-Disposition"),
    "cut in the file": (multipart(FILE)[:-500], FORM, MALFORMED, "closing boundary"),
    "cut before the last line": (multipart(FILE, end=b""), FORM, MALFORMED, "closing boundary"),
    "cut in the last line": (multipart(FILE, end=b"-"), FORM, MALFORMED, "closing boundary"),
    "lines that end with LF": (multipart(FILE).replace(b"\r\n", b"\n")[:-20], FORM, MALFORMED, "closing boundary"),
    "not a ROOT file": (b"hello", "", NOT_VALID, ""),
    "one byte": (b"r", "", NOT_VALID, ""),
    "not a ROOT file in a form": (multipart(part(b"hello")), FORM, NOT_VALID, ""),
    "a truncated ROOT file": (PROFILES[:-1], "", NOT_VALID, ""),
    "a truncated ROOT file in a form": (multipart(part(PROFILES[:-1])), FORM, NOT_VALID, ""),
    "a form of another type": (multipart(FILE), "multipart/mixed; boundary=limit", NOT_VALID, ""),
    "curl -d @file": (PROFILES.replace(b"\n", b""), "application/x-www-form-urlencoded", NOT_VALID, "`--data-binary @file`"),
}  # fmt: skip


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("case", BODIES)
def test_wrong_body_is_refused_with_the_reason(client: Client, folder: Path, case: str, chunked: bool) -> None:
    body, content_type, message, reason = BODIES[case]
    sender = send_chunked if chunked else send
    checked = check_refused(sender(client, body, content_type, path=CHECK), folder, 400, message)
    assert (receipts(folder), hidden(folder, ".rejected")) == ([], [])
    response = sender(client, body, content_type)
    answer = check_refused(response, folder, 400, message)
    assert answer == checked
    if message != MALFORMED:
        assert answer["message"] == message  # word for word: programs compare it
    why = answer.get("reason", answer["message"])
    assert reason in why
    assert "State." not in response.text
    (receipt,) = receipts(folder)
    kinds = {NO_FILE: "empty", MALFORMED: "malformed_form", NOT_VALID: "invalid_root_file"}
    assert (receipt["outcome"], receipt["reason_class"], receipt["reason"]) == ("rejected", kinds[message], why)
    assert hidden(folder, ".rejected") == (
        [] if message != NOT_VALID else [body if "form" not in case else body_of(body)]
    )


def body_of(form: bytes) -> bytes:
    """Return the content of the only part of a form; a whole body that is called something else is not parsed."""
    return PROFILES[:-1] if PROFILES[:-1] in form and PROFILES not in form else b"hello" if b"hello" in form else form


def test_reason_says_what_is_wrong_with_the_file(client: Client, folder: Path) -> None:
    with pytest.raises(rootcheck.InvalidRootFile) as error:
        rootcheck.check_root_file(DATA / "truncated.root")
    response = send(client, (DATA / "truncated.root").read_bytes())
    assert check_refused(response, folder, 400, NOT_VALID)["reason"] == str(error.value)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "x"])
@pytest.mark.parametrize("path", [FILES, CHECK])
def test_content_encoding_is_415(client: Client, folder: Path, path: str, encoding: str) -> None:
    response = client.post(path, data=PROFILES, headers=headers(**{"Content-Encoding": encoding}))
    check_refused(response, folder, 415, "send it as it is")
    assert client.post(path, data=PROFILES, headers=headers(**{"Content-Encoding": "identity"})).status_code == 200


def test_chunked_body_that_the_server_withholds_is_411(client: Client, folder: Path) -> None:
    response = client.post(
        FILES, input_stream=io.BytesIO(PROFILES), headers=headers(**{"Transfer-Encoding": "chunked"})
    )
    check_refused(response, folder, 411, "Content-Length")


class Broken(io.BytesIO):
    """A connection that fails after what it has."""

    def read(self, size: int | None = -1, /) -> bytes:
        piece = super().read(size)
        if not piece:
            raise OSError("connection reset by peer")
        return piece


@pytest.mark.parametrize("terminated", [True, False], ids=["server that terminates", "other server"])
@pytest.mark.parametrize("stream", [io.BytesIO, Broken])
@pytest.mark.parametrize("form", [True, False], ids=["form", "bare"])
def test_body_that_ends_early_is_refused(
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
    assert [one["reason_class"] for one in receipts(folder)] == ["truncated"]
    assert hidden(folder, ".rejected") == []


def test_upload_of_a_gone_client_is_not_validated(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rootcheck, "check_root_file", lambda _: pytest.fail("validated"))
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        response = client.post(FILES, data=PROFILES, headers=HEADERS, environ_overrides={"gunicorn.socket": ours})
    check_refused(response, folder, 400, "closed the connection")
    assert receipts(folder) == []


@pytest.mark.parametrize("waiting", [b"", b"GET /next"], ids=["silent", "pipelined"])
def test_upload_of_a_connected_client_is_stored(client: Client, folder: Path, waiting: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(waiting)
        response = client.post(FILES, data=PROFILES, headers=HEADERS, environ_overrides={"gunicorn.socket": ours})
    assert (response.status_code, visible(folder)) == (200, {NAME: PROFILES})


# --- who may do what ---------------------------------------------------------------------------------------------------


@pytest.fixture
def limited(make_app: MakeApp, tmp_path: Path) -> Client:
    """A receiver with a reader, and a token for two agents."""
    text = f"[tokens]\nEMC = {digest('one')}\n[readers]\npage = {digest('two')}\n[agents]\nEMC = EMC EMC-2\n"
    return Client(make_app(tokens_file=write_tokens(tmp_path / "tokens", text)))


@pytest.mark.parametrize("path", [FILES, CHECK])
def test_reader_may_only_read(limited: Client, folder: Path, path: str) -> None:
    check_refused(send(limited, path=path, token="two"), folder, 403, "The token page may only read")
    for read in (FILES, "/rest/api/runs", "/rest/api/receipts"):
        get(limited, read, token="two")
    check_refused(limited.get("/", headers={"token": "two"}), folder, 400, "Not implemented")


def test_token_sends_only_as_its_agents(limited: Client, folder: Path) -> None:
    message = "The token EMC may send as EMC EMC-2, not as TPC"
    for path in (FILES, CHECK):
        check_refused(send(limited, path=path, token="one", amoreAgent="TPC"), folder, 403, message)
    assert receipts(folder) == []
    for agent in ("EMC", "EMC-2"):
        assert send(limited, token="one", amoreAgent=agent).status_code == 200
    assert send(limited, amoreAgent="TPC").status_code == 200


def test_unexpected_agent_hears_which_are_expected(make_app: MakeApp, folder: Path) -> None:
    client = Client(make_app(agents="EMC HLT"))
    for agent in ("emc", "EMC-HLT", "TPC"):
        message = f"The agent {agent} is not expected here; expected: EMC HLT"
        check_refused(send(client, amoreAgent=agent), folder, 400, message)
    assert send(client, amoreAgent="EMC").status_code == 200
    assert get(client, "/rest/api/runs/123")["missing"] == ["HLT"]


def test_every_known_token_is_compared_in_constant_time(limited: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def watch(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return bool(compare(one, other))

    monkeypatch.setattr("hmac.compare_digest", watch)
    for token, status in ((TOKEN, 200), ("one", 200), ("two", 200), ("x", 400), (TOKEN + "x", 400), ("ä", 400)):
        compared.clear()
        assert limited.get(FILES, headers={"token": token}).status_code == status
        # Neither the place of the token nor its length nor its first wrong letter shows.
        assert len(compared) == 3
        assert {len(known) for known, _ in compared} == {32}
        assert {sent for _, sent in compared} == {hashlib.sha256(token.encode("latin-1")).digest()}


# --- limits ------------------------------------------------------------------------------------------------------------


class Endless(io.BytesIO):
    """A body that never ends, and counts what is read of it."""

    def __init__(self, begin: bytes = b"", pause: float = 0.0) -> None:
        super().__init__()
        self.begin, self.pause = begin, pause
        self.count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        time.sleep(self.pause)
        size = 1 << 16 if size is None or size < 0 else size
        piece, self.begin = self.begin[:size], self.begin[size:]
        piece += bytes(0 if self.pause else size - len(piece)) or b"\0"
        self.count += len(piece)
        return piece


def test_file_of_exactly_the_limit_is_taken(make_app: MakeApp, folder: Path) -> None:
    client = Client(make_app(max_file_size=str(len(PROFILES))))
    assert [sender(client, PROFILES).status_code for sender in SENDERS.values()] == [200] * len(SENDERS)
    assert visible(folder) == {NAME: PROFILES}


@pytest.mark.parametrize("sender", SENDERS)
def test_file_one_byte_beyond_the_limit_is_413(make_app: MakeApp, folder: Path, sender: str) -> None:
    client = Client(make_app(max_file_size=str(len(PROFILES) - 1)))
    check_refused(SENDERS[sender](client, PROFILES), folder, 413, f"limit of {len(PROFILES) - 1} bytes")
    assert hidden(folder, ".rejected") == []
    assert [one["reason_class"] for one in receipts(folder)] == ["too_large"]


@pytest.mark.parametrize("content_type", ["", FORM], ids=["bare", "form"])
def test_content_length_beyond_the_limit_is_413(
    make_app: MakeApp, folder: Path, monkeypatch: pytest.MonkeyPatch, content_type: str
) -> None:
    client = Client(make_app(max_file_size="1000"))
    monkeypatch.setattr(Storage, "new_upload", lambda *_: pytest.fail("the body was used"))
    check_refused(send(client, bytes(2 << 20), content_type), folder, 413, "limit of 1000 bytes")


@pytest.mark.parametrize(
    ("begin", "content_type"),
    [
        (b"", ""),
        (b"--limit\r\n" + part(b""), FORM),
        (b"--limit\r\n" + part(b"", "other"), FORM),
        (b"--limit\r\n" + part(b"", "comment", None), FORM),
        (b"--limit\r\nContent-Disposition: ", FORM),
        (b"preamble", FORM),
        (multipart(part(bytes(900))), FORM),
    ],
    ids=["bare", "file in a form", "other file", "field", "head", "before the form", "after the form"],
)
def test_endless_body_is_read_within_bounds(make_app: MakeApp, folder: Path, begin: bytes, content_type: str) -> None:
    client = Client(make_app(max_file_size="1000"))
    body = Endless(begin)
    response = send_chunked(client, body, content_type)
    assert response.status_code in (400, 413)
    check_refused(response, folder, response.status_code, "limit of 1000" if response.status_code == 413 else "form")
    assert body.count < 8 << 20


@pytest.mark.parametrize(("token", "size", "most"), [(TOKEN, 80 << 20, 81 << 20), ("wrong", 1 << 20, 2 << 20)])
def test_refused_body_is_read_as_its_token_allows(
    make_app: MakeApp, folder: Path, token: str, size: int, most: int
) -> None:
    client = Client(make_app(max_file_size=str(80 << 20)))
    body = Endless()
    check_refused(send_chunked(client, body, token=token, runNumber="x"), folder, 400, "")
    assert size <= body.count <= most


def test_slow_refused_body_is_given_up(client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "_REFUSED_SECONDS", 0.3)
    began = time.monotonic()
    check_refused(send_chunked(client, Endless(pause=0.05), token="wrong"), folder, 400, "token")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/unknown"), ("PUT", FILES), ("POST", "/"), ("DELETE", URL), ("POST", URL)]
)
def test_body_of_every_refused_request_is_read(client: Client, method: str, path: str) -> None:
    body = io.BytesIO(bytes(1 << 20))
    response = client.open(path, method=method, input_stream=body, headers=AUTH)
    assert response.status_code in (400, 404, 405)
    assert body.tell() == 1 << 20


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The pieces of uploads that are written from now on."""
    pieces: list[bytes] = []
    write = uploads.Upload.write

    def watch(upload: uploads.Upload, data: bytes) -> None:
        pieces.append(data)
        write(upload, data)

    monkeypatch.setattr(uploads.Upload, "write", watch)
    return pieces


@pytest.mark.parametrize("sender", SENDERS)
def test_small_file_is_written_in_one_call(client: Client, written: list[bytes], sender: str) -> None:
    """On a network file system each call is a round trip."""
    assert SENDERS[sender](client, PROFILES).status_code == 200
    assert written == [PROFILES]


@pytest.mark.parametrize("sender", SENDERS)
def test_large_file_is_written_in_pieces(client: Client, written: list[bytes], sender: str) -> None:
    SENDERS[sender](client, bytes(1_000_000))
    assert b"".join(written) == bytes(1_000_000)
    assert max(map(len, written)) < 2 * BODY_CHUNK


def test_no_room_is_507_before_anything_is_written(
    make_app: MakeApp, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(make_app(min_free_space=str(10**17)))
    monkeypatch.setattr(uploads.Upload, "write", lambda *_: pytest.fail("written"))
    for sender in SENDERS.values():
        check_refused(sender(client, PROFILES), folder, 507, f"{10**17} bytes")
    assert receipts(folder) == []  # it says nothing about the file


def test_content_length_counts_as_used_room(make_app: MakeApp, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1_000_000 + len(PROFILES) - 1
    monkeypatch.setattr(uploads.Space, "ask", lambda self: free)
    monkeypatch.setattr(uploads, "_SPACE_AGE", 0.0)
    client = Client(make_app(min_free_space="1000000"))
    check_refused(send(client), folder, 507, "1000000 bytes")
    free += 1
    assert send(client).status_code == 200


# --- addresses, methods, faults of ours --------------------------------------------------------------------------------


NOT_RUNS = ("x", "-1", "+1", "1e2", "2147483648", "12%203", "%D9%A1")
READ = (FILES, "/rest/api/runs", "/rest/api/runs/123", "/rest/api/runs/123/receipts", "/rest/api/receipts")
# What is asked for, the status, and what the message holds.
ASKED: list[tuple[int, str, list[str]]] = [
    (404, "/rest/api/openapi.json describes the API", ["/unknown", "/rest", "/rest/api", f"/{FILES}", "/REST/api/files", "/\u00e9"]),
    (404, "There is no", [f"{FILES}/{NAME}", f"{FILES}/.receipts%2f123.jsonl", f"{FILES}/%ff%fe", f"{FILES}?filename={NAME}"]),
    (404, "There is no", [f"{FILES}?filename={name}" for name in ("", "../secret", "%00", ".receipts/123.jsonl")]),
    (404, "There is no", ["/rest/api/runs/5", "/rest/api/runs/5/receipts"]),
    (404, "There is no", ["/view/x.js", "/view/../receiver.py", "/view/jsroot.min.js"]),
    (400, "parameter 'run' is not known here", [f"{path}?run=51" for path in (*READ, URL)]),
    (400, "runNumber", [f"{FILES}?runNumber={number}" for number in ("x", "", "-1", "%d9%a1", "2147483648")]),
    (400, "amoreAgent", [f"{FILES}?amoreAgent={agent}" for agent in ("", "a.b", "x" * 65)]),
    (400, "more than one runNumber", [f"{FILES}?runNumber=1&runNumber=1"]),
    (400, "more than one filename", [f"{FILES}?filename=a&filename=a"]),
    (400, "needs limit", [f"{FILES}?before=a"]),
    (400, "limit", [f"{path}?limit={limit}" for path in (FILES, "/rest/api/runs") for limit in ("0", "1001", "x", "")]),
    (400, "before", ["/rest/api/runs?limit=1&before=x"]),
    (400, "stored, duplicate, replaced, rejected", ["/rest/api/receipts?outcome=fine"]),
    (400, "amoreAgent", ["/rest/api/receipts?amoreAgent="]),
    (400, "1000", ["/rest/api/receipts?limit=1001"]),
    (400, "run", [f"/rest/api/runs/{run}" for run in NOT_RUNS]),
]  # fmt: skip


@pytest.mark.parametrize(("status", "message", "paths"), ASKED, ids=lambda value: str(value)[:50])
def test_wrong_address_or_query_hears_why(
    client: Client, folder: Path, tmp_path: Path, status: int, message: str, paths: list[str]
) -> None:
    (tmp_path / "secret").write_text("secret")
    for path in paths:
        check_refused(client.get(path, headers=AUTH), folder, status, message)


def test_upload_knows_no_query(client: Client, folder: Path) -> None:
    check_refused(client.post(f"{FILES}?runNumber=1", data=PROFILES, headers=HEADERS), folder, 400, "'runNumber'")


READABLE = (URL, f"{FILES}/absent", *READ[1:], "/rest/api/health", "/metrics", "/view/")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [(FILES, {"GET", "HEAD", "POST"}), (CHECK, {"POST"}), *((path, {"GET", "HEAD"}) for path in READABLE)],
)
@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"])
def test_wrong_method_hears_the_right_ones(
    client: Client, folder: Path, method: str, path: str, allowed: set[str]
) -> None:
    response = client.open(path, method=method, headers=AUTH)
    works = " or ".join(sorted(allowed - {"HEAD"}))
    check_refused(response, folder, 405, f"{method} does not work at this address, {works} does")
    assert set(response.headers["Allow"].split(", ")) == allowed


@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
def test_root_lets_a_sender_try_its_token(client: Client, folder: Path, method: str) -> None:
    answer = check_refused(client.open("/", method=method, headers=AUTH), folder, 400, "Not implemented")
    assert answer == {"status": 400, "message": "Not implemented", "received": None}


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, RecursionError, KeyError])
def test_fault_of_ours_is_logged_and_not_leaked(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Any
) -> None:
    def fail(_: object) -> None:
        raise error("the secret of the house")

    with monkeypatch.context() as patch:
        patch.setattr(rootcheck, "check_root_file", fail)
        for _ in range(3 * len(os.sched_getaffinity(0))):  # more than are validated at once
            response = send(client)
            assert list(check_refused(response, folder, 500, "log")) == ["status", "message", "received"]
            assert b"secret" not in response.data
    assert "the secret of the house" in caplog.text
    assert "Traceback" in caplog.text
    assert send(client).status_code == 200


def test_no_address_can_forge_a_line(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Storage, "open", lambda *_: 1 // 0)
    check_refused(client.get(f"{FILES}/x%0aforged", headers=AUTH), folder, 500, "log")
    assert "ZeroDivisionError" in caplog.text
    assert not re.search("^forged", caplog.text, re.MULTILINE)


@pytest.mark.parametrize(
    ("call", "error", "status"),
    [("write", errno.ENOSPC, 507), ("write", errno.EDQUOT, 507), ("fsync", errno.EIO, 503), ("open", errno.EROFS, 503)],
)
def test_failure_of_the_disk_is_told_and_passes(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int, status: int
) -> None:
    send(client, runNumber="1")
    before = visible(folder)

    def fail(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error), str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        response = send(client)
    answer = json.loads(response.data)
    assert (response.status_code, answer["status"], visible(folder)) == (status, status, before)
    assert os.strerror(error) in answer["message"]
    assert str(folder) not in response.text
    assert receipts(folder) == []
    assert send(client).status_code == 200


# --- tokens, log -------------------------------------------------------------------------------------------------------


def test_token_stands_in_no_log_answer_or_file(
    folder: Path, make_app: MakeApp, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, nearly = uuid.uuid4().hex, uuid.uuid4().hex
    caplog.set_level(logging.DEBUG)
    app = make_app(token=token)
    client = Client(app)
    answers: list[TestResponse] = []
    for its in (token, nearly):
        for content in (PROFILES, GRAPHS, GRAPHS, b"invalid", b""):
            answers.append(send(client, content, token=its))
            answers.append(send_form(client, part(content), token=its))
            answers.append(send(client, content, path=CHECK, token=its))
        answers.append(send(client, token=its, runNumber="x"))
        for method, path in (*EVERYWHERE[2:], ("GET", "/metrics"), ("GET", "/rest/api/health")):
            answers.append(client.open(path, method=method, headers={"token": its}, buffered=True))
    monkeypatch.setattr(rootcheck, "check_root_file", lambda _: 1 // 0)
    answers.append(send(client, token=token))
    assert {answer.status_code for answer in answers} == {200, 400, 404, 405, 500}
    said = [f"{answer.headers} {answer.data!r}" for answer in answers]
    said += [caplog.text, repr(app), repr(app.settings), str(vars(app)), str(vars(app.storage)), repr(tree(folder))]
    assert len(tree(folder)) > 5
    for secret in (token, nearly, hashlib.sha256(token.encode()).hexdigest()):
        assert not [text for text in said if secret in text]


@pytest.mark.parametrize(
    ("method", "path", "changes", "expected"),
    [
        ("POST", FILES, {"token": "wrong"}, {"status": 400, "reason_class": "token", "run": "123", "agent": "testagent"}),
        ("POST", FILES, {"token": None}, {"status": 400, "reason_class": "token"}),
        ("POST", FILES, {"runNumber": "x"}, {"status": 400, "reason_class": "headers", "sender": "default", "run": "x"}),
        ("GET", FILES, {"token": "wrong"}, {"status": 400, "reason_class": "token"}),
        ("GET", f"{FILES}?x=1", {}, {"status": 400, "reason_class": "query"}),
        ("GET", URL, {}, {"status": 404, "reason_class": "not_found", "path": URL}),
        ("GET", "/a b\"\n\x85é", {}, {"status": 404, "reason_class": "not_found"}),
        ("PUT", FILES, {}, {"status": 405, "reason_class": "method", "method": "PUT"}),
        ("POST", FILES, {"Content-Encoding": "gzip"}, {"status": 415, "reason_class": "encoding"}),
        ("POST", FILES, {"amoreAgent": "a\x1b[2J\u202e"}, {"status": 400, "reason_class": "headers"}),
    ],
)  # fmt: skip
def test_each_refusal_is_one_line_of_the_log(
    client: Client, caplog: pytest.LogCaptureFixture, method: str, path: str, changes: Any, expected: dict[str, Any]
) -> None:
    caplog.clear()
    raw = {"REMOTE_ADDR": "127.0.0.1"} | {
        f"HTTP_{name.upper().replace('-', '_')}": value.encode().decode("latin-1")
        for name, value in headers(**changes).items()
    }
    client.open(path, method=method, data=PROFILES if method == "POST" else b"", environ_overrides=raw)
    (line,) = logged(caplog)
    assert (line["event"], line["address"], bool(line["reason"])) == ("refused", "127.0.0.1", True)
    assert {name: line[name] for name in expected} == expected
    (record,) = caplog.records
    assert record.getMessage().isascii()
    assert record.getMessage().isprintable()


@pytest.mark.parametrize(
    "evil",
    [
        b'h"\nupload outcome="stored" sender="EMC" run=1',
        b"\x1b[2Jh\x00\x0b\x0c\x85",
        "h\u2028upload outcome=\u2029\u202e".encode(),
        b'\\" outcome=stored \\',
    ],
)
def test_no_object_name_can_forge_a_line(
    client: Client, folder: Path, caplog: pytest.LogCaptureFixture, evil: bytes
) -> None:
    file = File()
    file.add(b"TNamed", b"its-name" + evil, tnamed(b"h"), object_size=100_000)  # less is stored than the key says
    caplog.clear()
    reason = check_refused(send(client, file.close()), folder, 400, NOT_VALID)["reason"]
    assert "its-name" in reason
    (line,) = logged(caplog)
    assert (line["reason"], line["agent"]) == (reason, "testagent")
    assert caplog.records[0].getMessage().isprintable()
    assert [one["reason"] for one in receipts(folder)] == [reason]


# --- the list ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def full(client: Client) -> Client:
    """A receiver with files of three agents and two runs."""
    for agent in ("EMC", "E_C", "TPC"):
        for run in ("1", "12"):
            assert send(client, amoreAgent=agent, runNumber=run).status_code == 200
    return client


def name_of(agent: str, run: int) -> str:
    return f"{agent}histos_{run}_DQM_1970_01_01_01_03_54.root"


ALL = [("E-C", 12), ("E-C", 1), ("EMC", 12), ("EMC", 1), ("TPC", 12), ("TPC", 1)]  # in the order of their names


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", ALL),
        ("?runNumber=1", ALL[1::2]),
        ("?runNumber=012", ALL[::2]),
        ("?runNumber=2", []),
        ("?amoreAgent=EMC", ALL[2:4]),
        ("?amoreAgent=E_C", ALL[:2]),
        ("?amoreAgent=E-C", ALL[:2]),
        ("?amoreAgent=EM", []),
        ("?amoreAgent=emc", []),
        ("?amoreAgent=TPC&runNumber=12", [ALL[4]]),
        ("?runNumber=3&amoreAgent=TPC", []),
    ],
)
def test_list_can_be_narrowed(full: Client, query: str, expected: list[tuple[str, int]]) -> None:
    assert get(full, FILES + query) == {"files": [name_of(agent, run) for agent, run in expected]}


def test_list_can_be_read_in_pages(full: Client) -> None:
    names, before, sizes = [], "", []
    while before is not None:
        page = get(full, f"{FILES}?limit=4" + (f"&before={before}" if before else ""))
        names += page["files"]
        sizes.append(len(page["files"]))
        before = page["before"]
    assert (names, sizes) == ([name_of(*one) for one in reversed(ALL)], [4, 2])
    assert get(full, f"{FILES}?limit=2&amoreAgent=EMC") == {
        "files": [name_of(*ALL[3]), name_of(*ALL[2])],
        "before": None,
    }


def test_get_with_the_headers_of_an_upload_lists(full: Client) -> None:
    assert len(json.loads(full.get(FILES, headers=HEADERS).data)["files"]) == 6


def test_list_shows_only_what_this_receiver_made(client: Client, folder: Path) -> None:
    assert get(client, FILES) == {"files": []}
    send(client)
    send(client, b"invalid", runNumber="4")
    send(client, GRAPHS)
    for name in ("EMChistos_123_C_2015_11_24_18_04_10.root", "combined.root", "notes.txt"):
        (folder / name).write_bytes(PROFILES)
    assert get(client, FILES) == {"files": [NAME]}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:40])
def test_no_other_name_leads_to_a_file(client: Client, folder: Path, name: str) -> None:
    secret = b"vErY-sEcReT"
    send(client, PROFILES)
    send(client, GRAPHS)
    for planted in (
        folder.parent / OUTSIDE,
        folder / f".hidden_{NAME}",
        folder / f".replaced/{NAME}",
        folder / ".receipts/1.jsonl",
    ):
        planted.write_bytes(secret)
    before = tree(folder)
    raw = name.encode("utf-8", "surrogateescape")
    paths = f"{FILES}/" + raw.decode("latin-1"), f"{FILES}/{quote(raw, '')}", f"/view/x{quote(raw, '')}"
    for path in paths:
        with client.get(FILES, headers=HEADERS, environ_overrides={"PATH_INFO": path}) as response:
            # A slash at the end is no part of a name.
            assert response.status_code in ({200, 400, 404} if name in ("", f"{NAME}/") else {400, 404}), path
            assert secret not in response.data and b"root:" not in response.data
    with client.get(f"{FILES}?filename={quote(raw, '')}", headers=AUTH) as response:
        assert response.status_code == 404
    assert tree(folder) == before


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


def test_mounted_receivers_have_their_own_folders_and_tokens(host: Client, tmp_path: Path) -> None:
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
def test_root_of_a_mounted_receiver_is_its_own(host: Client, path: str) -> None:
    response = host.get(path, headers={"token": "token of dqm"})
    assert (response.status_code, json.loads(response.data)["message"]) == (400, "Not implemented")


def test_host_keeps_what_is_its_own(host: Client) -> None:
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
    "form": ("POST", FILES, {**HEADERS, "Content-Type": FORM}, multipart(FILE), 200),
}


@pytest.mark.parametrize("case", VALIDATED)
def test_application_keeps_to_wsgi(make_app: MakeApp, case: str) -> None:
    method, path, its_headers, body, status = VALIDATED[case]
    app = make_app()
    assert send(Client(app)).status_code == 200
    client = Client(validator(app))
    response = client.open(path, method=method, headers=its_headers, data=body or None, buffered=True)
    assert response.status_code == status
    response.close()


@pytest.mark.parametrize(
    ("wanted", "stream", "pattern"),
    [
        ("nothing", "stderr", r"start version=.*\nupload outcome=\"stored\" status=200 .*\n"),
        ("a format", "stdout", r"INFO\|start .*\nINFO\|upload .*\n"),
        ("warnings", "stderr", ""),
    ],
)
def test_uploads_are_logged_without_set_up(folder: Path, wanted: str, stream: str, pattern: str) -> None:
    run = run_program("host.py", wanted, str(folder), cwd=folder.parent)
    assert re.fullmatch(pattern, getattr(run, stream)), run.stderr
    assert run.stdout + run.stderr == getattr(run, stream)


def run_program(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder, in an environment without settings of a receiver; any warning ends it."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DQM_RECEIVER_")}
    environ |= {"PYTHONPATH": str(PROJECT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name(name)), *arguments]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, check=False)


def test_start_is_one_line_of_the_log(make_app: MakeApp, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_app(agents="EMC HLT")
    (record,) = caplog.records
    line = log_line(record.getMessage())
    assert (line["event"], line["version"]) == ("start", receiver.__version__)
    assert (line["folder"], line["tokens"], line["agents"]) == (str(folder), ["default"], ["EMC", "HLT"])
    assert (line["max_file_size"], line["min_free_space"], line["max_rejected"]) == (2 << 30, 0, 256 << 20)


def test_importing_does_nothing(tmp_path: Path) -> None:
    run = run_program("importing.py", cwd=tmp_path)
    assert (run.stdout, run.stderr, run.returncode) == ("[] 1 [] []\n", "", 0)


# --- the page ----------------------------------------------------------------------------------------------------------

PAGE = {"": "text/html", "index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}


@pytest.mark.parametrize("name", PAGE)
def test_page_needs_no_token_and_has_strict_headers(client: Client, name: str) -> None:
    response = client.get(f"/view/{name}")
    assert (response.status_code, response.mimetype) == (200, PAGE[name])
    policy = dict(rule.split(" ", 1) for rule in response.headers["Content-Security-Policy"].split("; "))
    assert (policy["default-src"], policy["script-src"], policy["connect-src"]) == ("'none'", "'self'", "'self'")
    assert (policy["frame-ancestors"], policy["base-uri"], policy["form-action"]) == ("'none'", "'none'", "'none'")
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    again = client.get(f"/view/{name}", headers={"If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_address_of_the_page_without_slash_redirects(client: Client) -> None:
    response = client.get("/view", environ_overrides={"SCRIPT_NAME": "/dqm"})
    assert (response.status_code, response.headers["Location"]) == (308, "/dqm/view/")


def test_jsroot_comes_from_its_folder(make_app: MakeApp, tmp_path: Path) -> None:
    (tmp_path / "jsroot.min.js").write_text("export {}")
    response = Client(make_app(jsroot=str(tmp_path))).get("/view/jsroot.min.js")
    assert (response.status_code, response.mimetype, response.text) == (200, "text/javascript", "export {}")


# --- many at once ------------------------------------------------------------------------------------------------------

CORES = len(os.sched_getaffinity(0))


class Gate(io.BytesIO):
    """A body whose second half comes only when the test opens the gate."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.pieces = [content[: len(content) // 2], content[len(content) // 2 :], b""]
        self.waiting = threading.Event()
        self.open = threading.Event()

    def read(self, size: int | None = -1, /) -> bytes:
        if len(self.pieces) == 2:
            self.waiting.set()
            assert self.open.wait(30)
        return self.pieces.pop(0) if len(self.pieces) > 1 else b""


def test_no_more_validations_at_once_than_cores(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
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
    count = 3 * CORES + 2
    with ThreadPoolExecutor(count) as pool:
        sent = pool.map(lambda number: send(Client(app), timeStamp=str(number)).status_code, range(count))
        assert list(sent) == [200] * count
    assert most == CORES


def test_slow_senders_keep_others_from_nothing(make_app: MakeApp, folder: Path) -> None:
    app = make_app()
    gates = [Gate(PROFILES) for _ in range(CORES + 3)]
    with ThreadPoolExecutor(len(gates)) as pool:
        slow = [
            pool.submit(send_chunked, Client(app), gate, timeStamp=str(1000 + number))
            for number, gate in enumerate(gates)
        ]
        try:
            assert all(gate.waiting.wait(30) for gate in gates)
            assert len(incoming(folder)) == len(gates)
            assert send(Client(app)).status_code == 200
            assert not any(upload.done() for upload in slow)
            app.storage.recover()
            assert get(Client(app), FILES) == {"files": [NAME]}
        finally:
            for gate in gates:
                gate.open.set()
    assert [upload.result().status_code for upload in slow] == [200] * len(gates)
    assert set(visible(folder).values()) == {PROFILES}
    assert len(visible(folder)) == len(gates) + 1
    assert incoming(folder) == []


def test_senders_take_turns_at_validation() -> None:
    slots, order, lock = receiver.FairSlots(1), list[str](), threading.Lock()

    def work(sender: str) -> None:
        with slots.take(sender), lock:
            order.append(sender)

    threads = []
    with slots.take("greedy"):
        for number, sender in enumerate(["greedy"] * 6 + ["other"] * 2, 1):
            threads.append(threading.Thread(target=work, args=(sender,)))
            threads[-1].start()
            while sum(map(len, slots._waiting.values())) < number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == ["other", "greedy", "other", "greedy", "greedy", "greedy", "greedy", "greedy"]
    with slots.take("later"):
        pass
