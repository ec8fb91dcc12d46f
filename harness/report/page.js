"use strict";
document.documentElement.classList.add("scripted");

// Tables: a click (or Enter, the headers are buttons) sorts; what has no value stays last either way.
for (const table of document.querySelectorAll("table.results")) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, place) => head.firstElementChild.addEventListener("click", () => {
    const now = head.getAttribute("aria-sort");
    const order = now === "none" ? head.dataset.first : now === "ascending" ? "descending" : "ascending";
    const sign = order === "ascending" ? 1 : -1;
    const key = row => row.cells[place].dataset.sort;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    heads.forEach(other => other.setAttribute("aria-sort", other === head ? order : "none"));
    table.classList.remove("in-contests");  // the rules between contests mean nothing in another order
  }));
}

// Ranks: among runs of the same bits label, or of nearly equal bytes. Marks of both are in the cells; rows and rules follow.
const pickRanks = document.getElementById("pick-ranks");

function rank() {
  const way = pickRanks.value;
  document.body.className = `by-${way}`;
  for (const table of document.querySelectorAll("table.results")) {
    const rows = [...table.tBodies[0].rows].sort((a, b) => a.dataset[way] - b.dataset[way]);
    rows.forEach((row, place) =>
      row.classList.toggle("new-contest", place > 0 && row.dataset[`${way}Contest`] !== rows[place - 1].dataset[`${way}Contest`]));
    table.tBodies[0].append(...rows);
    table.classList.add("in-contests");
    [...table.tHead.rows[table.tHead.rows.length - 1].cells].forEach(head => head.setAttribute("aria-sort", "none"));
  }
}

pickRanks.addEventListener("change", rank);
rank();

// Plots: figures come ready from Python; here they only get the page's colours.
const groups = JSON.parse(document.getElementById("figures").textContent);
const pickGroup = document.getElementById("pick-group");
const pickMetric = document.getElementById("pick-metric");
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function draw(place, figure) {
  const line = css("--line"), axis = {gridcolor: line, linecolor: line, zeroline: false, automargin: true};
  const layout = {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", margin: {l: 56, r: 12, t: 12, b: 48},
    font: {family: "system-ui, sans-serif", size: 12, color: css("--ink")},
    hoverlabel: {bgcolor: css("--page"), bordercolor: line, font: {color: css("--ink")}},
    legend: {orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom"}, ...figure.layout,
    xaxis: {...axis, ...figure.layout.xaxis}, yaxis: {...axis, ...figure.layout.yaxis},
  };
  Plotly.react(place, figure.data, layout, {responsive: true, displaylogo: false, displayModeBar: false});
}

function drawAll() {
  const group = groups[pickGroup.value], metric = pickMetric.value;
  for (const kind of ["size", "latency"]) {
    if (metric) draw(`plot-${kind}`, group[kind][metric]);
    else Plotly.purge(`plot-${kind}`);
  }
  document.getElementById("no-metric").hidden = Boolean(metric);
  for (const place of document.querySelectorAll("[data-layers]")) draw(place, groups[place.dataset.layers].layers);
  for (const pick of document.querySelectorAll("[data-steps-of]")) drawSteps(pick);
}

function drawSteps(pick) {
  const place = pick.closest(".controls").nextElementSibling.nextElementSibling.firstElementChild;
  draw(place, groups[pick.dataset.stepsOf].steps[pick.value]);
}

function chooseGroup() {
  const before = pickMetric.value;
  pickMetric.replaceChildren(...groups[pickGroup.value].metrics.map(({name, title}) => new Option(title, name)));
  if ([...pickMetric.options].some(option => option.value === before)) pickMetric.value = before;
  drawAll();
}

for (const pick of document.querySelectorAll("[data-steps-of]")) pick.addEventListener("change", () => drawSteps(pick));
pickGroup.addEventListener("change", chooseGroup);
pickMetric.addEventListener("change", drawAll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
chooseGroup();
