"""As `test_fallback.py`, with a real memory limit, real compilers that do not work, and one that does."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
from pathlib import Path

import pytest

from tests.command_line import SHAPE, tinylm
from tests.processes import end_of, start
from tinylm import cli
from tinylm.system.compile_cache import compiled_code

RUN = [
    "pretrain", *SHAPE, "--device", "cpu", "--dtype", "float32", "--max_seq_len", "32", "--eval_batches", "1",
    "--validation_fraction", "0.05",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "größe.txt"
    path.write_text(
        "".join(f"Boot {n} – 船 – fuhr über die stille See, und {n % 7} Kinder sangen.\n" for n in range(500))
    )
    return path


def run_in_process(function, text: Path, folder: Path, *words: object, **environment: str) -> tuple[int, str]:
    """(exit status, what it printed) of a run in a process of its own, whose torch has not compiled yet."""
    command = [*RUN, "--data_path", text, "--output_dir", folder, *words]
    log = folder.with_suffix(".log")
    process = start(function, [str(word) for word in command], log=log, **environment)
    return end_of(process, log), log.read_text()


def weights(folder: Path) -> bytes:
    return (folder / "pretrain_32_epoch0" / "model.safetensors").read_bytes()


def train_in_little_memory(words: list[str]) -> int:
    """The command; the gradients of its first step may take 80 MB more than it has.

    The update of the weights may take what it likes: what fails there ends a run, and oneDNN, which fails to generate
    code once, generates none in this process after it.
    """
    from tinylm.trainer.core import loop
    from tinylm.trainer.run.run import Run

    fit_once, update_weights = Run._fit, loop._update_weights

    def fit_with_a_limit(run: Run) -> bool:
        if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 80_000_000
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        return fit_once(run)

    def update_without(*args):
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return update_weights(*args)

    Run._fit, loop._update_weights = fit_with_a_limit, update_without
    return cli.main(words)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_step_that_the_system_gives_no_memory_for(text, tmp_path):
    """256 rows of 32 tokens have logits of 210 MB. The allocator's error is one of torch's, not one of ours."""
    sizes = ["--batch_size", 256, "--max_steps", 2]
    status, said = run_in_process(train_in_little_memory, text, tmp_path / "little", *sizes)
    assert status == 0, said
    found = re.findall(r"warning: out of memory in step 1, which computes (\d+) rows at a time; (\d+) at a time", said)
    assert found and found[0] == ("256", "128") and int(found[-1][1]) >= 2, said
    assert said.count("keeps its 256 rows") == len(found) and "Traceback" not in said
    planned = ["--batch_size", found[-1][1], "--accumulation_steps", 256 // int(found[-1][1]), "--max_steps", 2]
    assert run_in_process(cli.main, text, tmp_path / "planned", *planned)[0] == 0
    assert weights(tmp_path / "little") == weights(tmp_path / "planned")


@pytest.fixture(scope="module")
def eager(text, tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("eager") / "run"
    status, said = run_in_process(cli.main, text, folder, "--max_steps", 3)
    assert status == 0, said
    return weights(folder)


def broken_compiler(folder: Path) -> Path:
    """Knows its version, and compiles nothing."""
    path = folder / "c++"
    path.write_text('#!/bin/sh\ncase "$*" in *--version*) echo "g++ 12.2.0";; *) echo "no größe" >&2; exit 1;; esac\n')
    path.chmod(0o755)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("what", ["failing", "absent", "broken", "no folder"])
def test_what_torch_cannot_compile_is_trained_eagerly(text, eager, tmp_path, what):
    environment = {
        "failing": {"CXX": "/bin/false"},
        "absent": {"CXX": str(tmp_path / "keiner")},
        "broken": {"CXX": str(broken_compiler(tmp_path))},
        "no folder": {"TORCHINDUCTOR_CACHE_DIR": "/proc/read-only", "CXX": "/bin/false"},
    }[what]
    words = ["--max_steps", 3, "--use_compile", 1]
    status, said = run_in_process(cli.main, text, tmp_path / "run", *words, **environment)
    assert status == 0, said
    found = re.findall(r"warning: torch.compile failed \((.+)\); the run continues eagerly", said)
    reason = {
        "failing": "InvalidCxxCompiler: No working C\\+\\+ compiler found .*/bin/false",
        "absent": "InvalidCxxCompiler: No working C\\+\\+ compiler found .*keiner",
        "broken": "C(pp|xx)CompileError: |InvalidCxxCompiler: ",
        "no folder": "InvalidCxxCompiler",
    }[what]
    assert ("warning: the cache /proc/read-only cannot be used (No such file" in said) == (what == "no folder")
    assert len(found) == 1 and re.match(reason, found[0]), said
    assert "compiled in" not in said and "Traceback" not in said
    assert weights(tmp_path / "run") == eager


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler for torch.compile")
def test_compiled_code_is_kept_for_the_next_run(text, tmp_path):
    words = ["--max_steps", 2, "--use_compile", 1]
    cache = Path(os.environ["TINYLM_CACHE_DIR"])
    libraries = []
    for name in ("first", "second"):
        status, said = run_in_process(cli.main, text, tmp_path / name, *words, TORCHINDUCTOR_CACHE_DIR="")
        assert status == 0 and "warning" not in said and "compiled in the first step" in said, said
        libraries.append(sorted(compiled_code(cache).glob("*/*/*.so")))
    assert libraries[0] and libraries[0] == libraries[1]
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    assert re.search(r"compiled code, which no bound counts: [\d.]+ MB", tinylm("cache")[1])
