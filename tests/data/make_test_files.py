"""Write the small ROOT files beside this script, and CERN ROOT's answers about them, into a folder.

Usage: python make_test_files.py [FOLDER]    (needs PyPI's `root`, which is CERN ROOT itself)

Every file is written by a process of its own, and every object is read back by one of its own, because ROOT keeps
global state and crashes on some of what it wrote. The files are the same at each run with the same ROOT: ROOT's
option "reproducible" fixes times and UUIDs, the contents are seeded. Four are not: ROOT leaves memory unset in
chain.root, hn.root and header_and_keys_64_bit.root, and writes the time into the keys of the blobs of rntuple.root.

`expected.json` has, for each file, whether it is valid and its top-level keys (newest cycle of a name) with the class
stored in the file and, where ROOT can read the object, the line the first receiver wrote about it.
Bytes in names that are no UTF-8 are written as backslash escapes.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))
import ask_root
import ROOT

Content = Callable[[Any], None]  # fills an open TFile
Writer = Callable[[Path], None]  # writes the whole file
WRITERS: dict[str, Writer] = {}
INVALID: set[str] = set()

NONE, ZLIB, LZMA, OLD_CS, LZ4, ZSTD = 0, 100, 200, 300, 400, 500  # ROOT's compression settings: algorithm, level added
SINGLE_KEY = 1  # TObject::kSingleKey: a collection becomes one key instead of one for each element
OVERWRITE = 2  # TObject::kOverwrite


def open_file(path: Path, mode: str = "RECREATE", compression: int = ZLIB + 9) -> Any:
    return ROOT.TFile(f"{path}?reproducible={path.name}", mode, "", compression)


def by_hand(writer: Writer) -> Writer:
    """Register a function that writes the file of its name all by itself."""
    WRITERS[f"{writer.__name__}.root"] = writer
    return writer


def content(fill: Content) -> Content:
    """Register a function that fills the file of its name."""

    def write(path: Path) -> None:
        file = open_file(path)
        fill(file)
        file.Close()

    WRITERS[f"{fill.__name__}.root"] = write
    return fill


def invalid(writer: Writer) -> Writer:
    INVALID.add(f"{writer.__name__}.root")
    return writer


def given_away(thing: Any) -> Any:
    """Return the same object, which Python will not delete while ROOT still points to it."""
    ROOT.SetOwnership(thing, False)
    return thing


def put(file: Any, **objects: Any) -> None:
    """Write objects under the names of the arguments, whatever their own names are."""
    for key, thing in objects.items():
        file.WriteObject(thing, key)


def h1(name: str = "h", bins: int = 20, cls: str = "TH1F") -> Any:
    histogram = getattr(ROOT, cls)(name, f"Title of {name};x;entries", bins, -3, 3)
    histogram.SetDirectory(ROOT.nullptr)
    histogram.FillRandom("gaus", 100)
    return histogram


def h2(name: str = "h2", cls: str = "TH2F") -> Any:
    histogram = getattr(ROOT, cls)(name, f"Title of {name};x;y", 6, -3, 3, 5, -3, 3)
    histogram.SetDirectory(ROOT.nullptr)
    for _ in range(50):
        histogram.Fill(ROOT.gRandom.Gaus(), ROOT.gRandom.Gaus())
    return histogram


def h3(name: str, cls: str) -> Any:
    histogram = getattr(ROOT, cls)(name, f"Title of {name}", 3, -3, 3, 2, -3, 3, 4, -3, 3)
    histogram.SetDirectory(ROOT.nullptr)
    for _ in range(20):
        histogram.Fill(ROOT.gRandom.Gaus(), ROOT.gRandom.Gaus(), ROOT.gRandom.Gaus())
    return histogram


# Histograms


@content
def h1_all(file: Any) -> None:
    for letter in "CSILFD":
        file.WriteTObject(h1(f"hTH1{letter}", cls=f"TH1{letter}"))


@content
def h1_empty(file: Any) -> None:
    file.WriteTObject(ROOT.TH1F("empty", "", 1000, 0, 1))
    file.WriteTObject(ROOT.TH1F())
    file.WriteTObject(ROOT.TH2F("empty2", "", 50, 0, 1, 50, 0, 1))


@content
def h1_variable_bins(file: Any) -> None:
    edges = ROOT.std.vector["double"]([0, 1, 3, 7, 15, 31])
    histogram = ROOT.TH1D("variable", "variable bins;p_{T} (GeV/c)", edges.size() - 1, edges.data())
    histogram.Sumw2()
    histogram.Fill(2, 0.5)
    file.WriteTObject(histogram)


@content
def h1_labelled_axis(file: Any) -> None:
    histogram = ROOT.TH1I("labelled", "", 3, 0, 3)
    for number, label in enumerate(("EMC", "DCal", "ΔΦ"), start=1):
        histogram.GetXaxis().SetBinLabel(number, label)
    histogram.Fill("EMC", 3)
    file.WriteTObject(histogram)


@content
def h1_with_functions(file: Any) -> None:
    histogram = h1("fitted")
    histogram.Fit("gaus", "Q0")
    filled(histogram.GetListOfFunctions(), [ROOT.TLine(0, 0, 1, 1), ROOT.TNamed("note", "of the shifter")])
    file.WriteTObject(histogram)


@content
def h2_all(file: Any) -> None:
    for letter in "CSILFD":
        file.WriteTObject(h2(f"hTH2{letter}", cls=f"TH2{letter}"))


@content
def h2_poly(file: Any) -> None:
    histogram = ROOT.TH2Poly("poly", "", 0, 2, 0, 2)
    for low in (0, 1):
        x = ROOT.std.vector["double"]([low, low + 1, low + 1])
        y = ROOT.std.vector["double"]([low, low, low + 1])
        histogram.AddBin(given_away(ROOT.TGraph(3, x.data(), y.data())))
    histogram.Fill(0.5, 0.2)
    file.WriteTObject(histogram)


@content
def h3_all(file: Any) -> None:
    for letter in "CSILFD":
        file.WriteTObject(h3(f"hTH3{letter}", cls=f"TH3{letter}"))


@content
def profiles(file: Any) -> None:
    one = ROOT.TProfile("profile", "", 5, 0, 1)
    one.Fill(0.5, 2)
    two = ROOT.TProfile2D("profile2", "", 3, 0, 1, 3, 0, 1)
    two.Fill(0.5, 0.5, 2)
    three = ROOT.TProfile3D("profile3", "", 2, 0, 1, 2, 0, 1, 2, 0, 1)
    three.Fill(0.5, 0.5, 0.5, 2)
    for profile in (one, two, three):
        file.WriteTObject(profile)


@content
def hn(file: Any) -> None:
    bins = ROOT.std.vector["int"]([2, 3, 4])
    low, high = ROOT.std.vector["double"]([0, 0, 0]), ROOT.std.vector["double"]([1, 1, 1])
    for cls in ("THnF", "THnSparseF", "THnSparseD"):
        histogram = getattr(ROOT, cls)(f"h{cls}", "", 3, bins.data(), low.data(), high.data())
        histogram.Fill(ROOT.std.vector["double"]([0.1, 0.5, 0.9]).data())
        file.WriteTObject(histogram)


# Collections: what ALICE agents send


def histograms(prefix: str, number: int = 20) -> list[Any]:
    return [h2(f"{prefix}{i}") if i % 4 == 3 else h1(f"{prefix}{i}") for i in range(number)]


def filled(collection: Any, things: list[Any]) -> Any:
    for thing in things:
        collection.Add(given_away(thing))
    return collection


@content
def alice_objarrays(file: Any) -> None:
    for detector in ("EMC", "HLT"):
        array = filled(ROOT.TObjArray(), histograms(detector))
        array.Write(f"{detector}_objects", SINGLE_KEY)


@content
def collections(file: Any) -> None:
    for cls in ("TObjArray", "TList", "THashList", "TOrdCollection", "TSortedList", "THashTable"):
        filled(getattr(ROOT, cls)(), histograms("h", 3)).Write(f"a{cls}", SINGLE_KEY)


@content
def collections_named(file: Any) -> None:
    for cls in ("TObjArray", "TList", "THashList"):
        collection = filled(getattr(ROOT, cls)(), histograms("h", 3))
        collection.SetName(f"own name of the {cls}")
        collection.Write(f"a{cls}", SINGLE_KEY)


@content
def collections_empty(file: Any) -> None:
    for cls in ("TObjArray", "TList", "THashList", "TMap", "TRefArray"):
        getattr(ROOT, cls)().Write(f"empty{cls}", SINGLE_KEY)


@content
def collections_nested(file: Any) -> None:
    inner = filled(ROOT.TList(), histograms("inner", 3))
    inner.SetName("inner")
    shared = h1("shared")
    middle = filled(ROOT.TObjArray(), [inner, shared, ROOT.TList()])
    outer = filled(ROOT.TList(), [middle, shared, inner])  # the same objects again: stored as references
    outer.Write("outer", SINGLE_KEY)


@content
def collections_holes(file: Any) -> None:
    array = ROOT.TObjArray(10)
    array.AddAt(given_away(h1("third")), 3)
    array.Write("holes", SINGLE_KEY)
    options = ROOT.TList()
    options.Add(given_away(h1("drawn")), "colz")
    options.Write("options", SINGLE_KEY)


@content
def maps(file: Any) -> None:
    table = ROOT.TMap()
    for key, value in (("run", ROOT.TObjString("300005")), ("histogram", h1("value"))):
        table.Add(given_away(ROOT.TObjString(key)), given_away(value))
    table.Write("map", SINGLE_KEY)
    table.SetName("own name")
    table.Write("named_map", SINGLE_KEY)
    key, value = ROOT.TNamed("key of the pair", ""), ROOT.TNamed("value", "")
    file.WriteTObject(ROOT.TPair(key, value), "pair")


@content
def clones_array(file: Any) -> None:
    array = ROOT.TClonesArray("TNamed", 4)
    for i in range(3):
        array.ConstructedAt(i).SetName(f"clone{i}")
    array.Write("clones", SINGLE_KEY)
    lines = ROOT.TClonesArray("TLine", 2)
    lines.ConstructedAt(0)
    lines.SetName("own name")
    lines.Write("named_clones", SINGLE_KEY)
    ROOT.TClonesArray("TNamed", 4).Write("empty_clones", SINGLE_KEY)


# Compression


def compressed(name: str, setting: int) -> None:
    def write(path: Path) -> None:
        file = open_file(path, compression=setting)
        file.WriteTObject(h1("h", 500, cls="TH1D"))
        filled(ROOT.TObjArray(), histograms("h", 4)).Write("array", SINGLE_KEY)
        file.Close()

    WRITERS[f"compression_{name}.root"] = write


compressed("none", NONE)
compressed("zlib1", ZLIB + 1)
compressed("zlib9", ZLIB + 9)
compressed("lzma", LZMA + 8)
compressed("lz4", LZ4 + 4)
compressed("lz4_hc9", LZ4 + 9)
compressed("zstd", ZSTD + 5)
compressed("old_cs", OLD_CS + 6)  # ROOT still writes the "CS" of ROOT 3


@content
def compression_mixed(file: Any) -> None:
    for setting in (NONE, ZLIB + 6, LZMA + 6, OLD_CS + 6, LZ4 + 4, ZSTD + 5):
        file.SetCompressionSettings(setting)
        file.WriteTObject(h1(f"h{setting}", 200))


@content
def multi_block(file: Any) -> None:
    file.SetCompressionSettings(ZSTD + 5)
    file.WriteTObject(ROOT.TH1D("three_blocks", "40 MB of zeros: two blocks of 16 MiB and a rest", 5_000_000, 0, 1))


@content
def multi_block_lzma(file: Any) -> None:
    file.SetCompressionSettings(LZMA + 6)
    file.WriteTObject(ROOT.TH1F("two_blocks", "20 MB of zeros: a block of 16 MiB and a rest", 5_000_000, 0, 1))


# Directories, cycles, deleted objects


@content
def directories(file: Any) -> None:
    file.WriteTObject(h1("h"))
    deep = file.mkdir("a", "title of a").mkdir("b").mkdir("c")
    deep.WriteTObject(h1("h"))
    file.Get("a").WriteTObject(h2("h"))
    file.mkdir("empty")


@content
def directories_only(file: Any) -> None:
    file.mkdir("empty").mkdir("also_empty")


@content
def cycles(file: Any) -> None:
    for _ in range(3):
        file.WriteTObject(h1("h"))
    file.WriteTObject(h2("other"))
    file.WriteTObject(ROOT.TNamed("h", "a newer cycle, of another class"))


@content
def renamed(file: Any) -> None:
    file.WriteTObject(h1("own_name"), "key_name")
    file.WriteTObject(ROOT.TNamed("", "without a name"), "key_only")


def rename_keys(file: Any) -> None:
    """Give keys new names and titles; the records keep the old ones, behind which the key list has the new."""
    directory = file.GetDirectory("directory")
    for folder, name, new, title in (
        (file, "shorter", "s", "an unchanged title"),
        (file, "longer", "a name longer than before", ""),
        (file, "equal", "laqeu", "another title, which is longer"),
        (file, "directory", "a renamed directory", ""),
        (directory, "inside", "i", "x" * 300),
    ):
        key = folder.GetKey(name)
        key.SetName(new)
        key.SetTitle(title)
    directory.SaveSelf(True)


@by_hand
def renamed_keys(path: Path) -> None:
    """Before the first Close, and in a later session."""
    for mode in "RECREATE", "UPDATE":
        file = open_file(path, mode)
        for name in ("shorter", "longer", "equal", "last"):
            file.WriteTObject(ROOT.TNamed(name, "an unchanged title"))
        directory = file.mkdir("directory", "a directory")
        directory.WriteTObject(h1("inside"))
        rename_keys(file)
        file.Close()


@by_hand
def deleted(path: Path) -> None:
    """Gaps: one reused in part, one whole, one at the end."""
    file = open_file(path)
    for name in "abcdef":
        file.WriteTObject(h1(name))
    file.Close()
    file = open_file(path, "UPDATE")
    for name in ("b;1", "d;1", "f;1"):
        file.Delete(name)
    file.Close()
    file = open_file(path, "UPDATE")
    file.WriteTObject(ROOT.TNamed("small", "fits into a gap"))
    file.Close()


@by_hand
def deleted_all(path: Path) -> None:
    """A file whose only object was deleted holds nothing."""
    file = open_file(path)
    file.WriteTObject(h1("h"))
    file.Close()
    file = open_file(path, "UPDATE")
    file.Delete("h;*")
    file.Close()


@content
def overwritten(file: Any) -> None:
    for bins in (20, 100, 10):
        h1("h", bins).Write("h", OVERWRITE)


@by_hand
def updated(path: Path) -> None:
    for session in range(4):
        mode = "RECREATE" if session == 0 else "UPDATE"
        file = open_file(path, mode, compression=(ZLIB, ZSTD, LZ4, LZMA)[session] + 4)
        file.WriteTObject(h1("every_session"))
        file.WriteTObject(h2(f"session{session}"))
        file.Close()


# Names


@content
def names(file: Any) -> None:
    file.WriteTObject(ROOT.TNamed("été Ω 日本語 😀", "Unicode"))
    for name in ("with space", "a/b", "a;b", "a;1", ";", "/", " ", ".", "tab\there", "line\nbreak", 'quote"\\', "%d%n"):
        file.WriteTObject(ROOT.TNamed(name, ""))
    for length in (254, 255, 300):  # a string's length takes one byte up to 254, five from 255 on
        file.WriteTObject(ROOT.TNamed("n" * length, ""))
    file.WriteTObject(ROOT.TNamed("long_title", "t" * 300))


@content
def names_empty(file: Any) -> None:
    file.WriteTObject(ROOT.TNamed("", "neither key nor object has a name"), "")
    file.WriteTObject(ROOT.TObjString(""), "empty_string")


@content
def names_not_utf8(file: Any) -> None:
    named = ROOT.TNamed()
    named.SetName(b"Stra\xdfe")
    named.SetTitle(b"Geb\xe4ude")
    file.WriteTObject(named, b"Stra\xdfe")
    file.WriteTObject(ROOT.TObjString(b"\xff\xfe\x80"), b"\xff")


@content
def names_in_directories(file: Any) -> None:
    file.mkdir("Δ directory").WriteTObject(h1("a/b"))
    given_away(ROOT.TDirectoryFile("own;name", "title", "", file)).WriteTObject(ROOT.TNamed("", ""), "x")


# Trees


def fill_tree(tree: Any, entries: int) -> None:
    number, weight = ROOT.std.vector["int"]([0]), ROOT.std.vector["double"]([0])
    numbers, text = ROOT.std.vector["float"](), ROOT.std.string()
    tree.Branch("number", number.data(), "number/I")
    tree.Branch("weight", weight.data(), "weight/D")
    tree.Branch("numbers", numbers)
    tree.Branch("text", text)
    for entry in range(entries):
        number[0], weight[0] = entry, ROOT.gRandom.Gaus()
        numbers.resize(entry % 4, 1.5)
        text.assign(f"entry {entry}")
        tree.Fill()
    tree.ResetBranchAddresses()


@content
def tree(file: Any) -> None:
    events = ROOT.TTree("events", "several baskets")
    events.SetAutoFlush(20)
    fill_tree(events, 100)
    file.WriteTObject(events)


@by_hand
def tree_uncompressed(path: Path) -> None:
    file = open_file(path, compression=NONE)
    number = ROOT.std.vector["int"]([0])
    events = ROOT.TTree("events", "uncompressed baskets")
    events.Branch("number", number.data(), "number/I", 100)
    for number[0] in range(60):
        events.Fill()
    events.Write()
    file.Close()


@content
def tree_in_directory(file: Any) -> None:
    file.mkdir("trees").cd()
    events = ROOT.TTree("events", "")
    fill_tree(events, 10)
    events.Write()
    file.cd()
    ROOT.TTree("empty", "no branches, no entries").Write()


@content
def ntuple(file: Any) -> None:
    pairs = ROOT.TNtuple("ntuple", "", "x:y")
    pairs.Fill(1, 2)
    pairs.Write()
    doubles = ROOT.TNtupleD("ntuple_double", "", "x:y")
    doubles.Fill(1, 2)
    doubles.Write()


@content
def rntuple(file: Any) -> None:
    model = ROOT.RNTupleModel.Create()
    model.MakeField["float"]("x")
    with ROOT.RNTupleWriter.Append(model, "rntuple", file) as writer:
        entry = writer.CreateEntry()
        for x in range(10):
            entry["x"] = x
            writer.Fill(entry)
    file.WriteTObject(h1("beside_it"))


@content
def chain(file: Any) -> None:
    files = ROOT.TChain("events")
    files.Add("elsewhere.root", 10)
    files.Write("chain")


@content
def event_lists(file: Any) -> None:
    events = ROOT.TEventList("event_list", "")
    events.Enter(3)
    entries = ROOT.TEntryList("entry_list", "")
    entries.Enter(5)
    file.WriteTObject(events)
    file.WriteTObject(entries)


# Classes with a name


@content
def named_simple(file: Any) -> None:
    put(file, string=ROOT.TObjString("the string itself"), long_string=ROOT.TObjString("s" * 300))
    put(file, named=ROOT.TNamed("own name", "title"), cut=ROOT.TCut("own cut", "x > 1"))
    put(file, macro=ROOT.TMacro("own_macro", "title"), formula=ROOT.TFormula("own_formula", "x*[0]"))
    put(file, axis=ROOT.TAxis(3, 0, 1), color=ROOT.TColor(9999, 0.1, 0.2, 0.3, "own color"))
    put(file, random=ROOT.TRandom(7))


@content
def named_parameters(file: Any) -> None:
    for cls, value in (("int", 1), ("double", 1.5), ("float", 1.5), ("Long64_t", 2**40), ("bool", True), ("long", 3)):
        file.WriteTObject(ROOT.TParameter[cls](f"own {cls}", value), f"parameter_{cls}")


@content
def named_random(file: Any) -> None:
    file.SetCompressionSettings(LZMA + 9)
    put(file, random1=ROOT.TRandom1(), random2=ROOT.TRandom2(), random3=ROOT.TRandom3(1))


@content
def named_graphs(file: Any) -> None:
    x, zero = ROOT.std.vector["double"]([1, 2, 3]), ROOT.std.vector["double"]([0, 0, 0])
    graph = ROOT.TGraph(3, x.data(), x.data())
    put(file, unnamed=graph)
    graph.SetName("own graph")
    errors = ROOT.TGraphErrors(3, x.data(), x.data(), zero.data(), x.data())
    asymmetric = ROOT.TGraphAsymmErrors(3, x.data(), x.data(), x.data(), x.data(), x.data(), x.data())
    put(file, named=graph, errors=errors, asymmetric=asymmetric, empty=ROOT.TGraph())
    bent = ROOT.TGraphBentErrors(3, x.data(), x.data(), x.data(), x.data())
    put(file, bent=bent, cut=ROOT.TCutG("own cut", 3, x.data(), x.data()))
    multi = ROOT.TMultiGraph("own multigraph", "")
    filled(multi, [graph, errors])
    put(file, multi=multi, spline3=ROOT.TSpline3("own spline", graph), spline5=ROOT.TSpline5("own spline 5", graph))


@content
def named_graph2d(file: Any) -> None:
    graph = ROOT.TGraph2D(3)
    for i in range(3):
        graph.SetPoint(i, i, i * i, 1)
    put(file, unnamed=graph)
    graph.SetName("own graph")
    put(file, graph=graph)


@content
def named_functions(file: Any) -> None:
    one, two = ROOT.TF1("own_f1", "[0]*x", 0, 1), ROOT.TF2("own_f2", "[0]*x*y", 0, 1, 0, 1)
    one.SetParameter(0, 2)
    put(file, f1=one, f2=two, f3=ROOT.TF3("own_f3", "x*y*z"))


@content
def named_composites(file: Any) -> None:
    passed, total = h1("passed"), h1("total")
    total.Add(passed)
    efficiency = ROOT.TEfficiency(passed, total)
    efficiency.SetName("own efficiency")
    put(file, efficiency=efficiency)
    stack = ROOT.THStack("own stack", "")
    stack.Add(passed)
    put(file, stack=stack)
    folder = ROOT.TFolder("own folder", "")
    folder.Add(total)
    put(file, folder=folder)


@content
def named_fit_result(file: Any) -> None:
    result = h1("h").Fit("gaus", "QS0").Get()
    put(file, fit_result=result)


@content
def named_canvas(file: Any) -> None:
    file.SetCompressionSettings(LZMA + 9)
    canvas = ROOT.TCanvas("own canvas", "", 300, 200)
    histogram = h1("drawn")
    histogram.Draw()
    canvas.Update()
    file.WriteTObject(canvas, "canvas")


@content
def named_pad_and_style(file: Any) -> None:
    file.SetCompressionSettings(LZMA + 9)
    file.WriteTObject(ROOT.TPad("own pad", "", 0, 0, 1, 1), "pad")
    file.WriteTObject(ROOT.TStyle("own style", ""), "style")


@content
def named_others(file: Any) -> None:
    put(file, benchmark=ROOT.TBenchmark(), system_file=ROOT.TSystemFile("own file", "own folder"))
    put(file, url=ROOT.TUrl("https://cern.ch/own"), task=ROOT.TTask("own task", ""))
    put(file, stat=ROOT.TStatistic("own statistic"), graph_time=ROOT.TGraphTime(1, 0.0, 0.0, 1.0, 1.0))
    put(file, streamer_info=ROOT.TNamed.Class().GetStreamerInfo(), source=ROOT.TLimitDataSource())


@content
def named_physics(file: Any) -> None:
    particle = ROOT.TParticle(11, 1, 0, 0, 0, 0, 0.1, 0.2, 0.3, 0.5, 0.0, 0.0, 0.0, 0.0)
    put(file, particle=particle, feldman=ROOT.TFeldmanCousins())
    put(file, principal=ROOT.TPrincipal(2, "D"))


@content
def named_roofit(file: Any) -> None:
    file.SetCompressionSettings(LZMA + 9)
    put(file, real=ROOT.RooRealVar("own variable", "", 0, 1))


# Classes whose GetName() is their class's name, or nothing


@content
def nameless_graphics(file: Any) -> None:
    put(file, line=ROOT.TLine(0, 0, 1, 1), box=ROOT.TBox(0, 0, 1, 1), marker=ROOT.TMarker(0, 0, 20))
    put(file, ellipse=ROOT.TEllipse(0, 0, 1, 1), arrow=ROOT.TArrow(0, 0, 1, 1, 0.05, ">"))
    x = ROOT.std.vector["double"]([1, 2, 3])
    put(file, poly_line=ROOT.TPolyLine(3, x.data(), x.data()), poly_marker=ROOT.TPolyMarker(3, x.data(), x.data()))
    put(file, curly_arc=ROOT.TCurlyArc())
    put(file, gaxis=ROOT.TGaxis(0, 0, 1, 1, 0, 1))


@content
def nameless_texts(file: Any) -> None:
    put(file, text=ROOT.TText(0, 0, "a text"), latex=ROOT.TLatex(0, 0, "#alpha"))
    pave = ROOT.TPaveText(0, 0, 1, 1)
    pave.AddText("line")
    legend = ROOT.TLegend(0, 0, 1, 1)
    legend.AddEntry(ROOT.nullptr, "entry", "l")
    put(file, pave=pave, legend=legend, label=ROOT.TPaveLabel(0, 0, 1, 1, "label"))
    named = ROOT.TPaveText(0, 0, 1, 1)
    named.SetName("own pave")
    put(file, named_pave=named, stats=ROOT.TPaveStats(0, 0, 1, 1))


@content
def nameless_mathematics(file: Any) -> None:
    put(file, matrix=ROOT.TMatrixD(2, 2), symmetric=ROOT.TMatrixDSym(2), sparse=ROOT.TMatrixDSparse(2, 2))
    put(file, vector=ROOT.TVectorD(3), float_matrix=ROOT.TMatrixF(2, 2), float_vector=ROOT.TVectorF(3))
    put(file, vector2=ROOT.TVector2(1, 2), vector3=ROOT.TVector3(1, 2, 3))
    put(file, lorentz=ROOT.TLorentzVector(1, 2, 3, 4), rotation=ROOT.TRotation())


@content
def nameless_objects(file: Any) -> None:
    put(file, object=ROOT.TObject(), bits=ROOT.TBits(20), ref=ROOT.TRef(), exmap=ROOT.TExMap())
    referenced = ROOT.TNamed("referenced", "its TObject has the bit kIsReferenced and a process id")
    put(file, referenced_by=ROOT.TRef(referenced), referenced=referenced)


@content
def not_tobjects(file: Any) -> None:
    """ROOT classes that are no TObject, and std classes: their keys hold no TObject header at all."""
    put(file, string=ROOT.std.string("text"), vector=ROOT.std.vector["double"]([1, 2, 3]))
    numbers = ROOT.std.map["std::string", "double"]()
    numbers["one"] = 1.0
    put(file, map=numbers, pair=ROOT.std.pair["int", "float"](1, 2), lorentz=ROOT.Math.PtEtaPhiMVector(1, 2, 3, 4))
    put(file, datime=ROOT.TDatime(20151124, 180410), uuid=ROOT.TUUID("00000000-1111-2222-3333-444444444444"))
    put(file, timestamp=ROOT.TTimeStamp(1448384650, 0), tstring=ROOT.TString("text"), array=ROOT.TArrayD(3))


@content
def not_tobjects_only_strings(file: Any) -> None:
    put(file, empty=ROOT.std.string(), text=ROOT.std.string("text"), long=ROOT.std.string("s" * 300))


@content
def objstring_only(file: Any) -> None:
    file.WriteTObject(ROOT.TObjString("run 300005"), "comment")


@content
def tobject_bits(file: Any) -> None:
    """A histogram that belongs to a file, one that belongs to none, ones with bits of their own."""
    for name, owned in (("owned", True), ("free", False)):
        histogram = h1(name)
        histogram.SetDirectory(file if owned else ROOT.nullptr)
        file.WriteTObject(histogram)
    for bit in (3, 13, 14, 23):
        named = ROOT.TNamed(f"bit{bit}", "")
        named.SetBit(1 << bit)
        file.WriteTObject(named)


# Classes ROOT does not know when it reads the file


def declare(code: str) -> None:
    if not ROOT.gInterpreter.Declare(code):
        raise RuntimeError(f"ROOT refused: {code}")


@content
def custom_from_tnamed(file: Any) -> None:
    declare("""
    class MyNamed : public TNamed { public: int fX = 1; using TNamed::TNamed; ClassDefInlineOverride(MyNamed, 1) };
    """)
    put(file, mine=ROOT.MyNamed("own name", "title"))


@content
def custom_from_tobject(file: Any) -> None:
    declare("class MyObject : public TObject { public: int fX = 1; ClassDefInlineOverride(MyObject, 1) };")
    put(file, mine=ROOT.MyObject())


@content
def custom_own_getname(file: Any) -> None:
    declare("""
    class MyOwn : public TObject { public: TString fName = "own name";
        const char *GetName() const override { return fName; } ClassDefInlineOverride(MyOwn, 1) };
    """)
    put(file, mine=ROOT.MyOwn())


@content
def custom_from_histogram(file: Any) -> None:
    ROOT.gSystem.Load("libHist")
    declare("""
    class MyHistogram : public TH1F { public: int fRun = 300005;
        MyHistogram() : TH1F("own name", "", 10, 0, 1) { SetDirectory(nullptr); }
        ClassDefInlineOverride(MyHistogram, 1) };
    """)
    put(file, mine=ROOT.MyHistogram())


@content
def custom_two_bases(file: Any) -> None:
    declare("""
    class MyBase { public: int fY = 2; virtual ~MyBase() {} ClassDefInline(MyBase, 1) };
    class MyTwo : public MyBase, public TNamed { public: int fX = 1;
        using TNamed::TNamed; ClassDefInlineOverride(MyTwo, 1) };
    """)
    two = ROOT.MyTwo()
    two.SetName("own name")
    put(file, mine=two)


@content
def custom_not_tobject(file: Any) -> None:
    declare("struct MyStruct { int fX = 1; std::vector<int> fY{1, 2, 3}; ClassDefInline(MyStruct, 1) };")
    put(file, mine=ROOT.MyStruct())


@content
def custom_in_collection(file: Any) -> None:
    declare("""
    class MyItem : public TNamed { public: int fX = 1; using TNamed::TNamed; ClassDefInlineOverride(MyItem, 1) };
    """)
    filled(ROOT.TObjArray(), [ROOT.MyItem("item", ""), h1("h")]).Write("objects", SINGLE_KEY)


# Headers


BIG_FILE = """
class BigFile : public TFile {  // writes a short file the way ROOT writes those beyond 2 GB
    bool fBigKeys;
public:
    BigFile(const char *name, bool bigKeys) : TFile(name, "RECREATE"), fBigKeys(bigKeys) {
        fVersion += 1000000;
        fUnits = 8;
    }
    Long64_t GetEND() const override { return fBigKeys ? fEND + kStartBigFile : fEND; }  // for TKey, which asks this
    void FillBuffer(char *&buffer) override {  // the record of the top directory
        if (!fBigKeys) return TFile::FillBuffer(buffer);
        tobuf(buffer, Version_t(TDirectoryFile::Class_Version() + 1000));
        const bool reproducible = TestBit(kReproducible);
        (reproducible ? TDatime((UInt_t)1) : fDatimeC).FillBuffer(buffer);
        (reproducible ? TDatime((UInt_t)1) : fDatimeM).FillBuffer(buffer);
        tobuf(buffer, fNbytesKeys);
        tobuf(buffer, fNbytesName);
        tobuf(buffer, fSeekDir);
        tobuf(buffer, fSeekParent);
        tobuf(buffer, fSeekKeys);
        (reproducible ? TUUID("00000000-0000-0000-0000-000000000000") : fUUID).FillBuffer(buffer);
    }
};
"""


def big(path: Path, big_keys: bool) -> None:
    declare(BIG_FILE)
    file = ROOT.BigFile(f"{path}?reproducible={path.name}", big_keys)
    file.WriteTObject(h1("h"))
    file.mkdir("directory").WriteTObject(h1("h"))
    file.WriteTObject(ROOT.TNamed("deleted", "leaves a gap"))
    file.Delete("deleted;1")
    file.Close()


@by_hand
def header_64_bit(path: Path) -> None:
    """The file header as beyond 2 GB; keys and directories with 32 bits, as they are in the first 2 GB."""
    big(path, big_keys=False)


@by_hand
def header_and_keys_64_bit(path: Path) -> None:
    """File header, keys and top directory as beyond 2 GB; the directory made by mkdir stays with 32 bits."""
    big(path, big_keys=True)


# Files not closed, files with nothing in them


@invalid
@content
def no_keys(file: Any) -> None:
    pass


@invalid
@by_hand
def never_closed(path: Path) -> None:
    """The writer died before the key list was written, though its objects are there."""
    file = open_file(path)
    for name in "abc":
        file.WriteTObject(h1(name))
    file.Flush()
    os.kill(os.getpid(), signal.SIGKILL)


@by_hand
def killed_after_write(path: Path) -> None:
    """The writer died after TFile::Write, which writes the key list: all there but the streamer infos."""
    file = open_file(path)
    file.WriteTObject(h1("a"))
    file.Write()
    os.kill(os.getpid(), signal.SIGKILL)


@by_hand
def killed_after_autosave(path: Path) -> None:
    """The writer died after saving the tree with the key list, and more objects the header knows nothing of."""
    file = open_file(path)
    events = ROOT.TTree("events", "")
    fill_tree(events, 10)
    events.AutoSave("SaveSelf")
    file.WriteTObject(h1("lost"))
    file.Flush()
    os.kill(os.getpid(), signal.SIGKILL)


@by_hand
def trailing_bytes(path: Path) -> None:
    """A copy that brought bytes along which are no part of the file."""
    file = open_file(path)
    file.WriteTObject(h1("h"))
    file.Close()
    with path.open("ab") as copy:
        copy.write(bytes(200))


@invalid
@by_hand
def truncated(path: Path) -> None:
    file = open_file(path)
    file.WriteTObject(h1("h"))
    file.Close()
    os.truncate(path, path.stat().st_size - 1)


INVALID.add("deleted_all.root")


# Reading back


READER = """
std::string HexLine(TKey *key) {
    TClass *type = TClass::GetClass(key->GetClassName());
    if (!type || !type->IsTObject()) return "";  // ReadObj would hand out a pointer to something else
    TObject *object = key->ReadObj();
    if (!object) return "";
    return Hex(std::string("Obj name: ") + object->GetName() + ", Obj IsA() Name: " + object->IsA()->GetName());
}
"""


def in_child(work: Callable[[], str]) -> tuple[str, int]:
    """Return the text that a function returns in a process of its own, and the exit status of that process."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            ROOT.gRandom.SetSeed(1)
            ROOT.TProcessID.GetSessionProcessID().SetTitle("00000000-1111-2222-3333-444444444444")
            os.write(write_end, work().encode())
            status = 0
        except Exception as error:  # noqa: BLE001  the process must end here, whatever happens
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(write_end)
    with open(read_end) as pipe:
        answer = pipe.read()
    return answer, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def newest_keys(path: Path) -> list[tuple[str, Any]]:
    file = ROOT.TFile(str(path))
    ROOT.SetOwnership(file, False)
    return [] if file.IsZombie() else list(ask_root.newest_keys(file).items())


def describe(path: Path) -> dict[str, Any]:
    """Return the keys and descriptions of objects that ROOT finds in a file."""
    # ROOT names the class of a directory TDirectory in the file and TDirectoryFile elsewhere.
    listing, _ = in_child(lambda: json.dumps([(name, str(key.GetClassName())) for name, key in newest_keys(path)]))
    objects: dict[str, dict[str, str]] = {}
    for i, (name, class_name) in enumerate(json.loads(listing)):
        line, status = in_child(lambda i=i: str(ROOT.HexLine(newest_keys(path)[i][1])))
        stored_class = "TDirectory" if class_name == "TDirectoryFile" else class_name
        objects[ask_root.unhex(name)] = {"class": stored_class} | (
            {"root": ask_root.unhex(line)} if line and not status else {}
        )
    if not objects:
        return {"objects": {}, "root_status": "no objects"}
    read = all("root" in facts for facts in objects.values())
    return {"objects": objects, "root_status": "read" if read else "not every object read"}


def main(folder: Path) -> None:
    ROOT.gROOT.SetBatch(True)
    ROOT.gErrorIgnoreLevel = ROOT.kFatal
    declare(ask_root.READER + READER)
    ROOT.gSystem.ResetSignals()  # no stack trace of every crash
    expected, failed = {}, []
    for name, writer in WRITERS.items():
        path = folder / name
        path.unlink(missing_ok=True)
        _, status = in_child(lambda writer=writer, path=path: writer(path) or "")
        if status not in (0, -signal.SIGKILL):
            failed.append(f"{name} ({status})")
            continue
        is_valid = name not in INVALID
        facts = describe(path) if is_valid else {"objects": {}, "root_status": "invalid"}
        expected[name] = {"valid": is_valid} | facts
    if failed:
        raise RuntimeError(f"not written: {', '.join(failed)}")
    (folder / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
