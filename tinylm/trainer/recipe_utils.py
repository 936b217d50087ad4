"""Small parts that every recipe needs: notes to the user, lineage, samples, the parent model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console

from tinylm import __version__
from tinylm.checkpoint import load_model, resolve_model_path, weights_fingerprint
from tinylm.dataset.batches import Dataset
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.runtime import Runtime
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer.train_settings import TrainSettings

Settings = TypeVar("Settings", bound=TrainSettings)

DEFAULT_SEQ_LEN = 512
"""Tokens of a row in fine-tuning where the model's context is longer and nothing else is asked for."""


def lineage_of(
    settings: TrainSettings, tokenizer: Tokenizer, data: Dataset, parent: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What lineage.json says of a model's origin, besides its stage and step."""
    return {
        "parent": parent,
        "data_fingerprint": data.fingerprint,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "seed": settings.seed,
        "version": __version__,
        "settings": dataclasses.asdict(settings),
    }


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
    settings = SamplingSettings(max_new_tokens=max_new_tokens, temperature=0.0)

    def sample() -> list[str]:
        engine = Engine(model, tokenizer)
        if not chat:
            return [prompt + "".join(engine.stream_text(tokenizer.encode(prompt), settings)) for prompt in prompts]
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return [
            f"{prompt} -> {reply}"
            for prompt, reply in zip(prompts, engine.reply_batch(messages, settings), strict=True)
        ]

    return sample
