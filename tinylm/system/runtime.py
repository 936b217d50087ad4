"""What a run runs on: device, number formats, processes, seed.

Only this module asks torch about the machine.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from tinylm.system.allocator import keep_freed_memory
from tinylm.system.rendezvous import fresh_store

DtypeName = Literal["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
InferenceDtypeName = Literal[DtypeName, "int8"]
"""Precisions of a model that is used, not trained."""

# --------------------------------------------------------------------------------------------------
# Device, precision, processes
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runtime:
    """The device, precision and place of one process.

    `compute_dtype` is the format of matrix products; parameters and optimizer state are always float32. int8 is only
    for a model that is used, not trained.
    `rank` numbers the processes of all machines, `local_rank` those of this machine. `seed` is the run's.
    """

    device: torch.device
    compute_dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    seed: int = 0

    @property
    def is_main(self) -> bool:
        """True in the only process that prints and writes."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision inside the block, none in float32 and for int8 weights. Without a cache of weights: threads
        would share it.
        """
        if self.compute_dtype in (torch.float32, torch.int8):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype, cache_enabled=False)

    def seed_step(self, step: int) -> None:
        """Seed the generators for optimizer step `step` (from 0): (seed, step, rank) decide what dropout draws in it.

        So a training state needs no generator state, and what is done between two steps changes neither.
        """
        torch.manual_seed((self.seed * 1_000_003 + step) * 1_009 + self.rank)

    @contextlib.contextmanager
    def deterministic(self) -> Iterator[None]:
        """Inside the block CUDA adds in a fixed order, so that a resumed run equals an uninterrupted one bit for bit.

        Otherwise the backward passes of attention and of lookups add what is ready first. A CPU needs no telling.
        """
        if self.device.type != "cuda":
            yield
            return
        # A debugging aid that writes every tensor twice.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all processes, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def max_over_ranks(self, value: float) -> float:
        """The largest `value` of all processes; all must call it together."""
        if self.world_size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float32, device=self.device)  # MPS has no float64
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true in any process. All must call it together; all get the same answer."""
        return bool(self.max_over_ranks(flag))

    @property
    def is_restart(self) -> bool:
        """Whether torchrun has restarted this process, after another one was lost."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0) > 0

    @property
    def launch_id(self) -> str:
        """The id that torchrun was started with (--rdzv-id), the same for all processes and restarts; else ""."""
        found = os.environ.get("TORCHELASTIC_RUN_ID", "")
        return "" if found == "none" else found

    @property
    def local_world_size(self) -> int:
        """Processes of the run on this machine, as torchrun sets it."""
        found = os.environ.get("LOCAL_WORLD_SIZE", "")
        return min(int(found), self.world_size) if found.isdigit() and int(found) else 1

    def barrier(self) -> None:
        """Wait until every process has reached this point."""
        if self.world_size > 1:
            dist.barrier()


def setup_runtime(
    device: str = "auto", dtype: str = "auto", timeout: float = 600.0, seed: int = 0, only_uses: bool = False
) -> Runtime:
    """Choose device and precision, and join the other processes if torchrun started this one.

    Args:
        device: auto (CUDA, then MPS, then the CPU), cpu, cuda (under torchrun the GPU LOCAL_RANK), cuda:N or mps.
        dtype: auto (bfloat16 where the hardware has it, else float32), float32, bfloat16 or float16 (or fp32, ...).
        timeout: seconds without an answer after which another process counts as lost.
        seed: of the run; see `Runtime.seed_step`.
        only_uses: the model is not trained. Then int8 is a precision, too: that of its weights, on a CPU.

    Raises:
        ValueError: the device is unknown or absent, or the precision does not suit it.
    """
    rank, world_size, local_rank = _ranks_from_environment()
    chosen = _choose_device(device, local_rank)
    compute_dtype = _int8_on(chosen) if only_uses and dtype == "int8" else _choose_dtype(dtype, chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # `Runtime.deterministic` needs it from the start
    elif chosen.type == "cpu":
        keep_freed_memory()
    if world_size > 1 and not dist.is_initialized():
        _check_one_gpu_each(chosen, device, local_rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",  # states are saved from the CPU
            store=_store_of_this_round(rank, world_size, timeout),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        atexit.register(shutdown_runtime)
    return Runtime(chosen, compute_dtype, rank, world_size, local_rank, seed)


def _store_of_this_round(rank: int, world_size: int, timeout: float) -> dist.Store | None:
    """The store in which the processes find each other; None (torch makes one) if torchrun did not start them."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return fresh_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank, world_size, timeout)


def shutdown_runtime() -> None:
    """Leave the process group, if this process is in one. Safe to call twice, and after an interruption."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor` on `device`. From the CPU to a CUDA GPU it is copied while both work on: a plain copy would wait."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators on every device. `seed` is at least 0 and below 2**32."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed}; expected an integer from 0 to {2**32 - 1}; choose one in that range")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def cpu_has_bf16() -> bool:
    """True when this CPU multiplies bfloat16 in hardware: AVX512-BF16 or AMX.

    Elsewhere bfloat16 on a CPU is emulated, and slower than float32.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        return _names_bf16(torch.cpu.get_capabilities())
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        return False
    return flags is not None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.group(1).split())


def _names_bf16(capabilities: Mapping[str, Any]) -> bool:
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16"))


def measured_matmul_flops(runtime: Runtime) -> float:
    """Speed of a large square matrix product in the run's compute dtype, in FLOP/s (2n^3 for n x n by n x n).

    The speed of a training step is reported as a share of it. Takes 0.3 seconds or a little more.
    """
    size = 4096 if runtime.device.type == "cuda" else 1024
    left = torch.rand(size, size, device=runtime.device, dtype=runtime.compute_dtype)
    right = torch.rand(size, size, device=runtime.device, dtype=runtime.compute_dtype)
    best = float("inf")
    deadline = time.perf_counter() + 0.3
    torch.mm(left, right)  # the first product includes set-up
    _synchronize(runtime.device)
    while time.perf_counter() < deadline or best == float("inf"):
        start = time.perf_counter()
        torch.mm(left, right)
        _synchronize(runtime.device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _ranks_from_environment() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; one process when they are absent."""
    values = []
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = os.environ.get(name, str(default))
        if not text.isdigit():
            raise ValueError(f"environment variable {name}={text!r}; expected a number; unset it or use torchrun")
        values.append(int(text))
    rank, world_size, local_rank = values
    if rank >= world_size:
        raise ValueError(f"RANK={rank} with WORLD_SIZE={world_size}; expected RANK below WORLD_SIZE; use torchrun")
    return rank, world_size, local_rank


def _choose_device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"device {name!r}; expected auto, cpu, cuda, cuda:N or mps; choose one of these")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps', but this machine has none; expected auto or cpu; use --device auto")
    if name in ("cpu", "mps"):
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ValueError(f"device {name!r}, but torch sees no CUDA GPU; use --device auto or --device cpu")
    index = int(name.partition(":")[2]) if ":" in name else local_rank
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device cuda:{index}, but torch sees {torch.cuda.device_count()} GPU(s); "
            "choose a lower number, or start no more processes than there are GPUs"
        )
    return torch.device("cuda", index)


def _check_one_gpu_each(chosen: torch.device, asked: str, local_rank: int) -> None:
    """Refuse two processes on one GPU before they join: NCCL would hang."""
    if chosen.type == "cuda" and chosen.index != local_rank:
        raise ValueError(f"device {asked!r} for process {local_rank}; expected one GPU each; use --device cuda")
    if chosen.type == "mps":
        raise ValueError("device 'mps' with several processes; expected cpu or cuda; use --device cpu")


def _int8_on(device: torch.device) -> torch.dtype:
    if device.type != "cpu":
        raise ValueError(f"dtype int8 on {device.type}; it is for CPUs; use --dtype bf16, or --device cpu")
    return torch.int8


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device_has_bf16(device) else torch.float32
    if name not in DTYPE_NAMES:
        raise ValueError(f"dtype {name!r}; expected auto, float32, bfloat16 or float16; choose one of these")
    dtype = DTYPE_NAMES[name]
    if dtype == torch.float16 and device.type != "cuda":
        raise ValueError(
            f"dtype float16 on {device.type}; it needs CUDA, where a gradient scaler keeps small gradients "
            "from rounding to zero; use --dtype auto"
        )
    return dtype


def device_has_bf16(device: torch.device) -> bool:
    """True when `device` multiplies bfloat16 in hardware; on CUDA that is sm80 and later."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere, the first with bf16 tensor cores
    return device.type == "cpu" and cpu_has_bf16()
