"""The name of a shard: a fingerprint of all that decides its tokens.

That is the content of the source, its kind, the tokenizer, and the code that reads and tokenises. Path and time are not
part of it, so a renamed or copied file has the same shard in every run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from tinylm.dataset.shards.token_shards import FORMAT_VERSION
from tinylm.dataset.shards.tokenizing import available_cores
from tinylm.dataset.sources.finding import HUB_PREFIX, Source, is_address, open_binary, suffix_of
from tinylm.files.atomic import atomic_write, sha256_of
from tinylm.system.code_version import code_fingerprint

READING_CODE = ("dataset/sources", "dataset/shards/tokenizing.py", "tokenizer", "files/untrusted.py")
"""The code between a source and its token ids."""

SAMPLE_BYTES = 1 << 20
"""Of a source whose content is unknown, this much of its start and end is part of the name."""

SETTLED_SECONDS = 2
"""A file that changed less than this before it was hashed may change again without a new time. Its hash is not kept."""


def shard_names(sources: Sequence[Source], tokenizer: Any, memory: Path | None = None) -> list[str]:
    """The names of the sources' shards.

    Args:
        memory: a file that keeps the hashes of local files, so that an unchanged file is not read again. A file counts
            as unchanged if its size, its times of change and its inode are the same.
    """
    hashes = _hashes([source.path for source in sources if _is_local(source)], memory)
    return [_name_of(_content(source, hashes), source, tokenizer) for source in sources]


def has_known_content(source: Source) -> bool:
    """Whether the name of the source's shard changes with every change of its content.

    It does not for data sets of the hub, and for addresses whose server tells no version.
    """
    return _is_local(source) or (is_address(source.path) and bool(source.version))


def earlier_shard_name(source: Source, tokenizer: Any) -> str:
    """The name that earlier versions gave to a shard, which each run kept in its own folder.

    It depends on the file's name, size, time of change, start and end.
    """
    digest = hashlib.sha256(f"{FORMAT_VERSION} {tokenizer.fingerprint} ".encode())
    name = source.path if source.path.startswith(HUB_PREFIX) else os.path.basename(source.path)
    digest.update(f"{name} {source.size} {source.version}\n".encode("utf-8", "surrogateescape"))
    if not source.path.startswith(HUB_PREFIX) and not (is_address(source.path) and source.version):
        digest.update(_sample(source))
    return digest.hexdigest()[:16]


def full_path(source: Source) -> str:
    """The source's path from the root, for people; bytes that are not UTF-8 are replaced."""
    path = os.path.abspath(source.path) if _is_local(source) else source.path
    return os.fsencode(path).decode("utf-8", errors="replace")


def require_unchanged(source: Source) -> None:
    """Check after reading a local file that it is still the one that was named.

    Raises:
        ValueError: it has changed since.
    """
    if not _is_local(source):
        return
    state = os.stat(source.path)
    if (state.st_size, str(state.st_mtime_ns)) != (source.size, source.version):
        raise ValueError(f"{source.path} changed while it was read; run the same command again when it is complete")


@lru_cache(maxsize=1)
def _reading_code() -> str:
    return f"{FORMAT_VERSION} {code_fingerprint(*READING_CODE)} tokenizers {tokenizers.__version__}"


def _name_of(content: str, source: Source, tokenizer: Any) -> str:
    parts = (_reading_code(), tokenizer.fingerprint, suffix_of(source.path), content)
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _content(source: Source, hashes: dict[str, str]) -> str:
    """What tells the source's content, as well as it is known before reading."""
    if source.path in hashes:
        return hashes[source.path]
    if source.path.startswith(HUB_PREFIX) or source.version:
        return f"{source.path} {source.size} {source.version}"
    return f"{source.path} {source.size} {hashlib.sha256(_sample(source)).hexdigest()}"


def _is_local(source: Source) -> bool:
    return not source.path.startswith(HUB_PREFIX) and not is_address(source.path)


def _sample(source: Source) -> bytes:
    with open_binary(source.path) as file:
        start = file.read(SAMPLE_BYTES)
        file.seek(max(0, source.size - SAMPLE_BYTES))
        return start + file.read(SAMPLE_BYTES)


def _hashes(paths: Sequence[str], memory: Path | None) -> dict[str, str]:
    """Path -> SHA-256 of its content, on all cores: hashlib releases Python's lock while it works."""
    now = time.time_ns()
    states = {path: _state_of(path) for path in paths}
    kept = _recall(memory)
    found: dict[str, str] = {}
    for path, state in states.items():
        entry = kept.get(os.path.abspath(path))
        if isinstance(entry, list) and entry[:-1] == state and isinstance(entry[-1], str):
            found[path] = entry[-1]
    missing = [path for path in states if path not in found]
    with ThreadPoolExecutor(available_cores()) as threads:
        found.update(zip(missing, threads.map(lambda path: sha256_of(Path(path)), missing), strict=True))
    if missing and memory is not None:
        settled = [path for path, state in states.items() if max(state[1:3]) + SETTLED_SECONDS * 10**9 < now]
        content = json.dumps({os.path.abspath(path): [*states[path], found[path]] for path in settled})
        with contextlib.suppress(OSError), atomic_write(memory) as file:  # without it, files are hashed again
            file.write(content.encode())
    return found


def _state_of(path: str) -> list[int]:
    """What changes when a file changes: size, times of change, inode and disk."""
    state = os.stat(path)
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]


def _recall(memory: Path | None) -> dict[str, Any]:
    """The content of a memory file; empty if there is none or it is damaged."""
    try:
        kept = json.loads(memory.read_bytes()) if memory is not None else {}
        return kept if isinstance(kept, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}
