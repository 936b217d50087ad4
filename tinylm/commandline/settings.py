"""Settings of a run: frozen dataclasses, read from flags and YAML files, and written as YAML.

Each command declares one dataclass. Each field is a flag of the same name, and the string literal below the field is
its help text. `parse_settings` is the only parser in the project.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jsonargparse
import yaml
from docstring_parser import parse_from_object

from tinylm.commandline.strict_yaml import MAX_YAML_BYTES, is_odd_number, parse_yaml
from tinylm.commandline.synonyms import did_you_mean
from tinylm.files.untrusted import is_unicode, shown

Settings = TypeVar("Settings")

SHARED_FLAGS = {
    "config": "YAML file with any of these settings; flags take precedence over it",
    "print_config": "print the settings of this run as YAML, ready for --config, and stop",
    "debug": "on failure, show where in the code it happened",
}
PATH_SETTING = re.compile(r"\w+_(path|dir)|adapter|output")
"""The names of settings that are paths. In these, `~` is the user's folder, as it is in a shell."""
_MAX_QUOTED = 100
"""Longest quoted value of a setting that is not text, such as "3" for 3. Such a value is parsed as YAML again."""
BOOL_WORDS = {"1": "true", "0": "false", "true": "true", "false": "false", "yes": "true", "no": "false"}
TYPE_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    type(None): "null",
}

# --------------------------------------------------------------------------------------------------
# Flags and YAML -> settings
# --------------------------------------------------------------------------------------------------


def parse_settings(cls: type[Settings], argv: list[str], prog: str, description: str) -> Settings:
    """Build `cls` from command line flags, and from the YAML file named by --config.

    Flags may have underscores or hyphens. `--use_compile` alone sets a bool, or it is followed by 1, 0, true or false.
    A flag takes precedence over the YAML file, and the file over the field's default.

    Args:
        cls: a frozen dataclass with fields of str, int, float, bool, Literal, list, tuple, dict, or None.
        argv: the arguments after the command's name.
        prog: the command as the user types it, such as `tinylm pretrain`.
        description: what the command does, for --help.

    Raises:
        ValueError: from the `__post_init__` of `cls`, if values do not fit together.
        SystemExit: status 2 after one line on stderr for a wrong flag, key or value; status 0 after --help or
            --print_config.
    """
    hints = _field_types(cls)
    parser = _build_parser(cls, hints, prog, description)
    try:
        flags = dict(vars(parser.parse_args(_normalize_flags(argv, hints, prog), defaults=False)))
    except _ParseError as error:
        _fail(prog, f"{error}; see {prog} --help")
    shared = {name: flags.pop(name, None) for name in SHARED_FLAGS}
    for name, value in flags.items():
        if _is_too_large(value):
            _fail(prog, f"{name} is {shown(value)}; expected {_type_name(hints[name])}; see {prog} --help")
    values = {} if shared["config"] is None else _read_config(shared["config"], parser, hints, prog)
    values.update(flags)
    _check_unicode(values, prog)
    values = {name: os.path.expanduser(v) if _is_path(name, v) else v for name, v in values.items()}
    required = [field.name for field in _init_fields(cls) if _is_required(field)]
    if missing := [f"--{name}" for name in required if name not in values]:
        expected = (
            f"expected {_field_helps(cls)[missing[0].removeprefix('--')]}"
            if len(missing) == 1
            else "expected all of them"
        )
        _fail(prog, f"missing {', '.join(missing)}; {expected}; see {prog} --help")
    settings = cls(**values)
    if shared["print_config"]:
        command = prog.removeprefix("tinylm ")
        print((f"command: {command}\n" if command != prog else "") + settings_to_yaml(settings), end="")
        raise SystemExit(0)
    return settings


def model_first(argv: list[str]) -> list[str]:
    """The arguments of a command that is about one model, where its path may come first, without --model_path."""
    return ["--model_path", *argv] if argv and not argv[0].startswith("-") else argv


def settings_to_yaml(settings: Any) -> str:
    """The settings as YAML, in the order of the fields; `--config` reads them back into an equal instance."""
    values = {field.name: _plain(getattr(settings, field.name)) for field in _init_fields(type(settings))}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, os.PathLike) else value


class _ParseError(Exception):
    """An error that jsonargparse found, in one line."""


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """A help formatter that does not add Python's types: the metavar shows the choices, and the text says the rest."""

    def _get_help_string(self, action: Any) -> str:
        return str(action.help)


class _Parser(jsonargparse.ArgumentParser):
    """An ArgumentParser that raises its errors, instead of printing the usage and ending the program."""

    expected: dict[str, str]
    """Setting -> its accepted values, in words."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # jsonargparse says: 'Parser key "lr":\n  Expected a <class 'float'>. Got value: abc'
        found = re.search(r'Parser key "(\w+)":.*(?:Got|Given) value: ([^\n]*)', message, flags=re.DOTALL)
        if found:
            message = f"{found[1]} is {found[2]!r}; expected {self.expected.get(found[1], 'another value')}"
        raise _ParseError(" ".join(message.split())) from ex


def _fail(prog: str, message: str) -> NoReturn:
    print(f"{prog}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _build_parser(cls: type, hints: dict[str, Any], prog: str, description: str) -> _Parser:
    usage = f"{prog} [--config FILE.yaml] [--setting value ...]"
    parser = _Parser(prog=prog, usage=usage, description=description, print_config=None, formatter_class=_HelpFormatter)
    parser.expected = {name: _type_name(hint) for name, hint in hints.items()}
    helps = _field_helps(cls)
    fields = {field.name: field for field in _init_fields(cls)}
    for owner in cls.__mro__:
        own = [fields.pop(name) for name in vars(owner).get("__annotations__", {}) if name in fields]
        if not own:
            continue
        title = (owner.__doc__ or "").strip().split("\n")[0].rstrip(".")
        # if a class has no docstring, `dataclass` sets its signature as one
        group = parser.add_argument_group("settings" if title.startswith(f"{owner.__name__}(") else title)
        for field in own:
            note = "required" if _is_required(field) else f"default: {_shown(field)}"
            # SUPPRESS: the result holds only the given flags, so that they can be told from defaults
            group.add_argument(
                f"--{field.name}",
                type=hints[field.name],
                default=jsonargparse.SUPPRESS,
                help=f"{helps.get(field.name, '')} ({note})".strip(),
                metavar=_metavar(field.name, hints[field.name]),
            )
    shared = parser.add_argument_group("for every command")
    for name, text in SHARED_FLAGS.items():
        how: dict[str, Any] = {"metavar": "FILE.yaml"} if name == "config" else {"action": "store_true"}
        shared.add_argument(f"--{name}", default=jsonargparse.SUPPRESS, help=text, **how)
    return parser


def _normalize_flags(argv: list[str], hints: dict[str, Any], prog: str) -> list[str]:
    """Each setting as one word `--flag=value`, with underscores; an unknown flag ends the program."""
    known = [*hints, *SHARED_FLAGS, "help"]
    result, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = _flag_name(word), "=" in word, word.partition("=")[2]
        if word == "-h" or name in ("help", "print_config", "debug"):
            result.append("-h" if name is None else f"--{name}")
            continue
        if name is None:
            hint = _hint_for_stray(word, known)
            _fail(prog, f"stray {word!r}; expected pairs of --setting value; {hint}see {prog} --help")
        if name not in known:
            _fail(prog, f"unknown flag --{name}; {did_you_mean(name, known, '--')}see {prog} --help")
        if _is_bool(hints.get(name)):
            if not equals:
                words = {*BOOL_WORDS, *_choices(hints[name])}
                value = rest.pop(0) if rest and rest[0].lower() in words else "true"
            value = BOOL_WORDS.get(value.lower(), value)
        elif not equals:
            if not rest or _flag_name(rest[0]) in known:
                expected = _type_name(hints.get(name, str))
                _fail(prog, f"--{name} without a value; expected {expected}; see {prog} --help")
            value = rest.pop(0)
        if typing.get_origin(hints.get(name)) in (list, tuple) and not value.startswith("["):
            value = f"[{value}]"  # a,b on the command line is YAML's [a, b]
        elif is_odd_number(value) and not _is_text(hints.get(name, str)):
            _fail(prog, f"--{name} {value:.40} could be another number; expected decimal digits; see {prog} --help")
        result.append(f"--{name}={value}")
    return result


def _is_path(name: str, value: Any) -> bool:
    return isinstance(value, str) and PATH_SETTING.fullmatch(name) is not None


def _check_unicode(values: dict[str, Any], prog: str) -> None:
    """End the program for a text that is not UTF-8: it could not be written into the files of a run."""
    for name, value in values.items():
        if isinstance(value, str) and not is_unicode(value):
            advice = "rename the file" if _is_path(name, value) else "write it in UTF-8"
            _fail(prog, f"--{name} is {shown(value)}, which is not UTF-8; expected valid Unicode; {advice}")


def _is_too_large(value: object) -> bool:
    """No setting is NaN or infinite, and torch takes no whole number of more than 64 bits."""
    return (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) >= 2**63)


def _hint_for_stray(word: str, known: list[str]) -> str:
    """What a word that belongs to no flag may mean: a path, `-lr` or `lr=1e-3`."""
    if os.path.exists(word):
        is_model = os.path.isdir(word) or word.endswith((".pth", ".pt"))
        flags = [name for name in ("model_path", "data_path")[:: 1 if is_model else -1] if name in known]
        return f"did you mean --{flags[0]} {word}? " if flags else ""
    return did_you_mean(word.lstrip("-").partition("=")[0].replace("-", "_"), known, "--")


def _flag_name(word: str) -> str | None:
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else None


def _read_config(path: str, parser: _Parser, hints: dict[str, Any], prog: str) -> dict[str, Any]:
    """The settings in a YAML file, checked: known keys, values of the right type."""
    text, loaded = load_yaml(path, prog)
    command = loaded.pop("command", None)
    if command is not None and prog.startswith("tinylm ") and prog != f"tinylm {command}":
        _fail(prog, f"{path} is for `tinylm {command}`, not `{prog}`; use tinylm run {path}")
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        found = re.search(rf"^{re.escape(str(key))}\s*:", text, flags=re.MULTILINE)
        where = f"{path}, line {text.count(chr(10), 0, found.start()) + 1}" if found else path
        if key not in hints:
            _fail(prog, f"{where}: unknown key {shown(key)}; {did_you_mean(str(key), hints)}see {prog} --help")
        if _is_bool(hints[key]) and value in (0, 1):
            value = bool(value)
        if isinstance(value, str) and _is_text(hints[key]):
            values[key] = value  # jsonargparse would parse it as YAML again, aliases included
            continue
        if _is_too_large(value) or (isinstance(value, str) and len(value) > _MAX_QUOTED):
            _fail(prog, f"{where}: {key} is {shown(value)}; expected {_type_name(hints[key])}; see {prog} --help")
        if value is None and type(None) not in typing.get_args(hints[key]):
            _fail(prog, f"{where}: {key} is null; expected {_type_name(hints[key])}; see {prog} --help")
        try:
            values[key] = vars(parser.parse_object({key: value}, defaults=False))[key]
        except _ParseError as error:
            _fail(prog, f"{where}: {error}; see {prog} --help")
    return values


def load_yaml(path: str | Path, prog: str) -> tuple[str, dict[str, Any]]:
    """The text of a YAML file and its top level mapping; any other file ends the program with status 2."""
    try:
        with open(os.path.expanduser(path), "rb") as file:  # read a limited number: it may be a pipe that never ends
            raw = file.read(MAX_YAML_BYTES + 1)
        if len(raw) > MAX_YAML_BYTES:
            _fail(
                prog, f"{path} has more than {MAX_YAML_BYTES} bytes; expected a YAML file of settings; check the path"
            )
        text = raw.decode("utf-8").replace("\r\n", "\n")
        loaded = parse_yaml(text, jsonargparse.get_loader("yaml"))
    except FileNotFoundError:
        _fail(prog, f"no file {path}; expected a YAML file of settings; check the path")
    except OSError as error:
        _fail(prog, f"cannot read {path}: {error.strerror}; expected a YAML file of settings; check the path")
    except UnicodeDecodeError:
        _fail(prog, f"{path} is not UTF-8 text; expected a YAML file of settings; check the path")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", "unreadable")).split())
        _fail(prog, f"{path}{where}: not YAML ({problem:.100}); expected `key: value` lines")
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, dict):
        _fail(prog, f"{path} holds a {type(loaded).__name__}; expected `key: value` lines; see {prog} --help")
    command = loaded.get("command")
    if command is not None and (not isinstance(command, str) or not command.isidentifier() or len(command) > 40):
        _fail(prog, f"{path} has the command {shown(command)}; expected its name; see tinylm --help")
    return text, loaded


# --------------------------------------------------------------------------------------------------
# Facts about a settings class
# --------------------------------------------------------------------------------------------------


def _init_fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init]


def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in _init_fields(cls)}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _field_helps(cls: type) -> dict[str, str]:
    """Field -> the string literal below it, for `cls` and its base classes; empty if there is no source code."""
    found = [parse_from_object(owner).params for owner in reversed(cls.__mro__[:-1])]
    return {param.arg_name: " ".join((param.description or "").split()) for params in found for param in params}


def _shown(field: dataclasses.Field[Any]) -> str:
    default = field.default_factory() if callable(field.default_factory) else field.default
    if default in (None, "") or isinstance(default, bool):
        return str(int(default)) if isinstance(default, bool) else "none"
    return yaml.safe_dump(_plain(default), default_flow_style=True, width=1000).split("\n")[0]


def _type_name(hint: Any) -> str:
    """A type in words: `one of a, b`, `a whole number or null`."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint) if choice != "")
    if _is_bool(hint) and (choices := _choices(hint)):
        return f"true, false or {' or '.join(choices)}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (list, tuple):
        return "a list such as [a, b]"
    return TYPE_WORDS.get(typing.get_origin(hint) or hint, str(hint))


def _metavar(name: str, hint: Any) -> str:
    """What --help shows for the value: the choices, the form of a list, or the last word of the name."""
    if _is_bool(hint):
        return "[{" + ",".join(["1", "0", *_choices(hint)]) + "}]"  # the flag alone means 1
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(str(choice) for choice in typing.get_args(hint) if choice != "") + "}"
    return "A,B,..." if typing.get_origin(hint) in (list, tuple) else name.rpartition("_")[2].upper()


def _is_bool(hint: Any) -> bool:
    return hint is bool or bool in typing.get_args(hint)


def _choices(hint: Any) -> list[str]:
    """The words that a union such as `bool | Literal["auto"]` takes."""
    parts = [part for part in typing.get_args(hint) if typing.get_origin(part) is typing.Literal]
    return [str(choice) for part in parts for choice in typing.get_args(part)]


def _is_text(hint: Any) -> bool:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return hint is str or (union and str in typing.get_args(hint))
