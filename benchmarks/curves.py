"""Loss curves of finished runs as one SVG or PNG: the pictures of docs/results.md.

    pip install matplotlib
    python benchmarks/curves.py out/quickstart/pretrain out/quickstart/full_sft --output loss.svg

Each folder is a stage's --output_dir, where `<stage>_<width>_metrics.jsonl` lies. One panel per folder: loss over
optimizer steps in nats per target, training as a line, held-out data as dots.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TITLES = {"pretrain": "pretraining", "full_sft": "full SFT", "lora": "LoRA", "dpo": "DPO"}


def read_curves(folder: Path) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    """(stage, {"training": [(step, loss)], "held out": [(step, loss)]}) of a stage's output folder.

    Raises:
        ValueError: no metrics there, or metrics of several stages.
    """
    files = sorted(folder.glob("*_metrics.jsonl"))
    if len(files) != 1:
        raise ValueError(f"{folder} holds {len(files)} files *_metrics.jsonl; give the --output_dir of one stage")
    records: list[dict[str, Any]] = [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()]
    names = {"training": "loss", "held out": "validation_loss"}
    curves = {label: [(r["step"], r[name]) for r in records if name in r] for label, name in names.items()}
    return files[0].name.removesuffix("_metrics.jsonl"), curves


def main(argv: list[str] | None = None) -> int:
    """Draw the curves of each folder side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of stages")
    parser.add_argument("--output", type=Path, default=Path("loss.svg"), help="the picture, .svg or .png")
    arguments = parser.parse_args(argv)
    try:
        panels = [read_curves(folder) for folder in arguments.folders]
        import matplotlib
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError:
        parser.error("matplotlib is not installed; pip install matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "tinylm"  # the same picture from the same numbers, byte for byte
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.7 * len(panels), 3.2), squeeze=False)
    for axis, (stage, curves) in zip(axes[0], panels, strict=True):
        for (label, points), style in zip(curves.items(), ("-", "o-"), strict=True):
            if points:
                axis.plot(*zip(*points, strict=True), style, linewidth=1, markersize=3, label=label)
        axis.set(title=TITLES.get(stage, stage), xlabel="step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss, nats per target")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(arguments.output, metadata={"Date": None} if arguments.output.suffix == ".svg" else None)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
