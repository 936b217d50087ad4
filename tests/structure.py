"""The structure of the house, read from the code itself: rooms, the imports between them, floors, and the walk.

    python -m tests.structure          (in the environment that `make test` sets up)

A room is a folder or a loose file directly under `tinylm/`. A room stands one floor above the highest room that it
imports. The walk is a real `tinylm pretrain` in miniature: the files whose functions run from the command to the first
gradient, without what runs while modules are imported.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tinylm"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
"""Every file of the package, as `model/attention.py`."""
MODULES = [name for name in FILES if not name.endswith("__init__.py")]


@cache
def parse(name: str) -> ast.Module:
    """The syntax tree of `model/attention.py`."""
    return ast.parse((PACKAGE / name).read_text(encoding="utf-8"), filename=name)


def file_of(module: str) -> str | None:
    """`tinylm.model.positions` -> `model/positions.py`, a package -> its `__init__.py`; None for what is neither."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file.relative_to(PACKAGE).as_posix()
    return None


def imported_files(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, file) of every import from this package, wherever in the file it stands."""
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write tinylm.<folder>.<file>"
            base = node.module or ""
            inside = [f"{base}.{alias.name}" for alias in node.names]
            modules = [name if file_of(name) else base for name in inside]
        for module in dict.fromkeys(modules):
            if module.startswith("tinylm.") and (name := file_of(module)):
                yield node.lineno, name


def room_of(name: str) -> str:
    """`model` for `model/attention.py`; a loose file is a room of its own."""
    return name.partition("/")[0]


def arrows() -> dict[str, set[str]]:
    """Room -> the other rooms that its files import."""
    found: dict[str, set[str]] = {room_of(name): set() for name in MODULES}
    for name in FILES:
        if "/" in name:  # tinylm/__init__.py holds the version only
            targets = {room_of(target) for _, target in imported_files(parse(name))}
            found[room_of(name)] |= targets & set(found) - {room_of(name)}
        elif name != "__init__.py":
            found[name] |= {room_of(target) for _, target in imported_files(parse(name))} - {name, "__init__.py"}
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """One circle of imports, as the names on it; empty if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(edges.get(node, ())):
            if found := visit(target, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(edges) if (found := visit(node, []))), [])


def floors(edges: dict[str, set[str]]) -> dict[str, int]:
    """Room -> floor, from 1; without circles."""
    heights: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in heights:
            heights[room] = 1 + max((height(below) for below in edges[room]), default=0)
        return heights[room]

    return {room: height(room) for room in edges}


_WALK = """
import os, sys, threading
files, importing = {}, 0

def watch(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_flags & 1:  # 1: a function's body
        outer = frame
        while outer is not None:
            if outer.f_code.co_name == "<module>" and outer.f_code.co_filename.startswith(PACKAGE):
                return
            outer = outer.f_back
        files.setdefault(os.path.relpath(code.co_filename, PACKAGE))
    elif event == "call" and code.co_name in ("backward", "grad") and "autograd" in code.co_filename:
        sys.stderr.write(chr(10).join(["WALK", *files]))
        sys.stderr.flush()
        os._exit(0)

import tinylm.cli
threading.setprofile(watch)
sys.setprofile(watch)
tinylm.cli.main(sys.argv[1:])
"""


def walk(*flags: str) -> list[str]:
    """The files whose functions run in `tinylm pretrain` before its first gradient, in the order of the walk."""
    with tempfile.TemporaryDirectory() as folder:
        story = "The little boat sailed over the quiet sea, and came home when the sun was low.\n<|endoftext|>\n"
        Path(folder, "stories.txt").write_text(story * 40, encoding="utf-8")
        command = ["pretrain", "--preset", "tiny", "--data_path", f"{folder}/stories.txt", "--max_seq_len", "32"]
        program = f"PACKAGE = {str(PACKAGE) + os.sep!r}\n{_WALK}"
        done = subprocess.run(
            [sys.executable, "-c", program, *command, "--output_dir", f"{folder}/out", *flags],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    _, mark, files = done.stderr.partition("WALK\n")
    if not mark:
        raise RuntimeError(f"the walk did not reach a gradient:\n{done.stdout}{done.stderr}")
    return files.splitlines()


def main() -> None:
    """Print the figures."""
    edges = arrows()
    heights = floors(edges)
    for floor in range(max(heights.values()), 0, -1):
        print(f"floor {floor}: {', '.join(room for room in sorted(edges) if heights[room] == floor)}")
    print(f"rooms: {len(edges)}, of which loose modules: {sum(room.endswith('.py') for room in edges)}")
    print(f"floors: {max(heights.values())}")
    print(f"arrows between rooms: {sum(map(len, edges.values()))}")
    print(f"circle: {' -> '.join(circle(edges)) or 'none'}")
    steps = walk()
    print(f"files from the command to the first gradient: {len(steps)}")
    print("\n".join(f"  {step}" for step in steps))


if __name__ == "__main__":
    main()
