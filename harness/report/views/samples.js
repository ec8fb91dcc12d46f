// Samples: per prompt or class the float model's beside every chosen run's, what differs, those first that suffered most.
const MOST_CHOSEN = 4;

views.samples = {
  title: "Samples",
  needsGroup: true,
  update(section) {
    const gallery = group().gallery;
    section.replaceChildren(el("div", {class: "controls"}, pickGroup()));
    if (!gallery) { section.append(el("p", {class: "empty"}, "No quantized run here kept samples.")); return; }
    const known = Object.keys(gallery.runs).map(Number), chosen = chosenRuns(known);
    const controls = section.firstElementChild;
    const again = changes => { remember(changes); show(); };
    controls.append(menu("runs", known.map(id => [String(id), data.rows[id].called]), chosen.map(String), ids => again({methods: ids.map(id => data.rows[id].key).join("|")})));
    const withSamples = chosen.filter(id => gallery.runs[id].pictures);
    if (withSamples.length) {
      const metrics = Object.keys(gallery.runs[withSamples[0]].values), by = metrics.includes(state.by) ? state.by : gallery.by;
      const worstOf = withSamples.includes(rowOf(state.worst)) ? rowOf(state.worst) : withSamples[0];
      controls.append(
        pick("worst first for", [...withSamples.map(id => [data.rows[id].key, data.rows[id].called]), ["none", "(as drawn)"]], state.worst === "none" ? "none" : data.rows[worstOf].key, key => again({worst: key}), "worst"),
        pick("by", metrics.map(name => [name, name]), by, name => again({by: name}), "by"),
        pick("zoom", [["0.5", "½ ×"], ["1", "1 ×"], ["2", "2 ×"], ["4", "4 ×"], ["8", "8 ×"]], zoom(gallery), value => again({zoom: value}), "zoom"),
        el("label", {}, el("input", {type: "checkbox", id: "difference", checked: state.difference === "on", onchange: event => again({difference: event.target.checked ? "on" : null})}), " difference to float, brightness × 4"));
      if (gallery.video) controls.append(player(gallery.video));
      section.append(el("p", {class: "hint"}, `${gallery.samples.length} of ${gallery.of} samples: the first few, and of every run those with the worst ${gallery.by || "values"}. Same prompt, noise and seed in a row (samples that somebody else drew: the same prompt). ✗: the metrics of yes or no that went against a sample. A click shows one at full size.`));
      section.append(...order(gallery, worstOf, by).map(index => sampleRow(gallery, index, withSamples)));
    }
    for (const id of chosen.filter(each => !gallery.runs[each].pictures)) section.append(overviewOf(id, gallery.runs[id]));
  },
};

const rowOf = key => data.rows.findIndex(row => row.key === key);

function chosenRuns(known) {
  const asked = listed("methods").map(rowOf).filter(id => known.includes(id));
  if (asked.length) return asked;
  const pinned = pins().filter(id => known.includes(id));
  if (pinned.length) return pinned;
  const found = known.filter(id => data.rows[id].bits === group().gallery.first);
  return (found.length ? found : known).slice(0, MOST_CHOSEN);
}

function zoom(gallery) {
  if (state.zoom) return state.zoom;
  const side = gallery.video?.width || gallery.side || 0;
  return side && side >= 256 ? "0.5" : "4";
}

function order(gallery, id, by) {
  const places = gallery.samples.map((_, index) => index), values = gallery.runs[id].sort[by];
  if (state.worst === "none" || !values) return places;
  const sign = gallery.better[by] === "lower" ? -1 : 1;
  const key = index => (values[index] === null ? Infinity : sign * values[index]);
  return places.sort((a, b) => key(a) - key(b));
}

function sampleRow(gallery, index, chosen) {
  const sample = gallery.samples[index];
  const cell = (title, id, name, reference, lines, fails) => el("figure", {}, shownPicture(gallery, name, null),
    state.difference === "on" && reference ? shownPicture(gallery, name, reference) : null,
    el("figcaption", {}, el("b", {title}, title), lines.map(line => el("span", {}, line)), fails.length ? el("span", {class: "fails"}, `✗ ${fails.join(", ")}`) : null));
  const first = gallery.runs[chosen[0]];
  return el("div", {class: "sample"}, el("p", {class: "about"}, el("b", {}, `#${sample.row}`), ` ${sample.about} `, el("small", {}, `seed ${sample.seed}`)),
    el("div", {class: "pictures"}, cell("float model", null, first.float[index], null, [], []),
      chosen.map(id => {
        const its = gallery.runs[id];
        return cell(data.rows[id].called, id, its.pictures[index], its.float[index], Object.entries(its.values).slice(0, 4).map(([name, values]) => `${name} ${values[index]}`), its.fails[index]);
      })));
}

// A picture, or what it differs in: one laid over the other, so that nothing has to be read back from a file.
function shownPicture(gallery, name, reference) {
  if (!name) return el("p", {class: "empty"}, "cannot be read");
  if (gallery.video) return videoOf(gallery.video, name, reference, Number(zoom(gallery)));
  const image = (which, extra) => {
    const made = el("img", {src: picture(which), loading: "lazy", class: extra, alt: reference ? "difference to the float model's" : "sample"});
    const size = () => { if (!gallery.side) gallery.side = made.naturalWidth; made.style.width = `${made.naturalWidth * Number(zoom(gallery))}px`; };
    made.addEventListener("load", size);
    return made;
  };
  if (!reference) return el("button", {type: "button", class: "bare", "aria-label": "show at full size", onclick: () => enlarge(name)}, image(name, "pixels"));
  return el("div", {class: "difference"}, image(reference, "pixels"), image(name, "pixels over"));
}

function enlarge(name) {
  const large = el("img", {src: picture(name), class: "pixels", alt: "sample at full size"});
  const scale = value => { large.style.width = `${large.naturalWidth * value}px`; };
  const fit = () => Math.max(1, Math.floor(Math.min(innerWidth * 0.85 / large.naturalWidth, innerHeight * 0.75 / large.naturalHeight)));
  const slider = el("input", {type: "range", min: "1", max: "32", value: "1", "aria-label": "zoom", oninput: event => scale(Number(event.target.value))});
  large.addEventListener("load", () => { slider.value = fit(); scale(fit()); });
  openDialog("Sample", el("label", {}, "zoom ", slider), el("div", {class: "scroll large"}, large));
}

function overviewOf(id, its) {
  const one = (title, found) => found && el("figure", {}, found.picture ? el("img", {src: picture(found.picture), class: "overview", loading: "lazy", alt: `overview of ${title}`}) : el("p", {class: "empty"}, found.problem),
    el("figcaption", {}, el("b", {}, title), found.reduced ? " (scaled down)" : ""));
  return el("div", {class: "sample"}, its.why ? el("p", {class: "hint"}, its.why) : null, el("div", {class: "pictures"}, one("float model", its.float_overview), one(data.rows[id].called, its.overview)));
}

// Videos: one picture holds all frames; one clock moves all of them.
const clock = {frame: 0, runs: true, places: [], timer: null};

function videoOf(video, name, reference, scale) {
  const canvas = el("canvas", {width: video.width, height: video.height, class: reference ? "pixels amplified" : "pixels", role: "img", "aria-label": "video"});
  canvas.style.width = `${video.width * scale}px`;
  const sheet = which => { const image = new Image(); image.src = picture(which); image.onload = () => paint(place); return image; };
  const place = {canvas, video, sheets: [...(reference ? [sheet(reference)] : []), sheet(name)]};
  clock.places.push(place);
  return canvas;
}

function paint({canvas, video, sheets}) {
  const pen = canvas.getContext("2d"), frame = clock.frame % video.frames, {width, height} = video;
  sheets.forEach((sheet, layer) => {
    if (!sheet.complete) return;
    pen.globalCompositeOperation = layer ? "difference" : "source-over";
    pen.drawImage(sheet, (frame % video.columns) * width, Math.floor(frame / video.columns) * height, width, height, 0, 0, width, height);
  });
}

function player(video) {
  clearInterval(clock.timer);
  clock.places = [];
  const position = el("input", {type: "range", id: "frame", min: "0", max: String(video.frames - 1), value: String(clock.frame % video.frames), "aria-label": "frame", oninput: event => { clock.runs = false; to(Number(event.target.value)); }});
  const to = frame => { clock.frame = frame % video.frames; position.value = clock.frame; clock.places.forEach(paint); };
  clock.timer = setInterval(() => { if (clock.runs && !document.hidden && position.isConnected) to(clock.frame + 1); }, 1000 / video.fps);
  return el("span", {class: "player"}, el("button", {type: "button", id: "play", onclick: () => { clock.runs = !clock.runs; }}, "play / pause"), position);
}
