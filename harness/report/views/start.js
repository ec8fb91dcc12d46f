// Tabs, theme and the first view. Each view is built when it is first shown.
const main = document.getElementById("main"), tabs = document.getElementById("views");

for (const [name, view] of Object.entries(views)) {
  const go = () => { remember({view: name}, true); };
  tabs.append(el("button", {type: "button", role: "tab", id: `tab-${name}`, "aria-controls": name, onclick: go}, view.title));
  main.append(el("section", {id: name, role: "tabpanel", "aria-labelledby": `tab-${name}`, hidden: true}));
}
tabs.addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step) return;
  const all = [...tabs.children], next = all[(all.indexOf(document.activeElement) + step + all.length) % all.length];
  next.focus();
  next.click();
});

let shows = 0;

async function show() {
  for (const [name, view] of Object.entries(views)) {
    const section = document.getElementById(name), isShown = name === state.view;
    section.hidden = !isShown;
    const tab = document.getElementById(`tab-${name}`);
    tab.setAttribute("aria-selected", isShown);
    tab.tabIndex = isShown ? 0 : -1;
    if (!isShown) continue;
    if (!view.built) { view.built = true; view.build?.(section); }
    const asked = ++shows;
    if (view.needsGroup) {
      try { await whole(state.group || 0); } catch (error) { section.replaceChildren(el("p", {class: "empty"}, error.message)); return; }
    }
    if (asked !== shows) return;  // something else was asked for meanwhile
    view.update(section);
    document.documentElement.dataset.shown ??= Math.round(performance.now());
  }
}

const {ok, failed, skipped} = data.counts, some = [failed && `${failed} failed`, skipped && `${skipped} skipped`].filter(Boolean);
document.getElementById("lead").append(`Post-training quantization of diffusion transformers under one protocol: ${ok} run${ok === 1 ? "" : "s"}`,
  some.length ? ", " : "", some.length ? el("a", {href: "#view=trust"}, some.join(", ")) : "", ".");

document.getElementById("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.body).colorScheme === "dark" || (getComputedStyle(document.body).colorScheme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.style.colorScheme = dark ? "light" : "dark";
  redrawPlots();
});

function redrawPlots() {
  for (const [place, figure] of shownPlots) if (place.isConnected) draw(place, figure); else shownPlots.delete(place);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawPlots);
addEventListener("hashchange", () => { readState(); show(); });
readState();
show();
