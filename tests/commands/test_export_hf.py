"""`tinylm export --format hf`, as typed: the folder, its card, whose commands are run, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from tests.command_line import tinylm
from tests.export.chatting_models import ANSWERS, OTHER_ANSWERS, QUESTIONS, messages_of, write_models
from tests.export.conftest import small_tokenizer
from tests.model.small_models import trained_model
from tests.stage_files import write_stage_files
from tests.test_docs import blocks
from tinylm.checkpoint import weight_shards
from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.checkpoint.weights_file import read_header
from tinylm.commands.quickstart_scores import digest_of
from tinylm.evaluation.skills import MEAN, PERSONA, PERSONA_RIGHT, PREFERENCE, WARM
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.model.lora import TABLES
from tinylm.model.weights import base_state, weights_fingerprint
from tinylm.tokenizer.tokenizer import Tokenizer

# PEFT asks transformers for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
__all__ = ["small_tokenizer"]

MODEL_FILES = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "lineage.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "lineage.json"}
GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=40)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> tuple[Path, Path]:
    """A chat model and an adapter for it, in a folder whose name no published file may hold."""
    return write_models(tmp_path_factory.mktemp("privat-größe") / "run" / "sft", small_tokenizer, qk_norm=True)


def export(model: Path, output: Path, *flags: object) -> tuple[int, str]:
    """(exit status, what was said on one line)."""
    status, said = tinylm("export", "--model_path", model, "--format", "hf", "--output", output, *flags)
    return status, " ".join(said.split())


def write(model: Path, output: Path, *flags: object) -> str:
    status, said = export(model, output, *flags)
    assert status == 0, said
    for path in output.iterdir():
        assert path.suffix == ".safetensors" or "privat" not in path.read_text("utf-8"), path
    return said


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """(the head, the body) as the hub reads them."""
    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


def run_card(folder: Path, base: Path | None = None) -> str:
    """Run the card's Python with folders in place of the hub's names; returns what it prints."""
    (code,) = blocks(folder / "README.md", "python")
    code = code.replace(f'"OWNER/{folder.name}"', repr(str(folder)))
    code = code.replace('base = "OWNER/full_sft_64_epoch0"', f"base = {str(base)!r}")
    assert "OWNER" not in code
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(code.replace("max_new_tokens=60", "max_new_tokens=60, do_sample=False"), "README.md", "exec"), {})
    return heard.getvalue().strip()


def shell_lines(folder: Path) -> list[list[str]]:
    (block,) = blocks(folder / "README.md", "sh")
    return [shlex.split(line) for line in block.splitlines()]


@pytest.mark.filterwarnings("ignore:You have modified the pretrained model configuration:UserWarning")
def test_a_model_and_its_card(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, output = models[0], tmp_path / "out" / "tiny-größe"
    said = write(base, output, "--license", "MIT", "--base_model", "ada/l-o.v_e")
    size = (output / "model.safetensors").stat().st_size / 1e6
    assert f"{base} written to {output}: {size:.1f} MB of weights in bf16, 1 file" in said
    assert said.endswith(f"next upload it with your own account: hf upload OWNER/tiny-gr-e '{output}'")
    assert {path.name for path in output.iterdir()} == MODEL_FILES
    config = json.loads((output / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    head, body = card_of(output)
    assert head == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "ada/l-o.v_e",
        "tags": ["tinylm", "qwen3"],
    }
    assert "\n# tiny-größe\n" in body and "| weights | bf16 |" in body and "answers in chats" in body
    assert "| supervised fine-tuning | not recorded |  |  |  |  | 3 |  |" in body

    folder = output.rename(tmp_path / "tiny-gr-e")  # as a download of what the card names
    assert run_card(folder) == ANSWERS[0]
    monkeypatch.chdir(tmp_path)
    download, gguf, run, ollama = shell_lines(folder)
    assert download == ["hf", "download", "OWNER/tiny-gr-e", "--local-dir", "tiny-gr-e"] and gguf[0] == "tinylm"
    assert tinylm(*gguf[1:])[0] == 0
    assert run == ["llama-cli", "-m", "gguf/tiny-gr-e.gguf"] and (tmp_path / run[2]).is_file()
    assert (
        ollama[:5] == ["ollama", "create", "tiny-gr-e", "-f", "gguf/tiny-gr-e.Modelfile"]
        and (tmp_path / ollama[4]).is_file()
    )


def test_an_adapter_and_its_card(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = models
    said = write(adapter, tmp_path / "pip", "--license", "mit")
    assert "the adapter names its base model full_sft_64_epoch0; --base_model states its name on the hub" in said
    assert {path.name for path in (tmp_path / "pip").iterdir()} == ADAPTER_FILES and "weights in f32" in said
    head, body = card_of(tmp_path / "pip")
    assert (head["library_name"], head["tags"]) == ("peft", ["tinylm", "qwen3", "lora"]) and "base_model" not in head
    assert "Rank 8, alpha 32, on `down_proj`, `gate_proj`" in body
    assert run_card(tmp_path / "pip", base) == OTHER_ANSWERS[0].strip()
    monkeypatch.chdir(tmp_path)
    first, _, gguf, *_ = shell_lines(tmp_path / "pip")
    shutil.copytree(base, tmp_path / first[-1])
    assert (
        first[2] == "OWNER/full_sft_64_epoch0" and tinylm(*gguf[1:])[0] == 0 and (tmp_path / "gguf/pip.gguf").exists()
    )

    write(adapter, tmp_path / "named", "--base_model", "ada/love", "--dtype", "f16")
    head, body = card_of(tmp_path / "named")
    assert (head["base_model"], head["base_model_relation"]) == ("ada/love", "adapter") and 'base = "ada/love"' in body
    assert json.loads((tmp_path / "named" / "adapter_config.json").read_text())["base_model_name_or_path"] == "ada/love"
    tensors = read_header(tmp_path / "named" / "adapter_model.safetensors")
    assert tensors == read_header(adapter / "adapter_model.safetensors") and len(tensors) == 28
    size = (tmp_path / "named" / "adapter_model.safetensors").stat().st_size
    assert size < 0.6 * (adapter / "adapter_model.safetensors").stat().st_size


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning")  # PEFT's, of any adapter on tied tables
def test_the_card_of_an_adapter_on_tied_tables_runs(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    """Merged by PEFT, it would change both tables."""
    base, adapter = write_models(tmp_path / "a", small_tokenizer, ("v_proj", *TABLES), qk_norm=True)
    write(adapter, tmp_path / "pip")
    assert run_card(tmp_path / "pip", base) == OTHER_ANSWERS[0].strip()
    write(adapter, tmp_path / "whole", "--merge", "--dtype", "f32")
    assert run_card(tmp_path / "whole") == OTHER_ANSWERS[0].strip()
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_merged_adapter_is_a_model(models: tuple[Path, Path], tmp_path: Path) -> None:
    write(models[1], tmp_path / "m", "--merge", "--dtype", "f16")
    assert {path.name for path in (tmp_path / "m").iterdir()} == MODEL_FILES
    head, body = card_of(tmp_path / "m")
    assert head["library_name"] == "transformers" and "| LoRA, merged | not recorded |  |  |  |  | 4 |" in body
    loaded = load_for_use(tmp_path / "m")
    assert Engine(loaded.model, loaded.tokenizer, torch.float32).reply(messages_of(QUESTIONS[3]), GREEDY) == ANSWERS[0]
    assert loaded.lineage["stage"] == "merged" and loaded.document_start == [0]


def test_a_base_models_card_continues_a_text(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    """After the token that its documents began with."""
    model = trained_model(vocab_size=373)
    save_model(tmp_path / "a", model, small_tokenizer, {"stage": "pretrain", "document_start": True, "parent": None})
    write(tmp_path / "a", tmp_path / "b")
    assert 'pipe("<|endoftext|>Once upon a time"' in card_of(tmp_path / "b")[1]
    assert "continues texts and knows no chats" in card_of(tmp_path / "b")[1]
    heard = run_card(tmp_path / "b")
    loaded = load_for_use(tmp_path / "b")
    engine = Engine(loaded.model, loaded.tokenizer, torch.bfloat16, loaded.document_start)
    ours = "".join(engine.stream_text(engine.text_prompt("Once upon a time"), GREEDY))
    assert heard and heard[:5] == ours.strip()[:5]
    assert '["stage"' not in heard and load_for_use(tmp_path / "b").lineage["stage"] == "pretrain"


def test_it_comes_in_again_and_is_trained_on(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Licence, stage and the start of documents come along; what is tuned from it goes out with the same licence."""
    write(models[0], tmp_path / "a", "--license", "apache-2.0", "--shard_size", "50KB")
    status, said = tinylm("import", tmp_path / "a", "--output_dir", tmp_path / "b")
    assert status == 0 and "not used" not in said and "not read" not in said, said
    lineage = json.loads((tmp_path / "b" / "lineage.json").read_text())
    assert (lineage["licence"], lineage["stage"], lineage["seed"]) == ("apache-2.0", "full_sft", 3)
    ours, again = load_for_use(models[0]), load_for_use(tmp_path / "b")
    assert weights_fingerprint(again.model) == weights_fingerprint(ours.model.bfloat16().float())
    assert again.document_start == ours.document_start == [0] and again.tokenizer == ours.tokenizer
    status, said = tinylm("chat", "--model_path", tmp_path / "a", "--prompt", QUESTIONS[0], "--temperature", 0)
    assert status == 0 and ANSWERS[0] in said

    write_stage_files(tmp_path, num_chats=8)
    run = ["--data_path", tmp_path / "chats.jsonl", "--max_steps", 1, "--device", "cpu", "--max_seq_len", 64]
    for parent in ("a", "b"):
        words = ["sft", "--model_path", tmp_path / parent, "--output_dir", tmp_path / f"sft_{parent}", *run]
        status, said = tinylm(*words, "--validation_fraction", 0.3)
        assert status == 0, said
    said = write(tmp_path / "a", tmp_path / "again")
    body = card_of(tmp_path / "again")[1]
    assert "| supervised fine-tuning | not recorded |" in body and "What came before is not recorded." in body
    assert "the lineage does not say what the model was trained from" in said and "no licence" not in said
    write(tmp_path / "sft_b", tmp_path / "c")
    head, body = card_of(tmp_path / "c")
    assert head["license"] == "apache-2.0" and "## Licence\n\napache-2.0" in body and "language" not in head
    assert re.search(r"supervised fine-tuning \| the maker's own \(fingerprint \w{16}\) \| 1 \| 8 \| 64 \| \w+, ", body)


def test_the_line_of_parents_is_told_and_what_is_missing_said(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    def settings(**changes: Any) -> dict[str, Any]:
        return {"settings": {"optimizer": "muon", "learning_rate": 0.012, "max_seq_len": 256, **changes}}

    first, second, third = (trained_model(vocab_size=373) for _ in range(3))
    pages = settings(data_path=None, tinyworld_documents=10600, batch_size=4, accumulation_steps=2)
    facts = {"stage": "pretrain", "step": 1701, "validation_loss": 0.83771, "seed": 5, "parent": None, **pages}
    save_model(tmp_path / "1", first, small_tokenizer, facts)
    parent = {"path": str(tmp_path / "1"), "weights": weights_fingerprint(first)}
    hub = settings(data_path="hf://datasets/ada/chats@main/a.parquet,hf://datasets/b/c/x.jsonl,privat/é.jsonl")
    save_model(tmp_path / "2", second, small_tokenizer, {"stage": "full_sft", "parent": parent, **hub})
    parent = {"path": str(tmp_path / "2"), "weights": weights_fingerprint(second)}
    pairs = settings(data_path=None, tinyworld_pairs=1000)
    save_model(tmp_path / "3", third, small_tokenizer, {"stage": "dpo", "parent": parent, **pairs})

    write(tmp_path / "1", tmp_path / "one")
    assert card_of(tmp_path / "one")[0]["language"] == ["en"]
    assert (
        "pretraining | TinyWorld, 10,600 pages | 1,701 | 8 | 256 | muon, 0.012 | 5 | 0.8377 |"
        in (card_of(tmp_path / "one")[1])
    )
    said = write(tmp_path / "3", tmp_path / "all")
    head, body = card_of(tmp_path / "all")
    assert head["datasets"] == ["ada/chats", "b/c"] and "language" not in head and "does not tell" not in said
    places = [
        body.index(words) for words in ("| pretraining |", "| [ada/chats](https://hugg", "| TinyWorld, 1,000 pairs")
    ]
    assert places == sorted(places) and "not recorded" not in body

    save_model(tmp_path / "1", third, small_tokenizer, facts)  # another model is there now
    said = write(tmp_path / "3", tmp_path / "less")
    assert "the model card does not tell the whole training:" in said and "has other weights now" in said
    head, body = card_of(tmp_path / "less")
    assert "| pretraining |" not in body and "What came before is not recorded." in body
    assert "the model card states no licence; --license states one" in said and "license" not in head


def test_a_model_of_the_hub_is_the_base_model(models: tuple[Path, Path], tmp_path: Path) -> None:
    loaded = load_for_use(models[0])
    lineage = {"stage": "imported", "source": "hub:ada/love", "licence": "cc-by-4.0", "parent": {"path": "x"}}
    save_model(tmp_path / "a", loaded.model, loaded.tokenizer, lineage)
    parent = {"path": str(tmp_path / "a"), "weights": weights_fingerprint(loaded.model)}
    save_model(tmp_path / "b", loaded.model, loaded.tokenizer, {"stage": "dpo", "parent": parent})
    said = write(tmp_path / "b", tmp_path / "c")
    head, body = card_of(tmp_path / "c")
    assert (head["license"], head["base_model"]) == (
        "cc-by-4.0",
        "ada/love",
    ) and "| imported | that of ada/love |" in body
    assert "tuned with Tiny Language Model" in body and "from a model of another maker." in body
    write(tmp_path / "a", tmp_path / "d")
    assert "of another maker, converted with Tiny Language Model" in card_of(tmp_path / "d")[1]
    assert "does not tell" not in said and "no licence" not in said


@pytest.mark.parametrize("in_persona", [0.0, 0.75])
def test_the_scores_of_the_quickstart(models: tuple[Path, Path], tmp_path: Path, in_persona: float) -> None:
    """Of this very model only; of a persona, the shares that count its words as right."""
    place = tmp_path / "quickstart" / "full_sft" / "full_sft_64_epoch0"
    shutil.copytree(models[0], place)
    summary = {MEAN: 0.625, WARM: 0.5, PREFERENCE: None, PERSONA: in_persona, PERSONA_RIGHT: 0.875}
    column = {"num_items_per_skill": 30, "skills": {"who_has": 0.25}, "summary": summary, "examples": {}}
    report = {"key": {"models": {"SFT": digest_of(place)}, "dtype": "bfloat16"}, "scoreboard": {"SFT": column}}
    board = tmp_path / "quickstart" / "scoreboard.json"
    board.write_text(json.dumps(report))
    write(place, tmp_path / "a")
    head, body = card_of(tmp_path / "a")
    assert head["metrics"] == ["accuracy"] and "30 for each skill, computed in bfloat16" in body
    rows = re.findall(r"^\| (.*) \| ([\d.]+)% \|$", body, flags=re.MULTILINE)
    if in_persona:
        told = {"replies in the persona that the adapter teaches": 75, "right replies, the persona's words aside": 87.5}
    else:
        told = {"replies as warm as DPO teaches": 50, MEAN: 62.5, "who has": 25}
    assert {name: float(share) for name, share in rows} == told
    report["key"]["models"]["SFT"] = "0" * 16
    board.write_text(json.dumps(report))
    assert f"the model card has no scores: {board} is about other models" in write(place, tmp_path / "b")
    assert "metrics" not in card_of(tmp_path / "b")[0]


def test_shards_hold_what_one_file_holds(models: tuple[Path, Path], tmp_path: Path) -> None:
    write(models[0], tmp_path / "one", "--dtype", "f16")
    said = write(models[0], tmp_path / "more", "--dtype", "f16", "--shard_size", "0.05MB")
    files = weight_shards.weight_files(tmp_path / "more")
    assert (
        len(files) > 3
        and f"{len(files)} files" in said
        and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    )
    for file in files:
        shapes = read_header(file)
        assert len(shapes) == 1 or sum(2 * torch.Size(shape).numel() for shape in shapes.values()) <= 50_000
    one, more = (base_state(load_model(tmp_path / name)[0]) for name in ("one", "more"))
    assert one.keys() == more.keys() and all(torch.equal(one[name], more[name]) for name in one)
    index = json.loads((tmp_path / "more" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in one.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "q8_0"], "dtype is q8_0; --format hf writes f32, f16 or bf16"),
        (["--shard_size", "2 TB"], "shard_size is '2 TB'; expected a size above 0, such as 2GB or 500MB"),
        (["--shard_size", "0MB"], "expected a size above 0"),
        (["--base_model", "../love"], r"base_model is '../love'; expected a name on the hub: owner/name"),
        (["--merge"], "is a full model; --merge is for an adapter folder"),
    ],
)
def test_flags_that_make_no_sense(models: tuple[Path, Path], tmp_path: Path, flags: list[str], message: str) -> None:
    status, said = export(models[0], tmp_path / "a", *flags)
    assert status == 2 and message in said and not (tmp_path / "a").exists(), said


def test_flags_of_other_formats(models: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["export", "--model_path", models[0], "--format", "gguf", "--output", tmp_path / "a.gguf"]
    for flag, value in (("--shard_size", "2GB"), ("--base_model", "ada/love")):
        status, said = tinylm(*words, flag, value)
        assert status == 2 and f"{flag} is for --format hf; leave it out" in said and not list(tmp_path.iterdir())
    status, said = export(models[1], tmp_path / "a", "--shard_size", "2GB")
    assert status == 2 and "shard_size is for a model; an adapter is one file" in said


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (70000.0, "f16", "gate_proj.weight holds 7e+04, too large for f16; use --dtype bf16 or f32"),
        (3.4e38, "bf16", "gate_proj.weight holds 3.4e+38, too large for bf16; use --dtype f32"),
        (float("nan"), "f32", "gate_proj.weight holds NaN or infinite numbers; the model is broken"),
    ],
)
def test_numbers_that_do_not_fit(
    tmp_path: Path, small_tokenizer: Tokenizer, value: float, dtype: str, message: str
) -> None:
    model = trained_model(vocab_size=373)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[3, 5] = value
    save_model(tmp_path / "m", model, small_tokenizer, {})
    status, said = export(tmp_path / "m", tmp_path / "a", "--dtype", dtype)
    assert status == 2 and message in said and not (tmp_path / "a").exists(), said


def test_positions_of_no_other_program_are_refused(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    save_model(tmp_path / "m", trained_model(vocab_size=373, position_embedding_type="learned"), small_tokenizer, {})
    status, said = export(tmp_path / "m", tmp_path / "a")
    assert status == 2 and "only models with rotary positions can be exported" in said


def test_only_an_earlier_export_is_replaced_and_only_on_request(models: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "größe"
    output.mkdir()  # an empty folder holds nothing to lose
    write(models[0], output, "--shard_size", "50KB")
    status, said = export(models[0], output)
    assert status == 2 and "größe exists already; pass --overwrite to replace it, or choose another --output" in said
    write(models[0], output, "--overwrite")
    assert {path.name for path in output.iterdir()} == MODEL_FILES
    (output / ".git").mkdir()
    status, said = export(models[0], output, "--overwrite")
    assert status == 2 and "also holds '.git', which would be deleted; choose another --output" in said
    before = weights_fingerprint(load_model(models[0])[0])
    status, said = export(models[0], models[0], "--overwrite")  # the model itself
    assert (
        status == 2 and "also holds 'manifest.json'" in said and weights_fingerprint(load_model(models[0])[0]) == before
    )
    (tmp_path / "file").write_bytes(b"mine")
    status, said = export(models[0], tmp_path / "file", "--overwrite")
    assert status == 2 and "is a file; expected a folder name" in said and (tmp_path / "file").read_bytes() == b"mine"


def test_no_room_and_a_disk_that_fills_up_leave_nothing(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**5, 10**5))
        status, said = export(models[0], tmp_path / "x" / "a")
        assert status == 2 and re.search(r"x/a needs 1\.\d MB and .* has 0\.1 MB free; make room there", said)
        assert not (tmp_path / "x").exists()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save", full)
    for number, flags in enumerate(([], ["--overwrite"])):
        if number:
            monkeypatch.undo()
            write(models[0], tmp_path / "x" / "a", "--dtype", "f32")
            monkeypatch.setattr(Tokenizer, "save", full)
        status, said = export(models[0], tmp_path / "x" / "a", *flags)
        assert status == 1 and "the disk is full" in said.lower() or "no space" in said.lower(), said
        assert (tmp_path / "x").exists() == bool(number)
    assert json.loads((tmp_path / "x" / "a" / "config.json").read_text())["dtype"] == "float32"
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a"]
