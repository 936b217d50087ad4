"""Headers of GGUF files that cannot be true: each is refused in one line, soon, and without the memory it claims."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from tinylm.checkpoint.gguf_file import TYPES, read_gguf, read_gguf_tensor

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def text(content: str | bytes) -> bytes:
    data = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def texts(*items: bytes, count: int | None = None) -> bytes:
    return struct.pack("<IQ", STRING, len(items) if count is None else count) + b"".join(items)


def tensor(name: str, shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0, num: int | None = None) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape) if num is None else num, *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def built(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    num_bytes: int = 32,
    counts: tuple[int, int] | None = None,
    version: int = 3,
    start: bytes = b"GGUF",
) -> bytes:
    num_tensors, num_keys = counts or (len(tensors), len(keys))
    head = start + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(num_bytes)


GOOD = built((key("a", U32, struct.pack("<I", 7)),), (tensor("t"),))
CASES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a GGUF file"),
    "other": (built(start=b"GGML"), "not a GGUF file"),
    "version 1": (built(version=1), "is of version 1; expected a little-endian GGUF of version 2 or 3"),
    "big-endian": (built(version=3 << 24), "it is big-endian"),
    "cut in the header": (GOOD[:50], "promises 1 tensors|needs .* bytes; only|byte"),
    "cut in the numbers": (GOOD[:-4], "t needs 32 bytes at byte .*; the file has"),
    "longer": (GOOD + b"x" * 100, "its header promises"),
    "many tensors": (built(counts=(2**63, 0)), "promises 9,223,372,036,854,775,808 tensors"),
    "many keys": (built(counts=(0, 10**12)), "promises 1,000,000,000,000 keys"),
    "some tensors too many": (built((), (tensor("t"),), counts=(2, 0), num_bytes=64), "dimensions|needs|name"),
    "long key": (built((struct.pack("<Q", 2**30),), num_bytes=64), "a key at byte .* needs 1,073,741,824 bytes"),
    "long key that is there": (built((text(b"a" * 5000),), num_bytes=64), "has 5,000 bytes; expected up to 512"),
    "endless key": (built((struct.pack("<Q", 2**64 - 1),), num_bytes=64), "needs 18,446,744,073,709,551,615 bytes"),
    "key with an escape": (built((key("\x1b[2J", U32, b"0000"),)), "the tensor name|printable"),
    "key twice": (built((key("a", U32, b"0000"), key("a", U32, b"0000"))), "the key a appears twice"),
    "long text": (built((key("a", STRING, struct.pack("<Q", 2**40)),)), "a at byte .* needs 1,099,511,627,776 bytes"),
    "type of a value": (built((key("a", 13, b"0000"),)), "a has the type 13; expected 0 to 12"),
    "list of lists": (built((key("a", ARRAY, struct.pack("<IQ", ARRAY, 1)),)), "a is a list of type 9"),
    "long list": (built((key("a", ARRAY, struct.pack("<IQ", F32, 2**61)),)), "needs 9,223,372,036,854,775,808 bytes"),
    "long list of texts": (built((key("a", ARRAY, texts(count=2**62)),)), "a at byte .* needs"),
    "text in a list": (
        built((key("tokenizer.ggml.tokens", ARRAY, texts(struct.pack("<Q", 2**30), count=1)),)),
        "item 0 of tokenizer.ggml.tokens has 1,073,741,824 bytes",
    ),
    "not UTF-8": (
        built((key("tokenizer.ggml.tokens", ARRAY, texts(text("é"), text(b"\xff"))),)),
        "item 1 of tokenizer.ggml.tokens is b'.xff', not UTF-8",
    ),
    "alignment": (built((key("general.alignment", U32, struct.pack("<I", 33)),)), "general.alignment is 33"),
    "no alignment": (built((key("general.alignment", U32, bytes(4)),)), "general.alignment is 0"),
    "text alignment": (built((key("general.alignment", STRING, text("32")),)), "general.alignment is '32'"),
    "trillion": (built((), (tensor("t", (10**12,)),)), "t needs 4,000,000,000,000 bytes"),
    "overflow": (built((), (tensor("t", (2**32, 2**32, 2**32)),)), "t needs"),
    "zero": (built((), (tensor("t", (0, 4)),)), r"t has the shape \[0, 4\]; expected numbers from 1"),
    "no dimensions": (built((), (tensor("t", ()),)), "t has 0 dimensions; expected 1 to 4"),
    "many dimensions": (built((), (tensor("t", (1,), num=2**31),)), "t has 2,147,483,648 dimensions"),
    "type": (built((), (tensor("t", kind=99),)), "t is of type 99; expected F32, F16"),
    "whole numbers": (built((), (tensor("t", kind=26),)), "t is of type I32; expected F32"),
    "fewer bits": (built((), (tensor("t", (256,), kind=16),)), "t is of type IQ2_XXS; expected F32"),
    "row": (built((), (tensor("t", (40,), kind=2),)), r"t has the shape \[40\]; .*multiple of 32 for Q4_0"),
    "offset": (built((), (tensor("t", offset=2**63),)), "t needs 32 bytes at byte"),
    "hole": (built((), (tensor("t", offset=32),), 64), "the tensor t leaves a hole before it"),
    "odd offset": (built((), (tensor("t"), tensor("u", offset=36)), 68), "the tensor u leaves a hole"),
    "overlap": (built((), (tensor("t"), tensor("u")), 64), "the tensor [tu] shares bytes with another tensor"),
    "inside": (built((), (tensor("t", (16,)), tensor("u", offset=32)), 64), "the tensor u shares bytes"),
    "tensor twice": (built((), (tensor("t"), tensor("t", offset=32)), 64), "the tensor t appears twice"),
    "escape": (built((), (tensor("\x1b]0;a\x07"),)), r"the tensor name '.x1b"),
}  # fmt: skip


def refused(path: Path, match: str) -> None:
    begin = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match) as caught:
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - begin < 1
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


@pytest.mark.parametrize("case", CASES)
def test_a_header_that_cannot_be_true(tmp_path: Path, case: str) -> None:
    data, message = CASES[case]
    (tmp_path / "a.gguf").write_bytes(data)
    refused(tmp_path / "a.gguf", message)


def test_a_good_one_passes(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(GOOD)
    contents = read_gguf(tmp_path / "a.gguf")
    assert contents.values == {"a": 7} and contents.tensors["t"].shape == (8,)
    assert read_gguf_tensor(tmp_path / "a.gguf", "t", contents.tensors["t"]).tolist() == [0.0] * 8


def test_every_cut_is_seen(tmp_path: Path) -> None:
    for length in range(len(GOOD)):
        (tmp_path / "a.gguf").write_bytes(GOOD[:length])
        refused(tmp_path / "a.gguf", ".")


@pytest.mark.parametrize("length", [2**30, 2**20 + 1])
def test_a_text_of_a_gigabyte_is_passed_over(tmp_path: Path, length: int) -> None:
    """It is there, in a sparse file; only what is used is read."""
    path = tmp_path / "a.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IQ", STRING, length))
        file.truncate(-(-(file.tell() + length) // 32) * 32)
    tracemalloc.start()
    assert read_gguf(path).values == {"a": None}
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_file_that_shrinks_after_the_check(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(GOOD)
    stored = read_gguf(tmp_path / "a.gguf").tensors["t"]
    (tmp_path / "a.gguf").write_bytes(GOOD[:-8])
    with pytest.raises(ValueError, match="t ends early; the file became shorter"):
        read_gguf_tensor(tmp_path / "a.gguf", "t", stored)


def test_a_link_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.gguf").write_bytes(GOOD)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.gguf").symlink_to(tmp_path / "secret.gguf")
    refused(tmp_path / "in" / "a.gguf", "is a link that leads out of its folder")


def test_types_are_those_of_the_package() -> None:
    kinds: Callable[[str], gguf.GGMLQuantizationType] = gguf.GGMLQuantizationType.__getitem__
    assert all(kinds(name) in gguf.GGML_QUANT_SIZES for name in TYPES)
