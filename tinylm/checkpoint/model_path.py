"""Which model a path means: a model itself, or one of the models in a folder.

A stage's output folder holds a model for each epoch of each run (`pretrain_512_epoch0`, `pretrain_512_epoch1`, ...).
The model of a run is that of its last epoch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tinylm.checkpoint.weight_shards import WEIGHTS

CONFIG, ADAPTER = "config.json", "adapter_config.json"
_EPOCH = re.compile(r"_epoch(\d+)(?=\.pth$|$)")


def resolve_model_path(path: str | Path, stage: str = "", newest: bool = False) -> Path:
    """A model folder, an adapter folder or a `.pth` file: the path itself, or the one inside it.

    Args:
        stage: consider only models inside whose name starts with this; empty means all.
        newest: if there are several runs inside, take the last changed one instead of raising an error.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the folder holds no such model, or the models of several runs.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a model folder, an adapter folder or a .pth file")
    if path.is_file():
        if path.suffix not in (".pth", ".pt"):
            raise ValueError(f"{path} is a {path.suffix or 'nameless'} file; give its folder, or a .pth file")
        return path
    if not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder; give a model folder or a .pth file")
    if (path / WEIGHTS).is_file() and not (path / CONFIG).is_file():
        raise ValueError(f"{path} has {WEIGHTS} but no {CONFIG}; copy the config that belongs to these weights")
    if _is_model(path):
        return path
    inside, models = models_in(path), last_models(path, stage)
    if len(models) == 1 or (models and newest):
        return newest_model(models)
    names = ", ".join(model.name for model in inside[:8])
    if models:
        raise ValueError(f"{path} holds {len(inside)} models ({names}); give the path of one of them")
    if inside:
        raise ValueError(f"{path} holds {names}; expected a model named {stage}_...; give the path of a model")
    expected = f"expected {CONFIG}, {ADAPTER} or a .pth file in it"
    raise ValueError(f"{path} holds no model; {expected}; give the path of a model")


def last_models(folder: Path, stage: str = "", depth: int = 0) -> list[Path]:
    """The last epoch's model of each run in `folder`, sorted by name.

    Args:
        stage: only models whose name starts with this.
        depth: levels of subfolders to search too.
    """
    runs: dict[str, Path] = {}
    for model in sorted(models_in(folder), key=_epoch_of):
        if model.name.startswith(stage):
            runs[_EPOCH.sub("", model.name)] = model
    models = sorted(runs.values())
    if depth and folder.is_dir():
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not _is_model(child):
                models += last_models(child, stage, depth - 1)
    return models


def newest_model(models: Iterable[Path]) -> Path:
    """The model that was changed last."""
    return max(models, key=lambda model: model.stat().st_mtime)


def models_in(folder: Path) -> list[Path]:
    """Every model directly in `folder`, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(child for child in folder.iterdir() if not child.name.startswith(".") and _is_model(child))


def _epoch_of(path: Path) -> int:
    """3 for `pretrain_512_epoch3` or `pretrain_512_epoch3.pth`; -1 for a name without an epoch."""
    found = _EPOCH.search(path.name)
    return int(found[1]) if found else -1


def _is_model(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".pth"
    return (path / CONFIG).is_file() or (path / ADAPTER).is_file()
