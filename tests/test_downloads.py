"""Files that are given back: whole, in ranges, under conditions and with digests (RFC 9110, RFC 9530)."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest
from client import AUTH, FILES, GRAPHS, NAME, PROFILES, URL, check_refused, send, settings
from werkzeug.http import http_date
from werkzeug.test import Client, TestResponse

import receiver

SIZE = len(PROFILES)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of the shared receiver."""
    return tmp_path_factory.mktemp("downloads") / "data"


@pytest.fixture(scope="module")
def stored(base: Path) -> Client:
    """A receiver with PROFILES under NAME, for tests that only read."""
    client = Client(receiver.create_app(settings(base)))
    assert send(client).status_code == 200
    return client


def fetch(client: Client, method: str = "GET", url: str = URL, **more: str) -> TestResponse:
    its_headers = {**AUTH, **{name.replace("_", "-"): value for name, value in more.items()}}
    return client.open(url, method=method, headers=its_headers, buffered=True)


@pytest.mark.parametrize("url", [URL, f"{FILES}?filename={NAME}", f"{FILES}?runNumber=9&filename={NAME}"])
def test_file_comes_back_byte_for_byte(stored: Client, base: Path, url: str) -> None:
    response = fetch(stored, url=url)
    assert (response.status_code, response.data) == (200, PROFILES)
    assert response.headers["Content-Disposition"] == f"attachment; filename={NAME}"
    assert response.headers["Accept-Ranges"] == "bytes"
    assert re.fullmatch(r'"[^"]+"', response.headers["ETag"])
    modified = parsedate_to_datetime(response.headers["Last-Modified"]).timestamp()
    assert modified == int((base / NAME).stat().st_mtime)
    assert "Repr-Digest" not in response.headers
    head = fetch(stored, "HEAD", url)
    assert (head.status_code, head.data) == (200, b"")
    assert dict(head.headers) == dict(response.headers)


LONG_AGO, LATER = http_date(0), http_date(4102444800)
WHOLE = (0, SIZE)
NOTHING = (0, 0)
# What is asked, the status, and the bytes that come back: from the first to before the last.
ASKED: list[tuple[dict[str, str], int, tuple[int, int]]] = [
    ({}, 200, WHOLE),
    ({"Range": "bytes=0-99"}, 206, (0, 100)),
    ({"Range": "bytes=0-0"}, 206, (0, 1)),
    ({"Range": "bytes=1000-1999"}, 206, (1000, 2000)),
    ({"Range": "bytes=1000-"}, 206, (1000, SIZE)),
    ({"Range": "bytes=0-"}, 206, WHOLE),
    ({"Range": f"bytes={SIZE - 1}-"}, 206, (SIZE - 1, SIZE)),
    ({"Range": "bytes=-100"}, 206, (SIZE - 100, SIZE)),
    ({"Range": f"bytes=-{SIZE}"}, 206, WHOLE),
    ({"Range": f"bytes=100-{SIZE + 1000}"}, 206, (100, SIZE)),
    # A suffix that is longer than the file, several ranges, and what is no range.
    *(({"Range": f"bytes=-{SIZE + more}"}, 200, WHOLE) for more in (1, 1000, 1 << 70)),
    *(({"Range": f"bytes={several}"}, 200, WHOLE) for several in ("0-9,20-29", "0-9,5-", "-1,-2")),
    *(({"Range": strange}, 200, WHOLE) for strange in ("lines=1-2", "bytes=9-5", "bytes=x-", "bytes", "bytes=", "0-9")),
    ({"Range": f"bytes={SIZE}-"}, 416, NOTHING),
    ({"Range": f"bytes={SIZE + 1000}-{SIZE + 2000}"}, 416, NOTHING),
    *(({"If_None_Match": known}, 304, NOTHING) for known in ("ETAG", "*", "W/ETAG", '"a", ETAG, "b"')),
    ({"If_None_Match": '"a"'}, 200, WHOLE),
    ({"If_None_Match": '"a"', "If_Modified_Since": LATER}, 200, WHOLE),  # RFC 9110: the date is not looked at
    ({"If_None_Match": "ETAG", "If_Modified_Since": LONG_AGO}, 304, NOTHING),
    *(({"If_Modified_Since": since}, 304, NOTHING) for since in ("MODIFIED", LATER)),
    *(({"If_Modified_Since": since}, 200, WHOLE) for since in (LONG_AGO, "yesterday")),
    *(({"If_Match": known}, 200, WHOLE) for known in ("ETAG", "*", '"a", ETAG')),
    ({"If_Match": '"a"'}, 412, NOTHING),
    ({"If_Match": "ETAG", "If_Unmodified_Since": LONG_AGO}, 200, WHOLE),
    ({"If_Unmodified_Since": LONG_AGO}, 412, NOTHING),
    *(({"If_Unmodified_Since": since}, 200, WHOLE) for since in ("MODIFIED", LATER)),
    ({"If_None_Match": "ETAG", "Range": "bytes=0-9"}, 304, NOTHING),
    ({"If_None_Match": "ETAG", "Range": f"bytes={SIZE}-"}, 304, NOTHING),
    ({"If_Match": '"a"', "Range": "bytes=0-9"}, 412, NOTHING),
    ({"If_Match": '"a"', "Range": f"bytes={SIZE}-"}, 412, NOTHING),
    ({"If_None_Match": '"a"', "Range": "bytes=100-199"}, 206, (100, 200)),
    ({"If_Match": "ETAG", "Range": "bytes=100-199"}, 206, (100, 200)),
    ({"If_Modified_Since": LONG_AGO, "Range": "bytes=100-199"}, 206, (100, 200)),
    ({"If_Range": "ETAG", "Range": "bytes=100-199"}, 206, (100, 200)),
    # MODIFIED: another file may have had the name in the same second.
    *(
        ({"If_Range": other, "Range": "bytes=100-199"}, 200, WHOLE)
        for other in ('"a"', "W/ETAG", LONG_AGO, "MODIFIED", "Fri, 31 Dec 9999 23:59:59 GMT")
    ),
]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("asked", "status", "given"), ASKED, ids=str)
def test_ranges_and_conditions_are_honoured(
    stored: Client, asked: dict[str, str], status: int, given: tuple[int, int], method: str
) -> None:
    whole = fetch(stored).headers
    filled = {
        name: value.replace("ETAG", whole["ETag"]).replace("MODIFIED", whole["Last-Modified"])
        for name, value in asked.items()
    }
    response = fetch(stored, method, **filled)
    if method == "HEAD":  # it knows no ranges
        expected = status if status in (304, 412) else 200
        assert (response.status_code, response.data) == (expected, b"")
    else:
        assert response.status_code == status
        if status in (200, 206, 304):
            assert response.data == PROFILES[given[0] : given[1]]
        else:
            answer = json.loads(response.data)
            assert (answer["status"], answer["received"]) == (status, None)
    if response.status_code in (412, 416):
        assert response.content_type == "application/json"
    else:
        assert response.headers["ETag"] == whole["ETag"]
    if response.status_code in (200, 206):
        assert response.headers["Content-Type"] == "application/octet-stream"
        assert response.headers["Content-Length"] == str(SIZE if method == "HEAD" else given[1] - given[0])
    ranges = {206: f"bytes {given[0]}-{given[1] - 1}/{SIZE}", 416: f"bytes */{SIZE}"}
    assert response.headers.get("Content-Range") == ranges.get(response.status_code)


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        *((wanted, True) for wanted in ("sha-256=10", "sha-256=1", "sha-512=10, sha-256=1", "sha-256=1,sha-512=0")),
        *((wanted, False) for wanted in ("sha-256=0", "sha-512=10", "sha-512=10, sha-256=0", "")),
    ],
)
@pytest.mark.parametrize(
    ("method", "more", "content"),
    [("GET", {}, PROFILES), ("HEAD", {}, b""), ("GET", {"Range": "bytes=100-199"}, PROFILES[100:200])],
    ids=["GET", "HEAD", "Range"],
)
def test_digest_is_given_where_it_is_wanted(
    stored: Client, method: str, more: dict[str, str], content: bytes, wanted: str, given: bool
) -> None:
    response = fetch(stored, method, Want_Repr_Digest=wanted, **more)
    digest = base64.b64encode(hashlib.sha256(PROFILES).digest()).decode()
    assert response.headers.get("Repr-Digest") == (f"sha-256=:{digest}:" if given else None)
    assert (response.status_code, response.data) == (206 if more else 200, content)


def test_digest_is_read_once_for_many_ranges(stored: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(stored, Want_Repr_Digest="sha-256=1")
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("the file was read again"))
    for more in ({"Range": "bytes=0-0"}, {"If_None_Match": "*"}):
        assert "Repr-Digest" in fetch(stored, Want_Repr_Digest="sha-256=1", **more).headers


def test_large_file_comes_back_in_pieces(stored: Client, base: Path) -> None:
    content = os.urandom(3 << 20)
    (base / "large.root").write_bytes(content)
    response = stored.get(f"{FILES}/large.root", headers=AUTH, buffered=False)
    pieces = list(response.iter_encoded())
    response.close()
    assert b"".join(pieces) == content
    assert max(len(piece) for piece in pieces) <= 1 << 20
    assert fetch(stored, url=f"{FILES}/large.root", Range="bytes=1000-2000000").data == content[1000:2000001]


def test_answers_leave_no_open_file(stored: Client) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for more in ({}, {"Range": "bytes=0-9"}, {"Range": f"bytes={SIZE}-"}, {"If_None_Match": "*"}, {"If_Match": '"a"'}):
        for method in ("GET", "HEAD"):
            fetch(stored, method, Want_Repr_Digest="sha-256=1", **more).close()
    stored.get(URL, headers=AUTH, buffered=False).close()  # never read
    assert len(os.listdir("/proc/self/fd")) == before


# --- files that come and go --------------------------------------------------------------------------------------------


def test_another_file_of_the_name_has_another_etag(client: Client) -> None:
    etags, first, second = [], PROFILES + b"1", PROFILES + b"2"  # of one size
    for body in (first, first, second):
        assert send(client, body).status_code == 200
        etags.append(fetch(client).headers["ETag"])
    assert etags[0] == etags[1] != etags[2]
    response = fetch(client, If_None_Match=etags[0])
    assert (response.status_code, response.data) == (200, second)


@pytest.mark.parametrize("taken", [True, False])
def test_file_taken_away_is_404_and_says_so(client: Client, folder: Path, taken: bool) -> None:
    assert send(client).status_code == 200
    (folder / NAME).unlink()
    name = NAME if taken else NAME.replace("_123_", "_124_")
    message = f"The file {name} was received and has since been taken away" if taken else "There is no file"
    for url in (f"{FILES}/{name}", f"{FILES}?filename={name}"):
        answer = check_refused(fetch(client, url=url), folder, 404, message)
        assert name in answer["message"]


def test_any_regular_visible_file_comes_back(client: Client, folder: Path, tmp_path: Path) -> None:
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
