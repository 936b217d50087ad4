"""The command lines of the original project (lyuzlion/Tiny-Language-Model) work as they are typed there."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.processes import end_of, start
from tests.stage_files import write_stage_files
from tinylm.checkpoint.model_folder import load_model

SMALL = "--device cpu --max_seq_len 128 --batch_size 4 --max_steps 2 --validation_fraction 0.1"
SHAPE = "--hidden_size 32 --num_hidden_layers 1 --preset tiny --num_attention_heads 4 --num_key_value_heads 2"
TYPED = f"""
cd trainer
python train_pretrain.py --data_path ../dataset/texts.jsonl --output_dir ../out/pretrain {SHAPE} {SMALL}
python train_full_sft.py --data_path ../dataset/chats.jsonl --model_path ../out/pretrain --output_dir ../out/sft {SMALL}
python train_lora.py --data_path ../dataset/chats.jsonl --model_path ../out/sft --output_dir ../out/lora {SMALL}
python train_dpo.py --data_path ../dataset/pairs.jsonl --model_path ../out/sft --output_dir ../out/dpo {SMALL}
cd ..
python inference.py --model_path out/dpo --prompt "Hello, naïve 世界" --max_new_tokens 3 --device cpu
cd trainer
python ../inference.py --model_path ../out/lora --prompt Hello --max_new_tokens 3 --device cpu
"""


def type_in(commands: str, folder: Path) -> int:
    """Run the lines of a shell, one after the other, in this process; returns the first status that is not 0."""
    os.chdir(folder)
    for line in commands.strip().splitlines():
        command, *words = shlex.split(line)
        print(f"$ {line}", flush=True)
        if command == "cd":
            os.chdir(words[0])
            continue
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)  # as Python itself does
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                return int(end.code)
    return 0


@pytest.mark.slow
def test_every_script_runs_from_the_trainers_folder(repository: Path, tmp_path: Path) -> None:
    """In a copy of the repository, whose folder `out` is the one that `../out` means. One process runs them all."""
    clone = tmp_path / "Tiny-Language-Model"
    shutil.copytree(repository / "trainer", clone / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repository / "inference.py", clone)
    (clone / "tinylm").symlink_to(repository / "tinylm")
    (clone / "dataset").mkdir()
    write_stage_files(clone / "dataset")
    log = tmp_path / "log"
    status = end_of(start(type_in, TYPED, clone, log=log), log)
    said = log.read_text(encoding="utf-8")
    assert status == 0, said
    assert said.count("$ python") == 6 and said.count(": done") == 4, said
    parents = {"pretrain": None, "sft": "pretrain", "lora": "full_sft", "dpo": "full_sft"}
    for name, parent in parents.items():
        (lineage,) = (clone / "out" / name).glob("*_32_epoch0/lineage.json")
        facts = json.loads(lineage.read_text(encoding="utf-8"))
        assert facts["step"] == 2 and (facts["parent"] or {}).get("stage") == parent
        assert load_model(clone / "out" / name)[0].config.hidden_size == 32, "it loads from anywhere"
    assert {path.name for path in (clone / "trainer").iterdir() if path.name != "__pycache__"} == {
        path.name for path in (repository / "trainer").glob("*.py")
    }
