"""Tokens stand nowhere they must not, and no name leads anywhere but to a visible, regular file of the folder."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import io
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import DATA, FILES, HEADERS, HISTOGRAMS, NAME, PROFILES, Server, curl, receipts, settings, visible
from werkzeug.test import Client
from werkzeug.wrappers import Response

import receiver
import storage

SECRET = "vErY-sEcReT-tOkEn-0123456789"
WRONG = "nOt-ThE-tOkEn-but-a-secret-elsewhere"
INVALID = HISTOGRAMS[:3000] + bytes(2000) + HISTOGRAMS[5000:]
MALFORMED = [
    b"\r\ntoken: %b\r\n\r\n",
    b"token: %b\r\nGET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\ntoken %b\r\n\r\n",
    b"GET / HTTP/1.1\r\ntoken : %b\r\n\r\n",
    b"GET / HTTP/1.1\r\ntoken: a\r\n %b\r\n\r\n",
    b"GET / HTTP/1.1\r\ntoken: %b\0\r\n\r\n",
    b"GET / HTTP/1.1\r\n%b: x y z\0\r\n\r\n",
    b"GET / HTTP/9.9\r\ntoken: %b\r\n\r\n",
    b"GET / token: %b\r\n\r\n",
    b"POST / HTTP/1.1\r\ntoken: %b\r\nTransfer-Encoding: chunked\r\n\r\n%b\r\n\r\n",
    b"POST / HTTP/1.1\r\ntoken: %b\r\nTransfer-Encoding: %b\r\n\r\n",
    b"POST / HTTP/1.1\r\ntoken: %b\r\nContent-Length: %b\r\n\r\n",
    b"POST / HTTP/1.1\r\ntoken: %b\r\nExpect: %b\r\n\r\n",
]


def texts_of(error: BaseException | None) -> Iterator[str]:
    """Return what an exception and all behind it that a traceback shows say."""
    while error is not None:
        yield f"{error} {error!r} {error.args} {vars(error)}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


# --- tokens ------------------------------------------------------------------------------------------------------------


def test_every_known_token_is_compared_by_digest_and_in_constant_time(
    make_app: Callable[..., receiver.Receiver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(token: str) -> str:
        return hashlib.sha256(token.encode()).hexdigest()

    file = tmp_path / "tokens"
    file.write_text(f"[tokens]\nfirst = {digest('one')}\nsecond = {digest('two')} {digest('three')}\n")
    file.chmod(0o600)
    client = Client(make_app(token=SECRET, tokens_file=str(file)))
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for token in (SECRET, "one", "two", "three", WRONG, SECRET[:-1], SECRET + "x", "x", "ä"):
        compared.clear()
        status = client.get(FILES, headers={"token": token}).status_code
        assert status == (200 if token in (SECRET, "one", "two", "three") else 400)
        # The time depends on neither the place of the right token nor its length nor the first differing letter.
        assert len(compared) == 4
        assert {len(known) for known, _ in compared} == {32} == {len(sent) for _, sent in compared}
        assert {sent for _, sent in compared} == {hashlib.sha256(token.encode("latin-1")).digest()}


@pytest.mark.parametrize("token", [None, "", " ", WRONG, SECRET.lower(), SECRET + " x", SECRET[:-1], "\xff"])
def test_without_the_token_nothing_is_told_and_nothing_changes(
    make_app: Callable[..., receiver.Receiver], folder: Path, token: str | None
) -> None:
    app = make_app(token=SECRET)
    (folder / NAME).write_bytes(HISTOGRAMS)
    client = Client(app)
    headers = {name: value for name, value in HEADERS.items() if name != "token"}
    if token is not None:
        headers["token"] = token
    for method, path in (
        ("GET", FILES),
        ("GET", f"{FILES}/{NAME}"),
        ("GET", f"{FILES}?filename={NAME}"),
        ("POST", FILES),
        ("GET", "/rest/api/runs"),
        ("GET", "/rest/api/runs/123"),
        ("GET", "/"),
        ("GET", "/nothing"),
        ("DELETE", f"{FILES}/{NAME}"),
    ):
        response = client.open(path, method=method, headers=headers, data=PROFILES if method == "POST" else b"")
        assert response.status_code == 400, (method, path)
        assert NAME not in response.text
        assert (response.json or {})["message"] in (receiver.NO_TOKEN, receiver.WRONG_TOKEN)
    assert visible(folder) == {NAME: HISTOGRAMS}
    assert receipts(folder) == []


def test_a_token_stands_in_no_log_answer_receipt_or_file(
    make_server: Callable[..., Server], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server("--log-level", "debug", "--access-logfile", "-", token=SECRET)
    answers = []
    for token in (SECRET, WRONG):
        headers = {**HEADERS, "token": token}
        for body in (HISTOGRAMS, PROFILES, PROFILES, INVALID, b""):
            answers.append(curl(server.files, "--data-binary", "@-", headers=headers, send=body))
        answers.append(curl(server.files, f"-Ffile=@{DATA / 'h1_all.root'}", headers=headers))
        answers.append(curl(server.files, "-Fother=x", headers=headers))
        for path in (FILES, f"{FILES}/{NAME}", f"{FILES}/x", "/", "/nothing", "/rest/api/runs/123", "/rest/api/health"):
            answers.append(curl(server.url + path, headers=headers))
        answers.append(curl(server.url + "/metrics", headers=headers))
        answers.append(curl(server.files, "-XDELETE", headers=headers))
        answers.append(
            curl(server.files, "--data-binary", "@-", headers={**headers, "runNumber": "x"}, send=HISTOGRAMS)
        )
        shutil.rmtree(folder / ".receipts", ignore_errors=True)
        (folder / ".receipts").write_text("in the way, so that the receiver fails")
        answers.append(curl(server.files, "--data-binary", "@-", headers=headers, send=HISTOGRAMS))
        (folder / ".receipts").unlink()
    assert {200, 400, 404, 405} <= {answer.status for answer in answers}
    assert {answer.status for answer in answers} & {500, 503}
    server.stop()
    said = [repr(answer) for answer in answers] + [server.log.read_text(errors="replace")]
    for found in folder.rglob("*"):
        said += [str(found), found.read_bytes().decode("latin-1") if found.is_file() else ""]
    assert any("Traceback" in text or "Listening" in text for text in said)
    digests = [hashlib.sha256(token.encode()).hexdigest() for token in (SECRET, WRONG)]
    for text in said:
        for secret in (SECRET, WRONG, *digests):
            assert secret not in text, text[max(0, text.index(secret) - 300) : text.index(secret) + 100]


def test_a_malformed_request_never_brings_its_token_into_an_answer_or_the_log(
    make_server: Callable[..., Server],
) -> None:
    server = make_server("--log-level", "debug", token=SECRET)
    for request in MALFORMED:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as peer:
            peer.sendall(request.replace(b"%b", SECRET.encode()))
            peer.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := peer.recv(65536):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 "), (request, answer)
        assert SECRET.encode() not in answer, (request, answer)
    server.stop()
    log = server.log.read_text()
    lines = [line for line in log.splitlines() if SECRET.lower() in line.lower()]
    assert lines == []


def test_no_exception_log_line_or_representation_holds_a_token(
    make_app: Callable[..., receiver.Receiver], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    app = make_app(token=SECRET)
    failures: list[BaseException] = []
    refuse = receiver.refuse

    def noting(request: receiver.AgentRequest, error: Exception) -> Response:
        failures.append(error)
        return refuse(request, error)

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(receiver, "refuse", noting)
    client = Client(app)
    for token in (SECRET, WRONG):
        headers = {**HEADERS, "token": token}
        client.post(FILES, headers=headers, data=INVALID)
        client.post(FILES, headers={**headers, "amoreAgent": "/"}, data=INVALID)
        client.post(FILES, headers=headers, data={"x": "y"})
        client.get("/nothing", headers=headers)
    with monkeypatch.context() as patch:
        patch.setattr(storage.Storage, "accept", fail)
        assert client.post(FILES, headers={**HEADERS, "token": SECRET}, data=HISTOGRAMS).status_code == 500
    assert len(failures) == 9
    said = [text for failure in failures for text in texts_of(failure)]
    said += [caplog.text, repr(app), repr(app.settings), str(vars(app)), str(vars(app.storage))]
    assert "Input/output error" in caplog.text
    for text in said:
        assert SECRET not in text and WRONG not in text


@pytest.mark.parametrize(
    "content",
    [
        f"{SECRET}\n",
        f"name = {SECRET}\n",
        f"[tokens]\n{SECRET}\n",
        f"[tokens]\nname = {SECRET}\n",
        f"[tokens]\n{SECRET} = name\n",
        f"[tokens]\nname = {'0' * 64}\nname = {SECRET}\n",
        f"[tokens]\n[tokens]\nname = {SECRET}\n",
        f"[{SECRET}\n",
        f"[{SECRET}]\nname = {'0' * 64}\n",
        f"[tokens]\nname = {'0' * 63}é {SECRET}\n",
    ],
)
def test_a_token_in_a_mistaken_token_file_stands_in_no_exception(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(content)
    with pytest.raises(receiver.ConfigurationError) as caught:
        receiver.create_app(settings(tmp_path / "data", token="", tokens_file=str(file)))
    assert "TOKENS_FILE" in str(caught.value)
    for text in texts_of(caught.value):
        assert SECRET not in text


# --- names -------------------------------------------------------------------------------------------------------------

OUTSIDE = "outside.root"  # beside the data folder
NAMES = [
    "..",
    ".",
    "",
    f"../{OUTSIDE}",
    f"..%2f{OUTSIDE}",
    f"....//{OUTSIDE}",
    f"./{NAME}",
    f"/{NAME}",
    f"//{NAME}",
    f"{NAME}/",
    f"{NAME}/.",
    f"{NAME}/../{NAME}",
    f"x/../{NAME}",
    f"..\\{OUTSIDE}",
    f"{NAME}\0",
    f"{NAME}\0.txt",
    f"\0{NAME}",
    f"{NAME}\n",
    f"{NAME} ",
    NAME.upper(),
    ".receipts",
    ".receipts/1.jsonl",
    f".replaced/{NAME}",
    f".incoming/{NAME}",
    f".hidden_{NAME}",
    "/etc/passwd",
    "../../../../../../../etc/passwd",
    "file:///etc/passwd",
    "~root",
    "*",
    "?",
    "x" * 255,
    "x" * 256,
    "x" * 5000,
    "x/" * 5000,
    "\udcff",
    "é\u202e",
]


@pytest.fixture
def served(client: Client, folder: Path) -> Client:
    """A client of a receiver with a file, others of the same name where it must not be found, and one beside the folder."""
    assert client.post(FILES, headers=HEADERS, data=PROFILES).status_code == 200
    assert client.post(FILES, headers=HEADERS, data=HISTOGRAMS).status_code == 200
    (folder.parent / OUTSIDE).write_text(SECRET)
    for path in (folder / f".hidden_{NAME}", folder / ".replaced" / NAME, folder / ".incoming" / NAME):
        path.write_text(SECRET)
    (folder / ".receipts" / "1.jsonl").write_text(SECRET)
    return client


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:40])
def test_no_other_name_than_that_of_a_file_leads_to_one(served: Client, folder: Path, name: str) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    quoted = quote(name.encode("utf-8", "surrogateescape"), safe="")
    for path in (
        f"{FILES}/{name.encode('utf-8', 'surrogateescape').decode('latin-1')}",
        f"{FILES}/{quoted}",
        f"{FILES}?filename={quoted}",
        f"/rest/api/runs/{quoted}",
    ):
        target, _, query = path.partition("?filename=")
        with served.get(
            FILES,
            headers=HEADERS,
            environ_overrides={"PATH_INFO": target, "QUERY_STRING": f"filename={query}" if query else ""},
        ) as response:
            # A trailing slash is no part of a name.
            allowed = {200, 400, 404} if name in ("", f"{NAME}/") else {400, 404}
            assert response.status_code in allowed, (path, response.data)
            assert SECRET.encode() not in response.data and b"root:" not in response.data
            assert response.data == HISTOGRAMS or response.json is not None
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:40])
def test_what_a_sender_calls_a_file_leads_nowhere(client: Client, folder: Path, name: str) -> None:
    for header in ("amoreAgent", "runNumber", "timeStamp", "dataStatus"):
        with_name = {**HEADERS, header: ""}
        response = client.post(
            FILES,
            headers=with_name,
            data=HISTOGRAMS,
            environ_overrides={f"HTTP_{header.upper()}": name.encode("utf-8", "surrogateescape").decode("latin-1")},
        )
        # The letters x may be an agent's.
        assert response.status_code == 400 and header in (response.json or {})["message"], response.text
    quoted = name.replace("\\", "\\\\").replace('"', '\\"').encode("utf-8", "surrogateescape")
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n%b\r\n--x--\r\n'
    response = client.post(
        FILES, headers=HEADERS, data=form % (quoted, HISTOGRAMS), content_type="multipart/form-data; boundary=x"
    )
    assert response.status_code in (200, 400)
    assert visible(folder) == ({NAME: HISTOGRAMS} if response.status_code == 200 else {})
    assert sorted(path.name for path in folder.parent.iterdir()) == ["data"]
    assert list((folder / ".incoming").iterdir()) == []


@pytest.mark.parametrize(
    "path",
    [
        "/../outside.root",
        "/%2e%2e/outside.root",
        "/%2e%2e%2foutside.root",
        "/..%2foutside.root",
        "/..%252foutside.root",
        "/%c0%ae%c0%ae/outside.root",
        "/..;/outside.root",
        f"/{NAME}%00",
        f"/{NAME}%00.txt",
        f"/%2f{NAME}",
        f"//{NAME}",
        f"/.%2f{NAME}",
        f"/x%2f..%2f{NAME}",
        "/.receipts%2f123.jsonl",
        "/.receipts/123.jsonl",
        "/%2ereceipts",
        "/%ff%fe",
        "?filename=../outside.root",
        "?filename=..%2foutside.root",
        f"?filename={NAME}%00",
        f"?filename={NAME}&filename=../outside.root",
        "?filename=.receipts/123.jsonl",
        "?filename=%ff",
        "?filename=",
    ],
)
def test_encoded_paths_lead_nowhere_on_a_server(shared: tuple[Server, Path], path: str) -> None:
    server, _ = shared
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", FILES + path, headers=HEADERS)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert response.status in (400, 404), (response.status, body)
    assert response.headers["Content-Type"] == "application/json"
    assert SECRET.encode() not in body


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    base = tmp_path_factory.mktemp("secrets")
    server = Server(settings(base / "data"), base / "gunicorn.log", ())
    assert curl(server.files, "--data-binary", "@-", send=HISTOGRAMS).status == 200
    (base / OUTSIDE).write_text(SECRET)
    yield server, base / "data"
    server.stop()


# --- what is no regular file -------------------------------------------------------------------------------------------


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # its address must be short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def make_directory(path: Path) -> None:
    path.mkdir()
    (path / "within").write_text(SECRET)


def make_link_outside(path: Path) -> None:
    (path.parent.parent / OUTSIDE).write_text(SECRET)
    path.symlink_to(path.parent.parent / OUTSIDE)


def make_link_inside(path: Path) -> None:
    (path.parent / ".secret").write_text(SECRET)
    path.symlink_to(".secret")


def make_link_to_same_bytes(path: Path) -> None:
    (path.parent.parent / OUTSIDE).write_bytes(HISTOGRAMS)
    path.symlink_to(path.parent.parent / OUTSIDE)


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "nothing")


def make_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def make_link_to_directory(path: Path) -> None:
    path.symlink_to("/etc")


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("a device cannot be made here")


KINDS = [
    make_fifo,
    make_socket,
    make_directory,
    make_link_outside,
    make_link_inside,
    make_link_to_same_bytes,
    make_dangling_link,
    make_link_to_itself,
    make_link_to_directory,
    make_device,
]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_what_is_no_regular_file_is_neither_listed_nor_served(
    client: Client, folder: Path, make: Callable[[Path], None]
) -> None:
    make(folder / NAME)
    assert client.get(FILES, headers=HEADERS).json == {"files": []}
    for path in (f"{FILES}/{NAME}", f"{FILES}?filename={NAME}", f"{FILES}/{NAME}/within"):
        for method in ("GET", "HEAD"):
            response = client.open(path, method=method, headers=HEADERS)
            assert response.status_code == 404
            assert SECRET not in response.text


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_an_upload_takes_its_name_from_what_is_no_regular_file_and_follows_no_link(
    client: Client, folder: Path, make: Callable[[Path], None]
) -> None:
    make(folder / NAME)
    outside = {path: path.read_bytes() for path in folder.parent.iterdir() if path.is_file()}
    response = client.post(FILES, headers=HEADERS, data=io.BytesIO(HISTOGRAMS))
    assert response.status_code == 200 and (response.json or {}).get("replaced") is True, response.text
    assert stat.S_ISREG((folder / NAME).lstat().st_mode)
    assert (folder / NAME).read_bytes() == HISTOGRAMS
    assert {path: path.read_bytes() for path in folder.parent.iterdir() if path.is_file()} == outside
    assert len(list((folder / ".replaced").iterdir())) == 1
    assert client.get(FILES, headers=HEADERS).json == {"files": [NAME]}


@pytest.mark.parametrize(
    "make", [make_fifo, make_socket, make_directory, make_link_outside], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("subfolder", [".incoming", ".rejected", ".replaced", ".receipts"])
def test_strange_things_in_the_subfolders_do_no_harm(
    make_app: Callable[..., receiver.Receiver], folder: Path, subfolder: str, make: Callable[[Path], None]
) -> None:
    make_app()
    make(folder / subfolder / "strange")
    client = Client(make_app(max_rejected="6000"))
    for body, status in ((HISTOGRAMS, 200), (PROFILES, 200), (INVALID, 400), (INVALID, 400)):
        assert client.post(FILES, headers=HEADERS, data=body).status_code == status
    assert client.get("/rest/api/runs", headers=HEADERS).status_code == 200
    assert client.get("/metrics").status_code == 200
    there = visible(folder)
    there.pop(OUTSIDE, None)
    assert there == {NAME: PROFILES}
