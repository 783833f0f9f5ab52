import { cells, clamp, css, fixed, handle, html, ramp, set, slider, stage, start, sum, svg, tick } from "./touch.js";

// The position encoding under one's finger: which cells' addresses are like that of the cell one points at.

/** The readings of size / 2 clocks at a place: [sine, cosine] of each, every clock slower than the one before. */
export function clocks(place, size, temperature) {
  return [...Array(size / 2).keys()].map((i) => {
    const angle = place / temperature ** (2 * i / size);
    return [Math.sin(angle), Math.cos(angle)];
  });
}

/** The clocks of each of `count` rows or columns of an image; the last one is at 2 pi. */
export const axis = (count, size, temperature) => [...Array(count).keys()].map(
  (at) => clocks(2 * Math.PI * (at + 1) / count, size, temperature));

/** How alike the readings of two sets of clocks are: the mean over the clocks of the dot product of two hands. */
export const likeness = (a, b) => sum(a.map((hand, i) => hand[0] * b[i][0] + hand[1] * b[i][1])) / a.length;

export function render(view, data, say) {
  const { rows, columns, size, temperatures, shown } = data, cell = 10, width = columns * cell, height = rows * cell;
  let temperature = temperatures[0], here = data.here, there = data.there, whole = false, down, across, values;

  const mark = (color) => [
    svg("rect", { width: cell, height: cell, fill: "none", stroke: "#000", "stroke-width": 3 }),
    svg("rect", { width: cell, height: cell, fill: "none", stroke: color, "stroke-width": 1.6 })];
  const name = ([row, column]) => `row ${row + 1}, column ${column + 1}`;
  const put = (to) => [clamp(Math.floor(to[1] / cell), 0, rows - 1), clamp(Math.floor(to[0] / cell), 0, columns - 1)];
  const middle = ([row, column]) => [(column + 0.5) * cell, (row + 0.5) * cell];
  const lines = () => svg("path", { stroke: "#fff", "stroke-width": 0.35, opacity: 0.55, "pointer-events": "none", d:
    [...Array(columns - 1).keys()].map((c) => `M${(c + 1) * cell} 0V${height}`).join("")
    + [...Array(rows - 1).keys()].map((r) => `M0 ${(r + 1) * cell}H${width}`).join("") });

  const [hereMark, thereMark, echo] = [mark("#fff"), mark("#ffb000"), mark("#fff")].map((parts) => svg("g", { "pointer-events": "none" }, ...parts));
  const echoThere = svg("g", { "pointer-events": "none" }, ...mark("#ffb000"));
  const field = () => svg("rect", { width, height, fill: "transparent" });
  const seen = svg("g", {}, field(), hereMark), map = svg("image", { width, height, class: "touch-cells", preserveAspectRatio: "none" });
  const compared = svg("g", {}, field(), thereMark);
  const tellHere = handle(seen, {
    label: "the cell one points at", step: cell, jump: true, get: () => middle(here), now: () => 100 * here[1] / (columns - 1),
    put: (to) => { here = put(to); draw(); }, say: () => name(here) });
  const tellThere = handle(compared, {
    label: "a cell to compare with", step: cell, jump: true, hover: true, get: () => middle(there),
    now: () => 100 * there[1] / (columns - 1), put: (to) => { there = put(to); draw(); },
    say: () => `${name(there)}${values ? `, likeness ${fixed(at(there))}` : ""}` });
  seen.style.cursor = compared.style.cursor = "crosshair";
  const at = ([row, column]) => values[row * columns + column];

  const low = html("span"), high = html("span", { text: "1.00" });
  const bar = html("span", { style: `flex: 1; height: 0.8rem; border-radius: 0.2rem; background: linear-gradient(to right, ${
    [0, 0.25, 0.5, 0.75, 1].map((share) => css(ramp(share))).join(", ")})` });
  const news = html("p", { style: "min-height: 2.8em" });

  // some of the clocks of both cells, the hands on each other, and below each what the two hands' dot product is
  const radius = 20, gap = 52, faces = ["row", "column"].map((of, line) => shown.map((i, place) => {
    const x = 26 + place * gap, y = 40 + line * 80, hand = (color, dash) => svg("line", { x1: x, y1: y, "stroke-width": 3,
      "stroke-linecap": "round", "stroke-dasharray": dash, style: `stroke: ${color}` });
    return { face: svg("circle", { cx: x, cy: y, r: radius, fill: "none", style: "stroke: var(--line)", "stroke-width": 1.5 }),
             a: hand("var(--ink)", null), b: hand("var(--bad)", "5 4"),
             text: svg("text", { x, y: y + 35, "font-size": 12, "text-anchor": "middle" }), x, y };
  }));
  const heads = ["the row's clocks", "the column's clocks"].map((text, line) => svg("text", { x: 6, y: 13 + line * 80, "font-size": 12, text }));
  const clockStage = svg("svg", { viewBox: `0 0 ${shown.length * gap} 162`, class: "touch-stage", role: "img",
    "aria-label": "hands of some clocks of both cells; the sentence beside them has the numbers" },
    ...heads, ...faces.flat().flatMap(({ face, a, b, text }) => [face, a, b, text]));

  function draw() {
    [down, across] = [axis(rows, size, temperature), axis(columns, size, temperature)];
    const rowLike = down.map((code) => likeness(code, down[here[0]])), columnLike = across.map((code) => likeness(code, across[here[1]]));
    values = rowLike.flatMap((r) => columnLike.map((c) => (r + c) / 2));  // an address is half row, half column
    const least = Math.min(...values), floor = whole ? Math.min(0, least) : least;
    set(map, { href: cells(values.map((value) => (value - floor) / (1 - floor)), columns) });
    low.textContent = fixed(floor);
    for (const [group, [row, column]] of [[hereMark, here], [echo, here], [thereMark, there], [echoThere, there]]) {
      set(group, { transform: `translate(${column * cell} ${row * cell})` });
    }
    faces.forEach((line, of) => line.forEach(({ a, b, text, x, y }, place) => {
      const codes = of ? across : down, [one, two] = [codes[here[of]], codes[there[of]]].map((code) => code[shown[place]]);
      for (const [hand, [sine, cosine]] of [[a, one], [b, two]]) set(hand, { x2: x + radius * 0.9 * cosine, y2: y - radius * 0.9 * sine });
      text.textContent = fixed(one[0] * two[0] + one[1] * two[1]);
    }));
    news.textContent = `${name(here)} and ${name(there)}: likeness ${fixed(at(there))}, the mean of ${fixed(rowLike[there[0]])} `
      + `from ${size / 2} clocks of the rows and ${fixed(columnLike[there[1]])} from ${size / 2} of the columns. `
      + `Least alike in the image: ${fixed(least)}.`;
    news.textContent = news.textContent[0].toUpperCase() + news.textContent.slice(1);
    tellHere();
    tellThere();
    say(`${name(here)}; likeness of ${name(there)} ${fixed(at(there))}`);
  }

  view.append(
    html("div", {}, html("p", { class: "touch-title", text: "Point at a cell (white)" }),
         stage(width, height, "the image, cut into cells", svg("image", { href: data.image, width, height, preserveAspectRatio: "none" }), lines(), echoThere, seen)),
    html("div", {}, html("p", { class: "touch-title", text: "How alike the others are" }),
         stage(width, height, "the likeness of all cells", map, echo, compared),
         html("div", { class: "touch-row touch-quiet", "aria-hidden": "true" }, low, bar, high)),
    html("div", {}, news,
         slider("Temperature", { min: 0, max: temperatures.length - 1, value: 0, say: (i) => String(temperatures[i]),
                                 input: (i) => { temperature = temperatures[i]; draw(); } }),
         tick("colours from 0 to 1", false, (on) => { whole = on; draw(); }),
         html("p", { class: "touch-quiet", text: "Press or drag in either picture; orange is compared with white. With keys: Tab to it, then arrows, with Shift ten cells." })),
    html("div", {}, html("p", { class: "touch-title", text: `Clocks ${shown.join(", ")} of the ${size / 2}` }), clockStage,
         html("p", { class: "touch-quiet", text: "Solid: the white cell's hand. Dashed: the orange one's. Below: their dot product." })));
  draw();
  return { values: () => values, here: () => here, there: () => there, temperature: () => temperature };
}
