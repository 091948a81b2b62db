// Puts the page together: charts from the data in it, the tool bar, and the switch of the theme.

function byId(id) {
  return document.getElementById(id);
}

function firstAndLast(drawing) {
  const ends = [...drawing.steps, drawing.bands.map(band => band.step)]
    .concat(drawing.lanes.map(lane => lane.marks.map(([step]) => step)))
    .filter(steps => steps.length)
    .flatMap(steps => [steps[0], steps[steps.length - 1]]);
  return ends.length ? [Math.min(...ends), Math.max(...ends, drawing.last)] : null;
}

function openCharts(drawing) {
  const ends = firstAndLast(drawing);
  if (ends === null) return null;
  const eventSteps = [...new Set(drawing.lanes.flatMap(lane => lane.marks.map(([step]) => step)))]
    .sort((a, b) => a - b);
  const view = new View(...ends, eventSteps);
  if (drawing.lanes.length || drawing.bands.length) {
    byId("events").append(new EventChart(view, drawing).figure);
  }
  const folders = new Map();
  for (const curve of drawing.curves) {
    const chart = new CurveChart(view, curve, drawing.steps[curve.steps], drawing);
    folderOf(curve, drawing, folders).append(chart.figure);
  }
  view.onChange = () => {
    byId("range").textContent = `steps ${Math.ceil(view.from)} to ${Math.floor(view.to)}`;
  };
  byId("tools").hidden = false;
  byId("zoom-in").addEventListener("click", () => view.zoom(0.5));
  byId("zoom-out").addEventListener("click", () => view.zoom(2));
  byId("reset").addEventListener("click", () => view.reset());
  byId("log").addEventListener("change", event => {
    view.isLog = event.target.checked;
    view.redraw();
  });
  view.redraw();
  return view;
}

/** The main curves stand open; the others fold away, by the file that they are from. */
function folderOf(curve, drawing, folders) {
  if (drawing.main.includes(curve.name) && !curve.source.startsWith("monitoring/")) {
    return byId("main-curves");
  }
  const kind = curve.name.includes(".") ? `${curve.source}, by label` : curve.source;
  if (!folders.has(kind)) {
    const folder = document.createElement("details");
    const title = document.createElement("summary");
    const grid = document.createElement("div");
    folder.open = folders.size === 0;
    title.textContent = `More curves of ${kind}`;
    grid.className = "curves";
    folder.append(title, grid);
    byId("more-curves").append(folder);
    folders.set(kind, grid);
  }
  return folders.get(kind);
}

/** A strip of shades, from near white to dark blue; where nothing was finite it is red. */
function drawStrip(canvas, shades) {
  canvas.width = shades.length;
  const context = canvas.getContext("2d");
  shades.forEach((shade, x) => {
    const part = shade / 255;
    const mix = (pale, dark) => Math.round(pale + (dark - pale) * part);
    context.fillStyle = shade === null
      ? "rgb(179 38 30)" : `rgb(${mix(240, 8)} ${mix(244, 48)} ${mix(250, 107)})`;
    context.fillRect(x, 0, 1, 1);
  });
}

byId("theme").addEventListener("change", event => {
  document.documentElement.dataset.theme = event.target.value;
});

const closed = [];
addEventListener("beforeprint", () => {
  closed.push(...document.querySelectorAll("details:not([open])"));
  for (const details of closed) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of closed.splice(0)) details.open = false;
});

const drawing = JSON.parse(byId("data").textContent);
const view = openCharts(drawing);
for (const canvas of document.querySelectorAll("canvas")) {
  drawStrip(canvas, drawing.shades[canvas.dataset.map][canvas.dataset.layer]);
}
