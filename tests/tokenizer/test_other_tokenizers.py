"""Tokenizers of others, kept as they are: the same ids and texts as in transformers, and no text that becomes a control
token."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import pytest
import transformers

from tests.tokenizer.other_tokenizers import MADE, write_tokenizer
from tinylm.tokenizer.tokenizer import StreamDecoder, Tokenizer

SENTENCEPIECE = ("llama2", "mistral", "always", "never_no_bos")


@pytest.fixture(scope="module", params=MADE)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(request.param, tmp_path_factory.mktemp("theirs") / request.param)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(folder)


def names_in(text: str, tokenizer: Tokenizer) -> bool:
    return any(name in text for name in tokenizer.added_ids)


def test_plain_text_has_their_ids(ours, theirs, torture: list[str]) -> None:
    random.seed(0)
    texts = [*torture, *("".join(random.choices("ab ▁<0x>é中\n\t's1", k=12)) for _ in range(200))]
    for text in texts:
        if not names_in(text, ours):
            assert [*ours.text_start, *ours.encode(text)] == theirs(text)["input_ids"], repr(text[:80])


def test_the_worlds_texts_have_their_ids(ours, theirs, world_texts: list[str]) -> None:
    for text in world_texts[::3]:
        if not names_in(text, ours):
            assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], repr(text[:80])


def test_decoding_is_theirs_and_streams(ours, theirs, torture: list[str]) -> None:
    for text in torture:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text[:80])
        stream = StreamDecoder(ours)
        assert "".join([*map(stream.feed, ids), stream.flush()]) == ours.decode(ids)
        ids = [*ours.text_start, *ids, ours.eos_id]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text[:80])


def test_a_text_comes_back(ours, folder: Path, torture: list[str]) -> None:
    """Where theirs keeps it: Metaspace takes a blank at the start for its own, and ▁ is a blank."""
    is_nfc, is_metaspace = folder.name == "qwen", folder.name in ("mistral", "always")
    for text in torture:
        if not is_nfc and not (is_metaspace and text.startswith(" ")):
            assert ours.decode(ours.encode(text)) == text


def test_roles_are_theirs(ours, theirs) -> None:
    assert ours.vocab_size == len(theirs)
    assert ours.eos_id == theirs.eos_token_id
    if theirs.bos_token_id is not None:
        assert ours.bos_id == theirs.bos_token_id
    if theirs.pad_token_id is not None:
        assert ours.pad_id == theirs.pad_token_id
    assert ours.special_ids >= {theirs.eos_token_id}


def test_text_never_becomes_a_control_token(ours) -> None:
    """Nor any other added token: only a template may write those."""
    forbidden = {*ours.special_ids, *ours.added_ids.values()}
    for name in ours.added_ids:
        for text in (name, f" {name}", f"a{name}b", f"{name}{name}", f"\n{name}\n"):
            assert forbidden.isdisjoint(ours.encode(text)), text
            assert forbidden.isdisjoint(ours.encode_within([text])[0]), text


def test_a_saved_tokenizer_is_still_theirs(ours, theirs, tmp_path: Path, torture: list[str]) -> None:
    ours.save(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in torture:
        assert again(text)["input_ids"] == theirs(text)["input_ids"]
    assert again.special_tokens_map == theirs.special_tokens_map
    for other in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(ours))):
        assert other == ours and other.text_start == ours.text_start and other.eos_id == ours.eos_id
        added = {"chat_template", "model_input_names"}
        assert other.settings.config.keys() - added == ours.settings.config.keys() - added
    assert set(again("The dog")) == {"input_ids", "attention_mask"}, "what the model takes, in transformers 4 too"


@pytest.mark.parametrize("name", ["mistral", "llama2"])
def test_text_after_a_control_token_is_theirs(tmp_path: Path, name: str) -> None:
    """Metaspace's "first" adds a blank at the start of the whole text only; the older normaliser adds them all."""
    write_tokenizer(name, tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs("The dog</s>The fox", add_special_tokens=False)["input_ids"]
    assert [*ours.encode("The dog"), ours.eos_id, *ours.encode_within(["The fox"])[0]] == expected


def test_an_end_that_is_not_an_added_token_is_still_a_control_token(tmp_path: Path) -> None:
    """With `ignore_merges` a piece that is an entry is taken whole: the text "</s>" was the token that ends a text."""
    write_tokenizer("never_no_bos", tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["added_tokens"] = []
    definition["model"]["ignore_merges"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    ours = Tokenizer.load(tmp_path)
    assert ours.eos_id == 2 and {1, 2} <= ours.special_ids
    assert {1, 2}.isdisjoint([*ours.encode("</s>"), *ours.encode("<s>")])
    assert ours.decode([2, *ours.encode("a")]) == "a"


def test_a_role_may_be_an_object_and_a_token_to_pad_with_may_be_missing(tmp_path: Path) -> None:
    """As in folders of transformers 4. It adds a pad_token that does not exist; ours pads with the end of a text."""
    role = {"__type": "AddedToken", "content": "</s>", "lstrip": False}
    ours = Tokenizer.load(write_tokenizer("mistral", tmp_path, eos_token=role, pad_token="[PAD]"))
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.text_start) == (1, 2, 2, [1])


def broken(change: str, folder: Path) -> None:
    write_tokenizer("mistral", folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    exec(change, {"d": definition})
    (folder / "tokenizer.json").write_text(json.dumps(definition))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("del d['model']['vocab']['<0x7F>']", "no <0x7F>; expected all 256 byte tokens"),
        ("d['pre_tokenizer']['replacement'] = '_'", "cannot use the Metaspace '_'"),
        ("d['normalizer'] = {'type': 'Prepend', 'prepend': 'x' * 99}", "cannot use the normalizer"),
        ("d['normalizer'] = {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 'aa'}", "cannot use the normal"),
        ("d['normalizer'] = {'type': 'Precompiled', 'precompiled_charsmap': ''}", "cannot use the normalizer 'Precomp"),
        ("d['model']['type'] = 'Unigram'", "model type is 'Unigram'; expected BPE"),
        ("d['model']['vocab'] |= {'</': 900}; d['model']['merges'].append(['</', 's>'])", "not in the vocabulary"),
        (
            "d['model']['vocab'] |= {'</': 900, 's>': 901}; d['model']['merges'].append(['</', 's>'])",
            "makes a control token of plain text",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_in_one_line(tmp_path: Path, change: str, message: str) -> None:
    broken(change, tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_megabyte_without_a_split_takes_seconds(tmp_path: Path) -> None:
    """SentencePiece's kind has no pre-tokenizer: the whole text is one piece."""
    tokenizer = Tokenizer.load(write_tokenizer("mistral", tmp_path))
    text = "The lazy dog, " * 70_000
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
