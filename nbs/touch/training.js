// Slide through a training: the queries' boxes on an image, who answers for which object, and where six of them answer.
import { COLORS, choice, clamp, fixed, html, set, slider, stage, svg } from "./touch.js";

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

export function render(view, data, say) {
  const last = data.steps.length - 1, favourites = data.favourites, queries = data.queries;
  const images = data.images.map((image) => ({ ...image, boxes: bytes(image.boxes), owners: bytes(image.owners) }));
  const cloud = bytes(data.cloud), dotted = cloud.length / (last + 1) / favourites.length / 4;
  const color = (query) => (favourites.includes(query) ? COLORS[favourites.indexOf(query)] : "var(--quiet)");
  let look = 0, shown = 0, alone = 0;

  const name = html("p", { class: "touch-title" }), table = html("table");
  const picture = stage(100, 100, ""), sky = stage(100, 100, "");
  const dots = html("div", {}, html("p", { class: "touch-title", text: "Where they answer, in many images" }), sky);
  const curve = stage(300, 66, "how many objects changed hands since the look before, over the training");
  curve.style.maxWidth = "34rem";
  picture.style.overflow = "hidden";
  const note = html("p", { class: "touch-quiet" });

  // ---- the image, its objects, the boxes of the queries

  function drawPicture() {
    const { width, height, source, objects, boxes, owners } = images[shown];
    const at = (query) => {
      const [cx, cy, w, h] = boxes.subarray(4 * (look * queries + query), 4 * (look * queries + query + 1));
      return [(cx - w / 2) * width / 255, (cy - h / 2) * height / 255, w * width / 255, h * height / 255];
    };
    const mine = [...owners.subarray(look * objects.length, (look + 1) * objects.length)];
    const before = look ? [...owners.subarray((look - 1) * objects.length, look * objects.length)] : mine;
    const frame = ([x, y, w, h], more) => svg("rect", { x, y, width: w, height: h, fill: "none", ...more });
    const parts = [svg("image", { href: source, width, height })];
    for (let query = 0; query < queries; query += 1) {
      if (!mine.includes(query)) parts.push(frame(at(query), { stroke: "#fff", "stroke-width": 0.6, opacity: 0.55 }));
    }
    objects.forEach(({ box }) => parts.push(
      frame(box, { stroke: "#000", "stroke-width": 1 }), frame(box, { stroke: "#fff", "stroke-width": 1, "stroke-dasharray": "3 3" })));
    mine.forEach((query, object) => {
      const [x, y, w, h] = at(query), ink = favourites.includes(query) ? color(query) : "#ddd";
      const [ox, oy, ow, oh] = objects[object].box;
      const tag = { x: clamp(x, 0, width - 11), y: clamp(y, 0, height - 8) };
      parts.push(svg("path", { d: `M${x + w / 2} ${y + h / 2}L${ox + ow / 2} ${oy + oh / 2}`, stroke: ink, "stroke-width": 0.8 }));
      parts.push(frame([x, y, w, h], { stroke: "#000", "stroke-width": 2.6, opacity: 0.6 }));
      parts.push(frame([x, y, w, h], { stroke: ink, "stroke-width": 1.6, class: "owner", "data-query": query }));
      parts.push(svg("rect", { ...tag, width: 11, height: 8, fill: "#fff", stroke: ink, "stroke-width": 0.8 }));
      parts.push(svg("text", { x: tag.x + 5.5, y: tag.y + 6.2, "font-size": 6.5, "text-anchor": "middle",
                               style: "fill: #000", text: query }));
    });
    const changed = mine.filter((query, object) => query !== before[object]).length;
    set(picture, { viewBox: `0 0 ${width} ${height}`, "aria-label":
      `step ${data.steps[look]}: ${objects.map((object, i) => `${object.name}: query ${mine[i]}`).join(", ")}` });
    picture.replaceChildren(...parts);
    const cell = (tag, text, more = {}) => html(tag, { text, ...more });
    table.replaceChildren(
      html("thead", {}, html("tr", {}, ...["object", "query", "before"].map((text) => cell("th", text, { scope: "col" })))),
      html("tbody", {}, ...objects.map((object, i) => html("tr", {}, cell("th", object.name, { scope: "row" }), cell("td", mine[i]),
        cell("td", look && mine[i] !== before[i] ? `was ${before[i]}` : look ? "the same" : "")))));
    return `${changed} of its ${objects.length} objects changed hands`;
  }

  // ---- the clouds of six queries

  function drawSky() {
    const parts = [svg("rect", { width: 100, height: 100, fill: "none", stroke: "var(--line)", "stroke-width": 0.6 })];
    favourites.forEach((query, place) => {
      if (alone && alone - 1 !== place) return;
      const mean = [0, 0, 0, 0];
      for (let image = 0; image < dotted; image += 1) {
        const from = 4 * ((look * dotted + image) * favourites.length + place);
        const box = [...cloud.subarray(from, from + 4)].map((value) => value / 2.55);
        box.forEach((value, axis) => { mean[axis] += value / dotted; });
        parts.push(svg("circle", { cx: box[0], cy: box[1], r: 0.6 + Math.sqrt(box[2] * box[3]) / 25, fill: COLORS[place],
                                   "fill-opacity": 0.7 }));
      }
      if (alone) {
        parts.push(svg("rect", { x: mean[0] - mean[2] / 2, y: mean[1] - mean[3] / 2, width: mean[2], height: mean[3], fill: "none",
                                 stroke: "var(--ink)", "stroke-width": 1 }));
      }
    });
    set(sky, { "aria-label": alone ? `centres of the boxes of query ${favourites[alone - 1]}, and their mean box`
      : `centres of the boxes of six queries in ${dotted} images` });
    sky.replaceChildren(...parts);
  }

  // ---- the changes over time

  const across = (at) => 24 + 270 * at / last, down = (share) => 52 - 46 * share;
  const line = data.changed.map((share, at) => (at ? `${at > 1 ? "L" : "M"}${across(at)} ${down(share)}` : "")).join("");
  const marker = svg("circle", { r: 4, fill: "var(--mark)" });
  curve.append(
    ...[[0, "0"], [1, "all"]].map(([share, text]) => svg("text", { x: 19, y: down(share) + 3, "font-size": 9, "text-anchor": "end", text })),
    svg("path", { d: `M24 ${down(0)}H294M24 ${down(1)}H294`, stroke: "var(--line)" }),
    svg("path", { d: line, fill: "none", stroke: "var(--good)", "stroke-width": 1.8 }),
    svg("text", { x: 24, y: 64, "font-size": 9, text: "objects that changed hands since the look before" }), marker);

  function draw() {
    const changed = drawPicture();
    drawSky();
    set(marker, { cx: across(look), cy: down(data.changed[look]) });
    name.textContent = `Step ${data.steps[look]}: AP ${fixed(data.AP[look], 3)}`;
    note.textContent = look ? `Since step ${data.steps[look - 1]} ${changed}; of all ${data.objects} that are watched `
      + `${Math.round(100 * data.changed[look])} %.` : "The first look: nothing has been learned yet.";
    say(`${name.textContent}. ${note.textContent}`);
  }

  view.append(
    html("div", { class: "touch-wide" },
      slider("training step", { min: 0, max: last, value: 0, say: (at) => String(data.steps[at]), input: (at) => { look = at; draw(); } }),
      curve),
    html("div", {}, name, picture, choice("image", images.map((image) => image.name), 0, (at) => { shown = at; draw(); }), table, note),
    html("div", {}, dots, choice("queries", ["all six", ...favourites.map((query) => `query ${query}`)], 0, (at) => { alone = at; draw(); }),
      html("p", { class: "touch-quiet", text: `A dot is the centre of a query's box in one of ${dotted} images; larger boxes have larger dots.` })));
  draw();
}
