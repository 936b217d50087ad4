"use strict";
/* The transformer of tinylm/model once more, in plain JavaScript: no library, no GPU, one token at a time.

   It computes what TinyLMForCausalLM computes, to rounding; a test compares the two. Read it beside
   tinylm/model/model_tinylm.py: the names are the same.

   Letters: C width, F inner width, H query heads, K key/value heads, D width of a head, V vocabulary, T tokens so far. */

/** A matrix of R rows and N columns: 32-bit floats, or 8-bit integers with one scale for each row. */
class Matrix {
  constructor(numbers, rows, columns, scales = null) {
    Object.assign(this, { numbers, rows, columns, scales });
  }

  /** y = W x (+ b): the sum over the columns, for each row. */
  times(x, bias = null) {
    const { numbers, rows, columns, scales } = this;
    const y = new Float32Array(rows);
    let row = 0;
    for (; row + 3 < rows; row += 4) { // four rows at a time: x is loaded once for all, and no sum waits for another
      const a = row * columns, b = a + columns, c = b + columns, d = c + columns;
      let one = 0, two = 0, three = 0, four = 0;
      for (let i = 0; i < columns; i++) {
        const value = x[i];
        one += numbers[a + i] * value;
        two += numbers[b + i] * value;
        three += numbers[c + i] * value;
        four += numbers[d + i] * value;
      }
      y[row] = one;
      y[row + 1] = two;
      y[row + 2] = three;
      y[row + 3] = four;
    }
    for (; row < rows; row++) for (let i = 0; i < columns; i++) y[row] += numbers[row * columns + i] * x[i];
    if (scales) for (row = 0; row < rows; row++) y[row] *= scales[row];
    return bias ? add(y, bias) : y;
  }

  /** One row as floats: the embedding of a token. */
  row(index) {
    const { numbers, columns, scales } = this;
    const row = Float32Array.from(numbers.subarray(index * columns, (index + 1) * columns));
    return scales ? row.map((value) => value * scales[index]) : row;
  }
}

/** RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, for each stretch of x that is as long as the weight. */
function rmsNorm(x, weight, eps) {
  const y = new Float32Array(x.length);
  const width = weight.length;
  for (let start = 0; start < x.length; start += width) {
    let squares = 0;
    for (let i = 0; i < width; i++) squares += x[start + i] * x[start + i];
    const scale = 1 / Math.sqrt(squares / width + eps);
    for (let i = 0; i < width; i++) y[start + i] = x[start + i] * scale * weight[i];
  }
  return y;
}

/** Rotary positions: turns the pair (x[i], x[i + D/2]) of every head by position * speed[i]. */
function rotate(x, width, position, speeds, factor) {
  const half = width / 2;
  for (let i = 0; i < half; i++) {
    const angle = Math.fround(position * speeds[i]);
    const cos = Math.cos(angle) * factor, sin = Math.sin(angle) * factor;
    for (let start = i; start < x.length; start += width) {
      const a = x[start], b = x[start + half];
      x[start] = a * cos - b * sin;
      x[start + half] = b * cos + a * sin;
    }
  }
}

/** Probabilities from logits; the largest is subtracted first, so that nothing overflows. */
function softmax(logits) {
  let largest = -Infinity, sum = 0;
  for (const value of logits) if (value > largest) largest = value;
  const result = new Float32Array(logits.length);
  for (let i = 0; i < logits.length; i++) sum += result[i] = Math.exp(logits[i] - largest);
  for (let i = 0; i < result.length; i++) result[i] /= sum;
  return result;
}

/** Keys and values of the tokens so far, for each layer: [T, K * D], in room that doubles when it is full. */
class KVCache {
  constructor(config) {
    this.width = config.keyHeads * config.headWidth;
    this.layers = Array.from({ length: config.layers }, () => ({ keys: new Float32Array(0), values: new Float32Array(0) }));
    this.length = 0;
    this.bytesPerToken = 8 * config.layers * this.width;
  }

  /** Makes room for one more token. */
  grow() {
    const wider = (old) => {
      const room = new Float32Array(Math.max(64 * this.width, 2 * old.length));
      room.set(old);
      return room;
    };
    for (const layer of this.layers) {
      if (layer.keys.length > this.length * this.width) continue;
      [layer.keys, layer.values] = [wider(layer.keys), wider(layer.values)];
    }
  }
}

class Transformer {
  /** `config` has the sizes, `tensors` the weights by the names that they have in a model folder. */
  constructor(config, tensors) {
    this.config = config;
    this.tensors = tensors;
    this.head = tensors["lm_head.weight"] || tensors["model.embed_tokens.weight"]; // one table for both, if tied
  }

  newCache() {
    return new KVCache(this.config);
  }

  /** Reads one token at the next place; returns the logits [V] of the token after it.

      `watch`, if given, takes notes: attention[layer][head] is how much this token looks at each token so far, and
      stream[layer] is the residual stream [C] before layer 0, after it, and so on. */
  read(token, cache, { watch = null, wantsLogits = true } = {}) {
    const { config, tensors } = this;
    if (cache.length >= config.context) throw new RangeError(`the context of ${config.context} tokens is full`);
    cache.grow();
    let x = tensors["model.embed_tokens.weight"].row(token);
    if (tensors.positions) x = add(x, tensors.positions.row(cache.length));
    if (watch) Object.assign(watch, { attention: [], stream: [x] });
    for (let layer = 0; layer < config.layers; layer++) {
      const name = `model.layers.${layer}`;
      const before = rmsNorm(x, tensors[`${name}.input_layernorm.weight`], config.eps);
      x = add(x, this.attend(before, layer, cache, watch));
      const between = rmsNorm(x, tensors[`${name}.post_attention_layernorm.weight`], config.eps);
      x = add(x, this.swiglu(between, `${name}.mlp`));
      if (watch) watch.stream.push(x);
    }
    cache.length++;
    return wantsLogits ? this.logits(x) : null;
  }

  /** Logits from the residual stream: after the last layer what the model says, after another its logit lens. */
  logits(x) {
    return this.head.times(rmsNorm(x, this.tensors["model.norm.weight"], this.config.eps));
  }

  /** Grouped-query attention: each query head compares itself with the keys so far and mixes their values. */
  attend(x, layer, cache, watch) {
    const { heads, keyHeads, headWidth, eps, speeds, rotationFactor } = this.config;
    const name = `model.layers.${layer}.self_attn`;
    let query = this.linear(`${name}.q_proj`, x), key = this.linear(`${name}.k_proj`, x);
    if (this.tensors[`${name}.q_norm.weight`]) {
      query = rmsNorm(query, this.tensors[`${name}.q_norm.weight`], eps);
      key = rmsNorm(key, this.tensors[`${name}.k_norm.weight`], eps);
    }
    const position = cache.length, stride = keyHeads * headWidth;
    if (speeds) {
      rotate(query, headWidth, position, speeds, rotationFactor);
      rotate(key, headWidth, position, speeds, rotationFactor);
    }
    const { keys, values } = cache.layers[layer];
    keys.set(key, position * stride);
    values.set(this.linear(`${name}.v_proj`, x), position * stride);
    const mixed = new Float32Array(heads * headWidth), seen = [];
    for (let head = 0; head < heads; head++) {
      const group = Math.floor(head / (heads / keyHeads)) * headWidth, start = head * headWidth;
      const scores = new Float32Array(position + 1);
      for (let t = 0; t <= position; t++) {
        let dot = 0;
        for (let i = 0; i < headWidth; i++) dot += query[start + i] * keys[t * stride + group + i];
        scores[t] = dot / Math.sqrt(headWidth);
      }
      const weights = softmax(scores);
      for (let t = 0; t <= position; t++) {
        for (let i = 0; i < headWidth; i++) mixed[start + i] += weights[t] * values[t * stride + group + i];
      }
      seen.push(weights);
    }
    if (watch) watch.attention.push(seen);
    return this.linear(`${name}.o_proj`, mixed);
  }

  /** down(silu(gate(x)) * up(x)). */
  swiglu(x, name) {
    const gate = this.linear(`${name}.gate_proj`, x), up = this.linear(`${name}.up_proj`, x);
    for (let i = 0; i < gate.length; i++) gate[i] = (gate[i] / (1 + Math.exp(-gate[i]))) * up[i];
    return this.linear(`${name}.down_proj`, gate);
  }

  linear(name, x) {
    return this.tensors[`${name}.weight`].times(x, this.tensors[`${name}.bias`] || null);
  }
}

function add(x, y) {
  const sum = new Float32Array(x.length);
  for (let i = 0; i < x.length; i++) sum[i] = x[i] + y[i];
  return sum;
}
