"""A training state on disk, written as a run writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinylm.checkpoint.training_state import StateWriter


def save_state(folder: Path, state: dict[str, Any]) -> Path:
    """Save a state and wait until it is written; returns the folder of its step.

    Raises:
        OSError: it could not be written.
    """
    writer = StateWriter(folder)
    writer.save(state)
    if error := writer.wait():
        raise error
    return folder / f"step_{state['step']:08d}"
