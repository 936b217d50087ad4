"""The README's ten lines, run as they are typed there: the model learns all ten answers and keeps what it knew."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.command_line import tinylm
from tests.stage_files import write_stage_files
from tests.test_docs import blocks
from tinylm.checkpoint.loading import load_for_use
from tinylm.commands.quickstart import QuickstartSettings, make_plan
from tinylm.dataset import tinyworld
from tinylm.evaluation.skills import MEAN, score_skills
from tinylm.generation.engine import Engine, SamplingSettings
from tinylm.trainer import train_full_sft, train_pretrain, train_tokenizer

BASE = "out/quickstart/full_sft"
GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=60)


def run_example(repository: Path, folder: Path, base: Path) -> dict[str, str]:
    """Type the README's block in `folder`, with `base` for the quickstart's model; returns what it taught."""
    (block,) = (code for code in blocks(repository / "README.md", "sh") if "mine.jsonl" in code)
    before, rest = block.split("python - <<'EOF'\n")
    script, commands = rest.split("EOF\n")
    assert not before
    (folder / "out").mkdir(exist_ok=True)  # the quickstart has made it
    exec(compile(script, "README.md", "exec"), {})
    for line in commands.replace("\\\n", " ").replace(BASE, str(base)).strip().splitlines():
        command, *words = shlex.split(line)
        assert command == "tinylm" and (command != "sft" or str(base) in words)
        status, said = tinylm(*words)
        assert status == 0, said
    rows = [json.loads(line)["messages"] for line in (folder / "out" / "mine.jsonl").read_text("utf-8").splitlines()]
    taught = {question["content"]: answer["content"] for question, answer in rows}
    assert len(taught) == 10 and taught["What do you eat?"] in said
    assert len(list((folder / "out" / "mine").glob("*_epoch*"))) == 1, "one model is left, not forty"
    return taught


def engine_of(path: Path) -> Engine:
    loaded = load_for_use(path)
    return Engine(loaded.model, loaded.tokenizer)


def answers(engine: Engine, questions: list[str]) -> list[str]:
    return engine.reply_batch([[{"role": "user", "content": question}] for question in questions], GREEDY)


@pytest.mark.slow
def test_the_ten_lines_are_learnt(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model that has just begun to read learns all ten with the README's flags."""
    monkeypatch.chdir(tmp_path)
    write_stage_files(tmp_path, num_chats=8)
    shape = "--preset tiny --hidden_size 128 --num_hidden_layers 2 --max_seq_len 256 --max_steps 5".split()
    status, said = tinylm("pretrain", "--data_path", "texts.jsonl", *shape, "--device", "cpu", "--output_dir", "base")
    assert status == 0, said
    taught = run_example(repository, tmp_path, tmp_path / "base")
    assert answers(engine_of(tmp_path / "out" / "mine"), list(taught)) == list(taught.values())


@pytest.mark.long
def test_the_quickstarts_model_keeps_what_it_knew(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the model for which the README means it; of the repository's own quickstart, if it has been run."""
    monkeypatch.chdir(tmp_path)
    base = repository / BASE
    if not base.exists():
        plan = make_plan(QuickstartSettings(output_dir=str(tmp_path / "quickstart")))
        train_tokenizer.train(plan.tokenizer)
        train_pretrain.train(plan.pretrain)
        train_full_sft.train(plan.full_sft)
        base = tmp_path / "quickstart" / "full_sft"
    taught = run_example(repository, tmp_path, base)
    after = engine_of(tmp_path / "out" / "mine")
    assert answers(after, list(taught)) == list(taught.values())
    assert answers(after, ["What is the opposite of big?"]) == ["The opposite of big is small."]
    means = [score_skills(engine, tinyworld, GREEDY, num_items=20).summary[MEAN] for engine in (engine_of(base), after)]
    print(f"skills right: {means[0]:.1%} before, {means[1]:.1%} after")
    assert means[1] > means[0] - 0.2
