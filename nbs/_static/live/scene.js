// The embedded set's pictures, drawn as chapter 4 draws them, from numbers that a reader may change.
// A scene: { width, height, ground: [region], shapes: [shape], tilt: [x, y], noise, seed }, lengths in pixels.
function liveScene() {
  "use strict";
  const KINDS = ["disc", "rectangle", "triangle", "star", "ring", "cross"]; // in the order of CATEGORIES
  const STUFF = ["stripes", "checks", "dots", "grain"];
  const TENTH = Math.PI / 5, NOTCH = [0.45 * Math.cos(TENTH), 0.45 * Math.sin(TENTH)];
  const clip = (value, low, high) => Math.min(Math.max(value, low), high);

  // Mulberry32, a small generator of random numbers; `seed` is a whole number.
  function generator(seed) {
    const random = () => {
      seed = seed + 0x6d2b79f5 | 0;
      let t = Math.imul(seed ^ seed >>> 15, 1 | seed);
      t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
      return ((t ^ t >>> 14) >>> 0) / 2 ** 32;
    };
    const uniform = (low, high) => low + (high - low) * random();
    const normal = () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
    const choose = (items, chances = items.map(() => 1 / items.length)) => {
      let left = random();
      return items[Math.max(0, chances.findIndex(chance => (left -= chance) < 0))];
    };
    return { random, uniform, normal, choose };
  }

  // Signed distances of chapter 4, of a shape with radius one: negative inside, zero on the outline.
  const DISTANCE = {
    disc: (u, v) => Math.hypot(u, v) - 1,
    rectangle: (u, v) => Math.max(Math.abs(u), Math.abs(v)) - 0.75,
    triangle: (u, v) => Math.max(v, Math.abs(u) * 0.866 - v * 0.5) - 0.5,
    star: (u, v) => {
      const turn = (Math.atan2(u, v) + 11 * TENTH) % (2 * TENTH), angle = Math.abs(turn - TENTH); // 0 to 36 degrees
      const radius = Math.hypot(u, v), nx = NOTCH[1], ny = 1 - NOTCH[0];
      return ((radius * Math.cos(angle) - 1) * nx + radius * Math.sin(angle) * ny) / Math.hypot(nx, ny);
    },
    ring: (u, v) => Math.abs(Math.hypot(u, v) - 0.73) - 0.27,
    cross: (u, v) => {
      const a = Math.abs(u), b = Math.abs(v);
      return Math.max(Math.max(a, b) - 0.95, Math.min(a, b) - 0.3);
    },
  };
  function distance(shape, x, y) {
    const cos = Math.cos(shape.angle), sin = Math.sin(shape.angle), dx = x - shape.x, dy = y - shape.y;
    const u = (cos * dx + sin * dy) / shape.radius, v = (cos * dy - sin * dx) / (shape.radius * shape.aspect);
    return DISTANCE[shape.kind](u, v) * shape.radius * Math.sqrt(shape.aspect);
  }

  // A value in [0, 1) for each whole place; between them it is blended.
  function lattice(seed, i, j) {
    let h = Math.imul(i, 0x27d4eb2d) ^ Math.imul(j, 0x165667b1) ^ seed;
    h = Math.imul(h ^ h >>> 15, 0x85ebca6b);
    h = Math.imul(h ^ h >>> 13, 0xc2b2ae35);
    return ((h ^ h >>> 16) >>> 0) / 2 ** 32;
  }
  function grain(seed, x, y) {
    const i = Math.floor(x), j = Math.floor(y), a = x - i, b = y - j;
    const at = (di, dj) => lattice(seed, i + di, j + dj);
    return (1 - b) * ((1 - a) * at(0, 0) + a * at(1, 0)) + b * ((1 - a) * at(0, 1) + a * at(1, 1));
  }
  // The share, in [0, 1], of the second of two colours at a pixel.
  function texture({ kind, period, angle, phases, seed }, x, y) {
    if (kind === "grain") return grain(seed, (x + 0.5) / (period / 3) - 0.5, (y + 0.5) / (period / 3) - 0.5);
    const wave = 2 * Math.PI / period, cos = Math.cos(angle), sin = Math.sin(angle);
    const u = Math.sin(wave * (cos * x + sin * y) + phases[0]);
    if (kind === "stripes") return clip(0.5 + 1.5 * u, 0, 1);
    const v = Math.sin(wave * (cos * y - sin * x) + phases[1]);
    return kind === "checks" ? clip(0.5 + 3 * u * v, 0, 1) : clip(2 * (u + v) - 1.5, 0, 1);
  }
  const blend = (share, first, second, channel) => first[channel] + share * (second[channel] - first[channel]);

  const randomColor = ({ uniform }) => [0, 1, 2].map(() => uniform(20, 235));
  function nearbyColor(color, { uniform, normal }) {
    const way = [normal(), normal(), normal()], size = way.reduce((sum, x) => sum + Math.abs(x), 0) / 3;
    const step = uniform(12, 40) / size;
    return color.map((value, i) => clip(value + step * way[i], 0, 255));
  }
  const randomPattern = (kind, [low, high], { random, uniform }) => ({
    kind, period: uniform(low, high), angle: uniform(0, Math.PI), phases: [uniform(0, 6.3), uniform(0, 6.3)],
    seed: Math.floor(random() * 2 ** 31) });

  function randomGround(width, height, rng) {
    const left = [...STUFF], count = rng.choose([1, 2, 3], [0.35, 0.45, 0.2]);
    return Array.from({ length: count }, (_, i) => {
      const kind = rng.choose(left);
      left.splice(left.indexOf(kind), 1);
      const first = randomColor(rng);
      return { first, second: nearbyColor(first, rng), pattern: randomPattern(kind, [6, 18], rng),
        border: i ? { angle: rng.uniform(0, 2 * Math.PI), wave: rng.uniform(0, 6), x: rng.uniform(0.25, 0.75) * width,
          y: rng.uniform(0.25, 0.75) * height, frequency: rng.uniform(0.05, 0.2) } : null };
    });
  }
  function beyond({ angle, wave, x, y, frequency }, px, py) {
    const cos = Math.cos(angle), sin = Math.sin(angle);
    return cos * (px - x) + sin * (py - y) + wave * Math.sin((cos * py - sin * px) * frequency) > 0;
  }

  const grounds = new WeakMap(), noises = new Map(); // what need not be drawn again while a shape is dragged
  function groundOf({ width, height, ground }) {
    if (grounds.has(ground)) return grounds.get(ground);
    const picture = new Float32Array(width * height * 3);
    for (let y = 0, i = 0; y < height; y++)
      for (let x = 0; x < width; x++)
        for (let c = 0, share = null, region; c < 3; c++, i++) {
          region = region || ground.findLast(({ border }) => !border || beyond(border, x, y));
          share = share ?? texture(region.pattern, x, y);
          picture[i] = blend(share, region.first, region.second, c);
        }
    grounds.set(ground, picture);
    return picture;
  }
  function noiseOf({ width, height, seed }) {
    const key = [width, height, seed].join();
    if (!noises.has(key)) {
      const { normal } = generator(seed);
      noises.clear();
      noises.set(key, Float32Array.from({ length: width * height * 3 }, normal));
    }
    return noises.get(key);
  }

  // The pixels of a shape that lie in the picture, each with its distance.
  function eachPixel(shape, width, height, visit) {
    const reach = shape.radius + 2;
    for (let y = Math.max(0, Math.trunc(shape.y - reach)); y < Math.min(height, Math.trunc(shape.y + reach) + 1); y++)
      for (let x = Math.max(0, Math.trunc(shape.x - reach)); x < Math.min(width, Math.trunc(shape.x + reach) + 1); x++)
        visit(y * width + x, distance(shape, x + 0.5, y + 0.5), x, y);
  }

  // Everything about a scene: its picture without light and noise, who owns each pixel (0 ground, k the k-th shape).
  function compose(scene) {
    const { width, height, shapes } = scene, picture = groundOf(scene).slice(), owner = new Uint8Array(width * height);
    shapes.forEach((shape, index) => {
      const cos = Math.cos(shape.angle), sin = Math.sin(shape.angle), { color, second, pattern, outline } = shape;
      eachPixel(shape, width, height, (i, far, x, y) => {
        if (far > 0.5) return;
        const dx = x - shape.x, dy = y - shape.y; // the texture moves and turns with the shape
        const share = pattern ? texture(pattern, cos * dx + sin * dy, cos * dy - sin * dx) : 0;
        const edge = outline && far > -outline.thickness, cover = Math.min(0.5 - far, 1);
        for (let c = 0; c < 3; c++) {
          const fill = edge ? outline.color[c] : pattern ? blend(share, color, second, c) : color[c];
          picture[3 * i + c] += cover * (fill - picture[3 * i + c]);
        }
        if (far <= 0) owner[i] = index + 1;
      });
    });
    return { picture, owner };
  }

  // The finished picture in RGBA, and boxes [x1, y1, x2, y2] around what is seen of each shape, or null.
  function paint(scene) {
    const { width, height, tilt, noise, shapes } = scene, { picture, owner } = compose(scene), grains = noiseOf(scene);
    const pixels = new Uint8ClampedArray(width * height * 4);
    const boxes = shapes.map(() => null), areas = shapes.map(() => 0);
    for (let y = 0, i = 0; y < height; y++)
      for (let x = 0; x < width; x++, i++) {
        const light = 1 + tilt[0] * (2 * x / (width - 1) - 1) + tilt[1] * (2 * y / (height - 1) - 1);
        for (let c = 0; c < 3; c++) pixels[4 * i + c] = picture[3 * i + c] * light + noise * grains[3 * i + c];
        pixels[4 * i + 3] = 255;
        const k = owner[i] - 1;
        if (k < 0) continue;
        const box = boxes[k] = boxes[k] || [x, y, x + 1, y + 1];
        box[0] = Math.min(box[0], x); box[2] = Math.max(box[2], x + 1); box[3] = y + 1;
        areas[k]++;
      }
    return { pixels, owner, boxes, areas };
  }

  // A shape of that kind and pose in colours that stand out from what lies below it.
  function randomShape(scene, pose, rng) {
    const { picture } = compose(scene), below = [0, 0, 0];
    let count = 0;
    eachPixel(pose, scene.width, scene.height, (i, far) => {
      if (far > 0) return;
      count++;
      for (let c = 0; c < 3; c++) below[c] += picture[3 * i + c];
    });
    const mean = below.map(sum => sum / Math.max(count, 1));
    const differs = color => color.reduce((sum, x, c) => sum + Math.abs(x - mean[c]), 0) / 3 >= 40;
    let color = randomColor(rng);
    for (let i = 0; i < 8 && !differs(color); i++) color = randomColor(rng);
    const kind = rng.choose(["plain", ...STUFF], [0.6, 0.1, 0.1, 0.1, 0.1]);
    return { ...pose, color, second: nearbyColor(color, rng),
      pattern: kind === "plain" ? null : randomPattern(kind, [5, 12], rng),
      outline: rng.random() < 0.4 ? { thickness: rng.uniform(1, 2.5), color: randomColor(rng) } : null };
  }

  // A place and a size; one time in three at the side of a shape that is there already.
  function randomPose({ width, height, shapes }, rng) {
    const radius = rng.uniform(8, 32), edge = 0.6 * radius;
    let x = rng.uniform(edge, width - edge), y = rng.uniform(edge, height - edge);
    if (shapes.length && rng.random() < 0.35) {
      const other = rng.choose(shapes), way = rng.uniform(0, 2 * Math.PI);
      const gap = rng.uniform(0.5, 1) * (radius + other.radius);
      x = clip(other.x + gap * Math.cos(way), edge, width - edge);
      y = clip(other.y + gap * Math.sin(way), edge, height - edge);
    }
    return { kind: rng.choose(KINDS), x, y, radius, aspect: rng.uniform(0.65, 1), angle: rng.uniform(0, 2 * Math.PI) };
  }

  // A scene as the set has them, but for its crowds; no shape hides more than half of another.
  function randomScene(seed, width, height, count = null) {
    const rng = generator(seed), scene = { width, height, ground: randomGround(width, height, rng), shapes: [],
      tilt: [rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15)], noise: rng.uniform(2, 10), seed };
    count = count ?? rng.choose([0, 1, 2, 3, 4, 5, 6, 7, 8], [0.03, 0.17, 0.18, 0.18, 0.15, 0.13, 0.1, 0.04, 0.02]);
    for (let i = 0; i < count; i++) {
      const kind = rng.choose(KINDS);
      for (let tries = 0; tries < 12; tries++) {
        const pose = { ...randomPose(scene, rng), kind }, shapes = [...scene.shapes, { ...pose, color: [0, 0, 0] }];
        const whole = scene.shapes.map(shape => paint({ ...scene, shapes: [shape] }).areas[0]);
        const { areas } = paint({ ...scene, shapes });
        if (!whole.every((area, k) => areas[k] >= area / 2)) continue;
        scene.shapes.push(randomShape(scene, pose, rng));
        break;
      }
    }
    return scene;
  }
  return { KINDS, generator, distance, texture, paint, randomShape, randomScene };
}
if (typeof module !== "undefined") module.exports = liveScene;
