// Two runs side by side: pinned in the grid.
const pins = () => listed("pins").map(key => data.rows.findIndex(row => row.key === key)).filter(id => id >= 0);

const pinBox = id => el("input", {type: "checkbox", class: "pin", title: "pin, to compare two side by side", "aria-label": `pin ${data.rows[id].called}`, checked: pins().includes(id), onchange: () => togglePin(id)});

function togglePin(id) {
  const now = pins(), next = now.includes(id) ? now.filter(each => each !== id) : [...now, id].slice(-2);
  remember({pins: next.map(each => data.rows[each].key).join("|")});
  for (const each of new Set([...now, ...next])) grid.getRow(each)?.reformat();
  showPinned();
}

async function showPinned() {
  const place = document.getElementById("pinned"), chosen = pins();
  if (!chosen.length) { place.replaceChildren(); return; }
  const [one, other] = chosen.map(id => data.rows[id]);
  if (!other) { place.replaceChildren(el("p", {class: "empty"}, `${one.called} is pinned; pin another to compare them.`)); return; }
  if (one.group === other.group) await whole(one.group);
  const keys = data.columns.slice(1).filter(({key}) => one.cells[key]?.t || other.cells[key]?.t);
  const rows = keys.map(column => [head(column), cellText(one, column.key), cellText(other, column.key), tested(one, other, column.key)]);
  const details = el("div", {}, "…");
  place.replaceChildren(el("h3", {}, "Side by side"), one.group === other.group ? "" : el("p", {class: "empty"}, "These are of different models, protocols or seeds: their numbers do not compare."),
    plainTable(["", one.called, other.called, one.contest[ranks()] === other.contest[ranks()] ? "difference (paired test)" : "difference (paired tests are of runs that are ranked together)"], rows, "pair"), el("h4", {}, "Settings that differ"), details);
  const [first, second] = (await Promise.all([one, other].map(row => load(row.details)))).map(each => flat(each.parts.configuration || {}));
  const differing = [...new Set([...Object.keys(first), ...Object.keys(second)])].filter(key => first[key] !== second[key]);
  details.replaceChildren(differing.length ? plainTable(["setting", one.called, other.called], differing.map(key => [key, first[key] ?? "–", second[key] ?? "–"])) : el("p", {class: "hint"}, "none"));
}

// What the tests of the page's contests say of these two; those of other pairs are not made.
function tested(one, other, metric) {
  if (one.group !== other.group) return "";
  const way = ranks(), named = row => (way === "bits" ? row.name : row.called);
  const tests = data.groups[one.group].tests[way].find(each => each.metric === metric);
  if (one.contest[way] !== other.contest[way]) return "";
  for (const [first, second] of [[one, other], [other, one]]) {
    const found = tests?.rows.find(([row]) => row[0] === one.contest[way] && row[1] === `${named(first)} − ${named(second)}`);
    if (found) return el("span", {class: found[1] ? "" : "inside"}, `${found[0][1]}: ${found[0][2]}, p (Holm) ${found[0][3]}${found[1] ? "" : ", not told apart"}`);
  }
  return "";
}

function flat(value, prefix = "") {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return {[prefix]: JSON.stringify(value)};
  return Object.assign({}, ...Object.entries(value).map(([key, each]) => flat(each, prefix ? `${prefix}.${key}` : key)));
}
