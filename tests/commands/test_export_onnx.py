"""`tinylm export --format onnx`, as typed."""

from __future__ import annotations

import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

from tests.model.small_models import trained_model
from tinylm.checkpoint.adapter_folder import save_adapter
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.commands.export import main as export
from tinylm.model.lora import TABLES, LoRAConfig, apply_lora, lora_parameters
from tinylm.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def base(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    torch.manual_seed(0)
    save_model(tmp_path / "größe" / "full_sft_64_epoch0", trained_model(vocab_size=6400), tokenizer, {})
    return tmp_path / "größe" / "full_sft_64_epoch0"


def words(model: Path, output: Path, *more: str) -> list[str]:
    return ["--model_path", str(model), "--format", "onnx", "--output", str(output), *more]


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of a prompt, from the file alone."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1])[None],
    }
    for each in session.get_inputs()[3:]:
        inputs[each.name] = torch.zeros(len(ids), each.shape[1], 0, each.shape[3])
    return torch.from_numpy(session.run(["logits"], {name: x.numpy() for name, x in inputs.items()})[0])


@torch.no_grad()
def test_a_model_and_an_adapter_with_its_model(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, ids = load_model(base)[0], torch.tensor([[5, 900, 17, 4242]])
    assert export(words(base.parent, tmp_path / "out" / "mödel.onnx")) == 0
    said = " ".join(capsys.readouterr().out.split())
    size = (tmp_path / "out" / "mödel.onnx").stat().st_size
    assert f"{base} written to {tmp_path / 'out' / 'mödel.onnx'}: {size / 1e6:.1f} MB in f32 next" in said
    torch.testing.assert_close(logits(tmp_path / "out" / "mödel.onnx", ids), model(ids), rtol=1e-4, atol=2e-4)

    apply_lora(model, LoRAConfig(rank=2, alpha=6, target_modules=("v_proj", *TABLES)))
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, 0, 0.2)
    save_adapter(model, base.with_name("lora_64_epoch0"), base)
    assert export(words(base.with_name("lora_64_epoch0"), tmp_path / "b.onnx")) == 0
    torch.testing.assert_close(logits(tmp_path / "b.onnx", ids), model(ids), rtol=1e-4, atol=2e-4)


def test_what_is_refused_leaves_no_file(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out" / "a.onnx"
    for more, message in (
        (("--dtype", "q8_0"), "--dtype is not for ONNX, which goes out in float32"),
        (("--license", "mit"), "--license is not for ONNX"),
    ):
        with pytest.raises(ValueError, match=message):
            export(words(base, output, *more))
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "tinylm.export.onnx", raising=False)
    with pytest.raises(ValueError, match=r"the package onnx is not installed; .*pip install 'tinylm\[onnx\]'"):
        export(words(base, output))
    assert not output.parent.exists()


def test_what_exists_is_replaced_only_on_request(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"a\.onnx exists already; pass --overwrite to replace it"):
        export(words(base, tmp_path / "a.onnx"))
    assert (tmp_path / "a.onnx").read_bytes() == b"old"
    assert export(words(base, tmp_path / "a.onnx", "--overwrite")) == 0
    assert (tmp_path / "a.onnx").stat().st_size > 1000
