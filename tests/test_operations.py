"""What operators get: alert rules, a dashboard, and docs/operations.md, against a real Prometheus and a real receiver."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from client import FILES, HEADERS, HISTOGRAMS, PROJECT, curl, post, settings, wait_until, write_tokens
from server import Server, adapted, free_port
from werkzeug.test import Client

import receiver

DEPLOY = PROJECT / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
RULES = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
OPERATIONS = (PROJECT / "docs" / "operations.md").read_text()
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
} | {rule["alert"]: rule["expr"] for rule in RULES}
METRIC = re.compile(r"dqm_receiver_\w+")


def promtool(*arguments: str, cwd: Path = DEPLOY) -> str:
    """Run promtool and return its complaints."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    run = subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    return "" if run.returncode == 0 else f"{run.returncode}: {run.stdout}{run.stderr}"


class Prometheus:
    """A real Prometheus that scrapes a server each second, with the scrape job of docs/operations.md."""

    def __init__(self, base: Path, target: str) -> None:
        if shutil.which("prometheus") is None:
            pytest.skip("Prometheus is not installed")
        (job,) = re.findall(r"```yaml\n(scrape_configs:.*?)```", OPERATIONS, re.DOTALL)
        config = yaml.safe_load(job)
        config["scrape_configs"][0] |= {"scrape_interval": "1s", "static_configs": [{"targets": [target]}]}
        (base / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.address = f"127.0.0.1:{free_port()}"
        options = [f"--config.file={base}/prometheus.yml", f"--storage.tsdb.path={base}/tsdb"]
        with (base / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(
                ["prometheus", *options, f"--web.listen-address={self.address}"], stdout=log, stderr=log
            )

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the vector that an expression evaluates to; raises HTTPError for one that is wrong."""
        text = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://{self.address}/api/v1/query?{text}", timeout=30) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return result

    def has(self, expression: str) -> bool:
        with contextlib.suppress(OSError):  # it does not answer yet
            return bool(self.query(expression))
        return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def use(server: Server) -> None:
    """Have a file stored, one rejected, one checked and a request refused."""
    curl(f"{server.url}/rest/api/check", "--data-binary", "@-", send=HISTOGRAMS)
    post(server.port, HISTOGRAMS)
    post(server.port, b"rubbish")
    post(server.port, HISTOGRAMS, {**HEADERS, "token": "wrong"})


@pytest.fixture(scope="module")
def exposition(shared: Server) -> str:
    """What a receiver shows in /metrics that has accepted and refused files."""
    use(shared)
    return curl(f"{shared.url}/metrics", headers={}).body.decode()


@pytest.fixture(scope="module")
def prometheus(shared: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has seen the receiver's counters grow."""
    use(shared)
    monitor = Prometheus(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{shared.port}")
    try:
        wait_until(lambda: monitor.has("dqm_receiver_uploads_total > 0"), 60)
        use(shared)
        wait_until(lambda: monitor.has("increase(dqm_receiver_validation_seconds_count[1h]) > 0"), 60)
        wait_until(lambda: monitor.has('increase(dqm_receiver_rejections_total{reason="token"}[1h]) > 0'), 60)
        yield monitor
    finally:
        monitor.stop()


# --- alert rules -------------------------------------------------------------------------------------------------------


def test_alert_rules_pass_their_tests() -> None:
    assert promtool("check", "rules", "alerts.yml") == ""
    assert promtool("test", "rules", "alerts_test.yml") == ""


def test_every_alert_has_a_test_that_fires() -> None:
    tests = yaml.safe_load((DEPLOY / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in RULES}


def test_every_alert_is_explained() -> None:
    for rule in RULES:
        assert f"| `{rule['alert']}` |" in OPERATIONS


def test_documented_scrape_job_is_valid(tmp_path: Path) -> None:
    (job,) = re.findall(r"```yaml\n(scrape_configs:.*?)```", OPERATIONS, re.DOTALL)
    (tmp_path / "prometheus.yml").write_text(job)
    assert promtool("check", "config", "prometheus.yml", cwd=tmp_path) == ""


# --- metrics -----------------------------------------------------------------------------------------------------------


def families(text: str) -> dict[str, str]:
    """Return the metrics of an exposition: name, as PromQL uses it, and type."""
    found = dict(re.findall(r"^# TYPE (dqm_receiver_\w+) (\w+)$", text, re.MULTILINE))
    for name in [name for name, kind in found.items() if kind == "histogram"]:
        found |= {f"{name}_{part}": "histogram" for part in ("bucket", "count", "sum")}
    return found


def test_queries_use_only_exposed_metrics(exposition: str) -> None:
    for title, expression in QUERIES.items():
        assert set(METRIC.findall(expression)) - {"dqm_receiver"} <= families(exposition).keys(), title


def test_every_metric_is_explained(exposition: str) -> None:
    explained = set(re.findall(r"^\| `(dqm_receiver_\w+)", OPERATIONS, re.MULTILINE))
    assert explained == {name for name in families(exposition) if not re.search("_(bucket|count|sum|created)$", name)}


def test_every_refusal_reason_is_explained(exposition: str) -> None:
    reasons = set(re.findall(r'^dqm_receiver_rejections_total\{.*reason="(\w+)"', exposition, re.MULTILINE))
    assert {"token", "invalid_root_file"} <= reasons
    assert reasons <= set(re.findall(r"`(\w+)`", OPERATIONS.partition("### Reasons")[2].partition("\n#")[0]))


@pytest.mark.parametrize("title", QUERIES)
def test_queries_work_in_prometheus(prometheus: Prometheus, title: str) -> None:
    expression = QUERIES[title].replace("$folder", ".*").replace("$__rate_interval", "1h")
    result = prometheus.query(expression)
    if title.startswith("Dqm"):  # alerts: most are silent now, but without their threshold they must have values
        result = prometheus.query(re.sub(r"(==|[<>]) [\d .*]+( or .*)?$", "", expression))
    assert result, expression
    assert all(sample["value"][1] != "NaN" for sample in result), result


# --- docs/operations.md ------------------------------------------------------------------------------------------------


def section(title: str) -> str:
    return OPERATIONS.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_example_of_token_file_works(tmp_path: Path) -> None:
    (example,) = re.findall(r"```ini\n(.*?)```", section("Tokens"), re.DOTALL)
    tokens = write_tokens(tmp_path / "tokens.ini", example)
    client = Client(receiver.create_app(settings(tmp_path / "data", tokens_file=tokens, token="")))
    headers = {**HEADERS, "token": "foo"}  # the sum of HLT
    assert client.post(FILES, data=HISTOGRAMS, headers=headers).status_code == 200
    headers["token"] = "bar"  # the sum of shifters
    assert client.post(FILES, data=HISTOGRAMS, headers=headers).status_code == 403
    assert client.get(FILES, headers={"token": "bar"}).status_code == 200


def test_commands_for_a_missing_file_work(shared: Server, tmp_path: Path) -> None:
    text = section("Why has run 300005 no EMC file?")
    post(shared.port, HISTOGRAMS, {**HEADERS, "runNumber": "300005", "amoreAgent": "EMC"})
    (tmp_path / "header").write_text(f"token: {HEADERS['token']}\n")
    commands = re.findall("`(curl -H @header .*?)`", text, re.DOTALL)
    assert len(commands) == 4
    for command in commands:
        line = command.replace("curl ", "curl -sSf ").replace("\n", " ")
        environ = {**os.environ, "URL": f"{shared.url}/rest/api"}
        run = subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run
        assert json.loads(run.stdout)


def test_documented_grep_finds_refusals(shared: Server) -> None:
    sent_as = {**HEADERS, "runNumber": "300005", "amoreAgent": "EMC"}
    post(shared.port, HISTOGRAMS, {**sent_as, "timeStamp": "yesterday"})
    post(shared.port, HISTOGRAMS, {**sent_as, "token": "wrong"})
    (grep,) = re.findall("(grep -E '[^']*')", section("Why has run 300005 no EMC file?"))
    lines = shared.log.read_text()
    found = subprocess.run(["sh", "-c", grep], input=lines, capture_output=True, text=True, check=True).stdout
    assert re.findall(r'reason_class="(\w+)"', found) == ["headers", "token"]


def test_documented_commands_add_and_replace_tokens(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.ini"
    tokens.write_text("[tokens]\n[agents]\nHLT = testagent\n")
    changes = {
        "/opt/dqm-receiver/bin/dqm-receiver": f"{sys.executable} {PROJECT}/receiver.py",
        "/etc/dqm-receiver/tokens.ini": str(tokens),
        "systemctl": ": ",
    }
    scripts = re.findall(r"```sh\n(\(umask.*?)```", section("Tokens"), re.DOTALL)
    made = []
    for script in scripts:
        subprocess.run(["sh", "-ec", adapted(script, changes)], cwd=tmp_path, check=True)
        made.append((tmp_path / "HLT.txt").read_text().splitlines()[2].strip())
        client = Client(receiver.create_app(settings(tmp_path / "data", tokens_file=str(tokens))))
        for token in made:
            assert client.post(FILES, data=HISTOGRAMS, headers={**HEADERS, "token": token}).status_code == 200
    assert len(made) == 2
    assert (tmp_path / "HLT.txt").stat().st_mode & 0o777 == 0o600


def test_holder_of_the_lock_is_found(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    (command,) = re.findall(r"(grep .*) /proc/locks", OPERATIONS)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        line = f"{command} /proc/locks".replace("/srv/dqm/.lock", str(lock))
        run = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert run.stdout.split()[4:5] == [str(os.getpid())]


# --- the dashboard -----------------------------------------------------------------------------------------------------


def test_dashboard_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24 and taken.setdefault((x, y), panel["title"]) == panel["title"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
