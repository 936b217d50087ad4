"""A GGUF computes in llama.cpp what our model computes: every shape, every type of numbers, adapters."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch

from tests.export.conftest import SHAPES, Loaded
from tests.export.llama_cpp import LlamaCpp, greedy, next_logprobs
from tests.model.small_models import YARN, trained_model
from tinylm.export.gguf import export_gguf, export_gguf_adapter
from tinylm.model.lora import PROJECTIONS, TABLES, LoRAConfig, apply_lora, lora_layers, lora_parameters, merge_lora
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer

IDS = random.Random(5).choices(range(16, 373), k=180)
LENGTHS = (1, 2, 20, 90, 180)


def worst_difference(model: TinyLMForCausalLM, llama_cpp: LlamaCpp) -> float:
    """The largest difference of any token's log-probability, after prompts of several lengths."""
    size = model.config.vocab_size
    pairs = [(next_logprobs(model, IDS[:n]), llama_cpp.next_logprobs(IDS[:n], size)) for n in LENGTHS]
    return float(torch.stack([(ours - theirs).abs().max() for ours, theirs in pairs]).max())


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_gives_the_same_log_probabilities(shape: Callable[[str], Loaded], name: str) -> None:
    """The bound is 1e-3; what is left is the order of additions."""
    loaded = shape(name)
    assert worst_difference(loaded.model, loaded.llama_cpp) < 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_64_greedy_tokens_are_the_same(shape: Callable[[str], Loaded], name: str) -> None:
    loaded = shape(name)
    assert loaded.llama_cpp.greedy(IDS[:40]) == greedy(loaded.model, IDS[:40])


@pytest.mark.parametrize(("dtype", "bound"), [("f16", 0.02), ("bf16", 0.15), ("q8_0", 0.15), ("q4_0", 2.5)])
def test_fewer_bits_cost_little(
    shape: Callable[[str], Loaded], small_tokenizer: Tokenizer, tmp_path: Path, dtype: str, bound: float
) -> None:
    """Noise in random weights shows more than in trained ones; without the right scales it would be far larger."""
    model = shape("grouped").model
    written = export_gguf(model, small_tokenizer, {}, tmp_path / "a.gguf", dtype)
    assert written.num_bytes == (tmp_path / "a.gguf").stat().st_size
    expected = {dtype: 15, "f32": 5} if dtype != "q4_0" else {"q8_0": 1, "q4_0": 14, "f32": 5}
    assert (written.tensors, written.kept, written.unused) == (expected, 0, 0)
    found = worst_difference(model, LlamaCpp(tmp_path / "a.gguf"))
    assert bound / 20 < found < bound


def test_what_cannot_be_quantised_is_wider_and_counted(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Rows of 56 are no multiple of 32; 70,000 is more than half precision holds."""
    torch.manual_seed(0)
    model = trained_model(vocab_size=379, hidden_size=56)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 70_000.0
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = 70_000.0
    written = export_gguf(model, small_tokenizer, {}, tmp_path / "a.gguf", "q8_0")
    assert written.unused == 6
    # The width is 56; down_proj's rows are 192 long, and its scale of 70,000 / 127 fits.
    assert written.tensors == {"f16": 12, "q8_0": 2, "f32": 6} and written.kept == 13
    assert next_logprobs(model, IDS).isfinite().all()
    assert LlamaCpp(tmp_path / "a.gguf").next_logprobs(IDS, 379).isfinite().all()


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        *itertools.product(("multi-query", "qk_norm"), (PROJECTIONS, ("k_proj",))),
        *itertools.product(("wide heads", "biases"), (("embed_tokens",), ("lm_head",), ("q_proj", *TABLES))),
    ],
)
def test_an_adapter_answers_the_same(
    shape: Callable[[str], Loaded], tmp_path: Path, name: str, targets: tuple[str, ...]
) -> None:
    """llama.cpp puts the adapter's GGUF on the base model's."""
    loaded = shape(name)
    torch.manual_seed(1)
    model = TinyLMForCausalLM(loaded.model.config).eval()
    model.load_state_dict(loaded.model.state_dict())
    apply_lora(model, LoRAConfig(rank=3, alpha=7.5, target_modules=targets))
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, 0, 0.15)
    written = export_gguf_adapter(model, {"stage": "lora"}, tmp_path / "a.gguf", "f32")
    assert written.tensors == {"f32": 2 * len(lora_layers(model))}
    assert worst_difference(model, loaded.llama_cpp) > 0.5  # it changes the answers
    with_adapter = LlamaCpp(loaded.path, tmp_path / "a.gguf")
    assert worst_difference(model, with_adapter) < 1e-4
    assert with_adapter.greedy(IDS[:40]) == greedy(model, IDS[:40])


@pytest.mark.parametrize("target", TABLES)
def test_an_adapter_of_a_tied_table_is_refused_alone(
    shape: Callable[[str], Loaded], small_tokenizer: Tokenizer, tmp_path: Path, target: str
) -> None:
    """llama.cpp aborts on one, and finds no output.weight for the other. Merged, the model has two tables."""
    model = apply_lora(trained_model(vocab_size=373), LoRAConfig(rank=3, target_modules=("v_proj", target)))
    assert isinstance(model, TinyLMForCausalLM)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, 0, 0.15)
    with pytest.raises(ValueError, match=rf"changes \S*{target}, of a model with tied embeddings.* with --merge$"):
        export_gguf_adapter(model, {}, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []
    adapted = next_logprobs(model, IDS)
    export_gguf(merge_lora(model), small_tokenizer, {}, tmp_path / "a.gguf", "f32")
    assert (LlamaCpp(tmp_path / "a.gguf").next_logprobs(IDS, 373) - adapted).abs().max() < 1e-4


def test_adapters_that_the_format_cannot_hold(shape: Callable[[str], Loaded], tmp_path: Path) -> None:
    model = apply_lora(trained_model(), LoRAConfig(rank=4))
    assert isinstance(model, TinyLMForCausalLM)
    with pytest.raises(ValueError, match="dtype is q8_0; an adapter's rows are too short .*; choose f32, f16 or bf16"):
        export_gguf_adapter(model, {}, tmp_path / "a.gguf", "q8_0")
    model.model.layers[0].self_attn.q_proj.scaling = 9.0
    with pytest.raises(ValueError, match="the adapters have 2 values of alpha; a GGUF adapter has one for all"):
        export_gguf_adapter(model, {}, tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="merge_lora, or export them with export_gguf_adapter"):
        export_gguf(model, Tokenizer.default(), {}, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"position_embedding_type": "learned"}, "'learned' has no equivalent in Llama or Qwen3"),
        ({"position_embedding_type": "sinusoidal"}, "'sinusoidal' has no equivalent in Llama or Qwen3"),
        ({"qk_norm": True, "mlp_bias": True}, "qk_norm with mlp_bias exists in neither"),
        ({"qk_norm": True, "attention_bias": True}, "llama.cpp's qwen3 has query/key norms but no biases"),
        ({"qk_norm": True, "rope_scaling": {**YARN, "beta_fast": 8}}, "'beta_fast': 8.* cannot be a GGUF"),
        ({"qk_norm": True, "rope_scaling": {**YARN, "truncate": False}}, "qwen3 knows YaRN with beta_fast 32"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(
    small_tokenizer: Tokenizer, tmp_path: Path, changes: dict, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        export_gguf(trained_model(vocab_size=373, **changes), small_tokenizer, {}, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_model_is_refused(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = trained_model(vocab_size=373)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"blk.1.ffn_up.weight holds NaN or infinite numbers; the model is broken"):
        export_gguf(model, small_tokenizer, {}, tmp_path / "a.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []


def test_the_file_says_where_it_comes_from(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """And nothing about this machine: settings and parents hold paths."""
    lineage = {
        "stage": "full_sft", "step": 7, "finished": True, "validation_loss": 0.5, "seed": None, "version": "0.1.0",
        "data_fingerprint": "größe", "settings": {"data_path": "/secret/größe"}, "parent": {"path": "/secret"},
    }  # fmt: skip
    model = trained_model(vocab_size=373)
    export_gguf(model, small_tokenizer, lineage, tmp_path / "a.gguf", name="Ärger", license_name="mit")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    found = {name: field.contents() for name, field in fields.items() if name.startswith(("general.", "tinylm."))}
    assert found.pop("tinylm.exporter_version")
    assert found == {
        "general.architecture": "llama", "general.type": "model", "general.name": "Ärger", "general.license": "mit",
        "general.size_label": "0.122M", "general.file_type": 1, "general.quantization_version": 2,
        "tinylm.stage": "full_sft", "tinylm.step": 7, "tinylm.finished": True, "tinylm.validation_loss": 0.5,
        "tinylm.version": "0.1.0", "tinylm.data_fingerprint": "größe",
    }  # fmt: skip
    assert b"secret" not in (tmp_path / "a.gguf").read_bytes()
