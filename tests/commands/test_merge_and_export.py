"""`tinylm merge` and `tinylm export`, from an adapter folder to a plain model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tinylm.checkpoint.adapter_folder import save_adapter
from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.commands.export import main as export
from tinylm.commands.merge import main as merge
from tinylm.generation.engine import Engine
from tinylm.model.lora import LoRAConfig, apply_lora, has_lora, lora_parameters


@pytest.fixture
def stages(tmp_path, model, tokenizer):
    """A base model of two epochs, and an adapter on the last one."""
    for epoch in (9, 10):
        torch.manual_seed(epoch)
        base = type(model)(model.config).eval()
        lineage = {"stage": "full_sft", "document_start": True}
        save_model(tmp_path / "sft" / f"full_sft_32_epoch{epoch}", base, tokenizer, lineage)
    apply_lora(base, LoRAConfig(rank=2, alpha=6))
    for parameter in lora_parameters(base):
        torch.nn.init.normal_(parameter, 0, 0.2)
    save_adapter(base, tmp_path / "lora" / "lora_32_epoch0", tmp_path / "sft" / "full_sft_32_epoch10", lineage)
    return tmp_path, base


def test_merge_writes_base_and_adapter_as_one_model(stages, capsys):
    folder, adapted = stages
    assert merge(["--model_path", str(folder / "lora"), "--output_dir", str(folder / "merged")]) == 0
    assert capsys.readouterr().out == f"merged model: {folder / 'merged'}\n"
    merged, _, lineage = load_model(folder / "merged")
    ids = torch.tensor([[5, 900, 17, 42]])
    torch.testing.assert_close(merged(ids), adapted(ids), rtol=1e-4, atol=1e-4)
    assert (
        not has_lora(merged)
        and lineage["document_start"] is True
        and lineage["parent"]["path"] == str(folder / "lora" / "lora_32_epoch0")
    )
    with pytest.raises(ValueError, match="full_sft_32_epoch10 is a full model; expected an adapter folder"):
        merge(["--model_path", str(folder / "sft"), "--output_dir", str(folder / "merged")])


def test_export_folds_the_adapter_in(stages, monkeypatch, capsys):
    folder, adapted = stages
    exported = []
    monkeypatch.setattr("tinylm.commands.export.export_pth", lambda model, path: exported.append((model, path)))
    assert export(["--model_path", str(folder / "lora"), "--output", str(folder / "x.pth")]) == 0
    [(model, path)] = exported
    ids = torch.tensor([[5, 900, 17, 42]])
    torch.testing.assert_close(model(ids), adapted(ids), rtol=1e-4, atol=1e-4)
    assert path == str(folder / "x.pth") and not has_lora(model)
    assert f"{folder / 'lora' / 'lora_32_epoch0'} written to" in capsys.readouterr().out


def test_loading_for_use(stages):
    """A base with an adapter is the adapter's folder; kept apart on request; of several runs the newest, or none."""
    folder, adapted = stages
    ids = torch.tensor([[5, 900, 17, 42]])
    loaded = load_for_use(folder / "sft", folder / "lora" / "lora_32_epoch0")
    assert loaded.path == folder / "sft" / "full_sft_32_epoch10" and not has_lora(loaded.model)
    torch.testing.assert_close(loaded.model(ids), adapted(ids), rtol=1e-4, atol=1e-4)
    apart = load_for_use(folder / "lora", merge=False)
    assert loaded.document_start == apart.document_start == [loaded.tokenizer.endoftext_id]
    assert replace(loaded, lineage={"stage": "full_sft"}).document_start == [], "made before documents began with it"
    assert has_lora(apart.model) and torch.equal(apart.model(ids), adapted(ids))
    half = Engine(loaded.model, loaded.tokenizer, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.tokenizer.fingerprint == loaded.tokenizer.fingerprint
    (folder / "lora" / "lora_32_epoch0").rename(folder / "sft" / "lora_32_epoch0")
    with pytest.raises(ValueError, match="holds 3 models"):
        load_for_use(folder / "sft")
    assert load_for_use(folder / "sft", newest=True).path.parent == folder / "sft"
