"""`tinylm cache`, and the runs that fill it."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path

import pytest

from tests.command_line import SHAPE, tinylm
from tinylm.dataset.shards.shard_cache import cached_token_shards
from tinylm.dataset.shards.shared_cache import SharedCache, shared_cache
from tinylm.system.compile_cache import compiled_code
from tinylm.tokenizer.tokenizer import Tokenizer

RUN = [
    "pretrain", *SHAPE, "--device", "cpu", "--dtype", "float32", "--max_seq_len", "32", "--batch_size", "1",
    "--max_steps", "4", "--validation_fraction", "0.2", "--eval_batches", "1",
]  # fmt: skip


@pytest.fixture
def cache() -> SharedCache:
    cache = shared_cache()
    assert cache is not None
    return cache


@pytest.fixture
def books(tmp_path: Path) -> Path:
    (tmp_path / "[b]Bücher").mkdir()
    for name in ("erstes", "zweites"):
        text = f"Das {name} Boot – 船 – fuhr über die stille See, und die Kinder sangen.\n" * 40
        (tmp_path / "[b]Bücher" / f"{name}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "[b]Bücher"


def test_what_is_there(books: Path, cache: SharedCache, tmp_path: Path) -> None:
    """One line a corpus, with its path as it is, and the sum; a corpus in use is said to be so."""
    tokenizer = Tokenizer.default()
    held = cached_token_shards(str(books), tokenizer, tmp_path / "own", cache=cache)
    (tmp_path / "one.txt").write_text("Only this. " * 99)
    number = len(cached_token_shards(str(tmp_path / "one.txt"), tokenizer, tmp_path / "own", cache=cache).tokens)
    (entry,) = [entry for entry in cache.entries() if entry.facts()["source"].endswith("one.txt")]
    os.utime(entry.folder / "meta.json", (1, 1))
    status, said = tinylm("cache")
    head, first, second, total = said.splitlines()
    assert status == 0 and head.split() == ["MB", "tokens", "files", "last", "used", "data"]
    assert re.fullmatch(r" +0\.0 +\d\.\d+k +2 +in use  .*", first)
    assert first.endswith(f"{books}{os.sep} (tokenizer {tokenizer.fingerprint})")
    assert re.fullmatch(rf" +0\.0 +{number} +1 +\d\d,?\d+d ago  .*", second) and f"{tmp_path}/one.txt (t" in second
    assert re.fullmatch(rf"{re.escape(str(cache.root))}: 0\.0 MB of at most 10 GB", total)
    assert held.fingerprint


def test_prune_and_clear(books: Path, cache: SharedCache, tmp_path: Path) -> None:
    held = cached_token_shards(f"{books}/erstes.txt", Tokenizer.default(), tmp_path / "own", cache=cache)
    for name in ("zweites.txt", "erstes.txt"):
        cached_token_shards(f"{books}/{name}", Tokenizer.default(), tmp_path / "own", cache=cache)
    assert tinylm("cache", "--prune") == (0, "token shards removed: 0 (0.0 MB)\n")
    status, said = tinylm("cache", "--prune", "--cache_gb", "0.000001")
    assert status == 0 and said.startswith(
        "token shards removed: 1 (0.0 MB)\n0.0 MB stay, because running programs use"
    )
    del held
    gc.collect()
    assert tinylm("cache", "--clear") == (0, "token shards removed: 1 (0.0 MB)\n")
    assert cache.entries() == []


def test_compiled_code_is_listed_and_cleared(cache: SharedCache) -> None:
    """--prune leaves it: the bound is that of token shards."""
    path = compiled_code(cache.root) / "12345678" / "kernel.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 3_400_000)
    assert tinylm("cache")[1].splitlines()[0] == "compiled code, which no bound counts: 3.4 MB"
    assert "compiled" not in tinylm("cache", "--prune", "--cache_gb", "0.000001")[1] and path.exists()
    assert tinylm("cache", "--clear")[1].splitlines() == [
        "token shards removed: 0 (0.0 MB)", "compiled code removed: 3.4 MB"
    ]  # fmt: skip
    assert not path.exists() and "compiled" not in tinylm("cache")[1]


def test_nothing_is_there_yet(cache: SharedCache, tmp_path: Path) -> None:
    for words in ([], ["--cache_dir", tmp_path / "none"]):
        status, said = tinylm("cache", *words)
        assert status == 0 and said.endswith(": 0.0 MB of at most 10 GB\n") and said.count("\n") == 1
        assert tinylm("cache", "--clear", *words) == (0, "token shards removed: 0 (0.0 MB)\n")
    assert not cache.root.exists() and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--prune", "--clear"], "--prune and --clear are given; expected one of them; --clear removes all"),
        (["--cache_gb", "-1"], "cache_gb is -1.0; expected a number of gigabytes, such as 10, or 0 for no cache"),
    ],
)
def test_what_does_not_fit_together(words: list[str], line: str) -> None:
    assert tinylm("cache", *words) == (2, f"tinylm: error: {line}\n")


@pytest.mark.slow
def test_a_text_is_tokenised_once_for_all_runs(books: Path, cache: SharedCache, tmp_path: Path) -> None:
    """A resumed run finds the same data, even after the cache was cleared; --cache_gb 0 is as before there was one."""
    data = ["--data_path", str(books / "erstes.txt")]
    status, said = tinylm(*RUN, *data, "--output_dir", tmp_path / "1")
    assert status == 0 and f"tokenised before: 0 of 1 files (cache {cache.root})" in said, said
    status, said = tinylm(*RUN, *data, "--output_dir", tmp_path / "2")
    assert status == 0 and f"tokenised before: 1 of 1 files (cache {cache.root})" in said, said
    assert not list(tmp_path.glob("*/token_shards"))
    gc.collect()  # a run of its own process would have ended
    assert tinylm("cache", "--clear")[1].startswith("token shards removed: 1 ")
    other = ["--cache_dir", tmp_path / "elsewhere"]
    status, said = tinylm(*RUN, *data, *other, "--output_dir", tmp_path / "2", "--resume")
    assert status == 0 and "from step 4" in said and (tmp_path / "elsewhere" / "token_shards").is_dir(), said
    status, said = tinylm(*RUN, *data, "--cache_gb", "0", "--output_dir", tmp_path / "3")
    assert status == 0 and "tokenised before" not in said and cache.entries() == []
    assert len(list((tmp_path / "3" / "token_shards").iterdir())) == 1
