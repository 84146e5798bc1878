"""A real browser for tests, and packages of npm that they use."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client import PROJECT, TOKEN
from playwright.sync_api import Browser, Page, Request, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CACHE = PROJECT / ".cache" / "npm"
PATIENCE = 20_000  # ms, for what happens at once on an idle machine

JSROOT = "jsroot@7.11.2"
AXE = "axe-core@4.14.1"

# What must not happen in any test is noted from before the page's first line on.
_WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}`));
"""


def npm_package(package: str) -> Path:
    """Return the folder of an unpacked npm package, fetched once; skip the test where that fails."""
    folder = CACHE / package
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            try:
                run = subprocess.run(
                    ["npm", "pack", "--json", package], cwd=name, check=True, capture_output=True, timeout=120
                )
            except (OSError, subprocess.SubprocessError) as error:
                pytest.skip(f"npm does not give {package}: {error}")
            archive = Path(name) / json.loads(run.stdout)[0]["filename"]
            with tarfile.open(archive) as packed:
                packed.extractall(name, filter="data")
            (Path(name) / "package").rename(folder)
    return folder


def jsroot_folder(folder: Path) -> Path:
    """Make the folder that DQM_RECEIVER_JSROOT names, as the documented line does."""
    package = npm_package(JSROOT)
    (folder / "base").mkdir(parents=True)
    shutil.copy(package / "build/jsroot.min.js", folder)
    for name in ("zstd.mjs", "lzma.mjs"):
        shutil.copy(package / "modules/base" / name, folder / "base")
    return folder


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM) as browser:
        yield browser


class Tab(contextlib.AbstractContextManager["Tab"]):
    """A tab in a profile of its own; it notes requests and errors. Nothing may go wrong in it."""

    def __init__(self, browser: Browser, url: str, token: str | None = TOKEN, **context: Any) -> None:
        options = {"viewport": {"width": 1300, "height": 900}, "timezone_id": "America/New_York", **context}
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE)
        self.page: Page = self.context.new_page()
        self.page.add_init_script(_WATCH)
        if token:
            self.page.add_init_script(f"sessionStorage.setItem('dqm-token', {json.dumps(token)})")
        self.view, self.loads = f"{url}/view/", 0
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def open(self, fragment: str = "") -> Page:
        """Load the page with a view; without another query, the browser would only change the view."""
        self.loads += 1
        self.requests.clear()
        self.page.goto(f"{self.view}?{self.loads}{fragment}")
        return self.page

    def follow(self, fragment: str) -> Page:
        """Go to a view as a link does: the page stays loaded, and JSROOT with it."""
        if not self.loads or self.page.url.endswith(fragment):
            return self.open(fragment)
        self.page.evaluate(
            """fragment => new Promise((resolve) => {
              addEventListener("hashchange", () => resolve(), { once: true });
              location.hash = fragment;
            })""",
            fragment,
        )
        return self.page

    def refresh(self) -> None:
        """Let the page refresh now, as it does when its tab comes into view."""
        self.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

    def draw_all(self) -> list[str]:
        """Scroll until every object has been drawn or explained; return the state of each."""
        states: list[str] = self.page.evaluate(
            """async () => {
              const end = Date.now() + 60_000;
              const next = () => document.querySelector("section[data-waits]")
                ?? document.querySelector("figure[data-state=waiting], figure[data-state=drawing]")
                ?? (document.querySelector("figure.object, section.group, .empty") ? null : document.body);
              for (let open; (open = next()) && Date.now() < end;) {
                open.scrollIntoView({ block: "center" });
                await new Promise((resolve) => setTimeout(resolve, 20));
              }
              return [...document.querySelectorAll("figure.object")].map((figure) => figure.dataset.state);
            }"""
        )
        return states

    def faults(self) -> list[str]:
        """Return what must not happen: violations of the page's policy, and errors."""
        violations: list[str] = self.page.evaluate("window.violations ?? []")
        harmless = ("Failed to load resource", "text rect not calcualted")  # a refused request; JSROOT on an odd title
        return violations + [error for error in self.errors if not error.startswith(harmless)]

    def __exit__(self, *_: object) -> None:
        faults = self.faults()
        self.context.close()
        assert faults == []
