"use strict";
// The list of trajectories: filters over the index, and rows that exist only while they are in view.

const INDEX = byId("list") ? data("index") : null;
const ROW_HEIGHT = 58;
const [MOMENT, TASK, SAMPLE, STATUS, SOLVED, CALLS, ERRORS, INJECTED, QUERY, TOOLS, ANSWER] = Array(11).keys();
const chunks = new Map();
let matches = []; // numbers of the rows that the filters let through
let current = -1; // number of the row that is shown
let other = -1; // in a comparison: the row before training

function trajectory(number) {
  const k = Math.floor(number / INDEX.chunk);
  if (!chunks.has(k)) {
    if (chunks.size > 30) chunks.delete(chunks.keys().next().value);
    chunks.set(k, data(k));
  }
  return chunks.get(k)[number % INDEX.chunk];
}

function applyFilters() {
  const text = byId("f-text").value.trim().toLowerCase();
  const moment = byId("f-moment").value, status = byId("f-status").value, tool = byId("f-tool").value;
  const solved = byId("f-solved").value, errors = byId("f-errors").value;
  const words = text ? text.split(/\s+/) : [];
  matches = [];
  INDEX.rows.forEach((row, number) => {
    if (moment && row[MOMENT] !== Number(moment)) return;
    if (status && row[STATUS] !== status) return;
    if (solved && (row[SOLVED] >= 1) !== (solved === "1")) return;
    if (tool && !row[TOOLS].includes(Number(tool))) return;
    if (errors === "any" && !row[ERRORS]) return;
    if (errors === "none" && row[ERRORS]) return;
    if (errors === "injected" && !row[INJECTED]) return;
    if (words.length) {
      const tools = row[TOOLS].map((t) => INDEX.tools[t]).join(" ");
      const all = `${INDEX.queries[row[QUERY]]} ${row[TASK]} ${tools} ${row[ANSWER]}`.toLowerCase();
      if (!words.every((word) => all.includes(word))) return;
    }
    matches.push(number);
  });
  byId("count").textContent = `${matches.length.toLocaleString("en")} of ${INDEX.rows.length.toLocaleString("en")} trajectories`;
  byId("spacer").style.height = `${matches.length * ROW_HEIGHT}px`;
  byId("list").scrollTop = 0;
  drawRows();
}

function drawRows() {
  const list = byId("list"), spacer = byId("spacer");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - 5);
  const end = Math.min(matches.length, first + Math.ceil(list.clientHeight / ROW_HEIGHT) + 10);
  const rows = [];
  for (let place = first; place < end; place++) rows.push(item(place));
  spacer.replaceChildren(...rows);
  const active = matches.indexOf(current);
  if (active >= first && active < end) list.setAttribute("aria-activedescendant", `item-${active}`);
  else list.removeAttribute("aria-activedescendant");
}

function item(place) {
  const number = matches[place], row = INDEX.rows[number];
  const solved = row[SOLVED] >= 1;
  const element = make("div", {
    class: "item", id: `item-${place}`, role: "option", "aria-selected": String(number === current),
    "aria-setsize": matches.length, "aria-posinset": place + 1, onclick: () => show(number),
  },
    make("div", {}, make("span", { class: solved ? "good" : "bad" }, solved ? "✓ " : row[SOLVED] > 0 ? "◐ " : "✗ "),
      INDEX.queries[row[QUERY]] || row[TASK]),
    make("div", { class: "sub" }, `${INDEX.moments[row[MOMENT]]} · ${row[CALLS]} steps${row[ERRORS] ? ` · ${row[ERRORS]} errors` : ""}`));
  element.style.top = `${place * ROW_HEIGHT}px`;
  return element;
}

function show(number, before = -1, step = -1) {
  current = number;
  other = before;
  reveal(matches.indexOf(number));
  drawRows();
  drawDetail(step);
  if (window.matchMedia("(max-width: 760px)").matches) byId("detail").scrollIntoView();
}

/** Scrolls the list to this place, as little as possible; filters may have left it out (-1). */
function reveal(place) {
  if (place < 0) return;
  const list = byId("list");
  const top = place * ROW_HEIGHT;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW_HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW_HEIGHT - list.clientHeight;
}

function move(by) {
  if (!matches.length) return;
  const at = matches.indexOf(current);
  const place = at < 0 ? 0 : Math.max(0, Math.min(matches.length - 1, at + by));
  reveal(place);
  current = matches[place];
  other = -1;
  drawRows();
  drawDetail(-1);
}

/** The other side of the trajectory that is shown: [before, after, step], or null. */
function pairOf(number) {
  return INDEX.pairs.find((pair) => pair[0] === number || pair[1] === number) || null;
}

function compare() {
  if (other >= 0) return show(current);
  const pair = pairOf(current);
  if (pair) show(pair[1], pair[0], pair[2]);
}

function onKey(event) {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inList = event.target.id === "list";
  const keys = { j: () => move(1), k: () => move(-1), n: () => stepBy(1), p: () => stepBy(-1), c: compare };
  const listKeys = {
    ArrowDown: () => move(1), ArrowUp: () => move(-1), PageDown: () => move(10), PageUp: () => move(-10),
    Home: () => move(-matches.length), End: () => move(matches.length), Enter: () => byId("detail").focus(),
  };
  if (event.key === "Escape" && typing) return event.target.blur();
  const act = typing ? null : event.key === "/" ? () => byId("f-text").focus() : (inList && listKeys[event.key]) || keys[event.key];
  if (act) {
    event.preventDefault();
    act();
  }
}

function startViewer() {
  if (!INDEX) return;
  INDEX.moments.forEach((name, k) => byId("f-moment").append(make("option", { value: k }, name)));
  for (const name of [...new Set(INDEX.rows.map((row) => row[STATUS]))].sort()) {
    byId("f-status").append(make("option", { value: name }, name.replaceAll("_", " ")));
  }
  INDEX.tools.map((name, k) => [name, k]).sort().forEach(([name, k]) => byId("f-tool").append(make("option", { value: k }, name)));
  for (const id of ["f-moment", "f-status", "f-solved", "f-tool", "f-errors"]) byId(id).addEventListener("change", applyFilters);
  byId("f-text").addEventListener("input", applyFilters);
  byId("f-colour").addEventListener("change", () => drawDetail(-1));
  let waiting = false;
  byId("list").addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; drawRows(); });
  });
  document.addEventListener("keydown", onKey);
  for (const button of document.querySelectorAll(".cases button")) {
    button.addEventListener("click", () => {
      byId("viewer").scrollIntoView();
      show(Number(button.dataset.after), Number(button.dataset.before), Number(button.dataset.step) - 1);
    });
  }
  applyFilters();
  if (matches.length) {
    current = matches[0];
    drawRows();
    drawDetail(-1);
  }
}
