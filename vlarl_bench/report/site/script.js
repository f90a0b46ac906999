"use strict";
// Everything on the page is made from the JSON in #data. Texts go in as text, never as HTML: rows may come from anyone.
const data = JSON.parse(document.getElementById("data").textContent);
const cells = new Map(data.cells.map((cell) => [cell.id, cell]));
const pages = new Map(data.methods.map((page) => [page.name, page]));
const find = (selector) => document.querySelector(selector);
const form = find("#filters"), dialog = find("#cell");
const COLUMNS = [
  { key: "method", name: "Method", of: (c) => c.method.toLowerCase() },
  { key: "suite", name: "Suite", of: (c) => c.suite },
  { key: "rate", name: "Success", of: (c) => c.rate, descending: true },
  { key: "change", name: "Against its base", of: (c) => (c.change ? c.change.value : null), descending: true },
  { key: "budget", name: "Budget or source", of: (c) => c.steps ?? null },
];
const FILTERS = ["suite", "policy", "protocol", "kind"];
let state = { sort: "rate", order: "descending" };

function element(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "rect", "g", "title"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const percent = (rate) => (100 * rate).toFixed(1);
const points = (x) => (x < 0 ? "−" : "+") + Math.abs(100 * x).toFixed(1);

// The address holds filters, sorting and the open cell or method, so that each view can be linked to.
function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const column = COLUMNS.find((c) => c.key === asked.get("sort"));
  state = {
    sort: column ? column.key : "rate",
    order: ["ascending", "descending"].includes(asked.get("order")) ? asked.get("order") : "descending",
  };
  form.elements.find.value = asked.get("find") ?? "";
  for (const name of FILTERS) {
    const known = [...form.elements[name].options].some((option) => option.value === asked.get(name));
    form.elements[name].value = known ? asked.get(name) : "";
  }
  draw();
  const cell = cells.get(asked.get("cell")), page = pages.get(asked.get("method"));
  if (cell) openCell(cell);
  else if (page) openMethod(page);
  else if (dialog.open) dialog.close();
}

function writeAddress(opened = {}) {
  const address = new URLSearchParams();
  if (form.elements.find.value) address.set("find", form.elements.find.value);
  for (const name of FILTERS) if (form.elements[name].value) address.set(name, form.elements[name].value);
  if (state.sort !== "rate" || state.order !== "descending") {
    address.set("sort", state.sort);
    address.set("order", state.order);
  }
  for (const [name, value] of Object.entries(opened)) address.set(name, value);
  history.replaceState(null, "", "#" + address);
}

// What compares stands together: measured scores of as many tasks of one suite under one protocol.
const group = (cell) => (cell.kind === "measured"
  ? `${cell.tuning ? "Trials to choose settings, on training states" : "Measured here"}: ${cell.suite}, ${cell.coverage}, protocol ${cell.protocol}`
  : "Copied: printed by others, measured by nobody here");
const sizes = {}; // the group with the most scores comes first, but trials last
for (const cell of data.cells) sizes[group(cell)] = (sizes[group(cell)] ?? 0) + 1;

function shown() {
  const words = form.elements.find.value.toLowerCase().split(/\s+/).filter(Boolean);
  const kept = data.cells.filter((cell) => {
    for (const name of FILTERS) if (form.elements[name].value && cell[name] !== form.elements[name].value) return false;
    const text = [cell.method, cell.policy, cell.suite, cell.protocol, cell.source, cell.kind,
      ...(cell.tasks ?? []).map((task) => task.name)].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  const column = COLUMNS.find((c) => c.key === state.sort), sign = state.order === "ascending" ? 1 : -1;
  return kept.sort((a, b) => {
    if (a.kind !== b.kind) return a.kind === "measured" ? -1 : 1; // never one among the other
    if (a.tuning !== b.tuning) return a.tuning ? 1 : -1;
    if (group(a) !== group(b)) return sizes[group(b)] - sizes[group(a)] || (group(a) < group(b) ? -1 : 1);
    const x = column.of(a), y = column.of(b);
    if (x === null || y === null) return (x === null) - (y === null); // what is missing comes last either way
    return sign * (x < y ? -1 : x > y ? 1 : 0) || a.id.localeCompare(b.id);
  });
}

function draw() {
  for (const header of document.querySelectorAll("#table thead th")) {
    const active = header.dataset.key === state.sort;
    if (active) header.setAttribute("aria-sort", state.order);
    else header.removeAttribute("aria-sort");
    const arrow = active ? (state.order === "ascending" ? " ▲" : " ▼") : "";
    header.firstChild.textContent = COLUMNS.find((c) => c.key === header.dataset.key).name + arrow;
  }
  const found = shown();
  const measured = found.filter((cell) => cell.kind === "measured").length;
  find("#table tbody").replaceChildren(...found.flatMap((cell, i) =>
    (i && group(cell) === group(found[i - 1]) ? [row(cell)] : [heading(group(cell)), row(cell)])));
  find("#count").textContent =
    `${found.length} of ${data.cells.length} scores: ${measured} measured, ${found.length - measured} copied`;
}

function heading(text) {
  return element("tr", { role: "row", class: "group" },
    element("th", { role: "rowheader", scope: "rowgroup", colspan: COLUMNS.length }, text));
}

function row(cell) {
  const name = opener(cell.method, () => openCell(cell));
  const part = (column, ...children) => element("td", { role: "cell", "data-name": column }, ...children);
  return element("tr", { role: "row", "data-id": cell.id },
    element("th", { role: "rowheader", scope: "row" }, name, " ",
      element("span", { class: `tag ${cell.kind}` }, cell.kind),
      element("small", {}, cell.policy), element("small", {}, cell.protocol)),
    part("Suite", cell.suite, cell.coverage ? element("small", {}, cell.coverage) : null),
    part("Success", ...score(cell)),
    part("Against its base", ...change(cell)),
    part(cell.kind === "copied" ? "Source" : "Budget", cell.budget));
}

function opener(text, act) {
  const button = element("button", { type: "button", class: "open", "aria-haspopup": "dialog" }, text);
  button.addEventListener("click", act);
  return button;
}

function score(cell) {
  if (cell.rate === null) return [element("span", { class: "tag warning" }, cell.expected ? "not run" : "none")];
  const line = element("div", { class: "score" }, element("b", {}, percent(cell.rate)), "%",
    cell.low === null ? "" : ` [${percent(cell.low)}, ${percent(cell.high)}]`);
  const over = cell.low === null ? "" : `; interval over ${cell.resamples}`;
  const meter = element("div", { class: "meter", "aria-hidden": "true" });
  if (cell.low !== null) {
    const band = element("i");
    band.style.left = `${100 * cell.low}%`;
    band.style.width = `${100 * (cell.high - cell.low)}%`;
    meter.append(band);
  }
  const mark = element("u");
  mark.style.left = `${100 * cell.rate}%`;
  meter.append(mark);
  const counts = cell.kind === "copied" ? "as printed" :
    `${cell.successes}/${cell.episodes} episodes, ${cell.seeds.length} seed${cell.seeds.length > 1 ? "s" : ""}${over}`;
  return [line, meter, element("small", {}, counts),
    cell.best ? element("span", { class: "tag measured" }, "best, separated") : null,
    cell.complete === false ? element("span", { class: "tag warning" }, `incomplete: ${cell.episodes} of ${cell.expected}`) : null];
}

function change(cell) {
  if (!cell.change) return [element("small", {}, cell.kind === "copied" ? "not paired" : "–")];
  const { value, low, high, base, complete } = cell.change;
  const clear = low === null ? "" : low > 0 ? "up" : high < 0 ? "down" : ""; // coloured where the interval excludes 0
  return [
    element("span", { class: clear }, `${points(value)} pp`),
    element("small", { class: "score" }, !complete ? "incomplete: no interval" : low === null ? "no interval"
      : `[${points(low)}, ${points(high)}]`),
    low === null ? null : element("small", {}, `over ${cell.change.resamples}`),
    low === null ? null : element("small", {}, `p ${p(cell.change.p)}`),
    element("small", {}, `base ${percent(base)}%`)];
}

function show(title, parts, address) {
  find("#cell-title").textContent = title;
  find("#cell-body").replaceChildren(...parts);
  writeAddress(address);
  if (dialog.open) find("#close").focus(); // what had the focus is gone
  else dialog.showModal();
  dialog.scrollTop = 0;
}

function openCell(cell) {
  const page = pages.get(cell.algorithm);
  show(`${cell.method}, ${cell.suite}`, [
    ...(page ? [element("p", {}, opener(`About ${page.name}`, () => openMethod(page)))] : []),
    ...(cell.kind === "copied" ? copied(cell) : measured(cell))], { cell: cell.id });
}

function openMethod(page) {
  const of = (kind) => data.cells.filter((cell) => cell.algorithm === page.name && cell.kind === kind);
  const listed = (some, none) => (some.length
    ? element("ul", {}, ...some.map((cell) => element("li", {}, opener(`${cell.method}, ${cell.suite}`, () => openCell(cell)), " ",
      cell.rate === null ? "not run" : `${percent(cell.rate)}%`,
      cell.change ? `, ${points(cell.change.value)} points against its base` : "",
      element("small", {}, cell.kind === "copied" ? `${cell.source}; base policy ${cell.policy}` : `${cell.policy}; ${cell.protocol}`))))
    : element("p", {}, none));
  const notes = page.link ? element("a", { href: page.link }, page.notes) : `${page.notes} of vlarl-bench`;
  const body = [element("p", {}, page.summary), facts([["Learns from", page.learns_from],
    ["Needs of a policy", page.requires], ["Policies that have it", page.policies], ["Notes", notes]]),
    element("h3", {}, "Measured here"), listed(of("measured"), "Nothing yet."),
    element("h3", {}, "Copied: printed by others, measured by nobody here"), listed(of("copied"), "Nothing.")];
  if (page.settings.length) {
    body.push(element("h3", {}, "Settings"),
      grid(["Setting", "Default", "In the runs above"], page.settings.map((line) => line.map((text) => text || "–")), "Settings"));
  }
  show(page.name, body, { method: page.name });
}

function facts(pairs) {
  return element("dl", {}, ...pairs.filter(([, value]) => value).flatMap(([name, value]) =>
    [element("dt", {}, name), element("dd", {}, value)]));
}

function copied(cell) {
  return [facts([["Score", `${percent(cell.rate)}%, copied, not measured`], ["Base policy", cell.policy],
    ["Protocol", cell.protocol], ["Source", cell.source], ["Average of its suites", cell.average]]),
    ...cell.findings.map((text) => element("p", {}, element("span", { class: "tag warning" }, "lint"), " ", text))];
}

function measured(cell) {
  const interval = cell.low === null ? "" : ` [${percent(cell.low)}, ${percent(cell.high)}]: 95%, resamples ${cell.resamples}`;
  const against = cell.change && `${points(cell.change.value)} points` +
    (cell.change.low === null ? "; no interval" + (cell.change.complete ? "" : ": episodes are missing")
      : ` [${points(cell.change.low)}, ${points(cell.change.high)}]: 95%, resamples ${cell.change.resamples}; p ${p(cell.change.p)}`);
  const body = [facts([
    ["Score", cell.rate === null ? "not run" : `${percent(cell.rate)}%${interval}`],
    ["Episodes", `${cell.successes} successes of ${cell.episodes}; ${cell.expected} planned`],
    ["Against its base", against], ["Without noise, points", cell.noiseless], ["Base policy", cell.policy], ["Settings", cell.settings], ["Protocol", cell.protocol],
    ["Decoding", cell.decoding], ["Budget", cell.budget], ["Seeds", cell.seeds.join(", ")]])];
  if (cell.curves.length) body.push(element("h3", {}, "Learning curve"), curve(cell, "steps"));
  if (cell.curves.length && cell.curves.every((c) => c.seconds)) {
    body.push(element("h3", {}, "The same against wall time"), curve(cell, "seconds"));
  }
  body.push(element("h3", {}, "Tasks"), tasks(cell));
  body.push(element("h3", {}, "Seeds and commands"), runs(cell));
  if (cell.tasks.some((task) => task.outcomes)) body.push(element("h3", {}, "Episodes"), episodes(cell));
  return body;
}

const p = (value) => (value < 0.0001 ? "< 0.0001" : `= ${value.toFixed(4)}`);

function grid(head, lines, label) {
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    element("table", {},
      element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col" }, text)))),
      element("tbody", {}, ...lines.map(([first, ...rest]) => element("tr", {},
        element("th", { scope: "row" }, first), ...rest.map((text) => element("td", {}, text)))))));
}

function tasks(cell) {
  const rate = ([wins, n]) => (n ? `${wins}/${n} ${Math.round((100 * wins) / n)}%` : "not run");
  const based = cell.tasks.some((task) => task.base);
  return grid(["Task", ...(based ? ["Base"] : []), "All seeds", ...cell.seeds.map((seed) => `Seed ${seed}`)],
    cell.tasks.map((task) => [task.name.replaceAll("_", " "), ...(based ? [rate(task.base ?? [0, 0])] : []),
      rate(task.all), ...task.seeds.map(rate)]), "Success by task and seed");
}

function runs(cell) {
  return element("div", {}, ...cell.runs.map((run) => element("div", {},
    element("small", {}, `Seed ${run.seed}: ${run.successes}/${run.episodes} episodes, code ${run.code}, machine ${run.machine}, ` +
      `rows ${run.folder}`),
    run.submitted ? element("small", {}, `Submitted by ${run.submitted.by}`) : null,
    ...films(run),
    element("pre", { tabindex: "0", "aria-label": `Command of seed ${run.seed}` }, element("code", {}, run.command)))));
}

const FILMS = { before: "before training", after: "after training", eval: "an episode" };
function films(run) {
  const links = Object.entries(run.films).map(([name, address]) =>
    element("a", { href: address, class: "film", "aria-label": `Film of seed ${run.seed}, ${FILMS[name]}` }, `▶ ${FILMS[name]}`));
  return links.length ? [element("p", { class: "films" }, ...links)] : [];
}

function episodes(cell) {
  const lines = cell.tasks.flatMap((task) => (task.outcomes ?? []).map((text, i) =>
    element("p", {}, element("small", {}, `${task.name.replaceAll("_", " ")}, seed ${cell.seeds[i]}`),
      element("span", { class: "dots" }, text.replaceAll("1", "●").replaceAll("0", "○")))));
  return element("details", {}, element("summary", {}, "One mark an episode, by initial state and repeat: ● success, ○ failure"), ...lines);
}

const AXES = {
  steps: { all: "environment steps", tick: (x) => `${Math.round(x / 1000).toLocaleString("en")}k steps`, note: "" },
  seconds: { all: "seconds of training", tick: (x) => `${(x / 60).toFixed(1)} min`,
    note: " Minutes depend on the machine and on what else it did: only those of one idle machine compare." },
};
function curve(cell, axis) {
  const W = 640, H = 260, left = 64, right = 12, top = 12, bottom = 36;
  const most = Math.max(...cell.curves.flatMap((c) => c[axis])), { all, tick, note } = AXES[axis];
  const x = (at) => left + ((W - left - right) * at) / most, y = (rate) => H - bottom - (H - top - bottom) * rate;
  const path = (c) => c[axis].map((s, i) => `${i ? "L" : "M"}${x(s).toFixed(1)} ${y(c.rates[i]).toFixed(1)}`).join("");
  const drawn = element("svg", { viewBox: `0 0 ${W} ${H}`, width: "100%", role: "img", "aria-label":
    `Success in training of ${cell.curves.length} seeds over ${Math.round(most).toLocaleString("en")} ${all}; ` +
    `base ${cell.change ? percent(cell.change.base) + "%" : "not known"}, after ${cell.rate === null ? "not run" : percent(cell.rate) + "%"}` });
  for (const rate of [0, 0.25, 0.5, 0.75, 1]) {
    drawn.append(element("line", { class: "grid", x1: left, x2: W - right, y1: y(rate), y2: y(rate) }),
      element("text", { x: left - 6, y: y(rate) + 4, "text-anchor": "end" }, `${100 * rate}%`));
  }
  for (const part of [0, 0.5, 1]) {
    drawn.append(element("text", { x: x(part * most), y: H - 12, "text-anchor": part === 1 ? "end" : part ? "middle" : "start" },
      tick(part * most)));
  }
  drawn.append(...cell.curves.map((c) => element("path", { class: "seed", d: path(c) })));
  const rounds = Math.min(...cell.curves.map((c) => c.rates.length));
  const mean = (name, i) => cell.curves.reduce((sum, c) => sum + c[name][i], 0) / cell.curves.length;
  const each = [...Array(rounds).keys()];
  drawn.append(element("path", { class: "mean", d: path({ [axis]: each.map((i) => mean(axis, i)), rates: each.map((i) => mean("rates", i)) }) }));
  if (cell.change) drawn.append(element("rect", { class: "base", x: x(0) - 4, y: y(cell.change.base) - 4, width: 8, height: 8 }));
  if (cell.rate !== null) drawn.append(element("circle", { class: "final", cx: x(most) - 5, cy: y(cell.rate), r: 5 }));
  return element("div", {}, drawn, element("small", {},
    "Lines: training episodes while exploring, thin for each seed, thick for their mean. Square: base policy, circle: after, " +
    "both on held-out initial states." + note));
}

const THEMES = ["system", "light", "dark"];
function theme(name) {
  if (name === "system") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.dataset.theme = name;
  find("#theme").textContent = `Theme: ${name}`;
  find("#theme").dataset.name = name;
  try { localStorage.setItem("theme", name); } catch { /* a file opened without storage keeps no choice */ }
}
function storedTheme() {
  try { return THEMES.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "system"; }
  catch { return "system"; }
}

find("#table thead tr").append(...COLUMNS.map((column) => {
  const button = element("button", { type: "button" }, column.name);
  button.addEventListener("click", () => {
    const other = state.order === "ascending" ? "descending" : "ascending";
    state = { sort: column.key, order: state.sort === column.key ? other : column.descending ? "descending" : "ascending" };
    draw();
    writeAddress();
  });
  return element("th", { role: "columnheader", scope: "col", "data-key": column.key }, button);
}));
for (const name of FILTERS) {
  const values = [...new Set(data.cells.map((cell) => cell[name]))].sort();
  form.elements[name].append(element("option", { value: "" }, "all"), ...values.map((v) => element("option", { value: v }, v)));
}
find("#methods").append(...data.methods.map((page) => element("li", {}, opener(page.name, () => openMethod(page)),
  element("small", {}, page.summary))));
find("#notes").append(...data.notes.map((note) => element("li", {}, note)));
find("#findings").hidden = !data.findings.length;
find("#findings summary").textContent = `What lint finds in these results: ${data.findings.length}`;
find("#findings ul").append(...data.findings.map((finding) => element("li", {}, finding)));
form.addEventListener("input", () => { draw(); writeAddress(); });
form.addEventListener("reset", () => setTimeout(() => { draw(); writeAddress(); }));
form.addEventListener("submit", (event) => event.preventDefault());
find("#close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => writeAddress());
find("#theme").addEventListener("click", () => theme(THEMES[(THEMES.indexOf(find("#theme").dataset.name) + 1) % 3]));
window.addEventListener("hashchange", readAddress);
theme(storedTheme());
readAddress();
