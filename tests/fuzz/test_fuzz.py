"""The short form of the fuzzer, as part of `make test`; and proof that the fuzzer sees what it looks for."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import cases, run
from tests.fuzz.targets import TARGETS, Target, make_seeds

CASES = 60

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured through /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    make_seeds(root / "seeds")
    shutil.copytree(root / "seeds", root / "work")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_refused_or_load(folder: Path, name: str) -> None:
    target = TARGETS[name]
    target.load(
        folder / "work" / target.folder / target.file
    )  # what is imported and cached at first is no case's doing
    good = cases.judge(target, folder / "work" / target.folder / target.file)
    assert good.loaded and good.fault is None, "the undamaged file must load"
    outcomes = [cases.run_case(name, target, folder / "seeds", folder / "work", seed=0, number=n) for n in range(CASES)]
    assert [(n, outcome.fault) for n, outcome in enumerate(outcomes) if outcome.fault is not None] == []
    assert 0 < sum(outcome.loaded for outcome in outcomes) < CASES * 0.9, "mutations that all fail, or all pass"


def test_the_same_seed_is_the_same_case() -> None:
    from random import Random

    for target in TARGETS.values():
        assert callable(target.mutate)
    data = b'{"a": [1, 2, {"b": null}], "c": "d"}'
    mutated = [TARGETS["config.json"].mutate(Random(f"0 x {n}"), data) for n in range(50)]
    assert mutated == [TARGETS["config.json"].mutate(Random(f"0 x {n}"), data) for n in range(50)]
    assert len(set(mutated)) > 30


def raising(error: BaseException) -> Callable[[Path], None]:
    def load(path: Path) -> None:
        raise error

    return load


def slow(path: Path) -> None:
    begin = time.process_time()
    while time.process_time() - begin < 1.2:
        pass


FAULTY: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "key error": (raising(KeyError("model")), "KeyError"),
    "recursion": (raising(RecursionError("too deep")), "RecursionError"),
    "nameless": (raising(ValueError("something is wrong")), "names no file"),
    "two lines": (raising(ValueError("good.json: a\nb")), "not one short printable line"),
    "escape": (raising(ValueError("good.json: \x1b[31m")), "not one short printable line"),
    "status 1": (raising(SystemExit(1)), "status 1"),
    "slow": (slow, "1.2 seconds"),
    "memory": (lambda path: b"x" * (200 << 20), "MB of memory"),
    "refused": (raising(ValueError("good.json is wrong")), None),
    "loaded": (lambda path: None, None),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_a_fault_is_seen(tmp_path: Path, kind: str) -> None:
    load, expected = FAULTY[kind]
    (tmp_path / "good.json").write_bytes(b"{}")
    fault = cases.judge(Target("", "good.json", lambda rng, data: data, load), tmp_path / "good.json").fault
    assert fault is None if expected is None else fault is not None and expected in fault


@pytest.mark.slow
def test_a_crash_is_kept_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that dies takes nothing with it but its own case."""

    def die(arguments: list[str], **_: object) -> object:
        start, stop = int(arguments[-2]), int(arguments[-1])
        (tmp_path / "log.jsonl").write_text("".join(f"[{n}, true, null, 0.0, 0]\n" for n in range(start, 3)))
        if start > 3:
            (tmp_path / "log.jsonl").write_text("".join(f"[{n}, true, null, 0.0, 0]\n" for n in range(start, stop)))
        return type("Child", (), {"returncode": -11, "stderr": b"Segmentation fault"})

    monkeypatch.setattr(run.subprocess, "run", die)
    report = run.run_target("texts", tmp_path, seed=0, cases=6, keep=tmp_path / "kept")
    assert (report.cases, report.loaded, report.faults) == (6, 5, 1)
    assert "Segmentation fault" in (tmp_path / "kept" / "texts-3.txt").read_text()
