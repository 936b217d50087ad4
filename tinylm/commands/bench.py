"""Measure how fast this machine trains and runs a tiny language model, beside transformers if it is installed.

tinylm bench                       the whole suite, about ten minutes on two cores
tinylm bench --only step,decode    parts of it
"""

from __future__ import annotations

import datetime
import itertools
import sys
import time
from pathlib import Path

from tinylm.benchmark.bench import Bench, start_bench
from tinylm.benchmark.figures import Figure
from tinylm.benchmark.report import show_figure, show_table, to_json
from tinylm.benchmark.settings import BenchSettings
from tinylm.benchmark.suite import measure_all
from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import parse_settings
from tinylm.commandline.terminal import format_seconds, make_console
from tinylm.files.atomic import require_file_name, write_json

DESCRIPTION = "Measure the speed of training, decoding and more on this machine."


class Journal:
    """The figures so far, and the file that they are written to.

    Args:
        path: of the JSON file; it is written again after each figure, so a run that is stopped keeps what it measured.
    """

    def __init__(self, bench: Bench, path: Path) -> None:
        self.bench, self.path = bench, path
        self.figures: list[Figure] = []
        self.started_at = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self.started = time.perf_counter()

    def write(self, is_complete: bool) -> None:
        """Write the file."""
        facts = {
            "command": "tinylm bench",
            "started": self.started_at,
            "seconds": round(self.seconds, 1),
            "complete": is_complete,
        }
        write_json(self.path, to_json(self.figures, self.bench, facts))

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.started


def free_path(settings: BenchSettings) -> Path:
    """The file that --output names, or the first of bench.json, bench-2.json and so on that does not exist."""
    if settings.output is not None:
        return Path(settings.output)
    names = itertools.chain(["bench.json"], (f"bench-{number}.json" for number in itertools.count(2)))
    path = next(Path(name) for name in names if not Path(name).exists())
    require_file_name(str(path))
    return path


def main(argv: list[str]) -> int:
    """The command line: measure, show, write."""
    settings = parse_settings(BenchSettings, argv, "tinylm bench", DESCRIPTION)
    console, signs = make_console(), make_console(stderr=True)
    path = free_path(settings)
    signs.print(f"{', '.join(settings.parts)}: the figures come one by one, and go to {path}")
    bench = start_bench(settings, lambda line: signs.print(line, style="dim"))
    journal = Journal(bench, path)
    try:
        for figure in measure_all(bench):
            journal.figures.append(figure)
            show_figure(signs, figure, bench)
            journal.write(is_complete=False)
    except KeyboardInterrupt as stop:
        if not journal.figures:
            raise
        show_table(console, journal.figures, bench)
        where = f" after {len(journal.figures):,} figures, which are in {path}"
        stop.where = where  # type: ignore[attr-defined]
        raise
    journal.write(is_complete=True)
    show_table(console, journal.figures, bench)
    console.print(f"{format_seconds(journal.seconds)} in all; every sample is in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, advice=""))
