"""List and remove what is kept for all runs: token shards, and the code that torch.compile made.

    tinylm cache              what is there, from which data, how large, when used last
    tinylm cache --prune      remove the least recently used until the rest fits the bound
    tinylm cache --clear      remove all, and compiled code

Shards that a run is using stay.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console

from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import parse_settings
from tinylm.commandline.terminal import format_count, format_seconds, make_console
from tinylm.dataset.shards.shared_cache import Entry, SharedCache, cache_bound, cache_folder
from tinylm.system.compile_cache import remove_compiled_code, size_of_compiled_code


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Settings of the cache."""

    cache_dir: str | None = None
    """the cache's folder; by default $TINYLM_CACHE_DIR or the user's cache folder"""
    cache_gb: float | None = None
    """the bound that --prune keeps, in GB; by default $TINYLM_CACHE_GB or 10"""
    prune: bool = False
    """remove the least recently used token shards until the rest fits the bound"""
    clear: bool = False
    """remove all token shards, and compiled code"""

    def __post_init__(self) -> None:
        cache_bound(self.cache_gb)  # refuses anything but a number of gigabytes
        if self.prune and self.clear:
            raise ValueError("--prune and --clear are given; expected one of them; --clear removes all")


def corpora_of(entries: Sequence[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    """The shards by data: those of one file, or of the files of a folder, that one tokenizer made; newest first."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        facts = entry.facts()
        folder = os.path.dirname(str(facts.get("source", "")))
        groups.setdefault((folder, str(facts.get("tokenizer"))), []).append(entry)
    for (folder, tokenizer), found in sorted(groups.items(), key=lambda item: -item[1][-1].used):
        source = str(found[0].facts().get("source") or "unknown") if len(found) == 1 else f"{folder}{os.sep}"
        yield f"{source} (tokenizer {tokenizer})", found


def show(console: Console, cache: SharedCache) -> None:
    """Print the corpora of the cache, one a line, and the sum."""
    entries, in_use = cache.entries(), cache.names_in_use()
    if entries:
        console.print(f"{'MB':>9}  {'tokens':>7}  {'files':>6}  {'last used':>10}  data", style="bold")
    for data, found in corpora_of(entries):
        tokens = sum(number for entry in found if isinstance(number := entry.facts().get("num_tokens"), int))
        size = sum(entry.num_bytes for entry in found) / 1e6
        used = "in use" if any(entry.folder.name in in_use for entry in found) else _ago(found[-1].used)
        line = f"{size:>9,.1f}  {format_count(tokens):>7}  {len(found):>6,}  {used:>10}  {data}"
        console.print(line)
    if code := size_of_compiled_code(cache.root):
        console.print(f"compiled code, which no bound counts: {_size(code)}")
    total = sum(entry.num_bytes for entry in entries)
    console.print(f"{cache.root}: {_size(total)} of at most {cache.max_bytes / 1e9:g} GB")


def remove(console: Console, cache: SharedCache, max_bytes: float) -> None:
    """Bring the cache down to `max_bytes`, and print what was removed and what had to stay."""
    removed = cache.prune(max_bytes)
    console.print(f"token shards removed: {len(removed):,} ({_size(sum(entry.num_bytes for entry in removed))})")
    if (left := sum(entry.num_bytes for entry in cache.entries())) > max_bytes:
        console.print(f"{_size(left)} stay, because running programs use them")


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _ago(when: float) -> str:
    seconds = max(0.0, time.time() - when)
    return f"{seconds / 86400:.0f}d ago" if seconds >= 2 * 86400 else f"{format_seconds(seconds)} ago"


def main(argv: list[str]) -> int:
    """The command line: list, prune or clear."""
    settings = parse_settings(CacheSettings, argv, "tinylm cache", "List or remove what is kept for all runs.")
    console, cache = make_console(), SharedCache(cache_folder(settings.cache_dir), cache_bound(settings.cache_gb))
    if settings.prune or settings.clear:
        remove(console, cache, 0 if settings.clear else cache.max_bytes)
        if settings.clear and (code := remove_compiled_code(cache.root)):
            console.print(f"compiled code removed: {_size(code)}")
    else:
        show(console, cache)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
