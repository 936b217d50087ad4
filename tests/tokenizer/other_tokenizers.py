"""Small tokenizers as others make them: byte-level with several split patterns, and SentencePiece's kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tinylm.tokenizer.split_patterns import KNOWN_PATTERNS, SPLIT_PATTERN

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock, isn't it?\n",
    "def f(x):\n    return x + 1  # four blanks\n",
    "Die süßen Äpfel hängen über dem Zaun, 3,50 € das Kilo.\n",
    "我们使用深度学习模型。今天天气很好! नमस्ते दुनिया. Привет, мир! مرحبا 👍🏽\n",
] * 5
LLAMA3_PATTERN = next(pattern for pattern in KNOWN_PATTERNS if "{1,3}" in pattern and pattern.startswith("(?i"))


def _specials(names: list[str]) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def byte_level(pattern: str | None, names: list[str], digits: bool = False, nfc: bool = False) -> Tokenizer:
    """pattern: None for GPT-2's own."""
    tokenizer = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=_specials(names), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece(scheme: str) -> Tokenizer:
    """scheme: "prepend" for the normaliser of older files, else Metaspace's prepend_scheme."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        # Without a pre-tokenizer nothing would bound the merges of the tiny corpus; Llama 2's file has none.
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if scheme != "never" else []))
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=names, limit_alphabet=90, max_token_length=8, show_progress=False
    )
    words = [word if number == 0 else " " + word for line in CORPUS for number, word in enumerate(line.split(" "))]
    tokenizer.train_from_iterator(words, trainer)
    definition = json.loads(tokenizer.to_str())
    # The trainer takes the byte tokens as special; in a real file they are ordinary entries.
    definition["added_tokens"] = [
        token for token in definition["added_tokens"] if not token["content"].startswith("<0x")
    ]
    definition["post_processor"] = json.loads(_with_bos(Tokenizer.from_str(json.dumps(definition)), "<s>").to_str())[
        "post_processor"
    ]
    return Tokenizer.from_str(json.dumps(definition))


def _with_bos(tokenizer: Tokenizer, name: str) -> Tokenizer:
    single = f"{name} $A"
    ids = [(name, tokenizer.token_to_id(name))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} {name} $B", special_tokens=ids
    )
    return tokenizer


def _qwen() -> Tokenizer:
    tokenizer = byte_level(SPLIT_PATTERN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], nfc=True)
    tokenizer.add_tokens(
        [AddedToken("<think>", special=False, normalized=False), AddedToken("</think>", special=False)]
    )
    return tokenizer


def _llama3() -> Tokenizer:
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = byte_level(LLAMA3_PATTERN, [])
    tokenizer.add_special_tokens(_specials(names))
    tokenizer.model.ignore_merges = True
    return _with_bos(tokenizer, "<|begin_of_text|>")


LLAMA2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
MADE = {
    "gpt2": (lambda: byte_level(None, ["<|endoftext|>"]), {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "smollm2": (
        lambda: byte_level(None, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], digits=True),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    ),
    "qwen": (
        _qwen,
        {
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "add_bos_token": False,
        },
    ),
    "llama3": (_llama3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "llama2": (lambda: sentencepiece("prepend"), {**LLAMA2, "add_bos_token": True, "add_eos_token": False}),
    "mistral": (lambda: sentencepiece("first"), LLAMA2),
    "always": (lambda: sentencepiece("always"), LLAMA2),
    "never_no_bos": (lambda: sentencepiece("never"), {**LLAMA2, "add_bos_token": False}),
}


def write_tokenizer(name: str, folder: Path, **changes: Any) -> Path:
    """Their tokenizer.json and tokenizer_config.json."""
    make, settings = MADE[name]
    folder.mkdir(parents=True, exist_ok=True)
    make().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings, **changes}))
    return folder
