"""Settings: flags, YAML files, and the lines a user sees when something is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from tinylm.commandline.settings import parse_settings, settings_to_yaml


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """What every recipe knows."""

    learning_rate: float = 1e-4
    """Peak learning rate; 100% of it
    after the warm-up."""
    use_compile: bool = False
    """Compile the model."""
    seed: int | None = None
    """Seed of the run."""
    dtype: Literal["auto", "float32"] = "auto"
    """Compute precision."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Layers to adapt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Shared):
    data_path: str
    """Where the text is."""
    epochs: int = 1
    """Passes over the data."""
    rope_scaling: dict | None = None
    """YaRN's settings."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs {self.epochs}; expected at least 1; raise it")


def parse(*argv: str, prog: str = "tinylm pretrain") -> Recipe:
    return parse_settings(Recipe, list(argv), prog, "Train on text.")


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tinylm pretrain: error: ")
    assert err.count("\n") == 1
    return err


def test_flags_are_the_fields() -> None:
    settings = parse("--data_path", "books", "--learning_rate", "1e-3", "--epochs=3", "--dtype", "float32")
    assert settings == Recipe(data_path="books", learning_rate=1e-3, epochs=3, dtype="float32")


def test_hyphens_are_underscores() -> None:
    assert parse("--data-path", "x", "--learning-rate=0.5").learning_rate == 0.5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--use_compile"], True),
        (["--use_compile", "1"], True),
        (["--use_compile", "0"], False),
        (["--use_compile=true"], True),
        (["--use-compile", "False"], False),
        ([], False),
    ],
)
def test_bools(words: list[str], expected: bool) -> None:
    assert parse(*words, "--data_path", "x").use_compile is expected


@dataclasses.dataclass(frozen=True)
class Compiling:
    """How to compile."""

    use_compile: bool | Literal["auto"] = "auto"
    """Compile the model; auto: where it saves time."""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "auto"),
        (["--use_compile"], True),
        (["--use_compile", "0"], False),
        (["--use_compile", "auto"], "auto"),
        (["--use_compile=auto"], "auto"),
        (["--use-compile", "yes"], True),
    ],
)
def test_a_bool_may_have_a_third_word(tmp_path: Path, words: list[str], expected: bool | str) -> None:
    settings = parse_settings(Compiling, words, "tinylm test", "")
    assert settings == Compiling(expected) and type(settings.use_compile) is type(expected)
    file = tmp_path / "same.yaml"
    file.write_text(settings_to_yaml(settings))
    assert parse_settings(Compiling, ["--config", str(file)], "tinylm test", "") == settings


def test_the_third_word_is_in_the_help_and_in_the_complaint(capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in (
        (["--help"], "--use_compile [{1,0,auto}] Compile the model; auto: where it saves time. (default: auto)"),
        (["--use_compile=autp"], "use_compile is 'autp'; expected true, false or auto; see tinylm test --help"),
        (["--use_compile", "autp"], "stray 'autp'; expected pairs of --setting value"),
    ):
        with pytest.raises(SystemExit):
            parse_settings(Compiling, words, "tinylm test", "")
        output = capsys.readouterr()
        assert text in " ".join((output.out + output.err).split())


def test_values_keep_their_type() -> None:
    settings = parse("--data_path", "123", "--seed", "7", "--target_modules", "q_proj,k_proj")
    assert (settings.data_path, settings.seed) == ("123", 7)
    assert settings.target_modules == ("q_proj", "k_proj")
    assert parse("--data_path=x", "--seed=null", "--target_modules=[up_proj]").target_modules == ("up_proj",)
    assert parse("--data_path", "-dash").data_path == "-dash"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "1"], "unknown flag --lr; did you mean --learning_rate?"),
        (["--num-train-epochs=1"], "unknown flag --num_train_epochs; did you mean --epochs?"),
        (["-lr", "1"], "stray '-lr'; expected pairs of --setting value; did you mean --learning_rate?"),
        (["lr=1e-3"], "stray 'lr=1e-3'; expected pairs of --setting value; did you mean --learning_rate?"),
        (["--epochs", "9" * 30, "--data_path", "x"], "epochs is 999"),
        (["--learning_rate", "nan", "--data_path", "x"], "learning_rate is 'nan'; expected a number"),
        (["--learning_rate", "1e999", "--data_path", "x"], "learning_rate is inf; expected a number"),
        (["--fp16"], "did you mean --dtype?"),
        (["--model_path", "x"], "unknown flag --model_path; see"),
        ([__file__], f"did you mean --data_path {__file__}?"),
        (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean --learning_rate?"),
        (["--epochs", "x", "--data_path", "x"], "epochs is 'x'; expected a whole number"),
        (["--seed", "x", "--data_path", "x"], "seed is 'x'; expected a whole number or null"),
        (["--dtype", "int8", "--data_path", "x"], "dtype is 'int8'; expected one of auto, float32"),
        (["--use_compile=maybe", "--data_path", "x"], "use_compile is 'maybe'; expected true or false"),
        (["--data_path"], "--data_path without a value"),
        (["--data_path", "--epochs", "3"], "--data_path without a value"),
        (["--data_path", "x", "y"], "stray 'y'"),
        ([], "missing --data_path; expected Where the text is.; see"),
        (["--config", "nowhere.yaml"], "no file nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert message in failure(capsys, *words)


def test_abbreviated_flags_are_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean --epochs?" in failure(capsys, "--epoch", "3", "--data_path", "x")


def test_values_that_do_not_fit_together_are_value_errors() -> None:
    with pytest.raises(ValueError, match="epochs 0; expected at least 1"):
        parse("--data_path", "x", "--epochs", "0")


def test_help_comes_from_the_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Train on text." in text
    assert "Peak learning rate; 100% of it after the warm-up. (default: 0.0001)" in text
    assert "Where the text is. (required)" in text
    assert "What every recipe knows:" in text
    assert "--print_config" in text
    assert "--dtype {auto,float32} Compute precision. (default: auto)" in text
    assert "--use_compile [{1,0}] Compile the model. (default: 0)" in text
    assert "Seed of the run. (default: none)" in text
    assert "type:" not in text and "Literal" not in text


def test_a_file_gives_values_and_a_flag_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("command: pretrain\ndata_path: books\nlearning_rate: 1e-5\nuse_compile: 1\n")
    settings = parse("--use_compile", "0", "--config", str(file))
    assert settings == Recipe(data_path="books", learning_rate=1e-5, use_compile=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data_path: x\n\nlearning_rat: 1\n",
            "line 3: unknown key 'learning_rat'; did you mean",
        ),
        ("data_path: x\nepochs: many\n", "line 2: epochs is 'many'; expected a whole number"),
        ("data_path: [x\n", "not YAML"),
        ("- a\n- b\n", "holds a list; expected `key: value` lines"),
        ("command: sft\ndata_path: x\n", "is for `tinylm sft`, not `tinylm pretrain`"),
    ],
)
def test_a_mistake_in_a_file_names_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    line = failure(capsys, "--config", str(file))
    assert str(file) in line
    assert message in line


def test_printed_settings_run_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--data_path", "bücher: 1", "--learning_rate", "3e-7", "--seed", "4"]
    with pytest.raises(SystemExit) as stop:
        parse(*words, "--print_config")
    assert stop.value.code == 0
    file = tmp_path / "again.yaml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    assert file.read_text(encoding="utf-8").startswith("command: pretrain\n")
    assert parse("--config", str(file)) == parse(*words)


def test_yaml_round_trip(tmp_path: Path) -> None:
    settings = Recipe(data_path="null", learning_rate=1e-10, rope_scaling={"factor": 4.0}, target_modules=())
    file = tmp_path / "run.yaml"
    file.write_text(settings_to_yaml(settings), encoding="utf-8")
    assert parse("--config", str(file)) == settings
