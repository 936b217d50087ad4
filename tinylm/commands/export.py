"""Write a model for other programs.

    tinylm export --model_path out/dpo --format pth --output dpo_512_epoch0.pth

A model folder is already a Hugging Face folder. This command writes the `.pth` of the
original project, lyuzlion/Tiny-Language-Model.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from tinylm.checkpoint.loading import load_for_use
from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import parse_settings
from tinylm.commandline.terminal import make_console
from tinylm.export.pth import export_pth


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


def main(argv: list[str]) -> int:
    """The command line: load, fold adapters in, write."""
    settings = parse_settings(ExportSettings, argv, "tinylm export", "Write a model for other programs.")
    loaded = load_for_use(settings.model_path, tokenizer_path=settings.tokenizer_path)
    export_pth(loaded.model, settings.output)
    make_console().print(f"{loaded.path} written to {settings.output}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
