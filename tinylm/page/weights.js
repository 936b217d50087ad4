"use strict";
/* A model in one piece of bytes: a header that says what it is, then the numbers.

   Layout: 8 digits, the header's length; 8 hexadecimal digits, the Adler-32 checksum of all that follows; the header,
   JSON; then each tensor in the order of the header, those of int8 with the scales of their rows behind them, each
   padded to a multiple of 4 bytes. Nothing is believed: every size is checked before it is used. */

class BadModel extends Error {}

function check(isGood, what) {
  if (!isGood) throw new BadModel(`this model is damaged: ${what}; reload the page, or make the file again`);
}

/** Bytes -> {config, tokenizer, tensors}. */
function readModel(buffer) {
  const sizes = /^(\d{8})([0-9a-f]{8})$/.exec(String.fromCharCode(...new Uint8Array(buffer.slice(0, 16))));
  check(sizes && 16 + +sizes[1] <= buffer.byteLength, "it is cut short");
  check(checksum(new Uint8Array(buffer, 16)) === parseInt(sizes[2], 16), "it is cut short, or bytes of it are others now");
  let header;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(buffer, 16, +sizes[1])));
  } catch {
    check(false, "its header is not JSON");
  }
  check(isRecord(header) && Array.isArray(header.tensors), "its header has no list of weights");
  const { config, tokenizer } = header;
  checkConfig(config);
  checkTokenizer(tokenizer, config.vocabulary);
  return { config, tokenizer, tensors: readTensors(header.tensors, shapesOf(config), buffer, 16 + +sizes[1]) };
}

/** Adler-32: two sums over the bytes (RFC 1950). 5552 bytes at a time keep them below 2^32. */
function checksum(data) {
  let a = 1, b = 0;
  for (let start = 0; start < data.length; start += 5552) {
    const end = Math.min(start + 5552, data.length);
    for (let i = start; i < end; i++) b += a += data[i];
    a %= 65521;
    b %= 65521;
  }
  return b * 65536 + a;
}

function isRecord(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isSize(value, most = 2 ** 40) {
  return Number.isInteger(value) && value >= 1 && value <= most;
}

function checkConfig(config) {
  check(isRecord(config), "it has no config");
  const most = { layers: 1024, heads: 1024, keyHeads: 1024, headWidth: 65536, width: 65536, inner: 2 ** 20,
    vocabulary: 2 ** 21, context: 2 ** 20 };
  for (const [name, limit] of Object.entries(most)) {
    check(isSize(config[name], limit), `its config has ${shorten(config[name])} ${name}`);
  }
  const { heads, keyHeads, headWidth, eps, speeds, rotationFactor } = config;
  check(heads % keyHeads === 0, `its ${heads} heads cannot share ${keyHeads} key heads`);
  check(Number.isFinite(eps) && eps > 0 && Number.isFinite(rotationFactor), "a number of its config is missing");
  check(speeds === null || (Array.isArray(speeds) && speeds.length * 2 === headWidth && speeds.every(Number.isFinite)),
    `it has no rotary speed for each pair of the ${headWidth} of a head`);
}

/** The shape of every tensor that a model of this config has, by name. */
function shapesOf(config) {
  const { layers, heads, keyHeads, headWidth, width, inner, vocabulary, context } = config;
  const [queries, keys] = [heads * headWidth, keyHeads * headWidth];
  const shapes = new Map([["model.embed_tokens.weight", [vocabulary, width]], ["model.norm.weight", [width]]]);
  const linear = (name, rows, columns, hasBias) => {
    shapes.set(`${name}.weight`, [rows, columns]);
    if (hasBias) shapes.set(`${name}.bias`, [rows]);
  };
  if (!config.isTied) linear("lm_head", vocabulary, width, false);
  if (config.speeds === null) shapes.set("positions", [context, width]);
  for (let layer = 0; layer < layers; layer++) {
    const [attention, mlp] = [`model.layers.${layer}.self_attn`, `model.layers.${layer}.mlp`];
    for (const norm of ["input", "post_attention"]) shapes.set(`model.layers.${layer}.${norm}_layernorm.weight`, [width]);
    linear(`${attention}.q_proj`, queries, width, config.hasQkvBias);
    linear(`${attention}.k_proj`, keys, width, config.hasQkvBias);
    linear(`${attention}.v_proj`, keys, width, config.hasQkvBias);
    linear(`${attention}.o_proj`, width, queries, config.hasOutputBias);
    for (const norm of config.hasHeadNorms ? ["q", "k"] : []) shapes.set(`${attention}.${norm}_norm.weight`, [headWidth]);
    linear(`${mlp}.gate_proj`, inner, width, config.hasMlpBias);
    linear(`${mlp}.up_proj`, inner, width, config.hasMlpBias);
    linear(`${mlp}.down_proj`, width, inner, config.hasMlpBias);
  }
  return shapes;
}

function readTensors(list, shapes, buffer, start) {
  const tensors = {};
  const take = (Kind, count, name) => {
    const size = count * Kind.BYTES_PER_ELEMENT;
    check(start + size <= buffer.byteLength, `the numbers of ${name} are missing`);
    const numbers = new Kind(buffer, start, count);
    start += size + (-size & 3);
    return numbers;
  };
  for (const { name, dtype, shape } of list.map((each) => each || {})) {
    const expected = shapes.get(name);
    check(expected, `its config has no weights ${shorten(name)}, or they are there twice`);
    shapes.delete(name);
    check(Array.isArray(shape) && shape.length === expected.length && shape.every((size, axis) => size === expected[axis]),
      `the weights ${name} have the shape ${shorten(shape)}, and its config says ${shorten(expected)}`);
    check(dtype === "f32" || (dtype === "int8" && expected.length === 2), `the weights ${name} are of type ${shorten(dtype)}`);
    const [rows, columns] = expected;
    const numbers = take(dtype === "int8" ? Int8Array : Float32Array, rows * (columns ?? 1), name);
    const scales = dtype === "int8" ? take(Float32Array, rows, name) : null;
    check(isFiniteAll(scales || numbers), `the weights ${name} hold something that is not a number`);
    tensors[name] = expected.length === 1 ? numbers : new Matrix(numbers, rows, columns, scales);
  }
  check(shapes.size === 0, `the weights ${[...shapes.keys()][0]} are missing`);
  check(start === buffer.byteLength, "more follows its weights");
  return tensors;
}

/** Whether all are finite: zero times anything else is not a number. */
function isFiniteAll(numbers) {
  let sum = 0;
  for (let i = 0; i < numbers.length; i++) sum += 0 * numbers[i];
  return sum === 0;
}

function checkTokenizer(tokenizer, vocabulary) {
  const isList = (list, isGood) => Array.isArray(list) && list.every(isGood);
  const isId = (id) => Number.isInteger(id) && id >= 0 && id < tokenizer.tokens.length;
  check(isRecord(tokenizer) && isList(tokenizer.tokens, (name) => name === null || typeof name === "string"),
    "it has no tokens");
  const { tokens, merges, digits, controls, documentStart, stops, imStart, imEnd, canChat } = tokenizer;
  check(tokens.length <= vocabulary, `its ${tokens.length} tokens are more than the ${vocabulary} rows of its weights`);
  check(isList(merges, (merge) => isList(merge, isId) && merge.length === 3 && isJoined(tokens, merge)),
    "its merges are not of its tokens");
  check(Object.keys(DIGITS).includes(digits), `it splits text in a way that is unknown here: ${shorten(digits)}`);
  check([controls, documentStart, canChat ? [imStart, imEnd] : []].every((ids) => isList(ids, isId)) &&
    isList(stops, Number.isInteger), "its control tokens are none of its tokens");
  const names = new Set(tokens);
  check(BYTE_CHARACTERS.every((character) => names.has(character)), "it has no token for some byte");
}

function isJoined(tokens, [left, right, joined]) {
  return tokens[left] !== null && tokens[right] !== null && tokens[joined] === tokens[left] + tokens[right];
}

/** What a damaged file holds, short enough for a sentence. */
function shorten(value) {
  const isNumbers = Array.isArray(value) && value.every(Number.isFinite);
  const text = isNumbers ? `[${value.slice(0, 10).join(", ")}]` : typeof value === "object" ? "something else" : `${value}`;
  return text.length > 60 ? `${text.slice(0, 60)}…` : text;
}
