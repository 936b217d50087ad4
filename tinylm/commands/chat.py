"""The terminal chat: talk with a model you trained.

tinylm chat                                                      # the quickstart's model, or else the newest
tinylm chat --model_path out/dpo_512_epoch0 --temperature 0      # this one, always its likeliest answer
python inference.py --model_path out --weight pretrain --prompt "Once upon a time"
tinylm chat < questions.txt                                      # one question per line, answers on stdout
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console

from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.model_path import states_of, unfinished_run
from tinylm.commandline.exit_status import CONTROL_CHARACTERS, run_main
from tinylm.commandline.settings import parse_settings
from tinylm.commandline.terminal import make_console
from tinylm.commands.find_model import find_model
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.system.runtime import InferenceDtypeName, setup_runtime

HELP = "/reset  forget the conversation\n/system TEXT  give instructions (none: remove them)\n/exit  leave (or Ctrl-D)"


@dataclass(frozen=True, kw_only=True)
class ChatSettings(SamplingSettings):
    """Settings of a chat."""

    model_path: str = ""
    """model folder, adapter folder, .pth file or a folder of several models; without it the quickstart's, or else the
    newest under ./out"""
    weight: Literal["", "pretrain", "full_sft", "lora", "dpo"] = ""
    """of several models, the newest whose name starts like this; pretrain continues text instead of chatting"""
    adapter: str = ""
    """LoRA adapter to add to the model: its folder, or the output folder of `tinylm lora`"""
    tokenizer_path: str = ""
    """tokenizer folder; by default the model's own"""
    prompt: str | None = None
    """answer this and exit"""
    system: str = ""
    """instructions that stay at the head of the conversation"""
    max_seq_len: int = 0
    """longest prompt and answer together (tokens); 0 means the model's context"""
    hidden_size: int = 0
    """if given, must be the model's width"""
    num_hidden_layers: int = 0
    """if given, must be the model's number of blocks"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    dtype: InferenceDtypeName = "auto"
    """precision of matrix products; auto is bfloat16 where the hardware has it, else float32; int8 stores
    weights in 8 bits, for a CPU: faster for one text at a time, slower for many"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_seq_len", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 (read from the model) or more")
        if self.weight == "pretrain" and self.system:
            raise ValueError("system with weight=pretrain; a base model continues text and takes no instructions")

    @property
    def sampling(self) -> SamplingSettings:
        """The part that the engine reads."""
        return SamplingSettings(**{field.name: getattr(self, field.name) for field in fields(SamplingSettings)})


# ---------------------------------------------------------------------------------------------------------------
# Which model
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partner:
    """The model to talk with."""

    engine: Engine
    is_base: bool
    """Whether it is a base model, which continues text."""
    path: Path
    notices: tuple[str, ...]
    """What the user must know about it."""


def load_partner(settings: ChatSettings) -> Partner:
    """The model with the adapter merged in.

    Raises:
        ValueError, FileNotFoundError: there is no such model, or it has another shape than requested.
    """
    path = find_model(settings.model_path, settings.weight)
    runtime = setup_runtime(settings.device, settings.dtype, only_uses=True)
    loaded = load_for_use(path, settings.adapter, settings.tokenizer_path, runtime.device)
    for name in ("hidden_size", "num_hidden_layers"):
        wanted, actual = getattr(settings, name), getattr(loaded.model.config, name)
        if wanted not in (0, actual):
            raise ValueError(f"{name} is {wanted}, but {path} has {actual}; leave it out to read it from the model")
    engine = Engine(loaded.model, loaded.tokenizer, runtime.compute_dtype, loaded.document_start)
    if settings.max_seq_len > engine.context_length:
        raise ValueError(
            f"max_seq_len is {settings.max_seq_len}, but {path} has a context of {engine.context_length} tokens; "
            "leave it out to use all of it"
        )
    engine.context_length = settings.max_seq_len or engine.context_length
    stage = settings.weight or ("pretrain" if path.name.startswith("pretrain") else loaded.lineage.get("stage", ""))
    is_base = (stage == "pretrain" and not settings.adapter) or not loaded.tokenizer.can_chat
    if not is_base:
        engine.prompt([{"role": "user", "content": ""}], settings.sampling)  # an error if the context is too short
    stopped = unfinished_run(states_of(path))
    notices = (loaded.notice, f"{path.name}: {stopped}" if stopped else "")
    return Partner(engine, is_base, path, tuple(filter(None, notices)))


# ---------------------------------------------------------------------------------------------------------------
# The conversation
# ---------------------------------------------------------------------------------------------------------------


class Chat:
    """One conversation with one model: its messages so far, and the next answer.

    Args:
        is_base: the model continues text and remembers nothing between inputs.
        notify: called with a sentence if a part of the history had to be left out.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: SamplingSettings,
        system: str = "",
        is_base: bool = False,
        notify: Callable[[str], None] = lambda notice: None,
    ) -> None:
        self.engine = engine
        self.sampling = sampling
        self.system = system
        self.is_base = is_base
        self.notify = notify
        self.messages: list[dict[str, Any]] = []

    def answer(self, text: str) -> Generator[str, None, None]:
        """The answer to `text` in pieces. If it is stopped, the part so far is remembered."""
        if self.is_base:
            yield from self._continue(text)
            return
        system = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": text}
        fitted = self.engine.prompt([*system, *self.messages, question], self.sampling)
        if fitted.notice:
            self.notify(fitted.notice)
        # Messages that do not fit now will not fit later either.
        self.messages = [*self.messages[fitted.dropped_messages :], question]
        pieces: list[str] = []
        try:
            for piece in self.engine.stream_text(fitted.ids, self.sampling):
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _continue(self, text: str) -> Generator[str, None, None]:
        ids = self.engine.text_prompt(text)
        cut = len(ids) - len(self.engine.bounded(ids, self.sampling))
        if cut:
            self.notify(f"left out to fit the context: the first {cut} tokens")
        yield from self.engine.stream_text(ids, self.sampling)

    def command(self, line: str) -> str | None:
        """Execute a line that starts with "/"; returns the reply to the user, or None to leave."""
        name, _, rest = line.partition(" ")
        if name == "/exit":
            return None
        if name == "/reset":
            self.messages = []
            return "the conversation starts over"
        if name == "/system":
            if self.is_base:
                return "a base model continues text and takes no instructions"
            self.system = rest.strip()
            self.messages = []
            return "instructions set; the conversation starts over" if self.system else "instructions removed"
        return HELP if name == "/help" else f"unknown command {name}\n{HELP}"


# ---------------------------------------------------------------------------------------------------------------
# The terminal
# ---------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """`tinylm chat`: one answer (--prompt), answers to the lines of stdin, or a conversation at the terminal."""
    argv = sys.argv[1:] if argv is None else argv
    settings = parse_settings(ChatSettings, argv, "tinylm chat", "Talk with a model in the terminal.")
    partner = load_partner(settings)
    notices = make_console(stderr=True, style="dim")
    for notice in partner.notices:
        notices.print(notice)
    chat = Chat(partner.engine, settings.sampling, settings.system, partner.is_base, notify=notices.print)
    is_dialogue = settings.prompt is None and sys.stdin.isatty()
    if is_dialogue:
        kind = "continues your text" if partner.is_base else "/help lists the commands"
        notices.print(f"{partner.path}: {partner.engine.model.num_parameters():,} parameters; {kind}")
        _converse(chat, notices)
        return 0
    if partner.path != Path(settings.model_path):
        notices.print(f"model: {partner.path}")
    if settings.prompt is None:
        _answer_lines(chat, sys.stdin, notices)
    elif settings.prompt.strip() or (partner.is_base and (settings.prompt or partner.engine.document_start)):
        _print_answer(chat, settings.prompt)  # a base model begins a text from nothing, if documents began with a token
    else:
        raise ValueError("prompt holds no text; expected some to answer; leave out --prompt to type it")
    return 0


def _answer_lines(chat: Chat, lines: TextIO, notices: Console) -> None:
    """Answer each line of a pipe or file, as one conversation; skip empty lines.

    Raises:
        ValueError: there is no line to answer.
    """
    is_empty = True
    for line in lines:
        is_empty = is_empty and not line.strip()
        if not _take(chat, line, notices):
            return
    if is_empty:
        raise ValueError("standard input is empty; expected one question per line; or give --prompt")


def _converse(chat: Chat, notices: Console) -> None:
    """Read and answer until /exit or Ctrl-D. Ctrl-C stops an answer, or clears the line."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history, if the platform has readline)
    while True:
        try:
            line = input("> ")
        except EOFError:
            make_console().print()
            return
        except KeyboardInterrupt:
            notices.print("\n(Ctrl-D or /exit leaves)")
            continue
        try:
            if not _take(chat, line, notices):
                return
        except KeyboardInterrupt:
            notices.print("\n(stopped)")
        except ValueError as error:
            notices.print(str(error))


def _take(chat: Chat, line: str, notices: Console) -> bool:
    """Handle one line of input; returns False to leave."""
    # Invalid bytes from a terminal arrive as lone surrogates, which no tokenizer accepts.
    line = line.strip().encode("utf-8", errors="replace").decode("utf-8")
    if line in ("exit", "quit"):
        return False
    if line.startswith("/"):
        said = chat.command(line)
        if said is not None:
            notices.print(said)
        return said is not None
    if line:
        _print_answer(chat, line)
    return True


def _print_answer(chat: Chat, text: str) -> None:
    """Stream one answer to stdout; on a terminal, also print the speed."""
    console = make_console()
    start = time.perf_counter()
    pieces: list[str] = []
    if chat.is_base:
        console.file.write(text)
    with contextlib.closing(chat.answer(text)) as answer:
        for piece in answer:
            pieces.append(piece)
            console.file.write(piece.translate(CONTROL_CHARACTERS) if console.is_terminal else piece)
            console.file.flush()
    seconds = time.perf_counter() - start
    console.file.write("\n")
    if console.is_terminal:
        num_tokens = len(chat.engine.tokenizer.encode("".join(pieces))) + 1  # the stop token was computed too
        console.print(f"{num_tokens / seconds:.0f} tokens/s", style="dim", justify="right")


if __name__ == "__main__":
    sys.exit(run_main(main, advice=""))
