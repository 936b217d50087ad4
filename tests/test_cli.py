"""The command line: the table of commands, quick answers, and how failures end."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tinylm import __version__, cli
from tinylm.cli import main
from tinylm.commandline import synonyms
from tinylm.commandline.exit_status import Stopped, run_main
from tinylm.commandline.settings import _field_helps, _field_types
from tinylm.system.runtime import DtypeName, InferenceDtypeName


def tinylm(repository: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinylm.cli", *argv]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("flag", "answer"), [("--help", "quickstart"), ("--version", __version__)])
def test_quick_answers_import_nothing_heavy(repository: Path, flag: str, answer: str) -> None:
    """They come in a tenth of a second, since of all that is installed they import this package alone."""
    code = (
        "import sys; started = set(sys.modules);"  # what the environment itself imports
        f"import tinylm.cli; tinylm.cli.main([{flag!r}]);"
        "imported = {name.partition('.')[0] for name in set(sys.modules) - started};"
        "print(imported - sys.stdlib_module_names, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "{'tinylm'}\n")
    assert answer in done.stdout
    if flag == "--help":
        assert all(command in done.stdout for command in cli.COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrian"]) == 2
    assert "did you mean tinylm pretrain?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("train", "pretrain"), ("train-tokenizer", "tokenizer"), ("Generate", "chat"), ("convert", "export")],
)
def test_other_programs_names_are_understood(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([typed]) == 2
    assert f"did you mean tinylm {meant}?" in capsys.readouterr().err


SETTINGS = [
    ("tinylm.commands.quickstart", "QuickstartSettings"), ("tinylm.trainer.train_tokenizer", "TokenizerSettings"),
    ("tinylm.trainer.train_pretrain", "PretrainSettings"), ("tinylm.trainer.train_full_sft", "FullSFTSettings"),
    ("tinylm.trainer.train_lora", "LoRASettings"), ("tinylm.trainer.train_dpo", "DPOSettings"),
    ("tinylm.commands.chat", "ChatSettings"), ("tinylm.commands.evaluate", "EvalSettings"),
    ("tinylm.commands.merge", "MergeSettings"), ("tinylm.commands.export", "ExportSettings"),
    ("tinylm.commands.verify", "VerifySettings"),
]  # fmt: skip
NAMES = ("LoRA", "Adam", "JSON", "YAML", "TinyWorld", "KV", "PEFT")


def test_every_advised_name_exists() -> None:
    """The advice after an unknown name must not name a flag that no command has."""
    settings = [getattr(importlib.import_module(module), name) for module, name in SETTINGS]
    known = {field.name for one in settings for field in dataclasses.fields(one)}
    assert set(synonyms._FLAGS) <= known
    assert set(synonyms._COMMANDS) <= set(cli.COMMANDS)
    for names in (synonyms._FLAGS, synonyms._COMMANDS):
        for name, words in names.items():
            assert name not in words.split()


@pytest.mark.parametrize(("module", "name"), SETTINGS)
def test_help_has_one_style(module: str, name: str) -> None:
    """Half of the commands wrote sentences, the others phrases; choices stood in the text or nowhere."""
    cls = getattr(importlib.import_module(module), name)
    helps, hints = _field_helps(cls), _field_types(cls)
    for field in dataclasses.fields(cls):
        text = helps.get(field.name, "")
        assert text, f"{name}.{field.name} has no help"
        assert not text.endswith(".") or text.endswith("..."), f"{name}.{field.name}: {text}"
        assert not text[0].isupper() or text.startswith(NAMES), f"{name}.{field.name}: {text}"
        # An export's dtype is that of the numbers in a file, of which there are more than a machine computes with.
        if field.name == "dtype" and name != "ExportSettings":
            assert hints["dtype"] == (InferenceDtypeName if name in ("ChatSettings", "EvalSettings") else DtypeName)
    assert (cls.__doc__ or "").startswith("Settings of "), cls.__doc__


def test_the_package_runs_as_a_module(repository: Path) -> None:
    command = [sys.executable, "-m", "tinylm", "chatt"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "") and "did you mean tinylm chat?" in done.stderr


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_is_there(name: str) -> None:
    assert callable(cli._load(cli.COMMANDS[name].target))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "run"])
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: tinylm {name}" in capsys.readouterr().out


def test_a_file_names_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("command: pretrain\nepochs: 2\n")
    seen: list[list[str]] = []
    monkeypatch.setattr(cli, "_load", lambda target: lambda argv: seen.append(argv) or 7)
    assert cli.run_file([str(file), "--epochs", "3"]) == 7
    assert seen == [["--config", str(file), "--epochs", "3"]]


@pytest.mark.parametrize("text", ["epochs: 2\n", "command: pretrian\n", "command: run\n"])
def test_a_file_without_a_command_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert cli.main(["run", str(file)]) == 2
    err = capsys.readouterr().err
    assert "expected one of quickstart" in err
    assert str(file) in err


class CustomError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("epochs 0;\n  expected 1"), 2, "tinylm: error: epochs 0; expected 1"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "a.txt: No such file or directory"),
        (FileNotFoundError("no model in x; expected y"), 2, "tinylm: error: no model in x; expected y"),
        (IsADirectoryError(21, "Is a directory", "d"), 2, "tinylm: error: d: Is a directory"),
        (
            PermissionError(13, "Permission denied", "p"),
            2,
            "tinylm: error: p: Permission denied; choose another path, or change its permissions",
        ),
        (OSError(28, "No space left on device"), 1, "tinylm: error: No space left on device"),
        (RuntimeError("loss is nan"), 1, "tinylm: error: loss is nan"),
        (CustomError("odd"), 1, "tinylm: error: CustomError: odd"),
        (KeyboardInterrupt(), 130, "tinylm: stopped; run the same command with --resume"),
    ],
)
def test_failures_are_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    def command(argv: list[str]) -> int:
        raise error

    assert run_main(command, []) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.rstrip("\n").endswith(line)
    assert run_main(command, ["--debug"]) == status
    assert "Traceback" in capsys.readouterr().err


def test_arguments_and_status_pass_through() -> None:
    seen: list[str] = []
    assert run_main(lambda argv: seen.extend(argv) or 3, ["--epochs", "2", "--debug"]) == 3
    assert seen == ["--epochs", "2"]


def test_sigterm_cleans_up(capsys: pytest.CaptureFixture[str]) -> None:
    cleaned: list[bool] = []

    def command(argv: list[str]) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
            return 0
        finally:
            cleaned.append(True)

    assert run_main(command, [], advice="") == 143
    assert cleaned == [True]
    assert capsys.readouterr().err == "tinylm: stopped\n"


@pytest.mark.parametrize("end", [None, ValueError("wrong"), KeyboardInterrupt(), CustomError(), SystemExit(0)])
def test_sigterm_is_given_back(end: BaseException | None) -> None:
    """A program that calls a command must stop on SIGTERM as it did before, however the command ended."""

    def mine(signum: int, frame: object) -> None: ...

    inside: list[object] = []

    def command(argv: list[str]) -> int:
        inside.append(signal.getsignal(signal.SIGTERM))
        if end is not None:
            raise end
        return 0

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with contextlib.suppress(SystemExit):  # --help ends so
            run_main(command, [])
        assert signal.getsignal(signal.SIGTERM) is mine and inside != [mine]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_reader_that_leaves_is_no_failure(repository: Path) -> None:
    code = (
        "from tinylm.commandline.exit_status import run_main\n"
        "def f(argv):\n"
        "    for i in range(100000): print(i)\n"
        "    return 0\n"
        "raise SystemExit(run_main(f, []))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


ORIGINAL_SCRIPTS = ["inference", *(f"trainer/train_{stage}" for stage in ("pretrain", "full_sft", "lora", "dpo"))]


@pytest.mark.parametrize("script", ORIGINAL_SCRIPTS)
def test_the_original_paths_are_real_files_of_a_few_lines(repository: Path, script: str) -> None:
    """They were links into the package: `..` of such a folder leads elsewhere, and Windows has none."""
    for place in (repository / script).with_suffix(".py"), (repository / script).parent:
        assert place.exists() and not place.is_symlink()
    assert len((repository / f"{script}.py").read_text(encoding="utf-8").splitlines()) < 20


@pytest.mark.parametrize(("command", "advice"), [("quickstart", "run the same command again"), ("run", "--resume"),
                                                 ("pretrain", "--resume"), ("chat", "")])  # fmt: skip
def test_a_stopped_command_says_how_to_go_on_with_it(command, advice, monkeypatch, capsys):
    """quickstart, which has no --resume, advised it; `tinylm run`, which has it, did not."""

    def stop(rest):
        raise Stopped(signal.SIGINT, " after step 7, which is saved")

    monkeypatch.setattr("tinylm.cli._load", lambda target: stop)
    assert main([command]) == 130
    said = capsys.readouterr().err.strip()
    assert said.startswith("tinylm: stopped after step 7, which is saved") and advice in said
    assert advice or said.endswith("which is saved")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_is_no_error(closed):
    """Some services start programs without standard input or output; that ended in an AttributeError."""
    command = f"{sys.executable} -m tinylm.cli pretrain --preset nosuch {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Error" not in done.stderr.replace("error:", "")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_text_can_be_printed(repository: Path, encoding: str) -> None:
    """A Latin-1 file name, or any letter on a terminal of few letters, ended in a UnicodeEncodeError."""
    code = (
        "from tinylm.commandline.exit_status import run_main\n"
        "from tinylm.commandline.terminal import make_console\n"
        "def f(argv):\n"
        "    make_console().print('caf\\udce9 größe')\n"
        "    raise ValueError('no caf\\udce9 \\x1b[2J')\n"
        "raise SystemExit(run_main(f, []))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, env=environment, capture_output=True)
    assert (done.returncode, done.stdout.decode("utf-8")[:9]) == (2, "caf\\udce9"), done.stderr
    assert done.stderr == b"tinylm: error: no caf\\udce9 [2J\n"


def test_a_temporary_file_is_called_by_the_name_it_would_have_got(capsys):
    error = PermissionError(errno.EACCES, "Permission denied", "/out/.model.65vd0l1c.tmp")
    assert run_main(lambda argv: (_ for _ in ()).throw(error), []) == 2
    assert capsys.readouterr().err.startswith("tinylm: error: /out/model: Permission denied; choose another path")
