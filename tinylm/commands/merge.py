"""Fold a LoRA adapter into its base model, W + (alpha / rank) B A, and save an ordinary model folder.

tinylm merge --model_path out/lora --output_dir out/merged
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.model_folder import adapter_base, save_model
from tinylm.checkpoint.model_path import CONFIG
from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import parse_settings
from tinylm.commandline.terminal import make_console, print_next
from tinylm.files.atomic import require_new
from tinylm.files.untrusted import read_json
from tinylm.model.lora import has_lora, merge_lora
from tinylm.model.weights import is_tied
from tinylm.system.code_version import code_version


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """Settings of merging."""

    model_path: str
    """the adapter folder; it names its base model"""
    output_dir: str = "out/merged"
    """folder for the merged model"""
    tokenizer_path: str | None = None
    """tokenizer folder; by default the base model's own"""
    overwrite: bool = False
    """replace the model in output_dir"""


def main(argv: list[str]) -> int:
    """The command line: load base and adapter, merge, save."""
    settings = parse_settings(MergeSettings, argv, "tinylm merge", "Fold a LoRA adapter into its base model.")
    loaded = load_for_use(settings.model_path, tokenizer_path=settings.tokenizer_path, merge=False)
    if not has_lora(loaded.model):
        raise ValueError(
            f"{loaded.path} is a full model; expected an adapter folder, such as the output of `tinylm lora`"
        )
    output = Path(settings.output_dir)
    _check_output(output, loaded.path)
    require_new(output / CONFIG, settings.overwrite, "output_dir")
    was_tied = is_tied(loaded.model)
    save_model(output, merge_lora(loaded.model), loaded.tokenizer, merged_lineage(loaded.path, loaded.lineage))
    console = make_console()
    console.print(f"merged model: {output}")
    if was_tied and not is_tied(loaded.model):
        console.print("its embedding and its output head, one table until now, are two: the adapter changed them apart")
    print_next(console, f"talk to it: tinylm chat --model_path {quote(str(output))}")
    return 0


def merged_lineage(adapter: Path, lineage: dict[str, Any]) -> dict[str, Any]:
    """All that the adapter was made from (data, settings, seed), and the same of its base model.

    Args:
        lineage: the adapter's, or that of its base if it has none.
    """
    own, base = lineage_of(adapter), adapter_base(adapter)
    parent = {"path": str(adapter), "stage": own.get("stage"), "weights": own.get("base_fingerprint")}
    made = {name: value for name, value in own.items() if name != "base_fingerprint"}
    return {
        **made,
        "stage": "merged",
        "parent": parent,
        "document_start": bool(lineage.get("document_start")),
        "base": {"path": str(base), "lineage": lineage_of(base)},
        **code_version(),
    }


def lineage_of(model: Path) -> dict[str, Any]:
    """What a model folder says about its making; empty for a `.pth`, and for a folder of another program."""
    path = model / "lineage.json"
    return read_json(path) if path.is_file() else {}


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
