"""What every test shares."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# before transformers or tokenizers is imported: tests fetch nothing, and fork without a warning
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_NUMBERS = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_session() -> Iterator[None]:
    """Tests, and all processes that they start, never write into the user's own cache."""
    with (
        tempfile.TemporaryDirectory(prefix="tinylm-cache-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TINYLM_CACHE_DIR", folder)
        patch.delenv("TINYLM_CACHE_GB", raising=False)
        yield


@pytest.fixture(autouse=True)
def _cache_of_the_test(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """And a test finds no token shards of another one."""
    monkeypatch.setenv("TINYLM_CACHE_DIR", str(tmp_path_factory.getbasetemp() / f"cache-{next(_NUMBERS)}"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder with pyproject.toml."""
    return Path(__file__).resolve().parent.parent
