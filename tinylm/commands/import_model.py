"""Take in a model of another maker: a Hugging Face folder or a GGUF becomes a model folder for every command.

    tinylm import SmolLM2-135M --output_dir out/imported
    tinylm import SmolLM2-135M-Instruct.Q4_1.gguf --output_dir out/imported

The weights are kept in float32, the tokenizer and the chat template as they are. Nothing in the folder is run.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from tinylm.checkpoint.gguf_model import open_gguf
from tinylm.checkpoint.lineage import facts_of
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.checkpoint.model_path import CONFIG, is_adapter
from tinylm.commandline.exit_status import run_main
from tinylm.commandline.settings import model_first, parse_settings
from tinylm.commandline.terminal import make_console, print_next
from tinylm.files.atomic import require_new
from tinylm.files.untrusted import check_file, read_json, shown
from tinylm.model.config import TinyLMConfig
from tinylm.model.hf_config import unused_fields
from tinylm.model.weights import weights_fingerprint
from tinylm.system.code_version import code_version
from tinylm.tokenizer.chat_template import CHAT_TEMPLATE, chat_fault
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.tokenizer.tokenizer_settings import TokenizerSettings

HUB = "hub:"
_FILES = ["*.json", "*.safetensors", "*.jinja", "README.md"]
_OTHER_FORMATS = (".bin", ".pth", ".pt", ".gguf", ".model")
_CARD_BYTES = 1 << 16
_LICENCE = re.compile(r"^license:\s*['\"]?([\w.+-]{1,60})", flags=re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """Settings of importing."""

    model_path: str
    """a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3), a .gguf file, or hub:owner/name to download a folder"""
    output_dir: str = "out/imported"
    """folder for the model"""
    chat_template: Literal["theirs", "chatml"] = "theirs"
    """theirs: the folder's own; chatml: this project's, for a tokenizer that has <|im_start|> and <|im_end|>"""
    tokenizer_path: str | None = None
    """tokenizer folder, for a folder that has no tokenizer.json"""
    overwrite: bool = False
    """replace the model in output_dir"""


def main(argv: list[str]) -> int:
    """The command line: check, load, save."""
    settings = parse_settings(ImportSettings, model_first(argv), "tinylm import", "Take in a model of another maker.")
    output, console = Path(settings.output_dir), make_console()
    require_new(output / CONFIG, settings.overwrite, "output_dir")
    folder = _folder_of(settings.model_path)
    if output.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(f"output_dir {output} is the folder to import, or holds it; choose another --output_dir")
    for notice in notices(folder):
        console.print(notice)
    model, tokenizer, theirs = load_model(folder, tokenizer_path=settings.tokenizer_path)
    tokenizer = with_template(tokenizer, settings.chat_template)
    if reason := no_chats(tokenizer):
        console.print(reason)
    facts = theirs if folder.is_file() else facts_of(theirs)
    lineage = {
        "stage": "imported",
        **facts,
        "parent": {"path": str(folder), "stage": None, "weights": weights_fingerprint(model)},
        "source": settings.model_path,
        "licence": facts.get("licence") or licence_of(folder),
        "document_start": facts.get("document_start", bool(tokenizer.text_start)),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        **code_version(),
    }
    model.config = with_their_tokens(model.config, tokenizer, folder)
    save_model(output, model, tokenizer, lineage)
    console.print(f"{settings.model_path}: {model.num_parameters():,} parameters written to {output}")
    print_next(console, f"talk to it: tinylm chat --model_path {quote(str(output))}")
    return 0


def _folder_of(source: str) -> Path:
    """The folder or GGUF to import, downloaded if it is `hub:owner/name`."""
    if source.startswith(HUB):
        return _download(source.removeprefix(HUB))
    folder = Path(source)
    if not folder.exists():
        raise FileNotFoundError(f"{source} does not exist; expected a Hugging Face folder, .gguf or hub:owner/name")
    if folder.is_file() and folder.suffix == ".gguf":
        return folder
    if not (folder / CONFIG).is_file():
        found = "an adapter: import its base model" if is_adapter(folder) else "no Hugging Face folder"
        raise ValueError(f"{source} is {found}; expected a folder with {CONFIG} and safetensors files, or a .gguf")
    return folder


def _download(name: str) -> Path:
    if name.count("/") != 1:
        raise ValueError(f"hub:{shown(name)} is not a name on the hub; expected hub:owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"hub:{name} needs huggingface_hub; pip install huggingface_hub, or give a folder") from None
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # offline, unknown, gated: each version has its own classes
        reason = shown(" ".join(str(error).split()), 200)
        raise ValueError(f"hub:{name} cannot be downloaded ({reason}); give the folder of a copy instead") from None


def notices(folder: Path) -> list[str]:
    """What in the folder is not used, one line each."""
    if folder.is_file():
        unused = open_gguf(folder).unused
        return [f"not used: {len(unused)} keys ({', '.join(map(shown, unused[:8]))})"] if unused else []
    data = read_json(folder / CONFIG)
    found = []
    code = sorted(path.name for path in folder.glob("*.py"))
    if code or "auto_map" in data:
        found.append(f"not run: the folder's own code ({', '.join(map(shown, code)) or 'auto_map in config.json'})")
    if unused := unused_fields(data):
        found.append(f"not used: {len(unused)} fields of config.json ({', '.join(map(shown, unused))})")
    other = [path.name for path in sorted(folder.iterdir()) if path.suffix in _OTHER_FORMATS]
    if other:
        found.append(f"not read: {', '.join(map(shown, other))}")
    return found


def no_chats(tokenizer: Tokenizer) -> str:
    """Why the model cannot be talked to, in one line; empty if it can."""
    if not tokenizer.can_chat:
        return "there is no chat template and no <|im_start|>: the model continues texts and cannot be tuned on chats"
    fault = chat_fault(tokenizer)
    advice = "; --chat_template chatml takes this project's" if tokenizer.has_chat_tokens else ""
    return f"warning: {fault}{advice}" if fault else ""


def with_template(tokenizer: Tokenizer, chat_template: str) -> Tokenizer:
    """The tokenizer with the chat template that was asked for."""
    if chat_template == "theirs":
        return tokenizer
    if not tokenizer.has_chat_tokens:
        raise ValueError("chat_template is chatml, but the tokenizer has no <|im_start|> and <|im_end|>; leave it out")
    config = tokenizer.settings.config if tokenizer.settings else {}
    return Tokenizer(tokenizer.definition, TokenizerSettings(config, CHAT_TEMPLATE))


def with_their_tokens(config: TinyLMConfig, tokenizer: Tokenizer, folder: Path) -> TinyLMConfig:
    """The config with the tokens of start, end and padding that tokenizer, config and generation_config.json name."""
    path = folder / "generation_config.json"
    stated = read_json(path).get("eos_token_id") if path.is_file() else None
    several = stated if isinstance(stated, list) else [stated]
    ends = [tokenizer.eos_id, *config.eos_token_ids, *(i for i in several if type(i) is int)]
    known = list(dict.fromkeys(i for i in ends if 0 <= i < config.vocab_size))
    eos: Any = known if len(known) > 1 else known[0]
    return dataclasses.replace(config, **{**tokenizer.role_ids, "eos_token_id": eos})


def licence_of(folder: Path) -> str | None:
    """The licence that the head of the folder's README.md states; None if it states none."""
    card = folder / "README.md"
    if not card.exists():
        return None
    check_file(card, "a model card is expected there")
    with card.open("rb") as file:
        text = file.read(_CARD_BYTES).decode("utf-8", errors="replace")
    parts = text.split("---\n")
    found = _LICENCE.search(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
    return found[1] if found else None


if __name__ == "__main__":
    sys.exit(run_main(main))
