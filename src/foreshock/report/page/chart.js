"use strict";

// Charts over the steps of a run. All of them share one view: the steps that are shown, and a cursor.

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 24;

function make(name, attributes, parent, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function spell(number) {
  if (number === null) return "not finite";
  if (number === 0) return "0";
  const size = Math.abs(number);
  if (size >= 1e6 || size < 1e-3) return number.toExponential(3).replace(/\.?0+e/, "e");
  return String(Number(number.toPrecision(5)));
}

function spellStep(step) {
  if (step >= 1e6) return `${Number((step / 1e6).toPrecision(6))}M`;
  return step >= 1e4 ? `${Number((step / 1e3).toPrecision(6))}k` : String(step);
}

/** Index of the first entry that is not less. */
function lowerBound(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1; else high = middle;
  }
  return low;
}

function nearest(sorted, value) {
  const after = Math.min(lowerBound(sorted, value), sorted.length - 1);
  const before = Math.max(after - 1, 0);
  return value - sorted[before] <= sorted[after] - value ? before : after;
}

/** Round numbers between two others, about so many. */
function ticks(low, high, about, smallest = 0) {
  const rough = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const gap = Math.max(smallest, power * [1, 2, 5, 10].find(factor => power * factor >= rough));
  const found = [];
  for (let i = Math.ceil(low / gap - 1e-9); i * gap <= high + gap * 1e-9; i++) {
    found.push(Number((i * gap).toPrecision(12)));
  }
  return found;
}

function logTicks(low, high) {
  const found = [];
  const factors = high / low > 1e3 ? [1] : [1, 2, 5];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) found.push(Number(tick.toPrecision(6)));
    }
  }
  const every = Math.ceil(found.length / 8);
  return found.filter((_, i) => i % every === 0);
}

/** The steps that all charts show, and the one that all of them tell about. */
class View {
  constructor(first, last, eventSteps) {
    [this.first, this.last] = first < last ? [first, last] : [first - 1, last + 1];
    [this.from, this.to] = [this.first, this.last];
    this.eventSteps = eventSteps;
    this.cursor = null;
    this.isLog = false;
    this.charts = [];
    this.onChange = () => {};
  }

  show(from, to) {
    const span = Math.min(Math.max(to - from, 2), this.last - this.first);
    this.from = Math.min(Math.max((from + to - span) / 2, this.first), this.last - span);
    this.to = this.from + span;
    this.redraw();
  }

  zoom(factor, around = this.cursor ?? (this.from + this.to) / 2) {
    const middle = Math.min(Math.max(around, this.from), this.to);
    this.show(middle - (middle - this.from) * factor, middle + (this.to - middle) * factor);
  }

  reset() {
    this.show(this.first, this.last);
  }

  redraw() {
    for (const chart of this.charts) chart.draw();
    this.onChange();
  }

  moveTo(step) {
    this.cursor = Math.min(Math.max(step, this.first), this.last);
    const span = this.to - this.from;
    if (this.cursor < this.from) this.show(this.cursor, this.cursor + span);
    else if (this.cursor > this.to) this.show(this.cursor - span, this.cursor);
    else for (const chart of this.charts) chart.point();
  }

  moveToEvent(direction) {
    const here = this.cursor ?? (direction > 0 ? this.from - 1 : this.to + 1);
    const index = direction > 0
      ? lowerBound(this.eventSteps, here + 1) : lowerBound(this.eventSteps, here) - 1;
    if (index in this.eventSteps) this.moveTo(this.eventSteps[index]);
  }
}

/** A figure with an axis of steps; what stands over it is drawn by those that extend it. */
class Chart {
  constructor(view, title, height, steps) {
    Object.assign(this, {view, height, steps});
    this.figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const name = document.createElement("span");
    name.className = "name";
    name.textContent = title;
    this.readout = document.createElement("output");
    caption.append(name, this.readout);
    this.plot = document.createElement("div");
    this.plot.className = "plot";
    this.plot.tabIndex = 0;
    for (const [key, value] of Object.entries({
      role: "slider", "aria-label": `${title} over steps`, "aria-describedby": "keys",
      "aria-valuemin": view.first, "aria-valuemax": view.last,
    })) this.plot.setAttribute(key, value);
    this.svg = make("svg", {"aria-hidden": "true", height}, this.plot);
    this.figure.append(caption, this.plot);
    this.width = 600;
    this.listen();
    view.charts.push(this);
  }

  listen() {
    const {plot, view} = this;
    plot.addEventListener("keydown", event => this.press(event));
    plot.addEventListener("pointermove", event => this.drag(event));
    plot.addEventListener("pointerdown", event => {
      if (event.button !== 0) return;
      this.grip = this.stepAt(event);
      plot.setPointerCapture(event.pointerId);
    });
    plot.addEventListener("pointerup", event => this.release(event));
    plot.addEventListener("pointercancel", () => { this.grip = null; this.point(); });
    plot.addEventListener("dblclick", () => view.reset());
    plot.addEventListener("focus", () => {
      if (view.cursor === null) view.moveTo(this.steps[this.steps.length - 1] ?? view.last);
    });
    new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width > 0 && width !== this.width) { this.width = width; this.draw(); }
    }).observe(plot);
  }

  press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const {view, steps} = this;
    const reach = event.shiftKey ? 10 : 1;
    const go = by => {
      const index = nearest(steps, view.cursor ?? view.last) + by;
      if (steps.length) view.moveTo(steps[Math.min(Math.max(index, 0), steps.length - 1)]);
    };
    const keys = {
      ArrowLeft: () => go(-reach), ArrowRight: () => go(reach),
      ArrowDown: () => go(-reach), ArrowUp: () => go(reach),
      Home: () => go(-Infinity), End: () => go(Infinity),
      PageUp: () => view.moveToEvent(-1), PageDown: () => view.moveToEvent(1),
      "+": () => view.zoom(0.5), "=": () => view.zoom(0.5), "-": () => view.zoom(2),
      "0": () => view.reset(), Escape: () => view.reset(),
    };
    if (!(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  }

  stepAt(event) {
    const {left, width} = this.plot.getBoundingClientRect();
    const share = (event.clientX - left) * this.width / width - LEFT;
    const {from, to} = this.view;
    const step = from + share / (this.width - LEFT - RIGHT) * (to - from);
    return Math.min(Math.max(step, from), to);
  }

  drag(event) {
    const step = this.stepAt(event);
    this.view.moveTo(step);
    if (this.grip != null) {
      const [a, b] = [this.x(this.grip), this.x(step)];
      make("rect", {
        class: "selection", x: Math.min(a, b), width: Math.abs(a - b), y: TOP,
        height: this.height - TOP - BOTTOM,
      }, this.pointer);
    }
  }

  release(event) {
    if (this.grip == null) return;
    const [from, to] = [this.grip, this.stepAt(event)].sort((a, b) => a - b);
    this.grip = null;
    if (this.x(to) - this.x(from) > 6) this.view.show(from, to); else this.point();
  }

  x(step) {
    const {from, to} = this.view;
    return LEFT + (step - from) / (to - from) * (this.width - LEFT - RIGHT);
  }

  draw() {
    const {svg, width, height, view} = this;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const clip = make("clipPath", {id: `clip-${view.charts.indexOf(this)}`}, svg);
    make("rect", {
      x: LEFT - 6, y: 0, width: Math.max(width - LEFT - RIGHT + 12, 0), height: height - BOTTOM + 1,
    }, clip);
    const bottom = height - BOTTOM;
    for (const tick of ticks(view.from, view.to, Math.max(width / 110, 2), 1)) {
      const x = this.x(tick);
      make("line", {class: "grid", x1: x, x2: x, y1: TOP, y2: bottom}, svg);
      make("text", {class: "tick", x, y: bottom + 16, "text-anchor": "middle"}, svg, spellStep(tick));
    }
    make("line", {class: "axis", x1: LEFT, x2: width - RIGHT, y1: bottom, y2: bottom}, svg);
    this.drawBody(make("g", {"clip-path": `url(#${clip.id})`}, svg), bottom);
    this.pointer = make("g", {}, svg);
    this.point();
  }

  point() {
    const {pointer, view} = this;
    if (!pointer) return;
    pointer.replaceChildren();
    const step = this.pointed();
    this.readout.textContent = this.say(step);
    this.plot.setAttribute("aria-valuenow", Math.round(step ?? view.last));
    this.plot.setAttribute("aria-valuetext", this.readout.textContent);
    if (view.cursor === null || step === null || step < view.from || step > view.to) return;
    const x = this.x(step);
    make("line", {class: "cursor", x1: x, x2: x, y1: TOP, y2: this.height - BOTTOM}, pointer);
    this.drawPoint(pointer, step);
  }

  drawPoint() {}
}
