"""The page with a model inside, as one file that opens from a disk or a mail, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinylm.files.atomic import atomic_write, require_room
from tinylm.generation.engine import Engine
from tinylm.page.packed_model import PageDtype, packed_model
from tinylm.page.page import page


def export_html(engine: Engine, output: Path, dtype: PageDtype, about: dict[str, Any]) -> int:
    """Write the file completely or not at all; returns its size in bytes.

    Args:
        about: `name`, `parameters` and `isBase`, which the page shows.

    Raises:
        ValueError: see `packed_model`; or the disk has too little room.
    """
    text = page(about["name"], packed_model(engine, dtype, about)).encode("utf-8")
    require_room(output, len(text))
    with atomic_write(output) as file:
        file.write(text)
    return len(text)
