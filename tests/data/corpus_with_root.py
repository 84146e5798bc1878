"""Write the part of the corpus that CERN ROOT writes (see make_corpus.py).

Usage: python corpus_with_root.py FOLDER    (in a Python that has PyPI's `root`, which is CERN ROOT itself)

Every file is written by a process of its own, in a folder of its kind:

    root            every content of make_test_files.py and those below
    root-none, root-zlib, ...   half of them in each compression
    root-update     every content, opened again with ROOT's UPDATE and changed in some way
    root-renamed    keys renamed and retitled
    root-merged     hadd in its modes, TFileMerger, TBufferMerger, TMemFile, fast clones of trees
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import make_test_files
import ROOT
from make_test_files import OVERWRITE, SINGLE_KEY, content, declare, filled, given_away, h1, h2, h3, in_child, put

PROGRAMS = Path(ROOT.__file__).parent / "bin"
CODECS = {"none": 0, "zlib": 101, "lzma": 207, "old": 306, "lz4": 404, "zstd": 505}
SECONDS = 120  # for a program
Vector = ROOT.std.vector["double"]


# --- more contents -------------------------------------------------------------------------------------------------------


@content
def h1_rare(file: Any) -> None:
    put(file, h1l=h1("h1l", cls="TH1L"), h2l=h2("h2l", "TH2L"), h3l=h3("h3l", "TH3L"))


@content
def h1_buffered(file: Any) -> None:
    buffered = ROOT.TH1D("buffered", "", 10, 1, 0)
    buffered.SetBuffer(100)
    for value in range(20):
        buffered.Fill(value)
    extended = h1("extended")
    extended.SetCanExtend(ROOT.TH1.kAllAxes)
    extended.Fill(1000)
    file.WriteTObject(buffered)
    file.WriteTObject(extended)


@content
def hn_all(file: Any) -> None:
    bins = ROOT.std.vector["int"]([2, 3])
    low, high = Vector([0, 0]), Vector([1, 1])
    for letter in "CSILFD":
        for kind in ("THn", "THnSparse"):
            histogram = getattr(ROOT, kind + letter)(f"h{kind}{letter}", "", 2, bins.data(), low.data(), high.data())
            histogram.Fill(Vector([0.1, 0.5]).data())
            if letter == "D":
                histogram.Sumw2()
            file.WriteTObject(histogram)


@content
def graphs_rare(file: Any) -> None:
    x, e = Vector([1, 2, 3]), Vector([0.1, 0.1, 0.1])
    multi = ROOT.TGraphMultiErrors(
        "own multi errors", "", 3, x.data(), x.data(), e.data(), e.data(), e.data(), e.data()
    )
    put(file, multi=multi, scatter=ROOT.TScatter(3, x.data(), x.data(), x.data(), x.data()))
    put(file, errors2=ROOT.TGraph2DErrors(3), asymmetric2=ROOT.TGraph2DAsymmErrors(3))
    put(file, polar=ROOT.TGraphPolar(3, x.data(), x.data(), e.data(), e.data()))
    put(file, graph_qq=ROOT.TGraphQQ(3, x.data()), volume=ROOT.TPolyMarker3D(3), line3=ROOT.TPolyLine3D(3))
    fitted = ROOT.TGraphErrors(3, x.data(), x.data(), e.data(), e.data())
    fitted.Fit("pol1", "Q0")
    put(file, fitted=fitted)


@content
def efficiencies(file: Any) -> None:
    for name, passed, total in (
        ("one", h1("p1"), h1("t1")),
        ("two", h2("p2"), h2("t2")),
        ("three", h3("p3", "TH3D"), h3("t3", "TH3D")),
    ):
        total.Add(passed)
        efficiency = ROOT.TEfficiency(passed, total)
        efficiency.SetName(f"own {name}")
        put(file, **{name: efficiency, f"{name}_empty": ROOT.TEfficiency(f"empty {name}", "", 5, 0, 1)})


@content
def canvases(file: Any) -> None:
    canvas = ROOT.TCanvas("own divided", "title", 300, 200)
    canvas.Divide(2, 2)
    drawn = [h1("drawn1"), h2("drawn2")]
    for number, histogram in enumerate(drawn, start=1):
        canvas.cd(number)
        histogram.Draw()
    canvas.cd(3)
    legend = ROOT.TLegend(0, 0, 1, 1, "header")
    legend.AddEntry(drawn[0], "entry", "l")
    legend.Draw()
    canvas.cd(4)
    stack = ROOT.THStack("own stack", "")
    stack.Add(h1("stacked"))
    stack.Draw()
    canvas.Update()
    file.WriteTObject(canvas)
    file.WriteTObject(canvas, "under another name")
    file.WriteTObject(ROOT.TCanvas("empty canvas", "", 100, 100), "empty")


@content
def canvas_class_members(file: Any) -> None:
    canvas = ROOT.TCanvas("own fitted", "", 300, 200)
    histogram = h1("fitted")
    histogram.Fit("gaus", "Q")
    histogram.Draw()
    line = ROOT.TLine(0, 0, 1, 1)
    line.Draw()
    text = ROOT.TLatex(0.5, 0.5, "#alpha")
    text.Draw()
    canvas.Update()
    file.WriteTObject(canvas, "fitted canvas")


@content
def paves(file: Any) -> None:
    put(file, pave=ROOT.TPave(0, 0, 1, 1), label=ROOT.TPaveLabel(0, 0, 1, 1, "a label"))
    put(file, diamond=ROOT.TDiamond(0, 0, 1, 1), paves=ROOT.TPavesText(0, 0, 1, 1), pie=ROOT.TPie("own pie", "", 3))
    for cls in ("TPaveText", "TPaveStats", "TPavesText", "TLegend"):
        pave = getattr(ROOT, cls)(0, 0, 1, 1)
        put(file, **{f"unnamed_{cls}": pave})
        pave.SetName(f"own {cls}")
        put(file, **{f"named_{cls}": pave})
    canvas = ROOT.TCanvas("canvas", "", 100, 100)
    histogram = h2("h2")
    histogram.Draw("colz")
    canvas.Update()  # makes the palette
    put(file, palette=histogram.GetListOfFunctions().FindObject("palette"), painted=histogram)


@content
def graphics_rare(file: Any) -> None:
    put(file, crown=ROOT.TCrown(0, 0, 1, 1), arc=ROOT.TArc(0, 0, 1), wavy=ROOT.TCurlyLine(0, 0, 1, 1))
    put(file, mathtext=ROOT.TMathText(0, 0, "x"), link=ROOT.TLink(), annotation=ROOT.TAnnotation(0, 0, 0, "text"))
    put(file, exec=ROOT.TExec("own exec", "1;"), marker3=ROOT.TMarker3DBox(0, 0, 0, 1, 1, 1, 0, 0))
    put(file, cutg=ROOT.TCutG("own cut", 3), frame=ROOT.TFrame(0, 0, 1, 1), button=ROOT.TPad("own pad", "", 0, 0, 1, 1))


@content
def roofit(file: Any) -> None:
    ROOT.RooMsgService.instance().setGlobalKillBelow(ROOT.RooFit.FATAL)
    workspace = ROOT.RooWorkspace("own workspace")
    workspace.factory("Gaussian::g(x[-5,5], mean[0], sigma[1])")
    data = workspace.pdf("g").generate(ROOT.RooArgSet(workspace.var("x")), 20)
    put(file, workspace=workspace, data=data)


@content
def mathematics(file: Any) -> None:
    put(
        file,
        cholesky=ROOT.TMatrixDSym(3),
        formula=ROOT.TFormula("own formula", "sin(x)+[0]"),
        f12=ROOT.TF1("f12", "sin(x)"),
    )
    put(file, quantity=ROOT.TParameter["int"]("own quantity", 3), erf=ROOT.TF1("erf", "TMath::Erf(x)"))
    put(file, s=ROOT.Math.SMatrix["double", 2, 2](), p=ROOT.Math.XYZVector(1, 2, 3), complex=ROOT.TComplex(1, 2))
    put(file, quaternion=ROOT.TQuaternion(1, 2, 3, 4), rotation=ROOT.Math.Rotation3D())


CLASSES = """
struct Point { float x = 1; double y = 2; int n[3] = {1, 2, 3}; };
class Everything { public: int fRun = 1; std::string fText = "text"; std::vector<int> fNumbers{1, 2, 3}; virtual ~Everything() {}
    std::map<std::string, std::vector<double>> fMap{{"a", {1, 2}}}; std::pair<int, float> fPair{1, 2}; std::set<int> fSet{1};
    std::array<float, 4> fArray{}; std::bitset<8> fBits{5};
    std::vector<Point> fPoints{2}; std::list<std::string> fList{"x"}; TString fString = "TString"; bool fBool = true;
    Double32_t fReduced = 1.5; //[0,10,12]
    Float16_t fHalf = 2.5;
    int fCount = 2; float *fPointer = new float[2]{1, 2}; //[fCount]
    enum Kind { kA, kB } fKind = kB; TObject *fObject = new TNamed("inside", ""); TRef fReference; TNamed *fNothing = nullptr;
    std::unordered_map<int, std::string> fHash{{1, "one"}}; std::deque<double> fDeque{1}; std::multimap<int, int> fMulti{{1, 2}};
    std::vector<std::vector<std::string>> fNested{{"a"}, {}}; std::vector<TNamed *> fPointers{new TNamed("p", "")};
    ClassDefInline(Everything, 3) };
class Heir : public TH1F, public Everything { public: Heir() : TH1F("own heir", "", 5, 0, 1) { SetDirectory(nullptr); }
    TClonesArray fClones{"TNamed"}; TObjArray fObjects; TGraph fGraph{3}; TLorentzVector fVector; TArrayI fArray;
    ClassDefInlineOverride(Heir, 2) };
template <typename T> class Box : public TNamed { public: T fValue{}; Box() : TNamed("own box", "") {} ClassDefInlineOverride(Box, 1) };
class Sibling : public Box<int>, public TAttLine { public: Box<std::vector<float>> fBox; ClassDefInlineOverride(Sibling, 7) };
"""


@content
def classes_interpreted(file: Any) -> None:
    for library in ("libHist", "libGraf", "libPhysics"):
        ROOT.gSystem.Load(library)
    declare(CLASSES)
    for name in ("Everything", "Box<int>", "Box<std::string>", "Sibling"):
        thing = getattr(ROOT, name)() if "<" not in name else ROOT.Box[name[4:-1]]()
        put(file, **{name: given_away(thing)})


@content
def classes_in_tree(file: Any) -> None:
    for library in ("libHist", "libGraf", "libPhysics"):
        ROOT.gSystem.Load(library)
    declare(CLASSES)
    for split in (0, 1, 99):
        tree = ROOT.TTree(f"split{split}", "")
        plain, points = ROOT.Everything(), ROOT.std.vector["Point"](3)
        tree.Branch("plain", plain, 32000, split)
        tree.Branch("points", points, 32000, split)
        for _ in range(5):
            tree.Fill()
        tree.Write()
        tree.ResetBranchAddresses()


@content
def stl_keys(file: Any) -> None:
    for name in (
        "vector<int>", "vector<string>", "vector<vector<float>>", "map<int,string>", "set<double>", "list<int>",
        "deque<long>", "pair<string,int>", "array<int,3>", "unordered_map<int,int>", "vector<TNamed>",
        "vector<TH1F>", "multiset<int>", "map<string,TNamed>",
    ):  # fmt: skip
        if cls := ROOT.TClass.GetClass(name):
            file.WriteObjectAny(cls.New(), cls, name)


@content
def tree_branches(file: Any) -> None:
    tree = ROOT.TTree("branches", "of many types")
    things = [
        ROOT.std.vector["vector<double>"]([[1.0], [2.0, 3.0]]),
        ROOT.std.map["string", "int"](),
        ROOT.std.vector["string"](["a", "b"]),
        ROOT.TLorentzVector(1, 2, 3, 4),
        h1("in_tree"),
        ROOT.TClonesArray("TNamed", 3),
        ROOT.TObjString("text"),
        ROOT.std.vector["bool"]([True, False]),
        ROOT.TRefArray(),
    ]
    things[5].ConstructedAt(0).SetName("clone")
    for number, thing in enumerate(things):
        tree.Branch(f"b{number}", thing)
    for _ in range(30):
        tree.Fill()
    tree.BuildIndex("0")
    tree.GetUserInfo().Add(given_away(ROOT.TNamed("user", "info")))
    tree.SetAlias("alias", "b0")
    tree.Write()


@content
def tree_friends(file: Any) -> None:
    trees = []
    for name in ("first", "second"):
        tree = ROOT.TTree(name, "")
        make_test_files.fill_tree(tree, 50)
        trees.append(tree)
    trees[0].AddFriend(trees[1])
    for tree in trees:
        tree.Write()
    trees[0].Write("", OVERWRITE)
    trees[0].AutoSave()


@content
def tree_autosaved(file: Any) -> None:
    tree = ROOT.TTree("autosaved", "")
    number = ROOT.std.vector["int"]([0])
    tree.Branch("number", number.data(), "number/I", 2000)
    tree.SetAutoSave(300)
    tree.SetAutoFlush(100)
    for number[0] in range(3000):
        tree.Fill()
        if number[0] % 700 == 0:
            tree.AutoSave("FlushBaskets" if number[0] % 1400 else "SaveSelf")
    tree.Write()


@content
def tree_big_events(file: Any) -> None:
    tree = ROOT.TTree("sizes", "")
    numbers = ROOT.std.vector["float"]()
    tree.Branch("numbers", numbers)
    for entry in range(200):
        numbers.resize(entry * 10, 1.5)
        tree.Fill()
    tree.OptimizeBaskets()
    tree.Write()
    tree.ResetBranchAddresses()


@content
def rntuple_fields(file: Any) -> None:
    model = ROOT.RNTupleModel.Create()
    types = (
        "int",
        "double",
        "std::string",
        "bool",
        "std::vector<float>",
        "std::vector<std::vector<int>>",
        "std::array<double, 3>",
        "std::pair<int, float>",
        "std::variant<int, float>",
        "std::optional<int>",
        "std::set<int>",
        "std::map<std::string, int>",
        "std::bitset<12>",
    )
    for number, name in enumerate(types):
        model.AddField(ROOT.RFieldBase.Create(f"f{number}", name).Unwrap())
    with ROOT.RNTupleWriter.Append(model, "many_fields", file) as writer:
        entry = writer.CreateEntry()
        for number in range(500):
            writer.Fill(entry)
            if number % 200 == 199:
                writer.CommitCluster()


@content
def rntuple_several(file: Any) -> None:
    for name in ("one", "two"):
        model = ROOT.RNTupleModel.Create()
        model.MakeField["float"]("x")
        with ROOT.RNTupleWriter.Append(model, name, file):
            pass


@content
def many_keys(file: Any) -> None:
    for number in range(1000):
        file.WriteTObject(ROOT.TNamed(f"name{number:04}", "title" * (number % 7)))


@content
def many_directories(file: Any) -> None:
    for number in range(60):
        deeper = file.mkdir(f"d{number}").mkdir("inside").mkdir("deeper")
        if number % 3:
            deeper.WriteTObject(ROOT.TNamed("leaf", ""))
    file.Delete("d7;1")
    file.Get("d8").Delete("inside;1")
    file.rmdir("d9")


@content
def many_deleted(file: Any) -> None:
    for number in range(200):
        file.WriteTObject(h1(f"h{number}", 10 + number % 50))
        if number % 3 == 2:
            file.Delete(f"h{number - 1};1")
            file.Delete(f"h{number - 2};*")
            if number % 4 == 0:
                file.Write()
        if number % 5 == 0:
            h1("same", 5 + number).Write("same", OVERWRITE)
            h1("replaced", 100 - number % 50).Write("replaced", ROOT.TObject.kWriteDelete)


@content
def references(file: Any) -> None:
    things = [ROOT.TNamed(f"referenced{i}", "") for i in range(3)]
    array = ROOT.TRefArray()
    for thing in things:
        array.Add(thing)
    put(file, array=array, ref=ROOT.TRef(things[0]), things=filled(ROOT.TObjArray(), things))


@content
def written_twice_open(file: Any) -> None:
    """Several Write()s of the file between the objects, so that key lists, streamer infos and free lists are replaced."""
    for number in range(6):
        file.WriteTObject([h1, h2][number % 2](f"h{number}"))
        file.mkdir(f"d{number}").WriteTObject(ROOT.TGraph(number + 1), "graph")
        file.Write()
        file.SaveSelf()


@content
def containers_with_everything(file: Any) -> None:
    folder = ROOT.TFolder("own folder", "")
    for thing in (h1("f1"), ROOT.TGraph(3), ROOT.TObjString("x"), ROOT.TF1("f", "x")):
        folder.Add(given_away(thing))
    put(file, folder=folder)
    hash_list = filled(ROOT.THashList(), [h1(f"in_hash{i}") for i in range(5)])
    hash_list.SetName("own hash list")
    hash_list.Write("hash", SINGLE_KEY)
    ordered = filled(ROOT.TSortedList(), [ROOT.TObjString(text) for text in "cab"])
    ordered.Write("sorted", SINGLE_KEY)
    tree = ROOT.TBtree()
    tree.Write("btree", SINGLE_KEY)
    put(file, queue=ROOT.TList(), bits=ROOT.TBits(100), long=ROOT.TArrayL64(3))


# --- changes of files that are there ---------------------------------------------------------------------------------------


def reopened(path: Path, compression: int = 101) -> Any:
    return make_test_files.open_file(path, "UPDATE", compression)


def add_objects(file: Any) -> None:
    file.WriteTObject(h1("added"))
    file.WriteTObject(ROOT.TNamed("added too", "title"))


def overwrite_first(file: Any) -> None:
    h1(file.GetListOfKeys().First().GetName(), 200).Write(file.GetListOfKeys().First().GetName(), OVERWRITE)


def delete_first(file: Any) -> None:
    add_objects(file)
    key = file.GetListOfKeys().First()
    file.Delete(f"{key.GetName()};{key.GetCycle()}")


def add_directory(file: Any) -> None:
    directory = file.mkdir("added directory", "title").mkdir("inside")
    directory.WriteTObject(h2("h"))
    directory.WriteTObject(ROOT.TGraph(3), "graph")


def delete_all_but_one(file: Any) -> None:
    add_objects(file)
    for key in list(file.GetListOfKeys()):
        if key.GetName() != "added":
            key.Delete()
            file.GetListOfKeys().Remove(key)


def change_nothing(file: Any) -> None:
    pass


def write_tree(file: Any) -> None:
    tree = ROOT.TTree("added tree", "")
    make_test_files.fill_tree(tree, 100)
    tree.Write()


CHANGES: tuple[Callable[[Any], None], ...] = (
    add_objects,
    overwrite_first,
    delete_first,
    add_directory,
    delete_all_but_one,
    change_nothing,
    write_tree,
)


def change(path: Path, changes: list[Callable[[Any], None]], compressions: list[int]) -> None:
    for apply, compression in zip(changes, compressions, strict=True):
        file = reopened(path, compression)
        apply(file)
        file.Close()


def renamings() -> dict[str, Callable[[Any], None]]:
    """Return what is done to a key, by its name."""
    return {
        "shorter": lambda key: key.SetName("s"),
        "longer": lambda key: key.SetName(f"{key.GetName()} and a much longer name than before"),
        "equal": lambda key: key.SetName(str(key.GetName())[::-1]),
        "retitled_longer": lambda key: key.SetTitle("another, longer title " * 3),
        "retitled_shorter": lambda key: key.SetTitle(""),
        "both": lambda key: key.SetNameTitle("both renamed", "and retitled"),
        "very_long": lambda key: key.SetName("n" * 300),
        "emptied": lambda key: key.SetName(""),
    }


def rename(path: Path, how: Callable[[Any], None], where: str) -> None:
    """Rename keys at the top, in a directory, that of a directory, or all of them."""
    file = reopened(path)
    keys = list(file.GetListOfKeys())
    directories = [key for key in keys if key.IsFolder() and str(key.GetClassName()).startswith("TDirectory")]
    if where == "directory":
        for key in directories[:1]:
            how(key)
    elif where == "inside":
        for directory in directories[:1]:
            inside = file.Get(directory.GetName())
            for key in list(inside.GetListOfKeys())[:1]:
                how(key)
            inside.SetWritable(True)
            inside.SaveSelf(True)
    else:
        for key in keys if where == "all" else keys[:1]:
            how(key)
    file.WriteTObject(ROOT.TNamed("makes the key list be written", ""))
    file.Close()


def rename_before_close(path: Path, how: Callable[[Any], None]) -> None:
    file = make_test_files.open_file(path)
    for name in "abc":
        file.WriteTObject(h1(name))
    file.mkdir("d").WriteTObject(h1("inside"))
    how(file.GetListOfKeys().At(1))
    how(file.Get("d").GetListOfKeys().At(0))
    how(file.GetListOfKeys().At(3))
    file.Close()


# --- merged files ----------------------------------------------------------------------------------------------------------

HADD = {
    "plain": [], "no_trees": ["-T"], "f0": ["-f0"], "f6": ["-f6"], "f207": ["-f207"], "f404": ["-f404"], "f505": ["-f505"],
    "fk": ["-fk"], "ff": ["-ff"], "optimized": ["-O"], "skip": ["-k"], "two_at_once": ["-n", "2"], "parallel": ["-j", "2"],
    "cache": ["-cachesize", "1M"],
}  # fmt: skip
RENAMED = ("h2_all", "h1_labelled_axis", "directories", "tree", "named_canvas", "alice_objarrays")
MERGED = (
    "h1_all",
    "h2_all",
    "profiles",
    "named_graphs",
    "tree",
    "tree_branches",
    "directories",
    "alice_objarrays",
    "rntuple",
    "cycles",
    "names",
    "efficiencies",
    "classes_in_tree",
    "hn",
    "custom_from_tnamed",
    "many_deleted",
    "stl_keys",
)


def hadd(path: Path, options: list[str], sources: list[Path]) -> None:
    command = [str(PROGRAMS / "hadd"), *options, str(path), *map(str, sources)]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=SECONDS)


def copy_with_root(path: Path, source: Path) -> None:
    ROOT.TFile.Cp(str(source), str(path), False)


def merge_in_memory(path: Path, sources: list[Path], incremental: bool) -> None:
    merger = ROOT.TFileMerger(False, False)
    merger.OutputFile(str(path), "RECREATE", 505)
    for source in sources:
        merger.AddFile(str(source))
        if incremental:
            merger.PartialMerge(ROOT.TFileMerger.kAllIncremental | ROOT.TFileMerger.kKeepCompression)
    if not incremental:
        merger.Merge()


def copy_memory_file(path: Path) -> None:
    file = ROOT.TMemFile(f"{path.name}?reproducible={path.name}", "RECREATE", "", 404)
    for fill in (h1, h2):
        file.WriteTObject(fill(f"in_memory_{fill.__name__}"))
    file.mkdir("d").WriteTObject(h1("h"))
    file.Write()
    if path.stem.endswith("cp"):
        file.Cp(str(path))
    else:
        buffer = ROOT.TBufferFile(ROOT.TBuffer.kWrite, file.GetSize())
        file.CopyTo(buffer)
        path.write_bytes(ROOT.std.string(buffer.Buffer(), file.GetSize()).data())
    file.Close()


def buffer_merger(path: Path) -> None:
    merger = ROOT.TBufferMerger(str(path), "RECREATE", 101)
    for part in range(3):
        file = merger.GetFile()
        file.WriteTObject(h1(f"part{part}"))
        file.Write()
        del file  # the merger may not end before its files


def clone_tree(path: Path, source: Path, option: str) -> None:
    old = ROOT.TFile(str(source))
    file = make_test_files.open_file(path, compression=505)
    trees = [key for key in old.GetListOfKeys() if str(key.GetClassName()) == "TTree"]
    old.Get(trees[0].GetName()).CloneTree(-1, option).Write()
    file.Close()


def snapshot(path: Path, source: Path) -> None:
    ROOT.RDataFrame("events", str(source)).Define("double", "2. * number").Snapshot("snapshot", str(path))


def schema(path: Path, version: int) -> str:
    """A class in one of its versions: merged files hold several."""
    members = "".join(f"int fX{i} = {i}; " for i in range(version))
    declare(f"class Evolving : public TNamed {{ public: {members} std::vector<{'float' if version < 3 else 'double'}> fV; "
            f"Evolving() : TNamed(\"own evolving\", \"\") {{}} ClassDefInlineOverride(Evolving, {version}) }};")  # fmt: skip
    file = make_test_files.open_file(path)
    put(file, **{f"evolving{version}": ROOT.Evolving()})
    file.Close()
    return ""


def update_schema(path: Path) -> None:
    for version in (1, 2, 3, 4):
        part = path.with_suffix(f".v{version}")
        in_child(partial(schema, part, version))
        parts = [path.with_suffix(f".v{number}") for number in range(1, version + 1)]
    hadd(path, [], parts)
    for part in parts:
        part.unlink(missing_ok=True)


# --- all of it -------------------------------------------------------------------------------------------------------------


class Corpus:
    """The folder, and what could not be written into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failed: list[str] = []
        self.written = 0

    def write(self, kind: str, name: str, work: Callable[[Path], Any], source: Path | None = None) -> None:
        """Write a file in a process of its own, beginning with a copy of another one."""
        path = self.folder / kind / f"{name}.root"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            return
        if source is not None:
            if not source.exists():
                return
            shutil.copyfile(source, path)
        _, status = in_child(lambda: str(work(path) or ""))
        if status not in (0, -9) or not path.exists():
            path.unlink(missing_ok=True)
            self.failed.append(f"{kind}/{name} ({status})")
        self.written += 1


def write_contents(corpus: Corpus) -> None:
    for name, writer in make_test_files.WRITERS.items():
        corpus.write("root", Path(name).stem, writer)
    defaults = make_test_files.open_file.__defaults__
    for number, (codec, setting) in enumerate(CODECS.items()):
        make_test_files.open_file.__defaults__ = ("RECREATE", setting)
        for name, writer in list(make_test_files.WRITERS.items())[number % 2 :: 2]:
            if not name.startswith(("compression_", "multi_block")):
                corpus.write(f"root-{codec}", Path(name).stem, writer)
    make_test_files.open_file.__defaults__ = defaults


def write_changes(corpus: Corpus, names: list[str]) -> None:
    codecs = list(CODECS.values())
    for number, name in enumerate(names):
        source = corpus.folder / "root" / f"{name}.root"
        for apply in (CHANGES[number % len(CHANGES)], CHANGES[(number + 3) % len(CHANGES)]):
            once = partial(change, changes=[apply], compressions=[codecs[number % 6]])
            corpus.write("root-update", f"{name}-{apply.__name__}", once, source)
        compressions = [codecs[(number + session) % 6] for session in range(len(CHANGES))]
        often = partial(change, changes=list(CHANGES), compressions=compressions)
        corpus.write("root-update", f"{name}-seven_sessions", often, source)


def write_renamed(corpus: Corpus) -> None:
    places = [(name, where) for name in RENAMED for where in ("top", "all")]
    places += [("directories", "directory"), ("directories", "inside")]
    for how, function in renamings().items():
        corpus.write("root-renamed", f"before_close-{how}", partial(rename_before_close, how=function))
        for name, where in places:
            source = corpus.folder / "root" / f"{name}.root"
            corpus.write("root-renamed", f"{name}-{where}-{how}", partial(rename, how=function, where=where), source)


def write_merged(corpus: Corpus) -> None:
    folder, kind = corpus.folder / "root", "root-merged"
    for number, name in enumerate(MERGED):
        source = folder / f"{name}.root"
        for mode, options in list(HADD.items())[number % 3 :: 3] if number else HADD.items():
            corpus.write(kind, f"hadd-{mode}-{name}", partial(hadd, options=options, sources=[source, source]))
        appended = partial(hadd, options=["-a"], sources=[source, folder / "h1_all.root"])
        corpus.write(kind, f"hadd-append-{name}", appended, folder / "profiles.root")
        corpus.write(kind, f"merger-{name}", partial(merge_in_memory, sources=[source] * 2, incremental=False))
        corpus.write(kind, f"incremental-{name}", partial(merge_in_memory, sources=[source] * 3, incremental=True))
        corpus.write(kind, f"cp-{name}", partial(copy_with_root, source=source))
    corpus.write(kind, "memory_file-copy", copy_memory_file)
    corpus.write(kind, "memory_file-cp", copy_memory_file)
    corpus.write(kind, "buffer_merger", buffer_merger)
    corpus.write(kind, "schema_evolution", update_schema)
    corpus.write(kind, "snapshot", partial(snapshot, source=folder / "tree.root"))
    for name in ("tree", "tree_branches", "tree_autosaved"):
        for option in ("", "fast", "SortBasketsByEntry,fast"):
            clone = partial(clone_tree, source=folder / f"{name}.root", option=option)
            corpus.write(kind, f"clone-{name}-{option or 'slow'}", clone)
    for version in (1, 2, 3):
        corpus.write(kind, f"schema-{version}", partial(schema, version=version))


def warm_up() -> None:
    """Have ROOT compile once what Python calls, and not in each process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "warm.root")
        for name in (
            "h1_all",
            "h2_all",
            "directories",
            "alice_objarrays",
            "tree",
            "profiles",
            "named_graphs",
            "updated",
        ):
            make_test_files.WRITERS[f"{name}.root"](path)
        change(path, list(CHANGES), [101] * len(CHANGES))


def main(folder: Path) -> None:
    ROOT.gROOT.SetBatch(True)
    ROOT.gErrorIgnoreLevel = ROOT.kFatal
    ROOT.gSystem.ResetSignals()  # no stack trace of every crash
    warm_up()
    corpus = Corpus(folder)
    write_contents(corpus)
    names = [Path(name).stem for name in make_test_files.WRITERS if name not in make_test_files.INVALID]
    write_changes(corpus, names)
    write_renamed(corpus)
    write_merged(corpus)
    print(
        f"CERN ROOT {ROOT.gROOT.GetVersion()}: {corpus.written} files written; not: {', '.join(corpus.failed) or 'none'}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
