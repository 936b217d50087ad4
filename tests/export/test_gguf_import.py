"""GGUF files come in: the same weights, log-probabilities, greedy tokens and texts as in llama.cpp on the same file."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from tests.export.conftest import SHAPES, Loaded
from tests.export.gguf_files import quantised, rewrite
from tests.export.llama_cpp import LlamaCpp, greedy, next_logprobs
from tests.model.small_models import LLAMA3, trained_model
from tests.tokenizer.other_tokenizers import write_tokenizer
from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.export.gguf import export_gguf
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.model.positions import rope_frequencies
from tinylm.tokenizer.tokenizer import Tokenizer

IDS = random.Random(5).choices(range(16, 373), k=120)
ODD_YARNS = ("slow yarn", "fast yarn", "another yarn")
Shape = Callable[[str], Loaded]


def weights_of(model: TinyLMForCausalLM) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def same_weights(a: TinyLMForCausalLM, b: TinyLMForCausalLM) -> bool:
    ours, theirs = weights_of(a), weights_of(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def worst_difference(model: TinyLMForCausalLM, llama_cpp: LlamaCpp) -> float:
    size = model.config.vocab_size
    pairs = [(next_logprobs(model, IDS[:n]), llama_cpp.next_logprobs(IDS[:n], size)) for n in (1, 20, 120)]
    return float(torch.stack([(ours - theirs).abs().max() for ours, theirs in pairs]).max())


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in ODD_YARNS])
def test_every_shape_comes_back(shape: Shape, small_tokenizer: Tokenizer, name: str) -> None:
    """To the bit, with the same tokenizer and lineage; YaRN's temperature is written in float32."""
    loaded = shape(name)
    model, tokenizer, lineage = load_model(loaded.path)
    assert same_weights(model, loaded.model)
    ours, theirs = vars(loaded.model.config).copy(), vars(model.config).copy()
    for config in (ours, theirs):
        del config["rope_scaling"], config["initializer_range"]
    assert ours == theirs
    speeds, temperature = rope_frequencies(model.config)
    expected_speeds, expected_temperature = rope_frequencies(loaded.model.config)
    torch.testing.assert_close(speeds, expected_speeds, rtol=2e-6 if name in ("linear", "llama3") else 0, atol=0)
    assert temperature == pytest.approx(expected_temperature, rel=1e-6)
    assert tokenizer == small_tokenizer and tokenizer.settings is None
    assert (lineage["stage"], lineage["document_start"]) == ("full_sft", True)
    assert greedy(model, IDS[:40]) == loaded.llama_cpp.greedy(IDS[:40])


@pytest.mark.parametrize("scaling", [LLAMA3, {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0,
     "original_max_position_embeddings": 100}])  # fmt: skip
@pytest.mark.parametrize("changes", [{}, {"head_dim": 64, "rope_theta": 5e5}])
def test_factors_of_the_speeds_become_a_rule(
    small_tokenizer: Tokenizer, tmp_path: Path, scaling: dict[str, Any], changes: dict[str, Any]
) -> None:
    model = trained_model(vocab_size=373, rope_scaling=scaling, **changes)
    export_gguf(model, small_tokenizer, {}, tmp_path / "a.gguf", "f32")
    again = load_model(tmp_path / "a.gguf")[0]
    assert again.config.rope_scaling["rope_type"] == scaling["rope_type"]
    torch.testing.assert_close(rope_frequencies(again.config)[0], rope_frequencies(model.config)[0], rtol=2e-6, atol=0)
    assert worst_difference(again, LlamaCpp(tmp_path / "a.gguf")) < 1e-4


@pytest.mark.parametrize("name", ODD_YARNS)
def test_factors_of_another_rule_are_refused(shape: Shape, tmp_path: Path, name: str) -> None:
    """Also where the temperature, which only YaRN has, is not in the file."""
    with pytest.raises(ValueError, match="yarn.gguf: llama.rope.scaling.attn_factor is .*; expected 1"):
        load_model(shape(name).path)
    path = rewrite(shape(name).path, tmp_path / "b.gguf", {"llama.rope.scaling.attn_factor": None})
    with pytest.raises(ValueError, match="b.gguf: rope_freqs.weight holds .*neither Llama 3's rule nor linear"):
        load_model(path)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q4_0"])
def test_our_own_types_come_back(shape: Shape, small_tokenizer: Tokenizer, tmp_path: Path, dtype: str) -> None:
    """Float types to the bit, the others as the package itself reads them."""
    model = shape("biases").model
    export_gguf(model, small_tokenizer, {}, tmp_path / "a.gguf", dtype)
    again = weights_of(load_model(tmp_path / "a.gguf")[0])
    kinds = {"f16": torch.float16, "bf16": torch.bfloat16}
    for name, tensor in weights_of(model).items():
        if dtype in kinds:
            expected = tensor.to(kinds[dtype]).float() if tensor.ndim > 1 else tensor
        elif tensor.ndim == 1:
            expected = tensor
        else:
            kind = (
                Kind.Q8_0 if dtype == "q8_0" or name in ("model.embed_tokens.weight", "lm_head.weight") else Kind.Q4_0
            )
            raw = gguf.quants.quantize(tensor.detach().numpy(), kind)
            expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
        assert torch.equal(again[name], expected), name


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_types_of_others(small_tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    """llama.cpp rounds the activations too, so its log-probabilities differ; the greedy tokens are the same."""
    torch.manual_seed(3)
    changes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model = trained_model(vocab_size=373, **changes)
    export_gguf(model, small_tokenizer, {}, tmp_path / "a.gguf", "f32")
    path = rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", tensors=quantised(Kind[kind]))
    again = load_model(path)[0]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.0.ffn_up.weight"]
    expected = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert stored.tensor_type.name == kind
    assert np.array_equal(weights_of(again)["model.layers.0.mlp.up_proj.weight"].detach().numpy(), expected)
    exact, rounded = next_logprobs(again, IDS), LlamaCpp(path).next_logprobs(IDS, 373)
    assert exact.std() > 0.1 and exact.argmax() == rounded.argmax()
    assert (exact - rounded).abs().max() < max(0.2, 0.2 * exact.std())


def test_qwen2_is_not_permuted(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As llama.cpp's converter writes it: biases on q, k and v, rows as they are, another end for an answer."""
    torch.manual_seed(4)
    model = trained_model(vocab_size=373, qkv_bias=True)
    export_gguf(model, small_tokenizer, {}, tmp_path / "a.gguf", "f32")
    rows = {
        f"blk.{layer}.attn_{part}.{kind}": weights_of(model)[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"]
        for layer in (0, 1) for part in "qk" for kind in ("weight", "bias")
    }  # fmt: skip
    path = rewrite(
        tmp_path / "a.gguf",
        tmp_path / "b.gguf",
        {"tokenizer.ggml.eos_token_id": 0, "qwen2.rope.scaling.attn_factor": None},
        lambda name, numbers: (rows[name].detach().numpy() if name in rows else numbers, Kind.F32),
        architecture="qwen2",
    )
    again = load_model(path)[0]
    assert same_weights(again, model) and again.config.qkv_bias and again.config.eos_token_ids == [0, 2]
    llama_cpp = LlamaCpp(path)
    assert worst_difference(again, llama_cpp) < 1e-4
    assert greedy(again, IDS[:40]) == llama_cpp.greedy(IDS[:40])


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "qwen", "llama3"])
def test_their_tokenizers(tmp_path: Path, torture: list[str], name: str) -> None:
    """Tokens as in transformers and llama.cpp; roles, start, template; control tokens out of reach of any text."""
    folder = write_tokenizer(name, tmp_path / "in", chat_template=TEMPLATE)
    theirs, before = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    torch.manual_seed(0)
    model = trained_model(vocab_size=before.vocab_size, eos_token_id=before.eos_id, pad_token_id=before.pad_id,
                          bos_token_id=before.bos_id)  # fmt: skip
    export_gguf(model, before, {}, tmp_path / "a.gguf", "f32")
    loaded, llama_cpp = load_for_use(tmp_path / "a.gguf"), LlamaCpp(tmp_path / "a.gguf")
    ours = loaded.tokenizer
    for text in torture:
        ids = ours.encode(text)
        assert ids == before.encode(text) or name == "qwen", text[:40]
        if not any(token in text for token in ours.added_ids):
            assert ids == llama_cpp.tokens(text), text[:40]
            if unicodedata.is_normalized("NFC", text):
                assert [*ours.text_start, *ids] == theirs(text)["input_ids"], text[:40]
        assert ours.special_ids.isdisjoint(ids)
    roles = ("bos_id", "eos_id", "pad_id", "text_start", "their_template", "special_ids", "added_ids")
    assert [getattr(ours, role) for role in roles] == [getattr(before, role) for role in roles]
    assert loaded.document_start == before.text_start
    for special in ours.added_ids:
        assert not {*ours.added_ids.values()} & {*ours.encode(f"a{special} {special}\n")}
    save_model(tmp_path / "out", loaded.model, ours, {})
    again = load_model(tmp_path / "out")[1]
    assert again == ours and again.text_start == ours.text_start and again.their_template == TEMPLATE


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general.architecture": "gemma2"}, "general.architecture is 'gemma2'; expected llama, qwen2"),
    "adapter": ({"general.type": "adapter"}, "general.type is 'adapter'; expected a model"),
    "split": ({"split.count": 2}, "split.count is 2; expected a GGUF of one file: join"),
    "old quantisation": ({"general.quantization_version": 1}, "quantization_version is 1; expected 2"),
    "window": ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window is 64, which may change"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count is 8, .*; expected 0"),
    "logit scale": ({"llama.logit_scale": 0.5}, "llama.logit_scale is 0.5, .*expected 0 or 1"),
    "unheard": ({"llama.attention.relative_buckets": 3}, "relative_buckets is 3, .*; expected a file without it"),
    "rope type": ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'; expected none, linear"),
    "part of a head": ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8; expected 16"),
    "values": ({"llama.attention.value_length": 8}, "value_length is 8; expected 16"),
    "temperature": ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5 with the scaling linear; expected 1"),
    "heads of layers": ({"llama.attention.head_count": [4, 2]}, r"head_count is \[4, 2\]; expected a whole number"),
    "heads": ({"llama.attention.head_count": 3}, "num_key_value_heads"),
    "no layers": ({"llama.block_count": None}, "block_count is None; expected a whole number"),
    "layers": ({"llama.block_count": 1}, "tensors too many"),
    "many layers": ({"llama.block_count": 2**31}, "its config implies"),
    "width": ({"llama.embedding_length": 2**31}, "its config implies|position tables|head"),
    "context": ({"llama.context_length": 2**31}, "at most 1048576 positions"),
    "rows": ({"llama.vocab_size": 9}, "vocab_size is 9; token_embd.weight has 373 rows"),
    "epsilon": ({"llama.attention.layer_norm_rms_epsilon": "x"}, "layer_norm_rms_epsilon is 'x'; expected a number"),
    "tokenizer": ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama'; expected gpt2"),
    "splitting": ({"tokenizer.ggml.pre": "deepseek-llm"}, "tokenizer.ggml.pre is 'deepseek-llm'; expected qwen2"),
    "no splitting": ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is None; expected qwen2"),
    "end": ({"tokenizer.ggml.add_eos_token": True}, "add_eos_token is True, which may change the tokens"),
    "lower case": ({"tokenizer.ggml.lowercase": True}, "lowercase is True, .*expected a file without it"),
    "no types": ({"tokenizer.ggml.token_type": None}, "token_type is missing; expected a list"),
    "types": ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2 items; expected 373"),
    "type": ({"tokenizer.ggml.token_type": [9] * 373}, "item 0 of tokenizer.ggml.token_type is 9; expected 1 to 5"),
    "merge": ({"tokenizer.ggml.merges": ["a \x1b"]}, r"merge 'a \\x1b' has a part"),
    "tokens": ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "'a' (has two ids|twice)"),
    "begin": ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 9999}, "bos_token_id is 9999"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_another_model_is_refused_by_its_key(shape: Shape, tmp_path: Path, case: str) -> None:
    values, message = REFUSED[case]
    path = rewrite(shape("grouped").path, tmp_path / "b.gguf", values)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()


def test_settings_that_change_nothing_and_provenance_pass(shape: Shape, tmp_path: Path) -> None:
    values = {"llama.expert_count": 0, "llama.attention.sliding_window": 256, "llama.attention.head_count": [4, 4],
              "quantize.imatrix.file": "größe.dat", "llama.rope.scaling.finetuned": True,
              "tokenizer.ggml.scores": [0.5] * 373, "general.alignment": 64}  # fmt: skip
    model = load_model(rewrite(shape("grouped").path, tmp_path / "b.gguf", values))[0]
    assert same_weights(model, shape("grouped").model)


@pytest.mark.parametrize("name", ["blk.0.attn_k.weight", "token_embd.weight", "output_norm.weight"])
def test_a_missing_tensor_is_named(shape: Shape, tmp_path: Path, name: str) -> None:
    path = rewrite(
        shape("grouped").path, tmp_path / "b.gguf",
        tensors=lambda found, numbers: None if found == name else (numbers, Kind.F32),
    )  # fmt: skip
    with pytest.raises(ValueError, match="b.gguf.*(lacks 1 tensors|token_embd.weight is missing)"):
        load_model(path)


def test_numbers_that_are_none_are_refused(shape: Shape, tmp_path: Path) -> None:
    path = rewrite(
        shape("grouped").path, tmp_path / "b.gguf",
        tensors=lambda name, numbers: (numbers * np.float32("nan") if "attn_q" in name else numbers, Kind.F32),
    )  # fmt: skip
    with pytest.raises(ValueError, match="b.gguf: blk.0.attn_q.weight holds NaN or infinite numbers"):
        load_model(path)
