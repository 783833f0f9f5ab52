import { clamp, fixed, handle, html, overlap, set, slider, stage, start, sum, svg } from "./touch.js";

// Precision and recall: a threshold to drag, what is right and wrong above it, the curve and the average precision.

/** For each detection, by falling score, which object of its image it takes at an IoU, or -1: COCO's rule, for one class. */
export function judge(images, iou) {
  const list = images.flatMap(({ scores, boxes, objects }, image) => {
    const taken = new Set();
    return [...scores.keys()].sort((a, b) => scores[b] - scores[a]).map((at) => {
      let best = -1, most = iou;
      objects.forEach((object, n) => {
        const found = taken.has(n) ? -1 : overlap(boxes[at], object).iou;
        if (found >= most) { most = found; best = n; }
      });
      if (best >= 0) taken.add(best);
      return { image, at, score: scores[at], object: best };
    });
  });
  return list.sort((a, b) => b.score - a.score);
}

/** Precision and recall after each detection of the list, and the precision smoothed from above. */
export function curve(list, total) {
  let right = 0;
  const points = list.map(({ object }, at) => { right += object >= 0; return { recall: right / total, precision: right / (at + 1) }; });
  let best = 0;
  for (let at = points.length - 1; at >= 0; at -= 1) { best = Math.max(best, points[at].precision); points[at].smooth = best; }
  return points;
}

/** Average precision: the mean of the smoothed precision at the recalls 0, 0.01, ..., 1. */
export function averagePrecision(points) {
  const at = (recall) => points.find((point) => point.recall >= recall);
  return sum([...Array(101).keys()].map((step) => at(step * 0.01)?.smooth ?? 0)) / 101;
}

export function render(view, data, say) {
  const { images } = data, total = sum(images.map(({ objects }) => objects.length)), levels = [...Array(10).keys()].map((k) => 0.5 + 0.05 * k);
  const lists = levels.map((level) => judge(images, level)), whole = lists.map((list) => averagePrecision(curve(list, total)));
  let level = 0, threshold = data.threshold, averages;

  // ---- the pictures, two in a row: objects white, what is right blue, what is wrong orange and dashed
  const columns = 2, wide = Math.max(...images.map(({ size }) => size[1])), high = Math.max(...images.map(({ size }) => size[0])), gap = 4;
  const rect = ([x1, y1, x2, y2], more) => svg("rect", { x: x1, y: y1, width: x2 - x1, height: y2 - y1, fill: "none", ...more });
  const objects = new Map(), shapes = new Map();
  const panels = images.map(({ image, size, boxes, objects: truth, scores }, number) => {
    const panel = svg("svg", { x: (number % columns) * (wide + gap), y: Math.floor(number / columns) * (high + gap), width: size[1], height: size[0],
                               viewBox: `0 0 ${size[1]} ${size[0]}` }, svg("image", { href: image, width: size[1], height: size[0] }));
    truth.forEach((box, at) => {
      const white = rect(box, { stroke: "#fff", "stroke-width": 1.3 });
      objects.set(`${number} ${at}`, white);
      panel.append(rect(box, { stroke: "#000", "stroke-width": 2.3, opacity: 0.5 }), white);
    });
    [...scores.keys()].sort((a, b) => scores[a] - scores[b]).forEach((at) => {
      const [x1, y1] = boxes[at], x = clamp(x1, 0, size[1] - 26), y = clamp(y1 - 9, 0, size[0] - 9);
      const line = rect(boxes[at], { "stroke-width": 1.8 }), plate = svg("rect", { x, y, width: 26, height: 9, rx: 1 });
      const text = svg("text", { x: x + 13, y: y + 7.3, "font-size": 7.6, "font-weight": 600, "text-anchor": "middle" });
      const group = svg("g", {}, rect(boxes[at], { stroke: "#000", "stroke-width": 3, opacity: 0.45 }), line, plate, text);
      shapes.set(`${number} ${at}`, { group, line, plate, text });
      panel.append(group);
    });
    return panel;
  });
  const rows = Math.ceil(images.length / columns);
  const pictures = svg("svg", { viewBox: `0 0 ${columns * wide + gap} ${rows * high + (rows - 1) * gap}`, class: "touch-stage", role: "img",
                                "aria-label": "the images with the detections above the threshold; the sentence below has their numbers" }, ...panels);

  // ---- the curve
  const across = 220, side = 150, left = 36, X = (recall) => left + recall * across, Y = (precision) => 8 + (1 - precision) * side;
  const axes = [0, 0.5, 1].flatMap((value) => [
    svg("path", { d: `M${X(0)} ${Y(value)}H${X(1)}M${X(value)} ${Y(0)}V${Y(1)}`, style: "stroke: var(--line)", "stroke-width": 0.7 }),
    svg("text", { x: X(0) - 4, y: Y(value) + 3.5, "font-size": 10, "text-anchor": "end", text: value }),
    svg("text", { x: X(value), y: Y(0) + 12, "font-size": 10, "text-anchor": "middle", text: value })]);
  const titles = [svg("text", { x: X(0.5), y: Y(0) + 25, "font-size": 11, "text-anchor": "middle", text: "recall" }),
                  svg("text", { x: 10, y: Y(0.5), "font-size": 11, "text-anchor": "middle", transform: `rotate(-90 10 ${Y(0.5)})`, text: "precision" })];
  const rest = svg("path", { style: "fill: var(--quiet)", opacity: 0.22 }), kept = svg("path", { style: "fill: var(--good)", opacity: 0.35 });
  const smooth = svg("path", { fill: "none", style: "stroke: var(--good)", "stroke-width": 2 });
  const raw = svg("path", { fill: "none", style: "stroke: var(--ink)", "stroke-width": 0.8, "stroke-dasharray": "3 2" });
  const dots = svg("g"), knob = svg("circle", { r: 6, style: "fill: var(--mark); stroke: var(--paper)", "stroke-width": 2 });
  const grip = svg("g", {}, svg("rect", { x: left, y: 8, width: across, height: side, fill: "transparent" }), knob);
  const tell = handle(grip, {
    label: "the place on the curve", jump: true, get: () => [0, 0], now: () => 100 * counts().recall,
    put: (to, way) => {
      const list = lists[level], points = curve(list, total), now = list.filter(({ score }) => score >= threshold).length;
      const far = points.map(({ recall, precision }) => Math.hypot(X(recall) - to[0], Y(precision) - to[1]));
      const next = way ? clamp(now + way[0] - way[1], 0, list.length) : far.indexOf(Math.min(...far)) + 1;
      move(next ? list[next - 1].score : 1);
    },
    say: () => sentence(),
  });
  const plot = stage(left + across + 8, side + 38, "precision over recall", ...axes, ...titles, rest, kept, raw, smooth, dots, grip);

  // ---- the list and the numbers
  const chips = html("p", { style: "display: flex; flex-wrap: wrap; gap: 0.25rem; font-size: 0.78rem; font-variant-numeric: tabular-nums" });
  const news = html("p", { style: "min-height: 4.2em; margin-top: 0.5rem" });
  const numbers = ["AP of the whole list", "AP of what is above the threshold", "AP, mean of ten IoUs"].map((text) => {
    const field = html("td", { style: "text-align: right; font-weight: 600; width: 4rem" });
    return { field, row: html("tr", {}, html("th", { scope: "row", text }), field) };
  });
  const bar = slider("Score threshold", { min: 0, max: 1, step: 0.01, value: threshold, say: (v) => fixed(v), input: (v) => move(v) });
  const strict = slider("IoU threshold", { min: 0, max: 9, value: level, say: (at) => fixed(levels[at]), input: (at) => { level = at; draw(); } });

  function counts() {
    const above = lists[level].filter(({ score }) => score >= threshold), right = above.filter(({ object }) => object >= 0).length;
    return { above, right, wrong: above.length - right, missed: total - right, recall: right / total,
             precision: above.length ? right / above.length : null };
  }

  function sentence() {
    const { above, right, wrong, missed, recall, precision } = counts();
    return `${above.length} detections score ${fixed(threshold)} or more: ${right} right, ${wrong} wrong; ${missed} of ${total} objects missed. `
      + (precision === null ? "Precision has no value yet" : `Precision ${right}/${above.length} = ${fixed(precision)}`) + `, recall ${right}/${total} = ${fixed(recall)}.`;
  }

  function move(score) {
    threshold = score;
    bar.put(threshold);
    draw();
  }

  function area(points) {
    if (!points.length) return "";
    let path = `M${X(0)} ${Y(0)}V${Y(points[0].smooth)}`;
    points.forEach(({ recall, smooth: value }) => { path += `V${Y(value)}H${X(recall)}`; });
    return `${path}V${Y(0)}Z`;
  }

  function draw() {
    const list = lists[level], points = curve(list, total), { above, recall, precision } = counts();
    const short = curve(above, total), found = new Set(above.filter(({ object }) => object >= 0).map(({ image, object }) => `${image} ${object}`));
    list.forEach(({ image, at, score, object }) => {
      const { group, line, plate, text } = shapes.get(`${image} ${at}`), right = object >= 0;
      set(group, { visibility: score >= threshold ? null : "hidden" });
      set(line, { stroke: right ? "#56b4e9" : "#ff9d2e", "stroke-dasharray": right ? null : "4 2" });
      set(plate, { fill: right ? "#56b4e9" : "#ff9d2e" });
      set(text, { text: `${right ? "\u2713" : "\u2717"}${score.toFixed(2).slice(1)}`, style: "fill: #000" });
    });
    for (const [key, white] of objects) set(white, { "stroke-dasharray": found.has(key) ? null : "3 2" });
    chips.replaceChildren(...list.map(({ score, object }) => {
      const right = object >= 0, on = score >= threshold;
      return html("span", { text: `${right ? "\u2713" : "\u2717"}${score.toFixed(2).slice(1)}`, style: `padding: 0 0.25rem; border-radius: 0.2rem; border: 1px ${
        right ? "solid" : "dashed"} ${right ? "var(--good)" : "var(--bad)"}; ${on ? "font-weight: 600" : "color: var(--quiet); border-color: var(--line)"}` });
    }));
    set(rest, { d: area(points) });
    set(kept, { d: area(short) });
    set(raw, { d: points.map((point, at) => `${at ? "L" : "M"}${X(point.recall)} ${Y(point.precision)}`).join("") });
    set(smooth, { d: short.length ? `M${X(0)} ${Y(short[0].smooth)}${short.map((point) => `V${Y(point.smooth)}H${X(point.recall)}`).join("")}` : "" });
    dots.replaceChildren(...points.map((point, at) => svg("circle", { cx: X(point.recall), cy: Y(point.precision), r: 2.2,
      style: `fill: ${at < above.length ? "var(--ink)" : "var(--paper)"}; stroke: var(--ink)`, "stroke-width": 0.8 })));
    set(knob, { cx: X(recall), cy: Y(precision ?? 1) });
    averages = [whole[level], averagePrecision(short), sum(whole) / whole.length];
    averages.forEach((value, at) => { numbers[at].field.textContent = fixed(value, 3); });
    news.textContent = sentence();
    tell();
    say(`${sentence()} Average precision ${fixed(whole[level], 3)}.`);
  }

  view.append(
    html("div", {}, pictures, news, bar, strict),
    html("div", {}, plot, html("table", {}, ...numbers.map(({ row }) => row))),
    html("div", {}, html("p", { class: "touch-title", text: "The list, by falling score" }), chips),
    html("div", {}, html("p", { class: "touch-quiet", text: "White: the objects, dashed while they are missed. Blue, \u2713: right. "
      + "Orange, dashed, \u2717: wrong. Drag the sliders, or the red point along the curve. With keys: Tab to one, then arrows." })));
  draw();
  return { counts, threshold: () => threshold, averages: () => averages };
}
