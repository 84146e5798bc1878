"""openapi.json is true: the real server gives no answer that is not in it, and it has every route."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import FILES, HEADERS, HISTOGRAMS, PROJECT, TOKEN, Server, settings
from werkzeug.test import Client

import receiver

DOCUMENT: dict[str, Any] = json.loads((PROJECT / "openapi.json").read_text())
METHODS = {"get", "head", "post", "put", "patch", "delete", "options", "trace"}

# What schemathesis expects of every interface and this one rightly does not do: 401 for a wrong token (senders know 400),
# and taking whatever the document allows (not every file is a ROOT file, and a run may be unknown).
NOT_HERE = "ignored_auth,positive_data_acceptance"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has what the examples in the document ask for."""
    base = tmp_path_factory.mktemp("openapi")
    server = Server(settings(base / "data"), base / "gunicorn.log", ("--workers", "1"))
    client = Client(receiver.create_app(settings(base / "data")))
    named = {
        name: str(one["example"]) for name, one in DOCUMENT["components"]["parameters"].items() if "example" in one
    }
    headers = {name: named[name] for name in ("runNumber", "timeStamp", "amoreAgent")}
    answer = client.post(FILES, data=HISTOGRAMS, headers={"token": TOKEN, **headers})
    assert answer.get_json()["filename"] == DOCUMENT["paths"]["/rest/api/files/{name}"]["parameters"][0]["example"]
    yield server
    server.stop()


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


def test_the_server_gives_no_answer_that_is_not_documented(filled: Server) -> None:
    # "/" answers whatever method with 400, and so is no path for a tool that looks for 405.
    run_schemathesis(filled, "--exclude-path", "/", "--phases", "examples,coverage,fuzzing", "--max-examples", "10")
    assert "Traceback" not in filled.log.read_text()


@pytest.mark.slow
def test_the_server_gives_no_answer_that_is_not_documented_however_long_one_asks(filled: Server) -> None:
    run_schemathesis(filled, "--exclude-path", "/", "--max-examples", "1000")
    assert "Traceback" not in filled.log.read_text()


def test_the_document_has_every_route_and_no_other(make_app: Callable[..., receiver.Receiver]) -> None:
    routes: dict[str, set[str]] = {}
    for rule in make_app().routes.iter_rules():
        methods = {method.lower() for method in rule.methods} if rule.methods else METHODS
        routes.setdefault(re.sub("<(.*?)>", r"{\1}", rule.rule), set()).update(methods)
    documented = {path: set(item) & METHODS for path, item in DOCUMENT["paths"].items()}
    assert documented.keys() == routes.keys()
    for path, methods in routes.items():
        # What is said of GET is true of HEAD.
        assert documented[path] | {"head"} == methods | {"head"}, path


def test_the_document_is_given_out_without_a_token(make_app: Callable[..., receiver.Receiver]) -> None:
    answer = Client(make_app()).get("/rest/api/openapi.json")
    assert answer.status_code == 200
    assert answer.mimetype == "application/json"
    assert answer.get_json() == DOCUMENT


def test_every_answer_with_a_token_may_be_a_400_that_names_it() -> None:
    for path, item in DOCUMENT["paths"].items():
        for method in set(item) & METHODS:
            operation = item[method]
            assert ("400" in operation["responses"]) == ("security" not in operation), (path, method)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_root_answers_every_method_as_documented(client: Client, method: str) -> None:
    answer = client.open("/", method=method.upper(), headers={"token": TOKEN})
    assert str(answer.status_code) in DOCUMENT["paths"]["/"][method]["responses"]


def test_the_answers_in_the_readme_have_what_the_schemas_require() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    text = "".join(re.findall(r"```json\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL))
    answers: list[dict[str, Any]] = []
    while text:
        answer, end = json.JSONDecoder().raw_decode(text)
        answers.append(answer)
        text = text[end:].lstrip()
    received, runs, run = answers
    for schema, answer in [("Received", received), ("Runs", runs), ("Run", run)]:
        assert answer.keys() == set(schemas[schema]["required"])
    for agent in run["agents"].values():
        assert agent.keys() == set(schemas["Agent"]["required"])


def test_the_document_has_every_header_and_the_words_of_success() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for name in HEADERS.keys() - {"token"}:
        assert name in DOCUMENT["components"]["parameters"]
    assert schemas["Received"]["properties"]["message"]["const"] == receiver.SUCCESS
