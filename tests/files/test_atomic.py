"""Files and folders are written whole or not at all, and the manifest recognises a damaged file."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinylm.files import atomic as atomic_files
from tinylm.files.atomic import (
    atomic_folder,
    atomic_write,
    check_manifest,
    remove_leftovers,
    write_json,
    write_manifest,
)
from tinylm.files.untrusted import MAX_JSON_BYTES, read_json, read_own_json


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.bin"
    with atomic_write(target) as file:
        file.write(b"half")
        file.flush()
        assert not target.exists()
    assert target.read_bytes() == b"half"


@pytest.fixture(params=[0o022, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_results_have_the_modes_that_the_user_gives_to_new_files(
    tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temporary files are private. Reading the umask by changing it made another thread's files open to everybody."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
        with atomic_write(tmp_path / "file") as file:
            file.write(b"x")
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "inside").mkdir()
            for name in ("private", "inside/private"):
                os.close(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600))  # as safetensors makes them
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask
    for name in ("file", "folder/private", "folder/inside/private"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask, name


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows it")
def test_where_the_system_does_not_show_the_umask_it_is_that_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False if str(path).startswith("/proc") else os.path.exists(path))
    monkeypatch.setattr(atomic_files, "_UMASK_AT_START", 0o031)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"x")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o646


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
    """Where the system cannot exchange two folders, the swap takes two renames, and the second may fail."""
    monkeypatch.setattr(atomic_files, "_exchange", lambda one, other: False)
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


def test_a_folder_is_never_missing_while_it_is_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two renames there was no folder: a kill at that moment lost the old model."""
    target, rename, missing = tmp_path / "model", os.rename, []
    with atomic_folder(target) as folder:
        (folder / "old").write_text("old")

    def watched(source: Path, destination: Path) -> None:
        rename(source, destination)
        missing.append(not target.exists())

    monkeypatch.setattr(os, "rename", watched)
    with atomic_folder(target) as folder:
        (folder / "new").write_text("new")
    assert True not in missing
    assert [file.name for file in target.iterdir()] == ["new"]


def test_only_the_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".model.abc.tmp").mkdir()
    (tmp_path / ".model.abc.tmp" / "half").write_text("x")
    (tmp_path / ".model.def.old").mkdir()
    (tmp_path / ".model.ghi.tmp").write_text("half a file")
    for name in ("model", ".model2.abc.tmp", ".model.keep"):
        (tmp_path / name).write_text("stays")
    remove_leftovers(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.keep", ".model2.abc.tmp", "model"]


def test_json_that_every_reader_takes(tmp_path: Path) -> None:
    path = tmp_path / "naïve.json"
    data = {"loss": float("inf"), "rows": [1.5, float("nan"), (2, float("-inf"))], "name": "模型 é", "ok": True}
    write_json(path, data)
    assert "模型 é" in path.read_text(encoding="utf-8") and path.read_bytes().endswith(b"}\n")
    assert read_json(path) == {"loss": None, "rows": [1.5, None, [2, None]], "name": "模型 é", "ok": True}
    with pytest.raises(TypeError):
        write_json(path, {"name": "other", "what": {1, 2}})
    assert read_json(path)["name"] == "模型 é" and list(tmp_path.iterdir()) == [path]


def test_our_own_json_may_be_large_and_hold_infinity(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"best": float("inf"), "long": "x" * MAX_JSON_BYTES}))
    assert read_own_json(path)["best"] == float("inf")
    with pytest.raises(ValueError, match="at most 1048576 are expected"):
        read_json(path)
    path.write_text('{"best": Infinity}')
    with pytest.raises(ValueError, match="not finite"):
        read_json(path)


@pytest.mark.skipif(sys.platform != "linux", reason="the files are told by /proc")
def test_the_entry_of_a_new_folder_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a flush, a power cut after the rename could lose the first model of a folder."""
    rename, fsync, calls = os.rename, os.fsync, []

    def watched_rename(source: Path, destination: Path) -> None:
        rename(source, destination)
        calls.append(f"rename to {Path(destination).name}")

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        calls.append(f"fsync {os.readlink(f'/proc/self/fd/{descriptor}')}")

    monkeypatch.setattr(os, "rename", watched_rename)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").write_bytes(b"x")
    assert calls[-2:] == ["rename to model", f"fsync {tmp_path}"]
    assert [Path(call.split()[1]).name for call in calls[:-2]] == ["weights", folder.name]
    with atomic_folder(tmp_path / "model") as folder:  # the same when one takes the place of another
        (folder / "weights").write_bytes(b"y")
    assert calls[-1] == f"fsync {tmp_path}" and (tmp_path / "model" / "weights").read_bytes() == b"y"


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    write_manifest(tmp_path)
    return tmp_path


def test_a_manifest_knows_every_byte(listed: Path) -> None:
    manifest = json.loads((listed / "manifest.json").read_text())
    # the digests of "abc" and of nothing, as FIPS 180-2 and every sha256sum give them
    assert manifest["files"]["a"]["sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest["files"]["b"] == {
        "bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    }  # fmt: skip
    (listed / "unknown").write_text("no fault")
    check_manifest(listed)
    for data in (b"abd", b"ab", b"abcd"):
        (listed / "a").write_bytes(data)
        check_manifest(listed, "b")
        with pytest.raises(ValueError, match=r"a is not what was written .*restore it from a copy"):
            check_manifest(listed)
    (listed / "a").unlink()
    with pytest.raises(ValueError, match="a is missing; manifest.json lists it"):
        check_manifest(listed)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": 2, "files": {}}',
        '{"format": 1, "files": 3}',
        '{"format": 1, "files": {"a": 1}}',
        '{"format": 1, "files": {"a": {"bytes": 3}}}',
        "[" * 10**5,
    ],
)
def test_a_damaged_manifest_is_named(listed: Path, text: str) -> None:
    (listed / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="is not a manifest, or does not list all files"):
        check_manifest(listed)
    (listed / "manifest.json").unlink()
    with pytest.raises(ValueError, match="has no manifest.json"):
        check_manifest(listed)


def test_a_manifest_looks_only_at_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_text("x")
    facts = {"bytes": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    (tmp_path / "inside" / "manifest.json").write_text(json.dumps({"format": 1, "files": {"../secret": facts}}))
    with pytest.raises(ValueError, match="is missing"):
        check_manifest(tmp_path / "inside")


def test_a_folder_that_was_put_aside_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where folders cannot be exchanged, a kill between two renames left the old folder aside, and the next run
    deleted it."""
    monkeypatch.setattr(atomic_files, "_exchange", lambda one, other: False)
    target, rename = tmp_path / "model", os.rename
    with atomic_folder(target) as folder:
        (folder / "old").write_text("old")

    class Killed(BaseException):
        pass

    def killed_behind_the_first(source: Path, destination: Path) -> None:
        if not str(destination).endswith(".old"):
            raise Killed
        rename(source, destination)

    monkeypatch.setattr(os, "rename", killed_behind_the_first)
    monkeypatch.setattr(atomic_files.shutil, "rmtree", lambda *_, **__: None)  # a killed process does not clean up
    with pytest.raises(Killed), atomic_folder(target) as folder:
        (folder / "new").write_text("new")
    monkeypatch.undo()
    assert not target.exists()
    remove_leftovers(target)
    assert [file.name for file in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_name_that_is_not_utf8_is_written_readably(tmp_path):
    """A report on a file with a Latin-1 name was lost: "'utf-8' codec can't encode"."""
    write_json(tmp_path / "r.json", {"path": "caf\udce9/größe", "n": [math.nan, 1.5]})
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == {
        "path": "caf\\udce9/größe",
        "n": [None, 1.5],
    }
