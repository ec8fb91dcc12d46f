// Layers: error by layer and run, by layer and step, the worst ones, and plans of mixed precision.
views.layers = {
  title: "Layers",
  needsGroup: true,
  async update(section) {
    const layers = group().layers;
    section.replaceChildren(el("div", {class: "controls"}, pickGroup()));
    if (!layers) { section.append(el("p", {class: "empty"}, "No errors of layers were recorded here (measure.layer_errors).")); return; }
    section.append(...layers.plans.map(planOf));
    if (layers.runs) {
      const place = el("div", {class: "plot layers", role: "img", "aria-label": "Heat map of SQNR, layers by runs", style: `min-width: ${320 + 96 * layers.runs.data[0].x.length}px`});
      section.append(el("h3", {}, "Error of each layer alone"), el("p", {class: "hint"}, "Signal to quantization noise of each layer's output on float inputs, in dB: more is better. A gap is a layer left in float, or one without any error." + (layers.left_out ? ` ${layers.left_out} more runs are not in this picture; choose one below.` : "")), el("div", {class: "scroll", tabindex: "0"}, place));
      drawLater(place, layers.runs);
    }
    const runs = Object.keys(layers.of_run).map(Number);
    if (!runs.length) return;
    const asked = rowOf(state.layers), id = runs.includes(asked) ? asked : runs[runs.length - 1], part = el("div", {}, "…");
    section.append(el("h3", {}, "One run, layer by layer"), el("div", {class: "controls"}, pick("run", runs.map(each => [data.rows[each].key, data.rows[each].called]), data.rows[id].key, key => { remember({layers: key}); show(); }, "layers-run")), part);
    const found = await load(layers.of_run[id]);
    const steps = el("div", {class: "plot layers", id: "plot-steps", role: "img", "aria-label": "Heat map of SQNR, layers and blocks by denoising steps"});
    part.replaceChildren(el("h4", {}, "Worst layers"), plainTable(["layer", "SQNR", "bits", "runs as"], found.worst, "worst"),
      found.steps ? el("h4", {}, "Over the denoising steps") : "", found.steps ? el("p", {class: "hint"}, "Layers are judged alone, on float inputs; blocks with all the rounding before them.") : "", el("div", {class: "scroll", tabindex: "0"}, steps));
    if (found.steps) drawLater(steps, found.steps);
  },
};

function planOf(plan) {
  const counts = {};
  for (const [, ...labels] of plan.layers) for (const label of labels) counts[label] = (counts[label] || 0) + 1;
  return el("div", {class: "plan"}, el("h3", {}, `The bit plan of ${plan.run}`),
    el("p", {}, `Budget: ${plan.budget}; the plan predicts ${plan.predicted} and an error of ${plan.error}. Errors predicted for one width everywhere: ${plan.uniform.map(([label, error]) => `${label} ${error}`).join(", ")}.`),
    plan.rows.length > 1 ? el("h4", {}, "Measured, beside uniform runs of the same method nearest in bytes") : el("h4", {}, "Measured (no uniform run of this method is recorded beside it)"), plainTable(plan.heads, plan.rows, "uniform"),
    el("details", {}, el("summary", {}, `What each layer got: ${Object.entries(counts).map(([label, count]) => `${count} × ${label}`).join(", ")}`), plainTable(["layer", ...plan.ranges], plan.layers)));
}
