"""What the recipes share: the length of a row, the sample texts, the plan and the lineage of a run."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from trainer_parts import Rows, small_model

from tinylm.system.runtime import Runtime
from tinylm.trainer import recipe_utils
from tinylm.trainer.core import gradients
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.recipe_utils import make_run, require_other_than_parent, sample_texts, with_row_length
from tinylm.trainer.run.stage import Learner, Stage
from tinylm.trainer.run.train_settings import TrainSettings


def stage_of(name: str = "dpo", world_size: int = 1, **settings) -> Stage:
    runtime = Runtime(torch.device("cpu"), torch.float32, 0, world_size)
    return Stage(name, TrainSettings(**{"output_dir": "out", **settings}), runtime, Console(file=io.StringIO()))


def run_of(stage: Stage, parent: dict | None = None, **shape):
    learner = Learner(small_model(**shape), SimpleNamespace(fingerprint="größe"), [], next_token_loss, parent=parent)
    return make_run(stage, learner, (Rows(13), None))


@pytest.mark.parametrize(("asked", "context", "length"), [(0, 64, 64), (0, 2048, 512), (48, 64, 48)])
def test_rows_are_as_long_as_the_context_but_not_longer_than_the_default(asked, context, length):
    model = small_model(max_position_embeddings=context)
    assert with_row_length(stage_of(max_seq_len=asked), model).settings.max_seq_len == length


@pytest.mark.parametrize(
    ("settings", "shape", "at_once"),
    [
        ({}, {}, 2),
        ({"use_compile": True}, {}, 1),
        ({}, {"hidden_dropout": 0.1}, 1),
        ({"world_size": 3}, {}, 1),
    ],
)
def test_the_plan_of_a_run(monkeypatch, settings, shape, at_once):
    """A batch is split over the cores; with 3 processes a step has three times the rows."""
    monkeypatch.setattr(gradients, "num_cores", lambda device: 2)
    stage = stage_of(batch_size=4, accumulation_steps=3, num_workers=5, seed=7, **settings)
    plan = run_of(stage, **shape).plan
    sampler, world_size = plan.source.sampler, stage.runtime.world_size
    assert (plan.at_once, sampler.batch_size, plan.source.num_workers) == (at_once, 4 // at_once, 5)
    assert (sampler.rows_per_step, sampler.seed, sampler.world_size) == (12 * world_size, 7, world_size)


def test_the_lineage_of_a_run(tmp_path):
    parent = {"path": "out/sft/full_sft_16_epoch0", "weights": "abc"}
    lineage = run_of(stage_of(seed=7, output_dir=str(tmp_path)), parent).checkpoints.lineage
    assert lineage["tokenizer_fingerprint"] == "größe" and lineage["data_fingerprint"] == "rows 13 0"
    assert lineage["parent"] == parent and lineage["seed"] == 7 and {"version", "code"} <= lineage.keys()
    assert lineage["settings"]["output_dir"] == str(tmp_path)


def test_a_run_never_overwrites_its_parent(tmp_path):
    """Also through a link. Another stage's model may lie in the same folder."""
    (tmp_path / "out" / "dpo_16_epoch0").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    parent = tmp_path / "link" / "dpo_16_epoch0"
    with pytest.raises(ValueError, match="the run would overwrite its parent, .*/out/dpo_16_epoch0; choose another"):
        require_other_than_parent(stage_of("dpo", output_dir=str(tmp_path / "out")), parent)
    require_other_than_parent(stage_of("lora", output_dir=str(tmp_path / "out")), parent)
    require_other_than_parent(stage_of("dpo", output_dir=str(tmp_path / "other")), parent)


@pytest.mark.parametrize("sharded", [True, False])
def test_samples_continue_a_prompt_or_answer_it(monkeypatch, sharded):
    """A sharded model cannot be copied into another precision. A short context keeps room for the prompt."""
    made = []

    class Engine:
        def __init__(self, model, tokenizer, dtype):
            made.append(dtype)

        def stream_text(self, ids, settings):
            made.append((settings.max_new_tokens, settings.temperature))
            return iter([f" {ids}", "!"])

        def reply_batch(self, messages, settings):
            return [f"re: {message['content']}" for (message,) in messages]

    monkeypatch.setattr(recipe_utils, "Engine", Engine)
    monkeypatch.setattr(recipe_utils, "is_sharded", lambda model: sharded)
    model, tokenizer = small_model(max_position_embeddings=64).double(), SimpleNamespace(encode=len)
    assert sample_texts(model, tokenizer, "Schön")() == ["Schön 5!"]
    assert made == [torch.float64 if sharded else None, (16, 0.0)]
    assert sample_texts(model, tokenizer, "Wer?", "Wo?", chat=True)() == ["Wer? -> re: Wer?", "Wo? -> re: Wo?"]
    sample_texts(model, tokenizer, "Schön", max_new_tokens=9)()
    assert made[-1] == (9, 0.0)
