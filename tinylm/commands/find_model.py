"""Which models a command means: of a path, of a folder with a folder for each stage, or of nothing at all."""

from __future__ import annotations

from pathlib import Path

from tinylm.checkpoint.model_path import (
    is_model,
    last_models,
    models_in,
    newest_model,
    resolve_model_path,
    unfinished_run,
)

DEFAULT_FOLDER = Path("out")
STAGES = ("dpo", "lora", "full_sft", "pretrain")
"""What the names of models start with; the last stage of training comes first."""


def find_model(model_path: str, weight: str) -> Path:
    """The model that --model_path and --weight mean; without a path, one under ./out.

    Of several runs in a folder it is the newest; of the folders below, that of the last stage of training.

    Raises:
        FileNotFoundError, ValueError: no such model was found.
    """
    if model_path:
        path = Path(model_path)
        below = None if is_model(path) or models_in(path) else last_stage_below(path, weight)
        return below or resolve_model_path(model_path, weight, newest=True)
    if model := last_stage_below(DEFAULT_FOLDER / "quickstart", weight):
        return model
    if models := last_models(DEFAULT_FOLDER, weight, depth=2):
        return newest_model(models)
    stopped = [text for states in sorted(DEFAULT_FOLDER.glob("**/*_state")) if (text := unfinished_run(states))]
    kind = f"{weight} model" if weight else "model"
    raise ValueError(
        f"no model_path given and no {kind} under ./{DEFAULT_FOLDER}; "
        + (stopped[0] if stopped else "run `tinylm quickstart` first")
    )


def last_stage_below(folder: Path, weight: str) -> Path | None:
    """The newest model in `folder` and the folders below it; where each stage has a folder, that of the last stage."""
    for stage in (weight,) if weight else STAGES:
        if models := last_models(folder, stage, depth=1):
            return newest_model(models)
    models = last_models(folder, weight, depth=2)
    return newest_model(models) if models else None


def one_of_each_stage(folder: Path) -> list[Path]:
    """The newest model of each stage's own folder in this one (`dpo`, `lora` and so on), the last stage first."""
    found = {stage: last_models(folder / stage, stage) for stage in STAGES}
    return [newest_model(models) for models in found.values() if models]
