"""Training states on disk: nested tensors and plain values, saved exactly and without pickle, a folder for each step.

    pretrain_512_state/
        step_00000400/    state.safetensors (tensors), state.json (all else), manifest.json (size and SHA-256 of both)
        step_00000800/
        latest            the name of the newest

A step's folder is written completely or not at all (see `tinylm/files/atomic.py`), then `latest` is set to its name,
then all but the newest two are deleted. So a kill at any moment leaves a complete state. If its files are damaged
later, the state before it is used.
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
"""States to keep: the newest, and one more in case the disk damages it."""


@dataclass(frozen=True)
class TrainingState:
    """An undamaged state.

    `damaged` has a line for each newer state that was skipped, with what is wrong with it.
    """

    folder: Path
    values: dict[str, Any]
    damaged: tuple[str, ...] = ()


def _publish(
    folder: Path, step: int, values: dict[str, Any], tensors: Mapping[str, Tensor], group: ProcessGroup | None
) -> Path:
    """Write a step's folder, set `latest` to it and delete old steps. In a `group`, its first process does this.

    Two writers write the same format, and `_read_all` reads both. `torch.distributed.checkpoint` takes 3 to 5 times as
    long for a state that a single process holds (2.1 to 3.7 s for 310 MB, instead of 0.4 to 1.2 s), and twice the
    memory, because it first makes the file as a bytes object.
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
    """Every process of `group` writes its shards, as safetensors files, into the folder that the first one made."""
    place = [str(fresh)]
    dist.broadcast_object_list(place, group_src=0, group=group)
    writer = HuggingFaceStorageWriter(place[0], save_distributed=True)
    checkpoint.save(dict(tensors), storage_writer=writer, process_group=group)


class StateWriter:
    """Saves states in a thread while training continues: it copies the tensors, then writes the copy.

    Weights and moments change only in an optimizer's step. So they are copied while the next gradient is computed, and
    an optimizer waits with its step until the copy is complete. A save waits until the save before it is complete.

    Args:
        folder: folder of the states.
        optimizers: the optimizers that change the tensors to save.
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
        # It needs its own group: its messages must not mix with those of the training thread.
        self.group = dist.new_group(backend="gloo") if sharded else None
        self._hooks = [optimizer.register_step_pre_hook(lambda *_: self.wait_for_copy()) for optimizer in optimizers]
        self._copies: dict[str, Tensor] = {}  # kept for the next save: new memory takes twice the time of copying
        self._copied = threading.Event()
        self._copied.set()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.seconds = 0.0
        """Duration of the last save."""

    def save(self, state: dict[str, Any]) -> Exception | None:
        """Begin to save a state; returns the error of the save before, if there was one."""
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
        """Wait until the tensors are copied and may change again."""
        self._copied.wait()

    def wait(self) -> Exception | None:
        """Wait until all is written; returns the error of the last save, only once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def close(self) -> None:
        """Wait until all is written, and remove the hooks from the optimizers."""
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
    """A copy on the CPU; it reuses `memory`, the previous copy, if shape and type are the same."""
    tensor = tensor.detach()
    if memory is not None and memory.shape == tensor.shape and memory.dtype == tensor.dtype:
        return memory.copy_(tensor)
    return tensor.to("cpu", copy=True)


def _prune(folder: Path, newest: Path) -> None:
    """Keep the `KEPT_STEPS` states up to `newest`; delete all others, and the leftovers of killed writers.

    A step after `newest` is from before the run was started over, or resumed from an older state.
    """
    for left in [*folder.glob(".step_*"), *folder.glob(".latest.*")]:
        remove_leftovers(folder / left.name[1:].split(".")[0])
    steps = sorted(path for path in folder.glob("step_*") if path.is_dir())
    kept = [path for path in steps if path <= newest][-KEPT_STEPS:]
    for path in steps:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def discard_latest_state(folder: Path, step: int) -> None:
    """Set `latest` to the state before that of `step`, if there is one: the weights of `step` are broken."""
    name = f"step_{step:08d}"
    older = sorted(path.name for path in folder.glob("step_*") if path.name < name)
    if older and (folder / name).is_dir():
        with atomic_write(folder / _LATEST) as file:
            file.write(older[-1].encode())


def load_training_state(
    folder: str | Path, place_for: Callable[[str, tuple[int, ...]], Tensor | None] | None = None
) -> TrainingState:
    """The newest undamaged state in `folder`, with its tensors on the CPU.

    Args:
        place_for: (name, full shape) -> the sharded tensor to load this one into, or None for a plain tensor.

    Raises:
        FileNotFoundError: there is no state.
        ValueError: all states are damaged.
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
        raise ValueError(f"every state in {folder} is damaged: {'; '.join(damaged)}")
    raise FileNotFoundError(f"{folder} holds no training state to resume from")


def _read_all(place: Path, place_for: Callable[[str, tuple[int, ...]], Tensor | None] | None) -> dict[str, Tensor]:
    """All tensors of a step. Shards are joined, or divided as `place_for` says."""
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
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # a single process is fine
        checkpoint.load(targets, storage_reader=HuggingFaceStorageReader(str(place)), no_dist=place_for is None)
    return targets


def read_training_values(folder: str | Path) -> dict[str, Any]:
    """The newest readable state, with None for each tensor: it reads the small file, not the large one.

    Raises:
        FileNotFoundError: there is no readable state.
    """
    for place in state_folders(Path(folder)):
        with contextlib.suppress(ValueError, OSError):
            return _unflatten_checked(place, _read_record(place)["state"], None)
    raise FileNotFoundError(f"{folder} holds no training state")


def state_folders(folder: Path) -> list[Path]:
    """The folders of the states in `folder`: first the one that `latest` names, then the others, newest first.

    Raises:
        ValueError: the folder holds a state of an older version of this project.
    """
    if (folder / _VALUES).is_file():
        raise ValueError(f"{folder} holds a training state of an older version; choose another --output_dir")
    steps = sorted((path for path in folder.glob("step_*") if path.is_dir()), reverse=True)
    try:
        latest = (folder / _LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):  # lost or damaged: the names show the order, too
        return steps
    return sorted(steps, key=lambda path: path.name != latest)


def _read_record(folder: Path) -> dict[str, Any]:
    record = read_own_json(folder / _VALUES)
    if record.get("format") != FORMAT or not isinstance(record.get("state"), dict):
        found = shown(record.get("format"))
        raise ValueError(
            f"{folder / _VALUES} has format {found}; expected {FORMAT}: this version of tinylm cannot read it"
        )
    return record


def _unflatten_checked(place: Path, value: Any, tensors: dict[str, Tensor] | None) -> dict[str, Any]:
    """The saved state; ValueError for a record that `_flatten` did not make, because it may come from a stranger."""
    try:
        state = _unflatten(value, tensors)
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise TypeError("no step")
        return state
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place / _VALUES} is not a training state ({shown(str(error))}): restore it") from None


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
    # Exact types: a numpy number or an enum would have another type after loading.
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
