"""The runtime: device, precision, processes."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.processes import end_of, start
from tinylm.system import runtime
from tinylm.system.runtime import Runtime, seed_everything, setup_runtime

CPU = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_on_the_cpu() -> None:
    here = setup_runtime("cpu", "float32")
    assert here == CPU
    assert here.is_main
    tensor = torch.ones(2)
    assert here.all_reduce_sum(tensor) is tensor
    here.barrier()


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_bfloat16_only_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: has_bf16)
    assert setup_runtime("cpu", "auto").compute_dtype == expected


def test_bfloat16_detection_agrees_with_the_kernel() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("no /proc/cpuinfo on this system to compare with")
    words = set(cpuinfo.read_text().split())
    assert runtime.cpu_has_bf16() == bool(words & {"avx512_bf16", "amx_bf16"})


def test_bfloat16_needs_a_cpu_that_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, expected in ((set(), False), ({"avx512_bf16"}, True), ({"amx_bf16"}, True)):
        flags = {name: name in found for name in ("avx2", "avx512_bf16", "amx_bf16")}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert runtime.cpu_has_bf16() is expected


@pytest.mark.parametrize(("alias", "name"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_dtype_aliases(alias: str, name: str) -> None:
    assert setup_runtime("cpu", alias).compute_dtype == getattr(torch, name)


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cpu", "float16", "needs CUDA"),
        ("cpu", "fp16", "needs CUDA"),
        ("cpu", "int8", "expected auto, float32"),
        ("tpu", "auto", "expected auto, cpu, cuda"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(device: str, dtype: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        setup_runtime(device, dtype)


def test_int8_is_for_a_model_that_is_used_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup_runtime("cpu", "int8", only_uses=True).compute_dtype == torch.int8
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="int8 on mps; it is for CPUs; use --dtype bf16"):
        setup_runtime("mps", "int8", only_uses=True)


def test_an_absent_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU; use --device auto"):
        setup_runtime("cuda")


@pytest.mark.parametrize("values", [("x", "2"), ("2", "2")])
def test_a_broken_torchrun_environment_is_named(monkeypatch: pytest.MonkeyPatch, values: tuple[str, str]) -> None:
    monkeypatch.setenv("RANK", values[0])
    monkeypatch.setenv("WORLD_SIZE", values[1])
    with pytest.raises(ValueError, match="RANK="):
        setup_runtime("cpu")


def test_autocast_multiplies_in_the_compute_dtype() -> None:
    left = torch.ones(4, 4)
    with CPU.autocast():
        assert (left @ left).dtype == torch.float32
    with Runtime(torch.device("cpu"), torch.int8).autocast():
        assert (left @ left).dtype == torch.float32
    with Runtime(torch.device("cpu"), torch.bfloat16).autocast():
        assert (left @ left).dtype == torch.bfloat16


def test_the_seed_reaches_all_three_generators() -> None:
    draws = []
    for seed in (1, 1, 2):
        seed_everything(seed)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))
    with pytest.raises(ValueError, match="seed -1"):
        seed_everything(-1)


def test_matmul_speed_is_counted_with_two_n_cubed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances 0.25 s per call, so a product of 1024 takes 0.25 s: 2 * 1024^3 / 0.25 FLOP/s."""
    ticks = iter(range(1000))
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(ticks) * 0.25)
    assert runtime.measured_matmul_flops(CPU) == 2 * 1024**3 / 0.25


def sum_over_gloo(folder: Path) -> None:
    here = runtime.setup_runtime("cpu", "float32")
    total = here.all_reduce_sum(torch.tensor([here.rank + 1.0]))
    answers = [here.any_rank(here.rank == 1), here.any_rank(False), here.max_over_ranks(here.rank + 0.5)]
    here.barrier()
    (folder / f"rank{here.rank}").write_text(f"{total.item()} {answers} {here.is_main}")
    runtime.shutdown_runtime()
    runtime.shutdown_runtime()


@pytest.mark.slow
def test_two_processes_sum_over_gloo(tmp_path: Path) -> None:
    """With the environment variables only; tests/trainer/test_recipes.py uses torchrun."""
    port = 20_000 + os.getpid() % 10_000  # below the ports that the system hands out
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [tmp_path / f"log{rank}" for rank in (0, 1)]
    ranks = [start(sum_over_gloo, tmp_path, log=logs[rank], RANK=str(rank), **shared) for rank in (0, 1)]
    ended = [end_of(*each) for each in zip(ranks, logs, strict=True)]
    assert ended == [0, 0], [log.read_text() for log in logs]
    results = [(tmp_path / f"rank{rank}").read_text().strip() for rank in (0, 1)]
    assert results == ["3.0 [True, False, 1.5] True", "3.0 [True, False, 1.5] False"]
