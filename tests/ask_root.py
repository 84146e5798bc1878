"""Tell whether CERN ROOT opens files in silence, and which objects it finds in them.

Usage: python ask_root.py < PATHS    (in a Python that has PyPI's `root`, which is CERN ROOT itself)

Reads a path from each line and prints a line of JSON for it, in the same order:

    status    "valid", or why not: "complains", "recovered", "zombie", "no keys", "crashes", "hangs"
    messages  what ROOT wrote to its standard error when it opened the file
    objects   by the name of its key, for the newest cycle of each: its stored class, and the name that it gives itself
              (null where ROOT cannot read the object, or where its class has no GetName)

ROOT keeps global state and crashes on damaged files, so each file is opened by a process of its own, and another one
reads its objects. A process that crashes there is followed by one that goes on behind the object it crashed on.
Bytes in names that are no UTF-8 are written as backslash escapes.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

warnings.filterwarnings("ignore", message="\\s*This distribution of ROOT is in alpha stage")
import ROOT

SECONDS = 20.0  # for one process; a small file takes a tenth of a second
MEMORY = 6 << 30  # bytes of address space; ROOT itself takes 2 GiB

# About the reader and not about the file: ROOT says so of each class that this process has no code for.
IGNORED = re.compile(r"Warning in <TClass::Init>: no dictionary for class \S.* is available")

READER = """
std::string Hex(const std::string &text) {  // Python's view of a C string must be UTF-8, ROOT's need not be
    std::string hex;
    for (unsigned char byte : text) hex += TString::Format("%02x", byte).Data();
    return hex;
}
std::string HexName(TKey *key) { return Hex(key->GetName()); }
std::string HexClass(TKey *key) { return Hex(key->GetClassName()); }
std::string OwnName(TKey *key) {
    TClass *type = TClass::GetClass(key->GetClassName());
    if (!type || !type->IsTObject()) return "";  // ReadObj would hand out a pointer to something else
    if (!type->IsLoaded()) return "";  // a class without code here: what ROOT makes of it has another GetName
    TObject *object = key->ReadObj();
    return object ? "=" + Hex(object->GetName()) : "";
}
void WarmUp(const char *path) {
    SetErrorHandler(DefaultErrorHandler);  // Python's own turns warnings into Python's
    for (auto library : {"libHist", "libTree", "libGraf", "libGpad", "libMatrix", "libPhysics", "libRooFit"})
        gSystem->Load(library);
    TFile file(path, "RECREATE");
    for (auto name : {"TH1F", "TH2F", "TProfile", "TGraphErrors", "TTree", "TObjArray", "TObjString", "TNamed", "TPaveText"}) {
        TClass *type = TClass::GetClass(name);
        TObject *object = (TObject *)type->New();
        file.WriteTObject(object, name);
    }
    file.mkdir("directory");
}
"""


def in_child(work: Callable[[], Iterator[str]]) -> tuple[list[str], str, str]:
    """Run a function in a process of its own; return its lines, its standard error, and how it ended."""
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        if not child:
            os.close(read_end)
            _run(work, write_end, errors)
        os.close(write_end)
        text, ended = _read(read_end, time.monotonic() + SECONDS)
        if not ended:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        messages = errors.read().decode(errors="backslashreplace")
    how = "hangs" if not ended else "ended" if status == 0 else "crashes"
    return text.split("\n")[:-1], messages, how


def _run(work: Callable[[], Iterator[str]], write_end: int, errors: BinaryIO) -> None:
    """Be the child: write the function's lines into the pipe and end the process."""
    status = 1
    try:
        os.dup2(errors.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for line in work():
            os.write(write_end, f"{line}\n".encode())
        status = 0
    except Exception as error:  # noqa: BLE001  the process must end here, whatever happens
        os.write(2, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(status)


def _read(read_end: int, deadline: float) -> tuple[str, bool]:
    """Read the pipe to its end; return the text, and whether the end came before the deadline."""
    text = b""
    with open(read_end, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            piece = pipe.read(1 << 16)
            if not piece:
                return text.decode(), True
            text += piece
    return text.decode(), False


def newest_keys(file: Any) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key in file.GetListOfKeys():
        name = ROOT.HexName(key)
        if name not in keys or keys[name].GetCycle() < key.GetCycle():
            keys[name] = key
    return keys


def list_keys(path: str) -> Iterator[str]:
    """Yield what became of the file, then for each key its name and class."""
    try:
        file = ROOT.TFile(path)
    except OSError:  # what Python makes of a zombie
        yield "zombie"
        return
    keys = newest_keys(file)
    yield "recovered" if file.TestBit(ROOT.TFile.kRecovered) else "valid" if keys else "no keys"
    for name, key in keys.items():
        yield f"{name} {ROOT.HexClass(key)}"


def read_objects(path: str, start: int) -> Iterator[str]:
    """Yield the own name of each object from a certain one on, behind "=", or nothing where ROOT cannot read it."""
    file = ROOT.TFile(path)
    for key in list(newest_keys(file).values())[start:]:
        yield str(ROOT.OwnName(key))


def unhex(text: str) -> str:
    return bytes.fromhex(text).decode(errors="backslashreplace")


def own_names(path: str, number: int) -> list[str]:
    names: list[str] = []
    while len(names) < number:
        more, _, how = in_child(partial(read_objects, path, len(names)))
        names += more
        if how != "ended" and len(names) < number:
            names.append("")  # ROOT crashed on this one
        elif not more:
            break
    return names + [""] * (number - len(names))


def describe(path: str) -> dict[str, Any]:
    """Return ROOT's answer about a file."""
    lines, messages, how = in_child(partial(list_keys, path))
    messages = "\n".join(line for line in messages.splitlines() if line.strip() and not IGNORED.match(line))
    answer: dict[str, Any] = {"status": "complains", "messages": messages[:2000], "objects": {}}
    if how != "ended" or not lines:
        answer["status"] = "hangs" if how == "hangs" else "crashes"
    elif lines[0] != "valid" or not messages:
        answer["status"] = lines[0]
    if answer["status"] == "valid":
        keys = [tuple(map(unhex, line.split(" "))) for line in lines[1:]]
        names = own_names(path, len(keys))
        answer["objects"] = {
            key: {"class": class_name, "name": unhex(name[1:]) if name else None}
            for (key, class_name), name in zip(keys, names, strict=True)
        }
    return answer


def warm_up() -> None:
    """Have ROOT load and compile once the code that each child needs, which takes longer than to read a small file."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "warm.root")
        ROOT.WarmUp(path)
        for lines in (list_keys(path), read_objects(path, 0)):
            for _ in lines:
                pass


def main() -> None:
    ROOT.gROOT.SetBatch(True)
    ROOT.gSystem.ResetSignals()  # no stack trace of every crash
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not ROOT.gInterpreter.Declare(READER):
        raise RuntimeError("ROOT refuses the code that reads its names")
    warm_up()
    for line in sys.stdin:
        print(json.dumps(describe(line.rstrip("\n"))), flush=True)


if __name__ == "__main__":
    main()
