// Answer first: what to ship. Fronts of quality over bytes and over measured speed-up, the knee in a sentence, flags.
views.answer = {
  title: "What to ship",
  needsGroup: true,
  update(section) {
    const its = group(), metric = its.metrics.some(each => each.name === state.metric) ? state.metric : its.metric;
    section.replaceChildren(el("div", {class: "controls"}, pickGroup(),
      pick("quality by", its.metrics.map(({name, title}) => [name, title]), metric, value => { remember({metric: value}); show(); }, "metric")));
    if (its.conclusions.length) section.append(el("div", {class: "conclusions", id: "conclusions"}, its.conclusions.map(said => el("p", {}, said))));
    const answers = its.answers[metric] || [];
    if (!answers.length) section.append(el("p", {class: "empty", id: "no-front"}, its.metrics.length ? "This metric ranks nobody, or no quantized run ended with it." : "None of these runs ended with a metric."));
    if (answers.length) section.append(el("div", {class: "verdict"}, answers.map(each => el("p", {}, each.sentences.join(" ")))));
    section.append(frontTable(answers));
    const plots = el("div", {class: "plots"});
    for (const each of answers) {
      const title = each.against === "size" ? "Quality over stored bytes" : `Quality over measured speed-up, ${each.device}`;
      const place = el("div", {class: "plot", id: `plot-${each.against}`, role: "img", "aria-label": `${title}; the table above has the runs of the front`});
      plots.append(el("figure", {}, el("figcaption", {}, title), place));
      drawLater(place, each.figure);
    }
    section.append(plots);
    if (answers.length && !answers.some(each => each.against === "speed")) {
      section.append(el("p", {class: "empty"}, "No quantized run here was measured: all were simulated, so there is no speed-up to plot."));
    }
    section.append(el("p", {class: "hint"}, "A run is on the front (line) if no other is at least as good in both and better in one. The knee (ring) is the run that lies highest above " +
      "the straight line between the front's ends. Colour is the method, shape the bits, the star the 16-bit model; bars are 95 % intervals; ▲: stores over 10 % more bits a weight than its label says."));
    const left = [...new Set(answers.flatMap(each => each.left_out))];
    if (left.length) section.append(el("h3", {}, "Left out"), list(left, "problems"));
    const tests = its.tests[ranks()].find(each => each.metric === metric);
    if (tests) section.append(el("h3", {}, `What the paired tests say of ${tests.title}`), list(tests.verdicts), el("p", {class: "hint"}, tests.how));
  },
};

function frontTable(answers) {
  const chosen = [...new Set(answers.flatMap(each => each.front))];
  if (!chosen.length) return el("div");
  const shown = data.columns.filter(column => column.shown && column.key !== "status" && chosen.some(id => data.rows[id].cells[column.key]));
  const heads = [...shown.map(head), "on the front by"];
  const rows = chosen.map(id => [
    ...shown.map((column, place) => place ? cellText(data.rows[id], column.key) : runButton(data.rows[id])),
    answers.filter(each => each.front.includes(id)).map(each => (each.against === "size" ? "bytes" : "speed") + (each.knee === id ? " (knee)" : "")).join(", "),
  ]);
  const table = plainTable(heads, rows, "front");
  table.id = "front";
  return table;
}

const head = column => el("span", {title: column.tip}, column.title, column.unit ? el("small", {}, column.unit) : null);
const runButton = row => el("button", {type: "button", class: "run", title: row.name, onclick: () => showRun(row.id)}, row.float ? `${row.name} (float model)` : row.name);

function cellText(row, key) {
  const cell = row.cells[key];
  if (!cell) return el("span", {class: "none"}, "–");
  const way = ranks() === "bits" ? ["b", "n"] : ["y", "m"];
  return el("span", {class: `value${cell[way[1]] ? " inside" : ""}`, title: cell.h},
    el("span", {class: cell[way[0]]}, (cell[way[1]] ? "~" : "") + (cell.t || "") + (key === "bits" && row.above ? " ▲" : "")), cell.i ? el("small", {}, cell.i) : null);
}
