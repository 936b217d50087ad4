"""A model is used with the tokenizer it was trained with, and with no other."""

from __future__ import annotations

import json
import re

import pytest
import torch

from tests.command_line import tinylm
from tests.model.small_models import small_model
from tinylm.checkpoint.adapter_folder import save_adapter
from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.model_folder import save_model
from tinylm.export.pth import export_pth
from tinylm.model.lora import LoRAConfig, apply_lora
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def own():
    return Tokenizer.train(["die Katze saß auf der Matte " * 20], vocab_size=280)


@pytest.fixture(scope="module")
def other():
    return Tokenizer.train(["xylophone quartz jigsaw vexing " * 20], vocab_size=280)


@pytest.fixture(params=["recorded", "not recorded"])
def folder(request, tmp_path, own):
    """A model folder, with and without its tokenizer's fingerprint in the lineage."""
    torch.manual_seed(0)
    lineage = {"tokenizer_fingerprint": own.fingerprint} if request.param == "recorded" else {}
    save_model(tmp_path / "größe", small_model(), own, {"stage": "full_sft", **lineage})
    return tmp_path / "größe"


def test_another_tokenizer_of_the_same_size_is_refused(folder, own, other, tmp_path):
    """The answers were garbage, without a warning."""
    own.save(tmp_path / "own")
    other.save(tmp_path / "other")
    assert own.vocab_size == other.vocab_size
    assert load_for_use(folder, tokenizer_path=tmp_path / "own").tokenizer == own
    says = (
        f"the tokenizer of {tmp_path / 'other'} is another one than {folder} was trained with (fingerprint "
        f"{other.fingerprint}, expected '{own.fingerprint}')"
    )
    with pytest.raises(ValueError, match=re.escape(says)):
        load_for_use(folder, tokenizer_path=tmp_path / "other")
    for command in (["chat", "--prompt", "x"], ["eval"], ["export", "--output", tmp_path / "x.pth"],
                    ["sft", "--output_dir", tmp_path / "sft"], ["dpo", "--output_dir", tmp_path / "dpo"]):  # fmt: skip
        status, said = tinylm(*command, "--model_path", folder, "--tokenizer_path", tmp_path / "other")
        assert (status, says in said) == (2, True), said


def test_a_tokenizer_that_was_replaced_in_the_folder_is_refused(tmp_path, own, other):
    save_model(tmp_path / "m", small_model(), own, {"tokenizer_fingerprint": own.fingerprint})
    own.save(tmp_path / "own")
    other.save(tmp_path / "m")
    with pytest.raises(
        ValueError, match=r"the tokenizer of .*m/tokenizer.json is another one than .* restore the model"
    ):
        load_for_use(tmp_path / "m")
    assert load_for_use(tmp_path / "m", tokenizer_path=tmp_path / "own").tokenizer == own


def test_an_adapter_of_another_tokenizer_is_refused(folder, other, tmp_path):
    adapted = apply_lora(load_for_use(folder).model, LoRAConfig(rank=2))
    save_adapter(adapted, tmp_path / "lora", folder, {"tokenizer_fingerprint": other.fingerprint})
    for arguments in ((folder, tmp_path / "lora"), (tmp_path / "lora",)):
        with pytest.raises(ValueError, match=f"is another one than {tmp_path / 'lora'} was trained with"):
            load_for_use(*arguments)


def test_a_reference_of_another_tokenizer_is_refused(folder, other, tmp_path):
    save_model(tmp_path / "reference", small_model(), other, {})
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Wie?", "chosen": "So.", "rejected": "Nie."}) + "\n")
    flags = ["--model_path", folder, "--data_path", pairs, "--device", "cpu"]
    status, said = tinylm("eval", *flags, "--reference_path", tmp_path / "reference")
    assert status == 2 and "reference has another tokenizer than" in said
    status, said = tinylm("eval", *flags, "--reference_path", folder)
    assert status == 0, said


def test_a_pth_file_names_no_tokenizer_and_it_is_said(tmp_path, capsys):
    """The original project's files are read with the default tokenizer, which is a guess."""
    config = TinyLMConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2)
    export_pth(TinyLMForCausalLM(config), tmp_path / "a.pth")
    assert "names no tokenizer: the default one is used" in load_for_use(tmp_path / "a.pth").notice
    Tokenizer.default().save(tmp_path / "t")
    assert load_for_use(tmp_path / "a.pth", tokenizer_path=tmp_path / "t").notice == ""
    status, said = tinylm("chat", "--model_path", tmp_path / "a.pth", "--prompt", "x", "--max_new_tokens", "1")
    assert status == 0 and "names no tokenizer" in said
