"""The long form: `python -m tests.fuzz.run --cases 105000 --seed 0`.

Cases run in a child process, so that a crash, a hang or an exhausted memory ends the child and is a finding, not the
end of the run. Whatever goes wrong is kept: the file that did it, and beside it in words what happened.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.cases import judge, run_case
from tests.fuzz.targets import TARGETS, Target, make_seeds

HANG_SECONDS = 20
"""Of the clock, after which a child is ended; a second of processor time is a fault already, and less drastic."""

CHILD_MEMORY = 8 << 30
"""Bytes of address space that a child may have, so that a bomb ends the child and not the machine."""


@dataclass
class Report:
    """A row of the table."""

    cases: int = 0
    loaded: int = 0
    faults: int = 0
    seconds: float = 0.0
    memory: int = 0


def main() -> int:
    """Run every target, print the table; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=105_000, help="over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one; may be given again")
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"), help="where to leave what was found")
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "START", "STOP"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    if options.child:
        folder, start, stop = options.child
        run_child(names[0], TARGETS[names[0]], Path(folder), options.seed, int(start), int(stop))
        return 0
    begin, total = time.monotonic(), Report()
    print("| target | cases | refused | loaded | slowest, ms | memory beyond 2x the file, MB | faults |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            report = run_target(name, Path(folder), options.seed, -(-options.cases // len(names)), options.keep)
        print(row(name, report), flush=True)
        total.cases, total.loaded = total.cases + report.cases, total.loaded + report.loaded
        total.seconds, total.memory = max(total.seconds, report.seconds), max(total.memory, report.memory)
        total.faults += report.faults
    print(row("**all**", total))
    print(f"\n{time.monotonic() - begin:.0f} s", flush=True)
    return int(total.faults > 0)


def row(name: str, report: Report) -> str:
    """A line of the table."""
    refused = report.cases - report.loaded - report.faults
    measures = f"{1000 * report.seconds:.0f} | {report.memory / 2**20:.1f} | {report.faults}"
    return f"| {name} | {report.cases:,} | {refused:,} | {report.loaded:,} | {measures} |"


def run_target(name: str, folder: Path, seed: int, cases: int, keep: Path) -> Report:
    """All cases of a target, in one child after another until they are done; faults go to `keep`."""
    make_seeds(folder / "seeds")
    shutil.copytree(folder / "seeds", folder / "work")
    report, done = Report(), 0
    while done < cases:
        arguments = ["--target", name, "--seed", str(seed), "--child", str(folder), str(done), str(cases)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        child = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.run", *arguments], env=environment, stderr=subprocess.PIPE
        )
        lines = (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").exists() else []
        for line in lines:
            number, loaded, fault, seconds, memory = json.loads(line)
            report.cases += 1
            report.loaded += loaded
            report.seconds, report.memory = max(report.seconds, seconds), max(report.memory, memory)
            if fault is not None:
                report.faults += 1
                _keep(keep, name, number, folder / f"fault-{number}", fault)
            done = number + 1
        (folder / "log.jsonl").unlink(missing_ok=True)
        if done < cases:  # the child did not come to the end of case number `done`
            report.cases, report.faults = report.cases + 1, report.faults + 1
            last = folder / "work" / TARGETS[name].folder / TARGETS[name].file
            _keep(keep, name, done, last, f"status {child.returncode}\n{child.stderr.decode(errors='replace')[-3000:]}")
            shutil.rmtree(folder / "work")
            shutil.copytree(folder / "seeds", folder / "work")
            done += 1
    return report


def _keep(keep: Path, name: str, number: int, file: Path, words: str) -> None:
    keep.mkdir(parents=True, exist_ok=True)
    place = keep / f"{name.strip('.').replace('/', '-').replace(' ', '-')}-{number}"
    shutil.copyfile(file, place)
    place.with_name(place.name + ".txt").write_text(words, encoding="utf-8", errors="replace")
    print(f"FAULT in {name}, case {number}: {words.splitlines()[0][:300]}; see {place}", file=sys.stderr, flush=True)


def run_child(name: str, target: Target, folder: Path, seed: int, start: int, stop: int) -> None:
    """Cases `start` to `stop` of a target; each leaves a line in log.jsonl, and its file if it is at fault."""
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_MEMORY, CHILD_MEMORY))
    judge(target, folder / "work" / target.folder / target.file)  # imports and caches are no case's doing
    with (folder / "log.jsonl").open("w", buffering=1) as log:
        for number in range(start, stop):
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            outcome = run_case(name, target, folder / "seeds", folder / "work", seed, number)
            if outcome.fault is not None:
                shutil.copyfile(folder / "work" / "last-case", folder / f"fault-{number}")
            log.write(json.dumps([number, outcome.loaded, outcome.fault, outcome.seconds, outcome.memory]) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
