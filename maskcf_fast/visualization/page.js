"use strict";

// Selection, the same as maskcf_fast.select_patches: in float32, strictly above the threshold, ties to the lower index.

function usable(cam) {
  return cam.every(Number.isFinite) ? cam : new Float32Array(cam.length);
}

function selectByThreshold(cam, threshold, region) {
  cam = usable(cam);
  const most = cam.reduce((a, b) => Math.max(a, b), -Infinity);
  const scale = Math.fround(most + Math.fround(1e-8));
  const cut = Math.fround(threshold);
  return Array.from(cam, (x) => Math.fround(x / scale) > cut === (region === "object"));
}

function selectTopK(cam, k, region) {
  cam = usable(cam);
  const sign = region === "object" ? -1 : 1;
  const order = Array.from(cam.keys()).sort((a, b) => sign * (cam[a] - cam[b]) || a - b);
  const mask = new Array(cam.length).fill(false);
  for (const patch of order.slice(0, k)) mask[patch] = true;
  return mask;
}

function selectRandom(noise, rate, exactly) {
  if (exactly) return selectTopK(noise, noise.length - Math.trunc(noise.length * (1 - rate)), "context");
  return Array.from(noise, (x) => x < Math.fround(rate));
}

// What the page shows: a strategy's own cut, unless a slider was moved.

function effectiveCut(strategy, state) {
  if (strategy.region === "random") return { rate: state.rate ?? strategy.rate };
  return state.cut ?? (strategy.top_k === null ? { threshold: strategy.threshold } : { topK: strategy.top_k });
}

function patchMask(strategy, image, state) {
  const cut = effectiveCut(strategy, state);
  if (cut.rate !== undefined) return selectRandom(image.noise, cut.rate, strategy.exactly);
  if (cut.topK !== undefined) return selectTopK(image.cam, cut.topK, strategy.region);
  return selectByThreshold(image.cam, cut.threshold, strategy.region);
}

function describeCut(strategy, state) {
  const cut = effectiveCut(strategy, state);
  if (cut.rate !== undefined) return `rate ${cut.rate}`;
  if (cut.topK !== undefined) return `${strategy.region === "object" ? "highest" : "lowest"} ${cut.topK}`;
  return `score ${strategy.region === "object" ? ">" : "≤"} ${cut.threshold}`;
}

// Drawing.

function eachMasked(page, mask, draw) {
  const side = page.size / page.grid;
  mask.forEach((masked, patch) => {
    if (masked) draw((patch % page.grid) * side, Math.floor(patch / page.grid) * side, side, patch);
  });
}

function paintMask(canvas, page, image, mask) {
  const context = canvas.getContext("2d");
  context.globalAlpha = 1;
  context.fillStyle = "rgb(128 128 128)";
  context.fillRect(0, 0, page.size, page.size);
  context.globalAlpha = 0.45;
  context.drawImage(image.element, 0, 0);
  context.globalAlpha = 1;
  context.fillStyle = page.maskColour;
  eachMasked(page, mask, (x, y, side) => context.fillRect(x, y, side, side));
}

function paintFilled(canvas, page, image, mask, strategy) {
  const context = canvas.getContext("2d");
  const { donors, element } = image.fills[strategy.fill];
  context.drawImage(image.element, 0, 0);
  eachMasked(page, mask, (x, y, side, patch) => {
    const from = donors ? page.images[donors[patch]].element : element;
    if (from) context.drawImage(from, x, y, side, side, x, y, side, side);
    else context.clearRect(x, y, side, side);
  });
}

// Reading the data.

function numbers(text, Kind) {
  return new Kind(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

function picture(source) {
  return Object.assign(new Image(), { src: source });
}

function readPage(data) {
  for (const image of data.images) {
    image.cam = numbers(image.cam, Float32Array);
    image.noise = numbers(image.noise, Float32Array);
    image.element = picture(image.source);
    for (const fill of Object.values(image.fills)) {
      if (fill.donors) fill.donors = Array.from(numbers(fill.donors, Uint16Array));
      if (fill.picture) fill.element = picture(fill.picture);
    }
  }
  return data;
}

// The images change places in what was drawn. What holds of it stays, such as that no image is its own donor.
function redraw(images) {
  const places = [...images.keys()];
  for (let i = places.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [places[i], places[j]] = [places[j], places[i]];
  }
  const drawn = images.map(({ fills, noise }) => ({ fills: { ...fills }, noise }));
  drawn.forEach(({ fills, noise }, n) => {
    const image = images[places[n]];
    image.noise = noise;
    for (const [name, { donors }] of Object.entries(fills)) {
      if (donors) image.fills[name] = { donors: donors.map((donor) => places[donor]) };
    }
  });
}

// The page itself.

function clone(id) {
  return document.getElementById(id).content.firstElementChild.cloneNode(true);
}

function element(tag, text, name) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

function makeCard(page, image, n) {
  const card = clone("card");
  card.querySelector("h2").textContent = `${n + 1} · ${image.name}`;
  const verdict = card.querySelector(".verdict");
  const share = `${image.prediction} (${(100 * image.probability).toFixed(0)} %)`;
  if (image.label === null) {
    verdict.append(`predicted ${share}; the map explains this prediction`);
  } else {
    const right = image.label === image.prediction;
    verdict.append(`class ${image.label}, which the map explains; predicted `);
    verdict.append(element("span", `${share} ${right ? "✓" : "✗"}`, right ? "right" : "wrong"));
  }
  card.querySelector(".source").src = image.source;
  const heat = card.querySelector(".heat");
  heat.src = image.heat;
  const readout = card.querySelector(".readout");
  const scores = image.cam.map((x) => x / (Math.max(...image.cam) + 1e-8));
  heat.addEventListener("pointermove", (event) => {
    const side = heat.clientWidth / page.grid;
    const at = (offset) => Math.min(page.grid - 1, Math.max(0, Math.floor(offset / side)));
    const [row, column] = [at(event.offsetY), at(event.offsetX)];
    readout.textContent = `row ${row + 1}, column ${column + 1}: ${scores[row * page.grid + column].toFixed(2)}`;
  });
  heat.addEventListener("pointerleave", () => { readout.textContent = "map"; });
  const pairs = page.strategies.map((strategy) => {
    const figure = clone("pair");
    figure.querySelector("b").textContent = strategy.name;
    for (const canvas of figure.querySelectorAll("canvas")) canvas.width = canvas.height = page.size;
    card.querySelector(".made").append(figure);
    return figure;
  });
  return { card, pairs, image, visible: true, stale: true };
}

function drawCard(page, entry, state) {
  page.strategies.forEach((strategy, i) => {
    const figure = entry.pairs[i];
    figure.hidden = state.hiddenStrategies.has(strategy.name);
    if (figure.hidden) return;
    const mask = patchMask(strategy, entry.image, state);
    const count = mask.filter(Boolean).length;
    const [maskCanvas, filled] = figure.querySelectorAll("canvas");
    paintMask(maskCanvas, page, entry.image, mask);
    paintFilled(filled, page, entry.image, mask, strategy);
    const donors = new Set(entry.image.fills[strategy.fill].donors);
    const donor = donors.size === 1 ? ` · from ${[...donors][0] + 1}` : "";
    const words = `${describeCut(strategy, state)} · ${count} of ${mask.length}`;
    figure.querySelector("span").textContent = words + donor;
    maskCanvas.setAttribute("aria-label", `${strategy.name}: ${words} patches masked`);
    filled.setAttribute("aria-label", `${strategy.name}: counterfactual image${donor}`);
  });
  entry.stale = false;
}

async function start() {
  const page = readPage(JSON.parse(document.getElementById("data").textContent));
  const patches = page.grid * page.grid;
  const state = { cut: null, rate: null, hiddenStrategies: new Set() };
  const byId = (id) => document.getElementById(id);
  document.body.classList.toggle("small", page.size < 160);
  for (const [name, value] of Object.entries(page.facts)) {
    const fact = document.createElement("div");
    fact.append(element("dt", name), element("dd", value));
    byId("facts").append(fact);
  }
  const entries = page.images.map((image, n) => makeCard(page, image, n));
  byId("images").append(...entries.map((entry) => entry.card));
  const elements = page.images.flatMap((image) => [image, ...Object.values(image.fills)].map((each) => each.element));
  await Promise.all(elements.filter(Boolean).map((element) => element.decode()));

  // All is drawn once; while a slider moves, only what is in view, and the rest when it comes into view.
  const refresh = () => {
    for (const entry of entries) {
      entry.stale = true;
      if (entry.visible) drawCard(page, entry, state);
    }
    const shown = (id, value) => {
      byId(`${id}-value`).textContent = value ?? "own";
      byId(id).parentElement.classList.toggle("active", value !== undefined && value !== null);
    };
    shown("threshold", state.cut?.threshold);
    shown("top-k", state.cut?.topK);
    shown("rate", state.rate);
    byId("own").disabled = state.cut === null && state.rate === null;
  };
  const watcher = new IntersectionObserver((changes) => {
    for (const change of changes) {
      const entry = entries.find((candidate) => candidate.card === change.target);
      entry.visible = change.isIntersecting;
      if (entry.visible && entry.stale) drawCard(page, entry, state);
    }
  }, { rootMargin: "300px" });
  entries.forEach((entry) => watcher.observe(entry.card));

  byId("top-k").max = patches;
  byId("top-k").value = Math.round(patches / 4);
  const set = (change) => (event) => { change(Number(event.target.value)); refresh(); };
  byId("threshold").addEventListener("input", set((value) => { state.cut = { threshold: value }; }));
  byId("top-k").addEventListener("input", set((value) => { state.cut = { topK: value }; }));
  byId("rate").addEventListener("input", set((value) => { state.rate = value; }));
  byId("own").addEventListener("click", () => { state.cut = state.rate = null; refresh(); });
  byId("redraw").addEventListener("click", () => { redraw(page.images); refresh(); });
  byId("redraw").hidden = page.images.length < 2;
  for (const strategy of page.strategies) {
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: true });
    box.addEventListener("change", () => {
      state.hiddenStrategies[box.checked ? "delete" : "add"](strategy.name);
      refresh();
    });
    label.append(box, strategy.name);
    byId("chips").append(label);
  }
  refresh();
  return { page, entries, state };
}

if (typeof document !== "undefined") globalThis.started = start();
