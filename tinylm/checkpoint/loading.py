"""From a path to a model ready for use: found, loaded, its adapter attached, with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinylm.checkpoint.adapter_folder import load_adapter
from tinylm.checkpoint.model_folder import check_tokenizer, load_model, recorded_tokenizer
from tinylm.checkpoint.model_path import resolve_adapter_path, resolve_model_path
from tinylm.model.lora import merge_lora
from tinylm.model.model_tinylm import TinyLMForCausalLM
from tinylm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model in float32 and evaluation mode, and what came with it."""

    path: Path
    """The model's own path, where a folder of several was given."""
    model: TinyLMForCausalLM
    tokenizer: Tokenizer
    lineage: dict[str, Any]
    notice: str = ""
    """What the user must know about it, in one line; empty for nothing."""

    @property
    def document_start(self) -> list[int]:
        """What documents began with when the model was pretrained: <|endoftext|>, or nothing before November 2026.

        With the tokenizer of another maker, what that one puts before a text.
        """
        has_start = self.lineage.get("document_start", bool(self.tokenizer.text_start))
        return self.tokenizer.document_start if has_start else []


def load_for_use(
    model_path: str | Path,
    adapter: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    device: str | torch.device = "cpu",
    merge: bool = True,
    newest: bool = False,
) -> LoadedModel:
    """Load what `model_path` means (see `resolve_model_path`); an adapter folder brings its base model.

    Args:
        adapter: an adapter folder, or a folder of one run's adapters, to put on the model in place of the path's own;
            empty or None for no other.
        tokenizer_path: tokenizer folder to use instead of the model's own; empty or None for that one.
        merge: fold adapters into the weights; else they stay attached and can be switched off.
        newest: of several runs in a folder, take the newest instead of raising an error.

    Raises:
        FileNotFoundError, ValueError: no such model, or the adapter was trained on another one.
    """
    path = resolve_model_path(model_path, newest=newest)
    model, tokenizer, lineage = load_model(path, device, tokenizer_path=tokenizer_path or None)
    if adapter:
        adapter = resolve_adapter_path(adapter)
        load_adapter(model, adapter, path)
        check_tokenizer(tokenizer, recorded_tokenizer(adapter), adapter, tokenizer_path or path)
    if merge:
        merge_lora(model)
    notice = ""
    if (
        path.suffix in (".pth", ".pt")
        and not tokenizer_path
        and not (path.with_suffix("") / "tokenizer.json").is_file()
    ):
        notice = f"{path} names no tokenizer: the default one is used; give the right one with --tokenizer_path"
    return LoadedModel(path, model, tokenizer, lineage, notice)
