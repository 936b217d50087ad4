"""How well a tokenizer fits texts: bytes and characters for each token, in all and for each part of the data.

A byte is the same amount of text for every tokenizer, so bytes per token compare tokenizers on one text. They do not
compare languages: a letter is one byte in English, two in Russian, three in Hindi.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tinylm.commandline.terminal import format_count, make_console, print_facts, progress
from tinylm.dataset.sources.finding import find_files
from tinylm.dataset.sources.records import BadRows, iterate_named_texts
from tinylm.files.atomic import write_json
from tinylm.model.config import PRESETS, TinyLMConfig
from tinylm.tokenizer.split_patterns import cut_text
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer.stage_data import report_rows
from tinylm.trainer.tokenizer_run_settings import TokenizerSettings
from tinylm.trainer.tokenizer_text import (
    OTHERS,
    SECTION_CHARACTERS,
    TINYWORLD_HELD_OUT,
    NamedText,
    TextReader,
    num_bytes_of,
    tinyworld_texts,
)

BATCH_CHARACTERS = 1 << 20
"""Text that is encoded at a time."""

MOST_ROWS = 20
"""Parts in the table; the others share its last row."""

MOST_NAME = 26
"""Characters of a part's name in the table, its last ones; the report in JSON has all."""

MOSTLY_EMBEDDING = 0.5
"""The share of a model's weights in the embedding from which a smaller vocabulary is advised. With 6,400 entries it is
13% of `small`."""


@dataclass
class Measured:
    """A part of the data, or several, and their tokens."""

    name: str
    num_bytes: int = 0
    num_characters: int = 0
    num_tokens: int = 0
    num_default_tokens: int = 0
    """Tokens of the default tokenizer."""
    is_held_out: bool = True
    """Whether the tokenizer has not learnt from this text; true if that is not known."""

    def add(self, other: Measured) -> None:
        self.num_bytes += other.num_bytes
        self.num_characters += other.num_characters
        self.num_tokens += other.num_tokens
        self.num_default_tokens += other.num_default_tokens
        self.is_held_out &= other.is_held_out

    @property
    def rates(self) -> dict[str, float]:
        """Of an unknown character that has no tokens, there is nothing to say: 0."""
        tokens, default_tokens = max(self.num_tokens, 1), max(self.num_default_tokens, 1)
        return {
            "bytes_per_token": self.num_bytes / tokens,
            "characters_per_token": self.num_characters / tokens,
            "default_bytes_per_token": self.num_bytes / default_tokens,
        }

    def to_json(self, is_trained: bool) -> dict[str, Any]:
        """Args: is_trained: whether the tokenizer was trained just now; else it is not known what it has learnt."""
        return {
            "name": self.name,
            "bytes": self.num_bytes,
            "characters": self.num_characters,
            "tokens": self.num_tokens,
            "default_tokens": self.num_default_tokens,
            **{name: round(rate, 4) for name, rate in self.rates.items()},
            **({"is_held_out": self.is_held_out} if is_trained else {}),
        }


def measure(texts: Iterable[NamedText], tokenizer: Tokenizer) -> list[Measured]:
    """Count the tokens of the texts of each part; the part with the most bytes comes first."""
    default = Tokenizer.default()
    parts: dict[str, Measured] = {}
    for batch in _batches(texts):
        found = [count_tokens(each, [text for _, text in batch]) for each in (tokenizer, default)]
        for (name, text), num_tokens, num_default in zip(batch, *found, strict=True):
            part = parts.setdefault(name, Measured(name))
            part.add(Measured(name, num_bytes_of(text), len(text), num_tokens, num_default))
    return sorted(parts.values(), key=lambda part: -part.num_bytes)


def _batches(texts: Iterable[NamedText]) -> Iterator[list[NamedText]]:
    batch: list[NamedText] = []
    size = 0
    for name, text in texts:
        batch.append((name, text))
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def count_tokens(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """The number of tokens of each text. Long texts are cut where that changes no token, to use all cores."""
    cut = [list(cut_text(text, SECTION_CHARACTERS, tokenizer.safe_cuts)) for text in texts]
    lengths = iter(map(len, tokenizer.encode_batch([section for sections in cut for section in sections])))
    return [sum(next(lengths) for _ in sections) for sections in cut]


def total(parts: list[Measured]) -> Measured:
    """All parts as one: those that are held out, if any are."""
    whole = Measured("all", is_held_out=any(part.is_held_out for part in parts))
    for part in parts:
        if part.is_held_out == whole.is_held_out:
            whole.add(part)
    return whole


def facts_of(whole: Measured, text: str) -> dict[str, str]:
    """What is said about all parts together.

    Args:
        text: which text it is, such as "held-out text".
    """
    rates = whole.rates
    return {
        "bytes per token": f"{rates['bytes_per_token']:.2f}, on {format_count(whole.num_bytes)} bytes of {text}",
        "characters per token": f"{rates['characters_per_token']:.2f}",
        "default tokenizer": f"{rates['default_bytes_per_token']:.2f} bytes per token of this text",
    }


def table_of(parts: list[Measured]) -> Table:
    """A row for each of the largest parts."""
    table = Table("part")
    for title in ("bytes", "tokens", "bytes/\ntoken", "chars/\ntoken", "default's\nbytes/token"):
        table.add_column(title, justify="right")
    shown, rest = parts[:MOST_ROWS], Measured(f"{len(parts) - MOST_ROWS} more")
    for part in parts[MOST_ROWS:]:
        rest.add(part)
    for part in [*shown, rest] if rest.num_bytes else shown:
        name = part.name if len(part.name) <= MOST_NAME else f"...{part.name[3 - MOST_NAME :]}"
        rates = (f"{rate:.2f}" for rate in part.rates.values())
        table.add_row(
            name + ("" if part.is_held_out else "*"),
            format_count(part.num_bytes),
            format_count(part.num_tokens),
            *rates,
        )
    return table


def embedding_facts(vocab_size: int) -> tuple[str, bool]:
    """The weights of the embedding in each preset, in words; and whether they are most of the weights of `small`."""
    words, shares = [], {}
    for preset in PRESETS:
        config = TinyLMConfig.preset(preset, vocab_size=vocab_size)
        table, all_weights = vocab_size * config.hidden_size, config.num_parameters()
        shares[preset] = table / all_weights
        words.append(f"{preset} {format_count(table)} of {format_count(all_weights)} ({shares[preset]:.0%})")
    return ", ".join(words), shares["small"] > MOSTLY_EMBEDDING


def texts_of(settings: TokenizerSettings, bad_rows: BadRows, num_documents: int, split: str) -> Iterable[NamedText]:
    """The user's texts, or so many of TinyWorld's stories and chats."""
    if settings.data_path is not None:
        return iterate_named_texts(settings.data_path, bad_rows, settings.report_by)
    return (("TinyWorld", text) for text in tinyworld_texts(num_documents, split))


def report(settings: TokenizerSettings) -> None:
    """Measure the tokenizer of `tokenizer_path`."""
    assert settings.tokenizer_path is not None
    tokenizer = Tokenizer.load(settings.tokenizer_path)
    console, bad_rows = make_console(), BadRows(settings.max_bad_rows, own_tokens=tokenizer.own_tokens)
    if settings.data_path is None:
        console.print("no --data_path: measuring on held-out text of TinyWorld, the built-in corpus")
    reader = TextReader(settings.max_bytes, holds_out=False)
    with progress(console, "measuring") as show:

        def counted() -> Iterator[NamedText]:
            for text in reader.read(texts_of(settings, bad_rows, TINYWORLD_HELD_OUT, "test")):
                show(f"{reader.num_bytes:,} bytes")
                yield text

        parts = measure(counted(), tokenizer)
    report_rows(console, bad_rows, control_tokens="they are counted as letters")
    facts = {
        "read": reader.words(),
        **facts_of(total(parts), "text"),
        "entries": f"{tokenizer.vocab_size:,}",
        "tokenizer": settings.tokenizer_path,
    }
    print_report(console, settings, tokenizer, parts, "tokenizer: measured", facts)


def print_report(
    console: Console,
    settings: TokenizerSettings,
    tokenizer: Tokenizer,
    parts: list[Measured],
    title: str,
    facts: dict[str, str],
) -> None:
    """Print the facts, and the table if there are several parts; write the file if there is one."""
    if settings.output is not None:  # before anything is printed: a closed pipe must not lose it
        is_trained = settings.tokenizer_path is None
        whole = {
            "tokenizer": settings.tokenizer_path or settings.output_dir,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "data_path": settings.data_path,
            "all": total(parts).to_json(is_trained),
            "parts": [part.to_json(is_trained) for part in parts],
        }
        write_json(settings.output, whole)
    print_facts(console, title, facts)
    if len(parts) > 1:
        console.print(table_of(parts))
        if not all(part.is_held_out for part in parts):
            console.print("* measured on text that the tokenizer learned from, since it is short")
    if settings.data_path is not None and settings.report_by != "language":
        names = {*find_files(settings.data_path), OTHERS}
        if all(part.name in names for part in parts):
            console.print(f"no record has a text in the field {settings.report_by}: the parts are the files")
    if settings.output is not None:
        console.print(f"report written to {settings.output}")
