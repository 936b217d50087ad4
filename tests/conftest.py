"""What every test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# before transformers or tokenizers is imported: tests fetch nothing, and fork without a warning
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder with pyproject.toml."""
    return Path(__file__).resolve().parent.parent
