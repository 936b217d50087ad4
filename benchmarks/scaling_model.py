"""The time of a training step on up to a thousand GPUs, computed, not measured: a table and a figure.

    python -m benchmarks.scaling_model [--output docs/scaling.svg]        (the figure needs matplotlib)

`Machine` holds the assumptions; `benchmarks/communication.py` compares the same equations with a measurement.

    step = forward + backward + update + the part of the exchange that the backward pass does not hide

An exchange of n bytes over W processes moves 2 (W - 1) / W n bytes per process (Patarasuk and Yuan 2009,
doi:10.1016/j.jpdc.2008.09.002), in a ring of 2 (W - 1) messages one after the other, or in a tree of 2 log2 of them
(Sanders et al. 2009, doi:10.1016/j.parco.2009.09.001), whichever is faster.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM

BUCKET_BYTES = 25 * 2**20
"""DistributedDataParallel's default."""
PRESETS = ("small", "large")
GPUS = (1, 8, 16, 64, 256, 1000)
TOKENS_PER_GPU = 32 * 512
TOKENS_PER_STEP = 2**19


@dataclass(frozen=True)
class Machine:
    """Machines like a DGX H100; bytes and operations per second, seconds."""

    gpus: int = 8
    """of a machine"""
    flops: float = 0.35 * 989e12
    """35% of the dense bfloat16 peak of NVIDIA's data sheet; narrow models reach less than wide ones"""
    inside: float = 360e9
    """between GPUs of a machine: 80% of NVLink 4's 450 GB/s in each direction"""
    between: float = 40e9
    """between machines, for each GPU: 80% of a 400 Gb/s adapter"""
    hop_inside: float = 4e-6
    hop_between: float = 14e-6
    """a message's latency; NCCL's own model of Hopper (src/graph/tuning.cc, protocol "simple") counts 3.4 to 4 and 14
    microseconds"""
    memory: float = 2.7e12
    """80% of HBM3's 3.35 TB/s"""


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step, and bytes that each process sends in it."""

    compute: float
    exposed: float
    """the part of the exchange that the backward pass does not hide"""
    sent: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def all_reduce_seconds(num_bytes: float, world: int, machine: Machine) -> float:
    """The time of one all-reduce, by ring or by tree, whichever is faster."""
    if world == 1:
        return 0.0
    machines = -(-world // machine.gpus)
    bandwidth = machine.inside if machines == 1 else machine.between
    ring_hops = 2 * ((world - machines) * machine.hop_inside + (machines - 1) * machine.hop_between)
    tree_hops = (
        2 * (min(world, machine.gpus) - 1) * machine.hop_inside
        + 2 * math.ceil(math.log2(machines)) * machine.hop_between
    )
    return 2 * (world - 1) / world * num_bytes / bandwidth + min(ring_hops, tree_hops)


def gather_seconds(num_bytes: float, world: int, machine: Machine) -> float:
    """The time of one all-gather or reduce-scatter by ring: half the bytes and messages of an all-reduce."""
    if world == 1:
        return 0.0
    machines = -(-world // machine.gpus)
    bandwidth = machine.inside if machines == 1 else machine.between
    hops = (world - machines) * machine.hop_inside + (machines - 1) * machine.hop_between
    return (world - 1) / world * num_bytes / bandwidth + hops


def exposed_seconds(backward: float, exchange: float, last: float) -> float:
    """The part of `exchange` that the backward pass does not hide.

    The last part of the exchange starts when the backward pass has ended, so at least `last` stays.
    """
    return max(last, exchange - backward)


def ddp_step(compute: float, num_bytes: float, world: int, machine: Machine) -> Step:
    """Gradients are sent in buckets, each when it is full; forward and backward take `compute` seconds, 1 : 2."""
    buckets = max(1, round(num_bytes / BUCKET_BYTES))
    one = all_reduce_seconds(num_bytes / buckets, world, machine)
    # The first bucket is full after its share of the backward pass, and hides behind the rest of it.
    hidden = 2 / 3 * compute * (1 - 1 / buckets)
    return Step(compute, exposed_seconds(hidden, buckets * one, one), 2 * (world - 1) / world * num_bytes)


def fsdp_step(compute: float, num_bytes: float, world: int, layers: int, machine: Machine) -> Step:
    """Each layer gathers its weights before its forward and its backward pass, and scatters its gradient."""
    units = layers + 2
    one = gather_seconds(num_bytes / units, world, machine)
    forward = exposed_seconds(compute / 3, units * one, one)  # the next layer's weights come while this one computes
    backward = exposed_seconds(2 / 3 * compute, 2 * units * one, one)
    return Step(compute, forward + backward, 3 * (world - 1) / world * num_bytes)


def predict(preset: str, world: int, tokens: int, machine: Machine) -> tuple[Step, Step]:
    """(DDP, FSDP2): the step of a preset on `world` GPUs with `tokens` each."""
    config = TinyLMConfig.preset(preset, vocab_size=6400)
    with torch.device("meta"):
        model = TinyLMForCausalLM(config)
    parameters = model.num_parameters()
    flops = model.training_flops_per_token(512) * tokens
    update = 7 * 4 * parameters / machine.memory  # AdamW reads 4 float32 numbers for each parameter and writes 3
    ddp = ddp_step(flops / machine.flops, 4 * parameters, world, machine)
    fsdp = fsdp_step(flops / machine.flops, 4 * parameters, world, config.num_hidden_layers, machine)
    return (
        Step(ddp.compute + update, ddp.exposed, ddp.sent),
        Step(fsdp.compute + update / world, fsdp.exposed, fsdp.sent),
    )


def seconds_per_token_alone(preset: str, of_step: bool, machine: Machine) -> float:
    """One GPU alone, with the tokens of one GPU or with those of the whole step."""
    tokens = TOKENS_PER_STEP if of_step else TOKENS_PER_GPU
    return predict(preset, 1, tokens, machine)[0].seconds / tokens


def table(machine: Machine) -> str:
    """Both presets, with a constant number of tokens per GPU and per step, as a table in Markdown."""
    lines = [
        "| model | GPUs | tokens per GPU | DDP ms (exposed) | efficiency | FSDP2 ms (exposed) | DDP million tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for preset in PRESETS:
        for of_step in (False, True):
            alone = seconds_per_token_alone(preset, of_step, machine)
            for world in GPUS[1:]:
                tokens = TOKENS_PER_STEP // world if of_step else TOKENS_PER_GPU
                ddp, fsdp = predict(preset, world, tokens, machine)
                lines.append(
                    f"| {preset} | {world} | {tokens:,} | {1e3 * ddp.seconds:.2f} ({1e3 * ddp.exposed:.2f}) | "
                    f"{alone * tokens / ddp.seconds:.0%} | {1e3 * fsdp.seconds:.2f} ({1e3 * fsdp.exposed:.2f}) | "
                    f"{1e-6 * world * tokens / ddp.seconds:,.1f} |"
                )
    return "\n".join(lines)


def draw(path: Path, machine: Machine) -> None:
    """Efficiency over the number of GPUs; on the left with constant tokens per GPU, on the right per step."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "tinylm"  # the same numbers give the same file
    worlds = sorted({*(8 * 2**power for power in range(7)), 1, 2, 4, 1000})
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.3), sharey=True, layout="constrained")
    titles = (f"{TOKENS_PER_GPU:,} tokens per GPU", f"{TOKENS_PER_STEP:,} tokens per step, shared out")
    for panel, title, of_step in zip(panels, titles, (False, True), strict=True):
        for preset, colour in zip(PRESETS, ("tab:blue", "tab:orange"), strict=True):
            alone = seconds_per_token_alone(preset, of_step, machine)
            for kind, style in ((0, "-"), (1, "--")):
                values = []
                for world in worlds:
                    tokens = TOKENS_PER_STEP / world if of_step else TOKENS_PER_GPU
                    values.append(100 * alone * tokens / predict(preset, world, int(tokens), machine)[kind].seconds)
                name = f"{preset}, {'FSDP2' if kind else 'DDP'}, computed"
                panel.plot(worlds, values, style, color=colour, label=name)
        panel.set(title=title, xlabel="GPUs (log axis)", xscale="log", ylim=(0, 105))
        panel.set_xticks([1, 8, 64, 1000], ["1", "8", "64", "1,000"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("tokens/s per GPU, % of one GPU alone")
    panels[0].legend(frameon=False)
    figure.suptitle("Computed, not measured: presets small and large on machines of eight H100 GPUs")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(argv: list[str] | None = None) -> int:
    """Print the table; with --output, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the figure, .svg or .png")
    arguments = parser.parse_args(argv)
    print(table(Machine()))
    if arguments.output is not None:
        try:
            draw(arguments.output, Machine())
        except ImportError:
            parser.error("matplotlib is not installed; pip install matplotlib")
    return 0


if __name__ == "__main__":
    sys.exit(main())
