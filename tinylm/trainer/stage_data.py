"""The data of each stage: the user's files, or TinyWorld if none are given; a part is held out for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

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
from tinylm.dataset.splits import hold_out_items
from tinylm.system.runtime import Runtime
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer.run.stage import Stage

HELD_OUT_STORIES, HELD_OUT_CHATS, HELD_OUT_PAIRS = 300, 400, 200
"""Items of TinyWorld's test split for the validation of a run on TinyWorld."""


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
            tokenizer,
            settings.max_seq_len,
            own_folder=Path(settings.output_dir) / "token_shards",
            validation_path=settings.validation_path,
            validation_fraction=settings.validation_fraction,
            seed=settings.seed,
            bad_rows=bad_rows,
            progress=lambda documents, tokens: show(f"{documents:,} documents, {tokens:,} tokens"),
            notice=lambda line: console.print(line, markup=False),
            cache=cache,
            resume=settings.resume,
        )
    _check_same_everywhere(stage.runtime, [part.fingerprint for part in data if part is not None])
    _report_bad_rows(console, bad_rows)
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
    if settings.data_path is None:
        _tinyworld_note(console, tinyworld_chats, "chats")
        train = [item.messages for item in embedded(tinyworld_chats, "train")]
        held = [item.messages for item in embedded(HELD_OUT_CHATS, "test")]
    else:
        train, held = _split_files(stage, lambda p, bad: load_conversations(p, bad, replacements))
    data = []
    for chats in filter(None, (train, held)):
        with progress(console, "tokenising") as show:
            rows = SFTDataset.from_conversations(
                chats, tokenizer, settings.max_seq_len, progress=lambda done: show(f"{done:,} chats")
            )
        data.append(rows)
    _report_outcomes(console, data[0].outcomes, settings.max_seq_len, "chats")
    return data[0], data[1] if len(data) > 1 else None


def load_pairs(stage: Stage, tokenizer: Tokenizer, tinyworld_pairs: int) -> tuple[DPODataset, DPODataset | None]:
    """(training, validation) preference pairs."""
    settings, console = stage.settings, stage.console
    if settings.data_path is None:
        _tinyworld_note(console, tinyworld_pairs, "preference pairs")
        train: list[Any] = [_as_messages(pair) for pair in tinyworld.preference_pairs(tinyworld_pairs, "train")]
        held: list[Any] = [_as_messages(pair) for pair in tinyworld.preference_pairs(HELD_OUT_PAIRS, "test")]
    else:
        train, held = _split_files(stage, load_preferences)
    data = [DPODataset.from_preferences(part, tokenizer, settings.max_seq_len) for part in (train, held) if part]
    _report_outcomes(console, data[0].outcomes, settings.max_seq_len, "pairs")
    return data[0], data[1] if len(data) > 1 else None


def _split_files(stage: Stage, load: Callable[[str, BadRows], list[Any]]) -> tuple[list[Any], list[Any]]:
    """(training, held out) items from the stage's files."""
    settings = stage.settings
    assert settings.data_path is not None
    bad_rows = BadRows(settings.max_bad_rows)
    train = load(settings.data_path, bad_rows)
    if settings.validation_path:
        held = load(settings.validation_path, bad_rows)
    else:
        train, held = hold_out_items(train, settings.validation_fraction, settings.seed)
    _report_bad_rows(stage.console, bad_rows)
    return train, held


def _as_messages(pair: tinyworld.Preference) -> PreferencePair:
    """A TinyWorld pair in the form that the loaders return."""
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (pair.chosen, pair.rejected))
    return list(pair.prompt), chosen, rejected


def _tinyworld_note(console: Console, count: int, what: str) -> None:
    console.print(f"no --data_path: training on TinyWorld, the built-in corpus ({count:,} {what})")


def _report_bad_rows(console: Console, bad_rows: BadRows) -> None:
    if bad_rows.num_bad:
        console.print(f"skipped: {bad_rows.report()}", markup=False)


def _report_outcomes(console: Console, outcomes: Outcomes, max_seq_len: int, what: str) -> None:
    if outcomes.num_cut or outcomes.num_dropped:
        console.print(
            f"{outcomes.num_seen:,} {what}: {outcomes.num_cut:,} were longer than {max_seq_len} tokens and cut, "
            f"{outcomes.num_dropped:,} had no answer that fits and were left out"
        )
