"""Tokenizer training: byte-level BPE learns its merges from text.

tinylm tokenizer --data_path books/ --vocab_size 6400 --output_dir out/tokenizer
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import parse_settings
from tinylm.commandline.terminal import format_seconds, make_console, print_facts, print_next, progress
from tinylm.dataset.sources.records import BadRows, iterate_texts
from tinylm.files.atomic import require_new
from tinylm.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer
from tinylm.trainer.run.train_settings import require_at_least, require_output_dir, require_share
from tinylm.trainer.stage_data import report_rows
from tinylm.trainer.tokenizer_text import TINYWORLD_HELD_OUT, TextReader, tinyworld_texts

SMALLEST_VOCAB = len(SPECIAL_TOKENS) + 256
"""The control tokens and one entry for each byte: a tokenizer without merges."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Settings of tokenizer training."""

    data_path: str | None = None
    """text to learn from: a file, a folder or a glob; without it, TinyWorld"""
    output_dir: str = "out/tokenizer"
    """folder for tokenizer.json and its companions"""
    vocab_size: int = 6400
    """number of entries, control tokens and bytes included"""
    max_bytes: int = 200_000_000
    """stop reading after this many bytes of text; merges hardly change after the first tens of megabytes"""
    max_bad_rows: float = 0.001
    """share of rows that may be broken (listed and skipped) before the data is refused"""
    tinyworld_documents: int = 8_000
    """stories, and as many chats, of TinyWorld to learn from when there is no data_path"""
    overwrite: bool = False
    """replace the tokenizer in output_dir"""

    def __post_init__(self) -> None:
        require_output_dir(self)
        require_at_least(1, self, "max_bytes", "tinyworld_documents")
        require_share(self, "max_bad_rows")
        if not SMALLEST_VOCAB <= self.vocab_size <= 1_000_000:
            raise ValueError(
                f"vocab_size is {self.vocab_size}; expected {SMALLEST_VOCAB} (control tokens and bytes) to 1,000,000; "
                "pass --vocab_size 6400"
            )


def train(settings: TokenizerSettings) -> Path:
    """Train a tokenizer; returns its folder."""
    require_new(Path(settings.output_dir) / "tokenizer.json", settings.overwrite, "output_dir")
    console, bad_rows = make_console(), BadRows(settings.max_bad_rows)
    if settings.data_path is None:
        console.print("no --data_path: learning from TinyWorld, the built-in corpus")
        texts: Iterable[str] = tinyworld_texts(settings.tinyworld_documents)
    else:
        texts = iterate_texts(settings.data_path, bad_rows)
    reader = TextReader(settings.max_bytes, holds_out=settings.data_path is not None)
    started = time.perf_counter()
    with progress(console, "reading text") as show:
        tokenizer = Tokenizer.train(
            reader.to_learn_from(texts),
            settings.vocab_size,
            progress=lambda done, wanted: show(f"{done:,} of {wanted:,} merges", done, wanted),
        )
    report_rows(console, bad_rows)
    if settings.data_path is None:
        reader.held_out = list(tinyworld_texts(TINYWORLD_HELD_OUT, "test"))
    folder = Path(settings.output_dir)
    tokenizer.save(folder)
    facts = {
        **reader.facts(tokenizer),
        "entries": f"{tokenizer.vocab_size:,}",
        "time": format_seconds(time.perf_counter() - started),
        "tokenizer": str(folder),
    }
    print_facts(console, "tokenizer: done", facts)
    if tokenizer.vocab_size < settings.vocab_size:
        console.print(
            f"the text has no more pairs to merge: {tokenizer.vocab_size:,} entries instead of {settings.vocab_size:,}"
        )
    return folder


def main(argv: list[str]) -> int:
    """The command line: flags -> settings -> train -> what comes next."""
    description = "Train a byte-level BPE tokenizer on text."
    folder = quote(str(train(parse_settings(TokenizerSettings, argv, "tinylm tokenizer", description))))
    print_next(make_console(), f"train a model with it: tinylm pretrain --tokenizer_path {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
