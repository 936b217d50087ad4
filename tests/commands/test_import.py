"""`tinylm import`: a folder of another maker becomes a model on which the other commands work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tests.command_line import tinylm
from tests.tokenizer.other_tokenizers import write_tokenizer
from tests.tokenizer.their_templates import CHATML, INST
from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.model_folder import load_model
from tinylm.tokenizer.tokenizer import Tokenizer

CARD = "---\nlanguage: de\nlicense: apache-2.0\n---\n# A model\nlicense: mit\n"
MESSAGES = [{"role": "user", "content": "The dog?"}, {"role": "assistant", "content": "The fox. Größe!"}]


def their_folder(folder: Path, name: str = "smollm2", template: str = CHATML, **changes: Any) -> Path:
    write_tokenizer(name, folder)
    torch.manual_seed(0)
    shape = {"vocab_size": 523, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = LlamaConfig(**shape, eos_token_id=[2, 1], tie_word_embeddings=True, initializer_range=0.2, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    (folder / "README.md").write_text(CARD)
    return folder


def run(*words: object) -> str:
    status, said = tinylm(*words)
    assert status == 0, said
    return said


@pytest.mark.parametrize(("name", "template"), [("smollm2", CHATML), ("mistral", INST)])
def test_an_imported_model_is_used_and_tuned_like_one_of_ours(tmp_path: Path, name: str, template: str) -> None:
    folder, out = their_folder(tmp_path / "theirs", name, template), tmp_path / "out"
    said = run("import", folder, "--output_dir", out)
    assert "parameters written to" in said and "not " not in said
    lineage = json.loads((out / "lineage.json").read_text())
    assert (lineage["stage"], lineage["licence"], lineage["source"]) == ("imported", "apache-2.0", str(folder))
    assert lineage["document_start"] == (name == "mistral")

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    again, loaded = AutoModelForCausalLM.from_pretrained(out), load_for_use(out)
    ids = AutoTokenizer.from_pretrained(out).apply_chat_template(MESSAGES, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    with torch.no_grad():
        for model in (again(ids).logits, loaded.model(ids)):
            torch.testing.assert_close(model, theirs(ids).logits, rtol=1e-5, atol=1e-5)

    data, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    pair = {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": [{"role": "assistant", "content": "No."}]}
    data.write_text((json.dumps({"messages": MESSAGES}, ensure_ascii=False) + "\n") * 8)
    pairs.write_text((json.dumps(pair) + "\n") * 8)
    small = ["--epochs", 1, "--batch_size", 2, "--device", "cpu", "--max_seq_len", 128]
    run("verify", out)
    run("chat", "--model_path", out, "--prompt", "The dog?", "--max_new_tokens", 4)
    run("sft", "--model_path", out, "--data_path", data, "--output_dir", tmp_path / "sft", *small)
    run("lora", "--model_path", out, "--data_path", data, "--output_dir", tmp_path / "lora", *small)
    run("dpo", "--model_path", tmp_path / "sft", "--data_path", pairs, "--output_dir", tmp_path / "dpo", *small)
    run("merge", "--model_path", tmp_path / "lora", "--output_dir", tmp_path / "merged")
    run("verify", tmp_path / "merged")
    run("chat", "--model_path", tmp_path / "merged", "--prompt", "The dog?", "--max_new_tokens", 4)
    template_again = (tmp_path / "merged" / "chat_template.jinja").read_text()
    assert template_again == template  # tuned, it is still theirs


def test_a_template_that_does_not_work_or_is_missing_is_said_at_once(tmp_path: Path) -> None:
    folder = their_folder(tmp_path / "theirs", template="{{ messages }")
    said = run("import", folder, "--output_dir", tmp_path / "out")
    assert "warning: the model's chat template refuses this chat: " in said and "--chat_template chatml takes" in said
    assert "warning" not in run("import", folder, "--chat_template", "chatml", "--output_dir", tmp_path / "ours")
    bare = their_folder(tmp_path / "bare", "llama2")
    (bare / "chat_template.jinja").unlink()
    assert "the model continues texts and cannot be tuned on chats" in run(
        "import", bare, "--output_dir", tmp_path / "b"
    )


def test_a_tokenizer_may_lie_elsewhere(tmp_path: Path) -> None:
    folder, elsewhere = their_folder(tmp_path / "theirs"), tmp_path / "größe"
    elsewhere.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(elsewhere / name)
    status, said = tinylm("import", folder, "--output_dir", tmp_path / "out")
    assert status == 2 and "no tokenizer.json for its 523 entries; give --tokenizer_path" in said
    run("import", folder, "--tokenizer_path", elsewhere, "--output_dir", tmp_path / "out")
    assert load_for_use(tmp_path / "out").tokenizer.fingerprint == Tokenizer.load(elsewhere).fingerprint


def test_what_is_not_used_is_said(tmp_path: Path) -> None:
    folder = their_folder(tmp_path / "theirs", auto_map={"AutoModel": "modeling_x.X"}, z_loss=3)
    (folder / "modeling_x.py").write_text("raise SystemExit('it ran')")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    said = run("import", folder, "--output_dir", tmp_path / "out")
    assert "not run: the folder's own code ('modeling_x.py')" in said and "it ran" not in said
    assert "not used: 1 fields of config.json ('z_loss')" in said and "not read: 'pytorch_model.bin'" in said


def test_every_end_is_kept_and_ours_replaces_a_template_on_request(tmp_path: Path) -> None:
    folder, out = their_folder(tmp_path / "theirs"), tmp_path / "out"
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 9]}')
    run("import", folder, "--output_dir", out, "--chat_template", "chatml")
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [2, 1, 0, 9]
    assert load_for_use(out).tokenizer.their_template is None
    said = tinylm("import", folder, "--output_dir", out)
    assert said[0] == 2 and "exists already; pass --overwrite" in said[1]
    run("import", folder, "--output_dir", out, "--overwrite")
    assert load_for_use(out).tokenizer.their_template == CHATML


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere does not exist; expected a Hugging Face folder, .gguf or hub:owner/name"),
        (["hub:some"], "hub:'some' is not a name on the hub; expected hub:owner/name"),
        (["hub:some/name"], "hub:some/name cannot be downloaded .*; give the folder of a copy"),
        (["empty"], "empty is no Hugging Face folder; expected a folder with config.json"),
        (["theirs", "--output_dir", "theirs", "--overwrite"], "is the folder to import, or holds it"),
        (["llama", "--chat_template", "chatml"], "the tokenizer has no <|im_start|> and <|im_end|>"),
        (["gemma"], "model_type 'gemma2' is not supported"),
    ],
)
def test_what_cannot_be_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    their_folder(tmp_path / "theirs")
    their_folder(tmp_path / "llama", "mistral", INST)
    config = json.loads((their_folder(tmp_path / "gemma") / "config.json").read_text())
    (tmp_path / "gemma" / "config.json").write_text(json.dumps({**config, "model_type": "gemma2"}))
    status, said = tinylm("import", *words)
    assert status != 0 and re.search(message.replace("|", r"\|"), said), said
    assert len(said.strip().splitlines()) == 1 and not (tmp_path / "out" / "imported").exists()


def test_a_gguf_is_imported_and_goes_out_again(tmp_path: Path) -> None:
    """Their tokenizer, template and licence come along; the file that goes out holds the same."""
    run("import", their_folder(tmp_path / "theirs"), "--output_dir", tmp_path / "folder")
    export = ("export", "--format", "gguf", "--dtype", "f32", "--license", "apache-2.0", "--model_path")
    run(*export, tmp_path / "folder", "--output", tmp_path / "a.gguf")
    said = run("import", tmp_path / "a.gguf", "--output_dir", tmp_path / "out")
    assert "parameters written to" in said
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert (lineage["licence"], lineage["source"]) == ("apache-2.0", str(tmp_path / "a.gguf"))
    first, second = load_for_use(tmp_path / "folder"), load_for_use(tmp_path / "out")
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name
    assert second.model.config.eos_token_ids[0] == first.model.config.eos_token_ids[0]
    assert second.tokenizer.their_template == CHATML and second.document_start == first.document_start
    run("verify", tmp_path / "out")
    run("chat", "--model_path", tmp_path / "a.gguf", "--prompt", "The dog?", "--max_new_tokens", 4)
    run(*export, tmp_path / "out", "--output", tmp_path / "again" / "b.gguf")
    again = load_model(tmp_path / "again" / "b.gguf")
    assert again[1].their_template == CHATML
    assert all(torch.equal(tensor, second.model.state_dict()[name]) for name, tensor in again[0].state_dict().items())


def test_a_damaged_gguf_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(40))
    status, said = tinylm("import", tmp_path / "a.gguf", "--output_dir", tmp_path / "out")
    assert status != 0 and "a.gguf: it is of version 0; expected a little-endian GGUF" in said
    assert len(said.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
