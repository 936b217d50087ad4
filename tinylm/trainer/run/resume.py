"""Resume from a training state: check that it is of the same run, and save and load the optimizers' states.

Data, parent, shape, batch and number of steps are compared by their results (fingerprints, numbers), not by their
flags. Settings in `FREE` may change. Settings in `ADJUSTABLE` may change too; the run prints and records the change.
All other settings must stay the same: if the weight decay changed halfway, the run would report the second value, but
would not be a run with that value.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FREE = frozenset(
    # paths, and when something is shown, evaluated or saved
    "output_dir validation_path max_bad_rows log_interval eval_interval eval_batches save_interval resume tensorboard "
    "overwrite keep_epochs snapshots "
    # how the same sums are computed; weights and optimizer state are always float32
    "device dtype num_workers use_compile sharding timeout cache_dir cache_gb "
    # compared by their results: the data's fingerprint,
    "data_path validation_fraction tokenizer_path name author max_seq_len "
    # the number of steps and the rows of each,
    "epochs max_steps batch_size accumulation_steps "
    # the parent's weights and the model's config
    "model_path preset hidden_size num_hidden_layers num_attention_heads num_key_value_heads position_embedding_type "
    "qk_norm dropout".split()
)
BEHIND = {
    "data": ("data_path", "validation_fraction", "tokenizer_path", "name", "author", "max_seq_len"),
    "parent": ("model_path",),
    "num_steps": ("max_steps", "epochs", "batch_size", "accumulation_steps", "max_seq_len"),
    "rows_per_optimizer_step": ("batch_size", "accumulation_steps"),
    "trained parameters": ("lora_rank", "target_modules", "preset", "hidden_size", "num_hidden_layers"),
    "hidden_dropout": ("dropout",),
    "attention_dropout": ("dropout",),
    "max_position_embeddings": ("max_seq_len",),
}
"""Part of a run's identity -> the flags that it depends on. The parts that are missing here are flags themselves."""
ELSEWHERE = "or choose another --output_dir for a new run"
ADJUSTABLE = frozenset({"learning_rate", "grad_clip"})
"""Settings that may have to change before a diverged run can continue."""


def check_same_run(folder: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `ADJUSTABLE` settings that have changed, each as {step, setting, was, now}.

    Args:
        folder: folder of the states.
        saved: the training state. If an older version wrote it, it may have fewer entries; only these are compared.
        ours: this run's "identity", "settings" and "sources" (names for the data and the parent), as in the state.

    Raises:
        ValueError: the state is of another run; the message says what differs, both values, and what to do.
    """
    changes = []
    unfinished = saved["step"] < saved["identity"]["num_steps"]
    for name, now in ours["settings"].items():
        was = saved.get("settings", {}).get(name, now)
        if was == now or name in FREE:
            continue
        if name not in ADJUSTABLE or not unfinished:
            raise ValueError(f"{folder} {_other_flags([name], saved['settings'], ours['settings'])}")
        changes.append({"step": saved["step"], "setting": name, "was": was, "now": now})
    for name, now in ours["identity"].items():
        was = saved["identity"].get(name)
        if was != now:
            raise ValueError(f"{folder} {_other_identity(name, was, now, saved, ours)}")
    return changes


def _other_identity(name: str, was: Any, now: Any, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What differs, by the flags behind it if one of them has changed, and what to do."""
    flags = [*BEHIND.get(name, (name,)), "preset"]
    before, after = saved.get("settings", {}), ours["settings"]
    changed = [flag for flag in flags if flag in before and flag in after and before[flag] != after[flag]]
    if changed:
        return _other_flags(changed, before, after)
    source = saved.get("sources", {}).get(name)
    if source and source == ours["sources"].get(name):
        what = {"data": "the files in it are others now", "parent": "its weights are others now"}[name]
        return f"was made with the {name} {source}, and {what}; restore it to resume the run, {ELSEWHERE}"
    their_source, our_source = (each.get("sources", {}).get(name) for each in (saved, ours))
    made = f"was made with {name} {_shown(was, their_source)}, this run has {_shown(now, our_source)}"
    return f"{made}; resume with the settings and data it was started with, {ELSEWHERE}"


def _other_flags(names: Sequence[str], before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What the flags `names` were and are, and what to type."""
    theirs, ours = (" ".join(_flag(name, values[name]) for name in names) for values in (before, after))
    given = " ".join(_flag(name, before[name]) for name in names if before[name] is not None)
    left_out = " ".join(f"--{name}" for name in names if before[name] is None)
    advice = " and ".join([*([f"pass {given}"] if given else []), *([f"leave out {left_out}"] if left_out else [])])
    return f"was made with {theirs}, this run has {ours}; {advice} to resume it, {ELSEWHERE}"


def _flag(name: str, value: Any) -> str:
    """A setting as it is typed."""
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return f"no --{name}" if value is None else f"--{name} {shlex.quote(_shown(value))}"


def _shown(value: Any, source: str | None = None) -> str:
    """A value as a flag takes it. A fingerprint follows the path that it belongs to, because people know the path."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{source} (fingerprint {text})" if source else text


def optimizer_states(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """The state that each optimizer keeps for each parameter, by the parameter's name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [{names[id(p)]: dict(kept) for p, kept in optimizer.state.items()} for optimizer in optimizers]


def load_optimizer_states(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], states: Sequence[Mapping[str, Any]]
) -> None:
    """Load the result of `optimizer_states` into the optimizers; their settings do not change."""
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer, state in zip(optimizers, states, strict=True):
        order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        by_number = {number: dict(state[name]) for number, name in enumerate(order) if name in state}
        optimizer.load_state_dict({"state": by_number, "param_groups": optimizer.state_dict()["param_groups"]})


def place_like(model: nn.Module) -> Callable[[str, tuple[int, ...]], Tensor | None]:
    """The `place_for` of `load_training_state` for a sharded model: where each tensor is loaded.

    A tensor's name contains the name of a parameter. If both have the same shape, it is sharded as that parameter is.
    """
    parameters = dict(model.named_parameters())

    def place(name: str, shape: tuple[int, ...]) -> Tensor | None:
        _, _, rest = name.partition(".")  # "weights." or "optimizers[0]."
        parameter = parameters.get(rest, parameters.get(rest.rpartition(".")[0]))
        if parameter is None or parameter.shape != shape:
            return None
        return torch.zeros_like(parameter.detach())

    return place
