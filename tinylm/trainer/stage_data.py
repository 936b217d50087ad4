"""The data of each stage: the user's files, or TinyWorld if none are given; a part is held out for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from tinylm.commandline.terminal import progress
from tinylm.dataset import tinyworld
from tinylm.dataset.documents import PreferencePair
from tinylm.dataset.dpo_dataset import DPODataset
from tinylm.dataset.pretrain_dataset import PretrainDataset, load_pretrain_data
from tinylm.dataset.sft_dataset import Outcomes, SFTDataset
from tinylm.dataset.shards.shared_cache import SharedCache
from tinylm.dataset.sources.records import BadRows, load_conversations, load_preferences
from tinylm.system.runtime import Runtime
from tinylm.tokenizer.chat_template import Message
from tinylm.tokenizer.control_tokens import ControlTokenReader
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer.run.stage import Stage

HELD_OUT_STORIES, HELD_OUT_CHATS, HELD_OUT_PAIRS = 300, 400, 200
"""Items of TinyWorld's test split for the validation of a run on TinyWorld."""

UNREAD_CONTROL_TOKENS = "they are learnt as letters; --read_control_tokens reads them as control tokens"

Items = TypeVar("Items", SFTDataset, DPODataset)


def load_texts(
    stage: Stage, tokenizer: Tokenizer, tinyworld_documents: int, cache: SharedCache | None = None
) -> tuple[PretrainDataset, PretrainDataset | None]:
    """(training, validation) rows of running text; token shards are kept in `cache`, or else in output_dir."""
    settings, console = stage.settings, stage.console
    if settings.data_path is None:
        _tinyworld_note(console, tinyworld_documents, "stories")
        stories = [(tinyworld_documents, "train"), (HELD_OUT_STORIES, "test")]
        train, held = (
            PretrainDataset.from_texts(tinyworld.pretrain_documents(count, split), tokenizer, settings.max_seq_len)
            for count, split in stories
        )
        return train, held
    bad_rows = BadRows(settings.max_bad_rows)
    with progress(console, "tokenising") as show:
        data = load_pretrain_data(
            settings.data_path,
            ControlTokenReader(tokenizer) if settings.read_control_tokens else tokenizer,
            settings.max_seq_len,
            own_folder=Path(settings.output_dir) / "token_shards",
            validation_path=settings.validation_path,
            validation_fraction=settings.validation_fraction,
            seed=settings.seed,
            bad_rows=bad_rows,
            progress=lambda documents, tokens: show(f"{documents:,} documents, {tokens:,} tokens"),
            notice=lambda line: console.print(line),
            cache=cache,
            resume=settings.resume,
        )
    _check_same_everywhere(stage.runtime, [part.fingerprint for part in data if part is not None])
    note = "they are read as these tokens" if settings.read_control_tokens else UNREAD_CONTROL_TOKENS
    report_rows(console, bad_rows, note)
    if data[1] is None and settings.validation_fraction:
        console.print("no validation: the text is too short to hold out a part")
    return data


def _check_same_everywhere(runtime: Runtime, fingerprints: list[str]) -> None:
    """Compare the data of all processes: otherwise they would silently train on some rows twice and on others never.

    Raises:
        ValueError: the processes do not all have the same data.
    """
    ours = torch.tensor([int(text[:8], 16) for text in fingerprints], dtype=torch.int64, device=runtime.device)
    if not torch.equal(runtime.all_reduce_sum(ours.clone()), ours * runtime.world_size):
        raise ValueError(
            f"process {runtime.rank} reads different data from the other processes; expected the same files on every "
            "machine; copy them, or give an address that all of them read"
        )


def load_chats(
    stage: Stage,
    tokenizer: Tokenizer,
    tinyworld_chats: int,
    replacements: Mapping[str, str] | None = None,
    embedded: Callable[[int, str], Iterable[tinyworld.Item]] = tinyworld.conversations,
) -> tuple[SFTDataset, SFTDataset | None]:
    """(training, validation) rows of chats.

    Args:
        replacements: texts for {{name}} and the like in the user's data.
        embedded: (count, split) -> TinyWorld's chats, or its persona chats.
    """
    settings, console = stage.settings, stage.console

    def make(chats: Iterable[list[Message]]) -> SFTDataset:
        with progress(console, "tokenising") as show:
            return SFTDataset.from_conversations(
                chats, tokenizer, settings.max_seq_len, progress=lambda done: show(f"{done:,} chats")
            )

    if settings.data_path is not None:
        return _split_files(stage, tokenizer, lambda path, bad: load_conversations(path, bad, replacements), make)
    _tinyworld_note(console, tinyworld_chats, "chats")
    counts = (tinyworld_chats, "train"), (HELD_OUT_CHATS, "test")
    train, held = (make(item.messages for item in embedded(*count)) for count in counts)
    _report_outcomes(console, train.outcomes, settings.max_seq_len, "chats")
    return train, held


def load_pairs(stage: Stage, tokenizer: Tokenizer, tinyworld_pairs: int) -> tuple[DPODataset, DPODataset | None]:
    """(training, validation) preference pairs."""
    settings, console = stage.settings, stage.console

    def make(pairs: Iterable[PreferencePair]) -> DPODataset:
        return DPODataset.from_preferences(pairs, tokenizer, settings.max_seq_len)

    if settings.data_path is not None:
        return _split_files(stage, tokenizer, load_preferences, make)
    _tinyworld_note(console, tinyworld_pairs, "preference pairs")
    counts = (tinyworld_pairs, "train"), (HELD_OUT_PAIRS, "test")
    train, held = (make(map(_as_messages, tinyworld.preference_pairs(*count))) for count in counts)
    _report_outcomes(console, train.outcomes, settings.max_seq_len, "pairs")
    return train, held


def _split_files(
    stage: Stage,
    tokenizer: Tokenizer,
    load: Callable[[str, BadRows], list[Any]],
    make: Callable[[list[Any]], Items],
) -> tuple[Items, Items | None]:
    """(training, validation) chats or pairs from the stage's files. What cannot be learnt is dropped before the split.

    Args:
        load: reads the items of a path.
        make: tokenises items; ValueError if none can be learnt.
    """
    settings, console = stage.settings, stage.console
    assert settings.data_path is not None
    bad_rows = BadRows(settings.max_bad_rows, own_tokens=tokenizer.own_tokens)
    items = load(settings.data_path, bad_rows)
    held_items = load(settings.validation_path, bad_rows) if settings.validation_path else []
    report_rows(console, bad_rows)
    whole = make(items)
    _report_outcomes(console, whole.outcomes, settings.max_seq_len, whole.items)
    if held_items:
        try:
            return whole, make(held_items)
        except ValueError as error:
            raise ValueError(f"{settings.validation_path}: {error}") from None
    train, held = whole.split(settings.validation_fraction, settings.seed)
    if held is None and settings.validation_fraction:
        console.print(f"no validation: only one of the {whole.items} can be learnt, so none is held out")
    return train, held


def _as_messages(pair: tinyworld.Preference) -> PreferencePair:
    """A TinyWorld pair in the form that the loaders return."""
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected))
    return list(pair.prompt), chosen, rejected


def _tinyworld_note(console: Console, count: int, what: str) -> None:
    console.print(f"no --data_path: training on TinyWorld, the built-in corpus ({count:,} {what})")


def report_rows(console: Console, bad_rows: BadRows, control_tokens: str = "they are learnt as letters") -> None:
    """Print which rows were skipped, and what the others hold that is not used; see `BadRows.remarks`."""
    if bad_rows.num_bad:
        console.print(f"skipped: {bad_rows.report()}")
    for line in bad_rows.remarks(control_tokens):
        console.print(line)


def _report_outcomes(console: Console, outcomes: Outcomes, max_seq_len: int, what: str) -> None:
    found = [
        (outcomes.num_cut, f"were longer than {max_seq_len} tokens and cut"),
        (outcomes.num_dropped, "had no answer that fits and were left out"),
        (outcomes.num_equal, "had two equal answers and were left out"),
    ]
    if parts := [f"{count:,} {happened}" for count, happened in found if count]:
        console.print(f"{outcomes.num_seen:,} {what}: {', '.join(parts)}")
