"""Folders of training runs, written by hand: metrics, lineage and training state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tinylm.checkpoint.training_state import StateWriter


def row(step: int, **values: Any) -> str:
    return json.dumps({"step": step, **values}) + "\n"


def write_run(folder: Path, name: str, lines: list[str], lineage: dict[str, Any] | None = None) -> Path:
    """The metrics of a run, and a model that it has left with a lineage."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_metrics.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    if lineage is not None:
        write_lineage(folder / f"{name}_epoch0", lineage)
    return path


def write_lineage(model: Path, lineage: dict[str, Any]) -> None:
    model.mkdir(parents=True, exist_ok=True)
    (model / "lineage.json").write_text(json.dumps(lineage))


def trained_from(path: str | Path, output_dir: str | Path = "", **settings: Any) -> dict[str, Any]:
    """The lineage of a finished run."""
    return {"finished": True, "parent": {"path": str(path)}, "settings": {"output_dir": str(output_dir), **settings}}


def write_state(folder: Path, name: str, step: int, num_steps: int, parent: str | None, **settings: Any) -> None:
    """A training state, without a model."""
    writer = StateWriter(folder / f"{name}_state")
    identity = {"stage": name.rpartition("_")[0], "num_steps": num_steps}
    sources = {"data": "TinyWorld", "parent": parent}
    writer.save({"step": step, "identity": identity, "settings": settings, "sources": sources, "w": torch.zeros(2)})
    assert writer.wait() is None
