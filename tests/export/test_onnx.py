"""An ONNX file computes in onnxruntime what our model computes: prompts, single tokens with a cache, padded rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.export.conftest import SHAPES
from tests.model.small_models import trained_model
from tinylm.export import onnx as module
from tinylm.export.onnx import export_onnx
from tinylm.model.lora import LoRAConfig, apply_lora
from tinylm.model.model_tinylm import TinyLMForCausalLM

# onnx's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Runtime:
    """A file in onnxruntime, called as transformers.js calls it: what is present becomes the next past."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = {each.name: each.shape for each in self.session.get_inputs()}
        assert list(inputs)[:3] == ["input_ids", "attention_mask", "position_ids"]
        self.empty = {name: (shape[1], shape[3]) for name, shape in inputs.items() if name.startswith("past")}
        self.past: dict[str, np.ndarray] = {}

    def __call__(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, T, V] of new tokens [B, T] after what was given before; a mask [B, S] starts a new text."""
        batch, time = ids.shape
        if attention_mask is not None or not self.past:
            self.mask = torch.ones_like(ids) if attention_mask is None else attention_mask
            self.past = {n: np.zeros((batch, k, 0, d), dtype=np.float32) for n, (k, d) in self.empty.items()}
        else:
            self.mask = torch.cat((self.mask, torch.ones_like(ids)), dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -time:]
        named = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions}
        outputs = self.session.run(None, {**{name: x.numpy() for name, x in named.items()}, **self.past})
        found = dict(zip([each.name for each in self.session.get_outputs()], outputs, strict=True))
        self.past = {name: found[name.replace("past_key_values", "present")] for name in self.past}
        return torch.from_numpy(found["logits"])


def random_ids(batch: int, time: int) -> torch.Tensor:
    return torch.randint(0, 373, (batch, time), generator=torch.Generator().manual_seed(7))


def some_model(**changes: object) -> TinyLMForCausalLM:
    torch.manual_seed(5)
    return trained_model(**{"vocab_size": 373, **changes})


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_onnxruntime_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    """Prompts of two rows, then token by token, then several at once."""
    model, ids = some_model(**SHAPES[name]), random_ids(2, 150)
    size = export_onnx(model, tmp_path / "größe.onnx")
    assert size == (tmp_path / "größe.onnx").stat().st_size < 4 * model.num_parameters() + 2**17
    onnx.checker.check_model(str(tmp_path / "größe.onnx"), full_check=True)
    run, expected = Runtime(tmp_path / "größe.onnx"), model(ids)
    cuts = [0, 120, 121, 122, 123, 130, 150]
    logits = torch.cat([run(ids[:, a:b]) for a, b in zip(cuts, cuts[1:], strict=False)], dim=1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=5e-5)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@torch.no_grad()
def test_padding_before_a_shorter_row_changes_nothing(tmp_path: Path) -> None:
    model, ids = some_model(), random_ids(2, 30)
    export_onnx(model, tmp_path / "a.onnx")
    run = Runtime(tmp_path / "a.onnx")
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :7] = 0
    run(ids[:, :20], mask)
    logits = torch.cat([run(ids[:, n : n + 1]) for n in range(20, 30)], dim=1)
    torch.testing.assert_close(logits[:1], model(ids[:1])[:, 20:], rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(logits[1:], model(ids[1:, 7:])[:, 13:], rtol=1e-4, atol=5e-5)


def test_what_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("learned", "sinusoidal"):
        with pytest.raises(ValueError, match=f"'{kind}' has no equivalent in Llama"):
            export_onnx(some_model(position_embedding_type=kind), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="adapters attached; merge_lora before"):
        export_onnx(apply_lora(some_model(), LoRAConfig(rank=2)), tmp_path / "a.onnx")  # type: ignore[arg-type]
    monkeypatch.setattr(module, "LARGEST", 4 * some_model().num_parameters() - 1)
    with pytest.raises(ValueError, match=r"the model has 0\.0 GB of weights and one ONNX file holds 2\.1 GB at most"):
        export_onnx(some_model(), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []
