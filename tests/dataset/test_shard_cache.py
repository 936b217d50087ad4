"""A corpus in shards, one for each file: made once, by whoever comes first, and the same for all."""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import shard_worker
from shard_worker import SHARED, TOGETHER

from tests.processes import end_of, run_ranks, start
from tinylm.dataset.pretrain_dataset import load_pretrain_data
from tinylm.dataset.shards import claims, shard_cache, tokenizing
from tinylm.dataset.shards.shard_cache import cached_token_shards
from tinylm.dataset.shards.shared_cache import shared_cache
from tinylm.dataset.shards.token_shards import TokenShards, tokenize_texts
from tinylm.dataset.sources.records import BadRows


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of six text files of three documents each."""
    (tmp_path / "corpus").mkdir()
    for name in "abcdef":
        texts = [f"{name} {number} The little boat sailed.\n" * 9 for number in range(3)]
        (tmp_path / "corpus" / f"{name}.txt").write_text("<|endoftext|>\n".join(texts))
    return tmp_path / "corpus"


def documents(corpus: TokenShards) -> list[list[int]]:
    return [corpus.tokens[a:b].tolist() for a, b in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)]


def inodes(cache: Path) -> dict[str, int]:
    """Every shard, and which writing of it this is."""
    return {folder.name: (folder / "meta.json").stat().st_ino for folder in cache.iterdir()}


def test_a_corpus_is_its_files_in_order(tokenizer, corpus: Path, tmp_path: Path) -> None:
    texts = [f"{name} {number} The little boat sailed.\n" * 9 for name in "abcdef" for number in range(3)]
    found = cached_token_shards(str(corpus), tokenizer, tmp_path / "cache")
    assert documents(found) == documents(tokenize_texts(texts, tokenizer))
    backwards = ",".join(str(corpus / f"{name}.txt") for name in "fedcba")
    assert documents(cached_token_shards(backwards, tokenizer, tmp_path / "cache"))[0] == documents(found)[-3]
    assert len(inodes(tmp_path / "cache")) == 6  # the same shards


def test_the_fingerprint_of_one_file_is_that_of_its_tokens(tokenizer, corpus: Path, tmp_path: Path) -> None:
    """So a run that was started before there were shards by file may be resumed."""
    texts = [f"a {number} The little boat sailed.\n" * 9 for number in range(3)]
    found = cached_token_shards(str(corpus / "a.txt"), tokenizer, tmp_path / "cache")
    assert found.fingerprint == tokenize_texts(texts, tokenizer).fingerprint


@pytest.mark.slow
def test_worker_processes_write_the_same_shards(tokenizer, corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tokenizing, "CHUNK_CHARACTERS", 100)
    done: list[tuple[int, int]] = []
    two = cached_token_shards(
        str(corpus), tokenizer, tmp_path / "two", num_processes=2, progress=lambda *numbers: done.append(numbers)
    )
    one = cached_token_shards(str(corpus), tokenizer, tmp_path / "one", num_processes=1)
    assert two.fingerprint == one.fingerprint and documents(two) == documents(one)
    assert done[-1] == (18, len(two.tokens)) and len(done) >= 18


def test_only_large_files_go_to_worker_processes(tokenizer, corpus: Path, tmp_path: Path, monkeypatch) -> None:
    """And one claim is held at a time, so that other processes find work."""
    spread: list[str] = []
    locks: list[int] = []
    write_shard = shard_cache.write_shard

    @contextmanager
    def in_this_process(function, shared, num_processes):
        assert num_processes == shard_cache.available_cores(6)

        def spread_map(chunks):
            for chunk in chunks:
                spread.append(chunk[0].text[:3])
                yield function(*shared, chunk)

        yield spread_map

    def write(chunks, tokenizer, folder, *rest) -> None:
        locks.append(len(list(folder.parent.glob("*.lock"))))
        write_shard(chunks, tokenizer, folder, *rest)

    expected = cached_token_shards(str(corpus), tokenizer, tmp_path / "expected")
    (corpus / "c.txt").write_text((corpus / "c.txt").read_text() + "<|endoftext|>\n" * 5)
    monkeypatch.setattr(shard_cache, "process_map", in_this_process)
    monkeypatch.setattr(shard_cache, "write_shard", write)
    monkeypatch.setattr(shard_cache, "PARALLEL_FROM", (corpus / "c.txt").stat().st_size)
    found = cached_token_shards(str(corpus), tokenizer, tmp_path / "cache")
    assert documents(found) == documents(expected)
    assert spread == ["c 0"]
    assert locks == [1] * 6


def test_opened_at_once_when_nothing_has_changed(tokenizer, corpus: Path, tmp_path: Path, monkeypatch) -> None:
    first = cached_token_shards(str(corpus), tokenizer, tmp_path / "cache")
    monkeypatch.setattr(shard_cache, "write_shard", None)  # would fail if it were called
    assert cached_token_shards(str(corpus), tokenizer, tmp_path / "cache").fingerprint == first.fingerprint


def test_only_what_is_new_or_changed_is_tokenised(tokenizer, corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = cached_token_shards(str(corpus), tokenizer, cache)
    before = inodes(cache)
    (corpus / "aa.txt").write_text("new")
    second = cached_token_shards(str(corpus), tokenizer, cache)
    after = inodes(cache)
    assert len(after) == 7 and before.items() < after.items()
    assert documents(second) == [*documents(first)[:3], [*tokenizer.encode("new"), 0], *documents(first)[3:]]
    (corpus / "aa.txt").write_text("old")  # as long as before
    os.utime(corpus / "aa.txt", ns=(1, 1))
    assert cached_token_shards(str(corpus), tokenizer, cache).fingerprint != second.fingerprint
    assert len(inodes(cache)) == 8
    (corpus / "aa.txt").unlink()
    assert cached_token_shards(str(corpus), tokenizer, cache).fingerprint == first.fingerprint
    assert len(inodes(cache)) == 8


def test_a_claim_on_a_lock_that_its_owner_has_removed_is_none(tmp_path: Path, monkeypatch) -> None:
    """Between opening the file and locking it, its owner may remove it; a third process then makes and locks a new one.
    Both would work on the same shard."""
    lock = claims.try_to_lock

    def meanwhile(descriptor: int) -> bool:
        (tmp_path / ".shard.lock").unlink()
        (tmp_path / ".shard.lock").touch()
        return lock(descriptor)

    with claims.claim(tmp_path / "shard") as is_ours:
        assert is_ours is True
    monkeypatch.setattr(claims, "try_to_lock", meanwhile)
    with claims.claim(tmp_path / "shard") as is_ours:
        assert is_ours is False
    assert (tmp_path / ".shard.lock").exists()


def test_what_another_process_has_just_made_is_left(tokenizer, corpus: Path, tmp_path: Path, monkeypatch) -> None:
    """Between the look at what is missing and the claim, another process may have finished it."""
    cache = tmp_path / "cache"
    path, sweep = str(corpus / "a.txt"), shard_cache.sweep
    others: list[dict[str, int]] = []

    def meanwhile(folder: Path) -> None:
        monkeypatch.setattr(shard_cache, "sweep", sweep)
        cached_token_shards(path, tokenizer, cache)
        others.append(inodes(cache))

    monkeypatch.setattr(shard_cache, "sweep", meanwhile)
    cached_token_shards(path, tokenizer, cache)
    assert [inodes(cache)] == others


def test_a_damaged_shard_is_made_anew_and_that_is_said(tokenizer, corpus: Path, tmp_path: Path) -> None:
    cache, lines = tmp_path / "cache", []
    good = cached_token_shards(str(corpus), tokenizer, cache)
    before = inodes(cache)
    damaged = sorted(cache.iterdir())[2]
    os.truncate(damaged / "tokens.bin", 4)
    again = cached_token_shards(str(corpus), tokenizer, cache, notice=lines.append)
    assert again.fingerprint == good.fingerprint
    assert [name for name, inode in inodes(cache).items() if before[name] != inode] == [damaged.name]
    (line,) = lines
    assert str(damaged) in line and "tokens.bin has 4 bytes" in line and line.endswith("its source is tokenised again")


def test_a_disk_that_damages_what_it_is_given_is_an_error(tokenizer, corpus: Path, tmp_path: Path, monkeypatch) -> None:
    """It would otherwise be tokenised for ever."""
    write_shard = shard_cache.write_shard

    def write(parts, tokenizer, folder, *rest) -> None:
        write_shard(parts, tokenizer, folder, *rest)
        os.truncate(folder / "tokens.bin", 4)

    monkeypatch.setattr(shard_cache, "write_shard", write)
    with pytest.raises(ValueError, match="damaged token shard .tokens.bin has 4 bytes"):
        cached_token_shards(str(corpus), tokenizer, tmp_path / "cache")


def test_bad_rows_are_counted_over_the_whole_corpus(tokenizer, tmp_path: Path) -> None:
    """Also when the shards were made earlier: a stricter limit must not be passed because the work is done."""
    rows = [json.dumps({"text": f"row {number}"}) for number in range(50)]
    for name, bad in (("a", 1), ("b", 0), ("c", 2)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows[bad:] + ["{"] * bad))
    for _ in range(2):
        bad_rows = BadRows(limit=0.02)
        cached_token_shards(str(tmp_path / "*.jsonl"), tokenizer, tmp_path / "cache", bad_rows)
        assert (bad_rows.num_rows, bad_rows.num_bad) == (150, 3)
        for place in ("a.jsonl, line 50: not JSON", "c.jsonl, line 49: not JSON", "c.jsonl, line 50: not JSON"):
            assert place in bad_rows.report()
        with pytest.raises(ValueError, match=r"3 of 150 rows are bad.*--max_bad_rows 0.02"):
            cached_token_shards(str(tmp_path / "*.jsonl"), tokenizer, tmp_path / "cache", BadRows(limit=0.019))


def test_a_corpus_without_a_document_is_refused(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    for _ in range(2):
        with pytest.raises(ValueError, match="a.txt: no rows"):
            cached_token_shards(str(tmp_path / "a.txt"), tokenizer, tmp_path / "cache")


def test_files_before_a_broken_one_stay_done(tokenizer, corpus: Path, tmp_path: Path) -> None:
    (corpus / "d.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="d.txt, line 1: not UTF-8"):
        cached_token_shards(str(corpus), tokenizer, tmp_path / "cache")
    assert len(inodes(tmp_path / "cache")) == 3
    with pytest.raises(ValueError, match="d.txt, line 1: not UTF-8"):
        cached_token_shards(str(corpus / "d.txt"), tokenizer, tmp_path / "new" / "cache")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_files_not_yet_done(tokenizer, corpus: Path, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    cache = tmp_path / "out" / "token_shards"
    killed = start(shard_worker.main, str(corpus), str(tmp_path), "kill", log=tmp_path / "log")  # at the third shard
    assert end_of(killed, tmp_path / "log") == -signal.SIGKILL
    done = {folder.name for folder in cache.iterdir() if not folder.name.startswith(".")}
    left = [folder.name for folder in cache.iterdir() if folder.name.startswith(".")]
    assert len(done) == 2 and len(left) == 2, "a lock and half a shard"
    before = {name: (cache / name / "meta.json").stat().st_ino for name in done}
    again = cached_token_shards(str(corpus), tokenizer, cache)
    after = inodes(cache)  # nothing but shards
    assert len(after) == 6 and before.items() < after.items()
    assert again.fingerprint == cached_token_shards(str(corpus), tokenizer, tmp_path / "other").fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("disks", [1, 2])
def test_two_ranks_share_the_work_of_a_disk(tokenizer, corpus: Path, tmp_path: Path, disks: int) -> None:
    """On one disk each file is tokenised by one of them; on two, as on two machines, each makes all. All see the
    same corpus, as one process does."""
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "1").symlink_to(".")
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "tokenizer").symlink_to(tmp_path / "tokenizer")
    results = run_two(tmp_path, corpus, [tmp_path / "1", tmp_path / str(disks)])
    written = [set(result["written"]) for result in results]
    if disks == 1:
        assert len(written[0] | written[1]) == 6 and not written[0] & written[1] and all(written)
    else:
        assert written[0] == written[1] and len(written[0]) == 6
    train, held = load_pretrain_data(str(corpus), tokenizer, 32, tmp_path / "alone", validation_fraction=0.2, seed=42)
    assert held is not None
    for result in results:
        assert result["fingerprints"] == [train.fingerprint, held.fingerprint]
    assert all(not folder.name.startswith(".") for folder in (tmp_path / "out" / "token_shards").iterdir())


@pytest.mark.slow
def test_two_runs_share_the_work_in_the_cache(tokenizer, corpus: Path, tmp_path: Path) -> None:
    """Each file is tokenised by one of them, whatever their own folders are."""
    for name in "12":
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name / "tokenizer")
    results = run_two(tmp_path, corpus, [tmp_path / "1", tmp_path / "2"], how=SHARED)
    written = [set(result["written"]) for result in results]
    assert len(written[0] | written[1]) == 6 and not written[0] & written[1] and all(written)
    assert results[0]["fingerprints"] == results[1]["fingerprints"]
    cache = shared_cache()
    assert cache is not None and len(cache.entries()) == 6
    assert not [path for path in cache.shards.iterdir() if path.name.startswith(".")]
    assert not list(tmp_path.glob("*/out/token_shards")) and cache.names_in_use() == set()


@pytest.mark.slow
def test_ranks_that_see_different_files_are_stopped(tokenizer, corpus: Path, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("An older copy of the corpus. " * 20)
    results = run_two(tmp_path, corpus, [tmp_path, tmp_path], second_corpus=other)
    for rank, result in enumerate(results):
        assert (
            f"process {rank} reads different data from the other processes; expected the same files" in result["error"]
        )


def run_two(
    folder: Path, corpus: Path, outputs: list[Path], second_corpus: Path | None = None, how: str = TOGETHER
) -> list[dict]:
    """Two processes over gloo; what each of them wrote to its result file."""
    how = how if second_corpus is None else ""
    sees = [corpus, second_corpus or corpus]
    words = [[str(sees[rank]), str(output), how] for rank, output in enumerate(outputs)]
    run_ranks(shard_worker.main, words, folder, MEETING=str(folder))
    return [json.loads((output / f"result.{rank}.json").read_text()) for rank, output in enumerate(outputs)]
