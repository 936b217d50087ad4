"""Whether a written file gives a text the same tokens as the tokenizer it was written from.

A model that is fed other tokens than in training answers worse, and nothing says so. So an export reads back what it
wrote, and compares the tokens of hard texts before the file gets its name.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import tokenizers

from tinylm.checkpoint.gguf_file import read_gguf
from tinylm.files.untrusted import shown
from tinylm.tokenizer.llama_cpp_tokenizer import tokenizer_from_gguf
from tinylm.tokenizer.split_patterns import steps_of
from tinylm.tokenizer.tokenizer import Tokenizer

PROBES = (
    "Hello, world! It's the quick brown fox's 2nd jump; they'll SAY'RE I'M don't",
    "a 1 12 123 1234 12345678 3.14 1,000,000 2024-02-29 ½ Ⅷ ٣٤٥ १२३ 四五",
    " a  b   c\t\td \u00a0e\u3000f   ",
    "one\ntwo\n\nthree\r\nfour\r\n\r\n five \n six\n\n\n",
    "def f(x):\n    return {'a': [x**2, -1.5e-3]}  # größer\n\n\n",
    "!!! ... ?! -- *** <|> </s> [x] {{name}} C:\\dir\\a_b.txt https://a.example/?q=1&r=%20",
    "Zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich. ŒUVRE naïve İstanbul ſ ß ﬁ Ǆ",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία",
    "我们使用深度学习模型。「引号」 한국어 키스의 고유조건은 いろはにほへと カタカナ ｆｕｌｌ　ｗｉｄｔｈ",
    "नमस्ते दुनिया สวัสดีชาวโลก مرحبا بالعالم שלום עולם தமிழ் ქართული አማርኛ မြန်မာ བོད་ཡིག",
    "e\u0301 a\u0308 \u0301\u0301 Z\u0337\u0321\u0353a\u0338l\u0336g\u0334o \u1100\u1161\u11a8",
    "👍🏽 👩‍👩‍👧‍👦 🇩🇪🇫🇷 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f ☃️ 🦔",
    "\u200b\u200d\ufeff\u00ad\u2028\u2029\u0085\ufffd\U0010ffff\ue000 a\u0000b\u0007c",
    "aaaaaaaaaaaaaaaa          ================\n\n\n\n\n\n\n\n中中中中中中中中",
)
"""Many scripts, blanks, digits, contractions, emoji, line ends, combining marks, and characters that are not seen."""


def check_gguf(tokenizer: Tokenizer, path: Path) -> None:
    """Read the tokenizer of a GGUF back, from its tokens, types, merges and pre-tokenizer, and compare.

    llama.cpp normalises no text, so a tokenizer with NFC is compared on text that is in NFC.

    Raises:
        ValueError: a text has other tokens there, or a control token is not one there.
    """
    theirs = tokenizer_from_gguf(read_gguf(path).values)
    normalizers = [step["type"] for step in steps_of(tokenizer.definition.get("normalizer"), "normalizers")]
    texts = [unicodedata.normalize("NFC", text) if "NFC" in normalizers else text for text in probes(tokenizer)]
    _compare(tokenizer, theirs.encode_batch, texts, "the GGUF")
    for token_id in sorted(tokenizer.special_ids - theirs.special_ids):
        raise ValueError(f"the GGUF has no control token {token_id}, {_name(tokenizer, token_id)}; nothing was written")


def check_tokenizer_json(tokenizer: Tokenizer, path: Path) -> None:
    """Read a tokenizer.json back with the `tokenizers` library, as transformers does, and compare.

    The library finds added tokens in a text. Those that are not control tokens cannot be switched off there, so texts
    that spell one are left out.

    Raises:
        ValueError: a text has other tokens there, or a control token is not one there.
    """
    library = tokenizers.Tokenizer.from_file(str(path))
    library.no_truncation()
    added = {token["content"]: token["id"] for token in tokenizer.definition["added_tokens"]}
    for name, token_id in added.items():
        if token_id in tokenizer.special_ids and (found := _ids(library, name)) != [token_id]:
            raise ValueError(f"{path.name} reads {shown(name)} as {found}; expected the control token {token_id}")
    library.encode_special_tokens = True  # as plain text
    others = [name for name, token_id in added.items() if token_id not in tokenizer.special_ids]
    texts = [text for text in probes(tokenizer) if not any(name in text for name in others)]
    _compare(tokenizer, lambda texts: [_ids(library, text) for text in texts], texts, path.name)


def probes(tokenizer: Tokenizer) -> list[str]:
    """The texts to compare: `PROBES`, and the name of each control token within a text."""
    return [*PROBES, *(f"x {_name(tokenizer, token_id)}y" for token_id in sorted(tokenizer.special_ids))]


def _compare(
    tokenizer: Tokenizer, encode_batch: Callable[[list[str]], list[list[int]]], texts: list[str], where: str
) -> None:
    for text, ours, theirs in zip(texts, tokenizer.encode_batch(texts), encode_batch(texts), strict=True):
        if ours != theirs:
            raise ValueError(
                f"{where} reads the text {shown(text, 300)} as the tokens {theirs}; the model's tokenizer reads "
                f"{ours}; nothing was written, because the model would answer another text: use the model folder"
            )


def _ids(library: tokenizers.Tokenizer, text: str) -> list[int]:
    return library.encode(text, add_special_tokens=False).ids


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
