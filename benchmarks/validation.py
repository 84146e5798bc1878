"""Validation alone, beside CERN ROOT that opens the file and reads every key, in one process and in turn.

Command: python benchmarks/validation.py [--rounds 15] [--folder FOLDER]
Needs: PyPI's `root`.

For each file: check_root_file against ROOT, the share of uproot in it, its time for each key; for the tree, ROOT reads
every basket, too (TTree::LoadBaskets). Then: the same with zlib's own inflate in the place of libdeflate, and two threads
that validate at once, against one after the other.

With a rootcheck.py of another version in the environment variable AGAINST, its time in the same rounds, too:
git show 03f6dfa:rootcheck.py > /tmp/rootcheck_before.py; AGAINST=/tmp/rootcheck_before.py python benchmarks/validation.py
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import common
import ROOT

sys.path.insert(0, str(common.PROJECT))
import rootcheck
import second_reader

FILES = {
    "h1": "1 TH1F",
    "h10": "10 TH1F",
    "h100": "100 TH1F",
    "h1000": "1000 TH1F",
    "h5000": "5000 TH1F",
    "objarrays": "20 TObjArrays of 25 histograms",
    "th2d": "20 TH2D of 250×250",
    "th2f": "200 TH2F of 100×100",
    "tree": "TTree, zlib",
}


def read_with_root(path: Path) -> dict[str, str]:
    """Do what receivers did before."""
    received = {}
    root_file = ROOT.TFile.Open(str(path))
    for key in root_file.GetListOfKeys():
        obj = key.ReadObj()
        received[key.GetName()] = f"Obj name: {obj.GetName()}, Obj IsA() Name: {obj.IsA().GetName()}"
        if path.stem == "tree":
            obj.LoadBaskets(1 << 40)
    root_file.Close()
    return received


def check(path: Path) -> dict[str, str]:
    return {name: found.description for name, found in rootcheck.check_root_file(path).items()}


def other_version() -> Callable[[Path], object] | None:
    """Return check_root_file of the version to compare with."""
    if "AGAINST" not in os.environ:
        return None
    spec = importlib.util.spec_from_file_location("rootcheck_before", os.environ["AGAINST"])
    if spec is None or spec.loader is None:
        raise ValueError(f"no module: {os.environ['AGAINST']}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found: Callable[[Path], object] = module.check_root_file
    return found


def seconds(do: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Return the processor time of a function, as the machine may do other things, too; or its time by another clock."""
    began = clock()
    do()
    return clock() - began


def medians(
    rounds: int, dos: Sequence[Callable[[], object]], clock: Callable[[], float] = time.process_time
) -> list[float]:
    """Return the median seconds of functions that are run in turn, round after round; the first one does not count."""
    runs = [[seconds(do, clock) for do in dos] for _ in range(rounds + 1)][1:]
    return [median(times) for times in zip(*runs, strict=True)]


class Timed:
    """A function, and the seconds that its last call took."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        began = time.process_time()
        try:
            return self.function(*arguments)
        finally:
            self.seconds = time.process_time() - began


def beside_root(path: Path, rounds: int) -> tuple[list[float], float]:
    """Return the seconds of check_root_file and of ROOT, and the share of uproot in the former."""
    uproot, shares = Timed(second_reader.compare_with_uproot), []

    def timed() -> None:
        took = seconds(partial(check, path))
        shares.append(uproot.seconds / took)

    with mock.patch.object(rootcheck, "compare_with_uproot", uproot):
        return medians(rounds, (timed, partial(read_with_root, path))), median(shares)


def check_with_zlib(path: Path) -> None:
    with mock.patch("deflate.zlib_decompress", lambda stored, size: zlib.decompress(stored, bufsize=size)):
        check(path)


def check_in_two_threads(path: Path) -> None:
    threads = [threading.Thread(target=check, args=(path,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    options = common.options(__doc__, rounds=15)
    before = other_version()
    gc.freeze()  # so that collections during a validation do not look at the modules
    rows, more, changes = [], [], []
    for name, content in FILES.items():
        path = common.file(options.folder, name)
        if check(path) != read_with_root(path):
            raise RuntimeError(f"{path}: ROOT reads other objects")
        rounds = options.rounds * (20 if path.stat().st_size < 100_000 else 1)
        (ours, root), share = beside_root(path, rounds)
        if before:
            now, then = medians(rounds, (partial(rootcheck.check_root_file, path), partial(before, path)))
            changes.append([content, f"{now / then:.2f} ({now * 1e3:.2f} ms of {then * 1e3:.2f} ms)"])
        keys = len(check(path))
        rows.append(
            [
                f"{content}, {path.stat().st_size / 1e6:.2g} MB",
                f"{ours / root:.2f} ({ours * 1e3:.2f} ms of {root * 1e3:.2f} ms)",
                f"{share:.0%}",
                f"{ours / keys * 1e6:.0f} µs" if name.startswith("h") else "",
            ]
        )
        if path.stat().st_size > 20_000:
            dos = (partial(check, path), partial(check_with_zlib, path), partial(check_in_two_threads, path))
            alone, zlibs, two = medians(options.rounds, dos, time.perf_counter)
            more.append([content, f"{alone / zlibs:.2f}", f"{two / (2 * alone):.2f}"])
    print(common.table(["file", "check_root_file of ROOT's time", "share of uproot", "for each key"], rows), "\n")
    print(common.table(["file", "libdeflate of zlib's time", "two at once of one after the other"], more))
    if changes:
        print("\n" + common.table(["file", "check_root_file of its time before"], changes))


if __name__ == "__main__":
    main()
