"use strict";
// The controls, the loss curve, the table of numbers; then everything is drawn once.

// What the losses are drawn against: training tokens, optimizer steps, or FLOPs, where the log has them.
const AGAINST = [["tokens", "tokens", "training tokens"], ["step", "steps", "optimizer steps"], ["flops", "FLOPs", "training FLOPs"]];
function alongRun(run, of, key) {
  const list = key === "flops" ? of.tokens.map((t) => t * run.flops_per_token) : of[key] || of.tokens.map(() => null);
  if (key !== "tokens") return list.map((v) => (state.axis === "linear" || v > 0 ? v : null));
  // on the log axis what lies before the place of 0 has no room
  return list.map((t) => (state.axis === "linear" || t === 0 || Math.log10(t) > zeroAt ? place(t) : null));
}

function drawTraining() {
  if (!data.losses) return;
  document.getElementById("training-section").hidden = false;
  const node = document.getElementById("training"), traces = [], several = data.losses.length > 1, crowded = data.losses.length > 4, key = state.against;
  const rows = [["learning_rate", "learning rate"], ["gradient_norm", "gradient norm"]].filter(([name]) => data.losses.some((l) => l[name]));
  data.losses.forEach((run, i) => {
    const own = data.series.findIndex((s) => s.name === run.series), mean = own < 0 ? -1 : data.series.findIndex((s) => s.role === "mean" && s.arm === data.series[own].arm), at = mean < 0 ? own : mean; // runs of an arm look alike
    if (at >= 0 && !seriesKept(at)) return;
    const x = alongRun(run, run, key), known = several && at >= 0, tint = known ? seriesColour(at) : colour(i), dash = DASHES[known ? seriesDash(at) % DASHES.length : 0], name = run.series ? run.series + " " : "";
    const hover = (label, list) => list.map((v, j) => `${escape(name)}${label} ${isNumber(v) ? Number(v.toPrecision(4)) : "–"}<br>${formatTokens(run.tokens[j])} tokens · step ${run.step[j]}`);
    const line = (y, label, more) => traces.push({ type: "scatter", mode: "lines", x, y, name: name + label, line: { color: tint, width: 2, dash }, text: hover(label, y), hovertemplate: "%{text}<extra></extra>", ...more });
    if (run.raw_loss && !crowded) traces.push({ type: "scatter", mode: "lines", x, y: run.raw_loss, line: { color: alpha(tint, 0.3), width: 1 }, hoverinfo: "skip", showlegend: false });
    line(run.loss, "training loss", crowded ? { showlegend: false } : {});
    run.validation.forEach((set, j) => {
      const mark = several ? tint : colour(1 + j), { tokens, loss } = set, label = `${name}validation loss, ${set.name}`;
      traces.push({ type: "scatter", mode: "markers+lines", x: alongRun(run, set, key), y: loss, name: label, showlegend: !crowded, line: { color: mark, width: 1, dash: DASHES[(2 + j) % DASHES.length] }, marker: { size: crowded ? 6 : 8, color: mark, line: { color: css("--card"), width: 1.4 } },
        text: loss.map((v, k) => `${escape(label)} ${Number(v.toPrecision(4))}<br>${formatTokens(tokens[k])} tokens`), hovertemplate: "%{text}<extra></extra>" });
    });
    rows.forEach(([field, label], k) => run[field] && line(run[field], label, { yaxis: "y" + (k + 2), showlegend: false, line: { color: several ? tint : css("--soft"), width: several ? 1.2 : 1.8, dash } }));
  });
  const ticks = key === "tokens" ? [...new Set(data.series.flatMap((s) => s.tokens))] : [];
  const shapes = ticks.length > 400 ? [] : ticks.map((t) => ({ type: "line", xref: "x", x0: place(t), x1: place(t), yref: "paper", y0: 0, y1: 0.03, line: { color: css("--accent"), width: 1.5 } }));
  const y = (text, extra) => ({ gridcolor: css("--grid"), zeroline: false, tickfont: { size: 11.5 }, title: { text, font: { size: 12 } }, automargin: true, fixedrange: touch, ...extra });
  const part = [0, 0.29, 0.24][rows.length], rest = rows.map(([name, label], k) => { const top = 0.045 + part * (rows.length - k); return ["yaxis" + (k + 2), y(label, { domain: [top - part + 0.02, top - 0.045], exponentformat: "power", nticks: 4, rangemode: "tozero", ...(name === "gradient_norm" ? { type: "log" } : {}) })]; });
  const own = { type: state.axis === "log" ? "log" : "linear", exponentformat: "power", gridcolor: css("--grid"), zeroline: false, linecolor: css("--line"), tickfont: { size: 11.5 }, fixedrange: touch, autorange: true, tickmode: "auto" };
  node.style.height = 340 + 130 * rows.length + "px";
  node.ownAxis = key !== "tokens";
  draw(node, traces, { margin: { l: 56, r: 14, t: 30, b: 44 }, shapes, showlegend: !crowded, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 12 } }, hovermode: "closest",
    xaxis: { ...(key === "tokens" ? tokenAxis(node.clientWidth - 80) : own), title: { text: AGAINST.find(([k]) => k === key)[2], font: { size: 12 }, standoff: 6 }, anchor: "free", position: 0 },
    yaxis: y("loss (nats per token)", { domain: [rows.length ? 0.06 + part * rows.length : 0.04, 1] }), ...Object.fromEntries(rest) },
    ["training and validation loss", ...rows.map(([, label]) => label)].join(", ") + " over " + AGAINST.find(([k]) => k === key)[2]);
}

const COLUMNS = [
  ["domain", "domain, task", (r) => `${String(data.tasks[r.task].domain).padStart(4, "0")} ${data.tasks[r.task].name}`], ["series", "series", (r) => data.series[r.series].name],
  ["shape", "curve", null], ["onset", "onset", (r) => r.onset], ["rank", "to score", (r) => r.rank], ["t50", "t50", (r) => r.t50], ["t90", "t90", (r) => r.t90], ["final", "final ± s.e.", (r) => r.final], ["chance", "chance", (r) => r.chance],
  ["n", "n", (r) => r.n], ["snr", "SNR", (r) => r.snr], ["monotonicity", "ρ", (r) => r.monotonicity], ["verdict", "verdict", (r) => r.verdict],
];
const TEXT_COLUMNS = ["domain", "series", "verdict", "shape"];

function sparkline(curve) {
  const series = data.series[curve.series], w = 92, h = 24;
  const points = curve.value.map((v, i) => [place(series.tokens[i]), v]).filter(([, v]) => isNumber(v));
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]).concat(isNumber(curve.chance) ? [curve.chance] : []);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const at = ([x, y]) => `${(2 + ((x - x0) / (x1 - x0 || 1)) * (w - 4)).toFixed(1)},${(h - 3 - ((y - y0) / (y1 - y0 || 1)) * (h - 6)).toFixed(1)}`;
  const chance = isNumber(curve.chance) ? `<polyline points="${at([x0, curve.chance])} ${at([x1, curve.chance])}" fill="none" stroke="currentColor" opacity=".4" stroke-dasharray="3 3"/>` : "";
  const shape = points.length > 1 ? `<polyline points="${points.map(at).join(" ")}" fill="none" stroke="${many ? seriesColour(curve.series) : colour(data.tasks[curve.task].domain)}" stroke-width="1.8" stroke-linejoin="round"/>` : `<circle cx="${w / 2}" cy="${h / 2}" r="2.5" fill="currentColor"/>`;
  return `<svg width="${w}" height="${h}" viewBox="0 0 ${w} ${h}" aria-hidden="true">${chance}${shape}</svg>`;
}

function drawNumbers() {
  const table = document.getElementById("numbers"), columns = COLUMNS.filter(([key]) => key !== "series" || many), [key, direction] = state.sort;
  const value = COLUMNS.find((c) => c[0] === key)[2];
  const rows = curvesOf(state.metric).map((curve) => ({ curve, row: curve.summary }));
  rows.sort((a, b) => {
    const p = value(a.row), q = value(b.row), p0 = p === null || p === undefined, q0 = q === null || q === undefined;
    if (p0 || q0) return p0 - q0; // what has no number stays at the end in both directions
    return direction * (typeof p === "string" ? p.localeCompare(q) : p - q);
  });
  const head = element("tr");
  for (const [name, label, get] of columns) {
    const cell = element("th", { scope: "col", class: TEXT_COLUMNS.includes(name) ? "text" : "", ...(name === key ? { "aria-sort": direction > 0 ? "ascending" : "descending" } : {}) });
    cell.append(get ? element("button", { type: "button", onclick: () => { state.sort = [name, name === key ? -direction : 1]; drawNumbers(); } }, label) : element("button", { type: "button", disabled: "" }, label));
    head.append(cell);
  }
  const time = (r, name) => {
    if (isNumber(r[name])) {
      const low = r[name + "_low"], high = r[name + "_high"];
      return `<td>${formatTokens(r[name])}${isNumber(low) ? `<small class="under">${formatTokens(low)} – ${isNumber(high) ? formatTokens(high) : "…"}</small>` : ""}</td>`;
    }
    const why = r[name + "_outcome"];
    const bound = isNumber(r[name + "_low"]) ? "> " + formatTokens(r[name + "_low"]) : why === OUTCOME.not_reached ? "> " + formatTokens(r.last_tokens) : "";
    return `<td class="none" title="${escape(why)}">${bound ? bound : why === OUTCOME.not_saturated ? why : why === OUTCOME.before_first ? "≤ " + formatTokens(r.first_tokens) : "–"}</td>`;
  };
  const from = tally(rows.map(({ row }) => row.interval_from).filter(Boolean)), HOLD = { documents: "a bootstrap over documents", "standard errors": "standard errors of the scores", "checkpoint noise": "the scatter from checkpoint to checkpoint", seeds: "the differences between seeds" };
  document.getElementById("intervals").textContent = from.length ? `The intervals of times are from ${from.map(([name, n]) => `${HOLD[name] ?? name} (${count(n, "curve")})`).join(", ")}${from.some(([name]) => name !== "seeds") ? "; only those between seeds hold what another seed would give" : ""}.` : "";
  const most = state.all ? rows.length : 100;
  const body = rows.slice(0, most).map(({ curve, row: r }) => {
    const kind = r.verdict === OUTCOME.settled || r.verdict === OUTCOME.above_chance ? "settled" : r.verdict === OUTCOME.still_rising ? "rising" : r.verdict === OUTCOME.below_chance || r.verdict === OUTCOME.declined ? "below" : "refused";
    const onset = r.onset_outcome === OUTCOME.before_first ? `<td class="none" title="above chance at the first checkpoint">≤ ${formatTokens(r.first_tokens)}</td>` : isNumber(r.onset) ? `<td>${formatTokens(r.onset)}</td>` : `<td class="none" title="${escape(r.onset_outcome)}">–</td>`;
    const cells = {
      domain: `<th scope="row">${escape(data.tasks[r.task].name)}<small>${escape(data.domains[data.tasks[r.task].domain])}</small></th>`, series: `<td class="text">${escape(data.series[r.series].name)}</td>`,
      shape: `<td class="text">${sparkline(curve)}</td>`, onset, rank: time(r, "to_score"), t50: time(r, "t50"), t90: time(r, "t90"), final: `<td>${formatValue(r.final)}${isNumber(r.final_stderr) ? ` <small>± ${formatValue(r.final_stderr)}</small>` : ""}</td>`,
      chance: `<td>${isNumber(r.chance) ? formatValue(r.chance) : "–"}</td>`, n: `<td>${isNumber(r.n) ? r.n.toLocaleString("en").replaceAll(",", NARROW) : "–"}</td>`, snr: `<td>${isNumber(r.snr) ? r.snr.toFixed(Math.abs(r.snr) < 10 ? 1 : 0).replace("-", "−") : "–"}</td>`,
      monotonicity: `<td>${isNumber(r.monotonicity) ? r.monotonicity.toFixed(2).replace("-", "−") : "–"}</td>`, verdict: `<td class="text words"><span class="verdict ${kind}">${escape(r.verdict)}</span></td>`,
    };
    return "<tr>" + columns.map(([name]) => cells[name]).join("") + "</tr>";
  });
  const thead = element("thead", {}, head), tbody = element("tbody");
  tbody.innerHTML = body.join("");
  table.replaceChildren(thead, tbody);
  const more = document.getElementById("numbers-more");
  more.replaceChildren();
  if (rows.length > most) more.append(`${most} of ${rows.length} rows; all are in dynamics.csv. `, element("button", { type: "button", onclick: () => { state.all = true; drawNumbers(); } }, `show all ${rows.length}`));
}

function drawOverview() {
  const tokens = data.series.flatMap((s) => s.tokens), checkpoints = data.series.reduce((sum, s) => sum + (s.role === "mean" ? 0 : s.tokens.length), 0);
  const facts = [["series", data.series.filter((s) => s.role !== "mean").length], ["checkpoints", checkpoints], ["tasks", data.tasks.length], ["domains", data.domains.length], ["training tokens", tokens.length > 1 ? `${formatTokens(Math.min(...tokens))} – ${formatTokens(Math.max(...tokens))}` : formatTokens(tokens[0])]];
  document.getElementById("overview").innerHTML = facts.map(([name, v]) => `<div><dt>${name}</dt><dd>${v}</dd></div>`).join("");
}

function drawTimelineAndLede() { drawTimeline(); drawLede(); }
function drawFiltered() { drawLegend(); drawTimelineAndLede(); drawPanels(); drawStatistics(); drawNumbers(); drawTraining(); }


function buildControls() {
  const controls = document.getElementById("controls");
  controls.append(picker("Metric", "metric", data.metrics.map((m, i) => [i, m.label === m.name ? m.name : `${m.name}: ${m.label}`]), drawFiltered), segments("Tokens", "axis", [["log", "log"], ["linear", "linear"]], drawFiltered));
  if (many) controls.append(picker("Timeline of", "series", data.series.map((s, i) => [i, s.name]), () => { remember(); drawTimelineAndLede(); }));
  if (data.series.some((s) => s.role)) controls.append(segments("Seeds", "of", [["means", "means"], ["runs", "single runs"]], drawFiltered));
  const search = element("input", { type: "search", placeholder: "series, task or domain", value: state.search, oninput: () => { state.search = search.value; remember(); clearTimeout(search.later); search.later = setTimeout(drawFiltered, 250); } });
  controls.append(element("label", { class: "control" }, "Search", search));
  const filter = (label, key, values) => { if (values.length > 1) controls.append(picker(label, key, [["", "all"], ...values.map((v) => [v, v])], drawFiltered)); };
  filter("Domain", "domain", data.domains);
  filter("Size", "size", SIZES.map(sizeName).filter(Boolean));
  filter("Shots", "shots", [...new Set(data.series.map((s) => s.shots))].filter(Boolean));
  const shades = [["chance", "score above chance"], ["share", "share of its own gain"]];
  const timeline = document.getElementById("timeline-controls");
  if (data.domains.length > 1) timeline.append(segments("Rows", "rows", [["tasks", "tasks"], ["domains", "domains"]], drawTimelineAndLede));
  timeline.append(segments("Colour", "shade", shades, drawTimelineAndLede));
  const against = AGAINST.filter(([key]) => key !== "flops" || (data.losses || []).every((l) => l.flops_per_token));
  document.getElementById("training-controls").append(segments("Against", "against", against, drawTraining));
  document.getElementById("curves-controls").append(
    segments("Panels", "view", [["domain", "domains"], ["task", "tasks"], ["means", "domain means"]], drawPanels),
    segments("Scale", "scale", [["raw", "raw"], ["normal", "above chance"]], drawPanels));
  const axes = [["tokens", "tokens"], ["steps", "steps"], ["flops", "FLOPs"], ["loss", "validation loss"]].filter(([key]) => hasAxis(key));
  if (axes.length > 1) document.getElementById("curves-controls").append(segments("Against", "x", axes, drawPanels));
}

// On a phone the figures would come after four screens of sentences: all but the first two parts are folded.
const parts = [...document.getElementById("sentences").querySelectorAll("details")];
const fold = () => parts.forEach((part, i) => { part.open = i < 2 || window.innerWidth > 700 || printing; });

// Paper has no scrolling: every figure is drawn, light and as wide as a page.
function print(on) {
  printing = on;
  document.documentElement.classList.toggle("printing", on);
  fold();
  drawFiltered();
  if (on) for (const node of [...waiting.keys()]) drawWaiting(node);
}

buildControls();
drawOverview();
fold();
drawFiltered();
dark.addEventListener("change", drawFiltered);
let width = window.innerWidth;
window.addEventListener("resize", () => { if (Math.abs(window.innerWidth - width) > 40) { width = window.innerWidth; drawFiltered(); } });
window.addEventListener("beforeprint", () => print(true));
window.addEventListener("afterprint", () => print(false));
