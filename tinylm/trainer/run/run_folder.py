"""A run's files in its output folder: their names, the lock, which models stay, and what may be replaced."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinylm.checkpoint.snapshots import snapshot_folder
from tinylm.checkpoint.training_state import read_training_values
from tinylm.files.atomic import remove_folder, remove_leftovers
from tinylm.files.locks import run_lock
from tinylm.files.untrusted import read_own_json
from tinylm.trainer.run.stage import Stage


class RunFolder:
    """The files of a stage's run.

    Args:
        hidden_size: the model's width; models of another width in the same folder belong to another run.
    """

    def __init__(self, stage: Stage, hidden_size: int) -> None:
        self.stage, self.hidden_size = stage, hidden_size

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.stage.settings.output_dir)

    @property
    def name(self) -> str:
        """Stage and width: all file names begin with it, as in lyuzlion/Tiny-Language-Model."""
        return f"{self.stage.name}_{self.hidden_size}"

    @property
    def state_folder(self) -> Path:
        """Folder of the training states, beside the model folders."""
        return self.folder / f"{self.name}_state"

    def model_folder(self, epoch: int) -> Path:
        """Folder of the model after `epoch` (from 0), named like the files of the original project."""
        return self.folder / f"{self.name}_epoch{epoch}"

    def models(self) -> dict[int, Path]:
        """The run's models by epoch, the first epoch first."""
        found = [path.parent for path in self.folder.glob(f"{self.name}_epoch*/lineage.json")]
        numbered = [(re.fullmatch(r".*_epoch(\d+)", path.name), path) for path in found]
        return dict(sorted((int(match[1]), path) for match, path in numbered if match))

    @contextlib.contextmanager
    def owned_folder(self) -> Iterator[None]:
        """Lock the stage's files for this run inside the block, and delete the half-written files of a killed run."""
        # The lock of a process on a lost machine is freed only after a while. The other processes wait for the main
        # process until the timeout, so the main process waits for the lock for half of that.
        patience = self.stage.settings.timeout / 2 if self.is_restarted() else 0.0
        with contextlib.ExitStack() as stack:
            refusal = None
            if self.stage.runtime.is_main:
                try:
                    stack.enter_context(run_lock(self.folder / f".{self.stage.name}.lock", patience))
                    for left in self.folder.glob(f".{self.stage.name}_*"):
                        remove_leftovers(self.folder / left.name[1:].rsplit(".", 2)[0])
                except (ValueError, OSError) as error:
                    refusal = error
            if self.stage.runtime.any_rank(refusal is not None):
                raise refusal or ValueError("the main process could not lock the run's folder")
            yield

    # --- an earlier run ------------------------------------------------------------------------------------------

    def should_resume(self) -> bool:
        """Whether to resume: with --resume, or if torchrun has restarted the processes."""
        return self.stage.settings.resume or self.is_restarted()

    def is_restarted(self) -> bool:
        """Whether torchrun has restarted the processes, because one was lost or joined; all must call it."""
        runtime = self.stage.runtime
        if runtime.any_rank(runtime.is_restart):
            return True
        if not runtime.launch_id:
            return False
        with contextlib.suppress(FileNotFoundError):
            return bool(read_training_values(self.state_folder).get("launch") == runtime.launch_id)
        return False

    def require_free(self) -> None:
        """Refuse to replace an earlier run, unless --overwrite is given or this run continues it; all must call it.

        Raises:
            ValueError: the folder holds a run; the message says whether it is finished, and what to do.
        """
        if self.should_resume():
            return
        found = ""
        if self.stage.runtime.is_main and not self.stage.settings.overwrite:
            found = self._earlier_run()
        if self.stage.runtime.any_rank(bool(found)):
            raise ValueError(found or f"{self.folder} of the main process holds an earlier run; pass --overwrite")

    def require_unfinished(self) -> None:
        """Refuse a start from the beginning if there is a finished model, whose training state has been deleted.

        Raises:
            ValueError: there is one.
        """
        finished = [path.name for path in self.models().values() if _lineage(path).get("finished")]
        if finished and not self.is_restarted():
            raise ValueError(
                f"{self.folder} holds a finished {self.stage.name} run ({finished[-1]}) without a training state; pass "
                "--overwrite instead of --resume to replace it, or choose another --output_dir"
            )

    def _earlier_run(self) -> str:
        """What the folder holds and what to do, in a sentence; empty if a run may start in it."""
        models = self.models()
        where = f"{self.folder} holds {{}} {self.stage.name} run"
        start_over = "--overwrite to {}, or choose another --output_dir"
        with contextlib.suppress(FileNotFoundError):
            state = read_training_values(self.state_folder)
            step, num_steps = state["step"], state["identity"]["num_steps"]
            if step < num_steps:
                stopped = f"{where.format('an unfinished')}, stopped at step {step:,} of {num_steps:,}"
                return f"{stopped}; pass --resume to continue it, {start_over.format('start again')}"
            return f"{where.format('a finished')} of {num_steps:,} steps; pass {start_over.format('replace it')}"
        if any(_lineage(path).get("finished") for path in models.values()):
            last = list(models.values())[-1].name
            return f"{where.format('a finished')} ({last}); pass {start_over.format('replace it')}"
        if models:
            unfinished = f"{where.format('an unfinished')} without a saved state"
            return f"{unfinished}; pass {start_over.format('start again')}"
        return ""

    def clear(self) -> None:
        """Delete the models and the states of an earlier run, which --overwrite gives up, and say so.

        Otherwise a longer run would leave the models of its later epochs, and the last epoch's model is the one that
        other commands take.
        """
        if not self.stage.runtime.is_main:
            return
        folders = (self.state_folder, snapshot_folder(self.model_folder(0)))
        places = [*self.models().values(), *(folder for folder in folders if folder.is_dir())]
        for place in places:
            remove_folder(place)
        if places:
            names = ", ".join(place.name for place in places)
            self.stage.console.print(f"removed the earlier run ({names})")

    # --- the models that stay ------------------------------------------------------------------------------------

    def best_model(self) -> tuple[int, float] | None:
        """(epoch, validation loss) of the model with the lowest validation loss, if it is known of any."""
        losses = {epoch: _lineage(path).get("validation_loss") for epoch, path in self.models().items()}
        known = {epoch: loss for epoch, loss in losses.items() if isinstance(loss, float) and math.isfinite(loss)}
        return min(known.items(), key=lambda item: (item[1], -item[0])) if known else None

    def remove_other_models(self, epoch: int) -> None:
        """Delete the models that `keep_epochs` does not keep, now that the model of `epoch` is written."""
        kept = {epoch}
        for later in [number for number in self.models() if number > epoch]:
            remove_folder(self.model_folder(later))  # a run that was resumed from an older state makes it again
        if self.stage.settings.keep_epochs == "all":
            return
        if self.stage.settings.keep_epochs == "best" and (best := self.best_model()):
            kept.add(best[0])
        for number, path in self.models().items():
            if number not in kept:
                remove_folder(path)


def _lineage(model: Path) -> dict[str, Any]:
    """What a model folder says about its making; empty if it says nothing that can be read."""
    try:
        return read_own_json(model / "lineage.json")
    except (OSError, ValueError):
        return {}
