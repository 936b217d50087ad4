"""What the trainer's tests share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_speed_measurement(monkeypatch):
    """A run first measures the machine's matmul speed for 0.3 s; only the progress line needs it."""
    monkeypatch.setattr("tinylm.trainer.run.run.measured_matmul_flops", lambda runtime: 1e11)
