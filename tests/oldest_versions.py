"""The oldest versions that pyproject.toml promises to run with, as requirements for pip: `make test-oldest`.

A package without a lower bound comes in the version that `make test` takes; else pip would try hundreds of them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def oldest(requirement: str, pins: dict[str, str]) -> str:
    """`name[extras]==bound` for `name[extras]>=bound`; without a bound the version of `pins`, by lower-case names."""
    parsed = Requirement(requirement)
    bounds = [bound.version for bound in parsed.specifier if bound.operator == ">="]
    extras = f"[{','.join(sorted(parsed.extras))}]" if parsed.extras else ""
    return f"{parsed.name}{extras}=={bounds[0] if bounds else pins[parsed.name.lower()]}"


def pinned() -> dict[str, str]:
    """Name -> version of requirements.txt and requirements-dev.txt; of two versions the one for newer Pythons."""
    lines = "".join(Path(name).read_text(encoding="utf-8") for name in ("requirements-dev.txt", "requirements.txt"))
    pins = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", lines, flags=re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in reversed(pins)}


def main() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = pinned()
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        print(oldest(requirement, pins))


if __name__ == "__main__":
    main()
