"""The runtime: device, precision, processes, and writes that happen whole or not at all."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from tinylm import runtime
from tinylm.runtime import Runtime, atomic_folder, atomic_write, seed_everything, setup_runtime

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
    """With a clock that ticks 0.25 s a call, a product of 1024 takes one: 2 * 1024^3 / 0.25 FLOP/s."""
    ticks = iter(range(1000))
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(ticks) * 0.25)
    assert runtime.measured_matmul_flops(CPU) == 2 * 1024**3 / 0.25


@pytest.mark.slow
def test_two_processes_sum_over_gloo(tmp_path: Path, repository: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent("""
        import os, torch
        from tinylm.runtime import setup_runtime, shutdown_runtime
        here = setup_runtime("cpu", "float32")
        total = here.all_reduce_sum(torch.tensor([here.rank + 1.0]))
        weight = torch.nn.Parameter(torch.zeros(2))
        unused = torch.nn.Parameter(torch.zeros(3))
        weight.grad = torch.full((2,), here.rank + 1.0)
        if here.rank == 1:
            unused.grad = torch.ones(3)
        here.all_reduce_gradients([weight, unused])
        here.barrier()
        with open(os.environ["OUT"] + str(here.rank), "w") as file:
            print(total.item(), weight.grad.tolist(), unused.grad.tolist(), here.is_main, file=file)
        shutdown_runtime()
        shutdown_runtime()
        """)
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    variables = {"OUT": str(tmp_path / "rank"), "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(script)], env={**os.environ, **variables}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    results = [(tmp_path / f"rank{rank}").read_text().strip() for rank in (0, 1)]
    assert results == ["3.0 [3.0, 3.0] [1.0, 1.0, 1.0] True", "3.0 [3.0, 3.0] [1.0, 1.0, 1.0] False"]


# Atomic writes


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.bin"
    with atomic_write(target) as file:
        file.write(b"half")
        file.flush()
        assert not target.exists()
    assert target.read_bytes() == b"half"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    with pytest.raises(type(failure)), atomic_write(target) as file:
        file.write(b"new")
        raise failure
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_disk_that_fills_up_at_the_flush_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_write(target) as file:
        file.write(b"new")
    with pytest.raises(OSError, match="No space left"), atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_bytes(b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_keeps_pointing_to_the_rewritten_file(tmp_path: Path) -> None:
    target, link = tmp_path / "file", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    with atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_folder_is_swapped_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / content).write_text(content)
            assert not (target / content).exists()
        assert [file.name for file in target.iterdir()] == [content]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_folder(target) as folder:
        (folder / "new").write_text("new")
        raise OSError(errno.ENOSPC, "full")
    assert [file.name for file in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_swap_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "old").write_text("old")
    rename = os.rename

    def fails_for_the_new(source: Path, destination: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError("cannot rename")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fails_for_the_new)
    with pytest.raises(OSError, match="cannot rename"), atomic_folder(target) as folder:
        (folder / "new").write_text("new")
    assert [file.name for file in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_files_and_folders_are_not_mixed_up(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="expected a folder"), atomic_folder(tmp_path / "file"):
        pass
    with pytest.raises(IsADirectoryError, match="expected a file"), atomic_write(tmp_path):
        pass
