"use strict";
// Sorting, filtering, a panel for each cell, and the theme. Without scripts the page is whole too.
const live = document.getElementById("status");
const all = (selector, of = document) => [...of.querySelectorAll(selector)];
const tables = all("table.cells:not(.plain)");

// --- sorting: a click on a heading, or Enter on it
for (const table of tables) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(table, heads, index));
  });
}

function sort(table, heads, index) {
  const head = heads[index];
  const rows = [...table.tBodies[0].rows];
  const key = (row) => row.cells[index].dataset.sort;
  const words = rows.some((row) => key(row) !== undefined && isNaN(key(row)));
  const before = head.getAttribute("aria-sort");
  const up = before ? before === "descending" : words || index === 0;
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  rows.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return (up ? 1 : -1) * (words ? x.localeCompare(y) : x - y);
  });
  table.tBodies[0].append(...rows);
  live.textContent = `Sorted by ${head.textContent.trim()}, ${up ? "ascending" : "descending"}`;
}

// --- filtering: every table and every mark follows the filters of the first table
const main = document.getElementById("all-cells");
const mainRows = main ? [...main.tBodies[0].rows] : [];
const form = document.querySelector("form.filters");
if (form && main) {
  form.hidden = false;
  const inside = new Map();
  for (const each of all("[data-cell]")) {
    const name = each.dataset.cell;
    inside.set(name, [...(inside.get(name) ?? []), each]);
  }
  const filter = () => {
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const selects = all("select", form).filter((select) => select.value);
    let shown = 0;
    for (const row of mainRows) {
      const data = row.dataset;
      const text = [data.cell, data.aliases, data.family, data.quantizer].join(" ").toLowerCase();
      const fits =
        words.every((word) => text.includes(word)) &&
        selects.every((select) => data[select.name] === select.value);
      shown += fits;
      for (const each of inside.get(data.cell)) each.classList.toggle("out", !fits);
    }
    const count = `${shown} of ${mainRows.length} variants`;
    form.elements.shown.value = count;
    live.textContent = count;
  };
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.shown.value = `${mainRows.length} of ${mainRows.length} variants`;
}

// --- a cell's panel: report.html#cell=NAME opens it
const panel = document.getElementById("panel");
const content = document.getElementById("panel-content");

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // a lone % sign
  }
}

function make(tag, text, parent, className) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  if (className) element.className = className;
  parent?.append(element);
  return element;
}

function find(name, rows = mainRows) {
  const called = (row) => row.dataset.cell === name || (row.dataset.aliases ?? "").split("\n").includes(name);
  return rows.find(called);
}

function fill(row) {
  const name = row.dataset.cell;
  content.replaceChildren();
  make("h2", name, content).id = "panel-title";
  const below = make("p", row.querySelector(".name small").textContent, content, "setting");
  const own = all("table.cells").map((table) => [table, find(name, [...table.tBodies[0].rows])]).filter((pair) => pair[1]);
  for (const [table, tr] of own) {
    const values = [...tr.cells].filter((cell) => cell.dataset.label && !cell.classList.contains("absent"));
    const verdict = values.find((cell) => cell.querySelector(".verdict"));
    if (table.dataset.title === "Verdict") {
      below.after(make("p", values.at(-1).textContent, null, "why"));
      below.after(copy(verdict, make("p", "")));
      continue;
    }
    const shown = values.filter((cell) => cell !== verdict);
    if (!shown.length) continue;
    make("h3", table.dataset.title, content);
    const list = make("dl", "", content);
    for (const cell of shown) {
      const pair = make("div", "", list, cell.classList.contains("words") ? "wide" : "");
      make("dt", cell.dataset.label, pair);
      copy(cell, make("dd", "", pair));
    }
  }
}

function copy(from, to) {
  to.append(...[...from.childNodes].map((node) => node.cloneNode(true)));
  return to;
}

function openCell() {
  const match = location.hash.match(/^#cell=(.*)$/);
  all(".here").forEach((row) => row.classList.remove("here"));
  if (!match) return panel.open && panel.close();
  const name = decoded(match[1]);
  const failed = all("details.failure").find((each) => each.dataset.cell === name);
  if (failed) {
    failed.open = true;
    failed.classList.add("here");
    failed.scrollIntoView({ block: "center", behavior: "instant" });
    return failed.querySelector("summary").focus();
  }
  const row = find(name);
  if (!row) return (live.textContent = `No variant is called ${name}`);
  all("tr[data-cell]").filter((each) => each.dataset.cell === row.dataset.cell)
    .forEach((each) => each.classList.add("here"));
  row.scrollIntoView({ block: "center", behavior: "instant" });
  fill(row);
  if (!panel.open) panel.showModal();
  panel.scrollTop = 0;
}

addEventListener("hashchange", openCell);
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#cell="]');
  if (link && link.hash === location.hash) openCell();
  const mark = event.target.closest(".mark");
  if (mark) location.hash = `cell=${encodeURIComponent(mark.dataset.cell)}`;
  if (event.target === panel) panel.close();
});
panel.addEventListener("close", () => {
  const row = document.querySelector("#all-cells tr.here");
  if (location.hash.startsWith("#cell=")) history.replaceState(null, "", location.pathname + location.search);
  row?.querySelector("a").focus({ preventScroll: true });
});
openCell();

// --- theme: as the system has it, or light, or dark
const button = document.getElementById("theme");
if (button) {
  const themes = ["auto", "light", "dark"];
  const set = (theme) => {
    document.documentElement.style.colorScheme = theme === "auto" ? "" : theme;
    button.lastElementChild.textContent = theme;
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    set(themes[(themes.indexOf(button.lastElementChild.textContent) + 1) % 3]);
  });
}

// --- on a phone a row is a card: its roles are said, because the layout takes them away
const narrow = matchMedia("(max-width: 720px)");
const roles = { "thead, tbody": "rowgroup", tr: "row", td: "cell", "thead th": "columnheader", "tbody th": "rowheader" };
const say = () => {
  for (const table of narrow.matches ? all(".stack table") : []) {
    table.setAttribute("role", "table");
    for (const [selector, role] of Object.entries(roles)) {
      all(selector, table).forEach((each) => each.setAttribute("role", role));
    }
  }
};
narrow.addEventListener("change", say);
say();
