"use strict";
// The headline figure: tasks (or domains) x tokens, coloured by score above chance, in the order in which they were learned.

function timelineRows() {
  // a metric without chance has no mean over tasks: its rows are always tasks
  const domains = state.rows === "domains" && data.domain_curves.some((c) => c.metric === state.metric && c.series === state.series);
  const list = (domains ? data.domain_curves : data.curves).filter((c) => c.metric === state.metric && c.series === state.series && (!state.domain || data.domains[domainOf(c)] === state.domain) &&
    (domains || found(`${data.series[c.series].name} ${data.tasks[c.task].name} ${data.domains[domainOf(c)]}`)));
  const rows = list.map((curve) => ({ curve, row: curve.summary, name: domains ? data.domains[curve.domain] : data.tasks[curve.task].name,
    domain: domains ? curve.domain : data.tasks[curve.task].domain }));
  return rows.sort((a, b) => a.row.rank - b.row.rank);
}
// The clock of the timeline: tokens to a fixed score, or half of the gain where no score is stated.
const clockOf = (rows) => (rows.some(({ row }) => isNumber(row.to_score)) ? ["to_score", "tokens to the score"] : ["t50", "t50"]);

function shadeScale(low, high) {
  // 0 (chance) is the colour of the page, so that learning emerges from it; blue above, orange below.
  const light = { up: ["#f4f2ec", "#cfe3f1", "#8fc1e0", "#3f8fc5", "#0f5f9e", "#08335c"], down: ["#f4f2ec", "#fbd9a8", "#eda35a", "#c96a1b"] };
  const dim = { up: ["#20242b", "#1d3d58", "#22618f", "#2f8ac6", "#6bb9ea", "#d3eeff"], down: ["#20242b", "#55361d", "#8e5320", "#cf7d33"] };
  const stops = night() ? dim : light;
  // Equal distances from chance get equal intensity on both sides.
  const scale = [], zero = -low / (high - low), blend = (colours, t) => {
    const at = t * (colours.length - 1), i = Math.min(Math.floor(at), colours.length - 2), part = (hex, k) => parseInt(hex.slice(1 + 2 * k, 3 + 2 * k), 16);
    return `rgb(${[0, 1, 2].map((k) => Math.round(part(colours[i], k) + (at - i) * (part(colours[i + 1], k) - part(colours[i], k)))).join(",")})`;
  };
  if (low < 0) for (let i = 6; i >= 1; i -= 1) scale.push([zero * (1 - i / 6), blend(stops.down, Math.min(1, (i / 6) * (-low / high)))]);
  for (let i = 0; i <= 12; i += 1) scale.push([zero + (1 - zero) * (i / 12), blend(stops.up, i / 12)]);
  return scale;
}

function cellEdges(tokens) {
  const at = tokens.map(place), edges = [];
  for (let i = 0; i + 1 < at.length; i += 1) edges.push((at[i] + at[i + 1]) / 2);
  const half = at.length > 1 ? [(at[1] - at[0]) / 2, (at.at(-1) - at.at(-2)) / 2] : [0.1, 0.1].map((h) => (state.axis === "linear" ? h * (tokens[0] || 1) : h));
  return [at[0] - half[0], ...edges, at.at(-1) + half[1]];
}

function drawTimeline() {
  const node = document.getElementById("timeline"), metric = metricNow(), series = data.series[state.series];
  const rows = timelineRows(), onChance = rows.some(({ curve }) => isNumber(curve.chance));
  const share = state.shade === "share" || !onChance;
  const shade = ({ curve, row }, v) => {
    if (!isNumber(v)) return null;
    if (!share) return normal(v, curve.chance);
    if (!ROSE.includes(row.verdict)) return null;
    return (v - row.baseline) / (row.level - row.baseline);
  };
  const z = rows.map((r) => r.curve.value.map((v) => shade(r, v)));
  const seen = z.flat().filter(isNumber);
  const high = share ? 1 : Math.max(0.1, ...seen), low = share ? 0 : Math.max(-high, Math.min(-0.02 * high, ...seen));
  const narrow = node.clientWidth < 560, size = rows.length > 60 ? 9 : narrow ? 11 : 12.5, height = rows.length > 60 ? 15 : narrow ? 25 : 29;
  const names = rows.map((r) => (narrow && r.name.length > 17 ? r.name.slice(0, 16) + "…" : r.name));
  const text = rows.map(({ curve, name }) => curve.value.map((v, i) =>
    `<b>${escape(name)}</b><br>${formatTokens(series.tokens[i])} tokens · ${escape(series.checkpoints[i])}<br>${escape(curve.task === undefined ? "mean score above chance" : metric.label)} ${formatError(v, curve.stderr[i])}` +
    (isNumber(curve.chance) && curve.task !== undefined ? `<br>above chance: ${formatValue(normal(v, curve.chance))}` : "")));
  const known = series.tokens.map((_, i) => i).filter((i) => rows.some(({ curve }) => isNumber(curve.value[i])));
  const pick = (list) => known.map((i) => list[i]);
  const traces = [{ type: "heatmap", z: z.map(pick), x: cellEdges(pick(series.tokens)), y: rows.map((_, i) => i), text: text.map(pick), hovertemplate: "%{text}<extra></extra>", zmin: low, zmax: high,
    colorscale: shadeScale(low, high), xgap: known.length > 60 ? 0 : 1, ygap: 3, hoverongaps: false,
    colorbar: { orientation: "h", thickness: 9, len: narrow ? 1 : 0.36, x: narrow ? 1 : 0.975, xanchor: "right", y: 1, yanchor: "bottom", ypad: 8, xpad: 0, outlinewidth: 0, tickformat: ".0%", nticks: 5, tickfont: { size: 11 },
      title: { text: share ? "share of its own final gain" : narrow ? "score above chance" : "score above chance (0 = guessing, 100 % = perfect)", side: "top", font: { size: 11.5 } } } }];
  const ink = night() ? "#fff" : "#111", halo = night() ? "#111" : "#fff", [clock, clockName] = clockOf(rows);
  const marks = (key, symbol, name, markSize) => {
    const here = rows.map((r, i) => [r, i]).filter(([r]) => isNumber(r.row[key]));
    return { type: "scatter", mode: "markers", x: here.map(([r]) => place(r.row[key])), y: here.map(([, i]) => i), name, showlegend: true,
      marker: { symbol, size: markSize, color: key === "onset" ? halo : ink, line: { color: key === "onset" ? ink : halo, width: 1.4 } },
      hovertext: here.map(([r]) => `<b>${escape(r.name)}</b><br>${name}: ${formatTokens(r.row[key])} tokens` + (isNumber(r.row[key + "_low"]) ? `<br>95 %: ${formatTokens(r.row[key + "_low"])} to ${formatTokens(r.row[key + "_high"])}` : "")), hoverinfo: "text" };
  };
  const bars = { type: "scatter", mode: "lines", x: [], y: [], line: { color: ink, width: 1.6 }, hoverinfo: "skip", showlegend: false };
  rows.forEach(({ row }, i) => { if (isNumber(row[clock]) && isNumber(row[clock + "_low"])) { bars.x.push(place(row[clock + "_low"]), place(row[clock + "_high"] ?? series.tokens.at(-1)), null); bars.y.push(i, i, null); } });
  // a halo under bars and ticks keeps them visible on dark cells
  const halos = { ...marks("t90", "line-ns-open", "t90", 13), showlegend: false, hoverinfo: "skip" };
  halos.marker = { ...halos.marker, color: halo, line: { color: halo, width: 5.5 } };
  traces.push({ ...bars, line: { color: halo, width: 4.2 } }, bars, halos, marks("onset", "triangle-right", "onset", 9), marks(clock, "circle", clockName, 9), marks("t90", "line-ns-open", "t90", 11));
  Object.assign(traces.at(-1).marker, { color: ink, line: { color: ink, width: 2.4 } });
  const range = cellEdges(pick(series.tokens)), xRange = [range[0], range.at(-1)];
  const outcome = ({ row, curve }) => (ROSE.includes(row.verdict) ? formatValue(row.final) : row.verdict === OUTCOME.at_chance ? "≈ chance" : row.verdict === OUTCOME.below_chance ? "< chance" : row.verdict === OUTCOME.no_rise ? "no change" : row.verdict === OUTCOME.too_few ? formatValue(row.final) : row.verdict);
  const annotations = rows.map((r, i) => ({ xref: "paper", x: 1, xanchor: "left", xshift: 7, yref: "y", y: i, showarrow: false, text: escape(outcome(r)), font: { size: size - 0.5, color: css("--ink") } }));
  if (narrow) annotations.length = 0; // the numbers are in the table below
  else annotations.push({ xref: "paper", yref: "paper", x: 1, xanchor: "left", xshift: 7, y: 1, yanchor: "bottom", showarrow: false, text: "final", font: { size: 11 } });
  const top = narrow ? 52 : 58;
  node.style.height = top + 46 + rows.length * height + "px";
  draw(node, traces, { margin: { l: narrow ? 8 : 10, r: narrow ? 12 : 86, t: top, b: 42 }, annotations, showlegend: node.clientWidth >= 760,
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", xanchor: "left", yref: "paper", font: { size: 12 }, itemclick: "toggle" },
    xaxis: { ...tokenAxis(node.clientWidth - 240, xRange), showgrid: false, title: { text: "training tokens", font: { size: 12 }, standoff: 6 } },
    yaxis: { range: [rows.length - 0.5, -0.5], tickmode: "array", tickvals: rows.map((_, i) => i), automargin: true, fixedrange: true, zeroline: false, showgrid: false, ticks: "", tickfont: { size, color: css("--ink") },
      ticktext: rows.map((r, i) => `${escape(names[i])} <span style="color:${colour(r.domain)}">■</span> `) } },
    `${metric.label} of ${count(rows.length, "row")} over training tokens in ${series.name}, in the order of learning: ${rows.map((r) => r.name).join(", ")}`);
  const key = [...new Set(rows.map((r) => r.domain))].sort((a, b) => a - b).map((d) => `<span style="color:${colour(d)}">■</span>${NARROW}${escape(data.domains[d])}`).join(" &ensp; ");
  document.getElementById("timeline-note").innerHTML = `Earliest learned at the top. ▷ onset: stays above guessing from here on; ● ${clock === "t50" ? "t50: half of the final gain" : "tokens to half of the way from guessing to perfect, or to the score that was stated"}, with its 95 % interval; ❘ t90 of its own gain.<br>` + key;
}

function drawLede() {
  // One sentence that says what the reader is about to see, computed from the same rows.
  const rows = timelineRows(), learned = rows.filter(({ row }) => ROSE.includes(row.verdict));
  const refused = rows.filter(({ row }) => row.verdict === OUTCOME.at_chance || row.verdict === OUTCOME.below_chance).length;
  const [clock] = clockOf(rows), timed = learned.filter(({ row }) => isNumber(row[clock])), thing = rows.some(({ curve }) => curve.task === undefined) ? "domain" : "task";
  let text = many ? `In <b>${escape(data.series[state.series].name)}</b>, ` : "";
  text += `<b>${learned.length} of ${rows.length}</b> ${thing}${rows.length === 1 ? "" : "s"} rose${rows.some(({ curve }) => isNumber(curve.chance)) ? " above chance" : ""}.`;
  if (timed.length > 1) text += ` ${clock === "t50" ? "Half of the final gain" : "The score"} came first for <b>${escape(timed[0].name)}</b> (${formatTokens(timed[0].row[clock])} tokens) and last for <b>${escape(timed.at(-1).name)}</b> (${formatTokens(timed.at(-1).row[clock])}).`;
  const rising = learned.filter(({ row }) => row.verdict === OUTCOME.still_rising).length;
  if (rising) text += ` ${rising} ${rising === 1 ? "was" : "were"} still rising at the last checkpoint.`;
  const fell = rows.filter(({ row }) => row.verdict === OUTCOME.declined).length;
  if (fell) text += ` ${fell} ${fell === 1 ? "has" : "have"} declined since ${fell === 1 ? "its" : "their"} peak.`;
  if (refused) text += ` ${refused} ${refused === 1 ? "is" : "are"} not above guessing.`;
  document.getElementById("lede").innerHTML = rows.length ? text : "No task of this series has this metric.";
}
