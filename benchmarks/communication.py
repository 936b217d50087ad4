"""What two processes send each other in a training step, counted by the network interface, and how long it takes.

    python -m benchmarks.communication [--preset small] [--tokens 256] [--steps 6]        (Linux, CPU, gloo)

The processes run in a network namespace of their own where the system allows one (`unshare --net`, as root), so the
counters of its loopback interface count nothing else. The step's time is held against `benchmarks/scaling_model.py`,
given the measured time of the parts: computing without an exchange, and an exchange without computing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.scaling_model import BUCKET_BYTES, exposed_seconds
from tinylm.dataset.rows import Batch, build_row, collate_rows
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.system.runtime import Runtime, setup_runtime
from tinylm.trainer.core.distributed import SHARDINGS, GradientExchange, shard
from tinylm.trainer.core.objectives import next_token_loss


def bytes_sent() -> int:
    """By this namespace's loopback interface so far. (/sys would show the counters of the namespace it belongs to.)"""
    (line,) = [line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.partition(":")[2].split()[8])  # 8 columns of what was received come first


def median_seconds(work: Callable[[], object], times: int, runtime: Runtime) -> tuple[float, float]:
    """(seconds, bytes sent by both processes) of `work`, which both begin together; once more before, unmeasured."""
    seconds, sent = [], []
    for _ in range(times + 1):
        runtime.barrier()
        before, start = bytes_sent(), time.perf_counter()
        work()
        seconds.append(runtime.max_over_ranks(time.perf_counter() - start))
        runtime.barrier()
        sent.append(bytes_sent() - before)
    return statistics.median(seconds[1:]), statistics.median(sent[1:])


def random_batch(tokens: int, rank: int) -> Batch:
    ids = torch.randint(1, 6400, (tokens,), generator=torch.Generator().manual_seed(rank)).to(torch.int32).numpy()
    return collate_rows([build_row([(ids, ids > 0)])], tokens, pad_id=0)


def measure_parts(
    model: TinyLMForCausalLM, batch: Batch, num_bytes: int, steps: int, runtime: Runtime
) -> dict[str, float]:
    """Seconds of what a step consists of, each by itself, and the "idle" bytes of a measurement of nothing."""
    gradients, number = torch.ones(num_bytes // 4), torch.ones(1)
    works: dict[str, Callable[[], object]] = {
        "forward": lambda: next_token_loss(model, batch),
        "pass": lambda: next_token_loss(model, batch)[0].backward(),
        "exchange": lambda: runtime.all_reduce_sum(gradients),
        "message": lambda: runtime.all_reduce_sum(number),
    }
    parts = {name: median_seconds(work, steps, runtime)[0] for name, work in works.items()}
    return {**parts, "idle": median_seconds(lambda: None, steps, runtime)[1]}


def worker(preset: str, tokens: int, steps: int) -> None:
    """One of the two processes; the first one prints."""
    runtime = setup_runtime("cpu", "float32")
    batch = random_batch(tokens, runtime.rank)
    parts: dict[str, float] = {}
    for sharding in SHARDINGS:
        torch.manual_seed(0)
        model = TinyLMForCausalLM(TinyLMConfig.preset(preset, vocab_size=6400))
        num_bytes = 4 * sum(p.numel() for p in model.parameters())
        parts = parts or measure_parts(model, batch, num_bytes, steps, runtime)
        shard(model, sharding, runtime)
        step = GradientExchange(model, next_token_loss, runtime)

        def one_step(step: GradientExchange = step) -> None:
            with step.micro_batch(batch, is_last=True):
                step.loss(batch)[0].backward()

        seconds, sent = median_seconds(one_step, steps, runtime)
        if runtime.is_main:
            each = (sent - parts["idle"]) / runtime.world_size
            print(f"{'DDP' if sharding == 'none' else 'FSDP2'}: {each / 1e6:.1f} MB sent by each process in a step")
            print(f"     {each / num_bytes:.3f} times the model's {num_bytes / 1e6:.1f} MB; {seconds:.3f} s")
            if sharding == "none":
                report(parts, num_bytes, seconds)


def report(parts: dict[str, float], num_bytes: int, measured: float) -> None:
    """The parts, and the step that they predict."""
    buckets = max(1, round(num_bytes / BUCKET_BYTES))
    backward = parts["pass"] - parts["forward"]
    hidden = parts["pass"] + exposed_seconds(
        backward * (1 - 1 / buckets), parts["exchange"], parts["exchange"] / buckets
    )
    print(
        f"     alone: forward {parts['forward']:.3f} s, backward {backward:.3f} s, exchange {parts['exchange']:.3f} s"
    )
    print(f"     a message of 4 bytes: {1e3 * parts['message']:.2f} ms")
    for name, predicted in (("with overlap", hidden), ("one after the other", parts["pass"] + parts["exchange"])):
        print(f"     predicted {name}: {predicted:.3f} s ({predicted / measured - 1:+.0%})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", help="tiny, small or large")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each process in a step")
    parser.add_argument("--steps", type=int, default=6, help="steps measured; the median counts")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        worker(arguments.preset, arguments.tokens, arguments.steps)
        return 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += ["--master-port=29511", "-m", "benchmarks.communication", *sys.argv[1:]]
    private = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    allowed = subprocess.run([*private, "true"], capture_output=True, check=False).returncode == 0
    if not allowed:
        print("no network namespace of our own: other programs' traffic on the loopback interface counts too")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run([*(private if allowed else []), *command], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
