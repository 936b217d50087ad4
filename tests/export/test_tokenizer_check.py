"""An export reads its tokenizer back, and refuses a file that gives a text other tokens; llama.cpp agrees with it."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.export.llama_cpp import LlamaCpp
from tests.model.small_models import trained_model
from tests.tokenizer.other_tokenizers import write_tokenizer
from tinylm.checkpoint.loading import load_for_use
from tinylm.export import gguf_metadata, tokenizer_check
from tinylm.export.gguf import export_gguf
from tinylm.export.hf import export_hf
from tinylm.export.tokenizer_check import PROBES, check_gguf, check_tokenizer_json, probes
from tinylm.tokenizer.bpe import BYTE_ALPHABET, BytePairEncoding
from tinylm.tokenizer.split_patterns import DIGIT_PATTERNS, Digits
from tinylm.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer
from tinylm.tokenizer.tokenizer_json import definition_from_bpe

TEXT = "".join(PROBES) * 2 + "größer größte 1234 1234 2024 Größe привет 你好 <|fim|> [SEP] "
OWN = ["<|fim|>", "<|lang:de|>", "[SEP]", "<|日本|>"]


def large(digits: Digits) -> Tokenizer:
    """97,000 entries without a training: all Chinese and Korean characters, alone, after a blank and after a bracket.

    The ids pass 65,536, where shards of tokens take four bytes instead of two.
    """
    bpe = BytePairEncoding([], digits)
    ids = {bytes([byte]): token_id for token_id, byte in enumerate(BYTE_ALPHABET)}
    characters = [chr(code) for span in ((0x4E00, 0xA000), (0xAC00, 0xD7A4)) for code in range(*span)]
    for token in (f"{before}{each}".encode() for before in ("", " ", "(") for each in characters):
        left, right = (token[:1], token[1:]) if token[0] < 128 else (token[:2], token[2:])
        if left not in ids:
            ids[left] = bpe.add_merge((ids[left[:1]], ids[left[1:]]))
        ids[token] = bpe.add_merge((ids[left], ids[right]))
    assert 97_000 < 256 + len(bpe.merges) < 98_000
    return Tokenizer(definition_from_bpe(bpe, SPECIAL_TOKENS, tuple(OWN)))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "split": lambda: Tokenizer.train([TEXT], 700),
    "grouped": lambda: Tokenizer.train([TEXT], 700, digits="grouped"),
    "300 entries": lambda: Tokenizer.train([TEXT], 300),
    "own tokens": lambda: Tokenizer.train([TEXT], 700, special_tokens=OWN),
    "grouped, own tokens": lambda: Tokenizer.train([TEXT], 700, digits="grouped", special_tokens=OWN),
    "large": lambda: large("split"),
    "large, grouped": lambda: large("grouped"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_the_same_everywhere(kind: str, tmp_path: Path, torture: list[str]) -> None:
    """In llama.cpp, in the `tokenizers` library, and in the tokenizer that our own reader makes of the GGUF."""
    tokenizer = KINDS[kind]()
    model = trained_model(vocab_size=tokenizer.vocab_size, hidden_size=32)
    export_gguf(model, tokenizer, {}, tmp_path / "a.gguf", "q8_0")
    started = time.process_time()
    check_gguf(tokenizer, tmp_path / "a.gguf")
    tokenizer.save(tmp_path / "folder")
    check_tokenizer_json(tokenizer, tmp_path / "folder" / "tokenizer.json")
    assert time.process_time() - started < (20 if "large" in kind else 5), "a tenth of that is usual"
    again = load_for_use(tmp_path / "a.gguf").tokenizer
    assert again == tokenizer and again.own_tokens == tokenizer.own_tokens
    llama_cpp = LlamaCpp(tmp_path / "a.gguf")
    for text in [*probes(tokenizer), *torture]:
        assert llama_cpp.tokens(text) == tokenizer.encode(text), text[:40]
    for token_id in sorted(tokenizer.special_ids):
        name = tokenizer.token_bytes(token_id).decode()
        expected = [*tokenizer.encode("größer "), token_id, *tokenizer.encode("99")]
        assert llama_cpp.tokens(f"größer {name}99", parse_special=True) == expected


@pytest.mark.slow
@pytest.mark.parametrize("digits", DIGIT_PATTERNS)
def test_texts_of_the_world_are_the_same_in_llama_cpp(digits: Digits, tmp_path: Path, world_texts: list[str]) -> None:
    tokenizer = Tokenizer.train(world_texts, 3000, digits=digits, special_tokens=OWN)
    export_gguf(trained_model(vocab_size=3000, hidden_size=32), tokenizer, {}, tmp_path / "a.gguf", "q8_0")
    llama_cpp = LlamaCpp(tmp_path / "a.gguf")
    assert [text[:40] for text in world_texts if llama_cpp.tokens(text) != tokenizer.encode(text)] == []


def test_the_probes_tell_all_pre_tokenizers_apart() -> None:
    """Were one written for another, some probe would have other tokens."""
    definition = Tokenizer.train([TEXT], 700).definition
    other = Tokenizer.train([TEXT], 700, digits="grouped").definition
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    smollm = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    steps = [definition["pre_tokenizer"], other["pre_tokenizer"], byte_level, smollm]
    # the merges of `other` join digits
    found = [Tokenizer({**other, "pre_tokenizer": each}).encode_batch(list(PROBES)) for each in steps]
    assert all(a != b for number, a in enumerate(found) for b in found[:number])


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Path]:
    def export(tokenizer: Tokenizer, **changes: Any) -> Path:
        export_gguf(
            trained_model(vocab_size=700, hidden_size=32), tokenizer, {}, tmp_path / "out" / "a.gguf", **changes
        )
        return tmp_path / "out" / "a.gguf"

    return export


def test_another_pre_tokenizer_in_the_file_is_refused(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the text and both lists of ids; and what was there before stays."""
    tokenizer = Tokenizer.train([TEXT], 700, digits="grouped")
    before = exported(tokenizer).read_bytes()
    monkeypatch.setattr(gguf_metadata, "llama_cpp_name", lambda definition: "qwen2")
    with pytest.raises(ValueError) as error:
        exported(tokenizer)
    text, message = PROBES[1], str(error.value)
    assert repr(text[:20])[1:-1] in message and str(tokenizer.encode(text)) in message and "\n" not in message
    assert message.count("[") == 2 and "nothing was written" in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.gguf"]
    assert (tmp_path / "out" / "a.gguf").read_bytes() == before


def test_other_merges_or_types_in_the_file_are_refused(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.train([TEXT], 700, special_tokens=OWN)
    written = gguf_metadata.gguf.GGUFWriter.add_token_merges
    backwards = lambda self, merges: written(self, merges[::-1])  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(gguf_metadata.gguf.GGUFWriter, "add_token_merges", backwards)
        with pytest.raises(ValueError, match="the GGUF reads the text .* as the tokens .* the model's tokenizer reads"):
            exported(tokenizer)
    types = gguf_metadata.gguf.GGUFWriter.add_token_types
    all_normal = lambda self, kinds: types(self, [*kinds[:-4], 1, 1, 1, 1])  # noqa: E731
    monkeypatch.setattr(gguf_metadata.gguf.GGUFWriter, "add_token_types", all_normal)
    with pytest.raises(ValueError, match=r"the GGUF has no control token 696, <\|fim\|>; nothing was written"):
        exported(tokenizer)
    assert list(tmp_path.rglob("*.gguf")) == []


def test_a_tokenizer_json_that_differs_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([TEXT], 700, special_tokens=OWN)
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    definition = json.loads(path.read_text(encoding="utf-8"))
    changes: list[tuple[Callable[[dict], Any], str]] = [
        (lambda d: d["model"]["merges"].reverse(), "tokenizer.json reads the text .* as the tokens"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "reads the text .Hello, world"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"].pop(0), "tokenizer.json reads the text . a  b "),
        (lambda d: d["added_tokens"].pop(), r"reads '<\|\\u65e5\\u672c\|>' as \[.*\]; expected the control token 699"),
    ]
    for change, message in changes:
        changed = copy.deepcopy(definition)
        change(changed)
        path.write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(ValueError, match=message) as error:
            check_tokenizer_json(tokenizer, path)
        assert "\n" not in str(error.value)


def test_a_folder_to_publish_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, other = Tokenizer.train([TEXT], 700, special_tokens=OWN), Tokenizer.train([TEXT], 690)
    model = trained_model(vocab_size=700, hidden_size=32)
    export_hf(model, tokenizer, {}, tmp_path / "good", "bf16", card="")
    assert Tokenizer.load(tmp_path / "good") == tokenizer
    save = Tokenizer.save
    monkeypatch.setattr(Tokenizer, "save", lambda self, folder: save(other, folder))
    with pytest.raises(ValueError, match=r"tokenizer.json reads '<\|fim\|>' as \[.*\]; expected the control token 696"):
        export_hf(model, tokenizer, {}, tmp_path / "bad", "bf16", card="")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "qwen", "llama3", "llama2", "mistral"])
def test_tokenizers_of_others_pass(name: str, tmp_path: Path) -> None:
    """With NFC, with blanks before the text, with added tokens that are no control tokens."""
    tokenizer = Tokenizer.load(write_tokenizer(name, tmp_path / "in"))
    tokenizer.save(tmp_path / "out")
    check_tokenizer_json(tokenizer, tmp_path / "out" / "tokenizer.json")


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["größer"], 272)
    assert Tokenizer(tokenizer.definition).encode("ö") == [16 + BYTE_ALPHABET.index(byte) for byte in "ö".encode()]
    with pytest.raises(ValueError, match="the tokenizer has no merges, and llama.cpp opens no such file; train one"):
        export_gguf(trained_model(vocab_size=272, hidden_size=32), tokenizer, {}, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_check_needs_its_probes(exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It once could have passed because nothing was compared."""
    seen: list[str] = []
    compare = tokenizer_check._compare
    monkeypatch.setattr(
        tokenizer_check, "_compare", lambda a, b, texts, d: (seen.extend(texts), compare(a, b, texts, d))[1]
    )
    exported(Tokenizer.train([TEXT], 700, special_tokens=OWN))
    assert set(PROBES) <= set(seen) and "x <|日本|>y" in seen and "x <|im_end|>y" in seen
