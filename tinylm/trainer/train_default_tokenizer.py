"""Train the tokenizer in `tinylm/tokenizer/default`.

    python -m tinylm.trainer.train_default_tokenizer --data_path DATA

The README.md in that folder lists the texts and gives the reasons for their amounts.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinylm.commandline.settings import parse_settings
from tinylm.commandline.terminal import make_console, print_facts
from tinylm.tokenizer.tokenizer import Tokenizer

HELD_OUT = 10
"""Chinese chapters and Python modules number 0, 10, 20, ... are not trained on, but used for measuring."""


@dataclass(frozen=True)
class TrainDefaultTokenizerSettings:
    data_path: str
    """Folder with books/train-*.parquet, books/valid.parquet and text/ (fairy tales, PEPs, d2l-zh)."""
    output_dir: str = "default_tokenizer"
    """Folder to write the tokenizer to."""
    vocab_size: int = 6400
    """Entries in all."""
    book_bytes: int = 100_000
    """UTF-8 bytes to take from each book, from its middle (the start is titles and prefaces)."""


def parquet_texts(path: Path) -> list[str]:
    """The `text` column of a parquet file."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()


def book_parts(path: Path, num_bytes: int) -> Iterator[str]:
    """The middle `num_bytes` of each book."""
    for text in parquet_texts(path):
        data = text.encode("utf-8")
        start = max(0, (len(data) - num_bytes) // 2)
        yield data[start : start + num_bytes].decode("utf-8", errors="ignore")


def chinese_chapters(data_path: Path, held_out: bool) -> list[str]:
    texts = parquet_texts(data_path / "text" / "chinese-d2l.parquet")
    return [text for number, text in enumerate(texts) if (number % HELD_OUT == 0) == held_out]


def python_modules(held_out: bool) -> list[str]:
    """The top-level modules of the running Python's standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    chosen = [file for number, file in enumerate(files) if (number % HELD_OUT == 0) == held_out]
    return [file.read_text(encoding="utf-8") for file in chosen]


def training_texts(settings: TrainDefaultTokenizerSettings) -> Iterator[str]:
    data_path = Path(settings.data_path)
    for path in sorted((data_path / "books").glob("train-*.parquet")):
        yield from book_parts(path, settings.book_bytes)
    yield (data_path / "text" / "fairytales-train.txt").read_text(encoding="utf-8")
    yield from parquet_texts(data_path / "text" / "python-peps.parquet")
    yield from python_modules(held_out=False)
    yield from chinese_chapters(data_path, held_out=False)


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    num_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return sum(len(text.encode("utf-8")) for text in texts) / num_tokens


def main(argv: list[str]) -> None:
    settings = parse_settings(
        TrainDefaultTokenizerSettings,
        argv,
        "train_default",
        "Train the tokenizer that ships with the package.",
    )
    tokenizer = Tokenizer.train(training_texts(settings), settings.vocab_size)
    tokenizer.save(settings.output_dir)
    data_path = Path(settings.data_path)
    measured = {
        "books/valid": parquet_texts(data_path / "books" / "valid.parquet"),
        "fairytales-valid": [(data_path / "text" / "fairytales-valid.txt").read_text(encoding="utf-8")],
        "Python modules held out": python_modules(held_out=True),
        "Chinese chapters held out": chinese_chapters(data_path, held_out=True),
    }
    facts = {name: f"{bytes_per_token(tokenizer, texts):.3f} bytes per token" for name, texts in measured.items()}
    print_facts(make_console(), f"{tokenizer} written to {settings.output_dir}; on held-out text:", facts)


if __name__ == "__main__":
    main(sys.argv[1:])
