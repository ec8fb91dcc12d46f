// A paper's table beside ours: every value with its difference, interval and verdict, and of every row what it looks like.
const THUMBNAILS = 3;

if (data.paper) views.paper = {
  title: "Paper",
  async update(section) {
    const paper = data.paper, rows = paperRows(paper);
    section.replaceChildren(el("h2", {}, paper.title), el("p", {class: "lead"}, `${paper.summary}.`),
      el("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": "table"}, el("table", {class: "paper"},
        el("thead", {}, el("tr", {}, el("th", {scope: "col"}, paper.header.slice(0, paper.names).join(" · ")), paper.header.slice(paper.names).map(head => el("th", {scope: "col"}, head)))),
        rows.map(row => el("tbody", {}, row.values.map((value, index) => el("tr", {},
          index ? null : el("th", {scope: "rowgroup", rowspan: row.values.length}, paperHead(row)),
          value.cells.map((text, place) => el("td", {class: place === value.cells.length - 1 ? `said ${value.kind.split(" ")[0]}` : place ? "number" : ""}, text)))))))),
      el("h3", {}, "What differs, and what else to know"), list(paper.notes));
    for (const index of new Set(rows.filter(row => row.run).map(row => row.run.group))) {
      try { await whole(index); } catch (error) { section.append(el("p", {class: "empty"}, error.message)); continue; }
      for (const row of rows.filter(each => each.run && each.run.group === index)) row.place.replaceChildren(...thumbnails(row.run));
    }
  },
};

// One for each row of the paper: its names, its run and its values.
function paperRows(paper) {
  const found = [];
  for (const {cells, run, kind} of paper.rows) {
    const name = cells.slice(0, paper.names).join(" · "), last = found[found.length - 1];
    const value = {cells: cells.slice(paper.names), kind};
    if (last && last.name === name) last.values.push(value);
    else found.push({name, run: data.rows.find(row => row.key === run), values: [value], place: el("div", {class: "thumbnails"})});
  }
  return found;
}

const paperHead = row => [row.run ? el("button", {type: "button", class: "link", onclick: () => showRun(row.run.id)}, row.name) : row.name, row.place];

// The float model's first samples above the run's.
function thumbnails(run) {
  const gallery = data.groups[run.group].gallery, its = gallery?.runs[run.id];
  if (!its?.pictures || gallery.video) return [];
  const strip = names => el("div", {}, names.slice(0, THUMBNAILS).filter(Boolean).map(name => el("button", {type: "button", class: "bare", "aria-label": "show at full size", onclick: () => enlarge(name)}, el("img", {src: picture(name), class: "pixels", alt: "sample"}))));
  return [el("small", {}, "float, and ours"), strip(its.float), strip(its.pictures)];
}
