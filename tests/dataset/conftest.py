"""A tokenizer of 300 entries, trained here, and helpers that write data files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinylm.tokenizer.tokenizer import Tokenizer

TEXT = "The little boat sailed over the quiet sea.\n\nThe children saw it, and the children sang.\n"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 3], vocab_size=300)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows (objects, or raw lines) to a .jsonl file and return its path."""

    def write(*rows: Any, name: str = "data.jsonl") -> str:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return str(tmp_path / name)

    return write
