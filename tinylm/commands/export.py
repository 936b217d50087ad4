"""Write a model for other programs.

    tinylm export out/dpo --format gguf --dtype q8_0 --output model.gguf
    tinylm export out/dpo --format hf --output tiny-chat
    tinylm export out/dpo --format html
    tinylm export out/quickstart --snapshots 8 --output tiny.html    # a model of each stage, and how they learnt

A model folder is already a Hugging Face folder. This command writes one to publish, with a model card; a GGUF for
llama.cpp and Ollama; an ONNX file for onnxruntime and transformers.js; a web page with the model inside; or the
`.pth` of the original project, lyuzlion/Tiny-Language-Model.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.model_folder import adapter_base
from tinylm.checkpoint.model_path import is_adapter, named_paths
from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import model_first, parse_settings
from tinylm.commandline.terminal import make_console, print_next
from tinylm.commands.card_facts import card_of
from tinylm.commands.find_model import one_of_each_stage
from tinylm.commands.merge import merged_lineage
from tinylm.export.hf import DTYPES, export_hf, export_hf_adapter, num_bytes_of, require_publishable
from tinylm.export.html import enclosed, export_html
from tinylm.export.model_card import model_card
from tinylm.export.modelfile import modelfile
from tinylm.export.pth import export_pth, unlike_the_original
from tinylm.files.atomic import atomic_write, require_new
from tinylm.model.hf_config import require_llama_shape
from tinylm.model.lora import has_lora

if TYPE_CHECKING:
    from tinylm.export.gguf import Written


LARGE_MODEL = 50_000_000
"""Parameters: a browser computes two tokens per second or fewer."""
LARGE_MAIL = 25_000_000
"""Bytes; many mail services refuse more."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of exporting."""

    model_path: str
    """the model folder, or an adapter folder; html also takes several as name=path,name2=path2, or a folder with a
    folder for each stage"""
    output: str = ""
    """the file to write, for hf the folder; by default the model's name with the ending of the format, here"""
    format: Literal["auto", "pth", "gguf", "hf", "onnx", "html"] = "auto"
    """pth: weights under the names of lyuzlion/Tiny-Language-Model; gguf: for llama.cpp and Ollama, with tokenizer and
    chat template, and a Modelfile beside it; hf: a folder to publish on the Hugging Face hub, with a model card; onnx:
    for onnxruntime and transformers.js; html: a page that chats in a browser, with no network; auto: what the ending of
    `output` says"""
    dtype: Literal["auto", "f32", "f16", "bf16", "q8_0", "q4_0", "int8"] = "auto"
    """numbers, of 32, 16, 16, 8.5, 4.5 or 8 bits each; auto: f16 in a GGUF, bf16 for hf, int8 in a page, f32 in a
    .pth, an ONNX file and an adapter for hf"""
    merge: bool = False
    """fold an adapter into its base model; without it, an adapter folder goes out as the adapter alone (a .pth and an
    ONNX file always hold both)"""
    license: str = ""
    """the model's licence for the GGUF's metadata or the model card, such as mit or apache-2.0"""
    base_model: str = ""
    """hf: the hub's name (owner/name) of the model that this one was made from, for the model card and adapters"""
    shard_size: str = ""
    """hf: largest size of a weight file, such as 2GB; by default there is one file"""
    snapshots: int = 0
    """html: most snapshots of each model's training that go along (`--snapshots` of a training run keeps them)"""
    tokenizer_path: str | None = None
    """tokenizer folder, for a .pth that does not fit the default one"""
    overwrite: bool = False
    """replace the file `output` and the Modelfile beside it, or the folder of an earlier export"""

    def __post_init__(self) -> None:
        if self.snapshots < 0:
            raise ValueError(f"snapshots is {self.snapshots}; expected 0 (none) or more")


def main(argv: list[str]) -> int:
    """The command line: load, fold adapters in, write."""
    settings = parse_settings(ExportSettings, model_first(argv), "tinylm export", "Write a model for other programs.")
    output, console = _output_of(settings), make_console()
    settings = replace(settings, format=_format_of(settings, output))
    if settings.snapshots and settings.format != "html":
        raise ValueError("--snapshots is for --format html; leave it out")
    if settings.format == "hf":
        _to_hf(settings, output, console)
        return 0
    for flag in ("base_model", "shard_size"):
        if getattr(settings, flag):
            raise ValueError(f"--{flag} is for --format hf; leave it out")
    require_new(output, settings.overwrite, "output")
    if settings.format == "gguf":
        _to_gguf(settings, output, console)
    elif settings.format == "onnx":
        _to_onnx(settings, output, console)
    elif settings.format == "html":
        _to_html(settings, output, console)
    else:
        _to_pth(settings, output, console)
    return 0


def _output_of(settings: ExportSettings) -> Path:
    """What to write: what is asked for, or in this folder the model's name with the ending of the format."""
    if settings.output:
        return Path(settings.output)
    if settings.format == "auto":
        raise ValueError("neither output nor format is given; pass one, such as --format html or --output model.gguf")
    path = Path(settings.model_path).absolute()
    name = "models" if len(named_paths(settings.model_path)) > 1 else path.name if path.is_dir() else path.stem
    return Path(f"{name}-hf" if settings.format == "hf" else f"{name}.{settings.format}")


def _format_of(settings: ExportSettings, output: Path) -> Literal["pth", "gguf", "hf", "onnx", "html"]:
    """The format that is asked for; the file must have the ending by which programs, ours too, know it."""
    stated, said = settings.format, output.suffix.lower().removeprefix(".")
    if stated == "hf":
        return stated
    wanted = "model.gguf, model.onnx, model.html or model.pth" if stated == "auto" else f"model.{stated}"
    advice = f"expected a file name such as {wanted}, or --format hf, which writes a folder"
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder; {advice}; choose another --output")
    if said not in ("pth", "gguf", "onnx", "html") or stated not in ("auto", said):
        raise ValueError(f"output is {output}; {advice}")
    return said  # type: ignore[return-value]


def _to_pth(settings: ExportSettings, output: Path, console: Console) -> None:
    for flag, unset in (("dtype", ("auto", "f32")), ("license", ("",))):
        if getattr(settings, flag) not in unset:
            raise ValueError(f"--{flag} is not for a .pth, which holds float32 weights and nothing else; leave it out")
    loaded = load_for_use(settings.model_path, tokenizer_path=settings.tokenizer_path)
    require_llama_shape(loaded.model.config)
    if unlike := unlike_the_original(loaded.model.config):
        raise ValueError(
            f"{loaded.path} cannot be a .pth, because the original project's code has other fixed settings: "
            f"{', '.join(unlike)}; {_instead(loaded.path)}"
        )
    export_pth(loaded.model, output)
    console.print(f"{loaded.path} written to {output}")
    print_next(console, f"talk to it: tinylm chat --model_path {quote(str(output))}")


def _to_gguf(settings: ExportSettings, output: Path, console: Console) -> None:
    try:
        from tinylm.export.gguf import export_gguf, export_gguf_adapter
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ValueError("the package gguf is not installed; install it with: pip install 'tinylm[export]'") from None
    loaded = load_for_use(settings.model_path, tokenizer_path=settings.tokenizer_path, merge=settings.merge)
    dtype = "f16" if settings.dtype == "auto" else settings.dtype
    if settings.merge and not is_adapter(loaded.path):
        raise ValueError(f"{loaded.path} is a full model; --merge is for an adapter folder; leave it out")
    if has_lora(loaded.model):
        written = export_gguf_adapter(loaded.model, loaded.lineage, output, dtype, loaded.path.stem, settings.license)
        _report(console, loaded.path, output, written)
        base = adapter_base(loaded.path)
        base_file = quote(str(output.with_name(f"{base.stem}.gguf")))
        print_next(
            console, f"write its base model too: tinylm export --model_path {quote(str(base))} --output {base_file}"
        )
        print_next(console, f"run both: llama-cli -m {base_file} --lora {quote(str(output))}")
        return
    beside = output.with_suffix(".Modelfile")
    require_new(beside, settings.overwrite, "output")
    lineage = merged_lineage(loaded.path, loaded.lineage) if is_adapter(loaded.path) else loaded.lineage
    written = export_gguf(loaded.model, loaded.tokenizer, lineage, output, dtype, loaded.path.stem, settings.license)
    with atomic_write(beside) as file:
        file.write(modelfile(output, loaded.model.config, loaded.tokenizer, lineage).encode("utf-8"))
    _report(console, loaded.path, output, written)
    print_next(console, f"run it: llama-cli -m {quote(str(output))}")
    print_next(console, f"or with Ollama: ollama create {quote(output.stem)} -f {quote(str(beside))}")


def _to_onnx(settings: ExportSettings, output: Path, console: Console) -> None:
    for flag, unset in (("dtype", ("auto", "f32")), ("license", ("",))):
        if getattr(settings, flag) not in unset:
            raise ValueError(f"--{flag} is not for ONNX, which goes out in float32 and with no licence; leave it out")
    try:
        from tinylm.export.onnx import export_onnx
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise ValueError("the package onnx is not installed; install it with: pip install 'tinylm[onnx]'") from None
    loaded = load_for_use(settings.model_path, tokenizer_path=settings.tokenizer_path)
    num_bytes = export_onnx(loaded.model, output)
    console.print(f"{loaded.path} written to {output}: {num_bytes / 1e6:,.1f} MB in f32")
    print_next(console, "for transformers.js, put it into a model folder as onnx/model.onnx")


def _to_html(settings: ExportSettings, output: Path, console: Console) -> None:
    if settings.dtype not in ("auto", "int8", "f32") or settings.license:
        flag = "license" if settings.license else "dtype"
        raise ValueError(f"--{flag} {getattr(settings, flag)} is not for a page, which holds int8 or f32; leave it out")
    dtype: Literal["int8", "f32"] = "f32" if settings.dtype == "f32" else "int8"
    named = named_paths(settings.model_path)
    if len(named) == 1 and (stages := one_of_each_stage(Path(named[0][1]))):
        named = [("", str(model)) for model in stages]
    models = [enclosed(name, path, dtype, settings.snapshots, settings.tokenizer_path) for name, path in named]
    if settings.snapshots and not any(model.snapshots for model in models):
        raise ValueError("no run has left snapshots; leave out --snapshots, or train with --snapshots 8")
    title = models[0].card["id"] if len(models) == 1 else output.stem
    for model in models:
        count = len(model.snapshots)
        kept = f", {count or 'no'} snapshot{'s' * (count != 1)}" if settings.snapshots else ""
        console.print(f"{model.card['id']}: {model.card['parameters']:,} parameters{kept}")
    size = export_html(title, models, output)
    console.print(f"written to {output}: {size / 1e6:,.1f} MB in {dtype}")
    if max(model.card["parameters"] for model in models) > LARGE_MODEL:
        console.print("a browser computes such a model slowly: a second for each 100 million parameters and token")
    if size > LARGE_MAIL:
        console.print("many mail services refuse files above 25 MB; fewer models or snapshots make it smaller")
    print_next(console, f"open {output} in a browser; it needs no network")


def _to_hf(settings: ExportSettings, output: Path, console: Console) -> None:
    if settings.dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype is {settings.dtype}; --format hf writes f32, f16 or bf16; choose one of them")
    shard_bytes = num_bytes_of(settings.shard_size)
    require_publishable(output, settings.overwrite)
    loaded = load_for_use(settings.model_path, tokenizer_path=settings.tokenizer_path, merge=settings.merge)
    alone = has_lora(loaded.model)
    if settings.merge and not is_adapter(loaded.path):
        raise ValueError(f"{loaded.path} is a full model; --merge is for an adapter folder; leave it out")
    if alone and shard_bytes:
        raise ValueError("shard_size is for a model; an adapter is one file; leave it out, or pass --merge")
    dtype = settings.dtype if settings.dtype != "auto" else "f32" if alone else "bf16"
    lineage = merged_lineage(loaded.path, loaded.lineage) if is_adapter(loaded.path) and not alone else loaded.lineage
    card = card_of(loaded, lineage, output, dtype, settings.license, settings.base_model, console)
    if alone:
        export_hf_adapter(loaded.path, lineage, output, dtype, model_card(card), card.base_name, settings.overwrite)
    else:
        told = (loaded.model, loaded.tokenizer, lineage, output, dtype, model_card(card))
        export_hf(*told, shard_bytes, settings.overwrite)
    weights = sorted(output.glob("*.safetensors"))
    size = f"{sum(path.stat().st_size for path in weights) / 1e6:,.1f} MB of weights in {dtype}"
    console.print(f"{loaded.path} written to {output}: {size}, {len(weights)} file{'s' * (len(weights) > 1)}")
    print_next(console, f"upload it with your own account: hf upload {card.repository} {quote(str(output))}")


def _report(console: Console, model: Path, output: Path, written: Written) -> None:
    """What was written, and what is not in the type that was asked for."""
    tensors = ", ".join(f"{count} tensors in {kind}" for kind, count in written.tensors.items())
    console.print(f"{model} written to {output}: {written.num_bytes / 1e6:,.1f} MB, {tensors}")
    if written.kept:
        console.print(
            f"{written.kept} matrices are in a wider type than asked for: their rows are no multiple of 32 numbers, or "
            "hold numbers too large for it"
        )
    if written.unused:
        console.print(f"{written.unused} entries of the model have no token; they are named [PAD...] and unused")


def _instead(model: Path) -> str:
    """How other programs get the model without an export."""
    if is_adapter(model):
        return f"run tinylm merge --model_path {quote(str(model))}, whose result transformers opens unconverted"
    code = f'from transformers import pipeline; print(pipeline("text-generation", {json.dumps(str(model))})("Once"))'
    return (
        f"transformers opens the folder unconverted: python -c {quote(code)}; for a .pth, pretrain a model with "
        "--qk_norm false --preset small"
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
