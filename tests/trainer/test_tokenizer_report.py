"""How well a tokenizer fits a text is reported by language or file, while it is trained and for any that exists."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.command_line import tinylm
from tinylm.model.config import TinyLMConfig
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer import tokenizer_report, tokenizer_text
from tinylm.trainer.tokenizer_report import count_tokens, embedding_facts, measure

GERMAN = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.\n"
RUSSIAN = "Съешь же ещё этих мягких французских булок, да выпей чаю.\n"
HINDI = "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश करने वाले।\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a text file and rows of three languages, one of them without a name."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text(GERMAN * 30, encoding="utf-8")
    rows = [{"text": RUSSIAN, "language": "ru", "source": "x"}, {"text": HINDI, "language": "hi"}, {"text": GERMAN}]
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 20), encoding="utf-8")
    return folder


def expected(name: str, text: str, tokenizer: Tokenizer, is_held_out: bool | None = None) -> dict[str, object]:
    tokens, default_tokens, size = (
        len(tokenizer.encode(text)),
        len(Tokenizer.default().encode(text)),
        len(text.encode()),
    )
    return {
        "name": name, "bytes": size, "characters": len(text), "tokens": tokens, "default_tokens": default_tokens,
        "bytes_per_token": round(size / tokens, 4), "characters_per_token": round(len(text) / tokens, 4),
        "default_bytes_per_token": round(size / default_tokens, 4),
        **({} if is_held_out is None else {"is_held_out": is_held_out}),
    }  # fmt: skip


def test_a_tokenizer_that_exists_is_measured_by_language(data: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([GERMAN + RUSSIAN], 320)
    tokenizer.save(tmp_path / "tok")
    words = ["tokenizer", "--tokenizer_path", tmp_path / "tok", "--data_path", data, "--output", tmp_path / "r.json"]
    status, said = tinylm(*words)
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert status == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["data", "r.json", "tok"], said
    assert report["parts"] == [
        expected("hi", HINDI * 20, tokenizer),
        expected("ru", RUSSIAN * 20, tokenizer),
        expected(str(data / "a.txt"), GERMAN * 30, tokenizer),
        expected(str(data / "b.jsonl"), GERMAN * 20, tokenizer),
    ]
    whole = report["all"]
    assert whole == expected("all", HINDI * 20 + RUSSIAN * 20 + GERMAN * 50, tokenizer)
    assert (report["fingerprint"], report["vocab_size"]) == (tokenizer.fingerprint, 320)
    assert f"bytes per token       {whole['bytes_per_token']:.2f}, on " in said
    assert f"default tokenizer     {whole['default_bytes_per_token']:.2f} bytes per token" in said
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in said.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["hi"][-3:]] == [
        f"{report['parts'][0][rate]:.2f}"
        for rate in ("bytes_per_token", "characters_per_token", "default_bytes_per_token")
    ]
    assert "fields that training does not use: source (20)" in said, "but the language is used"


def test_parts_by_another_field(data: Path, tmp_path: Path) -> None:
    Tokenizer.default().save(tmp_path / "tok")
    words = ["tokenizer", "--tokenizer_path", tmp_path / "tok", "--data_path", data, "--output", tmp_path / "r.json"]
    for field, names, note in (
        ("source", {"x", str(data / "a.txt"), str(data / "b.jsonl")}, False),
        ("nosuch", {str(data / "a.txt"), str(data / "b.jsonl")}, True),
    ):
        status, said = tinylm(*words, "--report_by", field)
        report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
        assert status == 0 and {part["name"] for part in report["parts"]} == names
        assert (f"no record has a text in the field {field}: the parts are the files" in said) == note
        assert all(part["tokens"] == part["default_tokens"] for part in report["parts"])


def test_training_reports_what_is_held_out_of_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file too short for that is measured on itself, which is said; the sum is of what is held out."""
    monkeypatch.setattr(tokenizer_text, "SECTION_CHARACTERS", 40)
    texts = {"a.txt": GERMAN * 120, "b.txt": RUSSIAN * 90, "c.txt": HINDI * 3}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    words = ["--data_path", tmp_path / "*.txt", "--vocab_size", "340", "--output", tmp_path / "r.json"]
    status, said = tinylm("tokenizer", *words, "--output_dir", tmp_path / "tok")
    assert status == 0, said
    tokenizer = Tokenizer.load(tmp_path / "tok")
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    parts = {Path(part["name"]).name: {**part, "name": ""} for part in report["parts"]}
    assert parts == {
        "a.txt": expected("", GERMAN, tokenizer, True),
        "b.txt": expected("", RUSSIAN, tokenizer, True),
        "c.txt": expected("", HINDI * 3, tokenizer, False),
    }
    assert report["all"] == expected("all", GERMAN + RUSSIAN, tokenizer, True)
    assert said.count("*") == 2 and "c.txt* │" in said and "* measured on text that the tokenizer learned from" in said


def test_only_the_largest_parts_have_a_row(tmp_path: Path) -> None:
    """The others share one, and the file has all."""
    rng, languages = random.Random(0), [f"{number:02}" for number in range(1, 31)]
    rows = [{"text": "ж" * int(language), "language": language} for language in languages]
    rng.shuffle(rows)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Tokenizer.default().save(tmp_path / "tok")
    words = ["--tokenizer_path", tmp_path / "tok", "--data_path", tmp_path / "a.jsonl", "--output", tmp_path / "r.json"]
    status, said = tinylm("tokenizer", *words)
    rows_shown = [line.split("│")[1:3] for line in said.splitlines() if "│" in line]
    assert status == 0 and [name.strip() for name, _ in rows_shown] == [*languages[:9:-1], "10 more"]
    assert rows_shown[-1][1].strip() == str(2 * sum(range(1, 11)))
    assert len(json.loads((tmp_path / "r.json").read_text())["parts"]) == 30


def test_many_parts_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_text, "MAX_PARTS", 3)
    reader = tokenizer_text.TextReader(10**9, holds_out=True)
    assert len(list(reader.to_learn_from((str(number % 7), "ä") for number in range(21)))) == 21
    assert list(reader.parts) == ["0", "1", "2", "(others)"] and len(reader.parts["(others)"].learnt) == 12


def test_texts_are_counted_whole_and_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer whose safe cuts are unknown gets the text as it is."""
    monkeypatch.setattr(tokenizer_report, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr(tokenizer_report, "SECTION_CHARACTERS", 10)
    tokenizer, texts = Tokenizer.default(), [GERMAN * 3, "", RUSSIAN, "a\n\n\nb\n \nc\n" * 9]
    for cuts in (tokenizer.safe_cuts, None):
        tokenizer.safe_cuts = cuts
        assert count_tokens(tokenizer, texts) == [len(tokenizer.encode(text)) for text in texts]
    (part,) = measure([("a", text) for text in texts], tokenizer)
    assert part.num_tokens == sum(len(tokenizer.encode(text)) for text in texts)
    assert part.num_characters == sum(map(len, texts))


def test_the_weights_of_the_embedding() -> None:
    """Of a large vocabulary in a small model, most weights are in its table."""
    words, is_most = embedding_facts(6400)
    assert "small 3.28M of 25.8M (13%)" in words and not is_most
    words, is_most = embedding_facts(128_000)
    config = TinyLMConfig.preset("small", vocab_size=128_000)
    share = 128_000 * 512 / config.num_parameters()
    assert f"small 65.5M of 88.1M ({share:.0%})" in words and "large 98.3M of" in words and "tiny 32.8M of" in words
    assert is_most


def test_on_tinyworld(tmp_path: Path) -> None:
    Tokenizer.default().save(tmp_path / "tok")
    status, said = tinylm("tokenizer", "--tokenizer_path", tmp_path / "tok")
    assert status == 0 and "measuring on held-out text of TinyWorld" in said and "│" not in said, said
