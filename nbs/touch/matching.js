import { COLORS, assign, button, choice, clamp, corners, css, fixed, handle, html, inkOn, overlap, ramp, set, slider,
         softmax, stage, start, sum, svg } from "./touch.js";

// The matching game: boxes to move, the costs of all pairs, who answers for which, and the loss.

const SMALLEST = 0.05;  // side of a box, as a share of the image

/** What each term of the cost of a pair is, weighted; and their sum. */
export function pairCost(logits, box, label, wanted, weights) {
  const distance = sum(box.map((value, at) => Math.abs(value - wanted[at])));
  const terms = [-weights.class * softmax(logits)[label], weights.bbox * distance,
                 -weights.giou * overlap(corners(box), corners(wanted)).giou];
  return { terms, cost: sum(terms) };
}

/** The weighted losses of classes, L1 and generalised IoU; chosen[n] is the query of object n. */
export function losses(logits, boxes, labels, wanted, chosen, weights) {
  let classes = 0, total = 0, distance = 0, apart = 0;
  logits.forEach((row, query) => {
    const object = chosen.indexOf(query), weight = object < 0 ? weights.eos : 1;
    classes -= weight * Math.log(softmax(row)[object < 0 ? row.length - 1 : labels[object]]);
    total += weight;
    if (object < 0) return;
    distance += sum(boxes[query].map((value, at) => Math.abs(value - wanted[object][at])));
    apart += 1 - overlap(corners(boxes[query]), corners(wanted[object])).giou;
  });
  return [classes / total, weights.bbox * distance / labels.length, weights.giou * apart / labels.length];
}

export function render(view, data, say) {
  const { width, height, labels, names, wanted, weights } = data, queries = data.boxes.length;
  const scale = [width, height], objects = labels.map((label) => names[label]);
  const inside = ([x, y, w, h]) => [clamp(x, w / 2, 1 - w / 2), clamp(y, h / 2, 1 - h / 2), w, h];
  const top = (row) => row.indexOf(Math.max(...row));
  const answer = (query) => (chosen.includes(query) ? `answers for the ${objects[chosen.indexOf(query)]}` : "answers for nothing");
  let boxes, logits, said, chosen, picked, likely;

  function begin() {
    boxes = data.boxes.map(([x, y, w, h]) => inside([x, y, Math.max(w, SMALLEST), Math.max(h, SMALLEST)]));
    logits = data.logits.map((row) => [...row]);
    said = logits.map(top);
    chosen = [];
    picked = 0;
  }

  begin();

  // ---- the picture: objects below, then queries, each a box with its number and, while it is picked, a corner
  const rect = ([x1, y1, x2, y2], more) => ({ x: x1 * width, y: y1 * height, width: (x2 - x1) * width,
                                              height: (y2 - y1) * height, ...more });
  const truth = wanted.map((box, object) => {
    const at = corners(box), mark = { x: at[2] * width - 1.5, y: at[3] * height - 2, "text-anchor": "end", "font-size": 5.5,
                                      "font-weight": 600, style: "fill: #fff; stroke: #000b; stroke-width: 1.6; paint-order: stroke" };
    return svg("g", { "pointer-events": "none" },
               svg("rect", rect(at, { fill: "none", stroke: "#000", "stroke-width": 1.6, opacity: 0.5 })),
               svg("rect", rect(at, { fill: "none", stroke: "#fff", "stroke-width": 0.9, "stroke-dasharray": "3 2" })),
               svg("text", { ...mark, text: objects[object] }));
  });
  const drawn = [...Array(queries).keys()].map((query) => {
    const color = COLORS[query], parts = {
      body: svg("rect", { fill: color, "fill-opacity": 0.08 }),
      halo: svg("rect", { fill: "none", stroke: "#000", opacity: 0.55 }),
      line: svg("rect", { fill: "none", stroke: color }),
      plate: svg("rect", { width: 9, height: 8, rx: 1, fill: color }),
      number: svg("text", { text: query, "font-size": 6.5, "font-weight": 700, "text-anchor": "middle",
                            style: `fill: ${inkOn(color)}` }),
    };
    parts.group = svg("g", {}, ...Object.values(parts));
    parts.tell = handle(parts.group, {
      label: `query ${query}`, step: 1, now: () => 100 * boxes[query][0],
      get: () => [0, 1].map((axis) => boxes[query][axis] * scale[axis]),
      put: (to) => { pick(query); boxes[query] = inside([to[0] / width, to[1] / height, ...boxes[query].slice(2)]); draw(); },
      say: () => `centre ${boxes[query].slice(0, 2).map((v) => fixed(v)).join(", ")}; ${answer(query)}`,
    });
    parts.group.addEventListener("focus", () => pick(query));
    parts.group.addEventListener("pointerup", sort);
    return parts;
  });
  const knob = svg("g", {}, svg("rect", { x: -6, y: -6, width: 12, height: 12, fill: "transparent" }),
                   svg("rect", { x: -2, y: -2, width: 4, height: 4, rx: 0.7, fill: "#fff", stroke: "#000", "stroke-width": 0.6 }));
  const tellKnob = handle(knob, {
    label: "lower right corner of the picked query", now: () => 100 * boxes[picked][2],
    get: () => corners(boxes[picked]).slice(2).map((value, axis) => value * scale[axis]),
    put: (to) => {
      const [x, y] = corners(boxes[picked]), [x2, y2] = to.map((value, axis) => value / scale[axis]);
      const right = clamp(x2, x + SMALLEST, 1), low = clamp(y2, y + SMALLEST, 1);
      boxes[picked] = [(x + right) / 2, (y + low) / 2, right - x, low - y];
      draw();
    },
    say: () => `query ${picked}, ${boxes[picked].slice(2).map((v) => fixed(v)).join(" by ")}; ${answer(picked)}`,
  });
  knob.style.cursor = "nwse-resize";
  const layer = svg("g", {}, ...drawn.map((parts) => parts.group));
  const picture = stage(width, height, "the image with its objects and six queries to move",
                        svg("image", { href: data.image, width, height, class: "touch-cells" }), ...truth, layer, knob);
  picture.style.overflow = "hidden";
  picture.style.borderRadius = "0.3rem";
  const news = html("p", { style: "min-height: 2.8em; margin: 0.5rem 0 0" });
  const says = choice("Class", [...names, "no object"], 0, (label) => { said[picked] = label; tilt(likely); });
  const sure = slider("Its probability", { min: 1, max: 99, value: 50, say: (v) => fixed(v / 100), input: tilt });
  const title = html("p", { class: "touch-title" });

  // ---- the numbers: the table of all pairs, the terms of the picked query, the loss
  const head = html("tr", {}, html("td", { style: "width: 17%" }));
  const rows = objects.map((name) => html("tr", {}, html("th", { scope: "row", text: name })));
  const plates = [...Array(queries).keys()].map((query) => html("th", {
    scope: "col", text: `q${query}`, style: `background: ${COLORS[query]}; color: ${inkOn(COLORS[query])}; font-weight: 600` }));
  head.append(...plates);
  const fields = rows.map((row) => plates.map(() => row.appendChild(html("td"))));
  const terms = objects.map((name) => [...Array(4).keys()].map(() => html("td")));
  const sums = html("table", {}, html("thead", {}, html("tr", {},
    ...["", "class", "L1", "GIoU", "cost"].map((text, at) => at ? html("th", { scope: "col", text }) : html("td", { style: "width: 30%" })))),
    html("tbody", {}, ...objects.map((name, object) => html("tr", {}, html("th", { scope: "row", text: name }), ...terms[object]))));
  const parts = ["class", "L1", "GIoU"].map((name, at) => ({
    bar: html("div", { style: `height: 100%; background: ${["#0072B2", "#E69F00", "#009E73"][at]}` }), text: html("span"), name }));
  const bars = html("div", { style: "display: flex; height: 1.1rem; background: var(--panel); border-radius: 0.2rem; overflow: hidden",
                             "aria-hidden": "true" }, ...parts.map((part) => part.bar));
  const legend = html("p", { class: "touch-row touch-quiet" }, ...parts.map((part, at) => html("span", {},
    html("span", { style: `display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.35em; background: ${part.bar.style.background}` }), part.text)));
  const total = html("p", { class: "touch-title", style: "margin-top: 0.8rem" });
  const columnTitle = html("p", { class: "touch-title" });

  // ---- what happens

  function pick(query) {
    if (picked === query && title.textContent) return;
    picked = query;
    draw();
  }

  /** Give the picked query's class so many per cent; the other classes keep their proportions. */
  function tilt(percent) {
    const label = said[picked], share = percent / 100, old = softmax(logits[picked]);
    logits[picked] = old.map((p, at) => Math.log(at === label ? share : p * (1 - share) / (1 - old[label])));
    likely = percent;
    draw();
  }

  /** A step down the slope of the loss, with the pairs as they are. */
  function learn() {
    const total = sum(logits.map((_, query) => (chosen.includes(query) ? 1 : weights.eos)));
    const loss = (moved) => sum(losses(logits, moved, labels, wanted, chosen, weights));
    const slopes = boxes.map((box, query) => box.map((_, at) => {
      const beside = (way) => boxes.map((b, q) => b.map((v, a) => (q === query && a === at ? v + way * 1e-4 : v)));
      return (loss(beside(1)) - loss(beside(-1))) / 2e-4;
    }));
    logits = logits.map((row, query) => {
      const object = chosen.indexOf(query), goal = object < 0 ? row.length - 1 : labels[object];
      const weight = (object < 0 ? weights.eos : 1) / total;
      return softmax(row).map((p, at) => row[at] - 2 * weight * (p - (at === goal ? 1 : 0)));
    });
    boxes = boxes.map((box, query) => inside(box.map((value, at) => {
      const next = value - 0.008 * slopes[query][at];
      return at < 2 ? next : clamp(next, SMALLEST, 1);
    })));
    draw();
    say(`loss ${fixed(loss(boxes))}`);
  }

  function reset() {
    begin();
    draw();
    sort();
  }

  /** Small boxes lie on large ones, so that each can be taken; what has the focus stays, or it would lose it. */
  function sort() {
    const size = (query) => boxes[query][2] * boxes[query][3];
    const order = [...Array(queries).keys()].sort((a, b) => size(b) - size(a)).map((query) => drawn[query].group);
    const still = order.findIndex((group) => group === document.activeElement);
    order.forEach((group, at) => {
      if (still < 0 || at > still) layer.append(group);
      else if (at < still) order[still].before(group);
    });
  }

  function draw() {
    const pairs = labels.map((label, object) => boxes.map((box, query) => pairCost(logits[query], box, label, wanted[object], weights)));
    const table = pairs.map((row) => row.map((pair) => pair.cost)), before = chosen;
    chosen = assign(table);
    const changes = before.length ? chosen.map((query, object) => [query, before[object], objects[object]]).filter(([now, was]) => now !== was) : [];
    if (changes.length) {
      news.textContent = `${changes.map(([now, was, name]) => `The ${name} goes from query ${was} to query ${now}.`).join(" ")}`;
      say(news.textContent);
    } else if (!before.length) {
      news.textContent = `${chosen.map((query, object) => `${objects[object]}: query ${query}`).join(", ")}.`;
    }
    drawn.forEach((shape, query) => {
      const at = corners(boxes[query]), own = chosen.includes(query), thick = query === picked ? 2 : 1.4;
      for (const name of ["body", "halo", "line"]) set(shape[name], rect(at));
      set(shape.halo, { "stroke-width": own ? thick + 0.8 : 1.3 });
      set(shape.line, { "stroke-width": own ? thick : thick / 2, "stroke-dasharray": own ? null : "1 1.2" });
      const x = clamp(at[0] * width, 0, width - 9), y = clamp(at[1] * height - 8, 0, height - 8);
      set(shape.plate, { x, y, "fill-opacity": own || query === picked ? 1 : 0.75 });
      set(shape.number, { x: x + 4.5, y: y + 6.3 });
      shape.tell();
    });
    const [, , x, y] = corners(boxes[picked]);
    set(knob, { transform: `translate(${x * width} ${y * height})` });
    tellKnob();
    const all = table.flat(), low = Math.min(...all), high = Math.max(...all);
    table.forEach((row, object) => row.forEach((cost, query) => {
      const color = ramp((cost - low) / (high - low || 1)), own = chosen[object] === query;
      set(fields[object][query], { text: fixed(cost), style: `background: ${css(color)}; color: ${inkOn(color)};`
        + (own ? "box-shadow: inset 0 0 0 3px var(--mark), inset 0 0 0 4px #fff" : "") });
      if (own) fields[object][query].append(html("span", { class: "touch-hidden", text: ", answers" }));
    }));
    plates.forEach((plate, query) => { plate.style.boxShadow = query === picked ? "inset 0 -3px 0 var(--ink)" : ""; });
    terms.forEach((row, object) => row.forEach((field, at) => {
      const pair = pairs[object][picked], own = chosen[object] === picked;
      set(field, { text: fixed(at < 3 ? pair.terms[at] : pair.cost), style: own ? "font-weight: 700" : "" });
    }));
    columnTitle.textContent = `The costs of query ${picked}, term by term`;
    title.textContent = `Query ${picked} ${answer(picked)}`;
    likely = clamp(Math.round(100 * softmax(logits[picked])[said[picked]]), 1, 99);
    says.put(said[picked]);
    sure.put(likely);
    const found = losses(logits, boxes, labels, wanted, chosen, weights);
    parts.forEach((part, at) => {
      part.bar.style.width = `${100 * found[at] / data.widest}%`;
      part.text.textContent = `${part.name} ${fixed(found[at])}`;
    });
    total.textContent = `The loss: ${fixed(sum(found))}`;
  }

  view.append(
    html("div", {}, picture, news),
    html("div", {}, html("p", { class: "touch-title", text: "Who answers: the cost of every pair" }),
         html("table", { class: "touch-matrix" }, html("thead", {}, head), html("tbody", {}, ...rows)), total, bars, legend),
    html("div", {}, title, says, sure,
         html("div", { class: "touch-row" }, button("A step of learning", learn), button("Start again", reset)),
         html("p", { class: "touch-quiet", text: "Drag a box, or its lower right corner. With keys: Tab to a box or its corner, "
              + "then arrows, with Shift in larger steps." })),
    html("div", {}, columnTitle, sums));
  reset();
  return { boxes: () => boxes, logits: () => logits, chosen: () => chosen, picked: () => picked,
           losses: () => losses(logits, boxes, labels, wanted, chosen, weights) };
}
