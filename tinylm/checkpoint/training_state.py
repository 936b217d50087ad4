"""Training states on disk: nested tensors and plain values, exactly, without a pickle; each step's in a folder.

    pretrain_512_state/
        step_00000400/    state.safetensors (tensors), state.json (all else), manifest.json (size and SHA-256 of both)
        step_00000800/
        latest            the name of the newest

A step's folder is published whole (see `atomic_files`), then `latest` names it, then all but the newest two go. So a
kill at any moment leaves the last published step; and where its files were damaged later, the one before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tinylm.checkpoint.weights_file import read_header, read_tensors, write_tensors
from tinylm.files.atomic import atomic_folder, atomic_write, check_manifest, remove_leftovers, write_manifest
from tinylm.files.untrusted import read_own_json, shown

_TENSORS, _VALUES, _LATEST = "state.safetensors", "state.json", "latest"
_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"
FORMAT = 2
KEPT_STEPS = 2
"""States that stay: the newest, and one more should a disk damage it."""


@dataclass(frozen=True)
class TrainingState:
    """A state that was found whole.

    `damaged` says, a line each, what is wrong with the newer ones that were passed over.
    """

    folder: Path
    values: dict[str, Any]
    damaged: tuple[str, ...] = ()


def _publish(
    folder: Path, step: int, values: dict[str, Any], tensors: Mapping[str, Tensor], group: ProcessGroup | None
) -> Path:
    """Write a step's folder, point `latest` to it, prune. With a `group`, the part of its first process.

    There are two writers, of one format, and `_read_all` reads both: `torch.distributed.checkpoint` alone would need 3
    to 5 times as long for a state that one process holds (2.1 to 3.7 s for 310 MB, in place of 0.4 to 1.2 s), and
    memory for all of it once more, since it makes the file as a bytes object first.
    """
    place = folder / f"step_{step:08d}"
    with atomic_folder(place) as fresh:
        if group is None:
            write_tensors(fresh / _TENSORS, tensors)
        else:
            _write_shards(fresh, tensors, group)
        (fresh / _VALUES).write_text(json.dumps({"format": FORMAT, "state": values}), encoding="utf-8")
        write_manifest(fresh)
    with atomic_write(folder / _LATEST) as file:
        file.write(place.name.encode())
    _prune(folder, place)
    return place


def _write_shards(fresh: Path | None, tensors: Mapping[str, Tensor], group: ProcessGroup) -> None:
    """Every process of `group` writes its shards into the folder that the first one made: safetensors files."""
    place = [str(fresh)]
    dist.broadcast_object_list(place, group_src=0, group=group)
    writer = HuggingFaceStorageWriter(place[0], save_distributed=True)
    checkpoint.save(dict(tensors), storage_writer=writer, process_group=group)


class StateWriter:
    """Saves states beside training, in a thread: first it copies the tensors, then it writes the copy.

    Weights and moments change in an optimizer's step and nowhere else. So the copy is taken while the next gradient is
    computed, and an update that comes too early waits for it. One save at a time: the next waits for the one before.

    Args:
        folder: where the states go.
        optimizers: what changes the tensors to save.
        sharded: every process has its share of the tensors and makes its own StateWriter; else only one process does.
        before: called in the thread before anything is written.
    """

    def __init__(
        self,
        folder: Path,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        sharded: bool = False,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.folder, self.before = folder, before
        # A group of its own: its messages must not come between those of the training thread.
        self.group = dist.new_group(backend="gloo") if sharded else None
        self._hooks = [optimizer.register_step_pre_hook(lambda *_: self.wait_for_copy()) for optimizer in optimizers]
        self._copies: dict[str, Tensor] = {}  # its memory is kept for the next: fresh memory costs twice the copying
        self._copied = threading.Event()
        self._copied.set()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.seconds = 0.0
        """How long the last save took."""

    def save(self, state: dict[str, Any]) -> Exception | None:
        """Begin to save a state; returns what went wrong with the save before, if anything did."""
        error = self.wait()
        tensors: dict[str, Tensor] = {}
        values = _flatten(state, tensors, "")
        self._copied.clear()
        arguments = (int(state["step"]), values, tensors)
        self._thread = threading.Thread(target=self._run, args=arguments, name="training state")
        self._thread.start()
        return error

    @property
    def is_busy(self) -> bool:
        """Whether a state is still being copied or written."""
        return self._thread is not None and self._thread.is_alive()

    def wait_for_copy(self) -> None:
        """Wait until the tensors may change again."""
        self._copied.wait()

    def wait(self) -> Exception | None:
        """Wait until all is written; returns what went wrong with the last save, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def close(self) -> None:
        """Wait, and leave the optimizers alone."""
        self.wait()
        for hook in self._hooks:
            hook.remove()

    def _run(self, step: int, values: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        started = time.perf_counter()
        try:
            try:
                self._copies = {name: _copy(tensor, self._copies.get(name)) for name, tensor in tensors.items()}
            finally:
                self._copied.set()
            with contextlib.suppress(OSError, AttributeError):  # Linux: the nice value of this thread alone
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
            if self.before is not None:
                self.before()
            if self.group is not None and dist.get_rank(self.group) != 0:
                _write_shards(None, self._copies, self.group)
            else:
                _publish(self.folder, step, values, self._copies, self.group)
        except Exception as error:
            self._error = error
        self.seconds = time.perf_counter() - started


def _copy(tensor: Tensor, memory: Tensor | None) -> Tensor:
    """A copy on the CPU, in the memory of the last one if it fits."""
    tensor = tensor.detach()
    if memory is not None and memory.shape == tensor.shape and memory.dtype == tensor.dtype:
        return memory.copy_(tensor)
    return tensor.to("cpu", copy=True)


def _prune(folder: Path, newest: Path) -> None:
    """Delete what is older than the newest `KEPT_STEPS`, and what killed writers have left.

    A step beyond the newest belongs to a run that was started over, or that went on from an older state.
    """
    for left in [*folder.glob(".step_*"), *folder.glob(".latest.*")]:
        remove_leftovers(folder / left.name[1:].split(".")[0])
    steps = sorted(path for path in folder.glob("step_*") if path.is_dir())
    kept = [path for path in steps if path <= newest][-KEPT_STEPS:]
    for path in steps:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def discard_latest_state(folder: Path, step: int) -> None:
    """Point `latest` to the state before that of `step`, which has turned out to be of no use, if there is one."""
    name = f"step_{step:08d}"
    older = sorted(path.name for path in folder.glob("step_*") if path.name < name)
    if older and (folder / name).is_dir():
        with atomic_write(folder / _LATEST) as file:
            file.write(older[-1].encode())


def load_training_state(
    folder: str | Path, place_for: Callable[[str, tuple[int, ...]], Tensor | None] | None = None
) -> TrainingState:
    """The newest state in `folder` that is whole, tensors on the CPU.

    Args:
        place_for: (name, shape of the whole) -> the sharded tensor to load this one into, or None for a plain one.

    Raises:
        FileNotFoundError: no state there. ValueError: there are states, and every one is damaged.
    """
    damaged: list[str] = []
    for place in state_folders(Path(folder)):
        try:
            check_manifest(place)
            record = _read_record(place)
            tensors = _read_all(place, place_for)
            return TrainingState(place, _unflatten_checked(place, record["state"], tensors), tuple(damaged))
        except (ValueError, OSError) as error:
            damaged.append(str(error))
    if damaged:
        raise ValueError(f"no state in {folder} is whole: {'; '.join(damaged)}")
    raise FileNotFoundError(f"{folder} holds no training state to resume from")


def _read_all(place: Path, place_for: Callable[[str, tuple[int, ...]], Tensor | None] | None) -> dict[str, Tensor]:
    """All tensors of a step. Shards are put together, or dealt out anew, as `place_for` wants them."""
    if place_for is None and (place / _TENSORS).is_file():
        return read_tensors(place / _TENSORS)
    for file in place.glob("*.safetensors"):
        read_header(file)  # sizes are checked before memory is taken
    reader = HuggingFaceStorageReader(str(place))
    targets: dict[str, Tensor] = {}
    for name, facts in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(facts, TensorStorageMetadata)
        target = place_for(name, tuple(facts.size)) if place_for is not None else None
        targets[name] = torch.empty(facts.size, dtype=facts.properties.dtype) if target is None else target
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is no mistake
        checkpoint.load(targets, storage_reader=HuggingFaceStorageReader(str(place)), no_dist=place_for is None)
    return targets


def read_training_values(folder: str | Path) -> dict[str, Any]:
    """The newest state without its tensors, which are None here: a look at the small file, and none at the large one.

    Raises:
        FileNotFoundError: no state there that can be read.
    """
    for place in state_folders(Path(folder)):
        with contextlib.suppress(ValueError, OSError):
            return _unflatten_checked(place, _read_record(place)["state"], None)
    raise FileNotFoundError(f"{folder} holds no training state")


def state_folders(folder: Path) -> list[Path]:
    """The folders of the states in `folder`: the one that `latest` names, then the others from the newest.

    Raises:
        ValueError: the folder holds a state of an older version of this project.
    """
    if (folder / _VALUES).is_file():
        raise ValueError(f"{folder} holds a training state of an older version; choose another --output_dir")
    steps = sorted((path for path in folder.glob("step_*") if path.is_dir()), reverse=True)
    try:
        latest = (folder / _LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):  # lost or damaged: the names say as much
        return steps
    return sorted(steps, key=lambda path: path.name != latest)


def _read_record(folder: Path) -> dict[str, Any]:
    record = read_own_json(folder / _VALUES)
    if record.get("format") != FORMAT or not isinstance(record.get("state"), dict):
        found = shown(record.get("format"))
        raise ValueError(f"{folder / _VALUES} has format {found}; expected {FORMAT}: it is not ours")
    return record


def _unflatten_checked(place: Path, value: Any, tensors: dict[str, Tensor] | None) -> dict[str, Any]:
    """What was saved; ValueError for a record that no `_flatten` has made, which may come from anybody."""
    try:
        state = _unflatten(value, tensors)
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise TypeError("no step")
        return state
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place / _VALUES} is no record of a state ({shown(str(error))}): restore it") from None


def _flatten(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(value, Tensor):
        assert path not in tensors, path
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, dict):
        plain = all(isinstance(key, str) and not key.startswith("__") for key in value)
        items = [[key, _flatten(item, tensors, f"{path}.{key}" if path else str(key))] for key, item in value.items()]
        return dict(items) if plain else {_ITEMS: items}
    if isinstance(value, list):
        return [_flatten(item, tensors, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: [_flatten(item, tensors, f"{path}[{i}]") for i, item in enumerate(value)]}
    # Exact types: a numpy number or an enum would come back as something else.
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise TypeError(f"{path} is a {type(value).__name__}; training state holds tensors and plain JSON values only")


def _unflatten(value: Any, tensors: dict[str, Tensor] | None) -> Any:
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return None if tensors is None else tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_unflatten(item, tensors) for item in value[_TUPLE])
    if _ITEMS in value:
        return {key: _unflatten(item, tensors) for key, item in value[_ITEMS]}
    return {key: _unflatten(item, tensors) for key, item in value.items()}
