"""Check that a model has not changed since it was written, and show how it was made.

    tinylm verify out/pretrain

It checks every file's hash against the folder's manifest, that weights, config and tokenizer belong together, and that
the parent has not changed. Then it shows the lineage: stage, data, settings, parent, code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from rich.text import Text

from tinylm.checkpoint.lineage import check_parent
from tinylm.checkpoint.model_folder import adapter_base, load_model
from tinylm.checkpoint.model_path import resolve_model_path
from tinylm.checkpoint.training_state import load_training_state, state_folders
from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import model_first, parse_settings
from tinylm.commandline.terminal import make_console
from tinylm.files.atomic import check_manifest
from tinylm.files.untrusted import read_own_json
from tinylm.system.code_version import code_version
from tinylm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """Settings of verifying."""

    model_path: str
    """a model folder, an adapter folder, a stage's output folder, or a folder of training states (..._state)"""


@dataclass(frozen=True)
class Finding:
    """The result of one check. `is_right` is None if the check was not possible."""

    what: str
    is_right: bool | None
    text: str


def _checked(what: str, check: Callable[[], str]) -> Finding:
    """The result of `check`, or the error that it raises."""
    try:
        return Finding(what, True, check())
    except FileNotFoundError as error:
        return Finding(what, None, str(error))
    except (ValueError, OSError) as error:
        return Finding(what, False, str(error))
    except (TypeError, KeyError, AttributeError) as error:  # a record that tinylm did not write
        return Finding(what, False, f"the record is not in tinylm's form ({type(error).__name__}: {error})")


def verify_folder(folder: Path) -> Iterator[Finding]:
    """Check a model folder or an adapter folder, and the origin that it states."""
    yield _checked("files", lambda: _check_files(folder))
    yield _checked("weights", lambda: _check_weights(folder))
    lineage = read_own_json(folder / "lineage.json") if (folder / "lineage.json").is_file() else {}
    if not lineage:
        yield Finding("lineage", None, "no lineage.json: it is unknown how this model was made")
        return
    yield _checked("tokenizer", lambda: _check_tokenizer(folder, lineage))
    yield _checked("parent", lambda: _check_parent(lineage))
    ours, theirs = code_version(), {name: lineage.get(name) for name in ("version", "code")}
    same = "the code that runs now" if ours == theirs else f"now it is {ours['version']}, {ours['code']}"
    yield Finding("code", None if ours != theirs else True, f"{theirs['version']}, {theirs['code']}: {same}")


def verify_states(folder: Path) -> Iterator[Finding]:
    """Check every training state of a run."""
    for place in state_folders(folder):
        yield _checked(place.name, partial(_check_state, place))
    yield _checked("resume", lambda: f"from step {load_training_state(folder).values['step']:,}")


def _check_state(place: Path) -> str:
    check_manifest(place)
    return "all files unchanged"


def _check_files(folder: Path) -> str:
    check_manifest(folder)
    files = read_own_json(folder / "manifest.json")["files"]
    return f"{len(files)} files unchanged, {sum(facts['bytes'] for facts in files.values()):,} bytes"


def _check_weights(folder: Path) -> str:
    model, _, _ = load_model(folder)
    return f"{model.num_parameters():,} parameters, as the config says"


def _check_tokenizer(folder: Path, lineage: dict[str, Any]) -> str:
    own = (folder / "tokenizer.json").is_file()
    tokenizer = Tokenizer.load(folder if own else adapter_base(folder))
    promised = lineage.get("tokenizer_fingerprint")
    if promised is None:
        raise FileNotFoundError("lineage.json does not name the tokenizer")
    if tokenizer.fingerprint != promised:
        raise ValueError(f"it is {tokenizer.fingerprint}; the model was trained with {promised}")
    return f"{tokenizer.vocab_size:,} entries, the same as in training"


def _check_parent(lineage: dict[str, Any]) -> str:
    path = check_parent(lineage)
    return f"{path}, unchanged" if path else "none: trained from random weights"


def show_lineage(lineage: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) pairs of a lineage, as far as they are recorded; a stranger's lineage may hold anything."""
    settings = lineage.get("settings")
    yield "stage", str(lineage.get("stage"))
    if isinstance(step := lineage.get("step"), int):
        ended = "finished" if lineage.get("finished") else "not finished"
        yield "trained", f"{step:,} step{'s' * (step != 1)}, epoch {lineage.get('epoch')}, {ended}"
    if isinstance(settings, dict):
        source = settings.get("data_path") or "TinyWorld"
        yield "data", f"{source} (fingerprint {lineage.get('data_fingerprint')}), seed {lineage.get('seed')}"
    changes = lineage.get("changed_on_resume")
    for change in changes if isinstance(changes, list) else []:
        yield "changed", str(change)
    if isinstance(settings, dict):
        yield "settings", " ".join(as_flags(settings))
    base = lineage.get("base")
    if isinstance(base, dict) and isinstance(base.get("lineage"), dict):
        yield "base", str(base.get("path"))
        yield from ((f"  {name}", value) for name, value in show_lineage(base["lineage"]))


def as_flags(settings: dict[str, Any]) -> Iterator[str]:
    """The settings as they can be typed, without those that are off, and those that only say how a run was begun."""
    for name, value in settings.items():
        if value in (None, "", 0, False) or name in ("resume", "overwrite"):
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        yield f"--{name} {quote('true' if value is True else text)}"


def main(argv: list[str]) -> int:
    """The command line: check a folder; the status is 1 if a check fails."""
    settings = parse_settings(
        VerifySettings, model_first(argv), "tinylm verify", "Check a model's files and where it comes from."
    )
    console, path = make_console(), Path(settings.model_path)
    if path.is_dir() and state_folders(path):
        folder, findings = path, list(verify_states(path))
    else:
        folder = resolve_model_path(path)
        if folder.is_file():
            raise ValueError(f"{folder} is a file without a manifest; only folders that tinylm wrote can be verified")
        findings = list(verify_folder(folder))
    console.print(str(folder), style="bold")
    marks = {True: ("ok         ", "green"), False: ("failed     ", "red"), None: ("not checked", "yellow")}
    for finding in findings:
        console.print(Text.assemble("  ", marks[finding.is_right], f"  {finding.what:<13}  {finding.text}"))
    if (folder / "lineage.json").is_file():
        for name, value in show_lineage(read_own_json(folder / "lineage.json")):
            console.print(Text.assemble("  ", (f"{name:<10}", "dim"), f"  {value}"))
    return 1 if any(finding.is_right is False for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
