"""Both benchmarks, one after the other: what `make bench` runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Run each benchmark in a process of its own, so that neither warms up the other; the worst exit status."""
    if sys.argv[1:]:
        print("this runs both benchmarks and takes no flags; for their flags: python -m benchmarks.decode --help")
        return 2
    root = Path(__file__).resolve().parent.parent
    names = ("train_step", "decode")
    return max(
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=root, check=False).returncode for name in names
    )


if __name__ == "__main__":
    sys.exit(main())
