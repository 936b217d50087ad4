"""A model as one piece of bytes that the page's own JavaScript reads (weights.js): header, weights, tokenizer.

Layout: 8 digits, the header's length; 8 hexadecimal digits, the Adler-32 checksum of all that follows; the header,
JSON, padded with blanks; the numbers of each tensor in the order of the header, those of int8 followed by the scales of
the rows, all padded to multiples of 4 bytes.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, Literal

import torch

from tinylm.checkpoint.loading import LoadedModel, load_for_use
from tinylm.checkpoint.snapshots import load_snapshot
from tinylm.files.untrusted import shown
from tinylm.generation.engine import Engine
from tinylm.model.lora import merge_lora
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.model.positions import rope_frequencies
from tinylm.tokenizer.split_patterns import DIGIT_PATTERNS, Digits, steps_of

PageDtype = Literal["int8", "f32"]


def packed_at(
    model: Path, adapter: Path | None, snapshot: Path | None, dtype: PageDtype, tokenizer_path: str | None = None
) -> bytes:
    """A model of a folder, its adapter merged: as it is, or as it was at a snapshot of its run.

    Raises:
        FileNotFoundError, ValueError: see `load_for_use`, `load_snapshot` and `packed_model`.
    """
    loaded = load_for_use(model, adapter, tokenizer_path, merge=snapshot is None)
    if snapshot is not None:
        load_snapshot(loaded.model, snapshot)
        merge_lora(loaded.model)
    return packed(loaded, dtype)


def packed(loaded: LoadedModel, dtype: PageDtype) -> bytes:
    """A model that is loaded, its adapter merged."""
    return packed_model(Engine(loaded.model, loaded.tokenizer, loaded.model.dtype, loaded.document_start), dtype)


def packed_model(engine: Engine, dtype: PageDtype) -> bytes:
    """The model of `engine`, and its tokenizer.

    Args:
        dtype: of the matrices; int8 has one scale for each row.

    Raises:
        ValueError: the tokenizer splits text in a way that the page does not know, or weights are not finite.
    """
    model = engine.model
    tensors: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for name, weight in _tensors(model).items():
        numbers = weight.detach().float().cpu().contiguous()
        if not bool(numbers.isfinite().all()):
            raise ValueError(f"the weights {name} hold something that is not a number; the model is damaged")
        is_int8 = dtype == "int8" and numbers.dim() == 2
        tensors.append({"name": name, "dtype": "int8" if is_int8 else "f32", "shape": list(numbers.shape)})
        if is_int8:
            scales = numbers.abs().amax(dim=1).clamp(min=1e-30) / 127
            parts += [(numbers / scales[:, None]).round().to(torch.int8).numpy().tobytes(), scales.numpy().tobytes()]
        else:
            parts.append(numbers.numpy().tobytes())
    header = {
        "config": _config(model),
        "tokenizer": _tokenizer(engine),
        "tensors": tensors,
    }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    parts = [part + b"\0" * (-len(part) % 4) for part in parts]
    data = b"".join([text + b" " * (-len(text) % 4), *parts])
    return b"%08d%08x" % (len(data) - sum(map(len, parts)), zlib.adler32(data)) + data


def _tensors(model: TinyLMForCausalLM) -> dict[str, torch.Tensor]:
    """The weights by their names in a model folder, and the table of positions of a model that adds one."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    tensors.pop("model.embed_positions.weight", None)
    if (positions := model.model.embed_positions) is not None:
        tensors["positions"] = positions(slice(None))
    return tensors


def _config(model: TinyLMForCausalLM) -> dict[str, Any]:
    config = model.config
    facts: dict[str, Any] = {
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "keyHeads": config.num_key_value_heads,
        "headWidth": config.head_width,
        "width": config.hidden_size,
        "inner": config.ffn_width,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "eps": config.rms_norm_eps,
        "speeds": None,
        "rotationFactor": 1.0,
        "isTied": config.tie_word_embeddings,
        "hasHeadNorms": config.qk_norm,
        "hasQkvBias": config.attention_bias or config.qkv_bias,
        "hasOutputBias": config.attention_bias,
        "hasMlpBias": config.mlp_bias,
    }
    if config.position_embedding_type == "rope":
        speeds, factor = rope_frequencies(config)
        facts |= {"speeds": speeds.tolist(), "rotationFactor": factor}
    return facts


def _tokenizer(engine: Engine) -> dict[str, Any]:
    """What tokenizer.js needs."""
    tokenizer = engine.tokenizer
    definition = tokenizer.definition
    vocabulary: dict[str, int] = definition["model"]["vocab"]
    names: list[str | None] = [None] * tokenizer.vocab_size
    for name, token_id in {**vocabulary, **tokenizer.added_ids}.items():
        names[token_id] = name
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in definition["model"]["merges"]]
    return {
        "tokens": names,
        "merges": [[vocabulary[left], vocabulary[right], vocabulary[left + right]] for left, right in pairs],
        "digits": _digits(definition),
        "isNormalized": [step["type"] for step in steps_of(definition.get("normalizer"), "normalizers")] == ["NFC"],
        "ignoresMerges": definition["model"].get("ignore_merges") is True,
        "controls": sorted({*tokenizer.added_ids.values(), *tokenizer.special_ids}),
        "documentStart": engine.document_start,
        "stops": list(engine.stop_ids),
        "imStart": tokenizer.im_start_id if tokenizer.has_chat_tokens else None,
        "imEnd": tokenizer.im_end_id if tokenizer.has_chat_tokens else None,
        "canChat": tokenizer.has_chat_tokens and tokenizer.their_template is None,
    }


def _digits(definition: dict[str, Any]) -> Digits:
    """Which of the split patterns that tokenizer.js knows it has.

    Raises:
        ValueError: the tokenizer has other steps than ours.
    """
    steps = [
        step["pattern"].get("Regex") if step["type"] == "Split" else step["type"]
        for step in steps_of(definition.get("pre_tokenizer"), "pretokenizers")
    ]
    normalizers = [step["type"] for step in steps_of(definition.get("normalizer"), "normalizers")]
    known = [digits for digits, pattern in DIGIT_PATTERNS.items() if steps == [pattern, "ByteLevel"]]
    if not known or normalizers not in ([], ["NFC"]):
        raise ValueError(
            f"this tokenizer splits text by {shown(steps)}; expected our own, or Qwen's: the page knows no others; "
            "use another format, such as gguf"
        )
    return known[0]
