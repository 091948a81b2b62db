// The charts of a run: one series each, and one of the events and the levels of risk.

const LEVELS = ["STABLE", "LEARNING", "WARNING", "DANGER", "INSTABILITY"];
const MANY_POINTS = 80;
const TICK = "M0-5V5";  // a mark among so many that their shapes would run together
const LINED_LANES = ["aborts", "rollbacks", "rollbacks not made"];
const SHAPES = {
  "aborts": "M-5-5 5 5M5-5-5 5",
  "rollbacks": "M5-5-5 0 5 5Z",
  "rollbacks not made": "M5-5-5 0 5 5Z",
  "skipped updates": "M-4-4H4V4H-4Z",
  "anomalies": "M0-5 5 5H-5Z",
  "recoveries": "M-5 0-1 4 5-4",
  "risk changes": "M0-5 5 0 0 5-5 0Z",
  "gates at risk": "M-5-4H5L0 5Z",
  "slow ranks": "M-5-5H5L-5 5H5Z",
  "snapshots": "M-4-5H4V5L0 1-4 5Z",
  "resumptions": "M-5-5 5 0-5 5Z",
  "autopsies": "M-5 0H5M0-5V5",
};

/** One series, and behind it the levels of risk and what was done. */
class CurveChart extends Chart {
  constructor(view, curve, steps, drawing) {
    const file = curve.source === "telemetry.jsonl" ? "" : `, ${curve.source}`;
    super(view, curve.name + file, 190, steps);
    Object.assign(this, {curve, drawing});
    this.low = curve.low ?? curve.mean;
    this.high = curve.high ?? curve.mean;
    this.nonfinite = new Map(curve.nonfinite);
  }

  drawBody(body, bottom) {
    const {view, steps, curve} = this;
    drawBands(this, body, this.drawing.bands, TOP, bottom - TOP, "shade");
    drawLines(this, body, this.drawing.lanes, bottom);
    const from = Math.max(lowerBound(steps, view.from) - 1, 0);
    const to = Math.min(lowerBound(steps, view.to) + 1, steps.length);
    this.scale(from, to, bottom);
    for (const tick of this.ticks) {
      const y = this.y(tick);
      make("line", {class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y}, this.svg);
      make("text", {class: "tick", x: LEFT - 6, y: y + 4, "text-anchor": "end"}, this.svg, spell(tick));
    }
    const cross = this.nonfinite.size * 9 > this.width ? TICK : "M-4-4 4 4M4-4-4 4";
    let line = "", isDown = false;
    const upper = [], lower = [];
    for (let i = from; i < to; i++) {
      const x = this.x(steps[i]).toFixed(1);
      if (curve.mean[i] === null) {
        isDown = false;
      } else {
        line += `${isDown ? "L" : "M"}${x} ${this.y(curve.mean[i]).toFixed(1)}`;
        isDown = true;
        if (curve.low) {
          upper.push(`${x} ${this.y(this.high[i]).toFixed(1)}`);
          lower.push(`${x} ${this.y(this.low[i]).toFixed(1)}`);
        }
        if (to - from <= MANY_POINTS) {
          make("circle", {class: "dot", cx: x, cy: this.y(curve.mean[i]), r: 2}, body);
        }
      }
      if (this.nonfinite.has(i)) {
        make("path", {class: "nonfinite", d: cross, transform: `translate(${x} ${TOP + 6})`}, body);
      }
    }
    if (upper.length) make("path", {class: "envelope", d: `M${upper.join("L")}L${lower.reverse().join("L")}Z`}, body);
    make("path", {class: "line", d: line}, body);
  }

  scale(from, to, bottom) {
    let low = Infinity, high = -Infinity;
    for (let i = from; i < to; i++) {
      if (this.low[i] !== null) low = Math.min(low, this.low[i]);
      if (this.high[i] !== null) high = Math.max(high, this.high[i]);
    }
    if (low > high) [low, high] = [0, 1];
    const isLog = this.view.isLog && low > 0;
    if (isLog) {
      if (low === high) [low, high] = [low / 2, high * 2];
      const [a, b] = [Math.log(low), Math.log(high)];
      this.y = value => bottom - 4 - (Math.log(value) - a) / (b - a) * (bottom - TOP - 8);
      this.ticks = logTicks(low, high);
    } else {
      const pad = (high - low) * 0.04 || Math.abs(high) * 0.1 || 1;
      [low, high] = [low - pad, high + pad];
      this.y = value => bottom - (value - low) / (high - low) * (bottom - TOP);
      this.ticks = ticks(low, high, 4);
    }
  }

  index() {
    return nearest(this.steps, this.view.cursor ?? this.view.last);
  }

  pointed() {
    return this.steps.length ? this.steps[this.index()] : null;
  }

  say(step) {
    if (step === null) return "no values";
    const i = this.index();
    const last = Math.min(step + this.curve.width - 1, this.view.last);
    const where = this.curve.width === 1 ? `step ${step}` : `steps ${step} to ${last}`;
    const range = this.low[i] !== this.high[i]
      ? ` (mean; ${spell(this.low[i])} to ${spell(this.high[i])})` : "";
    const count = this.nonfinite.get(i);
    const bad = count ? `, ${count} not finite` : "";
    const value = this.curve.mean[i];
    return `${where}: ${value === null ? "" : spell(value)}${range}${value === null ? bad.slice(2) : bad}`;
  }

  drawPoint(pointer, step) {
    const value = this.curve.mean[this.index()];
    if (value !== null) make("circle", {class: "point", cx: this.x(step), cy: this.y(value), r: 4}, pointer);
  }
}

/** What happened, a row for each kind, and the levels of risk. */
class EventChart extends Chart {
  constructor(view, drawing) {
    const risk = drawing.bands.length ? 64 : 0;
    super(view, "events and risk", TOP + BOTTOM + risk + drawing.lanes.length * 34, view.eventSteps);
    Object.assign(this, {drawing, risk});
  }

  drawBody(body, bottom) {
    const {drawing} = this;
    if (this.risk) {
      make("text", {class: "lane", x: LEFT, y: TOP + 10}, body, "spectral risk");
      drawBands(this, body, drawing.bands, TOP + 14, this.risk - 18, "step");
    }
    drawing.lanes.forEach(({lane, marks}, row) => {
      const top = TOP + this.risk + row * 34;
      const total = marks.reduce((sum, [, count]) => sum + count, 0);
      make("line", {class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: top + 32, y2: top + 32}, body);
      make("text", {class: "lane", x: LEFT, y: top + 12}, body, `${lane}: ${total}`);
      const shown = marks.filter(([step]) => step >= this.view.from && step <= this.view.to);
      const shape = shown.length * 9 > this.width ? TICK : SHAPES[lane] ?? "M-1-5H1V5H-1Z";
      for (const [step] of shown) {
        const place = `translate(${this.x(step).toFixed(1)} ${top + 23})`;
        make("path", {class: "mark", d: shape, transform: place}, body);
      }
    });
  }

  pointed() {
    return this.view.cursor;
  }

  say(cursor) {
    if (cursor === null) return "";
    const {from, to} = this.view;
    const reach = (to - from) / this.width * 5;
    const said = [];
    for (const {marks, width} of this.drawing.lanes) {
      for (const [step, count, sentence] of marks) {
        if (Math.abs(step - cursor) > reach && !(step <= cursor && cursor < step + width)) continue;
        said.push(`step ${step}: ${sentence}${count > 1 ? `, and ${count - 1} more` : ""}`);
      }
    }
    const shown = said.slice(0, 4).concat(said.length > 4 ? [`${said.length - 4} more`] : []);
    const level = levelAt(this.drawing.bands, cursor);
    return [`step ${Math.round(cursor)}${level ? `, risk ${level}` : ""}`, ...shown].join("; ");
  }
}

function levelAt(bands, step) {
  let level = null;
  for (const band of bands) if (band.step <= step) ({level} = band);
  return level;
}

/** The levels of risk: as a shade behind a curve, or as steps with names. */
function drawBands(chart, parent, bands, top, height, kind) {
  bands.forEach(({step, level}, i) => {
    const end = bands[i + 1]?.step ?? chart.view.last;
    const [from, to] = [Math.max(step, chart.view.from), Math.min(end, chart.view.to)];
    if (from >= to) return;
    const rank = LEVELS.indexOf(level);
    const x = chart.x(from), width = chart.x(to) - x;
    const tall = kind === "step" ? height * (rank + 2) / (LEVELS.length + 1) : height;
    make("rect", {
      class: `${kind} risk-${rank}`, x, width, y: top + height - tall, height: tall,
    }, parent);
    if (kind === "step" && width > level.length * 7 + 6) {
      make("text", {class: "level", x: x + 4, y: top + height - 4}, parent, level);
    }
  });
}

function drawLines(chart, parent, lanes, bottom) {
  for (const {lane, marks} of lanes) {
    if (!LINED_LANES.includes(lane)) continue;
    for (const [step] of marks) {
      if (step < chart.view.from || step > chart.view.to) continue;
      const x = chart.x(step);
      make("line", {class: `event ${lane === "aborts" ? "abort" : ""}`, x1: x, x2: x, y1: TOP, y2: bottom}, parent);
    }
  }
}
