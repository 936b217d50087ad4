"""What is fuzzed: each loader with a good file to damage, the way to damage it, and what a user would do with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.saved_states import save_state
from tests.fuzz.mutations import (
    NASTY,
    mutate_bytes,
    mutate_gguf,
    mutate_json,
    mutate_lines,
    mutate_pth,
    mutate_safetensors,
)
from tests.tokenizer.other_tokenizers import write_tokenizer
from tests.tokenizer.their_templates import INST, LLAMA3
from tinylm.checkpoint.adapter_folder import save_adapter
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.checkpoint.training_state import load_training_state
from tinylm.checkpoint.weights_file import read_tensors
from tinylm.commandline.settings import parse_settings
from tinylm.dataset.shards.shard_cache import cached_token_shards
from tinylm.dataset.shards.token_shards import open_shard
from tinylm.dataset.sources.records import iterate_texts, load_conversations, load_preferences
from tinylm.export.gguf import export_gguf
from tinylm.export.pth import export_pth
from tinylm.files.atomic import write_manifest
from tinylm.model.lora import LoRAConfig, apply_lora
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.tokenizer.chat_template import encode_chat
from tinylm.tokenizer.tokenizer import Tokenizer
from tinylm.trainer.train_lora import LoRASettings

TEXT = "The cat sat on the mat, and 12 dogs saw it's red.\n\n  Again! "


@dataclass(frozen=True)
class Target:
    """One file of one folder, damaged; the folder then loaded."""

    folder: str
    """the good folder, below `make_seeds`' own"""
    file: str
    """the file that is damaged, in it"""
    mutate: Callable[[Random, bytes], bytes]
    load: Callable[[Path], Any]
    """(the damaged file) -> reads it as the program does; raises ValueError or OSError, or (settings) SystemExit"""
    names_file: bool = True
    """whether every error must name the file or its folder; settings may also be wrong together, or be too few, and a
    chat template is named as the model's"""


def make_seeds(root: Path) -> None:
    """The good files: small, so that most of them is structure."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([TEXT * 20], 290)
    config = TinyLMConfig(tokenizer.vocab_size, 16, 64, 2, 2, 2, max_position_embeddings=32)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32}
    model = TinyLMForCausalLM(config)
    save_model(root / "model", model, tokenizer, {"stage": "pretrain", "parent": {"path": "x"}})
    stretched = TinyLMForCausalLM(TinyLMConfig(**{**vars(config), "rope_scaling": yarn}))
    save_model(root / "yarn", stretched, tokenizer, {})
    _save_sharded(root)
    _save_theirs(root)
    export_pth(model, root / "pth" / "model.pth")
    (root / "gguf").mkdir()
    export_gguf(model, tokenizer, {}, root / "gguf" / "model.gguf", "f32")
    tokenizer.save(root / "pth" / "model")
    apply_lora(model, LoRAConfig(rank=2, target_modules=("q_proj", "down_proj")))
    save_adapter(model, root / "adapter", "../model", {"stage": "lora", "parent": {"path": "../model"}})
    shutil.copytree(root / "model", root / "manifest")
    # A manifest's checksums would refuse the damage before a loader saw it; whoever damages on purpose leaves it out.
    for folder in ("model", "yarn", "sharded", "adapter"):
        (root / folder / "manifest.json").unlink(missing_ok=True)
    _save_shard(root, tokenizer)
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}
    state = {"step": 7, "best": None, "weights": {"a.b": torch.ones(2, 3)}, "optimizers": [{"a.b": moments}]}
    state |= {"identity": {"stage": "pretrain"}, "betas": (0.9, 0.95), "odd": {0: 1}}
    save_state(root / "state", state)
    (root / "data").mkdir()
    call = {
        "role": "assistant",
        "content": "I ask.",
        "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
    }
    chats = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "system": "Be."},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "tools": '[{"a": 1}]'},
        {"instruction": "Add", "input": "1 1", "output": "2", "history": [["a", "b"]]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, call], "tools": [{"name": "f"}]},
    ]
    pairs = [{"prompt": "Hi", "chosen": "Ho", "rejected": "No"}, {**chats[0], "chosen": "a", "rejected": "b"}]
    for name, rows in (("chats", chats), ("pairs", pairs), ("texts", [{"text": TEXT}, {"text": "é"}])):
        (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = "# a run\ncommand: lora\nepochs: 2\nlearning_rate: 1e-4\ntarget_modules: [q_proj, v_proj]\n"
    (root / "data" / "run.yaml").write_text(
        settings + 'data_path: "some: text"\nuse_compile: false\nmodel_path: base\n'
    )


def _save_sharded(root: Path) -> None:
    """The same model, its weights in two files that an index names."""
    shutil.copytree(root / "model", root / "sharded")
    tensors = load_file(root / "sharded" / "model.safetensors")
    (root / "sharded" / "model.safetensors").unlink()
    halves = {f"model-0000{n + 1}-of-00002.safetensors": sorted(tensors)[n::2] for n in range(2)}
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, root / "sharded" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in halves.items() for name in names}}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))


def _save_theirs(root: Path) -> None:
    """Two folders as others publish them, with their tokenizers and templates: Llama 3's kind and SentencePiece's."""
    for name, kind, template in (("llama3", "llama3", LLAMA3), ("sentencepiece", "llama2", INST)):
        write_tokenizer(kind, root / "tokenizers" / name)
        (root / "tokenizers" / name / "chat_template.jinja").write_text(template, encoding="utf-8")
        tokenizer = Tokenizer.load(root / "tokenizers" / name)
        stretch = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16,
                   "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
        config = TinyLMConfig(
            tokenizer.vocab_size, 16, 64, 2, 2, 2, max_position_embeddings=32, rope_scaling=stretch, qkv_bias=True
        )
        save_model(root / name, TinyLMForCausalLM(config), tokenizer, {})
        for ours in ("manifest.json", "lineage.json"):
            (root / name / ours).unlink(missing_ok=True)


def _save_shard(root: Path, tokenizer: Tokenizer) -> None:
    """Tokenised text, in the one folder that the cache makes for its file."""
    (root / "text").mkdir()
    (root / "text" / "a.jsonl").write_text(json.dumps({"text": TEXT}) + "\n" + json.dumps({"text": "a cat"}) + "\n")
    cached_token_shards(str(root / "text" / "a.jsonl"), tokenizer, root / "cache")
    (shard,) = (path for path in (root / "cache").iterdir() if path.is_dir())
    shutil.copytree(shard, root / "tokens")


def _read_shard(path: Path) -> None:
    open_shard(path.parent, Tokenizer.load(path.parent.parent / "model"))


def _read_state(path: Path) -> None:
    """With a manifest that vouches for the damage: whoever damages on purpose writes one."""
    write_manifest(path.parent)
    load_training_state(path.parent.parent)


def _run_model(path: Path) -> None:
    """Load a model, and ask it something: what was accepted must also work."""
    model, tokenizer, _ = load_model(path)
    with torch.no_grad():
        model(torch.tensor([tokenizer.encode("a cat")[: min(8, model.config.max_position_embeddings)]]))


def _read_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer.load(path.parent)
    tokenizer.decode(tokenizer.encode(TEXT * 20 + "a" * 3000))


def _chat(path: Path) -> None:
    """Load another maker's tokenizer and template, and write a chat with them."""
    encode_chat(Tokenizer.load(path.parent), CHAT)


def _read_settings(path: Path) -> None:
    parse_settings(LoRASettings, ["--config", str(path)], "tinylm lora", "")


def _read_rows(read: Callable[..., Any]) -> Callable[[Path], None]:
    return lambda path: [None for _ in read(str(path))] and None


def _rows(rng: Random, data: bytes) -> bytes:
    """One row of JSON lines changed as JSON, or the lines as text."""
    if rng.random() < 0.3:
        return mutate_lines(rng, data, _ROW_SIGNS)
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    return b"\n".join([*lines[:at], mutate_json(rng, lines[at]), *lines[at + 1 :]])


_ROW_SIGNS = [b"[", b"{", b'"', b"\\u0000", b"\\ud800", b"\0", b"\xff", b"\xef\xbb\xbf", b"9" * 400, b"NaN", b"\r"]
_YAML_SIGNS = [
    b"[", b"{", b"- ", b"? ", b": ", b"&a ", b"*a", b"!!python/object:os.system ", b"!!bool x", b"!!timestamp x",
    b"!!int 0b", b"!!set {a}", b"<<: *a", b"|\n", b"'", b'"', b"%YAML 9.9\n", b"---", b"...", b"\t", b"\0", b"\xff",
    b"9" * 400, b".inf", b".nan", b"1:2:3", b"0x_", b"null", b"~", b"lora", b"#", b"\\x1b", b"@", b"`",
    *(str(value).encode() for value in NASTY),
]  # fmt: skip

_TEMPLATE_SIGNS = [
    b"{{", b"}}", b"{%", b"%}", b"{#", b"#}", b"{%- for m in messages %}", b"{%- endfor %}", b"{%- if true %}",
    b"| trim",
    b"{{ messages }}", b"{{ cycler.__init__.__globals__ }}", b"{{ ''.__class__.__mro__ }}", b"{{ 'a' * 10**10 }}",
    b"{% include '/etc/passwd' %}", b"{% for i in range(10**9) %}x{% endfor %}", b"{{ raise_exception('no') }}",
    b"{% set ns = namespace(x=messages) %}", b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", b"\xff", b"\0",
    b"{{ messages|tojson }}", b"{% generation %}", b"{% endgeneration %}", b"{{ 9**9**9 }}", b"{% break %}",
]  # fmt: skip
CHAT = [{"role": "user", "content": "Grüß Gott"}, {"role": "assistant", "content": "a cat 12"}]

TARGETS = {
    "safetensors": Target("model", "model.safetensors", mutate_safetensors, read_tensors),
    "model weights": Target("model", "model.safetensors", mutate_safetensors, lambda path: _run_model(path.parent)),
    "config.json": Target("model", "config.json", mutate_json, lambda path: _run_model(path.parent)),
    "config.json (YaRN)": Target("yarn", "config.json", mutate_json, lambda path: _run_model(path.parent)),
    "index.json": Target("sharded", "model.safetensors.index.json", mutate_json, lambda path: _run_model(path.parent)),
    "shard": Target(
        "sharded", "model-00002-of-00002.safetensors", mutate_safetensors, lambda path: _run_model(path.parent)
    ),
    "tokenizer.json": Target("model", "tokenizer.json", mutate_json, _read_tokenizer),
    "their config.json": Target("llama3", "config.json", mutate_json, lambda path: _run_model(path.parent)),
    "their tokenizer.json": Target("llama3", "tokenizer.json", mutate_json, _read_tokenizer),
    "SentencePiece": Target("sentencepiece", "tokenizer.json", mutate_json, _read_tokenizer),
    "tokenizer_config.json": Target("sentencepiece", "tokenizer_config.json", mutate_json, _chat, False),
    "chat template": Target(
        "llama3", "chat_template.jinja", lambda rng, data: mutate_lines(rng, data, _TEMPLATE_SIGNS), _chat, False
    ),
    "adapter_config.json": Target("adapter", "adapter_config.json", mutate_json, lambda path: _run_model(path.parent)),
    "adapter weights": Target(
        "adapter", "adapter_model.safetensors", mutate_safetensors, lambda path: _run_model(path.parent)
    ),
    "lineage.json": Target("adapter", "lineage.json", mutate_json, lambda path: _run_model(path.parent)),
    "manifest.json": Target("manifest", "manifest.json", mutate_json, lambda path: _run_model(path.parent)),
    "GGUF": Target("gguf", "model.gguf", mutate_gguf, _run_model),
    ".pth": Target("pth", "model.pth", mutate_pth, _run_model),
    "token shard": Target("tokens", "meta.json", mutate_json, _read_shard),
    "token shard, offsets": Target("tokens", "offsets.bin", mutate_bytes, _read_shard),
    "training state": Target("state/step_00000007", "state.json", mutate_json, _read_state),
    "training state, tensors": Target("state/step_00000007", "state.safetensors", mutate_safetensors, _read_state),
    "YAML": Target("data", "run.yaml", lambda rng, data: mutate_lines(rng, data, _YAML_SIGNS), _read_settings, False),
    "chats": Target("data", "chats.jsonl", _rows, _read_rows(load_conversations)),
    "preferences": Target("data", "pairs.jsonl", _rows, _read_rows(load_preferences)),
    "texts": Target("data", "texts.jsonl", _rows, _read_rows(iterate_texts)),
}
