"""Tests that need a CUDA GPU: `make test-gpu` runs them and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tinylm.system.runtime import Runtime, setup_runtime


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def cuda() -> Runtime:
    """The GPU in bfloat16, as `tinylm` sets it up."""
    if not torch.cuda.is_available():
        pytest.exit("torch sees no CUDA GPU; run `make test-gpu` on a machine with one", returncode=2)
    return setup_runtime("cuda", "bfloat16")
