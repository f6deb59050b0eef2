// As much of a browser as the report's scripts ask for: nodes that remember, and a Plotly that keeps what it is to draw.
const nodes = {}, drawn = {}, seen = [], panels = [];
function node(tag, id) {
  return {
    tag, id, innerHTML: "", textContent: "", hidden: true, dataset: {}, style: {}, children: [], clientWidth: 900, attributes: {},
    append(...more) { this.children.push(...more); },
    prepend(...more) { this.children.unshift(...more); },
    replaceChildren(...more) { this.children = more; },
    setAttribute(key, value) { this.attributes[key] = value; if (key === "id") this.id = value; },
    addEventListener(key, f) { this[key] = f; },
    querySelectorAll: () => [],
    on() {},
  };
}
globalThis.document = {
  documentElement: { classList: { toggle() {} } },
  createElement: (tag) => node(tag),
  getElementById: (id) => (nodes[id] ??= node("div", id)),
};
globalThis.window = {
  matchMedia: () => ({ matches: false, addEventListener() {} }),
  innerWidth: 1200,
  addEventListener(key, f) { this[key] = f; },
};
globalThis.location = { hash: process.argv[3] ?? "" };
globalThis.history = { replaceState(_, __, address) { location.hash = address; } };
globalThis.setTimeout = (f) => f();
globalThis.clearTimeout = () => {};
globalThis.getComputedStyle = () => ({ getPropertyValue: () => "#123456" });
globalThis.IntersectionObserver = class {
  constructor(f) { this.f = f; }
  observe(target) { seen.push(() => this.f([{ isIntersecting: true, target }])); }
  unobserve() {}
  disconnect() {}
};
globalThis.Plotly = {
  react(target, traces, layout) {
    if (target.id) drawn[target.id] = { traces, layout };
    else panels.push({ traces, layout });
  },
  relayout() {},
  purge() {},
};
// What comes into view is drawn; the panels drawn since the last look.
function look() {
  while (seen.length) seen.shift()();
  return panels.splice(0);
}
const texts = (n) => (typeof n === "string" ? n : n.children.map(texts).join(""));
document.getElementById("data").textContent = require("fs").readFileSync(process.argv[2], "utf8");
