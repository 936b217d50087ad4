"""Adapters on the embedding and the output head, tied or not, against PEFT; and the tie that a merge must undo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.model.small_models import random_ids, reference_of, trained_model
from tinylm.checkpoint.adapter_folder import load_adapter, save_adapter
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.evaluation.sequence_logprob import token_logprobs
from tinylm.model.inference_copy import inference_copy
from tinylm.model.lora import (
    PROJECTIONS,
    TABLES,
    LoRAConfig,
    LoRALinear,
    adapters_disabled,
    apply_lora,
    lora_layers,
    lora_parameters,
    merge_lora,
    unload_lora,
)
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.model.parameter_roles import parameter_roles
from tinylm.model.weights import is_tied, weights_fingerprint
from tinylm.tokenizer.tokenizer import Tokenizer

pytestmark = [
    # PEFT asks transformers for an attribute under its old name, and warns of what is tested here.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]
TARGETS = [TABLES, ("embed_tokens",), ("lm_head",), (*PROJECTIONS, *TABLES)]
everything = pytest.mark.parametrize("targets", TARGETS, ids=["tables", "embedding", "head", "all nine"])
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def base_model(tied: bool, **changes: object) -> TinyLMForCausalLM:
    torch.manual_seed(3)
    return trained_model(tie_word_embeddings=tied, **changes)


def adapted(tied: bool, targets: tuple[str, ...], **changes: object) -> TinyLMForCausalLM:
    model = apply_lora(base_model(tied), LoRAConfig(rank=3, alpha=7.5, target_modules=targets, **changes))
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, 0, 0.15)
    assert isinstance(model, TinyLMForCausalLM)
    return model


@tied_or_not
@everything
def test_peft_loads_our_adapter(tmp_path: Path, tied: bool, targets: tuple[str, ...]) -> None:
    model, ids = adapted(tied, targets), random_ids(2, 20)
    save_adapter(model, tmp_path / "größe", "base")
    expected = model(ids)
    peft_model = PeftModel.from_pretrained(reference_of(unload_lora(model)), tmp_path / "größe")
    assert (model(ids) - expected).abs().max() > 0.5
    torch.testing.assert_close(peft_model(ids).logits, expected, rtol=1e-5, atol=1e-5)


@tied_or_not
@everything
@pytest.mark.parametrize("together", [False, True], ids=["apart", "ensure_weight_tying"])
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning")
def test_we_load_pefts_adapter(tmp_path: Path, tied: bool, targets: tuple[str, ...], together: bool) -> None:
    """PEFT puts the tables of an adapted embedding into the file, too."""
    model, ids = base_model(tied), random_ids(2, 20)
    settings = LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), ensure_weight_tying=together)
    peft_model = get_peft_model(reference_of(model), settings).eval()
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.15)
    peft_model.save_pretrained(tmp_path)
    expected = peft_model(ids).logits
    assert (expected - model(ids)).abs().max() > 0.5
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    merge_lora(model)
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
    assert is_tied(model) == (tied and together), "adapters that are equal keep the tables equal"


def test_an_adapter_of_another_table_is_refused(tmp_path: Path) -> None:
    """The copy of the table in PEFT's file is the only trace of its base model."""
    model = base_model(True)
    get_peft_model(reference_of(model), LoraConfig(r=2, target_modules=["lm_head"])).save_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight[17, 5] += 0.01
    with pytest.raises(
        ValueError, match=r"another table as base_model.model.lm_head.base_layer.weight than out/b: give"
    ):
        load_adapter(model, tmp_path, "out/b")
    assert not lora_layers(model)
    path = tmp_path / "adapter_model.safetensors"
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    with torch.no_grad():
        model.lm_head.weight[17, 5] -= 0.01
    save_file(rounded, path)
    assert lora_layers(load_adapter(model, tmp_path)), "the same table in half precision"


@tied_or_not
@everything
def test_a_merged_model_computes_what_the_adapted_one_does(
    tmp_path: Path, tied: bool, targets: tuple[str, ...]
) -> None:
    """PEFT adds an adapter of one layer to the table of both: the merged model answers otherwise."""
    model, ids = adapted(tied, targets), random_ids(2, 20)
    expected, fingerprint = model(ids), weights_fingerprint(model)
    assert fingerprint == weights_fingerprint(base_model(tied))
    fast = inference_copy(model)
    torch.testing.assert_close(fast.lm_head(fast.hidden_states(ids)), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(ids), expected), "a copy leaves the model alone"
    with adapters_disabled(model):
        assert torch.equal(model(ids), base_model(tied)(ids))
    merge_lora(model)
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
    assert not model.config.tie_word_embeddings and not model.model.config.tie_word_embeddings
    assert model.num_parameters() == model.config.num_parameters()
    tokenizer = Tokenizer.train(["größe 你好 a b c"], 280)
    save_model(tmp_path / "merged", model, tokenizer, {})
    assert torch.equal(load_model(tmp_path / "merged")[0](ids), model(ids))
    assert torch.equal(reference_of(model)(ids).logits.argmax(-1), model(ids).argmax(-1))


def test_a_merge_that_touches_no_table_leaves_them_tied() -> None:
    model = merge_lora(adapted(True, ("q_proj",)))
    assert is_tied(model) and model.lm_head.weight is model.model.embed_tokens.weight


def test_a_removed_adapter_leaves_the_tables_tied() -> None:
    model, ids = adapted(True, TABLES), random_ids(1, 9)
    unload_lora(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(ids), base_model(True)(ids))


@tied_or_not
def test_a_fresh_adapter_changes_no_bit_and_trains_nothing_else(tied: bool) -> None:
    model, ids = base_model(tied), random_ids(2, 20)
    before = model(ids)
    apply_lora(model, LoRAConfig(rank=4, target_modules=TABLES))
    assert torch.equal(model(ids), before)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "model.embed_tokens.lora_embedding_A": (4, 300),
        "model.embed_tokens.lora_embedding_B": (64, 4),
        "lm_head.lora_A.weight": (4, 64),
        "lm_head.lora_B.weight": (300, 4),
    }
    embedding = model.model.embed_tokens
    ratio = embedding.lora_embedding_B.std() / embedding.base.weight.square().mean().sqrt()
    assert ratio.item() == pytest.approx(1.0, rel=0.2)


def test_what_has_a_row_for_each_token_is_a_table() -> None:
    """Muon makes all directions of a matrix equally large, of tokens too that do not occur."""
    roles = parameter_roles(apply_lora(base_model(True), LoRAConfig(rank=4, target_modules=("q_proj", *TABLES))))
    assert {name: role for name, role in roles.items() if "lora_" in name and "layers.1" not in name} == {
        "model.embed_tokens.lora_embedding_A": "table",
        "model.embed_tokens.lora_embedding_B": "matrix",
        "lm_head.lora_A.weight": "matrix",
        "lm_head.lora_B.weight": "table",
        "model.layers.0.self_attn.q_proj.lora_A.weight": "matrix",
        "model.layers.0.self_attn.q_proj.lora_B.weight": "matrix",
    }


@tied_or_not
def test_training_and_measuring_see_the_adapted_head(tied: bool) -> None:
    """Both have ways past `lm_head(hidden)`: a kernel that takes its weight, and products in full precision."""
    model, ids = adapted(tied, TABLES), random_ids(1, 30)
    expected = torch.log_softmax(model(ids)[0].double(), dim=-1)
    hidden, targets = model.hidden_states(ids)[0], random_ids(1, 30)[0]
    wanted = expected.gather(1, targets[:, None])[:, 0]
    for is_training in (True, False):
        got = model.train(is_training).target_log_probs(hidden, targets)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    values, hits = token_logprobs(model, hidden, targets)
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(hits, expected.argmax(-1) == targets)
    with adapters_disabled(model):
        assert (token_logprobs(model, hidden, targets)[0] - wanted).abs().max() > 0.1
    got.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in (model.lm_head.lora_A.weight,))
    assert model.lm_head.base.weight.grad is None


def test_compiled_training_sees_the_adapted_head() -> None:
    model, ids = adapted(True, TABLES), random_ids(2, 16)
    eager = torch.log_softmax(model(ids), dim=-1)[0, torch.arange(16), ids[0]]
    model.train().compile_for_training(backend="eager")
    hidden = model.hidden_states(ids)
    torch.testing.assert_close(model.target_log_probs(hidden[0], ids[0]), eager, rtol=1e-4, atol=1e-4)
    model.lm_head.dropout = 0.5  # which a head that is compiled with its weight alone would not apply
    assert not torch.equal(*(model.target_log_probs(hidden[0], ids[0]) for _ in "ab"))


def test_dropout_is_for_inputs_that_are_numbers() -> None:
    """As in PEFT: the head's hidden states are dropped, the ids of tokens are not."""
    model, ids = adapted(True, ("embed_tokens",), dropout=0.5).train(), random_ids(1, 20)
    assert torch.equal(model(ids), model(ids))
    model = adapted(True, ("lm_head",), dropout=0.5).train()
    assert not torch.equal(model(ids), model(ids))


def test_the_names_on_disk_are_pefts(tmp_path: Path) -> None:
    save_adapter(adapted(True, TABLES), tmp_path / "a", "base")
    tensors = {
        name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "a" / "adapter_model.safetensors").items()
    }
    assert tensors == {
        "base_model.model.model.embed_tokens.lora_embedding_A": (3, 300),
        "base_model.model.model.embed_tokens.lora_embedding_B": (64, 3),
        "base_model.model.lm_head.lora_A.weight": (3, 64),
        "base_model.model.lm_head.lora_B.weight": (300, 3),
    }
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"] == sorted(TABLES)


def test_the_head_is_a_linear_layer_and_merges_in_float32() -> None:
    model = adapted(False, ("lm_head",)).bfloat16()
    head = model.lm_head
    assert isinstance(head, LoRALinear)
    expected = head.base.weight.double() + 2.5 * head.lora_B.weight.double() @ head.lora_A.weight.double()
    assert (merge_lora(model).lm_head.weight.double() != expected.bfloat16().double()).float().mean() < 1e-3
