"""Every stage in miniature, through the command line, each from the folder that the one before it left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import SHAPE, tinylm
from tests.stage_files import write_stage_files
from tests.tokenizer.other_tokenizers import write_tokenizer
from tinylm import cli
from tinylm.checkpoint.loading import load_for_use
from tinylm.checkpoint.model_folder import load_model
from tinylm.model.lora import adapters_disabled, unload_lora

FOLDER_FILES = {
    "chat_template.jinja", "config.json", "generation_config.json", "lineage.json", "manifest.json",
    "model.safetensors",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
SHARED = [
    "--device", "cpu", "--dtype", "float32", "--max_seq_len", "128", "--batch_size", "4", "--max_steps", "3",
    "--log_interval", "1", "--validation_fraction", "0.1", "--learning_rate", "1e-2", "--warmup_fraction", "0",
]  # fmt: skip


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@dataclass
class Stages:
    """The output folders of a whole chain, and what each command said."""

    root: Path
    base_before_lora: bytes = b""
    said: dict[str, str] = field(default_factory=dict)

    def run(self, command: str, *words: object) -> None:
        status, text = tinylm(command, *words, "--output_dir", self.root / command)
        assert status == 0, text
        self.said[command] = text

    def model(self, command: str) -> Path:
        """The model folder of a stage, which bears its stage's name."""
        if command == "merge":
            return self.root / "merge"
        stage = {"sft": "full_sft"}.get(command, command)
        return self.root / command / f"{stage}_32_epoch0"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Small files in the shapes that users bring."""
    folder = tmp_path_factory.mktemp("data")
    write_stage_files(folder)
    return folder


@pytest.fixture(scope="module")
def stages(tmp_path_factory, data) -> Stages:
    """tokenizer -> pretrain -> sft -> lora -> merge -> dpo, each given the *output folder* of the one before."""
    stages = Stages(tmp_path_factory.mktemp("stages"))
    root = stages.root
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinylm.trainer.run.run.measured_matmul_flops", lambda runtime: 1e11)
        stages.run("tokenizer", "--data_path", data / "texts.jsonl", "--vocab_size", "400")
        texts = ["--data_path", data / "texts.jsonl", "--tokenizer_path", root / "tokenizer"]
        stages.run("pretrain", *texts, *SHARED, *SHAPE)
        chats = ["--data_path", data / "chats.jsonl", *SHARED]
        stages.run("sft", "--model_path", root / "pretrain", "--num_hidden_layers", "1", *chats)
        stages.base_before_lora = (stages.model("sft") / "model.safetensors").read_bytes()
        stages.run("lora", "--model_path", root / "sft", "--lora_rank", "2", "--lora_dropout", "0.1", *chats)
        stages.run("merge", "--model_path", root / "lora")
        stages.run("dpo", "--model_path", root / "merge", "--data_path", data / "pairs.jsonl", *SHARED)
    return stages


def logits_of(folder: Path) -> torch.Tensor:
    model, _, _ = load_model(folder)
    with torch.no_grad():
        return model(some_ids())


def some_ids() -> torch.Tensor:
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(7))


@pytest.mark.slow
def test_every_stage_trains_and_its_folder_is_the_next_ones_model(stages):
    for command in ("pretrain", "sft", "merge", "dpo"):
        assert {path.name for path in stages.model(command).iterdir()} == FOLDER_FILES, command
    lineages = {
        name: json.loads((stages.model(name) / "lineage.json").read_text())
        for name in ("pretrain", "sft", "lora", "merge", "dpo")
    }
    assert {name: lineage["stage"] for name, lineage in lineages.items()} == {
        "pretrain": "pretrain", "sft": "full_sft", "lora": "lora", "merge": "merged", "dpo": "dpo"
    }  # fmt: skip
    for child, parent in (("sft", "pretrain"), ("lora", "sft"), ("merge", "lora"), ("dpo", "merge")):
        assert Path(lineages[child]["parent"]["path"]) == stages.model(parent)
    for name in ("pretrain", "sft", "lora", "dpo"):
        assert lineages[name]["finished"] and lineages[name]["step"] == 3
        assert lineages[name]["settings"]["max_steps"] == 3
    folders = {"pretrain", "sft", "merge", "dpo"}
    assert len({logits_of(stages.model(name)).sum().item() for name in folders}) == len(folders)  # all of them learned


@pytest.mark.slow
def test_the_plan_comes_before_and_the_movement_after(stages):
    for name in ("pretrain", "sft", "lora", "dpo"):
        text = stages.said[name]
        assert text.index("what will happen") < text.index("3/3") < text.index("weights moved")
        assert "hardly moved" not in text and "validation loss" in text
        assert str(stages.model(name)) in text
    assert "tok/s" in stages.said["pretrain"] and "of which" in stages.said["lora"]
    assert "preference accuracy" in stages.said["dpo"] and "reward margin" in stages.said["dpo"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer", "pretrain", "sft", "lora", "merge", "dpo"])
def test_a_stage_ends_with_commands_that_can_be_typed(stages, name):
    """In the order of the chain: what comes next takes what is there now."""
    lines = stages.said[name].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("next  "))
    place = stages.root / "tokenizer" if name == "tokenizer" else stages.model(name)
    for line in lines[first:]:
        program, command, *flags = line.partition(": ")[2].split()
        assert program == "tinylm" and command in cli.COMMANDS and flags[-1] == str(place), line


@pytest.mark.slow
@pytest.mark.parametrize("command", ["tokenizer", "pretrain", "sft", "lora", "dpo"])
def test_a_finished_stage_is_refused_before_its_data_is_read(stages, command):
    """A second `sft` replaced the model, after an hour of tokenising for nothing."""
    parents = {"sft": "pretrain", "lora": "sft", "dpo": "merge"}
    words = ["--model_path", stages.root / parents[command]] if command in parents else []
    words += ["--tokenizer_path", stages.root / "tokenizer", *SHAPE] if command == "pretrain" else []
    status, text = tinylm(command, *words, "--data_path", "nowhere", "--output_dir", stages.root / command)
    what = "exists already" if command == "tokenizer" else "holds a finished"
    assert status == 2 and what in text and "pass --overwrite to replace it, or choose another --output_dir" in text
    assert "will happen" not in text and "nowhere" not in text


@pytest.mark.slow
def test_dpo_starts_at_log_2_whatever_the_model(stages):
    """The reference is the parent itself, scored by the same code: at the first step the policies are equal."""
    first = json.loads((stages.root / "dpo" / "dpo_32_metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["reward_margin"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "sft", "merge", "dpo"])
def test_transformers_loads_every_folder(stages, command):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = stages.model(command)
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(some_ids()).logits, logits_of(folder), rtol=1e-4, atol=1e-5)
    text = "Tom had a red kite."
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == load_model(folder)[1].encode(text)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own
def test_peft_loads_the_adapter_folder(stages):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(stages.model("sft"))
    theirs = PeftModel.from_pretrained(base, stages.model("lora")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(some_ids()).logits, logits_of(stages.model("lora")), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits_of(stages.model("merge")), logits_of(stages.model("lora")), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_adapter_changes_the_answers_and_no_bit_of_its_base(stages):
    assert (stages.model("sft") / "model.safetensors").read_bytes() == stages.base_before_lora
    model, _, _ = load_model(stages.model("lora"))
    base = logits_of(stages.model("sft"))
    with torch.no_grad():
        assert not torch.allclose(model(some_ids()), base, atol=1e-3)
        with adapters_disabled(model):
            assert torch.equal(model(some_ids()), base)
    unload_lora(model)
    stored = load_file(stages.model("sft") / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name]), name


@pytest.mark.slow
def test_all_folders_can_be_moved_together(stages, tmp_path):
    """An adapter names its base relative to itself, so a project folder may be carried elsewhere."""
    shutil.copytree(stages.root, tmp_path / "moved")
    moved = tmp_path / "moved" / stages.model("lora").relative_to(stages.root)
    assert torch.equal(logits_of(moved), logits_of(stages.model("lora")))
    base = json.loads((moved / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert not Path(base).is_absolute()


@pytest.mark.slow
def test_an_adapter_finds_its_base_through_a_link(stages, data, tmp_path):
    """Outputs are often a link to a larger disk, and `..` of a linked folder is not where the link stands."""
    (tmp_path / "disk" / "deep" / "lora").mkdir(parents=True)
    (tmp_path / "lora").symlink_to(tmp_path / "disk" / "deep" / "lora")
    words = ["--model_path", stages.root / "sft", "--data_path", data / "chats.jsonl", *SHARED, "--max_steps", "1"]
    status, text = tinylm("lora", *words, "--output_dir", tmp_path / "lora")
    assert status == 0, text
    unload_lora(model := load_model(tmp_path / "lora")[0])
    with torch.no_grad():
        assert torch.equal(model(some_ids()), logits_of(stages.model("sft")))


@pytest.mark.slow
def test_dpo_takes_an_adapter_folder_too(stages, data, tmp_path):
    """The adapter is folded in first, so the policy, its reference and the result are ordinary models."""
    words = ["--model_path", stages.root / "lora", "--data_path", data / "pairs.jsonl", *SHARED, "--max_steps", "1"]
    status, text = tinylm("dpo", *words, "--output_dir", tmp_path)
    assert status == 0, text
    first = json.loads((tmp_path / "dpo_32_metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert {path.name for path in (tmp_path / "dpo_32_epoch0").iterdir()} == FOLDER_FILES


@pytest.mark.slow
def test_an_adapter_of_the_tables_goes_through_every_command(stages, data, tmp_path):
    """The base's table is tied. What is merged, folded in, continued or measured is the adapted model."""
    chats = ["--data_path", data / "chats.jsonl", *SHARED, "--model_path", stages.root / "sft", "--save_interval", "1"]
    chats += ["--target_modules", "v_proj,embed_tokens,lm_head", "--lora_rank", "2", "--optimizer", "muon"]
    lora = tmp_path / "lora" / "lora_32_epoch0"
    for words in (
        ["lora", *chats, "--output_dir", tmp_path / "lora"],
        ["merge", "--model_path", lora, "--output_dir", tmp_path / "merged"],
    ):
        status, text = tinylm(*words)
        assert status == 0, text
    assert "its embedding and its output head, one table until now, are two" in text
    adapted, base = logits_of(lora), logits_of(stages.model("sft"))
    assert (adapted - base).abs().max() > 0.01
    torch.testing.assert_close(logits_of(tmp_path / "merged"), adapted, rtol=1e-4, atol=1e-5)
    model = load_model(lora)[0]
    assert torch.equal(unload_lora(model)(some_ids()), base)

    (lora.parent / "lora_32_state" / "step_00000003").rename(tmp_path / "lost")  # as if killed before it was saved
    shutil.rmtree(lora)
    status, text = tinylm("lora", *chats, "--output_dir", tmp_path / "lora", "--resume", "true")
    assert status == 0 and "resuming" in text, text
    assert torch.equal(logits_of(lora), adapted)

    pairs = ["--data_path", data / "pairs.jsonl", *SHARED, "--max_steps", "1", "--output_dir", tmp_path / "dpo"]
    status, text = tinylm("dpo", "--model_path", lora, *pairs)
    assert status == 0, text
    first = json.loads((tmp_path / "dpo" / "dpo_32_metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    for words in (
        ["verify", lora], ["verify", tmp_path / "dpo"], ["verify", tmp_path / "merged"],
        ["eval", "--model_path", stages.root / "sft", "--adapter", lora, "--data_path", data / "pairs.jsonl"],
    ):  # fmt: skip
        status, text = tinylm(*words)
        assert status == 0, text


@pytest.mark.slow
def test_without_data_the_embedded_corpus_is_used(stages, tmp_path):
    words = ["--tokenizer_path", stages.root / "tokenizer", *SHARED, *SHAPE, "--max_steps", "1"]
    status, text = tinylm("pretrain", *words, "--tinyworld_documents", "64", "--output_dir", tmp_path)
    assert status == 0 and "no --data_path: training on TinyWorld" in text, text


@pytest.mark.slow
def test_a_model_has_the_ends_of_its_tokenizer(tmp_path):
    folder = write_tokenizer("llama3", tmp_path / "theirs", pad_token="<|end_of_text|>")
    words = ["--tokenizer_path", folder, *SHARED, *SHAPE, "--max_steps", "1", "--tinyworld_documents", "64"]
    status, text = tinylm("pretrain", *words, "--output_dir", tmp_path / "out")
    assert status == 0, text
    made = json.loads((tmp_path / "out" / "pretrain_32_epoch0" / "config.json").read_text(encoding="utf-8"))
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    assert made["bos_token_id"] == ids["<|begin_of_text|>"] > 2
    assert made["eos_token_id"] == ids["<|eot_id|>"] and made["pad_token_id"] == ids["<|end_of_text|>"]
    assert load_for_use(tmp_path / "out").document_start == [ids["<|begin_of_text|>"]]  # as in the rows


@pytest.mark.slow
def test_resume_by_command(stages, data, tmp_path):
    """`--resume` after a finished run changes nothing; with other data it is refused in one line, status 2."""
    words = ["--tokenizer_path", stages.root / "tokenizer", *SHARED, *SHAPE, "--resume"]
    shutil.copytree(stages.root / "pretrain", tmp_path / "out")
    place = tmp_path / "out" / "pretrain_32_epoch0" / "model.safetensors"
    before = place.read_bytes()
    status, text = tinylm("pretrain", "--data_path", data / "texts.jsonl", *words, "--output_dir", tmp_path / "out")
    assert status == 0 and "from step 3" in text and place.read_bytes() == before, text
    status, text = tinylm("pretrain", "--data_path", data / "chats.jsonl", *words, "--output_dir", tmp_path / "out")
    assert status == 2, text
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "Something else. " * 40}] * 40)
    status, text = tinylm("pretrain", "--data_path", other, *words, "--output_dir", tmp_path / "out")
    error = [line for line in text.splitlines() if line.startswith("tinylm: error: ")]
    assert status == 2 and len(error) == 1 and f"was made with --data_path {data}" in error[0], text
    assert place.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtype", "float16"], "dtype float16 on cpu; it needs CUDA"),
        (["--max_seq_len", "4096"], "max_seq_len is 4096, but"),
        (["--hidden_size", "64"], "hidden_size is 64, but"),
        (["--num_hidden_layers", "8"], "num_hidden_layers is 8, but"),
        (["--model_path", "nowhere"], "nowhere does not exist"),
    ],
)
def test_user_errors_are_one_line_with_status_2(stages, data, tmp_path, words, message):
    chats = ["--model_path", stages.root / "pretrain", "--data_path", data / "chats.jsonl", *SHARED]
    status, text = tinylm("sft", *chats, *words, "--output_dir", tmp_path)
    assert status == 2 and len(text.splitlines()) == 1 and message in text, text


@pytest.mark.slow
def test_merging_a_full_model_is_refused(stages, tmp_path):
    status, text = tinylm("merge", "--model_path", stages.root / "sft", "--output_dir", tmp_path / "m")
    assert status == 2 and "is a full model; expected an adapter folder" in text


@pytest.mark.slow
def test_torchrun_in_the_original_place(repository, stages, data, tmp_path):
    """`cd trainer && torchrun --nproc_per_node=2 train_pretrain.py` on CPUs gives the model that one process gives."""
    words = ["--data_path", data / "texts.jsonl", "--tokenizer_path", stages.root / "tokenizer", *SHARED, *SHAPE]
    words += ["--optimizer", "adamw", "--max_steps", "2", "--learning_rate", "1e-3", "--seed", "3"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_pretrain.py"]
    done = subprocess.run(
        [*command, *map(str, words), "--batch_size", "2", "--output_dir", str(tmp_path / "two")],
        cwd=repository / "trainer",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("pretrain: done") == 1
    status, text = tinylm("pretrain", *words, "--output_dir", tmp_path / "one")
    assert status == 0, text
    one, two = (load_file(tmp_path / name / "pretrain_32_epoch0" / "model.safetensors") for name in ("one", "two"))
    metrics = [
        [json.loads(line) for line in (tmp_path / name / "pretrain_32_metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for mine, other in zip(*metrics, strict=True):
        for key in mine.keys() & {"loss", "validation_loss", "grad_norm"}:
            assert mine[key] == pytest.approx(other[key], rel=1e-4)
    for name in one:  # Adam turns the rounding of a tiny gradient into a share of a step
        torch.testing.assert_close(one[name], two[name], atol=2e-4, rtol=0, msg=name)


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler for torch.compile")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile hides it from users
def test_a_really_compiled_model_saves_plain_names(stages, data, tmp_path):
    words = ["--data_path", data / "texts.jsonl", "--tokenizer_path", stages.root / "tokenizer", *SHARED, *SHAPE]
    status, text = tinylm("pretrain", *words, "--use_compile", "true", "--max_steps", "1", "--output_dir", tmp_path)
    assert status == 0 and "compiled in the first step" in text, text
    stored = load_file(tmp_path / "pretrain_32_epoch0" / "model.safetensors")
    assert stored.keys() == load_file(stages.model("pretrain") / "model.safetensors").keys()
