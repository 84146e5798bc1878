"""The page for shifters, in a real browser against a real gunicorn."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uproot
from client import DATA, HEADERS, HISTOGRAMS, NAME, PROFILES, PROJECT, TOKEN, curl, post, settings
from rootfiles import File
from server import Server

pytest.importorskip("playwright")

from browser import AXE, Tab, chromium, jsroot_folder, npm_package
from playwright.sync_api import Browser, Page, expect

expect.set_options(timeout=20_000)

RUN = 300005
LONG_AGENT = "L" + "o" * 62 + "n"
AGENTS = ["EMC", "HLT", "TPC", "FMD", "testagent", LONG_AGENT]
CRAFTED = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
DAMAGED = b"root" + HISTOGRAMS[4:300]
LISTED = 1_100  # ms after which every worker lists a new run


def send(server: Server, agent: str, time_stamp: int, body: bytes, run: int = RUN, status: int = 0) -> str:
    """Upload a file, whatever the answer; return the name that it has or would have had."""
    headers = {**HEADERS, "amoreAgent": agent, "runNumber": str(run), "timeStamp": str(time_stamp)}
    answer = post(server.port, body, {**headers, "dataStatus": str(status)})
    return str(answer.json.get("filename"))


def histograms(path: Path, names: list[str], title: str = "") -> bytes:
    """Return a file of TH1D objects with these names and this title, also on the axis."""
    identify = uproot.writing.identify
    axis = identify.to_TAxis("fXaxis", title, 10, 0.0, 10.0)
    content = np.arange(12.0)
    with uproot.recreate(path) as file:
        for name in names:
            file[name] = identify.to_TH1x(name, title, content, 55.0, 55.0, 55.0, 300.0, 900.0, content, axis)
    return path.read_bytes()


# --- one server, one browser, and one tab: most tests cost less than a new one -----------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(base: Path, browser: Browser) -> Iterator[Server]:
    """A receiver with JSROOT that has seen run 300005: EMC has ended, HLT sends, TPC was rejected, FMD is missing."""
    more = {"jsroot": str(jsroot_folder(base / "jsroot")), "agents": " ".join(AGENTS)}
    server = Server(settings(base / "data", **more), base / "gunicorn.log", ())
    send(server, "EMC", 1448384650, HISTOGRAMS, status=1)
    send(server, "EMC", 1448384650, HISTOGRAMS)  # a duplicate
    send(server, "EMC", 1448388250, PROFILES, status=2)
    send(server, "HLT", 1448384655, (DATA / "alice_objarrays.root").read_bytes(), status=1)
    send(server, "TPC", 1448384660, DAMAGED)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def shared_tab(browser: Browser, server: Server) -> Iterator[Tab]:
    with Tab(browser, server.url) as tab:
        yield tab


@pytest.fixture
def tab(shared_tab: Tab) -> Iterator[Tab]:
    """A tab with a token; nothing may go wrong in it."""
    yield shared_tab
    faults = shared_tab.faults()
    shared_tab.errors.clear()
    assert faults == []


def row(page: Page, name: str) -> list[str]:
    """Return the texts of the table's row that begins with this."""
    cells = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name, exact=True))
    expect(cells).to_have_count(1)
    texts = cells.get_by_role("rowheader").or_(cells.get_by_role("cell")).all_inner_texts()
    return [re.sub(r"\s+", " ", text) for text in texts]


# --- the token ---------------------------------------------------------------------------------------------------------


def test_token_is_asked_for_first(browser: Browser, server: Server) -> None:
    with Tab(browser, server.url, token=None) as tab:
        page = tab.open("#run=300005")
        expect(page.get_by_label("Token")).to_be_focused()
        assert not [request for request in tab.requests if "/rest/" in request.url]
        assert inaccessible(page, WCAG) == []
        page.get_by_label("Token").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("Received token, but it is invalid!")
        page.get_by_label("Token").fill(TOKEN)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Run 300005")).to_be_visible()


def test_token_travels_in_headers_only(browser: Browser, server: Server) -> None:
    with Tab(browser, server.url, token=None) as tab:
        page = tab.open()
        page.get_by_label("Token").fill(TOKEN)
        page.keyboard.press("Enter")
        expect(page.get_by_text("Live")).to_be_visible()
        page.reload()  # the tab keeps it
        expect(page.get_by_role("heading", name="Run")).to_be_visible()
        asked = [request for request in tab.requests if "/rest/" in request.url]
        assert {request.headers["token"] for request in asked} == {TOKEN}
        assert not [request.url for request in tab.requests if TOKEN in request.url]
        assert TOKEN not in page.url
        assert page.evaluate("[JSON.stringify(localStorage), document.cookie]") == ["{}", ""]
        other = tab.context.new_page()  # and no other tab has it
        other.goto(tab.view)
        expect(other.get_by_label("Token")).to_be_visible()
        page.get_by_role("button", name="Forget the token").click()
        expect(page.get_by_label("Token")).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0


# --- runs and agents ---------------------------------------------------------------------------------------------------


def test_agents_of_run_are_described(tab: Tab) -> None:
    page = tab.open(f"#run={RUN}")
    emc = row(page, "EMC")
    assert emc[1] == "ended"
    assert re.fullmatch(r"\d+ (s|min) ago", emc[2])
    assert emc[3:] == ["2", "10.1 kB", "0", "1", "0", "2015-11-24 12:04:10 to 13:04:10"]
    assert row(page, "HLT")[1] == "sending"
    tpc = row(page, "TPC")
    assert (tpc[1], tpc[3], tpc[5]) == ("nothing accepted", "0", "1")
    assert row(page, "FMD")[1] == "missing"
    problems = page.get_by_role("list", name="State of the run")
    expect(problems).to_contain_text("FMD")
    expect(problems).to_contain_text("1 rejected: TPC. See why")


def test_silent_agent_is_named(browser: Browser, server: Server) -> None:
    def long_ago(route: Any) -> None:
        headers = {name: value for name, value in route.request.headers.items() if name != "if-none-match"}
        response = route.fetch(headers=headers)
        answer = response.json()
        answer["agents"]["HLT"]["last_arrival"] = "2020-01-01T00:00:00.000000Z"
        answer["agents"]["EMC"]["ended"] = False
        route.fulfill(response=response, json=answer)

    with Tab(browser, server.url) as tab:
        tab.page.route(f"**/rest/api/runs/{RUN}", long_ago)
        tab.page.route("**/rest/api/runs?*", lambda route: route.fulfill(json={"runs": [RUN], "before": None}))
        page = tab.open(f"#run={RUN}")
        expect(page.get_by_role("list", name="State of the run")).to_contain_text("1 silent: HLT.")
        assert re.fullmatch(r"silent for \d+ days", row(page, "HLT")[1])


def test_newest_run_opens_unless_somebody_reads(browser: Browser, server: Server) -> None:
    with Tab(browser, server.url) as tab:
        tab.page.clock.install()
        page = tab.open()
        expect(page.get_by_role("heading", name="Run")).to_be_visible()
        expect(page.locator("#run-list a[aria-current]")).to_contain_text("newest arrivals")
        expect(page.get_by_role("status").get_by_text("Live")).to_be_visible()
        page.mouse.move(400, 400)
        send(server, "EMC", 1448384650, HISTOGRAMS, run=300011)
        page.wait_for_timeout(LISTED)
        tab.refresh()
        expect(page.get_by_text("Run 300011 has begun.")).to_be_visible()
        expect(page.get_by_role("heading", name="Run 300011")).to_be_hidden()
        page.clock.fast_forward(61_000)
        expect(page.get_by_role("heading", name="Run 300011")).to_be_visible()


# --- uploads -----------------------------------------------------------------------------------------------------------


def test_rejections_say_why(tab: Tab) -> None:
    page = tab.follow(f"#run={RUN}")
    page.get_by_role("link", name="See why").first.click()
    expect(page).to_have_url(re.compile(f"#run={RUN}&part=uploads&outcome=rejected$"))
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(page.locator("tbody tr")).to_contain_text("Not a valid ROOT file: ")


def test_uploads_are_filtered(tab: Tab) -> None:
    page = tab.follow(f"#run={RUN}&part=uploads")
    expect(page.locator("tbody tr")).to_have_count(5)
    page.get_by_label("Agent").select_option("EMC")
    expect(page.locator("tbody tr")).to_have_count(3)
    page.get_by_label("Outcome").select_option("duplicate")
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(page).to_have_url(re.compile("agent=EMC&outcome=duplicate$"))
    tab.follow("#uploads&agent=TPC")
    expect(page.locator("tbody tr")).to_have_count(1)


def test_older_uploads_come_on_demand(tab: Tab, server: Server) -> None:
    for time_stamp in range(105):
        send(server, "EMC", time_stamp, b"no ROOT file", run=300002)
    page = tab.follow("#run=300002&part=uploads")
    expect(page.locator("tbody tr")).to_have_count(100)
    page.get_by_role("button", name="Older uploads").click()
    expect(page.locator("tbody tr")).to_have_count(105)
    expect(page.get_by_role("button", name="Older uploads")).to_be_hidden()


def test_rows_wait_while_table_is_read(tab: Tab, server: Server) -> None:
    send(server, "EMC", 1, HISTOGRAMS, run=300003)
    page = tab.follow("#run=300003&part=uploads")
    link = page.locator("tbody a").first
    link.focus()
    before = link.bounding_box()
    send(server, "EMC", 2, HISTOGRAMS, run=300003)
    tab.refresh()
    shows = page.get_by_role("button", name="Show 1 new upload")
    expect(shows).to_be_visible()
    expect(page.locator("tbody tr")).to_have_count(1)
    assert link.bounding_box() == before
    shows.click()
    expect(page.locator("tbody tr")).to_have_count(2)


# --- refreshing --------------------------------------------------------------------------------------------------------


def test_refreshes_every_five_seconds_while_visible(browser: Browser, server: Server) -> None:
    with Tab(browser, server.url) as tab:
        page = tab.page
        page.add_init_script("Object.defineProperty(document, 'hidden', { get: () => window.isHidden === true })")
        page.clock.install()
        tab.open(f"#run={RUN}&part=uploads")
        expect(page.get_by_text("Live")).to_be_visible()
        for path in ("**/rest/api/runs?*", f"**/rest/api/runs/{RUN}", f"**/rest/api/runs/{RUN}/receipts?*"):
            statuses = []
            while 304 not in statuses:  # each worker may list a new run a second late
                with page.expect_response(path) as response:
                    page.clock.fast_forward(5_100)
                statuses.append(response.value.status)
                assert len(statuses) < 20
        page.evaluate("window.isHidden = true")
        tab.refresh()  # it sees that it is hidden
        page.wait_for_load_state("networkidle")
        asked = len(tab.requests)
        page.clock.fast_forward(600_000)
        page.wait_for_timeout(300)
        assert len(tab.requests) == asked
        page.evaluate("window.isHidden = false")
        with page.expect_response(f"**/rest/api/runs/{RUN}"):
            tab.refresh()


def test_lost_connection_is_shown_and_mended(browser: Browser, server: Server) -> None:
    with Tab(browser, server.url) as tab:
        tab.page.clock.install()
        page = tab.open(f"#run={RUN}")
        expect(page.get_by_role("rowheader", name="EMC")).to_be_visible()
        tab.context.set_offline(True)
        tab.refresh()
        expect(page.get_by_role("status").first).to_contain_text("Connection lost")
        expect(page.get_by_role("rowheader", name="EMC")).to_be_visible()
        tab.context.set_offline(False)
        page.clock.fast_forward(5_100)
        expect(page.get_by_role("status").first).to_have_text("Live")


# --- files -------------------------------------------------------------------------------------------------------------


def test_files_are_listed_with_receipts(tab: Tab) -> None:
    page = tab.open(f"#run={RUN}&part=files")
    expect(page.locator("tbody tr")).to_have_count(3)
    name = "EMChistos_300005_DQM_2015_11_24_18_04_10.root"
    cells = row(page, name)
    assert cells[1] == "2015-11-24 12:04:10"
    assert cells[3] == "5.46 kB"
    assert cells[4] == hashlib.sha256(HISTOGRAMS).hexdigest()[:12] + "…"
    with page.expect_download() as download:
        page.get_by_role("button", name=f"Download {name}").click()
    assert download.value.suggested_filename == name
    assert Path(download.value.path()).read_bytes() == HISTOGRAMS


def test_times_are_local_with_utc_on_hover(tab: Tab) -> None:
    page = tab.follow(f"#run={RUN}&part=files")
    time = page.locator("time", has_text="2015-11-24 12:04:10").first
    expect(time).to_have_attribute("datetime", "2015-11-24T17:04:10.000Z")
    expect(time).to_have_attribute("title", "2015-11-24 17:04:10 UTC")


def test_folder_without_files_says_so(tab: Tab) -> None:
    page = tab.follow("#run=7&part=files")
    expect(page.get_by_text("No file is here: none came, or Overwatch has taken them.")).to_be_visible()
    tab.follow("#run=7")
    expect(page.get_by_text("Nothing has arrived of run 7.")).to_be_visible()


@pytest.mark.parametrize(
    ("file", "drawn", "explained"),
    [
        ("h1_all", 6, 0),
        ("h2_all", 6, 0),
        ("profiles", 3, 0),  # one of them in three dimensions
        ("named_graphs", 10, 0),
        ("named_canvas", 1, 0),
        ("named_composites", 2, 1),
        ("h1_with_functions", 1, 0),
        ("named_functions", 0, 3),  # no saved points: they would have to be compiled
        ("alice_objarrays", 40, 0),
        ("collections_nested", 8, 0),
        ("collections_holes", 2, 0),
        ("directories", 3, 0),
        ("compression_lzma", 5, 0),
        ("compression_zstd", 5, 0),
        ("header_and_keys_64_bit", 2, 0),
        ("tree", 0, 1),
        ("named_simple", 0, 9),
    ],
)
def test_objects_are_drawn(tab: Tab, server: Server, file: str, drawn: int, explained: int) -> None:
    name = send(server, "EMC", sum(file.encode()) * 60, (DATA / f"{file}.root").read_bytes(), run=300009)
    page = tab.follow(f"#file={name}")
    states = tab.draw_all()
    assert (states.count("drawn"), states.count("message")) == (drawn, explained)
    assert not page.get_by_text("JSROOT could not draw it").count()


def test_function_without_points_is_explained(tab: Tab, server: Server) -> None:
    name = send(server, "EMC", 100, (DATA / "named_functions.root").read_bytes(), run=300009)
    page = tab.follow(f"#file={name}")
    expect(page.get_by_text("[0]*x — own_f1: a function is drawn only where its points are saved")).to_be_visible()


def test_thousand_histograms_stay_usable(tab: Tab, server: Server, tmp_path: Path) -> None:
    names = [f"h{number:04}" for number in range(1000)]
    name = send(server, "HLT", 200, histograms(tmp_path / "many.root", names), run=300009)
    page = tab.follow(f"#file={name}")
    expect(page.locator("figure[data-state=drawn]").first).to_be_visible()
    expect(page.locator("figure.object")).to_have_count(1000)
    page.locator("figure.object").last.scroll_into_view_if_needed()
    expect(page.locator("figure.object").last).to_have_attribute("data-state", "drawn")
    assert page.locator("figure[data-state=drawn]").count() < 100
    assert len([request for request in tab.requests if request.method == "GET" and name in request.url]) < 10
    page.get_by_label("Name contains").fill("h0512")
    expect(page.locator("figure.object:visible")).to_have_count(1)
    expect(page.locator("figure.object:visible")).to_have_attribute("data-state", "drawn")


def test_drawing_can_be_enlarged(tab: Tab, server: Server) -> None:
    name = send(server, "EMC", 1448384650, HISTOGRAMS)
    page = tab.follow(f"#file={name}")
    page.get_by_role("button", name="Larger: hTH1F").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("svg").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


def test_drawings_outlive_their_file(tab: Tab, server: Server, base: Path) -> None:
    name = send(server, "HLT", 300, HISTOGRAMS, run=300009)
    page = tab.follow(f"#file={name}")
    drawings = page.locator("figure[data-state=drawn]:has(svg)")
    expect(drawings).to_have_count(6)
    send(server, "HLT", 300, PROFILES, run=300009)
    tab.refresh()
    expect(page.get_by_text("A different file has taken this name")).to_be_visible()
    expect(drawings).to_have_count(6)  # not those of another file
    page.reload()
    expect(drawings).to_have_count(3)
    (base / "data" / name).unlink()
    tab.refresh()
    expect(page.get_by_text("Overwatch has taken it away")).to_be_visible()
    expect(drawings).to_have_count(3)
    page.reload()
    expect(page.locator("p.notice:visible")).to_have_count(1)
    expect(page.get_by_text("Opening the file")).to_be_hidden()


# --- a stranger's text -------------------------------------------------------------------------------------------------


def test_crafted_names_stay_text(tab: Tab, server: Server, tmp_path: Path) -> None:
    names = [
        CRAFTED.replace("/", "|"),
        "#url[javascript:window.hacked=1]{click}",
        "'; window.hacked=1; ||",
        "\u202egnp.exe",
        "a;1",
        "x" * 500,
    ]
    name = send(server, "EMC", 500, histograms(tmp_path / "crafted.root", names, CRAFTED), run=300009)
    page = tab.follow(f"#file={name}")
    assert set(tab.draw_all()) == {"drawn"}
    expect(page.locator("figcaption b").first).to_have_text(names[0])
    for anchor in page.locator(".drawing a").all():
        anchor.dispatch_event("click")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, iframe, main script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_crafted_reason_stays_text(tab: Tab, server: Server) -> None:
    file = File()
    file.add(b"TH1F", CRAFTED.encode(), b"ZL\x08" + bytes(40), object_size=1000)
    send(server, "EMC", 600, file.close(), run=300008)
    page = tab.follow("#run=300008&part=uploads")
    expect(page.locator("tbody tr")).to_contain_text(CRAFTED)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0


@pytest.mark.parametrize(
    "fragment", ["#run=..%2F..%2Fx", "#file=..%2F..%2Fhealth", "#file=%3Cimg%20src=x%3E", "#nonsense"]
)
def test_crafted_addresses_are_harmless(tab: Tab, fragment: str) -> None:
    page = tab.open(fragment)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    assert not [request.url for request in tab.requests if "health" in request.url or "/x" in request.url]


def test_only_the_page_is_given_out(server: Server) -> None:
    answer = curl(f"{server.url}/view/", headers={})
    assert answer.status == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    outside = ("../receiver.py", "..%2freceiver.py", "%2e%2e/setup.cfg", "page.js/../../receiver.py", "base/../../x")
    for path in ("", *outside):
        body = curl(f"{server.url}/view/{path}", "--path-as-is", headers={}).body
        assert b"import" not in body and b"[metadata]" not in body


# --- for people --------------------------------------------------------------------------------------------------------

VIEWS = [f"#run={RUN}", f"#run={RUN}&part=uploads", f"#run={RUN}&part=files", "#uploads&agent=HLT", f"#file={NAME}"]
WCAG = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}


@pytest.fixture(scope="module")
def long_names(server: Server) -> None:
    send(server, "testagent", 234, HISTOGRAMS, run=123)
    send(server, LONG_AGENT, 1448384650, (DATA / "directories.root").read_bytes())
    send(server, LONG_AGENT, 1448384651, DAMAGED)


@pytest.mark.usefixtures("long_names")
@pytest.mark.parametrize("view", VIEWS)
def test_view_is_accessible_at_every_width(tab: Tab, view: str) -> None:
    """Neither dark nor light does axe-core find a fault, and nothing scrolls sideways."""
    page = tab.follow(view)
    expect(page.locator("tbody tr, figure[data-state=drawn]").first).to_be_visible()
    page.emulate_media(color_scheme="dark")
    assert inaccessible(page, {"type": "rule", "values": ["color-contrast"]}) == []
    page.emulate_media(color_scheme="light")
    assert inaccessible(page, WCAG) == []
    for width in (320, 380, 860, 900, 1100, 1300):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def inaccessible(page: Page, rules: dict[str, Any]) -> list[str]:
    """Return what axe-core finds against these rules; of a drawing it sees the label, as it is an image."""
    if not page.evaluate("typeof axe === 'object'"):
        page.evaluate((npm_package(AXE) / "axe.min.js").read_text())
    found = page.evaluate("rules => axe.run({ exclude: '.drawing svg' }, { runOnly: rules })", rules)
    return [f"{rule['id']}: {node['html']}" for rule in found["violations"] for node in rule["nodes"]]


def test_keyboard_reaches_what_links_say(tab: Tab) -> None:
    page = tab.open(f"#run={RUN}")
    expect(page.get_by_role("rowheader", name="EMC")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "EMC":
            break
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(f"#run={RUN}&part=uploads&agent=EMC$"))
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    expect(page).to_have_title(f"Run {RUN} · DQM receiver")
    expect(page.get_by_role("table", name="Uploads of run 300005, newest first")).to_be_visible()


def test_works_below_prefix_without_jsroot(browser: Browser, base: Path) -> None:
    environ = {**settings(base / "mounted"), "PYTHONPATH": str(PROJECT)}
    arguments = ("--threads", "8", "mounted_receiver:application")
    server = Server(environ, base / "mounted.log", arguments, cwd=PROJECT / "tests")
    try:
        with Tab(browser, f"{server.url}/dqm") as tab:
            page = tab.open()
            expect(page.get_by_role("heading", name="Nothing has arrived yet")).to_be_visible()
            form = [item for name, value in HEADERS.items() for item in ("-H", f"{name}: {value}")]
            curl(f"{server.url}/dqm/rest/api/files", *form, "--data-binary", f"@{DATA / 'h1_all.root'}", headers={})
            page.wait_for_timeout(LISTED)
            tab.refresh()
            expect(page.get_by_role("heading", name="Run 123")).to_be_visible()
            tab.follow(f"#file={NAME}")
            expect(page.get_by_text("npm pack jsroot@7.11.2")).to_be_visible()
            expect(page.get_by_text(hashlib.sha256(HISTOGRAMS).hexdigest())).to_be_visible()
    finally:
        server.stop()
