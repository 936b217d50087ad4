"""The terminal: facts that can be copied, and progress that is a bar for people and nothing for a pipe."""

from __future__ import annotations

import io
import os
import time

import pytest
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tinylm.commandline import terminal as module
from tinylm.commandline.terminal import (
    closed_pipe_calls,
    fit_words,
    format_count,
    format_seconds,
    lines_of_words,
    make_console,
    print_facts,
    progress,
    progress_heard_by,
)


def terminal(**options) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120, **options)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (7620, "2h07m"),
    ],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(950, "950"), (12_345, "12.3k"), (4_560_000, "4.56M"), (1.2e9, "1.2B"), (-2_500, "-2.5k")]
)
def test_counts(number, text):
    assert format_count(number) == text


def test_facts_stand_in_two_columns_and_keep_brackets():
    """Square brackets are the console's own markup; in a path they would be swallowed."""
    console = Console(file=io.StringIO(), width=30, soft_wrap=True)
    print_facts(console, "done", {"model": "out/[bold]größe/" + "x" * 60, "validation": "1.5"})
    assert console.file.getvalue().splitlines() == [
        "done", f"  model       out/[bold]größe/{'x' * 60}", "  validation  1.5"
    ]  # fmt: skip


def test_a_text_is_printed_as_it_is(capsys):
    """ "[/b]" in a path ended in a MarkupError after the measuring, and the report was lost."""
    text = "a[/b] [red]größe[/red] :smile: [link=x]\\"
    console = make_console()
    console.print(text)
    console.print(text, style="bold")
    table = Table(text, title=text)
    table.add_row(text)
    console.print(table)
    print_facts(console, text, {text: text})
    assert capsys.readouterr().out.count(text) == 8
    shown = terminal()
    with progress(shown, text) as show:
        show(text)
    assert shown.file.getvalue().count(text) >= 2


def test_a_text_cannot_steer_the_terminal(capsys):
    console = make_console()
    console.print("name \x1b[2Jé\x9b3J\r\n")
    print_facts(console, "t", {"path": "\x1b]0;title\x07x"})
    assert capsys.readouterr().out == "name [2Jé3J\n\nt\n  path  ]0;titlex\n"


def test_progress_shows_title_words_and_share_on_a_terminal():
    console = terminal()
    with progress(console, "tokenising [x]") as show:
        show("3 of 12 chats", 3, 12)
    text = console.file.getvalue()
    assert "tokenising [x]" in text and "3 of 12 chats" in text
    with progress(console, "reading") as show:
        show("no numbers [/bold] known")
    assert "no numbers [/bold] known" in console.file.getvalue()


def test_the_bar_knows_how_much_there_is(monkeypatch):
    """Without the total it would only move back and forth."""
    bars = []

    class Recorded(Progress):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            bars.append(self)

    monkeypatch.setattr("tinylm.commandline.terminal.Progress", Recorded)
    with progress(terminal(), "lesen") as show:
        show("no numbers yet")
        assert bars[0].tasks[0].total is None
        show("3 of 12", 3, 12)
        assert (bars[0].tasks[0].completed, bars[0].tasks[0].total) == (3, 12)


def test_progress_in_a_pipe_is_a_line_when_it_is_due(monkeypatch):
    """And none beside the main process."""
    pipe = make_console(file=io.StringIO(), width=400)
    with progress(pipe, "tokenising") as show:
        show("3 of 12", 3, 12)
        show(["4 of 12 größe", "[b]x"], 4, 12, is_due=True)
    assert pipe.file.getvalue() == "tokenising 4 of 12 größe · [b]x\n"
    quiet = terminal(quiet=True)
    with progress(quiet, "tokenising") as show:
        show("3 of 12", is_due=True)
    assert quiet.file.getvalue() == ""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_listener_hears_of_progress_and_adds_lines(is_terminal):
    """Only inside its block, and only of progress with numbers."""
    heard, console = [], make_console(file=io.StringIO(), width=400, force_terminal=is_terminal)

    def listener(*words):
        heard.append(words)
        return "half of größe [b]x[/b] is done" if words[1:] == (6, 12) else None

    with progress_heard_by(listener), progress(console, "zählen") as show:
        show("no numbers")
        show("3 of 12", 3, 12)
        show("6 of 12", 6, 12)
    assert heard == [("zählen", 3, 12), ("zählen", 6, 12)]
    assert console.file.getvalue().count("half of größe [b]x[/b] is done") == 1
    with progress(console, "later") as show:
        show("6 of 12", 6, 12)
    assert len(heard) == 2


def test_a_pipe_gets_a_sign_of_life_whatever_happens(monkeypatch):
    """A line after 10 seconds and then one every 30 seconds; a line that was due counts."""
    monkeypatch.setattr(module, "FIRST_SIGN", 0.05)
    monkeypatch.setattr(module, "NEXT_SIGN", 0.2)
    pipe = make_console(file=io.StringIO(), width=400)
    with progress(pipe, "lesen") as show:
        wait_until(lambda: "lesen 0s so far" in pipe.file.getvalue())
        show(["7 of 9", "größe"], 7, 9)
        wait_until(lambda: "lesen 7 of 9 · 0s so far · größe" in pipe.file.getvalue())
        before = time.monotonic()
        show(["8 of 9"], is_due=True)
        count = pipe.file.getvalue().count("\n")
        wait_until(lambda: pipe.file.getvalue().count("\n") > count)
        assert time.monotonic() - before >= 0.2
    lines = pipe.file.getvalue()
    time.sleep(0.3)
    assert pipe.file.getvalue() == lines, "it has ended"


def wait_until(is_so) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_line_keeps_its_first_words():
    """Step, bar and time left vanished behind metrics in a window of 80 columns."""
    words = ["123/2300", "3m05s left", "loss 2.125", "preference accuracy 0.65", "reward margin 0.3", "120 tok/s"]
    assert fit_words(words, 80) == "123/2300 · 3m05s left · loss 2.125 · preference accuracy 0.65"
    assert fit_words(words, 24) == "123/2300 · 3m05s left" and fit_words(words, 7) == "123/..."
    assert fit_words([], 80) == ""
    lines = lines_of_words(["dpo 6/10", *words], 40)
    assert max(map(len, lines)) <= 40 and " ".join(" ".join(lines).split()).replace(" · ", " ") == " ".join(
        ["dpo 6/10", *words]
    )
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress(console, "pretrain", clock=False) as show:
        show(words, 123, 2300)
    assert "123/2300 · 3m05s left · loss 2.125" in console.file.getvalue()


@pytest.mark.parametrize("in_a_thread", [True, False])
def test_a_closed_pipe_is_an_error_of_its_own(monkeypatch, in_a_thread):
    """rich raises SystemExit(1); the status of a closed pipe is 141. The thread's error comes out of the main one."""
    monkeypatch.setattr(module, "FIRST_SIGN", 0.01 if in_a_thread else 60)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file, pytest.raises(BrokenPipeError):  # noqa: PT012
        console = make_console(file=file)
        with progress(console, "lesen") as show:
            if in_a_thread:
                wait_until(lambda: console.quiet)
            else:
                show("größe", is_due=True)
    called = []
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        console = make_console(file=file)
        with closed_pipe_calls(console, lambda: called.append(1)):
            console.print("one")
            console.print("two")
    assert called == [1]


def test_only_the_main_process_prints(capsys):
    make_console(is_main=False).print("from another process")
    make_console(stderr=True).print("a notice")
    make_console().print("from the main one")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("from the main one\n", "a notice\n")
