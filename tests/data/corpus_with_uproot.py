"""Write the part of the corpus that a release of uproot writes (see make_corpus.py).

Usage: python corpus_with_uproot.py FOLDER    (in a Python that has uproot 4.1 or later, or uproot3)

    uproot-VERSION          contents of its own, in each compression
    uproot-VERSION-update   files of its own and of CERN ROOT (FOLDER/root), changed with uproot.update

Runs on Python 3.8, on which uproot 3 and 4 run.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, Callable  # noqa: UP035  Python 3.8 needs this one

import numpy as np

try:
    import uproot
except ImportError:
    import uproot3 as uproot  # type: ignore[import-not-found,unused-ignore]  # uproot 3.14's name

VERSION = ".".join(uproot.__version__.split(".")[:2])
RELEASE = tuple(int(part) for part in VERSION.split("."))
Content = Callable[[Any], None]


def histogram(bins: int = 10, seed: int = 1) -> Any:
    return np.histogram(np.random.RandomState(seed).normal(size=100), bins=bins)


def compressions() -> dict[str, Any]:
    algorithms = {"none": None, "zlib": uproot.ZLIB(4), "lzma": uproot.LZMA(5), "lz4": uproot.LZ4(4)}
    if RELEASE >= (4, 1):
        algorithms["zstd"] = uproot.ZSTD(5)
    return algorithms


# --- contents ----------------------------------------------------------------------------------------------------------


def one_histogram(file: Any) -> None:
    file["h"] = histogram()


def histograms(file: Any) -> None:
    for number in range(20):
        file[f"h{number}"] = histogram(10 + 40 * number, number)
    file["h2"] = np.histogram2d(np.arange(20.0), np.arange(20.0), bins=[5, 4])


def zeros(file: Any) -> None:
    file["zeros"] = np.histogram([], bins=20000, range=(0, 1))


def strings(file: Any) -> None:
    for length in (0, 1, 254, 255, 256, 5000):
        file[f"string{length}"] = "s" * length
    file["Δ unicode"] = "日本語"


def same_name(file: Any) -> None:
    for number in range(4):
        file["h"] = histogram(10 * (number + 1))


def directories(file: Any) -> None:
    file["a/b/c/h"] = histogram()
    file["a/h"] = histogram()
    file["d/s"] = "text"


def many_keys(file: Any) -> None:
    for number in range(300):
        file[f"name{number:04}"] = f"text {number}"


def tree(file: Any) -> None:
    made = file.mktree("tree", {"x": "f8", "n": "i4"})
    for _ in range(5):
        made.extend({"x": np.arange(50.0), "n": np.arange(50, dtype="i4")})


def trees(file: Any) -> None:
    file["one"] = {"x": np.arange(10), "y": np.arange(10.0)}
    file["inside/two"] = {"x": np.arange(1000), "flags": np.arange(1000) > 5}
    file.mktree("empty", {"x": "f4"})


def jagged(file: Any) -> None:
    import awkward  # type: ignore[import-untyped,import-not-found,unused-ignore]

    file["jagged"] = {"numbers": awkward.Array([[1.0, 2.0], [], [3.0]]), "n": np.arange(3)}


def vectors(file: Any) -> None:
    file["arrays"] = {"array": np.arange(30.0).reshape(10, 3)}


def many_baskets(file: Any) -> None:
    made = file.mktree("tree", {"x": "f8"}, initial_basket_capacity=2)
    for number in range(40):
        made.extend({"x": np.arange(float(number + 1))})


def deleted(file: Any) -> None:
    for number in range(10):
        file[f"h{number}"] = histogram(10 + number)
    for number in (0, 3, 4, 9):
        del file[f"h{number}"]
    file["later"] = histogram(5)


def rich_histograms(file: Any) -> None:
    from uproot.writing import identify

    edges = np.array([0.0, 1.0, 2.0, 3.0])
    axis = identify.to_TAxis("xaxis", "title", 3, 0.0, 3.0, fXbins=edges)
    data = np.array([0.0, 1.0, 2.0, 3.0, 0.0])
    file["h1"] = identify.to_TH1x("own name", "title", data, 6.0, 1.0, 1.0, 1.0, 1.0, data**2, axis)
    file["list"] = identify.to_TList(
        [identify.to_TObjString("in a list"), identify.to_TObjString("too")], name="own list"
    )
    file["string"] = identify.to_TObjString("text")


def graphs(file: Any) -> None:
    x = np.arange(3.0)
    file["graph"] = uproot.as_TGraph({"x": x, "y": x})
    file["errors"] = uproot.as_TGraph({"x": x, "y": x, "errors": x}, minY=-1.0)


def rntuple(file: Any) -> None:
    import awkward  # type: ignore[import-untyped,import-not-found,unused-ignore]

    made = file.mkrntuple("ntuple", awkward.Array([{"x": 1.0, "n": [1, 2]}, {"x": 2.0, "n": []}]))
    made.extend(awkward.Array([{"x": 3.0, "n": [5]}]))
    file["h"] = histogram()


def rntuples(file: Any) -> None:
    for number in range(3):
        file.mkrntuple(f"ntuple{number}", {"x": np.arange(100 * number), "text": np.arange(100.0 * number)})


CONTENTS: list[Content] = [
    one_histogram, histograms, zeros, strings, same_name, directories, many_keys, tree, trees, jagged, vectors, many_baskets,
    deleted, rich_histograms,
]  # fmt: skip
if RELEASE >= (5, 7):
    CONTENTS += [graphs, rntuple, rntuples]


def tree_of_uproot3(file: Any) -> None:
    file["tree"] = uproot.newtree({"x": "float64", "n": "int32"})
    for _ in range(3):
        file["tree"].extend({"x": np.arange(20.0), "n": np.arange(20, dtype=np.int32)})


def two_strings(file: Any) -> None:
    file["one"] = "text"
    file["two"] = "s" * 300


UPROOT3_CONTENTS: list[Content] = [one_histogram, histograms, zeros, two_strings, same_name, many_keys, tree_of_uproot3]


# --- changes of files that are there -------------------------------------------------------------------------------------


def add_objects(file: Any) -> None:
    file["added"] = histogram()
    file["added text"] = "text"


def add_large(file: Any) -> None:
    file["added directory/h"] = histogram(2000)
    file["added tree"] = {"x": np.arange(100.0)}


def delete_some(file: Any) -> None:
    add_objects(file)
    names = file.keys(recursive=False)
    for name in names[: max(1, len(names) // 2)]:
        if not name.startswith("added"):
            del file[name]


def again(file: Any) -> None:
    for name in file.keys(recursive=False)[:3]:
        file[name.split(";")[0]] = histogram(7)


def change_nothing(file: Any) -> None:
    pass


CHANGES = [add_objects, add_large, again, change_nothing] + ([delete_some] if RELEASE >= (4, 3) else [])


class Corpus:
    """The folder, and what could not be written into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failed: list[str] = []
        self.written = 0

    def write(self, kind: str, name: str, steps: list[tuple[Any, Content]], source: Path | None = None) -> None:
        """Write a file in sessions, each of which opens it and fills it; keep none where uproot fails."""
        path = self.folder / kind / f"{name}.root"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            return
        unfinished = path.with_suffix(".unfinished")
        if source is not None:
            shutil.copyfile(source, unfinished)
        try:
            for opened, content in steps:
                with opened(unfinished) as file:
                    content(file)
        except Exception as error:  # noqa: BLE001  what this release cannot write is no part of the corpus
            self.failed.append(f"{kind}/{name} ({type(error).__name__})")
            unfinished.unlink()
            return
        unfinished.rename(path)
        self.written += 1


def created(compression: Any) -> Any:
    return lambda path: uproot.recreate(str(path), compression=compression)


def updated(path: Path) -> Any:
    return uproot.update(str(path))


def write_updates(corpus: Corpus, fresh: Any) -> None:
    kind = f"uproot-{VERSION}-update"
    for number, content in enumerate(CONTENTS):
        for shift in (0, 1):
            change = CHANGES[(number + shift) % len(CHANGES)]
            steps = [(fresh, content), (updated, change)]
            corpus.write(kind, f"own-{content.__name__}-{change.__name__}", steps)
        corpus.write(kind, f"own-{content.__name__}-six_sessions", [(fresh, content)] + [(updated, add_objects)] * 6)
    corpus.write(kind, "own-one_histogram-120_sessions", [(fresh, one_histogram)] + [(updated, one_histogram)] * 120)
    every = 1 if RELEASE >= (5, 7) else 2
    for number, source in enumerate(sorted((corpus.folder / "root").glob("*.root"))):
        if number % every == 0:
            change = CHANGES[number // every % len(CHANGES)]
            corpus.write(kind, f"root-{source.stem}-{change.__name__}", [(updated, change)], source)
        if number % 10 == 0:
            steps = [(updated, CHANGES[i % len(CHANGES)]) for i in range(8)]
            corpus.write(kind, f"root-{source.stem}-eight_sessions", steps, source)
    for number, source in enumerate(sorted((corpus.folder / "root-merged").glob("*.root"))[:: 3 * every]):
        corpus.write(kind, f"merged-{source.stem}", [(updated, CHANGES[number % 3])], source)


def main(folder: Path) -> None:
    corpus = Corpus(folder)
    contents = CONTENTS if RELEASE >= (4, 1) else UPROOT3_CONTENTS
    for name, compression in compressions().items():
        for content in contents:
            corpus.write(f"uproot-{VERSION}", f"{content.__name__}-{name}", [(created(compression), content)])
    if RELEASE >= (4, 1):
        write_updates(corpus, created(uproot.ZLIB(1)))
    print(f"uproot {uproot.__version__}: {corpus.written} files written; not: {', '.join(corpus.failed) or 'none'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
