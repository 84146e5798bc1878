// The page for shifters: runs, agents, uploads, files and their histograms, from the receiver's API.
//
// Names, titles and reasons come from senders. They reach the page as text nodes and attributes only, never as HTML.

const API = "../rest/api/"; // relative, so that the receiver may be mounted below a prefix
const REFRESH_EVERY = 5_000; // ms, while the tab is visible
const GIVE_UP_AFTER = 30_000; // ms without an answer
const SILENT_AFTER = 300; // seconds without a file from an agent that has not ended
const STILL_AFTER = 60_000; // ms without input after which the page may open a new run by itself
const RUNS_AT_ONCE = 50;
const UPLOADS_AT_ONCE = 100;
const MOST_UPLOADS = 5_000; // kept in the page
const FILES_AT_ONCE = 100;

// --- small things ----------------------------------------------------------------------------------------------------

const byId = (id) => document.getElementById(id);

/** Make an element; children are nodes or text, and false ones are left out. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false)
      element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== false && child !== null && child !== undefined),
  );
  return element;
}

/** Text from a sender, in an element of its own so that its writing direction cannot reorder the text around it. */
const foreign = (text) => make("bdi", {}, String(text));

const link = (parameters, ...children) => make("a", { href: address(parameters) }, ...children);

function address(parameters) {
  const given = Object.entries(parameters).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return "#" + given.map(([name, value]) => (value === true ? name : `${name}=${encodeURIComponent(value)}`)).join("&");
}

const plural = (count, one, many = one + "s") => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

function formatBytes(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  if (bytes < 1000) return `${bytes} B`;
  const [unit, size] = [
    ["GB", 1e9],
    ["MB", 1e6],
    ["kB", 1e3],
  ].find(([, least]) => bytes >= least);
  return `${(bytes / size).toFixed(bytes < size * 10 ? 2 : bytes < size * 100 ? 1 : 0)} ${unit}`;
}

// --- time ------------------------------------------------------------------------------------------------------------

let clockError = 0; // ms that the receiver's clock is ahead of this one's
const now = () => Date.now() + clockError;
const twoDigits = (number) => String(number).padStart(2, "0");

function localDay(date) {
  return `${date.getFullYear()}-${twoDigits(date.getMonth() + 1)}-${twoDigits(date.getDate())}`;
}

const timeOfDay = (date) => [date.getHours(), date.getMinutes(), date.getSeconds()].map(twoDigits).join(":");

/** The local time; the day, too, unless it is today. */
function localTime(date) {
  return localDay(date) === localDay(new Date(now())) ? timeOfDay(date) : `${localDay(date)} ${timeOfDay(date)}`;
}

const utcTime = (date) =>
  date
    .toISOString()
    .replace("T", " ")
    .replace(/\.\d+Z$/, " UTC");

function duration(seconds) {
  if (seconds < 100) return `${Math.max(0, Math.floor(seconds))} s`;
  if (seconds < 5_940) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172_800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86_400)} days`;
}

const secondsSince = (date) => (now() - date.getTime()) / 1000;

/** A <time> element with UTC on hover; `kind`: "at" (local), "time" (without the day), "ago" ("12 s ago"), "for" ("12 s"). */
function timeElement(date, kind = "at") {
  if (!date || Number.isNaN(date.getTime())) return "–";
  const element = make("time", { datetime: date.toISOString(), title: utcTime(date), "data-kind": kind });
  element.textContent = timeText(date, kind);
  return element;
}

/** From then to then; the day is not said twice. */
function timeSpan(first, last) {
  if (!first || !last) return "–";
  return [timeElement(first), " to ", timeElement(last, localDay(first) === localDay(last) ? "time" : "at")];
}

function timeText(date, kind) {
  if (kind === "ago") return `${duration(secondsSince(date))} ago`;
  if (kind === "for") return duration(secondsSince(date));
  return kind === "time" ? timeOfDay(date) : localTime(date);
}

/** Let "12 s ago" grow. */
function tick() {
  if (document.hidden) return;
  for (const element of document.querySelectorAll("time:is([data-kind=ago], [data-kind=for])")) {
    const text = timeText(new Date(element.dateTime), element.dataset.kind);
    if (element.textContent !== text) element.textContent = text;
  }
}

const fromUnix = (seconds) => (seconds === null || seconds === undefined ? null : new Date(seconds * 1000));

// --- the receiver ----------------------------------------------------------------------------------------------------

/** The receiver has refused a request; `status` is the HTTP status. */
class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}
class WrongToken extends Refused {}
/** There was no answer. */
class Unreachable extends Error {}

const WRONG_TOKENS = ["Must pass a token!", "Received token, but it is invalid!"];
const TOKEN = "dqm-token"; // its name in sessionStorage

/** A header carries bytes: those of the token in UTF-8. */
const headerValue = (text) => String.fromCharCode(...new TextEncoder().encode(text));

async function send(path, { headers = {}, patient = false, ...options } = {}) {
  const token = sessionStorage.getItem(TOKEN) ?? "";
  let response;
  try {
    response = await fetch(API + path, {
      ...options,
      headers: { ...headers, token: headerValue(token) },
      cache: "no-store", // the page asks with If-None-Match itself
      credentials: "same-origin",
      signal: patient ? undefined : AbortSignal.timeout(GIVE_UP_AFTER),
    });
  } catch (error) {
    throw new Unreachable(error.message);
  }
  const date = Date.parse(response.headers.get("Date") ?? "");
  if (!Number.isNaN(date) && Math.abs(date - now()) > 2000) clockError = date - Date.now();
  if (response.ok || response.status === 304) return response;
  const answer = await response.json().catch(() => ({}));
  const message = answer.message ?? `The answer was ${response.status} ${response.statusText}`;
  if (WRONG_TOKENS.includes(answer.message)) throw new WrongToken(response.status, message);
  throw new Refused(response.status, message);
}

const answers = new Map(); // path → { etag, content } of the last answer

/** Get JSON; an answer that has not changed since is not sent again. */
async function getJson(path) {
  const before = answers.get(path);
  const response = await send(path, { headers: before?.etag ? { "If-None-Match": before.etag } : {} });
  if (response.status === 304) return before.content;
  let content;
  try {
    content = await response.json();
  } catch (error) {
    throw new Unreachable(error.message);
  }
  answers.set(path, { etag: response.headers.get("ETag"), content });
  if (answers.size > 50) answers.delete(answers.keys().next().value);
  return content;
}

/** Get JSON, or `empty` if the receiver answers 404. */
async function getJsonOr(empty, path) {
  try {
    return await getJson(path);
  } catch (error) {
    if (error.status === 404) return empty;
    throw error;
  }
}

function query(path, parameters) {
  const given = Object.entries(parameters).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return given.length ? `${path}?${new URLSearchParams(given)}` : path;
}

const filePath = (name) => `files/${encodeURIComponent(name)}`;

/** Uploads of all runs or of one, newest first: the newest page is asked for again and again, older ones on demand. */
class Uploads {
  constructor(run, filter = {}) {
    this.path = run === undefined ? "receipts" : `runs/${run}/receipts`;
    this.filter = { amoreAgent: filter.agent, outcome: filter.outcome };
    this.receipts = new Map();
    this.before = undefined; // not asked yet; null: there are no older ones
  }

  async refresh() {
    const page = await getJsonOr(
      { receipts: [], before: null },
      query(this.path, { limit: UPLOADS_AT_ONCE, ...this.filter }),
    );
    const overlaps = page.before === null || page.receipts.some((receipt) => this.receipts.has(receipt.id));
    if (!overlaps || this.before === undefined) {
      this.receipts.clear(); // more has come meanwhile than fits one page
      this.before = page.before;
    }
    this.add(page);
  }

  async older(limit = UPLOADS_AT_ONCE) {
    const page = await getJson(query(this.path, { limit, before: this.before, ...this.filter }));
    this.before = page.before;
    this.add(page);
  }

  add(page) {
    for (const receipt of page.receipts) this.receipts.set(receipt.id, receipt);
  }

  get full() {
    return this.receipts.size >= MOST_UPLOADS;
  }

  list() {
    return [...this.receipts.values()].sort(
      (one, other) => compare(other.received_at, one.received_at) || compare(other.id, one.id),
    );
  }
}

const compare = (one, other) => (one < other ? -1 : one > other ? 1 : 0);

// --- tables that keep still ------------------------------------------------------------------------------------------

let lastMove = 0; // when the pointer was last moved
let lastInput = 0; // when something was last done here

/** A table whose rows are brought up to date in place; while it is being read, new rows wait behind a button. */
class LiveTable {
  /** `columns`: [{ name, class }]; `row(item)`: { key, kind, cells }, a cell being a node, text, or a list of them. */
  constructor({ caption, columns, row, empty, noun, holds = true }) {
    Object.assign(this, { columns, row, noun, holds, items: [], waiting: null });
    this.body = make("tbody", { role: "rowgroup" });
    this.foot = make("tfoot", { role: "rowgroup" });
    const names = columns.map((column) =>
      make("th", { scope: "col", role: "columnheader", class: column.class }, column.name),
    );
    this.table = make(
      "table",
      { role: "table" },
      make("caption", {}, caption),
      make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, names)),
      this.body,
      this.foot,
    );
    this.button = make("button", { type: "button" });
    this.button.addEventListener("click", () => this.release());
    this.held = make("div", { class: "held", hidden: true }, this.button);
    this.empty = make("p", { class: "empty" }, empty);
    this.element = make("div", {}, this.held, this.table, this.empty);
  }

  show(items) {
    const known = new Set(this.items.map((item) => this.row(item).key));
    const keys = items.map((item) => this.row(item).key);
    const come = keys.filter((key) => !known.has(key)).length;
    const gone = this.items.length + come - items.length;
    if (this.holds && this.items.length && (come || gone) && this.isRead()) {
      this.waiting = items;
      this.button.textContent = come ? `Show ${plural(come, `new ${this.noun}`)}` : "Bring the list up to date";
      this.held.hidden = false;
      return;
    }
    this.apply(items);
  }

  /** Rows the reader has asked for are shown at once. */
  apply(items) {
    this.waiting = null;
    this.held.hidden = true;
    this.items = items;
    this.table.hidden = items.length === 0;
    this.empty.hidden = items.length > 0;
    updateRows(this.body, items.map(this.row), this.columns);
  }

  release() {
    const items = this.waiting;
    if (!items) return;
    this.apply(items);
    this.table.scrollIntoView({ block: "start" });
  }

  isRead() {
    const selection = document.getSelection();
    return (
      this.table.getBoundingClientRect().top < 0 ||
      this.element.contains(document.activeElement) ||
      (this.table.matches(":hover") && Date.now() - lastMove < 20_000) ||
      (!selection.isCollapsed && selection.containsNode(this.table, true))
    );
  }

  total(row) {
    updateRows(this.foot, row ? [row] : [], this.columns);
  }
}

function updateRows(body, rows, columns) {
  const old = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  let next = body.firstElementChild;
  for (const { key, kind, cells } of rows) {
    let row = old.get(String(key));
    old.delete(String(key));
    if (!row) row = make("tr", { "data-key": key, role: "row" });
    if (row === next) next = next.nextElementSibling;
    else body.insertBefore(row, next);
    if (kind) row.dataset.kind = kind;
    else delete row.dataset.kind;
    cells.forEach((content, index) => updateCell(row, index, content, columns[index]));
  }
  for (const row of old.values()) row.remove();
}

function updateCell(row, index, content, column) {
  const [tag, role] = index === 0 ? ["th", "rowheader"] : ["td", "cell"];
  const contents = [content].flat(Infinity).filter((part) => part !== false && part !== null && part !== undefined);
  const blank = contents.length === 0 || contents.every((part) => part === "");
  const kind = contents.find((part) => part instanceof Cell)?.kind;
  const cell = make(
    tag,
    {
      role,
      scope: index === 0 && "row",
      class:
        [column.class, blank && "blank", contents[0]?.className === "zero" && "none"].filter(Boolean).join(" ") || null,
      "data-label": index > 0 && column.name,
      "data-kind": kind,
    },
    contents.map((part) => (part instanceof Cell ? part.contents : part)),
  );
  const before = row.cells[index];
  if (!before) row.append(cell);
  else if (!before.isEqualNode(cell)) before.replaceWith(cell);
}

/** The contents of a table cell that is marked. */
class Cell {
  constructor(kind, ...contents) {
    this.kind = kind;
    this.contents = contents;
  }
}

const mark = (kind, ...children) => make("span", { class: "mark", "data-kind": kind }, children);
const count = (number, kind) =>
  number === 0
    ? make("span", { class: "zero" }, "0")
    : kind
      ? new Cell(kind, number.toLocaleString("en"))
      : number.toLocaleString("en");

// --- one run ---------------------------------------------------------------------------------------------------------

const PARTS = { agents: "Agents", uploads: "Uploads", files: "Files" };

class RunView {
  constructor(run, { part = "agents", agent, outcome } = {}) {
    Object.assign(this, { run, part: part in PARTS ? part : "agents", agent, outcome });
    this.title = `Run ${run}`;
    this.facts = make("p", { class: "facts" });
    this.problems = make("ul", { class: "problems", "aria-label": "State of the run" });
    this.tabs = Object.fromEntries(
      Object.entries(PARTS).map(([name, text]) => [
        name,
        make("a", { href: this.address({ part: name }), "aria-current": name === this.part && "page" }, text),
      ]),
    );
    this.panel = new { agents: AgentsPanel, uploads: UploadsPanel, files: FilesPanel }[this.part](this);
    this.element = make(
      "div",
      {},
      make("div", { class: "head" }, make("h1", { tabindex: -1 }, this.title), this.facts),
      this.problems,
      make("nav", { class: "tabs", "aria-label": `Parts of run ${run}` }, Object.values(this.tabs)),
      this.panel.element,
    );
  }

  address(changes = {}) {
    const { part, agent, outcome } = { part: this.part, agent: this.agent, outcome: this.outcome, ...changes };
    return address({
      run: this.run,
      part: part === "agents" ? "" : part,
      agent: part === "agents" ? "" : agent,
      outcome: part === "uploads" ? outcome : "",
    });
  }

  get isCurrent() {
    return runs.newest === this.run;
  }

  async refresh() {
    await Promise.all([this.refreshSummary(), this.panel.refresh()]);
  }

  async refreshSummary() {
    this.summary = await getJsonOr({ agents: {}, missing: [] }, `runs/${this.run}`);
    const agents = Object.values(this.summary.agents);
    const last = latest(agents.map((agent) => agent.last_arrival));
    const files = sum(agents, "files");
    replaceIfChanged(
      this.facts,
      agents.length > 0 && [
        `${plural(files, "file")}, ${formatBytes(sum(agents, "bytes"))} from ${plural(agents.length, "agent")}`,
        last && ["; the last ", timeElement(last, "ago")],
      ],
    );
    updateList(this.problems, agents.length || this.summary.missing.length ? findProblems(this) : []);
    replaceIfChanged(this.tabs.agents, [`Agents (${agents.length + this.summary.missing.length})`]);
    this.panel.showSummary?.(this.summary);
  }
}

const sum = (items, name) => items.reduce((total, item) => total + (item[name] ?? 0), 0);

function latest(times) {
  const last = times.filter(Boolean).sort().at(-1);
  return last ? new Date(last) : null;
}

function replaceIfChanged(element, children) {
  const fresh = make(element.tagName, {}, children);
  if (element.innerHTML !== fresh.innerHTML) element.replaceChildren(...fresh.childNodes);
}

function updateList(list, items) {
  items.forEach((item, index) => {
    const before = list.children[index];
    if (!before) list.append(item);
    else if (!before.isEqualNode(item)) before.replaceWith(item);
  });
  while (list.children.length > items.length) list.lastElementChild.remove();
}

/** The state of an agent in a few words, and its severity. */
function stateOfAgent(agent, isCurrent) {
  if (!agent.last_arrival) return { kind: "bad", short: "nothing accepted", text: ["nothing accepted"] };
  const last = new Date(agent.last_arrival);
  if (agent.ended) return { kind: "done", short: "ended", text: ["ended"] };
  if (secondsSince(last) > SILENT_AFTER) {
    return isCurrent
      ? { kind: "warn", short: "silent", text: ["silent for ", timeElement(last, "for")] }
      : { kind: "quiet", short: "not ended", text: ["no end came"] };
  }
  return { kind: "good", short: "sending", text: [agent.started ? "sending" : "sending; no start came"] };
}

/** The lines above the tables: the problems, the worst first, or that there are none. */
function findProblems(view) {
  const { agents, missing } = view.summary;
  const entries = Object.entries(agents).map(([name, agent]) => ({
    name,
    agent,
    state: stateOfAgent(agent, view.isCurrent),
  }));
  const named = (found) => found.map(({ name }, index) => [index > 0 && ", ", foreign(name)]).flat();
  const problems = [];
  const say = (kind, title, ...text) =>
    problems.push(make("li", { "data-kind": kind }, make("strong", {}, title), " ", text));
  const unaccepted = entries.filter(({ state }) => state.short === "nothing accepted");
  const silent = entries.filter(({ state }) => state.short === "silent");
  const rejected = sum(Object.values(agents), "rejected");
  const why = make("a", { href: view.address({ part: "uploads", agent: "", outcome: "rejected" }) }, "See why");
  if (missing.length)
    say(
      "bad",
      `${missing.length} missing:`,
      named(missing.map((name) => ({ name }))),
      missing.length === 1 ? " has sent nothing." : " have sent nothing.",
    );
  if (unaccepted.length) say("bad", "Nothing accepted:", named(unaccepted), ". ", why.cloneNode(true));
  if (rejected)
    say(
      "warn",
      `${rejected.toLocaleString("en")} rejected:`,
      named(entries.filter(({ agent }) => agent.rejected)),
      ". ",
      why,
    );
  if (
    silent.length &&
    silent.length === entries.filter(({ state }) => ["silent", "sending"].includes(state.short)).length
  ) {
    const last = latest(silent.map(({ agent }) => agent.last_arrival));
    say(
      "warn",
      "Nothing arrives:",
      "the last file came ",
      timeElement(last, "ago"),
      ", and not all agents have ended.",
    );
  } else if (silent.length) say("warn", `${silent.length} silent:`, named(silent), ".");
  if (!problems.length) {
    const open = entries.filter(({ state }) => state.kind !== "done").length;
    say(
      "good",
      "All is well:",
      open === 0
        ? "every agent has ended."
        : view.isCurrent
          ? `${plural(open, "agent")} sending, nothing rejected, nothing silent.`
          : "nothing was rejected.",
    );
  }
  return problems;
}

class AgentsPanel {
  constructor(view) {
    this.view = view;
    this.table = new LiveTable({
      caption: `Agents of run ${view.run}`,
      noun: "agent",
      holds: false, // rows keep their place: they are sorted by name
      empty: `Nothing has arrived of run ${view.run}.`,
      columns: [
        { name: "Agent", class: "name" },
        { name: "State" },
        { name: "Last arrival", class: "when" },
        { name: "Files", class: "number" },
        { name: "Size", class: "number" },
        { name: "Rejected", class: "number" },
        { name: "Duplicates", class: "number" },
        { name: "Reused names", class: "number" },
        { name: "Time stamps", class: "stamps" },
      ],
      row: (item) => this.row(item),
    });
    this.element = this.table.element;
  }

  async refresh() {}

  showSummary({ agents, missing }) {
    const items = Object.entries(agents).map(([name, agent]) => ({ name, agent }));
    items.push(...missing.map((name) => ({ name })));
    items.sort((one, other) => compare(one.name, other.name));
    this.table.show(items);
    const all = Object.values(agents);
    this.table.total(
      all.length > 1 && {
        key: "total",
        cells: [
          "All",
          "",
          "",
          sum(all, "files").toLocaleString("en"),
          formatBytes(sum(all, "bytes")),
          ...["rejected", "duplicates", "reused"].map((name) => sum(all, name).toLocaleString("en")),
          "",
        ],
      },
    );
  }

  row({ name, agent }) {
    if (!agent)
      return { key: name, kind: "bad", cells: [foreign(name), mark("bad", "missing"), "", "", "", "", "", "", ""] };
    const state = stateOfAgent(agent, this.view.isCurrent);
    const uploads = (changes, text) =>
      make("a", { href: this.view.address({ part: "uploads", agent: name, ...changes }) }, text);
    return {
      key: name,
      kind: state.kind === "bad" && "bad",
      cells: [
        uploads({}, foreign(name)),
        mark(state.kind, state.text),
        agent.last_arrival ? timeElement(new Date(agent.last_arrival), "ago") : "–",
        count(agent.files),
        formatBytes(agent.bytes),
        agent.rejected
          ? new Cell("bad", uploads({ outcome: "rejected" }, agent.rejected.toLocaleString("en")))
          : count(0),
        count(agent.duplicates),
        count(agent.reused),
        timeSpan(fromUnix(agent.first_time_stamp), fromUnix(agent.last_time_stamp)),
      ],
    };
  }
}

// --- uploads ---------------------------------------------------------------------------------------------------------

const OUTCOMES = {
  stored: { kind: "good", text: "stored" },
  duplicate: { kind: "quiet", text: "duplicate", title: "The same bytes had arrived before; nothing was written" },
  replaced: { kind: "warn", text: "replaced", title: "It took the name of a different file, whose bytes are kept" },
  rejected: { kind: "bad", text: "rejected" },
};
const REASONS = {
  agent: "This agent is not expected",
  client_gone: "The sender hung up",
  empty: "No file in it",
  encoding: "Sent with a content encoding",
  fault: "A fault of the receiver",
  forbidden: "The token may not send as this agent",
  headers: "Wrong headers",
  invalid_root_file: "Not a valid ROOT file",
  length_required: "No length was given",
  malformed_form: "Not a proper form",
  no_room: "No room on the disk",
  sha256: "Altered on the way",
  too_large: "Too large",
  truncated: "It broke off",
  unavailable: "The folder could not be used",
};

class UploadsPanel {
  /** `view` is one run's, or that of all runs, which has no `run`. */
  constructor(view) {
    this.view = view;
    this.uploads = new Uploads(view.run, view);
    const ofAll = view.run === undefined;
    this.table = new LiveTable({
      caption: ofAll ? "Uploads of all runs, newest first" : `Uploads of run ${view.run}, newest first`,
      noun: "upload",
      empty: view.agent || view.outcome ? "No such upload." : "Nothing has arrived yet.",
      columns: [
        { name: "Received", class: "when" },
        { name: "Outcome" },
        ...(ofAll ? [{ name: "Run" }] : []),
        { name: "Agent", class: "long" },
        { name: "File, or why it was rejected", class: "long" },
        { name: "Size", class: "number" },
        { name: "Objects", class: "number" },
        { name: "Sender" },
      ],
      row: (receipt) => this.row(receipt, ofAll),
    });
    this.agents = new Set(view.agent ? [view.agent] : []);
    this.agentSelect = make("select", { id: "filter-agent" });
    this.outcomeSelect = make(
      "select",
      { id: "filter-outcome" },
      option("", "all", view.outcome),
      Object.keys(OUTCOMES).map((name) => option(name, name, view.outcome)),
    );
    for (const select of [this.agentSelect, this.outcomeSelect]) {
      select.addEventListener("change", () =>
        replaceAddress(view.address({ agent: this.agentSelect.value, outcome: this.outcomeSelect.value })),
      );
    }
    this.showAgents([]);
    this.more = make("button", { type: "button", hidden: true }, "Older uploads");
    this.more.addEventListener("click", () => whileWaiting(this.more, () => this.showOlder()));
    this.element = make(
      "div",
      {},
      make(
        "div",
        { class: "filter", role: "group", "aria-label": "Filter" },
        make("label", {}, "Agent ", this.agentSelect),
        make("label", {}, "Outcome ", this.outcomeSelect),
      ),
      this.table.element,
      make("p", { class: "more" }, this.more),
    );
  }

  showSummary({ agents }) {
    this.showAgents(Object.keys(agents));
  }

  showAgents(names) {
    const before = this.agents.size;
    for (const name of names) this.agents.add(name);
    if (this.agents.size === before && this.agentSelect.options.length) return;
    const chosen = this.agentSelect.options.length ? this.agentSelect.value : this.view.agent;
    this.agentSelect.replaceChildren(
      option("", "all", chosen),
      ...[...this.agents].sort().map((name) => option(name, name, chosen)),
    );
  }

  async refresh() {
    await this.uploads.refresh();
    const receipts = this.uploads.list();
    this.table.show(receipts);
    this.showMore();
    if (this.view.run === undefined) this.showAgents(receipts.map((receipt) => receipt.agent).filter(Boolean));
  }

  async showOlder() {
    await this.uploads.older();
    this.table.apply(this.uploads.list());
    this.showMore();
  }

  showMore() {
    this.more.hidden = this.uploads.before === null || this.uploads.full;
  }

  row(receipt, ofAll) {
    const outcome = OUTCOMES[receipt.outcome] ?? { kind: "quiet", text: receipt.outcome };
    const rejected = receipt.outcome === "rejected";
    return {
      key: receipt.id,
      cells: [
        timeElement(new Date(receipt.received_at)),
        make("span", { title: outcome.title }, mark(outcome.kind, outcome.text)),
        ...(ofAll ? [link({ run: receipt.run }, String(receipt.run))] : []),
        foreign(receipt.agent ?? "–"),
        rejected
          ? make("span", { class: "reason" }, reasonInWords(receipt))
          : link({ file: receipt.filename }, foreign(receipt.filename)),
        formatBytes(receipt.size),
        receipt.objects === null || receipt.objects === undefined ? "–" : receipt.objects.toLocaleString("en"),
        foreign(receipt.sender ?? "–"),
      ],
    };
  }
}

function reasonInWords({ reason_class: kind, reason }) {
  const words = Object.hasOwn(REASONS, kind ?? "") ? REASONS[kind] : kind;
  return [
    words && foreign(words),
    words && reason && ": ",
    reason && foreign(reason),
    !words && !reason && "No reason was given",
  ];
}

const option = (value, text, chosen) => make("option", { value, selected: value === (chosen ?? "") }, text);

async function whileWaiting(button, action) {
  button.disabled = true;
  try {
    await action();
  } catch (error) {
    showFailure(error);
  } finally {
    button.disabled = false;
  }
}

/** The uploads of all runs that are arriving now. */
class AllUploadsView {
  constructor({ agent, outcome } = {}) {
    Object.assign(this, { agent, outcome, title: "All uploads" });
    this.panel = new UploadsPanel(this);
    this.element = make(
      "div",
      {},
      make("div", { class: "head" }, make("h1", { tabindex: -1 }, this.title)),
      make("p", { class: "facts alone" }, "What is arriving now, and what was rejected, and why."),
      this.panel.element,
    );
  }

  address({ agent, outcome }) {
    return address({ uploads: true, agent, outcome });
  }

  refresh() {
    return this.panel.refresh();
  }
}

// --- files that are still there --------------------------------------------------------------------------------------

const FILE_NAME = /^(?<agent>[A-Za-z0-9-]+)histos_(?<run>\d+)_DQM_(?<time>\d{4}(?:_\d\d){5})\.root$/;

class FilesPanel {
  constructor(view) {
    this.view = view;
    this.uploads = new Uploads(view.run, { agent: view.agent });
    this.shown = FILES_AT_ONCE;
    this.older = []; // names of later pages of the list
    this.before = undefined;
    this.table = new LiveTable({
      caption: `Files of run ${view.run} that Overwatch has not taken, newest first`,
      noun: "file",
      empty: view.agent
        ? `No file of ${view.agent} is here: none came, or Overwatch has taken them.`
        : "No file is here: none came, or Overwatch has taken them.",
      columns: [
        { name: "File", class: "long" },
        { name: "Time stamp", class: "when" },
        { name: "Received", class: "when" },
        { name: "Size", class: "number" },
        { name: "SHA-256" },
        { name: "Download" },
      ],
      row: (item) => this.row(item),
    });
    this.agents = make("select", { id: "filter-agent" });
    this.agents.addEventListener("change", () => replaceAddress(view.address({ agent: this.agents.value })));
    this.more = make("button", { type: "button", hidden: true }, "More files");
    this.more.addEventListener("click", () => whileWaiting(this.more, () => this.showMore()));
    this.element = make(
      "div",
      {},
      make("div", { class: "filter" }, make("label", {}, "Agent ", this.agents)),
      this.table.element,
      make("p", { class: "more" }, this.more),
    );
  }

  showSummary({ agents }) {
    const names = [...new Set([...Object.keys(agents), ...(this.view.agent ? [this.view.agent] : [])])].sort();
    if (this.agents.options.length !== names.length + 1) {
      this.agents.replaceChildren(
        option("", "all", this.view.agent),
        ...names.map((name) => option(name, name, this.view.agent)),
      );
    }
  }

  path(before) {
    return query("files", { runNumber: this.view.run, amoreAgent: this.view.agent, limit: 1000, before });
  }

  async refresh() {
    const [page] = await Promise.all([getJson(this.path()), this.uploads.refresh()]);
    if (this.before === undefined || page.before === null) [this.older, this.before] = [[], page.before];
    this.names = page.files;
    await this.matchReceipts();
    this.table.show(this.items());
    this.showButton();
  }

  /** The newest first, by the time in the name. */
  list() {
    const time = (name) => FILE_NAME.exec(name)?.groups.time ?? "";
    return [...new Set([...this.names, ...this.older])].sort(
      (one, other) => compare(time(other), time(one)) || compare(one, other),
    );
  }

  items() {
    const receipts = receiptsByName(this.uploads);
    return this.list()
      .slice(0, this.shown)
      .map((name) => ({ name, receipt: receipts.get(name) }));
  }

  /** Ask for older receipts while files that are shown lack theirs. */
  async matchReceipts() {
    while (this.uploads.before !== null && !this.uploads.full && this.items().some(({ receipt }) => !receipt)) {
      await this.uploads.older(1000);
    }
  }

  async showMore() {
    this.shown += FILES_AT_ONCE;
    if (this.shown > this.list().length && this.before !== null) {
      const page = await getJson(this.path(this.before));
      this.older.push(...page.files);
      this.before = page.before;
    }
    await this.matchReceipts();
    this.table.apply(this.items());
    this.showButton();
  }

  showButton() {
    this.more.hidden = this.shown >= this.list().length && this.before === null;
  }

  row({ name, receipt }) {
    const sha256 = receipt?.sha256;
    return {
      key: name,
      cells: [
        link({ file: name }, foreign(name)),
        timeElement(fromUnix(receipt?.time_stamp)),
        receipt
          ? timeElement(new Date(receipt.received_at))
          : make("span", { title: "The receiver wrote no receipt of it, or it is too old" }, "no receipt"),
        formatBytes(receipt?.size),
        sha256 ? make("code", { title: sha256 }, `${sha256.slice(0, 12)}…`) : "–",
        make(
          "button",
          { type: "button", class: "plain", "data-download": name, "aria-label": `Download ${name}` },
          "Download",
        ),
      ],
    };
  }
}

/** The newest receipt of each file that was accepted. */
function receiptsByName(uploads) {
  const found = new Map();
  for (const receipt of uploads.list()) {
    if (receipt.outcome !== "rejected" && !found.has(receipt.filename)) found.set(receipt.filename, receipt);
  }
  return found;
}

/** A link cannot carry the token in a header: fetch the file, and hand it to the browser. */
async function download(name) {
  const response = await send(filePath(name), { patient: true });
  let content;
  try {
    content = await response.blob();
  } catch (error) {
    throw new Unreachable(error.message);
  }
  const url = URL.createObjectURL(content);
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("[data-download]");
  if (button) whileWaiting(button, () => download(button.dataset.download));
});

// --- one file --------------------------------------------------------------------------------------------------------

const BLOCK = 1 << 18; // bytes asked for at once
const MOST_BLOCKS = 256; // kept
const LARGEST_OBJECT = 64 << 20; // bytes, inflated
const MOST_DRAWN = 60; // drawings kept while out of sight
const DRAWING_TIME = 15_000; // ms
const CELLS_AT_ONCE = 1000;
const DEEPEST = 20; // directories and collections in one another
const GET_JSROOT =
  "npm pack jsroot@7.11.2 && tar -xzf jsroot-7.11.2.tgz --strip-components=2 " +
  "package/build/jsroot.min.js package/modules/base/zstd.mjs package/modules/base/lzma.mjs";

class FileView {
  constructor(name) {
    Object.assign(this, { name, title: name });
    const parts = FILE_NAME.exec(name)?.groups;
    this.run = parts ? Number(parts.run) : undefined;
    this.about = make("dl", { class: "about" });
    this.notice = make("p", { class: "notice", role: "status", hidden: true });
    this.objects = make("section", { "aria-label": "Objects" });
    this.button = make("button", { type: "button", "data-download": name }, "Download");
    this.element = make(
      "div",
      {},
      make(
        "div",
        { class: "head" },
        make("h1", { tabindex: -1 }, foreign(name)),
        this.run !== undefined && link({ run: this.run, part: "files" }, `Run ${this.run}`),
      ),
      this.about,
      this.button,
      this.notice,
      this.objects,
    );
    if (parts) this.uploads = new Uploads(this.run);
    this.file = new RemoteFile(name, () => this.showState());
  }

  async refresh() {
    await Promise.all([this.refreshReceipt(), this.file.look()]);
    this.showState();
    if (this.file.error) return;
    this.drawings ??= new Drawings(this.file, this.objects);
    this.drawings.wake(); // reports its own failures
  }

  async refreshReceipt() {
    if (!this.uploads || this.receipt) return;
    await this.uploads.refresh();
    const find = () => receiptsByName(this.uploads).get(this.name);
    while (!find() && this.uploads.before !== null && !this.uploads.full) await this.uploads.older(1000);
    this.receipt = find();
  }

  showState() {
    const { receipt, file } = this;
    const facts = [
      [
        "Size",
        file.size === undefined
          ? receipt && formatBytes(receipt.size)
          : `${formatBytes(file.size)} (${plural(file.size, "byte")})`,
      ],
      ["Agent", receipt && foreign(receipt.agent)],
      ["Time stamp", receipt && timeElement(fromUnix(receipt.time_stamp))],
      ["Received", receipt ? timeElement(new Date(receipt.received_at)) : file.modified && timeElement(file.modified)],
      ["SHA-256", receipt?.sha256 && make("code", {}, receipt.sha256)],
    ];
    replaceIfChanged(
      this.about,
      facts.filter(([, value]) => value).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]),
    );
    const state = {
      gone: this.drawings
        ? "This file is no longer here: Overwatch has taken it away. What is drawn stays until you leave."
        : (file.message ?? "There is no such file."),
      replaced:
        "A different file has taken this name. What is drawn is of the file before it; load the page again for the new one.",
    }[file.error];
    this.button.disabled = file.error === "gone";
    this.notice.dataset.kind = "warn";
    this.notice.hidden = !state;
    if (state && this.notice.textContent !== state) this.notice.textContent = state;
  }

  close() {
    this.drawings?.close();
  }
}

/** A file of the receiver, read in blocks by Range requests with the token in a header. */
class RemoteFile {
  constructor(name, onChange) {
    Object.assign(this, { name, onChange, blocks: new Map() });
    this.error = undefined; // "gone" or "replaced"
  }

  /** Find out whether the file is still there and unchanged. */
  async look() {
    if (this.error) return;
    const headers = this.etag ? { "If-None-Match": this.etag } : {};
    const response = await this.guard(send(filePath(this.name), { method: "HEAD", headers }));
    if (response && response.status !== 304) this.note(response, Number(response.headers.get("Content-Length")));
  }

  note(response, size) {
    const etag = response.headers.get("ETag");
    if (this.etag && etag !== this.etag) return this.fail("replaced");
    this.etag = etag;
    this.size = size;
    const modified = response.headers.get("Last-Modified");
    this.modified = modified ? new Date(modified) : null;
  }

  fail(error, message) {
    if (!this.error) Object.assign(this, { error, message });
    this.onChange();
  }

  /** Await an answer; undefined if the file is gone or a different one has its name. */
  async guard(answer) {
    try {
      return await answer;
    } catch (error) {
      if (error.status === 404) this.fail("gone", error.message);
      else if (error.status === 412 || error.status === 416) this.fail("replaced");
      else throw error;
    }
  }

  async read(position, size) {
    const end = Math.min(position + size, this.size);
    const bytes = new Uint8Array(Math.max(0, end - position));
    const first = Math.floor(position / BLOCK);
    const last = Math.floor((end - 1) / BLOCK);
    const blocks = await Promise.all(Array.from({ length: last - first + 1 }, (_, index) => this.block(first + index)));
    blocks.forEach((block, index) => {
      const start = (first + index) * BLOCK;
      const from = Math.max(position, start);
      bytes.set(block.subarray(from - start, Math.min(end - start, BLOCK)), from - position);
    });
    return new DataView(bytes.buffer);
  }

  block(index) {
    const known = this.blocks.get(index);
    if (known) return known;
    const block = this.fetchBlock(index);
    this.blocks.set(index, block);
    block.catch(() => this.blocks.delete(index)); // to be asked for again
    if (this.blocks.size > MOST_BLOCKS) this.blocks.delete(this.blocks.keys().next().value);
    return block;
  }

  async fetchBlock(index) {
    const start = index * BLOCK;
    const headers = { Range: `bytes=${start}-${Math.min(start + BLOCK, this.size) - 1}`, "If-Match": this.etag };
    const response = await this.guard(send(filePath(this.name), { headers }));
    if (!response) throw new Error("the file is no longer here");
    const bytes = new Uint8Array(await response.arrayBuffer());
    return response.status === 206 ? bytes : bytes.subarray(start, start + BLOCK);
  }
}

// --- drawing ---------------------------------------------------------------------------------------------------------

let jsroot; // a promise of JSROOT

/** Load JSROOT; the promise is null where the receiver has none. */
function loadJsroot() {
  jsroot ??= new Promise((resolve, reject) => {
    const script = make("script", { src: "jsroot.min.js" });
    script.addEventListener("load", () => resolve(prepared(globalThis.JSROOT)));
    script.addEventListener("error", async () => {
      script.remove();
      const answer = await fetch("jsroot.min.js", { method: "HEAD" }).catch(() => null);
      if (answer?.status === 404) return resolve(null);
      jsroot = undefined;
      reject(new Unreachable("JSROOT has not come"));
    });
    document.head.append(script);
  });
  return jsroot;
}

function prepared(JSROOT) {
  Object.assign(JSROOT.settings, {
    ContextMenu: false, // it shows names as HTML
    DragAndDrop: false,
    DragGraphs: false,
    HandleKeys: false,
    IgnoreUrlOptions: true,
    MoveResize: false,
    PreferSavedPoints: true, // a formula would have to be compiled, which the page's policy forbids
    ProgressBox: false, // it shows messages as HTML
    ToolBar: false,
    ZoomTouch: false, // fingers and wheels scroll the page
    ZoomWheel: false,
  });
  return JSROOT;
}

const COLLECTIONS = /^(TObjArray|TList|THashList|TClonesArray)$/;
const DIRECTORIES = /^TDirectory(File)?$/;
const FUNCTIONS = /^TF[123]$|^TF12$/;
const DRAWN = new RegExp(
  "^(T(H[123]|Profile|Graph|CutG|Efficiency|MultiGraph|HStack|Canvas|Pad|F[123]|F12|Scatter|Pie|Pave|Latex|MathText|" +
    "Text|Line|PolyLine|PolyMarker|Marker|Ellipse|Arc|Arrow|Box|Wbox|Spline|RatioPlot|Legend|Crown|CurlyLine|CurlyArc|" +
    "Gaxis|Annotation)|Roo(Plot|Hist|Curve))",
);
const HELPERS = /^T(PaletteAxis|Frame|Exec)$/; // not drawn, or harmless
const PARTS_OF_OBJECTS = ["fPrimitives", "fFunctions", "fHists", "fGraphs", "fItems"]; // drawn along with them

/** Whether JSROOT may draw the class, or its first base that is known. (A TTree or a list becomes HTML there.) */
function canBeDrawn(className, bases) {
  for (let depth = 0; className && depth < 10; depth++) {
    if (DRAWN.test(className)) return true;
    className = bases.get(className);
  }
  return false;
}

/** Remove the parts of an object that must not be drawn, wherever JSROOT would find them; return the functions that are not drawn. */
function prepare(object, bases, depth = 0) {
  if (!object || typeof object !== "object" || depth > DEEPEST) return [];
  for (const owner of [object, object.fXaxis, object.fYaxis, object.fZaxis]) {
    for (const field of ["fName", "fTitle"]) if (typeof owner?.[field] === "string") owner[field] = utf8(owner[field]);
  }
  const unseen = [];
  if (FUNCTIONS.test(object._typename)) {
    if (!(object.fSave?.length > 3)) unseen.push(object.fName || "(no name)");
    object.evalPar = () => NaN; // JSROOT would compile the formula; so it takes the saved points
  }
  for (const field of PARTS_OF_OBJECTS) {
    const list = object[field];
    if (!Array.isArray(list?.arr)) continue;
    for (let index = list.arr.length - 1; index >= 0; index--) {
      const part = list.arr[index];
      const className = part?._typename ?? "";
      const drawn = canBeDrawn(className, bases) || HELPERS.test(className);
      const found = drawn ? prepare(part, bases, depth + 1) : [];
      unseen.push(...found);
      if (drawn && !(FUNCTIONS.test(className) && found.length)) continue;
      list.arr.splice(index, 1);
      list.opt?.splice(index, 1);
    }
  }
  return unseen;
}

/** JSROOT takes each byte of a string for a character; ROOT's users mostly write UTF-8. */
function utf8(text) {
  if (!/[\x80-\xff]/.test(text) || /[^\x00-\xff]/.test(text)) return text;
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(
      Uint8Array.from(text, (character) => character.charCodeAt(0)),
    );
  } catch {
    return text;
  }
}

/** Why JSROOT could not do it, in words. */
function failureInWords(error) {
  const text = String(error?.message ?? error);
  const missing = /(zstd|lzma)\.mjs/.exec(text)?.[0];
  return missing ? `it is compressed in a way for which JSROOT needs base/${missing} beside it` : text;
}

/** All drawings of a file: cells are made at once, and drawn when they come into view. */
class Drawings {
  constructor(file, element) {
    Object.assign(this, { file, element, queue: new Set(), drawn: new Set(), closed: false });
    this.observer = new IntersectionObserver((entries) => this.onSight(entries), { rootMargin: "300px 0px" });
    this.onResize = debounced(() => this.resize(), 300);
    window.addEventListener("resize", this.onResize);
    this.message = make("p", { class: "notice" });
  }

  /** Continue the work that a lost connection has interrupted. */
  wake() {
    if (!this.opening && !this.root) this.opening = this.open();
    for (const { cell } of this.element.querySelectorAll("figure[data-state=waiting], section[data-waits]")) {
      if (cell.inView) this.queue.add(cell);
    }
    this.work();
  }

  async open() {
    this.say("Opening the file …");
    try {
      const JSROOT = await loadJsroot();
      if (this.closed) return;
      if (!JSROOT) return this.explainJsroot();
      this.JSROOT = JSROOT;
      const root = await within(DRAWING_TIME * 2, JSROOT.openFile(this.proxy()));
      if (this.closed || !root) return;
      this.root = root;
      this.bases = baseClasses(root);
      this.message.remove();
      this.showTop(root.fKeys);
    } catch (error) {
      if (this.closed) return;
      if (!this.file.error) this.say(`The file could not be read: ${failureInWords(error)}.`, "bad");
      else this.message.remove();
      if (error instanceof Unreachable) this.opening = undefined;
    }
  }

  say(text, kind) {
    this.message.replaceChildren(text);
    if (kind) this.message.dataset.kind = kind;
    else delete this.message.dataset.kind;
    this.element.append(this.message);
  }

  explainJsroot() {
    this.say("");
    this.message.append(
      "Histograms are not drawn here, because this receiver has no JSROOT. Its administrator gets it with ",
      make("code", {}, GET_JSROOT),
      " in a folder that ",
      make("code", {}, "DQM_RECEIVER_JSROOT"),
      " names.",
    );
  }

  proxy() {
    const { file, JSROOT } = this;
    return Object.assign(new JSROOT.FileProxy(), {
      openFile: async () => true,
      getFileName: () => file.name,
      getFileSize: () => file.size,
      readBuffer: (position, size) => file.read(position, size),
    });
  }

  showTop(keys) {
    const items = keyItems(keys, this);
    const search = make("input", { type: "search", id: "find", autocomplete: "off" });
    search.addEventListener(
      "input",
      debounced(() => this.find(search.value), 150),
    );
    this.element.append(
      make(
        "div",
        { class: "filter" },
        make("h2", {}, plural(items.length, "object")),
        items.length > 8 && make("label", {}, "Name contains ", search),
      ),
    );
    if (items.length === 0) this.element.append(make("p", { class: "empty" }, "No objects are listed in this file."));
    this.showItems(items, this.element);
  }

  /** Single objects in a grid, then directories and collections, each with a grid of its own. */
  showItems(items, parent, from = 0, depth = 0) {
    const some = items.slice(from, from + CELLS_AT_ONCE);
    const single = some.filter((item) => !item.isGroup);
    if (single.length) {
      const grid = make(
        "div",
        { class: "grid" },
        single.map((item) => this.makeCell(item)),
      );
      parent.append(grid);
    }
    for (const item of some.filter((each) => each.isGroup)) parent.append(this.makeGroup(item, depth));
    const left = items.length - from - some.length;
    if (left <= 0) return;
    const button = make(
      "button",
      { type: "button" },
      `Show ${Math.min(left, CELLS_AT_ONCE).toLocaleString("en")} more of ${plural(left, "object")}`,
    );
    const more = make("p", { class: "more" }, button);
    button.addEventListener("click", () => {
      more.remove();
      this.showItems(items, parent, from + CELLS_AT_ONCE, depth);
    });
    parent.append(more);
  }

  makeCell(item) {
    const drawing = make(
      "div",
      { class: "drawing", role: "img", "aria-label": `${item.name}, ${item.className}` },
      make("div", { class: "message" }, "…"),
    );
    const large = make(
      "button",
      { type: "button", class: "plain", hidden: true, "aria-label": `Larger: ${item.name}` },
      "Larger",
    );
    const figure = make(
      "figure",
      { class: "object" },
      make(
        "figcaption",
        {},
        make("b", { title: item.name }, foreign(item.name || "(no name)")),
        large,
        make(
          "span",
          { class: "class", title: item.title },
          foreign(item.className),
          item.title && item.title !== item.name && [" · ", foreign(item.title)],
        ),
      ),
      drawing,
    );
    const cell = { item, figure, drawing, large };
    setState(cell, "waiting");
    large.addEventListener("click", () => showLarge(this, cell));
    figure.cell = cell;
    this.observer.observe(figure);
    return figure;
  }

  makeGroup(item, depth) {
    const section = make(
      "section",
      { class: "group", "data-waits": true, "aria-label": item.name || item.className },
      make("h3", {}, foreign(item.name || "(no name)"), " ", make("span", { class: "class" }, foreign(item.className))),
    );
    section.cell = { item, section, depth };
    this.observer.observe(section);
    return section;
  }

  onSight(entries) {
    for (const { target, isIntersecting } of entries) {
      const { cell } = target;
      cell.inView = isIntersecting;
      if (isIntersecting && !["drawing", "drawn", "message"].includes(cell.state)) this.queue.add(cell);
      else if (!isIntersecting) this.queue.delete(cell);
    }
    this.work();
  }

  /** Draw one after the other, so that the page can be scrolled meanwhile. */
  async work() {
    if (this.working) return;
    this.working = true;
    while (this.queue.size && !this.closed) {
      const [cell] = this.queue;
      this.queue.delete(cell);
      await (cell.section ? this.openGroup(cell) : this.draw(cell));
      await new Promise((resolve) => setTimeout(resolve));
    }
    this.working = false;
  }

  async openGroup(cell) {
    const { section, item, depth } = cell;
    try {
      const items = await within(DRAWING_TIME, item.members());
      if (this.closed) return;
      this.observer.unobserve(section);
      section.removeAttribute("data-waits");
      section.querySelector(".class").append(`, ${plural(items.length, "object")}`);
      if (depth >= DEEPEST) section.append(make("p", { class: "empty" }, "It lies too deep to be shown."));
      else this.showItems(items, section, 0, depth + 1);
      this.find(this.wanted ?? "");
    } catch (error) {
      if (this.closed || error instanceof Unreachable) return;
      section.removeAttribute("data-waits");
      section.append(make("p", { class: "empty" }, `It could not be read: ${failureInWords(error)}`));
    }
  }

  async draw(cell) {
    const { item, drawing, figure } = cell;
    setState(cell, "drawing");
    try {
      const text = item.refusal?.();
      if (text) return this.explain(cell, text);
      const object = await within(DRAWING_TIME, item.read());
      if (this.closed) return;
      const { message, note } = this.inWords(object, item);
      if (message) return this.explain(cell, message);
      drawing.replaceChildren();
      await within(DRAWING_TIME, this.JSROOT.draw(drawing, object, drawOption(object, item)));
      if (note && !figure.querySelector(".note")) figure.append(make("p", { class: "note" }, note));
      setState(cell, "drawn");
      cell.large.hidden = false;
      this.drawn.add(cell);
      this.forget();
    } catch (error) {
      if (this.closed) return;
      this.JSROOT.cleanup(drawing);
      this.explain(cell, this.file.error ? "No longer here." : `JSROOT could not draw it: ${failureInWords(error)}`);
      if (error instanceof Unreachable) setState(cell, "waiting"); // drawn when it comes into view again
    }
  }

  explain(cell, text) {
    cell.drawing.replaceChildren(make("div", { class: "message" }, text));
    for (const name of ["role", "aria-label"]) cell.drawing.removeAttribute(name); // it is text, not an image
    setState(cell, "message");
  }

  /** The text in the place of a drawing, or below it. */
  inWords(object, item) {
    if (!object) return { message: "Empty." };
    if (object._typename === "TObjString") return { message: utf8(object.fString ?? "") };
    if (!canBeDrawn(object._typename ?? item.className, this.bases)) {
      const text = object.fVal !== undefined ? String(object.fVal) : object.fTitle;
      return { message: utf8(text ?? "") || `An object of class ${object._typename ?? item.className} is not drawn.` };
    }
    const hidden = prepare(object, this.bases);
    const why = `${hidden.join(", ")}: a function is drawn only where its points are saved in the file; no formula is run.`;
    if (hidden.length && FUNCTIONS.test(object._typename))
      return { message: [object.fTitle && `${object.fTitle} — `, why].filter(Boolean).join("") };
    return { note: hidden.length ? `Without ${why}` : undefined };
  }

  /** Of many drawings, those out of sight go first; none goes that could not be drawn again. */
  forget() {
    for (const cell of this.drawn) {
      if (this.drawn.size <= MOST_DRAWN || this.file.error) return;
      if (cell.inView) continue;
      this.JSROOT.cleanup(cell.drawing);
      cell.drawing.replaceChildren(make("div", { class: "message" }, "…"));
      setState(cell, "waiting");
      this.drawn.delete(cell);
    }
  }

  find(text) {
    this.wanted = text;
    const wanted = text.toLowerCase();
    for (const figure of this.element.querySelectorAll("figure.object")) {
      figure.hidden = !figure.cell.item.name.toLowerCase().includes(wanted);
    }
  }

  resize() {
    for (const { drawing } of this.drawn) this.JSROOT.resize(drawing);
  }

  close() {
    this.closed = true;
    this.observer.disconnect();
    window.removeEventListener("resize", this.onResize);
    for (const { drawing } of this.drawn) this.JSROOT.cleanup(drawing);
    byId("large").close();
  }
}

/** "waiting" to be seen, "drawing", "drawn", or a "message" in the place of a drawing. */
function setState(cell, state) {
  cell.state = cell.figure.dataset.state = state;
}

/** The keys of a directory, newest cycles only. Objects are read by key: a `;` or `/` in a name misleads JSROOT. */
function keyItems(keys, drawings) {
  const newest = new Map();
  for (const key of keys) {
    if (key.fName === "StreamerInfo" && key.fClassName === "TList") continue;
    const before = newest.get(key.fName);
    if (!before || before.fCycle < key.fCycle) newest.set(key.fName, key);
    else if (before.fCycle === key.fCycle) newest.set(key, key); // the same name: JSROOT leaves out quotes
  }
  return [...newest.values()].map((key) => {
    const name = utf8(key.fName);
    const className = key.fClassName;
    const read = () => readKey(drawings.root, key);
    if (DIRECTORIES.test(className)) {
      return {
        name,
        className,
        isGroup: true,
        members: async () => keyItems(await readDirectory(drawings.root, key), drawings),
      };
    }
    if (COLLECTIONS.test(className)) {
      return { name, className, isGroup: true, members: async () => memberItems(await read()) };
    }
    return { name, className, title: utf8(key.fTitle), read, refusal: () => refusal(key, drawings.bases) };
  });
}

function refusal(key, bases) {
  const className = key.fClassName;
  if (/^(TTree|TNtupleD?|TChain|ROOT::RNTuple|ROOT::Experimental::RNTuple)$/.test(className))
    return `A ${className} is not drawn: download the file.`;
  if (!canBeDrawn(className, bases) && !/^T(ObjString|Named|Parameter)/.test(className))
    return `An object of class ${className} is not drawn.`;
  if (key.fObjlen > LARGEST_OBJECT)
    return `Too large to be drawn here (${formatBytes(key.fObjlen)}): download the file.`;
}

function memberItems(collection) {
  const members = Array.isArray(collection.arr) ? collection.arr : [];
  return members.flatMap((object, index) => {
    if (!object) return []; // a TObjArray may have holes
    const className = object._typename ?? "?";
    const name = utf8(object.fName || object.name || "") || `[${index}]`;
    const option = collection.opt?.[index];
    if (COLLECTIONS.test(className))
      return [{ name, className, isGroup: true, members: async () => memberItems(object) }];
    return [{ name, className, title: utf8(object.fTitle ?? ""), option, read: async () => object }];
  });
}

async function readKey(root, key) {
  const buffer = await root.readObjBuffer(key);
  const object = {};
  buffer.mapObject(1, object);
  buffer.classStreamer(object, key.fClassName);
  object._typename ??= key.fClassName;
  return object;
}

async function readDirectory(root, key) {
  const byKey = Object.create(root, { getKey: { value: async () => key }, getDir: { value: () => null } });
  return (await byKey.readObject(key.fName, key.fCycle)).fKeys;
}

/** Each class of the file's streamer info with its first base. */
function baseClasses(root) {
  const bases = new Map();
  for (const info of root.fStreamerInfos?.arr ?? []) {
    const element = info.fElements?.arr?.[0];
    if (element?.fTypeName === "BASE") bases.set(info.fName, element.fName);
  }
  return bases;
}

function drawOption(object, item) {
  const given = item.option || object.fOption;
  if (given) return given;
  return /^T(H2|Profile2D)/.test(object._typename) ? "colz" : "";
}

async function showLarge(drawings, cell) {
  const dialog = byId("large");
  const drawing = byId("large-drawing");
  byId("large-name").replaceChildren(foreign(cell.item.name || "(no name)"));
  drawing.replaceChildren();
  dialog.showModal();
  dialog.addEventListener("close", () => drawings.JSROOT.cleanup(drawing), { once: true });
  try {
    const object = await cell.item.read();
    prepare(object, drawings.bases);
    await drawings.JSROOT.draw(drawing, object, drawOption(object, cell.item));
  } catch (error) {
    const text = drawings.file.error
      ? "The file is no longer here."
      : `JSROOT could not draw it: ${failureInWords(error)}`;
    drawing.replaceChildren(make("div", { class: "message" }, text));
  }
}

byId("large-close").addEventListener("click", () => byId("large").close());

// A title may be a link to anywhere (#url in TLatex): inside drawings none is followed.
document.addEventListener("click", (event) => event.target.closest?.(".drawing a") && event.preventDefault(), true);

function within(milliseconds, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error("it took too long")), milliseconds);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

function debounced(action, milliseconds) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, milliseconds);
  };
}

// --- the list of runs ------------------------------------------------------------------------------------------------

const runs = {
  numbers: new Set(),
  newest: undefined, // the run of which something has come last
  before: undefined,

  async refresh() {
    const page = await getJson(query("runs", { limit: RUNS_AT_ONCE }));
    for (const run of page.runs) this.numbers.add(run);
    this.newest = page.runs[0];
    if (this.before === undefined) this.before = page.before;
    this.show();
  },

  async older() {
    const page = await getJson(query("runs", { limit: RUNS_AT_ONCE, before: this.before }));
    for (const run of page.runs) this.numbers.add(run);
    this.before = page.before;
    this.show();
  },

  show() {
    const items = [...this.numbers]
      .sort((one, other) => other - one)
      .map((run) =>
        make(
          "li",
          {},
          make(
            "a",
            { href: address({ run }), "aria-current": view?.run === run && "page" },
            String(run),
            run === this.newest && make("span", { class: "newest" }, "newest arrivals"),
          ),
        ),
      );
    updateList(byId("run-list"), items);
    byId("older-runs").hidden = this.before === null || this.before === undefined;
  },
};

byId("older-runs").addEventListener("click", (event) => whileWaiting(event.target, () => runs.older()));

// --- which view ------------------------------------------------------------------------------------------------------

let view;
let follows = false; // whether the newest run is to be shown, whichever it is

/** A view that only says something. */
class MessageView {
  constructor(title, text) {
    this.title = title;
    this.element = make("div", {}, make("h1", { tabindex: -1 }, title), make("p", { class: "empty" }, text));
  }

  async refresh() {}
}

function viewOf(hash) {
  const parameters = new URLSearchParams(hash.slice(1));
  const filter = Object.fromEntries(
    ["part", "agent", "outcome"].map((name) => [name, parameters.get(name) ?? undefined]),
  );
  if (parameters.has("file")) {
    const name = parameters.get("file");
    return FILE_NAME.test(name)
      ? new FileView(name)
      : new MessageView("No such file", "The name in the address is not that of a file of this receiver.");
  }
  if (parameters.has("run")) {
    const run = parameters.get("run");
    return /^\d{1,10}$/.test(run)
      ? new RunView(Number(run), filter)
      : new MessageView("No such run", "The address does not name a run by its number.");
  }
  if (parameters.has("uploads")) return new AllUploadsView(filter);
  return runs.newest === undefined
    ? new MessageView("Nothing has arrived yet", "The first run opens here by itself as soon as a file of it arrives.")
    : new RunView(runs.newest, filter);
}

function show(next, { focus = false } = {}) {
  view?.close?.();
  view = next;
  document.title = `${view.title} · DQM receiver`;
  byId("main").replaceChildren(view.element);
  for (const [id, isShown] of [
    ["to-current", follows],
    ["to-uploads", view instanceof AllUploadsView],
  ]) {
    if (isShown) byId(id).setAttribute("aria-current", "page");
    else byId(id).removeAttribute("aria-current");
  }
  runs.show();
  if (!focus) return;
  if (matchMedia("(max-width: 1060px)").matches) byId("runs").open = false;
  window.scrollTo(0, 0);
  view.element.querySelector("h1")?.focus({ preventScroll: true });
}

/** Open the view that the address names. */
function route({ focus = true } = {}) {
  follows = !/[a-z]/.test(location.hash);
  notice.hide();
  show(viewOf(location.hash), { focus });
  refresh();
}

function replaceAddress(hash) {
  history.replaceState(null, "", hash);
  const id = document.activeElement?.id;
  route({ focus: false });
  if (id) byId(id)?.focus();
}

/** Open a new run by itself, unless the page is being read. */
function follow() {
  if (!follows || runs.newest === undefined || runs.newest === view.run) return;
  if (view.run === undefined) return show(viewOf(""));
  if (runs.newest < view.run) return;
  if (Date.now() - lastInput > STILL_AFTER) return show(viewOf(""));
  const open = make("a", { href: "#" }, `Run ${runs.newest}`);
  open.addEventListener("click", (event) => {
    event.preventDefault();
    route();
  });
  notice.show("info", open, " has begun.");
}

for (const kind of ["pointermove", "pointerdown", "keydown", "wheel", "touchmove"]) {
  document.addEventListener(
    kind,
    () => {
      lastInput = Date.now();
      if (kind === "pointermove") lastMove = lastInput;
    },
    { passive: true, capture: true },
  );
}

// --- refreshing ------------------------------------------------------------------------------------------------------

let timer;
let turn = 0; // of refreshing; an older one is given up
let lostSince; // when the connection was lost

async function refresh() {
  clearTimeout(timer);
  const mine = ++turn;
  try {
    await runs.refresh();
    if (mine !== turn) return;
    follow();
    await view.refresh();
    if (mine !== turn) return;
    lostSince = undefined;
    showState("good", "Live");
  } catch (error) {
    if (mine !== turn) return;
    showFailure(error);
    if (error instanceof WrongToken) return;
  }
  if (!document.hidden) timer = setTimeout(refresh, REFRESH_EVERY);
}

function showFailure(error) {
  if (error instanceof WrongToken) return askForToken(error.message);
  if (error instanceof Unreachable) {
    lostSince ??= new Date(now());
    return showState("bad", "Connection lost ", timeElement(lostSince, "ago"), "; trying again");
  }
  if (!(error instanceof Refused)) console.error(error);
  showState(
    "bad",
    error instanceof Refused
      ? `The receiver refuses (${error.status}): ${error.message}`
      : `A fault of this page: ${error.message}`,
  );
}

function showState(kind, ...text) {
  const state = byId("state");
  if (state.dataset.kind === kind && state.dataset.text === String(text[0])) return;
  Object.assign(state.dataset, { kind, text: String(text[0]) });
  state.replaceChildren(...text);
}

const notice = {
  element: make("p", { class: "notice", role: "status", hidden: true }),
  show(kind, ...text) {
    this.element.dataset.kind = kind;
    this.element.hidden = false;
    if (this.text !== String(text)) this.element.replaceChildren(...text);
    this.text = String(text);
  },
  hide() {
    this.element.hidden = true;
  },
};

document.addEventListener("visibilitychange", () => {
  if (byId("layout").hidden) return;
  clearTimeout(timer);
  if (document.hidden) turn++;
  else refresh();
});

// --- the token -------------------------------------------------------------------------------------------------------

function askForToken(message) {
  clearTimeout(timer);
  turn++;
  const given = sessionStorage.getItem(TOKEN) !== null;
  sessionStorage.removeItem(TOKEN);
  answers.clear();
  view?.close?.();
  view = undefined;
  byId("main").replaceChildren();
  showParts(false);
  byId("token-error").textContent = given && message ? message : "";
  byId("state").replaceChildren();
  delete byId("state").dataset.kind;
  byId("token").value = "";
  byId("token").focus();
}

/** Show the data's parts of the page, or else the form for the token. */
function showParts(withData) {
  for (const id of ["layout", "forget", "views"]) byId(id).hidden = !withData;
  byId("token-form").hidden = withData;
}

function start() {
  showParts(true);
  byId("layout").before(notice.element);
  route({ focus: false });
}

byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, byId("token").value.trim());
  start();
});
byId("forget").addEventListener("click", () => askForToken());
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
byId("to-current").addEventListener("click", () => location.hash === "" && route());
window.addEventListener("hashchange", () => byId("layout").hidden || route());

byId("runs").open = !matchMedia("(max-width: 1060px)").matches;
matchMedia("(max-width: 1060px)").addEventListener("change", (event) => {
  byId("runs").open = !event.matches;
});
setInterval(tick, 1000);

if (sessionStorage.getItem(TOKEN) === null) askForToken();
else start();
