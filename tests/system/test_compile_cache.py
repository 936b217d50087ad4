"""Compiled code is kept for the next run, in a folder of its own for each kind of CPU."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tinylm.system import compile_cache
from tinylm.system.compile_cache import (
    VARIABLE,
    compiled_code,
    cpu_name,
    keep_compiled_code,
    remove_compiled_code,
    size_of_compiled_code,
)


@pytest.fixture(autouse=True)
def _torchs_own_folder(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")  # restored afterwards


def test_torch_is_told_where_and_a_user_is_obeyed(tmp_path: Path, monkeypatch) -> None:
    """torch sets the variable to its own default when an optimizer is made: that is not the user's choice."""
    assert keep_compiled_code(None) is None and VARIABLE not in os.environ
    folder = compiled_code(tmp_path / "größe") / cpu_name()
    for before in ("", os.path.join(tempfile.gettempdir(), "torchinductor_somebody")):
        monkeypatch.setenv(VARIABLE, before)
        assert keep_compiled_code(tmp_path / "größe") is None
        assert os.environ[VARIABLE] == str(folder) and list(folder.iterdir()) == []
    monkeypatch.setenv(VARIABLE, str(tmp_path / "torchinductor_mine"))
    assert keep_compiled_code(tmp_path / "other") is None
    assert os.environ[VARIABLE] == str(tmp_path / "torchinductor_mine") and not (tmp_path / "other").exists()


def test_another_cpu_has_another_folder(monkeypatch) -> None:
    """Code for a CPU with AVX-512 ends the process on one without, and a home folder may be on both."""
    cores = [f"processor : {n}\nmodel name\t: A\nflags\t\t: fpu avx2\ncpu MHz : {n}\n" for n in range(3)]
    texts = iter([cores[0] + cores[1], cores[2], cores[0].replace("avx2", "avx2 avx512f")])
    monkeypatch.setattr(compile_cache.Path, "read_text", lambda self: next(texts))
    first, same, other = (cpu_name() for _ in range(3))
    assert first == same != other
    assert len(first) == 8


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    bad, good = (compiled_code(tmp_path / name) / cpu_name() for name in ("file", "good"))
    fault = f"the cache {bad} cannot be used (Not a directory)"
    assert keep_compiled_code(tmp_path / "file") == f"{fault}: compiled code goes to a temporary folder"
    assert VARIABLE not in os.environ
    monkeypatch.setenv(VARIABLE, str(bad))
    assert keep_compiled_code(tmp_path / "good") == f"{fault}: compiled code goes to {good}"
    assert os.environ[VARIABLE] == str(good)


def test_its_size_and_its_removal(tmp_path: Path) -> None:
    assert (size_of_compiled_code(tmp_path), remove_compiled_code(tmp_path)) == (0, 0)
    for name, size in (("ab/c.so", 700), ("cd/e.cpp", 77)):
        path = compiled_code(tmp_path) / "12345678" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * size)
    (tmp_path / "token_shards").mkdir()
    (tmp_path / "token_shards" / "kept").write_bytes(b"y")
    assert (size_of_compiled_code(tmp_path), remove_compiled_code(tmp_path)) == (777, 777)
    assert size_of_compiled_code(tmp_path) == 0 and (tmp_path / "token_shards" / "kept").exists()
