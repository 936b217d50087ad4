"""`tinylm ...` in this process, and the flags of a model that trains in a moment."""

from __future__ import annotations

import contextlib
import io

from tinylm import cli

SHAPE = [
    "--preset", "tiny", "--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "4",
    "--num_key_value_heads", "2",
]  # fmt: skip


def tinylm(*words: object) -> tuple[int, str]:
    """(exit status, what it printed, both streams)."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        status = cli.main([str(word) for word in words])
    return status, heard.getvalue()
