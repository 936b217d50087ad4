"""Small parts that every recipe needs: the parent model, samples, and the run with its lineage."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from tinylm.checkpoint.model_folder import load_model, resolve_model_path
from tinylm.dataset.batches import Dataset
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.model.weights import weights_fingerprint
from tinylm.system.code_version import code_version
from tinylm.system.runtime import Runtime
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer.core.distributed import is_sharded
from tinylm.trainer.core.objectives import Objective
from tinylm.trainer.run.train_settings import TrainSettings
from tinylm.trainer.run.training_run import TrainingRun

Settings = TypeVar("Settings", bound=TrainSettings)

DEFAULT_SEQ_LEN = 512
"""Tokens of a row in fine-tuning where the model's context is longer and nothing else is asked for."""
MIN_CHAT_CONTEXT = 32
"""Tokens below which a question in the chat template leaves no room for an answer."""


def load_parent(
    model_path: str, settings: Settings, runtime: Runtime, console: Console
) -> tuple[Settings, TinyLMForCausalLM, Tokenizer, dict[str, Any]]:
    """The model a fine-tuning stage starts from: settings with `max_seq_len` filled in, model, tokenizer, description.

    Raises:
        ValueError: if rows of `max_seq_len` do not fit into the model's context, or a width asked for is another.
    """
    path = resolve_model_path(model_path)
    model, tokenizer, lineage = load_model(path, device=runtime.device, tokenizer_path=settings.tokenizer_path)
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
    if settings.max_seq_len == 0:
        settings = dataclasses.replace(settings, max_seq_len=min(longest, DEFAULT_SEQ_LEN))
    for name in ("hidden_size", "num_hidden_layers"):
        asked, found = getattr(settings, name, 0), getattr(model.config, name)
        if asked and asked != found:
            raise ValueError(f"{name} is {asked}, but {path} has {found}; leave out --{name}, or give another model")
    console.print(f"starting from {path}", markup=False)
    parent = {"path": str(path), "stage": lineage.get("stage"), "weights": weights_fingerprint(model)}
    return settings, model, tokenizer, parent


def sampler_of(
    model: TinyLMForCausalLM,
    tokenizer: Tokenizer,
    *prompts: str,
    chat: bool = False,
    max_new_tokens: int = 40,
) -> Callable[[], list[str]]:
    """A function that lets the model of the moment continue (or, in a chat, answer) each prompt, greedily."""
    room = model.config.max_position_embeddings // 4  # the prompt needs most of a short context
    settings = SamplingSettings(max_new_tokens=min(max_new_tokens, room), temperature=0.0)

    def sample() -> list[str]:
        # A sharded model computes as it is; no copy of it can be made.
        engine = Engine(model, tokenizer, dtype=model.dtype if is_sharded(model) else None)
        if not chat:
            return [prompt + "".join(engine.stream_text(tokenizer.encode(prompt), settings)) for prompt in prompts]
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return [
            f"{prompt} -> {reply}"
            for prompt, reply in zip(prompts, engine.reply_batch(messages, settings), strict=True)
        ]

    return sample


def make_run(
    stage: str,
    settings: TrainSettings,
    runtime: Runtime,
    console: Console,
    tokenizer: Tokenizer,
    model: TinyLMForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    data: tuple[Dataset, Dataset | None],
    objective: Objective,
    *,
    save: Callable[[Path, dict[str, Any]], None],
    sample: Callable[[], list[str]],
    parent: dict[str, Any] | None = None,
) -> TrainingRun:
    """A stage's run, from the parts that its recipe made, in the order of the recipe's banners.

    Args:
        data: (training, validation).
        save: (folder, lineage) -> writes the model folder, or the adapter folder.
        sample: texts to look at after each validation.
        parent: what `load_parent` says of the model the stage started from.

    Raises:
        ValueError: if the run would write its model where its parent lies.
    """
    train_data, validation_data = data
    source = Path(os.path.realpath(parent["path"])) if parent else None
    if source and str(source.parent) == os.path.realpath(settings.output_dir) and source.name.startswith(f"{stage}_"):
        raise ValueError(f"the run would overwrite its parent, {source}; choose another --output_dir")
    lineage = {
        "parent": parent,
        "data_fingerprint": train_data.fingerprint,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "seed": settings.seed,
        **code_version(),
        "settings": dataclasses.asdict(settings),
    }
    return TrainingRun(
        stage=stage,
        settings=settings,
        runtime=runtime,
        model=model,
        optimizers=optimizers,
        objective=objective,
        train_data=train_data,
        validation_data=validation_data,
        save=save,
        lineage=lineage,
        sample=sample,
        decode=tokenizer.decode,
        console=console,
    )
