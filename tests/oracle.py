"""Compare rootcheck with CERN ROOT on a folder of ROOT files, and list where they differ, by kind.

Usage: python tests/oracle.py FOLDER --python PYTHON [--answers FILE] [--all]

PYTHON is one that has PyPI's `root`, which is CERN ROOT itself. With --answers ROOT is asked only about files that FILE
has no answer for (by path, size and time), and what it says is kept there. --all lists explained differences, too.

ROOT's answer (ask_root.py) is right: a file is valid if ROOT opens it in silence and lists keys. Of a valid file,
rootcheck must give the same keys, stored classes and names. The folder may have folders in it; what is in one called
`flipped` is damaged on purpose: rootcheck may refuse more of that than ROOT complains of.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parent.parent))
from rootcheck import InvalidRootFile, RootObject, check_root_file

ASK_ROOT = Path(__file__).with_name("ask_root.py")
PROCESSES = 2
LONGEST_NAME = 1000  # characters; rootcheck cuts off the rest
BATCH = 200  # files between two times that what ROOT said is kept
NO_ANSWER: dict[str, Any] = {"status": "no answer", "messages": "", "objects": {}}
SECONDS = 6 * 3600  # for all files
DAMAGED = "flipped"
LISTED = 5  # differences of one kind, by name


class Difference(NamedTuple):
    """A difference between rootcheck and ROOT: `refused`, `accepted`, `keys`, `class`, `name` or `fault`."""

    what: str
    path: str  # relative to the folder
    root: str
    here: str

    @property
    def kind(self) -> str:
        """A text that is the same for files that differ in the same way."""
        said = self.here if self.what in ("refused", "fault") else self.root if self.what == "accepted" else ""
        if self.what in ("name", "class"):
            said = self.root.split(" ")[0]  # the class
        said = re.sub(r"'[^']*'|\"[^\"]*\"|\bfile \S+", "...", said.split("\n")[0])
        return f"{self.what:8} {Path(self.path).parent}: {re.sub(r'-?[0-9]+', 'N', said)[:160]}"


class Explained(NamedTuple):
    """Differences that are known and right: a pattern for the path and one for the answers."""

    what: str
    path: str
    said: str
    reason: str


EXPLAINED = (
    Explained("refused", "*", "*uproot 3*", "uproot 3's records cannot be walked one after another; the reason says so"),
    Explained("accepted", "*", "complains: Warning in <TFile::Init>: no StreamerInfo found*", "ROOT says only that it knows "
              "no older versions of the classes"),
    Explained("refused", "uproot-4.1*/*strings*", "*", "uproot 4.1 counts characters, not bytes, of names: records overlap"),
    Explained("refused", "uproot-4.1-update/root-names*", "*", "the same, of names that are not ASCII"),
    Explained("refused", "uproot-4.3-update/own-jagged-delete_some*", "*zeros from byte*", "uproot 4.3 lost the room of "
              "a record, which is zeros now, as of a lost sector"),
    Explained("name", "*", "TParticle *", "the name of its PDG code; rootcheck reports the key's"),
    Explained("name", "*", "TGaxis *", "its own, usually empty; rootcheck reports the key's"),
    Explained("refused", "header/*", "*free segments*", "the header contradicts the list of free segments"),
    Explained("refused", "header/*", "*streamer info at byte*the header says*", "the header contradicts the streamer info"),
    Explained("refused", "header/*no_free_list*", "*", "the header names no list of free segments, and there is one"),
    Explained("refused", "geant4/variant-free_segments_7*", "*", "the header contradicts the list of free segments"),
    Explained("refused", "geant4/variant-inner_cycle_3*", "*", "no writer gives these keys a cycle but 0 and 1"),
)  # fmt: skip


def root_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.root") if path.is_file())


def ask_root(python: str, paths: Sequence[Path]) -> list[dict[str, Any] | None]:
    """Return ROOT's answer about each file, or None where its process ended without one."""
    answers: list[dict[str, Any] | None] = [None] * len(paths)

    def ask(numbers: list[int]) -> None:
        while numbers:
            lines = "".join(f"{paths[number]}\n" for number in numbers)
            command = [python, str(ASK_ROOT)]
            run = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=SECONDS, check=False)
            given = run.stdout.split("\n")[:-1]
            for number, line in zip(numbers, given, strict=False):
                answers[number] = json.loads(line)
            numbers = numbers[len(given) + 1 :]  # the one without an answer ended the process
            if not given and run.returncode:
                raise RuntimeError(run.stderr[-2000:])

    threads = [
        threading.Thread(target=ask, args=(list(range(turn, len(paths), PROCESSES)),)) for turn in range(PROCESSES)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def root_answers(folder: Path, python: str, kept: Path | None = None) -> dict[str, dict[str, Any]]:
    """Return ROOT's answer about each file of a folder, by its path there."""
    paths = root_files(folder)
    identities = {}
    for path in paths:
        status = path.stat()
        identities[path] = [status.st_size, status.st_mtime_ns]
    known: dict[str, Any] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    new = [path for path in paths if known.get(str(path), {}).get("identity") != identities[path]]
    for start in range(0, len(new), BATCH):
        batch = new[start : start + BATCH]
        for path, answer in zip(batch, ask_root(python, batch), strict=True):
            known[str(path)] = {"identity": identities[path], **(answer or NO_ANSWER)}
        if kept:
            kept.write_text(json.dumps(known))
    return {str(path.relative_to(folder)): known[str(path)] for path in paths}


def check(path: Path) -> tuple[dict[str, RootObject] | None, str]:
    """Return the objects that rootcheck finds in a file, or None and its reason."""
    try:
        return check_root_file(path), ""
    except InvalidRootFile as error:
        return None, str(error) or "no reason"


def compare(path: str, root: dict[str, Any], here: dict[str, RootObject] | None, reason: str) -> list[Difference]:
    said = f"{root['status']}: {root['messages']}"
    if root["status"] != "valid":
        return [] if here is None else [Difference("accepted", path, said, "accepted")]
    if here is None:
        return [] if DAMAGED in Path(path).parts else [Difference("refused", path, said, reason)]
    objects = root["objects"]
    if set(here) != set(objects):
        only = [sorted(set(objects) - set(here)), sorted(set(here) - set(objects))]
        return [Difference("keys", path, f"only ROOT: {only[0]}", f"only rootcheck: {only[1]}")]
    found = []
    for key, facts in objects.items():
        mine = here[key]
        # ROOT stores TDirectoryFile under its old name, TDirectory, and reads it as TDirectoryFile.
        class_name = "TDirectoryFile" if mine.class_name == "TDirectory" else mine.class_name
        if class_name != facts["class"]:
            found.append(Difference("class", path, f"{key}: {facts['class']}", f"{key}: {class_name}"))
        if facts["name"] is not None and mine.name != facts["name"][:LONGEST_NAME]:
            found.append(Difference("name", path, f"{facts['class']} {key}: {facts['name']}", f"{key}: {mine.name}"))
    return found


def explanation(difference: Difference) -> str | None:
    """Return why a difference is right, or None."""
    for known in EXPLAINED:
        said = f"{difference.root}\n{difference.here}"
        if (
            known.what == difference.what
            and fnmatch.fnmatchcase(difference.path, known.path)
            and fnmatch.fnmatchcase(said, known.said)
        ):
            return known.reason
    return None


class Report:
    """The differences and agreements of all files of a folder."""

    def __init__(self, folder: Path, answers: dict[str, dict[str, Any]]) -> None:
        self.differences: list[Difference] = []
        self.files: Counter[str] = Counter()  # by writer, which is the folder of a file
        self.valid: Counter[str] = Counter()
        self.agree: Counter[str] = Counter()
        self.names = 0
        self.stricter = 0  # damaged files that rootcheck refuses and ROOT opens in silence
        for path, root in answers.items():
            found = self._compare(folder, path, root)
            writer = str(Path(path).parent)
            self.files[writer] += 1
            self.valid[writer] += root["status"] == "valid"
            self.agree[writer] += not found
            self.differences += found

    def _compare(self, folder: Path, path: str, root: dict[str, Any]) -> list[Difference]:
        try:
            here, reason = check(folder / path)
        except Exception as error:  # noqa: BLE001  any exception but InvalidRootFile is a fault of rootcheck
            return [Difference("fault", path, root["status"], f"{type(error).__name__}: {error}")]
        if here is not None:
            self.names += sum(facts["name"] is not None for facts in root["objects"].values())
        elif root["status"] == "valid" and DAMAGED in Path(path).parts:
            self.stricter += 1
        return compare(path, root, here, reason)

    @property
    def unexplained(self) -> list[Difference]:
        return [difference for difference in self.differences if explanation(difference) is None]

    def table(self) -> str:
        """Return a Markdown table of the writers."""
        only_explained = {found.path for found in self.differences} - {found.path for found in self.unexplained}
        explained = Counter(str(Path(path).parent) for path in only_explained)
        lines = [
            "| files of | files | valid for ROOT | agree | differ, explained | differ |",
            "|---|---|---|---|---|---|",
        ]
        for writer in sorted(self.files):
            differ = self.files[writer] - self.agree[writer] - explained[writer]
            counts = (self.files[writer], self.valid[writer], self.agree[writer], explained[writer], differ)
            lines.append(f"| {writer} | {' | '.join(map(str, counts))} |")
        totals = [sum(column.values()) for column in (self.files, self.valid, self.agree, explained)]
        totals.append(totals[0] - totals[2] - totals[3])
        lines.append(f"| **all** | {' | '.join(map(str, totals))} |")
        return "\n".join(lines)


def listed(differences: Iterable[Difference]) -> str:
    """Return the differences by kind, a few of each."""
    kinds: defaultdict[str, list[Difference]] = defaultdict(list)
    for difference in differences:
        kinds[difference.kind].append(difference)
    lines = []
    for kind, members in sorted(kinds.items(), key=lambda item: -len(item[1])):
        lines.append(f"{len(members):4} x {kind}")
        for difference in members[:LISTED]:
            lines.append(f"         {difference.path}")
            lines.append(f"             ROOT: {difference.root[:200]!r}")
            lines.append(f"             rootcheck: {difference.here[:200]!r}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    report = Report(arguments.folder, root_answers(arguments.folder, arguments.python, arguments.answers))
    print(report.table())
    print(f"\n{report.names} names compared; {report.stricter} damaged files refused that ROOT opens in silence\n")
    print(listed(report.differences if arguments.all else report.unexplained))
    sys.exit(bool(report.unexplained))


if __name__ == "__main__":
    main()
