"""What the server tells the page about the training runs in a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import make_model
from tests.server.run_files import row, trained_from, write_lineage, write_run, write_state
from tests.server.serving import settings_for
from tinylm.commands.serve import with_models
from tinylm.server import run_tree as tree_module
from tinylm.server import runs as module
from tinylm.server.run_tree import run_tree
from tinylm.server.runs import rows_of, runs_in


def parents(folder: Path) -> dict[str, str | None]:
    return {run["name"]: run["parent"] for run in run_tree(folder)["runs"]}


def node(folder: Path, name: str) -> dict[str, Any]:
    (found,) = (run for run in run_tree(folder)["runs"] if run["name"] == name)
    return found


def write_stages(folder: Path, was: Path) -> None:
    """Four runs that were trained in `was`."""
    base, sft = was / "pretrain" / "pretrain_32_epoch0", was / "größe" / "full_sft_32_epoch1"
    write_run(folder / "pretrain", "pretrain_32", [row(1, loss=6.0)], {"finished": True, "parent": None})
    write_run(folder / "größe", "full_sft_32", [row(1, loss=3.0)], trained_from(base, was / "größe"))
    for stage in ("dpo", "lora"):
        write_run(folder / stage, f"{stage}_32", [row(1, loss=1.0)], trained_from(sft, was / stage))


@pytest.mark.parametrize("was", ["", "/somewhere/else", "out/quickstart"])
def test_each_run_has_its_parent(tmp_path, was):
    """Also in a folder that was moved or copied, and if the paths were relative."""
    write_stages(tmp_path, Path(was) if was else tmp_path)
    expected = {
        "pretrain/pretrain_32": None,
        "größe/full_sft_32": "pretrain/pretrain_32",
        "dpo/dpo_32": "größe/full_sft_32",
        "lora/lora_32": "größe/full_sft_32",
    }
    assert parents(tmp_path) == expected
    assert all(not run["note"] for run in run_tree(tmp_path)["runs"])


def test_models_without_metrics_are_in_the_tree(tmp_path):
    """A merged model between two runs; but models alone are no runs."""
    write_lineage(
        tmp_path / "merged", {"stage": "merged", "parent": {"path": str(tmp_path / "lora" / "lora_32_epoch0")}}
    )
    assert run_tree(tmp_path) == {"runs": [], "left_out": 0}
    write_run(tmp_path / "lora", "lora_32", [row(1, loss=1.0)], {"finished": True, "parent": None})
    write_run(tmp_path / "dpo", "dpo_32", [row(1, loss=1.0)], trained_from(tmp_path / "merged", tmp_path / "dpo"))
    assert parents(tmp_path) == {"dpo/dpo_32": "merged", "lora/lora_32": None, "merged": "lora/lora_32"}
    assert "changed" not in node(tmp_path, "merged") and node(tmp_path, "merged")["stage"] == "merged"


def test_a_parent_that_is_not_there_is_named(tmp_path):
    for place in ("/elsewhere/full_sft_32_epoch0", str(tmp_path), "/", "bad\0path"):
        write_run(tmp_path, "dpo_32", [row(1, loss=1.0)], trained_from(place))
        assert node(tmp_path, "dpo_32")["parent"] is None
        assert node(tmp_path, "dpo_32")["note"] == f"trained from {place}, which is not in this folder"


def test_circles_are_cut(tmp_path):
    """Damaged files only; each run stays in the tree, and one of each circle says why it has no parent."""
    for name, parent in (("a_1", "b_1"), ("b_1", "c_1"), ("c_1", "a_1"), ("d_1", "d_1"), ("e_1", "a_1")):
        write_run(tmp_path, name, [row(1, loss=1.0)], trained_from(tmp_path / f"{parent}_epoch0"))
    found = parents(tmp_path)
    for start in found:
        line = [start]
        while (parent := found[line[-1]]) is not None:
            assert parent not in line
            line.append(parent)
    notes = [run["name"] for run in run_tree(tmp_path)["runs"] if "damaged" in run["note"]]
    assert len(notes) == 2 and "d_1" in notes and set(notes) < {"a_1", "b_1", "c_1", "d_1"}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "\ufeff{}", '{"parent": "x", "settings": [1]}', "[" * 100_000,
     '{"parent": {"path": ["x"]}, "settings": {"output_dir": 3}}',
     '{"finished": true, "settings": {"lr": Infinity, "output_dir": ""}, "parent": {"path": ""}}'],
)  # fmt: skip
def test_a_damaged_lineage_harms_nobody(tmp_path, text):
    write_run(tmp_path, "dpo_32", [row(1, loss=1.0)], {})
    (tmp_path / "dpo_32_epoch0" / "lineage.json").write_text(text, encoding="utf-8")
    json.dumps(run_tree(tmp_path), allow_nan=False)
    assert parents(tmp_path) == {"dpo_32": None}


def test_how_far_a_run_is(tmp_path):
    """An unfinished run has its parent and settings from its training state, a finished one from its model."""
    write_run(tmp_path / "a", "pretrain_32", [row(1, loss=6.0)], {"finished": True, "parent": None})
    lines = [row(1, loss=3.0), row(40, validation_loss=2.5), row(40, loss=2.0), row(60, loss=1.0), '{"step": 61']
    path = write_run(tmp_path / "b", "full_sft_32", lines)
    write_state(tmp_path / "b", "full_sft_32", 60, 200, "a/pretrain_32_epoch0", output_dir="b", seed=3)
    os.utime(path, (1e9, 1e9))
    found = node(tmp_path, "b/full_sft_32")
    assert [found[key] for key in ("step", "num_steps", "validation_loss", "is_finished", "parent")] == [
        60, 200, 2.5, False, "a/pretrain_32",
    ]  # fmt: skip
    assert found["settings"]["seed"] == 3 and found["seconds_ago"] > 1e6 and found["changed"] == 1e9
    write_lineage(tmp_path / "b" / "full_sft_32_epoch0", trained_from("a/pretrain_32_epoch0", "b", seed=4))
    found = node(tmp_path, "b/full_sft_32")
    assert found["is_finished"] and found["settings"]["seed"] == 4


def test_the_last_validation_may_be_far_from_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TAIL_BYTES", 100)
    write_run(tmp_path, "dpo_32", [row(1, validation_loss=2.5), *(row(step, loss=1.0) for step in range(2, 30))])
    found = node(tmp_path, "dpo_32")
    assert found["step"] == 29 and "validation_loss" not in found


def test_of_too_many_runs_the_newest_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(tree_module, "MOST_RUNS", 2)
    for age, name in enumerate("abcd"):
        path = write_run(tmp_path, name, [row(1, loss=1.0)])
        os.utime(path, (1e9 - age, 1e9 - age))
    found = run_tree(tmp_path)
    assert [run["name"] for run in found["runs"]] == ["a", "b"] and found["left_out"] == 2


def test_a_run_that_was_resumed_has_each_step_once(tmp_path):
    """What the earlier attempt wrote after the step of the resume is left out, and counted."""
    first = [row(10, loss=5.0), row(20, loss=4.0), row(20, validation_loss=4.5), row(30, loss=9.0, validation_loss=9.0),
             row(40, loss=9.5)]  # fmt: skip
    path = write_run(tmp_path, "dpo_32", [*first, row(30, loss=3.0), row(30, loss=2.5), row(50, loss=2.0)])
    found = rows_of(path)
    assert found["rows"] == [
        {"step": 10, "loss": 5.0}, {"step": 20, "loss": 4.0, "validation_loss": 4.5}, {"step": 30, "loss": 2.5},
        {"step": 50, "loss": 2.0},
    ]  # fmt: skip
    assert found["notes"] == ["2 steps of an earlier attempt left out"]


def test_what_is_no_number_is_counted(tmp_path):
    lines = [row(1, loss=1.0), row(2, loss=None), '{"step": 3, "loss": NaN, "grad_norm": Infinity}\n', row(4, loss="5")]
    path = write_run(tmp_path, "dpo_32", [*lines, row(5, loss=2.0, sample_0="größe", sample_1=[float("nan")])])
    found = rows_of(path)
    assert found["not_numbers"] == {"loss": 3, "grad_norm": 1, "sample_1": 1} and found["notes"] == []
    assert found["rows"][-1] == {"step": 5, "loss": 2.0, "sample_0": "größe", "sample_1": None}
    json.dumps(found, allow_nan=False)


def test_a_long_run_is_thinned_out(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 10)
    lines = [row(step, loss=1.0, **({"validation_loss": 2.0} if step == 8 else {})) for step in range(1, 37)]
    path = write_run(
        tmp_path, "pretrain_32", [*lines, "[1]\n", "nonsense\n", '{"step": true}\n', '{"loss": 1}\n', '{"st']
    )
    found = rows_of(path)
    assert [row["step"] for row in found["rows"]] == [1, 5, 8, 9, 13, 17, 21, 25, 29, 33, 36]
    assert found["notes"] == ["4 lines left out: not the metrics of a step", "one of 4 steps is drawn"]
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="has more than 100 bytes"):
        rows_of(path)


def test_where_the_runs_are(tmp_path, tokenizer):
    make_model(tmp_path / "full_sft" / "full_sft_32_epoch0", tokenizer)
    write_run(tmp_path / "full_sft", "full_sft_32", [row(1, loss=2.0)])
    assert list(runs_in(tmp_path)) == ["full_sft/full_sft_32"]
    for path, runs in (("", tmp_path), ("full_sft", tmp_path / "full_sft")):
        assert with_models(settings_for(tmp_path / path)).runs_dir == str(runs)
    model = tmp_path / "full_sft" / "full_sft_32_epoch0"
    assert with_models(settings_for(model)).runs_dir == str(tmp_path / "full_sft")
    assert with_models(settings_for(model, runs_dir="elsewhere")).runs_dir == "elsewhere"
    assert with_models(settings_for(f"a={model}")).runs_dir == ""
