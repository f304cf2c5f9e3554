// Filters, and what opens under a norm: its subgraph as diagrams and as code.

async function inflate(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function once(make) {
  let made;
  return () => (made ??= make());
}

const report = once(async () => JSON.parse(await inflate("data")));

const graphviz = once(async () => {
  const script = document.createElement("script");
  script.textContent = await inflate("library");
  document.head.append(script);
  return Viz.instance();
});

// An element with attributes and children; text is never parsed as HTML.
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function bytesText(count) {
  if (count === null) return "unknown";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) [count, unit] = [count / 1024, unit + 1];
  return `${unit === 0 || count >= 100 ? Math.round(count) : Number(count.toPrecision(3))} ${units[unit]}`;
}

// ---- filters

function applyFilters() {
  const statuses = new Set([...document.querySelectorAll("[name=status]:checked")].map((box) => box.value));
  const words = document.getElementById("query").value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const section of document.querySelectorAll("section.graph")) {
    let here = 0;
    for (const row of section.querySelectorAll("tr.site")) {
      const text = searchText(row);
      const matches = statuses.has(row.dataset.status) && words.every((word) => text.includes(word));
      row.hidden = !matches;
      row.nextElementSibling.hidden = !matches || !isOpen(row);
      here += matches;
    }
    const nothing = section.querySelector("p.nothing");
    if (nothing) nothing.hidden = here > 0;
    shown += here;
  }
  const total = document.querySelectorAll("tr.site").length;
  document.getElementById("shown").textContent = `${shown} of ${total} norms`;
}

const texts = new WeakMap();

function searchText(row) {
  if (!texts.has(row)) {
    const names = [...row.querySelectorAll("[title]")].map((element) => element.title);
    texts.set(row, [row.textContent, ...names].join(" ").toLowerCase());
  }
  return texts.get(row);
}

// ---- a norm's details

function isOpen(row) {
  return row.querySelector("button").getAttribute("aria-expanded") === "true";
}

async function toggle(row) {
  const open = !isOpen(row);
  const detail = row.nextElementSibling;
  row.querySelector("button").setAttribute("aria-expanded", String(open));
  row.classList.toggle("open", open);
  detail.hidden = !open;
  const cell = detail.firstElementChild;
  if (!open || cell.childElementCount) return;
  cell.append(el("p", { class: "note" }, "Drawing…"));
  const { graphs, reasons } = await report();
  const graph = graphs[row.closest("section").dataset.graph];
  const site = graph.sites[row.dataset.site];
  cell.replaceChildren(sitePanel(graph, site, reasons[site.reason]));
}

function sitePanel(graph, site, reason) {
  const panel = el("div", { class: "panel", role: "region", "aria-label": `Details of ${site.norm}` });
  panel.append(...explanation(site, reason));
  if (!site.before) {
    panel.append(el("p", { class: "note" }, "This report has no subgraphs: an older version wrote it."));
    return panel;
  }
  const sides = el("div", { class: "sides" });
  const state = { backward: false, everyOp: false };
  const redraw = () => drawSides(sides, graph, site, state);
  panel.append(toolbar(site, state, redraw), sides);
  redraw();
  return panel;
}

function explanation(site, reason) {
  if (!reason) return [];
  const rows = { Cause: reason.cause, Cure: reason.cure };
  if (site.near_miss) {
    const { node, expected, found, source } = site.near_miss;
    Object.assign(rows, { "Stopped at": node, Expected: expected, Found: found, Source: source });
  } else {
    rows.Found = site.detail;
  }
  const entries = Object.entries(rows).filter(([, text]) => text);
  const list = entries.flatMap(([label, text]) => [
    el("dt", {}, label),
    el("dd", {}, ...(label === "Stopped at" || label === "Source" ? [el("code", {}, text)] : prose(text))),
  ]);
  const headline = el("p", {}, el("b", {}, site.reason), " ", ...prose(reason.sentence));
  return [el("div", { class: "reason" }, headline, el("dl", {}, ...list))];
}

// What stands in backticks is code.
function prose(text) {
  return text.split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));
}

function toolbar(site, state, redraw) {
  const bar = el("div", { class: "toolbar" });
  if (hasOps(site.before, true) || (site.after && hasOps(site.after, true))) {
    const group = el("div", { class: "segments", role: "group", "aria-label": "Direction" });
    for (const [name, backward] of [["Forward", false], ["Backward", true]]) {
      const button = el("button", { type: "button", "aria-pressed": String(!backward) }, name);
      button.addEventListener("click", () => {
        state.backward = backward;
        for (const other of group.children) other.setAttribute("aria-pressed", String(other === button));
        redraw();
      });
      group.append(button);
    }
    bar.append(group);
  }
  const box = el("input", { type: "checkbox" });
  box.addEventListener("change", () => {
    state.everyOp = box.checked;
    redraw();
  });
  bar.append(el("label", { class: "check" }, box, "every op and view"), site.after ? legend() : "");
  return bar;
}

function legend() {
  const entries = [["removed", "− removed"], ["added", "+ added"], ["rewired", "~ reads something else"], ["context", "around the norm"]];
  const items = entries.map(([kind, text]) => el("li", { class: kind }, text));
  return el("ul", { class: "legend", "aria-label": "Legend" }, ...items);
}

async function drawSides(sides, graph, site, state) {
  sides.removeAttribute("data-ready");
  const before = side(site.after ? "Before" : "Unchanged", site.before, graph.before, state, site.near_miss?.node);
  if (!site.after) {
    sides.classList.add("single");
    sides.replaceChildren(before.element);
    await before.draw();
  } else {
    const after = side("After", site.after, graph.after, state);
    sides.replaceChildren(before.element, after.element);
    await Promise.all([before.draw(), after.draw()]);
  }
  sides.dataset.ready = "";
}

function side(name, subgraph, code, state, missed) {
  const nodes = nodesOf(subgraph, state.backward);
  const facts = `${opsIn(subgraph)} ops · ${bytesText(subgraph.traffic.unfused)} op by op · ${bytesText(subgraph.traffic.fused)} ideally fused`;
  const heading = el("h3", {}, name, el("small", {}, facts));
  const figure = el("figure", { class: "diagram", tabindex: "0" });
  const listing = codeListing(nodes, code, name);
  const draw = async () => {
    if (!nodes.some((n) => !isContext(n))) {
      figure.append(el("p", { class: "note" }, "Nothing here in this direction."));
      return;
    }
    const svg = (await graphviz()).renderSVGElement(graphvizOf(nodes, state.everyOp));
    finishDiagram(svg, listing, missed, `${name}: diagram of ${nodes.length} nodes; the code below says the same`);
    figure.replaceChildren(svg);
  };
  figure.setAttribute("aria-label", `${name}, diagram`);
  return { element: el("div", { class: "side" }, heading, figure, listing), draw };
}

// A click on a box marks its lines in the code; hovering shows the first of them.
function finishDiagram(svg, listing, missed, label) {
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  const width = parseFloat(svg.getAttribute("width"));
  svg.style.maxWidth = `${width}px`;
  svg.style.minWidth = `${Math.round(0.6 * width)}px`;
  svg.removeAttribute("width");
  svg.removeAttribute("height");
  svg.querySelector("g.graph > title")?.remove();
  for (const title of svg.querySelectorAll("g.edge > title")) title.remove();
  for (const box of svg.querySelectorAll("g.node")) {
    const title = box.querySelector("title");
    if (title.textContent === missed) box.classList.add("missed");
    const line = listing.querySelector(`[data-name="${CSS.escape(title.textContent)}"]`);
    title.textContent = line ? line.dataset.code : title.textContent;
    box.addEventListener("click", () => {
      listing.querySelector(".marked")?.classList.remove("marked");
      line?.classList.add("marked");
      line?.scrollIntoView({ block: "nearest", behavior: "smooth" });
    });
  }
}

// ---- code

const LINE = /^ {4}(?:# (\w+): |(\w+)(?:: "[^"]*")? = |(return) )/;

const linesOf = (() => {
  const known = new Map();
  return (code) => {
    if (!known.has(code)) {
      const lines = new Map();
      for (const line of code.split("\n")) {
        const found = LINE.exec(line);
        if (found) lines.set(found[3] ? "output" : (found[1] ?? found[2]), line.trim());
      }
      known.set(code, lines);
    }
    return known.get(code);
  };
})();

function codeListing(nodes, code, name) {
  const lines = linesOf(code);
  const list = el("code");
  for (const node of nodes) {
    const text = lines.get(node.name);
    if (text === undefined) continue;
    const kind = isContext(node) ? "context" : node.change;
    const line = codeLine(text, kind, SIGNS[isContext(node) ? "" : node.change]);
    line.dataset.name = node.name;
    line.dataset.code = text;
    list.append(line);
  }
  return el("pre", { tabindex: "0", "aria-label": `${name}, code` }, list);
}

function codeLine(text, kind, sign) {
  return el("span", { class: `line ${kind}` }, el("span", { class: "sign" }, sign || " "), text, "\n");
}

async function showWholeCode(details) {
  const sides = details.querySelector(".sides");
  if (!details.open || sides.childElementCount) return;
  const graph = (await report()).graphs[details.closest("section").dataset.graph];
  const [before, after] = [graph.before.split("\n"), graph.after.split("\n")];
  sides.append(
    wholeCode("Before", before, new Set(after), "removed"),
    wholeCode("After", after, new Set(before), "added"),
  );
}

function wholeCode(name, lines, others, kind) {
  const list = el("code");
  list.append(
    ...lines.map((line) => (others.has(line) ? codeLine(line, "", "") : codeLine(line, kind, SIGNS[kind]))),
  );
  const pre = el("pre", { tabindex: "0", "aria-label": `${name}, whole graph` }, list);
  return el("div", { class: "side" }, el("h3", {}, name), pre);
}

// ---- start

for (const control of document.querySelectorAll("#filters input")) {
  control.addEventListener("input", applyFilters);
}
document.getElementById("filters")?.addEventListener("submit", (event) => event.preventDefault());
for (const row of document.querySelectorAll("tr.site")) {
  row.addEventListener("click", () => {
    if (!getSelection().toString()) toggle(row);
  });
}
for (const details of document.querySelectorAll("details.whole")) {
  details.addEventListener("toggle", () => showWholeCode(details));
}
