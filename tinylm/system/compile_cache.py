"""Where torch.compile keeps its code: in the cache of all runs, so that the next run or stage need not compile again.

    CACHE/compiled/CPU/     for one kind of CPU: code made for another one may end the process

torch's own default is a folder of temporary files, which many systems empty when they start.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""The environment variable in which torch looks for the folder. A user who has set it is obeyed."""


def compiled_code(cache: Path) -> Path:
    """The folder of compiled code in the cache of all runs."""
    return cache / "compiled"


def keep_compiled_code(cache: Path | None) -> str | None:
    """Let torch keep compiled code in `cache`, or where the user has set it; call it before optimizers are made.

    Returns a warning if a folder cannot be written. If none can, torch uses its own default, as without a cache.
    """
    asked = os.environ.pop(VARIABLE, "")
    is_own = Path(asked).name.startswith("torchinductor_") and Path(asked).parent == Path(tempfile.gettempdir())
    folders = [Path(asked)] if asked and not is_own else []  # torch sets the variable to its own default when it starts
    folders += [compiled_code(cache) / cpu_name()] if cache is not None else []
    faults = []
    for folder in folders:
        if (fault := _fault(folder)) is None:
            os.environ[VARIABLE] = str(folder)
            break
        faults.append(f"the cache {folder} cannot be used ({fault})")
    place = os.environ.get(VARIABLE, "a temporary folder")
    return f"{', and '.join(faults)}: compiled code goes to {place}" if faults else None


def _fault(folder: Path) -> str | None:
    """Why nothing can be written into `folder`, which is made; None if something can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".{secrets.token_hex(8)}.tmp"
        trial.write_bytes(b"trial")
        trial.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def cpu_name() -> str:
    """8 hex digits for this kind of CPU: its model and what it can do."""
    lines: set[str] = set()
    with contextlib.suppress(OSError):  # only Linux has the file
        text = Path("/proc/cpuinfo").read_text()
        lines = set(re.findall(r"^(?:model name|flags|Features)\s*:.*$", text, re.MULTILINE))
    facts = "\n".join([platform.machine(), platform.processor(), *sorted(lines)])
    return hashlib.sha256(facts.encode()).hexdigest()[:8]


def cpp_compiler() -> str | None:
    """The path of the C++ compiler that torch would call for a CPU; None if there is none."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX", default))


def size_of_compiled_code(cache: Path) -> int:
    """Bytes that compiled code takes, for all kinds of CPU."""
    files = [Path(folder, name) for folder, _, names in os.walk(compiled_code(cache)) for name in names]
    return sum(file.lstat().st_size for file in files if os.path.lexists(file))


def remove_compiled_code(cache: Path) -> int:
    """Remove it, and return how many bytes that were. A run that needs it in this moment continues without."""
    before = size_of_compiled_code(cache)
    shutil.rmtree(compiled_code(cache), ignore_errors=True)
    return before - size_of_compiled_code(cache)
