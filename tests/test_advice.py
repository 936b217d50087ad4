"""Every command and flag that a message, a help text or a comment in tinylm/ names exists."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re

import pytest

from tests.structure import FILES, PACKAGE
from tinylm.cli import COMMANDS
from tinylm.commandline.settings import SHARED_FLAGS

COMMAND = re.compile(r"(?<![\w/.-])tinylm ([a-z][a-z_-]*)")
FLAG = re.compile(r"(?<![\w-])--([a-zA-Z][\w-]*)")

NO_COMMAND = {"cannot", "did", "wrote"}
"""Words that follow the program's name in a sentence."""

NO_SETTING = {"nproc_per_node", "rdzv_id", "help", "version", "setting", "flag", "lora", "local_dir"}
"""Flags of torchrun, llama.cpp and hf, and words that stand for any flag."""


def all_flags() -> set[str]:
    """The fields of every settings class that a command's module defines, and the shared flags."""
    flags = set(SHARED_FLAGS)
    for command in COMMANDS.values():
        module = importlib.import_module(command.target.partition(":")[0])
        for value in vars(module).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__name__.endswith("Settings"):
                flags |= {field.name for field in dataclasses.fields(value)}
    return flags


def texts_of(source: str) -> list[tuple[int, str]]:
    """(line, text) of each string in the source. The values in an f-string count as `{}`."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            texts.append((node.lineno, "".join(map(str, parts))))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append((node.lineno, node.value))
    return texts


def faults_in(source: str, flags: set[str]) -> list[str]:
    faults = []
    for line, text in texts_of(source):
        commands = [word for word in COMMAND.findall(text) if word not in COMMANDS and word not in NO_COMMAND]
        named = [word.replace("-", "_") for word in FLAG.findall(text)]
        unknown = [word for word in named if word not in flags and word not in NO_SETTING]
        faults += [f"line {line}: tinylm {word}" for word in commands] + [f"line {line}: --{word}" for word in unknown]
    return sorted(set(faults))


@pytest.mark.parametrize("name", FILES)
def test_commands_and_flags_that_are_named_exist(name: str) -> None:
    assert faults_in((PACKAGE / name).read_text(encoding="utf-8"), all_flags()) == []


def test_one_that_does_not_exist_is_seen() -> None:
    source = 'raise ValueError(f"{x}: none; make one with `tinylm train-tokenizer`, or pass --max-seqlen {y}")'
    assert faults_in(source, all_flags()) == ["line 1: --max_seqlen", "line 1: tinylm train-tokenizer"]
