"""The house keeps its plan: imports go downward, and the bans hold. A new file is entered in FLOORS."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tinylm"

# File -> floor. Imports go from a higher floor to a lower one; inside a folder also to a file listed earlier.
FLOORS = {
    "untrusted_files.py": 0,
    "memory.py": 0,
    "code_version.py": 0,
    "meeting.py": 0,
    "run_lock.py": 0,
    "atomic_files.py": 0,
    "runtime.py": 0,
    "strict_yaml.py": 0,
    "settings.py": 0,
    "cores.py": 0,
    "program.py": 0,
    "tokenizer/bpe.py": 1,
    "tokenizer/split_patterns.py": 1,
    "tokenizer/tokenizer_json.py": 1,
    "tokenizer/chat_template_jinja.py": 1,
    "tokenizer/tokenizer.py": 1,
    "tokenizer/chat_template.py": 1,
    "tokenizer/train_default.py": 5,
    "model/rope_settings.py": 1,
    "model/config_tinylm.py": 1,
    "model/positions.py": 1,
    "model/kv_cache.py": 1,
    "model/attention.py": 1,
    "model/model_tinylm.py": 1,
    "model/weights_file.py": 1,
    "model/weight_shards.py": 1,
    "model/model_lora.py": 1,
    "model/inference_copy.py": 1,
    "dataset/tinyworld_words.py": 1,
    "dataset/tinyworld_phrases.py": 1,
    "dataset/tinyworld_stories.py": 1,
    "dataset/tinyworld_plots.py": 1,
    "dataset/tinyworld_skills.py": 1,
    "dataset/tinyworld_chats.py": 1,
    "dataset/tinyworld_drills.py": 1,
    "dataset/tinyworld_pages.py": 1,
    "dataset/tinyworld.py": 1,
    "dataset/record_shapes.py": 2,
    "dataset/object_stores.py": 2,
    "dataset/file_readers.py": 2,
    "dataset/sources.py": 2,
    "dataset/parallel.py": 2,
    "dataset/text_chunks.py": 2,
    "dataset/token_shards.py": 2,
    "dataset/shard_cache.py": 2,
    "dataset/splits.py": 2,
    "dataset/packing.py": 2,
    "dataset/rows.py": 2,
    "dataset/documents.py": 2,
    "dataset/pretrain_dataset.py": 2,
    "dataset/sft_dataset.py": 2,
    "dataset/dpo_dataset.py": 2,
    "dataset/batches.py": 2,
    "pth_file.py": 3,
    "original_pth.py": 3,
    "training_state.py": 3,
    "checkpoint.py": 3,
    "trainer/objectives.py": 3,
    "trainer/parallel.py": 3,
    "trainer/optimizer.py": 3,
    "trainer/train_settings.py": 3,
    "trainer/gradients.py": 4,
    "trainer/loop.py": 4,
    "trainer/trainer_utils.py": 4,
    "trainer/resume.py": 4,
    "trainer/validation.py": 4,
    "trainer/run_state.py": 4,
    "trainer/run_report.py": 4,
    "trainer/training_run.py": 4,
    "trainer/stage_data.py": 4,
    "trainer/recipe_utils.py": 5,
    "trainer/train_tokenizer.py": 5,
    "trainer/train_pretrain.py": 5,
    "trainer/train_full_sft.py": 5,
    "trainer/train_lora.py": 5,
    "trainer/train_dpo.py": 5,
    "trainer/merge_adapter.py": 5,
    "generation/sampling.py": 3,
    "generation/cache_rows.py": 3,
    "generation/history.py": 3,
    "generation/beam_search.py": 4,
    "generation/engine.py": 4,
    "evaluation/results.py": 4,
    "evaluation/sequence_logprob.py": 4,
    "evaluation/bits_per_byte.py": 4,
    "evaluation/minimal_pairs.py": 4,
    "evaluation/multiple_choice.py": 4,
    "evaluation/exact_match.py": 4,
    "evaluation/preferences.py": 4,
    "evaluation/skills.py": 4,
    "evaluation/tasks.py": 4,
    "evaluation/lm_eval_adapter.py": 5,
    "evaluation/evaluate.py": 5,
    "export/pth.py": 4,
    "export/export_model.py": 5,
    "inference.py": 5,
    "verify.py": 5,
    "trainer/quickstart.py": 6,
    "cli.py": 6,
}

# (from, to): a folder that must not know another one.
BANS = [("model", "tokenizer"), ("model", "trainer"), ("dataset", "model")]
# These two may meet only on floor 5 and above.
STRANGERS = {"trainer", "generation"}

# Questions about the machine; only runtime.py asks them.
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

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
MAX_LINES = {"trainer/loop.py": 150} | {
    name: 120 for name in FLOORS if name.startswith("trainer/train_") and FLOORS[name] == 5
}

MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
FILES = [name for name in MODULES if not name.endswith("__init__.py")]


def parse(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text(encoding="utf-8"), filename=name)


def file_of(module: str) -> str | None:
    """`tinylm.model.positions` -> `model/positions.py`; None for a package or a name in a module."""
    name = "/".join(module.split(".")[1:]) + ".py"
    return name if (PACKAGE / name).is_file() else None


def imported_files(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, file) of every import from this package, wherever in the file it stands."""
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write tinylm.<folder>.<file>"
            base = node.module or ""
            modules = [base] if file_of(base) else [f"{base}.{alias.name}" for alias in node.names]
        for module in modules:
            if module.startswith("tinylm.") and (name := file_of(module)):
                yield node.lineno, name


def import_faults(name: str, tree: ast.AST) -> list[str]:
    order, faults = list(FLOORS), []
    folder = name.partition("/")[0] if "/" in name else ""
    for line, target in imported_files(tree):
        other = target.partition("/")[0] if "/" in target else ""
        where = f"tinylm/{name}:{line} (floor {FLOORS[name]}) imports {target} (floor {FLOORS.get(target)})"
        if target not in FLOORS or target == name:
            continue
        below = FLOORS[target] < FLOORS[name]
        beside = other == folder and FLOORS[target] == FLOORS[name]
        if not below and not (beside and order.index(target) < order.index(name)):
            faults.append(f"{where}; expected a lower floor, or an earlier file of the same folder")
        if (folder, other) in BANS:
            faults.append(f"{where}; {folder} must not know {other}")
        if {folder, other} == STRANGERS and FLOORS[name] < 5:
            faults.append(f"{where}; trainer and generation meet only on floor 5")
    return faults


def dotted(node: ast.AST) -> str:
    """`torch.cuda.is_available` for the expression that spells it; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def test_every_file_has_a_floor() -> None:
    assert sorted(FILES) == sorted(FLOORS), "enter a new file in FLOORS, and take a removed one out"


@pytest.mark.parametrize("name", [name for name in FILES if name in FLOORS])
def test_imports_go_downward(name: str) -> None:
    assert import_faults(name, parse(name)) == []


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("runtime.py", "import tinylm.settings\nfrom tinylm.cli import main"),
        ("model/positions.py", "from tinylm.model.model_tinylm import TinyLMConfig"),
        ("model/model_tinylm.py", "def f():\n    from tinylm.tokenizer import bpe"),
        ("dataset/batches.py", "from tinylm.model import kv_cache"),
        ("trainer/loop.py", "from tinylm.generation.sampling import SamplingSettings"),
    ],
)
def test_a_wrong_import_is_seen(name: str, statement: str) -> None:
    assert len(import_faults(name, ast.parse(statement))) >= 1


@pytest.mark.parametrize("name", [name for name in MODULES if name.endswith("__init__.py")])
def test_init_files_only_re_export(name: str) -> None:
    for node in parse(name).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        dunder = isinstance(node, ast.Assign) and all(dotted(t).startswith("__") for t in node.targets)
        assert docstring or dunder or isinstance(node, (ast.Import, ast.ImportFrom)), f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", MODULES)
def test_targets_are_never_called_labels(name: str) -> None:
    """Elsewhere `labels` are targets still to be shifted; ours are shifted once, in the dataset."""
    for node in ast.walk(parse(name)):
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname")]
        assert "labels" not in names, f"tinylm/{name}:{getattr(node, 'lineno', '?')}"


@pytest.mark.parametrize("name", MODULES)
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


@pytest.mark.parametrize("name", [name for name in MODULES if name != "runtime.py"])
def test_only_the_runtime_asks_about_the_machine(name: str) -> None:
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Attribute):
            assert dotted(node) not in MACHINE, f"tinylm/{name}:{node.lineno}; use tinylm.runtime"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "settings.py"])
def test_only_settings_parses_flags(name: str) -> None:
    for node in ast.walk(parse(name)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            roots = {module.partition(".")[0] for module in modules}
            assert roots.isdisjoint({"argparse", "jsonargparse", "click", "optparse"}), f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", MODULES)
def test_no_default_points_at_somebodys_folder(name: str) -> None:
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            personal = ("/home/", "/Users/", "/root/", "/work/", "/tmp/", "C:\\")
            assert not node.value.startswith(personal), f"tinylm/{name}:{node.lineno}: {node.value}"


@pytest.mark.parametrize("name", MODULES)
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
    functions = [node for node in ast.walk(parse("trainer/loop.py")) if isinstance(node, ast.FunctionDef)]
    (fit,) = [node for node in functions if node.name == "fit"]
    assert len(fit.args.posonlyargs + fit.args.args + fit.args.kwonlyargs) <= 12
    assert (fit.end_lineno or 0) - fit.lineno + 1 <= MAX_FUNCTION_LINES


@pytest.mark.parametrize("stage", ["pretrain", "full_sft", "lora", "dpo"])
def test_recipes_share_what_they_have_in_common(stage: str) -> None:
    """Each wrote out the same dozen lines of optimizer and run: a flag could reach three stages and not the fourth."""
    called = [dotted(node.func) for node in ast.walk(parse(f"trainer/train_{stage}.py")) if isinstance(node, ast.Call)]
    assert called.count("settings.make_optimizers") == called.count("make_run") == 1
    assert {"make_optimizers", "TrainingRun"}.isdisjoint(called)
