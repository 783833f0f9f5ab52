// DETR's forward pass in plain JavaScript: the small backbone, encoder, decoder and heads of chapters 10 to 13.
// Settings and names of tensors are those of the Python checkpoint; `tools/live_page.py` packs them into weights.js.
// It is one function without free variables, so that its text can be the program of a Web Worker, too.
function liveDetr() {
  "use strict";
  const MEAN = [0.485, 0.456, 0.406], DEVIATION = [0.229, 0.224, 0.225]; // ImageNet's, of colours in [0, 1]

  // What weights.js holds: gzip in base64; a matrix is a float32 scale for each row, then 8 bits for each number.
  async function unpack(packed) {
    const zipped = Uint8Array.from(atob(packed.data), letter => letter.charCodeAt(0));
    const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
    const bytes = await new Response(stream).arrayBuffer(), tensors = {};
    let start = 0;
    const take = (Kind, count) => {
      const end = start + count * Kind.BYTES_PER_ELEMENT, part = new Kind(bytes.slice(start, end));
      start = end;
      return part;
    };
    for (const [name, shape] of packed.tensors) {
      const size = shape.reduce((a, b) => a * b, 1), row = size / shape[0];
      const scales = shape.length > 1 && take(Float32Array, shape[0]);
      const values = new Float64Array(take(scales ? Int8Array : Float32Array, size));
      for (let r = 0, i = 0; scales && r < shape[0]; r++)
        for (const end = i + row; i < end; i++) values[i] *= scales[r];
      tensors[name] = { shape, values };
    }
    return { settings: packed.settings, tensors };
  }

  // Rows side by side in panels of `high`: column by column, so that a product reads both its factors straight on.
  function panels(values, count, length, high, at = (i, k) => i * length + k) {
    const packed = new Float64Array(Math.ceil(count / high) * high * length);
    for (let i = 0; i < count; i++) {
      let place = (i - i % high) * length + i % high;
      for (let k = 0; k < length; k++, place += high) packed[place] = values[at(i, k)];
    }
    return packed;
  }

  // x (n rows, in panels of two) times the transposed weights (in panels of four): nearly all of the time goes here.
  function multiply(x, n, { weights, inputs, outputs, bias }) {
    const y = new Float64Array(n * outputs), sums = new Float64Array(8);
    for (let i = 0; i < n; i += 2)
      for (let o = 0; o < outputs; o += 4) {
        let s0 = 0, s1 = 0, s2 = 0, s3 = 0, t0 = 0, t1 = 0, t2 = 0, t3 = 0;
        for (let a = i * inputs, b = o * inputs, end = a + 2 * inputs; a < end; a += 2, b += 4) {
          const u = x[a], v = x[a + 1], p = weights[b], q = weights[b + 1], r = weights[b + 2], s = weights[b + 3];
          s0 += u * p; s1 += u * q; s2 += u * r; s3 += u * s;
          t0 += v * p; t1 += v * q; t2 += v * r; t3 += v * s;
        }
        sums[0] = s0; sums[1] = s1; sums[2] = s2; sums[3] = s3;
        sums[4] = t0; sums[5] = t1; sums[6] = t2; sums[7] = t3;
        const high = Math.min(2, n - i), wide = Math.min(4, outputs - o);
        for (let h = 0; h < high; h++)
          for (let w = 0; w < wide; w++) y[(i + h) * outputs + o + w] = sums[4 * h + w] + (bias ? bias[o + w] : 0);
      }
    return y;
  }

  const relu = x => {
    for (let i = 0; i < x.length; i++) if (x[i] < 0) x[i] = 0;
    return x;
  };
  const add = (a, b) => a.map((x, i) => x + b[i % b.length]);

  // Each row less its mean, over its deviation, scaled and shifted.
  function layerNorm(x, { scale, shift }) {
    const width = scale.length, y = new Float64Array(x.length);
    for (let start = 0; start < x.length; start += width) {
      let sum = 0, squares = 0;
      for (let i = start; i < start + width; i++) sum += x[i];
      for (let i = start; i < start + width; i++) squares += (x[i] - sum / width) ** 2;
      const factor = 1 / Math.sqrt(squares / width + 1e-5);
      for (let i = 0; i < width; i++) y[start + i] = (x[start + i] - sum / width) * factor * scale[i] + shift[i];
    }
    return y;
  }

  // The same over all cells and the channels of a group, of a map with its channels last.
  function groupNorm(x, { scale, shift }) {
    const channels = scale.length, size = channels / [8, 7, 6, 5, 4, 3, 2, 1].find(groups => channels % groups === 0);
    for (let first = 0; first < channels; first += size) {
      let sum = 0, squares = 0;
      const count = x.length / channels * size;
      for (let i = first; i < x.length; i += channels) for (let c = 0; c < size; c++) sum += x[i + c];
      for (let i = first; i < x.length; i += channels)
        for (let c = 0; c < size; c++) squares += (x[i + c] - sum / count) ** 2;
      const factor = 1 / Math.sqrt(squares / count + 1e-5);
      for (let i = first; i < x.length; i += channels)
        for (let c = 0; c < size; c++)
          x[i + c] = (x[i + c] - sum / count) * factor * scale[first + c] + shift[first + c];
    }
    return x;
  }

  // Sine and cosine waves of a cell's row, then of its column (chapter 11).
  function sinePositions(height, width, length, temperature) {
    const code = new Float64Array(height * width * length), half = length / 2;
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++)
        [(y + 1) / (height + 1e-6), (x + 1) / (width + 1e-6)].forEach((place, axis) => {
          for (let i = 0; i < half; i += 2) {
            const angle = place * 2 * Math.PI / temperature ** (i / half);
            code.set([Math.sin(angle), Math.cos(angle)], (y * width + x) * length + axis * half + i);
          }
        });
    return code;
  }

  // A model from what `unpack` gives: a function of pixels (RGBA, 8 bits), width and height.
  function build({ settings, tensors }) {
    const has = name => name in tensors, vector = name => tensors[name].values;
    const norm = name => ({ scale: vector(name + ".weight"), shift: vector(name + ".bias") });
    const range = (name, found = []) => { // the layers that are there: name.0, name.1, ...
      const next = `${name}.${found.length}`;
      return Object.keys(tensors).some(key => key.startsWith(next + ".")) ? range(name, [...found, next]) : found;
    };

    function product(matrix, bias, first = 0, last = tensors[matrix].shape[0]) {
      const { shape: [, inputs], values } = tensors[matrix], outputs = last - first;
      const weights = panels(values, outputs, inputs, 4, (i, k) => (first + i) * inputs + k);
      return { weights, inputs, outputs, bias: bias && vector(bias).slice(first, last) };
    }
    const apply = (layer, x) => {
      const n = x.length / layer.inputs;
      return multiply(panels(x, n, layer.inputs, 2), n, layer);
    };
    const linear = name => {
      const layer = product(name + ".weight", name + ".bias");
      return x => apply(layer, x);
    };

    // A convolution, and the group norm after it where there is one; of maps { height, width, channels, values }.
    function convolution(name, normed, stride) {
      const { shape: [outputs, inputs, kernel], values } = tensors[name + ".weight"], area = kernel * kernel;
      const weights = panels(values, outputs, area * inputs, 4,
        (o, k) => (o * inputs + k % inputs) * area + Math.floor(k / inputs));
      const layer = { weights, inputs: area * inputs, outputs, bias: has(name + ".bias") && vector(name + ".bias") };
      const after = normed && norm(normed), edge = (kernel - 1) / 2;
      return map => {
        const height = Math.ceil(map.height / stride), width = Math.ceil(map.width / stride);
        const windows = new Float64Array((height * width + 1) * layer.inputs); // in panels of two
        for (let y = 0, i = 0; y < height; y++)
          for (let x = 0; x < width; x++, i++)
            for (let dy = 0; dy < kernel; dy++)
              for (let dx = 0; dx < kernel; dx++) {
                const row = y * stride + dy - edge, column = x * stride + dx - edge;
                if (row < 0 || column < 0 || row >= map.height || column >= map.width) continue;
                let from = (row * map.width + column) * inputs;
                let to = (i - i % 2) * layer.inputs + 2 * (dy * kernel + dx) * inputs + i % 2;
                for (const end = from + inputs; from < end; from++, to += 2) windows[to] = map.values[from];
              }
        const found = multiply(windows, height * width, layer);
        return { height, width, channels: outputs, values: after ? groupNorm(found, after) : found };
      };
    }

    function residualBlock(name, stride) {
      const conv = (part, step) => convolution(`${name}.${part}.conv`, `${name}.${part}.norm`, step);
      const first = conv("first", stride), second = conv("second", 1);
      const shortcut = has(name + ".shortcut.conv.weight") ? conv("shortcut", stride) : map => map;
      return map => {
        const inner = first(map);
        relu(inner.values);
        const change = second(inner), same = shortcut(map).values;
        for (let i = 0; i < same.length; i++) change.values[i] += same[i];
        relu(change.values);
        return change;
      };
    }

    const stem = convolution("backbone.stem.conv", "backbone.stem.norm", 2), blocks = [];
    for (let stage = 1, stride = 2; range(`backbone.stages.${stage}`).length; stage++) {
      const step = stride < 16 ? 2 : 1;
      range(`backbone.stages.${stage}`).forEach((name, i) => blocks.push(residualBlock(name, i ? 1 : step)));
      stride *= step;
    }
    const project = convolution("input_proj", null, 1), heads = settings.nheads;

    // Multi-head attention (chapter 12): the answer, and the shares of each head, query and key.
    function attention(name) {
      const width = tensors[name + ".out_proj.weight"].shape[0], size = width / heads;
      const [q, k, v] = [0, 1, 2].map(i =>
        product(name + ".in_proj_weight", name + ".in_proj_bias", i * width, (i + 1) * width));
      const out = linear(name + ".out_proj");
      return (queries, keys, values) => {
        const T = queries.length / width, S = keys.length / width, shares = new Float32Array(heads * T * S);
        const asked = apply(q, queries), offered = apply(k, keys), told = apply(v, values);
        const mixed = new Float64Array(T * width), row = new Float64Array(S);
        for (let h = 0; h < heads; h++)
          for (let t = 0; t < T; t++) {
            const from = t * width + h * size;
            let most = -Infinity, sum = 0;
            for (let s = 0; s < S; s++) {
              let score = 0;
              for (let d = 0; d < size; d++) score += asked[from + d] * offered[s * width + h * size + d];
              row[s] = score / Math.sqrt(size);
              most = Math.max(most, row[s]);
            }
            for (let s = 0; s < S; s++) sum += row[s] = Math.exp(row[s] - most);
            for (let s = 0; s < S; s++) {
              const share = shares[(h * T + t) * S + s] = row[s] / sum;
              for (let d = 0; d < size; d++) mixed[from + d] += share * told[s * width + h * size + d];
            }
          }
        return [out(mixed), shares];
      };
    }

    // x and what a part of a layer makes of it; the norm comes before the part, or after the sum.
    const residual = (x, part, normed) => settings.pre_norm
      ? add(x, part(layerNorm(x, normed))) : layerNorm(add(x, part(x)), normed);
    const thinking = name => {
      const widen = linear(name + ".linear1"), narrow = linear(name + ".linear2");
      return x => narrow(relu(widen(x)));
    };

    const encoder = range("transformer.encoder.layers").map(name => {
      const look = attention(name + ".self_attn"), think = thinking(name);
      const [one, two] = [1, 2].map(i => norm(`${name}.norm${i}`));
      return (tokens, positions, note) => {
        tokens = residual(tokens, x => {
          const placed = add(x, positions), [found, shares] = look(placed, placed, x);
          note(shares);
          return found;
        }, one);
        return residual(tokens, think, two);
      };
    });
    const decoder = range("transformer.decoder.layers").map(name => {
      const talk = attention(name + ".self_attn"), look = attention(name + ".multihead_attn"), think = thinking(name);
      const [one, two, three] = [1, 2, 3].map(i => norm(`${name}.norm${i}`));
      return (slots, queries, memory, placed, noteTalk, noteLook) => {
        slots = residual(slots, x => {
          const named = add(x, queries), [found, shares] = talk(named, named, x);
          noteTalk(shares);
          return found;
        }, one);
        slots = residual(slots, x => {
          const [found, shares] = look(add(x, queries), placed, memory);
          noteLook(shares);
          return found;
        }, two);
        return residual(slots, think, three);
      };
    });
    const encoderNorm = has("transformer.encoder.norm.weight") && norm("transformer.encoder.norm");
    const decoderNorm = norm("transformer.decoder.norm"), classes = linear("class_embed");
    const boxes = range("bbox_embed.layers").map(linear), queries = vector("query_embed.weight");

    return (pixels, width, height) => {
      const image = new Float64Array(width * height * 3);
      for (let i = 0; i < image.length; i++)
        image[i] = (pixels[Math.floor(i / 3) * 4 + i % 3] / 255 - MEAN[i % 3]) / DEVIATION[i % 3];
      let map = stem({ height, width, channels: 3, values: image });
      relu(map.values);
      for (const block of blocks) map = block(map);
      const { height: rows, width: columns, channels, values } = project(map);
      const positions = sinePositions(rows, columns, channels, settings.temperature);
      const attended = [], talked = [], looked = [], logits = [], places = [];
      let memory = values, slots = new Float64Array(queries.length);
      for (const layer of encoder) memory = layer(memory, positions, shares => attended.push(shares));
      if (encoderNorm) memory = layerNorm(memory, encoderNorm);
      const placed = add(memory, positions);
      for (const layer of decoder) {
        slots = layer(slots, queries, memory, placed, x => talked.push(x), x => looked.push(x));
        const found = layerNorm(slots, decoderNorm);
        logits.push(Float32Array.from(classes(found)));
        const box = boxes.reduce((x, layer, i) => layer(i ? relu(x) : x), found);
        places.push(Float32Array.from(box, x => 1 / (1 + Math.exp(-x))));
      }
      return { rows, columns, heads, attended, talked, looked, logits, boxes: places }; // each a list, layer by layer
    };
  }

  // The program of the worker: first the packed model comes, then pictures; each is answered.
  function serve() {
    let model = null;
    onmessage = async ({ data }) => {
      try {
        if (data.packed) model = build(await unpack(data.packed));
        const start = performance.now();
        const answer = data.packed ? { ready: true } : model(data.pixels, data.width, data.height);
        postMessage({ ...answer, id: data.id, milliseconds: performance.now() - start });
      } catch (error) {
        postMessage({ id: data.id, error: String(error) });
      }
    };
  }
  return { unpack, build, serve };
}
if (typeof module !== "undefined") module.exports = liveDetr;
