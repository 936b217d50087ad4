"""Loss curves of finished runs as one SVG or PNG: the figures of docs/results.md.

    pip install matplotlib
    python benchmarks/curves.py out/quickstart/{pretrain,full_sft,lora,dpo} --title "quickstart, tiny" --output loss.svg

Each folder is the --output_dir of one stage and holds `<stage>_<width>_metrics.jsonl`. Each folder gets a panel: loss
in nats per target over optimizer steps. A logged training loss is that of one step, so it is noisy: it is drawn as a
thin line, with the running median as a thick one where there are enough points. Large dots are held-out data. The loss
axis is logarithmic where a few high values (the first steps) would flatten the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

TITLES = {"pretrain": "pretraining", "full_sft": "full SFT", "lora": "LoRA", "dpo": "DPO"}
WINDOW = 7
"""Logged steps of the running median; an odd number."""
FLAT = 4.0
"""The loss axis is logarithmic from this ratio of the highest loss to the median loss."""
THIN: dict[str, Any] = {"alpha": 0.45, "linewidth": 0.7, "markersize": 3}

Points = list[tuple[int, float]]


def read_curves(folder: Path) -> tuple[str, Points, Points]:
    """(stage, training losses, held-out losses) of a stage's output folder; a loss is (step, nats per target).

    Raises:
        ValueError: no metrics there, or metrics of several stages.
    """
    files = sorted(folder.glob("*_metrics.jsonl"))
    if len(files) != 1:
        raise ValueError(f"{folder} holds {len(files)} files *_metrics.jsonl; give the --output_dir of one stage")
    stage = files[0].name.removesuffix("_metrics.jsonl").rsplit("_", 1)[0]
    records: list[dict[str, Any]] = [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()]
    training, held_out = ([(r["step"], r[name]) for r in records if name in r] for name in ("loss", "validation_loss"))
    return stage, training, held_out


def running_median(points: Points, window: int = WINDOW) -> Points:
    """The median of the `window` losses around each point. Towards the ends the window shrinks and stays centred."""
    losses = [loss for _, loss in points]
    reach = [min(window // 2, i, len(points) - 1 - i) for i in range(len(points))]
    return [(step, median(losses[i - reach[i] : i + reach[i] + 1])) for i, (step, _) in enumerate(points)]


def needs_log_axis(points: Points) -> bool:
    """Whether the highest loss is so far above the median that a linear axis would flatten the rest."""
    losses = [loss for _, loss in points]
    return bool(losses) and max(losses) > FLAT * median(losses)


def draw(panels: list[tuple[str, Points, Points]], title: str, path: Path) -> None:
    """One panel per stage, two in a row."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    pyplot.rcParams["svg.hashsalt"] = "tinylm"  # the same numbers give the same file, byte for byte
    columns, rows = min(2, len(panels)), (len(panels) + 1) // 2
    size = (4.5 * columns, 3 * rows + 0.4)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (stage, training, held_out) in zip(axes.flat, panels, strict=False):
        heading = TITLES.get(stage, stage)
        if needs_log_axis(training):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.minorticks_off()
            heading += " (log axis)"
        if training:
            axis.plot(*zip(*training, strict=True), ".-", color="tab:blue", **THIN, label="training, one step")
        if len(training) > 2 * WINDOW:
            smooth, label = running_median(training), f"training, median of {WINDOW}"
            axis.plot(*zip(*smooth, strict=True), color="tab:blue", linewidth=1.8, label=label)
        if held_out:
            axis.plot(*zip(*held_out, strict=True), "o", color="tab:orange", markersize=5, label="held out")
        axis.set(title=heading, xlabel="optimizer step", ylabel="loss, nats per target")
        axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    if title:
        figure.suptitle(title)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(argv: list[str] | None = None) -> int:
    """Draw the curves of the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of stages")
    parser.add_argument("--title", default="", help="a line above the figure: the run, the model and the machine")
    parser.add_argument("--output", type=Path, default=Path("loss.svg"), help="the figure, .svg or .png")
    arguments = parser.parse_args(argv)
    try:
        draw([read_curves(folder) for folder in arguments.folders], arguments.title, arguments.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError:
        parser.error("matplotlib is not installed; pip install matplotlib")
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
