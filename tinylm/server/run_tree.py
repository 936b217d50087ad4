"""How the training runs in a folder descend from each other, for the page."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

from tinylm.checkpoint.model_path import states_of
from tinylm.checkpoint.training_state import read_training_values
from tinylm.files.untrusted import read_own_json
from tinylm.server.runs import last_row, newest_first, runs_in

MOST_RUNS = 200


def run_tree(folder: Path) -> dict[str, Any]:
    """The runs below a folder and the models there that no run has left, each with its parent; never in a circle.

    Returns:
        "runs": the newest first, then the models, which have no "changed"; "left_out": the number of runs beyond
        `MOST_RUNS`.
    """
    folder = Path(os.path.abspath(folder))
    metrics = runs_in(folder)
    shown = dict(list(metrics.items())[:MOST_RUNS])
    models = _models_in(folder) if shown else {}
    alone = [name for name in models if name not in metrics][:MOST_RUNS]
    made = {name: _made(folder / name, models.get(name)) for name in [*shown, *alone]}
    nodes = {name: _node(folder, name, made, shown.get(name)) for name in made}
    _cut_circles(nodes)
    return {"runs": list(nodes.values()), "left_out": len(metrics) - len(shown)}


def _models_in(folder: Path) -> dict[str, Path]:
    """The newest model of each run below a folder, by the run's name; other models by their own."""
    found = [path.parent for path in newest_first(folder, "*/lineage.json")]
    return {_run_of(path).relative_to(folder).as_posix(): path for path in reversed(found)}


def _run_of(model: Path) -> Path:
    """`full_sft/full_sft_256` for `full_sft/full_sft_256_epoch0`."""
    states = states_of(model)
    return states.with_name(states.name.removesuffix("_state"))


def _made(run: Path, model: Path | None) -> dict[str, Any]:
    """What a run says about its making: the lineage of its newest model, and until it ends its training state too."""
    lineage: dict[str, Any] = {}
    if model is not None:
        with contextlib.suppress(OSError, ValueError):
            lineage = read_own_json(model / "lineage.json")
    if lineage.get("finished") is True:
        return lineage
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state = read_training_values(run.with_name(f"{run.name}_state"))
        begun = {"stage": state["identity"]["stage"], "num_steps": state["identity"]["num_steps"]}
        return {**begun, "settings": state["settings"], "parent": {"path": state["sources"]["parent"]}, **lineage}
    return lineage


def _node(folder: Path, name: str, all_made: dict[str, dict[str, Any]], metrics: Path | None) -> dict[str, Any]:
    made = all_made[name]
    parent, note = _parent(folder, name, made, all_made)
    node = {"name": name, "stage": made.get("stage"), "settings": _dict(made.get("settings"))}
    node |= {"parent": parent, "note": note}
    if metrics is not None:
        last = last_row(metrics)
        node |= {"changed": 0.0} | {key: last[key] for key in ("changed", "step", "validation_loss") if key in last}
        node |= {"seconds_ago": max(0.0, time.time() - last.get("changed", 0.0)), "num_steps": made.get("num_steps")}
        node["is_finished"] = made.get("finished") is True
    answer: dict[str, Any] = json.loads(json.dumps(node), parse_constant=str)  # Infinity is no JSON for a browser
    return answer


def _parent(folder: Path, name: str, made: dict[str, Any], names: Container[str]) -> tuple[str | None, str]:
    """(the run or model below the folder that this one was trained from, or a sentence why it is not there).

    The folder may have been moved or copied since. So the way from the run to its parent counts first, and then the
    path that is recorded.
    """
    recorded, was = _dict(made.get("parent")).get("path"), _dict(made.get("settings")).get("output_dir")
    if not isinstance(recorded, str) or not recorded:
        return None, ""
    places = [recorded]
    if isinstance(was, str) and was:
        places.insert(0, str((folder / name).parent / os.path.relpath(recorded, was)))
    for path in map(Path, map(os.path.abspath, places)):
        found = _run_of(path).relative_to(folder).as_posix() if folder in path.parents else ""
        if found in names:
            return found, ""
    return None, f"trained from {recorded}, which is not in this folder"


def _cut_circles(nodes: dict[str, dict[str, Any]]) -> None:
    """Take the parent from one run of each circle, and say so: only damaged files make one."""
    for name in nodes:
        line = [name]
        while (parent := nodes[line[-1]]["parent"]) is not None and parent not in line:
            line.append(parent)
        if parent is not None:
            note = f"said to be trained from {parent}, which is trained from this one: a lineage.json is damaged"
            nodes[line[-1]] |= {"parent": None, "note": note}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
