"""The house keeps its plan: imports go downward, and the bans hold. A new room is entered in FLOORS."""

from __future__ import annotations

import ast
import re

import pytest

from tests.structure import FILES, MODULES, PACKAGE, circle, imported_files, parse

FLOORS = (
    {"system", "files"},
    {"commandline", "tokenizer", "model"},
    {"checkpoint", "dataset", "generation"},
    {"page"},
    {"evaluation", "export", "trainer/core"},
    {"trainer/run"},
    {"trainer", "server"},
    {"benchmark"},
    {"commands"},
    {"cli.py"},
    {"__main__.py"},
)
"""From the ground up. Imports go from a higher floor to a lower one, or stay in their room. `trainer/core` and
`trainer/run` are rooms of their own; any other folder in a room belongs to it."""

# (from, to): a folder that must not know another one.
BANS = [
    ("model", "tokenizer"), ("dataset", "model"), ("trainer/core", "generation"), ("trainer/run", "generation"),
    ("trainer/core", "dataset/sources"),
]  # fmt: skip

# Questions about the machine; only system/runtime.py asks them.
MACHINE = {
    "torch.cuda.is_available",
    "torch.cuda.device_count",
    "torch.cuda.get_device_capability",
    "torch.cuda.is_bf16_supported",
    "torch.backends.mps.is_available",
    "torch.cpu.get_capabilities",
    "torch.distributed.init_process_group",
    "dist.init_process_group",
}
# `import pickle` itself is allowed, for the error it raises.
PICKLERS = {"cloudpickle", "dill", "joblib", "shelve", "marshal"}

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
MAX_LINES = {"trainer/core/loop.py": 150} | {
    f"trainer/train_{stage}.py": 120 for stage in ("tokenizer", "pretrain", "full_sft", "lora", "dpo")
}


def room_of(name: str) -> str:
    """`trainer/run` for `trainer/run/resume.py`, `dataset` for `dataset/shards/tokenizing.py`."""
    rooms = set().union(*FLOORS)
    return next((room for room in ("/".join(name.split("/")[:2]), name.partition("/")[0]) if room in rooms), "")


def floor_of(name: str) -> int:
    return next(floor for floor, rooms in enumerate(FLOORS) if room_of(name) in rooms)


def import_faults(name: str, tree: ast.AST) -> list[str]:
    faults = []
    for line, target in imported_files(tree):
        where = f"tinylm/{name}:{line} imports {target}"
        if target == "__init__.py":
            continue
        if room_of(target) != room_of(name) and floor_of(target) >= floor_of(name):
            faults.append(f"{where}; expected a lower floor, or the same room")
        faults += [f"{where}; {a} must not know {b}" for a, b in BANS if name.startswith(a) and target.startswith(b)]
    return faults


def dotted(node: ast.AST) -> str:
    """`torch.cuda.is_available` for the expression that spells it; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def test_every_room_has_a_floor() -> None:
    """And no module lies loose at the top, but the table of commands."""
    assert {room_of(name) for name in MODULES} == set().union(*FLOORS)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downward(name: str) -> None:
    assert import_faults(name, parse(name)) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    imports = {name: {target for _, target in imported_files(parse(name))} for name in MODULES}
    assert circle(imports) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("system/runtime.py", "import tinylm.commandline.settings\nfrom tinylm.cli import main"),
        ("model/positions.py", "from tinylm.checkpoint import model_folder"),
        ("model/model_tinylm.py", "def f():\n    from tinylm.tokenizer import bpe"),
        ("dataset/batches.py", "from tinylm.model import kv_cache"),
        ("trainer/core/loop.py", "from tinylm.generation.sampling import SamplingSettings"),
    ],
)
def test_a_wrong_import_is_seen(name: str, statement: str) -> None:
    assert len(import_faults(name, ast.parse(statement))) >= 1


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("__init__.py")])
def test_init_files_only_re_export(name: str) -> None:
    for node in parse(name).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        dunder = isinstance(node, ast.Assign) and all(dotted(t).startswith("__") for t in node.targets)
        assert docstring or dunder or isinstance(node, (ast.Import, ast.ImportFrom)), f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", FILES)
def test_targets_are_never_called_labels(name: str) -> None:
    """Elsewhere `labels` are targets still to be shifted; ours are shifted once, in the dataset.

    Prometheus calls the parts of a counter so.
    """
    if name == "server/metrics.py":
        return
    for node in ast.walk(parse(name)):
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname")]
        assert "labels" not in names, f"tinylm/{name}:{getattr(node, 'lineno', '?')}"


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_unpickled(name: str) -> None:
    """A pickle runs code when it is read. A .pth is read without unpickling; only export writes one."""
    for node in ast.walk(parse(name)):
        where = f"tinylm/{name}:{getattr(node, 'lineno', '?')}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert getattr(node, "module", None) != "pickle", where
            assert PICKLERS.isdisjoint(module.partition(".")[0] for module in modules), where
        if dotted(node).startswith("pickle."):
            assert dotted(node) == "pickle.UnpicklingError", where
        if isinstance(node, ast.Call):
            given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            if dotted(node.func) == "torch.load":
                assert given.get("weights_only") is True, f"{where}: torch.load without weights_only=True"
            assert given.get("allow_pickle") is not True, where
            assert dotted(node.func) != "torch.save" or name == "export/pth.py", where


@pytest.mark.parametrize("name", [name for name in MODULES if name != "system/runtime.py"])
def test_only_the_runtime_asks_about_the_machine(name: str) -> None:
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Attribute):
            assert dotted(node) not in MACHINE, f"tinylm/{name}:{node.lineno}; use tinylm.system.runtime"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "commandline/settings.py"])
def test_only_settings_parses_flags(name: str) -> None:
    for node in ast.walk(parse(name)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            roots = {module.partition(".")[0] for module in modules}
            assert roots.isdisjoint({"argparse", "jsonargparse", "click", "optparse"}), f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("commandline/") and name != "cli.py"])
def test_only_the_command_line_prints(name: str) -> None:
    """Each way to print had its own idea of wrapping, colours and silence; consoles come from commandline/terminal."""
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Call):
            assert dotted(node.func) not in {"print", "Console", "sys.stdout.write", "sys.stderr.write"}, (
                f"tinylm/{name}:{node.lineno}; use tinylm.commandline.terminal"
            )
        if isinstance(node, ast.ImportFrom):
            assert node.module not in {"rich.progress", "rich.status"}, f"tinylm/{name}:{node.lineno}"


@pytest.mark.parametrize("name", FILES)
def test_no_text_holds_markup(name: str) -> None:
    """Texts are printed as they are, so that brackets in a path are safe; colours come from `rich.text.Text`."""
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.ImportFrom):
            assert node.module != "rich.markup", f"tinylm/{name}:{node.lineno}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            tag = re.search(r"\[/?(bold|dim|italic|red|green|yellow|blue|cyan)\b", node.value)
            assert not tag, f"tinylm/{name}:{node.lineno}: {node.value}"


@pytest.mark.parametrize("name", FILES)
def test_no_default_points_at_somebodys_folder(name: str) -> None:
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            personal = ("/home/", "/Users/", "/root/", "/work/", "/tmp/", "C:\\")
            assert not node.value.startswith(personal), f"tinylm/{name}:{node.lineno}: {node.value}"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_short(name: str) -> None:
    """Docstrings count for the file, not for the function: shapes, units and sources take room."""
    lines = len((PACKAGE / name).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES.get(name, MAX_FILE_LINES), f"tinylm/{name}: {lines} lines"
    for node in ast.walk(parse(name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            start = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno - 1
            length = (node.end_lineno or 0) - (start or 0)
            assert length <= MAX_FUNCTION_LINES, f"tinylm/{name}:{node.lineno} {node.name}: {length} lines"


def test_the_loop_takes_few_parameters() -> None:
    """`fit` knows no stage: what differs between stages is passed in, in at most 12 parameters.

    And it is read whole, docstring and all, so here the docstring counts too.
    """
    functions = [node for node in ast.walk(parse("trainer/core/loop.py")) if isinstance(node, ast.FunctionDef)]
    (fit,) = [node for node in functions if node.name == "fit"]
    assert len(fit.args.posonlyargs + fit.args.args + fit.args.kwonlyargs) <= 12
    assert (fit.end_lineno or 0) - fit.lineno + 1 <= MAX_FUNCTION_LINES


@pytest.mark.parametrize("stage", ["pretrain", "full_sft", "lora", "dpo"])
def test_recipes_share_what_they_have_in_common(stage: str) -> None:
    """Each wrote out the same dozen lines of optimizer and run: a flag could reach three stages and not the fourth."""
    called = [dotted(node.func) for node in ast.walk(parse(f"trainer/train_{stage}.py")) if isinstance(node, ast.Call)]
    for name in ("start_stage", "shard", "stage.settings.make_optimizers", "make_run"):
        assert called.count(name) == 1, name
    assert {"make_optimizers", "Run"}.isdisjoint(called)
