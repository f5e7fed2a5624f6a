"use strict";
// One trajectory in full, or two side by side: steps, tokens in colour, the search tree.

let focus = -1; // number of the step that n and p have gone to

function drawDetail(changed) {
  const detail = byId("detail");
  if (current < 0) return;
  focus = -1;
  const row = INDEX.rows[current];
  detail.replaceChildren(make("h3", {}, INDEX.queries[row[QUERY]] || row[TASK]));
  if (other >= 0) {
    const columns = make("div", { class: "pair" }, column(other, changed), column(current, changed));
    detail.append(make("button", { type: "button", onclick: compare }, "Back to one"), scale(), columns);
  } else {
    const pair = pairOf(current);
    if (pair) detail.append(make("button", { type: "button", onclick: compare }, "Compare before and after (c)"));
    detail.append(scale(), column(current, -1));
  }
  detail.scrollTop = 0;
  const mark = detail.querySelector(".step.changed");
  if (mark) detail.scrollTop = mark.offsetTop - detail.offsetTop - 60;
}

function column(number, changed) {
  const row = INDEX.rows[number], full = trajectory(number);
  const solved = row[SOLVED] >= 1 ? ["good", "solved"] : row[SOLVED] > 0 ? ["", `solved ${row[SOLVED]}`] : ["bad", "not solved"];
  const box = make("div", { class: "column" }, make("div", { class: "tags" },
    make("strong", {}, INDEX.moments[row[MOMENT]]), tag(solved[1], solved[0]), tag(row[STATUS].replaceAll("_", " ")),
    tag(`task ${row[TASK]}`), tag(`sample ${row[SAMPLE]}`), tag(`prompt ${full.prompt} tokens`)));
  if (full.search) box.append(tree(full.search));
  full.steps.forEach((step, k) => box.append(drawStep(step, k, k === changed)));
  if (!full.steps.length) box.append(make("p", { class: "note" }, "No step: the prompt alone did not fit."));
  return box;
}

function tag(text, kind = "") {
  return make("span", { class: `tag ${kind}` }, text);
}

function drawStep(step, k, changed) {
  const [sc, con, reward] = step.marks;
  const box = make("section", { class: `step${changed ? " changed" : ""}`, tabindex: -1, "aria-label": `Step ${k + 1}` });
  box.append(make("h4", {}, `${k + 1}. ${title(step)}`, changed ? make("small", { class: "bad" }, "  first change") : null));
  const advantages = step.advantages ? step.advantages.reduce((a, b) => a + b, 0) / step.advantages.length : null;
  box.append(make("div", { class: "tags" }, tag(`SC ${short(sc)}`), tag(`Con ${short(con)}`), tag(`reward ${short(reward)}`),
    step.own ? tag(`history changed: ${step.own} tokens in front`) : null,
    advantages === null ? null : tag(`advantage ${advantages > 0 ? "+" : ""}${short(advantages)}`)));
  if (step.thought) box.append(make("p", { class: "thought" }, step.thought));
  if (step.arguments) box.append(make("pre", {}, pretty(step.arguments)));
  if (step.finish) box.append(make("pre", {}, step.finish));
  if (step.malformed !== undefined) box.append(make("pre", {}, step.malformed));
  box.append(tokens(step));
  if (step.seen) box.append(...seen(step.seen));
  return box;
}

function title(step) {
  if (step.call !== undefined) return `calls ${step.call}`;
  if (step.malformed !== undefined) return "malformed";
  return step.gave_up ? "gives up" : "answers";
}

function pretty(json) {
  try {
    const text = JSON.stringify(JSON.parse(json), null, 1);
    return text.length < 90 ? text.replace(/\s*\n\s*/g, " ") : text;
  } catch {
    return json;
  }
}

function seen(observation) {
  const good = observation.code === "ok";
  const tags = make("div", { class: "tags" }, make("span", {}, "observes"), tag(observation.code.replaceAll("_", " "), good ? "good" : "bad"));
  if (observation.injected) tags.append(tag("injected", "bad"));
  if (observation.changed) tags.append(tag("changed the state"));
  if (observation.cost) tags.append(tag(`USD ${short(observation.cost)}`));
  if (observation.latency) tags.append(tag(`${short(observation.latency)} s`));
  return [tags, make("pre", {}, observation.text)];
}

// --- tokens ---

const SCALES = {
  advantage: ["advantage", -2, 2], reward: ["reward of the step", 0, 1], sc: ["SuccCalling of the step", 0, 1],
  con: ["Contribution of the step", 0, 1], logprob: ["log-prob of the token", -3, 0],
};

function colourOf(value, low, high) {
  if (value === null || value === undefined) return "";
  if (low < 0 && high > 0) {
    const strength = Math.min(1, Math.abs(value) / high) * 0.62;
    return `rgba(var(--${value < 0 ? "minus" : "plus"}), ${strength.toFixed(3)})`;
  }
  const share = Math.max(0, Math.min(1, (value - low) / (high - low)));
  // A low log-prob is what stands out; of the others a high value is.
  return low < 0 ? `rgba(var(--minus), ${((1 - share) * 0.62).toFixed(3)})` : `rgba(var(--plus), ${(share * 0.62).toFixed(3)})`;
}

function valueOf(step, k) {
  const kind = byId("f-colour").value;
  if (kind === "advantage") return step.advantages ? step.advantages[k] : null;
  if (kind === "logprob") return step.logprobs ? step.logprobs[k] : null;
  return { sc: step.marks[0], con: step.marks[1], reward: step.marks[2] }[kind];
}

function tokens(step) {
  const words = step.words ? step.words.map((w) => INDEX.pieces[w]) : [title(step)];
  const box = make("div", { class: "words", role: "group", "aria-label": "Sampled tokens" });
  const [name, low, high] = SCALES[byId("f-colour").value] || ["", 0, 1];
  words.forEach((word, k) => {
    const value = valueOf(step, k);
    const known = value !== null && value !== undefined;
    const span = make("span", { title: known ? `${name} ${short(value)}` : null, class: k === words.length - 1 ? "end" : null }, word);
    if (known) span.style.backgroundColor = colourOf(value, low, high);
    box.append(span);
  });
  return box;
}

function scale() {
  const kind = byId("f-colour").value;
  if (!SCALES[kind]) return null;
  const [name, low, high] = SCALES[kind];
  const box = make("div", { class: "words", "aria-hidden": "true" });
  for (let k = 0; k <= 8; k++) {
    const span = make("span", {}, "  ");
    span.style.backgroundColor = colourOf(low + (k / 8) * (high - low), low, high);
    box.append(span);
  }
  const none = kind === "advantage" && !trajectory(current).steps.some((s) => s.advantages);
  return make("div", { class: "scale" }, `${name}: ${short(low)}`, box, short(high),
    none ? " (known for training trajectories only)" : "");
}

// --- steps by key ---

function stepBy(by) {
  const steps = [...byId("detail").querySelectorAll(".step")];
  if (!steps.length) return;
  focus = Math.max(0, Math.min(steps.length - 1, focus + by));
  steps.forEach((step, k) => step.classList.toggle("now", k === focus));
  steps[focus].focus({ preventScroll: true });
  steps[focus].scrollIntoView({ block: "nearest" });
}

// --- search trees ---

function tree(search) {
  const nodes = search.nodes, rows = nodes.length, height = rows * 30 + 20;
  const depth = nodes.map(() => 0);
  nodes.forEach((node, k) => { depth[k] = node.parent >= 0 ? depth[node.parent] + 1 : 0; });
  const chosen = new Set();
  for (let k = search.leaf; k >= 0 && k !== null; k = nodes[k].parent) chosen.add(k);
  const x = (k) => 18 + depth[k] * 34, y = (k) => 24 + k * 30;
  const width = 60 + Math.max(...depth, 0) * 34 + 420;
  const svg = draw("svg", { width, height, role: "tree", "aria-label": `Search tree of ${rows} calls` });
  nodes.forEach((node, k) => {
    if (node.parent < 0) return;
    svg.append(draw("path", {
      class: chosen.has(k) ? "chosen" : "", d: `M${x(node.parent)} ${y(node.parent)}V${y(k)}H${x(k)}`,
    }));
  });
  const panel = make("div", { class: "step", hidden: "" });
  nodes.forEach((node, k) => {
    const failed = node.seen && node.seen.code !== "ok";
    const label = title(node) + (node.status ? ` (${node.status.replaceAll("_", " ")})` : "") + (failed ? ` – ${node.seen.code}` : "");
    const pick = () => {
      for (const each of svg.querySelectorAll(".node")) each.setAttribute("aria-selected", String(each === group));
      panel.hidden = false;
      panel.replaceChildren(make("h4", {}, `call ${k + 1}: ${label}`), node.thought ? make("p", { class: "thought" }, node.thought) : "",
        make("pre", {}, node.arguments || node.finish || node.malformed || ""), ...(node.seen ? seen(node.seen) : []));
    };
    const group = draw("g", {
      class: `node${chosen.has(k) ? " chosen" : ""}${failed ? " error" : ""}`, role: "treeitem", tabindex: 0, "aria-level": depth[k] + 1,
      "aria-label": label, "aria-selected": "false", onclick: pick,
      onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pick(); } },
    }, draw("circle", { cx: x(k), cy: y(k), r: 7 }), draw("text", { x: x(k) + 14, y: y(k) + 5 }, `${k + 1}. ${label}`.slice(0, 70)));
    svg.append(group);
  });
  return make("div", {}, make("div", { class: "tree" }, svg), panel);
}

startViewer();
