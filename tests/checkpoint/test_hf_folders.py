"""Folders that transformers wrote come in, and go out again: randomly initialised models of many shapes.

All parameters are random, also the norms and biases, whose usual initial values would hide a fault.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.model.small_models import LLAMA3, YARN, random_ids
from tests.tokenizer.other_tokenizers import write_tokenizer
from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.generation.engine import Engine
from tinylm.model.inference_copy import inference_copy
from tinylm.tokenizer.tokenizer import Tokenizer

LINEAR = {"rope_type": "linear", "factor": 4.0}
THETA = 5e4
CONFIGS = {
    "llama": (LlamaConfig, {}),
    "llama_multi_head": (LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama_multi_query_wide_heads": (LlamaConfig, {"num_key_value_heads": 1, "head_dim": 48}),
    "llama_biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "vocab_size": 509}),
    "llama_linear": (LlamaConfig, {"rope_parameters": {**LINEAR, "rope_theta": THETA}}),
    "llama_llama3": (LlamaConfig, {"rope_parameters": {**LLAMA3, "rope_theta": THETA}, "tie_word_embeddings": True}),
    "llama_yarn": (LlamaConfig, {"rope_parameters": {**YARN, "rope_theta": THETA}}),
    "smollm2": (  # 9 heads of 64, 3 for keys and values, as SmolLM2-135M has
        LlamaConfig,
        {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
         "rms_norm_eps": 1e-5, "vocab_size": 491},
    ),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral_head_dim": (MistralConfig, {"sliding_window": 512, "head_dim": 24, "hidden_size": 90, "vocab_size": 401}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2_yarn": (Qwen2Config, {"rope_parameters": {**YARN, "rope_theta": THETA}, "head_dim": 32, "vocab_size": 307}),
    "qwen3": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_biases_linear": (
        Qwen3Config,
        {"head_dim": 16, "attention_bias": True, "rope_parameters": {**LINEAR, "rope_theta": THETA}},
    ),
}  # fmt: skip
COMES_OUT_AS = {"llama": "Llama", "mistral": "Llama", "mistral_head_dim": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat; the dog sat on the log. " * 20], vocab_size=280)


def theirs_of(name: str):
    """transformers' model of that shape, every parameter random."""
    torch.manual_seed(len(name))
    config_class, changes = CONFIGS[name]
    settings = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, **changes}
    if int(transformers.__version__.partition(".")[0]) < 5 and (rope := dict(settings.pop("rope_parameters", {}))):
        settings |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    config = config_class(**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_vector = parameter.ndim == 1
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.3 if is_vector else 0.1)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_their_folder_gives_their_logits_and_goes_out_again(tmp_path, tokenizer, name):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path / "in")
    tokenizer.save(tmp_path / "in")
    ours, _, _ = load_model(tmp_path / "in")
    ids = random_ids(2, 300)  # far beyond the 64 positions that YaRN and Llama 3's rule stretch
    expected = theirs(ids).logits
    assert expected.abs().max() > 1 and expected.std() > 0.3
    torch.testing.assert_close(ours(ids), expected, rtol=1e-5, atol=1e-5)

    save_model(tmp_path / "out", ours, tokenizer, {})
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    stem = COMES_OUT_AS.get(name, COMES_OUT_AS.get(name.partition("_")[0], "Llama"))
    assert type(again).__name__ == f"{stem}ForCausalLM"
    assert getattr(again.config, "sliding_window", None) is None  # which Mistral would assume
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert load_model(tmp_path / "out")[0].config == ours.config


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_with_a_cache_too(tmp_path, tokenizer, name):
    """The way of generation: a prompt at once, then token by token, in the copy with joined projections."""
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    fast = inference_copy(load_model(tmp_path)[0])
    ids = random_ids(1, 150)
    cache = fast.new_cache(1, 150)
    pieces = [fast.hidden_states(ids[:, :140], cache=cache)]
    pieces += [fast.hidden_states(ids[:, at : at + 1], cache=cache) for at in range(140, 150)]
    logits = fast.lm_head(torch.cat(pieces, dim=1))
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-5, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama_llama3", "mistral", "qwen2", "qwen3_biases_linear"])
def test_half_precision_in_shards(tmp_path, tokenizer, name, dtype):
    theirs = theirs_of(name).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    tokenizer.save(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ours, _, _ = load_model(tmp_path)
    ids = random_ids(2, 100)
    exact = theirs.float()
    for module in exact.modules():  # its tables were halved too
        if hasattr(module, "inv_freq"):
            module.inv_freq = type(module)(exact.config).inv_freq
    torch.testing.assert_close(ours(ids), exact(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_folder_of_older_versions_reads_the_same(tmp_path, tokenizer):
    """transformers 4 wrote `rope_theta` beside `rope_scaling`, and its kind as `type`."""
    theirs = theirs_of("llama_yarn")
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    new = load_model(tmp_path)[0].config
    data = json.loads((tmp_path / "config.json").read_text())
    if "rope_parameters" in data:
        rope = data.pop("rope_parameters")
        data |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    data["rope_scaling"]["type"] = data["rope_scaling"].pop("rope_type")
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert load_model(tmp_path)[0].config == new and new.rope_scaling["factor"] == 4.0 and new.rope_theta == THETA


def test_several_ends_stay_several(tmp_path, tokenizer):
    theirs = theirs_of("llama")
    theirs.config.eos_token_id = [7, 9]
    theirs.save_pretrained(tmp_path / "in")
    tokenizer.save(tmp_path / "in")
    ours, _, _ = load_model(tmp_path / "in")
    assert ours.config.eos_token_ids == [7, 9]
    save_model(tmp_path / "out", ours, tokenizer, {})
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"][:2] == [7, 9]


@pytest.mark.parametrize("name", ["qwen", "llama3", "mistral"])
def test_their_tokenizer_says_how_a_text_starts_and_ends(tmp_path, name):
    """The model's several ends count where they are control tokens: our own default of 2 may be a letter there."""
    write_tokenizer(name, tmp_path)
    theirs = theirs_of("llama")
    theirs.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    tokenizer = Tokenizer.load(tmp_path)
    special = sorted(tokenizer.special_ids)
    (tmp_path / "config.json").write_text(json.dumps({**data, "vocab_size": 600, "eos_token_id": [special[0], 70]}))
    theirs.resize_token_embeddings(600)
    theirs.save_pretrained(tmp_path / "larger")
    (tmp_path / "larger" / "model.safetensors").replace(tmp_path / "model.safetensors")
    loaded = load_for_use(tmp_path)
    assert loaded.document_start == ([] if name == "qwen" else [tokenizer.bos_id])
    engine = Engine(loaded.model, loaded.tokenizer, torch.float32, loaded.document_start)
    assert set(engine.stop_ids) == {tokenizer.endoftext_id, tokenizer.eos_id, special[0]}
    expected = AutoTokenizer.from_pretrained(tmp_path)("The dog")["input_ids"]
    assert engine.text_prompt("The dog") == expected
