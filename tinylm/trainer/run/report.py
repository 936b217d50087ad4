"""What a run says of itself: what will happen before the first step, and what happened after the last."""

from __future__ import annotations

from tinylm.trainer.run.run_state import Run
from tinylm.trainer.run.trainer_utils import format_seconds, print_facts

EXPECTED_MATMUL_SHARE = 0.4
"""Share of the measured matmul speed assumed for the estimate before the first step; the live line then measures."""


def print_plan(run: Run, flops: float, matmul_flops: float) -> None:
    """What will happen: sizes, steps, device, estimated time and memory.

    Args:
        flops: operations of a training step per token.
        matmul_flops: the device's measured speed, operations per second.
    """
    settings, config, runtime = run.settings, run.model.config, run.runtime
    total = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    rows = run.sampler.rows_per_step
    tokens = run.num_steps * rows * settings.max_seq_len
    seconds = tokens * flops / (EXPECTED_MATMUL_SHARE * matmul_flops * runtime.world_size)
    # Activations per token: about 20 C numbers of 2 bytes for each block, and logits, 3 V of 4 bytes. fp32
    # weights; for those that train also a gradient and two moments, of which FSDP gives each process a share.
    activations = settings.batch_size * settings.max_seq_len * (
        20 * config.hidden_size * config.num_hidden_layers * 2 + 3 * config.vocab_size * 4
    )  # fmt: skip
    holders = runtime.world_size if settings.sharding == "fsdp" else 1
    kept = 12 * trained if runtime.device.type == "cpu" else 0  # the copy of weights and moments that is saved
    memory = (4 * total + 12 * trained + kept) / holders + activations
    unit = "pairs" if run.stage == "dpo" else "rows"
    device = f"{runtime.device}, {str(runtime.compute_dtype).removeprefix('torch.')}"
    if runtime.world_size > 1:
        device += f", {runtime.world_size} processes" + (", each a share of the model" if holders > 1 else "")
    facts = {
        "parameters": f"{total:,}"
        + (f", of which {trained:,} train ({trained / total:.2%})" if trained < total else ""),
        "data": f"{len(run.train_data):,} {unit}, {run.train_data.num_targets:,} target tokens",
        "steps": f"{run.num_steps:,} in {settings.epochs} epoch(s), each {rows} {unit} x {settings.max_seq_len}",
        "device": device,
        "estimate": f"about {format_seconds(seconds)}, {memory / 1e9:.1f} GB of memory",
        "output": str(run.last_folder),
    }
    if run.start_step:
        facts["resuming"] = f"from step {run.start_step:,}"
    print_facts(run.console, f"{run.stage}: what will happen", facts)


def print_result(run: Run, seconds: float, change: float) -> None:
    """What happened: time, best loss, how far the weights moved (relative to their size), where the model is."""
    facts = {"time": format_seconds(seconds)}
    if run.best_validation_loss is not None:
        facts["best validation loss"] = f"{run.best_validation_loss:.4f}"
    if run.num_skipped:
        facts["skipped"] = f"{run.num_skipped:,} of {run.num_steps:,} steps, whose loss or gradient was not a number"
    facts["weights moved"] = f"{change:.2%} of their size{run.moved_since}"
    facts["model"] = str(run.last_folder)
    print_facts(run.console, f"{run.stage}: done", facts)
    if change < 1e-5 and run.start_step < run.num_steps:
        run.console.print("warning: the weights hardly moved; raise --learning_rate or train for more steps")
