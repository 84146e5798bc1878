"""Makes the files that the benchmarks use, with CERN ROOT.

Command: python benchmarks/make_files.py [--folder FOLDER] [NAME ...]
Needs: PyPI's `root`, numpy.

    h1 ... h5000   so many TH1F of 100 bins
    th2d           20 TH2D of 250x250 bins, seven tenths of which are filled: 7 MB
    th2f           200 TH2F of 100x100 bins
    objarrays      20 TObjArrays of 25 TH1F and TH2F each, as ALICE's agents send them
    tree           a TTree of 100 MB, zlib
    tree1000       the same ten times: 1 GB
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import ROOT

HISTOGRAMS = (1, 10, 100, 1000, 5000)
NAMES = (*(f"h{number}" for number in HISTOGRAMS), "th2d", "th2f", "objarrays", "tree", "tree1000")
ZLIB = 101  # algorithm 1, level 1: what ROOT 6 gives a file where nothing is said


def histogram(name: str) -> ROOT.TH1F:
    made = ROOT.TH1F(name, f"title of {name}", 100, -5, 5)
    made.FillRandom("gaus", 1000)
    made.SetDirectory(ROOT.nullptr)
    return made


def plane(kind: type, name: str, bins: int, fills: int, chance: np.random.Generator) -> ROOT.TH2:
    made = kind(name, f"title of {name}", bins, 0, 1, bins, 0, 1)
    made.SetDirectory(ROOT.nullptr)
    made.FillN(fills, chance.random(fills), chance.random(fills), chance.normal(100, 30, fills))
    made.Sumw2(False)  # no second array for the errors
    return made


def make_tree(entries: int, chance: np.random.Generator) -> None:
    """Fill a tree of eight branches: four of noise and four of small counts, which deflate to a fifth."""
    tree = ROOT.TTree("tree", "benchmark")
    values = [np.zeros(16, np.float32) for _ in range(8)]
    for number, value in enumerate(values):
        tree.Branch(f"branch{number}", value, f"branch{number}[16]/F")
    for _ in range(entries // 1000):
        noise = chance.normal(size=(4, 1000, 16))
        content = np.concatenate([noise, chance.poisson(3, size=(4, 1000, 16))]).astype(np.float32)
        for entry in range(1000):
            for number, value in enumerate(values):
                value[:] = content[number, entry]
            tree.Fill()
    tree.Write()


def make(path: Path, name: str) -> None:
    chance = np.random.default_rng(1)
    ROOT.gRandom.SetSeed(1)
    if name == "tree1000":
        chain = ROOT.TChain("tree")
        for _ in range(10):
            chain.Add(str(path.with_name("tree.root")))
        chain.Merge(str(path), "fast")
        return
    made = ROOT.TFile(str(path), "RECREATE", "", ZLIB)
    if name == "tree":
        make_tree(360_000, chance)
    elif name == "objarrays":
        for number in range(20):
            array = ROOT.TObjArray()
            members = [histogram(f"h{number}_{member}") for member in range(20)]
            members += [plane(ROOT.TH2F, f"p{number}_{member}", 50, 2000, chance) for member in range(5)]
            for member in members:
                array.Add(member)
            made.WriteObject(array, f"objects{number}")
    elif name in ("th2d", "th2f"):
        kind, number, bins, fills = (ROOT.TH2D, 20, 250, 75_000) if name == "th2d" else (ROOT.TH2F, 200, 100, 20_000)
        for index in range(number):
            made.WriteTObject(plane(kind, f"plane{index}", bins, fills, chance))
    else:
        for index in range(int(name[1:])):
            made.WriteTObject(histogram(f"histogram{index:04}"))
    made.Close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "dqm-receiver-benchmarks"))
    parser.add_argument("names", nargs="*", metavar="NAME", default=NAMES)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    names = list(arguments.names)
    if "tree1000" in names and "tree" not in names:
        names.insert(0, "tree")
    for name in names:
        path = arguments.folder / f"{name}.root"
        unfinished = path.with_suffix(".unfinished")
        make(unfinished, name)
        unfinished.rename(path)
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
