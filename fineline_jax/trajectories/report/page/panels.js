"use strict";
// Small multiples: score against tokens with 95 % bands and the chance line. Drawn when they scroll into view.

const hiddenLines = new Set(); // of one series: tasks hidden in their panel

function panelList() {
  const list = curvesOf(state.metric).sort((a, b) => a.series - b.series), panels = [];
  const means = meansOf(state.metric).map((c) => ({ ...c, chance: 0, normalised: true })).sort((a, b) => a.domain - b.domain || a.series - b.series);
  const overall = (wide) => ({ name: "All domains", note: "mean score above chance: 0 is guessing, 1 is perfect", wide, lines: means.map((c) => ({ curve: c, label: data.domains[c.domain], colour: colour(c.domain), dash: Math.floor(c.domain / 8) })) });
  if (state.view === "task") {
    data.tasks.forEach((task, t) => {
      const lines = list.filter((c) => c.task === t);
      if (lines.length) panels.push({ name: task.name, note: data.domains[task.domain], lines: lines.map((c) => ({ curve: c, label: data.series[c.series].name, colour: seriesColour(c.series), dash: seriesDash(c.series) })) });
    });
  } else if (state.view === "domain") {
    data.domains.forEach((domain, d) => {
      const lines = list.filter((c) => data.tasks[c.task].domain === d);
      const tasks = [...new Set(lines.map((c) => c.task))];
      if (!lines.length) return;
      const crowded = tasks.length > 8;
      const out = lines.map((c) => ({ curve: c, label: data.tasks[c.task].name + (many ? " · " + data.series[c.series].name : ""), colour: many ? seriesColour(c.series) : colour(crowded ? d : tasks.indexOf(c.task)),
        dash: many ? tasks.indexOf(c.task) % DASHES.length : 0, faint: crowded }));
      const chances = new Set(lines.map((c) => c.chance));
      if (crowded && (state.scale === "normal" || chances.size === 1))
        for (const m of meansOf(state.metric).filter((c) => c.domain === d)) {
          const chance = state.scale === "normal" ? 0 : [...chances][0];
          out.push({ curve: { ...m, value: m.value.map((v) => (isNumber(v) ? chance + v * (1 - chance) : null)), stderr: m.stderr.map((v) => (isNumber(v) ? v * (1 - chance) : null)), chance, normalised: true },
            label: `mean of ${tasks.length} tasks` + (many ? " · " + data.series[m.series].name : ""), colour: many ? seriesColour(m.series) : colour(d), dash: 0, bold: true });
        }
      panels.push({ name: title(domain), note: count(tasks.length, "task"), lines: out, legend: crowded ? out.filter((l) => l.bold) : out });
    });
    if (!many && means.length > 1) panels.unshift(overall(panels.length % 2 === 0)); // the grid has two columns
  } else {
    const note = (tasks) => `mean of ${count(tasks, "task")}, above chance`;
    if (many) data.domains.forEach((domain, d) => {
      const lines = means.filter((c) => c.domain === d);
      if (lines.length) panels.push({ name: title(domain), note: note(lines[0].tasks), lines: lines.map((c) => ({ curve: c, label: data.series[c.series].name, colour: seriesColour(c.series), dash: seriesDash(c.series) })) });
    });
    else if (means.length) panels.push(overall(true));
  }
  return panels;
}

// What a score is drawn against, as [what, position of checkpoint i of a series]; the log axis has no place for 0.
const SCORE_AXES = {
  tokens: ["training tokens", (s, i) => place(s.tokens[i])],
  steps: ["steps", (s, i) => s.steps[i]],
  flops: ["training FLOPs", (s, i) => s.flops && s.flops * s.tokens[i]],
  loss: ["validation loss (nats per token)", (s, i) => s.loss && s.loss[i]],
};
const hasAxis = (key) => data.series.some((s) => s.tokens.some((_, i) => SCORE_AXES[key][1](s, i)));
const logged = () => state.axis === "log" && ["steps", "flops"].includes(state.x);
function scoreAxis(node) {
  if (state.x === "tokens") return tokenAxis(node.clientWidth - 60, axisRange());
  return { type: logged() ? "log" : "linear", autorange: state.x === "loss" ? "reversed" : true, title: { text: SCORE_AXES[state.x][0], font: { size: 12 } }, exponentformat: "power", nticks: 6, gridcolor: css("--grid"), zeroline: false, tickfont: { size: 11.5 }, automargin: true, fixedrange: touch };
}

function panelTraces(panel) {
  const at = (series, i) => { const x = SCORE_AXES[state.x][1](series, i); return isNumber(x) && (x > 0 || !logged()) ? x : null; };
  const traces = [], packed = panel.lines.length > 12; // of so many lines bands and markers hide more than they show
  for (const line of panel.lines) {
    const { curve } = line, series = data.series[curve.series], tint = line.colour, id = line.label;
    const scaled = state.scale === "normal" && !curve.normalised && isNumber(curve.chance);
    const value = scaled ? curve.value.map((v) => normal(v, curve.chance)) : curve.value;
    const error = scaled ? curve.stderr.map((e) => (isNumber(e) ? e / (1 - curve.chance) : null)) : curve.stderr;
    const keep = value.map((_, i) => i).filter((i) => isNumber(value[i]) && at(series, i) !== null);
    const visible = hiddenLines.has(panel.name + "\u0000" + id) ? "legendonly" : true;
    const banded = line.faint || packed ? [] : keep.filter((i) => isNumber(error[i]));
    if (banded.length > 1) {
      const x = banded.map((i) => at(series, i));
      traces.push({ type: "scatter", mode: "lines", x: [...x, ...x.slice().reverse()], y: [...banded.map((i) => value[i] + 1.96 * error[i]), ...banded.slice().reverse().map((i) => value[i] - 1.96 * error[i])],
        fill: "toself", fillcolor: alpha(tint, panel.lines.length > 5 ? 0.07 : 0.13), line: { width: 0 }, hoverinfo: "skip", visible, meta: id });
    }
    traces.push({ type: "scatter", mode: keep.length > 40 || line.faint || (packed && keep.length > 1) ? "lines" : "lines+markers", x: keep.map((i) => at(series, i)), y: keep.map((i) => value[i]), visible, meta: id, opacity: line.faint ? 0.28 : 1,
      line: { color: tint, width: line.bold ? 3 : line.faint ? 1 : packed ? 1.5 : 2, dash: DASHES[(line.dash || 0) % DASHES.length] }, marker: { size: 5, color: tint },
      ...(keep.length === 1 && !line.faint ? { error_y: { type: "data", array: keep.map((i) => 1.96 * (error[i] ?? 0)), color: tint, thickness: 1.5 } } : {}),
      text: keep.map((i) => `<b>${escape(id)}</b><br>${formatTokens(series.tokens[i])} tokens · ${escape(series.checkpoints[i])}<br>${formatError(value[i], error[i])}` + (isNumber(curve.n) ? ` · n = ${curve.n}` : "")), hovertemplate: "%{text}<extra></extra>" });
  }
  return traces;
}

function drawPanel(node, panel) {
  const metric = metricNow();
  node.ownAxis = state.x !== "tokens";
  const chances = [...new Set(panel.lines.map(({ curve }) => (!isNumber(curve.chance) ? null : state.scale === "normal" ? 0 : curve.chance)))].filter(isNumber);
  const shapes = chances.map((c) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: c, y1: c, line: { color: css("--soft"), width: 1.2, dash: "5px,4px" }, layer: "below" }));
  // Checkpoints that were left out when scoring, as short ticks at the bottom.
  const left = (data.statistics.find((s) => s.name === "not_scored") || { values: [[], [], []] }).values, drawn = new Set(panel.lines.map(({ curve }) => data.series[curve.series].name));
  if (state.x === "tokens") left[0].forEach((name, i) => { if (drawn.has(name) && isNumber(left[2][i])) shapes.push({ type: "line", xref: "x", x0: place(left[2][i]), x1: place(left[2][i]), yref: "paper", y0: 0, y1: 0.025, line: { color: css("--soft"), width: 1 } }); });
  const annotations = chances.map((c) => ({ xref: "paper", x: 0.997, xanchor: "right", yref: "y", y: c, yanchor: "top", showarrow: false, text: "chance", font: { size: 10.5 } }));
  const values = panel.lines.flatMap(({ curve }) => curve.value).filter(isNumber);
  const wideRange = metric.chance === "none" && Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) > 50;
  draw(node, panelTraces(panel), { margin: { l: 46, r: 12, t: 8, b: 32 }, shapes, annotations, hovermode: "closest", xaxis: scoreAxis(node),
    yaxis: { gridcolor: css("--grid"), zeroline: false, automargin: true, tickfont: { size: 11.5 }, nticks: 7, fixedrange: touch, ...(wideRange ? { type: "log", dtick: 1 } : {}) } },
    `${metric.label} over ${SCORE_AXES[state.x][0]}, ${panel.name} (${panel.note}): ${panel.lines.map((l) => l.label).slice(0, 12).join(", ")}${panel.lines.length > 12 ? " and others" : ""}`);
}

// What is drawn when it comes into view, or at once for print.
const waiting = new Map();
const watcher = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) drawWaiting(target);
}, { rootMargin: "300px" });
function drawWaiting(target) {
  const job = waiting.get(target);
  if (!job) return;
  waiting.delete(target);
  watcher.unobserve(target);
  job();
}
function whenSeen(node, job) {
  waiting.set(node, job);
  watcher.observe(node);
}
function clearPlots(box) {
  for (const plot of box.querySelectorAll(".plot")) { waiting.delete(plot); watcher.unobserve(plot); Plotly.purge(plot); }
  box.replaceChildren();
}

function drawLegend() {
  const box = document.getElementById("legend");
  box.replaceChildren();
  if (!many) return;
  const chip = (label, pressed, onclick, mark) => {
    const button = element("button", { type: "button", "aria-pressed": String(pressed), title: "show or hide in every figure", onclick: () => { onclick(); remember(); drawFiltered(); } });
    button.innerHTML = mark;
    button.append(label);
    return button;
  };
  data.series.forEach((s, i) => {
    const passes = roleShown(i) && (!state.size || sizeName(s.size) === state.size) && (!state.shots || s.shots === state.shots);
    if (passes) box.append(chip(s.name, !state.hidden.has(i), () => (state.hidden.has(i) ? state.hidden.delete(i) : state.hidden.add(i)), swatch(seriesColour(i), seriesDash(i))));
  });
  if (data.series.length > 4) box.prepend(chip("all", true, () => state.hidden.clear(), ""), chip("none", true, () => data.series.forEach((_, i) => state.hidden.add(i)), ""));
  box.style.maskImage = box.scrollHeight > box.clientHeight + 4 ? "linear-gradient(#000 70%, transparent)" : ""; // there is more below
}

// Which interval the bands are: that of the questions, or that between seeds.
function bands() {
  const kinds = new Set(data.series.filter((_, i) => seriesShown(i)).map((s) => s.role === "mean"));
  const names = [[false, "95 % from the standard error, which holds the choice of questions"], [true, "95 % between seeds (Student's t, the variance pooled over arms)"]];
  return names.filter(([mean]) => kinds.has(mean)).map(([, name]) => name).join("; of means ");
}

function drawPanels() {
  const box = document.getElementById("panels");
  clearPlots(box);
  const panels = panelList();
  for (const panel of panels) {
    const plot = element("div", { class: "plot" }), chips = element("div", { class: "chips" });
    const entries = many ? [] : panel.legend || panel.lines;
    for (const line of entries) {
      const id = panel.name + "\u0000" + line.label;
      const chip = element("button", { type: "button", "aria-pressed": String(!hiddenLines.has(id)), title: "show or hide", onclick: () => {
        hiddenLines.has(id) ? hiddenLines.delete(id) : hiddenLines.add(id);
        chip.setAttribute("aria-pressed", String(!hiddenLines.has(id)));
        drawPanel(plot, panel);
      } });
      chip.innerHTML = swatch(line.colour, line.dash || 0);
      chip.append(line.label);
      chips.append(chip);
    }
    const head = element("header", {}, element("h3", {}, panel.name), element("p", {}, panel.note), ...(entries.length ? [chips] : []));
    const card = element("article", { class: "card panel", ...(panel.wide ? { style: "grid-column: 1 / -1" } : {}) }, head, plot);
    if (panel.wide) plot.style.height = "420px";
    box.append(card);
    whenSeen(plot, () => drawPanel(plot, panel));
  }
  const metric = metricNow();
  document.getElementById("curves-note").innerHTML = panels.length
    ? `${title(escape(metric.label))}${metric.better < 0 ? " (lower is better)" : ""} against ${SCORE_AXES[state.x][0]}.${data.statistics.some((s) => s.name === "not_scored") ? " Ticks at the bottom: checkpoints that were left out when scoring." : ""} Bands: ${bands()}${metric.chance !== "none" ? "; dashed: chance" : ""}. Drag to zoom, double-click to reset.`
    : state.search || state.domain || state.size || state.shots || state.hidden.size ? "Nothing is left by search, filters and legend." : "This metric has no chance level, so there is no mean over tasks. Choose another view.";
}
