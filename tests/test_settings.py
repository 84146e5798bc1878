"""The settings: environment variables and the token file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from client import FILES, NAME, PROFILES, TOKEN, digest, get, send, settings, visible, write_tokens
from werkzeug.test import Client

import receiver
from receiver_settings import ConfigurationError, Settings, Token

MakeApp = Callable[..., receiver.Receiver]
SECRET = "vErY-sEcReT-tOkEn-0123456789"


def read(folder: Path, **more: str) -> Settings:
    return Settings.read(settings(folder, **more))


# --- environment -------------------------------------------------------------------------------------------------------

NOT_SIZES = ("x", "-1", "1.5", "1 GiB", "1e9", "١", " 1", "0x10", "9" * 30, "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKEN", None),
        ("TOKEN", ""),
        ("TOKEN", " x"),
        ("TOKEN", "x,y"),
        ("TOKEN", "x\ny"),
        *((name, value) for name in ("MAX_FILE_SIZE", "MIN_FREE_SPACE", "MAX_REJECTED") for value in NOT_SIZES),
        ("AGENTS", "EMC A.B"),
        ("AGENTS", "EMC,HLT"),
        ("AGENTS", "-x"),
        ("METRICS", "yes"),
        ("METRICS", ""),
        ("JSROOT", "/nowhere"),
        ("TOKENS_FILE", "/nowhere"),
        ("TOKENS_FILE", "/"),
        ("DATA_FOLDER", "{file}"),
        ("DATA_FOLDER", "{file}/below"),
        ("DATA_FOLDER", "/proc/nowhere"),
        ("DATA_FOLDER", "{base}/" + "x" * 300),
        ("TOKNE", "x"),
        ("PORT", "8080"),
        ("SERVICE", "x"),
        ("token", "x"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_wrong_setting_is_named_in_one_line(tmp_path: Path, name: str, value: str | None) -> None:
    (tmp_path / "file").write_text("not a folder")
    environ = settings(tmp_path / "data")
    environ.pop(f"DQM_RECEIVER_{name}", None)
    if value is not None:
        environ[f"DQM_RECEIVER_{name}"] = value.format(file=tmp_path / "file", base=tmp_path)
    with pytest.raises(ConfigurationError, match=f"DQM_RECEIVER_{name}") as error:
        receiver.create_app(environ)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_variables_of_kubernetes_are_no_mistakes(folder: Path) -> None:
    address = "tcp://10.0.0.1:8080"
    kubernetes = {
        "SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "8080", "SERVICE_PORT_HTTP": "8080", "PORT": address,
        "PORT_8080_TCP": address, "PORT_8080_TCP_PROTO": "tcp", "PORT_8080_TCP_PORT": "8080", "PORT_8080_TCP_ADDR": "10.0.0.1",
    }  # fmt: skip
    assert read(folder, **kubernetes) == read(folder)


def test_settings_have_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = receiver.create_app({"DQM_RECEIVER_TOKEN": TOKEN})
    assert app.storage.folder == tmp_path / "data"
    known = app.settings
    assert (known.max_file_size, known.min_free_space, known.max_rejected) == (2 << 30, 1 << 30, 256 << 20)
    assert (known.agents, known.metrics, known.jsroot) == ((), True, None)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_settings_are_read_once_from_the_mapping(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQM_RECEIVER_DATA_FOLDER", str(tmp_path / "wrong"))
    monkeypatch.setenv("DQM_RECEIVER_TOKEN", "wrong")
    environ = settings(folder)
    client = Client(receiver.create_app(environ))
    environ.clear()
    assert send(client).status_code == 200
    assert visible(folder) == {NAME: PROFILES}
    assert not (tmp_path / "wrong").exists()


def test_token_may_have_any_printable_characters(make_app: MakeApp) -> None:
    client = Client(make_app(token="Tökén ☃"))
    # A client sends UTF-8, which a server hands on as latin-1.
    sent = {"HTTP_TOKEN": "Tökén ☃".encode().decode("latin-1")}
    assert client.get(FILES, environ_overrides=sent).status_code == 200


# --- the token file ----------------------------------------------------------------------------------------------------

LINES = f"""\
# who sends
[tokens]
EMC = {digest("one")} {digest("two").upper()}
  emc={digest("three")}
hlt.A-1_x = {digest("four")}

[readers]
; the page
page = {digest("five")}
[agents]
EMC = EMC EMC_2
"""


def test_token_file_says_who_may_do_what(folder: Path, tmp_path: Path) -> None:
    tokens = read(folder, token="", tokens_file=write_tokens(tmp_path / "tokens.ini", LINES)).tokens
    assert {token.name: (len(token.digests), token.may_send, token.agents) for token in tokens} == {
        "EMC": (2, True, ("EMC", "EMC_2")),
        "emc": (1, True, ()),
        "hlt.A-1_x": (1, True, ()),
        "page": (1, False, ()),
    }


def test_each_token_is_found_by_its_name(folder: Path, tmp_path: Path) -> None:
    known = read(folder, tokens_file=write_tokens(tmp_path / "tokens.ini", LINES))

    def name_of(token: str) -> str | None:
        found = known.find_token(token)
        return found.name if isinstance(found, Token) else None

    expected = {"one": "EMC", "two": "EMC", "three": "emc", "four": "hlt.A-1_x", "five": "page", TOKEN: "default"}
    assert {token: name_of(token) for token in expected} == expected
    assert [name_of(token) for token in ("", "EMC", "six", "one ", digest("one"))] == [None] * 5


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        ("", None, "has no line|not set"),
        ("[tokens]\n", None, "has no line|not set"),
        (f"EMC = {digest('x')}\n", 1, "below"),
        (f"[token]\nEMC = {digest('x')}\n", 1, r"\[tokens\], \[readers\] or \[agents\]"),
        ("[tokens]\n\n# x\nEMC\n", 4, "name = "),
        ("[tokens]\nEMC =\n", 2, "SHA-256"),
        (f"[tokens]\nEMC = {digest('x')[:-1]}\n", 2, "SHA-256"),
        (f"[tokens]\nEMC = {digest('x')}0\n", 2, "SHA-256"),
        (f"[tokens]\nEMC = {digest('x')},{digest('y')}\n", 2, "SHA-256"),
        (f"[tokens]\nEMC = {'g' * 64}\n", 2, "SHA-256"),
        (f"[tokens]\nE C = {digest('x')}\n", 2, "name = "),
        (f"[tokens]\n{'E' * 65} = {digest('x')}\n", 2, "name = "),
        (f"[tokens]\nHLT = {digest('x')}\nHLT = {digest('y')}\n", 3, "HLT stands here twice"),
        (f"[tokens]\nHLT = {digest('x')}\n[readers]\nHLT = {digest('y')}\n", 4, "HLT stands here twice"),
        (f"[tokens]\nHLT = {digest('x')}\n[agents]\nHLT = A\nHLT = B\n", 5, "HLT stands here twice"),
        (f"[tokens]\nHLT = {digest('x')}\n[agents]\nEMC = EMC\n", 4, "no token EMC"),
        (f"[readers]\nHLT = {digest('x')}\n[agents]\nHLT = EMC\n", 4, "no token HLT"),
        (f"[tokens]\nHLT = {digest('x')}\n[agents]\nHLT =\n", 4, "no agent at all"),
        (f"[tokens]\nHLT = {digest('x')}\n[agents]\nHLT = A.B\n", 4, "cannot be an agent"),
        (f"[tokens]\nEMC = {digest('x')}\n\xff\xfe\n", None, "UTF-8"),
    ],
)
def test_mistake_in_a_token_file_has_its_line(
    folder: Path, tmp_path: Path, text: str, where: int | None, reason: str
) -> None:
    path = tmp_path / "tokens.ini"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=reason) as error:
        read(folder, token="", tokens_file=str(path))
    message = str(error.value)
    assert len(message.splitlines()) == 1
    if where:
        assert message.startswith(f"DQM_RECEIVER_TOKENS_FILE {path}, line {where}: ")
    else:
        assert "DQM_RECEIVER_TOKEN" in message


def test_default_is_the_name_of_one_token(folder: Path, tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.ini", f"[tokens]\ndefault = {digest('x')}\n")
    assert read(folder, token="", tokens_file=path).tokens[0].name == "default"
    with pytest.raises(ConfigurationError, match="default"):
        read(folder, tokens_file=path)


def texts_of(error: BaseException | None) -> Iterator[str]:
    """Yield what an exception and all behind it that a traceback shows say."""
    while error is not None:
        yield f"{error} {error!r} {error.args} {vars(error)}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@pytest.mark.parametrize(
    "text",
    [
        f"{SECRET}\n",
        f"name = {SECRET}\n",
        f"[tokens]\n{SECRET}\n",
        f"[tokens]\nname = {SECRET}\n",
        f"[tokens]\n{SECRET} = name\n",
        f"[tokens]\nname = {'0' * 64}\nname = {SECRET}\n",
        f"[{SECRET}\n",
        f"[{SECRET}]\nname = {'0' * 64}\n",
        f"[tokens]\nname = {'0' * 63}é {SECRET}\n",
    ],
)
def test_token_in_a_wrong_file_stays_unsaid(folder: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(folder, token="", tokens_file=write_tokens(tmp_path / "tokens.ini", text))
    assert [said for said in texts_of(caught.value) if SECRET in said] == []


@pytest.mark.parametrize(("mode", "warnings"), [(0o644, 1), (0o604, 1), (0o640, 0), (0o600, 0)], ids=oct)
def test_token_file_for_all_eyes_is_warned_about(
    make_app: MakeApp, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warnings: int
) -> None:
    path = write_tokens(tmp_path / "tokens.ini", LINES, mode)
    client = Client(make_app(tokens_file=path))
    for _ in range(3):
        get(client, FILES, token="one")
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == warnings
    assert all(path in one and digest("one") not in one for one in said)
