"""A process that does a few training steps and prints its peak memory in bytes: `tinylm bench --only memory`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from tinylm.benchmark import training, transformers_peer
from tinylm.benchmark.figures import OURS
from tinylm.commandline.terminal import make_console
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.system.runtime import DTYPE_NAMES, Runtime, setup_runtime
from tinylm.trainer.core.gradients import micro_batches_at_once
from tinylm.trainer.core.optimizer import make_optimizers

STEPS = 3
"""The optimizer's state is made in the first step; the second has it all."""


def do_steps(contender: str, task: dict[str, Any]) -> Runtime:
    """Train for a few steps. Only ours sets the allocator up, as `setup_runtime` does in every run of ours."""
    config, length, rows = TinyLMConfig(**task["config"]), task["length"], task["rows"]
    if contender == OURS:
        runtime = setup_runtime(task["device"], task["dtype"])
        model = TinyLMForCausalLM(config).to(runtime.device)
        at_once = micro_batches_at_once(rows, model, runtime)
        parts = [training.make_batch(config, rows // at_once, length) for _ in range(at_once)]
        training.training_turn(model, make_optimizers(model), parts, runtime, STEPS)()
    else:
        runtime = Runtime(torch.device(task["device"]), DTYPE_NAMES[task["dtype"]])
        llama = transformers_peer.make_llama(config).to(runtime.device)
        batch = training.make_batch(config, rows, length)
        transformers_peer.training_turn(llama, batch, runtime, STEPS)()
    return runtime


def peak_memory(runtime: Runtime) -> int:
    """Bytes that this process used at most; of the GPU, if it used one."""
    if runtime.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(runtime.device))
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would tell the peak of the process that started this one, if that was higher
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), flags=re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    make_console().print(peak_memory(do_steps(sys.argv[1], json.loads(sys.argv[2]))))
