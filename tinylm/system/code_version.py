"""Which code this is, exactly: a changed checkout has the same version number as a release."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from tinylm import __version__


@lru_cache(maxsize=1)
def code_version() -> dict[str, str]:
    """{"version": the package's, "code": 16 hex digits of a SHA-256 over its Python files, names and contents}."""
    return {"version": __version__, "code": code_fingerprint(".")}


def code_fingerprint(*places: str) -> str:
    """16 hex digits of a SHA-256 over Python files, names and contents.

    Args:
        places: files and folders, relative to the package.
    """
    package = Path(__file__).resolve().parent.parent
    roots = [package / place for place in places]
    files = {file for root in roots for file in ([root] if root.is_file() else root.rglob("*.py"))}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(package).as_posix()} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
