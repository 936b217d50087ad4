"""What a tokenizer learns from is counted, and it is measured on text that it has not seen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.command_line import tinylm
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer import tokenizer_text
from tinylm.trainer.tokenizer_text import TextReader, tinyworld_texts

TEXT = "".join(f"Zeile {number}: das kleine Boot fährt über die See 船.\n" for number in range(400))


def named(*texts: str) -> list[tuple[str, str]]:
    """Texts of one file."""
    return [("a.txt", text) for text in texts]


@pytest.fixture
def short_sections(monkeypatch) -> None:
    monkeypatch.setattr(tokenizer_text, "SECTION_CHARACTERS", 40)


def test_a_hundredth_is_held_out_and_the_rest_is_all_there(short_sections) -> None:
    reader = TextReader(10**9, holds_out=True)
    learnt = list(reader.to_learn_from(named(TEXT, "More.\n", TEXT)))
    held_out = reader.parts["a.txt"].held_out
    assert len(held_out) == 8 and len(learnt) == 793
    assert held_out[0].startswith("Zeile 49:")
    assert sorted("".join(learnt + held_out)) == sorted(TEXT + "More.\n" + TEXT)
    assert (reader.num_texts, reader.num_bytes) == (3, 2 * len(TEXT.encode()) + 6)


def test_no_more_is_held_out_than_needed(short_sections, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer_text, "MOST_HELD_OUT", 3)
    reader = TextReader(10**9, holds_out=True)
    assert len(list(reader.to_learn_from(named(*[TEXT] * 5)))) == 5 * 400 - 3
    assert len(reader.parts["a.txt"].held_out) == 3


def test_a_short_text_is_learnt_whole(short_sections) -> None:
    reader = TextReader(10**9, holds_out=True)
    assert "".join(reader.to_learn_from(named("äöü\n" * 400))) == "äöü\n" * 400
    assert reader.words() == "2,800 bytes in 1 text" and not reader.parts["a.txt"].held_out
    assert "".join(text for _, text in reader.to_measure()) == "äöü\n" * 400


def test_reading_ends_after_the_text_that_reaches_the_limit() -> None:
    """And it is said that there is more, if there is."""
    for texts, stopped in ((["äb", "cd", "e"], True), (["äb", "cd"], False)):
        reader = TextReader(5, holds_out=False)
        assert list(reader.to_learn_from(named(*texts))) == ["äb", "cd"]
        assert (reader.num_bytes, reader.stopped) == (5, stopped)
        assert ("there is more: --max_bytes" in reader.words()) == stopped


def test_a_lone_surrogate_is_still_refused_by_name() -> None:
    """Counting must not fail first."""
    with pytest.raises(ValueError, match="surrogate"):
        Tokenizer.train(TextReader(99, holds_out=True).to_learn_from(named("a\ud800b")))


def test_the_command_says_what_it_read(tmp_path: Path, monkeypatch, short_sections) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "more.txt").write_text(TEXT, encoding="utf-8")
    words = ["tokenizer", "--vocab_size", "300", "--output_dir", tmp_path / "out"]
    status, said = tinylm(*words, "--data_path", tmp_path / "*.txt", "--max_bytes", "20")
    size = len(TEXT.encode())
    assert status == 0 and f"{size:,} bytes in 1 text (there is more: --max_bytes)" in said, said
    (found,) = re.findall(r"bytes per token +([\d.]+), on (\d+) bytes of held-out text", said)
    tokenizer = Tokenizer.load(tmp_path / "out")
    held = [f"Zeile {number}: das kleine Boot fährt über die See 船.\n" for number in range(49, 400, 100)]
    num_bytes = sum(len(text.encode()) for text in held)
    assert found == (f"{num_bytes / sum(len(tokenizer.encode(text)) for text in held):.2f}", str(num_bytes))


@pytest.mark.slow
def test_tinyworld_is_measured_on_its_test_split(tmp_path: Path) -> None:
    """Nothing of the training split is held out, so the tokenizer is as it was."""
    words = ["tokenizer", "--vocab_size", "300", "--output_dir", tmp_path, "--tinyworld_documents", "60"]
    status, said = tinylm(*words)
    assert status == 0 and "of held-out text" in said, said
    assert Tokenizer.load(tmp_path) == Tokenizer.train(tinyworld_texts(60), 300)
