"use strict";
// Draws the figures of the page from its data. Texts become text nodes, never markup.
(() => {
  const data = JSON.parse(document.getElementById("trace-data").textContent);
  const namespace = document.getElementById("svg").namespaceURI;
  const WIDTH = 520, PAD = 46;

  function element(name, attributes = {}, ...children) {
    return filled(document.createElement(name), attributes, children);
  }
  function shape(name, attributes = {}, ...children) {
    return filled(document.createElementNS(namespace, name), attributes, children);
  }
  function filled(node, attributes, children) {
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined) node.setAttribute(key, value);
    }
    node.append(...children.map((child) => (child instanceof Node ? child : document.createTextNode(String(child)))));
    return node;
  }
  const canvas = (height, label, ...children) =>
    shape("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label }, ...children);
  const text = (x, y, content, attributes = {}) => shape("text", { x, y, "text-anchor": "middle", ...attributes }, content);
  const line = (x1, y1, x2, y2, attributes = {}) => shape("line", { x1, y1, x2, y2, ...attributes });
  const polyline = (points, attributes) => shape("polyline", { points: points.map((p) => p.join(",")).join(" "), ...attributes });
  const titled = (node, title) => (node.append(shape("title", {}, title)), node);
  const short = (value) => (value === null ? "–" : String(Number(value.toPrecision(3))));
  const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
  const range = (length) => Array.from({ length }, (_, place) => place);
  const shown = (token) => (token === "" ? "∅" : token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥"));

  function scale(low, high, from, to) {
    const span = high - low || 1;
    return (value) => from + ((value - low) / span) * (to - from);
  }
  // numbers of all would overlap where there are many
  const numbered = (latents) => latents.filter((latent) => latent % Math.ceil(latents.length / 13) === 0);

  function ticks(low, high, wanted = 5) {
    const rough = (high - low || 1) / wanted, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
    return range(wanted + 2).map((place) => (Math.ceil(low / step) + place) * step).filter((value) => value <= high + step * 1e-9);
  }
  function mark(kind, x, y, size, classes) {
    if (kind === "cross") {
      const d = size * 0.9;
      return shape("path", { d: `M${x - d} ${y - d}L${x + d} ${y + d}M${x - d} ${y + d}L${x + d} ${y - d}`, class: `cross ${classes}` });
    }
    if (kind === "diamond") {
      const d = size * 1.5;
      return shape("path", { d: `M${x} ${y - d}L${x + d} ${y}L${x} ${y + d}L${x - d} ${y}Z`, class: `diamond ${classes}` });
    }
    return shape("circle", { cx: x, cy: y, r: size, class: `${kind} ${classes}` });
  }
  function legend(list, entries) {
    list.replaceChildren(...entries.map(([drawn, label]) =>
      element("li", {}, shape("svg", { viewBox: "0 0 22 14", "aria-hidden": "true" }, ...drawn), label)));
  }

  class Question {
    constructor(section, content) {
      this.section = section;
      this.content = content;
      this.anchor = content.samplers.length - 1;
      this.sampler = 0;
      this.rollout = content.selected;
      this.step = null;
      this.method = content.maps.length ? content.maps[0].method : null;
      this.methods = [...new Set(content.maps.map((map) => map.method))];
      this.showsBeside = true;
      this.latents = Math.max(...content.samplers.flatMap((each) => each.steps));
      for (const vote of section.querySelectorAll(".vote")) vote.style.flex = `${vote.dataset.share} 1 0`;
      for (const cell of section.querySelectorAll(".share")) cell.style.setProperty("--p", cell.dataset.value);
      for (const row of section.querySelectorAll(".rollouts tbody tr")) {
        row.addEventListener("click", () => this.select(Number(row.dataset.sampler), Number(row.dataset.rollout)));
      }
      for (const button of section.querySelectorAll(".bar button")) {
        button.addEventListener("click", () => this.move(Number(button.dataset.move)));
      }
      this.drawControls();
      this.drawSpread();
      if (content.graph) this.drawGraph();
      this.draw();
    }
    figure(name) { return this.section.querySelector(`[data-figure="${name}"]`); }
    legend(name) { return this.section.querySelector(`[data-legend="${name}"]`); }
    get chosen() { return this.content.samplers[this.sampler]; }
    kind(sampler, rollout) { return this.content.samplers[sampler].kinds[rollout]; }
    label(sampler, rollout) {
      const { name, predictions, correct, scores } = this.content.samplers[sampler];
      const which = sampler === this.anchor ? "deterministic rollout" : `${name}, rollout ${rollout}`;
      const score = scores && scores[rollout] !== null ? `, score ${short(scores[rollout])}` : "";
      const verdict = correct ? (correct[rollout] ? ", right" : ", wrong") : "";
      return `${which}: ${predictions[rollout] ?? "unreadable"}${verdict}${score}`;
    }
    select(sampler, rollout) {
      this.sampler = sampler;
      this.rollout = rollout;
      this.draw();
    }
    move(by) {
      const rows = [...this.section.querySelectorAll(".rollouts tbody tr")];
      const at = rows.findIndex((row) => row.classList.contains("current"));
      const next = rows[(at + by + rows.length) % rows.length];
      this.select(Number(next.dataset.sampler), Number(next.dataset.rollout));
    }
    moveStep(by) {
      const at = this.step === null ? 0 : this.step + 1, all = this.latents + 1;
      const next = (at + by + all) % all;
      this.step = next ? next - 1 : null;
      this.draw();
    }
    nextMethod() {
      this.method = this.methods[(this.methods.indexOf(this.method) + 1) % this.methods.length];
      this.draw();
    }
    draw() {
      for (const row of this.section.querySelectorAll(".rollouts tbody tr")) {
        const current = Number(row.dataset.sampler) === this.sampler && Number(row.dataset.rollout) === this.rollout;
        row.classList.toggle("current", current);
        row.querySelector("button").setAttribute("aria-pressed", current);
      }
      this.section.querySelector(".status").textContent = this.label(this.sampler, this.rollout);
      for (const place of this.section.querySelectorAll("[data-chosen]")) {
        place.textContent = this.sampler === this.anchor ? "deterministic rollout" : `rollout ${this.rollout}`;
      }
      for (const button of this.section.querySelectorAll(".controls button")) {
        const { step, method, beside } = button.dataset;
        const pressed = step !== undefined ? step === String(this.step ?? "all") : method !== undefined ? method === this.method : this.showsBeside;
        button.setAttribute("aria-pressed", beside !== undefined ? this.showsBeside : pressed);
      }
      if (this.method) this.drawMap();
      this.drawLens();
      if (this.figure("scores")) this.drawScores();
      this.drawTimeline();
    }

    drawControls() {
      const button = (label, attributes, action) => {
        const made = element("button", { type: "button", ...attributes }, label);
        made.addEventListener("click", () => { action(); this.draw(); });
        return made;
      };
      const groups = [element("div", { class: "group", role: "group", "aria-label": "latent on the map" },
        button("all", { "data-step": "all" }, () => { this.step = null; }),
        ...range(this.latents).map((step) => button(step + 1, { "data-step": step, "aria-label": `latent ${step + 1}` }, () => { this.step = step; })))];
      if (this.methods.length > 1) {
        groups.push(element("div", { class: "group", role: "group", "aria-label": "method" },
          ...this.methods.map((method) => button(method === "pca" ? "PCA" : "t-SNE", { "data-method": method }, () => { this.method = method; }))));
      }
      if (this.anchor > 1) {
        groups.push(element("div", { class: "group" },
          button(this.content.samplers[1].name, { "data-beside": "" }, () => { this.showsBeside = !this.showsBeside; })));
      }
      this.section.querySelector(".controls").replaceChildren(...(this.method ? groups : []));
    }

    drawMap() {
      const map = this.content.maps.find((each) => each.method === this.method && each.step === this.step);
      if (!map) return this.figure("map").replaceChildren(element("p", { class: "none" }, "No latents."));
      const height = 380, flat = map.points.flat(2).filter((point) => point[0] !== null);
      const [xs, ys] = [0, 1].map((axis) => flat.map((point) => point[axis]));
      const [lowX, highX, lowY, highY] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
      const unit = Math.min((WIDTH - 2 * PAD) / (highX - lowX || 1), (height - 2 * PAD) / (highY - lowY || 1));
      const at = (point) => [WIDTH / 2 + (point[0] - (lowX + highX) / 2) * unit, height / 2 - (point[1] - (lowY + highY) / 2) * unit];
      const there = (path) => path.map((point, step) => [point, step]).filter(([point]) => point[0] !== null);
      const layers = [], hits = [], many = map.step === null;
      const places = range(map.points.length - 1).filter((place) => place === 0 || this.showsBeside).reverse();
      for (const place of places) {
        const beside = place > 0;
        map.points[place].forEach((path, rollout) => {
          const kind = this.kind(place, rollout), points = there(path).map(([point]) => at(point));
          if (many && !beside && points.length > 1) layers.push(polyline(points, { class: `path faint ${kind}` }));
          for (const [x, y] of points) {
            if (beside) layers.push(mark("ring", x, y, many ? 2.6 : 4, "beside half"));
            else layers.push(mark(kind === "wrong" || kind === "other" ? "cross" : "dot", x, y, many ? 3.2 : 4.6, kind));
            const hit = titled(shape("circle", { cx: x, cy: y, r: 9, class: "hit" }), this.label(place, rollout));
            if (!beside) hit.addEventListener("click", () => this.select(place, rollout));
            hits.push(hit);
          }
        });
        if (!many) layers.push(...this.ellipse(map.points[place].map((path) => path[0]).filter((point) => point[0] !== null).map(at), beside ? "beside" : "main", map.points[this.anchor][0][0], at));
      }
      const path = there(map.points[this.anchor][0]);
      if (many) layers.push(polyline(path.map(([point]) => at(point)), { class: "path anchor half" }));
      for (const [point, step] of path) {
        const [x, y] = at(point);
        layers.push(titled(mark("diamond", x, y, 5, "anchor"), this.label(this.anchor, 0)));
        layers.push(text(x, y + 3.8, (map.step ?? step) + 1, { class: "strong" }));
        const hit = titled(shape("circle", { cx: x, cy: y, r: 9, class: "hit" }), this.label(this.anchor, 0));
        hit.addEventListener("click", () => this.select(this.anchor, 0));
        hits.push(hit);
      }
      const chosen = there(map.points[this.sampler][this.rollout]).map(([point]) => at(point));
      if (many && chosen.length > 1) layers.push(polyline(chosen, { class: "halo half" }));
      for (const [x, y] of chosen) layers.push(shape("circle", { cx: x, cy: y, r: 8, class: "halo" }));
      const axis = (place) => (map.explained ? `PC ${place + 1} (${Math.round(100 * map.explained[place])} %)` : `t-SNE ${place + 1}`);
      const what = many ? "all latents" : `latent ${map.step + 1}`;
      this.figure("map").replaceChildren(canvas(height, `map of ${what}`,
        shape("rect", { x: 0.5, y: 0.5, width: WIDTH - 1, height: height - 1, rx: 8, class: "frame" }),
        text(WIDTH - 10, height - 10, axis(0), { "text-anchor": "end" }),
        text(14, 18, axis(1), { "text-anchor": "start" }), ...layers, ...hits));
      const gold = this.content.gold !== null;
      const entries = [
        [[mark("diamond", 11, 7, 4, "anchor")], "deterministic"],
        [[mark("dot", 11, 7, 4, gold ? "right" : "voted")], `${this.content.samplers[0].name}, ${gold ? "right" : "most frequent answer"}`],
        [[mark("cross", 11, 7, 4, gold ? "wrong" : "other")], gold ? "wrong" : "another answer"],
      ];
      if (this.anchor > 1 && this.showsBeside) entries.push([[mark("ring", 11, 7, 4, "beside")], this.content.samplers[1].name]);
      if (!many) entries.push([[shape("ellipse", { cx: 11, cy: 7, rx: 9, ry: 5, class: "ellipse main" })], "spread (1 sd) and mean of rollouts in this plane"]);
      entries.push([[shape("circle", { cx: 11, cy: 7, r: 5, class: "halo" })], "selected"]);
      legend(this.legend("map"), entries);
    }
    ellipse(points, kind, anchor, at) {
      if (points.length < 3) return [];
      const [mx, my] = [0, 1].map((axis) => points.reduce((sum, point) => sum + point[axis], 0) / points.length);
      let [xx, xy, yy] = [0, 0, 0];
      for (const [x, y] of points) { xx += (x - mx) ** 2; xy += (x - mx) * (y - my); yy += (y - my) ** 2; }
      [xx, xy, yy] = [xx, xy, yy].map((sum) => sum / (points.length - 1));
      const middle = (xx + yy) / 2, half = Math.hypot((xx - yy) / 2, xy), angle = (Math.atan2(2 * xy, xx - yy) / 2) * (180 / Math.PI);
      const drawn = [shape("ellipse", {
        cx: mx, cy: my, rx: Math.sqrt(middle + half), ry: Math.sqrt(Math.max(middle - half, 0)), transform: `rotate(${angle} ${mx} ${my})`, class: `ellipse ${kind}`,
      })];
      if (anchor && anchor[0] !== null) {
        const [ax, ay] = at(anchor), length = Math.hypot(mx - ax, my - ay);
        if (length > 4) {
          const [ux, uy] = [(mx - ax) / length, (my - ay) / length], tip = 7;
          const back = (side) => `${mx - tip * ux + side * tip * 0.6 * uy} ${my - tip * uy - side * tip * 0.6 * ux}`;
          drawn.push(shape("path", { d: `M${ax} ${ay}L${mx} ${my}M${back(1)}L${mx} ${my}L${back(-1)}`, class: `arrow ${kind}` }));
        }
      }
      return drawn;
    }

    drawLens() {
      const { tokens, probabilities, ranks, steps } = this.chosen, results = this.content.results;
      const rows = range(steps[this.rollout]).map((latent) => {
        const said = results.filter((_, place) => ranks[this.rollout][latent][place] === 0);
        const cells = tokens[this.rollout][latent].map((token, place) => {
          const probability = probabilities[this.rollout][latent][place];
          const cell = element("td", { class: place === 0 && said.length ? "token result" : "token" },
            shown(data.vocabulary[token]), element("small", {}, probability < 0.005 ? "<1" : Math.round(100 * probability)));
          cell.style.setProperty("--p", probability);
          return cell;
        });
        const says = said.map(([step]) => `step ${step + 1}`).join(", ");
        return element("tr", {}, element("th", { scope: "row" }, latent + 1), ...(results.length ? [element("td", { class: "says" }, says)] : []), ...cells);
      });
      const most = Math.max(1, ...tokens[this.rollout].map((row) => row.length));
      const head = element("tr", {}, element("th", { scope: "col" }, "latent"), ...(results.length ? [element("th", { scope: "col" }, "result of")] : []),
        element("th", { scope: "col", colspan: most, class: "tokens" }, "most probable tokens, %"));
      this.figure("lens").replaceChildren(rows.length
        ? element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows))
        : element("p", { class: "none" }, "This rollout has no latents."));
    }

    chart(height, values, label, low = null) {
      const found = values.flat().filter((value) => value !== null);
      const [bottom, top] = [low ?? Math.min(...found), Math.max(...found, low ?? -Infinity)];
      const x = scale(1, Math.max(this.latents, 2), PAD + 10, WIDTH - 16), y = scale(bottom, top, height - 26, 12);
      const parts = [];
      for (const value of ticks(bottom, top)) {
        parts.push(line(PAD, y(value), WIDTH - 6, y(value), { class: "axis" }));
        parts.push(text(PAD - 6, y(value) + 4, short(value), { "text-anchor": "end" }));
      }
      for (const step of numbered(range(this.latents))) parts.push(text(x(step + 1), height - 8, step + 1));
      const drawing = canvas(height, label, ...parts);
      return { drawing, point: (step, value) => [x(step + 1), y(value)] };
    }
    curve(chart, values, classes) {
      const points = values.map((value, step) => [value, step]).filter(([value]) => value !== null).map(([value, step]) => chart.point(step, value));
      return points.length === 1 ? mark("dot", ...points[0], 3, classes) : polyline(points, { class: `path ${classes}` });
    }
    drawScores() {
      const own = this.content.samplers[0], last = this.content.samplers[this.anchor];
      const chart = this.chart(220, [...own.stepScores, ...(last.stepScores ?? [])].map((each) => each), "score at each step");
      own.stepScores.forEach((values, rollout) => {
        const curve = titled(this.curve(chart, values, `${this.kind(0, rollout)} half`), this.label(0, rollout));
        const hit = titled(this.curve(chart, values, "hit"), this.label(0, rollout));
        hit.setAttribute("class", "hit");
        hit.setAttribute("fill", "none");
        hit.addEventListener("click", () => this.select(0, rollout));
        chart.drawing.append(curve, hit);
      });
      if (last.stepScores) {
        const dashed = this.curve(chart, last.stepScores[0], "anchor");
        dashed.setAttribute("stroke-dasharray", "5 4");
        chart.drawing.append(titled(dashed, this.label(this.anchor, 0)));
      }
      const values = this.chosen.stepScores?.[this.rollout];
      if (values) {
        const halo = this.curve(chart, values, "");
        halo.setAttribute("class", "halo");
        chart.drawing.append(halo);
      }
      this.figure("scores").replaceChildren(chart.drawing);
      const gold = this.content.gold !== null, bar = (attributes) => [line(0, 7, 22, 7, attributes)];
      legend(this.legend("scores"), [
        [bar({ class: `path ${gold ? "right" : "voted"}` }), gold ? "right" : "most frequent answer"],
        [bar({ class: `path ${gold ? "wrong" : "other"}` }), gold ? "wrong" : "another answer"],
        ...(last.stepScores ? [[bar({ class: "path anchor", "stroke-dasharray": "5 4" }), "deterministic"]] : []),
        [bar({ class: "halo" }), "selected"],
      ]);
    }

    drawSpread() {
      const pairs = this.content.spread.slice(0, this.anchor);
      if (!pairs.flat(2).some((value) => value !== null)) {
        return this.figure("spread").replaceChildren(element("p", { class: "none" }, "Nothing is random, so nothing spreads."));
      }
      const chart = this.chart(220, pairs.flat(), "drift and spread of latents", 0), entries = [];
      pairs.forEach(([drift, spread], place) => {
        const kind = place ? "beside" : "main", name = this.content.samplers[place].name;
        const solid = this.curve(chart, spread, kind), dashed = this.curve(chart, drift, kind);
        dashed.setAttribute("stroke-dasharray", "5 4");
        for (const [values, what] of [[spread, "spread"], [drift, "drift"]]) {
          values.forEach((value, step) => {
            if (value !== null) chart.drawing.append(titled(mark("dot", ...chart.point(step, value), 3, kind), `${name}, latent ${step + 1}: ${what} ${short(value)}`));
          });
        }
        chart.drawing.append(solid, dashed);
        entries.push([[line(0, 7, 22, 7, { class: `arrow ${kind}` })], `${name}: spread`]);
        entries.push([[line(0, 7, 22, 7, { class: `arrow ${kind}`, "stroke-dasharray": "5 4" })], `${name}: drift`]);
      });
      this.figure("spread").replaceChildren(chart.drawing);
      legend(this.legend("spread"), entries);
    }

    drawTimeline() {
      const { counts, sweeps: { first, stop, final } } = this.chosen;
      const sweeps = range(first[this.rollout].length).filter((sweep) => stop[this.rollout][sweep] > first[this.rollout][sweep]);
      const latents = range(Math.max(this.latents, ...sweeps.map((sweep) => stop[this.rollout][sweep])));
      const size = Math.min(64, (WIDTH - 76) / Math.max(latents.length, 1)), row = 26;
      const height = 34 + sweeps.length * row, parts = [text(2, 16, "sweep", { "text-anchor": "start" })];
      for (const latent of numbered(latents)) parts.push(text(66 + (latent + 0.5) * size, 16, latent + 1));
      sweeps.forEach((sweep, place) => {
        const y = 24 + place * row, before = place ? final[this.rollout][sweeps[place - 1]] : 0;
        parts.push(text(44, y + row / 2 + 5, place + 1, { "text-anchor": "end" }));
        for (const latent of latents) {
          const made = latent >= first[this.rollout][sweep] && latent < stop[this.rollout][sweep];
          const kind = latent < before ? "kept" : !made ? "free" : latent < final[this.rollout][sweep] ? "commit" : "conflict";
          const x = 66 + latent * size;
          const what = { kept: "final before", free: "not computed", commit: "computed, final", conflict: "computed, not final" }[kind];
          parts.push(titled(shape("rect", { x: x + 1, y: y + 1, width: size - 2, height: row - 2, rx: 3, class: kind }), `sweep ${place + 1}, latent ${latent + 1}: ${what}`));
          if (kind === "commit" || kind === "conflict") parts.push(text(x + size / 2, y + row / 2 + 5, kind === "commit" ? "✓" : "↻", { class: "sign" }));
        }
      });
      const told = Object.entries(counts).map(([name, values]) => `${values[this.rollout]} ${name}`).join(", ");
      this.figure("timeline").replaceChildren(canvas(Math.max(height, 60), "sweeps of the schedule", ...parts), element("p", { class: "note" }, told));
      const box = (kind) => [shape("rect", { x: 3, y: 1, width: 14, height: 12, rx: 3, class: kind })];
      legend(this.legend("timeline"), [[box("commit"), "final after this sweep"], [box("conflict"), "computed from a guess, not final"], [box("kept"), "final before"], [box("free"), "not computed"]]);
    }

    drawGraph() {
      const { relative, threshold, path } = this.content.graph, total = relative.length;
      const x = scale(0, Math.max(total - 1, 1), 40, WIDTH - 40), arcs = [];
      const onPath = new Set(path.slice(1).map((latent, place) => `${path[place]}-${latent}`));
      const highest = Math.max(threshold, ...relative.flat().filter((value) => value !== null));
      let top = 0;
      for (const later of range(total)) {
        for (const earlier of range(later)) top = relative[later][earlier] >= threshold * 0.2 ? Math.max(top, later - earlier) : top;
      }
      const unit = (x(1) - x(0)) / 2, rise = Math.min(1, 150 / Math.max(top * unit, 1)), base = 26 + top * unit * rise;
      for (const later of range(total)) {
        for (const earlier of range(later)) {
          const value = relative[later][earlier];
          if (value === null || value < threshold * 0.2) continue;
          const radius = (x(later) - x(earlier)) / 2;
          const kind = onPath.has(`${earlier}-${later}`) ? "critical" : value < threshold ? "weak" : "";
          arcs.push([kind === "critical", titled(shape("path", {
            d: `M${x(earlier)} ${base}A${radius} ${radius * rise} 0 0 1 ${x(later)} ${base}`, class: `arc ${kind}`, "stroke-width": 1 + 5 * Math.max(0, value / highest),
          }), `latent ${later + 1} on latent ${earlier + 1}: ${short(value)}`)]);
        }
      }
      arcs.sort((one, other) => one[0] - other[0]);
      const nodes = range(total).flatMap((latent) => [
        shape("circle", { cx: x(latent), cy: base, r: Math.min(12, unit), class: path.includes(latent) ? "node critical" : "node" }),
        text(x(latent), base + 4, latent + 1, { class: "strong" })]);
      this.figure("graph").replaceChildren(canvas(base + 24, "dependencies between latents", ...arcs.map(([, arc]) => arc), ...nodes));
    }
  }

  const questions = data.questions.map((content, place) => new Question(document.getElementById(`question-${place}`), content));
  let active = 0;
  function activate(place) {
    active = place;
    questions.forEach((question, each) => question.section.classList.toggle("active", each === place));
  }
  questions.forEach((question, place) => {
    for (const event of ["pointerdown", "focusin"]) question.section.addEventListener(event, () => activate(place));
  });
  activate(0);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const question = questions[active];
    const turn = (by) => {
      activate((active + by + questions.length) % questions.length);
      questions[active].section.focus();
      questions[active].section.scrollIntoView({ block: "start" });
    };
    const actions = {
      ArrowUp: () => question.move(-1), ArrowDown: () => question.move(1),
      ArrowLeft: () => question.moveStep(-1), ArrowRight: () => question.moveStep(1),
      g: () => question.select(question.anchor, 0), m: () => question.nextMethod(),
      a: () => { question.showsBeside = !question.showsBeside; question.draw(); },
      n: () => turn(1), p: () => turn(-1),
    };
    if (!Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  });
})();
