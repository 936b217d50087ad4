"""Small models and rows for the trainer's tests, and the float64 references they are held to."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tests.processes import run_ranks
from tinylm.dataset.rows import IGNORE_INDEX, Batch, Row, build_row, collate_rows
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM

VOCAB = 32


def small_model(seed: int = 0, **changes) -> TinyLMForCausalLM:
    """Weights large enough that every target has its own probability."""
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rest = {"num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3}
    return TinyLMForCausalLM(TinyLMConfig(**{**shape, **rest, **changes})).eval()


def random_documents(num: int, seed: int = 0, longest: int = 11) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, is_target) of documents of 3 to `longest` tokens; the last one is a target, of the rest some are."""
    random = np.random.default_rng(seed)
    documents = []
    for _ in range(num):
        length = int(random.integers(3, longest + 1))
        is_target = random.random(length) < random.random()
        is_target[0], is_target[-1] = False, True
        documents.append((random.integers(1, VOCAB, length).astype(np.int32), is_target))
    return documents


class Rows:
    """A data set of two short documents a row, with very unequal numbers of targets from row to row."""

    unit = "rows"

    def __init__(self, num_rows: int, seed: int = 0, width: int = 24) -> None:
        documents = random_documents(2 * num_rows, seed)
        self.rows = [build_row(documents[2 * i : 2 * i + 2]) for i in range(num_rows)]
        self.width = width
        self.fingerprint = f"rows {num_rows} {seed}"
        self.num_targets = sum(row.num_targets for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        return self.rows[index]

    def collate(self, rows: Sequence[Row]) -> Batch:
        return collate_rows(rows, self.width, pad_id=0)


def batch_of(documents: Sequence[tuple[np.ndarray, np.ndarray]], width: int = 24, per_row: int = 2) -> Batch:
    """Documents packed `per_row` to a row."""
    rows = [build_row(documents[i : i + per_row]) for i in range(0, len(documents), per_row)]
    return collate_rows(rows, width, pad_id=0)


def pairs_batch(documents: Sequence[tuple[np.ndarray, np.ndarray]], reference: torch.Tensor | None = None) -> Batch:
    """Documents 2i and 2i + 1 as preference pair i."""
    extras = {} if reference is None else {"reference_log_probs": reference}
    return replace(batch_of(documents), count=len(documents) // 2, extras=extras)


@torch.no_grad()
def reference_log_prob(model: TinyLMForCausalLM, ids: np.ndarray, is_target: np.ndarray) -> float:
    """log p of a document's target tokens, token by token in float64: each from the tokens *before* it, alone."""
    exact = TinyLMForCausalLM(model.config).double().eval()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    total = 0.0
    for place in range(1, len(ids)):
        if is_target[place]:
            logits = exact(torch.tensor(ids[None, :place].astype(np.int64)))[0, -1].double()
            total += float(logits[int(ids[place])] - logits.exp().sum().log())
    return total


def num_targets(batch: Batch) -> int:
    return int((batch.targets != IGNORE_INDEX).sum())


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def read_bytes(folder: Path) -> dict[str, bytes]:
    """Every weights file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def run_two_ranks(worker: str, output: Path) -> list[dict]:
    """Run a worker script of this folder as two processes over gloo; returns what each saved to `output`.<rank>."""
    run_ranks(importlib.import_module(worker.removesuffix(".py")).main, [[str(output)]] * 2, output.parent)
    return [torch.load(f"{output}.{rank}", weights_only=True) for rank in (0, 1)]
