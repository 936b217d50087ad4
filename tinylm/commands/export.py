"""Write a model for other programs.

    tinylm export --model_path out/dpo --format pth --output dpo_512_epoch0.pth

A model folder is already a Hugging Face folder. This command writes the `.pth` of the
original project, lyuzlion/Tiny-Language-Model.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.model_path import ADAPTER
from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import parse_settings
from tinylm.commandline.terminal import make_console, print_next
from tinylm.export.pth import export_pth, unlike_the_original
from tinylm.files.atomic import require_new
from tinylm.model.hf_config import require_llama_shape


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of exporting."""

    model_path: str
    """the model folder; an adapter folder is folded into its base model"""
    output: str
    """the file to write"""
    format: Literal["pth"] = "pth"
    """pth: weights under the names of lyuzlion/Tiny-Language-Model"""
    tokenizer_path: str | None = None
    """tokenizer folder, for a .pth that does not fit the default one"""
    overwrite: bool = False
    """replace the file `output`"""


def main(argv: list[str]) -> int:
    """The command line: load, fold adapters in, write."""
    settings = parse_settings(ExportSettings, argv, "tinylm export", "Write a model for other programs.")
    output, console = Path(settings.output), make_console()
    require_new(output, settings.overwrite or output.is_dir(), "output")  # a folder is refused as one
    loaded = load_for_use(settings.model_path, tokenizer_path=settings.tokenizer_path)
    require_llama_shape(loaded.model.config)
    if unlike := unlike_the_original(loaded.model.config):
        raise ValueError(
            f"{loaded.path} cannot be a .pth, because the original project's code has other fixed settings: "
            f"{', '.join(unlike)}; {_instead(loaded.path)}"
        )
    export_pth(loaded.model, output)
    console.print(f"{loaded.path} written to {output}")
    print_next(console, f"talk to it: tinylm chat --model_path {quote(str(output))}")
    return 0


def _instead(model: Path) -> str:
    """How other programs get the model without an export."""
    if (model / ADAPTER).is_file():
        return f"run tinylm merge --model_path {quote(str(model))}, whose result transformers opens unconverted"
    code = f'from transformers import pipeline; print(pipeline("text-generation", {json.dumps(str(model))})("Once"))'
    return (
        f"transformers opens the folder unconverted: python -c {quote(code)}; for a .pth, pretrain a model with "
        "--qk_norm false --preset small"
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
