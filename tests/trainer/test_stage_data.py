"""The files of a stage: what is said about them, and that one odd item does not end the run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.stage_files import write_stage_files
from tests.trainer.test_recipes import write_jsonl
from tinylm.system.runtime import setup_runtime
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer.run.stage import Stage
from tinylm.trainer.stage_data import load_chats, load_pairs, load_texts
from tinylm.trainer.train_dpo import DPOSettings
from tinylm.trainer.train_full_sft import FullSFTSettings
from tinylm.trainer.train_pretrain import PretrainSettings

TOKENIZER = Tokenizer.default()


def stage_of(settings: Any) -> tuple[Stage, io.StringIO]:
    heard = io.StringIO()
    return Stage("test", settings, setup_runtime("cpu"), Console(file=heard, width=400, highlight=False)), heard


def chat(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


def sft(tmp_path: Path, rows: list[dict], **settings: Any) -> tuple[Any, str]:
    path = write_jsonl(tmp_path / "chats.jsonl", rows)
    stage, heard = stage_of(
        FullSFTSettings(model_path="x", data_path=str(path), output_dir=str(tmp_path), max_seq_len=64, **settings)
    )
    return load_chats(stage, TOKENIZER, 1, stage.settings.replacements), heard.getvalue()


@pytest.mark.parametrize("seed", range(10))
def test_a_chat_that_does_not_fit_is_never_the_only_one_held_out(tmp_path: Path, seed: int) -> None:
    rows = [chat(f"Sag {number}", f"Es ist {number}.", id=number + 1) for number in range(9)] + [chat("Ä " * 400, "Ja")]
    (train, held), said = sft(tmp_path, rows, seed=seed)
    assert (len(train.documents), len(held.documents)) == (8, 1)
    assert said == (
        "fields that training does not use: id (9)\n10 chats: 1 had no answer that fits and were left out\n"
    )


def test_a_single_chat_is_learnt_without_validation_and_that_is_said(tmp_path: Path) -> None:
    (train, held), said = sft(tmp_path, [chat("Wer bist du?", "{{name}}.")], name="Ada")
    assert len(train) == 1 and held is None
    assert said == "no validation: only one of the chats can be learnt, so none is held out\n"
    assert sft(tmp_path, [chat("a", "b")], validation_fraction=0.0)[1] == ""


def test_validation_data_that_cannot_be_learnt_is_named(tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [chat("Ä " * 400, "Ja")])
    with pytest.raises(ValueError, match=r"held.jsonl: none of the 1 conversations has an answer that fits into 64"):
        sft(tmp_path, [chat("a", "b")], validation_path=str(held))


def test_a_place_without_a_text_names_its_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1: no text for {{ author }}; pass --author, or --author '{{ author }}'"):
        sft(tmp_path, [chat("Wer hat dich gemacht?", "{{ author }}")], name="Ada")


@pytest.mark.parametrize("seed", range(6))
def test_equal_answers_are_said_to_be_equal(tmp_path: Path, seed: int) -> None:
    rows = [{"prompt": "Hi", "chosen": "Hallo!", "rejected": word} for word in ("Geh.", "Weg.", "Hallo!")]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    stage, heard = stage_of(
        DPOSettings(model_path="x", data_path=str(path), output_dir=str(tmp_path), max_seq_len=64, seed=seed)
    )
    train, held = load_pairs(stage, TOKENIZER, 1)
    assert held is not None and (len(train), len(held)) == (1, 1)
    assert heard.getvalue() == "3 pairs: 1 had two equal answers and were left out\n"


def test_control_tokens_of_ones_own_are_said_too(tmp_path: Path) -> None:
    """In chats they are always letters; in running text they can be read."""
    tokenizer = Tokenizer.train(["Wie schläft man? "], 290, special_tokens=["<|müde|>", "[SEP]"])
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "<|müde|>Wie[SEP]<|im_end|>"}] * 30)
    chats = write_jsonl(tmp_path / "chats.jsonl", [chat("Wie [SEP]?", "So <|müde|> [SEP]")] * 30)
    for read, end in ((False, "learnt as letters; --read"), (True, "read as these tokens")):
        settings = {"data_path": str(texts), "output_dir": str(tmp_path), "max_seq_len": 16}
        stage, heard = stage_of(PretrainSettings(**settings, validation_fraction=0.1, read_control_tokens=read))
        train, _ = load_texts(stage, tokenizer, 1)
        assert (train.shards.tokens == tokenizer.added_ids["<|müde|>"]).sum() == (30 if read else 0)
        spelt = "<|müde|> (30), [SEP] (30), <|im_end|> (30)"
        assert f"control tokens spelt in the text: {spelt}; they are {end}" in heard.getvalue()
    settings = {"data_path": str(chats), "output_dir": str(tmp_path), "model_path": "x", "max_seq_len": 64}
    stage, heard = stage_of(FullSFTSettings(**settings))
    load_chats(stage, tokenizer, 1)
    assert "control tokens spelt in the text: [SEP] (60), <|müde|> (30); they are learnt" in heard.getvalue()


def test_control_tokens_in_a_text_are_said_and_can_be_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": "<|im_start|>Wie schläft man?<|im_end|>"}] * 30)
    counted = "control tokens spelt in the text: <|im_start|> (30), <|im_end|> (30); they are "
    ends = {
        False: "learnt as letters; --read_control_tokens reads them as control tokens\n",
        True: "read as these tokens\n",
    }
    for read in (False, True):
        settings = PretrainSettings(
            data_path=str(path),
            output_dir=str(tmp_path),
            max_seq_len=16,
            validation_fraction=0.1,
            read_control_tokens=read,
        )
        stage, heard = stage_of(settings)
        train, _ = load_texts(stage, TOKENIZER, 1)
        assert (train.shards.tokens == TOKENIZER.im_start_id).sum() == (30 if read else 0)
        assert heard.getvalue() == counted + ends[read]


def test_a_text_too_short_for_validation_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Ein kurzer Text.")
    settings = PretrainSettings(data_path=str(tmp_path / "a.txt"), output_dir=str(tmp_path), max_seq_len=64)
    stage, heard = stage_of(settings)
    train, held = load_texts(stage, TOKENIZER, 1)
    assert len(train) == 1 and held is None
    assert heard.getvalue() == "no validation: the text is too short to hold out a part\n"


def test_clean_data_is_loaded_without_a_word(tmp_path: Path) -> None:
    write_stage_files(tmp_path)
    for load, settings, name in (
        (load_chats, FullSFTSettings, "chats"),
        (load_pairs, DPOSettings, "pairs"),
    ):
        stage, heard = stage_of(
            settings(
                model_path="x", data_path=f"{tmp_path}/{name}.jsonl", output_dir=str(tmp_path / "out"), max_seq_len=512
            )
        )
        load(stage, TOKENIZER, 1)
        assert heard.getvalue() == ""
