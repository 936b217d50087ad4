"""Every kind of bad input, through the command line: one line that says what, where and what to do; nothing written.

Status 2 is for the user's mistakes, 1 for what fails while running. `OUT` in a command is the output folder: it holds
a user's file already, and must hold exactly that afterwards.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import signal
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tinylm import cli
from tinylm.checkpoint import weights_file
from tinylm.checkpoint.adapter_folder import save_adapter
from tinylm.checkpoint.model_folder import load_model, save_model
from tinylm.model.lora import LoRAConfig, apply_lora, has_lora, lora_parameters, merge_lora
from tinylm.model.model_tinylm import TinyLMConfig, TinyLMForCausalLM
from tinylm.model.weights import weights_fingerprint
from tinylm.tokenizer.tokenizer import Tokenizer

TEXT = "The cat sat on the mat and the dog saw a big red barn near the lake. "
CHAT = {"messages": [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day"}]}
PAIR = {"prompt": "Hello there", "chosen": "Good day", "rejected": "Go away"}
TRAIN = "--device cpu --dtype float32 --batch_size 2 --max_steps 1 --output_dir OUT"
SHAPE = "--hidden_size 32 --num_hidden_layers 1 --num_attention_heads 4 --num_key_value_heads 2 --max_seq_len 32"
PRETRAIN = f"pretrain --tokenizer_path tok {SHAPE} {TRAIN} --data_path"
ON_TINYWORLD = PRETRAIN.replace("--data_path", "--tinyworld_documents 1")
SFT, LORA, DPO = (f"{stage} --model_path base {TRAIN} --data_path" for stage in ("sft", "lora", "dpo"))
CHAT_WITH = "chat --device cpu --dtype float32 --prompt hello --max_new_tokens 2 --model_path"
EVAL = "eval --device cpu --dtype float32 --output OUT/r.json --model_path base --data_path"
TOKENIZER = "tokenizer --vocab_size 300 --output_dir OUT --data_path"
MERGE, EXPORT = "merge --output_dir OUT --model_path", "export --output OUT/m.pth --model_path"


class _RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def _write_rows(folder: Path) -> None:
    """Data files, good and bad."""
    text, chat, pair = (json.dumps(row) for row in ({"text": TEXT}, CHAT, PAIR))
    no_answer = json.dumps({"messages": CHAT["messages"][:1]})
    files = {
        "good.txt": TEXT * 20,
        "good.c.jsonl": f"{chat}\n" * 4,
        "good.p.jsonl": f"{pair}\n" * 4,
        "empty.txt": "",
        "empty.jsonl": "",
        "blank.txt": "\n \n",
        "list.json": "[]",
        "half.json": '[{"text": "a"}, {"te',
        "deep.json": "[" * 100_000,
        "deep.jsonl": "[" * 100_000,
        "number.jsonl": '{"text": ' + "9" * 5000 + "}",
        "surrogate.jsonl": '{"text": "\\ud800"}',
        "object.json": '{"rows": {"text": "é"}}',
        "half.t.jsonl": f"{text}\n{text[:20]}\n{text}\n",
        "half.c.jsonl": f"{chat}\n{chat[:20]}\n{chat}\n",
        "half.p.jsonl": f"{pair}\n{pair[:20]}\n{pair}\n",
        "type.t.jsonl": '{"text": 5}',
        "type.c.jsonl": '{"messages": "hello"}',
        "type.p.jsonl": '{"prompt": 1, "chosen": 2, "rejected": 3}',
        "rows.jsonl": "[1]",
        "role.c.jsonl": chat.replace("user", "robot"),
        "none.c.jsonl": '{"messages": []}',
        "unanswered.c.jsonl": no_answer,
        "same.p.jsonl": json.dumps({**PAIR, "rejected": "Good day"}),
        "table.csv": "a,b",
        "many.t.jsonl": f"{text}\n" * 1000 + '{"x"\n' * 2,
        "gold.jsonl": '{"query": "a", "choices": ["x", "y"], "gold": 7}',
        "fields.jsonl": '{"foo": 1}',
        "half.yaml": "epochs: [1\nb: }",
        "typo.yaml": "command: pretrain\nepochs: 1\nlerning_rate: 1\n",
        "type.yaml": "command: pretrain\nepochs: two\n",
        "other.yaml": "command: sft\n",
        "null.yaml": "command: pretrain\nepochs: null\n",
        "file": "precious",
        "junk.pth": "hello",
        "empty.pth": "",
        "nodata/x.csv": "a",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    packed = gzip.compress(f"{text}\n".encode() * 50)
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "latin.jsonl").write_bytes('{"text": "café"}'.encode("latin-1"))
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "plain.jsonl.gz").write_text(text)
    pq.write_table(pa.table({"body": ["a", "b"]}), folder / "column.parquet")
    undecodable = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": undecodable}), folder / "latin.parquet")
    (folder / "cut.parquet").write_bytes((folder / "column.parquet").read_bytes()[:100])
    (folder / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(folder / "pipe.txt")


def _write_models(folder: Path) -> None:
    """A base model, an adapter, and what may be wrong with them."""
    tokenizer = Tokenizer.train([TEXT], 300)
    tokenizer.save(folder / "tok")
    config = TinyLMConfig(tokenizer.vocab_size, 32, None, 1, 4, 2, max_position_embeddings=32)
    torch.manual_seed(0)
    base, other = TinyLMForCausalLM(config), TinyLMForCausalLM(config)
    save_model(folder / "base", base, tokenizer, {"stage": "full_sft"})
    save_model(folder / "other", other, tokenizer, {"stage": "pretrain"})
    apply_lora(base, LoRAConfig(rank=2))
    for parameter in lora_parameters(base):
        torch.nn.init.normal_(parameter)
    save_adapter(base, folder / "adapter", "../base", {"stage": "lora"})

    def broken(name: str, source: str = "base") -> Path:
        shutil.copytree(folder / source, folder / name)
        (folder / name / "manifest.json").unlink(missing_ok=True)  # the file itself is at fault, not a later change
        return folder / name

    def reconfigured(name: str, source: str = "base", file: str = "config.json", **values: object) -> None:
        path = broken(name, source) / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def with_header(name: str, header: bytes) -> None:
        content = struct.pack("<Q", len(header)) + header
        (broken(name) / "model.safetensors").write_bytes(content)

    weights = (folder / "base/model.safetensors").read_bytes()
    (broken("m.cut") / "model.safetensors").write_bytes(weights[:5000])
    (broken("m.huge") / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    with_header("m.deep", b"[" * 100_000)
    with_header("m.infinite", b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 0]}}')
    (broken("m.unweighted") / "model.safetensors").unlink()
    (broken("m.unconfigured") / "config.json").unlink()
    (broken("m.wordless") / "tokenizer.json").unlink()
    (broken("m.json") / "config.json").write_text("{")
    (broken("m.deepconfig") / "config.json").write_text("[" * 100_000)
    reconfigured("m.wide", hidden_size=64)
    reconfigured("m.heads", num_attention_heads=5, head_dim=None)
    reconfigured("m.vast", vocab_size=10**12)
    reconfigured("m.rope", rope_parameters=5)
    reconfigured("m.eos", eos_token_id=[[]])
    reconfigured("m.kind", model_type="gpt2")
    tensors = load_file(folder / "base/model.safetensors")
    save_file({k: t * float("nan") for k, t in tensors.items()}, broken("m.nan") / "model.safetensors")
    save_file({k: t.to(torch.int64) for k, t in tensors.items()}, broken("m.whole") / "model.safetensors")
    reconfigured("m.tied", tie_word_embeddings="no")
    adapter = load_file(folder / "adapter/adapter_model.safetensors")
    save_file(
        {k: t.to(torch.int64) for k, t in adapter.items()}, broken("a.whole", "adapter") / "adapter_model.safetensors"
    )
    reconfigured("a.number", "adapter", "adapter_config.json", base_model_name_or_path=5)
    reconfigured("roomy", max_position_embeddings=128)
    reconfigured("short", max_position_embeddings=16)
    shutil.copytree(folder / "base", folder / "runs/full_sft_32_epoch0")
    reconfigured("a.roomy", "adapter", "adapter_config.json", base_model_name_or_path="../roomy")
    reconfigured("a.lost", "adapter", "adapter_config.json", base_model_name_or_path="nowhere")
    reconfigured("a.astray", "adapter", "adapter_config.json", base_model_name_or_path="../other")
    reconfigured("a.rank", "adapter", "adapter_config.json", r=4)
    reconfigured("a.alpha", "adapter", "adapter_config.json", lora_alpha=None)
    torch.save({"a": _RunsCode()}, folder / "code.pth")
    (folder / "pickle.pth").write_bytes(pickle.dumps(_RunsCode()))
    torch.save({"model.embed_tokens.weight": torch.ones(2)}, folder / "flat.pth")
    (folder / "cut.pth").write_bytes((folder / "flat.pth").read_bytes()[:300])
    definition = json.loads((folder / "tok/tokenizer.json").read_text())
    (folder / "t.cut").mkdir()
    (folder / "t.cut/tokenizer.json").write_text(json.dumps(definition)[:500])
    del definition["model"]["vocab"]["!"]
    (folder / "t.byte").mkdir()
    (folder / "t.byte/tokenizer.json").write_text(json.dumps(definition))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    _write_rows(folder)
    _write_models(folder)
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything under `folder`: of files size and time of change, so that one written again is seen too.

    But for token shards: those of a corpus that is refused for its bad rows stay, and need not be made again.
    """
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    for meta in folder.rglob("token_shards/*/meta.json"):
        for path in (meta.parents[1], meta.parent, *meta.parent.iterdir()):
            found.pop(path.relative_to(folder).as_posix(), None)
    files = {name: path.lstat() for name, path in found.items() if not path.is_dir()}
    folders = dict.fromkeys(found.keys() - files.keys(), (0, 0))
    return folders | {name: (status.st_size, status.st_mtime_ns) for name, status in files.items()}


@pytest.fixture
def run(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command that must fail; returns the line it leaves after checking that it left nothing else."""
    monkeypatch.chdir(inputs)
    out = tmp_path / "out"
    terminated = signal.getsignal(signal.SIGTERM)

    def fail(command: str, status: int = 2) -> str:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        before = snapshot(tmp_path), snapshot(inputs)
        try:
            found = cli.main([word.replace("OUT", str(out)) for word in command.split()])
        except SystemExit as stop:
            found = stop.code
        printed = capsys.readouterr()
        assert found == status, printed.err
        assert printed.err.count("\n") == 1 and printed.err.startswith("tinylm"), printed.err
        assert "Traceback" not in printed.err
        assert (snapshot(tmp_path), snapshot(inputs)) == before
        return printed.err

    yield fail
    signal.signal(signal.SIGTERM, terminated)


# A command, and words of its one line: what is wrong, where, what to do.
CASES: dict[str, tuple[str, ...]] = {
    # files of text
    f"{PRETRAIN} nosuch.txt": ("nosuch.txt", "no such file", "check the path"),
    f"{PRETRAIN} good.txt --validation_path nosuch": ("nosuch", "no such file", "check the path"),
    f"{PRETRAIN} empty.txt": ("empty.txt", "is empty", "check the path"),
    f"{PRETRAIN} blank.txt": ("blank.txt", "no rows", "check the file"),
    f"{PRETRAIN} latin.txt": ("latin.txt, line 1", "not UTF-8", "convert"),
    f"{PRETRAIN} half.t.jsonl": ("half.t.jsonl, line 2", "1 of 3 rows", "correct the data", "--max_bad_rows"),
    f"{PRETRAIN} many.t.jsonl": ("many.t.jsonl, line 1001, 1002", "2 of 1002 rows", "--max_bad_rows"),
    f"{PRETRAIN} number.jsonl": ("number.jsonl, line 1", "not JSON", "correct the data"),
    f"{PRETRAIN} deep.json": ("deep.json", "not JSON", "expected a list of objects"),
    f"{PRETRAIN} latin.parquet": ("latin.parquet", "parquet", "download it again"),
    f"{PRETRAIN} column.parquet": ("column.parquet, line 1, 2", "body", 'expected {"text"}', "rename"),
    f"{PRETRAIN} cut.parquet": ("cut.parquet", "parquet", "download it again"),
    f"{PRETRAIN} cut.jsonl.gz": ("cut.jsonl.gz", "damaged", "fetch it again"),
    f"{PRETRAIN} loop.txt": ("loop.txt", "no such file", "check the path"),
    f"{PRETRAIN} pipe.txt": ("pipe.txt", "neither a file nor a folder", "write the data to a file"),
    f"{PRETRAIN} nodata": ("nodata", "no data file", "expected .txt"),
    f"{PRETRAIN} s5://bucket/a.txt": ("s5://bucket/a.txt", "unknown kind of address", "expected s3://"),
    f"{PRETRAIN} @nosuch.txt": ("@nosuch.txt", "no such file", "expected a list of paths", "check the path"),
    f"{PRETRAIN} good.txt,nosuch.txt": ("nosuch.txt", "no such file", "check the path"),
    f"{PRETRAIN} good.txt,": ("data path ''", "expected a file"),
    f"{PRETRAIN} hub:": ("hub:", "no data set named", "expected hub:owner/name"),
    f"{TOKENIZER} nosuch.txt": ("nosuch.txt", "no such file", "check the path"),
    f"{TOKENIZER} empty.jsonl": ("empty.jsonl", "is empty", "check the path"),
    f"{TOKENIZER} list.json": ("list.json", "no rows", "check the file"),
    f"{TOKENIZER} latin.jsonl": ("latin.jsonl, line 1", "not UTF-8", "correct the data"),
    f"{TOKENIZER} type.t.jsonl": ("type.t.jsonl, line 1", "text is of type int", "expected a string"),
    f"{TOKENIZER} rows.jsonl": ("rows.jsonl, line 1", "a list", "expected a JSON object"),
    f"{TOKENIZER} surrogate.jsonl": ("surrogate.jsonl, line 1", "half a surrogate pair", "expected valid Unicode"),
    f"{TOKENIZER} deep.jsonl": ("deep.jsonl, line 1", "not JSON", "correct the data"),
    f"{TOKENIZER} half.json": ("half.json", "not JSON", "use .jsonl"),
    f"{TOKENIZER} object.json": ("object.json", "an object with the fields rows", "leave only the list of records"),
    f"{TOKENIZER} plain.jsonl.gz": ("plain.jsonl.gz", "gzip", "fetch it again"),
    f"{TOKENIZER} table.csv": ("table.csv", "unknown kind of file", "convert or rename"),
    f"{TOKENIZER} good.txt --vocab_size 10": ("vocab_size is 10", "expected 272", "--vocab_size"),
    # chats and preferences
    f"{SFT} half.c.jsonl": ("half.c.jsonl, line 2", "1 of 3 rows", "--max_bad_rows"),
    f"{SFT} type.c.jsonl": ("type.c.jsonl, line 1", "messages is of type str", "expected a list"),
    f"{SFT} role.c.jsonl": ("role.c.jsonl, line 1", "the role 'robot'", "expected one of system, user"),
    f"{SFT} none.c.jsonl": ("none.c.jsonl, line 1", "messages is empty", "expected at least one"),
    f"{SFT} unanswered.c.jsonl": ("unanswered.c.jsonl, line 1", "no assistant message", "expected at least one"),
    f"{SFT} good.p.jsonl": ("good.p.jsonl, line 1", "the fields chosen, prompt, rejected", "expected"),
    f"{LORA} column.parquet": ("column.parquet, line 1, 2", "the fields body", "expected"),
    f"{LORA} empty.jsonl": ("empty.jsonl", "is empty", "check the path"),
    f"{DPO} half.p.jsonl": ("half.p.jsonl, line 2", "1 of 3 rows", "--max_bad_rows"),
    f"{DPO} type.p.jsonl": ("type.p.jsonl, line 1", "chosen is of type int", "expected"),
    f"{DPO} good.c.jsonl": ("good.c.jsonl, line 1", "the fields messages", "expected"),
    # what eval reads
    f"{EVAL} nosuch.txt": ("nosuch.txt", "no such file", "check the path"),
    f"{EVAL} half.t.jsonl": ("half.t.jsonl, line 2", "not JSON", "correct the row"),
    f"{EVAL} unanswered.c.jsonl": ("unanswered.c.jsonl, line 1", "no assistant message", "correct the row"),
    f"{EVAL} fields.jsonl": ("fields.jsonl, line 1", "fields foo", "rename the fields"),
    f"{EVAL} gold.jsonl": ("gold.jsonl, line 1", "gold", "expected"),
    f"{EVAL} good.txt --tasks foo": ("task 'foo'", "expected skills", "--tasks"),
    f"{EVAL} good.txt --tasks chat": ("good.txt", "no data for chat", "leave out --tasks"),
    f"{EVAL} good.txt --adapter nosuch": ("nosuch does not exist", "does not exist"),
    f"{EVAL} good.txt --limit 0": ("limit 0", "at least 1", "--limit"),
    # models
    f"{CHAT_WITH} nosuch": ("nosuch", "does not exist", "give a model folder"),
    f"{CHAT_WITH} nodata": ("nodata", "no model", "give the path of a model"),
    f"{CHAT_WITH} file": ("file is a file without an ending", "give its folder"),
    f"{CHAT_WITH} m.cut": ("m.cut/model.safetensors", "5000 bytes", "copy or save it again"),
    f"{CHAT_WITH} m.huge": ("m.huge/model.safetensors", "cut short", "copy or save it again"),
    f"{CHAT_WITH} m.deep": ("m.deep/model.safetensors", "header", "copy or save it again"),
    f"{CHAT_WITH} m.infinite": ("m.infinite/model.safetensors", "header", "copy or save it again"),
    f"{CHAT_WITH} m.unweighted": ("m.unweighted/model.safetensors", "does not exist", "expected"),
    f"{CHAT_WITH} m.wordless": ("m.wordless", "no tokenizer.json", "--tokenizer_path"),
    f"{CHAT_WITH} m.json": ("m.json/config.json", "not valid JSON", "repair it"),
    f"{CHAT_WITH} m.deepconfig": ("m.deepconfig/config.json", "not valid JSON", "repair it"),
    f"{CHAT_WITH} m.wide": ("m.wide/model.safetensors", "another shape", "check that both"),
    f"{CHAT_WITH} m.heads": ("m.heads/config.json", "not divisible by num_attention_heads 5", "choose"),
    f"{CHAT_WITH} m.vast": ("m.vast/model.safetensors", "its config implies", "check that both"),
    f"sft --model_path short {TRAIN} --data_path good.c.jsonl": ("up to 16 tokens", "needs 32", "pretrain with"),
    f"{SFT.replace('OUT', 'runs').replace('base', 'runs')} good.c.jsonl": (
        "would overwrite its parent",
        "choose another --output_dir",
    ),
    f"{CHAT_WITH} m.rope": ("m.rope/config.json", "wrong type", "correct it"),
    f"{CHAT_WITH} m.eos": ("m.eos/config.json", "eos_token_id", "must be a whole number"),
    f"{CHAT_WITH} m.kind": ("m.kind/config.json", "'gpt2' is not supported", "expected llama"),
    f"{CHAT_WITH} m.nan": ("NaN", "weights are damaged", "use another checkpoint"),
    f"{CHAT_WITH} m.whole": ("m.whole/model.safetensors", "of type int64", "expected floating-point", "save the model"),
    f"{CHAT_WITH} m.tied": ("m.tied/config.json", "tie_word_embeddings is 'no'", "must be true or false"),
    f"{CHAT_WITH} a.whole": ("a.whole/adapter_model.safetensors", "of type int64", "expected floating-point"),
    f"{CHAT_WITH} a.number": ("a.number/adapter_config.json", "of type int", "expected a string"),
    f"{CHAT_WITH} a.lost": ("a.lost/adapter_config.json", "nowhere", "correct base_model_name_or_path"),
    f"{CHAT_WITH} a.astray": ("a.astray was trained on", "its own base model"),
    f"{CHAT_WITH} a.rank": ("a.rank/adapter_model.safetensors", "another shape", "check that both"),
    f"{CHAT_WITH} a.alpha": ("a.alpha/adapter_config.json", "alpha is None", "must be a number"),
    f"{CHAT_WITH} other --adapter adapter": ("adapter was trained on", "its own base model"),
    f"{CHAT_WITH} code.pth": ("code.pth", "could run code", "save only the state_dict"),
    f"{CHAT_WITH} pickle.pth": ("pickle.pth", "could run code", "save only the state_dict"),
    f"{CHAT_WITH} cut.pth": ("cut.pth", "damaged", "save it again"),
    f"{CHAT_WITH} empty.pth": ("empty.pth", "damaged", "save it again"),
    f"{CHAT_WITH} flat.pth": ("flat.pth", "not matrices", "expected the original project's tensors"),
    f"{CHAT_WITH} base --temperature -1": ("temperature is -1", "accepted is 0"),
    f"{CHAT_WITH} base --top_p 1.5": ("top_p is 1.5", "accepted is 0 to 1"),
    f"{CHAT_WITH} base --max_seq_len 33": ("max_seq_len is 33", "context of 32 tokens", "leave it out"),
    f"sft --model_path m.cut --data_path good.c.jsonl {TRAIN}": ("m.cut/model.safetensors", "save it again"),
    f"dpo --model_path junk.pth --data_path good.p.jsonl {TRAIN}": ("junk.pth", "damaged", "save it again"),
    f"lora --model_path adapter --data_path good.c.jsonl {TRAIN}": ("adapter is an adapter", "tinylm merge"),
    f"{SFT} good.c.jsonl --max_seq_len 33": ("max_seq_len is 33", "up to 32 tokens", "--max_seq_len 32 or less"),
    f"{MERGE} base": ("base is a full model", "expected an adapter folder"),
    f"{MERGE} adapter": ("OUT", "holds other files", "choose another folder"),
    f"{MERGE} adapter --output_dir base": ("base is the adapter's base model", "choose another --output_dir"),
    f"{MERGE} adapter --output_dir other/../adapter": ("adapter is the adapter's base", "the adapter itself", "choose"),
    f"{MERGE} a.lost": ("a.lost/adapter_config.json", "nowhere", "correct base_model_name_or_path"),
    f"{EXPORT} m.unconfigured": ("m.unconfigured", "no config.json", "copy the config"),
    "export --output nodata --model_path base": ("nodata is a folder", "expected a file name", "choose another"),
    # tokenizers
    f"{PRETRAIN} good.txt --tokenizer_path nosuch": ("no tokenizer at nosuch", "expected a folder"),
    f"{PRETRAIN} good.txt --tokenizer_path t.cut": ("t.cut/tokenizer.json", "not valid JSON", "expected"),
    f"{PRETRAIN} good.txt --tokenizer_path t.byte": ("t.byte/tokenizer.json", "has no token", "expected byte-level"),
    f"{TOKENIZER} good.txt --vocab_size 300000": ("vocab_size is 300000", "to 262,144", "--vocab_size 6400"),
    f"{TOKENIZER} good.txt --digits both": ("digits is 'both'", "expected one of split, grouped"),
    f"{TOKENIZER} good.txt --special_tokens nosuch.txt": (
        "special_tokens is 'nosuch.txt'",
        "neither a file nor a name",
        "expected names",
    ),
    f"{TOKENIZER} good.txt --special_tokens <a>,<a>": ("special token 2 of 2 is '<a>'", "named before", "each once"),
    f"{TOKENIZER} good.txt --special_tokens <a>,,<b>": ("special token 2 of 3 is ''", "is empty", "expected names"),
    f"{TOKENIZER} good.txt --special_tokens <|im_end|>": ("'<|im_end|>'", "exists already", "expected names"),
    f"{TOKENIZER} good.txt --special_tokens <ü": (r"'<\xfc'", "not one name in < > or [ ]", "expected names"),
    f"{TOKENIZER} good.txt --vocab_size 273 --special_tokens <a>,<b>": ("vocab_size 273", "expected 274"),
    f"{TOKENIZER} good.txt --tokenizer_path tok": ("--output_dir is for training", "nothing is trained", "leave one"),
    "tokenizer --data_path good.txt --tokenizer_path tok --digits grouped": ("--digits is for training", "leave one"),
    "tokenizer --data_path good.txt --tokenizer_path nosuch": ("no tokenizer at nosuch", "expected a folder"),
    "tokenizer --data_path nosuch --tokenizer_path tok": ("nosuch", "no such file", "check the path"),
    "tokenizer --data_path good.txt --tokenizer_path tok --output nodata": ("output is 'nodata', a folder",),
    "tokenizer --tokenizer_path tok --report_by language_id": ("report_by names a field", "leave it out"),
    # settings
    f"{ON_TINYWORLD} --hidden_size 30": (
        "hidden_size 30",
        "not divisible",
        "or a hidden_size of 32",
    ),
    f"{PRETRAIN} good.txt --hidden_size 30": ("hidden_size 30", "not divisible", "or a hidden_size of 32"),
    f"{PRETRAIN} good.txt --max_seq_len 1": ("max_seq_len is 1", "expected at least 2", "--max_seq_len 2"),
    f"{SFT} good.c.jsonl --max_seq_len -1": ("max_seq_len is -1", "expected at least 0"),
    f"{PRETRAIN} good.txt --grad_clip -1": ("grad_clip is -1", "expected at least 0", "--grad_clip 0"),
    f"{PRETRAIN} good.txt --output_dir=": ("output_dir is empty", "expected the path of a folder"),
    f"{TOKENIZER} good.txt --output_dir=": ("output_dir is empty", "expected the path of a folder"),
    f"{TOKENIZER} good.txt --max_bytes 0": ("max_bytes is 0", "expected at least 1", "--max_bytes 1"),
    f"{TOKENIZER} good.txt --max_bytes -1": ("max_bytes is -1", "expected at least 1"),
    f"{TOKENIZER} good.txt --max_bad_rows 2": ("max_bad_rows is 2", "from 0 to below 1"),
    f"{TOKENIZER.removesuffix(' --data_path')} --tinyworld_documents 0": ("tinyworld_documents is 0", "at least 1"),
    f"{PRETRAIN.removesuffix(' --data_path')} --tinyworld_documents 0": ("tinyworld_documents is 0", "at least 1"),
    f"{SFT.removesuffix(' --data_path')} --tinyworld_chats 0": ("tinyworld_chats is 0", "at least 1"),
    f"{LORA.removesuffix(' --data_path')} --tinyworld_chats -1": ("tinyworld_chats is -1", "at least 1"),
    f"{DPO.removesuffix(' --data_path')} --tinyworld_pairs 0": ("tinyworld_pairs is 0", "at least 1"),
    f"{PRETRAIN} good.txt --dtype fp16": ("float16 on cpu", "it needs CUDA", "--dtype auto"),
    f"{PRETRAIN} good.txt --device tpu": ("device 'tpu'", "expected auto", "choose one"),
    f"{PRETRAIN} good.txt --epochs 0": ("epochs is 0", "expected at least 1", "--epochs 1"),
    f"{PRETRAIN} good.txt --batch_size -3": ("batch_size is -3", "expected at least 1", "--batch_size 1"),
    f"{PRETRAIN} good.txt --epochs two": ("epochs is 'two'", "expected a whole number", "--help"),
    f"{PRETRAIN} good.txt --epochs": ("--epochs without a value", "expected a whole number"),
    f"{PRETRAIN} good.txt --lerning_rate 3": ("--lerning_rate", "did you mean --learning_rate?", "--help"),
    f"{PRETRAIN} good.txt --seed -1": ("seed -1", "from 0 to", "choose"),
    f"{PRETRAIN} good.txt --config typo.yaml": ("typo.yaml, line 3", "lerning_rate", "did you mean learning_rate?"),
    f"{PRETRAIN} good.txt --config type.yaml": ("type.yaml, line 2", "epochs is 'two'", "expected a whole number"),
    f"{PRETRAIN} good.txt --config half.yaml": ("half.yaml, line 2", "not YAML", "expected"),
    f"{PRETRAIN} good.txt --config other.yaml": ("other.yaml is for `tinylm sft`", "use tinylm run"),
    f"{PRETRAIN} good.txt --output_dir file": ("file is a file", "expected a folder", "choose another --output_dir"),
    f"{PRETRAIN} good.txt --output_dir file/out": ("file/out, but file is a file", "choose another --output_dir"),
    f"{SFT} good.c.jsonl --output_dir file": ("file is a file", "expected a folder", "choose another --output_dir"),
    f"{SFT} good.c.jsonl --output_dir loop.txt/out": ("loop.txt/out", "links form a loop", "choose another path"),
    f"{TOKENIZER} good.txt --output_dir file": ("file is a file", "expected a folder", "choose another"),
    f"{PRETRAIN} good.txt --config null.yaml": ("null.yaml, line 2", "epochs is null", "expected a whole number"),
    f"{CHAT_WITH} base --max_seq_len 1": ("the context leaves 0 for the prompt", "raise max_seq_len"),
    "run nosuch.yaml": ("no file nosuch.yaml", "check the path"),
    "run typo.yaml": ("typo.yaml, line 3", "did you mean learning_rate?"),
    "pretrian": ("unknown command 'pretrian'", "did you mean tinylm pretrain?"),
    f"{LORA} good.c.jsonl --lora_rank 0": ("rank is 0", "at least 1"),
    f"{LORA} good.c.jsonl --lora_rank 99999999999": ("lora_rank is 99999999999", "width of 32", "--lora_rank 8"),
    f"{LORA} good.c.jsonl --target_modules foo": (
        "target module 'foo'",
        "choose from q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, embed_tokens",
    ),
}


@pytest.mark.parametrize("command", CASES)
def test_bad_input_is_one_line(run, tmp_path: Path, command: str) -> None:
    line = run(command)
    for word in CASES[command]:
        assert word.replace("OUT", str(tmp_path / "out")) in line
    assert not Path("executed").exists(), "a pickle's code was run"


def test_fine_tuning_an_adapter_folds_it_in(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It once trained, and then failed on saving."""
    monkeypatch.chdir(inputs)
    rate = "--learning_rate 1e-30"  # the result is the parent, but for the adapter
    command = f"sft --model_path a.roomy --data_path good.c.jsonl {TRAIN} {rate}".replace("OUT", str(tmp_path))
    assert cli.main(command.split()) == 0
    tuned, _, _ = load_model(tmp_path)
    parent, _, _ = load_model("a.roomy")
    assert not has_lora(tuned)
    assert weights_fingerprint(tuned) != weights_fingerprint(load_model("roomy")[0])
    expected = merge_lora(parent).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tuned.state_dict().items())


def test_a_full_disk_names_the_file(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_nothing(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(weights_file, "save_file", write_nothing)
    line = run("merge --model_path adapter --output_dir OUT/new/merged", status=1)
    for word in ("model.safetensors", "No space left on device", "make room"):
        assert word in line
