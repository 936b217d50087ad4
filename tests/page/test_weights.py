"""A model that is damaged, or not one at all: the page reads it, or refuses it with a sentence."""

from __future__ import annotations

import base64
import copy
import json
import random
import time
import zlib

import pytest

from tests.model.small_models import trained_model
from tests.page.conftest import write_page
from tests.page.test_visit import chat_tokenizer
from tinylm.generation.engine import Engine
from tinylm.page.packed_model import packed_model

__all__ = ["chat_tokenizer"]


@pytest.fixture(scope="module")
def model(chat_tokenizer):
    return trained_model(vocab_size=chat_tokenizer.vocab_size, qk_norm=True, qkv_bias=True)


@pytest.fixture(scope="module")
def packed(model, chat_tokenizer) -> bytes:
    engine = Engine(model, chat_tokenizer, model.dtype, chat_tokenizer.document_start)
    return packed_model(engine, "int8")


@pytest.fixture(scope="module")
def path(model, chat_tokenizer, tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("pages") / "größe.html", model, chat_tokenizer, "int8")


def packing(header, numbers: bytes) -> bytes:
    """A file with a right length and checksum."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = text + b" " * (-len(text) % 4) + numbers
    return b"%08d%08x" % (len(data) - len(numbers), zlib.adler32(data)) + data


def parts_of(packed: bytes) -> tuple[dict, bytes]:
    length = int(packed[:8])
    return json.loads(packed[16 : 16 + length]), packed[16 + length :]


READ = """([file, changes]) => changes.map(edits => {
  const letters = atob(file), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  for (const [at, values, isSigned] of edits) {
    bytes.set(values, at);
    const sum = isSigned ? checksum(bytes.subarray(16)).toString(16).padStart(8, "0") : "";
    for (let i = 0; i < sum.length; i++) bytes[8 + i] = sum.charCodeAt(i);
  }
  try {
    const model = new LocalModel(readModel(bytes.buffer));
    model.tokenizer.encode("Größe? 1 a");
    model.transformer.read(3, model.transformer.newCache());
    return null;
  } catch (error) {
    return [error instanceof BadModel, error.message];
  }
})"""


def reading(tab, file: bytes, changes=((),)) -> list:
    """What is said of the file with each of the changes: (at, bytes, whether the checksum fits)."""
    return tab.evaluate(READ, [base64.b64encode(file).decode(), changes])


NORM = "model.layers.1.self_attn.k_norm.weight"
BAD = [
    ("config.layers", 3, "the weights model.layers.2.input_layernorm.weight are missing"),
    ("config.layers", 1e15, "its config has 1000000000000000 layers"),
    ("config.heads", -4, "its config has -4 heads"),
    ("config.heads", 3, "its 3 heads cannot share 2 key heads"),
    ("config.headWidth", 15.5, "its config has 15.5 headWidth"),
    ("config.width", 32, "embed_tokens.weight have the shape [336, 64], and its config says [336, 32]"),
    ("config.inner", "192", "its config has 192 inner"),
    ("config.vocabulary", None, "its config has something else vocabulary"),
    ("config.vocabulary", 337, "have the shape [336, 64], and its config says [337, 64]"),
    ("config.context", 10**12, "its config has 1000000000000 context"),
    ("config.eps", 0, "a number of its config is missing"),
    ("config.rotationFactor", "1", "a number of its config is missing"),
    ("config.speeds", [1.0], "no rotary speed for each pair of the 16 of a head"),
    ("config.speeds", None, "the weights positions are missing"),
    ("config.isTied", False, "the weights lm_head.weight are missing"),
    ("config.hasHeadNorms", False, "its config has no weights model.layers.0.self_attn.q_norm.weight"),
    ("config.hasQkvBias", False, "its config has no weights model.layers.0.self_attn.q_proj.bias"),
    ("config.hasMlpBias", True, "the weights model.layers.0.mlp.gate_proj.bias are missing"),
    ("config", [], "it has no config"),
    ("tensors", {}, "its header has no list of weights"),
    ("tensors.0.name", "__proto__", "its config has no weights __proto__"),
    ("tensors.0.name", "constructor", "its config has no weights constructor"),
    ("tensors.0", None, "its config has no weights undefined"),
    ("tensors.1.name", "model.embed_tokens.weight", "no weights model.embed_tokens.weight, or they are there twice"),
    ("tensors.0.dtype", "bf16", "model.embed_tokens.weight are of type bf16"),
    ("tensors.0.dtype", "<b>" * 99, "are of type <b><b>"),
    ("tensors.1.dtype", "int8", "are of type int8"),
    ("tensors.0.shape", [[336], 64], "have the shape something else"),
    ("tensors.0.shape", [64, 336], "have the shape [64, 336], and its config says [336, 64]"),
    ("tensors.0.shape", [1e15, -1, 0.5], "have the shape [1000000000000000, -1, 0.5]"),
    ("tokenizer.tokens", [], "its merges are not of its tokens"),
    ("tokenizer.tokens", ["a"] * 337, "its 337 tokens are more than the 336 rows of its weights"),
    ("tokenizer.tokens.300", "größe", "its merges are not of its tokens"),
    ("tokenizer.tokens", {"length": 3}, "it has no tokens"),
    ("tokenizer.merges.0", [1e15, 2, 3], "its merges are not of its tokens"),
    ("tokenizer.merges.0.2", 0.5, "its merges are not of its tokens"),
    ("tokenizer.merges.0", [5, 5], "its merges are not of its tokens"),
    ("tokenizer.merges.0", None, "its merges are not of its tokens"),
    ("tokenizer.digits", "toString", "it splits text in a way that is unknown here: toString"),
    ("tokenizer.controls", [336], "its control tokens are none of its tokens"),
    ("tokenizer.imEnd", "1", "its control tokens are none of its tokens"),
    ("tokenizer", 7, "it has no tokens"),
]  # fmt: skip


def test_weights_of_another_shape(packed, path, visit):
    header, numbers = parts_of(packed)
    files = []
    for where, value, _ in BAD:
        changed = copy.deepcopy(header)
        *steps, last = [int(step) if step.isdecimal() else step for step in where.split(".")]
        place = changed
        for step in steps:
            place = place[step]
        place[last] = value
        files.append(packing(changed, numbers))
    tab = visit(path)
    assert reading(tab, packing(header, numbers)) == [None]
    for (where, value, said), file in zip(BAD, files, strict=True):
        ((is_bad_model, message),) = reading(tab, file)
        assert is_bad_model and said in message and len(message) < 250, (where, value, message)
        assert message.startswith("this model is damaged: ") and message.endswith("make the file again")


def test_bytes_that_are_no_model(packed, path, visit):
    header, numbers = parts_of(packed)
    scale = 336 * 64  # behind the first matrix
    nan, infinite = b"\0\0\xc0\x7f", b"\0\0\x80\xff"
    entries = json.dumps(header).encode()
    deep = entries.replace(b'"shape": [336, 64]', b'"shape": ' + b"[" * 200_000 + b"]" * 200_000, 1)
    cases = {
        b"": "it is cut short",
        b"1e5     " * 9: "it is cut short",
        b"-0000001" * 9: "it is cut short",
        b"99999999" * 9: "it is cut short",
        packed[:-4]: "cut short, or bytes of it are others",
        packed + b"0000": "cut short, or bytes of it are others",
        packing(header, numbers[:-4]): "are missing",
        packing(header, numbers + b"0000"): "more follows its weights",
        packing("{'größe'".encode(), b""): "its header is not JSON",
        packing(b"\xff\xfe", b""): "its header is not JSON",
        packing([], b""): "its header has no list of weights",
        packing(b"null", b""): "its header has no list of weights",
        packing(header, nan * (len(numbers) // 4)): "hold something that is not a number",
        packing(header, numbers[:scale] + infinite + numbers[scale + 4 :]): "hold something that is not a number",
        packing(b"[" * 4_000_000, b""): "its header is not JSON",
        packing(deep, numbers): "",
    }
    tab = visit(path)
    for file, said in cases.items():
        (found,) = reading(tab, file)
        assert found is not None and found[0] and said in found[1], (said, found)


def test_three_hundred_mutations(packed, path, visit):
    """With a checksum that fits, each is read, or refused with a sentence; without one, all are refused."""
    numbers = random.Random(17)
    length = int(packed[:8])
    changes = []
    for _ in range(300):
        at = 16 + numbers.randrange(length if numbers.random() < 0.8 else len(packed) - 30)
        other = 16 + numbers.randrange(length)
        values = numbers.choice(
            (
                bytes([packed[at] ^ 1 << numbers.randrange(8)]),
                bytes(numbers.choices(b'0123456789-.eE{}[]",:nul\\', k=numbers.randrange(1, 9))),
                packed[other : other + 6],
            )
        )
        changes.append([(at, list(values), True)])
    tab = visit(path)
    begun = time.monotonic()
    found = reading(tab, packed, changes)
    assert time.monotonic() - begun < 8
    bad = [each for each in found if each is not None]
    assert len(bad) > 100 and all(is_bad and said.startswith("this model is damaged: ") for is_bad, said in bad)
    assert None in found
    unsigned = [
        [(at, values, False)] for ((at, values, _),) in changes if bytes(values) != packed[at : at + len(values)]
    ]
    assert len(unsigned) > 250 and all(each and each[0] for each in reading(tab, packed, unsigned))


def test_the_cache_grows_to_the_context(chat_tokenizer, visit, tmp_path):
    """A context that no memory could hold costs nothing until it is used."""
    model = trained_model(vocab_size=chat_tokenizer.vocab_size, max_position_embeddings=2**14)
    tab = visit(write_page(tmp_path / "page.html", model, chat_tokenizer))
    script = """() => {
      const { transformer } = window.parts.model, cache = transformer.newCache(), sizes = new Set();
      for (let i = 0; i < 200; i++) {
        transformer.read(i % 9, cache);
        sizes.add(cache.layers[1].keys.length);
      }
      return [...sizes];
    }"""
    assert tab.evaluate(script) == [64 * 32, 128 * 32, 256 * 32]
