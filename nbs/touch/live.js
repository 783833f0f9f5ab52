// A DETR to play with: shapes that one draws and moves, and the model's answer, layer by layer.
// The model, the drawing of shapes and the weights come from `_static/live`, as they are too large for a page.
import {
  assign, button, choice, clamp, corners, fixed, handle, html, inkOn, overlap, set, slider, softmax, stage, sum, svg,
} from "./touch.js";

const CELL = 16, SURE = 0.5;  // pixels of a cell; from which score on a query's box is drawn
const GLYPHS = {  // outlines of radius one, as chapter 4 defines them
  disc: "M1 0A1 1 0 0 1-1 0A1 1 0 0 1 1 0Z",
  rectangle: "M-.75-.75H.75V.75H-.75Z",
  triangle: "M.866.5H-.866L0-1Z",
  star: `M${[...Array(10).keys()].map((i) => [i % 2 ? 0.45 : 1, i * Math.PI / 5])
    .map(([r, a]) => [r * Math.sin(a), r * Math.cos(a)].map((x) => x.toFixed(3)).join(" ")).join("L")}Z`,
  ring: "M1 0A1 1 0 0 1-1 0A1 1 0 0 1 1 0ZM.46 0A.46 .46 0 0 0-.46 0A.46 .46 0 0 0 .46 0Z",
  cross: "M-.95-.3H-.3V-.95H.3V-.3H.95V.3H.3V.95H-.3V.3H-.95Z",
};
const STYLE = `
.live > .live-left { flex: 1.7 1 21rem; max-width: 44rem; }
.live > .live-right { flex: 1 1 15rem; }
.live-picture { position: relative; border-radius: .35rem; overflow: hidden; background: #888; touch-action: none; }
.live-picture > canvas { display: block; width: 100%; height: auto; }
.live-picture > .live-veil, .live-picture > svg { position: absolute; inset: 0; height: 100%; }
.live-picture > .live-veil { pointer-events: none; opacity: .82; }
.live-picture svg { overflow: hidden; touch-action: none; cursor: crosshair; }
.live-picture svg .touch-handle { cursor: move; fill: transparent; stroke: transparent; pointer-events: all; }
.live-picture svg .touch-handle:focus-visible { outline: none; stroke: var(--mark); stroke-width: 2px; }
.live-picture svg .live-chosen, .live-picture svg .live-chosen:focus-visible {
  stroke: #fff; stroke-dasharray: 5 3; stroke-width: 2px; }
.live-picture svg .live-grip { fill: #fff; stroke: #000; stroke-width: .6; cursor: grab; }
.live-picture svg .live-cell { pointer-events: none; stroke: #fff; stroke-width: 1.2; }
.live-boxes rect, .live-boxes text, .live-boxes path, .live-boxes circle { pointer-events: none; }
.live-boxes text { font-size: 4.8px; font-weight: 600; }
.live-boxes .live-letter { fill: #fff; stroke: #000; stroke-width: 1.4px; paint-order: stroke; text-anchor: middle; }
.live-stepping rect { transition: x .45s, y .45s, width .45s, height .45s; }
.live .touch-row { gap: .35rem; justify-content: center; }
.live .touch-row button { flex: 0 1 auto; min-width: 2.5rem; padding: .25rem .45rem; }
.live-layers { display: grid; grid-template-columns: 1fr auto; gap: .6rem; align-items: center; margin-bottom: .3rem; }
.live-layers .touch-slider { grid-template-columns: auto 1fr auto; }
.live .touch-row button svg { width: 1.35rem; height: 1.35rem; display: block; margin: auto; fill: currentColor; }
.live button[aria-pressed="true"] { background: var(--ink); color: var(--paper); border-color: var(--ink); }
.live button:disabled { opacity: .55; }
.live-begin .touch-choice { grid-template-columns: auto auto; }
.live .live-begin select { max-width: 9rem; padding: .3rem .4rem; }
@media (max-width: 600px) {
  .live > .live-left { display: contents; }
  .live > .live-left > * { flex: 1 1 100%; margin: 0; }
  .live > .live-left > .live-picture { position: sticky; top: 3.6rem; z-index: 2; }
  .live.touch-view { gap: .5rem; }
}
.output.text_html:has(> .touch > .live) { overflow: visible; }
.live-tabs { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; margin-bottom: .6rem; }
.live-tabs button { border-radius: 0; padding: .35rem .2rem; margin-left: -1px; }
.live .live-queries button { display: grid; grid-template-columns: 1.4rem 4.9rem 1fr 2.8rem; gap: .35rem;
  align-items: center; width: 100%; min-height: 1.62rem; padding: 0 .45rem; text-align: left;
  border: 1px solid transparent; background: none;
  font-size: .85rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.live .live-queries button:hover { border-color: var(--line); }
.live .live-queries button[aria-pressed="true"] { border-color: var(--ink); background: var(--panel);
  color: var(--ink); }
.live-queries span:first-child, .live-queries span:last-child { text-align: right; }
.live-queries .live-quiet { color: var(--quiet); }
.live-bar { height: .7rem; background: var(--panel); border-radius: .2rem; overflow: hidden; }
.live-bar i { display: block; height: 100%; border-radius: .2rem; transition: width .15s; }
.live-shares { display: grid; grid-template-columns: 6.4rem 1fr 2.9rem; gap: .15rem .5rem; align-items: center;
  font-size: .85rem; font-variant-numeric: tabular-nums; }
.live-shares span:nth-child(3n) { text-align: right; }
.live-shares .live-bar { position: relative; overflow: visible; }
.live-bar b { position: absolute; top: -.15rem; bottom: -.15rem; width: 2px; background: var(--ink); }
.live-costs .live-letter { fill: #fff; stroke: #000; stroke-width: 1px; paint-order: stroke; font-weight: 600; }
.live-costs text { font-size: 3.8px; }
.live-costs .touch-handle { fill: transparent; stroke: var(--mark); stroke-width: .8; cursor: crosshair; }
.live [hidden] { display: none !important; }
@media (prefers-reduced-motion: reduce) { .live-stepping rect, .live-bar i { transition: none; } }`;

const percent = (share) => `${Math.round(100 * share)}\u202f%`;
const glyph = (kind, attributes = {}) => svg("path", { d: GLYPHS[kind], "fill-rule": "evenodd", ...attributes });
const icon = (...parts) => svg("svg", { viewBox: "-1.15 -1.15 2.3 2.3", "aria-hidden": "true" }, ...parts);
const named = (label, press, ...content) => {
  const node = html("button", { type: "button", "aria-label": label, title: label, onclick: press });
  node.append(...content);
  return node;
};

/** A script of another file; a page that lies on a disk may load it so, and may not fetch it. */
const load = (src) => new Promise((done, failed) => {
  const onerror = () => failed(new Error(`${src} cannot be read`));
  document.head.append(html("script", { src, onload: done, onerror }));
});

/** The model: ask(pixels, width, height) gives a promise of the answer, from a worker where there can be one. */
async function open(base) {
  await Promise.all(["detr.js", "weights.js"].map((name) => load(base + name)));
  const { liveDetr, liveWeights } = window;
  try {
    const program = new Blob([`(${liveDetr})().serve()`], { type: "text/javascript" });
    const worker = new Worker(URL.createObjectURL(program)), waiting = [];
    worker.onmessage = ({ data }) => waiting.shift()[data.error ? 1 : 0](data);
    worker.onerror = () => waiting.splice(0).forEach(([, failed]) => failed({ error: "the worker stopped" }));
    const send = (message) => new Promise((done, failed) => {
      waiting.push([done, failed]);
      worker.postMessage(message);
    });
    await send({ packed: liveWeights });
    return (pixels, width, height) => send({ pixels, width, height });
  } catch {  // no workers here: the page waits while the model looks
    const { unpack, build } = liveDetr(), model = build(await unpack(liveWeights));
    return async (pixels, width, height) => {
      const start = performance.now();
      return { ...model(pixels, width, height), milliseconds: performance.now() - start };
    };
  }
}

/** Scenes to begin with, by name. */
function scenes({ randomScene, randomShape, generator }, width, height) {
  const empty = (seed) => randomScene(seed, width, height, 0);
  const put = (scene, seed, ...poses) => {
    for (const [kind, x, y, radius, angle = 0.3, aspect = 0.95] of poses) {
      scene.shapes.push(randomShape(scene, { kind, x, y, radius, angle, aspect }, generator(seed += 1)));
    }
    return scene;
  };
  return {
    "five shapes": () => put(empty(237), 237, ["ring", 34, 34, 21, 0.4, 0.85], ["star", 84, 26, 17, 0.2, 1],
      ["rectangle", 118, 58, 19, 0.5, 0.8], ["disc", 46, 80, 19, 0.3, 0.8], ["triangle", 72, 84, 17, 0.5, 1]),
    "one star": () => put(empty(5), 11, ["star", 30, 56, 17]),
    "a ring, half covered": () => put(empty(23), 3, ["ring", 62, 58, 25], ["rectangle", 96, 62, 24, 0.1]),
    "two discs": () => put(empty(31), 40, ["disc", 46, 56, 18], ["disc", 100, 56, 18]),
    "five stars": () => put(empty(12), 60, ["star", 24, 30, 14], ["star", 56, 76, 16, 1], ["star", 76, 30, 15, 0.6],
      ["star", 108, 72, 18, 0], ["star", 122, 26, 13, 1.2]),
    "empty ground": () => empty(44),
  };
}


/** What the page knows and shows, once the model is there. */
function play(view, data, say, ask) {
  const { width, height, names, colors } = data, kinds = Object.keys(GLYPHS), artist = window.liveScene();
  const presets = scenes(artist, width, height), columns = width / CELL, rows = height / CELL;
  const state = {
    scene: presets["five shapes"](), seed: 1, chosen: -1, pen: "star",  // the place of the chosen shape; what is drawn
    tab: "answers", layer: data.layers - 1, query: -1, held: -1,  // a query that is pointed at, one that was pressed
    encoderLayer: 0, head: 0, cell: [4, 3], pair: [0, 0],  // column and row; shape and query
    painted: null, answer: null, settled: false,
  };
  view.live = state;

  // ---- the picture

  const canvas = html("canvas", { width, height, "aria-hidden": "true" }), pen = canvas.getContext("2d");
  const veil = html("canvas", { width: columns, height: rows, class: "live-veil", "aria-hidden": "true" });
  const ground = svg("rect", { width, height, fill: "transparent" }), boxes = svg("g", { class: "live-boxes" });
  const shapes = svg("g"), grip = svg("circle", { r: 4, class: "live-grip" });
  const cell = svg("rect", { width: CELL, height: CELL, class: "live-cell", fill: "none" });
  const over = stage(width, height, "The picture: shapes to move", ground, boxes, shapes, cell, grip);
  const picture = html("div", { class: "live-picture" }, canvas, veil, over);
  const chosen = () => state.scene.shapes[state.chosen];

  let frame = 0, busy = false, dirty = false;
  function changed() {  // draw at the next frame, and ask the model as soon as it is free
    state.settled = false;
    frame = frame || requestAnimationFrame(() => {
      frame = 0;
      state.painted = artist.paint(state.scene);
      pen.putImageData(new ImageData(state.painted.pixels, width, height), 0, 0);
      placeShapes();
      look();
    });
  }
  async function look() {
    dirty = true;
    if (busy) return;
    busy = true;
    while (dirty) {
      dirty = false;
      const { painted, scene } = state, shapesThen = scene.shapes.map(({ kind }) => kind);
      try {
        state.answer = read(await ask(painted.pixels, width, height), painted, shapesThen);
      } catch (fault) {
        clock.textContent = `The model stopped (${fault.error || fault.message}): load the page again.`;
        return;
      }
      show();
    }
    busy = false;
    state.settled = true;
    say(summary());
  }

  /** What each query says of one layer: the shares of the classes, the best one that is an object, the box. */
  function readQueries(logits, boxesThen) {
    const classes = names.length + 1;
    return [...Array(data.queries).keys()].map((query) => {
      const shares = softmax([...logits.subarray(query * classes, (query + 1) * classes)]);
      const things = shares.slice(0, -1), score = Math.max(...things);
      return { shares, score, label: things.indexOf(score), box: [...boxesThen.subarray(4 * query, 4 * query + 4)] };
    });
  }
  /** Chapter 14's cost of a query for a shape: class, distance and overlap with DETR's weights 1, 5 and 2. */
  function costOf({ shares, box }, target) {
    const [x1, y1, x2, y2] = target.corners, wanted = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1];
    const terms = [-shares[kinds.indexOf(target.kind)], 5 * sum(wanted.map((value, i) => Math.abs(value - box[i]))),
      -2 * overlap(corners(box), target.corners).giou];
    return { terms, total: sum(terms) };
  }
  /** An answer with the queries, costs and assignment of each layer, and the share of each cell that a shape owns. */
  function read(answer, { boxes: seen, owner }, shapesThen) {
    const targets = seen.flatMap((box, index) => (box ? [{
      index, kind: shapesThen[index], corners: box.map((value, side) => value / (side % 2 ? height : width)),
    }] : []));
    const layers = answer.logits.map((logits, layer) => {
      const queries = readQueries(logits, answer.boxes[layer]);
      const costs = targets.map((target) => queries.map((query) => costOf(query, target)));
      return { queries, costs, matched: assign(costs.map((row) => row.map(({ total }) => total))) };
    });
    const inside = [...Array(shapesThen.length + 1)].map(() => new Float32Array(rows * columns));
    owner.forEach((who, i) => {
      const column = Math.floor(i % width / CELL), row = Math.floor(Math.floor(i / width) / CELL);
      inside[who][row * columns + column] += 1 / CELL ** 2;
    });
    return { ...answer, layers, targets, inside, kinds: shapesThen };
  }
  const layerNow = () => state.answer.layers[state.layer];

  // ---- shapes: handles, drawing, buttons

  const pathOf = new Map();
  function placeShapes() {
    state.scene.shapes.forEach((shape, index) => {
      const { x, y, radius, aspect, angle } = shape, path = pathOf.get(shape), degrees = angle * 180 / Math.PI;
      set(path, { "vector-effect": "non-scaling-stroke",
        transform: `translate(${x} ${y}) rotate(${degrees}) scale(${radius} ${radius * aspect})` });
      path.classList.toggle("live-chosen", index === state.chosen);
    });
    const shape = chosen();
    set(grip, { visibility: shape ? null : "hidden" });
    if (shape) set(grip, { cx: clamp(shape.x + shape.radius * Math.cos(shape.angle), 3, width - 3),
      cy: clamp(shape.y + shape.radius * Math.sin(shape.angle), 3, height - 3) });
    forChosen.forEach((node) => { node.disabled = !shape; });
  }
  const tellOf = ({ x, y, radius }) =>
    `${Math.round(x)} across, ${Math.round(y)} down, ${Math.round(2 * radius)} large`;
  function relist() {  // when shapes came or went, or changed their order
    pathOf.clear();
    shapes.replaceChildren(...state.scene.shapes.map((shape) => {
      const path = glyph(shape.kind);
      pathOf.set(shape, path);
      handle(path, { label: shape.kind, step: 2, get: () => [shape.x, shape.y], say: () => tellOf(shape),
        now: () => 100 * shape.x / width,
        put: ([x, y]) => {
          Object.assign(shape, { x: clamp(x, 0, width), y: clamp(y, 0, height) });
          changed();
        } });
      path.addEventListener("focus", () => pick(shape));
      path.addEventListener("keydown", (event) => {
        const act = KEYS[event.key];
        if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        pick(shape);
        act();
      });
      return path;
    }));
    changed();
  }
  function pick(shape) {
    state.chosen = state.scene.shapes.indexOf(shape);
    placeShapes();
  }
  const edit = (change) => () => {
    const shape = chosen();
    if (!shape) return;
    change(shape);
    changed();
  };
  const resize = (shape, to) => { shape.radius = clamp(to, 8, 32); };
  const larger = edit((shape) => resize(shape, shape.radius * 1.15));
  const smaller = edit((shape) => resize(shape, shape.radius / 1.15));
  const turn = edit((shape) => { shape.angle += Math.PI / 12; });
  const recolor = edit((shape) => {
    const { kind, x, y, radius, aspect, angle } = shape, others = state.scene.shapes.filter((other) => other !== shape);
    Object.assign(shape, artist.randomShape({ ...state.scene, shapes: others }, { kind, x, y, radius, aspect, angle },
                                            artist.generator(state.seed += 1)));
  });
  function focusOn(shape) {
    relist();
    pathOf.get(shape)?.focus({ preventScroll: true });
  }
  function front() {
    const shape = chosen();
    state.scene.shapes.splice(state.chosen, 1);
    state.scene.shapes.push(shape);
    focusOn(shape);
  }
  function remove() {
    const had = document.activeElement?.closest(".live-picture");
    state.scene.shapes.splice(state.chosen, 1);
    state.chosen = Math.min(state.chosen, state.scene.shapes.length - 1);
    relist();
    if (had) pathOf.get(chosen())?.focus({ preventScroll: true });
  }
  function create(kind, x, y, radius, angle = 0.3) {
    const pose = { kind, x, y, radius, angle, aspect: 0.95 };
    const shape = artist.randomShape(state.scene, pose, artist.generator(state.seed += 1));
    state.scene.shapes.push(shape);
    focusOn(shape);
    return shape;
  }
  const KEYS = {
    "+": larger, "=": larger, "-": smaller, r: turn, c: recolor, f: front, Delete: remove, Backspace: remove };
  handle(grip, { label: "size and turn", say: () => (chosen() ? tellOf(chosen()) : "no shape is chosen"),
    now: () => chosen()?.radius ?? 0, get: () => ["cx", "cy"].map((name) => Number(grip.getAttribute(name))),
    put: ([x, y]) => edit((shape) => {
      resize(shape, Math.hypot(x - shape.x, y - shape.y));
      shape.angle = Math.atan2(y - shape.y, x - shape.x);
    })() });

  const at = (event) => {
    const { left, top, width: wide, height: high } = picture.getBoundingClientRect();
    return [(event.clientX - left) / wide * width, (event.clientY - top) / high * height];
  };
  let drawn = null;
  ground.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.preventDefault();
    ground.setPointerCapture(event.pointerId);
    drawn = { from: at(event), shape: null };
  });
  ground.addEventListener("pointermove", (event) => {
    if (!drawn) return;
    const [x, y] = at(event), away = Math.hypot(x - drawn.from[0], y - drawn.from[1]);
    if (!drawn.shape && away > 4 && state.scene.shapes.length < 12) drawn.shape = create(state.pen, ...drawn.from, 8);
    if (!drawn.shape) return;
    resize(drawn.shape, away);
    drawn.shape.angle = Math.atan2(y - drawn.from[1], x - drawn.from[0]);
    changed();
  });
  for (const end of ["pointerup", "pointercancel"]) {
    ground.addEventListener(end, () => {
      if (drawn && !drawn.shape) pick(null);
      drawn = null;
    });
  }
  for (const kind of ["pointerdown", "pointermove"]) {
    over.addEventListener(kind, (event) => {
      if (state.tab === "encoder") pointAt(at(event));
    }, true);
  }

  const makers = kinds.map((kind) => named(`add a ${kind}`, () => {
    state.pen = kind;
    if (state.scene.shapes.length < 12) {
      const { uniform } = artist.generator(state.seed += 1);
      create(kind, uniform(20, width - 20), uniform(20, height - 20), uniform(10, 20), uniform(0, 6));
    }
  }, icon(glyph(kind))));
  const forChosen = [named("smaller", smaller, "\u2212"), named("larger", larger, "+"), named("turn", turn, "\u21bb"),
    named("new colours", recolor, "colour"), named("to the front", front, "front"), named("remove", remove, "\u2715")];
  const begin = choice("Scene", [...Object.keys(presets), "any scene"], 0, (which) => {
    const make = Object.values(presets)[which] || (() => artist.randomScene(state.seed += 17, width, height, 4));
    Object.assign(state, { scene: make(), chosen: -1 });
    relist();
  });
  const again = button("another", () => {
    begin.put(Object.keys(presets).length);
    Object.assign(state, { scene: artist.randomScene(state.seed += 17, width, height, null), chosen: -1 });
    relist();
  });
  const clock = html("p", { class: "touch-quiet" });
  const left = html("div", { class: "live-left" }, picture,
    html("div", { class: "touch-row", role: "group", "aria-label": "add a shape" }, ...makers),
    html("div", { class: "touch-row", role: "group", "aria-label": "the chosen shape" }, ...forChosen),
    html("div", { class: "touch-row live-begin" }, begin, again), clock);

  // ---- tabs

  const layerSay = (value) => `${value} of ${data.layers}`;
  const setLayer = (value) => {
    state.layer = value - 1;
    boxes.classList.add("live-stepping");
    layerSliders.forEach((node) => node.put(value));
    show();
  };
  const layerSlider = () => slider("layer", {
    min: 1, max: data.layers, value: data.layers, say: layerSay, input: setLayer });
  const layerSliders = [layerSlider(), layerSlider()];
  const steps = button("play", async () => {
    for (let value = 1; value <= data.layers; value += 1) {
      setLayer(value);
      await new Promise((done) => { setTimeout(done, 900); });
    }
  });
  const chooseQuery = (query, hold) => {
    if (hold) state.held = state.held === query ? -1 : query;
    state.query = hold ? state.held : query;
    show();
  };
  const queryNodes = [...Array(data.queries).keys()].map((query) => {
    const bar = html("div", { class: "live-bar" }, html("i"));
    const parts = [html("span", { text: query }), html("span"), bar, html("span")];
    const node = html("button", { type: "button", "aria-pressed": "false", onclick: () => chooseQuery(query, true),
      onpointerenter: (event) => event.pointerType === "mouse" && chooseQuery(query),
      onpointerleave: (event) => event.pointerType === "mouse" && chooseQuery(state.held) }, ...parts);
    return Object.assign(node, { parts });
  });
  const queryHint = html("p", { class: "touch-quiet" }), shares = html("div", { class: "live-shares" });
  const answersTab = html("div", {}, html("div", { class: "live-layers" }, layerSliders[0], steps),
    html("div", { class: "live-queries", role: "group", "aria-label": "the queries" }, ...queryNodes),
    queryHint, shares);

  const encoderSlider = slider("layer", {
    min: 1, max: data.encoderLayers, value: 1, say: (value) => `${value} of ${data.encoderLayers}`,
    input: (value) => { state.encoderLayer = value - 1; show(); } });
  const heads = ["mean of all", ...[...Array(data.heads).keys()].map((head) => `head ${head + 1}`)];
  const headChoice = choice("head", heads, 0, (head) => { state.head = head; show(); });
  const cellShares = html("div", { class: "live-shares" }), cellTitle = html("p", { class: "touch-title" });
  const encoderTab = html("div", {},
    html("p", { text: "Point at a cell of the picture. What stays bright is what it looks at." }),
    encoderSlider, headChoice, cellTitle, cellShares,
    html("p", { class: "touch-quiet", text: "Bars: shares of the attention. Marks: shares of the picture." }));
  const pointAt = ([x, y]) => {
    state.cell = [clamp(Math.floor(x / CELL), 0, columns - 1), clamp(Math.floor(y / CELL), 0, rows - 1)];
    tellCell();
    show();
  };
  const tellCell = handle(cell, { label: "cell", step: CELL, get: () => state.cell.map((value) => (value + 0.5) * CELL),
    put: pointAt, say: () => `column ${state.cell[0] + 1}, row ${state.cell[1] + 1}`,
    now: () => 100 * state.cell[0] / (columns - 1) });

  const table = svg("g"), cursor = svg("rect", {});
  const costs = stage(100, 88, "Costs of queries and shapes", table, cursor);
  costs.classList.add("live-costs");
  const pairText = html("p"), sumText = html("p", { class: "touch-quiet" });
  const matchingTab = html("div", {}, layerSliders[1], pairText, costs, sumText, html("p", { class: "touch-quiet",
    text: "What each query (a row) costs for each shape: the darker, the cheaper. Framed: the cheapest assignment." }));
  const pairWide = () => 88 / Math.max(state.answer.targets.length, 1);
  const setPair = ([target, query]) => {
    if (!state.answer) return;
    state.pair = [clamp(Math.floor(target), 0, Math.max(0, state.answer.targets.length - 1)),
      clamp(Math.floor(query), 0, data.queries - 1)];
    show();
  };
  const tellPair = handle(cursor, { label: "query and shape", get: () => state.pair, put: setPair,
    say: () => (state.answer ? pairWords() : ""), now: () => 100 * state.pair[1] / (data.queries - 1) });
  for (const kind of ["pointerdown", "pointermove"]) {
    costs.addEventListener(kind, (event) => {
      const { left: from, top, width: wide, height: high } = costs.getBoundingClientRect();
      setPair([((event.clientX - from) / wide * 100 - 12) / pairWide(), ((event.clientY - top) / high * 88 - 8) / 5]);
      tellPair();
    });
  }

  const panels = { answers: answersTab, encoder: encoderTab, matching: matchingTab };
  const tabs = Object.keys(panels).map((name) => button(name, () => turnTo(name)));
  function turnTo(name) {
    state.tab = name;
    if (name === "matching" && state.answer?.targets.length) state.pair = [0, layerNow().matched[0]];
    Object.keys(panels).forEach((key, i) => {
      panels[key].hidden = key !== name;
      set(tabs[i], { "aria-pressed": String(key === name) });
    });
    show();
  }
  const right = html("div", { class: "live-right" }, 
    html("div", { class: "live-tabs", role: "group", "aria-label": "what to see" }, ...tabs), ...Object.values(panels));

  // ---- what is shown

  const colorOf = (label) => colors[label], letter = (index) => String.fromCharCode(65 + index);
  /** The picture dark where few look; `weights` has one number for each cell. */
  function darken(weights) {
    const brush = veil.getContext("2d"), most = Math.max(...weights), dark = brush.createImageData(columns, rows);
    weights.forEach((weight, i) => { dark.data[4 * i + 3] = 255 * (1 - Math.sqrt(weight / most)); });
    brush.putImageData(dark, 0, 0);
    veil.hidden = false;
  }
  /** The row of one token in an attention of (heads, tokens, cells): of one head, or the mean of all for 0. */
  function rowOf(attention, token, head) {
    const size = rows * columns, count = attention.length / data.heads / size, picked = new Float32Array(size);
    const asked = head ? [head - 1] : [...Array(data.heads).keys()];
    for (const h of asked) {
      for (let i = 0; i < size; i += 1) picked[i] += attention[(h * count + token) * size + i] / asked.length;
    }
    return picked;
  }
  /** Bars: how much of an attention falls on each shape and on the ground, beside how much of the picture they are. */
  function tellShares(node, weights) {
    const { inside, kinds: of } = state.answer, order = [...of.keys()].map((index) => index + 1).concat(0);
    node.replaceChildren(...order.flatMap((who) => {
      const own = [...inside[who]], area = sum(own) / (rows * columns), share = sum(own.map((x, i) => x * weights[i]));
      if (!area) return [];
      const color = who ? colorOf(kinds.indexOf(of[who - 1])) : "var(--quiet)";
      return [html("span", { text: who ? `${letter(who - 1)} ${of[who - 1]}` : "the ground" }),
        html("div", { class: "live-bar" }, html("i", { style: `width: ${100 * share}%; background: ${color}` }),
             html("b", { style: `left: ${100 * area}%`, title: `${percent(area)} of the picture` })),
        html("span", { text: percent(share) })];
    }));
  }
  /** A letter on each shape, by which the lists call it. */
  const letters = () => state.answer.targets.map(({ index, corners: [x1, y1, x2, y2] }) => svg("text", {
    x: (x1 + x2) / 2 * width, y: (y1 + y2) / 2 * height + 1.8, class: "live-letter", text: letter(index) }));
  const boxIn = ([x1, y1, x2, y2]) => [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height];
  const clipped = (box) => corners(box).map((value) => clamp(value, 0, 1));
  function drawBox(box, color, extra = {}) {
    const [x, y, w, h] = boxIn(box), place = { x, y, width: Math.max(w, 0.1), height: Math.max(h, 0.1), rx: 0.6 };
    return [["#000", 2.2, 0.55], [color, 1.3, 1]].map(([stroke, wide, strong]) => svg("rect", {
      ...place, fill: "none", stroke, "stroke-width": wide, "stroke-opacity": strong, ...extra }));
  }
  /** A label above, below or in a box: the first place where it covers no other of `taken`. */
  function drawLabel(box, color, text, taken = []) {
    const [x, y, , h] = boxIn(box), wide = 2.62 * text.length + 2.4, from = clamp(x, 0, width - wide);
    const free = (top) => top >= 0 && top <= height - 6.4
      && !taken.some(([x1, y1, w]) => x1 < from + wide && x1 + w > from && Math.abs(y1 - top) < 6.4);
    const top = [y - 6.8, y + h + 0.4, y + h - 6.8, y + 0.4].find(free) ?? clamp(y - 6.8, 0, height - 6.4);
    taken.push([from, top, wide]);
    return [svg("rect", { x: from, y: top, width: wide, height: 6.4, rx: 1, fill: color }),
      svg("text", { x: from + 1.2, y: top + 4.9, text, style: `fill: ${inkOn(color)}`,
        textLength: wide - 2.4, lengthAdjust: "spacingAndGlyphs" })];
  }
  const wordsOf = (query, { score, label }) =>
    (score < SURE ? `${query} nothing` : `${query} ${names[label]} ${Math.round(100 * score)}%`);

  function showAnswers({ queries }) {
    const seen = [...queries.keys()].filter((query) => queries[query].score >= SURE && query !== state.query);
    seen.sort((a, b) => queries[b].score - queries[a].score);  // the surest are labelled first
    const taken = [], boxOf = (query) => [clipped(queries[query].box), colorOf(queries[query].label)];
    const parts = seen.flatMap((query) => drawBox(...boxOf(query), state.query < 0 ? {} : { opacity: 0.35 }));
    if (state.query < 0) {
      parts.push(...seen.flatMap((query) => drawLabel(...boxOf(query), wordsOf(query, queries[query]), taken)));
    }
    shares.hidden = state.query < 0;
    queryHint.textContent = shares.hidden ? "Point at a query, or press it, to see where it looks."
      : `Query ${state.query} in layer ${state.layer + 1} looks at`;
    queryNodes.forEach((node, query) => {
      const { score, label } = queries[query], sure = score >= SURE, [, name, bar, number] = node.parts;
      name.textContent = sure ? names[label] : "nothing";
      name.classList.toggle("live-quiet", !sure);
      number.textContent = percent(score);
      set(bar.firstChild, { style: `width: ${100 * score}%; background: ${colorOf(label)}` });
      set(node, { "aria-pressed": String(query === state.held),
        "aria-label": `query ${query}: ${sure ? names[label] : "nothing"}, ${percent(score)}` });
    });
    return shares.hidden ? parts : [...parts, ...showQuery(queries[state.query])];
  }
  /** One query: its box, the way of its centre from layer to layer, and where it looks. */
  function showQuery(query) {
    const { layers, looked } = state.answer, color = colorOf(query.label), box = clipped(query.box);
    const trail = layers.map(({ queries }) => queries[state.query].box).map(([x, y]) => [x * width, y * height]);
    const weights = rowOf(looked[state.layer], state.query, 0);
    darken(weights);
    tellShares(shares, weights);
    return [...drawBox(box, color, query.score < SURE ? { "stroke-dasharray": "3 2" } : {}),
      svg("path", { d: `M${trail.join("L")}`, fill: "none", stroke: "#fff", "stroke-width": 0.8 }),
      ...trail.map(([cx, cy], layer) => svg("circle", {
        cx, cy, r: layer === state.layer ? 1.8 : 1, fill: color, stroke: "#fff", "stroke-width": 0.5 })),
      ...drawLabel(box, color, wordsOf(state.query, query)), ...letters()];
  }
  function showEncoder() {
    const [column, row] = state.cell;
    const weights = rowOf(state.answer.attended[state.encoderLayer], row * columns + column, state.head);
    darken(weights);
    tellShares(cellShares, weights);
    cellTitle.textContent = `From column ${column + 1}, row ${row + 1}`;
    return letters();
  }
  function showMatching({ queries, costs: costs_, matched }) {
    const { targets, layers } = state.answer, last = layers.at(-1).matched, wide = pairWide();
    const middle = ([x1, y1, x2, y2]) => [(x1 + x2) / 2 * width, (y1 + y2) / 2 * height];
    const totals = costs_.flat().map(({ total }) => total), low = Math.min(...totals), high = Math.max(...totals);
    const down = (query) => 8 + 5 * query, across = (target) => 12 + wide * target;
    table.replaceChildren(...targets.flatMap(({ kind, index }, t) => [
      glyph(kind, { transform: `translate(${across(t + 0.5)} 3.8) scale(3.4)`, fill: colorOf(kinds.indexOf(kind)) }),
      svg("text", { x: across(t + 0.5), y: 5, "text-anchor": "middle", class: "live-letter", text: letter(index) }),
      ...costs_[t].flatMap(({ total }, query) => [
        svg("rect", { x: across(t) + 0.3, y: down(query) + 0.3, width: wide - 0.6, height: 4.4, rx: 0.6,
          fill: "var(--good)", "fill-opacity": (0.75 * ((high - total) / (high - low || 1)) ** 3).toFixed(3),
          stroke: matched[t] === query ? "var(--ink)" : "none", "stroke-width": 0.7 }),
        svg("text", { x: across(t + 0.5), y: down(query) + 3.9, "text-anchor": "middle", text: fixed(total, 1),
          "font-weight": matched[t] === query ? 700 : 400 })]),
    ]), ...queries.map((_, query) => svg("text", { x: 8, y: down(query) + 3.9, "text-anchor": "end", text: query })));
    state.pair[0] = clamp(state.pair[0], 0, Math.max(0, targets.length - 1));
    set(cursor, { x: across(state.pair[0]), y: down(state.pair[1]), width: wide, height: 5,
      visibility: targets.length ? null : "hidden" });
    pairText.textContent = targets.length ? pairWords() : "There is no shape, so no query is asked for one.";
    const others = layers.filter((layer) => layer.matched.some((query, t) => query !== last[t])).length;
    sumText.textContent = `Together ${fixed(sum(matched.map((query, t) => costs_[t][query].total)))}. `
      + (others ? `In ${others} of ${data.layers} layers other queries are matched.` : "All layers match alike.");
    return [...targets.flatMap((target, t) => {
      const { box, label } = queries[matched[t]], color = colorOf(label);
      const way = [target.corners, corners(box)].map(middle);
      return [...drawBox(target.corners, "#fff", { "stroke-dasharray": "2 1.5" }), ...drawBox(clipped(box), color),
        svg("path", { d: `M${way.join("L")}`, stroke: "#fff", "stroke-width": 0.8 }),
        ...drawLabel(clipped(box), color, String(matched[t]))];
    }), ...letters()];
  }
  function show() {
    if (!state.answer) return;
    const { targets, layers, milliseconds } = state.answer;
    const draw = { answers: showAnswers, encoder: showEncoder, matching: showMatching }[state.tab];
    const [x, y] = state.cell, found = layers.at(-1).queries.filter(({ score }) => score >= SURE).length;
    set(cell, { visibility: state.tab === "encoder" ? null : "hidden", x: x * CELL, y: y * CELL });
    veil.hidden = true;
    boxes.replaceChildren(...draw(layerNow()));
    clock.textContent = `${targets.length} shapes, ${found} boxes. The model took ${Math.round(milliseconds)} ms.`;
  }
  function pairWords() {
    const [t, query] = state.pair, target = state.answer.targets[t];
    if (!target) return "no shape";
    const { costs: costs_, matched } = layerNow(), { terms, total } = costs_[t][query];
    const [a, b, c] = terms.map((term) => fixed(term));
    return `Query ${query} for ${letter(target.index)}, the ${target.kind}: class ${a}, distance ${b}, overlap ${c}; `
      + `together ${fixed(total)}${matched[t] === query ? ", matched" : ""}.`;
  }
  function summary() {
    const found = state.answer.layers.at(-1).queries.flatMap(({ score, label }, query) =>
      (score >= SURE ? [`${names[label]} ${percent(score)} by query ${query}`] : []));
    return `${state.scene.shapes.length} shapes; found: ${found.join(", ") || "nothing"}.`;
  }

  turnTo("answers");
  view.replaceChildren(view.firstChild, left, right);
  relist();
}

export function render(view, data, say) {
  view.classList.add("live");
  view.append(html("style", { text: STYLE }), html("p", { text: "The model is being loaded: three megabytes." }));
  Promise.all([open(data.base), load(`${data.base}scene.js`)]).then(([ask]) => play(view, data, say, ask), (error) => {
    view.append(html("p", { role: "alert", text: `The model cannot be loaded: ${error.message || error.error}.` }));
  });
}
