"use strict";

// From the nodes of a subgraph to a Graphviz graph that people can read.

const CONTEXT = new Set(["input", "reader"]);
// Parts that are one box each, unless every op is asked for.
const COLLAPSED = new Set(["cast", "weight", "weight cast", "dequantize", "cast along T"]);
const SIGNS = { removed: "−", added: "+", rewired: "~", "": "" };

function isContext(node) {
  return CONTEXT.has(node.part);
}

// The nodes of one direction; what the other one hands over stands around them.
function nodesOf(subgraph, backward) {
  const own = subgraph.nodes.filter((n) => n.backward === backward && !isContext(n));
  const names = new Set(own.map((n) => n.name));
  const read = new Set(own.flatMap((n) => n.inputs));
  return subgraph.nodes.flatMap((n) => {
    if (names.has(n.name)) return [n];
    if (read.has(n.name)) return [{ ...n, part: "input", inputs: isContext(n) ? n.inputs : [] }];
    const reads = n.part === "reader" && n.backward === backward && n.inputs.some((i) => names.has(i));
    return reads ? [n] : [];
  });
}

function opsIn(subgraph) {
  return subgraph.nodes.filter((n) => !isContext(n) && n.bytes !== 0).length;
}

function hasOps(subgraph, backward) {
  return subgraph.nodes.some((n) => n.backward === backward && !isContext(n));
}

// Boxes by id, and edges between them: views are drawn as part of their edges.
function boxesOf(nodes, everyOp) {
  const byName = new Map(nodes.map((n) => [n.name, n]));
  const isHidden = (n) =>
    !everyOp && n.bytes === 0 && n.op !== "placeholder" && n.inputs.some((i) => byName.has(i));
  const shown = (name) => {
    let node = byName.get(name);
    while (node && isHidden(node)) node = byName.get(node.inputs.find((i) => byName.has(i)));
    return node;
  };
  const visible = nodes.filter((n) => !isHidden(n));
  const pairs = visible.flatMap((n) =>
    n.inputs.map(shown).filter((source) => source && source !== n).map((source) => [source, n]),
  );
  const group = everyOp ? new Map() : groupsOf(visible, pairs);
  const idOf = (n) => (group.get(n) ?? n).name;
  const boxes = new Map();
  for (const n of visible) {
    const id = idOf(n);
    if (!boxes.has(id)) boxes.set(id, { id, nodes: [], results: [] });
    boxes.get(id).nodes.push(n);
  }
  for (const n of nodes.filter((n) => isHidden(n) && n.op === "getitem")) {
    const source = shown(n.name);
    if (source && n.type) boxes.get(idOf(source)).results.push(n.type);
  }
  const edges = new Map();
  for (const [source, target] of pairs) {
    const [tail, head] = [idOf(source), idOf(target)];
    if (tail !== head) edges.set(`${tail} ${head}`, { tail, head });
  }
  return { boxes: [...boxes.values()], edges: [...edges.values()] };
}

// Neighbours of one collapsed part stand for each other: each node -> the first of its group.
function groupsOf(nodes, pairs) {
  const first = new Map();
  const find = (n) => (first.has(n) ? find(first.get(n)) : n);
  for (const [source, target] of pairs) {
    if (source.part !== target.part || !COLLAPSED.has(source.part)) continue;
    const [a, b] = [find(source), find(target)];
    if (a !== b) first.set(b, a);
  }
  return new Map(nodes.map((n) => [n, find(n)]));
}

function shortOp(node) {
  if (node.op === "placeholder") return "input";
  if (node.op === "output") return "returned";
  const parts = node.op.split(".");
  const name = parts.length > 1 ? parts[1] : parts[0];
  const dtype = node.type.split("[")[0];
  return name === "convert_element_type" || name === "_to_copy" ? `to ${dtype}` : name;
}

function changeOf(box) {
  if (isContext(box.nodes[0])) return "";
  const changes = new Set(box.nodes.map((n) => n.change));
  for (const change of ["added", "removed", "rewired"]) if (changes.has(change)) return change;
  return "";
}

function titleOf(box) {
  const [node] = box.nodes;
  return box.nodes.length > 1 ? node.part : shortOp(node);
}

function subtitlesOf(box) {
  const last = box.nodes[box.nodes.length - 1];
  const lines = [];
  if (box.nodes.length > 1) lines.push(`${box.nodes.length} ops`);
  else if (last.op === "placeholder") lines.push(last.name);
  else if (last.part === "linear") lines.push(last.module.split(".").pop());
  if (last.type) lines.push(last.type);
  else if (box.results.length) lines.push(...new Set(box.results));
  return lines.filter(Boolean);
}

function classOf(box) {
  const [node] = box.nodes;
  const kind = isContext(node) ? "context" : node.op.startsWith("mxnorm_pass.") ? "own" : "op";
  return [kind, changeOf(box), node.part.replaceAll(" ", "-")].filter(Boolean).join(" ");
}

function escapeHtml(text) {
  const entities = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
  return text.replace(/[&<>"]/g, (c) => entities[c]);
}

function labelOf(box) {
  const sign = SIGNS[changeOf(box)];
  const title = escapeHtml(`${sign ? `${sign} ` : ""}${titleOf(box)}`);
  const lines = subtitlesOf(box).map(
    (line) => `<br/><font point-size="10" face="Courier">${escapeHtml(line)}</font>`,
  );
  return { html: `<b>${title}</b>${lines.join("")}` };
}

function graphvizOf(nodes, everyOp) {
  const { boxes, edges } = boxesOf(nodes, everyOp);
  return {
    directed: true,
    graphAttributes: { bgcolor: "transparent", nodesep: 0.22, ranksep: 0.28, pad: 0.05 },
    nodeAttributes: {
      shape: "box",
      style: "rounded,filled",
      fontname: "Helvetica",
      fontsize: 11,
      margin: "0.11,0.05",
      height: 0.3,
    },
    edgeAttributes: { arrowsize: 0.6 },
    nodes: boxes.map((box) => ({
      name: box.id,
      attributes: { label: labelOf(box), class: classOf(box) },
    })),
    edges: edges.map(({ tail, head }) => ({ tail, head })),
  };
}
