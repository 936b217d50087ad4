"""Write files and folders completely or not at all, and a manifest that shows later whether they changed.

The new file is written beside its target under a temporary name, flushed to the disk, and then renamed. Whatever stops
the writer (a kill, a full disk, a power cut), the target is the complete old file or the complete new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from tinylm.files.untrusted import read_json

MANIFEST = "manifest.json"


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` for binary writing; it becomes `path` when the block ends without an error.

    If the block fails (a full disk, an interruption), the temporary file and the parent folders made for it are
    deleted, and the old `path` is kept. Symbolic links are followed: the file they point to is replaced.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a file name; choose another path")
    with _parent_folder(target) as parent:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=parent)
        try:
            os.close(descriptor)
            with open(name, "wb") as file:  # by its name, so that the block may read it back as `file.name`
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, target.stat().st_mode & 0o777 if target.exists() else _default_mode(0o666))
            os.replace(name, target)
            _sync(parent)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(name)
            if isinstance(error, OSError) and error.filename is None and error.errno is not None:
                error.filename = str(path)  # a full disk: the system's error does not name the file
            raise


@contextlib.contextmanager
def atomic_folder(path: str | Path, flush: bool = True) -> Iterator[Path]:
    """Yield an empty temporary folder; it becomes `path` when the block ends without an error.

    An existing folder at `path` is swapped out, then deleted. If the block fails, the temporary folder and the parent
    folders made for it are deleted, and the old folder is kept.

    Args:
        flush: False saves about 20 ms a folder. A power cut may then leave a folder with damaged files, so it is only
            for files that are checked when they are read and can be made again.

    Raises:
        NotADirectoryError: `path` is a file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{path} is a file; expected a folder name; choose another path")
    with _parent_folder(target) as parent:
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=parent))
        try:
            yield fresh
            mode = _default_mode(0o666)
            for entry in sorted(fresh.rglob("*")):
                if entry.is_file():
                    entry.chmod(mode)  # safetensors makes its files private
                if flush:
                    _sync(entry)
            fresh.chmod(_default_mode(0o777))
            if flush:
                _sync(fresh)
            _swap_in(fresh, target, flush)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object completely or not at all. NaN and infinite numbers become null: JSON has neither.

    The bytes of a file's name that are not UTF-8 are written as the text `\\udce9`.
    """
    with atomic_write(path) as file:
        text = json.dumps(_writable(data), indent=2, ensure_ascii=False, allow_nan=False)
        file.write(text.encode("utf-8") + b"\n")


def _writable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _writable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", errors="backslashreplace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require_new(path: Path, overwrite: bool, flag: str) -> None:
    """Refuse to replace a finished result, unless that was asked for.

    Args:
        flag: the flag that chose the path.

    Raises:
        ValueError: `path` exists, and `overwrite` is false.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; pass --overwrite to replace it, or choose another --{flag}")


def require_room(path: Path, num_bytes: int) -> None:
    """Raise ValueError if the disk of `path` has less room: better now than in the middle of the file."""
    there = next(place for place in path.absolute().parents if place.exists())
    if (free := shutil.disk_usage(there).free) < num_bytes:
        raise ValueError(
            f"{path} needs {num_bytes / 1e6:,.1f} MB and {there} has {free / 1e6:,.1f} MB free; make room there, or "
            "choose another --output"
        )


def require_file_name(output: str) -> None:
    """Raise ValueError if a file cannot be written there: better now than after an hour of measuring."""
    there = next(place for place in (Path(output), *Path(output).absolute().parents) if place.exists())
    if there.is_dir() and (not output.strip() or Path(output).is_dir()):
        raise ValueError(f"output is {output!r}, a folder; expected a file name, such as --output report.json")
    if not (there.is_dir() or there == Path(output)) or not os.access(there, os.W_OK):
        raise ValueError(f"output is {output}, but {there} cannot be written to; choose another --output")


def remove_folder(path: Path) -> None:
    """Delete a folder so that no part of it is ever seen under its name, not even after a kill."""
    hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    os.rename(path, hidden / path.name)
    _sync(path.parent)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(path: str | Path) -> None:
    """Delete what a killed `atomic_write` or `atomic_folder` of `path` has left; only the owner of `path` may call it.

    On a system that cannot exchange two folders, a kill between two renames leaves the old folder under another name.
    It gets its name back.
    """
    target = Path(os.path.realpath(path))
    if not target.exists():
        for old in target.parent.glob(f".{target.name}.*.old"):
            if any(old.iterdir()):
                os.rename(old, target)
                break
    for end in ("tmp", "old"):
        for left in target.parent.glob(f".{target.name}.*.{end}"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def _parent_folder(target: Path) -> Iterator[Path]:
    """Make the parent folders of `target`; if the block fails, delete those that were made and are empty."""
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in made:
            _sync(folder.parent)
        yield target.parent
    except BaseException:
        with contextlib.suppress(OSError):  # stop at the first folder that is not empty
            for folder in made:
                folder.rmdir()
        raise


def _swap_in(fresh: Path, target: Path, flush: bool) -> None:
    """Rename `fresh` to `target`. If the system can exchange two folders, `target` exists at every moment."""
    if not target.exists():
        os.rename(fresh, target)
        if flush:
            _sync(target.parent)
        return
    if not _exchange(fresh, target):
        # After a kill between these two renames, `remove_leftovers` finds the old folder by its name and restores it.
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        os.rename(target, old)  # a rename onto an empty folder replaces it
        try:
            os.rename(fresh, target)
        except BaseException:
            os.rename(old, target)
            raise
        os.rename(old, fresh)
    _sync(target.parent)
    shutil.rmtree(fresh, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step with Linux's renameat2; False if the system or its disk cannot."""
    if sys.platform != "linux":
        return False
    at_working_folder, rename_exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's headers
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(at_working_folder, names[0], at_working_folder, names[1], rename_exchange) == 0:
        return True
    if (code := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk; not on Windows, which cannot open folders."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_UMASK_AT_START = os.umask(0o077)
os.umask(_UMASK_AT_START)


def _default_mode(full: int) -> int:
    """The permissions of a new file under the user's umask. Temporary files are private; results should not be.

    The umask is read without changing it, because other threads may be making files. Linux shows it in /proc;
    elsewhere the umask at the program's start is used.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^Umask:\s*([0-7]+)$", status.read_text(), flags=re.MULTILINE) if status.exists() else None
    return full & ~(int(found[1], 8) if found else _UMASK_AT_START)


# --------------------------------------------------------------------------------------------------
# The manifest
# --------------------------------------------------------------------------------------------------


def write_manifest(folder: Path) -> None:
    """Write manifest.json: size and SHA-256 of every other file directly in `folder`."""
    files = {
        path.name: _facts_of(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({"format": 1, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def check_manifest(folder: Path, *names: str) -> None:
    """Compare the files with the manifest: all that it lists, or only `names`. Files that it does not list are ignored.

    Raises:
        ValueError: a file is missing or has changed, or the manifest cannot be read; the message names the file.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        if manifest["format"] != 1:
            raise ValueError
        files = manifest["files"]
        facts = {name: {key: files[name][key] for key in ("bytes", "sha256")} for name in names or files}
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {MANIFEST}; without it the files cannot be checked") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is not a manifest, or does not list all files; restore the folder") from None
    for name, promised in facts.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise ValueError(f"{file} is missing; {MANIFEST} lists it: restore the folder from a copy")
        if file.stat().st_size != promised["bytes"] or _facts_of(file) != promised:
            raise ValueError(
                f"{file} is not what was written (size or SHA-256 differ from {MANIFEST}): restore it from a copy"
            )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _facts_of(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
