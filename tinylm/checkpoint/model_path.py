"""Which model a path means: a model itself, or one of the models in a folder.

A stage's output folder holds a model for each epoch of each run (`pretrain_512_epoch0`, `pretrain_512_epoch1`, ...).
The model of a run is that of its last epoch.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from tinylm.checkpoint.training_state import read_training_values, state_folders
from tinylm.checkpoint.weight_shards import WEIGHTS

CONFIG, ADAPTER = "config.json", "adapter_config.json"
_EPOCH = re.compile(r"_epoch(\d+)(?=\.pth$|$)")
_NAMED = re.compile(r"([\w.:-]+)=(.+)")
_COMMANDS = {"pretrain": "pretrain", "full_sft": "sft", "lora": "lora", "dpo": "dpo"}
"""Stage -> the command that runs it."""
_MOST_NAMES = 8
"""Models that an error message names."""


def resolve_model_path(path: str | Path, stage: str = "", newest: bool = False) -> Path:
    """A model folder, an adapter folder, a `.pth` or `.gguf` file: the path itself, or the one inside it.

    Args:
        stage: consider only models inside whose name starts with this; empty means all.
        newest: if there are several runs inside, take the last changed one instead of raising an error.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the folder holds no such model, or the models of several runs.
    """
    if "://" in str(path):
        raise ValueError(f"{path} is an address; models are read from this machine; download it, then give its folder")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a model folder, an adapter folder, a .gguf or .pth file")
    if path.is_file():
        if path.suffix == ".onnx":
            raise ValueError(f"{path} is for other programs only; give the model folder that it was made from")
        if path.suffix not in (".pth", ".pt", ".gguf"):
            kind = f"a {path.suffix} file" if path.suffix else "a file without an ending"
            raise ValueError(f"{path} is {kind}; give its folder, or a .gguf or .pth file")
        return path
    if not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder; give a model folder, a .gguf or .pth file")
    if (path / WEIGHTS).is_file() and not (path / CONFIG).is_file():
        raise ValueError(f"{path} has {WEIGHTS} but no {CONFIG}; copy the config that belongs to these weights")
    if is_model(path):
        return path
    inside, models = models_in(path), last_models(path, stage)
    if len(models) == 1 or (models and newest):
        return newest_model(models)
    names = ", ".join(model.name for model in inside[:_MOST_NAMES])
    if models:
        raise ValueError(f"{path} holds {len(inside)} models ({names}); give the path of one of them")
    if inside:
        raise ValueError(f"{path} holds {names}; expected a model named {stage}_...; give the path of a model")
    if below := last_models(path, stage, depth=2):
        names = ", ".join(str(model.relative_to(path)) for model in below[:_MOST_NAMES])
        raise ValueError(f"{path} itself holds no model, but below it are {names}; give the path of one of them")
    if stopped := [text for text in map(unfinished_run, sorted(path.glob("*_state"))) if text]:
        raise ValueError(f"{path} holds no model yet: {stopped[0]}")
    if state_folders(path):
        raise ValueError(f"{path} holds the training states of a run, and no model; give a model folder beside it")
    expected = f"expected {CONFIG}, {ADAPTER} or a .pth file in it"
    raise ValueError(f"{path} holds no model; {expected}; give the path of a model")


def named_paths(text: str) -> list[tuple[str, str]]:
    """(name, path) of each of `name=path,name2=path2`; a path alone has the name "".

    Raises:
        ValueError: several without names, or one name twice.
    """
    if not text or os.path.exists(os.path.expanduser(text)):
        return [("", text)] if text else []
    pairs = [(found[1], found[2]) if (found := _NAMED.fullmatch(part)) else ("", part) for part in text.split(",")]
    names = [name for name, _ in pairs]
    if len(pairs) > 1 and not all(names):
        raise ValueError(
            f"{text} has a part without a name of letters, digits and ._:-; expected name=path,name2=path2"
        )
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise ValueError(f"{text} has the name {twice} twice; expected each once; rename one")
    return pairs


def resolve_adapter_path(path: str | Path) -> Path:
    """An adapter folder: the path itself, or the last one inside it, as for `resolve_model_path`.

    Raises:
        FileNotFoundError, ValueError: no adapter is there, or several runs have left models.
    """
    found = resolve_model_path(path)
    if not is_adapter(found):
        kind = "a file" if found.is_file() else "a full model"  # a GGUF may hold an adapter: llama.cpp reads that
        raise ValueError(
            f"{found} is {kind}; expected an adapter folder, such as the output of `tinylm lora`; give a full "
            "model with --model_path"
        )
    return found


def unfinished_run(states: Path) -> str:
    """How far a run that has stopped came, and how to continue it; empty for a finished run.

    Args:
        states: the folder of its training states, `pretrain_512_state`.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        values = read_training_values(states)
        step, run = int(values["step"]), values["identity"]
        if step < int(run["num_steps"]):
            command = f"tinylm {_COMMANDS[run['stage']]} --output_dir {states.parent} --resume"
            return (
                f"its {run['stage']} run stopped at step {step:,} of {run['num_steps']:,}; continue with the flags of "
                f"the first call and --resume: {command} ..."
            )
    return ""


def states_of(model: Path) -> Path:
    """Where the run that wrote `model` keeps its training states: `pretrain_512_state` for `pretrain_512_epoch0`."""
    return model.with_name(_EPOCH.sub("", model.name) + "_state")


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
            if child.is_dir() and not is_model(child):
                models += last_models(child, stage, depth - 1)
    return models


def newest_model(models: Iterable[Path]) -> Path:
    """The model that was changed last."""
    return max(models, key=lambda model: model.stat().st_mtime)


def models_in(folder: Path) -> list[Path]:
    """Every model directly in `folder`, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(child for child in folder.iterdir() if not child.name.startswith(".") and is_model(child))


def _epoch_of(path: Path) -> int:
    """3 for `pretrain_512_epoch3` or `pretrain_512_epoch3.pth`; -1 for a name without an epoch."""
    found = _EPOCH.search(path.name)
    return int(found[1]) if found else -1


def is_model(path: Path) -> bool:
    """Whether this is a model folder, an adapter folder or a `.pth` file, and not a folder of models."""
    if path.is_file():
        return path.suffix == ".pth"
    return (path / CONFIG).is_file() or is_adapter(path)


def is_adapter(path: Path) -> bool:
    """Whether this is an adapter folder."""
    return (path / ADAPTER).is_file()
