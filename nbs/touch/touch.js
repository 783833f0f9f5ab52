// What the figures one can touch share: elements, handles, sliders, boxes, the cheapest assignment, colours.
// `book_touch.py` writes this text into each figure, so it asks for nothing else and stays below 12 kB.

// ---- elements

/** Set attributes: `text` is the content, `on...` a listener, null takes an attribute away. */
export function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === null || value === false) node.removeAttribute(name);
    else node.setAttribute(name, value);
  }
  return node;
}

/** A new HTML element. */
export function html(tag, attributes = {}, ...children) {
  const node = set(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

/** A new SVG element; lengths are in units of the picture's viewBox. */
export function svg(tag, attributes = {}, ...children) {
  const node = set(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes);
  node.append(...children);
  return node;
}

/** A picture to draw in and to touch: a group with a name, as its parts can be reached one by one. */
export function stage(width, height, label, ...children) {
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": label, class: "touch-stage" },
             ...children);
}

/** Replace the still picture by what `render(view, data, say)` builds; `say(text)` tells screen readers.
    What it returns can be asked from outside, as `figure` of the element. */
export function start(id, render) {
  const root = document.getElementById(id), view = html("div", { class: "touch-view" });
  const region = html("p", { class: "touch-hidden", role: "status" });
  let timer;
  const say = (text) => {  // when the hand rests: who drags hears the end, not every step
    clearTimeout(timer);
    timer = setTimeout(() => { region.textContent = text; }, 350);
  };
  root.figure = render(view, JSON.parse(document.getElementById(`${id}-data`).textContent), say);
  root.replaceChildren(view, region);
}

// ---- handles, sliders, buttons

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Where a pointer is, in units of the viewBox of the picture that holds `node`. */
export function place(node, event) {
  const picture = node.ownerSVGElement || node;
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
  return [at.x, at.y];
}

/** Let a part of a picture be moved by mouse, finger, pen and the arrow keys (with Shift ten steps at once).

    get() gives [x, y] in units of the viewBox; put([x, y], way) moves there, as near as it may; way is [-1, 0], [1, 0],
    [0, -1] or [0, 1] where a key is the cause. say() tells where it is.
    step: one key's way. jump: it comes to where one presses. hover: and follows a mouse that is not pressed.
    now(): the number that stands for the place, of 0 to 100. Returns a function to call when something else moved it. */
export function handle(node, { label, get, put, say, now = () => 0, step = 1, jump = false, hover = false }) {
  const tell = () => set(node, { "aria-valuetext": say(), "aria-valuenow": Math.round(now()) });
  const move = (to, way) => { put(to, way); tell(); };
  let held = null;
  set(node, { tabindex: 0, role: "slider", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100 });
  node.classList.add("touch-handle");
  node.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });  // or the page would scroll
  node.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.preventDefault();
    node.setPointerCapture(event.pointerId);
    node.focus({ preventScroll: true });
    held = { from: place(node, event), was: get() };
    if (jump) move(held.from);
  });
  node.addEventListener("pointermove", (event) => {
    const at = place(node, event);
    if (held && !jump) move(at.map((value, axis) => held.was[axis] + value - held.from[axis]));
    else if (held || (hover && event.pointerType === "mouse")) move(at);
  });
  for (const end of ["pointerup", "pointercancel"]) node.addEventListener(end, () => { held = null; });
  node.addEventListener("keydown", (event) => {
    const way = ARROWS[event.key];
    if (!way || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    move(get().map((value, axis) => value + way[axis] * step * (event.shiftKey ? 10 : 1)), way);
  });
  tell();
  return tell;
}

/** A labelled slider; `input(value)` is called as it moves, `say(value)` is what stands beside it. */
export function slider(label, { min, max, step = 1, value, say = String, input }) {
  const range = html("input", { type: "range", min, max, step, value, "aria-label": label });
  const out = html("span", { class: "touch-value", "aria-hidden": "true" });  // <output> would be read at every step
  const node = html("div", { class: "touch-slider" }, html("span", { text: label, "aria-hidden": "true" }), range, out);
  node.put = (to) => {
    range.value = to;
    out.textContent = say(Number(range.value));
    set(range, { "aria-valuetext": out.textContent });
  };
  range.addEventListener("input", () => { node.put(range.value); input(Number(range.value)); });
  node.put(value);
  return node;
}

/** A list to choose from: the place of the chosen one goes to `input`. */
export function choice(label, names, value, input) {
  const list = html("select", { "aria-label": label }, ...names.map((name, at) => html("option", { value: at, text: name })));
  list.value = value;
  list.addEventListener("input", () => input(Number(list.value)));
  const node = html("div", { class: "touch-choice" }, html("span", { text: label, "aria-hidden": "true" }), list);
  node.put = (to) => { list.value = to; };
  return node;
}

/** A box to tick. */
export function tick(text, checked, input) {
  const box = html("input", { type: "checkbox", onchange: () => input(box.checked) });
  box.checked = checked;
  return html("label", { class: "touch-row" }, box, text);
}

export const button = (text, press) => html("button", { type: "button", text, onclick: press });

// ---- boxes, as [cx, cy, w, h] or as corners [x1, y1, x2, y2]; scores

export const corners = ([cx, cy, w, h]) => [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2];
export const area = ([x1, y1, x2, y2]) => Math.max(0, x2 - x1) * Math.max(0, y2 - y1);

/** IoU and generalised IoU of two boxes given by corners. */
export function overlap(a, b) {
  const shared = area([Math.max(a[0], b[0]), Math.max(a[1], b[1]), Math.min(a[2], b[2]), Math.min(a[3], b[3])]);
  const around = area([Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[2], b[2]), Math.max(a[3], b[3])]);
  const union = area(a) + area(b) - shared, iou = union > 0 ? shared / union : 0;
  return { iou, giou: around > 0 ? iou - (around - union) / around : iou };
}

export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
export const sum = (values) => values.reduce((total, value) => total + value, 0);

export function softmax(logits) {
  const top = Math.max(...logits), weights = logits.map((value) => Math.exp(value - top)), total = sum(weights);
  return weights.map((weight) => weight / total);
}

/** For each row of a table of costs its column, so that the sum is smallest: the Hungarian method, with prices.
    -1 for a row that finds none, where there are more rows than columns. */
export function assign(table) {
  const rows = table.length, columns = rows ? table[0].length : 0;
  if (rows > columns) {
    const chosen = Array(rows).fill(-1);
    assign([...Array(columns).keys()].map((c) => table.map((row) => row[c]))).forEach((r, c) => { chosen[r] = c; });
    return chosen;
  }
  const owner = Array(columns + 1).fill(-1), wish = Array(rows).fill(0), price = Array(columns + 1).fill(0);
  for (let row = 0; row < rows; row += 1) {  // the last place of `owner` is where the new row waits
    const least = Array(columns).fill(Infinity), from = Array(columns).fill(columns), seen = Array(columns + 1).fill(false);
    let at = columns;
    owner[columns] = row;
    do {
      seen[at] = true;
      let gap = Infinity, next = 0;
      for (let c = 0; c < columns; c += 1) {
        if (seen[c]) continue;
        const dear = table[owner[at]][c] - wish[owner[at]] - price[c];
        if (dear < least[c]) { least[c] = dear; from[c] = at; }
        if (least[c] < gap) { gap = least[c]; next = c; }
      }
      for (let c = 0; c <= columns; c += 1) {
        if (seen[c]) { wish[owner[c]] += gap; price[c] -= gap; } else least[c] -= gap;
      }
      at = next;
    } while (owner[at] !== -1);
    for (; at !== columns; at = from[at]) owner[at] = owner[from[at]];
    owner[columns] = -1;
  }
  return table.map((_, row) => owner.indexOf(row));
}

// ---- colours and numbers

/** Okabe and Ito's colours, the book's: of classes, queries, curves. */
export const COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442"];
const stops = (text) => text.split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const CIVIDIS = stops("00224e 083370 35456c 4f576c 666970 7d7c78 948e77 aea371 c8b866 e5cf52 fee838");
const RED_BLUE = stops("053061 2065ab 4393c3 90c4dd d1e5f0 f7f6f6 fddbc7 f3a481 d6604d b1182b 67001f");
const mix = (colors, share) => {
  const at = clamp(share, 0, 1) * (colors.length - 1), low = Math.min(Math.floor(at), colors.length - 2);
  return colors[low].map((value, channel) => Math.round(value + (at - low) * (colors[low + 1][channel] - value)));
};

/** [red, green, blue] for 0 to 1, dark to light. */
export const ramp = (share) => mix(CIVIDIS, share);
/** [red, green, blue] for -1 to 1: blue, white, red. */
export const signed = (value) => mix(RED_BLUE, (value + 1) / 2);
export const css = (rgb) => `rgb(${rgb.join(",")})`;

/** Black or white, whichever is easier to read on a colour. */
export function inkOn(color) {
  const rgb = typeof color === "string" ? stops(color.slice(1))[0] : color;
  const light = sum([0.2126, 0.7152, 0.0722].map((weight, at) => weight * ((rgb[at] / 255 + 0.055) / 1.055) ** 2.4));
  return light > 0.179 ? "#000" : "#fff";
}

/** The address of a picture of one pixel for each value, row by row, for an SVG <image class="touch-cells">. */
export function cells(values, columns, color = ramp) {
  const canvas = html("canvas", { width: columns, height: values.length / columns }), pen = canvas.getContext("2d");
  const picture = pen.createImageData(canvas.width, canvas.height);
  values.forEach((value, at) => picture.data.set([...color(value), 255], 4 * at));
  pen.putImageData(picture, 0, 0);
  return canvas.toDataURL();
}

/** A number as one writes it, with a true minus sign. */
export const fixed = (value, digits = 2) => value.toFixed(digits).replace(/^-(?=0(\.0*)?$)/, "").replace("-", "\u2212");
