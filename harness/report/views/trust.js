// Trust: what the numbers rest on, for all runs together and for one.
views.trust = {
  title: "Trust",
  needsGroup: true,
  update(section) {
    const its = group();
    section.replaceChildren(el("dl", {class: "provenance"}, data.provenance.map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text)))));
    const problems = data.groups.flatMap(each => each.problems);
    if (problems.length) section.append(el("h3", {}, "Not finished"), el("ul", {class: "problems", id: "problems"}, problems.map(each => el("li", {}, el("b", {}, each.run), ` on ${each.model} `, el("span", {class: "status"}, each.status), " ", el("code", {}, each.why), el("p", {class: "command"}, el("code", {}, each.command), " ", copyButton(each.command))))));
    if (data.damaged.length) section.append(el("h3", {}, "Damaged"), list(data.damaged.map(line => el("code", {}, line)), "problems damaged"));
    section.append(el("h3", {}, "What computed each number"), el("div", {class: "controls"}, pickGroup()),
      plainTable(["metric", "kind", "runs", "n", "computed by", "version", "against", "interval", "not computed, and why"],
        its.computed.map(each => [el("span", {title: each.name}, each.title), each.kind, each.runs, each.n, each.by, each.version, each.reference, each.interval, each.why.join("; ")]), "passports"));
    section.append(el("h3", {}, "Every run"), el("p", {class: "hint"}, "Its command, passports, hashes and versions."),
      el("ul", {class: "runs"}, data.rows.filter(row => row.group === Number(state.group || 0)).map(row => el("li", {}, runButton(row), ` ${row.bits} `, el("span", {class: "status " + row.status}, row.status), " ", el("code", {}, row.key)))));
  },
};

function openDialog(title, ...content) {
  const dialog = document.getElementById("dialog");
  dialog.replaceChildren(el("div", {class: "bar"}, el("h2", {}, title), el("button", {type: "button", onclick: () => dialog.close(), "aria-label": "close"}, "✕")), ...shownOnly(content));
  if (!dialog.open) dialog.showModal();
}

async function showRun(id) {
  const row = data.rows[id];
  openDialog(row.called, el("p", {}, "…"));
  let its;
  try { [its] = await Promise.all([load(row.details), whole(row.group)]); } catch (error) { openDialog(row.called, el("p", {class: "empty"}, error.message)); return; }
  openDialog(row.called, el("p", {class: "hint"}, data.groups[row.group].label, row.why ? ` · ${row.why}` : ""),
    its.error ? el("pre", {class: "error"}, its.error) : null,
    el("h4", {}, "Make it again"), el("p", {class: "command"}, el("code", {}, its.command), " ", copyButton(its.command)),
    el("dl", {class: "provenance"}, [["run", row.key], ["folder", its.folder], ...its.facts].map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text)))),
    its.non_finite.length ? el("p", {class: "empty"}, `Not finite, and so not here: ${its.non_finite.join("; ")}`) : null,
    el("h4", {}, "Numbers and their passports"), el("dl", {class: "metrics"}, its.metrics.map(metric => el("div", {}, el("dt", {title: metric.name}, metric.title),
      el("dd", {}, metric.text, metric.why ? el("i", {}, ` ${metric.status}: ${metric.why}`) : null, el("span", {class: "passport"}, Object.entries(data.groups[row.group].passports[metric.passport]).map(([key, setting]) => el("span", {}, `${key}: ${setting} `))))))),
    el("details", {class: "part"}, el("summary", {}, "hashes"), plainTable([], Object.entries(its.hashes).map(([name, hash]) => [name, el("code", {}, hash)]))),
    Object.entries(its.parts).map(([name, part]) => el("details", {class: "part"}, el("summary", {}, name), el("pre", {}, JSON.stringify(part, null, 2)))));
}
