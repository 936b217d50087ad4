"""The terminal: facts that can be copied, and progress that is a bar for people and nothing for a pipe."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tinylm.commandline.terminal import format_count, format_seconds, make_console, print_facts, progress


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


def test_progress_is_silent_in_a_pipe_and_beside_the_main_process():
    pipe = Console(file=io.StringIO())
    with progress(pipe, "tokenising") as show:
        show("3 of 12", 3, 12)
    quiet = terminal(quiet=True)
    with progress(quiet, "tokenising") as show:
        show("3 of 12")
    assert pipe.file.getvalue() == quiet.file.getvalue() == ""


def test_only_the_main_process_prints(capsys):
    make_console(is_main=False).print("from another process")
    make_console(stderr=True).print("a notice")
    make_console().print("from the main one")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("from the main one\n", "a notice\n")
