"""When a run breaks: steps whose loss or gradient is not a number, and losses far above those before."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from tinylm.dataset.batches import Batch
from tinylm.files.atomic import atomic_write

MAX_SKIPS = 10
"""Steps in a row whose loss or gradient may be not a number; then the run has diverged and ends."""


class SpikeWatch:
    """Tells when a loss stands far above those before it; a spike may mend itself, so it only tells."""

    def __init__(self, num_steps: int = 50, factor: float = 6.0) -> None:
        self.losses: deque[float] = deque(maxlen=num_steps)
        self.factor = factor

    def warning(self, loss: float) -> str | None:
        """A warning if `loss` is more than `factor` standard deviations above the mean of the last `num_steps`."""
        losses, text = self.losses, None
        if len(losses) == losses.maxlen:
            mean = sum(losses) / len(losses)
            deviation = (sum((x - mean) ** 2 for x in losses) / len(losses)) ** 0.5
            if loss > mean + self.factor * deviation:
                text = f"the loss jumped to {loss:.4g}, after {mean:.4g} on average; look at the data of this step"
        losses.append(loss)
        return text


def write_bad_batch(path: Path, step: int, batches: Iterable[Batch], decode: Callable[[list[int]], str] | None) -> None:
    """Write the rows of a step whose loss was not a number, for inspection: a JSON object a line."""
    with atomic_write(path) as file:
        for number, batch in enumerate(batches):
            for ids, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
                text = {"text": decode(ids)} if decode is not None else {}
                row = {"step": step, "micro_batch": number, **text, "input_ids": ids, "targets": targets}
                file.write(json.dumps(row).encode() + b"\n")
