"""`tinylm export --format gguf`, as typed: the file, the Modelfile, adapters, and what is refused."""

from __future__ import annotations

import errno
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import gguf
import pytest
import torch

from tests.export.llama_cpp import LlamaCpp, next_logprobs
from tests.model.small_models import trained_model
from tinylm.checkpoint.adapter_folder import save_adapter
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.commandline.exit_status import run_main
from tinylm.commands.export import main as export
from tinylm.model.lora import LoRAConfig, apply_lora, lora_parameters
from tinylm.tokenizer.tokenizer import Tokenizer

IDS = [5, 900, 17, 42, 3000, 6000]
LINEAGE = {"stage": "full_sft", "document_start": True, "seed": 3}


@pytest.fixture
def base(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "größe" / "full_sft_64_epoch0"
    save_model(folder, trained_model(vocab_size=6400), tokenizer, LINEAGE)
    return folder


@pytest.fixture
def adapter(base: Path) -> Path:
    model = apply_lora(load_model(base)[0], LoRAConfig(rank=2, alpha=6))
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, 0, 0.2)
    save_adapter(model, base.with_name("lora_64_epoch0"), base, {"stage": "lora", "seed": 4})
    return base.with_name("lora_64_epoch0")


def words(model: Path, output: Path, *more: str) -> list[str]:
    return ["--model_path", str(model), "--format", "gguf", "--output", str(output), *more]


def difference(model: Path, llama_cpp: LlamaCpp) -> float:
    ours = next_logprobs(load_model(model)[0], IDS)
    return float((ours - llama_cpp.next_logprobs(IDS, 6400)).abs().max())


def facts(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_a_model_and_its_modelfile(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "mödel.gguf"
    assert export(words(base.parent, output, "--dtype", "q8_0", "--license", "mit")) == 0
    size = output.stat().st_size / 1e6
    assert capsys.readouterr().out.splitlines() == [
        f"{base} written to {output}: {size:.1f} MB, 15 tensors in q8_0, 5 tensors in f32",
        f"next  run it: llama-cli -m '{output}'",
        f"next  or with Ollama: ollama create 'mödel' -f '{output.with_suffix('.Modelfile')}'",
    ]
    assert difference(base, LlamaCpp(output)) < 0.3
    found = facts(output)
    assert (found["general.name"], found["general.license"]) == ("full_sft_64_epoch0", "mit")
    assert (found["tinylm.stage"], found["tinylm.seed"], found["general.file_type"]) == ("full_sft", 3, 7)
    assert output.with_suffix(".Modelfile").read_text(encoding="utf-8") == (
        "FROM ./mödel.gguf\n"
        'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n'
        "{{ .Content }}<|im_end|>\n"
        "{{ end }}<|im_start|>assistant\n"
        '"""\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "<|endoftext|>"\n'
        "PARAMETER temperature 0.7\n"
        "PARAMETER top_p 0.9\n"
        "PARAMETER num_ctx 256\n"
    )


def test_without_a_dtype_it_is_half_precision(base: Path, tmp_path: Path) -> None:
    export(words(base, tmp_path / "a.gguf"))
    assert facts(tmp_path / "a.gguf")["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16


def test_a_base_models_modelfile_continues_a_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_model(tmp_path / "pretrain", trained_model(vocab_size=6400), tokenizer, {"stage": "pretrain"})
    export(words(tmp_path / "pretrain", tmp_path / "a.gguf"))
    assert 'TEMPLATE """{{ .Prompt }}"""\n' in (tmp_path / "a.Modelfile").read_text(encoding="utf-8")


def test_entries_without_tokens_and_wider_types_are_said(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "m", trained_model(vocab_size=6411, hidden_size=56), tokenizer, {})
    export(words(tmp_path / "m", tmp_path / "a.gguf", "--dtype", "q4_0"))
    said = " ".join(capsys.readouterr().out.split())
    assert "2 tensors in q4_0" in said and "13 matrices are in a wider type than asked for" in said
    assert "11 entries of the model have no token; they are named [PAD...] and unused" in said


def test_an_adapter_alone(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It names the command that writes its base, and the one that runs both."""
    export(words(base, tmp_path / "full_sft_64_epoch0.gguf", "--dtype", "f32"))
    capsys.readouterr()
    assert export(words(adapter, tmp_path / "a.gguf", "--dtype", "f32")) == 0
    said, beside = " ".join(capsys.readouterr().out.split()), tmp_path / "full_sft_64_epoch0.gguf"
    assert f"next write its base model too: tinylm export --model_path '{base}' --output {beside}" in said
    assert f"next run both: llama-cli -m {beside} --lora {tmp_path / 'a.gguf'}" in said
    found = facts(tmp_path / "a.gguf")
    assert (found["general.type"], found["adapter.type"], found["adapter.lora.alpha"]) == ("adapter", "lora", 6.0)
    assert (found["tinylm.stage"], found["tinylm.seed"]) == ("lora", 4)
    assert not (tmp_path / "a.Modelfile").exists()
    assert difference(adapter, LlamaCpp(tmp_path / "full_sft_64_epoch0.gguf", tmp_path / "a.gguf")) < 1e-4
    assert difference(adapter, LlamaCpp(tmp_path / "full_sft_64_epoch0.gguf")) > 0.1


def test_an_adapter_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    export(words(adapter, tmp_path / "a.gguf", "--dtype", "f32", "--merge"))
    assert difference(adapter, LlamaCpp(tmp_path / "a.gguf")) < 1e-4
    assert facts(tmp_path / "a.gguf")["tinylm.stage"] == "merged" and (tmp_path / "a.Modelfile").is_file()
    with pytest.raises(ValueError, match="full_sft_64_epoch0 is a full model; --merge is for an adapter folder"):
        export(words(base, tmp_path / "b.gguf", "--merge"))
    with pytest.raises(ValueError, match="dtype is q4_0; an adapter's rows are too short"):
        export(words(adapter, tmp_path / "b.gguf", "--dtype", "q4_0"))


def test_what_exists_is_replaced_only_on_request(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"old")
    with pytest.raises(
        ValueError, match=r"a\.gguf exists already; pass --overwrite to replace it, or choose .*--output"
    ):
        export(words(base, tmp_path / "a.gguf"))
    (tmp_path / "a.gguf").unlink()
    (tmp_path / "a.Modelfile").write_bytes(b"mine")
    with pytest.raises(ValueError, match="a.Modelfile exists already; pass --overwrite to replace it"):
        export(words(base, tmp_path / "a.gguf"))
    assert not (tmp_path / "a.gguf").exists() and (tmp_path / "a.Modelfile").read_bytes() == b"mine"
    (tmp_path / "a.gguf").write_bytes(b"old")
    assert export(words(base, tmp_path / "a.gguf", "--overwrite")) == 0
    assert difference(base, LlamaCpp(tmp_path / "a.gguf")) < 0.05
    with pytest.raises(IsADirectoryError, match="is a folder; expected a file name"):
        export(words(base, tmp_path))


def test_a_disk_with_too_little_room_is_refused_first(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**5, 10**5))
    with pytest.raises(ValueError, match=r"x/a.gguf needs 1.0 MB and .* has 0.1 MB free; make room there, or"):
        export(words(base, tmp_path / "x" / "a.gguf"))
    assert not (tmp_path / "x").exists()


def test_a_disk_that_fills_up_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(array: object, kind: object) -> object:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.quants, "quantize", full)
    assert run_main(export, words(base, tmp_path / "x" / "a.gguf")) == 1
    assert f"{tmp_path}/x/a.gguf" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_missing_package_is_named(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("tinylm.export.gguf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"package gguf is not installed; .*: pip install 'tinylm\[export\]'"):
        export(words(base, tmp_path / "a.gguf"))


def test_learned_positions_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained_model(vocab_size=6400, position_embedding_type="learned")
    save_model(tmp_path / "m", model, tokenizer, {})
    assert run_main(export, words(tmp_path / "m", tmp_path / "a.gguf")) == 2
    assert "only models with rotary positions can be exported" in " ".join(capsys.readouterr().err.split())


def test_flags_of_a_gguf_are_not_for_a_pth(base: Path, tmp_path: Path) -> None:
    for flags in (["--dtype", "f16"], ["--license", "mit"]):
        with pytest.raises(ValueError, match=f"{flags[0]} is not for a .pth, which holds float32 weights"):
            export(["--model_path", str(base), "--output", str(tmp_path / "a.pth"), *flags])


def test_the_ending_says_the_format(base: Path, tmp_path: Path) -> None:
    """A .pth was once written under the name of a .gguf, and a file without an ending, which no command read."""
    assert export(["--model_path", str(base), "--output", str(tmp_path / "a.GGUF")]) == 0
    assert difference(base, LlamaCpp(tmp_path / "a.GGUF")) < 0.05
    for name, flags, wanted in (
        ("a", [], "model.gguf, model.onnx, model.html or model.pth"),
        ("a", ["--format", "onnx"], "model.onnx"),
        ("a.gguf", ["--format", "pth"], "model.pth"),
    ):
        with pytest.raises(ValueError, match=f"{name}; expected a file name such as {wanted}, or --format hf, which"):
            export(["--model_path", str(base), "--output", str(tmp_path / name), *flags])
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.gguf").exists()
