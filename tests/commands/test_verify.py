"""`tinylm verify`: what is right, what is wrong and what cannot be told, with status 1 for anything wrong."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import torch

from tests.checkpoint.saved_states import save_state
from tests.model.small_models import small_model
from tinylm.checkpoint.adapter_folder import save_adapter
from tinylm.checkpoint.model_folder import save_model
from tinylm.commands import verify
from tinylm.model.lora import LoRAConfig, apply_lora
from tinylm.model.weights import weights_fingerprint
from tinylm.system.code_version import code_version
from tinylm.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat; the dog sat on the log. " * 20], vocab_size=280)


def seeded_model(seed: int = 0):
    torch.manual_seed(seed)
    return small_model()


@pytest.fixture
def family(tmp_path, tokenizer):
    """A parent and a child, as two stages leave them."""
    model = seeded_model()
    facts = {"tokenizer_fingerprint": tokenizer.fingerprint, **code_version()}
    save_model(tmp_path / "parent", model, tokenizer, {"stage": "pretrain", "parent": None, **facts})
    parent = {"path": str(tmp_path / "parent"), "weights": weights_fingerprint(model)}
    lineage = {"stage": "full_sft", "parent": parent, "step": 7, "epoch": 0, "finished": True, "seed": 3, **facts}
    settings = {"data_path": "größe/two chats.jsonl", "max_steps": 0, "beta1": 0.9, "target_modules": ["q", "v"]}
    settings |= {"use_compile": True, "resume": True, "tensorboard": False, "name": None}
    lineage |= {"data_fingerprint": "abc", "settings": settings}
    save_model(tmp_path / "child", seeded_model(), tokenizer, lineage)
    return tmp_path


def findings(capsys, folder) -> tuple[int, dict[str, str], str]:
    """(exit status, mark by what was looked at, the whole text)."""
    status = verify.main([str(folder)])
    text = capsys.readouterr().out
    found = re.findall(r"^  (ok|failed|not checked) +(\S+)", text, flags=re.MULTILINE)
    marks = {what: mark for mark, what in found}
    return status, marks, text


def test_a_whole_model_and_its_lineage(family, capsys):
    status, marks, text = findings(capsys, family / "child")
    assert status == 0
    assert marks == dict.fromkeys(("files", "weights", "tokenizer", "parent", "code"), "ok")
    assert "7 steps, epoch 0, finished" in text and "größe/two chats.jsonl (fingerprint abc), seed 3" in text
    (line,) = [line for line in text.splitlines() if line.split()[0] == "settings"]
    flags = [
        "--data_path",
        "größe/two chats.jsonl",
        "--beta1",
        "0.9",
        "--target_modules",
        "q,v",
        "--use_compile",
        "true",
    ]
    assert shlex.split(line)[1:] == flags  # as a shell reads them


def test_one_step_is_one_step(family, capsys):
    path = family / "child" / "lineage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 1}))
    assert "1 step, epoch 0" in findings(capsys, family / "child")[2]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "lineage.json", "manifest.json"]
)
def test_one_flipped_bit_in_any_file_is_found(family, capsys, name):
    path = family / "child" / name
    data = bytearray(path.read_bytes())
    place = data.index(b'"') + 1 if name.endswith("json") else len(data) - 1
    data[place] ^= 1
    path.write_bytes(data)
    status, marks, _ = findings(capsys, family / "child")
    assert status == 1 and marks["files"] == "failed"


def test_a_parent_that_has_changed_or_gone(family, capsys, tokenizer):
    save_model(family / "parent", seeded_model(1), tokenizer, {})
    status, marks, text = findings(capsys, family / "child")
    assert status == 1 and marks["parent"] == "failed" and "has other weights now" in text
    shutil.rmtree(family / "parent")
    status, marks, _ = findings(capsys, family / "child")
    assert status == 0 and marks["parent"] == "not checked"


def test_another_tokenizer_and_other_code(family, capsys):
    path = family / "child" / "lineage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_fingerprint": "f" * 16, "code": "0" * 16}))
    status, marks, text = findings(capsys, family / "child")
    assert (marks["tokenizer"], marks["code"]) == ("failed", "not checked") and "trained with ffffffffffffffff" in text


def test_an_adapter(family, capsys):
    model = apply_lora(seeded_model(), LoRAConfig(rank=2))
    parent = {"path": str(family / "parent"), "weights": weights_fingerprint(model)}
    save_adapter(model, family / "adapter", "../parent", {"stage": "lora", "parent": parent, **code_version()})
    status, marks, text = findings(capsys, family / "adapter")
    assert status == 0 and marks["files"] == marks["weights"] == marks["parent"] == "ok", text
    (family / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    assert findings(capsys, family / "adapter")[0] == 1


def test_states(tmp_path, capsys):
    for step in (3, 6):
        save_state(tmp_path, {"step": step})
    status, marks, text = findings(capsys, tmp_path)
    assert status == 0 and "from step 6" in text and set(marks.values()) == {"ok"}
    (tmp_path / "step_00000006" / "state.json").write_text("{}")
    status, marks, text = findings(capsys, tmp_path)
    assert status == 1 and marks["step_00000006"] == "failed" and marks["resume"] == "ok" and "from step 3" in text


def test_the_code_version_sees_every_file(monkeypatch, tmp_path):
    """Of the package and of nothing beside it."""
    from tinylm.system import code_version as module

    package = tmp_path / "package"
    (package / "system").mkdir(parents=True)
    (package / "model").mkdir()
    monkeypatch.setattr(module, "__file__", str(package / "system" / "code_version.py"))

    def code_after_writing(name: str, content: str) -> str:
        (package / name).write_text(content)
        module.code_version.cache_clear()
        return module.code_version()["code"]

    files = [("a.py", "x = 1\n"), ("a.py", "x = 2\n"), ("model/b.py", "x = 2\n"), ("../c.py", "x = 3\n")]
    seen = [code_after_writing(name, content) for name, content in files]
    module.code_version.cache_clear()
    assert len(set(seen[:3])) == 3 and seen[3] == seen[2]


@pytest.mark.parametrize(
    "odd",
    [{"parent": "somewhere"}, {"parent": {"path": 5}}, {"step": "7"}, {"settings": [1]}, {"changed_on_resume": "x"},
     {"tokenizer_fingerprint": [1]}, {"version": {}}],
)  # fmt: skip
def test_a_strangers_lineage_is_no_crash(family, capsys, odd):
    path = family / "child" / "lineage.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **odd}))
    status, marks, _ = findings(capsys, family / "child")
    assert status == 1 and marks["files"] == "failed"
