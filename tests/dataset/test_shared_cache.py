"""The cache of token shards that all runs share: what is found, what is removed, and what if it cannot be used."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.processes import PATIENCE, end_of, start
from tinylm.dataset.shards import shard_cache, shard_names, shared_cache
from tinylm.dataset.shards.shard_cache import cached_token_shards
from tinylm.dataset.shards.shared_cache import SharedCache
from tinylm.dataset.shards.token_shards import TokenShards, tokenize_texts, write_shard
from tinylm.dataset.shards.tokenizing import chunks_of, encode_chunk
from tinylm.dataset.sources.finding import find_sources


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of three text files that were last changed a while ago."""
    (tmp_path / "Bücher").mkdir()
    for number, name in enumerate("abc"):
        path = tmp_path / "Bücher" / f"{name}.txt"
        path.write_text(f"{name}: the little boat – {number} 船 – sailed.\n" * (9 + number), encoding="utf-8")
    return tmp_path / "Bücher"


@pytest.fixture
def cache(tmp_path: Path) -> SharedCache:
    return SharedCache(tmp_path / "cache", 1e9)


@pytest.fixture
def settled(monkeypatch) -> None:
    """Files count as complete at once."""
    monkeypatch.setattr(shard_names, "SETTLED_SECONDS", -PATIENCE)


def names_of(path: Path, tokenizer, **options) -> list[str]:
    return shard_names.shard_names(find_sources(str(path)), tokenizer, **options)


def shards_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


# --------------------------------------------------------------------------------------------------
# What is found again
# --------------------------------------------------------------------------------------------------


def test_a_second_run_tokenises_nothing(tokenizer, corpus: Path, cache, tmp_path: Path, monkeypatch) -> None:
    """Also where the files have other names, places and times; and neither run has shards in its own folder."""
    lines: list[str] = []
    first = cached_token_shards(str(corpus), tokenizer, tmp_path / "one", cache=cache, notice=lines.append)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in "abc":
        (copy / f"of {name}.txt").write_bytes((corpus / f"{name}.txt").read_bytes())
        os.utime(copy / f"of {name}.txt", (1, 1))
    monkeypatch.setattr(shard_cache, "write_shard", None)  # would fail if it were called
    for data in (corpus, copy):
        again = cached_token_shards(str(data), tokenizer, tmp_path / "two", cache=cache, notice=lines.append)
        assert again.fingerprint == first.fingerprint
    assert [line.partition(" (")[0] for line in lines] == [
        f"tokenised before: {number} of 3 files" for number in (0, 3, 3)
    ]
    assert not (tmp_path / "one").exists() and not (tmp_path / "two").exists()
    facts = [entry.facts() for entry in cache.entries()]
    assert {fact["source"] for fact in facts} == {str(corpus / f"{name}.txt") for name in "abc"}


def test_a_run_that_opens_shards_uses_them(tokenizer, corpus: Path, cache, tmp_path: Path) -> None:
    """So they are not the first to be removed."""
    cached_token_shards(str(corpus), tokenizer, tmp_path / "own", cache=cache)
    for entry in cache.entries():
        os.utime(entry.folder / "meta.json", (1, 1))
    cached_token_shards(str(corpus / "b.txt"), tokenizer, tmp_path / "own", cache=cache)
    used = {entry.facts()["source"][-5:]: entry.used > 1 for entry in cache.entries()}
    assert used == {"a.txt": False, "b.txt": True, "c.txt": False}


def test_what_is_unknown_before_it_is_read_is_not_shared(
    tokenizer, corpus: Path, cache, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(shard_cache, "has_known_content", lambda source: not source.path.endswith("b.txt"))
    cached_token_shards(str(corpus), tokenizer, tmp_path / "own", cache=cache)
    names = names_of(corpus, tokenizer)
    assert shards_in(tmp_path / "own") == {names[1]}
    assert shards_in(cache.shards) == {names[0], names[2]}


def test_equal_files_in_a_corpus_share_a_shard(tokenizer, corpus: Path, cache, tmp_path: Path) -> None:
    (corpus / "b.txt").write_bytes((corpus / "a.txt").read_bytes())
    found = cached_token_shards(str(corpus), tokenizer, tmp_path / "own", cache=cache)
    texts = [(corpus / f"{name}.txt").read_text(encoding="utf-8") for name in "aac"]
    expected = tokenize_texts(texts, tokenizer)
    parts = [found.tokens[a:b].tolist() for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)]
    assert sum(parts, []) == expected.tokens.tolist()
    assert len(cache.entries()) == 2


def test_all_that_changes_the_tokens_changes_the_name(tokenizer, corpus: Path, tmp_path: Path, monkeypatch) -> None:
    """A byte in the middle of a large file whose time is set back; the kind of file; tokenizer; code; library."""
    large = tmp_path / "large.txt"
    content = bytearray(b"a line\n" * (1 << 19))
    large.write_bytes(content)
    state = large.stat()
    seen = names_of(large, tokenizer)
    content[len(content) // 2] = ord("x")
    large.write_bytes(content)
    os.utime(large, ns=(state.st_atime_ns, state.st_mtime_ns))
    seen += names_of(large, tokenizer)
    large.rename(tmp_path / "large.jsonl")
    seen += names_of(tmp_path / "large.jsonl", tokenizer)
    seen += names_of(tmp_path / "large.jsonl", type(tokenizer).train(["aa bb aa bb"], vocab_size=274))
    for attribute in ("code_fingerprint", "tokenizers.__version__", "FORMAT_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{shard_names.__name__}.{attribute}", (lambda *a: "x") if "code" in attribute else "x")
            shard_names._reading_code.cache_clear()
            seen += names_of(tmp_path / "large.jsonl", tokenizer)
    shard_names._reading_code.cache_clear()
    assert len(set(seen)) == len(seen) == 7
    assert names_of(tmp_path / "large.jsonl", tokenizer) == seen[2:3]


def test_the_code_between_source_and_tokens_is_part_of_the_name(repository: Path) -> None:
    for place in shard_names.READING_CODE:
        assert (repository / "tinylm" / place).exists(), place


def test_an_unchanged_file_is_not_read_again_to_be_named(
    tokenizer, corpus: Path, tmp_path: Path, monkeypatch, settled
) -> None:
    """Through a relative path too. A changed file is, even if its time and size are as before."""
    memory = tmp_path / "deep" / "memory.json"
    first = names_of(corpus, tokenizer, memory=memory)
    file = corpus / "b.txt"
    state, text = file.stat(), file.read_text(encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(shard_names, "sha256_of", None)  # would fail if it were called
        assert names_of(corpus, tokenizer, memory=memory) == first
        patch.chdir(tmp_path)
        assert names_of(Path("Bücher"), tokenizer, memory=memory) == first
    file.write_text(text.replace("little", "LITTLE"), encoding="utf-8")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    changed = names_of(corpus, tokenizer, memory=memory)
    assert [a == b for a, b in zip(first, changed, strict=True)] == [True, False, True]
    assert changed == names_of(corpus, tokenizer)


def test_the_hash_of_a_file_that_changed_just_now_is_not_kept(tokenizer, corpus: Path, tmp_path: Path) -> None:
    """It may change again in the same tick of the disk's clock."""
    names_of(corpus, tokenizer, memory=tmp_path / "memory.json")
    assert json.loads((tmp_path / "memory.json").read_text()) == {}


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b'{"x": 3}', b"[" * 99_999])
def test_a_damaged_memory_of_hashes_costs_only_time(tokenizer, corpus: Path, tmp_path: Path, content: bytes) -> None:
    memory = tmp_path / "memory.json"
    memory.write_bytes(content)
    assert names_of(corpus, tokenizer, memory=memory) == names_of(corpus, tokenizer)


def test_a_file_that_changes_while_it_is_read_is_refused(
    tokenizer, corpus: Path, cache, tmp_path: Path, monkeypatch
) -> None:
    """Else its new tokens would stand under the old content's name, for all runs and for ever."""
    read_texts = shard_cache.read_texts

    def read(path, bad_rows):
        yield from read_texts(path, bad_rows)
        if path.endswith("b.txt"):
            with open(path, "a") as file:
                file.write("more\n")

    monkeypatch.setattr(shard_cache, "read_texts", read)
    with pytest.raises(ValueError, match=r"b\.txt changed while it was read; run the same command again"):
        cached_token_shards(str(corpus), tokenizer, tmp_path / "own", cache=cache)
    assert len(cache.entries()) == 1 and not cache.names_in_use()


def test_a_run_resumes_with_the_shards_of_its_own_that_an_earlier_version_made(
    tokenizer, corpus: Path, cache, tmp_path: Path
) -> None:
    """Only then: a new run in the folder reads the data as it is read now."""
    own = tmp_path / "token_shards"
    (source,) = find_sources(str(corpus / "a.txt"))
    earlier = ["As an earlier version read it."]
    name = shard_names.earlier_shard_name(source, tokenizer)
    write_shard((encode_chunk(tokenizer, chunk) for chunk in chunks_of(earlier, tokenizer)), tokenizer, own / name)
    resumed = cached_token_shards(source.path, tokenizer, own, cache=cache, resume=True)
    assert resumed.fingerprint == tokenize_texts(earlier, tokenizer).fingerprint
    assert cache.entries() == []
    new = cached_token_shards(source.path, tokenizer, own, cache=cache)
    assert new.fingerprint == tokenize_texts([Path(source.path).read_text(encoding="utf-8")], tokenizer).fingerprint


def test_the_earlier_name_is_as_it_was(tokenizer, tmp_path: Path) -> None:
    """Written down from the version before: a run of that version must find its shards."""
    file = tmp_path / "text.txt"
    file.write_bytes(b"The little boat.\n")
    os.utime(file, ns=(10**18, 10**18))
    (source,) = find_sources(str(file))

    class Known:
        fingerprint = "0123456789abcdef"

    assert shard_names.earlier_shard_name(source, Known) == "cc55b584c315c92b"


# --------------------------------------------------------------------------------------------------
# What is removed
# --------------------------------------------------------------------------------------------------


def fill(cache: SharedCache, tokenizer, sizes: list[int]) -> list[Path]:
    """Shards of about so many bytes, the first used longest ago."""
    folders = []
    for number, size in enumerate(sizes):
        folder = cache.shards / f"{number:016x}"
        write_shard([], tokenizer, folder, source=f"/data/{number}.txt")
        (folder / "tokens.bin").write_bytes(b"\0" * size)
        os.utime(folder / "meta.json", (1000 + number, 1000 + number))
        folders.append(folder)
    return folders


def test_the_least_recently_used_go_first(tokenizer, cache) -> None:
    folders = fill(cache, tokenizer, [100_000, 200_000, 300_000])
    assert cache.prune() == []
    cache.touch([folders[0].name])
    (removed,) = cache.prune(500_000)
    assert removed.folder == folders[1] and removed.num_bytes > 200_000
    assert shards_in(cache.shards) == {folders[0].name, folders[2].name}
    cache.prune(0)
    assert shards_in(cache.shards) == set()


def test_a_run_that_adds_shards_keeps_the_bound(tokenizer, corpus: Path, tmp_path: Path) -> None:
    """And its own stay, though they alone are more than the bound."""
    cache, lines = SharedCache(tmp_path / "cache", 1000), []
    old = fill(cache, tokenizer, [5000, 5000])
    found = cached_token_shards(str(corpus), tokenizer, tmp_path / "own", cache=cache, notice=lines.append)
    assert "the 2 token shards used longest ago" in lines[-1]
    assert not any(folder.exists() for folder in old)
    assert shards_in(cache.shards) == set(names_of(corpus, tokenizer))
    assert len(found.tokens) == found.offsets[-1]


def test_shards_in_use_stay_and_may_go_when_the_corpus_is_gone(tokenizer, corpus: Path, cache, tmp_path: Path) -> None:
    found: TokenShards | None = cached_token_shards(str(corpus), tokenizer, tmp_path / "own", cache=cache)
    assert cache.names_in_use() == set(names_of(corpus, tokenizer))
    assert cache.prune(0) == [] and len(cache.entries()) == 3
    del found
    gc.collect()
    assert cache.names_in_use() == set() and shards_in(cache.uses) == set()
    assert len(cache.prune(0)) == 3


def test_shards_that_a_run_is_going_to_make_are_in_use(tokenizer, cache) -> None:
    lease = cache.lease(["0" * 16])
    (folder, other) = fill(cache, tokenizer, [10, 10])
    assert [entry.folder for entry in cache.prune(0)] == [other]
    lease.release()
    lease.release()
    assert [entry.folder for entry in cache.prune(0)] == [folder]


def test_only_shards_are_removed(tokenizer, cache, tmp_path: Path) -> None:
    """Somebody may point the variable at a folder with other things in it."""
    fill(cache, tokenizer, [10])
    (cache.shards / "thesis").mkdir()
    (cache.shards / ("a" * 16)).write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (cache.shards / ("b" * 16)).symlink_to(tmp_path / "elsewhere")
    assert len(cache.prune(0)) == 1
    assert shards_in(cache.shards) == {"thesis", "a" * 16, "b" * 16}


def test_what_killed_processes_left_is_removed(tokenizer, cache) -> None:
    """Half a shard and the lock beside it, a shard that was being removed, and old hashes."""
    fill(cache, tokenizer, [10])
    (cache.shards / f".{'a' * 16}.x.tmp").mkdir()
    (cache.shards / f".{'a' * 16}.x.tmp" / "tokens.bin").write_bytes(b"123")
    (cache.shards / f".{'a' * 16}.lock").touch()
    cache.sources.mkdir()
    for name, age in (("new", 0), ("old", shared_cache.FORGET_SECONDS + 9)):
        (cache.sources / f"{name}.json").write_text("{}")
        os.utime(cache.sources / f"{name}.json", (time.time() - age,) * 2)
    assert cache.prune() == []
    assert shards_in(cache.shards) == {"0" * 16}
    assert shards_in(cache.sources) == {"new.json"}


def hold(root: str, corpus: str, ready: str) -> None:
    """Use a corpus until the end of the process."""
    from tests.dataset.conftest import TEXT
    from tinylm.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.train([TEXT * 3], vocab_size=300)
    found = cached_token_shards(corpus, tokenizer, f"{root}/own", cache=SharedCache(Path(root), 1e9))
    Path(ready).touch()
    time.sleep(PATIENCE)
    assert found


@pytest.mark.slow
def test_another_process_keeps_its_shards_until_it_is_killed(tokenizer, corpus: Path, cache, tmp_path: Path) -> None:
    holder = start(hold, str(cache.root), str(corpus), str(tmp_path / "ready"), log=tmp_path / "log")
    patience = time.monotonic() + PATIENCE
    while not (tmp_path / "ready").exists():
        assert holder.exitcode is None and time.monotonic() < patience, (tmp_path / "log").read_text()
        time.sleep(0.01)
    assert cache.prune(0) == [] and len(cache.entries()) == 3
    holder.kill()
    assert end_of(holder, tmp_path / "log") == -signal.SIGKILL
    assert len(cache.prune(0)) == 3 and shards_in(cache.uses) == set()


# --------------------------------------------------------------------------------------------------
# What if it cannot be used
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOLCK, errno.ENOSPC])
def test_a_cache_that_cannot_be_written(tokenizer, corpus: Path, cache, tmp_path: Path, monkeypatch, code: int) -> None:
    """The run's own folder serves, now and for a later run in it, and one line says so."""

    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(shared_cache, "file_lock", refuse)
    lines: list[str] = []
    found = cached_token_shards(str(corpus), tokenizer, tmp_path / "own", cache=cache, notice=lines.append)
    (line,) = lines
    assert line == f"the cache {cache.root} cannot be used ({os.strerror(code)}): token shards go to {tmp_path / 'own'}"
    assert shards_in(tmp_path / "own") == set(names_of(corpus, tokenizer))
    monkeypatch.undo()
    monkeypatch.setattr(shard_cache, "write_shard", None)
    again = cached_token_shards(str(corpus), tokenizer, tmp_path / "own", cache=cache)
    assert again.fingerprint == found.fingerprint and cache.entries() == []


def test_a_disk_that_fills_up_in_between(tokenizer, corpus: Path, cache, tmp_path: Path, monkeypatch) -> None:
    """What was done before stays and is used."""
    write, written = shard_cache.write_shard, []

    def write_until_full(chunks, tokenizer, folder, *rest):
        if folder.parent == cache.shards and written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(chunks, tokenizer, folder, *rest)
        written.append(folder.parent)

    monkeypatch.setattr(shard_cache, "write_shard", write_until_full)
    lines: list[str] = []
    found = cached_token_shards(str(corpus), tokenizer, tmp_path / "own", cache=cache, notice=lines.append)
    assert written == [cache.shards, tmp_path / "own", tmp_path / "own"]
    assert len(lines) == 1 and "No space left" in lines[0]
    monkeypatch.undo()
    expected = cached_token_shards(str(corpus), tokenizer, tmp_path / "other")
    assert found.fingerprint == expected.fingerprint
    assert cache.names_in_use() >= {entry.folder.name for entry in cache.entries()}


def test_a_cache_that_is_a_file_and_a_home_that_is_unknown(tokenizer, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root, reason in (
        (tmp_path / "file", "Not a directory"),
        (Path("~/.cache/tinylm"), "not a path from the root; set TINYLM_CACHE_DIR"),
    ):
        lines: list[str] = []
        cache = SharedCache(root, 1e9)
        found = cached_token_shards(str(corpus), tokenizer, tmp_path / "own", cache=cache, notice=lines.append)
        assert len(found.offsets) == 4 and len(lines) == 1 and reason in lines[0]
    assert not Path("~").exists()


def test_a_full_disk_of_the_run_itself_is_an_error(tokenizer, corpus: Path, cache, tmp_path: Path, monkeypatch) -> None:
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shard_cache, "write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        cached_token_shards(str(corpus), tokenizer, tmp_path / "own", cache=cache)
    assert not cache.names_in_use()


# --------------------------------------------------------------------------------------------------
# Where it is
# --------------------------------------------------------------------------------------------------


def test_flag_variable_and_default_in_this_order(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("platformdirs")
    for name in ("TINYLM_CACHE_DIR", "TINYLM_CACHE_GB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    found = shared_cache.shared_cache()
    assert found is not None and (found.root, found.max_bytes) == (tmp_path / "xdg" / "tinylm", 10e9)
    monkeypatch.setenv("TINYLM_CACHE_DIR", "~/mine")
    monkeypatch.setenv("TINYLM_CACHE_GB", "2.5")
    found = shared_cache.shared_cache()
    assert found is not None and (found.root, found.max_bytes) == (tmp_path / "mine", 2.5e9)
    found = shared_cache.shared_cache(str(tmp_path / "flag"), 3)
    assert found is not None and (found.root, found.max_bytes) == (tmp_path / "flag", 3e9)
    assert shared_cache.shared_cache(cache_gb=0) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "word"), [("ten", "'ten'"), ("-1", "-1.0"), ("nan", "nan")])
def test_a_bound_that_is_no_size(monkeypatch, value: str, word: str) -> None:
    monkeypatch.setenv("TINYLM_CACHE_GB", value)
    with pytest.raises(ValueError, match=f"TINYLM_CACHE_GB is {word}; expected a number of gigabytes, such as 10"):
        shared_cache.shared_cache()


def test_tests_have_a_cache_of_their_own(tmp_path_factory) -> None:
    assert Path(os.environ["TINYLM_CACHE_DIR"]).is_relative_to(tmp_path_factory.getbasetemp())
