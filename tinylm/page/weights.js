"use strict";
/* A model in one piece of bytes: a header that says what lies where, then the numbers.

   Layout: 8 bytes, the header's length as text in base ten; the header, JSON; the tensors, each at a multiple of 4. */

class BadModel extends Error {}

/** Bytes -> {config, tokenizer, tensors, about}. Every size is checked before it is used. */
function readModel(buffer) {
  const text = new TextDecoder();
  const length = Number(text.decode(buffer.slice(0, 8)));
  if (!Number.isInteger(length) || length <= 0 || 8 + length > buffer.byteLength) {
    throw new BadModel("the model in this page is cut short or damaged; make the page again");
  }
  let header;
  try {
    header = JSON.parse(text.decode(buffer.slice(8, 8 + length)));
  } catch {
    throw new BadModel("the model in this page is damaged; make the page again");
  }
  const start = 8 + length;
  const tensors = {};
  for (const [name, { dtype, shape, at, scales }] of Object.entries(header.tensors)) {
    const count = shape.reduce((a, b) => a * b, 1);
    const numbers = array(buffer, start + at, dtype === "int8" ? Int8Array : Float32Array, count, name);
    const rowScales = dtype === "int8" ? array(buffer, start + scales, Float32Array, shape[0], name) : null;
    tensors[name] = shape.length === 1 ? numbers : new Matrix(numbers, shape[0], shape[1], rowScales);
  }
  for (const [name, tensor] of Object.entries(tensors)) {
    const numbers = tensor instanceof Matrix ? tensor.scales || tensor.numbers : tensor;
    if (!numbers.every(Number.isFinite)) throw new BadModel(`the weights ${name} hold something that is not a number`);
  }
  return { ...header, tensors };
}

function array(buffer, offset, Kind, count, name) {
  if (offset + count * Kind.BYTES_PER_ELEMENT > buffer.byteLength) {
    throw new BadModel(`the model in this page is cut short: ${name} is missing; make the page again`);
  }
  return new Kind(buffer, offset, count);
}
