"""`tinylm merge` and `tinylm export`, from an adapter folder to a plain model."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tinylm.checkpoint.adapter_folder import save_adapter
from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.commands.export import main as export
from tinylm.commands.merge import main as merge
from tinylm.commands.verify import main as verify
from tinylm.generation.engine import Engine
from tinylm.model.lora import LoRAConfig, apply_lora, has_lora, lora_parameters, unload_lora


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
    assert capsys.readouterr().out.splitlines() == [
        f"merged model: {folder / 'merged'}", f"next  talk to it: tinylm chat --model_path {folder / 'merged'}"
    ]  # fmt: skip
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


def test_a_merged_model_names_what_adapter_and_base_were_made_of(stages, capsys):
    """verify said: data TinyWorld (fingerprint None), seed None."""
    folder, adapted = stages
    settings = {"data_path": "größe.jsonl", "lora_rank": 2}
    facts = {"stage": "lora", "step": 7, "epoch": 0, "finished": True, "data_fingerprint": "abc", "seed": 3}
    place, base = folder / "lora" / "lora_32_epoch0", folder / "sft" / "full_sft_32_epoch10"
    save_adapter(adapted, place, base, {**facts, "settings": settings, "parent": {"path": str(base)}})
    assert merge(["--model_path", str(place), "--output_dir", str(folder / "merged")]) == 0
    capsys.readouterr()
    assert verify([str(folder / "merged")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"ok parent {place}, unchanged" in said and "stage merged trained 7 steps, epoch 0, finished" in said
    assert "data größe.jsonl (fingerprint abc), seed 3 settings --data_path 'größe.jsonl' --lora_rank 2" in said
    assert f"base {base} stage full_sft" in said and "None" not in said
    unload_lora(adapted)
    with torch.no_grad():
        next(adapted.parameters()).add_(1.0)
    save_model(base, adapted, load_model(base)[1], {"stage": "full_sft"})  # the adapter has lost its base
    assert verify([str(folder / "merged")]) == 1
    assert "failed       parent" in capsys.readouterr().out


def test_what_is_finished_is_replaced_only_on_request(stages, monkeypatch):
    folder, _ = stages
    words = ["--model_path", str(folder / "lora"), "--output_dir", str(folder / "merged")]
    (folder / "merged").mkdir()  # an empty folder is not a model
    merge(words)
    with pytest.raises(ValueError, match="merged/config.json exists already; pass --overwrite to replace it, or"):
        merge(words)
    assert merge([*words, "--overwrite"]) == 0
    monkeypatch.setattr("tinylm.commands.export.unlike_the_original", lambda config: [])
    monkeypatch.setattr("tinylm.commands.export.export_pth", lambda model, path: path.write_bytes(b"x"))
    words = ["--model_path", str(folder / "lora"), "--output", str(folder / "größe.pth")]
    export(words)
    with pytest.raises(ValueError, match=r"größe.pth exists already; pass --overwrite to replace .* --output$"):
        export(words)
    assert export([*words, "--overwrite"]) == 0


def test_a_model_that_cannot_be_a_pth_is_told_what_opens_it(tmp_path, model, tokenizer):
    """The refusal names a line to type: transformers opens the folder itself."""
    config = replace(model.config, qk_norm=True, rope_theta=1e4)
    base = type(model)(config)
    save_model(tmp_path / "a größe", base, tokenizer, {})
    with pytest.raises(ValueError) as error:
        export(["--model_path", str(tmp_path / "a größe"), "--output", str(tmp_path / "x.pth")])
    assert "rope_theta 10000 (there 1e+06), qk_norm true (there false); transformers opens the folder" in str(
        error.value
    )
    command = shlex.split(str(error.value).rpartition("unconverted: ")[2].partition("; for a .pth")[0])
    assert command[:2] == ["python", "-c"]
    done = subprocess.run(
        [sys.executable, *command[1:]], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0 and "generated_text" in done.stdout, done.stderr
    save_adapter(apply_lora(base, LoRAConfig(rank=2)), tmp_path / "ad", tmp_path / "a größe")
    with pytest.raises(ValueError, match="run tinylm merge --model_path .*/ad, whose result transformers opens"):
        export(["--model_path", str(tmp_path / "ad"), "--output", str(tmp_path / "x.pth")])


def test_export_folds_the_adapter_in(stages, monkeypatch, capsys):
    folder, adapted = stages
    exported = []
    monkeypatch.setattr("tinylm.commands.export.unlike_the_original", lambda config: [])
    monkeypatch.setattr("tinylm.commands.export.export_pth", lambda model, path: exported.append((model, path)))
    assert export(["--model_path", str(folder / "lora"), "--output", str(folder / "x.pth")]) == 0
    [(model, path)] = exported
    ids = torch.tensor([[5, 900, 17, 42]])
    torch.testing.assert_close(model(ids), adapted(ids), rtol=1e-4, atol=1e-4)
    assert path == folder / "x.pth" and not has_lora(model)
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
