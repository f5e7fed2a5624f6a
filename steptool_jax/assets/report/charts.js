"use strict";
// Learning curves: one figure element a panel, drawn anew when figure, axis or width change.

const CHARTS = data("charts");
const DASHES = ["", "7 4", "2 4", "10 4 2 4"];
const MARKS = [
  (x, y) => draw("circle", { cx: x, cy: y, r: 3.6 }),
  (x, y) => draw("rect", { x: x - 3.2, y: y - 3.2, width: 6.4, height: 6.4 }),
  (x, y) => draw("path", { d: `M${x} ${y - 4.4}l4.4 7.6h-8.8z` }),
  (x, y) => draw("path", { d: `M${x} ${y - 4.8}l4.8 4.8l-4.8 4.8l-4.8 -4.8z` }),
];
const hidden = new Set(); // names of series that the legend has switched off
const colours = new Map(); // a method has one colour on all panels

for (const chart of CHARTS) {
  for (const axes of Object.values(chart.data)) {
    for (const series of Object.values(axes)) {
      for (const one of series) if (!colours.has(one.name)) colours.set(one.name, colours.size);
    }
  }
}

// [colour, dash and mark]: the ninth method has the first one's colour with other dashes and marks.
function look(name) {
  const n = colours.get(name);
  return [n % 8, (n + Math.floor(n / 8)) % 4];
}

function ticks(low, high, count) {
  const span = high - low || 1;
  const rough = span / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((s) => s >= rough);
  const out = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) out.push(t + 0 || 0);
  return out;
}

function isShare(figure) {
  if (figure.startsWith("reward")) return false;  // parts of a sum, which may be above 1
  return /rate|success|recover|answered|gave_up|truncated|share|padding|repeat/.test(figure);
}

function drawChart(chart, box) {
  const figure = byId("chart-figure").value;
  const axis = byId("chart-axis").value;
  const series = ((chart.data[figure] || {})[axis] || []).filter((s) => s.x.length);
  const shown = series.filter((s) => !hidden.has(s.name));
  const caption = make("figcaption", {}, chart.title);
  box.replaceChildren(caption);
  if (!series.length) {
    box.append(make("p", { class: "note" }, "No such figure in this panel."));
    return;
  }
  const W = Math.max(300, Math.min(box.clientWidth - 34, 900)), H = Math.round(Math.min(330, W * 0.62));
  const left = 52, right = 12, top = 10, bottom = 42;
  const share = isShare(figure);
  const factor = share ? 100 : 1;
  const values = shown.flatMap((s) => [...s.mean, ...s.low, ...s.high]).filter((v) => v !== null);
  const levels = figure === "pass_rate" ? chart.levels : [];
  values.push(...levels.map((l) => l.value));
  let low = share ? 0 : Math.min(...values, 0), high = Math.max(...values, low + 1e-9);
  if (share) high = Math.min(1, high * 1.12);
  else high += (high - low) * 0.08;
  const last = Math.max(...shown.flatMap((s) => s.x), 1e-9);
  const px = (x) => left + (x / last) * (W - left - right);
  const py = (y) => H - bottom - ((y - low) / (high - low)) * (H - top - bottom);
  const name = chart.figures[figure];
  const svg = draw("svg", {
    viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: 0, "aria-label": summarise(chart, name, axis, shown, factor),
  });
  for (const t of ticks(low * factor, high * factor, 5)) {
    const y = py(t / factor);
    svg.append(draw("line", { class: "grid", x1: left, x2: W - right, y1: y, y2: y }));
    svg.append(draw("text", { x: left - 7, y: y + 4, "text-anchor": "end" }, short(t) + (share ? " %" : "")));
  }
  for (const t of ticks(0, last, W < 420 ? 3 : 5)) {
    svg.append(draw("text", { x: px(t), y: H - bottom + 18, "text-anchor": "middle" }, t.toLocaleString("en")));
  }
  svg.append(draw("text", { x: (left + W - right) / 2, y: H - 6, "text-anchor": "middle" }, chart.axes[axis]));
  levels.forEach((level, k) => {
    const y = py(level.value);
    svg.append(draw("line", { class: "level", x1: left, x2: W - right, y1: y, y2: y }));
    // At either end, so that labels of one height do not meet.
    const end = k % 2 ? { x: left + 8, "text-anchor": "start" } : { x: W - right, "text-anchor": "end" };
    svg.append(draw("text", { ...end, y: y - 4 }, level.label));
  });
  for (const s of shown) {
    const [c, k] = look(s.name);
    const points = s.x.map((x, i) => [px(x), py(s.mean[i])]);
    if (s.low[0] !== null && s.x.length > 1) {
      const up = s.x.map((x, i) => `${px(x)},${py(s.high[i])}`);
      const down = s.x.map((x, i) => `${px(x)},${py(s.low[i])}`).reverse();
      svg.append(draw("polygon", { class: `area s${c}`, points: [...up, ...down].join(" ") }));
    }
    svg.append(draw("polyline", {
      class: `line s${c}${s.thin ? " thin" : ""}`, points: points.map((p) => p.join(",")).join(" "),
      "stroke-dasharray": s.thin ? "" : DASHES[k],
    }));
    if (!s.thin && points.length <= 40) {
      // Seeds are evaluated at nearly the same number of calls: one mark for each bunch of points.
      let next = 0;
      for (const [x, y] of points) {
        if (x < next) continue;
        next = x + 28;
        const mark = MARKS[k](x, y);
        mark.setAttribute("class", `s${c}`);
        svg.append(mark);
      }
    }
  }
  const cross = draw("line", { class: "cross", y1: top, y2: H - bottom, visibility: "hidden" });
  svg.append(cross);
  const readout = make("p", { class: "readout", "aria-live": "polite" }, "Point at the chart, or focus it and press ← →, for numbers.");
  const stops = [...new Set(shown.flatMap((s) => s.x))].sort((a, b) => a - b);
  let at = stops.length - 1;
  const tell = (k) => {
    at = Math.max(0, Math.min(stops.length - 1, k));
    const x = stops[at];
    cross.setAttribute("x1", px(x));
    cross.setAttribute("x2", px(x));
    cross.setAttribute("visibility", "visible");
    const parts = shown.map((s) => [s, s.x.indexOf(x)]).filter(([, i]) => i >= 0).map(([s, i]) => {
      const range = s.low[i] === null ? "" : ` (${short(s.low[i] * factor)} to ${short(s.high[i] * factor)})`;
      return `${s.name} ${short(s.mean[i] * factor)}${share ? " %" : ""}${range}`;
    });
    readout.textContent = `${short(x)}: ${parts.join(", ")}`;
  };
  svg.addEventListener("pointermove", (event) => {
    const spot = ((event.clientX - svg.getBoundingClientRect().left) / svg.clientWidth) * W;
    let best = 0;
    stops.forEach((x, k) => { if (Math.abs(px(x) - spot) < Math.abs(px(stops[best]) - spot)) best = k; });
    tell(best);
  });
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) { tell(at + move); event.preventDefault(); }
  });
  box.append(svg, legend(series), readout, numbers(shown, factor, share, chart.axes[axis]));
}

function legend(series) {
  const seeds = series.some((s) => s.runs > 1);
  const list = make("ul", { class: "legend" });
  for (const s of series) {
    const [c, k] = look(s.name);
    const line = draw("line", { class: `line s${c}${s.thin ? " thin" : ""}`, x1: 0, x2: 30, y1: 7, y2: 7, "stroke-dasharray": s.thin ? "" : DASHES[k] });
    const key = draw("svg", { width: 30, height: 14, "aria-hidden": "true" }, line);
    if (!s.thin) {
      const mark = MARKS[k](15, 7);
      mark.setAttribute("class", `s${c}`);
      key.append(mark);
    }
    const text = seeds ? `${s.name} (${s.runs} ${s.runs > 1 ? "seeds" : "seed"})` : s.name;
    list.append(make("li", {}, make("button", {
      type: "button", "aria-pressed": String(!hidden.has(s.name)),
      onclick: () => { if (!hidden.delete(s.name)) hidden.add(s.name); drawCharts(); },
    }, key, text)));
  }
  return list;
}

function numbers(shown, factor, share, axis) {
  const details = make("details", {}, make("summary", {}, "Numbers"));
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector("table")) return;
    const body = make("tbody");
    for (const s of shown) {
      s.x.forEach((x, i) => body.append(make("tr", {},
        make("th", { scope: "row" }, s.name), make("td", { class: "num" }, short(x)),
        make("td", { class: "num" }, short(s.mean[i] * factor)),
        make("td", { class: "num" }, s.low[i] === null ? "–" : `${short(s.low[i] * factor)} to ${short(s.high[i] * factor)}`))));
    }
    const head = make("tr", {}, ...["", axis, share ? "mean (%)" : "mean", "95 % interval"].map((t) => make("th", { scope: "col" }, t)));
    details.append(make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), body)));
  });
  return details;
}

function summarise(chart, name, axis, shown, factor) {
  const parts = shown.map((s) => `${s.name} from ${short(s.mean[0] * factor)} to ${short(s.mean[s.mean.length - 1] * factor)}`);
  return `${chart.title}: ${name} over ${chart.axes[axis]}. ${parts.join("; ")}.`;
}

const boxes = [];

function drawCharts() {
  CHARTS.forEach((chart, k) => drawChart(chart, boxes[k]));
}

function startCharts() {
  if (!CHARTS.length) {
    byId("curves-none").hidden = false;
    byId("chart-controls").hidden = true;
    return;
  }
  const figures = new Map(), axes = new Map();
  for (const chart of CHARTS) {
    for (const [name, text] of Object.entries(chart.figures)) figures.set(name, text);
    for (const byAxis of Object.values(chart.data)) {
      for (const axis of Object.keys(byAxis)) axes.set(axis, chart.axes[axis]);
    }
  }
  for (const [id, entries] of [["chart-figure", figures], ["chart-axis", axes]]) {
    for (const [value, text] of entries) byId(id).append(make("option", { value }, text));
    byId(id).addEventListener("change", drawCharts);
  }
  for (const chart of CHARTS) {
    const box = make("figure", { class: "chart" });
    byId("charts").append(box);
    boxes.push(box);
  }
  drawCharts();
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) { width = window.innerWidth; drawCharts(); }
  });
}

startCharts();
