"""Parts that the recipes share: the parent model, sample texts, and the run with its lineage."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch

from tinylm.checkpoint.model_folder import load_model
from tinylm.checkpoint.model_path import resolve_model_path
from tinylm.commandline.terminal import make_console, print_next
from tinylm.dataset.batches import BatchSampler, Dataset, StoredSteps
from tinylm.dataset.documents import Documents
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.model.lora import PROJECTIONS, TABLE_NAMES, TABLES, indistinct_tokens, lora_layers
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.model.weights import is_tied, weights_fingerprint
from tinylm.system.code_version import code_version
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer.core.distributed import is_sharded
from tinylm.trainer.run.run import Run
from tinylm.trainer.run.run_folder import RunFolder
from tinylm.trainer.run.stage import Learner, Plan, Stage

UNLEARNT_SHARE = 0.01
"""Share of the tokens to learn that may be ones the model never met, before a LoRA run warns."""
DEFAULT_SEQ_LEN = 512
"""Default tokens of a row; less if the model's context is shorter."""
MIN_CHAT_CONTEXT = 32
"""Smallest context (tokens) in which a question in the chat template leaves room for an answer."""


def load_parent(stage: Stage, model_path: str) -> tuple[TinyLMForCausalLM, Tokenizer, dict[str, Any]]:
    """The model that a fine-tuning stage starts from, its tokenizer, and its description for the lineage.

    Raises:
        ValueError: rows of `max_seq_len` do not fit into the model's context, or its width is not the requested one.
    """
    settings, path = stage.settings, resolve_model_path(model_path)
    model, tokenizer, lineage = load_model(path, device=stage.runtime.device, tokenizer_path=settings.tokenizer_path)
    longest = model.config.max_position_embeddings
    if longest < MIN_CHAT_CONTEXT:
        raise ValueError(
            f"{path} was made for contexts of up to {longest} tokens; a chat needs {MIN_CHAT_CONTEXT}; "
            f"pretrain with a --max_seq_len of at least {MIN_CHAT_CONTEXT}"
        )
    if settings.max_seq_len > longest:
        raise ValueError(
            f"max_seq_len is {settings.max_seq_len}, but {path} was made for contexts of up to {longest} tokens; "
            f"pass --max_seq_len {longest} or less"
        )
    for name in ("hidden_size", "num_hidden_layers"):
        asked, found = getattr(settings, name, 0), getattr(model.config, name)
        if asked and asked != found:
            raise ValueError(f"{name} is {asked}, but {path} has {found}; leave out --{name}, or give another model")
    require_other_than_parent(stage, path)
    stage.console.print(f"starting from {path}")
    parent = {
        "path": str(path),
        "stage": lineage.get("stage"),
        "weights": weights_fingerprint(model),
        "document_start": bool(lineage.get("document_start")),
    }
    return model, tokenizer, parent


def require_other_than_parent(stage: Stage, model: Path) -> None:
    """Raise ValueError if the run would overwrite `model`, the one that it starts from."""
    source = Path(os.path.realpath(model))
    if str(source.parent) == os.path.realpath(stage.settings.output_dir) and source.name.startswith(f"{stage.name}_"):
        raise ValueError(f"the run would overwrite its parent, {source}; choose another --output_dir")


def with_preset(stage: Stage) -> Stage:
    """The stage with a preset for its device in place of `auto`; says which."""
    if stage.settings.preset != "auto":
        return stage
    preset = "tiny" if stage.runtime.device.type == "cpu" and not stage.settings.widths else "small"
    if stage.settings.widths:
        why = "for what the flags leave open of the shape"
    elif preset == "tiny":
        why = "the default on a CPU (small learns more from much text, but each of its tokens takes six times as long)"
    else:
        why = "the default on a GPU"
    stage.console.print(f"no --preset: {preset}, {why}")
    return stage.with_settings(preset=preset)


def with_defaults(stage: Stage, model: TinyLMForCausalLM) -> Stage:
    """The stage with `max_seq_len` and `learning_rate` filled in, which depend on the model unless they are given.

    Raises:
        ValueError: the output folder holds a run of a model of this width, and nothing says what to do with it.
    """
    RunFolder(stage, model.config.hidden_size).require_free()
    settings, changes = stage.settings, dict[str, Any]()
    if not settings.max_seq_len:
        changes["max_seq_len"] = min(model.config.max_position_embeddings, DEFAULT_SEQ_LEN)
    if settings.learning_rate is None:
        changes["learning_rate"] = settings.default_learning_rate(model.config.hidden_size)
    return stage.with_settings(**changes)


def warn_of_unlearnt_tokens(stage: Stage, model: TinyLMForCausalLM, tokenizer: Tokenizer, data: Documents) -> None:
    """Say so if an adapter is to teach tokens that the model never met: it cannot if it leaves their tables alone."""
    needed = set(TABLE_NAMES if is_tied(model) else TABLE_NAMES[1:])  # untied, the rows for reading still differ
    if is_sharded(model) or needed <= lora_layers(model).keys():
        return
    ids, counts = np.unique(data.ids[data.is_target], return_counts=True)
    table = model.lm_head.weight
    unlearnt = indistinct_tokens(table, torch.from_numpy(ids).to(table.device, torch.int64)).cpu().numpy()
    share = counts[unlearnt].sum() / counts.sum()
    if share < UNLEARNT_SHARE:
        return
    often = ids[unlearnt][np.argsort(-counts[unlearnt], kind="stable")]
    texts = [tokenizer.decode([int(token)]).strip() for token in often]
    words = [repr(text) for text in texts if text and "\ufffd" not in text]  # half a character cannot be shown
    stage.console.print(
        f"warning: {share:.0%} of the tokens to learn ({', '.join(words[:3]) or 'bytes of its characters'}, ...) never "
        "occurred in the model's training, so it cannot tell them apart, and this adapter does not change that: "
        "answers with them will come out wrong; use tinylm sft, which learns them, or adapt the tables too: "
        f"--target_modules {','.join((*PROJECTIONS, *TABLES))}",
    )


def sample_texts(
    model: TinyLMForCausalLM,
    tokenizer: Tokenizer,
    *prompts: str,
    chat: bool = False,
    max_new_tokens: int = 40,
) -> Callable[[], list[str]]:
    """A function that lets the model, as it is when called, continue each prompt greedily or answer it in a chat."""

    def sample() -> list[str]:
        room = model.config.max_position_embeddings // 4  # the prompt needs most of a short context
        settings = SamplingSettings(max_new_tokens=min(max_new_tokens, room), temperature=0.0)
        # A sharded model cannot be copied into another precision.
        dtype = model.dtype if is_sharded(model) else None
        engine = Engine(model, tokenizer, dtype, document_start=tokenizer.document_start)
        if not chat:
            return [prompt + "".join(engine.stream_text(engine.text_prompt(prompt), settings)) for prompt in prompts]
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        replies = engine.reply_batch(messages, settings)
        return [f"{prompt} -> {reply}" for prompt, reply in zip(prompts, replies, strict=True)]

    return sample


def suggest(folder: Path, *commands: str) -> None:
    """Print the commands that may come next, for the model in `folder`; in the main process."""
    is_main = os.environ.get("RANK", "0") == "0"
    print_next(make_console(is_main), *(f"{command} --model_path {quote(str(folder))}" for command in commands))


def make_run(stage: Stage, learner: Learner, data: tuple[Dataset, Dataset | None]) -> Run:
    """The run of a stage: its plan and lineage, from the learner and the (training, validation) data."""
    settings, runtime = stage.settings, stage.runtime
    train_data, validation_data = data
    rows_per_step = settings.batch_size * settings.accumulation_steps * runtime.world_size
    sampler = BatchSampler(
        len(train_data), settings.batch_size, rows_per_step, settings.seed, runtime.rank, runtime.world_size
    )
    plan = Plan(settings, runtime, StoredSteps(train_data, sampler, settings.num_workers))
    lineage = {
        "parent": learner.parent,
        "document_start": learner.parent["document_start"] if learner.parent else True,
        "data_fingerprint": train_data.fingerprint,
        "tokenizer_fingerprint": learner.tokenizer.fingerprint,
        "seed": settings.seed,
        **code_version(),
        "settings": dataclasses.asdict(settings),
    }
    return Run(stage, learner, plan, validation_data, lineage)
