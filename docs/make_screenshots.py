"""Make the README's pictures of the page: `python docs/make_screenshots.py` in a checkout with the tests' packages."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import uproot

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "tests")]

from browser import Tab, chromium, jsroot_folder
from client import HEADERS, post, settings
from server import Server

RUN = 300005
AGENTS = "EMC HLT ITS TPC TRD ZDC"
SIZE = {"width": 1200, "height": 720}


def emcal_file(path: Path) -> bytes:
    """Return a file such as the calorimeter's agent sends."""
    random = np.random.default_rng(1)
    energy = random.exponential(1.5, 20_000)
    eta, phi = random.normal(0, 0.35, 20_000), random.normal(2.2, 0.5, 20_000)
    with uproot.recreate(path) as file:
        file["hClusterEnergy"] = np.histogram(energy, bins=80, range=(0, 10))
        file["hClusterEtaPhi"] = np.histogram2d(eta, phi, bins=(48, 48), range=((-0.7, 0.7), (1.4, 3.2)))
        file["hCellTime"] = np.histogram(random.normal(600, 14, 20_000), bins=80, range=(520, 680))
        file["hClustersPerEvent"] = np.histogram(random.poisson(17, 20_000), bins=40, range=(0, 40))
        file["hTowerOccupancy"] = np.histogram2d(
            random.integers(0, 48, 9_000), random.integers(0, 24, 9_000), bins=(48, 24), range=((0, 48), (0, 24))
        )
        file["hTriggerPatchEnergy"] = np.histogram(random.gamma(3, 2, 20_000), bins=80, range=(0, 30))
    return path.read_bytes()


def main() -> None:
    """Take data for a while, with what goes wrong in it, and take pictures."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        server = Server(
            settings(base / "data", jsroot=str(jsroot_folder(base / "jsroot")), agents=AGENTS), base / "log", ()
        )
        try:
            content = emcal_file(base / "emcal.root")
            begin = int(time.time()) - 600
            answers = []
            for run in (RUN - 2, RUN - 1, RUN):
                for minute in range(6):
                    for offset, agent in enumerate(AGENTS.split()[:-1]):
                        body = content[: len(content) // 2] if agent == "TPC" and minute in (2, 3) else content
                        status = {0: "1", 5: "2" if agent == "HLT" else "0"}.get(minute, "0")
                        stamp = begin + minute * 60 + offset * 3
                        headers = {"runNumber": str(run), "amoreAgent": agent, "timeStamp": str(stamp)}
                        answers.append(post(server.port, body, {**HEADERS, **headers, "dataStatus": status}).json)
            file = next(
                answer["filename"] for answer in reversed(answers) if answer.get("filename", "").startswith("EMC")
            )
            pictures = (
                (f"#run={RUN}", "tbody tr", "page-run.png"),
                (f"#file={file}", "figure[data-state=drawn] >> nth=5", "page-file.png"),
            )
            with chromium() as browser, Tab(browser, server.url, viewport=SIZE, timezone_id="Europe/Zurich") as tab:
                for fragment, seen, picture in pictures:
                    page = tab.open(fragment)
                    page.wait_for_selector(seen)
                    page.screenshot(path=DOCS / picture)
                    print(f"{DOCS / picture}: {(DOCS / picture).stat().st_size} bytes")
        finally:
            server.stop()


if __name__ == "__main__":
    main()
