"""What the recipes share: the length of a row, the sample texts, the plan and the lineage of a run."""

from __future__ import annotations

import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from trainer_parts import Rows, small_model

from tinylm.dataset.documents import Documents
from tinylm.model.lora import TABLES, LoRAConfig, apply_lora
from tinylm.system.runtime import Runtime
from tinylm.trainer import recipe_utils
from tinylm.trainer.core import gradients
from tinylm.trainer.core.objectives import next_token_loss
from tinylm.trainer.recipe_utils import (
    make_run,
    require_other_than_parent,
    sample_texts,
    warn_of_unlearnt_tokens,
    with_defaults,
    with_preset,
)
from tinylm.trainer.run.stage import Learner, Stage
from tinylm.trainer.run.train_settings import TrainSettings
from tinylm.trainer.train_dpo import DPOSettings
from tinylm.trainer.train_full_sft import FullSFTSettings
from tinylm.trainer.train_lora import LoRASettings
from tinylm.trainer.train_pretrain import PretrainSettings


def stage_of(name: str = "dpo", world_size: int = 1, **settings) -> Stage:
    runtime = Runtime(torch.device("cpu"), torch.float32, 0, world_size)
    return Stage(name, TrainSettings(**{"output_dir": "out", **settings}), runtime, Console(file=io.StringIO()))


def run_of(stage: Stage, parent: dict | None = None, **shape):
    learner = Learner(small_model(**shape), SimpleNamespace(fingerprint="größe"), [], next_token_loss, parent=parent)
    return make_run(stage, learner, (Rows(13), None))


@pytest.mark.parametrize(("asked", "context", "length"), [(0, 64, 64), (0, 2048, 512), (48, 64, 48)])
def test_rows_are_as_long_as_the_context_but_not_longer_than_the_default(asked, context, length):
    model = small_model(max_position_embeddings=context)
    assert with_defaults(stage_of(max_seq_len=asked), model).settings.max_seq_len == length


@pytest.mark.parametrize(
    ("settings", "shape", "at_once"),
    [
        ({}, {}, 2),
        ({"use_compile": False}, {}, 2),
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
    parent = {"path": "out/sft/full_sft_16_epoch0", "weights": "abc", "document_start": False}
    lineage = run_of(stage_of(seed=7, output_dir=str(tmp_path)), parent).checkpoints.lineage
    assert lineage["tokenizer_fingerprint"] == "größe" and lineage["data_fingerprint"] == "rows 13 0"
    assert lineage["parent"] == parent and lineage["seed"] == 7 and {"version", "code"} <= lineage.keys()
    assert lineage["settings"]["output_dir"] == str(tmp_path)
    assert lineage["document_start"] is False, "the parent was pretrained before documents began with <|endoftext|>"
    assert run_of(stage_of(output_dir=str(tmp_path)), None).checkpoints.lineage["document_start"] is True


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
        def __init__(self, model, tokenizer, dtype, document_start):
            made.append(dtype)
            self.document_start = document_start

        def text_prompt(self, text):
            return [*self.document_start, len(text)]

        def stream_text(self, ids, settings):
            made.append((settings.max_new_tokens, settings.temperature))
            return iter([f" {ids}", "!"])

        def reply_batch(self, messages, settings):
            return [f"re: {message['content']}" for (message,) in messages]

    monkeypatch.setattr(recipe_utils, "Engine", Engine)
    monkeypatch.setattr(recipe_utils, "is_sharded", lambda model: sharded)
    model, tokenizer = small_model(max_position_embeddings=64).double(), SimpleNamespace(document_start=[3])
    assert sample_texts(model, tokenizer, "Schön")() == ["Schön [3, 5]!"]
    assert made == [torch.float64 if sharded else None, (16, 0.0)]
    assert sample_texts(model, tokenizer, "Wer?", "Wo?", chat=True)() == ["Wer? -> re: Wer?", "Wo? -> re: Wo?"]
    sample_texts(model, tokenizer, "Schön", max_new_tokens=9)()
    assert made[-1] == (9, 0.0)


def pretrain_stage(device: str = "cpu", **settings) -> Stage:
    stage = stage_of()
    runtime = dataclasses.replace(stage.runtime, device=torch.device(device))
    return Stage("pretrain", PretrainSettings(**settings), runtime, stage.console)


@pytest.mark.parametrize(
    ("device", "settings", "preset", "shape", "said"),
    [
        ("cpu", {}, "tiny", (256, 6, 384, 256), "no --preset: tiny, the default on a CPU"),
        ("cuda:0", {}, "small", (512, 8, 1408, 512), "no --preset: small, the default on a GPU"),
        ("mps", {}, "small", (512, 8, 1408, 512), "no --preset: small, the default on a GPU"),
        (
            "cpu",
            {"hidden_size": 384},
            "small",
            (384, 8, 1024, 512),
            "no --preset: small, for what the flags leave open",
        ),
        ("cpu", {"num_hidden_layers": 3}, "small", (512, 3, 1408, 512), "for what the flags leave open"),
        ("cpu", {"preset": "large"}, "large", (768, 16, 2048, 512), ""),
        ("cuda:0", {"preset": "tiny", "hidden_size": 320}, "tiny", (320, 6, 896, 256), ""),
        ("cpu", {"preset": "tiny", "max_seq_len": 96}, "tiny", (256, 6, 384, 96), ""),
    ],
)
def test_the_preset_follows_from_the_device_unless_the_flags_say_a_shape(device, settings, preset, shape, said):
    """Who gives only a width expects the other numbers of the original project, which are those of `small`."""
    given = pretrain_stage(device, **settings)
    stage = with_preset(given)
    heard = given.console.file.getvalue()
    assert stage.settings.preset == preset and said in heard and bool(said) == bool(heard)
    config = stage.settings.model_config(100)
    sizes = (config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.max_position_embeddings)
    assert sizes == shape and config.qk_norm and config.rope_theta == (1e4 if preset == "tiny" else 1e6)


@pytest.mark.parametrize(
    ("settings", "width", "rate"),
    [
        (PretrainSettings(), 256, 6e-3),
        (PretrainSettings(), 512, 6e-3),
        (PretrainSettings(), 768, 4e-3),
        (PretrainSettings(optimizer="adamw"), 128, 1e-3),
        (PretrainSettings(optimizer="adamw"), 512, 5e-4),
        (PretrainSettings(learning_rate=0.02), 512, 0.02),
        (FullSFTSettings(model_path="m"), 256, 3e-3),
        (FullSFTSettings(model_path="m", optimizer="adamw"), 512, 5e-4),
        (LoRASettings(model_path="m"), 256, 4e-3),
        (LoRASettings(model_path="m"), 512, 2e-3),
        (LoRASettings(model_path="m", optimizer="muon"), 512, 5e-3),
        (DPOSettings(model_path="m"), 512, 1e-4),
        (DPOSettings(model_path="m"), 1024, 5e-5),
    ],
)
def test_the_learning_rate_follows_from_the_optimizer_and_the_width_unless_it_is_given(settings, width, rate):
    stage = Stage("pretrain", settings, stage_of().runtime, stage_of().console)
    filled = with_defaults(stage, small_model(hidden_size=width, num_hidden_layers=1)).settings
    assert filled.learning_rate == pytest.approx(rate) and filled.learning_rate_at(0, 1) == pytest.approx(rate)


def test_a_run_without_a_learning_rate_is_refused():
    with pytest.raises(ValueError, match="learning_rate is not set; expected a positive number"):
        TrainSettings().learning_rate_at(0, 1)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    @staticmethod
    def decode(ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("text", "never_met", "said"),
    [
        ("abcde" * 30, "", ""),
        ("abcde" * 30 + "z", "zyx", ""),  # one token in 151
        ("abcde" * 3 + "zzy", "zyx", "warning: 17% of the tokens to learn ('z', 'y', ...) never occurred"),
        ("abé", "é", "warning: 50% of the tokens to learn (bytes of its characters, ...) never occurred"),
    ],
)
def test_an_adapter_that_is_to_teach_what_the_model_never_met_warns(text, never_met, said):
    """Identity data for the quickstart's model ended in gibberish: the frozen table had one row for all new tokens."""
    model, stage = small_model(vocab_size=256), stage_of("lora")
    with torch.no_grad():
        for token in never_met.encode():
            model.lm_head.weight[token] = model.lm_head.weight[0]
    ids = np.frombuffer(b"q" + text.encode(), dtype=np.uint8).astype(np.int32)
    data = Documents(ids, np.arange(len(ids)) > 0, np.array([0, len(ids)]))
    warn_of_unlearnt_tokens(stage, model, Bytes(), data)
    heard = " ".join(stage.console.file.getvalue().split())
    assert heard.startswith(said) and bool(heard) == bool(said)
    assert not said or "tinylm sft" in heard


@pytest.mark.parametrize(
    ("tied", "targets", "is_warned"),
    [(True, TABLES, False), (True, ("lm_head",), True), (False, ("lm_head",), False), (False, ("embed_tokens",), True)],
)
def test_an_adapter_of_the_tables_can_teach_new_tokens(tied, targets, is_warned):
    """Tied, a token that the adapted head can write would still be read as any other new one."""
    model, stage = small_model(vocab_size=256, tie_word_embeddings=tied), stage_of("lora")
    with torch.no_grad():
        model.lm_head.weight[ord("z")] = model.lm_head.weight[0]
    apply_lora(model, LoRAConfig(target_modules=targets))
    data = Documents(np.array([113, 122], dtype=np.int32), np.array([False, True]), np.array([0, 2]))
    warn_of_unlearnt_tokens(stage, model, Bytes(), data)
    heard = " ".join(stage.console.file.getvalue().split())
    assert bool(heard) == is_warned and heard.endswith("down_proj,embed_tokens,lm_head") == is_warned
