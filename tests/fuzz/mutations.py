"""Ways to damage a file on purpose: blindly, byte by byte, and with knowledge of what the bytes mean.

Every function takes a `random.Random` and returns new bytes, the same for the same seed. Blind damage finds what a
parser forgets; but nearly all of it is refused by the first check, so the mutations that keep a file well-formed
(JSON in JSON, instructions in a pickle, entries in a zip archive) are what reaches the code behind.
"""

from __future__ import annotations

import io
import json
import pickletools
import struct
import zipfile
from random import Random
from typing import Any

NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    8,
    255,
    256,
    2**16,
    2**20,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**12,
    10**30,
]
NASTY: list[Any] = [
    *NUMBERS, *(-number for number in NUMBERS), 0.0, -0.5, 1e-300, 1e300, True, False, None, "", "x", "1", "../x", "/",
    "/dev/zero", "\0", "\x1b[31m", "é" * 50, "a" * 5000, [], {}, [[]], [[[[1]]]], [0, 0], [1, -1],
    {"": {}}, {"a": None},
]  # fmt: skip
RAW = [
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b'"\\ud800"', b"[" * 2000, b'{"a":' * 500, b"", b"]", b"}", b'"',
    b"\xff",
    b'{"a":1,"a":2}', b"1,", b"[[],[],[],[],[],[]]",
]  # fmt: skip
"""Texts that Python's `json` takes or trips over, put where a value stood."""


def mutate_bytes(rng: Random, data: bytes, rounds: int = 4) -> bytes:
    """Flip, cut, repeat, overwrite or splice, up to `rounds` times."""
    found = bytearray(data)
    for _ in range(rng.randint(1, rounds)):
        at, length = rng.randrange(len(found) + 1), rng.choice((1, 2, 4, 8, 32, 256))
        kind = rng.randrange(7)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del found[at : at + length]
        elif kind == 3:
            found[at:at] = found[at : at + length] * rng.choice((1, 2, 50))
        elif kind == 4:
            found[at : at + 8] = struct.pack(rng.choice("<>") + "Q", rng.choice(NUMBERS) % 2**64)
        elif kind == 5:
            found = found[:at] if rng.random() < 0.3 else found
        else:
            other = rng.randrange(len(found) + 1)
            found[at : at + length] = found[other : other + length]
    return bytes(found)


def mutate_json(rng: Random, data: bytes, rounds: int = 3) -> bytes:
    """Well-formed JSON with a value, a key or a place exchanged; sometimes with one of RAW in it."""
    value = json.loads(data)
    marker = "\uffff raw"
    for _ in range(rng.randint(1, rounds)):
        value = _changed(rng, value, marker)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    for spelling in (json.dumps(marker).encode(), json.dumps(marker, ensure_ascii=False).encode()):
        while spelling in text:
            text = text.replace(spelling, rng.choice(RAW), 1)
    return mutate_bytes(rng, text, 1) if rng.random() < 0.1 else text


def _changed(rng: Random, value: Any, marker: str) -> Any:
    """The value with one place in it changed, found by going down at random."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(12)
        if kind == 0:
            return {name: item for name, item in value.items() if name != key}
        if kind == 1:
            return {(str(rng.choice(NASTY)) if name == key else name): item for name, item in value.items()}
        if kind == 2:
            return {**value, str(rng.choice(NASTY)): rng.choice(NASTY)}
        if kind == 3:
            return {**value, key: value[rng.choice(list(value))]}
        return {**value, key: _changed(rng, value[key], marker)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        kind = rng.randrange(8)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return value[:at] + [value[at]] * rng.choice((2, 3, 100)) + value[at:]
        return [*value[:at], _changed(rng, value[at], marker), *value[at + 1 :]]
    if isinstance(value, int | float) and rng.random() < 0.3:
        return rng.choice((value + 1, value - 1, value * 2, -value, str(value), float(value)))
    return marker if rng.random() < 0.15 else rng.choice(NASTY)


def mutate_lines(rng: Random, data: bytes, tokens: list[bytes]) -> bytes:
    """A text file with lines exchanged, repeated and grafted with the format's own signs."""
    lines = data.split(b"\n")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(lines))
        kind = rng.randrange(5)
        if kind == 0:
            lines.insert(at, rng.choice(lines))
        elif kind == 1:
            cut = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + rng.choice(tokens) * rng.choice((1, 1, 1, 3, 400)) + lines[at][cut:]
        elif kind == 2:
            lines[at] = mutate_bytes(rng, lines[at], 1)
        elif kind == 3:
            key, colon, _ = lines[at].partition(b":")
            lines[at] = key + colon + b" " + rng.choice(tokens)
        elif len(lines) > 1:
            del lines[at]
    return b"\n".join(lines)


def mutate_safetensors(rng: Random, data: bytes) -> bytes:
    """A safetensors file whose header was changed as JSON, its length set right; or changed blindly."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    length = int.from_bytes(data[:8], "little")
    header, numbers = data[8 : 8 + length], data[8 + length :]
    header = mutate_json(rng, header)
    if rng.random() < 0.1:
        numbers = mutate_bytes(rng, numbers)
    said = len(header) if rng.random() < 0.95 else rng.choice(NUMBERS) % 2**64
    return struct.pack("<Q", said) + header + numbers


def mutate_pth(rng: Random, data: bytes) -> bytes:
    """A `.pth` with an instruction of its pickle, an entry of its archive, or a byte exchanged."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    kind = rng.randrange(10)
    at = rng.randrange(len(entries))
    name, content = entries[at]
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    if kind == 0:
        entries.pop(at)
    elif kind == 1:
        entries[at] = (name, content * rng.choice((0, 2, 100)))
    elif kind == 2:
        entries[at] = (str(rng.choice(NASTY)).replace("\0", "0") or "x", content)
    elif kind == 3:
        entries[at] = (name, mutate_bytes(rng, content))
    else:
        entries = [(n, mutate_pickle(rng, c) if n.endswith("data.pkl") else c) for n, c in entries]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return mutate_bytes(rng, packed.getvalue(), 1) if rng.random() < 0.1 else packed.getvalue()


INSTRUCTIONS = [
    b"cbuiltins\nbytearray\n", b"ctorch._utils\n_rebuild_qtensor\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n",
    b"(", b")", b"]", b"}", b"t", b"\x85", b"\x86", b"R", b"b", b"s", b"u", b"e", b"a", b"2", b"0", b"Q", b".",
    b"h\x00",
    b"q\x00", b"N", b"K\x00", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 8 + b"\x00", b"I10\n",
    b"X\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f", b"F1e999\n", b"\x94", b"\x93", b"(lp0\n", b"\x8f", b"\x81",
]  # fmt: skip


def mutate_pickle(rng: Random, program: bytes) -> bytes:
    """A pickle with instructions left out, repeated, exchanged, put in, or given another argument."""
    starts = [place or 0 for _, _, place in pickletools.genops(program)] + [len(program)]
    steps = [program[begin:end] for begin, end in zip(starts, starts[1:], strict=False)]
    for _ in range(rng.randint(1, 3)):
        at, other = rng.randrange(len(steps)), rng.randrange(len(steps))
        kind = rng.randrange(6)
        if kind == 0 and len(steps) > 1:
            del steps[at]
        elif kind == 1:
            steps[at:at] = steps[at : at + rng.randrange(30)]
        elif kind == 2:
            steps[at], steps[other] = steps[other], steps[at]
        elif kind == 3:
            steps.insert(at, rng.choice(INSTRUCTIONS))
        elif kind == 4:
            numbers = [place for place, step in enumerate(steps) if step[:1] in (b"K", b"M", b"J")] or [at]
            number = rng.choice(NUMBERS) * rng.choice((1, 1, -1))
            steps[rng.choice(numbers)] = b"\x8a\x10" + (number % 2**127).to_bytes(16, "little")
        else:
            steps[at] = mutate_bytes(rng, steps[at], 1)
    return b"".join(steps)


def mutate_gguf(rng: Random, data: bytes) -> bytes:
    """A number of the header or of the weights exchanged; sometimes blind damage."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data, 2)
    found = bytearray(data)
    header = data.index(b"output_norm.weight") if rng.random() < 0.6 else len(data) - 64
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(4, header)
        if rng.random() < 0.5:
            found[at] = rng.randrange(256)
        else:
            size = rng.choice("IQ")
            found[at : at + struct.calcsize(size)] = struct.pack(f"<{size}", rng.choice(NUMBERS) % 2**32)
    return bytes(found)
