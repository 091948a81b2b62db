// The numbers that are not the same on all ranks: a line for each, or a band and whoever is farthest.

/** Behind the lines of ranks: from the lowest of all ranks to the highest, and their median. */
class RankChart extends CurveChart {
  constructor(view, curve, drawing) {
    super(view, curve, drawing.steps[curve.steps], drawing);
    const {lines, ranks} = curve;
    if (lines.length === ranks) this.figure.classList.add("every-rank");
    const legend = document.createElement("ul");
    legend.className = "legend";
    if (lines.length < ranks) keyOf(legend, "band", `median, lowest and highest of ${ranks} ranks`);
    for (const line of lines) {
      const named = line.rank === curve.farthest ? ", the farthest" : "";
      keyOf(legend, colourOf(curve, line), `rank ${line.rank}${named}`);
    }
    this.figure.append(legend);
  }

  drawBody(body, bottom) {
    super.drawBody(body, bottom);
    const {steps, curve, view} = this;
    const from = Math.max(lowerBound(steps, view.from) - 1, 0);
    const to = Math.min(lowerBound(steps, view.to) + 1, steps.length);
    for (const line of curve.lines) {
      const isThere = i => (line.mean[i] ?? null) !== null;
      const colour = `of-rank ${colourOf(curve, line)}`;
      let path = "";
      for (let i = from; i < to; i++) {
        if (!isThere(i)) continue;
        const [x, y] = [this.x(steps[i]).toFixed(1), this.y(line.mean[i]).toFixed(1)];
        path += `${i > from && isThere(i - 1) ? "L" : "M"}${x} ${y}`;
        if (!isThere(i - 1) && !isThere(i + 1)) make("circle", {class: colour, cx: x, cy: y, r: 2}, body);
      }
      make("path", {class: colour, d: path}, body);
    }
  }

  say(step) {
    if (step === null || !this.curve.lines.length) return super.say(step);
    const i = this.index();
    const said = this.curve.lines.map(({rank, mean}) =>
      `rank ${rank}: ${mean[i] === null ? "none" : spell(mean[i])}`);
    if (said.length === this.curve.ranks) return `step ${step}: ${said.join(", ")}`;
    const [median, low, high] = [this.curve.mean, this.low, this.high].map(of => spell(of[i]));
    return `step ${step}: median ${median} (${low} to ${high}), ${said.join(", ")}`;
  }

  drawPoint(pointer, step) {
    const i = this.index();
    for (const line of this.curve.lines) {
      if (line.mean[i] === null) continue;
      const place = {cx: this.x(step), cy: this.y(line.mean[i]), r: 3.5};
      make("circle", {class: `of-rank ${colourOf(this.curve, line)}`, ...place}, pointer);
    }
  }
}

/** A rank has one colour in all charts; the first is that of the band, where there is one. */
function colourOf(curve, {rank}) {
  return `rank-${curve.lines.length < curve.ranks ? 1 + rank % 7 : rank % 8}`;
}

function keyOf(legend, kind, text) {
  const item = document.createElement("li");
  const key = make("svg", {class: "key", viewBox: "0 0 24 8", "aria-hidden": "true"}, item);
  if (kind === "band") {
    make("rect", {class: "envelope", x: 0, y: 0, width: 24, height: 8}, key);
    make("path", {class: "line", d: "M0 4H24"}, key);
  } else {
    make("path", {class: `of-rank ${kind}`, d: "M0 4H24"}, key);
  }
  item.append(` ${text}`);
  legend.append(item);
}

function openRankCharts(view, drawing) {
  const folder = document.createElement("details");
  const title = document.createElement("summary");
  const grid = document.createElement("div");
  folder.open = true;
  title.textContent = "Where the ranks differ";
  grid.className = "curves";
  folder.append(title, grid);
  byId("rank-curves").append(folder);
  for (const curve of drawing.ranks) grid.append(new RankChart(view, curve, drawing).figure);
  view.redraw();
}

if (view !== null && drawing.ranks.length) openRankCharts(view, drawing);
