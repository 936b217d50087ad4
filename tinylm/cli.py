"""`tinylm <command>`: the table of commands. A command's module is imported only when the command runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple

from tinylm import __version__
from tinylm.commandline.exit_status import RERUN_ADVICE, RESUME_ADVICE, run_main
from tinylm.commandline.synonyms import did_you_mean


class Command(NamedTuple):
    """Where a command's `main(argv) -> status` is, what it does, and how to continue it after an interruption."""

    target: str
    summary: str
    advice: str = ""


COMMANDS = {
    "quickstart": Command("tinylm.commands.quickstart:main", "train a small chat model from scratch", RERUN_ADVICE),
    "tokenizer": Command("tinylm.trainer.train_tokenizer:main", "train a tokenizer on text"),
    "pretrain": Command("tinylm.trainer.train_pretrain:main", "train a model on plain text", RESUME_ADVICE),
    "sft": Command("tinylm.trainer.train_full_sft:main", "fine-tune a model on conversations", RESUME_ADVICE),
    "lora": Command("tinylm.trainer.train_lora:main", "fine-tune a small adapter of a frozen model", RESUME_ADVICE),
    "dpo": Command("tinylm.trainer.train_dpo:main", "teach a model which of two answers is preferred", RESUME_ADVICE),
    "chat": Command("tinylm.commands.chat:main", "talk with a model in the terminal"),
    "serve": Command("tinylm.commands.serve:main", "serve models to other programs, over OpenAI's API"),
    "eval": Command("tinylm.commands.evaluate:main", "measure a model"),
    "merge": Command("tinylm.commands.merge:main", "fold an adapter into its model"),
    "import": Command("tinylm.commands.import_model:main", "take in a Hugging Face folder or a GGUF of another maker"),
    "export": Command("tinylm.commands.export:main", "write a model for other programs"),
    "verify": Command("tinylm.commands.verify:main", "check a model's files and where it comes from"),
    "bench": Command("tinylm.commands.bench:main", "measure the speed of this machine"),
    "cache": Command("tinylm.commands.cache:main", "list or remove the token shards kept for all runs"),
    "run": Command("tinylm.cli:run_file", "run the command that a YAML file describes", RESUME_ADVICE),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit status; 2 for a command that does not exist."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] in ("-V", "--version", "version"):
        print(f"tinylm {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        return _fail(f"unknown command {argv[0]!r}; {did_you_mean(argv[0], COMMANDS, 'tinylm ')}see tinylm --help")
    command = COMMANDS[argv[0]]
    return run_main(lambda rest: _load(command.target)(rest), argv[1:], command.advice)


def help_text() -> str:
    """What `tinylm --help` prints."""
    lines = [f"  {name:<{max(map(len, COMMANDS))}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tinylm <command> [--setting value ...]",
            "",
            "Tiny language models, from the first byte to the last reply.",
            "",
            "commands:",
            *lines,
            "",
            "Start with `tinylm quickstart`. `tinylm <command> --help` lists a command's settings.",
        ]
    )


def run_file(argv: list[str]) -> int:
    """`tinylm run FILE.yaml [--setting value ...]`: the file's `command` key names the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: tinylm run FILE.yaml [--setting value ...]\n\n" + COMMANDS["run"].summary)
        return 0 if argv else 2
    from tinylm.commandline.settings import load_yaml

    path, *rest = argv
    _, loaded = load_yaml(path, "tinylm run")
    name = loaded.get("command")
    if name not in COMMANDS or name == "run":
        runnable = ", ".join(other for other in COMMANDS if other != "run")
        found = "no key `command`" if name is None else f"command {name!r}"
        raise ValueError(f"{path}: {found}; expected one of {runnable}; write `command: NAME` first")
    return _load(COMMANDS[name].target)(["--config", path, *rest])


def _load(target: str) -> Callable[[list[str]], int]:
    module, _, name = target.partition(":")
    function: Callable[[list[str]], int] = getattr(importlib.import_module(module), name)
    return function


def _fail(message: str) -> int:
    print(f"tinylm: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
