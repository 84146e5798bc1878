"""openapi.json is true: it has every route, and the real server gives no other answer; docs/api.md agrees with it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from client import FILES, HEADERS, HISTOGRAMS, PROJECT, TOKEN, post
from server import Server
from werkzeug.test import Client

import receiver

DOCUMENT: dict[str, Any] = json.loads((PROJECT / "openapi.json").read_text())
PAGE = (PROJECT / "docs" / "api.md").read_text()
METHODS = {"get", "head", "post", "put", "patch", "delete", "options", "trace"}
OPERATIONS = {
    (method, path): item[method] for path, item in DOCUMENT["paths"].items() for method in item if method in METHODS
}

# Checks of schemathesis that do not hold here, rightly: a wrong token is answered 400, not 401 (senders know that), and a
# request that fits the document may be refused (not every file is a ROOT file, and a run may be unknown).
NOT_HERE = "ignored_auth,positive_data_acceptance"


def resolve(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item of the document, or the component that it refers to."""
    if "$ref" not in item:
        return item
    _, kind, name = item["$ref"].removeprefix("#/").split("/")
    component: dict[str, Any] = DOCUMENT["components"][kind][name]
    return component


def parameters(method: str, path: str) -> set[tuple[str, str]]:
    """Return place and name of an operation's parameters."""
    items = DOCUMENT["paths"][path].get("parameters", []) + OPERATIONS[method, path].get("parameters", [])
    return {(resolve(item)["in"], resolve(item)["name"]) for item in items}


# --- the document and the server ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(shared: Server) -> Server:
    """A server that has the file and run of the document's examples."""
    named = DOCUMENT["components"]["parameters"]
    headers = {name: str(named[name]["example"]) for name in ("runNumber", "timeStamp", "amoreAgent")}
    answer = post(shared.port, HISTOGRAMS, {"token": TOKEN, **headers}).json
    assert answer["filename"] == named["name"]["example"]
    return shared


def run_schemathesis(server: Server, *arguments: str) -> None:
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed")
    source = f"{server.url}/rest/api/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "run", source, "--url", server.url]
    command += ["-H", f"token: {TOKEN}", "--exclude-checks", NOT_HERE, "--generation-deterministic", *arguments]
    run = subprocess.run(command, cwd=server.log.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    generated = re.search(r"([0-9]+) generated", run.stdout)
    assert generated, run.stdout
    assert int(generated[1]) > 100, run.stdout


@pytest.mark.parametrize(
    "how",
    [
        "--phases examples,coverage,fuzzing --max-examples 10",
        pytest.param("--max-examples 300", marks=pytest.mark.slow),
    ],
)
def test_server_gives_only_documented_answers(filled: Server, how: str) -> None:
    # "/" answers all methods with 400, so a tool that looks for 405 cannot test it.
    run_schemathesis(filled, "--exclude-path", "/", *how.split())
    assert "Traceback" not in filled.log.read_text()


def test_document_has_every_route_and_no_other(make_app: Callable[..., receiver.Receiver]) -> None:
    routes = {
        (route.method.lower(), re.sub("<(?:path:)?(.*?)>", r"{\1}", route.path)): route for route in make_app().routes
    }
    # HEAD works where GET does; the document has it where it differs. "/" takes all methods.
    assert routes.keys() == {(method, path) for method, path in OPERATIONS if path != "/" and method != "head"}
    for (method, path), route in routes.items():
        assert ("security" in OPERATIONS[method, path]) == (not route.needs_token)
        if route.parameters is not None:
            assert {name for place, name in parameters(method, path) if place == "query"} == route.parameters


def test_document_is_served_without_a_token(client: Client) -> None:
    answer = client.get("/rest/api/openapi.json")
    assert (answer.status_code, answer.mimetype, answer.get_json()) == (200, "application/json", DOCUMENT)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_root_answers_every_method_as_documented(client: Client, method: str) -> None:
    answer = client.open("/", method=method.upper(), headers={"token": TOKEN})
    assert str(answer.status_code) in OPERATIONS[method, "/"]["responses"]


def test_every_operation_with_token_documents_400() -> None:
    for key, operation in OPERATIONS.items():
        assert "security" in operation or "400" in operation["responses"], key


def test_document_has_every_header_and_success_message() -> None:
    assert {("header", name) for name in HEADERS.keys() - {"token"}} <= parameters("post", FILES)
    message = DOCUMENT["components"]["schemas"]["Received"]["properties"]["message"]
    assert message["const"] == receiver.SUCCESS


# --- docs/api.md -------------------------------------------------------------------------------------------------------

SECTIONS = {
    title: text for title, text in re.findall(r"^### `([^`]+)`\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
}


def test_page_has_every_operation_and_no_other() -> None:
    expected = {f"{method.upper()} {path}" for method, path in OPERATIONS if path != "/"}
    assert SECTIONS.keys() == expected | {"/"}


@pytest.mark.parametrize("title", SECTIONS)
def test_page_agrees_with_document(title: str) -> None:
    method, _, path = title.lower().partition(" ") if " " in title else ("get", "", title)
    operation, text = OPERATIONS[method, path], SECTIONS[title]
    found = set()
    for names, place in re.findall(r"^\| (`[^|]*`) \| (header|query|path)\b", text, re.MULTILINE):
        found |= {(place, name) for name in re.findall("`(.*?)`", names)}
    assert found == parameters(method, path)
    answers = re.search(r"^Answers: (.*)\.$", text, re.MULTILINE)
    assert answers is not None
    assert answers[1].split(", ") == sorted(operation["responses"])
    assert ("*No token.*" in text) == (operation.get("security") == [])


def test_page_explains_every_status_code() -> None:
    table = PAGE.partition("## Status codes")[2]
    explained = set(re.findall(r"\d{3}", " ".join(re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE))))
    used = {code for operation in OPERATIONS.values() for code in operation["responses"]}
    assert used <= explained


def test_page_shows_answers_that_fit_the_schemas() -> None:
    shown = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]
    schemas = DOCUMENT["components"]["schemas"]
    for answer, schema in zip(shown, ("Error", "Received", "Run", "Receipts"), strict=True):
        assert set(schemas[schema]["required"]) <= answer.keys() <= schemas[schema]["properties"].keys()
    assert shown[2]["agents"]["EMC"].keys() == schemas["Agent"]["properties"].keys()
    assert shown[3]["receipts"][0].keys() == schemas["Receipt"]["properties"].keys()
