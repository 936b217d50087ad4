"""The table of formats in docs/results.md: size, and bits per byte in llama.cpp, of each type of numbers.

python -m tests.export.formats out/quickstart/pretrain 3000
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

from tests.export.llama_cpp import LlamaCpp, bits_per_byte
from tinylm.checkpoint.loading import load_for_use
from tinylm.dataset.tinyworld.pages import make_page
from tinylm.export.gguf import DTYPES, export_gguf


def main(model_path: str, num_tokens: int) -> None:
    """Held-out TinyWorld pages of about `num_tokens` tokens together."""
    loaded = load_for_use(model_path)
    rng, texts, left = random.Random(0), [], num_tokens
    while left > 0:
        texts.append(make_page(rng, "test"))
        left -= len(loaded.tokenizer.encode(texts[-1]))
    whole = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            path = Path(folder) / f"{dtype}.gguf"
            written = export_gguf(loaded.model, loaded.tokenizer, loaded.lineage, path, dtype)
            llama_cpp = LlamaCpp(path, num_positions=loaded.model.config.max_position_embeddings)
            found = bits_per_byte(llama_cpp, loaded.tokenizer, texts, loaded.document_start)
            whole = whole or found
            print(
                f"| {dtype} | {written.num_bytes / 1e6:.1f} MB | {found:.5f} | {found / whole - 1:+.3%} |", flush=True
            )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
