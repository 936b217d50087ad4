"""Control tokens that are spelt in a text are letters, or these tokens if the user asks for it."""

from __future__ import annotations

import pickle

import numpy as np

from tinylm.dataset.pretrain_dataset import PretrainDataset
from tinylm.dataset.shards.shard_cache import cached_token_shards
from tinylm.dataset.shards.token_shards import tokenize_texts
from tinylm.dataset.sources.records import BadRows
from tinylm.tokenizer.control_tokens import ControlTokenReader
from tinylm.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer

TOKENIZER = Tokenizer.train(["Zwölf Boxkämpfer jagen Viktor. "], vocab_size=280)
READER = ControlTokenReader(TOKENIZER)
QUESTION = "<|im_start|>Zwölf?<|im_end|>\n"


def test_each_control_token_becomes_its_id() -> None:
    text = "".join(f"ä{name}" for name in SPECIAL_TOKENS)
    (ids,) = READER.encode_batch([text])
    assert ids == [token for number in range(len(SPECIAL_TOKENS)) for token in (*TOKENIZER.encode("ä"), number)]
    assert READER.encode_batch(["", "<|im_end|>", "a<|im_end>b"]) == [[], [2], TOKENIZER.encode("a<|im_end>b")]


def test_the_plain_tokenizer_reads_letters() -> None:
    assert not TOKENIZER.special_ids & set(TOKENIZER.encode(QUESTION))


def test_a_reader_goes_to_worker_processes_and_has_a_cache_of_its_own() -> None:
    copy = pickle.loads(pickle.dumps(READER))
    assert copy.encode_batch([QUESTION]) == READER.encode_batch([QUESTION])
    assert copy.fingerprint == READER.fingerprint != TOKENIZER.fingerprint


def test_the_end_of_a_document_in_a_text_ends_it() -> None:
    texts = ["<|endoftext|>ab<|endoftext|>c", "d<|endoftext|>", "e"]
    corpus = tokenize_texts(texts, READER)
    documents = [corpus.tokens[a:b].tolist() for a, b in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)]
    plain = [[*TOKENIZER.encode(text), 0] for text in ("", "ab", "c", "d", "e")]
    assert documents == plain
    data = PretrainDataset(corpus, READER, 16)
    batch = data.collate([data.row(index) for index in range(len(data))])
    assert batch.count == sum(len(document) for document in documents if len(document) > 1), "each begins with one, too"
    assert data.num_bytes == 5


def test_documents_of_one_token_are_not_held_out() -> None:
    data = PretrainDataset.from_texts(["ein längerer Text"] + ["<|endoftext|>"] * 8, READER, 16)
    train, held = data.split(0.3, seed=1)
    assert held is None and train is data


def test_files_are_read_either_way(tmp_path) -> None:
    (tmp_path / "a.txt").write_text(QUESTION * 3)
    found = {}
    for tokenizer in (TOKENIZER, READER):
        for _ in range(2):  # the second time from the cache
            bad_rows = BadRows()
            corpus = cached_token_shards(str(tmp_path / "a.txt"), tokenizer, tmp_path / "cache", bad_rows)
            found[tokenizer.fingerprint] = np.isin(corpus.tokens, (1, 2)).sum()
            assert bad_rows.remarks("said") == [
                "control tokens spelt in the text: <|im_start|> (3), <|im_end|> (3); said"
            ]
    assert found == {TOKENIZER.fingerprint: 0, READER.fingerprint: 6}
