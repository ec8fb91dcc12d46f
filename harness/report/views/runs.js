// Explore: all runs in one grid (Tabulator). Filters, columns, order, ranks and pins are in the address.
const FACETS = [["model", "model"], ["method", "method"], ["bits", "bits"], ["protocol", "protocol"], ["seed", "seed"], ["status", "status"]];
let grid = null;

views.runs = {
  title: "All runs",
  build(section) {
    const facets = el("div", {class: "controls", id: "filters"});
    section.append(facets, el("p", {class: "legend"},
      el("span", {}, "where paired tests tell runs apart: ", el("b", {}, "bold"), " best (several: tied), ", el("u", {}, "underlined"), " second"),
      el("span", {}, el("i", {class: "inside"}, "grey ~"), " not told apart from the float model"),
      el("span", {}, "▲ stores over 10 % more than its label says"),
      el("span", {}, "keys: ↑ ↓ move, Enter details, p pin")),
      el("div", {id: "grid"}), el("p", {class: "hint", id: "count"}), el("div", {id: "pinned"}), el("div", {id: "notes"}));
    buildGrid();
  },
  update(section) {
    filters(section.querySelector("#filters"));
    applyState();
    showPinned();
    groupNotes();
  },
};

function filters(place) {
  const known = key => [...new Set(data.rows.map(row => row[key]))].sort((a, b) => a.localeCompare(b, undefined, {numeric: true})).map(value => [value, value]);
  place.replaceChildren(
    el("label", {}, "find ", el("input", {type: "search", id: "find", value: state.find || "", placeholder: "part of a name", oninput: event => { remember({find: event.target.value}); applyFilter(); }})),
    ...FACETS.filter(([key]) => known(key).length > 1).map(([key, label]) => menu(label, known(key), listed(key), chosen => { remember({[key]: chosen.join("|")}); applyFilter(); })),
    menu("columns", data.columns.slice(1).map(column => [column.key, column.title + (column.title !== column.key && column.kind ? ` · ${column.key}` : "")]), shownColumns(), chosen => {
      remember({columns: chosen.join("|") || "none"});
      applyColumns();
    }),
    pick("rank together", [["bits", "runs of the same bits label"], ["bytes", "runs of nearly equal bytes"]], ranks(), value => { remember({ranks: value, sort: null}); show(); }, "ranks"),
    el("button", {type: "button", onclick: () => { remember(Object.fromEntries([...FACETS.map(([key]) => [key, null]), ["find", null], ["sort", null], ["columns", null], ["pins", null]])); show(); }}, "reset"));
}

const shownColumns = () => (state.columns ? listed("columns") : data.columns.filter(column => column.shown).map(column => column.key));

function buildGrid() {
  const many = data.groups.length > 1;
  grid = new Tabulator("#grid", {
    data: data.rows, index: "id", height: gridHeight(data.rows.length + data.groups.length), rowHeight: 40, headerSortTristate: true,
    columnDefaults: {headerSortStartingDir: "asc", resizable: true, vertAlign: "middle"},
    groupBy: many ? "group" : undefined, groupHeader: (index, count) => el("span", {title: data.groups[index].label}, `${data.groups[index].label} (${count})`),
    columns: columnDefinitions(),
    rowFormatter: row => {
      const its = row.getData();
      row.getElement().classList.toggle("float", its.float);
      row.getElement().classList.toggle("bad", its.status !== "ok");
      row.getElement().classList.toggle("here", its.id === here);
    },
    initialSort: [],
  });
  grid.on("tableBuilt", () => { grid.ready = true; applyState(); document.documentElement.dataset.grid = Math.round(performance.now()); });
  grid.on("dataSorted", sorters => { if (grid.ready && sorters.length && sorters[0].field !== "order") remember({sort: `${sorters[0].field}:${sorters[0].dir}`}); });
  grid.on("dataFiltered", (filtered, rows) => { document.getElementById("count").textContent = `${rows.length} of ${data.rows.length} runs`; });
  grid.on("renderComplete", headsByKey);
  const place = document.getElementById("grid");
  place.tabIndex = 0;
  place.setAttribute("aria-label", "Runs");
  place.addEventListener("keydown", keys);
}

const gridHeight = rows => Math.min(96 + 41 * rows, Math.max(320, Math.round(innerHeight * 0.72)));

function columnDefinitions() {
  const pin = {title: "", field: "pin", width: 34, frozen: true, headerSort: false, hozAlign: "center", formatter: cell => pinBox(cell.getRow().getData().id)};
  const shown = new Set(shownColumns());
  const own = data.columns.map((column, index) => ({
    title: column.title, field: column.key.replaceAll(".", "·"), visible: index === 0 || shown.has(column.key), frozen: index === 0, headerSortStartingDir: column.down ? "desc" : "asc",
    minWidth: index === 0 ? 110 : 68, width: index === 0 ? (innerWidth < 560 ? 132 : 220) : undefined, hozAlign: column.numeric ? "right" : "left", headerHozAlign: column.numeric ? "right" : "left",
    titleFormatter: () => head(column), accessor: undefined, cssClass: column.kind ? `kind-${column.kind.split(" ")[0]}` : "",
    formatter: cell => index === 0 ? runButton(cell.getRow().getData()) : column.key === "status" ? statusOf(cell.getRow().getData()) : cellText(cell.getRow().getData(), column.key),
    sorter: sorterOf(column),
  }));
  return [pin, ...own];
}

// What has no value stays last either way.
function sorterOf(column) {
  return (a, b, rowA, rowB, _, direction) => {
    const [x, y] = [rowA, rowB].map(row => row.getData().cells[column.key]?.s);
    if (x === undefined || y === undefined) return ((x === undefined) - (y === undefined)) * (direction === "asc" ? 1 : -1);
    return typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), undefined, {numeric: true});
  };
}

const statusOf = row => (row.status === "ok" ? "ok" : el("button", {type: "button", class: "run status", title: row.why || row.cells.status?.h, onclick: () => showRun(row.id)}, row.status));

function headsByKey() {  // headers sort by Enter too
  for (const title of document.querySelectorAll("#grid .tabulator-col.tabulator-sortable")) {
    if (title.tabIndex === 0) continue;
    title.tabIndex = 0;
    title.addEventListener("keydown", event => { if (event.key === "Enter") { event.stopPropagation(); title.click(); } });
  }
}

function applyState() {
  if (!grid?.ready) return;
  applyColumns();
  applyFilter();
  const [field, direction] = (state.sort || "").split(":");
  if (field && grid.getColumn(field)) grid.setSort(field, direction);
  else {
    grid.clearSort();
    const way = ranks();
    grid.setData([...data.rows].sort((a, b) => a.group - b.group || a.place[way] - b.place[way]));
  }
  grid.redraw(true);
}

function applyColumns() {
  const shown = new Set(shownColumns());
  for (const column of data.columns.slice(1)) {
    const its = grid.getColumn(column.key.replaceAll(".", "·"));
    if (its.isVisible() !== shown.has(column.key)) shown.has(column.key) ? its.show() : its.hide();
  }
}

function applyFilter() {
  if (!grid?.ready) return;
  const wanted = FACETS.map(([key]) => [key, listed(key)]).filter(([, chosen]) => chosen.length), find = (state.find || "").toLowerCase();
  grid.setFilter(row => wanted.every(([key, chosen]) => chosen.includes(row[key])) && (!find || `${row.called} ${row.model} ${row.key}`.toLowerCase().includes(find)));
}

// Keys of the grid: a row is "here", and moves.
let here = null;

function keys(event) {
  if (event.target.closest("input, select, summary, .tabulator-col")) return;
  const rows = grid.getRows("active").map(row => row.getData().id), at = rows.indexOf(here), step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (step) {
    const next = rows[Math.min(Math.max(at + step, 0), rows.length - 1)];
    moveTo(next);
  } else if (event.key === "Enter" && at >= 0 && event.target.tagName !== "BUTTON") showRun(here);
  else if (event.key === "p" && at >= 0) togglePin(here);
  else return;
  event.preventDefault();
}

function moveTo(id) {
  const before = here;
  here = id;
  for (const each of [before, here]) { const row = each === null ? null : grid.getRow(each); if (row) row.reformat(); }
  grid.scrollToRow(id, "nearest", false).catch(() => {});
}

function groupNotes() {
  const shown = data.groups.length > 12 ? data.groups.slice(0, 12) : data.groups, way = ranks();
  document.getElementById("notes").replaceChildren(el("h3", {}, "How to read these numbers"), ...shown.map((each, index) => {
    const made = el("details", {}, el("summary", {}, each.label));
    made.addEventListener("toggle", async () => {
      if (made.childElementCount > 1) return;
      const its = await whole(index);
      if (made.childElementCount === 1) made.append(el("p", {class: "caption"}, its.caption), list([...its.notes[way], ...its.not_ranked]), ...its.tests[way].map(testsOf));
    });
    made.open = data.groups.length === 1;
    return made;
  }),
    shown.length < data.groups.length ? el("p", {class: "hint"}, `and ${data.groups.length - shown.length} more groups; their notes are beside "What to ship", one group at a time`) : "");
}

function testsOf(tests) {
  const made = el("details", {class: "part paired"}, el("summary", {}, `Paired tests on ${tests.title}`));
  made.addEventListener("toggle", () => {  // their rows are made when they are asked for
    if (made.childElementCount > 1) return;
    made.append(list([tests.how, ...tests.verdicts]),
      plainTable(["ranked in", "difference", "Δ [95 %]", "p (Holm)", "p"], tests.rows.map(([row, apart]) => row.map(text => el("span", {class: apart ? "" : "inside"}, text)))),
      tests.left_out ? el("p", {class: "hint"}, `${tests.left_out} more: ditbench compare`) : "");
  });
  return made;
}
