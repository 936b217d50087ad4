"""The Tokenizer: round trips, control tokens, files, the library and transformers as references."""

from __future__ import annotations

import copy
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.tokenizer.bpe import BYTE_TO_CHARACTER, BytePairEncoding
from tinylm.tokenizer.chat_template import CHAT_TEMPLATE
from tinylm.tokenizer.split_patterns import SPLIT_PATTERN
from tinylm.tokenizer.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer
from tinylm.tokenizer.tokenizer_json import definition_from_bpe, fingerprint_of

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def library(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer.definition))


def test_default_is_what_the_design_says(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 6400
    assert (tokenizer.endoftext_id, tokenizer.im_start_id, tokenizer.im_end_id) == (0, 1, 2)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.special_ids == frozenset(range(16))
    assert [tokenizer.token_bytes(i).decode() for i in range(16)] == list(SPECIAL_TOKENS)
    assert SPECIAL_TOKENS[:4] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>")
    assert tokenizer.definition["normalizer"] is None
    assert tokenizer.definition["pre_tokenizer"] == {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": SPLIT_PATTERN},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }


def test_default_readme_names_the_committed_tokenizer(tokenizer: Tokenizer) -> None:
    readme = Path(sys.modules[Tokenizer.__module__].__file__ or "").parent / "default" / "README.md"
    assert tokenizer.fingerprint in readme.read_text(encoding="utf-8")


def test_default_encodes_english_code_and_chinese_compactly(tokenizer: Tokenizer) -> None:
    """Lower bounds, well below the README's numbers; a tokenizer without merges has 1 byte per token."""
    for text, floor in [
        ("Once upon a time there was an old man who lived with his wife by the sea.", 3.5),
        ("for index in range(len(self.values)):\n        return self.values[index]\n", 3.0),
        ("我们使用深度学习模型来训练神经网络。", 2.5),
    ]:
        assert len(text.encode()) / len(tokenizer.encode(text)) > floor


def test_round_trip(tokenizer: Tokenizer, torture: list[str]) -> None:
    for text in torture:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_of_the_worlds_texts(tokenizer: Tokenizer, world_texts: list[str]) -> None:
    for text, ids in zip(world_texts, tokenizer.encode_batch(world_texts), strict=True):
        assert tokenizer.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
def test_round_trip_of_anything(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(16 <= token_id < tokenizer.vocab_size for token_id in ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(SPECIAL_TOKENS), st.text(max_size=3).filter(str.isascii)), max_size=8))
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(range(16))
    assert tokenizer.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 6399), max_size=30), skip=st.booleans())
def test_decodes_any_ids_as_the_library(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, ids: list[int], skip: bool
) -> None:
    assert tokenizer.decode(ids, skip_special_tokens=skip) == library.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 6399), max_size=30), skip=st.booleans())
def test_streaming_never_breaks_a_character(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    decoder = StreamDecoder(tokenizer, skip_special_tokens=skip)
    assert "".join([*map(decoder.feed, ids), decoder.flush()]) == tokenizer.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_streamed_text_is_exact_at_every_step(tokenizer: Tokenizer, text: str) -> None:
    """Text made of whole characters never shows U+FFFD, and lags by at most one character."""
    decoder, shown, seen = StreamDecoder(tokenizer), "", b""
    for token_id in tokenizer.encode(text):
        shown += decoder.feed(token_id)
        seen += tokenizer.token_bytes(token_id)
        assert text.startswith(shown)
        assert 0 <= len(seen) - len(shown.encode()) < 4
    assert (shown, decoder.flush()) == (text, "")


def test_streaming_holds_back_half_an_emoji(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦔")
    assert len(ids) > 1
    decoder = StreamDecoder(tokenizer)
    assert [decoder.feed(token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["🦔"]
    decoder.feed(ids[0])
    assert decoder.flush() == "\ufffd"
    assert decoder.feed(tokenizer.encode("a")[0]) == "a"


def test_lone_surrogates_and_other_types_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"U\+DC80 at character 1 of text 0"):
        tokenizer.encode("a\udc80b")
    with pytest.raises(ValueError, match="text 1 is a NoneType"):
        tokenizer.encode_batch(["a", None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="U\\+D800"):
        Tokenizer.train(["\ud800"], 300)
    for bad_id in (-1, 6400):
        with pytest.raises(ValueError, match="ids 0 to 6399"):
            tokenizer.decode([bad_id])


def test_training(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    text = "".join(random.Random(0).choices("abcde ", k=5000))
    tokenizer = Tokenizer.train(iter([text, text]), 400, progress=lambda done, total: seen.append((done, total)))
    assert tokenizer.vocab_size == 400
    assert seen == [(done, 128) for done in range(1, 129)]
    assert Tokenizer.train([text, text], 400) == tokenizer
    assert Tokenizer.train([text], 401) != tokenizer
    assert Tokenizer.train(["ab"], 300).vocab_size == 273
    for texts, size, message in [([], 300, "no text"), ([""], 300, "no text"), (["a"], 271, "272")]:
        with pytest.raises(ValueError, match=message):
            Tokenizer.train(texts, size)


def test_save_load_pickle(tmp_path: Path, tokenizer: Tokenizer, torture: list[str]) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    for other in (
        Tokenizer.load(folder),
        Tokenizer.load(str(folder / "tokenizer.json")),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert other == tokenizer and hash(other) == hash(tokenizer)
        assert other.encode_batch(torture) == tokenizer.encode_batch(torture)
    committed = Path(sys.modules[Tokenizer.__module__].__file__ or "").parent / "default"
    for path in folder.iterdir():
        assert path.read_bytes() == (committed / path.name).read_bytes()


def test_encoding_does_not_need_torch() -> None:
    code = (
        "import sys; from tinylm.tokenizer.tokenizer import Tokenizer; "
        "Tokenizer.default().encode('a'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3"])
def test_transformers_loads_the_folder(
    tmp_path: Path, tokenizer: Tokenizer, torture: list[str], model_type: str | None
) -> None:
    """Also next to a config.json: its model_type could make transformers use that model's own tokenizer."""
    tokenizer.save(tmp_path)
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert theirs.unk_token is None
    for text in torture:
        if not any(name in text for name in SPECIAL_TOKENS):
            ids = theirs(text)["input_ids"]
            assert ids == tokenizer.encode(text), repr(text[:80])
            assert theirs.decode(ids) == text
    ids = [1, *tokenizer.encode("user\nHello , you !"), 2, 0]
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert theirs.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)
    theirs.save_pretrained(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again") == tokenizer


def small_definition() -> dict[str, Any]:
    """A tokenizer with two merges, `ab` and `abc`."""
    return definition_from_bpe(BytePairEncoding([(64, 65), (256, 66)]), SPECIAL_TOKENS)


def test_fingerprint_ignores_the_spelling_and_sees_the_content() -> None:
    definition = small_definition()
    fingerprint = fingerprint_of(definition)
    assert len(fingerprint) == 16 and int(fingerprint, 16) >= 0
    respelled = json.loads(json.dumps(definition))
    respelled["model"]["merges"] = [merge.split(" ") for merge in respelled["model"]["merges"]]
    respelled["truncation"] = {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    assert fingerprint_of(respelled) == fingerprint
    assert len(Tokenizer(respelled).encode("a" * 20)) == 20  # and the truncation is ignored
    dropout = {**definition, "model": {**definition["model"], "dropout": 1.0}}  # would merge nothing
    assert len(Tokenizer(dropout).encode("abc")) < 3
    respelled["model"]["merges"].pop()
    assert fingerprint_of(respelled) != fingerprint


def test_loads_other_byte_level_tokenizers(torture: list[str]) -> None:
    """GPT-2's shape (one special token, the split inside ByteLevel) and Llama 3's (its own names, a
    post-processor)."""
    gpt2 = small_definition()
    gpt2["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    for name in SPECIAL_TOKENS:
        del gpt2["model"]["vocab"][name]
    gpt2["added_tokens"] = [{**gpt2["added_tokens"][0], "id": 5000}]
    tokenizer = Tokenizer(gpt2)
    assert tokenizer.endoftext_id == tokenizer.eos_id == tokenizer.bos_id == 5000
    assert tokenizer.vocab_size == 5001 and not tokenizer.has_chat_tokens
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in torture)
    assert tokenizer.decode([5000, 4999, 16 + 64]) == tokenizer.decode([16 + 64])

    llama = json.loads(json.dumps(gpt2))
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<extra> é"]
    llama["added_tokens"] = [
        {**gpt2["added_tokens"][0], "id": 300 + number, "content": name, "special": number < 3}
        for number, name in enumerate(names)
    ]
    llama["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {
            "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [300], "tokens": ["<|begin_of_text|>"]}
        },
    }
    tokenizer = Tokenizer(llama)
    assert (tokenizer.bos_id, tokenizer.endoftext_id, tokenizer.eos_id) == (300, 301, 302)
    assert max(tokenizer.encode("a<|eot_id|>b<extra> é")) < 300
    assert tokenizer.decode([300, 303, 302]) == "<extra> é"


def broken(change: str) -> Any:
    definition = small_definition()
    exec(change, {"d": definition})
    return definition


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("del d['model']", "no `model`"),
        ("d['model'] = []", "no `model`"),
        ("d['model']['type'] = 'Unigram'", "Unigram"),
        ("d['model']['vocab'] = ['a']", "wrong type"),
        ("d['model']['vocab']['a'] = 'x'", "token id 'x'"),
        ("d['model']['vocab']['a'] = True", "token id True"),
        ("d['model']['vocab']['a'] = -1", "token id -1"),
        ("d['model']['vocab']['a'] = 1 << 40", "token id 1099511627776"),
        ("d['model']['vocab']['new'] = 20", "two tokens have id 20"),
        ("d['added_tokens'][0]['id'] = 1", "two tokens have id 1"),
        ("d['added_tokens'].append('x')", "an added token is 'x'"),
        ("d['added_tokens'] = None", "wrong type"),
        ("del d['model']['vocab']['a']", "not in the vocabulary"),
        ("d['model']['merges'] = []; del d['model']['vocab']['Z']", "byte 0x5a has no token"),
        ("d['model']['merges'].append('a')", "merge 'a'"),
        ("d['model']['merges'].append(['a', 1])", "a pair of tokens"),
        ("d['model']['merges'].append(['a', 'nowhere'])", "not in the vocabulary"),
        ("d['pre_tokenizer'] = None", "not a byte-level"),
        ("d['pre_tokenizer']['pretokenizers'][0]['pattern']['Regex'] = '('", "cannot use"),
        ("d['pre_tokenizer']['type'] = 'Unheard'", "cannot use"),
        ("d['model']['vocab']['\\ud800'] = 5000", "."),
        (
            "d['added_tokens'] = []; [d['model']['vocab'].pop(n) for n in list(d['model']['vocab'])[:16]]",
            "no token marks",
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(broken(change)))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'"text"'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json") as error:
        Tokenizer.load(path)
    assert "\n" not in str(error.value)


def test_a_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match="1073741824 bytes"):
        Tokenizer.load(tmp_path)


def test_a_control_character_may_have_no_token(tokenizer: Tokenizer) -> None:
    """SmolLM2 has no token for 21 bytes; these characters have no ids there. A letter's byte must have one."""
    definition = copy.deepcopy(tokenizer.definition)
    del definition["model"]["vocab"][BYTE_TO_CHARACTER[4]]
    assert Tokenizer(definition).encode("a\x04b") == [*tokenizer.encode("a"), *tokenizer.encode("b")]
