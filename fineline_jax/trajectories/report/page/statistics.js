"use strict";
// A section per statistic: what it computes, what it is not, a point per row with its interval, and its rows.
const MOST_POINTS = 40, MOST_ROWS = 100;

function rowsOf(statistic) {
  // Rows of the metric that is shown, left by search and filters, as positions.
  const at = Object.fromEntries(statistic.columns.map((c, i) => [c.name, statistic.values[i]])), seriesAt = Object.fromEntries(data.series.map((s, i) => [s.name, i]));
  const passes = (shows) => (i) => {
    if (at.metric && at.metric[i] !== metricNow().name) return false;
    if (at.domain && state.domain && at.domain[i] !== state.domain) return false;
    for (const key of ["series", "run", "small", "large"]) if (at[key] && seriesAt[at[key][i]] !== undefined && !shows(seriesAt[at[key][i]])) return false;
    return found(statistic.keys.map((key) => at[key][i]).join(" "));
  };
  const all = (statistic.values[0] || []).map((_, i) => i), rows = all.filter(passes(seriesShown));
  return { at, rows: rows.length ? rows : all.filter(passes(seriesKept)) }; // of single runs where there are none of means
}
function formatCell(column, value) {
  if (value === null) return "–";
  if (!isNumber(value)) return String(value);
  return column.unit === "tokens" ? formatTokens(value) : column.unit === "1" && Number.isInteger(value) ? String(value) : formatValue(value);
}
function tally(list) {
  const counts = {};
  for (const one of list) counts[one] = (counts[one] || 0) + 1;
  return Object.entries(counts).sort((a, b) => b[1] - a[1]);
}

function drawPoints(node, statistic) {
  const { at, rows } = rowsOf(statistic), chart = statistic.chart, column = statistic.columns.find((c) => c.name === chart.value), keys = statistic.keys.filter((key) => key !== "metric");
  const known = rows.filter((i) => isNumber(at[chart.value][i])).sort((a, b) => at[chart.value][b] - at[chart.value][a]);
  const every = Math.max(1, (known.length - 1) / (MOST_POINTS - 1)), list = known.length <= MOST_POINTS ? known : Array.from({ length: MOST_POINTS }, (_, k) => known[Math.round(k * every)]);
  const differing = keys.filter((key) => new Set(known.map((i) => at[key][i])).size > 1), named = differing.length ? differing : keys.slice(0, 1);
  const name = (i) => named.map((key) => at[key][i]).filter(Boolean).join(" · "), tokens = column.unit === "tokens", x = (v) => (tokens ? place(v) : v);
  const ends = column.interval ? column.interval.map((end) => at[end]) : null, tint = colour(0);
  const bars = ends ? { error_x: { type: "data", symmetric: false, array: list.map((i) => (isNumber(ends[1][i]) ? x(ends[1][i]) - x(at[chart.value][i]) : 0)), arrayminus: list.map((i) => (isNumber(ends[0][i]) ? x(at[chart.value][i]) - x(ends[0][i]) : 0)), color: tint, thickness: 1.5, width: 0 } } : {};
  const text = list.map((i) => `<b>${escape(name(i))}</b><br>` + statistic.columns.filter((c) => !statistic.keys.includes(c.name) && at[c.name][i] !== null && at[c.name][i] !== "").slice(0, 12).map((c) => `${escape(c.name)}: ${escape(formatCell(c, at[c.name][i]))}`).join("<br>"));
  const narrow = node.clientWidth < 560, most = narrow ? 24 : 58, short = (s) => (s.length > most ? s.slice(0, most / 2) + "…" + s.slice(1 - most / 2) : s); // arms differ at either end
  node.style.height = (list.length ? 74 + 19 * list.length : 0) + "px";
  node.hidden = !list.length;
  node.note.textContent = !list.length ? "No row of this metric has a number." : list.length < known.length ? `${list.length} of ${known.length} rows, spread evenly over their order; search and filters narrow them down.` : "";
  if (!list.length) return;
  draw(node, [{ type: "scatter", mode: "markers", x: list.map((i) => x(at[chart.value][i])), y: list.map((_, k) => k), marker: { size: 7, color: tint }, text, hovertemplate: "%{text}<extra></extra>", ...bars }], {
    margin: { l: 8, r: 14, t: 8, b: 54 }, hovermode: "closest",
    shapes: chart.reference === null ? [] : [{ type: "line", x0: chart.reference, x1: chart.reference, yref: "paper", y0: 0, y1: 1, line: { color: css("--soft"), width: 1.2, dash: "5px,4px" }, layer: "below" }],
    xaxis: { ...(tokens ? tokenAxis(node.clientWidth - 200) : { gridcolor: css("--grid"), zeroline: false, tickfont: { size: 11.5 }, fixedrange: touch }), title: { text: escape(narrow ? column.name : column.meaning), font: { size: 12 }, standoff: 6 } },
    yaxis: { range: [list.length - 0.5, -0.5], tickmode: "array", tickvals: list.map((_, k) => k), ticktext: list.map((i) => escape(short(name(i))) + " "), automargin: true, fixedrange: true, zeroline: false, showgrid: false, tickfont: { size: 11.5, color: css("--ink") } },
  }, `${statistic.title} ${column.meaning}, ${count(list.length, "row")}: highest ${name(list[0])} ${formatCell(column, at[chart.value][list[0]])}, lowest ${name(list.at(-1))} ${formatCell(column, at[chart.value][list.at(-1)])}`);
}

// A statistic over two facets: for each of its tasks the map of its values, each with its interval.
function drawMap(node, statistic, wanted) {
  const { at } = rowsOf(statistic), chart = statistic.chart, column = statistic.columns.find((c) => c.name === chart.value), better = metricNow().better;
  const levels = (key) => [...new Set(wanted.map((i) => at[key][i]))].sort((a, b) => a - b || String(a).localeCompare(b)), xs = levels("x_value"), ys = levels("y_value");
  const cell = (f) => ys.map((y) => xs.map((x) => { const i = wanted.find((k) => at.x_value[k] === x && at.y_value[k] === y); return i === undefined ? null : f(i); }));
  const name = (v) => (isNumber(v) ? v.toLocaleString("en").replaceAll(",", NARROW) : escape(v)), [low, high] = column.interval, facet = (key) => escape(at[key][wanted[0]]);
  draw(node, [{ type: "heatmap", x: xs.map(name), y: ys.map(name), z: cell((i) => at[chart.value][i]), xgap: 3, ygap: 3, showscale: false, colorscale: [[0, night() ? "#1f4e79" : "#9ecae1"], [1, night() ? "#2b3038" : "#f4f2ec"]], reversescale: better > 0,
    text: cell((i) => `<b>${formatCell(column, at[chart.value][i])}</b>` + (isNumber(at[low][i]) ? `<br>${formatCell(column, at[low][i])} – ${formatCell(column, at[high][i])}` : "") + `<br>${count(at.runs[i], "run")}`),
    texttemplate: "%{text}", textfont: { size: node.clientWidth < 420 ? 10 : 12.5, color: css("--ink") }, hovertemplate: `${facet("x")} %{x}, ${facet("y")} %{y}<br>%{text}<extra></extra>` }],
    { margin: { l: 8, r: 8, t: 8, b: 48 }, xaxis: { type: "category", automargin: true, fixedrange: true, title: { text: facet("x"), font: { size: 12 } } }, yaxis: { type: "category", automargin: true, fixedrange: true, title: { text: facet("y"), font: { size: 12 }, standoff: 12 } } },
    `${statistic.title} ${at.task[wanted[0]]}, by ${at.x[wanted[0]]} and ${at.y[wanted[0]]}`);
}
function drawMaps(box, statistic) {
  const { at, rows } = rowsOf(statistic);
  for (const task of new Set(rows.map((i) => at.task[i]))) {
    const plot = element("div", { class: "plot" }), wanted = rows.filter((i) => at.task[i] === task);
    box.append(element("article", { class: "card panel" }, element("header", {}, element("h3", {}, task), element("p", {}, `${metricNow().label}; 95 % interval between seeds`)), plot));
    whenSeen(plot, () => drawMap(plot, statistic, wanted));
  }
}

// A statistic along the run: for each value of the panel key its number and its ratio over tokens, a line per first two keys.
const MOST_BANDS = 8;
function drawCourse(node, statistic, panel, name, nothing, wanted) {
  const { at } = rowsOf(statistic), chart = statistic.chart, column = statistic.columns.find((c) => c.name === name), [low, high] = column.interval.map((end) => at[end]);
  const label = (i) => statistic.keys.slice(0, 2).map((key) => at[key][i]).join(" → "), lines = new Map(), bands = [], traces = [];
  for (const i of wanted) (lines.get(label(i)) || lines.set(label(i), []).get(label(i))).push(i);
  for (const [id, list] of lines) {
    const own = data.series.findIndex((s) => s.name === at[statistic.keys[0]][list[0]]), tint = own < 0 ? colour(traces.length) : seriesColour(own), x = (i) => place(at[chart.over][i]);
    const parts = list.reduce((all, i) => (isNumber(low[i]) && isNumber(high[i]) ? all.at(-1).push(i) : all.push([]), all), [[]]).filter((part) => part.length > 1); // a band ends where there is no interval
    const round = (part, up, down) => [...part.map(up), ...part.slice().reverse().map(down), null];
    if (lines.size <= MOST_BANDS) bands.push({ type: "scatter", mode: "lines", x: parts.flatMap((part) => round(part, x, x)), y: parts.flatMap((part) => round(part, (i) => high[i], (i) => low[i])), fill: "toself", fillcolor: alpha(tint, 0.1), line: { width: 0 }, hoverinfo: "skip" });
    traces.push({ type: "scatter", mode: "lines+markers", name: id, x: list.map(x), y: list.map((i) => at[name][i]), line: { color: tint, width: 1.8, dash: DASHES[own < 0 ? 0 : seriesDash(own) % DASHES.length] }, marker: { size: 5, color: tint },
      text: list.map((i) => `<b>${escape(id)}</b><br>${formatTokens(at[chart.over][i])} tokens<br>${escape(name)} ${formatCell(column, at[name][i])}` + (isNumber(low[i]) ? ` (95 %: ${formatCell(column, low[i])} to ${formatCell(column, high[i])})` : "")), hovertemplate: "%{text}<extra></extra>" });
  }
  const seen = [nothing, ...wanted.map((i) => at[name][i]).filter(isNumber)], least = Math.min(...seen), most = Math.max(...seen), room = 0.3 * (most - least) || 1; // the ends of a ratio near guessing are far away
  draw(node, [...bands, ...traces], { margin: { l: 46, r: 12, t: 8, b: 32 }, hovermode: "closest", xaxis: tokenAxis(node.clientWidth - 60),
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: nothing, y1: nothing, line: { color: css("--soft"), width: 1.2, dash: "5px,4px" }, layer: "below" }],
    yaxis: { range: [least - room, most + room], gridcolor: css("--grid"), zeroline: false, automargin: true, tickfont: { size: 11.5 }, nticks: 7, fixedrange: touch } },
    `${column.meaning}, ${panel}, over training tokens: ${[...lines.keys()].slice(0, 12).join(", ")}${lines.size > 12 ? " and others" : ""}`);
}
function drawCourses(box, statistic) {
  const { at, rows } = rowsOf(statistic), chart = statistic.chart;
  for (const panel of new Set(rows.map((i) => at[chart.panel][i])))
    for (const [name, nothing] of [[chart.value, chart.reference], [chart.ratio, 1]]) {
      const wanted = rows.filter((i) => at[chart.panel][i] === panel), plot = element("div", { class: "plot" }), column = statistic.columns.find((c) => c.name === name);
      if (!wanted.some((i) => isNumber(at[name][i]))) continue;
      const packed = new Set(wanted.map((i) => at[statistic.keys[0]][i] + at[statistic.keys[1]][i])).size > MOST_BANDS;
      box.append(element("article", { class: "card panel" }, element("header", {}, element("h3", {}, title(panel)), element("p", {}, `${column.meaning}; ${packed ? "point at a line for its 95 % interval; up to eight lines have bands" : "bands: 95 %"}`)), plot));
      whenSeen(plot, () => drawCourse(plot, statistic, panel, name, nothing, wanted));
    }
}

function drawRows(table, statistic) {
  const { at, rows } = rowsOf(statistic), columns = statistic.columns, head = `<tr>${columns.map((c) => `<th scope="col" title="${escape(c.meaning)}">${escape(c.name)}</th>`).join("")}</tr>`;
  table.innerHTML = `<thead class="plain">${head}</thead><tbody>${rows.slice(0, MOST_ROWS).map((i) => `<tr>${columns.map((c) => `<td class="${c.unit ? "" : "text words"}">${escape(formatCell(c, at[c.name][i]))}</td>`).join("")}</tr>`).join("")}</tbody>` +
    (rows.length > MOST_ROWS ? `<caption>${MOST_ROWS} of ${rows.length} rows; all are in ${statistic.name}.csv</caption>` : "");
}

function drawStatistics() {
  const box = document.getElementById("statistics");
  clearPlots(box);
  const empty = [];
  for (const statistic of data.statistics) {
    const { at, rows } = rowsOf(statistic);
    if (!rows.length) { // of this metric, or behind the filters
      if (statistic.total) empty.push(statistic.title);
      continue;
    }
    const answers = at.verdict ? tally(rows.map((i) => at.verdict[i])) : [], reasons = at.reason ? tally(rows.map((i) => at.reason[i]).filter(Boolean)) : [];
    const section = element("section", { "aria-labelledby": "s-" + statistic.name, class: "statistic" }, element("h2", { id: "s-" + statistic.name }, statistic.title), element("p", { class: "note" }, statistic.definition));
    if (answers.length) section.append(element("p", { class: "answer" }, answers.map(([verdict, n]) => `${verdict}: ${n}`).join("; ") + ` (of ${rows.length}).` + (reasons.length ? ` Why there is no answer${reasons.length > 1 ? ", most often" : ""}: ${reasons[0][0]}.` : "")));
    const plot = element("div", { class: "plot", id: "p-" + statistic.name }), note = element("p", { class: "note" }), table = element("table");
    plot.note = note;
    if (at.x_value) {
      const maps = element("div", { class: "panels" });
      section.append(maps, element("p", { class: "note" }, statistic.caveat));
      drawMaps(maps, statistic);
    } else if (statistic.chart && statistic.chart.over) {
      const courses = element("div", { class: "panels" });
      section.append(courses, element("p", { class: "note" }, statistic.caveat));
      drawCourses(courses, statistic);
    } else if (statistic.chart) {
      section.append(element("figure", { class: "card" }, plot, element("figcaption", {}, statistic.caveat)), note);
      whenSeen(plot, () => drawPoints(plot, statistic));
    }
    const more = element("details", { ontoggle: () => { if (more.open && !table.innerHTML) drawRows(table, statistic); } }, element("summary", {}, `The rows (${rows.length}) and the source`),
      element("p", { class: "note" }, `Source: ${statistic.source}. All rows${statistic.total > (statistic.values[0] || []).length ? ` (${statistic.total})` : ""}: ${statistic.name}.csv and .parquet.`), element("div", { class: "table-scroll card", tabindex: "0", role: "region", "aria-label": statistic.title }, table));
    section.append(more);
    box.append(section);
  }
  if (empty.length) box.append(element("p", { class: "note" }, `Without a row of this metric and these filters: ${empty.join(" ")}`));
}
