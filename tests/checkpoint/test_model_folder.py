"""Model folders: round trips, transformers on the other side, and every way to be broken."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.small_models import YARN, random_ids, reference_of, small_model
from tinylm.checkpoint.adapter_folder import save_adapter
from tinylm.checkpoint.model_folder import adapter_base, load_model, save_model
from tinylm.checkpoint.model_path import resolve_model_path
from tinylm.export.pth import export_pth
from tinylm.model.lora import LoRAConfig, apply_lora, lora_parameters
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.model.weights import weights_fingerprint
from tinylm.tokenizer.tokenizer import Tokenizer

FILES = {
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "lineage.json", "manifest.json",
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat; the dog sat on the log. " * 20], vocab_size=280)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A saved model folder."""
    save_model(tmp_path / "model", small_model(), tokenizer, {"stage": "pretrain"})
    return tmp_path / "model"


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SHAPES = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "yarn": {"rope_scaling": YARN},
    "qwen3": {"qk_norm": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("shape", [*SHAPES, "learned", "sinusoidal"])
def test_round_trip_is_exact(tmp_path, tokenizer, shape):
    kind = {"position_embedding_type": shape} if shape in ("learned", "sinusoidal") else SHAPES[shape]
    model = small_model(**kind)
    save_model(tmp_path / "m", model, tokenizer, {"stage": "full_sft", "seed": 3})
    assert {path.name for path in (tmp_path / "m").iterdir()} == FILES
    random_state = torch.get_rng_state()
    again, its_tokenizer, lineage = load_model(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), random_state)
    ids = random_ids(2, 30)
    assert torch.equal(again(ids), model(ids)) and not again.training
    assert again.config == model.config and lineage == {"stage": "full_sft", "seed": 3}
    assert its_tokenizer.fingerprint == tokenizer.fingerprint
    assert weights_fingerprint(again) == weights_fingerprint(model)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_a_fingerprint_leaves_the_memory_of_the_weights_free_to_go():
    """numpy had been shown the weights in place, and torch does not free memory that numpy has seen: saving an
    adapter beside a sharded model failed with "Trying to resize storage that is not resizable".
    """
    model = small_model()
    weights_fingerprint(model)
    assert all(parameter.untyped_storage().resizable() for parameter in model.parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_loads_our_folder(tmp_path, tokenizer, shape):
    from transformers import AutoModelForCausalLM

    model = small_model(**SHAPES[shape])
    save_model(tmp_path / "m", model, tokenizer, {})
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if shape == "qwen3" else "LlamaForCausalLM")
    ids = random_ids(2, 80)
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-5, atol=1e-5)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id) == (1, 2, 0)
    assert theirs.generation_config.eos_token_id == [2, 0] and theirs.dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shard", [None, "100KB"])
def test_we_load_what_transformers_saves(tmp_path, tokenizer, shape, shard):
    reference = reference_of(small_model(**SHAPES[shape]))
    reference.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard
    with pytest.raises(ValueError, match="no tokenizer.json for its 300 entries; give --tokenizer_path"):
        load_model(tmp_path)
    tokenizer.save(tmp_path)
    model, _, lineage = load_model(tmp_path)
    ids = random_ids(2, 80)
    torch.testing.assert_close(model(ids), reference(ids).logits, rtol=1e-5, atol=1e-5)
    assert lineage == {}


def test_half_precision_files_load_as_float32_unless_asked(tmp_path, tokenizer):
    model = small_model().to(torch.bfloat16)
    save_model(tmp_path / "m", model, tokenizer, {})
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(tmp_path / "m")[0].dtype == torch.float32
    assert load_model(tmp_path / "m", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile's own
def test_compiled_models_save_plain_names(tmp_path, tokenizer):
    save_model(tmp_path / "m", torch.compile(small_model()), tokenizer, {})
    assert "model.layers.0.self_attn.q_proj.weight" in load_file(tmp_path / "m" / "model.safetensors")


def test_saving_is_atomic_and_replaces_only_models(tmp_path, folder, tokenizer, monkeypatch):
    before = weights_fingerprint(load_model(folder)[0])
    monkeypatch.setattr(Tokenizer, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model(folder, small_model(), tokenizer, {})
    monkeypatch.undo()
    assert weights_fingerprint(load_model(folder)[0]) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        save_model(tmp_path / "thesis", small_model(), tokenizer, {})
    save_model(folder, small_model(), tokenizer, {"stage": "second"})
    assert load_model(folder)[2] == {"stage": "second"}


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_all_files_of_a_folder_have_the_same_mode(tmp_path, tokenizer, umask):
    """The weights came out readable for their owner only, beside a config that everybody could read."""
    before = os.umask(umask)
    try:
        model = small_model()
        save_model(tmp_path / "model", model, tokenizer, {})
        save_adapter(apply_lora(model, LoRAConfig(rank=2)), tmp_path / "adapter", "../model", {})
    finally:
        os.umask(before)
    modes = {
        path.name: path.stat().st_mode & 0o777 for name in ("model", "adapter") for path in (tmp_path / name).iterdir()
    }
    assert len(modes) == 10 and set(modes.values()) == {0o666 & ~umask}, modes


def test_resolving_paths(tmp_path, folder):
    assert resolve_model_path(tmp_path) == folder == resolve_model_path(folder)
    (tmp_path / "empty").mkdir()
    assert resolve_model_path(tmp_path) == folder
    shutil.copytree(folder, tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds 2 models \(model, other\); give the path of one"):
        resolve_model_path(tmp_path)
    with pytest.raises(ValueError, match="holds no model; expected config.json"):
        resolve_model_path(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="does not exist; give a model folder"):
        load_model(tmp_path / "missing")
    with pytest.raises(ValueError, match="is a .json file"):
        load_model(folder / "config.json")


def broken_weights(folder, case):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif case == "trailing":
        path.write_bytes(path.read_bytes() + b"\0")
    elif case == "header":
        path.write_bytes(path.read_bytes()[:60])
    elif case == "garbage":
        path.write_bytes((5).to_bytes(8, "little") + b"hello")
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "absent":
        path.unlink()
    elif case == "missing":
        save_file({k: v for k, v in tensors.items() if "up_proj" not in k}, path)
    elif case == "extra":
        save_file({**tensors, "model.layers.2.mlp.up_proj.weight": torch.ones(3)}, path)
    elif case == "shape":
        save_file({**tensors, name: tensors[name][:-1].contiguous()}, path)
    elif case == "untied":
        save_file({**tensors, "lm_head.weight": torch.zeros(300, 64)}, path)


WEIGHT_ERRORS = {
    "truncated": "has .* bytes; its header promises",
    "trailing": "its header promises",
    "header": "cut short or not a safetensors file",
    "garbage": "unreadable safetensors header",
    "empty": "cut short",
    "absent": "model.safetensors does not exist",
    "missing": r"lacks 2 tensors, the first model.layers.0.mlp.up_proj.weight",
    "extra": r"1 tensors too many, the first model.layers.2.mlp.up_proj.weight",
    "shape": r"1 tensors of another shape, the first .*up_proj.weight \[191, 64\].*expects \[192, 64\]",
    "untied": "differs from the embedding",
}


@pytest.mark.parametrize("case", WEIGHT_ERRORS)
def test_broken_weights_name_file_and_remedy(folder, case):
    (folder / "manifest.json").unlink()  # the file itself is at fault, not a later change
    broken_weights(folder, case)
    with pytest.raises((ValueError, FileNotFoundError), match=WEIGHT_ERRORS[case]) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and "model.safetensors" in str(caught.value)


def test_a_stored_copy_of_the_tied_matrix_is_accepted(folder):
    path = folder / "model.safetensors"
    (folder / "manifest.json").unlink()
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    assert load_model(folder)[0].config.tie_word_embeddings


def test_broken_configs(folder, monkeypatch):
    good = (folder / "config.json").read_text()
    edit_config(folder, num_hidden_layers=10**9, hidden_size=10**6)
    monkeypatch.setattr(
        "tinylm.checkpoint.model_folder.TinyLMForCausalLM", None
    )  # nothing may be built before the check
    with pytest.raises(ValueError, match="holds .* numbers; its config implies"):
        load_model(folder)
    monkeypatch.undo()
    (folder / "config.json").write_text(good)
    edit_config(folder, hidden_act="relu")
    with pytest.raises(ValueError, match="config.json: hidden_act 'relu'"):
        load_model(folder)
    (folder / "config.json").write_text(good[:40])
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json"):
        load_model(folder)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, folder, tokenizer):
    small = small_model(vocab_size=270)
    with pytest.raises(ValueError, match="tokenizer has 280 entries and the model only 270"):
        save_model(tmp_path / "m", small, tokenizer, {})
    Tokenizer.default().save(tmp_path / "big")
    with pytest.raises(ValueError, match="tokenizer has 6400 entries and the model only 300"):
        load_model(folder, tokenizer_path=tmp_path / "big")


@pytest.mark.parametrize("relative", [False, True])
def test_adapter_folder_loads_base_and_adapter(tmp_path, folder, tokenizer, relative):
    model = apply_lora(load_model(folder)[0], LoRAConfig(rank=2))
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, 0, 0.1)
    with pytest.raises(ValueError, match="has adapters attached"):
        save_model(tmp_path / "m", model, tokenizer, {})
    save_adapter(model, tmp_path / "lora", "../model" if relative else folder, {"stage": "lora"})
    again, _, lineage = load_model(tmp_path / "lora")
    ids = random_ids(1, 20)
    assert torch.equal(again(ids), model.eval()(ids))
    assert adapter_base(tmp_path / "lora") == folder  # and not lora/../model
    assert lineage["stage"] == "lora" and lineage["base_fingerprint"] == weights_fingerprint(model)
    assert load_model(tmp_path / "lora", dtype=torch.bfloat16)[0].dtype == torch.bfloat16

    torch.manual_seed(1)
    save_model(folder, small_model(), tokenizer, {})
    with pytest.raises(ValueError, match=r"lora was trained on .*model \(weights \w+\); \S*model has weights \w+: "):
        load_model(tmp_path / "lora")
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="names the base model .* which does not exist"):
        load_model(tmp_path / "lora")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile's own
def test_fingerprint_sees_one_bit_and_no_wrapper():
    model = small_model()
    before = weights_fingerprint(model)
    assert len(before) == 16 and weights_fingerprint(torch.compile(model)) == before
    assert weights_fingerprint(apply_lora(model, LoRAConfig())) == before
    with torch.no_grad():
        weight = model.model.norm.weight
        weight[3] = torch.nextafter(weight[3], torch.tensor(2.0))
    assert weights_fingerprint(model) != before


# The original's `.pth` files.


def original_state(model) -> dict[str, torch.Tensor]:
    """Written out by hand, as the original's modules are named."""
    state = {
        "model.embed_tokens.weight": model.model.embed_tokens.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    state["model.norm.weight"] = model.model.norm.weight
    for i, layer in enumerate(model.model.layers):
        at, mlp = layer.self_attn, layer.mlp
        modules = {
            "attention.q_proj": at.q_proj, "attention.k_proj": at.k_proj, "attention.v_proj": at.v_proj,
            "attention.out_proj": at.o_proj, "norm1": layer.input_layernorm,
            "norm2": layer.post_attention_layernorm, "ffn.gate_proj": mlp.gate_proj, "ffn.up_proj":
            mlp.up_proj, "ffn.down_proj": mlp.down_proj,
        }  # fmt: skip
        state |= {f"model.layers.{i}.{name}.weight": module.weight for name, module in modules.items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def original_model() -> TinyLMForCausalLM:
    config = TinyLMConfig(hidden_size=64, num_hidden_layers=2, initializer_range=0.1)
    model = TinyLMForCausalLM(config).eval()
    for layer in model.model.layers:  # so that exchanged norms would show
        torch.nn.init.normal_(layer.input_layernorm.weight, 1, 0.3)
    return model


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_original_pth_loads_and_matches(tmp_path, prefix, wrapper):
    model = original_model()
    state = {prefix + name: tensor for name, tensor in original_state(model).items()}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "full_sft_64.pth")
    loaded, tokenizer, lineage = load_model(tmp_path / "full_sft_64.pth")
    ids = random_ids(2, 30, 6400)
    assert torch.equal(loaded(ids), model(ids))
    assert tokenizer.vocab_size == 6400 and lineage["parent"] == "full_sft_64.pth"


@pytest.mark.parametrize("head", ["tied", "absent", "its own"])
def test_the_head_of_an_original_pth(tmp_path, head):
    """It is stored always; the embedding's numbers in it mean that both are one matrix."""
    model, ids = original_model(), random_ids(1, 20, 6400)
    state = original_state(model)
    expected = model(ids)
    if head == "absent":
        del state["lm_head.weight"]
    elif head == "its own":
        state["lm_head.weight"] = state["lm_head.weight"] * 1.5
        expected = expected * 1.5
    torch.save(state, tmp_path / "m.pth")
    loaded, _, _ = load_model(tmp_path / "m.pth")
    torch.testing.assert_close(loaded(ids), expected, rtol=1e-6, atol=1e-6)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (head != "its own")
    assert loaded.config.tie_word_embeddings == (head != "its own")


def test_an_original_pth_has_the_epsilon_of_the_original(tmp_path):
    """1e-5, which no tensor tells; another one shows where activations are small."""
    model = TinyLMForCausalLM(TinyLMConfig(hidden_size=64, num_hidden_layers=2, rms_norm_eps=1e-5)).eval()
    for weight in (model.model.embed_tokens.weight, *(layer.self_attn.o_proj.weight for layer in model.model.layers)):
        torch.nn.init.normal_(weight, 0, 1e-3)
    torch.save(original_state(model), tmp_path / "m.pth")
    loaded, _, _ = load_model(tmp_path / "m.pth")
    ids = random_ids(1, 20, 6400)
    assert loaded.config.rms_norm_eps == 1e-5 and torch.equal(loaded(ids), model(ids))
    other = TinyLMForCausalLM(TinyLMConfig(hidden_size=64, num_hidden_layers=2, rms_norm_eps=1e-6)).eval()
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(other(ids), model(ids), rtol=1e-3)
    with pytest.raises(ValueError, match="rms_norm_eps"):
        export_pth(other, tmp_path / "no.pth")


def test_pth_export_writes_exactly_the_originals_names(tmp_path):
    model = original_model()
    export_pth(model, tmp_path / "out.pth")
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    expected = original_state(model)
    assert state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in state)
    untied = {"hidden_size": 66, "num_attention_heads": 6, "head_dim": 16, "tie_word_embeddings": False}
    for changes, message in (
        ({"num_key_value_heads": 4}, r"num_key_value_heads 4 \(there 2\)$"),
        ({"qk_norm": True}, r"load this model: qk_norm true \(there false\)$"),
        ({"position_embedding_type": "learned"}, "position_embedding_type 'learned'"),
        ({"rope_theta": 1e4}, r"load this model: rope_theta 10000 \(there 1e\+06\)$"),
        ({"rms_norm_eps": 1e-6}, r"load this model: rms_norm_eps 1e-06 \(there 1e-05\)$"),
        ({"intermediate_size": 96}, r"load this model: intermediate_size 96 \(there 192\)$"),
        (untied, r"load this model: head_dim 16 \(there 11\), tie_word_embeddings false \(there true\)$"),
    ):
        with pytest.raises(ValueError, match=message):
            export_pth(small_model(**changes), tmp_path / "no.pth")
    assert not (tmp_path / "no.pth").exists()


class Malicious:
    """Unpickling it creates a folder."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, writer):
    path, trace = tmp_path / "evil.pth", tmp_path / "executed"
    payload = {"model.embed_tokens.weight": torch.ones(2, 2), "x": Malicious(trace)}
    torch.save(payload, path) if writer == "torch" else path.write_bytes(pickle.dumps(Malicious(trace)))
    with pytest.raises(ValueError, match="evil.pth") as caught:
        load_model(path)
    assert not trace.exists() and "\n" not in str(caught.value)
    if writer == "torch":
        assert "could run code" in str(caught.value)


def test_broken_pth_files(tmp_path):
    path = tmp_path / "m.pth"
    state = original_state(original_model())
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="m.pth is damaged or not a PyTorch file"):
        load_model(path)
    gone = "model.layers.1.ffn.up_proj.weight"
    torch.save({name: tensor for name, tensor in state.items() if name != gone}, path)
    with pytest.raises(ValueError, match="lacks 1 tensors, the first model.layers.1.mlp.up_proj.weight"):
        load_model(path)
    torch.save({**state, "lm_head.weight": state["lm_head.weight"].to(torch.int8)}, path)
    with pytest.raises(ValueError, match="lm_head.weight is torch.int8; expected floating-point weights"):
        load_model(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="holds no state_dict"):
        load_model(path)
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="expected the original project's tensors"):
        load_model(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:500].clone()
    torch.save(state, path)
    with pytest.raises(ValueError, match="500 entries; give --tokenizer_path"):
        load_model(path)


def test_one_flipped_bit_in_the_weights_is_found_when_they_are_loaded(folder):
    """It once loaded: a number a little other than it was, or 2**127 times as large, and nothing said so."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"model.safetensors is not what was written .*on purpose, delete manifest.json"
    ):
        load_model(folder)
    (folder / "manifest.json").unlink()
    load_model(folder)
