"""What `lineage.json` says: facts that may leave this machine, the parent, and the whole line of ancestors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tinylm.checkpoint.model_folder import load_model
from tinylm.files.untrusted import read_json
from tinylm.model.lora import unload_lora
from tinylm.model.weights import weights_fingerprint

FACTS = (
    "stage", "step", "epoch", "finished", "validation_loss", "seed", "version", "code", "data_fingerprint",
    "tokenizer_fingerprint", "document_start",
)  # fmt: skip
"""Facts of a lineage that name no paths. Settings and parents are left out: they hold paths of this machine."""
_MOST_ANCESTORS = 32


def facts_of(lineage: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """The recorded `FACTS`: texts, truth values and finite numbers."""
    found = {name: lineage[name] for name in FACTS if isinstance(lineage.get(name), str | int | float)}
    return {name: value for name, value in found.items() if isinstance(value, str) or math.isfinite(value)}


def check_parent(lineage: dict[str, Any]) -> Path | None:
    """The parent's path, after a look at its weights; None for a model trained from random weights.

    Raises:
        FileNotFoundError: it does not exist any more.
        ValueError: it has other weights now.
    """
    parent = lineage.get("parent")
    if not parent:
        return None
    path = Path(parent["path"])
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (any more)")
    model, _, _ = load_model(path)
    found = weights_fingerprint(unload_lora(model))
    if parent.get("weights") not in (None, found):
        raise ValueError(f"{path} has other weights now ({found}); this model was made from {parent['weights']}")
    return path


def ancestry(lineage: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """(a model's lineage, its parent's and so on, and why the line ends before a model that has no parent).

    A parent whose weights are others now, or are not recorded, is left out: a lineage from a stranger may name any
    folder. The reason is empty if the line is complete.
    """
    line = [lineage]
    while len(line) < _MOST_ANCESTORS:
        base, parent = line[-1].get("base"), line[-1].get("parent")
        if isinstance(base, dict) and isinstance(base.get("lineage"), dict):  # a merged model records its base's
            line.append(base["lineage"])
            continue
        if "source" in line[-1] or line[-1].get("stage") == "original":  # another maker's, or a `.pth`
            return line, ""
        if "parent" not in line[-1]:
            return line, "the lineage does not say what the model was trained from"
        if not parent:
            return line, ""
        try:
            if not parent["weights"]:
                raise ValueError("the parent's weights are not recorded")
            path = check_parent(line[-1])
            assert path is not None
            line.append(read_json(path / "lineage.json"))
        except (OSError, ValueError) as error:
            return line, str(error)
        except (TypeError, KeyError, AttributeError):  # a record that tinylm did not write
            return line, "the record of the parent is not in tinylm's form"
    return line, f"it has more than {_MOST_ANCESTORS} ancestors"
