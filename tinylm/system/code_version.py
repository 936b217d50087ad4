"""Which code this is, exactly: a changed checkout has the same version number as a release."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from tinylm import __version__


@lru_cache(maxsize=1)
def code_version() -> dict[str, str]:
    """{"version": the package's, "code": 16 hex digits of a SHA-256 over its Python files, names and contents}."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent.parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return {"version": __version__, "code": digest.hexdigest()[:16]}
