"""The page with models inside, as one file that opens from a disk or a mail, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.snapshots import snapshot_folder, snapshots_in
from tinylm.export.modelfile import is_base_model
from tinylm.files.atomic import atomic_write, require_room
from tinylm.page.card import page_card, prompts_for
from tinylm.page.packed_model import PageDtype, packed, packed_at
from tinylm.page.page import Enclosed, page


def enclosed(
    name: str, path: str | Path, dtype: PageDtype, num_snapshots: int = 0, tokenizer_path: str | None = None
) -> Enclosed:
    """A model for a page, its adapter merged.

    Args:
        name: for people; empty for that of its folder or file.
        num_snapshots: how many of the snapshots of its run go along, if it has left any: the first, the last, and
            some between them.

    Raises:
        FileNotFoundError, ValueError: see `packed_at`.
    """
    loaded = load_for_use(path, tokenizer_path=tokenizer_path)
    snapshots = _spread(list(snapshots_in(snapshot_folder(loaded.path)).items()), num_snapshots)
    why = "it is a base model" if is_base_model(loaded.tokenizer, loaded.lineage) else ""
    if not why and (loaded.tokenizer.their_template is not None or not loaded.tokenizer.has_chat_tokens):
        why = "its chats are not in ChatML"
    config, prompts = loaded.model.config, prompts_for(loaded.path)
    name = name or loaded.path.stem
    return Enclosed(
        page_card(name, loaded.model.num_parameters(), config.max_position_embeddings, why, () if why else prompts),
        packed(loaded, dtype),
        {step: packed_at(loaded.path, None, file, dtype, tokenizer_path) for step, file in snapshots},
    )


def _spread(snapshots: list[tuple[int, Path]], count: int) -> list[tuple[int, Path]]:
    """At most `count` of them, from the first to the last."""
    last = len(snapshots) - 1
    places = sorted({round(last * place / max(1, count - 1)) for place in range(count)}) if snapshots else []
    return [snapshots[place] for place in places]


def export_html(title: str, models: Sequence[Enclosed], output: Path) -> int:
    """Write the file completely or not at all; returns its size in bytes.

    Raises:
        ValueError: the disk has too little room.
    """
    text = page(title, models).encode("utf-8")
    require_room(output, len(text))
    with atomic_write(output) as file:
        file.write(text)
    return len(text)
