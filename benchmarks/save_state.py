"""What saving costs a training step: steps with a save beside them against steps without, in turn.

    python benchmarks/save_state.py --preset large

A save's own time is that of copying, writing, hashing and flushing a state to the disk. It costs the steps beside it
what they wait for the copy (`waits`), and what they lose to the writing thread, which takes from the same cores and the
same memory (`slower`). On a GPU only the first is left.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tinylm.checkpoint.training_state import StateWriter
from tinylm.model.config import PRESETS
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.system.runtime import setup_runtime
from tinylm.trainer.run.resume import optimizer_states


class TimedWriter(StateWriter):
    """Adds up how long updates wait for the copy."""

    waited = 0.0

    def wait_for_copy(self) -> None:
        started = time.perf_counter()
        super().wait_for_copy()
        self.waited += time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="large")
    parser.add_argument(
        "--saves", type=int, default=4, help="number of saves; the first fills memory and is not counted"
    )
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a training step")
    parser.add_argument("--folder", help="where to save; default: a temporary folder")
    options = parser.parse_args()
    runtime = setup_runtime("auto", "auto")
    model = TinyLMForCausalLM(TinyLMConfig.preset(options.preset)).to(runtime.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, 1000, (1, options.tokens), device=runtime.device)

    def step() -> float:
        started = time.perf_counter()
        with runtime.autocast():
            loss = torch.nn.functional.cross_entropy(model(ids)[0].float(), ids[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    step()
    size = 12 * model.num_parameters()
    waits, slower = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        writer = TimedWriter(Path(folder), [optimizer])
        for number in range(options.saves):
            plain = statistics.median(step() for _ in range(4))
            weights = {name: p.detach() for name, p in model.named_parameters()}
            writer.waited, started, num_steps, beside = 0.0, time.perf_counter(), 0, 0.0
            writer.save({"step": number, "weights": weights, "optimizers": optimizer_states(model, [optimizer])})
            asked = time.perf_counter() - started
            while writer.is_busy:
                beside += step()
                num_steps += 1
            if error := writer.wait():
                raise error
            own = writer.seconds
            waits.append((asked + writer.waited) / own)
            slower.append(beside / num_steps / plain - 1)
            print(
                f"save {number}: {own:5.2f} s for {size / 1e9:.2f} GB; training waits {1000 * waits[-1] * own:.0f} ms, "
                f"{waits[-1]:.1%}; {num_steps} steps beside it, each {slower[-1]:+.0%} beside {plain:.2f} s"
            )
    medians = statistics.median(waits[1:]), statistics.median(slower[1:])
    print("median after the first: waits {:.1%} of the save's own time, steps slower by {:+.0%}".format(*medians))


if __name__ == "__main__":
    main()
