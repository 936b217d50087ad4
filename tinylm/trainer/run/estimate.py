"""How long a run takes and how much memory it needs: before the first step by estimate, later by measurement."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.dataset.batches import Dataset
from tinylm.model.config import TinyLMConfig
from tinylm.system.memory import is_out_of_memory, memory_limit, used_memory
from tinylm.trainer.core.distributed import is_sharded
from tinylm.trainer.run.stage import Learner, Plan
from tinylm.trainer.run.validation import num_batches_of

MATMUL_SHARE = 0.4
"""Share of the matmul speed that a training step is expected to reach."""
VALIDATION_COST = 0.5
"""Time of a token in a validation, of that in a training step: a third of the operations, on cores that wait more."""
SAVED_FACTOR = {"cpu": 1.8, "cuda": 1.15}
"""Peak memory of forward and backward pass, divided by the activations that autograd keeps between the two. That of a
CPU is measured: 1.13 GB were taken where 1.2 were announced. A GPU's allocator leaves fewer gaps."""
COMPILED_SHARE = 0.6
"""Of the activations, a compiled model keeps about this share: it computes the others again."""
OVERHEAD = {"cpu": 0.3e9, "cuda": 0.6e9}
"""Bytes that the libraries take for themselves when they begin to compute."""
USABLE = 0.95
"""Share of the memory that a run may plan with."""
COMPILED_SAVES = {"cpu": 0.15, "cuda": 0.2}
"""Share of a run's time that compiling saves, measured; on a CPU only for models of at most `NARROW`."""
NARROW = 384
"""Width up to which the products leave a CPU time to lose: `tiny` (256 wide) gains, `small` (512) does not."""
WORTH_COMPILING = 120.0
"""Seconds that compiling must save; it takes half a minute to a minute itself."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a process needs, in two parts, and what it may use."""

    fixed: float
    per_row: float
    rows: int
    """Rows (or pairs) of a micro-batch."""
    limit: float | None
    """What the device has for this process; None if unknown."""

    @property
    def needed(self) -> float:
        """All of it."""
        return self.fixed + self.rows * self.per_row

    @property
    def fitting_rows(self) -> int:
        """The largest power of two of rows that fits; 0 if not even one does."""
        room = ((self.limit or 0.0) * USABLE - self.fixed) / self.per_row
        return 1 << (int(room).bit_length() - 1) if room >= 1 else 0


def expected_memory(learner: Learner, plan: Plan) -> Memory:
    """What this process will need at its peak; all processes must call it, before the model is compiled.

    Weights are float32. Trained weights have a gradient and two moments, and on a CPU a copy of three of these while a
    state is saved. Activations are measured: a batch of a row is computed, and what autograd keeps of it is counted.
    """
    settings, runtime, model = plan.settings, plan.runtime, learner.model
    device = runtime.device
    kind = "cuda" if device.type == "cuda" else "cpu"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    holders = runtime.world_size if settings.sharding == "fsdp" else 1
    limit = memory_limit(device)
    if limit is not None and kind == "cpu":
        limit //= runtime.local_world_size
    used = used_memory(device)  # the weights are part of it
    state = trained * (12 + (12 if kind == "cpu" else 0)) / holders
    state += plan.at_once * _copied_weights(learner, plan)
    kept = COMPILED_SHARE if plan.compiled else 1.0
    per_row = SAVED_FACTOR[kind] * kept * _saved_bytes(learner, plan)
    return Memory(used + OVERHEAD[kind] + state, per_row, plan.rows_in_memory, limit)


def _saved_bytes(learner: Learner, plan: Plan) -> float:
    """Bytes that autograd keeps for the backward pass of one row (or pair)."""
    model, runtime = learner.model, plan.runtime
    if is_sharded(model):  # its weights are together only while it computes, so by rule of thumb
        config = model.config
        per_token = 80 * config.hidden_size * config.num_hidden_layers + 12 * config.vocab_size
        return float(plan.settings.max_seq_len * per_token)
    steps = plan.source.with_rows_per_step(runtime.world_size).batches(0, 0)
    batch = next(steps)[0].to(runtime.device)
    getattr(steps, "close", lambda: None)()  # its threads
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no other gets the same address
        return tensor

    was_training = model.training
    model.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), runtime.autocast():
            learner.objective(model, batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        advice = f"choose a smaller model, or a --max_seq_len below {plan.settings.max_seq_len}"
        raise RuntimeError(f"out of memory with a single row; {advice}") from error
    model.train(was_training)
    for weight in model.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return max(1.0, saved - _copied_weights(learner, plan))


def _copied_weights(learner: Learner, plan: Plan) -> float:
    """Bytes of the matrices' copies in half precision, which each part of a batch makes for itself."""
    half = plan.runtime.compute_dtype != torch.float32
    return half * 2.0 * sum(p.numel() for p in learner.model.parameters() if p.dim() > 1)


def require_memory(memory: Memory, plan: Plan) -> None:
    """Refuse a plan that does not fit into the device; all processes must call it.

    Raises:
        ValueError: it does not fit; the message says what would.
    """
    runtime, settings = plan.runtime, plan.settings
    is_too_large = memory.limit is not None and memory.needed > USABLE * memory.limit
    if not runtime.any_rank(is_too_large):
        return
    place = "the GPU" if runtime.device.type == "cuda" else "the machine"
    shares = runtime.local_world_size
    has = f"{place} has {(memory.limit or 0) / 1e9:,.1f} GB" + (" for each process" if shares > 1 else "")
    needs = f"the run needs about {memory.needed / 1e9:,.1f} GB of memory; {has}"
    fitting = memory.fitting_rows
    if not fitting:
        raise ValueError(
            f"{needs}, not enough for a --batch_size of 1; choose a smaller model, or a --max_seq_len below "
            f"{settings.max_seq_len}"
        )
    steps = -(-memory.rows * settings.accumulation_steps // fitting)
    raise ValueError(f"{needs}; pass --batch_size {fitting} --accumulation_steps {steps} for the same rows per step")


def expected_seconds(plan: Plan, matmul_flops: float, flops_per_token: float, validation: Dataset | None) -> float:
    """Time of the steps and validations that are still to come.

    Args:
        matmul_flops: the device's measured speed, in operations per second.
        flops_per_token: of a training step.
    """
    settings, runtime = plan.settings, plan.runtime
    per_token = flops_per_token / (MATMUL_SHARE * matmul_flops * runtime.world_size)
    rows = plan.rows_per_step * plan.num_steps
    if validation is not None:
        batches = num_batches_of(validation, settings.batch_size, settings.eval_batches)
        rows += VALIDATION_COST * plan.num_validations() * min(len(validation), batches * settings.batch_size)
    return rows * settings.max_seq_len * per_token


def compiling_saves_time(config: TinyLMConfig, device: torch.device, seconds: float) -> bool:
    """Whether a run of `seconds` would be shorter with torch.compile by more than compiling takes."""
    share = COMPILED_SAVES.get(device.type, 0.0)
    if device.type == "cpu" and config.hidden_size > NARROW:
        return False
    return share * seconds > WORTH_COMPILING


class Pace:
    """Time left, from the steps and validations so far.

    The first steps take longer, with compilation a hundred times as long, so they count only until there are others.
    """

    NUM_FIRST, NUM_RECENT = 2, 50

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.steps: deque[float] = deque(maxlen=self.NUM_RECENT)
        self.validations: deque[float] = deque(maxlen=self.NUM_RECENT)
        self.num_steps = 0

    def add_step(self, seconds: float) -> None:
        """Count a step."""
        self.num_steps += 1
        if self.num_steps <= self.NUM_FIRST + 1:
            self.steps.clear()  # only the latest of the first ones
        self.steps.append(seconds)

    def add_validation(self, seconds: float) -> None:
        """Count a validation."""
        self.validations.append(seconds)

    def seconds_left(self, step: int) -> float:
        """After `step`, at least one step having been counted."""
        left = (self.plan.num_steps - step) * sum(self.steps) / len(self.steps)
        if self.validations:
            left += self.plan.num_validations(step) * sum(self.validations) / len(self.validations)
        return left
