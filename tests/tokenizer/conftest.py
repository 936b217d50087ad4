"""Texts and tokenizers that the tests of this folder share."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tinylm.tokenizer.bpe import CHARACTER_TO_BYTE, BytePairEncoding
from tinylm.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer

CORPORA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tokenizer"

TORTURE = [
    "",
    " ",
    "a",
    "\x00",
    "a\x00b\x00\x00",
    "\r\n",
    "\r\n\r\n \n\t \r",
    "line\r\nline\rline\n",
    "   leading",
    "trailing   ",
    "a  b   c    d\t\te",
    "\n\n\n\n    indented\n\tdef f():\n\n\n        return 0\n",
    "it's I'LL they'Re 'S 'tis 'ſ don''t",
    "12345 3.14 1,000,000 ½ Ⅷ ٣٤٥ 四",
    "!!! ...\n\n--- ???\r\n <|>",
    "\u0301\u0301 e\u0301 \u200d\u200c\ufeff",
    "नमस्ते दुनिया สวัสดีชาวโลก مرحبا בעולם",
    "你好,世界。今天天气很好!全角 空格\u3000\u3000",
    "한국어 にほんご カタカナ",
    "👩‍👩‍👧‍👦 🇩🇪🇫🇷 👍🏽 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "\x85\xa0\u2028\u2029\u200b\u00ad\x1c\x1d\x1e\x1f",
    "\ufffd\ufffe\uffff\U0010ffff\ue000",
    "Ŀ ŉ ǰ ß ﬁ ﬀ İ ı Ǆ",
    "Z̷̡͓͈̞a̸l̶g̴o̵",
    "a" * 3000,
    " " * 1000 + "x" + "\n" * 500,
    "ab" * 700 + "aab" * 300,
    "中" * 500,
    "<|endoftext|><|im_start|>user\nhi<|im_end|>",
    "<think>x</think> <tool_call>{}</tool_call> <|reserved_0|>",
    "<|im_end|" + ">",
]


@pytest.fixture(scope="session")
def torture() -> list[str]:
    return TORTURE


@pytest.fixture(scope="session")
def world_texts() -> list[str]:
    """Naughty strings, the UTF-8 stress test, and the Declaration of Human Rights in 65 languages."""
    if not CORPORA.is_dir():
        pytest.skip("the Unicode corpora are not at ../shared/data/tokenizer; the embedded list still runs")
    texts: list[str] = json.loads((CORPORA / "blns.json").read_text(encoding="utf-8"))
    texts.append((CORPORA / "blns.txt").read_text(encoding="utf-8"))
    texts.append((CORPORA / "UTF-8-test.txt").read_bytes().decode("utf-8", errors="replace"))
    with gzip.open(CORPORA / "udhr-languages.jsonl.gz", "rt", encoding="utf-8") as file:
        texts += [json.loads(line)["text"] for line in file]
    return texts


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.default()


@pytest.fixture(scope="session")
def bpe(tokenizer: Tokenizer) -> BytePairEncoding:
    """Our own encoder with the default tokenizer's merges. Its ids lack the special tokens: add
    `NUM_SPECIAL`."""
    model = tokenizer.definition["model"]
    pairs = [merge.split(" ") for merge in model["merges"]]
    ids = {name: token_id - NUM_SPECIAL for name, token_id in model["vocab"].items()}
    ours = BytePairEncoding([(ids[left], ids[right]) for left, right in pairs])
    assert len(ours.tokens) == len(ids) - NUM_SPECIAL
    for name, token_id in ids.items():
        if token_id >= 0:
            assert ours.tokens[token_id] == bytes(CHARACTER_TO_BYTE[character] for character in name)
    return ours


NUM_SPECIAL = len(SPECIAL_TOKENS)
