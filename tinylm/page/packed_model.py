"""A model as one piece of bytes that the page's own JavaScript reads (weights.js): header, weights, tokenizer.

Layout: 8 digits, the header's length; the header, JSON, padded with blanks; the tensors, each at a multiple of 4 bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.snapshots import load_snapshot
from tinylm.files.untrusted import shown
from tinylm.generation.engine import Engine
from tinylm.model.lora import merge_lora
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.model.positions import rope_frequencies
from tinylm.tokenizer.split_patterns import DIGIT_PATTERNS, steps_of

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
    return packed_model(Engine(loaded.model, loaded.tokenizer, loaded.model.dtype, loaded.document_start), dtype)


def packed_model(engine: Engine, dtype: PageDtype) -> bytes:
    """The model of `engine`, and its tokenizer.

    Args:
        dtype: of the matrices; int8 has one scale for each row.

    Raises:
        ValueError: the tokenizer splits text in a way that the page does not know, or weights are not finite.
    """
    model = engine.model
    tensors: dict[str, dict[str, Any]] = {}
    parts: list[bytes] = []
    size = 0

    def put(numbers: NDArray[Any]) -> int:
        nonlocal size
        data = numbers.tobytes()
        data += b"\0" * (-len(data) % 4)
        parts.append(data)
        size += len(data)
        return size - len(data)

    for name, weight in _tensors(model).items():
        numbers = weight.detach().float().cpu()
        if not bool(numbers.isfinite().all()):
            raise ValueError(f"the weights {name} hold something that is not a number; the model is damaged")
        entry: dict[str, Any] = {"shape": list(numbers.shape), "dtype": "f32"}
        if dtype == "int8" and numbers.dim() == 2:
            scales = numbers.abs().amax(dim=1).clamp(min=1e-30) / 127
            quantised = (numbers / scales[:, None]).round().to(torch.int8)
            entry |= {"dtype": "int8", "at": put(quantised.numpy()), "scales": put(scales.numpy())}
        else:
            entry["at"] = put(numbers.contiguous().numpy())
        tensors[name] = entry
    header = {
        "config": _config(model),
        "tokenizer": _tokenizer(engine),
        "tensors": tensors,
    }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    return b"".join([b"%08d" % len(text), text, *parts])


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
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "eps": config.rms_norm_eps,
        "speeds": None,
        "rotationFactor": 1.0,
    }
    if config.position_embedding_type == "rope":
        speeds, factor = rope_frequencies(config)
        facts |= {"speeds": speeds.tolist(), "rotationFactor": factor}
    return facts


def _tokenizer(engine: Engine) -> dict[str, Any]:
    """What tokenizer.js needs."""
    tokenizer = engine.tokenizer
    definition = tokenizer.definition
    names: list[str | None] = [None] * tokenizer.vocab_size
    for name, token_id in {**definition["model"]["vocab"], **tokenizer.added_ids}.items():
        names[token_id] = name
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in definition["model"]["merges"]]
    return {
        "tokens": names,
        "merges": merges,
        "pattern": _javascript_pattern(definition),
        "isNormalized": [step["type"] for step in steps_of(definition.get("normalizer"), "normalizers")] == ["NFC"],
        "ignoresMerges": definition["model"].get("ignore_merges") is True,
        "controls": sorted({*tokenizer.added_ids.values(), *tokenizer.special_ids}),
        "documentStart": engine.document_start,
        "stops": list(engine.stop_ids),
        "imStart": tokenizer.im_start_id if tokenizer.has_chat_tokens else None,
        "imEnd": tokenizer.im_end_id if tokenizer.has_chat_tokens else None,
        "canChat": tokenizer.has_chat_tokens and tokenizer.their_template is None,
    }


def _javascript_pattern(definition: dict[str, Any]) -> str:
    r"""The split pattern in JavaScript's syntax, which has no (?i:...) everywhere, and whose \s is not Unicode's.

    Raises:
        ValueError: the tokenizer has other steps than ours.
    """
    steps = [
        step["pattern"].get("Regex") if step["type"] == "Split" else step["type"]
        for step in steps_of(definition.get("pre_tokenizer"), "pretokenizers")
    ]
    normalizers = [step["type"] for step in steps_of(definition.get("normalizer"), "normalizers")]
    known = [[pattern, "ByteLevel"] for pattern in DIGIT_PATTERNS.values()]
    if steps not in known or normalizers not in ([], ["NFC"]):
        raise ValueError(
            f"this tokenizer splits text by {shown(steps)}; expected our own, or Qwen's: the page knows no others; "
            "use another format, such as gguf"
        )
    pattern: str = steps[0]
    contractions = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    assert contractions in pattern
    # \u017f, the long s, is the one other character that these match without regard to case.
    both = "'(?:[sS\u017ftTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
    pattern = pattern.replace(contractions, both)
    return (
        pattern.replace(r"[^\s", r"[^\p{White_Space}")
        .replace(r"\S", r"\P{White_Space}")
        .replace(r"\s", r"\p{White_Space}")
    )
