"""The oldest versions that pyproject.toml promises to run with, as requirements for pip: `make test-oldest`.

A package without a lower bound comes in its newest version.
"""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def oldest(requirement: str) -> str:
    """`name[extras]==bound` for `name[extras]>=bound`; a requirement without a lower bound as it is."""
    parsed = Requirement(requirement)
    bounds = [bound.version for bound in parsed.specifier if bound.operator == ">="]
    extras = f"[{','.join(sorted(parsed.extras))}]" if parsed.extras else ""
    return f"{parsed.name}{extras}=={bounds[0]}" if bounds else requirement


def main() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        print(oldest(requirement))


if __name__ == "__main__":
    main()
