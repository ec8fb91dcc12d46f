"use strict";
// What all views share: the data, elements, files that are loaded when they are shown, the state in the address, and plots.
document.getElementById("no-script").hidden = true;
const data = JSON.parse(document.getElementById("data").textContent);
const views = {};  // name → {title, build(section), update()}, in the order of the tabs

// Elements. Text is only ever set as text, so nothing in a record can become markup.
function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && typeof value !== "string") made[name] = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...shownOnly(children));
  return made;
}

const shownOnly = children => children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false);

const list = (lines, className = "notes") => el("ul", {class: className}, lines.map(line => el("li", {}, line)));

function plainTable(heads, rows, className = "") {
  const cell = (content, tag = "td") => el(tag, tag === "th" ? {scope: "col"} : {}, content);
  return el("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": "table"}, el("table", {class: className},
    heads.length ? el("thead", {}, el("tr", {}, heads.map(head => cell(head, "th")))) : null,
    el("tbody", {}, rows.map(row => el("tr", {}, row.map(text => cell(text)))))));
}

// Files: in the page, or in the folder beside it. A page on a disk may not fetch, but may run a script and show a picture.
const waiting = new Map(), arrived = new Map();
const ditbench = {loaded(name, value) { arrived.set(name, value); (waiting.get(name) || []).forEach(resolve => resolve(value)); }};
window.ditbench = ditbench;

function load(name) {
  if (name in data.files.inline) return Promise.resolve(data.files.inline[name]);
  if (arrived.has(name)) return Promise.resolve(arrived.get(name));
  return new Promise((resolve, reject) => {
    if (waiting.has(name)) { waiting.get(name).push(resolve); return; }
    waiting.set(name, [resolve]);
    const script = el("script", {src: beside(`${name}.js`)});
    script.onerror = () => { waiting.delete(name); reject(new Error(`${data.files.beside}/${name}.js is not beside this page`)); };
    document.head.append(script);
  });
}

const beside = name => `${encodeURIComponent(data.files.beside)}/${name}`;
const picture = name => data.files.inline[name] || beside(name);

// State: what is shown can be sent to somebody as an address.
const state = Object.create(null);

function readState() {
  for (const key of Object.keys(state)) delete state[key];
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) state[key] = value;
  if (!Object.hasOwn(views, state.view ?? "")) state.view = Object.keys(views)[0];
  if (!Object.hasOwn(data.groups, state.group ?? "") || state.group === "length") delete state.group;
  if (!["bits", "bytes"].includes(state.ranks)) delete state.ranks;
}

function remember(changes, asStep = false) {
  for (const [key, value] of Object.entries(changes)) {
    if (value === undefined || value === null || value === "") delete state[key]; else state[key] = String(value);
  }
  const hash = `#${new URLSearchParams(state)}`;
  if (asStep) location.hash = hash; else history.replaceState(null, "", hash);
}

const group = () => data.groups[state.group || 0];
// A group with what is loaded when it is looked at.
const whole = async index => (data.groups[index].answers ? data.groups[index] : Object.assign(data.groups[index], await load(data.groups[index].file)));
const ranks = () => state.ranks || data.at;
const listed = key => (state[key] ? state[key].split("|") : []);

function pick(label, options, value, onchange, id) {
  const select = el("select", {id, onchange: event => onchange(event.target.value)},
    options.map(([key, text]) => el("option", {value: String(key)}, text)));
  select.value = String(value);
  return el("label", {hidden: options.length < 2 && id !== "ranks"}, `${label} `, select);
}

function pickGroup() {
  const options = data.groups.map((each, index) => [index, each.label]);
  return pick("runs of", options, state.group || 0, value => { remember({group: value, metric: null, methods: null, by: null}); show(); });
}

// A menu of checkboxes that stays open while one chooses; nothing ticked means everything.
function menu(label, options, chosen, onchange) {
  const ticked = new Set(chosen);
  const count = el("span", {}, ticked.size ? ` (${ticked.size})` : "");
  const boxes = options.map(([key, text]) => el("label", {title: text}, el("input", {type: "checkbox", value: key, checked: ticked.has(key), onchange: event => {
    if (event.target.checked) ticked.add(key); else ticked.delete(key);
    count.textContent = ticked.size ? ` (${ticked.size})` : "";
    onchange([...ticked]);
  }}), ` ${text}`));
  return el("details", {class: "menu"}, el("summary", {}, label, count), el("div", {class: "options"}, boxes));
}

document.addEventListener("click", event => {
  for (const open of document.querySelectorAll("details.menu[open]")) if (!open.contains(event.target)) open.open = false;
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") for (const open of document.querySelectorAll("details.menu[open]")) open.open = false;
});

// Plots: figures come ready from Python; here they only get the page's colours. plotly is read when the first one is shown.
let plotted = false;
const shownPlots = new Map();

function color(name) {
  const probe = el("span", {style: `color: var(${name}); display: none`});
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

function draw(place, figure) {
  shownPlots.set(place, figure);
  if (!plotted) {
    plotted = true;
    document.head.append(el("script", {}, document.getElementById("plotly").textContent));
  }
  const line = color("--line"), axis = {gridcolor: line, linecolor: line, zeroline: false, automargin: true};
  const layout = {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", margin: {l: 56, r: 24, t: 24, b: 48},
    font: {family: "system-ui, sans-serif", size: 12, color: color("--ink")},
    hoverlabel: {bgcolor: color("--page"), bordercolor: line, font: {color: color("--ink")}},
    showlegend: false, ...figure.layout,
    xaxis: {...axis, ...figure.layout.xaxis}, yaxis: {...axis, ...figure.layout.yaxis},
  };
  Plotly.react(place, figure.data, layout, {responsive: true, displaylogo: false, displayModeBar: false});
}

const wholePage = new Promise(resolve => {  // plotly's text stands last in it
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", resolve); else resolve();
});

function drawLater(place, figure) {  // once the page has been laid out and shown
  wholePage.then(() => requestAnimationFrame(() => setTimeout(() => { if (place.isConnected) draw(place, figure); }, 0)));
}

const copyButton = text => el("button", {type: "button", class: "copy", onclick: event => {
  navigator.clipboard?.writeText(text).then(() => { event.target.textContent = "copied"; });
}}, "copy");
