"use strict";
// What all figures share: the data, the reader's choices, number formats, the token axis, colours, plain DOM helpers.
const data = JSON.parse(document.getElementById("data").textContent);
const many = data.series.length > 1;
const OUTCOME = data.outcomes; // the sentences of dynamics.py, by name
const ROSE = [OUTCOME.settled, OUTCOME.still_rising, OUTCOME.above_chance];
const count = (n, thing) => `${n} ${thing}${n === 1 ? "" : "s"}`;
const state = {
  metric: data.default_metric, axis: "log", series: data.ordered ? data.series.length - 1 : 0, sort: ["rank", 1], hidden: new Set(),
  rows: data.tasks.length > 45 && data.domains.length > 1 ? "domains" : "tasks", shade: "chance",
  of: data.series.some((s) => s.role === "mean") ? "means" : "runs", x: "tokens",
  view: many ? (data.tasks.length > 24 ? "means" : "task") : "domain", scale: "raw", against: "tokens", search: "", domain: "", size: "", shots: "", all: false,
};

// ---- the view in the address: what differs from the first view, by names
const START = { ...state };
const WORDS = { axis: ["log", "linear"], rows: ["tasks", "domains"], shade: ["chance", "share"], view: ["domain", "task", "means"], of: ["means", "runs"], x: ["tokens", "steps", "flops", "loss"], scale: ["raw", "normal"], against: ["tokens", "step", "flops"] };
function remember() {
  const view = new URLSearchParams();
  for (const key of [...Object.keys(WORDS), "search", "domain", "size", "shots"]) if (state[key] !== START[key]) view.set(key, state[key]);
  if (state.metric !== START.metric) view.set("metric", data.metrics[state.metric].name);
  if (state.series !== START.series) view.set("series", data.series[state.series].name);
  for (const i of state.hidden) view.append("hidden", data.series[i].name);
  history.replaceState(null, "", "#" + view);
}
function recall() {
  const view = new URLSearchParams(location.hash.slice(1)), at = (list, name) => list.findIndex((one) => one.name === name);
  for (const [key, words] of Object.entries(WORDS)) if (words.includes(view.get(key))) state[key] = view.get(key);
  for (const key of ["search", "domain", "size", "shots"]) if (view.has(key)) state[key] = view.get(key);
  for (const [key, list] of [["metric", data.metrics], ["series", data.series]]) if (at(list, view.get(key)) >= 0) state[key] = at(list, view.get(key));
  for (const name of view.getAll("hidden")) if (at(data.series, name) >= 0) state.hidden.add(at(data.series, name));
}
recall();

// ---- what the reader's search and filters leave
const sizeName = (size) => (size === null ? "" : size >= 1e9 ? size / 1e9 + "B" : size / 1e6 + "M");
// Of runs that differ in their seeds alone either their mean is shown, or they are.
const roleShown = (i) => data.series[i].role !== (state.of === "means" ? "seed" : "mean");
const seriesShown = (i) => roleShown(i) && seriesKept(i);
const seriesKept = (i) => !state.hidden.has(i) && (!state.size || sizeName(data.series[i].size) === state.size) && (!state.shots || data.series[i].shots === state.shots);
if (!roleShown(state.series)) state.series = Math.max(0, data.series.findIndex((_, i) => roleShown(i)));
const found = (text) => state.search.toLowerCase().split(/\s+/).every((word) => text.toLowerCase().includes(word));
const domainOf = (curve) => curve.domain ?? data.tasks[curve.task].domain;
function shown(curve) {
  const domain = data.domains[domainOf(curve)];
  return seriesShown(curve.series) && (!state.domain || domain === state.domain) && found(`${data.series[curve.series].name} ${curve.task === undefined ? "" : data.tasks[curve.task].name} ${domain}`);
}

const dark = window.matchMedia("(prefers-color-scheme: dark)");
let printing = false; // paper is white, whatever the screen is
const night = () => dark.matches && !printing;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// Okabe & Ito's colours (safe for colour-blind readers), the yellow replaced; lighter versions for a dark page.
const PALETTE = {
  light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#6f4fa3", "#4d4d4d"],
  dark: ["#56b4e9", "#f0803c", "#2bc59b", "#e39bc6", "#e8b13a", "#3f8fd0", "#a78bfa", "#c9ced6"],
};
const colour = (i) => { const p = PALETTE[night() ? "dark" : "light"]; return p[i % p.length]; };
// Series that differ in size get neighbouring colours in the order of size (viridis without its palest end).
const RAMP = { light: ["#c9a400", "#7fb13c", "#2f9c7c", "#21808d", "#31638d", "#43407f", "#440f54"], dark: ["#f4e06d", "#a5d65a", "#52c58a", "#2fa9a0", "#4a8fc4", "#7b7fd0", "#b07fd6"] };
function seriesColour(i) {
  if (!data.ordered) return colour(i);
  const ramp = RAMP[night() ? "dark" : "light"], at = (SIZES.indexOf(data.series[i].size) / Math.max(1, SIZES.length - 1)) * (ramp.length - 1), k = Math.min(Math.floor(at), ramp.length - 2);
  const part = (hex, j) => parseInt(hex.slice(1 + 2 * j, 3 + 2 * j), 16);
  return "#" + [0, 1, 2].map((j) => Math.round(part(ramp[k], j) + (at - k) * (part(ramp[k + 1], j) - part(ramp[k], j))).toString(16).padStart(2, "0")).join("");
}
const SIZES = [...new Set(data.series.map((s) => s.size))].sort((a, b) => a - b);
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
// Series of one colour differ in their dashes.
const seriesDash = (i) => (data.ordered ? data.series.slice(0, i).filter((s) => s.size === data.series[i].size).length : Math.floor(i / PALETTE.light.length));
const swatch = (tint, dash) => `<svg width="22" height="8" aria-hidden="true"><line x1="0" x2="22" y1="4" y2="4" stroke="${tint}" stroke-width="2.6" stroke-dasharray="${{ dash: "6 4", dot: "2 3", dashdot: "7 3 2 3", longdash: "10 4", longdashdot: "10 3 2 3" }[DASHES[dash % DASHES.length]] ?? ""}"/></svg>`;
const alpha = (hex, a) => hex + Math.round(a * 255).toString(16).padStart(2, "0");

const isNumber = (x) => typeof x === "number" && isFinite(x);
const NARROW = "\u202f";
function formatTokens(t) {
  if (!isNumber(t)) return "–";
  if (t === 0) return "0";
  let k = 0, v = t;
  while (Math.abs(v) >= 999.5 && k < 4) { v /= 1000; k += 1; }
  const text = Math.abs(v) >= 99.5 || (k === 0 && Number.isInteger(v)) ? v.toFixed(0) : String(Number(v.toPrecision(v < 10 ? 2 : 3)));
  return k ? text + NARROW + " KMBT"[k] : text;
}
function formatValue(v) {
  if (!isNumber(v)) return "–";
  const size = Math.abs(v);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? v.toExponential(1) : size >= 10 ? v.toPrecision(4) : size > 0 && size < 0.01 ? v.toFixed(4) : v.toFixed(3);
  return text.replace("-", "−");
}
const formatError = (v, e) => formatValue(v) + (isNumber(e) ? NARROW + "±" + NARROW + formatValue(e) : "");
const escape = (s) => String(s).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

// ---- the token axis: log10 with a place for 0, or linear; ticks are our own because 10^9 is "1 B", not "1 G"
const positive = data.series.flatMap((s) => s.tokens).concat((data.losses || []).flatMap((l) => l.tokens)).filter((t) => t > 0);
const lowest = positive.length ? Math.min(...data.series.flatMap((s) => s.tokens).filter((t) => t > 0).concat(positive.length ? [Math.max(...positive)] : [])) : 1;
const highest = positive.length ? Math.max(...positive) : 1;
const anyZero = data.series.some((s) => s.tokens.includes(0));
const zeroAt = Math.log10(lowest) - Math.max(0.3, 0.07 * Math.log10(highest / lowest));
const place = (t) => (state.axis === "linear" ? t : t > 0 ? Math.max(Math.log10(t), zeroAt) : zeroAt);
function axisRange() {
  const low = state.axis === "linear" ? (anyZero ? 0 : lowest) : anyZero ? zeroAt : Math.log10(lowest);
  const high = place(highest), pad = (high - low) * 0.02 || (state.axis === "linear" ? highest * 0.1 : 0.2);
  return [low - pad, high + pad];
}
function niceSteps(low, high, wanted) {
  const raw = (high - low) / wanted, unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 5, 10].find((m) => m * unit >= raw * 0.999);
  const out = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) out.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return out;
}
function tickTokens([low, high], width) {
  const wanted = Math.max(3, Math.floor(width / 75));
  if (state.axis === "linear") return niceSteps(Math.max(low, 0), high, wanted);
  const first = anyZero ? (Math.log10(lowest) * 2 + zeroAt) / 3 : -Infinity;
  const span = high - low;
  let ticks = [];
  if (span < 0.5) ticks = niceSteps(10 ** Math.max(low, 0), 10 ** high, wanted);
  else {
    const multiples = span < 1.2 ? [1, 2, 3, 5] : span < 0.45 * wanted ? [1, 2, 5] : span < 0.75 * wanted ? [1, 3] : [1];
    const stride = Math.max(1, Math.ceil(span / wanted));
    for (let d = Math.floor(low); d <= high; d += 1) if (d % stride === 0) for (const m of multiples) ticks.push(m * 10 ** d);
  }
  ticks = ticks.filter((t) => { const p = Math.log10(t); return p >= low && p <= high && p >= first; });
  return anyZero && zeroAt >= low ? [0, ...ticks] : ticks;
}
function tokenAxis(width, range = axisRange()) {
  const ticks = tickTokens(range, width);
  return { type: "linear", range, tickmode: "array", tickvals: ticks.map(place), ticktext: ticks.map(formatTokens),
    gridcolor: css("--grid"), zeroline: false, linecolor: css("--line"), tickfont: { size: 11.5 }, fixedrange: touch, ticks: "outside", tickcolor: css("--line"), ticklen: 4 };
}

// ---- drawing: one Plotly call for first and later drawings; ticks follow a zoom
const touch = window.matchMedia("(pointer: coarse)").matches;
// Only these two buttons: Plotly's default set would offer to send the chart to its makers' server.
const CONFIG = { displaylogo: false, responsive: true, scrollZoom: false, displayModeBar: touch ? false : "hover", modeBarButtons: [["toImage", "resetScale2d"]], plotlyServerURL: "", toImageButtonOptions: { scale: 2 } };
const LAYOUT = () => ({
  font: { family: css("--sans"), size: 12.5, color: css("--soft") }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: touch ? false : "zoom",
  hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { family: css("--sans"), size: 12.5, color: css("--ink") }, align: "left" }, showlegend: false,
  modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--line"), activecolor: css("--soft") },
});
function draw(node, traces, layout, label) {
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", label);
  Plotly.react(node, traces, { ...LAYOUT(), ...layout }, CONFIG);
  if (node.dataset.wired) return;
  node.dataset.wired = "1";
  node.on("plotly_relayout", (change) => {
    if (node.ownAxis) return;
    if (!Object.keys(change).some((k) => k.startsWith("xaxis.range") || k === "xaxis.autorange")) return;
    const range = change["xaxis.autorange"] ? axisRange() : node.layout.xaxis.range;
    const ticks = tickTokens(range, node.clientWidth - 60);
    const wanted = { "xaxis.tickvals": ticks.map(place), "xaxis.ticktext": ticks.map(formatTokens) };
    Plotly.relayout(node, change["xaxis.autorange"] ? { ...wanted, "xaxis.range": range } : wanted);
  });
}

// ---- the data as the figures ask for it
const curvesOf = (metric) => data.curves.filter((c) => c.metric === metric && shown(c));
const meansOf = (metric) => data.domain_curves.filter((c) => c.metric === metric && shown(c));
const metricNow = () => data.metrics[state.metric];
const normal = (v, chance) => (isNumber(v) && isNumber(chance) ? (v - chance) / (1 - chance) : null);
const title = (name) => name.charAt(0).toUpperCase() + name.slice(1);

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) key.startsWith("on") ? node.addEventListener(key.slice(2), value) : node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function segments(label, key, choices, redraw) {
  const box = element("span", { class: "segments", role: "group", "aria-label": label });
  for (const [value, text] of choices)
    box.append(element("button", { type: "button", "aria-pressed": String(state[key] === value), onclick: (event) => {
      state[key] = value;
      for (const b of box.children) b.setAttribute("aria-pressed", String(b === event.currentTarget));
      remember();
      redraw();
    } }, text));
  return element("span", { class: "control" }, label, box);
}
function picker(label, key, choices, redraw) {
  const select = element("select", { onchange: () => { state[key] = typeof state[key] === "number" ? Number(select.value) : select.value; remember(); redraw(); } });
  for (const [value, text] of choices) select.append(element("option", { value, ...(state[key] === value ? { selected: "" } : {}) }, text));
  return element("label", { class: "control" }, label, select);
}
