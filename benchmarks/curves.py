"""Loss curves of finished runs as one SVG: the figures of docs/results.md.

    python benchmarks/curves.py out/quickstart/{pretrain,full_sft,lora,dpo} --title "quickstart, tiny" --output loss.svg

Each folder is the --output_dir of one stage and holds `<stage>_<width>_metrics.jsonl`; it gets a panel.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tinylm.evaluation.loss_curves import draw_curves, read_curves
from tinylm.files.atomic import atomic_write


def main(argv: list[str] | None = None) -> int:
    """Draw the curves of the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of stages")
    parser.add_argument("--title", default="", help="a line above the figure: the run, the model and the machine")
    parser.add_argument("--output", type=Path, default=Path("loss.svg"), help="the figure")
    arguments = parser.parse_args(argv)
    try:
        picture = draw_curves([read_curves(folder) for folder in arguments.folders], arguments.title)
        with atomic_write(arguments.output) as file:
            file.write(picture)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
