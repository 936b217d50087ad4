"""The file format: `tokenizer.json` (the `tokenizers` library's) and `tokenizer_config.json` (transformers').

Reading is strict and runs no code from the file: its size and shape are checked before anything is built from it, and
every error is one line.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tinylm.files.untrusted import parse_json, shown
from tinylm.tokenizer.bpe import BYTE_TO_CHARACTER, BytePairEncoding
from tinylm.tokenizer.sentencepiece import is_sentencepiece, missing_byte
from tinylm.tokenizer.split_patterns import Digits, check_text_steps, steps_from_llama_cpp

MAX_FILE_BYTES = 64 << 20
"""The largest tokenizer.json in use (262,144 entries) takes 33 MB."""

MAX_VOCAB_SIZE = 1 << 20

MAX_TRAINED_VOCAB = 1 << 18
"""262,144, the largest in use (Gemma's). A file of more entries might be larger than MAX_FILE_BYTES."""

_LLAMA_CPP_NAMES: dict[Digits, str] = {"split": "qwen2", "grouped": "llama-bpe"}
"""llama.cpp's pre-tokenizers of our two patterns."""

MODEL_INPUTS = ["input_ids", "attention_mask"]
"""Without these names in tokenizer_config.json, transformers 4 also hands `token_type_ids` to the model, which takes
none."""

_WITHOUT_TEXT = {*range(0x20), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)} - set(b"\t\n\r")
"""Bytes that no text but control characters and unassigned ones has. SmolLM2 has no tokens for 21 of them, so that
these characters have no ids there, in transformers and llama.cpp too."""

_MAX_VALUES = 1 << 22
"""Commas and brackets of a tokenizer.json; 262,144 entries with their merges have 2 million."""


def token_to_text(token: bytes) -> str:
    """A token's bytes as the printable characters that tokenizer.json uses."""
    return "".join(BYTE_TO_CHARACTER[byte] for byte in token)


def definition_from_bpe(
    bpe: BytePairEncoding, special_tokens: tuple[str, ...], own_tokens: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The content of tokenizer.json for our tokenizer: special tokens have the first ids, then bytes, then merges.

    Args:
        own_tokens: special tokens of the user, with the last ids. They are `added_tokens` only, as transformers writes
            tokens behind the vocabulary.
    """
    names = [*special_tokens, *(token_to_text(token) for token in bpe.tokens)]
    ordinary = names[len(special_tokens) :]
    added = [added_token(token_id, name) for token_id, name in enumerate(special_tokens)]
    added += [added_token(token_id, name) for token_id, name in enumerate(own_tokens, start=len(names))]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    # "left right" in one string is the older spelling, which all versions of the loaders read
    merges = [f"{ordinary[left]} {ordinary[right]}" for left, right in bpe.merges]
    return byte_level_bpe(vocab, merges, added, **steps_from_llama_cpp(_LLAMA_CPP_NAMES[bpe.digits]))


def added_token(token_id: int, name: str, is_special: bool = True) -> dict[str, Any]:
    """The entry of a token that is found in a text by its name alone."""
    off = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": name, **off, "special": is_special}


def byte_level_bpe(
    vocab: dict[str, int],
    merges: list[str],
    added: list[dict[str, Any]],
    pre_tokenizer: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
    post_processor: dict[str, Any] | None = None,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """The content of the tokenizer.json of a byte-level BPE."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }


def config_for_transformers(
    endoftext: str, im_start: str, im_end: str, chat_template: str | None, own_tokens: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The content of tokenizer_config.json. With it, transformers' AutoTokenizer loads the folder unchanged."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": im_start,
        "eos_token": im_end,
        "pad_token": endoftext,
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "model_input_names": MODEL_INPUTS,
        "padding_side": "left",  # a batch of prompts is continued at its right end
    }
    if own_tokens:
        config["additional_special_tokens"] = list(own_tokens)
    if chat_template is not None:
        config["chat_template"] = chat_template  # for transformers before 4.52, which does not read .jinja files
    return config


def to_json_text(content: dict[str, Any]) -> str:
    """JSON for people and version control: one entry per line, characters not escaped."""
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def fingerprint_of(definition: dict[str, Any]) -> str:
    """The first 16 hex digits of a SHA-256 of the parts that decide the encoding.

    It does not depend on the parts that we do not use (truncation, padding, post-processor, decoder), which other
    tools rewrite when they save a folder, nor on the spelling of the merges.
    """
    content = {key: definition.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer")}
    model = definition["model"]
    content["model"] = {**model, "merges": [_pair(merge) for merge in model["merges"]]}
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]


def read_definition(path: Path) -> Any:
    """Read a tokenizer.json; `check_definition` checks whether we can use it.

    Raises FileNotFoundError if it does not exist, ValueError if it is too large or not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no tokenizer at {path}; expected a folder with tokenizer.json, or such a file; "
            "make one with `tinylm tokenizer`"
        )
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {size} bytes; a tokenizer.json has at most {MAX_FILE_BYTES}")
    try:
        return parse_json(path.read_bytes(), max_values=_MAX_VALUES)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); expected a tokenizer.json") from None


def check_definition(definition: Any) -> None:
    """Raise ValueError unless this is a tokenizer.json of byte-level BPE or SentencePiece's kind, within the limits."""
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        raise ValueError("no `model` object; expected the content of a tokenizer.json")
    model = definition["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"model type is {shown(model.get('type'))}; expected BPE (byte-level, or with byte_fallback)")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"cannot use the {name} {shown(model[name])}; expected none, as in byte-level BPE")
    vocab, merges, added = model.get("vocab"), model.get("merges"), definition.get("added_tokens", [])
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(added, list):
        raise ValueError("`model.vocab`, `model.merges` or `added_tokens` has the wrong type; expected {}, [], []")
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
            raise ValueError(f"an added token is {shown(token)}; expected an object with `content` and `id`")
    ids = [*vocab.values(), *(token.get("id") for token in added)]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < MAX_VOCAB_SIZE:
            raise ValueError(f"token id {shown(token_id, 40)}; expected a whole number from 0 to {MAX_VOCAB_SIZE - 1}")
    _check_one_token_per_id(vocab, added)
    controls = {token["content"] for token in added if token.get("special")}
    for merge in merges:
        left, right = _pair(merge)
        if left not in vocab or right not in vocab:
            raise ValueError(f"merge {shown(merge)} has a part that is not in the vocabulary")
        if left in controls or right in controls or left + right in controls:
            raise ValueError(f"merge {shown(merge)} makes a control token of plain text; expected none that does")
    check_text_steps(definition)
    if is_sentencepiece(definition):
        if absent := missing_byte(definition):
            raise ValueError(f"byte_fallback is true, and the vocabulary has no {absent}; expected all 256 byte tokens")
        return
    missing = [byte for byte in range(256) if BYTE_TO_CHARACTER[byte] not in vocab and byte not in _WITHOUT_TEXT]
    if missing or "ByteLevel" not in json.dumps(definition.get("pre_tokenizer")):
        what = f"byte 0x{missing[0]:02x} has no token" if missing else "its pre-tokenizer is not ByteLevel"
        raise ValueError(
            f"not a byte-level tokenizer: {what}; expected byte-level BPE (as of GPT-2, Qwen, Llama 3), or BPE with "
            "byte_fallback (as of Llama 2)"
        )


def _check_one_token_per_id(vocab: dict[str, int], added: list[dict[str, Any]]) -> None:
    name_of: dict[int, str] = {}
    id_of: dict[str, int] = {}
    for name, token_id in [*vocab.items(), *((token["content"], token["id"]) for token in added)]:
        if name_of.setdefault(token_id, name) != name:
            raise ValueError(f"two tokens have id {token_id}: {shown(name_of[token_id], 40)} and {shown(name, 40)}")
        if id_of.setdefault(name, token_id) != token_id:
            raise ValueError(f"the token {shown(name, 40)} has two ids: {id_of[name]} and {token_id}")


def _pair(merge: Any) -> list[str]:
    """A merge in either spelling, "left right" or ["left", "right"], as a list of two."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str):
        return pair
    raise ValueError(f"merge {shown(merge)}; expected a pair of tokens")
