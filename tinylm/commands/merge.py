"""Fold a LoRA adapter into its base model, W + (alpha / rank) B A, and save an ordinary model folder.

tinylm merge --model_path out/lora --output_dir out/merged
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tinylm import __version__
from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.model_folder import adapter_base, save_model
from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import parse_settings
from tinylm.commandline.terminal import make_console
from tinylm.model.lora import has_lora, merge_lora


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """Settings of merging."""

    model_path: str
    """the adapter folder; it names its base model"""
    output_dir: str = "out/merged"
    """folder for the merged model"""
    tokenizer_path: str | None = None
    """tokenizer folder; by default the base model's own"""


def main(argv: list[str]) -> int:
    """The command line: load base and adapter, merge, save."""
    settings = parse_settings(MergeSettings, argv, "tinylm merge", "Fold a LoRA adapter into its base model.")
    loaded = load_for_use(settings.model_path, tokenizer_path=settings.tokenizer_path, merge=False)
    if not has_lora(loaded.model):
        raise ValueError(
            f"{loaded.path} is a full model; expected an adapter folder, such as the output of `tinylm lora`"
        )
    _check_output(Path(settings.output_dir), loaded.path)
    save_model(
        Path(settings.output_dir),
        merge_lora(loaded.model),
        loaded.tokenizer,
        {
            "stage": "merged",
            "parent": {"path": str(loaded.path), **loaded.lineage},
            "version": __version__,
            "document_start": bool(loaded.lineage.get("document_start")),
        },
    )
    make_console().print(f"merged model: {settings.output_dir}", markup=False)
    return 0


def _check_output(output: Path, adapter: Path) -> None:
    """Refuse to overwrite the base model or the adapter: without its base, the adapter is useless."""
    target = Path(os.path.realpath(output))
    for source in (adapter_base(adapter), adapter):
        path = Path(os.path.realpath(source))
        if target in (path, *path.parents):
            raise ValueError(
                f"{output} is the adapter's base model (or the adapter itself), or holds it; merging would overwrite "
                "it; choose another --output_dir"
            )


if __name__ == "__main__":
    sys.exit(run_main(main))
