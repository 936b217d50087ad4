"""Tokenizer training: byte-level BPE learns its merges from text. Or, without training, how well a tokenizer fits text.

tinylm tokenizer --data_path books/ --vocab_size 6400 --output_dir out/tokenizer
tinylm tokenizer --data_path books/ --tokenizer_path out/tokenizer
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from shlex import quote

from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import parse_settings
from tinylm.commandline.terminal import format_seconds, make_console, print_next, progress
from tinylm.dataset.sources.records import BadRows
from tinylm.files.atomic import require_new
from tinylm.tokenizer.own_tokens import read_own_tokens
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer.stage_data import report_rows
from tinylm.trainer.tokenizer_report import embedding_facts, facts_of, measure, print_report, report, texts_of, total
from tinylm.trainer.tokenizer_run_settings import TokenizerSettings
from tinylm.trainer.tokenizer_text import TINYWORLD_HELD_OUT, TextReader


def train(settings: TokenizerSettings) -> Path:
    """Train a tokenizer; returns its folder."""
    require_new(Path(settings.output_dir) / "tokenizer.json", settings.overwrite, "output_dir")
    own_tokens = read_own_tokens(settings.special_tokens) if settings.special_tokens is not None else ()
    console, bad_rows = make_console(), BadRows(settings.max_bad_rows, own_tokens=own_tokens)
    if settings.data_path is None:
        console.print("no --data_path: learning from TinyWorld, the built-in corpus")
    reader = TextReader(settings.max_bytes, holds_out=settings.data_path is not None)
    started = time.perf_counter()
    with progress(console, "reading text") as show:
        tokenizer = Tokenizer.train(
            reader.to_learn_from(texts_of(settings, bad_rows, settings.tinyworld_documents, "train")),
            settings.vocab_size,
            lambda done, wanted: show(f"{done:,} of {wanted:,} merges", done, wanted),
            settings.digits,
            own_tokens,
        )
    report_rows(console, bad_rows)
    folder = Path(settings.output_dir)
    tokenizer.save(folder)
    is_tinyworld = settings.data_path is None
    unseen = texts_of(settings, bad_rows, TINYWORLD_HELD_OUT, "test") if is_tinyworld else reader.to_measure()
    parts = measure(unseen, tokenizer)
    for part in parts:
        part.is_held_out = is_tinyworld or bool(reader.parts[part.name].held_out)
    whole = total(parts)
    table, is_mostly_embedding = embedding_facts(tokenizer.vocab_size)
    facts = {
        "read": reader.words(),
        **facts_of(whole, "held-out text" if whole.is_held_out else "the text it learned from"),
        "entries": f"{tokenizer.vocab_size:,}",
        "weights in the embedding": table,
        "time": format_seconds(time.perf_counter() - started),
        "tokenizer": str(folder),
    }
    print_report(console, settings, tokenizer, parts, "tokenizer: done", facts)
    if tokenizer.vocab_size < settings.vocab_size:
        console.print(
            f"the text has no more pairs to merge: {tokenizer.vocab_size:,} entries instead of {settings.vocab_size:,}"
        )
    if is_mostly_embedding:
        console.print(
            "most weights of a small model are in its embedding: a smaller --vocab_size leaves more to the layers"
        )
    return folder


def main(argv: list[str]) -> int:
    """The command line: flags -> settings -> train or measure -> what comes next."""
    description = "Train a byte-level BPE tokenizer on text, or measure one that exists."
    settings = parse_settings(TokenizerSettings, argv, "tinylm tokenizer", description)
    if settings.tokenizer_path is not None:
        report(settings)
        return 0
    folder = quote(str(train(settings)))
    print_next(make_console(), f"train a model with it: tinylm pretrain --tokenizer_path {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
