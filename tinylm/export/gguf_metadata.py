"""What a GGUF file says beside its tensors: the model's shape, its tokenizer, and where it comes from.

The keys are described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import gguf
from torch import Tensor

from tinylm import __version__
from tinylm.checkpoint.lineage import facts_of
from tinylm.export.modelfile import is_base_model
from tinylm.files.untrusted import shown
from tinylm.model.config import TinyLMConfig
from tinylm.model.hf_config import require_llama_shape
from tinylm.model.positions import rope_frequencies
from tinylm.tokenizer.chat_template import CHAT_TEMPLATE
from tinylm.tokenizer.split_patterns import llama_cpp_name
from tinylm.tokenizer.tokenizer import Tokenizer


def architecture_of(config: TinyLMConfig) -> str:
    """`llama`, or `qwen3` for a model with query/key norms.

    Raises:
        ValueError: llama.cpp has no architecture that computes this model; the message says why.
    """
    require_llama_shape(config)
    if config.qk_norm and (config.attention_bias or config.qkv_bias):
        raise ValueError(
            "qk_norm with attention_bias or qkv_bias cannot be a GGUF: llama.cpp's qwen3 has query/key norms but no "
            "biases, its llama biases but no norms; turn one of them off and train again"
        )
    if config.qk_norm and rope_factors(config) is not None:
        raise ValueError(
            f"rope_scaling {shown(config.rope_scaling, 200)} cannot be a GGUF: llama.cpp's qwen3 knows YaRN with "
            "beta_fast 32, beta_slow 1 and truncate true; train with these, or without qk_norm"
        )
    return "qwen3" if config.qk_norm else "llama"


def add_general(writer: gguf.GGUFWriter, kind: str, lineage: dict[str, Any], name: str, license_name: str) -> None:
    """Name and licence, and under `tinylm.` how the model was made, as far as that is recorded.

    Args:
        kind: `model` or `adapter`.
        license_name: an SPDX identifier; empty if it is not known.
    """
    writer.add_type(kind)
    writer.add_name(name)
    writer.add_license(license_name)  # an empty text adds no key
    writer.add_string("tinylm.exporter_version", __version__)
    for key, value in facts_of(lineage).items():
        if isinstance(value, bool):
            writer.add_bool(f"tinylm.{key}", value)
        elif isinstance(value, float):
            writer.add_float64(f"tinylm.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"tinylm.{key}", value)
        elif abs(value) < 2**63:
            writer.add_int64(f"tinylm.{key}", value)


def add_shape(writer: gguf.GGUFWriter, config: TinyLMConfig) -> None:
    """Widths, heads, context and rotary positions.

    llama.cpp multiplies the usual temperature of its YaRN, 0.1 ln(factor) + 1, by `attn_factor`: that holds the rest.
    """
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    _, temperature = rope_frequencies(config)
    if _is_usual_yarn(yarn := config.rope_scaling or {}):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn["factor"])
        writer.add_rope_scaling_orig_ctx_len(int(yarn["original_max_position_embeddings"]))
        temperature /= 0.1 * math.log(yarn["factor"]) + 1
    writer.add_rope_scaling_attn_factors(temperature)


def rope_factors(config: TinyLMConfig) -> Tensor | None:
    """[D/2]: what the plain rotation speeds are divided by; None if llama.cpp computes the model's speeds by itself.

    Its YaRN has fixed settings: it reads no betas from a file of these architectures, and always rounds.
    """
    if config.rope_scaling is None or _is_usual_yarn(config.rope_scaling):
        return None
    return rope_frequencies(replace(config, rope_scaling=None))[0] / rope_frequencies(config)[0]


def _is_usual_yarn(scaling: dict[str, Any]) -> bool:
    usual = {"rope_type": "yarn", "beta_fast": 32, "beta_slow": 1, "truncate": True}
    return bool(scaling) and all(scaling.get(key, value) == value for key, value in usual.items())


def add_tokenizer(writer: gguf.GGUFWriter, config: TinyLMConfig, tokenizer: Tokenizer, lineage: dict[str, Any]) -> int:
    """Tokens, merges, special tokens and the chat template; returns how many entries of the model have no token.

    A base model whose documents began with <|endoftext|> gets it as its first token. A chat has no such token.

    Raises:
        ValueError: llama.cpp has no pre-tokenizer that splits text in this way, or the tokenizer has no merges.
    """
    names, types = token_list(tokenizer, config.vocab_size)
    model = tokenizer.definition["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise ValueError("the tokenizer has no merges, and llama.cpp opens no such file; train one with more entries")
    bos, ends, pad = config.bos_token_id, config.eos_token_ids, config.pad_token_id
    starts_document = is_base_model(tokenizer, lineage) and bool(lineage.get("document_start"))
    start = tokenizer.text_start or ([tokenizer.endoftext_id] if starts_document else [])
    if len(start) > 1:
        raise ValueError(f"the tokenizer puts {len(start)} tokens before a text; llama.cpp puts one there, or none")
    if start:
        bos = start[0]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(llama_cpp_name(tokenizer.definition))
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    # Always written: without these keys, llama.cpp takes the ids of GPT-2.
    writer.add_bos_token_id(tokenizer.bos_id if bos is None else bos)
    writer.add_eos_token_id(ends[0] if ends else tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id if pad is None else pad)
    writer.add_add_bos_token(bool(start))
    writer.add_add_eos_token(False)
    if tokenizer.has_chat_tokens or len(ends) > 1:  # of several that end an answer, llama.cpp knows two by these keys
        writer.add_eot_token_id(tokenizer.im_end_id if tokenizer.has_chat_tokens else ends[-1])
    if tokenizer.can_chat:
        writer.add_chat_template(tokenizer.their_template or CHAT_TEMPLATE)
    return types.count(gguf.TokenType.UNUSED)


def token_list(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """The name and type of each id. Ids without a token are `[PAD7]`, marked as unused: every name must be another."""
    added = {token["content"]: token["id"] for token in tokenizer.definition["added_tokens"]}
    ids = {**tokenizer.definition["model"]["vocab"], **added}
    known = {token_id: name for name, token_id in ids.items()}
    names, types = [], []
    for token_id in range(vocab_size):
        name = known.get(token_id)
        if name is None:
            kind, name = gguf.TokenType.UNUSED, f"[PAD{token_id}]"
            while name in ids:
                name = f"[{name}]"
        elif token_id in tokenizer.special_ids:
            kind = gguf.TokenType.CONTROL
        else:
            kind = gguf.TokenType.USER_DEFINED if name in added else gguf.TokenType.NORMAL
        names.append(name)
        types.append(kind)
    return names, types
