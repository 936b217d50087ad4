"""Special tokens of a user's own: which names can be one, where they stand, and that they survive every road."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import transformers

from tests.command_line import tinylm
from tinylm.tokenizer.control_tokens import ControlTokenReader
from tinylm.tokenizer.own_tokens import check_own_tokens, read_own_tokens
from tinylm.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer

TEXT = "Größere Zwölf Boxkämpfer jagen Viktor 2024 über den Sylter Deich. 你好 привет <|fim|> [SEP] " * 4
OWN = ["<|fim|>", "<|lang:de|>", "[SEP]", "<|日本|>", "<ö>"]


@pytest.fixture(scope="module", params=["split", "grouped"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.train([TEXT], 330, digits=request.param, special_tokens=OWN)


def test_they_have_the_last_ids_and_change_no_other(tokenizer: Tokenizer) -> None:
    plain = Tokenizer.train([TEXT], 325, digits="split")
    assert tokenizer.vocab_size == 330 and tokenizer.own_tokens == tuple(OWN)
    assert [tokenizer.token_bytes(i).decode() for i in range(325, 330)] == OWN
    assert tokenizer.special_ids == {*range(16), *range(325, 330)}
    assert [tokenizer.token_bytes(i) for i in range(272)] == [plain.token_bytes(i) for i in range(272)]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert plain.own_tokens == () and plain.special_ids == frozenset(range(16))


def test_no_text_becomes_one(tokenizer: Tokenizer) -> None:
    for text in (*OWN, "".join(OWN), f"a{' '.join(OWN)}\n", TEXT):
        ids = tokenizer.encode(text)
        assert tokenizer.special_ids.isdisjoint(ids) and tokenizer.decode(ids) == text


def test_pretraining_text_may_be_read_with_them(tokenizer: Tokenizer) -> None:
    reader = ControlTokenReader(tokenizer)
    text = "für <|lang:de|>ä[SEP]<|fim|><|日本|><ö><|im_end|>[SEP"
    expected = [
        *tokenizer.encode("für "),
        326,
        *tokenizer.encode("ä"),
        327,
        325,
        328,
        329,
        2,
        *tokenizer.encode("[SEP"),
    ]
    assert reader.encode_batch([text]) == [expected]


def test_they_are_left_out_of_what_is_shown(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("Größe"), 325, 326, *tokenizer.encode(" 你好"), 2]
    assert tokenizer.decode(ids) == "Größe 你好"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "Größe<|fim|><|lang:de|> 你好<|im_end|>"


def test_they_survive_files_and_processes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "one")
    again = Tokenizer.load(tmp_path / "one")
    again.save(tmp_path / "two")
    for other in (again, Tokenizer.load(tmp_path / "two"), pickle.loads(pickle.dumps(tokenizer))):
        assert other == tokenizer and other.own_tokens == tuple(OWN) and other.special_ids == tokenizer.special_ids
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tmp_path / "two" / "tokenizer.json").read_bytes()


def test_transformers_knows_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """There, a text may spell them, as it may spell ours; `split_special_tokens` switches that off."""
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == 330 and set(OWN) <= set(theirs.all_special_tokens)
    assert theirs.convert_tokens_to_ids(OWN) == [*range(325, 330)]
    text = "für 12345 " + "ä".join(OWN)
    ids = theirs(text)["input_ids"]
    assert ids == ControlTokenReader(tokenizer).encode_batch([text])[0]
    assert theirs.decode(ids, skip_special_tokens=True) == "für 12345 ääää" == tokenizer.decode(ids)
    assert theirs(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)
    theirs.save_pretrained(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").own_tokens == tuple(OWN)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["<|a|>", "<|a|>"], "2 of 2 is '<|a|>', which was named before"),
        (["<|a|>", ""], "2 of 2 is '', which is empty"),
        ([" <|a|>"], "begins or ends with a blank"),
        (["<|a|>\u3000"], "begins or ends with a blank"),
        (["<|" + "ü" * 61 + "|>"], "has 65 characters; at most 64"),
        (["<|im_end|>"], "exists already"),
        (["<|reserved_6|>"], "exists already"),
        (["word"], "is not one name in < > or [ ]"),
        (["<|a b|>"], "is not one name in"),
        (["<a><b>"], "is not one name in"),
        (["<a]"], "is not one name in"),
        (["<[a]>"], "is not one name in"),
        (["<>"], "is not one name in"),
        (["<a\u200b>"], "is not one name in"),
        (["<a\ud800>"], "is not one name in"),
        (["<|>"], "neither a letter nor a digit"),
        (["[!?]"], "neither a letter nor a digit"),
    ],
)
def test_other_names_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Tokenizer.train([TEXT], 400, special_tokens=names)
    assert message in str(error.value) and "expected names such as <|fim|>" in str(error.value)
    assert "\n" not in str(error.value) and str(error.value).isprintable()


def test_a_name_that_spells_what_may_be_learnt_is_refused() -> None:
    """In a tokenizer.json, a token is written in byte characters: "<…>", which is one piece of a text, as "<âĢ¦>"."""
    learnt = Tokenizer.train(["<…> " * 50], 300)
    (token_id,) = learnt.encode("<…>")
    spelt = next(name for name, number in learnt.definition["model"]["vocab"].items() if number == token_id)
    assert spelt != "<…>"
    with pytest.raises(ValueError, match="neither a letter nor a digit"):
        check_own_tokens([spelt], SPECIAL_TOKENS)
    tokenizer = Tokenizer.train(["<é> <日> " * 50], 300, special_tokens=["<é>", "<日>", "<Ã©>"])
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("<é><日><Ã©>"))


def test_they_count_as_entries() -> None:
    assert Tokenizer.train([TEXT], 277, special_tokens=OWN).vocab_size == 277
    with pytest.raises(ValueError, match="vocab_size 276; expected 277"):
        Tokenizer.train([TEXT], 276, special_tokens=OWN)
    assert Tokenizer.train(["ab"], 300, special_tokens=OWN).own_tokens == tuple(OWN), "after the last merge"


def test_names_on_the_command_line_or_in_a_file(tmp_path: Path) -> None:
    assert read_own_tokens("<|a|>,[B]") == ("<|a|>", "[B]")
    assert read_own_tokens("[INST],[/INST]") == ("[INST]", "[/INST]")
    file = tmp_path / "names.txt"
    for content in ("<|a|>\n<|ö,1|>\n", "\ufeff<|a|>\r\n<|ö,1|>"):
        file.write_bytes(content.encode("utf-8"))
        assert read_own_tokens(str(file)) == ("<|a|>", "<|ö,1|>")
    for data, message in ((b"\xff\xfe<", "is not UTF-8"), (b" \n", "is empty"), (b"<|a|>\n" * 200_000, "at most")):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_own_tokens(str(file))
    for value in ("nosuch.txt", "", "a,b", "x" * 5000):
        with pytest.raises(ValueError, match="is neither a file nor a name in < > or"):
            read_own_tokens(value)


def test_the_command_makes_them_and_says_where_the_text_spells_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 9, encoding="utf-8")
    words = ["--data_path", tmp_path / "a.txt", "--vocab_size", "420", "--digits", "grouped"]
    status, said = tinylm("tokenizer", *words, "--special_tokens", ",".join(OWN), "--output_dir", tmp_path / "out")
    assert status == 0, said
    assert "control tokens spelt in the text: <|fim|> (36), [SEP] (36); they are learnt as letters" in said
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer == Tokenizer.train([TEXT * 9], 420, digits="grouped", special_tokens=OWN)
    assert len(tokenizer.encode("2024")) == 2
